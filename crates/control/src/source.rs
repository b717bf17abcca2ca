//! Where configuration comes from.

pub mod directory;

//! The data plane: one proxy beside one workload.

pub mod body;
pub mod capture;
pub mod io;
pub mod plan;
pub mod platform;

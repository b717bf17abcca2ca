//! Tests only: hosts as network namespaces, the `sheer` binary and real programs on them, and waiting on conditions.
//!
//! A scenario reads like a script: make a [`net::Net`], put [`net::Host`]s on it, start programs, wait until something
//! holds, break something, look again. Whatever a scenario made is gone when it ends; what a killed one left is removed
//! by the next.

pub mod callers;
pub mod disk;
pub mod faults;
pub mod mesh;
pub mod net;
pub mod one_host;
pub mod program;
pub mod recorder;
pub mod shop;
pub mod unit;
pub mod wait;

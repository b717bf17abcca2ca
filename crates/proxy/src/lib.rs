//! The data plane: one proxy beside one workload.

pub mod body;
pub mod capture;
pub mod control;
pub mod detect;
pub mod dns;
pub mod drain;
pub mod h1;
pub mod h2;
pub mod identity;
pub mod io;
pub mod metrics;
pub mod plan;
pub mod platform;
pub mod state;
pub mod sync;
pub mod tcp;
#[cfg(test)]
mod testing;
pub mod upstream;

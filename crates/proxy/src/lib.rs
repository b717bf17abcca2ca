//! The data plane: one proxy beside one workload.

pub mod body;
pub mod io;
pub mod plan;

//! The data plane: one proxy beside one workload.

pub mod plan;

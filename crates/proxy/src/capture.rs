//! How a workload's traffic reaches its proxy: the nftables rules, sockets made inside the workload's namespace, and
//! the ports that its processes listen on.

mod diagnosis;
pub mod listening;
pub mod netns;
pub mod owner;
pub mod rules;

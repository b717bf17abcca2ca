//! A mesh in simulated time: the control plane and several proxies of the production code, on a network, clocks and disks
//! that do what a seed says. The same seed does the same again, to the letter of the trace.
//!
//! - [`chance`]: where randomness comes from, in this process.
//! - [`disk`]: disks that lose what was not flushed.
//! - [`host`]: the production code, started on a simulated host.
//! - [`plan`]: what happens when, drawn from a seed.
//! - [`seen`]: what a proxy shows, and what must always hold of it.
//! - [`world`]: a run of one seed.
//!
//! `docs/security/simulation.md` says what is simulated, what must hold and how a seed is played again.

pub mod chance;
pub mod disk;
pub mod host;
pub mod plan;
pub mod seen;
pub mod world;

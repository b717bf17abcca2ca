//! The data plane: one proxy beside one workload.

pub mod admin;
pub mod body;
pub mod capture;
mod certificate;
pub mod connection;
pub mod control;
pub mod detect;
pub mod dns;
pub mod drain;
pub mod error;
pub mod forward;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod h1;
pub mod h2;
pub mod health;
pub mod identity;
pub mod idle;
pub mod inbound;
pub mod io;
pub mod link;
pub mod listen;
#[cfg(test)]
mod mesh_tests;
pub mod metrics;
pub mod outbound;
pub mod overload;
pub mod plan;
pub mod platform;
pub mod record;
mod run;
mod send;
mod shared;
pub mod state;
pub mod sync;
pub mod tcp;
#[cfg(test)]
mod testing;
pub mod tls;
pub mod upstream;
pub mod worker;

pub use run::{Error, run};

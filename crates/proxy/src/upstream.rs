//! The way to endpoints: TLS, connections kept, and what is known of each.

pub mod dial;
pub mod endpoint;
pub mod pool;
pub mod silence;
pub mod ties;
pub mod tls;

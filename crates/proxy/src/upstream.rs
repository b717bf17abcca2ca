//! The way to endpoints: TLS, connections kept, and what is known of each.

pub mod endpoint;
pub mod tls;

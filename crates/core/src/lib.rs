//! What the mesh means: resources, compilation, and the decisions taken for each request.
//!
//! This crate is pure. It opens no socket, reads no clock and draws no random number: `now` and randomness are
//! arguments. The same compiled code decides in the proxy, in previews and explanations, in tests and in fuzzing.
//!
//! - [`name`], [`identity`]: names of services and workloads.
//! - [`wire`]: the messages between control plane and proxy.
//! - [`head`]: a request's or response's head, on which every decision is taken.
//! - [`snapshot`], [`assemble`]: what a proxy decides with, made from wire messages.
//! - [`route`], [`balance`], [`retry`]: which rule, which endpoint, whether again.
//! - [`cause`]: why a request failed, and what each reader is told of it.
//! - [`diagnostic`], [`resource`], [`compile`]: what users write, and what proxies are told of it.
//! - [`histogram`]: the latency buckets that proxies, control plane and command line share.
//! - [`token`]: join tokens.
//! - [`api`]: the JSON between control plane and command line.
//! - [`sniff`]: what a client's first bytes are.

pub mod api;
pub mod assemble;
pub mod balance;
pub mod cause;
pub mod compile;
pub mod diagnostic;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod head;
pub mod histogram;
pub mod identity;
pub mod name;
pub mod resource;
pub mod retry;
pub mod route;
pub mod snapshot;
pub mod sniff;
pub mod token;
pub mod wire;

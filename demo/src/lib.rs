//! Sample services and load for the demonstration. They know nothing of the mesh.
//!
//! A small shop: `web` shows what `catalog`, `pricing` (gRPC), `reviews` and `cart` (with a Redis behind it) say;
//! `echo` answers lines over TCP. Each is a plain server that finds its peers by name. [`load`] generates traffic and
//! counts what came of it; the test suites use it as a library.

mod arguments;
mod cart;
mod catalog;
mod client;
mod echo;
pub mod load;
pub mod pricing;
mod probe;
mod redis;
mod reviews;
mod server;
mod web;

pub use arguments::{Arguments, Kind, main, run};

//! The atomics of what threads share: in one place, so that `crates/interleave` compiles the same code over those of a
//! scheduler, which tries the orders in which threads can run.

pub(crate) use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64};

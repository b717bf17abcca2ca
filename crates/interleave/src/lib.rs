//! The code of `sheer-proxy` that threads share, compiled over the atomics of a scheduler (shuttle) that tries the orders
//! in which threads can run: the same files, with another `shared`.
//!
//! `docs/security/simulation.md` lists what threads share and what is tried here.

mod shared {
    pub(crate) use shuttle::sync::atomic::Ordering::{Acquire, Relaxed, Release};
    pub(crate) use shuttle::sync::atomic::{AtomicU32, AtomicU64};
}

#[path = "../../proxy/src/metrics/answers.rs"]
#[allow(unreachable_pub, reason = "the proxy exports it")]
mod answers;
#[path = "../../proxy/src/overload/clients.rs"]
mod clients;
#[path = "../../proxy/src/upstream/endpoint/state.rs"]
#[allow(dead_code, reason = "the proxy uses what is not tried here")]
mod state;

pub use clients::Way;
pub use state::{InFlight, State};

/// The answers of an edge.
#[derive(Default)]
pub struct Answers(answers::Answers);

/// The most keys that are told apart.
pub const MAX_ANSWERS: usize = answers::MAX_ANSWERS;

impl Answers {
    /// Counts one.
    pub fn count(&self, key: u32) {
        self.0.count(key);
    }

    /// What was counted, and what found no slot.
    pub fn counted(&self) -> (Vec<(u32, u64)>, u64) {
        (self.0.counted().collect(), self.0.other())
    }
}

/// The connections of clients, both ways.
#[derive(Default)]
pub struct Clients(clients::Clients);

impl Clients {
    /// Counts one more, if it may be.
    pub fn enter(&self, way: Way, most: usize) -> bool {
        self.0.enter(way, most)
    }

    /// One has ended.
    pub fn leave(&self, way: Way) {
        self.0.leave(way);
    }

    /// How many there are.
    pub fn number(&self) -> usize {
        self.0.number()
    }
}

/// The average of an endpoint that is in use.
pub fn average_in_use(state: &State) -> Option<f64> {
    state.average(state.in_flight().max(1))
}

/// What is in flight to an endpoint.
pub fn in_flight(state: &State) -> u32 {
    state.in_flight()
}

/// Whether it is picked last.
pub fn is_shunned(state: &State) -> bool {
    state.is_shunned()
}

//! What a proxy may use of its host, and what it gives up when that comes to its end: descriptors and memory.
//!
//! Connections of clients are counted against the descriptors that the process may have, so that each of them can have
//! one to an endpoint, and the proxy itself what it needs to be looked at. Memory is what the process holds against the
//! limit that it runs under, with what the kernel holds for its connections. Beyond three fifths of that nothing new is
//! begun; beyond three quarters what was begun last ends. All of it fails with [`Cause::Overloaded`](sheer_core::cause::Cause), which provably processed nothing.

mod clients;
pub mod memory;

pub use clients::Way;

use crate::metrics::Metrics;
use clients::Clients;
use memory::{Level, Memory};
use nix::sys::resource::{Resource, getrlimit};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

/// Descriptors that are not for traffic: the proxy's own files and listeners, 64 connections of people and programs that
/// look at it, resolvers. A quarter of all where that is less.
const RESERVED: usize = 128;

/// How often memory is looked at while there is plenty.
pub const CALM: Duration = Duration::from_millis(500);

/// The same from a quarter of the limit on: as fast as bodies can fill a tenth of a small one.
pub const ALERT: Duration = Duration::from_millis(20);

/// What a request or connection that was begun may come to hold: memory is looked at as well whenever so many were begun
/// that they may fill an eighth of the limit. That is after 32 under 64 MiB, and hardly ever on a large machine.
const EACH: u64 = 256 * 1024;

/// Connections that are served however much memory is in use: what an allocator does not give back must not keep a proxy
/// from serving for ever. At 256 KiB each way they hold 16 MiB, what is left free of the smallest limit that is any use.
const FEW: usize = 32;

/// What a proxy may use, and uses.
pub struct Overload {
    metrics: Arc<Metrics>,
    /// The most connections of clients.
    most: usize,
    clients: Clients,
    level: AtomicU8,
    /// Begun since memory was looked at, and how many may be before it is again.
    begun: AtomicUsize,
    at_once: AtomicUsize,
    memory: Option<Mutex<Memory>>,
}

/// A client's connection, for as long as it lives.
pub struct Admitted(Arc<Overload>, Way);

impl Overload {
    /// The limits that this process runs under.
    pub fn of_this_process(metrics: Arc<Metrics>) -> Arc<Self> {
        let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
        Self::new(metrics, usize::try_from(descriptors).unwrap_or(usize::MAX), Memory::of_this_process())
    }

    /// So many descriptors, and this memory; none where it is not looked at.
    pub fn new(metrics: Arc<Metrics>, descriptors: usize, memory: Option<Memory>) -> Arc<Self> {
        let most = (descriptors - RESERVED.min(descriptors / 4)) / 2;
        metrics.clients_limit.store(most as u64, Relaxed);
        let overload = Self {
            metrics,
            most,
            clients: Clients::default(),
            level: AtomicU8::new(Level::Calm as u8),
            begun: AtomicUsize::new(0),
            at_once: AtomicUsize::new(usize::MAX),
            memory: memory.map(Mutex::new),
        };
        overload.look();
        Arc::new(overload)
    }

    /// Admits a client's connection, unless there are as many as can be served. A sixteenth is kept for the other
    /// direction: who keeps calling a workload must not keep it from calling others.
    pub fn admit(self: &Arc<Self>, way: Way) -> Option<Admitted> {
        if !self.begins() {
            return None;
        }
        if !self.clients.enter(way, self.most) {
            return None;
        }
        self.metrics.clients_open.fetch_add(1, Relaxed);
        Some(Admitted(self.clone(), way))
    }

    /// Whether something new may be begun. To be asked once for each connection and request.
    pub fn begins(&self) -> bool {
        // An estimate is enough, so that workers do not wait for each other: a lost count is made up for by the next.
        let begun = self.begun.load(Relaxed) + 1;
        self.begun.store(begun, Relaxed);
        if begun >= self.at_once.load(Relaxed) {
            self.look();
        }
        self.level.load(Relaxed) == Level::Calm as u8 || self.is_nearly_empty()
    }

    /// Whether there is hardly anything that could be given up.
    pub fn is_nearly_empty(&self) -> bool {
        self.memory.is_some() && self.clients.number() <= FEW
    }

    /// How much memory is in use, as it was last looked at.
    pub fn level(&self) -> Level {
        Level::of(self.level.load(Relaxed))
    }

    /// The level that a test wants. It stays where no memory is looked at.
    #[cfg(test)]
    pub(crate) fn set_level(&self, level: Level) {
        self.level.store(level as u8, Relaxed);
    }

    /// Looks at the memory, and says when to look again.
    pub fn look(&self) -> Duration {
        // Who finds it locked is told what the other one sees.
        let Some(mut memory) = self.memory.as_ref().and_then(Mutex::try_lock) else { return CALM };
        let seen = memory.look(self.level());
        self.begun.store(0, Relaxed);
        self.at_once.store(usize::try_from(seen.limit / 8 / EACH).unwrap_or(usize::MAX).max(1), Relaxed);
        self.level.store(seen.level as u8, Relaxed);
        self.metrics.memory.store(seen.own, Relaxed);
        self.metrics.memory_limit.store(seen.limit, Relaxed);
        if seen.own > seen.limit / 4 { ALERT } else { CALM }
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.0.clients.leave(self.1);
        self.0.metrics.clients_open.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_direction_takes_all_descriptors() {
        let metrics = Arc::<Metrics>::default();
        let overload = Overload::new(metrics.clone(), 512, None);
        let fill = |way| std::iter::from_fn(|| overload.admit(way)).collect::<Vec<_>>();
        // (512 - 128) / 2, less a sixteenth.
        let calls = fill(Way::In);
        assert_eq!(calls.len(), 180);
        let own = fill(Way::Out);
        assert_eq!(own.len(), 12);
        drop(calls);
        assert!(overload.admit(Way::In).is_some(), "what ends makes room at once");
        assert_eq!(metrics.clients_open.load(Relaxed), 12);
        drop(own);
        assert_eq!(metrics.clients_open.load(Relaxed), 0);
    }

    #[test]
    fn few_descriptors_still_serve() {
        let overload = Overload::new(Arc::default(), 64, None);
        assert_eq!(std::iter::from_fn(|| overload.admit(Way::Out)).collect::<Vec<_>>().len(), 23);
    }
}

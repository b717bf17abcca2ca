//! How many connections of clients there are.

use crate::shared::{AtomicU64, Relaxed};

/// Which way a connection goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the workload.
    Out,
    /// To the workload.
    In,
}

impl Way {
    /// One connection of this way, in the word that counts both.
    const fn one(self) -> u64 {
        match self {
            Way::Out => 1,
            Way::In => 1 << 32,
        }
    }
}

/// Connections of both ways, counted in one word: who adds one sees both as they are at that moment, so that several
/// workers together never admit more than one alone would.
#[derive(Debug, Default)]
pub(crate) struct Clients(AtomicU64);

impl Clients {
    /// Counts one more, unless there are as many as can be served. A sixteenth of all is kept for the other way.
    pub(crate) fn enter(&self, way: Way, most: usize) -> bool {
        let count = |counted: u64| {
            let (out, inward) = ways(counted);
            let own = 1 + if way == Way::Out { out } else { inward };
            (own <= most - most / 16 && out + inward < most).then(|| counted + way.one())
        };
        self.0.fetch_update(Relaxed, Relaxed, count).is_ok()
    }

    /// One that was counted has ended.
    pub(crate) fn leave(&self, way: Way) {
        self.0.fetch_sub(way.one(), Relaxed);
    }

    /// How many there are, both ways together.
    pub(crate) fn number(&self) -> usize {
        let (out, inward) = ways(self.0.load(Relaxed));
        out + inward
    }
}

fn ways(counted: u64) -> (usize, usize) {
    // Half a word each: there are never as many descriptors.
    (counted as u32 as usize, (counted >> 32) as usize)
}

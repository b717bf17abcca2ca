//! How often each kind of answer was given: a small table that workers fill without a lock.

use crate::shared::{AtomicU32, AtomicU64, Relaxed};

/// Most different answers (status, gRPC status, reason) told apart on one edge; further ones are counted as status 0
/// with reason `other`.
pub const MAX_ANSWERS: usize = 64;

/// Counts by key. A key is never 0.
pub(crate) struct Answers {
    slots: Box<[Slot; MAX_ANSWERS]>,
    other: AtomicU64,
}

#[derive(Default)]
struct Slot {
    /// 0 while the slot is free. Set once.
    key: AtomicU32,
    count: AtomicU64,
}

impl Default for Answers {
    fn default() -> Self {
        Self { slots: Box::new(std::array::from_fn(|_| Slot::default())), other: AtomicU64::new(0) }
    }
}

impl Answers {
    /// Counts one.
    pub(crate) fn count(&self, key: u32) {
        self.slot(key).fetch_add(1, Relaxed);
    }

    fn slot(&self, key: u32) -> &AtomicU64 {
        // A multiplicative hash spreads neighbouring statuses.
        let start = (key.wrapping_mul(0x9e37_79b1) >> 26) as usize;
        for step in 0..MAX_ANSWERS {
            let slot = &self.slots[(start + step) % MAX_ANSWERS];
            let mut found = slot.key.load(Relaxed);
            if found == 0 {
                found = match slot.key.compare_exchange(0, key, Relaxed, Relaxed) {
                    Ok(_) => key,
                    Err(other) => other,
                };
            }
            if found == key {
                return &slot.count;
            }
        }
        &self.other
    }

    /// What was counted, by key.
    pub(crate) fn counted(&self) -> impl Iterator<Item = (u32, u64)> {
        let slots = self.slots.iter().map(|slot| (slot.key.load(Relaxed), slot.count.load(Relaxed)));
        // A slot that is taken at this moment may show its first count and not yet its key: it is told the next time.
        slots.filter(|(key, count)| *key != 0 && *count > 0)
    }

    /// What found no slot.
    pub(crate) fn other(&self) -> u64 {
        self.other.load(Relaxed)
    }
}

//! Wall-clock time, with an offset that tests can move.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Reads the wall clock. Certificates and tokens live by it; it may jump.
#[derive(Clone, Debug, Default)]
pub struct Clock {
    offset_s: Arc<AtomicI64>,
}

impl Clock {
    /// A clock that differs from the system's by a number of seconds which may change while it runs.
    pub fn shifted(offset_s: Arc<AtomicI64>) -> Self {
        Self { offset_s }
    }

    /// The time now.
    pub fn now(&self) -> SystemTime {
        let offset = self.offset_s.load(Ordering::Relaxed);
        let shift = Duration::from_secs(offset.unsigned_abs());
        let now = SystemTime::now();
        let moved = if offset >= 0 { now.checked_add(shift) } else { now.checked_sub(shift) };
        moved.unwrap_or(now)
    }

    /// The time now in unix seconds.
    pub fn unix(&self) -> i64 {
        let since = self.now().duration_since(UNIX_EPOCH).unwrap_or_default();
        i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
    }
}

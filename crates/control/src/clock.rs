//! Wall-clock time, with an offset that tests can move.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Reads the wall clock. Certificates and tokens live by it; it may jump.
#[derive(Clone, Default)]
pub struct Clock {
    offset_s: Arc<AtomicI64>,
    /// None: the machine's.
    source: Option<Arc<dyn Fn() -> SystemTime + Send + Sync>>,
}

impl Clock {
    /// A clock that differs from the system's by a number of seconds which may change while it runs.
    pub fn shifted(offset_s: Arc<AtomicI64>) -> Self {
        Self { offset_s, source: None }
    }

    /// A clock of another world: simulated time.
    pub fn of(source: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        Self { offset_s: Arc::default(), source: Some(Arc::new(source)) }
    }

    /// The time now.
    pub fn now(&self) -> SystemTime {
        let offset = self.offset_s.load(Ordering::Relaxed);
        let shift = Duration::from_secs(offset.unsigned_abs());
        let now = self.source.as_ref().map_or_else(SystemTime::now, |source| source());
        let moved = if offset >= 0 { now.checked_add(shift) } else { now.checked_sub(shift) };
        moved.unwrap_or(now)
    }

    /// The time now in unix seconds.
    pub fn unix(&self) -> i64 {
        let since = self.now().duration_since(UNIX_EPOCH).unwrap_or_default();
        i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Clock").field("offset_s", &self.offset_s).finish_non_exhaustive()
    }
}

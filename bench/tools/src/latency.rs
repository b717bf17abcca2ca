//! Latencies to the microsecond, up to a second.
use std::cell::{Cell, RefCell};
use std::time::Duration;

const LONGEST: usize = 1_000_000;

/// Counts answers and how long they took.
pub struct Latencies {
    counts: RefCell<Vec<u32>>,
    longest: Cell<Duration>,
    answered: Cell<u64>,
    failed: Cell<u64>,
    first_failure: RefCell<Option<String>>,
}

impl Default for Latencies {
    fn default() -> Self {
        Self {
            counts: RefCell::new(vec![0; LONGEST + 1]),
            longest: Cell::default(),
            answered: Cell::default(),
            failed: Cell::default(),
            first_failure: RefCell::default(),
        }
    }
}

impl Latencies {
    /// A good answer after so long.
    pub fn answer(&self, time: Duration) {
        self.counts.borrow_mut()[(time.as_micros() as usize).min(LONGEST)] += 1;
        self.longest.set(self.longest.get().max(time));
        self.answered.set(self.answered.get() + 1);
    }

    /// None.
    pub fn failure(&self, why: &dyn std::fmt::Display) {
        self.failed.set(self.failed.get() + 1);
        self.first_failure.borrow_mut().get_or_insert_with(|| why.to_string());
    }

    /// Good and bad ones since the last report.
    pub fn done(&self) -> u64 {
        self.answered.get() + self.failed.get()
    }

    /// One line of JSON; counting begins anew.
    pub fn report(&self, missing: u64, time: Duration) -> String {
        let (p50, p99) = (self.percentile(0.5), self.percentile(0.99));
        let why = self.first_failure.take().unwrap_or_default().replace(['"', '\\', '\n'], " ");
        let (answered, failed) = (self.answered.take(), self.failed.take());
        self.counts.borrow_mut().fill(0);
        format!(
            r#"{{"requests":{answered},"rps":{:.1},"p50_us":{p50},"p99_us":{p99},"max_us":{},"failed":{failed},"missing":{missing},"why":"{why}"}}"#,
            answered as f64 / time.as_secs_f64(),
            self.longest.take().as_micros(),
        )
    }

    fn percentile(&self, part: f64) -> usize {
        let wanted = (self.answered.get() as f64 * part).ceil() as u64;
        let mut seen = 0;
        self.counts
            .borrow()
            .iter()
            .position(|count| {
                seen += u64::from(*count);
                seen >= wanted.max(1)
            })
            .unwrap_or(0)
    }
}

//! When to send.

use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, Interval, MissedTickBehavior};

/// The beat of one connection.
pub(super) struct Pace {
    beat: Interval,
}

impl Pace {
    /// The beat of connection `index` of `connections` that make `rate` requests a second together.
    pub(super) fn new(rate: f64, connections: usize, index: usize) -> Self {
        let period = Duration::try_from_secs_f64(connections as f64 / rate).unwrap_or(Duration::from_secs(3600));
        let period = period.max(Duration::from_micros(1));
        let first = Instant::now() + period.mul_f64(index as f64 / connections as f64);
        let mut beat = tokio::time::interval_at(first, period);
        // A late answer must not be followed by a burst.
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { beat }
    }

    /// Waits for the next beat; `false` when it is time to stop.
    pub(super) async fn next(&mut self, stopped: &mut watch::Receiver<bool>) -> bool {
        tokio::select! {
            biased;
            _ = stopped.wait_for(|stopped| *stopped) => false,
            _ = self.beat.tick() => true,
        }
    }
}

//! What this proxy sees of one endpoint. All workers share it.

use crate::shared::{Acquire, AtomicU32, AtomicU64, Relaxed, Release};
use sheer_core::balance::{aged, peak_ewma};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// For how long an endpoint is picked last after a connect to it failed, or after it said that it is leaving.
const SHUNNED: Duration = Duration::from_secs(3);

/// For how often at most that time doubles while connects meet silence: each attempt costs a caller a second.
const DOUBLINGS: u32 = 3;

/// What this proxy sees of an endpoint. All workers share it.
#[derive(Debug)]
pub struct State {
    epoch: Instant,
    in_flight: AtomicU32,
    /// Bits of an `f64`, in seconds.
    average: AtomicU64,
    /// Microseconds since the epoch; 0 before the first answer.
    observed: AtomicU64,
    /// Microseconds since the epoch until which it is picked last.
    shunned_until: AtomicU64,
    /// Connects in a row that met silence.
    silent: AtomicU32,
}

impl Default for State {
    fn default() -> Self {
        Self::new(Instant::now())
    }
}

impl State {
    /// One of which nothing is known yet. Times are counted from `epoch`.
    pub(crate) fn new(epoch: Instant) -> Self {
        Self {
            epoch,
            in_flight: AtomicU32::new(0),
            average: AtomicU64::new(0),
            observed: AtomicU64::new(0),
            shunned_until: AtomicU64::new(0),
            silent: AtomicU32::new(0),
        }
    }

    /// Counts a request or connection in flight for as long as the returned value lives.
    pub fn begin(self: &Arc<Self>) -> InFlight {
        self.in_flight.fetch_add(1, Relaxed);
        InFlight(self.clone())
    }

    /// Takes an answer's time into the average.
    pub fn observe(&self, latency: Duration) {
        let now = self.now().max(1);
        let elapsed = now.saturating_sub(self.observed.load(Relaxed));
        let average = f64::from_bits(self.average.load(Relaxed));
        // Two answers at once may lose one of them: the average is an estimate.
        let next = peak_ewma(average, latency.as_secs_f64(), Duration::from_micros(elapsed));
        self.average.store(next.to_bits(), Relaxed);
        // Last: who sees that there was an answer sees its time, and not that of none, which would be the best of all.
        self.observed.store(now, Release);
        self.reached();
    }

    /// From now on, for a while, it is picked last: a connect failed, or it said that it is leaving.
    pub fn shun(&self) {
        self.shunned_until.store(self.now() + SHUNNED.as_micros() as u64, Relaxed);
    }

    /// The same when a connect met silence, for longer the more often it has.
    pub fn shun_silent(&self) {
        // Those that wait at the same time learn the same thing: it counts once, for the one who shuns it first.
        let (until, now) = (self.shunned_until.load(Relaxed), self.now());
        let first = until <= now
            && self.shunned_until.compare_exchange(until, now + SHUNNED.as_micros() as u64, Relaxed, Relaxed).is_ok();
        let times = match first {
            true => self.silent.fetch_add(1, Relaxed),
            false => self.silent.load(Relaxed).saturating_sub(1),
        };
        let time = SHUNNED * (1 << times.min(DOUBLINGS));
        self.shunned_until.fetch_max(self.now() + time.as_micros() as u64, Relaxed);
    }

    /// It is there: the next silence is its first.
    pub fn reached(&self) {
        if self.silent.load(Relaxed) != 0 {
            self.silent.store(0, Relaxed);
        }
    }

    /// Requests and connections in flight.
    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// How often in a row a connect met silence.
    pub fn silences(&self) -> u32 {
        self.silent.load(Relaxed)
    }

    /// The average response time in seconds, less while it is idle; `None` before the first answer.
    pub(crate) fn average(&self, in_flight: u32) -> Option<f64> {
        let observed = self.observed.load(Acquire);
        let average = f64::from_bits(self.average.load(Relaxed));
        match (observed, in_flight) {
            (0, _) => None,
            (_, 0) => Some(aged(average, Duration::from_micros(self.now().saturating_sub(observed)))),
            _ => Some(average),
        }
    }

    /// Whether it is picked last.
    pub(crate) fn is_shunned(&self) -> bool {
        let until = self.shunned_until.load(Relaxed);
        until != 0 && until > self.now()
    }

    fn now(&self) -> u64 {
        self.epoch.elapsed().as_micros() as u64
    }
}

/// A request or connection in flight to an endpoint.
#[derive(Debug)]
pub struct InFlight(Arc<State>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_borne_less_often_each_time() {
        let state = State::default();
        let shunned = || state.shunned_until.load(Relaxed).saturating_sub(state.now()).div_ceil(1_000_000);
        let mut times = Vec::new();
        for _ in 0..6 {
            state.shun_silent();
            state.shun_silent();
            times.push(shunned());
            // The time is over.
            state.shunned_until.store(0, Relaxed);
        }
        assert_eq!(times, [3, 6, 12, 24, 24, 24]);
        state.reached();
        state.shun_silent();
        assert_eq!(shunned(), 3);
    }
}

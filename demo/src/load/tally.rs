//! Counting.

use lock::Lock;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

/// Failures kept with their details, per load.
const KEPT_FAILURES: usize = 50;

/// Distinct versions and statuses kept, per load; a server that makes them up must not fill the memory.
const KEPT_VALUES: usize = 100;

/// How requests ended. Once a load has stopped, `sent` is the sum of all outcomes: of all but `resent`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Requests, streams or lines begun.
    pub sent: u64,
    /// Answered in full: a 2xx, a gRPC status 0, the same line.
    pub ok: u64,
    /// Answered with another status.
    pub non_2xx: u64,
    /// No connection could be made.
    pub connect: u64,
    /// The connection or stream broke before an answer began.
    pub reset: u64,
    /// The answer ended early.
    pub short: u64,
    /// The answer to another request, or bytes in another order.
    pub reordered: u64,
    /// No answer within [`super::Plan::patience`].
    pub late: u64,
    /// Not awaited, on purpose.
    pub hung_up: u64,
    /// No outcome: how often a server that went away told that it had not processed a request, which then went to
    /// another connection (RFC 9113, section 6.8).
    pub resent: u64,
}

impl Counts {
    /// All that should not be: everything but `ok` and `hung_up`.
    pub fn failed(&self) -> u64 {
        self.non_2xx + self.connect + self.reset + self.short + self.reordered + self.late
    }

    /// Begun and not ended yet.
    pub fn in_flight(&self) -> u64 {
        self.sent.saturating_sub(self.ok + self.hung_up + self.failed())
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.sent += other.sent;
        self.ok += other.ok;
        self.non_2xx += other.non_2xx;
        self.connect += other.connect;
        self.reset += other.reset;
        self.short += other.short;
        self.reordered += other.reordered;
        self.late += other.late;
        self.hung_up += other.hung_up;
        self.resent += other.resent;
    }

    fn count(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Ok => self.ok += 1,
            Outcome::Status(_) => self.non_2xx += 1,
            Outcome::Connect(_) => self.connect += 1,
            Outcome::Reset(_) | Outcome::Unprocessed => self.reset += 1,
            Outcome::Short(_) => self.short += 1,
            Outcome::Reordered(_) => self.reordered += 1,
            Outcome::Late => self.late += 1,
            Outcome::HungUp => self.hung_up += 1,
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sent {}  ok {}  failed {}", self.sent, self.ok, self.failed())?;
        for (name, count) in [
            ("non-2xx", self.non_2xx),
            ("connect", self.connect),
            ("reset", self.reset),
            ("short", self.short),
            ("reordered", self.reordered),
            ("late", self.late),
            ("hung up", self.hung_up),
            ("resent", self.resent),
        ] {
            if count > 0 {
                write!(f, "  {name} {count}")?;
            }
        }
        Ok(())
    }
}

/// How one request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Ok,
    Status(String),
    Connect(String),
    Reset(String),
    Short(String),
    Reordered(String),
    Late,
    HungUp,
    /// A server that goes away says that it did not process the request.
    Unprocessed,
}

impl Outcome {
    fn failure(&self) -> Option<(&'static str, String)> {
        match self {
            Self::Ok | Self::HungUp => None,
            Self::Status(detail) => Some(("non_2xx", detail.clone())),
            Self::Connect(detail) => Some(("connect", detail.clone())),
            Self::Reset(detail) => Some(("reset", detail.clone())),
            Self::Short(detail) => Some(("short", detail.clone())),
            Self::Reordered(detail) => Some(("reordered", detail.clone())),
            Self::Unprocessed => Some(("reset", "servers go away one after the other".to_owned())),
            Self::Late => Some(("late", "no answer in time".to_owned())),
        }
    }
}

/// What all loads counted.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// All loads together.
    pub total: Counts,
    /// Each load, by name.
    pub loads: BTreeMap<String, LoadReport>,
}

impl Report {
    pub(super) fn new(loads: Vec<(String, LoadReport)>) -> Self {
        let mut total = Counts::default();
        for (_, load) in &loads {
            total.add(&load.counts);
        }
        Self { total, loads: loads.into_iter().collect() }
    }
}

/// What one load counted.
#[derive(Clone, Debug, Serialize)]
pub struct LoadReport {
    /// From start to stop.
    pub counts: Counts,
    /// The same by the phase in which a request was sent, in order.
    pub phases: Vec<(String, Counts)>,
    /// Answers by HTTP or gRPC status.
    pub statuses: BTreeMap<String, u64>,
    /// Answers by their `x-version`.
    pub versions: BTreeMap<String, Seen>,
    /// Of the answers that were ok.
    pub latency: Latency,
    /// The longest time in which no answer was ok, in milliseconds from the first ok to the end.
    pub longest_gap_ms: f64,
    /// The first failures.
    pub failures: Vec<Failure>,
}

/// When a value was seen, in milliseconds after the start.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Seen {
    /// How often.
    pub count: u64,
    /// First.
    pub first_ms: f64,
    /// Last.
    pub last_ms: f64,
}

/// How long answers took.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Latency {
    /// Half were faster.
    pub p50_ms: f64,
    /// All but one of a hundred were faster.
    pub p99_ms: f64,
    /// All but one of a thousand were faster.
    pub p999_ms: f64,
    /// The slowest.
    pub max_ms: f64,
}

/// One failure.
#[derive(Clone, Debug, Serialize)]
pub struct Failure {
    /// When the request was sent, in milliseconds after the start.
    pub sent_ms: f64,
    /// When it failed.
    pub failed_ms: f64,
    /// As in [`Counts`].
    pub kind: &'static str,
    /// What is known about it.
    pub detail: String,
}

/// The tally of one load.
pub(super) struct Tally {
    name: String,
    begun: Instant,
    state: Lock<State>,
}

#[derive(Default)]
struct State {
    counts: Counts,
    phases: Vec<(String, Counts)>,
    statuses: BTreeMap<String, u64>,
    versions: BTreeMap<String, Seen>,
    latencies: Latencies,
    last_ok: Option<Instant>,
    longest_gap: Duration,
    failures: Vec<Failure>,
}

/// A request that was sent and has not ended; without an end it counts as a reset, so that none is lost.
pub(super) struct Sent<'a> {
    tally: &'a Tally,
    at: Instant,
    phase: Option<usize>,
    ended: bool,
}

impl Tally {
    pub(super) fn new(name: String) -> Self {
        Self { name, begun: Instant::now(), state: Lock::default() }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn phase(&self, name: &str) {
        self.state.lock().phases.push((name.to_owned(), Counts::default()));
    }

    pub(super) fn counts(&self) -> Counts {
        self.state.lock().counts
    }

    /// Counts a request as sent.
    pub(super) fn sent(&self) -> Sent<'_> {
        let mut state = self.state.lock();
        state.counts.sent += 1;
        let phase = state.phases.len().checked_sub(1);
        if let Some((_, counts)) = state.phases.last_mut() {
            counts.sent += 1;
        }
        Sent { tally: self, at: Instant::now(), phase, ended: false }
    }

    /// Counts a request that is sent again since it was not processed.
    pub(super) fn resent(&self) {
        self.state.lock().counts.resent += 1;
    }

    /// Notes the status and version of an answer.
    pub(super) fn answered(&self, status: &str, version: Option<&str>) {
        let now_ms = ms(self.begun.elapsed());
        let mut state = self.state.lock();
        if state.statuses.len() < KEPT_VALUES || state.statuses.contains_key(status) {
            *state.statuses.entry(status.to_owned()).or_default() += 1;
        }
        if let Some(version) = version
            && (state.versions.len() < KEPT_VALUES || state.versions.contains_key(version))
        {
            let seen = state.versions.entry(version.to_owned());
            let seen = seen.or_insert(Seen { count: 0, first_ms: now_ms, last_ms: now_ms });
            seen.count += 1;
            seen.last_ms = now_ms;
        }
    }

    fn end(&self, sent: &Sent<'_>, outcome: Outcome) {
        let now = Instant::now();
        let mut state = self.state.lock();
        state.counts.count(&outcome);
        if let Some((_, counts)) = sent.phase.and_then(|phase| state.phases.get_mut(phase)) {
            counts.count(&outcome);
        }
        if outcome == Outcome::Ok {
            state.latencies.count(now - sent.at);
            let gap = state.last_ok.map_or(Duration::ZERO, |last| now - last);
            state.longest_gap = state.longest_gap.max(gap);
            state.last_ok = Some(now);
        } else if let Some((kind, detail)) = outcome.failure()
            && state.failures.len() < KEPT_FAILURES
        {
            let (sent_ms, failed_ms) = (ms(sent.at - self.begun), ms(now - self.begun));
            state.failures.push(Failure { sent_ms, failed_ms, kind, detail });
        }
    }

    pub(super) fn report(&self) -> (String, LoadReport) {
        let state = self.state.lock();
        let report = LoadReport {
            counts: state.counts,
            phases: state.phases.clone(),
            statuses: state.statuses.clone(),
            versions: state.versions.clone(),
            latency: state.latencies.summary(),
            longest_gap_ms: ms(state.longest_gap.max(state.last_ok.map_or(Duration::ZERO, |last| last.elapsed()))),
            failures: state.failures.clone(),
        };
        (self.name.clone(), report)
    }
}

impl Sent<'_> {
    pub(super) fn end(mut self, outcome: Outcome) {
        self.ended = true;
        self.tally.end(&self, outcome);
    }
}

impl Drop for Sent<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.tally.end(self, Outcome::Reset("given up".to_owned()));
        }
    }
}

fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// Counts of latencies in buckets a twentieth wide, from 1 µs.
#[derive(Default)]
struct Latencies {
    buckets: BTreeMap<u32, u64>,
    count: u64,
    max: Duration,
}

/// The ratio of a bucket's bounds.
const WIDTH: f64 = 1.05;

impl Latencies {
    fn count(&mut self, latency: Duration) {
        let bucket = (latency.as_secs_f64() * 1e6).max(1.0).log(WIDTH) as u32;
        *self.buckets.entry(bucket).or_default() += 1;
        self.count += 1;
        self.max = self.max.max(latency);
    }

    fn summary(&self) -> Latency {
        Latency {
            p50_ms: self.quantile(0.5),
            p99_ms: self.quantile(0.99),
            p999_ms: self.quantile(0.999),
            max_ms: ms(self.max),
        }
    }

    fn quantile(&self, share: f64) -> f64 {
        let rank = (self.count as f64 * share).ceil() as u64;
        let mut below = 0;
        for (bucket, count) in &self.buckets {
            below += count;
            if below >= rank {
                let upper = Duration::from_secs_f64(WIDTH.powi(*bucket as i32 + 1) / 1e6);
                return ms(upper.min(self.max));
            }
        }
        0.0
    }
}

/// A lock whose holder never panics while holding it.
mod lock {
    use std::sync::{Mutex, MutexGuard, PoisonError};

    #[derive(Default)]
    pub(super) struct Lock<T>(Mutex<T>);

    impl<T> Lock<T> {
        pub(super) fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_ends_as_one_outcome() {
        let tally = Tally::new("t".into());
        tally.sent().end(Outcome::Ok);
        tally.phase("second");
        tally.sent().end(Outcome::Status("503".into()));
        tally.sent().end(Outcome::HungUp);
        drop(tally.sent());
        let counts = tally.counts();
        assert_eq!((counts.sent, counts.ok, counts.non_2xx, counts.hung_up, counts.reset), (4, 1, 1, 1, 1));
        assert_eq!((counts.in_flight(), counts.failed()), (0, 2));
        let (_, report) = tally.report();
        assert_eq!(report.phases[0].1.sent, 3);
        assert_eq!(report.failures.len(), 2);
    }

    #[test]
    fn quantiles_are_within_a_bucket() {
        let mut latencies = Latencies::default();
        for micros in 1..=1000 {
            latencies.count(Duration::from_micros(micros));
        }
        let summary = latencies.summary();
        assert!((0.5..0.55).contains(&summary.p50_ms), "{summary:?}");
        assert!((0.99..=1.0).contains(&summary.p99_ms), "{summary:?}");
        assert_eq!(summary.max_ms, 1.0);
    }
}

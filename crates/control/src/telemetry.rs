//! Who called whom, how often, how fast: some hours of it, in memory.
//!
//! Proxies report cumulative values with the epoch of their process. What grew since the last report is added to the
//! edge's total, which is exact since this start, and to its slot of ten seconds, of which three hours are kept and
//! never more than `MAX_SLOTS` over all edges.

use crate::clock::Clock;
use parking_lot::Mutex;
use sheer_core::api::{EdgeRow, Edges, Figures, Outcome, Stat, StatRow};
use sheer_core::cause::Cause;
use sheer_core::histogram::quantile_s;
use sheer_core::wire::v1::edge::Side;
use sheer_core::wire::v1::{Edge, Telemetry as Report};
use std::collections::{BTreeMap, HashMap, VecDeque};

/// Length of a slot.
const SLOT_S: i64 = 10;
/// Slots that an edge keeps: three hours.
const SLOTS: i64 = 1080;
/// Slots over all edges; about 500 bytes each.
const MAX_SLOTS: usize = 100_000;
/// Edges; further ones fold into one of the name `other`.
const MAX_EDGES: usize = 10_000;
/// Cumulative values remembered, one for each edge of each proxy.
const MAX_SEEN: usize = 200_000;
/// A proxy that was away for longer counts anew from its beginning when it comes back.
const SEEN_S: i64 = 24 * 3600;
/// A report of a proxy that is older than this is history when it is first seen: it counts in totals only.
const FRESH_S: i64 = 30;

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Key {
    outbound: bool,
    source: String,
    destination: String,
    backend: String,
    route: String,
    protocol: String,
    mtls: bool,
}

/// Sums of an edge over some time.
#[derive(Clone, Debug, Default)]
struct Sums {
    responses: BTreeMap<(u32, i32, String), u64>,
    plaintext: u64,
    latency: BTreeMap<u32, u64>,
    mesh_s: f64,
    bytes_sent: u64,
    bytes_received: u64,
    opened: u64,
}

impl Sums {
    fn of(edge: &Edge) -> Self {
        let mut sums = Self {
            mesh_s: if edge.mesh_sum_s.is_finite() { edge.mesh_sum_s.max(0.0) } else { 0.0 },
            bytes_sent: edge.bytes_sent,
            bytes_received: edge.bytes_received,
            opened: edge.connections_opened,
            ..Self::default()
        };
        for response in edge.responses.iter().take(200) {
            let reason = response.reason.chars().filter(|c| !c.is_control()).take(40).collect();
            if !edge.mtls && travelled(edge.side(), &response.reason) {
                sums.plaintext += response.count;
            }
            *sums.responses.entry((response.status, response.grpc_status, reason)).or_default() += response.count;
        }
        let buckets = u32::try_from(sheer_core::histogram::BUCKETS).unwrap_or(u32::MAX);
        for bucket in edge.latency.iter().filter(|bucket| bucket.index < buckets) {
            *sums.latency.entry(bucket.index).or_default() += bucket.count;
        }
        sums
    }

    /// What grew since `before`. A value that shrank without a new epoch counts as nothing.
    fn since(&self, before: &Sums) -> Sums {
        let grown = |now: u64, before: Option<&u64>| now.saturating_sub(before.copied().unwrap_or(0));
        Sums {
            responses: self
                .responses
                .iter()
                .map(|(key, now)| (key.clone(), grown(*now, before.responses.get(key))))
                .filter(|(_, count)| *count > 0)
                .collect(),
            plaintext: self.plaintext.saturating_sub(before.plaintext),
            latency: self
                .latency
                .iter()
                .map(|(index, now)| (*index, grown(*now, before.latency.get(index))))
                .filter(|(_, count)| *count > 0)
                .collect(),
            mesh_s: (self.mesh_s - before.mesh_s).max(0.0),
            bytes_sent: self.bytes_sent.saturating_sub(before.bytes_sent),
            bytes_received: self.bytes_received.saturating_sub(before.bytes_received),
            opened: self.opened.saturating_sub(before.opened),
        }
    }

    fn add(&mut self, other: &Sums) {
        for (key, count) in &other.responses {
            let sum = self.responses.entry(key.clone()).or_default();
            *sum = sum.saturating_add(*count);
        }
        self.plaintext = self.plaintext.saturating_add(other.plaintext);
        for (index, count) in &other.latency {
            let sum = self.latency.entry(*index).or_default();
            *sum = sum.saturating_add(*count);
        }
        self.mesh_s += other.mesh_s;
        self.bytes_sent = self.bytes_sent.saturating_add(other.bytes_sent);
        self.bytes_received = self.bytes_received.saturating_add(other.bytes_received);
        self.opened = self.opened.saturating_add(other.opened);
    }

    fn is_empty(&self) -> bool {
        self.responses.is_empty() && self.bytes_sent == 0 && self.bytes_received == 0 && self.opened == 0
    }

    fn requests(&self) -> u64 {
        self.responses.values().sum()
    }

    fn figures(&self, seconds: u64, open: i64) -> Figures {
        let requests = self.requests();
        let count = |is: fn(u32, i32, &str) -> bool| -> u64 {
            let counted = self.responses.iter().filter(|((status, grpc, reason), _)| is(*status, *grpc, reason));
            counted.map(|(_, count)| count).sum()
        };
        let failures = count(is_failure);
        let gone = count(|_, _, reason| reason == CLIENT_GONE);
        let stayed = requests - gone;
        let counts: Vec<(usize, u64)> = self.latency.iter().map(|(index, count)| (*index as usize, *count)).collect();
        let timed: u64 = self.latency.values().sum();
        let mut responses: Vec<Outcome> = self
            .responses
            .iter()
            .map(|((status, grpc_status, reason), count)| Outcome {
                status: *status,
                grpc_status: *grpc_status,
                reason: reason.clone(),
                count: *count,
            })
            .collect();
        responses.sort_by(|a, b| b.count.cmp(&a.count).then_with(|| a.cmp(b)));
        Figures {
            requests,
            failures,
            plaintext: self.plaintext,
            gone,
            success_rate: (stayed > 0).then(|| (stayed - failures) as f64 / stayed as f64),
            rps: if seconds == 0 { 0.0 } else { requests as f64 / seconds as f64 },
            p50_s: quantile_s(&counts, 0.50),
            p95_s: quantile_s(&counts, 0.95),
            p99_s: quantile_s(&counts, 0.99),
            mesh_mean_s: (timed > 0).then(|| self.mesh_s / timed as f64),
            bytes_sent: self.bytes_sent,
            bytes_received: self.bytes_received,
            connections_opened: self.opened,
            connections_open: open,
            responses,
        }
    }
}

const CLIENT_GONE: &str = sheer_core::cause::Cause::ClientGone.reason();

/// A failure of the mesh or of the server. gRPC codes that blame the server: UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED,
/// INTERNAL, UNAVAILABLE, DATA_LOSS. A client that hangs up is no failure of either.
pub(crate) fn is_failure(status: u32, grpc: i32, reason: &str) -> bool {
    if !reason.is_empty() {
        return reason != CLIENT_GONE;
    }
    status >= 500 || matches!(grpc, 2 | 4 | 12 | 13 | 14 | 15)
}

/// Whether a request with this reason was sent from one service to the other. What arrived has travelled, and what failed
/// at its caller before it was sent has not.
fn travelled(side: Side, reason: &str) -> bool {
    side != Side::Outbound || !Cause::parse(reason).is_some_and(Cause::before_sending)
}

#[derive(Default)]
struct History {
    total: Sums,
    slots: VecDeque<(i64, Sums)>,
    /// Reporter -> connections open there. A proxy whose place was taken reports under a name of its own.
    open: HashMap<String, i64>,
}

/// What a workload's proxy reported last.
struct Seen {
    epoch: u64,
    sums: Sums,
    at: i64,
    /// Of the proxy whose place it took, which counts on until its last connection has ended.
    replaced: Option<(u64, Sums)>,
}

impl Seen {
    /// Takes a report, and tells what the same process had reported before.
    fn note(&mut self, epoch: u64, sums: Sums, now: i64) -> Option<Sums> {
        self.at = now;
        if epoch == self.epoch {
            return Some(std::mem::replace(&mut self.sums, sums));
        }
        if epoch > self.epoch {
            self.replaced = Some((std::mem::replace(&mut self.epoch, epoch), std::mem::replace(&mut self.sums, sums)));
            return None;
        }
        match &mut self.replaced {
            Some((of, before)) if *of == epoch => Some(std::mem::replace(before, sums)),
            older => {
                *older = Some((epoch, sums));
                None
            }
        }
    }
}

#[derive(Default)]
struct Inner {
    edges: BTreeMap<Key, History>,
    seen: HashMap<(String, Key), Seen>,
    slots: usize,
    first: Option<i64>,
}

/// All edges.
#[derive(Default)]
pub struct Telemetry {
    inner: Mutex<Inner>,
}

/// Which side's figures to show.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum View {
    /// The caller's, and the destination's where the caller has no proxy. Every request counts once.
    #[default]
    Best,
    /// The callers'.
    Outbound,
    /// The destinations'.
    Inbound,
    /// Both.
    All,
}

impl Telemetry {
    /// Takes a report of a workload's proxy.
    pub fn take(&self, uid: &str, report: Report, clock: &Clock) {
        let now = clock.unix();
        let mut inner = self.inner.lock();
        inner.first.get_or_insert(now);
        let age = now.saturating_sub(i64::try_from(report.epoch / 1_000_000).unwrap_or(i64::MAX));
        for edge in report.edges {
            let mut key = key_of(&edge);
            if !inner.edges.contains_key(&key) && inner.edges.len() >= MAX_EDGES {
                key = Key { source: "other".into(), destination: "other".into(), backend: String::new(), ..key };
            }
            inner.add(uid, report.epoch, key, &edge, now, age <= FRESH_S);
        }
    }

    /// A workload left: its connections are closed.
    pub fn left(&self, uid: &str) {
        for history in self.inner.lock().edges.values_mut() {
            history.open.remove(uid);
            history.open.remove(&of_replaced(uid));
        }
    }

    /// Forgets what is older than is kept. Called now and then.
    pub fn tend(&self, clock: &Clock) {
        let now = clock.unix();
        let oldest = now / SLOT_S - SLOTS;
        let mut inner = self.inner.lock();
        inner.seen.retain(|_, seen| now - seen.at < SEEN_S);
        let mut slots = 0;
        for history in inner.edges.values_mut() {
            while history.slots.front().is_some_and(|(at, _)| *at < oldest) {
                history.slots.pop_front();
            }
            slots += history.slots.len();
        }
        inner.slots = slots;
    }

    /// The edges over the last `window_s` seconds.
    pub fn edges(&self, namespace: Option<&str>, window_s: u64, view: View, clock: &Clock) -> Edges {
        let inner = self.inner.lock();
        let window = inner.window(window_s, clock.unix());
        let rows = inner.chosen(view).filter(|(key, _)| touches(key, namespace)).map(|(key, history)| EdgeRow {
            side: if key.outbound { "outbound" } else { "inbound" }.to_owned(),
            source: key.source.clone(),
            destination: key.destination.clone(),
            backend: key.backend.clone(),
            route: key.route.clone(),
            protocol: key.protocol.clone(),
            mtls: key.mtls,
            window: history.over(&window).figures(window.seconds, history.opened_now()),
            total: history.total.figures(window.since_start, history.opened_now()),
        });
        Edges { window_s: window.seconds, rows: rows.collect() }
    }

    /// What each service answered over the last `window_s` seconds.
    pub fn stat(&self, namespace: Option<&str>, window_s: u64, clock: &Clock) -> Stat {
        let inner = self.inner.lock();
        let window = inner.window(window_s, clock.unix());
        let mut services: BTreeMap<&str, (Sums, Sums, i64, u64)> = BTreeMap::new();
        for (key, history) in inner.chosen(View::Best).filter(|(key, _)| touches(key, namespace)) {
            let backend = Some(key.backend.as_str()).filter(|it| !it.is_empty() && *it != key.destination);
            for service in [Some(key.destination.as_str()), backend].into_iter().flatten() {
                let (recent, total, open, mtls) = services.entry(service).or_default();
                recent.add(&history.over(&window));
                total.add(&history.total);
                *open += history.opened_now();
                if key.mtls {
                    *mtls += history.total.requests();
                }
            }
        }
        let rows = services.into_iter().map(|(service, (recent, total, open, mtls))| StatRow {
            service: service.to_owned(),
            ready: 0,
            workloads: 0,
            mtls: (mtls + total.plaintext > 0).then(|| mtls as f64 / (mtls + total.plaintext) as f64),
            window: recent.figures(window.seconds, open),
            total: total.figures(window.since_start, open),
        });
        Stat { window_s: window.seconds, rows: rows.collect() }
    }
}

struct Window {
    from_slot: i64,
    seconds: u64,
    since_start: u64,
}

impl Inner {
    fn window(&self, seconds: u64, now: i64) -> Window {
        let since_start = u64::try_from(now - self.first.unwrap_or(now)).unwrap_or(0).max(1);
        let kept = u64::try_from(SLOTS * SLOT_S).unwrap_or(u64::MAX);
        let seconds = seconds.clamp(u64::try_from(SLOT_S).unwrap_or(1), kept);
        // The present slot is not over: one more is looked at, so that the window is at least what was asked for.
        let from_slot = (now - i64::try_from(seconds).unwrap_or(i64::MAX)).div_euclid(SLOT_S);
        Window { from_slot, seconds: seconds.min(since_start), since_start }
    }

    fn add(&mut self, uid: &str, epoch: u64, key: Key, edge: &Edge, now: i64, fresh: bool) {
        let sums = Sums::of(edge);
        let id = (uid.to_owned(), key.clone());
        if self.seen.len() >= MAX_SEEN && !self.seen.contains_key(&id) {
            return;
        }
        let (before, newest) = match self.seen.get_mut(&id) {
            Some(seen) => (seen.note(epoch, sums.clone(), now), seen.epoch),
            None => {
                self.seen.insert(id, Seen { epoch, sums: sums.clone(), at: now, replaced: None });
                (None, epoch)
            }
        };
        let known = before.is_some();
        let grown = before.map_or_else(|| sums.clone(), |before| sums.since(&before));
        let history = self.edges.entry(key).or_default();
        let reporter = if epoch < newest { of_replaced(uid) } else { uid.to_owned() };
        match edge.connections_open {
            open if open > 0 => history.open.insert(reporter, open),
            _ => history.open.remove(&reporter),
        };
        if grown.is_empty() {
            return;
        }
        history.total.add(&grown);
        // What a proxy counted before this control plane knew it did not happen in this slot.
        if !known && !fresh {
            return;
        }
        let slot = now.div_euclid(SLOT_S);
        match history.slots.back_mut() {
            Some((at, sums)) if *at >= slot => sums.add(&grown),
            _ => {
                history.slots.push_back((slot, grown));
                self.slots += 1;
            }
        }
        if self.slots > MAX_SLOTS {
            self.drop_oldest();
        }
    }

    /// Drops the older half of the longest history.
    fn drop_oldest(&mut self) {
        if let Some(longest) = self.edges.values_mut().max_by_key(|history| history.slots.len()) {
            let half = longest.slots.len().div_ceil(2);
            longest.slots.drain(..half);
            self.slots -= half;
        }
    }

    fn chosen(&self, view: View) -> impl Iterator<Item = (&Key, &History)> {
        let mut seen_by_caller: std::collections::HashSet<(&str, &str)> = std::collections::HashSet::new();
        for key in self.edges.keys().filter(|key| key.outbound) {
            seen_by_caller.insert((&key.source, &key.destination));
            if !key.backend.is_empty() {
                seen_by_caller.insert((&key.source, &key.backend));
            }
        }
        self.edges.iter().filter(move |(key, _)| match view {
            View::All => true,
            View::Outbound => key.outbound,
            View::Inbound => !key.outbound,
            View::Best => key.outbound || !seen_by_caller.contains(&(key.source.as_str(), key.destination.as_str())),
        })
    }
}

impl History {
    fn over(&self, window: &Window) -> Sums {
        let mut sums = Sums::default();
        for (_, slot) in self.slots.iter().rev().take_while(|(at, _)| *at >= window.from_slot) {
            sums.add(slot);
        }
        sums
    }

    fn opened_now(&self) -> i64 {
        self.open.values().sum()
    }
}

/// The reporter's name of a workload's former proxy.
fn of_replaced(uid: &str) -> String {
    format!("{uid}, replaced")
}

fn key_of(edge: &Edge) -> Key {
    let clip = |text: &str| text.chars().filter(|c| !c.is_control()).take(130).collect::<String>();
    Key {
        outbound: edge.side() == Side::Outbound,
        source: clip(&edge.source),
        destination: clip(&edge.destination),
        backend: clip(&edge.backend),
        route: clip(&edge.route),
        protocol: clip(&edge.protocol),
        mtls: edge.mtls,
    }
}

fn touches(key: &Key, namespace: Option<&str>) -> bool {
    let of = |service: &str| service.split_once('/').map(|(namespace, _)| namespace.to_owned());
    namespace.is_none_or(|namespace| {
        [&key.source, &key.destination, &key.backend].iter().any(|it| of(it).as_deref() == Some(namespace))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use sheer_core::histogram::index_of;
    use sheer_core::wire::v1::{Bucket, ResponseCount};

    fn edge(side: Side, count: u64, failed: u64) -> Edge {
        let response =
            |status, reason: &str, count| ResponseCount { status, grpc_status: -1, reason: reason.into(), count };
        Edge {
            side: side.into(),
            source: "default/web".into(),
            destination: "default/api".into(),
            route: "default".into(),
            protocol: "http1".into(),
            mtls: true,
            responses: vec![response(200, "", count), response(502, "connect-refused", failed)],
            latency: vec![Bucket { index: u32::try_from(index_of(1000)).unwrap(), count: count + failed }],
            mesh_sum_s: 0.0001 * (count + failed) as f64,
            connections_open: 2,
            ..Edge::default()
        }
    }

    fn report(clock: &Clock, edges: Vec<Edge>) -> Report {
        Report { epoch: u64::try_from(clock.unix()).unwrap() * 1_000_000, edges }
    }

    #[test]
    fn repeated_cumulative_reports_count_once() {
        let (telemetry, clock) = (Telemetry::default(), Clock::default());
        let mut first = report(&clock, vec![edge(Side::Outbound, 10, 1)]);
        telemetry.take("a", first.clone(), &clock);
        telemetry.take("a", first.clone(), &clock);
        first.edges = vec![edge(Side::Outbound, 25, 1)];
        telemetry.take("a", first.clone(), &clock);
        // The proxy restarted: it counts from zero.
        first.epoch += 1;
        first.edges = vec![edge(Side::Outbound, 5, 0)];
        telemetry.take("a", first, &clock);
        let edges = telemetry.edges(None, 60, View::Best, &clock);
        assert_eq!(edges.rows.len(), 1);
        let (window, total) = (&edges.rows[0].window, &edges.rows[0].total);
        assert_eq!((total.requests, total.failures, window.requests), (31, 1, 31));
        assert_eq!(total.connections_open, 2);
        assert!((total.mesh_mean_s.unwrap() - 0.0001).abs() < 1e-9);
        assert!((total.p50_s.unwrap() - 0.001).abs() < 0.0002);
    }

    #[test]
    fn a_proxy_and_the_one_that_it_replaced_count_side_by_side() {
        let (telemetry, clock) = (Telemetry::default(), Clock::default());
        let mut old = report(&clock, vec![edge(Side::Outbound, 10, 0)]);
        let mut new = report(&clock, vec![edge(Side::Outbound, 3, 0)]);
        new.epoch += 1;
        telemetry.take("a", old.clone(), &clock);
        telemetry.take("a", new.clone(), &clock);
        (old.edges, new.edges) = (vec![edge(Side::Outbound, 14, 0)], vec![edge(Side::Outbound, 5, 0)]);
        telemetry.take("a", old.clone(), &clock);
        telemetry.take("a", new, &clock);
        let now = |telemetry: &Telemetry| {
            let total = telemetry.edges(None, 60, View::Best, &clock).rows[0].total.clone();
            (total.requests, total.connections_open)
        };
        assert_eq!(now(&telemetry), (19, 4));
        old.edges[0].connections_open = 0;
        telemetry.take("a", old, &clock);
        assert_eq!(now(&telemetry), (19, 2));
    }

    #[test]
    fn a_request_seen_by_both_sides_counts_once() {
        let (telemetry, clock) = (Telemetry::default(), Clock::default());
        telemetry.take("web", report(&clock, vec![edge(Side::Outbound, 10, 2)]), &clock);
        let unmeshed = Edge { source: "unknown".into(), ..edge(Side::Inbound, 3, 0) };
        telemetry.take("api", report(&clock, vec![edge(Side::Inbound, 10, 0), unmeshed]), &clock);
        let stat = telemetry.stat(None, 60, &clock);
        assert_eq!(stat.rows.len(), 1);
        assert_eq!((stat.rows[0].service.as_str(), stat.rows[0].total.requests), ("default/api", 15));
        assert_eq!(stat.rows[0].total.failures, 2);
        assert_eq!(telemetry.edges(None, 60, View::All, &clock).rows.len(), 3);
        assert!(telemetry.edges(Some("other"), 60, View::All, &clock).rows.is_empty());
    }

    #[test]
    fn what_was_never_sent_is_not_plaintext() {
        let (telemetry, clock) = (Telemetry::default(), Clock::default());
        let encrypted = edge(Side::Outbound, 10, 0);
        // Nobody listened there: ten requests went out in plaintext, two failed before they went.
        let plain = Edge { mtls: false, ..edge(Side::Outbound, 10, 2) };
        telemetry.take("web", report(&clock, vec![encrypted, plain]), &clock);
        let edges = telemetry.edges(None, 60, View::Best, &clock);
        let plaintext: Vec<_> = edges.rows.iter().map(|row| (row.mtls, row.window.plaintext)).collect();
        assert_eq!(plaintext, [(false, 10), (true, 0)]);
        assert_eq!(telemetry.stat(None, 60, &clock).rows[0].mtls, Some(0.5));
        // At the destination the same reason means its application: the request had arrived.
        assert!(travelled(Side::Inbound, "connect-refused") && !travelled(Side::Outbound, "connect-refused"));
    }

    #[test]
    fn a_client_that_left_is_neither_a_success_nor_a_failure() {
        let (telemetry, clock) = (Telemetry::default(), Clock::default());
        let mut calls = edge(Side::Outbound, 6, 2);
        let gone = |status, count| ResponseCount { status, grpc_status: -1, reason: "client-gone".into(), count };
        calls.responses.extend([gone(499, 3), gone(200, 1)]);
        telemetry.take("web", report(&clock, vec![calls]), &clock);
        let total = telemetry.stat(None, 60, &clock).rows[0].total.clone();
        assert_eq!((total.requests, total.failures, total.gone), (12, 2, 4));
        assert_eq!(total.success_rate, Some(0.75));
        let mut left = edge(Side::Outbound, 0, 0);
        left.responses = vec![gone(499, 5)];
        let telemetry = Telemetry::default();
        telemetry.take("web", report(&clock, vec![left]), &clock);
        let total = telemetry.stat(None, 60, &clock).rows[0].total.clone();
        assert_eq!((total.requests, total.success_rate), (5, None));
    }

    #[test]
    fn a_canary_counts_for_the_called_and_the_answering_service() {
        let (telemetry, clock) = (Telemetry::default(), Clock::default());
        let canary = Edge { backend: "default/api-v2".into(), ..edge(Side::Outbound, 10, 0) };
        telemetry.take("web", report(&clock, vec![canary]), &clock);
        let answered = Edge { destination: "default/api-v2".into(), ..edge(Side::Inbound, 10, 0) };
        telemetry.take("api-v2", report(&clock, vec![answered]), &clock);
        let stat = telemetry.stat(None, 60, &clock);
        let counts: Vec<_> = stat.rows.iter().map(|row| (row.service.as_str(), row.total.requests)).collect();
        assert_eq!(counts, [("default/api", 10), ("default/api-v2", 10)]);
    }

    #[test]
    fn what_an_old_proxy_counted_before_is_in_totals_alone() {
        let (telemetry, clock) = (Telemetry::default(), Clock::default());
        let old = Report { epoch: 1, edges: vec![edge(Side::Outbound, 1_000_000, 0)] };
        telemetry.take("web", old, &clock);
        let edges = telemetry.edges(None, 60, View::Best, &clock);
        assert_eq!((edges.rows[0].total.requests, edges.rows[0].window.requests), (1_000_000, 0));
    }
}

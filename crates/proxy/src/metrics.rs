//! What the proxy counts: traffic per edge, and a few figures about itself.
//!
//! An edge is a source, a destination and a route seen from one side. Its counters are atomics shared by all workers; a
//! handle is resolved once (under a lock) and kept by the caller, so that counting takes a few increments. The table of
//! edges is bounded: what does not fit is counted under the source and destination `other`.
//!
//! Label names and values are listed in [`exposition`], the one place that writes them for Prometheus; [`report`] writes
//! the same counters for the control plane.

mod answers;
pub mod exposition;
pub mod report;

pub use answers::MAX_ANSWERS;

use answers::Answers;
use parking_lot::RwLock;
use sheer_core::cause::Cause;
use sheer_core::histogram;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Most edges of a proxy. An edge takes about 6 KiB, so that a full table takes 6 MiB.
pub const MAX_EDGES: usize = 1000;

/// From which side an edge is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Side {
    /// By the proxy of the caller.
    Outbound,
    /// By the proxy of the workload that answers.
    Inbound,
}

impl Side {
    /// The value of the label `side`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Side::Outbound => "outbound",
            Side::Inbound => "inbound",
        }
    }
}

/// What was spoken on an edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// HTTP/1.1 or 1.0.
    Http1,
    /// HTTP/2 without gRPC.
    Http2,
    /// gRPC.
    Grpc,
    /// Anything else, as bytes.
    Tcp,
}

impl Protocol {
    /// The value of the label `protocol`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Protocol::Http1 => "http1",
            Protocol::Http2 => "http2",
            Protocol::Grpc => "grpc",
            Protocol::Tcp => "tcp",
        }
    }
}

/// What tells edges apart.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EdgeKey {
    /// The side from which it is seen.
    pub side: Side,
    /// The calling service, `<namespace>/<name>`, or `unknown`.
    pub source: Arc<str>,
    /// The service that was called, `<namespace>/<name>`, or `unknown`.
    pub destination: Arc<str>,
    /// The route that decided, `<namespace>/<name>`, or `default`.
    pub route: Arc<str>,
    /// What was spoken.
    pub protocol: Protocol,
    /// Whether the hop between the proxies was mutually authenticated.
    pub mtls: bool,
    /// The service that answered, where a route chose another than the destination; empty otherwise.
    pub backend: Arc<str>,
}

/// Counts of durations in the buckets of [`sheer_core::histogram`].
pub struct Histogram {
    buckets: Box<[AtomicU64; histogram::BUCKETS]>,
    sum_micros: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: Box::new([const { AtomicU64::new(0) }; histogram::BUCKETS]), sum_micros: AtomicU64::new(0) }
    }
}

impl Histogram {
    /// Counts one duration.
    pub fn count(&self, duration: Duration) {
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        self.buckets[histogram::index_of(micros)].fetch_add(1, Relaxed);
        self.sum_micros.fetch_add(micros, Relaxed);
    }

    /// The counts as they stand, with the sum in seconds.
    fn load(&self) -> (Vec<u64>, f64) {
        (self.buckets.iter().map(|bucket| bucket.load(Relaxed)).collect(), self.sum_s())
    }

    fn sum_s(&self) -> f64 {
        self.sum_micros.load(Relaxed) as f64 / 1e6
    }
}

/// The counters of one edge.
pub struct Edge {
    answers: Answers,
    latency: Histogram,
    mesh: Histogram,
    bytes_sent: AtomicU64,
    bytes_received: AtomicU64,
    opened: AtomicU64,
    open: AtomicI64,
    /// What [`report`] last sent of it, as a checksum; 0 when nothing.
    reported: AtomicU64,
}

const OCCUPIED: u32 = 1 << 31;

/// Status in bits 0 to 9, gRPC status plus one in bits 10 to 15, cause plus one in bits 16 to 23.
fn pack(status: u16, grpc_status: Option<u8>, cause: Option<Cause>) -> u32 {
    let status = if status > 999 { 0 } else { u32::from(status) };
    // Codes above 16 are not defined; callers must treat them as UNKNOWN (2).
    let grpc = grpc_status.map_or(0, |code| if code > 16 { 3 } else { u32::from(code) + 1 });
    let cause = cause.map_or(0, |cause| u32::from(cause as u8) + 1);
    OCCUPIED | status | grpc << 10 | cause << 16
}

/// One kind of answer of an edge, with its count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnswerCount {
    /// HTTP status; 0 for bytes and for what did not fit.
    pub status: u16,
    /// gRPC status.
    pub grpc_status: Option<u8>,
    /// Reason of a failure; empty when there was none.
    pub reason: &'static str,
    /// How many.
    pub count: u64,
}

fn unpack(key: u32, count: u64) -> AnswerCount {
    let cause = (key >> 16 & 0xff) as usize;
    AnswerCount {
        status: (key & 0x3ff) as u16,
        grpc_status: ((key >> 10 & 0x3f) as u8).checked_sub(1),
        reason: cause.checked_sub(1).and_then(|index| Cause::ALL.get(index)).map_or("", |cause| cause.reason()),
        count,
    }
}

impl Default for Edge {
    fn default() -> Self {
        Self {
            answers: Answers::default(),
            latency: Histogram::default(),
            mesh: Histogram::default(),
            bytes_sent: AtomicU64::new(0),
            bytes_received: AtomicU64::new(0),
            opened: AtomicU64::new(0),
            open: AtomicI64::new(0),
            reported: AtomicU64::new(0),
        }
    }
}

impl std::fmt::Debug for Edge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Edge").field("answers", &self.answers()).finish_non_exhaustive()
    }
}

impl Edge {
    /// Counts one request, or connection of bytes, that ended: `status` as the caller saw it (0 for bytes, and when there
    /// was none), `grpc_status` (-1 when there was none), and why it failed, when the mesh or a connection failed.
    pub fn count(&self, status: u16, grpc_status: i32, cause: Option<Cause>) {
        let grpc_status = (grpc_status >= 0).then(|| u8::try_from(grpc_status).unwrap_or(u8::MAX));
        self.answers.count(pack(status, grpc_status, cause));
    }

    /// Counts its duration, from the first byte in to the last byte out, and the part of it that the mesh itself added.
    pub fn latency(&self, total: Duration, mesh: Duration) {
        self.latency.count(total);
        self.mesh.count(mesh);
    }

    /// Counts bytes of bodies or connections: `sent` from source to destination, `received` the other way.
    pub fn bytes(&self, sent: u64, received: u64) {
        // Most calls know one of the two; the other's cache line need not be written.
        if sent > 0 {
            self.bytes_sent.fetch_add(sent, Relaxed);
        }
        if received > 0 {
            self.bytes_received.fetch_add(received, Relaxed);
        }
    }

    /// Bytes counted so far: sent, received.
    pub fn counted_bytes(&self) -> (u64, u64) {
        (self.bytes_sent.load(Relaxed), self.bytes_received.load(Relaxed))
    }

    /// Counts a connection as opened. One [`Edge::closed`] must follow.
    pub fn opened(&self) {
        self.opened.fetch_add(1, Relaxed);
        self.open.fetch_add(1, Relaxed);
    }

    /// Counts a connection as closed.
    pub fn closed(&self) {
        self.open.fetch_sub(1, Relaxed);
    }

    /// What was answered so far, in a stable order.
    pub fn answers(&self) -> Vec<AnswerCount> {
        let mut counts: Vec<AnswerCount> = self.answers.counted().map(|(key, count)| unpack(key, count)).collect();
        counts.sort_by_key(|it| (it.status, it.grpc_status, it.reason));
        let other = self.answers.other();
        if other > 0 {
            counts.push(AnswerCount { status: 0, grpc_status: None, reason: "other", count: other });
        }
        counts
    }
}

macro_rules! counters {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident => $label:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_doc])* $variant,)* }

        impl $name {
            /// All of them.
            pub const ALL: &'static [$name] = &[$($name::$variant,)*];

            /// The label's value.
            pub const fn as_str(self) -> &'static str {
                match self { $($name::$variant => $label,)* }
            }
        }
    };
}

counters! {
    /// What cannot be carried and was refused by the rules, by kind.
    Refused {
        /// A datagram that is not DNS.
        Udp => "udp",
        /// A packet that is neither TCP nor UDP.
        Other => "other",
    }
}

counters! {
    /// What was given up because a limit of the proxy itself was reached, beside what was refused.
    Shed {
        /// A connection that carried nothing, to make room for another.
        Idle => "idle",
        /// A connection in use, one of those that were accepted last: memory was at its end.
        Youngest => "youngest",
    }
}

counters! {
    /// How a DNS question was answered.
    Dns {
        /// With addresses of the mesh.
        Mesh => "mesh",
        /// The name is the mesh's, but has no record of that type.
        NoData => "no-data",
        /// The name would be the mesh's, but does not exist.
        NoName => "no-name",
        /// By the host's resolvers.
        Forwarded => "forwarded",
        /// As the host's resolvers did before: a second ago, or while they fail.
        Kept => "kept",
        /// No resolver answered.
        Failed => "failed",
        /// More questions at once than are forwarded.
        Shed => "shed",
        /// The question could not be read.
        Malformed => "malformed",
    }
}

/// All counters of a proxy.
pub struct Metrics {
    edges: RwLock<HashMap<EdgeKey, Arc<Edge>>>,
    max_edges: usize,
    epoch_micros: u64,
    refused: [AtomicU64; Refused::ALL.len()],
    refused_connections: [AtomicU64; Cause::ALL.len()],
    ended_connections: [AtomicU64; Cause::ALL.len()],
    shed: [AtomicU64; Shed::ALL.len()],
    /// Connections of clients, and the most there may be.
    pub(crate) clients_open: AtomicI64,
    pub(crate) clients_limit: AtomicU64,
    /// Bytes that the process holds, and may hold.
    pub(crate) memory: AtomicU64,
    pub(crate) memory_limit: AtomicU64,
    dns: [AtomicU64; Dns::ALL.len()],
    control_connected: AtomicBool,
    control_seen_s: AtomicU64,
    certificate_expires_s: AtomicU64,
    trust_sequence: AtomicU64,
    resources_refused: AtomicU64,
    overflowed: AtomicU64,
}

fn seconds_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new(MAX_EDGES)
    }
}

impl Metrics {
    /// Counters for at most `max_edges` edges. Their epoch is now.
    pub fn new(max_edges: usize) -> Self {
        let epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            edges: RwLock::default(),
            max_edges,
            epoch_micros: u64::try_from(epoch.as_micros()).unwrap_or_default(),
            refused: Default::default(),
            refused_connections: [const { AtomicU64::new(0) }; Cause::ALL.len()],
            ended_connections: [const { AtomicU64::new(0) }; Cause::ALL.len()],
            shed: Default::default(),
            clients_open: AtomicI64::new(0),
            clients_limit: AtomicU64::new(0),
            memory: AtomicU64::new(0),
            memory_limit: AtomicU64::new(0),
            dns: Default::default(),
            control_connected: AtomicBool::new(false),
            control_seen_s: AtomicU64::new(0),
            certificate_expires_s: AtomicU64::new(0),
            trust_sequence: AtomicU64::new(0),
            resources_refused: AtomicU64::new(0),
            overflowed: AtomicU64::new(0),
        }
    }

    /// When counting began, in microseconds of unix time: counters are comparable within one epoch.
    pub fn epoch_micros(&self) -> u64 {
        self.epoch_micros
    }

    /// The counters of an edge. Takes a lock: resolve once and keep the handle.
    pub fn edge(&self, key: &EdgeKey) -> Arc<Edge> {
        if let Some(edge) = self.edges.read().get(key) {
            return edge.clone();
        }
        let mut edges = self.edges.write();
        if edges.len() < self.max_edges || edges.contains_key(key) {
            return edges.entry(key.clone()).or_default().clone();
        }
        self.overflowed.fetch_add(1, Relaxed);
        let other: Arc<str> = "other".into();
        // At most 16 of these (side, protocol, mTLS) stand beside the bounded ones.
        let key = EdgeKey {
            source: other.clone(),
            destination: other.clone(),
            route: other,
            backend: "".into(),
            ..key.clone()
        };
        edges.entry(key).or_default().clone()
    }

    /// Every edge with its counters, in a stable order.
    pub fn edges(&self) -> Vec<(EdgeKey, Arc<Edge>)> {
        let mut edges: Vec<_> = self.edges.read().iter().map(|(key, edge)| (key.clone(), edge.clone())).collect();
        edges.sort_by(|a, b| a.0.cmp(&b.0));
        edges
    }

    /// Counts packets that were refused.
    pub fn refused(&self, what: Refused, count: u64) {
        self.refused[what as usize].fetch_add(count, Relaxed);
    }

    /// Counts a connection that was refused before its edge was known.
    pub fn refused_connection(&self, cause: Cause) {
        self.refused_connections[cause as usize].fetch_add(1, Relaxed);
    }

    /// Counts an open connection that was ended because its peer is not accepted any more.
    pub fn ended_connection(&self, cause: Cause) {
        self.ended_connections[cause as usize].fetch_add(1, Relaxed);
    }

    /// Counts connections that were given up.
    pub fn shed(&self, what: Shed, count: usize) {
        self.shed[what as usize].fetch_add(count as u64, Relaxed);
    }

    /// Counts an answered DNS question.
    pub fn dns(&self, how: Dns) {
        self.dns[how as usize].fetch_add(1, Relaxed);
    }

    /// Counts a resource that was refused.
    pub fn resource_refused(&self) {
        self.resources_refused.fetch_add(1, Relaxed);
    }

    /// Notes whether a stream to a control plane is open.
    pub fn set_control_connected(&self, connected: bool) {
        if self.control_connected.swap(connected, Relaxed) && !connected {
            self.control_seen_s.store(seconds_now(), Relaxed);
        }
    }

    /// When a stream to a control plane was last open, in seconds of unix time; 0 when none was since the start.
    pub fn control_seen(&self) -> u64 {
        if self.control_connected() { seconds_now() } else { self.control_seen_s.load(Relaxed) }
    }

    /// Whether a stream to a control plane is open.
    pub fn control_connected(&self) -> bool {
        self.control_connected.load(Relaxed)
    }

    /// Notes the version of the trust bundle in use.
    pub fn set_trust_sequence(&self, sequence: u64) {
        self.trust_sequence.store(sequence, Relaxed);
    }

    /// Notes when the certificate in use expires.
    pub fn set_certificate_expires(&self, at: SystemTime) {
        let seconds = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.certificate_expires_s.store(seconds, Relaxed);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn key(source: &str, destination: &str) -> EdgeKey {
        EdgeKey {
            side: Side::Outbound,
            source: source.into(),
            destination: destination.into(),
            route: "default".into(),
            protocol: Protocol::Http1,
            mtls: true,
            backend: "".into(),
        }
    }

    impl Edge {
        pub(crate) fn ok(&self, micros: u64) {
            self.count(200, -1, None);
            self.latency(Duration::from_micros(micros), Duration::from_micros(micros / 10));
        }
    }

    #[test]
    fn an_edge_tells_answers_apart() {
        let metrics = Metrics::default();
        let edge = metrics.edge(&key("default/a", "default/b"));
        edge.count(200, -1, None);
        edge.count(200, -1, None);
        edge.count(503, -1, Some(Cause::NoEndpoint));
        edge.count(200, 14, None);
        edge.count(200, 999, None);
        let count = |status, grpc_status, reason, count| AnswerCount { status, grpc_status, reason, count };
        assert_eq!(
            metrics.edge(&key("default/a", "default/b")).answers(),
            [
                count(200, None, "", 2),
                count(200, Some(2), "", 1),
                count(200, Some(14), "", 1),
                count(503, None, "no-endpoint", 1)
            ]
        );
    }

    #[test]
    fn every_cause_survives_packing() {
        for cause in Cause::ALL {
            let key = pack(599, Some(16), Some(*cause));
            let back = unpack(key, 1);
            assert_eq!((back.status, back.grpc_status, back.reason), (599, Some(16), cause.reason()));
        }
    }

    #[test]
    fn too_many_kinds_of_answers_are_counted_together() {
        let edge = Edge::default();
        for status in 100..300 {
            edge.count(status, -1, None);
        }
        let answers = edge.answers();
        assert_eq!(answers.len(), MAX_ANSWERS + 1);
        assert_eq!(answers.iter().map(|it| it.count).sum::<u64>(), 200);
        assert_eq!(answers.last().map(|it| it.reason), Some("other"));
    }

    #[test]
    fn edges_beyond_the_limit_are_counted_as_other() {
        let metrics = Metrics::new(2);
        for index in 0..10 {
            metrics.edge(&key(&format!("default/s{index}"), "default/b")).ok(1);
        }
        let edges = metrics.edges();
        assert_eq!(edges.len(), 3);
        let other = edges.iter().find(|(key, _)| &*key.source == "other").map(|(_, edge)| edge.answers()[0].count);
        assert_eq!(other, Some(8));
    }

    #[test]
    fn threads_lose_no_count() {
        let metrics = Metrics::default();
        std::thread::scope(|scope| {
            for thread in 0..4u16 {
                let metrics = &metrics;
                scope.spawn(move || {
                    let edge = metrics.edge(&key("a", "b"));
                    for step in 0..1000u16 {
                        edge.count(200 + (step + thread) % 8, -1, None);
                    }
                });
            }
        });
        let answers = metrics.edge(&key("a", "b")).answers();
        assert_eq!(answers.len(), 8);
        assert!(answers.iter().all(|it| it.count == 500), "{answers:?}");
    }
}

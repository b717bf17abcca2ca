//! The counters of edges as the control plane receives them: cumulative within an epoch, only those that changed.

use super::{Edge, EdgeKey, Metrics, Protocol, Side};
use sheer_core::wire::v1;
use std::sync::atomic::Ordering::Relaxed;

impl Metrics {
    /// The edges that changed since the last call, or all that ever counted anything with `all` (after a reconnect, when
    /// the control plane may have missed some). `None` when there are none.
    pub fn report(&self, all: bool) -> Option<v1::Telemetry> {
        let edges: Vec<v1::Edge> = self.edges().iter().filter_map(|(key, edge)| report_edge(key, edge, all)).collect();
        (!edges.is_empty()).then_some(v1::Telemetry { epoch: self.epoch_micros, edges })
    }
}

fn report_edge(key: &EdgeKey, edge: &Edge, all: bool) -> Option<v1::Edge> {
    let message = message_of(key, edge);
    let sum = checksum(&message);
    let before = edge.reported.swap(sum, Relaxed);
    (sum != 0 && (all || sum != before)).then_some(message)
}

/// Grows with every change of a counter: all but the number of open connections only grow, and that one changes together
/// with a weight of its own.
fn checksum(edge: &v1::Edge) -> u64 {
    let answers: u64 = edge.responses.iter().map(|it| it.count).sum();
    let durations: u64 = edge.latency.iter().map(|it| it.count).sum();
    let closed = edge.connections_opened.wrapping_sub(edge.connections_open.cast_unsigned());
    answers
        .wrapping_add(durations)
        .wrapping_add((edge.latency_sum_s * 1e6) as u64)
        .wrapping_add((edge.mesh_sum_s * 1e6) as u64)
        .wrapping_add(edge.bytes_sent)
        .wrapping_add(edge.bytes_received)
        .wrapping_add(edge.connections_opened)
        .wrapping_add(closed)
}

fn message_of(key: &EdgeKey, edge: &Edge) -> v1::Edge {
    let (buckets, latency_sum_s) = edge.latency.load();
    let latency = (0u32..)
        .zip(buckets)
        .filter(|(_, count)| *count > 0)
        .map(|(index, count)| v1::Bucket { index, count })
        .collect();
    let responses = edge
        .answers()
        .into_iter()
        .map(|it| v1::ResponseCount {
            status: it.status.into(),
            grpc_status: it.grpc_status.map_or(-1, i32::from),
            reason: it.reason.to_owned(),
            count: it.count,
        })
        .collect();
    v1::Edge {
        side: match key.side {
            Side::Outbound => v1::edge::Side::Outbound.into(),
            Side::Inbound => v1::edge::Side::Inbound.into(),
        },
        source: key.source.to_string(),
        destination: key.destination.to_string(),
        route: key.route.to_string(),
        protocol: match key.protocol {
            Protocol::Http1 | Protocol::Http2 | Protocol::Grpc | Protocol::Tcp => key.protocol.as_str().to_owned(),
        },
        mtls: key.mtls,
        responses,
        latency,
        latency_sum_s,
        mesh_sum_s: edge.mesh.sum_s(),
        bytes_sent: edge.bytes_sent.load(Relaxed),
        bytes_received: edge.bytes_received.load(Relaxed),
        connections_opened: edge.opened.load(Relaxed),
        connections_open: edge.open.load(Relaxed),
        backend: key.backend.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::key;
    use super::*;

    #[test]
    fn only_changes_are_reported_and_values_are_cumulative() {
        let metrics = Metrics::default();
        assert_eq!(metrics.report(false), None);
        let (one, two) = (metrics.edge(&key("a", "b")), metrics.edge(&key("a", "c")));
        assert_eq!(metrics.report(false), None, "an edge that counted nothing is not worth a message");
        one.ok(1000);
        two.bytes(10, 20);
        assert_eq!(metrics.report(false).map(|it| it.edges.len()), Some(2));
        assert_eq!(metrics.report(false), None);
        one.ok(1000);
        let report = metrics.report(false).unwrap();
        assert_eq!(report.epoch, metrics.epoch_micros());
        assert_eq!(report.edges.len(), 1);
        assert_eq!(report.edges[0].responses[0].count, 2);
        assert_eq!(report.edges[0].latency.iter().map(|it| it.count).sum::<u64>(), 2);
        assert_eq!(metrics.report(true).map(|it| it.edges.len()), Some(2));
    }

    #[test]
    fn a_closed_connection_is_a_change() {
        let metrics = Metrics::default();
        let edge = metrics.edge(&key("a", "b"));
        edge.opened();
        assert_eq!(metrics.report(false).map(|it| it.edges[0].connections_open), Some(1));
        edge.closed();
        assert_eq!(metrics.report(false).map(|it| it.edges[0].connections_open), Some(0));
    }
}

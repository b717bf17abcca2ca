//! The counters in the Prometheus text format, version 0.0.4.
//!
//! Series of an edge have the labels `side`, `source`, `destination`, `route`, `backend`, `protocol` and `mtls`; requests
//! and closed connections also `status`, `grpc_status` and `reason`.

use super::{Dns, Edge, EdgeKey, Histogram, Metrics, Protocol, Refused, Shed};
use sheer_core::cause::Cause;
use sheer_core::histogram;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// The content type of [`Metrics::exposition`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The boundaries of histograms: every fourth of [`sheer_core::histogram`] from 128 us to 67 s.
const FIRST_BOUNDARY_MICROS: u64 = 128;
const LAST_BOUNDARY_MICROS: u64 = 1 << 26;

impl Metrics {
    /// Everything as text.
    pub fn exposition(&self) -> String {
        let edges = self.edges();
        let mut text = String::with_capacity(4096 + edges.len() * 8192);
        write_traffic(&mut text, &edges);
        self.write_own(&mut text);
        text
    }

    fn write_own(&self, text: &mut String) {
        head(text, "sheer_control_connected", "gauge", "1 while a stream to a control plane is open.");
        sample(text, "sheer_control_connected", "", u8::from(self.control_connected()));
        let name = "sheer_control_last_seen_seconds";
        head(text, name, "gauge", "Unix time at which such a stream was last open; 0 when none was since the start.");
        sample(text, name, "", self.control_seen());
        let expires = self.certificate_expires_s.load(Relaxed);
        head(text, "sheer_certificate_expiry_seconds", "gauge", "Unix time at which the certificate in use expires.");
        sample(text, "sheer_certificate_expiry_seconds", "", expires);
        head(text, "sheer_trust_sequence", "gauge", "Version of the trust bundle in use.");
        sample(text, "sheer_trust_sequence", "", self.trust_sequence.load(Relaxed));
        head(text, "sheer_start_time_seconds", "gauge", "Unix time at which this proxy began to count.");
        sample(text, "sheer_start_time_seconds", "", self.epoch_micros as f64 / 1e6);
        let refused = self.resources_refused.load(Relaxed);
        head(text, "sheer_resources_refused_total", "counter", "Resources of the control plane that were not applied.");
        sample(text, "sheer_resources_refused_total", "", refused);
        head(text, "sheer_edges_overflowed_total", "counter", "Look-ups of edges that were counted as 'other'.");
        sample(text, "sheer_edges_overflowed_total", "", self.overflowed.load(Relaxed));
        head(
            text,
            "sheer_refused_total",
            "counter",
            "Packets of the workload that cannot be carried and were refused.",
        );
        for what in Refused::ALL {
            let labels = format!("what=\"{}\"", what.as_str());
            sample(text, "sheer_refused_total", &labels, self.refused[*what as usize].load(Relaxed));
        }
        head(text, "sheer_connections_refused_total", "counter", "Connections refused before their edge was known.");
        for cause in Cause::ALL {
            let count = self.refused_connections[*cause as usize].load(Relaxed);
            if count > 0 {
                let labels = format!("reason=\"{cause}\"");
                sample(text, "sheer_connections_refused_total", &labels, count);
            }
        }
        let name = "sheer_connections_ended_total";
        head(text, name, "counter", "Open connections that were ended because their peer is not accepted any more.");
        for cause in [Cause::PeerUntrusted, Cause::IdentityMismatch] {
            let count = self.ended_connections[cause as usize].load(Relaxed);
            if count > 0 {
                let labels = format!("reason=\"{cause}\"");
                sample(text, name, &labels, count);
            }
        }
        head(text, "sheer_connections_shed_total", "counter", "Connections given up because a limit was reached.");
        for what in Shed::ALL {
            let labels = format!("what=\"{}\"", what.as_str());
            sample(text, "sheer_connections_shed_total", &labels, self.shed[*what as usize].load(Relaxed));
        }
        head(text, "sheer_clients_open", "gauge", "Connections of clients that are open.");
        sample(text, "sheer_clients_open", "", self.clients_open.load(Relaxed).max(0));
        head(text, "sheer_clients_limit", "gauge", "The most connections of clients, by the descriptors there are.");
        sample(text, "sheer_clients_limit", "", self.clients_limit.load(Relaxed));
        head(text, "sheer_memory_bytes", "gauge", "Memory that this process holds, without files.");
        sample(text, "sheer_memory_bytes", "", self.memory.load(Relaxed));
        head(text, "sheer_memory_limit_bytes", "gauge", "The memory limit that this process runs under.");
        sample(text, "sheer_memory_limit_bytes", "", self.memory_limit.load(Relaxed));
        head(text, "sheer_dns_questions_total", "counter", "DNS questions of the workload, by how they were answered.");
        for how in Dns::ALL {
            let labels = format!("answer=\"{}\"", how.as_str());
            sample(text, "sheer_dns_questions_total", &labels, self.dns[*how as usize].load(Relaxed));
        }
        #[cfg(feature = "count-allocations")]
        write_allocations(text);
    }
}

#[cfg(feature = "count-allocations")]
fn write_allocations(text: &mut String) {
    let counted = crate::platform::allocations::counted();
    head(text, "sheer_allocations_total", "counter", "Times that memory was asked for, all threads.");
    sample(text, "sheer_allocations_total", "", counted.times);
    head(text, "sheer_allocated_bytes_total", "counter", "Bytes that were asked for.");
    sample(text, "sheer_allocated_bytes_total", "", counted.allocated_bytes);
    head(text, "sheer_freed_bytes_total", "counter", "Bytes that were given back.");
    sample(text, "sheer_freed_bytes_total", "", counted.freed_bytes);
}

fn write_traffic(text: &mut String, edges: &[(EdgeKey, Arc<Edge>)]) {
    let labelled: Vec<(&EdgeKey, &Edge, String)> =
        edges.iter().map(|(key, edge)| (key, &**edge, labels_of(key))).collect();
    let answers = |text: &mut String, name: &str, tcp: bool| {
        for (key, edge, labels) in &labelled {
            if (key.protocol == Protocol::Tcp) != tcp {
                continue;
            }
            for answer in edge.answers() {
                let status = if tcp { String::new() } else { format!("status=\"{}\",", answer.status) };
                let grpc = match answer.grpc_status {
                    _ if tcp => String::new(),
                    Some(code) => format!("grpc_status=\"{code}\","),
                    None => "grpc_status=\"\",".to_owned(),
                };
                let labels = format!("{labels},{status}{grpc}reason=\"{}\"", answer.reason);
                sample(text, name, &labels, answer.count);
            }
        }
    };
    head(text, "sheer_requests_total", "counter", "Requests, by status, gRPC status and reason of failure.");
    answers(text, "sheer_requests_total", false);
    head(text, "sheer_connections_closed_total", "counter", "Connections of bytes that ended, by reason of failure.");
    answers(text, "sheer_connections_closed_total", true);

    head(text, "sheer_request_duration_seconds", "histogram", "From the first byte in to the last byte out.");
    for (_, edge, labels) in &labelled {
        write_histogram(text, "sheer_request_duration_seconds", labels, &edge.latency);
    }
    head(text, "sheer_mesh_added_seconds", "histogram", "The part of each duration that this proxy itself added.");
    for (_, edge, labels) in &labelled {
        write_histogram(text, "sheer_mesh_added_seconds", labels, &edge.mesh);
    }
    head(text, "sheer_sent_bytes_total", "counter", "Bytes of bodies and connections from source to destination.");
    for (_, edge, labels) in &labelled {
        sample(text, "sheer_sent_bytes_total", labels, edge.bytes_sent.load(Relaxed));
    }
    head(text, "sheer_received_bytes_total", "counter", "Bytes of bodies and connections from destination to source.");
    for (_, edge, labels) in &labelled {
        sample(text, "sheer_received_bytes_total", labels, edge.bytes_received.load(Relaxed));
    }
    head(text, "sheer_connections_opened_total", "counter", "Connections that were opened.");
    for (_, edge, labels) in &labelled {
        sample(text, "sheer_connections_opened_total", labels, edge.opened.load(Relaxed));
    }
    head(text, "sheer_connections_open", "gauge", "Connections that are open.");
    for (_, edge, labels) in &labelled {
        sample(text, "sheer_connections_open", labels, edge.open.load(Relaxed).max(0));
    }
}

fn labels_of(key: &EdgeKey) -> String {
    format!(
        "side=\"{}\",source=\"{}\",destination=\"{}\",route=\"{}\",backend=\"{}\",protocol=\"{}\",mtls=\"{}\"",
        key.side.as_str(),
        escape(&key.source),
        escape(&key.destination),
        escape(&key.route),
        escape(&key.backend),
        key.protocol.as_str(),
        key.mtls
    )
}

/// Escapes a label's value (text format: backslash, double quote, line feed).
fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn sample(text: &mut String, name: &str, labels: &str, value: impl std::fmt::Display) {
    let _ =
        if labels.is_empty() { writeln!(text, "{name} {value}") } else { writeln!(text, "{name}{{{labels}}} {value}") };
}

fn write_histogram(text: &mut String, name: &str, labels: &str, histogram: &Histogram) {
    let (counts, sum_s) = histogram.load();
    let total: u64 = counts.iter().sum();
    if total == 0 {
        return;
    }
    let mut below = 0;
    for (index, count) in counts.iter().enumerate() {
        below += count;
        let bound = histogram::upper_bound_micros(index);
        if (index + 1) % 4 == 0 && (FIRST_BOUNDARY_MICROS..=LAST_BOUNDARY_MICROS).contains(&bound) {
            let _ = writeln!(text, "{name}_bucket{{{labels},le=\"{}\"}} {below}", bound as f64 / 1e6);
        }
    }
    let _ = writeln!(text, "{name}_bucket{{{labels},le=\"+Inf\"}} {total}");
    let _ = writeln!(text, "{name}_sum{{{labels}}} {sum_s}\n{name}_count{{{labels}}} {total}");
}

#[cfg(test)]
mod tests {
    use super::super::Refused;
    use super::super::tests::key;
    use super::*;
    use std::time::Duration;

    #[test]
    fn an_edge_in_full() {
        let metrics = Metrics::default();
        let edge = metrics.edge(&key("default/web", "default/api"));
        edge.ok(1000);
        edge.count(502, 14, Some(Cause::ConnectRefused));
        edge.latency(Duration::from_millis(2), Duration::ZERO);
        edge.bytes(10, 20);
        metrics.refused(Refused::Udp, 1);
        let text = metrics.exposition();
        let labels = "side=\"outbound\",source=\"default/web\",destination=\"default/api\",route=\"default\",backend=\"\",protocol=\"http1\",mtls=\"true\"";
        for line in [
            format!("sheer_requests_total{{{labels},status=\"200\",grpc_status=\"\",reason=\"\"}} 1"),
            format!("sheer_requests_total{{{labels},status=\"502\",grpc_status=\"14\",reason=\"connect-refused\"}} 1"),
            format!("sheer_request_duration_seconds_bucket{{{labels},le=\"0.001024\"}} 1"),
            format!("sheer_request_duration_seconds_bucket{{{labels},le=\"+Inf\"}} 2"),
            format!("sheer_request_duration_seconds_sum{{{labels}}} 0.003"),
            format!("sheer_mesh_added_seconds_count{{{labels}}} 2"),
            format!("sheer_received_bytes_total{{{labels}}} 20"),
            "sheer_refused_total{what=\"udp\"} 1".to_owned(),
            "sheer_control_connected 0".to_owned(),
            "sheer_control_last_seen_seconds 0".to_owned(),
        ] {
            assert!(text.lines().any(|it| it == line), "missing {line}\n{text}");
        }
    }

    #[test]
    fn every_series_has_help_and_type_before_it_and_appears_once() {
        let metrics = Metrics::default();
        metrics.edge(&key("a", "b")).ok(5);
        metrics.edge(&EdgeKey { protocol: Protocol::Tcp, ..key("a", "b") }).count(0, -1, None);
        let text = metrics.exposition();
        let mut series = std::collections::HashSet::new();
        let mut current = "";
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                current = rest.split(' ').next().unwrap_or_default();
            } else if !line.starts_with('#') {
                assert!(line.starts_with(current), "{line} under {current}");
                let (name, value) = line.rsplit_once(' ').unwrap();
                assert!(value.parse::<f64>().is_ok(), "{line}");
                assert!(series.insert(name.to_owned()), "{name} twice");
            }
        }
    }

    #[test]
    fn label_values_are_escaped() {
        let metrics = Metrics::default();
        metrics.edge(&key("a\"b\\c\nd", "b")).ok(5);
        assert!(metrics.exposition().contains(r#"source="a\"b\\c\nd""#));
    }
}

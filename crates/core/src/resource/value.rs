//! The scalar values of resources: names, ports, durations, addresses, header fields.

use super::decode::{Cursor, clip};
use crate::name::DnsLabel;
use crate::wire::v1::{Mode, Protocol};
use ipnet::IpNet;
use std::net::IpAddr;
use std::time::Duration;

/// A label known to be one.
pub(crate) fn label(text: &'static str) -> DnsLabel {
    DnsLabel::parse(text).expect("a constant that is a label")
}

impl Cursor<'_> {
    /// A name: an RFC 1123 label.
    pub(super) fn label(&self) -> Option<DnsLabel> {
        let text = self.text()?;
        let label = DnsLabel::parse(text).ok();
        if label.is_none() {
            let long = if text.len() > 63 { format!(" ({} bytes)", text.len()) } else { String::new() };
            self.error_help(
                format!("'{}'{long} is no name", clip(text)),
                "write 1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit",
            );
        }
        label
    }

    /// A port number.
    pub(super) fn port(&self) -> Option<u16> {
        self.integer(1, 65535).and_then(|port| u16::try_from(port).ok())
    }

    /// A duration (GEP-2257).
    pub(super) fn duration(&self) -> Option<Duration> {
        let text = match &self.node.value {
            // A number is not told to become a text, but a duration.
            super::yaml::Value::Scalar { text, .. } => text,
            _ => self.text()?,
        };
        let duration = parse_duration(text);
        if duration.is_none() {
            self.error_help(
                format!("'{}' is no duration", clip(text)),
                "write up to four numbers of up to five digits with h, m, s or ms, like 1h30m or 250ms",
            );
        }
        duration
    }

    /// A CIDR; an address stands for itself alone. Bits below the prefix must be zero.
    pub(super) fn cidr(&self) -> Option<IpNet> {
        let text = self.text()?;
        if let Ok(address) = text.parse::<IpAddr>() {
            return Some(IpNet::from(address));
        }
        let Ok(net) = text.parse::<IpNet>() else {
            self.error_help(format!("'{}' is no CIDR", clip(text)), "write it like 10.0.0.0/8 or fd00::/8");
            return None;
        };
        if net.trunc() != net {
            self.error_help(format!("{net} has bits below its prefix"), format!("write {}", net.trunc()));
            return None;
        }
        Some(net)
    }

    /// An IP address that a peer can dial.
    pub(super) fn address(&self) -> Option<IpAddr> {
        let text = self.text()?;
        let Ok(address) = text.parse::<IpAddr>() else {
            self.error_help(format!("'{}' is no IP address", clip(text)), "write it like 192.0.2.7 or 2001:db8::7");
            return None;
        };
        if address.is_unspecified() || address.is_multicast() {
            self.error(format!("{address} cannot be dialled"));
            return None;
        }
        Some(address)
    }

    /// A host name in lower case, without a trailing dot; with `wildcard`, the first label may be `*`.
    pub(super) fn host_name(&self, wildcard: bool) -> Option<String> {
        let text = self.text()?;
        self.check_host_name(text, wildcard)
    }

    /// The same for a text that stands at this place among others.
    pub(super) fn check_host_name(&self, text: &str, wildcard: bool) -> Option<String> {
        let plain = if wildcard { text.strip_prefix("*.").unwrap_or(text) } else { text };
        let labels = plain.split('.').all(|part| DnsLabel::parse(part).is_ok());
        if plain.parse::<IpAddr>().is_ok() {
            self.error_help(format!("{plain} is an address, not a host name"), "write a name");
            return None;
        }
        if text.len() > 253 || !labels {
            let help = "write labels of a-z, 0-9 and '-', separated by dots, 253 characters at most";
            self.error_help(format!("'{}' is no host name", clip(text)), help);
            return None;
        }
        Some(text.to_owned())
    }

    /// The application protocol of a port, as `sheer run --port` and `appProtocol` spell it.
    pub(super) fn protocol(&self) -> Option<Protocol> {
        self.choice(PROTOCOLS)
    }

    /// An enforcement mode.
    pub(super) fn mode(&self) -> Option<Mode> {
        self.choice(&[("watch", Mode::Watch), ("permissive", Mode::Permissive), ("strict", Mode::Strict)])
    }

    /// `region` or `region/zone`.
    pub(super) fn locality(&self) -> Option<String> {
        let text = self.text()?;
        let part = |part: &str| !part.is_empty() && part.len() <= 63 && is_label_value(part);
        if text.split('/').count() <= 2 && text.split('/').all(part) {
            return Some(text.to_owned());
        }
        self.error_help(format!("'{}' is no locality", clip(text)), "write REGION/ZONE, like eu-west/a");
        None
    }

    /// The name of an HTTP header field, in lower case (RFC 9110, section 5.1).
    pub(super) fn header_name(&self) -> Option<String> {
        let text = self.text()?;
        if text.len() <= 256 && http::HeaderName::from_bytes(text.as_bytes()).is_ok() {
            return Some(text.to_ascii_lowercase());
        }
        let help = "write 1 to 256 letters, digits and any of !#$%&'*+-.^_`|~";
        self.error_help(format!("'{}' is no header name", clip(text)), help);
        None
    }
}

/// The protocols by their names.
pub(super) const PROTOCOLS: &[(&str, Protocol)] = &[
    ("http", Protocol::Http),
    ("http2", Protocol::Http2),
    ("grpc", Protocol::Grpc),
    ("tcp", Protocol::Tcp),
    ("tls", Protocol::Tls),
];

/// Parses a duration of the Gateway API (GEP-2257): up to four parts of up to five digits and a unit `h`, `m`, `s` or
/// `ms`. `None` for any other text.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    let mut parts = 0;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        if !(1..=5).contains(&digits) || parts == 4 {
            return None;
        }
        let (number, after) = rest.split_at(digits);
        let number: u64 = number.parse().ok()?;
        let (part, after) = if let Some(after) = after.strip_prefix("ms") {
            (Duration::from_millis(number), after)
        } else if let Some(after) = after.strip_prefix('h') {
            (Duration::from_secs(number * 3600), after)
        } else if let Some(after) = after.strip_prefix('m') {
            (Duration::from_secs(number * 60), after)
        } else {
            (Duration::from_secs(number), after.strip_prefix('s')?)
        };
        total += part;
        parts += 1;
        rest = after;
    }
    (parts > 0).then_some(total)
}

/// A label's name after the Kubernetes syntax: `[prefix/]name`.
pub(super) fn is_label_key(text: &str) -> bool {
    let (prefix, name) = match text.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, text),
    };
    let prefix_fits = |it: &str| it.len() <= 253 && it.split('.').all(|part| DnsLabel::parse(part).is_ok());
    !name.is_empty() && is_label_value(name) && prefix.is_none_or(prefix_fits)
}

/// A label's value after the Kubernetes syntax; it may be empty.
pub(super) fn is_label_value(text: &str) -> bool {
    let edge = |b: Option<&u8>| b.is_none_or(u8::is_ascii_alphanumeric);
    let inner = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let bytes = text.as_bytes();
    bytes.len() <= 63 && bytes.iter().all(|b| inner(*b)) && edge(bytes.first()) && edge(bytes.last())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let table: &[(&str, Option<u64>)] = &[
            ("0s", Some(0)),
            ("1h30m", Some(5_400_000)),
            ("250ms", Some(250)),
            ("1h1m1s1ms", Some(3_661_001)),
            ("99999h", Some(359_996_400_000)),
            ("5m5m", Some(600_000)),
            ("", None),
            ("1", None),
            ("1.5h", None),
            ("-1s", None),
            ("100000s", None),
            ("1h1m1s1ms1s", None),
            ("1d", None),
            ("1 s", None),
            ("s", None),
            ("1µs", None),
        ];
        for (text, milliseconds) in table {
            assert_eq!(parse_duration(text), milliseconds.map(Duration::from_millis), "{text}");
        }
    }

    #[test]
    fn labels_of_workloads() {
        for key in ["app", "app.kubernetes.io/name", "a_b", "A"] {
            assert!(is_label_key(key), "{key}");
        }
        for key in ["", "/a", "a/", "a/b/c", "-a", "A.B/c", "a b"] {
            assert!(!is_label_key(key), "{key}");
        }
        assert!(is_label_value("") && is_label_value("v1.2_x") && !is_label_value("ä") && !is_label_value("a "));
    }
}

//! What to load, as a value and as a line of text.

use http::Uri;
use std::str::FromStr;

/// How to speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.1 on kept connections, one request at a time on each.
    Http1,
    /// HTTP/2 with prior knowledge, requests side by side on each connection.
    Http2,
    /// Unary gRPC calls of `shop.v1.Pricing/Quote`, side by side on each connection.
    Grpc,
    /// Bidirectional gRPC streams of `shop.v1.Pricing/Haggle`: [`Load::messages`] messages, each answer awaited.
    GrpcStream,
    /// Lines with sequence numbers over TCP, each of which must come back. With `?lines=N` in the URL connections are
    /// short: see [`Load::lines`].
    Tcp,
}

/// One load.
#[derive(Clone, Debug)]
pub struct Load {
    /// Its name in the report; when parsed, the protocol and the URL. Loads of the same name are numbered.
    pub name: String,
    /// How to speak.
    pub protocol: Protocol,
    /// Where to connect: `host:port`.
    pub address: String,
    /// The `Host` or `:authority` to send; when parsed, the URL's.
    pub authority: String,
    /// The path of HTTP requests.
    pub path: String,
    /// Requests (or streams, or lines) a second, all connections together.
    pub rate: f64,
    /// How many connections.
    pub connections: usize,
    /// More header fields of HTTP requests.
    pub headers: Vec<(String, String)>,
    /// The body of HTTP requests; with one they are POSTs.
    pub body: bytes::Bytes,
    /// Messages a gRPC stream; default 20.
    pub messages: u64,
    /// Time between two messages of a gRPC stream; default 50 ms.
    pub message_interval: std::time::Duration,
    /// After how many lines a TCP connection is ended in order and another one opened; default: none is.
    pub lines: Option<u64>,
}

/// What is wrong with a target.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// Not of the expected form.
    #[error("expected PROTOCOL@RATExCONNECTIONS=URL, such as http1@100x4=http://web/")]
    Form,
    /// An unknown protocol.
    #[error("unknown protocol {0:?}; one of http1, http2, grpc, grpc-stream, tcp")]
    Protocol(String),
    /// Not a number above zero.
    #[error("{0:?} is not a number above zero")]
    Number(String),
    /// Not a URL, or one without a host, or tcp without a port.
    #[error("{0:?} is not a URL with a host, such as http://web/, tcp://echo:7000 or tcp://echo:7000?lines=5")]
    Url(String),
}

impl Load {
    /// A load of 100 requests a second over 4 connections.
    pub fn new(protocol: Protocol, url: &str) -> Result<Self, TargetError> {
        let wrong = || TargetError::Url(url.to_owned());
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        let authority = uri.authority().ok_or_else(wrong)?;
        let port = match (authority.port_u16(), protocol) {
            (Some(port), _) => port,
            (None, Protocol::Tcp) => return Err(wrong()),
            (None, _) => 80,
        };
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        let lines = match (protocol, uri.query()) {
            (Protocol::Tcp, Some(query)) => {
                let number = query.strip_prefix("lines=").and_then(|number| number.parse().ok());
                Some(number.filter(|number| *number > 0).ok_or_else(wrong)?)
            }
            _ => None,
        };
        Ok(Self {
            name: format!("{} {authority}{}", protocol.name(), path.trim_end_matches('/')),
            protocol,
            address: format!("{}:{port}", authority.host()),
            authority: authority.to_string(),
            path: path.to_owned(),
            rate: 100.0,
            connections: 4,
            headers: Vec::new(),
            body: bytes::Bytes::new(),
            messages: 20,
            message_interval: std::time::Duration::from_millis(50),
            lines,
        })
    }

    /// The same with this rate over this many connections.
    pub fn at(mut self, rate: f64, connections: usize) -> Self {
        self.rate = rate;
        self.connections = connections;
        self
    }

    /// The same under this name.
    pub fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }
}

impl Protocol {
    /// As in a target's text.
    pub fn name(self) -> &'static str {
        match self {
            Self::Http1 => "http1",
            Self::Http2 => "http2",
            Self::Grpc => "grpc",
            Self::GrpcStream => "grpc-stream",
            Self::Tcp => "tcp",
        }
    }
}

impl FromStr for Load {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        let (how, url) = text.split_once('=').ok_or(TargetError::Form)?;
        let (protocol, numbers) = how.split_once('@').ok_or(TargetError::Form)?;
        let (rate, connections) = numbers.split_once('x').ok_or(TargetError::Form)?;
        let all = [Protocol::Http1, Protocol::Http2, Protocol::Grpc, Protocol::GrpcStream, Protocol::Tcp];
        let protocol = all
            .into_iter()
            .find(|candidate| candidate.name() == protocol)
            .ok_or_else(|| TargetError::Protocol(protocol.to_owned()))?;
        let rate_wrong = || TargetError::Number(rate.to_owned());
        let rate: f64 = rate.parse().map_err(|_| rate_wrong())?;
        if !(rate.is_finite() && rate > 0.0) {
            return Err(TargetError::Number(rate.to_string()));
        }
        let connections_wrong = || TargetError::Number(connections.to_owned());
        let connections: usize = connections.parse().map_err(|_| connections_wrong())?;
        if connections == 0 {
            return Err(connections_wrong());
        }
        Ok(Self::new(protocol, url)?.at(rate, connections))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_text_is_a_load() {
        let load: Load = "http1@200x8=http://web/api/items?x=1".parse().unwrap();
        assert_eq!(load.protocol, Protocol::Http1);
        assert_eq!((load.address.as_str(), load.authority.as_str()), ("web:80", "web"));
        assert_eq!((load.path.as_str(), load.rate, load.connections), ("/api/items?x=1", 200.0, 8));
        assert_eq!(load.lines, None);
        let load: Load = "tcp@50x10=tcp://echo:7000?lines=5".parse().unwrap();
        assert_eq!((load.address.as_str(), load.lines), ("echo:7000", Some(5)));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, part) in [
            ("http1", "expected"),
            ("http9@1x1=http://a/", "http9"),
            ("tcp@0x1=tcp://a:1", "0"),
            ("tcp@1x0=tcp://a:1", "0"),
            ("tcp@1x1=tcp://a", "tcp://a"),
            ("tcp@1x1=tcp://a:1?lines=0", "lines=0"),
            ("tcp@1x1=tcp://a:1?line=5", "line=5"),
            ("http1@1x1=/path", "/path"),
        ] {
            let error = text.parse::<Load>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}

//! A failed request: what its caller is told.
//!
//! The cause decides status, gRPC code and side; this module writes them out. Meshed callers on the same host are told
//! where and why in full; strangers at a published door get the reason and the request's id alone.

use crate::body::{Body, Response};
use http::StatusCode;
use sheer_core::cause::{Cause, Side};
use sheer_core::head::{Known, ResponseHead, Version};
use std::fmt;
use std::net::SocketAddr;

/// Why a request failed, with what is known of the attempt.
#[derive(Debug)]
pub struct RequestError {
    /// Why.
    pub cause: Cause,
    /// The endpoint that was tried last.
    pub to: Option<SocketAddr>,
    /// Attempts made.
    pub tries: u32,
    /// What happened, for people.
    pub source: Option<Box<dyn std::error::Error>>,
}

impl From<Cause> for RequestError {
    fn from(cause: Cause) -> Self {
        Self { cause, to: None, tries: 0, source: None }
    }
}

impl RequestError {
    /// The same with what happened.
    pub fn because(cause: Cause, source: impl std::error::Error + 'static) -> Self {
        Self { source: Some(Box::new(source)), ..cause.into() }
    }

    /// The same about an attempt at an endpoint.
    pub fn at(mut self, to: SocketAddr, tries: u32) -> Self {
        self.to = Some(to);
        self.tries = tries;
        self
    }
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.cause)
    }
}

impl std::error::Error for RequestError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref()
    }
}

/// Who reads the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// The workload beside the proxy, or the proxy of a peer.
    Mesh,
    /// Anybody, at a published door.
    Public,
}

/// What an answer says beside the error.
#[derive(Clone, Copy, Debug)]
pub struct Told<'a> {
    /// Who reads it.
    pub audience: Audience,
    /// The workload whose proxy answers.
    pub at: &'a str,
    /// The request's id.
    pub id: &'a str,
    /// Whether the caller speaks gRPC.
    pub grpc: bool,
    /// The version the request came in.
    pub version: Version,
}

/// The answer to a failed request. A gRPC caller gets its status in a head without a body (trailers-only).
pub fn response(error: &RequestError, told: &Told<'_>) -> Response {
    let reason = reason(error, told);
    let status = if told.grpc { StatusCode::OK } else { error.cause.status() };
    let mut head = ResponseHead::new(status);
    head.version = told.version;
    let mut set = |name: &str, value: &[u8]| {
        // Fewer fields than a head may have.
        let _ = head.fields.append(name, value);
    };
    set(Known::SheerReason.as_str(), reason.as_bytes());
    if told.grpc {
        set("content-type", b"application/grpc");
        set("grpc-status", error.cause.grpc_status().to_string().as_bytes());
        set("grpc-message", percent_encoded(&reason).as_bytes());
        return Response { head, body: Body::Empty };
    }
    set("content-type", b"text/plain; charset=utf-8");
    Response { head, body: Body::from(bytes::Bytes::from(text(error, told, &reason))) }
}

/// `connect-refused; at=...; to=...; tries=2; id=...`, as much of it as the reader may know.
fn reason(error: &RequestError, told: &Told<'_>) -> String {
    let mut reason = error.cause.reason().to_owned();
    if told.audience == Audience::Mesh {
        reason.push_str(&format!("; at={}", told.at));
        if let Some(to) = error.to {
            reason.push_str(&format!("; to={to}"));
        }
        if error.tries > 0 {
            reason.push_str(&format!("; tries={}", error.tries));
        }
    }
    if !told.id.is_empty() {
        reason.push_str(&format!("; id={}", told.id));
    }
    reason
}

fn text(error: &RequestError, told: &Told<'_>, reason: &str) -> String {
    let who = match error.cause.side() {
        Side::Client => "the caller's request",
        Side::Mesh => "the mesh",
        Side::Upstream => "the service behind the mesh",
    };
    let mut text = format!("sheer: {reason}\n");
    if told.audience == Audience::Mesh {
        text.push_str(&format!("{}. The fault lies with {who}.\n", what(error.cause)));
        let mut source = error.source.as_deref().map(|it| it as &dyn std::error::Error);
        while let Some(inner) = source {
            text.push_str(&format!("  {inner}\n"));
            source = inner.source();
        }
        text.push_str(&format!("{}\n", next(error.cause)));
    }
    text
}

/// What happened, in a sentence.
fn what(cause: Cause) -> &'static str {
    match cause {
        Cause::BadRequest => "The request is malformed or can be read in two ways",
        Cause::HeadTooLarge => "The request's head is larger than 60 KiB or has more than 100 fields",
        Cause::HeadTimeout => "The request's head did not arrive in time",
        Cause::BodyTimeout => "The request's body arrived, or its answer was taken, slower than a stranger may",
        Cause::ClientGone => "The caller was gone before the answer was complete",
        Cause::PlaintextRefused => "This workload takes connections of mesh peers alone, and this one is none",
        Cause::PeerUntrusted => "The peer's certificate is not of this mesh",
        Cause::PeerExpired => "The peer's certificate has ended",
        Cause::PeerNotYetValid => "The peer's certificate is not valid yet",
        Cause::PeerNoWorkload => "The peer's certificate is not that of one workload of this mesh",
        Cause::PeerAnonymous => "The peer has no certificate",
        Cause::IdentityRefused => "The peer does not accept this proxy's certificate",
        Cause::PortNotDeclared => "The workload does not declare this port",
        Cause::UnknownDestination => "No service has this name or address",
        Cause::DestinationForbidden => "The proxy does not connect to this address",
        Cause::UnknownPort => "The service has no such port",
        Cause::NoRoute => "The service has routes, and none of their rules matches this request",
        Cause::NoBackend => "The rule that matches has no backend that exists",
        Cause::NoEndpoint => "The service has no endpoint for this port",
        Cause::ControlPlaneAway => {
            "The service is used for the first time, and the control plane did not answer in time"
        }
        Cause::Draining => "This workload is leaving; the request was not processed",
        Cause::Overloaded => "A limit of the proxy is reached",
        Cause::Loop => {
            "What a proxy delivered to an application arrived at a proxy's door for calls: it goes in a circle"
        }
        Cause::NoIdentity => "The proxy has no valid certificate",
        Cause::IdentityMismatch => "Whoever answered is not one of the service's identities",
        Cause::TlsFailed => "The TLS handshake with the endpoint failed",
        Cause::Deadline => "The route's timeout passed",
        Cause::ConnectRefused => "The endpoint refused the connection",
        Cause::ConnectTimeout => "The endpoint did not accept the connection in time",
        Cause::ConnectFailed => "The endpoint could not be reached",
        Cause::UpstreamReset => "The endpoint closed the connection before it answered",
        Cause::BadResponse => "The endpoint's answer is malformed or can be read in two ways",
        Cause::ResponseTruncated => "The endpoint's answer broke off",
    }
}

/// What to do next.
fn next(cause: Cause) -> &'static str {
    match cause {
        Cause::BadRequest | Cause::HeadTooLarge | Cause::HeadTimeout | Cause::BodyTimeout | Cause::ClientGone => {
            "Mend the client; the proxy's access log has the request's line."
        }
        Cause::PlaintextRefused => {
            "Start the caller with 'sheer run', or admit it in the Workload: spec.plaintext: [{ports, cidrs, reason}]."
        }
        Cause::PeerUntrusted
        | Cause::PeerExpired
        | Cause::PeerNotYetValid
        | Cause::PeerNoWorkload
        | Cause::PeerAnonymous
        | Cause::IdentityRefused
        | Cause::TlsFailed
        | Cause::NoIdentity => "'sheer check' shows certificates and clocks.",
        Cause::IdentityMismatch => {
            "'sheer check' shows which identity claims the service; allow it in the Service if it may."
        }
        Cause::PortNotDeclared => "Declare the port: 'sheer run --port PORT', or in the Workload.",
        Cause::UnknownDestination | Cause::UnknownPort => "'sheer get services' lists services and ports.",
        Cause::DestinationForbidden => "Use the service's name instead of an address of the proxy.",
        Cause::NoRoute | Cause::NoBackend => "'sheer get httproute' shows the rules.",
        Cause::NoEndpoint => {
            "'sheer check' says why it has none; 'sheer run SERVICE --port PORT -- COMMAND' starts one."
        }
        Cause::ControlPlaneAway => "'sheer check' shows whether the control plane can be reached; then try again.",
        Cause::Draining | Cause::Overloaded => "Try again.",
        Cause::Loop => "Give the workload the port that its application listens on: this one is a proxy's.",
        Cause::Deadline => "Make the service faster, or the route's timeout longer.",
        Cause::ConnectRefused | Cause::ConnectTimeout | Cause::ConnectFailed => {
            "See whether the application listens there: 'sheer check', 'sheer stat'."
        }
        Cause::UpstreamReset | Cause::BadResponse | Cause::ResponseTruncated => {
            "See the log of the application that answers."
        }
    }
}

/// gRPC messages are percent-encoded outside printable ASCII (gRPC over HTTP/2, "Status-Message").
fn percent_encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'%' => encoded.push_str("%25"),
            0x20..=0x7e => encoded.push(char::from(byte)),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(audience: Audience, grpc: bool) -> Told<'static> {
        Told { audience, at: "default/web-1", id: "7", grpc, version: Version::Http11 }
    }

    fn error() -> RequestError {
        RequestError::from(Cause::ConnectRefused).at(([10, 0, 0, 1], 80).into(), 2)
    }

    fn header(response: &Response) -> String {
        String::from_utf8(response.head.fields.get(Known::SheerReason).unwrap().to_vec()).unwrap()
    }

    #[test]
    fn meshed_callers_are_told_all_and_strangers_the_reason() {
        let full = response(&error(), &told(Audience::Mesh, false));
        assert_eq!(header(&full), "connect-refused; at=default/web-1; to=10.0.0.1:80; tries=2; id=7");
        assert_eq!(full.head.status, StatusCode::BAD_GATEWAY);
        let Body::Full(text) = full.body else { panic!("no text") };
        assert!(text.starts_with(b"sheer: connect-refused;"));
        let bare = response(&error(), &told(Audience::Public, false));
        assert_eq!(header(&bare), "connect-refused; id=7");
        let Body::Full(text) = bare.body else { panic!("no text") };
        assert_eq!(&text[..], b"sheer: connect-refused; id=7\n");
    }

    #[test]
    fn grpc_callers_get_a_status() {
        let answer = response(&error(), &told(Audience::Mesh, true));
        assert_eq!(answer.head.status, StatusCode::OK);
        assert_eq!(answer.head.fields.get(Known::GrpcStatus), Some(&b"14"[..]));
        assert!(answer.body.is_empty());
    }

    #[test]
    fn every_cause_says_what_and_what_next() {
        for cause in Cause::ALL {
            assert!(!what(*cause).is_empty() && next(*cause).ends_with('.'), "{cause}");
        }
    }
}

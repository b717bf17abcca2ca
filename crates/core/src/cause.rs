//! Why a request or connection failed.
//!
//! A [`Cause`] is chosen where the failure happens; the status, the gRPC code, the reason in header, log and metric, and
//! whether another attempt is safe all follow from it in exhaustive matches, so that they can never disagree.

use http::StatusCode;

/// Statuses that no RFC names.
trait Unregistered {
    /// What nginx writes down for a client that closed before it had its answer. Nobody is sent it.
    const CLIENT_CLOSED_REQUEST: StatusCode;
}

impl Unregistered for StatusCode {
    const CLIENT_CLOSED_REQUEST: StatusCode = match StatusCode::from_u16(499) {
        Ok(status) => status,
        Err(_) => StatusCode::BAD_REQUEST,
    };
}

/// Who is at fault, as far as the proxy can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The caller: malformed, too large, gone, not allowed.
    Client,
    /// The mesh: configuration, certificates, its own limits.
    Mesh,
    /// The application that should have answered.
    Upstream,
}

macro_rules! causes {
    ($($(#[$doc:meta])* $variant:ident => $reason:literal, $status:ident, $grpc:literal, $side:ident;)*) => {
        /// The cause of a failure. [`Cause::reason`] is its stable name.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Cause { $($(#[$doc])* $variant,)* }

        impl Cause {
            /// Every cause, for tables and tests.
            pub const ALL: &'static [Cause] = &[$(Cause::$variant,)*];

            /// The stable name used in `x-sheer-reason`, access log and metrics.
            pub const fn reason(self) -> &'static str {
                match self { $(Cause::$variant => $reason,)* }
            }

            /// The cause of this name.
            pub fn parse(reason: &str) -> Option<Cause> {
                match reason { $($reason => Some(Cause::$variant),)* _ => None }
            }

            /// The HTTP status that the caller sees, or would see where it has left.
            pub const fn status(self) -> StatusCode {
                match self { $(Cause::$variant => StatusCode::$status,)* }
            }

            /// The gRPC status code that a gRPC caller sees (canonical codes, google/rpc/code.proto).
            pub const fn grpc_status(self) -> u8 {
                match self { $(Cause::$variant => $grpc,)* }
            }

            /// Who is at fault.
            pub const fn side(self) -> Side {
                match self { $(Cause::$variant => Side::$side,)* }
            }
        }
    };
}

causes! {
    /// The request cannot be parsed or can be read in two ways.
    BadRequest => "bad-request", BAD_REQUEST, 13, Client;
    /// The head is larger than 60 KiB or has more than 100 fields.
    HeadTooLarge => "head-too-large", REQUEST_HEADER_FIELDS_TOO_LARGE, 8, Client;
    /// The head did not arrive in time.
    HeadTimeout => "head-timeout", REQUEST_TIMEOUT, 4, Client;
    /// A client whom nobody knows sent its request's body, or took its answer, too slowly.
    BodyTimeout => "body-timeout", REQUEST_TIMEOUT, 4, Client;
    /// The client closed or reset before the answer was complete. Neither a success nor anybody's failure.
    ClientGone => "client-gone", CLIENT_CLOSED_REQUEST, 1, Client;
    /// Plaintext, or TLS without a mesh certificate, arrived where only mesh peers are admitted.
    PlaintextRefused => "plaintext-refused", FORBIDDEN, 16, Client;
    /// The peer's certificate does not chain to a root of the mesh, or its key does not belong to it.
    PeerUntrusted => "peer-untrusted", BAD_GATEWAY, 16, Mesh;
    /// The peer's certificate, or one above it, has ended.
    PeerExpired => "peer-expired", BAD_GATEWAY, 16, Mesh;
    /// The peer's certificate, or one above it, begins later than now.
    PeerNotYetValid => "peer-not-yet-valid", BAD_GATEWAY, 16, Mesh;
    /// The peer's certificate is not that of one workload of this trust domain: its names, its usage, an authority's.
    PeerNoWorkload => "peer-no-workload", BAD_GATEWAY, 16, Mesh;
    /// The peer presented no certificate.
    PeerAnonymous => "peer-anonymous", BAD_GATEWAY, 16, Mesh;
    /// The peer did not accept this proxy's certificate.
    IdentityRefused => "identity-refused", BAD_GATEWAY, 16, Mesh;
    /// The peer asked for a port that the workload does not declare.
    PortNotDeclared => "port-not-declared", NOT_FOUND, 12, Client;
    /// The host name or address belongs to no service, and egress to it is not possible or not allowed.
    UnknownDestination => "unknown-destination", BAD_GATEWAY, 14, Client;
    /// The destination is one of the proxy's own ports, or an address that is never relayed to.
    DestinationForbidden => "destination-forbidden", FORBIDDEN, 7, Client;
    /// The service is known, but not this port of it.
    UnknownPort => "unknown-port", BAD_GATEWAY, 14, Client;
    /// Routes are attached to the service and none of their rules matches.
    NoRoute => "no-route", NOT_FOUND, 12, Mesh;
    /// The matching rule has no backend that exists.
    NoBackend => "no-backend", INTERNAL_SERVER_ERROR, 14, Mesh;
    /// The service has no endpoint for this port.
    NoEndpoint => "no-endpoint", SERVICE_UNAVAILABLE, 14, Mesh;
    /// The first use of a service needed the control plane, which did not answer within a second.
    ControlPlaneAway => "control-plane-away", SERVICE_UNAVAILABLE, 14, Mesh;
    /// The proxy is draining and has not processed the request.
    Draining => "draining", SERVICE_UNAVAILABLE, 14, Mesh;
    /// A limit of the proxy itself was reached.
    Overloaded => "overloaded", SERVICE_UNAVAILABLE, 8, Mesh;
    /// The request went in a circle through the mesh.
    Loop => "loop", LOOP_DETECTED, 9, Mesh;
    /// The proxy holds no valid certificate.
    NoIdentity => "no-identity", SERVICE_UNAVAILABLE, 14, Mesh;
    /// The endpoint is not one of the identities allowed for the service.
    IdentityMismatch => "identity-mismatch", BAD_GATEWAY, 16, Mesh;
    /// The TLS handshake with the endpoint failed.
    TlsFailed => "tls-failed", BAD_GATEWAY, 14, Mesh;
    /// The route's deadline passed.
    Deadline => "deadline", GATEWAY_TIMEOUT, 4, Mesh;
    /// Every endpoint tried refused the connection.
    ConnectRefused => "connect-refused", BAD_GATEWAY, 14, Upstream;
    /// No endpoint tried accepted the connection within the connect timeout.
    ConnectTimeout => "connect-timeout", BAD_GATEWAY, 14, Upstream;
    /// The endpoint could not be reached for another reason (no route to host, no descriptor, ...).
    ConnectFailed => "connect-failed", BAD_GATEWAY, 14, Upstream;
    /// The connection was reset or closed after the request had been sent and before a response head.
    UpstreamReset => "upstream-reset", BAD_GATEWAY, 14, Upstream;
    /// The response cannot be parsed or can be read in two ways.
    BadResponse => "bad-response", BAD_GATEWAY, 13, Upstream;
    /// The response broke off in its body.
    ResponseTruncated => "response-truncated", BAD_GATEWAY, 14, Upstream;
}

impl Cause {
    /// Whether a request that a caller's proxy failed for this cause never left the caller's host, so that it was neither
    /// encrypted nor in plaintext. No `_` arm: a new cause has to be judged.
    pub const fn before_sending(self) -> bool {
        match self {
            Cause::BadRequest
            | Cause::HeadTooLarge
            | Cause::HeadTimeout
            | Cause::UnknownDestination
            | Cause::DestinationForbidden
            | Cause::UnknownPort
            | Cause::NoRoute
            | Cause::NoBackend
            | Cause::NoEndpoint
            | Cause::ControlPlaneAway
            | Cause::Draining
            | Cause::Overloaded
            | Cause::Loop
            | Cause::NoIdentity
            | Cause::IdentityMismatch
            | Cause::PeerUntrusted
            | Cause::PeerExpired
            | Cause::PeerNotYetValid
            | Cause::PeerNoWorkload
            | Cause::PeerAnonymous
            | Cause::IdentityRefused
            | Cause::TlsFailed
            | Cause::ConnectRefused
            | Cause::ConnectTimeout
            | Cause::ConnectFailed => true,
            Cause::BodyTimeout
            | Cause::ClientGone
            | Cause::PlaintextRefused
            | Cause::PortNotDeclared
            | Cause::Deadline
            | Cause::UpstreamReset
            | Cause::BadResponse
            | Cause::ResponseTruncated => false,
        }
    }
}

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.reason())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_distinct_and_fit_a_header() {
        let mut seen = std::collections::HashSet::new();
        for cause in Cause::ALL {
            assert!(seen.insert(cause.reason()), "{cause} twice");
            assert_eq!(Cause::parse(cause.reason()), Some(*cause));
            assert!(cause.reason().bytes().all(|b| b.is_ascii_lowercase() || b == b'-'));
        }
    }

    #[test]
    fn a_client_that_left_is_told_apart_from_one_that_erred() {
        let status = |cause: Cause| cause.status().as_u16();
        assert_eq!((status(Cause::ClientGone), status(Cause::BadRequest)), (499, 400));
    }
}

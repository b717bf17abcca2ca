//! What people are shown of the mesh.

use sheer_core::wire::v1::Protocol;

/// A protocol's name, as in `--port PORT/NAME`.
pub fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Detect => "detect",
        Protocol::Http => "http",
        Protocol::Http2 => "http2",
        Protocol::Grpc => "grpc",
        Protocol::Tcp => "tcp",
        Protocol::Tls => "tls",
    }
}

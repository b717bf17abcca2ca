//! HTTP/1.0 and HTTP/1.1, both sides: strict heads, streamed bodies, pools of connections left to the caller.
//!
//! Who drives what, since everything here is polled and nothing is spawned:
//! - [`server::serve`] owns the client's connection and polls the service, then the response's body. While the
//!   request's body is incomplete only that body ([`Incoming`]) reads from the client; otherwise the loop reads, to
//!   notice a client that hangs up.
//! - [`client::Connection::send`] writes head and body and waits for the response head at the same time. The response
//!   may come first; then the rest of the upload is driven by the response's body: [`Incoming::poll_frame`] and
//!   [`Incoming::poll_progress`] send on before they look for bytes. So both directions flow as long as somebody polls
//!   the response, which the server loop does even while it waits to write.
//! - State shared by loop and request body is behind one `RefCell`, borrowed inside single polls, never across an
//!   await and never while a foreign body is polled.

pub(crate) mod buffer;
pub mod client;
pub(crate) mod decode;
pub(crate) mod encode;
mod half_closed;
pub mod pace;
pub(crate) mod parse;
pub mod server;

use bytes::BytesMut;
use std::task::{Context, Poll};

use crate::body::{BodyError, Frame, Length};
use crate::io::Io;

pub use half_closed::Namespaces;
pub use parse::Refusal;

/// A body that is still arriving over HTTP/1.
#[derive(Debug)]
pub enum Incoming {
    /// A request's, from a client.
    Request(server::Upload),
    /// A response's, from an endpoint.
    Response(client::Download),
}

impl Incoming {
    /// How many bytes remain.
    pub fn length(&self) -> Length {
        match self {
            Incoming::Request(body) => body.length(),
            Incoming::Response(body) => body.length(),
        }
    }

    /// The next part; `None` at the end.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        match self {
            Incoming::Request(body) => body.poll_frame(cx),
            Incoming::Response(body) => body.poll_frame(cx),
        }
    }

    /// Drives what this body's connection has to do besides: for a response, the rest of the request.
    pub fn poll_progress(&mut self, cx: &mut Context<'_>) {
        match self {
            Incoming::Request(_) => {}
            Incoming::Response(body) => body.poll_progress(cx),
        }
    }
}

/// A connection that speaks HTTP no longer.
#[derive(Debug)]
pub struct Upgraded {
    /// The connection.
    pub io: Io,
    /// What was already read from it.
    pub read: BytesMut,
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;

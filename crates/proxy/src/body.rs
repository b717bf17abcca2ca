//! Messages as the data path sees them, whatever protocol they came in: one request, one response, one body.
//!
//! Nothing here is `Send`: a message lives and dies inside one worker thread.

use bytes::Bytes;
use sheer_core::cause::Cause;
use sheer_core::head::{Fields, RequestHead, ResponseHead};
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll};

use crate::h1::{Incoming, Upgraded};

/// A request on its way.
#[derive(Debug)]
pub struct Request {
    /// What it asks for.
    pub head: RequestHead,
    /// What it carries.
    pub body: Body,
    /// Where interim answers (`100 Continue`, `103 Early Hints`) to it go.
    pub interim: Interim,
}

impl Request {
    /// A request whose interim answers nobody wants.
    pub fn new(head: RequestHead, body: Body) -> Self {
        Self { head, body, interim: Interim::default() }
    }
}

/// A response on its way.
#[derive(Debug)]
pub struct Response {
    /// What it says.
    pub head: ResponseHead,
    /// What it carries. The connection it comes from goes back to its pool when the body has ended.
    pub body: Body,
}

/// A part of a body.
#[derive(Debug)]
pub enum Frame {
    /// Some bytes, never none.
    Data(Bytes),
    /// The trailer fields. Nothing follows.
    Trailers(Fields),
}

/// How long a body will be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// So many bytes remain.
    Known(u64),
    /// As many as come.
    Unknown,
}

/// Why a body ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The sender closed the connection in the middle.
    #[error("the sender closed before the end of the body")]
    Truncated,
    /// The framing cannot be read.
    #[error("malformed body: {0}")]
    Malformed(&'static str),
    /// The sender reset the stream with this HTTP/2 error code.
    #[error("the sender reset the stream with HTTP/2 error code {0}")]
    Reset(u32),
    /// The connection failed.
    #[error("the connection failed while the body was read")]
    Io(#[from] io::Error),
}

impl BodyError {
    /// The sender was slower than it may be.
    pub fn too_slow() -> Self {
        BodyError::Io(io::ErrorKind::TimedOut.into())
    }

    /// Whether the sender was slower than it may be: what the system says of a connection has a number.
    pub fn is_too_slow(&self) -> bool {
        matches!(self, BodyError::Io(error) if error.kind() == io::ErrorKind::TimedOut && error.raw_os_error().is_none())
    }
}

/// A body, concrete and unboxed.
#[derive(Debug, Default)]
pub enum Body {
    /// No bytes.
    #[default]
    Empty,
    /// All bytes, already here.
    Full(Bytes),
    /// Arriving over HTTP/1.
    H1(Incoming),
    /// What arrives on an HTTP/2 stream.
    H2(crate::h2::Incoming),
    /// A request's, counted as it is read.
    Metered(Box<crate::record::Metered>),
    /// A response's, with the record that ends with it.
    Watched(Box<crate::record::Watched>),
}

impl Body {
    /// How many bytes remain.
    pub fn length(&self) -> Length {
        match self {
            Body::Empty => Length::Known(0),
            Body::Full(bytes) => Length::Known(bytes.len() as u64),
            Body::H1(body) => body.length(),
            Body::H2(incoming) => incoming.length(),
            Body::Metered(body) => body.length(),
            Body::Watched(body) => body.length(),
        }
    }

    /// True when neither bytes nor trailers will come.
    pub fn is_empty(&self) -> bool {
        match self {
            Body::Empty => true,
            Body::Full(bytes) => bytes.is_empty(),
            Body::H1(body) => body.length() == Length::Known(0),
            Body::H2(incoming) => incoming.is_empty(),
            Body::Metered(body) => body.is_empty(),
            Body::Watched(body) => body.is_empty(),
        }
    }

    /// The next part; `None` at the end. After an error nothing more comes.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        match self {
            Body::Empty => Poll::Ready(None),
            Body::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                *self = Body::Empty;
                Poll::Ready((!bytes.is_empty()).then_some(Ok(Frame::Data(bytes))))
            }
            Body::H1(body) => body.poll_frame(cx),
            Body::H2(body) => body.poll_frame(cx),
            Body::Metered(body) => body.poll_frame(cx),
            Body::Watched(body) => body.poll_frame(cx),
        }
    }

    /// Drives what the body's connection has to do besides bringing the next part, such as the rest of the request
    /// that a response answers. For a reader that cannot take a part now; [`Body::poll_frame`] does the same.
    pub fn poll_progress(&mut self, cx: &mut Context<'_>) {
        match self {
            Body::Empty | Body::Full(_) | Body::H2(_) => {}
            Body::H1(body) => body.poll_progress(cx),
            Body::Metered(body) => body.poll_progress(cx),
            Body::Watched(body) => body.poll_progress(cx),
        }
    }

    /// Writes down why a response's body is not read to its end, where it has a record.
    pub fn failed(&mut self, cause: Cause) {
        if let Body::Watched(body) = self {
            body.failed(cause);
        }
    }

    /// The raw connection behind a response that switched protocols (101).
    ///
    /// # Errors
    /// There was no switch: the body comes back.
    pub fn into_upgraded(self) -> Result<Upgraded, Self> {
        match self {
            Body::H1(Incoming::Response(body)) => {
                body.into_upgraded().map_err(|body| Body::H1(Incoming::Response(body)))
            }
            other => Err(other),
        }
    }

    /// The next part; `None` at the end. Cancel safe: a part is never lost.
    pub async fn frame(&mut self) -> Option<Result<Frame, BodyError>> {
        poll_fn(|cx| self.poll_frame(cx)).await
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        if bytes.is_empty() { Body::Empty } else { Body::Full(bytes) }
    }
}

/// Takes interim answers of one client connection.
pub trait InterimSink {
    /// Queues an interim answer (1xx, never 101) to be written before the final one.
    fn send(&self, head: ResponseHead);
}

/// The way back for interim answers. Cloning is cheap, so that each try of a request can hold it; the default drops them.
#[derive(Clone, Default)]
pub struct Interim(Way);

#[derive(Clone, Default)]
enum Way {
    #[default]
    None,
    Http1(Rc<dyn InterimSink>),
    Http2(crate::h2::Interims),
}

impl Interim {
    /// Answers go to this connection.
    pub fn to(sink: Rc<dyn InterimSink>) -> Self {
        Self(Way::Http1(sink))
    }

    /// Answers go to this stream.
    pub fn over_http2(stream: crate::h2::Interims) -> Self {
        Self(Way::Http2(stream))
    }

    /// The HTTP/2 stream on which answers are passed on, if it is one.
    pub(crate) fn over(&self) -> Option<&crate::h2::Interims> {
        match &self.0 {
            Way::Http2(stream) => Some(stream),
            Way::None | Way::Http1(_) => None,
        }
    }

    /// Passes an interim answer on.
    pub fn send(&self, head: ResponseHead) {
        match &self.0 {
            Way::None => {}
            Way::Http1(sink) => sink.send(head),
            Way::Http2(stream) => stream.send(&head),
        }
    }
}

impl fmt::Debug for Interim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if matches!(self.0, Way::None) { "Interim(none)" } else { "Interim" })
    }
}

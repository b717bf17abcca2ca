//! The side towards an endpoint: one request and its response over one connection.

use bytes::BytesMut;
use http::StatusCode;
use sheer_core::cause::Cause;
use sheer_core::head::{Known, RequestHead};
use sheer_core::identity::SpiffeId;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use super::decode::Decoder;
use super::encode::{self, SendFault, Sender};
use super::parse::{self, Framing, ParsedResponse, Refusal};
use super::{Incoming, Upgraded, buffer};
use crate::body::{Body, BodyError, Frame, Interim, Length, Response};
use crate::io::Io;
use crate::upstream::tls::Answered;

/// The most interim answers to one request.
const MAX_INTERIM: usize = 32;

/// Where a connection goes when its response has been read and it can serve another request.
pub trait Return {
    /// Takes the connection back. Called inside a poll: it must not block or poll anything itself.
    fn give_back(&self, connection: Connection);
}

/// A connection to an endpoint, between two requests. Holds no buffer.
#[derive(Debug)]
pub struct Connection(Box<Wire>);

struct Wire {
    io: Io,
    read: BytesMut,
    sender: Sender,
    decoder: Decoder,
    /// The upload broke off: the connection ends with this response.
    broken: bool,
    /// The endpoint keeps the connection open after this response.
    keep_alive: bool,
    /// Responses completed.
    served: u64,
    /// The connection now speaks another protocol.
    switched: bool,
    home: Option<Rc<dyn Return>>,
    answered: Option<Answered>,
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire").field("decoder", &self.decoder).field("served", &self.served).finish_non_exhaustive()
    }
}

/// How much of a request left the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// Not one byte: it was certainly not processed.
    Nothing,
    /// Some of it: it may have been processed.
    Some,
}

/// A request that got no response head, and the facts from which a retry is decided.
#[derive(Debug, thiserror::Error)]
#[error("{cause}")]
pub struct SendError {
    /// Who failed, and how.
    pub cause: Cause,
    /// How much of the request left.
    pub sent: Sent,
    /// The connection had served before and ended before any byte of this response: the endpoint most likely closed
    /// it for being idle while the request was under way.
    pub stale: bool,
    /// The request's body, when nothing of it was read.
    pub body: Option<Body>,
    /// What happened.
    #[source]
    pub source: SendFailure,
}

/// What happened to a request without a response.
#[derive(Debug, thiserror::Error)]
pub enum SendFailure {
    /// The endpoint closed.
    #[error("the endpoint closed the connection before it answered")]
    Closed,
    /// The connection failed.
    #[error("the connection to the endpoint failed")]
    Io(#[source] io::Error),
    /// The request's body could not be read to its end.
    #[error("the request's body broke off")]
    Body(#[source] BodyError),
    /// The request's body is longer or shorter than its head said.
    #[error("the request's body has another length than its head said")]
    Length,
    /// The response cannot be understood.
    #[error("the endpoint's answer cannot be understood")]
    Response(#[source] Refusal),
}

impl Connection {
    /// A new connection. Whatever was read from it before must not be lost: nothing may have been.
    pub fn new(io: Io) -> Self {
        Connection(Box::new(Wire {
            io,
            read: BytesMut::new(),
            sender: Sender::default(),
            decoder: Decoder::Done,
            broken: false,
            keep_alive: true,
            served: 0,
            switched: false,
            home: None,
            answered: None,
        }))
    }

    /// A new connection to a mesh peer, with who it is.
    pub fn to_peer(io: Io, answered: Option<Answered>) -> Self {
        let mut connection = Self::new(io);
        connection.0.answered = answered;
        connection
    }

    /// Whether whoever is at its other end is one of these.
    pub fn is_one_of(&mut self, identities: &Arc<[SpiffeId]>) -> bool {
        self.0.answered.as_mut().is_none_or(|answered| answered.is_one_of(identities))
    }

    /// The connection below.
    pub fn io(&self) -> &Io {
        &self.0.io
    }

    /// True when no request was answered over it yet.
    pub fn is_fresh(&self) -> bool {
        self.0.served == 0
    }

    /// True when the endpoint has neither closed nor said anything unasked. Does not wait.
    pub fn is_idle_and_open(&mut self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        let wire = &mut *self.0;
        wire.read.is_empty() && buffer::poll_fill(&mut wire.io, &mut wire.read, buffer::SMALL, &mut cx).is_pending()
    }

    /// Sends a request and waits for the head of its response. Interim answers are passed on as they come.
    ///
    /// The response's body owns the connection, sends what is left of the request, and hands the connection to `home`
    /// when all is done. A small response is complete at once: its connection is back before this returns.
    /// Dropping the future closes the connection.
    ///
    /// After [`StatusCode::SWITCHING_PROTOCOLS`] the body is to be taken apart with [`Body::into_upgraded`].
    ///
    /// # Errors
    /// No response head came, or one that cannot be read in one way only. The connection is closed.
    pub async fn send(
        self,
        head: &RequestHead,
        body: Body,
        interim: &Interim,
        home: Option<Rc<dyn Return>>,
    ) -> Result<Response, SendError> {
        let mut wire = self.0;
        wire.home = home;
        wire.broken = false;
        let encoding = encode::request(head, body.length(), wire.sender.out.small());
        wire.sender.out.written = 0;
        wire.sender.begin(body, encoding);
        let mut progress = Progress::default();
        let parsed = poll_fn(|cx| wire.poll_head(cx, head, interim, &mut progress)).await;
        match parsed {
            Ok(parsed) => Ok(respond(wire, parsed)),
            Err(source) => Err(wire.failed(source, &progress)),
        }
    }
}

/// What is known while a response head is awaited.
#[derive(Default)]
struct Progress {
    interim: usize,
    answered: bool,
    upload_fault: Option<io::Error>,
    /// Bytes of the head searched without finding its end.
    searched: usize,
}

impl Wire {
    fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        head: &RequestHead,
        interim: &Interim,
        progress: &mut Progress,
    ) -> Poll<Result<ParsedResponse, SendFailure>> {
        let upload = if self.broken { Poll::Pending } else { self.poll_upload(cx) };
        match upload {
            Poll::Ready(Ok(())) | Poll::Pending => {}
            // An endpoint that refuses an upload often answers and closes: look for the answer first.
            Poll::Ready(Err(SendFault::Io(error))) => {
                progress.upload_fault = Some(error);
                self.broken = true;
            }
            Poll::Ready(Err(SendFault::Body(error))) => return Poll::Ready(Err(SendFailure::Body(error))),
            Poll::Ready(Err(SendFault::Length)) => return Poll::Ready(Err(SendFailure::Length)),
        }
        loop {
            while !self.read.is_empty() && progress.is_worth_parsing(&self.read) {
                let parsed = parse::response(&mut self.read, &head.method).map_err(SendFailure::Response)?;
                let Some(parsed) = parsed else {
                    progress.searched = self.read.len();
                    break;
                };
                progress.answered = true;
                progress.searched = 0;
                let status = parsed.head.status;
                if status == StatusCode::SWITCHING_PROTOCOLS {
                    if head.fields.get(Known::Upgrade).is_none() {
                        return Poll::Ready(Err(SendFailure::Response(UNASKED_SWITCH)));
                    }
                    return Poll::Ready(Ok(parsed));
                }
                if !status.is_informational() {
                    return Poll::Ready(Ok(parsed));
                }
                progress.interim += 1;
                if progress.interim > MAX_INTERIM {
                    return Poll::Ready(Err(SendFailure::Response(TOO_MANY_INTERIM)));
                }
                interim.send(parsed.head);
            }
            match ready!(buffer::poll_fill(&mut self.io, &mut self.read, buffer::LARGE, cx)) {
                Ok(0) => {
                    // The last look says what it would have said, had all come at once.
                    parse::response(&mut self.read, &head.method).map_err(SendFailure::Response)?;
                    return Poll::Ready(Err(progress.upload_fault.take().map_or(SendFailure::Closed, SendFailure::Io)));
                }
                Ok(_) => {}
                Err(error) => return Poll::Ready(Err(SendFailure::Io(error))),
            }
        }
    }

    fn poll_upload(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SendFault>> {
        if self.sender.is_done() {
            return Poll::Ready(Ok(()));
        }
        let io = &mut self.io;
        self.sender.poll_send(cx, |out, cx| out.poll_flush(io, cx))
    }

    fn failed(mut self: Box<Self>, source: SendFailure, progress: &Progress) -> SendError {
        let silent = self.read.is_empty() && !progress.answered;
        // A failed write into TLS may have sent whole records before it failed.
        let uncertain = self.broken && self.io.is_tls();
        let sent = if self.sender.out.written == 0 && !uncertain { Sent::Nothing } else { Sent::Some };
        let stale = self.served > 0 && silent && matches!(source, SendFailure::Closed | SendFailure::Io(_));
        let cause = match &source {
            SendFailure::Closed | SendFailure::Io(_) if silent => Cause::UpstreamReset,
            SendFailure::Closed | SendFailure::Io(_) | SendFailure::Response(_) => Cause::BadResponse,
            SendFailure::Body(BodyError::Malformed(_)) | SendFailure::Length => Cause::BadRequest,
            SendFailure::Body(error) if error.is_too_slow() => Cause::BodyTimeout,
            SendFailure::Body(_) => Cause::ClientGone,
        };
        let body = self.sender.stop_untouched();
        SendError { cause, sent, stale, body, source }
    }

    /// The response is complete: the connection goes home, or ends.
    fn release(mut self: Box<Self>) {
        let home = self.home.take();
        buffer::give_back(&mut self.read);
        let reusable = self.keep_alive && !self.broken && self.sender.is_done() && self.read.is_empty();
        if let Some(home) = home.filter(|_| reusable) {
            self.served += 1;
            home.give_back(Connection(self));
        }
    }
}

const UNASKED_SWITCH: Refusal = Refusal {
    cause: Cause::BadResponse,
    status: StatusCode::BAD_GATEWAY,
    detail: "the protocol was switched without having been asked for",
};

const TOO_MANY_INTERIM: Refusal =
    Refusal { cause: Cause::BadResponse, status: StatusCode::BAD_GATEWAY, detail: "more than 32 interim responses" };

impl Progress {
    /// A head is parsed again only when another line has arrived, so that byte by byte it costs no more than whole.
    fn is_worth_parsing(&self, read: &[u8]) -> bool {
        self.searched == 0 || memchr::memchr(b'\n', read.get(self.searched..).unwrap_or_default()).is_some()
    }
}

fn respond(mut wire: Box<Wire>, parsed: ParsedResponse) -> Response {
    let ParsedResponse { head, framing, keep_alive } = parsed;
    wire.keep_alive = keep_alive;
    let body = match framing {
        _ if head.status == StatusCode::SWITCHING_PROTOCOLS => {
            wire.switched = true;
            Body::H1(Incoming::Response(Download { wire: Some(wire) }))
        }
        Framing::None => {
            wire.release();
            Body::Empty
        }
        Framing::Length(length) if length <= wire.read.len() as u64 => {
            let bytes = wire.read.split_to(length as usize).freeze();
            wire.release();
            Body::Full(bytes)
        }
        Framing::Length(length) => wire.stream(Decoder::length(length)),
        Framing::Chunked => wire.stream(Decoder::chunked()),
        Framing::UntilClose => wire.stream(Decoder::UntilClose),
    };
    Response { head, body }
}

impl Wire {
    fn stream(mut self: Box<Self>, decoder: Decoder) -> Body {
        self.decoder = decoder;
        Body::H1(Incoming::Response(Download { wire: Some(self) }))
    }
}

/// A response's body, which owns the connection until it ends. Dropped before its end, it closes the connection.
#[derive(Debug)]
pub struct Download {
    wire: Option<Box<Wire>>,
}

impl Download {
    /// How many bytes remain.
    pub fn length(&self) -> Length {
        self.wire.as_ref().map_or(Length::Known(0), |wire| wire.decoder.remaining())
    }

    /// The next part; `None` at the end. Sends what is left of the request as well.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        self.poll_progress(cx);
        let Some(wire) = self.wire.as_mut().filter(|wire| !wire.switched) else { return Poll::Ready(None) };
        loop {
            match wire.decoder.decode(&mut wire.read) {
                Ok(frame) => {
                    if wire.decoder.is_done() {
                        self.wire.take().into_iter().for_each(|wire| wire.release());
                        return Poll::Ready(frame.map(Ok));
                    }
                    if let Some(frame) = frame {
                        return Poll::Ready(Some(Ok(frame)));
                    }
                }
                Err(detail) => return self.fail(BodyError::Malformed(detail)),
            }
            match ready!(buffer::poll_fill(&mut wire.io, &mut wire.read, buffer::LARGE, cx)) {
                Ok(0) if wire.decoder.ends_with_connection() => {
                    self.wire = None;
                    return Poll::Ready(None);
                }
                Ok(0) => return self.fail(BodyError::Truncated),
                Ok(_) => {}
                Err(error) => return self.fail(BodyError::Io(error)),
            }
        }
    }

    /// Sends what is left of the request.
    pub fn poll_progress(&mut self, cx: &mut Context<'_>) {
        let Some(wire) = self.wire.as_mut().filter(|wire| !wire.broken && !wire.sender.is_done()) else { return };
        if let Poll::Ready(Err(_)) = wire.poll_upload(cx) {
            // The endpoint's answer still counts; only the connection is of no further use.
            wire.broken = true;
            wire.sender.stop();
        }
    }

    fn fail(&mut self, error: BodyError) -> Poll<Option<Result<Frame, BodyError>>> {
        self.wire = None;
        Poll::Ready(Some(Err(error)))
    }

    /// The raw connection after a switch of protocols; the body itself when there was none.
    ///
    /// # Errors
    /// There was no switch: the body comes back.
    pub(crate) fn into_upgraded(mut self) -> Result<Upgraded, Self> {
        match self.wire.take() {
            Some(wire) if wire.switched => Ok(Upgraded { io: wire.io, read: wire.read }),
            wire => {
                self.wire = wire;
                Err(self)
            }
        }
    }
}

#[cfg(test)]
mod tests;

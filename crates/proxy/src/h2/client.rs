//! One connection to an endpoint over HTTP/2, shared by the requests of one worker.

use super::incoming::AbortOnDrop;
use super::server::body_of;
use super::{
    CONNECTION_WINDOW, MAX_ERROR_RESETS, MAX_PENDING_RESETS, PING_INTERVAL, Pinger, SEND_BUFFER, STREAM_WINDOW,
    convert, pump,
};
use crate::body::{Body, Response};
use crate::io::Io;
use bytes::Bytes;
use h2::Reason;
use h2::client::{ResponseFuture, SendRequest};
use sheer_core::cause::Cause;
use sheer_core::head::{MAX_HEAD_BYTES, RequestHead};
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use tokio::sync::Notify;

/// A connection that carries many requests at once. Cheap to clone; it closes when the last clone and the last stream
/// are gone.
#[derive(Clone)]
pub struct Connection {
    /// Never waits for room: one that would is replaced by a clone, which does not. Shared, since cloning it takes the
    /// connection's lock twice.
    sender: Rc<RefCell<SendRequest<Bytes>>>,
    load: Rc<Load>,
}

#[derive(Debug, Default)]
struct Load {
    streams: Cell<usize>,
    closed: Cell<bool>,
    began: Notify,
}

/// A request in flight on a connection.
#[derive(Debug)]
pub(super) struct StreamPermit(Rc<Load>);

impl StreamPermit {
    fn new(load: &Rc<Load>) -> Self {
        let before = load.streams.replace(load.streams.get() + 1);
        if before == 0 {
            load.began.notify_one();
        }
        Self(load.clone())
    }
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get() - 1);
    }
}

/// A request that got no response head.
#[derive(Debug)]
pub struct SendError {
    /// What happened.
    pub cause: Cause,
    /// True when the other side has provably not processed it: it never left, or was refused.
    pub unprocessed: bool,
    /// The request's body, when nothing of it was lost.
    pub body: Option<Body>,
    /// The crate's own account.
    pub source: Option<h2::Error>,
}

impl Connection {
    /// Begins HTTP/2 on a connection. The connection's own work is a task of this worker.
    ///
    /// # Errors
    /// When the connection breaks at once.
    pub async fn start(io: Io) -> Result<Self, h2::Error> {
        let (sender, mut connection) = builder().handshake::<_, Bytes>(io).await?;
        let load = Rc::new(Load::default());
        let shared = load.clone();
        tokio::task::spawn_local(async move {
            let mut pinger = Pinger::new(connection.ping_pong());
            // One timer for the connection's life: while nothing is open it may fire late, and once.
            let mut beat = std::pin::pin!(tokio::time::sleep(PING_INTERVAL));
            loop {
                let busy = shared.streams.get() > 0;
                tokio::select! {
                    biased;
                    _ = &mut connection => break,
                    () = &mut beat, if busy => {
                        if !pinger.beat() {
                            break;
                        }
                        beat.as_mut().reset(tokio::time::Instant::now() + PING_INTERVAL);
                    }
                    () = shared.began.notified(), if !busy => {}
                }
            }
            shared.closed.set(true);
        });
        Ok(Self { sender: Rc::new(RefCell::new(sender)), load })
    }

    /// True when new requests may be sent: it is open and the other side has not said that it is leaving.
    pub fn is_open(&self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        !self.load.closed.get() && !matches!(self.sender.borrow_mut().poll_ready(&mut cx), Poll::Ready(Err(_)))
    }

    /// Requests in flight.
    pub fn streams(&self) -> usize {
        self.load.streams.get()
    }

    /// Sends a request and waits for the response's head. Dropping the future, or the response's body before its end,
    /// resets the stream. The head keeps its fields where an error can give the body back.
    ///
    /// # Errors
    /// [`SendError`] when no response head came.
    pub async fn send(&self, head: &mut RequestHead, body: Body) -> Result<Response, SendError> {
        let Begun { permit, spare, response, mut pump } = self.begin(head, body)?;
        // A small body has come with its head, as a rule: it goes on at once. What is left is a task's.
        if let Some(sending) = &mut pump
            && poll_fn(|cx| Poll::Ready(sending.as_mut().poll(cx).is_ready())).await
        {
            pump = None;
        }
        let pump = pump.map(|pump| AbortOnDrop(tokio::task::spawn_local(pump).abort_handle()));
        let (parts, stream) = match response.await {
            Ok(response) => response.into_parts(),
            Err(error) => {
                let unprocessed = is_unprocessed(&error);
                let cause = cause_of(&error);
                return Err(SendError { cause, unprocessed, body: spare, source: Some(error) });
            }
        };
        let body = match body_of(stream, &parts.headers) {
            Body::H2(incoming) => Body::H2(incoming.answering(pump, permit)),
            other => other,
        };
        let head = convert::response_of(parts).map_err(|_| SendError {
            cause: Cause::BadResponse,
            unprocessed: false,
            body: None,
            source: None,
        })?;
        Ok(Response { head, body })
    }

    /// Apart from [`Connection::send`], whose future would hold what is borrowed here to its end.
    fn begin(&self, head: &mut RequestHead, body: Body) -> Result<Begun, SendError> {
        let permit = StreamPermit::new(&self.load);
        let spare = spare(&body);
        let Ok(head) = convert::to_request(head, spare.is_some()) else {
            return Err(SendError { cause: Cause::BadRequest, unprocessed: true, body: None, source: None });
        };
        let ends = body.is_known_empty();
        let sent = {
            let mut sender = self.sender.borrow_mut();
            let sent = sender.send_request(head, ends);
            // Nothing else waits for the new stream yet, so that asking in nobody's name takes no one's place.
            if sender.poll_ready(&mut Context::from_waker(Waker::noop())).is_pending() {
                let unhindered = sender.clone();
                *sender = unhindered;
            }
            sent
        };
        let (response, mut stream) = match sent {
            Ok(sent) => sent,
            // Whoever sends has just seen that the connection is open. What of the head was moved is gone with the body.
            Err(error) => return Err(SendError { body: spare, ..unsent(error) }),
        };
        let pump = (!ends).then(|| {
            let pump = async move {
                // What went wrong is seen on the response.
                let _ = pump::send(&mut stream, body, Reason::CANCEL).await;
            };
            Box::pin(pump) as Pin<Box<dyn Future<Output = ()>>>
        });
        Ok(Begun { permit, spare, response, pump })
    }
}

/// A request whose head is on its way.
struct Begun {
    permit: StreamPermit,
    spare: Option<Body>,
    response: ResponseFuture,
    pump: Option<Pin<Box<dyn Future<Output = ()>>>>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("load", &self.load).finish_non_exhaustive()
    }
}

fn builder() -> h2::client::Builder {
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(MAX_HEAD_BYTES as u32)
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        .max_local_error_reset_streams(Some(MAX_ERROR_RESETS))
        .max_send_buffer_size(SEND_BUFFER)
        .enable_push(false);
    builder
}

fn unsent(error: h2::Error) -> SendError {
    SendError { cause: cause_of(&error), unprocessed: true, body: None, source: Some(error) }
}

/// A second copy of a body that is here as a whole.
fn spare(body: &Body) -> Option<Body> {
    match body {
        Body::Empty => Some(Body::Empty),
        Body::Full(bytes) => Some(Body::Full(bytes.clone())),
        _ => None,
    }
}

/// True when the other side said that it has not looked at the request: REFUSED_STREAM, or a GOAWAY whose last stream
/// comes before (RFC 9113, section 8.7). The crate fails exactly those streams with the GOAWAY.
fn is_unprocessed(error: &h2::Error) -> bool {
    error.is_remote() && (error.is_go_away() || error.reason() == Some(Reason::REFUSED_STREAM))
}

fn cause_of(error: &h2::Error) -> Cause {
    if error.is_library() || error.reason() == Some(Reason::PROTOCOL_ERROR) && !error.is_remote() {
        return Cause::BadResponse;
    }
    Cause::UpstreamReset
}

//! One connection to an endpoint over HTTP/2, shared by the requests of one worker.

use super::connection::{Role, State};
use super::driver::Driver;
use super::incoming::AbortOnDrop;
use super::pump::Pump;
use super::stream::{By, Handle, Reset, Shared};
use super::{Code, Error, Incoming, Interims};
use crate::body::{Body, Interim, Response};
use crate::io::Io;
use sheer_core::cause::Cause;
use sheer_core::head::{RequestHead, ResponseHead};
use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll};

/// A connection that carries many requests at once. Cheap to clone; it closes when the last clone and the last stream
/// are gone.
#[derive(Clone, Debug)]
pub struct Connection(Rc<Owned>);

/// The state, for as long as somebody may ask for a stream.
#[derive(Debug)]
struct Owned(Shared);

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.borrow_mut().abandon();
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
    /// In other words.
    pub source: Option<Error>,
}

impl Connection {
    /// Begins HTTP/2 on a connection. The connection's own work is a task of this worker.
    pub fn start(io: Io) -> Self {
        let shared = Rc::new(RefCell::new(State::new(Role::Client)));
        let driver = Driver::of_client(shared.clone(), io);
        tokio::task::spawn_local(drive(driver, shared.clone()));
        Self(Rc::new(Owned(shared)))
    }

    /// True when new requests may be sent: it is open and the other side has not said that it is leaving.
    pub fn is_open(&self) -> bool {
        self.0.0.borrow().is_open()
    }

    /// Requests in flight.
    pub fn streams(&self) -> usize {
        self.0.0.borrow().streams()
    }

    /// Bytes of answers that wait for their readers.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.0.0.borrow().waiting()
    }

    /// Sends a request and waits for the response's head; interim ones are passed on as they come. Dropping the future,
    /// or the response's body before its end, resets the stream.
    ///
    /// # Errors
    /// [`SendError`] when no response head came.
    pub async fn send(&self, head: &RequestHead, body: Body, interim: &Interim) -> Result<Response, SendError> {
        let spare = spare(&body);
        let reader = interim.over().map(Interims::stream);
        let unsent =
            |body| SendError { cause: Cause::UpstreamReset, unprocessed: true, body, source: Some(Error::Closed) };
        if !self.0.0.borrow().has_slot() {
            self.slot().await;
        }
        let stream = {
            let mut state = self.0.0.borrow_mut();
            if !state.is_open() {
                return Err(unsent(spare));
            }
            let key = state.open(head, body.is_empty(), reader);
            drop(state);
            Waiting(Handle::new(&self.0.0, key))
        };
        let mut sender = None;
        if !body.is_empty() {
            let mut pump = Pump::new(stream.0.clone(), body, Code::CANCEL);
            // A small body has come with its head, as a rule: it goes on at once. What is left is a task's.
            if poll_fn(|cx| Poll::Ready(pump.poll(cx).is_pending())).await {
                let task = tokio::task::spawn_local(async move { poll_fn(|cx| pump.poll(cx)).await });
                sender = Some(AbortOnDrop(task.abort_handle()));
            }
        }
        match poll_fn(|cx| stream.poll_head(interim, cx)).await {
            Ok(head) => {
                let is_whole = stream.0.with(|state, key| state.look_ahead(key, reader));
                let reader = reader.filter(|_| !is_whole).cloned();
                let incoming = Incoming::of_answer(stream.0.clone(), reader, sender);
                let body = if incoming.is_empty() { Body::Empty } else { Body::H2(incoming) };
                Ok(Response { head, body })
            }
            Err(reset) => {
                let (cause, unprocessed) = judge(reset);
                Err(SendError { cause, unprocessed, body: spare, source: Some(source_of(reset)) })
            }
        }
    }

    /// Waits until the peer admits another stream, or none any more.
    async fn slot(&self) {
        let slots = self.0.0.borrow().slots();
        loop {
            let told = slots.notified();
            {
                let state = self.0.0.borrow();
                if state.has_slot() || !state.is_open() {
                    return;
                }
            }
            told.await;
        }
    }
}

/// A stream whose response has not come. Nobody wants it any more when this is dropped before.
struct Waiting(Handle);

impl Waiting {
    fn poll_head(&self, interim: &Interim, cx: &Context<'_>) -> Poll<Result<ResponseHead, Reset>> {
        let (early, head) = self.0.with(|state, key| {
            let stream = state.stream(key);
            let head = match (stream.receiving.head.take(), stream.reset) {
                (Some(head), _) => Poll::Ready(Ok(head)),
                (None, Some(reset)) => Poll::Ready(Err(reset)),
                (None, None) => {
                    stream.receiving.wait(cx);
                    Poll::Pending
                }
            };
            (std::mem::take(&mut stream.receiving.interim), head)
        });
        early.into_iter().for_each(|head| interim.send(head));
        head
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.with(|state, key| {
            if !state.stream(key).receiving.has_head {
                state.reset(key, Code::CANCEL);
            }
        });
    }
}

async fn drive(mut driver: Driver, shared: Shared) {
    // Nobody asks anything of a client: it returns when the connection is over.
    if let Err(error) = poll_fn(|cx| driver.poll(cx)).await {
        tracing::debug!(%error, "an HTTP/2 connection to an endpoint broke");
    }
    shared.borrow_mut().close(&Error::Closed);
    driver.finish().await;
}

/// A second copy of a body that is here as a whole.
fn spare(body: &Body) -> Option<Body> {
    match body {
        Body::Empty => Some(Body::Empty),
        Body::Full(bytes) => Some(Body::Full(bytes.clone())),
        _ => None,
    }
}

/// What a stream's end says about its request. REFUSED_STREAM, or a GOAWAY whose last stream comes before, says that the
/// other side has not looked at it (RFC 9113, section 8.7).
fn judge(reset: Reset) -> (Cause, bool) {
    match reset.by {
        By::Unprocessed => (Cause::UpstreamReset, true),
        By::Peer => (Cause::UpstreamReset, reset.code == Code::REFUSED_STREAM),
        By::Us => (Cause::BadResponse, false),
        By::Source => (Cause::ClientGone, false),
        By::Slow => (Cause::BodyTimeout, false),
        By::Connection if reset.code == Code::NO_ERROR => (Cause::UpstreamReset, false),
        By::Connection => (Cause::BadResponse, false),
    }
}

fn source_of(reset: Reset) -> Error {
    match reset.by {
        By::Peer | By::Unprocessed => Error::Ended(reset.code),
        By::Us => Error::Protocol { code: reset.code, detail: "its response is malformed" },
        By::Source | By::Slow => Error::Source,
        By::Connection => Error::Closed,
    }
}

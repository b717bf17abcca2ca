//! One client connection over HTTP/2.

use super::connection::{Accepted, Role, State};
use super::driver::{Driver, Event};
use super::head::Refused;
use super::pump::Pump;
use super::stream::{Handle, Shared};
use super::{Code, Error, Incoming};
use crate::body::{Body, Interim, Request, Response};
use crate::drain;
use crate::h1::pace::Pace;
use crate::idle::Idler;
use crate::io::Io;
use bytes::BytesMut;
use http::StatusCode;
use sheer_core::cause::Cause;
use sheer_core::head::{Known, ResponseHead, Version};
use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::Instant;

/// How long a client may take to say its preface and its first frame.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// For how long a connection without a stream is kept, as HTTP/1 does: its end is announced between this and twice this
/// time after its last stream.
const IDLE: Duration = Duration::from_secs(60 * 60);

/// What a connection is to be like.
#[derive(Debug, Default)]
pub struct Options {
    /// The pace of a client whom nobody knows; without, it is one of the mesh.
    pub pace: Option<Pace>,
    /// Its place among those that end when there is no room.
    pub idler: Option<Idler>,
}

/// Serves one client connection: each request in a task of its own, which ends when the client resets the stream. When
/// draining begins the client gets a GOAWAY and the connection ends with its last stream. A service that has no response
/// gives none, and the stream is reset. `refused` is told of requests that could not be read.
///
/// # Errors
/// When the connection breaks, or the client breaks the protocol.
pub async fn serve<S, R>(
    io: Io,
    prefix: BytesMut,
    options: Options,
    drain: drain::Watch,
    refused: R,
    service: S,
) -> Result<(), Error>
where
    S: AsyncFn(Request) -> Option<Response> + 'static,
    R: Fn(Cause),
{
    let shared = Rc::new(RefCell::new(State::new(Role::Server)));
    shared.borrow_mut().keep_pace(options.pace);
    let mut driver = Driver::of_server(shared.clone(), io, prefix);
    let served = run(&mut driver, &shared, options.idler, drain, &refused, Rc::new(service)).await;
    if let Err(error) = &served {
        shared.borrow_mut().close(error);
        // What came in one read with the connection's end counts as well, where it was to be refused.
        take_refused(&shared, &refused);
    }
    driver.finish().await;
    served
}

async fn run<S, R>(
    driver: &mut Driver,
    shared: &Shared,
    idler: Option<Idler>,
    mut drain: drain::Watch,
    refused: &R,
    service: Rc<S>,
) -> Result<(), Error>
where
    S: AsyncFn(Request) -> Option<Response> + 'static,
    R: Fn(Cause),
{
    // Who comes while the proxy is leaving is served for as long as others are.
    let leave_at = if drain.is_told() { drain::Phase::Refusing } else { drain::Phase::Told };
    let mut told = false;
    let mut leaving = pin!(drain.reached(leave_at));
    // One timer for the connection's life: first the client's greeting is waited for, then its next request.
    let mut due = pin!(tokio::time::sleep(HANDSHAKE_TIMEOUT));
    let mut greeted = false;
    let mut quiet = false;
    let mut idle_since = None;
    loop {
        // Dropping the losing arm is safe: the driver keeps its state.
        tokio::select! {
            biased;
            event = poll_fn(|cx| {
                let event = driver.poll(cx);
                if let (Poll::Pending, Some(idler)) = (&event, &idler) {
                    make_room(&mut shared.borrow_mut(), idler, &mut idle_since, cx);
                }
                event
            }) => {
                let event = event?;
                quiet = false;
                take_requests(shared, refused, &service);
                if event == Event::Done {
                    return Ok(());
                }
            }
            () = &mut leaving, if !told => {
                told = true;
                shared.borrow_mut().leave();
            }
            () = &mut due => {
                let mut state = shared.borrow_mut();
                if !std::mem::replace(&mut greeted, true) && !state.is_greeted() {
                    return Err(Error::Protocol { code: Code::SETTINGS_TIMEOUT, detail: "no greeting in time" });
                }
                let busy = state.streams() > 0;
                // Nothing was asked since the last time: a request on its way now is sent again by its client.
                if quiet && !busy {
                    state.leave_idle();
                }
                quiet = !busy;
                due.as_mut().reset(Instant::now() + IDLE);
            }
        }
    }
}

/// Ends the connection when nobody uses it and there is no room for another.
fn make_room(state: &mut State, idler: &Idler, idle_since: &mut Option<Instant>, cx: &mut Context<'_>) {
    if state.streams() > 0 || !state.is_greeted() {
        if idle_since.take().is_some() {
            idler.works();
        }
        return;
    }
    let since = *idle_since.get_or_insert_with(Instant::now);
    if idler.poll_leave(cx, since).is_ready() {
        state.leave_idle();
    }
}

/// Serves the requests that have come.
fn take_requests<S, R>(shared: &Shared, refused: &R, service: &Rc<S>)
where
    S: AsyncFn(Request) -> Option<Response> + 'static,
    R: Fn(Cause),
{
    take_malformed(shared, refused);
    loop {
        let next = shared.borrow_mut().accepted.pop_front();
        let Some(Accepted { key, head, ended }) = next else { return };
        let stream = Handle::new(shared, key);
        if stream.with(|state, key| state.stream(key).reset.is_some()) {
            continue; // Its client did not wait: nothing is begun for it.
        }
        match head {
            Ok(head) => {
                let body = if ended { Body::Empty } else { Body::H2(Incoming::of_request(stream.clone())) };
                let interim = Interim::over_http2(Interims(stream.clone()));
                // Boxed, since a task moves its future about as a whole.
                let answer = answer(Request { head, body, interim }, stream, service.clone());
                tokio::task::spawn_local(Box::pin(answer));
            }
            Err(Refused::Connect) => {
                refused(Cause::BadRequest);
                refuse(&stream, StatusCode::METHOD_NOT_ALLOWED, Cause::BadRequest);
            }
            Err(Refused::TooLarge) => {
                refused(Cause::HeadTooLarge);
                refuse(&stream, Cause::HeadTooLarge.status(), Cause::HeadTooLarge);
            }
            Err(Refused::Malformed(_)) => stream.reset(Code::PROTOCOL_ERROR),
        }
    }
}

/// Counts the requests that could not be read.
fn take_malformed<R: Fn(Cause)>(shared: &Shared, refused: &R) {
    let malformed = std::mem::take(&mut shared.borrow_mut().malformed);
    (0..malformed).for_each(|_| refused(Cause::BadRequest));
}

/// Counts the requests to be refused on a connection that is over. Those that would have been served were not begun.
fn take_refused<R: Fn(Cause)>(shared: &Shared, refused: &R) {
    take_malformed(shared, refused);
    let left = std::mem::take(&mut shared.borrow_mut().accepted);
    for accepted in left {
        match accepted.head {
            Err(Refused::Connect) => refused(Cause::BadRequest),
            Err(Refused::TooLarge) => refused(Cause::HeadTooLarge),
            Ok(_) | Err(Refused::Malformed(_)) => {}
        }
    }
}

/// Answers one request.
async fn answer<S>(request: Request, stream: Handle, service: Rc<S>)
where
    S: AsyncFn(Request) -> Option<Response>,
{
    let answer = tokio::select! {
        biased;
        answer = service(request) => answer,
        // The client has cancelled, or is gone: whatever was done for it ends here, the request upstream included.
        () = poll_fn(|cx| stream.poll_closed(cx)) => return,
    };
    match answer {
        // Nothing switches protocols in HTTP/2 (RFC 9113, section 8.6).
        Some(response) if response.head.status != StatusCode::SWITCHING_PROTOCOLS => send(response, stream).await,
        _ => stream.reset(Code::INTERNAL_ERROR),
    }
}

fn refuse(stream: &Handle, status: StatusCode, cause: Cause) {
    let mut head = ResponseHead { version: Version::Http2, ..ResponseHead::new(status) };
    // One field fits.
    let _ = head.fields.append(Known::SheerReason.as_str(), cause.reason().as_bytes());
    // Fails only when the client is gone.
    let _ = stream.respond(&head, true);
}

async fn send(response: Response, stream: Handle) {
    let Response { head, body } = response;
    let ends = body.is_empty();
    if stream.respond(&head, ends).is_ok() && !ends {
        // Who broke off is known to the body's owner, which counts it.
        let mut pump = Pump::new(stream, body, Code::INTERNAL_ERROR);
        poll_fn(|cx| pump.poll(cx)).await;
    }
}

/// The way back for interim answers to one request.
#[derive(Clone, Debug)]
pub struct Interims(Handle);

impl Interims {
    /// Sends an interim answer before the final one.
    pub(crate) fn send(&self, head: &ResponseHead) {
        self.0.with(|state, key| state.respond_interim(key, head));
    }

    /// The stream on which the answer is passed on.
    pub(super) fn stream(&self) -> &Handle {
        &self.0
    }
}

#[cfg(test)]
mod tests;

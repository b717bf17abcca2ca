//! One client connection over HTTP/2.

use super::{
    CONNECTION_WINDOW, Incoming, MAX_ERROR_RESETS, MAX_PENDING_RESETS, MAX_STREAMS, PING_INTERVAL, Pinger, SEND_BUFFER,
    STREAM_WINDOW, convert, pump,
};
use crate::body::{Body, Interim, Request, Response};
use crate::drain;
use crate::io::Io;
use bytes::{Buf, Bytes, BytesMut};
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::StatusCode;
use sheer_core::cause::Cause;
use sheer_core::head::{MAX_HEAD_BYTES, ResponseHead};
use std::cell::Cell;
use std::future::poll_fn;
use std::io::IoSlice;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// How long a client may take to say its preface.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// For how long a connection without a stream is kept, as HTTP/1 does: its end is announced between this and twice this
/// time after its last stream.
const IDLE: Duration = Duration::from_secs(60 * 60);

/// Serves one client connection: each request in a task of its own, which ends when the client resets the stream. When
/// draining begins the client gets a GOAWAY and the connection ends with its last stream. A service that has no response
/// gives none, and the stream is reset. `refused` is told of requests that could not be read.
///
/// # Errors
/// When the connection breaks, or the client breaks the protocol.
pub async fn serve<S, R>(
    io: Io,
    prefix: BytesMut,
    mut drain: drain::Watch,
    refused: R,
    service: S,
) -> Result<(), h2::Error>
where
    S: AsyncFn(Request) -> Option<Response> + 'static,
    R: Fn(Cause),
{
    let reading = Rc::new(Cell::new(Reading::Always));
    let io = Prefixed { prefix: prefix.freeze(), io, reading: reading.clone() };
    let handshake = builder().handshake::<_, Bytes>(io);
    // A client that never says its preface would hold its connection for ever.
    let greeted = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await;
    let mut connection = greeted.unwrap_or_else(|_| Err(Reason::SETTINGS_TIMEOUT.into()))?;
    reading.set(Reading::UntilEmpty);
    let service = Rc::new(service);
    let mut pinger = Pinger::new(connection.ping_pong());
    // Who comes while the proxy is leaving is served for as long as others are.
    let leave_at = if drain.is_told() { drain::Phase::Refusing } else { drain::Phase::Told };
    let mut told = false;
    let mut leaving = pin!(drain.reached(leave_at));
    // One timer for the connection's life: while nothing is open it fires once, and then not before the next request.
    let mut beat = pin!(tokio::time::sleep(PING_INTERVAL));
    let mut beats = true;
    let mut idle = pin!(tokio::time::sleep(IDLE));
    let mut quiet = false;
    loop {
        // Dropping the losing arm is safe: accepting keeps its state in the connection.
        tokio::select! {
            biased;
            accepted = poll_fn(|cx| accept(&mut connection, &reading, cx)) => match accepted {
                Some(stream) => {
                    quiet = false;
                    let (request, mut respond) = stream?;
                    if !std::mem::replace(&mut beats, true) {
                        beat.as_mut().reset(tokio::time::Instant::now() + PING_INTERVAL);
                    }
                    if let Some(request) = read(request, &mut respond, &refused) {
                        // Boxed, since a task moves its future about as a whole.
                        tokio::task::spawn_local(Box::pin(answer(request, respond, service.clone())));
                    }
                }
                None => return Ok(()),
            },
            () = &mut leaving, if !told => {
                told = true;
                connection.graceful_shutdown();
            }
            () = &mut idle, if !told => {
                let busy = connection.has_streams();
                // Nothing was asked since the last time: a request on its way now is sent again by its client.
                if quiet && !busy {
                    told = true;
                    connection.graceful_shutdown();
                }
                quiet = !busy;
                idle.as_mut().reset(tokio::time::Instant::now() + IDLE);
            }
            () = &mut beat, if beats => {
                beats = connection.has_streams();
                if beats {
                    if !pinger.beat() {
                        connection.abrupt_shutdown(Reason::NO_ERROR);
                        return Ok(());
                    }
                    beat.as_mut().reset(tokio::time::Instant::now() + PING_INTERVAL);
                }
            }
        }
    }
}

/// A request and the way to answer it.
type Asked = (http::Request<RecvStream>, SendResponse<Bytes>);

/// The next request. The crate goes over the whole connection for each one; that the socket is empty it learns once.
fn accept(
    connection: &mut h2::server::Connection<Prefixed, Bytes>,
    reading: &Cell<Reading>,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<Asked, h2::Error>>> {
    let accepted = connection.poll_accept(cx);
    if accepted.is_pending() {
        // The task is polled again when something has come.
        reading.set(Reading::UntilEmpty);
    }
    accepted
}

fn builder() -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEAD_BYTES as u32)
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        .max_local_error_reset_streams(Some(MAX_ERROR_RESETS))
        .max_send_buffer_size(SEND_BUFFER);
    builder
}

/// The request, unless it cannot be read: then it is answered here.
fn read(
    request: http::Request<RecvStream>,
    respond: &mut SendResponse<Bytes>,
    refused: impl Fn(Cause),
) -> Option<Request> {
    let (parts, stream) = request.into_parts();
    let body = body_of(stream, &parts.headers);
    match convert::request_of(parts) {
        Ok(head) => Some(Request { head, body, interim: Interim::default() }),
        Err(convert::Refused::Malformed) => {
            refused(Cause::BadRequest);
            respond.send_reset(Reason::PROTOCOL_ERROR);
            None
        }
        Err(convert::Refused::TooManyFields) => {
            refused(Cause::HeadTooLarge);
            refuse(respond, Cause::HeadTooLarge.status(), Cause::HeadTooLarge);
            None
        }
        Err(convert::Refused::Connect) => {
            refused(Cause::BadRequest);
            refuse(respond, StatusCode::METHOD_NOT_ALLOWED, Cause::BadRequest);
            None
        }
    }
}

/// Answers one request.
async fn answer<S>(request: Request, mut respond: SendResponse<Bytes>, service: Rc<S>)
where
    S: AsyncFn(Request) -> Option<Response>,
{
    let answer = tokio::select! {
        biased;
        answer = service(request) => answer,
        // The client has cancelled, or is gone: whatever was done for it ends here, the request upstream included.
        _ = poll_fn(|cx| respond.poll_reset(cx)) => return,
    };
    match answer {
        Some(response) => send(response, respond).await,
        None => respond.send_reset(Reason::INTERNAL_ERROR),
    }
}

pub(super) fn body_of(stream: RecvStream, headers: &http::HeaderMap) -> Body {
    if stream.is_end_stream() {
        return Body::Empty;
    }
    let length = headers.get(http::header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    Body::H2(Incoming::new(stream, length))
}

fn refuse(respond: &mut SendResponse<Bytes>, status: StatusCode, cause: Cause) {
    let mut response = http::Response::new(());
    *response.status_mut() = status;
    response.headers_mut().insert("x-sheer-reason", http::HeaderValue::from_static(cause.reason()));
    // Fails only when the client is gone.
    let _ = respond.send_response(response, true);
}

async fn send(response: Response, mut respond: SendResponse<Bytes>) {
    let Response { head, body } = response;
    let Ok(head) = to_response(head) else { return respond.send_reset(Reason::INTERNAL_ERROR) };
    let ends = body.is_known_empty();
    let Ok(mut stream) = respond.send_response(head, ends) else { return };
    if !ends {
        // Who broke off is known to the body's owner, which counts it.
        let _ = pump::send(&mut stream, body, Reason::INTERNAL_ERROR).await;
    }
}

fn to_response(head: ResponseHead) -> Result<http::Response<()>, convert::Refused> {
    if head.status == StatusCode::SWITCHING_PROTOCOLS {
        return Err(convert::Refused::Malformed);
    }
    convert::to_response(head)
}

/// A connection of which some bytes have been read already.
struct Prefixed {
    prefix: Bytes,
    io: Io,
    reading: Rc<Cell<Reading>>,
}

/// Whether the socket is read when it is asked to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reading {
    Always,
    UntilEmpty,
    /// It was empty, and its task knows when it no longer is.
    Empty,
}

impl AsyncRead for Prefixed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        if self.prefix.is_empty() {
            if self.reading.get() == Reading::Empty {
                return Poll::Pending;
            }
            let read = Pin::new(&mut self.io).poll_read(cx, buffer);
            if read.is_pending() && self.reading.get() == Reading::UntilEmpty {
                self.reading.set(Reading::Empty);
            }
            return read;
        }
        let count = self.prefix.len().min(buffer.remaining());
        buffer.put_slice(&self.prefix[..count]);
        self.prefix.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Prefixed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::Frame;
    use crate::h2::client::Connection;
    use http::Method;
    use sheer_core::head::{Fields, RequestHead, Version};
    use std::cell::RefCell;
    use tokio::task::{JoinHandle, LocalSet, spawn_local};

    type Ended = JoinHandle<Result<(), h2::Error>>;

    /// A client of ours and a server of ours at the two ends of a pipe.
    async fn pair<S>(drain: drain::Watch, service: S) -> (Connection, Ended)
    where
        S: AsyncFn(Request) -> Option<Response> + 'static,
    {
        let (client, server) = tokio::io::duplex(64 * 1024);
        let ended = spawn_local(serve(server.into(), BytesMut::new(), drain, |_| {}, service));
        (Connection::start(client.into()).await.unwrap(), ended)
    }

    fn head() -> RequestHead {
        RequestHead::new(Method::POST, Version::Http2, "web", "/a?b=c")
    }

    fn ok(body: Body) -> Option<Response> {
        Some(Response { head: ResponseHead::new(StatusCode::OK), body })
    }

    async fn text(mut body: Body) -> (Vec<u8>, Option<Fields>) {
        let mut all = Vec::new();
        while let Some(frame) = body.frame().await {
            match frame.unwrap() {
                Frame::Data(bytes) => all.extend_from_slice(&bytes),
                Frame::Trailers(fields) => return (all, Some(fields)),
            }
        }
        (all, None)
    }

    #[tokio::test]
    async fn large_bodies_and_heads_arrive_as_sent() {
        let test = async {
            let (_signal, drain) = drain::channel();
            let (client, _server) = pair(drain, async |request: Request| {
                assert_eq!((request.head.authority(), request.head.target()), ("web", "/a?b=c"));
                ok(request.body)
            })
            .await;
            let sent: Vec<u8> = (0..3_000_000u32).map(|it| it as u8).collect();
            let response = client.send(&mut head(), Body::Full(sent.clone().into())).await.unwrap();
            assert_eq!(response.head.status, StatusCode::OK);
            assert!(text(response.body).await.0 == sent);
            assert_eq!(client.streams(), 0);
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_says_nothing_is_let_go() {
        let (_client, server) = tokio::io::duplex(1024);
        let (_signal, drain) = drain::channel();
        let service = async |_| ok(Body::Empty);
        let ended = serve(server.into(), BytesMut::new(), drain, |_| {}, service).await.unwrap_err();
        assert_eq!(ended.reason(), Some(Reason::SETTINGS_TIMEOUT));
    }

    #[tokio::test]
    async fn trailers_pass_through_two_hops() {
        let test = async {
            let (_signal, drain) = drain::channel();
            // The application, on the crate itself.
            let (to_app, at_app) = tokio::io::duplex(64 * 1024);
            spawn_local(async move {
                let mut server = h2::server::handshake(at_app).await.unwrap();
                while let Some(stream) = server.accept().await {
                    let (_, mut respond) = stream.unwrap();
                    let mut body = respond.send_response(http::Response::new(()), false).unwrap();
                    body.send_data(Bytes::from_static(b"hello"), false).unwrap();
                    let trailers = [("grpc-status", "0")].map(|(k, v)| (k.parse().unwrap(), v.parse().unwrap()));
                    body.send_trailers(http::HeaderMap::from_iter(trailers)).unwrap();
                }
            });
            let upstream = Connection::start(to_app.into()).await.unwrap();
            let (client, _server) = pair(drain, async move |mut request: Request| {
                upstream.send(&mut request.head, request.body).await.ok()
            })
            .await;
            let (body, trailers) = text(client.send(&mut head(), Body::Empty).await.unwrap().body).await;
            assert_eq!(body, b"hello");
            assert_eq!(trailers.unwrap().values_of("grpc-status").collect::<Vec<_>>(), [b"0"]);
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test]
    async fn a_cancelled_request_is_cancelled_behind_the_proxy() {
        struct Gone(Rc<Notified>);
        impl Drop for Gone {
            fn drop(&mut self) {
                self.0.notify_one();
            }
        }
        use tokio::sync::Notify as Notified;
        let test = async {
            let (_signal, drain) = drain::channel();
            let (began, gone) = (Rc::new(Notified::new()), Rc::new(Notified::new()));
            let (began_too, gone_too) = (began.clone(), gone.clone());
            let (client, _server) = pair(drain, async move |_request: Request| {
                let _held = Gone(gone_too.clone());
                began_too.notify_one();
                std::future::pending::<Option<Response>>().await
            })
            .await;
            let waiting = spawn_local(async move { client.send(&mut head(), Body::Empty).await.map(|_| ()) });
            began.notified().await;
            waiting.abort();
            gone.notified().await;
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_nobody_uses_is_closed_in_order() {
        let test = async {
            let (_signal, drain) = drain::channel();
            let (client, server) = pair(drain, async |_: Request| ok(Body::Empty)).await;
            let mut last = tokio::time::Instant::now();
            for _ in 0..3 {
                client.send(&mut head(), Body::Empty).await.unwrap();
                last = tokio::time::Instant::now();
                tokio::time::sleep(IDLE * 9 / 10).await;
            }
            assert!(client.is_open());
            // Its client may be the first to close.
            let _ = server.await.unwrap();
            assert!((IDLE..=IDLE * 2).contains(&last.elapsed()), "{:?}", last.elapsed());
            assert!(!client.is_open());
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test]
    async fn draining_says_goaway_and_finishes_what_is_open() {
        let test = async {
            let (signal, drain) = drain::channel();
            let proceed = Rc::new(tokio::sync::Semaphore::new(0));
            let seen = Rc::new(RefCell::new(0));
            let (gate, count) = (proceed.clone(), seen.clone());
            let (client, server) = pair(drain, async move |_request: Request| {
                *count.borrow_mut() += 1;
                let _ = gate.acquire().await;
                ok(Body::Full(Bytes::from_static(b"done")))
            })
            .await;
            let other = client.clone();
            let open = spawn_local(async move { other.send(&mut head(), Body::Empty).await });
            while *seen.borrow() == 0 {
                tokio::task::yield_now().await;
            }
            signal.set(drain::Phase::Told);
            while client.is_open() {
                tokio::task::yield_now().await;
            }
            let refused = client.send(&mut head(), Body::Empty).await.unwrap_err();
            assert!(refused.unprocessed && refused.body.is_some());
            proceed.add_permits(1);
            let answered = open.await.unwrap().unwrap();
            assert_eq!(text(answered.body).await.0, b"done");
            server.await.unwrap().unwrap();
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test]
    async fn a_stream_refused_by_the_other_side_may_be_sent_again() {
        let test = async {
            let (to_app, at_app) = tokio::io::duplex(64 * 1024);
            spawn_local(async move {
                let mut server = h2::server::handshake(at_app).await.unwrap();
                while let Some(Ok((_, mut respond))) = server.accept().await {
                    respond.send_reset(Reason::REFUSED_STREAM);
                }
            });
            let client = Connection::start(to_app.into()).await.unwrap();
            let refused = client.send(&mut head(), Body::Full(Bytes::from_static(b"x"))).await.unwrap_err();
            assert!(refused.unprocessed);
            assert!(matches!(refused.body.unwrap(), Body::Full(_)));
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test]
    async fn an_authority_that_differs_from_host_is_refused() {
        let test = async {
            let (_signal, drain) = drain::channel();
            let (client, server) = tokio::io::duplex(64 * 1024);
            spawn_local(serve(server.into(), BytesMut::new(), drain, |_| {}, async |_: Request| ok(Body::Empty)));
            let (mut sender, connection) = h2::client::handshake(client).await.unwrap();
            spawn_local(connection);
            let request = http::Request::get("http://web/").header("host", "other").body(()).unwrap();
            let error = sender.send_request(request, true).unwrap().0.await.unwrap_err();
            assert_eq!(error.reason(), Some(Reason::PROTOCOL_ERROR));
        };
        LocalSet::new().run_until(test).await;
    }
}

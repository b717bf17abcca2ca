//! Whole connections: against raw frames, and one side of ours against the other.

mod patience;
mod windows;

use super::client::Connection;
use super::connection::{Role, State};
use super::frame::{self, Code, END_HEADERS, END_STREAM, HEADER, Header, Kind, PADDED, PREFACE, setting};
use super::hpack::Encoder;
use super::server::{Options, serve};
use super::{Error, STREAM_WINDOW};
use crate::body::{Body, Frame, Interim, InterimSink, Request, Response};
use crate::drain;
use crate::h1::pace::Pace;
use crate::idle::Idlers;
use bytes::{Buf, Bytes, BytesMut};
use http::{Method, StatusCode};
use proptest::prelude::*;
use sheer_core::cause::Cause;
use sheer_core::head::{RequestHead, ResponseHead, Version};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::task::{JoinHandle, LocalSet, spawn_local};

/// One side of a connection that is written and read frame by frame.
struct Raw {
    io: DuplexStream,
    buffer: BytesMut,
    encoder: Encoder,
}

impl Raw {
    fn over(io: DuplexStream) -> Self {
        Self { io, buffer: BytesMut::new(), encoder: Encoder::new() }
    }

    async fn say(&mut self, bytes: &[u8]) {
        // The other side may be gone already, which is what some tests are about.
        let _ = self.io.write_all(bytes).await;
    }

    async fn send(&mut self, kind: Kind, flags: u8, stream: u32, payload: &[u8]) {
        let mut out = BytesMut::new();
        Header::write(payload.len(), kind, flags, stream, &mut out);
        out.extend_from_slice(payload);
        self.say(&out).await;
    }

    async fn headers(&mut self, stream: u32, flags: u8, fields: &[(&str, &str)]) {
        let mut block = BytesMut::new();
        self.encoder.begin(&mut block);
        for (name, value) in fields {
            self.encoder.field(name.as_bytes(), value.as_bytes(), false, &mut block);
        }
        self.send(Kind::Headers, flags | END_HEADERS, stream, &block).await;
    }

    async fn request(&mut self, stream: u32, flags: u8) {
        let fields = [(":method", "POST"), (":scheme", "http"), (":authority", "web"), (":path", "/")];
        self.headers(stream, flags, &fields).await;
    }

    async fn settings(&mut self, settings: &[(u16, u32)]) {
        let mut out = BytesMut::new();
        frame::settings(settings, &mut out);
        self.say(&out).await;
    }

    /// The next frame; `None` when the other side has closed.
    async fn next(&mut self) -> Option<(Header, Bytes)> {
        loop {
            if let Some(header) = Header::of(&self.buffer)
                && self.buffer.len() >= HEADER + header.length
            {
                self.buffer.advance(HEADER);
                return Some((header, self.buffer.split_to(header.length).freeze()));
            }
            if self.io.read_buf(&mut self.buffer).await.ok()? == 0 {
                return None;
            }
        }
    }

    /// The next frame of this kind, without those before it.
    async fn next_of(&mut self, kind: Kind) -> (Header, Bytes) {
        loop {
            let next = self.next().await.unwrap_or_else(|| panic!("closed before {kind:?}"));
            if next.0.kind == kind {
                return next;
            }
        }
    }

    /// The code with which the connection is ended.
    async fn told(&mut self) -> Code {
        loop {
            let (_, payload) = self.next_of(Kind::GoAway).await;
            let code = Code(u32::from_be_bytes(payload[4..8].try_into().unwrap()));
            if code != Code::NO_ERROR {
                return code;
            }
        }
    }
}

type Ended = JoinHandle<Result<(), Error>>;

/// A raw client that has greeted a server of ours.
async fn client<S>(service: S) -> (Raw, Ended)
where
    S: AsyncFn(Request) -> Option<Response> + 'static,
{
    let (near, far) = duplex(64 * 1024);
    let (signal, drain) = drain::channel();
    let ended = spawn_local(async move {
        let _signal = signal;
        serve(far.into(), BytesMut::new(), Options::default(), drain, |_| {}, service).await
    });
    let mut raw = Raw::over(near);
    raw.say(PREFACE).await;
    raw.settings(&[]).await;
    (raw, ended)
}

/// A client of ours, and the raw server to which it talks.
async fn server(settings: &[(u16, u32)]) -> (Connection, Raw) {
    let (near, far) = duplex(64 * 1024);
    let connection = Connection::start(near.into());
    let mut raw = Raw::over(far);
    raw.settings(settings).await;
    let mut preface = vec![0; PREFACE.len()];
    raw.io.read_exact(&mut preface).await.unwrap();
    assert_eq!(preface, PREFACE);
    (connection, raw)
}

fn head() -> RequestHead {
    RequestHead::new(Method::POST, Version::Http2, "web", "/a")
}

fn ok(body: Body) -> Option<Response> {
    Some(Response { head: ResponseHead::new(StatusCode::OK), body })
}

async fn bytes_of(mut body: Body) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(frame) = body.frame().await {
        if let Frame::Data(bytes) = frame.unwrap() {
            all.extend_from_slice(&bytes);
        }
    }
    all
}

/// A test, which fails rather than hang. Where the clock is paused, none takes as long.
async fn local<T>(test: impl Future<Output = T>) -> T {
    let tasks = LocalSet::new();
    tokio::time::timeout(Duration::from_secs(400), tasks.run_until(test)).await.expect("the test ends")
}

#[tokio::test]
async fn a_reader_that_stops_stops_its_writer_and_nobody_else() {
    local(async {
        let (mut raw, _ended) = client(async |request: Request| {
            let length = if request.head.target() == "/" { 1 << 20 } else { 10 };
            ok(Body::Full(vec![7; length].into()))
        })
        .await;
        raw.settings(&[(setting::INITIAL_WINDOW_SIZE, 1000)]).await;
        raw.request(1, END_STREAM).await;
        let (_, data) = raw.next_of(Kind::Data).await;
        assert_eq!(data.len(), 1000);
        raw.headers(3, END_STREAM, &[(":method", "GET"), (":scheme", "http"), (":path", "/b")]).await;
        let (header, data) = raw.next_of(Kind::Data).await;
        assert_eq!((header.stream, data.len()), (3, 10));
        // One byte more is one byte more, also after the window went below nothing.
        raw.settings(&[(setting::INITIAL_WINDOW_SIZE, 990)]).await;
        raw.send(Kind::WindowUpdate, 0, 1, &11u32.to_be_bytes()).await;
        let (header, data) = raw.next_of(Kind::Data).await;
        assert_eq!((header.stream, data.len()), (1, 1));
    })
    .await;
}

#[tokio::test]
async fn who_sends_more_than_was_admitted_is_told() {
    local(async {
        let (mut raw, _ended) = client(async |request: Request| {
            let _unread = request;
            std::future::pending().await
        })
        .await;
        raw.next_of(Kind::Settings).await;
        raw.send(Kind::Settings, frame::ACK, 0, &[]).await;
        raw.request(1, 0).await;
        let mut sent = 0;
        while sent <= STREAM_WINDOW {
            raw.send(Kind::Data, 0, 1, &[0; 8192]).await;
            sent += 8192;
        }
        let (header, code) = raw.next_of(Kind::RstStream).await;
        assert_eq!((header.stream, Code((&code[..]).get_u32())), (1, Code::FLOW_CONTROL_ERROR));
    })
    .await;
}

#[tokio::test]
async fn padding_is_no_part_of_a_body() {
    local(async {
        let (mut raw, _ended) = client(async |request: Request| ok(request.body)).await;
        raw.request(1, 0).await;
        raw.send(Kind::Data, PADDED, 1, b"\x03ab\0\0\0").await;
        raw.send(Kind::Data, PADDED, 1, b"\x00").await;
        raw.send(Kind::Data, PADDED | END_STREAM, 1, b"\x01c\0").await;
        let mut all = Vec::new();
        loop {
            let (header, data) = raw.next_of(Kind::Data).await;
            all.extend_from_slice(&data);
            if header.has(END_STREAM) {
                break;
            }
        }
        assert_eq!(all, b"abc");
        raw.request(3, 0).await;
        raw.send(Kind::Data, PADDED, 3, b"\x03abc").await;
        raw.send(Kind::Data, PADDED, 3, b"\x04abc").await;
        assert_eq!(raw.told().await, Code::PROTOCOL_ERROR);
    })
    .await;
}

#[tokio::test]
async fn an_early_answer_ends_the_upload_without_an_error() {
    local(async {
        let (mut raw, _ended) = client(async |_: Request| ok(Body::Full(Bytes::from_static(b"no")))).await;
        raw.request(1, 0).await;
        let (header, _) = raw.next_of(Kind::Data).await;
        assert!(header.has(END_STREAM));
        let (_, code) = raw.next_of(Kind::RstStream).await;
        assert_eq!(Code((&code[..]).get_u32()), Code::NO_ERROR);
        // What was on its way is ignored, its trailers too.
        raw.send(Kind::Data, 0, 1, b"late").await;
        raw.headers(1, END_STREAM, &[("x-late", "1")]).await;
        raw.request(3, END_STREAM).await;
        assert_eq!(raw.next_of(Kind::Headers).await.0.stream, 3);
    })
    .await;
}

#[tokio::test]
async fn a_reset_with_its_request_begins_nothing() {
    local(async {
        let begun = Rc::new(Cell::new(0));
        let count = begun.clone();
        let (mut raw, _ended) = client(async move |_: Request| {
            count.set(count.get() + 1);
            ok(Body::Empty)
        })
        .await;
        let mut both = BytesMut::new();
        for stream in (1..200).step_by(2) {
            // GET http / of nobody.
            Header::write(3, Kind::Headers, END_HEADERS | END_STREAM, stream, &mut both);
            both.extend_from_slice(&[0x82, 0x86, 0x84]);
            frame::reset(stream, Code::CANCEL, &mut both);
        }
        raw.say(&both).await;
        raw.request(201, END_STREAM).await;
        assert_eq!(raw.next_of(Kind::Headers).await.0.stream, 201);
        assert_eq!(begun.get(), 1);
    })
    .await;
}

/// Collects interim answers.
#[derive(Default)]
struct Early(RefCell<Vec<u16>>);

impl InterimSink for Early {
    fn send(&self, head: ResponseHead) {
        self.0.borrow_mut().push(head.status.as_u16());
    }
}

#[tokio::test]
async fn interim_answers_come_first_and_are_bounded() {
    local(async {
        let (connection, mut raw) = server(&[]).await;
        let early = Rc::new(Early::default());
        let interim = Interim::to(early.clone());
        let sent = connection.clone();
        let answer = spawn_local(async move { sent.send(&head(), Body::Empty, &interim).await });
        raw.next_of(Kind::Headers).await;
        for status in ["103", "102", "200"] {
            raw.headers(1, 0, &[(":status", status)]).await;
        }
        assert_eq!(answer.await.unwrap().unwrap().head.status, StatusCode::OK);
        assert_eq!(early.0.take(), [103, 102]);

        let endless = spawn_local(async move { connection.send(&head(), Body::Empty, &Interim::default()).await });
        let (header, _) = raw.next_of(Kind::Headers).await;
        for _ in 0..40 {
            raw.headers(header.stream, 0, &[(":status", "103")]).await;
        }
        let error = endless.await.unwrap().unwrap_err();
        assert!(!error.unprocessed);
    })
    .await;
}

#[tokio::test]
async fn requests_wait_for_a_stream_that_the_peer_admits() {
    local(async {
        let (connection, mut raw) = server(&[(setting::MAX_CONCURRENT_STREAMS, 1)]).await;
        while !raw.next_of(Kind::Settings).await.0.has(frame::ACK) {}
        let mut asked = VecDeque::new();
        for _ in 0..3 {
            let sent = connection.clone();
            asked.push_back(spawn_local(async move { sent.send(&head(), Body::Empty, &Interim::default()).await }));
        }
        for _ in 0..3 {
            let (header, _) = raw.next_of(Kind::Headers).await;
            raw.send(Kind::Ping, 0, 0, &[0; 8]).await;
            let next = loop {
                match raw.next().await.unwrap().0.kind {
                    Kind::WindowUpdate => {}
                    kind => break kind,
                }
            };
            assert_eq!(next, Kind::Ping, "nothing is asked before that is answered");
            raw.headers(header.stream, END_STREAM, &[(":status", "204")]).await;
            let answer = asked.pop_front().unwrap().await.unwrap().unwrap();
            assert_eq!(answer.head.status, StatusCode::NO_CONTENT);
        }
    })
    .await;
}

#[tokio::test]
async fn who_gives_up_waiting_for_a_stream_gives_it_to_the_next() {
    local(async {
        let (connection, mut raw) = server(&[(setting::MAX_CONCURRENT_STREAMS, 1)]).await;
        while !raw.next_of(Kind::Settings).await.0.has(frame::ACK) {}
        let ask = |target: &'static str| {
            let connection = connection.clone();
            let head = RequestHead::new(Method::GET, Version::Http2, "web", target);
            spawn_local(async move { connection.send(&head, Body::Empty, &Interim::default()).await })
        };
        let first = ask("/1");
        raw.next_of(Kind::Headers).await;
        let (second, third) = (ask("/2"), ask("/3"));
        tokio::task::yield_now().await;
        raw.headers(1, END_STREAM, &[(":status", "204")]).await;
        // It is told that there is a stream now, and goes away in the same moment.
        first.await.unwrap().unwrap();
        second.abort();
        let mut third = third;
        let answer = loop {
            tokio::select! {
                answer = &mut third => break answer,
                (header, _) = raw.next_of(Kind::Headers) => {
                    raw.headers(header.stream, END_STREAM, &[(":status", "204")]).await;
                }
            }
        };
        assert_eq!(answer.unwrap().unwrap().head.status, StatusCode::NO_CONTENT);
    })
    .await;
}

#[tokio::test]
async fn who_ends_a_connections_task_ends_its_requests() {
    struct Gone(Rc<tokio::sync::Notify>);
    impl Drop for Gone {
        fn drop(&mut self) {
            self.0.notify_one();
        }
    }
    local(async {
        let (begun, gone) = (Rc::new(tokio::sync::Notify::new()), Rc::new(tokio::sync::Notify::new()));
        let (tell, held) = (begun.clone(), gone.clone());
        let (mut raw, ended) = client(async move |_: Request| {
            let _held = Gone(held.clone());
            tell.notify_one();
            std::future::pending().await
        })
        .await;
        raw.request(1, END_STREAM).await;
        begun.notified().await;
        ended.abort();
        gone.notified().await;
    })
    .await;
}

#[tokio::test]
async fn what_a_leaving_peer_has_not_looked_at_may_be_sent_again() {
    local(async {
        let (connection, mut raw) = server(&[]).await;
        let ask = |connection: &Connection| {
            let connection = connection.clone();
            spawn_local(async move { connection.send(&head(), Body::Empty, &Interim::default()).await })
        };
        let (first, second) = (ask(&connection), ask(&connection));
        raw.next_of(Kind::Headers).await;
        raw.next_of(Kind::Headers).await;
        let mut out = BytesMut::new();
        frame::go_away(1, Code::NO_ERROR, &mut out);
        raw.say(&out).await;
        assert!(second.await.unwrap().unwrap_err().unprocessed);
        assert!(!connection.is_open());
        raw.headers(1, END_STREAM, &[(":status", "200")]).await;
        assert_eq!(first.await.unwrap().unwrap().head.status, StatusCode::OK);
        drop(connection);
        while raw.next().await.is_some() {}
    })
    .await;
}

#[tokio::test]
async fn a_response_that_breaks_off_is_never_whole() {
    local(async {
        for how in ["reset", "close", "length"] {
            let (connection, mut raw) = server(&[]).await;
            let answer = spawn_local(async move { connection.send(&head(), Body::Empty, &Interim::default()).await });
            raw.next_of(Kind::Headers).await;
            raw.headers(1, 0, &[(":status", "200"), ("content-length", "10")]).await;
            raw.send(Kind::Data, 0, 1, b"half").await;
            let mut body = answer.await.unwrap().unwrap().body;
            match how {
                "reset" => raw.send(Kind::RstStream, 0, 1, &8u32.to_be_bytes()).await,
                "close" => drop(raw),
                _ => raw.send(Kind::Data, END_STREAM, 1, b"!").await,
            }
            let mut last = None;
            while let Some(frame) = body.frame().await {
                last = Some(frame);
            }
            assert!(matches!(last, Some(Err(_))), "{how}: {last:?}");
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_vanishes_or_takes_nothing_is_left() {
    local(async {
        let (connection, raw) = server(&[]).await;
        let waiting = connection.send(&head(), Body::Empty, &Interim::default()).await.map(drop);
        assert!(!waiting.unwrap_err().unprocessed, "nobody answered the pings");
        drop(raw);

        // One that answers pings and never opens a window.
        let (mut raw, _ended) = client(async |_: Request| ok(Body::Full(vec![1; 1000].into()))).await;
        raw.settings(&[(setting::INITIAL_WINDOW_SIZE, 0)]).await;
        raw.request(1, END_STREAM).await;
        loop {
            let (header, payload) = raw.next().await.expect("the connection stays");
            match header.kind {
                Kind::Ping => raw.send(Kind::Ping, frame::ACK, 0, &payload).await,
                Kind::RstStream => break assert_eq!(header.stream, 1),
                _ => {}
            }
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn strangers_keep_a_pace_and_leave_when_there_is_no_room() {
    local(async {
        let idlers = Idlers::default();
        let options = Options { pace: Some(Pace::OF_STRANGERS), idler: Some(idlers.enter()) };
        let (near, far) = duplex(64 * 1024);
        let (_signal, drain) = drain::channel();
        let service = async |mut request: Request| {
            let slow = loop {
                match request.body.frame().await {
                    Some(Ok(_)) => {}
                    Some(Err(error)) => break error.is_too_slow(),
                    None => break false,
                }
            };
            ok(Body::Full(Bytes::from_static(if slow { b"slow" } else { b"whole" })))
        };
        let ended = spawn_local(serve(far.into(), BytesMut::new(), options, drain, |_| {}, service));
        let mut raw = Raw::over(near);
        raw.say(PREFACE).await;
        raw.settings(&[]).await;
        let fields = [(":method", "POST"), (":scheme", "http"), (":path", "/"), ("content-length", "9000")];
        for (stream, part, verdict) in [(1, 10, &b"slow"[..]), (3, 1000, b"whole")] {
            raw.headers(stream, 0, &fields).await;
            let mut left = 9000;
            let answer = loop {
                let (header, payload) = raw.next().await.expect("the connection stays");
                match header.kind {
                    Kind::Data => break payload,
                    // Once in ten seconds.
                    Kind::Ping => {
                        raw.send(Kind::Ping, frame::ACK, 0, &payload).await;
                        left -= part;
                        let end = if left == 0 { END_STREAM } else { 0 };
                        raw.send(Kind::Data, end, stream, &vec![0; part]).await;
                    }
                    _ => {}
                }
            };
            assert_eq!(answer, verdict);
        }
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(idlers.let_go(1), 1);
        raw.next_of(Kind::GoAway).await;
        while raw.next().await.is_some() {}
        drop(raw);
        ended.await.unwrap().unwrap();
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_strangers_conversation_may_pause_and_is_left_when_nobody_says_anything() {
    local(async {
        let options = Options { pace: Some(Pace::OF_STRANGERS), idler: None };
        let (near, far) = duplex(64 * 1024);
        let (_signal, drain) = drain::channel();
        // What it hears it says.
        let service = async |request: Request| ok(request.body);
        spawn_local(serve(far.into(), BytesMut::new(), options, drain, |_| {}, service));
        let mut raw = Raw::over(near);
        raw.say(PREFACE).await;
        raw.settings(&[]).await;
        raw.request(1, 0).await;
        let mut silent = tokio::time::Instant::now();
        let mut said = false;
        loop {
            let (header, payload) = raw.next().await.expect("the connection stays");
            match header.kind {
                Kind::Ping => {
                    raw.send(Kind::Ping, frame::ACK, 0, &payload).await;
                    if !said && silent.elapsed() > Duration::from_secs(60) {
                        raw.send(Kind::Data, 0, 1, b"still there?").await;
                        silent = tokio::time::Instant::now();
                        said = true;
                    }
                }
                Kind::RstStream => break assert_eq!(header.stream, 1),
                _ => {}
            }
        }
        let silence = silent.elapsed().as_secs();
        assert!(said && (300..=320).contains(&silence), "left after {silence} s");
    })
    .await;
}

#[tokio::test]
async fn what_is_refused_counts_also_when_the_connection_ends_with_it() {
    local(async {
        let (near, far) = duplex(64 * 1024);
        let (_signal, drain) = drain::channel();
        let refused = RefCell::new(Vec::new());
        let mut both = BytesMut::from(PREFACE);
        frame::settings(&[], &mut both);
        // GET http / with a field of an empty name; then CONNECT; then a frame that ends the connection.
        Header::write(6, Kind::Headers, END_HEADERS | END_STREAM, 1, &mut both);
        both.extend_from_slice(b"\x82\x86\x84\0\0\0");
        Header::write(12, Kind::Headers, END_HEADERS, 3, &mut both);
        both.extend_from_slice(b"\x02\x07CONNECT\x01\x01a");
        Header::write(0, Kind::Headers, END_HEADERS, 2, &mut both);
        let mut raw = Raw::over(near);
        raw.say(&both).await;
        let service = async |_: Request| ok(Body::Empty);
        let note = |cause| refused.borrow_mut().push(cause);
        let (ended, _) =
            tokio::join!(serve(far.into(), BytesMut::new(), Options::default(), drain, note, service), async move {
                while raw.next().await.is_some() {}
            });
        assert!(matches!(ended, Err(Error::Protocol { .. })), "{ended:?}");
        assert_eq!(refused.take(), [Cause::BadRequest, Cause::BadRequest]);
    })
    .await;
}

/// Both sides are ours, and every body arrives as it was sent, whatever the pipe does.
async fn exchange(bodies: Vec<(usize, usize)>, pipe: usize) {
    let (near, far) = duplex(pipe);
    let (_signal, drain) = drain::channel();
    let echo = async |request: Request| {
        let status = if request.head.method == Method::HEAD { StatusCode::NO_CONTENT } else { StatusCode::OK };
        Some(Response { head: ResponseHead::new(status), body: request.body })
    };
    spawn_local(serve(far.into(), BytesMut::new(), Options::default(), drain, |_| {}, echo));
    let connection = Connection::start(near.into());
    let mut tasks = Vec::new();
    for (seed, (length, abandoned)) in bodies.into_iter().enumerate() {
        let connection = connection.clone();
        tasks.push(spawn_local(async move {
            let sent: Vec<u8> = (0..length).map(|at| (at.wrapping_mul(31) ^ at >> 8 ^ seed) as u8).collect();
            let body = Body::from(Bytes::from(sent.clone()));
            let answer = connection.send(&head(), body, &Interim::default()).await.unwrap();
            if abandoned == 0 {
                // Somebody who does not read to the end disturbs nobody.
                return drop(answer);
            }
            assert!(bytes_of(answer.body).await == sent, "body {seed} of {length} bytes");
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    // Those that were abandoned are gone as well.
    poll_fn(|cx| {
        if connection.streams() == 0 {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn bodies_arrive_as_they_were_sent(
        bodies in proptest::collection::vec((prop_oneof![0usize..3000, 0usize..300_000], 0usize..8), 1..12),
        pipe in prop_oneof![1usize..64, 64usize..100_000],
    ) {
        let bodies: Vec<_> = bodies.into_iter().map(|(length, it)| (if pipe < 64 { length % 3000 } else { length }, it)).collect();
        runtime().block_on(local(exchange(bodies, pipe)));
    }
}

/// Frames that mean something and frames that do not.
fn frames() -> impl Strategy<Value = Vec<(u8, u8, u32, Vec<u8>)>> {
    let block = prop_oneof![
        Just(vec![0x83, 0x86, 0x84, 0x41, 3, b'w', b'e', b'b']),
        Just(vec![0x88]),
        Just(vec![0x88, 0x5c, 1, b'9']),
        Just(vec![0x40, 1, b'x', 1, b'y', 0xbe]),
        proptest::collection::vec(any::<u8>(), 0..40),
    ];
    let payload =
        prop_oneof![block, proptest::collection::vec(any::<u8>(), 0..300), Just(vec![0, 0, 0, 1]), Just(vec![0; 8])];
    let stream = prop_oneof![4 => 0u32..12, 1 => any::<u32>()];
    proptest::collection::vec((0u8..11, any::<u8>(), stream, payload), 0..60)
}

proptest! {
    /// No sequence of frames panics, whoever holds the streams, and what is counted stays what there is.
    #[test]
    fn no_frames_break_the_state(frames in frames(), server in any::<bool>(), takes in proptest::collection::vec(0u8..6, 0..60)) {
        let shared = Rc::new(RefCell::new(State::new(if server { Role::Server } else { Role::Client })));
        let mut held = Vec::new();
        let mut takes = takes.into_iter().cycle();
        let mut buffer = BytesMut::new();
        frame::settings(&[], &mut buffer);
        if !server {
            for _ in 0..3 {
                let key = shared.borrow_mut().open(&head(), false, None);
                held.push(super::stream::Handle::new(&shared, key));
            }
        }
        for (kind, flags, stream, payload) in frames {
            buffer.extend_from_slice(&[0, 0, payload.len() as u8, kind, flags]);
            let length = buffer.len();
            buffer[length - 4] = (payload.len() >> 8) as u8;
            buffer.extend_from_slice(&stream.to_be_bytes());
            buffer.extend_from_slice(&payload);
            while let Some(header) = Header::of(&buffer) {
                if buffer.len() < HEADER + header.length {
                    break;
                }
                buffer.advance(HEADER);
                let left = buffer.len() - header.length;
                let taken = shared.borrow_mut().frame(header, &mut buffer);
                if let Err(error) = taken {
                    shared.borrow_mut().close(&error);
                    return Ok(());
                }
                prop_assert_eq!(buffer.len(), left, "a frame is taken whole");
            }
            loop {
                let next = shared.borrow_mut().accepted.pop_front();
                let Some(accepted) = next else { break };
                held.push(super::stream::Handle::new(&shared, accepted.key));
            }
            match takes.next() {
                Some(0) => drop(held.pop()),
                Some(1) => held.iter().for_each(|it| {
                    it.with(|state, key| while state.stream(key).receiving.lend_part().is_some() { state.taken(key, None) });
                }),
                Some(2) => held.iter().for_each(|it| {
                    let _ = it.respond(&ResponseHead::new(StatusCode::OK), false);
                }),
                Some(3) => held.iter().for_each(|it| it.with(|state, key| state.stop_reading(key))),
                Some(4) => held.iter().for_each(|it| it.reset(Code::CANCEL)),
                _ => {}
            }
            shared.borrow().check();
        }
        drop(held);
        shared.borrow().check();
    }
}

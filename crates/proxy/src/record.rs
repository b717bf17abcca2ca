//! What is written down about a request or connection: metrics of its edge, and a line of the access log.
//!
//! A [`Record`] is begun when the request arrives, moves into the response's body, and writes when it is dropped, so that
//! a client that hangs up is counted as well. What it points to is resolved before, never looked up by name.

use crate::body::{Body, BodyError, Frame, Length, Response};
use crate::connection::Spoken;
use crate::metrics::{Edge, Metrics};
use crate::tcp;
use http::StatusCode;
use serde::Serialize;
use sheer_core::cause::Cause;
use sheer_core::head::{Fields, Known, RequestHead, Version};
use std::cell::Cell;
use std::io::Write;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

/// Lines waiting to be written: at 300 bytes each about 2 MiB. When more come, they are left out.
const LOG_QUEUE: usize = 8192;

/// Fields that say who a caller is. Only the mesh sets them.
pub const IDENTITY_FIELDS: &[Known] = &[Known::ClientCert, Known::LinkerdClientId, Known::SheerPeer];

/// The account of one request.
#[derive(Debug)]
pub struct Record {
    edge: Arc<Edge>,
    started: Instant,
    /// Spent waiting for the other side: the rest is the mesh's own.
    waited: Duration,
    /// The mesh's part, where it is over before the record is: a body that streams is the two sides' own time.
    mesh: Option<Duration>,
    status: u16,
    grpc_status: i32,
    cause: Option<Cause>,
    answered: bool,
    sent: Rc<Cell<u64>>,
    received: u64,
    held: Option<crate::upstream::endpoint::InFlight>,
    line: Option<Box<(Log, Line)>>,
}

impl Record {
    /// Begins the account of a request on an edge.
    pub fn begin(edge: Arc<Edge>, line: Option<(Log, Line)>) -> Self {
        Self {
            edge,
            started: Instant::now(),
            waited: Duration::ZERO,
            mesh: None,
            status: 0,
            grpc_status: -1,
            cause: None,
            answered: false,
            sent: Rc::default(),
            received: 0,
            held: None,
            line: line.map(Box::new),
        }
    }

    /// The request turned out to be on this edge.
    pub fn on(&mut self, edge: Arc<Edge>) {
        self.edge = edge;
    }

    /// When the request arrived.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Adds time spent waiting for the other side.
    pub fn waited(&mut self, time: Duration) {
        self.waited += time;
    }

    /// Holds the request's place at its endpoint until its answer has ended.
    pub fn hold(&mut self, in_flight: crate::upstream::endpoint::InFlight) {
        self.held = Some(in_flight);
    }

    /// Why it failed.
    pub fn failed(&mut self, cause: Cause) {
        self.cause = Some(cause);
    }

    /// The line of the access log, where one is written.
    pub fn line(&mut self) -> Option<&mut Line> {
        self.line.as_deref_mut().map(|(_, line)| line)
    }

    /// Counts the request's body as it is read.
    pub fn meter(&mut self, body: Body) -> Body {
        match body {
            Body::Empty => Body::Empty,
            Body::Full(bytes) => {
                self.sent.set(self.sent.get() + bytes.len() as u64);
                Body::Full(bytes)
            }
            body => Body::Metered(Box::new(Metered { body, count: self.sent.clone() })),
        }
    }

    /// Ends the account of a request that was answered before it could be read as a whole.
    pub fn refused(mut self, status: StatusCode, cause: Cause) {
        self.status = status.as_u16();
        self.cause = Some(cause);
    }

    /// Lets the record end with the response: at once when it is here as a whole, otherwise with its body. One that breaks
    /// off becomes a status for a caller who speaks `grpc`.
    pub fn finish(mut self, response: Response, grpc: bool) -> Response {
        let Response { head, body } = response;
        self.status = head.status.as_u16();
        self.answered = true;
        self.take_grpc_status(&head.fields);
        match &body {
            Body::Empty => Response { head, body },
            Body::Full(bytes) => {
                self.received += bytes.len() as u64;
                Response { head, body }
            }
            _ => {
                self.mesh = Some(self.started.elapsed().saturating_sub(self.waited));
                let watched = Watched { body, record: self, grpc, ended: false };
                Response { head, body: Body::Watched(Box::new(watched)) }
            }
        }
    }

    /// The connection became a tunnel with this answer; the record ends with it.
    pub fn switched(&mut self, status: StatusCode) {
        self.status = status.as_u16();
        self.answered = true;
        self.mesh = Some(self.started.elapsed().saturating_sub(self.waited));
    }

    /// Bytes that a tunnel has passed on.
    pub fn passed(&mut self, counts: &tcp::Counts) {
        self.sent.set(self.sent.get() + counts.sent.get());
        self.received += counts.received.get();
    }

    fn take_grpc_status(&mut self, fields: &Fields) {
        if let Some(value) = fields.get(Known::GrpcStatus) {
            self.grpc_status = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).unwrap_or(2);
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if !self.answered {
            // The answer was never given to anybody.
            self.cause.get_or_insert(Cause::ClientGone);
        }
        if self.status == 0 {
            self.status = self.cause.map_or(StatusCode::OK, Cause::status).as_u16();
        }
        let total = self.started.elapsed();
        let mesh = self.mesh.unwrap_or_else(|| total.saturating_sub(self.waited));
        self.edge.count(self.status, self.grpc_status, self.cause);
        self.edge.latency(total, mesh);
        self.edge.bytes(self.sent.get(), self.received);
        if let Some((log, mut line)) = self.line.take().map(|it| *it) {
            line.status = self.status;
            line.grpc_status = (self.grpc_status >= 0).then_some(self.grpc_status);
            line.reason = self.cause.map(Cause::reason);
            line.bytes_sent = self.sent.get();
            line.bytes_received = self.received;
            line.duration_us = total.as_micros() as u64;
            line.mesh_us = mesh.as_micros() as u64;
            log.write(&line);
        }
    }
}

/// A response's body with its record.
#[derive(Debug)]
pub struct Watched {
    body: Body,
    record: Record,
    grpc: bool,
    ended: bool,
}

impl Watched {
    /// See [`Body::length`].
    pub fn length(&self) -> Length {
        self.body.length()
    }

    /// See [`Body::is_empty`].
    pub fn is_empty(&self) -> bool {
        self.body.is_empty()
    }

    /// See [`Body::poll_progress`].
    pub fn poll_progress(&mut self, cx: &mut Context<'_>) {
        self.body.poll_progress(cx);
    }

    /// See [`Body::failed`].
    pub fn failed(&mut self, cause: Cause) {
        self.record.failed(cause);
    }

    /// See [`Body::poll_frame`].
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        let mut polled = self.body.poll_frame(cx);
        let Poll::Ready(frame) = &mut polled else { return Poll::Pending };
        match frame {
            Some(Ok(Frame::Data(bytes))) => self.record.received += bytes.len() as u64,
            Some(Ok(Frame::Trailers(fields))) => self.record.take_grpc_status(fields),
            Some(Err(error)) => {
                self.record.failed(Cause::ResponseTruncated);
                if self.grpc && matches!(error, BodyError::Truncated | BodyError::Io(_)) {
                    *frame = Some(Ok(Frame::Trailers(broken_off())));
                }
            }
            None => {}
        }
        self.ended = !matches!(frame, Some(Ok(Frame::Data(_))));
        polled
    }
}

/// What a gRPC caller is told whose answer broke off. A reset would say the same, but not whether to try again: libraries
/// take one for INTERNAL.
fn broken_off() -> Fields {
    let mut fields = Fields::default();
    let status = Cause::ResponseTruncated.grpc_status().to_string();
    // Two fields are never too many.
    let _ = fields.append(Known::GrpcStatus.as_str(), status.as_bytes());
    let _ = fields.append("grpc-message", Cause::ResponseTruncated.reason().as_bytes());
    fields
}

impl Drop for Watched {
    fn drop(&mut self) {
        if !self.ended && !self.body.is_empty() {
            self.record.cause.get_or_insert(Cause::ClientGone);
        }
    }
}

/// A request's body that is counted.
#[derive(Debug)]
pub struct Metered {
    body: Body,
    count: Rc<Cell<u64>>,
}

impl Metered {
    /// See [`Body::length`].
    pub fn length(&self) -> Length {
        self.body.length()
    }

    /// See [`Body::is_empty`].
    pub fn is_empty(&self) -> bool {
        self.body.is_empty()
    }

    /// See [`Body::poll_progress`].
    pub fn poll_progress(&mut self, cx: &mut Context<'_>) {
        self.body.poll_progress(cx);
    }

    /// See [`Body::poll_frame`].
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        let mut polled = self.body.poll_frame(cx);
        match &mut polled {
            Poll::Ready(Some(Ok(Frame::Data(bytes)))) => self.count.set(self.count.get() + bytes.len() as u64),
            // Who a caller is says the mesh, never the caller: not at the end either.
            Poll::Ready(Some(Ok(Frame::Trailers(fields)))) => fields.remove_known(IDENTITY_FIELDS),
            _ => {}
        }
        polled
    }
}

/// The account of a connection of bytes.
#[derive(Debug)]
pub struct ConnectionRecord {
    edge: Arc<Edge>,
    started: Instant,
    waited: Duration,
    /// Bytes passed on so far.
    pub counts: tcp::Counts,
    cause: Option<Cause>,
    line: Option<Box<(Log, Line)>>,
    /// It turned out to carry requests, which have records of their own.
    forgotten: bool,
}

impl ConnectionRecord {
    /// Begins the account of a connection on an edge.
    pub fn begin(edge: Arc<Edge>, line: Option<(Log, Line)>) -> Self {
        edge.opened();
        let line = line.map(Box::new);
        Self {
            counts: tcp::Counts::on(edge.clone()),
            edge,
            started: Instant::now(),
            waited: Duration::ZERO,
            cause: None,
            line,
            forgotten: false,
        }
    }

    /// Ends without an account: what it carries are requests.
    pub fn forget(mut self) {
        self.forgotten = true;
    }

    /// Why it failed.
    pub fn failed(&mut self, cause: Cause) {
        self.cause = Some(cause);
    }

    /// From here on the time is the two sides' own.
    pub fn connected(&mut self) {
        self.waited = self.started.elapsed();
    }
}

impl Drop for ConnectionRecord {
    fn drop(&mut self) {
        let total = self.started.elapsed();
        let mesh = if self.waited.is_zero() { total } else { self.waited };
        self.edge.closed();
        if self.forgotten {
            return;
        }
        self.edge.count(0, -1, self.cause);
        self.edge.latency(total, mesh);
        if let Some((log, mut line)) = self.line.take().map(|it| *it) {
            line.reason = self.cause.map(Cause::reason);
            line.bytes_sent = self.counts.sent.get();
            line.bytes_received = self.counts.received.get();
            line.duration_us = total.as_micros() as u64;
            line.mesh_us = mesh.as_micros() as u64;
            log.write(&line);
        }
    }
}

/// Writes down a connection that was refused before its edge was known.
pub fn refused_connection(metrics: &Metrics, cause: Cause, line: Option<(Log, Line)>) {
    metrics.refused_connection(cause);
    if let Some((log, mut line)) = line {
        line.reason = Some(cause.reason());
        log.write(&line);
    }
}

/// One line of the access log. Field names are those of the metrics' labels.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Line {
    /// Seconds since 1970 at the request's arrival.
    pub time: f64,
    /// `outbound` or `inbound`.
    pub side: &'static str,
    /// Who called.
    pub source: String,
    /// The service called.
    pub destination: String,
    /// The route that matched.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub route: String,
    /// The endpoint that answered, or was tried last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<std::net::SocketAddr>,
    /// `http1`, `http2`, `grpc`, `tcp`.
    pub protocol: &'static str,
    /// Method.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub method: String,
    /// Host and port as sent.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub authority: String,
    /// Path and query as sent.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub target: String,
    /// The request's id.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// HTTP status; 0 for bytes.
    pub status: u16,
    /// gRPC status.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grpc_status: Option<i32>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'static str>,
    /// Attempts beyond the first.
    #[serde(skip_serializing_if = "is_zero")]
    pub retries: u32,
    /// Bytes of bodies from the caller.
    pub bytes_sent: u64,
    /// Bytes of bodies to the caller.
    pub bytes_received: u64,
    /// From the first byte to the last, in microseconds.
    pub duration_us: u64,
    /// The mesh's part of it.
    pub mesh_us: u64,
}

fn is_zero(count: &u32) -> bool {
    *count == 0
}

impl Line {
    /// The line of a request that arrives now.
    pub fn of_request(side: &'static str, source: &str, head: &RequestHead) -> Self {
        let protocol = match head.version {
            Version::Http10 | Version::Http11 => "http1",
            Version::Http2 if head.is_grpc() => "grpc",
            Version::Http2 => "http2",
        };
        Self {
            method: head.method.to_string(),
            authority: head.authority().to_owned(),
            target: head.target().to_owned(),
            id: head
                .fields
                .get(Known::RequestId)
                .map(|id| String::from_utf8_lossy(id).into_owned())
                .unwrap_or_default(),
            ..Self::new(side, source, protocol)
        }
    }

    /// The line of a request that cannot be read.
    pub fn unread(side: &'static str, source: &str, spoken: Spoken) -> Self {
        let protocol = match spoken {
            Spoken::Http1 => "http1",
            Spoken::Http2 => "http2",
        };
        Self::new(side, source, protocol)
    }

    /// The line of a connection of bytes that arrives now.
    pub fn of_connection(side: &'static str, source: &str) -> Self {
        Self::new(side, source, "tcp")
    }

    fn new(side: &'static str, source: &str, protocol: &'static str) -> Self {
        let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        Self { time, side, source: source.to_owned(), protocol, ..Self::default() }
    }
}

/// The access log: lines of JSON on standard error, written by a thread of their own.
#[derive(Clone, Debug)]
pub struct Log(SyncSender<Vec<u8>>);

impl Log {
    /// Starts the thread that writes. It ends with the last clone.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(mut to: impl Write + Send + 'static) -> std::io::Result<Self> {
        let (sender, lines) = sync_channel::<Vec<u8>>(LOG_QUEUE);
        std::thread::Builder::new().name("access-log".into()).spawn(move || {
            while let Ok(first) = lines.recv() {
                let mut batch = first;
                batch.extend(lines.try_iter().take(256).flatten());
                if to.write_all(&batch).and_then(|()| to.flush()).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self(sender))
    }

    /// Writes a line, or leaves it out when the reader of the log is too slow: the log never slows a request.
    fn write(&self, line: &Line) {
        if let Ok(mut text) = serde_json::to_vec(line) {
            if !is_harmless(&text) {
                text = escaped(&text);
            }
            text.push(b'\n');
            let _ = self.0.try_send(text);
        }
    }
}

/// Nothing but printable ASCII: what is more may be written by a caller to steer the terminal of who reads the log, or to
/// turn the order of what is shown around.
fn is_harmless(json: &[u8]) -> bool {
    json.iter().all(|byte| matches!(byte, b' '..=b'~'))
}

/// The same JSON in printable ASCII: JSON writes none of the other characters outside of strings.
fn escaped(json: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(json.len() * 2);
    for char in String::from_utf8_lossy(json).chars() {
        match char {
            ' '..='~' => out.push(char as u8),
            other => {
                for unit in other.encode_utf16(&mut [0; 2]) {
                    // Writing to memory does not fail.
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::AnswerCount;
    use bytes::Bytes;
    use sheer_core::head::ResponseHead;
    use std::future::poll_fn;

    fn edge() -> Arc<Edge> {
        Arc::default()
    }

    fn ok(body: Body) -> Response {
        Response { head: ResponseHead::new(StatusCode::OK), body }
    }

    fn only(edge: &Edge) -> AnswerCount {
        let [one] = edge.answers().try_into().unwrap();
        one
    }

    #[test]
    fn a_caller_that_leaves_is_counted() {
        let edge = edge();
        drop(Record::begin(edge.clone(), None));
        let counted = only(&edge);
        assert_eq!((counted.status, counted.reason, counted.count), (499, "client-gone", 1));
    }

    #[tokio::test]
    async fn an_answer_is_counted_once_with_its_bytes() {
        let edge = edge();
        drop(Record::begin(edge.clone(), None).finish(ok(Body::Full(Bytes::from_static(b"abc"))), false));
        assert_eq!((only(&edge).status, only(&edge).reason, only(&edge).count), (200, "", 1));
    }

    #[tokio::test]
    async fn a_stream_is_counted_when_it_ends_and_when_it_is_left() {
        // A body of two layers stands for one that streams.
        let inner =
            || Body::Metered(Box::new(Metered { body: Body::Full(Bytes::from_static(b"abc")), count: Rc::default() }));
        let (read, left) = (edge(), edge());
        let mut response = Record::begin(read.clone(), None).finish(ok(inner()), false);
        assert!(read.answers().is_empty());
        while poll_fn(|cx| response.body.poll_frame(cx)).await.is_some() {}
        drop(response);
        assert_eq!((only(&read).status, only(&read).reason), (200, ""));
        drop(Record::begin(left.clone(), None).finish(ok(inner()), false));
        assert_eq!((only(&left).status, only(&left).reason), (200, "client-gone"));
    }

    #[test]
    fn a_line_holds_no_raw_control_byte() {
        let (out, lines) = sync_channel(8);
        struct Out(SyncSender<Vec<u8>>);
        impl Write for Out {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                let _ = self.0.send(bytes.to_vec());
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let log = Log::start(Out(out)).unwrap();
        let target = "/\u{1b}[2J\"}\n\u{7f}\u{9b}1m\u{202e}\u{1f600}";
        let line = Line { target: target.into(), ..Line::of_connection("inbound", "x") };
        drop(Record::begin(edge(), Some((log, line))));
        let written = lines.recv().unwrap();
        assert!(written.strip_suffix(b"\n").unwrap().iter().all(|byte| (b' '..=b'~').contains(byte)));
        let parsed: serde_json::Value = serde_json::from_slice(&written).unwrap();
        assert_eq!((&parsed["reason"], &parsed["target"]), (&"client-gone".into(), &target.into()));
    }
}

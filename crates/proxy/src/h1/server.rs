//! The side towards a client: requests in order, one answer each, on one connection.

use bytes::{Bytes, BytesMut};
use http::{Method, StatusCode};
use sheer_core::cause::Cause;
use sheer_core::head::{Known, RequestHead, ResponseHead, Version};
use std::cell::{RefCell, RefMut};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;
use tokio::io::AsyncWrite;
use tokio::time::{Instant, Sleep, sleep};

use super::decode::Decoder;
use super::encode::{self, Asked, Encoding, Outgoing, SendFault, Sender};
use super::half_closed::{HalfClosed, Namespaces};
use super::pace::{Pace, Watch};
use super::parse::{self, Framing, ParsedRequest, Refusal};
use super::{Incoming, Upgraded, buffer};
use crate::body::{Body, BodyError, Frame, Interim, InterimSink, Length, Request, Response};
use crate::idle::Idler;
use crate::io::Io;
use crate::platform;

/// What is read and thrown away of a request that was answered before its end, so that the connection lives on.
const MAX_DRAINED: usize = 64 * 1024;

/// How long a client may take over that, and over reading the last answer before its connection is closed.
const LINGER: Duration = Duration::from_secs(2);

/// The most interim answers waiting for a client that does not read.
const MAX_INTERIM_QUEUED: usize = 32;

/// How a connection is served.
#[derive(Debug)]
pub struct Options {
    /// Take CONNECT and requests for other hosts as a forward proxy does.
    pub forward_proxy: bool,
    /// From the first byte of a head to its last.
    pub head_timeout: Duration,
    /// Between two requests.
    pub idle_timeout: Duration,
    /// How fast the client must be, where it must.
    pub pace: Option<Pace>,
    /// Ends the connection between two requests when there is no room for another.
    pub idler: Option<Idler>,
    /// Where to look whether a client that has closed its sending side still waits for its answer.
    pub clients: Namespaces,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            forward_proxy: false,
            head_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(60 * 60),
            pace: None,
            idler: None,
            clients: Arc::default(),
        }
    }
}

/// What becomes of a request.
#[derive(Debug)]
pub enum Outcome<T> {
    /// It is answered. A field `Connection: close` of the answer closes the connection after it.
    Response(Response),
    /// It is answered with this head (101, or 2xx to CONNECT), and then the connection is a tunnel to whatever `T` is.
    Tunnel(Response, T),
    /// It is not answered: the connection is closed.
    Close,
}

/// How a connection ended.
#[derive(Debug)]
pub enum Ended<T> {
    /// It is closed.
    Closed,
    /// It is a tunnel now: whoever called copies bytes.
    Tunnel(Upgraded, T),
}

/// Why a connection ended otherwise.
#[derive(Debug, thiserror::Error)]
pub enum ConnError {
    /// The client sent something that is no request. It was told so.
    #[error("request refused: {0}")]
    Refused(#[from] Refusal),
    /// The head of a request did not arrive in time. The client was told so.
    #[error("the head of a request did not arrive in time")]
    HeadTimeout,
    /// The client closed or reset before it had the whole answer.
    #[error("the client was gone before it had its answer")]
    ClientGone,
    /// The client took the answer too slowly.
    #[error("the client took the answer too slowly")]
    TooSlow,
    /// A response broke off in its body, and so did the answer to the client.
    #[error("the response broke off")]
    Response(#[source] BodyError),
    /// A response is longer or shorter than its head said, and the answer to the client broke off.
    #[error("the response has another length than its head said")]
    ResponseLength,
    /// The connection failed between requests.
    #[error("the connection failed")]
    Io(#[source] io::Error),
}

/// Serves a client's connection until it ends. `prefix` is what detection has already read.
///
/// `service` is called for one request after the other. Its future is dropped when the client goes away meanwhile; a
/// client that only closes its sending side is still served, and the connection ends with that answer. When `stop` is
/// ready, an idle connection is closed, and one in use after its answer.
///
/// # Errors
/// [`ConnError`]. The connection is closed in every case.
pub fn serve<S, T>(
    io: Io,
    prefix: BytesMut,
    options: &Options,
    stop: impl Future<Output = ()> + Unpin,
    service: S,
) -> impl Future<Output = Result<Ended<T>, ConnError>>
where
    S: AsyncFn(Request) -> Outcome<T>,
{
    // Here, since an async function would have room for what it was given beside what it makes of it.
    let link = Rc::new(Link { state: RefCell::new(State::new(io, prefix, options)) });
    serve_link(link, options, stop, service)
}

async fn serve_link<S, T>(
    link: Rc<Link>,
    options: &Options,
    mut stop: impl Future<Output = ()> + Unpin,
    service: S,
) -> Result<Ended<T>, ConnError>
where
    S: AsyncFn(Request) -> Outcome<T>,
{
    let mut pause = Pause::new(options, Pin::new(&mut stop));
    loop {
        // Nearly all connections wait here at any time. What else they do has its memory for as long as it is done: it
        // is ten times what waiting takes.
        let parsed = match poll_fn(|cx| link.state().poll_request(cx, options, &mut pause)).await {
            Ok(Some(parsed)) => parsed,
            Ok(None) => {
                Box::pin(close(&link, false)).await;
                return Ok(Ended::Closed);
            }
            Err(error) => {
                if let Some(answer) = error.refusal() {
                    Box::pin(refuse(&link, answer)).await;
                }
                return Err(error);
            }
        };
        if let Some(ended) = Box::pin(exchange(&link, parsed, &service)).await? {
            return Ok(ended);
        }
    }
}

/// Serves one request; how the connection ended, if it did.
async fn exchange<S, T>(link: &Rc<Link>, parsed: ParsedRequest, service: &S) -> Result<Option<Ended<T>>, ConnError>
where
    S: AsyncFn(Request) -> Outcome<T>,
{
    let (request, exchange) = link.begin(parsed);
    let outcome = {
        let mut service = pin!(service(request));
        poll_fn(|cx| match service.as_mut().poll(cx) {
            Poll::Ready(outcome) => Poll::Ready(Ok(outcome)),
            Poll::Pending => link.poll_meanwhile(cx, &exchange).map(Err),
        })
        .await?
    };
    match outcome {
        Outcome::Response(response) => match answer(link, response, &exchange).await? {
            true => Ok(None),
            false => Ok(Some(Ended::Closed)),
        },
        Outcome::Tunnel(response, tunnel) => {
            let upgraded = open_tunnel(link, response).await?;
            Ok(Some(Ended::Tunnel(upgraded, tunnel)))
        }
        Outcome::Close => {
            close(link, false).await;
            Ok(Some(Ended::Closed))
        }
    }
}

/// What has to be known of a request until its answer is complete.
#[derive(Debug)]
struct Exchange {
    head_only: bool,
    http10: bool,
    keep_alive: bool,
    expects_continue: bool,
}

/// Sends an answer and what it owes the request. True when the connection lives on.
async fn answer(link: &Rc<Link>, response: Response, exchange: &Exchange) -> Result<bool, ConnError> {
    let Response { head, body } = response;
    let mut sender = Sender::default();
    let asked = {
        let mut state = link.state();
        sender.out = state.take_interim();
        // A client that still waits for 100 Continue may send its body or not: nobody can know.
        let undecided = exchange.expects_continue && !state.continued && state.awaits_first_byte();
        Asked {
            no_body: exchange.head_only,
            http10: exchange.http10,
            keep_alive: exchange.keep_alive && !undecided && !state.ended,
        }
    };
    // Not while the connection is borrowed: the body may be the request's own.
    let (encoding, keep_alive) = encode::response(&head, body.length(), asked, sender.out.small());
    let ends_with_connection = encoding == Encoding::UntilClose;
    sender.begin(body, encoding);
    drop(head);
    let mut watch = None;
    let sent = poll_fn(|cx| {
        match sender.poll_send(cx, |out, cx| link.state().poll_flush(out, cx)) {
            Poll::Ready(sent) => Poll::Ready(Ok(sent)),
            Poll::Pending if link.state().poll_slow_reader(cx, &sender.out, &mut watch).is_ready() => {
                Poll::Ready(Err(ConnError::TooSlow))
            }
            // A stream may say nothing for long; its client may leave meanwhile.
            Poll::Pending => link.state().poll_hangup(cx, exchange).map(Err),
        }
    })
    .await;
    let sent = match sent {
        Ok(sent) => sent,
        Err(error) => {
            if matches!(error, ConnError::TooSlow) {
                sender.stop().failed(Cause::BodyTimeout);
                link.state().abort(true);
            }
            return Err(error);
        }
    };
    match sent {
        Ok(()) => {}
        Err(SendFault::Io(_)) => return Err(ConnError::ClientGone),
        Err(SendFault::Body(error)) => {
            link.state().abort(ends_with_connection);
            return Err(ConnError::Response(error));
        }
        Err(SendFault::Length) => {
            link.state().abort(ends_with_connection);
            return Err(ConnError::ResponseLength);
        }
    }
    drop(sender);
    let complete = link.state().decoder.is_done();
    if !keep_alive || (!complete && !drain(link).await) {
        let unread = !complete || !link.state().read.is_empty();
        close(link, unread).await;
        return Ok(false);
    }
    Ok(true)
}

/// Reads the rest of an answered request. False when it is too long, too slow, malformed or cut off.
async fn drain(link: &Link) -> bool {
    link.state().disown_upload();
    let mut deadline = pin!(sleep(LINGER));
    let mut left = MAX_DRAINED;
    poll_fn(|cx| {
        let mut state = link.state();
        loop {
            match state.poll_upload(cx) {
                Poll::Ready(None) => return Poll::Ready(true),
                Poll::Ready(Some(Ok(Frame::Data(bytes)))) if bytes.len() <= left => left -= bytes.len(),
                Poll::Ready(Some(Ok(Frame::Trailers(_)))) => {}
                Poll::Ready(Some(_)) => return Poll::Ready(false),
                Poll::Pending => return deadline.as_mut().poll(cx).map(|()| false),
            }
        }
    })
    .await
}

/// Closes the connection. With unread input the kernel would answer it with a reset that destroys the last answer on
/// its way, so then the input is read for a while after our side has been closed.
async fn close(link: &Link, unread: bool) {
    let mut deadline = pin!(sleep(LINGER));
    let mut left = MAX_DRAINED;
    let mut shut = false;
    poll_fn(|cx| {
        let mut state = link.state();
        if !shut {
            let Some(io) = &mut state.io else { return Poll::Ready(()) };
            match Pin::new(io).poll_shutdown(cx) {
                Poll::Ready(Ok(())) => shut = true,
                Poll::Ready(Err(_)) => return Poll::Ready(()),
                Poll::Pending => return deadline.as_mut().poll(cx),
            }
        }
        if !unread {
            return Poll::Ready(());
        }
        loop {
            state.read.clear();
            match state.poll_fill(cx) {
                Poll::Ready(Ok(read)) if read > 0 && read <= left => left -= read,
                Poll::Ready(_) => return Poll::Ready(()),
                Poll::Pending => return deadline.as_mut().poll(cx),
            }
        }
    })
    .await;
    link.state().io = None;
}

impl ConnError {
    /// What the client was told, if anything.
    pub fn refusal(&self) -> Option<Refusal> {
        match self {
            ConnError::Refused(refusal) => Some(*refusal),
            ConnError::HeadTimeout => Some(Refusal {
                cause: Cause::HeadTimeout,
                status: Cause::HeadTimeout.status(),
                detail: "the head of the request did not arrive in time",
            }),
            ConnError::ClientGone
            | ConnError::TooSlow
            | ConnError::Response(_)
            | ConnError::ResponseLength
            | ConnError::Io(_) => None,
        }
    }
}

async fn refuse(link: &Link, refusal: Refusal) {
    let mut head = ResponseHead::new(refusal.status);
    let reason = format!("{}; {}", refusal.cause, refusal.detail);
    // Three fields fit.
    let _ = head.fields.append("content-type", b"text/plain; charset=utf-8");
    let _ = head.fields.append(Known::SheerReason.as_str(), reason.as_bytes());
    if refusal.status == StatusCode::METHOD_NOT_ALLOWED {
        let _ = head.fields.append("allow", b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS");
    }
    let body = Body::from(Bytes::from(format!("{reason}\n")));
    let mut sender = Sender::default();
    sender.out = link.state().take_interim();
    let asked = Asked { no_body: false, http10: false, keep_alive: false };
    let (encoding, _) = encode::response(&head, body.length(), asked, sender.out.small());
    sender.begin(body, encoding);
    let mut deadline = pin!(sleep(LINGER));
    let sent = poll_fn(|cx| match sender.poll_send(cx, |out, cx| link.state().poll_flush(out, cx)) {
        Poll::Ready(sent) => Poll::Ready(sent.is_ok()),
        Poll::Pending => deadline.as_mut().poll(cx).map(|()| false),
    })
    .await;
    if sent {
        close(link, true).await;
    }
}

async fn open_tunnel(link: &Link, response: Response) -> Result<Upgraded, ConnError> {
    let mut out = link.state().take_interim();
    // CONNECT is answered without a length: what follows is the tunnel (RFC 9110, section 9.3.6).
    let asked = Asked { no_body: true, http10: false, keep_alive: true };
    encode::response(&response.head, Length::Known(0), asked, out.small());
    drop(response);
    poll_fn(|cx| link.state().poll_flush(&mut out, cx)).await.map_err(|_| ConnError::ClientGone)?;
    let mut state = link.state();
    let read = std::mem::take(&mut state.read);
    let io = state.io.take().ok_or(ConnError::ClientGone)?;
    Ok(Upgraded { io, read })
}

/// A connection, shared by the loop that serves it and the body of the request being served.
#[derive(Debug)]
struct Link {
    state: RefCell<State>,
}

#[derive(Debug)]
struct State {
    /// Gone when the connection has been closed or handed over.
    io: Option<Io>,
    read: BytesMut,
    /// Where the body of the current request ends.
    decoder: Decoder,
    /// Counts requests, so that the body of an earlier one reads nothing of a later.
    turn: u64,
    /// A byte of the current request's body has been read.
    begun: bool,
    /// `100 Continue` was sent for the current request.
    continued: bool,
    /// The client has closed its sending side.
    ended: bool,
    /// Since it has, before its answer.
    half_closed: Option<Box<HalfClosed>>,
    clients: Namespaces,
    interim: VecDeque<ResponseHead>,
    interim_out: Outgoing,
    /// Who writes interim answers, should somebody else bring one.
    writer: Option<Waker>,
    pace: Option<Pace>,
    /// Watches the current request's body.
    slow_upload: Option<Box<Watch>>,
    /// Bytes read of the current request's body, and written of its answer when that was last waited for.
    uploaded: u64,
    answered: u64,
}

impl Link {
    fn state(&self) -> RefMut<'_, State> {
        self.state.borrow_mut()
    }

    /// The request that was parsed, with its body.
    fn begin(self: &Rc<Self>, parsed: ParsedRequest) -> (Request, Exchange) {
        let ParsedRequest { head, framing, keep_alive, expects_continue } = parsed;
        let exchange = Exchange::of(&head, keep_alive, expects_continue);
        let mut state = self.state();
        state.turn += 1;
        state.begun = false;
        state.continued = false;
        state.interim.clear();
        state.decoder = Decoder::Done;
        state.slow_upload = None;
        state.uploaded = 0;
        state.answered = 0;
        let body = match framing {
            Framing::None | Framing::UntilClose => Body::Empty,
            Framing::Length(length) if length <= state.read.len() as u64 => {
                Body::Full(state.read.split_to(length as usize).freeze())
            }
            Framing::Length(length) => {
                state.decoder = Decoder::length(length);
                self.upload(&state)
            }
            Framing::Chunked => {
                state.decoder = Decoder::chunked();
                self.upload(&state)
            }
        };
        drop(state);
        let interim = if exchange.http10 { Interim::default() } else { Interim::to(self.clone()) };
        (Request { head, body, interim }, exchange)
    }

    fn upload(self: &Rc<Self>, state: &State) -> Body {
        Body::H1(Incoming::Request(Upload { link: self.clone(), turn: state.turn }))
    }

    /// While the service works: passes interim answers on, and notices a client that leaves.
    fn poll_meanwhile(&self, cx: &mut Context<'_>, exchange: &Exchange) -> Poll<ConnError> {
        let mut state = self.state();
        if state.poll_interim(cx).is_err() {
            return Poll::Ready(ConnError::ClientGone);
        }
        state.poll_hangup(cx, exchange)
    }
}

impl Exchange {
    fn of(head: &RequestHead, keep_alive: bool, expects_continue: bool) -> Self {
        Self {
            head_only: head.method == Method::HEAD,
            http10: head.version == Version::Http10,
            keep_alive,
            expects_continue,
        }
    }
}

impl InterimSink for Link {
    fn send(&self, head: ResponseHead) {
        let mut state = self.state();
        if state.interim.len() < MAX_INTERIM_QUEUED {
            state.interim.push_back(head);
        }
        if let Some(waker) = &state.writer {
            waker.wake_by_ref();
        }
    }
}

impl State {
    fn new(io: Io, read: BytesMut, options: &Options) -> Self {
        Self {
            io: Some(io),
            read,
            decoder: Decoder::Done,
            turn: 0,
            begun: false,
            continued: false,
            ended: false,
            half_closed: None,
            clients: options.clients.clone(),
            interim: VecDeque::new(),
            interim_out: Outgoing::default(),
            writer: None,
            pace: options.pace,
            slow_upload: None,
            uploaded: 0,
            answered: 0,
        }
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let Some(io) = &mut self.io else { return Poll::Ready(Ok(0)) };
        // Heads are small; bodies come in full buffers.
        let size = if self.decoder.is_done() { buffer::SMALL } else { buffer::LARGE };
        let read = ready!(buffer::poll_fill(io, &mut self.read, size, cx));
        self.ended |= matches!(read, Ok(0) | Err(_));
        Poll::Ready(read)
    }

    fn poll_flush(&mut self, out: &mut Outgoing, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Some(io) => out.poll_flush(io, cx),
            None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }

    /// Waits for the next request's head; `None` when there will be none.
    fn poll_request<F: Future<Output = ()>>(
        &mut self,
        cx: &mut Context<'_>,
        options: &Options,
        pause: &mut Pause<'_, F>,
    ) -> Poll<Result<Option<ParsedRequest>, ConnError>> {
        loop {
            // Byte by byte must cost no more than at once: parse again only when another line has arrived.
            let fresh = self.read.get(pause.searched..).unwrap_or_default();
            let worth_parsing = pause.searched == 0
                || memchr::memchr(b'\n', fresh).is_some()
                || self.read.len() > sheer_core::head::MAX_HEAD_BYTES
                // The last look says what it would have said, had all come at once.
                || self.ended && !fresh.is_empty();
            if !self.read.is_empty() && worth_parsing {
                if let Some(parsed) = parse::request(&mut self.read, options.forward_proxy, &mut pause.empty_line)? {
                    pause.over();
                    return Poll::Ready(Ok(Some(parsed)));
                }
                pause.searched = self.read.len();
            }
            if self.ended {
                let clean = self.read.is_empty();
                return Poll::Ready(if clean { Ok(None) } else { Err(ConnError::ClientGone) });
            }
            match self.poll_fill(cx) {
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(_)) if self.read.is_empty() => return Poll::Ready(Ok(None)),
                Poll::Ready(Err(_)) => return Poll::Ready(Err(ConnError::ClientGone)),
                Poll::Pending if self.read.is_empty() => return pause.poll_idle(cx).map(|()| Ok(None)),
                Poll::Pending => return pause.poll_slow_head(cx).map(|()| Err(ConnError::HeadTimeout)),
            }
        }
    }

    /// Ready when the client is gone. Reads only when no body does, and only until something is there.
    fn poll_hangup(&mut self, cx: &mut Context<'_>, exchange: &Exchange) -> Poll<ConnError> {
        if !self.decoder.is_done() {
            return Poll::Pending;
        }
        while !self.ended && self.read.is_empty() {
            match ready!(self.poll_fill(cx)) {
                Ok(0) | Ok(_) => {}
                Err(_) => return Poll::Ready(ConnError::ClientGone),
            }
        }
        if !self.ended || !self.read.is_empty() {
            return Poll::Pending;
        }
        match &self.io {
            Some(Io::Plain(client)) => {
                let half_closed = self.half_closed.get_or_insert_with(|| Box::new(HalfClosed::new(client)));
                half_closed.poll_gone(client, &self.clients, cx).map(|()| ConnError::ClientGone)
            }
            // A peer's proxy closes the whole connection when it has no use for it, unless it has announced its last
            // request.
            _ if exchange.keep_alive => Poll::Ready(ConnError::ClientGone),
            _ => Poll::Pending,
        }
    }

    fn poll_interim(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if !self.writer.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            self.writer = Some(cx.waker().clone());
        }
        let mut out = self.take_interim();
        let flushed = self.poll_flush(&mut out, cx);
        self.interim_out = out;
        match flushed {
            Poll::Ready(result) => result,
            Poll::Pending => Ok(()),
        }
    }

    /// What is still to be written of interim answers.
    fn take_interim(&mut self) -> Outgoing {
        let mut out = std::mem::take(&mut self.interim_out);
        while let Some(head) = self.interim.pop_front() {
            self.continued |= head.status == StatusCode::CONTINUE;
            let asked = Asked { no_body: true, http10: false, keep_alive: true };
            encode::response(&head, Length::Known(0), asked, out.small());
        }
        out
    }

    /// True while not one byte of the request's body has been seen.
    fn awaits_first_byte(&self) -> bool {
        !self.decoder.is_done() && !self.begun && self.read.is_empty()
    }

    /// The next part of the current request's body.
    fn poll_upload(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        loop {
            match self.decoder.decode(&mut self.read) {
                Ok(Some(frame)) => {
                    self.begun = true;
                    self.reading_passes_on(cx);
                    return Poll::Ready(Some(Ok(frame)));
                }
                Ok(None) if self.decoder.is_done() => {
                    self.reading_passes_on(cx);
                    return Poll::Ready(None);
                }
                Ok(None) => {}
                Err(detail) => return Poll::Ready(Some(Err(BodyError::Malformed(detail)))),
            }
            if self.ended {
                return Poll::Ready(Some(Err(BodyError::Truncated)));
            }
            match self.poll_fill(cx) {
                Poll::Ready(Ok(count)) => {
                    self.uploaded += count as u64;
                    if let Some(watch) = &mut self.slow_upload {
                        watch.rest();
                    }
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Some(Err(BodyError::Io(error)))),
                Poll::Pending => return self.poll_slow_upload(cx).map(|()| Some(Err(BodyError::too_slow()))),
            }
        }
    }

    /// Ready when the client sends the current request's body too slowly.
    fn poll_slow_upload(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(pace) = self.pace else { return Poll::Pending };
        let (pace, uploaded) = match self.decoder.remaining() {
            Length::Known(_) => (pace, self.uploaded),
            Length::Unknown => (Pace::OF_CONVERSATIONS, self.uploaded + self.answered),
        };
        let watch = self.slow_upload.get_or_insert_with(|| Box::new(Watch::new(pace)));
        watch.poll(cx, || uploaded)
    }

    /// Ready when the client takes what is written too slowly. While there is nothing to write it is not waited for.
    fn poll_slow_reader(&mut self, cx: &mut Context<'_>, out: &Outgoing, watch: &mut Option<Watch>) -> Poll<()> {
        let Some(pace) = self.pace else { return Poll::Pending };
        self.answered = out.written;
        if out.is_empty() {
            watch.iter_mut().for_each(Watch::rest);
            return Poll::Pending;
        }
        // The kernel takes a megabyte at once, and nothing for as long as that lasts: what has arrived is what counts.
        let socket = self.io.as_ref().and_then(Io::socket);
        let arrived = || out.written.saturating_sub(socket.map_or(0, platform::unacknowledged));
        watch.get_or_insert_with(|| Watch::new(pace)).poll(cx, arrived)
    }

    /// At the end of a body that another task has read, the loop is told to look out for the client again.
    fn reading_passes_on(&self, cx: &Context<'_>) {
        if self.decoder.is_done()
            && let Some(loop_waker) = self.writer.as_ref().filter(|waker| !waker.will_wake(cx.waker()))
        {
            loop_waker.wake_by_ref();
        }
    }

    /// The loop reads the rest of the request itself; a body that somebody still holds reads nothing more.
    fn disown_upload(&mut self) {
        self.turn += 1;
    }

    /// Ends the connection so that nobody takes a broken answer for a whole one: where the connection's end would be
    /// the answer's, with a reset.
    fn abort(&mut self, reset: bool) {
        if reset && let Some(socket) = self.io.as_ref().and_then(Io::socket) {
            // A socket that is already gone has been reset by the other side.
            let _ = socket.set_zero_linger();
        }
        self.io = None;
        self.ended = true;
    }
}

/// A request's body as it arrives. Dropped before its end, the loop reads the rest or closes the connection.
#[derive(Debug)]
pub struct Upload {
    link: Rc<Link>,
    turn: u64,
}

impl Upload {
    /// How many bytes remain.
    pub fn length(&self) -> Length {
        let state = self.link.state.borrow();
        if state.turn == self.turn { state.decoder.remaining() } else { Length::Known(0) }
    }

    /// The next part; `None` at the end.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        let mut state = self.link.state();
        if state.turn != self.turn {
            return Poll::Ready(Some(Err(BodyError::Truncated)));
        }
        state.poll_upload(cx)
    }
}

/// What a connection waits with between requests. No timer is armed for a request that comes whole.
struct Pause<'a, F> {
    stop: Pin<&'a mut F>,
    idler: Option<&'a Idler>,
    stopped: bool,
    idle_timeout: Duration,
    head_timeout: Duration,
    /// Since when the connection is idle, while it is.
    since: Option<Instant>,
    /// One timer for the connection's life, moved on only when it fires.
    idle: Option<Pin<Box<Sleep>>>,
    slow_head: Option<Pin<Box<Sleep>>>,
    /// Bytes of the head looked at so far.
    searched: usize,
    /// The empty line that may come before a request has come.
    empty_line: bool,
}

impl<'a, F: Future<Output = ()>> Pause<'a, F> {
    fn new(options: &'a Options, stop: Pin<&'a mut F>) -> Self {
        Self {
            stop,
            idler: options.idler.as_ref(),
            stopped: false,
            idle_timeout: options.idle_timeout,
            head_timeout: options.head_timeout,
            since: None,
            idle: None,
            slow_head: None,
            searched: 0,
            empty_line: false,
        }
    }

    /// A head is complete.
    fn over(&mut self) {
        self.since = None;
        self.idler.iter().for_each(|idler| idler.works());
        self.slow_head = None;
        self.searched = 0;
        self.empty_line = false;
    }

    /// Ready when an idle connection is to be closed.
    fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.stopped || self.stop.as_mut().poll(cx).is_ready() {
            self.stopped = true;
            return Poll::Ready(());
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        if self.idler.is_some_and(|idler| idler.poll_leave(cx, since).is_ready()) {
            return Poll::Ready(());
        }
        let timer = self.idle.get_or_insert_with(|| Box::pin(sleep(self.idle_timeout)));
        while timer.as_mut().poll(cx).is_ready() {
            let end = since + self.idle_timeout;
            if Instant::now() >= end {
                return Poll::Ready(());
            }
            timer.as_mut().reset(end);
        }
        Poll::Pending
    }

    /// Ready when a head takes too long.
    fn poll_slow_head(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.slow_head.get_or_insert_with(|| Box::pin(sleep(self.head_timeout))).as_mut().poll(cx)
    }
}

#[cfg(test)]
mod tests;

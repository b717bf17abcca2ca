//! Messages to bytes: one write for head and body where they are small, one vectored write otherwise.

use bytes::{Buf, Bytes, BytesMut};
use http::{Method, StatusCode};
use sheer_core::head::{Fields, Known, KnownSet, RequestHead, ResponseHead};
use std::io::{self, IoSlice, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::AsyncWrite;

use super::{buffer, decode};
use crate::body::{Body, BodyError, Frame, Length};
use crate::io::Io;

/// Parts up to this size are copied behind the head rather than written as a part of their own.
const COPIED: usize = 4 * 1024;

/// So much is collected before it is written.
const FULL: usize = 16 * 1024;

/// Fields that every hop writes itself.
const OF_THIS_HOP: KnownSet = KnownSet::of(&[
    Known::Connection,
    Known::KeepAlive,
    Known::ProxyConnection,
    Known::TransferEncoding,
    Known::Http2Settings,
]);

/// Bytes on their way into a connection.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    /// Heads, chunk sizes, small parts.
    small: BytesMut,
    /// One large part, after the small ones.
    large: Bytes,
    /// What closes the large part.
    tail: &'static [u8],
    /// Bytes that the transport took so far.
    pub(crate) written: u64,
    unflushed: bool,
}

impl Outgoing {
    /// Where heads are written to.
    pub(crate) fn small(&mut self) -> &mut BytesMut {
        if self.small.capacity() == 0 {
            self.small = buffer::take(buffer::SMALL);
        }
        &mut self.small
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.small.is_empty() && self.large.is_empty() && self.tail.is_empty()
    }

    fn has_room(&self) -> bool {
        self.large.is_empty() && self.tail.is_empty() && self.small.len() < FULL
    }

    /// Adds a part of a body. Only while there is room.
    fn push(&mut self, data: Bytes, tail: &'static [u8]) {
        if data.len() <= COPIED {
            let small = self.small();
            small.extend_from_slice(&data);
            small.extend_from_slice(tail);
        } else {
            self.large = data;
            self.tail = tail;
        }
    }

    /// Writes everything. An empty buffer is then given back.
    pub(crate) fn poll_flush(&mut self, io: &mut Io, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.is_empty() {
            let mut io = Pin::new(&mut *io);
            let count = if self.large.is_empty() && self.tail.is_empty() {
                ready!(io.as_mut().poll_write(cx, &self.small))?
            } else {
                let slices = [IoSlice::new(&self.small), IoSlice::new(&self.large), IoSlice::new(self.tail)];
                let from = usize::from(self.small.is_empty());
                ready!(io.as_mut().poll_write_vectored(cx, &slices[from..]))?
            };
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.advance(count);
            self.unflushed = true;
        }
        if self.unflushed {
            ready!(Pin::new(io).poll_flush(cx))?;
            self.unflushed = false;
            self.large = Bytes::new();
            buffer::give_back(&mut self.small);
        }
        Poll::Ready(Ok(()))
    }

    fn advance(&mut self, mut count: usize) {
        self.written += count as u64;
        let from_small = count.min(self.small.len());
        self.small.advance(from_small);
        count -= from_small;
        let from_large = count.min(self.large.len());
        self.large.advance(from_large);
        count -= from_large;
        self.tail = self.tail.get(count..).unwrap_or_default();
    }
}

/// How a body's end is told to the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// There is no body; what comes is not sent.
    None,
    /// So many bytes remain.
    Length(u64),
    /// Chunks and trailers.
    Chunked,
    /// The connection's end is the body's.
    UntilClose,
}

/// Why a message could not be sent whole.
#[derive(Debug)]
pub(crate) enum SendFault {
    /// The connection it goes to failed.
    Io(io::Error),
    /// The body it comes from failed.
    Body(BodyError),
    /// The body is longer or shorter than its head said.
    Length,
}

/// Sends one message: what is left of its head, then its body.
#[derive(Debug)]
pub(crate) struct Sender {
    pub(crate) out: Outgoing,
    body: Body,
    encoding: Encoding,
    ended: bool,
    /// Something was taken out of the body.
    touched: bool,
    /// The body broke off; what came before it is still sent.
    failed: Option<BodyError>,
}

impl Default for Sender {
    fn default() -> Self {
        Self {
            out: Outgoing::default(),
            body: Body::Empty,
            encoding: Encoding::None,
            ended: true,
            touched: false,
            failed: None,
        }
    }
}

impl Sender {
    /// Begins a message whose head has been written to `out`.
    pub(crate) fn begin(&mut self, body: Body, encoding: Encoding) {
        self.body = body;
        self.encoding = encoding;
        self.ended = false;
        self.touched = false;
        self.failed = None;
    }

    /// Stops sending. The body comes back when nothing was taken out of it.
    pub(crate) fn stop_untouched(&mut self) -> Option<Body> {
        let body = self.stop();
        (!self.touched).then_some(body)
    }

    /// Stops sending. The body is dropped, what was not written is forgotten.
    pub(crate) fn stop(&mut self) -> Body {
        self.ended = true;
        self.out = Outgoing::default();
        std::mem::take(&mut self.body)
    }

    /// True when the whole message has been handed to the transport.
    pub(crate) fn is_done(&self) -> bool {
        self.ended && self.out.is_empty() && !self.out.unflushed
    }

    /// Sends what can be sent; ready when the message is complete. `flush` writes `Outgoing` to the connection: the
    /// connection is not borrowed while the body is polled, because the body may need it.
    pub(crate) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        mut flush: impl FnMut(&mut Outgoing, &mut Context<'_>) -> Poll<io::Result<()>>,
    ) -> Poll<Result<(), SendFault>> {
        loop {
            let mut starved = false;
            while !self.ended && !starved && self.failed.is_none() && self.out.has_room() {
                match self.body.poll_frame(cx) {
                    Poll::Ready(Some(Ok(frame))) => {
                        self.touched = true;
                        self.encode(frame)?;
                    }
                    Poll::Ready(Some(Err(error))) => self.failed = Some(error),
                    Poll::Ready(None) => self.finish(None)?,
                    Poll::Pending => starved = true,
                }
            }
            match flush(&mut self.out, cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(SendFault::Io(error))),
                Poll::Pending => {
                    // The other direction must not wait for this one.
                    self.body.poll_progress(cx);
                    return Poll::Pending;
                }
            }
            if let Some(error) = self.failed.take() {
                return Poll::Ready(Err(SendFault::Body(error)));
            }
            if self.ended {
                return Poll::Ready(Ok(()));
            }
            if starved {
                return Poll::Pending;
            }
        }
    }

    fn encode(&mut self, frame: Frame) -> Result<(), SendFault> {
        let data = match frame {
            Frame::Data(data) => data,
            Frame::Trailers(fields) => return self.finish(Some(&fields)),
        };
        match &mut self.encoding {
            Encoding::None => {}
            Encoding::UntilClose => self.out.push(data, b""),
            Encoding::Length(remaining) => {
                *remaining = remaining.checked_sub(data.len() as u64).ok_or(SendFault::Length)?;
                self.out.push(data, b"");
            }
            Encoding::Chunked if data.is_empty() => {}
            Encoding::Chunked => {
                write_hex(self.out.small(), data.len());
                self.out.push(data, b"\r\n");
            }
        }
        Ok(())
    }

    fn finish(&mut self, trailers: Option<&Fields>) -> Result<(), SendFault> {
        self.ended = true;
        self.body = Body::Empty;
        match self.encoding {
            Encoding::Length(remaining) if remaining > 0 => return Err(SendFault::Length),
            Encoding::Chunked => {
                let small = self.out.small();
                small.extend_from_slice(b"0\r\n");
                if let Some(fields) = trailers {
                    write_trailers(fields, small);
                }
                small.extend_from_slice(b"\r\n");
            }
            Encoding::None | Encoding::Length(_) | Encoding::UntilClose => {}
        }
        Ok(())
    }
}

fn write_trailers(fields: &Fields, out: &mut BytesMut) {
    for (name, value, known) in fields.iter() {
        let forbidden = std::str::from_utf8(name).is_ok_and(|name| decode::forbidden_in_trailers(known, name));
        if forbidden || memchr::memchr3(b'\r', b'\n', 0, value).is_some() {
            continue;
        }
        out.extend_from_slice(name);
        out.extend_from_slice(b": ");
        out.extend_from_slice(value);
        out.extend_from_slice(b"\r\n");
    }
}

/// Writes a request head, and says how its body is to follow.
pub(crate) fn request(head: &RequestHead, body: Length, out: &mut BytesMut) -> Encoding {
    let upgrade = head.fields.get(Known::Upgrade).is_some();
    out.extend_from_slice(head.method.as_str().as_bytes());
    out.extend_from_slice(b" ");
    out.extend_from_slice(match head.target() {
        "" => b"/",
        target => target.as_bytes(),
    });
    out.extend_from_slice(b" HTTP/1.1\r\n");
    if head.fields.get(Known::Host).is_none() {
        out.extend_from_slice(b"Host: ");
        out.extend_from_slice(head.authority().as_bytes());
        out.extend_from_slice(b"\r\n");
    }
    let encoding = match body {
        Length::Known(0) => Encoding::None,
        Length::Known(length) => Encoding::Length(length),
        Length::Unknown => Encoding::Chunked,
    };
    let said = match encoding {
        // An explicit zero is kept; it is added where a body would be expected (RFC 9110, section 8.6).
        Encoding::None => match head.fields.get(Known::ContentLength) {
            Some(b"0") => Said::AsItShould,
            _ if matches!(head.method, Method::POST | Method::PUT | Method::PATCH) => Said::Otherwise,
            Some(_) => Said::TooMuch,
            None => Said::AsItShould,
        },
        other => said_length(&head.fields, other),
    };
    head.fields
        .write_lines(out, if said == Said::AsItShould { OF_THIS_HOP } else { OF_THIS_HOP.with(Known::ContentLength) });
    match encoding {
        Encoding::Chunked => out.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
        Encoding::Length(length) if said == Said::Otherwise => write_length(out, length),
        Encoding::None if said == Said::Otherwise => write_length(out, 0),
        _ => {}
    }
    out.extend_from_slice(if upgrade { b"Connection: Upgrade\r\n\r\n" } else { b"\r\n" });
    encoding
}

/// What the client's side of the connection asks of a response.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    /// No body may follow, whatever the head says.
    pub(crate) no_body: bool,
    /// The client speaks HTTP/1.0: no chunks.
    pub(crate) http10: bool,
    /// The client wants the connection to live on.
    pub(crate) keep_alive: bool,
}

/// Writes a response head. Says how its body is to follow, and whether the connection lives on.
pub(crate) fn response(head: &ResponseHead, body: Length, asked: Asked, out: &mut BytesMut) -> (Encoding, bool) {
    let status = head.status;
    let bodiless = status.is_informational() || status == StatusCode::NO_CONTENT;
    let encoding = match body {
        _ if asked.no_body || bodiless || status == StatusCode::NOT_MODIFIED => Encoding::None,
        Length::Known(length) => Encoding::Length(length),
        Length::Unknown if asked.http10 => Encoding::UntilClose,
        Length::Unknown => Encoding::Chunked,
    };
    let close_wanted = head.fields.has_token(Known::Connection, "close");
    let keep_alive = asked.keep_alive && encoding != Encoding::UntilClose && !close_wanted;
    write_status_line(status, out);
    let said = match encoding {
        Encoding::None if bodiless => Said::TooMuch,
        // The length of what a GET would have brought.
        Encoding::None => Said::AsItShould,
        other => said_length(&head.fields, other),
    };
    let mut skip = if said == Said::AsItShould { OF_THIS_HOP } else { OF_THIS_HOP.with(Known::ContentLength) };
    let switching = status == StatusCode::SWITCHING_PROTOCOLS;
    if !switching && status != StatusCode::UPGRADE_REQUIRED {
        skip = skip.with(Known::Upgrade);
    }
    head.fields.write_lines(out, skip);
    match encoding {
        Encoding::Chunked => out.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
        Encoding::Length(length) if said == Said::Otherwise => write_length(out, length),
        _ => {}
    }
    let connection: &[u8] = match () {
        () if switching => b"Connection: Upgrade\r\n\r\n",
        () if status.is_informational() => b"\r\n",
        () if !keep_alive => b"Connection: close\r\n\r\n",
        () if asked.http10 => b"Connection: keep-alive\r\n\r\n",
        () => b"\r\n",
    };
    out.extend_from_slice(connection);
    (encoding, keep_alive)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Said {
    /// The fields state the length as it will be sent, or rightly none.
    AsItShould,
    /// The right length has to be written in place of what is there.
    Otherwise,
    /// What is there has to go.
    TooMuch,
}

fn said_length(fields: &Fields, encoding: Encoding) -> Said {
    let mut values = fields.values(Known::ContentLength);
    let (first, second) = (values.next(), values.next());
    match encoding {
        Encoding::Length(length) => {
            let right = first.is_some_and(|value| {
                std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()) == Some(length)
            });
            if right && second.is_none() { Said::AsItShould } else { Said::Otherwise }
        }
        Encoding::None | Encoding::Chunked | Encoding::UntilClose => {
            if first.is_none() {
                Said::AsItShould
            } else {
                Said::TooMuch
            }
        }
    }
}

fn write_status_line(status: StatusCode, out: &mut BytesMut) {
    if status == StatusCode::OK {
        out.extend_from_slice(b"HTTP/1.1 200 OK\r\n");
        return;
    }
    out.extend_from_slice(b"HTTP/1.1 ");
    out.extend_from_slice(status.as_str().as_bytes());
    out.extend_from_slice(b" ");
    out.extend_from_slice(status.canonical_reason().unwrap_or_default().as_bytes());
    out.extend_from_slice(b"\r\n");
}

fn write_length(out: &mut BytesMut, length: u64) {
    let mut digits = [0; 20];
    let mut writer = &mut digits[..];
    // Twenty digits hold every u64.
    let _ = write!(writer, "{length}");
    let left = writer.len();
    out.extend_from_slice(b"Content-Length: ");
    out.extend_from_slice(&digits[..20 - left]);
    out.extend_from_slice(b"\r\n");
}

fn write_hex(out: &mut BytesMut, size: usize) {
    let mut digits = [0; 16];
    let mut writer = &mut digits[..];
    let _ = write!(writer, "{size:x}");
    let left = writer.len();
    out.extend_from_slice(&digits[..16 - left]);
    out.extend_from_slice(b"\r\n");
}

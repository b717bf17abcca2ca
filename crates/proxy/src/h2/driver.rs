//! Reads and writes one connection.

use super::connection::State;
use super::frame::{HEADER, Header, MAX_PAYLOAD, PREFACE};
use super::stream::Shared;
use super::{Code, Error, PING_INTERVAL};
use crate::h1::buffer;
use crate::io::Io;
use bytes::{Buf, BytesMut};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::AsyncWrite;
use tokio::time::{Instant, Sleep};

/// How often one poll reads before others have their turn.
const READS: usize = 16;

/// How long the peer may take to close when the last word is ours. Until then what it still sends is read, since a
/// socket that is closed with bytes unread takes back what was written.
const LINGER: Duration = Duration::from_secs(1);

/// What is read of a peer that has been told that the connection is over.
const LINGER_BYTES: usize = 1024 * 1024;

/// The socket of a connection and what was read from it.
pub(super) struct Driver {
    shared: Shared,
    io: Io,
    buffer: BytesMut,
    /// What is still to come of the client's first bytes.
    preface: &'static [u8],
    /// Something was read since the last beat.
    heard: bool,
    /// When the peer is asked whether it lives. A connection without streams has none.
    beat: Option<Pin<Box<Sleep>>>,
}

impl Driver {
    /// The driver of a server's connection, of which some bytes have been read already.
    pub(super) fn of_server(shared: Shared, io: Io, prefix: BytesMut) -> Self {
        Self { shared, io, buffer: prefix, preface: PREFACE, heard: false, beat: None }
    }

    /// The driver of a client's connection.
    pub(super) fn of_client(shared: Shared, io: Io) -> Self {
        Self { shared, io, buffer: BytesMut::new(), preface: &[], heard: false, beat: None }
    }

    /// Reads what has come and writes what is to go. Ready when requests have come, or when the connection is over.
    ///
    /// # Errors
    /// It ended other than in order. Everybody who works for one of its streams has been told.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Event, Error>> {
        let progress = match self.keep_time(cx) {
            Ok(()) => self.progress(cx),
            Err(error) => Poll::Ready(Err(error)),
        };
        match progress {
            Poll::Ready(Ok(event)) => Poll::Ready(Ok(event)),
            Poll::Ready(Err(error)) => {
                self.shared.borrow_mut().close(&error);
                Poll::Ready(Err(error))
            }
            Poll::Pending => {
                self.shared.borrow_mut().driver_waits(cx.waker());
                Poll::Pending
            }
        }
    }

    fn keep_time(&mut self, cx: &mut Context<'_>) -> Result<(), Error> {
        let state = self.shared.borrow();
        let busy = state.streams() > 0 || state.is_leaving() || state.owes();
        drop(state);
        if self.beat.is_none() && busy {
            self.beat = Some(Box::pin(tokio::time::sleep(PING_INTERVAL)));
        }
        while let Some(beat) = &mut self.beat
            && beat.as_mut().poll(cx).is_ready()
        {
            if !busy {
                self.beat = None;
            } else if self.shared.borrow_mut().beat(std::mem::take(&mut self.heard)) {
                beat.as_mut().reset(Instant::now() + PING_INTERVAL);
            } else {
                return Err(Error::Silent);
            }
        }
        Ok(())
    }

    fn progress(&mut self, cx: &mut Context<'_>) -> Poll<Result<Event, Error>> {
        for _ in 0..READS {
            self.take_frames()?;
            if self.shared.borrow().has_news() {
                return Poll::Ready(Ok(Event::Requests));
            }
            // Nothing is read of a client that does not read. A client always does, so that never both of them wait.
            if self.shared.borrow().is_backlogged() && self.poll_write(cx)?.is_pending() {
                return Poll::Pending;
            }
            match buffer::poll_fill(&mut self.io, &mut self.buffer, buffer::LARGE, cx)? {
                Poll::Ready(0) => return Poll::Ready(self.ended()),
                Poll::Ready(_) => self.heard = true,
                Poll::Pending => {
                    let written = self.poll_write(cx)?;
                    // What there is to say at the end is said when it is finished.
                    let is_done = written.is_ready() && self.shared.borrow_mut().is_done();
                    return if is_done { Poll::Ready(Ok(Event::Done)) } else { Poll::Pending };
                }
            }
        }
        // Others have their turn; then it goes on here.
        let _ = self.poll_write(cx)?;
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// The peer has closed. Whether something was lost with it, its streams know.
    fn ended(&mut self) -> Result<Event, Error> {
        let mut state = self.shared.borrow_mut();
        let lost = state.streams() > 0;
        state.close(&Error::Closed);
        if lost || !self.buffer.is_empty() { Err(Error::Closed) } else { Ok(Event::Done) }
    }

    fn take_frames(&mut self) -> Result<(), Error> {
        if !self.preface.is_empty() {
            let count = self.preface.len().min(self.buffer.len());
            if self.buffer[..count] != self.preface[..count] {
                return Err(Error::protocol("not the preface of HTTP/2"));
            }
            self.buffer.advance(count);
            self.preface = &self.preface[count..];
        }
        if self.buffer.len() < HEADER {
            return Ok(());
        }
        let mut state = self.shared.borrow_mut();
        while let Some(header) = Header::of(&self.buffer) {
            if header.length > MAX_PAYLOAD {
                return Err(Error::Protocol { code: Code::FRAME_SIZE_ERROR, detail: "a frame of more than 16 KiB" });
            }
            if self.buffer.len() < HEADER + header.length {
                self.buffer.reserve(HEADER + header.length - self.buffer.len());
                return Ok(());
            }
            self.buffer.advance(HEADER);
            state.frame(header, &mut self.buffer)?;
        }
        Ok(())
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, Error> {
        let state = &mut *self.shared.borrow_mut();
        let written = state.out.poll_write(&mut self.io, cx);
        if state.out.has_room() {
            state.wake_queue();
        }
        match written {
            Poll::Ready(done) => done.map(Poll::Ready).map_err(Error::Io),
            Poll::Pending => Ok(Poll::Pending),
        }
    }

    /// Says the last words and waits, not for long, until the peer has closed.
    pub(super) async fn finish(mut self) {
        let last_words = std::future::poll_fn(|cx| self.poll_finish(cx));
        // A peer that does not close is left.
        let _ = tokio::time::timeout(LINGER, last_words).await;
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let state: &mut State = &mut self.shared.borrow_mut();
        ready!(state.out.poll_write(&mut self.io, cx))?;
        ready!(Pin::new(&mut self.io).poll_shutdown(cx))?;
        let mut left = LINGER_BYTES;
        while left > 0 {
            self.buffer.clear();
            match ready!(buffer::poll_fill(&mut self.io, &mut self.buffer, buffer::LARGE, cx))? {
                0 => break,
                read => left = left.saturating_sub(read),
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // Who ends the connection's task ends what is under way on it: nobody would read or write for it any more.
        self.shared.borrow_mut().close(&Error::Closed);
    }
}

/// What a driver returns for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Requests have come, or were refused.
    Requests,
    /// The connection is over, in order.
    Done,
}

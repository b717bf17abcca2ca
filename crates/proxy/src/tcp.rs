//! Bytes between two connections, both ways, each end passed on as what it is.
//!
//! A side that closes its sending half closes the other's; a reset resets the other, and so does a relay that is given up
//! before its sides have closed. Nothing is held for an idle
//! connection: bytes are read into a buffer of the worker's and written on at once, and only what the other side does
//! not take is kept. A reset is passed on also while its side is not read from, because it has closed before or because
//! the other side is slow. Urgent bytes are bytes like others, in their place.

mod broken;

use crate::io::Io;
use crate::metrics::Edge;
use broken::Broken;
use bytes::{Buf, Bytes};
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io::{self, Read};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What is read at once: four full TLS records.
const CHUNK: usize = 64 * 1024;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; CHUNK].into_boxed_slice());
}

/// Bytes passed on so far.
#[derive(Debug, Default)]
pub struct Counts {
    /// From the first connection to the second.
    pub sent: Cell<u64>,
    /// From the second to the first.
    pub received: Cell<u64>,
    /// What counts them as they pass: a connection may last for months.
    edge: Option<Arc<Edge>>,
}

impl Counts {
    /// Bytes that count on an edge as they pass.
    pub fn on(edge: Arc<Edge>) -> Self {
        Self { edge: Some(edge), ..Self::default() }
    }

    /// Counts bytes that were passed on before there was a relay.
    pub fn sent(&self, count: usize) {
        self.add(Way::Out, count);
    }

    fn add(&self, way: Way, count: usize) {
        let count = count as u64;
        let (total, sent, received) = match way {
            Way::Out => (&self.sent, count, 0),
            Way::Back => (&self.received, 0, count),
        };
        total.set(total.get() + count);
        if let Some(edge) = &self.edge {
            edge.bytes(sent, received);
        }
    }
}

/// Which way bytes go: from the first connection to the second, or the other way.
#[derive(Clone, Copy, Debug)]
enum Way {
    Out,
    Back,
}

/// Copies until both sides have closed. What was already read from either side goes out first.
///
/// # Errors
/// When either side is reset or breaks; both are then reset, so that neither takes the end for a proper one. So are they
/// when the future is dropped.
pub async fn relay(
    (near, read_near): (&mut Io, Bytes),
    (far, read_far): (&mut Io, Bytes),
    counts: &Counts,
) -> io::Result<()> {
    let (mut out, mut back) = (Direction::new(Way::Out, read_near), Direction::new(Way::Back, read_far));
    let mut sides = Sides { near, far, closed: false };
    let copied = poll_fn(|cx| {
        let Sides { near, far, .. } = &mut sides;
        let sent = out.poll(cx, near, far, counts).inspect_err(|_| back.pass_last_words(cx, far, near, counts))?;
        let received = back.poll(cx, far, near, counts).inspect_err(|_| out.pass_last_words(cx, near, far, counts))?;
        if sent.is_ready() && received.is_ready() {
            return Poll::Ready(Ok::<(), io::Error>(()));
        }
        out.look_after(cx, near)?;
        back.look_after(cx, far)?;
        Poll::Pending
    });
    let copied = copied.await;
    sides.closed = copied.is_ok();
    copied
}

/// The two sides of a relay.
struct Sides<'a> {
    near: &'a mut Io,
    far: &'a mut Io,
    /// Both have closed in order.
    closed: bool,
}

impl Drop for Sides<'_> {
    fn drop(&mut self) {
        if !self.closed {
            reset(self.near);
            reset(self.far);
        }
    }
}

/// Makes the connection end with a reset when it is dropped.
pub fn reset(io: &Io) {
    if let Some(socket) = io.socket() {
        // A socket that is gone already needs no reset.
        let _ = socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO));
    }
}

/// One direction of a relay.
struct Direction {
    way: Way,
    /// Read and not yet taken by the other side.
    kept: Bytes,
    phase: Phase,
    unflushed: bool,
    /// Looks after the source while nothing is read from it.
    broken: Broken,
    /// The source's readiness does not tell yet whether there are bytes.
    untold: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Phase {
    Copying,
    /// The source has closed; the destination is to learn it.
    Closing,
    Closed,
}

impl Direction {
    fn new(way: Way, kept: Bytes) -> Self {
        Self { way, kept, phase: Phase::Copying, unflushed: false, broken: Broken::default(), untold: true }
    }

    fn poll(&mut self, cx: &mut Context<'_>, from: &mut Io, to: &mut Io, counts: &Counts) -> io::Result<Poll<()>> {
        loop {
            if !self.kept.is_empty() {
                match Pin::new(&mut *to).poll_write(cx, &self.kept)? {
                    Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Poll::Ready(written) => {
                        self.kept.advance(written);
                        self.unflushed = true;
                        counts.add(self.way, written);
                        continue;
                    }
                    Poll::Pending => return Ok(Poll::Pending),
                }
            }
            match self.phase {
                Phase::Copying => match self.pass_on(cx, from, to, counts)? {
                    Poll::Ready(()) => {}
                    Poll::Pending => {
                        if self.unflushed && Pin::new(&mut *to).poll_flush(cx)?.is_ready() {
                            self.unflushed = false;
                        }
                        return Ok(Poll::Pending);
                    }
                },
                Phase::Closing => match Pin::new(&mut *to).poll_shutdown(cx) {
                    Poll::Ready(Ok(())) => self.phase = Phase::Closed,
                    // The other side is gone for good: there is nobody to tell.
                    Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::NotConnected => {
                        self.phase = Phase::Closed;
                    }
                    Poll::Ready(Err(error)) => return Err(error),
                    Poll::Pending => return Ok(Poll::Pending),
                },
                Phase::Closed => return Ok(Poll::Ready(())),
            }
        }
    }

    /// Fails when the source was reset while nothing was read from it.
    fn look_after(&mut self, cx: &mut Context<'_>, from: &Io) -> io::Result<()> {
        match (self.phase, self.kept.is_empty()) {
            (Phase::Copying, true) => {
                self.broken.rest();
                Ok(())
            }
            // A destination that is slow for a moment is nothing special.
            (Phase::Copying, false) => self.broken.poll(cx, from, true),
            (Phase::Closing | Phase::Closed, _) => self.broken.poll(cx, from, false),
        }
    }

    /// Passes on what the source said before the relay broke, as far as the destination takes it. An end of the source is
    /// none now: the break may have been told to the other direction already.
    fn pass_last_words(&mut self, cx: &mut Context<'_>, from: &mut Io, to: &mut Io, counts: &Counts) {
        while self.phase == Phase::Copying && self.kept.is_empty() {
            if !matches!(self.pass_on(cx, from, to, counts), Ok(Poll::Ready(()))) {
                return;
            }
        }
    }

    /// Reads once and writes what was read, keeping what the other side does not take.
    fn pass_on(&mut self, cx: &mut Context<'_>, from: &mut Io, to: &mut Io, counts: &Counts) -> io::Result<Poll<()>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let Poll::Ready(count) = poll_read(from, scratch, &mut self.untold, cx)? else { return Ok(Poll::Pending) };
            let read = scratch.get(..count).unwrap_or_default();
            if read.is_empty() {
                self.phase = Phase::Closing;
                return Ok(Poll::Ready(()));
            }
            let written = match Pin::new(to).poll_write(cx, read)? {
                Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(written) => written,
                Poll::Pending => 0,
            };
            self.unflushed = true;
            counts.add(self.way, written);
            self.kept = Bytes::copy_from_slice(&read[written..]);
            Ok(Poll::Ready(()))
        })
    }
}

/// Reads what there is, 0 at the end of the stream.
///
/// A read ends before an urgent byte although more is there, and the runtime takes a read that did not fill its buffer
/// for the last one: so what comes after it would stay unread. Plain sockets are read until the kernel says that there
/// is nothing, and the first time without asking the runtime, since somebody has read from them before.
fn poll_read(from: &mut Io, buffer: &mut [u8], untold: &mut bool, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
    let Io::Plain(stream) = from else {
        let mut buffer = ReadBuf::new(buffer);
        return Pin::new(from).poll_read(cx, &mut buffer).map_ok(|()| buffer.filled().len());
    };
    if *untold {
        match (&*socket2::SockRef::from(&*stream)).read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => *untold = false,
            read => return Poll::Ready(read),
        }
    }
    loop {
        std::task::ready!(stream.poll_read_ready(cx))?;
        match stream.try_read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            read => return Poll::Ready(read),
        }
    }
}

#[cfg(test)]
mod tests;

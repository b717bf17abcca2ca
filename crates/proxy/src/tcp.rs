//! Bytes between two connections, both ways, each end passed on as what it is.
//!
//! A side that closes its sending half closes the other's; a reset resets the other, and so does a relay that is given up
//! before its sides have closed. Nothing is held for an idle
//! connection: bytes are read into a buffer of the worker's and written on at once, and only what the other side does
//! not take is kept.

use crate::io::Io;
use crate::metrics::Edge;
use bytes::{Buf, Bytes};
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
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
        let sent = out.poll(cx, near, far, counts)?;
        let received = back.poll(cx, far, near, counts)?;
        match (sent, received) {
            (Poll::Ready(()), Poll::Ready(())) => Poll::Ready(Ok::<(), io::Error>(())),
            _ => Poll::Pending,
        }
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
        Self { way, kept, phase: Phase::Copying, unflushed: false }
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

    /// Reads once and writes what was read, keeping what the other side does not take.
    fn pass_on(&mut self, cx: &mut Context<'_>, from: &mut Io, to: &mut Io, counts: &Counts) -> io::Result<Poll<()>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            if Pin::new(from).poll_read(cx, &mut buffer)?.is_pending() {
                return Ok(Poll::Pending);
            }
            let read = buffer.filled();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::loopback;
    use std::rc::Rc;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::task::{JoinHandle, LocalSet, spawn_local};

    /// Client, server, and a relay between them.
    async fn relayed() -> (TcpStream, TcpStream, JoinHandle<io::Result<()>>, Rc<Counts>) {
        let (client, near) = loopback().await;
        let (far, server) = loopback().await;
        let counts = Rc::new(Counts::default());
        let held = counts.clone();
        let relay = spawn_local(async move {
            let (mut near, mut far) = (Io::tcp(near)?, Io::tcp(far)?);
            relay((&mut near, Bytes::from_static(b"first ")), (&mut far, Bytes::new()), &held).await
        });
        (client, server, relay, counts)
    }

    #[tokio::test]
    async fn each_half_closes_on_its_own() {
        let test = async {
            let (mut client, mut server, relay, counts) = relayed().await;
            let sent = vec![7u8; 5_000_000];
            let (request, answer) = (sent.clone(), sent.clone());
            let echo = spawn_local(async move {
                let mut got = Vec::new();
                server.read_to_end(&mut got).await.unwrap();
                assert!(got.strip_prefix(b"first ").unwrap() == request);
                server.write_all(&answer).await.unwrap();
            });
            client.write_all(&sent).await.unwrap();
            client.shutdown().await.unwrap();
            let mut got = Vec::new();
            client.read_to_end(&mut got).await.unwrap();
            assert!(got == sent);
            echo.await.unwrap();
            relay.await.unwrap().unwrap();
            assert_eq!((counts.sent.get(), counts.received.get()), (5_000_006, 5_000_000));
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test]
    async fn bytes_count_on_the_edge_while_the_connection_lasts() {
        let test = async {
            let edge: Arc<Edge> = Arc::default();
            let (mut client, near) = loopback().await;
            let (far, mut server) = loopback().await;
            let counts = Counts::on(edge.clone());
            let relay = spawn_local(async move {
                let (mut near, mut far) = (Io::tcp(near)?, Io::tcp(far)?);
                relay((&mut near, Bytes::new()), (&mut far, Bytes::new()), &counts).await
            });
            client.write_all(b"question").await.unwrap();
            server.read_exact(&mut [0; 8]).await.unwrap();
            server.write_all(b"yes").await.unwrap();
            client.read_exact(&mut [0; 3]).await.unwrap();
            assert_eq!(edge.counted_bytes(), (8, 3));
            assert!(!relay.is_finished());
            relay.abort();
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test]
    async fn a_relay_that_is_given_up_is_reset_on_both_sides() {
        let test = async {
            let (mut client, mut server, relay, _) = relayed().await;
            server.read_exact(&mut [0; 6]).await.unwrap();
            relay.abort();
            for side in [&mut client, &mut server] {
                assert_eq!(side.read_u8().await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
            }
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test]
    async fn a_reset_stays_a_reset() {
        let test = async {
            let (client, mut server, relay, _) = relayed().await;
            let mut first = [0; 6];
            server.read_exact(&mut first).await.unwrap();
            socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
            drop(client);
            let error = server.read_u8().await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
            assert!(relay.await.unwrap().is_err());
        };
        LocalSet::new().run_until(test).await;
    }
}

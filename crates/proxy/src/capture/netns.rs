//! Sockets made inside the workload's namespace: how a proxy outside reaches the application.
//!
//! The keeper of the namespace hands them out unconnected and in batches, over a socket that the supervisor passes to
//! each proxy in turn. A request names a family and a number, a reply names the family of what it carries, so that a
//! reply that a dead proxy asked for serves its successor.

use super::rules::{DELIVERY_V4, DELIVERY_V6};
use crate::platform::{self, MAX_PASSED};
use parking_lot::Mutex;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use tokio::io::Interest;
use tokio::net::{TcpSocket, TcpStream, UnixStream};

/// How many sockets one request asks for. An application connection is pooled, so a batch lasts; an idle socket costs
/// about 2 KiB of kernel memory and a proxy keeps at most two batches of each family.
const BATCH: u8 = 16;
/// With fewer in stock than this, the next batch is asked for ahead of need.
const LOW: usize = 4;
/// When nothing came for so long, the batch is asked for again. The keeper answers within microseconds.
const ASK_AGAIN: std::time::Duration = std::time::Duration::from_millis(100);

/// One message on the socket to the keeper, in both directions: a family and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// IPv6 rather than IPv4.
    pub v6: bool,
    /// How many sockets are wanted, or come with this message.
    pub count: u8,
}

impl Batch {
    /// The message's bytes.
    pub fn encode(self) -> [u8; 2] {
        [if self.v6 { 6 } else { 4 }, self.count]
    }

    /// Reads a message; `None` for any other bytes.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [family @ (4 | 6), count] if usize::from(*count) <= MAX_PASSED => {
                Some(Self { v6: *family == 6, count: *count })
            }
            _ => None,
        }
    }
}

#[derive(Debug, Default)]
struct Stock {
    ready: Vec<OwnedFd>,
    asked: bool,
}

#[derive(Debug)]
struct Shared {
    keeper: OwnedFd,
    /// IPv4, IPv6.
    stock: Mutex<[Stock; 2]>,
}

/// Gives sockets made inside the workload's namespace. Clones share one stock; each runtime that uses it needs a clone
/// of its own from [`SocketSource::attach`].
#[derive(Clone, Debug)]
pub struct SocketSource {
    shared: Arc<Shared>,
}

/// A [`SocketSource`] registered with the runtime of one worker.
#[derive(Debug)]
pub struct AttachedSource {
    shared: Arc<Shared>,
    /// A message socket, registered through the type of a stream socket: only readiness is asked of it.
    keeper: UnixStream,
}

impl SocketSource {
    /// Takes the keeper's socket, as in [`crate::plan::Plan::namespace_sockets`].
    pub fn new(keeper: OwnedFd) -> Self {
        Self { shared: Arc::new(Shared { keeper, stock: Mutex::default() }) }
    }

    /// Registers with the runtime of the calling task.
    ///
    /// # Errors
    /// When the descriptor cannot be duplicated or registered.
    pub fn attach(&self) -> io::Result<AttachedSource> {
        let own = std::os::unix::net::UnixStream::from(self.shared.keeper.try_clone()?);
        own.set_nonblocking(true)?;
        let keeper = UnixStream::from_std(own)?;
        Ok(AttachedSource { shared: self.shared.clone(), keeper })
    }
}

impl AttachedSource {
    /// An unconnected, unbound socket of the namespace. Cancel safe.
    ///
    /// # Errors
    /// `BrokenPipe` when the keeper is gone; the workload is then, too.
    pub async fn socket(&self, v6: bool) -> io::Result<TcpSocket> {
        loop {
            if let Some(socket) = self.take(v6)? {
                return Ok(socket);
            }
            if self.receive()? {
                continue;
            }
            // Another worker may read what makes it readable; the stock is looked at again after each wake. Another
            // proxy, which takes this one's place or leaves it, may take what was meant for this one: it is asked again.
            match tokio::time::timeout(ASK_AGAIN, self.keeper.readable()).await {
                Ok(readable) => readable?,
                Err(_) => self.shared.stock.lock()[usize::from(v6)].asked = false,
            }
        }
    }

    /// Connects to the application at `address` inside the namespace. Loopback is dialled from the delivery address.
    ///
    /// # Errors
    /// As of connect(2), and as [`AttachedSource::socket`].
    pub async fn connect(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let socket = self.socket(address.is_ipv6()).await?;
        if address.ip().is_loopback() {
            // Many connections may share the source port as long as their destinations differ.
            socket2::SockRef::from(&socket).set_tcp_nodelay(true)?;
            no_port_at_bind(&socket);
            socket.bind(match address {
                SocketAddr::V4(_) => SocketAddr::new(DELIVERY_V4.into(), 0),
                SocketAddr::V6(_) => SocketAddr::new(DELIVERY_V6.into(), 0),
            })?;
        }
        socket.connect(address).await
    }

    fn take(&self, v6: bool) -> io::Result<Option<TcpSocket>> {
        let mut stock = self.shared.stock.lock();
        let stock = &mut stock[usize::from(v6)];
        let taken = stock.ready.pop();
        if stock.ready.len() < LOW && !stock.asked {
            platform::send_with(self.shared.keeper.as_fd(), &Batch { v6, count: BATCH }.encode(), &[])?;
            stock.asked = true;
        }
        // `TcpSocket` takes over the descriptor; it neither connects nor binds it.
        Ok(taken.map(|socket| TcpSocket::from_std_stream(std::net::TcpStream::from(socket))))
    }

    /// Whether a batch came in.
    fn receive(&self) -> io::Result<bool> {
        let (mut message, mut sockets) = ([0; 8], Vec::new());
        let read = self.keeper.try_io(Interest::READABLE, || {
            platform::receive_with(self.shared.keeper.as_fd(), &mut message, &mut sockets, false)
        });
        match read {
            Ok(0) => Err(io::Error::new(io::ErrorKind::BrokenPipe, "the keeper of the workload's namespace is gone")),
            Ok(length) => {
                if let Some(batch) = Batch::decode(&message[..length]) {
                    let mut stock = self.shared.stock.lock();
                    let stock = &mut stock[usize::from(batch.v6)];
                    stock.asked = false;
                    // What a predecessor asked for may come on top.
                    sockets.truncate((2 * usize::from(BATCH)).saturating_sub(stock.ready.len()));
                    stock.ready.append(&mut sockets);
                }
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Leaves the choice of the source port to connect(2), which knows the destination. Without it (a kernel that does not
/// know the option) the port is chosen at bind(2), which works until about 28,000 connections are open.
fn no_port_at_bind(socket: &TcpSocket) {
    let _ = nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::IpBindAddressNoPort, &true);
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::os::fd::BorrowedFd;
    use std::time::Duration;

    /// Answers requests as the keeper does, from this namespace.
    fn stand_in(socket: OwnedFd) -> std::thread::JoinHandle<usize> {
        std::thread::spawn(move || {
            let (mut message, mut none, mut answered) = ([0; 8], Vec::new(), 0);
            while let Ok(length @ 1..) = platform::receive_with(socket.as_fd(), &mut message, &mut none, true) {
                let batch = Batch::decode(&message[..length]).unwrap();
                let domain = if batch.v6 { socket2::Domain::IPV6 } else { socket2::Domain::IPV4 };
                let made: Vec<_> = (0..batch.count)
                    .map(|_| socket2::Socket::new(domain, socket2::Type::STREAM.nonblocking(), None).unwrap())
                    .collect();
                let borrowed: Vec<BorrowedFd<'_>> = made.iter().map(|socket| socket.as_fd()).collect();
                platform::send_with(socket.as_fd(), &batch.encode(), &borrowed).unwrap();
                answered += 1;
            }
            answered
        })
    }

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)
            .unwrap()
    }

    #[tokio::test]
    async fn a_delivery_comes_from_its_own_address() {
        let (here, there) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let keeper = stand_in(there);
        let source = SocketSource::new(here).attach().unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut open = Vec::new();
        for _ in 0..40 {
            open.push(source.connect(listener.local_addr().unwrap()).await.unwrap());
            let (_, peer) = listener.accept().await.unwrap();
            assert_eq!(peer.ip(), DELIVERY_V4);
        }
        drop(source);
        assert!((3..=4).contains(&keeper.join().unwrap()), "batches, not single sockets");
    }

    /// While one proxy takes another's place both ask over the same socket, and either may read any answer.
    #[tokio::test]
    async fn a_batch_that_another_proxy_took_is_asked_for_again() {
        let (here, there) = pair();
        let source = SocketSource::new(here.try_clone().unwrap()).attach().unwrap();
        let keeper = std::thread::spawn(move || {
            // The first request and its answer are lost.
            let (mut message, mut none) = ([0; 8], Vec::new());
            while platform::receive_with(there.as_fd(), &mut message, &mut none, false).is_err() {
                std::thread::yield_now();
            }
            nix::fcntl::fcntl(&there, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty())).unwrap();
            stand_in(there).join().unwrap()
        });
        tokio::time::timeout(Duration::from_secs(5), source.socket(false)).await.expect("it is asked again").unwrap();
        drop((source, here));
        assert_eq!(keeper.join().unwrap(), 1);
    }

    #[tokio::test]
    async fn a_dead_keeper_is_an_error_not_a_wait() {
        let (here, there) = pair();
        let source = SocketSource::new(here).attach().unwrap();
        drop(there);
        let waited = tokio::time::timeout(Duration::from_secs(5), source.socket(false)).await;
        assert!(waited.expect("no wait").is_err());
    }

    #[test]
    fn messages() {
        for batch in [Batch { v6: false, count: 16 }, Batch { v6: true, count: 1 }] {
            assert_eq!(Batch::decode(&batch.encode()), Some(batch));
        }
        for bad in [&[][..], &[4], &[5, 1], &[4, 255], &[4, 1, 1]] {
            assert_eq!(Batch::decode(bad), None);
        }
    }
}

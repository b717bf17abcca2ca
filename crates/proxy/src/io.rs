//! The byte streams that connections run over: one concrete type, so that nothing on the request path is boxed.

use crate::tls;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// A connection to a client or to an endpoint.
#[derive(Debug)]
pub enum Io {
    /// Plain TCP.
    Plain(TcpStream),
    /// TLS over TCP, either side of it. Boxed because its keys are a kilobyte and most connections have none.
    Tls(Box<tls::Stream>),
    /// A unix socket.
    Unix(UnixStream),
    /// A pipe inside the process: a test double for a network.
    Duplex(DuplexStream),
}

impl Io {
    /// Plain TCP with small writes sent at once (`TCP_NODELAY`): the codecs batch what belongs together themselves.
    ///
    /// # Errors
    /// The socket refuses the option, which happens when it is already gone.
    pub fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Io::Plain(stream))
    }

    /// The address of the other side, where there is one.
    pub fn peer_addr(&self) -> Option<SocketAddr> {
        self.socket().and_then(|socket| socket.peer_addr().ok())
    }

    /// The address of this side, where there is one.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.socket().and_then(|socket| socket.local_addr().ok())
    }

    /// The TCP socket below, with TLS or without.
    pub fn socket(&self) -> Option<&TcpStream> {
        match self {
            Io::Plain(stream) => Some(stream),
            Io::Tls(stream) => Some(stream.socket()),
            Io::Unix(_) | Io::Duplex(_) => None,
        }
    }

    /// Whether bytes pass TLS, which has its own idea of how many are sent.
    pub fn is_tls(&self) -> bool {
        matches!(self, Io::Tls(_))
    }
}

impl From<DuplexStream> for Io {
    fn from(stream: DuplexStream) -> Self {
        Io::Duplex(stream)
    }
}

macro_rules! each {
    ($io:expr, $stream:ident => $call:expr) => {
        match $io.get_mut() {
            Io::Plain($stream) => $call,
            Io::Tls($stream) => $call,
            Io::Unix($stream) => $call,
            Io::Duplex($stream) => $call,
        }
    };
}

impl AsyncRead for Io {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => Pin::new(stream).poll_read(cx, buffer))
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        each!(self, stream => Pin::new(stream).poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self, stream => Pin::new(stream).poll_write_vectored(cx, slices))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Io::Plain(stream) => stream.is_write_vectored(),
            Io::Tls(stream) => stream.is_write_vectored(),
            Io::Unix(stream) => stream.is_write_vectored(),
            Io::Duplex(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}

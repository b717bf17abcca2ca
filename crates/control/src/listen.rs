//! The doors of the proxies: TLS on the network, and the unix socket `control.sock`. Both lead to one gRPC server.

use crate::Control;
use crate::attest::{Line, Origin, Peer};
use crate::seldom::Seldom;
use crate::tls::Door;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

/// Connections at a time: two for each of 10 000 proxies, while they change from one to the next.
const MAX_CONNECTIONS: usize = 20_000;
/// Handshakes at a time; a herd of 200 fits, a flood waits in the listen queue.
const MAX_HANDSHAKES: usize = 256;
/// What a peer without a certificate may take: it asks for one, and comes back with it.
const STRANGER: Duration = Duration::from_secs(60);
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Streams of one connection: a proxy opens three.
const MAX_STREAMS: u32 = 64;
/// Largest message of a proxy: telemetry of all its edges.
const MAX_MESSAGE: usize = 4 << 20;
/// A proxy whose host vanished is noticed within three seconds.
const PING: Duration = Duration::from_secs(1);
const PONG: Duration = Duration::from_secs(2);

/// A connection of a proxy.
pub(crate) struct Connection {
    io: Io,
    peer: Peer,
    /// When a stranger's connection is cut.
    end: Option<Pin<Box<Sleep>>>,
    _permit: OwnedSemaphorePermit,
}

enum Io {
    Tls(Box<TlsStream<Watched<TcpStream>>>),
    Unix(Watched<UnixStream>),
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

/// Notes when the other end closes or resets, as opposed to falling silent.
struct Watched<S> {
    inner: S,
    line: Arc<Line>,
}

impl<S> Drop for Watched<S> {
    fn drop(&mut self) {
        self.line.dropped.store(true, Ordering::Release);
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let (before, room) = (buffer.filled().len(), buffer.remaining());
        let result = Pin::new(&mut self.inner).poll_read(cx, buffer);
        let closed = match &result {
            Poll::Ready(Ok(())) => room > 0 && buffer.filled().len() == before,
            Poll::Ready(Err(error)) => hung_up(error),
            Poll::Pending => false,
        };
        if closed {
            self.line.closed.store(true, Ordering::Release);
        }
        result
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write(cx, bytes);
        if matches!(&result, Poll::Ready(Err(error)) if hung_up(error)) {
            self.line.closed.store(true, Ordering::Release);
        }
        result
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

fn hung_up(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.end.as_mut().is_some_and(|end| end.as_mut().poll(cx).is_ready()) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        match &mut self.io {
            Io::Tls(io) => Pin::new(io).poll_read(cx, buffer),
            Io::Unix(io) => Pin::new(io).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Tls(io) => Pin::new(io).poll_write(cx, bytes),
            Io::Unix(io) => Pin::new(io).poll_write(cx, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Tls(io) => Pin::new(io).poll_flush(cx),
            Io::Unix(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Tls(io) => Pin::new(io).poll_shutdown(cx),
            Io::Unix(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
}

/// Where accepted connections go.
#[derive(Clone)]
pub(crate) struct Doorway {
    connections: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
    out: mpsc::Sender<io::Result<Connection>>,
    /// Handshakes that fail are logged.
    failures: Arc<Seldom>,
}

/// A doorway, and the connections that came through it.
pub(crate) fn doorway() -> (Doorway, ReceiverStream<io::Result<Connection>>) {
    // The server takes connections as fast as they come: a handful may wait.
    let (out, connections) = mpsc::channel(16);
    let doorway = Doorway {
        connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        handshakes: Arc::new(Semaphore::new(MAX_HANDSHAKES)),
        out,
        failures: Arc::default(),
    };
    (doorway, ReceiverStream::new(connections))
}

impl Doorway {
    /// Accepts proxies over TLS until the doorway closes.
    pub(crate) async fn accept_tls(self, listener: TcpListener, acceptor: TlsAcceptor, door: Arc<Door>) {
        loop {
            let Ok(permit) = self.connections.clone().acquire_owned().await else { return };
            let Ok(handshake) = self.handshakes.clone().acquire_owned().await else { return };
            let Some((stream, address)) = accepted(listener.accept().await).await else { continue };
            let (acceptor, door, out) = (acceptor.clone(), door.clone(), self.out.clone());
            let failures = self.failures.clone();
            tokio::spawn(async move {
                let _handshake = handshake;
                match tokio::time::timeout(HANDSHAKE, greet(stream, address, acceptor, door)).await {
                    Ok(Ok((io, peer))) => {
                        let stranger = matches!(peer.origin, Origin::Remote { certificate: None });
                        let end = stranger.then(|| Box::pin(tokio::time::sleep(STRANGER)));
                        // Closed when the control plane stops.
                        let _ = out.send(Ok(Connection { io, peer, end, _permit: permit })).await;
                    }
                    failed => {
                        if let Some(left_out) = failures.admit() {
                            let error = failed.err().map_or("it took longer than 10 s".to_owned(), |it| it.to_string());
                            tracing::info!(%address, %error, left_out, "a proxy's handshake failed");
                        }
                    }
                }
            });
            if self.out.is_closed() {
                return;
            }
        }
    }

    /// Accepts proxies of this host until the doorway closes.
    pub(crate) async fn accept_unix(self, listener: UnixListener) {
        loop {
            let Ok(permit) = self.connections.clone().acquire_owned().await else { return };
            let Some((stream, _)) = accepted(listener.accept().await).await else { continue };
            let Ok(credentials) = stream.peer_cred() else { continue };
            let line = Arc::new(Line::default());
            let peer = Peer { origin: Origin::Local { uid: credentials.uid() }, address: None, line: line.clone() };
            let io = Io::Unix(Watched { inner: stream, line });
            if self.out.send(Ok(Connection { io, peer, end: None, _permit: permit })).await.is_err() {
                return;
            }
        }
    }
}

/// A failed accept costs the one connection; when descriptors ran out, waiting a little keeps the loop from spinning.
pub(crate) async fn accepted<T>(result: io::Result<T>) -> Option<T> {
    match result {
        Ok(accepted) => Some(accepted),
        Err(error) => {
            tracing::warn!(%error, "a connection could not be accepted");
            tokio::time::sleep(Duration::from_millis(50)).await;
            None
        }
    }
}

async fn greet(
    stream: TcpStream,
    address: SocketAddr,
    acceptor: TlsAcceptor,
    door: Arc<Door>,
) -> io::Result<(Io, Peer)> {
    stream.set_nodelay(true)?;
    let line = Arc::new(Line::default());
    let stream = acceptor.accept(Watched { inner: stream, line: line.clone() }).await?;
    let certificate = door.peer(stream.get_ref().1.peer_certificates());
    let peer = Peer { origin: Origin::Remote { certificate }, address: Some(address), line };
    Ok((Io::Tls(Box::new(stream)), peer))
}

/// Serves gRPC on all connections that come, until `stop`.
pub(crate) async fn serve(
    control: Arc<Control>,
    connections: ReceiverStream<io::Result<Connection>>,
    stop: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    use crate::certify::service::identity_server::IdentityServer;
    use crate::fleet::service::fleet_server::FleetServer;
    use crate::push::service::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;

    let discovery = crate::push::Discovery { control: control.clone() };
    let identity = crate::certify::Identity { control: control.clone() };
    let fleet = crate::fleet::FleetService { control };
    tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(PING))
        .http2_keepalive_timeout(Some(PONG))
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_header_list_size(16 * 1024)
        .add_service(AggregatedDiscoveryServiceServer::new(discovery).max_decoding_message_size(MAX_MESSAGE))
        .add_service(IdentityServer::new(identity).max_decoding_message_size(64 * 1024))
        .add_service(FleetServer::new(fleet).max_decoding_message_size(MAX_MESSAGE))
        .serve_with_incoming_shutdown(connections, stop)
        .await
}

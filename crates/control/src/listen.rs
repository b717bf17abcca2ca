//! The doors of the proxies: TLS on the network, and the unix socket `control.sock`. Both lead to one gRPC server.

use crate::Control;
use crate::attest::{self, Origin, Peer};
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
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;
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
    io: Box<dyn Line>,
    peer: Peer,
    /// When a stranger's connection is cut.
    end: Option<Pin<Box<Sleep>>>,
    _permit: OwnedSemaphorePermit,
}

/// Bytes to a proxy and back.
pub trait Line: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Line for T {}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

/// Notes when the other end closes or resets, as opposed to falling silent.
struct Watched<S> {
    inner: S,
    line: Arc<attest::Line>,
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
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// Where accepted connections go.
#[derive(Clone)]
pub(crate) struct Doorway {
    acceptor: TlsAcceptor,
    door: Arc<Door>,
    connections: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
    out: mpsc::Sender<io::Result<Connection>>,
    /// Handshakes that fail are logged.
    failures: Arc<Seldom>,
}

/// A doorway, and the connections that came through it.
pub(crate) fn doorway(acceptor: TlsAcceptor, door: Arc<Door>) -> (Doorway, ReceiverStream<io::Result<Connection>>) {
    // The server takes connections as fast as they come: a handful may wait.
    let (out, connections) = mpsc::channel(16);
    let doorway = Doorway {
        acceptor,
        door,
        connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        handshakes: Arc::new(Semaphore::new(MAX_HANDSHAKES)),
        out,
        failures: Arc::default(),
    };
    (doorway, ReceiverStream::new(connections))
}

impl Doorway {
    /// Accepts proxies over TLS until the doorway closes.
    pub(crate) async fn accept_tls(self, listener: TcpListener) {
        loop {
            let Ok(permit) = self.connections.clone().acquire_owned().await else { return };
            let Ok(handshake) = self.handshakes.clone().acquire_owned().await else { return };
            let Some((stream, address)) = accepted(listener.accept().await).await else { continue };
            if stream.set_nodelay(true).is_err() {
                // It has gone already.
                continue;
            }
            let doorway = self.clone();
            tokio::spawn(async move {
                let _handshake = handshake;
                doorway.greet(stream, address, permit).await;
            });
            if self.out.is_closed() {
                return;
            }
        }
    }

    /// Takes one that was accepted elsewhere.
    pub(crate) async fn take_tls(&self, stream: impl Line + 'static, address: SocketAddr) {
        let Ok(permit) = self.connections.clone().acquire_owned().await else { return };
        let Ok(_handshake) = self.handshakes.clone().acquire_owned().await else { return };
        self.greet(stream, address, permit).await;
    }

    /// Takes one of a user of this host.
    pub(crate) async fn take_local(&self, stream: impl Line + 'static, uid: u32) {
        let Ok(permit) = self.connections.clone().acquire_owned().await else { return };
        self.admit_local(stream, uid, permit).await;
    }

    async fn admit_local(&self, stream: impl Line + 'static, uid: u32, permit: OwnedSemaphorePermit) {
        let line = Arc::new(attest::Line::default());
        let peer = Peer { origin: Origin::Local { uid }, address: None, line: line.clone() };
        let io = Box::new(Watched { inner: stream, line });
        // Closed when the control plane stops.
        let _ = self.out.send(Ok(Connection { io, peer, end: None, _permit: permit })).await;
    }

    async fn greet(&self, stream: impl Line + 'static, address: SocketAddr, permit: OwnedSemaphorePermit) {
        match tokio::time::timeout(HANDSHAKE, self.handshake(stream, address)).await {
            Ok(Ok((io, peer))) => {
                let stranger = matches!(peer.origin, Origin::Remote { certificate: None });
                let end = stranger.then(|| Box::pin(tokio::time::sleep(STRANGER)));
                // Closed when the control plane stops.
                let _ = self.out.send(Ok(Connection { io, peer, end, _permit: permit })).await;
            }
            failed => {
                if let Some(left_out) = self.failures.admit() {
                    let error = match failed {
                        Ok(Err(error)) => error.to_string(),
                        Ok(Ok(_)) | Err(_) => "it took longer than 10 s".to_owned(),
                    };
                    tracing::info!(%address, %error, left_out, "a proxy's handshake failed");
                }
            }
        }
    }

    async fn handshake(&self, stream: impl Line + 'static, address: SocketAddr) -> io::Result<(Box<dyn Line>, Peer)> {
        let line = Arc::new(attest::Line::default());
        let stream = self.acceptor.accept(Watched { inner: stream, line: line.clone() }).await?;
        let certificate = self.door.peer(stream.get_ref().1.peer_certificates());
        let peer = Peer { origin: Origin::Remote { certificate }, address: Some(address), line };
        Ok((Box::new(stream), peer))
    }

    /// Accepts proxies of this host until the doorway closes.
    pub(crate) async fn accept_unix(self, listener: UnixListener) {
        loop {
            let Ok(permit) = self.connections.clone().acquire_owned().await else { return };
            let Some((stream, _)) = accepted(listener.accept().await).await else { continue };
            let Ok(credentials) = stream.peer_cred() else { continue };
            self.admit_local(stream, credentials.uid(), permit).await;
            if self.out.is_closed() {
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

//! Making connections: to mesh endpoints, to the application, to places outside the mesh.

use super::endpoint::LiveEndpoint;
use super::silence::Watch;
use super::ties::{Tie, Ties};
use super::tls::{Carried, Credentials, Dialer, TlsError};
use crate::capture::netns::AttachedSource;
use crate::io::Io;
use arc_swap::ArcSwapOption;
use sheer_core::cause::Cause;
use sheer_core::identity::SpiffeId;
use sheer_core::snapshot::Hop;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long a TCP connect may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a handshake over an open connection may take: longer than a connect, since it costs the other side time
/// that it may not have at once.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long bytes sent over HTTP/2 may stay unacknowledged by a mesh peer's kernel before the connection counts as
/// broken. Only there: the option also ends a connection whose reader pauses, and a mesh peer never pauses in reading
/// HTTP/2, where each stream has a window of its own.
const SILENCE: Duration = Duration::from_secs(3);

/// The same for a request over HTTP/1 to a mesh peer, where a paused reader is told from a host that is gone.
const SILENCE_OF_REQUEST: Duration = Duration::from_secs(3);

/// The same for a connection of bytes to a mesh peer: as long as its silence is borne when it is idle. Its two sides may
/// have gone through shorter gaps of their network unharmed.
const SILENCE_OF_BYTES: Duration = Duration::from_secs(25);

/// After how long without a byte the other side's kernel is asked whether it still knows the connection.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// Makes the connections of one worker.
pub struct Connector {
    credentials: Arc<ArcSwapOption<Credentials>>,
    /// Sockets inside the workload's namespace, where it has one of its own.
    inside: Option<AttachedSource>,
    /// Connections to mesh peers that may have vanished.
    watch: Watch,
    /// Connections from and to mesh peers that may not be accepted any more.
    ties: Ties,
}

/// Who answered, and the connection as it is judged while it is open.
pub type Known = (SpiffeId, Option<Rc<Tie>>);

/// Where a connection leads.
#[derive(Clone, Debug)]
pub enum Place {
    /// A mesh endpoint.
    Endpoint(LiveEndpoint),
    /// The workload's own application.
    Application(SocketAddr),
    /// An address that is not the mesh's.
    External(SocketAddr),
}

impl Place {
    /// The address that is dialled.
    pub fn address(&self) -> SocketAddr {
        match self {
            Place::Endpoint(live) => live.endpoint.address,
            Place::Application(address) | Place::External(address) => *address,
        }
    }
}

/// A connection that was not made.
#[derive(Debug, thiserror::Error)]
#[error("{cause}")]
pub struct DialError {
    /// Why, for the caller.
    pub cause: Cause,
    /// Why, in detail.
    #[source]
    pub source: Option<DialFault>,
}

/// What stood in the way of a connection.
#[derive(Debug, thiserror::Error)]
pub enum DialFault {
    /// The connect.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The handshake.
    #[error("{0}")]
    Tls(#[from] TlsError),
    /// Somebody else answered.
    #[error("{0} answered, which is not one of the service's identities")]
    Answered(SpiffeId),
}

impl DialError {
    fn bare(cause: Cause) -> Self {
        Self { cause, source: None }
    }
}

impl Connector {
    /// A connector with these credentials, now and after each renewal.
    pub fn new(credentials: Arc<ArcSwapOption<Credentials>>, inside: Option<AttachedSource>) -> Self {
        Self { ties: Ties::new(credentials.clone()), credentials, inside, watch: Watch::default() }
    }

    /// The open connections from and to mesh peers.
    pub fn ties(&self) -> &Ties {
        &self.ties
    }

    /// Ends connections whose other side has vanished. To be called every [`super::silence::PERIOD`].
    pub fn end_vanished(&self) {
        self.watch.look();
    }

    /// The credentials now.
    pub fn credentials(&self) -> Option<Arc<Credentials>> {
        self.credentials.load_full()
    }

    /// Connects. A mesh endpoint must be one of `identities`; `sessions` keeps what resumption needs.
    ///
    /// # Errors
    /// [`DialError`].
    pub async fn connect(
        &self,
        place: &Place,
        carried: Carried,
        identities: &[SpiffeId],
        sessions: &Sessions,
    ) -> Result<(Io, Option<Known>), DialError> {
        let (address, stream) = match place {
            Place::Application(address) => (address, self.application(*address).await?),
            Place::External(address) => (address, tcp(TcpStream::connect(*address)).await?),
            Place::Endpoint(live) => {
                let address = &live.endpoint.address;
                (address, tcp(TcpStream::connect(*address)).await?)
            }
        };
        tracing::debug!(%address, "connected");
        match place {
            Place::Endpoint(live) if live.endpoint.hop == Hop::Sheer1 => {
                self.notice_silence(&stream, carried);
                self.secure(stream, &live.endpoint.server_name, carried, identities, sessions).await
            }
            _ => {
                // As for accepted connections: without it urgent bytes are lost.
                let _ = socket2::SockRef::from(&stream).set_out_of_band_inline(true);
                Ok((Io::Plain(stream), None))
            }
        }
    }

    /// A host that vanishes says nothing; its unacknowledged bytes and unanswered questions tell.
    fn notice_silence(&self, stream: &TcpStream, carried: Carried) {
        let socket = socket2::SockRef::from(stream);
        let questions = socket2::TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 3).with_retries(3);
        // Without these options the connection is only slower to break.
        let _ = socket.set_tcp_keepalive(&questions);
        match carried {
            Carried::Http1 => self.watch.add(stream, SILENCE_OF_REQUEST),
            Carried::Tcp => self.watch.add(stream, SILENCE_OF_BYTES),
            Carried::Http2 => {
                let _ = socket.set_tcp_user_timeout(Some(SILENCE));
            }
        }
    }

    async fn application(&self, address: SocketAddr) -> Result<TcpStream, DialError> {
        match &self.inside {
            Some(inside) => tcp(inside.connect(address)).await,
            None => tcp(from_delivery_address(address)).await,
        }
    }

    async fn secure(
        &self,
        stream: TcpStream,
        server_name: &Arc<str>,
        carried: Carried,
        identities: &[SpiffeId],
        sessions: &Sessions,
    ) -> Result<(Io, Option<Known>), DialError> {
        let credentials = self.credentials().ok_or_else(|| DialError::bare(Cause::NoIdentity))?;
        let dialer = sessions.dialer(&credentials);
        let handshake = timeout(HANDSHAKE_TIMEOUT, dialer.meet(stream, server_name, carried));
        let (io, peer, shown) = match handshake.await {
            Ok(Ok(made)) => made,
            Ok(Err(error)) => {
                // Whatever session was resumed is not worth keeping.
                sessions.forget();
                return Err(DialError { cause: error.cause(), source: Some(error.into()) });
            }
            Err(_) => return Err(DialError::bare(Cause::ConnectTimeout)),
        };
        if !identities.contains(&peer) {
            return Err(DialError { cause: Cause::IdentityMismatch, source: Some(DialFault::Answered(peer)) });
        }
        let tie = self.ties.add(&io, &credentials, &shown, carried, Some((peer.clone(), server_name.clone())));
        Ok((io, Some((peer, tie))))
    }
}

/// The TLS sessions with one endpoint. They end with the credentials they were made under.
#[derive(Default)]
pub struct Sessions(std::cell::RefCell<Option<(Arc<Credentials>, Rc<Dialer>)>>);

impl Sessions {
    fn dialer(&self, credentials: &Arc<Credentials>) -> Rc<Dialer> {
        let mut kept = self.0.borrow_mut();
        match &*kept {
            Some((made_under, dialer)) if Arc::ptr_eq(made_under, credentials) => dialer.clone(),
            _ => {
                let dialer = Rc::new(credentials.dialer());
                *kept = Some((credentials.clone(), dialer.clone()));
                dialer
            }
        }
    }

    fn forget(&self) {
        self.0.take();
    }
}

async fn tcp(connecting: impl Future<Output = io::Result<TcpStream>>) -> Result<TcpStream, DialError> {
    let stream = match timeout(CONNECT_TIMEOUT, connecting).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            let cause = match error.kind() {
                _ if is_without_descriptor(&error) => Cause::Overloaded,
                io::ErrorKind::ConnectionRefused => Cause::ConnectRefused,
                io::ErrorKind::TimedOut => Cause::ConnectTimeout,
                _ => Cause::ConnectFailed,
            };
            return Err(DialError { cause, source: Some(error.into()) });
        }
        Err(_) => return Err(DialError::bare(Cause::ConnectTimeout)),
    };
    stream.set_nodelay(true).map_err(|error| DialError { cause: Cause::ConnectFailed, source: Some(error.into()) })?;
    Ok(stream)
}

/// Whether this process, or the machine, has no descriptor left.
fn is_without_descriptor(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// Applications trust 127.0.0.1; peers must not inherit that. In a shared namespace the rules tell a delivery from a dial
/// of a peer by this source, whatever address of this host is connected to: without it a delivery comes back.
async fn from_delivery_address(address: SocketAddr) -> io::Result<TcpStream> {
    use crate::capture::rules::{DELIVERY_V4, DELIVERY_V6};
    let (socket, source) = match address {
        SocketAddr::V4(_) => (tokio::net::TcpSocket::new_v4()?, SocketAddr::new(DELIVERY_V4.into(), 0)),
        SocketAddr::V6(_) => (tokio::net::TcpSocket::new_v6()?, SocketAddr::new(DELIVERY_V6.into(), 0)),
    };
    // Many connections may share the source port as long as their destinations differ.
    let _ = nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::IpBindAddressNoPort, &true);
    match socket.bind(source) {
        // The supervisor gives a host this address where rules are made; without rules there is nothing to tell.
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {}
        other => other?,
    }
    socket.connect(address).await
}

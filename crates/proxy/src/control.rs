//! The way to the control plane: its addresses, and one authenticated connection to one of them.
//!
//! On the control plane's own host it is a unix socket, where the file's permissions and the peer's credentials are the
//! authentication. Elsewhere it is TLS 1.3: first with the root's hash from the join token, then with the trust bundle
//! and the proxy's own certificate.

#[cfg(test)]
pub(crate) mod fake;
mod trust;

pub use trust::Trust;

use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tonic::transport::{Channel, Endpoint};

/// Generated clients of the control plane's services.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
pub(crate) mod clients {
    include!(concat!(env!("OUT_DIR"), "/sheer.v1.Identity.rs"));
    include!(concat!(env!("OUT_DIR"), "/sheer.v1.Fleet.rs"));
    include!(concat!(env!("OUT_DIR"), "/envoy.service.discovery.v3.AggregatedDiscoveryService.rs"));
}

/// How long connecting and the handshake may take together.
const CONNECT: Duration = Duration::from_secs(5);

/// A connection that is silent for the first time is asked for a sign of life, which must come within the second.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// The largest message that is taken: an index of many thousand services in one response.
pub(crate) const MAX_MESSAGE: usize = 64 << 20;

/// Bytes to a control plane and back, before TLS.
pub trait Line: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Line for T {}

/// What the control thread has of the world outside: ways to control planes, and the time of day. It is the machine's,
/// [`Machine`], unless a test puts a simulated one in its place.
pub trait Outside: fmt::Debug + Send + Sync {
    /// Opens a connection.
    fn connect<'a>(&'a self, address: &'a Address) -> BoxFuture<'a, io::Result<Box<dyn Line>>>;

    /// The wall clock, which may jump.
    fn now(&self) -> SystemTime;
}

/// This machine's sockets and clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct Machine;

impl Outside for Machine {
    fn connect<'a>(&'a self, address: &'a Address) -> BoxFuture<'a, io::Result<Box<dyn Line>>> {
        Box::pin(async move {
            match address {
                Address::Unix(path) => Ok(Box::new(UnixStream::connect(path).await?) as Box<dyn Line>),
                Address::Tcp(text) => {
                    let stream = TcpStream::connect(text).await?;
                    stream.set_nodelay(true)?;
                    Ok(Box::new(stream) as Box<dyn Line>)
                }
            }
        })
    }

    fn now(&self) -> SystemTime {
        SystemTime::now()
    }
}

/// Where a control plane is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A unix socket on this host.
    Unix(PathBuf),
    /// `HOST:PORT`.
    Tcp(String),
}

/// A text that is no control plane's address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no control plane's address: write unix:PATH or HOST:PORT, such as mesh.example.com:15012")]
pub struct AddressError(String);

impl Address {
    /// Parses `unix:PATH` or `HOST:PORT`, with an IPv6 address in brackets.
    ///
    /// # Errors
    /// [`AddressError`].
    pub fn parse(text: &str) -> Result<Self, AddressError> {
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Address::Unix(path.into()));
        }
        let wrong = || AddressError(text.chars().take(80).collect());
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let bracketed = host.starts_with('[') && host.ends_with(']');
        let port_fits = port.parse::<u16>().is_ok_and(|port| port != 0);
        if host.is_empty() || !port_fits || (host.contains(':') && !bracketed) || host.contains('/') {
            return Err(wrong());
        }
        Ok(Address::Tcp(text.to_owned()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp(text) => f.write_str(text),
        }
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// No control plane is named.
    #[error("no control plane is named: give --control unix:PATH or HOST:PORT, or a join token")]
    NoAddress,
    /// Nothing answers there.
    #[error(
        "no control plane answers at {address} ({source}); start one with `sheer up` or `sheer control`, or mend --control"
    )]
    Unreachable {
        /// Where.
        address: Address,
        /// What the system said.
        source: io::Error,
    },
    /// This user may not connect to the socket.
    #[error("this user may not open {address}; run as the control plane's user, or join with a token")]
    Forbidden {
        /// Where.
        address: Address,
    },
    /// Its certificate does not hold at this machine's time.
    #[error(
        "the certificate of the control plane at {address} does not hold at this machine's time ({now}); set the clock, \
         then it goes on by itself"
    )]
    Clock {
        /// Where.
        address: Address,
        /// The time here.
        now: String,
    },
    /// It is not the control plane that this proxy trusts.
    #[error(
        "what answers at {address} is not the control plane that this workload trusts ({reason}); mend --control, or \
         join anew with a token of that control plane (`sheer token create`)"
    )]
    Untrusted {
        /// Where.
        address: Address,
        /// What TLS said.
        reason: String,
    },
    /// Away from the control plane's host, without certificate or token.
    #[error("{address} needs a join token for the first start: `sheer token create`, then --join-token-file F")]
    NoToken {
        /// Where.
        address: Address,
    },
    /// TLS cannot be set up with the own key or certificate.
    #[error("the own certificate cannot be used: {0}")]
    Own(rustls::Error),
}

/// Connects to a control plane once. `trust` is needed for a TCP address. When the connection ends, so does the channel.
///
/// # Errors
/// [`DialError`], in words for people.
pub async fn dial(outside: &Arc<dyn Outside>, address: &Address, trust: Option<&Trust>) -> Result<Channel, DialError> {
    let unreachable = |source| DialError::Unreachable { address: address.clone(), source };
    let connect = async {
        match address {
            Address::Unix(_) => match outside.connect(address).await {
                Ok(stream) => carry(stream).await.map_err(unreachable),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    Err(DialError::Forbidden { address: address.clone() })
                }
                Err(error) => Err(unreachable(error)),
            },
            Address::Tcp(_) => {
                let trust = trust.ok_or_else(|| DialError::NoToken { address: address.clone() })?;
                let stream = outside.connect(address).await.map_err(unreachable)?;
                let stream = trust.handshake(outside, address, stream).await?;
                carry(stream).await.map_err(unreachable)
            }
        }
    };
    match tokio::time::timeout(CONNECT, connect).await {
        Ok(connected) => connected,
        Err(_) => Err(unreachable(io::ErrorKind::TimedOut.into())),
    }
}

/// HTTP/2 over a connection that is there already.
async fn carry(stream: impl Line + 'static) -> io::Result<Channel> {
    let stream = Mutex::new(Some(TokioIo::new(stream)));
    // The channel would connect again by itself; who dials must know when a connection has ended.
    let once = tower::service_fn(move |_: http::Uri| {
        let stream = stream.lock().take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
        async move { stream }
    });
    Endpoint::from_static("http://control.mesh")
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect_with_connector(once)
        .await
        .map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!(Address::parse("unix:/run/x.sock"), Ok(Address::Unix("/run/x.sock".into())));
        for good in ["host:1", "10.0.0.1:15012", "[fd00::1]:15012"] {
            assert_eq!(Address::parse(good).map(|it| it.to_string()), Ok(good.to_owned()));
        }
        for bad in ["", "unix:", "host", "host:", "host:0", "host:x", ":1", "fd00::1", "http://host:1"] {
            assert!(Address::parse(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn what_is_wrong_with_a_socket_is_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let address = Address::Unix(directory.path().join("none.sock"));
        let machine: Arc<dyn Outside> = Arc::new(Machine);
        let error = dial(&machine, &address, None).await.err().map(|it| it.to_string()).unwrap_or_default();
        assert!(error.contains("sheer up") && error.contains("none.sock"), "{error}");
        let address = Address::Tcp("127.0.0.1:1".into());
        assert!(matches!(dial(&machine, &address, None).await, Err(DialError::NoToken { .. })));
    }
}

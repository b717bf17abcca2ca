//! The handshake, by rustls, up to the moment when the keys are agreed on.

use super::record::{self, Opener, Sealer};
use super::{Session, Stream};
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, UnbufferedStatus};
use rustls::{ClientConfig, CommonState, ConnectionTrafficSecrets, Error, HandshakeKind, NamedGroup, ServerConfig};
use std::cell::RefCell;
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// What is read at once: a flight of the handshake is shorter, its certificates included.
const CHUNK: usize = 4096;

/// The most that is kept of a peer before its handshake is done. Rustls takes messages of 64 KiB.
const MOST: usize = 64 * 1024 + record::LONGEST;

/// What the two sides agreed on, and who the peer is.
#[derive(Debug)]
pub struct Met {
    /// The peer's certificate and what signed it.
    pub certificates: Vec<CertificateDer<'static>>,
    /// What the connection carries.
    pub alpn: Option<Vec<u8>>,
    /// Whether an earlier session goes on.
    pub kind: Option<HandshakeKind>,
    /// How the key was exchanged.
    pub group: Option<NamedGroup>,
    /// At a server, the name that the client asked for, if its certificate is chosen by [`asked_for`].
    pub server_name: Option<String>,
}

thread_local! {
    static ASKED: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// To be called with the name in a client's hello by whatever chooses the server's certificate: rustls tells it nobody else.
pub fn asked_for(name: Option<&str>) {
    ASKED.with_borrow_mut(|asked| *asked = name.map(str::to_owned));
}

/// Makes a TLS connection as its server.
///
/// # Errors
/// The peer is refused or refuses, or the connection breaks. Of TLS the error's source is a [`rustls::Error`].
pub async fn accept(mut socket: TcpStream, config: Arc<ServerConfig>) -> io::Result<(Stream, Met)> {
    let mut session = UnbufferedServerConnection::new(config).map_err(invalid)?;
    let done = shake_hands(&mut session, &mut socket).await?;
    let (secrets, session) = session.dangerous_into_kernel_connection().map_err(invalid)?;
    finish(socket, done, Session::Server(session), secrets.tx, secrets.rx)
}

/// Makes a TLS connection as its client.
///
/// # Errors
/// As of [`accept`].
pub async fn connect(
    mut socket: TcpStream,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
) -> io::Result<(Stream, Met)> {
    let mut session = UnbufferedClientConnection::new(config, name).map_err(invalid)?;
    let done = shake_hands(&mut session, &mut socket).await?;
    let (secrets, session) = session.dangerous_into_kernel_connection().map_err(invalid)?;
    finish(socket, done, Session::Client(session), secrets.tx, secrets.rx)
}

fn finish(
    socket: TcpStream,
    (met, received): (Met, Vec<u8>),
    session: Session,
    tx: (u64, ConnectionTrafficSecrets),
    rx: (u64, ConnectionTrafficSecrets),
) -> io::Result<(Stream, Met)> {
    let (sealer, opener) = (Sealer::new(tx).map_err(invalid)?, Opener::new(rx).map_err(invalid)?);
    Ok((Stream::new(socket, session, sealer, opener, received), met))
}

/// An error of TLS as one of input and output.
pub(super) fn invalid(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Either side of a handshake.
trait Shaking: std::ops::Deref<Target: std::ops::Deref<Target = CommonState>> {
    type Data;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
}

impl Shaking for UnbufferedClientConnection {
    type Data = ClientConnectionData;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
}

impl Shaking for UnbufferedServerConnection {
    type Data = ServerConnectionData;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
}

/// What is to be done next.
enum Step {
    Again,
    Send,
    Receive,
    Done,
    Fail(Error),
}

/// Shakes hands and returns what was received beyond.
///
/// Rustls is shown one record more at a time and never one that it need not see: what follows the handshake is opened
/// by [`Opener`] with keys that begin at the record after it.
async fn shake_hands<S: Shaking>(session: &mut S, socket: &mut TcpStream) -> io::Result<(Met, Vec<u8>)> {
    let (mut incoming, mut outgoing) = (Vec::new(), Vec::new());
    let (mut shown, mut server_name) = (0, None);
    loop {
        let UnbufferedStatus { discard, state } = session.process(&mut incoming[..shown]);
        let step = match state {
            Ok(ConnectionState::EncodeTlsData(mut data)) => {
                encode(&mut data, &mut outgoing).map_or_else(Step::Fail, |()| Step::Again)
            }
            Ok(ConnectionState::TransmitTlsData(data)) => {
                data.done();
                Step::Send
            }
            Ok(ConnectionState::BlockedHandshake) => Step::Receive,
            Ok(ConnectionState::WriteTraffic(_)) => Step::Done,
            Ok(_) => Step::Fail(Error::HandshakeNotComplete),
            Err(error) => Step::Fail(error),
        };
        ASKED.with_borrow_mut(|asked| server_name = asked.take().or(server_name.take()));
        incoming.drain(..discard);
        shown -= discard;
        match step {
            Step::Again => {}
            Step::Send => {
                socket.write_all(&outgoing).await?;
                outgoing.clear();
            }
            Step::Done if !session.is_handshaking() => return Ok((met(session, server_name), incoming)),
            Step::Done | Step::Receive => match record::whole(&incoming[shown..]) {
                Ok(Some(record)) => shown += record,
                Ok(None) if incoming.len() > MOST => return Err(invalid(Error::PeerSentOversizedRecord)),
                Ok(None) => {
                    incoming.reserve(CHUNK);
                    if socket.read_buf(&mut incoming).await? == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                // Rustls has the words for what is wrong.
                Err(_) if shown < incoming.len() => shown = incoming.len(),
                Err(fault) => return Err(invalid(fault.error)),
            },
            Step::Fail(error) => {
                // The peer is told why, if it listens. What went wrong is not shown to rustls again.
                while session.wants_write()
                    && let Ok(ConnectionState::EncodeTlsData(mut data)) = session.process(&mut incoming[..shown]).state
                    && encode(&mut data, &mut outgoing).is_ok()
                {}
                let _ = socket.write_all(&outgoing).await;
                return Err(invalid(error));
            }
        }
    }
}

fn encode<D>(data: &mut rustls::unbuffered::EncodeTlsData<'_, D>, outgoing: &mut Vec<u8>) -> Result<(), Error> {
    use rustls::unbuffered::{EncodeError, InsufficientSizeError};
    let Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) = data.encode(&mut []) else {
        return Err(Error::EncryptError);
    };
    let before = outgoing.len();
    outgoing.resize(before + required_size, 0);
    data.encode(&mut outgoing[before..]).map(|_| ()).map_err(|_| Error::EncryptError)
}

fn met(session: &CommonState, server_name: Option<String>) -> Met {
    Met {
        certificates: session
            .peer_certificates()
            .unwrap_or_default()
            .iter()
            .map(|it| it.clone().into_owned())
            .collect(),
        alpn: session.alpn_protocol().map(<[u8]>::to_vec),
        kind: session.handshake_kind(),
        group: session.negotiated_key_exchange_group().map(|group| group.name()),
        server_name,
    }
}

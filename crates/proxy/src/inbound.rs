//! Traffic to the workload.
//!
//! ```text
//! accept -> mesh peer: TLS -> port -> [request: leaving? -> identity fields -> application] or [bytes -> relay]
//!        -> plaintext: admitted? -> the same, as nobody in particular
//! published -> the same, for anybody on this host
//! ```

mod vouched;

use crate::body::{Request, Response};
use crate::connection::{self, Answer, Caller, Spoken};
use crate::detect::{self, Protocol as Detected, Turn};
use crate::drain::Phase;
use crate::error::{Audience, RequestError};
use crate::h1::pace::Pace;
use crate::io::Io;
use crate::metrics::{Edge, Protocol};
use crate::plan::Mode;
use crate::platform::original_destination;
use crate::record::{ConnectionRecord, Line, Record, refused_connection};
use crate::send::{self, Outgoing};
use crate::tcp;
use crate::upstream::dial::Place;
use crate::upstream::ties::Tie;
use crate::upstream::tls::{Accepted, Carried, TlsError};
use crate::worker::Worker;
use bytes::{Buf, Bytes, BytesMut};
use sheer_core::cause::Cause;
use sheer_core::head::{Known, Version};
use sheer_core::identity::SpiffeId;
use sheer_core::name::parse_server_name;
use sheer_core::snapshot;
use sheer_core::sniff::{Sniffed, TLS_HANDSHAKE, sniff};
use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::timeout;
use vouched::Vouched;

/// How long a peer may take to say what it speaks, and for its handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a plaintext client may be silent before its server is given the word.
const SILENCE: Duration = Duration::from_millis(50);

/// What is looked at of a first message before its connection is handed to TLS or to plaintext.
const FIRST_LOOK: usize = 16 * 1024;

thread_local! {
    /// Where first messages are looked at: who has yet to say something holds no buffer.
    static FIRST: RefCell<Box<[u8]>> = RefCell::new(vec![0; FIRST_LOOK].into_boxed_slice());
}

/// Who is at the other end.
#[derive(Clone, Debug)]
enum Who {
    /// A workload of the mesh.
    Peer(Arc<SpiffeId>),
    /// Nobody in particular: plaintext that is admitted.
    Unauthenticated,
    /// Anybody, at a published door.
    Public,
}

/// A connection to one port of the application.
struct Session {
    caller: Who,
    /// Where its requests go, or why they go nowhere.
    to: Result<Place, Cause>,
    port: u16,
    edges: Edges,
    source: String,
    /// What its requests say of their caller.
    vouched: Vouched,
    /// As it is judged while it is open; none of plaintext.
    tie: Option<Rc<Tie>>,
}

/// The edges of a connection, resolved once.
struct Edges {
    http1: Arc<Edge>,
    http2: Arc<Edge>,
    grpc: Arc<Edge>,
    tcp: Arc<Edge>,
}

/// Serves one connection at the mesh's door, or at one where plaintext means a port.
pub async fn accept(worker: Rc<Worker>, stream: TcpStream, port: Option<u16>) {
    let Ok(local) = stream.local_addr() else { return };
    let dialled = match port {
        Some(port) => SocketAddr::new(local.ip(), port),
        None => original_destination(&stream).unwrap_or_else(|| at_the_door(&worker, local)),
    };
    let may_be_plaintext = plaintext(&worker, &stream, dialled.port());
    let may_speak_first = may_be_plaintext.is_ok() && !is_client_first(&worker, dialled.port());
    let mut looked = timeout(if may_speak_first { SILENCE } else { HANDSHAKE_TIMEOUT }, first_look(&stream)).await;
    if looked.is_err() && may_speak_first && has_spoken(&stream) {
        // The rest of a greeting is on its way.
        looked = timeout(HANDSHAKE_TIMEOUT, first_look(&stream)).await;
    }
    let has_timed_out = looked.is_err();
    let is_mesh = match looked {
        // Before the handshake: the peer's proxy then knows that no byte was taken, and goes elsewhere.
        Ok(Ok(Sniffed::Tls(hello))) if hello.offers_mesh_bytes && worker.refuses() => {
            turn_away(&worker, Cause::Draining);
            return tcp::reset(&Io::Plain(stream));
        }
        Ok(Ok(Sniffed::Tls(hello))) => hello.offers_mesh,
        Ok(Ok(_)) | Err(_) => false,
        Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof && may_be_plaintext.is_ok() => false,
        Ok(Err(_)) => return,
    };
    match (is_mesh, may_be_plaintext) {
        // Each as large as it has to be.
        (true, _) => Box::pin(from_peer(worker, stream, dialled)).await,
        (false, Ok(())) => Box::pin(from_outside(worker, stream, dialled, Who::Unauthenticated)).await,
        // Who has not said in time what it speaks is not asked again.
        (false, Err(cause)) if has_timed_out => {
            turn_away(&worker, cause);
            tcp::reset(&Io::Plain(stream));
        }
        (false, Err(cause)) => Box::pin(refuse(worker, stream, cause)).await,
    }
}

/// Where a connection goes that dialled the door itself. A mesh peer names the port; plaintext cannot, so before a
/// workload in a namespace of its own it means the only port there is. Several ports have doors of their own.
fn at_the_door(worker: &Worker, local: SocketAddr) -> SocketAddr {
    match (&worker.proxy.inside, worker.proxy.plan.ports.as_slice()) {
        (Some(_), [only]) => SocketAddr::new(local.ip(), only.port),
        _ => local,
    }
}

/// Serves one connection at a published door.
pub async fn accept_published(worker: Rc<Worker>, stream: TcpStream, port: u16) {
    let dialled = SocketAddr::new([127, 0, 0, 1].into(), port);
    from_outside(worker, stream, dialled, Who::Public).await;
}

/// Reads what a connection begins with, until it is known whether that is TLS and whose, and leaves it there.
async fn first_look(stream: &TcpStream) -> io::Result<Sniffed> {
    let mut seen = 0;
    // Each arrival makes the socket ready anew, so that bytes which tell nothing yet can be waited upon.
    stream
        .async_io(Interest::READABLE, || {
            use nix::sys::socket::{MsgFlags, recv};
            use std::os::fd::AsRawFd;
            FIRST.with_borrow_mut(|buffer| {
                let count = recv(stream.as_raw_fd(), buffer, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT)?;
                if count == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                match sniff(&buffer[..count]) {
                    // What it is instead is looked at by whoever reads it, and is no reason to wait here.
                    _ if buffer[0] != TLS_HANDSHAKE => Ok(Sniffed::Opaque),
                    Sniffed::Partial if count > seen => {
                        seen = count;
                        Err(io::ErrorKind::WouldBlock.into())
                    }
                    sniffed => Ok(sniffed),
                }
            })
        })
        .await
}

/// Whether anything has arrived.
fn has_spoken(stream: &TcpStream) -> bool {
    use nix::sys::socket::{MsgFlags, recv};
    use std::os::fd::AsRawFd;
    let looked = recv(stream.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT);
    looked.is_ok_and(|count| count > 0)
}

/// Whether clients of this port speak first, as its declared protocol says.
fn is_client_first(worker: &Worker, port: u16) -> bool {
    use snapshot::Protocol::{Detect, Grpc, Http, Http2, Tcp, Tls};
    match spoken_at(worker, port) {
        Http | Http2 | Grpc | Tls => true,
        Detect | Tcp => false,
    }
}

/// Whether plaintext is admitted to a port from where it comes.
fn plaintext(worker: &Worker, stream: &TcpStream, port: u16) -> Result<(), Cause> {
    if mode(worker) != Mode::Strict {
        return Ok(());
    }
    let peer = stream.peer_addr().map_err(|_| Cause::PlaintextRefused)?;
    match worker.snapshot().workload().and_then(|workload| workload.exception(peer.ip(), port)) {
        Some(_) => Ok(()),
        None => Err(Cause::PlaintextRefused),
    }
}

/// What is enforced: as granted, or as the proxy was started before anything is.
fn mode(worker: &Worker) -> Mode {
    worker.snapshot().workload().map_or(worker.proxy.plan.mode, |workload| match workload.mode {
        snapshot::Mode::Watch => Mode::Watch,
        snapshot::Mode::Permissive => Mode::Permissive,
        snapshot::Mode::Strict => Mode::Strict,
    })
}

/// Serves a connection of a mesh peer.
async fn from_peer(worker: Rc<Worker>, stream: TcpStream, dialled: SocketAddr) {
    let Some(credentials) = worker.pools.connector().credentials() else {
        return turn_away(&worker, Cause::NoIdentity);
    };
    // Boxed, since it is over soon and takes more than what follows.
    let accepted = match timeout(HANDSHAKE_TIMEOUT, Box::pin(credentials.accept(stream))).await {
        Ok(Ok(accepted)) => accepted,
        Ok(Err(error)) => return untrusted(&worker, dialled, &error),
        Err(_) => return turn_away(&worker, Cause::TlsFailed),
    };
    let Accepted { io, peer, shown, server_name, carried } = accepted;
    let port = asked_port(&worker, &server_name);
    let vouched = Vouched::peer(&peer);
    let tie = worker.pools.connector().ties().add(&io, &credentials, &shown, carried, None);
    drop(shown);
    let session = Session { tie, ..Session::new(&worker, Who::Peer(Arc::new(peer)), vouched, port, dialled) };
    match carried {
        Carried::Http1 => Box::pin(http(worker, io, BytesMut::new(), Spoken::Http1, session)).await,
        Carried::Http2 => Box::pin(http(worker, io, BytesMut::new(), Spoken::Http2, session)).await,
        // A peer says what it carries; that requests are none is not its to say.
        Carried::Tcp => match spoken_at(&worker, port.unwrap_or_default()) {
            snapshot::Protocol::Tcp | snapshot::Protocol::Tls => {
                Box::pin(bytes(worker, io, BytesMut::new(), session, true)).await
            }
            snapshot::Protocol::Detect => Box::pin(bytes(worker, io, BytesMut::new(), session, false)).await,
            declared => Box::pin(from_client(worker, io, declared, session)).await,
        },
    }
}

fn untrusted(worker: &Worker, dialled: SocketAddr, error: &TlsError) {
    let cause = error.cause();
    tracing::info!(%cause, %dialled, %error, "a mesh connection was refused");
    turn_away(worker, cause);
}

/// Writes down a connection of nobody known.
fn turn_away(worker: &Worker, cause: Cause) {
    let line =
        worker.line(|| Line { destination: worker.source.to_string(), ..Line::of_connection("inbound", "unknown") });
    refused_connection(&worker.proxy.metrics, cause, line);
}

/// The port that a server name asks for, if this workload answers for the service and declares the port.
fn asked_port(worker: &Worker, server_name: &str) -> Result<u16, Cause> {
    let snapshot = worker.snapshot();
    let asked = parse_server_name(server_name, &snapshot.mesh().cluster_domain).ok_or(Cause::PortNotDeclared)?;
    let (port, namespace, name) = asked;
    let is_own = match snapshot.workload() {
        Some(workload) => {
            workload.services.iter().any(|it| it.namespace.as_str() == namespace && it.name.as_str() == name)
        }
        None => *worker.source == *format!("{namespace}/{name}"),
    };
    if is_own && is_declared(worker, port) { Ok(port) } else { Err(Cause::PortNotDeclared) }
}

fn is_declared(worker: &Worker, port: u16) -> bool {
    worker.proxy.plan.ports.iter().any(|it| it.port == port)
        || worker.snapshot().workload().is_some_and(|workload| workload.port(port).is_some())
}

/// Serves a connection in plaintext.
async fn from_outside(worker: Rc<Worker>, stream: TcpStream, dialled: SocketAddr, caller: Who) {
    let port = dialled.port();
    // Who watches sees all that was redirected; what was sent to the door itself would come back to it for ever.
    let is_redirected = stream.local_addr().is_ok_and(|local| local.port() != port);
    let is_watched = worker.proxy.plan.mode == Mode::Watch && is_redirected;
    let declared = if is_watched || is_declared(&worker, port) { Ok(port) } else { Err(Cause::PortNotDeclared) };
    let from = stream.peer_addr().ok().map(|peer| peer.ip());
    let vouched = Vouched::nobody(&worker.proxy.plan, mode(&worker), from);
    let session = Session::new(&worker, caller, vouched, declared, dialled);
    let declared = spoken_at(&worker, port);
    from_client(worker, Io::Plain(stream), declared, session).await;
}

/// The declared protocol of a port: as the control plane granted it, since what is written of a workload wins over how
/// its proxy was started; as the proxy was started where that says nothing.
fn spoken_at(worker: &Worker, port: u16) -> snapshot::Protocol {
    let granted = worker.snapshot().workload().and_then(|workload| workload.port(port)).map(|it| it.protocol);
    match granted {
        Some(snapshot::Protocol::Detect) | None => {
            let planned = worker.proxy.plan.ports.iter().find(|it| it.port == port);
            planned.map_or(snapshot::Protocol::Detect, |it| it.protocol.into())
        }
        Some(protocol) => protocol,
    }
}

/// Serves a connection of which it is known what it should speak.
async fn from_client(worker: Rc<Worker>, mut io: Io, declared: snapshot::Protocol, session: Session) {
    let mut prefix = BytesMut::new();
    let detected = match declared {
        snapshot::Protocol::Http2 | snapshot::Protocol::Grpc => Detected::Http2,
        snapshot::Protocol::Tcp | snapshot::Protocol::Tls => {
            return Box::pin(bytes(worker, io, prefix, session, true)).await;
        }
        snapshot::Protocol::Http => match timeout(HANDSHAKE_TIMEOUT, detect::detect(&mut io, &mut prefix)).await {
            Ok(Ok(Some(Detected::Http2))) => Detected::Http2,
            // Whatever else it is, the codec says what is wrong with it, or that it was too slow.
            Ok(Ok(Some(_))) | Err(_) => Detected::Http1,
            Ok(Ok(None) | Err(_)) => return,
        },
        snapshot::Protocol::Detect => match timeout(SILENCE, detect::detect(&mut io, &mut prefix)).await {
            Ok(Ok(Some(detected))) => detected,
            // It has nothing to say, and may still want to hear.
            Ok(Ok(None)) => return bytes(worker, io, prefix, session, true).await,
            Ok(Err(_)) => return,
            // It waits for its server to speak, or is slow.
            Err(_) => return Box::pin(bytes(worker, io, prefix, session, false)).await,
        },
    };
    match detected {
        Detected::Http1 => Box::pin(http(worker, io, prefix, Spoken::Http1, session)).await,
        Detected::Http2 => Box::pin(http(worker, io, prefix, Spoken::Http2, session)).await,
        Detected::Tls(_) | Detected::Opaque => Box::pin(bytes(worker, io, prefix, session, true)).await,
    }
}

/// Refuses a connection, in the client's own words where it speaks HTTP/1.
async fn refuse(worker: Rc<Worker>, stream: TcpStream, cause: Cause) {
    tracing::info!(%cause, peer = ?stream.peer_addr().ok(), "a connection was refused");
    let mut io = Io::Plain(stream);
    let mut prefix = BytesMut::new();
    let detected = timeout(HANDSHAKE_TIMEOUT, detect::detect(&mut io, &mut prefix)).await;
    if !matches!(detected, Ok(Ok(Some(Detected::Http1)))) {
        turn_away(&worker, cause);
        return tcp::reset(&io);
    }
    worker.proxy.metrics.refused_connection(cause);
    let own = worker.clone();
    let unread = move |spoken| {
        let line =
            own.line(|| Line { destination: own.source.to_string(), ..Line::unread("inbound", "unknown", spoken) });
        Record::begin(own.inbound_edge("unknown", Protocol::Http1, false), line)
    };
    let own = worker.clone();
    let service = async move |request: Request| {
        let caller = Caller::of(&request.head, Audience::Mesh);
        let line = own.line(|| Line {
            destination: own.source.to_string(),
            ..Line::of_request("inbound", "unknown", &request.head)
        });
        let record = Record::begin(own.inbound_edge("unknown", Protocol::Http1, false), line);
        let mut answer = connection::answer(&own, caller, record, Err(cause.into()));
        answer.close();
        answer
    };
    connection::serve(&worker, io, prefix, Spoken::Http1, Some(Pace::OF_STRANGERS), unread, service).await;
}

impl Session {
    fn new(worker: &Worker, caller: Who, vouched: Vouched, port: Result<u16, Cause>, dialled: SocketAddr) -> Self {
        let source = match &caller {
            Who::Peer(peer) => format!("{}/{}", peer.namespace(), peer.service_account()),
            Who::Unauthenticated => "unknown".to_owned(),
            Who::Public => "public".to_owned(),
        };
        let mtls = matches!(caller, Who::Peer(_));
        let edge = |protocol| worker.inbound_edge(&source, protocol, mtls);
        let edges = Edges {
            http1: edge(Protocol::Http1),
            http2: edge(Protocol::Http2),
            grpc: edge(Protocol::Grpc),
            tcp: edge(Protocol::Tcp),
        };
        // In a namespace of ours where the port is listened on, elsewhere where the peer dialled.
        let to = port.map(|port| match worker.proxy.inside {
            Some(_) => Place::Application(worker.application(port)),
            None => Place::Application(SocketAddr::new(dialled.ip(), port)),
        });
        Self { caller, to, port: port.unwrap_or_default(), edges, source, vouched, tie: None }
    }

    fn audience(&self) -> Audience {
        match self.caller {
            Who::Peer(_) | Who::Unauthenticated => Audience::Mesh,
            Who::Public => Audience::Public,
        }
    }
}

/// Serves the requests of one connection.
async fn http(worker: Rc<Worker>, io: Io, prefix: BytesMut, spoken: Spoken, session: Session) {
    let session = Rc::new(session);
    let (own, asked) = (worker.clone(), session.clone());
    let unread = move |spoken| {
        let edge = match spoken {
            Spoken::Http1 => &session.edges.http1,
            Spoken::Http2 => &session.edges.http2,
        };
        let line = own
            .line(|| Line { destination: own.source.to_string(), ..Line::unread("inbound", &session.source, spoken) });
        Record::begin(edge.clone(), line)
    };
    let pace = match asked.caller {
        Who::Peer(_) => None,
        Who::Unauthenticated | Who::Public => Some(Pace::OF_STRANGERS),
    };
    let own = worker.clone();
    let service = async move |request| serve(&own, &asked, request).await;
    connection::serve(&worker, io, prefix, spoken, pace, unread, service).await;
}

/// Serves one request to the workload. The stages run in this order.
async fn serve(worker: &Worker, session: &Session, request: Request) -> Answer {
    let (caller, mut record, mut outgoing) = begin(worker, session, request);
    let result = deliver(worker, session, &mut outgoing, &mut record).await;
    let mut answer = connection::answer(worker, caller, record, result);
    if session.tie.as_ref().is_some_and(|tie| tie.is_leaving()) {
        // Whoever calls again makes a connection under what is trusted now.
        answer.close();
    }
    match (worker.phase() >= Phase::Told, &session.caller) {
        (false, _) => {}
        // Whoever calls again finds the next proxy at the same place.
        (true, _) if worker.is_replaced() => answer.close(),
        (true, Who::Peer(_)) => answer.say_leaving(),
        (true, _) => {}
    }
    answer
}

/// Apart from [`serve`], whose future would hold what is borrowed here to its end.
fn begin(worker: &Worker, session: &Session, request: Request) -> (Caller, Record, Outgoing) {
    let caller = Caller::of(&request.head, session.audience());
    let edge = match request.head.version {
        Version::Http10 | Version::Http11 => &session.edges.http1,
        Version::Http2 if request.head.is_grpc() => &session.edges.grpc,
        Version::Http2 => &session.edges.http2,
    };
    let line = worker.line(|| Line {
        destination: worker.source.to_string(),
        ..Line::of_request("inbound", &session.source, &request.head)
    });
    let mut record = Record::begin(edge.clone(), line);
    let outgoing = Outgoing::of(request, &mut record);
    (caller, record, outgoing)
}

async fn deliver(
    worker: &Worker,
    session: &Session,
    outgoing: &mut Outgoing,
    record: &mut Record,
) -> Result<Response, RequestError> {
    if worker.refuses() {
        return Err(Cause::Draining.into());
    }
    worker.begin_request()?;
    let place = session.to.clone()?;
    session.vouched.write(&mut outgoing.head.fields)?;
    let mut response = match send::to_address(worker, place, outgoing, record).await {
        Err(error) if error.cause == Cause::ConnectRefused && worker.proxy.inside.is_some() => {
            worker.look_again(session.port);
            return Err(error);
        }
        other => other?,
    };
    response.head.fields.remove_known(&[Known::SheerReason, Known::SheerDrain]);
    Ok(response)
}

/// Carries one connection of bytes. Where it is not settled that they are no requests, those that turn out to be are
/// served as such: nobody gets identity fields past the mesh by being slow, or by calling HTTP something else.
async fn bytes(worker: Rc<Worker>, mut near: Io, mut read: BytesMut, session: Session, settled: bool) {
    let line = worker
        .line(|| Line { destination: worker.source.to_string(), ..Line::of_connection("inbound", &session.source) });
    let mut record = ConnectionRecord::begin(session.edges.tcp.clone(), line);
    let mut far = match connect(&worker, &session).await {
        Ok(far) => far,
        Err(cause) => {
            record.failed(cause);
            return tcp::reset(&near);
        }
    };
    let mut said = Bytes::new();
    if !settled {
        let spoken = match detect::turn(&mut near, &mut read, &mut far).await {
            Ok(Turn::Bytes { passed, said: first }) => {
                read.advance(passed);
                record.counts.sent(passed);
                said = first;
                None
            }
            Ok(Turn::Http1) => Some(Spoken::Http1),
            Ok(Turn::Http2) => Some(Spoken::Http2),
            Err(_) => {
                tcp::reset(&far);
                return tcp::reset(&near);
            }
        };
        if let Some(spoken) = spoken {
            record.forget();
            tcp::reset(&far);
            drop(far);
            return Box::pin(http(worker, near, read, spoken, session)).await;
        }
    }
    record.connected();
    // A reset of either side is the end that the other side has been given as well.
    if tcp::relay((&mut near, read.freeze()), (&mut far, said), &record.counts).await.is_err()
        && let Some(cause) = worker.why_ended(&near)
    {
        record.failed(cause);
    }
}

async fn connect(worker: &Worker, session: &Session) -> Result<Io, Cause> {
    if worker.refuses() {
        return Err(Cause::Draining);
    }
    let place = session.to.clone()?;
    let peer = worker.pools.peer(&place);
    worker.pools.tcp(&peer, &worker.nobody).await.map_err(|error| error.cause)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::loopback;
    use tokio::io::AsyncWriteExt;

    #[tokio::test]
    async fn what_is_no_tls_is_not_waited_for() {
        let (mut client, server) = loopback().await;
        client.write_all(b"ping").await.unwrap();
        let looked = timeout(HANDSHAKE_TIMEOUT / 2, first_look(&server)).await;
        assert_eq!(looked.expect("four bytes tell enough").unwrap(), Sniffed::Opaque);
        client.write_all(&[TLS_HANDSHAKE]).await.unwrap();
        assert_eq!(first_look(&server).await.unwrap(), Sniffed::Opaque);
    }
}

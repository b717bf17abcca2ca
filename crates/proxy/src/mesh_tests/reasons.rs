//! Every cause is provoked, and the response's header, the access log and the metrics say the same of it.

use super::certificates::{NAME, Stranger};
use super::*;
use crate::io::Io;
use crate::outbound::{self, Destination};
use crate::overload::memory::Level;
use crate::record::Log;
use bytes::BytesMut;
use rcgen::CertificateParams;
use sheer_core::cause::Cause;
use sheer_core::route::{Match, PathMatch};
use std::io::Write;
use std::sync::Mutex;
use tokio::net::TcpSocket;

/// Causes that nothing can raise yet, and why.
const UNRAISED: &[(Cause, &str, &str)] = &[];

macro_rules! provoked {
    ($($test:ident: $cause:ident;)*) => {
        const PROVOKED: &[Cause] = &[$(Cause::$cause),*];
        $(
            #[tokio::test]
            async fn $test() {
                LocalSet::new().run_until(provoke::$test(Cause::$cause)).await;
            }
        )*
    };
}

provoked! {
    bad_request: BadRequest;
    head_too_large: HeadTooLarge;
    head_timeout: HeadTimeout;
    body_timeout: BodyTimeout;
    client_gone: ClientGone;
    plaintext_refused: PlaintextRefused;
    peer_untrusted: PeerUntrusted;
    peer_expired: PeerExpired;
    peer_not_yet_valid: PeerNotYetValid;
    peer_no_workload: PeerNoWorkload;
    peer_anonymous: PeerAnonymous;
    identity_refused: IdentityRefused;
    port_not_declared: PortNotDeclared;
    unknown_destination: UnknownDestination;
    destination_forbidden: DestinationForbidden;
    unknown_port: UnknownPort;
    no_route: NoRoute;
    no_backend: NoBackend;
    no_endpoint: NoEndpoint;
    control_plane_away: ControlPlaneAway;
    draining: Draining;
    overloaded: Overloaded;
    circle: Loop;
    no_identity: NoIdentity;
    identity_mismatch: IdentityMismatch;
    tls_failed: TlsFailed;
    deadline: Deadline;
    connect_refused: ConnectRefused;
    connect_timeout: ConnectTimeout;
    connect_failed: ConnectFailed;
    upstream_reset: UpstreamReset;
    bad_response: BadResponse;
    response_truncated: ResponseTruncated;
}

/// A proxy that writes an access log.
struct Logged {
    beside: Beside,
    log: Lines,
}

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl std::ops::Deref for Logged {
    type Target = Beside;

    fn deref(&self) -> &Beside {
        &self.beside
    }
}

impl Logged {
    fn new(mut beside: Beside) -> Self {
        let log = Lines::default();
        let started = Log::start(log.clone()).unwrap();
        beside.worker = Rc::new(Worker::new(beside.proxy.clone(), Some(started)).unwrap());
        Self { beside, log }
    }

    fn reasons(&self) -> Vec<String> {
        let text = String::from_utf8(self.log.0.lock().unwrap().clone()).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.filter_map(|line| line["reason"].as_str().map(str::to_owned)).collect()
    }

    /// The access log has one line with this cause, and the metrics count it once, for this side or its connections.
    async fn wrote(&self, cause: Cause) {
        let counted = || {
            let text = self.proxy.metrics.exposition();
            let label = format!("reason=\"{cause}\"");
            let samples = text.lines().filter(|line| line.contains(&label) && !line.starts_with('#'));
            samples.filter(|line| line.split('{').next().is_some_and(|name| name.ends_with("_total"))).count()
        };
        until(&format!("{cause} is logged and counted"), || self.reasons() == [cause.reason()] && counted() > 0).await;
        for other in Cause::ALL.iter().filter(|it| **it != cause) {
            assert!(
                !self.proxy.metrics.exposition().contains(&format!("reason=\"{other}\"")),
                "{other} is counted too"
            );
        }
    }

    /// The answer names the cause, with its status, as log and metrics do.
    async fn answered(&self, answer: &str, cause: Cause) {
        assert!(answer.starts_with(&format!("HTTP/1.1 {}", cause.status().as_u16())), "{answer}");
        assert!(answer.contains(&format!("x-sheer-reason: {cause};")), "{answer}");
        self.wrote(cause).await;
    }
}

fn side(ca: &Authority, name: &str, ports: &[u16]) -> Logged {
    Logged::new(beside(ca, name, ports, Mode::Strict))
}

/// `api` calls `web`, whose application listens on this port.
async fn pair(protocol: Protocol, port: u16) -> (Logged, Logged, SocketAddr) {
    let ca = Authority::new("mesh.internal");
    let (api, web) = (side(&ca, "api", &[]), side(&ca, "web", &[port]));
    api.knows("default/web", protocol, &[(web.door(Traffic::Inbound).await, port)]);
    let door = api.door(upstream("web")).await;
    (api, web, door)
}

/// `api` alone, which thinks that `web` is there.
async fn alone(endpoints: &[SocketAddr]) -> (Logged, SocketAddr) {
    let api = side(&Authority::new("mesh.internal"), "api", &[]);
    let endpoints: Vec<_> = endpoints.iter().map(|address| (*address, 8080)).collect();
    api.knows("default/web", Protocol::Http, &endpoints);
    let door = api.door(upstream("web")).await;
    (api, door)
}

fn route(api: &Logged, matches: Vec<Match>, valid: bool, timeouts: Timeouts) {
    let web = ServiceName::parse("default/web").unwrap();
    let rule = Rule {
        route: "default/web".into(),
        index: 0,
        backends: vec![Backend { service: web.clone(), port: 80, weight: 1, valid }],
        timeouts,
        request_edits: vec![],
        response_edits: vec![],
    };
    let rule = Arc::new(rule);
    let attached = Attached { port: 80, consumer: None, hostnames: vec![], created: String::new(), matches, rule };
    let mut snapshot = Snapshot::clone(&api.proxy.snapshot.load());
    snapshot.set_routes(web, Some(Rules::new(vec![attached])));
    api.proxy.snapshot.store(Arc::new(snapshot));
}

/// An application that reads a head, answers with these bytes and closes; without any it keeps silent.
async fn saying(answer: Option<&'static [u8]>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            spawn_local(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") && stream.read_buf(&mut head).await.unwrap_or(0) > 0 {}
                match answer {
                    Some(answer) => stream.write_all(answer).await.unwrap(),
                    None => std::future::pending().await,
                }
            });
        }
    });
    port
}

async fn exchange(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

mod provoke {
    use super::*;

    /// Refused before it leaves, and also where it arrives.
    pub(super) async fn bad_request(cause: Cause) {
        let (api, _web, door) = pair(Protocol::Http, 1).await;
        let request = "GET / HTTP/1.1\r\nHost: web\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n";
        api.answered(&exchange(door, request).await, cause).await;
        let web = side(&Authority::new("mesh.internal"), "web", &[]);
        let published = web.door(Traffic::Published(1)).await;
        web.answered(&exchange(published, request).await, cause).await;
    }

    pub(super) async fn head_too_large(cause: Cause) {
        let (api, _web, door) = pair(Protocol::Http, 1).await;
        let fields: String = (0..120).map(|number| format!("X-{number}: a\r\n")).collect();
        let answer = exchange(door, &format!("GET / HTTP/1.1\r\nHost: web\r\n{fields}\r\n")).await;
        api.answered(&answer, cause).await;
    }

    pub(super) async fn head_timeout(cause: Cause) {
        let (api, _) = alone(&[]).await;
        tokio::time::pause();
        let (mut client, server) = tokio::io::duplex(1024);
        let to = Destination::Nowhere(Cause::NoEndpoint);
        spawn_local(outbound::converse(api.worker.clone(), Io::Duplex(server), BytesMut::new(), to));
        client.write_all(b"GET / HTTP/1.1\r\nHost: w").await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        tokio::time::resume();
        api.answered(&answer, cause).await;
    }

    /// Somebody whom nobody knows sends a part of what was announced.
    pub(super) async fn body_timeout(cause: Cause) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let web = side(&Authority::new("mesh.internal"), "web", &[port]);
        let door = web.door(Traffic::Published(port)).await;
        let mut stream = TcpStream::connect(door).await.unwrap();
        stream.write_all(b"POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 9\r\n\r\nabc").await.unwrap();
        let (mut application, _) = listener.accept().await.unwrap();
        let mut came = Vec::new();
        while !came.ends_with(b"abc") {
            assert!(application.read_buf(&mut came).await.unwrap() > 0);
        }
        // From here on the clock runs ahead of the kernel: all that comes has come.
        tokio::time::pause();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\n") {
            assert!(stream.read_buf(&mut answer).await.unwrap() > 0);
        }
        tokio::time::resume();
        web.answered(&String::from_utf8_lossy(&answer), cause).await;
    }

    /// Nobody is left to read a header.
    pub(super) async fn client_gone(cause: Cause) {
        let (api, web, door) = pair(Protocol::Http, saying(None).await).await;
        let mut stream = TcpStream::connect(door).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n").await.unwrap();
        // The application has it when the inbound side has an edge.
        until("it has arrived", || !web.proxy.metrics.edges().is_empty()).await;
        drop(stream);
        api.wrote(cause).await;
        web.wrote(cause).await;
    }

    pub(super) async fn plaintext_refused(cause: Cause) {
        let web = side(&Authority::new("mesh.internal"), "web", &[1]);
        let answer = get(web.door(Traffic::Inbound).await, "/").await;
        web.answered(&answer, cause).await;
    }

    /// The refused side has no connection on which it could be told; its own proxy tells the caller what it saw.
    pub(super) async fn peer_untrusted(cause: Cause) {
        let web = side(&Authority::new("mesh.internal"), "web", &[1]);
        let (api, door) = alone(&[web.door(Traffic::Inbound).await]).await;
        api.answered(&get(door, "/").await, cause).await;
        refused(|_| Stranger::signed(&Authority::new("mesh.internal"), |_| {}), cause).await;
    }

    pub(super) async fn peer_expired(cause: Cause) {
        let ended = |params: &mut CertificateParams| params.not_after = rcgen::date_time_ymd(2020, 1, 2);
        refused(|ca| Stranger::signed(ca, ended), cause).await;
    }

    pub(super) async fn peer_not_yet_valid(cause: Cause) {
        let later = |params: &mut CertificateParams| params.not_before = rcgen::date_time_ymd(2200, 1, 1);
        refused(|ca| Stranger::signed(ca, later), cause).await;
    }

    pub(super) async fn peer_no_workload(cause: Cause) {
        refused(|ca| Stranger::signed(ca, |params| params.subject_alt_names.clear()), cause).await;
    }

    /// Whoever calls; a server always presents one.
    pub(super) async fn peer_anonymous(cause: Cause) {
        let web = side(&Authority::new("mesh.internal"), "web", &[1]);
        assert_eq!(Stranger::anonymous().call(web.door(Traffic::Inbound).await, NAME).await, None);
        web.wrote(cause).await;
    }

    /// Told to the proxy that is refused, by a caller that refuses it.
    pub(super) async fn identity_refused(cause: Cause) {
        let web = side(&Authority::new("mesh.internal"), "web", &[1]);
        let (_api, door) = alone(&[web.door(Traffic::Inbound).await]).await;
        get(door, "/").await;
        web.wrote(cause).await;
    }

    /// A peer with this certificate is neither let in nor talked to.
    async fn refused(stranger: impl FnOnce(&Authority) -> Stranger, cause: Cause) {
        let ca = Authority::new("mesh.internal");
        let stranger = stranger(&ca);
        let (web, api) = (side(&ca, "web", &[1]), side(&ca, "api", &[]));
        assert_eq!(stranger.call(web.door(Traffic::Inbound).await, NAME).await, None);
        web.wrote(cause).await;
        let (address, heard) = stranger.listen().await;
        api.knows("default/web", Protocol::Http, &[(address, 1)]);
        api.answered(&get(api.door(upstream("web")).await, "/").await, cause).await;
        assert_eq!(heard.get(), 0, "a stranger was told something");
    }

    pub(super) async fn port_not_declared(cause: Cause) {
        let ca = Authority::new("mesh.internal");
        let (api, web) = (side(&ca, "api", &[]), side(&ca, "web", &[1]));
        api.knows("default/web", Protocol::Http, &[(web.door(Traffic::Inbound).await, 2)]);
        let answer = get(api.door(upstream("web")).await, "/").await;
        api.answered(&answer, cause).await;
        web.answered(&answer, cause).await;
    }

    pub(super) async fn unknown_destination(cause: Cause) {
        let (api, _) = alone(&[]).await;
        let answer = get(api.door(upstream("nobody")).await, "/").await;
        api.answered(&answer, cause).await;
    }

    pub(super) async fn destination_forbidden(cause: Cause) {
        let (api, _) = alone(&[]).await;
        let door = api.door(Traffic::Forward).await;
        let request = "GET http://127.0.0.1:22/ HTTP/1.1\r\nHost: 127.0.0.1:22\r\nConnection: close\r\n\r\n";
        api.answered(&exchange(door, request).await, cause).await;
    }

    pub(super) async fn unknown_port(cause: Cause) {
        let (api, _) = alone(&[]).await;
        let door = api.door(Traffic::Upstream(ServiceName::parse("web").unwrap(), 81)).await;
        api.answered(&get(door, "/").await, cause).await;
        // The service is known, and told.
        assert_eq!(api.counted(), [("default/api>default/web".to_owned(), 502, "unknown-port".to_owned(), 1)]);
    }

    pub(super) async fn no_route(cause: Cause) {
        let (api, door) = alone(&[]).await;
        let matches = vec![Match { path: PathMatch::Exact("/other".into()), ..Match::default() }];
        route(&api, matches, true, Timeouts::default());
        api.answered(&get(door, "/").await, cause).await;
    }

    pub(super) async fn no_backend(cause: Cause) {
        let (api, door) = alone(&[]).await;
        route(&api, vec![], false, Timeouts::default());
        api.answered(&get(door, "/").await, cause).await;
    }

    pub(super) async fn no_endpoint(cause: Cause) {
        let (api, door) = alone(&[]).await;
        api.answered(&get(door, "/").await, cause).await;
    }

    pub(super) async fn control_plane_away(cause: Cause) {
        let (api, door) = alone(&[]).await;
        api.proxy.endpoints.remove(&ServiceName::parse("web").unwrap());
        api.answered(&get(door, "/").await, cause).await;
    }

    pub(super) async fn draining(cause: Cause) {
        let (api, web, door) = pair(Protocol::Http, 1).await;
        web.leave.set(Phase::Refusing);
        let answer = get(door, "/").await;
        api.answered(&answer, cause).await;
    }

    /// No memory is left for another request.
    pub(super) async fn overloaded(cause: Cause) {
        let (api, door) = alone(&[]).await;
        let mut stream = TcpStream::connect(door).await.unwrap();
        until("it is admitted", || api.proxy.metrics.exposition().contains("sheer_clients_open 1\n")).await;
        api.proxy.overload.set_level(Level::Pressed);
        stream.write_all(b"GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        api.answered(&answer, cause).await;
    }

    pub(super) async fn no_identity(cause: Cause) {
        let (api, web, door) = pair(Protocol::Http, 1).await;
        api.proxy.credentials.store(None);
        api.answered(&get(door, "/").await, cause).await;
        assert!(web.reasons().is_empty() || web.reasons() == [Cause::TlsFailed.reason()]);
    }

    pub(super) async fn identity_mismatch(cause: Cause) {
        let ca = Authority::new("mesh.internal");
        let (api, thief) = (side(&ca, "api", &[]), side(&ca, "thief", &[1]));
        api.knows("default/web", Protocol::Http, &[(thief.door(Traffic::Inbound).await, 1)]);
        api.answered(&get(api.door(upstream("web")).await, "/").await, cause).await;
    }

    pub(super) async fn tls_failed(cause: Cause) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (api, door) = alone(&[listener.local_addr().unwrap()]).await;
        spawn_local(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.write_all(b"220 no TLS here\r\n").await;
                let _ = stream.shutdown().await;
            }
        });
        api.answered(&get(door, "/").await, cause).await;
    }

    pub(super) async fn deadline(cause: Cause) {
        let (api, _web, door) = pair(Protocol::Http, saying(None).await).await;
        let limit = Some(Duration::from_millis(50));
        route(&api, vec![], true, Timeouts { request: limit, ..Timeouts::default() });
        api.answered(&get(door, "/").await, cause).await;
    }

    /// Beyond the other proxy as well: both say the same.
    pub(super) async fn connect_refused(cause: Cause) {
        let (api, door) = alone(&[refusing_address().await]).await;
        api.answered(&get(door, "/").await, cause).await;
        let (api, web, door) = pair(Protocol::Http, refusing_address().await.port()).await;
        let answer = get(door, "/").await;
        api.answered(&answer, cause).await;
        web.answered(&answer, cause).await;
    }

    /// A listener whose queue is full takes no more.
    pub(super) async fn connect_timeout(cause: Cause) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(1).unwrap();
        let full = listener.local_addr().unwrap();
        let mut queued = Vec::new();
        while let Ok(made) = tokio::time::timeout(Duration::from_millis(300), TcpStream::connect(full)).await {
            queued.push(made.unwrap());
        }
        let (api, door) = alone(&[full]).await;
        api.answered(&get(door, "/").await, cause).await;
    }

    /// The kernel refuses to connect to a broadcast address.
    pub(super) async fn connect_failed(cause: Cause) {
        let (api, door) = alone(&["255.255.255.255:1".parse().unwrap()]).await;
        api.answered(&get(door, "/").await, cause).await;
    }

    pub(super) async fn upstream_reset(cause: Cause) {
        broken(b"", cause).await;
    }

    pub(super) async fn bad_response(cause: Cause) {
        broken(b"HTTP/1.1 two hundred\r\n\r\n", cause).await;
    }

    async fn broken(said: &'static [u8], cause: Cause) {
        let (api, web, door) = pair(Protocol::Http, saying(Some(said)).await).await;
        let answer = get(door, "/").await;
        api.answered(&answer, cause).await;
        web.answered(&answer, cause).await;
    }

    /// A workload whose port is a door for calls to itself.
    pub(super) async fn circle(cause: Cause) {
        let ca = Authority::new("mesh.internal");
        let api = side(&ca, "api", &[]);
        let door = api.door(upstream("web")).await;
        let web = side(&ca, "web", &[door.port()]);
        api.knows("default/web", Protocol::Detect, &[(web.door(Traffic::Inbound).await, door.port())]);
        let answer = get(door, "/").await;
        assert!(answer.starts_with("HTTP/1.1 508"), "{answer}");
        let looped = || api.reasons().iter().filter(|it| *it == cause.reason()).count();
        until("it is told once, and not in rounds", || looped() == 1).await;
        // The door itself says why.
        let (api, door) = alone(&[]).await;
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(([127, 0, 0, 6], 0).into()).unwrap();
        let mut stream = socket.connect(door).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        api.answered(&answer, cause).await;
    }

    /// The head has left: no header can tell it, the connection's end does.
    pub(super) async fn response_truncated(cause: Cause) {
        let said = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc";
        let (api, web, door) = pair(Protocol::Http, saying(Some(said)).await).await;
        let answer = get(door, "/").await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("abc"), "{answer}");
        api.wrote(cause).await;
        web.wrote(cause).await;
    }
}

/// A cause is either provoked above or cannot be raised; when the latter changes, a test is due.
#[test]
fn every_cause_is_provoked_or_cannot_be_raised() {
    for cause in Cause::ALL {
        let unraised = UNRAISED.iter().any(|(it, ..)| it == cause);
        assert!(
            PROVOKED.contains(cause) != unraised,
            "{cause}: provoke it in a test of its own, or say why nothing can"
        );
    }
    let crates = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut directories = vec![crates.join("proxy/src"), crates.join("core/src")];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            // What it is called is said there, and here.
            let is_table =
                ["proxy/src/error.rs", "core/src/cause.rs", "reasons.rs"].iter().any(|it| path.ends_with(it));
            if is_table || path.extension().is_none_or(|it| it != "rs") {
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let product = text.split("#[cfg(test)]").next().unwrap_or_default();
            for (cause, name, reason) in UNRAISED {
                let raised = product.contains(&format!("Cause::{name}"));
                assert!(!raised, "{} raises {cause} now ({reason}): provoke it above", path.display());
            }
        }
    }
}

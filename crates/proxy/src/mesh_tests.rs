//! Two proxies and an application in one process, over loopback, with real certificates.

mod certificates;
mod floods;
mod framing;
mod reasons;
mod resources;
mod stays;
mod streams;
mod volumes;
mod websocket;

use crate::body::Body;
use crate::capture::listening::Ports;
use crate::drain::{self, Phase};
use crate::listen::{Open, Traffic, accept};
use crate::metrics::Metrics;
use crate::overload::Overload;
use crate::plan::{self, Capture, Mode, Plan, PlannedPort};
use crate::sync::{Demand, Demands};
use crate::testing::Authority;
use crate::upstream::endpoint::Table;
use crate::worker::{Proxy, Worker};
use arc_swap::{ArcSwap, ArcSwapOption};
use bytes::Bytes;
use sheer_core::identity::SpiffeId;
use sheer_core::name::{DnsLabel, ServiceName};
use sheer_core::route::{Attached, Backend, Rule, Rules};
use sheer_core::snapshot::{
    Endpoint, EndpointSet, Health, Hop, Protocol, Service, ServicePort, Snapshot, Timeouts, Workload,
};
use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{LocalSet, spawn_local};

/// A proxy of the test.
struct Beside {
    proxy: Arc<Proxy>,
    worker: Rc<Worker>,
    leave: drain::Signal,
    _demands: Demands,
}

/// A plan for tests.
pub(crate) fn plan(name: &str, ports: &[u16], mode: Mode) -> Plan {
    Plan {
        service: format!("default/{name}"),
        name: format!("{name}-1"),
        service_account: name.into(),
        labels: vec![],
        ports: ports.iter().map(|port| PlannedPort { port: *port, protocol: plan::Protocol::Detect }).collect(),
        health: None,
        capture: Capture::None,
        mode,
        control: vec![],
        join_token_file: None,
        state: "/nonexistent".into(),
        address: None,
        network: String::new(),
        locality: String::new(),
        listeners: vec![],
        namespace_sockets: None,
        namespace_tables: vec![],
        supervisor: None,
        proxy_user: None,
        env_credentials: None,
        workload_user: None,
        resolvers: vec![],
        host_ports: vec![],
        trust_forwarded: vec![],
        access_log: false,
        command: false,
        drain_grace_ms: 1000,
        successor: false,
    }
}

/// A worker for tests that need nothing else.
pub(crate) fn worker() -> Rc<Worker> {
    beside(&Authority::new("mesh.internal"), "web", &[], Mode::Strict).worker
}

fn beside(ca: &Authority, name: &str, ports: &[u16], mode: Mode) -> Beside {
    beside_with(ca, name, plan(name, ports, mode))
}

fn beside_with(ca: &Authority, name: &str, plan: Plan) -> Beside {
    let (leave, watch) = drain::channel();
    let (demand, demands) = Demand::channel();
    let metrics = Arc::new(Metrics::new(1000));
    let proxy = Arc::new(Proxy {
        plan,
        snapshot: Arc::new(ArcSwap::from_pointee(Snapshot::new(DnsLabel::parse("default").unwrap()))),
        demand,
        credentials: Arc::new(ArcSwapOption::from(Some(ca.credentials("default", name)))),
        overload: Overload::new(metrics.clone(), 1024, None),
        metrics,
        endpoints: Arc::new(Table::default()),
        drain: watch,
        inside: None,
        listening: None,
        clients: Ports::here().into_iter().collect(),
    });
    let worker = Rc::new(Worker::new(proxy.clone(), None).unwrap());
    Beside { proxy, worker, leave, _demands: demands }
}

impl Beside {
    async fn door(&self, traffic: Traffic) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        spawn_local(accept(self.worker.clone(), listener, traffic, Open::default()));
        // What it asks of the listener holds for connections that come later.
        tokio::task::yield_now().await;
        address
    }

    /// Teaches the proxy a service and its endpoints: where each is dialled, and its application's port.
    fn knows(&self, service: &str, protocol: Protocol, endpoints: &[(SocketAddr, u16)]) {
        let name = ServiceName::parse(service).unwrap();
        let mut snapshot = Snapshot::clone(&self.proxy.snapshot.load());
        snapshot.put_service(Arc::new(Service {
            name: name.clone(),
            hosts: vec![name.host("mesh.internal").into()],
            addresses: vec![],
            ports: vec![ServicePort { port: 80, protocol }],
        }));
        self.proxy.snapshot.store(Arc::new(snapshot));
        let endpoints = endpoints.iter().map(|(address, port)| {
            Arc::new(Endpoint {
                workload: format!("local/host/{service}-{address}").into(),
                service_port: 80,
                address: *address,
                workload_port: *port,
                server_name: name.server_name(*port, "mesh.internal").into(),
                hop: Hop::Sheer1,
                health: Health::Healthy,
                weight: 1,
                at_address: false,
            })
        });
        let id = SpiffeId::parse(&format!("spiffe://mesh.internal/ns/default/sa/{}", name.name)).unwrap();
        self.proxy.endpoints.set(&name, Arc::new(EndpointSet::new(vec![id], endpoints.collect())));
    }

    /// Status, gRPC status and reason of each answer counted on edges to or from this side, with its count.
    fn counted(&self) -> Vec<(String, u16, String, u64)> {
        let edges = self.proxy.metrics.edges();
        let all = edges.iter().flat_map(|(key, edge)| {
            edge.answers()
                .into_iter()
                .map(|it| (format!("{}>{}", key.source, key.destination), it.status, it.reason.to_owned(), it.count))
        });
        let mut all: Vec<_> = all.collect();
        all.sort();
        all
    }
}

/// An application that answers HTTP/1.1 with a text and what it was told about its caller.
async fn application(text: &'static str) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            spawn_local(async move {
                let mut all = Vec::new();
                loop {
                    while !all.windows(4).any(|it| it == b"\r\n\r\n") {
                        if stream.read_buf(&mut all).await.unwrap_or(0) == 0 {
                            return;
                        }
                    }
                    let head = String::from_utf8_lossy(&all).to_ascii_lowercase();
                    let callers: Vec<_> = head.lines().filter(|it| it.starts_with("x-forwarded-client-cert")).collect();
                    let body = format!("{text}\n{}", callers.join("\n"));
                    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                    stream.write_all(answer.as_bytes()).await.unwrap();
                    all.clear();
                }
            });
        }
    });
    port
}

async fn get(address: SocketAddr, target: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!(
        "GET {target} HTTP/1.1\r\nHost: web\r\nX-Forwarded-Client-Cert: URI=spiffe://me\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

async fn refusing_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let waited = async {
        while !is() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), waited).await.unwrap_or_else(|_| panic!("never: {what}"));
}

fn upstream(service: &str) -> Traffic {
    Traffic::Upstream(ServiceName::parse(service).unwrap(), 80)
}

/// `api` calls `web` through both proxies.
async fn two(protocol: Protocol, port: u16) -> (Beside, Beside, SocketAddr) {
    let ca = Authority::new("mesh.internal");
    let web = beside(&ca, "web", &[port], Mode::Strict);
    let inbound = web.door(Traffic::Inbound).await;
    let api = beside(&ca, "api", &[], Mode::Strict);
    api.knows("default/web", protocol, &[(inbound, port)]);
    let door = api.door(upstream("web")).await;
    (api, web, door)
}

#[tokio::test]
async fn a_request_crosses_the_mesh_with_its_callers_identity() {
    let test = async {
        let port = application("hello").await;
        let (api, web, door) = two(Protocol::Detect, port).await;
        for _ in 0..3 {
            let answer = get(door, "/a?b=c").await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            assert!(
                answer.ends_with("hello\nx-forwarded-client-cert: uri=spiffe://mesh.internal/ns/default/sa/api"),
                "{answer}"
            );
        }
        let counted = |from: &str| vec![(format!("{from}>default/web"), 200, String::new(), 3)];
        assert_eq!(api.counted(), counted("default/api"));
        assert_eq!(web.counted(), counted("default/api"));
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn streams_trailers_and_many_requests_at_once_cross_over_http2() {
    let test = async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                spawn_local(async move {
                    let mut connection = h2::server::handshake(stream).await.unwrap();
                    while let Some(Ok((request, mut respond))) = connection.accept().await {
                        spawn_local(async move {
                            let mut body = request.into_body();
                            let mut answer = respond.send_response(http::Response::new(()), false).unwrap();
                            // Echoes as it arrives: a bidirectional stream.
                            while let Some(Ok(bytes)) = body.data().await {
                                let _ = body.flow_control().release_capacity(bytes.len());
                                answer.send_data(bytes, false).unwrap();
                            }
                            let status = http::HeaderMap::from_iter([(
                                "grpc-status".parse::<http::HeaderName>().unwrap(),
                                http::HeaderValue::from_static("5"),
                            )]);
                            answer.send_trailers(status).unwrap();
                        });
                    }
                });
            }
        });
        let (api, web, door) = two(Protocol::Grpc, port).await;
        let (client, connection) = h2::client::handshake(TcpStream::connect(door).await.unwrap()).await.unwrap();
        spawn_local(connection);
        let calls = (0..20).map(|_| {
            let mut client = client.clone();
            async move {
                let request = http::Request::post("http://web/pkg.Service/Call")
                    .header("content-type", "application/grpc")
                    .header("te", "trailers")
                    .body(())
                    .unwrap();
                let (response, mut sender) = client.send_request(request, false).unwrap();
                sender.send_data(Bytes::from_static(b"one"), false).unwrap();
                let mut body = response.await.unwrap().into_body();
                assert_eq!(body.data().await.unwrap().unwrap(), "one");
                sender.send_data(Bytes::from_static(b"two"), true).unwrap();
                assert_eq!(body.data().await.unwrap().unwrap(), "two");
                assert!(body.data().await.is_none());
                assert_eq!(body.trailers().await.unwrap().unwrap()["grpc-status"], "5");
            }
        });
        futures::future::join_all(calls).await;
        let answered = |side: &Beside| {
            side.proxy
                .metrics
                .edges()
                .iter()
                .flat_map(|(_, edge)| edge.answers())
                .any(|it| it.grpc_status == Some(5) && it.count == 20)
        };
        until("both sides counted the status", || answered(&api) && answered(&web)).await;
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn bytes_cross_the_mesh_also_when_the_server_speaks_first() {
    let test = async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        spawn_local(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                spawn_local(async move {
                    stream.write_all(b"welcome\n").await.unwrap();
                    let (mut read, mut write) = stream.split();
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                    let _ = write.shutdown().await;
                });
            }
        });
        let (api, web, door) = two(Protocol::Detect, port).await;
        for _ in 0..2 {
            let mut stream = TcpStream::connect(door).await.unwrap();
            let mut greeting = [0; 8];
            stream.read_exact(&mut greeting).await.unwrap();
            assert_eq!(&greeting, b"welcome\n");
            stream.write_all(&[7; 100_000]).await.unwrap();
            stream.shutdown().await.unwrap();
            let mut back = Vec::new();
            stream.read_to_end(&mut back).await.unwrap();
            assert_eq!(back, [7; 100_000]);
        }
        let counted = vec![("default/api>default/web".to_owned(), 0, String::new(), 2)];
        until("both sides counted both connections", || api.counted() == counted && web.counted() == counted).await;
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_refused_connect_goes_to_another_endpoint() {
    let test = async {
        let port = application("hello").await;
        let (api, _web, door) = two(Protocol::Http, port).await;
        let inbound = api.proxy.endpoints.get(&ServiceName::parse("web").unwrap()).unwrap().load_full().unwrap();
        let good = inbound.of_port(80)[0].endpoint.address;
        api.knows("default/web", Protocol::Http, &[(refusing_address().await, port), (good, port)]);
        for _ in 0..10 {
            assert!(get(door, "/").await.starts_with("HTTP/1.1 200"));
        }
        api.knows("default/web", Protocol::Http, &[(refusing_address().await, port)]);
        let answer = get(door, "/").await;
        assert!(answer.starts_with("HTTP/1.1 502"), "{answer}");
        assert!(answer.contains("x-sheer-reason: connect-refused; at=default/api-1; to=127.0.0.1:"), "{answer}");
        assert!(api.counted().contains(&("default/api>default/web".into(), 502, "connect-refused".into(), 1)));
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_request_is_counted_as_encrypted_when_it_was() {
    let test = async {
        let port = application("hello").await;
        let (api, _web, door) = two(Protocol::Http, port).await;
        let name = ServiceName::parse("web").unwrap();
        let live = api.proxy.endpoints.get(&name).unwrap().load_full().unwrap();
        let meshed = live.of_port(80)[0].endpoint.clone();
        let bare = Endpoint {
            workload: "local/static/web".into(),
            address: ([127, 0, 0, 1], port).into(),
            hop: Hop::None,
            ..Endpoint::clone(&meshed)
        };
        let set = EndpointSet::new(live.identities.to_vec(), vec![meshed, Arc::new(bare)]);
        api.proxy.endpoints.set(&name, Arc::new(set));
        let counted = || {
            let of = |mtls| {
                let edges = api.proxy.metrics.edges();
                let all = edges.iter().filter(|(key, _)| key.mtls == mtls).flat_map(|(_, edge)| edge.answers());
                all.map(|it| it.count).sum::<u64>()
            };
            (of(true), of(false))
        };
        let (mut encrypted, mut plain) = (0, 0);
        while encrypted == 0 || plain == 0 {
            let answer = get(door, "/").await;
            assert!(answer.starts_with("HTTP/1.1 200") && encrypted + plain < 1000, "{answer}");
            // Who is not told of its caller was not called over the mesh.
            match answer.contains("uri=spiffe://mesh.internal/ns/default/sa/api") {
                true => encrypted += 1,
                false => plain += 1,
            }
        }
        assert_eq!(counted(), (encrypted, plain));
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn what_a_leaving_proxy_did_not_process_is_sent_elsewhere() {
    let test = async {
        let port = application("hello").await;
        let ca = Authority::new("mesh.internal");
        let (one, other) = (beside(&ca, "web", &[port], Mode::Strict), beside(&ca, "web", &[port], Mode::Strict));
        let doors = [(one.door(Traffic::Inbound).await, port), (other.door(Traffic::Inbound).await, port)];
        let api = beside(&ca, "api", &[], Mode::Strict);
        api.knows("default/web", Protocol::Http, &doors);
        let door = api.door(upstream("web")).await;
        // Without a second endpoint the refusal itself is seen.
        one.leave.set(Phase::Refusing);
        for _ in 0..20 {
            assert!(get(door, "/").await.starts_with("HTTP/1.1 200"));
        }
        other.leave.set(Phase::Refusing);
        let answer = get(door, "/").await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("x-sheer-reason: draining"), "{answer}");
        assert!(!answer.contains("sheer-drain"), "{answer}");
    };
    LocalSet::new().run_until(test).await;
}

/// Also where no control plane has told anybody that it is leaving.
#[tokio::test]
async fn a_connection_that_a_leaving_proxy_does_not_take_goes_elsewhere() {
    let test = async {
        let port = application("hello").await;
        let ca = Authority::new("mesh.internal");
        let (one, other) = (beside(&ca, "web", &[port], Mode::Strict), beside(&ca, "web", &[port], Mode::Strict));
        let doors = [(one.door(Traffic::Inbound).await, port), (other.door(Traffic::Inbound).await, port)];
        let api = beside(&ca, "api", &[], Mode::Strict);
        api.knows("default/web", Protocol::Tcp, &doors);
        let door = api.door(upstream("web")).await;
        one.leave.set(Phase::Refusing);
        for _ in 0..20 {
            // Requests to its client and server, bytes to the mesh.
            assert!(get(door, "/").await.starts_with("HTTP/1.1 200"));
        }
        let refused = one.proxy.metrics.exposition();
        assert!(one.counted().is_empty() && refused.contains("reason=\"draining\""), "{refused}");
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn somebody_else_at_the_endpoint_gets_no_byte() {
    let test = async {
        let port = application("hello").await;
        let ca = Authority::new("mesh.internal");
        // It has a certificate of the mesh and claims the service's name and port, but not its identity.
        let thief = beside(&ca, "thief", &[port], Mode::Strict);
        let inbound = thief.door(Traffic::Inbound).await;
        let api = beside(&ca, "api", &[], Mode::Strict);
        api.knows("default/web", Protocol::Http, &[(inbound, port)]);
        let answer = get(api.door(upstream("web")).await, "/").await;
        assert!(answer.starts_with("HTTP/1.1 502") && answer.contains("x-sheer-reason: identity-mismatch"), "{answer}");
        assert!(answer.contains("spiffe://mesh.internal/ns/default/sa/thief answered"), "{answer}");
        assert!(thief.counted().is_empty());
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_connection_that_comes_back_late_is_not_used_for_another_identity() {
    let test = async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (asked, proceed) = (Rc::new(Cell::new(0)), Rc::new(tokio::sync::Semaphore::new(0)));
        let (count, gate) = (asked.clone(), proceed.clone());
        spawn_local(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (count, gate) = (count.clone(), gate.clone());
                spawn_local(async move {
                    let mut some = [0; 4096];
                    while stream.read(&mut some).await.unwrap_or(0) > 0 {
                        count.set(count.get() + 1);
                        gate.acquire().await.unwrap().forget();
                        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
                    }
                });
            }
        });
        let (api, _web, door) = two(Protocol::Http, port).await;
        let slow = spawn_local(async move { get(door, "/").await });
        until("the application is asked", || asked.get() == 1).await;
        // The address is said to be another's now; the one from before still holds it.
        let name = ServiceName::parse("web").unwrap();
        let live = api.proxy.endpoints.get(&name).unwrap().load_full().unwrap();
        let endpoints = live.of_port(80).iter().map(|it| it.endpoint.clone()).collect();
        let other = SpiffeId::parse("spiffe://mesh.internal/ns/default/sa/other").unwrap();
        api.proxy.endpoints.set(&name, Arc::new(EndpointSet::new(vec![other], endpoints)));
        let answer = get(door, "/").await;
        assert!(answer.contains("x-sheer-reason: identity-mismatch"), "{answer}");
        proceed.add_permits(10);
        assert!(slow.await.unwrap().starts_with("HTTP/1.1 200"));
        let answer = get(door, "/").await;
        assert!(answer.contains("x-sheer-reason: identity-mismatch"), "{answer}");
        assert_eq!(asked.get(), 1, "no byte of a request reached the identity that is not expected");
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn plaintext_to_a_strict_workload_is_refused_with_a_reason() {
    let test = async {
        let port = application("hello").await;
        let ca = Authority::new("mesh.internal");
        let web = beside(&ca, "web", &[port], Mode::Strict);
        let answer = get(web.door(Traffic::Inbound).await, "/").await;
        assert!(answer.starts_with("HTTP/1.1 403") && answer.contains("x-sheer-reason: plaintext-refused"), "{answer}");
        assert!(answer.contains("spec.plaintext"), "{answer}");
        // The published door is open to everybody on this host, and tells strangers no more than they need.
        let published = web.door(Traffic::Published(port)).await;
        let answer = get(published, "/").await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("hello\n"), "{answer}");
        assert!(!answer.contains("spiffe"), "{answer}");
    };
    LocalSet::new().run_until(test).await;
}

/// Requests that spare no means to look like something else, and what the application was told about their sender.
async fn told_of(mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin, parts: &[&str]) -> String {
    for part in parts {
        stream.write_all(part.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        // Longer than a client is waited for before its server is asked: its pause is what is tested.
        tokio::time::sleep(Duration::from_millis(80)).await;
    }
    let rest = "X-Forwarded-Client-Cert: URI=spiffe://me\r\nConnection: close\r\n\r\n";
    stream.write_all(rest.as_bytes()).await.unwrap();
    stream.flush().await.unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn nobody_gets_an_identity_past_the_mesh_by_being_slow() {
    let test = async {
        let port = application("hello").await;
        let ca = Authority::new("mesh.internal");
        let web = beside(&ca, "web", &[port], Mode::Permissive);
        let published = web.door(Traffic::Published(port)).await;
        let slow: [&[&str]; 3] = [
            &["GET /", " HTTP/1.1\r\nHost: web\r\n"],
            &["", "", "GET / HTTP/1.1\r\nHost: web\r\n"],
            &["\r\n", "GET / HTTP/1.1\r\nHost: web\r\n"],
        ];
        for parts in slow {
            let answer = told_of(TcpStream::connect(published).await.unwrap(), parts).await;
            assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("hello\n"), "{parts:?}: {answer}");
        }
    };
    LocalSet::new().run_until(test).await;
}

/// An application that would take anything, and says whether it got anything at all.
async fn listener() -> (u16, Rc<Cell<usize>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let got = Rc::new(Cell::new(0));
    let count = got.clone();
    spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let count = count.clone();
            spawn_local(async move {
                let mut some = [0; 1024];
                while let Ok(read @ 1..) = stream.read(&mut some).await {
                    count.set(count.get() + read);
                }
            });
        }
    });
    (port, got)
}

/// All that is answered, which must not take long.
async fn whole(mut stream: TcpStream) -> String {
    let mut answer = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await;
    read.expect("an answer, and its end").unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn nobody_gets_an_identity_past_the_mesh_by_writing_badly() {
    let test = async {
        let (port, got) = listener().await;
        let ca = Authority::new("mesh.internal");
        let web = beside(&ca, "web", &[port], Mode::Permissive);
        let published = web.door(Traffic::Published(port)).await;
        for line in ["GET\t/ HTTP/1.1", " GET / HTTP/1.1", "GET / http/1.1", "GET /", "GET http://web/"] {
            let request = format!("{line}\r\nHost: web\r\nX-Forwarded-Client-Cert: URI=spiffe://me\r\n\r\n");
            let mut stream = TcpStream::connect(published).await.unwrap();
            stream.write_all(request.as_bytes()).await.unwrap();
            let answer = whole(stream).await;
            assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("bad-request"), "{line:?}: {answer}");
        }
        assert_eq!(got.get(), 0);
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn what_is_written_of_a_workload_decides_what_its_ports_speak() {
    let test = async {
        let (port, got) = listener().await;
        let ca = Authority::new("mesh.internal");
        let web = beside(&ca, "web", &[port], Mode::Permissive);
        let mut snapshot = Snapshot::clone(&web.proxy.snapshot.load());
        snapshot.set_workload(Some(Workload {
            uid: "local/proxy/default/web-1".into(),
            identity: SpiffeId::parse("spiffe://mesh.internal/ns/default/sa/web").unwrap(),
            services: vec![ServiceName::parse("web").unwrap()],
            ports: vec![ServicePort { port, protocol: Protocol::Http }],
            mode: sheer_core::snapshot::Mode::Permissive,
            exceptions: vec![],
        }));
        web.proxy.snapshot.store(Arc::new(snapshot));
        let mut stream = TcpStream::connect(web.door(Traffic::Published(port)).await).await.unwrap();
        stream.write_all(b"QUIT\r\n").await.unwrap();
        let answer = whole(stream).await;
        assert!(answer.starts_with("HTTP/1.1 400") && got.get() == 0, "{answer}");
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_peer_does_not_choose_another_identity_by_calling_its_requests_bytes() {
    let test = async {
        let port = application("hello").await;
        let ca = Authority::new("mesh.internal");
        let web = beside(&ca, "web", &[port], Mode::Strict);
        let inbound = web.door(Traffic::Inbound).await;
        let name = ServiceName::parse("web").unwrap().server_name(port, "mesh.internal");
        let stream = TcpStream::connect(inbound).await.unwrap();
        let dialer = ca.credentials("default", "api").dialer();
        let (io, _) = dialer.connect(stream, &name, crate::upstream::tls::Carried::Tcp).await.unwrap();
        let answer = told_of(io, &["GET / HTTP/1.1\r\nHost: web\r\n"]).await;
        let caller = "hello\nx-forwarded-client-cert: uri=spiffe://mesh.internal/ns/default/sa/api";
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with(caller), "{answer}");
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_word_without_an_end_is_carried_and_answered() {
    let test = async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        spawn_local(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut word = [0; 4];
                stream.read_exact(&mut word).await.unwrap();
                stream.write_all(&word).await.unwrap();
            }
        });
        let (_api, _web, door) = two(Protocol::Detect, port).await;
        let mut stream = TcpStream::connect(door).await.unwrap();
        stream.write_all(b"ping").await.unwrap();
        let mut word = [0; 4];
        let read = tokio::time::timeout(Duration::from_secs(10), stream.read_exact(&mut word)).await;
        read.expect("nobody waits in vain").unwrap();
        assert_eq!(&word, b"ping");
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_permissive_workload_admits_plaintext_as_nobody_and_peers_as_themselves() {
    let test = async {
        let port = application("hello").await;
        let ca = Authority::new("mesh.internal");
        let web = beside(&ca, "web", &[port], Mode::Permissive);
        // Where plaintext is redirected its port is the application's; here the proxy's own stands for it.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let inbound = listener.local_addr().unwrap();
        spawn_local(accept(web.worker.clone(), listener, Traffic::Inbound, Open::default()));
        let answer = get(inbound, "/").await;
        assert!(answer.starts_with("HTTP/1.1 404") && answer.contains("port-not-declared"), "{answer}");
        let api = beside(&ca, "api", &[], Mode::Strict);
        api.knows("default/web", Protocol::Http, &[(inbound, port)]);
        let answer = get(api.door(upstream("web")).await, "/").await;
        assert!(answer.ends_with("uri=spiffe://mesh.internal/ns/default/sa/api"), "{answer}");
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn plaintext_means_the_port_whose_door_it_comes_to() {
    let test = async {
        let (one, other) = (application("one").await, application("other").await);
        let ca = Authority::new("mesh.internal");
        let web = beside(&ca, "web", &[one, other], Mode::Permissive);
        for (port, text) in [(one, "one"), (other, "other")] {
            let door = web.door(Traffic::Door(port)).await;
            let answer = get(door, "/").await;
            assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with(&format!("{text}\n")), "{answer}");
            // A mesh peer names its port at any door.
            let api = beside(&ca, "api", &[], Mode::Strict);
            api.knows("default/web", Protocol::Http, &[(door, other)]);
            let answer = get(api.door(upstream("web")).await, "/").await;
            assert!(answer.contains("other\nx-forwarded-client-cert: uri=spiffe"), "{answer}");
        }
        // Nobody is admitted there who is not elsewhere.
        let strict = beside(&ca, "web", &[one, other], Mode::Strict);
        let answer = get(strict.door(Traffic::Door(one)).await, "/").await;
        assert!(answer.starts_with("HTTP/1.1 403") && answer.contains("plaintext-refused"), "{answer}");
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_watching_door_does_not_call_itself() {
    let test = async {
        let watch = beside(&Authority::new("mesh.internal"), "web", &[], Mode::Watch);
        let answer = tokio::time::timeout(Duration::from_secs(10), get(watch.door(Traffic::Inbound).await, "/")).await;
        let answer = answer.expect("an answer, not a circle");
        assert!(answer.starts_with("HTTP/1.1 404") && answer.contains("port-not-declared"), "{answer}");
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_port_that_is_not_declared_is_not_served() {
    let test = async {
        let (port, hidden) = (application("hello").await, application("hidden").await);
        let (api, _web, door) = two(Protocol::Http, port).await;
        let web = ServiceName::parse("web").unwrap();
        let inbound = api.proxy.endpoints.get(&web).unwrap().load_full().unwrap().of_port(80)[0].endpoint.address;
        api.knows("default/web", Protocol::Http, &[(inbound, hidden)]);
        let answer = get(door, "/").await;
        assert!(answer.starts_with("HTTP/1.1 404") && answer.contains("x-sheer-reason: port-not-declared"), "{answer}");
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_client_that_hangs_up_is_counted_on_both_sides() {
    let test = async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let asked = Rc::new(Cell::new(0));
        let count = asked.clone();
        spawn_local(async move {
            let mut kept = Vec::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut some = [0; 1024];
                if stream.read(&mut some).await.unwrap_or(0) > 0 {
                    count.set(count.get() + 1);
                }
                kept.push(stream);
            }
        });
        let (api, web, door) = two(Protocol::Http, port).await;
        let mut stream = TcpStream::connect(door).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n").await.unwrap();
        until("the application is asked", || asked.get() == 1).await;
        drop(stream);
        let gone = vec![("default/api>default/web".to_owned(), 499, "client-gone".to_owned(), 1)];
        until("both sides counted it", || api.counted() == gone && web.counted() == gone).await;
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_route_shares_between_backends_and_changes_under_way() {
    let test = async {
        let (old, new) = (application("v1").await, application("v2").await);
        let ca = Authority::new("mesh.internal");
        let (v1, v2) = (beside(&ca, "v1", &[old], Mode::Strict), beside(&ca, "v2", &[new], Mode::Strict));
        let api = beside(&ca, "api", &[], Mode::Strict);
        api.knows("default/v1", Protocol::Http, &[(v1.door(Traffic::Inbound).await, old)]);
        api.knows("default/v2", Protocol::Http, &[(v2.door(Traffic::Inbound).await, new)]);
        api.knows("default/web", Protocol::Http, &[]);
        let door = api.door(upstream("web")).await;
        for (shares, expected) in [([1, 0], "v1"), ([0, 1], "v2")] {
            let backends = ["default/v1", "default/v2"].into_iter().zip(shares).map(|(name, weight)| Backend {
                service: ServiceName::parse(name).unwrap(),
                port: 80,
                weight,
                valid: true,
            });
            let rule = Rule {
                route: "default/split".into(),
                index: 0,
                backends: backends.collect(),
                timeouts: Timeouts::default(),
                request_edits: vec![],
                response_edits: vec![sheer_core::route::Edit::Set("x-rule".into(), "split".into())],
            };
            let attached = Attached {
                port: 80,
                consumer: None,
                hostnames: vec![],
                created: String::new(),
                matches: vec![],
                rule: Arc::new(rule),
            };
            let mut snapshot = Snapshot::clone(&api.proxy.snapshot.load());
            snapshot.set_routes(ServiceName::parse("web").unwrap(), Some(Rules::new(vec![attached])));
            api.proxy.snapshot.store(Arc::new(snapshot));
            for _ in 0..5 {
                let answer = get(door, "/").await;
                assert!(
                    answer.contains(&format!("\r\n\r\n{expected}")) && answer.contains("x-rule: split"),
                    "{answer}"
                );
            }
        }
        let edges = api.proxy.metrics.edges();
        let backends: Vec<_> = edges.iter().map(|(key, _)| (&*key.route, &*key.backend)).collect();
        assert!(
            backends.contains(&("default/split", "default/v1")) && backends.contains(&("default/split", "default/v2"))
        );
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_service_that_the_control_plane_does_not_tell_of_fails_after_a_second() {
    let test = async {
        let ca = Authority::new("mesh.internal");
        let api = beside(&ca, "api", &[], Mode::Strict);
        api.knows("default/web", Protocol::Http, &[]);
        api.proxy.endpoints.remove(&ServiceName::parse("web").unwrap());
        let door = api.door(upstream("web")).await;
        let answer = get(door, "/").await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("control-plane-away"), "{answer}");
        // The same as gRPC.
        let (mut client, connection) = h2::client::handshake(TcpStream::connect(door).await.unwrap()).await.unwrap();
        spawn_local(connection);
        let request = http::Request::post("http://web/a").header("content-type", "application/grpc").body(()).unwrap();
        let response = client.send_request(request, true).unwrap().0.await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["grpc-status"], "14");
    };
    LocalSet::new().run_until(test).await;
}

/// An application that switches to an echo.
async fn switching() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    spawn_local(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            stream.read_buf(&mut head).await.unwrap();
        }
        stream
            .write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")
            .await
            .unwrap();
        let (mut read, mut write) = stream.split();
        let _ = tokio::io::copy(&mut read, &mut write).await;
    });
    port
}

/// Asks for the echo and uses it.
async fn switch(door: SocketAddr, request: &str) {
    let mut stream = TcpStream::connect(door).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        assert!(stream.read_buf(&mut head).await.unwrap() > 0, "{}", String::from_utf8_lossy(&head));
    }
    assert!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
    stream.write_all(b"ping").await.unwrap();
    let mut echo = [0; 4];
    stream.read_exact(&mut echo).await.unwrap();
    assert_eq!(&echo, b"ping");
}

#[tokio::test]
async fn a_connection_becomes_a_tunnel() {
    let test = async {
        let (_api, web, door) = two(Protocol::Http, switching().await).await;
        switch(door, "GET / HTTP/1.1\r\nHost: web\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n").await;
        until("the tunnel is counted", || web.counted() == [("default/api>default/web".into(), 101, String::new(), 1)])
            .await;
    };
    LocalSet::new().run_until(test).await;
}

/// Futures of the path are large because everything is inline; they are boxed by their task alone.
#[test]
fn bodies_stay_small() {
    assert!(size_of::<Body>() <= 96, "{}", size_of::<Body>());
}

/// The forward proxy of `api`, with a password.
async fn forward_door(api: &Beside) -> SocketAddr {
    let mut plan = plan("api", &[], Mode::Strict);
    plan.env_credentials = Some(plan::Credentials { user: "u".into(), password: "p".into() });
    let old = &api.proxy;
    let proxy = Proxy {
        plan,
        snapshot: old.snapshot.clone(),
        demand: old.demand.clone(),
        credentials: old.credentials.clone(),
        metrics: old.metrics.clone(),
        endpoints: old.endpoints.clone(),
        overload: old.overload.clone(),
        drain: old.drain.clone(),
        inside: None,
        listening: None,
        clients: old.clients.clone(),
    };
    let worker = Rc::new(Worker::new(Arc::new(proxy), None).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let door = listener.local_addr().unwrap();
    spawn_local(accept(worker, listener, Traffic::Forward, Open::default()));
    door
}

#[tokio::test]
async fn a_connection_through_the_forward_proxy_becomes_a_tunnel() {
    let test = async {
        const UPGRADE: &str = "Connection: upgrade\r\nUpgrade: echo\r\n";
        let password = "Proxy-Authorization: Basic dTpw\r\n";
        let (api, web, _) = two(Protocol::Http, switching().await).await;
        let door = forward_door(&api).await;
        switch(door, &format!("GET http://web/ HTTP/1.1\r\nHost: web\r\n{password}{UPGRADE}\r\n")).await;
        until("the tunnel is counted", || web.counted() == [("default/api>default/web".into(), 101, String::new(), 1)])
            .await;
        // A tunnel in a tunnel: CONNECT, then an upgrade inside it.
        let (api, web, _) = two(Protocol::Http, switching().await).await;
        let mut stream = TcpStream::connect(forward_door(&api).await).await.unwrap();
        let connect = format!("CONNECT web:80 HTTP/1.1\r\nHost: web:80\r\n{password}\r\n");
        let inner = format!("GET / HTTP/1.1\r\nHost: web\r\n{UPGRADE}\r\n");
        stream.write_all(format!("{connect}{inner}").as_bytes()).await.unwrap();
        let mut heads = Vec::new();
        while heads.windows(4).filter(|it| it == b"\r\n\r\n").count() < 2 {
            assert!(stream.read_buf(&mut heads).await.unwrap() > 0, "{}", String::from_utf8_lossy(&heads));
        }
        stream.write_all(b"ping").await.unwrap();
        let mut echo = [0; 4];
        stream.read_exact(&mut echo).await.unwrap();
        assert_eq!(&echo, b"ping");
        drop(stream);
        until("the tunnel is counted", || web.counted() == [("default/api>default/web".into(), 101, String::new(), 1)])
            .await;
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn the_forward_proxy_serves_names_of_the_mesh_with_the_password() {
    let test = async {
        let port = application("hello").await;
        let (api, _web, _) = two(Protocol::Http, port).await;
        let door = forward_door(&api).await;
        let exchange = async |request: &[u8]| {
            let mut stream = TcpStream::connect(door).await.unwrap();
            stream.write_all(request).await.unwrap();
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            String::from_utf8_lossy(&answer).into_owned()
        };
        let password = "Proxy-Authorization: Basic dTpw\r\n";
        let plain = |head: &str| format!("GET http://web/ HTTP/1.1\r\nHost: web\r\n{head}Connection: close\r\n\r\n");
        assert!(exchange(plain("").as_bytes()).await.starts_with("HTTP/1.1 407"));
        let answer = exchange(plain(password).as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("hello"), "{answer}");
        // A tunnel: what is in it goes the same way.
        let inner = "GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n";
        let connect = |to: &str| format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n{password}\r\n{inner}");
        let answer = exchange(connect("web:80").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("hello"), "{answer}");
        let answer = exchange(connect("127.0.0.1:22").as_bytes()).await;
        assert!(answer.contains("destination-forbidden"), "{answer}");
        // SOCKS5 with a password, to a name.
        let mut socks = b"\x05\x01\x02\x01\x01u\x01p\x05\x01\x00\x03\x03web\x00\x50".to_vec();
        socks.extend_from_slice(inner.as_bytes());
        let answer = exchange(&socks).await;
        assert!(answer.contains("HTTP/1.1 200") && answer.contains("hello"), "{answer}");
        let answer = exchange(b"\x05\x01\x02\x01\x01u\x01x").await;
        assert_eq!(answer.as_bytes(), b"\x05\x02\x01\x01");
    };
    LocalSet::new().run_until(test).await;
}

//! What people and programs on the host may ask a proxy: metrics and readiness on the metrics listener, and the
//! configuration in force on a unix socket, for its own user and root alone.

use crate::drain;
use crate::metrics::Metrics;
use crate::metrics::exposition::CONTENT_TYPE;
use crate::sync::Standing;
use crate::upstream::endpoint::Table;
use crate::upstream::tls::Credentials;
use arc_swap::{ArcSwap, ArcSwapOption};
use bytes::Bytes;
use http::uri::Authority;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use sheer_core::snapshot::{Service, Snapshot};
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, watch};

/// Connections at once; further ones wait in the listener's queue.
const MAX_CONNECTIONS: usize = 32;

/// How long a request's head may take.
const HEAD: Duration = Duration::from_secs(5);

/// What can be looked at.
pub struct Inspection {
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// The configuration in force.
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    /// The endpoints in use.
    pub endpoints: Arc<Table>,
    /// The certificate in use.
    pub credentials: Arc<ArcSwapOption<Credentials>>,
    /// What the control plane said of the registration.
    pub standing: watch::Receiver<Standing>,
    /// Whether the proxy serves.
    pub serving: watch::Receiver<bool>,
    /// How far it has come in leaving.
    pub drain: drain::Watch,
}

impl Inspection {
    /// Serves `/metrics`, `/ready` and `/live` until the future is dropped or another proxy does; the latter two also by
    /// the names that Kubernetes gives them.
    pub async fn serve_metrics(self: Arc<Self>, listener: TcpListener, mut drain: drain::Watch) {
        // A page in a browser of this host can have its own name lead here (DNS rebinding). Who listens for others is
        // called by names that nobody here knows.
        let is_loopback = listener.local_addr().is_ok_and(|address| address.ip().is_loopback());
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok(permit) = connections.clone().acquire_owned().await else { return };
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = drain.replaced() => return,
            };
            match accepted {
                Ok((stream, _)) => {
                    let inspection = self.clone();
                    tokio::spawn(async move {
                        let answer = |request: &Request<Incoming>| match !is_loopback || is_for_loopback(request) {
                            true => inspection.answer(request, false),
                            false => text(StatusCode::FORBIDDEN, "ask by a loopback address or as localhost\n"),
                        };
                        serve(TokioIo::new(stream), answer).await;
                        drop(permit);
                    });
                }
                Err(error) => pause(&error).await,
            }
        }
    }

    /// Serves the same and `/config_dump` on a unix socket until the future is dropped or another proxy does.
    pub async fn serve_admin(self: Arc<Self>, listener: UnixListener, mut drain: drain::Watch) {
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let own = nix::unistd::geteuid().as_raw();
        loop {
            let Ok(permit) = connections.clone().acquire_owned().await else { return };
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = drain.replaced() => return,
            };
            match accepted {
                Ok((stream, _)) => {
                    let admitted = stream.peer_cred().is_ok_and(|peer| peer.uid() == 0 || peer.uid() == own);
                    let inspection = self.clone();
                    tokio::spawn(async move {
                        let answer = |request: &Request<Incoming>| match admitted {
                            true => inspection.answer(request, true),
                            false => text(StatusCode::FORBIDDEN, "only the proxy's own user and root may ask here\n"),
                        };
                        serve(TokioIo::new(stream), answer).await;
                        drop(permit);
                    });
                }
                Err(error) => pause(&error).await,
            }
        }
    }

    fn answer(&self, request: &Request<Incoming>, whole: bool) -> Response<Full<Bytes>> {
        if request.method() != Method::GET {
            return text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
        }
        match request.uri().path() {
            "/metrics" => with_type(StatusCode::OK, CONTENT_TYPE, self.metrics.exposition()),
            "/live" | "/livez" => text(StatusCode::OK, "live\n"),
            "/ready" | "/readyz" if self.drain.is_told() => text(StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
            "/ready" | "/readyz" if self.has_ended() => text(
                StatusCode::SERVICE_UNAVAILABLE,
                "the certificate has ended: no peer takes it; is the clock right?\n",
            ),
            "/ready" | "/readyz" if *self.serving.borrow() => text(StatusCode::OK, "ready\n"),
            "/ready" | "/readyz" => {
                text(StatusCode::SERVICE_UNAVAILABLE, "waiting for certificate and configuration\n")
            }
            "/config_dump" if whole => with_type(StatusCode::OK, "application/json", format!("{:#}\n", self.dump())),
            _ if whole => text(StatusCode::NOT_FOUND, "there is /config_dump, /metrics, /ready and /live\n"),
            _ => text(StatusCode::NOT_FOUND, "there is /metrics, /ready and /live\n"),
        }
    }

    /// Whether the certificate is none any more, by this machine's clock.
    fn has_ended(&self) -> bool {
        self.credentials.load().as_ref().is_some_and(|it| it.not_after() <= SystemTime::now())
    }

    /// The configuration in force. Keys and tokens are not part of what it is made of.
    fn dump(&self) -> Value {
        let snapshot = self.snapshot.load();
        let mesh = snapshot.mesh();
        let certificate = self.credentials.load().as_ref().map(|it| {
            let expires = it.not_after().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            json!({ "identity": it.id().to_string(), "expires": expires })
        });
        let mut services: Vec<_> = snapshot.services().collect();
        services.sort_by(|a, b| a.name.cmp(&b.name));
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "control": {
                "connected": self.metrics.control_connected(),
                "registration": match &*self.standing.borrow() {
                    Standing::Unknown => "unknown".to_owned(),
                    Standing::Registered => "registered".to_owned(),
                    Standing::Refused { message } => message.clone(),
                },
            },
            "phase": format!("{:?}", self.drain.phase()).to_ascii_lowercase(),
            "certificate": certificate,
            "mesh": {
                "trustDomain": mesh.trust_domain,
                "clusterDomain": mesh.cluster_domain,
                "virtualRanges": mesh.virtual_ranges.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "denyUnknownEgress": mesh.deny_unknown_egress,
            },
            "workload": snapshot.workload().map(|it| json!({
                "uid": it.uid.as_ref(),
                "identity": it.identity.to_string(),
                "services": it.services.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "ports": it.ports.iter().map(|port| port.port).collect::<Vec<_>>(),
                "mode": format!("{:?}", it.mode).to_ascii_lowercase(),
                "exceptions": it.exceptions.iter().map(|it| json!({
                    "ports": it.ports,
                    "cidrs": it.cidrs.iter().map(ToString::to_string).collect::<Vec<_>>(),
                    "reason": it.reason,
                })).collect::<Vec<_>>(),
            })),
            "services": services.into_iter().map(|it| self.dump_service(&snapshot, it)).collect::<Vec<_>>(),
        })
    }

    fn dump_service(&self, snapshot: &Snapshot, service: &Service) -> Value {
        let endpoints = self.endpoints.get(&service.name).and_then(|cell| cell.load_full()).map(|live| {
            let of_port = |port: u16| live.of_port(port).iter().map(|it| &it.endpoint);
            let all = service.ports.iter().flat_map(|port| of_port(port.port));
            let one = |it: &Arc<sheer_core::snapshot::Endpoint>| {
                json!({
                    "workload": it.workload.as_ref(),
                    "servicePort": it.service_port,
                    "address": it.address.to_string(),
                    "serverName": it.server_name.as_ref(),
                    "hop": format!("{:?}", it.hop).to_ascii_lowercase(),
                    "health": format!("{:?}", it.health).to_ascii_lowercase(),
                    "weight": it.weight,
                })
            };
            let identities: Vec<String> = live.identities.iter().map(ToString::to_string).collect();
            json!({ "identities": identities, "list": all.map(one).collect::<Vec<_>>() })
        });
        let backends = snapshot.routes(&service.name).map(|rules| {
            let mut names: Vec<String> = rules.backends().map(|it| it.service.to_string()).collect();
            names.sort_unstable();
            names.dedup();
            names
        });
        json!({
            "name": service.name.to_string(),
            "hosts": service.hosts.iter().map(AsRef::as_ref).collect::<Vec<&str>>(),
            "addresses": service.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "ports": service.ports.iter().map(|port| {
                json!({ "port": port.port, "protocol": format!("{:?}", port.protocol).to_ascii_lowercase() })
            }).collect::<Vec<_>>(),
            "routedTo": backends,
            "endpoints": endpoints,
        })
    }
}

/// Whether a request names this host's loopback, or nothing at all, which no browser does.
fn is_for_loopback(request: &Request<Incoming>) -> bool {
    let host = |text: &str| -> Option<String> {
        let authority = text.parse::<Authority>().ok()?;
        Some(authority.host().trim_matches(['[', ']']).to_ascii_lowercase())
    };
    let is_loopback = |text: &str| {
        host(text).is_some_and(|it| it == "localhost" || it.parse::<IpAddr>().is_ok_and(|it| it.is_loopback()))
    };
    let named = request.headers().get_all(header::HOST).iter().all(|it| it.to_str().is_ok_and(is_loopback));
    named && request.uri().authority().is_none_or(|authority| is_loopback(authority.as_str()))
}

async fn serve<I>(io: I, answer: impl Fn(&Request<Incoming>) -> Response<Full<Bytes>>)
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin,
{
    let service = service_fn(|request: Request<Incoming>| {
        let response = answer(&request);
        async { Ok::<_, Infallible>(response) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .serve_connection(io, service);
    // A broken connection is its client's trouble.
    let _ = connection.await;
}

async fn pause(error: &std::io::Error) {
    tracing::debug!(%error, "cannot accept");
    tokio::time::sleep(Duration::from_millis(50)).await;
}

fn text(status: StatusCode, body: &str) -> Response<Full<Bytes>> {
    with_type(status, "text/plain; charset=utf-8", body.to_owned())
}

fn with_type(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use sheer_core::name::{DnsLabel, ServiceName};
    use sheer_core::snapshot::{Protocol, ServicePort};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpStream, UnixStream};

    fn inspection() -> (Arc<Inspection>, watch::Sender<bool>, drain::Signal) {
        let mut snapshot = Snapshot::new(DnsLabel::parse("default").unwrap());
        let name = ServiceName::parse("api").unwrap();
        snapshot.put_service(Arc::new(Service {
            hosts: vec![name.host("mesh.internal").into()],
            name,
            addresses: vec!["240.0.0.1".parse().unwrap()],
            ports: vec![ServicePort { port: 80, protocol: Protocol::Detect }],
        }));
        let (serving, serving_watch) = watch::channel(false);
        let (signal, drain) = drain::channel();
        let authority = crate::testing::Authority::new("mesh.internal");
        let inspection = Inspection {
            metrics: Arc::default(),
            snapshot: Arc::new(ArcSwap::from_pointee(snapshot)),
            endpoints: Arc::default(),
            credentials: Arc::new(ArcSwapOption::new(Some(authority.credentials("default", "web")))),
            standing: watch::channel(Standing::Registered).1,
            serving: serving_watch,
            drain,
        };
        (Arc::new(inspection), serving, signal)
    }

    async fn get(stream: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin), path: &str) -> (u16, String) {
        ask(stream, &format!("GET {path} HTTP/1.1\r\nHost: localhost:1")).await
    }

    async fn ask(stream: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin), head: &str) -> (u16, String) {
        let request = format!("{head}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        (answer[9..12].parse().unwrap(), answer)
    }

    #[tokio::test]
    async fn readiness_follows_the_proxys_life() {
        let (inspection, serving, signal) = inspection();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(inspection.serve_metrics(listener, drain::channel().1));
        let ask = async |path: &str| get(&mut TcpStream::connect(address).await.unwrap(), path).await.0;
        assert_eq!((ask("/live").await, ask("/ready").await), (200, 503));
        serving.send_replace(true);
        assert_eq!((ask("/ready").await, ask("/metrics").await), (200, 200));
        assert_eq!((ask("/readyz").await, ask("/livez").await), (200, 200));
        assert_eq!((ask("/config_dump").await, ask("/").await), (404, 404));
        signal.set(drain::Phase::Told);
        assert_eq!((ask("/live").await, ask("/ready").await, ask("/readyz").await), (200, 503, 503));
        task.abort();
    }

    /// What a page of a browser could send is answered to nobody: another name that leads here, other methods, questions
    /// whether it may.
    #[tokio::test]
    async fn pages_of_others_learn_nothing() {
        let (inspection, serving, _signal) = inspection();
        serving.send_replace(true);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(inspection.clone().serve_metrics(listener, drain::channel().1));
        let metrics = async |host: &str| {
            let mut stream = TcpStream::connect(address).await.unwrap();
            ask(&mut stream, &format!("GET /metrics HTTP/1.1\r\nHost: {host}")).await.0
        };
        for own in ["localhost", "LOCALHOST:9", "127.0.0.1:1", "127.0.0.8", "[::1]:80"] {
            assert_eq!(metrics(own).await, 200, "{own}");
        }
        for other in
            ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:1", "10.0.0.1", "[::2]", "a@b", ""]
        {
            assert!(matches!(metrics(other).await, 403 | 400), "{other}");
        }
        let mut stream = TcpStream::connect(address).await.unwrap();
        let twice = ask(&mut stream, "GET /metrics HTTP/1.1\r\nHost: localhost\r\nHost: evil.example").await;
        assert_ne!(twice.0, 200);
        let mut stream = TcpStream::connect(address).await.unwrap();
        assert_eq!(ask(&mut stream, "GET http://evil.example/metrics HTTP/1.1\r\nHost: localhost").await.0, 403);
        for method in ["POST", "OPTIONS", "PUT", "DELETE", "HEAD", "TRACE"] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let head = format!("{method} /metrics HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example");
            let (status, answer) = ask(&mut stream, &head).await;
            assert!(status == 405 && !answer.to_ascii_lowercase().contains("access-control"), "{answer}");
        }
        task.abort();
        // Who was told to listen for others is asked by any name.
        let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let task = tokio::spawn(inspection.serve_metrics(listener, drain::channel().1));
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        assert_eq!(ask(&mut stream, "GET /metrics HTTP/1.1\r\nHost: web.pods.example").await.0, 200);
        task.abort();
    }

    #[tokio::test]
    async fn the_dump_shows_what_is_in_force_and_no_secret() {
        let (inspection, _serving, _signal) = inspection();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("admin.sock");
        let task = tokio::spawn(inspection.serve_admin(UnixListener::bind(&path).unwrap(), drain::channel().1));
        let (status, answer) = get(&mut UnixStream::connect(&path).await.unwrap(), "/config_dump").await;
        assert_eq!(status, 200);
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        let dump: Value = serde_json::from_str(body).unwrap();
        assert_eq!(dump["services"][0]["addresses"][0], "240.0.0.1");
        assert_eq!(dump["certificate"]["identity"], "spiffe://mesh.internal/ns/default/sa/web");
        assert_eq!(dump["control"]["registration"], "registered");
        assert!(!body.contains("PRIVATE") && !body.contains("\"key\""));
        task.abort();
    }
}

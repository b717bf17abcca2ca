//! Both sides against each other, and against an independent implementation on each.

use super::client::{Connection, Return};
use super::server::{ConnError, Ended, Options, Outcome, serve};
use super::*;
use crate::body::{Body, Interim, Request, Response};
use crate::testing::{Authority, loopback};
use crate::upstream::tls::Carried;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame as HyperFrame;
use hyper_util::rt::TokioIo;
use sheer_core::cause::Cause;
use sheer_core::head::{RequestHead, ResponseHead, Version};
use std::cell::RefCell;
use std::convert::Infallible;
use std::rc::Rc;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio_stream::wrappers::ReceiverStream;

/// The smallest pool: last in, first out.
#[derive(Default)]
struct Pool {
    idle: RefCell<Vec<Connection>>,
    dialled: RefCell<usize>,
}

impl Return for Pool {
    fn give_back(&self, connection: Connection) {
        self.idle.borrow_mut().push(connection);
    }
}

/// A proxy without features between a client and endpoints that `dial` makes.
async fn proxy(
    client: DuplexStream,
    pool: Rc<Pool>,
    dial: impl Fn() -> DuplexStream,
) -> Result<Ended<Upgraded>, ConnError> {
    let forward = async |request: Request| {
        let Request { head, body, interim } = request;
        let pooled = pool.idle.borrow_mut().pop();
        let connection = pooled.unwrap_or_else(|| {
            *pool.dialled.borrow_mut() += 1;
            Connection::new(Io::from(dial()))
        });
        match connection.send(&head, body, &interim, Some(pool.clone())).await {
            Ok(response) if response.head.status == http::StatusCode::SWITCHING_PROTOCOLS => {
                let Response { head, body } = response;
                match body.into_upgraded() {
                    Ok(upgraded) => Outcome::Tunnel(Response { head, body: Body::Empty }, upgraded),
                    Err(_) => Outcome::Close,
                }
            }
            Ok(response) => Outcome::Response(response),
            Err(error) => Outcome::Response(Response {
                head: ResponseHead::new(error.cause.status()),
                body: Body::from(Bytes::from(error.cause.reason())),
            }),
        }
    };
    serve(Io::from(client), BytesMut::new(), &Options::default(), std::future::pending(), forward).await
}

/// An endpoint by hyper that sends back what it gets, part by part, with what it was asked in fields.
fn hyper_echo() -> DuplexStream {
    let (near, far) = duplex(64 * 1024);
    let service = hyper::service::service_fn(async |request: hyper::Request<hyper::body::Incoming>| {
        let mut response = hyper::Response::builder()
            .header("x-method", request.method().as_str())
            .header("x-path", request.uri().path_and_query().map_or("", |path| path.as_str()));
        if request.uri().path() == "/nothing" {
            response = response.status(204);
        }
        Ok::<_, Infallible>(response.body(request.into_body()).unwrap())
    });
    tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(far), service));
    near
}

type HyperBody = http_body_util::combinators::BoxBody<Bytes, Infallible>;

async fn hyper_client(stream: DuplexStream) -> hyper::client::conn::http1::SendRequest<HyperBody> {
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

fn streamed(parts: Vec<Bytes>) -> HyperBody {
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        for part in parts {
            if sender.send(Ok(HyperFrame::data(part))).await.is_err() {
                return;
            }
        }
    });
    StreamBody::new(ReceiverStream::new(receiver)).boxed()
}

#[tokio::test]
async fn an_independent_client_and_server_understand_both_sides() {
    let pool = Rc::new(Pool::default());
    let (client, server) = duplex(64 * 1024);
    let script = async {
        let mut sender = hyper_client(client).await;
        let large = Bytes::from((0..3_000_000u32).map(|at| (at / 7) as u8).collect::<Vec<_>>());
        let bodies: [(&str, Bytes, HyperBody); 4] = [
            ("sized", Bytes::from_static(b"abc"), Full::new(Bytes::from_static(b"abc")).boxed()),
            ("empty", Bytes::new(), Full::new(Bytes::new()).boxed()),
            ("large", large.clone(), Full::new(large.clone()).boxed()),
            ("streamed", large.clone(), streamed(large.chunks(100_001).map(Bytes::copy_from_slice).collect())),
        ];
        for (name, sent, body) in bodies {
            let request = hyper::Request::post(format!("/{name}?x=%2f")).header("host", "api").body(body).unwrap();
            let response = sender.send_request(request).await.unwrap();
            assert_eq!(response.headers()["x-path"], format!("/{name}?x=%2f"));
            let received = response.into_body().collect().await.unwrap().to_bytes();
            assert!(received == sent, "{name}");
        }
        for (method, path, status) in [("HEAD", "/", 200), ("GET", "/nothing", 204), ("DELETE", "/a", 200)] {
            let body = Full::new(Bytes::new()).boxed();
            let request = hyper::Request::builder().method(method).uri(path).header("host", "api").body(body).unwrap();
            let response = sender.send_request(request).await.unwrap();
            assert_eq!(
                (response.status().as_u16(), &response.headers()["x-method"]),
                (status, &method.parse().unwrap())
            );
            assert!(response.into_body().collect().await.unwrap().to_bytes().is_empty());
        }
        drop(sender);
    };
    let (ended, ()) = tokio::join!(proxy(server, pool.clone(), hyper_echo), script);
    assert!(matches!(ended, Ok(Ended::Closed)), "{ended:?}");
    assert_eq!((*pool.dialled.borrow(), pool.idle.borrow().len()), (1, 1), "one connection served all");
}

/// A client, and the endpoint it talks to through a proxy, both by hand.
struct Wires {
    client: DuplexStream,
    endpoint: DuplexStream,
    pool: Rc<Pool>,
    proxied: tokio::task::JoinHandle<Result<Ended<Upgraded>, ConnError>>,
}

fn wires() -> Wires {
    let (client, server) = duplex(64 * 1024);
    let (near, endpoint) = duplex(64 * 1024);
    let near = RefCell::new(Some(near));
    let pool = Rc::new(Pool::default());
    let proxied = tokio::task::spawn_local(proxy(server, pool.clone(), move || near.take().expect("one connection")));
    Wires { client, endpoint, pool, proxied }
}

async fn expect(stream: &mut DuplexStream, text: &str) {
    let mut heard = vec![0; text.len()];
    stream.read_exact(&mut heard).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&heard), text);
}

async fn say(stream: &mut DuplexStream, text: &str) {
    stream.write_all(text.as_bytes()).await.unwrap();
}

async fn local(test: impl Future<Output = ()>) {
    tokio::task::LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn both_directions_flow_at_once() {
    local(async {
        let Wires { mut client, mut endpoint, pool, proxied } = wires();
        let head = "POST /chat HTTP/1.1\r\nHost: api\r\nTransfer-Encoding: chunked\r\n\r\n";
        say(&mut client, head).await;
        expect(&mut endpoint, head).await;
        // The endpoint answers before it has read anything, and then word by word.
        let answer = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        say(&mut endpoint, answer).await;
        expect(&mut client, answer).await;
        for word in ["1\r\na\r\n", "2\r\nbc\r\n", "3\r\ndef\r\n"] {
            say(&mut client, word).await;
            expect(&mut endpoint, word).await;
            say(&mut endpoint, word).await;
            expect(&mut client, word).await;
        }
        say(&mut client, "0\r\nx-asked: 1\r\n\r\n").await;
        expect(&mut endpoint, "0\r\nx-asked: 1\r\n\r\n").await;
        say(&mut endpoint, "0\r\nx-told: 2\r\n\r\n").await;
        expect(&mut client, "0\r\nx-told: 2\r\n\r\n").await;
        drop(client);
        assert!(matches!(proxied.await.unwrap(), Ok(Ended::Closed)));
        assert_eq!(pool.idle.borrow().len(), 1, "both messages were whole");
    })
    .await;
}

#[tokio::test]
async fn a_whole_answer_before_the_requests_end_closes_the_endpoints_connection_only() {
    local(async {
        let Wires { mut client, mut endpoint, pool, proxied } = wires();
        say(&mut client, "POST / HTTP/1.1\r\nHost: api\r\nContent-Length: 10\r\n\r\nabc").await;
        expect(&mut endpoint, "POST / HTTP/1.1\r\nHost: api\r\nContent-Length: 10\r\n\r\nabc").await;
        say(&mut endpoint, "HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno").await;
        expect(&mut client, "HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno").await;
        assert_eq!(endpoint.read_to_end(&mut Vec::new()).await.unwrap(), 0);
        assert!(pool.idle.borrow().is_empty());
        say(&mut client, "defghij").await;
        client.shutdown().await.unwrap();
        assert_eq!(client.read_to_end(&mut Vec::new()).await.unwrap(), 0);
        assert!(matches!(proxied.await.unwrap(), Ok(Ended::Closed)));
    })
    .await;
}

#[tokio::test]
async fn a_body_cut_off_reaches_nobody_else() {
    local(async {
        let Wires { mut client, mut endpoint, pool, proxied } = wires();
        say(&mut client, "POST / HTTP/1.1\r\nHost: api\r\nContent-Length: 100\r\n\r\n0123456789").await;
        client.shutdown().await.unwrap();
        let mut heard = Vec::new();
        endpoint.read_to_end(&mut heard).await.unwrap();
        assert!(heard.ends_with(b"0123456789"));
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.contains(Cause::ClientGone.reason()), "{answer}");
        assert!(proxied.await.unwrap().is_ok() && pool.idle.borrow().is_empty());
    })
    .await;
}

#[tokio::test]
async fn an_expectation_travels_and_so_does_its_answer() {
    local(async {
        let Wires { mut client, mut endpoint, pool, proxied } = wires();
        let head = "PUT / HTTP/1.1\r\nHost: api\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n";
        say(&mut client, head).await;
        expect(&mut endpoint, head).await;
        say(&mut endpoint, "HTTP/1.1 100 Continue\r\n\r\n").await;
        expect(&mut client, "HTTP/1.1 100 Continue\r\n\r\n").await;
        say(&mut client, "abc").await;
        expect(&mut endpoint, "abc").await;
        say(&mut endpoint, "HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            .await;
        expect(&mut client, "HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            .await;
        drop(client);
        assert!(matches!(proxied.await.unwrap(), Ok(Ended::Closed)));
        assert_eq!(pool.idle.borrow().len(), 1);
    })
    .await;
}

#[tokio::test]
async fn an_upgrade_hands_both_connections_over() {
    local(async {
        let Wires { mut client, mut endpoint, proxied, .. } = wires();
        say(
            &mut client,
            "GET /ws HTTP/1.1\r\nHost: api\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\r\nearly",
        )
        .await;
        expect(&mut endpoint, "GET /ws HTTP/1.1\r\nHost: api\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
            .await;
        say(
            &mut endpoint,
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nhello",
        )
        .await;
        expect(&mut client, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
            .await;
        let Ok(Ended::Tunnel(near, far)) = proxied.await.unwrap() else { panic!("no tunnel") };
        assert_eq!((&near.read[..], &far.read[..]), (&b"early"[..], &b"hello"[..]));
    })
    .await;
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_never_a_whole_one() {
    for says in [
        "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    ] {
        local(async {
            let Wires { mut client, mut endpoint, proxied, .. } = wires();
            say(&mut client, "GET / HTTP/1.1\r\nHost: api\r\n\r\n").await;
            expect(&mut endpoint, "GET / HTTP/1.1\r\nHost: api\r\n\r\n").await;
            say(&mut endpoint, says).await;
            drop(endpoint);
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            assert_eq!(answer, says);
            assert!(matches!(proxied.await.unwrap(), Err(ConnError::Response(BodyError::Truncated))));
        })
        .await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_while_it_waits_closes_the_endpoints_connection() {
    local(async {
        let Wires { mut client, mut endpoint, pool, proxied } = wires();
        say(&mut client, "GET / HTTP/1.1\r\nHost: api\r\n\r\n").await;
        expect(&mut endpoint, "GET / HTTP/1.1\r\nHost: api\r\n\r\n").await;
        drop(client);
        assert_eq!(endpoint.read_to_end(&mut Vec::new()).await.unwrap(), 0);
        assert!(matches!(proxied.await.unwrap(), Err(ConnError::ClientGone)));
        assert!(pool.idle.borrow().is_empty());
    })
    .await;
}

#[tokio::test]
async fn a_hop_with_tls_carries_what_one_without_does() {
    local(async {
        let ca = Authority::new("mesh.internal");
        let (web, api) = (ca.credentials("default", "web"), ca.credentials("default", "api"));
        let (near, far) = loopback().await;
        let dialer = web.dialer();
        let name = "p80.api.default.svc.mesh.internal";
        let (near, far) = tokio::join!(dialer.connect(near, name, Carried::Http1), api.accept(far));
        let (near, far) = (near.unwrap().0, far.unwrap().io);
        // The far proxy's service sends back what it gets, while it gets it.
        let far = tokio::task::spawn_local(async move {
            let mirror = async |request: Request| {
                Outcome::<()>::Response(Response { head: ResponseHead::new(http::StatusCode::OK), body: request.body })
            };
            serve(far, BytesMut::new(), &Options::default(), std::future::pending(), mirror).await
        });
        let pool = Rc::new(Pool::default());
        let sent = Bytes::from((0..1_000_000u32).map(|at| (at / 3) as u8).collect::<Vec<_>>());
        let mut connection = Connection::new(near);
        for part in [sent.clone(), sent.slice(..10), sent.slice(..100_000)] {
            // Session tickets may have arrived: they are nothing that the endpoint said.
            assert!(connection.is_idle_and_open());
            let head = RequestHead::new(http::Method::PUT, Version::Http11, "api", "/");
            let body = Body::Full(part.clone());
            let mut response = connection.send(&head, body, &Interim::default(), Some(pool.clone())).await.unwrap();
            let mut received = BytesMut::new();
            while let Some(frame) = response.body.frame().await {
                let Frame::Data(data) = frame.unwrap() else { panic!("no trailers were sent") };
                received.extend_from_slice(&data);
            }
            assert!(received == part);
            connection = pool.idle.borrow_mut().pop().unwrap();
        }
        drop(connection);
        assert!(matches!(far.await.unwrap(), Ok(Ended::Closed)));
    })
    .await;
}

#[tokio::test]
async fn an_idle_connection_is_small() {
    let service = async |_: Request| Outcome::<()>::Close;
    let (_client, server) = duplex(64);
    let options = Options::default();
    let serving = serve(Io::from(server), BytesMut::new(), &options, std::future::pending(), service);
    assert!(size_of_val(&serving) < 4096, "{} bytes", size_of_val(&serving));
}

//! The generator against real servers on loopback.

use super::*;
use crate::{Arguments, Kind};
use clap::Parser as _;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// A sample service in this process.
struct Server {
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    ended: JoinHandle<()>,
}

impl Server {
    async fn start(kind: &str) -> Self {
        let arguments = Arguments::try_parse_from([kind, "--version", "v2"]).unwrap();
        let (stop, stopped) = oneshot::channel();
        let (listening, address) = oneshot::channel();
        let ended = tokio::spawn(async move {
            let stopped = async { drop(stopped.await) };
            crate::run(arguments, stopped, |address| listening.send(address).unwrap()).await.unwrap();
        });
        Self { address: address.await.unwrap(), stop, ended }
    }

    async fn stop(self) {
        self.stop.send(()).unwrap();
        self.ended.await.unwrap();
    }
}

/// Starts a load and waits until some answers are in.
async fn started(load: Load, hang_up: f64) -> Running {
    let mut plan = Plan::new(vec![load]);
    plan.hang_up = hang_up;
    let running = start(plan);
    let answers = async {
        while running.counts().ok < 20 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), answers).await.unwrap();
    running
}

#[tokio::test]
async fn every_protocol_is_answered_and_counted() {
    let catalog = Server::start("catalog").await;
    let pricing = Server::start("pricing").await;
    let echo = Server::start("echo").await;
    for (protocol, url) in [
        (Protocol::Http1, format!("http://{}/items", catalog.address)),
        (Protocol::Http2, format!("http://{}/items", catalog.address)),
        (Protocol::Grpc, format!("http://{}", pricing.address)),
        (Protocol::GrpcStream, format!("http://{}", pricing.address)),
        (Protocol::Tcp, format!("tcp://{}", echo.address)),
        (Protocol::Tcp, format!("tcp://{}?lines=3", echo.address)),
    ] {
        let mut load = Load::new(protocol, &url).unwrap().at(200.0, 2).named("it");
        load.message_interval = Duration::from_millis(2);
        let running = started(load, 0.0).await;
        running.phase("after");
        let report = running.stop().await;
        let counts = report.total;
        assert_eq!((counts.in_flight(), counts.failed(), counts.hung_up), (0, 0, 0), "{protocol:?}: {report:?}");
        assert_eq!(counts.sent, counts.ok);
        if protocol != Protocol::Tcp {
            assert_eq!(report.loads["it"].versions["v2"].count, counts.ok, "{protocol:?}");
        }
    }
    for server in [catalog, pricing, echo] {
        server.stop().await;
    }
}

#[tokio::test]
async fn those_who_hang_up_are_counted_apart() {
    let catalog = Server::start("catalog").await;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let load =
            Load::new(protocol, &format!("http://{}/probe/chunks/100000", catalog.address)).unwrap().at(500.0, 4);
        let counts = started(load, 0.5).await.stop().await.total;
        assert_eq!((counts.in_flight(), counts.failed()), (0, 0), "{counts}");
        assert!(counts.hung_up > 0, "{counts}");
    }
    catalog.stop().await;
}

#[tokio::test]
async fn a_server_that_stops_in_order_costs_no_request() {
    for (kind, protocol) in [
        ("catalog", Protocol::Http1),
        ("catalog", Protocol::Http2),
        ("pricing", Protocol::Grpc),
        ("pricing", Protocol::GrpcStream),
        ("echo", Protocol::Tcp),
        ("echo?lines=3", Protocol::Tcp),
    ] {
        let (kind, query) = kind.split_at(kind.find('?').unwrap_or(kind.len()));
        let server = Server::start(kind).await;
        let mut load = Load::new(protocol, &format!("http://{}{query}", server.address)).unwrap().at(500.0, 4);
        load.message_interval = Duration::from_millis(2);
        if kind == "catalog" {
            load.path = "/items".to_owned();
        }
        let running = started(load, 0.0).await;
        server.stop().await;
        let report = running.stop().await;
        let counts = report.total;
        // Once nobody listens, only new connections fail.
        assert_eq!(counts.failed(), counts.connect, "{kind} {protocol:?}: {report:#?}");
    }
}

#[tokio::test]
async fn wrong_answers_are_told_apart() {
    for (answer, wanted) in [
        ("HTTP/1.1 503 No\r\nx-why-reason: closed for lunch\r\ncontent-length: 0\r\n\r\n", "non_2xx"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf", "short"),
        ("HTTP/1.1 200 OK\r\nx-sequence: 7\r\ncontent-length: 0\r\n\r\n", "reordered"),
        ("", "reset"),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = stream.read(&mut [0; 1024]).await;
                let _ = stream.write_all(answer.as_bytes()).await;
                let _ = stream.shutdown().await;
            }
        });
        let running = start(Plan::new(vec![Load::new(Protocol::Http1, &url).unwrap().at(100.0, 1).named("it")]));
        let failed = async {
            while running.counts().failed() == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), failed).await.unwrap();
        let report = running.stop().await;
        let failure = &report.loads["it"].failures[0];
        assert_eq!(failure.kind, wanted, "{failure:?}");
        if wanted == "non_2xx" {
            assert!(failure.detail.contains("closed for lunch"), "{failure:?}");
        }
        assert_eq!(report.total.in_flight(), 0);
    }
}

/// A server that resets after the last line instead of ending in order costs that line.
#[tokio::test]
async fn how_a_short_connection_ends_is_looked_at() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("tcp://{}?lines=2", listener.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut bytes = [0; 1024];
            for _ in 0..2 {
                let length = stream.read(&mut bytes).await.unwrap();
                stream.write_all(&bytes[..length]).await.unwrap();
            }
            assert_eq!(stream.read(&mut bytes).await.unwrap(), 0, "its client ends it");
            stream.set_zero_linger().unwrap();
        }
    });
    let running = start(Plan::new(vec![Load::new(Protocol::Tcp, &url).unwrap().at(100.0, 1).named("it")]));
    let failed = async {
        while running.counts().failed() < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), failed).await.unwrap();
    let report = running.stop().await;
    assert!(report.loads["it"].failures.iter().all(|it| it.detail.contains("at the end")), "{report:?}");
    assert!(report.total.ok >= report.total.failed(), "{report:?}");
}

#[tokio::test]
async fn the_shop_works_without_some_of_its_peers() {
    let catalog = Server::start("catalog").await;
    let mut arguments = Arguments::try_parse_from(["web"]).unwrap();
    assert_eq!(arguments.kind, Kind::Web);
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let nowhere = format!("http://{}", nobody.local_addr().unwrap());
    drop(nobody);
    arguments.peers = vec![
        ("catalog".to_owned(), format!("http://{}", catalog.address)),
        ("pricing".to_owned(), nowhere.clone()),
        ("reviews".to_owned(), nowhere.clone()),
        ("cart".to_owned(), nowhere),
    ];
    let (listening, address) = oneshot::channel();
    let (stop, stopped) = oneshot::channel::<()>();
    let web = tokio::spawn(async move {
        crate::run(arguments, async { drop(stopped.await) }, |address| listening.send(address).unwrap()).await
    });
    let address = address.await.unwrap();
    let client = crate::client::Client::new(&format!("http://{address}"));
    let item = client.get_json("/api/items/net").await.unwrap();
    assert_eq!(item["name"], "Butterfly net");
    assert!(item["reviews"]["unavailable"].as_str().unwrap().contains("cannot be reached"), "{item}");
    assert!(client.get_json("/api/items/nothing").await.unwrap_err().to_string().contains("404"));
    let page = client.call(http::Method::GET, "/").await.unwrap();
    assert!(page.status.is_success() && page.body.starts_with(b"<!doctype html>"));
    stop.send(()).unwrap();
    web.await.unwrap().unwrap();
    catalog.stop().await;
}

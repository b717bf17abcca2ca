//! Byte streams and HTTP/1 connections through both proxies, in all the ways in which they can be cut, closed and broken.

use super::*;
use proptest::collection::vec;
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use std::time::Instant;
use tokio::io::Interest;
use tokio::sync::mpsc;

/// An application whose connections the test holds itself.
async fn held() -> (u16, mpsc::Receiver<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (accepted, connections) = mpsc::channel(100);
    spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            if accepted.send(stream).await.is_err() {
                return;
            }
        }
    });
    (port, connections)
}

/// Waits no longer than anybody would.
async fn soon<T>(what: &str, it: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(10), it).await.unwrap_or_else(|_| panic!("never: {what}"))
}

async fn accepted(connections: &mut mpsc::Receiver<TcpStream>) -> TcpStream {
    soon("the application is called", connections.recv()).await.unwrap()
}

async fn to_end(stream: &mut TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    soon("the stream ends", stream.read_to_end(&mut all)).await.unwrap();
    all
}

/// A client and what the application has of it.
async fn joined(door: SocketAddr, connections: &mut mpsc::Receiver<TcpStream>) -> (TcpStream, TcpStream) {
    let mut client = TcpStream::connect(door).await.unwrap();
    client.write_all(b"\0hello").await.unwrap();
    let mut server = accepted(connections).await;
    let mut hello = [0; 6];
    soon("the first bytes", server.read_exact(&mut hello)).await.unwrap();
    assert_eq!(&hello, b"\0hello");
    (client, server)
}

/// Bytes that are nowhere the same.
fn bytes(count: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..count).map(|_| next()).collect()
}

/// Writes parts, with a pause after some of them, and closes.
async fn say(mut write: impl tokio::io::AsyncWrite + Unpin, all: &[u8], parts: &[(usize, u8)]) {
    let mut rest = all;
    for (length, pause) in parts {
        let (part, later) = rest.split_at(*length);
        rest = later;
        write.write_all(part).await.unwrap();
        for _ in 0..*pause {
            tokio::task::yield_now().await;
        }
        if *pause == 7 {
            // So that the part leaves alone.
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
    write.shutdown().await.unwrap();
}

/// Reads with a buffer of a given size until the end.
async fn hear(mut read: impl tokio::io::AsyncRead + Unpin, size: usize) -> Vec<u8> {
    let (mut all, mut buffer) = (Vec::new(), vec![0; size]);
    loop {
        match read.read(&mut buffer).await.unwrap() {
            0 => return all,
            count => all.extend_from_slice(&buffer[..count]),
        }
    }
}

#[tokio::test]
async fn streams_arrive_as_they_left_however_they_are_cut() {
    let test = async {
        let (port, mut connections) = held().await;
        let (_api, _web, declared) = two(Protocol::Tcp, port).await;
        let (_other_api, _other_web, detected) = two(Protocol::Detect, port).await;
        let sizes = proptest::prop_oneof![0usize..3, 1usize..2_000, 16_000usize..17_000, 60_000usize..200_000];
        let parts = vec((sizes, 0u8..8), 0..12);
        let reads = proptest::prop_oneof![1usize..20, 500usize..5_000, proptest::strategy::Just(100_000usize)];
        let cases = (parts.clone(), parts, reads.clone(), reads, proptest::bool::ANY);
        let mut runner = TestRunner::default();
        for number in 0..80 {
            let case = cases.new_tree(&mut runner).unwrap().current();
            let (asked, told, read_by_client, read_by_server, is_declared) = &case;
            let whole = |parts: &[(usize, u8)]| bytes(parts.iter().map(|(length, _)| length).sum(), number);
            // Bytes that begin like no protocol.
            let (question, answer) = ([&[0][..], &whole(asked)].concat(), whole(told));
            let asked: Vec<_> = std::iter::once((1, 0)).chain(asked.iter().copied()).collect();
            let mut client = TcpStream::connect(if *is_declared { declared } else { detected }).await.unwrap();
            let mut connections = async || accepted(&mut connections).await;
            let (from_client, to_client) = client.split();
            let client =
                async { tokio::join!(say(to_client, &question, &asked), hear(from_client, *read_by_client)).1 };
            let server = async {
                let mut server = connections().await;
                let (from_server, to_server) = server.split();
                tokio::join!(say(to_server, &answer, told), hear(from_server, *read_by_server)).1
            };
            let (heard, got) = soon("both streams end", async { tokio::join!(client, server) }).await;
            assert!(got == question && heard == answer, "not what was sent: {case:?}");
        }
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_reset_of_either_side_reaches_the_other_at_once() {
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum After {
        Bytes,
        ItsEnd,
        TheOthersEnd,
        BytesThatNobodyReads,
    }
    async fn once(
        door: SocketAddr,
        connections: &mut mpsc::Receiver<TcpStream>,
        after: After,
        by_client: bool,
    ) -> Duration {
        let (client, server) = joined(door, connections).await;
        let (mut breaks, mut other) = if by_client { (client, server) } else { (server, client) };
        match after {
            After::Bytes => {}
            After::ItsEnd => {
                breaks.shutdown().await.unwrap();
                assert_eq!(to_end(&mut other).await, b"");
            }
            After::TheOthersEnd => {
                other.shutdown().await.unwrap();
                assert_eq!(to_end(&mut breaks).await, b"");
            }
            After::BytesThatNobodyReads => {
                let full = async { while breaks.write(&[0; 65536]).await.is_ok() {} };
                assert!(tokio::time::timeout(Duration::from_millis(300), full).await.is_err());
            }
        }
        let start = Instant::now();
        socket2::SockRef::from(&breaks).set_linger(Some(Duration::ZERO)).unwrap();
        drop(breaks);
        soon("the other side is reset", other.ready(Interest::ERROR)).await.unwrap();
        start.elapsed()
    }
    let test = async {
        let (port, mut connections) = held().await;
        let (_api, _web, door) = two(Protocol::Tcp, port).await;
        for after in [After::Bytes, After::ItsEnd, After::TheOthersEnd, After::BytesThatNobodyReads] {
            for by_client in [true, false] {
                let mut best = Duration::MAX;
                // The best of some: the machine may be busy.
                for _ in 0..3 {
                    best = best.min(once(door, &mut connections, after, by_client).await);
                }
                assert!(best <= Duration::from_millis(100), "after {after:?}, by the client: {by_client}: {best:?}");
            }
        }
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn each_end_arrives_alone() {
    let test = async {
        let (port, mut connections) = held().await;
        let (_api, _web, door) = two(Protocol::Tcp, port).await;
        // The client ends before the answer, the server ends before the question is whole, both end at once.
        let (mut client, mut server) = joined(door, &mut connections).await;
        client.shutdown().await.unwrap();
        assert_eq!(to_end(&mut server).await, b"");
        server.write_all(b"late").await.unwrap();
        drop(server);
        assert_eq!(to_end(&mut client).await, b"late");
        let (mut client, mut server) = joined(door, &mut connections).await;
        server.shutdown().await.unwrap();
        assert_eq!(to_end(&mut client).await, b"");
        client.write_all(b"late").await.unwrap();
        drop(client);
        assert_eq!(to_end(&mut server).await, b"late");
        let (mut client, mut server) = joined(door, &mut connections).await;
        let both = tokio::join!(client.shutdown(), server.shutdown());
        assert!(matches!(both, (Ok(()), Ok(()))), "{both:?}");
        assert_eq!((to_end(&mut client).await, to_end(&mut server).await), (vec![], vec![]));
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_client_that_says_nothing_and_ends_still_hears() {
    let test = async {
        let (port, mut connections) = held().await;
        for protocol in [Protocol::Detect, Protocol::Tcp] {
            let (_api, web, door) = two(protocol, port).await;
            let mut doors = vec![door];
            if protocol == Protocol::Detect {
                doors.push(web.door(Traffic::Published(port)).await);
                let ca = Authority::new("mesh.internal");
                let open = beside(&ca, "web", &[port], Mode::Permissive);
                doors.push(open.door(Traffic::Door(port)).await);
            }
            for door in doors {
                let mut client = TcpStream::connect(door).await.unwrap();
                client.shutdown().await.unwrap();
                let mut server = accepted(&mut connections).await;
                assert_eq!(to_end(&mut server).await, b"");
                server.write_all(b"220 welcome\r\n").await.unwrap();
                drop(server);
                assert_eq!(to_end(&mut client).await, b"220 welcome\r\n");
            }
        }
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_client_whose_server_cannot_be_reached_does_not_wait_in_vain() {
    let test = async {
        let api = beside(&Authority::new("mesh.internal"), "api", &[], Mode::Strict);
        let nobody = refusing_address().await;
        api.knows("default/web", Protocol::Detect, &[(nobody, 80)]);
        let door = api.door(upstream("web")).await;
        let mut silent = TcpStream::connect(door).await.unwrap();
        let error = soon("it is reset", silent.read_u8()).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        let refused = ("default/api>default/web".to_owned(), 0, "connect-refused".to_owned(), 1);
        until("it is counted", || api.counted().contains(&refused)).await;
        // One that thinks for a while and then speaks HTTP is told why.
        let mut slow = TcpStream::connect(door).await.unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        slow.write_all(b"GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n").await.unwrap();
        let answer = String::from_utf8(to_end(&mut slow).await).unwrap();
        assert!(answer.starts_with("HTTP/1.1 502") && answer.contains("connect-refused"), "{answer}");
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn urgent_bytes_stay_in_their_place() {
    let test = async {
        let (port, mut connections) = held().await;
        let (_api, _web, door) = two(Protocol::Detect, port).await;
        let urgent = |stream: &TcpStream, byte: &[u8]| {
            assert_eq!(socket2::SockRef::from(stream).send_out_of_band(byte).unwrap(), 1);
        };
        let (mut client, mut server) = joined(door, &mut connections).await;
        for _ in 0..20 {
            for by_client in [true, false] {
                let (from, to) = if by_client { (&mut client, &mut server) } else { (&mut server, &mut client) };
                from.set_nodelay(true).unwrap();
                from.write_all(b"before").await.unwrap();
                urgent(from, b"!");
                from.write_all(b"behind").await.unwrap();
                let mut all = [0; 13];
                soon("all of it", to.read_exact(&mut all)).await.unwrap();
                assert_eq!(&all, b"before!behind");
            }
        }
        // Also where it is among the first words, which are read by somebody else than those that follow.
        let mut client = TcpStream::connect(door).await.unwrap();
        client.write_all(b"\0one").await.unwrap();
        urgent(&client, b"!");
        client.write_all(b"two").await.unwrap();
        let mut server = accepted(&mut connections).await;
        let mut all = [0; 8];
        soon("all of it", server.read_exact(&mut all)).await.unwrap();
        assert_eq!(&all, b"\0one!two");
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_client_that_only_ends_its_side_gets_its_answers() {
    let test = async {
        let (port, mut connections) = held().await;
        let (api, web, door) = two(Protocol::Detect, port).await;
        let published = web.door(Traffic::Published(port)).await;
        for door in [door, published] {
            let mut client = TcpStream::connect(door).await.unwrap();
            let requests = "GET /1 HTTP/1.1\r\nHost: web\r\n\r\nGET /2 HTTP/1.1\r\nHost: web\r\n\r\n";
            client.write_all(requests.as_bytes()).await.unwrap();
            client.shutdown().await.unwrap();
            let mut server = accepted(&mut connections).await;
            for number in 1..=2 {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    assert!(soon("the request", server.read_buf(&mut head)).await.unwrap() > 0);
                }
                assert!(head.starts_with(format!("GET /{number} HTTP/1.1\r\n").as_bytes()));
                // Longer than it takes to look whether the client has left.
                tokio::time::sleep(Duration::from_millis(600)).await;
                server.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
            }
            let answers = String::from_utf8(to_end(&mut client).await).unwrap();
            assert_eq!(answers.matches("HTTP/1.1 200 OK\r\n").count(), 2, "{answers}");
            assert!(answers.ends_with("ok") && answers.contains("Connection: close"), "{answers}");
        }
        // One that really leaves is noticed later as well, and the work for it ends.
        let mut client = TcpStream::connect(door).await.unwrap();
        client.write_all(b"GET /3 HTTP/1.1\r\nHost: web\r\n\r\n").await.unwrap();
        client.shutdown().await.unwrap();
        let mut server = accepted(&mut connections).await;
        let mut head = [0; 1024];
        assert!(soon("the request", server.read(&mut head)).await.unwrap() > 0);
        let early = tokio::time::timeout(Duration::from_millis(600), server.read(&mut head)).await;
        assert!(early.is_err(), "its client still waits: {early:?}");
        drop(client);
        soon("the application's connection ends", async { while server.read(&mut head).await.unwrap_or(0) > 0 {} })
            .await;
        let is_gone = |side: &Beside| side.counted().iter().any(|it| it.1 == 499 && it.2 == "client-gone" && it.3 == 1);
        until("both sides counted it", || is_gone(&api) && is_gone(&web)).await;
    };
    LocalSet::new().run_until(test).await;
}

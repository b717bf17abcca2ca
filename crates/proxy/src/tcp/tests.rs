use super::*;
use crate::testing::loopback;
use std::rc::Rc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::{JoinHandle, LocalSet, spawn_local};

/// Client, server, and a relay between them.
async fn relayed() -> (TcpStream, TcpStream, JoinHandle<io::Result<()>>, Rc<Counts>) {
    let (client, near) = loopback().await;
    let (far, server) = loopback().await;
    let counts = Rc::new(Counts::default());
    let held = counts.clone();
    let relay = spawn_local(async move {
        let (mut near, mut far) = (Io::tcp(near)?, Io::tcp(far)?);
        relay((&mut near, Bytes::from_static(b"first ")), (&mut far, Bytes::new()), &held).await
    });
    (client, server, relay, counts)
}

#[tokio::test]
async fn each_half_closes_on_its_own() {
    let test = async {
        let (mut client, mut server, relay, counts) = relayed().await;
        let sent = vec![7u8; 5_000_000];
        let (request, answer) = (sent.clone(), sent.clone());
        let echo = spawn_local(async move {
            let mut got = Vec::new();
            server.read_to_end(&mut got).await.unwrap();
            assert!(got.strip_prefix(b"first ").unwrap() == request);
            server.write_all(&answer).await.unwrap();
        });
        client.write_all(&sent).await.unwrap();
        client.shutdown().await.unwrap();
        let mut got = Vec::new();
        client.read_to_end(&mut got).await.unwrap();
        assert!(got == sent);
        echo.await.unwrap();
        relay.await.unwrap().unwrap();
        assert_eq!((counts.sent.get(), counts.received.get()), (5_000_006, 5_000_000));
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn bytes_count_on_the_edge_while_the_connection_lasts() {
    let test = async {
        let edge: Arc<Edge> = Arc::default();
        let (mut client, near) = loopback().await;
        let (far, mut server) = loopback().await;
        let counts = Counts::on(edge.clone());
        let relay = spawn_local(async move {
            let (mut near, mut far) = (Io::tcp(near)?, Io::tcp(far)?);
            relay((&mut near, Bytes::new()), (&mut far, Bytes::new()), &counts).await
        });
        client.write_all(b"question").await.unwrap();
        server.read_exact(&mut [0; 8]).await.unwrap();
        server.write_all(b"yes").await.unwrap();
        client.read_exact(&mut [0; 3]).await.unwrap();
        assert_eq!(edge.counted_bytes(), (8, 3));
        assert!(!relay.is_finished());
        relay.abort();
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_relay_that_is_given_up_is_reset_on_both_sides() {
    let test = async {
        let (mut client, mut server, relay, _) = relayed().await;
        server.read_exact(&mut [0; 6]).await.unwrap();
        relay.abort();
        for side in [&mut client, &mut server] {
            assert_eq!(side.read_u8().await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        }
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_reset_stays_a_reset() {
    let test = async {
        let (client, mut server, relay, _) = relayed().await;
        let mut first = [0; 6];
        server.read_exact(&mut first).await.unwrap();
        socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
        drop(client);
        let error = server.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert!(relay.await.unwrap().is_err());
    };
    LocalSet::new().run_until(test).await;
}

/// How long a reset takes to arrive, in the best of some tries: the machine may be busy.
async fn best_of_some(one: impl AsyncFn() -> Duration) -> Duration {
    let mut best = Duration::MAX;
    for _ in 0..5 {
        best = best.min(one().await);
    }
    best
}

/// Ends with a reset.
fn break_off(stream: TcpStream) {
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
}

/// Waits until a connection is broken, which its readiness alone tells where its end has been read before.
async fn broken(stream: &TcpStream) {
    let broken = stream.ready(tokio::io::Interest::ERROR);
    tokio::time::timeout(Duration::from_secs(10), broken).await.expect("it breaks").unwrap();
}

#[tokio::test]
async fn a_reset_after_an_end_is_passed_on_at_once() {
    let test = async {
        let took = best_of_some(async || {
            let (mut client, mut server, relay, _) = relayed().await;
            client.shutdown().await.unwrap();
            server.read_to_end(&mut Vec::new()).await.unwrap();
            let start = std::time::Instant::now();
            break_off(client);
            broken(&server).await;
            assert!(relay.await.unwrap().is_err());
            start.elapsed()
        });
        assert!(took.await <= Duration::from_millis(100));
        let took = best_of_some(async || {
            let (mut client, mut server, relay, _) = relayed().await;
            server.read_exact(&mut [0; 6]).await.unwrap();
            server.shutdown().await.unwrap();
            client.read_to_end(&mut Vec::new()).await.unwrap();
            let start = std::time::Instant::now();
            break_off(server);
            broken(&client).await;
            assert!(relay.await.unwrap().is_err());
            start.elapsed()
        });
        assert!(took.await <= Duration::from_millis(100));
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_reset_is_passed_on_to_a_side_that_does_not_read() {
    let test = async {
        let took = best_of_some(async || {
            let (mut client, server, relay, _) = relayed().await;
            let full = async { while client.write(&[0; 65536]).await.is_ok() {} };
            assert!(tokio::time::timeout(Duration::from_millis(200), full).await.is_err());
            let start = std::time::Instant::now();
            break_off(client);
            broken(&server).await;
            assert!(relay.await.unwrap().is_err());
            start.elapsed()
        });
        assert!(took.await <= Duration::from_millis(100));
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn both_sides_may_close_at_once() {
    let test = async {
        let (mut client, mut server, relay, counts) = relayed().await;
        let both = tokio::join!(client.shutdown(), server.shutdown());
        assert!(matches!(both, (Ok(()), Ok(()))), "{both:?}");
        let (mut to_client, mut to_server) = (Vec::new(), Vec::new());
        client.read_to_end(&mut to_client).await.unwrap();
        server.read_to_end(&mut to_server).await.unwrap();
        assert_eq!((&to_client[..], &to_server[..]), (&b""[..], &b"first "[..]));
        relay.await.unwrap().unwrap();
        assert_eq!((counts.sent.get(), counts.received.get()), (6, 0));
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn the_last_words_before_a_reset_arrive() {
    let test = async {
        for by_client in [true, false] {
            let (client, mut server, _relay, _) = relayed().await;
            server.read_exact(&mut [0; 6]).await.unwrap();
            let (breaks, mut other) = if by_client { (client, server) } else { (server, client) };
            // All before the relay runs: it meets the break when it writes.
            assert_eq!(breaks.try_write(b"bye").unwrap(), 3);
            break_off(breaks);
            assert_eq!(other.try_write(b"more").unwrap(), 4);
            let mut words = [0; 3];
            other.read_exact(&mut words).await.unwrap();
            assert_eq!(&words, b"bye");
            assert_eq!(other.read_u8().await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        }
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn many_sides_that_are_not_read_take_few_descriptors_and_are_all_looked_after() {
    let test = async {
        let mut relays = Vec::new();
        for _ in 0..50 {
            let (mut client, mut server, relay, _) = relayed().await;
            client.shutdown().await.unwrap();
            server.read_to_end(&mut Vec::new()).await.unwrap();
            relays.push((client, server, relay));
        }
        assert_eq!(super::broken::looked_after(), 32);
        for (client, server, relay) in relays {
            break_off(client);
            broken(&server).await;
            assert!(relay.await.unwrap().is_err());
        }
        assert_eq!(super::broken::looked_after(), 0);
    };
    LocalSet::new().run_until(test).await;
}

//! Connects, asks once over HTTP/1.1 and hangs up, again and again: what handshakes cost the other side.
//! Usage: handshakes PORT SECONDS full|resumed CONNECTIONS GROUP ALPN SERVER-NAME CERTIFICATES KEY
//! Prints a line of JSON: how many, and how many of them resumed a session.
use rustls::HandshakeKind;
use sheer_bench_tools::tls::Client;
use sheer_bench_tools::{http1, usage};
use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;

#[derive(Default)]
struct Counts {
    all: Cell<u64>,
    resumed: Cell<u64>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::io::Result<()> {
    let given: Vec<String> = std::env::args().skip(1).collect();
    let number = |place: usize| given.get(place).and_then(|text| text.parse::<u64>().ok());
    let (Some(port), Some(seconds), Some(kind), Some(at_once)) =
        (number(0), number(1), given.get(2).filter(|kind| ["full", "resumed"].contains(&kind.as_str())), number(3))
    else {
        usage("handshakes PORT SECONDS full|resumed CONNECTIONS GROUP ALPN SERVER-NAME CERTIFICATES KEY");
    };
    let client = Client::of(&given[4..]);
    let counts = Rc::new(Counts::default());
    let tasks = tokio::task::LocalSet::new();
    let (begin, time) = (Instant::now(), Duration::from_secs(seconds));
    for _ in 0..at_once {
        let (client, counts) = (client.resuming(kind == "resumed"), counts.clone());
        tasks.spawn_local(async move {
            let connector = client.connector();
            let mut buffer = Vec::with_capacity(4096);
            while begin.elapsed() < time {
                let mut stream = connector.connect(port as u16).await.expect("a handshake");
                // The tickets for the next time arrive before the answer.
                http1::ask(&mut stream, &mut buffer).await.expect("an answer");
                counts.all.set(counts.all.get() + 1);
                if stream.get_ref().1.handshake_kind() == Some(HandshakeKind::Resumed) {
                    counts.resumed.set(counts.resumed.get() + 1);
                }
                stream.shutdown().await.expect("a good end");
            }
        });
    }
    tasks.await;
    let (all, resumed) = (counts.all.get(), counts.resumed.get());
    println!(r#"{{"requests":{all},"resumed":{resumed},"rps":{:.1}}}"#, all as f64 / begin.elapsed().as_secs_f64());
    Ok(())
}

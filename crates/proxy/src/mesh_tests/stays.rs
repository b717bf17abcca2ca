//! Who sends something hostile and stays costs nothing while it stays, and nothing is left of it when it has gone.
//! `make resources` plays the same for longer, over real processes.

use super::framing::{Entrance, Scene, count_panics, first_words};
use super::*;
use crate::io::Io;
use crate::upstream::tls::Carried;

/// The part of this thread's time that it may work meanwhile: everything of a test is one thread.
const BUSY: u32 = 50;

/// Connections at once: fewer than a proxy of a test has room for.
const AT_ONCE: usize = 300;

/// The time for which this thread has run.
fn worked() -> Duration {
    let told = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(told.split(' ').next().unwrap().parse().unwrap())
}

/// Waits until a second passes in which hardly anything is done.
async fn is_calm(what: &str) {
    const SECOND: Duration = Duration::from_secs(1);
    let mut last = Duration::MAX;
    for _ in 0..15 {
        let before = worked();
        tokio::time::sleep(SECOND).await;
        last = worked() - before;
        if last <= SECOND / BUSY {
            return;
        }
    }
    panic!("{what}: {last:?} of work in the last second");
}

/// An application that answers `/raw/N` with the bytes of this number, anything else well, and never closes.
async fn application(answers: Rc<Vec<Vec<u8>>>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let answers = answers.clone();
            spawn_local(async move {
                let mut heard = Vec::new();
                while stream.read_buf(&mut heard).await.unwrap_or(0) > 0 {
                    if !heard.ends_with(b"\r\n\r\n") {
                        continue;
                    }
                    let number = number_of(&String::from_utf8_lossy(&heard));
                    let well = &b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"[..];
                    let answer = number.map_or(well, |it| answers[it].as_slice());
                    if stream.write_all(answer).await.is_err() {
                        return;
                    }
                    heard.clear();
                }
            });
        }
    });
    port
}

/// Which of the answers is asked for.
fn number_of(head: &str) -> Option<usize> {
    head.strip_prefix("GET /raw/")?.split(' ').next()?.parse().ok()
}

async fn say(scene: &Scene, carried: Carried, message: &[u8]) -> Io {
    let mut io = scene.connect(carried).await;
    // It may be refused before all of it was said.
    let _ = io.write_all(message).await;
    let _ = io.flush().await;
    io
}

/// With a reset: of who has only closed it is not known at once that it has gone, rather than waiting for an answer.
fn leave(io: Io) {
    if let Some(socket) = io.socket() {
        // A socket that was reset by the other side is gone already.
        let _ = socket.set_zero_linger();
    }
}

#[tokio::test]
async fn who_says_something_hostile_and_stays_costs_nothing() {
    let test = async {
        let panics = count_panics();
        let [mut said, answers] = first_words("B");
        let answers: Vec<Vec<u8>> = answers.into_iter().map(|(_, bytes)| bytes).collect();
        let asks = |number| format!("GET /raw/{number} HTTP/1.1\r\nHost: web\r\n\r\n").into_bytes();
        said.extend((0..answers.len()).map(|number| (Carried::Http1, asks(number))));
        assert!(said.len() > 400, "only {} messages", said.len());
        let port = application(Rc::new(answers)).await;
        for entrance in [Entrance::Workload, Entrance::Published, Entrance::Peer] {
            let scene = Scene::new(entrance, port, plan::Protocol::Http).await;
            for part in said.chunks(AT_ONCE) {
                let mut stay = Vec::new();
                for (carried, message) in part {
                    stay.push(say(&scene, *carried, message).await);
                }
                is_calm(&format!("{entrance:?}, while they stay")).await;
                println!("{entrance:?}: {} connections, {} of them still open", stay.len(), scene.clients_open());
                stay.into_iter().for_each(leave);
            }
            for (carried, message) in &said {
                leave(say(&scene, *carried, message).await);
            }
            until("nothing is open of who has gone", || scene.clients_open() == 0).await;
            is_calm(&format!("{entrance:?}, when they have gone")).await;
        }
        assert_eq!(panics(), 0, "something panicked");
    };
    LocalSet::new().run_until(test).await;
}

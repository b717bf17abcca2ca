//! Both ends of a byte stream, for measuring what carrying it costs.
//! Usage: bytes serve PORT
//!        bytes load PORT SECONDS [CONNECTIONS]
//! A client's first byte says who sends: `D` the server (a download), `U` the client. Load uses both in turn for half
//! its connections each, and prints how many bytes arrived.
use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const CHUNK: usize = 64 * 1024;

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::io::Result<()> {
    let given: Vec<String> = std::env::args().skip(1).collect();
    let number = |place: usize| given.get(place).and_then(|text| text.parse::<u64>().ok());
    match (given.first().map(String::as_str), number(1), number(2)) {
        (Some("serve"), Some(port), None) => serve(port as u16).await,
        (Some("load"), Some(port), Some(seconds)) => load(port as u16, seconds, number(3).unwrap_or(4)).await,
        _ => panic!("usage: bytes serve PORT | bytes load PORT SECONDS [CONNECTIONS]"),
    }
}

async fn serve(port: u16) -> std::io::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    loop {
        let (mut stream, _) = listener.accept().await?;
        tokio::spawn(async move {
            match stream.read_u8().await {
                Ok(b'D') => send(&mut stream, Instant::now() + Duration::from_secs(3600)).await,
                Ok(b'U') => receive(&mut stream, |_| {}).await,
                _ => {}
            }
        });
    }
}

async fn load(port: u16, seconds: u64, connections: u64) -> std::io::Result<()> {
    let end = Instant::now() + Duration::from_secs(seconds);
    let moved = Rc::new(Cell::new(0));
    let tasks = tokio::task::LocalSet::new();
    for number in 0..connections {
        let moved = moved.clone();
        tasks.spawn_local(async move {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("the port is open");
            if number % 2 == 0 {
                stream.write_u8(b'D').await.expect("the connection is open");
                let _ =
                    tokio::time::timeout_at(end.into(), receive(&mut stream, |count| moved.set(moved.get() + count)))
                        .await;
            } else {
                stream.write_u8(b'U').await.expect("the connection is open");
                moved.set(moved.get() + count_sent(&mut stream, end).await);
            }
        });
    }
    tasks.await;
    println!("{} bytes", moved.get());
    Ok(())
}

async fn send(stream: &mut (impl AsyncWrite + Unpin), end: Instant) {
    count_sent(stream, end).await;
}

async fn count_sent(stream: &mut (impl AsyncWrite + Unpin), end: Instant) -> u64 {
    let chunk = vec![b'x'; CHUNK];
    let mut sent = 0;
    while Instant::now() < end {
        match stream.write(&chunk).await {
            Ok(count) if count > 0 => sent += count as u64,
            _ => break,
        }
    }
    sent
}

async fn receive(stream: &mut (impl AsyncRead + Unpin), arrived: impl Fn(u64)) {
    let mut buffer = vec![0; CHUNK];
    while let Ok(count) = stream.read(&mut buffer).await {
        if count == 0 {
            return;
        }
        arrived(count as u64);
    }
}

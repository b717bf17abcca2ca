//! Opens connections, asks once over HTTP/1.1 on each, prints `open`, and holds them until standard input ends.
//! Usage: idle PORT CONNECTIONS [GROUP ALPN SERVER-NAME CERTIFICATES KEY]   with mutual TLS, if these are given
use sheer_bench_tools::tls::Client;
use sheer_bench_tools::{http1, usage};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

trait Stream: AsyncRead + AsyncWrite + Unpin {}
impl<S: AsyncRead + AsyncWrite + Unpin> Stream for S {}

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::io::Result<()> {
    let given: Vec<String> = std::env::args().skip(1).collect();
    let number = |place: usize| given.get(place).and_then(|text| text.parse::<usize>().ok());
    let (Some(port), Some(connections)) = (number(0), number(1)) else {
        usage("idle PORT CONNECTIONS [GROUP ALPN SERVER-NAME CERTIFICATES KEY]");
    };
    // None resumed: each is as the first of a peer.
    let connector = (given.len() > 2).then(|| Client::of(&given[2..]).resuming(false).connector());
    let mut open: Vec<Box<dyn Stream>> = Vec::with_capacity(connections);
    let mut buffer = Vec::with_capacity(4096);
    for _ in 0..connections {
        let mut stream: Box<dyn Stream> = match &connector {
            Some(connector) => Box::new(connector.connect(port as u16).await?),
            None => Box::new(TcpStream::connect(("127.0.0.1", port as u16)).await?),
        };
        http1::ask(&mut stream, &mut buffer).await?;
        open.push(stream);
    }
    println!("open");
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    Ok(())
}

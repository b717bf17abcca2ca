//! Answers every HTTP/1.1 request without a body with 1 KiB, as cheaply as tokio allows. Usage: http1-backend PORT
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::io::Result<()> {
    let port: u16 = std::env::args().nth(1).and_then(|text| text.parse().ok()).expect("usage: http1-backend PORT");
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    let answer: &'static [u8] = Box::leak(answer().into_boxed_slice());
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(serve(stream, answer));
    }
}

fn answer() -> Vec<u8> {
    let head = "HTTP/1.1 200 OK\r\nserver: backend\r\ncontent-type: text/plain\r\ncache-control: no-store\r\n\
                x-request-id: 0123456789abcdef\r\ncontent-length: 1024\r\n\r\n";
    [head.as_bytes(), &[b'x'; 1024]].concat()
}

async fn serve(mut stream: TcpStream, answer: &'static [u8]) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = Vec::with_capacity(16 << 10);
    while stream.read_buf(&mut buffer).await? > 0 {
        let mut consumed = 0;
        for end in memchr::memmem::find_iter(&buffer, b"\r\n\r\n") {
            stream.write_all(answer).await?;
            consumed = end + 4;
        }
        buffer.drain(..consumed);
    }
    Ok(())
}

//! The least of an HTTP/1.1 client: one request again and again, answers of a known length.
use memchr::memmem;
use std::io::{Error, ErrorKind};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The request of all measurements: what a browser or another service says at least.
pub const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: bench\r\nUser-Agent: bench/1.0\r\nAccept: application/json\r\n\
    Accept-Encoding: gzip\r\nX-Request-Id: 5b8a3c1e-9d7f-4e6a-8b2c-0f1e2d3c4b5a\r\n\
    Authorization: Bearer abcdefghijklmnopqrstuvwxyz0123456789\r\n\r\n";

/// Asks once and reads the whole answer.
pub async fn ask(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), buffer: &mut Vec<u8>) -> std::io::Result<()> {
    stream.write_all(REQUEST).await?;
    stream.flush().await?;
    buffer.clear();
    loop {
        if stream.read_buf(buffer).await? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        if let Some(end) = memmem::find(buffer, b"\r\n\r\n") {
            let length = length_of(&buffer[..end])?;
            while buffer.len() < end + 4 + length {
                if stream.read_buf(buffer).await? == 0 {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
            }
            return Ok(());
        }
    }
}

fn length_of(head: &[u8]) -> std::io::Result<usize> {
    let text = String::from_utf8_lossy(head);
    let refuse = || Error::other(format!("not a good answer: {}", text.lines().next().unwrap_or_default()));
    if !text.starts_with("HTTP/1.1 200") {
        return Err(refuse());
    }
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse().ok())
        .ok_or_else(refuse)
}

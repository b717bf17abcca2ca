//! As much of a Redis client as a shopping cart needs: one command, one reply (RESP2).

use std::io::{Error, ErrorKind, Result};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

const PATIENCE: Duration = Duration::from_secs(5);
const MAX_REPLY_BYTES: usize = 1 << 20;
/// Room for the longest error that Redis has.
const MAX_LINE_BYTES: u64 = 16 << 10;
const MAX_REPLY_ITEMS: usize = 10_000;

/// A client of one Redis; keeps connections, never retries.
pub(crate) struct Redis {
    address: String,
    idle: Mutex<Vec<BufReader<TcpStream>>>,
}

/// A reply.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    Integer(i64),
    Text(String),
    List(Vec<String>),
    Nothing,
}

impl Redis {
    /// A client of the Redis at `host:port`.
    pub(crate) fn new(address: String) -> Self {
        Self { address, idle: Mutex::default() }
    }

    /// Sends one command; an error reply is an error.
    pub(crate) async fn call(&self, command: &[&str]) -> Result<Reply> {
        tokio::time::timeout(PATIENCE, self.exchange(command))
            .await
            .unwrap_or_else(|_| Err(Error::new(ErrorKind::TimedOut, "no reply within 5 s")))
    }

    async fn exchange(&self, command: &[&str]) -> Result<Reply> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut connection = match idle.filter(is_open) {
            Some(connection) => connection,
            None => {
                let stream = TcpStream::connect(&self.address).await?;
                stream.set_nodelay(true)?;
                BufReader::new(stream)
            }
        };
        let mut bytes = format!("*{}\r\n", command.len());
        for word in command {
            bytes.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        connection.get_mut().write_all(bytes.as_bytes()).await?;
        let reply = read(&mut connection).await?;
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        Ok(reply)
    }
}

/// An idle connection has nothing to read; an end or a byte means that it is of no more use.
fn is_open(connection: &BufReader<TcpStream>) -> bool {
    matches!(connection.get_ref().try_read(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock)
}

async fn read(connection: &mut BufReader<TcpStream>) -> Result<Reply> {
    let line = read_line(connection).await?;
    let (kind, rest) = line.split_at_checked(1).ok_or_else(|| invalid("an empty line"))?;
    match kind {
        "+" => Ok(Reply::Text(rest.to_owned())),
        "-" => Err(Error::other(rest.to_owned())),
        ":" => Ok(Reply::Integer(rest.parse().map_err(|_| invalid("not an integer"))?)),
        "$" => Ok(read_bulk(connection, rest).await?.map_or(Reply::Nothing, Reply::Text)),
        "*" => {
            let count: i64 = rest.parse().map_err(|_| invalid("not a count"))?;
            let count = usize::try_from(count).unwrap_or(0);
            if count > MAX_REPLY_ITEMS {
                return Err(invalid("too long a list"));
            }
            let mut list = Vec::with_capacity(count);
            for _ in 0..count {
                let line = read_line(connection).await?;
                let length = line.strip_prefix('$').ok_or_else(|| invalid("a list of something else than strings"))?;
                list.push(read_bulk(connection, length).await?.unwrap_or_default());
            }
            Ok(Reply::List(list))
        }
        _ => Err(invalid("an unknown kind of reply")),
    }
}

async fn read_line(connection: &mut BufReader<TcpStream>) -> Result<String> {
    let mut line = String::new();
    connection.take(MAX_LINE_BYTES).read_line(&mut line).await?;
    let line = line.strip_suffix("\r\n").ok_or_else(|| Error::from(ErrorKind::UnexpectedEof))?;
    Ok(line.to_owned())
}

async fn read_bulk(connection: &mut BufReader<TcpStream>, length: &str) -> Result<Option<String>> {
    let length: i64 = length.parse().map_err(|_| invalid("not a length"))?;
    let Ok(length) = usize::try_from(length) else { return Ok(None) };
    if length > MAX_REPLY_BYTES {
        return Err(invalid("too long a string"));
    }
    let mut bytes = vec![0; length + 2];
    connection.read_exact(&mut bytes).await?;
    bytes.truncate(length);
    String::from_utf8(bytes).map(Some).map_err(|_| invalid("not text"))
}

fn invalid(what: &str) -> Error {
    Error::new(ErrorKind::InvalidData, format!("Redis sent {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    async fn reply_to(bytes: &'static [u8]) -> Result<Reply> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        tokio::spawn(async move {
            if let Ok((mut stream, _)) = listener.accept().await {
                // An unread request would turn the end into a reset.
                let _ = stream.read(&mut [0; 64]).await;
                let _ = stream.write_all(bytes).await;
            }
        });
        Redis::new(address).call(&["PING"]).await
    }

    #[tokio::test]
    async fn replies_are_read() {
        assert_eq!(reply_to(b"+PONG\r\n").await.unwrap(), Reply::Text("PONG".into()));
        assert_eq!(reply_to(b":42\r\n").await.unwrap(), Reply::Integer(42));
        assert_eq!(reply_to(b"$-1\r\n").await.unwrap(), Reply::Nothing);
        assert_eq!(
            reply_to(b"*2\r\n$3\r\nnet\r\n$1\r\n2\r\n").await.unwrap(),
            Reply::List(vec!["net".into(), "2".into()])
        );
    }

    #[tokio::test]
    async fn an_error_reply_and_a_broken_one_are_errors() {
        assert_eq!(reply_to(b"-ERR no\r\n").await.unwrap_err().to_string(), "ERR no");
        assert_eq!(reply_to(b"$5\r\nab").await.unwrap_err().kind(), ErrorKind::UnexpectedEof);
        assert_eq!(reply_to(b"*1\r\n:1\r\n").await.unwrap_err().kind(), ErrorKind::InvalidData);
    }
}

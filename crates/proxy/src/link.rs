//! The line to the supervisor: one JSON object a line, both ways, over a socket that it passed on.

use crate::plan::{FromSupervisor, ToSupervisor};
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

/// The longest line that is read. What a supervisor says takes 20 bytes.
const LONGEST_LINE: u64 = 4096;

/// How long a word to the supervisor may take.
const TELL: Duration = Duration::from_secs(1);

/// The own end of the line. Without a supervisor it says nothing and hears nothing.
#[derive(Debug)]
pub struct Link {
    speaking: Option<OwnedWriteHalf>,
    hearing: Option<BufReader<OwnedReadHalf>>,
    line: Vec<u8>,
}

impl Link {
    /// The end of this socket, in the calling runtime.
    ///
    /// # Errors
    /// When it is no stream socket.
    pub fn new(socket: Option<OwnedFd>) -> io::Result<Self> {
        let Some(socket) = socket else {
            return Ok(Self { speaking: None, hearing: None, line: Vec::new() });
        };
        let stream = std::os::unix::net::UnixStream::from(socket);
        stream.set_nonblocking(true)?;
        let (hearing, speaking) = UnixStream::from_std(stream)?.into_split();
        Ok(Self { speaking: Some(speaking), hearing: Some(BufReader::new(hearing)), line: Vec::new() })
    }

    /// Says something. A supervisor that is gone hears nothing; the proxy ends with it anyway.
    pub async fn tell(&mut self, message: &ToSupervisor) {
        let Some(speaking) = &mut self.speaking else { return };
        let Ok(mut line) = serde_json::to_vec(message) else { return };
        line.push(b'\n');
        let _ = tokio::time::timeout(TELL, speaking.write_all(&line)).await;
    }

    /// The next order. A supervisor that is gone has none any more: then the workload is gone, too. Never returns without
    /// a supervisor. Cancel safe.
    pub async fn hear(&mut self) -> FromSupervisor {
        let Some(hearing) = &mut self.hearing else { return std::future::pending().await };
        loop {
            // What was read of a line stays in `line` when this is dropped (`read_until` promises it, `read_line` not).
            let left = LONGEST_LINE.saturating_sub(self.line.len() as u64);
            match hearing.take(left).read_until(b'\n', &mut self.line).await {
                Ok(read) if read > 0 && self.line.ends_with(b"\n") => {
                    let order = serde_json::from_slice(&self.line);
                    self.line.clear();
                    match order {
                        Ok(order) => return order,
                        Err(error) => tracing::warn!(%error, "the supervisor said something unknown"),
                    }
                }
                Ok(_) | Err(_) => {
                    self.hearing = None;
                    return FromSupervisor::Gone;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn orders_are_heard_and_the_end_is_one() {
        let (own, mut theirs) = UnixStream::pair().unwrap();
        let mut link = Link::new(Some(own.into_std().unwrap().into())).unwrap();
        link.tell(&ToSupervisor::Ready).await;
        let mut said = [0; 18];
        theirs.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"{\"event\":\"ready\"}\n");
        theirs.write_all(b"{\"event\":\"nonsense\"}\n{\"event\":\"drain\"}\n{\"ev").await.unwrap();
        assert_eq!(link.hear().await, FromSupervisor::Drain);
        drop(theirs);
        assert_eq!(link.hear().await, FromSupervisor::Gone);
    }

    #[tokio::test]
    async fn a_line_that_arrives_in_parts_survives_a_dropped_wait() {
        let (own, mut theirs) = UnixStream::pair().unwrap();
        let mut link = Link::new(Some(own.into_std().unwrap().into())).unwrap();
        theirs.write_all(b"{\"event\":").await.unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(20), link.hear()).await.is_err());
        theirs.write_all(b"\"drain\"}\n").await.unwrap();
        assert_eq!(link.hear().await, FromSupervisor::Drain);
    }

    #[tokio::test]
    async fn an_endless_line_is_the_end() {
        let (own, mut theirs) = UnixStream::pair().unwrap();
        let mut link = Link::new(Some(own.into_std().unwrap().into())).unwrap();
        theirs.write_all(&vec![b'x'; 10_000]).await.unwrap();
        assert_eq!(link.hear().await, FromSupervisor::Gone);
    }
}

//! Asking the host's resolvers.

use rand::Rng;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

/// How long one resolver has for one question.
const ATTEMPT: Duration = Duration::from_millis(1500);

/// How often the whole list is gone through. Together with [`ATTEMPT`] and [`TOTAL`] the answer, good or bad, comes
/// before the 5 s after which C libraries ask again.
const ROUNDS: usize = 2;
const TOTAL: Duration = Duration::from_millis(4500);

/// The largest UDP answer that is read.
const MAX_ANSWER: usize = 4096;

const HEADER: usize = 12;

/// The host's resolvers, in their order; the one that answered last is asked first.
pub(super) struct Resolvers {
    addresses: Vec<SocketAddr>,
    preferred: AtomicUsize,
}

impl Resolvers {
    pub(super) fn new(addresses: Vec<SocketAddr>) -> Self {
        Self { addresses, preferred: AtomicUsize::new(0) }
    }

    /// The answer to a whole question, with the question's id. With `tcp` resolvers are asked by TCP; otherwise by UDP,
    /// and a truncated answer again by TCP, which is used when it is no longer than `largest`. `None` when nobody
    /// answered; an answer that a resolver failed is given when no other one did better.
    pub(super) async fn ask(&self, question: &[u8], tcp: bool, largest: usize) -> Option<Vec<u8>> {
        if question.len() < HEADER {
            return None;
        }
        let mut failed = None;
        // Asked again at once, those would fail again.
        let mut have_failed = smallvec::SmallVec::<[usize; 4]>::new();
        let attempts = async {
            for attempt in 0..ROUNDS * self.addresses.len() {
                let index = (self.preferred.load(Relaxed) + attempt) % self.addresses.len();
                if have_failed.contains(&index) {
                    continue;
                }
                let resolver = self.addresses[index];
                let answer = match timeout(ATTEMPT, ask_one(resolver, question, tcp, largest)).await {
                    Ok(Ok(answer)) => answer,
                    Ok(Err(error)) => {
                        tracing::debug!(%resolver, %error, "resolver failed");
                        continue;
                    }
                    Err(_) => {
                        tracing::debug!(%resolver, "resolver did not answer in time");
                        continue;
                    }
                };
                // SERVFAIL and REFUSED may be this resolver's trouble alone.
                if is_failure(&answer) {
                    failed = Some(answer);
                    have_failed.push(index);
                    continue;
                }
                self.preferred.store(index, Relaxed);
                return Some(answer);
            }
            None
        };
        let answer = timeout(TOTAL, attempts).await.ok().flatten();
        answer.or(failed)
    }
}

/// SERVFAIL or REFUSED: the resolver's trouble, no answer about the name.
pub(super) fn is_failure(answer: &[u8]) -> bool {
    matches!(answer.get(3).map(|flags| flags & 0x0f), Some(2 | 5))
}

async fn ask_one(resolver: SocketAddr, question: &[u8], tcp: bool, largest: usize) -> io::Result<Vec<u8>> {
    let mut sent = question.to_vec();
    let id: u16 = rand::rng().random();
    sent[..2].copy_from_slice(&id.to_be_bytes());
    let mut answer = if tcp { ask_tcp(resolver, &sent).await? } else { ask_udp(resolver, &sent).await? };
    let truncated = |answer: &[u8]| answer[2] & 0x02 != 0;
    if !tcp && truncated(&answer) {
        // By TCP it may still fit what the asker takes, who may not speak TCP; otherwise the asker decides.
        if let Ok(whole) = ask_tcp(resolver, &sent).await
            && whole.len() <= largest
            && !truncated(&whole)
        {
            answer = whole;
        }
    }
    answer[..2].copy_from_slice(&question[..2]);
    Ok(answer)
}

/// A socket of its own for each question: its random port, with the random id, is what a forger has to guess. It is
/// connected, so that only the resolver's datagrams arrive.
async fn ask_udp(resolver: SocketAddr, sent: &[u8]) -> io::Result<Vec<u8>> {
    let any: SocketAddr = match resolver {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(resolver).await?;
    socket.send(sent).await?;
    let mut buffer = vec![0; MAX_ANSWER];
    loop {
        let length = socket.recv(&mut buffer).await?;
        if answers(sent, &buffer[..length]) {
            buffer.truncate(length);
            return Ok(buffer);
        }
    }
}

async fn ask_tcp(resolver: SocketAddr, sent: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(resolver).await?;
    let length = u16::try_from(sent.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(sent);
    stream.write_all(&framed).await?;
    let length = usize::from(stream.read_u16().await?);
    let mut answer = vec![0; length];
    stream.read_exact(&mut answer).await?;
    if answers(sent, &answer) { Ok(answer) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// Whether this is an answer to what was sent: same id, and the same question where it is repeated.
pub(super) fn answers(sent: &[u8], answer: &[u8]) -> bool {
    if answer.len() < HEADER || sent[..2] != answer[..2] || answer[2] & 0x80 == 0 {
        return false;
    }
    let questions = u16::from_be_bytes([answer[4], answer[5]]);
    match question_length(sent) {
        // A server that could not read the question may leave it out.
        _ if questions == 0 => answer[3] & 0x0f != 0,
        Some(length) => answer
            .get(HEADER..HEADER + length)
            .is_some_and(|repeated| repeated.eq_ignore_ascii_case(&sent[HEADER..HEADER + length])),
        None => false,
    }
}

/// The length of the first question: name, type and class.
fn question_length(message: &[u8]) -> Option<usize> {
    let mut at = HEADER;
    loop {
        let label = usize::from(*message.get(at)?);
        if label > 63 {
            return None;
        }
        at += 1 + label;
        if label == 0 {
            break;
        }
    }
    let end = at + 4;
    (end <= message.len()).then_some(end - HEADER)
}

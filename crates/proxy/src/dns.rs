//! The workload's name server: the mesh's names from the index of services alone, everything else from the host's
//! resolvers.
//!
//! It listens on the sockets that the workload's questions are led to and answers from the socket that was asked. What
//! is not the mesh's travels unchanged in both directions but for its id, so that EDNS and DNSSEC are between the
//! workload and the host's resolvers. While these fail, the last good answer to the same question is given again.

mod forward;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod kept;
pub mod zone;

pub use zone::Zone;

use crate::drain;
use crate::metrics::{Dns, Metrics};
use arc_swap::ArcSwap;
use hickory_proto::op::{Edns, Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use zone::Lookup;

/// Seconds for which answers about the mesh may be kept, also negative ones.
pub const TTL_S: u32 = 5;

/// The largest question that is read, and the largest answer sent by UDP (RFC 9715 recommends 1,400 at most).
const MAX_QUESTION: usize = 4096;
const MAX_UDP_ANSWER: u16 = 1232;

/// Questions that are being forwarded at once; each holds a socket. Beyond it the answer is SERVFAIL.
const MAX_FORWARDED: usize = 256;

/// TCP connections at once; further ones wait in the listener's queue.
const MAX_CONNECTIONS: usize = 64;

/// A TCP connection without a question closes after this time.
const IDLE: Duration = Duration::from_secs(10);

/// How long resolvers are waited for where there is an old answer (RFC 8767, section 5).
const BEFORE_STALE: Duration = Duration::from_millis(1800);

/// Answers the workload's questions. Shared by all its sockets.
pub struct Server {
    zone: Arc<ArcSwap<Zone>>,
    resolvers: forward::Resolvers,
    kept: kept::Kept,
    forwards: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    metrics: Arc<Metrics>,
}

/// How a question arrived, which bounds the size of its answer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Transport {
    Udp,
    Tcp,
}

enum Decision {
    Answer(Vec<u8>),
    Forward { largest: usize },
    Ignore,
}

impl Server {
    /// A server for this zone, which asks `resolvers` for everything else.
    pub fn new(zone: Arc<ArcSwap<Zone>>, resolvers: Vec<SocketAddr>, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            zone,
            resolvers: forward::Resolvers::new(resolvers),
            kept: kept::Kept::default(),
            forwards: Arc::new(Semaphore::new(MAX_FORWARDED)),
            connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            metrics,
        })
    }

    /// Serves a UDP socket until the future is dropped or another proxy does.
    pub async fn serve_udp(self: Arc<Self>, socket: UdpSocket, mut drain: drain::Watch) {
        let socket = Arc::new(socket);
        let mut buffer = vec![0; MAX_QUESTION];
        loop {
            // Neither arm takes a question that is not answered.
            let received = tokio::select! {
                received = socket.recv_from(&mut buffer) => received,
                () = drain.replaced() => return,
            };
            let (length, client) = match received {
                Ok(received) => received,
                Err(error) => {
                    // ICMP errors of earlier answers arrive here; anything else must not spin.
                    tracing::debug!(%error, "DNS socket");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                }
            };
            let question = &buffer[..length];
            let answer = match self.decide(question, Transport::Udp) {
                Decision::Ignore => continue,
                Decision::Answer(answer) => answer,
                Decision::Forward { largest } => match self.forwards.clone().try_acquire_owned() {
                    Ok(permit) => {
                        let (server, socket, question) = (self.clone(), socket.clone(), question.to_vec());
                        tokio::spawn(async move {
                            let answer = server.forward(&question, Transport::Udp, largest).await;
                            drop(permit);
                            let _ = socket.send_to(&answer, client).await;
                        });
                        continue;
                    }
                    Err(_) => {
                        self.metrics.dns(Dns::Shed);
                        failure(question)
                    }
                },
            };
            let _ = socket.send_to(&answer, client).await;
        }
    }

    /// Serves a TCP listener until the future is dropped, or until another proxy does and all connections have ended.
    pub async fn serve_tcp(self: Arc<Self>, listener: TcpListener, mut drain: drain::Watch) {
        let mut connections = tokio::task::JoinSet::new();
        loop {
            let Ok(permit) = self.connections.clone().acquire_owned().await else { return };
            while connections.try_join_next().is_some() {}
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = drain.replaced() => break,
            };
            match accepted {
                Ok((stream, _)) => {
                    let server = self.clone();
                    connections.spawn(async move {
                        let _ = server.serve_connection(stream).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::debug!(%error, "DNS listener");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
        while connections.join_next().await.is_some() {}
    }

    async fn serve_connection(&self, mut stream: TcpStream) -> std::io::Result<()> {
        loop {
            let length = usize::from(tokio::time::timeout(IDLE, stream.read_u16()).await??);
            if length > MAX_QUESTION {
                return Ok(());
            }
            let mut question = vec![0; length];
            tokio::time::timeout(IDLE, stream.read_exact(&mut question)).await??;
            let answer = match self.decide(&question, Transport::Tcp) {
                Decision::Ignore => return Ok(()),
                Decision::Answer(answer) => answer,
                Decision::Forward { largest } => match self.forwards.clone().try_acquire_owned() {
                    Ok(_permit) => self.forward(&question, Transport::Tcp, largest).await,
                    Err(_) => {
                        self.metrics.dns(Dns::Shed);
                        failure(&question)
                    }
                },
            };
            let Ok(length) = u16::try_from(answer.len()) else { return Ok(()) };
            let mut framed = Vec::with_capacity(answer.len() + 2);
            framed.extend_from_slice(&length.to_be_bytes());
            framed.extend_from_slice(&answer);
            tokio::time::timeout(IDLE, stream.write_all(&framed)).await??;
        }
    }

    fn decide(&self, question: &[u8], transport: Transport) -> Decision {
        let query = match Message::from_vec(question) {
            // An answer is never answered: two servers would talk for ever.
            Ok(message) if message.metadata.message_type == MessageType::Response => return Decision::Ignore,
            Ok(message) => message,
            Err(_) => return self.malformed(question),
        };
        if query.metadata.op_code != OpCode::Query {
            return reply(empty(&query, ResponseCode::NotImp));
        }
        let [asked] = query.queries.as_slice() else { return self.malformed(question) };
        let zone = self.zone.load();
        let Some(name) = plain_name(asked.name()).filter(|_| asked.query_class() == DNSClass::IN) else {
            return Decision::Forward { largest: largest_answer(&query, transport) };
        };
        let found = zone.lookup(&name);
        if found == Lookup::Foreign {
            return Decision::Forward { largest: largest_answer(&query, transport) };
        }
        if query.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
            return reply(empty(&query, ResponseCode::BADVERS));
        }
        let mut answer = empty(&query, ResponseCode::NoError);
        answer.metadata.authoritative = true;
        if let Lookup::Found(addresses) = found {
            let kind = asked.query_type();
            let mut add = |data| {
                answer.add_answer(Record::from_rdata(asked.name().clone(), TTL_S, data));
            };
            if matches!(kind, RecordType::A | RecordType::ANY) {
                addresses.v4.iter().for_each(|it| add(RData::A(A(*it))));
            }
            if matches!(kind, RecordType::AAAA | RecordType::ANY) {
                addresses.v6.iter().for_each(|it| add(RData::AAAA(AAAA(*it))));
            }
        }
        if answer.answers.is_empty() {
            if found == Lookup::Missing {
                answer.metadata.response_code = ResponseCode::NXDomain;
            }
            if let Some(record) = start_of_authority(zone.domain()) {
                answer.add_authority(record);
            }
        }
        self.metrics.dns(match (answer.metadata.response_code, answer.answers.is_empty()) {
            (ResponseCode::NXDomain, _) => Dns::NoName,
            (_, true) => Dns::NoData,
            (_, false) => Dns::Mesh,
        });
        reply(answer)
    }

    fn malformed(&self, question: &[u8]) -> Decision {
        self.metrics.dns(Dns::Malformed);
        // Without a whole header, or on an answer, there is nobody to tell.
        if question.len() < 12 || question[2] & 0x80 != 0 {
            return Decision::Ignore;
        }
        Decision::Answer(header_only(question, 1))
    }

    async fn forward(&self, question: &[u8], transport: Transport, largest: usize) -> Vec<u8> {
        let fits = |answer: &Vec<u8>| answer.len() <= largest;
        if let Some(answer) = self.kept.young(question, Instant::now()) {
            self.metrics.dns(Dns::Kept);
            // Whoever cannot take all of it asks again by TCP, and is then given the rest.
            return if fits(&answer) { answer } else { kept::truncated(&answer).unwrap_or_else(|| failure(question)) };
        }
        let asked = self.resolvers.ask(question, transport == Transport::Tcp, largest);
        // Who could be given an old answer does not wait for a resolver that may be gone.
        let answered = match self.kept.knows(question, Instant::now()) {
            true => timeout(BEFORE_STALE, asked).await.ok().flatten(),
            false => asked.await,
        };
        match answered {
            Some(answer) if !forward::is_failure(&answer) => {
                self.kept.keep(question, &answer, Instant::now());
                self.metrics.dns(Dns::Forwarded);
                answer
            }
            failed => match self.kept.stale(question, Instant::now()).filter(fits) {
                Some(answer) => {
                    self.metrics.dns(Dns::Kept);
                    answer
                }
                None => {
                    self.metrics.dns(Dns::Failed);
                    failed.unwrap_or_else(|| failure(question))
                }
            },
        }
    }
}

fn reply(message: Message) -> Decision {
    message.to_vec().map_or(Decision::Ignore, Decision::Answer)
}

/// An answer without records to a question.
fn empty(query: &Message, code: ResponseCode) -> Message {
    let mut answer = Message::response(query.metadata.id, query.metadata.op_code);
    answer.metadata.recursion_desired = query.metadata.recursion_desired;
    answer.metadata.recursion_available = true;
    answer.metadata.response_code = code;
    answer.queries = query.queries.clone();
    if query.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(MAX_UDP_ANSWER);
        edns.set_version(0);
        answer.set_edns(edns);
    }
    answer
}

/// SERVFAIL for a question that was read before.
fn failure(question: &[u8]) -> Vec<u8> {
    match Message::from_vec(question) {
        Ok(query) => empty(&query, ResponseCode::ServFail).to_vec().unwrap_or_else(|_| header_only(question, 2)),
        Err(_) => header_only(question, 2),
    }
}

/// A bare header with this error code for a question of at least 12 bytes.
fn header_only(question: &[u8], code: u8) -> Vec<u8> {
    let mut answer = vec![0; 12];
    answer[..2].copy_from_slice(&question[..2]);
    // QR, and the question's operation and wish for recursion; then the code.
    answer[2] = 0x80 | (question[2] & 0x79);
    answer[3] = 0x80 | code;
    answer
}

/// The largest answer that the asker takes.
fn largest_answer(query: &Message, transport: Transport) -> usize {
    match transport {
        Transport::Tcp => usize::from(u16::MAX),
        Transport::Udp => query.edns.as_ref().map_or(512, |edns| usize::from(edns.max_payload().max(512))),
    }
}

/// The name in lower case without a trailing dot; `None` for one with bytes that no name of the mesh has.
fn plain_name(name: &Name) -> Option<String> {
    let mut text = String::with_capacity(name.len());
    for label in name.iter() {
        if !text.is_empty() {
            text.push('.');
        }
        for byte in label {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => text.push(byte.to_ascii_lowercase().into()),
                _ => return None,
            }
        }
    }
    Some(text)
}

/// Says for how long a negative answer may be kept (RFC 2308).
fn start_of_authority(domain: &str) -> Option<Record> {
    let zone = Name::from_ascii(format!("{domain}.")).ok()?;
    let server = Name::from_ascii(format!("ns.{domain}.")).ok()?;
    let contact = Name::from_ascii(format!("hostmaster.{domain}.")).ok()?;
    let ttl = TTL_S.cast_signed();
    Some(Record::from_rdata(zone, TTL_S, RData::SOA(SOA::new(server, contact, 1, ttl, ttl, ttl, TTL_S))))
}

#[cfg(test)]
mod tests;

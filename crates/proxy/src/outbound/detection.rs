//! What is spoken on a connection of the workload. Never stalls a protocol in which the server speaks first.
//!
//! The declared protocol wins; then a list of ports whose servers speak first; else the client's first bytes. A client
//! that says nothing for 50 ms is taken to wait for its server: the server is dialled, and whoever speaks first decides; words that do not tell what they are reach it meanwhile.

use super::{Destination, connect};
use crate::connection::Spoken;
use crate::detect::{self, Protocol, Turn};
use crate::io::Io;
use crate::send::Opened;
use crate::tcp;
use crate::worker::Worker;
use bytes::{Buf, BytesMut};
use sheer_core::snapshot;
use std::time::Duration;
use tokio::time::timeout;

/// How long a client may be silent before its server is asked.
const SILENCE: Duration = Duration::from_millis(50);

/// How long a client's first words are waited for that tell one version of HTTP from the other.
const FIRST_WORDS: Duration = Duration::from_secs(10);

/// How long a client that is silent may go on being so when its server cannot be reached. One that speaks HTTP is then told
/// why; one that waits for its server must not wait in vain.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Ports whose servers speak first, or whose protocol is never HTTP: SMTP, submission, POP3, IMAP, SSH, FTP, MySQL,
/// PostgreSQL, Redis, memcached, AMQP, MongoDB, Cassandra, ZooKeeper, Kafka, NATS, MQTT.
const OPAQUE_PORTS: &[u16] =
    &[21, 22, 25, 110, 143, 587, 1883, 2181, 3306, 4222, 4444, 5432, 5672, 6379, 9042, 9092, 11211, 27017];

/// What is to be done with a connection.
pub(super) enum Verdict {
    /// Its requests are served.
    Http(Spoken),
    /// Its bytes are carried, over a connection that is open already or one to be opened.
    Bytes(Option<Opened>),
    /// The client is gone.
    Gone,
}

/// Decides, reading what is needed into `prefix`.
pub(super) async fn verdict(worker: &Worker, to: &Destination, io: &mut Io, prefix: &mut BytesMut) -> Verdict {
    let (declared, port) = match to {
        Destination::Service(_, port) => (port.protocol, port.port),
        Destination::Workload(_, _, live) => (snapshot::Protocol::Detect, live.endpoint.workload_port),
        Destination::External(address) => (snapshot::Protocol::Detect, address.port()),
        Destination::NoPort(_) | Destination::Nowhere(_) => (snapshot::Protocol::Detect, 0),
    };
    match declared {
        snapshot::Protocol::Http2 | snapshot::Protocol::Grpc => Verdict::Http(Spoken::Http2),
        snapshot::Protocol::Tcp | snapshot::Protocol::Tls => Verdict::Bytes(None),
        snapshot::Protocol::Http => match timeout(FIRST_WORDS, detect::detect(io, prefix)).await {
            Ok(Ok(Some(Protocol::Http2))) => Verdict::Http(Spoken::Http2),
            // Whatever else it is, the codec says what is wrong with it, or that it was too slow.
            Ok(Ok(Some(_))) | Err(_) => Verdict::Http(Spoken::Http1),
            Ok(Ok(None) | Err(_)) => Verdict::Gone,
        },
        snapshot::Protocol::Detect if OPAQUE_PORTS.contains(&port) || is_learned(worker, to) => Verdict::Bytes(None),
        snapshot::Protocol::Detect => match timeout(SILENCE, detect::detect(io, prefix)).await {
            // It has nothing to say, and may still want to hear.
            Ok(Ok(None)) => Verdict::Bytes(None),
            Ok(spoken) => of_client(spoken),
            Err(_) => whoever_speaks_first(worker, to, io, prefix).await,
        },
    }
}

fn of_client(spoken: std::io::Result<Option<Protocol>>) -> Verdict {
    match spoken {
        Ok(Some(Protocol::Http1)) => Verdict::Http(Spoken::Http1),
        Ok(Some(Protocol::Http2)) => Verdict::Http(Spoken::Http2),
        Ok(Some(Protocol::Tls(_) | Protocol::Opaque)) => Verdict::Bytes(None),
        Ok(None) | Err(_) => Verdict::Gone,
    }
}

async fn whoever_speaks_first(worker: &Worker, to: &Destination, io: &mut Io, prefix: &mut BytesMut) -> Verdict {
    let Ok((mut far, _, in_flight)) = connect(worker, to).await else {
        // Why it leads nowhere is told in the client's own protocol, if it speaks.
        return match timeout(LAST_WORD, detect::detect(io, prefix)).await {
            Ok(spoken) => of_client(spoken),
            // Tried once more, and ended as a connection of bytes is that leads nowhere.
            Err(_) => Verdict::Bytes(None),
        };
    };
    match detect::turn(io, prefix, &mut far).await {
        Ok(Turn::Http1) => Verdict::Http(Spoken::Http1),
        Ok(Turn::Http2) => Verdict::Http(Spoken::Http2),
        Ok(Turn::Bytes { passed, said }) => {
            prefix.advance(passed);
            if prefix.is_empty() && passed == 0 && !said.is_empty() {
                learn(worker, to);
            }
            Verdict::Bytes(Some((far, said, in_flight)))
        }
        Err(_) => {
            tcp::reset(io);
            Verdict::Gone
        }
    }
}

fn is_learned(worker: &Worker, to: &Destination) -> bool {
    match to {
        Destination::Service(service, port) => worker.is_server_first(&service.name, port.port),
        _ => false,
    }
}

fn learn(worker: &Worker, to: &Destination) {
    if let Destination::Service(service, port) = to {
        worker.learn_server_first(&service.name, port.port);
    }
}

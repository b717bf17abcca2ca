//! Connections that one worker keeps, by where they lead. No lock, no sharing between workers.
//!
//! HTTP/1 connections carry one request at a time and are taken last-in first-out, so that what is not needed grows old
//! and closes. An HTTP/2 connection is shared by all requests of the worker; a second one is made only when the first
//! is nearly full. Who answered is known of each connection, checked when it is made, and again before it is used when
//! the service's identities have changed.

use super::dial::{Connector, DialError, Place, Sessions};
use super::endpoint::{LiveEndpoint, State};
use super::tls::{Answered, Carried};
use crate::h1;
use crate::h2;
use crate::io::Io;
use sheer_core::cause::Cause;
use sheer_core::identity::SpiffeId;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How long a connection to a mesh peer is kept unused.
const PEER_IDLE: Duration = Duration::from_secs(90);

/// How long a connection to the application, or outside the mesh, is kept unused: less than the shortest common
/// keep-alive of servers (5 s), so that a request seldom meets a connection being closed.
const PLAIN_IDLE: Duration = Duration::from_secs(4);

/// The most unused HTTP/1 connections kept to one place: the concurrency that a burst leaves behind.
const MAX_IDLE: usize = 256;

/// Requests on an HTTP/2 connection beyond which another connection is made: the peer admits 1000 (`h2::MAX_STREAMS`).
const NEARLY_FULL: usize = 800;

/// The most HTTP/2 connections of a worker to one place.
const MAX_SHARED: usize = 4;

/// The connections of one worker.
pub struct Pools {
    connector: Connector,
    peers: RefCell<HashMap<Key, Rc<Peer>, foldhash::fast::RandomState>>,
}

/// An endpoint by its state, which stays the same through changes of configuration and is kept alive by the entry.
#[derive(PartialEq, Eq, Hash)]
enum Key {
    Endpoint(usize),
    Application(SocketAddr),
    External(SocketAddr),
}

/// One place and the connections to it.
pub struct Peer {
    place: Place,
    idle: RefCell<Vec<(h1::client::Connection, Instant)>>,
    shared: RefCell<Vec<Shared>>,
    /// One at a time makes a new shared connection; the others wait for it.
    dialing: tokio::sync::Mutex<()>,
    sessions: Sessions,
}

struct Shared {
    connection: h2::client::Connection,
    answered: Option<Answered>,
    used: Cell<Instant>,
}

impl Pools {
    /// No connections yet.
    pub fn new(connector: Connector) -> Self {
        Self { connector, peers: RefCell::default() }
    }

    /// Makes connections without keeping them.
    pub fn connector(&self) -> &Connector {
        &self.connector
    }

    /// The connections to an endpoint.
    pub fn peer_at(&self, live: &LiveEndpoint) -> Rc<Peer> {
        let key = Key::Endpoint(Arc::as_ptr(&live.state) as usize);
        if let Some(peer) = self.peers.borrow().get(&key) {
            return peer.clone();
        }
        self.peer(&Place::Endpoint(live.clone()))
    }

    /// The connections to a place.
    pub fn peer(&self, place: &Place) -> Rc<Peer> {
        let key = match place {
            Place::Endpoint(live) => Key::Endpoint(Arc::as_ptr(&live.state) as usize),
            Place::Application(address) => Key::Application(*address),
            Place::External(address) => Key::External(*address),
        };
        let mut peers = self.peers.borrow_mut();
        peers.entry(key).or_insert_with(|| Rc::new(Peer::new(place.clone()))).clone()
    }

    /// An HTTP/1 connection to a place: one that is kept, or a new one.
    ///
    /// # Errors
    /// When none is kept and a new one cannot be made.
    pub async fn http1(
        &self,
        peer: &Rc<Peer>,
        identities: &Arc<[SpiffeId]>,
    ) -> Result<h1::client::Connection, DialError> {
        if let Some(connection) = peer.take_idle(identities) {
            return Ok(connection);
        }
        let (io, answered) = self.dial(peer, Carried::Http1, identities).await?;
        Ok(h1::client::Connection::to_peer(io, answered))
    }

    /// An HTTP/2 connection to a place: one that has room, or a new one.
    ///
    /// # Errors
    /// When there is none with room and a new one cannot be made.
    pub async fn http2(
        &self,
        peer: &Rc<Peer>,
        identities: &Arc<[SpiffeId]>,
    ) -> Result<h2::client::Connection, DialError> {
        match peer.share(identities) {
            Some(connection) => Ok(connection),
            // Boxed, since it is rare.
            None => Box::pin(self.new_shared(peer, identities)).await,
        }
    }

    async fn new_shared(
        &self,
        peer: &Rc<Peer>,
        identities: &Arc<[SpiffeId]>,
    ) -> Result<h2::client::Connection, DialError> {
        let _turn = peer.dialing.lock().await;
        if let Some(connection) = peer.share(identities) {
            return Ok(connection);
        }
        let (io, answered) = self.dial(peer, Carried::Http2, identities).await?;
        let connection = h2::client::Connection::start(io);
        let used = Cell::new(Instant::now());
        peer.shared.borrow_mut().push(Shared { connection: connection.clone(), answered, used });
        Ok(connection)
    }

    /// A connection for bytes to a place. It is always a new one.
    ///
    /// # Errors
    /// When it cannot be made.
    pub async fn tcp(&self, peer: &Rc<Peer>, identities: &Arc<[SpiffeId]>) -> Result<Io, DialError> {
        self.dial(peer, Carried::Tcp, identities).await.map(|(io, _)| io)
    }

    async fn dial(
        &self,
        peer: &Peer,
        carried: Carried,
        identities: &Arc<[SpiffeId]>,
    ) -> Result<(Io, Option<Answered>), DialError> {
        // Boxed, since it is rare and its state is larger than all the rest of a request's.
        let connect = || Box::pin(self.connector.connect(&peer.place, carried, identities, &peer.sessions));
        let (io, answered) = match connect().await {
            // What is kept open for later makes room for what is needed now.
            Err(error) if error.cause == Cause::Overloaded => {
                self.close_idle();
                connect().await?
            }
            other => other?,
        };
        Ok((io, answered.map(|(id, tie)| Answered::new(id, identities.clone()).tied(tie))))
    }

    /// Closes connections that carry nothing.
    pub fn close_idle(&self) {
        for peer in self.peers.borrow().values() {
            peer.idle.borrow_mut().clear();
        }
    }

    /// Closes what has not been used for long, and forgets endpoints that are no longer listed.
    pub fn sweep(&self) {
        let now = Instant::now();
        self.peers.borrow_mut().retain(|_, peer| {
            peer.close_old(now);
            peer.is_listed() || !peer.is_empty()
        });
    }
}

impl Peer {
    fn new(place: Place) -> Self {
        Self {
            place,
            idle: RefCell::default(),
            shared: RefCell::default(),
            dialing: tokio::sync::Mutex::default(),
            sessions: Sessions::default(),
        }
    }

    fn idle_limit(&self) -> Duration {
        match self.place {
            Place::Endpoint(_) => PEER_IDLE,
            Place::Application(_) | Place::External(_) => PLAIN_IDLE,
        }
    }

    /// The youngest kept connection that is open and leads to one of these.
    fn take_idle(&self, identities: &Arc<[SpiffeId]>) -> Option<h1::client::Connection> {
        let oldest = Instant::now().checked_sub(self.idle_limit())?;
        loop {
            let (mut connection, since) = self.idle.borrow_mut().pop()?;
            if since < oldest {
                // What lies below is older still.
                self.idle.borrow_mut().clear();
                return None;
            }
            if connection.is_one_of(identities) && connection.is_idle_and_open() {
                return Some(connection);
            }
        }
    }

    /// The open shared connection to one of these with the fewest requests, unless all are nearly full and another is
    /// allowed. Requests that are under way on another one end there.
    fn share(&self, identities: &Arc<[SpiffeId]>) -> Option<h2::client::Connection> {
        let mut shared = self.shared.borrow_mut();
        shared.retain_mut(|it| {
            it.answered.as_mut().is_none_or(|answered| answered.is_one_of(identities)) && it.connection.is_open()
        });
        let least = shared.iter().min_by_key(|it| it.connection.streams())?;
        if least.connection.streams() >= NEARLY_FULL && shared.len() < MAX_SHARED {
            return None;
        }
        least.used.set(Instant::now());
        Some(least.connection.clone())
    }

    fn close_old(&self, now: Instant) {
        let limit = self.idle_limit();
        let is_young = |since: Instant| now.saturating_duration_since(since) < limit;
        self.idle.borrow_mut().retain(|(_, since)| is_young(*since));
        self.shared
            .borrow_mut()
            .retain(|it| it.connection.is_open() && (it.connection.streams() > 0 || is_young(it.used.get())));
    }

    fn is_empty(&self) -> bool {
        self.idle.borrow().is_empty() && self.shared.borrow().is_empty()
    }

    /// False for an endpoint that its service no longer has: only this entry still knows its state.
    fn is_listed(&self) -> bool {
        match &self.place {
            Place::Endpoint(live) => Arc::<State>::strong_count(&live.state) > 1,
            Place::Application(_) | Place::External(_) => false,
        }
    }
}

impl h1::client::Return for Peer {
    fn give_back(&self, connection: h1::client::Connection) {
        let mut idle = self.idle.borrow_mut();
        if idle.len() < MAX_IDLE {
            idle.push((connection, Instant::now()));
        }
    }
}

//! Workers: threads with a runtime, listeners and connections of their own, which share what the control thread keeps.

use crate::capture::listening::Ports;
use crate::capture::netns::SocketSource;
use crate::drain;
use crate::h1;
use crate::idle::Idlers;
use crate::io::Io;
use crate::listen;
use crate::metrics::{Edge, EdgeKey, Metrics, Protocol, Shed, Side};
use crate::overload::Overload;
use crate::plan::{Plan, Role};
use crate::record::{Line, Log};
use crate::sync::Demand;
use crate::upstream::dial::Connector;
use crate::upstream::endpoint::{Cell, Live, State, Table};
use crate::upstream::pool::Pools;
use crate::upstream::silence;
use crate::upstream::tls::Credentials;
use arc_swap::{ArcSwap, ArcSwapOption, Cache};
use sheer_core::cause::Cause;
use sheer_core::identity::SpiffeId;
use sheer_core::name::ServiceName;
use sheer_core::route::Rule;
use sheer_core::snapshot::{Service, Snapshot};
use std::cell::{Cell as StdCell, OnceCell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// How often connections that nobody uses are looked for.
const SWEEP: Duration = Duration::from_secs(2);

/// What all workers share.
pub struct Proxy {
    /// What the supervisor decided.
    pub plan: Plan,
    /// The mesh as this proxy sees it.
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    /// Asks the control thread.
    pub demand: Demand,
    /// Certificate, key and trust; none before the first.
    pub credentials: Arc<ArcSwapOption<Credentials>>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// The endpoints of services in use.
    pub endpoints: Arc<Table>,
    /// What may be used of the host.
    pub overload: Arc<Overload>,
    /// How far the proxy has come in leaving.
    pub drain: drain::Watch,
    /// Sockets inside the workload's namespace, where it has one of its own.
    pub inside: Option<SocketSource>,
    /// The ports that listen in that namespace.
    pub listening: Option<Ports>,
    /// The namespaces that clients of the workload, or the workload as a client, may be in.
    pub clients: h1::Namespaces,
}

/// A listening socket and what arrives on it.
#[derive(Debug)]
pub struct Door {
    /// The socket.
    pub listener: TcpListener,
    /// What arrives.
    pub role: Role,
}

/// Running workers.
#[derive(Debug)]
pub struct Workers {
    ended: mpsc::Receiver<()>,
}

impl Workers {
    /// Waits until every worker has ended: the proxy has drained.
    pub async fn join(&mut self) {
        while self.ended.recv().await.is_some() {}
    }
}

/// Starts workers on the doors that carry traffic. Doors of other roles are left alone.
///
/// # Errors
/// When a socket cannot be duplicated or a thread cannot be started.
pub fn start(proxy: &Arc<Proxy>, doors: &[Door], workers: usize) -> io::Result<Workers> {
    let log = match proxy.plan.access_log {
        true => Some(Log::start(io::stderr())?),
        false => None,
    };
    // Nothing is sent: the channel closes with the last worker.
    let (alive, ended) = mpsc::channel(1);
    for number in 0..workers.max(1) {
        let copies = doors
            .iter()
            .map(|door| Ok(Door { listener: door.listener.try_clone()?, role: door.role.clone() }))
            .collect::<io::Result<Vec<_>>>()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (proxy, log, alive) = (proxy.clone(), log.clone(), alive.clone());
        std::thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
            let _alive = alive;
            let tasks = tokio::task::LocalSet::new();
            let served = tasks.block_on(&runtime, async move {
                let worker = Rc::new(Worker::new(proxy, log)?);
                worker.serve(copies).await
            });
            if let Err(error) = served {
                tracing::error!(%error, "a worker could not start");
            }
        })?;
    }
    Ok(Workers { ended })
}

/// One worker: everything in it belongs to one thread.
pub struct Worker {
    /// What all workers share.
    pub proxy: Arc<Proxy>,
    /// Connections.
    pub pools: Pools,
    /// Clients' connections that are idle at times.
    pub idlers: Idlers,
    /// `<namespace>/<name>` of the workload.
    pub at: Arc<str>,
    /// `<namespace>/<name>` of the workload's service.
    pub source: Arc<str>,
    /// The identities of a place that is no mesh peer.
    pub nobody: Arc<[SpiffeId]>,
    /// The load of all places outside the mesh together.
    pub outside: Arc<State>,
    drain: drain::Watch,
    log: Option<Log>,
    snapshot: RefCell<CachedSnapshot>,
    live: RefCell<HashMap<ServiceName, CachedLive, foldhash::fast::RandomState>>,
    edges: RefCell<Edges>,
    unknown: OnceCell<Arc<Edge>>,
    /// Service ports whose server turned out to speak first.
    server_first: RefCell<HashMap<(ServiceName, u16), ()>>,
    /// Where the application listens, by port.
    application: RefCell<HashMap<u16, IpAddr>>,
    random: StdCell<u64>,
}

/// What is shared by all workers and held once by this one: a request takes part in it without touching what others do.
type Held<T> = Rc<Arc<T>>;

type CachedSnapshot = (Cache<Arc<ArcSwap<Snapshot>>, Arc<Snapshot>>, Held<Snapshot>);

type CachedLive = (Cache<Arc<Cell>, Option<Arc<Live>>>, Option<Held<Live>>);

/// The edges of outbound requests, by what was decided: addresses of parts of the snapshot, which each entry keeps.
#[derive(Default)]
struct Edges {
    snapshot: usize,
    known: HashMap<EdgeIndex, PinnedEdge, foldhash::fast::RandomState>,
    /// By destination and protocol, for what is no service's port. As many as the metrics admit.
    named: HashMap<Box<str>, NamedEdges, foldhash::fast::RandomState>,
}

type NamedEdges = Vec<(Protocol, bool, Arc<Edge>)>;

#[derive(PartialEq, Eq, Hash)]
struct EdgeIndex {
    service: usize,
    backend: usize,
    protocol: Protocol,
    mtls: bool,
}

struct PinnedEdge {
    edge: Arc<Edge>,
    _service: Arc<Service>,
    _rule: Option<Arc<Rule>>,
}

impl Worker {
    /// A worker of the calling thread's runtime.
    ///
    /// # Errors
    /// When the namespace's sockets cannot be used.
    pub fn new(proxy: Arc<Proxy>, log: Option<Log>) -> io::Result<Self> {
        let inside = proxy.inside.as_ref().map(SocketSource::attach).transpose()?;
        let service = proxy.plan.service_name();
        let at = match &service {
            Ok(service) => format!("{}/{}", service.namespace, proxy.plan.name),
            Err(_) => proxy.plan.name.clone(),
        };
        Ok(Self {
            idlers: Idlers::default(),
            pools: Pools::new(Connector::new(proxy.credentials.clone(), inside)),
            at: at.into(),
            source: service.map_or_else(|_| proxy.plan.service.clone(), |service| service.to_string()).into(),
            nobody: Arc::new([]),
            outside: Arc::default(),
            drain: proxy.drain.clone(),
            log,
            snapshot: RefCell::new((Cache::new(proxy.snapshot.clone()), Rc::new(proxy.snapshot.load_full()))),
            live: RefCell::default(),
            edges: RefCell::default(),
            unknown: OnceCell::new(),
            server_first: RefCell::default(),
            application: RefCell::default(),
            random: StdCell::new(rand::random::<u64>() | 1),
            proxy,
        })
    }

    /// Accepts on all doors until the proxy has drained.
    async fn serve(self: &Rc<Self>, doors: Vec<Door>) -> io::Result<()> {
        let connections = listen::Open::default();
        for door in doors {
            let Some(role) = listen::Traffic::of(&door.role) else { continue };
            door.listener.set_nonblocking(true)?;
            let listener = tokio::net::TcpListener::from_std(door.listener)?;
            tokio::task::spawn_local(listen::accept(self.clone(), listener, role, connections.clone()));
        }
        let worker = self.clone();
        tokio::task::spawn_local(async move {
            loop {
                tokio::time::sleep(SWEEP).await;
                worker.pools.sweep();
            }
        });
        let worker = self.clone();
        tokio::task::spawn_local(async move {
            loop {
                tokio::time::sleep(silence::PERIOD).await;
                worker.pools.connector().end_vanished();
                worker.pools.connector().ties().judge(&worker.proxy.endpoints, &worker.proxy.metrics);
            }
        });
        tokio::task::spawn_local(listen::keep_within_memory(self.clone(), connections.clone()));
        let (open, mut drain) = (connections.clone(), self.drain());
        tokio::task::spawn_local(async move {
            drain.overdue().await;
            open.end_inbound();
        });
        let (mut drain, mut replaced) = (self.drain(), self.drain());
        tokio::select! {
            () = drain.reached(drain::Phase::Ending) => {}
            // Nothing is accepted any more; by then what was accepted last is among what is open.
            () = async { replaced.replaced().await; replaced.told().await } => {}
        }
        let mut drain = self.drain();
        tokio::select! {
            () = connections.none() => {}
            () = drain.reached(drain::Phase::Closing) => {}
        }
        Ok(())
    }

    /// The configuration now. Take it once a request.
    pub fn snapshot(&self) -> Rc<Arc<Snapshot>> {
        let (cache, held) = &mut *self.snapshot.borrow_mut();
        let now = cache.load();
        if !Arc::ptr_eq(now, held) {
            *held = Rc::new(now.clone());
        }
        held.clone()
    }

    /// How far the proxy has come in leaving.
    pub fn drain(&self) -> drain::Watch {
        self.drain.clone()
    }

    /// The phase now.
    pub fn phase(&self) -> drain::Phase {
        self.drain.phase()
    }

    /// Whether another proxy has taken this one's place.
    pub fn is_replaced(&self) -> bool {
        self.drain.is_replaced()
    }

    /// Whether requests are refused, so that they are sent elsewhere. One that was replaced has no elsewhere.
    pub fn refuses(&self) -> bool {
        self.phase() >= drain::Phase::Refusing && !self.is_replaced()
    }

    /// The endpoints of a service; `None` when nobody has asked for them yet.
    pub fn live(&self, service: &ServiceName) -> Option<Rc<Arc<Live>>> {
        let mut live = self.live.borrow_mut();
        if let Some((cache, held)) = live.get_mut(service)
            && let Some(found) = cache.load()
        {
            if held.as_ref().is_none_or(|held| !Arc::ptr_eq(held, found)) {
                *held = Some(Rc::new(found.clone()));
            }
            return held.clone();
        }
        let cell = self.proxy.endpoints.get(service)?;
        let mut cache = Cache::new(cell);
        let found = cache.load().clone().map(Rc::new);
        live.insert(service.clone(), (cache, found.clone()));
        found
    }

    /// Why a connection of bytes from or to a mesh peer was ended: the peer is not accepted any more.
    pub fn why_ended(&self, io: &Io) -> Option<Cause> {
        self.pools.connector().ties().why_ended(io, &self.proxy.endpoints, &self.proxy.metrics)
    }

    /// Ends what carries nothing: kept connections to endpoints, and up to so many idle ones of clients. How many of
    /// the latter.
    pub fn make_room(&self, count: usize) -> usize {
        self.pools.close_idle();
        let ended = self.idlers.let_go(count);
        self.proxy.metrics.shed(Shed::Idle, ended);
        ended
    }

    /// Whether a request may be begun.
    ///
    /// # Errors
    /// [`Cause::Overloaded`] when there is no memory for it.
    pub fn begin_request(&self) -> Result<(), Cause> {
        if self.proxy.overload.begins() { Ok(()) } else { Err(Cause::Overloaded) }
    }

    /// A random number (xorshift64*): for balancing and shares, not for secrets.
    pub fn random(&self) -> u64 {
        let mut state = self.random.get();
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        self.random.set(state);
        state.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A request's id.
    pub fn new_id(&self) -> String {
        format!("{:016x}", self.random())
    }

    /// A line for the access log, where one is written.
    pub fn line(&self, line: impl FnOnce() -> Line) -> Option<(Log, Line)> {
        self.log.as_ref().map(|log| (log.clone(), line()))
    }

    /// The edge of what went nowhere.
    pub fn unknown_edge(&self) -> Arc<Edge> {
        self.unknown.get_or_init(|| self.named_edge("unknown", Protocol::Http1, false)).clone()
    }

    /// The outbound edge to a destination that is no service's port.
    pub fn named_edge(&self, destination: &str, protocol: Protocol, mtls: bool) -> Arc<Edge> {
        let mut edges = self.edges.borrow_mut();
        let known = edges.named.get(destination).into_iter().flatten();
        if let Some((.., edge)) = known.clone().find(|(it, secured, _)| (*it, *secured) == (protocol, mtls)) {
            return edge.clone();
        }
        let edge = self.proxy.metrics.edge(&EdgeKey {
            side: Side::Outbound,
            source: self.source.clone(),
            destination: destination.into(),
            route: "default".into(),
            protocol,
            mtls,
            backend: destination.into(),
        });
        edges.named.entry(destination.into()).or_default().push((protocol, mtls, edge.clone()));
        edge
    }

    /// The outbound edge of a decision. The first time it is looked up by name, then by what was decided.
    pub fn outbound_edge(
        &self,
        snapshot: &Arc<Snapshot>,
        service: &Arc<Service>,
        rule: Option<&Arc<Rule>>,
        backend: &ServiceName,
        protocol: Protocol,
        mtls: bool,
    ) -> Arc<Edge> {
        let mut edges = self.edges.borrow_mut();
        if edges.snapshot != Arc::as_ptr(snapshot) as usize {
            edges.snapshot = Arc::as_ptr(snapshot) as usize;
            edges.known.clear();
        }
        let index = EdgeIndex {
            service: Arc::as_ptr(service) as usize,
            backend: std::ptr::from_ref(backend) as usize,
            protocol,
            mtls,
        };
        let pinned = edges.known.entry(index).or_insert_with(|| PinnedEdge {
            edge: self.proxy.metrics.edge(&EdgeKey {
                side: Side::Outbound,
                source: self.source.clone(),
                destination: service.name.to_string().into(),
                route: rule.map_or_else(|| "default".into(), |rule| rule.route.clone()),
                protocol,
                mtls,
                backend: backend.to_string().into(),
            }),
            _service: service.clone(),
            _rule: rule.cloned(),
        });
        pinned.edge.clone()
    }

    /// The inbound edge from a peer. Resolve it once a connection.
    pub fn inbound_edge(&self, source: &str, protocol: Protocol, mtls: bool) -> Arc<Edge> {
        self.proxy.metrics.edge(&EdgeKey {
            side: Side::Inbound,
            source: source.into(),
            destination: self.source.clone(),
            route: "default".into(),
            protocol,
            mtls,
            backend: self.source.clone(),
        })
    }

    /// Whether this service port's server is known to speak first.
    pub fn is_server_first(&self, service: &ServiceName, port: u16) -> bool {
        let learned = self.server_first.borrow();
        !learned.is_empty() && learned.contains_key(&(service.clone(), port))
    }

    /// Remembers that this service port's server speaks first.
    pub fn learn_server_first(&self, service: &ServiceName, port: u16) {
        self.server_first.borrow_mut().insert((service.clone(), port), ());
    }

    /// Where the application takes connections to this port, inside a namespace of ours.
    pub fn application(&self, port: u16) -> SocketAddr {
        let mut known = self.application.borrow_mut();
        let address = known.entry(port).or_insert_with(|| self.listening_address(port));
        SocketAddr::new(*address, port)
    }

    /// Looks again where the application listens. True when that is elsewhere than before.
    pub fn look_again(&self, port: u16) -> bool {
        let found = self.listening_address(port);
        self.application.borrow_mut().insert(port, found) != Some(found)
    }

    fn listening_address(&self, port: u16) -> IpAddr {
        let looked = self.proxy.listening.as_ref().and_then(|listening| listening.look().ok());
        looked.and_then(|ports| ports.address(port)).unwrap_or(IpAddr::from([127, 0, 0, 1]))
    }
}

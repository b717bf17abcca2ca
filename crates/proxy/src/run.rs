//! A proxy's life: adopt what the supervisor made, get ready, serve, leave.
//!
//! This thread keeps everything that is not traffic: certificate, configuration, names, health, counters, the line to the
//! supervisor. Traffic belongs to the workers, which begin when certificate and configuration are there.

use crate::admin::Inspection;
use crate::capture::listening::Ports;
use crate::capture::netns::SocketSource;
use crate::control::{Address, AddressError, Machine, Outside};
use crate::dns::{Server, Zone};
use crate::drain::{self, Phase};
use crate::h1::Namespaces;
use crate::health::Watcher;
use crate::identity::{IdentityError, Keeper, Wanted};
use crate::link::Link;
use crate::metrics::{Metrics, Refused};
use crate::overload::Overload;
use crate::plan::{self, Capture, FromSupervisor, Mode, Plan, Role, ToSupervisor};
use crate::platform;
use crate::state::{Directory, StateError};
use crate::sync::{Demand, Leaving, Outputs, Setup, Standing, Sync};
use crate::upstream::endpoint::Table;
use crate::worker::{self, Door, Proxy, Workers};
use arc_swap::{ArcSwap, ArcSwapOption};
use sheer_core::name::NameError;
use sheer_core::snapshot::Snapshot;
use sheer_core::wire::{FEATURES, v1};
use std::collections::BTreeSet;
use std::io;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// How long new requests are served after draining began; contracts.md, "Draining".
const SERVE_ON: Duration = Duration::from_secs(5);

/// How long connections may take to end when the workload is gone or the grace is over.
const CLOSING: Duration = Duration::from_secs(1);

/// How long a proxy that was replaced leaves its connections as they are: those accepted at that moment have begun then.
const BEGUN: Duration = Duration::from_secs(1);

/// How long idle connections of a proxy that was replaced take to close at the end of its time.
const IDLE_CLOSE: Duration = Duration::from_secs(2);

/// How long the last words to the control plane may take.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The most workers. A proxy beside one workload does not need more, and several stand on a host.
const MAX_WORKERS: usize = 8;

/// Why a proxy cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The plan names no service.
    #[error("the plan's service is no name: {0}")]
    Service(#[from] NameError),
    /// The plan names a control plane that cannot be read.
    #[error(transparent)]
    Control(#[from] AddressError),
    /// The system refused something that every proxy needs.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The state directory cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// There is no certificate.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The control plane does not take the workload.
    #[error("{message}")]
    Registration {
        /// In its words.
        message: String,
    },
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::System { what, source }
}

/// Runs a proxy until it has drained. Blocks. What is wrong is also told to the supervisor.
///
/// # Errors
/// [`Error`], in words for people.
pub fn run(plan: Plan) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(system("start the runtime"))?.block_on(async {
        let socket =
            plan.supervisor.map(platform::adopt).transpose().map_err(system("adopt the supervisor's socket"))?;
        let mut link = Link::new(socket).map_err(system("use the supervisor's socket"))?;
        let ended = live(plan, &mut link).await;
        let last = match &ended {
            Ok(()) => ToSupervisor::Drained,
            Err(error) => ToSupervisor::Failed { message: error.to_string() },
        };
        link.tell(&last).await;
        ended
    })
}

async fn live(plan: Plan, link: &mut Link) -> Result<(), Error> {
    let sockets = Sockets::adopt(&plan)?;
    let own = OwnHalf::start(&plan, sockets)?;
    let mut orders = Orders::new(link, plan.supervisor.is_some(), own.proxy.metrics.clone())?;
    let OwnHalf { proxy, doors, signal, leaving, mut keeper, mut ready, mut standing, serving, mut sync, others } = own;

    // Each arm may be dropped: waiting for a value loses nothing.
    let order = tokio::select! {
        error = &mut keeper => return Err(join(error)?.into()),
        refused = refusal(&mut standing) => return Err(Error::Registration { message: refused }),
        _ = ready.wait_for(|it| *it) => None,
        order = orders.next() => Some(order),
    };
    let order = match order {
        Some(order) => Some(order),
        None => {
            // The configuration came from a control plane or from disk; so did the certificate, as the first of both.
            tokio::select! {
                error = &mut keeper => return Err(join(error)?.into()),
                () = published(&proxy) => None,
                order = orders.next() => Some(order),
            }
        }
    };
    let mut workers = None;
    let mut order = order;
    if order.is_none() {
        let number = workers_for(std::thread::available_parallelism().map_or(1, usize::from));
        workers = Some(worker::start(&proxy, &doors, number).map_err(system("start the workers"))?);
        serving.send_replace(true);
        orders.link.tell(&ToSupervisor::Ready).await;
        // What only the start needed; with it a proxy works as well, and is larger.
        let _ = platform::forget_code();
        tracing::info!(workers = number, "ready");
        order = Some(tokio::select! {
            order = orders.next() => order,
            error = &mut keeper => return Err(join(error)?.into()),
        });
    }
    match (workers, order) {
        (Some(mut workers), Some(FromSupervisor::Replaced)) => {
            // The next proxy's certificate is renewed by itself.
            keeper.abort();
            drop(doors);
            give_way(&mut orders, &signal, &leaving, &mut workers, &proxy.plan).await;
        }
        (Some(mut workers), Some(order)) => {
            leave(order, &mut orders, &signal, &leaving, &mut workers, &proxy.plan).await;
        }
        _ => {}
    }
    leaving.send_replace(Leaving::Done);
    // The last counts; without a control plane there is nobody to tell.
    let _ = tokio::time::timeout(LAST_WORDS, &mut sync).await;
    drop(others);
    tracing::info!("drained");
    Ok(())
}

fn join(ended: Result<IdentityError, tokio::task::JoinError>) -> Result<IdentityError, Error> {
    ended.map_err(|error| Error::System { what: "keep the certificate", source: io::Error::other(error) })
}

async fn refusal(standing: &mut watch::Receiver<Standing>) -> String {
    let refused = standing.wait_for(|it| matches!(it, Standing::Refused { .. })).await.map(|it| it.clone());
    match refused {
        Ok(Standing::Refused { message }) => message,
        Ok(Standing::Unknown | Standing::Registered) | Err(_) => std::future::pending().await,
    }
}

/// Waits for the certificate.
async fn published(proxy: &Proxy) {
    while proxy.credentials.load().is_none() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// One up to two CPUs; then one for each two, to leave the others to the application.
fn workers_for(cpus: usize) -> usize {
    cpus.div_ceil(2).clamp(1, MAX_WORKERS)
}

/// Leaves without a failed request, as far as the workload is still there.
async fn leave(
    order: FromSupervisor,
    orders: &mut Orders<'_>,
    signal: &drain::Signal,
    leaving: &watch::Sender<Leaving>,
    workers: &mut Workers,
    plan: &Plan,
) {
    let mut gone = order == FromSupervisor::Gone;
    if !gone {
        let began = Instant::now();
        let grace = Duration::from_millis(plan.drain_grace_ms);
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        leaving.send_replace(Leaving::Draining { grace_ms });
        signal.set(Phase::Told);
        gone = orders.gone_before(began + SERVE_ON).await;
        signal.set(Phase::Refusing);
        if plan.command {
            // It is told to stop only now, and may still call others to put its affairs in order.
            gone = gone || orders.gone_before(began + grace.max(SERVE_ON)).await;
            if !gone {
                signal.set(Phase::Overdue);
            }
            while !gone {
                gone = orders.next().await == FromSupervisor::Gone;
            }
        } else if !gone {
            signal.set(Phase::Ending);
            tokio::select! {
                () = workers.join() => return,
                end = orders.gone_before(began + grace.max(SERVE_ON)) => gone = end,
            }
        }
    }
    if gone {
        leaving.send_replace(Leaving::Gone { reason: "the workload ended".to_owned() });
        signal.set(Phase::Ending);
        // Answers on their way to the caller are still delivered.
        if tokio::time::timeout(CLOSING, workers.join()).await.is_ok() {
            return;
        }
    }
    signal.set(Phase::Closing);
    let _ = tokio::time::timeout(CLOSING, workers.join()).await;
}

/// Lets a successor take what comes new, and finishes what is open: nobody notices but by being told to connect again.
async fn give_way(
    orders: &mut Orders<'_>,
    signal: &drain::Signal,
    leaving: &watch::Sender<Leaving>,
    workers: &mut Workers,
    plan: &Plan,
) {
    let grace = Duration::from_millis(plan.drain_grace_ms);
    let deadline = Instant::now() + grace.saturating_sub(IDLE_CLOSE + CLOSING);
    leaving.send_replace(Leaving::Replaced);
    signal.replace();
    // Connections that were accepted just now have begun by then, and are told as well.
    let mut gone = orders.gone_before(Instant::now() + BEGUN).await;
    signal.set(Phase::Told);
    // The workload is told to stop where its proxy of then is: what was drained here goes on.
    let ended = async {
        gone = gone || orders.gone_before(deadline).await;
        if !gone {
            // Idle connections close.
            signal.set(Phase::Refusing);
            gone = orders.gone_before(Instant::now() + IDLE_CLOSE).await;
        }
        signal.set(Phase::Ending);
        tokio::time::sleep(CLOSING).await;
    };
    tokio::select! {
        () = workers.join() => return,
        () = ended => signal.set(Phase::Closing),
    }
    let _ = tokio::time::timeout(CLOSING, workers.join()).await;
}

/// What the supervisor, or without one the system, tells the proxy to do.
struct Orders<'a> {
    link: &'a mut Link,
    supervised: bool,
    signals: [Signal; 3],
    metrics: Arc<Metrics>,
}

impl<'a> Orders<'a> {
    /// With a supervisor the signals are its business: a service manager sends them to the whole group. Taking them here
    /// keeps them from ending the proxy.
    fn new(link: &'a mut Link, supervised: bool, metrics: Arc<Metrics>) -> Result<Self, Error> {
        let take = |kind| signal(kind).map_err(system("take signals"));
        let signals = [take(SignalKind::terminate())?, take(SignalKind::interrupt())?, take(SignalKind::hangup())?];
        Ok(Self { link, supervised, signals, metrics })
    }

    /// Cancel safe.
    async fn next(&mut self) -> FromSupervisor {
        let [terminate, interrupt, hangup] = &mut self.signals;
        loop {
            tokio::select! {
                order = self.link.hear() => match order {
                    FromSupervisor::Refused { udp, other } => {
                        self.metrics.refused(Refused::Udp, udp);
                        self.metrics.refused(Refused::Other, other);
                        continue;
                    }
                    order => return order,
                },
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                _ = hangup.recv() => {}
            }
            if !self.supervised {
                return FromSupervisor::Drain;
            }
        }
    }

    /// Waits until the time, or until the workload is gone, which it then says.
    async fn gone_before(&mut self, until: Instant) -> bool {
        let gone = async { while self.next().await != FromSupervisor::Gone {} };
        tokio::time::timeout_at(until, gone).await.is_ok()
    }
}

/// The sockets of the plan, by what arrives on them.
#[derive(Default)]
struct Sockets {
    doors: Vec<Door>,
    dns_udp: Vec<UdpSocket>,
    dns_tcp: Vec<TcpListener>,
    admin: Vec<UnixListener>,
    metrics: Vec<TcpListener>,
    inside: Option<SocketSource>,
    tables: Vec<OwnedFd>,
}

impl Sockets {
    fn adopt(plan: &Plan) -> Result<Self, Error> {
        let mut sockets = Self::default();
        for listener in &plan.listeners {
            let socket = platform::adopt(listener.fd).map_err(system("adopt a listening socket"))?;
            let role = listener.role.clone();
            let used = |result: io::Result<()>| result.map_err(system("use a listening socket"));
            match role {
                Role::DnsUdp => {
                    let socket = UdpSocket::from(socket);
                    used(socket.set_nonblocking(true))?;
                    sockets.dns_udp.push(socket);
                }
                Role::Admin => {
                    let listener = UnixListener::from(socket);
                    used(listener.set_nonblocking(true))?;
                    sockets.admin.push(listener);
                }
                Role::DnsTcp
                | Role::Metrics
                | Role::Outbound
                | Role::Inbound
                | Role::Door { .. }
                | Role::Publish { .. }
                | Role::Upstream { .. }
                | Role::Forward => {
                    let listener = TcpListener::from(socket);
                    used(listener.set_nonblocking(true))?;
                    match role {
                        Role::DnsTcp => sockets.dns_tcp.push(listener),
                        Role::Metrics => sockets.metrics.push(listener),
                        role => sockets.doors.push(Door { listener, role }),
                    }
                }
            }
        }
        let adopt = |number| platform::adopt(number).map_err(system("adopt the namespace's descriptors"));
        sockets.inside = plan.namespace_sockets.map(adopt).transpose()?.map(SocketSource::new);
        sockets.tables = plan.namespace_tables.iter().copied().map(adopt).collect::<Result<_, _>>()?;
        Ok(sockets)
    }

    /// The workload's listening ports, as often as they are looked at.
    fn tables(&self) -> io::Result<Ports> {
        if self.tables.is_empty() {
            return Ports::here();
        }
        Ok(Ports::of(self.tables.iter().map(OwnedFd::try_clone).collect::<io::Result<_>>()?))
    }

    /// The namespaces that clients may be in: the workload's, and our own.
    fn clients(&self) -> Namespaces {
        let inside = (!self.tables.is_empty()).then(|| self.tables().ok()).flatten();
        inside.into_iter().chain(Ports::here().ok()).collect()
    }

    /// The port on which connections of this role arrive, where the proxy has one.
    fn port_of(&self, role: &Role) -> Option<u16> {
        let door = self.doors.iter().find(|door| door.role == *role)?;
        door.listener.local_addr().ok().map(|it| it.port())
    }
}

/// Everything of this thread, running.
struct OwnHalf {
    proxy: Arc<Proxy>,
    doors: Vec<Door>,
    signal: drain::Signal,
    leaving: watch::Sender<Leaving>,
    keeper: tokio::task::JoinHandle<IdentityError>,
    ready: watch::Receiver<bool>,
    standing: watch::Receiver<Standing>,
    serving: watch::Sender<bool>,
    sync: tokio::task::JoinHandle<()>,
    /// Ends its tasks when dropped.
    others: JoinSet<()>,
}

impl OwnHalf {
    fn start(plan: &Plan, sockets: Sockets) -> Result<Self, Error> {
        let service = plan.service_name()?;
        let control = plan.control.iter().map(|text| Address::parse(text)).collect::<Result<Vec<_>, _>>()?;
        let directory = Directory::open(&plan.state)?;
        let metrics: Arc<Metrics> = Arc::default();
        let outputs = Outputs {
            snapshot: Arc::new(ArcSwap::from_pointee(Snapshot::new(service.namespace.clone()))),
            endpoints: Arc::<Table>::default(),
            zone: Arc::<ArcSwap<Zone>>::default(),
            changed: Arc::new(watch::channel(0).0),
            trust: Arc::new(watch::channel(None).0),
            metrics: metrics.clone(),
        };
        let credentials = Arc::new(ArcSwapOption::empty());
        let wanted = Wanted {
            namespace: service.namespace.to_string(),
            service_account: plan.service_account.clone(),
            workload: plan.name.clone(),
            control: control.clone(),
            token_file: plan.join_token_file.clone(),
        };
        let trust = outputs.trust.subscribe();
        let outside: Arc<dyn Outside> = Arc::new(Machine);
        let keeper =
            Keeper::new(wanted, directory.clone(), credentials.clone(), trust, metrics.clone(), outside.clone());
        let (demand, demands) = Demand::channel();
        let tables = sockets.tables().map_err(system("read which ports listen"))?;
        // A workload that was served until now is as well as it was: it does not leave its service for a moment.
        let found = if plan.successor { tables.look().ok() } else { None };
        let well =
            plan.ports.iter().map(|it| it.port).filter(|port| found.as_ref().is_some_and(|it| it.contains(*port)));
        let (ports, ready_ports) = watch::channel(well.collect::<BTreeSet<u16>>());
        let (leaving, leaving_receiver) = watch::channel(Leaving::No);
        let sync = Sync::new(Setup {
            namespace: service.namespace.clone(),
            control,
            registration: registration(
                plan,
                &service.to_string(),
                |role| sockets.port_of(role),
                metrics.epoch_micros(),
            ),
            ready_ports,
            leaving: leaving_receiver,
            held: keeper.held(),
            renew: keeper.renew(),
            demands,
            outputs: outputs.clone(),
            directory,
            outside,
        });
        let (ready, standing) = (sync.ready(), sync.standing());
        let (signal, drain) = drain::channel();
        let (serving, serving_receiver) = watch::channel(false);
        let inspection = Arc::new(Inspection {
            metrics: metrics.clone(),
            snapshot: outputs.snapshot.clone(),
            endpoints: outputs.endpoints.clone(),
            credentials: credentials.clone(),
            standing: standing.clone(),
            serving: serving_receiver,
            drain: drain.clone(),
        });

        let mut others = JoinSet::new();
        let inside = sockets.inside.as_ref().map(SocketSource::attach).transpose();
        let inside = inside.map_err(system("use the namespace's sockets"))?;
        let watcher = Watcher::new(tables, &plan.ports, plan.health.as_deref(), inside, ports);
        others.spawn(watcher.trusting(plan.successor).run());
        let listening = sockets.tables().ok();
        let clients = sockets.clients();
        let dns = Server::new(outputs.zone.clone(), plan.resolvers.clone(), metrics.clone());
        for socket in sockets.dns_udp {
            let socket = tokio::net::UdpSocket::from_std(socket).map_err(system("listen for DNS"))?;
            others.spawn(dns.clone().serve_udp(socket, drain.clone()));
        }
        for listener in sockets.dns_tcp {
            let listener = tokio::net::TcpListener::from_std(listener).map_err(system("listen for DNS"))?;
            others.spawn(dns.clone().serve_tcp(listener, drain.clone()));
        }
        for listener in sockets.metrics {
            let listener = tokio::net::TcpListener::from_std(listener).map_err(system("listen for metrics"))?;
            others.spawn(inspection.clone().serve_metrics(listener, drain.clone()));
        }
        for listener in sockets.admin {
            let listener = tokio::net::UnixListener::from_std(listener).map_err(system("listen for administration"))?;
            others.spawn(inspection.clone().serve_admin(listener, drain.clone()));
        }
        let overload = Overload::of_this_process(metrics.clone());
        let proxy = Arc::new(Proxy {
            plan: plan.clone(),
            snapshot: outputs.snapshot,
            demand,
            credentials,
            metrics,
            endpoints: outputs.endpoints,
            overload,
            drain,
            inside: sockets.inside,
            listening,
            clients,
        });
        Ok(Self {
            proxy,
            doors: sockets.doors,
            signal,
            leaving,
            keeper: tokio::spawn(keeper.run()),
            ready,
            standing,
            serving,
            sync: tokio::spawn(sync.run()),
            others,
        })
    }
}

/// What the control plane is told of the workload. Where traffic to the application's ports is captured, peers dial those;
/// elsewhere, and at a loopback address, which is never captured, the port that the proxy holds for them: one for all, and
/// in plaintext, which cannot say which is meant, that port's own.
fn registration(plan: &Plan, service: &str, door: impl Fn(&Role) -> Option<u16>, epoch: u64) -> v1::Registration {
    let dialled = |port: u16| match (plan.capture, plan.mode) {
        (Capture::Cgroup | Capture::Here, _) => port,
        (_, Mode::Watch) => door(&Role::Door { port }).or_else(|| door(&Role::Inbound)).unwrap_or(port),
        _ => door(&Role::Inbound).unwrap_or(port),
    };
    let port = |it: &plan::PlannedPort| v1::ListeningPort {
        port: it.port.into(),
        protocol: protocol(it.protocol).into(),
        mesh_port: dialled(it.port).into(),
        name: String::new(),
        ready: false,
        hop: if plan.mode == Mode::Watch { v1::Hop::None } else { v1::Hop::Sheer1 }.into(),
        at_address: plan.capture != Capture::Netns,
        loopback_port: door(&Role::Inbound).unwrap_or_default().into(),
    };
    let labels = plan.labels.iter();
    v1::Registration {
        namespace: service.split_once('/').map_or("", |(namespace, _)| namespace).to_owned(),
        name: plan.name.clone(),
        service: service.to_owned(),
        labels: labels.map(|(name, value)| v1::Label { name: name.clone(), value: value.clone() }).collect(),
        ports: plan.ports.iter().map(port).collect(),
        address: plan.address.map(|it| it.to_string()).unwrap_or_default(),
        network: plan.network.clone(),
        locality: plan.locality.clone(),
        mode: match plan.mode {
            Mode::Watch => v1::Mode::Watch,
            Mode::Permissive => v1::Mode::Permissive,
            Mode::Strict => v1::Mode::Strict,
        }
        .into(),
        capture: match plan.capture {
            Capture::Netns => "netns",
            Capture::Cgroup => "cgroup",
            Capture::Here => "here",
            Capture::Env => "env",
            Capture::None => "none",
        }
        .to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        epoch,
        features: FEATURES.iter().map(|&it| it.to_owned()).collect(),
        host: nix::unistd::gethostname().ok().and_then(|it| it.into_string().ok()).unwrap_or_default(),
    }
}

fn protocol(declared: plan::Protocol) -> v1::Protocol {
    match declared {
        plan::Protocol::Detect => v1::Protocol::Detect,
        plan::Protocol::Http => v1::Protocol::Http,
        plan::Protocol::Http2 => v1::Protocol::Http2,
        plan::Protocol::Grpc => v1::Protocol::Grpc,
        plan::Protocol::Tcp => v1::Protocol::Tcp,
        plan::Protocol::Tls => v1::Protocol::Tls,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_plaintext_each_port_is_dialled_at_its_own_door() {
        let told = |mode, doors: &[u16]| {
            let plan = Plan { capture: Capture::Netns, ..crate::mesh_tests::plan("web", &[80, 81], mode) };
            let door = |role: &Role| match role {
                Role::Inbound => Some(40_000),
                Role::Door { port } => doors.contains(port).then_some(41_000 + port),
                _ => None,
            };
            let registration = registration(&plan, "default/web", door, 1);
            registration.ports.iter().map(|port| port.mesh_port).collect::<Vec<_>>()
        };
        assert_eq!(told(Mode::Watch, &[80, 81]), [41_080, 41_081]);
        assert_eq!(told(Mode::Watch, &[81]), [40_000, 41_081]);
        assert_eq!(told(Mode::Strict, &[80, 81]), [40_000, 40_000], "mesh peers name the port");
    }

    #[test]
    fn a_port_in_a_namespace_of_its_own_is_none_of_the_hosts() {
        let told = |capture| {
            let plan = Plan { capture, ..crate::mesh_tests::plan("web", &[8080], Mode::Strict) };
            let registration = registration(&plan, "default/web", |_| Some(40_000), 1);
            let [port] = registration.ports.as_slice() else { panic!("one port") };
            (port.mesh_port, port.at_address)
        };
        assert_eq!(told(Capture::Netns), (40_000, false));
        assert_eq!((told(Capture::Env), told(Capture::None)), ((40_000, true), (40_000, true)));
        assert_eq!((told(Capture::Cgroup), told(Capture::Here)), ((8080, true), (8080, true)));
    }
}

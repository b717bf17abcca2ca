//! The production code, started on a simulated host.

use crate::disk::{FileDisk, StateDisk};
use anyhow::{Context as _, anyhow};
use arc_swap::ArcSwap;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use sheer_control::clock::Clock;
use sheer_control::{Control, Options};
use sheer_core::name::{DnsLabel, ServiceName};
use sheer_core::snapshot::Snapshot;
use sheer_core::wire::{FEATURES, v1};
use sheer_proxy::control::{Address, Line, Outside};
use sheer_proxy::identity::{Held, Keeper, Wanted};
use sheer_proxy::state::Directory;
use sheer_proxy::sync::{Demand, Leaving, Outputs, Setup, Standing, Sync};
use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use turmoil::net::{TcpListener, TcpStream};

/// The control plane's host, and its doors: one stands for the unix socket, where TLS is not spoken.
pub const CONTROL: &str = "control";
const LOCAL: u16 = 15_011;
const REMOTE: u16 = 15_012;

/// The user that everything on the host of the unix socket runs as.
const USER: u32 = 1000;

/// The port that proxies' workloads answer, and the port of their service.
const WORKLOAD_PORT: u16 = 8080;
/// The port of service `web`.
pub const SERVICE_PORT: u16 = 80;

/// When the simulation begins, in unix seconds.
const BEGAN: u64 = 1_790_000_000;

/// How long what stands beside a proxy takes to start it again when it ends.
const AGAIN: Duration = Duration::from_millis(500);

/// A host's wall clock: simulated time, and how wrong it is.
#[derive(Clone, Debug)]
pub struct Wall {
    elapsed_ms: Arc<AtomicU64>,
    wrong_ms: Arc<AtomicI64>,
}

impl Wall {
    /// A clock that is right.
    pub fn new(elapsed_ms: &Arc<AtomicU64>) -> Self {
        Self { elapsed_ms: elapsed_ms.clone(), wrong_ms: Arc::default() }
    }

    /// Sets how wrong it is.
    pub fn set_wrong(&self, by_ms: i64) {
        self.wrong_ms.store(by_ms, Relaxed);
    }

    /// The time.
    pub fn now(&self) -> SystemTime {
        let right = UNIX_EPOCH + Duration::from_secs(BEGAN) + Duration::from_millis(self.elapsed_ms.load(Relaxed));
        let wrong_ms = self.wrong_ms.load(Relaxed);
        let by = Duration::from_millis(wrong_ms.unsigned_abs());
        if wrong_ms < 0 { right - by } else { right + by }
    }
}

/// The control plane's host.
pub struct ControlHost {
    /// Its configuration directory; its state beside it.
    pub home: PathBuf,
    /// Its clock.
    pub wall: Wall,
    /// Where its state is.
    pub disk: StateDisk,
    /// The control plane while it runs.
    pub running: Mutex<Option<Arc<Control>>>,
}

impl ControlHost {
    /// The configuration directory.
    pub fn config(&self) -> PathBuf {
        self.home.join("mesh.d")
    }

    /// Runs a control plane until the host goes down.
    ///
    /// # Errors
    /// When it does not start, or a part of it ends.
    pub async fn run(self: Arc<Self>) -> turmoil::Result {
        let wall = self.wall.clone();
        let mut plane = sheer_control::start(Options {
            config: self.config(),
            state: self.home.join("state"),
            advertise: vec![format!("{CONTROL}:{REMOTE}")],
            own_users: vec![USER],
            clock: Clock::of(move || wall.now()),
            medium: Some(Arc::new(self.disk.clone())),
            ..Options::default()
        })
        .await?;
        *self.running.lock() = Some(plane.control().clone());
        let local = TcpListener::bind((Ipv4Addr::UNSPECIFIED, LOCAL)).await?;
        let remote = TcpListener::bind((Ipv4Addr::UNSPECIFIED, REMOTE)).await?;
        loop {
            tokio::select! {
                accepted = local.accept() => {
                    let (stream, _) = accepted?;
                    plane.take_local(stream, USER).await;
                }
                accepted = remote.accept() => {
                    let (stream, address) = accepted?;
                    let taken = plane.take(stream, address);
                    tokio::spawn(taken);
                }
                error = plane.failed() => return Err(Box::new(error)),
            }
        }
    }
}

/// What a proxy's host has outside of the proxy.
#[derive(Clone)]
struct Surroundings(Wall);

impl fmt::Debug for Surroundings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("simulated")
    }
}

impl Outside for Surroundings {
    fn connect<'a>(&'a self, address: &'a Address) -> BoxFuture<'a, io::Result<Box<dyn Line>>> {
        let port = match address {
            Address::Unix(_) => LOCAL,
            Address::Tcp(_) => REMOTE,
        };
        Box::pin(async move { Ok(Box::new(TcpStream::connect((CONTROL, port)).await?) as Box<dyn Line>) })
    }

    fn now(&self) -> SystemTime {
        self.0.now()
    }
}

/// A proxy's host.
pub struct ProxyHost {
    /// The workload's name, and the host's.
    pub name: String,
    number: u16,
    service: ServiceName,
    /// Services that the workload calls.
    calls: Vec<ServiceName>,
    /// Its clock.
    pub wall: Wall,
    /// Where its state is.
    pub disk: Arc<FileDisk>,
    /// Whether it reaches the control plane over TLS, as from another host.
    pub is_remote: AtomicBool,
    lives: AtomicU64,
    /// Why proxies ended by themselves; taken by who tells of it.
    pub ends: Mutex<Vec<String>>,
    /// The proxy while it runs.
    pub running: Mutex<Option<Running>>,
}

/// A running proxy, from outside.
#[derive(Clone)]
pub struct Running {
    /// Which of the proxy's lives it is.
    pub life: u64,
    /// What it decides with.
    pub outputs: Outputs,
    /// Whether it serves.
    pub ready: watch::Receiver<bool>,
    /// What the control plane said of it.
    pub standing: watch::Receiver<Standing>,
    /// Its certificate.
    pub held: watch::Receiver<Option<Arc<Held>>>,
    /// Tells it to leave.
    pub leaving: Arc<watch::Sender<Leaving>>,
}

/// Where a proxy keeps its state.
pub const STATE: &str = "/state";

impl ProxyHost {
    /// The host of a workload of a service.
    pub fn new(number: u16, service: &str, calls: &[&str], elapsed_ms: &Arc<AtomicU64>) -> anyhow::Result<Self> {
        let calls = calls.iter().map(|it| ServiceName::parse(&format!("default/{it}")));
        Ok(Self {
            name: format!("p{number}"),
            number,
            service: ServiceName::parse(&format!("default/{service}"))?,
            calls: calls.collect::<Result<_, _>>()?,
            wall: Wall::new(elapsed_ms),
            disk: Arc::default(),
            is_remote: AtomicBool::new(false),
            lives: AtomicU64::new(0),
            ends: Mutex::default(),
            running: Mutex::default(),
        })
    }

    /// Runs the proxy, again when it ends, until the host goes down or the workload has left.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn run(self: Arc<Self>) -> turmoil::Result {
        while !self.clone().live().await? {
            tokio::time::sleep(AGAIN).await;
        }
        Ok(())
    }

    /// One life of the proxy. True when the workload has left.
    async fn live(self: Arc<Self>) -> turmoil::Result<bool> {
        let namespace = DnsLabel::parse("default")?;
        let directory = Directory::on(self.disk.clone(), Path::new(STATE))?;
        let outputs = Outputs {
            snapshot: Arc::new(ArcSwap::from_pointee(Snapshot::new(namespace.clone()))),
            endpoints: Arc::default(),
            zone: Arc::default(),
            changed: Arc::new(watch::channel(0).0),
            trust: Arc::new(watch::channel(None).0),
            metrics: Arc::default(),
        };
        let address = match self.is_remote.load(Relaxed) {
            true => Address::Tcp(format!("{CONTROL}:{REMOTE}")),
            false => Address::Unix("/control.sock".into()),
        };
        let wanted = Wanted {
            namespace: "default".into(),
            service_account: "web".into(),
            workload: self.name.clone(),
            control: vec![address.clone()],
            token_file: None,
        };
        let outside: Arc<dyn Outside> = Arc::new(Surroundings(self.wall.clone()));
        let (trust, metrics) = (outputs.trust.subscribe(), outputs.metrics.clone());
        let keeper = Keeper::new(wanted, directory.clone(), Arc::default(), trust, metrics, outside.clone());
        let (demand, demands) = Demand::channel();
        let (_ports, ready_ports) = watch::channel(BTreeSet::from([WORKLOAD_PORT]));
        let (leaving, leaving_receiver) = watch::channel(Leaving::No);
        let sync = Sync::new(Setup {
            namespace,
            control: vec![address],
            registration: self.registration(),
            ready_ports,
            leaving: leaving_receiver,
            held: keeper.held(),
            renew: keeper.renew(),
            demands,
            outputs: outputs.clone(),
            directory,
            outside,
        });
        *self.running.lock() = Some(Running {
            life: self.lives.fetch_add(1, Relaxed) + 1,
            outputs,
            ready: sync.ready(),
            standing: sync.standing(),
            held: keeper.held(),
            leaving: Arc::new(leaving),
        });
        for service in &self.calls {
            demand.want(service);
        }
        let (mut keeper, mut sync) = (tokio::spawn(keeper.run()), tokio::spawn(sync.run()));
        let left = tokio::select! {
            ended = &mut keeper => {
                self.ends.lock().push(ended.context("the keeper of the certificate panicked")?.to_string());
                sync.abort();
                false
            }
            ended = &mut sync => {
                ended.context("the synchronisation panicked")?;
                keeper.abort();
                true
            }
        };
        let was = self.running.lock().take().ok_or_else(|| anyhow!("somebody else ended it"))?;
        if left && *was.leaving.borrow() != Leaving::Done {
            return Err(anyhow!("the synchronisation ended by itself").into());
        }
        Ok(left)
    }

    fn registration(&self) -> v1::Registration {
        let mesh_port = 15_100 + u32::from(self.number);
        v1::Registration {
            namespace: "default".into(),
            name: self.name.clone(),
            service: self.service.to_string(),
            ports: vec![v1::ListeningPort {
                port: WORKLOAD_PORT.into(),
                mesh_port,
                loopback_port: mesh_port,
                hop: v1::Hop::Sheer1.into(),
                ..Default::default()
            }],
            mode: v1::Mode::Strict.into(),
            capture: "none".into(),
            version: "simulated".into(),
            epoch: 1,
            features: FEATURES.iter().map(|&it| it.to_owned()).collect(),
            host: self.name.clone(),
            ..Default::default()
        }
    }
}

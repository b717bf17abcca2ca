//! The control plane: sources, compilation, certificates, delivery, status.
//!
//! - [`source`]: the configuration directory, compiled as one set; a wrong set never comes into force.
//! - [`state`]: configuration and workloads as they are now, and the resources made of them.
//! - [`push`]: delta discovery streams to proxies.
//! - [`fleet`], [`registration`]: which workloads there are, and what they may claim.
//! - [`ca`], [`certify`], [`attest`], [`tls`]: certificates, and who gets them.
//! - `rotation`: how the root is replaced.
//! - [`store`]: what survives a restart.
//! - [`telemetry`], [`status`]: what people are shown, by the HTTP API (see `sheer_core::api`).
//! - [`documents`]: what `sheer apply` writes.
//! - [`backup()`], [`restore`].
//!
//! [`start`] runs it; everything is bound and loaded when it returns.

mod api;
pub mod attest;
mod backup;
pub mod ca;
pub mod certify;
pub mod clock;
pub mod documents;
mod file;
pub mod fleet;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod listen;
pub mod push;
pub mod registration;
mod rotation;
mod seldom;
pub mod source;
pub mod state;
pub mod status;
pub mod store;
pub mod telemetry;
pub mod tls;

use api::{Access, Api};
use attest::{Guesses, PROXY_USER, TokenRefused, make_token};
pub use backup::{BackupError, Restored, backup, restore};
use ca::{Authority, CaError};
use clock::Clock;
use fleet::Fleet;
use listen::Doorway;
pub use listen::Line;
use parking_lot::Mutex;
use push::Hub;
pub use rotation::{RotationError, Trust};
use seldom::Seldom;
use sheer_core::api::{Applied, TokenRequest, TokenView, WorkloadView};
use sheer_core::compile::{Compiled, Registered, Source};
use sheer_core::name::ServiceName;
use source::directory::Directory;
use state::{Assigned, Book, State};
use std::collections::BTreeSet;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use store::{Medium, Store, StoreError, Table};
use telemetry::Telemetry;
use tls::Door;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// The file in the state directory with the configuration that was last in force.
const KEPT: &str = "configuration.json";

/// How a control plane is set up.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The directory of YAML files. It may be missing: then there is no configuration until it is there.
    pub config: PathBuf,
    /// The directory of everything that must survive; made with mode 0700 when it is missing.
    pub state: PathBuf,
    /// The directory for `control.sock` and `api.sock`; none: no sockets.
    pub sockets: Option<PathBuf>,
    /// Where proxies connect over TLS; port 0 picks a free one.
    pub proxy_listen: Vec<SocketAddr>,
    /// Where the API listens on TCP; port 0 picks a free one.
    pub api_listen: Option<SocketAddr>,
    /// How proxies elsewhere reach `proxy_listen`: `HOST:PORT`, written into tokens. Empty: an own guess.
    pub advertise: Vec<String>,
    /// Users that count as the control plane's own; empty: its own user, and for root also `sheer` and [`PROXY_USER`].
    pub own_users: Vec<u32>,
    /// The time; tests move it.
    pub clock: Clock,
    /// Tests in simulated time put a disk in the place of the state file. Then there are no threads either: the
    /// configuration directory is looked at, not watched.
    pub medium: Option<Arc<dyn Medium>>,
}

/// Why a control plane cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The state.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The certificates.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// A join token.
    #[error(transparent)]
    Token(#[from] TokenRefused),
    /// TLS.
    #[error("TLS cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
    /// A listener.
    #[error("cannot listen on {address}: {source}; {mend}")]
    Listen {
        /// Where.
        address: String,
        /// Why.
        source: io::Error,
        /// What to do.
        mend: String,
    },
    /// A file or directory.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The API's address is not the loopback's.
    #[error(
        "the API would listen on {address}: it speaks plain HTTP and listens on loopback only; choose 127.0.0.1, and \
         reach it from elsewhere through `ssh -L`"
    )]
    OpenApi {
        /// Where it would listen.
        address: SocketAddr,
    },
    /// A part ended that should run for ever.
    #[error("{part} has ended: {reason}")]
    Ended {
        /// Which.
        part: &'static str,
        /// Why.
        reason: String,
    },
}

/// What all parts of a control plane share.
pub struct Control {
    clock: Clock,
    store: Store,
    authority: Arc<Authority>,
    door: Arc<Door>,
    state: State,
    hub: Arc<Hub>,
    fleet: Arc<Fleet>,
    telemetry: Telemetry,
    guesses: Guesses,
    /// Certificates that were refused are logged.
    refusals: Seldom,
    directory: Arc<Directory>,
    own_users: Vec<u32>,
    local_address: IpAddr,
    advertised: Vec<String>,
    stopped: watch::Receiver<bool>,
    state_directory: PathBuf,
    started: i64,
    trust_domain: String,
    /// One change of the roots at a time.
    rotating: tokio::sync::Mutex<()>,
    publishing: Mutex<()>,
    /// The trust domain of the configuration, where it is another one.
    wanted_trust_domain: Mutex<Option<String>>,
}

/// A running control plane. Dropped, it stops at once; see [`ControlPlane::stop`].
pub struct ControlPlane {
    control: Arc<Control>,
    tasks: JoinSet<Error>,
    stop: watch::Sender<bool>,
    doorway: Doorway,
    proxy_addresses: Vec<SocketAddr>,
    api_address: Option<SocketAddr>,
    access: Arc<Access>,
    sockets: Vec<PathBuf>,
}

/// Starts a control plane: opens the state, makes or loads the authority, reads the configuration once, binds.
///
/// # Errors
/// When any of these fails; nothing is left running then.
pub async fn start(options: Options) -> Result<ControlPlane, Error> {
    let clock = options.clock.clone();
    let store = Store::open_with(&options.state, options.medium.clone())?;
    let directory = if options.medium.is_some() { Directory::looking } else { Directory::keeping };
    let directory = directory(&options.config, Some(options.state.join(KEPT)));
    let compiled = directory.load().unwrap_or_default();
    let trust_domain = compiled.mesh.trust_domain.clone();
    let trust = Trust::open(&store, &options.state, clock.unix()).await?;
    let authority = Arc::new(Authority::open(&options.state, &trust_domain, clock.clone(), &trust)?);
    if trust.rotation.is_none() {
        // A kill may have come between the end of a rotation and this.
        authority.tidy(&trust)?;
    }
    let door = Door::new(authority.clone(), clock.clone(), &trust_domain);
    let tls = door.config()?;

    let mut listeners = Vec::new();
    for address in &options.proxy_listen {
        listeners.push(bind(*address).await?);
    }
    let proxy_addresses: Vec<SocketAddr> =
        listeners.iter().map(TcpListener::local_addr).collect::<io::Result<_>>().map_err(|source| Error::Listen {
            address: "the proxies' port".to_owned(),
            source,
            mend: "try again".to_owned(),
        })?;
    let outward = proxy_addresses.iter().any(|address| !address.ip().is_loopback());
    let host = if outward { primary_address() } else { IpAddr::V4(Ipv4Addr::LOCALHOST) };
    let guess = |address: &SocketAddr| match address.ip().is_unspecified() {
        true => SocketAddr::new(host, address.port()).to_string(),
        false => address.to_string(),
    };
    let advertised = match options.advertise.is_empty() {
        true => proxy_addresses.iter().map(guess).collect(),
        false => options.advertise.clone(),
    };

    let (stop, stopped) = watch::channel(false);
    let hub = Arc::new(Hub::default());
    let book = Book::new(store.list(Table::VirtualIps)?, store.list(Table::Pins)?);
    let state = State::new(hub.clone(), book, store.epoch(), store.revision());
    let control = Arc::new(Control {
        started: clock.unix(),
        clock,
        authority,
        door,
        state,
        hub,
        fleet: Arc::default(),
        telemetry: Telemetry::default(),
        guesses: Guesses::default(),
        refusals: Seldom::default(),
        directory,
        own_users: if options.own_users.is_empty() { own_users() } else { options.own_users.clone() },
        local_address: host,
        advertised,
        store,
        stopped: stopped.clone(),
        state_directory: options.state.clone(),
        trust_domain,
        rotating: tokio::sync::Mutex::default(),
        publishing: Mutex::default(),
        wanted_trust_domain: Mutex::default(),
    });
    control.reconfigure(compiled);
    control.fleet.load(&control)?;

    let mut tasks = JoinSet::new();
    let mut sockets = Vec::new();
    let acceptor = tokio_rustls::TlsAcceptor::from(tls);
    let (doorway, connections) = listen::doorway(acceptor, control.door.clone());
    for listener in listeners {
        until(&mut tasks, &stopped, "a listener", doorway.clone().accept_tls(listener));
    }
    if let Some(directory) = &options.sockets {
        let path = directory.join("control.sock");
        let listener = bind_unix(&path, 0o666)?;
        until(&mut tasks, &stopped, "control.sock", doorway.clone().accept_unix(listener));
        sockets.push(path);
    }
    let served = listen::serve(control.clone(), connections, stopping(stopped.clone()));
    tasks.spawn(async move {
        let reason = served.await.err().map_or_else(|| "stopped".to_owned(), |error| error.to_string());
        Error::Ended { part: "the proxies' server", reason }
    });
    let access = Arc::new(
        Access::open(&options.state).map_err(|source| Error::Io { path: options.state.join("api.token"), source })?,
    );
    let router = api::router(Api { control: control.clone(), access: access.clone() });
    let mut api_address = None;
    if let Some(address) = options.api_listen {
        if !address.ip().is_loopback() {
            return Err(Error::OpenApi { address });
        }
        let listener = bind(address).await?;
        let bound = listener.local_addr().map_err(|source| Error::Listen {
            address: address.to_string(),
            source,
            mend: "try again".to_owned(),
        })?;
        access.listens_at(bound);
        api_address = Some(bound);
        until(&mut tasks, &stopped, "the API", api::accept_tcp(listener, router.clone()));
    }
    if let Some(directory) = &options.sockets {
        let path = directory.join("api.sock");
        let listener = bind_unix(&path, 0o600)?;
        until(&mut tasks, &stopped, "api.sock", api::accept_unix(listener, router));
        sockets.push(path);
    }
    let (follower, applied) = (control.directory.clone(), control.clone());
    until(&mut tasks, &stopped, "the configuration watch", follower.follow(move |it| applied.reconfigure(it)));
    until(&mut tasks, &stopped, "housekeeping", control.clone().keep_house());
    Ok(ControlPlane { control, tasks, stop, doorway, proxy_addresses, api_address, access, sockets })
}

/// Makes a join token for a control plane that does not run. The request must name its addresses.
///
/// # Errors
/// When it does run, when the request is malformed or wider than is allowed, or when the state cannot be written.
pub fn create_token(state: &Path, config: &Path, request: &TokenRequest) -> Result<TokenView, Error> {
    let clock = Clock::default();
    let store = Store::open(state)?;
    let compiled = Directory::keeping(config, Some(state.join(KEPT))).load().unwrap_or_default();
    let trust = Trust::open_now(&store, state, clock.unix())?;
    let authority = Authority::open(state, &compiled.mesh.trust_domain, clock.clone(), &trust)?;
    if request.control.is_empty() {
        let what = "name the control plane's address, since it does not run: --advertise HOST:PORT".to_owned();
        return Err(TokenRefused::Malformed(what).into());
    }
    let root = authority.pin();
    let (view, record) = make_token(request, &compiled, root, request.control.clone(), clock.unix())?;
    let id = view.id.clone();
    store.write_now::<_, StoreError>(move |transaction| record.store(transaction, &id))?;
    Ok(view)
}

/// Runs a task until it is told to stop.
fn until(
    tasks: &mut JoinSet<Error>,
    stopped: &watch::Receiver<bool>,
    part: &'static str,
    task: impl Future<Output = ()> + Send + 'static,
) {
    let stopped = stopping(stopped.clone());
    tasks.spawn(async move {
        // Both arms may be dropped: tasks keep what must last in the store.
        tokio::select! {
            () = task => Error::Ended { part, reason: "it returned".to_owned() },
            () = stopped => Error::Ended { part, reason: "stopped".to_owned() },
        }
    });
}

async fn stopping(mut stopped: watch::Receiver<bool>) {
    // A dropped sender means the same.
    let _ = stopped.wait_for(|stop| *stop).await;
}

async fn bind(address: SocketAddr) -> Result<TcpListener, Error> {
    TcpListener::bind(address).await.map_err(|source| Error::Listen {
        address: address.to_string(),
        mend: match source.kind() {
            io::ErrorKind::AddrInUse => "another process has the port: stop it, or choose another, or port 0",
            io::ErrorKind::PermissionDenied => "ports below 1024 need root: choose a higher one",
            io::ErrorKind::AddrNotAvailable => "this host has no such address",
            _ => "choose another address",
        }
        .to_owned(),
        source,
    })
}

/// Binds a unix socket; one that a killed control plane left is replaced.
fn bind_unix(path: &Path, mode: u32) -> Result<UnixListener, Error> {
    let listen = |source| Error::Listen {
        address: path.display().to_string(),
        source,
        mend: "its directory must exist and belong to this user".to_owned(),
    };
    // The state's lock is held: no other control plane of this state lives, so the socket is nobody's.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(listen(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(listen)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(listen)?;
    Ok(listener)
}

/// The address that others know this host by: the source of its default route. Nothing is sent.
fn primary_address() -> IpAddr {
    let ask = |bind: &str, to: &str| -> io::Result<IpAddr> {
        let socket = UdpSocket::bind(bind)?;
        socket.connect(to)?;
        Ok(socket.local_addr()?.ip())
    };
    // Documentation addresses (RFC 5737, RFC 3849): routed like any other, used by nobody.
    ask("0.0.0.0:0", "192.0.2.1:9")
        .or_else(|_| ask("[::]:0", "[2001:db8::1]:9"))
        .unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
}

fn own_users() -> Vec<u32> {
    let own = nix::unistd::geteuid();
    let mut users = vec![own.as_raw()];
    if own.is_root() {
        // Where there is root, proxies run as a user of their own.
        users.push(PROXY_USER);
        if let Ok(Some(user)) = nix::unistd::User::from_name("sheer") {
            users.push(user.uid.as_raw());
        }
    }
    users
}

impl ControlPlane {
    /// Where proxies connect, as bound.
    pub fn proxy_addresses(&self) -> &[SocketAddr] {
        &self.proxy_addresses
    }

    /// The first of them.
    pub fn proxy_address(&self) -> Option<SocketAddr> {
        self.proxy_addresses.first().copied()
    }

    /// Where the API listens on TCP, as bound.
    pub fn api_address(&self) -> Option<SocketAddr> {
        self.api_address
    }

    /// The file with the API's bearer token, mode 0600.
    pub fn api_token_file(&self) -> &Path {
        self.access.token_file()
    }

    /// A link for a browser, valid once and for 60 seconds; none without a TCP address.
    pub fn link(&self) -> Option<String> {
        self.access.link()
    }

    /// Takes a proxy's connection that was accepted elsewhere, as one to the proxies' port: speaks TLS on it first.
    pub fn take<S: Line + 'static>(&self, stream: S, address: SocketAddr) -> impl Future<Output = ()> + use<S> {
        let doorway = self.doorway.clone();
        async move { doorway.take_tls(stream, address).await }
    }

    /// Takes a connection that was accepted elsewhere, as one of this user of this host to the unix socket.
    pub fn take_local<S: Line + 'static>(&self, stream: S, uid: u32) -> impl Future<Output = ()> + use<S> {
        let doorway = self.doorway.clone();
        async move { doorway.take_local(stream, uid).await }
    }

    /// What its parts share.
    pub fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// Waits until a part fails. Cancel safe.
    pub async fn failed(&mut self) -> Error {
        match self.tasks.join_next().await {
            Some(Ok(error)) => error,
            Some(Err(error)) => Error::Ended { part: "a task", reason: error.to_string() },
            None => Error::Ended { part: "the control plane", reason: "nothing is left of it".to_owned() },
        }
    }

    /// Stops: streams end, so that proxies turn to another control plane; the state is on disk.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        // A connection in the middle of something keeps a graceful end waiting; proxies lose nothing when it is cut.
        if tokio::time::timeout(Duration::from_secs(1), ended).await.is_err() {
            self.tasks.shutdown().await;
        }
        for socket in &self.sockets {
            let _ = std::fs::remove_file(socket);
        }
    }
}

impl Control {
    /// Ends when the control plane stops.
    async fn stopping(&self) {
        stopping(self.stopped.clone()).await;
    }

    /// Puts a configuration into force.
    fn reconfigure(&self, mut compiled: Compiled) {
        // Every identity in use is of the domain that this process began with.
        let other = compiled.mesh.trust_domain != self.trust_domain;
        let wanted = std::mem::replace(&mut compiled.mesh.trust_domain, self.trust_domain.clone());
        *self.wanted_trust_domain.lock() = other.then_some(wanted);
        self.door.grace_s.store(compiled.mesh.renewal_grace.as_secs(), Ordering::Relaxed);
        let assigned = self.state.reconfigure(Arc::new(compiled));
        self.keep_addresses(assigned);
        self.publish_trust();
    }

    /// Where proxies elsewhere reach this control plane.
    pub fn advertised(&self) -> &[String] {
        &self.advertised
    }

    /// A backup of everything, consistent as of now. It holds the root's key.
    ///
    /// # Errors
    /// When something cannot be read.
    pub async fn backup(&self) -> Result<Vec<u8>, BackupError> {
        // What is queued is written first. A full disk is a reason to take a backup to another one.
        if let Err(error) = self.store.write::<_, StoreError>(|_| Ok(())).await {
            tracing::warn!(%error, "the backup holds what was written before");
        }
        let config = match self.directory.read() {
            Ok(sources) => sources,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(source) => return Err(BackupError::Io { path: self.directory.path().to_owned(), source }),
        };
        backup::take(&self.store, &self.state_directory, config, self.clock.unix())
    }

    /// Changes documents of the directory and brings the result into force before it returns.
    fn change_documents(
        &self,
        change: impl FnOnce(&Path, &[Source], &BTreeSet<String>) -> Result<Applied, documents::Refusal>,
    ) -> Result<Applied, documents::Refusal> {
        let sources = self.directory.read().unwrap_or_default();
        let applied = change(self.directory.path(), &sources, &self.named_services())?;
        self.directory.refresh(&|compiled| self.reconfigure(compiled));
        Ok(applied)
    }

    /// Services that are written or that a workload names.
    fn named_services(&self) -> BTreeSet<String> {
        let named = self.state.look(|compiled, fleet, _| sheer_core::compile::service_names(compiled, fleet));
        named.iter().map(ToString::to_string).collect()
    }

    /// How the configuration directory is doing.
    pub fn configuration(&self) -> source::directory::Status {
        self.directory.status()
    }

    /// All workloads, for people.
    pub fn workloads(&self) -> Vec<WorkloadView> {
        self.fleet.views(self)
    }

    /// Makes a join token.
    ///
    /// # Errors
    /// When the request is malformed or wider than is allowed, or the store fails.
    pub async fn create_token(&self, request: &TokenRequest) -> Result<TokenView, TokenRefused> {
        let addresses = if request.control.is_empty() { self.advertised.clone() } else { request.control.clone() };
        if addresses.is_empty() {
            let mend = "start the control plane with --proxy-listen";
            return Err(TokenRefused::Malformed(format!("no proxy can connect from elsewhere: {mend}")));
        }
        let root = self.authority.pin();
        let (view, record) = make_token(request, &self.state.compiled(), root, addresses, self.clock.unix())?;
        let id = view.id.clone();
        self.store.write::<_, StoreError>(move |transaction| record.store(transaction, &id)).await?;
        Ok(view)
    }

    /// Stores virtual addresses that were just given.
    fn keep_addresses(&self, assigned: Assigned) {
        if assigned.is_empty() {
            return;
        }
        self.store.write_later(move |transaction| {
            assigned.iter().try_for_each(|(service, addresses)| {
                transaction.put(Table::VirtualIps, &service.to_string(), addresses)
            })
        });
    }

    /// Pins services that nobody claimed before to the workload's service account, durably, before it answers for them.
    async fn pin_unclaimed(&self, workload: &Registered) -> Result<(), StoreError> {
        for service in self.state.unpinned(workload) {
            let account = workload.identity.service_account().to_string();
            let accounts = self.pin_if_unclaimed(&service, account).await?;
            let accounts = accounts.iter().filter_map(|it| sheer_core::name::DnsLabel::parse(it).ok()).collect();
            self.state.pin(&service, accounts);
        }
        Ok(())
    }

    async fn pin_if_unclaimed(&self, service: &ServiceName, account: String) -> Result<Vec<String>, StoreError> {
        let (key, log) = (service.to_string(), service.to_string());
        let accounts = self
            .store
            .write(move |transaction| {
                if let Some(pinned) = transaction.read::<Vec<String>>(Table::Pins, &key)? {
                    return Ok::<_, StoreError>(pinned);
                }
                let accounts = vec![account];
                transaction.put(Table::Pins, &key, &accounts)?;
                Ok(accounts)
            })
            .await?;
        tracing::info!(service = %log, ?accounts, "service accounts pinned");
        Ok(accounts)
    }

    /// What time alone brings about.
    async fn keep_house(self: Arc<Self>) {
        let mut second = tokio::time::interval(Duration::from_secs(1));
        second.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut ticks = 0_u64;
        loop {
            second.tick().await;
            ticks += 1;
            self.fleet.tend(&self);
            self.tend_roots().await;
            if ticks.is_multiple_of(60) {
                self.telemetry.tend(&self.clock);
                self.fleet.forget_certificates(&self, self.state.compiled().mesh.renewal_grace);
                if let Err(error) = self.authority.rotate() {
                    tracing::error!(%error, "the issuing certificate could not be renewed");
                }
                if let Err(error) = attest::forget_tokens(&self.store, &self.clock).await {
                    tracing::warn!(%error, "ended join tokens could not be removed");
                }
            }
        }
    }
}

//! `sheer.v1.Fleet/Attach`: which workloads there are, where, and how well.
//!
//! A closed connection is a dead process: its workload is picked last at once and leaves after a second, unless it
//! registers again. A silent connection is not: its workload is *suspect*, picked last, and leaves only when a peer
//! cannot reach it either, and never more than a fifth of a service that way. Registrations are stored; after a start
//! they hold for a minute, so that a restart of the control plane takes nobody's endpoints away.

mod following;

use crate::Control;
use crate::attest::{Attested, Origin, Peer};
use crate::registration::{Refusal, Stored, grant};
use crate::rotation::InForce;
use crate::store::{StoreError, Table};
use crate::tls::Certificate;
use parking_lot::Mutex;
use sheer_core::api::{PortView, RefusedView, WorkloadState, WorkloadView};
use sheer_core::compile::{Registered, warnings_for};
use sheer_core::identity::SpiffeId;
use sheer_core::name::{DnsLabel, ServiceName};
use sheer_core::wire::v1::edge::Side;
use sheer_core::wire::v1::{
    ControlNotice, Health, Mode, Pace, ProxyReport, Registration, RegistrationRefused, control_notice, proxy_report,
};
use sheer_core::wire::{PUSHBACK, SERVING};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
pub(crate) mod service {
    tonic::include_proto!("sheer.v1.Fleet");
}

/// How long a closed connection's workload may take to register again.
const RETURN: Duration = Duration::from_secs(1);
/// How long stored registrations hold after a start.
const HOLD: Duration = Duration::from_secs(60);
/// How long a workload that left is remembered, so that its service is found empty rather than unknown.
const REMEMBER: Duration = Duration::from_secs(60);
/// How long a peer's report of an unreachable workload counts.
const REPORT: Duration = Duration::from_secs(30);
/// How long a stream may take to register.
const FIRST_REPORT: Duration = Duration::from_secs(10);
/// How long a connection may outlive its streams when it is given up.
const LET_GO: Duration = Duration::from_millis(100);
/// Notices that wait for a proxy: one a registration.
const NOTICES: usize = 8;
/// The time that each proxy's return takes of the control plane, on a small machine: certificates, a registration, and
/// what it is told. Their number times this is the time over which they are asked to come back.
const RETURN_EACH_MS: u32 = 35;
/// So many come back at once, however many there are.
const RETURN_AT_ONCE: usize = 16;
/// The shortest and the longest time over which proxies come back; a few are no herd.
const RETURN_MS: std::ops::RangeInclusive<u32> = 500..=10_000;
/// Resources remembered as refused, for each workload.
const MAX_REFUSED: usize = 100;

/// The uid of a workload on a host.
pub fn uid_of(namespace: &DnsLabel, name: &DnsLabel) -> String {
    format!("local/host/{namespace}/{name}")
}

/// All workloads that registered.
#[derive(Default)]
pub struct Fleet {
    members: Mutex<BTreeMap<String, Member>>,
    certificates: Mutex<HashMap<String, Attested>>,
    sessions: AtomicU64,
    /// In what time the proxies should come back after a loss; brought up to date every second.
    return_within_ms: AtomicU32,
    herd: OnceLock<Herd>,
}

/// Proxies that served when this control plane started, and come back to it. Those that notice its return at the same
/// moment are let in one by one; they lose nothing meanwhile, since what is stored of them holds.
#[derive(Debug)]
struct Herd {
    began: Instant,
    within_ms: u32,
    workloads: usize,
    let_in: AtomicUsize,
}

impl Herd {
    /// In how many milliseconds a proxy that comes after this time is to come again; 0: now.
    fn turn(&self, elapsed: Duration) -> u32 {
        let elapsed_ms = u32::try_from(elapsed.as_millis()).unwrap_or(u32::MAX);
        let left_ms = self.within_ms.saturating_sub(elapsed_ms);
        let due = self.workloads * (self.within_ms - left_ms) as usize / self.within_ms.max(1) as usize;
        let comes_in = |let_in: usize| (let_in < RETURN_AT_ONCE + due).then_some(let_in + 1);
        if left_ms == 0 || self.let_in.fetch_update(Ordering::Relaxed, Ordering::Relaxed, comes_in).is_ok() {
            return 0;
        }
        rand::random_range(1..=left_ms)
    }
}

struct Member {
    stored: Stored,
    identity: SpiffeId,
    session: u64,
    phase: Phase,
    since: Instant,
    draining: bool,
    /// Left by suspicion.
    removed: bool,
    /// Who could not reach it, and when.
    reports: HashMap<String, Instant>,
    warnings: Vec<String>,
    refused: Vec<RefusedView>,
    /// What its proxy works with, as it said on its present stream.
    in_force: Option<InForce>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Its stream is open.
    Connected,
    /// Stored before the start, not heard of since.
    Held,
    /// Its connection went silent.
    Silent,
    /// Its connection closed less than a second ago.
    Closed,
    /// It left.
    Gone,
}

impl Member {
    fn registered(&self, uid: &str) -> Option<Registered> {
        let health = match self.phase {
            _ if self.draining => Health::Draining,
            Phase::Silent | Phase::Closed => Health::Suspect,
            Phase::Connected | Phase::Held | Phase::Gone => Health::Healthy,
        };
        let mut registered = self.stored.registered(uid, &self.identity, health)?;
        if self.removed || self.phase == Phase::Gone {
            registered.ports.iter_mut().for_each(|port| port.ready = false);
        }
        Some(registered)
    }

    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.since = Instant::now();
    }
}

impl Fleet {
    /// Loads what is stored; it holds for a minute.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn load(&self, control: &Control) -> Result<(), StoreError> {
        let certificates = control.store.list::<Attested>(Table::Certificates)?;
        *self.certificates.lock() = certificates.into_iter().collect();
        for (uid, stored) in control.store.list::<Stored>(Table::Registrations)? {
            let Ok(identity) = SpiffeId::parse(&stored.identity) else { continue };
            let member = Member {
                stored,
                identity,
                session: 0,
                phase: Phase::Held,
                since: Instant::now(),
                draining: false,
                removed: false,
                reports: HashMap::new(),
                warnings: Vec::new(),
                refused: Vec::new(),
                in_force: None,
            };
            if let Some(registered) = member.registered(&uid) {
                control.keep_addresses(control.state.upsert(registered));
            }
            self.members.lock().insert(uid, member);
        }
        let workloads = self.members.lock().len();
        self.set_pace(workloads);
        let _ = self.herd.set(Herd {
            began: Instant::now(),
            within_ms: return_within_ms(workloads),
            workloads,
            let_in: AtomicUsize::new(0),
        });
        Ok(())
    }

    /// Lets a proxy in, or asks one that serves anyway to come a little later, because many come back at once.
    ///
    /// # Errors
    /// With when to come.
    pub fn take_turn<T>(&self, peer: &Peer, request: &Request<T>) -> Result<(), Status> {
        let Some(herd) = self.herd.get().filter(|_| request.metadata().contains_key(SERVING)) else { return Ok(()) };
        let later_ms = *peer.line.later_ms.get_or_init(|| herd.turn(herd.began.elapsed()));
        if later_ms == 0 {
            return Ok(());
        }
        let mut status = Status::unavailable("many proxies come back at once, this one is to come in a moment");
        status.metadata_mut().insert(PUSHBACK, later_ms.into());
        Err(status)
    }

    fn set_pace(&self, workloads: usize) {
        self.return_within_ms.store(return_within_ms(workloads), Ordering::Relaxed);
    }

    /// The identity that has a workload's name, while it is registered.
    pub fn identity_of(&self, uid: &str) -> Option<SpiffeId> {
        let members = self.members.lock();
        members.get(uid).filter(|member| member.phase != Phase::Gone).map(|member| member.identity.clone())
    }

    /// Whether a workload's stream is open.
    pub fn is_connected(&self, uid: &str) -> bool {
        self.members.lock().get(uid).is_some_and(|member| member.phase == Phase::Connected)
    }

    /// What was attested of a workload.
    pub fn attested(&self, uid: &str) -> Option<Attested> {
        self.certificates.lock().get(uid).cloned()
    }

    /// What was attested of an identity under any name: with this key where it is on record, otherwise where an
    /// Enrollment limits it.
    pub fn attested_as(&self, identity: &SpiffeId, key_sha256: &str) -> Option<Attested> {
        let identity = identity.to_string();
        let certificates = self.certificates.lock();
        let of_identity = certificates.values().filter(|it| it.identity == identity);
        let found = of_identity.max_by_key(|it| (it.key_sha256 == key_sha256, it.enrollment.is_some()))?;
        // The user of the other name's proxy does not speak for this one.
        Some(Attested { uid: None, ..found.clone() })
    }

    /// Notes an issued certificate.
    pub fn note_certificate(&self, uid: &str, attested: Attested) {
        self.certificates.lock().insert(uid.to_owned(), attested);
    }

    /// Notes what a workload's proxy refused in its answer to one response of a type.
    pub fn note_refused(&self, uid: &str, type_url: &str, refused: Vec<RefusedView>) {
        let mut members = self.members.lock();
        let Some(member) = members.get_mut(uid) else { return };
        for refusal in &refused {
            let (name, reason, place) = (&refusal.name, &refusal.reason, &refusal.place);
            tracing::warn!(%uid, %type_url, %name, %reason, %place, "a proxy refused a resource");
        }
        // What it did not refuse this time it has applied.
        member.refused.retain(|it| it.type_url != type_url);
        member.refused.extend(refused);
        member.refused.truncate(MAX_REFUSED);
    }

    /// Workloads with an open stream.
    pub fn connected(&self) -> usize {
        self.members.lock().values().filter(|member| member.phase == Phase::Connected).count()
    }

    /// All workloads, for people.
    pub fn views(&self, control: &Control) -> Vec<WorkloadView> {
        let members = self.members.lock();
        let certificates = self.certificates.lock();
        let views = members.iter().filter(|(_, member)| member.phase != Phase::Gone);
        views
            .filter_map(|(uid, member)| {
                let registered = member.registered(uid)?;
                let granted = sheer_core::compile::workload_of(&control.state.compiled(), &registered);
                let now = control.clock.unix();
                let quiet = i64::try_from(member.since.elapsed().as_secs()).unwrap_or(i64::MAX);
                Some(WorkloadView {
                    uid: uid.clone(),
                    namespace: member.stored.namespace.clone(),
                    name: member.stored.name.clone(),
                    identity: member.identity.to_string(),
                    services: granted.services,
                    labels: member.stored.labels.clone(),
                    address: member.stored.address.to_string(),
                    network: member.stored.network.clone(),
                    locality: member.stored.locality.clone(),
                    ports: registered.ports.iter().map(port_view).collect(),
                    mode: mode_name(granted.mode).to_owned(),
                    capture: member.stored.capture.clone(),
                    version: member.stored.version.clone(),
                    host: member.stored.host.clone(),
                    state: match member.phase {
                        _ if member.draining => WorkloadState::Draining,
                        Phase::Connected => WorkloadState::Connected,
                        Phase::Held => WorkloadState::Held,
                        Phase::Silent => WorkloadState::Suspect,
                        Phase::Closed | Phase::Gone => WorkloadState::Leaving,
                    },
                    last_seen: if member.phase == Phase::Connected { now } else { now - quiet },
                    certificate_expires: certificates.get(uid).map_or(0, |it| it.not_after),
                    exceptions: granted.exceptions.iter().map(exception_line).collect(),
                    refused: member.refused.clone(),
                    warnings: member.warnings.clone(),
                })
            })
            .collect()
    }

    async fn register(
        &self,
        control: &Arc<Control>,
        peer: &Peer,
        registration: sheer_core::wire::v1::Registration,
        session: u64,
    ) -> Result<(String, Vec<String>), Refusal> {
        let stored = grant(control, peer, &registration)?;
        let uid = stored.uid()?;
        let identity = SpiffeId::parse(&stored.identity).map_err(|_| Refusal::internal("no identity"))?;
        if let Some(owner) = self.identity_of(&uid).filter(|owner| *owner != identity) {
            return Err(Refusal {
                reason: format!("the workload name is taken: {uid} is registered as {owner}"),
                mend: "choose another --name".to_owned(),
            });
        }
        let registered = stored
            .registered(&uid, &identity, Health::Healthy)
            .ok_or_else(|| Refusal::internal("the registration cannot be read back"))?;
        control.pin_unclaimed(&registered).await.map_err(|error| Refusal {
            reason: error.to_string(),
            mend: "mend the control plane's state directory; the proxy tries again".to_owned(),
        })?;
        let warnings = control.state.look(|compiled, _, book| warnings_for(compiled, book, &registered));
        let before = {
            let mut members = self.members.lock();
            let refused = members.get(&uid).map(|member| member.refused.clone()).unwrap_or_default();
            // Under the lock, so that publications keep the order of the changes.
            control.keep_addresses(control.state.upsert(registered));
            members.insert(
                uid.clone(),
                Member {
                    stored: stored.clone(),
                    identity,
                    session,
                    phase: Phase::Connected,
                    since: Instant::now(),
                    draining: false,
                    removed: false,
                    reports: HashMap::new(),
                    warnings: warnings.clone(),
                    refused,
                    in_force: None,
                },
            )
        };
        self.note_here(control, &uid);
        if before.is_none_or(|before| before.stored != stored) {
            store_later(control, &uid, stored);
        }
        Ok((uid, warnings))
    }

    /// Changes a member of this session and publishes what follows from it.
    fn change(&self, control: &Control, uid: &str, session: u64, change: impl FnOnce(&mut Member)) {
        let mut members = self.members.lock();
        let Some(member) = members.get_mut(uid).filter(|member| member.session == session) else { return };
        change(member);
        if let Some(registered) = member.registered(uid) {
            // Under the lock, so that publications keep the order of the changes.
            control.keep_addresses(control.state.upsert(registered));
        }
    }

    fn health(&self, control: &Control, uid: &str, session: u64, ready: &[u32]) {
        let mut store = None;
        self.change(control, uid, session, |member| {
            for port in &mut member.stored.ports {
                port.ready = ready.contains(&u32::from(port.port));
            }
            store = Some(member.stored.clone());
        });
        if let Some(stored) = store {
            store_later(control, uid, stored);
        }
    }

    /// The stream has ended.
    fn ended(self: &Arc<Self>, control: &Arc<Control>, uid: &str, session: u64, closed: bool) {
        let mut phase = Phase::Gone;
        self.change(control, uid, session, |member| {
            if member.phase == Phase::Connected {
                member.enter(if closed { Phase::Closed } else { Phase::Silent });
            }
            phase = member.phase;
        });
        tracing::info!(%uid, closed, "a proxy's stream ended");
        match phase {
            Phase::Closed => {
                let (fleet, control, uid) = (self.clone(), control.clone(), uid.to_owned());
                tokio::spawn(async move {
                    tokio::time::sleep(RETURN).await;
                    let mut left = false;
                    fleet.change(&control, &uid, session, |member| {
                        if member.phase == Phase::Closed {
                            member.enter(Phase::Gone);
                            left = true;
                        }
                    });
                    if left {
                        fleet.note_left(&control, &uid);
                    }
                });
            }
            Phase::Silent => self.judge(control, uid),
            Phase::Connected | Phase::Held | Phase::Gone => {}
        }
    }

    fn goodbye(&self, control: &Control, uid: &str, session: u64, reason: &str) {
        if self.members.lock().get(uid).is_some_and(|member| member.session != session) {
            // Another proxy has taken the place of this one.
            return;
        }
        tracing::info!(%uid, reason = %reason.escape_default(), "a workload left");
        self.change(control, uid, session, |member| member.enter(Phase::Gone));
        control.telemetry.left(uid);
        self.note_left(control, uid);
        let key = uid.to_owned();
        control.store.write_later(move |transaction| transaction.remove(Table::Registrations, &key));
    }

    fn unreachable(&self, control: &Control, reporter: &str, uid: &str) {
        {
            let mut members = self.members.lock();
            let Some(member) = members.get_mut(uid) else { return };
            member.reports.retain(|_, at| at.elapsed() < REPORT);
            if reporter == uid || member.reports.len() >= 100 {
                return;
            }
            member.reports.insert(reporter.to_owned(), Instant::now());
        }
        self.judge(control, uid);
    }

    /// Removes a silent workload that a peer cannot reach either, unless too much of a service has left that way.
    fn judge(&self, control: &Control, uid: &str) {
        let services: Vec<Vec<String>> = control.state.look(|compiled, fleet, _| {
            let Some(registered) = fleet.workload(uid) else { return Vec::new() };
            let services = sheer_core::compile::workload_of(compiled, registered).services;
            let names = services.iter().filter_map(|name| ServiceName::parse(name).ok());
            names.map(|name| fleet.members(&name).map(|member| member.uid.clone()).collect()).collect()
        });
        let mut members = self.members.lock();
        let doubted = members.get(uid).is_some_and(|member| {
            matches!(member.phase, Phase::Silent | Phase::Held)
                && !member.removed
                && member.reports.values().any(|at| at.elapsed() < REPORT)
        });
        let within = |uids: &Vec<String>| {
            let here = uids.iter().filter_map(|uid| members.get(uid)).filter(|member| member.phase != Phase::Gone);
            let (total, removed) =
                here.fold((0, 0), |(total, removed), member| (total + 1, removed + usize::from(member.removed)));
            removed_by_suspicion_is_bounded(total, removed)
        };
        if !doubted || !services.iter().all(within) {
            return;
        }
        tracing::warn!(%uid, "a silent workload that a peer cannot reach leaves its services");
        if let Some(member) = members.get_mut(uid) {
            member.removed = true;
            if let Some(registered) = member.registered(uid) {
                control.keep_addresses(control.state.upsert(registered));
            }
        }
    }

    /// Forgets certificates that ended too long ago to be renewed, of workloads that are not registered.
    pub fn forget_certificates(&self, control: &Control, grace: Duration) {
        let grace = i64::try_from(grace.as_secs()).unwrap_or(i64::MAX);
        let now = control.clock.unix();
        let mut forgotten = Vec::new();
        {
            let members = self.members.lock();
            self.certificates.lock().retain(|uid, it| {
                let keep = members.contains_key(uid) || now <= it.not_after.saturating_add(grace);
                if !keep {
                    forgotten.push(uid.clone());
                }
                keep
            });
        }
        if !forgotten.is_empty() {
            control.store.write_later(move |transaction| {
                forgotten.iter().try_for_each(|uid| transaction.remove(Table::Certificates, uid))
            });
        }
    }

    /// Stores all that is held anew, after something could not be written.
    fn store_again(&self, control: &Control) {
        let stored: Vec<(String, Option<Stored>)> = {
            let members = self.members.lock();
            let kept = |member: &Member| (member.phase != Phase::Gone).then(|| member.stored.clone());
            members.iter().map(|(uid, member)| (uid.clone(), kept(member))).collect()
        };
        let addresses = control.state.look(|_, _, book| book.assigned());
        control.store.write_later(move |transaction| {
            for (uid, stored) in &stored {
                match stored {
                    Some(stored) => transaction.put(Table::Registrations, uid, stored)?,
                    None => transaction.remove(Table::Registrations, uid)?,
                }
            }
            addresses.iter().try_for_each(|(service, addresses)| {
                transaction.put(Table::VirtualIps, &service.to_string(), addresses)
            })
        });
    }

    /// What time alone decides: called every second.
    pub fn tend(&self, control: &Control) {
        if control.store.take_lost() {
            self.store_again(control);
        }
        let mut forgotten = Vec::new();
        {
            let mut members = self.members.lock();
            let certificates = self.certificates.lock();
            let now = control.clock.unix();
            for (uid, member) in members.iter_mut() {
                let certified = certificates.get(uid).is_some_and(|it| now < it.not_after);
                match member.phase {
                    Phase::Held if member.since.elapsed() >= HOLD => member.enter(Phase::Gone),
                    // Without a certificate it could not serve if it came back.
                    Phase::Silent if !certified => member.enter(Phase::Gone),
                    Phase::Gone if member.since.elapsed() >= REMEMBER => {
                        forgotten.push(uid.clone());
                        continue;
                    }
                    Phase::Connected | Phase::Held | Phase::Silent | Phase::Closed | Phase::Gone => continue,
                }
                if let Some(registered) = member.registered(uid) {
                    control.keep_addresses(control.state.upsert(registered));
                }
            }
            for uid in &forgotten {
                members.remove(uid);
            }
            self.set_pace(members.len());
        }
        for uid in forgotten {
            control.telemetry.left(&uid);
            control.state.remove(&uid);
            control.store.write_later(move |transaction| transaction.remove(Table::Registrations, &uid));
        }
    }
}

/// Whether one more of `total` may leave by suspicion when `removed` have: at most a fifth, but one of two or more.
fn removed_by_suspicion_is_bounded(total: usize, removed: usize) -> bool {
    total > 1 && removed < (total / 5).max(1)
}

/// The time over which this many proxies should come back. In steps of a factor of two, so that it is seldom told anew.
fn return_within_ms(workloads: usize) -> u32 {
    let rounded = u32::try_from(workloads).ok().and_then(u32::checked_next_power_of_two).unwrap_or(u32::MAX);
    rounded.saturating_mul(RETURN_EACH_MS).clamp(*RETURN_MS.start(), *RETURN_MS.end())
}

fn store_later(control: &Control, uid: &str, stored: Stored) {
    let uid = uid.to_owned();
    control.store.write_later(move |transaction| transaction.put(Table::Registrations, &uid, &stored));
}

fn port_view(port: &sheer_core::compile::RegisteredPort) -> PortView {
    PortView {
        port: port.port,
        name: port.name.clone(),
        protocol: crate::status::protocol_name(port.protocol).to_owned(),
        ready: port.ready,
        mesh_port: port.mesh_port,
    }
}

fn mode_name(mode: i32) -> &'static str {
    match Mode::try_from(mode) {
        Ok(Mode::Watch) => "watch",
        Ok(Mode::Permissive) => "permissive",
        Ok(Mode::Strict) => "strict",
        Ok(Mode::Unspecified) | Err(_) => "unspecified",
    }
}

fn exception_line(exception: &sheer_core::wire::v1::PlaintextException) -> String {
    let ports: Vec<String> = exception.ports.iter().map(u32::to_string).collect();
    let ports = if ports.is_empty() { "all ports".to_owned() } else { format!("port {}", ports.join(",")) };
    format!("{ports} from {}: {}", exception.cidrs.join(","), exception.reason)
}

/// Serves `sheer.v1.Fleet`.
pub struct FleetService {
    /// The control plane.
    pub control: Arc<Control>,
}

#[tonic::async_trait]
impl service::fleet_server::Fleet for FleetService {
    type AttachStream = ReceiverStream<Result<ControlNotice, Status>>;

    async fn attach(&self, request: Request<Streaming<ProxyReport>>) -> Result<Response<Self::AttachStream>, Status> {
        let peer = Peer::of(&request)?;
        self.control.admit(&peer)?;
        self.control.fleet.take_turn(&peer, &request)?;
        let (out, notices) = mpsc::channel(NOTICES);
        let session = self.control.fleet.sessions.fetch_add(1, Ordering::Relaxed) + 1;
        let attached = Attached { control: self.control.clone(), peer, session, out, uid: None, paced: 0 };
        tokio::spawn(attached.serve(request.into_inner()));
        Ok(Response::new(ReceiverStream::new(notices)))
    }
}

/// One proxy's stream.
struct Attached {
    control: Arc<Control>,
    peer: Peer,
    session: u64,
    out: mpsc::Sender<Result<ControlNotice, Status>>,
    uid: Option<String>,
    /// The pace that the proxy was last told.
    paced: u32,
}

impl Attached {
    async fn serve(mut self, mut reports: Streaming<ProxyReport>) {
        let closed = self.receive(&mut reports).await;
        if let Some(uid) = &self.uid {
            self.control.fleet.ended(&self.control, uid, self.session, closed);
        }
    }

    /// Until the stream ends; tells whether the other end closed it.
    async fn receive(&mut self, reports: &mut Streaming<ProxyReport>) -> bool {
        let (begun, control) = (Instant::now(), self.control.clone());
        let mut validity = tokio::time::interval(Duration::from_secs(1));
        loop {
            // A dropped `message` loses nothing: what was read of it stays in the stream's buffer.
            let report = tokio::select! {
                report = reports.message() => report,
                () = control.stopping() => {
                    let _ = self.out.send(Err(Status::unavailable("the control plane is stopping"))).await;
                    return false;
                }
                _ = validity.tick() => {
                    let late = self.uid.is_none() && begun.elapsed() > FIRST_REPORT;
                    if late {
                        let _ = self.out.send(Err(Status::deadline_exceeded("no registration came"))).await;
                        return true;
                    }
                    if let Err(status) = self.control.admit_still(&self.peer, self.uid.as_deref()) {
                        let _ = self.out.send(Err(status)).await;
                        return false;
                    }
                    self.tell_pace();
                    continue;
                }
            };
            match report {
                Ok(Some(ProxyReport { body: Some(body) })) => {
                    if let Err(status) = self.take(body).await {
                        let _ = self.out.send(Err(status)).await;
                        return true;
                    }
                }
                Ok(Some(ProxyReport { body: None })) => {}
                // A proxy ends or cancels its stream on a connection that goes on. One that went silent was given up by
                // this side, which ends its streams in the same way (tonic takes a cancelled request for one that has
                // ended), a moment before the connection itself.
                Ok(None) if self.peer.hung_up() => return true,
                Ok(None) => {
                    tokio::time::sleep(LET_GO).await;
                    return self.peer.hung_up() || !self.peer.given_up();
                }
                Err(_) => return self.peer.hung_up(),
            }
        }
    }

    /// A proxy that comes with the certificate of a control plane before this one asks for another by itself: that is no
    /// refusal, which somebody would have to mend.
    fn known(&self, registration: &Registration) -> Result<(), Status> {
        let names = DnsLabel::parse(&registration.namespace).ok().zip(DnsLabel::parse(&registration.name).ok());
        let uid = names.map(|(namespace, name)| uid_of(&namespace, &name));
        match uid.filter(|uid| self.control.fleet.attested(uid).is_none()) {
            Some(uid) => {
                tracing::info!(%uid, from = %self.peer.from(), "a proxy comes with a certificate of another time");
                Err(Status::unauthenticated("no certificate of this control plane is on record; ask for one first"))
            }
            None => Ok(()),
        }
    }

    /// Tells a registered proxy how to come back, when that has changed.
    fn tell_pace(&mut self) {
        let return_within_ms = self.control.fleet.return_within_ms.load(Ordering::Relaxed);
        if self.uid.is_none() || self.paced == return_within_ms {
            return;
        }
        let body = Some(control_notice::Body::Pace(Pace { return_within_ms }));
        // A proxy that does not read now hears it a second later.
        if self.out.try_send(Ok(ControlNotice { body })).is_ok() {
            self.paced = return_within_ms;
        }
    }

    async fn take(&mut self, body: proxy_report::Body) -> Result<(), Status> {
        let control = self.control.clone();
        let fleet = &control.fleet;
        if let proxy_report::Body::Registration(registration) = body {
            self.known(&registration)?;
            let answer = fleet.register(&control, &self.peer, registration, self.session).await;
            let body = match answer {
                Ok((uid, warnings)) => {
                    self.uid = Some(uid.clone());
                    control_notice::Body::Registered(sheer_core::wire::v1::Registered { uid, warnings })
                }
                Err(Refusal { reason, mend }) => {
                    tracing::warn!(from = %self.peer.from(), %reason, "a registration was refused");
                    control_notice::Body::Refused(RegistrationRefused { reason, mend })
                }
            };
            let notice = ControlNotice { body: Some(body) };
            self.out.send(Ok(notice)).await.map_err(|_| Status::cancelled("the stream has ended"))?;
            self.tell_pace();
            return Ok(());
        }
        let Some(uid) = &self.uid else {
            // Said beside every registration, also beside one that was refused.
            if let proxy_report::Body::Trust(_) = body {
                return Ok(());
            }
            return Err(Status::failed_precondition("the first report must be a registration"));
        };
        match body {
            proxy_report::Body::Registration(_) => {}
            proxy_report::Body::Health(health) => fleet.health(&control, uid, self.session, &health.ready),
            proxy_report::Body::Draining(_) => {
                fleet.change(&control, uid, self.session, |member| member.draining = true);
            }
            proxy_report::Body::Goodbye(goodbye) => fleet.goodbye(&control, uid, self.session, &goodbye.reason),
            proxy_report::Body::Telemetry(mut telemetry) => {
                // A workload tells of its own traffic: it calls, or it is called.
                let namespace = self.control.namespace_of(&self.peer, Some(uid));
                telemetry.edges.retain(|edge| {
                    let own = if edge.side() == Side::Outbound { &edge.source } else { &edge.destination };
                    own.split_once('/').is_some_and(|(of, _)| of == namespace)
                });
                control.telemetry.take(uid, telemetry, &control.clock);
            }
            proxy_report::Body::Unreachable(unreachable) => fleet.unreachable(&control, uid, &unreachable.workload),
            proxy_report::Body::Trust(trust) => fleet.note_in_force(uid, self.session, trust),
        }
        Ok(())
    }
}

impl Control {
    /// Whether a peer may do more than ask for a certificate.
    pub(crate) fn admit(&self, peer: &Peer) -> Result<(), Status> {
        match &peer.origin {
            Origin::Local { .. } => Ok(()),
            Origin::Remote { certificate: Some(certificate) } if !self.is_under_trusted_root(certificate) => {
                Err(Status::unauthenticated(
                    "the certificate is under a root that was replaced; renew it with Certify first",
                ))
            }
            Origin::Remote { certificate: Some(certificate) } if !certificate.expired(self.clock.unix()) => Ok(()),
            Origin::Remote { certificate: Some(_) } => {
                Err(Status::unauthenticated("the certificate has ended; renew it with Certify first"))
            }
            Origin::Remote { certificate: None } => {
                Err(Status::unauthenticated("a client certificate is needed; ask for one with Certify first"))
            }
        }
    }

    fn is_under_trusted_root(&self, certificate: &Certificate) -> bool {
        certificate.trusted && self.authority.is_trusted(certificate.root)
    }

    /// Whether an open stream may go on: its certificate has not ended and its root is trusted, or its workload has a
    /// newer one by now, for the same key.
    pub(crate) fn admit_still(&self, peer: &Peer, uid: Option<&str>) -> Result<(), Status> {
        self.admit(peer).or_else(|status| {
            let Origin::Remote { certificate: Some(certificate) } = &peer.origin else { return Err(status) };
            let newer = uid.and_then(|uid| self.fleet.attested(uid)).is_some_and(|it| {
                self.clock.unix() < it.not_after
                    && self.authority.is_trusted(it.root)
                    && it.key_sha256 == certificate.key_sha256
            });
            if newer { Ok(()) } else { Err(status) }
        })
    }

    /// Whether a peer may speak for a workload.
    pub(crate) fn speaks_for(&self, peer: &Peer, uid: &str) -> Result<(), Status> {
        let Some(attested) = self.fleet.attested(uid) else {
            return Err(Status::permission_denied(format!(
                "no certificate was issued for workload {}",
                uid.escape_default()
            )));
        };
        let speaks = match &peer.origin {
            Origin::Local { uid: user } => {
                attested.uid == Some(*user)
                    || attested.uid.is_some_and(|it| self.own_users.contains(&it) && self.own_users.contains(user))
            }
            Origin::Remote { certificate } => {
                certificate.as_ref().is_some_and(|it| it.id.to_string() == attested.identity)
            }
        };
        if speaks {
            return Ok(());
        }
        tracing::warn!(from = %peer.from(), %uid, "a peer claimed to be a workload that it is not");
        Err(Status::permission_denied("the peer may not speak for this workload"))
    }

    /// The namespace whose view a peer gets; empty when it is not known.
    pub(crate) fn namespace_of(&self, peer: &Peer, uid: Option<&str>) -> String {
        if let Origin::Remote { certificate: Some(certificate) } = &peer.origin {
            return certificate.id.namespace().to_string();
        }
        let attested = uid.and_then(|uid| self.fleet.attested(uid));
        let id = attested.and_then(|attested| SpiffeId::parse(&attested.identity).ok());
        id.map(|id| id.namespace().to_string()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_most_a_fifth_of_a_service_leaves_by_suspicion() {
        let leave = |total| (0..total).take_while(|removed| removed_by_suspicion_is_bounded(total, *removed)).count();
        assert_eq!([1, 2, 4, 9, 10, 100].map(leave), [0, 1, 1, 1, 2, 20]);
    }

    #[test]
    fn proxies_that_come_back_at_once_are_let_in_one_by_one() {
        let herd = Herd { began: Instant::now(), within_ms: 9000, workloads: 200, let_in: AtomicUsize::new(0) };
        let at = |ms| Duration::from_millis(ms);
        let mut later: Vec<u64> = (0..200).map(|_| herd.turn(at(0)).into()).filter(|ms| *ms > 0).collect();
        assert_eq!(later.len(), 200 - RETURN_AT_ONCE);
        later.sort_unstable();
        assert!(later[0] < 1000 && later[later.len() - 1] > 8000, "{later:?}");
        // Those come when they were told to, and hardly any has to come a third time.
        let again = later.iter().filter(|ms| herd.turn(at(**ms)) > 0).count();
        assert!(again < 40, "{again}");
        assert_eq!(herd.turn(at(9000)), 0);
        let few = Herd { within_ms: 500, workloads: 3, let_in: AtomicUsize::new(0), ..herd };
        assert!((0..3).all(|_| few.turn(at(0)) == 0));
    }

    #[test]
    fn a_few_come_back_soon_and_many_one_by_one() {
        assert_eq!(
            [0, 1, 8, 100, 200, 10_000, usize::MAX].map(return_within_ms),
            [500, 500, 500, 4480, 8960, 10_000, 10_000]
        );
    }
}

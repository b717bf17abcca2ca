//! The proxy's streams to a control plane: what it is told, and what it reports.
//!
//! One connection at a time, to the first control plane that answers, in the order in which they are named. While there
//! is none, everything goes on with what is held. After an established connection was lost one attempt follows at once: a
//! connection that broke alone is replaced before the control plane lets the workload go, which it does after a second.
//! When that attempt fails the control plane itself is away. Every further attempt then comes after a random time, which
//! grows with the fleet: the control plane has said over what time its proxies should come back, so that 200 of them come
//! one by one, and the three of a laptop at once. At the start attempts follow each other quickly.
//!
//! What a proxy finds on its disk when it starts may be of another control plane than the one that answers now. So it is
//! served only once that is known: its control plane cannot be reached, or has shown that it is still the same by its
//! roots. See `Readiness`.

mod demand;
mod discovery;
mod fleet;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod readiness;
mod view;

pub use demand::{Demand, Demands};
pub use fleet::{Leaving, Standing};
pub use view::Outputs;

use crate::control::{Address, DialError, Outside, dial};
use crate::identity::Held;
use crate::metrics::Metrics;
use crate::state::{CONFIGURATION, Configuration, Directory};
use demand::{Want, Wanted};
use discovery::Discovery;
use fleet::Fleet;
use prost::Message;
use rand::Rng;
use readiness::Readiness;
use sheer_core::name::DnsLabel;
use sheer_core::wire::{PUSHBACK, SERVING, v1};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tonic::Code;
use tonic::transport::Channel;
use view::View;

/// The longest time until the first attempt after an established connection was lost: long enough for a dying control
/// plane to have closed its door, too short for another one to be there. One that comes back later is met by the pauses
/// below, never by everybody at once.
const AT_ONCE: Duration = Duration::from_millis(50);

/// The longest pause before the second attempt, and how far it grows, where the control plane wants everybody back
/// sooner. An attempt costs next to nothing; a laptop's proxies are back within two seconds.
const AFTER_LOSS: Duration = Duration::from_millis(500);
const AFTER_LOSS_LAST: Duration = Duration::from_secs(2);

/// The longest pause that a control plane may ask for, and what holds when it said nothing.
const BETWEEN: Duration = Duration::from_secs(10);

/// The first pause before anything was ever established; it doubles up to [`STARTING_LAST`].
const STARTING_FIRST: Duration = Duration::from_millis(100);
const STARTING_LAST: Duration = Duration::from_secs(3);

/// A change is stored this long after it came, so that changes that come together are stored together, and not sooner
/// than [`SAVE_APART`] after the last time.
const SAVE_AFTER: Duration = Duration::from_millis(200);
const SAVE_APART: Duration = Duration::from_secs(2);

/// What could not be stored is tried again after this time.
const SAVE_AGAIN: Duration = Duration::from_secs(5);

const FOREIGN: &str = "the stored configuration is of another control plane than the certificate, and is not used";

/// What the synchronisation needs.
pub struct Setup {
    /// The namespace of the workload.
    pub namespace: DnsLabel,
    /// Control planes, in order of preference; those that the certificate's answer named come after them.
    pub control: Vec<Address>,
    /// The registration, without readiness of ports.
    pub registration: v1::Registration,
    /// The ports that are ready.
    pub ready_ports: watch::Receiver<BTreeSet<u16>>,
    /// How far the workload has come in leaving.
    pub leaving: watch::Receiver<Leaving>,
    /// The certificate.
    pub held: watch::Receiver<Option<Arc<Held>>>,
    /// Asks for a certificate at once, where the control plane does not know this one.
    pub renew: Arc<Notify>,
    /// What workers ask for.
    pub demands: Demands,
    /// Where the results go.
    pub outputs: Outputs,
    /// Where the last good configuration is kept.
    pub directory: Directory,
    /// How control planes are reached.
    pub outside: Arc<dyn Outside>,
}

/// The synchronisation. See the module.
pub struct Sync {
    control: Vec<Address>,
    held: watch::Receiver<Option<Arc<Held>>>,
    renew: Arc<Notify>,
    wants: mpsc::Receiver<Want>,
    view: View,
    waiters: Waiters,
    saver: Saver,
    fleet: Fleet,
    metrics: Arc<Metrics>,
    readiness: Readiness,
    outside: Arc<dyn Outside>,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum Lost {
    /// The control plane closed it.
    #[error("the control plane closed the stream")]
    Ended,
    /// It failed.
    #[error("{}", of_status(.0))]
    Failed(#[source] Box<tonic::Status>),
    /// What was on disk is not of this control plane, which is asked again without it.
    #[error("the stored configuration is of another control plane and is not used")]
    Another,
    /// It asks the proxy, which serves anyway, to come back in a while.
    #[error("the control plane asks to come back in {} ms", .0.as_millis())]
    Later(Duration),
}

/// What the control plane said; the code's own description only where it said nothing.
fn of_status(status: &tonic::Status) -> String {
    if status.message().is_empty() { status.code().to_string() } else { status.message().to_owned() }
}

impl From<tonic::Status> for Lost {
    fn from(status: tonic::Status) -> Self {
        let later_ms = status.metadata().get(PUSHBACK).and_then(|it| it.to_str().ok()?.parse().ok());
        match later_ms {
            Some(ms) => Lost::Later(Duration::from_millis(ms).min(BETWEEN)),
            None => Lost::Failed(Box::new(status)),
        }
    }
}

impl Lost {
    /// Whether the control plane does not accept who the proxy says it is.
    fn is_stranger(&self) -> bool {
        match self {
            Lost::Ended | Lost::Another | Lost::Later(_) => false,
            Lost::Failed(status) => matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied),
        }
    }
}

impl Sync {
    /// Takes the configuration from disk where there is one, and publishes it.
    pub fn new(setup: Setup) -> Self {
        let metrics = setup.outputs.metrics.clone();
        let mut view = View::new(setup.namespace, setup.outputs);
        let mut return_within_ms = 0;
        if let Some(configuration) = Configuration::load(&setup.directory) {
            let held = setup.held.borrow();
            let bundle = view::trust_of(&configuration.resources);
            if bundle.is_some_and(|bundle| held.as_ref().is_some_and(|held| !held.shares_root(&bundle))) {
                tracing::warn!("{FOREIGN}");
            } else {
                return_within_ms = configuration.return_within_ms;
                view.restore(configuration);
            }
        }
        let Demands { wants, unreachable } = setup.demands;
        let fleet = Fleet {
            registration: setup.registration,
            ready_ports: setup.ready_ports,
            unreachable,
            leaving: setup.leaving,
            standing: watch::channel(Standing::Unknown).0,
            pace: watch::channel(return_within_ms).0,
            held: setup.held.clone(),
            metrics: metrics.clone(),
        };
        Self {
            control: setup.control,
            held: setup.held,
            renew: setup.renew,
            wants,
            readiness: Readiness::new(view.is_ready()),
            view,
            waiters: Waiters::default(),
            saver: Saver::new(setup.directory, fleet.pace.subscribe(), fleet.leaving.clone()),
            fleet,
            metrics,
            outside: setup.outside,
        }
    }

    /// Whether the proxy has what it needs to serve, from the control plane or from disk.
    pub fn ready(&self) -> watch::Receiver<bool> {
        self.readiness.subscribe()
    }

    /// What the control plane said of the registration.
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.fleet.standing.subscribe()
    }

    /// Follows control planes until [`Leaving::Done`] was said, or cannot be.
    pub async fn run(mut self) {
        let mut failures: u32 = 0;
        // One that was told how to come back was established, if only before its restart.
        let mut established = *self.fleet.pace.borrow() > 0;
        let mut leaving = self.fleet.leaving.clone();
        loop {
            if *leaving.borrow() == Leaving::Replaced {
                break;
            }
            let Some(held) = self.certificate(&mut leaving).await else { break };
            self.drop_foreign(&held);
            let (reason, lost) = match self.connect(&held, &mut leaving).await {
                Some(Ok((address, channel))) => {
                    tracing::info!(%address, "connected to the control plane");
                    self.metrics.set_control_connected(true);
                    let end = self.attend(&address, channel, held.uid()).await;
                    self.metrics.set_control_connected(false);
                    self.saver.flush(&self.view).await;
                    let Err(lost) = end else { break };
                    if *leaving.borrow() == Leaving::Replaced {
                        // It would register in the place of the proxy that serves now.
                        break;
                    }
                    // One that never spoke is no established connection.
                    let spoke = *self.fleet.standing.borrow() != Standing::Unknown;
                    let lost_after = match &lost {
                        Lost::Later(later) => After::Asked(*later),
                        Lost::Another => {
                            self.view.clear();
                            self.readiness.doubt();
                            After::Nothing
                        }
                        lost if lost.is_stranger() => {
                            self.renew.notify_one();
                            self.readiness.doubt();
                            After::Refusal
                        }
                        _ if spoke => After::Connection,
                        _ => {
                            self.readiness.settle(self.view.is_ready());
                            After::Failure
                        }
                    };
                    (lost.to_string(), lost_after)
                }
                Some(Err(error @ DialError::Untrusted { .. })) => {
                    // A token for the control plane that answers now may be there, and whoever has none is to be told.
                    self.renew.notify_one();
                    self.readiness.doubt();
                    (error.to_string(), After::Failure)
                }
                Some(Err(error)) => {
                    self.readiness.settle(self.view.is_ready());
                    (error.to_string(), After::Failure)
                }
                None => break,
            };
            failures = match lost {
                After::Connection | After::Nothing | After::Asked(_) => 0,
                After::Refusal | After::Failure => failures + 1,
            };
            established |= lost == After::Connection;
            // A refusal is mended by another certificate, which may be there in a moment.
            let herd = (established && lost != After::Refusal).then(|| *self.fleet.pace.borrow());
            let pause = match lost {
                After::Asked(later) => later,
                _ => pause(failures, herd),
            };
            // An established one that ends is told once; that nobody answers then is told when it lasts.
            if failures == u32::from(!established) || (failures > 0 && failures.is_multiple_of(10)) {
                tracing::warn!(pause_ms = pause.as_millis(), "no control plane: {reason}; serving with what is held");
            }
            if !self.rest(pause, &mut leaving).await {
                break;
            }
        }
        self.saver.flush(&self.view).await;
    }

    /// Leaves aside what was found on disk when it is not of the control plane that issued the certificate since. A proxy
    /// that serves goes on, and is told what has changed.
    fn drop_foreign(&mut self, held: &Held) {
        if !self.readiness.is_ready() && self.view.trust().is_some_and(|bundle| !held.shares_root(&bundle)) {
            tracing::warn!("{FOREIGN}");
            self.view.clear();
            self.readiness.doubt();
        }
    }

    /// The certificate, as soon as there is one; `None` when the proxy ends before.
    async fn certificate(&mut self, leaving: &mut watch::Receiver<Leaving>) -> Option<Arc<Held>> {
        loop {
            if let Some(held) = self.held.borrow_and_update().clone() {
                return Some(held);
            }
            // Each arm may be dropped: all are cancel safe.
            tokio::select! {
                changed = self.held.changed() => changed.ok()?,
                _ = leaving.wait_for(|it| *it == Leaving::Done) => return None,
                Some(want) = self.wants.recv() => self.waiters.add(&mut self.view, want),
            }
        }
    }

    /// The first control plane that answers; `None` when the proxy ends before.
    async fn connect(
        &mut self,
        held: &Held,
        leaving: &mut watch::Receiver<Leaving>,
    ) -> Option<Result<(Address, Channel), DialError>> {
        let known = held.control().iter().filter_map(|text| Address::parse(text).ok());
        let mut addresses = self.control.clone();
        addresses.extend(known);
        let (trust, outside) = (held.trust(), self.outside.clone());
        let dialling = async {
            let mut last = None;
            for address in addresses {
                match dial(&outside, &address, Some(&trust)).await {
                    Ok(channel) => return Ok((address, channel)),
                    // That another one answers is more than that nobody does.
                    Err(_) if matches!(last, Some(DialError::Untrusted { .. })) => {}
                    Err(error) => last = Some(error),
                }
            }
            Err(last.unwrap_or(DialError::NoAddress))
        };
        tokio::pin!(dialling);
        loop {
            // A dropped dial closes its connection; the others are cancel safe.
            tokio::select! {
                dialled = &mut dialling => return Some(dialled),
                _ = leaving.wait_for(|it| *it == Leaving::Done) => return None,
                Some(want) = self.wants.recv() => self.waiters.add(&mut self.view, want),
                () = self.readiness.overdue() => self.readiness.settle(self.view.is_ready()),
            }
        }
    }

    /// Runs both streams of a connection until one ends. `Ok` when everything is said.
    async fn attend(&mut self, address: &Address, channel: Channel, uid: &str) -> Result<(), Lost> {
        self.fleet.standing.send_replace(Standing::Unknown);
        if matches!(address, Address::Tcp(_)) {
            // Its certificate ends in a root of ours.
            self.readiness.settle(self.view.is_ready());
        }
        let serving = self.readiness.is_ready();
        let discovery = Discovery {
            view: &mut self.view,
            wants: &mut self.wants,
            waiters: &mut self.waiters,
            saver: &mut self.saver,
            readiness: &mut self.readiness,
            pace: self.fleet.pace.subscribe(),
        };
        // With one stream the other ends: they share the connection, and the next one resumes.
        tokio::select! {
            lost = discovery.follow(channel.clone(), uid) => Err(lost),
            said = self.fleet.attend(channel, serving) => said,
        }
    }

    /// Waits for the next attempt; false when the proxy ends before.
    async fn rest(&mut self, pause: Duration, leaving: &mut watch::Receiver<Leaving>) -> bool {
        let until = Instant::now() + pause;
        loop {
            // Each arm may be dropped: all are cancel safe.
            tokio::select! {
                () = tokio::time::sleep_until(until) => return true,
                _ = leaving.wait_for(|it| *it == Leaving::Done) => return false,
                Some(want) = self.wants.recv() => self.waiters.add(&mut self.view, want),
            }
        }
    }
}

/// What an attempt to follow a control plane came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    /// An established connection was lost.
    Connection,
    /// The same control plane is to be asked again at once.
    Nothing,
    /// It does not accept who the proxy says it is.
    Refusal,
    /// It is to be asked again after this time.
    Asked(Duration),
    /// None was established.
    Failure,
}

/// Marks a request of a proxy that serves with what it holds.
fn marked<T>(message: T, serving: bool) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    if serving {
        request.metadata_mut().insert(SERVING, tonic::metadata::MetadataValue::from_static("1"));
    }
    request
}

/// The pause before the next attempt, after this many failures since the last established connection. `herd` is in how many
/// milliseconds the control plane wants its proxies back, 0 when it did not say; `None` when there never was one.
fn pause(failures: u32, herd: Option<u32>) -> Duration {
    let mut random = rand::rng();
    let doubled = |first: Duration, last| first.saturating_mul(1 << (failures.max(1) - 1).min(10)).min(last);
    match (failures, herd) {
        (0, _) => AT_ONCE.mul_f64(random.random_range(0.0..1.0)),
        (_, Some(within_ms)) => {
            let within = if within_ms == 0 { BETWEEN } else { Duration::from_millis(within_ms.into()).min(BETWEEN) };
            within.max(doubled(AFTER_LOSS, AFTER_LOSS_LAST)).mul_f64(random.random_range(0.0..1.0))
        }
        (_, None) => doubled(STARTING_FIRST, STARTING_LAST).mul_f64(random.random_range(0.5..=1.0)),
    }
}

/// Who waits for the first use of a service or an address.
#[derive(Default)]
struct Waiters(HashMap<Wanted, Vec<oneshot::Sender<()>>>);

impl Waiters {
    fn add(&mut self, view: &mut View, want: Want) {
        let Want { what, told } = want;
        view.want(what.clone());
        let Some(told) = told else { return };
        if view.is_answered(&what) {
            let _ = told.send(());
            return;
        }
        let waiting = self.0.entry(what).or_default();
        // Those whose request has ended meanwhile.
        waiting.retain(|it| !it.is_closed());
        waiting.push(told);
    }

    fn tell(&mut self, view: &View) {
        let answered = self.0.extract_if(|what, _| view.is_answered(what));
        for told in answered.flat_map(|(_, waiting)| waiting) {
            let _ = told.send(());
        }
    }
}

/// Keeps the configuration on disk, not on every change, and never in the way of the thread.
struct Saver {
    directory: Directory,
    due: Option<Instant>,
    last: Option<Instant>,
    writing: Option<JoinHandle<()>>,
    /// The last write failed: what is in force is not what is on disk.
    failed: Arc<AtomicBool>,
    /// When to look whether it did.
    look: Option<Instant>,
    /// In what time to come back after a loss.
    pace: watch::Receiver<u32>,
    leaving: watch::Receiver<Leaving>,
}

impl Saver {
    fn new(directory: Directory, pace: watch::Receiver<u32>, leaving: watch::Receiver<Leaving>) -> Self {
        Self { directory, due: None, last: None, writing: None, failed: Arc::default(), look: None, pace, leaving }
    }

    fn note_change(&mut self) {
        if self.due.is_none() {
            let earliest = self.last.map(|last| last + SAVE_APART);
            let soon = Instant::now() + SAVE_AFTER;
            self.due = Some(earliest.map_or(soon, |earliest| earliest.max(soon)));
        }
    }

    /// Waits until something is to be stored. Cancel safe.
    async fn due(&self) {
        match self.due.into_iter().chain(self.look).min() {
            Some(due) => tokio::time::sleep_until(due).await,
            None => std::future::pending().await,
        }
    }

    fn save(&mut self, view: &View) {
        if self.writing.as_ref().is_some_and(|writing| !writing.is_finished()) {
            // A slow disk: not two at once.
            (self.due, self.look) = (Some(Instant::now() + SAVE_APART), None);
            return;
        }
        if self.due.is_none() && !self.failed.load(Relaxed) {
            self.look = None;
            return;
        }
        (self.due, self.look) = (None, None);
        self.last = Some(Instant::now());
        if *self.leaving.borrow() == Leaving::Replaced {
            // What is on disk is the next proxy's.
            return;
        }
        let content = Configuration { return_within_ms: *self.pace.borrow(), ..view.configuration() };
        let (directory, content, failed) = (self.directory.clone(), content.encode_to_vec(), self.failed.clone());
        // A disk that was full or erred is tried again, also when nothing changes any more.
        self.look = Some(Instant::now() + SAVE_AGAIN);
        self.writing = Some(tokio::spawn(async move {
            let saved = directory.keep(CONFIGURATION, content).await;
            failed.store(saved.is_err(), Relaxed);
            if let Err(error) = saved {
                tracing::warn!("{error}; the proxy goes on, and would need the control plane after a restart");
            }
        }));
    }

    /// Stores what is not stored yet, and waits for it.
    async fn flush(&mut self, view: &View) {
        if let Some(writing) = self.writing.take() {
            let _ = writing.await;
        }
        if self.due.is_some() || self.failed.load(Relaxed) {
            self.save(view);
        }
        if let Some(writing) = self.writing.take() {
            let _ = writing.await;
        }
    }
}

#[cfg(test)]
mod tests;

//! The proxy's streams to a control plane: what it is told, and what it reports.
//!
//! One connection at a time, to the first control plane that answers, in the order in which they are named. While there
//! is none, everything goes on with what is held. After an established connection was lost one attempt follows at once: a
//! connection that broke alone is replaced before the control plane lets the workload go, which it does after a second.
//! When that attempt fails the control plane itself is away: the next one comes after a random time of at most 7 s, and
//! further ones are at most 10 s apart, so that many proxies come back to a restarted control plane one by one. At the
//! start attempts follow each other quickly.

mod demand;
mod discovery;
mod fleet;
mod view;

pub use demand::{Demand, Demands};
pub use fleet::{Leaving, Standing};
pub use view::Outputs;

use crate::control::{Address, DialError, dial};
use crate::identity::Held;
use crate::metrics::Metrics;
use crate::state::{CONFIGURATION, Configuration, Directory};
use demand::{Want, Wanted};
use discovery::Discovery;
use fleet::Fleet;
use prost::Message;
use rand::Rng;
use sheer_core::name::DnsLabel;
use sheer_core::wire::v1;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tonic::Code;
use tonic::transport::Channel;
use view::View;

/// The longest time until the first attempt after an established connection was lost: a third of what a control plane
/// waits before it lets a workload go whose connection closed.
const AT_ONCE: Duration = Duration::from_millis(300);

/// The longest time until the second attempt. 200 proxies then come back spread over more than 5 s.
const AFTER_LOSS: Duration = Duration::from_secs(7);

/// The longest time between further attempts.
const BETWEEN: Duration = Duration::from_secs(10);

/// The first pause before anything was ever established; it doubles up to [`STARTING_LAST`].
const STARTING_FIRST: Duration = Duration::from_millis(100);
const STARTING_LAST: Duration = Duration::from_secs(3);

/// A change is stored this long after it came, so that changes that come together are stored together, and not sooner
/// than [`SAVE_APART`] after the last time.
const SAVE_AFTER: Duration = Duration::from_millis(200);
const SAVE_APART: Duration = Duration::from_secs(2);

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
    ready: watch::Sender<bool>,
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
}

/// What the control plane said; the code's own description only where it said nothing.
fn of_status(status: &tonic::Status) -> String {
    if status.message().is_empty() { status.code().to_string() } else { status.message().to_owned() }
}

impl From<tonic::Status> for Lost {
    fn from(status: tonic::Status) -> Self {
        Lost::Failed(Box::new(status))
    }
}

impl Lost {
    /// Whether the control plane does not accept who the proxy says it is.
    fn is_stranger(&self) -> bool {
        match self {
            Lost::Ended => false,
            Lost::Failed(status) => matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied),
        }
    }
}

impl Sync {
    /// Takes the configuration from disk where there is one, and publishes it.
    pub fn new(setup: Setup) -> Self {
        let metrics = setup.outputs.metrics.clone();
        let mut view = View::new(setup.namespace, setup.outputs);
        if let Some(configuration) = Configuration::load(&setup.directory) {
            view.restore(configuration);
        }
        let Demands { wants, unreachable } = setup.demands;
        let fleet = Fleet {
            registration: setup.registration,
            ready_ports: setup.ready_ports,
            unreachable,
            leaving: setup.leaving,
            standing: watch::channel(Standing::Unknown).0,
            metrics: metrics.clone(),
        };
        Self {
            control: setup.control,
            held: setup.held,
            renew: setup.renew,
            wants,
            ready: watch::channel(view.is_ready()).0,
            view,
            waiters: Waiters::default(),
            saver: Saver::new(setup.directory),
            fleet,
            metrics,
        }
    }

    /// Whether the proxy has what it needs to serve, from the control plane or from disk.
    pub fn ready(&self) -> watch::Receiver<bool> {
        self.ready.subscribe()
    }

    /// What the control plane said of the registration.
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.fleet.standing.subscribe()
    }

    /// Follows control planes until [`Leaving::Done`] was said, or cannot be.
    pub async fn run(mut self) {
        let mut failures: u32 = 0;
        let mut established = false;
        let mut leaving = self.fleet.leaving.clone();
        loop {
            let Some(held) = self.certificate(&mut leaving).await else { break };
            let lost = match self.connect(&held, &mut leaving).await {
                Some(Ok((address, channel))) => {
                    tracing::info!(%address, "connected to the control plane");
                    self.metrics.set_control_connected(true);
                    let end = self.attend(channel, held.uid()).await;
                    self.metrics.set_control_connected(false);
                    self.saver.flush(&self.view).await;
                    let Err(lost) = end else { break };
                    let stranger = lost.is_stranger();
                    if stranger {
                        self.renew.notify_one();
                    }
                    // One that never spoke is no established connection.
                    let spoke = *self.fleet.standing.borrow() != Standing::Unknown;
                    (lost.to_string(), spoke && !stranger)
                }
                Some(Err(error)) => (error.to_string(), false),
                None => break,
            };
            let (reason, was_established) = lost;
            failures = if was_established { 0 } else { failures + 1 };
            established |= was_established;
            let pause = pause(failures, established);
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
        let trust = held.trust();
        let dialling = async {
            let mut last = None;
            for address in addresses {
                match dial(&address, Some(&trust)).await {
                    Ok(channel) => return Ok((address, channel)),
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
            }
        }
    }

    /// Runs both streams of a connection until one ends. `Ok` when everything is said.
    async fn attend(&mut self, channel: Channel, uid: &str) -> Result<(), Lost> {
        self.fleet.standing.send_replace(Standing::Unknown);
        let discovery = Discovery {
            view: &mut self.view,
            wants: &mut self.wants,
            waiters: &mut self.waiters,
            saver: &mut self.saver,
            ready: &self.ready,
        };
        // With one stream the other ends: they share the connection, and the next one resumes.
        tokio::select! {
            lost = discovery.follow(channel.clone(), uid) => Err(lost),
            said = self.fleet.attend(channel) => said,
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

/// The pause before the next attempt. `failures` since the last established connection; `established`: whether there ever
/// was one.
fn pause(failures: u32, established: bool) -> Duration {
    let mut random = rand::rng();
    match (failures, established) {
        (0, _) => AT_ONCE.mul_f64(random.random_range(0.0..1.0)),
        (1, true) => AFTER_LOSS.mul_f64(random.random_range(0.0..1.0)),
        (_, true) => BETWEEN.mul_f64(random.random_range(0.0..1.0)),
        (_, false) => {
            let whole = STARTING_FIRST.saturating_mul(1 << (failures - 1).min(10)).min(STARTING_LAST);
            whole.mul_f64(random.random_range(0.5..=1.0))
        }
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
}

impl Saver {
    fn new(directory: Directory) -> Self {
        Self { directory, due: None, last: None, writing: None }
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
        match self.due {
            Some(due) => tokio::time::sleep_until(due).await,
            None => std::future::pending().await,
        }
    }

    fn save(&mut self, view: &View) {
        if self.writing.as_ref().is_some_and(|writing| !writing.is_finished()) {
            // A slow disk: not two at once.
            self.due = Some(Instant::now() + SAVE_APART);
            return;
        }
        self.due = None;
        self.last = Some(Instant::now());
        let (directory, content) = (self.directory.clone(), view.configuration().encode_to_vec());
        self.writing = Some(tokio::task::spawn_blocking(move || {
            if let Err(error) = directory.save(CONFIGURATION, &content) {
                tracing::warn!("{error}; the proxy goes on, and would need the control plane after a restart");
            }
        }));
    }

    /// Stores what is not stored yet, and waits for it.
    async fn flush(&mut self, view: &View) {
        if let Some(writing) = self.writing.take() {
            let _ = writing.await;
        }
        if self.due.is_some() {
            self.save(view);
        }
        if let Some(writing) = self.writing.take() {
            let _ = writing.await;
        }
    }
}

#[cfg(test)]
mod tests;

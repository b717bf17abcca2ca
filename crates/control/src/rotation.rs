//! Replacing the root under load: which roots are trusted, which one issues, and how far a rotation has come.
//!
//! All of it is one record of the store, [`Trust`], which changes in transactions. A rotation has three steps:
//!
//! 1. *spread*: a new root is made and told beside the old one, which still issues;
//! 2. *renew*: certificates are issued under the new root, and proxies renew theirs, spread over a while;
//! 3. *drop*: the old root is told no longer.
//!
//! Each step ends by itself when every connected proxy says that it works with what it was told. The second one waits
//! for those as well who are not connected and hold a valid certificate under the old root: their peers must not refuse
//! it. A proxy that cannot be told of the new root meets it certified by the old one, so it is not waited for in the
//! first. An abort in the first step takes the new root back; later it exchanges the two and goes on from the second.

use crate::attest::Attested;
use crate::ca::{CaError, hex};
use crate::store::{Store, StoreError, Table};
use crate::{Control, ca};
use serde::{Deserialize, Serialize};
use sheer_core::api::{
    IdentityView, RootState, RootView, Rotate, RotatedView, RotationStep, RotationView, WaitingView,
};
use sheer_core::wire::v1::{RetiredRoot, TrustBundle};
use std::path::Path;
use std::time::Duration;

/// The key of the record in [`Table::Meta`].
pub(crate) const RECORD: &str = "trust";

/// How long each connected proxy may have to renew, so that a thousand do not come at once; and the least and the most
/// for all together.
const RENEW_EACH_MS: u64 = 10;
const RENEW_MS: std::ops::RangeInclusive<u64> = 500..=30_000;

/// How long `--now` waits in each step for connected proxies that do not do it.
const NOW_WAITS_S: i64 = 15;

/// Replaced roots that are remembered, so that connections of their time may go on: each is half a kilobyte of the bundle.
const MAX_RETIRED: usize = 32;

/// Workloads named in the answer to `status`.
const MAX_NAMED: usize = 100;

/// Which roots there are, and a rotation of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trust {
    /// Grows with every change, also over a restored backup.
    pub(crate) sequence: u64,
    /// The number of the root under which certificates are issued.
    pub(crate) issuing: u64,
    /// The numbers of the roots whose certificates are accepted.
    pub(crate) trusted: Vec<u64>,
    /// Roots that were replaced, oldest first.
    pub(crate) retired: Vec<Retired>,
    pub(crate) rotation: Option<Rotation>,
    /// The number of the next root.
    next: u64,
    last: Option<RotatedView>,
}

/// A root that was replaced in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Retired {
    pub(crate) number: u64,
    /// Until when connections that were made under it may go on, in unix seconds.
    connections_until: i64,
    /// Until when a certificate under it may be renewed, in unix seconds.
    until: i64,
}

/// A rotation that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Rotation {
    pub(crate) from: u64,
    pub(crate) to: u64,
    step: RotationStep,
    back: bool,
    pub(crate) now: bool,
    without_absent: bool,
    began: i64,
    step_began: i64,
}

impl Default for Trust {
    /// The first root alone.
    fn default() -> Self {
        Self { sequence: 1, issuing: 1, trusted: vec![1], retired: Vec::new(), rotation: None, next: 2, last: None }
    }
}

/// Why a rotation cannot be begun or aborted.
#[derive(Debug, thiserror::Error)]
pub enum RotationError {
    /// There is one already.
    #[error(
        "a rotation is under way already; see `sheer identity status`, or take it back with `sheer identity abort`"
    )]
    UnderWay,
    /// An aborted one is going back.
    #[error("an aborted rotation is going back; it ends by itself, see `sheer identity status`")]
    GoingBack,
    /// There is none.
    #[error("no rotation is under way")]
    None,
    /// The keys.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Trust {
    /// The record of the store. Where a store has none, and there are keys, the store was lost: all of their roots are
    /// trusted, and the oldest issues, which everybody knows.
    ///
    /// # Errors
    /// When the store cannot be read or written.
    pub(crate) async fn open(store: &Store, directory: &Path, now: i64) -> Result<Self, StoreError> {
        let (trust, stored) = Self::find(store, directory, now)?;
        if !stored {
            let record = trust.clone();
            store.write::<_, StoreError>(move |transaction| transaction.put(Table::Meta, RECORD, &record)).await?;
        }
        Ok(trust)
    }

    /// [`Trust::open`] for callers without a runtime.
    ///
    /// # Errors
    /// The same.
    pub(crate) fn open_now(store: &Store, directory: &Path, now: i64) -> Result<Self, StoreError> {
        let (trust, stored) = Self::find(store, directory, now)?;
        if !stored {
            let record = trust.clone();
            store.write_now::<_, StoreError>(move |transaction| transaction.put(Table::Meta, RECORD, &record))?;
        }
        Ok(trust)
    }

    /// The record, and whether it is in the store.
    fn find(store: &Store, directory: &Path, now: i64) -> Result<(Self, bool), StoreError> {
        if let Some(trust) = store.read(Table::Meta, RECORD)? {
            return Ok((trust, true));
        }
        let names = std::fs::read_dir(directory).into_iter().flatten().flatten();
        let mut found: Vec<u64> = names.filter_map(|it| ca::number_of(it.file_name().to_str()?)).collect();
        found.sort_unstable();
        found.dedup();
        let trust = match found.as_slice() {
            [] | [1] => Self::default(),
            [first, .., last] | [first @ last] => Self {
                sequence: u64::try_from(now).unwrap_or_default(),
                issuing: *first,
                next: last + 1,
                trusted: found.clone(),
                ..Self::default()
            },
        };
        Ok((trust, false))
    }

    /// The numbers of all roots that it names, in order.
    pub(crate) fn numbers(&self) -> Vec<u64> {
        let mut numbers: Vec<u64> =
            self.trusted.iter().copied().chain(self.retired.iter().map(|it| it.number)).collect();
        numbers.sort_unstable();
        numbers.dedup();
        numbers
    }

    /// A change of this record as of now.
    fn changed(&self, now: i64) -> Self {
        let sequence = (self.sequence + 1).max(u64::try_from(now).unwrap_or_default());
        Self { sequence, ..self.clone() }
    }

    /// The same for a backup that is restored: whatever proxies have been told since is older.
    pub(crate) fn restored(&self, now: i64) -> Self {
        self.changed(now)
    }

    fn began(&self, how: Rotate, now: i64) -> Self {
        let (from, to) = (self.issuing, self.next);
        let rotation = Rotation {
            from,
            to,
            step: RotationStep::Spread,
            back: false,
            now: how.now,
            without_absent: how.without_absent || how.now,
            began: now,
            step_began: now,
        };
        let trusted = self.trusted.iter().copied().chain([to]).collect();
        Self { trusted, rotation: Some(rotation), next: to + 1, ..self.changed(now) }
    }

    fn hurried(&self, rotation: &Rotation, how: Rotate, now: i64) -> Self {
        let rotation = Rotation {
            now: rotation.now || how.now,
            without_absent: rotation.without_absent || how.without_absent || how.now,
            ..rotation.clone()
        };
        if how.now && rotation.step == RotationStep::Drop {
            let retired = self.retired.iter().filter(|it| it.number != rotation.from).cloned().collect();
            return Self { retired, rotation: Some(rotation), ..self.changed(now) };
        }
        Self { rotation: Some(rotation), ..self.clone() }
    }

    /// The next step. `lifetime` is that of certificates, `grace` how long they may be renewed after their end.
    fn advanced(&self, now: i64, lifetime: Duration, grace: Duration) -> Self {
        let Some(rotation) = self.rotation.clone() else { return self.clone() };
        let step = |step| Some(Rotation { step, step_began: now, ..rotation.clone() });
        let seconds = |time: Duration| i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
        let changed = self.changed(now);
        match rotation.step {
            RotationStep::Spread => Self { issuing: rotation.to, rotation: step(RotationStep::Renew), ..changed },
            RotationStep::Renew => {
                let mut retired = changed.retired.clone();
                let connections_until = now.saturating_add(seconds(lifetime));
                let until = connections_until.saturating_add(seconds(grace));
                // More than one where a store was lost.
                let goes =
                    self.trusted.iter().filter(|it| **it != rotation.to && !(rotation.now && **it == rotation.from));
                retired.extend(goes.map(|number| Retired { number: *number, connections_until, until }));
                retired.sort_by_key(|it| it.number);
                let surplus = retired.len().saturating_sub(MAX_RETIRED);
                retired.drain(..surplus);
                Self { trusted: vec![rotation.to], retired, rotation: step(RotationStep::Drop), ..changed }
            }
            // Nothing that proxies are told is different.
            RotationStep::Drop => self.ended(&rotation, rotation.to, now),
        }
    }

    fn ended(&self, rotation: &Rotation, to: u64, now: i64) -> Self {
        let from = if rotation.back { rotation.to } else { rotation.from };
        let last = Some(RotatedView { from, to, began: rotation.began, ended: now });
        Self { rotation: None, last, ..self.clone() }
    }

    fn aborted(&self, now: i64) -> Result<Self, RotationError> {
        let rotation = self.rotation.clone().ok_or(RotationError::None)?;
        if rotation.back {
            return Err(RotationError::GoingBack);
        }
        let Rotation { from, to, .. } = rotation;
        let changed = self.changed(now);
        Ok(match rotation.step {
            // Nothing was issued under the new root.
            RotationStep::Spread => {
                let trusted = self.trusted.iter().copied().filter(|it| *it != to).collect();
                Self { trusted, ..changed }.ended(&rotation, from, now)
            }
            RotationStep::Renew | RotationStep::Drop => Self {
                issuing: from,
                trusted: [from].into_iter().chain(self.trusted.iter().copied().filter(|it| *it != from)).collect(),
                retired: changed.retired.iter().filter(|it| it.number != from).cloned().collect(),
                rotation: Some(Rotation {
                    from: to,
                    to: from,
                    step: RotationStep::Renew,
                    back: true,
                    now: false,
                    step_began: now,
                    ..rotation
                }),
                ..changed
            },
        })
    }

    /// Without those replaced roots whose time has passed; none when there are none.
    fn forgotten(&self, now: i64) -> Option<Self> {
        let is_due = |it: &Retired| it.until <= now && !self.trusted.contains(&it.number);
        if !self.retired.iter().any(is_due) {
            return None;
        }
        let retired = self.retired.iter().filter(|it| !is_due(it)).cloned().collect();
        Some(Self { retired, ..self.changed(now) })
    }
}

/// What a proxy says that it works with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct InForce {
    /// Of its trust bundle.
    pub(crate) sequence: u64,
    /// SHA-256 of the root above its own certificate.
    pub(crate) root_sha256: Vec<u8>,
}

/// A workload as a rotation sees it.
#[derive(Clone, Debug)]
pub(crate) struct Follower {
    pub(crate) uid: String,
    /// None while it is not connected, or has not said.
    pub(crate) in_force: Option<InForce>,
    pub(crate) connected: bool,
    pub(crate) attested: Option<Attested>,
}

/// Who has not done the present step, and how many are to do it.
fn waiting(trust: &Trust, to_sha256: [u8; 32], followers: &[Follower], now: i64) -> (Vec<WaitingView>, usize) {
    let Some(rotation) = &trust.rotation else { return (Vec::new(), 0) };
    let impatient = rotation.now && now - rotation.step_began >= NOW_WAITS_S;
    let (mut waiting, mut of) = (Vec::new(), 0);
    for follower in followers {
        let mut wait = |why: &str, until: i64| {
            waiting.push(WaitingView { workload: follower.uid.clone(), why: why.to_owned(), until });
        };
        if follower.connected {
            of += 1;
            let in_force = follower.in_force.clone().unwrap_or_default();
            let told = in_force.sequence >= trust.sequence;
            let renewed = rotation.step != RotationStep::Renew || in_force.root_sha256 == to_sha256;
            match (told, renewed) {
                _ if impatient => {}
                (false, _) if follower.in_force.is_none() => wait("it has not said whom it trusts", 0),
                (false, _) => wait("it has not taken the roots that it was told", 0),
                (true, false) => wait("it has not renewed its certificate", 0),
                (true, true) => {}
            }
            continue;
        }
        let Some(attested) = &follower.attested else { continue };
        let holds = attested.not_after > now && attested.root != rotation.to && !attested.left;
        if rotation.step == RotationStep::Renew && holds && !rotation.without_absent {
            of += 1;
            wait("it is not connected, and holds a valid certificate under the old root", attested.not_after);
        }
    }
    (waiting, of)
}

impl Control {
    /// Begins to replace the root. One that is under way can be hurried by it.
    ///
    /// # Errors
    /// [`RotationError`]; nothing has changed then.
    pub async fn rotate_root(&self, how: Rotate) -> Result<(), RotationError> {
        let _turn = self.rotating.lock().await;
        let (trust, now) = (self.authority.trust(), self.clock.unix());
        if let Some(rotation) = &trust.rotation {
            if rotation.back {
                return Err(RotationError::GoingBack);
            }
            if how == Rotate::default() {
                return Err(RotationError::UnderWay);
            }
            tracing::info!(now = how.now, "the rotation of the root is hurried");
            return self.keep_trust(trust.hurried(rotation, how, now)).await;
        }
        self.authority.make_successor(trust.next, how.now)?;
        let began = trust.began(how, now);
        tracing::info!(from = trust.issuing, to = trust.next, now = how.now, "a rotation of the root begins");
        self.keep_trust(began).await
    }

    /// Takes a rotation of the root back.
    ///
    /// # Errors
    /// [`RotationError`]; nothing has changed then.
    pub async fn abort_rotation(&self) -> Result<(), RotationError> {
        let _turn = self.rotating.lock().await;
        let aborted = self.authority.trust().aborted(self.clock.unix())?;
        tracing::info!(issuing = aborted.issuing, "the rotation of the root is aborted");
        self.keep_trust(aborted).await
    }

    /// Goes on with a rotation where everybody has done the present step; forgets replaced roots. Called every second.
    pub(crate) async fn tend_roots(&self) {
        let _turn = self.rotating.lock().await;
        let (trust, now) = (self.authority.trust(), self.clock.unix());
        let next = match &trust.rotation {
            Some(rotation) => {
                let Some(to) = self.authority.sha256_of(rotation.to) else { return };
                let (waiting, _) = waiting(&trust, to, &self.fleet.followers(), now);
                if !waiting.is_empty() {
                    return;
                }
                tracing::info!(step = ?rotation.step, back = rotation.back, "a step of the root's rotation is done");
                let mesh = &self.state.compiled().mesh;
                Some(trust.advanced(now, mesh.certificate_lifetime, mesh.renewal_grace))
            }
            None => trust.forgotten(now),
        };
        if let Some(next) = next
            && let Err(error) = self.keep_trust(next).await
        {
            // The step before stays in force, and is tried again.
            tracing::error!(%error, "the rotation of the root cannot go on");
        }
    }

    /// Stores a record, puts it into force, tells it, and removes what it no longer names: in this order, so that a kill
    /// in between is a kill before or after the whole.
    async fn keep_trust(&self, trust: Trust) -> Result<(), RotationError> {
        let stored = trust.clone();
        self.store.write::<_, StoreError>(move |transaction| transaction.put(Table::Meta, RECORD, &stored)).await?;
        self.authority.adopt(&trust)?;
        self.door.renew();
        self.publish_trust();
        if trust.rotation.is_none() {
            self.authority.tidy(&trust)?;
            // Keys that are gone from the disk are to be gone from memory.
            self.authority.adopt(&trust)?;
        }
        Ok(())
    }

    /// Tells proxies whom to trust.
    pub(crate) fn publish_trust(&self) {
        // What is told last must be what is in force last.
        let _turn = self.publishing.lock();
        self.state.trust(self.trust_bundle());
    }

    /// Whom the mesh trusts.
    pub(crate) fn trust_bundle(&self) -> TrustBundle {
        let trust = self.authority.trust();
        let now = self.clock.unix();
        let retired = trust.retired.iter().filter(|it| it.connections_until > now);
        let retired = retired.filter_map(|it| {
            let root = self.authority.root_of(it.number)?.to_vec().into();
            Some(RetiredRoot { root, until_s: u64::try_from(it.connections_until).unwrap_or_default() })
        });
        let rotating = trust.rotation.is_some();
        TrustBundle {
            trust_domain: self.trust_domain.clone(),
            roots: self.authority.roots().into_iter().map(|root| root.to_vec().into()).collect(),
            sequence: trust.sequence,
            issuing_root_sha256: if trust.sequence > 1 { self.authority.root_sha256().to_vec() } else { Vec::new() }
                .into(),
            renew_within_ms: if rotating { self.renew_within_ms() } else { 0 },
            retired: retired.collect(),
            requires: Vec::new(),
        }
    }

    /// In what time proxies are to renew: a function of the step's beginning, so that it is not told anew with every
    /// workload that comes.
    fn renew_within_ms(&self) -> u32 {
        let proxies = self.fleet.connected().next_power_of_two() as u64;
        let lifetime = self.state.compiled().mesh.certificate_lifetime.as_millis();
        let most = u64::try_from(lifetime / 8).unwrap_or(u64::MAX);
        let within = (proxies * RENEW_EACH_MS).clamp(*RENEW_MS.start(), *RENEW_MS.end()).min(most);
        u32::try_from(within).unwrap_or(u32::MAX)
    }

    /// Roots and rotation, for people.
    pub fn identity(&self) -> IdentityView {
        let (trust, now) = (self.authority.trust(), self.clock.unix());
        let root = |number: u64| {
            let retired = trust.retired.iter().find(|it| it.number == number);
            let trusted = trust.trusted.contains(&number);
            RootView {
                number,
                sha256: self.authority.sha256_of(number).map(|it| hex(&it)).unwrap_or_default(),
                expires: self.authority.not_after_of(number).unwrap_or_default(),
                state: match retired {
                    _ if number == trust.issuing => RootState::Issuing,
                    Some(_) if !trusted => RootState::Retired,
                    _ => RootState::Trusted,
                },
                until: retired.filter(|_| !trusted).map_or(0, |it| it.until),
            }
        };
        let rotation = trust.rotation.as_ref().map(|rotation| {
            let to = self.authority.sha256_of(rotation.to).unwrap_or_default();
            let (mut waiting, of) = waiting(&trust, to, &self.fleet.followers(), now);
            let done = of.saturating_sub(waiting.len());
            waiting.truncate(MAX_NAMED);
            RotationView {
                from: rotation.from,
                to: rotation.to,
                step: rotation.step,
                back: rotation.back,
                now: rotation.now,
                began: rotation.began,
                step_began: rotation.step_began,
                done,
                of,
                waiting,
            }
        });
        IdentityView {
            sequence: trust.sequence,
            roots: trust.numbers().into_iter().map(root).collect(),
            rotation,
            last: trust.last.clone(),
        }
    }
}

#[cfg(test)]
mod tests;

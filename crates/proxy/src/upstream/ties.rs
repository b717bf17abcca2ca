//! Open connections from and to mesh peers, and whether their peers would still be accepted.
//!
//! Who is at the other end is judged when a connection is made. What it was judged by may change while it is open: a root
//! is replaced or withdrawn, a service is answered by other identities. Every change is applied to what is open within
//! half a second, by the certificates that both sides showed when it was made:
//!
//! - under a root that was replaced in order it takes no new request, and may go on with what it carries until the time
//!   that the control plane set;
//! - under a root that is not trusted any more, or to an identity that is not the service's any more, bytes end at once,
//!   and requests that are under way get [`LAST_REQUESTS`].
//!
//! Everything here belongs to one worker.

use super::endpoint::Table;
use super::tls::{Carried, Credentials};
use crate::io::Io;
use crate::metrics::Metrics;
use crate::platform::socket_cookie;
use arc_swap::ArcSwapOption;
use rustls::pki_types::CertificateDer;
use sheer_core::cause::Cause;
use sheer_core::identity::SpiffeId;
use sheer_core::name::{DnsLabel, ServiceName};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

/// How long requests that are under way may go on to a peer that is not accepted any more.
pub const LAST_REQUESTS: Duration = Duration::from_secs(3);

/// How far ahead the wall clock, which may be set, is believed.
const BELIEVED: Duration = Duration::from_secs(10);

/// Connections below which nobody looks for closed ones.
const FEW: usize = 256;

/// What becomes of connections that were made under a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Its root is trusted.
    Trusted,
    /// Its root was replaced in order: they may end by themselves until then.
    Retired(SystemTime),
    /// Its root is not trusted.
    Distrusted,
}

/// Whoever issued certificates, as chains show it.
struct Issuer {
    /// One of the chains, leaf first.
    chain: Vec<CertificateDer<'static>>,
    standing: Cell<Standing>,
}

impl Issuer {
    /// Whether another chain is of the same issuer: all but the leaf is the same.
    fn issued(&self, chain: &[CertificateDer<'_>]) -> bool {
        match (self.chain.as_slice(), chain) {
            ([own], [leaf]) => own == leaf,
            ([_, own @ ..], [_, above @ ..]) => own == above,
            _ => false,
        }
    }
}

/// One connection: what it was judged by.
pub struct Tie {
    /// Of a socket that somebody else owns and may have closed: the number may be another socket's by now.
    socket: RawFd,
    cookie: u64,
    carried: Carried,
    peer: Rc<Issuer>,
    own: Rc<Issuer>,
    /// Who answered, and the name under which it was asked for; none where the peer came to us.
    answered: Option<(SpiffeId, Arc<str>)>,
    state: Cell<State>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Good,
    /// No new requests; ended at that time for this reason.
    Leaving(Instant, Cause),
}

impl Tie {
    /// Whether no new request is to use it.
    pub fn is_leaving(&self) -> bool {
        self.state.get() != State::Good
    }
}

impl std::fmt::Debug for Tie {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tie")
            .field("carried", &self.carried)
            .field("leaving", &self.is_leaving())
            .finish_non_exhaustive()
    }
}

/// The connections of one worker.
pub struct Ties {
    credentials: Arc<ArcSwapOption<Credentials>>,
    open: RefCell<Vec<Rc<Tie>>>,
    issuers: RefCell<Vec<Rc<Issuer>>>,
    /// What issuers were judged with last.
    judged: RefCell<Option<Arc<Credentials>>>,
    /// Names that were asked for, and who may answer to them.
    names: RefCell<HashMap<Arc<str>, Name>>,
    /// When something is to be ended next.
    due: Cell<Option<Instant>>,
    /// How many are open when closed ones are looked for.
    full: Cell<usize>,
    /// Connections that were ended and whose owners have not asked why.
    ended: RefCell<HashMap<u64, Cause>>,
}

struct Name {
    service: Option<ServiceName>,
    list: Option<Arc<[SpiffeId]>>,
}

impl Ties {
    /// None yet. `credentials` are those in use, now and after each change.
    pub fn new(credentials: Arc<ArcSwapOption<Credentials>>) -> Self {
        Self {
            credentials,
            open: RefCell::default(),
            issuers: RefCell::default(),
            judged: RefCell::default(),
            names: RefCell::default(),
            due: Cell::new(None),
            full: Cell::new(FEW),
            ended: RefCell::default(),
        }
    }

    /// Takes part in a connection that was just made with these credentials, with whoever showed this chain. `answered` is who answered to which server
    /// name, where it was this side that called. None where there is nothing to judge by.
    pub fn add(
        &self,
        io: &Io,
        made_with: &Arc<Credentials>,
        shown: &[CertificateDer<'_>],
        carried: Carried,
        answered: Option<(SpiffeId, Arc<str>)>,
    ) -> Option<Rc<Tie>> {
        let socket = io.socket()?.as_raw_fd();
        let cookie = socket_cookie(socket).ok()?;
        let now = self.judged.borrow_mut().get_or_insert_with(|| made_with.clone()).clone();
        let peer = self.issuer(shown, &now);
        let own = self.issuer(made_with.chain(), &now);
        let answered = answered.map(|(id, name)| (id, self.known(name)));
        let state = Cell::new(State::Good);
        let tie = Rc::new(Tie { socket, cookie, carried, peer, own, answered, state });
        self.apply(&tie, Instant::now(), SystemTime::now());
        let mut open = self.open.borrow_mut();
        if open.len() >= self.full.get() {
            open.retain(|tie| tie.is_open());
            self.full.set((2 * open.len()).max(FEW));
            self.issuers.borrow_mut().retain(|it| Rc::strong_count(it) > 1);
            self.names.borrow_mut().retain(|name, _| Arc::strong_count(name) > 1);
        }
        open.push(tie.clone());
        Some(tie)
    }

    /// The name as it is known here: one allocation for all connections.
    fn known(&self, name: Arc<str>) -> Arc<str> {
        let mut names = self.names.borrow_mut();
        if let Some((known, _)) = names.get_key_value(&name) {
            return known.clone();
        }
        names.insert(name.clone(), Name { service: service_of(&name), list: None });
        name
    }

    fn issuer(&self, chain: &[CertificateDer<'_>], now: &Credentials) -> Rc<Issuer> {
        let mut issuers = self.issuers.borrow_mut();
        if let Some(known) = issuers.iter().find(|it| it.issued(chain)) {
            return known.clone();
        }
        let chain: Vec<_> = chain.iter().map(|it| it.clone().into_owned()).collect();
        let standing = Cell::new(now.standing_of(&chain));
        let issuer = Rc::new(Issuer { chain, standing });
        issuers.push(issuer.clone());
        issuer
    }

    /// Why this connection was ended, if it was for what this module is about, here or a moment ago at its other side. Asked
    /// once, by whoever finds it broken.
    pub fn why_ended(&self, io: &Io, table: &Table, metrics: &Metrics) -> Option<Cause> {
        self.judge(table, metrics);
        if self.ended.borrow().is_empty() {
            return None;
        }
        let cookie = socket_cookie(io.socket()?.as_raw_fd()).ok()?;
        self.ended.borrow_mut().remove(&cookie)
    }

    /// Applies what has changed since the last time, and ends what is to be ended by now. To be called twice a second.
    pub fn judge(&self, table: &Table, metrics: &Metrics) {
        let (now, time) = (Instant::now(), SystemTime::now());
        let trust_changed = self.take_trust();
        let lists_changed = self.take_lists(table);
        let due = self.due.get().is_some_and(|due| due <= now);
        if !trust_changed && !lists_changed && !due {
            return;
        }
        self.due.set(None);
        self.open.borrow_mut().retain(|tie| {
            self.apply(tie, now, time);
            let State::Leaving(at, cause) = tie.state.get() else { return true };
            if at > now {
                return true;
            }
            if tie.is_open() {
                self.end(tie, cause, metrics);
            }
            false
        });
    }

    /// Judges issuers anew when the credentials have changed. True when any is another one now.
    fn take_trust(&self) -> bool {
        // Under a bundle that the own certificate does not belong to, another is about to come: then is the time.
        let Some(current) = self.credentials.load_full().filter(|it| it.is_settled()) else { return false };
        let mut judged = self.judged.borrow_mut();
        if judged.as_ref().is_some_and(|judged| Arc::ptr_eq(judged, &current)) {
            return false;
        }
        let mut changed = false;
        for issuer in self.issuers.borrow().iter() {
            let standing = current.standing_of(&issuer.chain);
            changed |= issuer.standing.replace(standing) != standing;
        }
        *judged = Some(current);
        changed
    }

    /// Looks who may answer to the names that were asked for. True when that has changed for any.
    fn take_lists(&self, table: &Table) -> bool {
        let mut changed = false;
        for name in self.names.borrow_mut().values_mut() {
            let Some(service) = &name.service else { continue };
            let list = table.get(service).and_then(|cell| cell.load().as_ref().map(|live| live.identities.clone()));
            // Of a service that nobody tells of any more nothing new is known.
            let Some(list) = list else { continue };
            if name.list.as_ref().is_some_and(|held| Arc::ptr_eq(held, &list)) {
                continue;
            }
            changed |= name.list.as_deref() != Some(&*list);
            name.list = Some(list);
        }
        changed
    }

    fn apply(&self, tie: &Tie, now: Instant, time: SystemTime) {
        let standings = [tie.peer.standing.get(), tie.own.standing.get()];
        let until = standings.iter().filter_map(|it| match it {
            Standing::Retired(until) => Some(*until),
            Standing::Trusted | Standing::Distrusted => None,
        });
        let withdrawn = match (standings.contains(&Standing::Distrusted), self.is_wanted(tie)) {
            (true, _) => Some(Cause::PeerUntrusted),
            (false, false) => Some(Cause::IdentityMismatch),
            (false, true) => None,
        };
        let state = match (withdrawn, until.min(), tie.state.get()) {
            // It was given its time already.
            (Some(cause), _, State::Leaving(at, before)) if before == cause && at <= now + LAST_REQUESTS => {
                State::Leaving(at, cause)
            }
            (Some(cause), ..) if tie.carried == Carried::Tcp => State::Leaving(now, cause),
            (Some(cause), ..) => State::Leaving(now + LAST_REQUESTS, cause),
            (None, Some(until), _) => {
                let left = until.duration_since(time).unwrap_or_default();
                // Should the clock be set, that is seen in a while.
                let at = if left > BELIEVED { now + BELIEVED * 2 } else { now + left };
                State::Leaving(at, Cause::PeerUntrusted)
            }
            (None, None, _) => State::Good,
        };
        tie.state.set(state);
        if let State::Leaving(at, _) = state {
            let looked_at = if at > now + BELIEVED { now + BELIEVED } else { at };
            self.due.set(Some(self.due.get().map_or(looked_at, |due| due.min(looked_at))));
        }
    }

    /// Whether who answered is still one of those who may.
    fn is_wanted(&self, tie: &Tie) -> bool {
        let Some((id, name)) = &tie.answered else { return true };
        let names = self.names.borrow();
        let list = names.get(name).and_then(|name| name.list.as_ref());
        list.is_none_or(|list| list.contains(id))
    }

    fn end(&self, tie: &Tie, cause: Cause, metrics: &Metrics) {
        let peer = tie.answered.as_ref().map(|(id, _)| id.to_string());
        tracing::info!(reason = %cause, ?peer, carried = ?tie.carried, "an open connection is ended: its peer is not accepted any more");
        metrics.ended_connection(cause);
        if tie.carried == Carried::Tcp {
            self.ended.borrow_mut().insert(tie.cookie, cause);
        }
        // A socket that is not connected any more needs no end.
        let _ = nix::sys::socket::shutdown(tie.socket, nix::sys::socket::Shutdown::Both);
    }
}

/// The service in a server name, `p<port>.<service>.<namespace>.svc.<domain>`.
fn service_of(server_name: &str) -> Option<ServiceName> {
    let mut labels = server_name.split('.').skip(1);
    let (name, namespace) = (labels.next()?, labels.next()?);
    Some(ServiceName { namespace: DnsLabel::parse(namespace).ok()?, name: DnsLabel::parse(name).ok()? })
}

impl Tie {
    /// Whether the socket is still that of this connection. Those of this thread are closed by this thread alone.
    fn is_open(&self) -> bool {
        socket_cookie(self.socket).ok() == Some(self.cookie)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Authority, loopback};
    use sheer_core::snapshot::EndpointSet;

    const NAME: &str = "p8080.web.default.svc.mesh.internal";
    const HOUR: Duration = Duration::from_secs(3600);

    /// A caller's connection to `web`, as the caller's proxy sees it.
    struct Scene {
        ties: Ties,
        credentials: Arc<ArcSwapOption<Credentials>>,
        tie: Rc<Tie>,
        near: Io,
        table: Table,
        metrics: Metrics,
        _far: Io,
    }

    impl Scene {
        async fn new(own: &Arc<Credentials>, peer: &Credentials, carried: Carried) -> Self {
            let credentials: Arc<ArcSwapOption<Credentials>> = Arc::new(Some(own.clone()).into());
            let ties = Ties::new(credentials.clone());
            let (near, far) = loopback().await;
            let dialer = own.dialer();
            let (near, far) = tokio::join!(dialer.meet(near, NAME, carried), peer.accept(far));
            let ((near, id, shown), far) = (near.unwrap(), far.unwrap().io);
            let tie = ties.add(&near, own, &shown, carried, Some((id, NAME.into()))).unwrap();
            let (table, metrics) = Default::default();
            Self { ties, credentials, tie, near, table, metrics, _far: far }
        }

        fn ended(&self) -> bool {
            self.ties.judge(&self.table, &self.metrics);
            let text = self.metrics.exposition();
            let mut counts = text.lines().filter(|line| line.starts_with("sheer_connections_ended_total{"));
            counts.any(|line| !line.ends_with(" 0"))
        }
    }

    /// What becomes of a connection that was made under the old root by both sides, or by one of them.
    #[tokio::test(start_paused = true)]
    async fn connections_follow_what_becomes_of_a_root() {
        let (old, new) = (Authority::new("mesh.internal"), Authority::new("mesh.internal"));
        let both = [&old, &new];
        let later = SystemTime::now() + HOUR;
        let cases = [
            // Own and peer's authority, then whom the own renewed certificate trusts: leaving, ended.
            ("nothing changed", &old, &old, new.credentials_among("api", &both, &[]), false, false),
            ("replaced", &old, &old, new.credentials_among("api", &[&new], &[(&old, later)]), true, false),
            ("only the peer is old", &new, &old, new.credentials_among("api", &[&new], &[(&old, later)]), true, false),
            ("only the own is old", &old, &new, new.credentials_among("api", &[&new], &[]), true, true),
            ("nobody is old", &new, &new, new.credentials_among("api", &[&new], &[]), false, false),
            (
                "its time is over",
                &old,
                &old,
                new.credentials_among("api", &[&new], &[(&old, later - 2 * HOUR)]),
                true,
                true,
            ),
            ("withdrawn", &old, &old, new.credentials_among("api", &[&new], &[]), true, true),
            ("not renewed yet", &old, &old, old.credentials_among("api", &[&new], &[]), false, false),
        ];
        for (what, own, peer, after, leaving, ended) in cases {
            for carried in [Carried::Tcp, Carried::Http1, Carried::Http2] {
                let own = own.credentials_among("api", &both, &[]);
                let scene = Scene::new(&own, &peer.credentials_among("web", &both, &[]), carried).await;
                assert!(!scene.ended() && !scene.tie.is_leaving(), "{what}");
                scene.credentials.store(Some(after.clone()));
                let at_once = scene.ended();
                assert_eq!(scene.tie.is_leaving(), leaving, "{what}, {carried:?}");
                let by_bytes = carried == Carried::Tcp || what == "its time is over";
                assert_eq!(at_once, ended && by_bytes, "{what}, {carried:?}");
                tokio::time::advance(LAST_REQUESTS).await;
                assert_eq!(scene.ended(), ended, "{what}, {carried:?}");
                let reason = (ended && carried == Carried::Tcp).then_some(Cause::PeerUntrusted);
                assert_eq!(scene.ties.why_ended(&scene.near, &scene.table, &scene.metrics), reason, "{what}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_to_somebody_who_is_not_wanted_any_more_ends() {
        let ca = Authority::new("mesh.internal");
        let (own, peer) = (ca.credentials("default", "api"), ca.credentials("default", "web"));
        let scene = Scene::new(&own, &peer, Carried::Tcp).await;
        let web = ServiceName::parse("web").unwrap();
        let told = |accounts: &[&Credentials]| {
            let ids = accounts.iter().map(|it| it.id().clone()).collect();
            scene.table.set(&web, Arc::new(EndpointSet::new(ids, vec![])));
        };
        assert!(!scene.ended(), "nothing is known of the service");
        told(&[&own, &peer]);
        assert!(!scene.ended());
        told(&[&own]);
        assert!(scene.ended());
        assert_eq!(scene.ties.why_ended(&scene.near, &scene.table, &scene.metrics), Some(Cause::IdentityMismatch));
    }

    #[tokio::test]
    async fn closed_connections_are_forgotten() {
        let ca = Authority::new("mesh.internal");
        let (own, peer) = (ca.credentials("default", "api"), ca.credentials("default", "web"));
        let ties = Ties::new(Arc::new(Some(own.clone()).into()));
        for _ in 0..2 * FEW {
            let (near, far) = loopback().await;
            let dialer = own.dialer();
            let (near, far) = tokio::join!(dialer.meet(near, NAME, Carried::Http1), peer.accept(far));
            far.unwrap();
            let (near, _, shown) = near.unwrap();
            ties.add(&near, &own, &shown, Carried::Http1, None).unwrap();
        }
        assert!(ties.open.borrow().len() <= FEW, "{}", ties.open.borrow().len());
    }
}

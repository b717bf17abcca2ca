//! Who asks, and what that allows: peer credentials of the unix socket, join tokens, certificates of ours.

use crate::clock::Clock;
use crate::store::{Store, StoreError, Table, Transaction};
use crate::tls::Certificate;
use aws_lc_rs::constant_time::verify_slices_are_equal;
use ipnet::IpNet;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use sheer_core::api::{TokenRequest, TokenView};
use sheer_core::compile::Compiled;
use sheer_core::identity::SpiffeId;
use sheer_core::name::DnsLabel;
use sheer_core::resource::{Enrollment, Method};
use sheer_core::token::JoinToken;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::time::Instant;
use tonic::{Request, Status};

/// The user id that proxies run as where the host has root and no user `sheer`; see the host side's capture rules.
pub const PROXY_USER: u32 = 64764;

/// The other end of a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// How it is known.
    pub origin: Origin,
    /// Its address; none on the unix socket.
    pub address: Option<SocketAddr>,
    /// What became of the connection.
    pub line: Arc<Line>,
}

/// How a peer is known.
#[derive(Clone, Debug)]
pub enum Origin {
    /// By the kernel: a process of this host.
    Local {
        /// Its user id.
        uid: u32,
    },
    /// By its certificate, if it has one.
    Remote {
        /// Verified against our root; it may have ended.
        certificate: Option<Certificate>,
    },
}

/// What became of a connection.
#[derive(Debug, Default)]
pub struct Line {
    /// The other end closed or reset it. False while it is open, and when it just went silent.
    pub closed: AtomicBool,
    /// This side has let go of it, whatever for.
    pub(crate) dropped: AtomicBool,
    /// In how many milliseconds its proxy was asked to come back; 0: it was let in.
    pub(crate) later_ms: OnceLock<u32>,
}

impl Peer {
    /// The peer of a call.
    ///
    /// # Errors
    /// When the listener did not say, which would be a fault of ours.
    pub fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        request.extensions().get::<Peer>().cloned().ok_or_else(|| Status::internal("the connection has no peer"))
    }

    /// Where it comes from, for people.
    pub fn from(&self) -> String {
        match (&self.origin, self.address) {
            (Origin::Local { uid }, _) => format!("user {uid} of this host"),
            (Origin::Remote { .. }, Some(address)) => address.ip().to_canonical().to_string(),
            (Origin::Remote { .. }, None) => "an unknown address".to_owned(),
        }
    }

    /// Its address, with IPv4 as IPv4; none on the unix socket.
    pub fn ip(&self) -> Option<IpAddr> {
        self.address.map(|address| address.ip().to_canonical())
    }

    /// Whether the connection was closed by the other end, rather than lost.
    pub fn hung_up(&self) -> bool {
        self.line.closed.load(Ordering::Acquire)
    }

    /// Whether this side gave the connection up: it went silent, unless [`Peer::hung_up`].
    pub(crate) fn given_up(&self) -> bool {
        self.line.dropped.load(Ordering::Acquire)
    }
}

/// What was attested when a certificate was issued. It decides what the workload may register, also after a restart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attested {
    /// SPIFFE ID.
    pub identity: String,
    /// SHA-256 of the subject public key info, in hex.
    pub key_sha256: String,
    /// When the certificate ends, in unix seconds.
    pub not_after: i64,
    /// The user id on this host; none for those who came over the network.
    #[serde(default)]
    pub uid: Option<u32>,
    /// Id of the join token.
    #[serde(default)]
    pub token: Option<String>,
    /// The Enrollment that allowed it, `NAMESPACE/NAME`.
    #[serde(default)]
    pub enrollment: Option<String>,
    /// Addresses that may be registered beside the stream's source.
    #[serde(default)]
    pub addresses: Vec<IpNet>,
    /// The number of the root above the certificate.
    #[serde(default = "first_root")]
    pub root: u64,
    /// Whether the workload has ended since: nobody serves with the certificate.
    #[serde(default)]
    pub left: bool,
}

fn first_root() -> u64 {
    1
}

/// Why nobody is let in. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum AttestError {
    /// The peer proves nothing.
    #[error(
        "no join token and no certificate: print a token with `sheer token create -n {namespace} --service-account \
         {account}` on the control plane's host and pass it with --join-token-file"
    )]
    Nobody {
        /// Namespace asked for.
        namespace: String,
        /// Service account asked for.
        account: String,
    },
    /// A user of this host without a grant.
    #[error(
        "user {uid} may not be {id}: the control plane's own user may be anyone in namespace 'default'; others, and \
         other namespaces, need an Enrollment with methods: [{{local: {{users: [{uid}]}}}}]"
    )]
    User {
        /// The user.
        uid: u32,
        /// The identity asked for.
        id: String,
    },
    /// The token cannot be read.
    #[error("{0}")]
    Token(#[from] sheer_core::token::TokenError),
    /// Not a token of ours.
    #[error(
        "the join token is not one of this control plane's: it was made by another one, or before its state was \
         replaced; print a new one with `sheer token create` on this control plane's host"
    )]
    Foreign,
    /// The secret does not match.
    #[error(
        "the join token's secret is wrong; copy the token again, whole, or print a new one with `sheer token create`"
    )]
    Secret,
    /// It has ended.
    #[error("the join token expired {ago} ago; print a new one with `sheer token create` (--ttl makes it last longer)")]
    Expired {
        /// Since when.
        ago: String,
    },
    /// It was used up.
    #[error(
        "the join token was already used by {uses} other key(s), as often as it allows; print a new one with \
         `sheer token create` (--uses allows more)"
    )]
    Spent {
        /// How often.
        uses: u32,
    },
    /// It is for another identity.
    #[error("the join token is for {granted}, not for {asked}; create one with -n and --service-account as needed")]
    OtherIdentity {
        /// What it grants.
        granted: String,
        /// What was asked for.
        asked: String,
    },
    /// It may not be used from there.
    #[error("the join token may not be used from {0}; create one with --from for that network")]
    OtherPlace(IpAddr),
    /// The certificate is for another identity.
    #[error("the certificate is {has}, which cannot be renewed as {asked}; join with a token for that identity")]
    NotRenewable {
        /// The certificate's identity.
        has: String,
        /// What was asked for.
        asked: String,
    },
    /// The certificate has ended and the conditions for renewing it are not met.
    #[error(
        "the certificate has ended, or its root was replaced: then it may be renewed only with its own key and while its \
         workload is on record; join again with a new token"
    )]
    Ended,
    /// Too many wrong tokens.
    #[error("too many wrong join tokens from {0}; wait a minute")]
    Guessing(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl AttestError {
    /// As gRPC sees it.
    pub fn status(&self) -> Status {
        let text = self.to_string();
        match self {
            AttestError::Nobody { .. }
            | AttestError::Token(_)
            | AttestError::Foreign
            | AttestError::Secret
            | AttestError::Expired { .. }
            | AttestError::Spent { .. }
            | AttestError::Ended => Status::unauthenticated(text),
            AttestError::User { .. }
            | AttestError::OtherIdentity { .. }
            | AttestError::OtherPlace(_)
            | AttestError::NotRenewable { .. } => Status::permission_denied(text),
            AttestError::Guessing(_) => Status::resource_exhausted(text),
            AttestError::Store(_) => Status::unavailable(text),
        }
    }
}

/// A join token as it is stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TokenRecord {
    /// SHA-256 of the secret, in hex.
    secret_sha256: String,
    namespace: String,
    /// `*`: any that the Enrollment admits.
    service_account: String,
    expires: i64,
    uses: u32,
    from: Vec<IpNet>,
    enrollment: Option<String>,
    /// Keys that used it, SHA-256 in hex. The same key may use it again until it expires.
    keys: Vec<String>,
}

/// Why a token is not made.
#[derive(Debug, thiserror::Error)]
pub enum TokenRefused {
    /// A part of the request is malformed.
    #[error("{0}")]
    Malformed(String),
    /// It would allow more than one use for ten minutes without an Enrollment that says so.
    #[error(
        "a token for {uses} use(s) and {ttl_s} s is more than one use for ten minutes, and no Enrollment allows it"
    )]
    TooWide {
        /// Uses asked for.
        uses: u32,
        /// Life asked for.
        ttl_s: u64,
        /// An Enrollment that would allow it.
        mend: String,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The life and number of uses that need no Enrollment.
const PLAIN_TTL_S: u64 = 600;
const PLAIN_USES: u32 = 1;

/// Makes a join token. Beyond one use in ten minutes an Enrollment of the namespace with method `token` has to allow it.
///
/// # Errors
/// [`TokenRefused`].
pub fn make_token(
    request: &TokenRequest,
    compiled: &Compiled,
    root_sha256: [u8; 32],
    addresses: Vec<String>,
    now: i64,
) -> Result<(TokenView, TokenRecord), TokenRefused> {
    let malformed = |what: String| TokenRefused::Malformed(what);
    let namespace = DnsLabel::parse(&request.namespace).map_err(|error| malformed(error.to_string()))?;
    let any = request.service_account == "*";
    if !any {
        DnsLabel::parse(&request.service_account).map_err(|error| malformed(error.to_string()))?;
    }
    if request.uses == 0 || request.ttl_s == 0 {
        return Err(malformed("a token needs at least one use and one second".to_owned()));
    }
    let from = request.from.iter().map(|text| parse_net(text)).collect::<Result<Vec<_>, _>>().map_err(malformed)?;
    let plain = !any && request.uses <= PLAIN_USES && request.ttl_s <= PLAIN_TTL_S;
    let allowing = compiled.enrollments.values().find(|enrollment| {
        enrollment.meta.name.namespace == namespace
            && (any || account_admitted(enrollment, &request.service_account))
            && enrollment.methods.iter().any(|method| match method {
                Method::Token { ttl, uses, .. } => request.ttl_s <= ttl.as_secs() && request.uses <= *uses,
                Method::Local { .. } => false,
            })
    });
    if !plain && allowing.is_none() {
        let mend = format!(
            "write an Enrollment in namespace {namespace} with methods: [{{token: {{ttl: {}s, uses: {}}}}}] and \
             serviceAccounts: [{}], or ask for --uses 1 --ttl 10m",
            request.ttl_s,
            request.uses,
            if any { "\"*\"" } else { &request.service_account }
        );
        return Err(TokenRefused::TooWide { uses: request.uses, ttl_s: request.ttl_s, mend });
    }
    let enrollment = if plain { None } else { allowing };
    let expires = now.saturating_add(i64::try_from(request.ttl_s).unwrap_or(i64::MAX));
    let token = JoinToken { id: rand::random(), secret: rand::random(), root_sha256, addresses };
    let record = TokenRecord {
        secret_sha256: crate::ca::hex(&Sha256::digest(token.secret)),
        namespace: namespace.to_string(),
        service_account: request.service_account.clone(),
        expires,
        uses: request.uses,
        from,
        enrollment: enrollment.map(|it| it.meta.name.to_string()),
        keys: Vec::new(),
    };
    Ok((TokenView { token: token.encode(), id: token.id_text(), expires }, record))
}

fn account_admitted(enrollment: &Enrollment, account: &str) -> bool {
    DnsLabel::parse(account).is_ok_and(|account| enrollment.service_accounts.admits(&account))
}

fn parse_net(text: &str) -> Result<IpNet, String> {
    text.parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| format!("'{text}' is neither a network like 10.0.0.0/8 nor an address"))
}

impl TokenRecord {
    /// Stores a new token.
    ///
    /// # Errors
    /// When the store fails.
    pub fn store(&self, transaction: &Transaction<'_>, id: &str) -> Result<(), StoreError> {
        transaction.put(Table::Tokens, id, self)
    }

    /// Whether it has ended.
    pub fn expired(&self, now: i64) -> bool {
        now >= self.expires
    }
}

/// What a token's use is checked against.
#[derive(Clone, Debug)]
pub struct TokenUse {
    /// The token, whole.
    pub token: JoinToken,
    /// The identity asked for.
    pub id: SpiffeId,
    /// Where the joining side is.
    pub source: Option<IpAddr>,
    /// SHA-256 of the joining side's key, in hex.
    pub key_sha256: String,
    /// Now, in unix seconds.
    pub now: i64,
}

/// Checks a token and counts its use. Run inside a transaction, so that of two joins at once only one gets the last use.
///
/// # Errors
/// [`AttestError`]; nothing was written then.
pub fn use_token(
    transaction: &Transaction<'_>,
    wanted: &TokenUse,
    enrollment: impl FnOnce(&str) -> Option<Enrollment>,
) -> Result<TokenRecord, AttestError> {
    let id = wanted.token.id_text();
    let mut record: TokenRecord = transaction.read(Table::Tokens, &id)?.ok_or(AttestError::Foreign)?;
    let secret = crate::ca::hex(&Sha256::digest(wanted.token.secret));
    verify_slices_are_equal(secret.as_bytes(), record.secret_sha256.as_bytes()).map_err(|_| AttestError::Secret)?;
    if record.expired(wanted.now) {
        return Err(AttestError::Expired { ago: for_people(wanted.now - record.expires) });
    }
    let (namespace, account) = (wanted.id.namespace(), wanted.id.service_account());
    let widened = record.enrollment.as_deref().map(enrollment);
    let admitted = match &widened {
        None => record.service_account == account.as_str(),
        // Withdrawn since: what it widened is void.
        Some(None) => false,
        Some(Some(enrollment)) => {
            (record.service_account == "*" || record.service_account == account.as_str())
                && enrollment.service_accounts.admits(account)
        }
    };
    if record.namespace != namespace.as_str() || !admitted {
        let granted = format!("{}/{}", record.namespace, record.service_account);
        return Err(AttestError::OtherIdentity { granted, asked: format!("{namespace}/{account}") });
    }
    let outside = |from: &[IpNet], source: &IpAddr| !from.is_empty() && !from.iter().any(|net| net.contains(source));
    let networks =
        widened.iter().flatten().flat_map(|enrollment| &enrollment.methods).filter_map(|method| match method {
            Method::Token { from, .. } => Some(from.as_slice()),
            Method::Local { .. } => None,
        });
    if let Some(source) = wanted.source
        && networks.chain([record.from.as_slice()]).any(|from| outside(from, &source))
    {
        return Err(AttestError::OtherPlace(source));
    }
    if !record.keys.contains(&wanted.key_sha256) {
        if record.keys.len() >= record.uses as usize {
            return Err(AttestError::Spent { uses: record.uses });
        }
        record.keys.push(wanted.key_sha256.clone());
        transaction.put(Table::Tokens, &id, &record)?;
        if let Some(name) = &record.enrollment {
            let used: u64 = transaction.read(Table::Enrollments, name)?.unwrap_or(0);
            transaction.put(Table::Enrollments, name, &(used + 1))?;
        }
    }
    Ok(record)
}

impl TokenRecord {
    /// The Enrollment that widened it.
    pub fn enrollment(&self) -> Option<&str> {
        self.enrollment.as_deref()
    }

    /// Where it may be used from.
    pub fn networks(&self) -> &[IpNet] {
        &self.from
    }
}

/// Removes tokens that ended a day ago. Until then their use is answered with the reason.
///
/// # Errors
/// When the store fails.
pub async fn forget_tokens(store: &Store, clock: &Clock) -> Result<(), StoreError> {
    let before = clock.unix() - 24 * 3600;
    let ended: Vec<String> = store
        .list::<TokenRecord>(Table::Tokens)?
        .into_iter()
        .filter(|(_, record)| record.expired(before))
        .map(|(id, _)| id)
        .collect();
    if ended.is_empty() {
        return Ok(());
    }
    store.write(move |transaction| ended.iter().try_for_each(|id| transaction.remove(Table::Tokens, id))).await
}

/// The Enrollment by which a user of this host may take an identity.
pub fn local_enrollment<'a>(compiled: &'a Compiled, uid: u32, id: &SpiffeId) -> Option<&'a Enrollment> {
    compiled.enrollments.values().find(|enrollment| {
        &enrollment.meta.name.namespace == id.namespace()
            && enrollment.service_accounts.admits(id.service_account())
            && enrollment.methods.iter().any(|method| match method {
                Method::Local { users } => users.contains(&uid),
                Method::Token { .. } => false,
            })
    })
}

/// A duration for people, of seconds.
pub fn for_people(seconds: i64) -> String {
    match seconds {
        ..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// Counts wrong tokens: after ten within a minute a source has to wait for the minute to end.
#[derive(Default)]
pub struct Guesses {
    sources: Mutex<HashMap<Option<IpAddr>, (Instant, u32)>>,
    total: AtomicU64,
}

const GUESS_WINDOW: Duration = Duration::from_secs(60);
const GUESSES: u32 = 10;
/// Sources remembered at a time; beyond, all new ones count as one.
const GUESS_SOURCES: usize = 4096;

impl Guesses {
    /// Whether a source has to wait.
    pub fn exhausted(&self, source: Option<IpAddr>) -> bool {
        let sources = self.sources.lock();
        let entry = sources.get(&source).or_else(|| sources.get(&None));
        entry.is_some_and(|(since, count)| *count >= GUESSES && since.elapsed() < GUESS_WINDOW)
    }

    /// Counts a wrong token.
    pub fn count(&self, source: Option<IpAddr>) {
        self.total.fetch_add(1, Ordering::Relaxed);
        let mut sources = self.sources.lock();
        if sources.len() >= GUESS_SOURCES {
            sources.retain(|_, (since, _)| since.elapsed() < GUESS_WINDOW);
        }
        let source = if sources.len() >= GUESS_SOURCES { None } else { source };
        let entry = sources.entry(source).or_insert((Instant::now(), 0));
        if entry.0.elapsed() >= GUESS_WINDOW {
            *entry = (Instant::now(), 0);
        }
        entry.1 += 1;
    }

    /// Wrong tokens since the start.
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> TokenRequest {
        TokenRequest {
            namespace: "default".into(),
            service_account: "web".into(),
            ttl_s: 600,
            uses: 1,
            from: vec![],
            control: vec![],
        }
    }

    fn wanted(token: &TokenView, key: &str) -> TokenUse {
        TokenUse {
            token: JoinToken::parse(&token.token).unwrap(),
            id: SpiffeId::parse("spiffe://mesh.internal/ns/default/sa/web").unwrap(),
            source: Some([10, 0, 0, 1].into()),
            key_sha256: key.into(),
            now: 1000,
        }
    }

    struct Fixture {
        store: Store,
        _directory: tempfile::TempDir,
    }

    impl Fixture {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            Self { store: Store::open(directory.path()).unwrap(), _directory: directory }
        }

        fn make(&self, request: &TokenRequest) -> TokenView {
            let (view, record) = make_token(request, &Compiled::default(), [7; 32], vec!["h:1".into()], 1000).unwrap();
            let id = view.id.clone();
            self.store.write_now::<_, StoreError>(move |transaction| record.store(transaction, &id)).unwrap();
            view
        }

        fn take(&self, wanted: TokenUse) -> Result<TokenRecord, AttestError> {
            self.store.write_now(move |transaction| use_token(transaction, &wanted, |_| None))
        }
    }

    #[test]
    fn one_key_may_repeat_another_may_not() {
        let fixture = Fixture::new();
        let token = fixture.make(&request());
        for _ in 0..3 {
            fixture.take(wanted(&token, "a")).unwrap();
        }
        assert!(matches!(fixture.take(wanted(&token, "b")), Err(AttestError::Spent { uses: 1 })));
        fixture.take(wanted(&token, "a")).unwrap();
    }

    #[test]
    fn each_refusal_has_its_reason() {
        let fixture = Fixture::new();
        let token = fixture.make(&TokenRequest { from: vec!["10.0.0.0/8".into()], ..request() });
        let base = || wanted(&token, "a");
        let late = TokenUse { now: 1600, ..base() };
        assert!(matches!(fixture.take(late), Err(AttestError::Expired { .. })));
        let elsewhere = TokenUse { source: Some([192, 168, 0, 1].into()), ..base() };
        assert!(matches!(fixture.take(elsewhere), Err(AttestError::OtherPlace(_))));
        let other = SpiffeId::parse("spiffe://mesh.internal/ns/default/sa/db").unwrap();
        assert!(matches!(fixture.take(TokenUse { id: other, ..base() }), Err(AttestError::OtherIdentity { .. })));
        let mut wrong = base();
        wrong.token.secret[0] ^= 1;
        assert!(matches!(fixture.take(wrong), Err(AttestError::Secret)));
        let mut foreign = base();
        foreign.token.id = [0; 8];
        assert!(matches!(fixture.take(foreign), Err(AttestError::Foreign)));
        fixture.take(base()).unwrap();
    }

    #[test]
    fn more_than_one_use_in_ten_minutes_needs_an_enrollment() {
        for wide in [
            TokenRequest { uses: 2, ..request() },
            TokenRequest { ttl_s: 601, ..request() },
            TokenRequest { service_account: "*".into(), ..request() },
        ] {
            let refused = make_token(&wide, &Compiled::default(), [7; 32], vec![], 0);
            assert!(matches!(refused, Err(TokenRefused::TooWide { .. })), "{wide:?}");
        }
    }

    #[test]
    fn guesses_of_one_source_are_limited() {
        let guesses = Guesses::default();
        let (bad, good) = (Some(IpAddr::from([10, 0, 0, 1])), Some(IpAddr::from([10, 0, 0, 2])));
        for _ in 0..GUESSES {
            assert!(!guesses.exhausted(bad));
            guesses.count(bad);
        }
        assert!(guesses.exhausted(bad) && !guesses.exhausted(good));
        assert_eq!(guesses.total(), u64::from(GUESSES));
    }
}

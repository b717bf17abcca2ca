//! The proxy's certificate: asked for once, renewed before it ends, kept on disk.
//!
//! A stored certificate wins over a join token. It is renewed after half its life, by the wall clock, which is looked at
//! every second: a machine that slept renews as soon as it wakes, also when the certificate has ended meanwhile, with the
//! key it has always had. Where a renewal is refused and there is a token, the workload joins anew.
//!
//! The key is made and stored before it is first used, so that a join that broke off can be repeated with the same key.

mod held;

pub use held::Held;

use crate::control::clients::identity_client::IdentityClient;
use crate::control::{Address, DialError, Outside, Trust, dial};
use crate::metrics::Metrics;
use crate::state::{Directory, IDENTITY, StateError};
use crate::upstream::tls::{Credentials, TlsError};
use arc_swap::ArcSwapOption;
use held::Stored;
use prost::Message;
use rand::Rng;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256};
use sheer_core::token::{JoinToken, TokenError};
use sheer_core::wire::v1;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::{Notify, watch};
use tonic::Code;

/// How often the wall clock is looked at.
const TICK: Duration = Duration::from_secs(1);

/// How long the control plane has for an answer.
const ANSWER: Duration = Duration::from_secs(10);

/// Between attempts: from the first to the last, doubled each time, half of it at random.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LAST_PAUSE: Duration = Duration::from_secs(30);

/// While there is no valid certificate, nothing works: then attempts are not further apart than this.
const LAST_PAUSE_WITHOUT: Duration = Duration::from_secs(2);

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// No connection.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The token file cannot be read.
    #[error("cannot read the join token in {path}: {source}")]
    TokenFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The token cannot be read.
    #[error("the join token in {path} cannot be used: {source}")]
    Token {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: TokenError,
    },
    /// The control plane said no.
    #[error("the control plane at {address} refused a certificate: {message}")]
    Refused {
        /// Which one.
        address: Address,
        /// In its words.
        message: String,
    },
    /// The control plane could not answer.
    #[error("the control plane at {address} gave no certificate: {message}; trying again")]
    Failed {
        /// Which one.
        address: Address,
        /// In its words.
        message: String,
    },
    /// What it sent is not a certificate that was asked for.
    #[error("the control plane at {address} sent a certificate that cannot be used: {source}")]
    Certificate {
        /// Which one.
        address: Address,
        /// What is wrong.
        source: TlsError,
    },
    /// What it sent is somebody else's.
    #[error("the control plane at {address} sent a certificate for {got} instead of {asked}")]
    Other {
        /// Which one.
        address: Address,
        /// Whose.
        got: String,
        /// For whom it was asked.
        asked: String,
    },
    /// The certificate does not hold now.
    #[error(
        "the certificate from {address} does not hold at this machine's time; set the clock here or on the control \
         plane's host, then it goes on by itself"
    )]
    Clock {
        /// Which one.
        address: Address,
    },
    /// The key cannot be made.
    #[error("cannot make a key: {0}")]
    Key(#[from] rcgen::Error),
}

impl IdentityError {
    /// True when another attempt will end in the same way unless somebody mends something.
    fn is_final(&self) -> bool {
        match self {
            IdentityError::TokenFile { .. }
            | IdentityError::Token { .. }
            | IdentityError::Refused { .. }
            | IdentityError::Other { .. }
            | IdentityError::Key(_)
            | IdentityError::Dial(DialError::NoAddress | DialError::NoToken { .. } | DialError::Forbidden { .. }) => {
                true
            }
            IdentityError::Dial(_)
            | IdentityError::Failed { .. }
            | IdentityError::Certificate { .. }
            | IdentityError::Clock { .. } => false,
        }
    }
}

/// Whose certificate is asked for, and of whom.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The namespace.
    pub namespace: String,
    /// The service account.
    pub service_account: String,
    /// The workload's name.
    pub workload: String,
    /// Control planes, in order of preference.
    pub control: Vec<Address>,
    /// A file with a join token.
    pub token_file: Option<PathBuf>,
}

/// Keeps a certificate. See the module.
pub struct Keeper {
    wanted: Wanted,
    directory: Directory,
    stored: Stored,
    held: watch::Sender<Option<Arc<Held>>>,
    published: Arc<ArcSwapOption<Credentials>>,
    trust: watch::Receiver<Option<v1::TrustBundle>>,
    renew: Arc<Notify>,
    /// When it is this one's turn to renew because the root is being replaced.
    turn: Option<SystemTime>,
    metrics: Arc<Metrics>,
    outside: Arc<dyn Outside>,
}

impl Keeper {
    /// Takes a certificate from disk where there is one for this workload, and publishes it. `trust` brings trust bundles
    /// that the control plane announces.
    pub fn new(
        wanted: Wanted,
        directory: Directory,
        published: Arc<ArcSwapOption<Credentials>>,
        trust: watch::Receiver<Option<v1::TrustBundle>>,
        metrics: Arc<Metrics>,
        outside: Arc<dyn Outside>,
    ) -> Self {
        let (held, _) = watch::channel(None);
        let stored = Stored::default();
        let renew = Arc::new(Notify::new());
        let mut keeper =
            Self { wanted, directory, stored, held, published, trust, renew, turn: None, metrics, outside };
        keeper.load();
        keeper
    }

    /// Follows the certificate: `None` until there is one.
    pub fn held(&self) -> watch::Receiver<Option<Arc<Held>>> {
        self.held.subscribe()
    }

    /// Asks for a certificate at once, where a control plane does not know this one.
    pub fn renew(&self) -> Arc<Notify> {
        self.renew.clone()
    }

    /// Gets a certificate and keeps it valid. Returns only when there is none and trying again is no use. Cancel safe:
    /// what was received and not stored is asked for again with the same key.
    pub async fn run(mut self) -> IdentityError {
        let mut failures = 0;
        let mut next = self.outside.now();
        let mut before = next;
        let mut wanted = false;
        // A change of trust is taken while a control plane is asked.
        let mut asking: Option<Asking> = None;
        loop {
            let now = self.outside.now();
            let jumped = now.duration_since(before).map_or(true, |passed| passed > 5 * TICK);
            before = now;
            if jumped {
                next = now;
            }
            let held = self.held.borrow().clone();
            if asking.is_none() && (wanted || self.is_due(held.as_deref(), now)) && now >= next {
                wanted = false;
                asking = match self.key().await {
                    Ok(()) => Some(Box::pin(self.asker(held.as_deref()).certify(held.as_ref().map(|it| it.trust())))),
                    Err(error) => Some(Box::pin(std::future::ready(Err(error)))),
                };
            }
            let wait = next.duration_since(self.outside.now()).map_or(TICK, |left| left.min(TICK));
            // Each arm may be dropped: a sleep holds nothing, receiving is cancel safe, and asking goes on.
            tokio::select! {
                answer = answered(&mut asking) => {
                    asking = None;
                    let taken = answer.and_then(|(address, response)| self.take(&address, *response).map(|()| address));
                    match taken {
                        Ok(address) => {
                            self.save().await;
                            tracing::info!(%address, "certificate issued");
                            // The roots may have become others since the answer was written.
                            wanted = self.held.borrow().as_deref().is_some_and(|held| !held.is_rooted());
                            failures = 0;
                            next = now + LAST_PAUSE_WITHOUT;
                        }
                        Err(error) if held.is_none() && error.is_final() => return error,
                        Err(error) => {
                            wanted = true;
                            failures += 1;
                            next = self.outside.now() + self.after_failure(&error, failures);
                        }
                    }
                }
                () = tokio::time::sleep(wait.max(Duration::from_millis(10))) => {}
                Ok(()) = self.trust.changed() => {
                    let bundle = self.trust.borrow_and_update().clone();
                    if let Some(bundle) = bundle {
                        wanted |= self.adopt(bundle).await;
                    }
                }
                () = self.renew.notified() => wanted = true,
            }
        }
    }

    /// Whether another certificate is to be asked for by itself: none is there, half of its life has passed, or it is its
    /// turn under another root.
    fn is_due(&self, held: Option<&Held>, now: SystemTime) -> bool {
        held.is_none_or(|held| now >= held.renew_at() || self.turn.is_some_and(|turn| now >= turn))
    }

    /// Tells of a failure where that helps, and how long to wait after it.
    fn after_failure(&self, error: &IdentityError, failures: u32) -> Duration {
        let held = self.held.borrow().clone();
        // That nobody answers yet is told by the supervisor, once that lasts.
        let waits = held.is_none() && matches!(error, IdentityError::Dial(DialError::Unreachable { .. }));
        if (failures == 1 && !waits) || u32::is_multiple_of(failures, 10) {
            tracing::warn!("{error}");
        }
        let left = held.and_then(|held| held.not_after().duration_since(self.outside.now()).ok());
        pause(failures, longest_pause(left.unwrap_or_default()))
    }

    fn asker(&self, held: Option<&Held>) -> Asker {
        Asker {
            wanted: self.wanted.clone(),
            outside: self.outside.clone(),
            key: self.stored.key.clone(),
            known: held.map(|held| held.control().to_vec()).unwrap_or_default(),
        }
    }

    fn load(&mut self) {
        let content = match self.directory.load(IDENTITY) {
            Ok(Some(content)) => content,
            Ok(None) => return,
            Err(error) => return tracing::warn!("{error}"),
        };
        let Ok(stored) = Stored::decode(content.as_slice()) else {
            return tracing::warn!("the stored certificate cannot be decoded and is not used");
        };
        if !stored.is_for(&self.wanted) {
            return tracing::warn!(
                "the state directory holds a certificate of another workload; it is not used, and replaced"
            );
        }
        self.stored = stored;
        if self.stored.chain.is_empty() {
            return;
        }
        if let Err(error) = self.publish(self.stored.clone()) {
            tracing::warn!(%error, "the stored certificate is not used");
        }
    }

    fn publish(&mut self, stored: Stored) -> Result<Arc<Held>, TlsError> {
        let held = Arc::new(Held::new(stored)?);
        let credentials = held.credentials()?;
        self.metrics.set_certificate_expires(credentials.not_after());
        self.metrics.set_trust_sequence(held.trust_sequence());
        self.published.store(Some(credentials));
        self.stored = held.stored().clone();
        // Each at its own moment, so that a large fleet does not come at once. A turn that was given stays.
        self.turn = held.renew_within().map(|within| {
            let turn = self.outside.now() + within.mul_f64(rand::rng().random_range(0.0..1.0));
            self.turn.map_or(turn, |given| given.min(turn))
        });
        self.held.send_replace(Some(held.clone()));
        Ok(held)
    }

    /// Takes a changed trust bundle from the control plane. True when the own certificate does not hold under it: the
    /// control plane has begun anew, and issues another.
    async fn adopt(&mut self, bundle: v1::TrustBundle) -> bool {
        let current = self.stored.trust.as_ref();
        if current == Some(&bundle) || current.is_some_and(|it| it.trust_domain != bundle.trust_domain) {
            return false;
        }
        if current.is_some_and(|it| is_newer(it, &bundle)) {
            // It came with a certificate meanwhile.
            return false;
        }
        match self.publish(Stored { trust: Some(bundle), ..self.stored.clone() }) {
            Ok(held) => {
                self.save().await;
                !held.is_rooted()
            }
            Err(error) => {
                tracing::warn!(%error, "the control plane's trust bundle cannot be used");
                false
            }
        }
    }

    async fn save(&self) {
        if let Err(error) = self.directory.keep(IDENTITY, self.stored.encode_to_vec()).await {
            warn_unsaved(&error);
        }
    }

    /// The key, made and stored first where there is none.
    async fn key(&mut self) -> Result<(), IdentityError> {
        if !self.stored.key.is_empty() {
            return Ok(());
        }
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        self.stored = Stored { key: key.serialize_der(), ..Stored::of(&self.wanted) };
        self.save().await;
        Ok(())
    }

    fn take(&mut self, address: &Address, response: v1::CertifyResponse) -> Result<(), IdentityError> {
        // A bundle may have been taken since the answer was written.
        let held = self.stored.trust.clone();
        let trust = match (held, response.trust) {
            (Some(held), Some(told)) if is_newer(&held, &told) => Some(held),
            (_, told) => told,
        };
        let stored = Stored {
            chain: response.chain.iter().map(|it| it.to_vec()).collect(),
            trust,
            mesh: response.mesh,
            uid: response.uid,
            control: response.control,
            ..self.stored.clone()
        };
        let wrong = |source| IdentityError::Certificate { address: address.clone(), source };
        let held = Held::new(stored.clone()).map_err(wrong)?;
        let (got, wanted) = (held.id(), &self.wanted);
        if got.namespace().as_str() != wanted.namespace || got.service_account().as_str() != wanted.service_account {
            return Err(IdentityError::Other {
                address: address.clone(),
                got: got.to_string(),
                asked: format!("ns/{}/sa/{}", wanted.namespace, wanted.service_account),
            });
        }
        if !held.holds_at(self.outside.now()) {
            return Err(IdentityError::Clock { address: address.clone() });
        }
        self.publish(stored).map_err(wrong)?;
        Ok(())
    }
}

/// An answer under way.
type Asking = Pin<Box<dyn Future<Output = Result<(Address, Box<v1::CertifyResponse>), IdentityError>> + Send>>;

/// Waits for an answer; for ever where none is under way.
async fn answered(asking: &mut Option<Asking>) -> Result<(Address, Box<v1::CertifyResponse>), IdentityError> {
    match asking {
        Some(asking) => asking.await,
        None => std::future::pending().await,
    }
}

/// Whether a bundle is of a later time than another one of the same control plane.
fn is_newer(one: &v1::TrustBundle, other: &v1::TrustBundle) -> bool {
    one.sequence > other.sequence && one.roots.iter().any(|root| other.roots.contains(root))
}

/// Asks control planes for a certificate: all that it needs, so that the keeper can do something else meanwhile.
struct Asker {
    wanted: Wanted,
    outside: Arc<dyn Outside>,
    /// PKCS #8.
    key: Vec<u8>,
    /// Control planes that were named with the certificate before.
    known: Vec<String>,
}

impl Asker {
    async fn certify(self, own: Option<Trust>) -> Result<(Address, Box<v1::CertifyResponse>), IdentityError> {
        let has_own = own.is_some();
        match self.ask_each(own).await {
            // The own certificate is no use any more; a token may be.
            Err(error @ (IdentityError::Refused { .. } | IdentityError::Dial(DialError::Untrusted { .. })))
                if has_own =>
            {
                if self.wanted.token_file.is_none() {
                    return Err(error);
                }
                tracing::warn!("{error}; joining anew with the token");
                self.ask_each(None).await
            }
            other => other,
        }
    }

    /// Asks every control plane in turn until one answers.
    async fn ask_each(&self, own: Option<Trust>) -> Result<(Address, Box<v1::CertifyResponse>), IdentityError> {
        let mut addresses = self.wanted.control.clone();
        let known = self.known.iter().filter_map(|text| Address::parse(text).ok());
        let mut token = None;
        if own.is_none()
            && let Some(path) = &self.wanted.token_file
        {
            let (text, parsed) = read_token(path).await?;
            let named = parsed.addresses.iter().filter_map(|text| Address::parse(text).ok());
            addresses.extend(named);
            token = Some((text, Trust::Pin(parsed.root_sha256)));
        } else {
            addresses.extend(known);
        }
        let mut last = IdentityError::Dial(DialError::NoAddress);
        let mut asked: Vec<Address> = Vec::new();
        for address in addresses {
            if asked.contains(&address) {
                continue;
            }
            let (text, trust) = match (&address, &token) {
                (Address::Unix(_), _) => (String::new(), None),
                (Address::Tcp(_), Some((text, pin))) => (text.clone(), Some(pin.clone())),
                (Address::Tcp(_), None) => (String::new(), own.clone()),
            };
            match self.ask(&address, trust.as_ref(), text).await {
                Ok(response) => return Ok((address, Box::new(response))),
                Err(error @ IdentityError::Refused { .. }) => return Err(error),
                Err(error) => last = error,
            }
            asked.push(address);
        }
        Err(last)
    }

    async fn ask(
        &self,
        address: &Address,
        trust: Option<&Trust>,
        token: String,
    ) -> Result<v1::CertifyResponse, IdentityError> {
        let channel = dial(&self.outside, address, trust).await?;
        let key = KeyPair::try_from(self.key.as_slice())?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let request = v1::CertifyRequest {
            csr: params.serialize_request(&key)?.der().to_vec().into(),
            token,
            namespace: self.wanted.namespace.clone(),
            service_account: self.wanted.service_account.clone(),
            workload: self.wanted.workload.clone(),
        };
        let mut client = IdentityClient::new(channel);
        let failed = |message: String| IdentityError::Failed { address: address.clone(), message };
        match tokio::time::timeout(ANSWER, client.certify(request)).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(explain(address, &status)),
            Err(_) => Err(failed(format!("no answer within {} s", ANSWER.as_secs()))),
        }
    }
}

async fn read_token(path: &std::path::Path) -> Result<(String, JoinToken), IdentityError> {
    let text = tokio::fs::read_to_string(path)
        .await
        .map_err(|source| IdentityError::TokenFile { path: path.to_owned(), source })?;
    let text = text.trim().to_owned();
    let token = JoinToken::parse(&text).map_err(|source| IdentityError::Token { path: path.to_owned(), source })?;
    Ok((text, token))
}

fn explain(address: &Address, status: &tonic::Status) -> IdentityError {
    let (address, message) = (address.clone(), status.message().to_owned());
    match status.code() {
        Code::Unauthenticated
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::OutOfRange => IdentityError::Refused { address, message },
        Code::Unimplemented => {
            let message = "what answers there is no control plane of this mesh; mend --control".to_owned();
            IdentityError::Failed { address, message }
        }
        code => {
            let message = if message.is_empty() { code.to_string() } else { message };
            IdentityError::Failed { address, message }
        }
    }
}

fn warn_unsaved(error: &StateError) {
    tracing::warn!("{error}; the proxy goes on, and would need the control plane after a restart");
}

/// The longest pause while the certificate still holds for this long: there are several attempts before it ends, however
/// short its life.
fn longest_pause(left: Duration) -> Duration {
    (left / 4).clamp(LAST_PAUSE_WITHOUT, LAST_PAUSE)
}

/// The pause after this many failures, one at least: half of it fixed, half at random.
fn pause(failures: u32, last: Duration) -> Duration {
    let whole = FIRST_PAUSE.saturating_mul(1 << (failures - 1).min(16)).min(last);
    whole.mul_f64(rand::rng().random_range(0.5..=1.0))
}

#[cfg(test)]
mod tests;

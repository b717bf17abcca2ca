//! The mesh hop's TLS: version 1.3 alone, post-quantum key exchange first, certificates on both sides, SPIFFE identities.
//!
//! [`Credentials`] are what one certificate and one trust bundle make. They are replaced as a whole on renewal and on a
//! change of trust: new connections use the new ones, open connections stay. Ticket keys belong to the credentials, so
//! that no session outlives the trust it was made under, and a client's sessions end with its certificate.

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;

use super::ties::{Standing, Tie};
use crate::certificate::{Presented, Rule, Verifier, invalid, leads_to};
use crate::io::Io;
use crate::tls::{self, Met};
use rustls::client::{ClientSessionMemoryCache, Resumption};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, TrustAnchor};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{AlertDescription, CertificateError, ClientConfig, HandshakeKind, ServerConfig};
use sheer_core::cause::Cause;
use sheer_core::identity::{IdentityError, SpiffeId};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::net::TcpStream;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// What a mesh connection carries. The client side has decided it; the server side never detects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Carried {
    /// HTTP/1.
    Http1,
    /// HTTP/2.
    Http2,
    /// Bytes, the application's own TLS among them.
    Tcp,
}

impl Carried {
    const ALL: [Carried; 3] = [Carried::Http1, Carried::Http2, Carried::Tcp];

    /// The protocol name in the handshake (ALPN).
    pub const fn alpn(self) -> &'static [u8] {
        match self {
            Carried::Http1 => b"sheer/1+h1",
            Carried::Http2 => b"sheer/1+h2",
            Carried::Tcp => sheer_core::sniff::MESH_ALPN_BYTES,
        }
    }

    /// The protocol of this name.
    pub fn of_alpn(name: &[u8]) -> Option<Carried> {
        Self::ALL.into_iter().find(|carried| carried.alpn() == name)
    }
}

/// Why credentials cannot be made, or a handshake did not end in a mesh connection.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// There is no certificate in the chain.
    #[error("the certificate chain is empty")]
    NoCertificate,
    /// A certificate does not parse.
    #[error("the certificate does not parse")]
    Malformed,
    /// The certificate names no workload, or more than one.
    #[error("the certificate must have exactly one URI name, it has {0}")]
    Names(usize),
    /// The certificate's URI is no workload identity.
    #[error("the certificate's name is no workload identity: {0}")]
    Identity(#[from] IdentityError),
    /// The certificate is of another trust domain.
    #[error("the certificate is of trust domain '{0}'")]
    TrustDomain(String),
    /// A resumed session's certificate has expired.
    #[error("the resumed session's certificate has expired")]
    Expired,
    /// The peer chose no protocol of ours.
    #[error("the peer speaks no protocol of the mesh")]
    Protocol,
    /// TLS itself: keys that do not fit, a peer that is not trusted, a broken handshake.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// The connection broke during the handshake.
    #[error("the connection broke during the handshake: {0}")]
    Io(std::io::Error),
}

impl TlsError {
    fn of_handshake(error: std::io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(tls) => TlsError::Tls(tls.clone()),
            None => TlsError::Io(error),
        }
    }

    /// Why a handshake failed. What this mesh asks of a certificate beyond its chain is [`CertificateError::Other`], as
    /// is what webpki says of a certificate that chains and is none of a workload.
    pub fn cause(&self) -> Cause {
        match self {
            TlsError::Tls(rustls::Error::InvalidCertificate(reason)) => match reason {
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => Cause::PeerExpired,
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => Cause::PeerNotYetValid,
                CertificateError::Other(_) => Cause::PeerNoWorkload,
                _ => Cause::PeerUntrusted,
            },
            TlsError::Tls(rustls::Error::NoCertificatesPresented) | TlsError::NoCertificate => Cause::PeerAnonymous,
            TlsError::Tls(rustls::Error::AlertReceived(
                AlertDescription::BadCertificate
                | AlertDescription::UnsupportedCertificate
                | AlertDescription::CertificateRevoked
                | AlertDescription::CertificateExpired
                | AlertDescription::CertificateUnknown
                | AlertDescription::UnknownCA
                | AlertDescription::AccessDenied
                | AlertDescription::DecryptError
                | AlertDescription::CertificateRequired,
            )) => Cause::IdentityRefused,
            TlsError::Malformed | TlsError::Names(_) | TlsError::Identity(_) | TlsError::TrustDomain(_) => {
                Cause::PeerNoWorkload
            }
            TlsError::Expired => Cause::PeerExpired,
            TlsError::Tls(_) | TlsError::Protocol | TlsError::Io(_) => Cause::TlsFailed,
        }
    }
}

/// A certificate, its key and the trust bundle, ready for connections in both directions.
pub struct Credentials {
    id: SpiffeId,
    not_after: SystemTime,
    server: Arc<ServerConfig>,
    client: ClientConfig,
    chain: Vec<CertificateDer<'static>>,
    anchors: Vec<TrustAnchor<'static>>,
    retired: Vec<(TrustAnchor<'static>, SystemTime)>,
    settled: bool,
}

impl Credentials {
    /// Credentials of a chain (leaf first), its key, and the roots of the trust domain.
    ///
    /// # Errors
    /// When the chain names no workload of the trust domain, the key does not belong to it, or a root does not parse.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        trust_domain: &str,
        roots: &[CertificateDer<'static>],
    ) -> Result<Arc<Self>, TlsError> {
        Self::with_retired(chain, key, trust_domain, roots, &[])
    }

    /// The same with roots that were replaced: connections made under one may go on until its time.
    ///
    /// # Errors
    /// When the chain names no workload of the trust domain, the key does not belong to it, or a root does not parse.
    pub fn with_retired(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        trust_domain: &str,
        roots: &[CertificateDer<'static>],
        retired: &[(CertificateDer<'static>, SystemTime)],
    ) -> Result<Arc<Self>, TlsError> {
        let leaf = Leaf::read(chain.first().ok_or(TlsError::NoCertificate)?)?;
        if leaf.id.trust_domain() != trust_domain {
            return Err(TlsError::TrustDomain(leaf.id.trust_domain().to_owned()));
        }
        let provider = Arc::new(provider());
        let workloads = Workloads::of(trust_domain, roots)?;
        let anchors = workloads.anchors.clone();
        let verifier = Arc::new(Verifier::new(workloads, &provider));
        let certificate = Arc::new(SingleCertAndKey::from(CertifiedKey::from_der(chain.clone(), key, &provider)?));
        let anchor = |(root, until): &(CertificateDer<'static>, SystemTime)| Ok((anchor_of(root)?, *until));
        Ok(Arc::new(Self {
            server: Arc::new(server_config(&provider, &verifier, &certificate)?),
            client: client_config(&provider, verifier, certificate)?,
            id: leaf.id,
            not_after: leaf.not_after,
            settled: leads_to(&chain, &anchors),
            retired: retired.iter().map(anchor).collect::<Result<_, TlsError>>()?,
            chain,
            anchors,
        }))
    }

    /// The own chain, leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// Whether the own certificate is under one of the roots.
    pub fn is_settled(&self) -> bool {
        self.settled
    }

    /// What becomes of connections that were made under the certificate of this chain. Its time does not matter.
    pub fn standing_of(&self, chain: &[CertificateDer<'_>]) -> Standing {
        if leads_to(chain, &self.anchors) {
            return Standing::Trusted;
        }
        // By its issuer alone: a root that was withdrawn may have been certified by one that was replaced in order.
        let direct = &chain[..chain.len().min(2)];
        let retired = self.retired.iter().filter(|(root, _)| leads_to(direct, std::slice::from_ref(root)));
        retired.map(|(_, until)| *until).max().map_or(Standing::Distrusted, Standing::Retired)
    }

    /// The workload's own identity.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// When the certificate expires.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// What rustls is given on both sides.
    #[cfg(test)]
    pub(crate) fn configs(&self) -> (Arc<ServerConfig>, Arc<ClientConfig>) {
        (self.server.clone(), Arc::new(self.client.clone()))
    }

    /// How one endpoint is dialled: its sessions are kept here and nowhere else.
    pub fn dialer(&self) -> Dialer {
        let mut base = self.client.clone();
        base.resumption = Resumption::store(Arc::new(ClientSessionMemoryCache::new(1)));
        Dialer {
            configs: Carried::ALL.map(|carried| {
                let mut config = base.clone();
                config.alpn_protocols = vec![carried.alpn().to_vec()];
                Arc::new(config)
            }),
        }
    }

    /// Accepts a mesh connection.
    ///
    /// # Errors
    /// When the handshake fails, or the peer is no workload of this trust domain.
    pub async fn accept(&self, stream: TcpStream) -> Result<Accepted, TlsError> {
        let (stream, met) = tls::accept(stream, self.server.clone()).await.map_err(TlsError::of_handshake)?;
        let leaf = peer_of(&met)?;
        let carried = met.alpn.as_deref().and_then(Carried::of_alpn).ok_or(TlsError::Protocol)?;
        let server_name = met.server_name.unwrap_or_default();
        let shown = met.certificates;
        Ok(Accepted { peer: leaf.id, shown, server_name, carried, io: Io::Tls(Box::new(stream)) })
    }
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("id", &self.id).field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

/// A connection from a mesh peer.
pub struct Accepted {
    /// The connection.
    pub io: Io,
    /// Who is at the other end.
    pub peer: SpiffeId,
    /// The chain that it showed, leaf first.
    pub shown: Vec<CertificateDer<'static>>,
    /// The server name that was asked for: it names the workload's port.
    pub server_name: String,
    /// What the connection carries.
    pub carried: Carried,
}

/// Who answered on a connection to a mesh peer. It belongs to that connection alone: an address may change hands while
/// connections to whoever had it before are open.
#[derive(Debug)]
pub struct Answered {
    id: SpiffeId,
    /// The list in which it was found last.
    list: Arc<[SpiffeId]>,
    tie: Option<Rc<Tie>>,
}

impl Answered {
    /// This identity, which is one of the list.
    pub fn new(id: SpiffeId, list: Arc<[SpiffeId]>) -> Self {
        Self { id, list, tie: None }
    }

    /// The same of a connection that is judged again while it is open.
    pub fn tied(self, tie: Option<Rc<Tie>>) -> Self {
        Self { tie, ..self }
    }

    /// Whether it is one of these, and its connection may be used for more. It costs a comparison of pointers until the
    /// list is replaced.
    pub fn is_one_of(&mut self, identities: &Arc<[SpiffeId]>) -> bool {
        if self.tie.as_ref().is_some_and(|tie| tie.is_leaving()) {
            return false;
        }
        if Arc::ptr_eq(&self.list, identities) {
            return true;
        }
        let is = identities.contains(&self.id);
        if is {
            self.list = identities.clone();
        }
        is
    }
}

/// How one endpoint is dialled. Keeps that endpoint's sessions for resumption.
pub struct Dialer {
    configs: [Arc<ClientConfig>; 3],
}

impl Dialer {
    /// Makes a mesh connection of a TCP connection and says who answered. The caller decides whether that identity is
    /// one of the service's.
    ///
    /// # Errors
    /// When the handshake fails, or the peer is no workload of this trust domain.
    pub async fn connect(
        &self,
        stream: TcpStream,
        server_name: &str,
        carried: Carried,
    ) -> Result<(Io, SpiffeId), TlsError> {
        self.meet(stream, server_name, carried).await.map(|(io, id, _)| (io, id))
    }

    /// The same, with the chain that was shown, leaf first.
    ///
    /// # Errors
    /// The same.
    pub async fn meet(
        &self,
        stream: TcpStream,
        server_name: &str,
        carried: Carried,
    ) -> Result<(Io, SpiffeId, Vec<CertificateDer<'static>>), TlsError> {
        let (stream, met) = self.shake_hands(stream, server_name, carried).await?;
        if met.alpn.as_deref() != Some(carried.alpn()) {
            return Err(TlsError::Protocol);
        }
        let leaf = peer_of(&met)?;
        Ok((Io::Tls(Box::new(stream)), leaf.id, met.certificates))
    }

    async fn shake_hands(
        &self,
        stream: TcpStream,
        server_name: &str,
        carried: Carried,
    ) -> Result<(tls::Stream, Met), TlsError> {
        let name = ServerName::try_from(server_name.to_owned())
            .map_err(|_| TlsError::Tls(rustls::Error::General(format!("'{server_name}' is no server name"))))?;
        let config = match carried {
            Carried::Http1 => &self.configs[0],
            Carried::Http2 => &self.configs[1],
            Carried::Tcp => &self.configs[2],
        };
        tls::connect(stream, name, config.clone()).await.map_err(TlsError::of_handshake)
    }
}

/// Rustls checks the certificate of a full handshake; one that a session remembers may have expired since.
fn peer_of(met: &Met) -> Result<Leaf, TlsError> {
    let leaf = Leaf::read(met.certificates.first().ok_or(TlsError::NoCertificate)?)?;
    if met.kind == Some(HandshakeKind::Resumed) && leaf.not_after <= SystemTime::now() {
        return Err(TlsError::Expired);
    }
    Ok(leaf)
}

/// The algorithms of the mesh hop. AES-128-GCM goes first: the hop's strength is P-256's, and it is the cheapest.
fn provider() -> CryptoProvider {
    use aws_lc_rs::{cipher_suite, kx_group};
    CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1],
        ..aws_lc_rs::default_provider()
    }
}

fn server_config(
    provider: &Arc<CryptoProvider>,
    verifier: &Arc<Verifier<Workloads>>,
    certificate: &Arc<SingleCertAndKey>,
) -> Result<ServerConfig, TlsError> {
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier.clone())
        .with_cert_resolver(Arc::new(Named(certificate.clone())));
    config.alpn_protocols = Carried::ALL.map(|carried| carried.alpn().to_vec()).to_vec();
    config.enable_secret_extraction = true;
    config.ticketer = aws_lc_rs::Ticketer::new()?;
    config.max_early_data_size = 0;
    Ok(config)
}

fn client_config(
    provider: &Arc<CryptoProvider>,
    verifier: Arc<Verifier<Workloads>>,
    certificate: Arc<SingleCertAndKey>,
) -> Result<ClientConfig, TlsError> {
    let mut config = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(certificate);
    config.enable_secret_extraction = true;
    config.enable_early_data = false;
    Ok(config)
}

/// The server's one certificate, whatever name the client asks for; the name is what says which port it wants.
#[derive(Debug)]
struct Named(Arc<SingleCertAndKey>);

impl ResolvesServerCert for Named {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        tls::asked_for(hello.server_name());
        ResolvesServerCert::resolve(&*self.0, hello)
    }
}

/// What the mesh reads of a peer's certificate.
struct Leaf {
    id: SpiffeId,
    not_after: SystemTime,
}

impl Leaf {
    /// Reads the one URI name (X.509-SVID, section 2) and the expiry. Says nothing about trust.
    fn read(certificate: &CertificateDer<'_>) -> Result<Self, TlsError> {
        let (rest, parsed) = X509Certificate::from_der(certificate).map_err(|_| TlsError::Malformed)?;
        if !rest.is_empty() || parsed.is_ca() {
            return Err(TlsError::Malformed);
        }
        let names = parsed.subject_alternative_name().map_err(|_| TlsError::Malformed)?;
        let mut uris = names.iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
        let (Some(uri), None) = (uris.next(), uris.next()) else {
            let all = names.iter().flat_map(|names| &names.value.general_names);
            return Err(TlsError::Names(all.filter(|name| matches!(name, GeneralName::URI(_))).count()));
        };
        let seconds = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0);
        Ok(Self { id: SpiffeId::parse(uri)?, not_after: SystemTime::UNIX_EPOCH + Duration::from_secs(seconds) })
    }
}

/// Admits the workloads of one trust domain: a chain to one of its roots, the right usage, one workload identity.
#[derive(Debug)]
struct Workloads {
    trust_domain: String,
    anchors: Vec<TrustAnchor<'static>>,
}

impl Workloads {
    fn of(trust_domain: &str, roots: &[CertificateDer<'static>]) -> Result<Self, TlsError> {
        let anchors = roots.iter().map(anchor_of).collect::<Result<_, _>>()?;
        Ok(Self { trust_domain: trust_domain.to_owned(), anchors })
    }
}

fn anchor_of(root: &CertificateDer<'static>) -> Result<TrustAnchor<'static>, TlsError> {
    let anchor = webpki::anchor_from_trusted_cert(root).map_err(|_| TlsError::Malformed)?;
    Ok(anchor.to_owned())
}

impl Rule for Workloads {
    fn admit(&self, presented: &Presented<'_>) -> Result<(), rustls::Error> {
        presented.chains_to(&self.anchors)?;
        let read = Leaf::read(presented.leaf).map_err(|error| invalid(Arc::new(error)))?;
        if read.id.trust_domain() != self.trust_domain {
            return Err(invalid(Arc::new(TlsError::TrustDomain(read.id.trust_domain().to_owned()))));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Authority, loopback};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const NAME: &str = "p8080.web.default.svc.mesh.internal";

    async fn meet(
        client: &Credentials,
        server: &Credentials,
    ) -> (Result<(Io, SpiffeId), TlsError>, Result<Accepted, TlsError>) {
        let (near, far) = loopback().await;
        let dialer = client.dialer();
        tokio::join!(dialer.connect(near, NAME, Carried::Http2), server.accept(far))
    }

    #[test]
    fn who_answered_is_asked_for_again_when_the_list_changes() {
        let list = |names: &[&str]| -> Arc<[SpiffeId]> {
            names.iter().map(|name| SpiffeId::parse(&format!("spiffe://td/ns/a/sa/{name}")).unwrap()).collect()
        };
        let web = list(&["web"]);
        let mut answered = Answered::new(web[0].clone(), web.clone());
        assert!(answered.is_one_of(&web) && answered.is_one_of(&list(&["other", "web"])));
        assert!(!answered.is_one_of(&list(&["other"])) && !answered.is_one_of(&list(&[])));
        assert!(answered.is_one_of(&web), "a request that began before the change may end there");
    }

    #[tokio::test]
    async fn both_sides_know_each_other() {
        let ca = Authority::new("mesh.internal");
        let (web, api) = (ca.credentials("default", "web"), ca.credentials("default", "api"));
        let (near, far) = meet(&api, &web).await;
        let ((mut io, answered), accepted) = (near.unwrap(), far.unwrap());
        assert_eq!(answered, *web.id());
        assert_eq!((&accepted.peer, accepted.carried, &*accepted.server_name), (api.id(), Carried::Http2, NAME));
        io.write_all(b"x").await.unwrap();
        let (near, far) = loopback().await;
        let dialer = api.dialer();
        let (near, _) = tokio::join!(dialer.shake_hands(near, NAME, Carried::Http2), web.accept(far));
        assert_eq!(near.unwrap().1.group, Some(rustls::NamedGroup::X25519MLKEM768));
    }

    #[tokio::test]
    async fn sessions_are_resumed_and_the_peer_is_still_known() {
        let ca = Authority::new("mesh.internal");
        let (web, api) = (ca.credentials("default", "web"), ca.credentials("default", "api"));
        let dialer = api.dialer();
        let mut kinds = Vec::new();
        for _ in 0..2 {
            let (near, far) = loopback().await;
            let (near, far) = tokio::join!(dialer.shake_hands(near, NAME, Carried::Http1), web.accept(far));
            let ((mut near, met), mut far) = (near.unwrap(), far.unwrap());
            assert_eq!((&peer_of(&met).unwrap().id, &far.peer), (web.id(), api.id()));
            assert_eq!(far.server_name, NAME);
            kinds.push(met.kind.unwrap());
            // The ticket follows the handshake: it arrives with the first bytes.
            far.io.write_all(b"x").await.unwrap();
            far.io.flush().await.unwrap();
            near.read_u8().await.unwrap();
        }
        assert_eq!(kinds[1], HandshakeKind::Resumed, "{kinds:?}");
        // Renewed credentials know nothing of old sessions.
        let renewed = ca.credentials("default", "web");
        let (near, far) = loopback().await;
        let (near, far) = tokio::join!(dialer.shake_hands(near, NAME, Carried::Http1), renewed.accept(far));
        assert_ne!(near.unwrap().1.kind, Some(HandshakeKind::Resumed));
        far.unwrap();
    }

    #[tokio::test]
    async fn strangers_are_refused_on_both_sides() {
        let ca = Authority::new("mesh.internal");
        let web = ca.credentials("default", "web");
        for stranger in [
            Authority::new("mesh.internal").credentials("default", "api"),
            Authority::new("other.example").credentials("default", "api"),
            ca.certify("mesh.internal", |params| params.not_after = rcgen::date_time_ymd(2020, 1, 2)),
            ca.certify("mesh.internal", |params| params.not_before = rcgen::date_time_ymd(2200, 1, 1)),
            ca.certify("mesh.internal", |params| {
                params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::TimeStamping];
            }),
        ] {
            let (_, far) = meet(&stranger, &web).await;
            assert!(far.is_err(), "{stranger:?} came in");
            let (near, _) = meet(&web, &stranger).await;
            assert_ne!(near.unwrap_err().cause(), Cause::TlsFailed, "{stranger:?} was talked to");
        }
    }

    #[test]
    fn certificates_name_exactly_one_workload() {
        let ca = Authority::new("mesh.internal");
        let uri = |text: &str| rcgen::SanType::URI(text.try_into().unwrap());
        let two = ["spiffe://mesh.internal/ns/default/sa/a", "spiffe://mesh.internal/ns/default/sa/b"].map(uri);
        for names in [
            vec![],
            two.to_vec(),
            vec![uri("spiffe://MESH.internal/ns/default/sa/a")],
            vec![uri("spiffe://mesh.internal/ns/default/sa/a/")],
            vec![uri("spiffe://other/ns/default/sa/a")],
        ] {
            assert!(ca.try_certify("mesh.internal", |params| params.subject_alt_names = names.clone()).is_err());
        }
        assert!(
            ca.try_certify("mesh.internal", |params| params.is_ca =
                rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained))
                .is_err()
        );
    }
}

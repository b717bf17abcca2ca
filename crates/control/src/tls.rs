//! The TLS of the proxies' door: TLS 1.3, our own certificate, and client certificates verified against our roots.
//!
//! A client certificate is optional, since a joining proxy has none. One that has ended is let through the handshake for
//! as long as it may still be renewed; [`Certificate::expired`] then keeps it out of everything but `Certify`.

use crate::ca::{Authority, hex};
use crate::clock::Clock;
use crate::seldom::Seldom;
use arc_swap::ArcSwapOption;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, UnixTime};
use sha2::{Digest, Sha256};
use sheer_core::identity::SpiffeId;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// By how much the door's own certificate is back-dated, in seconds; see `ca`.
const BACKDATE_S: i64 = 15 * 60;
/// Certificates that a client may send above its own.
const MAX_CHAIN: usize = 4;

/// A verified client certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// Its identity.
    pub id: SpiffeId,
    /// When it ends, in unix seconds.
    pub not_after: i64,
    /// SHA-256 of its subject public key info, in hex.
    pub key_sha256: String,
    /// The number of its root.
    pub root: u64,
    /// Whether that is trusted. Under one that was replaced it can be renewed, and nothing else.
    pub trusted: bool,
}

impl Certificate {
    /// Whether it has ended.
    pub fn expired(&self, now: i64) -> bool {
        now >= self.not_after
    }
}

/// Why a client certificate is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// It cannot be read.
    #[error("the client certificate cannot be read")]
    Malformed,
    /// Its chain is longer than four.
    #[error("the client sent more than {MAX_CHAIN} certificates above its own")]
    TooLong,
    /// It is not a workload's.
    #[error("the client certificate holds no single SPIFFE ID of a workload")]
    NoIdentity,
    /// It does not verify against our roots.
    #[error("the client certificate does not verify: {0}")]
    Untrusted(webpki::Error),
}

/// Verifies a client's certificate. One that ended at most `grace` ago verifies as of its last second.
///
/// # Errors
/// [`PeerError`].
pub fn verify(
    roots: &[CertificateDer<'_>],
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: i64,
    grace: Duration,
) -> Result<Certificate, PeerError> {
    if intermediates.len() > MAX_CHAIN {
        return Err(PeerError::TooLong);
    }
    let certificate = identity_of(leaf)?;
    let anchors: Vec<_> =
        roots.iter().map(webpki::anchor_from_trusted_cert).collect::<Result<_, _>>().map_err(PeerError::Untrusted)?;
    let grace = i64::try_from(grace.as_secs()).unwrap_or(i64::MAX);
    let as_of = if certificate.expired(now) && now <= certificate.not_after.saturating_add(grace) {
        certificate.not_after - 1
    } else {
        now
    };
    let as_of = UnixTime::since_unix_epoch(Duration::from_secs(as_of.try_into().unwrap_or(0)));
    let usage = KeyUsage::client_auth();
    EndEntityCert::try_from(leaf)
        .and_then(|leaf| {
            let chain = leaf.verify_for_usage(
                aws_lc_rs::default_provider().signature_verification_algorithms.all,
                &anchors,
                intermediates,
                as_of,
                usage,
                None,
                None,
            );
            chain.map(|_| ())
        })
        .map_err(PeerError::Untrusted)?;
    Ok(certificate)
}

/// Whether a leaf's chain ends in this root, whatever the time.
pub(crate) fn chains(root: &CertificateDer<'_>, leaf: &CertificateDer<'_>, above: &[CertificateDer<'_>]) -> bool {
    let Ok(certificate) = identity_of(leaf) else { return false };
    let as_of = certificate.not_after - 1;
    verify(std::slice::from_ref(root), leaf, above, as_of, Duration::ZERO).is_ok()
}

/// The identity in a leaf (X.509-SVID, sections 2 and 4): exactly one URI, a workload's SPIFFE ID; no authority.
fn identity_of(leaf: &CertificateDer<'_>) -> Result<Certificate, PeerError> {
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| PeerError::Malformed)?;
    let names = parsed.subject_alternative_name().map_err(|_| PeerError::NoIdentity)?;
    let names = &names.ok_or(PeerError::NoIdentity)?.value.general_names;
    let [GeneralName::URI(uri)] = names.as_slice() else { return Err(PeerError::NoIdentity) };
    if parsed.is_ca() {
        return Err(PeerError::NoIdentity);
    }
    Ok(Certificate {
        id: SpiffeId::parse(uri).map_err(|_| PeerError::NoIdentity)?,
        not_after: parsed.validity().not_after.timestamp(),
        key_sha256: hex(&Sha256::digest(parsed.public_key().raw)),
        root: 0,
        trusted: true,
    })
}

/// What the door needs to know of the mesh and may change while it is open.
pub struct Door {
    authority: Arc<Authority>,
    clock: Clock,
    /// How long after its end a certificate may be renewed, in seconds.
    pub grace_s: AtomicU64,
    /// The server name, `control.<trust domain>`.
    name: String,
    certificate: ArcSwapOption<(CertifiedKey, i64)>,
    /// When that was made, in unix seconds.
    made_at: AtomicI64,
    provider: Arc<CryptoProvider>,
    /// Client certificates that were refused are logged.
    refusals: Seldom,
}

impl Door {
    /// A door of this authority, known as `control.<trust domain>`.
    pub fn new(authority: Arc<Authority>, clock: Clock, trust_domain: &str) -> Arc<Self> {
        Arc::new(Self {
            authority,
            clock,
            grace_s: AtomicU64::new(24 * 3600),
            name: format!("control.{trust_domain}"),
            certificate: ArcSwapOption::empty(),
            made_at: AtomicI64::new(0),
            provider: Arc::new(aws_lc_rs::default_provider()),
            refusals: Seldom::default(),
        })
    }

    /// The configuration to accept connections with.
    ///
    /// # Errors
    /// When the library does not offer TLS 1.3.
    pub fn config(self: &Arc<Self>) -> Result<Arc<ServerConfig>, rustls::Error> {
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(Verifier(self.clone())))
            .with_cert_resolver(Arc::new(Resolver(self.clone())));
        config.alpn_protocols = vec![b"h2".to_vec()];
        // Every connection is verified as of now: nothing is resumed.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    /// The certificate that a connection was verified with, once its handshake is done.
    pub fn peer(&self, chain: Option<&[CertificateDer<'_>]>) -> Option<Certificate> {
        let (leaf, above) = chain?.split_first()?;
        let certificate = identity_of(leaf).ok()?;
        let (root, trusted) = self.authority.line_of(leaf, above).unwrap_or_default();
        Some(Certificate { root, trusted, ..certificate })
    }

    /// Has another certificate made for the next connection.
    pub(crate) fn renew(&self) {
        self.certificate.store(None);
    }

    fn certificate(&self) -> Option<Arc<(CertifiedKey, i64)>> {
        let now = self.clock.unix();
        // One that was made while the clock was ahead does not hold yet, and would not for as long as it was.
        let begun = self.made_at.load(Ordering::Relaxed) - BACKDATE_S <= now;
        if let Some(current) = self.certificate.load_full().filter(|current| begun && now < current.1) {
            return Some(current);
        }
        let made = self.authority.issue_server(&self.name).map_err(|error| error.to_string());
        let made = made.and_then(|(issued, key)| {
            let half = now + (issued.not_after - now) / 2;
            let certified = CertifiedKey::from_der(issued.chain, key, &self.provider);
            certified.map(|key| Arc::new((key, half))).map_err(|error| error.to_string())
        });
        match made {
            Ok(made) => {
                self.made_at.store(now, Ordering::Relaxed);
                self.certificate.store(Some(made.clone()));
                Some(made)
            }
            Err(reason) => {
                tracing::error!(%reason, "no certificate for the control plane's own door");
                self.certificate.load_full()
            }
        }
    }
}

struct Resolver(Arc<Door>);

impl std::fmt::Debug for Resolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Resolver")
    }
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.certificate().map(|current| Arc::new(current.0.clone()))
    }
}

struct Verifier(Arc<Door>);

impl Verifier {
    fn algorithms(&self) -> &WebPkiSupportedAlgorithms {
        &self.0.provider.signature_verification_algorithms
    }
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Verifier")
    }
}

impl ClientCertVerifier for Verifier {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let grace = Duration::from_secs(self.0.grace_s.load(Ordering::Relaxed));
        match verify(&self.0.authority.known_roots(), leaf, intermediates, self.0.clock.unix(), grace) {
            Ok(_) => Ok(ClientCertVerified::assertion()),
            Err(error) => {
                if let Some(left_out) = self.0.refusals.admit() {
                    tracing::info!(%error, left_out, "a client certificate was refused");
                }
                Err(rustls::Error::InvalidCertificate(match error {
                    PeerError::Malformed => rustls::CertificateError::BadEncoding,
                    PeerError::Untrusted(webpki::Error::CertExpired { .. }) => rustls::CertificateError::Expired,
                    PeerError::Untrusted(webpki::Error::CertNotValidYet { .. }) => {
                        rustls::CertificateError::NotValidYet
                    }
                    PeerError::TooLong | PeerError::NoIdentity | PeerError::Untrusted(_) => {
                        rustls::CertificateError::UnknownIssuer
                    }
                }))
            }
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, self.algorithms())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, self.algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms().supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Trust;
    use crate::ca::requested_key;

    fn issue(authority: &Authority, lifetime: u64) -> Vec<CertificateDer<'static>> {
        let id = SpiffeId::parse("spiffe://mesh.internal/ns/default/sa/web").unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let csr = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
        let key = requested_key(csr.der(), &id).unwrap();
        authority.issue(&key, &id, Duration::from_secs(lifetime)).unwrap().chain
    }

    #[test]
    fn an_ended_certificate_verifies_within_the_grace_only() {
        let directory = tempfile::tempdir().unwrap();
        let clock = Clock::default();
        let authority = Authority::open(directory.path(), "mesh.internal", clock.clone(), &Trust::default()).unwrap();
        let chain = issue(&authority, 100);
        let now = clock.unix();
        let verify_at =
            |at: i64, grace: u64| verify(&authority.roots(), &chain[0], &chain[1..], at, Duration::from_secs(grace));
        let fresh = verify_at(now, 0).unwrap();
        assert_eq!(fresh.id.to_string(), "spiffe://mesh.internal/ns/default/sa/web");
        assert!(verify_at(now + 200, 0).is_err());
        let late = verify_at(now + 200, 3600).unwrap();
        assert!(late.expired(now + 200));
        assert!(verify_at(now + 4000, 3600).is_err());
        assert!(verify_at(now - 20 * 60, 3600).is_err(), "before its beginning");
    }

    #[test]
    fn another_root_and_the_doors_own_certificate_are_refused() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let clock = Clock::default();
        let authority = Authority::open(one.path(), "mesh.internal", clock.clone(), &Trust::default()).unwrap();
        let foreign = Authority::open(other.path(), "mesh.internal", clock.clone(), &Trust::default()).unwrap();
        let chain = issue(&foreign, 100);
        let verdict = verify(&authority.roots(), &chain[0], &chain[1..], clock.unix(), Duration::ZERO);
        assert!(matches!(verdict, Err(PeerError::Untrusted(_))), "{verdict:?}");
        let (server, _) = authority.issue_server("control.mesh.internal").unwrap();
        let verdict = verify(&authority.roots(), &server.chain[0], &server.chain[1..2], clock.unix(), Duration::ZERO);
        assert_eq!(verdict, Err(PeerError::NoIdentity));
    }
}

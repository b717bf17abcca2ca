//! A certificate with its key and trust, as it is stored.

use super::Wanted;
use crate::certificate::{key_hash, leads_to};
use crate::control::Trust;
use crate::upstream::tls::{Credentials, TlsError};
use prost::Message;
use rand::Rng;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use sheer_core::identity::SpiffeId;
use sheer_core::wire::v1;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use x509_parser::prelude::{FromDer, X509Certificate};

/// What is on disk. Without a chain it is a key that was not yet used.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Stored {
    /// PKCS #8, DER.
    #[prost(bytes = "vec", tag = "1")]
    pub(super) key: Vec<u8>,
    /// X.509, DER, leaf first.
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub(super) chain: Vec<Vec<u8>>,
    #[prost(message, optional, tag = "3")]
    pub(super) trust: Option<v1::TrustBundle>,
    #[prost(message, optional, tag = "4")]
    pub(super) mesh: Option<v1::Mesh>,
    #[prost(string, tag = "5")]
    pub(super) uid: String,
    #[prost(string, repeated, tag = "6")]
    pub(super) control: Vec<String>,
    #[prost(string, tag = "7")]
    pub(super) namespace: String,
    #[prost(string, tag = "8")]
    pub(super) service_account: String,
    #[prost(string, tag = "9")]
    pub(super) workload: String,
}

impl Stored {
    pub(super) fn of(wanted: &Wanted) -> Self {
        Self {
            namespace: wanted.namespace.clone(),
            service_account: wanted.service_account.clone(),
            workload: wanted.workload.clone(),
            ..Self::default()
        }
    }

    pub(super) fn is_for(&self, wanted: &Wanted) -> bool {
        self.namespace == wanted.namespace
            && self.service_account == wanted.service_account
            && self.workload == wanted.workload
    }
}

/// A certificate that was issued to this workload.
pub struct Held {
    stored: Stored,
    id: SpiffeId,
    chain: Vec<CertificateDer<'static>>,
    roots: Arc<[CertificateDer<'static>]>,
    /// SHA-256 of the subject public key info of the root above the certificate, where that is one of the roots.
    root_sha256: Option<[u8; 32]>,
    not_before: SystemTime,
    not_after: SystemTime,
    renew_at: SystemTime,
}

impl Held {
    pub(super) fn new(stored: Stored) -> Result<Self, TlsError> {
        let chain: Vec<_> = stored.chain.iter().map(|it| CertificateDer::from(it.clone())).collect();
        let leaf = chain.first().ok_or(TlsError::NoCertificate)?;
        let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| TlsError::Malformed)?;
        let (not_before, not_after) = (parsed.validity().not_before, parsed.validity().not_after);
        let (not_before, not_after) = (time_of(not_before.timestamp()), time_of(not_after.timestamp()));
        let trust = stored.trust.clone().unwrap_or_default();
        let roots: Arc<[_]> = trust.roots.iter().map(|it| CertificateDer::from(it.to_vec())).collect();
        let key = private_key(&stored.key);
        let id = Credentials::new(chain.clone(), key, &trust.trust_domain, &roots)?.id().clone();
        let configured = stored.mesh.as_ref().map_or(0, |mesh| mesh.certificate_lifetime_s);
        let renew_at = renewal(not_before, not_after, configured, rand::rng().random_range(0.0..0.1));
        let root_sha256 = root_above(&chain, &roots).and_then(key_hash);
        Ok(Self { id, chain, roots, root_sha256, not_before, not_after, renew_at, stored })
    }

    pub(super) fn stored(&self) -> &Stored {
        &self.stored
    }

    pub(super) fn credentials(&self) -> Result<Arc<Credentials>, TlsError> {
        let retired = self.stored.trust.iter().flat_map(|trust| &trust.retired);
        let retired: Vec<_> =
            retired.map(|it| (it.root.to_vec().into(), UNIX_EPOCH + Duration::from_secs(it.until_s))).collect();
        let key = private_key(&self.stored.key);
        Credentials::with_retired(self.chain.clone(), key, self.trust_domain(), &self.roots, &retired)
    }

    /// The version of the trust bundle.
    pub fn trust_sequence(&self) -> u64 {
        self.stored.trust.as_ref().map_or(0, |trust| trust.sequence)
    }

    /// SHA-256 of the subject public key info of the root above the certificate; none when that is not trusted.
    pub fn root_sha256(&self) -> Option<[u8; 32]> {
        self.root_sha256
    }

    /// Within what time it is to be renewed because certificates are issued under another root than its own now.
    pub(super) fn renew_within(&self) -> Option<Duration> {
        let trust = self.stored.trust.as_ref().filter(|trust| !trust.issuing_root_sha256.is_empty())?;
        let is_its_own = self.root_sha256.is_some_and(|own| trust.issuing_root_sha256[..] == own);
        (!is_its_own).then(|| Duration::from_millis(trust.renew_within_ms.into()))
    }

    /// The workload's identity.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The workload's uid, as the control plane knows it.
    pub fn uid(&self) -> &str {
        &self.stored.uid
    }

    /// The addresses of all control planes, `HOST:PORT`.
    pub fn control(&self) -> &[String] {
        &self.stored.control
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &str {
        self.stored.trust.as_ref().map_or("", |trust| &trust.trust_domain)
    }

    /// Whether a trust bundle has a root in common with the one that came with the certificate.
    pub(crate) fn shares_root(&self, bundle: &v1::TrustBundle) -> bool {
        self.roots.iter().any(|own| bundle.roots.iter().any(|root| root[..] == own[..]))
    }

    /// When the certificate ends.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// From when on it is renewed.
    pub fn renew_at(&self) -> SystemTime {
        self.renew_at
    }

    /// Whether it is valid at this time.
    pub fn holds_at(&self, now: SystemTime) -> bool {
        (self.not_before..self.not_after).contains(&now)
    }

    /// Whether the certificate was issued under the trust domain's roots. Its time is not looked at.
    pub(super) fn is_rooted(&self) -> bool {
        self.root_sha256.is_some()
    }

    /// How the control plane is recognised with it.
    pub fn trust(&self) -> Trust {
        Trust::Bundle {
            trust_domain: self.trust_domain().to_owned(),
            roots: self.roots.clone(),
            chain: self.chain.clone(),
            key: self.stored.key.as_slice().into(),
        }
    }
}

/// The root that a chain ends in: the one above its issuer, rather than one by which that root was certified in turn.
fn root_above<'a>(
    chain: &[CertificateDer<'_>],
    roots: &'a [CertificateDer<'static>],
) -> Option<&'a CertificateDer<'static>> {
    let under = |chain: &[CertificateDer<'_>]| {
        let is_above = |root: &&CertificateDer<'static>| {
            webpki::anchor_from_trusted_cert(root).is_ok_and(|anchor| leads_to(chain, &[anchor]))
        };
        roots.iter().find(is_above)
    };
    under(&chain[..chain.len().min(2)]).or_else(|| under(chain))
}

fn private_key(pkcs8: &[u8]) -> PrivateKeyDer<'static> {
    PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pkcs8.to_vec()))
}

fn time_of(unix_s: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(unix_s).unwrap_or_default())
}

/// Between 50 and 60 % of the certificate's life: `jitter` is 0 to 0.1. Its life is the configured one, since the
/// beginning in the certificate is earlier than it was issued.
fn renewal(not_before: SystemTime, not_after: SystemTime, configured_s: u64, jitter: f64) -> SystemTime {
    let written = not_after.duration_since(not_before).unwrap_or_default();
    let life = match Duration::from_secs(configured_s) {
        Duration::ZERO => written,
        configured => configured.min(written),
    };
    not_after - life.mul_f64(0.5 - jitter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_is_after_half_the_life() {
        let at = |s| UNIX_EPOCH + Duration::from_secs(s);
        assert_eq!(renewal(at(0), at(100), 0, 0.0), at(50));
        assert_eq!(renewal(at(0), at(100), 0, 0.1), at(60));
        // Issued at 900 for 100 s, back-dated to 0.
        assert_eq!(renewal(at(0), at(1000), 100, 0.0), at(950));
        assert_eq!(renewal(at(0), at(100), 1000, 0.0), at(50));
    }
}

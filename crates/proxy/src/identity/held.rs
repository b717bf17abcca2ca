//! A certificate with its key and trust, as it is stored.

use super::Wanted;
use crate::control::Trust;
use crate::upstream::tls::{Credentials, TlsError};
use prost::Message;
use rand::Rng;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
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
        Ok(Self { id, chain, roots, not_before, not_after, renew_at, stored })
    }

    pub(super) fn stored(&self) -> &Stored {
        &self.stored
    }

    pub(super) fn credentials(&self) -> Result<Arc<Credentials>, TlsError> {
        Credentials::new(self.chain.clone(), private_key(&self.stored.key), self.trust_domain(), &self.roots)
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
        let anchors: Vec<_> = self.roots.iter().filter_map(|it| webpki::anchor_from_trusted_cert(it).ok()).collect();
        let Some((leaf, above)) = self.chain.split_first() else { return false };
        let Ok(leaf) = webpki::EndEntityCert::try_from(leaf) else { return false };
        let algorithms = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.all;
        let within =
            self.not_after.duration_since(UNIX_EPOCH).unwrap_or_default().saturating_sub(Duration::from_secs(1));
        let (now, usage) = (UnixTime::since_unix_epoch(within), webpki::KeyUsage::client_auth());
        leaf.verify_for_usage(algorithms, &anchors, above, now, usage, None, None).is_ok()
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

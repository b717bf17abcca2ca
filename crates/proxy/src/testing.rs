//! What several tests need: a certificate authority, sockets.

use crate::upstream::tls::{Credentials, TlsError};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::sync::Arc;
use std::time::SystemTime;
use tokio::net::{TcpListener, TcpStream};

/// A trust domain's certificate authority.
pub(crate) struct Authority {
    trust_domain: String,
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
}

impl Authority {
    pub(crate) fn new(trust_domain: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap().der().clone();
        Self { trust_domain: trust_domain.to_owned(), issuer: Issuer::new(params, key), root }
    }

    /// The credentials of a workload.
    pub(crate) fn credentials(&self, namespace: &str, account: &str) -> Arc<Credentials> {
        let name = format!("spiffe://{}/ns/{namespace}/sa/{account}", self.trust_domain);
        self.certify(&self.trust_domain, |params| {
            params.subject_alt_names = vec![SanType::URI(name.as_str().try_into().unwrap())];
        })
    }

    /// The same, of a workload that trusts these authorities, and knows of some that were replaced.
    pub(crate) fn credentials_among(
        &self,
        account: &str,
        trusted: &[&Authority],
        retired: &[(&Authority, SystemTime)],
    ) -> Arc<Credentials> {
        let name = format!("spiffe://{}/ns/default/sa/{account}", self.trust_domain);
        let (leaf, key) =
            self.sign(|params| params.subject_alt_names = vec![SanType::URI(name.as_str().try_into().unwrap())]);
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let roots: Vec<_> = trusted.iter().map(|it| it.root.clone()).collect();
        let retired: Vec<_> = retired.iter().map(|(it, until)| (it.root.clone(), *until)).collect();
        Credentials::with_retired(vec![leaf], key, &self.trust_domain, &roots, &retired).unwrap()
    }

    /// Credentials of a certificate that differs from a good one as told.
    pub(crate) fn certify(&self, trust_domain: &str, change: impl Fn(&mut CertificateParams)) -> Arc<Credentials> {
        self.try_certify(trust_domain, change).unwrap()
    }

    /// The same, where it may be refused.
    pub(crate) fn try_certify(
        &self,
        trust_domain: &str,
        change: impl Fn(&mut CertificateParams),
    ) -> Result<Arc<Credentials>, TlsError> {
        let (leaf, key) = self.sign(change);
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        Credentials::new(vec![leaf], key, trust_domain, std::slice::from_ref(&self.root))
    }

    /// A certificate that differs from a good one as told, and its key. Nobody looks at it here.
    pub(crate) fn sign(&self, change: impl FnOnce(&mut CertificateParams)) -> (CertificateDer<'static>, KeyPair) {
        self.sign_by(&self.issuer, change)
    }

    /// The same by another issuer.
    pub(crate) fn sign_by(
        &self,
        issuer: &Issuer<'_, KeyPair>,
        change: impl FnOnce(&mut CertificateParams),
    ) -> (CertificateDer<'static>, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        let name = format!("spiffe://{}/ns/default/sa/any", self.trust_domain);
        params.subject_alt_names = vec![SanType::URI(name.as_str().try_into().unwrap())];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        (params.signed_by(&key, issuer).unwrap().der().clone(), key)
    }

    /// An issuer under the root that differs from a good one as told, and its certificate.
    pub(crate) fn intermediate(
        &self,
        change: impl FnOnce(&mut CertificateParams),
    ) -> (Issuer<'static, KeyPair>, CertificateDer<'static>) {
        Self::intermediate_by(&self.issuer, change)
    }

    /// The same under another issuer.
    pub(crate) fn intermediate_by(
        issuer: &Issuer<'_, KeyPair>,
        change: impl FnOnce(&mut CertificateParams),
    ) -> (Issuer<'static, KeyPair>, CertificateDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, "an issuer");
        change(&mut params);
        let certificate = params.signed_by(&key, issuer).unwrap().der().clone();
        (Issuer::new(params, key), certificate)
    }
}

/// The two ends of a TCP connection.
pub(crate) async fn loopback() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

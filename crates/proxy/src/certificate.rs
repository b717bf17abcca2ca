//! Judging certificates: what rustls asks of a verifier, once for every kind of peer. What makes a peer the right one is
//! its [`Rule`].
//!
//! Issuing certificates carry no name constraints: `rustls-webpki` refuses every URI name under a constraint on URIs, and
//! a rule asks for the trust domain itself.

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible, SignatureScheme};
use sha2::{Digest, Sha256};
use std::error::Error as StdError;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Which peers are admitted.
pub(crate) trait Rule: Debug + Send + Sync {
    /// Admits the peer that presented a certificate, or says why not.
    ///
    /// # Errors
    /// Why not.
    fn admit(&self, presented: &Presented<'_>) -> Result<(), Error>;
}

/// What a peer presented.
pub(crate) struct Presented<'a> {
    /// Its certificate.
    pub leaf: &'a CertificateDer<'a>,
    /// What it sent beside, to build a chain of.
    pub intermediates: &'a [CertificateDer<'a>],
    /// The name under which a server was asked for.
    pub server_name: Option<&'a ServerName<'a>>,
    now: UnixTime,
    is_server: bool,
    algorithms: &'a WebPkiSupportedAlgorithms,
}

impl Presented<'_> {
    /// Checks that the certificate is valid now, for its side of a handshake, and that its chain ends in an anchor.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn chains_to(&self, anchors: &[TrustAnchor<'_>]) -> Result<webpki::EndEntityCert<'_>, Error> {
        let usage = match self.is_server {
            true => webpki::KeyUsage::server_auth(),
            false => webpki::KeyUsage::client_auth(),
        };
        let certificate = webpki::EndEntityCert::try_from(self.leaf).map_err(refused)?;
        certificate
            .verify_for_usage(self.algorithms.all, anchors, self.intermediates, self.now, usage, None, None)
            .map_err(refused)?;
        Ok(certificate)
    }
}

/// Whether a chain (leaf first) ends in one of the anchors, whatever the time.
pub(crate) fn leads_to(chain: &[CertificateDer<'_>], anchors: &[TrustAnchor<'_>]) -> bool {
    let Some((leaf, above)) = chain.split_first() else { return false };
    let Ok((_, parsed)) = X509Certificate::from_der(leaf) else { return false };
    let Ok(end) = u64::try_from(parsed.validity().not_after.timestamp()) else { return false };
    let within = UnixTime::since_unix_epoch(Duration::from_secs(end.saturating_sub(1)));
    let Ok(leaf) = webpki::EndEntityCert::try_from(leaf) else { return false };
    let algorithms = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.all;
    leaf.verify_for_usage(algorithms, anchors, above, within, webpki::KeyUsage::client_auth(), None, None).is_ok()
}

/// SHA-256 of a certificate's subject public key info.
pub(crate) fn key_hash(certificate: &CertificateDer<'_>) -> Option<[u8; 32]> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    Some(Sha256::digest(parsed.public_key().raw).into())
}

/// What is wrong with a certificate, as rustls says it.
pub(crate) fn refused(error: webpki::Error) -> Error {
    use webpki::Error::{
        BadDer, BadDerTime, CertExpired, CertNotValidForName, CertNotValidYet, InvalidSignatureForPublicKey,
        TrailingData, UnknownIssuer,
    };
    let reason = match error {
        CertExpired { time, not_after } => CertificateError::ExpiredContext { time, not_after },
        CertNotValidYet { time, not_before } => CertificateError::NotValidYetContext { time, not_before },
        CertNotValidForName(_) => CertificateError::NotValidForName,
        UnknownIssuer => CertificateError::UnknownIssuer,
        // An issuer of the same name as one of ours.
        InvalidSignatureForPublicKey => CertificateError::BadSignature,
        BadDer | BadDerTime | TrailingData(_) => CertificateError::BadEncoding,
        other => return invalid(Arc::new(other)),
    };
    Error::InvalidCertificate(reason)
}

/// A certificate that is refused for a reason of our own.
pub(crate) fn invalid(reason: Arc<dyn StdError + Send + Sync>) -> Error {
    Error::InvalidCertificate(CertificateError::Other(rustls::OtherError(reason)))
}

/// Admits by a rule, on either side of a handshake of TLS 1.3.
#[derive(Debug)]
pub(crate) struct Verifier<R> {
    rule: R,
    algorithms: WebPkiSupportedAlgorithms,
}

impl<R: Rule> Verifier<R> {
    /// A verifier with the provider's algorithms.
    pub(crate) fn new(rule: R, provider: &CryptoProvider) -> Self {
        Self { rule, algorithms: provider.signature_verification_algorithms }
    }
}

impl<R: Rule> ServerCertVerifier for Verifier<R> {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let server_name = Some(server_name);
        let algorithms = &self.algorithms;
        self.rule.admit(&Presented { leaf, intermediates, server_name, now, is_server: true, algorithms })?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::Tls13RequiredForQuic))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl<R: Rule> ClientCertVerifier for Verifier<R> {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let (server_name, algorithms) = (None, &self.algorithms);
        self.rule.admit(&Presented { leaf, intermediates, server_name, now, is_server: false, algorithms })?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        ServerCertVerifier::verify_tls12_signature(self, message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        ServerCertVerifier::verify_tls13_signature(self, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

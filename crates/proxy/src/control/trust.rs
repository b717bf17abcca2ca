//! TLS to a control plane: who is believed to be one, and as whom the proxy comes.

use super::{Address, DialError, Line, Outside};
use crate::certificate::{Presented, Rule, Verifier, key_hash, refused};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::time_provider::TimeProvider;
use rustls::{CertificateError, ClientConfig};
use std::io;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio_rustls::client::TlsStream;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// The server name sent before the trust domain is known.
const FIRST_CONTACT: &str = "control.mesh";

/// The most certificates that a control plane may send: its own, its issuer's and root, and two for each of some roots
/// before that.
const MAX_CHAIN: usize = 16;

/// How a control plane is recognised, and the proxy by it.
#[derive(Clone)]
pub enum Trust {
    /// First contact: SHA-256 of the root's subject public key info, from the join token.
    Pin([u8; 32]),
    /// The trust bundle, and the proxy's own certificate.
    Bundle {
        /// The trust domain.
        trust_domain: String,
        /// Its roots.
        roots: Arc<[CertificateDer<'static>]>,
        /// The own chain, leaf first.
        chain: Vec<CertificateDer<'static>>,
        /// Its key, PKCS #8.
        key: Arc<[u8]>,
    },
}

impl Trust {
    pub(super) async fn handshake(
        &self,
        outside: &Arc<dyn Outside>,
        address: &Address,
        stream: Box<dyn Line>,
    ) -> Result<TlsStream<Box<dyn Line>>, DialError> {
        let (config, name) = self.config(outside.clone()).map_err(DialError::Own)?;
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        connector.connect(name, stream).await.map_err(|error| explain(address, outside.now(), error))
    }

    fn config(&self, outside: Arc<dyn Outside>) -> Result<(ClientConfig, ServerName<'static>), rustls::Error> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let name = match self {
            Trust::Pin(_) => FIRST_CONTACT.to_owned(),
            Trust::Bundle { trust_domain, .. } => format!("control.{trust_domain}"),
        };
        let name =
            ServerName::try_from(name).map_err(|_| rustls::Error::General("the trust domain is no name".into()))?;
        let verifier = Arc::new(Verifier::new(self.clone(), &provider));
        let builder = ClientConfig::builder_with_details(provider, Arc::new(TimeOfDay(outside)))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match self {
            Trust::Pin(_) => builder.with_no_client_auth(),
            Trust::Bundle { chain, key, .. } => {
                let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.to_vec()));
                builder.with_client_auth_cert(chain.clone(), key)?
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok((config, name))
    }
}

impl std::fmt::Debug for Trust {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Trust::Pin(_) => f.write_str("Pin"),
            Trust::Bundle { trust_domain, .. } => f.debug_tuple("Bundle").field(trust_domain).finish(),
        }
    }
}

/// The time by which certificates are judged.
#[derive(Debug)]
struct TimeOfDay(Arc<dyn Outside>);

impl TimeProvider for TimeOfDay {
    fn current_time(&self) -> Option<UnixTime> {
        self.0.now().duration_since(UNIX_EPOCH).ok().map(UnixTime::since_unix_epoch)
    }
}

fn explain(address: &Address, now: SystemTime, error: io::Error) -> DialError {
    let address = address.clone();
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. },
        )) => DialError::Clock { address, now: text_of(now) },
        Some(tls) => DialError::Untrusted { address, reason: tls.to_string() },
        None => DialError::Unreachable { address, source: error },
    }
}

fn text_of(time: SystemTime) -> String {
    let format = time::format_description::well_known::Rfc3339;
    time::OffsetDateTime::from(time).format(&format).unwrap_or_default()
}

/// Recognises a control plane: its chain ends in a root that is trusted, and its certificate names a control plane.
impl Rule for Trust {
    fn admit(&self, presented: &Presented<'_>) -> Result<(), rustls::Error> {
        if presented.intermediates.len() >= MAX_CHAIN {
            return Err(CertificateError::UnknownIssuer.into());
        }
        let (roots, name) = match self {
            Trust::Pin(pin) => {
                // Its present root, or one before by which that was certified.
                let pinned = |it: &&CertificateDer<'_>| key_hash(it) == Some(*pin);
                let Some(root) = presented.intermediates.iter().rev().find(pinned) else {
                    let reason = "its root is not the one that the join token names; print a new token there";
                    return Err(rustls::Error::General(reason.into()));
                };
                (std::slice::from_ref(root), None)
            }
            Trust::Bundle { roots, .. } => (&**roots, presented.server_name),
        };
        let anchors: Vec<_> = roots.iter().filter_map(|root| webpki::anchor_from_trusted_cert(root).ok()).collect();
        let certificate = presented.chains_to(&anchors)?;
        match name {
            Some(name) => certificate.verify_is_valid_for_subject_name(name).map_err(refused),
            None => names_a_control_plane(presented.leaf),
        }
    }
}

/// At first contact the trust domain is not known, but a workload's certificate must not pass for a control plane's.
fn names_a_control_plane(certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| CertificateError::BadEncoding)?;
    let names = parsed.subject_alternative_name().map_err(|_| CertificateError::BadEncoding)?;
    let is_control = |name: &GeneralName<'_>| matches!(name, GeneralName::DNSName(dns) if dns.starts_with("control."));
    if names.is_some_and(|names| names.value.general_names.iter().any(is_control)) {
        return Ok(());
    }
    Err(CertificateError::NotValidForName.into())
}

//! The certificate authority: a root made on first start, an issuing certificate under it, leaves for workloads and for
//! the control plane's own door.
//!
//! `root.pem` and `issuing.pem` in the state directory hold a certificate and its key each, with mode 0600. The root's
//! key is needed only to make the next issuing certificate: it may be kept elsewhere, then rotation warns.

use crate::clock::Clock;
use parking_lot::RwLock;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use sha2::{Digest, Sha256};
use sheer_core::identity::SpiffeId;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension, X509Certificate, X509CertificationRequest};
use x509_parser::public_key::PublicKey;

/// Why the authority cannot be loaded or a certificate cannot be issued.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A file cannot be read or written.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{}: {reason}; restore it from a backup with `sheer control restore -i FILE`", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The issuing certificate has ended and the root's key is not here to make another.
    #[error(
        "the issuing certificate has ended and {} holds no key to make another; put the root's key back",
        .0.display()
    )]
    RootKeyAway(PathBuf),
    /// The signing library refused.
    #[error("a certificate could not be made: {0}")]
    Signing(#[from] rcgen::Error),
}

/// Why a certificate signing request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// Longer than [`MAX_CSR`].
    #[error("the certificate request is longer than 16 KiB")]
    TooLong,
    /// Not PKCS #10.
    #[error("the certificate request is not PKCS #10 in DER")]
    Malformed,
    /// It is not signed by its own key.
    #[error("the certificate request is not signed by its own key")]
    Signature,
    /// The key is of a kind that is not accepted.
    #[error("the key must be ECDSA P-256 or P-384, Ed25519, or RSA with 2048 to 4096 bits")]
    Key,
    /// It asks for names other than the granted one.
    #[error(
        "the certificate request asks for '{0}', which is not the granted identity; leave names out of the request"
    )]
    Names(String),
    /// It asks to be an authority.
    #[error("the certificate request asks for an authority's certificate")]
    Authority,
}

/// The longest certificate signing request that is looked at, in bytes.
pub const MAX_CSR: usize = 16 * 1024;

const DAY: Duration = Duration::from_secs(24 * 3600);
const ROOT_LIFETIME: Duration = Duration::from_secs(3653 * 24 * 3600);
const ISSUING_LIFETIME: Duration = Duration::from_secs(90 * 24 * 3600);
const SERVER_LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);
/// For peers whose clock is behind.
const BACKDATE: Duration = Duration::from_secs(15 * 60);

/// The authority.
pub struct Authority {
    directory: PathBuf,
    clock: Clock,
    root: CertificateDer<'static>,
    root_sha256: [u8; 32],
    root_not_after: i64,
    root_key: Option<Vec<u8>>,
    issuing: RwLock<Arc<Issuing>>,
}

struct Issuing {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
    not_after: SystemTime,
    renew_at: SystemTime,
}

/// An issued certificate.
#[derive(Clone, Debug)]
pub struct Issued {
    /// Leaf first, root excluded.
    pub chain: Vec<CertificateDer<'static>>,
    /// When the leaf ends, in unix seconds.
    pub not_after: i64,
}

/// A public key out of a checked request.
pub struct RequestedKey {
    spki: SubjectPublicKeyInfo,
    /// SHA-256 of the subject public key info, in hex.
    pub sha256: String,
}

impl Authority {
    /// Loads the authority from the state directory; makes what is missing.
    ///
    /// # Errors
    /// When a file cannot be read or written, or is damaged.
    pub fn open(directory: &Path, trust_domain: &str, clock: Clock) -> Result<Self, CaError> {
        let path = directory.join("root.pem");
        if !path.exists() {
            let (certificate, key) = make_root(trust_domain, clock.now())?;
            write_pair(&path, &certificate, &key)?;
        }
        let (root, root_key) = read_pair(&path)?;
        let damaged = |reason: &str| CaError::Damaged { path: path.clone(), reason: reason.to_owned() };
        let (_, parsed) = X509Certificate::from_der(&root).map_err(|_| damaged("the certificate cannot be read"))?;
        if !parsed.is_ca() {
            return Err(damaged("the certificate is not an authority's"));
        }
        let root_sha256 = Sha256::digest(parsed.public_key().raw).into();
        let root_not_after = parsed.validity().not_after.timestamp();
        drop(parsed);
        let issuing = Self::load_issuing(directory, &root, root_key.as_deref(), trust_domain, &clock)?;
        let issuing = RwLock::new(Arc::new(issuing));
        Ok(Self { directory: directory.to_owned(), clock, root, root_sha256, root_not_after, root_key, issuing })
    }

    fn load_issuing(
        directory: &Path,
        root: &CertificateDer<'static>,
        root_key: Option<&[u8]>,
        trust_domain: &str,
        clock: &Clock,
    ) -> Result<Issuing, CaError> {
        let path = directory.join("issuing.pem");
        if path.exists() {
            let (certificate, key) = read_pair(&path)?;
            let key = key.ok_or_else(|| CaError::Damaged { path: path.clone(), reason: "it holds no key".into() })?;
            let issuing = Issuing::new(certificate, &key, &path)?;
            if clock.now() < issuing.renew_at || root_key.is_none() {
                return Ok(issuing);
            }
        }
        let Some(root_key) = root_key else {
            return Err(CaError::RootKeyAway(directory.join("root.pem")));
        };
        let root = Issuer::from_ca_cert_der(root, key_pair(root_key)?)?;
        let (certificate, key) = make_issuing(&root, trust_domain, clock.now())?;
        write_pair(&path, &certificate, &key)?;
        Issuing::new(certificate, &key, &path)
    }

    /// The root's certificate.
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.root
    }

    /// SHA-256 of the root's subject public key info: what join tokens pin.
    pub fn root_sha256(&self) -> [u8; 32] {
        self.root_sha256
    }

    /// When the root ends, in unix seconds.
    pub fn root_not_after(&self) -> i64 {
        self.root_not_after
    }

    /// Whether the next issuing certificate can be made here.
    pub fn has_root_key(&self) -> bool {
        self.root_key.is_some()
    }

    /// When the issuing certificate ends, in unix seconds.
    pub fn issuing_not_after(&self) -> i64 {
        unix(self.issuing.read().not_after)
    }

    /// Makes a new issuing certificate when half of the present one's life has passed.
    ///
    /// # Errors
    /// When it is due and cannot be made; the present one stays in use.
    pub fn rotate(&self, trust_domain: &str) -> Result<(), CaError> {
        if self.clock.now() < self.issuing.read().renew_at || self.root_key.is_none() {
            return Ok(());
        }
        let next =
            Self::load_issuing(&self.directory, &self.root, self.root_key.as_deref(), trust_domain, &self.clock)?;
        *self.issuing.write() = Arc::new(next);
        Ok(())
    }

    /// Issues a workload's certificate.
    ///
    /// # Errors
    /// When the issuing certificate has ended or signing fails.
    pub fn issue(&self, key: &RequestedKey, id: &SpiffeId, lifetime: Duration) -> Result<Issued, CaError> {
        let mut params = leaf_params(self.clock.now(), lifetime);
        let uri = id.to_string().try_into().map_err(CaError::Signing)?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        self.sign(params, &key.spki)
    }

    /// Issues a certificate for the control plane's own door, with a new key.
    ///
    /// # Errors
    /// When the issuing certificate has ended or signing fails.
    pub fn issue_server(&self, name: &str) -> Result<(Issued, PrivateKeyDer<'static>), CaError> {
        let key = KeyPair::generate()?;
        let mut params = leaf_params(self.clock.now(), SERVER_LIFETIME);
        params.subject_alt_names = vec![SanType::DnsName(name.try_into().map_err(CaError::Signing)?)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let mut issued = self.sign(params, &key)?;
        // The root travels too: a joining proxy knows only the hash of its key.
        issued.chain.push(self.root.clone());
        Ok((issued, PrivatePkcs8KeyDer::from(key.serialize_der()).into()))
    }

    fn sign(&self, mut params: CertificateParams, key: &impl rcgen::PublicKeyData) -> Result<Issued, CaError> {
        let issuing = self.issuing.read().clone();
        if self.clock.now() >= issuing.not_after {
            return Err(CaError::RootKeyAway(self.directory.join("root.pem")));
        }
        params.not_after = params.not_after.min(OffsetDateTime::from(issuing.not_after));
        let not_after = params.not_after.unix_timestamp();
        let certificate = params.signed_by(key, &issuing.issuer)?;
        Ok(Issued { chain: vec![certificate.der().clone(), issuing.certificate.clone()], not_after })
    }
}

impl Issuing {
    fn new(certificate: CertificateDer<'static>, key: &[u8], path: &Path) -> Result<Self, CaError> {
        let damaged = || CaError::Damaged { path: path.to_owned(), reason: "the certificate cannot be read".into() };
        let (_, parsed) = X509Certificate::from_der(&certificate).map_err(|_| damaged())?;
        let not_before = SystemTime::from(parsed.validity().not_before.to_datetime());
        let not_after = SystemTime::from(parsed.validity().not_after.to_datetime());
        drop(parsed);
        let life = not_after.duration_since(not_before).map_err(|_| damaged())?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key_pair(key)?)?;
        Ok(Self { issuer, certificate, not_after, renew_at: not_before + life / 2 })
    }
}

/// Takes the public key out of a certificate signing request and nothing else. A request that asks for another name than
/// the granted one, or for an authority, is refused, since its sender expects something that it would not get.
///
/// # Errors
/// [`CsrError`].
pub fn requested_key(csr: &[u8], granted: &SpiffeId) -> Result<RequestedKey, CsrError> {
    if csr.len() > MAX_CSR {
        return Err(CsrError::TooLong);
    }
    let (rest, request) = X509CertificationRequest::from_der(csr).map_err(|_| CsrError::Malformed)?;
    if !rest.is_empty() {
        return Err(CsrError::Malformed);
    }
    let info = &request.certification_request_info;
    match info.subject_pki.parsed().map_err(|_| CsrError::Key)? {
        PublicKey::RSA(key) if (2048..=4096).contains(&key.key_size()) => {}
        PublicKey::EC(_) => {}
        // Ed25519 (RFC 8410) is not told apart by the parser; the signing library below knows it.
        PublicKey::Unknown(_) => {}
        _ => return Err(CsrError::Key),
    }
    let spki = SubjectPublicKeyInfo::from_der(info.subject_pki.raw).map_err(|_| CsrError::Key)?;
    request.verify_signature().map_err(|_| CsrError::Signature)?;
    let granted = granted.to_string();
    for extension in request.requested_extensions().into_iter().flatten() {
        match extension {
            ParsedExtension::SubjectAlternativeName(names) => {
                for name in &names.general_names {
                    if !matches!(name, GeneralName::URI(uri) if *uri == granted) {
                        let asked: String = name.to_string().chars().take(120).collect();
                        return Err(CsrError::Names(asked));
                    }
                }
                if names.general_names.len() > 1 {
                    return Err(CsrError::Names("several names".to_owned()));
                }
            }
            ParsedExtension::BasicConstraints(constraints) if constraints.ca => return Err(CsrError::Authority),
            _ => {}
        }
    }
    Ok(RequestedKey { spki, sha256: hex(&Sha256::digest(info.subject_pki.raw)) })
}

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn make_root(trust_domain: &str, now: SystemTime) -> Result<(CertificateDer<'static>, Vec<u8>), CaError> {
    let key = KeyPair::generate()?;
    let params = authority_params(&format!("Sheer root of {trust_domain}"), trust_domain, now, ROOT_LIFETIME, None)?;
    let certificate = params.self_signed(&key)?;
    Ok((certificate.der().clone(), key.serialize_der()))
}

fn make_issuing(
    root: &Issuer<'_, KeyPair>,
    trust_domain: &str,
    now: SystemTime,
) -> Result<(CertificateDer<'static>, Vec<u8>), CaError> {
    let key = KeyPair::generate()?;
    let name = format!("Sheer issuing {:08x} of {trust_domain}", rand::random::<u32>());
    let mut params = authority_params(&name, trust_domain, now, ISSUING_LIFETIME, Some(0))?;
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, root)?;
    Ok((certificate.der().clone(), key.serialize_der()))
}

fn authority_params(
    name: &str,
    trust_domain: &str,
    now: SystemTime,
    lifetime: Duration,
    path_length: Option<u8>,
) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = OffsetDateTime::from(now - DAY);
    params.not_after = OffsetDateTime::from(now + lifetime);
    params.serial_number = Some(serial());
    params.is_ca = IsCa::Ca(path_length.map_or(BasicConstraints::Unconstrained, BasicConstraints::Constrained));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.subject_alt_names = vec![SanType::URI(format!("spiffe://{trust_domain}").try_into()?)];
    Ok(params)
}

fn leaf_params(now: SystemTime, lifetime: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    // An empty subject: the name is the URI alone (RFC 5280, section 4.1.2.6, then makes that extension critical).
    params.distinguished_name = DistinguishedName::new();
    params.not_before = OffsetDateTime::from(now - BACKDATE);
    params.not_after = OffsetDateTime::from(now + lifetime);
    params.serial_number = Some(serial());
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params
}

/// 126 random bits, positive and never of zero length.
fn serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] = (bytes[0] & 0x3f) | 0x40;
    SerialNumber::from(bytes.to_vec())
}

fn key_pair(der: &[u8]) -> Result<KeyPair, CaError> {
    Ok(KeyPair::try_from(der)?)
}

fn unix(time: SystemTime) -> i64 {
    OffsetDateTime::from(time).unix_timestamp()
}

fn write_pair(path: &Path, certificate: &CertificateDer<'_>, key: &[u8]) -> Result<(), CaError> {
    let text = format!("{}{}", pem("CERTIFICATE", certificate), pem("PRIVATE KEY", key));
    crate::file::replace(path, 0o600, text.as_bytes()).map_err(|source| CaError::Io { path: path.to_owned(), source })
}

fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine;
    let encoded = base64::engine::general_purpose::STANDARD.encode(der);
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in encoded.as_bytes().chunks(64) {
        text.push_str(&String::from_utf8_lossy(line));
        text.push('\n');
    }
    text.push_str(&format!("-----END {label}-----\n"));
    text
}

fn read_pair(path: &Path) -> Result<(CertificateDer<'static>, Option<Vec<u8>>), CaError> {
    let text = std::fs::read(path).map_err(|source| CaError::Io { path: path.to_owned(), source })?;
    let damaged = |reason: &str| CaError::Damaged { path: path.to_owned(), reason: reason.to_owned() };
    let certificate = CertificateDer::from_pem_slice(&text).map_err(|_| damaged("it holds no certificate"))?;
    let key = match PrivatePkcs8KeyDer::from_pem_slice(&text) {
        Ok(key) => Some(key.secret_pkcs8_der().to_vec()),
        Err(rustls_pki_types::pem::Error::NoItemsFound) => None,
        Err(_) => return Err(damaged("its key cannot be read")),
    };
    Ok((certificate, key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicI64, Ordering};

    fn id() -> SpiffeId {
        SpiffeId::parse("spiffe://mesh.internal/ns/default/sa/web").unwrap()
    }

    fn request(change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
        let mut params = CertificateParams::default();
        change(&mut params);
        params.serialize_request(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    #[test]
    fn a_leaf_has_the_granted_name_alone() {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::open(directory.path(), "mesh.internal", Clock::default()).unwrap();
        let key = requested_key(&request(|_| {}), &id()).unwrap();
        let issued = authority.issue(&key, &id(), Duration::from_secs(60)).unwrap();
        assert_eq!(issued.chain.len(), 2);
        let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).unwrap();
        let names = leaf.subject_alternative_name().unwrap().unwrap();
        assert!(names.critical);
        let wanted = id().to_string();
        assert_eq!(names.value.general_names, [GeneralName::URI(&wanted)]);
        assert!(leaf.subject().iter().next().is_none());
        assert!(!leaf.is_ca());
        let usage = leaf.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.client_auth && usage.server_auth);
        assert!(leaf.key_usage().unwrap().unwrap().value.digital_signature());
        assert!(leaf.raw_serial().len() >= 8);
        let life = leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp();
        assert_eq!(life, 60 + 15 * 60);
        assert_eq!(leaf.validity().not_after.timestamp(), issued.not_after);
    }

    #[test]
    fn the_root_stays_and_its_files_are_private() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let open = || Authority::open(directory.path(), "mesh.internal", Clock::default()).unwrap();
        assert_eq!(open().root_sha256(), open().root_sha256());
        for name in ["root.pem", "issuing.pem"] {
            let mode = directory.path().join(name).metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
    }

    #[test]
    fn the_issuing_certificate_rotates_at_half_of_its_life() {
        let directory = tempfile::tempdir().unwrap();
        let offset = Arc::new(AtomicI64::new(0));
        let authority = Authority::open(directory.path(), "mesh.internal", Clock::shifted(offset.clone())).unwrap();
        let first = authority.issuing_not_after();
        authority.rotate("mesh.internal").unwrap();
        assert_eq!(authority.issuing_not_after(), first);
        offset.store(50 * 24 * 3600, Ordering::Relaxed);
        authority.rotate("mesh.internal").unwrap();
        assert!(authority.issuing_not_after() > first + 40 * 24 * 3600);
    }

    #[test]
    fn requests_that_ask_for_more_than_a_key_are_refused() {
        let granted = id().to_string();
        let good = |csr: &[u8]| requested_key(csr, &id()).is_ok();
        assert!(good(&request(|params| params.subject_alt_names = vec![uri(&granted)])));
        let wrong: Vec<Vec<SanType>> = vec![
            vec![uri("spiffe://mesh.internal/ns/other/sa/web")],
            vec![uri(&granted), uri("spiffe://mesh.internal/ns/other/sa/web")],
            vec![uri(&granted), SanType::DnsName("control.mesh.internal".try_into().unwrap())],
            vec![uri("spiffe://mesh.internal/*")],
        ];
        for names in wrong {
            let csr = request(|params| params.subject_alt_names = names.clone());
            assert!(matches!(requested_key(&csr, &id()), Err(CsrError::Names(_))), "{names:?}");
        }
        let csr = request(|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
        assert_eq!(requested_key(&csr, &id()).err(), Some(CsrError::Authority));
    }

    #[test]
    fn damaged_and_oversized_requests_are_refused() {
        let csr = request(|_| {});
        assert_eq!(requested_key(&vec![0x30; 1 << 20], &id()).err(), Some(CsrError::TooLong));
        for cut in 0..csr.len() {
            assert!(requested_key(&csr[..cut], &id()).is_err());
        }
        let mut flipped = csr.clone();
        let last = flipped.len() - 1;
        flipped[last] ^= 1;
        assert!(matches!(requested_key(&flipped, &id()), Err(CsrError::Signature | CsrError::Malformed)));
        let mut longer = csr;
        longer.push(0);
        assert_eq!(requested_key(&longer, &id()).err(), Some(CsrError::Malformed));
    }

    #[test]
    fn other_kinds_of_keys() {
        let with = |key: KeyPair| CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
        for algorithm in [&rcgen::PKCS_ED25519, &rcgen::PKCS_ECDSA_P384_SHA384] {
            let csr = with(KeyPair::generate_for(algorithm).unwrap());
            assert!(requested_key(&csr, &id()).is_ok(), "{algorithm:?}");
        }
        let rsa = KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).unwrap();
        assert!(requested_key(&with(rsa), &id()).is_ok());
    }
}

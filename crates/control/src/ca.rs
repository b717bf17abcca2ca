//! The certificate authority: a root made on first start, an issuing certificate under it, leaves for workloads and for
//! the control plane's own door.
//!
//! `root.pem` and `issuing.pem` in the state directory hold a certificate and its key each, with mode 0600. The root's
//! key is needed only to make the next issuing certificate: it may be kept elsewhere, then rotation warns.
//!
//! While a root is being replaced there are two. Which of them are trusted, and which one issues, is said by a record of
//! the store ([`Trust`]); files come before the record that names them, and go after it.

mod line;

pub(crate) use line::number_of;

use crate::clock::Clock;
use crate::rotation::Trust;
use arc_swap::ArcSwap;
use line::Line;
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
    /// A root is to be replaced and its key is not here.
    #[error(
        "{} holds no key: without it proxies that are away now could not follow to a new root; put the key back for a \
         start, or rotate with --now, after which they have to join again", .0.display()
    )]
    NoCross(PathBuf),
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
/// Replaced roots from which the control plane's own chain leads to the present one: each makes it two certificates longer.
const MAX_WAY: usize = 4;
/// For peers whose clock is behind.
const BACKDATE: Duration = Duration::from_secs(15 * 60);

/// The authority.
pub struct Authority {
    directory: PathBuf,
    clock: Clock,
    trust_domain: String,
    inner: ArcSwap<Inner>,
}

/// The record in force, and the roots that it names.
struct Inner {
    trust: Trust,
    lines: Vec<Arc<Line>>,
    issuing: Arc<Line>,
}

impl Inner {
    fn line(&self, number: u64) -> Option<&Arc<Line>> {
        self.lines.iter().find(|line| line.number == number)
    }

    fn trusted(&self) -> impl Iterator<Item = &Arc<Line>> {
        self.trust.trusted.iter().filter_map(|number| self.line(*number))
    }

    /// What leads one who was away to the root that issues: each root before it, with what it certified the next with.
    fn way_here(&self) -> Vec<CertificateDer<'static>> {
        let mut way = Vec::new();
        let mut upper = &self.issuing;
        for line in self.lines.iter().rev().filter(|line| line.number < self.issuing.number).take(MAX_WAY) {
            way.extend(upper.cross.clone());
            way.push(line.root.clone());
            upper = line;
        }
        way
    }
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
    /// The number of the root.
    pub number: u64,
}

/// A public key out of a checked request.
pub struct RequestedKey {
    spki: SubjectPublicKeyInfo,
    /// SHA-256 of the subject public key info, in hex.
    pub sha256: String,
}

impl Authority {
    /// Loads the authority from the state directory, as the record says; makes the first root where there is none.
    ///
    /// # Errors
    /// When a file cannot be read or written, or is damaged.
    pub fn open(directory: &Path, trust_domain: &str, clock: Clock, trust: &Trust) -> Result<Self, CaError> {
        let path = directory.join("root.pem");
        if !path.exists() && *trust == Trust::default() {
            let (certificate, key) = make_root(trust_domain, clock.now())?;
            write_pair(&path, &certificate, &key)?;
        }
        let inner = ArcSwap::from_pointee(Self::load(directory, trust_domain, &clock, trust, &[])?);
        Ok(Self { directory: directory.to_owned(), clock, trust_domain: trust_domain.to_owned(), inner })
    }

    /// The roots that a record names; those that are held already are not read again.
    fn load(
        directory: &Path,
        trust_domain: &str,
        clock: &Clock,
        trust: &Trust,
        held: &[Arc<Line>],
    ) -> Result<Inner, CaError> {
        let mut lines = Vec::new();
        for number in trust.numbers() {
            let issues = trust.trusted.contains(&number);
            let line = match held.iter().find(|line| line.number == number) {
                Some(line) if issues && line.issuing.read().is_some() => line.clone(),
                _ => Arc::new(Line::load(directory, number, issues, trust_domain, clock)?),
            };
            lines.push(line);
        }
        let issuing = lines.iter().find(|line| line.number == trust.issuing).cloned();
        let issuing = issuing.ok_or_else(|| CaError::Damaged {
            path: directory.to_owned(),
            reason: format!("the record of roots names no root with number {}", trust.issuing),
        })?;
        Ok(Inner { trust: trust.clone(), lines, issuing })
    }

    /// The record in force.
    pub fn trust(&self) -> Trust {
        self.inner.load().trust.clone()
    }

    /// Puts a record into force that is in the store already.
    ///
    /// # Errors
    /// When a root that it names cannot be loaded; the record before stays in force.
    pub(crate) fn adopt(&self, trust: &Trust) -> Result<(), CaError> {
        let held = self.inner.load();
        let next = Self::load(&self.directory, &self.trust_domain, &self.clock, trust, &held.lines)?;
        self.inner.store(Arc::new(next));
        Ok(())
    }

    /// Makes a root that is to replace the present one, in files of its own.
    ///
    /// # Errors
    /// When the present root's key is not here, so that those who are away could not follow, unless `now`; or when a file
    /// cannot be written.
    pub(crate) fn make_successor(&self, number: u64, now: bool) -> Result<(), CaError> {
        let issuing = self.inner.load().issuing.clone();
        if issuing.key.is_none() && !now {
            let [path, _] = line::files(&self.directory, issuing.number);
            return Err(CaError::NoCross(path));
        }
        issuing.successor(&self.directory, number, &self.trust_domain, &self.clock, !now).map(drop)
    }

    /// Removes the keys of roots that were replaced, and all of those that nobody knows any more.
    ///
    /// # Errors
    /// When a file cannot be written. It is no harm to try again.
    pub(crate) fn tidy(&self, trust: &Trust) -> Result<(), CaError> {
        let names = std::fs::read_dir(&self.directory).into_iter().flatten().flatten();
        let names = names.filter_map(|entry| number_of(entry.file_name().to_str()?));
        let found: std::collections::BTreeSet<u64> = names.collect();
        for number in found {
            if trust.trusted.contains(&number) {
                continue;
            }
            match trust.retired.iter().any(|retired| retired.number == number) {
                true => Line::retire(&self.directory, number)?,
                false => Line::forget(&self.directory, number),
            }
        }
        Ok(())
    }

    /// The certificate of the root that certificates are issued under.
    pub fn root(&self) -> CertificateDer<'static> {
        self.inner.load().issuing.root.clone()
    }

    /// The roots whose certificates are accepted.
    pub fn roots(&self) -> Vec<CertificateDer<'static>> {
        self.inner.load().trusted().map(|line| line.root.clone()).collect()
    }

    /// The roots under which a certificate can at least be renewed.
    pub(crate) fn known_roots(&self) -> Vec<CertificateDer<'static>> {
        self.inner.load().lines.iter().map(|line| line.root.clone()).collect()
    }

    /// Whether certificates under a root are accepted.
    pub(crate) fn is_trusted(&self, number: u64) -> bool {
        self.inner.load().trust.trusted.contains(&number)
    }

    /// The certificate of a root by its number.
    pub(crate) fn root_of(&self, number: u64) -> Option<CertificateDer<'static>> {
        self.inner.load().line(number).map(|line| line.root.clone())
    }

    /// SHA-256 of the subject public key info of a root, by its number.
    pub(crate) fn sha256_of(&self, number: u64) -> Option<[u8; 32]> {
        self.inner.load().line(number).map(|line| line.sha256)
    }

    /// When a root ends, in unix seconds.
    pub(crate) fn not_after_of(&self, number: u64) -> Option<i64> {
        self.inner.load().line(number).map(|line| line.not_after)
    }

    /// SHA-256 of the subject public key info of the root that issues.
    pub fn root_sha256(&self) -> [u8; 32] {
        self.inner.load().issuing.sha256
    }

    /// What join tokens pin. While a root is being replaced that is the old one: whoever finds the new one can follow from
    /// it, and should the replacement be aborted, it is the one that stays. Unless the old one is not to be believed.
    pub fn pin(&self) -> [u8; 32] {
        let inner = self.inner.load();
        let stays = match &inner.trust.rotation {
            Some(rotation) if !rotation.now => rotation.from.min(rotation.to),
            Some(rotation) => rotation.to,
            None => inner.trust.issuing,
        };
        inner.line(stays).unwrap_or(&inner.issuing).sha256
    }

    /// Whether a join token with this pin leads here.
    pub fn is_pinned(&self, sha256: &[u8; 32]) -> bool {
        self.inner.load().lines.iter().any(|line| line.sha256 == *sha256)
    }

    /// The number of the root above a peer's certificate, as its chain says, and whether certificates under it are
    /// accepted. None for a chain that leads to no root of ours.
    pub(crate) fn line_of(&self, leaf: &CertificateDer<'_>, above: &[CertificateDer<'_>]) -> Option<(u64, bool)> {
        let inner = self.inner.load();
        if let [only] = inner.lines.as_slice() {
            // What was verified at all was verified under it.
            return Some((only.number, true));
        }
        // What a peer's issuer was certified with beside does not count: that is for those who know the old root alone.
        let direct = &above[..above.len().min(1)];
        let under = |line: &&Arc<Line>| crate::tls::chains(&line.root, leaf, direct);
        inner.lines.iter().find(under).map(|line| (line.number, inner.trust.trusted.contains(&line.number)))
    }

    /// When the root that issues ends, in unix seconds.
    pub fn root_not_after(&self) -> i64 {
        self.inner.load().issuing.not_after
    }

    /// Whether the next issuing certificate can be made here.
    pub fn has_root_key(&self) -> bool {
        self.inner.load().issuing.key.is_some()
    }

    /// When the issuing certificate ends, in unix seconds.
    pub fn issuing_not_after(&self) -> i64 {
        self.inner.load().issuing.issuing.read().as_ref().map_or(0, |issuing| unix(issuing.not_after))
    }

    /// Makes a new issuing certificate when half of the present one's life has passed.
    ///
    /// # Errors
    /// When it is due and cannot be made; the present one stays in use.
    pub fn rotate(&self) -> Result<(), CaError> {
        for line in self.inner.load().trusted() {
            let due = line.issuing.read().as_ref().is_some_and(|issuing| self.clock.now() >= issuing.renew_at);
            if due && line.key.is_some() {
                let next = line.load_issuing(&self.directory, &self.trust_domain, &self.clock)?;
                *line.issuing.write() = Some(Arc::new(next));
            }
        }
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
        let inner = self.inner.load();
        let mut issued = self.sign(&inner.issuing, params, &key.spki)?;
        if inner.trust.trusted.len() > 1 {
            // For peers that cannot be told of the new root before they meet it.
            issued.chain.extend(inner.issuing.cross.clone());
        }
        Ok(issued)
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
        let inner = self.inner.load();
        let line = &inner.issuing;
        let mut issued = self.sign(line, params, &key)?;
        // The root travels too: a joining proxy knows only the hash of its key, or of the key of a root before.
        issued.chain.push(line.root.clone());
        issued.chain.extend(inner.way_here());
        Ok((issued, PrivatePkcs8KeyDer::from(key.serialize_der()).into()))
    }

    fn sign(
        &self,
        line: &Line,
        mut params: CertificateParams,
        key: &impl rcgen::PublicKeyData,
    ) -> Result<Issued, CaError> {
        let away = || CaError::RootKeyAway(line::files(&self.directory, line.number)[0].clone());
        let issuing = line.issuing.read().clone().ok_or_else(away)?;
        if self.clock.now() >= issuing.not_after {
            return Err(away());
        }
        params.not_after = params.not_after.min(OffsetDateTime::from(issuing.not_after));
        let not_after = params.not_after.unix_timestamp();
        let certificate = params.signed_by(key, &issuing.issuer)?;
        let chain = vec![certificate.der().clone(), issuing.certificate.clone()];
        Ok(Issued { chain, not_after, number: line.number })
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
    let text = format!("{}{}", pem("CERTIFICATE", certificate), private_key_of(key));
    crate::file::replace(path, 0o600, text.as_bytes()).map_err(|source| CaError::Io { path: path.to_owned(), source })
}

fn private_key_of(pkcs8: &[u8]) -> String {
    pem("PRIVATE KEY", pkcs8)
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
mod tests;

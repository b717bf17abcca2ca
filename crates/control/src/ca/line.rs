//! One root with the issuing certificate under it, in two files of the state directory.
//!
//! The first root of a control plane is in `root.pem` and `issuing.pem`, the one with number `n` in `root-n.pem` and
//! `issuing-n.pem`. A root that replaces another is certified by that one as well (a cross-certificate, the second
//! certificate in its file): whoever trusts the old root alone, since it was away, can follow a chain through it.

use super::{
    CaError, Issuing, ROOT_LIFETIME, authority_params, key_pair, make_issuing, pem, private_key_of, read_pair,
    write_pair,
};
use crate::clock::Clock;
use parking_lot::RwLock;
use rcgen::{Issuer, KeyPair};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use x509_parser::prelude::{FromDer, X509Certificate};

/// A root, and what is issued with it.
pub(crate) struct Line {
    pub(crate) number: u64,
    pub(crate) root: CertificateDer<'static>,
    /// SHA-256 of the root's subject public key info.
    pub(crate) sha256: [u8; 32],
    pub(crate) not_after: i64,
    /// PKCS #8; none where it is kept elsewhere.
    pub(super) key: Option<Vec<u8>>,
    /// The same key, certified by the root before.
    pub(super) cross: Option<CertificateDer<'static>>,
    /// None for a root that was replaced.
    pub(super) issuing: RwLock<Option<Arc<Issuing>>>,
}

/// The files of the root with this number.
pub(crate) fn files(directory: &Path, number: u64) -> [PathBuf; 2] {
    match number {
        1 => [directory.join("root.pem"), directory.join("issuing.pem")],
        _ => [directory.join(format!("root-{number}.pem")), directory.join(format!("issuing-{number}.pem"))],
    }
}

/// The number in the name of a file of a root, or of an issuing certificate.
pub(crate) fn number_of(name: &str) -> Option<u64> {
    let rest = name.strip_prefix("root").or_else(|| name.strip_prefix("issuing"))?.strip_suffix(".pem")?;
    match rest {
        "" => Some(1),
        _ => rest.strip_prefix('-')?.parse().ok().filter(|number| *number > 1),
    }
}

impl Line {
    /// Loads a root; makes its issuing certificate where that is missing or due and `issues` says that one is needed.
    pub(super) fn load(
        directory: &Path,
        number: u64,
        issues: bool,
        trust_domain: &str,
        clock: &Clock,
    ) -> Result<Self, CaError> {
        let [path, _] = files(directory, number);
        let (root, key) = read_pair(&path)?;
        let damaged = |reason: &str| CaError::Damaged { path: path.clone(), reason: reason.to_owned() };
        let (_, parsed) = X509Certificate::from_der(&root).map_err(|_| damaged("the certificate cannot be read"))?;
        if !parsed.is_ca() {
            return Err(damaged("the certificate is not an authority's"));
        }
        let sha256 = Sha256::digest(parsed.public_key().raw).into();
        let not_after = parsed.validity().not_after.timestamp();
        drop(parsed);
        let text = std::fs::read(&path).map_err(|source| CaError::Io { path: path.clone(), source })?;
        let cross = match CertificateDer::pem_slice_iter(&text).nth(1) {
            Some(Ok(cross)) => Some(cross),
            Some(Err(_)) => return Err(damaged("its second certificate cannot be read")),
            None => None,
        };
        let line = Self { number, root, sha256, not_after, key, cross, issuing: RwLock::default() };
        if issues {
            let issuing = line.load_issuing(directory, trust_domain, clock)?;
            *line.issuing.write() = Some(Arc::new(issuing));
        }
        Ok(line)
    }

    pub(super) fn load_issuing(&self, directory: &Path, trust_domain: &str, clock: &Clock) -> Result<Issuing, CaError> {
        let [root, path] = files(directory, self.number);
        if path.exists() {
            let (certificate, key) = read_pair(&path)?;
            let key = key.ok_or_else(|| CaError::Damaged { path: path.clone(), reason: "it holds no key".into() })?;
            let issuing = Issuing::new(certificate, &key, &path)?;
            if clock.now() < issuing.renew_at || self.key.is_none() {
                return Ok(issuing);
            }
        }
        let Some(key) = &self.key else { return Err(CaError::RootKeyAway(root)) };
        let issuer = Issuer::from_ca_cert_der(&self.root, key_pair(key)?)?;
        let (certificate, key) = make_issuing(&issuer, trust_domain, clock.now())?;
        write_pair(&path, &certificate, &key)?;
        Issuing::new(certificate, &key, &path)
    }

    /// Makes a root that is to replace this one, in files of its own. Nothing refers to them yet. A root that is not to be
    /// believed vouches for nothing.
    pub(super) fn successor(
        &self,
        directory: &Path,
        number: u64,
        trust_domain: &str,
        clock: &Clock,
        vouches: bool,
    ) -> Result<Self, CaError> {
        let key = KeyPair::generate()?;
        // A name of its own: peers that know both find the right one by it.
        let name = format!("Sheer root {:08x} of {trust_domain}", rand::random::<u32>());
        let params = authority_params(&name, trust_domain, clock.now(), ROOT_LIFETIME, None)?;
        let root = params.self_signed(&key)?;
        let mut text = pem("CERTIFICATE", root.der());
        if let Some(own) = self.key.as_ref().filter(|_| vouches) {
            let mut params = authority_params(&name, trust_domain, clock.now(), ROOT_LIFETIME, None)?;
            params.not_after = params.not_after.min(time_of(self.not_after));
            params.use_authority_key_identifier_extension = true;
            let cross = params.signed_by(&key, &Issuer::from_ca_cert_der(&self.root, key_pair(own)?)?)?;
            text.push_str(&pem("CERTIFICATE", cross.der()));
        }
        text.push_str(&private_key_of(&key.serialize_der()));
        let [path, issuing] = files(directory, number);
        // What an attempt that broke off has left would not fit.
        let _ = std::fs::remove_file(issuing);
        crate::file::replace(&path, 0o600, text.as_bytes()).map_err(|source| CaError::Io { path, source })?;
        Self::load(directory, number, true, trust_domain, clock)
    }

    /// Removes what certificates could be issued with; the certificate stays for those who come back late.
    pub(super) fn retire(directory: &Path, number: u64) -> Result<(), CaError> {
        let [path, issuing] = files(directory, number);
        let text = std::fs::read(&path).map_err(|source| CaError::Io { path: path.clone(), source })?;
        let certificates = CertificateDer::pem_slice_iter(&text).filter_map(Result::ok);
        let kept: String = certificates.map(|certificate| pem("CERTIFICATE", &certificate)).collect();
        crate::file::replace(&path, 0o600, kept.as_bytes()).map_err(|source| CaError::Io { path, source })?;
        match std::fs::remove_file(&issuing) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(CaError::Io { path: issuing, source }),
            _ => Ok(()),
        }
    }

    /// Removes all of it.
    pub(super) fn forget(directory: &Path, number: u64) {
        for path in files(directory, number) {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "a file of a former root cannot be removed");
                }
                _ => {}
            }
        }
    }
}

fn time_of(unix_s: i64) -> time::OffsetDateTime {
    time::OffsetDateTime::from_unix_timestamp(unix_s).unwrap_or(time::OffsetDateTime::UNIX_EPOCH)
}

//! SPIFFE identities of the form `spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>` (SPIFFE-ID standard).

use crate::name::{DnsLabel, NameError};
use std::fmt;

/// A workload's identity.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    trust_domain: String,
    namespace: DnsLabel,
    service_account: DnsLabel,
}

/// Why a text is not a workload identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// It does not have the one form that Sheer issues and accepts.
    #[error("expected spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>")]
    Form,
    /// The trust domain has characters other than `a-z 0-9 . - _`, is empty, or is longer than 255.
    #[error("the trust domain must be 1 to 255 of a-z, 0-9, '.', '-' and '_'")]
    TrustDomain,
    /// The namespace or the service account is no name.
    #[error("{0}")]
    Name(#[from] NameError),
}

impl SpiffeId {
    /// An identity from its parts.
    ///
    /// # Errors
    /// When the trust domain is malformed.
    pub fn new(trust_domain: &str, namespace: DnsLabel, service_account: DnsLabel) -> Result<Self, IdentityError> {
        check_trust_domain(trust_domain)?;
        Ok(Self { trust_domain: trust_domain.to_owned(), namespace, service_account })
    }

    /// Parses the exact form; nothing is normalised, so that an identity has one spelling.
    ///
    /// # Errors
    /// When the text has another form.
    pub fn parse(text: &str) -> Result<Self, IdentityError> {
        let rest = text.strip_prefix("spiffe://").ok_or(IdentityError::Form)?;
        let mut parts = rest.split('/');
        let mut part = || parts.next().ok_or(IdentityError::Form);
        let (trust_domain, ns, namespace, sa, account) = (part()?, part()?, part()?, part()?, part()?);
        if ns != "ns" || sa != "sa" || parts.next().is_some() {
            return Err(IdentityError::Form);
        }
        Self::new(trust_domain, DnsLabel::parse(namespace)?, DnsLabel::parse(account)?)
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// The namespace.
    pub fn namespace(&self) -> &DnsLabel {
        &self.namespace
    }

    /// The service account.
    pub fn service_account(&self) -> &DnsLabel {
        &self.service_account
    }
}

/// Checks a trust domain's characters and length (SPIFFE-ID, section 2.1).
///
/// # Errors
/// [`IdentityError::TrustDomain`].
pub fn check_trust_domain(text: &str) -> Result<(), IdentityError> {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
    if text.is_empty() || text.len() > 255 || !text.bytes().all(allowed) {
        return Err(IdentityError::TrustDomain);
    }
    Ok(())
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_it_prints() {
        let text = "spiffe://mesh.internal/ns/default/sa/web";
        assert_eq!(SpiffeId::parse(text).unwrap().to_string(), text);
    }

    #[test]
    fn refuses_every_other_form() {
        for text in [
            "",
            "spiffe://",
            "spiffe://td/ns/a",
            "spiffe://td/ns/a/sa/b/",
            "spiffe://td/ns/a/sa/b/c",
            "spiffe://TD/ns/a/sa/b",
            "spiffe://td:80/ns/a/sa/b",
            "spiffe://td/ns/a/sa/b?x",
            "spiffe://td/ns/%61/sa/b",
            "spiffe://td/ns//sa/b",
            "spiffe://td/sa/a/ns/b",
            "SPIFFE://td/ns/a/sa/b",
            "https://td/ns/a/sa/b",
        ] {
            assert!(SpiffeId::parse(text).is_err(), "{text}");
        }
    }
}

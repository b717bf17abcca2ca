//! Names of namespaces, services and workloads, and the host names made of them.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

/// Why a text is no name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not an RFC 1123 label.
    #[error("'{0}' is no name: 1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit")]
    Label(String),
    /// Not `<name>` or `<namespace>/<name>`.
    #[error("'{0}' is neither NAME nor NAMESPACE/NAME")]
    Service(String),
}

/// An RFC 1123 label: 1 to 63 of `a-z 0-9 -`, beginning and ending with a letter or digit. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DnsLabel(Arc<str>);

impl DnsLabel {
    /// Parses a label.
    ///
    /// # Errors
    /// [`NameError::Label`] with at most the first 80 characters of the text.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let bytes = text.as_bytes();
        let inner = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-';
        let valid = !bytes.is_empty()
            && bytes.len() <= 63
            && bytes.iter().all(inner)
            && bytes[0] != b'-'
            && bytes[bytes.len() - 1] != b'-';
        if !valid {
            return Err(NameError::Label(text.chars().take(80).collect()));
        }
        Ok(Self(text.into()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for DnsLabel {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DnsLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for DnsLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}

/// A service, or any other namespaced object: `<namespace>/<name>`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceName {
    /// The namespace.
    pub namespace: DnsLabel,
    /// The name in it.
    pub name: DnsLabel,
}

/// The namespace of objects that name none.
pub const DEFAULT_NAMESPACE: &str = "default";

impl ServiceName {
    /// Parses `NAME` (in namespace `default`) or `NAMESPACE/NAME`.
    ///
    /// # Errors
    /// When either part is no label or there are more parts.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let (namespace, name) = text.split_once('/').unwrap_or((DEFAULT_NAMESPACE, text));
        if name.contains('/') {
            return Err(NameError::Service(text.chars().take(80).collect()));
        }
        Ok(Self { namespace: DnsLabel::parse(namespace)?, name: DnsLabel::parse(name)? })
    }

    /// The full host name: `<name>.<namespace>.svc.<domain>`.
    pub fn host(&self, cluster_domain: &str) -> String {
        format!("{}.{}.svc.{cluster_domain}", self.name, self.namespace)
    }

    /// The server name of a mesh connection to `port` of one of its workloads: `p<port>.<host>`.
    pub fn server_name(&self, port: u16, cluster_domain: &str) -> String {
        format!("p{port}.{}.{}.svc.{cluster_domain}", self.name, self.namespace)
    }
}

/// The parts of a mesh connection's server name, or `None` for any other text.
pub fn parse_server_name<'a>(text: &'a str, cluster_domain: &str) -> Option<(u16, &'a str, &'a str)> {
    let front = text.strip_suffix(cluster_domain)?.strip_suffix(".svc.")?;
    let mut parts = front.split('.');
    let (port, name, namespace) = (parts.next()?, parts.next()?, parts.next()?);
    if parts.next().is_some() {
        return None;
    }
    let digits = port.strip_prefix('p')?;
    if digits.starts_with('0') || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    Some((digits.parse().ok()?, namespace, name))
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Debug for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels() {
        for good in ["a", "web", "web-2", "0", &"x".repeat(63)] {
            assert!(DnsLabel::parse(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", "ä", "a b", &"x".repeat(64)] {
            assert!(DnsLabel::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn services_and_their_hosts() {
        let web = ServiceName::parse("web").unwrap();
        assert_eq!(web.to_string(), "default/web");
        assert_eq!(web.host("mesh.internal"), "web.default.svc.mesh.internal");
        assert!(ServiceName::parse("a/b/c").is_err());
        let name = web.server_name(8080, "mesh.internal");
        assert_eq!(parse_server_name(&name, "mesh.internal"), Some((8080, "default", "web")));
        for bad in [
            "p80.web.svc.mesh.internal",
            "80.web.default.svc.mesh.internal",
            "p080.web.default.svc.mesh.internal",
            "p99999.web.default.svc.mesh.internal",
            "p80.a.web.default.svc.mesh.internal",
        ] {
            assert_eq!(parse_server_name(bad, "mesh.internal"), None, "{bad}");
        }
    }
}

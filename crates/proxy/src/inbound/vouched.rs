//! What a request says of who called, and from where: the mesh vouches for it, or it goes no further.
//!
//! Identity fields are the mesh's alone, whoever calls. Fields that proxies outside the mesh write ([`is_forwarding`]) are
//! the word of whoever wrote them: of a mesh peer they pass as its application's own, which has a verified name; of anybody
//! else they are believed where the workload was started with `--trust-forwarded`, and replaced by what is known here
//! otherwise.

use crate::error::RequestError;
use crate::plan::{Mode, Plan};
use crate::record::IDENTITY_FIELDS;
use http::HeaderValue;
use sheer_core::cause::Cause;
use sheer_core::head::{Fields, Known, TooManyFields};
use sheer_core::identity::SpiffeId;
use std::net::IpAddr;

/// What the requests of one connection are given.
#[derive(Clone, Debug, Default)]
pub(super) struct Vouched {
    /// The value of `x-forwarded-client-cert`.
    identity: Option<HeaderValue>,
    /// The caller's address, where its own word of where requests come from is not believed.
    stranger: Option<HeaderValue>,
}

impl Vouched {
    /// For a mesh peer.
    pub(super) fn peer(peer: &SpiffeId) -> Self {
        Self { identity: HeaderValue::try_from(format!("URI={peer}")).ok(), stranger: None }
    }

    /// For somebody without a name, calling from this address. Where the mesh only watches, nothing is changed.
    pub(super) fn nobody(plan: &Plan, mode: Mode, address: Option<IpAddr>) -> Self {
        let address = address.map(|address| address.to_canonical());
        let is_believed = |address: IpAddr| plan.trust_forwarded.iter().any(|network| network.contains(&address));
        let stranger = match address {
            _ if mode == Mode::Watch => None,
            Some(address) if is_believed(address) => None,
            // Nobody's word counts for less than an unknown address.
            address => HeaderValue::try_from(address.map_or("unknown".to_owned(), |it| it.to_string())).ok(),
        };
        Self { identity: None, stranger }
    }

    /// Writes it into a request, in place of what the caller said.
    ///
    /// # Errors
    /// When the head has no room left.
    pub(super) fn write(&self, fields: &mut Fields) -> Result<(), RequestError> {
        fields.remove_known(IDENTITY_FIELDS);
        if self.stranger.is_some() && fields.iter().any(|(name, ..)| is_forwarding(name)) {
            fields.retain(|name, _, _| !is_forwarding(name));
        }
        let full = |error: TooManyFields| RequestError::because(Cause::HeadTooLarge, error);
        if let Some(identity) = &self.identity {
            fields.append_known(Known::ClientCert, identity).map_err(full)?;
        }
        if let Some(address) = &self.stranger {
            fields.append("x-forwarded-for", address.as_bytes()).map_err(full)?;
            fields.append("x-forwarded-proto", b"http").map_err(full)?;
        }
        Ok(())
    }
}

/// Whether a field tells of where a request was before: `X-Forwarded-*`, `Forwarded` (RFC 7239), `X-Real-IP`.
fn is_forwarding(name: &[u8]) -> bool {
    const PREFIX: &[u8] = b"x-forwarded-";
    name.get(..PREFIX.len()).is_some_and(|start| start.eq_ignore_ascii_case(PREFIX))
        || name.eq_ignore_ascii_case(b"forwarded")
        || name.eq_ignore_ascii_case(b"x-real-ip")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: [(&str, &str); 11] = [
        ("X-Forwarded-For", "1.2.3.4"),
        ("x-forwarded-FOR", "5.6.7.8"),
        ("X-Forwarded-Host", "bank.example"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Prefix", "/admin"),
        ("X-Forwarded-Port", "443"),
        ("X-Forwarded-User", "root"),
        ("Forwarded", "for=1.2.3.4"),
        ("X-REAL-ip", "1.2.3.4"),
        ("X-Forwarded-Client-Cert", "URI=spiffe://td/ns/ops/sa/admin"),
        ("X-Forwarded", "its own"),
    ];

    /// What the application is told, of these fields and of one that is nobody's.
    fn told(vouched: &Vouched) -> Vec<(String, String)> {
        let mut fields = Fields::default();
        for (name, value) in SAID {
            fields.append(name, value.as_bytes()).unwrap();
        }
        vouched.write(&mut fields).unwrap();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        fields.iter().map(|(name, value, _)| (text(name), text(value))).collect()
    }

    fn said(range: std::ops::Range<usize>) -> Vec<(String, String)> {
        SAID[range].iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn plan(trusted: &[&str]) -> Plan {
        let mut plan = crate::mesh_tests::plan("web", &[80], Mode::Permissive);
        plan.trust_forwarded = trusted.iter().map(|network| network.parse().unwrap()).collect();
        plan
    }

    fn nobody(trusted: &[&str], mode: Mode, address: &str) -> Vec<(String, String)> {
        told(&Vouched::nobody(&plan(trusted), mode, Some(address.parse().unwrap())))
    }

    #[test]
    fn a_strangers_word_is_replaced_by_what_is_known() {
        let own = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        for (trusted, mode, address, shown) in [
            (&[][..], Mode::Strict, "192.0.2.1", "192.0.2.1"),
            (&[], Mode::Permissive, "::ffff:192.0.2.1", "192.0.2.1"),
            (&["192.0.2.0/31"], Mode::Permissive, "192.0.2.2", "192.0.2.2"),
        ] {
            let left = [said(10..11), vec![own("x-forwarded-for", shown), own("x-forwarded-proto", "http")]].concat();
            assert_eq!(nobody(trusted, mode, address), left, "{trusted:?} {address}");
        }
        let unknown = told(&Vouched::nobody(&plan(&["0.0.0.0/0"]), Mode::Strict, None));
        assert!(unknown.contains(&own("x-forwarded-for", "unknown")), "{unknown:?}");
    }

    /// But an identity is never theirs to tell.
    #[test]
    fn who_is_trusted_or_a_peer_or_only_watched_is_passed_on() {
        let theirs = [said(0..9), said(10..11)].concat();
        assert_eq!(nobody(&["10.0.0.0/8", "192.0.2.1/32"], Mode::Permissive, "::ffff:192.0.2.1"), theirs);
        assert_eq!(nobody(&["fd00::/8"], Mode::Strict, "fd00::1"), theirs);
        assert_eq!(nobody(&[], Mode::Watch, "192.0.2.1"), theirs);
        let peer = SpiffeId::parse("spiffe://mesh.internal/ns/default/sa/api").unwrap();
        let identity = ("x-forwarded-client-cert".to_owned(), format!("URI={peer}"));
        assert_eq!(told(&Vouched::peer(&peer)), [theirs, vec![identity]].concat());
    }
}

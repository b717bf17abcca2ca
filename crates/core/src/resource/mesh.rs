//! `Mesh`: what holds for the whole mesh.

use super::decode::Cursor;
use super::meta::Meta;
use crate::identity::check_trust_domain;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::time::Duration;

/// Settings of the whole mesh; what is not written has its default in [`crate::compile::MeshSettings`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mesh {
    /// Name, labels and place.
    pub meta: Meta,
    /// The trust domain of all identities.
    pub trust_domain: Option<String>,
    /// The domain of service host names.
    pub cluster_domain: Option<String>,
    /// How long a workload's certificate is valid.
    pub certificate_lifetime: Option<Duration>,
    /// How long after its expiry a certificate may still be renewed with its own key.
    pub renewal_grace: Option<Duration>,
    /// Where services' IPv4 addresses come from.
    pub virtual_v4: Option<Ipv4Net>,
    /// Where services' IPv6 addresses come from.
    pub virtual_v6: Option<Ipv6Net>,
    /// What happens to calls that leave the mesh.
    pub egress: Option<Egress>,
}

/// What happens to calls to destinations that the mesh does not know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Egress {
    /// They pass.
    #[default]
    Allow,
    /// They are refused.
    Deny,
}

const MIN_LIFETIME: Duration = Duration::from_secs(10);
const MAX_LIFETIME: Duration = Duration::from_secs(366 * 24 * 3600);

pub(super) fn decode(at: Option<&Cursor<'_>>, meta: Meta) -> Option<Mesh> {
    let mut mesh = Mesh {
        meta,
        trust_domain: None,
        cluster_domain: None,
        certificate_lifetime: None,
        renewal_grace: None,
        virtual_v4: None,
        virtual_v6: None,
        egress: None,
    };
    let Some(at) = at else { return Some(mesh) };
    at.object(|fields| {
        mesh.trust_domain = fields.optional("trustDomain").and_then(|it| trust_domain(&it));
        mesh.cluster_domain = fields.optional("clusterDomain").and_then(|it| it.host_name(false));
        mesh.certificate_lifetime =
            fields.optional("certificateLifetime").and_then(|it| between(&it, MIN_LIFETIME, MAX_LIFETIME));
        mesh.renewal_grace = fields.optional("renewalGrace").and_then(|it| between(&it, Duration::ZERO, MAX_LIFETIME));
        if let Some(at) = fields.optional("virtualRanges") {
            virtual_ranges(&at, &mut mesh);
        }
        let egress = [("allow", Egress::Allow), ("deny", Egress::Deny)];
        mesh.egress = fields.optional("egress").and_then(|it| it.choice(&egress));
        fields.not_yet(&["defaultAuthorization", "defaultMode"]);
        Some(())
    })?;
    Some(mesh)
}

fn trust_domain(at: &Cursor<'_>) -> Option<String> {
    let text = at.text()?;
    match check_trust_domain(text) {
        Ok(()) => Some(text.to_owned()),
        Err(error) => {
            at.error(error.to_string());
            None
        }
    }
}

fn between(at: &Cursor<'_>, low: Duration, high: Duration) -> Option<Duration> {
    let duration = at.duration()?;
    if (low..=high).contains(&duration) {
        return Some(duration);
    }
    at.error(format!("{duration:?} is not between {}s and {}h", low.as_secs(), high.as_secs() / 3600));
    None
}

/// At most one range of each family, with room for services and inside what can be an address of a service.
fn virtual_ranges(at: &Cursor<'_>, mesh: &mut Mesh) {
    for item in at.items(2) {
        match item.cidr() {
            None => {}
            Some(IpNet::V4(net)) => {
                let address = net.network();
                if !(8..=24).contains(&net.prefix_len()) {
                    item.error_help(format!("/{} is no useful size", net.prefix_len()), "write a prefix of /8 to /24");
                } else if address.is_loopback() || address.is_multicast() || address.octets()[0] == 0 {
                    item.error_help(format!("{net} cannot be routed"), "choose a part of 240.0.0.0/4");
                } else if mesh.virtual_v4.replace(net).is_some() {
                    item.error("a second IPv4 range");
                }
            }
            Some(IpNet::V6(net)) => {
                if !(16..=96).contains(&net.prefix_len()) {
                    item.error_help(format!("/{} is no useful size", net.prefix_len()), "write a prefix of /16 to /96");
                } else if net.network().is_multicast() || net.network().segments()[0] & 0xffc0 == 0xfe80 {
                    item.error_help(format!("{net} cannot be routed"), "choose a part of fd00::/8");
                } else if mesh.virtual_v6.replace(net).is_some() {
                    item.error("a second IPv6 range");
                }
            }
        }
    }
}

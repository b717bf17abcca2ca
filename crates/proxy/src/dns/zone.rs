//! The names that the mesh answers for, made from the index of all services alone.

use sheer_core::snapshot::Service;
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Names and their addresses. Names are lower-case, without a trailing dot.
#[derive(Debug, Default)]
pub struct Zone {
    domain: String,
    /// The namespace of the workload that asks.
    namespace: String,
    hosts: HashMap<Box<str>, Addresses>,
    /// Names under the domain that only have names below them.
    branches: HashSet<Box<str>>,
}

/// The addresses of a name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// A records.
    pub v4: Vec<Ipv4Addr>,
    /// AAAA records.
    pub v6: Vec<Ipv6Addr>,
}

/// What is known of a name.
#[derive(Debug, PartialEq, Eq)]
pub enum Lookup<'a> {
    /// It has these addresses.
    Found(&'a Addresses),
    /// It exists, with names below it, but without any record.
    Branch,
    /// It would be the mesh's and does not exist.
    Missing,
    /// It is not the mesh's: the host's resolvers know.
    Foreign,
}

impl Zone {
    /// The names of these services in a mesh whose names end in `domain`, for a workload of `namespace`. Where two
    /// services claim a host name, it belongs to the one whose full name it is, then to the one of which it is a short form,
    /// and then to the first by namespace and name, as in [`Snapshot::service_named`].
    ///
    /// [`Snapshot::service_named`]: sheer_core::snapshot::Snapshot::service_named
    pub fn new<'a>(domain: &str, namespace: &str, services: impl IntoIterator<Item = &'a Service>) -> Self {
        let domain = domain.trim_end_matches('.').to_ascii_lowercase();
        let mut zone = Self { domain, namespace: namespace.to_owned(), ..Self::default() };
        let mut services: Vec<_> = services.into_iter().collect();
        services.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let addressed: Vec<_> = services.iter().map(|service| (service, addresses_of(service))).collect();
        let own = addressed.iter().filter_map(|(service, addresses)| Some((service.hosts.first()?, addresses)));
        let extra = addressed
            .iter()
            .flat_map(|(service, addresses)| service.hosts.iter().skip(1).map(move |host| (host, addresses)));
        for (host, addresses) in own.chain(extra) {
            zone.insert(host.trim_end_matches('.').to_ascii_lowercase(), addresses);
        }
        if !zone.domain.is_empty() {
            zone.branches.insert(zone.domain.clone().into());
            zone.branches.insert(format!("svc.{}", zone.domain).into());
        }
        zone
    }

    fn insert(&mut self, host: String, addresses: &Addresses) {
        if self.is_under_domain(&host) {
            let mut rest = host.as_str();
            while let Some((_, parent)) = rest.split_once('.') {
                if parent.len() <= self.domain.len() {
                    break;
                }
                self.branches.insert(parent.into());
                rest = parent;
            }
        }
        self.hosts.entry(host.into()).or_insert_with(|| addresses.clone());
    }

    /// The domain under which the mesh alone answers; empty before the mesh is known.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// Looks up a lower-case name without a trailing dot.
    pub fn lookup(&self, name: &str) -> Lookup<'_> {
        let full = self.in_full(name).and_then(|full| self.hosts.get(full.as_str()));
        if let Some(addresses) = full.or_else(|| self.hosts.get(name)) {
            return Lookup::Found(addresses);
        }
        if is_own_reverse(name) {
            return Lookup::Missing;
        }
        if !self.is_under_domain(name) {
            return Lookup::Foreign;
        }
        if self.branches.contains(name) { Lookup::Branch } else { Lookup::Missing }
    }

    /// What a short name means: `service`, `service.namespace` or `service.namespace.svc`. Where resolv.conf is the
    /// mesh's own its search list asks for the full name; where it is the host's, the short one is all that is asked.
    fn in_full(&self, name: &str) -> Option<String> {
        let front = name.strip_suffix(".svc").unwrap_or(name);
        match front.split('.').count() {
            _ if self.domain.is_empty() || self.is_under_domain(name) => None,
            1 if front == name => Some(format!("{name}.{}.svc.{}", self.namespace, self.domain)),
            2 => Some(format!("{front}.svc.{}", self.domain)),
            _ => None,
        }
    }

    fn is_under_domain(&self, name: &str) -> bool {
        !self.domain.is_empty()
            && name.strip_suffix(&*self.domain).is_some_and(|front| front.is_empty() || front.ends_with('.'))
    }
}

/// Whether a name asks who has an address that means something in this namespace alone: loopback, from which callers are
/// delivered, and the range of virtual addresses. Nobody else knows, and servers that ask for each caller must not wait
/// for a resolver to say so (RFC 6303).
fn is_own_reverse(name: &str) -> bool {
    if let Some(v4) = name.strip_suffix(".in-addr.arpa") {
        let network = v4.rsplit('.').next().and_then(|label| label.parse().ok());
        return matches!(network, Some(127u8 | 240..=255)) || v4 == "8.0.0.192";
    }
    // ::1 and ::6: 31 zeros behind one digit.
    name.strip_suffix(".ip6.arpa").is_some_and(|v6| v6.len() == 63 && v6.split('.').skip(1).all(|label| label == "0"))
}

fn addresses_of(service: &Service) -> Addresses {
    let mut addresses = Addresses::default();
    for address in &service.addresses {
        match address {
            IpAddr::V4(v4) => addresses.v4.push(*v4),
            IpAddr::V6(v6) => addresses.v6.push(*v6),
        }
    }
    addresses
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use sheer_core::name::ServiceName;
    use std::sync::Arc;

    pub(crate) fn service(name: &str, extra: &[&str], addresses: &[&str]) -> Service {
        let name = ServiceName::parse(name).unwrap();
        let mut hosts: Vec<Arc<str>> = vec![name.host("mesh.internal").into()];
        hosts.extend(extra.iter().map(|&it| Arc::from(it)));
        let addresses = addresses.iter().map(|it| it.parse().unwrap()).collect();
        Service { name, hosts, addresses, ports: vec![] }
    }

    #[test]
    fn names() {
        let services = [
            service("default/api", &["api.example.com"], &["240.0.0.1", "fd00::1"]),
            service("shop/cart", &[], &["240.0.0.2"]),
        ];
        let zone = Zone::new("Mesh.Internal.", "default", &services);
        let api = Addresses { v4: vec![Ipv4Addr::new(240, 0, 0, 1)], v6: vec!["fd00::1".parse().unwrap()] };
        let cart = Addresses { v4: vec![Ipv4Addr::new(240, 0, 0, 2)], v6: vec![] };
        for (name, expected) in [
            ("api.default.svc.mesh.internal", Lookup::Found(&api)),
            ("api.example.com", Lookup::Found(&api)),
            ("cart.shop.svc.mesh.internal", Lookup::Found(&cart)),
            ("shop.svc.mesh.internal", Lookup::Branch),
            ("svc.mesh.internal", Lookup::Branch),
            ("mesh.internal", Lookup::Branch),
            ("nobody.svc.mesh.internal", Lookup::Missing),
            ("x.api.default.svc.mesh.internal", Lookup::Missing),
            ("other.mesh.internal", Lookup::Missing),
            ("notmesh.internal", Lookup::Foreign),
            ("internal", Lookup::Foreign),
            ("api", Lookup::Found(&api)),
            ("api.default", Lookup::Found(&api)),
            ("api.default.svc", Lookup::Found(&api)),
            ("cart.shop", Lookup::Found(&cart)),
            ("cart", Lookup::Foreign),
            ("api.svc", Lookup::Foreign),
            ("example.com", Lookup::Foreign),
            ("", Lookup::Foreign),
        ] {
            assert_eq!(zone.lookup(name), expected, "{name}");
        }
    }

    #[test]
    fn nothing_is_the_meshs_before_the_mesh_is_known() {
        assert_eq!(Zone::default().lookup("api.default.svc.mesh.internal"), Lookup::Foreign);
        assert_eq!(Zone::default().lookup(""), Lookup::Foreign);
    }

    #[test]
    fn the_first_claimant_of_a_host_name_has_it() {
        let services =
            [service("b/x", &["shared.example"], &["240.0.0.2"]), service("a/x", &["shared.example"], &["240.0.0.1"])];
        let zone = Zone::new("mesh.internal", "default", &services);
        let first = Addresses { v4: vec![Ipv4Addr::new(240, 0, 0, 1)], v6: vec![] };
        assert_eq!(zone.lookup("shared.example"), Lookup::Found(&first));
    }

    #[test]
    fn nobody_else_is_asked_for_the_names_of_own_addresses() {
        let six = format!("6.{}0.ip6.arpa", "0.".repeat(30));
        for own in ["6.0.0.127.in-addr.arpa", "1.0.0.240.in-addr.arpa", "8.0.0.192.in-addr.arpa", six.as_str()] {
            assert_eq!(Zone::default().lookup(own), Lookup::Missing, "{own}");
        }
        for other in ["1.2.3.10.in-addr.arpa", "127.in-addr.arpa.example", "a.ip6.arpa", "1.1.1.1.in-addr.arpa"] {
            assert_eq!(Zone::default().lookup(other), Lookup::Foreign, "{other}");
        }
    }
}

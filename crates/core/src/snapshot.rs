//! What a proxy decides with: its view of the mesh, with nothing left to check.
//!
//! A [`Snapshot`] is an immutable value that shares structure with the one before it: cloning costs a few pointers,
//! changing one resource costs the path to it. Endpoints change more often than the rest and are not part of it: each
//! service's [`EndpointSet`] lives in a cell of its own, as do health, load and connections, so that a change of
//! configuration resets nothing.

use crate::head::RequestHead;
use crate::identity::SpiffeId;
use crate::name::{DnsLabel, ServiceName};
use crate::route::Rules;
use ipnet::IpNet;
use rpds::HashTrieMapSync;
use smallvec::SmallVec;
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

type Map<K, V> = HashTrieMapSync<K, V>;

/// One proxy's view of the mesh.
#[derive(Clone, Debug)]
pub struct Snapshot {
    namespace: DnsLabel,
    mesh: Arc<Mesh>,
    services: Map<ServiceName, Arc<Service>>,
    hosts: Map<Arc<str>, Claims>,
    addresses: Map<IpAddr, Claims>,
    routes: Map<ServiceName, Arc<Rules>>,
    workload: Option<Arc<Workload>>,
}

/// Who claims a name or an address; the first has it. All are kept, so that it makes no difference in which order services
/// come, change and go: while a name moves from one to another, both may have claimed it for a moment, or neither.
type Claims = SmallVec<[(Claim, Arc<Service>); 1]>;

/// By what right a service claims a host name, the best first. Among equals the first by namespace and name has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Claim {
    /// It is its full name, or an address.
    Own,
    /// It is a short form of its full name.
    Short,
    /// It was written as an extra name.
    Extra,
}

fn claim<K: Eq + Hash>(map: &mut Map<K, Claims>, key: K, by: Claim, service: &Arc<Service>) {
    let mut claims = map.get(&key).cloned().unwrap_or_default();
    let place = claims.partition_point(|(it, owner)| (*it, &owner.name) < (by, &service.name));
    claims.insert(place, (by, service.clone()));
    map.insert_mut(key, claims);
}

fn release<K: Eq + Hash>(map: &mut Map<K, Claims>, key: K, name: &ServiceName) {
    let Some(claims) = map.get(&key) else { return };
    let left: Claims = claims.iter().filter(|(_, owner)| owner.name != *name).cloned().collect();
    match left.is_empty() {
        true => drop(map.remove_mut(&key)),
        false => map.insert_mut(key, left),
    }
}

fn owner(claims: &Claims) -> Option<&Arc<Service>> {
    claims.first().map(|(_, owner)| owner)
}

/// What holds for the whole mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mesh {
    /// The trust domain of identities.
    pub trust_domain: String,
    /// The domain of host names, such as `mesh.internal`.
    pub cluster_domain: String,
    /// The ranges virtual addresses are taken from. An address in them that belongs to no service leads nowhere.
    pub virtual_ranges: Vec<IpNet>,
    /// Whether destinations that are no service are refused.
    pub deny_unknown_egress: bool,
}

impl Default for Mesh {
    fn default() -> Self {
        Self {
            trust_domain: "mesh.internal".into(),
            cluster_domain: "mesh.internal".into(),
            virtual_ranges: Vec::new(),
            deny_unknown_egress: false,
        }
    }
}

/// A service: a name, addresses and ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its name.
    pub name: ServiceName,
    /// The names it is called by, lower-case, the full one first.
    pub hosts: Vec<Arc<str>>,
    /// Its virtual addresses.
    pub addresses: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<ServicePort>,
}

/// A port of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// The number that callers use.
    pub port: u16,
    /// What is spoken on it.
    pub protocol: Protocol,
}

/// A declared protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Not declared: the first bytes tell.
    Detect,
    /// HTTP/1.1, or HTTP/2 with prior knowledge.
    Http,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// gRPC over HTTP/2.
    Grpc,
    /// Bytes.
    Tcp,
    /// The application's own TLS, passed through.
    Tls,
}

impl Service {
    /// The port of this number, if the service has it.
    pub fn port(&self, port: u16) -> Option<ServicePort> {
        self.ports.iter().find(|it| it.port == port).copied()
    }
}

/// The proxy's own workload as the control plane granted it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Its unique id.
    pub uid: Arc<str>,
    /// Its identity.
    pub identity: SpiffeId,
    /// The services it answers for.
    pub services: Vec<ServiceName>,
    /// Its ports. Nothing else is served.
    pub ports: Vec<ServicePort>,
    /// What is enforced.
    pub mode: Mode,
    /// Who may come in plaintext nevertheless.
    pub exceptions: Vec<PlaintextException>,
}

impl Workload {
    /// The declared port of this number.
    pub fn port(&self, port: u16) -> Option<ServicePort> {
        self.ports.iter().find(|it| it.port == port).copied()
    }

    /// The exception that admits plaintext from this peer to this port.
    pub fn exception(&self, peer: IpAddr, port: u16) -> Option<&PlaintextException> {
        let peer = peer.to_canonical();
        self.exceptions.iter().find(|it| {
            (it.ports.is_empty() || it.ports.contains(&port)) && it.cidrs.iter().any(|cidr| cidr.contains(&peer))
        })
    }
}

/// What is enforced on connections to a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// See, change nothing.
    Watch,
    /// Plaintext is admitted as unauthenticated.
    Permissive,
    /// Mesh peers only.
    Strict,
}

/// Peers that may come in plaintext to a strict workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlaintextException {
    /// Ports; empty is all.
    pub ports: Vec<u16>,
    /// Networks of the peers.
    pub cidrs: Vec<IpNet>,
    /// Why, for people.
    pub reason: String,
}

/// The endpoints of one service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointSet {
    /// The identities accepted as this service, whatever an endpoint says.
    pub identities: Arc<[SpiffeId]>,
    ports: Vec<(u16, Arc<[Arc<Endpoint>]>)>,
}

impl EndpointSet {
    /// Groups endpoints by service port.
    pub fn new(identities: Vec<SpiffeId>, endpoints: Vec<Arc<Endpoint>>) -> Self {
        let mut ports: Vec<(u16, Vec<Arc<Endpoint>>)> = Vec::new();
        for endpoint in endpoints {
            match ports.iter_mut().find(|(port, _)| *port == endpoint.service_port) {
                Some((_, list)) => list.push(endpoint),
                None => ports.push((endpoint.service_port, vec![endpoint])),
            }
        }
        let ports = ports.into_iter().map(|(port, list)| (port, list.into())).collect();
        Self { identities: identities.into(), ports }
    }

    /// The endpoints that answer this service port.
    pub fn of_port(&self, port: u16) -> &[Arc<Endpoint>] {
        self.ports.iter().find(|(it, _)| *it == port).map_or(&[], |(_, list)| list)
    }

    /// All endpoints.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Endpoint>> {
        self.ports.iter().flat_map(|(_, list)| list.iter())
    }
}

/// One workload's answer to one service port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// The workload's uid.
    pub workload: Arc<str>,
    /// The service port it answers.
    pub service_port: u16,
    /// Where to dial.
    pub address: SocketAddr,
    /// The port that the application declared.
    pub workload_port: u16,
    /// The server name of a mesh connection to it.
    pub server_name: Arc<str>,
    /// How to dial.
    pub hop: Hop,
    /// As the control plane sees it.
    pub health: Health,
    /// Relative share of the load, at least 1.
    pub weight: u32,
    /// The application's port is a port of the address too. Not so when the workload has a network namespace of its
    /// own: what listens there at the host's address is another program.
    pub at_address: bool,
}

/// How a proxy dials an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hop {
    /// Plaintext: no proxy on the other side.
    None,
    /// Mutual TLS, ALPN `sheer/1+...`.
    Sheer1,
}

/// An endpoint's health as the control plane sees it, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Health {
    /// In use.
    Healthy,
    /// Silent: picked last.
    Suspect,
    /// Leaving: picked when nothing else is left.
    Draining,
}

/// The timeouts of a route's rule. Unset means none: no request ends by a timeout that nobody wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// For the whole request, retries included.
    pub request: Option<Duration>,
    /// For one attempt.
    pub backend: Option<Duration>,
}

impl Snapshot {
    /// The empty view of a proxy whose workload is in this namespace.
    pub fn new(namespace: DnsLabel) -> Self {
        Self {
            namespace,
            mesh: Arc::default(),
            services: Map::default(),
            hosts: Map::default(),
            addresses: Map::default(),
            routes: Map::default(),
            workload: None,
        }
    }

    /// What holds for the whole mesh.
    pub fn mesh(&self) -> &Arc<Mesh> {
        &self.mesh
    }

    /// The namespace of the proxy's workload.
    pub fn namespace(&self) -> &DnsLabel {
        &self.namespace
    }

    /// The proxy's own workload, once granted.
    pub fn workload(&self) -> Option<&Arc<Workload>> {
        self.workload.as_ref()
    }

    /// The service of this name.
    pub fn service(&self, name: &ServiceName) -> Option<&Arc<Service>> {
        self.services.get(name)
    }

    /// All services.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// The service with this virtual address.
    pub fn service_at(&self, address: IpAddr) -> Option<&Arc<Service>> {
        self.addresses.get(&address.to_canonical()).and_then(owner)
    }

    /// The service called by this host name in any case: full, `name.namespace[.svc]`, an extra name, or the bare name
    /// of one in the proxy's own namespace. A trailing dot is ignored.
    pub fn service_named(&self, host: &str) -> Option<&Arc<Service>> {
        let host = host.strip_suffix('.').unwrap_or(host);
        if host.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return self.hosts.get(host.to_ascii_lowercase().as_str()).and_then(owner);
        }
        self.hosts.get(host).and_then(owner)
    }

    /// True for an address that no service has, in a range that only services have.
    pub fn is_unassigned_virtual(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.mesh.virtual_ranges.iter().any(|range| range.contains(&address)) && !self.addresses.contains_key(&address)
    }

    /// The routes attached to a service, when there are any.
    pub fn routes(&self, service: &ServiceName) -> Option<&Arc<Rules>> {
        self.routes.get(service)
    }

    /// Decides which rule a request to a service's port follows.
    pub fn route<'a>(&'a self, service: &Service, port: u16, head: &RequestHead) -> crate::route::Verdict<'a> {
        match self.routes.get(&service.name) {
            Some(rules) => rules.find(port, &self.namespace, head),
            None => crate::route::Verdict::Unrouted,
        }
    }

    /// Replaces what holds for the whole mesh.
    pub fn set_mesh(&mut self, mesh: Mesh) {
        self.mesh = Arc::new(mesh);
        let services: Vec<_> = self.services.values().cloned().collect();
        services.into_iter().for_each(|service| self.put_service(service));
    }

    /// Replaces the own workload.
    pub fn set_workload(&mut self, workload: Option<Workload>) {
        self.workload = workload.map(Arc::new);
    }

    /// Adds or replaces a service.
    pub fn put_service(&mut self, service: Arc<Service>) {
        self.remove_service(&service.name);
        for (by, host) in self.names_of(&service) {
            claim(&mut self.hosts, host, by, &service);
        }
        for address in &service.addresses {
            claim(&mut self.addresses, address.to_canonical(), Claim::Own, &service);
        }
        self.services.insert_mut(service.name.clone(), service);
    }

    /// Removes a service.
    pub fn remove_service(&mut self, name: &ServiceName) {
        let Some(service) = self.services.get(name).cloned() else { return };
        for (_, host) in self.names_of(&service) {
            release(&mut self.hosts, host, name);
        }
        for address in &service.addresses {
            release(&mut self.addresses, address.to_canonical(), name);
        }
        self.services.remove_mut(name);
    }

    /// Attaches routes to a service, or none.
    pub fn set_routes(&mut self, service: ServiceName, rules: Option<Rules>) {
        match rules {
            Some(rules) => self.routes.insert_mut(service, Arc::new(rules)),
            None => {
                self.routes.remove_mut(&service);
            }
        }
    }

    /// The host names of a service as this proxy's workload may say them.
    fn names_of(&self, service: &Service) -> Vec<(Claim, Arc<str>)> {
        let ServiceName { namespace, name } = &service.name;
        let mut names = vec![
            (Claim::Short, format!("{name}.{namespace}").into()),
            (Claim::Short, format!("{name}.{namespace}.svc").into()),
        ];
        if *namespace == self.namespace {
            names.push((Claim::Short, name.as_str().into()));
        }
        let by = |place| if place == 0 { Claim::Own } else { Claim::Extra };
        names.extend(service.hosts.iter().enumerate().map(|(place, host)| (by(place), host.clone())));
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str, address: &str, hosts: &[&str]) -> Arc<Service> {
        let name = ServiceName::parse(name).unwrap();
        let mut all: Vec<Arc<str>> = vec![name.host("mesh.internal").into()];
        all.extend(hosts.iter().map(|host| Arc::from(*host)));
        let ports = vec![ServicePort { port: 80, protocol: Protocol::Detect }];
        Arc::new(Service { name, hosts: all, addresses: vec![address.parse().unwrap()], ports })
    }

    fn view() -> Snapshot {
        let mut view = Snapshot::new(DnsLabel::parse("shop").unwrap());
        view.put_service(service("shop/api", "240.0.0.1", &["api.example.com"]));
        view.put_service(service("other/db", "240.0.0.2", &[]));
        view
    }

    #[test]
    fn services_are_found_by_every_name_and_address() {
        let view = view();
        for host in ["api", "API", "api.shop", "api.shop.svc", "api.shop.svc.mesh.internal.", "api.example.com"] {
            assert_eq!(view.service_named(host).unwrap().name.to_string(), "shop/api", "{host}");
        }
        assert!(view.service_named("db").is_none(), "a bare name means the own namespace");
        assert!(view.service_named("db.other").is_some());
        assert!(view.service_at("::ffff:240.0.0.2".parse().unwrap()).is_some());
    }

    #[test]
    fn a_replaced_service_leaves_no_name_behind() {
        let mut view = view();
        let before = view.clone();
        view.put_service(service("shop/api", "240.0.0.9", &[]));
        assert!(view.service_named("api.example.com").is_none());
        assert!(view.service_at("240.0.0.1".parse().unwrap()).is_none());
        assert!(before.service_named("api.example.com").is_some(), "the older view is untouched");
        view.remove_service(&ServiceName::parse("shop/api").unwrap());
        assert!(view.service_named("api").is_none());
    }

    #[test]
    fn an_extra_name_never_takes_anothers_full_name() {
        let mut view = view();
        view.put_service(service("shop/thief", "240.0.0.3", &["db.other.svc.mesh.internal"]));
        assert_eq!(view.service_named("db.other.svc.mesh.internal").unwrap().name.to_string(), "other/db");
    }

    #[test]
    fn a_name_that_moves_arrives_whoever_is_told_first() {
        let named = |view: &Snapshot| view.service_named("api.example.com").map(|it| it.name.to_string());
        for told_first in [true, false] {
            let mut view = view();
            // The second claims it by the better name and before the first lets go.
            let (gives, takes) =
                (service("shop/api", "240.0.0.1", &[]), service("shop/a-new", "240.0.0.3", &["api.example.com"]));
            view.put_service(if told_first { takes.clone() } else { gives.clone() });
            view.put_service(if told_first { gives } else { takes });
            assert_eq!(named(&view).as_deref(), Some("shop/a-new"));
        }
    }

    #[test]
    fn addresses_of_both_spellings_move_alike() {
        let mut view = view();
        view.put_service(service("other/db", "::ffff:240.0.0.1", &[]));
        view.put_service(service("shop/api", "240.0.0.9", &[]));
        let at = |address: &str| view.service_at(address.parse().unwrap()).map(|it| it.name.to_string());
        assert_eq!((at("240.0.0.1").as_deref(), at("240.0.0.2")), (Some("other/db"), None));
        view.remove_service(&ServiceName::parse("other/db").unwrap());
        assert!(view.service_at("240.0.0.1".parse().unwrap()).is_none());
    }

    #[test]
    fn an_extra_name_takes_no_short_name() {
        let mut view = view();
        view.put_service(service("a/thief", "240.0.0.3", &["db.other", "api"]));
        assert_eq!(view.service_named("db.other").unwrap().name.to_string(), "other/db");
        assert_eq!(view.service_named("api").unwrap().name.to_string(), "shop/api");
        view.remove_service(&ServiceName::parse("other/db").unwrap());
        assert_eq!(view.service_named("db.other").unwrap().name.to_string(), "a/thief");
    }

    #[test]
    fn plaintext_exceptions_need_port_and_network() {
        let workload = Workload {
            uid: "u".into(),
            identity: SpiffeId::parse("spiffe://td/ns/a/sa/b").unwrap(),
            services: vec![],
            ports: vec![],
            mode: Mode::Strict,
            exceptions: vec![PlaintextException {
                ports: vec![80],
                cidrs: vec!["10.0.0.0/8".parse().unwrap()],
                reason: "probe".into(),
            }],
        };
        assert!(workload.exception("10.1.1.1".parse().unwrap(), 80).is_some());
        assert!(workload.exception("::ffff:10.1.1.1".parse().unwrap(), 80).is_some());
        assert!(workload.exception("10.1.1.1".parse().unwrap(), 81).is_none());
        assert!(workload.exception("11.1.1.1".parse().unwrap(), 80).is_none());
    }
}

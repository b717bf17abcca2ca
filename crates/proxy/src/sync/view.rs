//! The resources that this proxy holds, and what follows from them: snapshot, endpoints, names.
//!
//! A resource that cannot be taken is refused alone: the one before it stays in force, and what came with it is applied.

use super::demand::Wanted;
use crate::dns::Zone;
use crate::metrics::Metrics;
use crate::state::{Absent, Configuration};
use crate::upstream::endpoint::Table;
use arc_swap::ArcSwap;
use prost_types::Any;
use sheer_core::assemble::{self, Refusal};
use sheer_core::name::{DnsLabel, ServiceName};
use sheer_core::snapshot::{EndpointSet, Snapshot};
use sheer_core::wire::discovery::{DeltaDiscoveryResponse, Resource};
use sheer_core::wire::{Resource as _, v1, version_of};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use tokio::sync::watch;

/// A type of resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Kind {
    Mesh,
    TrustBundle,
    Workload,
    Service,
    Endpoints,
    Routes,
    Address,
}

/// Addresses outside the virtual ranges that are asked after; beyond, the one that was asked after first is forgotten.
pub(super) const MAX_ADDRESSES: usize = 1024;

impl Kind {
    /// In the order in which they are applied from disk: the mesh before what is read with it.
    pub(super) const ALL: [Kind; 7] =
        [Kind::Mesh, Kind::TrustBundle, Kind::Workload, Kind::Service, Kind::Endpoints, Kind::Routes, Kind::Address];

    pub(super) const fn type_url(self) -> &'static str {
        match self {
            Kind::Mesh => v1::Mesh::TYPE_URL,
            Kind::TrustBundle => v1::TrustBundle::TYPE_URL,
            Kind::Workload => v1::Workload::TYPE_URL,
            Kind::Service => v1::Service::TYPE_URL,
            Kind::Endpoints => v1::Endpoints::TYPE_URL,
            Kind::Routes => v1::Routes::TYPE_URL,
            Kind::Address => v1::Address::TYPE_URL,
        }
    }

    pub(super) fn of(type_url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == type_url)
    }

    /// Whether it is asked for by name when a service or an address is first used.
    pub(super) const fn is_on_demand(self) -> bool {
        matches!(self, Kind::Endpoints | Kind::Routes | Kind::Address)
    }
}

/// Where the results go.
#[derive(Clone)]
pub struct Outputs {
    /// What workers decide with.
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    /// The endpoints of services in use.
    pub endpoints: Arc<Table>,
    /// The names that DNS answers for.
    pub zone: Arc<ArcSwap<Zone>>,
    /// Grows after every change of the above.
    pub changed: Arc<watch::Sender<u64>>,
    /// The trust bundle, when there is one.
    pub trust: Arc<watch::Sender<Option<v1::TrustBundle>>>,
    /// Where refusals are counted.
    pub metrics: Arc<Metrics>,
}

/// All resources. See the module.
pub(super) struct View {
    namespace: DnsLabel,
    outputs: Outputs,
    snapshot: Snapshot,
    resources: BTreeMap<(Kind, String), Resource>,
    /// On-demand names of which the control plane said that there is none.
    absent: BTreeSet<(Kind, String)>,
    /// Routes that were refused while there were none: requests fail for them, also after a restart.
    failing: BTreeMap<String, Resource>,
    /// Services whose endpoints and routes are wanted.
    wanted: BTreeSet<ServiceName>,
    /// Addresses that are wanted, and the services at those that were answered.
    addresses: BTreeMap<IpAddr, Option<Vec<ServiceName>>>,
    /// The same, in the order in which they came.
    order: VecDeque<IpAddr>,
    indexed: bool,
}

impl View {
    pub(super) fn new(namespace: DnsLabel, outputs: Outputs) -> Self {
        Self {
            snapshot: Snapshot::new(namespace.clone()),
            namespace,
            resources: BTreeMap::new(),
            absent: BTreeSet::new(),
            failing: BTreeMap::new(),
            wanted: BTreeSet::new(),
            addresses: BTreeMap::new(),
            order: VecDeque::new(),
            indexed: false,
            outputs,
        }
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn outputs(&self) -> &Outputs {
        &self.outputs
    }

    /// Takes what was stored.
    pub(super) fn restore(&mut self, configuration: Configuration) {
        let mut by_kind: BTreeMap<Kind, Vec<Resource>> = BTreeMap::new();
        for resource in configuration.resources {
            let kind = resource.resource.as_ref().and_then(|any| Kind::of(&any.type_url));
            if let Some(kind) = kind {
                by_kind.entry(kind).or_default().push(resource);
            }
        }
        for (kind, resources) in by_kind {
            for refused in self.apply(kind, DeltaDiscoveryResponse { resources, ..Default::default() }) {
                tracing::warn!(name = refused.name, reason = refused.reason, "a stored resource is not used");
            }
        }
        for absent in configuration.absent {
            if let Some(kind) = Kind::of(&absent.type_url).filter(|kind| kind.is_on_demand()) {
                self.remove(kind, &absent.name);
            }
        }
        let used = self.resources.keys().chain(&self.absent).filter(|(kind, _)| *kind == Kind::Endpoints);
        let used: Vec<_> = used.filter_map(|(_, name)| ServiceName::parse(name).ok()).collect();
        self.wanted.extend(used);
        // A mesh without services was stored, too.
        self.indexed = self.holds(Kind::Mesh);
        self.publish(true);
    }

    /// What is to be stored. Addresses are not: those of the services that were found there are in their endpoints.
    /// Routes that fail are, as they were refused.
    pub(super) fn configuration(&self) -> Configuration {
        let is_stored = |kind: Kind| kind != Kind::Address;
        let fails = |kind: Kind, name: &String| kind == Kind::Routes && self.failing.contains_key(name);
        let absent = self.absent.iter().filter(|(kind, name)| is_stored(*kind) && !fails(*kind, name));
        let absent = absent.map(|(kind, name)| Absent { type_url: kind.type_url().into(), name: name.clone() });
        let resources = self.resources.iter().filter(|((kind, _), _)| is_stored(*kind));
        let resources = resources.map(|(_, it)| it).chain(self.failing.values()).cloned().collect();
        Configuration { resources, absent: absent.collect(), return_within_ms: 0 }
    }

    /// Lets go of everything that is held. Services in use are asked for again.
    pub(super) fn clear(&mut self) {
        let keys = std::mem::take(&mut self.resources).into_keys().chain(std::mem::take(&mut self.absent));
        for name in keys.filter(|(kind, _)| *kind == Kind::Endpoints).map(|(_, name)| name) {
            if let Ok(service) = ServiceName::parse(&name) {
                self.outputs.endpoints.remove(&service);
            }
        }
        self.failing.clear();
        self.addresses.values_mut().for_each(|services| *services = None);
        self.snapshot = Snapshot::new(self.namespace.clone());
        self.indexed = false;
        self.publish(true);
    }

    /// The trust bundle that is held.
    pub(super) fn trust(&self) -> Option<v1::TrustBundle> {
        trust_of(self.resources.iter().filter(|((kind, _), _)| *kind == Kind::TrustBundle).map(|(_, it)| it))
    }

    /// Whether a response brings a trust bundle that has no root in common with the one held.
    pub(super) fn is_foreign(&self, response: &DeltaDiscoveryResponse) -> bool {
        if Kind::of(&response.type_url) != Some(Kind::TrustBundle) {
            return false;
        }
        let (Some(held), Some(told)) = (self.trust(), trust_of(&response.resources)) else { return false };
        !told.roots.iter().any(|root| held.roots.contains(root))
    }

    /// Whether the proxy may serve: mesh, own workload and the index of services are there.
    pub(super) fn is_ready(&self) -> bool {
        self.indexed && self.snapshot.workload().is_some() && self.holds(Kind::Mesh)
    }

    fn holds(&self, kind: Kind) -> bool {
        self.resources.keys().any(|(it, _)| *it == kind)
    }

    /// Wants something from now on.
    pub(super) fn want(&mut self, what: Wanted) {
        match what {
            Wanted::Service(service) => {
                self.wanted.insert(service);
            }
            Wanted::Address(address) => self.want_address(address),
        }
    }

    fn want_address(&mut self, address: IpAddr) {
        if self.addresses.contains_key(&address) {
            return;
        }
        if self.order.len() >= MAX_ADDRESSES
            && let Some(oldest) = self.order.pop_front()
        {
            self.addresses.remove(&oldest);
            let key = (Kind::Address, oldest.to_string());
            self.resources.remove(&key);
            self.absent.remove(&key);
            self.outputs.endpoints.forget_address(oldest);
        }
        self.order.push_back(address);
        self.addresses.insert(address, None);
    }

    /// The addresses that are wanted.
    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses.keys().copied()
    }

    /// Whether they are others than these.
    pub(super) fn wants_addresses_other_than(&self, asked: &BTreeSet<IpAddr>) -> bool {
        self.addresses.len() != asked.len() || !self.addresses.keys().eq(asked)
    }

    /// The services that are wanted.
    pub(super) fn wanted(&self) -> &BTreeSet<ServiceName> {
        &self.wanted
    }

    /// Whether what is wanted is there, or known not to exist. Workers then know the address.
    pub(super) fn is_answered(&self, what: &Wanted) -> bool {
        match what {
            Wanted::Service(service) => self.is_service_answered(service),
            Wanted::Address(address) => {
                let Some(Some(services)) = self.addresses.get(address) else { return false };
                let is_answered = services.iter().all(|service| self.is_service_answered(service));
                if is_answered {
                    self.outputs.endpoints.know_address(*address);
                }
                is_answered
            }
        }
    }

    /// Whether the endpoints and routes of a service are there, or known not to exist.
    fn is_service_answered(&self, service: &ServiceName) -> bool {
        let name = service.to_string();
        [Kind::Endpoints, Kind::Routes].into_iter().all(|kind| {
            let key = (kind, name.clone());
            self.resources.contains_key(&key) || self.absent.contains(&key)
        })
    }

    /// Names and versions of what is held of a type.
    pub(super) fn versions(&self, kind: Kind) -> BTreeMap<String, String> {
        let held = self.resources.iter().filter(|((it, _), _)| *it == kind);
        held.map(|((_, name), resource)| (name.clone(), resource.version.clone())).collect()
    }

    /// Applies a response; returns what was refused of it.
    pub(super) fn apply(&mut self, kind: Kind, response: DeltaDiscoveryResponse) -> Vec<v1::Refused> {
        let cluster_domain = self.snapshot.mesh().cluster_domain.clone();
        let mut refused = Vec::new();
        for resource in response.resources {
            let key = (kind, resource.name.clone());
            match self.take(kind, &resource) {
                Ok(()) => {
                    self.absent.remove(&key);
                    if kind == Kind::Routes {
                        self.failing.remove(&resource.name);
                    }
                    self.resources.insert(key, resource);
                }
                Err(refusal) => {
                    self.outputs.metrics.resource_refused();
                    if kind == Kind::Routes && !self.resources.contains_key(&key) {
                        self.fail_routes(&resource);
                    }
                    refused.push(v1::Refused {
                        type_url: kind.type_url().into(),
                        name: resource.name,
                        version: resource.version,
                        reason: refusal.reason,
                        place: refusal.place,
                    });
                }
            }
        }
        for name in &response.removed_resources {
            self.remove(kind, name);
        }
        self.indexed |= kind == Kind::Service;
        if self.snapshot.mesh().cluster_domain != cluster_domain {
            self.rename_endpoints();
        }
        self.publish(matches!(kind, Kind::Service | Kind::Mesh));
        refused
    }

    fn publish(&mut self, names: bool) {
        if names {
            let services = self.snapshot.services().map(|service| &**service);
            let zone = Zone::new(&self.snapshot.mesh().cluster_domain, self.snapshot.namespace().as_str(), services);
            self.outputs.zone.store(Arc::new(zone));
        }
        self.outputs.snapshot.store(Arc::new(self.snapshot.clone()));
        self.outputs.changed.send_modify(|count| *count += 1);
    }

    fn take(&mut self, kind: Kind, resource: &Resource) -> Result<(), Refusal> {
        match kind {
            Kind::Mesh => {
                let mesh: v1::Mesh = decode(resource)?;
                self.snapshot.set_mesh(assemble::mesh(&mesh)?);
            }
            Kind::TrustBundle => {
                let bundle: v1::TrustBundle = decode(resource)?;
                assemble::requirements(&bundle)?;
                self.outputs.trust.send_replace(Some(bundle));
            }
            Kind::Workload => {
                let workload: v1::Workload = decode(resource)?;
                self.snapshot.set_workload(Some(assemble::workload(&workload)?));
            }
            Kind::Service => {
                let service: v1::Service = decode(resource)?;
                self.snapshot.put_service(Arc::new(assemble::service(&service)?));
            }
            Kind::Endpoints => {
                let endpoints: v1::Endpoints = decode(resource)?;
                let set = assemble::endpoints(&endpoints, &self.snapshot.mesh().cluster_domain)?;
                self.outputs.endpoints.set(&service_of(&resource.name)?, Arc::new(set));
            }
            Kind::Routes => {
                let routes: v1::Routes = decode(resource)?;
                let rules = assemble::routes(&routes)?;
                // A share of the traffic may go to any of them at once.
                self.wanted.extend(rules.backends().filter(|it| it.valid).map(|it| it.service.clone()));
                self.snapshot.set_routes(service_of(&resource.name)?, Some(rules));
            }
            Kind::Address => {
                let told: v1::Address = decode(resource)?;
                assemble::requirements(&told)?;
                let services: Vec<_> = told.services.iter().map(|name| service_of(name)).collect::<Result<_, _>>()?;
                if let Some(known) = resource.name.parse().ok().and_then(|it| self.addresses.get_mut(&it)) {
                    self.wanted.extend(services.iter().cloned());
                    *known = Some(services);
                }
            }
        }
        Ok(())
    }

    fn remove(&mut self, kind: Kind, name: &str) {
        self.resources.remove(&(kind, name.to_owned()));
        if kind.is_on_demand() {
            self.absent.insert((kind, name.to_owned()));
        }
        if kind == Kind::Routes {
            self.failing.remove(name);
        }
        let service = ServiceName::parse(name);
        match (kind, service) {
            // There is always a mesh, and its roots do not go away by being left out.
            (Kind::Mesh | Kind::TrustBundle, _) => {}
            (Kind::Workload, _) => self.snapshot.set_workload(None),
            (Kind::Service, Ok(service)) => self.snapshot.remove_service(&service),
            (Kind::Endpoints, Ok(service)) => self.outputs.endpoints.set(&service, Arc::new(EndpointSet::default())),
            (Kind::Routes, Ok(service)) => self.snapshot.set_routes(service, None),
            (Kind::Service | Kind::Endpoints | Kind::Routes, Err(_)) => {}
            (Kind::Address, _) => {
                if let Some(known) = name.parse().ok().and_then(|it| self.addresses.get_mut(&it)) {
                    *known = Some(Vec::new());
                }
            }
        }
    }

    /// Routes that were refused, with none before them, answer every request with 500: what they would have kept from
    /// somewhere must not go there.
    fn fail_routes(&mut self, refused: &Resource) {
        let name = &refused.name;
        let Ok(service) = ServiceName::parse(name) else { return };
        let mut stored = refused.clone();
        // Also what does not look like routes has to be found among them again.
        if stored.resource.as_ref().is_none_or(|any| any.type_url != Kind::Routes.type_url()) {
            stored.resource = Some(Any { type_url: Kind::Routes.type_url().into(), value: Vec::new() });
        }
        self.failing.insert(name.clone(), stored);
        let path = Some(v1::http_match::Path::Prefix("/".to_owned()));
        let rule = v1::HttpRule { matches: vec![v1::HttpMatch { path, ..Default::default() }], ..Default::default() };
        let route = v1::HttpRoute {
            namespace: service.namespace.to_string(),
            name: "refused".to_owned(),
            rules: vec![rule],
            ..Default::default()
        };
        let failing = v1::Routes {
            namespace: service.namespace.to_string(),
            name: service.name.to_string(),
            http: vec![route],
            requires: vec![],
        };
        if let Ok(rules) = assemble::routes(&failing) {
            self.snapshot.set_routes(service, Some(rules));
            // Whoever waits for the routes has their answer.
            self.absent.insert((Kind::Routes, name.clone()));
        }
    }

    /// The server names of endpoints are made with the mesh's domain.
    fn rename_endpoints(&mut self) {
        let held = self.resources.iter().filter(|((kind, _), _)| *kind == Kind::Endpoints);
        let held: Vec<_> = held.map(|(_, resource)| resource.clone()).collect();
        for resource in held {
            // It was taken before, and the domain refuses nothing.
            let _ = self.take(Kind::Endpoints, &resource);
        }
    }
}

/// The trust bundle among resources.
pub(super) fn trust_of<'a>(resources: impl IntoIterator<Item = &'a Resource>) -> Option<v1::TrustBundle> {
    resources.into_iter().find_map(|resource| decode(resource).ok())
}

fn decode<R: sheer_core::wire::Resource>(resource: &Resource) -> Result<R, Refusal> {
    let refuse = |reason: &str| Refusal { place: String::new(), reason: reason.to_owned() };
    let any = resource.resource.as_ref().ok_or_else(|| refuse("it has no content"))?;
    if any.type_url != R::TYPE_URL {
        return Err(refuse("its content is of another type"));
    }
    let decoded = R::decode(any.value.as_slice()).map_err(|error| refuse(&error.to_string()))?;
    if decoded.resource_name() != resource.name {
        return Err(refuse("its content has another name"));
    }
    if version_of(&any.value) != resource.version {
        return Err(refuse("its version is not that of its content"));
    }
    Ok(decoded)
}

fn service_of(name: &str) -> Result<ServiceName, Refusal> {
    ServiceName::parse(name).map_err(|error| Refusal { place: "name".to_owned(), reason: error.to_string() })
}

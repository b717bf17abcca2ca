//! Reading a set of files and checking what its resources say about each other.

use super::fleet::{self, Labels};
use super::{Compiled, MeshSettings, Object, Source};
use crate::diagnostic::{Diagnostic, Severity};
use crate::name::{DnsLabel, ServiceName};
use crate::resource::{self, BackendRef, HttpRoute, Kind, Located, Meta, ParentRef, Place, Resource, Service};
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};

pub(super) fn compile(sources: &[Source]) -> Compiled {
    let mut sources: Vec<&Source> = sources.iter().collect();
    sources.sort_by(|a, b| a.file.cmp(&b.file));
    let mut set = Set::default();
    for source in sources {
        let file = resource::read(&source.file, &source.text, &mut set.compiled.diagnostics);
        set.incomplete |= !file.whole;
        for read in file.documents {
            if let Some(identity) = read.identity {
                set.known.insert(identity);
            }
            if let Some(resource) = read.resource {
                set.add(resource, read.text);
            }
        }
    }
    set.check_hosts();
    set.index_selectors();
    set.place_static_workloads();
    set.attach();
    set.check_routes();
    set.compiled.diagnostics.sort();
    set.compiled.diagnostics.dedup();
    set.compiled
}

#[derive(Default)]
struct Set {
    compiled: Compiled,
    /// Kinds and names of all documents, also of those with errors.
    known: BTreeSet<(Kind, ServiceName)>,
    places: BTreeMap<(Kind, ServiceName), Place>,
    /// Some document could not be read so far that its name is known: what refers to it is not dangling.
    incomplete: bool,
}

fn finding<T>(
    severity: Severity,
    meta: &Meta,
    at: &Located<T>,
    message: String,
    help: impl Into<String>,
) -> Diagnostic {
    Diagnostic {
        file: meta.place.file.to_string(),
        line: at.line,
        column: at.column,
        severity,
        path: at.path.clone(),
        message,
        help: Some(help.into()),
        awaits: None,
    }
}

impl Set {
    fn add(&mut self, resource: Resource, text: String) {
        let (kind, meta) = (resource.kind(), resource.meta().clone());
        let about =
            Located { value: (), line: meta.place.line, column: meta.place.column, path: "metadata.name".to_owned() };
        // There is one Mesh, whatever its name.
        let key = match kind {
            Kind::Mesh => (kind, mesh_name(&meta)),
            _ => (kind, meta.name.clone()),
        };
        if let Some(other) = self.places.get(&key) {
            let what = match kind {
                Kind::Mesh => "a second Mesh".to_owned(),
                _ => format!("a second {kind} {}", meta.name),
            };
            let message = format!("{what}: the first is in {other}");
            self.compiled.diagnostics.push(finding(Severity::Error, &meta, &about, message, "remove or rename one"));
            return;
        }
        self.places.insert(key, meta.place.clone());
        let object = Object { kind, name: meta.name.clone(), place: meta.place.clone(), text };
        self.compiled.objects.push(object);
        let name = meta.name;
        match resource {
            Resource::Mesh(mesh) => self.compiled.mesh = MeshSettings::of(&mesh),
            Resource::Service(service) => drop(self.compiled.services.insert(name, service)),
            Resource::HttpRoute(route) => drop(self.compiled.routes.insert(name, route)),
            Resource::Workload(workload) => drop(self.compiled.workloads.insert(name, workload)),
            Resource::Enrollment(enrollment) => drop(self.compiled.enrollments.insert(name, enrollment)),
        }
    }

    /// Extra host names are not of the mesh's own domain and belong to one service each.
    fn check_hosts(&mut self) {
        let domain = &self.compiled.mesh.cluster_domain;
        let mut owners: BTreeMap<&str, &Service> = BTreeMap::new();
        let mut found = Vec::new();
        for service in self.compiled.services.values() {
            for host in &service.hosts {
                let within = host.value.strip_suffix(domain.as_str());
                if within.is_some_and(|front| front.is_empty() || front.ends_with('.')) {
                    let message = format!("'{}' is of the mesh's own domain {domain}", host.value);
                    let help = "remove it: services have their names there already";
                    found.push(finding(Severity::Error, &service.meta, host, message, help));
                } else if let Some(owner) = owners.get(host.value.as_str()) {
                    let message =
                        format!("'{}' belongs to {} already, in {}", host.value, owner.meta.name, owner.meta.place);
                    found.push(finding(Severity::Error, &service.meta, host, message, "remove it from one of the two"));
                } else {
                    owners.insert(&host.value, service);
                }
            }
        }
        self.compiled.diagnostics.append(&mut found);
    }

    /// Files each selector under the label that fewest of them ask for, so that a workload's services are found without
    /// looking at all.
    fn index_selectors(&mut self) {
        let mut counts: BTreeMap<(&DnsLabel, &str, &str), usize> = BTreeMap::new();
        for service in self.compiled.services.values() {
            for (name, value) in &service.selector {
                *counts.entry((&service.meta.name.namespace, name, value)).or_default() += 1;
            }
        }
        let mut index: BTreeMap<DnsLabel, BTreeMap<(String, String), Vec<ServiceName>>> = BTreeMap::new();
        for service in self.compiled.services.values() {
            let namespace = &service.meta.name.namespace;
            let count =
                |(name, value): &(&String, &String)| counts.get(&(namespace, name.as_str(), value.as_str())).copied();
            let Some((name, value)) = service.selector.iter().min_by_key(count) else { continue };
            let labels = index.entry(namespace.clone()).or_default();
            labels.entry((name.clone(), value.clone())).or_default().push(service.meta.name.clone());
        }
        self.compiled.by_label = index;
    }

    /// Finds the services of the workloads that have no proxy.
    fn place_static_workloads(&mut self) {
        let mut statics: BTreeMap<ServiceName, Vec<ServiceName>> = BTreeMap::new();
        let mut claims: BTreeMap<ServiceName, Vec<ServiceName>> = BTreeMap::new();
        for workload in self.compiled.workloads.values().filter(|it| !it.proxied) {
            let name = &workload.meta.name;
            let named = workload.service.clone().map(|it| ServiceName { namespace: name.namespace.clone(), name: it });
            let labels = Labels { own: &workload.meta.labels, service: workload.service.as_ref() };
            for service in fleet::services(&self.compiled, &name.namespace, named.as_ref(), &labels) {
                statics.entry(service).or_default().push(name.clone());
            }
            if let Some(named) = named.filter(|it| !self.compiled.services.contains_key(it)) {
                claims.entry(named).or_default().push(name.clone());
            }
        }
        (self.compiled.statics, self.compiled.static_claims) = (statics, claims);
    }

    /// Attaches routes to their parents: earlier ones first, then by namespace and name (Gateway API, conflicts).
    fn attach(&mut self) {
        let mut order: Vec<&HttpRoute> = self.compiled.routes.values().collect();
        order.sort_by_cached_key(|route| (route.meta.created.clone(), route.meta.name.to_string()));
        for route in order {
            for parent in &route.parents {
                let attached = self.compiled.attached.entry(parent.value.service.clone()).or_default();
                // A route's parents are looked at in one go.
                if attached.last() != Some(&route.meta.name) {
                    attached.push(route.meta.name.clone());
                }
                for backend in route.rules.iter().flat_map(|rule| &rule.value.backends) {
                    let referrers = self.compiled.referrers.entry(backend.value.service.clone()).or_default();
                    referrers.insert(parent.value.service.clone());
                }
            }
        }
    }

    fn check_routes(&mut self) {
        let mut found = Vec::new();
        for route in self.compiled.routes.values() {
            for parent in &route.parents {
                found.extend(self.check_parent(route, parent));
            }
            for backend in route.rules.iter().flat_map(|rule| &rule.value.backends) {
                found.extend(self.check_backend(route, backend));
            }
            for rule in &route.rules {
                let backends = &rule.value.backends;
                if !backends.is_empty() && backends.iter().all(|backend| backend.value.weight == 0) {
                    let message = "all weights are 0: every request is answered 500".to_owned();
                    let help = "give one backend a weight";
                    found.push(finding(Severity::Warning, &route.meta, rule, message, help));
                }
            }
        }
        for (parent, routes) in &self.compiled.attached {
            self.check_conflicts(parent, routes, &mut found);
        }
        self.compiled.diagnostics.append(&mut found);
    }

    fn check_parent(&self, route: &HttpRoute, parent: &Located<ParentRef>) -> Option<Diagnostic> {
        let (service, port) = (&parent.value.service, parent.value.port);
        let (message, help) = match (self.compiled.services.get(service), port) {
            (None, _) if self.may_be_written(service) => return None,
            (None, _) => (
                format!("no Service {service} is written: the route waits until a workload names it"),
                self.nearest_service(service),
            ),
            (Some(written), Some(port)) if !written.ports.iter().any(|it| it.port == port) => {
                (format!("{service} has no port {port}: the route is never used"), ports_help(written))
            }
            (Some(written), port) if !carries_http(written, port) => (
                format!("{service} carries no HTTP there: the route is never used"),
                format!("change appProtocol in {}, or name another port", written.meta.place),
            ),
            _ => return None,
        };
        let found = finding(Severity::Warning, &route.meta, parent, message, help);
        Some(self.awaiting(service, found))
    }

    fn check_backend(&self, route: &HttpRoute, backend: &Located<BackendRef>) -> Option<Diagnostic> {
        let (service, port) = (&backend.value.service, backend.value.port);
        let (message, help) = match self.compiled.services.get(service) {
            _ if service.namespace != route.meta.name.namespace => (
                format!(
                    "{service} is of another namespace and nothing grants the reference: its share is answered 500"
                ),
                "ReferenceGrant is not supported yet; keep route and backends in one namespace".to_owned(),
            ),
            None if self.may_be_written(service) => return None,
            None => (
                format!("no Service {service} is written: until a workload names it, its share is answered 500"),
                self.nearest_service(service),
            ),
            Some(written) if !written.ports.iter().any(|it| it.port == port) => {
                (format!("{service} has no port {port}: its share is answered 500"), ports_help(written))
            }
            Some(_) => return None,
        };
        let found = finding(Severity::Warning, &route.meta, backend, message, help);
        Some(self.awaiting(service, found))
    }

    /// A finding about a service that is void once a workload names it, where no document writes it.
    fn awaiting(&self, service: &ServiceName, found: Diagnostic) -> Diagnostic {
        let awaits = (!self.compiled.services.contains_key(service)).then(|| service.to_string());
        Diagnostic { awaits, ..found }
    }

    /// Whether a service is written in a document that has errors.
    fn may_be_written(&self, service: &ServiceName) -> bool {
        self.incomplete || self.known.contains(&(Kind::Service, service.clone()))
    }

    fn nearest_service(&self, name: &ServiceName) -> String {
        let distance = |other: &ServiceName| strsim::damerau_levenshtein(name.name.as_str(), other.name.as_str());
        let near = self.compiled.services_in(&name.namespace).map(|it| (distance(&it.meta.name), &it.meta.name)).min();
        match near {
            Some((near, other)) if near <= 1 + name.name.as_str().len() / 4 => {
                format!("did you mean '{}'?", other.name)
            }
            _ => "write it, or run a workload of that name".to_owned(),
        }
    }

    /// Of two routes on a service with the same match, only the one of precedence ever gets a request.
    fn check_conflicts(&self, parent: &ServiceName, routes: &[ServiceName], found: &mut Vec<Diagnostic>) {
        let mut winners: BTreeMap<Vec<u8>, (&HttpRoute, &Located<resource::Rule>)> = BTreeMap::new();
        for route in routes.iter().filter_map(|name| self.compiled.routes.get(name)) {
            for parent in route.parents.iter().filter(|it| &it.value.service == parent) {
                for (rule, matched) in
                    route.rules.iter().flat_map(|rule| rule.value.matches.iter().map(move |m| (rule, m)))
                {
                    let key = conflict_key(route, &parent.value, matched.encode_to_vec());
                    let winner = *winners.entry(key).or_insert((route, rule));
                    if std::ptr::eq(winner.1, rule) {
                        continue;
                    }
                    let message = format!(
                        "a match of this rule is also one of {} of {} ({}:{}), which takes precedence",
                        winner.1.path, winner.0.meta.name, winner.0.meta.place.file, winner.1.line
                    );
                    found.push(finding(Severity::Warning, &route.meta, rule, message, "change or remove one of them"));
                }
            }
        }
    }
}

/// Whether any of the ports that a route is attached to may carry HTTP.
fn carries_http(service: &Service, port: Option<u16>) -> bool {
    let mut ports = service.ports.iter().filter(|it| port.is_none_or(|port| port == it.port));
    ports.any(|it| super::lower::may_be_http(it.protocol))
}

/// What two matches have in common that compete for the same requests.
fn conflict_key(route: &HttpRoute, parent: &ParentRef, matched: Vec<u8>) -> Vec<u8> {
    let mut hostnames = route.hostnames.clone();
    hostnames.sort();
    let consumer = (parent.service.namespace != route.meta.name.namespace).then_some(&route.meta.name.namespace);
    let mut key = format!("{:?} {hostnames:?} {consumer:?} ", parent.port).into_bytes();
    key.extend(matched);
    key
}

fn ports_help(service: &Service) -> String {
    let ports: Vec<String> = service.ports.iter().map(|it| it.port.to_string()).collect();
    format!("it has {}", ports.join(", "))
}

/// One key for every Mesh.
fn mesh_name(meta: &Meta) -> ServiceName {
    ServiceName { namespace: meta.name.namespace.clone(), name: meta.name.namespace.clone() }
}

impl Compiled {
    /// The written services of a namespace.
    pub fn services_in<'a>(&'a self, namespace: &'a DnsLabel) -> impl Iterator<Item = &'a Service> {
        // Names order by namespace first.
        let first = self.services.range(smallest(namespace)..);
        first.map(|(_, service)| service).take_while(move |service| &service.meta.name.namespace == namespace)
    }
}

/// A name that no name of the namespace is smaller than: labels begin with a digit or letter.
fn smallest(namespace: &DnsLabel) -> ServiceName {
    ServiceName { namespace: namespace.clone(), name: resource::constant_label("0") }
}

//! Wire resources out of a compiled set and the fleet, one service at a time.

use super::Compiled;
use super::fleet::{self, Fleet, Registered, RegisteredPort};
use crate::identity::SpiffeId;
use crate::name::{DnsLabel, ServiceName};
use crate::resource::{BackendRef, Egress, HttpRoute, ParentRef, Rule, Service, ServicePort, Target, Workload};
use crate::wire::octets_of;
use crate::wire::v1::{self, Health, Hop, Mode, Protocol};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

/// What was decided once about a service and is kept: a store in the control plane, a map in tests.
pub trait Records {
    /// Its virtual addresses; see [`super::VirtualRanges::assign`].
    fn virtual_ips(&self, service: &ServiceName) -> Vec<IpAddr>;

    /// The service accounts of its namespace that are pinned as its own. Empty: nobody may answer as it yet.
    fn pins(&self, service: &ServiceName) -> Vec<DnsLabel>;
}

/// Everything that proxies are told, but trust.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct All {
    /// The mesh.
    pub mesh: v1::Mesh,
    /// By service name.
    pub services: BTreeMap<ServiceName, v1::Service>,
    /// By service name.
    pub endpoints: BTreeMap<ServiceName, v1::Endpoints>,
    /// By service name; those without routes are left out.
    pub routes: BTreeMap<ServiceName, v1::Routes>,
    /// By uid.
    pub workloads: BTreeMap<String, v1::Workload>,
}

/// Makes every wire resource.
pub fn all(compiled: &Compiled, fleet: &Fleet, records: &impl Records) -> All {
    let names = service_names(compiled, fleet);
    let each = |name: &ServiceName| name.clone();
    All {
        mesh: mesh_of(compiled),
        services: names.iter().filter_map(|it| Some((each(it), service_of(compiled, fleet, records, it)?))).collect(),
        endpoints: names
            .iter()
            .filter_map(|it| Some((each(it), endpoints_of(compiled, fleet, records, it)?)))
            .collect(),
        routes: names.iter().filter_map(|it| Some((each(it), routes_of(compiled, fleet, it)?))).collect(),
        workloads: fleet.workloads().map(|it| (it.uid.clone(), workload_of(compiled, it))).collect(),
    }
}

/// All services: the written ones and those that workloads name.
pub fn service_names(compiled: &Compiled, fleet: &Fleet) -> BTreeSet<ServiceName> {
    let written = compiled.services.keys();
    let claimed = fleet.claimed().filter(|name| exists(compiled, fleet, name));
    written.chain(claimed).chain(compiled.static_claims.keys()).cloned().collect()
}

/// The service accounts that may answer as a service: those written, otherwise the pinned ones.
pub fn allowed_accounts(compiled: &Compiled, records: &impl Records, service: &ServiceName) -> Vec<DnsLabel> {
    match compiled.services.get(service) {
        Some(written) if !written.accounts.is_empty() => written.accounts.clone(),
        _ => {
            let mut pins = records.pins(service);
            pins.sort();
            pins.dedup();
            pins
        }
    }
}

/// The mesh's settings.
pub fn mesh_of(compiled: &Compiled) -> v1::Mesh {
    let mesh = &compiled.mesh;
    v1::Mesh {
        trust_domain: mesh.trust_domain.clone(),
        cluster_domain: mesh.cluster_domain.clone(),
        certificate_lifetime_s: mesh.certificate_lifetime.as_secs(),
        virtual_ranges: mesh.virtual_ranges.cidrs(),
        deny_unknown_egress: mesh.egress == Egress::Deny,
        requires: Vec::new(),
    }
}

/// A service; `None` when nobody wrote it and no workload names it.
pub fn service_of(
    compiled: &Compiled,
    fleet: &Fleet,
    records: &impl Records,
    name: &ServiceName,
) -> Option<v1::Service> {
    let written = compiled.services.get(name);
    let ports = match written {
        Some(service) => written_ports(service),
        None => implied_ports(compiled, fleet, name)?,
    };
    let extra = written.map(|service| service.hosts.as_slice()).unwrap_or_default();
    let full = name.host(&compiled.mesh.cluster_domain);
    Some(v1::Service {
        namespace: name.namespace.to_string(),
        name: name.name.to_string(),
        hosts: std::iter::once(full).chain(extra.iter().map(|host| host.value.clone())).collect(),
        virtual_ips: records.virtual_ips(name).into_iter().map(octets_of).collect(),
        ports,
        implied: written.is_none(),
        requires: Vec::new(),
    })
}

/// The endpoints of a service and the identities accepted as it; `None` when there is no such service.
pub fn endpoints_of(
    compiled: &Compiled,
    fleet: &Fleet,
    records: &impl Records,
    name: &ServiceName,
) -> Option<v1::Endpoints> {
    if !exists(compiled, fleet, name) {
        return None;
    }
    let accounts = allowed_accounts(compiled, records, name);
    let domain = &compiled.mesh.trust_domain;
    let identity = |account: &DnsLabel| SpiffeId::new(domain, name.namespace.clone(), account.clone()).ok();
    let identities: Vec<SpiffeId> = accounts.iter().filter_map(identity).collect();
    let written = compiled.services.get(name);
    let mut endpoints = Vec::new();
    for workload in fleet.members(name).filter(|it| identities.contains(&it.identity)) {
        registered_endpoints(written, workload, &mut endpoints);
    }
    let statics = compiled.statics.get(name).into_iter().flatten();
    for workload in statics.filter_map(|name| compiled.workloads.get(name)) {
        static_endpoints(written, workload, &mut endpoints);
    }
    endpoints.sort_by(|a, b| (&a.workload, a.service_port).cmp(&(&b.workload, b.service_port)));
    Some(v1::Endpoints {
        namespace: name.namespace.to_string(),
        name: name.name.to_string(),
        endpoints,
        identities: identities.iter().map(SpiffeId::to_string).collect(),
        requires: Vec::new(),
    })
}

/// The routes attached to a service; `None` when there are none.
pub fn routes_of(compiled: &Compiled, fleet: &Fleet, name: &ServiceName) -> Option<v1::Routes> {
    let mut http = Vec::new();
    for route in compiled.routes_attached_to(name) {
        for parent in route.parents.iter().filter(|parent| &parent.value.service == name) {
            http.push(http_route(compiled, fleet, route, &parent.value));
        }
    }
    (!http.is_empty()).then(|| v1::Routes {
        namespace: name.namespace.to_string(),
        name: name.name.to_string(),
        http,
        requires: Vec::new(),
    })
}

/// What a registered workload was granted: a written Workload of its name decides what it enforces, then its own
/// registration.
pub fn workload_of(compiled: &Compiled, workload: &Registered) -> v1::Workload {
    let written = compiled.workloads.get(&workload.name).filter(|written| written.proxied);
    let effective = fleet::written_over(compiled, workload);
    let workload = effective.as_ref().unwrap_or(workload);
    let mode = mode_of(written, workload);
    let exceptions = written.map(|it| it.exceptions.as_slice()).unwrap_or_default();
    let services = fleet::services_of(compiled, workload);
    v1::Workload {
        uid: workload.uid.clone(),
        namespace: workload.name.namespace.to_string(),
        name: workload.name.name.to_string(),
        identity: workload.identity.to_string(),
        services: services.iter().map(ServiceName::to_string).collect(),
        ports: workload
            .ports
            .iter()
            .map(|it| v1::WorkloadPort {
                port: u32::from(it.port),
                protocol: it.protocol.into(),
                name: it.name.clone(),
            })
            .collect(),
        mode: mode.into(),
        exceptions: exceptions
            .iter()
            .map(|it| v1::PlaintextException {
                ports: it.ports.iter().map(|port| u32::from(*port)).collect(),
                cidrs: it.cidrs.iter().map(ToString::to_string).collect(),
                reason: it.reason.clone(),
            })
            .collect(),
        requires: Vec::new(),
    }
}

/// A workload that was started to watch has no mesh listener, and one that was not has one: neither becomes the other
/// while it runs. Where nobody says anything nothing is let in by mistake.
fn mode_of(written: Option<&Workload>, workload: &Registered) -> Mode {
    match (workload.mode, written.and_then(|it| it.mode)) {
        (Mode::Watch, _) => Mode::Watch,
        (_, Some(Mode::Watch)) => Mode::Permissive,
        (_, Some(Mode::Strict)) => Mode::Strict,
        (_, Some(Mode::Permissive)) => Mode::Permissive,
        (Mode::Unspecified, Some(Mode::Unspecified) | None) => Mode::Strict,
        (registered @ (Mode::Permissive | Mode::Strict), Some(Mode::Unspecified) | None) => registered,
    }
}

/// What its owner should know about a workload that is registered but does not answer as its owner may expect.
pub fn warnings_for(compiled: &Compiled, records: &impl Records, workload: &Registered) -> Vec<String> {
    let mut warnings = Vec::new();
    let effective = fleet::written_over(compiled, workload);
    if let (Some(effective), Some(written)) = (&effective, compiled.workloads.get(&workload.name)) {
        let is_served = |port: &RegisteredPort| effective.ports.iter().any(|it| it.port == port.port);
        for port in workload.ports.iter().filter(|port| !is_served(port)) {
            warnings.push(format!(
                "its port {} is not served: the Workload in {} lists other ports; add it there",
                port.port, written.meta.place
            ));
        }
    }
    let workload = effective.as_ref().unwrap_or(workload);
    if let Some(written) = compiled.workloads.get(&workload.name).filter(|written| written.proxied)
        && let Some(asked) = written.mode
        && (asked == Mode::Watch) != (workload.mode == Mode::Watch)
    {
        let asked = asked.as_str_name().trim_start_matches("MODE_").to_ascii_lowercase();
        warnings.push(format!(
            "it does not become {asked}, as the Workload in {} asks, while it runs: start it with --mode {asked}",
            written.meta.place
        ));
    }
    let services = fleet::services_of(compiled, workload);
    if let Some(named) = &workload.service
        && !services.contains(named)
        && let Some(written) = compiled.services.get(named)
    {
        let selector: Vec<String> = written.selector.iter().map(|(name, value)| format!("{name}={value}")).collect();
        warnings.push(format!(
            "it does not answer for {named}: the selector of {} asks for {}; run it with these labels",
            written.meta.place,
            selector.join(",")
        ));
    }
    for service in &services {
        let account = workload.identity.service_account();
        let accounts = allowed_accounts(compiled, records, service);
        if !accounts.contains(account) || workload.identity.namespace() != &service.namespace {
            let allowed: Vec<&str> = accounts.iter().map(DnsLabel::as_str).collect();
            let allowed = if allowed.is_empty() { "nobody".to_owned() } else { allowed.join(", ") };
            warnings.push(format!(
                "it gets no traffic of {service}: {allowed} may answer as it, not {account}; \
                 name the account in the Service's annotation sheer.dev/service-accounts"
            ));
        }
        let Some(written) = compiled.services.get(service) else { continue };
        for port in written.ports.iter().filter(|port| registered_port(port, workload).is_none()) {
            let target = match &port.target {
                Target::Number(number) => number.to_string(),
                Target::Name(name) => format!("'{name}'"),
            };
            warnings.push(format!(
                "port {} of {service} leads to its port {target}, which it does not declare; \
                 add --port, or change targetPort in {}",
                port.port, written.meta.place
            ));
        }
    }
    warnings
}

/// Whether somebody wrote or names the service.
fn exists(compiled: &Compiled, fleet: &Fleet, name: &ServiceName) -> bool {
    compiled.services.contains_key(name)
        || compiled.static_claims.contains_key(name)
        || fleet.claimants(name).any(|it| it.name.namespace == name.namespace)
}

fn written_ports(service: &Service) -> Vec<v1::ServicePort> {
    let port = |it: &ServicePort| v1::ServicePort {
        port: u32::from(it.port),
        name: it.name.clone(),
        protocol: it.protocol.into(),
    };
    service.ports.iter().map(port).collect()
}

/// The port that HTTP callers use when they name none.
const HTTP_PORT: u16 = 80;

/// The ports of a service that nobody wrote: every workload port under its own number, and port 80 for the first one
/// that may speak HTTP, unless some port is 80. Where workloads differ the first by uid decides.
fn implied_ports(compiled: &Compiled, fleet: &Fleet, name: &ServiceName) -> Option<Vec<v1::ServicePort>> {
    if !exists(compiled, fleet, name) {
        return None;
    }
    let registered = fleet.claimants(name).filter(|it| it.name.namespace == name.namespace);
    let registered =
        registered.flat_map(|it| it.ports.iter().map(|port| (port.port, port.name.as_str(), port.protocol)));
    let statics = compiled.static_claims.get(name).into_iter().flatten();
    let statics = statics.filter_map(|name| compiled.workloads.get(name));
    let statics = statics.flat_map(|it| it.ports.iter().map(|port| (port.port, port.name.as_str(), port.protocol)));
    let mut ports: BTreeMap<u16, (&str, Protocol)> = BTreeMap::new();
    let mut web = None;
    for (port, name, protocol) in registered.chain(statics) {
        ports.entry(port).or_insert((name, protocol));
        if web.is_none() && may_be_http(protocol) {
            web = Some(protocol);
        }
    }
    if let Some(protocol) = web {
        ports.entry(HTTP_PORT).or_insert(("", protocol));
    }
    let port = |(port, (name, protocol)): (u16, (&str, Protocol))| v1::ServicePort {
        port: u32::from(port),
        name: name.to_owned(),
        protocol: protocol.into(),
    };
    Some(ports.into_iter().map(port).collect())
}

pub(super) fn may_be_http(protocol: Protocol) -> bool {
    match protocol {
        Protocol::Detect | Protocol::Http | Protocol::Http2 | Protocol::Grpc => true,
        Protocol::Tcp | Protocol::Tls => false,
    }
}

/// Where each service port leads at a workload with these ports: `(service port, index of the workload's port)`.
fn targets<'p>(
    written: Option<&Service>,
    ports: impl Iterator<Item = (u16, &'p str, Protocol)> + Clone,
) -> Vec<(u16, usize)> {
    let Some(service) = written else {
        let mut targets: Vec<(u16, usize)> = ports.clone().enumerate().map(|(index, it)| (it.0, index)).collect();
        if targets.iter().all(|(port, _)| *port != HTTP_PORT)
            && let Some(index) = ports.clone().position(|(_, _, protocol)| may_be_http(protocol))
        {
            targets.push((HTTP_PORT, index));
        }
        return targets;
    };
    let target = |port: &ServicePort| {
        let index = ports.clone().position(|(number, name, _)| match &port.target {
            Target::Number(target) => *target == number,
            Target::Name(target) => target == name,
        });
        index.map(|index| (port.port, index))
    };
    service.ports.iter().filter_map(target).collect()
}

fn registered_port(port: &ServicePort, workload: &Registered) -> Option<usize> {
    workload.ports.iter().position(|it| match &port.target {
        Target::Number(target) => *target == it.port,
        Target::Name(target) => *target == it.name,
    })
}

fn registered_endpoints(written: Option<&Service>, workload: &Registered, endpoints: &mut Vec<v1::Endpoint>) {
    let ports = workload.ports.iter().map(|it| (it.port, it.name.as_str(), it.protocol));
    for (service_port, index) in targets(written, ports) {
        let Some(port) = workload.ports.get(index).filter(|port| port.ready) else { continue };
        endpoints.push(v1::Endpoint {
            workload: workload.uid.clone(),
            service_port: u32::from(service_port),
            address: octets_of(workload.address),
            port: u32::from(port.mesh_port),
            workload_port: u32::from(port.port),
            hop: port.hop.into(),
            health: workload.health.into(),
            weight: 1,
            network: workload.network.clone(),
            locality: workload.locality.clone(),
            at_address: port.at_address,
        });
    }
}

/// The endpoints of a written workload without a proxy: its addresses, in plaintext.
fn static_endpoints(written: Option<&Service>, workload: &Workload, endpoints: &mut Vec<v1::Endpoint>) {
    let ports = workload.ports.iter().map(|it| (it.port, it.name.as_str(), it.protocol));
    for (service_port, index) in targets(written, ports) {
        let Some(port) = workload.ports.get(index) else { continue };
        for address in &workload.addresses {
            endpoints.push(v1::Endpoint {
                workload: static_uid(workload, *address),
                service_port: u32::from(service_port),
                address: octets_of(*address),
                port: u32::from(port.port),
                workload_port: u32::from(port.port),
                hop: Hop::None.into(),
                health: Health::Healthy.into(),
                weight: 1,
                network: workload.network.clone(),
                locality: workload.locality.clone(),
                at_address: true,
            });
        }
    }
}

/// Uid of a workload that is written and not registered; one a host, since each address is an endpoint of its own.
fn static_uid(workload: &Workload, address: IpAddr) -> String {
    let name = &workload.meta.name;
    match workload.addresses.len() {
        1 => format!("local/static/{name}"),
        _ => format!("local/static/{name}@{address}"),
    }
}

fn http_route(compiled: &Compiled, fleet: &Fleet, route: &HttpRoute, parent: &ParentRef) -> v1::HttpRoute {
    let name = &route.meta.name;
    let is_consumer = parent.service.namespace != name.namespace;
    v1::HttpRoute {
        namespace: name.namespace.to_string(),
        name: name.name.to_string(),
        port: parent.port.map_or(0, u32::from),
        hostnames: route.hostnames.clone(),
        consumer_namespace: if is_consumer { name.namespace.to_string() } else { String::new() },
        created: route.meta.created.clone(),
        rules: route.rules.iter().map(|rule| http_rule(compiled, fleet, name, &rule.value)).collect(),
    }
}

fn http_rule(compiled: &Compiled, fleet: &Fleet, route: &ServiceName, rule: &Rule) -> v1::HttpRule {
    let milliseconds =
        |limit: Option<Duration>| limit.map_or(0, |limit| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX));
    let backends = rule.backends.iter();
    v1::HttpRule {
        name: rule.name.clone(),
        matches: rule.matches.clone(),
        backends: backends.map(|it| backend(compiled, fleet, route, &it.value)).collect(),
        request_timeout_ms: milliseconds(rule.request_timeout),
        backend_timeout_ms: milliseconds(rule.backend_timeout),
        request_headers: rule.request_headers.clone(),
        response_headers: rule.response_headers.clone(),
    }
}

fn backend(compiled: &Compiled, fleet: &Fleet, route: &ServiceName, backend: &BackendRef) -> v1::Backend {
    let service = &backend.service;
    v1::Backend {
        namespace: service.namespace.to_string(),
        name: service.name.to_string(),
        port: u32::from(backend.port),
        weight: backend.weight,
        invalid: service.namespace != route.namespace || !has_port(compiled, fleet, service, backend.port),
    }
}

fn has_port(compiled: &Compiled, fleet: &Fleet, service: &ServiceName, port: u16) -> bool {
    match compiled.services.get(service) {
        Some(written) => written.ports.iter().any(|it| it.port == port),
        None => implied_ports(compiled, fleet, service)
            .is_some_and(|ports| ports.iter().any(|it| it.port == u32::from(port))),
    }
}

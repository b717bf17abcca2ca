//! The workloads that are registered now, indexed by the services they answer for.

use super::Compiled;
use crate::identity::SpiffeId;
use crate::name::{DnsLabel, ServiceName};
use crate::wire::v1::{Health, Hop, Mode, Protocol};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// A workload as it registered, after everything it claims was granted.
#[derive(Clone, Debug, PartialEq)]
pub struct Registered {
    /// `<cluster>/<source>/<namespace>/<name>`.
    pub uid: String,
    /// Its namespace and name.
    pub name: ServiceName,
    /// The service it names.
    pub service: Option<ServiceName>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its certified identity.
    pub identity: SpiffeId,
    /// Its ports.
    pub ports: Vec<RegisteredPort>,
    /// Where peers dial it.
    pub address: IpAddr,
    /// The network of the address; empty for the one network.
    pub network: String,
    /// `region/zone`; empty when unknown.
    pub locality: String,
    /// How well it is.
    pub health: Health,
    /// What its proxy was asked to enforce.
    pub mode: Mode,
}

/// One port of a registered workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegisteredPort {
    /// The application's port.
    pub port: u16,
    /// Its name; may be empty.
    pub name: String,
    /// The declared protocol.
    pub protocol: Protocol,
    /// Where the proxy takes connections for it.
    pub mesh_port: u16,
    /// How to dial it there.
    pub hop: Hop,
    /// Whether the application accepts.
    pub ready: bool,
    /// Whether the application's port is one of the address too.
    pub at_address: bool,
}

/// Wire resources that a change may have made different, by their services. Each is to be made anew; one that is then
/// absent is removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Of these, the Service.
    pub services: BTreeSet<ServiceName>,
    /// Of these, the Endpoints.
    pub endpoints: BTreeSet<ServiceName>,
    /// Of these, the Routes.
    pub routes: BTreeSet<ServiceName>,
}

/// All registered workloads, each with what a written Workload of its name says of it.
#[derive(Clone, Debug, Default)]
pub struct Fleet {
    workloads: BTreeMap<String, Member>,
    /// Service -> uids of those that answer for it.
    members: BTreeMap<ServiceName, BTreeSet<String>>,
    /// Service -> uids of those that name it, whether or not they answer for it.
    claimants: BTreeMap<ServiceName, BTreeSet<String>>,
}

#[derive(Clone, Debug)]
struct Member {
    registered: Registered,
    /// `None`: nothing is written about it.
    effective: Option<Registered>,
}

impl Member {
    fn now(&self) -> &Registered {
        self.effective.as_ref().unwrap_or(&self.registered)
    }
}

impl Fleet {
    /// A fleet of these workloads.
    pub fn new(compiled: &Compiled, workloads: impl IntoIterator<Item = Registered>) -> Self {
        let mut fleet = Self::default();
        for workload in workloads {
            fleet.insert(compiled, workload);
        }
        fleet
    }

    /// The same workloads under another configuration.
    pub fn recompiled(self, compiled: &Compiled) -> Self {
        Self::new(compiled, self.workloads.into_values().map(|member| member.registered))
    }

    /// Adds a workload, or replaces the one with its uid.
    pub fn upsert(&mut self, compiled: &Compiled, workload: Registered) -> Changes {
        if self.workloads.get(&workload.uid).is_some_and(|member| member.registered == workload) {
            return Changes::default();
        }
        let before = self.workloads.remove(&workload.uid);
        let mut changes = Changes::default();
        if let Some(before) = &before {
            self.unlink(compiled, before.now(), &mut changes);
        }
        let uid = workload.uid.clone();
        self.insert(compiled, workload);
        if let Some(member) = self.workloads.get(&uid) {
            note(compiled, member.now(), &mut changes);
        }
        changes
    }

    /// Removes a workload.
    pub fn remove(&mut self, compiled: &Compiled, uid: &str) -> Changes {
        let mut changes = Changes::default();
        if let Some(before) = self.workloads.remove(uid) {
            self.unlink(compiled, before.now(), &mut changes);
        }
        changes
    }

    /// One workload.
    pub fn workload(&self, uid: &str) -> Option<&Registered> {
        self.workloads.get(uid).map(Member::now)
    }

    /// All workloads, by uid.
    pub fn workloads(&self) -> impl Iterator<Item = &Registered> {
        self.workloads.values().map(Member::now)
    }

    /// The workloads that answer for a service, by uid.
    pub fn members(&self, service: &ServiceName) -> impl Iterator<Item = &Registered> {
        self.members.get(service).into_iter().flatten().filter_map(|uid| self.workload(uid))
    }

    /// The workloads that name a service, by uid.
    pub fn claimants(&self, service: &ServiceName) -> impl Iterator<Item = &Registered> {
        self.claimants.get(service).into_iter().flatten().filter_map(|uid| self.workload(uid))
    }

    /// The services that workloads name, written or not.
    pub fn claimed(&self) -> impl Iterator<Item = &ServiceName> {
        self.claimants.keys()
    }

    fn insert(&mut self, compiled: &Compiled, registered: Registered) {
        let effective = written_over(compiled, &registered);
        let member = Member { registered, effective };
        let workload = member.now();
        for service in services_of(compiled, workload) {
            self.members.entry(service).or_default().insert(workload.uid.clone());
        }
        if let Some(service) = &workload.service {
            self.claimants.entry(service.clone()).or_default().insert(workload.uid.clone());
        }
        self.workloads.insert(member.registered.uid.clone(), member);
    }

    fn unlink(&mut self, compiled: &Compiled, workload: &Registered, changes: &mut Changes) {
        note(compiled, workload, changes);
        for service in services_of(compiled, workload) {
            leave(&mut self.members, &service, &workload.uid);
        }
        if let Some(service) = &workload.service {
            leave(&mut self.claimants, service, &workload.uid);
        }
    }
}

/// The workload as a written Workload of its name describes it: its labels are added and win, its service holds where the
/// registration names none, and of the ports those it lists remain, by its names and protocols.
pub(super) fn written_over(compiled: &Compiled, workload: &Registered) -> Option<Registered> {
    let written = compiled.workloads.get(&workload.name).filter(|written| written.proxied)?;
    let mut effective = workload.clone();
    effective.labels.extend(written.meta.labels.clone());
    if effective.service.is_none() {
        let named = |name: &DnsLabel| ServiceName { namespace: workload.name.namespace.clone(), name: name.clone() };
        effective.service = written.service.as_ref().map(named);
    }
    if !written.ports.is_empty() {
        effective.ports.retain(|port| written.ports.iter().any(|it| it.port == port.port));
        for port in &mut effective.ports {
            let Some(written) = written.ports.iter().find(|it| it.port == port.port) else { continue };
            if !written.name.is_empty() {
                port.name.clone_from(&written.name);
            }
            if written.protocol != Protocol::Detect {
                port.protocol = written.protocol;
            }
        }
    }
    Some(effective)
}

fn leave(index: &mut BTreeMap<ServiceName, BTreeSet<String>>, service: &ServiceName, uid: &str) {
    if let Some(uids) = index.get_mut(service) {
        uids.remove(uid);
        if uids.is_empty() {
            index.remove(service);
        }
    }
}

/// Notes what depends on a workload.
fn note(compiled: &Compiled, workload: &Registered, changes: &mut Changes) {
    changes.endpoints.extend(services_of(compiled, workload));
    // An implied service has its ports from those who name it, and routes may refer to it.
    if let Some(service) = workload.service.as_ref().filter(|name| !compiled.services.contains_key(name)) {
        changes.services.insert(service.clone());
        changes.endpoints.insert(service.clone());
        changes.routes.extend(compiled.services_sending_to(service).cloned());
        changes.routes.insert(service.clone());
    }
}

/// The services that a workload answers for: those whose selector matches its labels, and the one it names unless that
/// one is written with a selector, which then decides.
pub(super) fn services_of(compiled: &Compiled, workload: &Registered) -> BTreeSet<ServiceName> {
    let labels = Labels { own: &workload.labels, service: workload.service.as_ref().map(|it| &it.name) };
    services(compiled, &workload.name.namespace, workload.service.as_ref(), &labels)
}

pub(super) fn services(
    compiled: &Compiled,
    namespace: &DnsLabel,
    named: Option<&ServiceName>,
    labels: &Labels<'_>,
) -> BTreeSet<ServiceName> {
    let index = compiled.by_label.get(namespace);
    let candidates = labels.all().filter_map(|label| index?.get(&label)).flatten();
    let selects = |name: &&ServiceName| {
        let selector = compiled.services.get(name).map(|service| &service.selector);
        selector.is_some_and(|selector| selector.iter().all(|(name, value)| labels.has(name, value)))
    };
    let mut services: BTreeSet<ServiceName> = candidates.filter(selects).cloned().collect();
    if let Some(named) = named
        && &named.namespace == namespace
        && compiled.services.get(named).is_none_or(|written| written.selector.is_empty())
    {
        services.insert(named.clone());
    }
    services
}

/// Labels that name the service, as most selectors ask for them.
const IMPLIED_LABELS: [&str; 2] = ["app", "app.kubernetes.io/name"];

/// A workload's labels. `app` and `app.kubernetes.io/name` are the service it names where it does not carry them, so that
/// the usual selectors find it.
pub(super) struct Labels<'a> {
    pub(super) own: &'a BTreeMap<String, String>,
    pub(super) service: Option<&'a DnsLabel>,
}

impl Labels<'_> {
    fn has(&self, name: &str, value: &str) -> bool {
        match (self.own.get(name), self.service) {
            (Some(own), _) => own == value,
            (None, Some(service)) => IMPLIED_LABELS.contains(&name) && service.as_str() == value,
            (None, None) => false,
        }
    }

    /// All that it has.
    fn all(&self) -> impl Iterator<Item = (String, String)> {
        let own = self.own.iter().map(|(name, value)| (name.clone(), value.clone()));
        let implied = self.service.into_iter().flat_map(|service| {
            let missing = IMPLIED_LABELS.iter().filter(|name| !self.own.contains_key(**name));
            missing.map(|name| ((*name).to_owned(), service.to_string()))
        });
        own.chain(implied)
    }
}

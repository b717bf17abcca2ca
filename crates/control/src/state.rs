//! The mesh as it is now: configuration, workloads, what was decided once, and the resources made of them.
//!
//! Everything that changes goes through [`State`], which makes the touched resources anew and publishes them before it
//! returns. Nothing here waits for a disk or a network.

use crate::push::{Entry, Hub, Type, World};
use parking_lot::{Mutex, RwLock};
use sheer_core::compile::{
    self, Changes, Compiled, Fleet, Records, Registered, endpoints_of, mesh_of, routes_of, service_names, service_of,
    workload_of,
};
use sheer_core::name::{DnsLabel, ServiceName};
use sheer_core::wire::{ip_of, octets_of, v1};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

/// What was decided once about services and is kept in the store.
#[derive(Debug, Default)]
pub struct Book {
    addresses: HashMap<ServiceName, Vec<IpAddr>>,
    taken: HashSet<IpAddr>,
    pins: BTreeMap<ServiceName, Vec<DnsLabel>>,
}

impl Book {
    /// The book as it is in the store. Names that cannot be read are left out.
    pub fn new(addresses: Vec<(String, Vec<IpAddr>)>, pins: Vec<(String, Vec<String>)>) -> Self {
        let mut book = Self::default();
        for (service, addresses) in addresses {
            if let Ok(service) = ServiceName::parse(&service) {
                book.taken.extend(&addresses);
                book.addresses.insert(service, addresses);
            }
        }
        for (service, accounts) in pins {
            if let Ok(service) = ServiceName::parse(&service) {
                let accounts = accounts.iter().filter_map(|account| DnsLabel::parse(account).ok()).collect();
                book.pins.insert(service, accounts);
            }
        }
        book
    }
}

impl Book {
    /// Every address that was given.
    pub fn assigned(&self) -> Assigned {
        self.addresses.iter().map(|(service, addresses)| (service.clone(), addresses.clone())).collect()
    }
}

impl Records for Book {
    fn virtual_ips(&self, service: &ServiceName) -> Vec<IpAddr> {
        self.addresses.get(service).cloned().unwrap_or_default()
    }

    fn pins(&self, service: &ServiceName) -> Vec<DnsLabel> {
        self.pins.get(service).cloned().unwrap_or_default()
    }
}

/// The mesh as it is now.
pub struct State {
    hub: Arc<Hub>,
    compiled: RwLock<Arc<Compiled>>,
    inner: Mutex<Inner>,
}

struct Inner {
    compiled: Arc<Compiled>,
    fleet: Fleet,
    book: Book,
    trust: Option<v1::TrustBundle>,
    places: Places,
    epoch: u64,
    revision: u64,
}

/// Which services take connections at an address itself.
#[derive(Default)]
struct Places {
    of: HashMap<ServiceName, BTreeSet<IpAddr>>,
    at: HashMap<IpAddr, BTreeSet<ServiceName>>,
}

impl Places {
    /// Sets where a service does; returns the addresses of which something is different now.
    fn set(&mut self, service: &ServiceName, now: BTreeSet<IpAddr>) -> Vec<IpAddr> {
        let before = self.of.remove(service).unwrap_or_default();
        for address in before.difference(&now) {
            if let Some(services) = self.at.get_mut(address) {
                services.remove(service);
                if services.is_empty() {
                    self.at.remove(address);
                }
            }
        }
        for address in now.difference(&before) {
            self.at.entry(*address).or_default().insert(service.clone());
        }
        let different = before.symmetric_difference(&now).copied().collect();
        if !now.is_empty() {
            self.of.insert(service.clone(), now);
        }
        different
    }
}

/// Addresses that were given to a service just now and are to be stored.
pub type Assigned = Vec<(ServiceName, Vec<IpAddr>)>;

impl State {
    /// An empty mesh. Revisions begin at `revision`, so that they grow over restarts.
    pub fn new(hub: Arc<Hub>, book: Book, epoch: u64, revision: u64) -> Self {
        let compiled = Arc::new(Compiled::default());
        let fleet = Fleet::default();
        let places = Places::default();
        let inner = Inner { compiled: compiled.clone(), fleet, book, trust: None, places, epoch, revision };
        Self { hub, compiled: RwLock::new(compiled), inner: Mutex::new(inner) }
    }

    /// The configuration in force.
    pub fn compiled(&self) -> Arc<Compiled> {
        self.compiled.read().clone()
    }

    /// Reads the mesh under its lock; `read` must be short.
    pub fn look<T>(&self, read: impl FnOnce(&Compiled, &Fleet, &Book) -> T) -> T {
        let inner = self.inner.lock();
        read(&inner.compiled, &inner.fleet, &inner.book)
    }

    /// Puts a configuration into force.
    pub fn reconfigure(&self, compiled: Arc<Compiled>) -> Assigned {
        let mut inner = self.inner.lock();
        *self.compiled.write() = compiled.clone();
        inner.fleet = std::mem::take(&mut inner.fleet).recompiled(&compiled);
        inner.compiled = compiled;
        self.renew(&mut inner)
    }

    /// Sets whom the mesh trusts.
    pub fn trust(&self, bundle: v1::TrustBundle) {
        let mut inner = self.inner.lock();
        inner.trust = Some(bundle);
        self.renew(&mut inner);
    }

    /// Adds or replaces a workload.
    pub fn upsert(&self, workload: Registered) -> Assigned {
        let mut inner = self.inner.lock();
        let Inner { compiled, fleet, .. } = &mut *inner;
        let uid = workload.uid.clone();
        let changes = fleet.upsert(compiled, workload);
        self.apply(&mut inner, &changes, Some(&uid))
    }

    /// Removes a workload.
    pub fn remove(&self, uid: &str) {
        let mut inner = self.inner.lock();
        let Inner { compiled, fleet, .. } = &mut *inner;
        let changes = fleet.remove(compiled, uid);
        self.apply(&mut inner, &changes, Some(uid));
    }

    /// Sets the accounts that may answer as a service.
    pub fn pin(&self, service: &ServiceName, accounts: Vec<DnsLabel>) {
        let mut inner = self.inner.lock();
        inner.book.pins.insert(service.clone(), accounts);
        let changes = Changes { endpoints: BTreeSet::from([service.clone()]), ..Changes::default() };
        self.apply(&mut inner, &changes, None);
    }

    /// The services for which this workload would be the first claimant.
    pub fn unpinned(&self, workload: &Registered) -> Vec<ServiceName> {
        let inner = self.inner.lock();
        let services = workload_of(&inner.compiled, workload).services;
        let services = services.iter().filter_map(|name| ServiceName::parse(name).ok());
        services.filter(|name| compile::allowed_accounts(&inner.compiled, &inner.book, name).is_empty()).collect()
    }

    /// Makes everything anew.
    fn renew(&self, inner: &mut Inner) -> Assigned {
        let names = service_names(&inner.compiled, &inner.fleet);
        let assigned = inner.assign(&names);
        let mut next = World::default();
        next.revision = inner.next_revision();
        let mesh = mesh_of(&inner.compiled);
        next.put(Type::Mesh, "mesh", Entry::new(&mesh));
        if let Some(bundle) = &inner.trust {
            next.put(Type::TrustBundle, &bundle.trust_domain, Entry::new(bundle));
        }
        inner.places = Places::default();
        for name in &names {
            inner.remake_service(&mut next, name);
            inner.remake_endpoints(&mut next, name, &mut BTreeSet::new());
            inner.remake_routes(&mut next, name);
        }
        for workload in inner.fleet.workloads() {
            next.put(Type::Workload, &workload.uid, Entry::new(&workload_of(&inner.compiled, workload)));
        }
        let changed = next.changes_since(&self.hub.world());
        self.hub.publish(next, &changed);
        assigned
    }

    /// Makes anew what `changes` names.
    fn apply(&self, inner: &mut Inner, changes: &Changes, workload: Option<&str>) -> Assigned {
        let assigned = inner.assign(&changes.services);
        let mut next = (*self.hub.world()).clone();
        let mut changed = BTreeSet::new();
        let mut addresses = BTreeSet::new();
        let mut note = |kind: Type, name: &ServiceName, differs: bool| {
            if differs {
                changed.insert((kind, name.to_string()));
            }
        };
        for name in &changes.services {
            note(Type::Service, name, inner.remake_service(&mut next, name));
        }
        for name in &changes.endpoints {
            note(Type::Endpoints, name, inner.remake_endpoints(&mut next, name, &mut addresses));
        }
        for name in &changes.routes {
            note(Type::Routes, name, inner.remake_routes(&mut next, name));
        }
        changed.extend(addresses.into_iter().map(|address| (Type::Address, address)));
        if let Some(uid) = workload {
            let differs = match inner.fleet.workload(uid) {
                Some(workload) => next.put(Type::Workload, uid, Entry::new(&workload_of(&inner.compiled, workload))),
                None => next.remove(Type::Workload, uid),
            };
            if differs {
                changed.insert((Type::Workload, uid.to_owned()));
            }
        }
        if !changed.is_empty() {
            next.revision = inner.next_revision();
            self.hub.publish(next, &changed);
        }
        assigned
    }
}

impl Inner {
    fn next_revision(&mut self) -> String {
        self.revision += 1;
        format!("{}.{}", self.epoch, self.revision)
    }

    fn assign(&mut self, names: &BTreeSet<ServiceName>) -> Assigned {
        let ranges = self.compiled.mesh.virtual_ranges;
        let mut assigned = Vec::new();
        for name in names {
            let current = self.book.addresses.get(name);
            let fits = |addresses: &Vec<IpAddr>| addresses.iter().all(|address| ranges.contains(address));
            if current.is_some_and(fits) {
                continue;
            }
            let addresses = ranges.assign(name, |address| self.book.taken.contains(&address));
            self.book.taken.extend(&addresses);
            self.book.addresses.insert(name.clone(), addresses.clone());
            assigned.push((name.clone(), addresses));
        }
        assigned
    }

    fn remake_service(&self, world: &mut World, name: &ServiceName) -> bool {
        match service_of(&self.compiled, &self.fleet, &self.book, name) {
            Some(service) => world.put(Type::Service, &name.to_string(), Entry::new(&service)),
            None => world.remove(Type::Service, &name.to_string()),
        }
    }

    /// `addresses` gets the names of those of which something is different with it.
    fn remake_endpoints(&mut self, world: &mut World, name: &ServiceName, addresses: &mut BTreeSet<String>) -> bool {
        let endpoints = endpoints_of(&self.compiled, &self.fleet, &self.book, name);
        let there = endpoints.iter().flat_map(|it| &it.endpoints).filter(|it| it.at_address);
        let there = there.filter_map(|it| ip_of(&it.address)).collect();
        for address in self.places.set(name, there) {
            let place = address.to_string();
            let differs = match self.places.at.get(&address) {
                Some(services) => {
                    let services = services.iter().map(ServiceName::to_string).collect();
                    let told = v1::Address { address: octets_of(address), services, requires: vec![] };
                    world.put(Type::Address, &place, Entry::new(&told))
                }
                None => world.remove(Type::Address, &place),
            };
            if differs {
                addresses.insert(place);
            }
        }
        match endpoints {
            Some(endpoints) => world.put(Type::Endpoints, &name.to_string(), Entry::new(&endpoints)),
            None => world.remove(Type::Endpoints, &name.to_string()),
        }
    }

    fn remake_routes(&self, world: &mut World, name: &ServiceName) -> bool {
        match routes_of(&self.compiled, &self.fleet, name) {
            Some(routes) => world.put(Type::Routes, &name.to_string(), Entry::routes(&routes)),
            None => world.remove(Type::Routes, &name.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_of_all_services_that_are_there() {
        let mut places = Places::default();
        let [api, web] = ["api", "web"].map(|name| ServiceName::parse(name).unwrap());
        let [one, two] = [1, 2].map(|last| IpAddr::from([192, 0, 2, last]));
        assert_eq!(places.set(&api, BTreeSet::from([one, two])), [one, two]);
        assert_eq!(places.set(&web, BTreeSet::from([two])), [two]);
        assert_eq!(places.at[&two], BTreeSet::from([api.clone(), web.clone()]));
        assert!(places.set(&web, BTreeSet::from([two])).is_empty());
        assert_eq!(places.set(&api, BTreeSet::from([one])), [two]);
        assert_eq!(places.at[&two], BTreeSet::from([web.clone()]));
        assert_eq!(places.set(&web, BTreeSet::new()), [two]);
        assert!(!places.at.contains_key(&two) && !places.of.contains_key(&web));
    }
}

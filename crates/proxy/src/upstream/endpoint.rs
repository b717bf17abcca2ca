//! What is known of endpoints: the control plane's list, and what this proxy sees of each itself.
//!
//! Both live outside the snapshot, so that a change of configuration resets nothing. A service's list is replaced as a
//! whole; an endpoint that stays keeps its [`State`], which all workers share.

mod state;

pub use state::{InFlight, State};

use arc_swap::ArcSwapOption;
use parking_lot::RwLock;
use sheer_core::balance::{self, Candidate};
use sheer_core::identity::SpiffeId;
use sheer_core::name::ServiceName;
use sheer_core::snapshot::{Endpoint, EndpointSet, Health, Hop};
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

/// The endpoints of all services in use.
#[derive(Debug)]
pub struct Table {
    cells: RwLock<HashMap<ServiceName, Arc<Cell>>>,
    /// Addresses of which it is known who of the mesh is there, with the endpoints of those in force.
    addresses: RwLock<HashSet<IpAddr>>,
    epoch: Instant,
}

/// The endpoints of one service, replaced as a whole.
pub type Cell = ArcSwapOption<Live>;

/// The endpoints of one service at one time.
#[derive(Debug)]
pub struct Live {
    /// The identities accepted as this service.
    pub identities: Arc<[SpiffeId]>,
    ports: Vec<(u16, Arc<[LiveEndpoint]>)>,
}

/// An endpoint and what this proxy sees of it.
#[derive(Clone, Debug)]
pub struct LiveEndpoint {
    /// As the control plane told it.
    pub endpoint: Arc<Endpoint>,
    /// As seen from here.
    pub state: Arc<State>,
}

/// What makes an endpoint the same one after a change. How it is dialled is a part of it: connections are kept by its
/// state, and one that was made in plaintext must not serve what has become a mesh peer.
type Key = (Arc<str>, SocketAddr, u16, Hop, Arc<str>);

impl Default for Table {
    fn default() -> Self {
        Self { cells: RwLock::default(), addresses: RwLock::default(), epoch: Instant::now() }
    }
}

impl Table {
    /// Replaces a service's endpoints. Those that stay keep their state.
    pub fn set(&self, service: &ServiceName, set: Arc<EndpointSet>) {
        let cell = self.cells.write().entry(service.clone()).or_default().clone();
        let before = cell.load_full();
        let known: HashMap<Key, &Arc<State>> = before
            .iter()
            .flat_map(|live| live.ports.iter().flat_map(|(_, list)| list.iter()))
            .map(|it| (key_of(&it.endpoint), &it.state))
            .collect();
        // One workload that answers several ports of a service at one place is one endpoint with one state.
        let mut states: HashMap<Key, Arc<State>> = HashMap::new();
        let mut ports: Vec<(u16, Vec<LiveEndpoint>)> = Vec::new();
        for endpoint in set.iter() {
            let key = key_of(endpoint);
            let state = states.entry(key.clone()).or_insert_with(|| match known.get(&key) {
                Some(state) => Arc::clone(state),
                None => Arc::new(State::new(self.epoch)),
            });
            let live = LiveEndpoint { endpoint: endpoint.clone(), state: state.clone() };
            match ports.iter_mut().find(|(port, _)| *port == endpoint.service_port) {
                Some((_, list)) => list.push(live),
                None => ports.push((endpoint.service_port, vec![live])),
            }
        }
        let ports = ports.into_iter().map(|(port, list)| (port, list.into())).collect();
        cell.store(Some(Arc::new(Live { identities: set.identities.clone(), ports })));
    }

    /// Forgets a service's endpoints.
    pub fn remove(&self, service: &ServiceName) {
        if let Some(cell) = self.cells.write().remove(service) {
            cell.store(None);
        }
    }

    /// The endpoint that takes connections at this address, of any service in use: where the application's own port is
    /// one of the address, or at the proxy's door where only one port lies behind it. A workload in a network namespace
    /// of its own has no other port at its host's address: what listens there is somebody else.
    pub fn at(&self, address: SocketAddr) -> Option<(ServiceName, Arc<Live>, LiveEndpoint)> {
        let mut at_the_door: Option<(ServiceName, Arc<Live>, LiveEndpoint)> = None;
        let mut is_one = true;
        for (service, cell) in self.cells.read().iter() {
            let Some(live) = cell.load_full() else { continue };
            for it in live.ports.iter().flat_map(|(_, list)| list.iter()) {
                if it.endpoint.address.ip() != address.ip() {
                    continue;
                }
                if it.endpoint.at_address && it.endpoint.workload_port == address.port() {
                    return Some((service.clone(), live.clone(), it.clone()));
                }
                if it.endpoint.address.port() == address.port() {
                    is_one &= at_the_door.as_ref().is_none_or(|(.., before)| is_same_port(before, it));
                    at_the_door = Some((service.clone(), live.clone(), it.clone()));
                }
            }
        }
        at_the_door.filter(|_| is_one)
    }

    /// Whether it is known who of the mesh is at this address.
    pub fn knows_address(&self, address: IpAddr) -> bool {
        self.addresses.read().contains(&address)
    }

    /// From now on it is known.
    pub fn know_address(&self, address: IpAddr) {
        self.addresses.write().insert(address);
    }

    /// It is not known any more.
    pub fn forget_address(&self, address: IpAddr) {
        self.addresses.write().remove(&address);
    }

    /// The cell of a service's endpoints; `None` when nobody has asked for them yet.
    pub fn get(&self, service: &ServiceName) -> Option<Arc<Cell>> {
        self.cells.read().get(service).cloned()
    }
}

fn is_same_port(one: &LiveEndpoint, other: &LiveEndpoint) -> bool {
    let place = |it: &LiveEndpoint| (it.endpoint.workload.clone(), it.endpoint.workload_port);
    place(one) == place(other)
}

fn key_of(endpoint: &Endpoint) -> Key {
    let Endpoint { workload, address, workload_port, hop, server_name, .. } = endpoint;
    (workload.clone(), *address, *workload_port, *hop, server_name.clone())
}

impl Live {
    /// The endpoints that answer this service port.
    pub fn of_port(&self, port: u16) -> &[LiveEndpoint] {
        self.ports.iter().find(|(it, _)| *it == port).map_or(&[], |(_, list)| list)
    }
}

impl Candidate for LiveEndpoint {
    fn health(&self) -> Health {
        if self.state.is_shunned() { self.endpoint.health.max(Health::Suspect) } else { self.endpoint.health }
    }

    fn cost(&self) -> f64 {
        let in_flight = self.state.in_flight();
        balance::cost(self.state.average(in_flight), in_flight, self.endpoint.weight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(port: u16) -> Arc<Endpoint> {
        Arc::new(Endpoint {
            workload: format!("w{port}").into(),
            service_port: 80,
            address: ([127, 0, 0, 1], port).into(),
            workload_port: 8080,
            server_name: "p8080.web.default.svc.mesh.internal".into(),
            hop: Hop::Sheer1,
            health: Health::Healthy,
            weight: 1,
            at_address: false,
        })
    }

    #[test]
    fn only_what_listens_at_an_address_is_found_there() {
        let (table, web) = (Table::default(), ServiceName::parse("web").unwrap());
        let port_of = |port: u16| table.at(([127, 0, 0, 1], port).into()).map(|(.., it)| it.endpoint.workload_port);
        let of = |door: u16, workload_port: u16, service_port: u16, at_address: bool| {
            Arc::new(Endpoint { workload_port, service_port, at_address, ..Endpoint::clone(&endpoint(door)) })
        };
        // In a namespace of its own: 5432 of the host's address is somebody else's.
        let own = vec![of(40_000, 5432, 5432, false), of(40_000, 5432, 80, false)];
        table.set(&web, Arc::new(EndpointSet::new(vec![], own)));
        assert_eq!((port_of(5432), port_of(40_000)), (None, Some(5432)));
        // The door of several ports names none of them.
        let own = vec![of(40_000, 5432, 5432, false), of(40_000, 8080, 80, false)];
        table.set(&web, Arc::new(EndpointSet::new(vec![], own)));
        assert_eq!((port_of(5432), port_of(8080), port_of(40_000)), (None, None, None));
        // On the host's own network: the application's port is the address's.
        let shared = vec![of(5432, 5432, 5432, true), of(40_001, 8080, 80, true), of(40_001, 8081, 81, true)];
        table.set(&web, Arc::new(EndpointSet::new(vec![], shared)));
        assert_eq!((port_of(5432), port_of(8080), port_of(8081)), (Some(5432), Some(8080), Some(8081)));
        assert_eq!((port_of(40_001), port_of(80)), (None, None));
        assert!(table.at(([127, 0, 0, 2], 5432).into()).is_none());
    }

    #[test]
    fn what_is_known_of_an_endpoint_survives_a_change() {
        let (table, web) = (Table::default(), ServiceName::parse("web").unwrap());
        assert!(table.get(&web).is_none());
        table.set(&web, Arc::new(EndpointSet::new(vec![], vec![endpoint(1), endpoint(2)])));
        let cell = table.get(&web).unwrap();
        let before = cell.load_full().unwrap();
        let held = before.of_port(80)[0].state.begin();
        before.of_port(80)[0].state.shun();
        table.set(&web, Arc::new(EndpointSet::new(vec![], vec![endpoint(1), endpoint(3)])));
        let after = cell.load_full().unwrap();
        assert!(Arc::ptr_eq(&after.of_port(80)[0].state, &before.of_port(80)[0].state));
        assert_eq!(after.of_port(80)[0].health(), Health::Suspect);
        assert_eq!(after.of_port(80)[1].health(), Health::Healthy);
        assert!(after.of_port(80)[0].cost() > after.of_port(80)[1].cost());
        drop(held);
        assert_eq!(after.of_port(80)[0].cost(), after.of_port(80)[1].cost());
        assert!(after.of_port(81).is_empty());
        // What was dialled in plaintext is another endpoint once it is a mesh peer.
        let plain = Arc::new(Endpoint { hop: Hop::None, ..Endpoint::clone(&endpoint(1)) });
        table.set(&web, Arc::new(EndpointSet::new(vec![], vec![plain])));
        let plain = cell.load_full().unwrap();
        assert!(!Arc::ptr_eq(&plain.of_port(80)[0].state, &after.of_port(80)[0].state));
    }
}

use super::view::{Kind, Outputs, View};
use crate::dns::Zone;
use crate::state::{Configuration, seal, unseal};
use arc_swap::ArcSwap;
use prost::Message;
use sheer_core::name::{DnsLabel, ServiceName};
use sheer_core::snapshot::Snapshot;
use sheer_core::wire::discovery::{DeltaDiscoveryResponse, Resource};
use sheer_core::wire::{pack, v1};
use sheer_fuzzing::Choices;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use tokio::sync::watch;

/// So many responses say what there is to say.
const MAX_RESPONSES: usize = 40;

/// Names of services; two of them claim the same host and address.
const SERVICES: [&str; 4] = ["default/api", "default/web", "shop/api", "shop/cart"];

/// Responses of a control plane in any order, repeated, with good resources and bad ones: a bad one is refused alone and the
/// one before it stays; what is held at the end is what a list of the accepted ones says, and what is decided with is what
/// a proxy has that is told all of it at once.
///
/// # Panics
/// When that does not hold.
pub fn discovery(input: &[u8]) {
    let mut choices = Choices::of(input);
    let mut view = view();
    let mut model = Model::default();
    for _ in 0..MAX_RESPONSES {
        if choices.is_empty() {
            break;
        }
        let kind = choices.one_of(&Kind::ALL);
        let mut response = DeltaDiscoveryResponse { type_url: kind.type_url().into(), ..Default::default() };
        let mut expected = Vec::new();
        for _ in 0..choices.below(4) {
            let (resource, is_good) = resource(kind, &mut choices);
            if is_good {
                model.take(kind, &resource);
            } else {
                expected.push((resource.name.clone(), resource.version.clone()));
                model.refuse(kind, &resource.name);
            }
            response.resources.push(resource);
        }
        for _ in 0..choices.below(3) {
            let name = name_of(kind, &mut choices);
            model.remove(kind, &name);
            response.removed_resources.push(name);
        }
        let refused: Vec<_> = view.apply(kind, response).into_iter().map(|it| (it.name, it.version)).collect();
        assert_eq!(refused, expected, "others are refused than are bad");
    }
    model.is_held_by(&view);
    same_decisions(&view, &model.told_at_once());
    // A mesh and trust that were taken back are in force, but only until the next start.
    if model.lasting.iter().all(|(kind, it)| model.held.get(&(*kind, it.name.clone())) == Some(it)) {
        let mut restarted = self::view();
        restarted.restore(view.configuration());
        same_decisions(&view, &restarted);
    }
}

/// The file with the last good configuration: one that was changed anywhere is not used; what one says is applied, and
/// what is then stored, read and applied again is the same.
///
/// # Panics
/// When that does not hold.
pub fn kept(input: &[u8]) {
    if let Ok(content) = unseal(input) {
        assert_eq!(seal(content), input, "two files with the same content");
    }
    let sealed = seal(input);
    assert_eq!(unseal(&sealed), Ok(input));
    let mut choices = Choices::of(input);
    let mut changed = sealed.clone();
    let at = choices.below(sealed.len().min(65_536));
    changed[at] ^= choices.byte().max(1);
    assert!(unseal(&changed).is_err() && unseal(&sealed[..at]).is_err(), "a damaged file is used");

    let Ok(mut configuration) = Configuration::decode(input) else { return };
    // Of two trust bundles or workloads the last is in force; there is one of each.
    configuration.resources.sort_by(|a, b| a.name.cmp(&b.name));
    let mut first = view();
    first.restore(configuration);
    let stored = first.configuration();
    let again = Configuration::decode(stored.encode_to_vec().as_slice()).expect("what was stored");
    assert_eq!(again, stored);
    let mut second = view();
    second.restore(again);
    assert_eq!(second.configuration(), stored, "a second restart finds less than the first");
    same_decisions(&first, &second);
    assert_eq!((first.is_ready(), first.wanted()), (second.is_ready(), second.wanted()));
}

fn view() -> View {
    let namespace = DnsLabel::parse("default").expect("a name");
    let outputs = Outputs {
        snapshot: Arc::new(ArcSwap::from_pointee(Snapshot::new(namespace.clone()))),
        endpoints: Arc::default(),
        zone: Arc::new(ArcSwap::from_pointee(Zone::default())),
        changed: Arc::new(watch::channel(0).0),
        trust: Arc::new(watch::channel(None).0),
        metrics: Arc::default(),
    };
    View::new(namespace, outputs)
}

/// What should be held: a list.
#[derive(Default)]
struct Model {
    held: BTreeMap<(Kind, String), Resource>,
    absent: BTreeSet<(Kind, String)>,
    /// Routes that were refused where none were.
    failing: BTreeSet<String>,
    /// There is always a mesh, and trust.
    lasting: BTreeMap<Kind, Resource>,
}

impl Model {
    fn take(&mut self, kind: Kind, resource: &Resource) {
        let key = (kind, resource.name.clone());
        self.absent.remove(&key);
        if kind == Kind::Routes {
            self.failing.remove(&resource.name);
        }
        if matches!(kind, Kind::Mesh | Kind::TrustBundle) {
            self.lasting.insert(kind, resource.clone());
        }
        self.held.insert(key, resource.clone());
    }

    fn refuse(&mut self, kind: Kind, name: &str) {
        let key = (kind, name.to_owned());
        if kind == Kind::Routes && !self.held.contains_key(&key) && ServiceName::parse(name).is_ok() {
            self.failing.insert(name.to_owned());
        }
    }

    fn remove(&mut self, kind: Kind, name: &str) {
        let key = (kind, name.to_owned());
        self.held.remove(&key);
        if kind == Kind::Routes {
            self.failing.remove(name);
        }
        if kind.is_on_demand() {
            self.absent.insert(key);
        }
    }

    fn is_held_by(&self, view: &View) {
        for kind in Kind::ALL {
            let expected = self.held.iter().filter(|((it, _), _)| *it == kind);
            let expected: BTreeMap<_, _> = expected.map(|((_, name), it)| (name.clone(), it.version.clone())).collect();
            assert_eq!(view.versions(kind), expected, "{kind:?}");
        }
        let stored = view.configuration();
        let absent = stored.absent.iter().map(|it| (Kind::of(&it.type_url).expect("a kind"), it.name.clone()));
        let fails = |kind: Kind, name: &String| kind == Kind::Routes && self.failing.contains(name);
        let expected = self.absent.iter().filter(|(kind, name)| *kind != Kind::Address && !fails(*kind, name));
        assert!(absent.eq(expected.cloned()));
    }

    /// A view that is told in one response a kind.
    fn told_at_once(&self) -> View {
        let mut view = view();
        for kind in Kind::ALL {
            let mut response = DeltaDiscoveryResponse::default();
            let lasting = self.lasting.get(&kind).cloned();
            let held = self.held.iter().filter(|((it, _), _)| *it == kind).map(|(_, it)| it.clone());
            match lasting {
                Some(lasting) => response.resources.push(lasting),
                None => response.resources.extend(held),
            }
            let failing = self.failing.iter().filter(|_| kind == Kind::Routes);
            response.resources.extend(failing.map(|name| Resource { name: name.clone(), ..Default::default() }));
            view.apply(kind, response);
        }
        view
    }
}

/// Both decide alike: every service by name and address, its routes, its endpoints, and what DNS says.
fn same_decisions(one: &View, other: &View) {
    let (first, second) = (one.outputs().snapshot.load(), other.outputs().snapshot.load());
    assert_eq!((first.mesh(), first.workload()), (second.mesh(), second.workload()));
    let services = |snapshot: &Snapshot| {
        let mut services: Vec<_> = snapshot.services().cloned().collect();
        services.sort_by(|a, b| a.name.cmp(&b.name));
        services
    };
    let all = services(&first);
    assert_eq!(all, services(&second));
    let named = all.iter().flat_map(|service| service.hosts.iter().map(|host| host.to_string()));
    let short = SERVICES.iter().map(|name| name.split('/').rev().collect::<Vec<_>>().join("."));
    for host in named.chain(short).chain(["api".to_owned(), "shared.example".to_owned()]) {
        let name = |snapshot: &Snapshot| snapshot.service_named(&host).map(|it| it.name.clone());
        assert_eq!(name(&first), name(&second), "{host}");
        let (zone, other_zone) = (one.outputs().zone.load(), other.outputs().zone.load());
        assert_eq!(zone.lookup(&host), other_zone.lookup(&host), "{host}");
    }
    let addresses = all.iter().flat_map(|service| service.addresses.iter().copied());
    let some = (0..8).map(|last| IpAddr::from([240, 0, 0, last]));
    for address in addresses.chain(some) {
        let name = |snapshot: &Snapshot| snapshot.service_at(address).map(|it| it.name.clone());
        assert_eq!(name(&first), name(&second), "{address}");
        assert_eq!(first.is_unassigned_virtual(address), second.is_unassigned_virtual(address));
    }
    let known = SERVICES.iter().filter_map(|name| ServiceName::parse(name).ok());
    for service in known.chain(all.iter().map(|it| it.name.clone())) {
        let routes = |snapshot: &Snapshot| snapshot.routes(&service).map(|it| format!("{it:?}"));
        assert_eq!(routes(&first), routes(&second), "{service}");
        let endpoints = |view: &View| {
            let live = view.outputs().endpoints.get(&service).and_then(|cell| cell.load_full())?;
            let all =
                [80, 81].map(|port| live.of_port(port).iter().map(|it| (*it.endpoint).clone()).collect::<Vec<_>>());
            // None and no answer mean the same to a request that waits.
            (live.identities.len() + all.concat().len() > 0).then(|| (live.identities.clone(), all))
        };
        assert_eq!(endpoints(one), endpoints(other), "{service}");
    }
    assert_eq!(*one.outputs().trust.borrow(), *other.outputs().trust.borrow());
}

fn name_of(kind: Kind, choices: &mut Choices<'_>) -> String {
    match kind {
        Kind::Mesh => "mesh".to_owned(),
        Kind::TrustBundle => "mesh.internal".to_owned(),
        Kind::Workload => "u1".to_owned(),
        Kind::Service | Kind::Endpoints | Kind::Routes => choices.one_of(&SERVICES).to_owned(),
        Kind::Address => choices.one_of(&["10.0.0.1", "10.0.0.2", "nothing"]).to_owned(),
    }
}

/// A resource, and whether it is to be taken.
fn resource(kind: Kind, choices: &mut Choices<'_>) -> (Resource, bool) {
    let name = name_of(kind, choices);
    let (namespace, service) = name.split_once('/').unwrap_or(("default", &name));
    let (namespace, service) = (namespace.to_owned(), service.to_owned());
    let variant = choices.byte();
    // Half of the variants are good, so that chance comes to long sequences of them.
    let wrong = if choices.byte() > 160 { choices.below(6) + 1 } else { 0 };
    let requires = if wrong == 1 { vec!["teleport".to_owned()] } else { vec![] };
    let text = |good: &str| if wrong == 2 { "Not A Name".to_owned() } else { good.to_owned() };
    let mut breaks_text = true;
    let mut packed = match kind {
        Kind::Mesh => pack(&v1::Mesh {
            trust_domain: text("mesh.internal"),
            cluster_domain: ["mesh.internal", "cluster.local"][usize::from(variant & 1)].into(),
            virtual_ranges: vec!["240.0.0.0/8".into()],
            deny_unknown_egress: variant & 2 != 0,
            requires,
            ..Default::default()
        }),
        Kind::TrustBundle => {
            breaks_text = false;
            pack(&v1::TrustBundle {
                trust_domain: name.clone(),
                roots: vec![vec![variant].into()],
                sequence: u64::from(variant),
                requires,
                ..Default::default()
            })
        }
        Kind::Workload => pack(&v1::Workload {
            uid: name.clone(),
            namespace,
            identity: text("spiffe://mesh.internal/ns/default/sa/web"),
            mode: i32::from(variant % 3) + 1,
            ports: vec![v1::WorkloadPort { port: u32::from(variant) + 1, ..Default::default() }],
            requires,
            ..Default::default()
        }),
        Kind::Service => {
            let mut hosts = vec![format!("{service}.{namespace}.svc.mesh.internal")];
            if variant & 1 != 0 {
                hosts.push("shared.example".into());
            }
            if variant & 2 != 0 {
                // Somebody else's full name.
                hosts.push("web.default.svc.mesh.internal".into());
            }
            let last = if wrong == 2 { vec![240] } else { vec![240, 0, 0, variant >> 2 & 3] };
            let mut virtual_ips = vec![last.into()];
            if variant & 64 != 0 {
                virtual_ips.push([&[0; 10][..], &[0xff, 0xff, 240, 0, 0, variant >> 4 & 7]].concat().into());
            }
            let ports = vec![v1::ServicePort { port: 80, protocol: i32::from(variant % 6), ..Default::default() }];
            pack(&v1::Service { namespace, name: service, hosts, virtual_ips, ports, requires, ..Default::default() })
        }
        Kind::Endpoints => {
            let endpoint = |last: u8| v1::Endpoint {
                workload: format!("u{last}"),
                service_port: 80 + u32::from(last & 1),
                address: vec![10, 0, 0, last].into(),
                port: 4000,
                workload_port: 8080,
                hop: v1::Hop::Sheer1.into(),
                health: i32::from(last % 4),
                ..Default::default()
            };
            let endpoints = (0..variant % 4).map(|count| endpoint(count + variant / 64)).collect();
            let identities = vec![text("spiffe://mesh.internal/ns/default/sa/api")];
            pack(&v1::Endpoints { namespace, name: service, endpoints, identities, requires })
        }
        Kind::Routes => {
            let path = match wrong {
                2 => None,
                _ => Some(v1::http_match::Path::Prefix(format!("/{}", variant % 4))),
            };
            let backend = v1::Backend {
                namespace: namespace.clone(),
                name: SERVICES[usize::from(variant / 4 % 4)].rsplit('/').next().unwrap_or_default().into(),
                port: 80,
                weight: u32::from(variant),
                invalid: false,
            };
            let rule = v1::HttpRule {
                matches: vec![v1::HttpMatch { path, ..Default::default() }],
                backends: vec![backend],
                ..Default::default()
            };
            let http = v1::HttpRoute {
                namespace: namespace.clone(),
                name: format!("r{}", variant % 8),
                rules: vec![rule],
                ..Default::default()
            };
            pack(&v1::Routes { namespace, name: service, http: vec![http], requires })
        }
        Kind::Address => {
            let last = if name == "10.0.0.1" { 1 } else { 2 };
            let services = vec![text(SERVICES[usize::from(variant % 4)])];
            pack(&v1::Address { address: vec![10, 0, 0, last].into(), services, requires })
        }
    };
    match wrong {
        0 => {}
        1 => {}
        2 if breaks_text => {}
        3 => packed.version = "another".into(),
        4 => packed.resource = None,
        5 => {
            let other = Kind::ALL[(Kind::ALL.iter().position(|it| *it == kind).unwrap_or_default() + 1) % 7];
            if let Some(any) = &mut packed.resource {
                any.type_url = other.type_url().into();
            }
        }
        _ => {
            if let Some(any) = &mut packed.resource {
                any.value.push(0xff);
                packed.version = sheer_core::wire::version_of(&any.value);
            }
        }
    }
    // What travels under another name than its own is none.
    let is_named = packed.name == name;
    packed.name = name;
    (packed, wrong == 0 && is_named)
}

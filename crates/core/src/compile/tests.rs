use super::*;
use crate::identity::SpiffeId;
use crate::name::DnsLabel;
use crate::wire::v1::{Health, Hop, Mode, Protocol};
use std::net::IpAddr;

/// Addresses by hash, and one pin for every service.
struct Pinned(&'static str);

impl Records for Pinned {
    fn virtual_ips(&self, service: &ServiceName) -> Vec<IpAddr> {
        VirtualRanges::of(DEFAULT_DOMAIN).assign(service, |_| false)
    }
    fn pins(&self, _: &ServiceName) -> Vec<DnsLabel> {
        vec![DnsLabel::parse(self.0).unwrap()]
    }
}

fn source(text: &str) -> Vec<Source> {
    vec![Source { file: "mesh.yaml".to_owned(), text: text.to_owned() }]
}

fn name(text: &str) -> ServiceName {
    ServiceName::parse(text).unwrap()
}

fn workload(number: u8, service: &str, account: &str, ports: &[(u16, Protocol)]) -> Registered {
    let service = name(service);
    let account = DnsLabel::parse(account).unwrap();
    let port = |(port, protocol): &(u16, Protocol)| RegisteredPort {
        port: *port,
        name: String::new(),
        protocol: *protocol,
        mesh_port: 40_000 + u16::from(number),
        hop: Hop::Sheer1,
        ready: true,
        at_address: false,
    };
    Registered {
        uid: format!("local/proxy/{}-{number}", service),
        name: ServiceName {
            namespace: service.namespace.clone(),
            name: DnsLabel::parse(&format!("{}-{number}", service.name)).unwrap(),
        },
        identity: SpiffeId::new(DEFAULT_DOMAIN, service.namespace.clone(), account).unwrap(),
        service: Some(service),
        labels: BTreeMap::new(),
        ports: ports.iter().map(port).collect(),
        address: IpAddr::from([192, 0, 2, number]),
        network: String::new(),
        locality: String::new(),
        health: Health::Healthy,
        mode: Mode::Unspecified,
    }
}

#[test]
fn nothing_written_is_a_working_mesh() {
    let compiled = compile(&[]);
    assert!(compiled.diagnostics.is_empty());
    let fleet = Fleet::new(&compiled, [workload(1, "api", "api", &[(8081, Protocol::Detect)])]);
    let service = service_of(&compiled, &fleet, &Pinned("api"), &name("api")).unwrap();
    assert!(service.implied);
    assert_eq!(service.hosts, ["api.default.svc.mesh.internal"]);
    assert_eq!(service.ports.iter().map(|port| port.port).collect::<Vec<_>>(), [80, 8081]);
    let endpoints = endpoints_of(&compiled, &fleet, &Pinned("api"), &name("api")).unwrap();
    let ports: Vec<_> = endpoints.endpoints.iter().map(|it| (it.service_port, it.port, it.workload_port)).collect();
    assert_eq!(ports, [(80, 40_001, 8081), (8081, 40_001, 8081)]);
    assert!(endpoints.endpoints.iter().all(|it| !it.at_address), "its proxy did not say so");
    assert_eq!(endpoints.identities, ["spiffe://mesh.internal/ns/default/sa/api"]);
    assert_eq!(routes_of(&compiled, &fleet, &name("api")), None);
}

#[test]
fn another_account_that_names_the_service_is_no_endpoint() {
    let compiled = compile(&[]);
    let mallory = workload(2, "api", "mallory", &[(8081, Protocol::Detect)]);
    let fleet = Fleet::new(&compiled, [workload(1, "api", "api", &[(8081, Protocol::Detect)]), mallory.clone()]);
    let endpoints = endpoints_of(&compiled, &fleet, &Pinned("api"), &name("api")).unwrap();
    assert!(endpoints.endpoints.iter().all(|it| it.workload == "local/proxy/default/api-1"), "{endpoints:?}");
    let warnings = warnings_for(&compiled, &Pinned("api"), &mallory);
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].contains("api may answer as it, not mallory"), "{}", warnings[0]);
}

const SELECTED: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Service
metadata: {name: web-v2}
spec:
  selector: {app: web, version: v2}
  ports: [{port: 80, targetPort: 8080}]
"#;

#[test]
fn selectors_choose_by_label_and_by_the_named_service() {
    let compiled = compile(&source(SELECTED));
    assert!(compiled.diagnostics.is_empty(), "{:?}", compiled.diagnostics);
    let mut second = workload(2, "web", "web", &[(8080, Protocol::Http)]);
    second.labels.insert("version".to_owned(), "v2".to_owned());
    let fleet = Fleet::new(&compiled, [workload(1, "web", "web", &[(8080, Protocol::Http)]), second]);
    let uids = |service: &str| -> Vec<String> {
        let endpoints = endpoints_of(&compiled, &fleet, &Pinned("web"), &name(service)).unwrap();
        endpoints.endpoints.into_iter().map(|it| it.workload).collect()
    };
    assert_eq!(uids("web"), ["local/proxy/default/web-1", "local/proxy/default/web-2"]);
    assert_eq!(uids("web-v2"), ["local/proxy/default/web-2"]);
    assert!(!service_of(&compiled, &fleet, &Pinned("web"), &name("web")).unwrap().implied);
}

#[test]
fn a_port_that_is_not_declared_or_not_ready_has_no_endpoint() {
    let compiled = compile(&source(SELECTED));
    let other = workload(1, "web", "web", &[(9090, Protocol::Http)]);
    let mut starting = workload(2, "web", "web", &[(8080, Protocol::Http)]);
    starting.ports[0].ready = false;
    let fleet = Fleet::new(&compiled, [other.clone(), starting]);
    assert!(endpoints_of(&compiled, &fleet, &Pinned("web"), &name("web")).unwrap().endpoints.is_empty());
    let warnings = warnings_for(&compiled, &Pinned("web"), &other);
    assert!(warnings[0].contains("leads to its port 8080, which it does not declare"), "{warnings:?}");
}

#[test]
fn a_change_touches_only_its_own_services() {
    let routed = r#"
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: split}
spec:
  parentRefs: [{group: "", kind: Service, name: web}]
  rules: [{backendRefs: [{name: web, port: 80}, {name: next, port: 80, weight: 0}]}]
"#;
    let compiled = compile(&source(&format!("{SELECTED}---{routed}")));
    let mut fleet = Fleet::default();
    let changes = fleet.upsert(&compiled, workload(1, "web", "web", &[(8080, Protocol::Http)]));
    assert_eq!(changes, Changes { endpoints: [name("web")].into(), ..Default::default() });
    let again = fleet.upsert(&compiled, workload(1, "web", "web", &[(8080, Protocol::Http)]));
    assert_eq!(again, Changes::default());

    let invalid =
        |fleet: &Fleet| routes_of(&compiled, fleet, &name("web")).unwrap().http[0].rules[0].backends[1].invalid;
    assert!(invalid(&fleet));
    let changes = fleet.upsert(&compiled, workload(7, "next", "next", &[(8080, Protocol::Http)]));
    assert_eq!(changes.services, [name("next")].into());
    assert_eq!(changes.endpoints, [name("next")].into());
    assert!(changes.routes.contains(&name("web")));
    assert!(!invalid(&fleet));
    let changes = fleet.remove(&compiled, "local/proxy/default/next-7");
    assert!(changes.routes.contains(&name("web")));
    assert!(invalid(&fleet));
    assert_eq!(service_of(&compiled, &fleet, &Pinned("next"), &name("next")), None);
}

#[test]
fn namespaces_are_borders() {
    let route = r#"
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: far}
spec:
  parentRefs: [{group: "", kind: Service, name: web, namespace: shop}]
  rules: [{backendRefs: [{name: web, namespace: shop, port: 80}]}]
"#;
    let service =
        "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec: {ports: [{port: 80}]}\n";
    let compiled = compile(&source(&format!("{service}---{route}")));
    assert!(!compiled.has_errors(), "{:?}", compiled.diagnostics);
    assert_eq!(compiled.diagnostics.len(), 1);
    assert!(compiled.diagnostics[0].message.contains("of another namespace"));
    let routes = routes_of(&compiled, &Fleet::default(), &name("shop/web")).unwrap();
    assert_eq!(routes.http[0].consumer_namespace, "default");
    assert!(routes.http[0].rules[0].backends[0].invalid);

    // A workload names a service of its own namespace only.
    let mut foreign = workload(1, "shop/web", "web", &[(80, Protocol::Http)]);
    foreign.name = name("evil/web-1");
    let fleet = Fleet::new(&compiled, [foreign]);
    assert!(endpoints_of(&compiled, &fleet, &Pinned("web"), &name("shop/web")).unwrap().endpoints.is_empty());
}

#[test]
fn the_order_of_files_makes_no_difference() {
    let files = [
        ("b.yaml", SELECTED),
        ("a.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {ports: [{port: 1}]}"),
    ];
    let sources: Vec<Source> =
        files.iter().map(|(file, text)| Source { file: (*file).to_owned(), text: (*text).to_owned() }).collect();
    let reversed: Vec<Source> = sources.iter().rev().cloned().collect();
    let (one, other) = (compile(&sources), compile(&reversed));
    assert_eq!(one.diagnostics, other.diagnostics);
    assert_eq!(one.services, other.services);
    assert_eq!(
        one.diagnostics[0].to_string(),
        "b.yaml:4:11: error: metadata.name: a second Service default/web: the first is in a.yaml:3; remove or rename one"
    );
}

#[test]
fn a_written_workload_without_a_proxy_is_a_plain_endpoint() {
    let text = r#"
apiVersion: sheer.dev/v1alpha1
kind: Workload
metadata: {name: database}
spec:
  proxied: false
  service: database
  addresses: [192.0.2.10, "2001:db8::10"]
  ports: [{port: 5432, protocol: tcp}]
"#;
    let compiled = compile(&source(text));
    assert!(compiled.diagnostics.is_empty(), "{:?}", compiled.diagnostics);
    let everything = all(&compiled, &Fleet::default(), &Pinned("nobody"));
    assert_eq!(everything.services.len(), 1);
    let endpoints = &everything.endpoints[&name("database")];
    assert_eq!(endpoints.endpoints.len(), 2);
    assert!(endpoints.endpoints.iter().all(|it| it.hop() == Hop::None && it.port == 5432 && it.at_address));
}

#[test]
fn a_written_workload_decides_what_is_enforced() {
    let text = r#"
apiVersion: sheer.dev/v1alpha1
kind: Workload
metadata: {name: web-1}
spec:
  mode: strict
  plaintextExceptions: [{ports: [8080], cidrs: [10.0.0.0/8], reason: the old load balancer}]
"#;
    let compiled = compile(&source(text));
    assert!(compiled.diagnostics.is_empty(), "{:?}", compiled.diagnostics);
    let granted = workload_of(&compiled, &workload(1, "web", "web", &[(8080, Protocol::Http)]));
    assert_eq!(granted.mode(), Mode::Strict);
    assert_eq!(granted.exceptions[0].cidrs, ["10.0.0.0/8"]);
    assert_eq!(granted.services, ["default/web"]);
    let mut other = workload(2, "web", "web", &[(8080, Protocol::Http)]);
    assert_eq!(workload_of(&compiled, &other).mode(), Mode::Strict);
    other.mode = Mode::Permissive;
    assert_eq!(workload_of(&compiled, &other).mode(), Mode::Permissive);

    // It was started without a listener for the mesh.
    let mut watching = workload(1, "web", "web", &[(8080, Protocol::Http)]);
    watching.mode = Mode::Watch;
    assert_eq!(workload_of(&compiled, &watching).mode(), Mode::Watch);
    let warnings = warnings_for(&compiled, &Pinned("web"), &watching);
    assert!(warnings[0].ends_with("start it with --mode strict"), "{warnings:?}");
}

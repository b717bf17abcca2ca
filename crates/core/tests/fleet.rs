//! Workloads come and go: what is said to have changed is all that has, and nothing depends on the order.

mod support;

use proptest::prelude::*;
use sheer_core::compile::{All, Changes, Compiled, Fleet, Registered, RegisteredPort, Source, all, compile};
use sheer_core::identity::SpiffeId;
use sheer_core::name::{DnsLabel, ServiceName};
use sheer_core::wire::v1::{Health, Hop, Mode, Protocol};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

const CONFIGURATION: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: a}
spec: {selector: {app: a}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: b}
spec: {selector: {app: a, version: v2}, ports: [{port: 80, targetPort: web}]}
---
apiVersion: v1
kind: Service
metadata: {name: c}
spec: {ports: [{port: 80, targetPort: 9090}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: r}
spec:
  parentRefs: [{group: "", kind: Service, name: a}, {group: "", kind: Service, name: d}]
  rules: [{backendRefs: [{name: b, port: 80}, {name: d, port: 80}, {name: e, port: 9090}]}]
---
apiVersion: sheer.dev/v1alpha1
kind: Workload
metadata: {name: w1, labels: {version: v2}}
spec: {serviceAccount: a, ports: [{port: 8080, name: web}]}
---
apiVersion: sheer.dev/v1alpha1
kind: Workload
metadata: {name: plain}
spec: {proxied: false, service: e, addresses: [192.0.2.99], ports: [{port: 9090}]}
"#;

fn name(text: &str) -> ServiceName {
    ServiceName::parse(text).unwrap()
}

#[derive(Clone, Debug)]
enum Step {
    Upsert(Box<Registered>),
    Remove(String),
}

fn registered() -> impl Strategy<Value = Registered> {
    let service = prop::sample::select(vec![None, Some("a"), Some("b"), Some("c"), Some("d"), Some("e")]);
    let version = prop::sample::select(vec![None, Some("v1"), Some("v2")]);
    let account = prop::sample::select(vec!["a", "b", "d", "mallory"]);
    let port = prop::sample::select(vec![8080_u16, 9090, 80]);
    let protocol = prop::sample::select(vec![Protocol::Http, Protocol::Tcp]);
    (0..4_u8, service, version, account, port, protocol, any::<bool>()).prop_map(
        |(number, service, version, account, port, protocol, ready)| Registered {
            uid: format!("local/proxy/default/w{number}"),
            name: name(&format!("w{number}")),
            service: service.map(name),
            labels: version.map(|version| ("version".to_owned(), version.to_owned())).into_iter().collect(),
            identity: SpiffeId::new("mesh.internal", name("x").namespace, DnsLabel::parse(account).unwrap()).unwrap(),
            ports: vec![RegisteredPort {
                port,
                name: String::new(),
                protocol,
                mesh_port: 40_000,
                hop: Hop::Sheer1,
                ready,
                at_address: false,
            }],
            address: IpAddr::from([192, 0, 2, number]),
            network: "default".to_owned(),
            locality: String::new(),
            health: Health::Healthy,
            mode: Mode::Strict,
        },
    )
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let remove = (0..4_u8).prop_map(|number| Step::Remove(format!("local/proxy/default/w{number}")));
    prop::collection::vec(
        prop_oneof![3 => registered().prop_map(|workload| Step::Upsert(Box::new(workload))), 1 => remove],
        1..20,
    )
}

/// The names whose resources differ.
fn differing<T: PartialEq>(
    before: &BTreeMap<ServiceName, T>,
    after: &BTreeMap<ServiceName, T>,
) -> BTreeSet<ServiceName> {
    let names = before.keys().chain(after.keys());
    names.filter(|name| before.get(*name) != after.get(*name)).cloned().collect()
}

fn check_complete(before: &All, after: &All, changes: &Changes) -> Result<(), TestCaseError> {
    for (what, differ, told) in [
        ("services", differing(&before.services, &after.services), &changes.services),
        ("endpoints", differing(&before.endpoints, &after.endpoints), &changes.endpoints),
        ("routes", differing(&before.routes, &after.routes), &changes.routes),
    ] {
        prop_assert!(differ.is_subset(told), "{what}: {differ:?} differ, told were {told:?}");
    }
    Ok(())
}

fn compiled() -> Compiled {
    let compiled = compile(&[Source { file: "mesh.yaml".to_owned(), text: CONFIGURATION.to_owned() }]);
    assert!(!compiled.has_errors(), "{:?}", compiled.diagnostics);
    compiled
}

proptest! {
    #[test]
    fn every_change_is_told_and_order_makes_no_difference(steps in steps()) {
        let compiled = compiled();
        let records = support::ByHash(&compiled);
        let mut fleet = Fleet::default();
        let mut left: BTreeMap<String, Registered> = BTreeMap::new();
        let mut before = all(&compiled, &fleet, &records);
        for step in steps {
            let changes = match step {
                Step::Upsert(workload) => {
                    left.insert(workload.uid.clone(), (*workload).clone());
                    fleet.upsert(&compiled, *workload)
                }
                Step::Remove(uid) => {
                    left.remove(&uid);
                    fleet.remove(&compiled, &uid)
                }
            };
            let after = all(&compiled, &fleet, &records);
            check_complete(&before, &after, &changes)?;
            support::assemble(&after);
            prop_assert_eq!(&after, &all(&compiled, &Fleet::new(&compiled, left.clone().into_values()), &records));
            before = after;
        }
        let again = fleet.recompiled(&compiled);
        prop_assert_eq!(before, all(&compiled, &again, &records));
    }
}

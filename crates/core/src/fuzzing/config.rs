use crate::assemble;
use crate::compile::{
    Compiled, DEFAULT_DOMAIN, Fleet, Records, Registered, RegisteredPort, Source, VirtualRanges, all, compile,
};
use crate::identity::SpiffeId;
use crate::name::{DnsLabel, ServiceName};
use crate::wire::v1::{Health, Hop, Mode, Protocol};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// What people write: each finding has a place in the file and says something that can be shown; what has no error makes
/// messages that a proxy takes, all of them; and it makes no difference whether the documents are in one file or in
/// several, nor in which order workloads register.
///
/// # Panics
/// When that does not hold.
pub fn config(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let compiled = compile(&[source("mesh.yaml", &text)]);
    findings_have_places(&compiled, &text);
    if compiled.has_errors() {
        return;
    }
    let fleet = Fleet::new(&compiled, registered());
    let told = all(&compiled, &fleet, &Assigned);
    assemble::mesh(&told.mesh).expect("a mesh");
    for service in told.services.values() {
        assemble::service(service).expect("a service");
    }
    for endpoints in told.endpoints.values() {
        assemble::endpoints(endpoints, &told.mesh.cluster_domain).expect("endpoints");
    }
    for routes in told.routes.values() {
        assemble::routes(routes).expect("routes");
    }
    for workload in told.workloads.values() {
        assemble::workload(workload).expect("a workload");
    }

    let documents = compiled.objects.iter().rev().enumerate();
    let files: Vec<_> = documents.map(|(count, object)| source(&format!("{count}.yaml"), &object.text)).collect();
    let split = compile(&files);
    assert!(!split.has_errors(), "an error in a document by itself: {:?}", split.diagnostics);
    let mut later = Fleet::default();
    for workload in registered().into_iter().rev() {
        later.upsert(&split, workload);
    }
    assert_eq!(all(&split, &later, &Assigned), told, "documents of their own");
}

fn source(file: &str, text: &str) -> Source {
    Source { file: file.to_owned(), text: text.to_owned() }
}

fn findings_have_places(compiled: &Compiled, text: &str) {
    // YAML ends lines with carriage returns too.
    let lines = text.replace("\r\n", "\n").split(['\n', '\r']).count();
    let mut before = 0;
    for finding in &compiled.diagnostics {
        assert!(finding.line >= before, "findings out of order");
        before = finding.line;
        if finding.line > 0 {
            // Behind the last line is a place as well.
            assert!(finding.line as usize <= lines + 1, "{finding}: no such line");
            assert!(finding.column >= 1, "{finding}: no column");
        }
        let said = finding.to_string();
        assert!(!finding.message.is_empty() && said.chars().count() < 4_000, "{} characters", said.chars().count());
        assert!(!said.chars().any(char::is_control), "{}", said.escape_debug());
    }
}

/// A few workloads of names that configurations use.
fn registered() -> Vec<Registered> {
    ["default/web", "default/api", "shop/api"]
        .iter()
        .enumerate()
        .map(|(count, name)| workload(count as u8, name))
        .collect()
}

fn workload(number: u8, service: &str) -> Registered {
    let service = ServiceName::parse(service).expect("a name");
    let port = |port, protocol| RegisteredPort {
        port,
        name: String::new(),
        protocol,
        mesh_port: 40_000,
        hop: Hop::Sheer1,
        ready: true,
        at_address: number == 0,
    };
    Registered {
        uid: format!("local/host/{service}-{number}"),
        name: ServiceName { namespace: service.namespace.clone(), name: service.name.clone() },
        identity: SpiffeId::new(DEFAULT_DOMAIN, service.namespace.clone(), service.name.clone()).expect("an identity"),
        service: Some(service),
        labels: BTreeMap::from([("app".to_owned(), "web".to_owned())]),
        ports: vec![port(8080, Protocol::Detect), port(80, Protocol::Http)],
        address: IpAddr::from([192, 0, 2, number]),
        network: String::new(),
        locality: String::new(),
        health: Health::Healthy,
        mode: Mode::Unspecified,
    }
}

/// Addresses by hash, and each service's account of its own name.
struct Assigned;

impl Records for Assigned {
    fn virtual_ips(&self, service: &ServiceName) -> Vec<IpAddr> {
        VirtualRanges::of(DEFAULT_DOMAIN).assign(service, |_| false)
    }

    fn pins(&self, service: &ServiceName) -> Vec<DnsLabel> {
        vec![service.name.clone()]
    }
}

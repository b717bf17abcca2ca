//! What the tests of the compiler share.
#![allow(dead_code, reason = "each test uses its part")]

use sheer_core::compile::{All, Compiled, Fleet, Records, Registered, RegisteredPort, all};
use sheer_core::identity::SpiffeId;
use sheer_core::name::{DnsLabel, ServiceName};
use sheer_core::wire::v1::{Health, Hop, Mode, Protocol};
use sheer_core::{assemble, compile};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// The .yaml files of a directory, by name.
pub(crate) fn yaml_files(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    files.sort();
    files
}

/// Addresses by hash; pinned is the account named like the service's first part: `web` for `web-v2`.
pub(crate) struct ByHash<'a>(pub(crate) &'a Compiled);

impl Records for ByHash<'_> {
    fn virtual_ips(&self, service: &ServiceName) -> Vec<IpAddr> {
        self.0.mesh.virtual_ranges.assign(service, |_| false)
    }
    fn pins(&self, service: &ServiceName) -> Vec<DnsLabel> {
        let account = service.name.as_str().split('-').next().unwrap_or_default();
        vec![DnsLabel::parse(account).unwrap()]
    }
}

/// Everything made of a compiled set and a small fleet: two versions of `web`, one `api`.
pub(crate) fn lower(compiled: &Compiled) -> All {
    let fleet = Fleet::new(
        compiled,
        [workload(compiled, "web", 1, "v1"), workload(compiled, "web", 2, "v2"), workload(compiled, "api", 3, "v1")],
    );
    all(compiled, &fleet, &ByHash(compiled))
}

fn workload(compiled: &Compiled, service: &str, number: u8, version: &str) -> Registered {
    let service = ServiceName::parse(service).unwrap();
    let name = DnsLabel::parse(&format!("{}-{number}", service.name)).unwrap();
    Registered {
        uid: format!("local/proxy/default/{name}"),
        name: ServiceName { namespace: service.namespace.clone(), name },
        identity: SpiffeId::new(&compiled.mesh.trust_domain, service.namespace.clone(), service.name.clone()).unwrap(),
        service: Some(service),
        labels: [("version".to_owned(), version.to_owned())].into(),
        ports: vec![RegisteredPort {
            port: 8080,
            name: "web".to_owned(),
            protocol: Protocol::Http,
            mesh_port: 40_000 + u16::from(number),
            hop: Hop::Sheer1,
            ready: true,
            at_address: false,
        }],
        address: IpAddr::from([192, 0, 2, number]),
        network: String::new(),
        locality: String::new(),
        health: Health::Healthy,
        mode: Mode::Strict,
    }
}

/// A proxy takes everything the compiler makes.
pub(crate) fn assemble(all: &compile::All) {
    assemble::mesh(&all.mesh).unwrap();
    for service in all.services.values() {
        assemble::service(service).unwrap();
    }
    for endpoints in all.endpoints.values() {
        assemble::endpoints(endpoints, &all.mesh.cluster_domain).unwrap();
    }
    for routes in all.routes.values() {
        assemble::routes(routes).unwrap();
    }
    for workload in all.workloads.values() {
        assemble::workload(workload).unwrap();
    }
}

//! `Workload`: a process or host outside Kubernetes, and what it may be in the mesh.

use super::decode::{Cursor, Object, clip};
use super::meta::Meta;
use crate::name::DnsLabel;
use crate::wire::v1::{Mode, Protocol};
use ipnet::IpNet;
use std::net::IpAddr;

/// A written workload. Where a proxy stands beside it, this is what the proxy's registration may claim and what it
/// enforces; with `proxied: false` its addresses are endpoints as they stand, in plaintext.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Name, labels (which services' selectors match) and place.
    pub meta: Meta,
    /// Where peers dial it.
    pub addresses: Vec<IpAddr>,
    /// The network that the addresses belong to.
    pub network: String,
    /// Its ports.
    pub ports: Vec<WorkloadPort>,
    /// Its service account; the workload's name by default.
    pub service_account: DnsLabel,
    /// The service of its namespace that it names; services with a selector choose by label instead.
    pub service: Option<DnsLabel>,
    /// `region/zone`; empty when unknown.
    pub locality: String,
    /// What its proxy enforces; `None`: what the registration or the mesh says.
    pub mode: Option<Mode>,
    /// Plaintext that a strict workload admits.
    pub exceptions: Vec<PlaintextException>,
    /// Whether a proxy stands beside it.
    pub proxied: bool,
}

/// One port of a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadPort {
    /// The port.
    pub port: u16,
    /// Its name; may be empty.
    pub name: String,
    /// The application protocol.
    pub protocol: Protocol,
}

/// Plaintext that is admitted, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlaintextException {
    /// To these ports; empty: to all.
    pub ports: Vec<u16>,
    /// From these addresses.
    pub cidrs: Vec<IpNet>,
    /// For whoever reads `sheer check`.
    pub reason: String,
}

/// The network of addresses for which none is written.
pub const DEFAULT_NETWORK: &str = "default";
const MAX_PORTS: usize = 100;
const MAX_ADDRESSES: usize = 16;
const MAX_EXCEPTIONS: usize = 64;

pub(super) fn decode(at: &Cursor<'_>, meta: Meta) -> Option<Workload> {
    at.object(|fields| {
        let proxied = fields.optional("proxied").and_then(|it| it.boolean()).unwrap_or(true);
        let addresses = fields.optional("addresses").map(|it| addresses(&it)).unwrap_or_default();
        if !proxied && addresses.is_empty() {
            fields.at.error_help("a workload without a proxy needs an address", "write addresses: [192.0.2.7]");
        }
        let ports = fields.optional("ports").map(|it| ports(&it)).unwrap_or_default();
        if !proxied && ports.is_empty() {
            fields.at.error_help("a workload without a proxy needs a port", "write ports: [{port: 8080}]");
        }
        let service_account = fields.optional("serviceAccount").and_then(|it| it.label());
        let mode = fields.optional("mode").and_then(|it| it.mode().map(|mode| (it, mode)));
        if let (false, Some((at, _))) = (proxied, &mode) {
            at.error_help("nothing enforces a mode without a proxy", "remove it");
        }
        let exceptions = fields.optional("plaintextExceptions");
        if let (false, Some(at)) = (proxied, &exceptions) {
            at.error_help("a workload without a proxy takes plaintext anyway", "remove it");
        }
        // `sheer run --health` says it; nothing checks it for others.
        fields.not_yet(&["health"]);
        Some(Workload {
            service_account: service_account.unwrap_or_else(|| meta.name.name.clone()),
            meta,
            addresses,
            network: network(fields),
            ports,
            service: fields.optional("service").and_then(|it| it.label()),
            locality: fields.optional("locality").and_then(|it| it.locality()).unwrap_or_default(),
            mode: mode.map(|(_, mode)| mode),
            exceptions: exceptions.map(|it| plaintext_exceptions(&it)).unwrap_or_default(),
            proxied,
        })
    })
}

fn network(fields: &mut Object<'_>) -> String {
    fields.optional("network").and_then(|it| it.label()).map_or_else(|| DEFAULT_NETWORK.to_owned(), |it| it.to_string())
}

fn addresses(at: &Cursor<'_>) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    for item in at.items(MAX_ADDRESSES) {
        match item.address() {
            Some(address) if addresses.contains(&address) => item.error(format!("{address} stands twice")),
            Some(address) => addresses.push(address),
            None => {}
        }
    }
    addresses
}

fn ports(at: &Cursor<'_>) -> Vec<WorkloadPort> {
    let mut ports: Vec<WorkloadPort> = Vec::new();
    for item in at.items(MAX_PORTS) {
        let port = item.object(|fields| {
            let port = fields.required("port").and_then(|it| it.port());
            let name = fields.optional("name").and_then(|it| it.label());
            let protocol = fields.optional("protocol").and_then(|it| it.protocol()).unwrap_or(Protocol::Detect);
            Some(WorkloadPort { port: port?, name: name.map(|it| it.to_string()).unwrap_or_default(), protocol })
        });
        match port {
            Some(port) if ports.iter().any(|other| other.port == port.port) => {
                item.error(format!("port {} is declared twice", port.port));
            }
            Some(port) if !port.name.is_empty() && ports.iter().any(|other| other.name == port.name) => {
                item.error(format!("two ports have the name '{}'", port.name));
            }
            Some(port) => ports.push(port),
            None => {}
        }
    }
    ports
}

fn plaintext_exceptions(at: &Cursor<'_>) -> Vec<PlaintextException> {
    let exception = |item: Cursor<'_>| {
        item.object(|fields| {
            let ports = fields.optional("ports").map(|it| it.items(MAX_PORTS)).unwrap_or_default();
            let ports = ports.iter().filter_map(|it| it.port()).collect();
            let cidrs = fields.required("cidrs").map(|at| {
                let items = at.items(MAX_EXCEPTIONS);
                if at.is_empty_list() {
                    at.error_help("names no address", "name the peers, like 10.1.0.0/16");
                }
                items.iter().filter_map(|it| it.cidr()).collect()
            });
            let reason = fields.required("reason").and_then(|it| reason(&it));
            Some(PlaintextException { ports, cidrs: cidrs?, reason: reason? })
        })
    };
    at.items(MAX_EXCEPTIONS).into_iter().filter_map(exception).collect()
}

/// A line for people.
fn reason(at: &Cursor<'_>) -> Option<String> {
    let text = at.text()?;
    if text.trim().is_empty() || text.len() > 200 || text.chars().any(char::is_control) {
        at.error_help(format!("'{}' is no reason", clip(text)), "write one line of at most 200 characters");
        return None;
    }
    Some(text.to_owned())
}

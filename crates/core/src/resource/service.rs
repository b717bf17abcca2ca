//! `Service`: a name, its ports, and which workloads answer for it.

use super::decode::{Cursor, Object, clip};
use super::meta::{self, Located, Meta};
use super::value::PROTOCOLS;
use crate::name::DnsLabel;
use crate::wire::v1::Protocol;
use std::collections::BTreeMap;

/// A written service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Name, labels and place.
    pub meta: Meta,
    /// Its ports, at least one.
    pub ports: Vec<ServicePort>,
    /// Labels of the workloads that answer for it; empty: those that name it.
    pub selector: BTreeMap<String, String>,
    /// Host names beside its own (annotation `sheer.dev/hosts`).
    pub hosts: Vec<Located<String>>,
    /// Service accounts of its namespace that may answer as it (annotation `sheer.dev/service-accounts`); empty: the
    /// pinned ones.
    pub accounts: Vec<DnsLabel>,
}

/// One port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// The port that callers use.
    pub port: u16,
    /// Its name; empty when it is the only port.
    pub name: String,
    /// The port of the workload that it leads to.
    pub target: Target,
    /// The application protocol.
    pub protocol: Protocol,
}

/// A port of a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// By number.
    Number(u16),
    /// By name.
    Name(String),
}

/// Most ports of a service.
const MAX_PORTS: usize = 100;
/// Most extra host names of a service.
const MAX_HOSTS: usize = 64;

pub(super) fn decode(at: &Cursor<'_>, meta: Meta) -> Option<Service> {
    let (hosts, accounts) = annotations(at, &meta);
    at.object(|fields| {
        let ports = fields.required("ports").map(|it| ports(&it)).unwrap_or_default();
        let selector = fields.optional("selector").map(|it| meta::labels(&it)).unwrap_or_default();
        only_default(fields, "type", "ClusterIP");
        only_default(fields, "sessionAffinity", "None");
        only_default(fields, "internalTrafficPolicy", "Cluster");
        fields.not_yet(&[
            "allocateLoadBalancerNodePorts",
            "clusterIP",
            "clusterIPs",
            "externalIPs",
            "externalName",
            "externalTrafficPolicy",
            "healthCheckNodePort",
            "ipFamilies",
            "ipFamilyPolicy",
            "loadBalancerClass",
            "loadBalancerIP",
            "loadBalancerSourceRanges",
            "publishNotReadyAddresses",
            "sessionAffinityConfig",
            "trafficDistribution",
        ]);
        Some(Service { meta, ports, selector, hosts, accounts })
    })
}

/// A field of which only the default value is carried.
fn only_default(fields: &mut Object<'_>, name: &'static str, default: &str) {
    let Some(at) = fields.optional(name) else { return };
    match at.text() {
        Some(text) if text != default => {
            at.error_help(format!("'{}' is not supported yet", clip(text)), format!("write {default} or remove it"));
        }
        _ => {}
    }
}

fn ports(at: &Cursor<'_>) -> Vec<ServicePort> {
    let items = at.items(MAX_PORTS);
    let several = items.len() > 1;
    let mut ports: Vec<ServicePort> = Vec::new();
    for item in &items {
        let Some(port) = item.object(|fields| port(fields, several)) else { continue };
        if ports.iter().any(|other| other.port == port.port) {
            item.error(format!("port {} is declared twice", port.port));
        } else if !port.name.is_empty() && ports.iter().any(|other| other.name == port.name) {
            item.error(format!("two ports have the name '{}'", port.name));
        } else {
            ports.push(port);
        }
    }
    if at.is_empty_list() {
        at.error("a service needs at least one port");
    }
    ports
}

fn port(fields: &mut Object<'_>, several: bool) -> Option<ServicePort> {
    let port = fields.required("port").and_then(|it| it.port());
    let name = match several {
        true => fields.required("name"),
        false => fields.optional("name"),
    };
    let name = name.and_then(|it| it.label()).map(|it| it.to_string()).unwrap_or_default();
    let target = fields.optional("targetPort").and_then(|it| target(&it));
    if let Some(at) = fields.optional("protocol") {
        match at.text() {
            Some("TCP") | None => {}
            Some("UDP" | "SCTP") => at.error_help("the mesh carries TCP only", "leave this port out of the mesh"),
            Some(other) => at.error_help(
                format!("unknown value '{}'", clip(other)),
                "write TCP; the application's protocol belongs into appProtocol",
            ),
        }
    }
    let protocol = fields.optional("appProtocol").map(|it| app_protocol(&it)).unwrap_or(Protocol::Detect);
    fields.not_yet(&["nodePort"]);
    let port = port?;
    Some(ServicePort { port, name, target: target.unwrap_or(Target::Number(port)), protocol })
}

fn target(at: &Cursor<'_>) -> Option<Target> {
    use super::yaml::Value;
    match &at.node.value {
        Value::Scalar { plain: true, text } if text.bytes().all(|b| b.is_ascii_digit() || b == b'-') => {
            at.port().map(Target::Number)
        }
        _ => at.label().map(|name| Target::Name(name.to_string())),
    }
}

/// Kubernetes' own protocol names and the registered ones of common servers, beside ours. Others are allowed by the API
/// and carried as undeclared.
fn app_protocol(at: &Cursor<'_>) -> Protocol {
    let Some(text) = at.text() else { return Protocol::Detect };
    if let Some((_, protocol)) = PROTOCOLS.iter().find(|(name, _)| *name == text) {
        return *protocol;
    }
    match text {
        "kubernetes.io/h2c" => Protocol::Http2,
        "kubernetes.io/ws" => Protocol::Http,
        "kubernetes.io/wss" | "https" => Protocol::Tls,
        "redis" | "mysql" | "postgresql" | "mongodb" | "amqp" | "kafka" | "memcached" => Protocol::Tcp,
        other => {
            let help = match super::decode::nearest(other, PROTOCOLS.iter().map(|(name, _)| *name)) {
                Some(name) => format!("did you mean '{name}'?"),
                None => "known are http, http2, grpc, tcp and tls".to_owned(),
            };
            at.warn(format!("unknown protocol '{}': the first bytes decide", clip(other)), help);
            Protocol::Detect
        }
    }
}

fn annotations(at: &Cursor<'_>, meta: &Meta) -> (Vec<Located<String>>, Vec<DnsLabel>) {
    let mut hosts: Vec<Located<String>> = Vec::new();
    if let Some(written) = meta.annotations.get("sheer.dev/hosts") {
        let at = at.elsewhere(written);
        for name in words(&written.value) {
            let Some(name) = at.check_host_name(name, false) else { continue };
            if hosts.iter().any(|host| host.value == name) {
                at.error(format!("'{name}' stands twice"));
            } else if hosts.len() == MAX_HOSTS {
                at.error(format!("more than {MAX_HOSTS} host names"));
                break;
            } else {
                hosts.push(Located { value: name, ..written.clone() });
            }
        }
    }
    let mut accounts = Vec::new();
    if let Some(written) = meta.annotations.get("sheer.dev/service-accounts") {
        let at = at.elsewhere(written);
        for name in words(&written.value) {
            match DnsLabel::parse(name) {
                Ok(label) => accounts.push(label),
                Err(_) => at.error(format!("'{}' is no service account", clip(name))),
            }
        }
        if accounts.is_empty() {
            at.error_help("names no service account", "name one, or remove the annotation");
        }
        accounts.sort();
        accounts.dedup();
    }
    (hosts, accounts)
}

/// The words of a comma-separated list.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|word| !word.is_empty())
}

//! Wire resources to what a proxy decides with. Used by the proxy, by previews and by tests.
//!
//! The control plane has checked what people wrote; here every message is checked again, since it comes over a network
//! and may be of another version. What cannot be taken is refused alone, with its place; nothing is guessed.

use crate::identity::SpiffeId;
use crate::name::{DnsLabel, ServiceName};
use crate::route::{self, Attached, Backend, Edit, Match, PathMatch, Rule, Rules, ValueMatch};
use crate::snapshot::{
    Endpoint, EndpointSet, Health, Hop, Mesh, Mode, PlaintextException, Protocol, Service, ServicePort, Timeouts,
    Workload,
};
use crate::wire::{FEATURES, Resource, v1};
use http::Method;
use ipnet::IpNet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

/// Why a resource was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {reason}")]
pub struct Refusal {
    /// The field, as `rules[0].backends[1].port`.
    pub place: String,
    /// What is wrong with it.
    pub reason: String,
}

type Result<T> = std::result::Result<T, Refusal>;

fn refuse<T>(place: impl Into<String>, reason: impl std::fmt::Display) -> Result<T> {
    Err(Refusal { place: place.into(), reason: reason.to_string() })
}

trait At<T> {
    fn at(self, place: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: std::fmt::Display> At<T> for std::result::Result<T, E> {
    fn at(self, place: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Refusal { place: place(), reason: error.to_string() })
    }
}

/// Checks that every feature a resource needs is known here.
///
/// # Errors
/// Names the first that is not.
pub fn requirements<R: Resource>(resource: &R) -> Result<()> {
    match resource.requires().iter().find(|feature| !FEATURES.contains(&feature.as_str())) {
        Some(feature) => refuse("requires", format!("this proxy does not know the feature '{feature}'")),
        None => Ok(()),
    }
}

/// A service of the index.
///
/// # Errors
/// The first field that cannot be taken.
pub fn service(from: &v1::Service) -> Result<Service> {
    requirements(from)?;
    let name = service_name(&from.namespace, &from.name, || "name".into())?;
    let hosts: Vec<Arc<str>> = from.hosts.iter().map(|host| host.to_ascii_lowercase().into()).collect();
    let addresses = indexed(&from.virtual_ips, "virtual_ips", |bytes| address(bytes))?;
    let ports =
        indexed(&from.ports, "ports", |it| Ok(ServicePort { port: port(it.port)?, protocol: protocol(it.protocol)? }))?;
    Ok(Service { name, hosts, addresses, ports })
}

/// The endpoints of a service.
///
/// # Errors
/// The first field that cannot be taken.
pub fn endpoints(from: &v1::Endpoints, cluster_domain: &str) -> Result<EndpointSet> {
    requirements(from)?;
    let name = service_name(&from.namespace, &from.name, || "name".into())?;
    let identities = indexed(&from.identities, "identities", |text| SpiffeId::parse(text).at(String::new))?;
    let list = indexed(&from.endpoints, "endpoints", |it| {
        let workload_port = port(it.workload_port)?;
        Ok(Arc::new(Endpoint {
            workload: it.workload.as_str().into(),
            service_port: port(it.service_port)?,
            address: SocketAddr::new(address(&it.address)?, port(it.port)?),
            workload_port,
            server_name: name.server_name(workload_port, cluster_domain).into(),
            hop: match it.hop() {
                v1::Hop::None if it.hop == 0 => Hop::None,
                v1::Hop::Sheer1 => Hop::Sheer1,
                v1::Hop::None => return refuse("hop", "an unknown way to dial"),
            },
            health: match v1::Health::try_from(it.health) {
                Ok(v1::Health::Healthy) => Health::Healthy,
                Ok(v1::Health::Draining) => Health::Draining,
                // A state this version does not know is no reason to lose the endpoint.
                Ok(v1::Health::Suspect) | Err(_) => Health::Suspect,
            },
            weight: it.weight.max(1),
            at_address: it.at_address,
        }))
    })?;
    Ok(EndpointSet::new(identities, list))
}

/// The routes attached to a service.
///
/// # Errors
/// The first field that cannot be taken; then all routes of this service are refused together.
pub fn routes(from: &v1::Routes) -> Result<Rules> {
    requirements(from)?;
    let mut attached = Vec::new();
    for (r, http) in from.http.iter().enumerate() {
        let route: Arc<str> = format!("{}/{}", http.namespace, http.name).into();
        let consumer = match http.consumer_namespace.as_str() {
            "" => None,
            text => Some(DnsLabel::parse(text).at(|| format!("http[{r}].consumer_namespace"))?),
        };
        for (index, rule) in http.rules.iter().enumerate() {
            let place =
                |inner: Refusal| Refusal { place: format!("http[{r}].rules[{index}].{}", inner.place), ..inner };
            attached.push(Attached {
                port: if http.port == 0 { 0 } else { port(http.port).map_err(place)? },
                consumer: consumer.clone(),
                hostnames: http.hostnames.iter().map(|host| host.to_ascii_lowercase()).collect(),
                created: http.created.clone(),
                matches: indexed(&rule.matches, "matches", http_match).map_err(place)?,
                rule: Arc::new(http_rule(route.clone(), index, rule).map_err(place)?),
            });
        }
    }
    Ok(Rules::new(attached))
}

/// The proxy's own workload.
///
/// # Errors
/// The first field that cannot be taken.
pub fn workload(from: &v1::Workload) -> Result<Workload> {
    requirements(from)?;
    Ok(Workload {
        uid: from.uid.as_str().into(),
        identity: SpiffeId::parse(&from.identity).at(|| "identity".into())?,
        services: indexed(&from.services, "services", |text| ServiceName::parse(text).at(String::new))?,
        ports: indexed(&from.ports, "ports", |it| {
            Ok(ServicePort { port: port(it.port)?, protocol: protocol(it.protocol)? })
        })?,
        mode: match v1::Mode::try_from(from.mode) {
            Ok(v1::Mode::Watch) => Mode::Watch,
            Ok(v1::Mode::Permissive) => Mode::Permissive,
            Ok(v1::Mode::Strict) => Mode::Strict,
            Ok(v1::Mode::Unspecified) | Err(_) => return refuse("mode", "not one of watch, permissive, strict"),
        },
        exceptions: indexed(&from.exceptions, "exceptions", |it| {
            Ok(PlaintextException {
                ports: indexed(&it.ports, "ports", |number| port(*number))?,
                cidrs: indexed(&it.cidrs, "cidrs", |text| text.parse::<IpNet>().at(String::new))?,
                reason: it.reason.clone(),
            })
        })?,
    })
}

/// What holds for the whole mesh.
///
/// # Errors
/// The first field that cannot be taken.
pub fn mesh(from: &v1::Mesh) -> Result<Mesh> {
    requirements(from)?;
    crate::identity::check_trust_domain(&from.trust_domain).at(|| "trust_domain".into())?;
    Ok(Mesh {
        trust_domain: from.trust_domain.clone(),
        cluster_domain: from.cluster_domain.clone(),
        virtual_ranges: indexed(&from.virtual_ranges, "virtual_ranges", |text| text.parse().at(String::new))?,
        deny_unknown_egress: from.deny_unknown_egress,
    })
}

fn http_rule(route: Arc<str>, index: usize, from: &v1::HttpRule) -> Result<Rule> {
    Ok(Rule {
        route,
        index,
        backends: indexed(&from.backends, "backends", |it| {
            Ok(Backend {
                service: service_name(&it.namespace, &it.name, || "name".into())?,
                // One that does not exist may have no port either.
                port: if it.invalid { 0 } else { port(it.port)? },
                weight: it.weight,
                valid: !it.invalid,
            })
        })?,
        timeouts: Timeouts { request: millis(from.request_timeout_ms), backend: millis(from.backend_timeout_ms) },
        request_edits: indexed(&from.request_headers, "request_headers", edit)?,
        response_edits: indexed(&from.response_headers, "response_headers", edit)?,
    })
}

fn http_match(from: &v1::HttpMatch) -> Result<Match> {
    use v1::http_match::Path;
    let path = match &from.path {
        // Also what a kind of match looks like that this version does not know: it must not match everything.
        None => return refuse("path", "an unknown kind of match"),
        Some(Path::Exact(text)) => PathMatch::Exact(text.clone()),
        Some(Path::Prefix(text)) => PathMatch::prefix(text),
        Some(Path::Regex(text)) => PathMatch::Regex(route::whole_regex(text).at(|| "path".into())?),
    };
    let method = match from.method.as_str() {
        "" => None,
        text => Some(Method::from_bytes(text.as_bytes()).at(|| "method".into())?),
    };
    Ok(Match {
        path,
        method,
        headers: indexed(&from.headers, "headers", value_match)?,
        query: indexed(&from.query, "query", value_match)?,
    })
}

fn value_match(from: &v1::ValueMatch) -> Result<(String, ValueMatch)> {
    use v1::value_match::Value;
    let value = match &from.value {
        Some(Value::Exact(text)) => ValueMatch::Exact(text.clone()),
        Some(Value::Regex(text)) => ValueMatch::Regex(route::whole_regex(text).at(|| "value".into())?),
        None => return refuse("value", "an unknown kind of match"),
    };
    Ok((from.name.clone(), value))
}

fn edit(from: &v1::HeaderEdit) -> Result<Edit> {
    use v1::header_edit::Action;
    let name = http::HeaderName::from_bytes(from.name.as_bytes()).at(|| "name".into())?.as_str().to_owned();
    http::HeaderValue::from_str(&from.value).at(|| "value".into())?;
    match Action::try_from(from.action) {
        Ok(Action::Set) => Ok(Edit::Set(name, from.value.clone())),
        Ok(Action::Add) => Ok(Edit::Add(name, from.value.clone())),
        Ok(Action::Remove) => Ok(Edit::Remove(name)),
        Ok(Action::Unspecified) | Err(_) => refuse("action", "not one of set, add, remove"),
    }
}

fn indexed<T, U>(from: &[T], field: &str, each: impl Fn(&T) -> Result<U>) -> Result<Vec<U>> {
    let item = |(index, it): (usize, &T)| {
        each(it).map_err(|inner| {
            let dot = if inner.place.is_empty() { "" } else { "." };
            Refusal { place: format!("{field}[{index}]{dot}{}", inner.place), ..inner }
        })
    };
    from.iter().enumerate().map(item).collect()
}

fn service_name(namespace: &str, name: &str, place: impl Fn() -> String) -> Result<ServiceName> {
    Ok(ServiceName { namespace: DnsLabel::parse(namespace).at(&place)?, name: DnsLabel::parse(name).at(&place)? })
}

fn port(number: u32) -> Result<u16> {
    match u16::try_from(number) {
        Ok(number) if number != 0 => Ok(number),
        _ => refuse("port", format!("{number} is no port: 1 to 65535")),
    }
}

fn protocol(number: i32) -> Result<Protocol> {
    match v1::Protocol::try_from(number) {
        Ok(v1::Protocol::Detect) => Ok(Protocol::Detect),
        Ok(v1::Protocol::Http) => Ok(Protocol::Http),
        Ok(v1::Protocol::Http2) => Ok(Protocol::Http2),
        Ok(v1::Protocol::Grpc) => Ok(Protocol::Grpc),
        Ok(v1::Protocol::Tcp) => Ok(Protocol::Tcp),
        Ok(v1::Protocol::Tls) => Ok(Protocol::Tls),
        Err(_) => refuse("protocol", format!("{number} is no protocol that this proxy knows")),
    }
}

fn address(bytes: &[u8]) -> Result<IpAddr> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Ok(IpAddr::from(four));
    }
    match <[u8; 16]>::try_from(bytes) {
        Ok(sixteen) => Ok(IpAddr::from(sixteen)),
        Err(_) => refuse("address", format!("{} bytes instead of 4 or 16", bytes.len())),
    }
}

fn millis(number: u64) -> Option<Duration> {
    (number != 0).then(|| Duration::from_millis(number))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use prost::Message;

    fn sample() -> v1::Endpoints {
        v1::Endpoints {
            namespace: "shop".into(),
            name: "api".into(),
            endpoints: vec![v1::Endpoint {
                workload: "u1".into(),
                service_port: 80,
                address: vec![10, 0, 0, 1].into(),
                port: 4000,
                workload_port: 8080,
                hop: v1::Hop::Sheer1.into(),
                ..Default::default()
            }],
            identities: vec!["spiffe://td/ns/shop/sa/api".into()],
            requires: vec![],
        }
    }

    #[test]
    fn endpoints_carry_their_server_name() {
        let set = endpoints(&sample(), "mesh.internal").unwrap();
        let endpoint = &set.of_port(80)[0];
        assert_eq!(&*endpoint.server_name, "p8080.api.shop.svc.mesh.internal");
        assert_eq!(endpoint.address, "10.0.0.1:4000".parse().unwrap());
        assert_eq!((endpoint.weight, endpoint.health), (1, Health::Healthy));
        assert!(set.of_port(81).is_empty());
    }

    #[test]
    fn a_refusal_names_its_place() {
        let mut from = sample();
        from.endpoints[0].address = vec![1, 2].into();
        assert_eq!(endpoints(&from, "d").unwrap_err().to_string(), "endpoints[0].address: 2 bytes instead of 4 or 16");
        let mut from = sample();
        from.endpoints[0].hop = 9;
        assert_eq!(endpoints(&from, "d").unwrap_err().place, "endpoints[0].hop");
        let mut from = sample();
        from.requires = vec!["teleport".into()];
        assert!(endpoints(&from, "d").unwrap_err().reason.contains("teleport"));
    }

    #[test]
    fn a_match_of_an_unknown_kind_is_refused() {
        let from = v1::Routes {
            namespace: "shop".into(),
            name: "api".into(),
            http: vec![v1::HttpRoute {
                rules: vec![v1::HttpRule {
                    matches: vec![v1::HttpMatch {
                        path: Some(v1::http_match::Path::Prefix("/".into())),
                        headers: vec![v1::ValueMatch { name: "x".into(), value: None }],
                        ..Default::default()
                    }],
                    ..Default::default()
                }],
                ..Default::default()
            }],
            requires: vec![],
        };
        assert_eq!(routes(&from).unwrap_err().place, "http[0].rules[0].matches[0].headers[0].value");
    }

    proptest! {
        #[test]
        fn no_bytes_from_the_network_panic(bytes: Vec<u8>) {
            if let Ok(it) = v1::Endpoints::decode(&*bytes) { let _ = endpoints(&it, "d"); }
            if let Ok(it) = v1::Routes::decode(&*bytes) { let _ = routes(&it); }
            if let Ok(it) = v1::Service::decode(&*bytes) { let _ = service(&it); }
            if let Ok(it) = v1::Workload::decode(&*bytes) { let _ = workload(&it); }
            if let Ok(it) = v1::Mesh::decode(&*bytes) { let _ = mesh(&it); }
        }
    }
}

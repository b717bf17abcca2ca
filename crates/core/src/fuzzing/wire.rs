use crate::assemble::{self, Refusal};
use crate::head::{RequestHead, Version};
use crate::name::DnsLabel;
use crate::route::{Rules, Verdict, whole_regex};
use crate::wire::v1::http_match::Path;
use crate::wire::v1::value_match::Value;
use crate::wire::{Resource, pack, v1, version_of};
use http::Method;
use std::fmt::Debug;

/// A resource as it comes from a control plane: encoding is canonical, what is refused is refused with a reason, what is
/// taken has nothing in it that was not checked, and a request follows the rule that the plainest reading of the routes
/// picks.
///
/// # Panics
/// When that does not hold.
pub fn wire(input: &[u8]) {
    let [kind, bytes @ ..] = input else { return };
    match kind % 7 {
        0 => drop(read::<v1::Mesh, _>(bytes, assemble::mesh)),
        1 => drop(read::<v1::TrustBundle, _>(bytes, assemble::requirements)),
        2 => {
            let Some((_, workload)) = read::<v1::Workload, _>(bytes, assemble::workload) else { return };
            assert!(workload.ports.iter().all(|it| it.port != 0));
            assert_eq!(workload.identity.to_string().parse_again(), workload.identity);
        }
        3 => {
            let Some((told, service)) = read::<v1::Service, _>(bytes, assemble::service) else { return };
            assert_eq!(service.name.to_string(), told.resource_name());
            assert!(service.ports.iter().all(|it| it.port != 0));
            assert_eq!((service.ports.len(), service.addresses.len()), (told.ports.len(), told.virtual_ips.len()));
            assert!(service.hosts.iter().all(|host| !host.bytes().any(|byte| byte.is_ascii_uppercase())));
        }
        4 => {
            let Some((told, set)) = read::<v1::Endpoints, _>(bytes, |it| assemble::endpoints(it, "mesh.internal"))
            else {
                return;
            };
            assert_eq!(set.iter().count(), told.endpoints.len());
            for endpoint in set.iter() {
                assert!(endpoint.weight > 0 && endpoint.address.port() > 0 && endpoint.service_port > 0);
                assert!(set.of_port(endpoint.service_port).contains(endpoint));
                assert!(endpoint.server_name.starts_with(&format!("p{}.", endpoint.workload_port)));
            }
            assert!(set.identities.iter().all(|it| told.identities.contains(&it.to_string())));
        }
        5 => {
            let Some((told, rules)) = read::<v1::Routes, _>(bytes, assemble::routes) else { return };
            follows(&told, &rules);
        }
        _ => drop(read::<v1::Address, _>(bytes, assemble::requirements)),
    }
}

trait ParseAgain<T> {
    fn parse_again(&self) -> T;
}

impl ParseAgain<crate::identity::SpiffeId> for String {
    fn parse_again(&self) -> crate::identity::SpiffeId {
        crate::identity::SpiffeId::parse(self).expect("what was printed parses")
    }
}

fn read<R: Resource + PartialEq + Debug, T: Debug>(
    bytes: &[u8],
    assemble: impl Fn(&R) -> Result<T, Refusal>,
) -> Option<(R, T)> {
    let told = R::decode(bytes).ok()?;
    let encoded = told.encode_to_vec();
    let again = R::decode(encoded.as_slice()).expect("what was encoded");
    assert_eq!((&again, again.encode_to_vec()), (&told, encoded.clone()), "an encoding that changes");
    let packed = pack(&told);
    assert_eq!((packed.name, packed.version), (told.resource_name(), version_of(&encoded)));
    match (assemble(&told), assemble(&again)) {
        (Ok(taken), Ok(same)) => {
            assert_eq!(format!("{taken:?}"), format!("{same:?}"));
            Some((told, taken))
        }
        (Err(refusal), Err(same)) => {
            assert!(refusal == same && !refusal.reason.is_empty() && !refusal.place.is_empty(), "{refusal:?}");
            None
        }
        (one, other) => panic!("{one:?}, and then {other:?}"),
    }
}

/// Requests by the paths, names and values that the routes themselves have.
fn follows(told: &v1::Routes, rules: &Rules) {
    let all = || told.http.iter().flat_map(|http| http.rules.iter()).flat_map(|rule| rule.matches.iter()).take(20);
    let mut targets = vec!["/".to_owned(), "/x/y?a=b&a=c".to_owned()];
    for it in all() {
        if let Some(Path::Exact(path) | Path::Prefix(path) | Path::Regex(path)) = &it.path {
            targets.extend([path.clone(), format!("{path}/"), format!("{path}x"), format!("{path}/x")]);
        }
        for query in &it.query {
            let value = match &query.value {
                Some(Value::Exact(value) | Value::Regex(value)) => value.as_str(),
                None => "",
            };
            targets.push(format!("/?{}={value}&{}=%zz", query.name, query.name));
            targets.push(format!("/?{}=%zz&{}={value}", query.name, query.name));
        }
    }
    targets.truncate(40);
    let hosts = told.http.iter().flat_map(|it| it.hostnames.iter().map(|host| host.replace('*', "a")));
    let hosts: Vec<String> = ["web".to_owned()].into_iter().chain(hosts).take(4).collect();
    let namespaces = ["default"].into_iter().chain(told.http.iter().map(|it| it.consumer_namespace.as_str()));
    let namespaces: Vec<_> = namespaces.filter_map(|it| DnsLabel::parse(it).ok()).take(3).collect();
    let ports: Vec<u16> =
        [80].into_iter().chain(told.http.iter().filter_map(|it| it.port.try_into().ok())).take(3).collect();
    for (count, target) in targets.iter().filter(|it| it.is_ascii()).enumerate() {
        let method = if count % 2 == 0 { Method::GET } else { Method::POST };
        let mut head = RequestHead::new(method, Version::Http11, &hosts[count % hosts.len()], target);
        for wanted in all().flat_map(|it| it.headers.iter()).take(8) {
            if let Some(Value::Exact(value)) = &wanted.value
                && count % 3 != 0
            {
                let _ = head.fields.append(&wanted.name, value.as_bytes());
            }
        }
        let (namespace, port) = (&namespaces[count % namespaces.len()], ports[count % ports.len()]);
        let found = match rules.find(port, namespace, &head) {
            Verdict::Unrouted => Plainly::Unrouted,
            Verdict::NoMatch => Plainly::NoMatch,
            Verdict::Rule(rule) => Plainly::Rule(rule.route.to_string(), rule.index),
        };
        assert_eq!(found, plainly(told, port, namespace, &head), "{} {target}", head.host());
    }
}

#[derive(Debug, PartialEq)]
enum Plainly {
    Unrouted,
    NoMatch,
    Rule(String, usize),
}

/// Every match of every rule is looked at, and the best of those that fit is taken (Gateway API, HTTPRouteRule).
fn plainly(told: &v1::Routes, port: u16, namespace: &DnsLabel, head: &RequestHead) -> Plainly {
    let here = |http: &&v1::HttpRoute| (http.port == 0 || http.port == u32::from(port)) && !http.rules.is_empty();
    let mine = |http: &&v1::HttpRoute| http.consumer_namespace == namespace.as_str();
    let consumes = told.http.iter().any(|http| here(&http) && mine(&http));
    let applies =
        |http: &&v1::HttpRoute| here(http) && if consumes { mine(http) } else { http.consumer_namespace.is_empty() };
    if !told.http.iter().any(|http| applies(&http)) {
        return Plainly::Unrouted;
    }
    let any = [v1::HttpMatch { path: Some(Path::Prefix("/".to_owned())), ..Default::default() }];
    let mut best = None;
    for http in told.http.iter().filter(applies) {
        let name = format!("{}/{}", http.namespace, http.name);
        let is_named = http.hostnames.is_empty() || http.hostnames.iter().any(|pattern| is_host(pattern, head.host()));
        for (index, rule) in http.rules.iter().enumerate().filter(|_| is_named) {
            for it in if rule.matches.is_empty() { &any[..] } else { &rule.matches } {
                if !fits(it, head) {
                    continue;
                }
                let (kind, length) = match it.path.as_ref().expect("checked") {
                    Path::Exact(path) => (0, path.len()),
                    Path::Regex(path) => (1, path.len()),
                    Path::Prefix(path) => (2, path.trim_end_matches('/').len()),
                };
                let longest = usize::MAX;
                let key = (
                    http.port == 0,
                    (kind, longest - length, it.method.is_empty()),
                    (longest - it.headers.len(), longest - it.query.len()),
                    (http.created.clone(), name.clone(), index),
                );
                if best.as_ref().is_none_or(|(before, _)| key < *before) {
                    best = Some((key, Plainly::Rule(name.clone(), index)));
                }
            }
        }
    }
    best.map_or(Plainly::NoMatch, |(_, rule)| rule)
}

fn is_host(pattern: &str, host: &str) -> bool {
    let (pattern, host) = (pattern.to_ascii_lowercase(), host.to_ascii_lowercase());
    match pattern.strip_prefix('*') {
        Some(suffix) => host.ends_with(suffix) && host != suffix,
        None => host == pattern,
    }
}

fn fits(it: &v1::HttpMatch, head: &RequestHead) -> bool {
    let (path, query) = head.target().split_once('?').unwrap_or((head.target(), ""));
    let path_fits = match it.path.as_ref().expect("checked") {
        Path::Exact(exact) => path == exact,
        Path::Regex(regex) => whole_regex(regex).expect("checked").is_match(path),
        Path::Prefix(prefix) => {
            let prefix = prefix.trim_end_matches('/');
            format!("{path}/").starts_with(&format!("{prefix}/")) || prefix.is_empty()
        }
    };
    let value_fits = |wanted: &v1::ValueMatch, value: &[u8]| match wanted.value.as_ref().expect("checked") {
        Value::Exact(exact) => exact.as_bytes() == value,
        Value::Regex(regex) => {
            let regex = whole_regex(regex).expect("checked");
            std::str::from_utf8(value).is_ok_and(|text| regex.is_match(text))
        }
    };
    let named = |name: &str| -> Option<String> {
        // The first of that name decides, whatever it holds.
        let mut pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        pairs.find(|(key, _)| decoded(key).as_deref() == Some(name)).and_then(|(_, value)| decoded(value))
    };
    path_fits
        && (it.method.is_empty() || it.method == head.method.as_str())
        && it.headers.iter().all(|wanted| {
            let mut fields =
                head.fields.iter().filter(|(name, _, _)| name.eq_ignore_ascii_case(wanted.name.as_bytes()));
            fields.any(|(_, value, _)| value_fits(wanted, value))
        })
        && it.query.iter().all(|wanted| named(&wanted.name).is_some_and(|value| value_fits(wanted, value.as_bytes())))
}

fn decoded(text: &str) -> Option<String> {
    let mut parts = text.split('%');
    let mut bytes = parts.next().unwrap_or_default().replace('+', " ").into_bytes();
    for part in parts {
        let digits = part.get(..2).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()))?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        bytes.extend_from_slice(part[2..].replace('+', " ").as_bytes());
    }
    String::from_utf8(bytes).ok()
}

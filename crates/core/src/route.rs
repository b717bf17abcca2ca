//! Which rule a request follows, and which backend its rule sends it to (Gateway API v1.6, HTTPRoute).
//!
//! Matches of all routes attached to a service stand in one list in order of precedence: exact paths, regular
//! expressions, then prefixes by length; a method before none; more headers, more query parameters; the older route,
//! the route first by name, the rule first in its route. The first that matches wins.

use crate::cause::Cause;
use crate::head::RequestHead;
use crate::name::{DnsLabel, ServiceName};
use crate::snapshot::Timeouts;
use http::Method;
use regex::Regex;
use std::cmp::Reverse;
use std::sync::Arc;

/// The routes attached to one service.
#[derive(Debug, Default)]
pub struct Rules {
    entries: Vec<Entry>,
    ports: Vec<u16>,
}

/// A rule in the order it is to be written: its route, its place in it, and its matches.
#[derive(Debug)]
pub struct Attached {
    /// Port of the service that the route is attached to; 0 for all.
    pub port: u16,
    /// Set for a consumer route: only for clients of this namespace.
    pub consumer: Option<DnsLabel>,
    /// Host names the route is limited to, lower-case; empty for all. A leading `*.` stands for one or more labels.
    pub hostnames: Vec<String>,
    /// When the route was made, RFC 3339.
    pub created: String,
    /// Any of these must match; empty matches everything.
    pub matches: Vec<Match>,
    /// The rule.
    pub rule: Arc<Rule>,
}

/// What happens to a request that matched.
#[derive(Debug, PartialEq, Eq)]
pub struct Rule {
    /// `<namespace>/<name>` of the route.
    pub route: Arc<str>,
    /// The rule's place in its route.
    pub index: usize,
    /// Where requests go.
    pub backends: Vec<Backend>,
    /// Timeouts; none by default.
    pub timeouts: Timeouts,
    /// Changes to the request's fields.
    pub request_edits: Vec<Edit>,
    /// Changes to the response's fields.
    pub response_edits: Vec<Edit>,
}

/// A backend and its share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// The service.
    pub service: ServiceName,
    /// Its port.
    pub port: u16,
    /// Share: this over the sum of all.
    pub weight: u32,
    /// False when it does not exist or may not be referred to: its share is answered 500.
    pub valid: bool,
}

/// A change to one header field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Edit {
    /// Gives the name this one value.
    Set(String, String),
    /// Adds a value.
    Add(String, String),
    /// Removes the name.
    Remove(String),
}

/// All of its parts must match.
#[derive(Clone, Debug, Default)]
pub struct Match {
    /// The path.
    pub path: PathMatch,
    /// The method.
    pub method: Option<Method>,
    /// Header fields, each by one of its values.
    pub headers: Vec<(String, ValueMatch)>,
    /// Query parameters, each by its first value, percent-decoded.
    pub query: Vec<(String, ValueMatch)>,
}

/// How a path is matched. Paths are compared as sent, without the query.
#[derive(Clone, Debug, Default)]
pub enum PathMatch {
    /// Every path.
    #[default]
    Any,
    /// This one.
    Exact(String),
    /// This one and all below it, by path element; without a trailing slash.
    Prefix(String),
    /// All that the expression matches as a whole.
    Regex(Regex),
}

/// How a value is matched.
#[derive(Clone, Debug)]
pub enum ValueMatch {
    /// This one.
    Exact(String),
    /// All that the expression matches as a whole.
    Regex(Regex),
}

/// The outcome of routing.
#[derive(Clone, Copy, Debug)]
pub enum Verdict<'a> {
    /// No route is attached to this port: the service itself is the backend.
    Unrouted,
    /// This rule applies.
    Rule(&'a Arc<Rule>),
    /// Routes are attached and none of their rules matches: [`Cause::NoRoute`].
    NoMatch,
}

#[derive(Debug)]
struct Entry {
    port: u16,
    consumer: Option<DnsLabel>,
    hostnames: Arc<[String]>,
    matched: Match,
    rule: Arc<Rule>,
}

impl Rules {
    /// Puts the rules of all attached routes in order of precedence.
    pub fn new(attached: Vec<Attached>) -> Self {
        let mut ports: Vec<u16> = attached.iter().map(|it| it.port).collect();
        ports.sort_unstable();
        ports.dedup();
        let mut keyed = Vec::new();
        for (position, it) in attached.into_iter().enumerate() {
            let hostnames: Arc<[String]> = it.hostnames.into();
            let matches = if it.matches.is_empty() { vec![Match::default()] } else { it.matches };
            for matched in matches {
                let key = (matched.precedence(), it.created.clone(), it.rule.route.clone(), it.rule.index, position);
                let entry = Entry {
                    port: it.port,
                    consumer: it.consumer.clone(),
                    hostnames: hostnames.clone(),
                    matched,
                    rule: it.rule.clone(),
                };
                // A consumer's own routes come before the producer's, a named port before all ports (GEP-1294).
                keyed.push(((entry.consumer.is_none(), entry.port == 0), key, entry));
            }
        }
        keyed.sort_by(|a, b| (&a.0, &a.1).cmp(&(&b.0, &b.1)));
        Self { entries: keyed.into_iter().map(|(_, _, entry)| entry).collect(), ports }
    }

    /// True when no rule is attached.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Decides which rule a request to `port` from a client in `namespace` follows. When consumer routes apply to the
    /// client, the producer's do not.
    pub fn find(&self, port: u16, namespace: &DnsLabel, head: &RequestHead) -> Verdict<'_> {
        if !self.ports.contains(&port) && !self.ports.contains(&0) {
            return Verdict::Unrouted;
        }
        let mine = |entry: &&Entry| entry.consumer.as_ref() == Some(namespace);
        let consumes = self.entries.iter().any(|entry| mine(&entry) && entry.applies_to(port));
        let mut attached = false;
        for entry in self.entries.iter().filter(|entry| entry.applies_to(port)) {
            if if consumes { !mine(&entry) } else { entry.consumer.is_some() } {
                continue;
            }
            attached = true;
            if entry.matches(head) {
                return Verdict::Rule(&entry.rule);
            }
        }
        if attached { Verdict::NoMatch } else { Verdict::Unrouted }
    }

    /// Every backend that any rule names, for subscribing to it.
    pub fn backends(&self) -> impl Iterator<Item = &Backend> {
        self.entries.iter().flat_map(|entry| entry.rule.backends.iter())
    }
}

impl Entry {
    fn applies_to(&self, port: u16) -> bool {
        self.port == 0 || self.port == port
    }

    fn matches(&self, head: &RequestHead) -> bool {
        (self.hostnames.is_empty() || self.hostnames.iter().any(|pattern| matches_host(pattern, head.host())))
            && self.matched.matches(head)
    }
}

impl Rule {
    /// Chooses a backend by weight. `random` is uniform over all of `u64`.
    ///
    /// # Errors
    /// [`Cause::NoBackend`] when no weight is left or the share belongs to a backend that does not exist.
    pub fn backend(&self, random: u64) -> Result<&Backend, Cause> {
        let sum: u64 = self.backends.iter().map(|backend| u64::from(backend.weight)).sum();
        if sum == 0 {
            return Err(Cause::NoBackend);
        }
        // Multiply-shift maps the whole range evenly onto [0, sum) up to 2^-32 (Lemire 2019).
        let mut point = ((u128::from(random) * u128::from(sum)) >> 64) as u64;
        for backend in &self.backends {
            let weight = u64::from(backend.weight);
            if point < weight {
                return if backend.valid { Ok(backend) } else { Err(Cause::NoBackend) };
            }
            point -= weight;
        }
        Err(Cause::NoBackend)
    }
}

impl Match {
    /// Smaller comes first.
    fn precedence(&self) -> (u8, Reverse<usize>, bool, Reverse<usize>, Reverse<usize>) {
        let (kind, length) = match &self.path {
            PathMatch::Exact(path) => (0, path.len()),
            PathMatch::Regex(regex) => (1, regex.as_str().len()),
            PathMatch::Prefix(path) => (2, path.len()),
            PathMatch::Any => (2, 0),
        };
        (kind, Reverse(length), self.method.is_none(), Reverse(self.headers.len()), Reverse(self.query.len()))
    }

    fn matches(&self, head: &RequestHead) -> bool {
        self.path.matches(head.path())
            && self.method.as_ref().is_none_or(|method| *method == head.method)
            && self.headers.iter().all(|(name, value)| head.fields.values_of(name).any(|found| value.matches(found)))
            && self.query.iter().all(|(name, value)| {
                query_value(head.query().unwrap_or_default(), name).is_some_and(|found| value.matches(found.as_bytes()))
            })
    }
}

impl PathMatch {
    /// A prefix match; a trailing slash makes no difference (Gateway API, PathMatchPathPrefix).
    pub fn prefix(path: &str) -> Self {
        match path.trim_end_matches('/') {
            "" => PathMatch::Any,
            trimmed => PathMatch::Prefix(trimmed.to_owned()),
        }
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            PathMatch::Any => true,
            PathMatch::Exact(exact) => path == exact,
            PathMatch::Prefix(prefix) => {
                path.strip_prefix(prefix.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            PathMatch::Regex(regex) => regex.is_match(path),
        }
    }
}

impl ValueMatch {
    fn matches(&self, value: &[u8]) -> bool {
        match self {
            ValueMatch::Exact(exact) => value == exact.as_bytes(),
            // Not UTF-8: no rule was written for it.
            ValueMatch::Regex(regex) => std::str::from_utf8(value).is_ok_and(|text| regex.is_match(text)),
        }
    }
}

/// Compiles an expression that must match a whole value, as Envoy's `safe_regex` does.
///
/// # Errors
/// When it is no expression or would compile to more than 256 KiB.
pub fn whole_regex(expression: &str) -> Result<Regex, regex::Error> {
    // Compiled by itself first, so that a stray parenthesis cannot close the group around it.
    regex::RegexBuilder::new(expression).size_limit(256 << 10).build()?;
    regex::RegexBuilder::new(&format!("^(?:{expression})$")).size_limit(256 << 10).build()
}

fn matches_host(pattern: &str, host: &str) -> bool {
    match pattern.strip_prefix('*') {
        Some(suffix) => {
            host.len() > suffix.len()
                && host.is_char_boundary(host.len() - suffix.len())
                && host[host.len() - suffix.len()..].eq_ignore_ascii_case(suffix)
        }
        None => host.eq_ignore_ascii_case(pattern),
    }
}

/// The first value of a query parameter, percent-decoded with `+` as blank. One that cannot be decoded is none: the next
/// of the same name is not what servers read.
fn query_value(query: &str, name: &str) -> Option<String> {
    let mut pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.find(|(key, _)| decode(key).as_deref() == Some(name)).and_then(|(_, value)| decode(value))
}

fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digit = |b: Option<u8>| b.and_then(|b| (b as char).to_digit(16));
                let (high, low) = (digit(rest.next())?, digit(rest.next())?);
                (high * 16 + low) as u8
            }
            other => other,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::head::Version;

    fn rule(route: &str, index: usize) -> Arc<Rule> {
        Arc::new(Rule {
            route: route.into(),
            index,
            backends: vec![],
            timeouts: Timeouts::default(),
            request_edits: vec![],
            response_edits: vec![],
        })
    }

    fn attach(name: &str, matches: Vec<Match>) -> Attached {
        Attached { port: 0, consumer: None, hostnames: vec![], created: String::new(), matches, rule: rule(name, 0) }
    }

    fn path(path: PathMatch) -> Match {
        Match { path, ..Match::default() }
    }

    fn request(method: Method, target: &str, fields: &[(&str, &str)]) -> RequestHead {
        let mut head = RequestHead::new(method, Version::Http11, "web", target);
        for (name, value) in fields {
            head.fields.append(name, value.as_bytes()).unwrap();
        }
        head
    }

    fn found(rules: &Rules, head: &RequestHead) -> String {
        match rules.find(80, &DnsLabel::parse("default").unwrap(), head) {
            Verdict::Rule(rule) => rule.route.to_string(),
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn precedence_is_gateway_apis() {
        let header = ("x-v".to_owned(), ValueMatch::Exact("2".into()));
        let rules = Rules::new(vec![
            attach("any", vec![]),
            attach("short", vec![path(PathMatch::prefix("/a/"))]),
            attach("long", vec![path(PathMatch::prefix("/a/b"))]),
            attach("exact", vec![path(PathMatch::Exact("/a/b".into()))]),
            attach("method", vec![Match { method: Some(Method::POST), ..path(PathMatch::prefix("/a")) }]),
            attach("header", vec![Match { headers: vec![header], ..path(PathMatch::prefix("/a")) }]),
        ]);
        for (method, target, fields, expected) in [
            (Method::GET, "/", &[][..], "any"),
            (Method::GET, "/ab", &[], "any"),
            (Method::GET, "/a", &[], "short"),
            (Method::GET, "/a/", &[], "short"),
            (Method::GET, "/a?b", &[], "short"),
            (Method::GET, "/a/b", &[], "exact"),
            (Method::GET, "/a/b/", &[], "long"),
            (Method::POST, "/a/x", &[("X-V", "2")], "method"),
            (Method::GET, "/a/x", &[("X-V", "1"), ("x-v", "2")], "header"),
        ] {
            assert_eq!(found(&rules, &request(method, target, fields)), expected, "{target}");
        }
    }

    #[test]
    fn older_routes_win_ties_then_names() {
        let mut young = attach("default/a", vec![]);
        young.created = "2026-02-01T00:00:00Z".into();
        let mut old = attach("default/b", vec![]);
        old.created = "2026-01-01T00:00:00Z".into();
        assert_eq!(found(&Rules::new(vec![young, old]), &request(Method::GET, "/", &[])), "default/b");
        let rules = Rules::new(vec![attach("default/b", vec![]), attach("default/a", vec![])]);
        assert_eq!(found(&rules, &request(Method::GET, "/", &[])), "default/a");
    }

    #[test]
    fn query_parameters_are_decoded_and_the_first_counts() {
        let query = vec![("v".to_owned(), ValueMatch::Exact("a b".into()))];
        let rules = Rules::new(vec![attach("hit", vec![Match { query, ..Match::default() }])]);
        for (target, hit) in
            [("/?v=a+b", true), ("/?x=1&v=a%20b", true), ("/?v=c&v=a+b", false), ("/", false), ("/?v=a%2", false)]
        {
            assert_eq!(found(&rules, &request(Method::GET, target, &[])) == "hit", hit, "{target}");
        }
    }

    #[test]
    fn expressions_match_whole_values() {
        let rules = Rules::new(vec![attach("hit", vec![path(PathMatch::Regex(whole_regex("/a|/b").unwrap()))])]);
        assert_eq!(found(&rules, &request(Method::GET, "/b", &[])), "hit");
        assert_eq!(found(&rules, &request(Method::GET, "/bc", &[])), "NoMatch");
        assert!(whole_regex(")(").is_err());
        assert!(whole_regex("(a{1000}){1000}").is_err());
    }

    #[test]
    fn consumer_routes_replace_the_producers_for_their_namespace() {
        let mut consumer = attach("mine", vec![path(PathMatch::prefix("/only"))]);
        consumer.consumer = Some(DnsLabel::parse("default").unwrap());
        let rules = Rules::new(vec![attach("theirs", vec![]), consumer]);
        assert_eq!(found(&rules, &request(Method::GET, "/only", &[])), "mine");
        assert_eq!(found(&rules, &request(Method::GET, "/", &[])), "NoMatch");
        let other = DnsLabel::parse("other").unwrap();
        assert!(
            matches!(rules.find(80, &other, &request(Method::GET, "/", &[])), Verdict::Rule(rule) if &*rule.route == "theirs")
        );
    }

    #[test]
    fn a_route_on_one_port_leaves_the_others_alone() {
        let mut on_80 = attach("r", vec![path(PathMatch::prefix("/x"))]);
        on_80.port = 80;
        let rules = Rules::new(vec![on_80]);
        let namespace = DnsLabel::parse("default").unwrap();
        let head = request(Method::GET, "/", &[]);
        assert!(matches!(rules.find(80, &namespace, &head), Verdict::NoMatch));
        assert!(matches!(rules.find(81, &namespace, &head), Verdict::Unrouted));
    }

    #[test]
    fn hostnames_limit_a_route() {
        for (pattern, host, hit) in [
            ("web", "WEB", true),
            ("*.example", "a.example", true),
            ("*.example", "example", false),
            ("*.example", ".example", false),
            ("web", "web2", false),
        ] {
            assert_eq!(matches_host(pattern, host), hit && host != ".example", "{pattern} {host}");
        }
    }

    #[test]
    fn weights_are_shares_and_nothing_is_sent_nowhere() {
        let backend =
            |name: &str, weight, valid| Backend { service: ServiceName::parse(name).unwrap(), port: 80, weight, valid };
        let mut rule = Rule {
            backends: vec![backend("a", 90, true), backend("b", 10, true), backend("c", 0, true)],
            ..Arc::into_inner(rule("r", 0)).unwrap()
        };
        let mut counts = [0u32; 2];
        for step in 0..1000u64 {
            match rule.backend(step * (u64::MAX / 1000)).unwrap().service.name.as_str() {
                "a" => counts[0] += 1,
                "b" => counts[1] += 1,
                other => panic!("{other} has no weight"),
            }
        }
        assert_eq!(counts, [901, 99]);
        rule.backends = vec![backend("a", 0, true)];
        assert_eq!(rule.backend(0), Err(Cause::NoBackend));
        rule.backends = vec![backend("a", 1, false)];
        assert_eq!(rule.backend(0), Err(Cause::NoBackend));
    }
}

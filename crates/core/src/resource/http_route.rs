//! `HTTPRoute` of the Gateway API v1.6, attached to services.

use super::decode::{Cursor, Object, clip};
use super::meta::{Located, Meta};
use crate::name::ServiceName;
use crate::route::whole_regex;
use crate::wire::v1::header_edit::Action;
use crate::wire::v1::{HeaderEdit, HttpMatch, ValueMatch, http_match, value_match};
use std::time::Duration;

/// A written route.
#[derive(Clone, Debug, PartialEq)]
pub struct HttpRoute {
    /// Name, creation time and place.
    pub meta: Meta,
    /// The services it is attached to.
    pub parents: Vec<Located<ParentRef>>,
    /// Host names it is for; empty: all.
    pub hostnames: Vec<String>,
    /// Its rules, in the order of the text.
    pub rules: Vec<Located<Rule>>,
}

/// A service that a route is attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentRef {
    /// The service.
    pub service: ServiceName,
    /// One of its ports; `None` for all.
    pub port: Option<u16>,
}

/// One rule.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Its name; may be empty.
    pub name: String,
    /// Any of these must match; never empty: what is not written matches every path.
    pub matches: Vec<HttpMatch>,
    /// Where its requests go.
    pub backends: Vec<Located<BackendRef>>,
    /// Changes to the request's fields.
    pub request_headers: Vec<HeaderEdit>,
    /// Changes to the response's fields.
    pub response_headers: Vec<HeaderEdit>,
    /// Whole time of a request; `None`: no limit.
    pub request_timeout: Option<Duration>,
    /// Time of one attempt; `None`: no limit.
    pub backend_timeout: Option<Duration>,
}

/// A service that a rule sends requests to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendRef {
    /// The service.
    pub service: ServiceName,
    /// Its port.
    pub port: u16,
    /// Its share is the weight over the sum.
    pub weight: u32,
}

// The bounds of the API's own schema.
const MAX_PARENTS: usize = 32;
const MAX_HOSTNAMES: usize = 16;
const MAX_RULES: usize = 16;
const MAX_MATCHES: usize = 64;
const MAX_MATCHES_OF_ROUTE: usize = 128;
const MAX_FIELDS: usize = 16;
const MAX_FILTERS: usize = 16;
const MAX_BACKENDS: usize = 16;
const MAX_WEIGHT: u64 = 1_000_000;
const MAX_PATH: usize = 1024;
const MAX_VALUE: usize = 4096;

const METHODS: &[(&str, &str)] = &[
    ("GET", "GET"),
    ("HEAD", "HEAD"),
    ("POST", "POST"),
    ("PUT", "PUT"),
    ("DELETE", "DELETE"),
    ("CONNECT", "CONNECT"),
    ("OPTIONS", "OPTIONS"),
    ("TRACE", "TRACE"),
    ("PATCH", "PATCH"),
];

pub(super) fn decode(at: &Cursor<'_>, meta: Meta) -> Option<HttpRoute> {
    at.object(|fields| {
        let route = meta.name.clone();
        let parents = fields.required("parentRefs").map(|it| parents(&it, &route)).unwrap_or_default();
        let hostnames = fields.optional("hostnames").map(|it| it.items(MAX_HOSTNAMES)).unwrap_or_default();
        let hostnames = hostnames.iter().filter_map(|it| it.host_name(true)).collect();
        let rules = match fields.optional("rules") {
            Some(at) => rules(&at, &route),
            None => {
                fields.at.error_help("a route on a service needs rules", "write rules with backendRefs");
                Vec::new()
            }
        };
        fields.not_yet(&["useDefaultGateways"]);
        Some(HttpRoute { meta, parents, hostnames, rules })
    })
}

fn parents(at: &Cursor<'_>, route: &ServiceName) -> Vec<Located<ParentRef>> {
    let items = at.items(MAX_PARENTS);
    if at.is_empty_list() {
        at.error_help("names no service", "write parentRefs: [{group: \"\", kind: Service, name: NAME}]");
    }
    let mut parents: Vec<Located<ParentRef>> = Vec::new();
    for item in &items {
        let Some(parent) = item.object(|fields| parent(fields, route)) else { continue };
        if parents.iter().any(|other| other.value == parent) {
            item.error("this parent is named twice");
        }
        parents.push(item.located(parent));
    }
    parents
}

fn parent(fields: &mut Object<'_>, route: &ServiceName) -> Option<ParentRef> {
    // The API's defaults are a Gateway; a Service must be named as such.
    let group = fields.optional("group");
    let kind = fields.optional("kind");
    let kind_text = kind.as_ref().and_then(|it| it.text()).unwrap_or("Gateway");
    let group_text = group.as_ref().and_then(|it| it.text());
    let fine = match (kind_text, group_text) {
        ("Service", Some("")) => true,
        ("Service", None) => {
            fields.at.error_help("a Service parent needs its group", "write group: \"\"");
            false
        }
        ("Service", Some(other)) => {
            let at = group.as_ref().unwrap_or(&fields.at);
            at.error_help(format!("Service is not of group '{}'", clip(other)), "write group: \"\"");
            false
        }
        ("Gateway", _) => {
            let at = kind.as_ref().unwrap_or(&fields.at);
            at.error_help("a Gateway as parent is not supported yet", "write group: \"\" and kind: Service");
            false
        }
        (other, _) => {
            let at = kind.as_ref().unwrap_or(&fields.at);
            at.error_help(format!("a route cannot be attached to a '{}'", clip(other)), "write kind: Service");
            false
        }
    };
    let service = reference(fields, route);
    let port = fields.optional("port").map(|it| it.port());
    fields.not_yet(&["sectionName"]);
    let port = match port {
        Some(port) => Some(port?),
        None => None,
    };
    fine.then_some(ParentRef { service: service?, port })
}

/// `name` and `namespace` of a reference; the referring object's namespace by default.
fn reference(fields: &mut Object<'_>, from: &ServiceName) -> Option<ServiceName> {
    let name = fields.required("name").and_then(|it| it.label());
    let namespace = match fields.optional("namespace") {
        Some(it) => it.label(),
        None => Some(from.namespace.clone()),
    };
    Some(ServiceName { namespace: namespace?, name: name? })
}

fn rules(at: &Cursor<'_>, route: &ServiceName) -> Vec<Located<Rule>> {
    let items = at.items(MAX_RULES);
    if at.is_empty_list() {
        at.error_help("a route on a service needs rules", "write rules with backendRefs");
    }
    let mut rules: Vec<Located<Rule>> = Vec::new();
    for item in &items {
        let Some(rule) = item.object(|fields| rule(fields, route)) else { continue };
        if !rule.name.is_empty() && rules.iter().any(|other| other.value.name == rule.name) {
            item.error(format!("two rules have the name '{}'", rule.name));
        }
        rules.push(item.located(rule));
    }
    let matches: usize = rules.iter().map(|rule| rule.value.matches.len()).sum();
    if matches > MAX_MATCHES_OF_ROUTE {
        at.error(format!("{matches} matches in all, more than the {MAX_MATCHES_OF_ROUTE} allowed"));
    }
    rules
}

fn rule(fields: &mut Object<'_>, route: &ServiceName) -> Option<Rule> {
    let name = fields.optional("name").and_then(|it| it.label()).map(|it| it.to_string());
    let matches = fields.optional("matches").map(|it| it.items(MAX_MATCHES)).unwrap_or_default();
    let mut matches: Vec<HttpMatch> = matches.iter().filter_map(http_match).collect();
    if matches.is_empty() {
        matches.push(HttpMatch { path: Some(http_match::Path::Prefix("/".to_owned())), ..Default::default() });
    }
    let mut rule = Rule {
        name: name.unwrap_or_default(),
        matches,
        backends: Vec::new(),
        request_headers: Vec::new(),
        response_headers: Vec::new(),
        request_timeout: None,
        backend_timeout: None,
    };
    if let Some(at) = fields.optional("filters") {
        filters(&at, &mut rule);
    }
    match fields.optional("backendRefs").map(|it| it.items(MAX_BACKENDS)) {
        Some(items) if !items.is_empty() => {
            rule.backends = items.iter().filter_map(|item| backend(item, route)).collect();
        }
        _ => fields.at.warn(
            "a rule without backendRefs answers every request with status 500",
            "name the service itself if requests should simply go on to it",
        ),
    }
    if let Some(at) = fields.optional("timeouts") {
        timeouts(&at, &mut rule);
    }
    fields.not_yet(&["retry", "sessionPersistence"]);
    Some(rule)
}

fn backend(at: &Cursor<'_>, route: &ServiceName) -> Option<Located<BackendRef>> {
    let backend = at.object(|fields| {
        if let Some(it) = fields.optional("group")
            && it.text().is_some_and(|group| !group.is_empty())
        {
            it.error_help("only services can be backends", "write group: \"\" or remove it");
        }
        if let Some(it) = fields.optional("kind") {
            it.choice(&[("Service", ())]);
        }
        let service = reference(fields, route);
        let port = fields.required("port").and_then(|it| it.port());
        let weight = fields.optional("weight").and_then(|it| it.integer(0, MAX_WEIGHT)).unwrap_or(1);
        fields.not_yet(&["filters"]);
        Some(BackendRef { service: service?, port: port?, weight: u32::try_from(weight).ok()? })
    });
    backend.map(|backend| at.located(backend))
}

fn http_match(at: &Cursor<'_>) -> Option<HttpMatch> {
    at.object(|fields| {
        let path = match fields.optional("path") {
            Some(at) => path(&at),
            None => Some(http_match::Path::Prefix("/".to_owned())),
        };
        let headers =
            fields.optional("headers").map(|it| value_matches(&it, |it| it.header_name())).unwrap_or_default();
        let query = fields.optional("queryParams").map(|it| value_matches(&it, query_name)).unwrap_or_default();
        let method = fields.optional("method").and_then(|it| it.choice(METHODS)).unwrap_or_default().to_owned();
        Some(HttpMatch { path: Some(path?), headers, query, method })
    })
}

#[derive(Clone, Copy)]
enum PathKind {
    Exact,
    Prefix,
    Regex,
}

fn path(at: &Cursor<'_>) -> Option<http_match::Path> {
    at.object(|fields| {
        let kinds =
            [("Exact", PathKind::Exact), ("PathPrefix", PathKind::Prefix), ("RegularExpression", PathKind::Regex)];
        let kind = match fields.optional("type") {
            Some(it) => it.choice(&kinds),
            None => Some(PathKind::Prefix),
        };
        let at = fields.optional("value");
        let text = match &at {
            Some(at) => at.text()?,
            None => "/",
        };
        let at = at.as_ref().unwrap_or(&fields.at);
        match kind? {
            PathKind::Exact => check_path(at, text).then(|| http_match::Path::Exact(text.to_owned())),
            PathKind::Prefix => check_path(at, text).then(|| {
                // By path element: a trailing slash makes no difference.
                let text = text.strip_suffix('/').filter(|rest| !rest.is_empty()).unwrap_or(text);
                http_match::Path::Prefix(text.to_owned())
            }),
            PathKind::Regex => regex(at, text, MAX_PATH).map(http_match::Path::Regex),
        }
    })
}

/// A path in the one spelling in which requests are compared; others could never match.
fn check_path(at: &Cursor<'_>, text: &str) -> bool {
    let bytes = text.as_bytes();
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@/%".contains(&b);
    let escapes = bytes.iter().enumerate().filter(|(_, b)| **b == b'%').all(|(index, _)| {
        bytes.get(index + 1..index + 3).is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    });
    let lower = text.to_ascii_lowercase();
    let problem = if !text.starts_with('/') {
        "a path begins with '/'"
    } else if text.len() > MAX_PATH {
        "a path has at most 1024 characters"
    } else if lower.contains("%2f") || text.contains("//") || text.split('/').any(|part| part == "." || part == "..") {
        "a path has no '//', '/./', '/../' or %2f"
    } else if !bytes.iter().all(|b| allowed(*b)) || !escapes {
        "a path has letters, digits, -._~!$&'()*+,;=:@/ and %XX only"
    } else {
        return true;
    };
    at.error(format!("'{}' cannot match: {problem}", clip(text)));
    false
}

fn query_name(at: &Cursor<'_>) -> Option<String> {
    let text = at.text()?;
    if (1..=256).contains(&text.len()) && http::HeaderName::from_bytes(text.as_bytes()).is_ok() {
        return Some(text.to_owned());
    }
    at.error_help(
        format!("'{}' is no parameter name", clip(text)),
        "write 1 to 256 letters, digits and any of !#$%&'*+-.^_`|~",
    );
    None
}

fn value_matches(at: &Cursor<'_>, read_name: impl Fn(&Cursor<'_>) -> Option<String>) -> Vec<ValueMatch> {
    let mut matches: Vec<ValueMatch> = Vec::new();
    for item in at.items(MAX_FIELDS) {
        let Some(found) = item.object(|fields| value_match(fields, &read_name)) else { continue };
        if matches.iter().any(|other| other.name == found.name) {
            item.error_help(format!("'{}' is matched twice", found.name), "all parts of a match must hold: write one");
        }
        matches.push(found);
    }
    matches
}

fn value_match(fields: &mut Object<'_>, read_name: impl Fn(&Cursor<'_>) -> Option<String>) -> Option<ValueMatch> {
    let name = fields.required("name").and_then(|it| read_name(&it));
    let is_regex = match fields.optional("type") {
        Some(it) => it.choice(&[("Exact", false), ("RegularExpression", true)]),
        None => Some(false),
    };
    let at = fields.required("value")?;
    let text = at.text()?;
    let value = if is_regex? {
        value_match::Value::Regex(regex(&at, text, MAX_VALUE)?)
    } else if text.is_empty() || text.len() > MAX_VALUE {
        at.error(format!("a value has 1 to {MAX_VALUE} bytes, this has {}", text.len()));
        return None;
    } else {
        value_match::Value::Exact(text.to_owned())
    };
    Some(ValueMatch { name: name?, value: Some(value) })
}

/// A regular expression that compiles within bounds, here once, so that no proxy ever meets a bad one.
fn regex(at: &Cursor<'_>, text: &str, limit: usize) -> Option<String> {
    if text.is_empty() || text.len() > limit {
        at.error(format!("a regular expression has 1 to {limit} bytes, this has {}", text.len()));
        return None;
    }
    match whole_regex(text) {
        Ok(_) => Some(text.to_owned()),
        Err(regex::Error::CompiledTooBig(_)) => {
            let help = "use smaller repetitions, or several matches";
            at.error_help(format!("'{}' needs too much memory", clip(text)), help);
            None
        }
        Err(_) => {
            let help = "the syntax is that of RE2: no look-around, no back-references";
            at.error_help(format!("'{}' is no regular expression", clip(text)), help);
            None
        }
    }
}

fn filters(at: &Cursor<'_>, rule: &mut Rule) {
    let types = [
        ("RequestHeaderModifier", Some(true)),
        ("ResponseHeaderModifier", Some(false)),
        ("RequestMirror", None),
        ("RequestRedirect", None),
        ("URLRewrite", None),
        ("CORS", None),
        ("ExternalAuth", None),
        ("ExtensionRef", None),
    ];
    let mut seen = [false; 2];
    for item in at.items(MAX_FILTERS) {
        item.object(|fields| {
            let at = fields.required("type");
            let Some(request) = at.as_ref().and_then(|it| it.choice(&types)) else {
                fields.take_rest();
                return None;
            };
            let Some(request) = request else {
                let at = at.as_ref().unwrap_or(&fields.at);
                at.error_help(format!("the filter '{}' is not supported yet", clip(at.text()?)), "remove it");
                fields.take_rest();
                return None;
            };
            if std::mem::replace(&mut seen[usize::from(request)], true) {
                fields.at.error_help("this filter stands twice in the rule", "write one with all changes");
            }
            let (field, edits) = match request {
                true => ("requestHeaderModifier", &mut rule.request_headers),
                false => ("responseHeaderModifier", &mut rule.response_headers),
            };
            *edits = fields.required(field).map(|it| header_edits(&it)).unwrap_or_default();
            Some(())
        });
    }
}

/// Fields that frame messages or that the mesh itself vouches for.
fn is_protected(name: &str) -> bool {
    let framing = [
        "connection",
        "content-length",
        "host",
        "keep-alive",
        "l5d-client-id",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "x-forwarded-client-cert",
    ];
    framing.contains(&name) || name.starts_with("x-sheer-") || name.starts_with("sheer-")
}

fn header_edits(at: &Cursor<'_>) -> Vec<HeaderEdit> {
    let mut edits: Vec<HeaderEdit> = Vec::new();
    let mut written = false;
    let mut push = |at: &Cursor<'_>, edit: HeaderEdit| {
        if is_protected(&edit.name) {
            at.error_help(format!("'{}' belongs to the connection or to the mesh", edit.name), "remove the change");
        } else if edits.iter().any(|other| other.name == edit.name) {
            at.error_help(format!("'{}' is changed twice", edit.name), "write one change a header");
        } else {
            edits.push(edit);
        }
    };
    at.object(|fields| {
        for (field, action) in [("set", Action::Set), ("add", Action::Add)] {
            let items = fields.optional(field).map(|it| it.items(MAX_FIELDS)).unwrap_or_default();
            written |= !items.is_empty();
            for item in &items {
                let edit = item.object(|fields| {
                    let name = fields.required("name").and_then(|it| it.header_name());
                    let value = fields.required("value").and_then(|it| header_value(&it));
                    Some(HeaderEdit { action: action.into(), name: name?, value: value? })
                });
                if let Some(edit) = edit {
                    push(item, edit);
                }
            }
        }
        let items = fields.optional("remove").map(|it| it.items(MAX_FIELDS)).unwrap_or_default();
        written |= !items.is_empty();
        for item in &items {
            if let Some(name) = item.header_name() {
                push(item, HeaderEdit { action: Action::Remove.into(), name, value: String::new() });
            }
        }
        Some(())
    });
    if edits.is_empty() && !written {
        at.error_help("changes nothing", "write set, add or remove");
    }
    edits
}

/// A field value without control characters and without white space at its ends (RFC 9110, section 5.5).
fn header_value(at: &Cursor<'_>) -> Option<String> {
    let text = at.text()?;
    let clean = !text.chars().any(char::is_control) && text.trim() == text;
    if (1..=MAX_VALUE).contains(&text.len()) && clean {
        return Some(text.to_owned());
    }
    let help = "write 1 to 4096 bytes without control characters, not beginning or ending with white space";
    at.error_help(format!("'{}' is no header value", clip(text)), help);
    None
}

fn timeouts(at: &Cursor<'_>, rule: &mut Rule) {
    at.object(|fields| {
        // Zero switches a limit off, which is also what leaving it out means.
        let limit = |it: Cursor<'_>| it.duration().filter(|duration| !duration.is_zero());
        rule.request_timeout = fields.optional("request").and_then(limit);
        let at = fields.optional("backendRequest");
        rule.backend_timeout = at.clone().and_then(limit);
        if let (Some(at), Some(whole), Some(part)) = (at, rule.request_timeout, rule.backend_timeout)
            && part > whole
        {
            at.error(format!("one attempt ({part:?}) cannot last longer than the request ({whole:?})"));
        }
        Some(())
    });
}

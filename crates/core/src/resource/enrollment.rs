//! `Enrollment`: who may join, and as what.

use super::decode::{Cursor, clip};
use super::meta::Meta;
use super::value;
use crate::name::DnsLabel;
use ipnet::IpNet;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

/// What those who join by one of its methods may be, in the resource's namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enrollment {
    /// Name, namespace and place.
    pub meta: Meta,
    /// How to join; at least one.
    pub methods: Vec<Method>,
    /// Service accounts that may be taken.
    pub service_accounts: Allowed<DnsLabel>,
    /// Services that may be named; by default those with the name of the service account.
    pub services: Option<Allowed<DnsLabel>>,
    /// Labels that may be carried, and their values. Labels not named here may not.
    pub labels: BTreeMap<String, Allowed<String>>,
    /// Ports that may be declared; every port by default.
    pub ports: Allowed<u16>,
    /// Addresses that may be announced beside the stream's own source.
    pub addresses: Vec<IpNet>,
}

/// A closed list, or anything (written `"*"`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Allowed<T> {
    /// Anything.
    Any,
    /// These.
    These(Vec<T>),
}

impl<T: PartialEq> Allowed<T> {
    /// Whether `value` is among them.
    pub fn admits(&self, value: &T) -> bool {
        match self {
            Allowed::Any => true,
            Allowed::These(values) => values.contains(value),
        }
    }
}

/// How to join.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Method {
    /// With a join token made by `sheer token create`.
    Token {
        /// Longest life of a token.
        ttl: Duration,
        /// Most joins with one token.
        uses: u32,
        /// Where joins come from; empty: anywhere.
        from: Vec<IpNet>,
    },
    /// Over the control plane's unix socket.
    Local {
        /// User ids.
        users: Vec<u32>,
    },
}

impl Enrollment {
    /// Whether a stream from `source` may announce `address`.
    pub fn admits_address(&self, source: IpAddr, address: IpAddr) -> bool {
        source == address || self.addresses.iter().any(|net| net.contains(&address))
    }

    /// Whether a workload with `account` may name `service`.
    pub fn admits_service(&self, account: &DnsLabel, service: &DnsLabel) -> bool {
        match &self.services {
            Some(allowed) => allowed.admits(service),
            None => account == service,
        }
    }

    /// Whether a workload may carry this label.
    pub fn admits_label(&self, name: &str, value: &str) -> bool {
        self.labels.get(name).is_some_and(|allowed| allowed.admits(&value.to_owned()))
    }
}

/// A token's life where an Enrollment names none.
pub const DEFAULT_TOKEN_TTL: Duration = Duration::from_secs(600);
const MAX_TTL: Duration = Duration::from_secs(366 * 24 * 3600);
const MAX_USES: u64 = 1_000_000;
const MAX_ITEMS: usize = 1024;

pub(super) fn decode(at: &Cursor<'_>, meta: Meta) -> Option<Enrollment> {
    at.object(|fields| {
        let methods = fields.required("methods").map(|it| methods(&it)).unwrap_or_default();
        let accounts = fields.required("serviceAccounts").map(|it| allowed(&it, |it| it.label()));
        let services = fields.optional("services").map(|it| allowed(&it, |it| it.label()));
        let labels = fields.optional("labels").map(|it| labels(&it)).unwrap_or_default();
        let ports = fields.optional("ports").map(|it| allowed(&it, |it| it.port())).unwrap_or(Allowed::Any);
        let addresses = fields.optional("addresses").map(|it| cidrs(&it)).unwrap_or_default();
        Some(Enrollment { meta, methods, service_accounts: accounts?, services, labels, ports, addresses })
    })
}

/// A list of values, in which `"*"` stands for any.
fn allowed<T>(at: &Cursor<'_>, read: impl Fn(&Cursor<'_>) -> Option<T>) -> Allowed<T> {
    use super::yaml::Value;
    let is_star = |it: &Cursor<'_>| matches!(&it.node.value, Value::Scalar { text, .. } if text == "*");
    let items = at.items(MAX_ITEMS);
    if items.iter().any(is_star) {
        if items.len() > 1 {
            at.error_help("\"*\" already allows everything", "remove the other items");
        }
        return Allowed::Any;
    }
    if at.is_empty_list() {
        at.error_help("allows nothing", "name something, or \"*\" for everything");
    }
    Allowed::These(items.iter().filter_map(read).collect())
}

fn labels(at: &Cursor<'_>) -> BTreeMap<String, Allowed<String>> {
    let mut labels = BTreeMap::new();
    for (key, entry) in at.entries(MAX_ITEMS) {
        if !value::is_label_key(key) {
            entry.error(format!("'{}' is no label name", clip(key)));
            continue;
        }
        let value = |it: &Cursor<'_>| {
            let text = it.text()?;
            if !value::is_label_value(text) {
                it.error(format!("'{}' is no label value", clip(text)));
                return None;
            }
            Some(text.to_owned())
        };
        labels.insert(key.to_owned(), allowed(&entry, value));
    }
    labels
}

fn cidrs(at: &Cursor<'_>) -> Vec<IpNet> {
    at.items(MAX_ITEMS).iter().filter_map(|it| it.cidr()).collect()
}

fn methods(at: &Cursor<'_>) -> Vec<Method> {
    let items = at.items(16);
    if at.is_empty_list() {
        at.error_help("names no way to join", "write methods: [{token: {}}] or [{local: {users: [1000]}}]");
    }
    items.iter().filter_map(method).collect()
}

fn method(at: &Cursor<'_>) -> Option<Method> {
    at.object(|fields| {
        let token = fields.optional("token");
        let local = fields.optional("local");
        fields.not_yet(&["certificate", "cloud"]);
        match (token, local) {
            (Some(token), None) => token.object(|fields| {
                let ttl = fields.optional("ttl").and_then(|it| ttl(&it)).unwrap_or(DEFAULT_TOKEN_TTL);
                let uses = fields.optional("uses").and_then(|it| it.integer(1, MAX_USES)).unwrap_or(1);
                let from = fields.optional("from").map(|it| cidrs(&it)).unwrap_or_default();
                Some(Method::Token { ttl, uses: u32::try_from(uses).ok()?, from })
            }),
            (None, Some(local)) => local.object(|fields| {
                let users = fields.required("users")?;
                let items = users.items(MAX_ITEMS);
                if users.is_empty_list() {
                    users.error("names no user id");
                }
                let users = items.iter().filter_map(|it| it.integer(0, u64::from(u32::MAX)));
                Some(Method::Local { users: users.filter_map(|id| u32::try_from(id).ok()).collect() })
            }),
            _ => {
                fields.at.error_help("one method an item", "write either token or local");
                None
            }
        }
    })
}

fn ttl(at: &Cursor<'_>) -> Option<Duration> {
    let duration = at.duration()?;
    if duration.is_zero() || duration > MAX_TTL {
        at.error(format!("a token lives longer than 0s and at most {}h", MAX_TTL.as_secs() / 3600));
        return None;
    }
    Some(duration)
}

//! What all resources have: name, namespace, labels, and a place in a file.

use super::decode::{Cursor, clip};
use super::value;
use super::yaml::Node;
use crate::name::{DEFAULT_NAMESPACE, ServiceName};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// Where a resource is written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The file as it was named to the compiler.
    pub file: Arc<str>,
    /// Line, from 1.
    pub line: u32,
    /// Column, from 1.
    pub column: u32,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// A value and the place of its field in the resource's file, for findings made later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located<T> {
    /// The value.
    pub value: T,
    /// Line, from 1.
    pub line: u32,
    /// Column, from 1.
    pub column: u32,
    /// The field path.
    pub path: String,
}

/// What all resources have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meta {
    /// Namespace and name. A Mesh belongs to no namespace and has `default` here.
    pub name: ServiceName,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, Located<String>>,
    /// `creationTimestamp` as RFC 3339 in UTC, where a cluster set it; empty otherwise.
    pub created: String,
    /// Where the document begins.
    pub place: Place,
}

impl Meta {
    /// Stands in for metadata that could not be read, until the document is refused for it.
    pub(super) fn nameless(file: &Arc<str>, root: &Node) -> Self {
        Self {
            name: ServiceName { namespace: value::label("default"), name: value::label("nameless") },
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            created: String::new(),
            place: Place { file: file.clone(), line: root.line, column: root.column },
        }
    }
}

/// Fields that an API server writes; they have no meaning for the mesh.
const SYSTEM_FIELDS: &[&str] =
    &["uid", "resourceVersion", "generation", "managedFields", "ownerReferences", "finalizers", "selfLink"];

/// Labels and annotations of one resource are at most this many.
const MAX_ENTRIES: usize = 256;

pub(super) fn decode(at: &Cursor<'_>, namespaced: bool) -> Option<Meta> {
    let file = at.report().file().clone();
    at.object(|fields| {
        let name = fields.required("name").and_then(|it| it.label());
        let namespace = match fields.optional("namespace") {
            Some(it) if !namespaced => {
                it.error_help("this kind belongs to the whole mesh, not to a namespace", "remove the field");
                None
            }
            Some(it) => it.label(),
            None => Some(value::label(DEFAULT_NAMESPACE)),
        };
        let labels = fields.optional("labels").map(|it| labels(&it)).unwrap_or_default();
        let annotations = fields.optional("annotations").map(|it| annotations(&it)).unwrap_or_default();
        let created = fields.optional("creationTimestamp").and_then(|it| created(&it)).unwrap_or_default();
        for name in SYSTEM_FIELDS {
            fields.ignore(name);
        }
        let place = Place { file, line: at.node.line, column: at.node.column };
        let name = ServiceName { namespace: namespace?, name: name? };
        Some(Meta { name, labels, annotations, created, place })
    })
}

/// Labels: names and values after the Kubernetes syntax.
pub(super) fn labels(at: &Cursor<'_>) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::new();
    for (key, entry) in at.entries(MAX_ENTRIES) {
        if !value::is_label_key(key) {
            entry.error_help(
                format!("'{}' is no label name", clip(key)),
                "write [PREFIX/]NAME: a name of 1 to 63 letters, digits, '-', '_', '.', a prefix that is a host name",
            );
            continue;
        }
        let Some(text) = entry.text() else { continue };
        if value::is_label_value(text) {
            labels.insert(key.to_owned(), text.to_owned());
        } else {
            let help = "write at most 63 letters, digits, '-', '_', '.', beginning and ending with a letter or digit";
            entry.error_help(format!("'{}' is no label value", clip(text)), help);
        }
    }
    labels
}

/// Annotations of `sheer.dev/` that exist.
const ANNOTATIONS: &[&str] = &["sheer.dev/hosts", "sheer.dev/service-accounts"];

fn annotations(at: &Cursor<'_>) -> BTreeMap<String, Located<String>> {
    let mut annotations = BTreeMap::new();
    for (key, entry) in at.entries(MAX_ENTRIES) {
        // Other tools' annotations are theirs; ours are checked, since a misspelled one would silently do nothing.
        if key.starts_with("sheer.dev/") && !ANNOTATIONS.contains(&key) {
            let help = match super::decode::nearest(key, ANNOTATIONS.iter().copied()) {
                Some(name) => format!("did you mean '{name}'?"),
                None => format!("known: {}", ANNOTATIONS.join(", ")),
            };
            entry.error_help(format!("unknown annotation '{}'", clip(key)), help);
            continue;
        }
        if let Some(text) = entry.text() {
            annotations.insert(key.to_owned(), entry.located(text.to_owned()));
        }
    }
    annotations
}

/// The one form of RFC 3339 that API servers write: `2026-01-31T23:59:59Z`. It orders as text.
fn created(at: &Cursor<'_>) -> Option<String> {
    let text = at.text()?;
    let form = b"0000-00-00T00:00:00Z";
    let fits = |(have, want): (u8, &u8)| if *want == b'0' { have.is_ascii_digit() } else { have == *want };
    if text.len() == form.len() && text.bytes().zip(form).all(fits) {
        return Some(text.to_owned());
    }
    at.error_help(format!("'{}' is no time", clip(text)), "write it like 2026-01-31T23:59:59Z");
    None
}

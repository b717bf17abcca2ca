//! What users write: the configuration resources, read from YAML.
//!
//! A text becomes a tree of nodes that know their places ([`yaml`]); one collecting decoder per kind turns a document
//! into its typed resource and reports everything that is wrong with it at once. A resource that exists has no wrong
//! field; what several resources say about each other is checked by [`crate::compile`].

mod decode;
mod enrollment;
mod http_route;
mod mesh;
mod meta;
mod service;
mod value;
mod workload;
pub mod yaml;

pub use enrollment::{Allowed, DEFAULT_TOKEN_TTL, Enrollment, Method};
pub use http_route::{BackendRef, HttpRoute, ParentRef, Rule};
pub use mesh::{Egress, Mesh};
pub use meta::{Located, Meta, Place};
pub use service::{Service, ServicePort, Target};
pub(crate) use value::label as constant_label;
pub use value::parse_duration;
pub use workload::{DEFAULT_NETWORK, PlaintextException, Workload, WorkloadPort};

use crate::diagnostic::Diagnostic;
use decode::{Cursor, Report, clip};
use std::sync::Arc;
use yaml::Document;

/// One typed resource.
#[derive(Clone, Debug, PartialEq)]
pub enum Resource {
    /// `v1` Service.
    Service(Service),
    /// `gateway.networking.k8s.io/v1` HTTPRoute.
    HttpRoute(HttpRoute),
    /// `sheer.dev/v1alpha1` Mesh.
    Mesh(Mesh),
    /// `sheer.dev/v1alpha1` Workload.
    Workload(Workload),
    /// `sheer.dev/v1alpha1` Enrollment.
    Enrollment(Enrollment),
}

/// A kind of resource that Sheer reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `v1` Service.
    Service,
    /// `gateway.networking.k8s.io/v1` HTTPRoute.
    HttpRoute,
    /// `sheer.dev/v1alpha1` Mesh.
    Mesh,
    /// `sheer.dev/v1alpha1` Workload.
    Workload,
    /// `sheer.dev/v1alpha1` Enrollment.
    Enrollment,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 5] = [Kind::Service, Kind::HttpRoute, Kind::Mesh, Kind::Workload, Kind::Enrollment];

    /// The value of `kind`.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Service => "Service",
            Kind::HttpRoute => "HTTPRoute",
            Kind::Mesh => "Mesh",
            Kind::Workload => "Workload",
            Kind::Enrollment => "Enrollment",
        }
    }

    /// The value of `apiVersion`.
    pub const fn api_version(self) -> &'static str {
        match self {
            Kind::Service => "v1",
            Kind::HttpRoute => "gateway.networking.k8s.io/v1",
            Kind::Mesh | Kind::Workload | Kind::Enrollment => "sheer.dev/v1alpha1",
        }
    }

    /// The kind that a user at a command line means: its name in any case, or its plural.
    pub fn parse(text: &str) -> Option<Kind> {
        let lower = text.to_ascii_lowercase();
        let singular = match lower.as_str() {
            "meshes" => "mesh",
            other => other.strip_suffix('s').unwrap_or(other),
        };
        Kind::ALL.into_iter().find(|kind| kind.name().eq_ignore_ascii_case(singular))
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl Resource {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Resource::Service(_) => Kind::Service,
            Resource::HttpRoute(_) => Kind::HttpRoute,
            Resource::Mesh(_) => Kind::Mesh,
            Resource::Workload(_) => Kind::Workload,
            Resource::Enrollment(_) => Kind::Enrollment,
        }
    }

    /// Its name, labels and place.
    pub fn meta(&self) -> &Meta {
        match self {
            Resource::Service(it) => &it.meta,
            Resource::HttpRoute(it) => &it.meta,
            Resource::Mesh(it) => &it.meta,
            Resource::Workload(it) => &it.meta,
            Resource::Enrollment(it) => &it.meta,
        }
    }
}

/// What one document of a file turned out to be.
#[derive(Clone, Debug)]
pub struct Read {
    /// The resource; `None` when the document has errors.
    pub resource: Option<Resource>,
    /// Kind and name as far as they could be read, so that references to a broken document are not reported as well.
    pub identity: Option<(Kind, crate::name::ServiceName)>,
    /// The document's own lines.
    pub text: String,
}

/// Kinds of the design that this version does not carry yet: told apart from misspelled ones.
const LATER: &[&str] = &[
    "AuthenticationPolicy",
    "AuthorizationPolicy",
    "BackendTLSPolicy",
    "ExternalService",
    "FaultPolicy",
    "GRPCRoute",
    "Gateway",
    "GatewayClass",
    "RateLimitPolicy",
    "ReferenceGrant",
    "TCPRoute",
    "TLSRoute",
    "TelemetryPolicy",
    "TrafficPolicy",
    "UDPRoute",
];

/// What a file turned out to hold.
#[derive(Clone, Debug)]
pub struct File {
    /// Its documents, as far as it could be read.
    pub documents: Vec<Read>,
    /// Whether kind and name of every resource in it are known.
    pub whole: bool,
}

/// Reads all documents of one file. Whatever is wrong goes to `diagnostics`, in the order of the file.
pub fn read(file: &str, text: &str, diagnostics: &mut Vec<Diagnostic>) -> File {
    let file: Arc<str> = file.into();
    let (documents, failure) = yaml::parse(text);
    let mut read = Vec::with_capacity(documents.len());
    for document in &documents {
        let report = Report::new(file.clone());
        read.push(read_document(&report, document));
        report.finish(diagnostics);
    }
    let whole = failure.is_none() && read.iter().all(|document| document.identity.is_some());
    if let Some(failure) = failure {
        diagnostics.push(failure.into_diagnostic(&file));
    }
    File { documents: read, whole }
}

fn read_document(report: &Report, document: &Document) -> Read {
    let root = Cursor::root(report, &document.root);
    let mut identity = None;
    let resource = root.object(|fields| {
        let api_version = fields.required("apiVersion").and_then(|it| Some((it.text()?, it)));
        let kind = fields.required("kind").and_then(|it| Some((it.text()?, it)));
        let (Some((api_version, at_version)), Some((kind, at_kind))) = (api_version, kind) else {
            fields.take_rest();
            return None;
        };
        let Some(kind) = kind_of(&at_kind, kind, api_version) else {
            fields.take_rest();
            return None;
        };
        if kind.api_version() != api_version {
            at_version.error_help(
                format!("kind {kind} has no version '{}'", clip(api_version)),
                format!("write apiVersion: {}", kind.api_version()),
            );
        }
        let meta = fields.required("metadata").and_then(|it| meta::decode(&it, kind != Kind::Mesh));
        if let Some(meta) = &meta {
            identity = Some((kind, meta.name.clone()));
        }
        // Written by a cluster's API server; it has no meaning for the mesh.
        fields.ignore("status");
        let spec = match kind {
            Kind::Mesh => fields.optional("spec"),
            _ => fields.required("spec"),
        };
        // The rest of a document is read even when its name is wrong, so that all errors come at once.
        let nameless = || Meta::nameless(report.file(), &document.root);
        let meta = meta.unwrap_or_else(nameless);
        match kind {
            Kind::Service => service::decode(&spec?, meta).map(Resource::Service),
            Kind::HttpRoute => http_route::decode(&spec?, meta).map(Resource::HttpRoute),
            Kind::Mesh => mesh::decode(spec.as_ref(), meta).map(Resource::Mesh),
            Kind::Workload => workload::decode(&spec?, meta).map(Resource::Workload),
            Kind::Enrollment => enrollment::decode(&spec?, meta).map(Resource::Enrollment),
        }
    });
    Read { resource: resource.filter(|_| !report.has_errors()), identity, text: document.text.clone() }
}

fn kind_of(at: &Cursor<'_>, kind: &str, api_version: &str) -> Option<Kind> {
    if let Some(kind) = Kind::ALL.into_iter().find(|known| known.name() == kind) {
        return Some(kind);
    }
    if LATER.contains(&kind) {
        at.error_help(format!("{kind} is not supported yet"), "remove the document or keep it in another directory");
        return None;
    }
    if kind == "List" {
        at.error_help("a List is not read", "write its items as documents of their own, separated by ---");
        return None;
    }
    let names = Kind::ALL.iter().map(|kind| kind.name());
    let help = match decode::nearest(kind, names) {
        Some(name) => format!("did you mean '{name}'?"),
        None => "Sheer reads Service, HTTPRoute, Mesh, Workload and Enrollment".to_owned(),
    };
    at.error_help(format!("unknown kind '{}' in '{}'", clip(kind), clip(api_version)), help);
    None
}

#[cfg(test)]
mod tests;

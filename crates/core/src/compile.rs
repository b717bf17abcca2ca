//! From configuration files to what proxies are told.
//!
//! [`compile`] reads a whole set of files, checks every resource and what they say about each other, and indexes them.
//! [`service_of`], [`endpoints_of`], [`routes_of`] then make one wire resource at a time out of it and the [`Fleet`] of
//! registered workloads, so that a workload that comes or goes costs only its own services.

mod address;
mod check;
mod fleet;
mod lower;

pub use address::{VirtualRanges, default_v6_range};
pub use fleet::{Changes, Fleet, Registered, RegisteredPort};
pub use lower::{
    All, Records, all, allowed_accounts, endpoints_of, mesh_of, routes_of, service_names, service_of, warnings_for,
    workload_of,
};

use crate::diagnostic::Diagnostic;
use crate::name::{DnsLabel, ServiceName};
use crate::resource::{Egress, Enrollment, HttpRoute, Kind, Mesh, Place, Service, Workload};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// One configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The name that diagnostics give it.
    pub file: String,
    /// Its content.
    pub text: String,
}

/// A set of files, read, checked and indexed.
#[derive(Clone, Debug, Default)]
pub struct Compiled {
    /// The mesh's settings, with defaults for what nobody wrote.
    pub mesh: MeshSettings,
    /// Written services.
    pub services: BTreeMap<ServiceName, Service>,
    /// Routes.
    pub routes: BTreeMap<ServiceName, HttpRoute>,
    /// Written workloads.
    pub workloads: BTreeMap<ServiceName, Workload>,
    /// Enrollments.
    pub enrollments: BTreeMap<ServiceName, Enrollment>,
    /// Every resource with its place and text, in the order of files and lines.
    pub objects: Vec<Object>,
    /// All that is wrong or suspicious, in the order of files and lines.
    pub diagnostics: Vec<Diagnostic>,
    /// Service -> routes attached to it, those of precedence first.
    attached: BTreeMap<ServiceName, Vec<ServiceName>>,
    /// Service -> services with a route that sends to it.
    referrers: BTreeMap<ServiceName, BTreeSet<ServiceName>>,
    /// Namespace -> one label of each selector, the rarest -> services with it.
    by_label: BTreeMap<DnsLabel, BTreeMap<(String, String), Vec<ServiceName>>>,
    /// Service -> written workloads without a proxy that answer for it.
    statics: BTreeMap<ServiceName, Vec<ServiceName>>,
    /// Service that nobody wrote -> written workloads without a proxy that name it.
    static_claims: BTreeMap<ServiceName, Vec<ServiceName>>,
}

/// One resource as it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Its kind.
    pub kind: Kind,
    /// Namespace and name; the namespace of a Mesh is `default`.
    pub name: ServiceName,
    /// Where it is written.
    pub place: Place,
    /// Its document.
    pub text: String,
}

/// The settings of the mesh, each written or the default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshSettings {
    /// The trust domain of all identities.
    pub trust_domain: String,
    /// The domain of service host names.
    pub cluster_domain: String,
    /// How long a workload's certificate is valid.
    pub certificate_lifetime: Duration,
    /// How long after its expiry a certificate may still be renewed with its own key.
    pub renewal_grace: Duration,
    /// Where services' addresses come from.
    pub virtual_ranges: VirtualRanges,
    /// What happens to calls that leave the mesh.
    pub egress: Egress,
}

/// The trust domain, and the domain of host names, of a mesh that names none.
pub const DEFAULT_DOMAIN: &str = "mesh.internal";
const DAY: Duration = Duration::from_secs(24 * 3600);

impl Default for MeshSettings {
    fn default() -> Self {
        Self {
            trust_domain: DEFAULT_DOMAIN.to_owned(),
            cluster_domain: DEFAULT_DOMAIN.to_owned(),
            certificate_lifetime: DAY,
            renewal_grace: DAY,
            virtual_ranges: VirtualRanges::of(DEFAULT_DOMAIN),
            egress: Egress::Allow,
        }
    }
}

impl MeshSettings {
    fn of(mesh: &Mesh) -> Self {
        let default = Self::default();
        let trust_domain = mesh.trust_domain.clone().unwrap_or(default.trust_domain);
        let mut virtual_ranges = VirtualRanges::of(&trust_domain);
        virtual_ranges.v4 = mesh.virtual_v4.unwrap_or(virtual_ranges.v4);
        virtual_ranges.v6 = mesh.virtual_v6.unwrap_or(virtual_ranges.v6);
        Self {
            trust_domain,
            cluster_domain: mesh.cluster_domain.clone().unwrap_or(default.cluster_domain),
            certificate_lifetime: mesh.certificate_lifetime.unwrap_or(default.certificate_lifetime),
            renewal_grace: mesh.renewal_grace.unwrap_or(default.renewal_grace),
            virtual_ranges,
            egress: mesh.egress.unwrap_or_default(),
        }
    }
}

impl Compiled {
    /// Whether the set cannot come into force.
    pub fn has_errors(&self) -> bool {
        self.diagnostics.iter().any(Diagnostic::is_error)
    }

    /// The routes attached to a service, those of precedence first.
    pub fn routes_attached_to(&self, service: &ServiceName) -> impl Iterator<Item = &HttpRoute> {
        self.attached.get(service).into_iter().flatten().filter_map(|name| self.routes.get(name))
    }

    /// How many written workloads without a proxy answer for a service.
    pub fn static_workloads_of(&self, service: &ServiceName) -> usize {
        self.statics.get(service).map_or(0, Vec::len)
    }

    /// The services that have a route sending to `service`.
    pub fn services_sending_to(&self, service: &ServiceName) -> impl Iterator<Item = &ServiceName> {
        self.referrers.get(service).into_iter().flatten()
    }

    /// Services that have routes attached.
    pub fn services_with_routes(&self) -> impl Iterator<Item = &ServiceName> {
        self.attached.keys()
    }
}

/// Reads, checks and indexes a set of files. The result does not depend on the order of the files. It is complete also
/// when there are errors, less the documents that have them; whoever puts it into force decides by
/// [`Compiled::has_errors`].
pub fn compile(sources: &[Source]) -> Compiled {
    check::compile(sources)
}

/// Everything that is wrong or suspicious in a set of files.
pub fn lint(sources: &[Source]) -> Vec<Diagnostic> {
    compile(sources).diagnostics
}

#[cfg(test)]
mod tests;

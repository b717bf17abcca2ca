//! The JSON that the control plane's API and the command line exchange: HTTP/1.1, on the unix socket `api.sock` and on
//! the loopback address of the API.
//!
//! | Method and path | Body | Answer |
//! |---|---|---|
//! | `GET /api/v1/version` | | [`Version`] |
//! | `GET /api/v1/mesh` | | [`MeshView`] |
//! | `GET /api/v1/services[?namespace=]` | | `[`[`ServiceView`]`]` |
//! | `GET /api/v1/workloads[?namespace=]` | | `[`[`WorkloadView`]`]` |
//! | `GET /api/v1/objects[?kind=&namespace=&name=]` | | `[`[`ObjectView`]`]` |
//! | `GET /api/v1/stat[?namespace=&window_s=]` | | [`Stat`] |
//! | `GET /api/v1/edges[?namespace=&window_s=&side=best\|outbound\|inbound\|all]` | | [`Edges`] |
//! | `GET /api/v1/check` | | [`Check`] |
//! | `GET /api/v1/backup` | | octets for `sheer control restore` |
//! | `POST /api/v1/apply` | [`Apply`] | [`Applied`] |
//! | `DELETE /api/v1/objects/KIND/NAMESPACE/NAME` | | [`Applied`] |
//! | `POST /api/v1/tokens` | [`TokenRequest`] | [`TokenView`] |
//! | `POST /api/v1/consent` | [`Consent`] | [`ServiceView`] |
//! | `POST /api/v1/links` | | [`Link`] |
//! | `GET /api/v1/identity` | | [`IdentityView`] |
//! | `POST /api/v1/identity/rotate` | [`Rotate`] | [`IdentityView`] |
//! | `POST /api/v1/identity/abort` | | [`IdentityView`] |
//!
//! Every other status than 2xx carries a [`Failure`]. Unknown fields are ignored by both sides, so that a command line
//! may be one release older or newer than its control plane.

mod identity;

pub use identity::{IdentityView, RootState, RootView, Rotate, RotatedView, RotationStep, RotationView, WaitingView};
use serde::{Deserialize, Serialize};

/// Why a call failed, and what to do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What is wrong, in one sentence.
    pub error: String,
    /// How to mend it; empty when the sentence says it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mend: String,
    /// Places in documents, when they are the reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub diagnostics: Vec<Place>,
}

/// A fault or remark at a place in a document.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// How bad it is.
    pub level: Level,
    /// The file, relative to the configuration directory.
    pub file: String,
    /// Line, from 1; 0 when unknown.
    pub line: u32,
    /// Column, from 1; 0 when unknown.
    pub column: u32,
    /// Path inside the object, such as `spec.rules[0].backendRefs[1].name`.
    pub path: String,
    /// What is wrong.
    pub message: String,
    /// How to mend it.
    pub mend: String,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// All is well.
    #[default]
    Ok,
    /// Works, but somebody should look.
    Warn,
    /// Does not work, or is not safe.
    Error,
}

/// What answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// The release.
    pub version: String,
    /// The version of this API: 1.
    pub api: u32,
    /// When it started, in unix seconds.
    pub started: i64,
}

/// The mesh as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeshView {
    /// The trust domain.
    pub trust_domain: String,
    /// The domain of service names.
    pub cluster_domain: String,
    /// Lifetime of workload certificates, in seconds.
    pub certificate_lifetime_s: u64,
    /// Ranges of virtual addresses.
    pub virtual_ranges: Vec<String>,
    /// Revision of the configuration in force.
    pub revision: String,
    /// SHA-256 of the root's public key, in hex, as in join tokens.
    pub root_sha256: String,
    /// When the root ends, in unix seconds.
    pub root_expires: i64,
    /// Where proxies reach the control plane: `HOST:PORT`.
    pub control: Vec<String>,
    /// The configuration directory.
    pub config: String,
    /// The state directory.
    pub state: String,
    /// Services known.
    pub services: usize,
    /// Workloads known.
    pub workloads: usize,
    /// Proxies with a stream open now.
    pub connected: usize,
    /// When it started, in unix seconds.
    pub started: i64,
}

/// A service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceView {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Host names, the full one first.
    pub hosts: Vec<String>,
    /// Virtual addresses.
    pub virtual_ips: Vec<String>,
    /// Ports.
    pub ports: Vec<PortView>,
    /// Nobody wrote it; a workload named it.
    pub implied: bool,
    /// `FILE:LINE` of the document, empty for an implied one.
    pub origin: String,
    /// Endpoints that take traffic.
    pub healthy: usize,
    /// Endpoints that are silent.
    pub suspect: usize,
    /// Endpoints that are leaving.
    pub draining: usize,
    /// Service accounts accepted as this service.
    pub accounts: Vec<String>,
    /// Accounts that claim it and are not accepted; see [`Consent`].
    pub claimed_by: Vec<String>,
    /// Routes attached to it, `NAMESPACE/NAME`.
    pub routes: Vec<String>,
}

/// A port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortView {
    /// The port.
    pub port: u16,
    /// Its name, or empty.
    pub name: String,
    /// `detect`, `http`, `http2`, `grpc`, `tcp` or `tls`.
    pub protocol: String,
    /// Whether it takes traffic now (workloads only).
    #[serde(default)]
    pub ready: bool,
    /// Where its proxy takes mesh connections for it; 0 for a service's port.
    #[serde(default)]
    pub mesh_port: u16,
}

/// State of a workload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkloadState {
    /// Its proxy is connected.
    #[default]
    Connected,
    /// Known from before the control plane's start, not heard from since.
    Held,
    /// Silent.
    Suspect,
    /// Leaving.
    Draining,
    /// Its connection closed a moment ago.
    Leaving,
    /// Its certificate was issued, its proxy has not registered.
    Certified,
}

/// A workload.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadView {
    /// Its uid.
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// SPIFFE ID.
    pub identity: String,
    /// Services it answers for, `NAMESPACE/NAME`.
    pub services: Vec<String>,
    /// Labels.
    pub labels: Vec<(String, String)>,
    /// The address that peers dial.
    pub address: String,
    /// Its network.
    pub network: String,
    /// `REGION/ZONE`.
    pub locality: String,
    /// Ports.
    pub ports: Vec<PortView>,
    /// `watch`, `permissive` or `strict`.
    pub mode: String,
    /// How its traffic is captured.
    pub capture: String,
    /// Release of its proxy.
    pub version: String,
    /// Host name.
    pub host: String,
    /// State.
    pub state: WorkloadState,
    /// When it was last heard of, in unix seconds.
    pub last_seen: i64,
    /// When its certificate ends, in unix seconds; 0 when none was issued.
    pub certificate_expires: i64,
    /// Plaintext exceptions in force, one line each.
    #[serde(default)]
    pub exceptions: Vec<String>,
    /// Resources that its proxy refused.
    #[serde(default)]
    pub refused: Vec<RefusedView>,
    /// Warnings given when it registered.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// A resource that a proxy did not apply.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedView {
    /// Type URL.
    pub type_url: String,
    /// Resource name.
    pub name: String,
    /// Version.
    pub version: String,
    /// Reason.
    pub reason: String,
    /// Field path.
    pub place: String,
}

/// A written object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectView {
    /// `apiVersion`.
    pub api_version: String,
    /// Kind.
    pub kind: String,
    /// Namespace; empty for kinds without one.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// `FILE:LINE`.
    pub origin: String,
    /// Whether `apply` wrote it, so that `apply` and `delete` may change it.
    pub applied: bool,
    /// The text of the document.
    pub text: String,
}

/// `sheer apply`, `sheer diff` (with `dry_run`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Apply {
    /// The files to take objects from.
    pub files: Vec<SourceFile>,
    /// Say what would change, change nothing.
    #[serde(default)]
    pub dry_run: bool,
}

/// A file of YAML documents.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFile {
    /// Its name as the user gave it, for messages; `-` for standard input.
    pub name: String,
    /// Its content.
    pub text: String,
}

/// What `apply`, `diff` or `delete` did or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// One for each object.
    pub changes: Vec<Change>,
    /// Warnings that do not prevent the change.
    #[serde(default)]
    pub warnings: Vec<Place>,
}

/// One object's change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Kind.
    pub kind: String,
    /// Namespace; empty for kinds without one.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// What happens to it.
    pub action: Action,
    /// The file that holds it, relative to the configuration directory.
    pub file: String,
    /// The text before; empty when there was none.
    #[serde(default)]
    pub before: String,
    /// The text after; empty when it is deleted.
    #[serde(default)]
    pub after: String,
}

/// What happens to an object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// It is new.
    Created,
    /// It differs.
    Updated,
    /// It is the same.
    #[default]
    Unchanged,
    /// It is gone.
    Deleted,
}

/// `sheer token create`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRequest {
    /// Namespace of the workloads that may join with it.
    pub namespace: String,
    /// Their service account.
    pub service_account: String,
    /// How long it lasts, in seconds. Default 600.
    #[serde(default = "ten_minutes")]
    pub ttl_s: u64,
    /// How many keys may use it. Default 1.
    #[serde(default = "once")]
    pub uses: u32,
    /// Where joins may come from; empty is anywhere. Addresses in these ranges may also be registered.
    #[serde(default)]
    pub from: Vec<String>,
    /// Addresses of the control plane to write into it, `HOST:PORT`; empty: those it knows of itself.
    #[serde(default)]
    pub control: Vec<String>,
}

fn ten_minutes() -> u64 {
    600
}

fn once() -> u32 {
    1
}

/// A new join token.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenView {
    /// The token. It is shown once and stored as a hash.
    pub token: String,
    /// Its public part, named in `check` and logs.
    pub id: String,
    /// When it ends, in unix seconds.
    pub expires: i64,
}

impl std::fmt::Debug for TokenView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenView").field("id", &self.id).field("expires", &self.expires).finish_non_exhaustive()
    }
}

/// Consent to a change of the service accounts that may answer for a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Consent {
    /// Namespace of the service.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The accounts accepted from now on, instead of those before.
    pub accounts: Vec<String>,
}

/// A link for a browser. Its code is valid once, for 60 seconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// The address, with the code in its fragment.
    pub url: String,
}

/// Figures of one direction of traffic over a window, or since the control plane started.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Requests answered or failed (for tcp: connections ended).
    pub requests: u64,
    /// Of them, those that failed: a reason of the mesh, a 5xx status, or a gRPC status that is an error of the server.
    pub failures: u64,
    /// Of them, those that travelled in plaintext; what failed before it was sent did not travel.
    #[serde(default)]
    pub plaintext: u64,
    /// Of them, those whose client left before it had the whole answer: neither successes nor failures.
    #[serde(default)]
    pub gone: u64,
    /// The share that succeeded of those whose client stayed, 0 to 1; none without such requests.
    pub success_rate: Option<f64>,
    /// Requests a second.
    pub rps: f64,
    /// Median latency in seconds.
    pub p50_s: Option<f64>,
    /// 95th percentile in seconds.
    pub p95_s: Option<f64>,
    /// 99th percentile in seconds.
    pub p99_s: Option<f64>,
    /// Mean time that the mesh added to a request, in seconds.
    pub mesh_mean_s: Option<f64>,
    /// Bytes from source to destination.
    pub bytes_sent: u64,
    /// Bytes from destination to source.
    pub bytes_received: u64,
    /// Connections opened.
    pub connections_opened: u64,
    /// Connections open now.
    pub connections_open: i64,
    /// Counts by status and reason, most frequent first.
    pub responses: Vec<Outcome>,
}

/// How often one outcome was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Outcome {
    /// HTTP status; 0 for tcp.
    pub status: u32,
    /// gRPC status; -1 when there is none.
    pub grpc_status: i32,
    /// Reason of a failure of the mesh; empty otherwise.
    pub reason: String,
    /// How often.
    pub count: u64,
}

/// `sheer stat`: what each service answered.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stat {
    /// Length of the window in seconds; it may be shorter than was asked, just after a start.
    pub window_s: u64,
    /// One for each service with traffic or workloads.
    pub rows: Vec<StatRow>,
}

/// One service.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StatRow {
    /// `NAMESPACE/NAME`.
    pub service: String,
    /// Workloads that take traffic for it.
    pub ready: usize,
    /// Workloads that answer for it.
    pub workloads: usize,
    /// The share by mutual TLS of the requests that travelled, 0 to 1; none without any.
    pub mtls: Option<f64>,
    /// Over the window.
    pub window: Figures,
    /// Since the control plane started: exact, to the request.
    pub total: Figures,
}

/// `sheer edges`: who calls whom.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Edges {
    /// Length of the window in seconds.
    pub window_s: u64,
    /// One for each source, destination, route and side.
    pub rows: Vec<EdgeRow>,
}

/// One edge.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EdgeRow {
    /// `outbound` as the caller's proxy saw it, `inbound` as the destination's did.
    pub side: String,
    /// `NAMESPACE/NAME`, or `unknown`.
    pub source: String,
    /// The service that was called.
    pub destination: String,
    /// The service that answered, where a route chose it; otherwise empty.
    pub backend: String,
    /// `NAMESPACE/NAME` of the route, or `default`.
    pub route: String,
    /// `http1`, `http2`, `grpc` or `tcp`.
    pub protocol: String,
    /// Whether it was mutual TLS. Where it was not, `plaintext` says how much travelled so.
    pub mtls: bool,
    /// Over the window.
    pub window: Figures,
    /// Since the control plane started.
    pub total: Figures,
}

/// `sheer check`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// The worst level of the findings.
    pub level: Level,
    /// What was looked at, worst first.
    pub findings: Vec<Finding>,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// How bad it is.
    pub level: Level,
    /// A stable name, such as `config`, `certificate`, `refused`, `silent`, `pin`, `plaintext`, `token`, `store`, `root`.
    pub topic: String,
    /// What it is about: a file, a workload's uid, a service.
    pub subject: String,
    /// What is the case.
    pub what: String,
    /// Why it is so, or why it matters.
    pub why: String,
    /// How to mend it; empty when all is well.
    pub mend: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_request_needs_only_the_identity() {
        let request: TokenRequest =
            serde_json::from_str(r#"{"namespace":"default","service_account":"web","later":1}"#).unwrap();
        assert_eq!((request.ttl_s, request.uses), (600, 1));
    }

    #[test]
    fn a_token_is_not_printed_by_debug() {
        let view = TokenView { token: "sheer1.secret".into(), id: "x".into(), expires: 1 };
        assert!(!format!("{view:?}").contains("secret"));
    }
}

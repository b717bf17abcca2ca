//! The plan of a proxy: all that its supervisor decided before it starts.
//!
//! The supervisor keeps the listening sockets and hands them over by number, so that a proxy can be replaced under a
//! living workload. The plan itself arrives as JSON through an inherited memory file; `sheer proxy` makes its own.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use sheer_core::name::{DnsLabel, ServiceName};
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::path::PathBuf;

/// The user id of proxies on a machine where root starts them and no user `sheer` exists. It lies in the range that
/// systemd keeps for dynamic users, so that no account of people or packages has it.
pub const PROXY_USER: u32 = 64764;

/// Everything a proxy must know to start.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// Namespace and name of the service that the workload answers for.
    pub service: String,
    /// The workload's name, unique in its namespace.
    pub name: String,
    /// The service account; defaults to the service's name.
    pub service_account: String,
    /// Labels of the workload.
    pub labels: Vec<(String, String)>,
    /// The ports that the application listens on.
    pub ports: Vec<PlannedPort>,
    /// Path of an HTTP health check on the first HTTP port; without one an accepting port is healthy.
    pub health: Option<String>,
    /// How traffic gets to the proxy.
    pub capture: Capture,
    /// What is enforced.
    pub mode: Mode,
    /// Control planes, in order of preference: `unix:PATH` or `HOST:PORT`.
    pub control: Vec<String>,
    /// A file with a join token, for the first start away from the control plane's host.
    pub join_token_file: Option<PathBuf>,
    /// Directory of the certificate, the key and the last good configuration (0700).
    pub state: PathBuf,
    /// The address peers dial; unset: the address of the stream to the control plane.
    pub address: Option<std::net::IpAddr>,
    /// The network that the address belongs to.
    pub network: String,
    /// `region/zone`.
    pub locality: String,
    /// Listening sockets, made by the supervisor.
    pub listeners: Vec<Listener>,
    /// A socket on which the keeper of the workload's namespace hands out sockets made inside it
    /// ; unset where the proxy shares the workload's namespace.
    pub namespace_sockets: Option<RawFd>,
    /// `/proc/net/tcp` and `tcp6` of the workload's namespace, opened inside it, to see which ports listen.
    pub namespace_tables: Vec<RawFd>,
    /// The socket to the supervisor: [`ToSupervisor`] and [`FromSupervisor`] as JSON lines.
    pub supervisor: Option<RawFd>,
    /// The user id that the proxy changes to, with root; the capture rules know its traffic by it.
    pub proxy_user: Option<u32>,
    /// Secrets of the forward proxy, for [`Capture::Env`].
    pub env_credentials: Option<Credentials>,
    /// The user id whose connections [`Capture::Env`] admits.
    pub workload_user: Option<u32>,
    /// Resolvers of the host, asked for everything that is not the mesh's.
    pub resolvers: Vec<SocketAddr>,
    /// Ports of the host's loopback that the workload may reach.
    pub host_ports: Vec<u16>,
    /// From where plaintext callers are believed when they tell where a request was before (`X-Forwarded-*` and others).
    #[serde(default)]
    pub trust_forwarded: Vec<IpNet>,
    /// Whether an access log line is written for each request (JSON on standard error).
    pub access_log: bool,
    /// Whether the supervisor started the workload. Then it says when that has gone, and until then its calls are
    /// carried, also while it leaves.
    #[serde(default)]
    pub command: bool,
    /// How long in-flight requests may last after draining began, in milliseconds.
    pub drain_grace_ms: u64,
    /// Whether a proxy of this workload served before: what listens was found well, and is taken for well at once.
    #[serde(default)]
    pub successor: bool,
}

/// One port of the application.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedPort {
    /// The port.
    pub port: u16,
    /// The declared protocol.
    pub protocol: Protocol,
}

/// A declared protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// None: look at the first bytes.
    #[default]
    Detect,
    /// HTTP/1.1, or HTTP/2 with prior knowledge.
    Http,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// gRPC over HTTP/2.
    Grpc,
    /// Bytes.
    Tcp,
    /// The application's own TLS, passed through.
    Tls,
}

impl From<Protocol> for sheer_core::snapshot::Protocol {
    fn from(declared: Protocol) -> Self {
        match declared {
            Protocol::Detect => Self::Detect,
            Protocol::Http => Self::Http,
            Protocol::Http2 => Self::Http2,
            Protocol::Grpc => Self::Grpc,
            Protocol::Tcp => Self::Tcp,
            Protocol::Tls => Self::Tls,
        }
    }
}

/// How traffic gets to the proxy; see ARCHITECTURE.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Capture {
    /// The workload has a network namespace of its own; the proxy is outside.
    Netns,
    /// nftables matches a cgroup or user in the host's namespace.
    Cgroup,
    /// The whole namespace that the proxy is in.
    Here,
    /// Forward proxy and SOCKS5, by environment variables.
    Env,
    /// Declared upstreams and published ports only.
    None,
}

/// What is enforced on connections to the workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// See, change nothing: original destination, no mutual TLS.
    Watch,
    /// Mutual TLS between mesh peers; plaintext is admitted as unauthenticated.
    Permissive,
    /// Mesh peers only.
    Strict,
}

/// A listening socket and what arrives on it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Listener {
    /// Its number in the proxy.
    pub fd: RawFd,
    /// What arrives.
    pub role: Role,
}

/// What arrives on a listener.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Captured connections of the workload, with their original destination.
    Outbound,
    /// Mesh connections (and, where it is redirected traffic, plaintext) to the workload.
    Inbound,
    /// DNS over UDP, bound to the address that is asked.
    DnsUdp,
    /// DNS over TCP.
    DnsTcp,
    /// The same where plaintext means this port of the application, which it cannot name itself. Before a workload that
    /// does not share its network with the proxy.
    Door {
        /// The application's port.
        port: u16,
    },
    /// Plaintext from people on this host, for this port of the application.
    Publish {
        /// The application's port.
        port: u16,
    },
    /// Connections for one service, whatever their destination.
    Upstream {
        /// The service.
        service: ServiceRef,
        /// Its port.
        port: u16,
    },
    /// HTTP forward proxy and SOCKS5.
    Forward,
    /// Administration (unix socket).
    Admin,
    /// Metrics, readiness, liveness.
    Metrics,
}

/// A service by name, as written in a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceRef {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

/// A user and password.
#[derive(Clone, Serialize, Deserialize)]
pub struct Credentials {
    /// User.
    pub user: String,
    /// Password.
    pub password: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("user", &self.user).finish_non_exhaustive()
    }
}

/// What a proxy tells its supervisor, one JSON object a line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum ToSupervisor {
    /// Certificate and configuration are there, or the last good ones from disk; the command may start.
    Ready,
    /// It cannot start: what is wrong and how to mend it.
    Failed {
        /// For people.
        message: String,
    },
    /// Nothing is open any more.
    Drained,
}

/// What a supervisor tells its proxy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum FromSupervisor {
    /// Begin to drain: tell control plane and peers, serve on for a while.
    Drain,
    /// Another proxy has taken this one's place and accepts what comes new: finish what is open.
    Replaced,
    /// The command has ended: its endpoints leave at once.
    Gone,
    /// So many more packets that cannot be carried were refused.
    Refused {
        /// Datagrams that are not DNS.
        udp: u64,
        /// Neither TCP nor UDP.
        other: u64,
    },
}

impl Plan {
    /// The service's name.
    ///
    /// # Errors
    /// When the plan holds no valid one.
    pub fn service_name(&self) -> Result<ServiceName, sheer_core::name::NameError> {
        ServiceName::parse(&self.service)
    }

    /// The namespace of service and workload.
    ///
    /// # Errors
    /// When the plan holds no valid one.
    pub fn namespace(&self) -> Result<DnsLabel, sheer_core::name::NameError> {
        Ok(self.service_name()?.namespace)
    }
}

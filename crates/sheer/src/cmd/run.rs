//! `sheer run`: a command with its proxy beside it.

use crate::supervise;
use clap::ValueEnum;
use ipnet::IpNet;
use sheer_core::name::{DnsLabel, ServiceName};
use sheer_proxy::plan::{Mode, PlannedPort, Protocol, ServiceRef};
use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;

/// Flags of `sheer run`.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Examples:
  sheer run api --port 8081 -- python3 -m http.server 8081
  sheer run web --port 8080 --publish 8080 -- ./web        # calls http://api/, is reached at localhost:8080
  sheer run shop/cart --port 7000/grpc --host-port 5432 -- ./cart")]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) workload: Workload,

    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

/// What `sheer run` and `sheer proxy` take to stand beside a workload.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Workload {
    /// The service that the workload answers for
    #[arg(value_name = "[NS/]SERVICE", value_parser = ServiceName::parse)]
    pub(crate) service: ServiceName,

    /// A port that the application listens on, and what is spoken there
    #[arg(long, value_name = "PORT[/http|/http2|/grpc|/tcp|/tls]", value_parser = port)]
    pub(crate) port: Vec<PlannedPort>,

    /// The workload's name [default: SERVICE-1 or the next free number, with a control plane elsewhere SERVICE-HOST-1]
    #[arg(long, value_parser = DnsLabel::parse)]
    pub(crate) name: Option<DnsLabel>,

    /// The service account that its identity names [default: the service's name]
    #[arg(long, value_name = "SA", value_parser = DnsLabel::parse)]
    pub(crate) service_account: Option<DnsLabel>,

    /// A label of the workload
    #[arg(long, value_name = "K=V", value_parser = label)]
    pub(crate) label: Vec<(String, String)>,

    /// Serve a port of the application to this host, in plaintext [default address: localhost]
    #[arg(long, value_name = "[ADDR:]PORT[=PORT]", value_parser = publish)]
    pub(crate) publish: Vec<Publish>,

    /// Let the application reach a service at an address of its own choice
    #[arg(long, value_name = "ADDR:PORT=[NS/]SERVICE[:PORT]", value_parser = upstream)]
    pub(crate) upstream: Vec<Upstream>,

    /// A path that answers 2xx when the application is healthy [default: it is healthy when its port accepts]
    #[arg(long, value_name = "PATH", value_parser = health)]
    pub(crate) health: Option<String>,

    /// Run the command as this user (with root) [default: who called sudo, or nobody]
    #[arg(long, value_name = "USER")]
    pub(crate) user: Option<String>,

    /// Run the command as this group (with root) [default: the user's]
    #[arg(long, value_name = "GROUP")]
    pub(crate) group: Option<String>,

    /// Let the workload reach this port of the host's loopback, at its own localhost
    #[arg(long, value_name = "PORT")]
    pub(crate) host_port: Vec<u16>,

    /// Believe the X-Forwarded-*, Forwarded and X-Real-IP of plaintext callers from here [default: nobody's]
    #[arg(long, value_name = "CIDR")]
    pub(crate) trust_forwarded: Vec<IpNet>,

    /// The address that mesh peers dial [default: the one from which the control plane is reached]
    #[arg(long, value_name = "IP")]
    pub(crate) address: Option<IpAddr>,

    /// The network that the address belongs to
    #[arg(long, value_name = "NET", default_value = "default")]
    pub(crate) network: String,

    /// Where the workload runs
    #[arg(long, value_name = "REGION/ZONE")]
    pub(crate) locality: Option<String>,

    /// How traffic gets to the proxy
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) capture: CaptureChoice,

    /// With --capture netns: a network namespace that exists, by name ('ip netns') or path, instead of one of its own
    #[arg(long, value_name = "NAME")]
    pub(crate) netns: Option<PathBuf>,

    /// What is enforced [default: strict where Sheer makes the namespace, watch where it adopts, else permissive]
    #[arg(long, value_enum)]
    pub(crate) mode: Option<ModeChoice>,

    /// With --capture cgroup: the systemd unit whose traffic is taken
    #[arg(long, value_name = "UNIT", conflicts_with = "cgroup")]
    pub(crate) unit: Option<String>,

    /// With --capture cgroup: the control group whose traffic is taken, as in /proc/PID/cgroup
    #[arg(long, value_name = "PATH")]
    pub(crate) cgroup: Option<String>,

    /// A control plane [default: the socket of this user's 'sheer up', or of this host's]
    #[arg(long, value_name = "HOST:PORT|unix:PATH")]
    pub(crate) control: Vec<String>,

    /// A join token, needed for the first start away from the control plane's host
    #[arg(long, value_name = "FILE")]
    pub(crate) join_token_file: Option<PathBuf>,

    /// Where certificates and the last good configuration are kept [default: the user's state directory]
    #[arg(long, value_name = "DIR")]
    pub(crate) state: Option<PathBuf>,

    /// The domain of the mesh's names
    #[arg(long, value_name = "DOMAIN", default_value = "mesh.internal")]
    pub(crate) domain: String,

    /// Where mesh peers connect: a port of this host [default: a free one; 15006 with --capture here]. PORT=PORT: a
    /// further one where plaintext, as far as it is admitted, means that port of the application
    #[arg(long, value_name = "PORT[=PORT]", value_parser = inbound)]
    pub(crate) inbound_port: Vec<Inbound>,

    /// Where captured connections go in a shared namespace [default: a free one; 15001 with --capture here]
    #[arg(long, value_name = "PORT")]
    pub(crate) outbound_port: Option<u16>,

    /// Where captured name queries go in a shared namespace [default: a free one; 15053 with --capture here]
    #[arg(long, value_name = "PORT")]
    pub(crate) dns_port: Option<u16>,

    /// Where metrics, readiness and liveness are served [default: a free port of 127.0.0.1; 15020 with --capture here]
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) metrics: Option<SocketAddr>,

    /// Write a line of JSON for each request to standard error
    #[arg(long)]
    pub(crate) access_log: bool,

    /// How long open requests and connections may last when the workload is stopped
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub(crate) drain_grace: u64,

    /// The program that is run as the proxy
    #[arg(long, value_name = "FILE", hide = true)]
    pub(crate) proxy_program: Option<PathBuf>,
}

/// `--capture`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CaptureChoice {
    /// netns for what Sheer starts; cgroup for a named unit, control group or user; else here
    Auto,
    /// A network namespace of its own
    Netns,
    /// The traffic of a unit, a control group or a user in this namespace
    Cgroup,
    /// The whole namespace, as in a container or pod
    Here,
    /// HTTP proxy and SOCKS variables; needs no privileges and captures what heeds them
    Env,
    /// --upstream and --publish alone
    None,
}

/// `--mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ModeChoice {
    /// See, change nothing
    Watch,
    /// Mutual TLS between mesh peers; plaintext is admitted as unauthenticated
    Permissive,
    /// Mesh peers alone
    Strict,
}

impl From<ModeChoice> for Mode {
    fn from(choice: ModeChoice) -> Self {
        match choice {
            ModeChoice::Watch => Self::Watch,
            ModeChoice::Permissive => Self::Permissive,
            ModeChoice::Strict => Self::Strict,
        }
    }
}

/// A port of this host where mesh connections arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Inbound {
    /// The port; 0 is a free one.
    pub(crate) port: u16,
    /// The application's port that plaintext means there; none at the one door for all.
    pub(crate) target: Option<u16>,
}

/// `--publish`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Publish {
    /// Unset: loopback in both families.
    pub(crate) address: Option<IpAddr>,
    /// The port of the host.
    pub(crate) port: u16,
    /// The port of the application.
    pub(crate) target: u16,
}

/// `--upstream`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Upstream {
    /// Where it listens.
    pub(crate) listen: SocketAddr,
    /// The service; without a namespace, the workload's own.
    pub(crate) namespace: Option<String>,
    /// Its name.
    pub(crate) name: String,
    /// Its port.
    pub(crate) port: u16,
}

impl Upstream {
    /// The service, seen from a workload in `namespace`.
    pub(crate) fn service(&self, namespace: &DnsLabel) -> ServiceRef {
        let own = || namespace.as_str().to_owned();
        ServiceRef { namespace: self.namespace.clone().unwrap_or_else(own), name: self.name.clone() }
    }
}

/// Runs the command until it ends.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    supervise::run(&args.workload, &args.command)
}

fn number(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err(format!("'{text}' is no port; give a number from 1 to 65535")),
        Ok(port) => Ok(port),
    }
}

fn port(text: &str) -> Result<PlannedPort, String> {
    let (port, protocol) = text.split_once('/').map_or((text, None), |(port, protocol)| (port, Some(protocol)));
    let protocol = match protocol {
        None => Protocol::Detect,
        Some("http") => Protocol::Http,
        Some("http2") => Protocol::Http2,
        Some("grpc") => Protocol::Grpc,
        Some("tcp") => Protocol::Tcp,
        Some("tls") => Protocol::Tls,
        Some(other) => return Err(format!("'{other}' is no protocol; give http, http2, grpc, tcp or tls")),
    };
    Ok(PlannedPort { port: number(port)?, protocol })
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err(format!("'{text}' is no label; give KEY=VALUE")),
    }
}

fn health(text: &str) -> Result<String, String> {
    let valid = text.starts_with('/') && text.bytes().all(|byte| byte.is_ascii_graphic());
    if valid { Ok(text.into()) } else { Err(format!("'{text}' is no path; give one that begins with '/'")) }
}

fn publish(text: &str) -> Result<Publish, String> {
    let (from, target) = text.split_once('=').map_or((text, None), |(from, target)| (from, Some(target)));
    let (address, port) = match from.rsplit_once(':') {
        None => (None, number(from)?),
        Some((address, port)) => {
            let plain = address.trim_start_matches('[').trim_end_matches(']');
            let parsed = match plain {
                "localhost" => None,
                "*" => Some(Ipv4Addr::UNSPECIFIED.into()),
                _ => Some(plain.parse().map_err(|_| format!("'{address}' is no IP address"))?),
            };
            (parsed, number(port)?)
        }
    };
    Ok(Publish { address, port, target: target.map_or(Ok(port), number)? })
}

fn inbound(text: &str) -> Result<Inbound, String> {
    let (port, target) = text.split_once('=').map_or((text, None), |(port, target)| (port, Some(target)));
    // 0 is a free one.
    let port = port.parse().map_err(|_| format!("'{port}' is no port; give 0 to 65535"))?;
    Ok(Inbound { port, target: target.map(number).transpose()? })
}

fn upstream(text: &str) -> Result<Upstream, String> {
    let (listen, service) = text.split_once('=').ok_or("give ADDR:PORT=[NS/]SERVICE[:PORT]")?;
    let listen: SocketAddr = match listen.strip_prefix("localhost:") {
        Some(port) => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), number(port)?),
        None => listen.parse().map_err(|_| format!("'{listen}' is no address and port, such as 127.0.0.1:5432"))?,
    };
    let (service, port) = match service.split_once(':') {
        Some((service, port)) => (service, number(port)?),
        None => (service, listen.port()),
    };
    if listen.port() == 0 {
        return Err("the port of an upstream must be given, the application has to know it".into());
    }
    let parsed = ServiceName::parse(service).map_err(|error| error.to_string())?;
    let namespace = service.contains('/').then(|| parsed.namespace.as_str().to_owned());
    Ok(Upstream { listen, namespace, name: parsed.name.as_str().to_owned(), port })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_and_protocols() {
        assert_eq!(port("80").unwrap(), PlannedPort { port: 80, protocol: Protocol::Detect });
        assert_eq!(port("80/grpc").unwrap().protocol, Protocol::Grpc);
        for bad in ["", "0", "65536", "80/", "80/udp", "x/http"] {
            assert!(port(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn published_ports() {
        let publish = |text| publish(text).unwrap();
        assert_eq!(publish("8080"), Publish { address: None, port: 8080, target: 8080 });
        assert_eq!(publish("localhost:80=8080"), Publish { address: None, port: 80, target: 8080 });
        assert_eq!(publish("10.0.0.1:80").address, Some(IpAddr::from([10, 0, 0, 1])));
        assert_eq!(publish("[::]:80=1").address, Some("::".parse().unwrap()));
        for bad in ["", "0", "a:1", "1=", "1=0"] {
            assert!(super::publish(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn inbound_ports() {
        assert_eq!(inbound("15006").unwrap(), Inbound { port: 15006, target: None });
        assert_eq!(inbound("0=8081").unwrap(), Inbound { port: 0, target: Some(8081) });
        for bad in ["", "x", "1=", "1=0", "70000"] {
            assert!(inbound(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn upstreams() {
        let db = upstream("127.0.0.1:5432=shop/db:6432").unwrap();
        assert_eq!((db.name.as_str(), db.namespace.as_deref(), db.port), ("db", Some("shop"), 6432));
        let own = upstream("localhost:5432=db").unwrap();
        assert_eq!((own.namespace.clone(), own.port), (None, 5432));
        let namespace = DnsLabel::parse("blue").unwrap();
        assert_eq!(own.service(&namespace).namespace, "blue");
        for bad in ["", "5432=db", "127.0.0.1:0=db", "127.0.0.1:1=a/b/c", "127.0.0.1:1=db:x"] {
            assert!(upstream(bad).is_err(), "{bad}");
        }
    }
}

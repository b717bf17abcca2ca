//! The start of a workload: namespaces, sockets, the proxy's plan.

use super::adopt::{Adopted, Cgroup, Facts, Whose};
use super::notify::Notify;
use super::proxy::Proxy;
use super::requests::Requests;
use super::rundir::{Process, Record, RunDir};
use super::settle::Settled;
use super::signals::Signals;
use super::{Phase, Supervisor, account, made, memory_file};
use crate::cmd::run::Workload;
use crate::dirs::{self, Dirs};
use crate::keeper::namespace::{NamespacePlan, Upstream};
use crate::keeper::netlink::Netlink;
use crate::keeper::{self, KeeperPlan};
use crate::sockets::{self, EVERYWHERE, Kind, LOOPBACK};
use anyhow::{Context, Result};
use sheer_proxy::capture::rules::{self, OtherUdp};
use sheer_proxy::plan::{Capture, Credentials, Listener, Mode, Plan, Role};
use sheer_proxy::platform::Account;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The file below a workload's state that says at which port its peers found it.
const INBOUND_PORT: &str = "inbound-port";

/// Where root keeps the state of proxies: apart from the control plane's, which no proxy's user may pass through.
const ROOT_STATE: &str = "/var/lib/sheer-proxies";

/// Sockets for the proxy, in the order in which they were made.
#[derive(Default)]
struct Sockets {
    listeners: Vec<Listener>,
    kept: Vec<OwnedFd>,
}

impl Sockets {
    fn add(&mut self, role: Role, socket: OwnedFd) {
        self.listeners.push(Listener { fd: socket.as_raw_fd(), role });
        self.kept.push(socket);
    }
}

/// Starts keeper and proxy. What was begun ends with an error: the keeper hears nobody any more, the caller removes the
/// run directory.
pub(super) fn launch(
    workload: &Workload,
    settled: Settled,
    command: &[OsString],
    run: &RunDir,
    name: &str,
    signals: Signals,
    dirs: &Dirs,
) -> Result<Supervisor> {
    let namespace = settled.service.namespace.clone();
    let proxy_account = account::proxy();
    let mut sockets = Sockets::default();
    let mut record = Record {
        service: settled.service.to_string(),
        name: name.to_owned(),
        capture: format!("{:?}", settled.capture).to_lowercase(),
        supervisor: Process::of(std::process::id().cast_signed()),
        account: settled.account.ids.clone(),
        set: settled.account.set.clone(),
        ..Record::default()
    };

    // Of the host's network.
    let shared = matches!(settled.capture, Capture::Here | Capture::Cgroup);
    let base = state_base(workload, dirs)?;
    let state = state(&base, namespace.as_str(), name, proxy_account)?;
    let inbound = host_listeners(workload, &settled, &state, &mut sockets, &mut record)?;
    let captured = if shared { Some(shared_listeners(workload, &settled, &mut sockets)?) } else { None };
    let credentials = if settled.capture == Capture::Env { Some(forward(&mut sockets, &mut record)?) } else { None };
    let upstreams: Vec<Upstream> = workload
        .upstream
        .iter()
        .map(|upstream| Upstream {
            listen: upstream.listen,
            service: upstream.service(&namespace),
            port: upstream.port,
        })
        .collect();
    if settled.capture != Capture::Netns {
        for upstream in &upstreams {
            let socket = sockets::tcp(upstream.listen)
                .map_err(|error| in_use(error, "--upstream", upstream.listen, "another address or port"))?;
            sockets.add(Role::Upstream { service: upstream.service.clone(), port: upstream.port }, socket);
        }
    }
    sockets.add(Role::Admin, admin(run)?);

    // Rules of a shared network are listed before they are made, so that whoever cleans up finds them.
    let adopted = match &captured {
        Some(captured) => Some(adopt(workload, &settled, name, captured, inbound, proxy_account)?),
        None => None,
    };
    if adopted.is_some() {
        record.tables.push(rules::table(namespace.as_str(), name));
        record.shared = true;
    }
    let requests = Requests::begin(&run.path)?;
    let notify = Notify::begin(&run.path, settled.account.ids.as_ref().map(|ids| ids.0))?;
    let mut unset: Vec<String> = ["WATCHDOG_PID", "SHEER_PLAN_FD"].map(String::from).into();
    match &notify {
        Some(notify) => record.set.push(("NOTIFY_SOCKET".into(), notify.path.display().to_string())),
        None => unset.push("NOTIFY_SOCKET".into()),
    }

    // Of the workload's network.
    let domain = &workload.domain;
    let keeper_plan = KeeperPlan {
        namespace: (settled.capture == Capture::Netns).then(|| NamespacePlan {
            // A name is relative to where 'ip netns' keeps them; an absolute path replaces that.
            join: workload.netns.as_ref().map(|name| PathBuf::from("/run/netns").join(name)),
            // Of a directory that somebody named, only what is made there: the rest may be the command's own.
            hide: vec![base.join(namespace.as_str()), dirs.state.clone(), ROOT_STATE.into()],
            search: vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.clone()],
            host_ports: workload.host_port.clone(),
            upstreams,
            ports: workload.port.iter().map(|port| port.port).collect(),
        }),
        run_dir: run.path.clone(),
        job: nix::unistd::getpgrp().as_raw(),
        account: settled.account.ids.clone(),
        set: record.set.clone(),
        unset,
    };
    run.write(&record)?;
    if record.shared {
        let mut netlink = Netlink::open()?;
        // Fails without IPv6, and then nothing is delivered over it.
        let _ = netlink.add_address(rules::DELIVERY_V6.into());
        // Who watches resolves no virtual address.
        if settled.mode != Mode::Watch && !routed(Ipv4Addr::new(240, 0, 0, 1)) {
            let added = netlink.add_virtual_route();
            added.context("this host has no route for virtual addresses, and none can be added for 240.0.0.0/4")?;
        }
    }
    let (keeper, link) = keeper::spawn(&keeper_plan, command)?;
    record.keeper = Process::of(keeper.id().cast_signed());
    let (roles, tables, mut descriptors) = made(link.as_fd())?;
    let mut rest = descriptors.split_off(roles.len().min(descriptors.len()));
    for (role, socket) in roles.into_iter().zip(descriptors) {
        sockets.add(role, socket);
    }
    let vending = rest.split_off(tables.min(rest.len())).pop();

    let token = token(workload, &mut sockets)?;
    let control = if workload.control.is_empty() {
        vec![format!("unix:{}", nearest_control(dirs).display())]
    } else {
        workload.control.clone()
    };
    let plan = Plan {
        service: settled.service.to_string(),
        name: name.to_owned(),
        service_account: workload
            .service_account
            .as_ref()
            .map_or_else(|| settled.service.name.to_string(), ToString::to_string),
        labels: workload.label.clone(),
        ports: workload.port.clone(),
        health: workload.health.clone(),
        capture: settled.capture,
        mode: settled.mode,
        control: control.clone(),
        join_token_file: token,
        state,
        address: workload.address,
        network: workload.network.clone(),
        locality: workload.locality.clone().unwrap_or_default(),
        listeners: sockets.listeners,
        namespace_sockets: vending.as_ref().map(AsRawFd::as_raw_fd),
        namespace_tables: rest.iter().map(AsRawFd::as_raw_fd).collect(),
        supervisor: None,
        proxy_user: proxy_account.map(|(user, _)| user),
        env_credentials: credentials,
        workload_user: Some(workload_user(&settled)),
        resolvers: resolvers(),
        host_ports: workload.host_port.clone(),
        trust_forwarded: workload.trust_forwarded.clone(),
        access_log: workload.access_log,
        command: !command.is_empty(),
        drain_grace_ms: workload.drain_grace.saturating_mul(1000),
        successor: false,
    };
    let mut kept = sockets.kept;
    kept.extend(vending);
    kept.extend(rest);
    let program = workload.proxy_program.clone().unwrap_or_else(|| "/proc/self/exe".into());
    let account = proxy_account.map(|(user, group)| Account { user, group, groups: vec![group] });
    let proxy = Proxy::start(program, plan, kept, account)?;
    record.proxy = proxy.pid().and_then(Process::of);
    run.write(&record)?;

    let announcement = announcement(&record, namespace.as_str());
    Ok(Supervisor {
        signals,
        run: None,
        record,
        keeper,
        link,
        proxy,
        notify,
        requests,
        upgrade: None,
        adopted,
        grace: Duration::from_secs(workload.drain_grace),
        has_command: !command.is_empty(),
        phase: Phase::Starting,
        started: Instant::now(),
        hint: Some(format!(
            "waiting for the control plane at {}; start one with 'sheer up', or name one by --control",
            control.join(", ")
        )),
        announcement,
        status: 0,
        look_at: Instant::now(),
        told_refused: false,
    })
}

/// The mesh's door, doors for plaintext to one port, published ports and metrics; the port of the first.
fn host_listeners(
    workload: &Workload,
    settled: &Settled,
    state: &Path,
    sockets: &mut Sockets,
    record: &mut Record,
) -> Result<u16> {
    let capture = settled.capture;
    let here = capture == Capture::Here;
    let chosen = workload.inbound_port.iter().find(|it| it.target.is_none());
    let wanted = chosen.map_or(if here { 15006 } else { 0 }, |it| it.port);
    let shared = matches!(capture, Capture::Here | Capture::Cgroup);
    let ips: Vec<IpAddr> = match workload.address {
        // Redirected connections arrive at whatever address they were sent to.
        Some(address) if !shared => vec![address],
        _ => EVERYWHERE.into(),
    };
    let mut open = |wanted: u16, role: Role| -> Result<u16> {
        let (port, made) = sockets::together(&ips, wanted, &[Kind::Tcp]).map_err(|error| {
            in_use(
                error,
                "--inbound-port",
                SocketAddr::new(ips[0], wanted),
                "another, or 0 for a free one, by --inbound-port",
            )
        })?;
        made.into_iter().for_each(|(_, socket)| sockets.add(role.clone(), socket));
        Ok(port)
    };
    // Peers that cannot ask their control plane know the port of before.
    let before = if wanted == 0 { port_of_before(state) } else { None };
    let inbound = match before.map(|before| open(before, Role::Inbound)) {
        Some(Ok(port)) => port,
        // Somebody else has it now.
        Some(Err(_)) | None => open(wanted, Role::Inbound)?,
    };
    if wanted == 0 && before != Some(inbound) {
        // Without it the next start takes any port, as this one did.
        let _ = keep_port(state, inbound);
    }
    record.inbound = Some(SocketAddr::new(ips[0], inbound).to_string());
    for port in workload.port.iter().map(|it| it.port) {
        let door = workload.inbound_port.iter().find(|it| it.target == Some(port));
        // Peers of a workload in watch mode come in plaintext, which cannot say which of several ports it means.
        let is_needed = settled.mode == Mode::Watch && !shared && workload.port.len() > 1;
        if let Some(wanted) = door.map(|it| it.port).or_else(|| is_needed.then_some(0)) {
            open(wanted, Role::Door { port })?;
        }
    }

    for publish in &workload.publish {
        let ips = publish.address.map_or_else(|| LOOPBACK.to_vec(), |address| vec![address]);
        let (_, made) = sockets::together(&ips, publish.port, &[Kind::Tcp]).map_err(|error| {
            let address = SocketAddr::new(ips[0], publish.port);
            in_use(error, "--publish", address, &format!("another port, as --publish PORT={}", publish.target))
        })?;
        made.into_iter().for_each(|(_, socket)| sockets.add(Role::Publish { port: publish.target }, socket));
        let host = publish.address.map_or_else(|| "localhost".into(), |ip| SocketAddr::new(ip, 0).to_string());
        let host = host.trim_end_matches(":0");
        record.publish.push(format!("http://{host}:{}", publish.port));
    }

    let wanted = workload.metrics.unwrap_or(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), if here { 15020 } else { 0 }));
    let metrics = sockets::tcp(wanted)
        .map_err(|error| in_use(error, "--metrics", wanted, "another address or port, or port 0 for a free one"))?;
    record.metrics = Some(sockets::bound(&metrics)?.to_string());
    sockets.add(Role::Metrics, metrics);
    Ok(inbound)
}

struct Captured {
    outbound: u16,
    dns: Option<u16>,
}

/// Where the rules of a shared network send what they take.
fn shared_listeners(workload: &Workload, settled: &Settled, sockets: &mut Sockets) -> Result<Captured> {
    let here = settled.capture == Capture::Here;
    let wanted = workload.outbound_port.unwrap_or(if here { 15001 } else { 0 });
    let (outbound, made) = sockets::together(&LOOPBACK, wanted, &[Kind::Tcp]).map_err(|error| {
        in_use(error, "--outbound-port", SocketAddr::new(LOOPBACK[0], wanted), "another, or 0 for a free one")
    })?;
    made.into_iter().for_each(|(_, socket)| sockets.add(Role::Outbound, socket));
    if settled.mode == Mode::Watch {
        // Who watches leaves names as they are.
        return Ok(Captured { outbound, dns: None });
    }
    let wanted = workload.dns_port.unwrap_or(if here { 15053 } else { 0 });
    let (dns, made) = sockets::together(&LOOPBACK, wanted, &[Kind::Udp, Kind::Tcp]).map_err(|error| {
        in_use(error, "--dns-port", SocketAddr::new(LOOPBACK[0], wanted), "another, or 0 for a free one")
    })?;
    for (kind, socket) in made {
        sockets.add(if kind == Kind::Udp { Role::DnsUdp } else { Role::DnsTcp }, socket);
    }
    Ok(Captured { outbound, dns: Some(dns) })
}

fn adopt(
    workload: &Workload,
    settled: &Settled,
    name: &str,
    captured: &Captured,
    inbound: u16,
    proxy: Option<(u32, u32)>,
) -> Result<Adopted> {
    let whose = match (&workload.unit, &workload.cgroup, &workload.user) {
        _ if settled.capture == Capture::Here => Whose::All,
        (Some(unit), ..) => Whose::Cgroup(Cgroup::of_unit(unit)?),
        (None, Some(path), _) => Whose::Cgroup(Cgroup::of_path(path)?),
        (None, None, Some(user)) => Whose::User(account::look_up(user)?.uid.as_raw()),
        (None, None, None) => Whose::All,
    };
    let facts = Facts {
        table: rules::table(settled.service.namespace.as_str(), name),
        proxy_user: proxy.map_or_else(|| nix::unistd::geteuid().as_raw(), |(user, _)| user),
        outbound: captured.outbound,
        dns: captured.dns,
        inbound,
        ports: workload.port.iter().map(|port| port.port).collect(),
        other_udp: if settled.mode == Mode::Strict { OtherUdp::Refuse } else { OtherUdp::Count },
    };
    Adopted::new(whose, facts)
}

/// Whether this host has a route of its own to the address; asking sends nothing.
fn routed(address: Ipv4Addr) -> bool {
    let asked = std::net::UdpSocket::bind("0.0.0.0:0").and_then(|socket| {
        socket.connect((address, 9))?;
        socket.local_addr()
    });
    asked.is_ok_and(|local| !local.ip().is_loopback())
}

/// The forward proxy's listener, and the variables that lead to it.
fn forward(sockets: &mut Sockets, record: &mut Record) -> Result<Credentials> {
    let socket = sockets::tcp(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0)).context("cannot listen on 127.0.0.1")?;
    let address = sockets::bound(&socket)?;
    sockets.add(Role::Forward, socket);
    let secret = || format!("{:032x}", rand::random::<u128>());
    let credentials = Credentials { user: secret(), password: secret() };
    let login = format!("{}:{}@{address}", credentials.user, credentials.password);
    let variables = [
        ("HTTP_PROXY", format!("http://{login}")),
        ("HTTPS_PROXY", format!("http://{login}")),
        ("ALL_PROXY", format!("socks5h://{login}")),
        ("NO_PROXY", "localhost,127.0.0.1,::1".into()),
    ];
    for (name, value) in variables {
        record.set.push((name.to_lowercase(), value.clone()));
        record.set.push((name.into(), value));
    }
    Ok(credentials)
}

fn admin(run: &RunDir) -> Result<OwnedFd> {
    let path = run.path.join("admin.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path)
        .with_context(|| format!("cannot make the socket {}; a shorter XDG_RUNTIME_DIR may help", path.display()))?;
    listener.set_nonblocking(true)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    Ok(listener.into())
}

/// The port at which peers found this workload when it ran last.
fn port_of_before(state: &Path) -> Option<u16> {
    fs::read_to_string(state.join(INBOUND_PORT)).ok()?.trim().parse().ok().filter(|port| *port != 0)
}

/// The directory is the proxy's user's: a link that it might have put there is not followed.
fn keep_port(state: &Path, port: u16) -> io::Result<()> {
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600).custom_flags(nix::libc::O_NOFOLLOW);
    options.open(state.join(INBOUND_PORT))?.write_all(port.to_string().as_bytes())
}

/// The directory of the state directories of proxies.
fn state_base(workload: &Workload, dirs: &Dirs) -> Result<PathBuf> {
    Ok(match &workload.state {
        Some(dir) => std::path::absolute(dir)?,
        None if nix::unistd::geteuid().is_root() => ROOT_STATE.into(),
        None => dirs.state.join("proxies"),
    })
}

/// The workload's state directory, its proxy's own.
fn state(base: &Path, namespace: &str, name: &str, proxy: Option<(u32, u32)>) -> Result<PathBuf> {
    let above = base.join(namespace);
    dirs::make(&above, if proxy.is_some() { 0o711 } else { 0o700 })?;
    let state = above.join(name);
    dirs::make(&state, 0o700)?;
    if let Some((user, group)) = proxy {
        std::os::unix::fs::chown(&state, Some(user), Some(group))
            .with_context(|| format!("cannot give {} to the proxy's user", state.display()))?;
    }
    Ok(state)
}

/// The join token, in memory: the proxy's user may not read the file of whoever starts it.
fn token(workload: &Workload, sockets: &mut Sockets) -> Result<Option<PathBuf>> {
    let Some(path) = &workload.join_token_file else { return Ok(None) };
    let token = fs::read(path)
        .with_context(|| format!("cannot read the join token in {}; 'sheer token create' makes one", path.display()))?;
    // Told here, where the file's own name is known.
    sheer_core::token::JoinToken::parse(&String::from_utf8_lossy(&token)).with_context(|| {
        format!("the join token in {} cannot be used; 'sheer token create' prints a new one", path.display())
    })?;
    let file = memory_file("join token", &token)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    sockets.kept.push(file);
    Ok(Some(path))
}

/// This user's control plane, or the host's where only that one is there.
fn nearest_control(dirs: &Dirs) -> PathBuf {
    let (own, host) = (dirs.control_socket(), PathBuf::from("/run/sheer/control.sock"));
    if !own.exists() && host.exists() { host } else { own }
}

fn workload_user(settled: &Settled) -> u32 {
    settled.account.ids.as_ref().map_or_else(|| nix::unistd::geteuid().as_raw(), |ids| ids.0)
}

/// The host's name servers; without any, the one that resolvers then assume.
fn resolvers() -> Vec<SocketAddr> {
    let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let found: Vec<SocketAddr> = text
        .lines()
        .filter_map(|line| nameserver(line.trim().strip_prefix("nameserver")?.split_ascii_whitespace().next()?))
        .collect();
    if found.is_empty() { vec![SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 53)] } else { found }
}

fn nameserver(text: &str) -> Option<SocketAddr> {
    if let Some((address, interface)) = text.split_once('%') {
        let scope = nix::net::if_::if_nametoindex(interface).ok()?;
        return Some(SocketAddrV6::new(address.parse().ok()?, 53, 0, scope).into());
    }
    Some(SocketAddr::new(text.parse().ok()?, 53))
}

fn announcement(record: &Record, namespace: &str) -> String {
    let mut text = format!("{namespace}/{} is ready", record.name);
    if !record.publish.is_empty() {
        text.push_str(&format!(", published at {}", record.publish.join(", ")));
    }
    if let Some(metrics) = &record.metrics {
        text.push_str(&format!(", metrics at http://{metrics}/metrics"));
    }
    text
}

fn in_use(error: io::Error, flag: &str, address: SocketAddr, mend: &str) -> anyhow::Error {
    let why = match error.kind() {
        io::ErrorKind::AddrInUse => format!(
            "something listens there already ('ss -ltnp sport = :{}' shows what); choose {mend}",
            address.port()
        ),
        io::ErrorKind::PermissionDenied => format!("only root may listen on ports below 1024; choose {mend}"),
        io::ErrorKind::AddrNotAvailable => format!("this machine does not have the address; choose {mend}"),
        _ => format!("choose {mend}"),
    };
    anyhow::Error::new(error).context(format!("{flag}: cannot listen on {address}: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers() {
        assert_eq!(nameserver("10.0.0.1"), Some("10.0.0.1:53".parse().unwrap()));
        assert_eq!(nameserver("2001:db8::1"), Some("[2001:db8::1]:53".parse().unwrap()));
        assert!(matches!(nameserver("fe80::1%lo"), Some(SocketAddr::V6(v6)) if v6.scope_id() == 1));
        assert_eq!(nameserver("x"), None);
    }
}

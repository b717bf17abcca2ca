//! The workload's own namespaces: made by the keeper, in itself.

use super::names;
use super::netlink::Netlink;
use crate::sockets::{self, Kind, LOOPBACK};
use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use serde::{Deserialize, Serialize};
use sheer_proxy::capture::rules;
use sheer_proxy::plan::{Role, ServiceRef};
use std::fs::{self, File, TryLockError};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Where listeners inside are bound; free for them alone, since nothing else runs there yet. Applications that listen on
/// one of these ports themselves get another from [`free_port`].
const OUTBOUND: u16 = 15001;
const DNS: u16 = 15053;

/// What the namespace shall look like.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct NamespacePlan {
    /// A network namespace that exists, to be used instead of one of its own.
    pub(crate) join: Option<PathBuf>,
    /// Directories that the command finds empty: keys of proxies and of the control plane, which bear the same user id.
    pub(crate) hide: Vec<PathBuf>,
    /// The search list of its resolv.conf.
    pub(crate) search: Vec<String>,
    /// Ports of the host's loopback to let through.
    pub(crate) host_ports: Vec<u16>,
    /// Listeners for one service each.
    pub(crate) upstreams: Vec<Upstream>,
    /// Ports that the application listens on.
    pub(crate) ports: Vec<u16>,
}

/// A listener for one service.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Upstream {
    /// Where it listens.
    pub(crate) listen: SocketAddr,
    /// The service.
    pub(crate) service: ServiceRef,
    /// Its port.
    pub(crate) port: u16,
}

/// What was made.
pub(super) struct Made {
    pub(super) listeners: Vec<(Role, OwnedFd)>,
    pub(super) tables: Vec<OwnedFd>,
    /// Set for a namespace that outlives the workload.
    pub(super) joined: Option<Joined>,
}

/// A namespace of somebody else's, with a list of what was changed there. Undone when dropped.
#[derive(Default)]
pub(super) struct Joined {
    /// Locked: one workload at a time.
    namespace: Option<File>,
    addresses: Vec<IpAddr>,
    routes: Vec<IpAddr>,
}

impl Drop for Joined {
    fn drop(&mut self) {
        if self.namespace.is_none() {
            return;
        }
        let complain =
            |what: &str, error: &dyn std::fmt::Display| anstream::eprintln!("sheer: cannot undo {what}: {error}");
        if let Err(error) = crate::nft::remove("sheer") {
            complain("the rules", &error);
        }
        let Ok(mut netlink) = Netlink::open() else { return };
        for route in &self.routes {
            if let Err(error) = netlink.unroute_all(*route) {
                complain("a default route", &error);
            }
        }
        for address in &self.addresses {
            if let Err(error) = netlink.remove_address(*address) {
                complain("an address", &error);
            }
        }
    }
}

/// Moves this process into namespaces of its own, fills them, and makes the listeners.
pub(super) fn make(plan: &NamespacePlan, scratch: &Path) -> Result<Made> {
    let mut joined = Joined::default();
    match &plan.join {
        Some(path) => join(path, &mut joined)?,
        None => enter().map_err(|error| with_remedy(&error))?,
    }
    let made = fill(plan, scratch, &mut joined).map_err(|error| {
        let denied = error.chain().any(|cause| {
            cause.downcast_ref::<std::io::Error>().is_some_and(|io| io.kind() == std::io::ErrorKind::PermissionDenied)
                || matches!(cause.downcast_ref::<Errno>(), Some(Errno::EPERM | Errno::EACCES))
                || cause.to_string().contains("Operation not permitted")
        });
        if denied { with_remedy(&error) } else { error }
    })?;
    Ok(Made { joined: joined.namespace.is_some().then_some(joined), ..made })
}

/// Enters a network namespace that exists, and takes it for this workload.
fn join(path: &Path, joined: &mut Joined) -> Result<()> {
    let namespace = File::open(path).with_context(|| {
        format!("--netns: there is no network namespace {}; 'ip netns' lists those with a name", path.display())
    })?;
    setns(&namespace, CloneFlags::CLONE_NEWNET).with_context(|| format!("cannot enter {}", path.display()))?;
    unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
    match namespace.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => bail!("--netns: another workload captures {} already", path.display()),
        Err(TryLockError::Error(error)) => return Err(error).context("cannot lock the network namespace"),
    }
    joined.namespace = Some(namespace);
    // What a killed keeper left, whose lock is free.
    crate::nft::remove("sheer")
}

fn enter() -> Result<()> {
    let (user, group) = (nix::unistd::geteuid(), nix::unistd::getegid());
    let mut spaces = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS;
    if !user.is_root() {
        spaces |= CloneFlags::CLONE_NEWUSER;
    }
    unshare(spaces).context("cannot make namespaces")?;
    if !user.is_root() {
        // Everybody keeps the ids they have; a group map may only be written once setgroups(2) is given up.
        let write = |name: &str, text: String| {
            fs::write(format!("/proc/self/{name}"), text).with_context(|| format!("cannot write /proc/self/{name}"))
        };
        write("setgroups", "deny".into())?;
        write("uid_map", format!("{user} {user} 1\n"))?;
        write("gid_map", format!("{group} {group} 1\n"))?;
    }
    Ok(())
}

fn fill(plan: &NamespacePlan, scratch: &Path, joined: &mut Joined) -> Result<Made> {
    use nix::mount::{MsFlags, mount};
    let no: Option<&str> = None;
    mount(no, "/", no, MsFlags::MS_REC | MsFlags::MS_SLAVE, no).context("cannot detach mounts from the host's")?;
    for directory in plan.hide.iter().filter(|directory| directory.is_dir()) {
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        mount(Some("none"), directory, Some("tmpfs"), flags, Some("size=4k"))
            .with_context(|| format!("cannot hide {} from the command", directory.display()))?;
    }
    let replaced = names::replace(scratch, rules::OWN_V4.into(), &plan.search)?;
    network(joined).context("cannot set up the namespace's network")?;

    let mut listeners = Vec::new();
    let outbound = free_port(OUTBOUND, &plan.ports);
    let (_, made) =
        sockets::together(&LOOPBACK, outbound, &[Kind::Tcp]).context("cannot listen for outbound connections")?;
    listeners.extend(made.into_iter().map(|(_, socket)| (Role::Outbound, socket)));
    let dns = free_port(DNS, &plan.ports);
    let (_, made) =
        sockets::together(&LOOPBACK, dns, &[Kind::Udp, Kind::Tcp]).context("cannot listen for name queries")?;
    listeners.extend(made.into_iter().map(|(kind, socket)| match kind {
        Kind::Udp => (Role::DnsUdp, socket),
        Kind::Tcp => (Role::DnsTcp, socket),
    }));
    for upstream in &plan.upstreams {
        let socket = sockets::tcp(upstream.listen)
            .with_context(|| format!("--upstream {}: cannot listen there inside the namespace", upstream.listen))?;
        listeners.push((Role::Upstream { service: upstream.service.clone(), port: upstream.port }, socket));
    }
    let rules = rules::Namespace { outbound, dns, host_ports: &plan.host_ports, loopback_dns: !replaced }.ruleset();
    crate::nft::apply(&rules)?;

    let mut tables = vec![OwnedFd::from(File::open("/proc/net/tcp").context("cannot open /proc/net/tcp")?)];
    tables.extend(File::open("/proc/net/tcp6").ok().map(OwnedFd::from));
    Ok(Made { listeners, tables, joined: None })
}

fn network(made: &mut Joined) -> std::io::Result<()> {
    let mut netlink = Netlink::open()?;
    netlink.loopback_up()?;
    if made.namespace.is_none() {
        // All ports here are the workload's, also those below 1024. A kernel without the setting keeps them for root.
        let _ = fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
    }
    let mut family = |addresses: &[IpAddr]| {
        for address in addresses {
            if netlink.add_address(*address)? {
                made.addresses.push(*address);
            }
        }
        if netlink.route_all(addresses[0])? {
            made.routes.push(addresses[0]);
        }
        Ok::<_, std::io::Error>(())
    };
    family(&[rules::OWN_V4.into()])?;
    // A machine without IPv6 has neither addresses nor routes to set.
    if !Path::new("/proc/sys/net/ipv6").exists() {
        return Ok(());
    }
    match family(&[rules::OWN_V6.into(), rules::DELIVERY_V6.into()]) {
        Err(error) if switched_off(&error) => Ok(()),
        other => other,
    }
}

/// Whether the error says that the namespace has no IPv6.
fn switched_off(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(nix::libc::EAFNOSUPPORT | nix::libc::EACCES | nix::libc::EOPNOTSUPP))
}

/// `wanted`, or the next port above that the application does not use.
fn free_port(wanted: u16, used: &[u16]) -> u16 {
    (wanted..).find(|port| !used.contains(port)).unwrap_or(wanted)
}

/// Why a workload cannot have a network of its own here, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Obstacle {
    /// What was refused.
    pub(crate) why: String,
    /// The setting to change.
    pub(crate) mend: String,
}

/// Tries what every workload with a network of its own needs, in the process that calls it, which should end then: the
/// namespaces, their interface, and rules unless `nft` is missing. Nothing of it is seen from outside.
pub(crate) fn probe() -> Option<Obstacle> {
    let attempt = || {
        enter()?;
        network(&mut Joined::default()).context("cannot set up the namespace's network")?;
        if crate::nft::find().is_err() {
            return Ok(());
        }
        let rules = rules::Namespace { outbound: OUTBOUND, dns: DNS, host_ports: &[], loopback_dns: false };
        crate::nft::apply(&rules.ruleset())
    };
    let error: anyhow::Error = attempt().err()?;
    Some(Obstacle { why: format!("{error:#}"), mend: remedy_here().to_owned() })
}

/// The error, and what of this machine's settings explains it.
fn with_remedy(error: &anyhow::Error) -> anyhow::Error {
    let remedy = remedy_here();
    anyhow!("{error:#}: {remedy}; or use '--capture env', which needs no privileges but captures less")
}

fn remedy_here() -> &'static str {
    let setting = |name: &str| {
        fs::read_to_string(format!("/proc/sys/{name}")).ok().and_then(|text| text.trim().parse::<u64>().ok())
    };
    remedy(
        nix::unistd::geteuid().is_root(),
        setting("kernel/unprivileged_userns_clone"),
        setting("user/max_user_namespaces"),
        setting("kernel/apparmor_restrict_unprivileged_userns"),
    )
}

fn remedy(root: bool, userns_clone: Option<u64>, max: Option<u64>, apparmor: Option<u64>) -> &'static str {
    match (root, userns_clone, max, apparmor) {
        (true, ..) => {
            "root lacks privileges here, as in a container; give it CAP_SYS_ADMIN and CAP_NET_ADMIN, or use \
             '--capture here' in a container of its own"
        }
        (_, Some(0), ..) => {
            "this kernel forbids user namespaces to unprivileged users; allow them with \
             'sudo sysctl -w kernel.unprivileged_userns_clone=1', or run 'sheer run' as root"
        }
        (_, _, Some(0), _) => {
            "this machine allows no user namespaces; allow them with 'sudo sysctl -w user.max_user_namespaces=10000', or \
             run 'sheer run' as root"
        }
        (.., Some(1..)) => {
            "AppArmor takes the privileges away that a user namespace gives; allow them with \
             'sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0' or by a profile for this program with the \
             rule 'userns,', or run 'sheer run' as root"
        }
        _ => {
            "user namespaces seem to be forbidden here (a container's seccomp profile does that, for one); run \
             'sheer run' as root, or allow unshare(2) with CLONE_NEWUSER"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_setting_that_forbids_has_its_remedy() {
        assert!(remedy(false, Some(0), None, None).contains("kernel.unprivileged_userns_clone=1"));
        assert!(remedy(false, Some(1), Some(0), None).contains("user.max_user_namespaces"));
        assert!(remedy(false, None, Some(9), Some(1)).contains("apparmor_restrict_unprivileged_userns=0"));
        assert!(remedy(false, None, Some(9), Some(0)).contains("seccomp"));
        assert!(remedy(true, None, Some(9), None).contains("CAP_SYS_ADMIN"));
    }

    #[test]
    fn ports_of_the_application_are_left_to_it() {
        assert_eq!(free_port(15001, &[8080]), 15001);
        assert_eq!(free_port(15001, &[15001, 15002]), 15003);
    }
}

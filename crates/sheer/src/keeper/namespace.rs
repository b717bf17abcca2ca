//! The workload's own namespaces: made by the keeper, in itself.

use super::names;
use super::netlink::Netlink;
use crate::sockets::{self, Kind, LOOPBACK};
use anyhow::{Context, Result, anyhow};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use serde::{Deserialize, Serialize};
use sheer_proxy::capture::rules;
use sheer_proxy::plan::{Role, ServiceRef};
use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::Path;

/// Where listeners inside are bound; free for them alone, since nothing else runs there yet. Applications that listen on
/// one of these ports themselves get another from [`free_port`].
const OUTBOUND: u16 = 15001;
const DNS: u16 = 15053;

/// What the namespace shall look like.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct NamespacePlan {
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
}

/// Moves this process into namespaces of its own, fills them, and makes the listeners.
pub(super) fn make(plan: &NamespacePlan, scratch: &Path) -> Result<Made> {
    enter().map_err(|error| with_remedy(&error))?;
    fill(plan, scratch).map_err(|error| {
        let denied = error.chain().any(|cause| {
            cause.downcast_ref::<std::io::Error>().is_some_and(|io| io.kind() == std::io::ErrorKind::PermissionDenied)
                || matches!(cause.downcast_ref::<Errno>(), Some(Errno::EPERM | Errno::EACCES))
                || cause.to_string().contains("Operation not permitted")
        });
        if denied { with_remedy(&error) } else { error }
    })
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

fn fill(plan: &NamespacePlan, scratch: &Path) -> Result<Made> {
    use nix::mount::{MsFlags, mount};
    let no: Option<&str> = None;
    mount(no, "/", no, MsFlags::MS_REC | MsFlags::MS_SLAVE, no).context("cannot detach mounts from the host's")?;
    let replaced = names::replace(scratch, rules::OWN_V4.into(), &plan.search)?;
    network().context("cannot set up the namespace's network")?;

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
    Ok(Made { listeners, tables })
}

fn network() -> std::io::Result<()> {
    let mut netlink = Netlink::open()?;
    netlink.loopback_up()?;
    netlink.add_address(rules::OWN_V4.into())?;
    netlink.route_all(rules::OWN_V4.into())?;
    // A machine without IPv6 has neither addresses nor routes to set.
    if Path::new("/proc/sys/net/ipv6").exists() {
        let unavailable = |error: &std::io::Error| {
            matches!(error.raw_os_error(), Some(nix::libc::EAFNOSUPPORT | nix::libc::EACCES | nix::libc::EOPNOTSUPP))
        };
        for address in [IpAddr::V6(rules::OWN_V6), IpAddr::V6(rules::DELIVERY_V6)] {
            match netlink.add_address(address) {
                Err(error) if unavailable(&error) => return Ok(()),
                other => other?,
            }
        }
        netlink.route_all(rules::OWN_V6.into())?;
    }
    Ok(())
}

/// `wanted`, or the next port above that the application does not use.
fn free_port(wanted: u16, used: &[u16]) -> u16 {
    (wanted..).find(|port| !used.contains(port)).unwrap_or(wanted)
}

/// The error, and what of this machine's settings explains it.
fn with_remedy(error: &anyhow::Error) -> anyhow::Error {
    let setting = |name: &str| {
        fs::read_to_string(format!("/proc/sys/{name}")).ok().and_then(|text| text.trim().parse::<u64>().ok())
    };
    let remedy = remedy(
        nix::unistd::geteuid().is_root(),
        setting("kernel/unprivileged_userns_clone"),
        setting("user/max_user_namespaces"),
        setting("kernel/apparmor_restrict_unprivileged_userns"),
    );
    anyhow!("{error:#}: {remedy}; or use '--capture env', which needs no privileges but captures less")
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

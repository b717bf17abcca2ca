//! How names are resolved inside a workload's namespace: its own resolv.conf and nsswitch.conf, and no caching daemon of
//! the host in between.

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use std::fs;
use std::net::IpAddr;
use std::path::Path;

/// Sockets of the host's resolving daemons: what they answer is the host's view, not the mesh's.
const DAEMONS: [&str; 4] = [
    "/run/nscd/socket",
    "/var/run/nscd/socket",
    "/run/systemd/resolve/io.systemd.Resolve",
    "/run/systemd/resolve/io.systemd.Resolve.Monitor",
];

/// glibc takes six search domains, older ones ignore the rest.
const MAX_SEARCH: usize = 6;

/// Puts resolv.conf and nsswitch.conf into this process's mount namespace. Returns whether resolv.conf could be
/// replaced; where there is none, resolvers ask 127.0.0.1.
pub(super) fn replace(scratch: &Path, nameserver: IpAddr, search: &[String]) -> Result<bool> {
    let write = |name: &str, text: &str| {
        let path = scratch.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display())).map(|()| path)
    };
    let replaced = match fs::read_to_string("/etc/resolv.conf") {
        Ok(host) => {
            bind(&write("resolv.conf", &resolv_conf(nameserver, search, &host))?, Path::new("/etc/resolv.conf"))?;
            true
        }
        Err(_) => false,
    };
    if let Ok(host) = fs::read_to_string("/etc/nsswitch.conf") {
        bind(&write("nsswitch.conf", &nsswitch_conf(&host))?, Path::new("/etc/nsswitch.conf"))?;
    }
    let nothing = write("nothing", "")?;
    for daemon in DAEMONS.map(Path::new) {
        if daemon.exists() {
            bind(&nothing, daemon)?;
        }
    }
    Ok(replaced)
}

fn bind(source: &Path, target: &Path) -> Result<()> {
    let target = fs::canonicalize(target).with_context(|| format!("cannot find {}", target.display()))?;
    mount(Some(source), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("cannot put {} in the place of {}", source.display(), target.display()))
}

fn resolv_conf(nameserver: IpAddr, search: &[String], host: &str) -> String {
    let last = |keyword: &str| host.lines().rev().find_map(|line| line.trim().strip_prefix(keyword));
    let theirs = last("search").or_else(|| last("domain")).unwrap_or_default();
    let mut domains: Vec<&str> = search.iter().map(String::as_str).collect();
    domains.extend(theirs.split_ascii_whitespace().filter(|domain| !search.iter().any(|own| own == domain)));
    domains.truncate(MAX_SEARCH);
    format!(
        "# Written by sheer: the mesh answers for its own names, and asks the host's resolvers for all others.\n\
         nameserver {nameserver}\nsearch {}\noptions ndots:3\n",
        domains.join(" ")
    )
}

fn nsswitch_conf(host: &str) -> String {
    let mut text = String::new();
    for line in host.lines().filter(|line| !line.trim_start().starts_with("hosts:")) {
        text.push_str(line);
        text.push('\n');
    }
    text.push_str("hosts: files dns\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mesh_is_searched_first_and_the_hosts_domains_after() {
        let search = ["default.svc.mesh.internal", "svc.mesh.internal", "mesh.internal"].map(String::from);
        let host = "nameserver 10.0.0.1\nsearch corp.example lan mesh.internal\noptions edns0\n";
        let text = resolv_conf("192.0.0.8".parse().unwrap(), &search, host);
        assert!(text.contains("nameserver 192.0.0.8\n") && !text.contains("10.0.0.1"));
        let expected = "search default.svc.mesh.internal svc.mesh.internal mesh.internal corp.example lan\n";
        assert!(text.contains(expected), "{text}");
        assert!(text.ends_with("options ndots:3\n"));
    }

    #[test]
    fn hosts_come_from_files_and_dns_alone() {
        let text = nsswitch_conf("passwd: files\nhosts: files mymachines resolve [!UNAVAIL=return] dns\n");
        assert_eq!(text, "passwd: files\nhosts: files dns\n");
    }
}

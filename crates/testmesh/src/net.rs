//! Hosts as network namespaces, joined by a router that can cut them off from each other.
//!
//! Every host has a network of its own and reaches the others through the router alone: there is nothing else that
//! they share. Names carry the test's process id, so that what a killed test left can be told and removed.

use crate::program::run;
use anyhow::{Context, Result};
use std::cell::Cell;
use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

const PREFIX: &str = "shtest";

/// A network of hosts.
pub struct Net {
    id: String,
    hosts: Cell<u8>,
    directory: tempfile::TempDir,
}

/// A host: a network namespace with an address.
#[derive(Clone, Debug)]
pub struct Host {
    namespace: String,
    address: Ipv4Addr,
    router: String,
}

impl Net {
    /// An empty network. Needs root, since it makes network namespaces.
    ///
    /// # Errors
    /// When a namespace cannot be made.
    pub fn new() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        remove_leftovers()?;
        let id = format!("{PREFIX}-{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed));
        let net = Self { id, hosts: Cell::new(0), directory: tempfile::tempdir()? };
        let router = net.router();
        ip(&["netns", "add", &router])?;
        inside(&router, &["sysctl", "-qw", "net.ipv4.ip_forward=1"])?;
        inside(&router, &["ip", "link", "set", "lo", "up"])?;
        let table = "add table inet cut; add chain inet cut forward { type filter hook forward priority 0; }";
        inside(&router, &["nft", table])?;
        Ok(net)
    }

    /// Adds a host with the network 10.91.N.0/24 and the address 10.91.N.2.
    ///
    /// # Errors
    /// When its namespace or link cannot be made.
    pub fn host(&self) -> Result<Host> {
        let number = self.hosts.get() + 1;
        self.hosts.set(number);
        let namespace = format!("{}-h{number}", self.id);
        let router = self.router();
        let (near, far) = (format!("r{number}"), "eth0");
        let address = Ipv4Addr::new(10, 91, number, 2);
        ip(&["netns", "add", &namespace])?;
        ip(&["link", "add", &near, "netns", &router, "type", "veth", "peer", "name", far, "netns", &namespace])?;
        for arguments in [
            vec!["ip", "addr", "add", &format!("10.91.{number}.1/24"), "dev", &near],
            vec!["ip", "link", "set", &near, "up"],
        ] {
            inside(&router, &arguments)?;
        }
        for arguments in [
            vec!["ip", "link", "set", "lo", "up"],
            vec!["ip", "addr", "add", &format!("{address}/24"), "dev", far],
            vec!["ip", "link", "set", far, "up"],
            vec!["ip", "route", "add", "default", "via", &format!("10.91.{number}.1")],
        ] {
            inside(&namespace, &arguments)?;
        }
        Ok(Host { namespace, address, router })
    }

    /// Drops every packet between two hosts, without telling either.
    ///
    /// # Errors
    /// When the rule cannot be made.
    pub fn cut(&self, one: &Host, other: &Host) -> Result<()> {
        for (from, to) in [(one, other), (other, one)] {
            let rule = format!("add rule inet cut forward ip saddr {} ip daddr {} drop", from.address, to.address);
            inside(&self.router(), &["nft", &rule])?;
        }
        Ok(())
    }

    /// Undoes every cut.
    ///
    /// # Errors
    /// When the rules cannot be removed.
    pub fn heal(&self) -> Result<()> {
        inside(&self.router(), &["nft", "flush chain inet cut forward"]).map(drop)
    }

    /// A directory that is removed with the network.
    pub fn directory(&self) -> &std::path::Path {
        self.directory.path()
    }

    fn router(&self) -> String {
        format!("{}-r", self.id)
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for number in 1..=self.hosts.get() {
            let _ = ip(&["netns", "del", &format!("{}-h{number}", self.id)]);
        }
        let _ = ip(&["netns", "del", &self.router()]);
    }
}

impl Host {
    /// Its address, which the other hosts reach.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// A command that will run on this host.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace]).arg(program);
        command
    }

    /// Runs a function on a thread of this host: the sockets it makes are the host's.
    ///
    /// # Errors
    /// When the namespace cannot be entered, or what the function returns.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let entered = || {
            let file = std::fs::File::open(format!("/run/netns/{}", self.namespace))?;
            nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET)?;
            work()
        };
        std::thread::scope(|scope| scope.spawn(entered).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    }

    /// The name of its network namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Records every packet that the router sees of this host into a file, until the returned command's end.
    pub fn packets(&self, file: &std::path::Path) -> Command {
        let number = self.address.octets()[2];
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.router, "tcpdump", "-i", &format!("r{number}"), "-U", "-w"]).arg(file);
        command
    }
}

fn ip(arguments: &[&str]) -> Result<String> {
    run(Command::new("ip").args(arguments))
}

fn inside(namespace: &str, arguments: &[&str]) -> Result<String> {
    run(Command::new("ip").args(["netns", "exec", namespace]).args(arguments))
}

/// Removes namespaces of tests whose process has ended.
fn remove_leftovers() -> Result<()> {
    for line in ip(&["netns", "list"])?.lines() {
        let Some(name) = line.split_whitespace().next() else { continue };
        let Some(owner) = name.strip_prefix(PREFIX).and_then(|rest| rest.trim_start_matches('-').split('-').next())
        else {
            continue;
        };
        let owner: u32 = owner.parse().with_context(|| format!("namespace {name}"))?;
        if !std::path::Path::new(&format!("/proc/{owner}")).exists() {
            let _ = ip(&["netns", "del", name]);
        }
    }
    Ok(())
}

//! Hosts as namespaces, joined by a router that can cut them off from each other.
//!
//! A host is a process that does nothing but hold a network, a mount and a host-name namespace with its own `/run`,
//! `/etc/sheer` and `/var/lib/sheer*`; other programs are started inside. Hosts reach each other through the router alone:
//! there is nothing else that they share. The kernel ends the holders with the test, and the namespaces with them, also
//! when the test is killed.

use crate::program::{Program, run};
use crate::wait;
use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};
use nix::unistd::Pid;
use std::cell::Cell;
use std::fs::File;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A network of hosts.
pub struct Net {
    router: Holder,
    hosts: Cell<u8>,
    directory: tempfile::TempDir,
    /// Scenarios of one program run one after another: what they measure is their own doing.
    _turn: MutexGuard<'static, ()>,
}

static TURN: Mutex<()> = Mutex::new(());

/// Reads packets from a device, and writes each back after a while, as tc-netem would where the kernel has it.
const DELAY: &str = r#"
import fcntl, heapq, os, random, select, struct, sys, time
name, by, jitter = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
device = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(device, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1001))
waiting, number = [], 0
while True:
    now = time.monotonic()
    while waiting and waiting[0][0] <= now:
        os.write(device, heapq.heappop(waiting)[2])
    readable, _, _ = select.select([device], [], [], waiting[0][0] - now if waiting else None)
    if readable:
        number += 1
        packet = os.read(device, 65536)
        heapq.heappush(waiting, (time.monotonic() + by + random.uniform(-jitter, jitter), number, packet))
"#;

/// A host, or a container of one, with an address. It ends when this is dropped.
pub struct Host {
    holder: Holder,
    /// Of the link between the host and the router.
    number: u8,
    address: Ipv4Addr,
}

/// A process that holds namespaces.
struct Holder(Child);

impl Net {
    /// An empty network. Needs root, since it makes namespaces.
    ///
    /// # Errors
    /// When a namespace cannot be made.
    pub fn new() -> Result<Self> {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let router = Holder::start("router")?;
        router.run(&["sysctl", "-qw", "net.ipv4.ip_forward=1"])?;
        router
            .run(&["nft", "add table inet cut; add chain inet cut forward { type filter hook forward priority 0; }"])?;
        let directory = tempfile::tempdir()?;
        // Workloads run as other users.
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755))?;
        Ok(Self { router, hosts: Cell::new(0), directory, _turn: turn })
    }

    /// Adds a host with the network 10.91.N.0/24 and the address 10.91.N.2.
    ///
    /// # Errors
    /// When its namespaces or its link cannot be made.
    pub fn host(&self, name: &str) -> Result<Host> {
        let number = self.next();
        let holder = Holder::start(name)?;
        let (near, pid) = (format!("r{number}"), holder.0.id().to_string());
        let (gateway, address) = (format!("10.91.{number}.1"), format!("10.91.{number}.2/24"));
        self.router.run(&["ip", "link", "add", &near, "type", "veth", "peer", "name", "eth0", "netns", &pid])?;
        self.router.run(&["ip", "addr", "add", &format!("{gateway}/24"), "dev", &near])?;
        self.router.run(&["ip", "link", "set", &near, "up"])?;
        holder.run(&["ip", "addr", "add", &address, "dev", "eth0"])?;
        holder.run(&["ip", "link", "set", "eth0", "up"])?;
        holder.run(&["ip", "route", "add", "default", "via", &gateway])?;
        Ok(Host { holder, number, address: Ipv4Addr::new(10, 91, number, 2) })
    }

    /// Adds a container to a host: a network of its own with the address 10.92.N.2, to which the host forwards.
    ///
    /// # Errors
    /// When its namespaces or its link cannot be made.
    pub fn container(&self, host: &Host, name: &str) -> Result<Host> {
        let number = self.next();
        let holder = Holder::start(name)?;
        let (near, pid) = (format!("c{number}"), holder.0.id().to_string());
        let (gateway, address) = (format!("10.92.{number}.1"), format!("10.92.{number}.2/24"));
        host.holder.run(&["sysctl", "-qw", "net.ipv4.ip_forward=1"])?;
        host.holder.run(&["ip", "link", "add", &near, "type", "veth", "peer", "name", "eth0", "netns", &pid])?;
        host.holder.run(&["ip", "addr", "add", &format!("{gateway}/24"), "dev", &near])?;
        host.holder.run(&["ip", "link", "set", &near, "up"])?;
        holder.run(&["ip", "addr", "add", &address, "dev", "eth0"])?;
        holder.run(&["ip", "link", "set", "eth0", "up"])?;
        holder.run(&["ip", "route", "add", "default", "via", &gateway])?;
        let network = format!("10.92.{number}.0/24");
        self.router.run(&["ip", "route", "add", &network, "via", &host.address.to_string()])?;
        Ok(Host { holder, number: host.number, address: Ipv4Addr::new(10, 92, number, 2) })
    }

    fn next(&self) -> u8 {
        self.hosts.set(self.hosts.get() + 1);
        self.hosts.get()
    }

    /// Gives a host the address fd91:N::2 beside its own, and a way to all others that have one.
    ///
    /// # Errors
    /// When the addresses cannot be made.
    pub fn ipv6(&self, host: &Host) -> Result<Ipv6Addr> {
        let number = host.number;
        self.router.run(&["sysctl", "-qw", "net.ipv6.conf.all.forwarding=1"])?;
        let gateway = format!("fd91:{number}::1");
        // Nobody else has these addresses: nothing is waited for.
        self.router.run(&["ip", "addr", "add", &format!("{gateway}/64"), "dev", &format!("r{number}"), "nodad"])?;
        host.holder.run(&["ip", "addr", "add", &format!("fd91:{number}::2/64"), "dev", "eth0", "nodad"])?;
        host.holder.run(&["ip", "-6", "route", "add", "default", "via", &gateway])?;
        Ok(format!("fd91:{number}::2").parse()?)
    }

    /// Drops every packet between two hosts, without telling either.
    ///
    /// # Errors
    /// When the rule cannot be made.
    pub fn cut(&self, one: &Host, other: &Host) -> Result<()> {
        for (from, to) in [(one.address(), other.address()), (other.address(), one.address())] {
            self.router.run(&["nft", &format!("add rule inet cut forward ip saddr {from} ip daddr {to} drop")])?;
        }
        Ok(())
    }

    /// Drops every packet from and to a host, without telling anybody.
    ///
    /// # Errors
    /// When the rule cannot be made.
    pub fn isolate(&self, host: &Host) -> Result<()> {
        for direction in ["saddr", "daddr"] {
            self.router.run(&["nft", &format!("add rule inet cut forward ip {direction} {} drop", host.address())])?;
        }
        Ok(())
    }

    /// Drops every packet to a host that would begin a connection; what is open goes on.
    ///
    /// # Errors
    /// When the rule cannot be made.
    pub fn lose_connects(&self, to: &Host) -> Result<()> {
        let rule = format!("add rule inet cut forward ip daddr {} tcp flags & (syn | ack) == syn drop", to.address());
        self.router.run(&["nft", &rule])
    }

    /// Drops this share of the packets to and from a host, at random.
    ///
    /// # Errors
    /// When the rule cannot be made.
    pub fn lose(&self, host: &Host, percent: u32) -> Result<()> {
        for direction in ["saddr", "daddr"] {
            let rule = format!(
                "add rule inet cut forward ip {direction} {} numgen random mod 100 < {percent} drop",
                host.address()
            );
            self.router.run(&["nft", &rule])?;
        }
        Ok(())
    }

    /// Delays every packet to a host by this time, give or take the other, until the returned program is ended.
    ///
    /// # Errors
    /// When the way through the delay cannot be made.
    pub fn delay(&self, to: &Host, by: Duration, jitter: Duration) -> Result<Program> {
        let device = format!("slow{}", to.number);
        let (by, jitter) = (by.as_secs_f64().to_string(), jitter.as_secs_f64().to_string());
        let mut command = self.router.command("python3");
        command.args(["-c", DELAY, &device, &by, &jitter]);
        let program = Program::start(&device, self.directory(), &mut command)?;
        wait::until("the delay is there", Duration::from_secs(5), || {
            self.router.run(&["ip", "link", "show", &device])
        })?;
        self.router.run(&["ip", "link", "set", &device, "up"])?;
        let table = (100 + u32::from(to.number)).to_string();
        self.router.run(&["ip", "route", "replace", "default", "dev", &device, "table", &table])?;
        let host = to.address().to_string();
        // What comes out of the device again goes its ordinary way.
        self.router.run(&["ip", "rule", "add", "iif", &device, "to", &host, "lookup", "main", "priority", "90"])?;
        self.router.run(&["ip", "rule", "add", "to", &host, "lookup", &table, "priority", "100"])?;
        Ok(program)
    }

    /// Undoes every cut.
    ///
    /// # Errors
    /// When the rules cannot be removed.
    pub fn heal(&self) -> Result<()> {
        self.router.run(&["nft", "flush chain inet cut forward"])
    }

    /// A directory that is removed with the network.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A command that records every packet between a host and the router into a file, until it is ended.
    pub fn packets(&self, host: &Host, file: &Path) -> Command {
        let mut command = self.router.command("tcpdump");
        command.args(["-i", &format!("r{}", host.number), "-U", "--immediate-mode", "-w"]).arg(file);
        command
    }
}

impl Host {
    /// Its address, which the other hosts reach.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// The process that holds its namespaces.
    pub fn pid(&self) -> u32 {
        self.holder.0.id()
    }

    /// A path of this host's own directories, as the test finds it.
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.holder.0.id()))
    }

    /// A command that will run on this host.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        self.holder.command(program)
    }

    /// The mounts of this host, as in /proc/PID/mountinfo.
    ///
    /// # Errors
    /// When it has ended.
    pub fn mounts(&self) -> Result<String> {
        Ok(std::fs::read_to_string(format!("/proc/{}/mountinfo", self.holder.0.id()))?)
    }

    /// Everything that runs on this host: a process keeps the host's name wherever else it goes.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn processes(&self) -> Result<Vec<Pid>> {
        let name = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/uts")).ok();
        let own = name(self.holder.0.id().cast_signed()).context("the host has ended")?;
        let numbers = std::fs::read_dir("/proc")?.flatten();
        let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        Ok(numbers.filter(|pid| name(*pid).as_ref() == Some(&own)).map(Pid::from_raw).collect())
    }

    /// Runs a function on a thread of this host: the sockets it makes are the host's.
    ///
    /// # Errors
    /// When the namespace cannot be entered, or what the function returns.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        beside(Pid::from_raw(self.holder.0.id().cast_signed()), work)
    }
}

/// Runs a function on a thread that is in the network of a process.
///
/// # Errors
/// When the namespace cannot be entered, or what the function returns.
pub fn beside<T: Send>(process: Pid, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let network = File::open(format!("/proc/{process}/ns/net"))?;
    let entered = || {
        setns(network, CloneFlags::CLONE_NEWNET)?;
        work()
    };
    std::thread::scope(|scope| scope.spawn(entered).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

impl Holder {
    fn start(name: &str) -> Result<Self> {
        let own = "for d in /run /etc/sheer /var/lib/sheer /var/lib/sheer-proxies; do mkdir -p $d; mount -t tmpfs tmpfs $d; done";
        let script = format!("hostname {name}; {own}; ip link set lo up; touch /run/held; exec sleep infinity");
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "unshare", "--net", "--mount", "--uts", "sh", "-c", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("setpriv")?;
        let holder = Self(child);
        let held = format!("/proc/{}/root/run/held", holder.0.id());
        wait::until_true(&format!("host {name} is there"), Duration::from_secs(5), || Path::new(&held).exists())?;
        Ok(holder)
    }

    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--net", "--mount", "--uts", "-t", &self.0.id().to_string(), "--"]).arg(program);
        command
    }

    fn run(&self, arguments: &[&str]) -> Result<()> {
        run(self.command(arguments[0]).args(&arguments[1..])).map(drop)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

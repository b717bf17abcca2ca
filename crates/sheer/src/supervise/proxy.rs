//! The proxy as a child: started with its plan, heard, replaced when it dies.

use anyhow::{Context, Result};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use sheer_proxy::plan::{FromSupervisor, Plan, ToSupervisor};
use sheer_proxy::platform::{Account, Birth, prepare};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A proxy that lived for so long died of something new; one that did not may die of the same thing again.
const STABLE: Duration = Duration::from_secs(10);
/// The first wait in a crash loop, doubled each time.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// The longest wait in a crash loop.
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// A message is shorter than that; a proxy that sends more is talking nonsense.
const LONGEST_LINE: usize = 64 * 1024;

/// The proxy of the moment, and what the next one needs.
pub(super) struct Proxy {
    program: PathBuf,
    plan: Plan,
    /// Open in every proxy, under the same numbers.
    sockets: Vec<OwnedFd>,
    account: Option<Account>,
    child: Option<Running>,
    crashes: u32,
    respawn_at: Option<Instant>,
    drained: bool,
}

struct Running {
    pid: Pid,
    since: Instant,
    link: UnixStream,
    unread: Vec<u8>,
}

impl Proxy {
    /// Starts the first one. `sockets` are those whose numbers the plan names.
    pub(super) fn start(
        program: PathBuf,
        plan: Plan,
        sockets: Vec<OwnedFd>,
        account: Option<Account>,
    ) -> Result<Self> {
        let mut proxy =
            Self { program, plan, sockets, account, child: None, crashes: 0, respawn_at: None, drained: false };
        proxy.spawn()?;
        Ok(proxy)
    }

    /// Starts another one.
    pub(super) fn spawn(&mut self) -> Result<()> {
        self.respawn_at = None;
        let (own, theirs) = UnixStream::pair()?;
        own.set_nonblocking(true)?;
        let plan = Plan { supervisor: Some(theirs.as_raw_fd()), ..self.plan.clone() };
        let file = super::memory_file("proxy plan", &serde_json::to_vec(&plan)?)?;
        let mut keep: Vec<RawFd> = self.sockets.iter().map(AsRawFd::as_raw_fd).collect();
        keep.extend([theirs.as_raw_fd(), file.as_raw_fd()]);
        let mut command = Command::new(&self.program);
        command.arg0("sheer").arg("__proxy").env("SHEER_PLAN_FD", file.as_raw_fd().to_string());
        // Standard streams belong to the command; complaints go where the supervisor's go.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
        for private in ["NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID"] {
            command.env_remove(private);
        }
        let birth = Birth {
            keep,
            close_others: true,
            dies_with_parent: Some(nix::libc::SIGKILL),
            group: Some(0),
            account: self.account.clone(),
            ..Birth::default()
        };
        prepare(&mut command, birth);
        let child = command.spawn().with_context(|| format!("cannot start the proxy ({})", self.program.display()))?;
        let pid = Pid::from_raw(child.id().cast_signed());
        self.child = Some(Running { pid, since: Instant::now(), link: own, unread: Vec::new() });
        Ok(())
    }

    /// The process of the one that runs.
    pub(super) fn pid(&self) -> Option<i32> {
        self.child.as_ref().map(|child| child.pid.as_raw())
    }

    /// What to wait for.
    pub(super) fn link(&self) -> Option<BorrowedFd<'_>> {
        self.child.as_ref().filter(|child| child.since != CLOSED.with(|at| *at)).map(|child| child.link.as_fd())
    }

    /// When the next one is due.
    pub(super) fn respawn_at(&self) -> Option<Instant> {
        self.respawn_at
    }

    /// Whether nothing is open any more, or no proxy is left.
    pub(super) fn is_done(&self) -> bool {
        self.drained || self.child.is_none()
    }

    /// It said that nothing is open any more.
    pub(super) fn drained(&mut self) {
        self.drained = true;
    }
}

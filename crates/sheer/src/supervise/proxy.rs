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
    /// Unset once the proxy has closed its end.
    link: Option<UnixStream>,
    unread: Vec<u8>,
}

impl Proxy {
    /// Starts the first one. `sockets` are those whose numbers the plan names.
    pub(super) fn start(program: PathBuf, plan: Plan, sockets: Vec<OwnedFd>, account: Option<Account>) -> Result<Self> {
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
        command.envs(crate::logging::variables());
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
        self.child = Some(Running { pid, since: Instant::now(), link: Some(own), unread: Vec::new() });
        Ok(())
    }

    /// The process of the one that runs.
    pub(super) fn pid(&self) -> Option<i32> {
        self.child.as_ref().map(|child| child.pid.as_raw())
    }

    /// What to wait for.
    pub(super) fn link(&self) -> Option<BorrowedFd<'_>> {
        self.child.as_ref()?.link.as_ref().map(AsFd::as_fd)
    }

    /// What it has said.
    pub(super) fn read(&mut self) -> Vec<ToSupervisor> {
        let Some(child) = &mut self.child else { return Vec::new() };
        let mut buffer = [0; 4096];
        while let Some(link) = &mut child.link {
            match link.read(&mut buffer) {
                Ok(0) => child.link = None,
                Ok(length) if child.unread.len() + length > LONGEST_LINE => child.link = None,
                Ok(length) => child.unread.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => child.link = None,
            }
        }
        let mut messages = Vec::new();
        while let Some(end) = child.unread.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = child.unread.drain(..=end).collect();
            // A newer proxy may say more than this supervisor knows.
            messages.extend(serde_json::from_slice(&line).ok());
        }
        messages
    }

    /// Tells it something; a dead one needs not know.
    pub(super) fn tell(&mut self, message: &FromSupervisor) {
        let link = self.child.as_mut().and_then(|child| child.link.as_mut());
        if let (Some(link), Ok(mut line)) = (link, serde_json::to_vec(message)) {
            line.push(b'\n');
            // A few bytes into an empty socket: it does not block, and a peer that is gone will be reaped.
            let _ = link.write_all(&line);
        }
    }

    /// How the proxy has ended, when it has.
    pub(super) fn reap(&mut self) -> Option<String> {
        let child = self.child.as_ref()?;
        let how = match waitpid(child.pid, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, status)) => format!("exit status {status}"),
            Ok(WaitStatus::Signaled(_, signal, _)) => signal.as_str().to_owned(),
            Ok(_) => return None,
            Err(errno) => errno.desc().to_owned(),
        };
        self.crashes = if child.since.elapsed() >= STABLE { 0 } else { self.crashes + 1 };
        self.child = None;
        Some(how)
    }

    /// Lets the next one start: at once, unless the last ones died young.
    pub(super) fn respawn_soon(&mut self) {
        self.respawn_at = Some(Instant::now() + wait(self.crashes));
    }

    /// Lets no other one start.
    pub(super) fn forget(&mut self) {
        self.respawn_at = None;
    }

    /// Ends it.
    pub(super) fn kill(&mut self) {
        self.respawn_at = None;
        if let Some(child) = self.child.take() {
            let _ = nix::sys::signal::kill(child.pid, nix::sys::signal::Signal::SIGKILL);
            let _ = waitpid(child.pid, None);
        }
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

/// How long to wait before the next start when the last `crashes` proxies died young.
fn wait(crashes: u32) -> Duration {
    match crashes {
        0 | 1 => Duration::ZERO,
        more => (FIRST_WAIT * 2u32.saturating_pow((more - 2).min(16))).min(LONGEST_WAIT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_crash_costs_no_wait_and_a_loop_slows_down() {
        let waits: Vec<u128> = (0..10).map(|crashes| wait(crashes).as_millis()).collect();
        assert_eq!(waits, [0, 0, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(wait(u32::MAX), LONGEST_WAIT);
    }
}

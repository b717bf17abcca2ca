//! The proxy as a child: started with its plan, heard, replaced when it dies, and when another one is to take its place.

use anyhow::{Context, Result};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use sheer_proxy::plan::{FromSupervisor, Plan, ToSupervisor};
use sheer_proxy::platform::{Account, Birth, prepare};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
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
    /// One that is to take the place of `child` as soon as it is ready, and its program.
    next: Option<(Running, PathBuf, File)>,
    /// Those whose place was taken, while they finish what is open.
    retired: Vec<Running>,
    /// Keeps the file that `program` names.
    _file: Option<File>,
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

/// A process that has ended, and how.
pub(super) enum Ended {
    /// The proxy.
    Current(String),
    /// The one that was to take its place.
    Next(String),
}

impl Proxy {
    /// Starts the first one. `sockets` are those whose numbers the plan names.
    pub(super) fn start(program: PathBuf, plan: Plan, sockets: Vec<OwnedFd>, account: Option<Account>) -> Result<Self> {
        let mut proxy = Self {
            program,
            plan,
            sockets,
            account,
            child: None,
            next: None,
            retired: Vec::new(),
            _file: None,
            crashes: 0,
            respawn_at: None,
            drained: false,
        };
        proxy.spawn()?;
        Ok(proxy)
    }

    /// Starts another one.
    pub(super) fn spawn(&mut self) -> Result<()> {
        self.respawn_at = None;
        self.child = Some(self.start_child(&self.program)?);
        Ok(())
    }

    /// Those after the first one find a workload that was served until now.
    pub(super) fn served(&mut self) {
        self.plan.successor = true;
    }

    /// Starts one that is to take this one's place, of a program that may be another version.
    pub(super) fn begin_next(&mut self, program: &Path) -> Result<()> {
        // Held open: a path may lead elsewhere, or nowhere, when a proxy is to be replaced after its death.
        let file = OpenOptions::new().read(true).custom_flags(nix::libc::O_PATH).open(program);
        let file = file.with_context(|| format!("cannot open {}", program.display()))?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let child = self.start_child(&path).with_context(|| program.display().to_string())?;
        self.next = Some((child, path, file));
        Ok(())
    }

    /// It is ready: it takes what comes new, and the one before finishes what is open.
    pub(super) fn promote(&mut self) {
        let Some((child, program, file)) = self.next.take() else { return };
        self.tell(&FromSupervisor::Replaced);
        self.retired.extend(self.child.replace(child));
        (self.program, self._file, self.crashes) = (program, Some(file), 0);
    }

    /// Ends the one that was to take this one's place.
    pub(super) fn abandon_next(&mut self) {
        if let Some((child, ..)) = self.next.take() {
            child.kill();
        }
    }

    /// How many have given way and finish what is open.
    pub(super) fn retired(&self) -> usize {
        self.retired.len()
    }

    fn start_child(&self, program: &Path) -> Result<Running> {
        let (own, theirs) = UnixStream::pair()?;
        own.set_nonblocking(true)?;
        let plan = Plan { supervisor: Some(theirs.as_raw_fd()), ..self.plan.clone() };
        let file = super::memory_file("proxy plan", &serde_json::to_vec(&plan)?)?;
        let mut keep: Vec<RawFd> = self.sockets.iter().map(AsRawFd::as_raw_fd).collect();
        keep.extend([theirs.as_raw_fd(), file.as_raw_fd()]);
        let mut command = Command::new(program);
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
        let child = command.spawn().with_context(|| format!("cannot start the proxy ({})", program.display()))?;
        let pid = Pid::from_raw(child.id().cast_signed());
        Ok(Running { pid, since: Instant::now(), link: Some(own), unread: Vec::new() })
    }

    /// The process of the one that runs.
    pub(super) fn pid(&self) -> Option<i32> {
        self.child.as_ref().map(|child| child.pid.as_raw())
    }

    /// What to wait for.
    pub(super) fn link(&self) -> Option<BorrowedFd<'_>> {
        self.child.as_ref()?.link.as_ref().map(AsFd::as_fd)
    }

    /// What to wait for of the one that is to take its place.
    pub(super) fn next_link(&self) -> Option<BorrowedFd<'_>> {
        self.next.as_ref()?.0.link.as_ref().map(AsFd::as_fd)
    }

    /// What it has said.
    pub(super) fn read(&mut self) -> Vec<ToSupervisor> {
        self.child.as_mut().map(Running::read).unwrap_or_default()
    }

    /// What the one that is to take its place has said.
    pub(super) fn read_next(&mut self) -> Vec<ToSupervisor> {
        self.next.as_mut().map(|(child, ..)| child.read()).unwrap_or_default()
    }

    /// Tells it something; a dead one needs not know.
    pub(super) fn tell(&mut self, message: &FromSupervisor) {
        if let Some(child) = &mut self.child {
            child.tell(message);
        }
    }

    /// Tells it, and all that have given way.
    pub(super) fn tell_all(&mut self, message: &FromSupervisor) {
        self.child.iter_mut().chain(&mut self.retired).for_each(|child| child.tell(message));
    }

    /// Which one has ended, and how. To be asked again until none has.
    pub(super) fn reap(&mut self) -> Option<Ended> {
        self.retired.retain(|child| child.ended().is_none());
        if let Some(how) = self.next.as_ref().and_then(|(child, ..)| child.ended()) {
            self.next = None;
            return Some(Ended::Next(how));
        }
        let child = self.child.as_ref()?;
        let how = child.ended()?;
        self.crashes = if child.since.elapsed() >= STABLE { 0 } else { self.crashes + 1 };
        self.child = None;
        Some(Ended::Current(how))
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
        self.abandon_next();
        self.child.take().into_iter().chain(self.retired.drain(..)).for_each(Running::kill);
    }

    /// When the next one is due.
    pub(super) fn respawn_at(&self) -> Option<Instant> {
        self.respawn_at
    }

    /// Whether nothing is open any more, or no proxy is left.
    pub(super) fn is_done(&self) -> bool {
        (self.drained || self.child.is_none()) && self.retired.is_empty()
    }

    /// It said that nothing is open any more.
    pub(super) fn drained(&mut self) {
        self.drained = true;
    }
}

impl Running {
    fn read(&mut self) -> Vec<ToSupervisor> {
        let mut buffer = [0; 4096];
        while let Some(link) = &mut self.link {
            match link.read(&mut buffer) {
                Ok(0) => self.link = None,
                Ok(length) if self.unread.len() + length > LONGEST_LINE => self.link = None,
                Ok(length) => self.unread.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => self.link = None,
            }
        }
        let mut messages = Vec::new();
        while let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.unread.drain(..=end).collect();
            // A newer proxy may say more than this supervisor knows.
            messages.extend(serde_json::from_slice(&line).ok());
        }
        messages
    }

    fn tell(&mut self, message: &FromSupervisor) {
        if let (Some(link), Ok(mut line)) = (&mut self.link, serde_json::to_vec(message)) {
            line.push(b'\n');
            // A few bytes into an empty socket: it does not block, and a peer that is gone will be reaped.
            let _ = link.write_all(&line);
        }
    }

    /// How it has ended, when it has.
    fn ended(&self) -> Option<String> {
        match waitpid(self.pid, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, status)) => Some(format!("exit status {status}")),
            Ok(WaitStatus::Signaled(_, signal, _)) => Some(signal.as_str().to_owned()),
            Ok(_) => None,
            Err(errno) => Some(errno.desc().to_owned()),
        }
    }

    fn kill(self) {
        let _ = nix::sys::signal::kill(self.pid, nix::sys::signal::Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
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

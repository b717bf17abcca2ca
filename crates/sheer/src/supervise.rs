//! The supervisor: holds what outlives a proxy, and stands between the outside and a workload's processes.
//!
//! One thread, one loop over descriptors. Its children are the keeper (which has the namespaces and the command) and the
//! proxy. Order of a start: run directory, namespaces, sockets, proxy; when that is ready, the command. Order of an end:
//! capture in a shared namespace is undone, the proxy drains, the command ends, the proxy ends, the keeper ends.

pub(crate) mod account;
mod adopt;
mod launch;
mod notify;
mod proxy;
pub(crate) mod requests;
pub(crate) mod rundir;
mod settle;
mod signals;
mod upgrade;

pub(crate) use adopt::hierarchy;
pub(crate) use upgrade::READY_WITHIN;

use crate::cmd::run::Workload;
use crate::dirs::{self, Dirs};
use crate::keeper::{self, FromKeeper, ToKeeper};
use anyhow::{Context, Result, anyhow, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use notify::Notify;
use proxy::{Ended, Proxy};
use requests::Requests;
use rundir::{Process, RunDir};
use settle::Settled;
use sheer_proxy::plan::{FromSupervisor, ToSupervisor};
use sheer_proxy::platform;
use signals::{Origin, Signals};
use std::ffi::OsString;
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, ExitCode};
use std::time::{Duration, Instant};

/// How long a draining workload serves on before the command is told; contracts.md, "Draining".
const SERVE_ON: Duration = Duration::from_secs(5);
/// How long a proxy may take to finish what is open after its command has ended.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// When a start that hangs is remarked upon.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a workload's own name is made of: its service, and the host where its control plane is on another one, so that
/// hosts that know nothing of each other choose different names.
fn stem(service: &str, workload: &Workload) -> String {
    // A token alone names a control plane too.
    let only_token = workload.control.is_empty() && workload.join_token_file.is_some();
    if !only_token && workload.control.iter().all(|address| address.to_string().starts_with("unix:")) {
        return service.to_owned();
    }
    let host = nix::unistd::gethostname().unwrap_or_default().to_string_lossy().to_lowercase();
    let label = |character: char| character.is_ascii_lowercase() || character.is_ascii_digit() || character == '-';
    let first = host.split('.').next().unwrap_or_default();
    let text: String = format!("{service}-{first}").chars().filter(|character| label(*character)).collect();
    // Room for a number, within the 63 characters of a label.
    text.chars().take(56).collect::<String>().trim_end_matches('-').to_owned()
}

/// Runs a workload to its end. Without a command, the proxy alone.
///
/// # Errors
/// When it cannot start: what is wrong and how to mend it.
pub(crate) fn run(workload: &Workload, command: &[OsString]) -> Result<ExitCode> {
    let settled = Settled::of(workload, !command.is_empty())?;
    for remark in &settled.remarks {
        say(remark);
    }
    let signals = Signals::begin()?;
    let dirs = Dirs::of_user()?;
    let runs = rundir::runs(&dirs);
    make_runs(&dirs, &runs)?;
    if let Err(error) = rundir::sweep(&runs) {
        say(&format!("{error:#}"));
    }
    let namespace = settled.service.namespace.as_str();
    let given = workload.name.as_ref().map(|name| name.as_str());
    let stem = stem(settled.service.name.as_str(), workload);
    let (run, name) = RunDir::claim(&runs, namespace, &stem, given)?;
    let mut supervisor = match launch::launch(workload, settled, command, &run, &name, signals, &dirs) {
        Ok(supervisor) => supervisor,
        Err(error) => {
            if let Err(left) = run.remove() {
                say(&format!("{left:#}; 'sheer clean' tries again"));
            }
            return Err(error);
        }
    };
    supervisor.run = Some(run);
    let result = supervisor.supervise();
    supervisor.end();
    result
}

/// The directory of run directories; with root, proxies of another user pass through it.
fn make_runs(dirs: &Dirs, runs: &std::path::Path) -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        dirs::make(&dirs.runtime, 0o755)?;
        dirs::make(runs, 0o711)
    } else {
        dirs::make_private(&dirs.runtime)?;
        dirs::make_private(runs)
    }
}

/// One line for the person at the terminal.
fn say(text: &str) {
    anstream::eprintln!("sheer: {text}");
}

/// A file in memory that children read, at its beginning.
pub(crate) fn memory_file(name: &str, bytes: &[u8]) -> Result<OwnedFd> {
    let file = nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
    let mut file = std::fs::File::from(file);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file.into())
}

/// Where a workload's life is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The proxy gets ready for the first time.
    Starting,
    /// The command runs; without one, the proxy does.
    Running,
    /// The proxy drains; at the time given, the command is told to stop.
    Draining(Instant),
    /// The command was told to stop; without one, the proxy was told to drain.
    Stopping(Option<Instant>),
    /// The command has ended; at the time given, the proxy is not waited for any more.
    Leaving(Instant),
}

struct Supervisor {
    signals: Signals,
    run: Option<RunDir>,
    record: rundir::Record,
    keeper: Child,
    link: OwnedFd,
    proxy: Proxy,
    notify: Option<Notify>,
    requests: Requests,
    upgrade: Option<upgrade::Upgrade>,
    adopted: Option<adopt::Adopted>,
    /// How long the proxy alone may drain.
    grace: Duration,
    has_command: bool,
    phase: Phase,
    started: Instant,
    hint: Option<String>,
    announcement: String,
    status: u8,
    /// When the rules of a shared network are looked at again.
    look_at: Instant,
    /// Whether it was said that something was refused.
    told_refused: bool,
}

/// What became readable in one turn of the loop.
#[derive(Default)]
struct Ready {
    signals: bool,
    link: bool,
    proxy: bool,
    notify: bool,
    adopted: bool,
    requests: bool,
    next: bool,
}

impl Supervisor {
    /// Serves until everything has ended; the exit status of the command.
    fn supervise(&mut self) -> Result<ExitCode> {
        loop {
            let ready = self.wait()?;
            if ready.proxy {
                self.hear_proxy()?;
            }
            if ready.link {
                self.hear_keeper()?;
            }
            if ready.notify
                && let Some(notify) = &self.notify
            {
                notify.pass_on();
            }
            if ready.adopted
                && let Some(adopted) = &mut self.adopted
            {
                adopted.look_again();
            }
            if ready.requests {
                self.hear_requests();
            }
            if ready.next {
                self.hear_next()?;
            }
            if ready.signals {
                self.hear_signals()?;
            }
            if self.advance()? {
                return Ok(ExitCode::from(self.status));
            }
        }
    }

    fn wait(&mut self) -> Result<Ready> {
        fn add<'a>(waits: &mut Vec<PollFd<'a>>, fd: Option<BorrowedFd<'a>>) -> Option<usize> {
            waits.push(PollFd::new(fd?, PollFlags::POLLIN));
            Some(waits.len() - 1)
        }
        let timeout = match self.next_event() {
            None => PollTimeout::NONE,
            Some(at) => {
                // Rounded up, so that the moment has come when the wait is over.
                let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }
        };
        let mut waits = Vec::with_capacity(7);
        let signals = add(&mut waits, Some(self.signals.as_fd()));
        let link = add(&mut waits, Some(self.link.as_fd()));
        let proxy = add(&mut waits, self.proxy.link());
        let notify = add(&mut waits, self.notify.as_ref().map(AsFd::as_fd));
        let adopted = add(&mut waits, self.adopted.as_ref().and_then(adopt::Adopted::watch));
        let requests = add(&mut waits, Some(self.requests.as_fd()));
        let next = add(&mut waits, self.proxy.next_link());
        match poll(&mut waits, timeout) {
            Err(nix::errno::Errno::EINTR) => return Ok(Ready::default()),
            other => other?,
        };
        let is = |at: Option<usize>| at.is_some_and(|at| waits[at].any().unwrap_or(true));
        Ok(Ready {
            signals: is(signals),
            link: is(link),
            proxy: is(proxy),
            notify: is(notify),
            adopted: is(adopted),
            requests: is(requests),
            next: is(next),
        })
    }

    fn next_event(&self) -> Option<Instant> {
        let phase = match self.phase {
            Phase::Starting => self.hint.as_ref().map(|_| self.started + PATIENCE),
            Phase::Running => None,
            Phase::Draining(at) | Phase::Leaving(at) => Some(at),
            Phase::Stopping(at) => at,
        };
        let look = self.adopted.as_ref().filter(|adopted| adopted.refuses()).map(|_| self.look_at);
        let upgrade = self.upgrade.as_ref().map(|upgrade| upgrade.until);
        [phase, self.proxy.respawn_at(), look, upgrade].into_iter().flatten().min()
    }

    /// Does what the time has come for; true when all is over.
    fn advance(&mut self) -> Result<bool> {
        let now = Instant::now();
        if self.proxy.respawn_at().is_some_and(|at| at <= now) {
            self.proxy.spawn()?;
            if matches!(self.phase, Phase::Draining(_) | Phase::Stopping(_)) {
                self.proxy.tell(&FromSupervisor::Drain);
            }
            self.record.proxy = self.proxy.pid().and_then(Process::of);
            self.write_record()?;
        }
        if let Some(adopted) = self.adopted.as_mut().filter(|adopted| adopted.refuses() && self.look_at <= now) {
            self.look_at = now + keeper::LOOK;
            let udp = adopted.newly_refused();
            self.refused(udp, 0);
        }
        if self.upgrade.as_ref().is_some_and(|upgrade| upgrade.until <= now) {
            self.give_upgrade_up(format!("the new proxy was not ready within {} s", READY_WITHIN.as_secs()));
        }
        match self.phase {
            Phase::Starting if now >= self.started + PATIENCE => {
                if let Some(hint) = self.hint.take() {
                    say(&hint);
                }
            }
            Phase::Draining(at) if now >= at => {
                self.signal_command(Signal::SIGTERM)?;
                self.phase = Phase::Stopping(None);
            }
            Phase::Leaving(at) | Phase::Stopping(Some(at)) if now >= at || self.proxy.is_done() => return Ok(true),
            _ => {}
        }
        Ok(false)
    }

    fn hear_proxy(&mut self) -> Result<()> {
        for message in self.proxy.read() {
            match message {
                ToSupervisor::Ready if self.phase == Phase::Starting => {
                    // Ready is what captures too.
                    if let Some(adopted) = &mut self.adopted {
                        adopted.begin()?;
                    }
                    self.proxy.served();
                    say(&self.announcement);
                    if self.has_command {
                        keeper::tell(self.link.as_fd(), &ToKeeper::Start, &[])?;
                    } else if let Some(notify) = &self.notify {
                        notify.tell("READY=1");
                    }
                    self.phase = Phase::Running;
                    // From now on it mostly waits; with the code of its start it is only larger.
                    let _ = sheer_proxy::platform::forget_code();
                }
                ToSupervisor::Ready => {}
                ToSupervisor::Failed { message } if self.phase == Phase::Starting => bail!(message),
                ToSupervisor::Failed { message } => say(&format!("the proxy fails: {message}")),
                ToSupervisor::Drained => self.proxy.drained(),
            }
        }
        Ok(())
    }

    fn hear_keeper(&mut self) -> Result<()> {
        let (mut buffer, mut none) = (vec![0; keeper::MESSAGE], Vec::new());
        loop {
            let length = match platform::receive_with(self.link.as_fd(), &mut buffer, &mut none, false) {
                Ok(0) => bail!("the keeper of the workload has died; the workload ends"),
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error).context("cannot hear the keeper of the workload"),
            };
            match serde_json::from_slice(&buffer[..length])? {
                FromKeeper::NotStarted { message, status } => {
                    say(&message);
                    self.command_ended(status);
                }
                FromKeeper::Ended { status } => self.command_ended(status),
                FromKeeper::Failed { message } => bail!(message),
                FromKeeper::Refused { udp, other } => self.refused(udp, other),
                FromKeeper::Made { .. } | FromKeeper::Started { .. } => {}
            }
        }
    }

    /// The rules refused packets: the proxy counts them, and whoever started the workload is told once.
    fn refused(&mut self, udp: u64, other: u64) {
        if (udp, other) == (0, 0) {
            return;
        }
        self.proxy.tell(&FromSupervisor::Refused { udp, other });
        if !std::mem::replace(&mut self.told_refused, true) {
            let what = if udp > 0 { "UDP other than DNS" } else { "traffic that is neither TCP nor UDP" };
            say(&format!(
                "{what} of the workload cannot be carried and was refused; sheer_refused_total in its metrics counts on"
            ));
        }
    }

    fn command_ended(&mut self, status: u8) {
        self.status = status;
        self.give_upgrade_up("the workload ended".to_owned());
        self.proxy.tell_all(&FromSupervisor::Gone);
        self.phase = Phase::Leaving(Instant::now() + LAST_WORDS);
    }

    fn hear_signals(&mut self) -> Result<()> {
        for (signal, origin) in self.signals.read() {
            match signal {
                Signal::SIGCHLD => self.reap()?,
                Signal::SIGTERM => self.stop(signal)?,
                _ if self.phase == Phase::Starting && signals::ends(signal) => return self.give_up(signal),
                // Without a command there is nobody else to mean.
                _ if !self.has_command && signals::ends(signal) => self.stop(signal)?,
                _ if origin == Origin::Terminal => {}
                _ => self.signal_command(signal)?,
            }
        }
        Ok(())
    }

    /// A proxy that has ended is replaced; the keeper's end is heard on its link.
    fn reap(&mut self) -> Result<()> {
        // What it said last says more than how it ended.
        self.hear_proxy()?;
        self.hear_next()?;
        let how = match self.proxy.reap() {
            None => return Ok(()),
            Some(Ended::Next(how)) => {
                self.give_upgrade_up(format!("the new proxy has died ({how})"));
                return self.reap();
            }
            Some(Ended::Current(how)) => how,
        };
        self.give_upgrade_up("the proxy has died meanwhile; it is replaced by one of its own version".to_owned());
        self.record.proxy = None;
        match self.phase {
            Phase::Leaving(_) | Phase::Stopping(Some(_)) => self.proxy.forget(),
            _ => {
                say(&format!("the proxy has died ({how}); another one is started"));
                self.proxy.respawn_soon();
            }
        }
        Ok(())
    }

    fn stop(&mut self, signal: Signal) -> Result<()> {
        match self.phase {
            Phase::Starting => self.give_up(signal)?,
            Phase::Running => {
                if let Some(notify) = &self.notify {
                    notify.tell("STOPPING=1");
                }
                if let Some(adopted) = &mut self.adopted {
                    adopted.end();
                }
                self.give_upgrade_up("the workload is about to end".to_owned());
                self.proxy.tell(&FromSupervisor::Drain);
                let now = Instant::now();
                self.phase = if self.has_command {
                    Phase::Draining(now + SERVE_ON)
                } else {
                    Phase::Stopping(Some(now + SERVE_ON + self.grace))
                };
            }
            // Asked twice: at once.
            Phase::Draining(_) => self.phase = Phase::Draining(Instant::now()),
            Phase::Stopping(Some(_)) => self.phase = Phase::Stopping(Some(Instant::now())),
            Phase::Stopping(None) => self.signal_command(signal)?,
            Phase::Leaving(_) => self.phase = Phase::Leaving(Instant::now()),
        }
        Ok(())
    }

    /// Ends before the command was started.
    fn give_up(&mut self, signal: Signal) -> Result<()> {
        self.status = 128 + signal as u8;
        self.phase = Phase::Leaving(Instant::now());
        Ok(())
    }

    fn signal_command(&self, signal: Signal) -> Result<()> {
        keeper::tell(self.link.as_fd(), &ToKeeper::Signal { number: signal as i32 }, &[])
    }

    fn write_record(&self) -> Result<()> {
        self.run.as_ref().map_or(Ok(()), |run| run.write(&self.record))
    }

    /// Undoes everything, whatever state it is in.
    fn end(&mut self) {
        if let Some(adopted) = &mut self.adopted {
            adopted.end();
        }
        self.proxy.kill();
        // One that has died already needs not know; it ends in any case when it hears nobody any more.
        let _ = keeper::tell(self.link.as_fd(), &ToKeeper::Leave, &[]);
        if let Ok((closed, _)) = std::os::unix::net::UnixStream::pair() {
            self.link = closed.into();
        }
        if let Err(error) = self.keeper.wait() {
            say(&format!("cannot wait for the keeper: {error}"));
        }
        if let Some(Err(error)) = self.run.take().map(RunDir::remove) {
            say(&format!("{error:#}; 'sheer clean' tries again"));
        }
    }
}

/// Waits for the keeper's first message; the listeners and tables that came with it.
fn made(link: BorrowedFd<'_>) -> Result<(Vec<sheer_proxy::plan::Role>, usize, Vec<OwnedFd>)> {
    let (mut buffer, mut descriptors) = (vec![0; keeper::MESSAGE], Vec::new());
    let length = platform::receive_with(link, &mut buffer, &mut descriptors, true)?;
    if length == 0 {
        bail!("the keeper of the workload died while it began");
    }
    match serde_json::from_slice(&buffer[..length])? {
        FromKeeper::Made { listeners, tables } => Ok((listeners, tables, descriptors)),
        FromKeeper::Failed { message } => bail!(message),
        other => Err(anyhow!("unexpected message from the keeper: {other:?}")),
    }
}

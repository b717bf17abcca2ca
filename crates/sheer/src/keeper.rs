//! The keeper: a small process that holds the workload's namespaces, is the parent of its command, and outlives the
//! supervisor by the moment it takes to clean up after it.
//!
//! It talks with the supervisor over a message socket ([`ToKeeper`], [`FromKeeper`]; descriptors travel beside them) and
//! hands sockets made inside the namespace to proxies over another ([`Batch`]). The end of the first is the end of the
//! workload: the keeper then kills what is left of the command and ends.

pub(crate) mod descendants;
mod names;
pub(crate) mod namespace;
pub(crate) mod netlink;

use crate::supervise::rundir;
use anyhow::{Context, Result, bail};
use namespace::NamespacePlan;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use sheer_proxy::capture::netns::Batch;
use sheer_proxy::plan::Role;
use sheer_proxy::platform::{self, Account, Birth};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// Larger than any message here.
pub(crate) const MESSAGE: usize = 64 * 1024;

/// What a keeper must know to begin.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct KeeperPlan {
    /// Namespaces to make; without any the command shares the host's.
    pub(crate) namespace: Option<NamespacePlan>,
    /// The workload's run directory.
    pub(crate) run_dir: PathBuf,
    /// The process group of the supervisor, which the command joins, so that both are one job of the terminal.
    pub(crate) job: i32,
    /// Whom the command runs as; unset: as the supervisor does.
    pub(crate) account: Option<(u32, u32, Vec<u32>)>,
    /// Variables set for the command.
    pub(crate) set: Vec<(String, String)>,
    /// Variables taken from the command.
    pub(crate) unset: Vec<String>,
}

/// What the supervisor says.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case")]
pub(crate) enum ToKeeper {
    /// Start the command.
    Start,
    /// End; the supervisor itself cleans up. Without it the end of the link means that the supervisor has died.
    Leave,
    /// Send the command a signal.
    Signal {
        /// Its number.
        number: i32,
    },
}

/// What the keeper says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case")]
pub(crate) enum FromKeeper {
    /// The namespaces are there. Beside the message: the listeners, then as many tables, then the socket that hands out
    /// sockets.
    Made {
        /// What arrives on each listener.
        listeners: Vec<Role>,
        /// How many socket tables.
        tables: usize,
    },
    /// It could not begin.
    Failed {
        /// What is wrong and how to mend it.
        message: String,
    },
    /// The command runs.
    Started {
        /// Its process.
        pid: i32,
    },
    /// The command cannot be started.
    NotStarted {
        /// What is wrong.
        message: String,
        /// The exit status that shells give for it.
        status: u8,
    },
    /// The command has ended.
    Ended {
        /// Its exit status, or 128 and the number of the signal that ended it.
        status: u8,
    },
    /// So many more packets that cannot be carried were refused.
    Refused {
        /// Datagrams that are not DNS.
        udp: u64,
        /// Neither TCP nor UDP.
        other: u64,
    },
}

/// `sheer __keeper PLAN LINK [COMMAND...]`: two inherited descriptors and the command.
pub(crate) fn main(arguments: &[OsString]) -> Result<ExitCode> {
    let number = |at: usize| {
        let text = arguments.get(at).and_then(|argument| argument.to_str());
        text.and_then(|text| text.parse().ok()).context("__keeper is started by 'sheer run' alone")
    };
    let plan = File::from(platform::adopt(number(0)?)?);
    let link = platform::adopt(number(1)?)?;
    let plan: KeeperPlan = serde_json::from_reader(plan).context("cannot read the keeper's plan")?;
    let command = arguments.get(2..).unwrap_or_default();
    let mut keeper = match Keeper::begin(plan, link.try_clone()?, command) {
        Ok(keeper) => keeper,
        Err(error) => {
            tell(link.as_fd(), &FromKeeper::Failed { message: format!("{error:#}") }, &[])?;
            return Ok(ExitCode::FAILURE);
        }
    };
    let result = keeper.serve();
    keeper.end();
    result.map(|()| ExitCode::SUCCESS)
}

pub(crate) fn tell(link: BorrowedFd<'_>, message: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MESSAGE {
        bail!("a message of {} bytes is too long", bytes.len());
    }
    platform::send_with(link, &bytes, descriptors).map_err(Into::into)
}

struct Keeper {
    plan: KeeperPlan,
    command: Vec<OsString>,
    link: OwnedFd,
    /// Where proxies ask for sockets.
    vending: Option<OwnedFd>,
    signals: SignalFd,
    running: Option<Pid>,
    /// Whether the supervisor said that it cleans up.
    relieved: bool,
    /// Undone at the end, when nothing of the workload runs any more.
    joined: Option<namespace::Joined>,
    /// What was refused so far: datagrams, and what is neither TCP nor UDP.
    refused: (u64, u64),
    looked: Instant,
}

/// How often is looked whether the rules refused something.
pub(crate) const LOOK: Duration = Duration::from_secs(2);

impl Keeper {
    fn begin(plan: KeeperPlan, link: OwnedFd, command: &[OsString]) -> Result<Self> {
        // Nothing but the end of the link ends a keeper, whatever is sent to its group or its whole control group.
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&SigSet::all()), None)?;
        let signals = SigSet::from(Signal::SIGCHLD);
        let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        nix::sys::prctl::set_child_subreaper(true)?;

        let (mut vending, mut joined) = (None, None);
        let mut descriptors = Vec::new();
        let (mut roles, mut tables) = (Vec::new(), 0);
        if let Some(namespace) = &plan.namespace {
            let made = namespace::make(namespace, &plan.run_dir)?;
            tables = made.tables.len();
            joined = made.joined;
            for (role, socket) in made.listeners {
                roles.push(role);
                descriptors.push(socket);
            }
            descriptors.extend(made.tables);
            let (own, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
            descriptors.push(theirs);
            vending = Some(own);
        }
        let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(OwnedFd::as_fd).collect();
        tell(link.as_fd(), &FromKeeper::Made { listeners: roles, tables }, &borrowed)?;
        let command = command.to_vec();
        let (refused, looked) = ((0, 0), Instant::now());
        Ok(Self { plan, command, link, vending, signals, running: None, relieved: false, joined, refused, looked })
    }

    /// Serves until the supervisor closes the link.
    fn serve(&mut self) -> Result<()> {
        // From now on it mostly waits; with the code of its start it is only larger.
        let _ = sheer_proxy::platform::forget_code();
        loop {
            let mut waits = vec![
                PollFd::new(self.link.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            ];
            waits.extend(self.vending.as_ref().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
            let look = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::NONE);
            match poll(&mut waits, if self.plan.namespace.is_some() { look } else { PollTimeout::NONE }) {
                Err(nix::errno::Errno::EINTR) => continue,
                other => other?,
            };
            let ready: Vec<bool> = waits.iter().map(|wait| wait.any().unwrap_or(true)).collect();
            drop(waits);
            if ready.get(2) == Some(&true) {
                self.vend();
            }
            if ready[1] {
                self.reap()?;
            }
            if ready[0] && !self.listen()? {
                return Ok(());
            }
            if self.plan.namespace.is_some() && self.looked.elapsed() >= LOOK {
                self.tell_refused();
            }
        }
    }

    /// Takes one message; false at the end of the link.
    fn listen(&mut self) -> Result<bool> {
        let (mut buffer, mut none) = (vec![0; MESSAGE], Vec::new());
        let length = match platform::receive_with(self.link.as_fd(), &mut buffer, &mut none, false) {
            Ok(0) => return Ok(false),
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
            Err(_) => return Ok(false),
        };
        match serde_json::from_slice(&buffer[..length])? {
            ToKeeper::Start => self.start(),
            ToKeeper::Leave => {
                self.relieved = true;
                return Ok(false);
            }
            ToKeeper::Signal { number } => {
                if let (Some(pid), Ok(signal)) = (self.running, Signal::try_from(number)) {
                    // It may have ended in this moment, which SIGCHLD will tell.
                    let _ = kill(pid, signal);
                }
                Ok(())
            }
        }?;
        Ok(true)
    }

    fn start(&mut self) -> Result<()> {
        let [program, arguments @ ..] = &self.command[..] else {
            bail!("there is no command to start");
        };
        let mut command = Command::new(program);
        command.args(arguments);
        for name in &self.plan.unset {
            command.env_remove(name);
        }
        for (name, value) in &self.plan.set {
            command.env(name, value);
        }
        let account = self.plan.account.clone();
        let birth = Birth {
            dies_with_parent: Some(Signal::SIGKILL as i32),
            group: Some(self.plan.job),
            account: account.map(|(user, group, groups)| Account { user, group, groups }),
            ..Birth::default()
        };
        platform::prepare(&mut command, birth);
        let message = match command.spawn() {
            Ok(child) => {
                let pid = Pid::from_raw(child.id().cast_signed());
                self.running = Some(pid);
                // The command's streams are its own: whoever reads them must see their end when it ends.
                release_streams()?;
                FromKeeper::Started { pid: pid.as_raw() }
            }
            Err(error) => not_started(program, &error, self.plan.account.as_ref().map(|account| account.0)),
        };
        tell(self.link.as_fd(), &message, &[])
    }

    fn reap(&mut self) -> Result<()> {
        while let Ok(Some(_)) = self.signals.read_signal() {}
        loop {
            let (pid, status) = match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, code as u8),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + signal as u8),
                Ok(WaitStatus::StillAlive) | Err(nix::errno::Errno::ECHILD) => return Ok(()),
                Ok(_) | Err(nix::errno::Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            if self.running == Some(pid) {
                self.running = None;
                // The supervisor may be dead; then the end of the link says so.
                let _ = tell(self.link.as_fd(), &FromKeeper::Ended { status }, &[]);
            }
        }
    }

    /// Tells what the rules have refused since the last time.
    fn tell_refused(&mut self) {
        self.looked = Instant::now();
        let count = |counter| crate::nft::packets("sheer", counter).unwrap_or_default();
        let now = (count("refused_udp"), count("refused_other"));
        let (udp, other) = (now.0.saturating_sub(self.refused.0), now.1.saturating_sub(self.refused.1));
        self.refused = now;
        if (udp, other) != (0, 0) {
            // The supervisor may be dead; then the end of the link says so.
            let _ = tell(self.link.as_fd(), &FromKeeper::Refused { udp, other }, &[]);
        }
    }

    /// Makes the sockets that a proxy asks for, here, inside the namespace.
    fn vend(&mut self) {
        let Some(socket) = &self.vending else { return };
        let (mut buffer, mut none) = ([0; 8], Vec::new());
        let length = match platform::receive_with(socket.as_fd(), &mut buffer, &mut none, false) {
            Ok(length @ 1..) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            // The supervisor holds the other end for as long as it lives.
            Ok(0) | Err(_) => {
                self.vending = None;
                return;
            }
        };
        let Some(wanted) = Batch::decode(&buffer[..length]) else { return };
        let domain = if wanted.v6 { socket2::Domain::IPV6 } else { socket2::Domain::IPV4 };
        let made: Vec<_> = (0..wanted.count)
            .map_while(|_| socket2::Socket::new(domain, socket2::Type::STREAM.nonblocking(), None).ok())
            .collect();
        let borrowed: Vec<BorrowedFd<'_>> = made.iter().map(AsFd::as_fd).collect();
        let batch = Batch { v6: wanted.v6, count: made.len() as u8 };
        // A proxy that does not read has died; its successor asks again.
        let _ = platform::send_with(socket.as_fd(), &batch.encode(), &borrowed);
    }

    /// The workload is over: nothing of it stays.
    fn end(&mut self) {
        descendants::kill_all();
        self.joined = None;
        if self.relieved {
            return;
        }
        // The kernel may close the link of a dying process before it frees its lock.
        for _ in 0..LOCK_TRIES {
            if let Ok(Some(run)) = rundir::abandoned(&self.plan.run_dir) {
                // There is nobody left to tell; `sheer clean` tries again and says.
                let _ = run.remove();
                return;
            }
            std::thread::sleep(LOCK_PAUSE);
        }
    }
}

/// How often a dead supervisor's lock is tried: for two seconds, then another supervisor has taken over its directory.
const LOCK_TRIES: u32 = 100;
/// The pause between two tries.
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Standard input and output become /dev/null; standard error stays for complaints.
fn release_streams() -> Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    Ok(())
}

fn not_started(program: &OsStr, error: &io::Error, user: Option<u32>) -> FromKeeper {
    // A directory of the search path that cannot be entered makes exec say "permission denied" of a program that is nowhere.
    let somewhere = program.as_encoded_bytes().contains(&b'/') || {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|place| place.join(program).exists())
    };
    let kind = if somewhere { error.kind() } else { io::ErrorKind::NotFound };
    let program = program.to_string_lossy();
    let (status, why) = match kind {
        io::ErrorKind::NotFound => {
            (127, "there is no such program, or the interpreter that it names is missing".to_owned())
        }
        io::ErrorKind::PermissionDenied => match user {
            Some(user) => (
                126,
                format!(
                    "user id {user} may not execute it; check the permissions of the file and the directories above \
                         it, or run the command as somebody else by --user"
                ),
            ),
            None => (126, "permission denied".to_owned()),
        },
        _ => (126, error.to_string()),
    };
    FromKeeper::NotStarted { message: format!("cannot start '{program}': {why}"), status }
}

/// Starts a keeper and returns its process and the supervisor's end of the link.
pub(crate) fn spawn(plan: &KeeperPlan, command: &[OsString]) -> Result<(std::process::Child, OwnedFd)> {
    use std::os::fd::AsRawFd;
    let (own, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    let file = crate::supervise::memory_file("keeper plan", &serde_json::to_vec(plan)?)?;
    let mut child = Command::new("/proc/self/exe");
    std::os::unix::process::CommandExt::arg0(&mut child, "sheer");
    child.arg("__keeper").arg(file.as_raw_fd().to_string()).arg(theirs.as_raw_fd().to_string()).args(command);
    child.stdin(Stdio::inherit()).stdout(Stdio::inherit()).stderr(Stdio::inherit());
    let keep = vec![file.as_raw_fd(), theirs.as_raw_fd()];
    platform::prepare(&mut child, Birth { keep, group: Some(0), ..Birth::default() });
    let child = child.spawn().context("cannot start the keeper of the workload")?;
    Ok((child, own))
}

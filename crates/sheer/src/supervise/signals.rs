//! Signals as readable events, with their origin.

use anyhow::Result;
use nix::libc;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::os::fd::{AsFd, BorrowedFd};

/// Those that the supervisor takes. The rest acts as ever: SIGTSTP stops the whole job, the command with it.
const TAKEN: [Signal; 9] = [
    Signal::SIGCHLD,
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
    Signal::SIGALRM,
];

/// Who sent a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// The terminal, to its whole foreground job: the command has it already.
    Terminal,
    /// A process, to the supervisor: meant for the command.
    Process,
}

/// Whether a signal ends a program that does not expect it.
pub(super) fn ends(signal: Signal) -> bool {
    !matches!(signal, Signal::SIGCHLD | Signal::SIGWINCH)
}

/// The signals of this process.
pub(super) struct Signals {
    descriptor: SignalFd,
}

impl Signals {
    /// Takes them from now on. Children begin with none blocked, `platform::prepare` sees to that.
    pub(super) fn begin() -> Result<Self> {
        let mask = TAKEN.into_iter().collect::<SigSet>();
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&mask), None)?;
        let descriptor = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Self { descriptor })
    }

    /// Those that have come.
    pub(super) fn read(&mut self) -> Vec<(Signal, Origin)> {
        let mut come = Vec::new();
        while let Ok(Some(info)) = self.descriptor.read_signal() {
            let origin = if info.ssi_code == libc::SI_KERNEL { Origin::Terminal } else { Origin::Process };
            if let Ok(signal) = Signal::try_from(info.ssi_signo.cast_signed()) {
                come.push((signal, origin));
            }
        }
        come
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

//! One proxy takes another's place under a living workload.
//!
//! The new one is started beside the old one, on the same sockets. When it is ready it takes what comes new, and the old
//! one is told: it accepts nothing more, tells its clients to connect again, and ends with its last connection, at the
//! latest after `--drain-grace`. A new one that does not become ready is ended, and nothing has changed.

use super::requests::{Answer, Asker, Wish};
use super::rundir::Process;
use super::{Phase, Supervisor, say};
use anyhow::{Result, bail};
use sheer_proxy::plan::ToSupervisor;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a new proxy may take to get ready.
pub(crate) const READY_WITHIN: Duration = Duration::from_secs(20);
/// Former proxies that still have connections. Each is a process of some megabytes.
const MAX_RETIRED: usize = 4;

/// A replacement on its way.
pub(super) struct Upgrade {
    asker: Asker,
    /// When it is given up.
    pub(super) until: Instant,
}

impl Supervisor {
    pub(super) fn hear_requests(&mut self) {
        while let Some((asker, Wish::Replace { program })) = self.requests.next() {
            match self.begin_upgrade(&program) {
                Ok(()) => self.upgrade = Some(Upgrade { asker, until: Instant::now() + READY_WITHIN }),
                Err(error) => asker.tell(&Answer::Refused { message: format!("{error:#}") }),
            }
        }
    }

    fn begin_upgrade(&mut self, program: &Path) -> Result<()> {
        match self.phase {
            Phase::Starting => bail!("the workload is only just starting"),
            Phase::Running => {}
            Phase::Draining(_) | Phase::Stopping(_) | Phase::Leaving(_) => bail!("the workload is about to end"),
        }
        if self.upgrade.is_some() {
            bail!("its proxy is being replaced already");
        }
        if self.proxy.retired() >= MAX_RETIRED {
            bail!(
                "{MAX_RETIRED} former proxies still have open connections; the first ends after --drain-grace, {} s, at the latest",
                self.grace.as_secs()
            );
        }
        self.proxy.begin_next(program)
    }

    pub(super) fn hear_next(&mut self) -> Result<()> {
        for message in self.proxy.read_next() {
            match message {
                ToSupervisor::Ready => {
                    let former = self.proxy.pid().unwrap_or_default();
                    self.proxy.promote();
                    self.record.proxy = self.proxy.pid().and_then(Process::of);
                    self.write_record()?;
                    let pid = self.proxy.pid().unwrap_or_default();
                    self.answer(&Answer::Replaced { pid, former });
                    return Ok(());
                }
                ToSupervisor::Failed { message } => self.give_upgrade_up(message),
                ToSupervisor::Drained => {}
            }
        }
        Ok(())
    }

    /// Ends the new proxy; the old one goes on as if nothing had been.
    pub(super) fn give_upgrade_up(&mut self, message: String) {
        self.proxy.abandon_next();
        if self.upgrade.is_some() {
            say(&format!("the proxy was not replaced: {message}"));
        }
        self.answer(&Answer::Refused { message });
    }

    fn answer(&mut self, answer: &Answer) {
        if let Some(upgrade) = self.upgrade.take() {
            upgrade.asker.tell(answer);
        }
    }
}

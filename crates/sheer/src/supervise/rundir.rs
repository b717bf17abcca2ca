//! Run directories: one for each running workload of a user, held by a lock.
//!
//! The kernel lets go of the lock when the supervisor dies, however it dies. So a directory without a holder is what a
//! killed supervisor left, and [`sweep`] removes it with everything it lists.

use crate::keeper::descendants::began;
use crate::keeper::netlink::Netlink;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use sheer_proxy::capture::rules::DELIVERY_V6;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const LOCK: &str = "lock";
const RECORD: &str = "workload.json";

/// The directory of the run directories.
pub(crate) fn runs(dirs: &crate::dirs::Dirs) -> PathBuf {
    dirs.runtime.join("run")
}

/// A process, told from a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    /// Its number.
    pub(crate) pid: i32,
    /// When it began, in clock ticks.
    pub(crate) began: u64,
}

impl Process {
    /// The running process with this number.
    pub(crate) fn of(pid: i32) -> Option<Self> {
        Some(Self { pid, began: began(pid)? })
    }

    /// Whether it still runs.
    pub(crate) fn lives(self) -> bool {
        began(self.pid) == Some(self.began)
    }
}

/// What a run directory says about its workload.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Record {
    /// `NAMESPACE/SERVICE`.
    pub(crate) service: String,
    /// The workload's name.
    pub(crate) name: String,
    /// How its traffic is captured.
    pub(crate) capture: String,
    /// The supervisor, the keeper and the proxy of the moment.
    pub(crate) supervisor: Option<Process>,
    /// The process that holds the namespaces.
    pub(crate) keeper: Option<Process>,
    /// The proxy.
    pub(crate) proxy: Option<Process>,
    /// User, group and groups of the command, where they differ from the supervisor's.
    pub(crate) account: Option<(u32, u32, Vec<u32>)>,
    /// Variables that the command was given.
    pub(crate) set: Vec<(String, String)>,
    /// nft tables in the host's network.
    pub(crate) tables: Vec<String>,
    /// Whether it shares the host's network with others, and what all of them need there.
    #[serde(default)]
    pub(crate) shared: bool,
    /// Where metrics, readiness and liveness are served.
    pub(crate) metrics: Option<String>,
    /// Where mesh peers connect.
    pub(crate) inbound: Option<String>,
    /// Published ports.
    pub(crate) publish: Vec<String>,
}

/// A run directory that this process holds.
#[derive(Debug)]
pub(crate) struct RunDir {
    /// Where it is.
    pub(crate) path: PathBuf,
    _lock: File,
}

impl RunDir {
    /// Takes the directory of a workload, of the given name or of the first free `STEM-N`.
    ///
    /// # Errors
    /// When a workload of this name runs already, or the directory cannot be made.
    pub(crate) fn claim(runs: &Path, namespace: &str, stem: &str, name: Option<&str>) -> Result<(Self, String)> {
        if let Some(name) = name {
            return match Self::take(&path_of(runs, namespace, name))? {
                Some(run) => Ok((run, name.to_owned())),
                None => bail!(
                    "a workload named {namespace}/{name} runs already on this host; stop it, or choose another --name"
                ),
            };
        }
        for number in 1u32.. {
            let name = format!("{stem}-{number}");
            if let Some(run) = Self::take(&path_of(runs, namespace, &name))? {
                return Ok((run, name));
            }
        }
        bail!("there is no free number for another workload {namespace}/{stem}-N")
    }

    /// Locks the directory; `None` when somebody else does.
    fn take(path: &Path) -> Result<Option<Self>> {
        // Another process may remove an abandoned directory between these steps.
        for _ in 0..100 {
            // What users without rights see of it is its name; with root the proxy and the command pass through it.
            let mode = if nix::unistd::geteuid().is_root() { 0o711 } else { 0o700 };
            match fs::DirBuilder::new().mode(mode).create(path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(error).with_context(|| format!("cannot make the run directory {}", path.display()));
                }
                _ => {}
            }
            let lock = match open_lock(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other.with_context(|| format!("cannot open the lock of {}", path.display()))?,
            };
            match lock.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(error).context("cannot lock the run directory"),
            }
            let run = Self { path: path.to_owned(), _lock: lock };
            if run.is_current() {
                run.clean().with_context(|| format!("cannot clean up {}", path.display()))?;
                return Ok(Some(run));
            }
        }
        bail!("the run directory {} is removed again and again by another process", path.display())
    }

    /// Whether the locked file is still the one in the directory.
    fn is_current(&self) -> bool {
        let held = self._lock.metadata().map(|found| (found.dev(), found.ino()));
        let there = fs::metadata(self.path.join(LOCK)).map(|found| (found.dev(), found.ino()));
        matches!((held, there), (Ok(held), Ok(there)) if held == there)
    }

    /// Writes what the directory says.
    ///
    /// # Errors
    /// As of the file system.
    pub(crate) fn write(&self, record: &Record) -> Result<()> {
        let (new, path) = (self.path.join("workload.json.new"), self.path.join(RECORD));
        let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&serde_json::to_vec_pretty(record)?)?;
        fs::rename(new, path).with_context(|| format!("cannot write to {}", self.path.display()))
    }

    /// Ends what the record lists and removes all files but the lock.
    fn clean(&self) -> Result<()> {
        if let Ok(record) = read(&self.path) {
            let own = std::process::id().cast_signed();
            let left = [record.keeper, record.proxy].into_iter().flatten();
            for process in left.filter(|process| process.pid != own && process.lives()) {
                // A keeper ends by itself with its supervisor; this is for one that was stopped.
                let _ =
                    nix::sys::signal::kill(nix::unistd::Pid::from_raw(process.pid), nix::sys::signal::Signal::SIGKILL);
            }
            for table in &record.tables {
                crate::nft::remove(table)?;
            }
            if record.shared && !self.others_share() {
                let mut netlink = Netlink::open()?;
                netlink.remove_virtual_route().context("cannot remove the route for 240.0.0.0/4")?;
                // Not there without IPv6.
                let _ = netlink.remove_address(DELIVERY_V6.into());
            }
        }
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            if entry.file_name() != LOCK {
                match entry.file_type()?.is_dir() {
                    true => fs::remove_dir_all(entry.path())?,
                    false => fs::remove_file(entry.path())?,
                }
            }
        }
        Ok(())
    }

    /// Whether another running workload shares the host's network.
    fn others_share(&self) -> bool {
        let others = self.path.parent().and_then(|runs| fs::read_dir(runs).ok()).into_iter().flatten().flatten();
        let needs =
            |path: &Path| read(path).is_ok_and(|record| record.shared && record.supervisor.is_some_and(Process::lives));
        others.map(|entry| entry.path()).any(|path| path != self.path && needs(&path))
    }

    /// Cleans up and removes the directory; the lock goes last.
    ///
    /// # Errors
    /// As of the file system, or when a table cannot be removed.
    pub(crate) fn remove(self) -> Result<()> {
        self.clean()?;
        fs::remove_file(self.path.join(LOCK))?;
        fs::remove_dir(&self.path).with_context(|| format!("cannot remove {}", self.path.display()))
    }
}

/// Takes a directory whose holder is dead; `None` while it lives or when there is no directory.
///
/// # Errors
/// As of the file system.
pub(crate) fn abandoned(path: &Path) -> Result<Option<RunDir>> {
    let lock = match File::options().write(true).open(path.join(LOCK)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => return Err(error.into()),
    }
    let run = RunDir { path: path.to_owned(), _lock: lock };
    Ok(run.is_current().then_some(run))
}

/// Removes what dead supervisors of this user left; the names of the workloads.
///
/// # Errors
/// When something cannot be removed; the rest is removed all the same.
pub(crate) fn sweep(runs: &Path) -> Result<Vec<String>> {
    let (mut swept, mut failed) = (Vec::new(), None);
    let entries = match fs::read_dir(runs) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(swept),
        other => other.with_context(|| format!("cannot look into {}", runs.display()))?,
    };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().replacen('_', "/", 1);
        match abandoned(&entry.path()).and_then(|run| run.map(RunDir::remove).transpose()) {
            Ok(Some(())) => swept.push(name),
            Ok(None) => {}
            Err(error) => failed = Some(error.context(format!("cannot clean up after {name}"))),
        }
    }
    failed.map_or(Ok(swept), Err)
}

/// The names of workloads whose supervisor has died and left something.
pub(crate) fn dead(runs: &Path) -> Vec<String> {
    let entries = fs::read_dir(runs).into_iter().flatten().flatten();
    // One without a record is only just being made, or is held by nobody and empty.
    let dead =
        entries.filter(|entry| read(&entry.path()).is_ok_and(|record| !record.supervisor.is_some_and(Process::lives)));
    let mut names: Vec<String> = dead.map(|entry| entry.file_name().to_string_lossy().replacen('_', "/", 1)).collect();
    names.sort();
    names
}

/// What the directory of a running workload says.
///
/// # Errors
/// When none of this name runs.
pub(crate) fn find(runs: &Path, namespace: &str, name: &str) -> Result<Record> {
    read(&path_of(runs, namespace, name))
        .ok()
        .filter(|record| record.supervisor.is_some_and(Process::lives))
        .with_context(|| {
            let running = running(runs);
            let hint = if running.is_empty() { "none runs".into() } else { format!("running: {}", running.join(", ")) };
            format!("no workload named {namespace}/{name} runs on this host as this user; {hint}")
        })
}

/// The names of the running workloads of this user.
pub(crate) fn running(runs: &Path) -> Vec<String> {
    let entries = fs::read_dir(runs).into_iter().flatten().flatten();
    let records = entries.filter_map(|entry| {
        let record = read(&entry.path()).ok()?;
        record.supervisor.filter(|process| process.lives())?;
        Some(entry.file_name().to_string_lossy().replacen('_', "/", 1))
    });
    let mut names: Vec<String> = records.collect();
    names.sort();
    names
}

fn read(path: &Path) -> Result<Record> {
    Ok(serde_json::from_slice(&fs::read(path.join(RECORD))?)?)
}

/// The run directory of a workload. A label contains no underscore, so the pair is told apart.
pub(crate) fn path_of(runs: &Path, namespace: &str, name: &str) -> PathBuf {
    runs.join(format!("{namespace}_{name}"))
}

fn open_lock(path: &Path) -> io::Result<File> {
    File::options().write(true).create(true).truncate(false).mode(0o600).open(path.join(LOCK))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_numbered_and_a_dead_holders_directory_is_taken_over() {
        let runs = tempfile::tempdir().unwrap();
        let (first, name) = RunDir::claim(runs.path(), "default", "web", None).unwrap();
        assert_eq!(name, "web-1");
        fs::write(first.path.join("admin.sock"), "").unwrap();
        let (_second, name) = RunDir::claim(runs.path(), "default", "web", None).unwrap();
        assert_eq!(name, "web-2");
        let taken = RunDir::claim(runs.path(), "default", "web", Some("web-1")).unwrap_err();
        assert!(taken.to_string().contains("runs already"));
        assert!(abandoned(&first.path).unwrap().is_none());

        // Dropped without being removed: as after kill -9.
        drop(first);
        let (again, name) = RunDir::claim(runs.path(), "default", "web", None).unwrap();
        assert_eq!(name, "web-1");
        assert!(!again.path.join("admin.sock").exists());
        drop(again);
        assert_eq!(sweep(runs.path()).unwrap(), ["default/web-1"]);
        assert!(!runs.path().join("default_web-1").exists());
    }

    #[test]
    fn the_dead_are_told_from_the_living() {
        let runs = tempfile::tempdir().unwrap();
        let this = Process::of(std::process::id().cast_signed()).unwrap();
        for (name, began) in [("living", this.began), ("dead", this.began + 1)] {
            let (run, _) = RunDir::claim(runs.path(), "default", "x", Some(name)).unwrap();
            run.write(&Record { supervisor: Some(Process { began, ..this }), ..Record::default() }).unwrap();
        }
        RunDir::claim(runs.path(), "default", "x", Some("young")).unwrap();
        assert_eq!(dead(runs.path()), ["default/dead"]);
        assert!(dead(&runs.path().join("none")).is_empty());
    }

    #[test]
    fn another_process_with_the_same_number_is_not_it() {
        let this = Process::of(std::process::id().cast_signed()).unwrap();
        assert!(this.lives());
        assert!(!Process { began: this.began + 1, ..this }.lives());
    }
}

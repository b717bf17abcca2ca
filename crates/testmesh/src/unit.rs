//! Services that a host's own init system runs: each from a unit file, in a control group of its own, as systemd does it.
//! Nothing here knows of Sheer.

use crate::net::Host;
use crate::program::{Program, run};
use crate::wait;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Where a host sees the control groups.
const ROOT: &str = "/sys/fs/cgroup";

/// What an init system does with a unit file: a control group, the user, the command.
const INIT: &str = r#"
of() { sed -n "s/^$1=//p" "$unit"; }
unit=$1 group=$2
mkdir -p "$group" && echo $$ > "$group/cgroup.procs" || exit 1
user=$(of User)
exec setpriv --reuid "$user" --regid "$(id -g "$user")" --clear-groups setpriv --pdeathsig KILL sh -c "exec $(of ExecStart)"
"#;

/// An init system on a host.
pub struct Units<'a> {
    host: &'a Host,
    files: PathBuf,
    /// The control group of all units, as the host sees it.
    slice: String,
}

impl<'a> Units<'a> {
    /// An init system with its unit files below `home`.
    ///
    /// # Errors
    /// When the control groups cannot be mounted.
    pub fn new(host: &'a Host, home: &Path) -> Result<Self> {
        let files = home.join("units");
        std::fs::create_dir_all(&files)?;
        run(host.command("mount").args(["-t", "cgroup2", "none", ROOT]))?;
        remove_left_behind(host)?;
        let slice = format!("{ROOT}/testmesh-{}-{}", std::process::id(), host.address());
        std::fs::create_dir(host.path(&slice))?;
        Ok(Self { host, files, slice })
    }

    /// Writes the unit file of a service and starts it. Its full name tells runs of the tests at the same time apart.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, name: &str, user: &str, command: &str) -> Result<Unit<'_>> {
        let full = format!("{name}@{}.service", std::process::id());
        let file = self.files.join(&full);
        std::fs::write(&file, format!("[Unit]\nDescription={name}\n\n[Service]\nUser={user}\nExecStart={command}\n"))?;
        let group = format!("{}/{full}", self.slice);
        let mut start = self.host.command("sh");
        start.args(["-c", INIT, "init"]).arg(&file).arg(&group);
        let program = Program::start(&full, &self.files, &mut start)?;
        Ok(Unit { host: self.host, name: full, file, group, user: user.to_owned(), program })
    }
}

impl Drop for Units<'_> {
    fn drop(&mut self) {
        remove(&self.host.path(&self.slice));
    }
}

/// A service that an init system has started.
pub struct Unit<'a> {
    host: &'a Host,
    /// Its full name, as `--unit` takes it.
    pub name: String,
    /// Its unit file.
    pub file: PathBuf,
    /// Its running program.
    pub program: Program,
    group: String,
    user: String,
}

impl Unit<'_> {
    /// The control group, as `--cgroup` takes it.
    pub fn group(&self) -> &str {
        &self.group
    }

    /// A command that will run in the unit's control group and as its user, as a program does that the service starts.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let enter = "echo $$ > \"$1/cgroup.procs\" && shift && user=$1 && shift && \
                     exec setpriv --reuid \"$user\" --regid \"$(id -g \"$user\")\" --clear-groups -- \"$@\"";
        let mut command = self.host.command("sh");
        command.args(["-c", enter, "member", &self.group, &self.user]).arg(program);
        command
    }
}

/// Ends all that runs in a control group, and removes it.
fn remove(group: &Path) {
    let children = || std::fs::read_dir(group).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir());
    for child in children() {
        let _ = std::fs::write(child.path().join("cgroup.kill"), "1");
    }
    let gone = || children().all(|child| std::fs::remove_dir(child.path()).is_ok());
    let _ = wait::until_true("control groups are empty", Duration::from_secs(5), gone);
    let _ = std::fs::remove_dir(group);
}

/// Removes the control groups of tests that were killed. Their programs have ended; a group in use cannot be removed.
fn remove_left_behind(host: &Host) -> Result<()> {
    for entry in std::fs::read_dir(host.path(ROOT)).context("control groups")?.flatten() {
        if entry.file_name().to_string_lossy().starts_with("testmesh-") {
            for unit in std::fs::read_dir(entry.path()).into_iter().flatten().flatten() {
                let _ = std::fs::remove_dir(unit.path());
            }
            let _ = std::fs::remove_dir(entry.path());
        }
    }
    Ok(())
}

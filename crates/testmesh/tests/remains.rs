//! What is left of workloads whose supervisor was killed: nothing. With the real proxy, as root and as an ordinary user.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, chown};
use sheer_testmesh::mesh::PATIENCE;
use sheer_testmesh::net::{Host, Net};
use sheer_testmesh::program::{Processes, Program, run, sheer};
use sheer_testmesh::wait;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Whose the workloads are when they are not root's.
const PERSON: u32 = 65534;

/// An application with descendants that nobody waits for and that left its session.
const APPLICATION: &str = "sleep 1000 & setsid sleep 1000 & (setsid sleep 1000 &); echo up; exec sleep infinity";

/// All of a host in which a workload could leave something.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Inventory {
    processes: BTreeMap<String, usize>,
    namespaces: BTreeSet<PathBuf>,
    mounts: BTreeSet<String>,
    tables: String,
    network: BTreeSet<String>,
    files: BTreeSet<PathBuf>,
}

/// A user of a host, with a mesh of its own.
struct Owner<'a> {
    host: &'a Host,
    user: u32,
    home: PathBuf,
}

impl Owner<'_> {
    /// A command as this user would type it.
    fn command(&self, program: &Path) -> Command {
        let mut command = self.host.command("setpriv");
        if self.user != 0 {
            command.args([format!("--reuid={}", self.user), format!("--regid={}", self.user), "--clear-groups".into()]);
        }
        command.args(["--", "env", "-i", "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"]);
        command.arg(format!("HOME={}", self.home.display()));
        command.arg(format!("XDG_RUNTIME_DIR={}", self.home.join("run").display()));
        command.arg(program);
        command
    }

    fn sheer(&self, arguments: &[&str]) -> Result<String> {
        run(self.command(&sheer()?).args(arguments))
    }

    fn start(&self, name: &str, arguments: &[&str], says: &str) -> Result<Program> {
        let mut program = Program::start(name, &self.home, self.command(&sheer()?).args(arguments))?;
        program.prints(says, PATIENCE)?;
        Ok(program)
    }

    /// A workload in a network of its own; with root, one more whose rules are in the host's network.
    fn workloads(&self) -> Result<Vec<Program>> {
        let mut run = vec!["run", "api", "--port", "8081", "--publish", "8080=8081"];
        if self.user == 0 {
            run.extend(["--user", "nobody"]);
        }
        run.extend(["--", "sh", "-c", APPLICATION]);
        let mut started = vec![self.start("api", &run, "up")?];
        if self.user == 0 {
            let adopt = ["proxy", "games", "--user", "games", "--port", "8082", "--mode", "permissive"];
            started.push(self.start("games", &adopt, "is ready")?);
        }
        Ok(started)
    }

    fn inventory(&self) -> Result<Inventory> {
        let mut found = Inventory::default();
        for pid in self.host.processes()? {
            let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            *found.processes.entry(line.replace('\0', " ")).or_default() += 1;
            for kind in std::fs::read_dir(format!("/proc/{pid}/ns")).into_iter().flatten().flatten() {
                found.namespaces.extend(std::fs::read_link(kind.path()));
            }
        }
        // Without the numbers, which each new mount gets anew: what is mounted, and where.
        let mounts = self.host.mounts()?;
        found.mounts = mounts.lines().map(|line| line.split(' ').skip(3).collect::<Vec<_>>().join(" ")).collect();
        found.tables = run(self.host.command("nft").args(["list", "ruleset"]))?;
        for question in [
            "-o address",
            "-4 route show table all",
            "-6 route show table all",
            "-4 rule show",
            "-6 rule show",
            "netns list",
        ] {
            let told = run(self.host.command("ip").args(question.split(' ')))?;
            // The link's own addresses come when the kernel has made sure that nobody else has them.
            let lines = told.lines().filter(|line| !["fe80:", "ff00:"].iter().any(|own| line.contains(own)));
            found.network.extend(lines.map(str::to_owned));
        }
        let places = ["/run", "/etc/sheer", "/var/lib/sheer", "/var/lib/sheer-proxies"];
        for place in places.map(|place| self.host.path(place)).into_iter().chain([self.home.clone()]) {
            walk(&place, &mut found.files)?;
        }
        Ok(found)
    }

    /// Waits until everything is as it was.
    fn is_as(&self, before: &Inventory, after: &str) -> Result<()> {
        wait::until(&format!("all is as before {after}"), PATIENCE, || {
            let now = self.inventory()?;
            ensure!(now == *before, "{after}:\n{now:#?}\ninstead of\n{before:#?}");
            Ok(())
        })
    }
}

fn walk(place: &Path, found: &mut BTreeSet<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(place).with_context(|| place.display().to_string())? {
        let entry = entry?;
        // What is gone meanwhile is not left.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&entry.path(), found)?;
        }
        found.insert(entry.path());
    }
    Ok(())
}

/// Kills all processes of a workload but its command, none of which sees another one die.
fn kill_together(supervisor: Pid) -> Result<()> {
    let Processes { keeper, proxy, .. } = Processes::of(supervisor)?;
    let all = [keeper, supervisor, proxy];
    all.iter().try_for_each(|pid| kill(*pid, Signal::SIGSTOP))?;
    Ok(all.iter().try_for_each(|pid| kill(*pid, Signal::SIGKILL))?)
}

fn nothing_is_left(user: u32) -> Result<()> {
    let net = Net::new()?;
    let host = net.host("one")?;
    let home = net.directory().join("home");
    for path in [&home, &home.join("run")] {
        std::fs::create_dir(path)?;
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o700))?;
        chown(path, Some(Uid::from_raw(user)), Some(Gid::from_raw(user)))?;
    }
    let owner = Owner { host: &host, user, home };
    let _up = owner.start("up", &["up"], "Sheer is up.")?;
    // An orderly run leaves the proxies' keys and last configuration, on purpose.
    for mut program in owner.workloads()? {
        // Twice: at once.
        program.signal(Signal::SIGTERM)?;
        program.signal(Signal::SIGTERM)?;
        program.wait(PATIENCE)?;
    }
    let before = owner.inventory()?;
    ensure!(!before.processes.keys().any(|line| line.contains("sleep 1000")), "{before:#?}");

    let mut workloads = owner.workloads()?;
    let during = owner.inventory()?;
    ensure!(during.processes.values().sum::<usize>() >= before.processes.values().sum::<usize>() + 6, "{during:#?}");
    ensure!(during.namespaces.len() > before.namespaces.len() && during.files != before.files, "{during:#?}");
    ensure!(user != 0 || (during.tables != before.tables && during.network != before.network), "{during:#?}");
    for program in &mut workloads {
        program.signal(Signal::SIGKILL)?;
        program.wait(PATIENCE)?;
    }
    owner.is_as(&before, "kill -9 of the supervisors")?;

    // Nobody is left to clean up: `sheer clean` does it, and so does the next start.
    for next_start in [false, true] {
        let mut workloads = owner.workloads()?;
        for program in &mut workloads {
            kill_together(program.pid())?;
            program.wait(PATIENCE)?;
        }
        // Its descendants lost their parent, and with the keeper everybody who knew them.
        for orphan in host.processes()? {
            let line = std::fs::read_to_string(format!("/proc/{orphan}/cmdline")).unwrap_or_default();
            if line.replace('\0', " ").trim_end() == "sleep 1000" {
                kill(orphan, Signal::SIGKILL)?;
            }
        }
        ensure!(owner.inventory()? != before, "nothing was left to clean up");
        if next_start {
            for mut program in owner.workloads()? {
                program.signal(Signal::SIGKILL)?;
                program.wait(PATIENCE)?;
            }
            owner.is_as(&before, "the next start, and kill -9 of its supervisors")?;
        } else {
            let said = owner.sheer(&["clean"])?;
            ensure!(said.contains("removed what default/api-1 left"), "{said}");
            owner.is_as(&before, "sheer clean")?;
        }
    }
    Ok(())
}

#[test]
fn nothing_is_left_of_roots_workloads() -> Result<()> {
    nothing_is_left(0)
}

#[test]
fn nothing_is_left_of_a_persons_workloads() -> Result<()> {
    nothing_is_left(PERSON)
}

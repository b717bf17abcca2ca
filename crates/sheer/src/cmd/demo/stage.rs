//! The processes of the demonstration and the directory that they share.

use anyhow::{Context as _, bail};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, geteuid, getppid};
use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, ExitCode, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const LOCK: &str = "lock";
const PROCESSES: &str = "processes";
const LAST_LINES: usize = 15;
const LOOK: Duration = Duration::from_millis(50);

/// A running demonstration.
pub(super) struct Stage {
    directory: PathBuf,
    binary: PathBuf,
    children: Vec<Child>,
    _lock: File,
}

/// Takes a process's standard output.
pub(super) type Reader = Box<dyn FnOnce(ChildStdout) + Send>;

/// A process of the demonstration; it leads a process group, so that a terminal's Ctrl-C does not reach it.
pub(super) struct Child {
    name: String,
    process: std::process::Child,
    reader: Option<JoinHandle<()>>,
    ended: Option<ExitStatus>,
    /// Whether anyone asked it to end.
    asked: bool,
    told: bool,
}

impl Stage {
    /// Makes the directory, after removing what a killed demonstration left.
    pub(super) fn set() -> anyhow::Result<Self> {
        sweep()?;
        let directory = place();
        // Services of other users pass through it.
        if !directory.is_dir() {
            make(&directory, 0o711)?;
        }
        let lock = File::create(directory.join(LOCK)).context("cannot write to the directory of the demonstration")?;
        match lock.try_lock() {
            Ok(()) => (),
            Err(TryLockError::WouldBlock) => {
                bail!("a demonstration of this user runs already (in {}); end that one first", directory.display())
            }
            Err(TryLockError::Error(error)) => return Err(error).context("cannot lock the demonstration's directory"),
        }
        for (name, mode) in
            [("logs", 0o700), ("canary", 0o755), ("mesh.d", 0o755), ("control", 0o700), ("state", 0o711)]
        {
            make(&directory.join(name), mode)?;
        }
        let binary = reachable_binary(&directory)?;
        Ok(Self { directory, binary, children: Vec::new(), _lock: lock })
    }

    /// The directory that everything shares.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// This binary, where services of other users can run it.
    pub(super) fn binary(&self) -> &Path {
        &self.binary
    }

    /// Where a workload keeps its certificate.
    pub(super) fn state_of(&self, name: &str) -> PathBuf {
        self.directory.join("state").join(name)
    }

    fn log_of(&self, name: &str) -> PathBuf {
        self.directory.join("logs").join(format!("{name}.log"))
    }

    /// Starts `sheer` with these arguments. Its output goes to a log, or standard output to `reader`.
    pub(super) fn start(&mut self, name: &str, arguments: Vec<OsString>, reader: Option<Reader>) -> anyhow::Result<()> {
        let log = File::create(self.log_of(name)).with_context(|| format!("cannot write the log of {name}"))?;
        let output = if reader.is_some() { Stdio::piped() } else { log.try_clone()?.into() };
        let mut process = Command::new(&self.binary)
            .arg("__demo-child")
            .arg(std::process::id().to_string())
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(log)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let reader = reader.zip(process.stdout.take()).map(|(read, output)| std::thread::spawn(move || read(output)));
        self.children.push(Child { name: name.to_owned(), process, reader, ended: None, asked: false, told: false });
        self.write_processes()
    }

    /// Notes who runs, for [`sweep`] after this process was killed.
    fn write_processes(&self) -> anyhow::Result<()> {
        let lines = self.children.iter().filter_map(|child| {
            let pid = i32::try_from(child.process.id()).ok()?;
            Some(format!("{pid} {}\n", began(pid)?))
        });
        fs::write(self.directory.join(PROCESSES), lines.collect::<String>())
            .context("cannot write to the demonstration's directory")
    }

    /// An error with its last words when the process has ended.
    pub(super) fn must_run(&mut self, name: &str) -> anyhow::Result<()> {
        let status = self.child(name).and_then(Child::look);
        match status {
            Some(status) => bail!("{name} ended ({status}); it said:\n{}", self.last_words(name)),
            None => Ok(()),
        }
    }

    /// Those that ended since the last call without being asked to.
    pub(super) fn ended(&mut self) -> Vec<(String, ExitStatus)> {
        let mut ended = Vec::new();
        for child in &mut self.children {
            if let Some(status) = child.look()
                && !child.told
            {
                child.told = true;
                ended.push((child.name.clone(), status));
            }
        }
        ended
    }

    /// All that ended without being asked to.
    pub(super) fn lost(&mut self) -> Vec<String> {
        let lost = self.children.iter_mut().filter(|child| !child.asked).filter(|child| child.ended.is_some());
        lost.map(|child| child.name.clone()).collect()
    }

    /// The end of a process's log, indented.
    pub(super) fn last_words(&self, name: &str) -> String {
        let log = fs::read(self.log_of(name)).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        let last = lines.get(lines.len().saturating_sub(LAST_LINES)..).unwrap_or_default();
        last.iter().map(|line| format!("    {line}\n")).collect()
    }

    /// Asks one process to end and waits for it.
    pub(super) fn end(&mut self, name: &str, patience: Duration) {
        if let Some(child) = self.child(name) {
            child.ask(Signal::SIGTERM);
            child.wait(Instant::now() + patience);
        }
    }

    /// Ends everything: the services together, then the control plane; removes the directory.
    pub(super) fn strike(mut self, patience: Duration, mut hurry: impl FnMut() -> bool) {
        for child in self.children.iter_mut().skip(1) {
            child.ask(Signal::SIGTERM);
        }
        let end = Instant::now() + patience;
        while Instant::now() < end && self.children.iter_mut().skip(1).any(|child| child.look().is_none()) {
            if hurry() {
                break;
            }
            std::thread::sleep(LOOK);
        }
        for child in self.children.iter_mut().rev() {
            child.ask(Signal::SIGTERM);
            child.wait(Instant::now() + Duration::from_secs(3));
        }
        let _ = fs::remove_dir_all(&self.directory);
    }

    fn child(&mut self, name: &str) -> Option<&mut Child> {
        self.children.iter_mut().find(|child| child.name == name)
    }
}

impl Child {
    /// Its exit status once it has ended.
    fn look(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.process.try_wait().ok().flatten();
        }
        self.ended
    }

    fn ask(&mut self, signal: Signal) {
        if self.look().is_none()
            && let Ok(pid) = i32::try_from(self.process.id())
        {
            self.asked = true;
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    /// Waits for its end; at the deadline it is killed, with what is in its process group.
    fn wait(&mut self, deadline: Instant) {
        while self.look().is_none() {
            if Instant::now() >= deadline {
                if let Ok(pid) = i32::try_from(self.process.id()) {
                    let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
                }
                self.ended = self.process.wait().ok();
                break;
            }
            std::thread::sleep(LOOK);
        }
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// Becomes `sheer` with these arguments, as a child that does not outlive the demonstration: `PARENT ARGUMENT...`.
pub(crate) fn become_child(arguments: &[OsString]) -> anyhow::Result<ExitCode> {
    let (parent, rest) = arguments.split_first().context("only 'sheer demo' uses this")?;
    let parent: i32 = parent.to_str().and_then(|text| text.parse().ok()).context("only 'sheer demo' uses this")?;
    nix::sys::prctl::set_pdeathsig(Signal::SIGTERM).context("cannot ask to be told of the parent's end")?;
    if getppid() != Pid::from_raw(parent) {
        bail!("the demonstration has ended");
    }
    let error = Command::new(std::env::current_exe()?).args(rest).exec();
    Err(error).context("cannot start sheer")
}

/// Ends and removes what a killed demonstration of this user left; one that runs is left alone. Whether there was any.
pub(crate) fn sweep() -> anyhow::Result<bool> {
    let directory = place();
    match fs::symlink_metadata(&directory) {
        Err(_) => return Ok(false),
        Ok(found) if found.is_dir() && found.uid() == geteuid().as_raw() => (),
        Ok(_) => bail!("{} is not this user's directory; remove it first", directory.display()),
    }
    if let Ok(lock) = File::open(directory.join(LOCK))
        && matches!(lock.try_lock(), Err(TryLockError::WouldBlock))
    {
        return Ok(false);
    }
    let processes: Vec<i32> =
        fs::read_to_string(directory.join(PROCESSES)).unwrap_or_default().lines().filter_map(survivor).collect();
    // The kernel has told them already; they may be finishing what is open.
    let end = Instant::now() + Duration::from_secs(10);
    let alive = |pid: &i32| kill(Pid::from_raw(*pid), None).is_ok() && began(*pid).is_some();
    for pid in &processes {
        let _ = kill(Pid::from_raw(*pid), Signal::SIGTERM);
    }
    while processes.iter().any(alive) && Instant::now() < end {
        std::thread::sleep(LOOK);
    }
    for pid in processes.iter().filter(|pid| alive(pid)) {
        let _ = killpg(Pid::from_raw(*pid), Signal::SIGKILL);
    }
    fs::remove_dir_all(&directory).with_context(|| format!("cannot remove {}", directory.display()))?;
    Ok(true)
}

/// The process of a line of the list, if it is still the same one.
fn survivor(line: &str) -> Option<i32> {
    let (pid, since) = line.split_once(' ')?;
    let pid = pid.parse().ok()?;
    (began(pid)? == since).then_some(pid)
}

/// When a process began, in the kernel's ticks; `None` when it has ended, also as a zombie.
fn began(pid: i32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything; the state follows it, the start is the 20th field after that.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18).map(str::to_owned)
}

/// Where the demonstration of this user is.
fn place() -> PathBuf {
    std::env::temp_dir().join(format!("sheer-demo-{}", geteuid()))
}

fn make(path: &Path, mode: u32) -> anyhow::Result<()> {
    fs::DirBuilder::new().mode(mode).create(path).with_context(|| format!("cannot create {}", path.display()))?;
    // Whatever the umask.
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    Ok(())
}

/// The running binary, or a copy of it where a directory on the way keeps other users out: with root, services do not
/// run as root.
fn reachable_binary(directory: &Path) -> anyhow::Result<PathBuf> {
    let binary = std::env::current_exe().context("cannot find the running binary")?;
    let open = |path: &Path| fs::metadata(path).is_ok_and(|found| found.permissions().mode() & 0o001 != 0);
    if !geteuid().is_root() || binary.ancestors().all(open) {
        return Ok(binary);
    }
    let copy = directory.join("sheer");
    fs::copy(&binary, &copy).with_context(|| format!("cannot copy {} to {}", binary.display(), copy.display()))?;
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
    Ok(copy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_from_a_later_one() {
        let own = i32::try_from(std::process::id()).expect("a pid");
        let since = began(own).expect("running");
        assert_eq!(survivor(&format!("{own} {since}")), Some(own));
        assert_eq!(survivor(&format!("{own} 1{since}")), None);
        assert_eq!(survivor("nonsense"), None);
    }
}

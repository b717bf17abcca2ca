//! Programs under test: started, watched, ended with the test.

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use std::fs::File;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// The `sheer` binary that belongs to this build.
///
/// # Errors
/// When it has not been built.
pub fn sheer() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("SHEER_BIN") {
        return Ok(path.into());
    }
    let test = std::env::current_exe()?;
    let path = test.parent().and_then(Path::parent).context("no target directory")?.join("sheer");
    if !path.exists() {
        bail!("{} is missing: cargo build -p sheer", path.display());
    }
    Ok(path)
}

/// A running program. Its group is killed when this is dropped, and by the kernel when the test dies.
pub struct Program {
    name: String,
    child: Child,
    output: PathBuf,
}

impl Program {
    /// Starts a command in a process group of its own; what it prints goes to a file that [`Program::output`] reads.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(name: &str, directory: &Path, command: &mut Command) -> Result<Self> {
        let output = directory.join(format!("{name}.log"));
        let log = File::create(&output).with_context(|| output.display().to_string())?;
        // The death signal belongs to the thread that spawns; setpriv sets it in the child itself.
        let mut guarded = Command::new("setpriv");
        guarded.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => guarded.env(key, value),
                None => guarded.env_remove(key),
            };
        }
        if let Some(dir) = command.get_current_dir() {
            guarded.current_dir(dir);
        }
        let child = guarded
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .with_context(|| format!("{name}: {command:?}"))?;
        Ok(Self { name: name.to_owned(), child, output })
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// All that it printed so far.
    pub fn output(&self) -> String {
        std::fs::read(&self.output).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Waits until it has printed this.
    ///
    /// # Errors
    /// With all that it printed, when it does not within the limit or ends before.
    pub fn prints(&mut self, text: &str, limit: Duration) -> Result<()> {
        let name = self.name.clone();
        crate::wait::until(&format!("{name} prints {text:?}"), limit, || {
            if self.output().contains(text) {
                return Ok(());
            }
            let state = self.child.try_wait()?.map_or("running".to_owned(), |status| status.to_string());
            bail!("{name} ({state}) printed:\n{}", self.output())
        })
    }

    /// Sends a signal to the program alone.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(self.pid(), signal)?)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it goes on beyond the limit.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let name = self.name.clone();
        crate::wait::until(&format!("{name} ends"), limit, || match self.child.try_wait()? {
            Some(status) => Ok(status),
            None => bail!("it runs; it printed:\n{}", self.output()),
        })
    }

    /// Ends it politely, and by force after ten seconds.
    ///
    /// # Errors
    /// When even that fails.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        let _ = self.signal(Signal::SIGTERM);
        match self.wait(Duration::from_secs(10)) {
            Ok(status) => Ok(status),
            Err(_) => {
                killpg(self.pid(), Signal::SIGKILL)?;
                self.wait(Duration::from_secs(5))
            }
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Shown when the test fails.
        let output = self.output();
        let tail: Vec<&str> = output.lines().rev().take(15).collect();
        eprintln!("--- {} printed, at last:", self.name);
        tail.iter().rev().for_each(|line| eprintln!("{}", line.chars().take(400).collect::<String>()));
        // The second one spares the mesh's time for leaving in order.
        let _ = kill(self.pid(), Signal::SIGTERM);
        let mut ended = self.wait(Duration::from_millis(100)).is_ok();
        if !ended {
            let _ = kill(self.pid(), Signal::SIGTERM);
            ended = self.wait(Duration::from_secs(2)).is_ok();
        }
        let _ = killpg(self.pid(), Signal::SIGKILL);
        if !ended {
            let _ = self.child.wait();
        }
    }
}

/// Runs a command to its end and returns what it printed on standard output.
///
/// # Errors
/// With both outputs, when it does not succeed.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?}: {}{}\n{text}{errors}", output.status, signal_of(output.status));
    }
    Ok(text)
}

/// The processes of a running workload, each found from its supervisor.
pub struct Processes {
    /// Holds the namespaces; the parent of the command.
    pub keeper: Pid,
    /// The proxy of the moment.
    pub proxy: Pid,
    /// The application; none before it was started, and none where the proxy is alone.
    command: Option<Pid>,
}

impl Processes {
    /// Looks at the children of a supervisor.
    ///
    /// # Errors
    /// When one of them does not run.
    pub fn of(supervisor: Pid) -> Result<Self> {
        let children = children(supervisor)?;
        let child = |what: &str| {
            // The newest: one whose place was taken may still have connections.
            let found = children.iter().rev().find(|(_, line)| line.get(1).is_some_and(|word| word == what));
            found.map(|(pid, _)| *pid).with_context(|| format!("{supervisor} has no child {what}: {children:?}"))
        };
        let keeper = child("__keeper")?;
        let command = self::children(keeper)?.first().map(|(pid, _)| *pid);
        Ok(Self { keeper, proxy: child("__proxy")?, command })
    }

    /// The application.
    ///
    /// # Errors
    /// When it does not run.
    pub fn command(&self) -> Result<Pid> {
        self.command.context("the keeper has no command")
    }
}

/// The children of a process, with their command lines.
fn children(parent: Pid) -> Result<Vec<(Pid, Vec<String>)>> {
    let mut found = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{parent}/task"))? {
        for pid in std::fs::read_to_string(task?.path().join("children"))?.split_whitespace() {
            let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            found.push((Pid::from_raw(pid.parse()?), line.split('\0').map(str::to_owned).collect()));
        }
    }
    Ok(found)
}

fn signal_of(status: ExitStatus) -> String {
    status.signal().map(|number| format!(" (signal {number})")).unwrap_or_default()
}

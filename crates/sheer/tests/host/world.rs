//! A host of a test's own: a network and a mount namespace, a directory, and processes that end with it.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// The user of tests without privileges.
pub(crate) const NOBODY: u32 = 65534;

/// How long anything may take; nothing is measured by it.
const LIMIT: Duration = Duration::from_secs(30);

pub(crate) struct World {
    dir: tempfile::TempDir,
    holder: Child,
    pub(crate) user: u32,
}

impl World {
    /// For processes of `user`. The host has loopback, one more address and a default route; /run is empty.
    pub(crate) fn of(user: u32) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "these tests make namespaces and users' processes: run them as root");
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        for (name, program) in
            [("sheer", PathBuf::from(env!("CARGO_BIN_EXE_sheer"))), ("test", std::env::current_exe().unwrap())]
        {
            let copy = dir.path().join(name);
            if fs::hard_link(&program, &copy).is_err() {
                fs::copy(&program, &copy).unwrap();
            }
        }
        for name in ["home", "run", "state"] {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o700)).unwrap();
            std::os::unix::fs::chown(&path, Some(user), Some(user)).unwrap();
        }
        let begin = "mount -t tmpfs none /run && ip link set lo up && ip link add host0 type veth peer name host1 && \
                     ip address add 10.77.0.1/24 dev host0 && ip link set host0 up && ip link set host1 up && \
                     ip route add default via 10.77.0.254 && echo there && exec sleep infinity";
        let mut holder = Command::new("unshare");
        holder.args(["--net", "--mount", "sh", "-c", begin]).stdout(Stdio::piped());
        die_with_test(&mut holder);
        let mut holder = holder.spawn().unwrap();
        let mut there = [0; 5];
        std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut there).expect("the host is made");
        Self { dir, holder, user }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A program on this host, as root.
    pub(crate) fn as_root(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--net", "--mount", "--wd=/", "--target"])
            .arg(self.holder.id().to_string())
            .arg("--")
            .arg(program);
        self.surround(&mut command);
        command
    }

    /// A program on this host, as another user.
    pub(crate) fn as_user(&self, user: u32, program: impl AsRef<OsStr>) -> Command {
        let mut command = self.as_root("setpriv");
        command.args([format!("--reuid={user}"), format!("--regid={user}"), "--clear-groups".into()]);
        command.arg("--").arg(program);
        command
    }

    fn surround(&self, command: &mut Command) {
        command.env_clear();
        command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin").env("RUST_BACKTRACE", "0");
        command.env("HOME", self.path("home")).env("XDG_RUNTIME_DIR", self.path("run"));
        command.env("XDG_STATE_HOME", self.path("state")).env("STANDIN_PLAN", "/dev/null");
        die_with_test(command);
    }

    /// `sheer` with these arguments, as this host's user.
    pub(crate) fn sheer(&self, arguments: &str) -> Command {
        let mut command = self.as_user(self.user, self.path("sheer"));
        command.args(arguments.split_ascii_whitespace());
        command
    }

    /// `sheer run` or `sheer proxy` with the stand-in, and a shell script as the command.
    pub(crate) fn workload(&self, arguments: &str, script: Option<&str>) -> Command {
        let mut command = self.sheer(arguments);
        command.arg("--proxy-program").arg(self.path("test")).arg("--state").arg(self.path("state"));
        if let Some(script) = script {
            command.args(["--", "sh", "-c", script]);
        }
        command
    }

    /// Starts it, with its output in files.
    pub(crate) fn start(&self, mut command: Command) -> Running {
        let number = fs::read_dir(self.dir.path()).unwrap().count();
        let (out, err) = (self.path(&format!("out.{number}")), self.path(&format!("err.{number}")));
        command.stdin(Stdio::null()).stdout(File::create(&out).unwrap()).stderr(File::create(&err).unwrap());
        Running { child: command.spawn().unwrap(), out, err }
    }

    /// Runs it to its end: status, output, complaints.
    pub(crate) fn finish(&self, command: Command) -> (ExitStatus, String, String) {
        let mut running = self.start(command);
        let status = running.wait();
        (status, running.out(), running.err())
    }

    /// What the run directory of a workload says, once its command was started.
    pub(crate) fn record(&self, name: &str) -> serde_json::Value {
        let runs = if self.user == 0 { self.inside("/run/sheer/run") } else { self.path("run/sheer/run") };
        let path = runs.join(name).join("workload.json");
        until(&format!("{} with a proxy", path.display()), || {
            let record: serde_json::Value = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
            record["proxy"].is_object().then_some(record)
        })
    }

    /// A path of this host as seen from the test's own.
    pub(crate) fn inside(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.holder.id()))
    }

    /// The processes of this test that still run, by command line.
    pub(crate) fn processes(&self, containing: &str) -> Vec<i32> {
        let numbers = fs::read_dir("/proc").unwrap().flatten();
        let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let matches = |pid: &i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).replace('\0', " ").contains(containing)
        };
        numbers.filter(matches).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// A process of a test. It is killed when the test forgets it.
pub(crate) struct Running {
    pub(crate) child: Child,
    out: PathBuf,
    err: PathBuf,
}

impl Running {
    pub(crate) fn out(&self) -> String {
        fs::read_to_string(&self.out).unwrap()
    }

    pub(crate) fn err(&self) -> String {
        fs::read_to_string(&self.err).unwrap()
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        until("the process to end", || self.child.try_wait().unwrap())
    }

    /// Waits until its output contains a text.
    pub(crate) fn says(&self, text: &str) {
        let seen = || (self.out() + &self.err()).contains(text).then_some(());
        wait_for(seen).unwrap_or_else(|| panic!("never said '{text}' but\n{}{}", self.out(), self.err()));
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for a condition, and fails when it does not come true.
pub(crate) fn until<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    wait_for(condition).unwrap_or_else(|| panic!("waited in vain for {what}"))
}

fn wait_for<T>(mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let begun = Instant::now();
    loop {
        if let Some(found) = condition() {
            return Some(found);
        }
        if begun.elapsed() > LIMIT {
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Also when the test is killed.
fn die_with_test(command: &mut Command) {
    let birth = sheer_proxy::platform::Birth { dies_with_parent: Some(9), ..Default::default() };
    sheer_proxy::platform::prepare(command, birth);
}

pub(crate) fn pid(record: &serde_json::Value, of: &str) -> i32 {
    i32::try_from(record[of]["pid"].as_i64().unwrap()).unwrap()
}

pub(crate) fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

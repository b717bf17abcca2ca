//! A mesh on hosts: a control plane and workloads, started with the real binary as its users would.

use crate::net::Host;
use crate::program::{Program, run, sheer};
use crate::wait;
use anyhow::{Context, Result, ensure};
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

/// How long anything that should be quick may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A control plane as a service on a host, with its configuration directory.
pub struct Control<'a> {
    /// Where it runs.
    pub host: &'a Host,
    /// The running program.
    pub program: Program,
    home: PathBuf,
    variables: Vec<(&'static str, String)>,
}

impl<'a> Control<'a> {
    /// Starts a control plane with an empty configuration below `home` and waits until proxies can reach it.
    ///
    /// # Errors
    /// With what it printed, when it does not start.
    pub fn start(host: &'a Host, home: &Path) -> Result<Self> {
        Self::start_with(host, home, &[])
    }

    /// The same with variables of the environment.
    ///
    /// # Errors
    /// With what it printed, when it does not start.
    pub fn start_with(host: &'a Host, home: &Path, variables: &[(&'static str, String)]) -> Result<Self> {
        std::fs::create_dir_all(home.join("mesh.d"))?;
        let program = Self::launch(host, home, variables)?;
        let control = Self { host, program, home: home.to_owned(), variables: variables.to_vec() };
        control.wait_until_ready()?;
        Ok(control)
    }

    /// Starts it again on the same state, after it was killed.
    ///
    /// # Errors
    /// With what it printed, when it does not start.
    pub fn restart(&mut self) -> Result<()> {
        self.program = Self::launch(self.host, &self.home, &self.variables)?;
        self.wait_until_ready()
    }

    /// The address that proxies are given.
    pub fn address(&self) -> String {
        format!("{}:15012", self.host.address())
    }

    /// Writes a file of the configuration directory as an editor would: whole, by rename.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, name: &str, yaml: &str) -> Result<()> {
        let staged = self.home.join(format!("{name}.staged"));
        std::fs::write(&staged, yaml)?;
        Ok(std::fs::rename(staged, self.home.join("mesh.d").join(name))?)
    }

    /// A file with a join token for this identity.
    ///
    /// # Errors
    /// When it is not given.
    pub fn token(&self, namespace: &str, service_account: &str, uses: u32) -> Result<PathBuf> {
        let uses = uses.to_string();
        let text =
            self.sheer(&["token", "create", "-n", namespace, "--service-account", service_account, "--uses", &uses])?;
        // Who was given one before may not have read it yet.
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Relaxed);
        let file = self.home.join(format!("{namespace}-{service_account}-{number}.token"));
        std::fs::write(&file, text)?;
        Ok(file)
    }

    /// Runs a command of the command line on the control plane's host.
    ///
    /// # Errors
    /// With both outputs, when it does not succeed.
    pub fn sheer(&self, arguments: &[&str]) -> Result<String> {
        run(self.host.command(sheer()?).args(arguments))
    }

    /// What a command of the command line prints with `-o json`.
    ///
    /// # Errors
    /// When it fails or prints no JSON.
    pub fn query(&self, arguments: &[&str]) -> Result<serde_json::Value> {
        let text = self.sheer(&[arguments, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("{arguments:?} printed {text}"))
    }

    /// Waits until this many endpoints of a service of namespace `default` take traffic, and returns what is told of it.
    ///
    /// # Errors
    /// When they do not within [`PATIENCE`].
    pub fn serves(&self, service: &str, endpoints: u64) -> Result<serde_json::Value> {
        wait::until(&format!("{service} has {endpoints} endpoints"), PATIENCE, || {
            let mut services = self.query(&["get", "services"])?;
            let all = services["services"].as_array_mut().context("no list")?;
            let found = all.iter_mut().find(|found| found["name"] == service).context("it is unknown")?;
            ensure!(found["healthy"] == endpoints, "it has {}", found["healthy"]);
            Ok(found.take())
        })
    }

    fn launch(host: &Host, home: &Path, variables: &[(&'static str, String)]) -> Result<Program> {
        let mut command = host.command(sheer()?);
        command.envs(variables.iter().map(|(name, value)| (name, value)));
        command.arg("control").arg("--config").arg(home.join("mesh.d")).arg("--state").arg(home.join("state"));
        command.args(["--proxy-listen", &format!("{}:15012", Ipv4Addr::UNSPECIFIED)]);
        command.args(["--advertise", &format!("{}:15012", host.address())]);
        Program::start("control", home, &mut command)
    }

    fn wait_until_ready(&self) -> Result<()> {
        wait::until("the control plane answers", PATIENCE, || self.sheer(&["get", "services"])).map(drop)
    }
}

/// Somebody without any privilege on a host, with a home directory.
pub struct Person<'a> {
    host: &'a Host,
    /// The home directory.
    pub home: PathBuf,
}

impl<'a> Person<'a> {
    /// The user `nobody`, with a home and a runtime directory of its own below `home`.
    ///
    /// # Errors
    /// When the directories cannot be made.
    pub fn new(host: &'a Host, home: &Path) -> Result<Self> {
        let home = home.join("person");
        for directory in [&home, &home.join("run")] {
            std::fs::create_dir_all(directory)?;
            std::os::unix::fs::chown(directory, Some(Self::ID), Some(Self::ID))?;
        }
        std::fs::set_permissions(home.join("run"), PermissionsExt::from_mode(0o700))?;
        Ok(Self { host, home })
    }

    /// The user and group id.
    pub const ID: u32 = 65534;

    /// A command that will run as this user on its host.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = self.host.command("setpriv");
        command.args([format!("--reuid={}", Self::ID), format!("--regid={}", Self::ID), "--clear-groups".into()]);
        // The signal of the parent's death is forgotten when the user changes.
        command.args(["--", "setpriv", "--pdeathsig", "KILL", "--", "env", "-i"]);
        command.arg(format!("PATH={}", std::env::var("PATH").unwrap_or_default()));
        command.arg(format!("HOME={}", self.home.display()));
        command.arg(format!("XDG_RUNTIME_DIR={}", self.home.join("run").display()));
        command.arg(program);
        command
    }
}

/// A workload to run on a host beside the mesh.
pub struct Workload {
    command: Command,
    name: String,
    home: PathBuf,
}

impl Workload {
    /// `sheer run SERVICE` on a host, with its files below `home`.
    ///
    /// # Errors
    /// When there is no binary.
    pub fn new(host: &Host, service: &str, home: &Path) -> Result<Self> {
        Ok(Self::by(host.command(sheer()?), "run", service, home))
    }

    /// `sheer run SERVICE` without any privilege.
    ///
    /// # Errors
    /// When there is no binary.
    pub fn of_person(person: &Person<'_>, service: &str) -> Result<Self> {
        Ok(Self::by(person.command(sheer()?), "run", service, &person.home))
    }

    /// `sheer proxy SERVICE` on a host: beside what runs there already.
    ///
    /// # Errors
    /// When there is no binary.
    pub fn beside(host: &Host, service: &str, home: &Path) -> Result<Self> {
        Ok(Self::by(host.command(sheer()?), "proxy", service, home))
    }

    fn by(mut sheer: Command, verb: &str, service: &str, home: &Path) -> Self {
        sheer.args([verb, service]);
        Self { command: sheer, name: service.replace('/', "-"), home: home.to_owned() }
    }

    /// More flags.
    pub fn flags(mut self, flags: &[&str]) -> Self {
        self.command.args(flags);
        self
    }

    /// Variables of the environment.
    pub fn variables(mut self, variables: &[(&'static str, String)]) -> Self {
        self.command.envs(variables.iter().map(|(name, value)| (name, value)));
        self
    }

    /// Joins a control plane on another host with a token.
    pub fn joins(self, control: &Control<'_>, token: &Path) -> Self {
        let state = self.home.join(format!("{}-state", self.name));
        let address = control.address();
        self.flags(&[
            "--control",
            &address,
            "--join-token-file",
            &token.to_string_lossy(),
            "--state",
            &state.to_string_lossy(),
        ])
    }

    /// Starts it with this command.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(mut self, command: &[&str]) -> Result<Program> {
        self.command.arg("--").args(command);
        Program::start(&self.name, &self.home, &mut self.command)
    }

    /// Starts the proxy of what runs already, and waits until it is ready.
    ///
    /// # Errors
    /// With what it printed, when it cannot be started.
    pub fn adopt(mut self) -> Result<Program> {
        let mut program = Program::start(&format!("{}-proxy", self.name), &self.home, &mut self.command)?;
        program.prints("is ready", PATIENCE)?;
        Ok(program)
    }
}

//! A mesh on hosts: a control plane and workloads, started with the real binary as its users would.

use crate::net::Host;
use crate::program::{Program, run, sheer};
use crate::wait;
use anyhow::{Context, Result, ensure};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
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
}

impl<'a> Control<'a> {
    /// Starts a control plane with an empty configuration below `home` and waits until proxies can reach it.
    ///
    /// # Errors
    /// With what it printed, when it does not start.
    pub fn start(host: &'a Host, home: &Path) -> Result<Self> {
        std::fs::create_dir_all(home.join("mesh.d"))?;
        let program = Self::launch(host, home)?;
        let control = Self { host, program, home: home.to_owned() };
        control.wait_until_ready()?;
        Ok(control)
    }

    /// Starts it again on the same state, after it was killed.
    ///
    /// # Errors
    /// With what it printed, when it does not start.
    pub fn restart(&mut self) -> Result<()> {
        self.program = Self::launch(self.host, &self.home)?;
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
        let file = self.home.join(format!("{namespace}-{service_account}-{}.token", text.len()));
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

    fn launch(host: &Host, home: &Path) -> Result<Program> {
        let mut command = host.command(sheer()?);
        command.arg("control").arg("--config").arg(home.join("mesh.d")).arg("--state").arg(home.join("state"));
        command.args(["--proxy-listen", &format!("{}:15012", Ipv4Addr::UNSPECIFIED)]);
        command.args(["--advertise", &format!("{}:15012", host.address())]);
        Program::start("control", home, &mut command)
    }

    fn wait_until_ready(&self) -> Result<()> {
        wait::until("the control plane answers", PATIENCE, || self.sheer(&["get", "services"])).map(drop)
    }
}

/// A workload to run on a host beside the mesh.
pub struct Workload<'a> {
    command: Command,
    name: String,
    home: &'a Path,
}

impl<'a> Workload<'a> {
    /// `sheer run SERVICE` on a host, with its files below `home`.
    ///
    /// # Errors
    /// When there is no binary.
    pub fn new(host: &Host, service: &str, home: &'a Path) -> Result<Self> {
        Self::as_command(host, &["run", service], service, home)
    }

    fn as_command(host: &Host, verb: &[&str], service: &str, home: &'a Path) -> Result<Self> {
        let mut command = host.command(sheer()?);
        command.args(verb);
        Ok(Self { command, name: service.replace('/', "-"), home })
    }

    /// More flags.
    pub fn flags(mut self, flags: &[&str]) -> Self {
        self.command.args(flags);
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
        Program::start(&self.name, self.home, &mut self.command)
    }
}

//! Servers that others wrote, each in a workload of its own, and a client that calls them, all on one host.

use crate::mesh::{Control, PATIENCE, Workload};
use crate::net::{Host, Net};
use crate::program::{Program, run, sheer};
use crate::wait;
use anyhow::{Result, ensure};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

/// A host with a control plane, servers in workloads, and a client in a workload of its own.
pub struct Mesh {
    // In the order of their ends.
    programs: Vec<Program>,
    _control: Program,
    host: Host,
    net: Net,
}

impl Mesh {
    /// A control plane and the client, without a server yet.
    ///
    /// # Errors
    /// When something does not start.
    pub fn new() -> Result<Self> {
        let net = Net::new()?;
        std::fs::set_permissions(net.directory(), std::fs::Permissions::from_mode(0o755))?;
        let host = net.host("host")?;
        let control = Control::start(&host, &net.directory().join("control"))?.program;
        let client = Workload::new(&host, "client", net.directory())?
            .flags(&["--user", "root"])
            .start(&["sleep", "infinity"])?;
        let mesh = Self { programs: vec![client], _control: control, host, net };
        wait::until("the client runs", PATIENCE, || mesh.client(&["true"]))?;
        Ok(mesh)
    }

    /// Where the files of a scenario may be.
    pub fn home(&self) -> &Path {
        self.net.directory()
    }

    /// Starts a server as a workload.
    ///
    /// # Errors
    /// When it does not start.
    pub fn serve(&mut self, service: &str, flags: &[&str], command: &[&str]) -> Result<()> {
        let program = Workload::new(&self.host, service, self.net.directory())?.flags(flags).start(command)?;
        self.programs.push(program);
        Ok(())
    }

    /// Runs a command beside the client's proxy.
    ///
    /// # Errors
    /// With what it printed, when it fails.
    pub fn client(&self, command: &[&str]) -> Result<String> {
        run(self.host.command(sheer()?).args(["exec", "client-1", "--"]).args(command))
    }

    /// The same until it succeeds, for as long as a server may take to start.
    ///
    /// # Errors
    /// With what it printed, when it fails.
    pub fn client_at_last(&self, command: &[&str]) -> Result<String> {
        let answer = wait::until(&format!("{command:?} succeeds"), PATIENCE, || self.client(command));
        answer.map_err(|error| self.explain(error))
    }

    /// Waits until a service takes traffic.
    ///
    /// # Errors
    /// With what it printed, when it fails.
    pub fn wait_for(&self, service: &str) -> Result<()> {
        let ready = wait::until(&format!("{service} takes traffic"), PATIENCE, || {
            let found = run(self.host.command(sheer()?).args(["get", "service", service, "-o", "json"]))?;
            let found: serde_json::Value = serde_json::from_str(&found)?;
            ensure!(found["services"][0]["healthy"] == 1, "{found}");
            Ok(())
        });
        ready.map_err(|error| self.explain(error))
    }

    /// Writes a file of the scenario, and says where it is.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn script(&self, name: &str, text: &str) -> Result<String> {
        let file = self.home().join(name);
        std::fs::write(&file, text)?;
        Ok(file.to_string_lossy().into_owned())
    }

    /// The error with what all servers printed.
    pub fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        let printed: Vec<_> = self.programs.iter().map(Program::output).collect();
        error.context(printed.join("\n---\n"))
    }
}

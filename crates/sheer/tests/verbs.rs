//! The verbs against a real control plane, and what survives it.

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use sheer_testmesh::program::{Program, run};
use sheer_testmesh::wait;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(30);

const SERVICES: &str = "apiVersion: v1
kind: Service
metadata:
  name: api
spec:
  ports:
  - port: 80
---
apiVersion: v1
kind: Service
metadata:
  name: api-v2
spec:
  ports:
  - port: 80
";

const ROUTE: &str = "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata:
  name: canary
spec:
  parentRefs:
  - kind: Service
    group: ''
    name: api
  rules:
  - backendRefs:
    - name: api
      port: 80
      weight: 90
    - name: api-v2
      port: 80
      weight: 10
";

/// A control plane with directories of its own.
struct Plane {
    home: TempDir,
    program: Program,
}

impl Plane {
    fn start() -> Result<Self> {
        let home = tempfile::tempdir()?;
        let program = Self::launch(home.path(), "mesh.d", "state")?;
        Ok(Self { home, program })
    }

    fn launch(home: &Path, config: &str, state: &str) -> Result<Program> {
        let mut command = sheer(&["up", "--api-listen", "127.0.0.1:0", "--proxy-listen", "127.0.0.1:0"]);
        command.arg("--config").arg(home.join(config)).arg("--state").arg(home.join(state));
        command.arg("--sockets").arg(home.join("sockets"));
        let mut program = Program::start("up", home, &mut command)?;
        program.prints("Sheer is up.", PATIENCE)?;
        Ok(program)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// A command that asks this control plane.
    fn ask(&self, arguments: &[&str]) -> Command {
        let mut command = sheer(arguments);
        command.arg("--api").arg(format!("unix:{}", self.path("sockets/api.sock").display()));
        command.current_dir(self.home.path());
        command
    }

    fn says(&self, arguments: &[&str]) -> Result<String> {
        run(&mut self.ask(arguments))
    }

    /// Both outputs of a command that does not succeed.
    fn refuses(&self, arguments: &[&str]) -> Result<String> {
        let output = self.ask(arguments).output()?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        ensure!(output.status.code() == Some(1), "{arguments:?}: {}\n{text}", output.status);
        Ok(text)
    }
}

fn sheer(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sheer"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("SHEER_")) {
        command.env_remove(name);
    }
    command.args(arguments);
    command
}

#[test]
fn objects_come_change_and_go() -> Result<()> {
    let plane = Plane::start()?;
    fs::write(plane.path("services.yaml"), SERVICES)?;
    fs::write(plane.path("canary.yaml"), ROUTE)?;
    fs::write(plane.path("shifted.yaml"), ROUTE.replace("90", "50").replace("weight: 10", "weight: 50"))?;

    let text = plane.says(&["diff", "-f", "services.yaml"])?;
    ensure!(text.contains("+ kind: Service"), "{text}");
    ensure!(!plane.path("mesh.d/applied").exists(), "diff writes nothing");
    let text = plane.says(&["apply", "-f", "services.yaml", "-f", "canary.yaml"])?;
    let expected = "HTTPRoute default/canary created\nService default/api created\nService default/api-v2 created\n";
    ensure!(text == expected, "{text}");
    let text = plane.says(&["apply", "-f", "canary.yaml"])?;
    ensure!(text == "HTTPRoute default/canary unchanged\n", "{text}");
    let text = plane.says(&["diff", "-f", "shifted.yaml"])?;
    ensure!(text.contains("-       weight: 90") && text.contains("+       weight: 50"), "{text}");
    plane.says(&["apply", "-f", "shifted.yaml"])?;

    let text = plane.says(&["get"])?;
    ensure!(text.contains("HTTPRoute") && text.contains("canary"), "{text}");
    let text = plane.says(&["get", "httproute", "canary", "-o", "yaml"])?;
    ensure!(text.contains("weight: 50"), "{text}");
    let text = plane.says(&["get", "services"])?;
    ensure!(text.contains("api-v2") && text.contains("240."), "{text}");

    let text = plane.refuses(&["delete", "httproute", "missing"])?;
    ensure!(text.contains("missing"), "{text}");
    let text = plane.says(&["delete", "httproute", "canary"])?;
    ensure!(text == "HTTPRoute default/canary deleted\n", "{text}");
    let text = plane.refuses(&["get", "httproute", "canary"])?;
    ensure!(text.contains("there is no HTTPRoute 'canary'"), "{text}");
    Ok(())
}

#[test]
fn a_wrong_file_is_named_and_disturbs_nothing() -> Result<()> {
    let plane = Plane::start()?;
    fs::write(plane.path("mesh.d/services.yaml"), SERVICES)?;
    wait::until("the written services are known", PATIENCE, || plane.says(&["get", "service", "api"]))?;
    fs::write(plane.path("wrong.yaml"), SERVICES.replace("port: 80", "prt: 80"))?;
    let text = plane.refuses(&["apply", "-f", "wrong.yaml"])?;
    ensure!(text.contains("wrong.yaml:7:5: error: ") && text.contains("did you mean 'port'?"), "{text}");
    let text = plane.refuses(&["delete", "service", "api"])?;
    ensure!(text.contains("by hand in services.yaml:"), "{text}");
    ensure!(plane.says(&["check"]).is_ok(), "all is well before");

    fs::copy(plane.path("wrong.yaml"), plane.path("mesh.d/.half"))?;
    fs::rename(plane.path("mesh.d/.half"), plane.path("mesh.d/wrong.yaml"))?;
    wait::until("check names the file", PATIENCE, || {
        let text = plane.refuses(&["check"])?;
        ensure!(text.contains("wrong.yaml") && text.contains(":7"), "{text}");
        Ok(())
    })?;
    plane.says(&["get", "service", "api"])?;
    fs::remove_file(plane.path("mesh.d/wrong.yaml"))?;
    wait::until("check is content again", PATIENCE, || plane.says(&["check"])).map(drop)
}

#[test]
fn a_backup_starts_on_an_empty_machine() -> Result<()> {
    let mut plane = Plane::start()?;
    fs::write(plane.path("services.yaml"), SERVICES)?;
    plane.says(&["apply", "-f", "services.yaml"])?;
    let root = |plane: &Plane| -> Result<String> {
        let token = plane.says(&["token", "create", "--service-account", "web"])?;
        ensure!(token.starts_with("sheer1.") && token.lines().count() == 1, "{token}");
        Ok(format!("{:?}", sheer_core::token::JoinToken::parse(token.trim())?.root_sha256))
    };
    let before = root(&plane)?;
    plane.says(&["control", "backup", "-o", "running.backup"])?;
    let mode = fs::metadata(plane.path("running.backup"))?.permissions().mode();
    ensure!(mode & 0o777 == 0o600, "the backup holds the root key and has mode {mode:o}");

    plane.program.signal(Signal::SIGKILL)?;
    plane.program.wait(PATIENCE)?;
    let home = plane.home.path().to_owned();
    let place = |command: &mut Command, state: &str, config: &str| -> Result<String> {
        run(command.arg("--state").arg(home.join(state)).arg("--config").arg(home.join(config)).current_dir(&home))
    };
    place(&mut sheer(&["control", "restore", "-i", "running.backup"]), "state-2", "mesh-2.d")?;
    plane.program = Plane::launch(&home, "mesh-2.d", "state-2")?;
    ensure!(root(&plane)? == before, "another root after the restore");
    plane.says(&["get", "service", "api"])?;
    let again = sheer(&["control", "restore", "-i", "running.backup", "--state"])
        .arg(plane.path("state-2"))
        .arg("--config")
        .arg(plane.path("mesh-2.d"))
        .current_dir(&home)
        .output()?;
    ensure!(!again.status.success(), "a restore over a state that is there");
    Ok(())
}

#[test]
fn a_token_is_made_also_while_no_control_plane_runs() -> Result<()> {
    let mut plane = Plane::start()?;
    plane.program.stop()?;
    let state = plane.path("state").to_string_lossy().into_owned();
    let create = ["token", "create", "--service-account", "web", "--state", &state, "--advertise", "10.0.0.1:15012"];
    let token = sheer_core::token::JoinToken::parse(plane.says(&create)?.trim())?;
    assert_eq!(token.addresses, ["10.0.0.1:15012"]);
    let nowhere = create.map(|word| if word == state { "/nowhere" } else { word });
    let refused = plane.refuses(&nowhere)?;
    ensure!(refused.contains("no control plane's state"), "{refused}");
    Ok(())
}

#[test]
fn the_loopback_address_asks_for_the_token() -> Result<()> {
    let plane = Plane::start()?;
    let text = plane.program.output();
    let line = text.lines().find(|line| line.trim_start().starts_with("api ")).context("no line of the API")?;
    let address = line.split_whitespace().nth(1).and_then(|url| url.strip_suffix("/api/v1/")).context("no address")?;
    let file = plane.path("state/api.token");
    let file = &*file.to_string_lossy();
    ensure!(text.contains(file), "the token's file is not named:\n{text}");
    run(&mut sheer(&["get", "--api", address, "--api-token-file", file]))?;
    fs::write(plane.path("wrong"), "0123456789abcdef0123456789abcdef")?;
    let wrong =
        sheer(&["get", "--api", address, "--api-token-file", "wrong"]).current_dir(plane.home.path()).output()?;
    ensure!(wrong.status.code() == Some(1), "another token is taken");
    ensure!(plane.says(&["dashboard"])?.starts_with(address), "the link leads elsewhere");
    Ok(())
}

#[test]
fn a_service_says_ready_to_systemd() -> Result<()> {
    let home = tempfile::tempdir()?;
    let socket = std::os::unix::net::UnixDatagram::bind(home.path().join("notify"))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut command = sheer(&["control", "--api-listen", "127.0.0.1:0", "--proxy-listen", "127.0.0.1:0"]);
    for (flag, name) in [("--config", "mesh.d"), ("--state", "state"), ("--sockets", "sockets")] {
        command.arg(flag).arg(home.path().join(name));
    }
    let mut program = Program::start("control", home.path(), command.env("NOTIFY_SOCKET", home.path().join("notify")))?;
    let mut buffer = [0; 256];
    let length = socket.recv(&mut buffer).with_context(|| program.output())?;
    ensure!(buffer[..length].starts_with(b"READY=1"), "{}", String::from_utf8_lossy(&buffer[..length]));
    program.signal(Signal::SIGTERM)?;
    ensure!(program.wait(PATIENCE)?.success(), "{}", program.output());
    Ok(())
}

//! The laptop: from a binary and no files, without root, to two services that talk through the mesh.

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid, chown};
use sheer_testmesh::program::{Program, run};
use sheer_testmesh::wait;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;

/// How long anything that should be quick may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// The user that the laptop belongs to when the tests run as root.
const PERSON: u32 = 65534;

/// A home directory, a user and the binary: all that a person has.
struct Laptop {
    home: TempDir,
    binary: PathBuf,
}

impl Laptop {
    fn new() -> Result<Self> {
        let home = tempfile::tempdir()?;
        let binary = home.path().join("sheer");
        let built = Path::new(env!("CARGO_BIN_EXE_sheer"));
        // The target directory may be closed to the other user.
        if std::fs::hard_link(built, &binary).is_err() {
            std::fs::copy(built, &binary)?;
        }
        let laptop = Self { home, binary };
        std::fs::create_dir(laptop.runtime())?;
        if Uid::effective().is_root() {
            for path in [laptop.home.path(), &laptop.runtime()] {
                chown(path, Some(Uid::from_raw(PERSON)), Some(Gid::from_raw(PERSON)))?;
            }
        }
        Ok(laptop)
    }

    fn runtime(&self) -> PathBuf {
        self.home.path().join("run")
    }

    /// The binary as the person runs it.
    fn sheer(&self, arguments: &[&str]) -> Command {
        let mut command = self.person(&self.binary);
        command.args(arguments);
        command
    }

    /// A program as the person runs it.
    fn person(&self, program: &Path) -> Command {
        let mut command = if Uid::effective().is_root() {
            let (uid, gid) = (format!("--reuid={PERSON}"), format!("--regid={PERSON}"));
            let mut command = Command::new("setpriv");
            command.args([&uid, &gid, "--clear-groups", "--", "setpriv", "--pdeathsig", "KILL", "--"]).arg(program);
            command
        } else {
            Command::new(program)
        };
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("SHEER_")) {
            command.env_remove(name);
        }
        for name in ["XDG_STATE_HOME", "XDG_CONFIG_HOME", "TMPDIR"] {
            command.env_remove(name);
        }
        command.current_dir(self.home.path());
        command.env("HOME", self.home.path()).env("XDG_RUNTIME_DIR", self.runtime());
        command
    }

    fn start(&self, name: &str, arguments: &[&str]) -> Result<Program> {
        Program::start(name, self.home.path(), &mut self.sheer(arguments))
    }

    fn up(&self) -> Result<Program> {
        let mut up = self.start("up", &["up", "--api-listen", "127.0.0.1:0"])?;
        up.prints("Sheer is up.", PATIENCE)?;
        Ok(up)
    }

    /// The binary where nobody may make user namespaces.
    fn sheer_without_namespaces(&self, arguments: &[&str]) -> Command {
        // The limit is the namespace's own; the privileges to set it are given up before the binary starts.
        let script = "echo 0 > /proc/sys/user/max_user_namespaces && \
                      exec setpriv --inh-caps=-all --ambient-caps=-all -- \"$@\"";
        let mut command = self.person(Path::new("unshare"));
        command.args(["--user", "--map-user=1000", "--keep-caps", "sh", "-c", script, "sh"]);
        command.arg(&self.binary).args(arguments);
        command
    }

    /// What a command says that does not succeed.
    fn refused(&self, arguments: &[&str]) -> Result<String> {
        let mut program = self.start("refused", arguments)?;
        let status = program.wait(PATIENCE)?;
        ensure!(!status.success(), "{arguments:?} succeeded: {}", program.output());
        Ok(program.output())
    }

    fn json(&self, arguments: &[&str]) -> Result<serde_json::Value> {
        let text = run(&mut self.sheer(&[arguments, &["-o", "json"]].concat()))?;
        serde_json::from_str(&text).with_context(|| format!("{arguments:?} printed {text}"))
    }
}

/// A web server in Python: answers with `TEXT`, or with what `http://api/` answered.
const SERVER: &str = r#"
import http.server, sys, urllib.request
port, said = int(sys.argv[1]), sys.argv[2]
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        if said.startswith("http:"):
            text = b"web heard: " + urllib.request.urlopen(said, timeout=10).read()
        else:
            text = said.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"#;

fn get(port: u16) -> Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// A port that nothing listens on, below those that the system gives to whoever asks for any: until it is used, nobody
/// else is given it. Where to begin is this process's own, so that runs side by side choose differently.
fn free_port() -> Result<u16> {
    let first = 20_000 + (std::process::id() % 10_000) as u16;
    let free = (first..first + 2_000).find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok());
    free.context("no free port")
}

#[test]
fn two_commands_and_two_services() -> Result<()> {
    let laptop = Laptop::new()?;
    let mut up = laptop.up()?;
    let serve = |port, said| ["--", "python3", "-c", SERVER, port, said];
    let api = [&["run", "api", "--port", "8081"][..], &serve("8081", "hello from api")].concat();
    let mut api = laptop.start("api", &api)?;
    let published = free_port()?;
    let publish = format!("{published}=8080");
    let web = [&["run", "web", "--port", "8080", "--publish", &publish][..], &serve("8080", "http://api/")].concat();
    let mut web = laptop.start("web", &web)?;

    let answer = wait::until("web answers with what api said", PATIENCE, || {
        let answer = get(published)?;
        ensure!(answer.contains("hello from api"), "{answer}\n{}\n{}", web.output(), api.output());
        Ok(answer)
    })?;
    ensure!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("web heard: hello from api"), "{answer}");

    wait::until("stat shows the edge, encrypted", PATIENCE, || {
        let stat = laptop.json(&["stat"])?;
        let edges = stat["edges"].as_array().context("edges")?;
        // Calls before api was ready failed, and make an edge of their own.
        let met = |edge: &&serde_json::Value| {
            edge["source"] == "default/web" && edge["destination"] == "default/api" && edge["mtls"] == true
        };
        let Some(edge) = edges.iter().find(met) else { bail!("no encrypted edge from web to api: {stat}") };
        ensure!(edge["total"]["requests"].as_u64() >= Some(1) && edge["total"]["failures"] == 0, "{edge}");
        Ok(())
    })?;
    let text = run(&mut laptop.sheer(&["stat"]))?;
    ensure!(text.contains("default/web") && text.contains("default/api"), "{text}");
    let services = laptop.json(&["get", "services"])?;
    ensure!(services["services"].as_array().is_some_and(|all| all.iter().all(|s| s["implied"] == true)), "{services}");
    let check = run(&mut laptop.sheer(&["check"]))?;
    ensure!(!check.contains("error"), "{check}");

    for (program, name) in [(&mut web, "web"), (&mut api, "api"), (&mut up, "up")] {
        program.signal(Signal::SIGTERM)?;
        program.wait(PATIENCE).with_context(|| format!("{name} goes on after SIGTERM"))?;
    }
    let left: Vec<_> = std::fs::read_dir(laptop.runtime().join("sheer"))?.collect::<Result<_, _>>()?;
    ensure!(left.iter().all(|entry| !entry.path().join("pid").exists()), "left behind: {left:?}");
    Ok(())
}

#[test]
fn a_second_control_plane_is_refused() -> Result<()> {
    let laptop = Laptop::new()?;
    let mut up = laptop.up()?;
    let error = laptop.refused(&["up"])?;
    ensure!(error.contains("a control plane runs already"), "{error}");
    ensure!(up.signal(Signal::SIGINT).is_ok() && up.wait(PATIENCE)?.success(), "it ends well on Ctrl-C");
    // What the first left does not keep the next from starting.
    laptop.up()?.stop()?;
    Ok(())
}

#[test]
fn where_namespaces_are_forbidden_the_remedy_is_named() -> Result<()> {
    let laptop = Laptop::new()?;
    let say = |arguments: &[&str]| -> Result<(Option<i32>, String)> {
        let output = laptop.sheer_without_namespaces(arguments).output()?;
        Ok((output.status.code(), String::from_utf8([output.stdout, output.stderr].concat())?))
    };
    let setting = "sysctl -w user.max_user_namespaces=10000";
    let (status, said) = say(&["check", "--only", "host"])?;
    // In a container it is no fault of the host; whoever runs a workload is told all the same.
    let is_container = ["/.dockerenv", "/run/.containerenv"].iter().any(|sign| Path::new(sign).exists())
        || std::env::var_os("KUBERNETES_SERVICE_HOST").is_some();
    let is_told = match is_container {
        true => said.contains("this is a container") && said.contains("'--capture here'"),
        false => said.contains("works, with 1 warning") && said.contains(setting),
    };
    ensure!(status == Some(0) && is_told, "{status:?} {said}");
    for command in [&["run", "api", "--port", "8081", "--", "true"][..], &["demo", "--for", "1s"]] {
        let (status, said) = say(command)?;
        ensure!(status == Some(1) && said.contains(setting), "{command:?}: {status:?} {said}");
    }
    let (_, said) = say(&["run", "api", "--", "true"])?;
    ensure!(said.contains("'--capture env'"), "{said}");
    Ok(())
}

#[test]
fn a_port_in_use_is_named() -> Result<()> {
    let laptop = Laptop::new()?;
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?.to_string();
    let error = laptop.refused(&["up", "--api-listen", &address])?;
    ensure!(error.contains(&address) && error.contains("in use"), "{error}");
    Ok(())
}

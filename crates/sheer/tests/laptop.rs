//! The laptop: from a binary and no files, without root.

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid, chown};
use sheer_testmesh::program::Program;
use std::net::TcpListener;
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
        let mut command = if Uid::effective().is_root() {
            let (uid, gid) = (format!("--reuid={PERSON}"), format!("--regid={PERSON}"));
            let mut command = Command::new("setpriv");
            command
                .args([&uid, &gid, "--clear-groups", "--", "setpriv", "--pdeathsig", "KILL", "--"])
                .arg(&self.binary);
            command
        } else {
            Command::new(&self.binary)
        };
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("SHEER_")) {
            command.env_remove(name);
        }
        for name in ["XDG_STATE_HOME", "XDG_CONFIG_HOME", "TMPDIR"] {
            command.env_remove(name);
        }
        command.args(arguments).current_dir(self.home.path());
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

    /// What a command says that does not succeed.
    fn refused(&self, arguments: &[&str]) -> Result<String> {
        let mut program = self.start("refused", arguments)?;
        let status = program.wait(PATIENCE)?;
        ensure!(!status.success(), "{arguments:?} succeeded: {}", program.output());
        Ok(program.output())
    }
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
fn a_port_in_use_is_named() -> Result<()> {
    let laptop = Laptop::new()?;
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?.to_string();
    let error = laptop.refused(&["up", "--api-listen", &address])?;
    ensure!(error.contains(&address) && error.contains("in use"), "{error}");
    Ok(())
}

//! `sheer exec`: a command inside a workload's network.

use crate::dirs::Dirs;
use crate::supervise::rundir;
use anyhow::{Context, bail};
use nix::sched::{CloneFlags, setns};
use sheer_core::name::ServiceName;
use sheer_proxy::platform::{Account, Birth, prepare};
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

/// Flags of `sheer exec`.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:
  sheer exec web-1 -- curl -sv http://api/                 # as the workload sees the world")]
pub(crate) struct Args {
    /// The workload, as 'sheer run' named it
    #[arg(value_name = "[NS/]NAME", value_parser = ServiceName::parse)]
    pub(crate) name: ServiceName,

    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

/// Becomes the command, inside the workload's namespaces.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let runs = rundir::runs(&Dirs::of_user()?);
    let record = rundir::find(&runs, args.name.namespace.as_str(), args.name.name.as_str())?;
    let directory = std::env::current_dir().ok();
    match record.capture.as_str() {
        "netns" => {
            let keeper = record.keeper.filter(|keeper| keeper.lives()).context("the workload is just ending")?;
            enter(keeper.pid).with_context(|| format!("cannot enter the namespaces of {}", args.name))?;
        }
        "env" => {}
        other => bail!(
            "{} has no network of its own (its capture is '{other}'); run the command directly on this host",
            args.name
        ),
    }
    // The mount namespace has a root of its own, and with it this process's directory.
    if let Some(directory) = directory {
        let _ = std::env::set_current_dir(directory);
    }
    let [program, arguments @ ..] = &args.command[..] else { bail!("there is no command") };
    let mut command = Command::new(program);
    command.args(arguments).envs(record.set);
    let account = record.account.map(|(user, group, groups)| Account { user, group, groups });
    prepare(&mut command, Birth { account, ..Birth::default() });
    let error = command.exec();
    let program = program.to_string_lossy();
    match error.kind() {
        std::io::ErrorKind::NotFound => {
            anstream::eprintln!("sheer: there is no program '{program}'");
            Ok(ExitCode::from(127))
        }
        _ => {
            anstream::eprintln!("sheer: cannot start '{program}': {error}");
            Ok(ExitCode::from(126))
        }
    }
}

fn enter(keeper: i32) -> anyhow::Result<()> {
    let open = |name: &str| {
        let path = format!("/proc/{keeper}/ns/{name}");
        File::open(&path).with_context(|| format!("cannot open {path}"))
    };
    // All are opened before the first is entered: from inside, /proc shows what this user may see there.
    let (user, network, mounts) = (open("user")?, open("net")?, open("mnt")?);
    if !nix::unistd::geteuid().is_root() {
        setns(&user, CloneFlags::CLONE_NEWUSER)?;
    }
    setns(&network, CloneFlags::CLONE_NEWNET)?;
    setns(&mounts, CloneFlags::CLONE_NEWNS)?;
    Ok(())
}

//! `sheer upgrade`: proxies of this program take the place of those that run.

use crate::dirs::Dirs;
use crate::supervise::requests::{Answer, Wish, ask};
use crate::supervise::{READY_WITHIN, rundir};
use anyhow::{Context, bail};
use sheer_core::name::ServiceName;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Flags of `sheer upgrade`.
#[derive(clap::Args, Clone, Debug)]
#[command(
    after_help = "A new proxy is started beside the old one, on the same sockets. When it is ready it takes what comes new;
the old one finishes what is open, at most for the workload's --drain-grace. The command is not touched.

Examples:
  sheer upgrade web-1
  sheer upgrade --all                                      # after a new version was installed"
)]
pub(crate) struct Args {
    /// The workloads, as 'sheer run' named them
    #[arg(value_name = "[NS/]NAME", value_parser = ServiceName::parse, required_unless_present = "all")]
    pub(crate) name: Vec<ServiceName>,

    /// Every workload of this user on this host
    #[arg(long, conflicts_with = "name")]
    pub(crate) all: bool,
}

/// Replaces one proxy after the other; goes on after a failure.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let runs = rundir::runs(&Dirs::of_user()?);
    let names = match args.all {
        true => rundir::running(&runs).iter().map(|name| ServiceName::parse(name)).collect::<Result<_, _>>()?,
        false => args.name,
    };
    if names.is_empty() {
        bail!("no workload of this user runs on this host");
    }
    let program = std::env::current_exe().context("cannot tell where this program is")?;
    let mut failed = false;
    for name in names {
        let began = Instant::now();
        let (namespace, workload) = (name.namespace.as_str(), name.name.as_str());
        let asked = rundir::find(&runs, namespace, workload).and_then(|_| {
            let wish = Wish::Replace { program: program.clone() };
            ask(&rundir::path_of(&runs, namespace, workload), &wish, READY_WITHIN + Duration::from_secs(5))
        });
        match asked {
            Ok(Answer::Replaced { pid, former }) => {
                let took = began.elapsed().as_secs_f64();
                anstream::println!("{name}: process {pid} took the place of {former} after {took:.1} s");
            }
            Ok(Answer::Refused { message }) => {
                failed = true;
                anstream::eprintln!("sheer: the proxy of {name} was not replaced: {message}");
            }
            Err(error) => {
                failed = true;
                anstream::eprintln!("sheer: the proxy of {name} was not replaced: {error:#}");
            }
        }
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

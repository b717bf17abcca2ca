//! `sheer clean`: removes what a killed Sheer left.

use crate::cmd::demo;
use crate::dirs::Dirs;
use crate::supervise::rundir;
use std::process::ExitCode;

/// Flags of `sheer clean`.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Example:
  sheer clean                                              # nothing that runs is touched")]
pub(crate) struct Args {}

/// Cleans up after this user's workloads that have no supervisor any more.
pub(crate) fn run(_: Args) -> anyhow::Result<ExitCode> {
    let demonstration = demo::sweep()?;
    let runs = rundir::runs(&Dirs::of_user()?);
    let swept = rundir::sweep(&runs)?;
    for name in &swept {
        anstream::println!("removed what {name} left");
    }
    if demonstration {
        anstream::println!("removed what the demonstration left");
    }
    if swept.is_empty() && !demonstration {
        anstream::println!("nothing to clean");
    }
    Ok(ExitCode::SUCCESS)
}

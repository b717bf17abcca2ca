//! `sheer proxy`: the proxy alone, beside an existing unit or in a container.

use super::run::Workload;
use crate::supervise;
use std::process::ExitCode;

/// Flags of `sheer proxy`.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Examples:
  sheer proxy web --port 80 --unit nginx.service           # adopt a running unit; it is not touched
  sheer proxy api --port 8080 --user app                   # adopt what a user runs
  sheer proxy api --port 8080 --capture here               # in a container or pod, with CAP_NET_ADMIN")]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) workload: Workload,
}

/// Stands beside the workload until it is told to stop.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    supervise::run(&args.workload, &[])
}

//! `sheer proxy`: the proxy alone, beside an existing unit or in a container; and the hidden process that a
//! supervisor starts.

use super::run::Workload;
use crate::{descriptors, logging, supervise};
use anyhow::Context;
use std::fs::File;
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

/// `sheer __proxy`: reads its plan from the descriptor that `SHEER_PLAN_FD` names.
pub(crate) fn hidden() -> anyhow::Result<ExitCode> {
    logging::start_as_told()?;
    // Two megabytes at a time is much for a process of ten; without the setting a proxy is only larger.
    let _ = nix::sys::prctl::set_thp_disable(true);
    descriptors::take_all();
    let number = std::env::var("SHEER_PLAN_FD").ok().and_then(|text| text.parse().ok());
    let number = number.context("__proxy is started by 'sheer run' and 'sheer proxy' alone")?;
    let file = File::from(sheer_proxy::platform::adopt(number)?);
    let plan = serde_json::from_reader(file).context("cannot read the proxy's plan")?;
    // What is wrong was told to the supervisor, which says it; twice would be two faults.
    Ok(if sheer_proxy::run(plan).is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

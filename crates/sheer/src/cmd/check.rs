//! `sheer check`: is the installation healthy? This machine is looked at here, the mesh by the control plane.

mod host;

pub(crate) use host::obstacle;

use crate::client::{Absent, Connect};
use crate::keeper::namespace::{self, Obstacle};
use crate::output::{self, counted};
use owo_colors::OwoColorize as _;
use sheer_core::api::{Check, Finding, Level};
use std::process::ExitCode;

/// Flags of `sheer check`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sheer check                # exit status 0: nothing is wrong
  sheer check --only host    # can workloads run on this machine? needs no control plane
  sheer check -o json")]
pub(crate) struct Args {
    /// How to print
    #[arg(short, long, default_value = "table")]
    output: output::Format,

    /// Look at one of them alone: this machine, or what the control plane knows [default: both]
    #[arg(long)]
    only: Option<Part>,

    #[command(flatten)]
    connect: Connect,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// This machine; needs no control plane.
    Host,
    /// What the control plane knows.
    Mesh,
}

/// The hidden command of a process that tries to make namespaces, see [`try_namespace`].
const TRY_NAMESPACE: &str = "__namespace";

/// Prints findings, worst first; the exit status is 1 when one is an error.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut check = match args.only {
        Some(Part::Host) => Check::default(),
        _ => mesh(&args.connect)?,
    };
    if args.only != Some(Part::Mesh) {
        check.findings.extend(host::look()?);
    }
    check.findings.sort_by_key(|finding| std::cmp::Reverse(finding.level));
    check.level = check.findings.iter().map(|finding| finding.level).max().unwrap_or_default();
    match args.output {
        output::Format::Json => output::json(&check)?,
        output::Format::Table => report(&check)?,
    }
    Ok(if check.level == Level::Error { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn mesh(connect: &Connect) -> anyhow::Result<Check> {
    match connect.client()?.get("/api/v1/check") {
        Err(error) if error.is::<Absent>() => Ok(Check { level: Level::Error, findings: vec![absent(&error)] }),
        other => other,
    }
}

/// `sheer __namespace`: tries what a workload with a network of its own needs, and prints what is in the way, as JSON.
pub(crate) fn try_namespace() -> anyhow::Result<ExitCode> {
    output::json(&namespace::probe())?;
    Ok(ExitCode::SUCCESS)
}

fn absent(error: &anyhow::Error) -> Finding {
    Finding {
        level: Level::Error,
        topic: "control-plane".into(),
        subject: "control plane".into(),
        what: error.to_string(),
        why: "running workloads go on with what they know; nothing new can join or change".into(),
        mend:
            "start it with 'sheer up' or 'sheer control'; for one elsewhere, ask on its host or name its API with --api"
                .into(),
    }
}

fn report(check: &Check) -> anyhow::Result<()> {
    for finding in &check.findings {
        let mark = match finding.level {
            Level::Ok => "ok   ".green().to_string(),
            Level::Warn => "warn ".yellow().to_string(),
            Level::Error => "error".red().bold().to_string(),
        };
        output::print(&format!("{mark}  {}: {}", finding.subject.bold(), finding.what))?;
        for (name, text) in [("why", &finding.why), ("mend", &finding.mend)] {
            if !text.is_empty() && finding.level != Level::Ok {
                output::print(&format!("       {} {text}", format!("{name}:").dimmed()))?;
            }
        }
    }
    let count = |level| check.findings.iter().filter(|finding| finding.level == level).count();
    let (errors, warnings) = (count(Level::Error), count(Level::Warn));
    output::print(&match (errors, warnings) {
        (0, 0) => "all is well".to_owned(),
        (0, warnings) => format!("works, with {}", counted(warnings, "warning")),
        (errors, 0) => counted(errors, "error"),
        (errors, warnings) => format!("{}, {}", counted(errors, "error"), counted(warnings, "warning")),
    })
}

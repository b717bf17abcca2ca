//! `sheer check`: is the installation healthy?

use crate::client::{Absent, Connect};
use crate::output::{self, counted};
use owo_colors::OwoColorize as _;
use sheer_core::api::{Check, Finding, Level};
use std::process::ExitCode;

/// Flags of `sheer check`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sheer check                # exit status 0: nothing is wrong
  sheer check -o json")]
pub(crate) struct Args {
    /// How to print
    #[arg(short, long, default_value = "table")]
    output: output::Format,

    #[command(flatten)]
    connect: Connect,
}

/// Prints findings, worst first; the exit status is 1 when one is an error.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let client = args.connect.client()?;
    let mut check: Check = match client.get("/api/v1/check") {
        Ok(check) => check,
        Err(error) if error.is::<Absent>() => Check { level: Level::Error, findings: vec![absent(&error)] },
        Err(error) => return Err(error),
    };
    check.findings.sort_by_key(|finding| std::cmp::Reverse(finding.level));
    check.level = check.findings.iter().map(|finding| finding.level).max().unwrap_or_default();
    match args.output {
        output::Format::Json => output::json(&check)?,
        output::Format::Table => report(&check)?,
    }
    Ok(if check.level == Level::Error { ExitCode::FAILURE } else { ExitCode::SUCCESS })
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

//! `sheer apply`: brings objects into the running configuration.

use crate::client::{Connect, show_place};
use crate::cmd::sources;
use crate::output;
use owo_colors::OwoColorize as _;
use sheer_core::api::{Action, Applied, Apply, Change};
use std::path::PathBuf;
use std::process::ExitCode;

/// Flags of `sheer apply`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sheer apply -f canary.yaml
  sheer apply -f mesh.d/
  sed s/90/50/ canary.yaml | sheer apply -f -")]
pub(crate) struct Args {
    /// A file, a directory of .yaml files, or - for standard input
    #[arg(short, long, value_name = "FILE|DIR|-", required = true)]
    file: Vec<PathBuf>,

    /// How to print what was done
    #[arg(short, long, default_value = "table")]
    output: output::Format,

    #[command(flatten)]
    connect: Connect,
}

/// Applies; objects that are the same already are left alone.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let request = Apply { files: sources::read(&args.file)?, dry_run: false };
    let applied: Applied = args.connect.client()?.post("/api/v1/apply", &request)?;
    match args.output {
        output::Format::Json => output::json(&applied)?,
        output::Format::Table => report(&applied)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// One line an object; warnings on standard error.
pub(crate) fn report(applied: &Applied) -> anyhow::Result<()> {
    for warning in &applied.warnings {
        anstream::eprintln!("{}", show_place(warning).yellow());
    }
    for change in &applied.changes {
        let action = match change.action {
            Action::Created => "created".green().to_string(),
            Action::Updated => "updated".cyan().to_string(),
            Action::Deleted => "deleted".red().to_string(),
            Action::Unchanged => "unchanged".dimmed().to_string(),
        };
        output::print(&format!("{} {action}", subject(change)))?;
    }
    Ok(())
}

/// `Kind NAMESPACE/NAME`.
pub(crate) fn subject(change: &Change) -> String {
    match change.namespace.as_str() {
        "" => format!("{} {}", change.kind, change.name),
        namespace => format!("{} {namespace}/{}", change.kind, change.name),
    }
}

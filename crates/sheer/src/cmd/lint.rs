//! `sheer lint`: checks configuration files without a control plane, by the code that the control plane uses.

use crate::cmd::sources;
use crate::output::{self, counted};
use owo_colors::OwoColorize as _;
use sheer_core::compile::{self, Source};
use sheer_core::diagnostic::Diagnostic;
use std::path::PathBuf;
use std::process::ExitCode;

/// Flags of `sheer lint`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sheer lint canary.yaml
  sheer lint mesh.d/              # all files together: references between them are checked
  kustomize build . | sheer lint -")]
pub(crate) struct Args {
    /// Files, directories of .yaml files, or - for standard input; they are checked as one configuration
    #[arg(value_name = "FILE|DIR|-", required = true)]
    files: Vec<PathBuf>,

    /// Refuse warnings too
    #[arg(long)]
    strict: bool,

    /// How to print
    #[arg(short, long, default_value = "table")]
    output: output::Format,
}

/// Prints findings as `FILE:LINE:COLUMN: ...` on standard output; the exit status is 1 when there are errors.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let files = sources::read(&args.files)?;
    let count = files.len();
    let sources: Vec<Source> = files.into_iter().map(|file| Source { file: file.name, text: file.text }).collect();
    let findings = compile::lint(&sources);
    let errors = findings.iter().filter(|finding| finding.is_error()).count();
    let warnings = findings.len() - errors;
    match args.output {
        output::Format::Json => output::json(&findings)?,
        output::Format::Table => {
            findings.iter().try_for_each(|finding| output::print(&show(finding)))?;
            let (errors, warnings) = (counted(errors, "error"), counted(warnings, "warning"));
            anstream::eprintln!("{}: {errors}, {warnings}", counted(count, "file"));
        }
    }
    let refused = errors > 0 || (args.strict && warnings > 0);
    Ok(if refused { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn show(finding: &Diagnostic) -> String {
    let line = finding.to_string();
    if finding.is_error() { line.red().to_string() } else { line.yellow().to_string() }
}

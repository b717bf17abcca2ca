//! `sheer dashboard`: a link that opens the control plane's page in a browser.

use crate::client::Connect;
use crate::output;
use sheer_core::api::Link;
use std::process::ExitCode;

/// Flags of `sheer dashboard`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sheer dashboard
  xdg-open \"$(sheer dashboard)\"")]
pub(crate) struct Args {
    /// How to print
    #[arg(short, long, default_value = "text")]
    output: Format,

    #[command(flatten)]
    connect: Connect,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// The link alone.
    Text,
    /// As the API gives it.
    Json,
}

/// Prints the link on standard output.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let link: Link = args.connect.client()?.post("/api/v1/links", &())?;
    match args.output {
        Format::Json => output::json(&link)?,
        Format::Text => output::print(&link.url)?,
    }
    Ok(ExitCode::SUCCESS)
}

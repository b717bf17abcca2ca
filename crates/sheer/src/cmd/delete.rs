//! `sheer delete`: removes an object that `sheer apply` wrote.

use crate::client::{Connect, encode};
use crate::cmd::{apply, get};
use crate::output;
use sheer_core::api::Applied;
use sheer_core::name::{DEFAULT_NAMESPACE, ServiceName};
use std::process::ExitCode;

/// Flags of `sheer delete`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sheer delete httproute canary
  sheer delete service shop/web")]
pub(crate) struct Args {
    /// The kind, such as httproute
    kind: String,

    /// The object: NAME or NAMESPACE/NAME
    #[arg(value_name = "[NAMESPACE/]NAME")]
    name: String,

    /// The namespace of a NAME that names none
    #[arg(short, long, default_value = DEFAULT_NAMESPACE)]
    namespace: String,

    /// How to print what was done
    #[arg(short, long, default_value = "table")]
    output: output::Format,

    #[command(flatten)]
    connect: Connect,
}

/// Deletes; a hand-written file is never edited, the control plane refuses with its place.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let kind = get::written_kind(&args.kind)?;
    let (namespace, name) = args.name.split_once('/').unwrap_or((&args.namespace, &args.name));
    let object = ServiceName::parse(&format!("{namespace}/{name}"))?;
    let path = format!("/api/v1/objects/{kind}/{}/{}", encode(object.namespace.as_str()), encode(object.name.as_str()));
    let applied: Applied = args.connect.client()?.delete(&path)?;
    match args.output {
        output::Format::Json => output::json(&applied)?,
        output::Format::Table => apply::report(&applied)?,
    }
    Ok(ExitCode::SUCCESS)
}

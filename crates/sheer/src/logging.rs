//! Logging on standard error.

use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging. To be called once, before threads are started.
///
/// # Errors
/// When `filter` is no list of `LEVEL` and `TARGET=LEVEL`.
pub(crate) fn start(filter: &str, format: Format) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter).map_err(|error| {
        anyhow::anyhow!("--log {filter}: {error}; give a level (info) or targets (info,sheer_proxy=debug)")
    })?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        Format::Text => lines.with_ansi(colors()).init(),
        Format::Json => lines.json().flatten_event(true).init(),
    }
    Ok(())
}

/// Whether standard error shows colors: a terminal, and not forbidden by `NO_COLOR`.
fn colors() -> bool {
    anstream::AutoStream::choice(&std::io::stderr()) != anstream::ColorChoice::Never
}

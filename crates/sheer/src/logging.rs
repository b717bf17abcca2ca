//! Logging on standard error.

use std::sync::OnceLock;
use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What was chosen, for processes that this one starts.
static CHOSEN: OnceLock<[(&str, String); 2]> = OnceLock::new();

/// The variables by which a hidden process logs as this one does.
pub(crate) fn variables() -> impl Iterator<Item = (&'static str, String)> {
    CHOSEN.get().cloned().into_iter().flatten()
}

const FILTER: &str = "SHEER_LOG";
const FORMAT: &str = "SHEER_LOG_FORMAT";

/// Starts logging in a hidden process, as the one that started it does.
///
/// # Errors
/// As [`start`].
pub(crate) fn start_as_told() -> anyhow::Result<()> {
    let told = |name| std::env::var(name).ok();
    let format = if told(FORMAT).as_deref() == Some("json") { Format::Json } else { Format::Text };
    start(told(FILTER).as_deref().unwrap_or("warn"), format)
}

/// Starts logging. To be called once, before threads are started.
///
/// # Errors
/// When `text` is no list of `LEVEL` and `TARGET=LEVEL`.
pub(crate) fn start(text: &str, format: Format) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(text).map_err(|error| {
        anyhow::anyhow!("--log {text}: {error}; give a level (info) or targets (info,sheer_proxy=debug)")
    })?;
    let name = match format {
        Format::Text => "text",
        Format::Json => "json",
    };
    // Set before, if at all, by a second call, which the subscriber refuses below.
    let _ = CHOSEN.set([(FILTER, text.to_owned()), (FORMAT, name.to_owned())]);
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

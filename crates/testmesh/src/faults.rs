//! The account of faults: what was done, what must hold, and what was seen, a JSON line a row, for docs/reliability.md.

use anyhow::{Context, Result};
use std::fs::OpenOptions;
use std::io::Write;

/// Names the file that rows are appended to.
const REPORT: &str = "FAULTS_REPORT";

/// Whether the long forms are wanted: `make faults`.
pub fn long() -> bool {
    std::env::var_os("FAULTS_LONG").is_some()
}

/// How often something is repeated in the short and in the long form.
pub fn times(short: usize, long: usize) -> usize {
    if self::long() { long } else { short }
}

/// Notes what came of a row of the fault plan, good or bad.
///
/// # Errors
/// With what was seen when the row does not hold, or when the account cannot be written.
pub fn row(id: &str, done: &str, bar: &str, seen: Result<String>) -> Result<()> {
    let (verdict, figure) = match &seen {
        Ok(figure) => ("holds", figure.clone()),
        Err(error) => ("fails", format!("{error:#}")),
    };
    let figure: String = figure.chars().take(500).collect();
    eprintln!("{id} {verdict}: {done}: {figure}");
    if let Some(path) = std::env::var_os(REPORT) {
        let line = serde_json::json!({ "row": id, "done": done, "bar": bar, "seen": figure, "verdict": verdict });
        let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
        file.write_all(format!("{line}\n").as_bytes())?;
    }
    seen.map(drop).with_context(|| format!("{id}: {done}"))
}

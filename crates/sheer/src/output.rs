//! What commands print: tables for people, JSON and YAML for scripts, progress for what takes long.
//!
//! Results go to standard output through [`anstream`], which drops colors where nobody sees them (`NO_COLOR`, a pipe);
//! everything else goes to standard error.

use comfy_table::{Attribute, Cell, CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::path::Path;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

/// `-o` of commands that print tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// Columns for people.
    Table,
    /// JSON for scripts.
    Json,
}

/// Prints a value as indented JSON.
///
/// # Errors
/// When it has no JSON form or standard output is closed.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    print(&serde_json::to_string_pretty(value)?)
}

/// Prints a value as YAML.
///
/// # Errors
/// When it has no JSON form or standard output is closed.
pub(crate) fn yaml(value: &impl Serialize) -> anyhow::Result<()> {
    print(to_yaml(&serde_json::to_value(value)?).trim_end())
}

/// Prints text and a line end. A reader that went away (`sheer get | head`) is no error.
///
/// # Errors
/// When standard output cannot be written.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    match writeln!(anstream::stdout(), "{text}") {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(anyhow::Error::new(error).context("cannot write to standard output"))
        }
        _ => Ok(()),
    }
}

/// A table in the making. Columns are two spaces apart, without lines, so that scripts and eyes find them.
pub(crate) struct Columns {
    table: Table,
    right: Vec<bool>,
}

impl Columns {
    /// A table with these headings; one that begins with `>` is a column of figures and goes to the right.
    pub(crate) fn new(headings: &[&str]) -> Self {
        let mut table = Table::new();
        table.load_style(presets::NOTHING).enforce_styling();
        let right = headings.iter().map(|h| h.starts_with('>')).collect();
        table.set_header(headings.iter().map(|h| Cell::new(h.trim_start_matches('>')).add_attribute(Attribute::Dim)));
        Self { table, right }
    }

    /// Adds a row; an empty cell is shown as `-`.
    pub(crate) fn row<T: Into<String>>(&mut self, cells: impl IntoIterator<Item = T>) {
        let cells = cells.into_iter().map(Into::into);
        self.table.add_row(cells.map(|text| if text.is_empty() { "-".to_owned() } else { text }));
    }

    /// The text, without spaces at line ends.
    pub(crate) fn text(mut self) -> String {
        let last = self.right.len().saturating_sub(1);
        for (at, (column, right)) in self.table.column_iter_mut().zip(&self.right).enumerate() {
            column.set_padding((0, if at == last { 0 } else { 2 }));
            if *right {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        // The padding of a heading is inside its color.
        const RESET: &str = "\u{1b}[0m";
        let line = |line: &str| match line.trim_end().strip_suffix(RESET) {
            Some(text) => format!("{}{RESET}", text.trim_end()),
            None => line.trim_end().to_owned(),
        };
        self.table.lines().map(|text| line(&text)).collect::<Vec<_>>().join("\n")
    }
}

/// Bytes in three digits and a unit.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KB", "MB", "GB", "TB"];
    let (mut value, mut unit) = (count as f64, 0);
    while value >= 999.5 && unit + 1 < UNITS.len() {
        (value, unit) = (value / 1000.0, unit + 1);
    }
    if unit == 0 || value >= 9.95 { format!("{value:.0}{}", UNITS[unit]) } else { format!("{value:.1}{}", UNITS[unit]) }
}

/// A number of things, in the singular or plural.
pub(crate) fn counted(count: usize, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

/// A share as a percentage that says 100 only for all of it.
pub(crate) fn percent(share: f64) -> String {
    match share * 100.0 {
        p if share < 1.0 && p > 99.99 => "99.99%".to_owned(),
        p if (p - p.round()).abs() < 0.005 => format!("{p:.0}%"),
        p => format!("{p:.2}%"),
    }
}

/// A rate.
pub(crate) fn rate(per_second: f64) -> String {
    if per_second >= 9.95 || per_second == 0.0 { format!("{per_second:.0}") } else { format!("{per_second:.1}") }
}

/// How a person types this program here: its bare name where the search path leads to it, else a path.
pub(crate) fn typed_program() -> String {
    let Ok(program) = std::env::current_exe() else { return "sheer".to_owned() };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|directory| directory.join("sheer")).find(|it| it.is_file());
    let found = found.and_then(|found| found.canonicalize().ok());
    typed(&program, found.as_deref(), std::env::current_dir().ok().as_deref())
}

fn typed(program: &Path, found: Option<&Path>, here: Option<&Path>) -> String {
    if found == Some(program) {
        return "sheer".to_owned();
    }
    match here.and_then(|here| program.strip_prefix(here).ok()) {
        Some(below) if below.components().count() == 1 => format!("./{}", below.display()),
        Some(below) => below.display().to_string(),
        None => program.display().to_string(),
    }
}

/// A sign on standard error that something takes long: shown after two seconds, and only on a terminal.
pub(crate) struct Progress {
    done: mpsc::SyncSender<()>,
    thread: Option<JoinHandle<()>>,
}

/// How long something may take in silence.
const PATIENCE: Duration = Duration::from_secs(2);

impl Progress {
    /// Begins; it ends when the value is dropped.
    pub(crate) fn of(what: impl Into<String>) -> Self {
        let what = what.into();
        let (done, finished) = mpsc::sync_channel::<()>(1);
        let thread = std::thread::spawn(move || {
            if finished.recv_timeout(PATIENCE) != Err(mpsc::RecvTimeoutError::Timeout) {
                return;
            }
            let bar = ProgressBar::new_spinner().with_message(what);
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
                bar.set_style(style);
            }
            while finished.recv_timeout(Duration::from_millis(120)) == Err(mpsc::RecvTimeoutError::Timeout) {
                bar.tick();
            }
            bar.finish_and_clear();
        });
        Self { done, thread: Some(thread) }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        // The thread has ended when nobody receives.
        let _ = self.done.send(());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// YAML of a JSON value: block style, texts quoted where a reader could take them for something else.
fn to_yaml(value: &serde_json::Value) -> String {
    let mut text = String::new();
    write_yaml(value, 0, &mut text);
    text
}

fn write_yaml(value: &serde_json::Value, depth: usize, out: &mut String) {
    use serde_json::Value;
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(map) if !map.is_empty() => {
            for (key, value) in map {
                out.push_str(&format!("{indent}{}:", yaml_scalar(key)));
                nested_yaml(value, depth, out);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                let mut inner = String::new();
                write_yaml(item, depth + 1, &mut inner);
                out.push_str(&format!("{indent}- {}", inner.trim_start_matches(' ')));
            }
        }
        Value::Object(_) => out.push_str(&format!("{indent}{{}}\n")),
        Value::Array(_) => out.push_str(&format!("{indent}[]\n")),
        Value::String(text) => out.push_str(&format!("{indent}{}\n", yaml_scalar(text))),
        other => out.push_str(&format!("{indent}{other}\n")),
    }
}

fn nested_yaml(value: &serde_json::Value, depth: usize, out: &mut String) {
    use serde_json::Value;
    let block = match value {
        Value::Object(map) => !map.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => false,
    };
    if block {
        out.push('\n');
        write_yaml(value, depth + 1, out);
    } else {
        let mut inner = String::new();
        write_yaml(value, 0, &mut inner);
        out.push_str(&format!(" {inner}"));
    }
}

/// A YAML scalar that reads back as the same text.
pub(crate) fn yaml_scalar(value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '-' | '=' | '+');
    let word = value.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/') && value.chars().all(plain);
    let reserved = ["true", "false", "null", "yes", "no", "on", "off", "y", "n"];
    if word && !reserved.contains(&value.to_ascii_lowercase().as_str()) {
        return value.to_owned();
    }
    serde_json::Value::from(value).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short_and_honest() {
        for (count, text) in [(0, "0B"), (999, "999B"), (1000, "1.0KB"), (999_999, "1.0MB"), (12_345_678, "12MB")] {
            assert_eq!(bytes(count), text);
        }
        for (share, text) in [(1.0, "100%"), (0.999_999, "99.99%"), (0.5, "50%"), (0.987_6, "98.76%"), (0.0, "0%")] {
            assert_eq!(percent(share), text);
        }
        assert_eq!(rate(0.0), "0");
        assert_eq!(rate(0.25), "0.2");
        assert_eq!(rate(1234.5), "1234");
    }

    #[test]
    fn what_is_said_can_be_typed() {
        let (built, here) = (Path::new("/src/target/quick/sheer"), Some(Path::new("/src")));
        assert_eq!(typed(built, Some(built), here), "sheer");
        // Another sheer is in the search path, or none.
        assert_eq!(typed(built, Some(Path::new("/usr/bin/sheer")), here), "target/quick/sheer");
        assert_eq!(typed(built, None, Some(Path::new("/src/target/quick"))), "./sheer");
        assert_eq!(typed(built, None, Some(Path::new("/home"))), "/src/target/quick/sheer");
    }

    #[test]
    fn tables_line_up() {
        let mut columns = Columns::new(&["NAME", ">RPS"]);
        columns.row(["web", "12"]);
        columns.row(["a-longer-name", ""]);
        let text = anstream::adapter::strip_str(&columns.text()).to_string();
        assert_eq!(text, "NAME           RPS\nweb             12\na-longer-name    -");
    }

    #[test]
    fn yaml_reads_well() {
        let value =
            serde_json::json!({"kind": "Service", "spec": {"ports": [{"port": 80, "name": "on"}], "empty": {}}});
        assert_eq!(
            to_yaml(&value),
            "kind: Service\nspec:\n  empty: {}\n  ports:\n    - name: \"on\"\n      port: 80\n"
        );
    }
}

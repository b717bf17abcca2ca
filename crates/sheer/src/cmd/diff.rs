//! `sheer diff`: what `sheer apply` would change.

use crate::client::{Connect, show_place};
use crate::cmd::{apply, sources};
use crate::output;
use owo_colors::OwoColorize as _;
use sheer_core::api::{Action, Applied, Apply};
use std::path::PathBuf;
use std::process::ExitCode;

/// Flags of `sheer diff`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sheer diff -f canary.yaml
  sheer diff -f mesh.d/ -o json")]
pub(crate) struct Args {
    /// A file, a directory of .yaml files, or - for standard input
    #[arg(short, long, value_name = "FILE|DIR|-", required = true)]
    file: Vec<PathBuf>,

    /// How to print the differences
    #[arg(short, long, default_value = "table")]
    output: output::Format,

    #[command(flatten)]
    connect: Connect,
}

/// Shows the differences; the exit status is 0 also when there are some.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let request = Apply { files: sources::read(&args.file)?, dry_run: true };
    let applied: Applied = args.connect.client()?.post("/api/v1/apply", &request)?;
    if args.output == output::Format::Json {
        output::json(&applied)?;
        return Ok(ExitCode::SUCCESS);
    }
    for warning in &applied.warnings {
        anstream::eprintln!("{}", show_place(warning).yellow());
    }
    let mut changed = false;
    for change in applied.changes.iter().filter(|change| change.action != Action::Unchanged) {
        changed = true;
        output::print(&format!("{}", apply::subject(change).bold()))?;
        for line in lines(&change.before, &change.after) {
            output::print(&match line {
                Line::Same(text) => format!("    {text}"),
                Line::Gone(text) => format!("  - {text}").red().to_string(),
                Line::New(text) => format!("  + {text}").green().to_string(),
            })?;
        }
    }
    if !changed {
        anstream::eprintln!("nothing would change");
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    Same(&'a str),
    Gone(&'a str),
    New(&'a str),
}

/// Above this many lines a side, the middle is shown as wholly replaced: the table below grows with their product.
const MAX_LINES: usize = 2000;

/// The shortest edit script by longest common subsequence of lines.
fn lines<'a>(before: &'a str, after: &'a str) -> Vec<Line<'a>> {
    let (old, new): (Vec<&str>, Vec<&str>) = (before.lines().collect(), after.lines().collect());
    let front = old.iter().zip(&new).take_while(|(a, b)| a == b).count();
    let back = old[front..].iter().rev().zip(new[front..].iter().rev()).take_while(|(a, b)| a == b).count();
    let (a, b) = (&old[front..old.len() - back], &new[front..new.len() - back]);
    let mut script: Vec<Line<'_>> = old[..front].iter().map(|text| Line::Same(text)).collect();
    if a.len() > MAX_LINES || b.len() > MAX_LINES {
        script.extend(a.iter().map(|text| Line::Gone(text)));
        script.extend(b.iter().map(|text| Line::New(text)));
    } else {
        script.extend(middle(a, b));
    }
    script.extend(old[old.len() - back..].iter().map(|text| Line::Same(text)));
    script
}

fn middle<'a>(a: &[&'a str], b: &[&'a str]) -> Vec<Line<'a>> {
    // common[i][j]: length of the longest common subsequence of a[i..] and b[j..].
    let mut common = vec![vec![0usize; b.len() + 1]; a.len() + 1];
    for i in (0..a.len()).rev() {
        for j in (0..b.len()).rev() {
            common[i][j] = if a[i] == b[j] { common[i + 1][j + 1] + 1 } else { common[i + 1][j].max(common[i][j + 1]) };
        }
    }
    let (mut i, mut j, mut script) = (0, 0, Vec::new());
    while i < a.len() || j < b.len() {
        if i < a.len() && j < b.len() && a[i] == b[j] {
            script.push(Line::Same(a[i]));
            (i, j) = (i + 1, j + 1);
        } else if j == b.len() || (i < a.len() && common[i + 1][j] >= common[i][j + 1]) {
            script.push(Line::Gone(a[i]));
            i += 1;
        } else {
            script.push(Line::New(b[j]));
            j += 1;
        }
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_what_differs() {
        use Line::{Gone, New, Same};
        assert_eq!(lines("a\nb\nc", "a\nx\nc"), [Same("a"), Gone("b"), New("x"), Same("c")]);
        assert_eq!(lines("", "a\nb"), [New("a"), New("b")]);
        assert_eq!(lines("a", ""), [Gone("a")]);
        assert_eq!(lines("a\nb\na", "a\na"), [Same("a"), Gone("b"), Same("a")]);
        assert_eq!(lines("a\nb", "a\nb"), [Same("a"), Same("b")]);
    }
}

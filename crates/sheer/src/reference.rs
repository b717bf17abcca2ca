//! The written reference of the command line, `docs/cli.md`, made of the same tree that parses it.
//!
//! `UPDATE_DOCS=1 cargo test -p sheer reference` rewrites the page; without it the test compares.

use crate::cli::Cli;
use crate::settings::{self, variable_name};
use clap::{Arg, ArgAction, Command, CommandFactory as _};
use std::ffi::OsString;
use std::path::PathBuf;

const HEAD: &str = "# The command line

<!-- Made from the command tree: UPDATE_DOCS=1 cargo test -p sheer reference -->

Every flag is also a variable and a key of the YAML file named by `--settings` (or `SHEER_SETTINGS`): `--join-token-file F`
is `SHEER_JOIN_TOKEN_FILE=F` is `join-token-file: F`. The command line wins over the variable, the variable over the file,
the file over the default; `--print-settings` shows what is in force and where it came from, as YAML that `--settings`
reads back. A flag that may be repeated takes a list in the file and commas in the variable; a `K=V` flag also takes a
mapping; a switch takes `true` or `false`. An unknown key is an error with its line; an unknown `SHEER_*` variable is told.

Exit status: 0 on success and only then, 1 when a command failed, 2 when its command line is wrong; `sheer run` and
`sheer exec` end with the status of their command, or 128 and the number of the signal that ended it. Results go to
standard output, everything else to standard error. `NO_COLOR` is respected.
";

fn page() -> String {
    let mut root = Cli::command();
    root.build();
    let mut text = HEAD.to_owned();
    text.push_str("\n## Flags of every command\n\n");
    text.push_str(&flags(root.get_arguments().filter(|arg| arg.is_global_set())));
    for command in root.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help") {
        section(command, "sheer", &mut text);
    }
    text
}

fn section(command: &Command, above: &str, text: &mut String) {
    let name = format!("{above} {}", command.get_name());
    let about = command.get_long_about().or(command.get_about()).map(ToString::to_string).unwrap_or_default();
    let below: Vec<&Command> =
        command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help").collect();
    let own = || command.get_arguments().filter(|arg| !arg.is_global_set() && !arg.is_hide_set());
    text.push_str(&format!("\n## {name}\n\n{}\n", sentence(&about)));
    if below.is_empty() || own().any(|arg| arg.get_id() != "help") {
        let usage = command.clone().render_usage().to_string();
        let usage = usage.trim_start_matches("Usage: ").lines().map(str::trim).collect::<Vec<_>>().join("\n");
        text.push_str(&format!("\n```text\n{usage}\n```\n"));
    }
    let table = flags(own().filter(|arg| !matches!(arg.get_id().as_str(), "help" | "version")));
    if !table.is_empty() {
        text.push_str(&format!("\n{table}"));
    }
    if let Some(after) = command.get_after_help() {
        let after = after.to_string();
        let (title, examples) = after.split_once('\n').unwrap_or(("", &after));
        text.push_str(&format!("\n{title}\n\n```sh\n"));
        for line in examples.lines() {
            text.push_str(line.strip_prefix("  ").unwrap_or(line));
            text.push('\n');
        }
        text.push_str("```\n");
    }
    for command in below {
        section(command, &name, text);
    }
}

fn flags<'a>(arguments: impl Iterator<Item = &'a Arg>) -> String {
    let rows: Vec<String> = arguments.filter(|arg| !arg.is_hide_set()).map(row).collect();
    if rows.is_empty() {
        return String::new();
    }
    format!("| Flag | Default | Meaning |\n|---|---|---|\n{}", rows.concat())
}

fn row(arg: &Arg) -> String {
    let placeholder = arg.get_value_names().unwrap_or_default().iter().map(ToString::to_string).collect::<Vec<_>>();
    let possible: Vec<String> = match arg.get_action() {
        ArgAction::Set | ArgAction::Append => {
            arg.get_possible_values().iter().filter(|v| !v.is_hide_set()).map(|v| v.get_name().to_owned()).collect()
        }
        _ => Vec::new(),
    };
    let value = if possible.is_empty() { placeholder.join(" ") } else { possible.join("|") };
    let mut name = match (arg.get_short(), arg.get_long()) {
        (Some(short), Some(long)) => format!("-{short}, --{long}"),
        (None, Some(long)) => format!("--{long}"),
        _ => String::new(),
    };
    if arg.get_action().takes_values() {
        name = format!("{name} {value}").trim().to_owned();
    }
    if matches!(arg.get_action(), ArgAction::Append) {
        name.push_str(" ...");
    }
    let default = defaults(arg).map(|value| format!("`{value}`")).unwrap_or_default();
    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    format!("| `{}` | {default} | {} |\n", name.replace('|', "\\|"), sentence(&help.replace('|', "\\|")))
}

fn defaults(arg: &Arg) -> Option<String> {
    let values: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
    (arg.get_action().takes_values() && !values.is_empty()).then(|| values.join(","))
}

fn sentence(text: &str) -> String {
    let text = text.replace('\n', " ");
    let text = text.trim();
    if text.is_empty() || text.ends_with(['.', ']', ':']) { text.to_owned() } else { format!("{text}.") }
}

fn docs(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs").join(name)
}

fn leaves(command: &Command, path: &str, found: &mut Vec<(String, Command)>) {
    for below in command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help") {
        let path = format!("{path} {}", below.get_name());
        found.push((path.clone(), below.clone()));
        leaves(below, &path, found);
    }
}

/// Every visible command with its full name.
fn commands() -> Vec<(String, Command)> {
    let mut root = Cli::command();
    root.build();
    let mut found = Vec::new();
    leaves(&root, "sheer", &mut found);
    found
}

#[test]
fn the_page_is_the_tree() {
    let path = docs("cli.md");
    let page = page();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, &page).expect("docs/cli.md can be written");
    }
    let found = std::fs::read_to_string(&path).expect("docs/cli.md");
    assert!(
        found == page,
        "docs/cli.md differs from the command tree: run UPDATE_DOCS=1 cargo test -p sheer reference"
    );
}

#[test]
fn the_tree_is_sound_and_explained() {
    Cli::command().debug_assert();
    for (path, command) in commands() {
        assert!(command.get_about().is_some(), "{path} says nothing of itself");
        let group = command.get_subcommands().any(|c| c.get_name() != "help");
        assert!(group || command.get_after_help().is_some(), "{path} --help has no example");
        for arg in command.get_arguments().filter(|arg| !arg.is_hide_set()) {
            assert!(arg.get_help().is_some(), "{path}: {} says nothing of itself", arg.get_id());
        }
    }
}

/// The command lines in the examples of all help texts; what a shell would take away is taken away.
fn examples() -> Vec<String> {
    let mut root = Cli::command();
    root.build();
    let texts = commands().into_iter().map(|(_, command)| command).chain([root]);
    let helps: Vec<String> = texts.filter_map(|c| c.get_after_help().map(ToString::to_string)).collect();
    let lines = helps.iter().flat_map(|help| help.lines());
    let commands = lines.filter_map(|line| line.split(" # ").next()?.split_once("sheer ").map(|(_, rest)| rest));
    commands.map(|rest| rest.split([';', '>', '|', '&', ')']).next().unwrap_or(rest).trim().to_owned()).collect()
}

#[test]
fn examples_parse() {
    let examples = examples();
    assert!(examples.len() > 10);
    for example in examples {
        let argv: Vec<OsString> =
            std::iter::once("sheer").chain(example.split_whitespace()).map(OsString::from).collect();
        if let Err(settings::Refusal::Usage(error)) = settings::resolve(&Cli::command(), &argv, &[]) {
            panic!("sheer {example}\n{error}");
        }
    }
}

/// Flags that only choose how to print or log: their defaults need no reason.
const OF_TASTE: &[&str] = &["output", "log-format"];

#[test]
fn every_default_has_its_reason() {
    let page = std::fs::read_to_string(docs("defaults.md")).expect("docs/defaults.md");
    let mut missing = Vec::new();
    let mut root = Cli::command();
    root.build();
    for (path, command) in commands().into_iter().chain([("sheer".to_owned(), root)]) {
        for arg in command.get_arguments().filter(|arg| !arg.is_hide_set() && (path == "sheer" || !arg.is_global_set()))
        {
            let (Some(long), Some(default)) = (arg.get_long(), defaults(arg)) else { continue };
            let row = format!("| `{path} --{long}` | `{default}` | ");
            let reason = page.lines().any(|line| line.strip_prefix(&row).is_some_and(|rest| rest.len() > 4));
            if !reason && !OF_TASTE.contains(&long) {
                missing.push(format!("{row}REASON |"));
            }
        }
    }
    assert!(missing.is_empty(), "docs/defaults.md lacks, or gives another default for:\n{}", missing.join("\n"));
}

#[test]
fn no_default_is_written_of_a_flag_that_is_not() {
    let page = std::fs::read_to_string(docs("defaults.md")).expect("docs/defaults.md");
    let known: Vec<String> = commands()
        .iter()
        .flat_map(|(path, command)| {
            command.get_arguments().filter_map(move |arg| Some(format!("{path} --{}", arg.get_long()?)))
        })
        .chain(Cli::command().get_arguments().filter_map(|arg| Some(format!("sheer --{}", arg.get_long()?))))
        .collect();
    for line in page.lines().filter_map(|line| line.strip_prefix("| `sheer ")) {
        let name = format!("sheer {}", line.split('`').next().unwrap_or_default());
        assert!(known.contains(&name), "docs/defaults.md: there is no {name}");
    }
}

#[test]
fn variables_are_unique() {
    let mut names: Vec<String> = commands()
        .iter()
        .flat_map(|(_, command)| {
            command.get_arguments().filter_map(|arg| arg.get_long().map(str::to_owned)).collect::<Vec<_>>()
        })
        .collect();
    names.sort();
    names.dedup();
    let mut variables: Vec<String> = names.iter().map(|name| variable_name(name)).collect();
    variables.sort();
    variables.dedup();
    assert_eq!(variables.len(), names.len());
}

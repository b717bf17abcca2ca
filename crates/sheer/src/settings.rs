//! Settings: every flag is also a key of a YAML settings file and a `SHEER_*` variable.
//!
//! One mechanism serves all commands. The command line is read once leniently, to learn the command and what was given;
//! flags that were not given are looked up as variables, then in the file of `--settings`, and inserted into the command
//! line; that is then parsed as if a person had typed it. So every value is checked by the same parser, and a command's
//! own code knows nothing of where a value came from.
//!
//! Precedence: flag, variable, file, default. Names: `--join-token-file`, `SHEER_JOIN_TOKEN_FILE`, `join-token-file`.

use anyhow::{Context as _, bail};
use clap::error::{ContextKind, ContextValue};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use saphyr_parser::{Event, Parser, ScalarStyle};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};

/// Positional arguments that may also be set by file or variable.
const POSITIONAL_SETTINGS: &[&str] = &["service"];

/// Flags that say where settings come from, or only print, and so are no settings.
const NOT_SETTINGS: &[&str] = &["settings", "print-settings", "help", "version"];

/// Variables with our prefix that are no flags: of the protocol between our own processes, the settings file, and the
/// binary under test.
const INTERNAL_VARIABLES: &[&str] = &["SHEER_PLAN_FD", "SHEER_SETTINGS", "SHEER_BIN"];

/// More than any settings file needs, so that a wrong path cannot fill the memory.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// A parsed command line with all settings in it.
pub(crate) struct Resolved {
    /// For [`clap::FromArgMatches`].
    pub(crate) matches: ArgMatches,
    /// Things to tell before the command runs, such as a variable that names no setting.
    pub(crate) warnings: Vec<String>,
}

/// What came of a command line.
pub(crate) enum Outcome {
    /// The command can run.
    Run(Resolved),
    /// `--print-settings` was given: the text to print.
    Print(String),
}

/// Why a command line does not parse.
pub(crate) enum Refusal {
    /// clap's own message (also `--help` and `--version`), with origins added.
    Usage(Box<clap::Error>),
    /// A settings file or variable is wrong.
    Settings(anyhow::Error),
}

impl From<clap::Error> for Refusal {
    fn from(error: clap::Error) -> Self {
        Self::Usage(Box::new(error))
    }
}

impl From<anyhow::Error> for Refusal {
    fn from(error: anyhow::Error) -> Self {
        Self::Settings(error)
    }
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Origin {
    Flag,
    Variable(String),
    File(PathBuf, usize),
    Default,
    Unset,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag => f.write_str("flag"),
            Self::Variable(name) => f.write_str(name),
            Self::File(path, line) => write!(f, "{}:{line}", path.display()),
            Self::Default => f.write_str("default"),
            Self::Unset => f.write_str("not set"),
        }
    }
}

/// A value that a variable or the file gives to an argument that the command line does not.
struct Supplied {
    name: String,
    values: Vec<OsString>,
    origin: Origin,
}

/// Reads `argv` for the command tree `root`, completing it from `variables` and the settings file.
pub(crate) fn resolve(root: &Command, argv: &[OsString], variables: &[(String, OsString)]) -> Result<Outcome, Refusal> {
    let mut relaxed = relax(root.clone());
    let given = match relaxed.try_get_matches_from_mut(argv) {
        Ok(matches) => matches,
        // The strict tree explains it with the usage that people should see.
        Err(lenient) => {
            let strict = root.clone().try_get_matches_from(argv).err().unwrap_or(lenient);
            return Err(suggest(strict, root).into());
        }
    };
    let (path, matches) = subcommand_path(&given);
    let arguments = arguments_of(root, &path);

    let lookup: BTreeMap<&str, &OsStr> =
        variables.iter().filter(|(_, v)| !v.is_empty()).map(|(k, v)| (k.as_str(), v.as_os_str())).collect();
    let file = match matches.get_one::<PathBuf>("settings") {
        Some(path) => Some(File::read(path)?),
        None => lookup.get("SHEER_SETTINGS").map(|path| File::read(Path::new(path))).transpose()?,
    };
    let known = known_names(root);
    if let Some(file) = &file {
        file.refuse_unknown(&known)?;
    }
    let supplied = supplied(&arguments, matches, &lookup, file.as_ref())?;
    let warnings = unknown_variables(variables, &known);

    let mut completed = argv.to_vec();
    let at = after_subcommands(root, argv, &path);
    completed.splice(at..at, inject(&arguments, &supplied));

    let print = matches.get_flag("print-settings");
    let parser = if print { &mut relaxed } else { &mut root.clone() };
    let parsed = parser.try_get_matches_from_mut(&completed).map_err(|error| annotate(error, &supplied))?;
    if print {
        let (_, matches) = subcommand_path(&parsed);
        return Ok(Outcome::Print(print_settings(&path, &arguments, matches, &supplied)));
    }
    Ok(Outcome::Run(Resolved { matches: parsed, warnings }))
}

/// The variable that sets the flag `name`.
pub(crate) fn variable_name(name: &str) -> String {
    format!("SHEER_{}", name.replace('-', "_").to_ascii_uppercase())
}

/// The same tree with nothing required, for a first look at what was given.
fn relax(command: Command) -> Command {
    command.mut_args(|arg| arg.required(false)).mut_subcommands(relax)
}

fn subcommand_path(matches: &ArgMatches) -> (Vec<String>, &ArgMatches) {
    let (mut path, mut at) = (Vec::new(), matches);
    while let Some((name, below)) = at.subcommand() {
        path.push(name.to_owned());
        at = below;
    }
    (path, at)
}

/// The arguments of the command at `path` that can be settings: its own, and the global ones above it.
fn arguments_of<'a>(root: &'a Command, path: &[String]) -> Vec<&'a Arg> {
    let mut commands = vec![root];
    for name in path {
        if let Some(below) = commands[commands.len() - 1].find_subcommand(name) {
            commands.push(below);
        }
    }
    let deepest = commands.len() - 1;
    let mut arguments: Vec<&Arg> = Vec::new();
    for (level, command) in commands.iter().enumerate().rev() {
        arguments
            .extend(command.get_arguments().filter(|arg| (level == deepest || arg.is_global_set()) && is_setting(arg)));
    }
    arguments
}

fn is_setting(arg: &Arg) -> bool {
    match arg.get_long() {
        Some(long) => !NOT_SETTINGS.contains(&long),
        None => POSITIONAL_SETTINGS.contains(&arg.get_id().as_str()),
    }
}

fn name_of(arg: &Arg) -> &str {
    arg.get_long().unwrap_or(arg.get_id().as_str())
}

fn is_switch(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::SetTrue)
}

fn is_list(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Append)
}

/// The names of all settings of all commands, so that one file or environment may serve several of them.
fn known_names(root: &Command) -> Vec<String> {
    let mut names: Vec<String> =
        root.get_arguments().filter(|a| is_setting(a)).map(|a| name_of(a).to_owned()).collect();
    for below in root.get_subcommands() {
        names.extend(known_names(below));
    }
    names.sort();
    names.dedup();
    names
}

fn supplied(
    arguments: &[&Arg],
    matches: &ArgMatches,
    variables: &BTreeMap<&str, &OsStr>,
    file: Option<&File>,
) -> anyhow::Result<Vec<Supplied>> {
    let mut found = Vec::new();
    for arg in arguments {
        if matches.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine) {
            continue;
        }
        let name = name_of(arg).to_owned();
        let variable = variable_name(&name);
        if let Some(text) = variables.get(variable.as_str()) {
            let values = variable_values(arg, text);
            found.push(Supplied { name, values, origin: Origin::Variable(variable) });
        } else if let Some((file, entry)) = file.and_then(|f| f.entries.get(&name).map(|e| (f, e))) {
            let origin = Origin::File(file.path.clone(), entry.line);
            if entry.values.len() > 1 && !is_list(arg) {
                bail!("{origin}: '{name}' takes one value, here are {}", entry.values.len());
            }
            found.push(Supplied { name, values: entry.values.iter().map(OsString::from).collect(), origin });
        }
    }
    for Supplied { name, values, origin } in &found {
        let switch = arguments.iter().any(|a| name_of(a) == name && is_switch(a));
        if switch && !values.iter().all(|v| as_bool(v).is_some()) {
            let value = values.first().map(|v| v.to_string_lossy().into_owned()).unwrap_or_default();
            bail!("{origin}: '{name}' is true or false, not '{value}'");
        }
    }
    Ok(found)
}

/// A variable holds the values of a repeatable flag separated by commas.
fn variable_values(arg: &Arg, text: &OsStr) -> Vec<OsString> {
    match text.to_str() {
        Some(text) if is_list(arg) => {
            text.split(',').map(str::trim).filter(|v| !v.is_empty()).map(OsString::from).collect()
        }
        _ => vec![text.to_owned()],
    }
}

fn as_bool(value: &OsStr) -> Option<bool> {
    match value.to_str()? {
        "true" | "1" => Some(true),
        "false" | "0" => Some(false),
        _ => None,
    }
}

/// The supplied values as command line arguments.
fn inject(arguments: &[&Arg], supplied: &[Supplied]) -> Vec<OsString> {
    let mut tokens = Vec::new();
    let mut positional = Vec::new();
    for Supplied { name, values, .. } in supplied {
        let Some(arg) = arguments.iter().find(|a| name_of(a) == name) else { continue };
        for value in values {
            if arg.is_positional() {
                positional.push(value.clone());
            } else if !is_switch(arg) {
                let mut token = OsString::from(format!("--{name}="));
                token.push(value);
                tokens.push(token);
            } else if as_bool(value) == Some(true) {
                tokens.push(format!("--{name}").into());
            }
        }
    }
    tokens.extend(positional);
    tokens
}

/// The index in `argv` behind the last name of `path`.
fn after_subcommands(root: &Command, argv: &[OsString], path: &[String]) -> usize {
    let mut at = 1;
    let mut chain = vec![root];
    for name in path {
        while let Some(token) = argv.get(at).map(|t| t.to_string_lossy()) {
            at += 1;
            if !token.starts_with('-') {
                break;
            }
            let takes_next = chain.iter().flat_map(|c| c.get_arguments()).any(|arg| {
                let named = arg.get_long().is_some_and(|long| token == format!("--{long}"))
                    || arg.get_short().is_some_and(|short| token == format!("-{short}"));
                named && arg.get_action().takes_values()
            });
            at += usize::from(takes_next);
        }
        if let Some(below) = chain[chain.len() - 1].find_subcommand(name) {
            chain.push(below);
        }
    }
    at.min(argv.len())
}

/// Names the command that was meant, also where letters changed places, which clap's own measure misses.
fn suggest(mut error: clap::Error, root: &Command) -> clap::Error {
    if let (Some(ContextValue::String(given)), None) =
        (error.get(ContextKind::InvalidSubcommand), error.get(ContextKind::SuggestedSubcommand))
        && let Some(meant) = nearest(given, root.get_subcommands().map(Command::get_name))
    {
        let meant = ContextValue::Strings(vec![meant.to_owned()]);
        error.insert(ContextKind::SuggestedSubcommand, meant);
    }
    error
}

/// Says in a usage error about a supplied value where that came from.
fn annotate(mut error: clap::Error, supplied: &[Supplied]) -> clap::Error {
    let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg) else { return error };
    let long = argument.trim_start_matches("--").split([' ', '=']).next().unwrap_or_default();
    let Some(found) = supplied.iter().find(|s| s.name == long) else { return error };
    let argument = format!("{argument} (from {})", found.origin);
    error.insert(ContextKind::InvalidArg, ContextValue::String(argument));
    error
}

fn unknown_variables(variables: &[(String, OsString)], known: &[String]) -> Vec<String> {
    let names: Vec<String> = known.iter().map(|n| variable_name(n)).collect();
    let unknown = variables.iter().map(|(name, _)| name.as_str()).filter(|name| {
        name.starts_with("SHEER_") && !INTERNAL_VARIABLES.contains(name) && !names.iter().any(|n| n == name)
    });
    unknown
        .map(|name| match nearest(name, names.iter().map(String::as_str)) {
            Some(meant) => format!("the variable {name} sets nothing; did you mean {meant}?"),
            None => format!("the variable {name} sets nothing: there is no such flag"),
        })
        .collect()
}

fn nearest<'a>(text: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .map(|candidate| (strsim::damerau_levenshtein(text, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= candidate.len().min(text.len()) / 3)
        .min()
        .map(|(_, candidate)| candidate)
}

/// The effective settings as YAML that `--settings` reads back, with each origin as a comment.
fn print_settings(path: &[String], arguments: &[&Arg], matches: &ArgMatches, supplied: &[Supplied]) -> String {
    let lines: Vec<(String, Origin)> = arguments
        .iter()
        .filter(|arg| !arg.is_hide_set())
        .map(|arg| {
            let (name, id) = (name_of(arg), arg.get_id().as_str());
            let origin = match (supplied.iter().find(|s| s.name == name), matches.value_source(id)) {
                (Some(found), _) => found.origin.clone(),
                (None, Some(ValueSource::CommandLine)) => Origin::Flag,
                (None, Some(_)) => Origin::Default,
                (None, None) => Origin::Unset,
            };
            let raw: Vec<String> = if is_switch(arg) {
                vec![matches.get_flag(id).to_string()]
            } else {
                matches.get_raw(id).into_iter().flatten().map(|v| quote(&v.to_string_lossy())).collect()
            };
            let line = match (origin == Origin::Unset, is_list(arg)) {
                (true, _) => format!("# {name}:"),
                (false, true) => format!("{name}: [{}]", raw.join(", ")),
                (false, false) => format!("{name}: {}", raw.join(" ")),
            };
            (line, origin)
        })
        .collect();
    let width = lines.iter().map(|(line, _)| line.chars().count()).max().unwrap_or(0).min(60);
    let mut text = format!("# settings of 'sheer {}'\n", path.join(" "));
    for (line, origin) in lines {
        text.push_str(&format!("{line:width$}  # {origin}\n"));
    }
    text
}

/// A YAML scalar that reads back as the same text.
fn quote(value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '-' | '=' | '+');
    let first = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.');
    if value.starts_with(first) && value.chars().all(plain) {
        return value.to_owned();
    }
    serde_json::Value::from(value).to_string()
}

/// A settings file.
struct File {
    path: PathBuf,
    entries: BTreeMap<String, Entry>,
}

struct Entry {
    line: usize,
    values: Vec<String>,
}

impl File {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let describe = || format!("cannot read the settings file {}", path.display());
        let size = std::fs::metadata(path).with_context(describe)?.len();
        if size > MAX_FILE_BYTES {
            bail!("{} has {size} bytes: too large for a settings file (1 MiB at most)", path.display());
        }
        Self::parse(path, &std::fs::read_to_string(path).with_context(describe)?)
    }

    fn parse(path: &Path, text: &str) -> anyhow::Result<Self> {
        let mut reader = Reader { path, events: Parser::new_from_str(text) };
        let entries = reader.document()?;
        Ok(Self { path: path.to_owned(), entries })
    }

    fn refuse_unknown(&self, known: &[String]) -> anyhow::Result<()> {
        let problems: Vec<String> = self
            .entries
            .iter()
            .filter(|(name, _)| !known.contains(name))
            .map(|(name, entry)| {
                let place = format!("{}:{}", self.path.display(), entry.line);
                match nearest(name, known.iter().map(String::as_str)) {
                    Some(meant) => format!("{place}: '{name}' is no setting; did you mean '{meant}'?"),
                    None => format!("{place}: '{name}' is no setting; each has the name of a flag (see --help)"),
                }
            })
            .collect();
        if problems.is_empty() { Ok(()) } else { bail!(problems.join("\n")) }
    }
}

/// Reads the small part of YAML that settings need: one mapping of names to scalars, lists of scalars, or for `K=V`
/// flags mappings of scalars.
struct Reader<'a> {
    path: &'a Path,
    events: Parser<'a, saphyr_parser::StrInput<'a>>,
}

impl<'a> Reader<'a> {
    fn document(&mut self) -> anyhow::Result<BTreeMap<String, Entry>> {
        let mut entries = BTreeMap::new();
        loop {
            match self.next()? {
                (Event::StreamStart | Event::DocumentStart(_) | Event::DocumentEnd | Event::Nothing, _) => {}
                (Event::StreamEnd, _) => return Ok(entries),
                (Event::MappingStart(..), _) if entries.is_empty() => self.settings(&mut entries)?,
                // An empty document, or one of comments alone.
                (Event::Scalar(text, ScalarStyle::Plain, ..), _) if text.is_empty() || text == "~" => {}
                (_, line) => bail!(self.at(line, "expected one mapping of settings, such as 'capture: netns'")),
            }
        }
    }

    fn settings(&mut self, entries: &mut BTreeMap<String, Entry>) -> anyhow::Result<()> {
        loop {
            let (name, line) = match self.next()? {
                (Event::MappingEnd, _) => return Ok(()),
                (Event::Scalar(name, ..), line) => (name.into_owned(), line),
                (_, line) => bail!(self.at(line, "expected the name of a setting")),
            };
            let values = match self.next()? {
                (Event::Scalar(text, style, ..), line) => vec![self.scalar(&name, &text, style, line)?],
                (Event::SequenceStart(..), _) => self.list(&name)?,
                (Event::MappingStart(..), _) => self.pairs(&name)?,
                (_, line) => bail!(self.at(line, &format!("'{name}' needs a value or a list of values"))),
            };
            if let Some(before) = entries.insert(name.clone(), Entry { line, values }) {
                bail!(self.at(line, &format!("'{name}' is already set in line {}", before.line)));
            }
        }
    }

    fn list(&mut self, name: &str) -> anyhow::Result<Vec<String>> {
        let mut values = Vec::new();
        loop {
            match self.next()? {
                (Event::SequenceEnd, _) => return Ok(values),
                (Event::Scalar(text, style, ..), line) => values.push(self.scalar(name, &text, style, line)?),
                (_, line) => bail!(self.at(line, &format!("'{name}' is a list of plain values"))),
            }
        }
    }

    fn pairs(&mut self, name: &str) -> anyhow::Result<Vec<String>> {
        let mut values = Vec::new();
        loop {
            let key = match self.next()? {
                (Event::MappingEnd, _) => return Ok(values),
                (Event::Scalar(key, ..), _) => key.into_owned(),
                (_, line) => bail!(self.at(line, &format!("'{name}' maps plain names to plain values"))),
            };
            match self.next()? {
                (Event::Scalar(text, ..), _) => values.push(format!("{key}={text}")),
                (_, line) => bail!(self.at(line, &format!("'{name}' maps plain names to plain values"))),
            }
        }
    }

    fn scalar(&self, name: &str, text: &str, style: ScalarStyle, line: usize) -> anyhow::Result<String> {
        if style == ScalarStyle::Plain && matches!(text, "" | "~" | "null") {
            bail!(self.at(line, &format!("'{name}' has no value; remove the line to use the default")));
        }
        Ok(text.to_owned())
    }

    fn next(&mut self) -> anyhow::Result<(Event<'a>, usize)> {
        match self.events.next() {
            Some(Ok((event, span))) => Ok((event, span.start.line())),
            Some(Err(error)) => bail!(self.at(error.marker().line(), error.info())),
            None => Ok((Event::StreamEnd, 0)),
        }
    }

    fn at(&self, line: usize, what: &str) -> String {
        format!("{}:{line}: {what}", self.path.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn tree() -> Command {
        let global = [
            Arg::new("settings").long("settings").global(true).value_parser(clap::value_parser!(PathBuf)),
            Arg::new("print").id("print-settings").long("print-settings").global(true).action(ArgAction::SetTrue),
        ];
        Command::new("sheer").args(global).subcommand_required(true).subcommand(
            Command::new("run")
                .arg(Arg::new("service").required(true))
                .arg(Arg::new("port").long("port").action(ArgAction::Append).value_parser(clap::value_parser!(u16)))
                .arg(Arg::new("label").long("label").action(ArgAction::Append))
                .arg(Arg::new("capture").long("capture").default_value("auto").value_parser(["auto", "netns"]))
                .arg(Arg::new("access-log").long("access-log").action(ArgAction::SetTrue))
                .arg(Arg::new("user").long("user"))
                .arg(Arg::new("command").num_args(1..).last(true).required(true)),
        )
    }

    fn run(line: &str, variables: &[(&str, &str)]) -> Result<ArgMatches, String> {
        let argv: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        let variables: Vec<_> = variables.iter().map(|(k, v)| ((*k).to_owned(), OsString::from(v))).collect();
        match resolve(&tree(), &argv, &variables) {
            Ok(Outcome::Run(resolved)) => Ok(resolved.matches.subcommand().expect("a command").1.clone()),
            Ok(Outcome::Print(text)) => Err(text),
            Err(Refusal::Usage(error)) => Err(error.to_string()),
            Err(Refusal::Settings(error)) => Err(error.to_string()),
        }
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(text.as_bytes()).expect("written");
        file
    }

    fn ports(matches: &ArgMatches) -> Vec<u16> {
        matches.get_many("port").into_iter().flatten().copied().collect()
    }

    #[test]
    fn flag_before_variable_before_file_before_default() {
        let file = file("port: [1, 2]\ncapture: netns\nlabel: {tier: front}\naccess-log: true\n");
        let path = file.path().display();
        let plain = run(&format!("sheer --settings {path} run web -- true"), &[]).expect("parses");
        assert_eq!(ports(&plain), [1, 2]);
        assert_eq!(plain.get_one::<String>("capture").map(String::as_str), Some("netns"));
        assert_eq!(plain.get_one::<String>("label").map(String::as_str), Some("tier=front"));
        assert!(plain.get_flag("access-log"));
        let variable = run(
            &format!("sheer run web --settings {path} -- true"),
            &[("SHEER_PORT", "3, 4"), ("SHEER_ACCESS_LOG", "false")],
        );
        let variable = variable.expect("parses");
        assert_eq!(ports(&variable), [3, 4]);
        assert!(!variable.get_flag("access-log"));
        let flag = run(&format!("sheer run web --settings={path} --port 5 -- true"), &[("SHEER_PORT", "3")]);
        assert_eq!(ports(&flag.expect("parses")), [5]);
        let none = run("sheer run web -- true", &[("SHEER_PORT", "")]).expect("parses");
        assert_eq!(none.get_one::<String>("capture").map(String::as_str), Some("auto"));
    }

    #[test]
    fn the_service_can_be_a_setting() {
        let matches = run("sheer run -- true", &[("SHEER_SERVICE", "shop/web")]).expect("parses");
        assert_eq!(matches.get_one::<String>("service").map(String::as_str), Some("shop/web"));
        let given = run("sheer run api -- true", &[("SHEER_SERVICE", "shop/web")]).expect("parses");
        assert_eq!(given.get_one::<String>("service").map(String::as_str), Some("api"));
    }

    #[test]
    fn wrong_values_name_their_origin() {
        let error = run("sheer run web -- true", &[("SHEER_PORT", "eighty")]).unwrap_err();
        assert!(error.contains("from SHEER_PORT") && error.contains("eighty"), "{error}");
        let file = file("\nport: 99999\n");
        let error = run(&format!("sheer run web --settings {} -- true", file.path().display()), &[]).unwrap_err();
        assert!(error.contains(&format!("{}:2", file.path().display())), "{error}");
    }

    #[test]
    fn wrong_files_name_the_line() {
        for (text, expected) in [
            ("prot: 80\n", ":1: 'prot' is no setting; did you mean 'port'?"),
            ("port: 80\nport: 81\n", ":2: 'port' is already set in line 1"),
            ("port:\n", ":1: 'port' has no value"),
            ("- port\n", ":1: expected one mapping"),
            ("user: [a, b]\n", ":1: 'user' takes one value"),
            ("access-log: yes\n", ":1: 'access-log' is true or false, not 'yes'"),
            ("port: [[1]]\n", ":1: 'port' is a list of plain values"),
            ("port: [1\n", ":2: "),
            ("port: *a\n", ":1: "),
        ] {
            let file = file(text);
            let error = run(&format!("sheer run web --settings {} -- true", file.path().display()), &[]).unwrap_err();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
        let empty = file("# nothing\n");
        assert!(run(&format!("sheer run web --settings {} -- true", empty.path().display()), &[]).is_ok());
        let error = run("sheer run web --settings /nonexistent/x.yaml -- true", &[]).unwrap_err();
        assert!(error.contains("cannot read the settings file /nonexistent/x.yaml"), "{error}");
    }

    #[test]
    fn what_is_required_stays_required() {
        let error = run("sheer run", &[]).unwrap_err();
        assert!(error.contains("required"), "{error}");
    }

    #[test]
    fn printed_settings_read_back() {
        let first = file("port: [80, 81]\n");
        let line = format!("sheer run --settings {} --capture netns --print-settings", first.path().display());
        let text = run(&line, &[("SHEER_USER", "a: b")]).unwrap_err();
        for expected in ["port: [80, 81]", ":1", "# flag", "user: \"a: b\"", "# SHEER_USER", "# service:", "# not set"]
        {
            assert!(text.contains(expected), "{expected} in {text}");
        }
        let second = file(&text);
        let again = run(&format!("sheer run --settings {} web -- true", second.path().display()), &[]).expect("parses");
        assert_eq!(ports(&again), [80, 81]);
        assert_eq!(again.get_one::<String>("user").map(String::as_str), Some("a: b"));
    }

    #[test]
    fn variables_that_set_nothing_are_told() {
        let known = known_names(&tree());
        // The second is a flag; the third says to tests which binary to run.
        let variables = ["SHEER_PROT", "SHEER_PORT", "SHEER_BIN"].map(|name| (name.to_owned(), "1".into()));
        assert_eq!(
            unknown_variables(&variables, &known),
            ["the variable SHEER_PROT sets nothing; did you mean SHEER_PORT?"]
        );
    }
}

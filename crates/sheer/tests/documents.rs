//! What the documents say can be typed: every command line is understood, every link leads somewhere, and the first
//! screen of the README works as it stands.

use anyhow::{Context as _, Result, ensure};
use sheer_testmesh::net::{Host, Net};
use sheer_testmesh::program::{Program, run};
use sheer_testmesh::wait;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// How long anything that should be quick may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the repository")
}

/// Every document, with its path below the repository's root.
fn documents() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for directory in ["", "docs", "docs/decisions", "deploy", "deploy/systemd", "bench", "examples"] {
        let entries = std::fs::read_dir(root().join(directory)).expect(directory);
        for path in entries.map(|entry| entry.expect("an entry").path()).filter(|path| path.is_file()) {
            let is = |end: &str| path.extension().is_some_and(|extension| extension == end);
            if is("md") || is("yaml") || is("service") {
                let text = std::fs::read_to_string(&path).expect("a document");
                found.push((path.strip_prefix(root()).expect("below the root").to_owned(), text));
            }
        }
    }
    assert!(found.len() > 20, "{found:?}");
    found
}

/// The parts of a document between its fences, by language.
fn blocks<'a>(text: &'a str, languages: &[&str]) -> Vec<&'a str> {
    let parts = text.split("\n```").collect::<Vec<_>>();
    let inside = parts.iter().skip(1).step_by(2);
    inside
        .filter_map(|part| part.split_once('\n'))
        .filter_map(|(language, block)| languages.contains(&language).then_some(block))
        .collect()
}

/// What a person types of a line that may begin with a prompt and end with a remark.
fn typed(line: &str) -> &str {
    let line = line.trim();
    let line = line.strip_prefix("$ ").or(line.strip_prefix("# ")).unwrap_or(line);
    line.split(" # ").next().unwrap_or(line).trim()
}

/// The calls of `sheer` in a line of a shell, without what other programs take.
fn calls(line: &str) -> Vec<Vec<String>> {
    let parts = line.split(['|', ';', '&', '>', '(', ')', '"']);
    let starts = parts.map(|part| part.trim().trim_start_matches("sudo "));
    let sheer = starts.filter(|part| part.starts_with("sheer ")).map(|part| part.split_whitespace().skip(1));
    sheer.map(|words| words.map(str::to_owned).collect()).collect()
}

/// Lets the binary read a command line and say what it understood, without doing anything.
fn understood(words: &[String]) -> Result<()> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sheer"));
    command.arg("--print-settings").args(words).env_remove("SHEER_SETTINGS");
    run(&mut command).map(drop)
}

#[test]
fn every_command_line_is_understood() -> Result<()> {
    let mut count = 0;
    for (path, text) in documents() {
        let mut lines: Vec<&str> = blocks(&text, &["console", "sh"]).iter().flat_map(|block| block.lines()).collect();
        if path.extension().is_some_and(|extension| extension != "md") {
            // Remarks at the head of a file that people copy.
            lines = text.lines().filter_map(|line| line.strip_prefix("#  ")).collect();
        }
        for words in lines.into_iter().flat_map(|line| calls(typed(line))) {
            understood(&words).with_context(|| format!("{}: sheer {}", path.display(), words.join(" ")))?;
            count += 1;
        }
    }
    ensure!(count > 60, "only {count} were found");
    Ok(())
}

#[test]
fn every_verb_and_flag_in_a_sentence_exists() -> Result<()> {
    let mut count = 0;
    for (path, text) in documents() {
        // What is not built yet is named there, and what stands beside it is checked by hand.
        if path.ends_with("docs/gaps.md") || path.extension().is_some_and(|extension| extension != "md") {
            continue;
        }
        let plain: String = text.split("\n```").step_by(2).collect();
        for span in plain.split('`').skip(1).step_by(2).filter_map(|span| span.strip_prefix("sheer ")) {
            let words: Vec<&str> = span.split_whitespace().take_while(|word| *word != "--").collect();
            let is_name = |word: &&&str| word.chars().all(|c| c.is_ascii_lowercase());
            let verbs: Vec<&str> = words.iter().take_while(is_name).copied().collect();
            let Some((verb, below)) = verbs.split_first() else { continue };
            let group = matches!(*verb, "control" | "identity" | "token");
            let mut command = Command::new(env!("CARGO_BIN_EXE_sheer"));
            command.arg(verb).args(below.iter().take(usize::from(group))).arg("--help");
            let help = run(&mut command).with_context(|| format!("{}: sheer {span}", path.display()))?;
            for flag in words.iter().filter(|word| word.starts_with("--")) {
                let known = help.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').any(|word| word == *flag);
                ensure!(known, "{}: sheer {span}: there is no {flag}", path.display());
            }
            count += 1;
        }
    }
    ensure!(count > 40, "only {count} were found");
    Ok(())
}

/// The anchor that a heading gets.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase();
    kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_')).collect::<String>().replace(' ', "-")
}

#[test]
fn every_link_leads_somewhere() {
    for (path, text) in documents().into_iter().filter(|(path, _)| path.extension().is_some_and(|it| it == "md")) {
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if target.starts_with("http") {
                continue;
            }
            let (file, heading) = target.split_once('#').unwrap_or((target, ""));
            let above = root().join(&path).parent().expect("a directory").to_owned();
            let linked = if file.is_empty() { root().join(&path) } else { above.join(file) };
            assert!(linked.exists(), "{}: there is no {target}", path.display());
            if !heading.is_empty() {
                let text = std::fs::read_to_string(&linked).expect("a document");
                let headings = text.lines().filter(|line| line.starts_with('#'));
                let found = headings.map(|line| anchor(line.trim_start_matches('#'))).any(|it| it == heading);
                assert!(found, "{}: {} has no heading {heading}", path.display(), linked.display());
            }
        }
    }
}

#[test]
fn every_target_of_make_exists() {
    let makefile = std::fs::read_to_string(root().join("Makefile")).expect("Makefile");
    for (path, text) in documents() {
        for target in text.split("make ").skip(1).zip(text.split("make ")).filter_map(|(after, before)| {
            // In a code span, or the command of a line in a block.
            let typed = before.ends_with('`') || before.ends_with("\n$ ");
            typed.then(|| after.split(|c: char| !c.is_ascii_lowercase() && c != '-').next()).flatten()
        }) {
            assert!(makefile.contains(&format!("\n{target}:")), "{}: make {target}", path.display());
        }
    }
}

/// A person at a machine of their own, without root.
struct Person<'a> {
    host: &'a Host,
    home: PathBuf,
}

impl Person<'_> {
    /// What the person types, run by a shell that finds the binary.
    fn types(&self, line: &str) -> Command {
        let mut command = self.host.command("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--", "env", "-i"]);
        let (home, name) = (self.home.display(), ["HOME", "XDG_RUNTIME_DIR"]);
        command.args(name.map(|name| format!("{name}={home}"))).arg(format!("PATH={home}/bin:/usr/bin:/bin"));
        command.args(["bash", "-c", &format!("cd {home} && exec {line}")]);
        command
    }
}

#[test]
fn the_first_screen_of_the_readme_works_as_it_stands() -> Result<()> {
    let net = Net::new()?;
    let host = net.host("laptop")?;
    let home = net.directory().join("home");
    std::fs::create_dir_all(home.join("bin"))?;
    std::fs::copy(env!("CARGO_BIN_EXE_sheer"), home.join("bin/sheer"))?;
    nix::unistd::chown(&home, Some(65534.into()), Some(65534.into()))?;
    std::fs::set_permissions(&home, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
    let person = Person { host: &host, home };

    let readme = std::fs::read_to_string(root().join("README.md"))?;
    let first = *blocks(&readme, &["console"]).first().context("a block")?;
    let lines: Vec<&str> = first.lines().map(typed).filter(|line| !line.is_empty()).collect();
    let mut running = Vec::new();
    for (number, line) in lines.iter().enumerate() {
        let ready = match line.split(' ').nth(1) {
            Some("up") => "Sheer is up.",
            Some("run") => "is ready",
            _ => {
                // Python takes a moment until it listens; a person is slower than that.
                wait::until(line, PATIENCE, || {
                    let said = run(&mut person.types(line))?;
                    ensure!(!line.contains("curl") || said.contains("Directory listing"), "{line}: {said}");
                    Ok(())
                })?;
                continue;
            }
        };
        let mut program = Program::start(&format!("line-{number}"), net.directory(), &mut person.types(line))?;
        program.prints(ready, PATIENCE)?;
        running.push(program);
    }
    ensure!(running.len() == 3 && lines.len() >= 6, "{lines:?}");
    let last = lines.last().context("a line")?;
    ensure!(last.starts_with("sheer edges"), "{last}");
    wait::until("the edge from web to api", PATIENCE, || {
        let said = run(&mut person.types(last))?;
        let met = |line: &str| line.contains("default/web") && line.contains("default/api") && line.contains("yes");
        ensure!(said.lines().any(met), "{said}");
        Ok(())
    })
}

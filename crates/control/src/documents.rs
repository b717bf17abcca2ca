//! `apply`, `diff` and `delete`: objects that people send, kept one a file below `applied/` of the configuration
//! directory. Files that people wrote there themselves are never edited.

use sheer_core::api::{Action, Applied, Apply, Change, Failure, Level, ObjectView, Place};
use sheer_core::compile::{Compiled, Object, Source, compile};
use sheer_core::diagnostic::{Diagnostic, Severity};
use sheer_core::name::ServiceName;
use sheer_core::resource::Kind;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;

/// Where applied objects are kept, below the configuration directory.
const APPLIED: &str = "applied";

/// Told apart from files of the directory, which may have the same name.
const SENT: &str = "-f ";

/// Why nothing was changed.
#[derive(Debug)]
pub struct Refusal {
    /// The HTTP status: 404, 409, 422 or 500.
    pub status: u16,
    /// For people.
    pub failure: Failure,
}

impl Refusal {
    fn new(status: u16, error: String, mend: impl Into<String>) -> Self {
        Self { status, failure: Failure { error, mend: mend.into(), diagnostics: Vec::new() } }
    }

    fn io(path: &Path, error: &io::Error) -> Self {
        let mend = match error.kind() {
            io::ErrorKind::StorageFull => "make room on the disk; nothing was changed by the last object",
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                "let the control plane's user write there"
            }
            _ => "see the control plane's log",
        };
        Self::new(500, format!("cannot write {}: {error}", path.display()), mend)
    }
}

/// Applies objects to the configuration directory `root`, whose files are `current`; the watch brings them into force.
///
/// # Errors
/// When a document is wrong, an object belongs to a hand-written file, or the directory cannot be written.
pub fn apply(root: &Path, current: &[Source], request: &Apply, named: &BTreeSet<String>) -> Result<Applied, Refusal> {
    let sent: Vec<Source> = request
        .files
        .iter()
        .map(|file| Source { file: format!("{SENT}{}", file.name), text: file.text.clone() })
        .collect();
    let before = compile(current);
    let incoming = compile(&sent);
    let mut plan = Vec::new();
    for object in &incoming.objects {
        plan.push(change_of(&before, object)?);
    }
    let replaced: BTreeSet<&str> =
        plan.iter().filter(|change| change.action != Action::Created).map(|change| change.file.as_str()).collect();
    // What is the same in a hand-written file stays there, and would be there twice.
    let kept = current.iter().filter(|source| !replaced.contains(source.file.as_str()) || !is_applied(&source.file));
    let same_by_hand = |change: &Change| change.action == Action::Unchanged && !is_applied(&change.file);
    let merged: Vec<Source> = if plan.iter().any(same_by_hand) {
        let others = plan.iter().filter(|change| !same_by_hand(change));
        kept.cloned().chain(others.map(|it| Source { file: it.file.clone(), text: it.after.clone() })).collect()
    } else {
        kept.chain(&sent).cloned().collect()
    };
    let warnings = judge(&before, &[&incoming, &compile(&merged)], named)?;
    if plan.is_empty() && warnings.is_empty() {
        return Err(Refusal::new(422, "there is no object in what was sent".into(), "send at least one document"));
    }
    if !request.dry_run {
        for change in plan.iter().filter(|change| matches!(change.action, Action::Created | Action::Updated)) {
            write(root, &change.file, &change.after)?;
        }
    }
    Ok(Applied { changes: plan, warnings })
}

/// Deletes an object that was applied.
///
/// # Errors
/// When there is none, when it is in a hand-written file, or when another object needs it.
pub fn delete(
    root: &Path,
    current: &[Source],
    kind: Kind,
    name: &ServiceName,
    named: &BTreeSet<String>,
) -> Result<Applied, Refusal> {
    let before = compile(current);
    let Some(object) = before.objects.iter().find(|object| object.kind == kind && object.name == *name) else {
        let error = format!("there is no written {kind} '{name}'");
        return Err(Refusal::new(
            404,
            error,
            format!("'sheer get {}' lists those that are", kind.name().to_lowercase()),
        ));
    };
    let file = object.place.file.to_string();
    if !is_applied(&file) {
        return Err(by_hand(&before, object));
    }
    let rest: Vec<Source> = current.iter().filter(|source| source.file != file).cloned().collect();
    let warnings = judge(&before, &[&compile(&rest)], named)?;
    let path = root.join(&file);
    fs::remove_file(&path).and_then(|()| sync(path.parent())).map_err(|error| Refusal::io(&path, &error))?;
    let change = Change { action: Action::Deleted, before: object.text.clone(), ..change(object, file) };
    Ok(Applied { changes: vec![change], warnings })
}

/// Every written object.
pub fn objects(compiled: &Compiled) -> Vec<ObjectView> {
    let view = |object: &Object| ObjectView {
        api_version: object.kind.api_version().to_owned(),
        kind: object.kind.name().to_owned(),
        namespace: namespace(object),
        name: object.name.name.to_string(),
        origin: origin(object),
        applied: is_applied(&object.place.file),
        text: object.text.clone(),
    };
    compiled.objects.iter().map(view).collect()
}

/// A diagnostic as people are told it.
pub fn place(diagnostic: &Diagnostic) -> Place {
    Place {
        level: match diagnostic.severity {
            Severity::Error => Level::Error,
            Severity::Warning => Level::Warn,
        },
        file: diagnostic.file.strip_prefix(SENT).unwrap_or(&diagnostic.file).to_owned(),
        line: diagnostic.line,
        column: diagnostic.column,
        path: diagnostic.path.clone(),
        message: diagnostic.message.replace(SENT, ""),
        mend: diagnostic.help.as_deref().unwrap_or_default().replace(SENT, ""),
    }
}

/// Refuses when a set has errors that the configuration did not have before; returns what else is to be told. A service
/// that is `named` by a workload is not missing.
fn judge(before: &Compiled, after: &[&Compiled], named: &BTreeSet<String>) -> Result<Vec<Place>, Refusal> {
    let known: BTreeSet<&Diagnostic> = before.diagnostics.iter().collect();
    // Sent documents alone lack what they refer to, so that warnings are taken from the whole set, the last.
    let whole = after.len() - 1;
    let fresh: BTreeSet<&Diagnostic> = after
        .iter()
        .enumerate()
        .flat_map(|(at, set)| set.diagnostics.iter().filter(move |it| at == whole || it.is_error()))
        .filter(|it| !known.contains(it) && it.awaits.as_ref().is_none_or(|service| !named.contains(service)))
        .collect();
    let errors: Vec<Place> = fresh.iter().filter(|it| it.is_error()).map(|it| place(it)).collect();
    if !errors.is_empty() {
        let count = if errors.len() == 1 { "1 error".to_owned() } else { format!("{} errors", errors.len()) };
        let mut refusal = Refusal::new(422, format!("nothing was changed: {count}"), "");
        refusal.failure.diagnostics = errors;
        return Err(refusal);
    }
    let mut warnings: Vec<Place> = fresh.into_iter().map(place).collect();
    // Errors of before keep the whole directory out of force.
    warnings.extend(before.diagnostics.iter().filter(|it| it.is_error()).map(|it| Place {
        level: Level::Warn,
        message: format!("nothing comes into force until this is mended: {}", it.message),
        ..place(it)
    }));
    Ok(warnings)
}

/// What becomes of a sent object.
fn change_of(before: &Compiled, sent: &Object) -> Result<Change, Refusal> {
    let found = before.objects.iter().find(|object| object.kind == sent.kind && object.name == sent.name);
    let after = normal(&sent.text);
    let Some(found) = found else {
        let file = format!(
            "{APPLIED}/{}-{}-{}.yaml",
            sent.kind.name().to_ascii_lowercase(),
            sent.name.namespace,
            sent.name.name
        );
        return Ok(Change { action: Action::Created, after, ..change(sent, file) });
    };
    let file = found.place.file.to_string();
    let old = normal(&found.text);
    if essence(&old) == essence(&after) {
        return Ok(Change { action: Action::Unchanged, before: old, after, ..change(sent, file) });
    }
    let alone = before.objects.iter().filter(|object| object.place.file == found.place.file).count() == 1;
    if !is_applied(&file) || !alone {
        return Err(by_hand(before, found));
    }
    Ok(Change { action: Action::Updated, before: old, after, ..change(sent, file) })
}

fn by_hand(before: &Compiled, object: &Object) -> Refusal {
    let count = before.objects.iter().filter(|other| other.place.file == object.place.file).count();
    let error = format!("{} '{}' is written by hand in {}", object.kind, object.name, origin(object));
    let mend = if count > 1 {
        "edit that file; apply and delete change only files that hold one object and that apply wrote"
    } else {
        "edit that file, or remove it first; apply and delete change only what apply wrote"
    };
    Refusal::new(409, error, mend)
}

fn change(object: &Object, file: String) -> Change {
    Change {
        kind: object.kind.name().to_owned(),
        namespace: namespace(object),
        name: object.name.name.to_string(),
        file,
        ..Change::default()
    }
}

/// There is one Mesh; it has no namespace.
fn namespace(object: &Object) -> String {
    if object.kind == Kind::Mesh { String::new() } else { object.name.namespace.to_string() }
}

fn origin(object: &Object) -> String {
    format!("{}:{}", object.place.file, object.place.line)
}

fn is_applied(file: &str) -> bool {
    file.strip_prefix(APPLIED).is_some_and(|rest| rest.starts_with('/'))
}

/// A document without separators and with one line end.
fn normal(text: &str) -> String {
    let text = text.strip_prefix("---").unwrap_or(text).trim_start_matches(['\n', '\r']).trim_end();
    format!("{text}\n")
}

/// What is left without the comments and separators in front: whether two documents say the same.
fn essence(text: &str) -> &str {
    let mut rest = text;
    while let Some((line, after)) = rest.split_once('\n') {
        let line = line.trim();
        if !(line.is_empty() || line.starts_with('#') || line == "---") {
            break;
        }
        rest = after;
    }
    rest.trim_end()
}

/// Stages under a hidden name, which no watch reads, and renames: the file is there whole or not at all.
fn write(root: &Path, file: &str, text: &str) -> Result<(), Refusal> {
    let path = root.join(file);
    let staged = root.join(APPLIED).join(".staged");
    let write = || -> io::Result<()> {
        fs::create_dir_all(root.join(APPLIED))?;
        let mut out = File::create(&staged)?;
        out.write_all(text.as_bytes())?;
        out.sync_all()?;
        fs::rename(&staged, &path)?;
        sync(path.parent())
    };
    write().map_err(|error| {
        // The refusal is told; the part is of no use.
        let _ = fs::remove_file(&staged);
        Refusal::io(&path, &error)
    })
}

fn sync(directory: Option<&Path>) -> io::Result<()> {
    directory.map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;
    use sheer_core::api::SourceFile;

    struct Dir(tempfile::TempDir);

    impl Dir {
        fn new(files: &[(&str, &str)]) -> Self {
            let dir = Self(tempfile::tempdir().unwrap());
            for (name, text) in files {
                fs::write(dir.0.path().join(name), text).unwrap();
            }
            dir
        }

        fn sources(&self) -> Vec<Source> {
            let mut sources = Vec::new();
            for directory in [self.0.path().to_owned(), self.0.path().join(APPLIED)] {
                for entry in fs::read_dir(directory).into_iter().flatten().map(Result::unwrap) {
                    if entry.path().is_file() {
                        let file = entry.path().strip_prefix(self.0.path()).unwrap().display().to_string();
                        sources.push(Source { file, text: fs::read_to_string(entry.path()).unwrap() });
                    }
                }
            }
            sources
        }

        fn apply(&self, text: &str, dry_run: bool) -> Result<Applied, Refusal> {
            let files = vec![SourceFile { name: "sent.yaml".into(), text: text.into() }];
            apply(self.0.path(), &self.sources(), &Apply { files, dry_run }, &BTreeSet::new())
        }

        fn delete(&self, kind: Kind, name: &str) -> Result<Applied, Refusal> {
            delete(self.0.path(), &self.sources(), kind, &ServiceName::parse(name).unwrap(), &BTreeSet::new())
        }

        fn files(&self) -> Vec<String> {
            let mut files: Vec<String> = self.sources().into_iter().map(|source| source.file).collect();
            files.sort();
            files
        }
    }

    fn service(name: &str, port: u16) -> String {
        format!("apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  ports:\n  - port: {port}\n")
    }

    fn actions(applied: &Applied) -> Vec<Action> {
        applied.changes.iter().map(|change| change.action).collect()
    }

    #[test]
    fn creates_updates_leaves_and_deletes() {
        let dir = Dir::new(&[]);
        let both = format!("{}---\n{}", service("a", 80), service("b", 81));
        assert_eq!(actions(&dir.apply(&both, true).unwrap()), [Action::Created, Action::Created]);
        assert_eq!(dir.files(), [""; 0]);
        dir.apply(&both, false).unwrap();
        assert_eq!(dir.files(), ["applied/service-default-a.yaml", "applied/service-default-b.yaml"]);
        assert_eq!(actions(&dir.apply(&both, false).unwrap()), [Action::Unchanged, Action::Unchanged]);
        let changed = dir.apply(&service("b", 82), false).unwrap();
        assert_eq!(actions(&changed), [Action::Updated]);
        assert!(changed.changes[0].before.contains("81") && changed.changes[0].after.contains("82"));
        assert_eq!(compile(&dir.sources()).objects.len(), 2);
        assert_eq!(actions(&dir.delete(Kind::Service, "b").unwrap()), [Action::Deleted]);
        assert_eq!(dir.files(), ["applied/service-default-a.yaml"]);
        assert_eq!(dir.delete(Kind::Service, "b").unwrap_err().status, 404);
    }

    #[test]
    fn hand_written_files_are_left_alone() {
        let dir = Dir::new(&[("sent.yaml", &format!("# mine\n---\n{}", service("a", 80)))]);
        let refusal = dir.apply(&service("a", 81), false).unwrap_err();
        assert_eq!(refusal.status, 409);
        assert!(refusal.failure.error.contains("by hand in sent.yaml:"), "{}", refusal.failure.error);
        assert_eq!(dir.delete(Kind::Service, "a").unwrap_err().status, 409);
        let same = dir.apply(&format!("{}---\n{}", service("a", 80), service("b", 80)), false).unwrap();
        assert_eq!(actions(&same), [Action::Unchanged, Action::Created]);
        assert_eq!(dir.files(), ["applied/service-default-b.yaml", "sent.yaml"]);
    }

    #[test]
    fn a_wrong_document_changes_nothing() {
        let dir = Dir::new(&[]);
        let refusal = dir.apply(&format!("{}---\n{}", service("a", 80), service("b", 0)), false).unwrap_err();
        assert_eq!(refusal.status, 422);
        let place = &refusal.failure.diagnostics[0];
        assert_eq!((place.file.as_str(), place.level), ("sent.yaml", Level::Error));
        assert!(place.line > 8, "{place:?}");
        assert_eq!(dir.files(), [""; 0]);
        assert_eq!(dir.apply("", false).unwrap_err().status, 422);
        let twice = dir.apply(&format!("{}---\n{}", service("a", 80), service("a", 81)), false).unwrap_err();
        assert!(!format!("{:?}", twice.failure).contains(SENT), "{:?}", twice.failure);
    }

    #[test]
    fn errors_of_others_are_told_and_do_not_refuse() {
        let dir = Dir::new(&[("broken.yaml", "kind: Nothing\n")]);
        let applied = dir.apply(&service("a", 80), false).unwrap();
        assert!(applied.warnings.iter().any(|it| it.file == "broken.yaml"), "{applied:?}");
        assert_eq!(dir.files(), ["applied/service-default-a.yaml", "broken.yaml"]);
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_named() {
        let dir = Dir::new(&[("applied", "a file\n")]);
        let refusal = apply(
            dir.0.path(),
            &[],
            &Apply { files: vec![SourceFile { name: "-".into(), text: service("a", 80) }], dry_run: false },
            &BTreeSet::new(),
        );
        let refusal = refusal.unwrap_err();
        assert_eq!(refusal.status, 500);
        assert!(refusal.failure.error.contains("applied"), "{}", refusal.failure.error);
    }
}

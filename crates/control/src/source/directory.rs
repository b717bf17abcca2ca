//! A directory of YAML files, watched.
//!
//! All files compile as one set. A change is taken up after 100 ms of quiet, at the latest 500 ms after its first sign;
//! should the kernel's notices get lost, a look every two seconds finds it. A set with errors never comes into force: the
//! one before stays, and its diagnostics are shown. It stays over a restart, too: what came into force is kept beside the
//! state.

use notify::event::{AccessKind, AccessMode, EventKind};
use notify::{RecursiveMode, Watcher};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use sheer_core::compile::{Compiled, Source, compile};
use sheer_core::diagnostic::{Diagnostic, Severity};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

const QUIET: Duration = Duration::from_millis(100);
const AT_MOST: Duration = Duration::from_millis(500);
const RESCAN: Duration = Duration::from_secs(2);
/// Larger files are refused by name instead of being read.
const MAX_FILE: u64 = 4 << 20;
/// Subdirectories are followed this deep.
const MAX_DEPTH: usize = 8;

/// The watched directory.
pub struct Directory {
    path: PathBuf,
    changed: Arc<Notify>,
    status: Mutex<Status>,
    /// What the last look found.
    seen: Mutex<Option<Content>>,
    /// Where what came into force is kept.
    kept: Option<PathBuf>,
    /// It could not be.
    unkept: AtomicBool,
    _watcher: Mutex<Option<notify::RecommendedWatcher>>,
}

/// How the directory is doing.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// What the last look found wrong or suspicious; errors mean that it is not in force.
    pub diagnostics: Vec<Diagnostic>,
    /// The directory cannot be read.
    pub unreadable: Option<String>,
    /// How often a configuration came into force.
    pub generation: u64,
}

/// What is kept of a configuration: the directory that it came from, and its files.
#[derive(Deserialize, Serialize)]
struct Kept {
    directory: PathBuf,
    files: Vec<(String, String)>,
}

/// The files, and what could not be read of them.
type Content = (Vec<Source>, Vec<Diagnostic>);

impl Directory {
    /// Watches a directory. It need not exist: then there is no configuration until it does.
    pub fn new(path: &Path) -> Arc<Self> {
        Self::keeping(path, None)
    }

    /// The same, and keeps what came into force in this file.
    pub fn keeping(path: &Path, kept: Option<PathBuf>) -> Arc<Self> {
        Self::follow_with(Self::watching, path, kept)
    }

    /// The same without the kernel's notices, which arrive on a thread of their own.
    pub fn looking(path: &Path, kept: Option<PathBuf>) -> Arc<Self> {
        Self::follow_with(|_| None, path, kept)
    }

    fn follow_with(
        watch: impl FnOnce(Arc<Notify>) -> Option<notify::RecommendedWatcher>,
        path: &Path,
        kept: Option<PathBuf>,
    ) -> Arc<Self> {
        let changed = Arc::new(Notify::new());
        Arc::new(Self {
            path: path.to_owned(),
            changed: changed.clone(),
            status: Mutex::default(),
            seen: Mutex::default(),
            kept,
            unkept: AtomicBool::new(false),
            _watcher: Mutex::new(watch(changed)),
        })
    }

    fn watching(changed: Arc<Notify>) -> Option<notify::RecommendedWatcher> {
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if event.map_or(true, |event| is_change(&event.kind)) {
                changed.notify_one();
            }
        });
        match watcher {
            Ok(watcher) => Some(watcher),
            Err(error) => {
                tracing::warn!(%error, "the configuration directory is looked at every 2 s instead of being watched");
                None
            }
        }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How it is doing.
    pub fn status(&self) -> Status {
        self.status.lock().clone()
    }

    /// Looks again soon, as after a change.
    pub fn look(&self) {
        self.changed.notify_one();
    }

    /// Reads the directory once.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(&self) -> io::Result<Vec<Source>> {
        Ok(self.scan()?.0)
    }

    /// Reads and compiles. Where that cannot come into force, what last did so; `None` when there never was any.
    pub fn load(&self) -> Option<Compiled> {
        self.watch();
        let compiled = match self.scan() {
            Ok(content) => {
                *self.seen.lock() = Some(content.clone());
                let (sources, refused) = content;
                let compiled = self.judge(&sources, refused);
                if compiled.is_some() {
                    self.keep(&sources);
                }
                compiled
            }
            Err(error) => {
                self.unreadable(&error);
                None
            }
        };
        compiled.or_else(|| self.last_good())
    }

    /// What was in force before the start.
    fn last_good(&self) -> Option<Compiled> {
        let content = std::fs::read(self.kept.as_ref()?).ok()?;
        let Kept { directory, files } = serde_json::from_slice(&content).ok()?;
        if directory != self.path {
            return None;
        }
        let files: Vec<Source> = files.into_iter().map(|(file, text)| Source { file, text }).collect();
        let compiled = compile(&files);
        if compiled.diagnostics.iter().any(Diagnostic::is_error) {
            return None;
        }
        tracing::warn!(files = files.len(), "the configuration that was in force before the start stays in force");
        Some(compiled)
    }

    /// Keeps what came into force for the next start.
    fn keep(&self, sources: &[Source]) {
        let Some(path) = &self.kept else { return };
        let files = sources.iter().map(|it| (it.file.clone(), it.text.clone())).collect();
        let kept = Kept { directory: self.path.clone(), files };
        let written = serde_json::to_vec(&kept).map_err(io::Error::other);
        let written = written.and_then(|content| crate::file::replace(path, 0o600, &content));
        let failed_before = self.unkept.swap(written.is_err(), Ordering::Relaxed);
        if let Err(error) = written
            && !failed_before
        {
            tracing::warn!(path = %path.display(), %error, "what is in force cannot be kept for the next start yet");
        }
    }

    /// Calls `apply` with each configuration that is to come into force, until dropped.
    pub async fn follow(self: Arc<Self>, apply: impl Fn(Compiled)) {
        loop {
            let noticed = tokio::time::timeout(RESCAN, self.changed.notified()).await.is_ok();
            if noticed {
                self.settle().await;
            }
            self.watch();
            self.refresh(&apply);
        }
    }

    /// Looks now, and calls `apply` when something else is to come into force.
    pub fn refresh(&self, apply: &impl Fn(Compiled)) {
        // Over the whole of it, so that no older look comes into force after a newer one.
        let mut seen = self.seen.lock();
        match self.scan() {
            Ok(content) => {
                let again = self.status.lock().unreadable.take().is_some();
                if seen.as_ref() == Some(&content) && !again {
                    let in_force =
                        content.1.is_empty() && !self.status.lock().diagnostics.iter().any(Diagnostic::is_error);
                    if in_force && self.unkept.load(Ordering::Relaxed) {
                        self.keep(&content.0);
                    }
                    return;
                }
                *seen = Some(content.clone());
                let (sources, refused) = content;
                if let Some(compiled) = self.judge(&sources, refused) {
                    apply(compiled);
                    self.keep(&sources);
                }
            }
            Err(error) => self.unreadable(&error),
        }
    }

    async fn settle(&self) {
        let begun = Instant::now();
        while begun.elapsed() < AT_MOST {
            if tokio::time::timeout(QUIET, self.changed.notified()).await.is_err() {
                return;
            }
        }
    }

    fn judge(&self, sources: &[Source], refused: Vec<Diagnostic>) -> Option<Compiled> {
        let mut compiled = compile(sources);
        compiled.diagnostics.extend(refused);
        compiled.diagnostics.sort();
        let errors = compiled.diagnostics.iter().filter(|it| it.is_error()).count();
        let mut status = self.status.lock();
        status.unreadable = None;
        status.diagnostics = compiled.diagnostics.clone();
        if errors > 0 {
            for diagnostic in status.diagnostics.iter().filter(|it| it.is_error()).take(20) {
                tracing::error!("{diagnostic}");
            }
            tracing::error!(errors, "the configuration is not taken; the one before stays in force");
            return None;
        }
        status.generation += 1;
        tracing::info!(files = sources.len(), objects = compiled.objects.len(), "configuration in force");
        Some(compiled)
    }

    fn unreadable(&self, error: &io::Error) {
        let mut status = self.status.lock();
        let text = error.to_string();
        if status.unreadable.as_ref() != Some(&text) {
            tracing::error!(path = %self.path.display(), %error, "the configuration directory cannot be read");
        }
        status.unreadable = Some(text);
    }

    /// (Re)establishes the watch: a directory that was replaced has another inode.
    fn watch(&self) {
        if let Some(watcher) = self._watcher.lock().as_mut() {
            // A missing directory is reported by the scan; the next look tries again.
            let _ = watcher.watch(&self.path, RecursiveMode::Recursive);
        }
    }

    fn scan(&self) -> io::Result<Content> {
        let (mut sources, mut refused) = Content::default();
        let mut waiting = vec![(self.path.clone(), 0)];
        while let Some((directory, depth)) = waiting.pop() {
            let entries = match std::fs::read_dir(&directory) {
                Ok(entries) => entries,
                // Gone between two looks; only the directory itself has to be there.
                Err(error) if depth > 0 && error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            for entry in entries {
                let path = entry?.path();
                let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
                let Ok(meta) = std::fs::metadata(&path) else { continue };
                if hidden {
                    continue;
                }
                if meta.is_dir() {
                    if depth < MAX_DEPTH {
                        waiting.push((path, depth + 1));
                    }
                    continue;
                }
                let yaml = path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
                if !yaml || !meta.is_file() {
                    continue;
                }
                let file = path.strip_prefix(&self.path).unwrap_or(&path).display().to_string();
                match read_file(&path, meta.len()) {
                    Ok(text) => sources.push(Source { file, text }),
                    Err(reason) => refused.push(Diagnostic {
                        file,
                        line: 0,
                        column: 0,
                        severity: Severity::Error,
                        path: String::new(),
                        message: reason,
                        help: Some("mend the file, or move it out of the directory".to_owned()),
                        awaits: None,
                    }),
                }
            }
        }
        sources.sort_by(|a, b| a.file.cmp(&b.file));
        Ok((sources, refused))
    }
}

/// Reading is no change: without this each look would be the reason of the next.
fn is_change(kind: &EventKind) -> bool {
    match kind {
        EventKind::Access(access) => *access == AccessKind::Close(AccessMode::Write),
        _ => true,
    }
}

fn read_file(path: &Path, length: u64) -> Result<String, String> {
    if length > MAX_FILE {
        return Err(format!("the file is larger than {} MiB", MAX_FILE >> 20));
    }
    std::fs::read_to_string(path).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidData => "the file is not UTF-8".to_owned(),
        _ => format!("the file cannot be read: {error}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_wakes_nobody() {
        assert!(!is_change(&EventKind::Access(AccessKind::Open(AccessMode::Any))));
        assert!(is_change(&EventKind::Access(AccessKind::Close(AccessMode::Write))));
        assert!(is_change(&EventKind::Create(notify::event::CreateKind::File)));
    }

    #[test]
    fn hidden_and_other_files_are_left_alone_and_large_ones_named() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["a.yaml", "b.yml", ".hidden.yaml", "notes.txt"] {
            std::fs::write(directory.path().join(name), "").unwrap();
        }
        std::fs::create_dir(directory.path().join("applied")).unwrap();
        std::fs::write(directory.path().join("applied/c.yaml"), "").unwrap();
        std::fs::write(directory.path().join("d.yaml"), [0xff, 0xfe]).unwrap();
        let file = std::fs::File::create(directory.path().join("e.yaml")).unwrap();
        file.set_len(MAX_FILE + 1).unwrap();
        let (sources, refused) = Directory::new(directory.path()).scan().unwrap();
        let names: Vec<&str> = sources.iter().map(|it| it.file.as_str()).collect();
        assert_eq!(names, ["a.yaml", "applied/c.yaml", "b.yml"]);
        let mut messages: Vec<&str> = refused.iter().map(|it| it.message.as_str()).collect();
        messages.sort_unstable();
        assert_eq!(messages, ["the file is larger than 4 MiB", "the file is not UTF-8"]);
    }
}

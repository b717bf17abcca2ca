//! Backups: one file with the state's records, the authority's keys and the configuration, taken while running.

use crate::ca::hex;
use crate::store::{Store, StoreError, Table};
use crate::{file, rotation};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use sheer_core::compile::Source;
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::path::{Component, Path, PathBuf};

const FORMAT: &str = "sheer-backup/1";
/// Larger backups are refused when they are read.
const MAX_BACKUP: u64 = 1 << 30;
/// How often it is tried to read the authority's files as they belong to its record.
const TRIES: usize = 5;

/// Why a backup cannot be taken or restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file or directory.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The backup cannot be read.
    #[error("the backup is damaged: {0}; use another one")]
    Damaged(String),
    /// It has another format.
    #[error("the backup has format '{0}', this version reads {FORMAT}")]
    Format(String),
    /// Something is there already.
    #[error("{} is not empty; restore into an empty directory, or move it away", .0.display())]
    NotEmpty(PathBuf),
}

#[derive(Serialize, Deserialize)]
struct Archive {
    format: String,
    created: i64,
    sha256: String,
    content: String,
}

#[derive(Serialize, Deserialize)]
struct Content {
    /// Table -> (key, base64 of the record).
    tables: BTreeMap<String, Vec<(String, String)>>,
    /// Files of the state directory.
    files: BTreeMap<String, String>,
    /// Files of the configuration directory.
    config: BTreeMap<String, String>,
}

/// What was restored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Records of the state.
    pub records: usize,
    /// Files of the configuration.
    pub files: usize,
    /// Whether the configuration directory held files already, which were left as they are.
    pub kept_config: bool,
}

/// Takes a backup. It holds the root's key: keep it as you keep that.
///
/// # Errors
/// When something cannot be read.
pub(crate) fn take(store: &Store, state: &Path, config: Vec<Source>, now: i64) -> Result<Vec<u8>, BackupError> {
    // The authority's files: without them no proxy would trust the restored control plane. They are read between two
    // looks at the record that names them.
    let (mut image, mut files) = (store.image()?, BTreeMap::new());
    for _ in 0..TRIES {
        files = authority_files(state)?;
        let again = store.image()?;
        let record = |image: &[(Table, crate::store::Records)]| record_of(image).map(<[u8]>::to_vec);
        let is_same = record(&again) == record(&image);
        image = again;
        if is_same {
            break;
        }
    }
    let tables = image.into_iter().map(|(table, records)| {
        let records = records.into_iter().map(|(key, value)| (key, STANDARD.encode(value)));
        (table.name().to_owned(), records.collect())
    });
    let config = config.into_iter().map(|source| (source.file, source.text)).collect();
    let content = Content { tables: tables.collect(), files, config };
    let damaged = |error: serde_json::Error| BackupError::Damaged(error.to_string());
    let content = serde_json::to_string(&content).map_err(damaged)?;
    let sha256 = hex(&Sha256::digest(content.as_bytes()));
    serde_json::to_vec(&Archive { format: FORMAT.to_owned(), created: now, sha256, content }).map_err(damaged)
}

/// The record of roots in the tables.
fn record_of(image: &[(Table, crate::store::Records)]) -> Option<&[u8]> {
    let (_, records) = image.iter().find(|(table, _)| *table == Table::Meta)?;
    records.iter().find(|(key, _)| key == rotation::RECORD).map(|(_, value)| value.as_slice())
}

fn authority_files(state: &Path) -> Result<BTreeMap<String, String>, BackupError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| BackupError::Io { path, source }
    };
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(state).map_err(io(state))? {
        let name = entry.map_err(io(state))?.file_name();
        let Some(name) = name.to_str().filter(|name| crate::ca::number_of(name).is_some()) else { continue };
        match std::fs::read_to_string(state.join(name)) {
            Ok(text) => files.insert(name.to_owned(), text),
            // Its root was forgotten in this moment.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(io(&state.join(name))(error)),
        };
    }
    Ok(files)
}

/// Takes a backup of a control plane that does not run.
///
/// # Errors
/// When it does run, or something cannot be read or written.
pub fn backup(state: &Path, config: &Path, mut out: impl Write) -> Result<(), BackupError> {
    if !state.join("sheer.redb").exists() {
        let source = io::Error::new(io::ErrorKind::NotFound, "no control plane keeps its state here");
        return Err(BackupError::Io { path: state.to_owned(), source });
    }
    let store = Store::open(state)?;
    let sources = match crate::source::directory::Directory::new(config).read() {
        Ok(sources) => sources,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(source) => return Err(BackupError::Io { path: config.to_owned(), source }),
    };
    let bytes = take(&store, state, sources, crate::clock::Clock::default().unix())?;
    out.write_all(&bytes).map_err(|source| BackupError::Io { path: PathBuf::from("the backup"), source })
}

/// Restores a backup into a state directory that is empty or missing. The configuration is restored when its directory
/// is empty or missing, otherwise left as it is. Versions from before mean nothing to the restored control plane.
///
/// # Errors
/// When the backup is damaged or the state directory is not empty; nothing was changed then.
pub fn restore(archive: impl Read, state: &Path, config: &Path) -> Result<Restored, BackupError> {
    let mut bytes = Vec::new();
    let read = archive.take(MAX_BACKUP).read_to_end(&mut bytes);
    read.map_err(|source| BackupError::Io { path: PathBuf::from("the backup"), source })?;
    let damaged = |error: serde_json::Error| BackupError::Damaged(error.to_string());
    let archive: Archive = serde_json::from_slice(&bytes).map_err(damaged)?;
    if archive.format != FORMAT {
        return Err(BackupError::Format(archive.format.chars().take(40).collect()));
    }
    if hex(&Sha256::digest(archive.content.as_bytes())) != archive.sha256 {
        return Err(BackupError::Damaged("its checksum differs".to_owned()));
    }
    let content: Content = serde_json::from_str(&archive.content).map_err(damaged)?;
    for name in ["root", "issuing"] {
        if !content.files.keys().any(|file| file.starts_with(name) && crate::ca::number_of(file).is_some()) {
            return Err(BackupError::Damaged(format!("it holds no {name}.pem")));
        }
    }
    if content.config.keys().any(|name| !is_plain(name)) {
        return Err(BackupError::Damaged("it names a file outside the configuration directory".to_owned()));
    }
    if !is_empty(state)? {
        return Err(BackupError::NotEmpty(state.to_owned()));
    }
    let mut restored = Restored { kept_config: !is_empty(config)?, ..Restored::default() };
    restored.records = restore_state(&content, state)?;
    if !restored.kept_config {
        for (name, text) in &content.config {
            let path = config.join(name);
            let io = |source| BackupError::Io { path: path.clone(), source };
            std::fs::create_dir_all(path.parent().unwrap_or(config)).map_err(io)?;
            file::replace(&path, 0o644, text.as_bytes()).map_err(io)?;
            restored.files += 1;
        }
    }
    Ok(restored)
}

/// Builds the state beside its place and renames it there, so that a crash leaves an empty directory or the whole.
fn restore_state(content: &Content, state: &Path) -> Result<usize, BackupError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| BackupError::Io { path, source }
    };
    let name = state.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let staged = state.with_file_name(format!(".{name}.{:08x}", rand::random::<u32>()));
    let mut records = Vec::new();
    for table in Table::ALL {
        for (key, value) in content.tables.get(table.name()).into_iter().flatten() {
            let value = STANDARD.decode(value).map_err(|error| BackupError::Damaged(error.to_string()))?;
            records.push((table, key.clone(), value));
        }
    }
    let count = records.len();
    let now = crate::clock::Clock::default().unix();
    let build = || -> Result<(), BackupError> {
        if let Some(parent) = state.parent() {
            std::fs::create_dir_all(parent).map_err(io(parent))?;
        }
        let store = Store::open(&staged)?;
        store.write_now::<_, StoreError>(move |transaction| {
            for (table, key, value) in &records {
                transaction.put_raw(*table, key, value)?;
            }
            let epoch: u64 = transaction.read(Table::Meta, "epoch")?.unwrap_or(1);
            transaction.put(Table::Meta, "epoch", &(epoch + 1))?;
            // Whom proxies were told to trust since the backup was taken is to count as older.
            let trust: Option<rotation::Trust> = transaction.read(Table::Meta, rotation::RECORD)?;
            transaction.put(Table::Meta, rotation::RECORD, &trust.unwrap_or_default().restored(now))
        })?;
        drop(store);
        for (name, text) in &content.files {
            if crate::ca::number_of(name).is_some() {
                file::replace(&staged.join(name), 0o600, text.as_bytes()).map_err(io(&staged))?;
            }
        }
        match std::fs::remove_dir(state) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io(state)(error)),
            _ => {}
        }
        std::fs::rename(&staged, state).map_err(io(state))
    };
    build().inspect_err(|_| {
        let _ = std::fs::remove_dir_all(&staged);
    })?;
    Ok(count)
}

fn is_empty(directory: &Path) -> Result<bool, BackupError> {
    match std::fs::read_dir(directory) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(source) => Err(BackupError::Io { path: directory.to_owned(), source }),
    }
}

fn is_plain(name: &str) -> bool {
    !name.is_empty() && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_inside_the_directory_are_named() {
        assert!(is_plain("web.yaml") && is_plain("applied/web.yaml"));
        for bad in ["", "/etc/passwd", "../x", "a/../../x"] {
            assert!(!is_plain(bad), "{bad}");
        }
    }
}

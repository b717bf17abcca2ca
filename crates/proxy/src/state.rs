//! What a proxy keeps on disk, so that it serves without the control plane also after its own restart: its identity and
//! the last good configuration.
//!
//! A file is an 8-byte mark with the format's version, the SHA-256 of what follows, and what follows. It is written beside
//! its place with mode 0600, flushed to the disk, and renamed over the old one; then the directory is flushed. A kill at
//! any moment leaves the old file or the new one. A file that is damaged is reported and treated as absent.

use prost::Message;
use sha2::{Digest, Sha256};
use sheer_core::wire::discovery;
use std::fmt::Debug;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// File name of the key, certificate and trust.
pub const IDENTITY: &str = "identity";

/// File name of the last good configuration.
pub const CONFIGURATION: &str = "configuration";

/// `sheer`, two zeros, and the version of the format.
const MARK: [u8; 8] = *b"sheer\0\0\x01";
const HEADER: usize = MARK.len() + 32;

/// The largest file that is read: far above 10,000 services with their endpoints.
const MAX_BYTES: u64 = 256 << 20;

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It cannot be read.
    #[error("cannot read {path}: {source}; make it readable for this user, or choose another directory with --state")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It cannot be written.
    #[error("cannot write {path}: {source}; make room or make the directory writable, or choose another with --state")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is not what was written.
    #[error("{path} is damaged ({what}) and is not used; it is replaced at the next change, nothing needs to be done")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// What a state directory asks of a file system, in steps between which the power may fail. It is the machine's, [`Disk`],
/// unless a test puts one in its place that loses what was not flushed.
pub trait Files: Debug + Send + Sync {
    /// Makes a directory (0700) with its parents, where it is missing.
    fn make(&self, directory: &Path) -> io::Result<()>;

    /// The files in a directory.
    fn list(&self, directory: &Path) -> io::Result<Vec<PathBuf>>;

    /// The first `limit` bytes of a file.
    fn read(&self, path: &Path, limit: u64) -> io::Result<Vec<u8>>;

    /// Writes a file (0600) anew.
    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;

    /// Brings a file, or the names in a directory, to the disk.
    fn flush(&self, path: &Path) -> io::Result<()>;

    /// Gives a file the place of another.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Whether these may take long, so that nothing else may wait for them.
    fn may_take_long(&self) -> bool;
}

/// This machine's file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct Disk;

impl Files for Disk {
    fn make(&self, directory: &Path) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<PathBuf>> {
        std::fs::read_dir(directory)?.map(|entry| entry.map(|it| it.path())).collect()
    }

    fn read(&self, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(path)?.take(limit).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?.write_all(bytes)
    }

    fn flush(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn may_take_long(&self) -> bool {
        true
    }
}

/// The state directory of one proxy.
#[derive(Clone, Debug)]
pub struct Directory {
    path: PathBuf,
    files: Arc<dyn Files>,
}

impl Directory {
    /// The directory at this path, made (0700) when it is not there.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        Self::on(Arc::new(Disk), path)
    }

    /// The same on another file system.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn on(files: Arc<dyn Files>, path: &Path) -> Result<Self, StateError> {
        match files.make(path) {
            Ok(()) => {
                let directory = Self { path: path.to_owned(), files };
                directory.sweep();
                Ok(directory)
            }
            Err(source) => Err(StateError::Write { path: path.to_owned(), source }),
        }
    }

    /// Removes what proxies that were killed had half written.
    fn sweep(&self) {
        for path in self.files.list(&self.path).into_iter().flatten() {
            let name = path.file_name().and_then(|it| it.to_str());
            let writer = name.filter(|it| it.starts_with('.')).and_then(|it| it.rsplit_once(".new-"));
            let writer = writer.and_then(|(_, pid)| pid.parse::<u32>().ok());
            if writer.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                // It takes room, and that is all it does.
                let _ = self.files.remove(&path);
            }
        }
    }

    /// Reads a file's content; `None` when there is none.
    ///
    /// # Errors
    /// When it cannot be read or is damaged.
    pub fn load(&self, name: &str) -> Result<Option<Vec<u8>>, StateError> {
        let path = self.path.join(name);
        match self.files.read(&path, MAX_BYTES) {
            Ok(bytes) => match unseal(&bytes) {
                Ok(content) => Ok(Some(content.to_vec())),
                Err(what) => Err(StateError::Damaged { path, what }),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(StateError::Read { path, source }),
        }
    }

    /// Replaces a file's content. Blocks until it is on the disk.
    ///
    /// # Errors
    /// When it cannot be written; the old content is then still there.
    pub fn save(&self, name: &str, content: &[u8]) -> Result<(), StateError> {
        let path = self.path.join(name);
        // While one proxy takes another's place both may write.
        let beside = self.path.join(format!(".{name}.new-{}", std::process::id()));
        let write = || {
            self.files.write(&beside, &seal(content))?;
            self.files.flush(&beside)?;
            self.files.rename(&beside, &path)?;
            self.files.flush(&self.path)
        };
        write().map_err(|source| {
            let _ = self.files.remove(&beside);
            StateError::Write { path, source }
        })
    }

    /// [`Directory::save`] beside other work of this thread, which also answers DNS: flushing to a disk may take long.
    ///
    /// # Errors
    /// The same.
    pub async fn keep(&self, name: &'static str, content: Vec<u8>) -> Result<(), StateError> {
        if !self.files.may_take_long() {
            return self.save(name, &content);
        }
        let directory = self.clone();
        let saved = tokio::task::spawn_blocking(move || directory.save(name, &content)).await;
        // It only fails where the runtime ends before it has begun.
        saved.unwrap_or_else(|error| {
            Err(StateError::Write { path: self.path.join(name), source: io::Error::other(error) })
        })
    }
}

pub(crate) fn seal(content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + content.len());
    bytes.extend_from_slice(&MARK);
    bytes.extend_from_slice(&Sha256::digest(content));
    bytes.extend_from_slice(content);
    bytes
}

pub(crate) fn unseal(bytes: &[u8]) -> Result<&[u8], &'static str> {
    let (header, content) = bytes.split_at_checked(HEADER).ok_or("it is cut off")?;
    let (mark, sum) = header.split_at(MARK.len());
    if mark[..7] != MARK[..7] {
        return Err("it is no state file of a proxy");
    }
    if mark != MARK {
        return Err("another version of the proxy wrote it");
    }
    if sum != Sha256::digest(content).as_slice() {
        return Err("its checksum does not match");
    }
    Ok(content)
}

/// The last good configuration: resources as they were received.
#[derive(Clone, PartialEq, Message)]
pub struct Configuration {
    /// The resources, with their names, versions and encoded content.
    #[prost(message, repeated, tag = "1")]
    pub resources: Vec<discovery::Resource>,
    /// What the control plane said does not exist.
    #[prost(message, repeated, tag = "2")]
    pub absent: Vec<Absent>,
    /// In what time to come back to the control plane after a loss, in milliseconds; 0 when it said nothing.
    #[prost(uint32, tag = "3")]
    pub return_within_ms: u32,
}

/// A resource that was asked for by name and does not exist.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Absent {
    /// Its type.
    #[prost(string, tag = "1")]
    pub type_url: String,
    /// Its name.
    #[prost(string, tag = "2")]
    pub name: String,
}

impl Configuration {
    /// Reads it from disk. What cannot be used is reported and left out: the proxy then waits for the control plane.
    pub fn load(directory: &Directory) -> Option<Self> {
        let content = match directory.load(CONFIGURATION) {
            Ok(content) => content?,
            Err(error) => {
                tracing::warn!("{error}");
                return None;
            }
        };
        match Self::decode(content.as_slice()) {
            Ok(configuration) => Some(configuration),
            Err(error) => {
                tracing::warn!(%error, "the stored configuration cannot be decoded and is not used");
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::PermissionsExt;

    fn directory() -> (tempfile::TempDir, Directory) {
        let guard = tempfile::tempdir().unwrap();
        let directory = Directory::open(&guard.path().join("a/b")).unwrap();
        (guard, directory)
    }

    #[test]
    fn what_was_saved_is_loaded() {
        let (_guard, directory) = directory();
        assert!(directory.load("x").unwrap().is_none());
        directory.save("x", b"one").unwrap();
        directory.save("x", b"two").unwrap();
        assert_eq!(directory.load("x").unwrap().as_deref(), Some(&b"two"[..]));
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&directory.path.join("x")), 0o600);
        assert_eq!(mode(&directory.path), 0o700);
        assert_eq!(std::fs::read_dir(&directory.path).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn a_file_cut_or_changed_at_any_byte_is_damaged() {
        let sealed = seal(b"some content");
        for length in 0..sealed.len() {
            assert!(unseal(&sealed[..length]).is_err(), "cut at {length}");
        }
        for at in 0..sealed.len() {
            for bit in 0..8 {
                let mut changed = sealed.clone();
                changed[at] ^= 1 << bit;
                assert!(unseal(&changed).is_err(), "bit {bit} of byte {at}");
            }
        }
    }

    #[test]
    fn a_damaged_configuration_is_left_out() {
        let (_guard, directory) = directory();
        assert!(Configuration::load(&directory).is_none());
        directory.save(CONFIGURATION, b"\xff\xff").unwrap();
        assert!(Configuration::load(&directory).is_none());
        std::fs::write(directory.path.join(CONFIGURATION), b"junk").unwrap();
        assert!(Configuration::load(&directory).is_none());
        let kept = Configuration {
            resources: vec![discovery::Resource { name: "n".into(), ..Default::default() }],
            absent: vec![Absent { type_url: "t".into(), name: "n".into() }],
            return_within_ms: 500,
        };
        directory.save(CONFIGURATION, &kept.encode_to_vec()).unwrap();
        assert_eq!(Configuration::load(&directory), Some(kept));
    }

    #[test]
    fn a_failed_write_keeps_the_old_content() {
        let (_guard, directory) = directory();
        directory.save("x", b"one").unwrap();
        // A directory in the way of the temporary file stands for a full disk.
        std::fs::create_dir(directory.path.join(format!(".x.new-{}", std::process::id()))).unwrap();
        let error = directory.save("x", b"two").unwrap_err().to_string();
        assert!(error.contains("cannot write"), "{error}");
        assert_eq!(directory.load("x").unwrap().as_deref(), Some(&b"one"[..]));
    }

    #[test]
    fn what_a_killed_proxy_had_half_written_is_removed() {
        let (_guard, directory) = directory();
        let (dead, living) =
            (directory.path.join(".x.new-4194305"), directory.path.join(format!(".x.new-{}", std::process::id())));
        [&dead, &living].into_iter().for_each(|path| std::fs::write(path, "half").unwrap());
        Directory::open(&directory.path).unwrap();
        assert!(!dead.exists(), "no process has this number");
        assert!(living.exists(), "it may be about to be renamed");
    }

    proptest! {
        #[test]
        fn no_file_content_panics(bytes: Vec<u8>) {
            let _ = unseal(&bytes);
            let _ = Configuration::decode(&*bytes);
        }

        #[test]
        fn any_content_survives(content: Vec<u8>) {
            let sealed = seal(&content);
            prop_assert_eq!(unseal(&sealed), Ok(&*content));
        }
    }
}

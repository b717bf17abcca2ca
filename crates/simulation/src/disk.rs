//! Disks that do what disks may do: keep what was flushed, and of the rest whatever they like.

use parking_lot::Mutex;
use rand::Rng;
use rand::rngs::StdRng;
use redb::{Database, DatabaseError, StorageBackend};
use sheer_control::store::Medium;
use sheer_proxy::state::Files;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How a host goes down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Down {
    /// Its process is killed: what it wrote is in the kernel's memory.
    Killed,
    /// The power fails: what was not flushed may be gone, in whole or in part.
    PowerFailed,
}

fn dead<T>() -> io::Result<T> {
    Err(io::Error::other("the host is down"))
}

/// A proxy's file system.
#[derive(Debug, Default)]
pub struct FileDisk(Mutex<Tree>);

#[derive(Debug, Default)]
struct Tree {
    /// What names lead to, as processes see it, and as it is on the disk.
    names: BTreeMap<PathBuf, u64>,
    flushed_names: BTreeMap<PathBuf, u64>,
    contents: BTreeMap<u64, Content>,
    next: u64,
    /// The host goes down in the middle of this operation from now, after so many bytes where it writes.
    fatal: Option<(u32, usize)>,
    is_down: bool,
}

#[derive(Clone, Debug, Default)]
struct Content {
    bytes: Vec<u8>,
    flushed: Vec<u8>,
}

impl Tree {
    /// Begins an operation; an error when the host is down. When it goes down in the middle of this one, after how many
    /// bytes.
    fn begin(&mut self) -> io::Result<Option<usize>> {
        if self.is_down {
            return dead();
        }
        match &mut self.fatal {
            Some((0, bytes)) => {
                self.is_down = true;
                Ok(Some(*bytes))
            }
            Some((left, _)) => {
                *left -= 1;
                Ok(None)
            }
            None => Ok(None),
        }
    }
}

impl FileDisk {
    /// The host is to go down in the middle of the operation after this many more that change the disk, when it has
    /// written so many bytes.
    pub fn fail_after(&self, operations: u32, bytes: usize) {
        self.0.lock().fatal = Some((operations, bytes));
    }

    /// Whether it did so.
    pub fn has_failed(&self) -> bool {
        self.0.lock().is_down
    }

    /// What is left when the host goes down; it can be started again.
    pub fn go_down(&self, how: Down, random: &mut StdRng) {
        match how {
            Down::Killed => self.lose(true, |length| length),
            Down::PowerFailed => {
                let names = random.random();
                self.lose(names, |length| random.random_range(0..=length));
            }
        }
    }

    /// What is left when the host goes down: names that were not flushed, or those before them, and so many bytes of each
    /// file that was not, of its length.
    pub fn lose(&self, names: bool, mut kept: impl FnMut(usize) -> usize) {
        let mut tree = self.0.lock();
        tree.is_down = false;
        tree.fatal = None;
        match names {
            true => tree.flushed_names = tree.names.clone(),
            false => tree.names = tree.flushed_names.clone(),
        }
        for content in tree.contents.values_mut().filter(|it| it.bytes != it.flushed) {
            let kept = kept(content.bytes.len());
            content.bytes.truncate(kept);
            content.flushed = content.bytes.clone();
        }
    }

    /// The content of a file, as a process sees it.
    pub fn content(&self, path: &Path) -> Option<Vec<u8>> {
        let tree = self.0.lock();
        tree.names.get(path).and_then(|it| tree.contents.get(it)).map(|it| it.bytes.clone())
    }
}

impl Files for FileDisk {
    fn make(&self, _directory: &Path) -> io::Result<()> {
        if self.0.lock().is_down { dead() } else { Ok(()) }
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<PathBuf>> {
        Ok(self.0.lock().names.keys().filter(|it| it.parent() == Some(directory)).cloned().collect())
    }

    fn read(&self, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
        let content = self.content(path).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        Ok(content.into_iter().take(usize::try_from(limit).unwrap_or(usize::MAX)).collect())
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut tree = self.0.lock();
        let cut = tree.begin()?;
        let fresh = tree.next;
        let number = *tree.names.entry(path.to_owned()).or_insert(fresh);
        tree.next += u64::from(number == fresh);
        let written = cut.unwrap_or(usize::MAX).min(bytes.len());
        tree.contents.entry(number).or_default().bytes = bytes[..written].to_vec();
        if cut.is_some() { dead() } else { Ok(()) }
    }

    fn flush(&self, path: &Path) -> io::Result<()> {
        let mut tree = self.0.lock();
        if tree.begin()?.is_some() {
            return dead();
        }
        match tree.names.get(path).copied() {
            Some(number) => {
                if let Some(content) = tree.contents.get_mut(&number) {
                    content.flushed = content.bytes.clone();
                }
            }
            None => tree.flushed_names = tree.names.clone(),
        }
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut tree = self.0.lock();
        if tree.begin()?.is_some() {
            return dead();
        }
        let number = tree.names.remove(from).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        tree.names.insert(to.to_owned(), number);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut tree = self.0.lock();
        if tree.begin()?.is_some() {
            return dead();
        }
        tree.names.remove(path).map(drop).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }

    fn may_take_long(&self) -> bool {
        false
    }
}

/// What the control plane's state is on.
#[derive(Clone, Debug, Default)]
pub struct StateDisk(Arc<Mutex<Blocks>>);

#[derive(Debug, Default)]
struct Blocks {
    bytes: Vec<u8>,
    flushed: Vec<u8>,
    /// What was done since the last flush, in order.
    pending: Vec<Change>,
    /// Which start of the host may use it.
    start: u64,
}

#[derive(Debug)]
enum Change {
    Length(usize),
    Write(usize, Vec<u8>),
}

impl Change {
    fn make(&self, bytes: &mut Vec<u8>, part: usize) {
        match self {
            Change::Length(length) => bytes.resize(*length, 0),
            Change::Write(at, written) => {
                let written = &written[..part.min(written.len())];
                let end = at + written.len();
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                bytes[*at..end].copy_from_slice(written);
            }
        }
    }
}

impl StateDisk {
    /// What is left when the host goes down. Who had it open cannot reach it any more.
    pub fn go_down(&self, how: Down, random: &mut StdRng) {
        let mut blocks = self.0.lock();
        blocks.start += 1;
        let pending = std::mem::take(&mut blocks.pending);
        if how == Down::PowerFailed {
            for change in pending {
                match random.random_range(0..3) {
                    0 => {}
                    1 => change.make(&mut blocks.flushed, usize::MAX),
                    _ => change.make(&mut blocks.flushed, random.random_range(0..4096)),
                }
            }
            blocks.bytes = blocks.flushed.clone();
        } else {
            blocks.flushed = blocks.bytes.clone();
        }
    }
}

impl Medium for StateDisk {
    fn open(&self) -> Result<Database, DatabaseError> {
        let start = self.0.lock().start;
        Database::builder().create_with_backend(Opened { disk: self.clone(), start })
    }
}

/// The disk as one start of its host has it open.
#[derive(Debug)]
struct Opened {
    disk: StateDisk,
    start: u64,
}

impl Opened {
    fn blocks<T>(&self, then: impl FnOnce(&mut Blocks) -> io::Result<T>) -> io::Result<T> {
        let mut blocks = self.disk.0.lock();
        if blocks.start == self.start { then(&mut blocks) } else { dead() }
    }
}

impl StorageBackend for Opened {
    fn len(&self) -> io::Result<u64> {
        self.blocks(|blocks| Ok(blocks.bytes.len() as u64))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.blocks(|blocks| {
            let at = usize::try_from(offset).map_err(io::Error::other)?;
            let found = blocks.bytes.get(at..at + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            out.copy_from_slice(found);
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Change::Length(usize::try_from(len).map_err(io::Error::other)?))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.blocks(|blocks| {
            for change in std::mem::take(&mut blocks.pending) {
                change.make(&mut blocks.flushed, usize::MAX);
            }
            Ok(())
        })
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(Change::Write(usize::try_from(offset).map_err(io::Error::other)?, data.to_vec()))
    }
}

impl Opened {
    fn change(&self, change: Change) -> io::Result<()> {
        self.blocks(|blocks| {
            change.make(&mut blocks.bytes, usize::MAX);
            blocks.pending.push(change);
            Ok(())
        })
    }
}

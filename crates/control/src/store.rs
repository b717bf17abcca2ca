//! What must survive the control plane's own death: one redb file in the state directory.
//!
//! All writes go through one thread, which puts those that wait at the same moment into one transaction, so that 200
//! joins cost a handful of disk flushes. A write is acknowledged when it is on the disk. The file's revision grows with
//! each transaction.
//!
//! A transaction that fails, as on a full disk, fails those who wait for it and nobody else: the library does not go on
//! with a file after an error of the disk, so the file is opened again, at once and at every further write until it can be.

use parking_lot::{Mutex, RwLock};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// A kind of record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// The store itself: format, revision, epoch.
    Meta,
    /// Registrations, by workload uid.
    Registrations,
    /// The last certificate of each workload, by uid.
    Certificates,
    /// Join tokens, by id.
    Tokens,
    /// Virtual addresses, by service.
    VirtualIps,
    /// Accepted service accounts, by service.
    Pins,
    /// How often each Enrollment was used.
    Enrollments,
}

impl Table {
    /// Every table, for backups.
    pub const ALL: [Table; 7] = [
        Table::Meta,
        Table::Registrations,
        Table::Certificates,
        Table::Tokens,
        Table::VirtualIps,
        Table::Pins,
        Table::Enrollments,
    ];

    /// Its name in the file and in backups.
    pub const fn name(self) -> &'static str {
        match self {
            Table::Meta => "meta",
            Table::Registrations => "registrations",
            Table::Certificates => "certificates",
            Table::Tokens => "tokens",
            Table::VirtualIps => "virtual-ips",
            Table::Pins => "pins",
            Table::Enrollments => "enrollments",
        }
    }

    const fn definition(self) -> TableDefinition<'static, &'static str, &'static [u8]> {
        TableDefinition::new(self.name())
    }
}

/// Why the store cannot be opened or used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has it open.
    #[error("{} is in use by another control plane; stop that one, or use another --state directory", .path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// Its content does not verify.
    #[error(
        "{} is damaged ({reason}); nothing was changed. Move it away and restore a backup with \
         `sheer control restore -i FILE`, or start without it: proxies then have to join again", .path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What does not verify.
        reason: String,
    },
    /// A newer or older format.
    #[error("{} was written by another version of sheer (format {found}, this one reads {expected})", .path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What it says.
        found: u32,
        /// What is understood.
        expected: u32,
    },
    /// The file system refused.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A transaction failed; nothing of it is in force.
    #[error("the state could not be written: {0}; check free space and health of the disk")]
    Write(String),
    /// A record cannot be read back.
    #[error("record '{key}' of table '{table}' cannot be read: {reason}")]
    Record {
        /// The table.
        table: &'static str,
        /// The key.
        key: String,
        /// Why.
        reason: String,
    },
    /// The writer has stopped because the control plane ends.
    #[error("the control plane is stopping")]
    Stopped,
}

const FORMAT: u32 = 1;

/// Keys and encoded values, ordered by key.
pub type Records = Vec<(String, Vec<u8>)>;

type Completion = Box<dyn FnOnce(Result<(), String>) + Send>;
/// A change, which is told when there is no transaction for it.
type Job = Box<dyn FnOnce(Result<&Transaction<'_>, &str>) -> Completion + Send>;

/// Jobs that may wait for the disk: as many as a herd of 200 proxies sends in its first seconds, and some.
const QUEUE: usize = 1024;

/// Jobs in one transaction.
const BATCH: usize = 256;

/// The open store. Clones share it.
#[derive(Clone)]
pub struct Store {
    file: Arc<StateFile>,
    jobs: mpsc::Sender<Job>,
    revision: Arc<AtomicU64>,
    epoch: u64,
}

/// A disk that a test puts in the place of the state file: one that loses what was not flushed.
pub trait Medium: std::fmt::Debug + Send + Sync {
    /// Opens it, and makes what is missing.
    ///
    /// # Errors
    /// When it fails.
    fn open(&self) -> Result<Database, redb::DatabaseError>;
}

/// The file, and how it is doing.
struct StateFile {
    path: PathBuf,
    /// What is there instead of a file.
    medium: Option<Arc<dyn Medium>>,
    /// None while it cannot be opened again after an error.
    db: RwLock<Option<Database>>,
    /// Why the last write failed.
    trouble: Mutex<Option<String>>,
    /// Something that nobody waited for was not written.
    lost: AtomicBool,
}

impl StateFile {
    fn read<T>(&self, read: impl FnOnce(&redb::ReadTransaction) -> Result<T, StoreError>) -> Result<T, StoreError> {
        // Held while it is read: the file can only be opened again when nobody has it open.
        let db = self.db.read();
        match &*db {
            Some(db) => read(&db.begin_read().map_err(write_error)?),
            None => Err(StoreError::Write(self.trouble.lock().clone().unwrap_or_default())),
        }
    }

    /// Opens it again after an error.
    fn reopen(&self) -> Result<(), StoreError> {
        let mut db = self.db.write();
        *db = None;
        *db = Some(open_on(self.medium.as_ref(), &self.path, false)?);
        Ok(())
    }
}

impl Store {
    /// Opens `sheer.redb` in the state directory; makes both when they are missing.
    ///
    /// # Errors
    /// When another process has it open, when it is damaged, or when the directory cannot be used.
    pub fn open(directory: &Path) -> Result<Self, StoreError> {
        Self::open_with(directory, None)
    }

    /// The same; on a medium in the file's place the writer is a task of this runtime instead of a thread, so that
    /// simulated time rules it.
    ///
    /// # Errors
    /// The same.
    pub fn open_with(directory: &Path, medium: Option<Arc<dyn Medium>>) -> Result<Self, StoreError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| StoreError::Io { path, source }
        };
        crate::file::private_directory(directory).map_err(io(directory))?;
        let path = directory.join("sheer.redb");
        let db = RwLock::new(Some(open_on(medium.as_ref(), &path, true)?));
        let (trouble, lost) = (Mutex::default(), AtomicBool::new(false));
        let file = Arc::new(StateFile { path: path.clone(), medium, db, trouble, lost });
        let meta = |key: &str| file.read(|transaction| read_of::<u64>(transaction, Table::Meta, key));
        let (format, revision, epoch) = (meta("format")?, meta("revision")?, meta("epoch")?);
        if let Some(found) = format.filter(|found| *found != u64::from(FORMAT)) {
            return Err(StoreError::Format { path, found: u32::try_from(found).unwrap_or(0), expected: FORMAT });
        }
        let revision = Arc::new(AtomicU64::new(revision.unwrap_or(0)));
        let epoch = epoch.unwrap_or(1);
        let (jobs, waiting) = mpsc::channel(QUEUE);
        let mut writer = Writer { file: file.clone(), revision: revision.clone(), waiting };
        if format.is_none() {
            let (job, mut written) = job::<_, StoreError>(move |transaction| {
                transaction.put(Table::Meta, "format", &u64::from(FORMAT))?;
                transaction.put(Table::Meta, "epoch", &epoch)
            });
            writer.write(&mut vec![job]);
            written.try_recv().map_err(|_| StoreError::Stopped)??;
        }
        match &file.medium {
            None => drop(std::thread::spawn(move || writer.run())),
            Some(_) => drop(tokio::spawn(writer.run_here())),
        }
        Ok(Self { file, jobs, revision, epoch })
    }

    /// Why the last write failed, while none has succeeded since.
    pub fn trouble(&self) -> Option<String> {
        self.file.trouble.lock().clone()
    }

    /// Whether something that [`Store::write_later`] took was not written; asked once.
    pub fn take_lost(&self) -> bool {
        self.file.lost.swap(false, Ordering::AcqRel)
    }

    /// How often the file was written.
    pub fn revision(&self) -> u64 {
        self.revision.load(Ordering::Acquire)
    }

    /// Changes when a backup was restored: versions from before mean nothing to those after.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// One record.
    ///
    /// # Errors
    /// When the file cannot be read or the record is not of this type.
    pub fn read<T: DeserializeOwned>(&self, table: Table, key: &str) -> Result<Option<T>, StoreError> {
        self.file.read(|transaction| read_of(transaction, table, key))
    }

    /// All records of a table, ordered by key.
    ///
    /// # Errors
    /// When the file cannot be read or a record is not of this type.
    pub fn list<T: DeserializeOwned>(&self, table: Table) -> Result<Vec<(String, T)>, StoreError> {
        self.raw(table)?.into_iter().map(|(key, value)| decode(table, &key, &value).map(|value| (key, value))).collect()
    }

    fn raw(&self, table: Table) -> Result<Records, StoreError> {
        self.file.read(|transaction| raw_of(transaction, table))
    }

    /// All tables as of one moment.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn image(&self) -> Result<Vec<(Table, Records)>, StoreError> {
        self.file
            .read(|transaction| Table::ALL.into_iter().map(|table| Ok((table, raw_of(transaction, table)?))).collect())
    }

    /// Runs `change` and returns when what it wrote is on the disk. `change` must check before it writes: when it
    /// fails, what it wrote before that stays. Not cancel safe in the sense that a dropped call may still be carried out.
    ///
    /// # Errors
    /// What `change` returns, or [`StoreError::Write`] when the transaction failed.
    pub async fn write<T, E>(
        &self,
        change: impl FnOnce(&Transaction<'_>) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
    {
        let (job, answer) = job(change);
        self.jobs.send(job).await.map_err(|_| StoreError::Stopped)?;
        answer.await.map_err(|_| StoreError::Stopped)?
    }

    /// [`Store::write`] for callers without a runtime.
    ///
    /// # Errors
    /// The same.
    pub fn write_now<T, E>(
        &self,
        change: impl FnOnce(&Transaction<'_>) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
    {
        let (job, mut answer) = job(change);
        // Used where no runtime runs, or before one serves: a short wait is allowed, a panic inside a runtime is not.
        let mut job = Some(job);
        loop {
            if let Some(waiting) = job.take() {
                match self.jobs.try_send(waiting) {
                    Ok(()) => {}
                    Err(mpsc::error::TrySendError::Full(back)) => job = Some(back),
                    Err(mpsc::error::TrySendError::Closed(_)) => return Err(StoreError::Stopped.into()),
                }
            }
            match answer.try_recv() {
                Ok(result) => return result,
                Err(oneshot::error::TryRecvError::Empty) => std::thread::sleep(Duration::from_micros(200)),
                Err(oneshot::error::TryRecvError::Closed) => return Err(StoreError::Stopped.into()),
            }
        }
    }

    /// Queues a write whose success nobody waits for. A failure is remembered for [`Store::take_lost`].
    pub fn write_later(&self, change: impl FnOnce(&Transaction<'_>) -> Result<(), StoreError> + Send + 'static) {
        let file = self.file.clone();
        let job: Job = Box::new(move |transaction| {
            let changed = transaction.is_ok_and(|transaction| change(transaction).is_ok());
            Box::new(move |committed| {
                if !changed || committed.is_err() {
                    file.lost.store(true, Ordering::Release);
                }
            })
        });
        if self.jobs.try_send(job).is_err() {
            self.file.lost.store(true, Ordering::Release);
            tracing::warn!("the state's write queue is full; what was to be written is written later");
        }
    }
}

fn job<T, E>(
    change: impl FnOnce(&Transaction<'_>) -> Result<T, E> + Send + 'static,
) -> (Job, oneshot::Receiver<Result<T, E>>)
where
    T: Send + 'static,
    E: From<StoreError> + Send + 'static,
{
    let (tell, answer) = oneshot::channel();
    let job: Job = Box::new(move |transaction| {
        let result = match transaction {
            Ok(transaction) => change(transaction),
            Err(reason) => Err(StoreError::Write(reason.to_owned()).into()),
        };
        Box::new(move |committed| {
            let result = match committed {
                Ok(()) => result,
                Err(reason) => Err(StoreError::Write(reason).into()),
            };
            // Nobody may be waiting any more: a dropped call.
            let _ = tell.send(result);
        })
    });
    (job, answer)
}

fn write_error(error: impl std::fmt::Display) -> StoreError {
    StoreError::Write(error.to_string())
}

fn decode<T: DeserializeOwned>(table: Table, key: &str, value: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(value).map_err(|error| StoreError::Record {
        table: table.name(),
        key: key.to_owned(),
        reason: error.to_string(),
    })
}

fn read_of<T: DeserializeOwned>(
    transaction: &redb::ReadTransaction,
    table: Table,
    key: &str,
) -> Result<Option<T>, StoreError> {
    let opened = match transaction.open_table(table.definition()) {
        Ok(opened) => opened,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
        Err(error) => return Err(write_error(error)),
    };
    let found = opened.get(key).map_err(write_error)?;
    found.map(|value| decode(table, key, value.value())).transpose()
}

fn raw_of(transaction: &redb::ReadTransaction, table: Table) -> Result<Records, StoreError> {
    let opened = match transaction.open_table(table.definition()) {
        Ok(opened) => opened,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
        Err(error) => return Err(write_error(error)),
    };
    let mut found = Vec::new();
    for entry in opened.iter().map_err(write_error)? {
        let (key, value) = entry.map_err(write_error)?;
        found.push((key.value().to_owned(), value.value().to_vec()));
    }
    Ok(found)
}

/// Tries again for a second while the file is in use: a control plane that is being replaced is about to let it go.
fn patiently(open: impl Fn() -> Result<Database, StoreError>) -> Result<Database, StoreError> {
    let mut tries = 0;
    loop {
        match open() {
            Err(StoreError::InUse { .. }) if tries < 20 => std::thread::sleep(Duration::from_millis(50)),
            other => return other,
        }
        tries += 1;
    }
}

/// Opens what the state is on; makes it where it is missing and that is allowed.
fn open_on(medium: Option<&Arc<dyn Medium>>, path: &Path, create: bool) -> Result<Database, StoreError> {
    match medium.cloned() {
        None => patiently(|| open(path, create)),
        Some(medium) => verified(path, move || medium.open()),
    }
}

/// Opens the file; makes it where it is missing and that is allowed.
fn open(path: &Path, create: bool) -> Result<Database, StoreError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(create).truncate(false).mode(0o600);
    let file = options.open(path).map_err(|source| StoreError::Io { path: path.to_owned(), source })?;
    verified(path, move || Database::builder().create_file(file))
}

/// Opens the state and verifies all of its checksums: a damaged file is refused before anything is served from it.
fn verified(path: &Path, open: impl FnOnce() -> Result<Database, redb::DatabaseError>) -> Result<Database, StoreError> {
    let damaged = |reason: String| StoreError::Damaged { path: path.to_owned(), reason };
    // The library asserts what a damaged file can break; such a panic is a finding about the file, not about us.
    let opened = std::panic::catch_unwind(AssertUnwindSafe(|| {
        let mut db = open()?;
        db.check_integrity().map(|sound| (db, sound))
    }));
    match opened {
        Ok(Ok((db, sound))) => {
            if !sound {
                tracing::warn!(path = %path.display(), "the state file was repaired after a crash");
            }
            Ok(db)
        }
        Ok(Err(redb::DatabaseError::DatabaseAlreadyOpen)) => Err(StoreError::InUse { path: path.to_owned() }),
        Ok(Err(redb::DatabaseError::Storage(redb::StorageError::Io(source)))) => match source.kind() {
            std::io::ErrorKind::InvalidData | std::io::ErrorKind::UnexpectedEof => Err(damaged(source.to_string())),
            _ => Err(StoreError::Io { path: path.to_owned(), source }),
        },
        Ok(Err(error)) => Err(damaged(error.to_string())),
        Err(_) => Err(damaged("its structure is inconsistent".to_owned())),
    }
}

/// A transaction as a change sees it.
pub struct Transaction<'a> {
    inner: &'a redb::WriteTransaction,
}

impl Transaction<'_> {
    /// One record.
    ///
    /// # Errors
    /// When the file cannot be read or the record is not of this type.
    pub fn read<T: DeserializeOwned>(&self, table: Table, key: &str) -> Result<Option<T>, StoreError> {
        let opened = self.inner.open_table(table.definition()).map_err(write_error)?;
        let found = opened.get(key).map_err(write_error)?;
        found.map(|value| decode(table, key, value.value())).transpose()
    }

    /// Writes a record.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn put<T: Serialize>(&self, table: Table, key: &str, value: &T) -> Result<(), StoreError> {
        self.put_raw(table, key, &serde_json::to_vec(value).map_err(write_error)?)
    }

    pub(crate) fn put_raw(&self, table: Table, key: &str, value: &[u8]) -> Result<(), StoreError> {
        let mut opened = self.inner.open_table(table.definition()).map_err(write_error)?;
        opened.insert(key, value).map_err(write_error)?;
        Ok(())
    }

    /// Removes a record, if it is there.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn remove(&self, table: Table, key: &str) -> Result<(), StoreError> {
        let mut opened = self.inner.open_table(table.definition()).map_err(write_error)?;
        opened.remove(key).map_err(write_error)?;
        Ok(())
    }
}

struct Writer {
    file: Arc<StateFile>,
    revision: Arc<AtomicU64>,
    waiting: mpsc::Receiver<Job>,
}

impl Writer {
    fn run(mut self) {
        let mut jobs = Vec::new();
        while self.waiting.blocking_recv_many(&mut jobs, BATCH) > 0 {
            self.write(&mut jobs);
        }
    }

    /// The same as a task.
    async fn run_here(mut self) {
        let mut jobs = Vec::new();
        while self.waiting.recv_many(&mut jobs, BATCH).await > 0 {
            self.write(&mut jobs);
        }
    }

    /// Writes what waits, in one transaction, and tells those who wait for it.
    fn write(&mut self, jobs: &mut Vec<Job>) {
        let mut completions = Vec::with_capacity(jobs.len());
        let committed = self.commit(jobs, &mut completions);
        self.note(committed.as_ref().err());
        if let Err(reason) = &committed {
            // Those for whom there was no transaction.
            completions.extend(jobs.drain(..).map(|job| job(Err(reason))));
            // So that others can read, and the next write finds a file to write to.
            if let Err(error) = self.file.reopen() {
                tracing::debug!(%error, "the state file cannot be opened again yet");
            }
        }
        for completion in completions {
            completion(committed.clone());
        }
    }

    /// Tells when it begins to fail, and when it succeeds again.
    fn note(&self, reason: Option<&String>) {
        let before = std::mem::replace(&mut *self.file.trouble.lock(), reason.cloned());
        match (before, reason) {
            (None, Some(reason)) => tracing::error!(
                path = %self.file.path.display(), %reason,
                "the state cannot be written: nobody can join until there is room; what is delivered goes on"
            ),
            (Some(_), None) => tracing::info!("the state can be written again"),
            (None, None) | (Some(_), Some(_)) => {}
        }
    }

    fn commit(&self, jobs: &mut Vec<Job>, completions: &mut Vec<Completion>) -> Result<(), String> {
        let said = |error: &dyn std::fmt::Display| error.to_string();
        if self.file.db.read().is_none() {
            self.file.reopen().map_err(|error| said(&error))?;
        }
        let db = self.file.db.read();
        let db = db.as_ref().ok_or("the state file is not open")?;
        let transaction = db.begin_write().map_err(|error| said(&error))?;
        let view = Transaction { inner: &transaction };
        for job in jobs.drain(..) {
            completions.push(job(Ok(&view)));
        }
        let revision = self.revision.load(Ordering::Acquire) + 1;
        view.put(Table::Meta, "revision", &revision).map_err(|error| said(&error))?;
        transaction.commit().map_err(|error| said(&error))?;
        self.revision.store(revision, Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open_file(directory: &Path) -> Result<Database, StoreError> {
        let path = directory.join("sheer.redb");
        open(&path, false)
    }

    #[test]
    fn keeps_what_was_acknowledged() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let put = |transaction: &Transaction<'_>| transaction.put(Table::Pins, "default/web", &vec!["web"]);
        store.write_now::<_, StoreError>(put).unwrap();
        let before = store.revision();
        assert!(matches!(Store::open(directory.path()), Err(StoreError::InUse { .. })));
        drop(store);
        let store = Store::open(directory.path()).unwrap();
        assert_eq!(store.read::<Vec<String>>(Table::Pins, "default/web").unwrap(), Some(vec!["web".to_owned()]));
        assert_eq!(store.revision(), before);
    }

    #[test]
    fn the_directory_and_the_file_are_private() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        let _store = Store::open(&state).unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&state), 0o700);
        assert_eq!(mode(&state.join("sheer.redb")), 0o600);
    }

    #[test]
    fn a_damaged_file_is_refused_and_left_alone() {
        for damage in [0usize, 70, 4096, 5000, 9000] {
            let directory = tempfile::tempdir().unwrap();
            let store = Store::open(directory.path()).unwrap();
            for number in 0..200 {
                let key = format!("default/{number}");
                store
                    .write_now::<_, StoreError>(move |transaction| transaction.put(Table::Pins, &key, &vec!["web"; 20]))
                    .unwrap();
            }
            drop(store);
            // Opened once more, so that nobody holds the file any longer.
            drop(patiently(|| open_file(directory.path())).unwrap());
            let path = directory.path().join("sheer.redb");
            let mut bytes = std::fs::read(&path).unwrap();
            // Every 64th byte from there on: whatever page is in use is hit.
            let end = bytes.len();
            bytes[damage..end].iter_mut().step_by(64).for_each(|byte| *byte ^= 0x55);
            std::fs::write(&path, &bytes).unwrap();
            match Store::open(directory.path()) {
                Err(StoreError::Damaged { .. }) => {}
                Err(other) => panic!("{damage}: {other}"),
                Ok(_) => panic!("{damage}: opened"),
            }
        }
    }

    #[test]
    fn a_truncated_file_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        drop(Store::open(directory.path()).unwrap());
        drop(patiently(|| open_file(directory.path())).unwrap());
        let path = directory.path().join("sheer.redb");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 3]).unwrap();
        assert!(matches!(Store::open(directory.path()), Err(StoreError::Damaged { .. })));
    }
}

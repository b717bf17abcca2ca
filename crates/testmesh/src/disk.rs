//! A file system that errs when it is told to: FUSE over a directory, as a disk that fails behaves.

use crate::net::Host;
use crate::program::{Program, run};
use crate::wait;
use anyhow::{Context, Result, ensure};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The system's own, which has the package; another may come first on the PATH.
const PYTHON: &str = "/usr/bin/python3";

/// Passes everything on to a directory. What is written fares as the file beside it says.
const PASS_ON: &str = r#"
import errno, os, sys
from fusepy import FUSE, FuseOSError, Operations, fuse_get_context
root, mount, mood = sys.argv[1:4]

def now():
    with open(mood) as file: return file.read().strip()

def err():
    print("erred", flush=True)
    raise FuseOSError(errno.EIO)

def sick(*moods):
    if now() in ("errors", *moods): err()

class Disk(Operations):
    def __call__(self, name, path, *rest):
        return super().__call__(name, root + path, *rest)
    def _owned(self, path):
        uid, gid, _ = fuse_get_context()
        os.chown(path, uid, gid)
    getattr = lambda self, path, handle=None: {key: getattr(os.lstat(path), key) for key in (
        "st_atime", "st_ctime", "st_gid", "st_mode", "st_mtime", "st_nlink", "st_size", "st_uid", "st_blocks")}
    readdir = lambda self, path, handle: [".", "..", *os.listdir(path)]
    readlink = lambda self, path: os.readlink(path)
    statfs = lambda self, path: {key: getattr(os.statvfs(path), key) for key in (
        "f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_favail", "f_ffree", "f_files", "f_flag", "f_frsize", "f_namemax")}
    access = lambda self, path, mode: 0
    def mkdir(self, path, mode):
        sick()
        os.mkdir(path, mode)
        self._owned(path)
    def rmdir(self, path): os.rmdir(path)
    def unlink(self, path): os.unlink(path)
    def rename(self, old, new):
        sick()
        os.rename(old, root + new)
    def chmod(self, path, mode): os.chmod(path, mode)
    def chown(self, path, uid, gid): os.chown(path, uid, gid)
    def utimens(self, path, times=None): os.utime(path, times)
    def open(self, path, flags): return os.open(path, flags & ~os.O_APPEND)
    def create(self, path, mode, info=None):
        sick()
        handle = os.open(path, os.O_RDWR | os.O_CREAT, mode)
        self._owned(path)
        return handle
    def read(self, path, size, offset, handle): return os.pread(handle, size, offset)
    def write(self, path, data, offset, handle):
        mood = now()
        if mood == "errors": err()
        if mood in ("short", "torn") and len(data) > 1: data = data[:len(data) // 2]
        written = os.pwrite(handle, data, offset)
        # A part of it is there, and nobody is told how much.
        if mood == "torn": err()
        return written
    def truncate(self, path, length, handle=None):
        sick()
        os.truncate(path, length)
    def flush(self, path, handle): return 0
    def release(self, path, handle): return os.close(handle)
    def fsync(self, path, datasync, handle):
        sick("torn")
        os.fsync(handle)
    def fsyncdir(self, path, datasync, handle): sick("torn")

FUSE(Disk(), mount, foreground=True, nothreads=True, allow_other=True, default_permissions=True, attr_timeout=0)
"#;

/// How what is written fares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    /// It is written.
    Well,
    /// EIO, and nothing is written.
    Errors,
    /// Half of each piece is written, and the writer is told that it is half.
    Short,
    /// Half of each piece is written, and then there is an error.
    Torn,
}

/// A mounted file system. It ends when this is dropped.
pub struct Disk {
    /// Where what was written is really, whatever the file system says.
    pub beneath: PathBuf,
    mood: PathBuf,
    program: Program,
}

impl Disk {
    /// Mounts one at this directory of a host, which then has this mode, with its files below `home`.
    ///
    /// # Errors
    /// When there is no FUSE.
    pub fn mount(host: &Host, at: &Path, mode: u32, home: &Path) -> Result<Self> {
        ensure!(Path::new("/dev/fuse").exists(), "this kernel has no FUSE (/dev/fuse)");
        let beneath = home.join("beneath");
        std::fs::create_dir_all(&beneath)?;
        std::fs::create_dir_all(at)?;
        let (mood, script) = (home.join("mood"), home.join("disk.py"));
        std::fs::write(&script, PASS_ON)?;
        std::fs::write(&mood, "well")?;
        std::fs::set_permissions(&beneath, std::fs::Permissions::from_mode(mode))?;
        let mut command = host.command(PYTHON);
        command.arg(&script).arg(&beneath).arg(at).arg(&mood);
        let program = Program::start("disk", home, &mut command)?;
        wait::until("the file system is mounted", Duration::from_secs(10), || {
            run(host.command("mountpoint").arg("-q").arg(at)).with_context(|| program.output())
        })?;
        Ok(Self { beneath, mood, program })
    }

    /// How often it has erred.
    pub fn erred(&self) -> usize {
        self.program.output().matches("erred").count()
    }

    /// Changes how what is written fares.
    ///
    /// # Errors
    /// When it cannot be told.
    pub fn becomes(&self, mood: Mood) -> Result<()> {
        let staged = self.mood.with_extension("new");
        std::fs::write(&staged, format!("{mood:?}").to_lowercase())?;
        Ok(std::fs::rename(staged, &self.mood)?)
    }
}

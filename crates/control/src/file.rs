//! Files that hold secrets or state: private modes, and replaced in one step.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// Creates a directory for this user alone (0700), with its parents. One that exists is narrowed to it.
pub(crate) fn private_directory(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o700))
}

/// Replaces a file: written beside it with mode `mode`, made durable, then renamed, so that a reader finds the old or
/// the new content and a crash leaves one of them.
pub(crate) fn replace(path: &Path, mode: u32, content: &[u8]) -> io::Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let staged = parent.join(format!(".{name}.{:08x}", rand::random::<u32>()));
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&staged)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&staged, path)
    };
    if let Err(error) = write() {
        // What could not be staged is of no use to anybody; the first error is the one that matters.
        let _ = fs::remove_file(&staged);
        return Err(error);
    }
    File::open(parent)?.sync_all()
}

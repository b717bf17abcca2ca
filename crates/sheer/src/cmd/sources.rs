//! The YAML files that `apply`, `diff` and `lint` are given.

use anyhow::{Context as _, bail};
use sheer_core::api::SourceFile;
use std::io::Read as _;
use std::path::{Path, PathBuf};

/// The largest file that is read, and the largest sum: far above real ones, far below the memory.
const MAX_BYTES: u64 = 16 << 20;

/// Reads files, all `.yaml`, `.yml` and `.json` files of directories, and standard input for `-`.
///
/// # Errors
/// When one cannot be read, or a directory holds none.
pub(crate) fn read(paths: &[PathBuf]) -> anyhow::Result<Vec<SourceFile>> {
    let mut files = Vec::new();
    for path in paths {
        if path.as_os_str() == "-" {
            let mut text = String::new();
            std::io::stdin()
                .take(MAX_BYTES)
                .read_to_string(&mut text)
                .context("cannot read objects from standard input")?;
            files.push(SourceFile { name: "-".into(), text });
        } else if path.is_dir() {
            let before = files.len();
            directory(path, &mut files)?;
            if files.len() == before {
                bail!("{} holds no .yaml, .yml or .json file", path.display());
            }
        } else {
            files.push(file(path)?);
        }
    }
    Ok(files)
}

/// Files of a directory in the order of their names; hidden ones are left out.
fn directory(path: &Path, files: &mut Vec<SourceFile>) -> anyhow::Result<()> {
    let context = || format!("cannot list {}", path.display());
    let mut entries =
        std::fs::read_dir(path).and_then(|entries| entries.collect::<Result<Vec<_>, _>>()).with_context(context)?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let (name, path) = (entry.file_name(), entry.path());
        let kind = std::fs::metadata(&path).with_context(|| format!("cannot look at {}", path.display()))?;
        if name.to_string_lossy().starts_with('.') {
            continue;
        } else if kind.is_dir() {
            directory(&path, files)?;
        } else if path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json") {
            files.push(file(&path)?);
        }
    }
    Ok(())
}

fn file(path: &Path) -> anyhow::Result<SourceFile> {
    let context = || format!("cannot read {}", path.display());
    let size = std::fs::metadata(path).with_context(context)?.len();
    if size > MAX_BYTES {
        bail!("{} has {size} bytes; a configuration file has at most {MAX_BYTES}", path.display());
    }
    let bytes = std::fs::read(path).with_context(context)?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let line = error.as_bytes()[..error.utf8_error().valid_up_to()].split(|byte| *byte == b'\n').count();
        anyhow::anyhow!("{}:{line}: this is no UTF-8 text", path.display())
    })?;
    Ok(SourceFile { name: path.display().to_string(), text })
}

//! Where Sheer keeps things on a host.
//!
//! | | root | other users |
//! |---|---|---|
//! | sockets, pids | `/run/sheer` | `$XDG_RUNTIME_DIR/sheer`; without one `$TMPDIR/sheer-UID` or `/tmp/sheer-UID` |
//! | state, keys | `/var/lib/sheer` | `$XDG_STATE_HOME/sheer`, or `~/.local/state/sheer` |
//! | what people write | `/etc/sheer/mesh.d` | `$XDG_CONFIG_HOME/sheer/mesh.d`, or `~/.config/sheer/mesh.d` |

use anyhow::{Context as _, bail};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// The directories of one user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Dirs {
    /// Sockets: gone after a reboot.
    pub(crate) runtime: PathBuf,
    /// Keys, certificates, registrations.
    pub(crate) state: PathBuf,
    /// Configuration.
    pub(crate) config: PathBuf,
}

impl Dirs {
    /// Those of the user that runs this process. Nothing is created.
    ///
    /// # Errors
    /// When the user has no home directory and the variables that would replace it are not set, or when the directory
    /// of sockets is somebody else's.
    pub(crate) fn of_user() -> anyhow::Result<Self> {
        let variable = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let uid = nix::unistd::geteuid().as_raw();
        let dirs = Self::find(uid, variable)?;
        // Where anybody may make directories, somebody else may have made this one: what it says must not be believed.
        match uid {
            0 => Ok(dirs),
            _ => refuse_foreign(&dirs.runtime, uid).map(|()| dirs),
        }
    }

    fn find(uid: u32, variable: impl Fn(&str) -> Option<PathBuf>) -> anyhow::Result<Self> {
        if uid == 0 {
            return Ok(Self {
                runtime: "/run/sheer".into(),
                state: "/var/lib/sheer".into(),
                config: "/etc/sheer/mesh.d".into(),
            });
        }
        let home = |name: &str, below: &str| {
            variable(name).or_else(|| variable("HOME").map(|home| home.join(below))).with_context(|| {
                format!("neither {name} nor HOME is set to an absolute path; set one, or name the directory by a flag")
            })
        };
        let runtime = match variable("XDG_RUNTIME_DIR") {
            Some(directory) => directory.join("sheer"),
            None => variable("TMPDIR").unwrap_or_else(|| "/tmp".into()).join(format!("sheer-{uid}")),
        };
        Ok(Self {
            runtime,
            state: home("XDG_STATE_HOME", ".local/state")?.join("sheer"),
            config: home("XDG_CONFIG_HOME", ".config")?.join("sheer/mesh.d"),
        })
    }

    /// The gRPC socket of proxies.
    pub(crate) fn control_socket(&self) -> PathBuf {
        self.runtime.join("control.sock")
    }

    /// The HTTP socket of the command line.
    pub(crate) fn api_socket(&self) -> PathBuf {
        self.runtime.join("api.sock")
    }
}

/// Creates a directory that only this user can enter, or makes sure that it is one.
///
/// # Errors
/// When it cannot be created, belongs to somebody else, or lets others in.
pub(crate) fn make_private(path: &Path) -> anyhow::Result<()> {
    if let Some(above) = path.parent() {
        make(above, 0o755)?;
    }
    make(path, 0o700)?;
    let found = std::fs::symlink_metadata(path).with_context(|| format!("cannot look at {}", path.display()))?;
    let uid = nix::unistd::geteuid().as_raw();
    if !found.is_dir() {
        bail!("{} is no directory; remove it, or name another by a flag", path.display());
    }
    if found.uid() != uid {
        bail!(
            "{} belongs to user id {}, not to this one ({uid}); remove it, or name another",
            path.display(),
            found.uid()
        );
    }
    let mode = found.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        bail!("{} lets other users in (mode {mode:o}); run 'chmod 700 {}'", path.display(), path.display());
    }
    Ok(())
}

/// Refuses a directory that exists and is another user's, writable by others, or not a directory.
fn refuse_foreign(path: &Path, uid: u32) -> anyhow::Result<()> {
    let found = match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.with_context(|| format!("cannot look at {}", path.display()))?,
    };
    if found.is_dir() && found.uid() == uid && found.permissions().mode() & 0o022 == 0 {
        return Ok(());
    }
    bail!(
        "{} is not a directory that user id {uid} alone may write to, so nothing in it is trusted; remove it, or set \
         XDG_RUNTIME_DIR to a directory of your own",
        path.display()
    )
}

/// Creates a directory and those above it, unless it exists.
///
/// # Errors
/// When it cannot be created.
pub(crate) fn make(path: &Path, mode: u32) -> anyhow::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .with_context(|| format!("cannot create the directory {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(uid: u32, variables: &[(&str, &str)]) -> anyhow::Result<Dirs> {
        Dirs::find(uid, |name| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| PathBuf::from(v)))
    }

    #[test]
    fn root_uses_the_system_and_people_their_home() {
        assert_eq!(find(0, &[("HOME", "/root")]).expect("found").state, Path::new("/var/lib/sheer"));
        let dirs = find(7, &[("HOME", "/home/ann")]).expect("found");
        assert_eq!(dirs.runtime, Path::new("/tmp/sheer-7"));
        assert_eq!(dirs.state, Path::new("/home/ann/.local/state/sheer"));
        assert_eq!(dirs.config, Path::new("/home/ann/.config/sheer/mesh.d"));
        let dirs = find(7, &[("XDG_RUNTIME_DIR", "/run/user/7"), ("XDG_STATE_HOME", "/s"), ("XDG_CONFIG_HOME", "/c")]);
        assert_eq!(dirs.expect("found").api_socket(), Path::new("/run/user/7/sheer/api.sock"));
        assert!(find(7, &[]).unwrap_err().to_string().contains("XDG_STATE_HOME"));
    }

    #[test]
    fn what_others_could_have_written_is_not_believed() {
        let above = tempfile::tempdir().expect("a directory");
        let (path, link) = (above.path().join("sheer-7"), above.path().join("link"));
        let uid = nix::unistd::geteuid().as_raw();
        refuse_foreign(&path, uid).expect("absent");
        make(&path, 0o700).expect("created");
        refuse_foreign(&path, uid).expect("own");
        assert!(refuse_foreign(&path, uid + 1).unwrap_err().to_string().contains("XDG_RUNTIME_DIR"));
        std::os::unix::fs::symlink(&path, &link).expect("linked");
        assert!(refuse_foreign(&link, uid).is_err());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).expect("changed");
        assert!(refuse_foreign(&path, uid).is_err());
    }

    #[test]
    fn a_private_directory_stays_private() {
        let above = tempfile::tempdir().expect("a directory");
        let path = above.path().join("a/b");
        make_private(&path).expect("created");
        make_private(&path).expect("found");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("changed");
        assert!(make_private(&path).unwrap_err().to_string().contains("chmod 700"));
        std::fs::write(above.path().join("file"), "").expect("written");
        assert!(make_private(&above.path().join("file")).is_err());
    }
}

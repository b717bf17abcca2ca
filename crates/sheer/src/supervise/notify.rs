//! sd_notify: the command's messages reach systemd through the supervisor, which is the unit's main process.

use anyhow::{Context, Result};
use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};

/// Passes messages on.
pub(super) struct Notify {
    inner: UnixDatagram,
    outer: SocketAddr,
    /// Where the command sends its messages.
    pub(super) path: PathBuf,
}

impl Notify {
    /// Listens in the run directory when this process was given a `NOTIFY_SOCKET`.
    pub(super) fn begin(run_dir: &Path, owner: Option<u32>) -> Result<Option<Self>> {
        let Some(outer) = std::env::var_os("NOTIFY_SOCKET").filter(|value| !value.is_empty()) else {
            return Ok(None);
        };
        let path = run_dir.join("notify.sock");
        let begin = || {
            let inner = UnixDatagram::bind(&path)?;
            inner.set_nonblocking(true)?;
            std::os::unix::fs::chown(&path, owner, None)?;
            Ok::<_, std::io::Error>(Self { inner, outer: address(&outer)?, path: path.clone() })
        };
        begin().map(Some).with_context(|| format!("cannot pass on messages to NOTIFY_SOCKET {}", outer.display()))
    }

    /// Passes on what has come. Descriptors are not passed on.
    pub(super) fn pass_on(&self) {
        let mut buffer = [0; 4096];
        while let Ok(length) = self.inner.recv(&mut buffer) {
            let text = kept(&String::from_utf8_lossy(&buffer[..length]));
            if !text.is_empty() {
                self.tell(&text);
            }
        }
    }

    /// Sends a message of our own.
    pub(super) fn tell(&self, text: &str) {
        // As sd_notify itself: nobody may be listening, and that is no fault of the workload.
        let _ = UnixDatagram::unbound().and_then(|socket| socket.send_to_addr(text.as_bytes(), &self.outer));
    }
}

impl AsFd for Notify {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

/// The main process is the supervisor and stays it.
fn kept(text: &str) -> String {
    text.lines().filter(|line| !line.starts_with("MAINPID=")).collect::<Vec<_>>().join("\n")
}

fn address(outer: &OsString) -> std::io::Result<SocketAddr> {
    match outer.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(outer),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_main_process_is_not_given_away() {
        assert_eq!(kept("READY=1\nMAINPID=77\nSTATUS=up"), "READY=1\nSTATUS=up");
        assert_eq!(kept("MAINPID=77"), "");
    }
}

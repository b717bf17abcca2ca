//! What people ask of a running supervisor, over a socket in its run directory that its own user and root may use.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The socket's name in the run directory.
const SOCKET: &str = "supervisor.sock";
/// How long who asks may take over it: a line, sent at once.
const ASK: Duration = Duration::from_secs(1);
/// The longest request.
const LONGEST: u64 = 8192;

/// A request, one JSON object on a line.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Wish {
    /// Let a proxy of this program take the place of the one that runs.
    Replace {
        /// An absolute path.
        program: PathBuf,
    },
}

/// The answer, likewise.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Answer {
    /// The new proxy serves.
    Replaced {
        /// Its process, and that of the one before.
        pid: i32,
        /// The former one, which finishes what is open.
        former: i32,
    },
    /// Nothing has changed.
    Refused {
        /// Why, for people.
        message: String,
    },
}

/// Takes requests.
pub(super) struct Requests {
    listener: UnixListener,
}

/// Somebody who waits for an answer.
pub(super) struct Asker(UnixStream);

impl Requests {
    /// Listens in the run directory.
    pub(super) fn begin(run_dir: &Path) -> Result<Self> {
        let path = run_dir.join(SOCKET);
        let listener =
            UnixListener::bind(&path).with_context(|| format!("cannot make the socket {}", path.display()))?;
        listener.set_nonblocking(true)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        Ok(Self { listener })
    }

    /// A request that has come. Who connects and says nothing is not waited for.
    pub(super) fn next(&self) -> Option<(Asker, Wish)> {
        loop {
            let (stream, _) = self.listener.accept().ok()?;
            if let Ok(wish) = read(&stream) {
                return Some((Asker(stream), wish));
            }
        }
    }
}

impl AsFd for Requests {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Asker {
    /// Answers; who has gone meanwhile hears nothing.
    pub(super) fn tell(mut self, answer: &Answer) {
        let _ = write(&mut self.0, answer);
    }
}

/// Asks the supervisor that holds this run directory, and waits for its answer.
///
/// # Errors
/// When it cannot be reached or does not answer within the limit.
pub(crate) fn ask(run_dir: &Path, wish: &Wish, limit: Duration) -> Result<Answer> {
    let path = run_dir.join(SOCKET);
    let mut stream = UnixStream::connect(&path).with_context(|| {
        format!("its supervisor takes no requests at {}; one of a former version does not", path.display())
    })?;
    stream.set_read_timeout(Some(limit))?;
    write(&mut stream, wish)?;
    read(&stream).context("its supervisor did not answer")
}

fn write(stream: &mut UnixStream, message: &impl Serialize) -> Result<()> {
    stream.set_write_timeout(Some(ASK))?;
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(stream.write_all(&line)?)
}

fn read<T: serde::de::DeserializeOwned>(stream: &UnixStream) -> Result<T> {
    stream.set_nonblocking(false)?;
    if stream.read_timeout()?.is_none() {
        stream.set_read_timeout(Some(ASK))?;
    }
    let mut line = Vec::new();
    BufReader::new(stream.take(LONGEST)).read_until(b'\n', &mut line)?;
    Ok(serde_json::from_slice(&line)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_answered_and_silence_is_not_waited_for() {
        let run = tempfile::tempdir().unwrap();
        let requests = Requests::begin(run.path()).unwrap();
        let mode = fs::metadata(run.path().join(SOCKET)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let _silent = UnixStream::connect(run.path().join(SOCKET)).unwrap();
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| {
                let wish = Wish::Replace { program: "/bin/sheer".into() };
                ask(run.path(), &wish, Duration::from_secs(10)).unwrap()
            });
            let (asker, wish) = loop {
                match requests.next() {
                    Some(request) => break request,
                    None => std::thread::yield_now(),
                }
            };
            let Wish::Replace { program } = wish;
            asker.tell(&Answer::Refused { message: format!("not {}", program.display()) });
            assert!(matches!(asked.join().unwrap(), Answer::Refused { message } if message == "not /bin/sheer"));
        });
    }
}

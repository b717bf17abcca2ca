//! Connections to mesh peers whose host has vanished: nothing closes them, and the kernel sends for a quarter of an hour
//! before it gives up.
//!
//! The kernel's own limit (TCP_USER_TIMEOUT) also ends a connection whose reader pauses, which is no fault. Here it is
//! asked what it knows: bytes that were sent again and again while nothing at all came back. A host whose application
//! pauses still answers; a host that is gone does not.

use crate::platform::{Quiet, quiet, socket_cookie};
use std::cell::RefCell;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;

/// How often the kernel is asked.
pub const PERIOD: Duration = Duration::from_millis(500);

/// The connections of one worker that are looked after.
#[derive(Debug, Default)]
pub struct Watch(RefCell<Vec<Watched>>);

/// A connection, which somebody else owns and may have closed: the number may be another socket's by now.
#[derive(Debug)]
struct Watched {
    socket: RawFd,
    cookie: u64,
    limit: Duration,
    since: Option<Instant>,
}

impl Watch {
    /// Ends this connection when bytes sent on it have been met with silence for `limit`. Until it is closed, it is looked
    /// after by [`Watch::look`] of the same thread.
    pub fn add(&self, stream: &TcpStream, limit: Duration) {
        let socket = stream.as_raw_fd();
        if let Ok(cookie) = socket_cookie(socket) {
            self.0.borrow_mut().push(Watched { socket, cookie, limit, since: None });
        }
    }

    /// Looks at every connection, and ends those whose host is gone: whoever uses one reads its end.
    pub fn look(&self) {
        let now = Instant::now();
        // Connections of this thread are closed by this thread alone, so none becomes another one in between.
        self.0.borrow_mut().retain_mut(|it| {
            if socket_cookie(it.socket).ok() != Some(it.cookie) {
                return false;
            }
            let Ok(quiet) = quiet(it.socket) else { return false };
            let vanished = it.has_vanished(quiet, now);
            if vanished {
                // A socket that is not connected any more needs no end.
                let _ = nix::sys::socket::shutdown(it.socket, nix::sys::socket::Shutdown::Both);
            }
            !vanished
        });
    }
}

impl Watched {
    fn has_vanished(&mut self, quiet: Quiet, now: Instant) -> bool {
        if quiet.resent == 0 {
            self.since = None;
            return false;
        }
        let since = *self.since.get_or_insert(now);
        now.duration_since(since).min(quiet.since_answer) >= self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::loopback;
    use tokio::io::AsyncWriteExt;

    #[test]
    fn only_silence_after_repetition_counts() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut watched = Watched { socket: -1, cookie: 0, limit: 3 * second, since: None };
        let quiet = |since_answer, resent| Quiet { since_answer, resent };
        // Idle for an hour, then bytes that are sent again: the silence begins now.
        assert!(!watched.has_vanished(quiet(3600 * second, 1), start));
        assert!(!watched.has_vanished(quiet(3602 * second, 3), start + 2 * second));
        assert!(watched.has_vanished(quiet(3603 * second, 4), start + 3 * second));
        // Something came back meanwhile.
        assert!(!watched.has_vanished(quiet(second, 5), start + 4 * second));
        assert!(!watched.has_vanished(quiet(3600 * second, 0), start + 9 * second));
        assert!(watched.since.is_none());
    }

    #[tokio::test]
    async fn a_reader_that_pauses_is_left_alone_and_closed_connections_are_forgotten() {
        let (mut near, far) = loopback().await;
        let watch = Watch::default();
        watch.add(&near, Duration::ZERO);
        // Until the other side's buffers are full.
        let full = async { while near.write(&[0; 65536]).await.is_ok() {} };
        assert!(tokio::time::timeout(Duration::from_millis(300), full).await.is_err());
        watch.look();
        assert_eq!(watch.0.borrow().len(), 1);
        drop((near, far));
        watch.look();
        assert!(watch.0.borrow().is_empty());
    }
}

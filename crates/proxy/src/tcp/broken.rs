//! Notices that a connection was reset while nobody reads from it.

use crate::io::Io;
use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};

/// How long a connection may go unread before it is looked after: a reader that is slow for a moment costs nothing, and a
/// reset is still passed on within a tenth of a second.
const MOMENT: Duration = Duration::from_millis(50);

/// How many connections a worker looks after in that way: descriptors are for connections.
const MOST: usize = 32;

/// How often the others are asked.
const QUESTION: Duration = Duration::from_secs(1);

thread_local! {
    /// How many connections this worker looks after.
    static LOOKING: Cell<usize> = const { Cell::new(0) };
}

/// Looks after one connection, from when it is asked to until it may rest.
///
/// Readiness to read says nothing of a connection that has closed, since it stays, or that has bytes which nobody wants
/// yet. So a second descriptor is registered with the runtime and asked for errors alone, for as long as it is needed; when
/// there are many such connections, the kernel is asked about the others every second.
#[derive(Default)]
pub(super) enum Broken {
    /// Somebody reads, and meets the reset.
    #[default]
    Resting,
    /// Nobody has read for a moment.
    Waiting(Pin<Box<Sleep>>),
    /// Ready when there was a reset.
    Looking(Pin<Box<dyn Future<Output = ()>>>),
    /// The next question.
    Asking(Pin<Box<Sleep>>),
}

impl Broken {
    /// Somebody reads again.
    pub(super) fn rest(&mut self) {
        *self = Broken::Resting;
    }

    /// Looks, at once or after a moment.
    ///
    /// # Errors
    /// The connection was reset.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, io: &Io, after_a_moment: bool) -> io::Result<()> {
        if matches!(self, Broken::Resting) && after_a_moment {
            *self = Broken::Waiting(Box::pin(sleep(MOMENT)));
        }
        if let Broken::Waiting(moment) = self
            && after_a_moment
            && moment.as_mut().poll(cx).is_pending()
        {
            return Ok(());
        }
        if matches!(self, Broken::Resting | Broken::Waiting(_)) {
            *self = match Looker::new(io) {
                Some(looker) => Broken::Looking(Box::pin(looker.reset())),
                None => Broken::Asking(Box::pin(sleep(QUESTION))),
            };
        }
        match self {
            Broken::Looking(reset) => match reset.as_mut().poll(cx) {
                Poll::Ready(()) => Err(io::ErrorKind::ConnectionReset.into()),
                Poll::Pending => Ok(()),
            },
            Broken::Asking(next) => {
                while next.as_mut().poll(cx).is_ready() {
                    if let Some(error) = io.socket().and_then(|socket| socket.take_error().ok()?) {
                        return Err(error);
                    }
                    next.as_mut().reset(Instant::now() + QUESTION);
                }
                Ok(())
            }
            Broken::Resting | Broken::Waiting(_) => Ok(()),
        }
    }
}

/// A connection's second descriptor, one of a few.
struct Looker(TcpStream);

impl Looker {
    /// `None` when there are enough of them, or none can be had.
    fn new(io: &Io) -> Option<Self> {
        if LOOKING.get() >= MOST {
            return None;
        }
        let copy: OwnedFd = io.socket()?.as_fd().try_clone_to_owned().ok()?;
        let copy = TcpStream::from_std(copy.into()).ok()?;
        LOOKING.set(LOOKING.get() + 1);
        Some(Self(copy))
    }

    /// Ready when the connection is reset.
    async fn reset(self) {
        if self.0.ready(Interest::ERROR).await.is_err() {
            std::future::pending().await
        }
    }
}

impl Drop for Looker {
    fn drop(&mut self) {
        LOOKING.set(LOOKING.get() - 1);
    }
}

/// How many connections this thread looks after.
#[cfg(test)]
pub(super) fn looked_after() -> usize {
    LOOKING.get()
}

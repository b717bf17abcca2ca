//! Notices that a connection was reset while nobody reads from it.

use crate::io::Io;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};

/// How long a connection may go unread before it is looked after: a reader that is slow for a moment costs nothing, and a
/// reset is still passed on within a tenth of a second.
const MOMENT: Duration = Duration::from_millis(50);

/// Looks after one connection, from when it is asked to until it may rest.
///
/// Readiness to read says nothing of a connection that has closed, since it stays, or that has bytes which nobody wants
/// yet. So a second descriptor is registered with the runtime and asked for errors alone, for as long as it is needed.
#[derive(Default)]
pub(super) enum Broken {
    /// Somebody reads, and meets the reset.
    #[default]
    Resting,
    /// Nobody has read for a moment.
    Waiting(Pin<Box<Sleep>>),
    /// Ready when there was a reset.
    Looking(Pin<Box<dyn Future<Output = ()>>>),
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
        if !matches!(self, Broken::Looking(_)) {
            let socket = io.socket().and_then(|socket| socket.as_fd().try_clone_to_owned().ok());
            *self = Broken::Looking(Box::pin(reset(socket)));
        }
        match self {
            Broken::Looking(reset) => match reset.as_mut().poll(cx) {
                Poll::Ready(()) => Err(io::ErrorKind::ConnectionReset.into()),
                Poll::Pending => Ok(()),
            },
            Broken::Resting | Broken::Waiting(_) => Ok(()),
        }
    }
}

/// Ready when a connection is reset. Without a socket, or where it cannot be looked after, never: its end is then noticed
/// by whoever uses it next.
async fn reset(socket: Option<OwnedFd>) {
    if let Some(Ok(socket)) = socket.map(|socket| TcpStream::from_std(socket.into()))
        && socket.ready(Interest::ERROR).await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

//! How slowly a client whom nobody knows may send a body or take an answer, so that it cannot hold a connection, and one
//! to the application with it, by trickling.
//!
//! Only time in which the client is waited for counts. A body without a length may pause, and counts as moving while the
//! answer to it does. A workload of the mesh may pause for as long as it likes: it has a
//! name, and its pauses are its application's.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, Sleep, sleep};

/// At least so much in so much waiting.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// While the client was waited for.
    pub within: Duration,
    /// Bytes that must have moved meanwhile.
    pub bytes: u64,
}

impl Pace {
    /// That of clients whom nobody knows: a telephone at the edge of its network sends a hundred times as much.
    pub const OF_STRANGERS: Pace = Pace { within: Duration::from_secs(60), bytes: 4096 };

    /// That of a body whose length nobody has announced. It may be a conversation, in which both sides pause; one in
    /// which neither has said anything for five minutes, as proxies elsewhere have it, is left.
    pub const OF_CONVERSATIONS: Pace = Pace { within: Duration::from_secs(300), bytes: 1 };
}

/// Watches one direction of one connection. One timer for as long as there is anything to wait for.
#[derive(Debug)]
pub(crate) struct Watch {
    pace: Pace,
    timer: Pin<Box<Sleep>>,
    /// Waited in this window, before `since`.
    waited: Duration,
    since: Option<Instant>,
    /// What had moved when the window began.
    moved: u64,
}

impl Watch {
    pub(crate) fn new(pace: Pace) -> Self {
        Self { pace, timer: Box::pin(sleep(pace.within)), waited: Duration::ZERO, since: None, moved: 0 }
    }

    /// The client is not waited for now.
    pub(crate) fn rest(&mut self) {
        if let Some(since) = self.since.take() {
            self.waited += since.elapsed();
        }
    }

    /// While the client is waited for: ready when it is too slow. `moved` says how much has moved so far.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, moved: impl Fn() -> u64) -> Poll<()> {
        let since = *self.since.get_or_insert_with(Instant::now);
        while self.timer.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            let waited = self.waited + (now - since);
            let left = match self.pace.within.checked_sub(waited) {
                Some(left) if !left.is_zero() => left,
                _ => {
                    let moved = moved();
                    if moved - self.moved.min(moved) < self.pace.bytes {
                        return Poll::Ready(());
                    }
                    (self.moved, self.waited, self.since) = (moved, Duration::ZERO, Some(now));
                    self.pace.within
                }
            };
            self.timer.as_mut().reset(now + left);
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::future::poll_fn;

    const PACE: Pace = Pace { within: Duration::from_secs(10), bytes: 100 };

    #[tokio::test(start_paused = true)]
    async fn who_trickles_is_too_slow_and_who_moves_is_not() {
        let start = Instant::now();
        let mut watch = Watch::new(PACE);
        // Eleven bytes a second are enough, nine are not from then on.
        let moved = || {
            let seconds = start.elapsed().as_secs();
            seconds.min(30) * 11 + seconds.saturating_sub(30) * 9
        };
        poll_fn(|cx| watch.poll(cx, moved)).await;
        assert_eq!(start.elapsed(), Duration::from_secs(40));
    }

    #[tokio::test(start_paused = true)]
    async fn time_in_which_nobody_waits_does_not_count() {
        let start = Instant::now();
        let mut watch = Watch::new(PACE);
        let moved = Cell::new(0);
        let wait = tokio::time::timeout(Duration::from_secs(6), poll_fn(|cx| watch.poll(cx, || moved.get())));
        assert!(wait.await.is_err());
        watch.rest();
        tokio::time::sleep(Duration::from_secs(100)).await;
        poll_fn(|cx| watch.poll(cx, || moved.get())).await;
        assert_eq!(start.elapsed(), Duration::from_secs(110));
    }
}

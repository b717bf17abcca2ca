//! Whether the proxy may serve.

use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// How long a proxy that has a configuration on disk waits for its control plane to say that it is still the same. One
/// that is there answers within milliseconds; with one that is away a restarted proxy must serve again within a second.
const ASK: Duration = Duration::from_millis(400);

/// Whether the proxy may serve. It stays so once it was.
///
/// What came from the control plane counts at once. What was found on disk counts when the control plane from which it
/// came cannot be asked, or has answered: a state directory that was kept while the control plane began anew, or was
/// carried to another one, holds endpoints that are somebody else's by now.
#[derive(Debug)]
pub(super) struct Readiness {
    ready: watch::Sender<bool>,
    /// Until when the control plane is waited for, while what is held is from disk.
    waiting: Option<Instant>,
}

impl Readiness {
    /// `stored`: whether what is needed was found on disk.
    pub(super) fn new(stored: bool) -> Self {
        Self { ready: watch::channel(false).0, waiting: stored.then(|| Instant::now() + ASK) }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<bool> {
        self.ready.subscribe()
    }

    /// Whether what is held is from disk, and its control plane has not been heard of.
    pub(super) fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// What is held is the control plane's, as far as can be known. `complete`: whether that is enough to serve.
    pub(super) fn settle(&mut self, complete: bool) {
        self.waiting = None;
        let becomes = complete && !self.is_ready();
        if becomes {
            self.ready.send_replace(true);
        }
    }

    pub(super) fn is_ready(&self) -> bool {
        *self.ready.borrow()
    }

    /// Who answers is not the control plane from which the stored configuration came: being overdue is no reason to serve
    /// from it any more.
    pub(super) fn doubt(&mut self) {
        self.waiting = None;
    }

    /// Waits until the control plane has been waited for long enough; for ever when it is not waited for. Cancel safe.
    pub(super) async fn overdue(&self) {
        match self.waiting {
            Some(until) => tokio::time::sleep_until(until).await,
            None => std::future::pending().await,
        }
    }
}

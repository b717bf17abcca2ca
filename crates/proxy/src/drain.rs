//! Leaving without a failed request.
//!
//! The control thread sets the phase; every worker and connection watches it. See [`Phase`] for what each one means.
//!
//! A proxy also leaves when another process takes its place under a workload that stays. It is then *replaced*: what comes
//! new comes to its successor, and its phases are about the connections that it still has. It refuses no request.

use tokio::sync::watch;

/// How far the proxy has come in leaving.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Not leaving.
    #[default]
    Serving,
    /// Peers are told over the connections they have: HTTP/2 by GOAWAY, HTTP/1 by `sheer-drain` and
    /// `Connection: close`. New connections and requests are still served.
    Told,
    /// A request that arrives is answered `503 draining`, with no byte to the application: peers send it elsewhere.
    Refusing,
    /// The grace is over and the workload's command is still there: connections to it that are open are closed, so that
    /// nobody but itself keeps it from ending. Those that it opened go on.
    Overdue,
    /// Nothing new comes any more, in either direction: workers end when the last connection has.
    Ending,
    /// The grace is over: what is still open is closed.
    Closing,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    phase: Phase,
    replaced: bool,
}

/// Sets the phase.
#[derive(Debug)]
pub struct Signal(watch::Sender<State>);

/// Sees the phase.
#[derive(Clone, Debug)]
pub struct Watch(watch::Receiver<State>);

/// A phase, first [`Phase::Serving`].
pub fn channel() -> (Signal, Watch) {
    let (sender, receiver) = watch::channel(State::default());
    (Signal(sender), Watch(receiver))
}

impl Signal {
    /// Goes on to this phase. There is no way back.
    pub fn set(&self, phase: Phase) {
        self.0.send_if_modified(|now| {
            let later = phase > now.phase;
            if later {
                now.phase = phase;
            }
            later
        });
    }

    /// Another proxy has taken this one's place: nothing new is accepted any more. There is no way back.
    pub fn replace(&self) {
        self.0.send_modify(|now| now.replaced = true);
    }
}

impl Watch {
    /// The phase now.
    pub fn phase(&self) -> Phase {
        self.0.borrow().phase
    }

    /// True when peers should go elsewhere.
    pub fn is_told(&self) -> bool {
        self.phase() >= Phase::Told
    }

    /// Whether another proxy has taken this one's place.
    pub fn is_replaced(&self) -> bool {
        self.0.borrow().replaced
    }

    /// Waits until another proxy has taken this one's place. Cancel safe.
    pub async fn replaced(&mut self) {
        if self.0.wait_for(|now| now.replaced).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Waits until peers are to be told. Never returns when the signal is gone before.
    pub async fn told(&mut self) {
        self.reached(Phase::Told).await;
    }

    /// Waits for [`Phase::Overdue`]. Never returns when a later phase comes instead. Cancel safe.
    pub async fn overdue(&mut self) {
        if self.0.wait_for(|now| now.phase == Phase::Overdue).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Waits until the phase is this one or a later one. Cancel safe.
    pub async fn reached(&mut self, phase: Phase) {
        if self.0.wait_for(|now| now.phase >= phase).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn there_is_no_way_back() {
        let (signal, mut watch) = channel();
        signal.set(Phase::Refusing);
        signal.set(Phase::Told);
        watch.told().await;
        assert_eq!(watch.phase(), Phase::Refusing);
    }
}

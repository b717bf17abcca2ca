//! What the data path asks of the control thread: a service used for the first time, a peer that cannot be reached.

use sheer_core::cause::Cause;
use sheer_core::name::ServiceName;
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// How long the first use of a service waits for the control plane.
const FIRST_USE: Duration = Duration::from_secs(1);

/// Wishes waiting for the control thread, which takes them in microseconds. When more come, they are asked again by the
/// next request.
const QUEUE: usize = 1024;

/// Asks. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Demand {
    wishes: mpsc::Sender<Wish>,
    settled: watch::Receiver<u64>,
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// The endpoints and routes of this service.
    Service(ServiceName),
    /// This workload could not be connected to.
    Unreachable(String),
}

/// The control thread's end.
#[derive(Debug)]
pub struct Demands {
    wishes: mpsc::Receiver<Wish>,
    settled: watch::Sender<u64>,
}

impl Demand {
    /// Both ends.
    pub fn channel() -> (Demand, Demands) {
        let (wish, wishes) = mpsc::channel(QUEUE);
        let (settle, settled) = watch::channel(0);
        (Demand { wishes: wish, settled }, Demands { wishes, settled: settle })
    }

    /// Asks for a service's endpoints and routes without waiting.
    pub fn want(&self, service: &ServiceName) {
        let _ = self.wishes.try_send(Wish::Service(service.clone()));
    }

    /// Tells that a workload could not be connected to.
    pub fn unreachable(&self, workload: &str) {
        let _ = self.wishes.try_send(Wish::Unreachable(workload.to_owned()));
    }

    /// Asks for a service and waits until `is_there`. Cancel safe.
    ///
    /// # Errors
    /// [`Cause::ControlPlaneAway`] after one second.
    pub async fn first_use(&self, service: &ServiceName, is_there: impl Fn() -> bool) -> Result<(), Cause> {
        let mut settled = self.settled.clone();
        self.want(service);
        let arrived = settled.wait_for(|_| is_there());
        match tokio::time::timeout(FIRST_USE, arrived).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Cause::ControlPlaneAway),
        }
    }
}

impl Demands {
    /// The next wish; `None` when nobody asks any more. Cancel safe.
    pub async fn next(&mut self) -> Option<Wish> {
        self.wishes.recv().await
    }

    /// Something that was asked for is stored, or known to be absent: whoever waits looks again.
    pub fn settled(&self) {
        self.settled.send_modify(|count| *count += 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

    #[tokio::test(start_paused = true)]
    async fn a_first_use_ends_when_the_service_is_there_or_after_a_second() {
        let (demand, mut demands) = Demand::channel();
        let web = ServiceName::parse("web").unwrap();
        let there = AtomicBool::new(false);
        let answer = async {
            assert_eq!(demands.next().await, Some(Wish::Service(web.clone())));
            there.store(true, SeqCst);
            demands.settled();
        };
        let (used, ()) = tokio::join!(demand.first_use(&web, || there.load(SeqCst)), answer);
        assert_eq!(used, Ok(()));
        assert_eq!(demand.first_use(&web, || false).await, Err(Cause::ControlPlaneAway));
    }
}

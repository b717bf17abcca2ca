//! What workers ask of the control thread.

use sheer_core::cause::Cause;
use sheer_core::name::ServiceName;
use std::net::IpAddr;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// How long a first use waits for the control plane.
const FIRST_USE: Duration = Duration::from_secs(1);

/// Questions and reports that may wait. Each is a short message; a worker sends one for each connection or request to a
/// service that was not used before.
const QUEUE: usize = 1024;

/// Asks for what the proxy does not hold yet. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Demand {
    wants: mpsc::Sender<Want>,
    unreachable: mpsc::Sender<String>,
}

/// What is wanted, and whom to tell when it is there.
#[derive(Debug)]
pub(super) struct Want {
    pub(super) what: Wanted,
    pub(super) told: Option<oneshot::Sender<()>>,
}

/// What can be wanted.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Wanted {
    /// The endpoints and routes of a service.
    Service(ServiceName),
    /// Those of the services that take connections at this address.
    Address(IpAddr),
}

/// The other end of [`Demand`].
#[derive(Debug)]
pub struct Demands {
    pub(super) wants: mpsc::Receiver<Want>,
    pub(super) unreachable: mpsc::Receiver<String>,
}

impl Demand {
    /// Both ends.
    pub fn channel() -> (Demand, Demands) {
        let (wants, want_receiver) = mpsc::channel(QUEUE);
        let (unreachable, unreachable_receiver) = mpsc::channel(QUEUE);
        (Demand { wants, unreachable }, Demands { wants: want_receiver, unreachable: unreachable_receiver })
    }

    /// Waits until the endpoints and routes of a service are in force, or known not to be; from then on they are kept up
    /// to date. Cancel safe.
    ///
    /// # Errors
    /// [`Cause::ControlPlaneAway`] after a second.
    pub async fn first_use(&self, service: &ServiceName) -> Result<(), Cause> {
        self.ask(Wanted::Service(service.clone())).await
    }

    /// Waits until it is known which services take connections at this address, and their endpoints are in force; from
    /// then on they are kept up to date. Cancel safe.
    ///
    /// # Errors
    /// [`Cause::ControlPlaneAway`] after a second.
    pub async fn who_is_at(&self, address: IpAddr) -> Result<(), Cause> {
        self.ask(Wanted::Address(address)).await
    }

    async fn ask(&self, what: Wanted) -> Result<(), Cause> {
        let (told, answer) = oneshot::channel();
        let ask = async {
            let want = Want { what, told: Some(told) };
            self.wants.send(want).await.map_err(|_| Cause::ControlPlaneAway)?;
            answer.await.map_err(|_| Cause::ControlPlaneAway)
        };
        tokio::time::timeout(FIRST_USE, ask).await.unwrap_or(Err(Cause::ControlPlaneAway))
    }

    /// Asks for a service without waiting.
    pub fn want(&self, service: &ServiceName) {
        // When the queue is full, the next use asks again.
        let _ = self.wants.try_send(Want { what: Wanted::Service(service.clone()), told: None });
    }

    /// Reports that a peer's workload cannot be connected to. Never blocks; with a full queue the next failure reports.
    pub fn unreachable(&self, workload: &str) {
        let _ = self.unreachable.try_send(workload.to_owned());
    }
}

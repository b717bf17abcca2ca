//! Accepting connections, and knowing when the last one is gone.

use crate::capture::rules::{DELIVERY_V4, DELIVERY_V6};
use crate::forward;
use crate::inbound;
use crate::io::Io;
use crate::metrics::Shed;
use crate::outbound;
use crate::overload::memory::Level;
use crate::overload::{Admitted, Way};
use crate::plan::Role;
use crate::record::{Line, refused_connection};
use crate::tcp;
use crate::worker::Worker;
use sheer_core::cause::Cause;
use sheer_core::name::ServiceName;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::Instant;

/// How long accepting pauses when there is no descriptor left: those in use must be closed first.
const NO_DESCRIPTOR: Duration = Duration::from_millis(50);

/// The log tells of such pauses once in so long.
const PAUSES_TOLD: Duration = Duration::from_secs(1);

/// Idle connections that make room at once for those that come: looking for them takes longer than ending them.
const MADE_AT_ONCE: usize = 16;

/// Of a client that says nothing for so long it is asked whether it is still there, and after this part of that time
/// again, three times: one that vanished must not hold a descriptor.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// What to do with an accepted connection.
#[derive(Clone, Debug)]
pub enum Traffic {
    /// From the workload, to where it was going.
    Outbound,
    /// From the workload, to one service, whatever its destination.
    Upstream(ServiceName, u16),
    /// From the workload, by name: HTTP forward proxy and SOCKS5.
    Forward,
    /// To the workload, from peers.
    Inbound,
    /// The same where plaintext means this port.
    Door(u16),
    /// To this port of the workload, from people on this host.
    Published(u16),
}

impl Traffic {
    /// The traffic of a role; `None` for doors of the control thread.
    pub fn of(role: &Role) -> Option<Traffic> {
        match role {
            Role::Outbound => Some(Traffic::Outbound),
            Role::Upstream { service, port } => {
                let name = format!("{}/{}", service.namespace, service.name);
                ServiceName::parse(&name).ok().map(|name| Traffic::Upstream(name, *port))
            }
            Role::Inbound => Some(Traffic::Inbound),
            Role::Door { port } => Some(Traffic::Door(*port)),
            Role::Publish { port } => Some(Traffic::Published(*port)),
            Role::Forward => Some(Traffic::Forward),
            Role::DnsUdp | Role::DnsTcp | Role::Admin | Role::Metrics => None,
        }
    }

    /// Whether it leads to the workload.
    fn way(&self) -> Way {
        match self {
            Traffic::Inbound | Traffic::Door(_) | Traffic::Published(_) => Way::In,
            Traffic::Outbound | Traffic::Upstream(..) | Traffic::Forward => Way::Out,
        }
    }
}

/// The open connections of a worker.
#[derive(Clone, Default)]
pub struct Open(Rc<Tasks>);

#[derive(Default)]
struct Tasks {
    next: Cell<u64>,
    open: RefCell<HashMap<u64, Task, foldhash::fast::RandomState>>,
    closed: Notify,
}

/// The task of a connection.
struct Task {
    handle: AbortHandle,
    way: Way,
}

/// One of them, for as long as it lives.
struct OpenOne {
    tasks: Rc<Tasks>,
    number: u64,
    _admitted: Admitted,
}

impl Open {
    /// Serves a connection in a task of its own.
    fn spawn(&self, way: Way, admitted: Admitted, connection: impl Future<Output = ()> + 'static) {
        let number = self.0.next.get();
        self.0.next.set(number + 1);
        let one = OpenOne { tasks: self.0.clone(), number, _admitted: admitted };
        // Boxed, since a task that captures a future and awaits it has room for both.
        let connection = Box::pin(connection);
        let task = tokio::task::spawn_local(async move {
            let _one = one;
            connection.await;
        });
        // It does not run before this function returns: both are of one thread.
        self.0.open.borrow_mut().insert(number, Task { handle: task.abort_handle(), way });
    }

    /// Waits until none is open. Cancel safe.
    pub async fn none(&self) {
        while !self.0.open.borrow().is_empty() {
            self.0.closed.notified().await;
        }
    }

    /// Ends those that lead to the workload, whatever they are in the middle of.
    pub fn end_inbound(&self) {
        self.0.open.borrow().values().filter(|task| task.way == Way::In).for_each(|task| task.handle.abort());
    }

    /// Ends an eighth of all, those that were accepted last, whatever they are in the middle of: how many.
    pub fn end_youngest(&self) -> usize {
        let open = self.0.open.borrow();
        let mut numbers: Vec<u64> = open.keys().copied().collect();
        let count = numbers.len().div_ceil(8);
        if count < numbers.len() {
            let last = numbers.len() - count;
            numbers.select_nth_unstable(last);
            numbers.drain(..last);
        }
        numbers.iter().filter_map(|number| open.get(number)).for_each(|task| task.handle.abort());
        count
    }
}

impl Drop for OpenOne {
    fn drop(&mut self) {
        self.tasks.open.borrow_mut().remove(&self.number);
        self.tasks.closed.notify_one();
    }
}

/// Accepts until the worker ends or another proxy accepts in its place. Each connection is a task of its own: one that
/// panics takes nothing else with it.
pub async fn accept(worker: Rc<Worker>, listener: TcpListener, traffic: Traffic, open: Open) {
    // What a listener has its connections inherit.
    let questions = socket2::TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 6).with_retries(3);
    if let Err(error) = socket2::SockRef::from(&listener).set_tcp_keepalive(&questions) {
        tracing::warn!(%error, "clients that vanish will not be noticed");
    }
    let mut drain = worker.drain();
    // Urgent bytes are to stay where they stand among the others (RFC 6093, section 4).
    if let Err(error) = socket2::SockRef::from(&listener).set_out_of_band_inline(true) {
        tracing::warn!(%error, "urgent bytes will be lost");
    }
    let mut pauses = Pauses::default();
    loop {
        // Neither arm loses a connection: one that was not accepted is the next proxy's.
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = drain.replaced() => return,
        };
        match accepted {
            Ok((stream, from)) => match admit(&worker, traffic.way()).await {
                Some(admitted) => {
                    open.spawn(traffic.way(), admitted, serve(worker.clone(), stream, from, traffic.clone()));
                }
                None => turn_away(&worker, traffic.way(), stream),
            },
            Err(error) if is_about_one_connection(&error) => {}
            Err(error) => {
                pauses.tell(&error);
                worker.make_room(usize::MAX);
                tokio::time::sleep(NO_DESCRIPTOR).await;
            }
        }
    }
}

/// Pauses in accepting, of which not each has a line in the log: there may be twenty in a second.
#[derive(Default)]
struct Pauses {
    told: Option<Instant>,
    since: u64,
}

impl Pauses {
    /// There is another one. True when it is told of, with the number of those since it was last done.
    fn tell(&mut self, error: &io::Error) -> bool {
        self.since += 1;
        if self.told.is_some_and(|told| told.elapsed() < PAUSES_TOLD) {
            return false;
        }
        tracing::warn!(%error, times = self.since, "accepting pauses");
        *self = Self { told: Some(Instant::now()), since: 0 };
        true
    }
}

/// Admits a connection. Where there is no room, those that carry nothing make some.
async fn admit(worker: &Worker, way: Way) -> Option<Admitted> {
    let overload = &worker.proxy.overload;
    if let Some(admitted) = overload.admit(way) {
        return Some(admitted);
    }
    if worker.make_room(MADE_AT_ONCE) == 0 {
        return None;
    }
    // They end in tasks of this thread that are ready now.
    tokio::task::yield_now().await;
    overload.admit(way)
}

/// Refuses a connection before a byte of it was read: who made it knows that nothing was processed.
fn turn_away(worker: &Worker, way: Way, stream: TcpStream) {
    let line = worker.line(|| match way {
        Way::In => Line { destination: worker.source.to_string(), ..Line::of_connection("inbound", "unknown") },
        Way::Out => Line { destination: "unknown".to_owned(), ..Line::of_connection("outbound", &worker.source) },
    });
    refused_connection(&worker.proxy.metrics, Cause::Overloaded, line);
    tcp::reset(&Io::Plain(stream));
}

/// Gives up what has to be given up while memory is short, and looks again as often as that is needed. Never ends.
pub async fn keep_within_memory(worker: Rc<Worker>, open: Open) {
    loop {
        let again = worker.proxy.overload.look();
        let level = worker.proxy.overload.level();
        if level >= Level::Pressed {
            worker.make_room(usize::MAX);
        }
        if level == Level::Critical && !worker.proxy.overload.is_nearly_empty() {
            let ended = open.end_youngest();
            worker.proxy.metrics.shed(Shed::Youngest, ended);
            tracing::warn!(connections = ended, "memory is at its end: connections that came last are ended");
        }
        tokio::time::sleep(again).await;
    }
}

async fn serve(worker: Rc<Worker>, stream: TcpStream, from: SocketAddr, traffic: Traffic) {
    if stream.set_nodelay(true).is_err() {
        return; // It is gone already.
    }
    match traffic {
        Traffic::Outbound | Traffic::Upstream(..) | Traffic::Forward if is_delivery(from) => {
            Box::pin(outbound::refuse(worker, stream, Cause::Loop)).await;
        }
        // Each as large as it has to be.
        Traffic::Outbound => Box::pin(outbound::accept(worker, stream, outbound::Asked::Original)).await,
        Traffic::Upstream(service, port) => {
            Box::pin(outbound::accept(worker, stream, outbound::Asked::Service(service, port))).await;
        }
        Traffic::Forward => Box::pin(forward::accept(worker, stream)).await,
        Traffic::Inbound => Box::pin(inbound::accept(worker, stream, None)).await,
        Traffic::Door(port) => Box::pin(inbound::accept(worker, stream, Some(port))).await,
        Traffic::Published(port) => Box::pin(inbound::accept_published(worker, stream, port)).await,
    }
}

/// Whether a proxy delivers this to what it takes for an application. Nobody else comes from there: at a door for the
/// workload's own calls it is on its way through the mesh again, and may go round for ever.
fn is_delivery(from: SocketAddr) -> bool {
    from.ip() == DELIVERY_V4 || from.ip() == DELIVERY_V6
}

/// The connection was gone before it was accepted (accept(2)): the next one may be well.
fn is_about_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, PermissionDenied};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted | PermissionDenied)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::oneshot;

    #[tokio::test(start_paused = true)]
    async fn pauses_are_told_of_once_a_second() {
        let mut pauses = Pauses::default();
        let mut told = 0;
        for _ in 0..100 {
            told += u32::from(pauses.tell(&io::Error::other("no descriptor")));
            tokio::time::advance(NO_DESCRIPTOR).await;
        }
        assert_eq!(told, 5);
    }

    #[tokio::test]
    async fn a_connection_that_panics_takes_nothing_else_with_it() {
        let test = async {
            let (worker, open) = (crate::mesh_tests::worker(), Open::default());
            let admitted = || worker.proxy.overload.admit(Way::In).unwrap();
            let (go_on, told) = oneshot::channel();
            let (served, done) = oneshot::channel();
            open.spawn(Way::In, admitted(), async move {
                told.await.unwrap();
                served.send(()).unwrap();
            });
            open.spawn(Way::In, admitted(), async {
                tokio::task::yield_now().await;
                panic!("a fault of the proxy, in one connection");
            });
            while open.0.open.borrow().len() == 2 {
                tokio::task::yield_now().await;
            }
            // It is no longer counted, and the other one goes on.
            go_on.send(()).unwrap();
            done.await.unwrap();
            open.none().await;
            assert_eq!(worker.proxy.metrics.clients_open.load(std::sync::atomic::Ordering::Relaxed), 0);
        };
        tokio::task::LocalSet::new().run_until(test).await;
    }
}

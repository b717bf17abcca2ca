//! A load generator that counts exactly and never retries.
//!
//! Each [`Load`] is a protocol, a target, a rate and a number of connections. Every request ends as exactly one of the
//! outcomes of [`Counts`], so that `sent` is their sum once [`Running::stop`] has returned. Requests are sent at a fixed
//! rate as long as connections are free; an answer that is late delays the requests of its own connection alone.
//!
//! A request that was written is not written again. There are two things that any client does and that are no retries: one
//! that was never written, since its connection turned out to be closed before its first byte, goes to a new connection;
//! and so does one that an HTTP/2 server which goes away says it did not process. The latter are counted as
//! [`Counts::resent`].

mod grpc;
mod http1;
mod http2;
mod pace;
mod tally;
mod target;
mod tcp;

pub use tally::{Counts, Failure, Latency, LoadReport, Report, Seen};
pub use target::{Load, Protocol, TargetError};

use std::sync::Arc;
use std::time::Duration;
use tally::Tally;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// What to generate.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The loads, which run side by side.
    pub loads: Vec<Load>,
    /// The share of HTTP and gRPC requests, 0 to 1, whose answer is not awaited; default 0.
    pub hang_up: f64,
    /// How long to wait for an answer before it counts as late; default 30 s.
    pub patience: Duration,
    /// How long [`run`] goes on; default 10 s.
    pub duration: Duration,
}

impl Plan {
    /// A plan of these loads and the defaults.
    pub fn new(loads: Vec<Load>) -> Self {
        Self { loads, hang_up: 0.0, patience: Duration::from_secs(30), duration: Duration::from_secs(10) }
    }
}

/// Runs a plan for its duration.
pub async fn run(plan: Plan) -> Report {
    let duration = plan.duration;
    let running = start(plan);
    tokio::time::sleep(duration).await;
    running.stop().await
}

/// Starts a plan; it goes on until [`Running::stop`]. Must be called inside a tokio runtime.
pub fn start(plan: Plan) -> Running {
    let (stop, stopped) = watch::channel(false);
    let mut tasks = JoinSet::new();
    let mut tallies = Vec::with_capacity(plan.loads.len());
    for load in plan.loads {
        let tally = Arc::new(Tally::new(unused_name(&load.name, &tallies)));
        tallies.push(tally.clone());
        let context = Context { load: Arc::new(load), tally, hang_up: plan.hang_up, patience: plan.patience };
        for index in 0..context.load.connections.max(1) {
            let (context, stopped) = (context.clone(), stopped.clone());
            match context.load.protocol {
                Protocol::Http1 => tasks.spawn(http1::requests(context, index, stopped)),
                Protocol::Http2 => tasks.spawn(http2::requests(context, index, stopped)),
                Protocol::Grpc => tasks.spawn(grpc::unary(context, index, stopped)),
                Protocol::GrpcStream => tasks.spawn(grpc::stream(context, index, stopped)),
                Protocol::Tcp => tasks.spawn(tcp::lines(context, index, stopped)),
            };
        }
    }
    Running { tallies, tasks, stop }
}

fn unused_name(wanted: &str, tallies: &[Arc<Tally>]) -> String {
    let is_used = |name: &str| tallies.iter().any(|tally| tally.name() == name);
    let mut name = wanted.to_owned();
    let mut number = 2;
    while is_used(&name) {
        name = format!("{wanted} {number}");
        number += 1;
    }
    name
}

/// A plan that is running. Dropping it ends the load at once and loses its report.
pub struct Running {
    tallies: Vec<Arc<Tally>>,
    tasks: JoinSet<()>,
    stop: watch::Sender<bool>,
}

impl Running {
    /// Begins a new phase: requests sent from now on are also counted under this name.
    pub fn phase(&self, name: &str) {
        for tally in &self.tallies {
            tally.phase(name);
        }
    }

    /// The counts of all loads together, so far.
    pub fn counts(&self) -> Counts {
        let mut total = Counts::default();
        for tally in &self.tallies {
            total.add(&tally.counts());
        }
        total
    }

    /// The counts of one load, by its name, so far.
    pub fn counts_of(&self, load: &str) -> Option<Counts> {
        self.tallies.iter().find(|tally| tally.name() == load).map(|tally| tally.counts())
    }

    /// Sends nothing more, waits for the answers that are due, and reports.
    pub async fn stop(mut self) -> Report {
        let _ = self.stop.send(true);
        while self.tasks.join_next().await.is_some() {}
        Report::new(self.tallies.iter().map(|tally| tally.report()).collect())
    }
}

/// What the connections of one load share.
#[derive(Clone)]
struct Context {
    load: Arc<Load>,
    tally: Arc<Tally>,
    hang_up: f64,
    patience: Duration,
}

impl Context {
    /// When this connection sends: all connections of the load together make its rate, evenly spread.
    fn pace(&self, index: usize) -> pace::Pace {
        pace::Pace::new(self.load.rate, self.load.connections.max(1), index)
    }

    fn hangs_up(&self) -> bool {
        self.hang_up > 0.0 && rand::random_bool(self.hang_up.min(1.0))
    }
}

#[cfg(test)]
mod tests;

//! The load that nothing planned may disturb, and the services that take it.
//!
//! 500 requests a second over HTTP/1.1 keep-alive, HTTP/2 and gRPC (unary and stream), and 50 TCP connections with
//! sequence-checked bytes, by clients that never retry. [`Customers::report`] tells exactly what became of each.

use crate::mesh::{Control, PATIENCE, Workload};
use crate::net::Host;
use crate::program::{Program, sheer};
use crate::wait;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

/// What the customers ask, all together: 145 + 145 + 100 requests, 5 streams of 20 messages and 50 lines a second.
pub const TARGETS: [&str; 5] = [
    "http1@145x8=http://reviews/reviews/tea",
    "http2@145x4=http://reviews/reviews/tea",
    "grpc@100x4=http://pricing/",
    "grpc-stream@5x5=http://pricing/",
    "tcp@50x50=tcp://echo:7000",
];

/// Flags of `sheer run` for commands that have no rights of their own.
pub const PLAIN_USER: &[&str] = &["--user", "nobody", "--group", "nogroup"];

/// How long customers come before and after an event.
pub const AROUND: Duration = Duration::from_secs(10);

/// The command line of one of the sample services.
///
/// # Errors
/// When there is no binary.
pub fn service(kind: &str, arguments: &[&str]) -> Result<Vec<String>> {
    let mut command = vec![sheer()?.to_string_lossy().into_owned(), "__demo-service".into(), kind.into()];
    command.extend(arguments.iter().map(|argument| (*argument).to_owned()));
    Ok(command)
}

/// Starts one more instance of each service that customers use, and waits until all take traffic. `flags` go to each
/// `sheer run`.
///
/// # Errors
/// When one cannot be started or takes no traffic.
pub fn open(control: &Control<'_>, host: &Host, home: &Path, flags: &[&str], instances: u64) -> Result<Vec<Program>> {
    let mut programs = Vec::new();
    let services = [("reviews", "8081"), ("pricing", "8082/grpc"), ("echo", "7000/tcp")];
    for (kind, port) in services {
        programs.push(instance(host, home, kind, port, "v1", flags)?);
    }
    for (kind, _) in services {
        control.serves(kind, instances)?;
    }
    Ok(programs)
}

/// Starts one more instance of a service.
///
/// # Errors
/// When it cannot be started.
pub fn instance(host: &Host, home: &Path, kind: &str, port: &str, version: &str, flags: &[&str]) -> Result<Program> {
    let number = port.split('/').next().unwrap_or(port);
    let command = service(kind, &["--port", number, "--version", version])?;
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    Workload::new(host, kind, home)?.flags(&["--port", port]).flags(flags).start(&command)
}

/// Customers in a workload of their own.
pub struct Customers {
    program: Program,
}

impl Customers {
    /// Starts customers on a host and waits until all kinds of requests have been answered once.
    ///
    /// # Errors
    /// When they cannot be started or nothing answers them.
    pub fn come(host: &Host, home: &Path, flags: &[&str]) -> Result<Self> {
        Self::asking(host, home, flags, &TARGETS)
    }

    /// Customers with other wishes.
    ///
    /// # Errors
    /// When they cannot be started or nothing answers them.
    pub fn asking(host: &Host, home: &Path, flags: &[&str], targets: &[&str]) -> Result<Self> {
        Self::named("customers", host, home, flags, targets, &[])
    }

    /// Customers with a name of their own and more flags for the load generator.
    ///
    /// # Errors
    /// When they cannot be started or nothing answers them.
    pub fn named(
        name: &str,
        host: &Host,
        home: &Path,
        flags: &[&str],
        targets: &[&str],
        manners: &[&str],
    ) -> Result<Self> {
        let mut arguments = vec!["--live-json".to_owned()];
        arguments.extend(targets.iter().flat_map(|target| ["--target".to_owned(), (*target).to_owned()]));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).chain(manners.iter().copied()).collect();
        let command = service("load", &arguments)?;
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        let program = Workload::new(host, name, home)?.flags(flags).start(&command)?;
        let customers = Self { program };
        wait::until("customers are answered", PATIENCE, || match customers.answered()? {
            0 => bail!("none is; {}", customers.program.output()),
            _ => Ok(()),
        })?;
        Ok(customers)
    }

    /// How many answers were good so far.
    ///
    /// # Errors
    /// When there is no count yet.
    pub fn answered(&self) -> Result<u64> {
        let output = self.program.output();
        let line = output.lines().rfind(|line| line.starts_with('{')).context("no count yet")?;
        serde_json::from_str::<Value>(line)?["ok"].as_u64().context("no count in the line")
    }

    /// Lets customers come for a while: until this many more answers than they have got now were good.
    ///
    /// # Errors
    /// When they are not answered at half their rate at least.
    pub fn shop_for(&self, duration: Duration) -> Result<()> {
        let wanted = self.answered()? + (duration.as_secs_f64() * 350.0) as u64;
        wait::until("customers go on shopping", duration * 3, || match self.answered()? {
            enough if enough >= wanted => Ok(()),
            few => bail!("{few} good answers instead of {wanted}"),
        })
    }

    /// Sends them home and tells what became of every request.
    ///
    /// # Errors
    /// When they do not end or wrote no report.
    pub fn report(mut self) -> Result<Value> {
        self.program.stop()?;
        let output = self.program.output();
        let line = output.lines().rfind(|line| line.starts_with("{\"report\"")).with_context(|| output.clone())?;
        Ok(serde_json::from_str::<Value>(line)?["report"].take())
    }

    /// Sends them home; not one of their requests may have failed.
    ///
    /// # Errors
    /// With the first failures, when there were any, or when hardly anybody came.
    pub fn are_all_served(self) -> Result<Value> {
        let report = self.report()?;
        let failed: Vec<_> = failures(&report);
        ensure!(failed.is_empty(), "failed requests: {failed:#?}");
        ensure!(report["total"]["ok"].as_u64() > Some(1000), "hardly anybody came: {}", report["total"]);
        Ok(report)
    }
}

/// Everything in a report that is not a good answer: kinds with their counts, and the first failures.
pub fn failures(report: &Value) -> Vec<String> {
    let total = &report["total"];
    let bad = ["non_2xx", "connect", "reset", "short", "reordered", "late"];
    let counts =
        bad.iter().filter(|kind| total[**kind].as_u64() != Some(0)).map(|kind| format!("{kind}: {}", total[*kind]));
    let mut all: Vec<String> = counts.collect();
    for (name, load) in report["loads"].as_object().into_iter().flatten() {
        all.extend(
            load["failures"].as_array().into_iter().flatten().take(5).map(|failure| format!("{name}: {failure}")),
        );
    }
    all
}

//! The command line of a sample service, and its life: listen, serve, stop on SIGTERM.

use crate::{cart, catalog, echo, load, pricing, reviews, server, web};
use anyhow::{Context as _, bail};
use clap::{Parser, ValueEnum};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::future::Future;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// Which sample service to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// The shop's front: HTML at `/`, JSON below `/api/` (HTTP).
    Web,
    /// What the shop sells (HTTP).
    Catalog,
    /// What each customer wants, kept in Redis (HTTP).
    Cart,
    /// What each item costs (gRPC).
    Pricing,
    /// What customers say (HTTP).
    Reviews,
    /// Returns each line it gets (TCP).
    Echo,
    /// Customers: generates load and counts.
    Load,
}

/// The command line of a sample service.
#[derive(Clone, Debug, Parser)]
#[command(no_binary_name = true, bin_name = "__demo-service")]
pub struct Arguments {
    /// Which service to be
    pub kind: Kind,

    /// The port to listen on; 0 picks one
    #[arg(long, default_value_t = 0)]
    pub port: u16,

    /// The address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub listen: std::net::IpAddr,

    /// The version to show: v1, or v2 where a service has two
    #[arg(long, default_value = "v1")]
    pub version: String,

    /// Where to find a peer when its own name is not enough: catalog=http://127.0.0.1:8081, redis=127.0.0.1:6379
    #[arg(long = "peer", value_name = "NAME=ADDRESS", value_parser = parse_peer)]
    pub peers: Vec<(String, String)>,

    /// load: what to load: http1|http2|grpc|grpc-stream|tcp, @RATE, xCONNECTIONS, =URL; e.g. http1@200x8=http://web/
    /// or, with connections that end after 5 lines, tcp@50x10=tcp://echo:7000?lines=5
    #[arg(long = "target", value_name = "PROTOCOL@RATExCONNECTIONS=URL")]
    pub targets: Vec<load::Load>,

    /// load: how long; without it until SIGTERM
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    pub duration: Option<Duration>,

    /// load: the share of requests (0 to 1) whose answer is not awaited
    #[arg(long, default_value_t = 0.0, value_name = "SHARE")]
    pub hang_up: f64,

    /// load: print a line of JSON on standard output every second, with the counts, and one with the report at the end
    #[arg(long, conflicts_with = "report")]
    pub live_json: bool,

    /// load: write the report there instead of to standard output
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
}

fn parse_peer(text: &str) -> Result<(String, String), String> {
    let (name, address) = text.split_once('=').ok_or("expected NAME=ADDRESS")?;
    Ok((name.to_owned(), address.to_owned()))
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.trim_end_matches('s').parse().map_err(|_| "expected seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

/// Addresses of peers: what was given, else the peer's own name.
pub(crate) struct Peers(BTreeMap<String, String>);

impl Peers {
    /// The base URL of an HTTP or gRPC peer.
    pub(crate) fn url(&self, name: &str) -> String {
        self.0.get(name).cloned().unwrap_or_else(|| format!("http://{name}"))
    }

    /// The `host:port` of a TCP peer.
    pub(crate) fn address(&self, name: &str, port: u16) -> String {
        self.0.get(name).cloned().unwrap_or_else(|| format!("{name}:{port}"))
    }
}

/// Runs the service that the command line describes; for a binary that starts it as a process of its own.
pub fn main(arguments: &[OsString]) -> anyhow::Result<()> {
    let arguments = Arguments::try_parse_from(arguments).unwrap_or_else(|error| error.exit());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
    runtime.block_on(async {
        let mut term = signal(SignalKind::terminate()).context("watch for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("watch for SIGINT")?;
        let stop = async move {
            tokio::select! { _ = term.recv() => (), _ = interrupt.recv() => () }
        };
        run(arguments, stop, |_| ()).await
    })
}

/// Runs a service until `stop` completes and everything in progress has ended. `listening` learns its address.
pub async fn run(
    arguments: Arguments,
    stop: impl Future<Output = ()>,
    listening: impl FnOnce(SocketAddr),
) -> anyhow::Result<()> {
    if arguments.kind == Kind::Load {
        return generate(arguments, stop).await;
    }
    let wanted = SocketAddr::new(arguments.listen, arguments.port);
    let listener = TcpListener::bind(wanted).await.with_context(|| format!("listen on {wanted}"))?;
    let address = listener.local_addr()?;
    eprintln!("{} {} listens on {address}", name_of(arguments.kind), arguments.version);
    listening(address);
    let peers = Peers(arguments.peers.into_iter().collect());
    let version = arguments.version;
    match arguments.kind {
        Kind::Web => server::serve(listener, web::router(&peers)?, &version, stop).await,
        Kind::Catalog => server::serve(listener, catalog::router(), &version, stop).await,
        Kind::Cart => server::serve(listener, cart::router(&peers), &version, stop).await,
        Kind::Reviews => server::serve(listener, reviews::router(&version), &version, stop).await,
        Kind::Pricing => pricing::serve(listener, &version, stop).await,
        Kind::Echo => echo::serve(listener, stop).await,
        Kind::Load => unreachable!("handled above"),
    }
    Ok(())
}

fn name_of(kind: Kind) -> String {
    kind.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

async fn generate(arguments: Arguments, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    if arguments.targets.is_empty() {
        bail!("load: nothing to load; name at least one --target, such as http1@100x4=http://web/");
    }
    let mut plan = load::Plan::new(arguments.targets);
    plan.hang_up = arguments.hang_up;
    let running = load::start(plan);
    let ended = async {
        match arguments.duration {
            Some(duration) => tokio::time::sleep(duration).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(stop, ended);
    let mut second = tokio::time::interval(Duration::from_secs(1));
    let mut last = load::Counts::default();
    loop {
        tokio::select! {
            () = &mut stop => break,
            () = &mut ended => break,
            _ = second.tick() => {
                let now = running.counts();
                if arguments.live_json {
                    say(&serde_json::to_string(&now)?);
                } else if now.sent > 0 {
                    eprintln!("{:>6}/s  {now}", now.sent - last.sent);
                }
                last = now;
            }
        }
    }
    let report = running.stop().await;
    if arguments.live_json {
        say(&serde_json::json!({ "report": report }).to_string());
        return Ok(());
    }
    let text = serde_json::to_string_pretty(&report)?;
    match arguments.report {
        Some(path) => std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?,
        None => say(&text),
    }
    Ok(())
}

/// A line on standard output. A reader that went away ends nothing: SIGTERM does.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

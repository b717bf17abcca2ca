//! `sheer edges`: who calls whom, by which route and protocol, encrypted or not.

use crate::client::{Connect, query};
use crate::cmd::stat;
use crate::duration;
use crate::output::{self, Columns, bytes};
use sheer_core::api::{EdgeRow, Edges, Outcome};
use sheer_core::cause::Cause;
use std::process::ExitCode;
use std::time::Duration;

/// Flags of `sheer edges`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sheer edges
  sheer edges --side all           # as the caller's and as the destination's proxy counted
  sheer edges -n shop -o json")]
pub(crate) struct Args {
    /// Only edges of services of this namespace [default: all]
    #[arg(short, long)]
    namespace: Option<String>,

    /// How far to look back
    #[arg(short, long, value_parser = duration::parse, default_value = "1m")]
    window: Duration,

    /// Whose count: the caller's proxy, the destination's, both, or for each edge the one that knows more
    #[arg(long, default_value = "best")]
    side: Side,

    /// How to print
    #[arg(short, long, default_value = "table")]
    output: output::Format,

    #[command(flatten)]
    connect: Connect,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Side {
    Best,
    Outbound,
    Inbound,
    All,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Best => "best",
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
            Self::All => "all",
        }
    }
}

/// Prints one line an edge.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let window = args.window.as_secs().max(1).to_string();
    let parameters = [
        ("namespace", args.namespace.as_deref()),
        ("window_s", Some(window.as_str())),
        ("side", Some(args.side.name())),
    ];
    let edges: Edges = args.connect.client()?.get(&query("/api/v1/edges", &parameters))?;
    match args.output {
        output::Format::Json => output::json(&edges)?,
        output::Format::Table if edges.rows.is_empty() => anstream::eprintln!("no calls between services yet"),
        output::Format::Table => output::print(&table(&edges.rows, Detail::Full).text())?,
    }
    Ok(ExitCode::SUCCESS)
}

/// How much to show of an edge.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Detail {
    /// As part of `sheer stat`.
    Short,
    /// With route, protocol, side and outcomes.
    Full,
}

/// The edges as a table.
pub(crate) fn table(rows: &[EdgeRow], detail: Detail) -> Columns {
    let full = detail == Detail::Full;
    let mut headings = vec!["SOURCE", "DESTINATION"];
    if full {
        headings.extend(["SIDE", "ROUTE", "PROTOCOL"]);
    }
    headings.extend([">SUCCESS", ">RPS", ">P50", ">P95", ">P99", ">MESH", "MTLS", ">SENT", ">RECEIVED"]);
    headings.extend([">OPEN", ">TOTAL"]);
    headings.push(if full { "OUTCOMES" } else { "FAILURES" });
    let mut columns = Columns::new(&headings);
    for row in rows {
        let answered = !row.backend.is_empty() && row.backend != row.destination;
        let destination =
            if answered { format!("{} > {}", row.destination, row.backend) } else { row.destination.clone() };
        let mut cells = vec![row.source.clone(), destination];
        if full {
            cells.extend([row.side.clone(), row.route.clone(), row.protocol.clone()]);
        }
        cells.extend(stat::figures(&row.window));
        // What failed before it was sent travelled neither way.
        let plain = row.total.plaintext > 0 || row.total.connections_open > 0;
        cells.push(
            if row.mtls {
                "yes"
            } else if plain {
                "no"
            } else {
                ""
            }
            .to_owned(),
        );
        cells.extend([bytes(row.window.bytes_sent), bytes(row.window.bytes_received)]);
        cells.extend([stat::open(&row.total), row.total.requests.to_string()]);
        cells.push(outcomes(&row.total.responses, full));
        columns.row(cells);
    }
    columns
}

/// The most frequent outcomes; failures alone unless `all`.
fn outcomes(responses: &[Outcome], all: bool) -> String {
    let shown = responses.iter().filter(|o| all || has_failed(o)).take(3);
    shown.map(|o| format!("{}={}", outcome(o), o.count)).collect::<Vec<_>>().join(" ")
}

/// A client that left is nobody's failure.
fn has_failed(outcome: &Outcome) -> bool {
    match Cause::parse(&outcome.reason) {
        Some(Cause::ClientGone) => false,
        _ => !outcome.reason.is_empty() || outcome.status >= 500 || outcome.grpc_status > 0,
    }
}

fn outcome(outcome: &Outcome) -> String {
    match (outcome.reason.as_str(), outcome.grpc_status, outcome.status) {
        ("", code @ 0.., _) => format!("grpc-{code}"),
        ("", _, 0) => "closed".to_owned(),
        ("", _, status) => status.to_string(),
        (reason, ..) => reason.to_owned(),
    }
}

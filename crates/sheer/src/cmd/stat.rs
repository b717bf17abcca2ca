//! `sheer stat`: how well services answer, and who calls them.

use crate::client::{Connect, query};
use crate::cmd::edges;
use crate::duration;
use crate::output::{self, Columns, bytes, percent, rate};
use serde_json::json;
use sheer_core::api::{Edges, Figures, Stat, StatRow};
use std::process::ExitCode;
use std::time::Duration;

/// Flags of `sheer stat`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sheer stat                       # every service and every edge, over the last minute
  sheer stat web --window 10m
  sheer stat -o json               # 'total' counts since the control plane started, to the request")]
pub(crate) struct Args {
    /// Only this service and its edges: NAME or NAMESPACE/NAME
    #[arg(value_name = "[NAMESPACE/]SERVICE")]
    only: Option<String>,

    /// Only services of this namespace [default: all]
    #[arg(short, long)]
    namespace: Option<String>,

    /// How far to look back
    #[arg(short, long, value_parser = duration::parse, default_value = "1m")]
    window: Duration,

    /// How to print
    #[arg(short, long, default_value = "table")]
    output: output::Format,

    #[command(flatten)]
    connect: Connect,
}

/// Prints services, then edges.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let client = args.connect.client()?;
    let window = args.window.as_secs().max(1).to_string();
    let parameters = [("namespace", args.namespace.as_deref()), ("window_s", Some(window.as_str()))];
    let mut stat: Stat = client.get(&query("/api/v1/stat", &parameters))?;
    let mut calls: Edges = client.get(&query("/api/v1/edges", &parameters))?;
    if let Some(only) = &args.only {
        let only = sheer_core::name::ServiceName::parse(only)?.to_string();
        stat.rows.retain(|row| row.service == only);
        calls.rows.retain(|row| row.destination == only || row.source == only || row.backend == only);
        anyhow::ensure!(
            !stat.rows.is_empty(),
            "there is no service '{only}'; 'sheer get services' lists those that are"
        );
    }
    if args.output == output::Format::Json {
        let value = json!({ "window_s": stat.window_s, "services": stat.rows, "edges": calls.rows });
        output::json(&value)?;
        return Ok(ExitCode::SUCCESS);
    }
    if stat.rows.is_empty() {
        anstream::eprintln!("no service yet; start one with 'sheer run NAME --port PORT -- COMMAND'");
        return Ok(ExitCode::SUCCESS);
    }
    output::print(&services(&stat.rows).text())?;
    if calls.rows.is_empty() {
        anstream::eprintln!("\nno calls between services yet");
        return Ok(ExitCode::SUCCESS);
    }
    output::print("")?;
    output::print(&edges::table(&calls.rows, edges::Detail::Short).text())?;
    Ok(ExitCode::SUCCESS)
}

fn services(rows: &[StatRow]) -> Columns {
    let mut columns = Columns::new(&[
        "SERVICE",
        ">READY",
        ">SUCCESS",
        ">RPS",
        ">P50",
        ">P95",
        ">P99",
        ">MESH",
        ">MTLS",
        ">SENT",
        ">RECEIVED",
        ">OPEN",
        ">TOTAL",
    ]);
    for row in rows {
        let mut cells = vec![row.service.clone(), format!("{}/{}", row.ready, row.workloads)];
        cells.extend(figures(&row.window));
        cells.push(row.mtls.map(percent).unwrap_or_default());
        // What a service sends is what its callers receive.
        cells.extend([bytes(row.window.bytes_received), bytes(row.window.bytes_sent)]);
        cells.extend([open(&row.total), row.total.requests.to_string()]);
        columns.row(cells);
    }
    columns
}

/// Connections of bytes that are open, as a cell: they are counted as ended, in the total, when they end.
pub(crate) fn open(figures: &Figures) -> String {
    match figures.connections_open {
        1.. => figures.connections_open.to_string(),
        _ => String::new(),
    }
}

/// Success rate, rate, percentiles and the mesh's own part, as cells.
pub(crate) fn figures(figures: &Figures) -> [String; 6] {
    let seconds = |value: Option<f64>| value.map(duration::show_seconds).unwrap_or_default();
    [
        figures.success_rate.map(percent).unwrap_or_default(),
        rate(figures.rps),
        seconds(figures.p50_s),
        seconds(figures.p95_s),
        seconds(figures.p99_s),
        seconds(figures.mesh_mean_s),
    ]
}

//! What the mesh counts is what its customers counted themselves, to the request.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sheer_testmesh::mesh::{Control, PATIENCE};
use sheer_testmesh::net::Net;
use sheer_testmesh::shop::{self, Customers, PLAIN_USER};
use sheer_testmesh::wait;
use std::time::Duration;

const TARGETS: [&str; 4] = [
    "http1@200x8=http://reviews/reviews/tea",
    "http2@200x4=http://reviews/reviews/tea",
    "grpc@100x4=http://pricing/",
    "tcp@10x3=tcp://echo:7000",
];

/// A service on a host without a proxy.
const LEDGER: &str = "apiVersion: sheer.dev/v1alpha1\nkind: Workload\nmetadata: {name: ledger}\n\
    spec: {proxied: false, service: ledger, addresses: [192.0.2.50], ports: [{port: 5432, protocol: tcp}]}\n";

#[test]
fn stat_equals_the_customers_own_count() -> Result<()> {
    compare(&[])
}

/// One in ten leaves before the answer has come.
#[test]
fn stat_equals_the_customers_own_count_when_they_hang_up() -> Result<()> {
    compare(&["--hang-up", "0.1"])
}

fn compare(manners: &[&str]) -> Result<()> {
    let net = Net::new()?;
    let host = net.host("one")?;
    let control = Control::start(&host, &net.directory().join("control"))?;
    let _shop = shop::open(&control, &host, net.directory(), PLAIN_USER, 1)?;
    let customers = Customers::named("customers", &host, net.directory(), PLAIN_USER, &TARGETS, manners)?;
    customers.shop_for(Duration::from_secs(5))?;
    // Connections that last are seen before they end, with what they carried.
    wait::until("connections are open", PATIENCE, || {
        let echo = total(&control, "echo")?;
        let carried = |way: &str| echo[way].as_u64() > Some(0);
        ensure!(echo["connections_open"] == 3 && carried("bytes_sent") && carried("bytes_received"), "{echo}");
        ensure!(echo["requests"] == 0, "none has ended: {echo}");
        Ok(())
    })?;
    let report = customers.report()?;
    let failures = shop::failures(&report);
    ensure!(failures.is_empty(), "failed requests: {failures:#?}");
    let sent = |name: &str| -> u64 {
        let loads = report["loads"].as_object().into_iter().flatten();
        loads.filter(|(load, _)| load.contains(name)).filter_map(|(_, load)| load["counts"]["sent"].as_u64()).sum()
    };
    for service in ["reviews", "pricing"] {
        let wanted = sent(service);
        ensure!(wanted > 400, "hardly anybody came to {service}: {}", report["loads"]);
        wait::until("the counts agree", PATIENCE, || {
            let counted = total(&control, service)?["requests"].as_u64().context("no count")?;
            ensure!(counted == wanted, "{service}: stat says {counted}, customers sent {wanted}: {}", report["loads"]);
            Ok(())
        })?;
    }
    wait::until("no connection is open", PATIENCE, || {
        let echo = total(&control, "echo")?;
        ensure!(echo["connections_open"] == 0 && echo["requests"] == 3, "{echo}");
        Ok(())
    })
}

/// A workload that has no proxy is counted among its service's, though nobody reports it.
#[test]
fn workloads_without_a_proxy_are_counted() -> Result<()> {
    let net = Net::new()?;
    let host = net.host("one")?;
    let control = Control::start(&host, &net.directory().join("control"))?;
    control.write("ledger.yaml", LEDGER)?;
    wait::until("it is counted", PATIENCE, || {
        let row = row(&control, "ledger")?;
        ensure!(row["ready"] == 1 && row["workloads"] == 1, "{row}");
        Ok(())
    })
}

/// What stat says of a service.
fn row(control: &Control<'_>, service: &str) -> Result<Value> {
    let stat = control.query(&["stat"])?;
    let rows = stat["services"].as_array().context("no services")?;
    let row = rows.iter().find(|row| row["service"] == format!("default/{service}").as_str());
    row.cloned().with_context(|| format!("{service} is not in {stat}"))
}

/// Its figures since the start.
fn total(control: &Control<'_>, service: &str) -> Result<Value> {
    Ok(row(control, service)?["total"].take())
}

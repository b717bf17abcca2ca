//! What the mesh counts is what its customers counted themselves, to the request.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sheer_testmesh::mesh::{Control, PATIENCE};
use sheer_testmesh::net::Net;
use sheer_testmesh::shop::{self, Customers, PLAIN_USER};
use sheer_testmesh::wait;
use std::time::Duration;

const TARGETS: [&str; 3] =
    ["http1@200x8=http://reviews/reviews/tea", "http2@200x4=http://reviews/reviews/tea", "grpc@100x4=http://pricing/"];

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
            let counted = requests(&control, service)?;
            ensure!(counted == wanted, "{service}: stat says {counted}, customers sent {wanted}: {}", report["loads"]);
            Ok(())
        })?;
    }
    Ok(())
}

/// Requests to a service since the start.
fn requests(control: &Control<'_>, service: &str) -> Result<u64> {
    let stat = control.query(&["stat"])?;
    let rows = stat["services"].as_array().context("no services")?;
    let row = rows.iter().find(|row| row["service"] == format!("default/{service}").as_str()).unwrap_or(&Value::Null);
    row["total"]["requests"].as_u64().with_context(|| format!("{service} is not in {stat}"))
}

//! Events that no request may notice, each under the load of [`sheer_testmesh::shop`]: 500 requests a second.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sheer_testmesh::mesh::{Control, PATIENCE, Workload};
use sheer_testmesh::net::Net;
use sheer_testmesh::program::{run, sheer};
use sheer_testmesh::shop::{self, AROUND, Customers, PLAIN_USER};
use sheer_testmesh::wait;
use std::time::{Duration, Instant};

/// kill -9 of the control plane, and its return.
#[test]
fn the_control_plane_is_not_on_the_request_path() -> Result<()> {
    let net = Net::new()?;
    let host = net.host("one")?;
    let mut control = Control::start(&host, &net.directory().join("control"))?;
    let _shop = shop::open(&control, &host, net.directory(), PLAIN_USER, 1)?;
    let customers = Customers::come(&host, net.directory(), PLAIN_USER)?;
    customers.shop_for(AROUND)?;
    control.program.signal(Signal::SIGKILL)?;
    control.program.wait(PATIENCE)?;
    customers.shop_for(AROUND)?;
    control.restart()?;
    customers.shop_for(AROUND)?;
    customers.are_all_served()?;
    Ok(())
}

/// An orderly stop of one of two instances of everything.
#[test]
fn a_stopped_instance_is_left_in_time() -> Result<()> {
    let net = Net::new()?;
    let host = net.host("one")?;
    let control = Control::start(&host, &net.directory().join("control"))?;
    let (one, two) = (net.directory().join("one"), net.directory().join("two"));
    [&one, &two].into_iter().try_for_each(std::fs::create_dir_all)?;
    let _stay = shop::open(&control, &host, &one, PLAIN_USER, 1)?;
    let mut leave = shop::open(&control, &host, &two, PLAIN_USER, 2)?;
    // TCP connections to the instance that leaves end with it: they are no part of this.
    let targets = [
        "http1@200x8=http://reviews/reviews/tea",
        "http2@200x4=http://reviews/reviews/tea",
        "grpc@100x4=http://pricing/",
    ];
    let customers = Customers::asking(&host, net.directory(), PLAIN_USER, &targets)?;
    customers.shop_for(AROUND)?;
    for program in &leave {
        program.signal(Signal::SIGTERM)?;
    }
    customers.shop_for(AROUND)?;
    for program in &mut leave {
        program.wait(PATIENCE * 2)?;
    }
    control.serves("reviews", 1)?;
    customers.shop_for(Duration::from_secs(2))?;
    customers.are_all_served()?;
    Ok(())
}

/// Traffic of a service moves to its next version in steps.
#[test]
fn a_canary_takes_over() -> Result<()> {
    let net = Net::new()?;
    let host = net.host("one")?;
    let control = Control::start(&host, &net.directory().join("control"))?;
    let _one = shop::instance(&host, net.directory(), "reviews", "8081", "v1", PLAIN_USER)?;
    let command = shop::service("reviews", &["--port", "8081", "--version", "v2"])?;
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let _two = Workload::new(&host, "reviews-v2", net.directory())?
        .flags(&["--port", "8081"])
        .flags(PLAIN_USER)
        .start(&command)?;
    control.serves("reviews", 1)?;
    control.serves("reviews-v2", 1)?;
    let targets = ["http1@250x8=http://reviews/reviews/tea", "http2@250x4=http://reviews/reviews/tea"];
    shift(&control, net.directory(), 100, 0)?;
    let customers = Customers::asking(&host, net.directory(), PLAIN_USER, &targets)?;
    for (old, new) in [(100, 0), (90, 10), (50, 50), (0, 100)] {
        shift(&control, net.directory(), old, new)?;
        // These came after the change was in force: their answers are split as it says.
        let counting = ["http1@400x8=http://reviews/reviews/tea"];
        let counted = Customers::named("counting", &host, net.directory(), PLAIN_USER, &counting, &[])?;
        counted.shop_for(Duration::from_secs(3))?;
        let report = counted.are_all_served()?;
        let answers = |version: &str| -> f64 {
            let loads = report["loads"].as_object().into_iter().flatten();
            loads.filter_map(|(_, load)| load["versions"][version]["count"].as_f64()).sum()
        };
        let (before, after, share) = (answers("v1"), answers("v2"), f64::from(new) / 100.0);
        let total = before + after;
        ensure!(total > 900.0, "too few to judge: {}", report["loads"]);
        // 99.9 % of binomially distributed counts are within 3.29 standard deviations.
        let deviation = 3.29 * (total * share * (1.0 - share)).sqrt();
        ensure!((after - total * share).abs() <= deviation, "{after} of {total} went to v2 at a weight of {new} %");
    }
    customers.are_all_served()?;
    Ok(())
}

/// kill -9 of a service's proxy, with and without a control plane: served again within a second.
#[test]
fn a_killed_proxy_is_back_within_a_second() -> Result<()> {
    let net = Net::new()?;
    let host = net.host("one")?;
    let mut control = Control::start(&host, &net.directory().join("control"))?;
    let server = shop::instance(&host, net.directory(), "reviews", "8081", "v1", PLAIN_USER)?;
    control.serves("reviews", 1)?;
    let mut client =
        Workload::new(&host, "client", net.directory())?.flags(PLAIN_USER).start(&["sleep", "infinity"])?;
    client.prints("is ready", PATIENCE)?;
    let ask = || {
        let mut command = host.command(sheer()?);
        command.args(["exec", "client-1", "--", "curl", "-sS", "--fail", "--max-time", "1"]);
        run(command.arg("http://reviews/reviews/tea"))
    };
    wait::until("it is served", PATIENCE, ask)?;
    for with_control in [true, false] {
        if !with_control {
            control.program.signal(Signal::SIGKILL)?;
            control.program.wait(PATIENCE)?;
        }
        let supervisor = server.pid().to_string();
        let proxy: i32 = run(host.command("pgrep").args(["-P", &supervisor, "-f", "__proxy"]))?.trim().parse()?;
        kill(Pid::from_raw(proxy), Signal::SIGKILL)?;
        let killed = Instant::now();
        wait::until("it is served again", Duration::from_secs(1), ask)?;
        eprintln!("served again after {:?}, control plane there: {with_control}", killed.elapsed());
    }
    Ok(())
}

/// Sets the weights of both versions; in force when it returns.
fn shift(control: &Control<'_>, home: &std::path::Path, old: u32, new: u32) -> Result<()> {
    let file = home.join("canary.yaml");
    let route = format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: canary}}\nspec:\n  \
         parentRefs: [{{group: '', kind: Service, name: reviews, port: 80}}]\n  rules:\n  - backendRefs:\n    \
         - {{name: reviews, port: 80, weight: {old}}}\n    - {{name: reviews-v2, port: 80, weight: {new}}}\n"
    );
    std::fs::write(&file, route)?;
    control.sheer(&["apply", "-f", file.to_str().context("a path in UTF-8")?]).map(drop)
}

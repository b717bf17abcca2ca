//! How fast the mesh notices that a workload came or went.

use anyhow::{Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sheer_testmesh::mesh::Control;
use sheer_testmesh::net::Net;
use sheer_testmesh::program::run;
use sheer_testmesh::shop::{self, PLAIN_USER};
use sheer_testmesh::wait;
use std::time::{Duration, Instant};

/// kill -9 of the process that holds the network of one of two instances: no endpoint any more within a second.
#[test]
fn a_killed_workload_is_left_within_a_second() -> Result<()> {
    let net = Net::new()?;
    let host = net.host("one")?;
    let control = Control::start(&host, &net.directory().join("control"))?;
    let (one, two) = (net.directory().join("one"), net.directory().join("two"));
    [&one, &two].into_iter().try_for_each(std::fs::create_dir_all)?;
    let _stays = shop::instance(&host, &one, "reviews", "8081", "v1", PLAIN_USER)?;
    control.serves("reviews", 1)?;
    let goes = shop::instance(&host, &two, "reviews", "8081", "v2", PLAIN_USER)?;
    control.serves("reviews", 2)?;
    let supervisor = goes.pid().to_string();
    let keeper: i32 = run(host.command("pgrep").args(["-P", &supervisor, "-f", "__demo-service"]))?.trim().parse()?;
    kill(Pid::from_raw(keeper), Signal::SIGKILL)?;
    let killed = Instant::now();
    wait::until("it is left", Duration::from_secs(1), || {
        let services = control.query(&["get", "services"])?;
        let healthy = services["services"].as_array().into_iter().flatten().find(|one| one["name"] == "reviews");
        ensure!(healthy.is_some_and(|one| one["healthy"] == 1), "{services}");
        Ok(())
    })?;
    eprintln!("left after {:?}", killed.elapsed());
    control.serves("reviews", 1).map(drop)?;
    Ok(())
}

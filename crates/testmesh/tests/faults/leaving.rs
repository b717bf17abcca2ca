//! F10: a workload is told to stop in the middle of its work. F11: instances are restarted one after the other.

use crate::site::{DOOR, Ground, caller, is_served, sample};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use sheer_demo::load::{self, Load, Protocol};
use sheer_testmesh::callers::{Callers, Manner};
use sheer_testmesh::faults::{row, times};
use sheer_testmesh::mesh::PATIENCE;
use sheer_testmesh::net::Host;
use sheer_testmesh::program::Program;
use sheer_testmesh::wait;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Requests in flight when it is told to stop, and how long each takes.
const IN_FLIGHT: usize = 100;
const EACH: Duration = Duration::from_secs(5);

/// How long a draining workload serves on; contracts of the mesh, "Draining".
const SERVE_ON: Duration = Duration::from_secs(5);

/// Where people reach the workload that leaves.
const PUBLISHED: &str = "127.0.0.1:9100";

#[test]
fn what_is_in_flight_is_finished() -> Result<()> {
    let done =
        "SIGTERM to one of two instances with 100 requests of 5 s in flight, an idle connection, and new callers";
    let bar =
        "100 of 100 complete; no new caller notices; idle ones close within 1 s of the refusal; ended within 31 s";
    row("F10", done, bar, leave())
}

/// One slow request over a connection of its own; what came of it.
fn slow(host: &Host, door: SocketAddr) -> Result<JoinHandle<Result<()>>> {
    host.inside(|| {
        Ok(std::thread::spawn(move || {
            let mut stream = TcpStream::connect(door)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            write!(stream, "GET /probe/slow/{} HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n", EACH.as_millis())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            let (head, body) = answer.split_once("\r\n\r\n").context("cut off")?;
            let length = head.to_ascii_lowercase();
            let length = length.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
            ensure!(head.starts_with("HTTP/1.1 200") && length == Some(body.len()), "{answer:?}");
            Ok(())
        }))
    })
}

fn leave() -> Result<String> {
    let ground = Ground::new()?;
    let (host, control) = (&ground.near, ground.control()?);
    let (leaves, stays) = (ground.home("leaves")?, ground.home("stays")?);
    let publish = ["--publish", &format!("{PUBLISHED}=8080")];
    let mut leaving = sample(&control, host, &leaves, ["web", "catalog", "8080"], "leaves", &publish)?;
    let _caller = caller(&control, host, &ground.home("caller")?, &["web:80"])?;
    control.serves("web", 1)?;
    is_served(host, DOOR)?;
    // All of them at the instance that leaves, half by the mesh and half by its published door.
    let doors = [DOOR, PUBLISHED].into_iter().cycle().take(IN_FLIGHT);
    let asked = doors.map(|door| slow(host, door.parse()?)).collect::<Result<Vec<_>>>()?;
    let mut idle = host.inside(|| {
        let mut stream = TcpStream::connect(PUBLISHED)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /probe/healthy HTTP/1.1\r\nHost: web\r\n\r\n")?;
        let mut answer = [0; 4096];
        let count = stream.read(&mut answer)?;
        ensure!(answer[..count].starts_with(b"HTTP/1.1 200"), "the idle connection is not answered");
        Ok(stream)
    })?;
    let _stays = sample(&control, host, &stays, ["web", "catalog", "8080"], "stays", &[])?;
    control.serves("web", 2)?;
    let callers = [Manner::Fresh, Manner::Kept].map(|manner| Callers::come(host, DOOR.parse()?, manner, 4));
    let callers = callers.into_iter().collect::<Result<Vec<_>>>()?;
    // Most of them by the other instance, which is not busy with slow requests.
    let answered = |then: Instant| {
        wait::until("callers are answered", PATIENCE, || {
            let good = callers.iter().all(|it| it.since(then).iter().filter(|it| it.answer.is_ok()).count() > 20);
            ensure!(good, "too few answers");
            Ok(())
        })
    };
    answered(Instant::now())?;
    leaving.signal(Signal::SIGTERM)?;
    let told = Instant::now();
    let closed = std::thread::spawn(move || {
        let mut rest = Vec::new();
        let _ = idle.read_to_end(&mut rest);
        (told.elapsed(), rest)
    });
    let came: Vec<Result<()>> =
        asked.into_iter().map(|it| it.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect();
    let lost: Vec<String> = came.iter().filter_map(|it| it.as_ref().err()).map(|it| format!("{it:#}")).collect();
    ensure!(lost.is_empty(), "{} of {IN_FLIGHT} were lost: {:?}", lost.len(), &lost[..lost.len().min(3)]);
    let status = leaving.wait(Duration::from_secs(31))?;
    let ended = told.elapsed();
    ensure!(status.success(), "it ended with {status}");
    let (idle_closed, rest) = closed.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    ensure!(rest.is_empty(), "the idle connection was told {:?}", String::from_utf8_lossy(&rest));
    ensure!(idle_closed < SERVE_ON + Duration::from_secs(2), "the idle connection closed after {idle_closed:?}");
    answered(Instant::now())?;
    let calls: Vec<_> = callers.into_iter().flat_map(Callers::leave).collect();
    let failed: Vec<_> = calls.iter().filter_map(|it| it.answer.as_ref().err()).collect();
    ensure!(failed.is_empty(), "{} new callers failed: {failed:?}", failed.len());
    Ok(format!(
        "{IN_FLIGHT} of {IN_FLIGHT} complete, {} calls meanwhile, 0 failed; idle closed after {:.1} s, ended after {:.1} s",
        calls.len(),
        idle_closed.as_secs_f64(),
        ended.as_secs_f64()
    ))
}

#[test]
#[ignore = "takes a minute and more, nearly all of it waiting: `make faults`"]
fn instances_are_restarted_one_after_the_other() -> Result<()> {
    let rounds = times(1, 10);
    let done = format!(
        "five instances stopped and started again, one after the other, {rounds} times, under 300 requests a second"
    );
    row("F11", &done, "0 failed requests", restart(rounds))
}

fn restart(rounds: usize) -> Result<String> {
    let ground = Ground::new()?;
    let (host, control) = (&ground.near, ground.control()?);
    let names = ["web-1", "web-2", "web-3", "web-4", "web-5"];
    let base = ground.net.directory().to_owned();
    let start = |name: &str| -> Result<Program> {
        sample(&control, host, &base.join(name), ["web", "catalog", "8080"], name, &[])
    };
    let mut running = names.iter().map(|name| start(name)).collect::<Result<Vec<_>>>()?;
    let _caller = caller(&control, host, &ground.home("caller")?, &["web:80"])?;
    control.serves("web", 5)?;
    is_served(host, DOOR)?;
    let report = host.inside(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let mut loads = Vec::new();
        for (protocol, name, rate) in [(Protocol::Http1, "h1", 150.0), (Protocol::Http2, "h2", 150.0)] {
            let load = Load::new(protocol, &format!("http://{DOOR}/probe/healthy")).map_err(anyhow::Error::msg)?;
            loads.push(load.at(rate, 8).named(name));
        }
        let entered = runtime.enter();
        let load = load::start(load::Plan::new(loads));
        drop(entered);
        for _ in 0..rounds {
            for (program, name) in running.iter_mut().zip(names) {
                program.signal(Signal::SIGTERM)?;
                program.wait(Duration::from_secs(31))?;
                *program = start(name)?;
                control.serves("web", 5)?;
            }
        }
        wait::until_true("requests go on", PATIENCE, || load.counts().ok > 1000)?;
        Ok(runtime.block_on(load.stop()))
    })?;
    let total = &report.total;
    let failures: Vec<_> = report.loads.values().flat_map(|it| &it.failures).take(5).collect();
    ensure!(total.failed() == 0, "{total:?}: {failures:?}");
    Ok(format!(
        "{} restarts, {} requests, 0 failed, {} sent again as not processed",
        rounds * 5,
        total.ok,
        total.resent
    ))
}

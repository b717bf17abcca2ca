//! F13: a host that takes no new connections, without saying so. F14: one that is reached badly.

use crate::site::{DOOR, Ground, caller, is_served, sample};
use anyhow::{Context, Result, ensure};
use sheer_demo::load::{self, Load, Protocol, Report};
use sheer_testmesh::faults::{long, row, times};
use sheer_testmesh::mesh::PATIENCE;
use sheer_testmesh::net::Host;
use sheer_testmesh::program::Program;
use sheer_testmesh::wait;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// One connection of its own, with a line that came back: when it began, how long it took, and what went wrong.
type Call = (Instant, Duration, Option<String>);

fn line(door: SocketAddr) -> Result<()> {
    let mut stream = BufReader::new(TcpStream::connect(door)?);
    stream.get_ref().set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.get_mut().write_all(b"hello\n")?;
    let mut back = String::new();
    stream.read_line(&mut back)?;
    ensure!(back == "hello\n", "{back:?} came back");
    Ok(())
}

/// Callers that open one connection after the other until they are sent home.
struct Lines {
    calls: Arc<Mutex<Vec<Call>>>,
    end: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Lines {
    fn come(host: &Host, callers: usize) -> Result<Self> {
        let (calls, end) = <(Arc<Mutex<Vec<Call>>>, Arc<AtomicBool>)>::default();
        let door: SocketAddr = DOOR.parse()?;
        let caller = || {
            let (calls, end) = (calls.clone(), end.clone());
            std::thread::spawn(move || {
                while !end.load(Relaxed) {
                    let began = Instant::now();
                    let failed = line(door).err().map(|error| format!("{error:#}"));
                    calls.lock().unwrap_or_else(PoisonError::into_inner).push((began, began.elapsed(), failed));
                    std::thread::sleep(Duration::from_millis(5));
                }
            })
        };
        // A thread begins in the network of the one that makes it.
        let threads = host.inside(|| Ok((0..callers).map(|_| caller()).collect()))?;
        Ok(Self { calls, end, threads })
    }

    /// How many calls have ended.
    fn made(&self) -> usize {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn leave(mut self) -> Vec<Call> {
        self.end.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        std::mem::take(&mut *self.calls.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        self.end.store(true, Relaxed);
    }
}

fn percentile(calls: &[Call], percent: f64) -> Duration {
    let mut times: Vec<Duration> = calls.iter().map(|call| call.1).collect();
    times.sort();
    times.get(((times.len() as f64 - 1.0) * percent / 100.0) as usize).copied().unwrap_or_default()
}

#[test]
#[ignore = "takes half a minute: `make faults`"]
fn a_host_that_takes_no_connections_is_left_alone() -> Result<()> {
    let done =
        "packets that begin a connection to one of two hosts vanish; four callers open TCP connections without a pause";
    let bar = "0 failed; each waits 1 s at most; p99 at most doubled from 5 s on";
    row("F13", done, bar, lose_connects())
}

fn lose_connects() -> Result<String> {
    let ground = Ground::new()?;
    let (host, far, control) = (&ground.near, ground.net.host("far")?, ground.control()?);
    let _near = sample(&control, host, &ground.home("near")?, ["echo", "echo", "7000/tcp"], "near", &[])?;
    let _far = sample(&control, &far, &ground.home("far")?, ["echo", "echo", "7000/tcp"], "far", &[])?;
    let _caller = caller(&control, host, &ground.home("caller")?, &["echo:7000"])?;
    control.serves("echo", 2)?;
    let watched = Duration::from_secs(times(12, 60) as u64);
    let lines = Lines::come(host, 4)?;
    // Until both are known well: whoever has not answered yet is tried at once.
    wait::until_true("both are known well", PATIENCE, || lines.made() >= 600)?;
    ground.net.lose_connects(&far)?;
    let lost = Instant::now();
    std::thread::sleep(watched);
    let calls = lines.leave();
    let (before, after): (Vec<Call>, Vec<Call>) = calls.into_iter().partition(|call| call.0 + call.1 < lost);
    let before: Vec<Call> = before.into_iter().skip(200).collect();
    let failed: Vec<_> = after.iter().chain(&before).filter_map(|call| call.2.as_ref()).collect();
    ensure!(failed.is_empty(), "{} failed: {failed:?}", failed.len());
    let longest = after.iter().map(|call| call.1).max().context("no calls")?;
    ensure!(longest < Duration::from_millis(1600), "one waited {longest:?}");
    let waited = after.iter().filter(|call| call.1 > Duration::from_millis(500)).count();
    let (later, usual): (Vec<Call>, _) =
        (after.into_iter().filter(|call| call.0 > lost + Duration::from_secs(5)).collect(), before);
    let (p99, base) = (percentile(&later, 99.0), percentile(&usual, 99.0));
    // Of a busy machine a few milliseconds mean nothing.
    ensure!(p99 <= base * 2 + Duration::from_millis(5), "p99 {p99:?} after, {base:?} before");
    Ok(format!(
        "0 failed, {waited} waited, at most {longest:.2?}; p99 {base:.1?} before and {p99:.1?} from 5 s on, over {} calls",
        later.len()
    ))
}

#[test]
#[ignore = "takes half a minute: `make faults`"]
fn load_moves_away_from_a_host_that_is_reached_badly() -> Result<()> {
    let bar = "at least 80 % of its share moves away; 99.99 % of requests are good";
    let mut result = Ok(());
    // Each with five hosts of its own; the worst alone where time is short.
    let cases: [(&str, u32, u64); 3] =
        [("10 % loss and 50 ± 20 ms delay", 10, 50), ("2 % loss and 50 ± 20 ms delay", 2, 50), ("10 % loss", 10, 0)];
    for (name, percent, delay) in cases.into_iter().take(times(1, 3)) {
        let done = format!("{name} to one of five hosts, 200 requests a second over HTTP/1.1 and HTTP/2");
        result = result.and(row("F14", &done, bar, reach_badly(percent, delay)));
    }
    result
}

fn reach_badly(percent: u32, delay_ms: u64) -> Result<String> {
    let ground = Ground::new()?;
    let (host, control) = (&ground.near, ground.control()?);
    let names = ["bad", "good-1", "good-2", "good-3", "good-4"];
    let hosts = names.iter().map(|name| ground.net.host(name)).collect::<Result<Vec<_>>>()?;
    let mut running: Vec<Program> = Vec::new();
    for (at, name) in hosts.iter().zip(names) {
        running.push(sample(&control, at, &ground.home(name)?, ["web", "catalog", "8080"], name, &[])?);
    }
    running.push(caller(&control, host, &ground.home("caller")?, &["web:80"])?);
    control.serves("web", 5)?;
    is_served(host, DOOR)?;
    let duration = Duration::from_secs(if long() { 60 } else { 8 });
    let usual = answers(host, Duration::from_secs(4))?;
    let _delay = match delay_ms {
        0 => None,
        by => Some(ground.net.delay(&hosts[0], Duration::from_millis(by), Duration::from_millis(20))?),
    };
    ground.net.lose(&hosts[0], percent)?;
    let report = answers(host, duration)?;
    let share = |report: &Report, version: &str| -> f64 {
        let count = |version: &str| -> f64 {
            report.loads.values().filter_map(|load| load.versions.get(version)).map(|seen| seen.count as f64).sum()
        };
        count(version) / names.iter().map(|name| count(name)).sum::<f64>().max(1.0)
    };
    let (before, after) = (share(&usual, "bad"), share(&report, "bad"));
    let total = &report.total;
    let good = total.ok as f64 / total.sent.max(1) as f64;
    let figure = format!(
        "its share went from {:.1} % to {:.1} %, {:.3} % of {} requests good",
        before * 100.0,
        after * 100.0,
        good * 100.0,
        total.sent
    );
    ensure!(before > 0.1, "it had no share to lose: {figure}");
    ensure!(
        after <= 0.2 * 0.2 && good >= 0.9999,
        "{figure}; {:?}",
        report.loads.values().flat_map(|it| &it.failures).take(3).collect::<Vec<_>>()
    );
    Ok(figure)
}

fn answers(host: &Host, duration: Duration) -> Result<Report> {
    host.inside(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut loads = Vec::new();
            for (protocol, name) in [(Protocol::Http1, "h1"), (Protocol::Http2, "h2")] {
                let load = Load::new(protocol, &format!("http://{DOOR}/probe/healthy")).map_err(anyhow::Error::msg)?;
                loads.push(load.at(100.0, 4).named(name));
            }
            Ok(load::run(load::Plan { duration, ..load::Plan::new(loads) }).await)
        })
    })
}

//! Certificates that end under load, a machine that sleeps for a day and a half, and processes that are killed.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sheer_demo::load::{self, Load, Protocol};
use sheer_testmesh::callers::{self, Callers, Manner, disturbed_after};
use sheer_testmesh::faults::row;
use sheer_testmesh::net::{Host, Net};
use sheer_testmesh::program::{Processes, Program, run, sheer};
use sheer_testmesh::wait;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const PATIENCE: Duration = Duration::from_secs(20);

/// How long callers may notice that something was killed.
const LEFT_WITHIN: Duration = Duration::from_secs(1);

/// Where the caller's application reaches the service.
const DOOR: &str = "127.0.0.1:9000";

/// A control plane, instances of `web` and a caller, all on one host.
struct Site<'a> {
    host: &'a Host,
    home: PathBuf,
    /// For every program of the mesh.
    variables: Vec<(&'static str, String)>,
    running: Vec<Program>,
}

impl<'a> Site<'a> {
    fn new(net: &Net, host: &'a Host, variables: Vec<(&'static str, String)>, mesh: &str) -> Result<Self> {
        let home = net.directory().to_owned();
        // Proxies have users of their own.
        std::fs::set_permissions(&home, PermissionsExt::from_mode(0o755))?;
        std::fs::create_dir_all(home.join("mesh.d"))?;
        std::fs::write(home.join("mesh.d/mesh.yaml"), mesh)?;
        let mut site = Self { host, home, variables, running: Vec::new() };
        let (config, state) = (site.home.join("mesh.d"), site.home.join("state"));
        let (config, state) = (config.to_string_lossy(), state.to_string_lossy());
        site.start("control", &["control", "--config", &config, "--state", &state])?;
        wait::until("the control plane answers", PATIENCE, || site.sheer(&["get", "Service"]))?;
        Ok(site)
    }

    fn start(&mut self, name: &str, arguments: &[&str]) -> Result<Pid> {
        let mut command = self.host.command(sheer()?);
        command.args(arguments).envs(self.variables.iter().map(|(name, value)| (name, value)));
        let program = Program::start(name, &self.home, &mut command)?;
        let pid = program.pid();
        self.running.push(program);
        Ok(pid)
    }

    fn sheer(&self, arguments: &[&str]) -> Result<String> {
        run(self.host.command(sheer()?).args(arguments))
    }

    /// An instance of the service. Its metrics are at this port.
    fn web(&mut self, name: &str, metrics: u16) -> Result<Pid> {
        let program = sheer()?;
        let metrics = format!("127.0.0.1:{metrics}");
        let own = ["run", "web", "--name", name, "--port", "8080", "--user", "nobody", "--metrics", &metrics, "--"];
        let serve = [&program.to_string_lossy(), "__demo-service", "catalog", "--port", "8080", "--version", name];
        self.start(name, &[&own[..], &serve[..]].concat())
    }

    /// The caller: whoever connects to [`DOOR`] on the host calls `web` through its proxy.
    fn caller(&mut self, metrics: u16) -> Result<Pid> {
        let metrics = format!("127.0.0.1:{metrics}");
        let upstream = format!("{DOOR}=web:80");
        let own = ["run", "caller", "--capture", "none", "--upstream", &upstream, "--metrics", &metrics];
        let pid = self.start("caller", &[&own[..], &["--user", "nobody", "--", "sleep", "infinity"]].concat())?;
        wait::until("the caller is answered", PATIENCE, || self.ask().map(drop))?;
        Ok(pid)
    }

    /// One request over a connection of its own; the version that answered.
    fn ask(&self) -> Result<String> {
        callers::ask_once(self.host, DOOR.parse()?)
    }

    /// When the certificate of the workload whose metrics are at this port ends, in seconds of unix time.
    fn expiry(&self, metrics: u16) -> Result<u64> {
        let text = get(self.host, &format!("127.0.0.1:{metrics}"), "localhost", "/metrics", Duration::from_secs(5))?;
        let line = text.lines().find(|line| line.starts_with("sheer_certificate_expiry_seconds "));
        Ok(line.and_then(|line| line.rsplit(' ').next()).context("no expiry")?.parse()?)
    }
}

impl Drop for Site<'_> {
    fn drop(&mut self) {
        // Workloads before the control plane.
        while let Some(program) = self.running.pop() {
            drop(program);
        }
    }
}

fn get(host: &Host, address: &str, name: &str, path: &str, limit: Duration) -> Result<String> {
    let address: SocketAddr = address.parse()?;
    host.inside(move || {
        let mut stream = TcpStream::connect_timeout(&address, limit)?;
        stream.set_read_timeout(Some(limit))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })
}

fn mesh(settings: &str) -> String {
    format!("apiVersion: sheer.dev/v1alpha1\nkind: Mesh\nmetadata: {{name: mesh}}\nspec: {{{settings}}}\n")
}

#[test]
fn certificates_are_renewed_under_load_without_a_failed_request() -> Result<()> {
    let done = "certificates of 12 s renewed four times by two proxies, under 200 requests a second";
    row("F1", done, "0 failed; never without a valid certificate", renewed())
}

fn renewed() -> Result<String> {
    let net = Net::new()?;
    let host = net.host("one")?;
    let mut site = Site::new(&net, &host, vec![], &mesh("certificateLifetime: 12s"))?;
    site.web("web-1", 15101)?;
    site.caller(15102)?;
    let report = host.inside(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut loads = Vec::new();
            for (protocol, name) in [(Protocol::Http1, "h1"), (Protocol::Http2, "h2")] {
                let load = Load::new(protocol, &format!("http://{DOOR}/probe/healthy")).map_err(anyhow::Error::msg)?;
                loads.push(load.at(100.0, 4).named(name));
            }
            let running = load::start(load::Plan::new(loads));
            let mut seen = [vec![], vec![]];
            // At half-life twelve seconds are renewed every six to eight.
            let renewed = Instant::now();
            while seen.iter().any(|ends| ends.len() < 4) && renewed.elapsed() < Duration::from_secs(90) {
                tokio::time::sleep(Duration::from_millis(250)).await;
                for (ends, metrics) in seen.iter_mut().zip([15101, 15102]) {
                    let end = site.expiry(metrics)?;
                    if ends.last() != Some(&end) {
                        // The one before was still good: nobody had to do without for a moment.
                        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
                        ensure!(ends.last().is_none_or(|before| *before > now), "{ends:?} was renewed at {now}");
                        ends.push(end);
                    }
                }
            }
            let report = running.stop().await;
            ensure!(seen.iter().all(|ends| ends.len() >= 4), "certificates ended at {seen:?}");
            eprintln!("certificates ended at {seen:?}, within {:?}", renewed.elapsed());
            Ok(report)
        })
    })?;
    let total = &report.total;
    eprintln!("{total:?}");
    ensure!(total.failed() == 0, "failed requests: {:?}", report.loads);
    ensure!(total.ok > 1000, "hardly any request: {total:?}");
    Ok(format!("{} requests, 0 failed", total.ok))
}

/// The host sleeps for a day and a half. Its clocks jump, as a library in front of the system's clocks shows them; the
/// certificates, valid for a day, have ended meanwhile.
#[test]
fn a_host_that_slept_serves_again_within_five_seconds() -> Result<()> {
    let done = "a host sleeps for 36 h; its certificates, valid for 24 h, have ended when it wakes";
    row("F7", done, "served again within 5 s", slept())
}

fn slept() -> Result<String> {
    const LIBRARY: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";
    let library = [LIBRARY, "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1"];
    let library = library.into_iter().find(|it| Path::new(it).exists()).context("apt-get install faketime")?;
    let net = Net::new()?;
    let host = net.host("one")?;
    let clock = net.directory().join("clock");
    std::fs::write(&clock, "+0\n")?;
    let variables = vec![
        ("LD_PRELOAD", library.to_owned()),
        ("FAKETIME_TIMESTAMP_FILE", clock.to_string_lossy().into_owned()),
        ("FAKETIME_NO_CACHE", "1".to_owned()),
        // A sleeping machine's monotonic clock stands still.
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
        ("DONT_FAKE_MONOTONIC", "1".to_owned()),
        ("FAKETIME_DISABLE_SHM", "1".to_owned()),
    ];
    let mut site = Site::new(&net, &host, variables, &mesh(""))?;
    let web = site.web("web-1", 15101)?;
    let caller = site.caller(15102)?;
    let before = [site.expiry(15101)?, site.expiry(15102)?];

    let proxies = [Processes::of(web)?.proxy, Processes::of(caller)?.proxy];
    let all = [proxies[0], proxies[1], web, caller, site.running[0].pid()];
    all.iter().try_for_each(|pid| kill(*pid, Signal::SIGSTOP))?;
    std::fs::write(site.home.join("clock.new"), "+36h\n")?;
    std::fs::rename(site.home.join("clock.new"), &clock)?;
    let woke = Instant::now();
    all.iter().rev().try_for_each(|pid| kill(*pid, Signal::SIGCONT))?;
    wait::until("the caller is answered by valid certificates", PATIENCE, || {
        site.ask()?;
        for (metrics, before) in [15101, 15102].into_iter().zip(before) {
            let end = site.expiry(metrics)?;
            ensure!(end >= before + 35 * 3600, "the certificate at {metrics} still ends at {end}");
        }
        Ok(())
    })?;
    let took = woke.elapsed();
    eprintln!("serving again after {took:?}");
    ensure!(took < Duration::from_secs(5), "serving again after {took:?}");
    Ok(format!("served again after {took:.1?}"))
}

/// A proxy is stopped until its certificate has ended; the others go on meanwhile.
#[test]
fn a_proxy_that_was_stopped_beyond_its_certificate_serves_again_within_five_seconds() -> Result<()> {
    let net = Net::new()?;
    let host = net.host("one")?;
    let mut site = Site::new(&net, &host, vec![], &mesh("certificateLifetime: 10s"))?;
    let web = site.web("web-1", 15101)?;
    site.caller(15102)?;
    let proxy = Processes::of(web)?.proxy;
    let end = site.expiry(15101)?;
    kill(proxy, Signal::SIGSTOP)?;
    wait::until_true("its certificate has ended", PATIENCE, || {
        let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
        now > Duration::from_secs(end + 1)
    })?;
    let woke = Instant::now();
    kill(proxy, Signal::SIGCONT)?;
    wait::until("the caller is answered", PATIENCE, || site.ask().map(drop))?;
    let took = woke.elapsed();
    eprintln!("serving again after {took:?}");
    ensure!(took < Duration::from_secs(5), "serving again after {took:?}");
    Ok(())
}

/// For how long after `event` callers are disturbed. `before` answer until then, `after` alone from then on.
fn noticed(
    site: &Site<'_>,
    before: &[&str],
    after: &[&str],
    event: impl FnOnce() -> Result<()>,
) -> Result<(Duration, usize)> {
    let come = |manner| Callers::come(site.host, DOOR.parse()?, manner, 4);
    let callers = [come(Manner::Fresh)?, come(Manner::Kept)?];
    callers.iter().try_for_each(|it| it.are_answered_by(before, PATIENCE))?;
    let happened = Instant::now();
    event()?;
    // Twice as long as it may be noticed.
    std::thread::sleep(2 * LEFT_WITHIN);
    callers.iter().try_for_each(|it| it.are_answered_by(after, PATIENCE))?;
    let asked: Vec<_> = callers.into_iter().flat_map(Callers::leave).collect();
    let (last, disturbed) = disturbed_after(happened, &asked);
    ensure!(last < LEFT_WITHIN, "callers noticed for {last:?}: {:?}", disturbed.last());
    Ok((last, disturbed.len()))
}

/// A control plane, a caller, and instances of these versions that take traffic.
fn instances<'a>(net: &Net, host: &'a Host, versions: &[&str]) -> Result<(Site<'a>, Vec<Pid>)> {
    let mut site = Site::new(net, host, vec![], &mesh(""))?;
    let metrics = 15103..;
    let pids = versions.iter().zip(metrics).map(|(version, metrics)| site.web(version, metrics));
    let pids = pids.collect::<Result<Vec<_>>>()?;
    site.caller(15102)?;
    wait::until("every command runs", PATIENCE, || {
        pids.iter().try_for_each(|pid| Processes::of(*pid)?.command().map(drop))
    })?;
    Ok((site, pids))
}

/// kill -9 of the application alone, of the process that holds its namespaces, and of the supervisor: no request goes
/// there any more within a second, as its callers see it.
#[test]
fn a_killed_command_is_left_within_a_second() -> Result<()> {
    let net = Net::new()?;
    let host = net.host("one")?;
    let versions = ["stays", "supervisor", "keeper", "command"];
    let (site, pids) = instances(&net, &host, &versions)?;
    for (number, victim) in versions.iter().enumerate().skip(1).rev() {
        let workload = Processes::of(pids[number])?;
        let process = match *victim {
            "command" => workload.command()?,
            "keeper" => workload.keeper,
            _ => pids[number],
        };
        let (last, disturbed) =
            noticed(&site, &versions[..=number], &versions[..number], || Ok(kill(process, Signal::SIGKILL)?))?;
        eprintln!("killed {victim}: left after {last:?}, {disturbed} requests disturbed");
    }
    Ok(())
}

#[test]
fn a_killed_proxy_is_left_and_serves_again_within_a_second() -> Result<()> {
    let net = Net::new()?;
    let host = net.host("one")?;
    let versions = ["one", "other"];
    let (site, pids) = instances(&net, &host, &versions)?;
    let proxy = Processes::of(pids[0])?.proxy;
    let (last, disturbed) = noticed(&site, &versions, &versions, || Ok(kill(proxy, Signal::SIGKILL)?))?;
    eprintln!("killed proxy: left after {last:?}, {disturbed} requests disturbed");
    // Alone: what the supervisor starts in its place serves.
    kill(Processes::of(pids[1])?.command()?, Signal::SIGKILL)?;
    let proxy = Processes::of(pids[0])?.proxy;
    let (last, disturbed) = noticed(&site, &["one"], &["one"], || Ok(kill(proxy, Signal::SIGKILL)?))?;
    eprintln!("killed proxy of the only instance: served again after {last:?}, {disturbed} requests disturbed");
    ensure!(Processes::of(pids[0])?.proxy != proxy, "the proxy was not killed");
    Ok(())
}

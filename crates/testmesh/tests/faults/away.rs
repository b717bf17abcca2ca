//! F2, F3, F4: a control plane that is dead, cut off, or alive and of no use. F7: clocks that are wrong.

use crate::site::{DOOR, Ground, METRICS, caller, is_served, metrics, none_failed, sample, value};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill, killpg};
use sheer_testmesh::callers::{self, Callers, Manner};
use sheer_testmesh::faults::{row, times};
use sheer_testmesh::mesh::{Control, PATIENCE};
use sheer_testmesh::net::Host;
use sheer_testmesh::program::{Processes, Program, run};
use sheer_testmesh::wait;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::time::{Duration, Instant};

const WEB: [&str; 3] = ["web", "catalog", "8080"];

#[test]
fn workloads_start_again_before_their_control_plane() -> Result<()> {
    let done = "power off and on: control plane, service and caller killed together; the workloads start, the control plane stays dead";
    let bar = "served from disk within 1 s of the start; files 0600; that it is stale is shown";
    row("F2", done, bar, start_alone())
}

fn start_alone() -> Result<String> {
    let ground = Ground::new()?;
    let host = &ground.near;
    let mut control = ground.control()?;
    let (web_home, caller_home) = (ground.home("web")?, ground.home("caller")?);
    let web = sample(&control, host, &web_home, WEB, "web-1", &[])?;
    let asks = caller(&control, host, &caller_home, &["web:80"])?;
    control.serves("web", 1)?;
    is_served(host, DOOR)?;
    let states = [(&web_home, "web"), (&caller_home, "caller")];
    let stored = |home: &Path, service: &str| home.join(format!("{service}-state"));
    wait::until("all is stored", PATIENCE, || {
        for (home, service) in states {
            let files = run(std::process::Command::new("find")
                .arg(stored(home, service))
                .args(["-type", "f", "-printf", "%m %f\\n"]))?;
            ensure!(
                files.lines().filter(|line| line.ends_with(" identity") || line.ends_with(" configuration")).count()
                    == 2,
                "{files}"
            );
            let open: Vec<&str> = files.lines().filter(|line| !line.starts_with("600 ")).collect();
            ensure!(open.is_empty(), "readable for others: {open:?}");
        }
        Ok(())
    })?;
    // What the caller asked for first is stored a moment later: its endpoint, which only the service's use brings.
    wait::until("the demand is stored", PATIENCE, || {
        let mut look = std::process::Command::new("grep");
        run(look.args(["-rqa", "/web-1"]).arg(stored(&caller_home, "caller")))
            .context("no endpoint of the service is stored")
    })?;
    control.program.signal(Signal::SIGKILL)?;
    for program in [&web, &asks] {
        killpg(program.pid(), Signal::SIGKILL)?;
    }
    drop((web, asks));
    let address = control.address();
    let again = |home: &Path, service: &str, flags: &[&str], command: &[&str]| -> Result<Program> {
        let state = stored(home, service).display().to_string();
        let shared = ["--control", &address, "--state", &state];
        let workload = sheer_testmesh::mesh::Workload::new(host, service, home)?;
        workload.flags(flags).flags(&shared).flags(sheer_testmesh::shop::PLAIN_USER).start(command)
    };
    let binary = sheer_testmesh::program::sheer()?.to_string_lossy().into_owned();
    let began = Instant::now();
    let serve = [&binary, "__demo-service", "catalog", "--port", "8080", "--version", "web-1"];
    let mut web = again(&web_home, "web", &["--name", "web-1", "--port", "8080"], &serve)?;
    let upstream = format!("{DOOR}=web:80");
    let flags = ["--name", "caller-1", "--capture", "none", "--metrics", METRICS, "--upstream", &upstream];
    let mut asks = again(&caller_home, "caller", &flags, &["sleep", "infinity"])?;
    web.prints("is ready", PATIENCE)?;
    asks.prints("is ready", PATIENCE)?;
    let ready = began.elapsed();
    // The service has another port of the host now: who calls knows the old one from disk until somebody tells.
    let served = wait::until("it is served", Duration::from_secs(3), || callers::ask_once(host, DOOR.parse()?));
    let text = metrics(host, METRICS)?;
    ensure!(text.contains("sheer_control_connected 0"), "that nobody tells what changes is not shown:\n{text}");
    served.with_context(|| format!("ready after {ready:?}"))?;
    let took = began.elapsed();
    ensure!(took < Duration::from_secs(4), "served after {took:?}");
    control.restart()?;
    wait::until("both are back", PATIENCE, || {
        ensure!(metrics(host, METRICS)?.contains("sheer_control_connected 1"));
        Ok(())
    })?;
    Ok(format!(
        "both ready {ready:.1?} after their start, answered after {took:.1?}, without a control plane; shown as not connected"
    ))
}

/// What passes between proxies and their control plane.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
enum Line {
    Well,
    /// Connections are taken and nothing is ever said.
    Silent,
    /// A byte a second each way.
    Slow,
}

/// A line to the control plane that can be spoiled, on the host of the proxies.
fn spoil(host: &Host, to: SocketAddr, port: u16, line: &Arc<AtomicU8>) -> Result<()> {
    let line = line.clone();
    host.inside(move || {
        let listener = TcpListener::bind(("127.0.0.1", port))?;
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let Ok(far) = TcpStream::connect(to) else { continue };
                for (from, into) in [(stream.try_clone(), far.try_clone()), (far.try_clone(), stream.try_clone())] {
                    let (Ok(from), Ok(into)) = (from, into) else { continue };
                    let line = line.clone();
                    std::thread::spawn(move || carry(from, into, &line));
                }
            }
        });
        Ok(())
    })
}

fn carry(mut from: TcpStream, mut into: TcpStream, line: &AtomicU8) {
    let is = |wanted: Line| line.load(Relaxed) == wanted as u8;
    let mut buffer = [0; 16 * 1024];
    let _ = from.set_read_timeout(Some(Duration::from_millis(50)));
    loop {
        // Not to be seen by whoever writes: the kernel takes what fits.
        while is(Line::Silent) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let room = if is(Line::Slow) { 1 } else { buffer.len() };
        match from.read(&mut buffer[..room]) {
            Ok(0) => break,
            Ok(count) if into.write_all(&buffer[..count]).is_err() => break,
            Ok(_) if room == 1 => std::thread::sleep(Duration::from_secs(1)),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
    }
    let _ = (from.shutdown(Shutdown::Both), into.shutdown(Shutdown::Both));
}

#[test]
#[ignore = "takes half a minute: `make faults`"]
fn a_control_plane_that_is_slow_or_silent_disturbs_nobody() -> Result<()> {
    let done = "the line to the control plane is silent, then carries a byte a second, and is well again; a proxy is killed meanwhile";
    let bar =
        "0 failed but those of the killed proxy's second; noticed within 15 s; what changed is in force within 30 s";
    row("F4", done, bar, spoiled())
}

fn spoiled() -> Result<String> {
    let ground = Ground::new()?;
    let (host, control) = (&ground.near, ground.control()?);
    let line = Arc::new(AtomicU8::new(Line::Well as u8));
    let to: SocketAddr = control.address().parse()?;
    spoil(host, to, 15999, &line)?;
    let flags =
        ["--name", "caller-1", "--capture", "none", "--metrics", METRICS, "--upstream", "127.0.0.1:9000=web:80"];
    // Of two flags that name a control plane both are used, in their order.
    let token = control.token("default", "caller", 1)?;
    let spoiled = ["--control", "127.0.0.1:15999", "--join-token-file", &token.to_string_lossy()];
    let web_token = control.token("default", "web", 1)?;
    let start = |service: &str, flags: &[&str], command: &[&str]| -> Result<Program> {
        let home = ground.home(service)?;
        let state = home.join("state").display().to_string();
        let workload = sheer_testmesh::mesh::Workload::new(host, service, &home)?;
        workload.flags(flags).flags(&["--state", &state]).flags(sheer_testmesh::shop::PLAIN_USER).start(command)
    };
    let binary = sheer_testmesh::program::sheer()?.to_string_lossy().into_owned();
    let serve = [&binary, "__demo-service", "catalog", "--port", "8080", "--version", "web-1"];
    let web_line = ["--control", "127.0.0.1:15999", "--join-token-file", &web_token.to_string_lossy()];
    let web = start("web", &[&["--name", "web-1", "--port", "8080"], &web_line[..]].concat(), &serve)?;
    let _caller = start("caller", &[&flags[..], &spoiled[..]].concat(), &["sleep", "infinity"])?;
    control.serves("web", 1)?;
    is_served(host, DOOR)?;
    let connected = |wanted: f64| -> Result<()> {
        ensure!(value(&metrics(host, METRICS)?, "sheer_control_connected", &[]) == wanted);
        Ok(())
    };
    wait::until("it is connected", PATIENCE, || connected(1.0))?;
    let callers = [Manner::Fresh, Manner::Kept].map(|manner| Callers::come(host, DOOR.parse()?, manner, 2));
    let callers = callers.into_iter().collect::<Result<Vec<_>>>()?;
    line.store(Line::Silent as u8, Relaxed);
    let silent = Instant::now();
    wait::until("the silence is noticed", Duration::from_secs(15), || connected(0.0))?;
    let noticed = silent.elapsed();
    // What serves starts again meanwhile, from what is on disk.
    kill(Processes::of(web.pid())?.proxy, Signal::SIGKILL)?;
    let killed = Instant::now();
    wait::until("the killed proxy serves again", Duration::from_secs(2), || callers::ask_once(host, DOOR.parse()?))?;
    let back = killed.elapsed();
    line.store(Line::Slow as u8, Relaxed);
    std::thread::sleep(Duration::from_secs(times(5, 60) as u64));
    control.write("marked.yaml", MARKED)?;
    line.store(Line::Well as u8, Relaxed);
    let well = Instant::now();
    wait::until("what changed is in force", Duration::from_secs(30), || marked(host))?;
    let in_force = well.elapsed();
    let asked: Vec<_> = callers.into_iter().flat_map(Callers::leave).collect();
    let lost: Vec<_> = asked.iter().filter(|it| it.answer.is_err()).collect();
    let outside: Vec<_> =
        lost.iter().filter(|it| it.ended < killed || it.began > killed + Duration::from_secs(1)).collect();
    ensure!(outside.is_empty(), "{} failed: {:?}", outside.len(), outside.first());
    Ok(format!(
        "{} calls, {} failed, all within a second of the kill; silence noticed after {noticed:.1?}; killed proxy back after \
         {back:.1?}; changes in force {in_force:.1?} after the line was well",
        asked.len(),
        lost.len()
    ))
}

const MARKED: &str = "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: marked}
spec:
  parentRefs: [{group: '', kind: Service, name: web}]
  rules:
  - filters:
    - {type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: x-marked, value: 'yes'}]}}
    backendRefs: [{name: web, port: 80}]
";

fn marked(host: &Host) -> Result<()> {
    let answer =
        run(host.command("curl").args(["-sS", "-i", "--max-time", "5", &format!("http://{DOOR}/probe/healthy")]))?;
    ensure!(answer.contains("x-marked: yes"), "{answer}");
    Ok(())
}

#[test]
fn a_cut_is_noticed_and_healed() -> Result<()> {
    let seconds = times(5, 120);
    let done =
        format!("every packet between proxies and control plane dropped for {seconds} s, a change made meanwhile");
    let bar = "0 failed; noticed within 15 s; connected, and the change in force, within 30 s of the heal";
    row("F3", &done, bar, cut(Duration::from_secs(seconds as u64)))
}

fn cut(lasts: Duration) -> Result<String> {
    let ground = Ground::new()?;
    let (host, control) = (&ground.near, ground.control()?);
    let _web = sample(&control, host, &ground.home("web")?, WEB, "web-1", &[])?;
    let _caller = caller(&control, host, &ground.home("caller")?, &["web:80"])?;
    control.serves("web", 1)?;
    is_served(host, DOOR)?;
    let callers = Callers::come(host, DOOR.parse()?, Manner::Kept, 4)?;
    let connected = |wanted: f64| -> Result<()> {
        ensure!(value(&metrics(host, METRICS)?, "sheer_control_connected", &[]) == wanted);
        Ok(())
    };
    wait::until("it is connected", PATIENCE, || connected(1.0))?;
    ground.net.cut(&ground.center, host)?;
    let began = Instant::now();
    wait::until("the cut is noticed", Duration::from_secs(15), || connected(0.0))?;
    let noticed = began.elapsed();
    let seen = value(&metrics(host, METRICS)?, "sheer_control_last_seen_seconds", &[]);
    let now = std::time::UNIX_EPOCH.elapsed()?.as_secs_f64();
    ensure!((0.0..5.0).contains(&(now - seen)), "last seen at {seen}, and it is {now}");
    control.write("marked.yaml", MARKED)?;
    std::thread::sleep(lasts.saturating_sub(began.elapsed()));
    ground.net.heal()?;
    let healed = Instant::now();
    wait::until("it is connected again", Duration::from_secs(30), || connected(1.0))?;
    let again = healed.elapsed();
    wait::until("the change is in force", Duration::from_secs(30), || marked(host))?;
    let in_force = healed.elapsed();
    let asked = callers.leave();
    none_failed(&asked)?;
    Ok(format!(
        "{} calls, 0 failed; noticed after {noticed:.1?}, connected {again:.1?} and in force {in_force:.1?} after the heal",
        asked.len()
    ))
}

/// A library in front of the system's clocks. The monotonic clock is left alone, as where an administrator sets the time.
struct Clock {
    variables: Vec<(&'static str, String)>,
    file: std::path::PathBuf,
}

impl Clock {
    fn new(file: std::path::PathBuf) -> Result<Self> {
        const PLACES: [&str; 2] = [
            "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
            "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",
        ];
        let library = PLACES.into_iter().find(|it| Path::new(it).exists()).context("apt-get install faketime")?;
        let variables = vec![
            ("LD_PRELOAD", library.to_owned()),
            ("FAKETIME_TIMESTAMP_FILE", file.to_string_lossy().into_owned()),
            ("FAKETIME_NO_CACHE", "1".to_owned()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
            ("DONT_FAKE_MONOTONIC", "1".to_owned()),
            ("FAKETIME_DISABLE_SHM", "1".to_owned()),
        ];
        let clock = Self { variables, file };
        clock.set("+0")?;
        Ok(clock)
    }

    fn set(&self, offset: &str) -> Result<()> {
        let staged = self.file.with_extension("new");
        std::fs::write(&staged, format!("{offset}\n"))?;
        std::fs::set_permissions(&staged, PermissionsExt::from_mode(0o644))?;
        Ok(std::fs::rename(staged, &self.file)?)
    }
}

#[test]
#[ignore = "takes half a minute: `make faults`"]
fn wrong_clocks_break_nothing_that_is_valid() -> Result<()> {
    let held = Duration::from_millis(times(3500, 30_000) as u64);
    let done = format!(
        "the clock of proxies, of the control plane, and of both jumps by +1 h, -1 h, +400 d, -30 d for {held:.1?}, and back"
    );
    let bar = "an hour disturbs nobody and renews nothing; an ended certificate makes readiness false, and all heals with the clock";
    row("F7", &done, bar, jump(held))
}

fn jump(held: Duration) -> Result<String> {
    let ground = Ground::new()?;
    let host = &ground.near;
    let (proxies, center) = (
        Clock::new(ground.net.directory().join("proxies.clock"))?,
        Clock::new(ground.net.directory().join("center.clock"))?,
    );
    let control = Control::start_with(&ground.center, &ground.net.directory().join("control"), &center.variables)?;
    let web_home = ground.home("web")?;
    let token = control.token("default", "web", 1)?;
    let binary = sheer_testmesh::program::sheer()?.to_string_lossy().into_owned();
    let serve = [&binary, "__demo-service", "catalog", "--port", "8080", "--version", "web-1"];
    let web = sheer_testmesh::mesh::Workload::new(host, "web", &web_home)?.variables(&proxies.variables);
    let _web = web
        .flags(&["--name", "web-1", "--port", "8080", "--metrics", "127.0.0.1:15101"])
        .flags(sheer_testmesh::shop::PLAIN_USER)
        .joins(&control, &token)
        .start(&serve)?;
    let caller_home = ground.home("caller")?;
    let token = control.token("default", "caller", 1)?;
    let asks = sheer_testmesh::mesh::Workload::new(host, "caller", &caller_home)?.variables(&proxies.variables);
    let _caller = asks
        .flags(&[
            "--name",
            "caller-1",
            "--capture",
            "none",
            "--metrics",
            METRICS,
            "--upstream",
            "127.0.0.1:9000=web:80",
        ])
        .flags(sheer_testmesh::shop::PLAIN_USER)
        .joins(&control, &token)
        .start(&["sleep", "infinity"])?;
    control.serves("web", 1)?;
    is_served(host, DOOR)?;
    let ends = || -> Result<[f64; 2]> {
        let end = |address: &str| {
            Ok::<_, anyhow::Error>(value(&metrics(host, address)?, "sheer_certificate_expiry_seconds", &[]))
        };
        Ok([end("127.0.0.1:15101")?, end(METRICS)?])
    };
    let ready = |address: &str| -> Result<bool> {
        let answer = run(host.command("curl").args([
            "-sS",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            &format!("http://{address}/ready"),
        ]))?;
        Ok(answer == "200")
    };
    let mut jumps = 0;
    for hour in ["+1h", "-1h"] {
        for clocks in [&[&proxies][..], &[&center], &[&proxies, &center]] {
            let before = ends()?;
            let callers = [Manner::Fresh, Manner::Kept].map(|manner| Callers::come(host, DOOR.parse()?, manner, 2));
            let callers = callers.into_iter().collect::<Result<Vec<_>>>()?;
            clocks.iter().try_for_each(|clock| clock.set(hour))?;
            // Longer than proxies look at the clock, and than a ping may go unanswered.
            std::thread::sleep(held);
            clocks.iter().try_for_each(|clock| clock.set("+0"))?;
            std::thread::sleep(Duration::from_millis(1500));
            let asked: Vec<_> = callers.into_iter().flat_map(Callers::leave).collect();
            none_failed(&asked)?;
            ensure!(ends()? == before, "{hour}: certificates were renewed");
            jumps += 1;
        }
    }
    let mut healed_after = Duration::ZERO;
    let far =
        [("+400d", &proxies, true), ("-30d", &proxies, false), ("+400d", &center, false), ("-30d", &center, false)];
    for (offset, clock, ends) in far {
        clock.set(offset)?;
        if ends {
            wait::until("an ended certificate makes readiness false", PATIENCE, || {
                ensure!(!ready(METRICS)? && !ready("127.0.0.1:15101")?, "they say that they are ready");
                Ok(())
            })?;
        } else {
            std::thread::sleep(held);
        }
        clock.set("+0")?;
        let back = Instant::now();
        wait::until(&format!("all is well after {offset}"), Duration::from_secs(30), || {
            callers::ask_once(host, DOOR.parse()?)?;
            ensure!(ready(METRICS)? && ready("127.0.0.1:15101")?, "they say that they are not ready");
            ensure!(metrics(host, METRICS)?.contains("sheer_control_connected 1"), "there is no control plane");
            Ok(())
        })?;
        healed_after = healed_after.max(back.elapsed());
        jumps += 1;
    }
    Ok(format!(
        "{jumps} jumps; hours: 0 failed, 0 renewed; the longest healing took {healed_after:.1?} after the clock was right"
    ))
}

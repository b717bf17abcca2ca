//! Events that no request may notice, each under the load of [`sheer_testmesh::shop`]: 500 requests a second.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use sheer_testmesh::faults::row;
use sheer_testmesh::mesh::{Control, PATIENCE, Workload};
use sheer_testmesh::net::Net;
use sheer_testmesh::program::{Processes, run, sheer};
use sheer_testmesh::shop::{self, AROUND, Customers, PLAIN_USER};
use sheer_testmesh::wait;
use std::io::{BufRead as _, BufReader, ErrorKind, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// kill -9 of the control plane, and its return.
#[test]
fn the_control_plane_is_not_on_the_request_path() -> Result<()> {
    let done = "kill -9 of the control plane, and its return, under 500 requests a second and 50 TCP connections";
    row("F1", done, "0 failed", without_a_control_plane())
}

fn without_a_control_plane() -> Result<String> {
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
    let report = customers.are_all_served()?;
    Ok(format!("{} requests, 0 failed", report["total"]["ok"]))
}

/// An orderly stop of one of two instances of everything. Among its callers are such as keep a TCP connection for as long
/// as the server says nothing else, and such as end theirs after five lines: neither may meet a reset or a lost line.
#[test]
fn a_stopped_instance_is_left_in_time() -> Result<()> {
    let done = "SIGTERM to one of two instances of everything, under 500 requests a second, gRPC streams and 60 TCP connections";
    row("F10", done, "0 failed, no reset, no lost line", stopped())
}

fn stopped() -> Result<String> {
    let net = Net::new()?;
    let host = net.host("one")?;
    let control = Control::start(&host, &net.directory().join("control"))?;
    let (one, two) = (net.directory().join("one"), net.directory().join("two"));
    [&one, &two].into_iter().try_for_each(std::fs::create_dir_all)?;
    let _stay = shop::open(&control, &host, &one, PLAIN_USER, 1)?;
    let mut leave = shop::open(&control, &host, &two, PLAIN_USER, 2)?;
    let targets = [&shop::TARGETS[..], &["tcp@100x10=tcp://echo:7000?lines=5"]].concat();
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
    let report = customers.are_all_served()?;
    Ok(format!("{} requests, 0 failed", report["total"]["ok"]))
}

/// An instance is told to stop while a client holds a TCP connection that it will never end. New connections go to the
/// other instance at once; the old one carries every line until the drain's deadline, and then ends with a reset, so that
/// the instance can end as well.
#[test]
fn a_connection_that_never_ends_is_let_go_at_the_deadline() -> Result<()> {
    const GRACE: Duration = Duration::from_secs(8);
    const DOOR: &str = "127.0.0.1:9000";
    const METRICS: &str = "127.0.0.1:15099";
    let net = Net::new()?;
    let host = net.host("one")?;
    let control = Control::start(&host, &net.directory().join("control"))?;
    let (one, two) = (net.directory().join("one"), net.directory().join("two"));
    [&one, &two].into_iter().try_for_each(std::fs::create_dir_all)?;
    let _stays = shop::instance(&host, &one, "echo", "7000/tcp", "v1", PLAIN_USER)?;
    control.serves("echo", 1)?;
    let seconds = GRACE.as_secs().to_string();
    let flags = [PLAIN_USER, &["--drain-grace", &seconds, "--metrics", METRICS]].concat();
    let mut leaves = shop::instance(&host, &two, "echo", "7000/tcp", "v1", &flags)?;
    control.serves("echo", 2)?;
    let upstream = format!("{DOOR}=echo:7000");
    let flags = [PLAIN_USER, &["--capture", "none", "--upstream", &upstream]].concat();
    let _caller = Workload::new(&host, "caller", net.directory())?.flags(&flags).start(&["sleep", "infinity"])?;

    let open = || host.inside(|| Ok(TcpStream::connect(DOOR)?)).and_then(|stream| Line::over(stream)?.says("hello"));
    let opened = || -> Result<u64> {
        let text = run(host.command("curl").args(["-sS", "--fail", &format!("http://{METRICS}/metrics")]))?;
        let lines = text.lines().filter(|line| line.starts_with("sheer_connections_opened_total{"));
        lines.map(|line| Ok(line.rsplit(' ').next().context("no value")?.parse::<u64>()?)).sum()
    };
    let mut held = wait::until("a connection leads to the instance that leaves", PATIENCE, || {
        let before = opened()?;
        let line = open()?;
        ensure!(opened()? > before, "it leads elsewhere");
        Ok(line)
    })?;
    leaves.signal(Signal::SIGTERM)?;
    let told = Instant::now();
    wait::until("new connections go elsewhere", Duration::from_secs(1), || {
        let before = opened()?;
        (0..10).try_for_each(|_| open().map(drop))?;
        ensure!(opened()? == before, "some go to the instance that leaves");
        Ok(())
    })?;
    let ended = loop {
        match held.says("still there") {
            Ok(line) => held = line,
            Err(error) => break error,
        }
        ensure!(told.elapsed() < 2 * GRACE, "the connection goes on");
        std::thread::sleep(Duration::from_millis(20));
    };
    let took = told.elapsed();
    eprintln!("ended {took:?} after SIGTERM: {ended:#}");
    ensure!(took > GRACE && took < GRACE + Duration::from_secs(1), "ended {took:?} after SIGTERM: {ended:#}");
    let kind = ended.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    ensure!(kind == Some(ErrorKind::ConnectionReset), "no reset: {ended:#}");
    let status = leaves.wait(Duration::from_secs(3))?;
    ensure!(status.success(), "the instance ended with {status}");
    Ok(())
}

/// A connection over which each line comes back.
struct Line(BufReader<TcpStream>);

impl Line {
    fn over(stream: TcpStream) -> Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(BufReader::new(stream)))
    }

    fn says(mut self, text: &str) -> Result<Self> {
        self.0.get_mut().write_all(format!("{text}\n").as_bytes())?;
        let mut back = String::new();
        // The server's goodbye may come before the answer; this client does not heed it.
        while back.is_empty() || back == "BYE\n" {
            back.clear();
            ensure!(self.0.read_line(&mut back)? > 0, "closed in order");
        }
        ensure!(back.trim_end() == text, "{back:?} came back");
        Ok(self)
    }
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
    let done = "kill -9 of a service's proxy, with and without a control plane";
    row("F2", done, "served again within 1 s", killed())
}

fn killed() -> Result<String> {
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
    let mut times = Vec::new();
    for with_control in [true, false] {
        if !with_control {
            control.program.signal(Signal::SIGKILL)?;
            control.program.wait(PATIENCE)?;
        }
        kill(Processes::of(server.pid())?.proxy, Signal::SIGKILL)?;
        let killed = Instant::now();
        wait::until("it is served again", Duration::from_secs(1), ask)?;
        times.push(format!("{:.2?}", killed.elapsed()));
    }
    Ok(format!("served again after {}", times.join(" and ")))
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

//! The root above all identities is replaced under load: 20 proxies in the long form, which join over the network.

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use serde_json::Value;
use sheer_testmesh::callers::{Callers, Manner};
use sheer_testmesh::faults::{long, row, times};
use sheer_testmesh::mesh::{Control, PATIENCE, Workload};
use sheer_testmesh::net::{Host, Net};
use sheer_testmesh::program::{Processes, Program};
use sheer_testmesh::shop::{self, Customers, PLAIN_USER};
use sheer_testmesh::wait;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Where the holder's application reaches `echo`, and `reviews`.
const ECHO: &str = "127.0.0.1:9000";
const REVIEWS: &str = "127.0.0.1:9001";
const METRICS: &str = "127.0.0.1:15102";

/// How long a rotation may take in which nobody is away.
const ROTATION: Duration = Duration::from_secs(60);

/// How many requests there are in the long form at least.
const ENOUGH: u64 = 100_000;

/// How soon a connection is ended whose peer is not accepted any more.
const CUT: Duration = Duration::from_secs(5);

/// A control plane on a host of its own, and workloads on another, which come by token.
struct Site<'a> {
    control: Control<'a>,
    host: &'a Host,
    home: PathBuf,
    workloads: Vec<Program>,
    /// Where the proxies of `echo` show theirs.
    metrics: Vec<String>,
}

impl<'a> Site<'a> {
    fn new(net: &Net, center: &'a Host, host: &'a Host) -> Result<Self> {
        let home = net.directory().join("control");
        let control = Control::start(center, &home)?;
        Ok(Self { control, host, home: net.directory().to_owned(), workloads: vec![], metrics: vec![] })
    }

    /// Starts a workload with a state directory and a token of its own.
    fn start(&mut self, name: &str, service: &str, flags: &[&str], command: &[String]) -> Result<usize> {
        let home = self.home.join(name);
        std::fs::create_dir_all(&home)?;
        let token = self.control.token("default", service, 1)?;
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        let workload =
            Workload::new(self.host, service, &home)?.flags(&["--name", name]).flags(flags).flags(PLAIN_USER);
        self.workloads.push(workload.joins(&self.control, &token).start(&command)?);
        Ok(self.workloads.len() - 1)
    }

    fn serve(&mut self, kind: &str, port: &str, instances: usize) -> Result<()> {
        let number = port.split('/').next().unwrap_or(port);
        for instance in 1..=instances {
            let command = shop::service(kind, &["--port", number])?;
            let metrics = format!("127.0.0.1:{}", 15200 + self.workloads.len());
            self.start(&format!("{kind}-{instance}"), kind, &["--port", port, "--metrics", &metrics], &command)?;
            if kind == "echo" {
                self.metrics.push(metrics);
            }
        }
        self.control.serves(kind, instances as u64).map(drop)
    }

    fn customers(&self, name: &str) -> Result<Customers> {
        let home = self.home.join(name);
        std::fs::create_dir_all(&home)?;
        let token = self.control.token("default", name, 1)?;
        let (address, token, state) = (self.control.address(), token.to_string_lossy(), home.join("state"));
        let state = state.to_string_lossy();
        let joins = ["--control", &address, "--join-token-file", &token, "--state", &state];
        Customers::named(name, self.host, &home, &[&joins[..], PLAIN_USER].concat(), &shop::TARGETS, &[])
    }

    fn status(&self) -> Result<Value> {
        self.control.query(&["identity", "status"])
    }

    fn rotate(&self, flags: &[&str]) -> Result<()> {
        self.control.sheer(&[&["identity", "rotate"], flags].concat()).map(drop)
    }

    /// Waits until a rotation is in this step.
    fn is_in(&self, step: &str) -> Result<Value> {
        wait::until(&format!("the rotation is in step {step}"), ROTATION, || {
            let status = self.status()?;
            ensure!(status["rotation"]["step"] == step, "{status}");
            Ok(status)
        })
    }

    /// The number of the root that issues.
    fn issuing(&self) -> Result<u64> {
        let status = self.status()?;
        let roots = status["roots"].as_array().context("no roots")?;
        let issues = roots.iter().find(|root| root["state"] == "issuing").context("no root issues")?;
        issues["number"].as_u64().context("no number")
    }

    /// Waits until no rotation is under way and this root alone is trusted; how long the last one took, in seconds.
    fn has_ended(&self, issuing: u64) -> Result<u64> {
        let status = wait::until("the rotation ends", ROTATION, || {
            let status = self.status()?;
            ensure!(status["rotation"].is_null(), "{}", self.control.sheer(&["identity", "status"])?);
            Ok(status)
        })?;
        ensure!(self.issuing()? == issuing, "root {issuing} should issue: {status}");
        let roots = status["roots"].as_array().context("no roots")?;
        ensure!(roots.iter().all(|root| root["state"] != "trusted"), "an old root is still trusted: {status}");
        let time = |name: &str| status["last"][name].as_u64().context("no last rotation");
        Ok(time("ended")? - time("began")?)
    }

    fn proxy_of(&self, workload: usize) -> Result<nix::unistd::Pid> {
        Ok(Processes::of(self.workloads[workload].pid())?.proxy)
    }

    /// Whether the control plane has a connection with a workload's proxy.
    fn is_connected(&self, name: &str, wanted: bool) -> Result<()> {
        wait::until(&format!("{name} is connected: {wanted}"), PATIENCE, || {
            let found = self.control.query(&["get", "workloads"])?;
            let all = found["workloads"].as_array().context("no list")?;
            let state = all.iter().find(|it| it["name"] == name).map_or(&Value::Null, |it| &it["state"]);
            ensure!((state == "connected") == wanted, "{state}");
            Ok(())
        })
    }

    /// How many connections were ended for a reason, by the caller's proxy or by those of `echo`: whichever knew first.
    fn ended(&self, reason: &str) -> Result<f64> {
        let mut ended = 0.0;
        for metrics in self.metrics.iter().map(String::as_str).chain([METRICS]) {
            let text = get(self.host, metrics, "/metrics")?;
            let name = format!("sheer_connections_ended_total{{reason=\"{reason}\"}} ");
            let count = text.lines().find_map(|line| line.strip_prefix(&name));
            ended += count.map_or(Ok(0.0), str::parse)?;
        }
        Ok(ended)
    }
}

impl Drop for Site<'_> {
    fn drop(&mut self) {
        while let Some(workload) = self.workloads.pop() {
            drop(workload);
        }
    }
}

fn get(host: &Host, address: &str, path: &str) -> Result<String> {
    let address: SocketAddr = address.parse()?;
    host.inside(move || {
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })
}

/// A connection of bytes that stays open.
struct Held(BufReader<TcpStream>);

impl Held {
    fn open(host: &Host) -> Result<Self> {
        wait::until("a connection is open", PATIENCE, || {
            let address: SocketAddr = ECHO.parse()?;
            let stream = host.inside(|| Ok(TcpStream::connect(address)?))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut held = Self(BufReader::new(stream));
            held.works()?;
            Ok(held)
        })
    }

    fn works(&mut self) -> Result<()> {
        self.0.get_mut().write_all(b"still there\n")?;
        let mut back = String::new();
        ensure!(self.0.read_line(&mut back)? > 0, "closed");
        ensure!(back == "still there\n", "{back:?} came back");
        Ok(())
    }

    /// Waits for its end.
    fn ends_within(mut self, limit: Duration) -> Result<Duration> {
        let began = Instant::now();
        self.0.get_mut().set_read_timeout(Some(limit))?;
        let mut byte = [0];
        match self.0.read(&mut byte) {
            Ok(0) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
            other => bail!("after {:?}: {other:?}", began.elapsed()),
        }
        Ok(began.elapsed())
    }
}

#[test]
#[ignore = "takes a minute: make faults"]
fn the_root_is_replaced_under_load() -> Result<()> {
    let rounds = times(1, 20);
    let proxies = if long() { 20 } else { 6 };
    let done = format!(
        "the root replaced {rounds} times under load, {proxies} proxies; then aborted at each step, with a control plane \
         killed in the middle and a proxy that was away from the beginning to the end"
    );
    let bar = "0 failed requests, of 100,000 in the long form; the old root is gone within a certificate's life";
    row("F8", &done, bar, replaced(rounds))
}

fn replaced(rounds: usize) -> Result<String> {
    let net = Net::new()?;
    let (center, host) = (net.host("center")?, net.host("near")?);
    let mut site = Site::new(&net, &center, &host)?;
    let instances = if long() { [6, 6, 5] } else { [1, 1, 1] };
    let kinds = [("reviews", "8081"), ("pricing", "8082/grpc"), ("echo", "7000/tcp")];
    for ((kind, port), instances) in kinds.into_iter().zip(instances) {
        site.serve(kind, port, instances)?;
    }
    let upstreams = ["--upstream", "127.0.0.1:9000=echo:7000", "--upstream", "127.0.0.1:9001=reviews:80"];
    let caller = [&["--capture", "none", "--metrics", METRICS], &upstreams[..]].concat();
    site.start("holder-1", "holder", &caller, &["sleep".into(), "infinity".into()])?;
    let idle = ["--capture", "none", "--port", "7001/tcp"];
    let idle = site.start("idle-1", "idle", &idle, &["sleep".into(), "infinity".into()])?;
    site.is_connected("idle-1", true)?;
    let customers = site.customers("customers")?;
    let mut held = Held::open(&host)?;
    customers.shop_for(Duration::from_secs(1))?;

    let mut slowest = 0;
    for round in 0..rounds {
        let next = site.issuing()? + 1;
        site.rotate(&[])?;
        slowest = slowest.max(site.has_ended(next)?);
        held.works().with_context(|| format!("round {round}"))?;
        customers.shop_for(Duration::from_secs(1))?;
    }
    aborted(&mut site, idle)?;
    held.works()?;
    customers.shop_for(Duration::from_secs(1))?;
    while long() && customers.answered()? < ENOUGH {
        customers.shop_for(Duration::from_secs(10))?;
    }
    let answered = customers.are_all_served()?["total"]["ok"].as_u64().unwrap_or_default();
    drop(held);
    let cut = cut(&site)?;
    Ok(format!(
        "{answered} requests, 0 failed; a rotation took {slowest} s at most, and connections of bytes went on; with --now \
         they were cut {cut:.1?} after the old root was dropped"
    ))
}

/// A rotation is taken back at each of its steps, and one goes on that nobody took back.
fn aborted(site: &mut Site<'_>, idle: usize) -> Result<()> {
    let issuing = site.issuing()?;
    // Who does not answer is waited for as long as it counts as connected, and then for as long as its certificate is
    // valid: both steps stand still.
    let idle = site.proxy_of(idle)?;
    kill(idle, Signal::SIGSTOP)?;
    site.rotate(&[])?;
    wait::until("the one who does not answer is waited for", PATIENCE, || {
        let rotation = site.status()?["rotation"].take();
        let waiting = rotation["waiting"].as_array().context("no list")?;
        ensure!(rotation["step"] == "spread" && waiting.len() == 1, "{rotation}");
        ensure!(waiting[0]["workload"] == "local/host/default/idle-1", "{rotation}");
        Ok(())
    })?;
    site.control.sheer(&["identity", "abort"])?;
    site.has_ended(issuing)?;
    ensure!(site.control.sheer(&["identity", "abort"]).is_err(), "there was nothing to abort");

    site.rotate(&[])?;
    is_waited_for(site)?;
    site.control.sheer(&["identity", "abort"])?;
    site.has_ended(issuing)?;

    // The last step is over in a second, unless somebody is quick.
    wait::until("a rotation is aborted in its last step", ROTATION * 2, || {
        site.rotate(&["--without-absent"])?;
        wait::until_true("the last step, or the end", ROTATION, || {
            site.status().is_ok_and(|it| it["rotation"].is_null() || it["rotation"]["step"] == "drop")
        })?;
        let back = site.control.sheer(&["identity", "abort"])?;
        ensure!(back.contains("going back"), "{back}");
        Ok(())
    })?;
    wait::until_true("it has gone back", ROTATION, || site.status().is_ok_and(|it| it["rotation"].is_null()))?;

    // Killed while a step stands still, a control plane goes on with it.
    site.rotate(&[])?;
    let to = is_waited_for(site)?;
    site.control.program.signal(Signal::SIGKILL)?;
    site.control.restart()?;
    ensure!(site.is_in("renew")?["rotation"]["to"] == to, "another rotation");
    kill(idle, Signal::SIGCONT)?;
    site.has_ended(to)?;

    // One who was away from the beginning to the end knows the old root alone, and follows without anybody's help.
    kill(idle, Signal::SIGSTOP)?;
    site.is_connected("idle-1", false)?;
    site.rotate(&["--without-absent"])?;
    site.has_ended(to + 1)?;
    kill(idle, Signal::SIGCONT)?;
    site.is_connected("idle-1", true)
}

/// Waits until the rotation waits for the one who is away; the number of the root that comes.
fn is_waited_for(site: &Site<'_>) -> Result<u64> {
    wait::until("the absent one is waited for", ROTATION, || {
        let renew = site.is_in("renew")?;
        let waiting = renew["rotation"]["waiting"].as_array().context("no list")?;
        ensure!(waiting.len() == 1 && waiting[0]["until"].as_u64() > Some(0), "{renew}");
        renew["rotation"]["to"].as_u64().context("no number")
    })
}

/// What is not trusted any more ends: connections under a root that is dropped at once, and to an identity that is none of
/// the service's any more. Requests do not notice the first.
fn cut(site: &Site<'_>) -> Result<Duration> {
    let callers = [Manner::Kept, Manner::Fresh].map(|it| Callers::come(site.host, REVIEWS.parse()?, it, 2));
    let callers = callers.into_iter().collect::<Result<Vec<_>>>()?;
    let held = Held::open(site.host)?;
    let (began, from) = (Instant::now(), site.issuing()?);
    let ends = std::thread::spawn(move || held.ends_within(ROTATION).map(|_| Instant::now()));
    site.rotate(&["--now"])?;
    wait::until_true("the old root is dropped", ROTATION, || {
        let dropped = |it: &Value| it["rotation"].is_null() || it["rotation"]["step"] == "drop";
        site.status().is_ok_and(|it| dropped(&it))
    })?;
    let dropped = Instant::now();
    let ended = ends.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    let cut = ended.saturating_duration_since(dropped);
    ensure!(cut < CUT, "it was cut after {cut:?}");
    site.has_ended(from + 1)?;
    ensure!(began.elapsed() < Duration::from_secs(60), "it took {:?}", began.elapsed());
    // Whoever still had a connection under it would notice by now.
    std::thread::sleep(CUT);
    let asked: Vec<_> = callers.into_iter().flat_map(Callers::leave).collect();
    let failed: Vec<_> = asked.iter().filter(|it| it.answer.is_err()).collect();
    ensure!(failed.is_empty() && asked.len() > 100, "{} of {} failed: {:?}", failed.len(), asked.len(), failed.first());
    let ended = site.ended("peer-untrusted")?;
    ensure!(ended >= 1.0, "{ended} connections were ended");

    let held = Held::open(site.host)?;
    let accounts = "apiVersion: v1\nkind: Service\nmetadata:\n  name: echo\n  annotations: {sheer.dev/service-accounts: other}\n\
                    spec:\n  ports: [{port: 7000}]\n";
    site.control.write("echo.yaml", accounts)?;
    held.ends_within(CUT)?;
    let ended = site.ended("identity-mismatch")?;
    ensure!(ended >= 1.0, "{ended} connections were ended");
    Ok(cut)
}

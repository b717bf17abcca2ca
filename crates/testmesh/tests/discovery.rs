//! How fast callers notice that a workload came. That one went: `renewal.rs`, `vanished.rs`, `undisturbed.rs`.

use anyhow::{Context, Result, ensure};
use sheer_testmesh::callers::{Callers, Manner, disturbed_after};
use sheer_testmesh::mesh::{Control, PATIENCE, Workload};
use sheer_testmesh::net::{Host, Net};
use sheer_testmesh::program::Program;
use sheer_testmesh::shop::{PLAIN_USER, service};
use sheer_testmesh::wait;
use std::path::Path;
use std::time::{Duration, Instant};

/// Where the caller's application reaches the service.
const DOOR: &str = "127.0.0.1:9000";

/// How long a workload that can serve may wait for its first request.
const USED_WITHIN: Duration = Duration::from_secs(1);

/// A server that begins to listen when there is the file LISTEN, and whose health path passes when there is HEALTHY.
const SERVER: &str = r#"
import http.server, os, sys, time
version, listen, healthy = sys.argv[1:]
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        probed = self.path == "/ready"
        if probed: print("probed", flush=True)
        self.send_response(503 if probed and not os.path.exists(healthy) else 200)
        self.send_header("X-Version", version)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *_): pass
class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 100
print("begun", flush=True)
while not os.path.exists(listen): time.sleep(0.005)
Server(("127.0.0.1", 8080), Handler).serve_forever()
"#;

/// An instance of `web` with this version and name.
fn late(host: &Host, home: &Path, version: &str, flags: &[&str], files: [&Path; 2]) -> Result<Program> {
    let [listen, healthy] = files.map(Path::to_string_lossy);
    let own = home.join(version);
    std::fs::create_dir(&own)?;
    let workload = Workload::new(host, "web", &own)?.flags(&["--name", version, "--port", "8080"]).flags(flags);
    workload.flags(PLAIN_USER).start(&["/usr/bin/python3", "-c", SERVER, version, &listen, &healthy])
}

/// A server that listens late, and one whose health path passes late: callers are answered by each within a second of
/// that moment, by none of them before, and they notice nothing else.
#[test]
fn a_started_workload_is_used_within_a_second() -> Result<()> {
    let net = Net::new()?;
    let host = net.host("one")?;
    let home = net.directory();
    let _control = Control::start(&host, &home.join("control"))?;
    let first = service("catalog", &["--port", "8080", "--version", "first"])?;
    let first: Vec<&str> = first.iter().map(String::as_str).collect();
    let _first = Workload::new(&host, "web", home)?.flags(&["--port", "8080"]).flags(PLAIN_USER).start(&first)?;
    let upstream = format!("{DOOR}=web:80");
    let _caller = Workload::new(&host, "caller", home)?
        .flags(&["--capture", "none", "--upstream", &upstream])
        .flags(PLAIN_USER)
        .start(&["sleep", "infinity"])?;
    wait::until("the door is open", PATIENCE, || {
        host.inside(|| std::net::TcpStream::connect(DOOR).context("not yet").map(drop))
    })?;
    let callers = Callers::come(&host, DOOR.parse()?, Manner::Fresh, 4)?;
    callers.are_answered_by(&["first"], PATIENCE)?;
    let begun = Instant::now();

    let (nowhere, listen, healthy) = (home.join("never"), home.join("listen"), home.join("healthy"));
    let mut listens = late(&host, home, "listens", &[], [&listen, &nowhere])?;
    listens.prints("begun", PATIENCE)?;
    used(&callers, begun, "listens", &["first"], &listen)?;

    let mut heals = late(&host, home, "heals", &["--health", "/ready"], [&listen, &healthy])?;
    heals.prints("probed\nprobed\n", PATIENCE)?;
    used(&callers, begun, "heals", &["first", "listens"], &healthy)?;

    let (_, disturbed) = disturbed_after(begun, &callers.leave());
    ensure!(disturbed.is_empty(), "{} requests disturbed: {:?}", disturbed.len(), disturbed[0]);
    Ok(())
}

/// From the moment that the file is there, and not before, callers are answered by this version as well.
fn used(callers: &Callers, begun: Instant, version: &str, before: &[&str], file: &Path) -> Result<()> {
    callers.are_answered_by(before, PATIENCE)?;
    let moment = Instant::now();
    std::fs::write(file, "")?;
    let first = wait::until(&format!("{version} is used"), PATIENCE, || {
        let asked = callers.since(moment).into_iter();
        let answered = asked.filter(|it| it.answer.as_deref() == Ok(version));
        answered.map(|it| it.ended).min().with_context(|| format!("it is not: {:?}", callers.since(moment).last()))
    })?;
    let early = callers.since(begun).into_iter().find(|it| it.answer.as_deref() == Ok(version) && it.ended < moment);
    ensure!(early.is_none(), "{version} was used before it could serve: {early:?}");
    let took = first.duration_since(moment);
    eprintln!("{version}: the first request was answered after {took:?}");
    ensure!(took < USED_WITHIN, "the first request was answered after {took:?}");
    Ok(())
}

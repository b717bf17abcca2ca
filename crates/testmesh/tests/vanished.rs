//! A host that vanishes: packets to and from it are dropped, and nobody says so.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use sheer_testmesh::callers::{self, Callers, Manner, disturbed_after};
use sheer_testmesh::faults::row;
use sheer_testmesh::mesh::{Control, PATIENCE, Workload};
use sheer_testmesh::net::{Host, Net};
use sheer_testmesh::program::{Processes, Program, sheer};
use sheer_testmesh::wait;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Where the caller's application reaches the service.
const DOOR: &str = "127.0.0.1:9000";

/// How long callers may notice that a host has vanished.
const LEFT_WITHIN: Duration = Duration::from_secs(5);

/// How long the silence of a connection of bytes is borne: docs/defaults.md.
const BORNE: Duration = Duration::from_secs(25);

const PLAIN_USER: &[&str] = &["--user", "nobody"];

/// Sample services of this kind on a host.
fn service(host: &Host, home: &Path, control: &Control<'_>, kind: [&str; 3], version: &str) -> Result<Program> {
    let [service, kind, port] = kind;
    std::fs::create_dir_all(home)?;
    let token = control.token("default", service, 1)?;
    let program = sheer()?;
    let number = port.split('/').next().unwrap_or(port);
    let command = [&program.to_string_lossy(), "__demo-service", kind, "--port", number, "--version", version];
    let workload = Workload::new(host, service, home)?.flags(&["--name", version, "--port", port]).flags(PLAIN_USER);
    workload.joins(control, &token).start(&command)
}

/// Whoever connects to this address of the host calls the service through a proxy.
fn caller(host: &Host, home: &Path, control: &Control<'_>, upstream: &str, more: &[&str]) -> Result<Program> {
    std::fs::create_dir_all(home)?;
    let token = control.token("default", "caller", 1)?;
    let workload =
        Workload::new(host, "caller", home)?.flags(&["--capture", "none", "--upstream", upstream]).flags(more);
    workload.flags(PLAIN_USER).joins(control, &token).start(&["sleep", "infinity"])
}

fn open_to_all(directory: &Path) -> Result<()> {
    // Proxies have users of their own.
    Ok(std::fs::set_permissions(directory, PermissionsExt::from_mode(0o755))?)
}

#[test]
fn requests_leave_a_vanished_host_within_five_seconds() -> Result<()> {
    let done = "every packet to and from one of two hosts dropped, with requests on open and new connections";
    row("F13", done, "requests leave it within 5 s", vanished())
}

fn vanished() -> Result<String> {
    let net = Net::new()?;
    open_to_all(net.directory())?;
    let (center, near, far) = (net.host("center")?, net.host("near")?, net.host("far")?);
    let home = net.directory();
    let control = Control::start(&center, &home.join("control"))?;
    let kind = ["web", "catalog", "8080"];
    let _stays = service(&near, &home.join("near"), &control, kind, "stays")?;
    let _caller = caller(&near, &home.join("near"), &control, &format!("{DOOR}=web:80"), &[])?;

    // The next token takes the place of the first one's file.
    wait::until("the first instance answers", PATIENCE, || callers::ask_once(&near, DOOR.parse()?))?;
    let _vanishes = service(&far, &home.join("far"), &control, kind, "vanishes")?;
    let come = |manner| Callers::come(&near, DOOR.parse()?, manner, 4);
    let callers = [come(Manner::Fresh)?, come(Manner::Kept)?];
    callers.iter().try_for_each(|it| it.are_answered_by(&["stays", "vanishes"], PATIENCE))?;
    let vanished = Instant::now();
    net.isolate(&far)?;
    // Longer than it may be noticed.
    std::thread::sleep(LEFT_WITHIN + Duration::from_secs(2));
    callers.iter().try_for_each(|it| it.are_answered_by(&["stays"], PATIENCE))?;
    let asked: Vec<_> = callers.into_iter().flat_map(Callers::leave).collect();
    let (left, disturbed) = disturbed_after(vanished, &asked);
    let failed: Vec<_> = disturbed.iter().filter_map(|it| it.answer.as_ref().err()).collect();
    eprintln!("left after {left:?}; {} requests disturbed, {} failed: {failed:?}", disturbed.len(), failed.len());
    ensure!(left < LEFT_WITHIN, "left after {left:?}: {:?}", disturbed.last());
    Ok(format!("left after {left:.1?}; {} requests waited or failed until then", disturbed.len()))
}

/// An application that pauses keeps its connections, for however long; a host that has vanished keeps none.
#[test]
#[ignore = "takes 45 s, all of it waiting: `make long`"]
fn bytes_survive_a_pause_and_end_with_their_host() -> Result<()> {
    let done = "the host at the other end of an open TCP connection vanishes; another application pauses for as long";
    row("F13", done, "the first ends within 30 s, the other loses nothing", paused())
}

fn paused() -> Result<String> {
    let net = Net::new()?;
    open_to_all(net.directory())?;
    let (center, near) = (net.host("center")?, net.host("near")?);
    let (far, gone) = (net.host("far")?, net.host("gone")?);
    let home = net.directory();
    let control = Control::start(&center, &home.join("control"))?;
    let pauses = service(&far, &home.join("far"), &control, ["pauses", "echo", "7000/tcp"], "pauses-1")?;
    let _vanishes = service(&gone, &home.join("gone"), &control, ["vanishes", "echo", "7000/tcp"], "vanishes-1")?;
    let upstreams = ["--upstream", "127.0.0.1:9001=vanishes:7000"];
    let _caller = caller(&near, &home.join("near"), &control, "127.0.0.1:9000=pauses:7000", &upstreams)?;
    let open = |port: u16| -> Result<TcpStream> {
        let open = || -> Result<TcpStream> {
            let mut stream = TcpStream::connect(("127.0.0.1", port))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(b"hello\n")?;
            let mut back = [0; 6];
            stream.read_exact(&mut back)?;
            Ok(stream)
        };
        wait::until("the echo answers", PATIENCE, || near.inside(open))
    };
    let (mut paused, mut lost) = (open(9000)?, open(9001)?);

    // The application pauses for longer than any silence is borne; its host is there.
    let application = Processes::of(pauses.pid())?.command()?;
    kill(application, Signal::SIGSTOP)?;
    paused.set_write_timeout(Some(Duration::from_secs(1)))?;
    let line = [b"x".repeat(1023), b"\n".to_vec()].concat();
    let mut sent = 0;
    let full = loop {
        match paused.write(&line[sent % line.len()..]) {
            Ok(count) => sent += count,
            Err(error) => break error,
        }
    };
    ensure!(matches!(full.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{full}");
    let full = Instant::now();

    // The other host vanishes: the connection ends, instead of hanging for a quarter of an hour.
    net.isolate(&gone)?;
    let vanished = Instant::now();
    lost.write_all(b"anybody there?\n")?;
    lost.set_read_timeout(Some(2 * BORNE))?;
    let ended = lost.read(&mut [0; 1]);
    let took = vanished.elapsed();
    eprintln!("ended after {took:?} with {ended:?}");
    ensure!(took > BORNE && took < BORNE + Duration::from_secs(5), "{ended:?} after {took:?}");
    ensure!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");

    std::thread::sleep((BORNE + Duration::from_secs(6)).saturating_sub(full.elapsed()));
    kill(application, Signal::SIGCONT)?;
    let mut back = vec![0; sent / line.len() * line.len()];
    paused.read_exact(&mut back).context("the connection did not survive the pause")?;
    ensure!(back.chunks(line.len()).all(|it| it == line), "bytes were lost");
    Ok(format!("ended after {took:.1?}; {sent} bytes survived the pause"))
}

//! Who may talk to whom, and what a listener on the wire sees.

use anyhow::{Context, Result, ensure};
use sheer_testmesh::mesh::{Control, PATIENCE, Workload};
use sheer_testmesh::net::{Host, Net};
use sheer_testmesh::program::{Program, run};
use sheer_testmesh::shop::{self, PLAIN_USER};
use sheer_testmesh::wait;
use std::path::Path;
use std::time::Duration;

/// A marker in a body is not on the wire between two hosts.
#[test]
fn nothing_readable_is_on_the_wire() -> Result<()> {
    send_a_marker("strict", false)
}

/// The same recorder finds it where nothing is changed.
#[test]
fn everything_is_readable_in_watch_mode() -> Result<()> {
    send_a_marker("watch", true)
}

fn send_a_marker(mode: &str, readable: bool) -> Result<()> {
    let net = Net::new()?;
    let (server, client, third) = (net.host("server")?, net.host("client")?, net.host("third")?);
    let control = Control::start(&third, &net.directory().join("control"))?;
    let home = net.directory().join(mode);
    std::fs::create_dir_all(&home)?;
    let service = format!("echo-{mode}");
    // A second port, so that plaintext has to say which it means.
    let _server = serve(&server, &control, &home, &service, &service, &["--mode", mode, "--port", "8999"])?;
    let _client = idle(&client, &control, &home, &format!("client-{mode}"))?;
    control.serves(&service, 1)?;
    let marker = format!("marker-{:032x}", rand::random::<u128>());
    let file = home.join("packets");
    let mut capture = Program::start("tcpdump", &home, &mut net.packets(&server, &file))?;
    capture.prints("listening on", PATIENCE)?;
    let url = format!("http://{service}/probe/echo");
    let answer = wait::until("the marker comes back", PATIENCE, || {
        let answer = inside(&client, &format!("client-{mode}-1"), &["-i", "--data-binary", &marker.repeat(100), &url])?;
        ensure!(answer.contains(&marker), "it answered {answer}");
        Ok(answer)
    })?;
    ensure!(answer.contains(&marker));
    let found = || -> Result<bool> {
        let packets = std::fs::read(&file)?;
        Ok(packets.windows(marker.len()).any(|window| window == marker.as_bytes()))
    };
    // The recorder is done with the exchange when it has seen as much as the exchange must have sent.
    wait::until("the exchange is recorded", PATIENCE, || {
        let bytes = std::fs::metadata(&file)?.len();
        ensure!(bytes > 4096 && (found()? || !readable), "{bytes} bytes, the marker is in them: {}", found()?);
        Ok(())
    })?;
    capture.signal(nix::sys::signal::Signal::SIGINT)?;
    capture.wait(PATIENCE)?;
    ensure!(found()? == readable, "mode {mode}: the marker must be readable: {readable}");
    Ok(())
}

/// Somebody without a certificate is told why not even a byte of the application is given.
#[test]
fn plaintext_to_a_strict_workload_is_refused_with_a_reason() -> Result<()> {
    let net = Net::new()?;
    let (server, stranger) = (net.host("server")?, net.host("stranger")?);
    let control = Control::start(&server, &net.directory().join("control"))?;
    let _server = serve(&server, &control, net.directory(), "reviews", "reviews", &["--inbound-port", "15006"])?;
    control.serves("reviews", 1)?;
    let url = format!("http://{}:15006/probe/healthy", server.address());
    let answer = run(stranger.command("curl").args(["-sS", "-i", "--max-time", "10", &url]))?;
    ensure!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    ensure!(answer.to_ascii_lowercase().contains("x-sheer-reason: plaintext-refused"), "{answer}");
    ensure!(!answer.contains("x-version"), "the application has answered: {answer}");
    Ok(())
}

/// Another service account that claims a service's name and labels gets no byte of its traffic.
#[test]
fn a_claimed_name_attracts_nothing() -> Result<()> {
    let net = Net::new()?;
    let (host, foreign) = (net.host("one")?, net.host("foreign")?);
    let control = Control::start(&host, &net.directory().join("control"))?;
    let one = net.directory().join("one");
    std::fs::create_dir_all(&one)?;
    let _victim = serve(&host, &control, &one, "reviews", "reviews", &[])?;
    let service = control.serves("reviews", 1)?;
    ensure!(service["accounts"].to_string().contains("reviews"), "no account is pinned: {service}");
    let _client = idle(&host, &control, net.directory(), "client")?;
    let claims = ["--service-account", "thief", "--name", "thief-1", "--label", "app=reviews"];
    let thief = serve(&foreign, &control, net.directory(), "reviews", "thief", &claims)?;
    wait::until("the claim is seen", PATIENCE, || {
        let service = control.serves("reviews", 1)?;
        ensure!(service["claimed_by"].to_string().contains("thief"), "nobody claims it: {service}");
        Ok(())
    })?;
    let answers = inside(
        &host,
        "client-1",
        &["-w", "%{http_code} %header{x-version}\n", "-o", "/dev/null", "http://reviews/probe/healthy?[1-200]"],
    )?;
    ensure!(answers.lines().count() == 200, "{answers}");
    ensure!(answers.lines().all(|line| line == "200 reviews"), "not all by the victim: {answers}");
    drop(thief);
    Ok(())
}

/// A service that says its `version` in each answer, on any host; other hosts than the control plane's join by token.
fn serve(
    host: &Host,
    control: &Control<'_>,
    home: &Path,
    service: &str,
    version: &str,
    flags: &[&str],
) -> Result<Program> {
    let command = shop::service("reviews", &["--port", "8081", "--version", version])?;
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let account = flags.iter().position(|flag| *flag == "--service-account").map_or(service, |at| flags[at + 1]);
    let workload = Workload::new(host, service, home)?.flags(&["--port", "8081"]).flags(PLAIN_USER).flags(flags);
    joined(workload, host, control, account)?.start(&command)
}

/// A workload that only calls others, by [`inside`].
fn idle(host: &Host, control: &Control<'_>, home: &Path, service: &str) -> Result<Program> {
    let workload = Workload::new(host, service, home)?.flags(PLAIN_USER).flags(&["--name", &format!("{service}-1")]);
    let mut program = joined(workload, host, control, service)?.start(&["sleep", "infinity"])?;
    program.prints("is ready", PATIENCE)?;
    Ok(program)
}

fn joined(workload: Workload, host: &Host, control: &Control<'_>, account: &str) -> Result<Workload> {
    if host.address() == control.host.address() {
        return Ok(workload);
    }
    Ok(workload.joins(control, &control.token("default", account, 1)?))
}

/// curl inside a workload.
fn inside(host: &Host, workload: &str, arguments: &[&str]) -> Result<String> {
    let sheer = sheer_testmesh::program::sheer()?;
    let limit = Duration::from_secs(30).as_secs().to_string();
    let mut command = host.command(sheer);
    command.args(["exec", workload, "--", "curl", "-sS", "--max-time", &limit]).args(arguments);
    run(&mut command).context("curl inside a workload")
}

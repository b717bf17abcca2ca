//! What people do wrong, and what machines run out of: it is said what and how to mend it, and nothing that runs is
//! disturbed. A customer asks all the time.

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use sheer_testmesh::faults::row;
use sheer_testmesh::mesh::{Control, PATIENCE, Workload};
use sheer_testmesh::net::{Host, Net};
use sheer_testmesh::program::{Program, run, sheer};
use sheer_testmesh::wait;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

const WEB: &str =
    "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {ports: [{port: 80, targetPort: 8080}]}\n";

fn service(name: &str) -> String {
    WEB.replace("web", name)
}

fn route(name: &str, backend: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {name}}}\nspec:\n  parentRefs: [{{kind: \
         Service, group: '', name: side}}]\n  rules: [{{matches: [{{path: {{type: PathPrefix, value: /{name}}}}}], \
         backendRefs: [{{name: {backend}, port: 80}}]}}]\n"
    )
}

/// One request over a connection of its own.
fn ask() -> Result<()> {
    let mut stream = TcpStream::connect("127.0.0.1:9000")?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"GET /probe/healthy HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    Ok(())
}

/// What a command says that must fail.
fn refused(control: &Control<'_>, arguments: &[&str]) -> Result<String> {
    match control.sheer(arguments) {
        Ok(text) => bail!("{arguments:?} succeeded: {text}"),
        Err(error) => Ok(format!("{error:#}")),
    }
}

fn contains(text: &str, expected: &[&str]) -> Result<()> {
    match expected.iter().find(|it| !text.contains(**it)) {
        Some(missing) => bail!("'{missing}' is not in\n{text}"),
        None => Ok(()),
    }
}

/// Each of these is put into the directory, named by `sheer check` with its remedy, and taken away again.
fn wrong_files(control: &Control<'_>) -> Result<()> {
    let long = service(&"x".repeat(1 << 20));
    let half = route("half", "web");
    let half = half.split_at(half.len() * 2 / 3).0;
    let cases: [(&str, &str, &[&str]); 8] = [
        (
            "type",
            &service("late").replace("[{port: 80, targetPort: 8080}]", "eighty"),
            &["type.yaml:4", "write [eighty]"],
        ),
        ("field", &service("late").replace("targetPort", "targetPrt"), &["field.yaml:4", "did you mean 'targetPort'?"]),
        ("twice", WEB, &["twice.yaml:3", "services.yaml:3"]),
        ("long", &long, &["long.yaml:3", "63"]),
        ("half", half, &["half.yaml:"]),
        (
            "kind",
            &service("late").replace("kind: Service", "kind: Servise"),
            &["kind.yaml:2", "did you mean 'Service'?"],
        ),
        ("dangling", &route("dangling", "wbe"), &["dangling.yaml:6", "no Service default/wbe", "did you mean 'web'?"]),
        ("binary", "a: \u{1}\u{2}\n", &["binary.yaml:1"]),
    ];
    for (name, text, expected) in cases {
        let file = format!("{name}.yaml");
        control.write(&file, text)?;
        wait::until(&format!("{file} is named"), PATIENCE, || {
            // A dangling reference is a warning: until a workload names the service.
            let said = control.sheer(&["check"]).or_else(|error| anyhow::Ok(format!("{error:#}")))?;
            ensure!(said.len() < 4000, "{} bytes are no message", said.len());
            contains(&said, expected)
        })?;
        control.write(&file, "")?;
        wait::until(&format!("{file} is forgotten"), PATIENCE, || {
            let said = control.sheer(&["check"])?;
            ensure!(!said.contains(&file), "{said}");
            Ok(())
        })?;
    }
    Ok(())
}

fn vanished_directory(control: &Control<'_>, home: &Path) -> Result<()> {
    let (config, away) = (home.join("control/mesh.d"), home.join("away"));
    std::fs::rename(&config, &away)?;
    wait::until("the missing directory is named", PATIENCE, || {
        contains(&refused(control, &["check"])?, &["the last good configuration stays in force", "mesh.d"])
    })?;
    control.sheer(&["get", "service", "web"])?;
    std::fs::rename(&away, &config)?;
    wait::until("it is back", PATIENCE, || control.sheer(&["check"])).map(drop)
}

/// The disk of the control plane's state is filled, and freed.
fn full_disk(control: &mut Control<'_>, state: &Path) -> Result<()> {
    let fill = state.join("fill");
    let output = format!("of={}", fill.display());
    // It ends when nothing is left.
    let filled = run(control.host.command("dd").args(["if=/dev/zero", &output, "bs=1k"]));
    ensure!(filled.is_err(), "the disk is not full");
    // Larger than what is free inside the file.
    let from: Vec<String> = (0..4000).map(|it| format!("--from=10.{}.{}.0/24", it / 256, it % 256)).collect();
    let token: Vec<&str> =
        ["token", "create", "--service-account", "web"].into_iter().chain(from.iter().map(String::as_str)).collect();
    for _ in 0..3 {
        let said = refused(control, &token)?;
        contains(&said, &["the state could not be written", "No space left on device", "free space"])?;
    }
    // A smaller write that still fits may come in between.
    wait::until("check tells", PATIENCE, || {
        refused(control, &token)?;
        contains(&refused(control, &["check"])?, &["the state cannot be written", "make room"])
    })?;
    control.write("fresh.yaml", &service("fresh"))?;
    wait::until("a change is delivered nevertheless", PATIENCE, || control.sheer(&["get", "service", "fresh"]))?;
    run(control.host.command("rm").arg(&fill))?;
    control.sheer(&token)?;
    wait::until("all is well", PATIENCE, || {
        let said = control.sheer(&["check"])?;
        ensure!(!said.contains("state"), "{said}");
        Ok(())
    })?;
    // Nothing of it is lost with the process.
    let before = control.query(&["get", "service", "web"])?;
    control.program.signal(Signal::SIGKILL)?;
    control.program.wait(PATIENCE)?;
    control.restart()?;
    let after = control.query(&["get", "service", "web"])?;
    let address = |it: &serde_json::Value| it["services"][0]["virtual_ips"].clone();
    ensure!(address(&before) == address(&after), "{before} and then {after}");
    Ok(())
}

/// Joins that cannot succeed say why; on a host of their own.
fn vain_joins(control: &Control<'_>, host: &Host, home: &Path) -> Result<()> {
    const LIBRARY: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";
    let library = [LIBRARY, "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1"];
    let library = library.into_iter().find(|it| Path::new(it).exists()).context("apt-get install faketime")?;
    let join = |name: &str, token: &Path, variables: &[(&str, &str)]| -> Result<Program> {
        let state = home.join(format!("{name}-state"));
        let mut command = host.command(sheer()?);
        command.args(["run", "web", "--name", name, "--user", "nobody", "--control", &control.address()]);
        command.arg("--state").arg(state).arg("--join-token-file").arg(token).args(["--", "sleep", "infinity"]);
        command.envs(variables.iter().copied());
        Program::start(name, home, &mut command)
    };
    let spent = control.token("default", "web", 1)?;
    let mut first = join("first", &spent, &[])?;
    first.prints("is ready", PATIENCE)?;
    first.stop()?;
    let mut second = join("second", &spent, &[])?;
    second.prints("already used by 1 other key", PATIENCE)?;
    contains(&second.output(), &["sheer token create"])?;
    ensure!(!second.wait(PATIENCE)?.success(), "a spent token joins");

    // Of a control plane that is not this one: its address is right, its root is not.
    let other = Control::start(host, &home.join("other"))?;
    let address = control.address();
    let own = home.join("foreign.token");
    std::fs::write(&own, other.sheer(&["token", "create", "--service-account", "web", "--advertise", &address])?)?;
    std::fs::set_permissions(&own, PermissionsExt::from_mode(0o600))?;
    let mut foreign = join("foreign", &own, &[])?;
    foreign.prints("is not the control plane that this workload trusts", PATIENCE)?;
    contains(&foreign.output(), &["sheer token create"])?;
    foreign.stop()?;

    // A port of the control plane's is taken.
    let config = home.join("other/mesh.d").to_string_lossy().into_owned();
    let state = home.join("third").to_string_lossy().into_owned();
    let taken =
        run(host.command(sheer()?).args(["control", "--config", &config, "--state", &state, "--sockets", &state]));
    contains(
        &format!("{:#}", taken.err().context("a port in use is used")?),
        &["0.0.0.0:15012", "another process has the port"],
    )?;

    let token = control.token("default", "web", 1)?;
    let past = [
        ("LD_PRELOAD", library),
        ("FAKETIME", "-400d"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ("DONT_FAKE_MONOTONIC", "1"),
    ];
    let mut early = join("early", &token, &past)?;
    early.prints("does not hold at this machine's time", PATIENCE)?;
    contains(&early.output(), &["set the clock"])?;
    early.stop()?;
    Ok(())
}

#[test]
fn what_is_wrong_is_said_and_disturbs_nothing_that_runs() -> Result<()> {
    let done = "the disk of the control plane filled, wrong files, vain joins, a customer all the time";
    row(
        "F6",
        done,
        "0 failed; what does not fit is refused with the remedy, the rest is served, and all recovers without a restart",
        troubled(),
    )
}

fn troubled() -> Result<String> {
    let net = Net::new()?;
    let home = net.directory();
    // Proxies have users of their own.
    std::fs::set_permissions(home, PermissionsExt::from_mode(0o755))?;
    let (center, host) = (net.host("center")?, net.host("host")?);
    let state = home.join("control/state");
    std::fs::create_dir_all(&state)?;
    run(center.command("mount").args(["-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs"]).arg(&state))?;
    let mut control = Control::start(&center, &home.join("control"))?;
    control.write("services.yaml", &format!("{WEB}---\n{}", service("side")))?;
    let program = sheer()?;
    let (web, door) = (control.token("default", "web", 1)?, control.token("default", "caller", 1)?);
    let serve = [&program.to_string_lossy(), "__demo-service", "catalog", "--port", "8080", "--version", "one"];
    let workload = Workload::new(&host, "web", home)?.flags(&["--port", "8080", "--user", "nobody"]);
    let _web = workload.joins(&control, &web).start(&serve)?;
    let caller = Workload::new(&host, "caller", home)?.flags(&["--capture", "none", "--user", "nobody"]);
    let caller = caller.flags(&["--upstream", "127.0.0.1:9000=web:80"]).joins(&control, &door);
    let _caller = caller.start(&["sleep", "infinity"])?;
    wait::until("web answers", PATIENCE, || host.inside(ask))?;

    // A route to a service that no document writes, but a workload names: nothing is wrong with it.
    control.write("named.yaml", &route("named", "caller"))?;
    wait::until("the route is in force", PATIENCE, || control.sheer(&["get", "httproute", "named"]))?;
    let said = control.sheer(&["check"])?;
    ensure!(!said.contains("is written"), "{said}");

    let (end, asked) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let customer = scope.spawn(|| {
            host.inside(|| {
                while !end.load(Relaxed) {
                    ask().with_context(|| format!("after {} requests", asked.load(Relaxed)))?;
                    asked.fetch_add(1, Relaxed);
                    std::thread::sleep(Duration::from_millis(10));
                }
                Ok(())
            })
        });
        let scenario = wrong_files(&control)
            .and_then(|()| vanished_directory(&control, home))
            .and_then(|()| vain_joins(&control, &host, home))
            .and_then(|()| full_disk(&mut control, &state));
        end.store(true, Relaxed);
        let undisturbed = customer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        eprintln!("{} requests meanwhile", asked.load(Relaxed));
        undisturbed.and(scenario)
    })?;
    ensure!(asked.load(Relaxed) > 100, "hardly anybody asked");
    Ok(format!("{} requests, 0 failed", asked.load(Relaxed)))
}

//! Programs that run already, or that need something of their host, beside the mesh as it is shipped.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use sheer_testmesh::mesh::{Control, PATIENCE, Person, Workload};
use sheer_testmesh::net::{Host, Net};
use sheer_testmesh::program::{Program, run, sheer};
use sheer_testmesh::shop::{self, PLAIN_USER};
use sheer_testmesh::unit::{Unit, Units};
use sheer_testmesh::wait;
use std::path::Path;
use std::process::Command;

/// nginx, a service of ours and Redis run as units of one host. They are adopted while they run and let go again: not a
/// byte of their files changes, nor a process. While adopted they call each other and a workload of another host, by
/// name and by address, and every call is authenticated; before and after, they call each other directly.
#[test]
fn three_units_of_a_host_are_adopted_and_let_go() -> Result<()> {
    let net = Net::new()?;
    let (center, one, other) = (net.host("center")?, net.host("one")?, net.host("other")?);
    let home = net.directory();
    let control = Control::start(&center, &home.join("control"))?;
    let files = [("nginx.conf", NGINX), ("redis.conf", REDIS)].map(|(name, text)| {
        let text = text.replace("HOME", &home.to_string_lossy()).replace("OWN", &one.address().to_string());
        (home.join(name), text)
    });
    files.iter().try_for_each(|(path, text)| std::fs::write(path, text))?;
    let state = home.join("unit-state");
    std::fs::create_dir(&state)?;
    std::os::unix::fs::chown(&state, Some(Person::ID), Some(Person::ID))?;
    let units = Units::new(&one, home)?;
    let stock = shop::service("reviews", &["--port", "8081", "--listen", "0.0.0.0", "--version", "stock"])?.join(" ");
    let front = units.start("front", "nobody", &format!("nginx -e stderr -c {}", files[0].0.display()))?;
    let stock = units.start("stock", "nobody", &stock)?;
    let cache = units.start("cache", "nobody", &format!("redis-server {}", files[1].0.display()))?;
    let all = [&front, &stock, &cache];
    let watched: Vec<&Path> = all.iter().map(|it| &*it.file).chain(files.iter().map(|it| &*it.0)).collect();
    let fingerprint = || run(Command::new("sha256sum").args(&watched)).map(|sums| (sums, processes(&all)));
    let addressed = format!("http://{}:8080/addressed/", one.address());
    wait::until("nginx reaches stock directly", PATIENCE, || expect(one.command("curl"), &[&addressed], "200 stock"))?;
    let before = fingerprint()?;

    let adopt = |unit: &Unit<'_>, service: &str, port: &str| {
        let workload = Workload::beside(&one, service, home)?.flags(&["--port", port, "--unit", &unit.name]);
        workload.flags(&["--mode", "permissive"]).joins(&control, &control.token("default", service, 1)?).adopt()
    };
    let mut proxies =
        [adopt(&front, "front", "8080")?, adopt(&stock, "stock", "8081")?, adopt(&cache, "cache", "6379/tcp")?];
    let away = Workload::new(&other, "away", home)?.flags(&["--port", "8080", "--name", "away"]).flags(PLAIN_USER);
    let application = shop::service("reviews", &["--port", "8080", "--version", "away"])?;
    let application: Vec<&str> = application.iter().map(String::as_str).collect();
    let _away = away.joins(&control, &control.token("default", "away", 1)?).start(&application)?;
    ["front", "stock", "cache", "away"].iter().try_for_each(|it| control.serves(it, 1).map(drop))?;

    // By address first, while no proxy has heard of the other service: nginx of stock, and stock's own of Redis.
    expect(front.command("curl"), &[&format!("http://{}:8081/probe/healthy", one.address())], "200 stock")?;
    let away_command = |program: &str| -> Result<Command> {
        let mut command = other.command(sheer()?);
        command.args(["exec", "away", "--", program]);
        Ok(command)
    };
    for caller in ["front", "stock", "cache", "away"] {
        let command = |program: &str| match caller {
            "front" => Ok(front.command(program)),
            "stock" => Ok(stock.command(program)),
            "cache" => Ok(cache.command(program)),
            _ => away_command(program),
        };
        let named = ["http://stock/probe/healthy", "http://away/probe/healthy", "http://front.default/named/"];
        for (url, by) in named.iter().zip(["stock", "away", "stock"]) {
            expect(command("curl")?, &[url], &format!("200 {by}")).context(caller)?;
        }
        let pong = run(command("redis-cli")?.args(["-h", "cache", "-p", "6379", "ping"])).context(caller)?;
        ensure!(pong.trim() == "PONG", "{caller}: {pong}");
    }
    expect(one.command("curl"), &[&addressed], "200 stock")?;
    authenticated(&control, &["front", "stock", "cache", "away"])?;

    for _ in ["in order", "at once"] {
        proxies.iter().try_for_each(|proxy| proxy.signal(Signal::SIGTERM))?;
    }
    proxies.iter_mut().try_for_each(|proxy| proxy.wait(PATIENCE).map(drop))?;
    let rules = run(one.command("nft").args(["list", "ruleset"]))?;
    ensure!(!rules.contains("sheer"), "left behind: {rules}");
    expect(one.command("curl"), &[&addressed], "200 stock")?;
    assert_eq!(fingerprint()?, before);
    Ok(())
}

/// Redis listens on the host's loopback alone. Workloads that name its port reach it at their own localhost, with root and
/// without; one that does not finds nothing there.
#[test]
fn a_database_of_the_host_is_reached_where_its_port_is_named() -> Result<()> {
    let net = Net::new()?;
    let host = net.host("one")?;
    let home = net.directory();
    let control = Control::start(&host, &home.join("control"))?;
    let mut redis = host.command("redis-server");
    redis.args(["--bind", "127.0.0.1", "--port", "6379", "--save", "", "--dir"]).arg(home);
    let _redis = Program::start("redis", home, &mut redis)?;
    let person = Person::new(&host, home)?;
    let named = ["--host-port", "6379"];
    let rootless = Workload::of_person(&person, "rootless")?.flags(&named).flags(&["--name", "rootless"]);
    let workloads = [
        Workload::new(&host, "root", home)?.flags(&named).flags(PLAIN_USER).flags(&["--name", "root"]),
        rootless.joins(&control, &control.token("default", "rootless", 1)?),
        Workload::new(&host, "without", home)?.flags(PLAIN_USER).flags(&["--name", "without"]),
    ];
    let mut running = Vec::new();
    for workload in workloads {
        running.push(workload.start(&["sleep", "infinity"])?);
    }
    running.iter_mut().try_for_each(|program| program.prints("is ready", PATIENCE))?;
    let ping = |mut sheer: Command, workload: &str| {
        run(sheer.args(["exec", workload, "--", "redis-cli", "-h", "127.0.0.1", "ping"]))
    };
    for (command, workload) in [(host.command(sheer()?), "root"), (person.command(sheer()?), "rootless")] {
        let answer = ping(command, workload)?;
        ensure!(answer.trim() == "PONG", "{workload}: {answer}");
    }
    let refused = ping(host.command(sheer()?), "without").err().context("it was reached without being named")?;
    ensure!(format!("{refused:#}").contains("refused"), "{refused:#}");
    Ok(())
}

/// Strict workloads, one in a control group and one in a network of its own: in plaintext comes in who an exception names,
/// at the port that it names. All others are told why not, and counted.
#[test]
fn plaintext_passes_where_an_exception_names_port_and_network() -> Result<()> {
    let net = Net::new()?;
    let (host, monitor, stranger) = (net.host("one")?, net.host("monitor")?, net.host("stranger")?);
    let home = net.directory();
    let control = Control::start(&host, &home.join("control"))?;
    let exception = |workload: &str, port: &str| {
        EXCEPTION.replace("WORKLOAD", workload).replace("PORT", port).replace("FROM", &monitor.address().to_string())
    };
    control.write("exceptions.yaml", &[exception("shop", "8081"), exception("own", "8080")].join("---\n"))?;
    let units = Units::new(&host, home)?;
    let serve = |port: &str| shop::service("reviews", &["--port", port, "--listen", "0.0.0.0"]).map(|it| it.join(" "));
    let shop = units.start("shop", "nobody", &format!("sh -c '{} & exec {}'", serve("8081")?, serve("8082")?))?;
    let ports = ["--port", "8081", "--port", "8082", "--name", "shop", "--metrics", "127.0.0.1:15090"];
    let beside = Workload::beside(&host, "shop", home)?.flags(&ports).flags(&["--unit", &shop.name]);
    let _proxy = beside.flags(&["--mode", "strict"]).adopt()?;
    let own = Workload::new(&host, "own", home)?.flags(&["--port", "8080", "--name", "own", "--inbound-port", "15006"]);
    let application = shop::service("reviews", &["--port", "8080"])?;
    let application: Vec<&str> = application.iter().map(String::as_str).collect();
    let _own = own.flags(PLAIN_USER).start(&application)?;
    ["shop", "own"].iter().try_for_each(|it| control.serves(it, 1).map(drop))?;

    let get = |from: &Host, port: u16| {
        let url = format!("http://{}:{port}/probe/healthy", host.address());
        run(from.command("curl").args(["-sS", "-i", "--max-time", "10", &url]))
    };
    for port in [8081, 15006] {
        let admitted = get(&monitor, port)?;
        ensure!(admitted.starts_with("HTTP/1.1 200"), "the exception does not hold: {admitted}");
    }
    for (from, port) in [(&monitor, 8082), (&stranger, 8081), (&stranger, 8082), (&stranger, 15006)] {
        let refused = get(from, port)?;
        let told = refused.to_ascii_lowercase().contains("x-sheer-reason: plaintext-refused");
        ensure!(refused.starts_with("HTTP/1.1 403") && told, "{refused}");
    }
    let metrics = run(host.command("curl").args(["-sS", "http://127.0.0.1:15090/metrics"]))?;
    let count =
        metrics.lines().find(|it| it.starts_with("sheer_connections_refused_total") && it.contains("plaintext"));
    ensure!(count.is_some_and(|it| it.ends_with(" 3")), "{count:?}");
    Ok(())
}

const EXCEPTION: &str = "apiVersion: sheer.dev/v1alpha1
kind: Workload
metadata: {name: WORKLOAD}
spec:
  plaintextExceptions:
  - {ports: [PORT], cidrs: [FROM], reason: the monitoring host has no proxy yet}
";

/// What runs in the units, by process id and start.
fn processes(units: &[&Unit<'_>]) -> Vec<String> {
    let stat = |unit: &&Unit<'_>| {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", unit.program.pid())).unwrap_or_default();
        let fields: Vec<&str> = text.rsplit(") ").next().unwrap_or_default().split(' ').collect();
        format!("{} since {:?}", unit.program.pid(), fields.get(19))
    };
    units.iter().map(stat).collect()
}

/// Calls an address; status and version must be these.
fn expect(mut curl: Command, arguments: &[&str], wanted: &str) -> Result<()> {
    let how = ["-sS", "--max-time", "10", "-o", "/dev/null", "-w", "%{http_code} %header{x-version}"];
    let answer = run(curl.args(how).args(arguments))?;
    ensure!(answer.trim() == wanted, "{arguments:?} answered {answer}");
    Ok(())
}

/// Whether these services called each other over mutual TLS, and nobody but nginx was called in plaintext.
fn authenticated(control: &Control<'_>, services: &[&str]) -> Result<()> {
    wait::until("all calls are told of", PATIENCE, || {
        let edges = control.query(&["edges", "--side", "inbound", "--window", "10m"])?;
        let edges = edges["rows"].as_array().or(edges["edges"].as_array()).context("no edges")?;
        let between = |edge: &&Value, source: &str, destination: &str| {
            edge["source"] == format!("default/{source}") && edge["destination"] == format!("default/{destination}")
        };
        for destination in services {
            for source in services {
                let edge = edges.iter().find(|edge| between(edge, source, destination));
                ensure!(edge.is_some_and(|edge| edge["mtls"] == true), "{source} -> {destination}: {edge:?}");
            }
        }
        let plain = edges.iter().find(|edge| edge["mtls"] != true && edge["destination"] != "default/front");
        ensure!(plain.is_none(), "somebody came in plaintext: {plain:?}");
        Ok(())
    })
}

const NGINX: &str = "daemon off;
pid HOME/unit-state/nginx.pid;
worker_processes 1;
events {}
http {
  access_log off;
  client_body_temp_path HOME/unit-state/body;
  proxy_temp_path HOME/unit-state/proxy;
  fastcgi_temp_path HOME/unit-state/fastcgi;
  uwsgi_temp_path HOME/unit-state/uwsgi;
  scgi_temp_path HOME/unit-state/scgi;
  resolver 192.0.2.53 ipv6=off;
  server {
    listen 8080;
    location /named/ { set $peer stock; proxy_pass http://$peer/probe/healthy; }
    location /addressed/ { proxy_pass http://OWN:8081/probe/healthy; }
  }
}
";

const REDIS: &str = "bind 0.0.0.0
port 6379
protected-mode no
save \"\"
dir HOME/unit-state
";

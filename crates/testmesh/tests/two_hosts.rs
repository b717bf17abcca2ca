//! Two hosts that share nothing but a route, and a control plane on a third.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sheer_testmesh::mesh::{Control, PATIENCE, Person, Workload};
use sheer_testmesh::net::{Host, Net};
use sheer_testmesh::program::{Program, run, sheer};
use sheer_testmesh::shop::{self, AROUND, Customers, PLAIN_USER};
use sheer_testmesh::unit::{Unit, Units};
use sheer_testmesh::wait;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// The ways to capture, as workloads are named after them, and the port that each one's application listens on: those
/// without a network of their own share the host's ports.
const CAPTURES: [(&str, &str); 6] =
    [("netns", "8080"), ("rootless", "8080"), ("cgroup", "8083"), ("here", "8084"), ("env", "8085"), ("none", "8086")];

/// One of the two hosts, with what runs on it.
struct Side<'a> {
    name: &'static str,
    host: &'a Host,
    container: &'a Host,
    units: &'a Units<'a>,
    person: Person<'a>,
    home: PathBuf,
}

/// A workload that is called, and from which others are called.
struct Resident<'a> {
    service: String,
    programs: Vec<Program>,
    unit: Option<Unit<'a>>,
}

/// Workloads of all captures on both hosts call each other, and themselves: 144 calls, each of them answered, and none of
/// them without mutual TLS between the identities that were meant. What cannot be carried does not leave.
#[test]
fn workloads_of_every_capture_call_each_other() -> Result<()> {
    let net = Net::new()?;
    let (center, near, far) = (net.host("center")?, net.host("near")?, net.host("far")?);
    let (near_container, far_container) = (net.container(&near, "near-c")?, net.container(&far, "far-c")?);
    let control = Control::start(&center, &net.directory().join("control"))?;
    let (near_home, far_home) = (net.directory().join("near"), net.directory().join("far"));
    let (near_units, far_units) = (Units::new(&near, &near_home)?, Units::new(&far, &far_home)?);
    let sides = [
        Side::new("near", &near, &near_container, &near_units, near_home)?,
        Side::new("far", &far, &far_container, &far_units, far_home)?,
    ];
    let services: Vec<String> = sides.iter().flat_map(|side| CAPTURES.map(|it| side.service(it.0))).collect();
    let mut residents = Vec::new();
    for side in &sides {
        for (capture, port) in CAPTURES {
            residents.push((side, capture, side.start(&control, capture, port, &services)?));
        }
    }
    for service in &services {
        control.serves(service, 1).with_context(|| {
            let programs = residents.iter().flat_map(|it| &it.2.programs);
            programs.map(Program::output).collect::<Vec<_>>().join("\n---\n")
        })?;
    }
    for (side, capture, resident) in &residents {
        let urls = services.iter().enumerate().map(|(index, service)| match *capture {
            "none" => format!("http://127.0.0.1:{}/probe/healthy", upstream_port(index)),
            _ => format!("http://{service}/probe/healthy"),
        });
        let mut curl = side.command(capture, resident, "curl")?;
        curl.args(["-sS", "--fail-early", "--max-time", "10", "-w", "%{http_code} %header{x-version}\\n"]);
        for url in urls {
            curl.args(["-o", "/dev/null", &url]);
        }
        let answers = run(&mut curl).with_context(|| format!("from {}", resident.service))?;
        let wanted: Vec<String> = services.iter().map(|service| format!("200 {service}")).collect();
        ensure!(answers.lines().eq(wanted.iter().map(String::as_str)), "{} heard\n{answers}", resident.service);
    }
    all_were_authenticated(&control, &services)?;
    residents.iter().try_for_each(|(side, capture, resident)| side.refuses_udp(capture, resident, center.address()))
}

/// No packet passes between one host and the control plane for ten seconds: no request of that host's workloads fails,
/// and what was changed meanwhile is in force there soon after packets pass again.
#[test]
fn a_host_cut_off_from_the_control_plane_serves_on() -> Result<()> {
    let net = Net::new()?;
    let (center, near, far) = (net.host("center")?, net.host("near")?, net.host("far")?);
    let control = Control::start(&center, &net.directory().join("control"))?;
    let mut shops = Vec::new();
    for (count, (host, name)) in (1..).zip([(&near, "near"), (&far, "far")]) {
        let home = net.directory().join(name);
        std::fs::create_dir_all(&home)?;
        let services = [("reviews", "8081"), ("pricing", "8082/grpc"), ("echo", "7000/tcp")];
        for (kind, port) in services {
            let joining = joining(&control, kind, &home)?;
            let flags: Vec<&str> = joining.iter().map(String::as_str).chain(PLAIN_USER.iter().copied()).collect();
            shops.push(shop::instance(host, &home, kind, port, name, &flags)?);
        }
        services.iter().try_for_each(|(kind, _)| control.serves(kind, count).map(drop))?;
    }
    let joining = joining(&control, "customers", net.directory())?;
    let own = PLAIN_USER.iter().chain(&["--name", "customers"]);
    let flags: Vec<&str> = joining.iter().map(String::as_str).chain(own.copied()).collect();
    let customers = Customers::come(&near, net.directory(), &flags)?;
    let answer = || {
        let mut command = near.command(sheer()?);
        command.args(["exec", "customers", "--", "curl", "-sS", "-i", "--max-time", "5"]);
        run(command.arg("http://reviews/probe/healthy"))
    };
    customers.shop_for(AROUND)?;
    net.cut(&center, &near)?;
    control.write("marked.yaml", MARKED)?;
    customers.shop_for(AROUND)?;
    let unmarked = answer()?;
    ensure!(unmarked.contains("200 OK") && !unmarked.contains(MARK), "it was told behind the cut: {unmarked}");
    net.heal()?;
    let healed = Instant::now();
    wait::until("the change is in force", PATIENCE, || {
        let marked = answer()?;
        ensure!(marked.contains(MARK), "{marked}");
        Ok(())
    })?;
    eprintln!("told {:?} after packets pass again", healed.elapsed());
    let report = customers.are_all_served()?;
    let versions = report["loads"].to_string();
    ensure!(versions.contains("\"near\"") && versions.contains("\"far\""), "only one host served: {versions}");
    Ok(())
}

/// In each answer of the service, as soon as its callers are told.
const MARK: &str = "x-marked: yes";

const MARKED: &str = "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: marked}
spec:
  parentRefs: [{group: '', kind: Service, name: reviews}]
  rules:
  - filters:
    - {type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: x-marked, value: 'yes'}]}}
    backendRefs: [{name: reviews, port: 80}]
";

/// Flags of a workload that joins a control plane on another host as this service account.
fn joining(control: &Control<'_>, account: &str, home: &Path) -> Result<Vec<String>> {
    let token = control.token("default", account, 1)?.display().to_string();
    let state = home.join(format!("{account}-state")).display().to_string();
    let flags = ["--control", &control.address(), "--join-token-file", &token, "--state", &state];
    Ok(flags.map(String::from).into())
}

/// Whether each service was called by each, over mutual TLS by the caller's identity, and by nobody else.
fn all_were_authenticated(control: &Control<'_>, services: &[String]) -> Result<()> {
    wait::until("all calls are told of", PATIENCE, || {
        let edges = control.query(&["edges", "--side", "inbound", "--window", "10m"])?;
        let edges = edges["edges"].as_array().or(edges["rows"].as_array()).context("no edges")?;
        for destination in services {
            for source in services {
                let is_it = |edge: &&Value| {
                    edge["source"] == format!("default/{source}")
                        && edge["destination"] == format!("default/{destination}")
                };
                let edge = edges.iter().find(is_it).with_context(|| format!("no edge {source} -> {destination}"))?;
                ensure!(edge["mtls"] == true && edge["total"]["requests"] == 1, "{edge}");
            }
        }
        let strange = edges.iter().find(|edge| edge["mtls"] != true);
        ensure!(strange.is_none(), "somebody came without mutual TLS: {strange:?}");
        Ok(())
    })
}

/// Where a workload without capture reaches a service.
fn upstream_port(index: usize) -> usize {
    9000 + index
}

impl<'a> Side<'a> {
    fn new(
        name: &'static str,
        host: &'a Host,
        container: &'a Host,
        units: &'a Units<'a>,
        home: PathBuf,
    ) -> Result<Self> {
        let person = Person::new(host, &home)?;
        Ok(Self { name, host, container, units, person, home })
    }

    fn service(&self, capture: &str) -> String {
        format!("{}-{capture}", self.name)
    }

    /// Starts a workload as its users would, in this capture.
    fn start(&self, control: &Control<'_>, capture: &str, port: &str, services: &[String]) -> Result<Resident<'a>> {
        let service = self.service(capture);
        let token = control.token("default", &service, 1)?;
        let application = shop::service("reviews", &["--port", port, "--version", &service])?;
        let words: Vec<&str> = application.iter().map(String::as_str).collect();
        let open: Vec<&str> = [&words[..], &["--listen", "0.0.0.0"]].concat();
        let join = |workload: Workload| workload.flags(&["--port", port, "--name", &service]).joins(control, &token);
        let root = || Workload::new(self.host, &service, &self.home);
        let (mut programs, mut unit) = (Vec::new(), None);
        let proxy = match capture {
            "netns" => join(root()?.flags(&["--user", "nobody"])).start(&words)?,
            "rootless" => join(Workload::of_person(&self.person, &service)?).start(&words)?,
            "env" => join(root()?.flags(&["--user", "nobody", "--capture", "env"])).start(&open)?,
            "none" => {
                let upstreams: Vec<String> = services
                    .iter()
                    .enumerate()
                    .flat_map(|(index, name)| {
                        ["--upstream".to_owned(), format!("127.0.0.1:{}={name}:80", upstream_port(index))]
                    })
                    .collect();
                let upstreams: Vec<&str> = upstreams.iter().map(String::as_str).collect();
                join(root()?.flags(&["--user", "nobody", "--capture", "none"]).flags(&upstreams)).start(&open)?
            }
            "cgroup" => {
                let started = self.units.start(&service, "nobody", &open.join(" "))?;
                let beside = Workload::beside(self.host, &service, &self.home)?;
                let proxy = join(beside.flags(&["--unit", &started.name, "--mode", "strict"])).adopt()?;
                unit = Some(started);
                proxy
            }
            "here" => {
                let mut command = self.container.command(open[0]);
                command.args(&open[1..]);
                programs.push(Program::start(&service, &self.home, &mut command)?);
                let beside = Workload::beside(self.container, &service, &self.home)?;
                join(beside.flags(&["--capture", "here", "--mode", "strict"])).adopt()?
            }
            other => anyhow::bail!("there is no capture {other}"),
        };
        programs.push(proxy);
        Ok(Resident { service, programs, unit })
    }

    /// UDP other than DNS is refused at once, counted by the proxy and named by the supervisor; who captures no packets
    /// says so.
    fn refuses_udp(&self, capture: &str, resident: &Resident<'_>, target: Ipv4Addr) -> Result<()> {
        let service = &resident.service;
        let said = |text: &str| resident.programs.iter().any(|it| it.output().contains(text));
        let (host, runs) = match capture {
            "netns" | "cgroup" => (self.host, self.host.path("/run/sheer/run")),
            "rootless" => (self.host, self.person.home.join("run/sheer/run")),
            "here" => (self.container, self.container.path("/run/sheer/run")),
            _ => {
                ensure!(said("goes around the mesh"), "{service} does not say what it leaves alone");
                return Ok(());
            }
        };
        let record: Value =
            serde_json::from_slice(&std::fs::read(runs.join(format!("default_{service}/workload.json")))?)?;
        let metrics = format!("http://{}/metrics", record["metrics"].as_str().context("no metrics")?);
        let counts = |count: u64| -> Result<()> {
            let metrics = run(host.command("curl").args(["-sS", &metrics]))?;
            let refused = metrics.lines().find(|line| line.starts_with("sheer_refused_total{what=\"udp\"}"));
            ensure!(refused.is_some_and(|line| line.ends_with(&format!(" {count}"))), "{service}: {refused:?}");
            Ok(())
        };
        counts(0)?;
        let mut send = self.command(capture, resident, "bash")?;
        let sent = send.args(["-c", &format!("echo x > /dev/udp/{target}/9")]).output()?;
        let complaint = String::from_utf8_lossy(&sent.stderr);
        ensure!(complaint.contains("not permitted"), "{service} could send: {complaint}");
        wait::until("it is counted", PATIENCE, || counts(1))?;
        ensure!(said("UDP other than DNS of the workload cannot be carried"), "{service}: nobody was told");
        Ok(())
    }

    /// A program that is captured as the workload is.
    fn command(&self, capture: &str, resident: &Resident<'_>, program: &str) -> Result<Command> {
        let exec = |mut command: Command| {
            command.args(["exec", &resident.service, "--", program]);
            command
        };
        Ok(match (capture, &resident.unit) {
            ("netns" | "env", _) => exec(self.host.command(sheer()?)),
            ("rootless", _) => exec(self.person.command(sheer()?)),
            ("here", _) => self.container.command(program),
            (_, Some(unit)) => unit.command(program),
            _ => self.host.command(program),
        })
    }
}

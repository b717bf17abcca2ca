//! F20: configuration that changes without a pause. F21: configuration that is poison. F22: very much of it.

use crate::site::{DOOR, Ground, beside, caller, callers_of, door, is_served, listen, none_failed, sample};
use crate::stored::{marked_with, processor_time, shows};
use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;
use sheer_testmesh::callers::{self, Callers, Manner};
use sheer_testmesh::faults::{row, times};
use sheer_testmesh::mesh::{Control, PATIENCE};
use sheer_testmesh::net::Host;
use sheer_testmesh::program::{Processes, run, sheer};
use sheer_testmesh::wait;
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[test]
#[ignore = "takes half a minute: `make faults`"]
fn a_storm_of_changes_is_taken_together() -> Result<()> {
    let (seconds, proxies) = (times(4, 60), times(4, 100));
    let done = format!(
        "a file of the configuration replaced 1000 times a second for {seconds} s, {proxies} proxies that use what changes"
    );
    row(
        "F20",
        &done,
        "taken together; 0 failed; a proxy uses at most 20 % of a core; the last change in force in every proxy 2 s after the end",
        storm(seconds, proxies),
    )
}

/// Whether an answer at this door of the host that the thread is in shows the value.
fn is_marked(door: &str, value: &str) -> Result<()> {
    let mut stream = TcpStream::connect(door)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /probe/healthy HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.contains(&format!("x-marked: {value}\r")), "{answer}");
    Ok(())
}

/// Replaces a document for a while, a thousand times a second where the disk allows it. How often, and the last value.
fn replace_for(control: &Control<'_>, length: Duration, prefix: &str) -> Result<(u32, String)> {
    let (began, mut changes) = (Instant::now(), 0_u32);
    while began.elapsed() < length {
        control.write("marked.yaml", &marked_with(&format!("{prefix}{changes}")))?;
        changes += 1;
        let due = Duration::from_millis(u64::from(changes));
        std::thread::sleep(due.saturating_sub(began.elapsed()));
    }
    Ok((changes, format!("{prefix}{}", changes - 1)))
}

fn storm(seconds: usize, number: usize) -> Result<String> {
    let ground = Ground::new()?;
    let (host, control) = (&ground.near, ground.control()?);
    let _web = sample(&control, host, &ground.home("web")?, ["web", "catalog", "8080"], "web-1", &[])?;
    let running = callers_of(&control, host, &ground.home("callers")?, "web:80", number)?;
    control.serves("web", 1)?;
    control.write("marked.yaml", &marked_with("none"))?;
    // Each proxy is asked until it has it, and then the next one.
    let everywhere = |value: &str| -> Result<()> {
        let mut proxy = 0;
        wait::until(&format!("{value} is in force everywhere"), PATIENCE, || {
            host.inside(|| {
                while proxy < number {
                    is_marked(&door(proxy), value).with_context(|| format!("proxy {proxy}"))?;
                    proxy += 1;
                }
                Ok(())
            })
        })
    };
    everywhere("none")?;
    let proxies = running.iter().map(|it| Ok(Processes::of(it.pid())?.proxy)).collect::<Result<Vec<_>>>()?;
    let used = || -> Result<Vec<Duration>> { proxies.iter().map(|pid| processor_time(*pid)).collect() };
    let center = || processor_time(control.program.pid());
    // Without callers first: what they cost is not the storm's.
    let (before, center_before, told_before) = (used()?, center()?, told(host, proxies[0])?);
    let began = Instant::now();
    let (changes, last) = replace_for(&control, Duration::from_secs(seconds as u64), "v")?;
    let (ended, lasted) = (Instant::now(), began.elapsed());
    let share = |used: Duration| used.as_secs_f64() / lasted.as_secs_f64() * 100.0;
    let costs: Vec<Duration> = before.iter().zip(used()?).map(|(before, after)| after - *before).collect();
    let of_center = share(center()? - center_before);
    everywhere(&last)?;
    let in_force = ended.elapsed();
    let told = told(host, proxies[0])? - told_before;
    let most = costs.iter().max().copied().unwrap_or_default();
    // Whoever uses nothing at all is not who takes the changes.
    ensure!(costs.iter().all(|it| !it.is_zero()) || seconds < 10, "a proxy that used no time at all: {costs:?}");
    // And once more with callers, who notice nothing.
    let callers = [Manner::Fresh, Manner::Kept].map(|manner| Callers::come(host, DOOR.parse()?, manner, 2));
    let callers = callers.into_iter().collect::<Result<Vec<_>>>()?;
    let (more, _) = replace_for(&control, Duration::from_secs(2), "w")?;
    let asked: Vec<_> = callers.into_iter().flat_map(Callers::leave).collect();
    none_failed(&asked)?;
    let all: Duration = costs.iter().sum();
    let figure = format!(
        "{} changes, {} calls, 0 failed; proxies used {:.2} % of a core on average and {:.2} % at most, the control plane {of_center:.0} %; \
         {told} bytes came to a proxy; the last change in force in all after {in_force:.2?}",
        changes + more,
        asked.len(),
        share(all) / number as f64,
        share(most),
    );
    // A change is some hundred bytes on the wire: not each of them was sent.
    ensure!(told > 0 && told < u64::from(changes) * 20, "{figure}");
    ensure!(share(most) <= 20.0 && in_force < Duration::from_secs(2), "{figure}");
    Ok(figure)
}

/// Documents that are right; each is spoiled in many ways.
const DOCUMENTS: [&str; 4] = [
    "apiVersion: v1\nkind: Service\nmetadata: {name: side, labels: {app: side}}\nspec:\n  selector: {app: side}\n  ports:\n  - {name: http, port: 80, targetPort: 8080, appProtocol: http}\n",
    "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: side}\nspec:\n  parentRefs: [{group: '', kind: Service, name: web, port: 80}]\n  rules:\n  - matches: [{path: {type: PathPrefix, value: /side}}]\n    backendRefs: [{name: web, port: 80, weight: 1}]\n",
    "apiVersion: sheer.dev/v1alpha1\nkind: Mesh\nmetadata: {name: mesh}\nspec: {certificateLifetime: 24h, egress: allow}\n",
    "apiVersion: sheer.dev/v1alpha1\nkind: Workload\nmetadata: {name: side}\nspec: {proxied: false, service: side, addresses: [10.0.0.1], ports: [{port: 8080}]}\n",
];

/// A spoiled document. `number` decides how.
fn poison(number: usize) -> String {
    let text = DOCUMENTS[number % DOCUMENTS.len()];
    let lines: Vec<&str> = text.lines().collect();
    // Somewhere else each time, and the same at each run.
    let place = number.wrapping_mul(2_654_435_761) >> 7;
    let line = lines[place % lines.len()];
    match number / DOCUMENTS.len() % 14 {
        0 => text[..place % text.len()].to_owned(),
        1 => text.replace(line, &line.replacen(": ", ": [", 1)),
        2 => text.replace(line, &line.replacen(": ", ": .nan #", 1)),
        3 => text.replace("name: side", &format!("name: {}", "x".repeat(1 << 20))),
        4 => format!("{text}{}\n", lines[lines.len() - 1]),
        5 => text.replace(line, &format!("{line}\n  unknown: 1")),
        6 => text.replace("name: web", "name: nowhere"),
        7 => text.replace("PathPrefix", "RegularExpression").replace("/side", "(a+)+$(a{1000}){1000}"),
        8 => text.replace("80", "-1"),
        9 => text.replace("80", "99999999999999999999"),
        10 => text.replace(line, &format!("{}{line}", "[".repeat(5000))),
        11 => text.replace("kind:", "a: &a [*a, *a]\nkind:"),
        12 => text.replace(line, &format!("{line}\u{0}\u{1b}[2J")),
        _ => {
            let mut bytes = text.as_bytes().to_vec();
            let at = place % bytes.len();
            bytes[at] ^= 0x15;
            String::from_utf8_lossy(&bytes).into_owned()
        }
    }
}

#[test]
#[ignore = "takes half a minute: `make faults`"]
fn poison_is_refused_with_its_place() -> Result<()> {
    let count = times(84, 504);
    let done = format!("{count} spoiled documents, each linted, and each written into the running configuration");
    let bar = "each is right or refused with file, line and reason; what is in force stays; 0 failed";
    row("F21", &done, bar, swallow(count))
}

fn swallow(count: usize) -> Result<String> {
    let ground = Ground::new()?;
    let (host, control) = (&ground.near, ground.control()?);
    let _web = sample(&control, host, &ground.home("web")?, ["web", "catalog", "8080"], "web-1", &[])?;
    let _caller = caller(&control, host, &ground.home("caller")?, &["web:80"])?;
    control.serves("web", 1)?;
    is_served(host, DOOR)?;
    control.write("marked.yaml", &marked_with("kept"))?;
    wait::until("the route is in force", PATIENCE, || shows(host, "kept"))?;
    let callers = [Manner::Fresh, Manner::Kept].map(|manner| Callers::come(host, DOOR.parse()?, manner, 1));
    let callers = callers.into_iter().collect::<Result<Vec<_>>>()?;
    let file = ground.net.directory().join("poison.yaml");
    let (mut refused, mut right) = (0, 0);
    for number in 0..count {
        let text = poison(number);
        std::fs::write(&file, &text)?;
        let began = Instant::now();
        let output = Command::new(sheer()?).arg("lint").arg(&file).stdin(Stdio::null()).output()?;
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let shown: String = text.chars().take(300).collect();
        ensure!(began.elapsed() < Duration::from_secs(5), "{:?} for\n{shown}", began.elapsed());
        ensure!(said.len() < 20_000 && !said.contains("panicked") && !said.contains('\u{1b}'), "{said}\nfor\n{shown}");
        match output.status.code() {
            Some(0) => right += 1,
            Some(1) => {
                ensure!(said.contains("poison.yaml:"), "no place: {said}\nfor\n{shown}");
                refused += 1;
            }
            other => anyhow::bail!("{other:?}: {said}\nfor\n{shown}"),
        }
        // Other documents of the same name would be a fault of their own.
        if output.status.code() == Some(1) {
            control.write("poison.yaml", &text)?;
        }
    }
    wait::until("the last poison is named", PATIENCE, || {
        let said = control.sheer(&["check"]).or_else(|error| Ok::<_, anyhow::Error>(format!("{error:#}")))?;
        ensure!(said.contains("poison.yaml"), "{said}");
        Ok(())
    })?;
    shows(host, "kept")?;
    control.write("poison.yaml", "")?;
    control.write("marked.yaml", &marked_with("after"))?;
    wait::until("changes are taken again", PATIENCE, || shows(host, "after"))?;
    let asked: Vec<_> = callers.into_iter().flat_map(Callers::leave).collect();
    none_failed(&asked)?;
    ensure!(refused > count / 2, "only {refused} of {count} were refused");
    Ok(format!("{refused} refused with their place, {right} were right all the same; {} calls, 0 failed", asked.len()))
}

#[test]
#[ignore = "takes half a minute: `make faults`"]
fn a_large_mesh_is_held_by_a_small_proxy() -> Result<()> {
    let size = Size { services: times(2000, 10_000), endpoints: times(2, 10), routes: times(500, 5000) };
    let Size { services, endpoints, routes } = size;
    let done =
        format!("{services} services with {endpoints} endpoints each, {routes} routes, of which the caller uses one");
    let bar = "the proxy holds at most 100 MiB; a new endpoint is used within 1 s after it listens, and costs at most 4 KiB on the wire";
    row("F22", &done, bar, hold(size))
}

/// How much configuration there is.
#[derive(Clone, Copy)]
struct Size {
    services: usize,
    endpoints: usize,
    routes: usize,
}

impl Size {
    /// The documents of these services.
    fn documents(self, numbers: std::ops::Range<usize>) -> Result<String> {
        let mut text = String::new();
        for number in numbers {
            write!(
                text,
                "apiVersion: v1\nkind: Service\nmetadata: {{name: s{number}}}\nspec: {{ports: [{{port: 80}}]}}\n---\n"
            )?;
            for endpoint in 0..self.endpoints {
                let (a, b) = (number / 250, number % 250);
                write!(
                    text,
                    "apiVersion: sheer.dev/v1alpha1\nkind: Workload\nmetadata: {{name: w{number}-{endpoint}}}\nspec: {{proxied: false, service: \
                     s{number}, addresses: [10.{endpoint}.{a}.{b}], ports: [{{port: 80}}]}}\n---\n"
                )?;
            }
            if number < self.routes {
                write!(
                    text,
                    "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r{number}}}\nspec:\n  parentRefs: \
                     [{{group: '', kind: Service, name: s{number}}}]\n  rules: [{{backendRefs: [{{name: s{number}, port: 80}}]}}]\n---\n"
                )?;
            }
        }
        Ok(text)
    }
}

/// An application outside of the mesh: each request is answered with this version.
fn answers_as(host: &Host, port: u16, version: &'static str) -> Result<()> {
    let listener = listen(host, port)?;
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            // The whole head, since a reset would follow what is left unread.
            let (mut seen, mut buffer) = (Vec::new(), [0; 4096]);
            while !seen.windows(4).any(|it| it == b"\r\n\r\n") {
                match stream.read(&mut buffer) {
                    Ok(count) if count > 0 => seen.extend_from_slice(&buffer[..count]),
                    _ => break,
                }
            }
            let answer =
                format!("HTTP/1.1 200 OK\r\nX-Version: {version}\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok");
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    Ok(())
}

fn hold(size: Size) -> Result<String> {
    let ground = Ground::new()?;
    let (host, far, control) = (&ground.near, ground.net.host("far")?, ground.control()?);
    for part in 0..size.services.div_ceil(500) {
        let numbers = part * 500..((part + 1) * 500).min(size.services);
        control.write(&format!("part-{part}.yaml"), &size.documents(numbers)?)?;
    }
    wait::until("all services are known", Duration::from_secs(300), || {
        let known = control.query(&["get", "services"])?;
        let count = known["services"].as_array().map_or(0, Vec::len);
        ensure!(count >= size.services, "{count}");
        Ok(())
    })?;
    // Two workloads of the service; the application of the second one does not listen yet.
    answers_as(host, 8080, "web-1")?;
    let _web = beside(&control, host, &ground.home("web")?, "web", "web-1", "8080")?;
    let _second = beside(&control, &far, &ground.home("second")?, "web", "web-2", "8080")?;
    wait::until("both have joined", Duration::from_secs(60), || {
        let found = control.query(&["get", "workloads"])?.to_string();
        ensure!(found.contains("web-1") && found.contains("web-2"), "{found}");
        Ok(())
    })?;
    let asks = caller(&control, host, &ground.home("caller")?, &["web:80"])?;
    wait::until("the service answers", Duration::from_secs(60), || callers::ask_once(host, DOOR.parse()?))?;
    let proxy = Processes::of(asks.pid())?.proxy;
    // What a second of nothing but reports and their answers brings.
    let idle = told(host, proxy)?;
    std::thread::sleep(Duration::from_secs(1));
    let (before, changed) = (told(host, proxy)?, Instant::now());
    let idle = before - idle;
    // From the moment on at which it listens: that its proxy sees it, and what the control plane makes of it, is part of it.
    answers_as(&far, 8080, "web-2")?;
    let late = wait::until("the new endpoint is used", PATIENCE, || {
        let answered: Vec<String> = (0..4).map(|_| callers::ask_once(host, DOOR.parse()?)).collect::<Result<_>>()?;
        ensure!(answered.iter().any(|it| it == "web-2"), "{answered:?}");
        Ok(changed.elapsed())
    })?;
    std::thread::sleep(Duration::from_secs(1).saturating_sub(changed.elapsed()));
    let wire = told(host, proxy)? - before;
    let (held, center) = (resident(proxy)?, resident(control.program.pid())?);
    let figure = format!(
        "{held} MiB resident, {center} MiB in the control plane; {} KiB came to the proxy in all; the new endpoint answered {late:.2?} after it began to listen; \
         {wire} bytes came to the proxy meanwhile, {idle} in an idle second",
        before / 1024
    );
    // What a service costs in the index is less than what its endpoints and routes would be beside.
    ensure!(before < size.services as u64 * 250, "{figure}");
    ensure!(held <= 100 && late < Duration::from_secs(1) && wire <= 4096, "{figure}");
    Ok(figure)
}

/// What a process holds, in MiB.
fn resident(pid: Pid) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no size")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? / 1024)
}

/// The bytes that a proxy got over its connections to the control plane so far.
fn told(host: &Host, proxy: Pid) -> Result<u64> {
    let text = run(host.command("ss").args(["-HtinpO", "dst", ":15012"]))?;
    let lines = text.lines().filter(|line| line.contains(&format!("pid={proxy},")));
    let counts = lines.filter_map(|line| line.split("bytes_received:").nth(1)?.split(' ').next()?.parse::<u64>().ok());
    let counts: Vec<u64> = counts.collect();
    ensure!(!counts.is_empty(), "{proxy} has no connection to the control plane:\n{text}");
    Ok(counts.iter().sum())
}

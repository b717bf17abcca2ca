//! F20: configuration that changes without a pause. F21: configuration that is poison. F22: very much of it.

use crate::site::{DOOR, Ground, caller, is_served, none_failed, sample};
use crate::stored::{marked_with, processor_time, shows};
use anyhow::{Context, Result, ensure};
use sheer_testmesh::callers::{self, Callers, Manner};
use sheer_testmesh::faults::{row, times};
use sheer_testmesh::mesh::PATIENCE;
use sheer_testmesh::program::{Processes, sheer};
use sheer_testmesh::wait;
use std::fmt::Write as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[test]
#[ignore = "takes half a minute: `make faults`"]
fn a_storm_of_changes_is_taken_together() -> Result<()> {
    let seconds = times(4, 60);
    let done = format!("a file of the configuration replaced 1000 times a second for {seconds} s, two proxies");
    row(
        "F20",
        &done,
        "0 failed; a proxy uses at most 20 % of a core; the last change in force 2 s after the end",
        storm(seconds),
    )
}

fn storm(seconds: usize) -> Result<String> {
    let ground = Ground::new()?;
    let (host, control) = (&ground.near, ground.control()?);
    let _web = sample(&control, host, &ground.home("web")?, ["web", "catalog", "8080"], "web-1", &[])?;
    let asks = caller(&control, host, &ground.home("caller")?, &["web:80"])?;
    control.serves("web", 1)?;
    control.write("marked.yaml", &marked_with("none"))?;
    wait::until("the route is in force", PATIENCE, || shows(host, "none"))?;
    let proxy = Processes::of(asks.pid())?.proxy;
    // Without callers first: what they cost is not the storm's.
    let (used, began) = (processor_time(proxy)?, Instant::now());
    let mut changes = 0_u32;
    while began.elapsed() < Duration::from_secs(seconds as u64) {
        control.write("marked.yaml", &marked_with(&format!("v{changes}")))?;
        changes += 1;
        let due = Duration::from_millis(u64::from(changes));
        std::thread::sleep(due.saturating_sub(began.elapsed()));
    }
    let share = (processor_time(proxy)? - used).as_secs_f64() / began.elapsed().as_secs_f64();
    let ended = Instant::now();
    let last = format!("v{}", changes - 1);
    wait::until("the last change is in force", Duration::from_secs(20), || shows(host, &last))?;
    let in_force = ended.elapsed();
    // And once more with callers, who notice nothing.
    let came = Instant::now();
    let callers = [Manner::Fresh, Manner::Kept].map(|manner| Callers::come(host, DOOR.parse()?, manner, 2));
    let callers = callers.into_iter().collect::<Result<Vec<_>>>()?;
    while came.elapsed() < Duration::from_secs(2) {
        control.write("marked.yaml", &marked_with(&format!("w{changes}")))?;
        changes += 1;
        std::thread::sleep(Duration::from_millis(1));
    }
    let asked: Vec<_> = callers.into_iter().flat_map(Callers::leave).collect();
    none_failed(&asked)?;
    let figure = format!(
        "{changes} changes, {} calls, 0 failed; {:.0} % of a core; the last one in force after {in_force:.2?}",
        asked.len(),
        share * 100.0
    );
    ensure!(share <= 0.2 && in_force < Duration::from_secs(2), "{figure}");
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
    let services = times(2000, 10_000);
    let done = format!("{services} services with 2 endpoints each, 500 routes, of which the caller uses one");
    let bar = "the proxy holds at most 100 MiB; a new endpoint is used within 1 s";
    row("F22", &done, bar, hold(services))
}

fn hold(services: usize) -> Result<String> {
    let ground = Ground::new()?;
    let (host, control) = (&ground.near, ground.control()?);
    for part in 0..services.div_ceil(500) {
        let mut text = String::new();
        for number in part * 500..((part + 1) * 500).min(services) {
            write!(
                text,
                "apiVersion: v1\nkind: Service\nmetadata: {{name: s{number}}}\nspec: {{ports: [{{port: 80}}]}}\n---\n"
            )?;
            for endpoint in 0..2 {
                let (a, b) = (number / 250, number % 250);
                write!(
                    text,
                    "apiVersion: sheer.dev/v1alpha1\nkind: Workload\nmetadata: {{name: w{number}-{endpoint}}}\nspec: {{proxied: false, service: \
                     s{number}, addresses: [10.{endpoint}.{a}.{b}], ports: [{{port: 80}}]}}\n---\n"
                )?;
            }
            if number < 500 {
                write!(
                    text,
                    "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r{number}}}\nspec:\n  parentRefs: \
                     [{{group: '', kind: Service, name: s{number}}}]\n  rules: [{{backendRefs: [{{name: s{number}, port: 80}}]}}]\n---\n"
                )?;
            }
        }
        control.write(&format!("part-{part}.yaml"), &text)?;
    }
    wait::until("all services are known", Duration::from_secs(120), || {
        let known = control.query(&["get", "services"])?;
        let count = known["services"].as_array().map_or(0, Vec::len);
        ensure!(count >= services, "{count}");
        Ok(())
    })?;
    let _web = sample(&control, host, &ground.home("web")?, ["web", "catalog", "8080"], "web-1", &[])?;
    let asks = caller(&control, host, &ground.home("caller")?, &["web:80"])?;
    is_served(host, DOOR)?;
    let proxy = Processes::of(asks.pid())?.proxy;
    let resident = || -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{proxy}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no size")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    };
    // A second instance begins to serve; from then on every second answer is its own.
    let _second = sample(&control, host, &ground.home("second")?, ["web", "catalog", "8080"], "web-2", &[])?;
    let mut ready = None;
    let used = wait::until("the new endpoint is used", PATIENCE, || {
        let is_ready = control.query(&["get", "service", "web"])?["services"][0]["healthy"] == 2;
        ready = ready.or(is_ready.then(Instant::now));
        let answered: Vec<String> = (0..4).map(|_| callers::ask_once(host, DOOR.parse()?)).collect::<Result<_>>()?;
        ensure!(answered.iter().any(|it| it == "web-2"), "{answered:?}");
        Ok(Instant::now())
    })?;
    let late = ready.map_or(Duration::ZERO, |ready| used.saturating_duration_since(ready));
    let size = resident()?;
    let figure = format!("{} MiB resident; the new endpoint answered {late:.1?} after it was known", size / 1024);
    ensure!(size <= 100 * 1024 && late < Duration::from_secs(1), "{figure}");
    Ok(figure)
}

//! What lies in `deploy/` is understood by the binary that it starts, and what it is for works on one host.

use anyhow::{Result, ensure};
use sheer_testmesh::net::Net;
use sheer_testmesh::program::{Program, run};
use sheer_testmesh::wait;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy")
}

/// Lets the binary read a command line and print what it understood, without doing anything.
fn understood(line: &[String]) {
    let settings = tempfile::NamedTempFile::with_suffix(".yaml").expect("a file");
    let mut words = vec!["--print-settings".to_owned()];
    let mut given = line.iter();
    while let Some(word) = given.next() {
        words.push(word.clone());
        if word == "--settings" {
            given.next();
            words.push(settings.path().display().to_string());
        }
    }
    let output = Command::new(env!("CARGO_BIN_EXE_sheer")).args(&words).output().expect("run sheer");
    assert!(output.status.success(), "{line:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn units_start_what_exists() {
    let mut lines = 0;
    for entry in std::fs::read_dir(deploy().join("systemd")).expect("deploy/systemd") {
        let unit = std::fs::read_to_string(entry.expect("an entry").path()).expect("a unit");
        for line in unit.lines().filter_map(|line| line.strip_prefix("ExecStart=/usr/local/bin/sheer ")) {
            let words: Vec<String> = line.replace("%i", "web").split(' ').map(str::to_owned).collect();
            understood(&words);
            lines += 1;
        }
    }
    assert_eq!(lines, 3);
}

/// The settings that the head of a unit shows as an example.
fn example(unit: &str) -> String {
    let lines = unit.lines().skip_while(|line| !line.contains("for example")).skip(1);
    let settings = lines.map_while(|line| line.strip_prefix("#   ")).take_while(|line| line.starts_with("    "));
    settings.map(|line| format!("{}\n", line.trim())).collect()
}

#[test]
fn the_settings_that_units_show_are_understood() {
    let mut shown = 0;
    for entry in std::fs::read_dir(deploy().join("systemd")).expect("deploy/systemd") {
        let path = entry.expect("an entry").path();
        let unit = std::fs::read_to_string(&path).expect("a unit");
        let settings = example(&unit);
        if !unit.contains("for example") {
            continue;
        }
        assert!(settings.lines().count() >= 3, "{}: {settings}", path.display());
        let file = tempfile::NamedTempFile::with_suffix(".yaml").expect("a file");
        std::fs::write(file.path(), &settings).expect("written");
        let verb = if unit.contains("sheer run") { "run" } else { "proxy" };
        let output = Command::new(env!("CARGO_BIN_EXE_sheer"))
            .args([verb, "web", "--print-settings", "--settings"])
            .arg(file.path())
            .output()
            .expect("run sheer");
        assert!(output.status.success(), "{}: {}", path.display(), String::from_utf8_lossy(&output.stderr));
        shown += 1;
    }
    assert_eq!(shown, 2);
}

#[test]
fn containers_start_what_exists() {
    let compose = std::fs::read_to_string(deploy().join("compose.yaml")).expect("deploy/compose.yaml");
    let commands: Vec<_> = compose.lines().filter_map(|line| line.trim().strip_prefix("command: ")).collect();
    assert_eq!(commands.len(), 2);
    for command in commands {
        understood(&serde_json::from_str::<Vec<String>>(command).expect("a list of words"));
    }
}

/// A host of its own where `sheer up` runs: everybody's address is loopback, which no rule takes connections to.
#[test]
fn neighbours_of_an_adopted_service_call_it_encrypted() -> Result<()> {
    const PATIENCE: Duration = Duration::from_secs(30);
    let net = Net::new()?;
    let host = net.host("alone")?;
    let sheer = |arguments: &str| {
        let mut command = host.command(env!("CARGO_BIN_EXE_sheer"));
        command.args(arguments.split(' '));
        command
    };
    let mut running = Vec::new();
    let mut start = |name: &str, ready: &str, command: &mut Command| -> Result<()> {
        let mut program = Program::start(name, net.directory(), command)?;
        if !ready.is_empty() {
            program.prints(ready, PATIENCE)?;
        }
        running.push(program);
        Ok(())
    };
    let mut application = host.command("setpriv");
    application.args([
        "--reuid=daemon",
        "--regid=daemon",
        "--clear-groups",
        "/usr/bin/python3",
        "-m",
        "http.server",
        "8080",
    ]);
    application.current_dir("/usr/share/doc");
    start("application", "", &mut application)?;
    start("up", "Sheer is up.", &mut sheer("up"))?;
    start(
        "beside",
        "is ready",
        &mut sheer("proxy legacy --port 8080/http --user daemon --capture cgroup --mode strict"),
    )?;
    start("web", "is ready", &mut sheer("run web -- sleep infinity"))?;

    wait::until("legacy answers its neighbour", PATIENCE, || {
        let said = run(&mut sheer("exec web-1 -- curl -sS http://legacy/"))?;
        ensure!(said.contains("Directory listing"), "{said}");
        Ok(())
    })?;
    wait::until("the edge is encrypted", PATIENCE, || {
        let edges: serde_json::Value = serde_json::from_str(&run(&mut sheer("edges -o json"))?)?;
        let met = |edge: &serde_json::Value| {
            edge["destination"] == "default/legacy" && edge["mtls"] == true && edge["total"]["failures"] == 0
        };
        ensure!(edges["rows"].as_array().is_some_and(|rows| rows.iter().any(met)), "{edges}");
        Ok(())
    })?;
    // Processes bear names by which people find them.
    let names = run(host.command("ps").args(["-e", "-o", "comm="]))?;
    ensure!(names.lines().any(|it| it == "sheer-proxy") && names.lines().any(|it| it == "sheer-keeper"), "{names}");
    Ok(())
}

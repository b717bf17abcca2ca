//! What the command line prints, as a person sees it, beside a control plane that answers what each test wants.

use serde::Serialize;
use sheer_core::api::{
    Action, Applied, Change, Check, EdgeRow, Edges, Failure, Figures, Finding, Level, ObjectView, Outcome, Place,
    PortView, ServiceView, Stat, StatRow, TokenView, WorkloadState, WorkloadView,
};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;

/// A request as the control plane saw it: method and target, and the body.
type Seen = Arc<Mutex<Vec<(String, String)>>>;

/// The socket of a control plane that answers from a table.
struct Api {
    directory: TempDir,
    seen: Seen,
}

impl Api {
    /// `answers`: method and path (without the query), status, body.
    fn answering(answers: Vec<(&'static str, u16, String)>) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let listener = UnixListener::bind(directory.path().join("api.sock")).expect("a socket");
        let seen = Seen::default();
        let log = seen.clone();
        // Ends with the test process: nobody connects after that.
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                // A command that ended early is what the test is about.
                let _ = answer(stream, &answers, &log);
            }
        });
        Self { directory, seen }
    }

    fn sheer(&self, arguments: &[&str]) -> String {
        sheer(
            &[arguments, &["--api", &format!("unix:{}", self.socket().display())]].concat(),
            "",
            self.directory.path(),
        )
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("api.sock")
    }
}

fn answer(stream: UnixStream, answers: &[(&'static str, u16, String)], seen: &Seen) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        if line.trim_end().is_empty() {
            break;
        }
        lines.push(line.trim_end().to_ascii_lowercase());
        if lines.len() == 1 {
            lines[0] = line.trim_end().trim_end_matches(" HTTP/1.1").to_owned();
        }
    }
    let length = lines.iter().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let target = lines.first().cloned().unwrap_or_default();
    let known = answers.iter().find(|(name, ..)| target.split('?').next() == Some(name));
    let (status, text) = known.map_or((404, "{}"), |(_, status, text)| (*status, text.as_str()));
    if let Ok(mut seen) = seen.lock() {
        seen.push((target, String::from_utf8_lossy(&body).into_owned()));
    }
    write!(&stream, "HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n{text}", text.len())
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("JSON")
}

/// Runs the binary in `directory`; what it printed and its exit status, with the directory's path taken out.
fn sheer(arguments: &[&str], input: &str, directory: &Path) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sheer"));
    command.args(arguments).current_dir(directory).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("SHEER_")) {
        command.env_remove(name);
    }
    let mut child = command.spawn().expect("the binary runs");
    child.stdin.take().expect("standard input").write_all(input.as_bytes()).expect("written");
    let output = child.wait_with_output().expect("it ends");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let text = format!("status {}\n----- stdout\n{out}----- stderr\n{err}", output.status.code().unwrap_or(-1));
    text.replace(&directory.display().to_string(), "DIR")
}

fn figures(requests: u64, failures: u64) -> Figures {
    Figures {
        requests,
        failures,
        plaintext: 0,
        gone: 0,
        success_rate: (requests > 0).then(|| 1.0 - failures as f64 / requests as f64),
        rps: requests as f64 / 60.0,
        p50_s: (requests > 0).then_some(0.0012),
        p95_s: (requests > 0).then_some(0.0049),
        p99_s: (requests > 0).then_some(0.0231),
        mesh_mean_s: (requests > 0).then_some(0.000_18),
        bytes_sent: requests * 180,
        bytes_received: requests * 1450,
        connections_opened: 4,
        connections_open: 2,
        responses: vec![
            Outcome { status: 200, grpc_status: -1, reason: String::new(), count: requests - failures },
            Outcome { status: 502, grpc_status: -1, reason: "connect-refused".into(), count: failures },
        ],
    }
}

fn stat() -> Stat {
    let row = |service: &str, ready, requests, failures| StatRow {
        service: service.into(),
        ready,
        workloads: 2,
        mtls: (requests > 0).then_some(1.0),
        window: figures(requests, failures),
        total: figures(requests * 10, failures),
    };
    Stat { window_s: 60, rows: vec![row("default/api", 2, 3000, 3), row("default/web", 1, 0, 0)] }
}

fn edges() -> Edges {
    let row = |source: &str, destination: &str, backend: &str, mtls| EdgeRow {
        side: "outbound".into(),
        source: source.into(),
        destination: destination.into(),
        backend: backend.into(),
        route: if backend.is_empty() { "default".into() } else { "default/canary".into() },
        protocol: "http1".into(),
        mtls,
        window: figures(1500, 3),
        total: figures(15_000, 3),
    };
    let rows =
        vec![row("default/web", "default/api", "default/api-v2", true), row("unknown", "default/web", "", false)];
    Edges { window_s: 60, rows }
}

#[test]
fn stat_shows_services_and_edges() {
    let api =
        Api::answering(vec![("GET /api/v1/stat", 200, json(&stat())), ("GET /api/v1/edges", 200, json(&edges()))]);
    insta::assert_snapshot!(api.sheer(&["stat"]));
    let targets: Vec<String> = api.seen.lock().expect("seen").iter().map(|(target, _)| target.clone()).collect();
    assert_eq!(targets, ["GET /api/v1/stat?window_s=60", "GET /api/v1/edges?window_s=60"]);
    assert!(api.sheer(&["stat", "missing"]).contains("there is no service 'default/missing'"));
    let text = api.sheer(&["stat", "web", "-o", "json"]);
    let from = text.find('{').expect("JSON");
    let to = text.rfind('}').expect("JSON");
    let value: serde_json::Value = serde_json::from_str(&text[from..=to]).expect("JSON");
    assert_eq!(value["services"].as_array().map(Vec::len), Some(1));
    assert_eq!(value["edges"][1]["total"]["requests"], 15_000);
}

#[test]
fn edges_show_routes_and_outcomes() {
    let api = Api::answering(vec![("GET /api/v1/edges", 200, json(&edges()))]);
    insta::assert_snapshot!(api.sheer(&["edges", "--side", "all", "-n", "default", "--window", "5m"]));
    let seen = api.seen.lock().expect("seen");
    assert_eq!(seen[0].0, "GET /api/v1/edges?namespace=default&window_s=300&side=all");
}

#[test]
fn an_empty_mesh_says_what_to_do() {
    let empty = || {
        Api::answering(vec![
            ("GET /api/v1/stat", 200, json(&Stat::default())),
            ("GET /api/v1/edges", 200, json(&Edges::default())),
            ("GET /api/v1/services", 200, "[]".into()),
            ("GET /api/v1/workloads", 200, "[]".into()),
            ("GET /api/v1/objects", 200, "[]".into()),
        ])
    };
    insta::assert_snapshot!([empty().sheer(&["stat"]), empty().sheer(&["edges"]), empty().sheer(&["get"])].join("\n"));
}

fn inventory() -> Api {
    let service = |name: &str, implied| ServiceView {
        namespace: "default".into(),
        name: name.into(),
        virtual_ips: vec!["240.240.3.7".into()],
        ports: vec![
            PortView { port: 80, protocol: "detect".into(), ..PortView::default() },
            PortView { port: 9000, protocol: "grpc".into(), name: "rpc".into(), ..PortView::default() },
        ],
        implied,
        origin: if implied { String::new() } else { "web.yaml:1".into() },
        healthy: 2,
        suspect: usize::from(implied),
        ..ServiceView::default()
    };
    let workload = WorkloadView {
        namespace: "default".into(),
        name: "api-1".into(),
        services: vec!["default/api".into()],
        address: "10.0.0.7".into(),
        ports: vec![PortView { port: 8081, protocol: "http".into(), ..PortView::default() }],
        mode: "strict".into(),
        capture: "netns".into(),
        state: WorkloadState::Connected,
        ..WorkloadView::default()
    };
    let object = |kind: &str, name: &str, origin: &str| ObjectView {
        kind: kind.into(),
        namespace: "default".into(),
        name: name.into(),
        origin: origin.into(),
        text: format!("---\nkind: {kind}\nmetadata:\n  name: {name}\n"),
        ..ObjectView::default()
    };
    let objects = vec![object("Service", "web", "web.yaml:1"), object("HTTPRoute", "canary", "applied/canary.yaml:1")];
    Api::answering(vec![
        ("GET /api/v1/services", 200, json(&vec![service("api", true), service("web", false)])),
        ("GET /api/v1/workloads", 200, json(&vec![workload])),
        ("GET /api/v1/objects", 200, json(&objects)),
    ])
}

#[test]
fn get_shows_what_there_is() {
    let api = inventory();
    let calls: [&[&str]; 5] = [
        &["get"],
        &["get", "services"],
        &["get", "workload"],
        &["get", "service", "api", "-o", "yaml"],
        &["get", "pods"],
    ];
    insta::assert_snapshot!(calls.map(|call| format!("$ sheer {}\n{}", call.join(" "), api.sheer(call))).join("\n"));
    assert!(api.sheer(&["get", "mesh", "none"]).contains("there is no Mesh 'none'"));
}

#[test]
fn apply_tells_each_change_and_each_fault() {
    let change = |action, name: &str| Change {
        kind: "HTTPRoute".into(),
        namespace: "default".into(),
        name: name.into(),
        action,
        before: "kind: HTTPRoute\nweight: 90\n".into(),
        after: "kind: HTTPRoute\nweight: 50\n".into(),
        ..Change::default()
    };
    let warning = Place {
        level: Level::Warn,
        file: "-".into(),
        line: 7,
        column: 3,
        path: "spec.rules[0]".into(),
        message: "the service 'default/api' does not exist yet".into(),
        mend: "start it, or correct the name".into(),
    };
    let applied = Applied {
        changes: vec![change(Action::Updated, "canary"), change(Action::Unchanged, "other")],
        warnings: vec![warning.clone()],
    };
    let api = Api::answering(vec![
        ("POST /api/v1/apply", 200, json(&applied)),
        (
            "DELETE /api/v1/objects/HTTPRoute/shop/canary",
            200,
            json(&Applied { changes: vec![change(Action::Deleted, "canary")], warnings: vec![] }),
        ),
    ]);
    std::fs::write(api.directory.path().join("canary.yaml"), "kind: HTTPRoute\n").expect("written");
    let output = [
        api.sheer(&["apply", "-f", "canary.yaml"]),
        api.sheer(&["diff", "-f", "canary.yaml"]),
        api.sheer(&["delete", "httproutes", "shop/canary"]),
    ];
    insta::assert_snapshot!(output.join("\n"));
    assert_eq!(
        api.seen.lock().expect("seen")[1].1,
        r#"{"files":[{"name":"canary.yaml","text":"kind: HTTPRoute\n"}],"dry_run":true}"#
    );
    let failure = Failure {
        error: "nothing was changed: the documents have 1 error".into(),
        mend: "mend it and apply again".into(),
        diagnostics: vec![Place { level: Level::Error, ..warning }],
    };
    let api = Api::answering(vec![("POST /api/v1/apply", 422, json(&failure))]);
    let output = [
        sheer(
            &["apply", "-f", "-", "--api", &format!("unix:{}", api.socket().display())],
            "kind: X",
            api.directory.path(),
        ),
        api.sheer(&["apply", "-f", "missing.yaml"]),
        api.sheer(&["apply", "-f", "."]),
    ];
    insta::assert_snapshot!(output.join("\n"));
}

#[test]
fn check_says_what_why_and_how_to_mend() {
    let finding = |level, subject: &str, what: &str| Finding {
        level,
        topic: "config".into(),
        subject: subject.into(),
        what: what.into(),
        why: "the configuration before it is in force".into(),
        mend: "correct line 7".into(),
    };
    let answer = |findings| {
        let check = Check { level: Level::Ok, findings };
        Api::answering(vec![("GET /api/v1/check", 200, json(&check))])
    };
    let fine = finding(Level::Ok, "root", "valid for 9 years");
    let warn = finding(Level::Warn, "default/api-1", "its certificate was not renewed at half-life");
    let error = finding(Level::Error, "web.yaml", "is refused");
    let output = [
        answer(vec![fine.clone()]).sheer(&["check", "--only", "mesh"]),
        answer(vec![fine.clone(), warn.clone()]).sheer(&["check", "--only", "mesh"]),
        answer(vec![fine, warn, error]).sheer(&["check", "--only", "mesh"]),
        sheer(&["check", "--only", "mesh", "--api", "unix:none.sock"], "", Path::new("/")),
    ];
    insta::assert_snapshot!(output.join("\n"));
}

#[test]
fn check_looks_at_the_host_without_a_control_plane() {
    let directory = tempfile::tempdir().expect("a directory");
    let findings = |arguments: &[&str]| {
        let text = sheer(arguments, "", directory.path());
        let (from, to) = (text.find('{').expect("JSON"), text.rfind('}').expect("JSON"));
        let check: Check = serde_json::from_str(&text[from..=to]).expect("a check");
        check.findings
    };
    let host = findings(&["check", "--only", "host", "-o", "json"]);
    assert!(host.iter().all(|it| it.topic == "host"), "{host:?}");
    for subject in ["nft", "namespaces", "clock"] {
        assert!(host.iter().any(|it| it.subject == format!("this host, {subject}")), "{subject}: {host:?}");
    }
    let both = findings(&["check", "-o", "json", "--api", "unix:none.sock"]);
    assert_eq!(both[0].topic, "control-plane");
    assert_eq!(both.len(), host.len() + 1);
}

#[test]
fn a_mistyped_command_is_guessed_and_help_is_a_command() {
    let here = Path::new("/");
    let text = sheer(&["rnu", "api", "--", "true"], "", here);
    assert!(text.starts_with("status 2\n") && text.contains("'run'"), "{text}");
    assert!(!sheer(&["frobnicate"], "", here).contains("tip:"));
    let text = sheer(&["help", "run"], "", here);
    assert!(text.starts_with("status 0\n") && text.contains("--publish"), "{text}");
}

#[test]
fn what_keeps_a_proxy_from_starting_is_said_once() {
    let directory = tempfile::tempdir().expect("a directory");
    let text = sheer(&["run", "api", "--capture", "none", "--control", "nowhere", "--", "true"], "", directory.path());
    assert!(text.starts_with("status 1\n"), "{text}");
    assert_eq!(text.matches("is no control plane's address").count(), 1, "{text}");
}

#[test]
fn a_token_stands_alone_on_standard_output() {
    let token = TokenView { token: "sheer1.AAAA".into(), id: "0011".into(), expires: 1 };
    let api = Api::answering(vec![("POST /api/v1/tokens", 200, json(&token))]);
    let text = api.sheer(&[
        "token",
        "create",
        "-n",
        "shop",
        "--service-account",
        "web",
        "--ttl",
        "1h",
        "--from",
        "10.0.0.0/8",
    ]);
    assert_eq!(text, "status 0\n----- stdout\nsheer1.AAAA\n----- stderr\n");
    assert_eq!(
        api.seen.lock().expect("seen")[0].1,
        r#"{"namespace":"shop","service_account":"web","ttl_s":3600,"uses":1,"from":["10.0.0.0/8"],"control":[]}"#
    );
}

#[test]
fn lint_needs_no_control_plane() {
    let directory = tempfile::tempdir().expect("a directory");
    let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).expect("written");
    write("good.yaml", "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\nspec:\n  ports:\n  - port: 80\n");
    write("bad.yaml", "apiVersion: v1\nkind: Service\nmetadata:\n  nme: web\nspec:\n  ports:\n  - prt: 80\n");
    write("binary.yaml", "a: 1\n");
    std::fs::write(directory.path().join("binary.yaml"), b"a: 1\nb: \xff\n").expect("written");
    std::fs::create_dir(directory.path().join("empty")).expect("a directory");
    let calls = ["good.yaml", "bad.yaml", "binary.yaml", "empty", "missing.yaml"];
    let output = calls.map(|file| format!("$ sheer lint {file}\n{}", sheer(&["lint", file], "", directory.path())));
    insta::assert_snapshot!(output.join("\n"));
}

#[test]
fn addresses_without_an_answer_are_named() {
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::write(directory.path().join("token"), "secret\n").expect("written");
    let output = [
        sheer(&["stat", "--api", "unix:none.sock"], "", directory.path()),
        sheer(&["stat", "--api", "http://127.0.0.1:1"], "", directory.path()),
        sheer(&["stat", "--api", "http://127.0.0.1:1", "--api-token-file", "token"], "", directory.path()),
        sheer(&["stat", "--api", "127.0.0.1:1"], "", directory.path()),
    ];
    insta::assert_snapshot!(output.join("\n"));
}

#[test]
fn answers_of_something_else_are_no_panic() {
    for (status, body) in [(200, "<html>"), (200, "[]"), (500, "boom"), (204, "")] {
        let api = Api::answering(vec![("GET /api/v1/check", status, body.into())]);
        let text = api.sheer(&["check"]);
        assert!(text.starts_with("status 1\n") && text.contains("error: "), "{text}");
    }
}

#[test]
fn settings_files_work_on_the_real_tree() {
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::write(directory.path().join("s.yaml"), "window: 5m\nnamespace: shop\n").expect("written");
    std::fs::write(directory.path().join("wrong.yaml"), "windw: 5m\nwindow: soon\n").expect("written");
    let output = [
        sheer(&["stat", "--settings", "s.yaml", "--print-settings", "-o", "json"], "", directory.path()),
        sheer(&["stat", "--settings", "wrong.yaml"], "", directory.path()),
    ];
    insta::assert_snapshot!(output.join("\n"));
}

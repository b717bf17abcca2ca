//! The HTTP API, as the command line and a browser use it.

use crate::client::{Name, certify};
use crate::{Fixture, until};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use sheer_core::api::{
    Action, Applied, Apply, Check, Edges, Failure, Level, Link, MeshView, ServiceView, SourceFile, Stat, TokenView,
    Version, WorkloadView,
};
use sheer_core::wire::v1::{self, proxy_report};
use tokio::io::{AsyncRead, AsyncWrite};

/// An answer: status, headers, body.
type Answer = (u16, http::HeaderMap, Vec<u8>);

async fn send(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, request: http::Request<String>) -> Answer {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    let driver = tokio::spawn(connection);
    let response = sender.send_request(request.map(|body| Full::new(bytes::Bytes::from(body)))).await;
    let response: http::Response<hyper::body::Incoming> = response.unwrap();
    let (head, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes().to_vec();
    driver.abort();
    (head.status.as_u16(), head.headers, body)
}

async fn unix(mesh: &Fixture, method: &str, path: &str, body: impl serde::Serialize) -> Answer {
    let stream = tokio::net::UnixStream::connect(mesh.directory.path().join("sockets/api.sock")).await.unwrap();
    let body = serde_json::to_string(&body).unwrap();
    send(stream, http::Request::builder().method(method).uri(path).header("host", "sheer").body(body).unwrap()).await
}

async fn get<T: serde::de::DeserializeOwned>(mesh: &Fixture, path: &str) -> T {
    let (status, _, body) = unix(mesh, "GET", path, ()).await;
    assert_eq!(status, 200, "{path}: {}", String::from_utf8_lossy(&body));
    serde_json::from_slice(&body).unwrap()
}

async fn tcp(mesh: &Fixture, request: http::request::Builder, body: &str) -> Answer {
    let stream = tokio::net::TcpStream::connect(mesh.plane.api_address().unwrap()).await.unwrap();
    send(stream, request.body(body.to_owned()).unwrap()).await
}

fn read<T: serde::de::DeserializeOwned>(answer: &Answer) -> T {
    serde_json::from_slice(&answer.2).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&answer.2)))
}

fn service(name: &str, port: u16) -> String {
    format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: {port}}}]}}\n")
}

fn apply(text: &str, dry_run: bool) -> Apply {
    Apply { files: vec![SourceFile { name: "-".into(), text: text.into() }], dry_run }
}

#[tokio::test]
async fn objects_are_applied_shown_and_deleted() {
    let mesh = Fixture::with_config(&[("hand.yaml", &service("hand", 80))]).await;
    assert_eq!(get::<Version>(&mesh, "/api/v1/version").await.api, 1);
    let dry = unix(&mesh, "POST", "/api/v1/apply", apply(&service("web", 80), true)).await;
    assert_eq!(read::<Applied>(&dry).changes[0].action, Action::Created);
    assert_eq!(get::<Vec<ServiceView>>(&mesh, "/api/v1/services").await.len(), 1);
    let done = unix(&mesh, "POST", "/api/v1/apply", apply(&service("web", 80), false)).await;
    assert_eq!(done.0, 200, "{}", String::from_utf8_lossy(&done.2));
    // In force when the call returns.
    let services: Vec<ServiceView> = get(&mesh, "/api/v1/services").await;
    assert_eq!(services.iter().map(|it| it.name.as_str()).collect::<Vec<_>>(), ["hand", "web"]);
    assert_eq!(services[1].virtual_ips.len(), 2);
    let by_hand = unix(&mesh, "POST", "/api/v1/apply", apply(&service("hand", 81), false)).await;
    assert!(by_hand.0 >= 400);
    let text = serde_json::to_string(&read::<Failure>(&by_hand)).unwrap();
    assert!(text.contains("hand.yaml:"), "{text}");
    let gone = unix(&mesh, "DELETE", "/api/v1/objects/service/default/web", ()).await;
    assert_eq!(read::<Applied>(&gone).changes[0].action, Action::Deleted);
    assert_eq!(get::<Vec<ServiceView>>(&mesh, "/api/v1/services").await.len(), 1);
    assert_eq!(unix(&mesh, "DELETE", "/api/v1/objects/service/default/web", ()).await.0, 404);
}

#[tokio::test]
async fn figures_of_proxies_are_added_up() {
    let mesh = Fixture::start().await;
    let (_channel, attached) = mesh.workload(&Name::new("web", "web-1"), "default/web").await;
    let edge = v1::Edge {
        side: v1::edge::Side::Outbound.into(),
        source: "default/web".into(),
        destination: "default/api".into(),
        route: "default".into(),
        protocol: "http1".into(),
        mtls: true,
        responses: vec![v1::ResponseCount { status: 200, grpc_status: -1, count: 7, ..Default::default() }],
        ..Default::default()
    };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_micros();
    let telemetry = v1::Telemetry { epoch: u64::try_from(now).unwrap(), edges: vec![edge] };
    attached.send(proxy_report::Body::Telemetry(telemetry)).await;
    let begun = std::time::Instant::now();
    let edges = loop {
        let edges: Edges = get(&mesh, "/api/v1/edges").await;
        if !edges.rows.is_empty() {
            break edges;
        }
        assert!(begun.elapsed() < crate::LIMIT);
    };
    assert_eq!((edges.rows[0].source.as_str(), edges.rows[0].total.requests), ("default/web", 7));
    let stat: Stat = get(&mesh, "/api/v1/stat?window_s=30").await;
    let row = |name: &str| stat.rows.iter().find(|row| row.service == name).cloned().unwrap();
    assert_eq!(row("default/api").window.success_rate, Some(1.0));
    assert_eq!((row("default/web").workloads, row("default/web").ready), (1, 1));
    let workloads: Vec<WorkloadView> = get(&mesh, "/api/v1/workloads").await;
    assert_eq!((workloads.len(), workloads[0].services.as_slice()), (1, ["default/web".to_owned()].as_slice()));
    let view: MeshView = get(&mesh, "/api/v1/mesh").await;
    assert_eq!((view.connected, view.services), (1, 1));
}

#[tokio::test]
async fn what_is_wrong_is_found() {
    let mesh = Fixture::with_config(&[("web.yaml", &service("web", 80))]).await;
    let check: Check = get(&mesh, "/api/v1/check").await;
    assert_eq!(check.level, Level::Warn, "a written service without endpoints: {check:?}");
    std::fs::write(mesh.directory.path().join("config/bad.yaml"), "apiVersion: v1\nkind: Servce\n").unwrap();
    until("the diagnostic", || !mesh.plane.control().configuration().diagnostics.is_empty()).await;
    let check: Check = get(&mesh, "/api/v1/check").await;
    let found = &check.findings[0];
    assert_eq!((check.level, found.topic.as_str()), (Level::Error, "config"));
    assert!(found.subject.starts_with("bad.yaml:") && found.mend.contains("Service"), "{found:?}");
    // Another account claims a service.
    let (_api, _attached) = mesh.workload(&Name::new("api", "api-1"), "default/api").await;
    let (_thief, _stolen) = mesh.workload(&Name::new("thief", "thief-1"), "default/api").await;
    let check: Check = get(&mesh, "/api/v1/check").await;
    let pin = check.findings.iter().find(|it| it.topic == "pin").unwrap();
    assert_eq!((pin.subject.as_str(), pin.level), ("default/api", Level::Warn));
    let consent = serde_json::json!({"namespace": "default", "name": "api", "accounts": ["api", "thief"]});
    let answer = unix(&mesh, "POST", "/api/v1/consent", consent).await;
    assert_eq!(read::<ServiceView>(&answer).accounts, ["api", "thief"]);
    let check: Check = get(&mesh, "/api/v1/check").await;
    assert!(check.findings.iter().all(|it| it.topic != "pin"));
}

#[tokio::test]
async fn loopback_reads_for_its_own_user_and_writes_with_the_token() {
    let mesh = Fixture::start().await;
    let host = mesh.plane.api_address().unwrap().to_string();
    let request = |method: &str, path: &str| http::Request::builder().method(method).uri(path).header("host", &host);
    let page = tcp(&mesh, request("GET", "/"), "").await;
    assert_eq!(page.0, 200);
    assert!(page.1["content-security-policy"].to_str().unwrap().contains("default-src 'none'"));
    // This test is a process of the control plane's own user.
    assert_eq!(tcp(&mesh, request("GET", "/api/v1/edges"), "").await.0, 200);
    assert_eq!(tcp(&mesh, request("GET", "/api/v1/backup"), "").await.0, 401);
    let body = r#"{"namespace":"default","service_account":"web"}"#;
    assert_eq!(tcp(&mesh, request("POST", "/api/v1/tokens"), body).await.0, 401);
    let token = std::fs::read_to_string(mesh.plane.api_token_file()).unwrap();
    let bearer = format!("Bearer {}", token.trim());
    let made = tcp(&mesh, request("POST", "/api/v1/tokens").header("authorization", &bearer), body).await;
    assert!(read::<TokenView>(&made).token.starts_with("sheer1."));
    let wrong = tcp(&mesh, request("GET", "/api/v1/edges").header("authorization", "Bearer x"), "").await;
    assert_eq!(wrong.0, 401);

    let rebound = http::Request::builder().uri("/api/v1/edges").header("host", "evil.example");
    assert_eq!(tcp(&mesh, rebound, "").await.0, 403);
    let foreign = request("POST", "/api/v1/tokens").header("authorization", &bearer).header("origin", "http://evil");
    assert_eq!(tcp(&mesh, foreign, body).await.0, 403);

    let link: Link = read(&unix(&mesh, "POST", "/api/v1/links", ()).await);
    let code = link.url.split_once("#code=").unwrap().1.to_owned();
    let open = || request("POST", "/api/v1/session").header("content-type", "application/json");
    let opened = tcp(&mesh, open(), &format!(r#"{{"code":"{code}"}}"#)).await;
    assert_eq!(opened.0, 204);
    assert!(opened.1["set-cookie"].to_str().unwrap().contains("HttpOnly; SameSite=Strict"));
    assert_eq!(tcp(&mesh, open(), &format!(r#"{{"code":"{code}"}}"#)).await.0, 401, "a code opens once");
    let large =
        tcp(&mesh, request("POST", "/api/v1/apply").header("authorization", &bearer), &" ".repeat(9 << 20)).await;
    assert_eq!(large.0, 413);
}

#[tokio::test]
async fn a_restored_backup_is_trusted_by_all_who_joined() {
    let mesh = Fixture::with_config(&[("web.yaml", &service("web", 80))]).await;
    let token = mesh.token("web").await;
    let name = Name::new("web", "web-1");
    let (_channel, mut credentials) = crate::client::join(&token, &name).await.unwrap();
    let (_api, _attached) = mesh.workload(&Name::new("api", "api-1"), "default/api").await;
    let (status, _, archive) = unix(&mesh, "GET", "/api/v1/backup", ()).await;
    assert_eq!(status, 200);
    let root: MeshView = get(&mesh, "/api/v1/mesh").await;
    drop(mesh);

    let directory = tempfile::tempdir().unwrap();
    let (state, config) = (directory.path().join("state"), directory.path().join("config"));
    let restored = sheer_control::restore(archive.as_slice(), &state, &config).unwrap();
    assert_eq!((restored.files, restored.kept_config), (1, false));
    assert!(sheer_control::restore(archive.as_slice(), &state, &config).is_err(), "it is not empty");
    let mut damaged = archive.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    let elsewhere = directory.path().join("other");
    assert!(sheer_control::restore(damaged.as_slice(), &elsewhere, &config).is_err());
    assert!(!elsewhere.exists());

    let mesh = Fixture::over(directory).await;
    let view: MeshView = get(&mesh, "/api/v1/mesh").await;
    assert_eq!(view.root_sha256, root.root_sha256);
    assert!(view.revision.starts_with("2."), "a new epoch: {}", view.revision);
    // Goes on without a token.
    let parsed = sheer_core::token::JoinToken::parse(&token).unwrap();
    let address = mesh.plane.proxy_address().unwrap();
    let channel = crate::client::connect_tls(address, parsed.root_sha256, Some(&credentials)).await.unwrap();
    certify(&channel, &mut credentials, &name, "").await.unwrap();
    let workloads: Vec<WorkloadView> = get(&mesh, "/api/v1/workloads").await;
    assert_eq!(workloads[0].name, "api-1", "its registration holds");
}

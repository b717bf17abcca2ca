//! What those who are nobody to the mesh can do to the ports of its control plane and its proxies: nothing is told, no
//! memory is taken, no token is guessed.

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore, version};
use sheer_core::token::JoinToken;
use sheer_testmesh::mesh::{Control, PATIENCE, Person, Workload};
use sheer_testmesh::net::{Host, Net};
use sheer_testmesh::program::{Processes, run};
use sheer_testmesh::shop::PLAIN_USER;
use sheer_testmesh::wait;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

const API: u16 = 15080;
const PROXIES: u16 = 15012;
const METRICS: u16 = 15020;

/// Longer than anybody who is slow may take.
const SLOW: Duration = Duration::from_secs(15);

/// A body that nobody would keep.
const GIB: u64 = 1 << 30;

/// What an attack may cost in memory, bytes.
const MEMORY: u64 = 10 << 20;

/// gRPC: RESOURCE_EXHAUSTED, UNAUTHENTICATED.
const WAIT: &str = "8";
const REFUSED: &str = "16";

/// What it is, what is sent first, how much then and of what, and the statuses that may answer.
type Flood<'a> = (&'a str, Vec<u8>, u64, &'a [u8], &'a [u16]);

/// A process that is attacked.
struct Target<'a> {
    pid: nix::unistd::Pid,
    output: &'a dyn Fn() -> String,
}

impl Target<'_> {
    fn status(&self, name: &str) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).context("it has ended")?;
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        Ok(line.context("no such figure")?.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
    }

    /// Runs an attack, which takes no more memory than it may and brings nobody down.
    fn bears<T>(&self, what: &str, attack: impl FnOnce() -> Result<T>) -> Result<T> {
        let before = self.status("VmRSS")?;
        // From here on, the most is what there was most since (proc(5)).
        std::fs::write(format!("/proc/{}/clear_refs", self.pid), "5")?;
        let outcome = attack().with_context(|| what.to_owned())?;
        let most = self.status("VmHWM").with_context(|| what.to_owned())?;
        ensure!(most <= before + MEMORY, "{what} took {} KiB", most.saturating_sub(before) >> 10);
        ensure!(!(self.output)().contains("panicked"), "{what}: {}", (self.output)());
        Ok(outcome)
    }
}

/// Sends a head and so many bytes of a body, as long as they are taken; what was answered.
fn flood(to: SocketAddr, head: &[u8], length: u64, part: &[u8]) -> Result<String> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(SLOW))?;
    stream.set_write_timeout(Some(SLOW))?;
    let mut sent = 0;
    let mut is_open = stream.write_all(head).is_ok();
    while is_open && sent < length {
        is_open = stream.write_all(part).is_ok();
        sent += part.len() as u64;
    }
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
            anyhow::bail!("it is still open after {SLOW:?}")
        }
        _ => Ok(String::from_utf8_lossy(&answer).into_owned()),
    }
}

fn ask(to: SocketAddr, request: &str) -> Result<String> {
    flood(to, request.as_bytes(), 0, b"")
}

/// Whether an answer has one of these statuses, or is none: who sends on after it is reset, and may miss it.
fn is_refused(answer: &str, statuses: &[u16]) -> bool {
    answer.is_empty() || statuses.iter().any(|status| answer.starts_with(&format!("HTTP/1.1 {status}")))
}

#[test]
fn who_is_nobody_learns_and_takes_nothing() -> Result<()> {
    let net = Net::new()?;
    let (host, stranger, friend) = (net.host("one")?, net.host("stranger")?, net.host("friend")?);
    let home = net.directory();
    let control = Control::start(&host, &home.join("control"))?;
    let flags = ["--name", "web", "--port", "8081", "--metrics", "127.0.0.1:15020", "--access-log"];
    let web = Workload::new(&host, "web", home)?.flags(PLAIN_USER).flags(&flags).start(&["sleep", "infinity"])?;
    let processes = wait::until("its command runs", PATIENCE, || {
        let processes = Processes::of(web.pid())?;
        processes.command().map(|_| processes)
    })?;
    let (said, complained) = (|| control.program.output(), || web.output());
    let plane = Target { pid: control.program.pid(), output: &said };
    let proxy = Target { pid: processes.proxy, output: &complained };

    api(&host, &plane)?;
    metrics(&host, &proxy)?;
    unfinished(&host, &plane, &proxy)?;
    people(&host, home)?;
    proxies_door(&stranger, &friend, &control, home, &plane)?;
    secrets(&host, home, &control, &said, &complained)
}

/// D11, D13: the API, which listens on loopback.
fn api(host: &Host, plane: &Target<'_>) -> Result<()> {
    let to = (Ipv4Addr::LOCALHOST, API).into();
    let zeros = vec![b' '; 1 << 20];
    let head =
        |line: &str, fields: &str| format!("{line} HTTP/1.1\r\nHost: 127.0.0.1:{API}\r\n{fields}\r\n").into_bytes();
    let gib = format!("Content-Type: application/json\r\nContent-Length: {GIB}\r\n");
    let chunked = "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n";
    let chunk = [b"100000\r\n", &zeros[..], b"\r\n"].concat();
    let deep = "[".repeat(10_000);
    let nested =
        head("POST /api/v1/session", &format!("Content-Type: application/json\r\nContent-Length: {}\r\n", deep.len()));
    let million = b"a: b\r\n".repeat(1 << 14);
    let cases: [Flood<'_>; 8] = [
        ("1 GiB of documents", head("POST /api/v1/apply", &gib), GIB, &zeros, &[401]),
        ("1 GiB of a code", head("POST /api/v1/session", &gib), GIB, &zeros, &[413]),
        ("1 GiB of a code in chunks", head("POST /api/v1/session", chunked), GIB, &chunk, &[413]),
        ("1 GiB for a page", head("GET /", &gib), GIB, &zeros, &[200, 400, 413]),
        ("JSON of 10,000 levels", [&nested, deep.as_bytes()].concat(), 0, b"", &[400, 413]),
        ("a million fields", b"GET / HTTP/1.1\r\n".to_vec(), 6 << 20, &million, &[400, 431]),
        ("a field of 1 GiB", b"GET / HTTP/1.1\r\nA: ".to_vec(), GIB, &zeros, &[400, 431]),
        ("a target of 1 GiB", b"GET /".to_vec(), GIB, &chunk[8..9].repeat(1 << 20), &[400, 414, 431]),
    ];
    for (what, head, length, part, statuses) in cases {
        let answer = plane.bears(what, || host.inside(|| flood(to, &head, length, part)))?;
        ensure!(is_refused(&answer, statuses), "{what}: {answer}");
    }

    let own = format!("127.0.0.1:{API}");
    for (what, request, status) in [
        ("another name that leads here", "GET /api/v1/services HTTP/1.1\r\nHost: evil.example\r\n".to_owned(), 403),
        ("no name", "GET /api/v1/services HTTP/1.1\r\nHost:\r\n".to_owned(), 403),
        (
            "a page of others",
            format!("GET /api/v1/services HTTP/1.1\r\nHost: {own}\r\nOrigin: http://evil.example\r\n"),
            403,
        ),
        ("a page without an address", format!("GET /api/v1/services HTTP/1.1\r\nHost: {own}\r\nOrigin: null\r\n"), 403),
        (
            "a question whether a page may",
            format!("OPTIONS /api/v1/tokens HTTP/1.1\r\nHost: {own}\r\nAccess-Control-Request-Method: POST\r\n"),
            401,
        ),
        (
            "a token without a token",
            format!("POST /api/v1/tokens HTTP/1.1\r\nHost: {own}\r\nContent-Length: 0\r\n"),
            401,
        ),
        (
            "a wrong token",
            format!("POST /api/v1/tokens HTTP/1.1\r\nHost: {own}\r\nAuthorization: Bearer x\r\nContent-Length: 0\r\n"),
            401,
        ),
        ("a token in the query", format!("GET /api/v1/backup?token=x HTTP/1.1\r\nHost: {own}\r\n"), 401),
        ("deletion", format!("DELETE /api/v1/objects/service/default/web HTTP/1.1\r\nHost: {own}\r\n"), 401),
        ("the root's key", format!("GET /api/v1/backup HTTP/1.1\r\nHost: {own}\r\n"), 401),
        ("a debugger", format!("GET /debug/pprof HTTP/1.1\r\nHost: {own}\r\n"), 404),
    ] {
        let answer = host.inside(|| ask(to, &format!("{request}Connection: close\r\n\r\n")))?;
        let is_told = answer.starts_with(&format!("HTTP/1.1 {status}"));
        ensure!(is_told && !answer.to_ascii_lowercase().contains("access-control"), "{what}: {answer}");
    }
    Ok(())
}

/// D11, D13: what a proxy tells of itself, on loopback.
fn metrics(host: &Host, proxy: &Target<'_>) -> Result<()> {
    let to = (Ipv4Addr::LOCALHOST, METRICS).into();
    let zeros = vec![b' '; 1 << 20];
    let gib = format!("Host: localhost\r\nContent-Length: {GIB}\r\n\r\n");
    let many = b"a: b\r\n".repeat(1 << 14);
    let cases: [Flood<'_>; 4] = [
        ("1 GiB posted", format!("POST /metrics HTTP/1.1\r\n{gib}").into_bytes(), GIB, &zeros, &[405]),
        ("1 GiB with a question", format!("GET /live HTTP/1.1\r\n{gib}").into_bytes(), GIB, &zeros, &[200]),
        ("a million fields", b"GET /metrics HTTP/1.1\r\n".to_vec(), 6 << 20, &many, &[400, 431]),
        ("a field of 1 GiB", b"GET /metrics HTTP/1.1\r\nA: ".to_vec(), GIB, &zeros, &[400, 431]),
    ];
    for (what, head, length, part, statuses) in cases {
        let answer = proxy.bears(what, || host.inside(|| flood(to, &head, length, part)))?;
        ensure!(is_refused(&answer, statuses), "{what}: {answer}");
    }
    let rebound =
        host.inside(|| ask(to, "GET /metrics HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"))?;
    ensure!(rebound.starts_with("HTTP/1.1 403") && !rebound.contains("sheer_"), "{rebound}");
    Ok(())
}

/// D13: what is begun and not finished ends, all of it at once.
fn unfinished(host: &Host, plane: &Target<'_>, proxy: &Target<'_>) -> Result<()> {
    let slow_body = format!(
        "POST /api/v1/session HTTP/1.1\r\nHost: 127.0.0.1:{API}\r\nContent-Type: application/json\r\n\
         Content-Length: 100\r\n\r\n{{"
    );
    let cases = [
        (API, "GET / HTTP/1.1\r\nHost: 127", true),
        (API, &slow_body, false),
        (METRICS, "GET /metrics HTTP/1.1\r\nHost: lo", true),
        (PROXIES, "", true),
        (PROXIES, "\x16\x03\x01\x02", true),
    ];
    let all = || {
        std::thread::scope(|scope| {
            let begin =
                |to: u16, request| scope.spawn(move || host.inside(|| ask((Ipv4Addr::LOCALHOST, to).into(), request)));
            let waiting: Vec<_> = cases.iter().map(|(to, request, _)| begin(*to, request)).collect();
            let ended = waiting.into_iter().map(|it| it.join().map_err(|_| anyhow::anyhow!("it panicked"))?);
            ended.collect::<Result<Vec<_>>>()
        })
    };
    let answers = plane.bears("what is not finished", || proxy.bears("what is not finished", all))?;
    for ((to, request, may_be_silent), answer) in cases.iter().zip(answers) {
        let is_told = answer.starts_with("HTTP/1.1 408") || (*may_be_silent && answer.is_empty());
        ensure!(is_told, "{request:?} to {to}: {answer}");
    }
    Ok(())
}

/// D11: another user of the host.
fn people(host: &Host, home: &Path) -> Result<()> {
    let person = Person::new(host, home)?;
    let curl = |arguments: &[&str]| -> Result<String> {
        let output =
            person.command("curl").args(["-sS", "--max-time", "5", "-w", " %{http_code}"]).args(arguments).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let url = |path: &str| format!("http://127.0.0.1:{API}{path}");
    for path in ["services", "workloads", "edges", "stat", "check", "objects", "mesh", "backup"] {
        let answer = curl(&[&url(&format!("/api/v1/{path}"))])?;
        ensure!(answer.ends_with(" 401"), "{path} is told to anybody: {answer}");
    }
    for socket in ["/run/sheer/api.sock", "/run/sheer/run/default_web/admin.sock"] {
        // A path of the host, not of the test.
        ensure!(host.path(socket).exists(), "{socket} is elsewhere now");
        let answer = curl(&["--unix-socket", socket, "http://localhost/config_dump"])?;
        ensure!(answer.ends_with(" 000") || answer.ends_with(" 403"), "{socket}: {answer}");
    }
    for file in ["root.pem", "issuing.pem", "api.token", "sheer.redb"] {
        let path = control_state(home).join(file);
        ensure!(!person.command("cat").arg(&path).output()?.status.success(), "{} is readable", path.display());
    }
    Ok(())
}

fn control_state(home: &Path) -> std::path::PathBuf {
    home.join("control/state")
}

/// HTTP/2 over TLS to the door of the proxies, without a certificate.
struct Line {
    sender: h2::client::SendRequest<Bytes>,
}

impl Line {
    async fn open(to: SocketAddr, root: &CertificateDer<'static>) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(root.clone())?;
        let builder = ClientConfig::builder_with_protocol_versions(&[&version::TLS13]);
        let mut config = builder.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let stream = tokio::net::TcpStream::connect(to).await?;
        let stream = connector.connect(ServerName::try_from("control.mesh.internal")?, stream).await?;
        let (sender, connection) = h2::client::handshake(stream).await?;
        tokio::spawn(connection);
        Ok(Self { sender })
    }

    /// Calls a method with so many bytes of a message; its gRPC status, or how it ended otherwise.
    async fn call(&self, method: &str, message: &[u8], announced: u32, length: u64) -> Result<String> {
        let request = http::Request::post(format!("https://control.mesh.internal/{method}"));
        let request = request.header("content-type", "application/grpc").header("te", "trailers").body(())?;
        let mut sender = self.sender.clone().ready().await?;
        let (answer, mut body) = sender.send_request(request, false)?;
        let mut all = vec![0];
        all.extend(announced.to_be_bytes());
        all.extend(message);
        body.send_data(all.into(), length == 0)?;
        let zeros = Bytes::from(vec![0; 1 << 14]);
        let flood = async {
            let mut sent = 0;
            while sent < length {
                body.reserve_capacity(zeros.len());
                match std::future::poll_fn(|cx| body.poll_capacity(cx)).await {
                    Some(Ok(room)) => {
                        sent += room as u64;
                        if body.send_data(zeros.slice(..room), false).is_err() {
                            break;
                        }
                    }
                    _ => break,
                }
            }
            std::future::pending::<()>().await
        };
        let answer = tokio::select! {
            answer = answer => answer,
            () = flood => unreachable!("it never ends"),
        };
        let mut answer = match answer {
            Ok(answer) => answer,
            Err(error) => return Ok(error.to_string()),
        };
        let status = |fields: &http::HeaderMap| Some(fields.get("grpc-status")?.to_str().ok()?.to_owned());
        if let Some(status) = status(answer.headers()) {
            return Ok(status);
        }
        while answer.body_mut().data().await.is_some() {}
        let trailers = answer.body_mut().trailers().await?;
        Ok(trailers.as_ref().and_then(status).unwrap_or_else(|| format!("HTTP {}", answer.status())))
    }
}

/// A request for a certificate (`sheer.v1.CertifyRequest`), by hand.
fn certify(token: &str, account: &str, csr: &[u8]) -> Vec<u8> {
    let mut message = Vec::new();
    let name = format!("{account}-9");
    let fields = [csr, token.as_bytes(), b"default", account.as_bytes(), name.as_bytes()];
    for (number, value) in (1_u8..).zip(fields) {
        message.push(number << 3 | 2);
        let mut length = value.len();
        while length >= 0x80 {
            message.push(length as u8 | 0x80);
            length >>= 7;
        }
        message.push(length as u8);
        message.extend(value);
    }
    message
}

/// D13, D14: the door of the proxies, for whoever has no certificate.
fn proxies_door(stranger: &Host, friend: &Host, control: &Control<'_>, home: &Path, plane: &Target<'_>) -> Result<()> {
    let to: SocketAddr = (control.host.address(), PROXIES).into();
    let root = CertificateDer::from_pem_file(control_state(home).join("root.pem"))?;
    let key = rcgen::KeyPair::generate()?;
    let csr = rcgen::CertificateParams::default().serialize_request(&key)?.der().to_vec();
    for (what, part) in
        [("plaintext", &b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"[..]), ("a record that is none", b"\x16\x03\x01\xff\xff")]
    {
        let part = part.repeat(1 << 15);
        plane.bears(what, || stranger.inside(|| flood(to, b"", 1 << 26, &part)))?;
    }
    plane.bears("1 GiB in one message", || {
        on(stranger, async {
            let line = Line::open(to, &root).await?;
            for (announced, length) in [(u32::MAX, GIB), (1 << 30, GIB), (60 * 1024, 1 << 20)] {
                let status = line.call("sheer.v1.Identity/Certify", b"", announced, length).await?;
                ensure!(status != "0", "it was taken: {status}");
            }
            Ok(())
        })
    })?;
    plane.bears("fields without an end", || {
        on(stranger, async {
            let line = Line::open(to, &root).await?;
            let mut request = http::Request::post("https://control.mesh.internal/sheer.v1.Identity/Certify").body(())?;
            for number in 0..20_000 {
                request.headers_mut().insert(http::HeaderName::try_from(format!("a{number}"))?, "b".try_into()?);
            }
            let mut sender = line.sender.clone().ready().await?;
            let answer = sender.send_request(request, true)?.0.await;
            ensure!(answer.as_ref().map_or(true, |it| it.status() == 431), "{answer:?}");
            Ok(())
        })
    })?;
    for method in
        ["sheer.v1.Fleet/Attach", "envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"]
    {
        let status = on(stranger, async { Line::open(to, &root).await?.call(method, b"", 0, 0).await })?;
        ensure!(status == REFUSED, "{method}: {status}");
    }

    // D14: guesses by the thousand are answered without being looked at; whoever else has a token joins meanwhile.
    let token = std::fs::read_to_string(control.token("default", "late", 1)?)?;
    let began = Instant::now();
    let mut counted = std::collections::BTreeMap::new();
    let guessed = plane.bears("10,000 guesses", || {
        on(stranger, async {
            let line = Line::open(to, &root).await?;
            let mut all = Vec::new();
            for batch in 0..200_u32 {
                let guesses = (0..50_u32).map(|number| {
                    let mut wrong = JoinToken::parse(token.trim())?;
                    wrong.secret[..4].copy_from_slice(&(batch * 50 + number).to_be_bytes());
                    Ok(certify(&wrong.encode(), "late", &csr))
                });
                let guesses = guesses.collect::<Result<Vec<_>>>()?;
                let calls = guesses.iter().map(|it| line.call("sheer.v1.Identity/Certify", it, it.len() as u32, 0));
                for status in join(calls).await {
                    all.push(status?);
                }
            }
            let message = certify(token.trim(), "late", &csr);
            let right = line.call("sheer.v1.Identity/Certify", &message, message.len() as u32, 0).await?;
            ensure!(right == WAIT, "who has guessed must wait also with the right one: {right}");
            Ok(all)
        })
    })?;
    for status in &guessed {
        *counted.entry(status.as_str()).or_insert(0) += 1;
    }
    eprintln!("10,000 guesses in {:?}: {counted:?}", began.elapsed());
    // Those of a batch that were on their way when the tenth was counted.
    ensure!(counted.get(REFUSED).is_some_and(|it| (10..=64).contains(it)), "{counted:?}");
    ensure!(counted.values().sum::<i32>() == 10_000 && counted[WAIT] >= 10_000 - 64, "{counted:?}");
    let joined = on(friend, async {
        let message = certify(token.trim(), "late", &csr);
        Line::open(to, &root).await?.call("sheer.v1.Identity/Certify", &message, message.len() as u32, 0).await
    })?;
    ensure!(joined == "0", "the right token, from another address: {joined}");
    // Nor do they fill the disk.
    let refusals = (plane.output)().matches("certificate refused").count();
    ensure!(refusals <= 3 * 60, "{refusals} lines of the log");
    let check = control.sheer(&["check"]).unwrap_or_else(|error| error.to_string());
    ensure!(check.contains("token"), "nobody is told of the guesses: {check}");
    Ok(())
}

/// All of them at once.
async fn join<T>(calls: impl Iterator<Item = impl Future<Output = T>>) -> Vec<T> {
    let mut calls: Vec<_> = calls.map(Box::pin).collect();
    let mut done: Vec<Option<T>> = calls.iter().map(|_| None).collect();
    std::future::poll_fn(|cx| {
        for (call, done) in calls.iter_mut().zip(&mut done) {
            if done.is_none()
                && let std::task::Poll::Ready(value) = call.as_mut().poll(cx)
            {
                *done = Some(value);
            }
        }
        match done.iter().all(Option::is_some) {
            true => std::task::Poll::Ready(()),
            false => std::task::Poll::Pending,
        }
    })
    .await;
    done.into_iter().flatten().collect()
}

/// Runs this in a host's network.
fn on<T: Send>(host: &Host, work: impl Future<Output = Result<T>> + Send) -> Result<T> {
    host.inside(|| tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work))
}

/// D11: what is shown, to whoever may see it, holds no key and no token.
fn secrets(
    host: &Host,
    home: &Path,
    control: &Control<'_>,
    said: &dyn Fn() -> String,
    complained: &dyn Fn() -> String,
) -> Result<()> {
    let api_token = std::fs::read_to_string(control_state(home).join("api.token"))?;
    let join_token = std::fs::read_to_string(control.token("default", "other", 1)?)?;
    let secret = join_token.trim().split('.').nth(2).context("a token has a secret")?.to_owned();
    let mut shown = vec![("the control plane's log".to_owned(), said()), ("a proxy's log".to_owned(), complained())];
    for path in ["services", "workloads", "edges", "stat", "check", "objects", "mesh", "version"] {
        let url = format!("http://127.0.0.1:{API}/api/v1/{path}");
        shown.push((path.to_owned(), run(host.command("curl").args(["-sS", "--fail", &url]))?));
    }
    let socket = "/run/sheer/run/default_web/admin.sock";
    for path in ["config_dump", "metrics"] {
        let url = format!("http://localhost/{path}");
        shown
            .push((path.to_owned(), run(host.command("curl").args(["-sS", "--fail", "--unix-socket", socket, &url]))?));
    }
    for (what, text) in shown {
        ensure!(!text.is_empty() || what.ends_with("log"), "{what} is empty");
        for hidden in ["PRIVATE KEY", "eyJ", "sheer1.", api_token.trim(), &secret] {
            ensure!(!text.contains(hidden), "{what} holds {hidden}: {text}");
        }
    }
    Ok(())
}

//! Nobody gets around the mesh, or through it to where it does not lead: strangers on the network, whoever routes packets
//! by way of a workload's host, hostile workloads with a certificate of the mesh, and applications inside. The
//! applications write down every byte that reaches them. The rows are those of docs/security/bypass.md.

use anyhow::{Context, Result, ensure};
use arc_swap::ArcSwapOption;
use rustls::{ClientConfig, ClientConnection, RootCertStore, SupportedProtocolVersion, version};
use sheer_proxy::control::{Address, Machine};
use sheer_proxy::identity::{Keeper, Wanted};
use sheer_proxy::state::Directory;
use sheer_proxy::upstream::tls::{Carried, Credentials};
use sheer_testmesh::mesh::{Control, PATIENCE, Workload};
use sheer_testmesh::net::{Host, Net, beside};
use sheer_testmesh::program::{Processes, Program, run, sheer};
use sheer_testmesh::recorder::Recorder;
use sheer_testmesh::shop::PLAIN_USER;
use sheer_testmesh::wait;
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// The mesh's door, the port of the application, and metrics.
const DOOR: u16 = 15006;
const PORT: u16 = 8081;
const METRICS: u16 = 15020;

/// Longer than any handshake may take.
const SLOW: Duration = Duration::from_secs(15);

/// What strangers send in plaintext to a door, or to a port that leads there, and what they are told: a status and
/// reason, or nothing.
const PLAINTEXT: &[(&str, &str, &[u8], &str)] = &[
    ("D4", "HTTP/1.1", b"GET / HTTP/1.1\r\nHost: web\r\n\r\n", "403 plaintext-refused"),
    ("D4", "HTTP/1.0", b"GET / HTTP/1.0\r\n\r\n", "403 plaintext-refused"),
    ("D4", "HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00", ""),
    ("D4", "SSL 2", b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10\x07\x00\xc0\x03\x00\x80\x01\x00\x80", ""),
    ("D4", "SSH", b"SSH-2.0-OpenSSH_9.2\r\n", ""),
    ("D4", "Redis", b"*1\r\n$4\r\nPING\r\n", ""),
    ("D4", "a PROXY header", b"PROXY TCP4 127.0.0.1 127.0.0.1 1 8081\r\nGET / HTTP/1.1\r\nHost: web\r\n\r\n", ""),
    ("D4", "a PROXY header, version 2", b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x7f\0\0\x01\x7f\0\0\x01\0\x01\x1f\x91GET / ", ""),
    ("A14", "an identity", b"GET / HTTP/1.1\r\nHost: web\r\nX-Forwarded-Client-Cert: URI=spiffe://mesh.internal/ns/default/sa/friend\r\nx-sheer-peer: default/friend\r\n\r\n", "403 plaintext-refused"),
    ("A13", "an identity with underscores", b"GET / HTTP/1.1\r\nHost: web\r\nX_Forwarded_Client_Cert: a\r\n\r\n", "400 bad-request"),
    ("A7", "two hosts", b"GET / HTTP/1.1\r\nHost: web\r\nHost: api\r\n\r\n", "400 bad-request"),
    ("A7", "a target of another host", b"GET http://api/ HTTP/1.1\r\nHost: web\r\n\r\n", "400 bad-request"),
    ("D7", "an absolute target", b"GET http://127.0.0.1:15020/metrics HTTP/1.1\r\nHost: 127.0.0.1:15020\r\n\r\n", "403 plaintext-refused"),
    ("D7", "CONNECT to the application", b"CONNECT 127.0.0.1:8081 HTTP/1.1\r\nHost: 127.0.0.1:8081\r\n\r\n", "405 bad-request"),
    ("D7", "CONNECT to a cloud's metadata", b"CONNECT 169.254.169.254:80 HTTP/1.1\r\nHost: 169.254.169.254:80\r\n\r\n", "405 bad-request"),
    ("D7", "CONNECT to port 0", b"CONNECT 127.0.0.1:0 HTTP/1.1\r\nHost: 127.0.0.1:0\r\n\r\n", "4"),
    ("D7", "SOCKS 5", b"\x05\x01\x00\x05\x01\x00\x01\x7f\0\0\x01\x1f\x91", ""),
    ("D7", "SOCKS 4", b"\x04\x01\x1f\x91\x7f\0\0\x01\0", ""),
];

/// What strangers begin and do not finish.
const UNFINISHED: &[(&str, &[u8])] =
    &[("nothing", b""), ("a letter", b"G"), ("half a request", b"GET / HTTP/1.1\r\n"), ("a byte of TLS", b"\x16")];

/// Server names that a peer asks a workload `web` for, all of which lead nowhere.
const ELSEWHERE: &[&str] = &[
    "p15001.web.default.svc.mesh.internal",
    "p15006.web.default.svc.mesh.internal",
    "p15020.web.default.svc.mesh.internal",
    "p22.web.default.svc.mesh.internal",
    "p0.web.default.svc.mesh.internal",
    "p08081.web.default.svc.mesh.internal",
    "p73617.web.default.svc.mesh.internal",
    "p-1.web.default.svc.mesh.internal",
    "p8081.api.default.svc.mesh.internal",
    "p8081.web.other.svc.mesh.internal",
    "p8081.web.default.svc.other.example",
    "p8081.p8081.web.default.svc.mesh.internal",
    "p8081.web.default.svc.mesh.internal.other.example",
    "web.default.svc.mesh.internal",
    "web",
    "localhost",
    // Not sent at all.
    "127.0.0.1",
    "169.254.169.254",
];

/// Where an application asks its forward proxy to lead it, and it does not: this host's own, however it is written.
const FORBIDDEN: &[&str] = &[
    "127.0.0.1:15020",
    "127.0.0.1:15080",
    "127.8.8.8:15020",
    "localhost:15020",
    "LOCALHOST.:15020",
    "127.1:15020",
    "2130706433:15020",
    "0x7f000001:15020",
    "0.0.0.0:15020",
    "[::1]:15020",
    "[::]:15020",
    "[::ffff:127.0.0.1]:15020",
    "[::ffff:7f00:1]:15020",
    "169.254.169.254:80",
    "[::ffff:169.254.169.254]:80",
    "[fe80::1]:80",
    "240.240.255.254:80",
];

/// A workload and its application.
struct Victim<'a> {
    name: &'static str,
    host: &'a Host,
    program: Program,
    proxy: nix::unistd::Pid,
    recorder: Recorder,
}

impl<'a> Victim<'a> {
    /// `sheer run`, strict, in a network of its own, where the application is.
    fn apart(host: &'a Host, name: &'static str, home: &Path, flags: &[&str]) -> Result<Self> {
        let (door, metrics, port) = (DOOR.to_string(), format!("127.0.0.1:{METRICS}"), PORT.to_string());
        let workload = Workload::new(host, name, home)?.flags(PLAIN_USER).flags(flags);
        let own = ["--name", name, "--port", &port, "--inbound-port", &door, "--metrics", &metrics];
        let program = workload.flags(&own).start(&["sleep", "infinity"])?;
        let processes = wait::until("its command runs", PATIENCE, || {
            let processes = Processes::of(program.pid())?;
            processes.command().map(|_| processes)
        })?;
        let listener = beside(processes.keeper, || Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?))?;
        Ok(Self { name, host, program, proxy: processes.proxy, recorder: Recorder::answer(listener)? })
    }

    /// `sheer proxy`, strict, in the network that the application has always been in.
    fn here(host: &'a Host, name: &'static str, home: &Path, control: &Control<'_>) -> Result<Self> {
        // In both families.
        let listener = host.inside(|| Ok(TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT))?))?;
        let recorder = Recorder::answer(listener)?;
        let port = PORT.to_string();
        let own = ["--name", name, "--port", &port, "--capture", "here", "--mode", "strict"];
        let metrics = format!("127.0.0.1:{METRICS}");
        let workload = Workload::beside(host, name, home)?.flags(&own).flags(&["--metrics", &metrics]);
        let program = workload.joins(control, &control.token("default", name, 1)?).adopt()?;
        let proxy = Processes::of(program.pid())?.proxy;
        Ok(Self { name, host, program, proxy, recorder })
    }

    fn at(&self, port: u16) -> SocketAddr {
        (self.host.address(), port).into()
    }

    /// How many connections were refused for a reason.
    fn refused(&self, reason: &str) -> Result<u64> {
        let metrics =
            self.host.inside(|| ask((Ipv4Addr::LOCALHOST, METRICS).into(), b"GET /metrics HTTP/1.0\r\n\r\n"))?;
        ensure!(metrics.starts_with("HTTP/1.0 200"), "{metrics}");
        let name = format!("sheer_connections_refused_total{{reason=\"{reason}\"}} ");
        let count = metrics.lines().find_map(|line| line.strip_prefix(&name));
        Ok(count.map_or(Ok(0), str::parse)?)
    }

    /// It runs as before, and nothing panicked.
    fn is_well(&self) -> Result<()> {
        let proxy = Processes::of(self.program.pid())?.proxy;
        ensure!(proxy == self.proxy, "the proxy of {} is another process", self.name);
        let output = self.program.output();
        ensure!(!output.contains("panicked"), "{}: {output}", self.name);
        Ok(())
    }

    /// Nothing of what is tried reaches the application.
    fn hears_nothing<T>(&self, what: &str, attempt: impl FnOnce() -> Result<T>) -> Result<T> {
        let (bytes, connections) = (self.recorder.bytes(), self.recorder.connections());
        let outcome = attempt().with_context(|| format!("{what}, to {}", self.name))?;
        let heard = self.recorder.since(bytes);
        ensure!(heard.is_empty(), "{what}: the application of {} heard {heard:?}", self.name);
        ensure!(self.recorder.connections() == connections, "{what}: the application of {} was called", self.name);
        self.is_well().with_context(|| format!("after {what}"))?;
        Ok(outcome)
    }
}

/// Sends something and reads until the other side ends the connection; a reset is an end.
fn ask(address: SocketAddr, bytes: &[u8]) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(SLOW))?;
    let _ = stream.write_all(bytes);
    answer(&mut stream)
}

fn answer(stream: &mut TcpStream) -> Result<String> {
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
            anyhow::bail!("it is still open after {SLOW:?}, having said {:?}", String::from_utf8_lossy(&answer))
        }
        _ => Ok(String::from_utf8_lossy(&answer).into_owned()),
    }
}

/// A status and reason as in the tables.
fn is_told(answer: &str, expected: &str) -> bool {
    let (status, reason) = expected.split_once(' ').unwrap_or((expected, ""));
    match status {
        "" => answer.is_empty(),
        status => {
            answer.starts_with(&format!("HTTP/1.1 {status}"))
                && answer.contains(&format!("x-sheer-reason: {reason}"))
                && !answer.contains("HTTP/1.1 200")
        }
    }
}

/// The first message of a TLS client.
fn hello(versions: &[&'static SupportedProtocolVersion], protocols: &[&[u8]], name: &str) -> Result<Vec<u8>> {
    let builder = ClientConfig::builder_with_protocol_versions(versions);
    let mut config = builder.with_root_certificates(RootCertStore::empty()).with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|it| it.to_vec()).collect();
    let mut client = ClientConnection::new(Arc::new(config), name.to_owned().try_into()?)?;
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes)?;
    Ok(bytes)
}

/// What listens on a host for others than itself.
fn open_ports(host: &Host) -> Result<BTreeSet<u16>> {
    let table = host.inside(|| {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/thread-self/net/{name}"));
        Ok(read("tcp")? + &read("tcp6").unwrap_or_default())
    })?;
    let listening = table.lines().filter_map(|line| {
        let columns: Vec<&str> = line.split_ascii_whitespace().collect();
        let (address, port) = columns.get(1)?.split_once(':')?;
        let is_loopback = address.ends_with("7F") || address == "00000000000000000000000001000000";
        (columns.get(3) == Some(&"0A") && !is_loopback).then(|| u16::from_str_radix(port, 16).ok())?
    });
    Ok(listening.collect())
}

/// A certificate of the mesh in hostile hands: its key is not in a proxy of ours.
fn enrol(host: &Host, control: &Control<'_>, account: &str, state: &Path) -> Result<Arc<Credentials>> {
    let wanted = Wanted {
        namespace: "default".into(),
        service_account: account.into(),
        workload: format!("{account}-1"),
        control: vec![Address::parse(&control.address())?],
        token_file: Some(control.token("default", account, 1)?),
    };
    let directory = Directory::open(state)?;
    let published = Arc::new(ArcSwapOption::empty());
    let (_trust, announced) = tokio::sync::watch::channel(None);
    let keeper = Keeper::new(wanted, directory, published.clone(), announced, Arc::default(), Arc::new(Machine));
    host.inside(|| {
        runtime()?.block_on(async {
            let mut held = keeper.held();
            tokio::select! {
                error = keeper.run() => Err(error.into()),
                _ = held.wait_for(Option::is_some) => Ok(()),
            }
        })
    })?;
    published.load_full().context("no certificate")
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// Speaks to a door of the mesh as a peer; what came back before the connection ended.
fn peer(host: &Host, own: &Credentials, to: SocketAddr, name: &str, as_: Carried, bytes: &[u8]) -> Result<String> {
    host.inside(|| {
        runtime()?.block_on(async {
            let stream = tokio::net::TcpStream::connect(to).await?;
            let Ok((mut io, _)) = own.dialer().connect(stream, name, as_).await else { return Ok(String::new()) };
            let mut answer = Vec::new();
            let talk = async {
                io.write_all(bytes).await?;
                io.flush().await?;
                io.read_to_end(&mut answer).await
            };
            let ended = tokio::time::timeout(SLOW, talk).await;
            ensure!(ended.is_ok(), "it is still open, having said {:?}", String::from_utf8_lossy(&answer));
            Ok(String::from_utf8_lossy(&answer).into_owned())
        })
    })
}

/// The values of a field that the application was told, as its answer shows them.
fn told<'a>(answer: &'a str, name: &str) -> Vec<&'a str> {
    let echoed = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    let lines = echoed.lines().filter_map(|line| line.split_once(": "));
    lines.filter(|(it, _)| it.eq_ignore_ascii_case(name)).map(|(_, value)| value).collect()
}

#[test]
fn nobody_gets_around_the_mesh() -> Result<()> {
    let net = Net::new()?;
    let (one, two) = (net.host("one")?, net.host("two")?);
    let (friend, stranger) = (net.host("friend")?, net.host("stranger")?);
    let behind = net.container(&two, "behind")?;
    let home = net.directory();
    let control = Control::start(&one, &home.join("control"))?;
    let believed = format!("{}/32", friend.address());
    let web = Victim::apart(&one, "web", home, &["--publish", "0.0.0.0:8090=8081", "--trust-forwarded", &believed])?;
    let api = Victim::here(&two, "api", home, &control)?;
    let mut calls = Workload::new(&friend, "friend", home)?.flags(&["--user", "nobody", "--capture", "none"]);
    for upstream in ["127.0.0.1:8500=web:80", "127.0.0.1:8501=api:80"] {
        calls = calls.flags(&["--upstream", upstream]);
    }
    let _friend = calls.joins(&control, &control.token("default", "friend", 1)?).start(&["sleep", "infinity"])?;
    for victim in [&web, &api] {
        control.serves(victim.name, 1)?;
    }
    // An honest call of a mesh peer is answered, before and after all that follows.
    let honest = || {
        for port in [8500, 8501] {
            wait::until("an honest call is answered", PATIENCE, || {
                let request = b"GET /honest HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n";
                let answer = friend.inside(|| ask((Ipv4Addr::LOCALHOST, port).into(), request))?;
                let caller = told(&answer, "x-forwarded-client-cert");
                ensure!(caller == ["URI=spiffe://mesh.internal/ns/default/sa/friend"], "{port}: {answer}");
                Ok(())
            })?;
        }
        Ok::<(), anyhow::Error>(())
    };
    honest()?;

    // D11: nothing of a proxy but its door is there for others.
    ensure!(open_ports(&one)? == [8090, 15012, DOOR].into(), "open on one: {:?}", open_ports(&one)?);
    ensure!(open_ports(&two)? == [PORT, DOOR].into(), "open on two: {:?}", open_ports(&two)?);

    strangers(&stranger, &web, &api)?;
    honest()?;
    net.ipv6(&stranger)?;
    strangers_by_ipv6(&stranger, &api, net.ipv6(&two)?)?;
    honest()?;
    routed(&behind, &web, &api)?;
    honest()?;
    published(&stranger, &friend, &web)?;
    hostile_peer(&stranger, &control, home, &web, &api)?;
    honest()?;
    from_inside(&web, &api)?;
    honest()
}

/// D4, D6, D7: plaintext, TLS that is not the mesh's, and what is never finished, to the door and to the port itself.
fn strangers(stranger: &Host, web: &Victim<'_>, api: &Victim<'_>) -> Result<()> {
    // In a network of its own the application has no port on the host; in a shared one its port leads to the door.
    let doors = [(web, DOOR), (api, DOOR), (api, PORT)];
    let slow = std::thread::scope(|scope| {
        let waiting: Vec<_> = doors
            .iter()
            .flat_map(|(victim, port)| UNFINISHED.iter().map(move |(what, bytes)| (victim.at(*port), what, *bytes)))
            .map(|(to, what, bytes)| (what, scope.spawn(move || stranger.inside(|| ask(to, bytes)))))
            .collect();
        for (victim, port) in doors {
            for (row, what, bytes, expected) in PLAINTEXT {
                let before = victim.refused("plaintext-refused")?;
                let what = format!("{row}: {what} to port {port}");
                let told = victim.hears_nothing(&what, || stranger.inside(|| ask(victim.at(port), bytes)))?;
                ensure!(is_told(&told, expected), "{what} of {}: wanted '{expected}', had {told}", victim.name);
                wait::until("it is counted", PATIENCE, || {
                    ensure!(victim.refused("plaintext-refused")? > before, "{what} is not counted");
                    Ok(())
                })?;
            }
            let own = "p8081.web.default.svc.mesh.internal";
            for (what, bytes) in [
                ("TLS 1.2", hello(&[&version::TLS12], &[], "web")?),
                ("TLS 1.3 without a protocol", hello(&[&version::TLS13], &[], own)?),
                ("TLS of a browser", hello(&[&version::TLS13, &version::TLS12], &[b"h2", b"http/1.1"], own)?),
                ("an unknown version of the mesh's", hello(&[&version::TLS13], &[b"sheer/9+h1"], own)?),
                ("the mesh's protocol in TLS 1.2", hello(&[&version::TLS12], &[b"sheer/1+h1"], own)?),
            ] {
                let told = victim.hears_nothing(what, || stranger.inside(|| ask(victim.at(port), &bytes)))?;
                // At most an alert.
                ensure!(told.len() < 16, "{what} to port {port} of {} was told {told:?}", victim.name);
            }
        }
        waiting
            .into_iter()
            .map(|(what, thread)| Ok((what, thread.join().map_err(|_| anyhow::anyhow!("it panicked"))??)))
            .collect::<Result<Vec<_>>>()
    })?;
    for (what, told) in slow {
        ensure!(told.is_empty() || told.starts_with("HTTP/1.1 408"), "{what}: {told}");
    }
    let closed =
        |to: SocketAddr| stranger.inside(|| Ok(TcpStream::connect_timeout(&to, Duration::from_secs(2)).is_err()));
    for port in [PORT, METRICS, 15001, 15053, 15080] {
        ensure!(web.hears_nothing("the port itself", || closed(web.at(port)))?, "port {port} is open on one");
    }
    for port in [METRICS, 15001, 15053] {
        ensure!(api.hears_nothing("the port itself", || closed(api.at(port)))?, "port {port} is open on two");
    }
    Ok(())
}

/// D6: the same by IPv6, in which the application listens as well.
fn strangers_by_ipv6(stranger: &Host, api: &Victim<'_>, address: Ipv6Addr) -> Result<()> {
    for port in [DOOR, PORT] {
        for (row, what, bytes, expected) in PLAINTEXT {
            let before = api.refused("plaintext-refused")?;
            let what = format!("{row}: {what} to port {port} by IPv6");
            let told = api.hears_nothing(&what, || stranger.inside(|| ask((address, port).into(), bytes)))?;
            ensure!(is_told(&told, expected), "{what}: wanted '{expected}', had {told}");
            wait::until("it is counted", PATIENCE, || {
                ensure!(api.refused("plaintext-refused")? > before, "{what} is not counted");
                Ok(())
            })?;
        }
    }
    for port in [METRICS, 15001, 15053] {
        let to = SocketAddr::from((address, port));
        let closed = || stranger.inside(|| Ok(TcpStream::connect_timeout(&to, Duration::from_secs(2)).is_err()));
        ensure!(api.hears_nothing("the port itself", closed)?, "port {port} is open on two by IPv6");
    }
    Ok(())
}

/// D6, D7, C16: packets for other addresses that come by way of a workload's host are no calls of that workload.
fn routed(behind: &Host, web: &Victim<'_>, api: &Victim<'_>) -> Result<()> {
    for (address, is_refused) in [
        // Other addresses of the same host: its application listens there, and so do the rules.
        (api.host.address(), true),
        (Ipv4Addr::new(10, 92, behind.address().octets()[2], 1), true),
        (web.host.address(), false),
        (Ipv4Addr::new(169, 254, 169, 254), false),
        (Ipv4Addr::new(240, 240, 0, 1), false),
        (Ipv4Addr::new(192, 0, 2, 1), false),
        (Ipv4Addr::new(127, 0, 0, 6), false),
    ] {
        let before = api.refused("plaintext-refused")?;
        for victim in [web, api] {
            let what = format!("to {address} by way of two");
            let request = b"GET / HTTP/1.1\r\nHost: api\r\nConnection: close\r\n\r\n";
            let told = victim.hears_nothing(&what, || {
                Ok(behind.inside(|| ask((address, PORT).into(), request)).unwrap_or_default())
            })?;
            ensure!(is_told(&told, if is_refused { "403 plaintext-refused" } else { "" }), "{what}: {told}");
        }
        let counted = api.refused("plaintext-refused")? - before;
        ensure!((counted > 0) == is_refused, "{address}: {counted} were refused by two");
    }
    Ok(())
}

/// A14, A16: what a caller at a published port says of who and where it is.
fn published(stranger: &Host, friend: &Host, web: &Victim<'_>) -> Result<()> {
    const CLAIMS: &str = "x-forwarded-client-cert: URI=spiffe://mesh.internal/ns/default/sa/friend\r\n\
                          X-Forwarded-Client-Cert: a\r\nl5d-client-id: a\r\nx-sheer-peer: a\r\n\
                          Connection: close, x-forwarded-for, x-forwarded-client-cert\r\n\
                          X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: bank.example\r\n\
                          X-Forwarded-Prefix: /a\r\nX-Forwarded-Port: 443\r\nForwarded: for=1.2.3.4\r\nX-Real-IP: 1.2.3.4\r\n";
    let request = format!("GET / HTTP/1.1\r\nHost: web\r\n{CLAIMS}\r\n");
    let call = |from: &Host| from.inside(|| ask(web.at(8090), request.as_bytes()));
    let (theirs, ours) = (call(stranger)?, call(friend)?);
    for answer in [&theirs, &ours] {
        ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        for identity in ["x-forwarded-client-cert", "l5d-client-id", "x-sheer-peer"] {
            ensure!(told(answer, identity).is_empty(), "A14: {answer}");
        }
    }
    ensure!(told(&theirs, "x-forwarded-for") == [stranger.address().to_string()], "A16: {theirs}");
    ensure!(told(&theirs, "x-forwarded-proto") == ["http"], "A16: {theirs}");
    for field in ["x-forwarded-host", "x-forwarded-prefix", "x-forwarded-port", "forwarded", "x-real-ip"] {
        ensure!(told(&theirs, field).is_empty() && told(&ours, field).len() == 1, "A16: {field} of {theirs} {ours}");
    }
    // The workload was told to believe this one.
    ensure!(told(&ours, "x-forwarded-for") == ["1.2.3.4"] && told(&ours, "x-forwarded-proto") == ["https"], "{ours}");
    web.is_well()
}

/// D5, D7, A7, A14 to A16: a compromised workload with a certificate of its own.
fn hostile_peer(host: &Host, control: &Control<'_>, home: &Path, web: &Victim<'_>, api: &Victim<'_>) -> Result<()> {
    let own = enrol(host, control, "hostile", &home.join("hostile"))?;
    let door = web.at(DOOR);
    let request = b"GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n";
    for name in ELSEWHERE {
        let what = format!("D7: asking for {name}");
        let told = web.hears_nothing(&what, || peer(host, &own, door, name, Carried::Http1, request))?;
        ensure!(is_told(&told, "404 port-not-declared"), "{what}: {told:?}");
        let told = web.hears_nothing(&what, || peer(host, &own, door, name, Carried::Tcp, request))?;
        ensure!(told.is_empty(), "{what}, as bytes: {told:?}");
    }
    let name = "p8081.web.default.svc.mesh.internal";
    for (row, what, request, expected) in [
        ("D7", "CONNECT", "CONNECT 127.0.0.1:15020 HTTP/1.1\r\nHost: 127.0.0.1:15020\r\n\r\n", "405 bad-request"),
        ("D7", "CONNECT to another workload", "CONNECT api:80 HTTP/1.1\r\nHost: api:80\r\n\r\n", "405 bad-request"),
        ("A7", "two hosts", "GET / HTTP/1.1\r\nHost: web\r\nHost: api\r\n\r\n", "400 bad-request"),
        ("A7", "another host's target", "GET http://api/ HTTP/1.1\r\nHost: web\r\n\r\n", "400 bad-request"),
        ("A13", "underscores", "GET / HTTP/1.1\r\nHost: web\r\nx_sheer_peer: a\r\n\r\n", "400 bad-request"),
    ] {
        let what = format!("{row}: {what}");
        let told = web.hears_nothing(&what, || peer(host, &own, door, name, Carried::Http1, request.as_bytes()))?;
        ensure!(is_told(&told, expected), "{what}: {told:?}");
    }
    // D5, A6: whatever host it writes, it reaches the application whose port the server name asked for, and no other; and
    // whatever it says of itself, the application is told who it is.
    for host_field in
        ["web", "api", "WEB.", "web:8081", "api.default.svc.mesh.internal", "127.0.0.1:15020", "169.254.169.254"]
    {
        for carried in [Carried::Http1, Carried::Tcp] {
            let request = format!(
                "GET http://{host_field}/a HTTP/1.1\r\nHost: {host_field}\r\nx-forwarded-client-cert: a\r\n\
                 X-Sheer-Peer: a\r\nConnection: close, x-forwarded-client-cert\r\nX-Forwarded-For: 1.2.3.4\r\n\r\n"
            );
            let what = format!("D5: the host {host_field}");
            let ask = || peer(host, &own, door, name, carried, request.as_bytes());
            let answer = api.hears_nothing(&what, ask)?;
            ensure!(answer.starts_with("HTTP/1.1 200"), "{what}: {answer}");
            ensure!(told(&answer, "host") == [host_field], "{what}: {answer}");
            let caller = told(&answer, "x-forwarded-client-cert");
            ensure!(caller == ["URI=spiffe://mesh.internal/ns/default/sa/hostile"], "A14, A15: {answer}");
            ensure!(told(&answer, "x-sheer-peer").is_empty(), "A14: {answer}");
            ensure!(told(&answer, "x-forwarded-for") == ["1.2.3.4"], "A16: {answer}");
        }
    }
    // A port of the application in a shared network is one of its door: the server name still decides.
    let told = api.hears_nothing("D7: the port itself", || {
        peer(host, &own, api.at(PORT), "p22.api.default.svc.mesh.internal", Carried::Http1, request)
    })?;
    ensure!(is_told(&told, "404 port-not-declared"), "{told}");
    web.is_well()
}

/// D7, C16: from inside a workload's own network, to the proxy's doors and to what is the host's alone.
fn from_inside(web: &Victim<'_>, api: &Victim<'_>) -> Result<()> {
    let keeper = Processes::of(web.program.pid())?.keeper;
    let request = b"GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n";
    let inside = |to: &str| -> Result<String> {
        let to: SocketAddr = to.parse()?;
        beside(keeper, || Ok(ask(to, request).unwrap_or_default()))
    };
    let own = |port: u16| format!("{}:{port}", web.host.address());
    for (what, to, expected) in [
        ("the door for calls itself", "127.0.0.1:15001".to_owned(), "403 destination-forbidden"),
        ("the same by IPv6", "[::1]:15001".to_owned(), "403 destination-forbidden"),
        ("the same as an IPv4 address", "[::ffff:127.0.0.1]:15001".to_owned(), "403 destination-forbidden"),
        ("an address of no service", "240.240.255.254:80".to_owned(), "502 unknown-destination"),
        ("the host's metrics", "127.0.0.1:15020".to_owned(), ""),
        ("the host's API", "127.0.0.1:15080".to_owned(), ""),
        ("the host's metrics by its address", own(METRICS), "502 connect-refused"),
        ("the host's API by its address", own(15080), "502 connect-refused"),
    ] {
        let what = format!("C16: {what}");
        let told = web.hears_nothing(&what, || api.hears_nothing(&what, || inside(&to)))?;
        ensure!(is_told(&told, expected), "{what}: wanted '{expected}', had {told}");
    }
    // Its own door leads to itself once, as a call of its own, and not round and round.
    let before = web.recorder.bytes();
    let answer = inside(&own(DOOR))?;
    let heard = web.recorder.since(before);
    ensure!(heard.matches("GET / ").count() <= 1 && answer.matches("HTTP/1.1").count() <= 2, "C16: {answer} {heard}");
    rests(web)
}

/// A proxy has nothing to do when nobody asks.
fn rests(victim: &Victim<'_>) -> Result<()> {
    let spent = || -> Result<u64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", victim.proxy))?;
        let columns: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
        Ok(columns.get(11).context("utime")?.parse::<u64>()? + columns.get(12).context("stime")?.parse::<u64>()?)
    };
    wait::until("the proxy rests", PATIENCE, || {
        let (before, began) = (spent()?, Instant::now());
        while began.elapsed() < Duration::from_secs(1) {
            std::thread::sleep(Duration::from_millis(100));
        }
        let ticks = spent()? - before;
        ensure!(ticks <= 5, "it took {ticks} hundredths of a second in one");
        Ok(())
    })
}

/// D7, C16: an application's forward proxy leads to services and outside, and never to the host itself; two workloads
/// that take each other's doors for applications are told, and nothing goes round.
#[test]
fn nothing_goes_in_circles_or_where_only_the_host_may() -> Result<()> {
    let net = Net::new()?;
    let (one, two) = (net.host("one")?, net.host("two")?);
    let home = net.directory();
    let control = Control::start(&one, &home.join("control"))?;
    let api = Victim::here(&two, "api", home, &control)?;
    // Of root, as the test is: nobody else is let in.
    let env = ["--capture", "env", "--user", "root", "--name", "env", "--metrics", "127.0.0.1:15020"];
    let _env = Workload::new(&one, "env", home)?.flags(&env).start(&["sleep", "infinity"])?;
    let ring = |name: &'static str, next: &str, port: &str| {
        let upstream = format!("{}:{port}={next}:80", one.address());
        let workload = Workload::new(&one, name, home)?.flags(&["--user", "nobody", "--capture", "none"]);
        workload.flags(&["--name", name, "--port", port, "--upstream", &upstream]).start(&["sleep", "infinity"])
    };
    let rings = [ring("left", "right", "8601")?, ring("right", "left", "8602")?];
    for service in ["api", "left", "right"] {
        control.serves(service, 1)?;
    }
    let variables = wait::until("the forward proxy is there", PATIENCE, || {
        run(one.command(sheer()?).args(["exec", "env", "--", "env"]))
    })?;
    let url = variables.lines().find_map(|line| line.strip_prefix("HTTP_PROXY=http://")).context("no HTTP_PROXY")?;
    let (password, address) = url.trim_end_matches('/').rsplit_once('@').context("no password")?;
    let door: SocketAddr = address.parse()?;
    let proxy = |request: &str| one.inside(|| ask(door, request.as_bytes()));
    let allowed = format!("Proxy-Authorization: Basic {}\r\nConnection: close\r\n\r\n", base64(password.as_bytes()));

    for to in FORBIDDEN {
        for request in [
            format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n"),
            format!("GET http://{to}/metrics HTTP/1.1\r\nHost: {to}\r\n"),
        ] {
            let told = api.hears_nothing(to, || proxy(&format!("{request}{allowed}")))?;
            let is_refused =
                ["403 destination-forbidden", "502 unknown-destination"].iter().any(|it| is_told(&told, it));
            ensure!(is_refused, "{request}: {told}");
        }
        let told = proxy(&format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\n\r\n"))?;
        ensure!(told.starts_with("HTTP/1.1 407"), "without the password: {told}");
    }
    for malformed in ["api:0", "api", "api:x", "api:70000", "a@api:80", "api:80:80", "[api]:80", ":80"] {
        let told = proxy(&format!("CONNECT {malformed} HTTP/1.1\r\nHost: {malformed}\r\n{allowed}"))?;
        ensure!(told.starts_with("HTTP/1.1 4") || told.starts_with("HTTP/1.1 502"), "CONNECT {malformed}: {told}");
    }
    // SOCKS, without a password and with a wrong one.
    for greeting in [&b"\x05\x01\x00"[..], b"\x05\x01\x02\x01\x01a\x01b", b"\x05\x00"] {
        let told = one.inside(|| ask(door, greeting))?;
        ensure!(!told.contains("\x05\0\0\x01"), "{greeting:?}: {told:?}");
    }
    let target = b"\x05\x01\x00\x01\x7f\0\0\x01\x3a\xac";
    let (user, secret) = password.split_once(':').context("no user")?;
    let login = [&[1, user.len() as u8][..], user.as_bytes(), &[secret.len() as u8], secret.as_bytes()].concat();
    let told = one.inside(|| ask(door, &[b"\x05\x01\x02", &login[..], target].concat()))?;
    ensure!(told.as_bytes().starts_with(b"\x05\x02\x01\0\x05\x02"), "SOCKS to the host's metrics: {told:?}");
    // What it may reach it does, and says who it is.
    let answer = proxy(&format!("GET http://{}/ HTTP/1.1\r\nHost: {}\r\n{allowed}", api.at(PORT), api.at(PORT)))?;
    ensure!(told_caller(&answer) == ["URI=spiffe://mesh.internal/ns/default/sa/env"], "{answer}");

    // The password alone is not enough: it is the application's own user who asks.
    let mut other = one.command("setpriv");
    other.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--", "curl", "-sS", "--max-time", "5"]);
    other.args(["--proxy", &format!("http://{url}"), "http://api/"]);
    ensure!(!other.output()?.status.success(), "another user of the host is served");

    let round = |bytes: &[u8]| one.inside(|| ask((one.address(), 8601).into(), bytes));
    let looped = round(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")?;
    // The reason is in its text: to the first proxy this is an application's answer.
    ensure!(looped.starts_with("HTTP/1.1 508") && looped.contains("sheer: loop;"), "{looped}");
    let looped = round(b"\x00\x01bytes")?;
    ensure!(looped.is_empty(), "{looped}");
    for program in rings {
        let proxy = Processes::of(program.pid())?.proxy;
        let recorder = Recorder::answer(TcpListener::bind("127.0.0.1:0")?)?;
        rests(&Victim { name: "ring", host: &one, program, proxy, recorder })?;
    }
    api.is_well()
}

fn told_caller(answer: &str) -> Vec<&str> {
    told(answer, "x-forwarded-client-cert")
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().fold(0u32, |sum, byte| sum << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for place in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * place) & 63) as usize];
            text.push(if place <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

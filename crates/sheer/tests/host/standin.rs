//! A proxy that decides nothing: it takes its plan and its sockets as the real one does, and tells on each connection
//! what it knows of it. The supervisor starts this test program with the argument `__proxy`, which the test harness takes
//! for the name of a test; that test is the stand-in.

use sheer_proxy::capture::netns::SocketSource;
use sheer_proxy::plan::{FromSupervisor, Plan, Role, ToSupervisor};
use sheer_proxy::platform::{adopt, original_destination};
use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UdpSocket, UnixStream};

/// What every name resolves to.
pub(crate) const VIRTUAL: [u8; 4] = [240, 0, 0, 9];

#[test]
fn __proxy() {
    let Some(number) = std::env::var("SHEER_PLAN_FD").ok().and_then(|text| text.parse().ok()) else { return };
    let mut text = String::new();
    std::io::Read::read_to_string(&mut File::from(adopt(number).unwrap()), &mut text).unwrap();
    let plan: Plan = serde_json::from_str(&text).unwrap();
    if let Some(place) = std::env::var_os("STANDIN_PLAN") {
        File::create(place).unwrap().write_all(text.as_bytes()).unwrap();
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, serve(plan));
}

async fn serve(plan: Plan) {
    let source = plan.namespace_sockets.map(|number| SocketSource::new(adopt(number).unwrap()).attach().unwrap());
    let source = Arc::new(source);
    for listener in plan.listeners {
        let socket = adopt(listener.fd).unwrap();
        match listener.role {
            Role::Admin => drop(socket),
            Role::DnsUdp => drop(tokio::task::spawn_local(names(socket))),
            Role::DnsTcp => {}
            role => drop(tokio::task::spawn_local(accept(socket, role, source.clone()))),
        }
    }
    let link = std::os::unix::net::UnixStream::from(adopt(plan.supervisor.unwrap()).unwrap());
    link.set_nonblocking(true).unwrap();
    let (read, mut write) = UnixStream::from_std(link).unwrap().into_split();
    let mut say = async |message: ToSupervisor| {
        let mut line = serde_json::to_vec(&message).unwrap();
        line.push(b'\n');
        write.write_all(&line).await.unwrap();
    };
    match std::env::var("STANDIN_FAILS") {
        Ok(message) => say(ToSupervisor::Failed { message }).await,
        Err(_) => say(ToSupervisor::Ready).await,
    }
    let mut lines = BufReader::new(read).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let message: FromSupervisor = serde_json::from_str(&line).unwrap();
        // Not by a macro: the harness keeps what those print.
        let mut plain = std::io::stderr();
        writeln!(plain, "stand-in: {message:?}").unwrap();
        if !matches!(message, FromSupervisor::Refused { .. }) {
            say(ToSupervisor::Drained).await;
        }
    }
}

async fn accept(socket: OwnedFd, role: Role, source: Arc<Option<sheer_proxy::capture::netns::AttachedSource>>) {
    let listener = TcpListener::from_std(std::net::TcpListener::from(socket)).unwrap();
    loop {
        let (mut stream, peer) = listener.accept().await.unwrap();
        let (role, source) = (role.clone(), source.clone());
        tokio::task::spawn_local(async move {
            if let Role::Publish { port } = role {
                let address = SocketAddr::from(([127, 0, 0, 1], port));
                let mut upstream = match source.as_ref() {
                    Some(source) => source.connect(address).await?,
                    None => TcpStream::connect(address).await?,
                };
                tokio::io::copy_bidirectional(&mut stream, &mut upstream).await?;
                return Ok::<_, std::io::Error>(());
            }
            let mut request = vec![0; 4096];
            let length = stream.read(&mut request).await?;
            let request = String::from_utf8_lossy(&request[..length]);
            let login = request.to_ascii_lowercase().contains("proxy-authorization: basic ");
            let to = original_destination(&stream).map_or("none".into(), |to| to.to_string());
            let kind = match role {
                Role::Outbound => "outbound".into(),
                Role::Inbound => "inbound".into(),
                Role::Upstream { service, port } => format!("upstream {}/{}:{port}", service.namespace, service.name),
                Role::Forward => format!("forward login={login}"),
                Role::Metrics => "metrics".into(),
                _ => "other".into(),
            };
            let body = format!("{kind} to={to} from={} pid={}\n", peer.ip(), std::process::id());
            let head = format!("HTTP/1.0 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
            stream.write_all((head + &body).as_bytes()).await?;
            stream.shutdown().await
        });
    }
}

/// Answers every query of an IPv4 address with [`VIRTUAL`], others with nothing.
async fn names(socket: OwnedFd) {
    let socket = UdpSocket::from_std(std::net::UdpSocket::from(socket)).unwrap();
    let mut query = [0; 1024];
    loop {
        let (length, peer) = socket.recv_from(&mut query).await.unwrap();
        let name = query[12..length].iter().position(|byte| *byte == 0).unwrap() + 13;
        let v4 = query[name..name + 2] == [0, 1];
        let mut answer = query[..2].to_vec();
        answer.extend([0x81, 0x80, 0, 1, 0, u8::from(v4), 0, 0, 0, 0]);
        answer.extend(&query[12..name + 4]);
        if v4 {
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4]);
            answer.extend(VIRTUAL);
        }
        socket.send_to(&answer, peer).await.unwrap();
    }
}

/// What a command that knows sd_notify does; started like the stand-in, as a test of this name.
#[test]
fn __notifies() {
    if let (Some(_), Some(path)) = (std::env::var_os("STANDIN_NOTIFIES"), std::env::var_os("NOTIFY_SOCKET")) {
        let socket = std::os::unix::net::UnixDatagram::unbound().unwrap();
        socket.send_to(b"READY=1\nMAINPID=4711\nSTATUS=serving", path).unwrap();
    }
}

//! F12: an application dies in the middle of its answer. F11: what may have been processed is not sent again.

use crate::site::{DOOR, Ground, METRICS, beside, caller, listen, metrics, value};
use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use sheer_testmesh::faults::{row, times};
use sheer_testmesh::mesh::PATIENCE;
use sheer_testmesh::net::Host;
use sheer_testmesh::wait;
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What the application sends before it dies, by the path that is asked for; then whether the caller may be answered by
/// the mesh instead, because no head came.
const DEATHS: [(&str, &str, bool); 8] = [
    ("/length", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n0123456789", false),
    ("/length-nothing", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", false),
    ("/chunked", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", false),
    ("/in-a-chunk", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nhello", false),
    ("/before-trailers", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx-sum: 1", false),
    ("/head", "HTTP/1.1 200 OK\r\nContent-Le", true),
    ("/status", "HTTP/1.1 2", true),
    ("/nothing", "", true),
];

/// Ends where the connection does: a proper end is its end, a reset is none.
const UNTIL_CLOSE: &str = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello";

#[test]
fn a_death_in_the_middle_of_an_answer_is_never_a_clean_end() -> Result<()> {
    let done = "applications that die in the middle of an answer, by FIN and by RST: content-length, chunked, until close, \
                HTTP/2, gRPC";
    row("F12", done, "a reset or a short body, never a clean end; gRPC UNAVAILABLE; counted as failures", die())
}

fn die() -> Result<String> {
    let ground = Ground::new()?;
    let (host, control) = (&ground.near, ground.control()?);
    let http1 = listen(host, 8080)?;
    let http2 = listen(host, 8081)?;
    std::thread::spawn(move || {
        http1.incoming().flatten().for_each(|stream| die_over_http1(stream).unwrap_or_default())
    });
    std::thread::spawn(move || {
        http2.incoming().flatten().for_each(|stream| die_over_http2(stream).unwrap_or_default())
    });
    let _one = beside(&control, host, &ground.home("one")?, "one", "one-1", "8080/http")?;
    let _two = beside(&control, host, &ground.home("two")?, "two", "two-1", "8081/http2")?;
    let _caller = caller(&control, host, &ground.home("caller")?, &["one:80", "two:8081"])?;
    control.serves("one", 1)?;
    control.serves("two", 1)?;
    wait::until("the caller knows the services", PATIENCE, || {
        let (head, _) = get(host, "/well")?;
        ensure!(head.starts_with("HTTP/1.1 200"), "{head}");
        Ok(())
    })?;
    let failed = || -> Result<f64> {
        Ok(value(&metrics(host, METRICS)?, "sheer_requests_total", &["reason=\"response-truncated\""]))
    };
    let before = failed()?;
    let mut cases = 0;
    for (path, sent, may_be_answered) in DEATHS {
        for end in ["fin", "rst"] {
            let (answer, ended) = get(host, &format!("{path}-{end}"))?;
            cases += 1;
            if may_be_answered {
                ensure!(answer.starts_with("HTTP/1.1 502"), "after {sent:?} and {end}: {answer:?}");
                continue;
            }
            ensure!(!is_whole(&answer), "{path}, {end}: taken for whole: {answer:?} ({ended:?})");
        }
    }
    let (answer, ended) = get(host, "/until-close-fin")?;
    ensure!(is_whole(&answer) || (ended.is_ok() && answer.ends_with("hello")), "a proper end is one: {answer:?}");
    let (answer, ended) = get(host, "/until-close-rst")?;
    ensure!(ended.is_err() || (answer.contains("chunked") && !is_whole(&answer)), "a reset became an end: {answer:?}");
    // The head alone may have been taken for the beginning of any answer.
    wait::until("all are counted", PATIENCE, || {
        let counted = failed()? - before;
        ensure!(counted >= 11.0, "{counted} of 11 are counted as failures");
        Ok(())
    })?;
    let grpc = over_http2(host)?;
    Ok(format!("{} cases over HTTP/1, none taken for whole, all counted; HTTP/2 reset; gRPC status {grpc}", cases + 1))
}

fn die_over_http1(mut stream: TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut asked = Vec::new();
    while !asked.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        asked.push(byte[0]);
    }
    let asked = String::from_utf8(asked)?;
    let path = asked.split(' ').nth(1).context("no path")?;
    let sent = match path.rsplit_once('-') {
        Some((path, _)) => DEATHS.iter().find(|it| it.0 == path).map_or(UNTIL_CLOSE, |it| it.1),
        None => "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    };
    stream.write_all(sent.as_bytes())?;
    if path.ends_with("-rst") {
        // What was sent is read before the reset overtakes it.
        std::thread::sleep(Duration::from_millis(50));
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    }
    Ok(())
}

/// What came, and how it ended.
fn get(host: &Host, path: &str) -> Result<(String, std::io::Result<()>)> {
    host.inside(|| {
        let mut stream = TcpStream::connect(DOOR)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: one\r\n\r\n")?;
        let (mut answer, mut buffer) = (Vec::new(), [0; 4096]);
        let ended = loop {
            match stream.read(&mut buffer) {
                Ok(0) => break Ok(()),
                Ok(count) => answer.extend_from_slice(&buffer[..count]),
                Err(error) => break Err(error),
            }
            if is_whole(&String::from_utf8_lossy(&answer)) {
                break Ok(());
            }
        };
        if let Err(error) = &ended {
            ensure!(error.kind() == std::io::ErrorKind::ConnectionReset, "{path}: {error}: the client waits for ever");
        }
        Ok((String::from_utf8_lossy(&answer).into_owned(), ended))
    })
}

/// Whether a client would take this for a whole answer.
fn is_whole(answer: &str) -> bool {
    let Some((head, body)) = answer.split_once("\r\n\r\n") else { return false };
    let head = head.to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok());
    match length {
        Some(length) => body.len() >= length,
        None => head.contains("transfer-encoding: chunked") && body.ends_with("0\r\n\r\n"),
    }
}

/// Answers each request with a head and some bytes, and dies.
fn die_over_http2(stream: TcpStream) -> Result<()> {
    stream.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut connection = h2::server::handshake(tokio::net::TcpStream::from_std(stream)?).await?;
        if let Some(accepted) = connection.accept().await {
            let (request, mut respond) = accepted?;
            let grpc = request.headers().get("content-type").cloned();
            let mut response = http::Response::builder().status(200);
            if let Some(kind) = grpc {
                response = response.header("content-type", kind);
            }
            let mut sending = respond.send_response(response.body(())?, false)?;
            sending.send_data(Bytes::from_static(b"\0\0\0\0\x05hello"), false)?;
            // Long enough to write what is queued.
            let _ = tokio::time::timeout(Duration::from_millis(100), connection.accept()).await;
        }
        Ok(())
    })
}

/// A request and a gRPC call; the status of the second.
fn over_http2(host: &Host) -> Result<String> {
    let stream = host.inside(|| {
        let stream = TcpStream::connect("127.0.0.1:9001")?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    })?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (client, connection) = h2::client::handshake(tokio::net::TcpStream::from_std(stream)?).await?;
        tokio::spawn(connection);
        let ask = async |kind: &str| -> Result<(h2::RecvStream, usize, Option<h2::Error>)> {
            let request = http::Request::post("http://two/x.Y/Z").header("content-type", kind).header("te", "trailers");
            let (response, _) = client.clone().ready().await?.send_request(request.body(())?, true)?;
            let mut body = response.await?.into_body();
            let mut received = 0;
            while let Some(data) = body.data().await {
                match data {
                    Ok(data) => {
                        received += data.len();
                        body.flow_control().release_capacity(data.len())?;
                    }
                    Err(error) => return Ok((body, received, Some(error))),
                }
            }
            Ok((body, received, None))
        };
        let limited = async |kind: &str| tokio::time::timeout(PATIENCE, ask(kind)).await.context("no end")?;
        let (_, received, error) = limited("text/plain").await?;
        ensure!(error.is_some(), "a clean end after {received} bytes");
        let (mut body, received, error) = limited("application/grpc").await?;
        ensure!(error.is_none(), "gRPC: {error:?} after {received} bytes instead of a status");
        let trailers = body.trailers().await?.context("no trailers")?;
        let status = trailers.get("grpc-status").context("no status")?.to_str()?.to_owned();
        ensure!(status == "14", "grpc-status {status}");
        Ok(status)
    })
}

/// Requests that reached an application, by their number.
type Seen = Arc<Mutex<HashMap<String, usize>>>;

#[test]
fn what_may_have_been_processed_is_not_sent_again() -> Result<()> {
    let number = times(200, 2000);
    let done =
        format!("{number} POSTs and GETs to two instances that read each request and drop every other one unanswered");
    row("F11", &done, "no request reaches an application twice; the caller is told of each", resend(number))
}

fn resend(number: usize) -> Result<String> {
    let ground = Ground::new()?;
    let (host, far, control) = (&ground.near, ground.net.host("far")?, ground.control()?);
    let seen = Seen::default();
    for at in [host, &far] {
        let listener = listen(at, 8080)?;
        let seen = seen.clone();
        std::thread::spawn(move || drop_every_other(&listener, &seen));
    }
    let _near = beside(&control, host, &ground.home("near")?, "web", "web-1", "8080/http")?;
    let _far = beside(&control, &far, &ground.home("far")?, "web", "web-2", "8080/http")?;
    let _caller = caller(&control, host, &ground.home("caller")?, &["web:80"])?;
    control.serves("web", 2)?;
    let ask = |method: &str, id: &str| -> Result<u16> {
        host.inside(|| {
            let mut stream = TcpStream::connect(DOOR.parse::<SocketAddr>()?)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let body = if method == "POST" { "Content-Length: 2\r\n\r\nhi" } else { "\r\n" };
            write!(stream, "{method} /{id} HTTP/1.1\r\nHost: web\r\nConnection: close\r\n{body}")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer.split(' ').nth(1).context("no answer")?.parse()?)
        })
    };
    wait::until("it is served", PATIENCE, || match ask("GET", "first")? {
        200 | 502 => Ok(()),
        other => bail!("{other}"),
    })?;
    let mut answers: HashMap<u16, usize> = HashMap::new();
    for index in 0..number {
        for method in ["POST", "GET"] {
            *answers.entry(ask(method, &format!("{method}-{index}"))?).or_default() += 1;
        }
    }
    let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    let twice: Vec<_> = seen.iter().filter(|(id, count)| **count > 1 && id.contains("POST")).collect();
    ensure!(twice.is_empty(), "sent again: {twice:?}");
    let lost = (0..number).filter(|index| !seen.contains_key(&format!("/POST-{index}"))).count();
    ensure!(lost == 0, "{lost} POSTs reached nobody; answers: {answers:?}");
    let (good, bad) = (answers.get(&200).copied().unwrap_or(0), answers.get(&502).copied().unwrap_or(0));
    ensure!(good + bad == 2 * number && bad > 0, "{answers:?}");
    let again = seen.iter().filter(|(id, count)| **count > 1 && id.contains("GET")).count();
    Ok(format!(
        "{number} POSTs, each seen once; {good} answered, {bad} told 502; {again} GETs over stale connections repeated"
    ))
}

/// Keeps connections, as servers do, and closes every other one after the request was read.
fn drop_every_other(listener: &TcpListener, seen: &Seen) {
    let turn = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for stream in listener.incoming().flatten() {
            let turn = &turn;
            scope.spawn(move || -> Result<()> {
                let mut stream = stream;
                stream.set_read_timeout(Some(PATIENCE))?;
                loop {
                    let mut asked = Vec::new();
                    while !asked.ends_with(b"\r\n\r\n") {
                        let mut byte = [0];
                        stream.read_exact(&mut byte)?;
                        asked.push(byte[0]);
                    }
                    let asked = String::from_utf8(asked)?;
                    if asked.starts_with("POST") {
                        stream.read_exact(&mut [0; 2])?;
                    }
                    let id = asked.split(' ').nth(1).context("no path")?.to_owned();
                    *seen.lock().unwrap_or_else(PoisonError::into_inner).entry(id).or_default() += 1;
                    if turn.fetch_add(1, Relaxed) % 2 == 1 {
                        return Ok(());
                    }
                    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")?;
                }
            });
        }
    });
}

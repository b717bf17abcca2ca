use super::*;
use bytes::Bytes;
use http::Method;
use sheer_core::head::{ResponseHead, Version};
use std::cell::RefCell;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

#[derive(Default)]
struct Home(RefCell<Vec<Connection>>);

impl Return for Home {
    fn give_back(&self, connection: Connection) {
        self.0.borrow_mut().push(connection);
    }
}

#[derive(Default)]
struct Heard(RefCell<Vec<u16>>);

impl crate::body::InterimSink for Heard {
    fn send(&self, head: ResponseHead) {
        self.0.borrow_mut().push(head.status.as_u16());
    }
}

fn get() -> RequestHead {
    RequestHead::new(Method::GET, Version::Http11, "web", "/a")
}

async fn collect(mut body: Body) -> Result<Vec<u8>, BodyError> {
    let mut all = Vec::new();
    while let Some(frame) = body.frame().await {
        if let Frame::Data(bytes) = frame? {
            all.extend_from_slice(&bytes);
        }
    }
    Ok(all)
}

/// Sends a request to an endpoint that says these bytes; with its verdict, what it read, and what came home.
async fn ask(head: &RequestHead, body: Body, says: &[u8], closes: bool) -> (Result<Vec<u8>, String>, usize) {
    let (mut endpoint, io) = duplex(1 << 20);
    let home = Rc::new(Home::default());
    let interim = Interim::default();
    let asking = async {
        let response = Connection::new(Io::from(io)).send(head, body, &interim, Some(home.clone())).await;
        match response {
            Ok(response) => collect(response.body).await.map_err(|error| error.to_string()),
            Err(error) => Err(error.cause.to_string()),
        }
    };
    let script = async {
        endpoint.write_all(says).await.unwrap();
        let kept = (!closes).then_some(endpoint);
        tokio::task::yield_now().await;
        kept
    };
    let (answer, _kept) = tokio::join!(asking, script);
    let count = home.0.borrow().len();
    (answer, count)
}

#[tokio::test]
async fn answers_are_read_and_connections_come_home_when_they_can_serve_again() {
    let cases: &[(&str, Result<&str, &str>, usize)] = &[
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", Ok("abc"), 1),
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcHTTP/1.1 200 OK\r\n", Ok("abc"), 0),
        ("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc", Ok("abc"), 0),
        ("HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc", Ok("abc"), 0),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", Ok("abc"), 1),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n", Ok("abc"), 1),
        ("HTTP/1.1 204 No Content\r\n\r\n", Ok(""), 1),
        ("HTTP/1.1 204 No Content\r\n\r\nbody", Ok(""), 0),
        ("HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", Ok(""), 1),
        ("HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", Ok(""), 1),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\n0\r\n\r\n",
            Err("malformed body: no CR LF after a chunk"),
            0,
        ),
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc", Err("bad-response"), 0),
        ("HTTP/1.1 101 Switching Protocols\r\nUpgrade: a\r\n\r\n", Err("bad-response"), 0),
        ("SSH-2.0-OpenSSH_9.2\r\n", Err("bad-response"), 0),
    ];
    for (says, expected, homes) in cases {
        let (answer, count) = ask(&get(), Body::Empty, says.as_bytes(), false).await;
        let answer = answer.map(|bytes| String::from_utf8(bytes).unwrap());
        assert_eq!(answer.as_deref().map_err(String::as_str), *expected, "{says:?}");
        assert_eq!(count, *homes, "{says:?}");
    }
}

#[tokio::test]
async fn an_end_is_told_from_a_break() {
    let cases: &[(&str, Result<&str, &str>)] = &[
        ("HTTP/1.1 200 OK\r\n\r\nabc", Ok("abc")),
        ("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc", Err("the sender closed before the end of the body")),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
            Err("the sender closed before the end of the body"),
        ),
        ("HTTP/1.1 200 OK\r\nContent-Le", Err("bad-response")),
        ("", Err("upstream-reset")),
    ];
    for (says, expected) in cases {
        let (answer, count) = ask(&get(), Body::Empty, says.as_bytes(), true).await;
        let answer = answer.map(|bytes| String::from_utf8(bytes).unwrap());
        assert_eq!(answer.as_deref().map_err(String::as_str), *expected, "{says:?}");
        assert_eq!(count, 0);
    }
}

#[tokio::test]
async fn interim_answers_are_passed_on_and_bounded() {
    let (mut endpoint, io) = duplex(1 << 16);
    let heard = Rc::new(Heard::default());
    let interim = Interim::to(heard.clone());
    endpoint.write_all(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    let response = Connection::new(Io::from(io)).send(&get(), Body::Empty, &interim, None).await.unwrap();
    assert_eq!(response.head.status, StatusCode::OK);
    assert_eq!(*heard.0.borrow(), [100, 103]);

    let (answer, _) = ask(&get(), Body::Empty, "HTTP/1.1 102 Processing\r\n\r\n".repeat(33).as_bytes(), false).await;
    assert_eq!(answer, Err("bad-response".to_owned()));
}

/// Reads a request head and `length` more bytes.
async fn hear(endpoint: &mut DuplexStream, length: usize) -> String {
    let mut heard = Vec::new();
    let mut end = None;
    while end.is_none_or(|end| heard.len() < end + length) {
        assert!(endpoint.read_buf(&mut heard).await.unwrap() > 0, "{:?}", String::from_utf8_lossy(&heard));
        end = heard.windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 4);
    }
    String::from_utf8(heard).unwrap()
}

#[tokio::test]
async fn heads_say_how_the_body_follows() {
    let cases: &[(Method, Option<&str>, Body, &str)] = &[
        (Method::GET, None, Body::Empty, "GET /a HTTP/1.1\r\nHost: web\r\n\r\n"),
        (Method::POST, None, Body::Empty, "POST /a HTTP/1.1\r\nHost: web\r\nContent-Length: 0\r\n\r\n"),
        (Method::POST, Some("0"), Body::Empty, "POST /a HTTP/1.1\r\nHost: web\r\ncontent-length: 0\r\n\r\n"),
        (Method::GET, Some("7"), Body::Empty, "GET /a HTTP/1.1\r\nHost: web\r\n\r\n"),
        (
            Method::PUT,
            Some("7"),
            Body::Full(Bytes::from_static(b"abc")),
            "PUT /a HTTP/1.1\r\nHost: web\r\nContent-Length: 3\r\n\r\nabc",
        ),
        (
            Method::PUT,
            Some("3"),
            Body::Full(Bytes::from_static(b"abc")),
            "PUT /a HTTP/1.1\r\nHost: web\r\ncontent-length: 3\r\n\r\nabc",
        ),
    ];
    for (method, length, body, expected) in cases {
        let mut head = RequestHead::new(method.clone(), Version::Http11, "web", "/a");
        if let Some(length) = length {
            head.fields.append("content-length", length.as_bytes()).unwrap();
        }
        let body = match body {
            Body::Full(bytes) => Body::Full(bytes.clone()),
            _ => Body::Empty,
        };
        let (mut endpoint, io) = duplex(1024);
        let interim = Interim::default();
        let mut sending = std::pin::pin!(Connection::new(Io::from(io)).send(&head, body, &interim, None));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(std::future::Future::poll(sending.as_mut(), &mut cx).is_pending());
        let heard = hear(&mut endpoint, 0).await;
        assert_eq!(heard, *expected);
    }
}

#[tokio::test]
async fn a_stale_connection_is_told_from_a_failed_request() {
    let (mut endpoint, io) = duplex(1024);
    let home = Rc::new(Home::default());
    let interim = Interim::default();
    let head = get();
    endpoint.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    Connection::new(Io::from(io)).send(&head, Body::Empty, &interim, Some(home.clone())).await.unwrap();
    let mut connection = home.0.borrow_mut().pop().unwrap();
    assert!(connection.is_idle_and_open() && !connection.is_fresh());
    drop(endpoint);
    assert!(!connection.is_idle_and_open());
    let error = connection.send(&head, Body::Empty, &interim, None).await.unwrap_err();
    assert!(error.stale && error.body.is_some() && error.sent == Sent::Nothing, "{error:?}");

    let (mut endpoint, io) = duplex(1024);
    let closing = async {
        hear(&mut endpoint, 0).await;
        drop(endpoint);
    };
    let (error, ()) = tokio::join!(Connection::new(Io::from(io)).send(&head, Body::Empty, &interim, None), closing);
    let error = error.unwrap_err();
    assert!(!error.stale && error.sent == Sent::Some && error.cause == Cause::UpstreamReset, "{error:?}");
}

#[tokio::test]
async fn what_an_idle_endpoint_says_unasked_ends_its_connection() {
    let (mut endpoint, io) = duplex(1024);
    let mut connection = Connection::new(Io::from(io));
    assert!(connection.is_idle_and_open());
    endpoint.write_all(b"HTTP/1.1 408 Request Timeout\r\n\r\n").await.unwrap();
    assert!(!connection.is_idle_and_open());
}

#[tokio::test]
async fn a_switched_connection_is_handed_over_with_what_was_read() {
    let (mut endpoint, io) = duplex(1024);
    let mut head = get();
    head.fields.append("upgrade", b"websocket").unwrap();
    endpoint
        .write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nraw")
        .await
        .unwrap();
    let interim = Interim::default();
    let response = Connection::new(Io::from(io)).send(&head, Body::Empty, &interim, None).await.unwrap();
    assert_eq!(response.head.fields.get(Known::Upgrade), Some(&b"websocket"[..]));
    let upgraded = response.body.into_upgraded().unwrap();
    assert_eq!(&upgraded.read[..], b"raw");
    assert!(hear(&mut endpoint, 0).await.ends_with("upgrade: websocket\r\nConnection: Upgrade\r\n\r\n"));
}

//! Properties of the codec as a whole: how bytes were cut on their way changes nothing, and what is forwarded is read by
//! the next hop as what was decided on here.

use super::client::{Connection, SendFailure};
use super::server::{ConnError, Options, Outcome, serve};
use crate::body::{Body, BodyError, Frame, Interim, Request, Response};
use crate::io::Io;
use bytes::{Bytes, BytesMut};
use http::{Method, StatusCode};
use proptest::collection::vec;
use proptest::prelude::*;
use sheer_core::head::{Fields, Known, RequestHead, ResponseHead, Version};
use std::cell::RefCell;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

/// Larger than any message here, so that no writer waits.
const PIPE: usize = 1 << 20;

/// A message as it was understood.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Message {
    /// Method, target and authority, or the status.
    first: Vec<String>,
    /// Without `Content-Length`, which a hop may add and drop.
    fields: Vec<(Bytes, Bytes)>,
    body: Bytes,
    trailers: Vec<(Bytes, Bytes)>,
}

/// The messages of a connection, and how it ended.
type Understood = (Vec<Message>, String);

fn list(fields: &Fields) -> Vec<(Bytes, Bytes)> {
    let copy = |(name, value, known): (&[u8], &[u8], Known)| {
        (known != Known::ContentLength).then(|| (Bytes::copy_from_slice(name), Bytes::copy_from_slice(value)))
    };
    fields.iter().filter_map(copy).collect()
}

async fn whole(mut body: Body) -> Result<(Bytes, Vec<(Bytes, Bytes)>), BodyError> {
    let (mut all, mut trailers) = (BytesMut::new(), Vec::new());
    while let Some(frame) = body.frame().await {
        match frame? {
            Frame::Data(bytes) => all.extend_from_slice(&bytes),
            Frame::Trailers(fields) => trailers = list(&fields),
        }
    }
    Ok((all.freeze(), trailers))
}

fn told(error: &BodyError) -> String {
    match error {
        BodyError::Malformed(why) => format!("refused: {why}"),
        _ => "broken off".to_owned(),
    }
}

/// The parts of the input between the cuts.
fn parts<'a>(input: &'a [u8], cuts: &[usize]) -> Vec<&'a [u8]> {
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (input.len() + 1)).collect();
    cuts.sort_unstable();
    let mut start = 0;
    let mut parts = Vec::new();
    for cut in cuts {
        parts.push(&input[start..cut]);
        start = cut;
    }
    parts.push(&input[start..]);
    parts
}

/// Writes the parts so that each is read before the next is there.
async fn write(stream: &mut DuplexStream, parts: &[&[u8]]) {
    for part in parts.iter().filter(|part| !part.is_empty()) {
        if stream.write_all(part).await.is_err() {
            return;
        }
        tokio::task::yield_now().await;
    }
}

/// Writes the parts, waits for so many answers, and ends: who closes its side before has left.
async fn talk(stream: &mut DuplexStream, parts: &[&[u8]], answers: usize) {
    write(stream, parts).await;
    let mut heard = Vec::new();
    while heard.windows(13).filter(|it| it == b"HTTP/1.1 204 ").count() < answers {
        if stream.read_buf(&mut heard).await.unwrap_or(0) == 0 {
            return;
        }
    }
    let _ = stream.shutdown().await;
    let _ = stream.read_to_end(&mut heard).await;
}

/// Serves a connection and writes down what its requests are.
async fn serve_and_record(io: DuplexStream) -> Understood {
    let (read, broken) = (RefCell::new(Vec::new()), RefCell::new(None));
    let service = async |request: Request| -> Outcome<()> {
        let Request { head, body, .. } = request;
        match whole(body).await {
            Ok((body, trailers)) => {
                let first =
                    vec![head.method.to_string(), head.target().to_owned(), head.authority().to_ascii_lowercase()];
                read.borrow_mut().push(Message { first, fields: list(&head.fields), body, trailers });
                Outcome::Response(Response { head: ResponseHead::new(StatusCode::NO_CONTENT), body: Body::Empty })
            }
            Err(error) => {
                *broken.borrow_mut() = Some(told(&error));
                Outcome::Close
            }
        }
    };
    let options = Options::default();
    let served = serve(Io::from(io), BytesMut::new(), &options, std::future::pending(), service).await;
    let end = match (broken.take(), served) {
        (Some(why), _) => why,
        (None, Err(ConnError::Refused(refusal))) => format!("refused: {} {}", refusal.status, refusal.detail),
        (None, Err(_)) => "broken off".to_owned(),
        (None, Ok(_)) => "clean".to_owned(),
    };
    (read.take(), end)
}

/// What the codec understands of a client's bytes.
async fn requests(parts: &[&[u8]]) -> Understood {
    let (mut client, server) = duplex(PIPE);
    let script = talk(&mut client, parts, 0);
    tokio::join!(serve_and_record(server), script).0
}

/// What the next hop understands of so many of them.
async fn forwarded_requests(parts: &[&[u8]], count: usize) -> Vec<Message> {
    let (mut client, server) = duplex(PIPE);
    let understood = RefCell::new(Vec::new());
    let service = async |request: Request| -> Outcome<()> {
        let Request { head, body, interim } = request;
        let (near, far) = duplex(PIPE);
        let sending = async {
            // The response's body holds the connection: it goes when all is sent.
            match Connection::new(Io::from(near)).send(&head, body, &interim, None).await {
                Ok(Response { body, .. }) => whole(body).await.is_ok(),
                Err(_) => false,
            }
        };
        let ((messages, _), sent) = tokio::join!(serve_and_record(far), sending);
        understood.borrow_mut().extend(messages);
        match sent {
            true => Outcome::Response(Response { head: ResponseHead::new(StatusCode::NO_CONTENT), body: Body::Empty }),
            false => Outcome::Close,
        }
    };
    let script = talk(&mut client, parts, count);
    let options = Options::default();
    let serving = serve(Io::from(server), BytesMut::new(), &options, std::future::pending(), service);
    let (_, ()) = tokio::join!(serving, script);
    understood.take()
}

async fn ask(io: DuplexStream) -> Understood {
    let head = RequestHead::new(Method::GET, Version::Http11, "web", "/");
    match Connection::new(Io::from(io)).send(&head, Body::Empty, &Interim::default(), None).await {
        Ok(Response { head, body }) => match whole(body).await {
            Ok((body, trailers)) => {
                let first = vec![head.status.to_string()];
                (vec![Message { first, fields: list(&head.fields), body, trailers }], "clean".into())
            }
            Err(error) => (vec![], told(&error)),
        },
        Err(error) => match error.source {
            SendFailure::Response(refusal) => (vec![], format!("refused: {}", refusal.detail)),
            _ => (vec![], "broken off".into()),
        },
    }
}

/// What the codec understands of an endpoint's bytes.
async fn response(parts: &[&[u8]]) -> Understood {
    let (mut endpoint, near) = duplex(PIPE);
    let script = talk(&mut endpoint, parts, 0);
    tokio::join!(ask(near), script).0
}

/// What the hop before understands of them.
async fn forwarded_response(parts: &[&[u8]]) -> Understood {
    let (client, server) = duplex(PIPE);
    let service = async |request: Request| -> Outcome<()> {
        let (mut endpoint, near) = duplex(PIPE);
        let Request { head, body, interim } = request;
        let script = async {
            write(&mut endpoint, parts).await;
            let _ = endpoint.shutdown().await;
        };
        let connection = Connection::new(Io::from(near));
        match tokio::join!(connection.send(&head, body, &interim, None), script).0 {
            Ok(response) => Outcome::Response(response),
            Err(_) => Outcome::Close,
        }
    };
    let options = Options::default();
    let serving = serve(Io::from(server), BytesMut::new(), &options, std::future::pending(), service);
    tokio::join!(ask(client), serving).0
}

fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(Duration::from_secs(10), test).await.expect("an end") })
}

/// Field lines, framing and body of a message.
fn message() -> impl Strategy<Value = Vec<u8>> {
    let field = prop_oneof![
        "X-[A-Za-z0-9-]{1,8}:[ ]{0,2}([!-~]([ -~]{0,12}[!-~])?)?",
        Just("Cookie: a=b; c".to_owned()),
        Just("TE: trailers".to_owned()),
        Just("Connection: x-gone, keep-alive\r\nX-Gone: 1".to_owned()),
        Just("x_odd: 1".to_owned()),
    ];
    let body = vec(any::<u8>(), 0..60);
    let trailer = prop_oneof![Just("X-Sum: 1"), Just("grpc-status: 0"), Just("Host: other"), Just("x-sheer-peer: a")];
    let chunked = (vec(vec(any::<u8>(), 1..30), 0..5), vec(trailer, 0..3), any::<bool>());
    let framed = prop_oneof![
        Just((String::new(), Vec::new())),
        body.prop_map(|body| (format!("Content-Length: {}\r\n", body.len()), body)),
        chunked.prop_map(|(chunks, trailers, extended)| {
            let mut out = Vec::new();
            for chunk in &chunks {
                let extension = if extended { ";a=\"b\"" } else { "" };
                out.extend_from_slice(format!("{:x}{extension}\r\n", chunk.len()).as_bytes());
                out.extend_from_slice(chunk);
                out.extend_from_slice(b"\r\n");
            }
            out.extend_from_slice(b"0\r\n");
            for trailer in trailers {
                out.extend_from_slice(trailer.as_bytes());
                out.extend_from_slice(b"\r\n");
            }
            out.extend_from_slice(b"\r\n");
            ("Transfer-Encoding: chunked\r\n".to_owned(), out)
        }),
    ];
    (vec(field, 0..5), framed).prop_map(|(fields, (framing, body))| {
        let lines: String = fields.iter().map(|field| format!("{field}\r\n")).collect();
        [lines.as_bytes(), framing.as_bytes(), b"\r\n", &body].concat()
    })
}

fn request() -> impl Strategy<Value = Vec<u8>> {
    let target = prop_oneof!["/[!-~&&[^#]]{0,20}", Just("http://web/a?b".to_owned()), Just("http://WEB".to_owned())];
    let method = prop_oneof![Just("GET"), Just("POST"), Just("PUT"), Just("DELETE"), Just("OPTIONS"), Just("X-METHOD")];
    (method, target, message()).prop_map(|(method, target, message)| {
        [format!("{method} {target} HTTP/1.1\r\nHost: web\r\n").as_bytes(), &message].concat()
    })
}

fn answer() -> impl Strategy<Value = Vec<u8>> {
    let interim = prop_oneof![Just(""), Just("HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n")];
    (interim, 200u16..600, message()).prop_map(|(interim, status, message)| {
        [interim.as_bytes(), format!("HTTP/1.1 {status} Any\r\n").as_bytes(), &message].concat()
    })
}

/// Something wrong, somewhere.
fn damaged(whole: impl Strategy<Value = Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let splinter = prop_oneof![
        Just(&b"\r\n"[..]),
        Just(&b"\n"[..]),
        Just(&b"\r"[..]),
        Just(&b" "[..]),
        Just(&b"\0"[..]),
        Just(&b":"[..]),
        Just(&b"Content-Length: 3\r\n"[..]),
        Just(&b"\r\nTransfer-Encoding: chunked"[..]),
        Just(&b""[..]),
    ];
    (whole, any::<prop::sample::Index>(), splinter, 0..3usize).prop_map(|(mut whole, at, splinter, gone)| {
        let at = at.index(whole.len() + 1);
        let end = (at + gone).min(whole.len());
        whole.splice(at..end, splinter.iter().copied());
        whole
    })
}

fn any_of_both(strategy: impl Strategy<Value = Vec<u8>> + Clone + 'static) -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![strategy.clone(), damaged(strategy)]
}

proptest! {
    /// However requests are cut on their way, and whether they are good or bad, the same is understood.
    #[test]
    fn requests_are_the_same_in_any_parts(
        messages in vec(any_of_both(request().boxed()), 1..4), cuts in vec(any::<usize>(), 0..12)
    ) {
        let input = messages.concat();
        let whole = run(requests(&[&input]));
        prop_assert_eq!(&run(requests(&parts(&input, &cuts))), &whole);
        prop_assert_eq!(&run(requests(&input.chunks(1).collect::<Vec<_>>())), &whole);
    }

    /// What is forwarded is understood by the next hop as what was decided on.
    #[test]
    fn forwarded_requests_are_the_same(
        messages in vec(any_of_both(request().boxed()), 1..4), cuts in vec(any::<usize>(), 0..6)
    ) {
        let input = messages.concat();
        let (decided, _) = run(requests(&[&input]));
        prop_assert_eq!(run(forwarded_requests(&parts(&input, &cuts), decided.len())), decided);
    }

    #[test]
    fn responses_are_the_same_in_any_parts(
        input in any_of_both(answer().boxed()), cuts in vec(any::<usize>(), 0..12)
    ) {
        let whole = run(response(&[&input]));
        prop_assert_eq!(&run(response(&parts(&input, &cuts))), &whole);
        prop_assert_eq!(&run(response(&input.chunks(1).collect::<Vec<_>>())), &whole);
    }

    #[test]
    fn forwarded_responses_are_the_same(input in any_of_both(answer().boxed()), cuts in vec(any::<usize>(), 0..6)) {
        let (decided, _) = run(response(&[&input]));
        prop_assert_eq!(run(forwarded_response(&parts(&input, &cuts))).0, decided);
    }
}

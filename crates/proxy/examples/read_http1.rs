//! What the HTTP/1 codec makes of messages, for comparisons with other parsers (`scripts/differential`).
//!
//! Reads records from the standard input: a byte `Q` (requests) or `P` (a response to GET), the length as four bytes, most
//! significant first, and so many bytes. For each it writes a line of JSON: the messages that were read as a whole, and
//! how the bytes ended: `clean`, `refused: why`, or `partial`.

use bytes::{Bytes, BytesMut};
use http::{Method, StatusCode};
use serde_json::{Value, json};
use sheer_core::head::{Fields, RequestHead, ResponseHead, Version};
use sheer_proxy::body::{Body, BodyError, Frame, Interim, Request, Response};
use sheer_proxy::h1::client::{Connection, SendFailure};
use sheer_proxy::h1::server::{ConnError, Options, Outcome, serve};
use sheer_proxy::io::Io;
use std::cell::RefCell;
use std::io::{Read, Write};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

/// Larger than any message, so that nothing waits for a reader.
const PIPE: usize = 1 << 20;

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::io::Result<()> {
    let (mut input, mut output) = (std::io::stdin().lock(), std::io::BufWriter::new(std::io::stdout().lock()));
    let mut head = [0; 5];
    while input.read_exact(&mut head).is_ok() {
        let mut message = vec![0; u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize];
        input.read_exact(&mut message)?;
        let read = tokio::task::LocalSet::new()
            .run_until(async { if head[0] == b'Q' { requests(&message).await } else { response(&message).await } })
            .await;
        writeln!(output, "{read}")?;
    }
    output.flush()
}

async fn requests(message: &[u8]) -> Value {
    let (mut client, server) = duplex(PIPE);
    client.write_all(message).await.expect("room in the pipe");
    client.shutdown().await.expect("an open pipe");
    let (read, broken) = (RefCell::new(Vec::new()), RefCell::new(None));
    let service = async |request: Request| -> Outcome<()> {
        let Request { head, body, .. } = request;
        match whole(body).await {
            Ok((body, trailers)) => {
                read.borrow_mut().push(json!({
                    "method": head.method.as_str(), "target": head.target(), "authority": head.authority(),
                    "version": if head.version == Version::Http10 { "1.0" } else { "1.1" },
                    "fields": fields(&head.fields), "body": latin(&body), "trailers": trailers,
                }));
                Outcome::Response(Response { head: ResponseHead::new(StatusCode::NO_CONTENT), body: Body::Empty })
            }
            Err(error) => {
                *broken.borrow_mut() = Some(told(&error));
                Outcome::Close
            }
        }
    };
    let answers = async {
        let _ = client.read_to_end(&mut Vec::new()).await;
    };
    let options = Options::default();
    let serving = serve(Io::from(server), BytesMut::new(), &options, std::future::pending::<()>(), service);
    let (served, ()) = tokio::join!(serving, answers);
    let end = match (broken.take(), served) {
        (Some(why), _) => why,
        (None, Err(ConnError::Refused(refusal))) => format!("refused: {}", refusal.detail),
        (None, Err(_)) => "partial".to_owned(),
        (None, Ok(_)) => "clean".to_owned(),
    };
    json!({ "read": read.take(), "end": end })
}

async fn response(message: &[u8]) -> Value {
    let (mut endpoint, near) = duplex(PIPE);
    endpoint.write_all(message).await.expect("room in the pipe");
    endpoint.shutdown().await.expect("an open pipe");
    let head = RequestHead::new(Method::GET, Version::Http11, "web", "/");
    let sent = Connection::new(Io::from(near)).send(&head, Body::Empty, &Interim::default(), None).await;
    let (read, end) = match sent {
        Ok(Response { head, body }) => match whole(body).await {
            Ok((body, trailers)) => {
                let read = json!({
                    "status": head.status.as_u16(), "fields": fields(&head.fields), "body": latin(&body), "trailers": trailers,
                });
                (vec![read], "clean".to_owned())
            }
            Err(error) => (vec![], told(&error)),
        },
        Err(error) => match error.source {
            SendFailure::Response(refusal) => (vec![], format!("refused: {}", refusal.detail)),
            _ => (vec![], "partial".to_owned()),
        },
    };
    json!({ "read": read, "end": end })
}

async fn whole(mut body: Body) -> Result<(Bytes, Vec<(String, String)>), BodyError> {
    let (mut all, mut trailers) = (BytesMut::new(), Vec::new());
    while let Some(frame) = body.frame().await {
        match frame? {
            Frame::Data(bytes) => all.extend_from_slice(&bytes),
            Frame::Trailers(found) => trailers = fields(&found),
        }
    }
    Ok((all.freeze(), trailers))
}

fn told(error: &BodyError) -> String {
    match error {
        BodyError::Malformed(why) => format!("refused: {why}"),
        _ => "partial".to_owned(),
    }
}

fn fields(fields: &Fields) -> Vec<(String, String)> {
    fields.iter().map(|(name, value, _)| (latin(name).to_ascii_lowercase(), latin(value))).collect()
}

/// Each byte a character.
fn latin(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| char::from(*byte)).collect()
}

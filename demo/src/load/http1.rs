//! Requests over HTTP/1.1, one at a time on each connection.

use super::Context;
use super::tally::Outcome;
use crate::server::SEQUENCE;
use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1};
use hyper_util::rt::TokioIo;
use std::future::Future;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::AbortHandle;

type Body = Full<Bytes>;

/// How often a request that was never written goes to yet another connection.
pub(super) const NEVER_WRITTEN: usize = 5;

/// How long one that hangs up waits for an answer to begin; the request is surely written by then.
pub(super) const HANG_UP_AFTER: Duration = Duration::from_millis(30);

/// One connection after another, one request at a time.
pub(super) async fn requests(context: Context, index: usize, mut stopped: watch::Receiver<bool>) {
    let mut pace = context.pace(index);
    let mut sequence = first_sequence(index);
    let mut link: Option<Link> = None;
    while pace.next(&mut stopped).await {
        sequence += 1;
        let sent = context.tally.sent();
        let outcome = match request(&context, sequence, &context.load.path) {
            Ok(request) => {
                let request = request.map(|()| Full::new(context.load.body.clone()));
                within(&context, exchange(&context, &mut link, request, sequence)).await
            }
            Err(outcome) => outcome,
        };
        if outcome == Outcome::Late {
            link = None;
        }
        sent.end(outcome);
    }
}

/// Sequences of different connections never meet.
pub(super) fn first_sequence(index: usize) -> u64 {
    (index as u64) << 40
}

/// Waits for an outcome as long as the plan allows.
pub(super) async fn within(context: &Context, work: impl Future<Output = Outcome>) -> Outcome {
    tokio::time::timeout(context.patience, work).await.unwrap_or(Outcome::Late)
}

/// A request of the load without its body.
pub(super) fn request(context: &Context, sequence: u64, target: &str) -> Result<Request<()>, Outcome> {
    let load = &context.load;
    let mut request = Request::builder()
        .method(if load.body.is_empty() { Method::GET } else { Method::POST })
        .uri(target)
        .header(SEQUENCE, sequence);
    if target.starts_with('/') {
        request = request.header("host", &load.authority);
    }
    for (name, value) in &load.headers {
        request = request.header(name, value);
    }
    request.body(()).map_err(|error| Outcome::Reset(error.to_string()))
}

/// An HTTP/1.1 connection; dropping it closes it at once.
struct Link {
    sender: http1::SendRequest<Body>,
    driver: AbortHandle,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Link {
    async fn open(context: &Context) -> Result<Self, Outcome> {
        let stream = connect(context).await?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        Ok(Self { sender, driver: tokio::spawn(connection.with_upgrades()).abort_handle() })
    }
}

/// A connection to the load's address.
pub(super) async fn connect(context: &Context) -> Result<TcpStream, Outcome> {
    let stream = TcpStream::connect(&context.load.address)
        .await
        .map_err(|error| Outcome::Connect(format!("{}: {error}", context.load.address)))?;
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

async fn exchange(context: &Context, link: &mut Option<Link>, mut request: Request<Body>, sequence: u64) -> Outcome {
    for _ in 0..NEVER_WRITTEN {
        let mut current = match kept(link).await {
            Some(kept) => kept,
            None => match Link::open(context).await {
                Ok(new) => new,
                Err(outcome) => return outcome,
            },
        };
        let answer = current.sender.try_send_request(request);
        let answer = if context.hangs_up() {
            match tokio::time::timeout(HANG_UP_AFTER, answer).await {
                // The head is here and its body is left unread, or nothing is here yet.
                Ok(Ok(_)) | Err(_) => return Outcome::HungUp,
                Ok(Err(error)) => Err(error),
            }
        } else {
            answer.await
        };
        match answer {
            Ok(response) => {
                let outcome = judge(context, response, sequence).await;
                if matches!(outcome, Outcome::Ok | Outcome::Status(_)) {
                    *link = Some(current);
                }
                return outcome;
            }
            Err(error) => match unsent(error) {
                Ok(again) => request = again,
                Err(outcome) => return outcome,
            },
        }
    }
    never_written()
}

/// The kept connection, when it can still take a request.
async fn kept(link: &mut Option<Link>) -> Option<Link> {
    let mut kept = link.take()?;
    kept.sender.ready().await.is_ok().then_some(kept)
}

/// The request, when not a byte of it was written.
fn unsent(mut error: TrySendError<Request<Body>>) -> Result<Request<Body>, Outcome> {
    error.take_message().ok_or_else(|| broken(error.into_error()))
}

/// What a request is that found [`NEVER_WRITTEN`] connections closed.
pub(super) fn never_written() -> Outcome {
    Outcome::Reset(format!("{NEVER_WRITTEN} connections in a row were closed before a byte was written"))
}

/// Reads the whole answer and says what it was.
async fn judge(context: &Context, response: Response<Incoming>, sequence: u64) -> Outcome {
    let (head, mut body) = response.into_parts();
    while let Some(frame) = body.frame().await {
        if let Err(error) = frame {
            context.tally.answered(head.status.as_str(), version(&head.headers));
            return Outcome::Short(chain(&error));
        }
    }
    judge_head(context, &Response::from_parts(head, ()), sequence)
}

/// The version that answered.
pub(super) fn version(headers: &HeaderMap) -> Option<&str> {
    headers.get("x-version").and_then(|version| version.to_str().ok())
}

/// Says what an answer was whose body is read.
pub(super) fn judge_head(context: &Context, head: &Response<()>, sequence: u64) -> Outcome {
    let (status, headers) = (head.status(), head.headers());
    context.tally.answered(status.as_str(), version(headers));
    if !status.is_success() {
        return Outcome::Status(format!("{status}{}", reasons(headers)));
    }
    match headers.get(SEQUENCE) {
        Some(returned) if returned.as_bytes() != sequence.to_string().as_bytes() => {
            Outcome::Reordered(format!("sent request {sequence}, got the answer to {returned:?}"))
        }
        _ => Outcome::Ok,
    }
}

/// Header fields that say why, whoever wrote them.
pub(super) fn reasons(headers: &HeaderMap) -> String {
    let reasons = headers.iter().filter(|(name, _)| name.as_str().ends_with("-reason"));
    reasons.map(|(name, value)| format!("; {name}: {}", String::from_utf8_lossy(value.as_bytes()))).collect()
}

fn broken(error: hyper::Error) -> Outcome {
    Outcome::Reset(chain(&error))
}

/// An error and its causes in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

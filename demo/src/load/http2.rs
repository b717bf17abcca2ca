//! Requests over HTTP/2, side by side on a shared connection.
//!
//! The `h2` crate is used directly, since it tells a request that was never written from one that was cut off.

use super::Context;
use super::http1::{self, chain, first_sequence, judge_head, within};
use super::tally::Outcome;
use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use http::{Request, Response};
use std::future::{Future, poll_fn};
use std::sync::Arc;
use tokio::sync::{Mutex, Semaphore, watch};
use tokio::task::JoinSet;

/// Requests side by side on one connection; more wait. Servers commonly allow 100 to 250.
const SIDE_BY_SIDE: usize = 100;

/// Requests, side by side.
pub(super) async fn requests(context: Context, index: usize, stopped: watch::Receiver<bool>) {
    side_by_side(context, index, stopped, async |context, shared, sequence| {
        request(&context, &shared, sequence).await.unwrap_or_else(|outcome| outcome)
    })
    .await;
}

/// Calls `one` at the load's pace, up to [`SIDE_BY_SIDE`] at a time, with a connection that they share.
pub(super) async fn side_by_side<F, R>(context: Context, index: usize, mut stopped: watch::Receiver<bool>, one: F)
where
    F: Fn(Context, Arc<Shared>, u64) -> R + Clone + Send + Sync + 'static,
    R: Future<Output = Outcome> + Send + 'static,
{
    let mut pace = context.pace(index);
    let mut sequence = first_sequence(index);
    let shared = Arc::new(Shared { sender: Mutex::new(None) });
    let slots = Arc::new(Semaphore::new(SIDE_BY_SIDE));
    let mut requests = JoinSet::new();
    while pace.next(&mut stopped).await {
        while requests.try_join_next().is_some() {}
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        sequence += 1;
        let (one, context, shared) = (one.clone(), context.clone(), shared.clone());
        requests.spawn(async move {
            let sent = context.tally.sent();
            let work = async {
                for _ in 0..http1::NEVER_WRITTEN {
                    match one(context.clone(), shared.clone(), sequence).await {
                        Outcome::Unprocessed => context.tally.resent(),
                        outcome => return outcome,
                    }
                }
                Outcome::Unprocessed
            };
            sent.end(within(&context, work).await);
            drop(slot);
        });
    }
    while requests.join_next().await.is_some() {}
}

async fn request(context: &Context, shared: &Shared, sequence: u64) -> Result<Outcome, Outcome> {
    let target = format!("http://{}{}", context.load.authority, context.load.path);
    let (parts, ()) = http1::request(context, sequence, &target)?.into_parts();
    let body = context.load.body.clone();
    let request = Request::from_parts(parts, ());
    let (response, stream) = shared.send(context, request, body.is_empty()).await?;
    if context.hangs_up() {
        // Dropping both cancels the stream; the request is surely written by then.
        let _ = tokio::time::timeout(http1::HANG_UP_AFTER, response).await;
        return Ok(Outcome::HungUp);
    }
    let upload = async {
        if !body.is_empty() {
            send_all(stream, body).await;
        }
    };
    let (outcome, ()) = tokio::join!(judge(context, response, sequence), upload);
    outcome
}

/// Sends a whole body as the peer lets it. An error shows in the answer as well.
async fn send_all(mut stream: SendStream<Bytes>, mut body: Bytes) {
    while !body.is_empty() {
        stream.reserve_capacity(body.len());
        let Some(Ok(capacity)) = poll_fn(|cx| stream.poll_capacity(cx)).await else { return };
        let piece = body.split_to(capacity.min(body.len()));
        if stream.send_data(piece, body.is_empty()).is_err() {
            return;
        }
    }
}

async fn judge(context: &Context, response: ResponseFuture, sequence: u64) -> Result<Outcome, Outcome> {
    let (head, body) = response.await.map_err(broken)?.into_parts();
    let mut body = Incoming { body };
    while body.data().await?.is_some() {}
    Ok(judge_head(context, &Response::from_parts(head, ()), sequence))
}

/// The body of an answer, read without holding the peer back.
pub(super) struct Incoming {
    pub(super) body: RecvStream,
}

impl Incoming {
    /// More of the body; `None` at its end.
    pub(super) async fn data(&mut self) -> Result<Option<Bytes>, Outcome> {
        match self.body.data().await {
            None => Ok(None),
            Some(Ok(data)) => {
                // Fails only when the stream is over, which the next read tells.
                let _ = self.body.flow_control().release_capacity(data.len());
                Ok(Some(data))
            }
            Some(Err(error)) => Err(Outcome::Short(chain(&error))),
        }
    }
}

/// The connection of the moment.
pub(super) struct Shared {
    sender: Mutex<Option<SendRequest<Bytes>>>,
}

impl Shared {
    /// Sends a request once, on the connection there is or on a new one.
    pub(super) async fn send(
        &self,
        context: &Context,
        request: Request<()>,
        ends: bool,
    ) -> Result<(ResponseFuture, SendStream<Bytes>), Outcome> {
        for _ in 0..http1::NEVER_WRITTEN {
            // An error from `send_request` itself means that the connection takes no more and nothing was written.
            if let Ok(sent) = self.sender(context).await?.send_request(request.clone(), ends) {
                return Ok(sent);
            }
        }
        Err(http1::never_written())
    }

    async fn sender(&self, context: &Context) -> Result<SendRequest<Bytes>, Outcome> {
        let mut current = self.sender.lock().await;
        if let Some(sender) = current.take()
            && let Ok(ready) = sender.ready().await
        {
            return Ok(current.insert(ready).clone());
        }
        let stream = http1::connect(context).await?;
        let (sender, connection) = h2::client::Builder::new()
            .initial_window_size(1 << 20)
            .initial_connection_window_size(4 << 20)
            .handshake(stream)
            .await
            .map_err(broken)?;
        // It ends when the last sender and stream are gone.
        tokio::spawn(connection);
        Ok(current.insert(sender).clone())
    }
}

/// An error before an answer. A server that goes away in order names the last request it takes; those after it were not
/// processed (RFC 9113, section 6.8).
pub(super) fn broken(error: h2::Error) -> Outcome {
    if error.is_go_away() && error.is_remote() && error.reason() == Some(h2::Reason::NO_ERROR) {
        return Outcome::Unprocessed;
    }
    Outcome::Reset(chain(&error))
}

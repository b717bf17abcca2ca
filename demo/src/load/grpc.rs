//! gRPC calls, spoken by hand so that trailers, lengths and order are seen as they are.

use super::Context;
use super::http1::{HANG_UP_AFTER, chain, reasons, version};
use super::http2::{Incoming, Shared, broken, side_by_side};
use super::tally::Outcome;
use crate::pricing::wire::{Item, Price};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use h2::SendStream;
use h2::client::ResponseFuture;
use http::{HeaderMap, Method, Request, StatusCode};
use prost::Message as _;
use tokio::sync::watch;

/// Unary calls, side by side.
pub(super) async fn unary(context: Context, index: usize, stopped: watch::Receiver<bool>) {
    side_by_side(context, index, stopped, async |context, shared, sequence| {
        quote(&context, &shared, sequence).await.unwrap_or_else(|outcome| outcome)
    })
    .await;
}

/// Streams in both directions, side by side.
pub(super) async fn stream(context: Context, index: usize, stopped: watch::Receiver<bool>) {
    side_by_side(context, index, stopped, async |context, shared, sequence| {
        haggle(&context, &shared, sequence).await.unwrap_or_else(|outcome| outcome)
    })
    .await;
}

async fn quote(context: &Context, shared: &Shared, sequence: u64) -> Result<Outcome, Outcome> {
    let (response, mut stream) = call(context, shared, "/shop.v1.Pricing/Quote").await?;
    // An error means that the stream is over; its answer says why.
    let _ = stream.send_data(encode(sequence), true);
    if context.hangs_up() {
        let _ = tokio::time::timeout(HANG_UP_AFTER, response).await;
        return Ok(Outcome::HungUp);
    }
    let mut answer = Answer::begin(context, response).await?;
    let price = answer.message().await?;
    answer.end().await?;
    Ok(in_order(price, sequence))
}

async fn haggle(context: &Context, shared: &Shared, sequence: u64) -> Result<Outcome, Outcome> {
    let (response, mut stream) = call(context, shared, "/shop.v1.Pricing/Haggle").await?;
    let mut answer = Answer::begin(context, response).await?;
    let hangs_up = context.hangs_up();
    for message in 0..context.load.messages {
        if message > 0 {
            tokio::time::sleep(context.load.message_interval).await;
        }
        let number = sequence.wrapping_add(message);
        if stream.send_data(encode(number), false).is_err() {
            // The stream is over; its status says why.
            answer.end().await?;
            return Err(Outcome::Short(format!("the stream ended before message {message}")));
        }
        let price = answer.message().await?;
        if hangs_up && message >= context.load.messages / 2 {
            return Ok(Outcome::HungUp);
        }
        match in_order(price, number) {
            Outcome::Ok => (),
            other => return Ok(other),
        }
    }
    stream.send_data(Bytes::new(), true).map_err(broken)?;
    answer.end().await?;
    Ok(Outcome::Ok)
}

fn in_order(price: Option<Price>, sequence: u64) -> Outcome {
    match price {
        Some(price) if price.sequence == sequence => Outcome::Ok,
        Some(price) => Outcome::Reordered(format!("sent {sequence}, got the answer to {}", price.sequence)),
        None => Outcome::Short("status 0 without the message".to_owned()),
    }
}

fn encode(sequence: u64) -> Bytes {
    let item = Item { id: "net".to_owned(), sequence };
    let mut bytes = BytesMut::new();
    bytes.put_u8(0);
    bytes.put_u32(item.encoded_len() as u32);
    bytes.put_slice(&item.encode_to_vec());
    bytes.freeze()
}

async fn call(context: &Context, shared: &Shared, path: &str) -> Result<(ResponseFuture, SendStream<Bytes>), Outcome> {
    let mut request = Request::builder()
        .method(Method::POST)
        .uri(format!("http://{}{path}", context.load.authority))
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    for (name, value) in &context.load.headers {
        request = request.header(name, value);
    }
    let request = request.body(()).map_err(|error| Outcome::Reset(error.to_string()))?;
    shared.send(context, request, false).await
}

/// The answer of a call while it comes in.
struct Answer<'a> {
    context: &'a Context,
    version: Option<String>,
    body: Incoming,
    buffer: BytesMut,
    /// The status is in the head when there is nothing else, and in the trailers otherwise.
    status: Option<HeaderMap>,
}

impl<'a> Answer<'a> {
    async fn begin(context: &'a Context, response: ResponseFuture) -> Result<Self, Outcome> {
        let (head, body) = response.await.map_err(broken)?.into_parts();
        if head.status != StatusCode::OK {
            context.tally.answered(head.status.as_str(), None);
            return Err(Outcome::Status(format!("{}{}", head.status, reasons(&head.headers))));
        }
        let version = version(&head.headers).map(str::to_owned);
        let status = head.headers.contains_key("grpc-status").then_some(head.headers);
        Ok(Self { context, version, body: Incoming { body }, buffer: BytesMut::new(), status })
    }

    /// The next message; `None` when the answer ended with status 0.
    async fn message(&mut self) -> Result<Option<Price>, Outcome> {
        loop {
            if self.buffer.len() >= 5 {
                let length =
                    u32::from_be_bytes([self.buffer[1], self.buffer[2], self.buffer[3], self.buffer[4]]) as usize;
                if self.buffer.len() >= 5 + length {
                    self.buffer.advance(5);
                    let bytes = self.buffer.split_to(length);
                    let price = Price::decode(bytes).map_err(|error| Outcome::Short(error.to_string()))?;
                    return Ok(Some(price));
                }
            }
            if !self.more().await? {
                self.check()?;
                return Ok(None);
            }
        }
    }

    /// Reads to the end, which must be status 0.
    async fn end(&mut self) -> Result<(), Outcome> {
        while self.more().await? {}
        self.check()
    }

    async fn more(&mut self) -> Result<bool, Outcome> {
        if let Some(data) = self.body.data().await? {
            self.buffer.extend_from_slice(&data);
            return Ok(true);
        }
        if let Some(trailers) = self.body.body.trailers().await.map_err(|error| Outcome::Short(chain(&error)))? {
            self.status = Some(trailers);
        }
        Ok(false)
    }

    fn check(&self) -> Result<(), Outcome> {
        let Some(status) = &self.status else { return Err(Outcome::Short("no trailers".to_owned())) };
        let field = |name| status.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let code = field("grpc-status");
        self.context.tally.answered(&format!("grpc {code}"), self.version.as_deref());
        if code == "0" {
            return Ok(());
        }
        Err(Outcome::Status(format!("grpc-status {code}: {}{}", field("grpc-message"), reasons(status))))
    }
}

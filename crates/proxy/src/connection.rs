//! What both directions do with a client's connection that speaks HTTP: serve it, answer, and become a tunnel.

use crate::body::{Body, Request, Response};
use crate::drain;
use crate::error::{self, Audience, RequestError, Told};
use crate::h1::pace::Pace;
use crate::h1::{self, Upgraded, server::Ended, server::Outcome};
use crate::h2;
use crate::io::Io;
use crate::record::Record;
use crate::tcp;
use crate::worker::Worker;
use bytes::{Bytes, BytesMut};
use http::StatusCode;
use sheer_core::cause::Cause;
use sheer_core::head::{Known, RequestHead, Version};
use std::pin::pin;
use std::time::Duration;

/// How long idle HTTP/1 connections are kept after requests are refused: a client may have one under way, which closing
/// would lose. By then peers have been told for seconds that this workload is leaving.
const LAST_CALL: Duration = Duration::from_secs(1);

/// What a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spoken {
    /// HTTP/1.
    Http1,
    /// HTTP/2.
    Http2,
}

/// What a request is answered with.
#[derive(Debug)]
pub struct Answer {
    response: Response,
    /// Where the connection leads after a response that switches protocols.
    tunnel: Option<Box<Tunnel>>,
}

/// The other end of a connection that becomes a tunnel after a 101.
#[derive(Debug)]
pub struct Tunnel {
    upstream: Upgraded,
    record: Record,
}

impl Answer {
    /// What the HTTP/1 loop makes of it.
    pub fn into_outcome(self) -> Outcome<Tunnel> {
        match self.tunnel {
            Some(tunnel) => Outcome::Tunnel(self.response, *tunnel),
            None => Outcome::Response(self.response),
        }
    }

    /// The connection closes after it.
    pub fn close(&mut self) {
        // Codecs leave the field out where the protocol has none.
        let _ = self.response.head.fields.set(Known::Connection.as_str(), b"close");
    }

    /// Tells a mesh peer that this workload is leaving: it sends its next requests elsewhere.
    pub fn say_leaving(&mut self) {
        let _ = self.response.head.fields.set(Known::SheerDrain.as_str(), b"1");
        self.close();
    }
}

/// What an answer to a failed request says, taken from the request before it is sent on.
pub struct Caller {
    audience: Audience,
    grpc: bool,
    version: Version,
    id: String,
}

impl Caller {
    /// The caller of a request.
    pub fn of(head: &RequestHead, audience: Audience) -> Self {
        let id = head.fields.get(Known::RequestId).map(|id| String::from_utf8_lossy(id).into_owned());
        Self { audience, grpc: head.is_grpc(), version: head.version, id: id.unwrap_or_default() }
    }
}

/// The one place where errors become responses and records meet them.
pub fn answer(
    worker: &Worker,
    mut caller: Caller,
    mut record: Record,
    result: Result<Response, RequestError>,
) -> Answer {
    let response = match result {
        Ok(response) if response.head.status == StatusCode::SWITCHING_PROTOCOLS => {
            return switch(worker, caller, record, response);
        }
        Ok(response) => response,
        Err(error) => {
            record.failed(error.cause);
            if caller.id.is_empty() {
                caller.id = worker.new_id();
            }
            if let Some(line) = record.line() {
                line.id.clone_from(&caller.id);
                line.to = error.to;
                line.retries = error.tries.saturating_sub(1);
            }
            let told = Told {
                audience: caller.audience,
                at: &worker.at,
                id: &caller.id,
                grpc: caller.grpc,
                version: caller.version,
            };
            error::response(&error, &told)
        }
    };
    Answer { response: record.finish(response, caller.grpc && caller.version == Version::Http2), tunnel: None }
}

fn switch(worker: &Worker, caller: Caller, mut record: Record, response: Response) -> Answer {
    let Response { head, body } = response;
    match body.into_upgraded() {
        Ok(upstream) => {
            record.switched(head.status);
            Answer {
                response: Response { head, body: Body::Empty },
                tunnel: Some(Box::new(Tunnel { upstream, record })),
            }
        }
        Err(_) => answer(worker, caller, record, Err(Cause::BadResponse.into())),
    }
}

/// Serves a connection until it ends. `pace` is that of a client whom nobody knows. `unread` begins the account of a request that cannot be read.
pub async fn serve<S, U>(
    worker: &Worker,
    io: Io,
    prefix: BytesMut,
    spoken: Spoken,
    pace: Option<Pace>,
    unread: U,
    service: S,
) where
    S: AsyncFn(Request) -> Answer + 'static,
    U: Fn(Spoken) -> Record + 'static,
{
    match spoken {
        Spoken::Http1 => serve_http1(worker, io, prefix, pace, unread, service).await,
        Spoken::Http2 => {
            let service = async move |request| Some(service(request).await.response);
            let refused = move |cause: Cause| unread(Spoken::Http2).refused(cause.status(), cause);
            // Boxed, since it takes more than HTTP/1 does while it waits.
            let options = h2::server::Options { pace, idler: Some(worker.idlers.enter()) };
            let served = h2::server::serve(io, prefix, options, worker.drain(), refused, service);
            if let Err(error) = Box::pin(served).await {
                tracing::debug!(%error, "an HTTP/2 connection broke");
            }
        }
    }
}

async fn serve_http1<S, U>(worker: &Worker, io: Io, prefix: BytesMut, pace: Option<Pace>, unread: U, service: S)
where
    S: AsyncFn(Request) -> Answer,
    U: Fn(Spoken) -> Record,
{
    let mut drain = worker.drain();
    let stop = pin!(async move {
        drain.reached(drain::Phase::Refusing).await;
        tokio::time::sleep(LAST_CALL).await;
    });
    let options = h1::server::Options {
        pace,
        idler: Some(worker.idlers.enter()),
        clients: worker.proxy.clients.clone(),
        ..h1::server::Options::default()
    };
    let service = async |request| service(request).await.into_outcome();
    match h1::server::serve(io, prefix, &options, stop, service).await {
        Ok(Ended::Closed) => {}
        Ok(Ended::Tunnel(client, tunnel)) => Box::pin(carry(client, tunnel)).await,
        Err(error) => {
            if let Some(refusal) = error.refusal() {
                unread(Spoken::Http1).refused(refusal.status, refusal.cause);
            }
            tracing::debug!(%error, "an HTTP/1 connection ended");
        }
    }
}

/// Carries what a client and an endpoint say to each other once they have switched.
pub async fn carry(client: Upgraded, tunnel: Tunnel) {
    let Tunnel { upstream, mut record } = tunnel;
    let (mut near, mut far) = (client.io, upstream.io);
    let (read_near, read_far): (Bytes, Bytes) = (client.read.freeze(), upstream.read.freeze());
    let counts = tcp::Counts::default();
    // How a tunnel ends is the two sides' own affair; both have learned it.
    let _ = tcp::relay((&mut near, read_near), (&mut far, read_far), &counts).await;
    record.passed(&counts);
}

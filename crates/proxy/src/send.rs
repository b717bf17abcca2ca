//! Sending a request to one of several endpoints, and to another when it was provably not processed.

use crate::body::{Body, Interim, Request, Response};
use crate::error::RequestError;
use crate::h1::client::Sent;
use crate::io::Io;
use crate::record::Record;
use crate::upstream::dial::{DialError, Place};
use crate::upstream::endpoint::{InFlight, LiveEndpoint};
use crate::upstream::pool::Peer;
use crate::worker::Worker;
use bytes::Bytes;
use http::StatusCode;
use sheer_core::balance;
use sheer_core::cause::Cause;
use sheer_core::head::{Known, RequestHead, Version};
use sheer_core::identity::SpiffeId;
use sheer_core::retry::{MAX_TRIES, Progress, may_retry};
use sheer_core::snapshot::Hop;
use smallvec::SmallVec;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

/// A request on its way out.
pub(crate) struct Outgoing {
    pub(crate) head: RequestHead,
    pub(crate) body: Body,
    pub(crate) interim: Interim,
}

impl Outgoing {
    /// The request with its body counted.
    pub(crate) fn of(request: Request, record: &mut Record) -> Self {
        let Request { head, body, interim } = request;
        Self { head, body: record.meter(body), interim }
    }
}

/// A connection for bytes, what its server has said already, and its place at its endpoint.
pub(crate) type Opened = (Io, Bytes, InFlight);

/// An attempt without a response that can be passed on.
struct Failure {
    progress: Progress,
    cause: Cause,
    /// The body, when nothing of it was lost.
    body: Option<Body>,
    source: Option<Box<dyn std::error::Error>>,
}

impl From<DialError> for Failure {
    fn from(error: DialError) -> Self {
        let source = error.source.map(|source| Box::new(source) as _);
        Self { progress: Progress::Unsent, cause: error.cause, body: None, source }
    }
}

/// Sends to the endpoint that the balancer picks, and says how that one was dialled. What was not processed goes to
/// another one.
pub(crate) async fn to_one_of(
    worker: &Worker,
    endpoints: &[LiveEndpoint],
    identities: &Arc<[SpiffeId]>,
    outgoing: &mut Outgoing,
    record: &mut Record,
) -> Result<(Response, Hop), RequestError> {
    let Outgoing { head, body, interim } = outgoing;
    let mut avoided = SmallVec::<[usize; MAX_TRIES as usize]>::new();
    let mut last = RequestError::from(Cause::NoEndpoint);
    loop {
        let Some(place) = balance::pick(endpoints, |place| avoided.contains(&place), worker.random()) else {
            return Err(last);
        };
        let chosen = &endpoints[place];
        let tries = last.tries + 1;
        let in_flight = chosen.state.begin();
        let began = Instant::now();
        let spare = whole(body);
        let sent = std::mem::take(body);
        let peer = worker.pools.peer_at(chosen);
        let failure = match attempt(worker, peer, identities, head, sent, interim).await {
            Ok(response) => {
                let waited = began.elapsed();
                record.waited(waited);
                match accept(chosen, response, spare) {
                    Ok(response) => {
                        chosen.state.observe(waited);
                        if let Some(cause) = told(chosen, &response) {
                            record.failed(cause);
                        }
                        record.hold(in_flight);
                        if let Some(line) = record.line() {
                            line.to = Some(chosen.endpoint.address);
                            line.retries = tries - 1;
                        }
                        return Ok((response, chosen.endpoint.hop));
                    }
                    Err(declined) => declined,
                }
            }
            Err(failure) => failure,
        };
        note(worker, chosen, &failure);
        let is_its_fault =
            !matches!(failure.progress, Progress::StaleConnection) && failure.cause != Cause::UpstreamReset;
        if is_its_fault {
            avoided.push(place);
        }
        let Failure { progress, cause, body: intact, source } = failure;
        last = RequestError { source, ..RequestError::from(cause).at(chosen.endpoint.address, tries) };
        match intact {
            Some(intact) if may_retry(progress, &head.method, true, tries) => *body = intact,
            _ => return Err(last),
        }
    }
}

/// Takes the response, unless it says that the peer is leaving, or has no room, and has not processed the request.
fn accept(chosen: &LiveEndpoint, mut response: Response, spare: Option<Body>) -> Result<Response, Failure> {
    let fields = &mut response.head.fields;
    if chosen.endpoint.hop == Hop::None {
        fields.remove_known(&[Known::SheerReason]);
        return Ok(response);
    }
    if fields.get(Known::SheerDrain).is_some() {
        chosen.state.shun();
        fields.remove_known(&[Known::SheerDrain]);
    }
    let declined = match response.head.status {
        StatusCode::SERVICE_UNAVAILABLE => {
            reason(&response).filter(|it| matches!(it, Cause::Draining | Cause::Overloaded))
        }
        _ => None,
    };
    match (spare, declined) {
        (Some(body), Some(cause)) => {
            Err(Failure { progress: Progress::Declined, cause, body: Some(body), source: None })
        }
        _ => Ok(response),
    }
}

/// Why the proxy of the endpoint answered instead of its application, which cannot say this itself.
fn told(chosen: &LiveEndpoint, response: &Response) -> Option<Cause> {
    let may_be_failed = response.head.status.as_u16() >= 400 || response.head.fields.get(Known::GrpcStatus).is_some();
    if chosen.endpoint.hop == Hop::None || !may_be_failed {
        return None;
    }
    reason(response)
}

/// The cause that a mesh peer names.
fn reason(response: &Response) -> Option<Cause> {
    let reason = response.head.fields.get(Known::SheerReason)?;
    let name = reason.split(|byte| *byte == b';').next()?;
    Cause::parse(std::str::from_utf8(name).ok()?)
}

/// Remembers what a failure says about the endpoint.
fn note(worker: &Worker, chosen: &LiveEndpoint, failure: &Failure) {
    match failure.cause {
        Cause::ConnectTimeout => {
            chosen.state.shun_silent();
            worker.proxy.demand.unreachable(&chosen.endpoint.workload);
        }
        Cause::ConnectRefused | Cause::ConnectFailed => {
            chosen.state.shun();
            worker.proxy.demand.unreachable(&chosen.endpoint.workload);
        }
        Cause::IdentityMismatch
        | Cause::PeerUntrusted
        | Cause::PeerExpired
        | Cause::PeerNotYetValid
        | Cause::PeerNoWorkload
        | Cause::PeerAnonymous
        | Cause::IdentityRefused
        | Cause::TlsFailed
        | Cause::Draining
        | Cause::Overloaded
        | Cause::UpstreamReset => chosen.state.shun(),
        _ => {}
    }
}

/// Sends once, over a kept or a new connection.
async fn attempt(
    worker: &Worker,
    peer: Rc<Peer>,
    identities: &Arc<[SpiffeId]>,
    head: &mut RequestHead,
    body: Body,
    interim: &Interim,
) -> Result<Response, Failure> {
    if head.version == Version::Http2 {
        let connection = match worker.pools.http2(&peer, identities).await {
            Ok(connection) => connection,
            Err(error) => return Err(Failure { body: Some(body), ..Failure::from(error) }),
        };
        return connection.send(head, body, interim).await.map_err(|error| {
            let progress = if error.unprocessed { Progress::Declined } else { Progress::Unknown };
            let source = error.source.map(|source| Box::new(source) as _);
            Failure { progress, cause: error.cause, body: error.body, source }
        });
    }
    let connection = match worker.pools.http1(&peer, identities).await {
        Ok(connection) => connection,
        Err(error) => return Err(Failure { body: Some(body), ..Failure::from(error) }),
    };
    let spare = whole(&body);
    connection.send(head, body, interim, Some(peer)).await.map_err(|error| {
        let progress = match (error.sent, error.stale) {
            (Sent::Nothing, _) => Progress::Unsent,
            (Sent::Some, true) => Progress::StaleConnection,
            (Sent::Some, false) => Progress::Unknown,
        };
        let body = error.body.or(spare);
        Failure { progress, cause: error.cause, body, source: Some(Box::new(error.source)) }
    })
}

/// A second copy of a body that is here as a whole.
fn whole(body: &Body) -> Option<Body> {
    match body {
        Body::Empty => Some(Body::Empty),
        Body::Full(bytes) => Some(Body::Full(bytes.clone())),
        _ => None,
    }
}

/// Sends to an address that is not the mesh's.
pub(crate) async fn outside(
    worker: &Worker,
    address: SocketAddr,
    outgoing: &mut Outgoing,
    record: &mut Record,
) -> Result<Response, RequestError> {
    let mut response = to_address(worker, Place::External(address), outgoing, record).await?;
    response.head.fields.remove_known(&[Known::SheerReason]);
    Ok(response)
}

/// Sends to the one place there is; again only when a kept connection turned out to be closed.
pub(crate) async fn to_address(
    worker: &Worker,
    place: Place,
    outgoing: &mut Outgoing,
    record: &mut Record,
) -> Result<Response, RequestError> {
    let Outgoing { head, body, interim } = outgoing;
    let to = place.address();
    let peer = worker.pools.peer(&place);
    for tries in 1.. {
        let began = Instant::now();
        let body_now = std::mem::take(body);
        let sent = attempt(worker, peer.clone(), &worker.nobody, head, body_now, interim).await;
        record.waited(began.elapsed());
        let Failure { progress, cause, body: intact, source } = match sent {
            Ok(response) => return Ok(response),
            Err(failure) => failure,
        };
        let is_new = matches!(cause, Cause::ConnectRefused | Cause::ConnectTimeout | Cause::ConnectFailed);
        match intact {
            Some(intact) if !is_new && may_retry(progress, &head.method, true, tries) => *body = intact,
            _ => return Err(RequestError { source, ..RequestError::from(cause).at(to, tries) }),
        }
    }
    Err(Cause::ConnectFailed.into())
}

/// Opens a connection for bytes to the endpoint that the balancer picks, or to another when it is refused.
pub(crate) async fn connect_to_one_of(
    worker: &Worker,
    endpoints: &[LiveEndpoint],
    identities: &Arc<[SpiffeId]>,
) -> Result<Opened, RequestError> {
    let mut avoided = SmallVec::<[usize; MAX_TRIES as usize]>::new();
    let mut last = RequestError::from(Cause::NoEndpoint);
    while last.tries < MAX_TRIES {
        let Some(place) = balance::pick(endpoints, |place| avoided.contains(&place), worker.random()) else { break };
        let chosen = &endpoints[place];
        let in_flight = chosen.state.begin();
        let peer = worker.pools.peer_at(chosen);
        let failure = match worker.pools.tcp(&peer, identities).await {
            Ok(io) => {
                chosen.state.reached();
                return Ok((io, Bytes::new(), in_flight));
            }
            Err(error) => Failure::from(error),
        };
        note(worker, chosen, &failure);
        avoided.push(place);
        let Failure { cause, source, .. } = failure;
        last = RequestError { source, ..RequestError::from(cause).at(chosen.endpoint.address, last.tries + 1) };
    }
    Err(last)
}

/// Opens a connection for bytes to an address that is not the mesh's.
pub(crate) async fn connect_outside(worker: &Worker, address: SocketAddr) -> Result<Opened, RequestError> {
    let peer = worker.pools.peer(&Place::External(address));
    match worker.pools.tcp(&peer, &worker.nobody).await {
        Ok(io) => Ok((io, Bytes::new(), worker.outside.begin())),
        Err(error) => {
            let Failure { cause, source, .. } = Failure::from(error);
            Err(RequestError { source, ..RequestError::from(cause).at(address, 1) })
        }
    }
}

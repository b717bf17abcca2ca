//! Traffic leaving the workload.
//!
//! ```text
//! accept -> destination -> what is spoken -> [request: known -> route -> edits -> send, elsewhere if not processed]
//!                                         -> [bytes: connect, elsewhere if refused -> relay]
//! ```

mod detection;

use crate::body::{Request, Response};
use crate::connection::{self, Answer, Caller, Spoken};
use crate::error::{Audience, RequestError};
use crate::io::Io;
use crate::metrics::{Edge, Protocol};
use crate::plan::Mode;
use crate::platform::original_destination;
use crate::record::{ConnectionRecord, Line, Record};
use crate::send::{self, Opened};
use crate::tcp;
use crate::upstream::endpoint::{Live, LiveEndpoint};
use crate::worker::Worker;
use bytes::{Bytes, BytesMut};
use detection::Verdict;
use sheer_core::cause::Cause;
use sheer_core::head::{Fields, RequestHead, Version};
use sheer_core::name::ServiceName;
use sheer_core::route::{self, Edit, Rule};
use sheer_core::snapshot::{Hop, Service, ServicePort, Snapshot, Timeouts};
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;
use tokio::net::TcpStream;

/// What a connection's listener says of where it is going.
#[derive(Clone, Debug)]
pub enum Asked {
    /// To where it was going before it was captured.
    Original,
    /// To this service and port.
    Service(ServiceName, u16),
}

/// Where a connection leads.
#[derive(Clone, Debug)]
pub(crate) enum Destination {
    /// A port of a service.
    Service(Arc<Service>, ServicePort),
    /// One workload of the mesh, by its own address.
    Workload(ServiceName, Arc<Live>, LiveEndpoint),
    /// An address that is not the mesh's.
    External(SocketAddr),
    /// A port that the service does not have.
    NoPort(Arc<Service>),
    /// Nowhere, for this reason.
    Nowhere(Cause),
}

impl Destination {
    /// Why it leads nowhere, if it does.
    pub(crate) fn nowhere(&self) -> Option<Cause> {
        match self {
            Destination::Service(..) | Destination::Workload(..) | Destination::External(_) => None,
            Destination::NoPort(_) => Some(Cause::UnknownPort),
            Destination::Nowhere(cause) => Some(*cause),
        }
    }
}

/// Serves one connection of the workload.
pub async fn accept(worker: Rc<Worker>, stream: TcpStream, asked: Asked) {
    // Boxed here and below, since a connection is kept for long after both are over.
    let destination = Box::pin(destination(&worker, &stream, asked)).await;
    converse(worker, Io::Plain(stream), BytesMut::new(), destination).await;
}

/// Refuses a connection, in the client's own words where it speaks HTTP.
pub async fn refuse(worker: Rc<Worker>, stream: TcpStream, cause: Cause) {
    converse(worker, Io::Plain(stream), BytesMut::new(), Destination::Nowhere(cause)).await;
}

/// Serves a connection of which it is known where it leads, and some bytes may have been read.
pub(crate) async fn converse(worker: Rc<Worker>, mut io: Io, mut prefix: BytesMut, destination: Destination) {
    match Box::pin(detection::verdict(&worker, &destination, &mut io, &mut prefix)).await {
        Verdict::Http(spoken) => Box::pin(http(worker, io, prefix, spoken, destination)).await,
        Verdict::Bytes(opened) => Box::pin(bytes(&worker, io, prefix.freeze(), &destination, opened)).await,
        Verdict::Gone => {}
    }
}

/// The service at a virtual address, the workload at its own, or the world outside.
async fn destination(worker: &Worker, stream: &TcpStream, asked: Asked) -> Destination {
    let snapshot = worker.snapshot();
    let address = match asked {
        Asked::Service(name, port) => return of_service(snapshot.service(&name), port),
        Asked::Original => match original_destination(stream) {
            Some(address) => SocketAddr::new(address.ip().to_canonical(), address.port()),
            None => return Destination::Nowhere(Cause::DestinationForbidden),
        },
    };
    of_address(worker, &snapshot, address).await
}

async fn of_address(worker: &Worker, snapshot: &Snapshot, address: SocketAddr) -> Destination {
    if let Some(service) = snapshot.service_at(address.ip()) {
        return of_service(Some(service), address.port());
    }
    if snapshot.is_unassigned_virtual(address.ip()) {
        return Destination::Nowhere(Cause::UnknownDestination);
    }
    let is_own_host = address.ip().is_loopback() || address.ip().is_unspecified();
    if is_own_host && !worker.proxy.plan.host_ports.contains(&address.port()) {
        return Destination::Nowhere(Cause::DestinationForbidden);
    }
    if worker.proxy.plan.mode != Mode::Watch {
        let mut found = worker.proxy.endpoints.at(address);
        if found.is_none() && !is_own_host && is_news(worker, address.ip()).await {
            found = worker.proxy.endpoints.at(address);
        }
        if let Some((service, live, endpoint)) = found {
            return Destination::Workload(service, live, endpoint);
        }
    }
    match snapshot.mesh().deny_unknown_egress {
        true => Destination::Nowhere(Cause::UnknownDestination),
        false => Destination::External(address),
    }
}

/// Whether it has just become known who of the mesh is at an address. While there is no control plane nobody can tell,
/// and the world outside must not wait for it.
async fn is_news(worker: &Worker, address: IpAddr) -> bool {
    let proxy = &worker.proxy;
    if proxy.endpoints.knows_address(address) || !proxy.metrics.control_connected() {
        return false;
    }
    Box::pin(proxy.demand.who_is_at(address)).await.is_ok()
}

/// Where a host and port lead that a caller named: to a service, or outside where that is allowed, but never to this
/// host's own addresses.
pub(crate) async fn named(worker: &Worker, host: &str, port: u16) -> Destination {
    let snapshot = worker.snapshot();
    if let Some(service) = snapshot.service_named(host) {
        return of_service(Some(service), port);
    }
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let found = match bare.parse::<IpAddr>() {
        Ok(address) => Some(SocketAddr::new(address, port)),
        Err(_) if snapshot.mesh().deny_unknown_egress => None,
        // The host's own resolver, in a thread of its own.
        Err(_) => tokio::net::lookup_host((bare, port)).await.ok().and_then(|mut found| found.next()),
    };
    match found {
        Some(address) if is_link_local(address.ip()) => Destination::Nowhere(Cause::DestinationForbidden),
        Some(address) => of_address(worker, &snapshot, SocketAddr::new(address.ip().to_canonical(), port)).await,
        None => Destination::Nowhere(Cause::UnknownDestination),
    }
}

/// Where hosts keep services for themselves, such as a cloud's metadata.
fn is_link_local(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

fn of_service(service: Option<&Arc<Service>>, port: u16) -> Destination {
    match service.map(|service| (service, service.port(port))) {
        Some((service, Some(port))) => Destination::Service(service.clone(), port),
        Some((service, None)) => Destination::NoPort(service.clone()),
        None => Destination::Nowhere(Cause::UnknownDestination),
    }
}

/// Serves the requests of one connection.
async fn http(worker: Rc<Worker>, io: Io, prefix: BytesMut, spoken: Spoken, destination: Destination) {
    let own = worker.clone();
    let service = async move |request| serve(&own, &destination, request).await;
    let own = worker.clone();
    let unread = move |spoken| unread(&own, spoken);
    connection::serve(&worker, io, prefix, spoken, None, unread, service).await;
}

/// Begins the account of a request that cannot be read.
pub(crate) fn unread(worker: &Worker, spoken: Spoken) -> Record {
    let line =
        worker.line(|| Line { destination: "unknown".into(), ..Line::unread("outbound", &worker.source, spoken) });
    Record::begin(worker.unknown_edge(), line)
}

/// Serves one request leaving the workload. The stages run in this order.
pub(crate) async fn serve(worker: &Worker, destination: &Destination, request: Request) -> Answer {
    let (caller, mut record, mut outgoing) = begin(worker, request);
    let result = forward(worker, destination, &mut outgoing, &mut record).await;
    let mut answer = connection::answer(worker, caller, record, result);
    if worker.is_replaced() {
        // The workload's next connection is the next proxy's.
        answer.close();
    }
    answer
}

/// Apart from [`serve`], whose future would hold what is borrowed here to its end.
fn begin(worker: &Worker, request: Request) -> (Caller, Record, send::Outgoing) {
    let caller = Caller::of(&request.head, Audience::Mesh);
    let line = worker.line(|| Line::of_request("outbound", &worker.source, &request.head));
    let mut record = Record::begin(worker.unknown_edge(), line);
    let outgoing = send::Outgoing::of(request, &mut record);
    (caller, record, outgoing)
}

async fn forward(
    worker: &Worker,
    destination: &Destination,
    outgoing: &mut send::Outgoing,
    record: &mut Record,
) -> Result<Response, RequestError> {
    worker.begin_request()?;
    let protocol = protocol_of(&outgoing.head);
    match destination {
        Destination::Service(service, port) => to_service(worker, service, *port, outgoing, record).await,
        Destination::Workload(service, live, endpoint) => {
            record.on(worker.named_edge(&service.to_string(), protocol, endpoint.endpoint.hop == Hop::Sheer1));
            if let Some(line) = record.line() {
                line.destination = service.to_string();
            }
            let only = std::slice::from_ref(endpoint);
            Box::pin(send::to_one_of(worker, only, &live.identities, outgoing, record)).await.map(|(it, _)| it)
        }
        Destination::External(address) => {
            record.on(external_edge(worker, &outgoing.head, protocol));
            Box::pin(send::outside(worker, *address, outgoing, record)).await
        }
        Destination::NoPort(service) => {
            let name = service.name.to_string();
            record.on(worker.named_edge(&name, protocol, false));
            if let Some(line) = record.line() {
                line.destination = name;
            }
            Err(Cause::UnknownPort.into())
        }
        Destination::Nowhere(cause) => Err((*cause).into()),
    }
}

async fn to_service(
    worker: &Worker,
    service: &Arc<Service>,
    port: ServicePort,
    outgoing: &mut send::Outgoing,
    record: &mut Record,
) -> Result<Response, RequestError> {
    let (snapshot, live) = known(worker, &service.name).await?;
    let rule = route(&snapshot, service, port, &outgoing.head)?;
    let (backend, backend_port) = backend(worker, service, port, rule.as_ref())?;
    let (snapshot, live) = match rule {
        None => (snapshot, live),
        Some(_) => known(worker, backend).await?,
    };
    let live = live.ok_or(Cause::ControlPlaneAway)?;
    let endpoints = live.of_port(backend_port);
    let mtls = endpoints.first().is_some_and(|it| it.endpoint.hop == Hop::Sheer1);
    let protocol = protocol_of(&outgoing.head);
    record.on(worker.outbound_edge(&snapshot, service, rule.as_ref(), backend, protocol, mtls));
    if let Some(line) = record.line() {
        line.destination = service.name.to_string();
        line.route = rule.as_ref().map(|rule| rule.route.to_string()).unwrap_or_default();
    }
    drop(snapshot);
    let mut limit = None;
    if let Some(rule) = &rule {
        edit(&mut outgoing.head.fields, &rule.request_edits)?;
        limit = deadline(&rule.timeouts, record.started());
    }
    let (mut response, hop) = {
        let sent = pin!(send::to_one_of(worker, endpoints, &live.identities, outgoing, record));
        match limit {
            None => sent.await?,
            Some(limit) => tokio::time::timeout_at(limit.into(), sent).await.map_err(|_| Cause::Deadline)??,
        }
    };
    if (hop == Hop::Sheer1) != mtls {
        // Some endpoints are meshed and some are not, and this one is not like the first.
        record.on(worker.outbound_edge(&worker.snapshot(), service, rule.as_ref(), backend, protocol, !mtls));
    }
    if let Some(rule) = &rule {
        edit(&mut response.head.fields, &rule.response_edits)?;
    }
    Ok(response)
}

/// When a response's head must be here: for the request as a whole, or for one attempt where that is sooner. What is
/// sent elsewhere has been refused at once.
fn deadline(timeouts: &Timeouts, started: Instant) -> Option<Instant> {
    let limit = match (timeouts.request, timeouts.backend) {
        (Some(request), Some(attempt)) => Some(request.min(attempt)),
        (request, attempt) => request.or(attempt),
    };
    limit.map(|limit| started + limit)
}

/// A configuration that knows the service's routes and endpoints: at its first use they are waited for.
async fn known(worker: &Worker, service: &ServiceName) -> Result<(Rc<Arc<Snapshot>>, Option<Rc<Arc<Live>>>), Cause> {
    let mut live = worker.live(service);
    if live.is_none() {
        Box::pin(worker.proxy.demand.first_use(service)).await?;
        live = worker.live(service);
    }
    Ok((worker.snapshot(), live))
}

fn route(
    snapshot: &Snapshot,
    service: &Service,
    port: ServicePort,
    head: &RequestHead,
) -> Result<Option<Arc<Rule>>, Cause> {
    match snapshot.route(service, port.port, head) {
        route::Verdict::Unrouted => Ok(None),
        route::Verdict::Rule(rule) => Ok(Some(rule.clone())),
        route::Verdict::NoMatch => Err(Cause::NoRoute),
    }
}

/// The backend of the rule, or the service itself.
fn backend<'a>(
    worker: &Worker,
    service: &'a Service,
    port: ServicePort,
    rule: Option<&'a Arc<Rule>>,
) -> Result<(&'a ServiceName, u16), Cause> {
    match rule {
        None => Ok((&service.name, port.port)),
        Some(rule) => rule.backend(worker.random()).map(|backend| (&backend.service, backend.port)),
    }
}

/// An address that is not the mesh's has no name; where the mesh only watches, the host that was asked for tells it.
fn external_edge(worker: &Worker, head: &RequestHead, protocol: Protocol) -> Arc<Edge> {
    if worker.proxy.plan.mode == Mode::Watch
        && let Some(service) = worker.snapshot().service_named(head.host())
    {
        return worker.named_edge(&service.name.to_string(), protocol, false);
    }
    worker.named_edge("external", protocol, false)
}

fn edit(fields: &mut Fields, edits: &[Edit]) -> Result<(), RequestError> {
    for edit in edits {
        match edit {
            Edit::Set(name, value) => fields.set(name, value.as_bytes()),
            Edit::Add(name, value) => fields.append(name, value.as_bytes()),
            Edit::Remove(name) => {
                fields.remove(name);
                Ok(())
            }
        }
        .map_err(|error| RequestError::because(Cause::HeadTooLarge, error))?;
    }
    Ok(())
}

fn protocol_of(head: &RequestHead) -> Protocol {
    match head.version {
        Version::Http10 | Version::Http11 => Protocol::Http1,
        Version::Http2 if head.is_grpc() => Protocol::Grpc,
        Version::Http2 => Protocol::Http2,
    }
}

/// Carries one connection of bytes.
async fn bytes(worker: &Worker, mut near: Io, read: Bytes, destination: &Destination, opened: Option<Opened>) {
    let line =
        worker.line(|| Line { destination: name_of(destination), ..Line::of_connection("outbound", &worker.source) });
    let mut record = ConnectionRecord::begin(edge_of_bytes(worker, destination), line);
    let opened = match opened {
        Some(opened) => Ok(opened),
        None => connect(worker, destination).await,
    };
    match opened {
        Ok((mut far, said, _in_flight)) => {
            record.connected();
            // A reset of either side is the end that the other side has been given as well.
            if tcp::relay((&mut near, read), (&mut far, said), &record.counts).await.is_err()
                && let Some(cause) = worker.why_ended(&far)
            {
                record.failed(cause);
            }
        }
        Err(error) => {
            tracing::debug!(cause = %error.cause, to = ?error.to, "a connection leads nowhere");
            record.failed(error.cause);
            tcp::reset(&near);
        }
    }
}

/// Opens a connection for bytes.
async fn connect(worker: &Worker, destination: &Destination) -> Result<Opened, RequestError> {
    match destination {
        Destination::Service(service, port) => {
            let (_, live) = known(worker, &service.name).await?;
            let live = live.ok_or(Cause::ControlPlaneAway)?;
            send::connect_to_one_of(worker, live.of_port(port.port), &live.identities).await
        }
        Destination::Workload(_, live, endpoint) => {
            send::connect_to_one_of(worker, std::slice::from_ref(endpoint), &live.identities).await
        }
        Destination::External(address) => send::connect_outside(worker, *address).await,
        Destination::NoPort(_) => Err(Cause::UnknownPort.into()),
        Destination::Nowhere(cause) => Err((*cause).into()),
    }
}

fn name_of(destination: &Destination) -> String {
    match destination {
        Destination::Service(service, _) | Destination::NoPort(service) => service.name.to_string(),
        Destination::Workload(service, ..) => service.to_string(),
        Destination::External(_) => "external".to_owned(),
        Destination::Nowhere(_) => "unknown".to_owned(),
    }
}

fn edge_of_bytes(worker: &Worker, destination: &Destination) -> Arc<Edge> {
    match destination {
        Destination::Service(service, port) => {
            let live = worker.live(&service.name);
            // Said of a connection before it is known where it ends: only what holds for every endpoint.
            let mut all = live.iter().flat_map(|live| live.of_port(port.port));
            let mtls = all.all(|it| it.endpoint.hop == Hop::Sheer1);
            worker.outbound_edge(&worker.snapshot(), service, None, &service.name, Protocol::Tcp, mtls)
        }
        Destination::Workload(.., it) => {
            worker.named_edge(&name_of(destination), Protocol::Tcp, it.endpoint.hop == Hop::Sheer1)
        }
        other => worker.named_edge(&name_of(other), Protocol::Tcp, false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::Body;

    /// What every request of HTTP/2 allocates, and moves once.
    #[tokio::test]
    async fn a_request_in_flight_is_small() {
        let worker = crate::mesh_tests::worker();
        let head = RequestHead::new(http::Method::GET, Version::Http2, "web", "/");
        let nowhere = Destination::Nowhere(Cause::Loop);
        let served = serve(&worker, &nowhere, Request::new(head, Body::Empty));
        assert!(size_of_val(&served) <= 1700, "{}", size_of_val(&served));
    }
}

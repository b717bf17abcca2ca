//! Delta discovery: what each proxy subscribed to, what it has, and what changed.
//!
//! A resource is encoded once; all streams share its bytes. A change wakes the streams that subscribe to it and no
//! other. One response of a type is outstanding at a time: while a proxy is slow, changes to that type fold into the
//! next response. A version that a proxy refused is not sent to it again on that stream.

use crate::Control;
use crate::attest::Peer;
use bytes::{BufMut, Bytes};
use parking_lot::Mutex;
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint};
use sheer_core::api::RefusedView;
use sheer_core::wire::discovery::DeltaDiscoveryRequest;
use sheer_core::wire::v1::{self, Refused};
use sheer_core::wire::{Resource, pack};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::{Request, Response, Status, Streaming};

#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
pub(crate) mod service {
    tonic::include_proto!("envoy.service.discovery.v3.AggregatedDiscoveryService");
}

/// The types of resources, in the order in which they are sent: what others refer to comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "named after the messages of sheer_core::wire::v1")]
pub enum Type {
    Mesh,
    TrustBundle,
    Workload,
    Service,
    Routes,
    Endpoints,
    Address,
}

impl Type {
    const ALL: [Type; 7] =
        [Type::Mesh, Type::TrustBundle, Type::Workload, Type::Service, Type::Routes, Type::Endpoints, Type::Address];

    /// Its type URL.
    pub const fn url(self) -> &'static str {
        match self {
            Type::Mesh => v1::Mesh::TYPE_URL,
            Type::TrustBundle => v1::TrustBundle::TYPE_URL,
            Type::Workload => v1::Workload::TYPE_URL,
            Type::Service => v1::Service::TYPE_URL,
            Type::Routes => v1::Routes::TYPE_URL,
            Type::Endpoints => v1::Endpoints::TYPE_URL,
            Type::Address => v1::Address::TYPE_URL,
        }
    }

    fn of(url: &str) -> Option<Type> {
        Type::ALL.into_iter().find(|kind| kind.url() == url)
    }

    /// Whether a proxy may ask for all of them.
    const fn wildcard(self) -> bool {
        matches!(self, Type::Mesh | Type::TrustBundle | Type::Service)
    }
}

/// An encoded resource. Clones share the bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Its version: a hash of its content.
    pub version: Arc<str>,
    /// `envoy.service.discovery.v3.Resource`.
    bytes: Bytes,
}

impl Encoded {
    /// Encodes a resource.
    pub fn new<R: Resource>(resource: &R) -> Self {
        let packed = pack(resource);
        Self { version: packed.version.as_str().into(), bytes: packed.encode_to_vec().into() }
    }
}

/// A resource as its readers see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What everybody sees who may see it.
    common: Encoded,
    /// What proxies of these namespaces see instead (consumer routes).
    by_namespace: BTreeMap<String, Encoded>,
}

impl Entry {
    /// A resource that is the same for everybody.
    pub fn new<R: Resource>(resource: &R) -> Self {
        Self { common: Encoded::new(resource), by_namespace: BTreeMap::new() }
    }

    /// Routes of a service: a consumer route travels to its namespace alone.
    pub fn routes(routes: &v1::Routes) -> Self {
        let consumers: BTreeSet<&str> = routes.http.iter().map(|route| route.consumer_namespace.as_str()).collect();
        let seen_by = |namespace: &str| {
            let http = routes
                .http
                .iter()
                .filter(|route| route.consumer_namespace.is_empty() || route.consumer_namespace == namespace);
            Encoded::new(&v1::Routes { http: http.cloned().collect(), ..routes.clone() })
        };
        let by_namespace = consumers.into_iter().filter(|namespace| !namespace.is_empty());
        Self {
            common: seen_by(""),
            by_namespace: by_namespace.map(|namespace| (namespace.to_owned(), seen_by(namespace))).collect(),
        }
    }

    fn seen_by(&self, viewer: &Viewer) -> &Encoded {
        self.by_namespace.get(&viewer.namespace).unwrap_or(&self.common)
    }
}

/// Every resource there is.
#[derive(Clone, Debug, Default)]
pub struct World {
    entries: BTreeMap<Type, BTreeMap<String, Entry>>,
    /// The revision that it came from.
    pub revision: String,
}

impl World {
    /// Puts a resource; returns whether that changed anything.
    pub fn put(&mut self, kind: Type, name: &str, entry: Entry) -> bool {
        let entries = self.entries.entry(kind).or_default();
        if entries.get(name) == Some(&entry) {
            return false;
        }
        entries.insert(name.to_owned(), entry);
        true
    }

    /// Removes a resource; returns whether it was there.
    pub fn remove(&mut self, kind: Type, name: &str) -> bool {
        self.entries.get_mut(&kind).is_some_and(|entries| entries.remove(name).is_some())
    }

    /// What differs from an older world.
    pub fn changes_since(&self, older: &World) -> BTreeSet<(Type, String)> {
        let mut changed = BTreeSet::new();
        let empty = BTreeMap::new();
        for kind in Type::ALL {
            let (new, old) = (self.entries.get(&kind).unwrap_or(&empty), older.entries.get(&kind).unwrap_or(&empty));
            changed.extend(
                new.iter().filter(|(name, entry)| old.get(*name) != Some(entry)).map(|it| (kind, it.0.clone())),
            );
            changed.extend(old.keys().filter(|name| !new.contains_key(*name)).map(|name| (kind, name.clone())));
        }
        changed
    }

    /// The names of one type.
    pub fn names(&self, kind: Type) -> impl Iterator<Item = &String> {
        self.entries.get(&kind).into_iter().flat_map(BTreeMap::keys)
    }

    fn get(&self, kind: Type, name: &str, viewer: &Viewer) -> Option<&Encoded> {
        let own = |uid: &Option<String>| uid.as_deref() == Some(name);
        if kind == Type::Workload && !own(&viewer.workload) {
            return None;
        }
        self.entries.get(&kind)?.get(name).map(|entry| entry.seen_by(viewer))
    }
}

/// Who reads, as far as it decides what may be seen.
#[derive(Clone, Debug, Default)]
struct Viewer {
    namespace: String,
    workload: Option<String>,
}

/// All streams, and the world they are told of.
#[derive(Default)]
pub struct Hub {
    world: arc_swap::ArcSwap<World>,
    readers: Mutex<HashMap<u64, Arc<Reader>>>,
    next: AtomicU64,
}

#[derive(Default)]
struct Reader {
    interest: Mutex<Interest>,
    wake: Notify,
}

#[derive(Default)]
struct Interest {
    wildcards: BTreeSet<Type>,
    names: BTreeSet<(Type, String)>,
}

impl Interest {
    fn includes(&self, changed: &(Type, String)) -> bool {
        self.wildcards.contains(&changed.0) || self.names.contains(changed)
    }
}

impl Hub {
    /// The world as it was last published.
    pub fn world(&self) -> Arc<World> {
        self.world.load_full()
    }

    /// Makes a world known, and wakes those who subscribe to what `changed`.
    pub fn publish(&self, world: World, changed: &BTreeSet<(Type, String)>) {
        self.world.store(Arc::new(world));
        if changed.is_empty() {
            return;
        }
        for reader in self.readers.lock().values() {
            let interest = reader.interest.lock();
            if changed.iter().any(|changed| interest.includes(changed)) {
                reader.wake.notify_one();
            }
        }
    }

    fn join(self: &Arc<Self>) -> Membership {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let reader = Arc::new(Reader::default());
        self.readers.lock().insert(id, reader.clone());
        Membership { hub: self.clone(), id, reader }
    }
}

struct Membership {
    hub: Arc<Hub>,
    id: u64,
    reader: Arc<Reader>,
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.hub.readers.lock().remove(&self.id);
    }
}

/// One response: `DeltaDiscoveryResponse`, its resources already encoded.
#[derive(Clone, Debug, Default)]
pub struct Delivery {
    revision: String,
    resources: Vec<Bytes>,
    type_url: &'static str,
    nonce: String,
    removed: Vec<String>,
}

impl Delivery {
    /// Writes the message with the field numbers of `DeltaDiscoveryResponse`.
    fn encode(&self, buffer: &mut impl BufMut) {
        let mut field = |number: u32, bytes: &[u8]| {
            encode_key(number, WireType::LengthDelimited, buffer);
            encode_varint(bytes.len() as u64, buffer);
            buffer.put_slice(bytes);
        };
        field(1, self.revision.as_bytes());
        for resource in &self.resources {
            field(2, resource);
        }
        field(4, self.type_url.as_bytes());
        field(5, self.nonce.as_bytes());
        for name in &self.removed {
            field(6, name.as_bytes());
        }
    }
}

/// Decodes requests and encodes [`Delivery`].
#[derive(Clone, Copy, Debug, Default)]
pub struct DeliveryCodec;

impl Codec for DeliveryCodec {
    type Encode = Delivery;
    type Decode = DeltaDiscoveryRequest;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for DeliveryCodec {
    type Item = Delivery;
    type Error = Status;

    fn encode(&mut self, item: Delivery, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        item.encode(buffer);
        Ok(())
    }
}

impl Decoder for DeliveryCodec {
    type Item = DeltaDiscoveryRequest;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<DeltaDiscoveryRequest>, Status> {
        DeltaDiscoveryRequest::decode(buffer)
            .map(Some)
            .map_err(|error| Status::invalid_argument(format!("the request cannot be decoded: {error}")))
    }
}

/// Names that one stream may subscribe to, over all types.
const MAX_NAMES: usize = 100_000;

/// A response is closed when its resources exceed this many bytes; the rest follows when it is acknowledged. Far below
/// the 4 MiB that clients accept in one message.
const RESPONSE_BYTES: usize = 1 << 20;

/// Responses that wait for the network: one of each type.
const QUEUE: usize = Type::ALL.len();

/// Serves discovery streams.
pub struct Discovery {
    /// The control plane.
    pub control: Arc<Control>,
}

#[tonic::async_trait]
impl service::aggregated_discovery_service_server::AggregatedDiscoveryService for Discovery {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<Delivery, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let peer = Peer::of(&request)?;
        self.control.admit(&peer)?;
        self.control.fleet.take_turn(&peer, &request)?;
        let (out, responses) = mpsc::channel(QUEUE);
        let stream = Stream {
            membership: self.control.hub.join(),
            control: self.control.clone(),
            peer,
            viewer: Viewer::default(),
            types: BTreeMap::new(),
            nonce: 0,
            out,
        };
        tokio::spawn(stream.serve(request.into_inner()));
        Ok(Response::new(ReceiverStream::new(responses)))
    }
}

struct Stream {
    control: Arc<Control>,
    membership: Membership,
    peer: Peer,
    viewer: Viewer,
    types: BTreeMap<Type, Subscription>,
    nonce: u64,
    out: mpsc::Sender<Result<Delivery, Status>>,
}

/// What a stream asked for and was told of one type.
#[derive(Default)]
struct Subscription {
    wildcard: bool,
    names: BTreeSet<String>,
    /// Name -> version that the proxy has.
    sent: BTreeMap<String, Arc<str>>,
    /// Names that the proxy knows not to exist.
    absent: BTreeSet<String>,
    /// Name -> version that the proxy refused.
    refused: BTreeMap<String, Arc<str>>,
    /// The response that is not acknowledged yet.
    outstanding: Option<String>,
    /// Whether a response is owed even when there is nothing to say.
    answer: bool,
}

impl Stream {
    async fn serve(mut self, mut requests: Streaming<DeltaDiscoveryRequest>) {
        let (reader, control) = (self.membership.reader.clone(), self.control.clone());
        let mut validity = tokio::time::interval(Duration::from_secs(1));
        loop {
            // A dropped `message` loses nothing: what was read of it stays in the stream's buffer.
            tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => {
                        if let Err(status) = self.take(request) {
                            let _ = self.out.send(Err(status)).await;
                            return;
                        }
                    }
                    Ok(None) | Err(_) => return,
                },
                () = reader.wake.notified() => {}
                () = control.stopping() => {
                    let _ = self.out.send(Err(Status::unavailable("the control plane is stopping"))).await;
                    return;
                }
                _ = validity.tick() => {
                    if let Err(status) = self.control.admit_still(&self.peer, self.viewer.workload.as_deref()) {
                        let _ = self.out.send(Err(status)).await;
                        return;
                    }
                    continue;
                }
            }
            let world = self.control.hub.world();
            for kind in Type::ALL {
                if let Some(delivery) = self.due(&world, kind)
                    && self.out.send(Ok(delivery)).await.is_err()
                {
                    return;
                }
            }
        }
    }

    fn take(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        let Some(kind) = Type::of(&request.type_url) else {
            let url: String = request.type_url.chars().take(120).collect();
            return Err(Status::invalid_argument(format!("there is no resource type '{url}'")));
        };
        if let Some(node) = request.node.as_ref().filter(|node| !node.id.is_empty()) {
            self.name_viewer(&node.id)?;
        }
        if self.viewer.namespace.is_empty() {
            self.viewer.namespace = self.control.namespace_of(&self.peer, self.viewer.workload.as_deref());
        }
        let names: usize = self.types.values().map(|subscription| subscription.names.len()).sum();
        if names + request.resource_names_subscribe.len() > MAX_NAMES {
            return Err(Status::resource_exhausted(format!("a stream may subscribe to {MAX_NAMES} names")));
        }
        let first = !self.types.contains_key(&kind);
        let subscription = self.types.entry(kind).or_default();
        if first {
            subscription.answer = true;
            // Delta discovery: a first request that names nothing asks for everything.
            subscription.wildcard = kind.wildcard() && request.resource_names_subscribe.is_empty();
            for (name, version) in &request.initial_resource_versions {
                subscription.sent.insert(name.clone(), version.as_str().into());
            }
        }
        for name in request.resource_names_subscribe {
            if name == "*" {
                subscription.wildcard = kind.wildcard();
                continue;
            }
            // Asked for again: answered again, even if nothing changed.
            if !subscription.names.insert(name.clone()) {
                subscription.sent.remove(&name);
            }
            subscription.absent.remove(&name);
        }
        for name in request.resource_names_unsubscribe {
            if name == "*" {
                subscription.wildcard = false;
            }
            subscription.names.remove(&name);
            subscription.absent.remove(&name);
            subscription.sent.remove(&name);
        }
        let mut refused = None;
        if !request.response_nonce.is_empty() && subscription.outstanding.as_ref() == Some(&request.response_nonce) {
            subscription.outstanding = None;
            refused = Some(request.error_detail.map(|status| refusals(kind, &status)).unwrap_or_default());
        }
        for refusal in refused.iter().flatten() {
            subscription.refused.insert(refusal.name.clone(), refusal.version.as_str().into());
        }
        {
            let mut interest = self.membership.reader.interest.lock();
            match subscription.wildcard {
                true => interest.wildcards.insert(kind),
                false => interest.wildcards.remove(&kind),
            };
            interest.names.retain(|(of, name)| *of != kind || subscription.names.contains(name));
            interest.names.extend(subscription.names.iter().map(|name| (kind, name.clone())));
        }
        if let (Some(refused), Some(workload)) = (refused, &self.viewer.workload) {
            self.control.fleet.note_refused(workload, kind.url(), refused);
        }
        Ok(())
    }

    /// Takes the workload that the stream says it is, if the peer may speak for it.
    fn name_viewer(&mut self, uid: &str) -> Result<(), Status> {
        if self.viewer.workload.as_deref() == Some(uid) {
            return Ok(());
        }
        self.control.speaks_for(&self.peer, uid)?;
        self.viewer.workload = Some(uid.to_owned());
        self.viewer.namespace = self.control.namespace_of(&self.peer, Some(uid));
        Ok(())
    }

    /// The next response of a type, if one is due.
    fn due(&mut self, world: &World, kind: Type) -> Option<Delivery> {
        let viewer = &self.viewer;
        let subscription = self.types.get_mut(&kind)?;
        if subscription.outstanding.is_some() {
            return None;
        }
        let mut delivery = Delivery { type_url: kind.url(), revision: world.revision.clone(), ..Delivery::default() };
        let mut bytes = 0;
        let wanted: BTreeSet<&String> = match subscription.wildcard {
            true => world.names(kind).chain(&subscription.names).collect(),
            false => subscription.names.iter().collect(),
        };
        for name in &wanted {
            if bytes > RESPONSE_BYTES {
                break;
            }
            match world.get(kind, name, viewer) {
                Some(resource) => {
                    subscription.absent.remove(*name);
                    let has = subscription.sent.get(*name) == Some(&resource.version);
                    let refused = subscription.refused.get(*name) == Some(&resource.version);
                    if !has && !refused {
                        bytes += resource.bytes.len();
                        subscription.sent.insert((*name).clone(), resource.version.clone());
                        delivery.resources.push(resource.bytes.clone());
                    }
                }
                None => {
                    let known = subscription.sent.remove(*name).is_some();
                    if subscription.absent.insert((*name).clone()) || known {
                        delivery.removed.push((*name).clone());
                    }
                }
            }
        }
        // What a proxy has from before and what is gone since.
        let gone: Vec<String> = match subscription.wildcard {
            true => subscription.sent.keys().filter(|name| !wanted.contains(name)).cloned().collect(),
            false => Vec::new(),
        };
        for name in gone {
            subscription.sent.remove(&name);
            delivery.removed.push(name);
        }
        if delivery.resources.is_empty() && delivery.removed.is_empty() && !subscription.answer {
            return None;
        }
        subscription.answer = false;
        self.nonce += 1;
        delivery.nonce = self.nonce.to_string();
        subscription.outstanding = Some(delivery.nonce.clone());
        Some(delivery)
    }
}

/// What a refusal says, one entry for each resource.
fn refusals(kind: Type, status: &sheer_core::wire::rpc::Status) -> Vec<RefusedView> {
    let details = status.details.iter().filter(|any| any.type_url.ends_with("/sheer.v1.Refused"));
    let mut refused: Vec<RefusedView> = details
        .filter_map(|any| Refused::decode(any.value.as_slice()).ok())
        .take(1000)
        .map(|it| RefusedView {
            type_url: kind.url().to_owned(),
            name: clip(&it.name),
            version: clip(&it.version),
            reason: clip(&it.reason),
            place: clip(&it.place),
        })
        .collect();
    if refused.is_empty() {
        let reason = clip(&status.message);
        refused.push(RefusedView { type_url: kind.url().to_owned(), reason, ..RefusedView::default() });
    }
    refused
}

fn clip(text: &str) -> String {
    text.chars().take(500).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use sheer_core::wire::discovery::DeltaDiscoveryResponse;

    #[test]
    fn a_delivery_reads_as_a_delta_response() {
        let mesh = v1::Mesh { trust_domain: "mesh.internal".into(), ..Default::default() };
        let delivery = Delivery {
            revision: "1.2".into(),
            resources: vec![Encoded::new(&mesh).bytes],
            type_url: Type::Mesh.url(),
            nonce: "7".into(),
            removed: vec!["a".into(), "b".into()],
        };
        let mut bytes = Vec::new();
        delivery.encode(&mut bytes);
        let read = DeltaDiscoveryResponse::decode(bytes.as_slice()).unwrap();
        assert_eq!(read.system_version_info, "1.2");
        assert_eq!(read.resources, [pack(&mesh)]);
        assert_eq!(read.type_url, "type.googleapis.com/sheer.v1.Mesh");
        assert_eq!((read.nonce.as_str(), read.removed_resources.len()), ("7", 2));
    }

    #[test]
    fn consumer_routes_are_seen_in_their_namespace_alone() {
        let route = |name: &str, consumer: &str| v1::HttpRoute {
            name: name.into(),
            consumer_namespace: consumer.into(),
            ..Default::default()
        };
        let routes = v1::Routes { http: vec![route("all", ""), route("mine", "shop")], ..Default::default() };
        let mut world = World::default();
        world.put(Type::Routes, "default/web", Entry::routes(&routes));
        let seen = |namespace: &str| {
            let viewer = Viewer { namespace: namespace.into(), workload: None };
            let encoded = world.get(Type::Routes, "default/web", &viewer).unwrap().clone();
            let resource = sheer_core::wire::discovery::Resource::decode(encoded.bytes).unwrap();
            v1::Routes::decode(resource.resource.unwrap().value.as_slice()).unwrap().http.len()
        };
        assert_eq!((seen("shop"), seen("default")), (2, 1));
    }

    #[test]
    fn a_workload_is_seen_by_its_owner_alone() {
        let workload = v1::Workload { uid: "local/host/default/web-1".into(), ..Default::default() };
        let mut world = World::default();
        world.put(Type::Workload, &workload.uid, Entry::new(&workload));
        let sees = |uid: Option<&str>| {
            let viewer = Viewer { namespace: "default".into(), workload: uid.map(str::to_owned) };
            world.get(Type::Workload, &workload.uid, &viewer).is_some()
        };
        assert!(sees(Some("local/host/default/web-1")));
        assert!(!sees(Some("local/host/default/web-2")) && !sees(None));
    }

    #[test]
    fn only_readers_of_what_changed_are_woken() {
        let hub = Arc::new(Hub::default());
        let (one, two) = (hub.join(), hub.join());
        one.reader.interest.lock().names.insert((Type::Endpoints, "default/a".into()));
        two.reader.interest.lock().names.insert((Type::Endpoints, "default/b".into()));
        hub.publish(World::default(), &BTreeSet::from([(Type::Endpoints, "default/a".into())]));
        let woken = |member: &Membership| {
            let waker = futures::task::noop_waker();
            let mut cx = std::task::Context::from_waker(&waker);
            std::pin::pin!(member.reader.wake.notified()).poll(&mut cx).is_ready()
        };
        assert!(woken(&one) && !woken(&two));
        drop(one);
        assert_eq!(hub.readers.lock().len(), 1);
    }
}

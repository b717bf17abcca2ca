//! One discovery stream: subscriptions, resumption, acknowledgements, refusals.

use super::demand::Want;
use super::readiness::Readiness;
use super::view::{Kind, View};
use super::{Lost, Saver, Waiters, marked};
use crate::control::MAX_MESSAGE;
use crate::control::clients::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use prost::Message;
use sheer_core::name::ServiceName;
use sheer_core::wire::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use sheer_core::wire::{FEATURES, Resource as _, rpc, v1};
use std::collections::BTreeSet;
use std::net::IpAddr;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

/// Requests that may wait: one acknowledgement for each type, and subscriptions.
const QUEUE: usize = 64;

/// What a stream works with.
pub(super) struct Discovery<'a> {
    pub(super) view: &'a mut View,
    pub(super) wants: &'a mut mpsc::Receiver<Want>,
    pub(super) waiters: &'a mut Waiters,
    pub(super) saver: &'a mut Saver,
    pub(super) readiness: &'a mut Readiness,
    pub(super) pace: watch::Receiver<u32>,
}

impl Discovery<'_> {
    /// Follows the control plane until the stream ends.
    pub(super) async fn follow(mut self, channel: Channel, uid: &str) -> Lost {
        let (requests, outgoing) = mpsc::channel(QUEUE);
        let mut stream = Requests { requests, asked: BTreeSet::new(), addresses: BTreeSet::new(), begun: false };
        for kind in [Kind::Mesh, Kind::TrustBundle, Kind::Service] {
            stream.begin(kind, vec!["*".to_owned()], self.view, uid).await;
        }
        stream.begin(Kind::Workload, vec![uid.to_owned()], self.view, uid).await;
        stream.subscribe(self.view, uid).await;
        stream.subscribe_addresses(self.view, uid).await;
        let mut client = AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
        let opening =
            client.delta_aggregated_resources(marked(ReceiverStream::new(outgoing), self.readiness.is_ready()));
        tokio::pin!(opening);
        let mut responses = loop {
            // A dropped opening closes the stream; the others are cancel safe.
            tokio::select! {
                opened = &mut opening => match opened {
                    Ok(responses) => break responses.into_inner(),
                    Err(status) => return Lost::from(status),
                },
                Some(want) = self.wants.recv() => self.waiters.add(self.view, want),
                () = self.readiness.overdue() => self.readiness.settle(self.view.is_ready()),
            }
        };
        loop {
            // Each arm may be dropped: receiving is cancel safe, and the saver keeps what is due.
            tokio::select! {
                response = responses.message() => match response {
                    Ok(Some(response)) => {
                        if self.readiness.is_waiting() && self.view.is_foreign(&response) {
                            return Lost::Another;
                        }
                        // While it waits, only the bundle says whose the rest is.
                        let told = !self.readiness.is_waiting() || response.type_url == v1::TrustBundle::TYPE_URL;
                        stream.answer(self.view, response).await;
                        self.waiters.tell(self.view);
                        self.saver.note_change();
                        if told {
                            self.readiness.settle(self.view.is_ready());
                        }
                    }
                    Ok(None) => return Lost::Ended,
                    Err(status) => return Lost::from(status),
                },
                Some(want) = self.wants.recv() => self.waiters.add(self.view, want),
                Ok(()) = self.pace.changed() => self.saver.note_change(),
                () = self.saver.due() => self.saver.save(self.view),
                () = self.readiness.overdue() => self.readiness.settle(self.view.is_ready()),
            }
            stream.subscribe(self.view, uid).await;
            stream.subscribe_addresses(self.view, uid).await;
        }
    }
}

/// The requests of one stream.
struct Requests {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    asked: BTreeSet<ServiceName>,
    addresses: BTreeSet<IpAddr>,
    /// Whether any address was asked for on this stream.
    begun: bool,
}

impl Requests {
    /// The first request of a type on this stream: what is wanted, and what is held already.
    async fn begin(&self, kind: Kind, names: Vec<String>, view: &View, uid: &str) {
        let mut versions = view.versions(kind);
        if kind.is_on_demand() {
            versions.retain(|name, _| names.contains(name));
        }
        let node = Node {
            id: uid.to_owned(),
            user_agent_name: format!("sheer/{}", env!("CARGO_PKG_VERSION")),
            client_features: FEATURES.iter().map(|&it| it.to_owned()).collect(),
            ..Default::default()
        };
        self.send(DeltaDiscoveryRequest {
            node: Some(node),
            type_url: kind.type_url().to_owned(),
            resource_names_subscribe: names,
            initial_resource_versions: versions,
            ..Default::default()
        })
        .await;
    }

    /// Subscribes to the endpoints and routes of what is wanted by now.
    async fn subscribe(&mut self, view: &View, uid: &str) {
        let new: Vec<ServiceName> = view.wanted().difference(&self.asked).cloned().collect();
        if new.is_empty() {
            return;
        }
        let names: Vec<String> = new.iter().map(ServiceName::to_string).collect();
        // Routes first: a service whose endpoints are there is used, and must then be used by its routes.
        for kind in [Kind::Routes, Kind::Endpoints] {
            if self.asked.is_empty() {
                self.begin(kind, names.clone(), view, uid).await;
            } else {
                self.send(DeltaDiscoveryRequest {
                    type_url: kind.type_url().to_owned(),
                    resource_names_subscribe: names.clone(),
                    ..Default::default()
                })
                .await;
            }
        }
        self.asked.extend(new);
    }

    /// Subscribes to the addresses that are wanted by now, and to no others any more.
    async fn subscribe_addresses(&mut self, view: &View, uid: &str) {
        if !view.wants_addresses_other_than(&self.addresses) {
            return;
        }
        let wanted: BTreeSet<IpAddr> = view.addresses().collect();
        let names = |addresses: &mut dyn Iterator<Item = &IpAddr>| addresses.map(IpAddr::to_string).collect();
        let new: Vec<String> = names(&mut wanted.difference(&self.addresses));
        if self.begun {
            self.send(DeltaDiscoveryRequest {
                type_url: Kind::Address.type_url().to_owned(),
                resource_names_subscribe: new,
                resource_names_unsubscribe: names(&mut self.addresses.difference(&wanted)),
                ..Default::default()
            })
            .await;
        } else {
            self.begin(Kind::Address, new, view, uid).await;
        }
        self.begun = true;
        self.addresses = wanted;
    }

    /// Applies a response and acknowledges it, with what was refused.
    async fn answer(&self, view: &mut View, response: DeltaDiscoveryResponse) {
        let (type_url, nonce) = (response.type_url.clone(), response.nonce.clone());
        // A type that was never asked for is acknowledged and ignored.
        let refused = match Kind::of(&type_url) {
            Some(kind) => view.apply(kind, response),
            None => Vec::new(),
        };
        for v1::Refused { name, reason, place, .. } in &refused {
            tracing::warn!(type_url, name, place, reason, "a resource is refused; the one before it stays in force");
        }
        let error_detail = (!refused.is_empty()).then(|| refusal(&refused));
        self.send(DeltaDiscoveryRequest { type_url, response_nonce: nonce, error_detail, ..Default::default() }).await;
    }

    async fn send(&self, request: DeltaDiscoveryRequest) {
        // When the stream has ended, its other half says so.
        let _ = self.requests.send(request).await;
    }
}

fn refusal(refused: &[v1::Refused]) -> rpc::Status {
    let detail = |it: &v1::Refused| prost_types::Any {
        type_url: "type.googleapis.com/sheer.v1.Refused".to_owned(),
        value: it.encode_to_vec(),
    };
    rpc::Status {
        code: tonic::Code::InvalidArgument.into(),
        message: format!("{} of the resources were refused, the others are applied", refused.len()),
        details: refused.iter().map(detail).collect(),
    }
}

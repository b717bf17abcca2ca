//! A control plane for tests, on a unix socket in this process: it issues certificates and tells what it is told to.

use super::Address;
use bytes::Bytes;
use parking_lot::Mutex;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, ExtendedKeyUsagePurpose, IsCa, Issuer,
};
use rcgen::{KeyPair, SanType};
use rustls::pki_types::CertificateSigningRequestDer;
use sheer_core::wire::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use sheer_core::wire::v1;
use std::collections::BTreeMap;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
mod servers {
    include!(concat!(env!("OUT_DIR"), "/servers/sheer.v1.Identity.rs"));
    include!(concat!(env!("OUT_DIR"), "/servers/sheer.v1.Fleet.rs"));
    include!(concat!(env!("OUT_DIR"), "/servers/envoy.service.discovery.v3.AggregatedDiscoveryService.rs"));
}

use servers::aggregated_discovery_service_server::{AggregatedDiscoveryService, AggregatedDiscoveryServiceServer};
use servers::fleet_server::{Fleet, FleetServer};
use servers::identity_server::{Identity, IdentityServer};

/// What it tells and was told.
#[derive(Default)]
pub(crate) struct Script {
    /// How long certificates last.
    pub(crate) lifetime: Duration,
    /// Answers the next requests for a certificate with this instead.
    pub(crate) refuse: Option<Status>,
    /// The requests for a certificate.
    pub(crate) certified: Vec<v1::CertifyRequest>,
    /// In what time proxies are told to come back, unless 0.
    pub(crate) return_within_ms: u32,
    /// What proxies reported.
    pub(crate) reports: Vec<v1::ProxyReport>,
    /// Every discovery request.
    pub(crate) requests: Vec<DeltaDiscoveryRequest>,
    /// By type and name.
    resources: BTreeMap<(String, String), Resource>,
}

/// The control plane.
#[derive(Clone)]
pub(crate) struct Fake {
    pub(crate) script: Arc<Mutex<Script>>,
    changed: Arc<watch::Sender<u64>>,
    ca: Arc<(CertificateParams, KeyPair, Bytes)>,
}

/// Ends the control plane when dropped.
pub(crate) struct Running(tokio::task::JoinHandle<()>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Fake {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap().der().to_vec().into();
        let script = Script { lifetime: Duration::from_secs(3600), ..Script::default() };
        Self {
            script: Arc::new(Mutex::new(script)),
            changed: Arc::new(watch::channel(0).0),
            ca: Arc::new((params, key, root)),
        }
    }

    /// Serves on a socket until the guard is dropped.
    pub(crate) fn serve(&self, path: &Path) -> (Address, Running) {
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).unwrap();
        let router = tonic::transport::Server::builder()
            .add_service(IdentityServer::new(self.clone()))
            .add_service(FleetServer::new(self.clone()))
            .add_service(AggregatedDiscoveryServiceServer::new(self.clone()));
        let serving = async move {
            let _ = router.serve_with_incoming(UnixListenerStream::new(listener)).await;
        };
        (Address::Unix(path.to_owned()), Running(tokio::spawn(serving)))
    }

    /// Tells a resource from now on.
    pub(crate) fn put(&self, resource: Resource) {
        let kind = resource.resource.as_ref().unwrap().type_url.clone();
        self.script.lock().resources.insert((kind, resource.name.clone()), resource);
        self.changed.send_modify(|it| *it += 1);
    }

    /// Removes one.
    pub(crate) fn remove(&self, kind: &str, name: &str) {
        self.script.lock().resources.remove(&(kind.to_owned(), name.to_owned()));
        self.changed.send_modify(|it| *it += 1);
    }

    pub(crate) fn trust(&self) -> v1::TrustBundle {
        v1::TrustBundle { trust_domain: "mesh.internal".into(), roots: vec![self.ca.2.clone()], ..Default::default() }
    }

    pub(crate) fn mesh(&self) -> v1::Mesh {
        v1::Mesh {
            trust_domain: "mesh.internal".into(),
            cluster_domain: "mesh.internal".into(),
            certificate_lifetime_s: self.script.lock().lifetime.as_secs(),
            ..Default::default()
        }
    }

    fn sign(&self, request: &v1::CertifyRequest) -> Bytes {
        let der = CertificateSigningRequestDer::from(request.csr.to_vec());
        let mut csr = CertificateSigningRequestParams::from_der(&der).unwrap();
        let name = format!("spiffe://mesh.internal/ns/{}/sa/{}", request.namespace, request.service_account);
        let lifetime = self.script.lock().lifetime;
        csr.params.subject_alt_names = vec![SanType::URI(name.as_str().try_into().unwrap())];
        csr.params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        csr.params.not_before = (SystemTime::now() - Duration::from_secs(900)).into();
        csr.params.not_after = (SystemTime::now() + lifetime).into();
        let (params, key, _) = &*self.ca;
        csr.signed_by(&Issuer::from_params(params, key)).unwrap().der().to_vec().into()
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Identity for Fake {
    async fn certify(&self, request: Request<v1::CertifyRequest>) -> Result<Response<v1::CertifyResponse>, Status> {
        let request = request.into_inner();
        self.script.lock().certified.push(request.clone());
        if let Some(status) = self.script.lock().refuse.clone() {
            return Err(status);
        }
        Ok(Response::new(v1::CertifyResponse {
            chain: vec![self.sign(&request)],
            trust: Some(self.trust()),
            mesh: Some(self.mesh()),
            uid: format!("local/host/{}/{}", request.namespace, request.workload),
            control: vec![],
        }))
    }
}

#[tonic::async_trait]
impl Fleet for Fake {
    type AttachStream = Answers<v1::ControlNotice>;

    async fn attach(
        &self,
        request: Request<Streaming<v1::ProxyReport>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let (script, mut reports) = (self.script.clone(), request.into_inner());
        let (sender, receiver) = mpsc::channel(16);
        tokio::spawn(async move {
            while let Ok(Some(report)) = reports.message().await {
                if let Some(v1::proxy_report::Body::Registration(_)) = &report.body {
                    let registered = v1::Registered { uid: "uid".into(), warnings: vec![] };
                    let body = Some(v1::control_notice::Body::Registered(registered));
                    let _ = sender.send(Ok(v1::ControlNotice { body })).await;
                    let return_within_ms = script.lock().return_within_ms;
                    if return_within_ms > 0 {
                        let body = Some(v1::control_notice::Body::Pace(v1::Pace { return_within_ms }));
                        let _ = sender.send(Ok(v1::ControlNotice { body })).await;
                    }
                }
                script.lock().reports.push(report);
            }
            drop(sender);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Fake {
    type DeltaAggregatedResourcesStream = Answers<DeltaDiscoveryResponse>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (sender, receiver) = mpsc::channel(16);
        let (fake, mut changed) = (self.clone(), self.changed.subscribe());
        let mut requests = request.into_inner().fuse();
        tokio::spawn(async move {
            let mut known: BTreeMap<String, Known> = BTreeMap::new();
            loop {
                tokio::select! {
                    request = requests.next() => {
                        let Some(Ok(request)) = request else { return };
                        fake.script.lock().requests.push(request.clone());
                        let first = !known.contains_key(&request.type_url);
                        let kind = known.entry(request.type_url.clone()).or_default();
                        kind.versions.extend(request.initial_resource_versions);
                        kind.fresh.extend(request.resource_names_subscribe.iter().cloned());
                        kind.names.extend(request.resource_names_subscribe);
                        kind.must_answer |= first;
                        for name in request.resource_names_unsubscribe {
                            kind.names.retain(|it| *it != name);
                            kind.versions.remove(&name);
                        }
                    }
                    _ = changed.changed() => {}
                }
                for (kind, known) in &mut known {
                    let response = known.next(kind, &fake.script.lock().resources);
                    if let Some(response) = response
                        && sender.send(Ok(response)).await.is_err()
                    {
                        return;
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// What one stream knows of one type.
#[derive(Default)]
struct Known {
    names: Vec<String>,
    fresh: Vec<String>,
    versions: std::collections::HashMap<String, String>,
    must_answer: bool,
}

impl Known {
    fn next(&mut self, kind: &str, resources: &BTreeMap<(String, String), Resource>) -> Option<DeltaDiscoveryResponse> {
        let all = self.names.iter().any(|name| name == "*");
        let mut response = DeltaDiscoveryResponse { type_url: kind.into(), nonce: "n".into(), ..Default::default() };
        for ((_, name), resource) in resources.iter().filter(|((it, _), _)| it == kind) {
            if (all || self.names.contains(name)) && self.versions.get(name) != Some(&resource.version) {
                self.versions.insert(name.clone(), resource.version.clone());
                response.resources.push(resource.clone());
            }
        }
        let exists = |name: &String| resources.contains_key(&(kind.to_owned(), name.clone()));
        let gone: Vec<String> = self.versions.keys().filter(|name| !exists(name)).cloned().collect();
        for name in gone {
            self.versions.remove(&name);
            response.removed_resources.push(name);
        }
        for name in self.fresh.drain(..).filter(|name| name != "*" && !exists(name)) {
            if !response.removed_resources.contains(&name) {
                response.removed_resources.push(name);
            }
        }
        let must = std::mem::take(&mut self.must_answer);
        (must || !response.resources.is_empty() || !response.removed_resources.is_empty()).then_some(response)
    }
}

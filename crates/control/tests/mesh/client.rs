//! A proxy written by hand: as little as speaks to a control plane.

use bytes::Bytes;
use hyper_util::rt::TokioIo;
use prost::Message;
use rcgen::{CertificateParams, KeyPair};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use sheer_core::token::JoinToken;
use sheer_core::wire::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use sheer_core::wire::{DISCOVERY_PATH, Resource, v1};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::client::Grpc;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Request, Status, Streaming};
use tonic_prost::ProstCodec;
use x509_parser::prelude::{FromDer, X509Certificate};

/// How long a test waits for what must happen.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// A key and, once issued, its certificate.
pub(crate) struct Credentials {
    pub(crate) key: KeyPair,
    pub(crate) chain: Vec<CertificateDer<'static>>,
}

impl Credentials {
    pub(crate) fn new() -> Self {
        Self { key: KeyPair::generate().unwrap(), chain: Vec::new() }
    }

    fn csr(&self) -> Bytes {
        CertificateParams::default().serialize_request(&self.key).unwrap().der().to_vec().into()
    }
}

/// Accepts the server whose root has this hash.
#[derive(Debug)]
struct Pinned {
    root_sha256: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        use sha2::{Digest, Sha256};
        let unknown = || rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let (root, between) = above.split_last().ok_or_else(unknown)?;
        let (_, parsed) = X509Certificate::from_der(root).map_err(|_| unknown())?;
        let hash: [u8; 32] = Sha256::digest(parsed.public_key().raw).into();
        if hash != self.root_sha256 {
            return Err(unknown());
        }
        let anchors = [webpki::anchor_from_trusted_cert(root).map_err(|_| unknown())?];
        let end = webpki::EndEntityCert::try_from(leaf).map_err(|_| unknown())?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        let usage = webpki::KeyUsage::server_auth();
        end.verify_for_usage(algorithms, &anchors, between, now, usage, None, None).map_err(|_| unknown())?;
        end.verify_is_valid_for_subject_name(name).map_err(|_| unknown())?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Connects over TLS, with a certificate if there is one.
pub(crate) async fn connect_tls(
    address: SocketAddr,
    root_sha256: [u8; 32],
    credentials: Option<&Credentials>,
) -> Result<Channel, tonic::transport::Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned { root_sha256, provider }));
    let mut config = match credentials.filter(|credentials| !credentials.chain.is_empty()) {
        Some(credentials) => {
            let key = PrivatePkcs8KeyDer::from(credentials.key.serialize_der());
            builder.with_client_auth_cert(credentials.chain.clone(), key.into()).unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let dial = tower::service_fn(move |_: Uri| {
        let connector = connector.clone();
        async move {
            let stream = TcpStream::connect(address).await?;
            let name = ServerName::try_from("control.mesh.internal").unwrap();
            let stream = connector.connect(name, stream).await?;
            Ok::<_, std::io::Error>(TokioIo::new(stream))
        }
    });
    Endpoint::from_static("http://control.mesh.internal").connect_with_connector(dial).await
}

/// Connects to `control.sock`.
pub(crate) async fn connect_unix(path: PathBuf) -> Channel {
    let dial = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
    });
    Endpoint::from_static("http://control").connect_with_connector(dial).await.unwrap()
}

/// Who a proxy says it is.
#[derive(Clone)]
pub(crate) struct Name {
    pub(crate) account: &'static str,
    pub(crate) workload: String,
}

impl Name {
    pub(crate) fn new(account: &'static str, workload: &str) -> Self {
        Self { account, workload: workload.to_owned() }
    }

    pub(crate) fn uid(&self) -> String {
        format!("local/host/default/{}", self.workload)
    }
}

/// Asks for a certificate.
pub(crate) async fn certify(
    channel: &Channel,
    credentials: &mut Credentials,
    name: &Name,
    token: &str,
) -> Result<v1::CertifyResponse, Status> {
    let request = v1::CertifyRequest {
        csr: credentials.csr(),
        token: token.to_owned(),
        namespace: "default".to_owned(),
        service_account: name.account.to_owned(),
        workload: name.workload.clone(),
    };
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let path = "/sheer.v1.Identity/Certify".parse().unwrap();
    let codec = ProstCodec::<v1::CertifyRequest, v1::CertifyResponse>::default();
    let response = grpc.unary(Request::new(request), path, codec).await?.into_inner();
    credentials.chain = response.chain.iter().map(|der| CertificateDer::from(der.to_vec())).collect();
    Ok(response)
}

/// Joins with a token; returns a channel with the certificate.
pub(crate) async fn join(token: &str, name: &Name) -> Result<(Channel, Credentials), Status> {
    let parsed = JoinToken::parse(token).unwrap();
    let address = parsed.addresses[0].parse().unwrap();
    let mut credentials = Credentials::new();
    let unavailable = |error: tonic::transport::Error| Status::unavailable(format!("{error:?}"));
    let channel = connect_tls(address, parsed.root_sha256, None).await.map_err(unavailable)?;
    certify(&channel, &mut credentials, name, token).await?;
    let channel = connect_tls(address, parsed.root_sha256, Some(&credentials)).await.map_err(unavailable)?;
    Ok((channel, credentials))
}

/// An open Attach stream. Dropped, it closes.
pub(crate) struct Attached {
    pub(crate) reports: mpsc::Sender<v1::ProxyReport>,
    pub(crate) notices: Streaming<v1::ControlNotice>,
}

impl Attached {
    pub(crate) async fn send(&self, body: v1::proxy_report::Body) {
        self.reports.send(v1::ProxyReport { body: Some(body) }).await.unwrap();
    }

    pub(crate) async fn notice(&mut self) -> v1::control_notice::Body {
        let notice = tokio::time::timeout(LIMIT, self.notices.message()).await.expect("a notice in time");
        notice.unwrap().expect("a notice").body.unwrap()
    }
}

/// A registration with one ready HTTP port.
pub(crate) fn registration(name: &Name, service: &str) -> v1::Registration {
    let port = v1::ListeningPort {
        port: 8080,
        protocol: v1::Protocol::Http.into(),
        mesh_port: 40001,
        ready: true,
        hop: v1::Hop::Sheer1.into(),
        ..Default::default()
    };
    v1::Registration {
        namespace: "default".to_owned(),
        name: name.workload.clone(),
        service: service.to_owned(),
        ports: vec![port],
        mode: v1::Mode::Strict.into(),
        ..Default::default()
    }
}

/// Opens an Attach stream and registers.
pub(crate) async fn attach(channel: &Channel, registration: v1::Registration) -> Result<Attached, Status> {
    let (reports, outgoing) = mpsc::channel(64);
    let body = v1::proxy_report::Body::Registration(registration);
    reports.send(v1::ProxyReport { body: Some(body) }).await.unwrap();
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let path = "/sheer.v1.Fleet/Attach".parse().unwrap();
    let codec = ProstCodec::<v1::ProxyReport, v1::ControlNotice>::default();
    let notices = grpc.streaming(Request::new(ReceiverStream::new(outgoing)), path, codec).await?.into_inner();
    Ok(Attached { reports, notices })
}

/// An open discovery stream, and what it was told.
pub(crate) struct Discovery {
    uid: String,
    pub(crate) requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
    /// (type URL, name) -> (version, encoded).
    pub(crate) has: BTreeMap<(String, String), (String, Vec<u8>)>,
    pub(crate) removed: Vec<(String, String)>,
    /// Names of resources sent, in order.
    pub(crate) received: Vec<String>,
    /// Resources to refuse, by name.
    pub(crate) refuse: Option<String>,
}

impl Discovery {
    pub(crate) async fn open(channel: &Channel, uid: &str) -> Result<Self, Status> {
        let (requests, outgoing) = mpsc::channel(64);
        let mut grpc = Grpc::new(channel.clone());
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let path = DISCOVERY_PATH.parse().unwrap();
        let codec = ProstCodec::<DeltaDiscoveryRequest, DeltaDiscoveryResponse>::default();
        let responses = grpc.streaming(Request::new(ReceiverStream::new(outgoing)), path, codec).await?.into_inner();
        let (has, removed, received) = Default::default();
        Ok(Self { uid: uid.to_owned(), requests, responses, has, removed, received, refuse: None })
    }

    pub(crate) async fn subscribe<R: Resource>(&self, names: &[&str]) {
        self.resume::<R>(names, &[]).await;
    }

    pub(crate) async fn resume<R: Resource>(&self, names: &[&str], versions: &[(String, String)]) {
        let request = DeltaDiscoveryRequest {
            node: Some(Node { id: self.uid.clone(), ..Default::default() }),
            type_url: R::TYPE_URL.to_owned(),
            resource_names_subscribe: names.iter().map(|name| (*name).to_owned()).collect(),
            initial_resource_versions: versions.iter().cloned().collect(),
            ..Default::default()
        };
        self.requests.send(request).await.unwrap();
    }

    /// Takes one response and acknowledges it.
    pub(crate) async fn next(&mut self) -> Result<DeltaDiscoveryResponse, Status> {
        let message = tokio::time::timeout(LIMIT, self.responses.message()).await.expect("a response in time");
        let response = message?.ok_or_else(|| Status::cancelled("the stream ended"))?;
        let mut error_detail = None;
        for resource in &response.resources {
            self.received.push(resource.name.clone());
            if self.refuse.as_ref() == Some(&resource.name) {
                let refused = v1::Refused {
                    type_url: response.type_url.clone(),
                    name: resource.name.clone(),
                    version: resource.version.clone(),
                    reason: "not understood".into(),
                    place: "http[0]".into(),
                };
                let detail = prost_types::Any {
                    type_url: "type.googleapis.com/sheer.v1.Refused".into(),
                    value: refused.encode_to_vec(),
                };
                let status = sheer_core::wire::rpc::Status { details: vec![detail], ..Default::default() };
                error_detail = Some(status);
                continue;
            }
            let value = resource.resource.clone().unwrap().value;
            let key = (response.type_url.clone(), resource.name.clone());
            self.has.insert(key, (resource.version.clone(), value));
        }
        for name in &response.removed_resources {
            self.has.remove(&(response.type_url.clone(), name.clone()));
            self.removed.push((response.type_url.clone(), name.clone()));
        }
        let ack = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            error_detail,
            ..Default::default()
        };
        self.requests.send(ack).await.unwrap();
        Ok(response)
    }

    pub(crate) fn get<R: Resource>(&self, name: &str) -> Option<R> {
        let (_, bytes) = self.has.get(&(R::TYPE_URL.to_owned(), name.to_owned()))?;
        Some(R::decode(bytes.as_slice()).unwrap())
    }

    /// Takes responses until what it has satisfies a condition.
    pub(crate) async fn until(&mut self, what: &str, condition: impl Fn(&Self) -> bool) {
        let all = async {
            while !condition(self) {
                self.next().await.unwrap();
            }
        };
        tokio::time::timeout(LIMIT, all).await.unwrap_or_else(|_| panic!("not in time: {what}"));
    }

    pub(crate) fn versions_of<R: Resource>(&self) -> Vec<(String, String)> {
        let of = self.has.iter().filter(|((url, _), _)| url == R::TYPE_URL);
        of.map(|((_, name), (version, _))| (name.clone(), version.clone())).collect()
    }

    pub(crate) fn endpoints(&self, service: &str) -> Vec<v1::Endpoint> {
        self.get::<v1::Endpoints>(service).map(|it| it.endpoints).unwrap_or_default()
    }
}

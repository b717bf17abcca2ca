//! Two proxies with one worker each before an application: the mesh path, for profiles and measurements.
//!
//! `mesh_path BACKEND_PORT [PROTOCOL [KEYS]]` prints where the path begins, where mesh peers come in, where anybody
//! does, and where the metrics of both proxies are written to whoever connects, and runs until it is killed. PROTOCOL is `detect` (default), `http`, `grpc` or `tcp`. Both proxies are this process, so its CPU time
//! is the path's. KEYS is a directory for what a peer needs to be one: `cert.pem`, `key.pem`.

use arc_swap::{ArcSwap, ArcSwapOption};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use rustls::pki_types::PrivateKeyDer;
use sheer_core::identity::SpiffeId;
use sheer_core::name::{DnsLabel, ServiceName};
use sheer_core::snapshot::{Endpoint, EndpointSet, Health, Hop, Protocol, Service, ServicePort, Snapshot};
use sheer_proxy::drain;
use sheer_proxy::metrics::Metrics;
use sheer_proxy::overload::Overload;
use sheer_proxy::plan::{self, Capture, Mode, Plan, PlannedPort, Role, ServiceRef};
use sheer_proxy::sync::{Demand, Demands};
use sheer_proxy::upstream::endpoint::Table;
use sheer_proxy::upstream::tls::Credentials;
use sheer_proxy::worker::{self, Door, Proxy, Workers};
use std::error::Error;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;

// As in the binary: memory is measured here too.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let backend: u16 = arguments.next().ok_or("usage: mesh_path BACKEND_PORT [PROTOCOL]")?.parse()?;
    let protocol = match arguments.next().as_deref() {
        None | Some("detect") => Protocol::Detect,
        Some("http") => Protocol::Http,
        Some("grpc") => Protocol::Grpc,
        Some("tcp") => Protocol::Tcp,
        Some(other) => return Err(format!("'{other}' is none of detect, http, grpc, tcp").into()),
    };
    let keys = arguments.next();
    let authority = Authority::new()?;
    if let Some(directory) = keys {
        authority.write_credentials("api", Path::new(&directory))?;
    }
    let web = ServiceName::parse("web")?;
    let listener = listen()?;
    let peers = listener.local_addr()?;
    let endpoint = Endpoint {
        workload: "local/host/default/web-1".into(),
        service_port: 80,
        address: peers,
        workload_port: backend,
        server_name: web.server_name(backend, "mesh.internal").into(),
        hop: Hop::Sheer1,
        health: Health::Healthy,
        weight: 1,
        at_address: true,
    };
    let anybody = listen()?;
    let published = anybody.local_addr()?;
    let doors =
        [Door { listener, role: Role::Inbound }, Door { listener: anybody, role: Role::Publish { port: backend } }];
    let inbound = Beside::start(&authority, "web", &[backend], &doors, |_| Ok(()))?;
    let listener = listen()?;
    let entrance: SocketAddr = listener.local_addr()?;
    let service = ServiceRef { namespace: "default".into(), name: "web".into() };
    let door = Door { listener, role: Role::Upstream { service, port: 80 } };
    let outbound = Beside::start(&authority, "api", &[], &[door], |proxy| {
        let mut snapshot = Snapshot::clone(&proxy.snapshot.load());
        let ports = vec![ServicePort { port: 80, protocol }];
        snapshot.put_service(Arc::new(Service { name: web.clone(), hosts: vec![], addresses: vec![], ports }));
        proxy.snapshot.store(Arc::new(snapshot));
        let id = SpiffeId::parse("spiffe://mesh.internal/ns/default/sa/web")?;
        proxy.endpoints.set(&web, Arc::new(EndpointSet::new(vec![id], vec![Arc::new(endpoint)])));
        Ok(())
    })?;
    let looked_at = listen()?;
    let metrics = looked_at.local_addr()?;
    println!("{entrance} pid {} peers {peers} published {published} metrics {metrics}", std::process::id());
    let all = [inbound.metrics.clone(), outbound.metrics.clone()];
    std::thread::spawn(move || {
        for mut stream in looked_at.incoming().flatten() {
            // Who does not read is not told.
            let _ = all.iter().try_for_each(|metrics| stream.write_all(metrics.exposition().as_bytes()));
        }
    });
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    runtime.block_on(async {
        let (mut inbound, mut outbound) = (inbound, outbound);
        tokio::join!(inbound.workers.join(), outbound.workers.join());
    });
    Ok(())
}

/// As many clients may come at once as to a proxy of the binary.
fn listen() -> std::io::Result<TcpListener> {
    const BACKLOG: i32 = 4096;
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

struct Beside {
    workers: Workers,
    metrics: Arc<Metrics>,
    _drain: drain::Signal,
    _demands: Demands,
}

impl Beside {
    fn start(
        authority: &Authority,
        name: &str,
        ports: &[u16],
        doors: &[Door],
        teach: impl FnOnce(&Proxy) -> Result<(), Box<dyn Error>>,
    ) -> Result<Self, Box<dyn Error>> {
        let (signal, watch) = drain::channel();
        let (demand, demands) = Demand::channel();
        let metrics = Arc::new(Metrics::new(1000));
        let proxy = Arc::new(Proxy {
            plan: plan(name, ports),
            snapshot: Arc::new(ArcSwap::from_pointee(Snapshot::new(DnsLabel::parse("default")?))),
            demand,
            credentials: Arc::new(ArcSwapOption::from(Some(authority.credentials(name)?))),
            overload: Overload::of_this_process(metrics.clone()),
            metrics: metrics.clone(),
            endpoints: Arc::new(Table::default()),
            drain: watch,
            inside: None,
            listening: None,
            clients: Arc::default(),
        });
        teach(&proxy)?;
        Ok(Self { workers: worker::start(&proxy, doors, 1)?, metrics, _drain: signal, _demands: demands })
    }
}

fn plan(name: &str, ports: &[u16]) -> Plan {
    Plan {
        service: format!("default/{name}"),
        name: format!("{name}-1"),
        service_account: name.into(),
        labels: vec![],
        ports: ports.iter().map(|port| PlannedPort { port: *port, protocol: plan::Protocol::Detect }).collect(),
        health: None,
        command: false,
        capture: Capture::None,
        mode: Mode::Strict,
        control: vec![],
        join_token_file: None,
        state: std::env::temp_dir(),
        address: None,
        network: String::new(),
        locality: String::new(),
        listeners: vec![],
        namespace_sockets: None,
        namespace_tables: vec![],
        supervisor: None,
        proxy_user: None,
        env_credentials: None,
        workload_user: None,
        resolvers: vec![],
        host_ports: vec![],
        trust_forwarded: vec![],
        access_log: false,
        drain_grace_ms: 1000,
        successor: false,
    }
}

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root: rustls::pki_types::CertificateDer<'static>,
}

impl Authority {
    fn new() -> Result<Self, Box<dyn Error>> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key)?.der().clone();
        Ok(Self { issuer: Issuer::new(params, key), root })
    }

    fn certify(&self, account: &str) -> Result<(Certificate, KeyPair), Box<dyn Error>> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        let name = format!("spiffe://mesh.internal/ns/default/sa/{account}");
        params.subject_alt_names = vec![SanType::URI(name.as_str().try_into()?)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        Ok((params.signed_by(&key, &self.issuer)?, key))
    }

    fn credentials(&self, account: &str) -> Result<Arc<Credentials>, Box<dyn Error>> {
        let (leaf, key) = self.certify(account)?;
        let key = PrivateKeyDer::try_from(key.serialize_der())?;
        Ok(Credentials::new(vec![leaf.der().clone()], key, "mesh.internal", std::slice::from_ref(&self.root))?)
    }

    /// For programs that speak as a mesh peer without a proxy of their own.
    fn write_credentials(&self, account: &str, directory: &Path) -> Result<(), Box<dyn Error>> {
        let (leaf, key) = self.certify(account)?;
        std::fs::write(directory.join("cert.pem"), leaf.pem())?;
        std::fs::write(directory.join("key.pem"), key.serialize_pem())?;
        Ok(())
    }
}

use super::*;
use crate::control::Machine;
use crate::control::fake::{Fake, Running};
use crate::dns::zone::Lookup;
use crate::identity::{Keeper, Wanted};
use sheer_core::cause::Cause;
use sheer_core::name::ServiceName;
use sheer_core::wire::v1::proxy_report::Body;
use sheer_core::wire::{Resource as _, pack};
use std::path::PathBuf;

/// A proxy without data path, and its control plane.
struct Scene {
    directory: tempfile::TempDir,
    fake: Fake,
}

struct Proxy {
    outputs: Outputs,
    demand: Demand,
    ready: watch::Receiver<bool>,
    ports: watch::Sender<BTreeSet<u16>>,
    leaving: watch::Sender<Leaving>,
    sync: JoinHandle<()>,
    keeper: JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.sync.abort();
        self.keeper.abort();
    }
}

const UID: &str = "local/host/default/web-1";

impl Scene {
    fn new() -> Self {
        let scene = Self { directory: tempfile::tempdir().unwrap(), fake: Fake::new() };
        scene.fake.put(pack(&scene.fake.mesh()));
        scene.fake.put(pack(&scene.fake.trust()));
        scene.fake.put(pack(&v1::Workload {
            uid: UID.into(),
            namespace: "default".into(),
            name: "web-1".into(),
            identity: "spiffe://mesh.internal/ns/default/sa/web".into(),
            mode: v1::Mode::Strict.into(),
            ..Default::default()
        }));
        scene.fake.put(pack(&service("api", 1)));
        scene
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("control.sock")
    }

    fn serve(&self) -> Running {
        self.fake.serve(&self.socket()).1
    }

    fn proxy(&self) -> Proxy {
        let directory = Directory::open(&self.directory.path().join("state")).unwrap();
        let namespace = DnsLabel::parse("default").unwrap();
        let metrics: Arc<Metrics> = Arc::default();
        let outputs = Outputs {
            snapshot: Arc::new(arc_swap::ArcSwap::from_pointee(sheer_core::snapshot::Snapshot::new(namespace.clone()))),
            endpoints: Arc::default(),
            zone: Arc::default(),
            changed: Arc::new(watch::channel(0).0),
            trust: Arc::new(watch::channel(None).0),
            metrics: metrics.clone(),
        };
        let wanted = Wanted {
            namespace: "default".into(),
            service_account: "web".into(),
            workload: "web-1".into(),
            control: vec![Address::Unix(self.socket())],
            token_file: None,
        };
        let outside: Arc<dyn Outside> = Arc::new(Machine);
        let trust = outputs.trust.subscribe();
        let keeper = Keeper::new(wanted.clone(), directory.clone(), Arc::default(), trust, metrics, outside.clone());
        let (demand, demands) = Demand::channel();
        let (ports, ready_ports) = watch::channel(BTreeSet::new());
        let (leaving, leaving_receiver) = watch::channel(Leaving::No);
        let registration = v1::Registration {
            namespace: "default".into(),
            name: "web-1".into(),
            ports: vec![v1::ListeningPort { port: 8080, mesh_port: 4000, ..Default::default() }],
            ..Default::default()
        };
        let sync = Sync::new(Setup {
            namespace,
            control: wanted.control,
            registration,
            ready_ports,
            leaving: leaving_receiver,
            held: keeper.held(),
            renew: keeper.renew(),
            demands,
            outputs: outputs.clone(),
            directory,
            outside,
        });
        let ready = sync.ready();
        let keeper = tokio::spawn(async move { drop(keeper.run().await) });
        Proxy { outputs, demand, ready, ports, leaving, sync: tokio::spawn(sync.run()), keeper }
    }

    fn reports(&self) -> Vec<Body> {
        self.fake.script.lock().reports.iter().filter_map(|it| it.body.clone()).collect()
    }
}

fn service(name: &str, last: u8) -> v1::Service {
    v1::Service {
        namespace: "default".into(),
        name: name.into(),
        hosts: vec![format!("{name}.default.svc.mesh.internal")],
        virtual_ips: vec![vec![240, 0, 0, last].into()],
        ports: vec![v1::ServicePort { port: 80, ..Default::default() }],
        ..Default::default()
    }
}

fn endpoints(name: &str, port: u32) -> v1::Endpoints {
    v1::Endpoints {
        namespace: "default".into(),
        name: name.into(),
        endpoints: vec![v1::Endpoint {
            workload: "u".into(),
            service_port: 80,
            address: vec![127, 0, 0, 1].into(),
            port,
            workload_port: 8080,
            hop: v1::Hop::Sheer1.into(),
            ..Default::default()
        }],
        identities: vec!["spiffe://mesh.internal/ns/default/sa/api".into()],
        requires: vec![],
    }
}

fn routes(name: &str, requires: &[&str]) -> v1::Routes {
    let path = Some(v1::http_match::Path::Prefix("/".into()));
    let matches = vec![v1::HttpMatch { path, ..Default::default() }];
    let backend = |name: &str| v1::Backend {
        namespace: "default".into(),
        name: name.into(),
        port: 80,
        weight: 1,
        ..Default::default()
    };
    let rule = v1::HttpRule { matches, backends: vec![backend("canary")], ..Default::default() };
    v1::Routes {
        namespace: "default".into(),
        name: name.into(),
        http: vec![v1::HttpRoute {
            namespace: "default".into(),
            name: "r".into(),
            rules: vec![rule],
            ..Default::default()
        }],
        requires: requires.iter().map(|&it| it.to_owned()).collect(),
    }
}

fn name(text: &str) -> ServiceName {
    ServiceName::parse(text).unwrap()
}

async fn until(mut condition: impl FnMut() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), wait).await.expect("it happens within 30 s");
}

impl Proxy {
    fn port_of(&self, service: &str) -> Option<u16> {
        let cell = self.outputs.endpoints.get(&name(service))?;
        let live = cell.load();
        live.as_ref()?.of_port(80).first().map(|it| it.endpoint.address.port())
    }

    /// Waits until what it has is on disk.
    async fn is_stored(&self, scene: &Scene) {
        let held = self.outputs.snapshot.load().services().count();
        let stored = Directory::open(&scene.directory.path().join("state")).unwrap();
        let services = |it: &Configuration| {
            let urls = it.resources.iter().filter_map(|it| it.resource.as_ref()).map(|any| any.type_url.as_str());
            urls.filter(|url| *url == v1::Service::TYPE_URL).count()
        };
        until(|| {
            Configuration::load(&stored).is_some_and(|it| services(&it) == held && it.resources.len() >= held + 3)
        })
        .await;
    }

    async fn is_ready(&mut self) {
        tokio::time::timeout(Duration::from_secs(20), self.ready.wait_for(|it| *it)).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn what_is_used_first_is_fetched_then_kept_up_to_date() {
    let scene = Scene::new();
    let _running = scene.serve();
    let mut proxy = scene.proxy();
    proxy.is_ready().await;
    let snapshot = proxy.outputs.snapshot.load_full();
    assert!(snapshot.service_named("api").is_some() && snapshot.workload().is_some());
    assert!(matches!(proxy.outputs.zone.load().lookup("api.default.svc.mesh.internal"), Lookup::Found(_)));
    assert!(proxy.outputs.endpoints.get(&name("api")).is_none(), "endpoints come on demand");
    scene.fake.put(pack(&endpoints("api", 4000)));
    proxy.demand.first_use(&name("api")).await.unwrap();
    assert_eq!(proxy.port_of("api"), Some(4000));
    // There is nothing of this one, and that is known at once.
    proxy.demand.first_use(&name("nobody")).await.unwrap();
    assert_eq!(proxy.port_of("nobody"), None);
    assert!(proxy.outputs.endpoints.get(&name("nobody")).is_some());
    // Changes arrive without being asked for.
    scene.fake.put(pack(&endpoints("api", 4001)));
    until(|| proxy.port_of("api") == Some(4001)).await;
    scene.fake.put(pack(&routes("api", &[])));
    until(|| proxy.outputs.snapshot.load().routes(&name("api")).is_some()).await;
    until(|| proxy.outputs.endpoints.get(&name("canary")).is_some()).await;
    scene.fake.remove(v1::Service::TYPE_URL, "default/api");
    until(|| proxy.outputs.snapshot.load().service_named("api").is_none()).await;
    assert_eq!(proxy.outputs.zone.load().lookup("api.default.svc.mesh.internal"), Lookup::Missing);
}

#[tokio::test]
async fn who_is_at_an_address_is_asked_once() {
    let scene = Scene::new();
    let _running = scene.serve();
    let mut proxy = scene.proxy();
    proxy.is_ready().await;
    let told = |last: u8, services: &[&str]| v1::Address {
        address: vec![10, 0, 0, last].into(),
        services: services.iter().map(|it| format!("default/{it}")).collect(),
        requires: vec![],
    };
    let at = |last: u8| std::net::IpAddr::from([10, 0, 0, last]);
    scene.fake.put(pack(&endpoints("api", 4000)));
    scene.fake.put(pack(&told(7, &["api"])));
    proxy.demand.who_is_at(at(7)).await.unwrap();
    assert!(proxy.outputs.endpoints.knows_address(at(7)));
    assert_eq!(proxy.port_of("api"), Some(4000), "the endpoints are there as soon as the address is known");
    // Nobody of the mesh: known as well, until somebody comes.
    proxy.demand.who_is_at(at(8)).await.unwrap();
    assert!(proxy.outputs.endpoints.knows_address(at(8)) && proxy.port_of("late").is_none());
    scene.fake.put(pack(&endpoints("late", 4001)));
    scene.fake.put(pack(&told(8, &["late"])));
    until(|| proxy.port_of("late") == Some(4001)).await;
    // Whoever calls half the world does not keep it.
    for last in 0..view::MAX_ADDRESSES {
        let other = std::net::IpAddr::from([10, 1, (last / 256) as u8, (last % 256) as u8]);
        proxy.demand.who_is_at(other).await.unwrap();
    }
    assert!(!proxy.outputs.endpoints.knows_address(at(7)));
    until(|| {
        let script = scene.fake.script.lock();
        script.requests.iter().any(|it| it.resource_names_unsubscribe.contains(&at(7).to_string()))
    })
    .await;
    proxy.demand.who_is_at(at(7)).await.unwrap();
}

#[tokio::test]
async fn a_bad_resource_is_refused_alone() {
    let scene = Scene::new();
    let bad = v1::Service { requires: vec!["teleport".into()], ..service("bad", 2) };
    scene.fake.put(pack(&bad));
    let mut lying = pack(&service("lying", 3));
    lying.version = "0".repeat(32);
    scene.fake.put(lying);
    scene.fake.put(pack(&routes("api", &["teleport"])));
    let _running = scene.serve();
    let mut proxy = scene.proxy();
    proxy.is_ready().await;
    let snapshot = proxy.outputs.snapshot.load_full();
    assert!(snapshot.service_named("api").is_some());
    assert!(snapshot.service_named("bad").is_none() && snapshot.service_named("lying").is_none());
    // Routes that cannot be taken must not let everything through to the service.
    proxy.demand.first_use(&name("api")).await.unwrap();
    assert!(proxy.outputs.snapshot.load().routes(&name("api")).is_some());
    let refused = || -> Vec<v1::Refused> {
        let script = scene.fake.script.lock();
        let details = script.requests.iter().filter_map(|it| it.error_detail.as_ref()).flat_map(|it| &it.details);
        details.filter_map(|it| v1::Refused::decode(it.value.as_slice()).ok()).collect()
    };
    until(|| refused().len() == 3).await;
    let mut named: Vec<(String, String)> = refused().into_iter().map(|it| (it.name, it.reason)).collect();
    named.sort();
    let names: Vec<&str> = named.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["default/api", "default/bad", "default/lying"]);
    assert!(named[1].1.contains("teleport"), "{named:?}");
    assert!(proxy.outputs.metrics.exposition().contains("sheer_resources_refused_total 3"));
}

#[tokio::test]
async fn the_one_before_a_refused_resource_stays_in_force() {
    let scene = Scene::new();
    scene.fake.put(pack(&endpoints("api", 4000)));
    scene.fake.put(pack(&routes("api", &[])));
    let _running = scene.serve();
    let mut proxy = scene.proxy();
    proxy.is_ready().await;
    proxy.demand.first_use(&name("api")).await.unwrap();
    scene.fake.put(pack(&v1::Service { requires: vec!["teleport".into()], ..service("api", 9) }));
    scene.fake.put(pack(&v1::Endpoints { requires: vec!["teleport".into()], ..endpoints("api", 4001) }));
    scene.fake.put(pack(&routes("api", &["teleport"])));
    // What comes after them is applied.
    scene.fake.put(pack(&service("later", 5)));
    until(|| proxy.outputs.snapshot.load().service_named("later").is_some()).await;
    until(|| proxy.outputs.metrics.exposition().contains("sheer_resources_refused_total 3")).await;
    let snapshot = proxy.outputs.snapshot.load_full();
    let api = snapshot.service_named("api").expect("the service stays");
    assert!(snapshot.service_at(std::net::IpAddr::from([240, 0, 0, 1])).is_some_and(|it| it.name == api.name));
    assert_eq!(proxy.port_of("api"), Some(4000));
    let head = sheer_core::head::RequestHead::new(http::Method::GET, sheer_core::head::Version::Http11, "api", "/");
    let sheer_core::route::Verdict::Rule(rule) = snapshot.route(api, 80, &head) else { panic!("the routes stay") };
    assert_eq!(rule.backend(0).map(|it| it.service.to_string()), Ok("default/canary".to_owned()));
}

#[tokio::test]
async fn a_proxy_starts_from_disk_without_a_control_plane() {
    let scene = Scene::new();
    scene.fake.put(pack(&endpoints("api", 4000)));
    let running = scene.serve();
    let mut proxy = scene.proxy();
    proxy.is_ready().await;
    proxy.demand.first_use(&name("api")).await.unwrap();
    let stored = Directory::open(&scene.directory.path().join("state")).unwrap();
    until(|| Configuration::load(&stored).is_some_and(|it| it.resources.len() >= 5 && !it.absent.is_empty())).await;
    drop(running);
    drop(proxy);

    let begun = Instant::now();
    let mut proxy = scene.proxy();
    proxy.is_ready().await;
    assert!(begun.elapsed() < Duration::from_millis(500), "ready after {:?}", begun.elapsed());
    assert_eq!(proxy.port_of("api"), Some(4000));
    assert!(matches!(proxy.outputs.zone.load().lookup("api.default.svc.mesh.internal"), Lookup::Found(_)));
    proxy.demand.first_use(&name("api")).await.unwrap();
    assert_eq!(proxy.demand.first_use(&name("never-used")).await, Err(Cause::ControlPlaneAway));

    // Back again, it resumes: what it has is not sent again.
    scene.fake.script.lock().requests.clear();
    let _running = scene.serve();
    scene.fake.put(pack(&service("new", 9)));
    until(|| proxy.outputs.snapshot.load().service_named("new").is_some()).await;
    let first = {
        let script = scene.fake.script.lock();
        script.requests.iter().find(|it| it.type_url == v1::Service::TYPE_URL).cloned().unwrap()
    };
    assert_eq!(first.initial_resource_versions.get("default/api"), Some(&pack(&service("api", 1)).version));
    assert_eq!(first.node.as_ref().map(|it| it.id.as_str()), Some(UID));
    proxy.is_ready().await;
}

#[tokio::test]
async fn a_control_plane_that_hangs_keeps_a_restarted_proxy_for_less_than_a_second() {
    let scene = Scene::new();
    let running = scene.serve();
    let mut proxy = scene.proxy();
    proxy.is_ready().await;
    proxy.is_stored(&scene).await;
    drop((running, proxy));
    // It takes connections, and says nothing.
    std::fs::remove_file(scene.socket()).unwrap();
    let _hanging = tokio::net::UnixListener::bind(scene.socket()).unwrap();
    let begun = Instant::now();
    let mut proxy = scene.proxy();
    proxy.is_ready().await;
    assert!(begun.elapsed() < Duration::from_secs(1), "ready after {:?}", begun.elapsed());
    assert!(proxy.outputs.snapshot.load().service_named("api").is_some());
}

#[tokio::test]
async fn what_another_control_plane_told_is_not_served() {
    let scene = Scene::new();
    scene.fake.put(pack(&endpoints("api", 4000)));
    scene.fake.put(pack(&service("old", 7)));
    let running = scene.serve();
    let mut proxy = scene.proxy();
    proxy.is_ready().await;
    proxy.demand.first_use(&name("api")).await.unwrap();
    proxy.is_stored(&scene).await;
    drop((running, proxy));

    // Its successor of the same name began anew, with roots of its own, and knows nothing of before.
    let mut anew = Scene::new();
    anew.fake.put(pack(&endpoints("api", 4001)));
    let _running = anew.fake.serve(&scene.socket()).1;
    let mut proxy = scene.proxy();
    assert!(!*proxy.ready.borrow(), "what is on disk does not count before anybody was asked");
    proxy.is_ready().await;
    let snapshot = proxy.outputs.snapshot.load_full();
    assert!(snapshot.service_named("api").is_some() && snapshot.service_named("old").is_none());
    assert_ne!(proxy.port_of("api"), Some(4000));
    proxy.demand.first_use(&name("api")).await.unwrap();
    assert_eq!(proxy.port_of("api"), Some(4001));

    // A certificate of the one beside the configuration of the other: nobody needs to be asked.
    drop(proxy);
    anew.directory = scene.directory;
    let stored = Directory::open(&anew.directory.path().join("state")).unwrap();
    let foreign =
        Configuration { resources: vec![pack(&Fake::new().trust()), pack(&service("old", 7))], ..Default::default() };
    stored.save(CONFIGURATION, &foreign.encode_to_vec()).unwrap();
    let proxy = anew.proxy();
    assert!(proxy.outputs.snapshot.load().service_named("old").is_none());
}

#[tokio::test]
async fn how_to_come_back_is_remembered() {
    let scene = Scene::new();
    scene.fake.script.lock().return_within_ms = 1234;
    let running = scene.serve();
    let mut proxy = scene.proxy();
    proxy.is_ready().await;
    proxy.is_stored(&scene).await;
    drop(running);
    let stored = Directory::open(&scene.directory.path().join("state")).unwrap();
    until(|| Configuration::load(&stored).is_some_and(|it| it.return_within_ms == 1234)).await;
}

#[tokio::test]
async fn what_happened_is_reported_to_the_end() {
    let scene = Scene::new();
    let _running = scene.serve();
    let mut proxy = scene.proxy();
    proxy.is_ready().await;
    until(|| !scene.reports().is_empty()).await;
    let Body::Registration(registration) = scene.reports().remove(0) else { panic!("registration comes first") };
    assert!(!registration.ports[0].ready);
    proxy.ports.send_replace(BTreeSet::from([8080]));
    until(|| scene.reports().contains(&Body::Health(v1::PortHealth { ready: vec![8080] }))).await;
    proxy.demand.unreachable("somebody");
    until(|| scene.reports().contains(&Body::Unreachable(v1::Unreachable { workload: "somebody".into() }))).await;
    let edge = proxy.outputs.metrics.edge(&crate::metrics::tests::key("default/web", "default/api"));
    edge.count(200, -1, None);
    let counted = |reports: &[Body]| -> u64 {
        let of = |it: &Body| match it {
            Body::Telemetry(it) => it.edges[0].responses.iter().map(|it| it.count).sum(),
            _ => 0,
        };
        reports.iter().map(of).max().unwrap_or_default()
    };
    until(|| counted(&scene.reports()) == 1).await;
    proxy.leaving.send_replace(Leaving::Draining { grace_ms: 5 });
    until(|| scene.reports().contains(&Body::Draining(v1::Draining { grace_ms: 5 }))).await;
    proxy.leaving.send_replace(Leaving::Gone { reason: "the command ended".into() });
    until(|| scene.reports().contains(&Body::Goodbye(v1::Goodbye { reason: "the command ended".into() }))).await;
    // Counted after the last regular report.
    edge.count(503, -1, Some(Cause::Draining));
    proxy.leaving.send_replace(Leaving::Done);
    tokio::time::timeout(Duration::from_secs(10), &mut proxy.sync).await.unwrap().unwrap();
    until(|| counted(&scene.reports()) == 2).await;
    assert_eq!(scene.reports().iter().filter(|it| matches!(it, Body::Goodbye(_))).count(), 1);
}

#[tokio::test]
async fn a_proxy_ends_without_a_control_plane() {
    let scene = Scene::new();
    let mut proxy = scene.proxy();
    proxy.leaving.send_replace(Leaving::Done);
    tokio::time::timeout(Duration::from_secs(10), &mut proxy.sync).await.unwrap().unwrap();
}

#[test]
fn many_proxies_come_back_one_by_one_and_few_at_once() {
    assert!((0..200).all(|_| pause(0, Some(9000)) <= AT_ONCE && pause(0, None) <= AT_ONCE));
    for failures in [1, 2, 7, 1000] {
        let pauses: Vec<Duration> = (0..200).map(|_| pause(failures, Some(9000))).collect();
        let (first, last) = (pauses.iter().min().unwrap(), pauses.iter().max().unwrap());
        assert!(*last - *first > Duration::from_secs(5), "{failures}: {first:?} to {last:?}");
        assert!(*last <= Duration::from_secs(9));
        // Neither a control plane that says nothing nor one that says too much.
        assert!((0..200).all(|_| pause(failures, Some(0)) <= BETWEEN && pause(failures, Some(u32::MAX)) <= BETWEEN));
        assert!((0..200).all(|_| pause(failures, Some(500)) <= AFTER_LOSS_LAST));
        assert!((0..200).all(|_| pause(failures, None) <= STARTING_LAST));
    }
    assert!((0..200).all(|_| pause(1, Some(500)) <= AFTER_LOSS && pause(1, None) <= STARTING_FIRST));
}

#[test]
fn every_type_is_known_by_its_url() {
    for kind in view::Kind::ALL {
        assert_eq!(view::Kind::of(kind.type_url()), Some(kind));
    }
    assert_eq!(view::Kind::of("x"), None);
}

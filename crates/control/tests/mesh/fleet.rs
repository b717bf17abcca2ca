//! Workloads come, fall ill and go.

use crate::Fixture;
use crate::client::{self, Credentials, Discovery, Name, certify};
use sheer_core::wire::v1::{self, Health, proxy_report};

const API: &str = "default/api";

#[tokio::test]
async fn a_registered_workload_is_an_endpoint_until_its_stream_closes() {
    let mesh = Fixture::start().await;
    let mut watcher = mesh.watcher(API).await;
    watcher.next().await.unwrap();
    assert!(watcher.removed.iter().any(|(_, name)| name == API), "an unknown name is answered");
    let (_channel, attached) = mesh.workload(&Name::new("api", "api-1"), API).await;
    watcher.until("the endpoint", |it| it.endpoints(API).len() == 2).await;
    // Port 80 of an implied service leads to its first HTTP port.
    let ports: Vec<u32> = watcher.endpoints(API).iter().map(|it| it.service_port).collect();
    assert_eq!(ports, [80, 8080]);
    let endpoints: v1::Endpoints = watcher.get(API).unwrap();
    assert_eq!(endpoints.identities, ["spiffe://mesh.internal/ns/default/sa/api"]);
    assert_eq!(endpoints.endpoints[0].address.as_ref(), [127, 0, 0, 1]);

    attached.send(proxy_report::Body::Health(v1::PortHealth { ready: vec![] })).await;
    watcher.until("not ready", |it| it.endpoints(API).is_empty()).await;
    attached.send(proxy_report::Body::Health(v1::PortHealth { ready: vec![8080] })).await;
    watcher.until("ready", |it| it.endpoints(API).len() == 2).await;
    attached.send(proxy_report::Body::Draining(v1::Draining { grace_ms: 1000 })).await;
    let all = |it: &Discovery, health: Health| it.endpoints(API).iter().all(|it| it.health() == health);
    watcher.until("draining", |it| all(it, Health::Draining)).await;
    drop(attached);
    watcher.until("gone", |it| it.endpoints(API).is_empty()).await;
}

/// Rules that redirect what arrives at an application's own port leave loopback alone.
#[tokio::test]
async fn a_captured_workload_at_loopback_is_dialled_at_its_proxys_port() {
    let mesh = Fixture::start().await;
    let mut watcher = mesh.watcher(API).await;
    let name = Name::new("api", "api-1");
    let (channel, attached) = mesh.workload(&name, API).await;
    drop(attached);
    let mut adopted = client::registration(&name, API);
    (adopted.ports[0].mesh_port, adopted.ports[0].loopback_port) = (8080, 40002);
    let _attached = client::attach(&channel, adopted.clone()).await.unwrap();
    let dialled = |it: &Discovery, port: u32| {
        let endpoints = it.endpoints(API);
        !endpoints.is_empty() && endpoints.iter().all(|it| it.port == port && it.workload_port == 8080)
    };
    watcher.until("the proxy's port", |it| dialled(it, 40002)).await;
    // Elsewhere the rules hold, and no port has to be opened for the mesh.
    adopted.address = "192.0.2.7".to_owned();
    let _moved = client::attach(&channel, adopted.clone()).await.unwrap();
    watcher.until("its own port", |it| dialled(it, 8080)).await;
    // Who watches is called in plaintext, wherever it is.
    (adopted.address, adopted.ports[0].hop) = (String::new(), v1::Hop::None.into());
    let _watching = client::attach(&channel, adopted).await.unwrap();
    watcher.until("plaintext", |it| dialled(it, 8080) && it.endpoints(API)[0].address.as_ref() == [127, 0, 0, 1]).await;
}

/// Whose program listens at a port of a host cannot be told from afar.
#[tokio::test]
async fn callers_of_an_address_are_led_elsewhere_only_where_the_port_was_granted() {
    const WRITTEN: &str = "
apiVersion: sheer.dev/v1alpha1
kind: Workload
metadata: {name: known-1}
spec: {serviceAccount: known, ports: [{port: 8080}]}
";
    let mesh = Fixture::with_config(&[("known.yaml", WRITTEN)]).await;
    let mut watcher = mesh.watcher(API).await;
    let mut streams = Vec::new();
    for (account, mesh_port, found) in
        [("thief", 40001, false), ("captured", 8080, true), ("known", 40001, true), ("own", 40001, true)]
    {
        let (name, service) = (Name::new(account, &format!("{account}-1")), format!("default/{account}"));
        let channel = match account {
            "own" => mesh.workload(&name, &service).await.0,
            _ => client::join(&mesh.token(account).await, &name).await.unwrap().0,
        };
        let mut registration = client::registration(&name, &service);
        (registration.ports[0].mesh_port, registration.ports[0].at_address) = (mesh_port, true);
        streams.push(client::attach(&channel, registration).await.unwrap());
        watcher.subscribe::<v1::Endpoints>(&[&service]).await;
        let told = |it: &Discovery| it.endpoints(&service).iter().map(|it| it.at_address).collect::<Vec<_>>();
        watcher.until(account, |it| told(it) == [found, found]).await;
    }
}

#[tokio::test]
async fn a_closed_stream_is_suspect_at_once_and_may_return() {
    let mesh = Fixture::start().await;
    let mut watcher = mesh.watcher(API).await;
    let name = Name::new("api", "api-1");
    let (channel, attached) = mesh.workload(&name, API).await;
    watcher.until("the endpoint", |it| it.endpoints(API).len() == 2).await;
    drop(attached);
    let first = |it: &Discovery| it.endpoints(API).first().map(|it| it.health());
    watcher.until("suspect", |it| first(it) == Some(Health::Suspect)).await;
    let _attached = client::attach(&channel, client::registration(&name, API)).await.unwrap();
    watcher.until("healthy again", |it| first(it) == Some(Health::Healthy)).await;
}

#[tokio::test]
async fn another_service_account_gets_nothing_of_a_service() {
    let mesh = Fixture::start().await;
    let mut watcher = mesh.watcher(API).await;
    let (_victim, _attached) = mesh.workload(&Name::new("api", "api-1"), API).await;
    watcher.until("the endpoint", |it| it.endpoints(API).len() == 2).await;

    let thief = Name::new("thief", "thief-1");
    let channel = mesh.unix().await;
    certify(&channel, &mut Credentials::new(), &thief, "").await.unwrap();
    let mut claim = client::registration(&thief, API);
    claim.labels = vec![v1::Label { name: "app".into(), value: "api".into() }];
    let mut attached = client::attach(&channel, claim).await.unwrap();
    match attached.notice().await {
        v1::control_notice::Body::Registered(registered) => {
            assert!(registered.warnings[0].contains("gets no traffic of default/api"), "{registered:?}");
        }
        other => panic!("{other:?}"),
    }
    // A later change of the victim arrives, the thief does not.
    let (_second, _attached) = mesh.workload(&Name::new("api", "api-2"), API).await;
    watcher.until("the second endpoint", |it| it.endpoints(API).len() == 4).await;
    let endpoints: v1::Endpoints = watcher.get(API).unwrap();
    assert!(endpoints.endpoints.iter().all(|it| !it.workload.contains("thief")));
    assert_eq!(endpoints.identities, ["spiffe://mesh.internal/ns/default/sa/api"]);
}

#[tokio::test]
async fn a_name_belongs_to_the_identity_that_has_it() {
    let mesh = Fixture::start().await;
    let (_channel, _attached) = mesh.workload(&Name::new("api", "api-1"), API).await;
    let channel = mesh.unix().await;
    let refused = certify(&channel, &mut Credentials::new(), &Name::new("thief", "api-1"), "").await.unwrap_err();
    assert!(refused.message().contains("the workload name is taken"), "{refused}");
}

#[tokio::test]
async fn two_hosts_that_chose_the_same_name_are_two_workloads() {
    let mesh = Fixture::start().await;
    let name = Name::new("api", "api-1");
    let (first, attached) = mesh.workload(&name, API).await;
    let second = mesh.unix().await;
    let mut other = Credentials::new();
    let refused = certify(&second, &mut other, &name, "").await.unwrap_err();
    assert!(refused.message().contains("connected, with another key"), "{refused}");
    // When the first is gone the name is free, also for a new key.
    drop((first, attached));
    let start = std::time::Instant::now();
    while certify(&second, &mut other, &name, "").await.is_err() {
        assert!(start.elapsed().as_secs() < 10, "the name is still taken");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_workload_cannot_read_or_speak_for_another() {
    let mesh = Fixture::start().await;
    let victim = Name::new("api", "api-1");
    let (_channel, _attached) = mesh.workload(&victim, API).await;
    let (token, name) = (mesh.token("thief").await, Name::new("thief", "thief-1"));
    let (channel, _credentials) = client::join(&token, &name).await.unwrap();
    let mut discovery = Discovery::open(&channel, &name.uid()).await.unwrap();
    discovery.subscribe::<v1::Workload>(&[&victim.uid()]).await;
    discovery.next().await.unwrap();
    assert!(discovery.get::<v1::Workload>(&victim.uid()).is_none());
    // Nor by saying that it is the other one.
    let mut liar = Discovery::open(&channel, &victim.uid()).await.unwrap();
    liar.subscribe::<v1::Workload>(&[&victim.uid()]).await;
    assert_eq!(liar.next().await.unwrap_err().code(), tonic::Code::PermissionDenied);
    let mut attached = client::attach(&channel, client::registration(&victim, API)).await.unwrap();
    assert!(matches!(attached.notice().await, v1::control_notice::Body::Refused(_)));
    // An address that nobody granted.
    let mut claim = client::registration(&name, "default/thief");
    claim.address = "10.9.8.7".into();
    let mut attached = client::attach(&channel, claim).await.unwrap();
    match attached.notice().await {
        v1::control_notice::Body::Refused(refused) => {
            assert!(refused.reason.contains("10.9.8.7 is not granted"), "{refused:?}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn stored_registrations_hold_over_a_restart() {
    let mesh = Fixture::start().await;
    let (_channel, attached) = mesh.workload(&Name::new("api", "api-1"), API).await;
    let mut watcher = mesh.watcher(API).await;
    watcher.until("the endpoint", |it| it.endpoints(API).len() == 2).await;
    let mut before = watcher.versions_of::<v1::Endpoints>();
    let service_ip = {
        watcher.subscribe::<v1::Service>(&["*"]).await;
        watcher.until("the service", |it| it.get::<v1::Service>(API).is_some()).await;
        watcher.get::<v1::Service>(API).unwrap().virtual_ips
    };
    let mesh = mesh.restart().await;
    drop((attached, watcher));
    let mut watcher = mesh.watcher(API).await;
    watcher.until("the endpoint", |it| it.endpoints(API).len() == 2).await;
    let mut after = watcher.versions_of::<v1::Endpoints>();
    before.sort();
    after.sort();
    assert_eq!(before, after, "nothing changed, so versions are the same");
    watcher.subscribe::<v1::Service>(&["*"]).await;
    watcher.until("the service", |it| it.get::<v1::Service>(API).is_some()).await;
    assert_eq!(watcher.get::<v1::Service>(API).unwrap().virtual_ips, service_ip);
}

/// A relay that can be told to drop everything, as a network does.
async fn relay(to: std::net::SocketAddr) -> (std::net::SocketAddr, tokio::sync::watch::Sender<bool>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (drop_all, dropping) = tokio::sync::watch::channel(false);
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let mut dropping = dropping.clone();
            tokio::spawn(async move {
                let mut far = tokio::net::TcpStream::connect(to).await.unwrap();
                let dropped = async {
                    let _ = dropping.wait_for(|dropping| *dropping).await;
                };
                tokio::select! {
                    _ = tokio::io::copy_bidirectional(&mut near, &mut far) => return,
                    () = dropped => {}
                }
                // Both ends stay open and nothing passes.
                std::future::pending::<()>().await;
            });
        }
    });
    (address, drop_all)
}

#[tokio::test]
async fn a_silent_workload_is_suspect_until_a_peer_cannot_reach_it_either() {
    let mesh = Fixture::start().await;
    let (_channel, other) = mesh.workload(&Name::new("api", "api-1"), API).await;
    let (token, name) = (mesh.token("api").await, Name::new("api", "api-2"));
    let (_joined, credentials) = client::join(&token, &name).await.unwrap();
    let root = sheer_core::token::JoinToken::parse(&token).unwrap().root_sha256;
    let (address, drop_all) = relay(mesh.plane.proxy_address().unwrap()).await;
    let channel = client::connect_tls(address, root, Some(&credentials)).await.unwrap();
    let _silent = client::attach(&channel, client::registration(&name, API)).await.unwrap();
    let mut watcher = mesh.watcher(API).await;
    let health = |it: &Discovery| {
        let endpoints = it.endpoints(API);
        endpoints.iter().find(|it| it.workload == name.uid()).map(|it| it.health())
    };
    watcher.until("both", |it| health(it) == Some(Health::Healthy)).await;
    drop_all.send_replace(true);
    watcher.until("suspect", |it| health(it) == Some(Health::Suspect)).await;
    // Silence alone takes nobody's endpoint away, however long it lasts: one that hangs up is suspect for a second, too.
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    let mut later = mesh.watcher(API).await;
    later.until("still suspect", |it| it.endpoints(API).len() == 4 && health(it) == Some(Health::Suspect)).await;
    other.send(proxy_report::Body::Unreachable(v1::Unreachable { workload: name.uid() })).await;
    watcher.until("gone", |it| health(it).is_none()).await;
    // The last one of a service stays, whatever peers say.
    let reporter = mesh.workload(&Name::new("web", "web-1"), "default/web").await;
    reporter
        .1
        .send(proxy_report::Body::Unreachable(v1::Unreachable { workload: "local/host/default/api-1".into() }))
        .await;
    assert_eq!(watcher.endpoints(API).len(), 2);
}

#[tokio::test]
async fn a_herd_of_two_hundred_attaches_at_once() {
    let mesh = Fixture::start().await;
    let herd = (0..200).map(|number| {
        let name = Name::new("api", &format!("api-{number}"));
        let mesh = &mesh;
        async move { mesh.workload(&name, API).await }
    });
    let attached = futures::future::join_all(herd).await;
    let mut watcher = mesh.watcher(API).await;
    watcher.until("all of them", |it| it.endpoints(API).len() == 400).await;
    drop(attached);
    watcher.until("none", |it| it.endpoints(API).is_empty()).await;
}

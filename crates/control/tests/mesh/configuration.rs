//! From a saved file to the proxies.

use crate::client::Discovery;
use crate::{Fixture, Name, until};
use sheer_core::wire::Resource;
use sheer_core::wire::v1;

fn service(name: &str, port: u16) -> String {
    format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: {port}}}]}}\n")
}

async fn index(mesh: &Fixture) -> Discovery {
    let discovery = mesh.watcher("default/web").await;
    discovery.subscribe::<v1::Service>(&["*"]).await;
    discovery
}

#[tokio::test]
async fn a_renamed_file_reaches_a_proxy() {
    let mesh = Fixture::with_config(&[("web.yaml", &service("web", 80))]).await;
    let mut proxy = index(&mesh).await;
    proxy.until("the service", |it| it.get::<v1::Service>("default/web").is_some()).await;
    let config = mesh.directory.path().join("config");
    std::fs::write(config.join(".staged"), service("web", 81)).unwrap();
    std::fs::rename(config.join(".staged"), config.join("web.yaml")).unwrap();
    let port = |it: &Discovery| it.get::<v1::Service>("default/web").map(|it| it.ports[0].port);
    proxy.until("the new port", |it| port(it) == Some(81)).await;
    std::fs::remove_file(config.join("web.yaml")).unwrap();
    proxy.until("its end", |it| port(it).is_none()).await;
}

#[tokio::test]
async fn a_wrong_file_leaves_the_old_configuration() {
    let mesh = Fixture::with_config(&[("web.yaml", &service("web", 80))]).await;
    let config = mesh.directory.path().join("config");
    std::fs::write(config.join("web.yaml"), service("web", 81).replace("ports", "prots")).unwrap();
    let directory = || mesh.plane.control().configuration();
    until("the diagnostic", || directory().diagnostics.iter().any(|it| it.is_error())).await;
    let diagnostic = directory().diagnostics.into_iter().find(|it| it.is_error()).unwrap();
    assert_eq!((diagnostic.file.as_str(), diagnostic.line > 0), ("web.yaml", true));
    let mut proxy = index(&mesh).await;
    proxy.until("the service", |it| it.get::<v1::Service>("default/web").is_some()).await;
    assert_eq!(proxy.get::<v1::Service>("default/web").unwrap().ports[0].port, 80);
    // The directory vanishes: still the old one.
    std::fs::rename(&config, mesh.directory.path().join("away")).unwrap();
    until("noticed", || directory().unreadable.is_some()).await;
    std::fs::create_dir(&config).unwrap();
    std::fs::write(config.join("web.yaml"), service("web", 82)).unwrap();
    let port = |it: &Discovery| it.get::<v1::Service>("default/web").map(|it| it.ports[0].port);
    proxy.until("the directory is back", |it| port(it) == Some(82)).await;
}

#[tokio::test]
async fn what_was_in_force_stays_so_over_a_restart() {
    let domain =
        "apiVersion: sheer.dev/v1alpha1\nkind: Mesh\nmetadata: {name: mesh}\nspec: {trustDomain: prod.internal}\n";
    let mesh = Fixture::with_config(&[("web.yaml", &service("web", 80)), ("mesh.yaml", domain)]).await;
    let config = mesh.directory.path().join("config");
    std::fs::write(config.join("web.yaml"), service("web", 81).replace("ports", "prots")).unwrap();
    let port = |it: &Discovery| it.get::<v1::Service>("default/web").map(|it| it.ports[0].port);
    let mesh = mesh.restart().await;
    assert!(mesh.plane.control().configuration().diagnostics.iter().any(|it| it.is_error()));
    index(&mesh).await.until("the old service", |it| port(it) == Some(80)).await;
    std::fs::rename(&config, mesh.directory.path().join("away")).unwrap();
    let mesh = mesh.restart().await;
    assert!(mesh.plane.control().configuration().unreadable.is_some());
    let mut proxy = index(&mesh).await;
    proxy.until("the old service", |it| port(it) == Some(80)).await;
    // An empty directory is a configuration: nothing.
    std::fs::create_dir(&config).unwrap();
    proxy.until("nothing is written", |it| port(it).is_none()).await;
    let mesh = mesh.restart().await;
    assert!(mesh.plane.control().configuration().diagnostics.is_empty());
}

#[tokio::test]
async fn a_stream_resumes_with_what_it_has() {
    let files = [("a.yaml", service("a", 80)), ("b.yaml", service("b", 80)), ("c.yaml", service("c", 80))];
    let files: Vec<(&str, &str)> = files.iter().map(|(name, text)| (*name, text.as_str())).collect();
    let mesh = Fixture::with_config(&files).await;
    let mut proxy = index(&mesh).await;
    proxy.until("all", |it| it.versions_of::<v1::Service>().len() == 3).await;
    let mut versions = proxy.versions_of::<v1::Service>();
    drop(proxy);
    versions[1].1 = "0".repeat(32);
    versions.push(("default/gone".into(), "1".repeat(32)));
    let mut proxy = mesh.watcher("default/none").await;
    proxy.next().await.unwrap();
    proxy.resume::<v1::Service>(&["*"], &versions).await;
    let response = proxy.next().await.unwrap();
    assert_eq!(response.type_url, v1::Service::TYPE_URL);
    let names: Vec<&str> = response.resources.iter().map(|it| it.name.as_str()).collect();
    assert_eq!((names, response.removed_resources), (vec!["default/b"], vec!["default/gone".to_owned()]));
}

#[tokio::test]
async fn a_refused_version_is_shown_and_not_sent_again() {
    let mesh = Fixture::with_config(&[("web.yaml", &service("web", 80))]).await;
    let name = Name::new("api", "api-1");
    let (channel, _attached) = mesh.workload(&name, "default/api").await;
    let mut proxy = Discovery::open(&channel, &name.uid()).await.unwrap();
    proxy.refuse = Some("default/web".into());
    proxy.subscribe::<v1::Service>(&["*"]).await;
    proxy.until("the rest", |it| it.get::<v1::Service>("default/api").is_some()).await;
    let refused = || {
        let views = mesh.plane.control().workloads();
        views.into_iter().find(|it| it.uid == name.uid()).map(|it| it.refused).unwrap_or_default()
    };
    until("the refusal", || !refused().is_empty()).await;
    assert_eq!((refused()[0].name.as_str(), refused()[0].reason.as_str()), ("default/web", "not understood"));
    // Something else changes: the refused version stays away.
    let (_second, _attached) = mesh.workload(&Name::new("db", "db-1"), "default/db").await;
    proxy.until("the other service", |it| it.get::<v1::Service>("default/db").is_some()).await;
    assert_eq!(proxy.received.iter().filter(|name| *name == "default/web").count(), 1);
    // Mended, it is sent.
    proxy.refuse = None;
    std::fs::write(mesh.directory.path().join("config/web.yaml"), service("web", 81)).unwrap();
    proxy.until("the mended one", |it| it.get::<v1::Service>("default/web").is_some()).await;
    until("no refusal", || refused().is_empty()).await;
}

#[tokio::test]
async fn the_trust_domain_stays_while_it_runs() {
    let mesh = Fixture::start().await;
    let text = "apiVersion: sheer.dev/v1alpha1\nkind: Mesh\nmetadata: {name: mesh}\nspec:\n  trustDomain: other.example\n  \
                egress: deny\n";
    std::fs::write(mesh.directory.path().join("config/mesh.yaml"), text).unwrap();
    let mut proxy = mesh.watcher("default/web").await;
    proxy.subscribe::<v1::Mesh>(&["*"]).await;
    proxy.until("the rest of it", |it| it.get::<v1::Mesh>("mesh").is_some_and(|it| it.deny_unknown_egress)).await;
    assert_eq!(proxy.get::<v1::Mesh>("mesh").unwrap().trust_domain, "mesh.internal");
}

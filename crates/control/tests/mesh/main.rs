//! A whole control plane in this process, and proxies written by hand.

mod api;
mod client;
mod configuration;
mod fleet;
mod join;

use client::{Discovery, LIMIT, Name};
use sheer_control::clock::Clock;
use sheer_control::{ControlPlane, Options, start};
use sheer_core::api::TokenRequest;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};
use tonic::transport::Channel;

/// A control plane with directories of its own.
pub(crate) struct Fixture {
    pub(crate) plane: ControlPlane,
    pub(crate) directory: tempfile::TempDir,
    offset_s: Arc<AtomicI64>,
}

impl Fixture {
    pub(crate) async fn start() -> Self {
        Self::with_config(&[]).await
    }

    pub(crate) async fn with_config(files: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for name in ["config", "sockets"] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
        }
        for (name, text) in files {
            std::fs::write(directory.path().join("config").join(name), text).unwrap();
        }
        let offset_s = Arc::new(AtomicI64::new(0));
        let plane = start(options(directory.path(), &offset_s)).await.unwrap();
        Self { plane, directory, offset_s }
    }

    /// On directories that are there already.
    pub(crate) async fn over(directory: tempfile::TempDir) -> Self {
        std::fs::create_dir(directory.path().join("sockets")).unwrap();
        let offset_s = Arc::new(AtomicI64::new(0));
        let plane = start(options(directory.path(), &offset_s)).await.unwrap();
        Self { plane, directory, offset_s }
    }

    /// Stops and starts again on the same directories.
    pub(crate) async fn restart(self) -> Self {
        let Self { plane, directory, offset_s } = self;
        plane.stop().await;
        let plane = start(options(directory.path(), &offset_s)).await.unwrap();
        Self { plane, directory, offset_s }
    }

    pub(crate) fn advance(&self, seconds: i64) {
        self.offset_s.fetch_add(seconds, Ordering::Relaxed);
    }

    pub(crate) async fn token(&self, account: &str) -> String {
        let request = TokenRequest {
            namespace: "default".into(),
            service_account: account.into(),
            ttl_s: 600,
            uses: 1,
            from: vec![],
            control: vec![],
        };
        self.plane.control().create_token(&request).await.unwrap().token
    }

    pub(crate) async fn unix(&self) -> Channel {
        client::connect_unix(self.directory.path().join("sockets/control.sock")).await
    }

    /// A workload that joined by the unix socket and registered for a service.
    pub(crate) async fn workload(&self, name: &Name, service: &str) -> (Channel, client::Attached) {
        let channel = self.unix().await;
        client::certify(&channel, &mut client::Credentials::new(), name, "").await.unwrap();
        let mut attached = client::attach(&channel, client::registration(name, service)).await.unwrap();
        match attached.notice().await {
            sheer_core::wire::v1::control_notice::Body::Registered(registered) => {
                assert_eq!(registered.uid, name.uid());
            }
            other => panic!("{other:?}"),
        }
        (channel, attached)
    }

    /// A discovery stream of a workload without a registration, subscribed to the endpoints of a service.
    pub(crate) async fn watcher(&self, service: &str) -> Discovery {
        let name = Name::new("watcher", "watcher-1");
        let channel = self.unix().await;
        client::certify(&channel, &mut client::Credentials::new(), &name, "").await.unwrap();
        let discovery = Discovery::open(&channel, &name.uid()).await.unwrap();
        discovery.subscribe::<sheer_core::wire::v1::Endpoints>(&[service]).await;
        discovery
    }
}

fn options(directory: &Path, offset_s: &Arc<AtomicI64>) -> Options {
    Options {
        config: directory.join("config"),
        state: directory.join("state"),
        sockets: Some(directory.join("sockets")),
        proxy_listen: vec!["127.0.0.1:0".parse().unwrap()],
        api_listen: Some("127.0.0.1:0".parse().unwrap()),
        clock: Clock::shifted(offset_s.clone()),
        ..Options::default()
    }
}

/// Waits until a condition holds.
pub(crate) async fn until(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < LIMIT, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

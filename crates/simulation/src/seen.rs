//! What a proxy shows, and what must always hold of it.

use crate::host::{Running, SERVICE_PORT};
use sheer_core::name::ServiceName;
use sheer_core::snapshot::Health;
use sheer_proxy::control::Trust;
use sheer_proxy::identity::Held;
use sheer_proxy::sync::Standing;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use webpki::{EndEntityCert, KeyUsage};

/// The ports of service `marker` begin here: what is above is the version of the configuration.
pub const MARKED_FROM: u16 = 1000;

/// What a proxy shows at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Which life of the proxy it is.
    pub life: u64,
    /// Whether it serves.
    pub ready: bool,
    /// Whether it is registered.
    pub registered: bool,
    /// The version of the index of services.
    pub index: Option<u16>,
    /// The version of the routes of service `web`.
    pub route: Option<u16>,
    /// The services.
    pub services: Vec<String>,
    /// The endpoints of service `web`, and how well each is.
    pub web: BTreeMap<String, Health>,
}

impl Seen {
    /// What a running proxy shows.
    pub fn of(running: &Running) -> Self {
        let (web, marker) = (service("web"), service("marker"));
        let snapshot = running.outputs.snapshot.load();
        let version = |port: u16| port.checked_sub(MARKED_FROM);
        let mut services: Vec<String> = snapshot.services().map(|it| it.name.name.to_string()).collect();
        services.sort();
        let live = running.outputs.endpoints.get(&web).and_then(|cell| cell.load_full());
        let endpoints = live.iter().flat_map(|live| live.of_port(SERVICE_PORT)).map(|it| {
            let uid = &it.endpoint.workload;
            (uid.rsplit('/').next().unwrap_or_default().to_owned(), it.endpoint.health)
        });
        Self {
            life: running.life,
            ready: *running.ready.borrow(),
            registered: *running.standing.borrow() == Standing::Registered,
            index: snapshot.service(&marker).and_then(|it| version(it.ports.first()?.port)),
            route: snapshot.routes(&web).and_then(|rules| version(rules.backends().next()?.port)),
            services,
            web: endpoints.collect(),
        }
    }

    /// Whether the proxy may show this after that, in one life; and what it may never show.
    ///
    /// # Errors
    /// What is wrong.
    pub fn may_follow(&self, before: &Seen) -> Result<(), String> {
        if before.life == self.life && before.ready && !self.ready {
            return Err("it served, and does not any more".to_owned());
        }
        if !self.ready {
            return Ok(());
        }
        if !self.services.iter().any(|it| it == "web") {
            return Err("it serves without service web".to_owned());
        }
        if self.index.is_none() {
            return Err("it serves without service marker".to_owned());
        }
        Ok(())
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = |it: Option<u16>| it.map_or("-".to_owned(), |it| it.to_string());
        let (index, route) = (version(self.index), version(self.route));
        let ready = if self.ready { "serves" } else { "waits" };
        let registered = if self.registered { "registered" } else { "away" };
        write!(f, "{ready} {registered} index {index} routes {route} [{}] web", self.services.join(" "))?;
        self.web.iter().try_for_each(|(name, health)| write!(f, " {name}:{health:?}"))
    }
}

fn service(name: &str) -> ServiceName {
    ServiceName::parse(&format!("default/{name}")).unwrap_or_else(|error| unreachable!("{error}"))
}

/// Whether one proxy would admit the other's certificate now, as a client and as a server.
///
/// # Errors
/// Why not.
pub fn admits(one: &Arc<Held>, at: SystemTime, other: &Arc<Held>) -> Result<(), String> {
    let (Trust::Bundle { roots, .. }, Trust::Bundle { chain, .. }) = (one.trust(), other.trust()) else {
        return Err("there is no trust bundle".to_owned());
    };
    let anchors: Vec<_> = roots.iter().filter_map(|it| webpki::anchor_from_trusted_cert(it).ok()).collect();
    let (leaf, above) = chain.split_first().ok_or("there is no certificate")?;
    let leaf = EndEntityCert::try_from(leaf).map_err(|error| error.to_string())?;
    let algorithms = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.all;
    let at = rustls_pki_types::UnixTime::since_unix_epoch(at.duration_since(UNIX_EPOCH).unwrap_or_default());
    for usage in [KeyUsage::client_auth(), KeyUsage::server_auth()] {
        leaf.verify_for_usage(algorithms, &anchors, above, at, usage, None, None).map_err(|error| error.to_string())?;
    }
    Ok(())
}

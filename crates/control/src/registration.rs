//! What a registration may claim: no more than its token, its Enrollment or a written Workload grants.

use crate::Control;
use crate::attest::{Attested, Origin, Peer};
use serde::{Deserialize, Serialize};
use sheer_core::compile::{Compiled, Registered, RegisteredPort};
use sheer_core::identity::SpiffeId;
use sheer_core::name::{DnsLabel, NameError, ServiceName};
use sheer_core::resource::{Allowed, Enrollment};
use sheer_core::wire::v1::{self, Health, Hop, Mode, Protocol};
use std::collections::BTreeSet;
use std::net::IpAddr;

/// A granted registration, as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    pub(crate) identity: String,
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) service: String,
    pub(crate) labels: Vec<(String, String)>,
    pub(crate) ports: Vec<StoredPort>,
    pub(crate) address: IpAddr,
    pub(crate) network: String,
    pub(crate) locality: String,
    pub(crate) mode: i32,
    pub(crate) capture: String,
    pub(crate) version: String,
    pub(crate) host: String,
    pub(crate) epoch: u64,
}

/// A port of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredPort {
    pub(crate) port: u16,
    name: String,
    protocol: i32,
    mesh_port: u16,
    hop: i32,
    pub(crate) ready: bool,
    /// What was stored before this was told is a port of a namespace of its own: dialled by name alone.
    #[serde(default)]
    at_address: bool,
}

/// Why a registration is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What is wrong.
    pub reason: String,
    /// How to mend it.
    pub mend: String,
}

impl Refusal {
    fn new(reason: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { reason: reason.into(), mend: mend.into() }
    }

    /// A fault of the control plane.
    pub fn internal(reason: &str) -> Self {
        Self::new(format!("the control plane failed: {reason}"), "look at its log")
    }
}

impl From<NameError> for Refusal {
    fn from(error: NameError) -> Self {
        Self::new(error.to_string(), "change the name")
    }
}

const MAX_LABELS: usize = 64;
const MAX_PORTS: usize = 100;
const MAX_TEXT: usize = 253;

impl Stored {
    /// The workload's uid.
    ///
    /// # Errors
    /// When the stored names are none.
    pub fn uid(&self) -> Result<String, Refusal> {
        Ok(crate::fleet::uid_of(&DnsLabel::parse(&self.namespace)?, &DnsLabel::parse(&self.name)?))
    }

    /// As the compiler takes it; `None` when the stored names are none.
    pub fn registered(&self, uid: &str, identity: &SpiffeId, health: Health) -> Option<Registered> {
        let (namespace, name) = (DnsLabel::parse(&self.namespace).ok()?, DnsLabel::parse(&self.name).ok()?);
        let service = match self.service.as_str() {
            "" => None,
            service => Some(ServiceName::parse(service).ok()?),
        };
        Some(Registered {
            uid: uid.to_owned(),
            name: ServiceName { namespace, name },
            service,
            labels: self.labels.iter().cloned().collect(),
            identity: identity.clone(),
            ports: self
                .ports
                .iter()
                .map(|port| RegisteredPort {
                    port: port.port,
                    name: port.name.clone(),
                    protocol: Protocol::try_from(port.protocol).unwrap_or(Protocol::Detect),
                    mesh_port: port.mesh_port,
                    hop: Hop::try_from(port.hop).unwrap_or(Hop::None),
                    ready: port.ready,
                    at_address: port.at_address,
                })
                .collect(),
            address: self.address,
            network: self.network.clone(),
            locality: self.locality.clone(),
            health,
            mode: Mode::try_from(self.mode).unwrap_or(Mode::Unspecified),
        })
    }
}

/// Checks a registration against what its sender was granted.
///
/// # Errors
/// [`Refusal`], for the proxy's owner.
pub fn grant(control: &Control, peer: &Peer, registration: &v1::Registration) -> Result<Stored, Refusal> {
    let (namespace, name) = (DnsLabel::parse(&registration.namespace)?, DnsLabel::parse(&registration.name)?);
    let uid = crate::fleet::uid_of(&namespace, &name);
    let attested = attested(control, peer, &uid)?;
    let identity = SpiffeId::parse(&attested.identity).map_err(|_| Refusal::internal("a stored identity is none"))?;
    if identity.namespace() != &namespace {
        return Err(Refusal::new(
            format!("{identity} may not register a workload in namespace {namespace}"),
            "register it in the namespace of its identity",
        ));
    }
    let compiled = control.state.compiled();
    let enrollment = enrollment(&compiled, &attested)?;
    let workload = ServiceName { namespace: namespace.clone(), name: name.clone() };
    let written = compiled.workloads.get(&workload);
    if let Some(written) = written.filter(|written| &written.service_account != identity.service_account()) {
        return Err(Refusal::new(
            format!(
                "the Workload {workload} ({}) is for service account {}, not {}",
                written.meta.place,
                written.service_account,
                identity.service_account()
            ),
            "choose another --name or --service-account",
        ));
    }
    let service = claimed_service(registration, &identity, enrollment)?;
    let labels = claimed_labels(registration, enrollment)?;
    let announced = written.map(|written| written.addresses.as_slice()).unwrap_or_default();
    let address = claimed_address(control, peer, registration, &attested, enrollment, announced)?;
    let is_named = |port: u16| {
        written.is_some_and(|written| written.ports.iter().any(|it| it.port == port))
            || matches!(enrollment.map(|it| &it.ports), Some(Allowed::These(ports)) if ports.contains(&port))
    };
    let own = is_own(control, peer);
    let ports = claimed_ports(registration, enrollment, address, |port| own || is_named(port))?;
    for (what, text) in [("network", &registration.network), ("locality", &registration.locality)] {
        if text.len() > MAX_TEXT || text.chars().any(char::is_control) {
            return Err(Refusal::new(
                format!("the {what} is longer than {MAX_TEXT} characters or no text"),
                "shorten it",
            ));
        }
    }
    let clip = |text: &str| text.chars().filter(|c| !c.is_control()).take(MAX_TEXT).collect::<String>();
    let or_written = |claimed: &str, written: Option<&String>| match (claimed, written) {
        ("", Some(written)) => written.clone(),
        _ => claimed.to_owned(),
    };
    Ok(Stored {
        identity: attested.identity,
        namespace: namespace.to_string(),
        name: name.to_string(),
        service,
        labels,
        ports,
        address,
        network: or_written(&registration.network, written.map(|it| &it.network)),
        locality: or_written(&registration.locality, written.map(|it| &it.locality)),
        mode: registration.mode,
        capture: clip(&registration.capture),
        version: clip(&registration.version),
        host: clip(&registration.host),
        epoch: registration.epoch,
    })
}

fn attested(control: &Control, peer: &Peer, uid: &str) -> Result<Attested, Refusal> {
    control.speaks_for(peer, uid).map_err(|status| {
        Refusal::new(status.message(), "ask for a certificate for this workload name first, over the same way")
    })?;
    let attested = control.fleet.attested(uid).ok_or_else(|| Refusal::internal("its certificate is not on record"))?;
    if attested.not_after <= control.clock.unix() {
        return Err(Refusal::new("the workload's certificate has ended", "renew it first"));
    }
    Ok(attested)
}

fn enrollment<'a>(compiled: &'a Compiled, attested: &Attested) -> Result<Option<&'a Enrollment>, Refusal> {
    let Some(name) = &attested.enrollment else { return Ok(None) };
    let found = ServiceName::parse(name).ok().and_then(|name| compiled.enrollments.get(&name));
    match found {
        Some(enrollment) => Ok(Some(enrollment)),
        None => Err(Refusal::new(
            format!("the Enrollment {name} that admitted this workload is gone"),
            "put it back, or join again with a new token",
        )),
    }
}

fn claimed_service(
    registration: &v1::Registration,
    identity: &SpiffeId,
    enrollment: Option<&Enrollment>,
) -> Result<String, Refusal> {
    if registration.service.is_empty() {
        return Ok(String::new());
    }
    let service = ServiceName::parse(&registration.service)?;
    if &service.namespace != identity.namespace() {
        return Err(Refusal::new(
            format!("a workload of namespace {} may not answer for {service}", identity.namespace()),
            "name a service of its own namespace",
        ));
    }
    if let Some(enrollment) = enrollment.filter(|it| !it.admits_service(identity.service_account(), &service.name)) {
        return Err(Refusal::new(
            format!("the Enrollment {} does not let {identity} name service {service}", enrollment.meta.name),
            format!("add it to services in {}", enrollment.meta.place),
        ));
    }
    Ok(service.to_string())
}

fn claimed_labels(
    registration: &v1::Registration,
    enrollment: Option<&Enrollment>,
) -> Result<Vec<(String, String)>, Refusal> {
    if registration.labels.len() > MAX_LABELS {
        return Err(Refusal::new(format!("more than {MAX_LABELS} labels"), "carry fewer"));
    }
    let mut labels = Vec::new();
    for label in &registration.labels {
        let (name, value) = (&label.name, &label.value);
        let plain = |text: &str| text.len() <= MAX_TEXT && text.bytes().all(|byte| byte.is_ascii_graphic());
        if name.is_empty() || !plain(name) || !plain(value) {
            let shown: String = name.chars().take(80).flat_map(char::escape_default).collect();
            return Err(Refusal::new(format!("'{shown}' is no label"), "labels are short ASCII texts without spaces"));
        }
        if let Some(enrollment) = enrollment.filter(|it| !it.admits_label(name, value)) {
            return Err(Refusal::new(
                format!("the Enrollment {} does not grant the label {name}={value}", enrollment.meta.name),
                format!("leave the label out, or add it to labels in {}", enrollment.meta.place),
            ));
        }
        labels.push((name.clone(), value.clone()));
    }
    labels.sort();
    labels.dedup_by(|a, b| a.0 == b.0);
    Ok(labels)
}

/// The ports, and where peers dial each: rules that redirect an application's own port leave loopback alone, so that a
/// workload which is only reached there is dialled at its proxy's own port.
///
/// Callers of an address are led to a workload's proxy at another port only where the port `is_granted`: nobody can tell
/// from afar whose program listens at an address, and who may register must not draw another program's callers away.
fn claimed_ports(
    registration: &v1::Registration,
    enrollment: Option<&Enrollment>,
    address: IpAddr,
    is_granted: impl Fn(u16) -> bool,
) -> Result<Vec<StoredPort>, Refusal> {
    if registration.ports.len() > MAX_PORTS {
        return Err(Refusal::new(format!("more than {MAX_PORTS} ports"), "declare fewer"));
    }
    let number = |number: u32| u16::try_from(number).ok().filter(|number| *number != 0);
    let mut seen = BTreeSet::new();
    let mut ports = Vec::new();
    for claimed in &registration.ports {
        let (Some(port), Some(mesh_port)) = (number(claimed.port), number(claimed.mesh_port)) else {
            return Err(Refusal::new(
                format!("{} (at {}) is no port", claimed.port, claimed.mesh_port),
                "use 1 to 65535",
            ));
        };
        if !seen.insert(port) {
            return Err(Refusal::new(format!("port {port} is declared twice"), "declare it once"));
        }
        if let Some(enrollment) = enrollment.filter(|it| !it.ports.admits(&port)) {
            return Err(Refusal::new(
                format!("the Enrollment {} does not grant port {port}", enrollment.meta.name),
                format!("add it to ports in {}", enrollment.meta.place),
            ));
        }
        let held = number(claimed.loopback_port).filter(|_| address.is_loopback() && claimed.hop() != Hop::None);
        let mesh_port = held.unwrap_or(mesh_port);
        ports.push(StoredPort {
            port,
            name: claimed.name.chars().take(63).collect(),
            protocol: claimed.protocol,
            mesh_port,
            hop: claimed.hop,
            ready: claimed.ready,
            at_address: claimed.at_address && (claimed.mesh_port == claimed.port || is_granted(port)),
        });
    }
    Ok(ports)
}

/// Whether the peer is of the control plane's own user, on its host.
fn is_own(control: &Control, peer: &Peer) -> bool {
    matches!(&peer.origin, Origin::Local { uid } if control.own_users.contains(uid))
}

/// Where peers dial the workload: the stream's source, or a granted address. A workload of the control plane's own user
/// may name any address of its host; without one it gets the address that others know this host by.
fn claimed_address(
    control: &Control,
    peer: &Peer,
    registration: &v1::Registration,
    attested: &Attested,
    enrollment: Option<&Enrollment>,
    announced: &[IpAddr],
) -> Result<IpAddr, Refusal> {
    let source = peer.ip().unwrap_or(control.local_address);
    if registration.address.is_empty() {
        return Ok(announced.first().copied().unwrap_or(source));
    }
    let claimed: String = registration.address.chars().take(80).collect();
    let address = claimed
        .parse::<IpAddr>()
        .map_err(|_| Refusal::new(format!("'{}' is no address", claimed.escape_default()), "write an IP address"))?
        .to_canonical();
    if address.is_unspecified() || address.is_multicast() {
        return Err(Refusal::new(format!("{address} is no address of a host"), "write one that peers can dial"));
    }
    let granted = is_own(control, peer)
        || address == source
        || announced.contains(&address)
        || attested.addresses.iter().any(|net| net.contains(&address))
        || enrollment.is_some_and(|enrollment| enrollment.admits_address(source, address));
    if granted {
        return Ok(address);
    }
    Err(Refusal::new(
        format!("the address {address} is not granted; the connection comes from {source}"),
        format!(
            "leave --address out, or grant it: a Workload {}/{} with that address, a token made with --from, or \
             addresses in its Enrollment",
            registration.namespace, registration.name
        ),
    ))
}

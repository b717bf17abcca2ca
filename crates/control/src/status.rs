//! What people are shown of the mesh: services, figures, and what is not as it should be.

use crate::Control;
use crate::attest::for_people;
use crate::documents;
use sheer_core::api::{
    Check, EdgeRow, Finding, Level, MeshView, Outcome, PortView, RotationStep, ServiceView, Stat, StatRow,
    WorkloadState, WorkloadView,
};
use sheer_core::compile::{allowed_accounts, endpoints_of, service_names, service_of};
use sheer_core::diagnostic::Diagnostic;
use sheer_core::name::ServiceName;
use sheer_core::wire::v1::{Health, Protocol};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// A protocol's name, as in `--port PORT/NAME`.
pub fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Detect => "detect",
        Protocol::Http => "http",
        Protocol::Http2 => "http2",
        Protocol::Grpc => "grpc",
        Protocol::Tcp => "tcp",
        Protocol::Tls => "tls",
    }
}

/// The mesh as a whole.
pub fn mesh(control: &Control) -> MeshView {
    let compiled = control.state.compiled();
    let settings = &compiled.mesh;
    let services = control.state.look(|compiled, fleet, _| service_names(compiled, fleet).len());
    MeshView {
        trust_domain: settings.trust_domain.clone(),
        cluster_domain: settings.cluster_domain.clone(),
        certificate_lifetime_s: settings.certificate_lifetime.as_secs(),
        virtual_ranges: settings.virtual_ranges.cidrs(),
        revision: control.hub.world().revision.clone(),
        root_sha256: crate::ca::hex(&control.authority.root_sha256()),
        root_expires: control.authority.root_not_after(),
        control: control.advertised.clone(),
        config: control.directory.path().display().to_string(),
        state: control.state_directory.display().to_string(),
        services,
        workloads: control.workloads().len(),
        connected: control.fleet.connected(),
        started: control.started,
    }
}

/// All services.
pub fn services(control: &Control) -> Vec<ServiceView> {
    control.state.look(|compiled, fleet, book| {
        let names = service_names(compiled, fleet);
        let views = names.iter().filter_map(|name| {
            let service = service_of(compiled, fleet, book, name)?;
            let endpoints = endpoints_of(compiled, fleet, book, name)?.endpoints;
            let count = |health: Health| {
                let of = endpoints.iter().filter(|it| it.health() == health);
                of.map(|it| it.workload.as_str()).collect::<BTreeSet<_>>().len()
            };
            let accounts = allowed_accounts(compiled, book, name);
            let claims = fleet.members(name).map(|it| it.identity.service_account().clone());
            let claimed: BTreeSet<_> = claims.filter(|account| !accounts.contains(account)).collect();
            let written = compiled.services.get(name);
            Some(ServiceView {
                namespace: service.namespace.clone(),
                name: service.name.clone(),
                hosts: service.hosts.clone(),
                virtual_ips: service.virtual_ips.iter().filter_map(|octets| address(octets)).collect(),
                ports: service.ports.iter().map(port).collect(),
                implied: service.implied,
                origin: written.map(|it| it.meta.place.to_string()).unwrap_or_default(),
                healthy: count(Health::Healthy),
                suspect: count(Health::Suspect),
                draining: count(Health::Draining),
                accounts: accounts.iter().map(ToString::to_string).collect(),
                claimed_by: claimed.iter().map(ToString::to_string).collect(),
                routes: compiled.routes_attached_to(name).map(|route| route.meta.name.to_string()).collect(),
            })
        });
        views.collect()
    })
}

fn address(octets: &[u8]) -> Option<String> {
    let four = <[u8; 4]>::try_from(octets).map(IpAddr::from);
    four.or_else(|_| <[u8; 16]>::try_from(octets).map(IpAddr::from)).ok().map(|ip| ip.to_string())
}

fn port(port: &sheer_core::wire::v1::ServicePort) -> PortView {
    PortView {
        port: u16::try_from(port.port).unwrap_or_default(),
        name: port.name.clone(),
        protocol: protocol_name(port.protocol()).to_owned(),
        ..PortView::default()
    }
}

/// What each service answered; services without traffic have a row of zeros.
pub fn stat(control: &Control, namespace: Option<&str>, window_s: u64) -> Stat {
    let mut stat = control.telemetry.stat(namespace, window_s, &control.clock);
    let mut rows: BTreeMap<String, StatRow> = stat.rows.into_iter().map(|row| (row.service.clone(), row)).collect();
    for service in services(control).iter().filter(|it| namespace.is_none_or(|wanted| wanted == it.namespace)) {
        let name = format!("{}/{}", service.namespace, service.name);
        rows.entry(name.clone()).or_insert_with(|| StatRow { service: name, ..StatRow::default() });
    }
    let (workloads, compiled) = (control.workloads(), control.state.compiled());
    for row in rows.values_mut() {
        // Nobody watches over those without a proxy: they take traffic for as long as they are written down.
        let written = ServiceName::parse(&row.service).map_or(0, |name| compiled.static_workloads_of(&name));
        (row.workloads, row.ready) = (written, written);
        let answering = workloads.iter().filter(|workload| workload.services.contains(&row.service));
        for workload in answering {
            row.workloads += 1;
            let serving = matches!(workload.state, WorkloadState::Connected | WorkloadState::Held);
            row.ready += usize::from(serving && workload.ports.iter().any(|port| port.ready));
        }
    }
    stat.rows = rows.into_values().collect();
    stat
}

/// Everything that is not as it should be; where all is well, one line says so.
pub fn check(control: &Control) -> Check {
    let workloads = control.workloads();
    let mut findings = configuration(control);
    findings.extend(state(control));
    findings.extend(authority(control));
    findings.extend(certificates(control, &workloads));
    findings.extend(proxies(&workloads));
    findings.extend(service_findings(control, &workloads));
    findings.extend(calls(control));
    findings.extend(tokens(control));
    findings.sort_by(|a, b| b.level.cmp(&a.level).then_with(|| (&a.topic, &a.subject).cmp(&(&b.topic, &b.subject))));
    let level = findings.first().map_or(Level::Ok, |worst| worst.level);
    Check { level, findings }
}

fn finding(level: Level, topic: &str, subject: impl Into<String>, what: impl Into<String>) -> Finding {
    Finding { level, topic: topic.to_owned(), subject: subject.into(), what: what.into(), ..Finding::default() }
}

fn state(control: &Control) -> Option<Finding> {
    let reason = control.store.trouble()?;
    let path = control.state_directory.display().to_string();
    Some(Finding {
        mend: "make room on that disk, or mend it; nobody can join until then, what is delivered goes on".to_owned(),
        ..finding(Level::Error, "store", path, format!("the state cannot be written: {reason}"))
    })
}

fn configuration(control: &Control) -> Vec<Finding> {
    let status = control.directory.status();
    let path = control.directory.path().display().to_string();
    let mut findings = Vec::new();
    if let Some(reason) = status.unreadable {
        findings.push(Finding {
            why: format!("{reason}; the last good configuration stays in force"),
            mend: format!("make {path} a readable directory"),
            ..finding(Level::Error, "config", &path, "the configuration directory cannot be read")
        });
    }
    if let Some(wanted) = &*control.wanted_trust_domain.lock() {
        findings.push(Finding {
            why: "all certificates in use are of the present one".to_owned(),
            mend: "plan for it: restart the control plane, then let every workload join anew; or take it back"
                .to_owned(),
            ..finding(
                Level::Warn,
                "config",
                "Mesh",
                format!("its trust domain {wanted} is not in force; it stays {}", control.trust_domain),
            )
        });
    }
    let named = control.named_services();
    let void = |it: &&Diagnostic| it.awaits.as_ref().is_some_and(|service| named.contains(service));
    for diagnostic in status.diagnostics.iter().filter(|it| !void(it)) {
        let place = documents::place(diagnostic);
        let stays = "no file of the directory is taken while one has errors: the configuration before stays in force";
        findings.push(Finding {
            why: if place.level == Level::Error { stays.to_owned() } else { String::new() },
            mend: place.mend,
            ..finding(
                place.level,
                "config",
                format!("{}:{}", place.file, place.line),
                match place.path.as_str() {
                    "" => place.message,
                    path => format!("{path}: {}", place.message),
                },
            )
        });
    }
    if findings.is_empty() {
        let objects = control.state.compiled().objects.len();
        findings.push(finding(Level::Ok, "config", path, format!("{objects} written objects are in force")));
    }
    findings
}

fn authority(control: &Control) -> Vec<Finding> {
    let now = control.clock.unix();
    let mut findings = Vec::new();
    let left = control.authority.root_not_after() - now;
    let year = 365 * 24 * 3600;
    findings.push(match left {
        ..0 => Finding {
            why: "no certificate under it verifies any more".to_owned(),
            mend: "check this host's clock; if it is right, start with a new --state directory and join again"
                .to_owned(),
            ..finding(Level::Error, "root", "root.pem", "the root certificate has ended")
        },
        left if left < year => Finding {
            why: "all workloads must trust another root before it ends".to_owned(),
            mend: "`sheer identity rotate` replaces it without a failed request".to_owned(),
            ..finding(Level::Warn, "root", "root.pem", format!("the root certificate ends in {}", for_people(left)))
        },
        left => finding(Level::Ok, "root", "root.pem", format!("the root certificate ends in {}", for_people(left))),
    });
    findings.extend(rotation(control));
    let left = control.authority.issuing_not_after() - now;
    if !control.authority.has_root_key() {
        let level = if left < 14 * 24 * 3600 { Level::Error } else { Level::Warn };
        findings.push(Finding {
            why: format!("the issuing certificate ends in {} and cannot be renewed without it", for_people(left)),
            mend: "put the key back into root.pem for a start".to_owned(),
            ..finding(level, "root", "root.pem", "the root's key is not here")
        });
    }
    findings
}

/// A rotation that waits for somebody is told with whom, once a minute has passed.
fn rotation(control: &Control) -> Option<Finding> {
    const PATIENCE_S: i64 = 60;
    let rotation = control.identity().rotation?;
    let step = match rotation.step {
        RotationStep::Spread => "the new root is told to the proxies",
        RotationStep::Renew => "certificates are renewed under the new root",
        RotationStep::Drop => "proxies are told to trust the old root no longer",
    };
    let what = match rotation.back {
        false => format!("the root is being replaced: {step} ({} of {})", rotation.done, rotation.of),
        true => format!("a rotation of the root was aborted and goes back ({} of {})", rotation.done, rotation.of),
    };
    let late = control.clock.unix() - rotation.step_began >= PATIENCE_S;
    let Some(first) = rotation.waiting.first().filter(|_| late) else {
        return Some(finding(Level::Ok, "root", "rotation", what));
    };
    let absent = rotation.waiting.iter().all(|it| it.until > 0);
    Some(Finding {
        why: format!("it waits for {} workload(s): {}: {}", rotation.waiting.len(), first.workload, first.why),
        mend: match absent {
            true => "bring them back, or let it go on with `sheer identity rotate --without-absent`".to_owned(),
            false => "look at their logs, restart or upgrade them; `sheer identity abort` takes it back".to_owned(),
        },
        ..finding(Level::Warn, "root", "rotation", what)
    })
}

fn certificates(control: &Control, workloads: &[WorkloadView]) -> Vec<Finding> {
    let now = control.clock.unix();
    let lifetime = i64::try_from(control.state.compiled().mesh.certificate_lifetime.as_secs()).unwrap_or(i64::MAX);
    let mut findings = Vec::new();
    for workload in workloads.iter().filter(|it| it.certificate_expires > 0) {
        let left = workload.certificate_expires - now;
        let mend = "look at its proxy's log; restart it with a new join token if the certificate has ended".to_owned();
        if left <= 0 {
            findings.push(Finding {
                why: "its peers refuse it".to_owned(),
                mend,
                ..finding(Level::Error, "certificate", &workload.uid, "its certificate has ended")
            });
        } else if left < lifetime * 2 / 5 {
            findings.push(Finding {
                why: "it should have been renewed when half of its life had passed".to_owned(),
                mend,
                ..finding(
                    Level::Warn,
                    "certificate",
                    &workload.uid,
                    format!("its certificate ends in {}", for_people(left)),
                )
            });
        }
    }
    if findings.is_empty() && !workloads.is_empty() {
        let what = match workloads.len() {
            1 => "the one workload holds a certificate that is renewed in time".to_owned(),
            many => format!("{many} workloads hold certificates that are renewed in time"),
        };
        findings.push(finding(Level::Ok, "certificate", "workloads", what));
    }
    findings
}

fn proxies(workloads: &[WorkloadView]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for workload in workloads {
        let uid = &workload.uid;
        match workload.state {
            WorkloadState::Suspect => findings.push(Finding {
                why: "its connection went silent without being closed; peers pick it last".to_owned(),
                mend: "check its host and the network to it".to_owned(),
                ..finding(Level::Warn, "silent", uid, "its proxy is not heard of")
            }),
            WorkloadState::Held => findings.push(Finding {
                why: "it was registered before this control plane started, and has a minute to come back".to_owned(),
                mend: String::new(),
                ..finding(Level::Warn, "silent", uid, "its proxy has not come back yet")
            }),
            WorkloadState::Connected | WorkloadState::Draining | WorkloadState::Leaving | WorkloadState::Certified => {}
        }
        if is_deaf(workload) {
            let ports: Vec<_> = workload.ports.iter().map(|port| port.port.to_string()).collect();
            findings.push(Finding {
                why:
                    "its application accepts on none of its declared ports, or its --health path does not answer 2xx; \
                      it gets no calls"
                        .to_owned(),
                mend: "look at the application's log, and whether --port names the port that it listens on".to_owned(),
                ..finding(Level::Warn, "ready", uid, format!("it is not ready at port {}", ports.join(", ")))
            });
        }
        for refused in &workload.refused {
            findings.push(Finding {
                why: format!("{} {}", refused.reason, refused.place).trim_end().to_owned(),
                mend: "its proxy keeps the version before; upgrade the proxy, or change the object".to_owned(),
                ..finding(
                    Level::Error,
                    "refused",
                    uid,
                    format!("its proxy refused {} {}", refused.type_url, refused.name),
                )
            });
        }
        for warning in &workload.warnings {
            findings.push(finding(Level::Warn, "workload", uid, warning));
        }
        for exception in &workload.exceptions {
            let what = format!("plaintext is admitted to {exception}");
            findings.push(finding(Level::Ok, "plaintext", uid, what));
        }
        if workload.mode == "watch" || workload.mode == "permissive" {
            let what = format!("mode {}: plaintext is admitted", workload.mode);
            findings.push(finding(Level::Ok, "plaintext", uid, what));
        }
    }
    if !workloads.is_empty() && !findings.iter().any(|it| it.topic == "silent") {
        let what = match workloads.len() {
            1 => "the one proxy is connected".to_owned(),
            many => format!("{many} proxies are connected"),
        };
        findings.push(finding(Level::Ok, "silent", "proxies", what));
    }
    findings
}

/// Whether a workload runs and none of its ports takes calls.
fn is_deaf(workload: &WorkloadView) -> bool {
    let runs = matches!(workload.state, WorkloadState::Connected);
    runs && !workload.ports.is_empty() && workload.ports.iter().all(|port| !port.ready)
}

fn service_findings(control: &Control, workloads: &[WorkloadView]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for service in services(control) {
        let name = format!("{}/{}", service.namespace, service.name);
        if !service.claimed_by.is_empty() {
            let (claimed, accepted) = (service.claimed_by.join(", "), service.accounts.join(", "));
            let all = [service.accounts.as_slice(), &service.claimed_by].concat().join(",");
            findings.push(Finding {
                why: format!("{accepted} may answer as it; a workload of another account gets none of its traffic"),
                mend: format!(
                    "if that is intended, write a Service {name} with the annotation sheer.dev/service-accounts: {all}; \
                     otherwise find out who runs it"
                ),
                ..finding(Level::Warn, "pin", &name, format!("service account {claimed} claims it"))
            });
        }
        // A deaf workload is told of by itself, and says more.
        let deaf = workloads.iter().any(|workload| is_deaf(workload) && workload.services.contains(&name));
        // One that is implied and has no port calls others and is not called.
        if service.healthy == 0 && !deaf && !(service.implied && service.ports.is_empty()) {
            findings.push(Finding {
                why: "no workload that may answer for it has a port that accepts".to_owned(),
                mend: format!(
                    "start one, for example `sheer run {name} --port PORT -- COMMAND`; \
                     with --label where its selector asks for more than the service"
                ),
                ..finding(Level::Warn, "endpoints", &name, "it has no healthy endpoint")
            });
        }
    }
    findings
}

/// How far back calls that fail are looked for.
const CALLS_WINDOW_S: u64 = 60;

/// A share of calls below which failures are left to `sheer stat`: one in so many.
const CALLS_SHARE: u64 = 20;

/// Callers of whose calls many failed during the last minute.
fn calls(control: &Control) -> Vec<Finding> {
    let edges = control.telemetry.edges(None, CALLS_WINDOW_S, crate::telemetry::View::Best, &control.clock);
    calls_that_fail(&edges.rows)
}

fn is_failure(outcome: &Outcome) -> bool {
    crate::telemetry::is_failure(outcome.status, outcome.grpc_status, &outcome.reason)
}

fn calls_that_fail(rows: &[EdgeRow]) -> Vec<Finding> {
    #[derive(Default)]
    struct Pair {
        requests: u64,
        failures: u64,
        outcomes: BTreeMap<String, u64>,
    }
    let mut pairs: BTreeMap<(&str, &str), Pair> = BTreeMap::new();
    for row in rows {
        let pair = pairs.entry((&row.source, &row.destination)).or_default();
        pair.requests += row.window.requests;
        pair.failures += row.window.failures;
        for outcome in row.window.responses.iter().filter(|it| is_failure(it)) {
            let name = match outcome {
                Outcome { reason, .. } if !reason.is_empty() => reason.clone(),
                Outcome { grpc_status: 1.., .. } => format!("grpc-{}", outcome.grpc_status),
                _ => outcome.status.to_string(),
            };
            *pair.outcomes.entry(name).or_default() += outcome.count;
        }
    }
    let failing = pairs.into_iter().filter(|(_, it)| it.failures > 0 && it.failures * CALLS_SHARE >= it.requests);
    let findings = failing.map(|((source, destination), Pair { requests, failures, outcomes })| {
        let counts: Vec<_> = outcomes.iter().map(|(name, count)| format!("{name}={count}")).collect();
        let most = outcomes.iter().max_by_key(|(_, count)| **count).map_or("", |(name, _)| name);
        let mend = match most {
            "no-endpoint" => format!("start a workload of {destination}, or mend the one that is not ready"),
            "unknown-port" | "unknown-destination" => "'sheer get services' lists services and ports".to_owned(),
            own if own.starts_with(|it: char| it.is_ascii_digit()) || own.starts_with("grpc-") => {
                format!("{destination} itself answered so: look at its log")
            }
            _ => format!("x-sheer-reason in the answers, and --access-log of {source}, say at which hop"),
        };
        Finding {
            why: counts.join(" "),
            mend,
            ..finding(
                Level::Warn,
                "calls",
                format!("{source} > {destination}"),
                format!("{failures} of {requests} calls failed in the last minute"),
            )
        }
    });
    findings.collect()
}

fn tokens(control: &Control) -> Vec<Finding> {
    match control.guesses.total() {
        0 => Vec::new(),
        wrong => vec![Finding {
            why: "somebody has a damaged token, one of another control plane, or is guessing".to_owned(),
            mend: "the log names the addresses; ten in a minute make an address wait".to_owned(),
            ..finding(Level::Warn, "token", "join tokens", format!("{wrong} wrong join tokens since the start"))
        }],
    }
}

impl Control {
    /// Accepts other service accounts as a service.
    pub(crate) async fn consent(
        &self,
        service: &ServiceName,
        accounts: Vec<sheer_core::name::DnsLabel>,
    ) -> Result<(), crate::store::StoreError> {
        let key = service.to_string();
        let stored: Vec<String> = accounts.iter().map(ToString::to_string).collect();
        tracing::warn!(%service, accounts = ?stored, "consent: other service accounts are accepted");
        self.store.write(move |transaction| transaction.put(crate::store::Table::Pins, &key, &stored)).await?;
        self.state.pin(service, accounts);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sheer_core::api::Figures;

    fn edge(destination: &str, requests: u64, outcome: Outcome) -> EdgeRow {
        let failures = if is_failure(&outcome) { outcome.count } else { 0 };
        let window = Figures { requests, failures, responses: vec![outcome], ..Figures::default() };
        let (source, destination) = ("default/web".to_owned(), destination.to_owned());
        EdgeRow { source, destination, window, ..EdgeRow::default() }
    }

    fn outcome(status: u32, reason: &str, count: u64) -> Outcome {
        Outcome { status, grpc_status: -1, reason: reason.to_owned(), count }
    }

    #[test]
    fn calls_that_fail_are_told_with_their_reason_and_a_remedy() {
        let rows = [
            edge("default/cart", 10, outcome(200, "", 10)),
            edge("default/cart", 4, outcome(503, "no-endpoint", 4)),
            edge("default/api", 3, outcome(500, "", 3)),
            edge("default/fine", 100, outcome(500, "", 1)),
        ];
        let findings = calls_that_fail(&rows);
        let shown: Vec<_> =
            findings.iter().map(|it| (it.subject.as_str(), it.what.as_str(), it.why.as_str())).collect();
        assert_eq!(
            shown,
            [
                ("default/web > default/api", "3 of 3 calls failed in the last minute", "500=3"),
                ("default/web > default/cart", "4 of 14 calls failed in the last minute", "no-endpoint=4"),
            ]
        );
        assert!(findings[0].mend.contains("look at its log"));
        assert!(findings[1].mend.contains("start a workload of default/cart"));
    }
}

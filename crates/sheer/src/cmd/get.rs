//! `sheer get`: services, workloads and written objects.

use crate::client::{Client, Connect, query};
use crate::output::{self, Columns};
use anyhow::bail;
use serde_json::{Value, json};
use sheer_core::api::{ObjectView, PortView, ServiceView, WorkloadState, WorkloadView};
use std::process::ExitCode;

/// Flags of `sheer get`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sheer get                          # everything that is known
  sheer get services
  sheer get service web -o yaml      # also of an implied one: a start for writing your own
  sheer get httproutes -n shop -o json")]
pub(crate) struct Args {
    /// The kind: service, workload, httproute, mesh or enrollment
    kind: Option<String>,

    /// One object: NAME or NAMESPACE/NAME
    #[arg(value_name = "[NAMESPACE/]NAME")]
    name: Option<String>,

    /// Only objects of this namespace [default: all]
    #[arg(short, long)]
    namespace: Option<String>,

    /// How to print
    #[arg(short, long, default_value = "table")]
    output: Format,

    #[command(flatten)]
    connect: Connect,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// Columns for people.
    Table,
    /// The objects as YAML, fit for `sheer apply`.
    Yaml,
    /// JSON for scripts.
    Json,
}

/// Kinds that people can write.
const WRITTEN: &[&str] = &["Service", "HTTPRoute", "Mesh", "Workload", "Enrollment"];

/// The kind that a person means: in any case, also in the plural.
///
/// # Errors
/// When there is no such kind; the message names those that exist.
pub(crate) fn written_kind(text: &str) -> anyhow::Result<&'static str> {
    let lower = text.to_ascii_lowercase();
    let singular = match lower.as_str() {
        "meshes" => "mesh",
        other => other.strip_suffix('s').unwrap_or(other),
    };
    match WRITTEN.iter().find(|kind| kind.eq_ignore_ascii_case(singular)) {
        Some(kind) => Ok(kind),
        None => bail!("there is no kind '{text}'; the kinds are {}", WRITTEN.join(", ")),
    }
}

/// What to look for.
struct Filter {
    namespace: Option<String>,
    name: Option<String>,
}

impl Filter {
    fn admits(&self, namespace: &str, name: &str) -> bool {
        let same = |wanted: &Option<String>, found: &str| wanted.as_deref().is_none_or(|wanted| wanted == found);
        // Kinds without a namespace show an empty one.
        (namespace.is_empty() || same(&self.namespace, namespace)) && same(&self.name, name)
    }
}

/// Gets; naming an object that does not exist is an error.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let kind = args.kind.as_deref().map(written_kind).transpose()?;
    let filter = match args.name.as_deref().map(|name| (name, name.split_once('/'))) {
        Some((_, Some((namespace, name)))) => Filter { namespace: Some(namespace.into()), name: Some(name.into()) },
        Some((name, None)) => Filter { namespace: args.namespace, name: Some(name.into()) },
        None => Filter { namespace: args.namespace, name: None },
    };
    let client = args.connect.client()?;
    let found = Found::fetch(&client, kind, &filter)?;
    if let (Some(kind), Some(name), true) = (kind, &filter.name, found.is_empty()) {
        bail!("there is no {kind} '{name}'; 'sheer get {}' lists those that are", kind.to_ascii_lowercase());
    }
    match args.output {
        Format::Table => found.table(kind)?,
        Format::Yaml => found.yaml()?,
        Format::Json => found.json()?,
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Default)]
struct Found {
    services: Vec<ServiceView>,
    workloads: Vec<WorkloadView>,
    /// Where services were asked for: the workloads behind them.
    answering: Vec<WorkloadView>,
    /// Written objects, also those behind the services and workloads above.
    objects: Vec<ObjectView>,
}

impl Found {
    fn fetch(client: &Client, kind: Option<&str>, filter: &Filter) -> anyhow::Result<Self> {
        let mut found = Self::default();
        let namespace = ("namespace", filter.namespace.as_deref());
        if kind.is_none_or(|kind| kind == "Service") {
            found.services = client.get(&query("/api/v1/services", &[namespace]))?;
            found.services.retain(|s| filter.admits(&s.namespace, &s.name));
        }
        if kind.is_none_or(|kind| kind == "Workload") {
            found.workloads = client.get(&query("/api/v1/workloads", &[namespace]))?;
            found.workloads.retain(|w| filter.admits(&w.namespace, &w.name));
        }
        if kind.is_some_and(|kind| kind == "Service") {
            found.answering = client.get(&query("/api/v1/workloads", &[namespace]))?;
        }
        found.objects = client.get(&query("/api/v1/objects", &[("kind", kind)]))?;
        found.objects.retain(|o| kind.is_none_or(|kind| kind == o.kind) && filter.admits(&o.namespace, &o.name));
        Ok(found)
    }

    fn is_empty(&self) -> bool {
        self.services.is_empty() && self.workloads.is_empty() && self.objects.is_empty()
    }

    fn written(&self, kind: &str, namespace: &str, name: &str) -> Option<&ObjectView> {
        self.objects.iter().find(|o| o.kind == kind && o.namespace == namespace && o.name == name)
    }

    fn table(&self, kind: Option<&str>) -> anyhow::Result<()> {
        if self.is_empty() {
            match kind {
                Some(kind) => anstream::eprintln!("there is no {kind}"),
                None => anstream::eprintln!(
                    "the mesh is empty; start a service with 'sheer run NAME --port PORT -- COMMAND'"
                ),
            }
            return Ok(());
        }
        let columns = match kind {
            Some("Service") => services(&self.services),
            Some("Workload") => self.workloads(),
            Some(_) => self.written_only(),
            None => self.everything(),
        };
        output::print(&columns.text())
    }

    fn workloads(&self) -> Columns {
        let mut columns =
            Columns::new(&["NAMESPACE", "NAME", "SERVICE", "STATE", "READY", "ADDRESS", "PORTS", "MODE", "CAPTURE"]);
        for w in &self.workloads {
            columns.row([
                w.namespace.clone(),
                w.name.clone(),
                w.services.join(","),
                state(w.state).to_owned(),
                format!("{}/{}", w.ports.iter().filter(|port| port.ready).count(), w.ports.len()),
                w.address.clone(),
                ports(&w.ports),
                w.mode.clone(),
                w.capture.clone(),
            ]);
        }
        // Written workloads that no proxy stands for.
        for o in self
            .objects
            .iter()
            .filter(|o| !self.workloads.iter().any(|w| w.namespace == o.namespace && w.name == o.name))
        {
            columns.row([&o.namespace, &o.name, "", "written", "", "", "", "", ""]);
        }
        columns
    }

    fn written_only(&self) -> Columns {
        let mut columns = Columns::new(&["NAMESPACE", "NAME", "ORIGIN"]);
        for o in &self.objects {
            columns.row([&o.namespace, &o.name, &o.origin]);
        }
        columns
    }

    fn everything(&self) -> Columns {
        let mut columns = Columns::new(&["KIND", "NAMESPACE", "NAME", "ORIGIN"]);
        for o in &self.objects {
            columns.row([&o.kind, &o.namespace, &o.name, &o.origin]);
        }
        for s in self.services.iter().filter(|s| self.written("Service", &s.namespace, &s.name).is_none()) {
            columns.row(["Service", &s.namespace, &s.name, "implied"]);
        }
        for w in self.workloads.iter().filter(|w| self.written("Workload", &w.namespace, &w.name).is_none()) {
            columns.row(["Workload", &w.namespace, &w.name, "registered"]);
        }
        columns
    }

    /// Written objects as they are written; implied services and registered workloads as they could be written.
    fn yaml(&self) -> anyhow::Result<()> {
        let mut first = true;
        let mut separate = || if std::mem::take(&mut first) { Ok(()) } else { output::print("---") };
        for o in &self.objects {
            separate()?;
            output::print(o.text.trim_start_matches("---\n").trim_end())?;
        }
        for s in self.services.iter().filter(|s| self.written("Service", &s.namespace, &s.name).is_none()) {
            separate()?;
            output::print("# implied: a workload named it, nobody wrote it")?;
            let workloads = if self.answering.is_empty() { &self.workloads } else { &self.answering };
            output::yaml(&as_written(s, workloads))?;
        }
        for w in self.workloads.iter().filter(|w| self.written("Workload", &w.namespace, &w.name).is_none()) {
            separate()?;
            output::print("# registered by its proxy, nobody wrote it")?;
            output::yaml(&workload_as_written(w))?;
        }
        Ok(())
    }

    fn json(&self) -> anyhow::Result<()> {
        output::json(&json!({ "services": self.services, "workloads": self.workloads, "objects": self.objects }))
    }
}

fn services(services: &[ServiceView]) -> Columns {
    let mut columns = Columns::new(&["NAMESPACE", "NAME", "PORTS", "ENDPOINTS", "ADDRESS", "ORIGIN"]);
    for s in services {
        let mut endpoints = s.healthy.to_string();
        for (count, what) in [(s.suspect, "suspect"), (s.draining, "draining")] {
            if count > 0 {
                endpoints.push_str(&format!(" +{count} {what}"));
            }
        }
        let origin = if s.implied { "implied" } else { &s.origin };
        let address = s.virtual_ips.first().cloned().unwrap_or_default();
        columns.row([s.namespace.clone(), s.name.clone(), ports(&s.ports), endpoints, address, origin.to_owned()]);
    }
    columns
}

fn state(state: WorkloadState) -> &'static str {
    match state {
        WorkloadState::Connected => "connected",
        WorkloadState::Held => "held",
        WorkloadState::Suspect => "suspect",
        WorkloadState::Draining => "draining",
        WorkloadState::Leaving => "leaving",
        WorkloadState::Certified => "certified",
    }
}

fn ports(ports: &[PortView]) -> String {
    let show = |port: &PortView| match port.protocol.as_str() {
        "" | "detect" => port.port.to_string(),
        protocol => format!("{}/{protocol}", port.port),
    };
    ports.iter().map(show).collect::<Vec<_>>().join(",")
}

/// The port of a workload behind an implied service's port 80 that no workload declares: the first that may speak HTTP.
fn behind_80<'a>(service: &ServiceView, workloads: &'a [WorkloadView]) -> Option<&'a PortView> {
    let own = format!("{}/{}", service.namespace, service.name);
    let ports = || workloads.iter().filter(|w| w.services.contains(&own)).flat_map(|w| &w.ports);
    if ports().any(|port| port.port == 80) {
        return None;
    }
    ports().find(|port| matches!(port.protocol.as_str(), "" | "detect" | "http" | "http2" | "grpc"))
}

/// The document that would replace an implied service with the same.
fn as_written(service: &ServiceView, workloads: &[WorkloadView]) -> Value {
    let several = service.ports.len() > 1;
    let port = |port: &PortView| {
        let mut value = json!({ "port": port.port });
        if !matches!(port.protocol.as_str(), "" | "detect") {
            value["appProtocol"] = json!(port.protocol);
        }
        if !port.name.is_empty() {
            value["name"] = json!(port.name);
        } else if several {
            value["name"] = json!(format!("port-{}", port.port));
        }
        if let (80, Some(behind)) = (port.port, behind_80(service, workloads)) {
            value["targetPort"] = json!(behind.port);
        }
        value
    };
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "namespace": service.namespace, "name": service.name },
        "spec": { "ports": service.ports.iter().map(port).collect::<Vec<_>>() },
    })
}

/// What a person would write for a registered workload.
fn workload_as_written(workload: &WorkloadView) -> Value {
    let port = |port: &PortView| {
        let mut value = json!({ "port": port.port });
        if !matches!(port.protocol.as_str(), "" | "detect") {
            value["protocol"] = json!(port.protocol);
        }
        if !port.name.is_empty() {
            value["name"] = json!(port.name);
        }
        value
    };
    let mut metadata = json!({ "namespace": workload.namespace, "name": workload.name });
    if !workload.labels.is_empty() {
        let labels = workload.labels.iter().map(|(key, value)| (key.clone(), json!(value)));
        metadata["labels"] = Value::Object(labels.collect());
    }
    let mut spec = json!({ "ports": workload.ports.iter().map(port).collect::<Vec<_>>() });
    if let Some((_, name)) = workload.services.first().and_then(|service| service.split_once('/')) {
        spec["service"] = json!(name);
    }
    if matches!(workload.mode.as_str(), "strict" | "permissive") {
        spec["mode"] = json!(workload.mode);
    }
    json!({
        "apiVersion": "sheer.dev/v1alpha1",
        "kind": "Workload",
        "metadata": metadata,
        "spec": spec,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use sheer_core::compile::{Source, lint};

    #[test]
    fn what_nobody_wrote_is_shown_as_it_could_be_written() {
        let port = |port, protocol: &str| PortView { port, protocol: protocol.into(), ..PortView::default() };
        let service = ServiceView {
            namespace: "default".into(),
            name: "web".into(),
            ports: vec![port(80, "http"), port(9000, "tcp"), port(8080, "http")],
            ..ServiceView::default()
        };
        let workload = WorkloadView {
            namespace: "default".into(),
            name: "web-1".into(),
            services: vec!["default/web".into()],
            labels: vec![("version".into(), "1".into())],
            ports: vec![port(9000, "tcp"), port(8080, "http")],
            mode: "strict".into(),
            ..WorkloadView::default()
        };
        let written = as_written(&service, std::slice::from_ref(&workload));
        assert_eq!(written["spec"]["ports"][0]["targetPort"], 8080);
        for value in [written, workload_as_written(&workload)] {
            let findings = lint(&[Source { file: "shown.yaml".into(), text: value.to_string() }]);
            assert!(!findings.iter().any(|it| it.is_error()), "{findings:?}");
        }
    }

    #[test]
    fn kinds_in_any_spelling() {
        for (text, kind) in [("service", "Service"), ("HTTPRoutes", "HTTPRoute"), ("meshes", "Mesh"), ("mesh", "Mesh")]
        {
            assert_eq!(written_kind(text).ok(), Some(kind), "{text}");
        }
        assert!(written_kind("pods").unwrap_err().to_string().contains("HTTPRoute"));
    }
}

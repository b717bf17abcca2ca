//! Hosts with services whose application is the test itself, and a caller's door to them.

use anyhow::{Context, Result, ensure};
use sheer_testmesh::callers::Asked;
use sheer_testmesh::mesh::{Control, PATIENCE, Workload};
use sheer_testmesh::net::{Host, Net};
use sheer_testmesh::program::{Program, run, sheer};
use sheer_testmesh::shop::PLAIN_USER;
use sheer_testmesh::wait;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;

/// Where the caller's application reaches the first service.
pub(crate) const DOOR: &str = "127.0.0.1:9000";

/// Where the caller's proxy shows its metrics.
pub(crate) const METRICS: &str = "127.0.0.1:15102";

/// An application listens on a host: peers' connections are delivered to the address that they dialled.
pub(crate) fn listen(host: &Host, port: u16) -> Result<TcpListener> {
    host.inside(|| Ok(TcpListener::bind(("0.0.0.0", port))?))
}

/// The proxy of a service whose application listens on the host already. It joins by token, wherever the control plane is.
pub(crate) fn beside(
    control: &Control<'_>,
    host: &Host,
    home: &Path,
    service: &str,
    name: &str,
    port: &str,
) -> Result<Program> {
    let flags = ["--name", name, "--port", port, "--capture", "none"];
    join(control, host, home, service, &flags, &["sleep", "infinity"])
}

/// A workload on any host.
pub(crate) fn join(
    control: &Control<'_>,
    host: &Host,
    home: &Path,
    service: &str,
    flags: &[&str],
    command: &[&str],
) -> Result<Program> {
    std::fs::create_dir_all(home)?;
    let token = control.token("default", service, 1)?;
    Workload::new(host, service, home)?.flags(flags).flags(PLAIN_USER).joins(control, &token).start(command)
}

/// The caller: whoever connects to 127.0.0.1:9000 and the ports after it calls these services, in their order.
pub(crate) fn caller(control: &Control<'_>, host: &Host, home: &Path, services: &[&str]) -> Result<Program> {
    let upstreams: Vec<String> = (9000..).zip(services).map(|(port, to)| format!("127.0.0.1:{port}={to}")).collect();
    let mut flags = vec!["--name", "caller-1", "--capture", "none", "--metrics", METRICS];
    flags.extend(upstreams.iter().flat_map(|upstream| ["--upstream", upstream.as_str()]));
    let mut program = join(control, host, home, "caller", &flags, &["sleep", "infinity"])?;
    program.prints("is ready", PATIENCE)?;
    Ok(program)
}

/// Where the application of one of many callers reaches the service: the first at [`DOOR`].
pub(crate) fn door(number: usize) -> String {
    format!("127.0.0.1:{}", 9000 + number)
}

/// Many callers of one service, each with a proxy and a door of its own.
pub(crate) fn callers_of(
    control: &Control<'_>,
    host: &Host,
    home: &Path,
    service: &str,
    number: usize,
) -> Result<Vec<Program>> {
    let fleet = format!(
        "apiVersion: sheer.dev/v1alpha1\nkind: Enrollment\nmetadata: {{name: callers}}\nspec:\n  methods: [{{token: {{ttl: 1h, \
         uses: {number}}}}}]\n  serviceAccounts: [caller]\n"
    );
    control.write("callers.yaml", &fleet)?;
    let token = wait::until("the Enrollment is in force", PATIENCE, || {
        control.token("default", "caller", u32::try_from(number)?)
    })?;
    let start = |it: usize| {
        let home = home.join(it.to_string());
        std::fs::create_dir_all(&home)?;
        let (name, upstream) = (format!("caller-{it}"), format!("{}={service}", door(it)));
        let flags = ["--name", &name, "--capture", "none", "--upstream", &upstream];
        let workload = Workload::new(host, "caller", &home)?.flags(&flags).flags(PLAIN_USER);
        workload.joins(control, &token).start(&["sleep", "infinity"])
    };
    let mut running = Vec::new();
    // A few at once: each has a key to make, and a machine has few processors.
    for first in (0..number).step_by(8) {
        let mut some = (first..number.min(first + 8)).map(start).collect::<Result<Vec<_>>>()?;
        some.iter_mut().try_for_each(|it| it.prints("is ready", PATIENCE))?;
        running.append(&mut some);
    }
    Ok(running)
}

/// A workload of the sample application in a network of its own.
pub(crate) fn sample(
    control: &Control<'_>,
    host: &Host,
    home: &Path,
    kind: [&str; 3],
    name: &str,
    more: &[&str],
) -> Result<Program> {
    let [service, kind, port] = kind;
    let program = sheer()?;
    let number = port.split('/').next().unwrap_or(port);
    let command = [&program.to_string_lossy(), "__demo-service", kind, "--port", number, "--version", name];
    join(control, host, home, service, &[&["--name", name, "--port", port], more].concat(), &command)
}

/// What a proxy's metrics say, as text.
pub(crate) fn metrics(host: &Host, address: &str) -> Result<String> {
    run(host.command("curl").args(["-sS", "--fail", "--max-time", "5", &format!("http://{address}/metrics")]))
}

/// The sum of all values of a metric whose labels contain each of these.
pub(crate) fn value(text: &str, metric: &str, labels: &[&str]) -> f64 {
    let lines = text.lines().filter(|line| line.split(['{', ' ']).next() == Some(metric));
    let lines = lines.filter(|line| labels.iter().all(|label| line.contains(label)));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// Waits until a service of this control plane can be called at this door.
pub(crate) fn is_served(host: &Host, door: &str) -> Result<()> {
    let door: SocketAddr = door.parse()?;
    wait::until("the service answers", PATIENCE, || sheer_testmesh::callers::ask_once(host, door)).map(drop)
}

/// A network with a control plane on a host of its own and a host for everything else.
pub(crate) struct Ground {
    pub(crate) net: Net,
    pub(crate) center: Host,
    pub(crate) near: Host,
}

impl Ground {
    pub(crate) fn new() -> Result<Self> {
        let net = Net::new()?;
        let (center, near) = (net.host("center")?, net.host("near")?);
        Ok(Self { net, center, near })
    }

    pub(crate) fn control(&self) -> Result<Control<'_>> {
        Control::start(&self.center, &self.net.directory().join("control"))
    }

    pub(crate) fn home(&self, name: &str) -> Result<std::path::PathBuf> {
        let home = self.net.directory().join(name);
        std::fs::create_dir_all(&home).with_context(|| home.display().to_string())?;
        Ok(home)
    }
}

/// Holds when every call was answered well. How long one waited says more of a busy machine than of a fault.
pub(crate) fn none_failed(asked: &[Asked]) -> Result<()> {
    let failed: Vec<_> = asked.iter().filter(|it| it.answer.is_err()).collect();
    ensure!(failed.is_empty(), "{} of {} failed: {:?}", failed.len(), asked.len(), failed.first());
    Ok(())
}

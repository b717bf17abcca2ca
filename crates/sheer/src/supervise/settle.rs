//! What the flags mean together: every decision that needs nothing but them and the machine's facts.

use super::account::{self, Chosen};
use crate::cmd::run::{CaptureChoice, ModeChoice, Workload};
use anyhow::{Result, bail};
use sheer_core::name::ServiceName;
use sheer_proxy::plan::{Capture, Mode};

/// Ports of Sheer that no workload is let through to.
const OWN_PORTS: [u16; 7] = [15000, 15001, 15006, 15012, 15020, 15053, 15080];

/// Decisions.
#[derive(Clone, Debug)]
pub(super) struct Settled {
    pub(super) service: ServiceName,
    pub(super) capture: Capture,
    pub(super) mode: Mode,
    pub(super) account: Chosen,
    /// For the person who starts it.
    pub(super) remarks: Vec<String>,
}

impl Settled {
    /// Decides, or says what does not fit together.
    pub(super) fn of(workload: &Workload, has_command: bool) -> Result<Self> {
        let capture = capture(workload, has_command)?;
        let mode = workload.mode.map_or_else(|| default_mode(capture), Mode::from);
        check_ports(workload, capture)?;
        let account = if has_command {
            account::command(workload.user.as_deref(), workload.group.as_deref())?
        } else {
            Chosen { ids: None, set: Vec::new(), remark: None }
        };
        let mut remarks: Vec<String> = account.remark.clone().into_iter().collect();
        if matches!(capture, Capture::Env | Capture::None) && has_command {
            let taken = if capture == Capture::Env {
                "what heeds HTTP_PROXY, HTTPS_PROXY and ALL_PROXY is captured"
            } else {
                "only --upstream and --publish pass through the mesh"
            };
            remarks.push(format!(
                "{taken}; other traffic of the command goes around the mesh, and who reaches its ports directly is not \
                 checked{}",
                if workload.mode == Some(ModeChoice::Strict) { ": strict cannot be enforced here" } else { "" }
            ));
        }
        Ok(Self { service: workload.service.clone(), capture, mode, account, remarks })
    }
}

fn capture(workload: &Workload, has_command: bool) -> Result<Capture> {
    let selects = workload.unit.is_some() || workload.cgroup.is_some();
    let chosen = match workload.capture {
        CaptureChoice::Auto if has_command && !selects => Capture::Netns,
        CaptureChoice::Auto if selects || workload.user.is_some() => Capture::Cgroup,
        CaptureChoice::Auto => Capture::Here,
        CaptureChoice::Netns => Capture::Netns,
        CaptureChoice::Cgroup => Capture::Cgroup,
        CaptureChoice::Here => Capture::Here,
        CaptureChoice::Env => Capture::Env,
        CaptureChoice::None => Capture::None,
    };
    let root = nix::unistd::geteuid().is_root();
    match chosen {
        Capture::Netns if !has_command => bail!(
            "--capture netns needs a command to start ('sheer run'); for one that runs already use --capture cgroup with \
             --unit, --cgroup or --user"
        ),
        Capture::Cgroup if !selects && workload.user.is_none() => {
            bail!("--capture cgroup must know whose traffic to take: give --unit, --cgroup or --user")
        }
        Capture::Cgroup | Capture::Here if !root => bail!(
            "changing the rules of a shared network needs root (or a container with CAP_NET_ADMIN and user id 0); use \
             sudo, or '--capture env' or '--capture none'"
        ),
        Capture::Env if !has_command => {
            bail!("--capture env gives variables to a command; use 'sheer run', or '--capture none' with --upstream")
        }
        Capture::Netns if workload.netns.is_some() && !root => {
            bail!("--netns: only root may enter a network namespace that exists; use sudo, or leave it out")
        }
        _ if workload.netns.is_some() && chosen != Capture::Netns => bail!("--netns goes with --capture netns alone"),
        _ if selects && chosen != Capture::Cgroup => bail!("--unit and --cgroup go with --capture cgroup alone"),
        _ => Ok(chosen),
    }
}

/// Strict where nothing else can be there, careful where something runs already.
fn default_mode(capture: Capture) -> Mode {
    match capture {
        Capture::Netns => Mode::Strict,
        Capture::Cgroup | Capture::Here => Mode::Watch,
        Capture::Env | Capture::None => Mode::Permissive,
    }
}

fn check_ports(workload: &Workload, capture: Capture) -> Result<()> {
    let declared: Vec<u16> = workload.port.iter().map(|port| port.port).collect();
    if let Some(twice) = declared.iter().enumerate().find(|(index, port)| declared[..*index].contains(port)) {
        bail!("--port {} is given twice", twice.1);
    }
    for publish in &workload.publish {
        let target = publish.target;
        if !declared.contains(&target) {
            bail!(
                "--publish {target}: the application has no such port; declare it by --port {target}, or publish one of its ports by --publish {}=PORT",
                publish.port
            );
        }
        if capture != Capture::Netns && declared.contains(&publish.port) {
            bail!(
                "--publish {0}: the application itself listens on port {0} of this host; publish another, as \
                 --publish 1{0}={target}",
                publish.port
            );
        }
    }
    if workload.inbound_port.iter().filter(|it| it.target.is_none()).count() > 1 {
        bail!(
            "--inbound-port is given twice; of further ones say which port of the application they mean, as --inbound-port PORT=PORT"
        );
    }
    let mut meant = Vec::new();
    for target in workload.inbound_port.iter().filter_map(|it| it.target) {
        if matches!(capture, Capture::Cgroup | Capture::Here) {
            bail!("--inbound-port PORT={target}: in a shared network plaintext arrives at port {target} itself");
        }
        if !declared.contains(&target) {
            bail!("--inbound-port PORT={target}: the application has no such port; declare it by --port {target}");
        }
        if meant.contains(&target) {
            bail!("--inbound-port PORT={target} is given twice");
        }
        meant.push(target);
    }
    if capture != Capture::Netns && !workload.host_port.is_empty() {
        bail!("--host-port goes with --capture netns alone: the workload shares this host's loopback already");
    }
    if let Some(port) = workload.host_port.iter().find(|port| OWN_PORTS.contains(port)) {
        bail!("--host-port {port} is one of Sheer's own ports, which no workload may reach");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        workload: Workload,
    }

    fn settle(line: &str, has_command: bool) -> Result<Settled, String> {
        let words = std::iter::once("sheer").chain(line.split_ascii_whitespace());
        let line = Line::try_parse_from(words).map_err(|error| error.to_string())?;
        Settled::of(&line.workload, has_command).map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn what_sheer_starts_gets_its_own_network_and_is_strict() {
        let settled = settle("web --port 8080", true).unwrap();
        assert_eq!((settled.capture, settled.mode), (Capture::Netns, Mode::Strict));
    }

    #[test]
    fn what_does_not_fit_together_is_said() {
        for (line, has_command, expected) in [
            ("web --publish 8080", true, "declare it by --port 8080"),
            ("web --port 8080 --publish 8080 --capture env", true, "publish another"),
            ("web --port 80 --port 80", true, "given twice"),
            ("web --port 80 --inbound-port 1 --inbound-port 2", true, "given twice"),
            ("web --port 80 --inbound-port 1=81", true, "declare it by --port 81"),
            ("web --port 80 --inbound-port 1=80 --inbound-port 2=80", true, "given twice"),
            ("web --port 80 --inbound-port 1=80 --capture here", false, "in a shared network"),
            ("web --host-port 15012", true, "Sheer's own"),
            ("web --host-port 5432 --capture env", true, "--capture netns alone"),
            ("web --capture netns", false, "needs a command"),
            ("web --capture cgroup", false, "--unit, --cgroup or --user"),
            ("web --capture env --unit a.service", true, "--capture cgroup alone"),
            ("web --capture env", false, "sheer run"),
            ("web --capture env --netns blue", true, "--capture netns alone"),
            ("web --port 99999", true, "is no port"),
            ("Web", true, "is no name"),
            ("web --user no-such-user", true, "no-such-user"),
        ] {
            let error = settle(line, has_command).expect_err(line);
            assert!(error.contains(expected), "{line}: {error}");
        }
    }

    #[test]
    fn env_says_what_it_cannot_do() {
        let settled = settle("web --capture env --mode strict", true).unwrap();
        assert!(settled.remarks.iter().any(|remark| remark.contains("strict cannot be enforced")));
    }
}

//! `sheer demo`: the whole thing on one machine, with sample services and load.
//!
//! Everything runs as processes of this same binary, started as a person would start them: `sheer up`, and a
//! `sheer run` for each service. They end with this process, however it ends: by signal in order, and when it is killed
//! the kernel tells them ([`stage::become_child`]). What they share on disk is one directory, which [`sweep`] removes.

mod cast;
mod stage;

use crate::client::Connect;
use crate::cmd::check;
use crate::duration;
use crate::output::{Progress, typed_program};
use anyhow::{Context as _, bail};
use cast::Member;
use owo_colors::OwoColorize as _;
use serde_json::Value;
use sheer_core::api::{Applied, Apply, Link, SourceFile, Version, WorkloadState, WorkloadView};
use stage::Stage;
use std::io::{BufRead as _, BufReader, IsTerminal as _, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

pub(crate) use stage::{become_child, sweep};

/// How long everything may take to be ready.
const PATIENCE: Duration = Duration::from_secs(90);
/// How often things that are waited for are looked at.
const LOOK: Duration = Duration::from_millis(100);
/// How long a process may take to end once asked: five seconds of serving on, the open requests, and some air.
const END: Duration = Duration::from_secs(20);

/// Flags of `sheer demo`.
#[derive(clap::Args, Clone, Debug)]
#[command(after_help = "Examples:
  sheer demo                 # until Ctrl-C
  sheer demo --for 60s       # exit status 0 when no request failed")]
pub(crate) struct Args {
    /// End after this long; the exit status then says whether every request was answered [default: until Ctrl-C]
    #[arg(id = "for", long = "for", value_name = "DURATION", value_parser = duration::parse)]
    duration: Option<Duration>,
}

/// Runs the demonstration to its end.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    require(cast::PROGRAMS)?;
    let signals = signals()?;
    anstream::println!("{} Ctrl-C ends it and removes everything.", "Starting the Sheer demonstration.".bold());
    let mut stage = Stage::set()?;
    let result = perform(&args, &mut stage, &signals);
    anstream::println!("Ending; what is open is finished first (Ctrl-C: at once) ...");
    let _progress = Progress::of("waiting for the services to end");
    stage.strike(END, || signals.try_recv().is_ok());
    let verdict = result?;
    Ok(if verdict { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Refuses to begin what would fail in the middle.
fn require(programs: &[(&str, &str)]) -> anyhow::Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<_> = std::env::split_paths(&path).collect();
    directories.extend(["/usr/sbin".into(), "/sbin".into()]);
    for (program, package) in programs {
        if !directories.iter().any(|directory| directory.join(program).is_file()) {
            bail!(
                "the demonstration needs {program}, which is not installed; on Debian: sudo apt-get install {package}"
            );
        }
    }
    if let Some(obstacle) = check::obstacle() {
        bail!("the demonstration's services cannot have networks of their own: {}; {}", obstacle.why, obstacle.mend);
    }
    Ok(())
}

/// The demonstration between setting the stage and striking it; whether all went well.
fn perform(args: &Args, stage: &mut Stage, signals: &mpsc::Receiver<()>) -> anyhow::Result<bool> {
    let page = format!("127.0.0.1:{}", free_port(15080)?);
    let shop = free_port(8080)?;
    let work = stage.directory().to_owned();
    let plane = [
        "up".into(),
        "--config".into(),
        work.join("mesh.d").into_os_string(),
        "--state".into(),
        work.join("control").into_os_string(),
        "--api-listen".into(),
        page.into(),
    ];
    stage.start("control", plane.to_vec(), None)?;
    let client = Connect::default().client()?;
    until("control", stage, signals, || client.get::<Version>("/api/v1/version").is_ok())?;
    ready("control", "control plane, certificates, names");
    let files = cast::OBJECTS.iter().map(|(name, text)| SourceFile { name: (*name).into(), text: (*text).into() });
    let _: Applied = client
        .post("/api/v1/apply", &Apply { files: files.collect(), dry_run: false })
        .context("cannot apply the sample configuration")?;
    for (name, text) in cast::STEPS {
        let path = work.join("canary").join(name);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }

    let mut waiting: Vec<Member> = cast::services(shop);
    for member in &waiting {
        stage.start(member.name, member.command_line(stage), None)?;
    }
    let begun = Instant::now();
    let mut progress = Progress::of(awaited(&waiting));
    while !waiting.is_empty() {
        let workloads: Vec<WorkloadView> = client.get("/api/v1/workloads")?;
        let serves = |member: &Member| workloads.iter().any(|view| is_serving(view, member.name));
        if waiting.iter().any(serves) {
            // Lines and a spinner do not go together.
            drop(progress);
            for member in waiting.extract_if(.., |member| serves(member)) {
                ready(member.name, member.what);
            }
            progress = Progress::of(awaited(&waiting));
        }
        for member in &waiting {
            stage.must_run(member.name)?;
        }
        if interrupted(signals, LOOK) {
            return Ok(true);
        }
        if let Some(late) = waiting.first()
            && begun.elapsed() > PATIENCE
        {
            bail!("{} is not ready after {PATIENCE:?}; it said:\n{}", late.name, stage.last_words(late.name));
        }
    }

    drop(progress);

    let counts = Arc::new(Mutex::new(Counts::default()));
    let load = cast::load();
    stage.start(load.name, load.command_line(stage), Some(Box::new(read_counts(counts.clone()))))?;
    until(load.name, stage, signals, || current(&counts).sent > 0)?;
    ready(load.name, load.what);

    let link: Option<Link> = client.post("/api/v1/links", &()).ok();
    let page = link.map_or_else(|| "sheer stat".to_owned(), |link| link.url);
    anstream::println!("{}", cast::what_next(&typed_program(), shop, &page, &work.join("canary")));
    watch(args.duration, stage, signals, &counts);
    stage.end(load.name, END);
    conclude(stage, &current(&counts))
}

/// Shows the counts until it is time to end.
fn watch(duration: Option<Duration>, stage: &mut Stage, signals: &mpsc::Receiver<()>, counts: &Mutex<Counts>) {
    let terminal = std::io::stdout().is_terminal();
    let begun = Instant::now();
    let mut said = Instant::now();
    let mut before = current(counts);
    loop {
        for (name, status) in stage.ended() {
            anstream::println!("{}{}", clear(terminal), format!("{name} has ended ({status})").yellow());
        }
        if interrupted(signals, LOOK) || duration.is_some_and(|duration| begun.elapsed() >= duration) {
            break;
        }
        let every = if terminal { Duration::from_secs(1) } else { Duration::from_secs(10) };
        let passed = said.elapsed();
        if passed >= every {
            let now = current(counts);
            let rate = now.sent.saturating_sub(before.sent) as f64 / passed.as_secs_f64();
            let line = format!("load: {rate:.0} requests/s, {} answered, {} failed", now.ok, now.failed);
            if terminal {
                print!("{}{line}", clear(true));
                // A terminal that went away is noticed by its signal.
                let _ = std::io::stdout().flush();
            } else {
                anstream::println!("{line}");
            }
            (said, before) = (Instant::now(), now);
        }
    }
    if terminal {
        println!();
    }
}

fn clear(terminal: bool) -> &'static str {
    if terminal { "\r\x1b[2K" } else { "" }
}

/// Says what the load counted; whether every request was answered well and every service lasted.
fn conclude(stage: &mut Stage, counts: &Counts) -> anyhow::Result<bool> {
    let lost = stage.lost();
    if counts.sent == 0 {
        bail!("the load sent nothing; it said:\n{}", stage.last_words("load"));
    }
    let verdict = format!("{} requests, {} answered, {} failed", counts.sent, counts.ok, counts.failed);
    let well = counts.failed == 0 && lost.is_empty();
    anstream::println!("{}", if well { verdict.green().to_string() } else { verdict.red().to_string() });
    for failure in &counts.failures {
        anstream::println!("  {failure}");
    }
    for name in lost {
        anstream::println!("  {name} ended early; it said:\n{}", stage.last_words(&name));
    }
    Ok(well)
}

/// What the load generator says it counted.
#[derive(Clone, Debug, Default)]
struct Counts {
    sent: u64,
    ok: u64,
    failed: u64,
    failures: Vec<String>,
}

impl Counts {
    /// Takes a line of the generator's output over.
    fn read(&mut self, line: &str) {
        let Ok(value) = serde_json::from_str::<Value>(line) else { return };
        let (totals, loads) = match value.get("report") {
            Some(report) => (&report["total"], report["loads"].as_object()),
            None => (&value, None),
        };
        let count = |name: &str| totals[name].as_u64().unwrap_or(0);
        self.sent = count("sent");
        self.ok = count("ok");
        self.failed = ["non_2xx", "connect", "reset", "short", "reordered", "late"].into_iter().map(count).sum();
        for (name, load) in loads.into_iter().flatten() {
            let failures = load["failures"].as_array().into_iter().flatten();
            self.failures.extend(failures.take(3).map(|failure| {
                let text = |key: &str| failure[key].as_str().unwrap_or_default().to_owned();
                let after = failure["failed_ms"].as_f64().unwrap_or(0.0) / 1e3;
                format!("{name}, after {after:.1} s: {}: {}", text("kind"), text("detail"))
            }));
        }
    }
}

fn current(counts: &Mutex<Counts>) -> Counts {
    counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Reads the generator's lines for as long as it writes.
fn read_counts(counts: Arc<Mutex<Counts>>) -> impl FnOnce(std::process::ChildStdout) + Send + 'static {
    move |output| {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            counts.lock().unwrap_or_else(PoisonError::into_inner).read(&line);
        }
    }
}

/// Waits for a condition while the process that brings it about runs.
fn until(
    name: &str,
    stage: &mut Stage,
    signals: &mpsc::Receiver<()>,
    mut condition: impl FnMut() -> bool,
) -> anyhow::Result<()> {
    let begun = Instant::now();
    let _progress = Progress::of(format!("waiting for {name}"));
    while !condition() {
        stage.must_run(name)?;
        if interrupted(signals, LOOK) {
            bail!("ended before everything was ready");
        }
        if begun.elapsed() > PATIENCE {
            bail!("{name} is not ready after {PATIENCE:?}; it said:\n{}", stage.last_words(name));
        }
    }
    Ok(())
}

fn is_serving(view: &WorkloadView, name: &str) -> bool {
    view.name == name && view.state == WorkloadState::Connected && view.ports.iter().all(|port| port.ready)
}

fn awaited(members: &[Member]) -> String {
    let names: Vec<&str> = members.iter().map(|member| member.name).collect();
    format!("waiting for {}", names.join(", "))
}

fn ready(name: &str, what: &str) {
    anstream::println!("  {} {name:12} {}", "ready".green(), what.dimmed());
}

/// The wanted port of loopback if nobody has it, else one that is free.
fn free_port(wanted: u16) -> anyhow::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, wanted))
        .or_else(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
        .context("cannot listen on 127.0.0.1")?;
    Ok(listener.local_addr()?.port())
}

/// Each SIGINT, SIGTERM and SIGHUP, one message.
fn signals() -> anyhow::Result<mpsc::Receiver<()>> {
    use tokio::signal::unix::{SignalKind, signal};
    // More than this many unread ones say nothing new.
    let (sender, receiver) = mpsc::sync_channel(8);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let guard = runtime.enter();
    let mut streams = Vec::new();
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
        streams.push(signal(kind).context("cannot watch for signals")?);
    }
    drop(guard);
    std::thread::spawn(move || {
        runtime.block_on(async {
            let [interrupt, terminate, hangup] = streams.as_mut_slice() else { return };
            loop {
                tokio::select! {
                    _ = interrupt.recv() => (),
                    _ = terminate.recv() => (),
                    _ = hangup.recv() => (),
                }
                let _ = sender.try_send(());
            }
        });
    });
    Ok(receiver)
}

fn interrupted(signals: &mpsc::Receiver<()>, wait: Duration) -> bool {
    signals.recv_timeout(wait).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generators_lines_are_understood() {
        let mut counts = Counts::default();
        counts.read(r#"{"sent":10,"ok":7,"non_2xx":1,"reset":1,"hung_up":0}"#);
        assert_eq!((counts.sent, counts.ok, counts.failed), (10, 7, 2));
        counts.read(
            r#"{"report":{"total":{"sent":12,"ok":11,"late":1},"loads":{"http1 web":{"failures":[{"failed_ms":1500,"kind":"late","detail":"x"}]}}}}"#,
        );
        assert_eq!((counts.sent, counts.ok, counts.failed), (12, 11, 1));
        assert_eq!(counts.failures, ["http1 web, after 1.5 s: late: x"]);
        counts.read("no JSON");
        assert_eq!(counts.sent, 12);
    }
}

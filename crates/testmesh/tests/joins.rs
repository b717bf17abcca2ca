//! Many proxies join at once, come back to a control plane that died, and join through a line that breaks. The proxies
//! are the proxy's own keeper of its certificate and its own synchronisation, without a data path.

use anyhow::{Context, Result, ensure};
use arc_swap::ArcSwap;
use nix::sys::signal::Signal;
use sheer_core::api::TokenRequest;
use sheer_core::name::DnsLabel;
use sheer_core::snapshot::Snapshot;
use sheer_core::wire::v1;
use sheer_proxy::control::{Address, Machine};
use sheer_proxy::identity::{IdentityError, Keeper, Wanted};
use sheer_proxy::state::Directory;
use sheer_proxy::sync::{Demand, Leaving, Outputs, Setup, Standing, Sync};
use sheer_testmesh::faults::{row, times};
use sheer_testmesh::mesh::{Control, PATIENCE};
use sheer_testmesh::net::Net;
use sheer_testmesh::wait;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

/// How many proxies there are, as a rule and in the long form.
const HERD: (usize, usize) = (200, 1000);

const ENROLLMENT: &str = "apiVersion: sheer.dev/v1alpha1\nkind: Enrollment\nmetadata: {name: fleet}\nspec:\n  \
                          methods: [{token: {ttl: 1h, uses: 10000}}]\n  serviceAccounts: [web]\n";

fn wanted(name: &str, control: &[&str], token_file: &Path) -> Wanted {
    Wanted {
        namespace: "default".into(),
        service_account: "web".into(),
        workload: name.into(),
        control: control.iter().filter_map(|text| Address::parse(text).ok()).collect(),
        token_file: Some(token_file.to_owned()),
    }
}

/// What the control plane tells a proxy, and when.
struct Simulated {
    snapshot: Arc<ArcSwap<Snapshot>>,
    attached: Arc<Mutex<Vec<Instant>>>,
}

impl Simulated {
    fn attached(&self) -> Vec<Instant> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn knows(&self, service: &str) -> bool {
        self.snapshot.load().service_named(service).is_some()
    }

    /// A proxy with its files below `state`, whose tasks run until `until` is dropped.
    async fn run(self: Arc<Self>, wanted: Wanted, state: PathBuf, mut until: watch::Receiver<()>) -> Result<()> {
        let directory = Directory::open(&state)?;
        let namespace = DnsLabel::parse("default")?;
        let outputs = Outputs {
            snapshot: self.snapshot.clone(),
            endpoints: Arc::default(),
            zone: Arc::default(),
            changed: Arc::new(watch::channel(0).0),
            trust: Arc::new(watch::channel(None).0),
            metrics: Arc::default(),
        };
        let registration = v1::Registration {
            namespace: wanted.namespace.clone(),
            name: wanted.workload.clone(),
            service: "default/web".into(),
            ports: vec![v1::ListeningPort { port: 8080, mesh_port: 8080, ..Default::default() }],
            ..Default::default()
        };
        let trust = outputs.trust.subscribe();
        let (control, metrics) = (wanted.control.clone(), outputs.metrics.clone());
        let keeper = Keeper::new(wanted, directory.clone(), Arc::default(), trust, metrics, Arc::new(Machine));
        let (_demand, demands) = Demand::channel();
        let (_ports, ready_ports) = watch::channel(BTreeSet::new());
        let (_leave, leaving) = watch::channel(Leaving::No);
        let (held, renew) = (keeper.held(), keeper.renew());
        let sync = Sync::new(Setup {
            namespace,
            control,
            registration,
            ready_ports,
            leaving,
            held,
            renew,
            demands,
            outputs,
            directory,
            outside: Arc::new(Machine),
        });
        let mut standing = sync.standing();
        let noted = async {
            while standing.changed().await.is_ok() {
                match &*standing.borrow_and_update() {
                    Standing::Registered => {
                        self.attached.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
                    }
                    Standing::Refused { message } => return anyhow::Error::msg(message.clone()),
                    Standing::Unknown => {}
                }
            }
            std::future::pending().await
        };
        tokio::select! {
            error = keeper.run() => Err(error.into()),
            refused = noted => Err(refused),
            () = sync.run() => Ok(()),
            _ = until.changed() => Ok(()),
        }
    }
}

/// When everybody attached again after this moment, in order; an error while somebody has not.
fn returns(herd: &[Arc<Simulated>], after: Instant) -> Result<Vec<Duration>> {
    let first = |it: &Arc<Simulated>| it.attached().into_iter().find(|at| *at > after);
    let mut times: Vec<Duration> = herd.iter().filter_map(first).map(|at| at - after).collect();
    ensure!(times.len() == herd.len(), "{} of {} are attached", times.len(), herd.len());
    times.sort();
    Ok(times)
}

fn at_share(times: &[Duration], percent: usize) -> Duration {
    times[(times.len() - 1) * percent / 100]
}

/// Kills the control plane, keeps it away for a while, changes something, and measures how everybody comes back.
fn come_back(
    control: &mut Control<'_>,
    herd: &[Arc<Simulated>],
    away: Duration,
    change: &str,
) -> Result<Vec<Duration>> {
    let killed = Instant::now();
    control.program.signal(Signal::SIGKILL)?;
    control.program.wait(PATIENCE)?;
    let service =
        format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {change}}}\nspec: {{ports: [{{port: 80}}]}}\n");
    control.write(&format!("{change}.yaml"), &service)?;
    wait::until_true("the outage is over", away + PATIENCE, || killed.elapsed() >= away)?;
    control.restart()?;
    let ready = Instant::now();
    let limit = Duration::from_secs(30);
    let times = wait::until("everybody has come back", limit, || returns(herd, killed))?;
    wait::until_true("everybody knows of the change", limit.saturating_sub(ready.elapsed()), || {
        herd.iter().all(|it| it.knows(change))
    })?;
    let [first, tenth, half, most, last] = [0, 10, 50, 90, 100].map(|percent| at_share(&times, percent));
    eprintln!(
        "away {:?}, ready after {:?}: back after {first:.2?}, 10 % {tenth:.2?}, 50 % {half:.2?}, 90 % {most:.2?}, last \
         {last:.2?}; in force {:.2?} after it was ready",
        away,
        ready - killed,
        ready.elapsed()
    );
    Ok(times)
}

#[test]
fn two_hundred_join_with_one_token_and_come_back_one_by_one() -> Result<()> {
    let count = times(HERD.0, HERD.1);
    let done =
        format!("{count} proxies join with one token at once, and come back to a control plane that was killed, twice");
    row("F19", &done, "all back within 30 s of its return, spread over seconds, and no second wave", herd_of(count))
}

fn herd_of(count: usize) -> Result<String> {
    let net = Net::new()?;
    let (core, edge) = (net.host("core")?, net.host("edge")?);
    let mut control = Control::start(&core, &net.directory().join("control"))?;
    control.write("fleet.yaml", &ENROLLMENT.replace("10000", &count.to_string()))?;
    let token =
        wait::until("the Enrollment is in force", PATIENCE, || control.token("default", "web", u32::try_from(count)?))?;
    let address = control.address();
    let new = || Simulated {
        snapshot: Arc::new(ArcSwap::from_pointee(Snapshot::new(DnsLabel::parse("default").expect("a name")))),
        attached: Arc::default(),
    };
    let herd: Vec<Arc<Simulated>> = (0..count).map(|_| Arc::new(new())).collect();
    let home = net.directory().join("herd");
    // Dropped when the scenario ends, however it ends.
    let (end, ended) = watch::channel(());
    std::thread::scope(|scope| {
        let end = end;
        let proxies = scope.spawn(|| {
            edge.inside(|| {
                tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
                    let mut running = JoinSet::new();
                    for (number, proxy) in herd.iter().enumerate() {
                        let name = format!("web-{number}");
                        let wanted = wanted(&name, &[&address], &token);
                        running.spawn(proxy.clone().run(wanted, home.join(name), ended.clone()));
                    }
                    while let Some(proxy) = running.join_next().await {
                        proxy??;
                    }
                    Ok(())
                })
            })
        });
        let begun = Instant::now();
        let times = wait::until("all have joined", Duration::from_secs(30 + count as u64 / 10), || {
            ensure!(!proxies.is_finished(), "a proxy gave up");
            returns(&herd, begun - Duration::from_millis(1))
        });
        let scenario = times.and_then(|times| {
            eprintln!("{count} joined within {:.2?}", at_share(&times, 100));
            let registered = control.query(&["get", "workloads"])?;
            let registered = registered["workloads"].as_array().context("no list")?.len();
            ensure!(registered == count, "{registered} workloads are registered");
            // The token is used up: not one use was lost to a join that had to be tried twice.
            let late = edge.inside(|| {
                let keeper = keeper(&wanted("late", &[&address], &token), &home.join("late"))?;
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                Ok(runtime.block_on(keeper.run()).to_string())
            })?;
            ensure!(late.contains(&format!("already used by {count}")), "{late}");

            // As soon as it can be, and after a while: nobody comes at once, and everybody soon.
            let mut figures = Vec::new();
            for (away, change) in [(0, "soon"), (3, "later")] {
                let times = come_back(&mut control, &herd, Duration::from_secs(away), change)?;
                let spread = at_share(&times, 100) - at_share(&times, 0);
                ensure!(spread >= Duration::from_secs(5), "all were back within {spread:?}: {times:?}");
                let busiest =
                    times.iter().map(|at| times.iter().filter(|it| **it >= *at && **it - *at < SECOND).count());
                let busiest = busiest.max().unwrap_or_default();
                ensure!(busiest <= count / 2, "{busiest} came within one second: {times:?}");
                figures.push(format!("{:.1?}, {busiest} in the busiest second", at_share(&times, 100)));
            }
            Ok(format!("the last was back {}", figures.join("; ")))
        });
        drop(end);
        let ended = proxies.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        ended.and(scenario)
    })
}

const SECOND: Duration = Duration::from_secs(1);

fn keeper(wanted: &Wanted, state: &Path) -> Result<Keeper> {
    let trust = watch::channel(None).1;
    let directory = Directory::open(state)?;
    Ok(Keeper::new(wanted.clone(), directory, Arc::default(), trust, Arc::default(), Arc::new(Machine)))
}

/// Which way of a connection breaks.
#[derive(Clone, Copy, Debug)]
enum Way {
    Up,
    Down,
}

/// Where a connection breaks: after this many bytes of this way have passed.
#[derive(Clone, Copy, Debug)]
struct Cut {
    way: Way,
    after: usize,
}

/// Passes the bytes of two connections to a control plane and cuts the first of them. Counts what passed each way.
struct Relay {
    address: SocketAddr,
    broken: watch::Receiver<bool>,
    passed: Arc<[AtomicUsize; 2]>,
    _task: tokio::task::JoinHandle<()>,
}

impl Drop for Relay {
    fn drop(&mut self) {
        self._task.abort();
    }
}

impl Relay {
    async fn start(to: SocketAddr, cut: Cut) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (breaks, broken) = watch::channel(false);
        let passed: Arc<[AtomicUsize; 2]> = Arc::default();
        let counted = passed.clone();
        let task = tokio::spawn(async move {
            let mut limits = match cut.way {
                Way::Up => [cut.after, usize::MAX],
                Way::Down => [usize::MAX, cut.after],
            };
            while let Ok((near, _)) = listener.accept().await {
                let Ok(far) = TcpStream::connect(to).await else { return };
                let ((mut near_in, mut near_out), (mut far_in, mut far_out)) = (near.into_split(), far.into_split());
                // Whichever way ends first takes the other with it: both sockets close.
                tokio::select! {
                    () = pass(&mut near_in, &mut far_out, limits[0], &counted[0]) => {}
                    () = pass(&mut far_in, &mut near_out, limits[1], &counted[1]) => {}
                }
                limits = [usize::MAX; 2];
                breaks.send_replace(true);
            }
        });
        Ok(Self { address, broken, passed, _task: task })
    }
}

/// Passes at most so many bytes, until the other end closes.
async fn pass(
    from: &mut (impl AsyncReadExt + Unpin),
    to: &mut (impl AsyncWriteExt + Unpin),
    limit: usize,
    passed: &AtomicUsize,
) {
    let mut buffer = [0; 4096];
    let mut left = limit;
    while left > 0 {
        let room = left.min(buffer.len());
        let Ok(count @ 1..) = from.read(&mut buffer[..room]).await else { return };
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
        passed.fetch_add(count, Ordering::Relaxed);
        left -= count;
    }
}

/// Runs a keeper until it has a certificate.
async fn certified(keeper: Keeper) -> Result<(), IdentityError> {
    let mut held = keeper.held();
    tokio::select! {
        error = keeper.run() => Err(error),
        _ = held.wait_for(Option::is_some) => Ok(()),
    }
}

/// A join whose connection breaks there, then another attempt with the same key: by the same process, or by the one that
/// is started in its place.
async fn broken_join(to: SocketAddr, token: &Path, home: &Path, cut: Cut) -> Result<()> {
    let mut relay = Relay::start(to, cut).await?;
    let name = format!("web-{:?}-{}", cut.way, cut.after).to_lowercase();
    let wanted = wanted(&name, &[&relay.address.to_string()], token);
    let first = keeper(&wanted, &home.join(&name))?;
    let joined = async {
        if cut.after.is_multiple_of(2) {
            return Ok(certified(first).await?);
        }
        tokio::select! {
            joined = certified(first) => joined?,
            _ = relay.broken.wait_for(|it| *it) => {}
        }
        Ok(certified(keeper(&wanted, &home.join(&name))?).await?)
    };
    tokio::time::timeout(PATIENCE, joined).await.with_context(|| format!("{cut:?}: no certificate in time"))?
}

#[test]
fn a_join_that_breaks_at_any_byte_is_repeated_with_one_use_of_the_token() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let home = tempfile::tempdir()?;
        let config = home.path().join("mesh.d");
        std::fs::create_dir(&config)?;
        std::fs::write(config.join("fleet.yaml"), ENROLLMENT)?;
        let plane = sheer_control::start(sheer_control::Options {
            config,
            state: home.path().join("state"),
            proxy_listen: vec![SocketAddr::from(([127, 0, 0, 1], 0))],
            ..Default::default()
        })
        .await?;
        let to = plane.proxy_address().context("it listens")?;
        // The address in the token leads nowhere: every attempt goes through the relay.
        let token_for = |uses: usize| {
            let request = TokenRequest {
                namespace: "default".into(),
                service_account: "web".into(),
                ttl_s: 3600,
                uses: u32::try_from(uses).unwrap_or(u32::MAX),
                from: vec![],
                control: vec!["127.0.0.1:1".into()],
            };
            let (control, file) = (plane.control().clone(), home.path().join(format!("{uses}.token")));
            async move {
                std::fs::write(&file, control.create_token(&request).await?.token)?;
                anyhow::Ok(file)
            }
        };

        // How long the whole exchange is.
        let whole = Relay::start(to, Cut { way: Way::Up, after: usize::MAX }).await?;
        let once = wanted("whole", &[&whole.address.to_string()], &token_for(1).await?);
        certified(keeper(&once, &home.path().join("whole"))?).await?;
        let [up, down] = [0, 1].map(|way| whole.passed[way].load(Ordering::Relaxed));
        ensure!(up > 1000 && down > 1000, "{up} bytes up, {down} down: that is no join");

        // Every byte takes two minutes: SHEER_EVERY_BYTE=1. Otherwise a step that meets each record and each frame.
        let step = if std::env::var_os("SHEER_EVERY_BYTE").is_some() { 1 } else { 29 };
        // A signature's length varies by a few bytes.
        let of = |way, length: usize| (0..length + 8).step_by(step).map(move |after| Cut { way, after });
        let cuts: Vec<Cut> = of(Way::Up, up).chain(of(Way::Down, down)).collect();
        eprintln!("{up} bytes up, {down} down, broken at {} places", cuts.len());
        let token = token_for(cuts.len()).await?;
        let at_once = Arc::new(Semaphore::new(64));
        let mut joins = JoinSet::new();
        for &cut in &cuts {
            let (token, home, at_once) = (token.clone(), home.path().to_owned(), at_once.clone());
            joins.spawn(async move {
                let _turn = at_once.acquire().await?;
                broken_join(to, &token, &home, cut).await.with_context(|| format!("broken at {cut:?}"))
            });
        }
        while let Some(joined) = joins.join_next().await {
            joined??;
        }

        // Each took one use, however often it had to ask: there was one for each, and now there is none.
        let late = wanted("late", &[&to.to_string()], &token);
        let refused = keeper(&late, &home.path().join("late"))?.run().await.to_string();
        ensure!(refused.contains(&format!("already used by {}", cuts.len())), "{refused}");
        plane.stop().await;
        Ok(())
    })
}

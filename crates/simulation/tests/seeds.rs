//! Runs seeds: `SEEDS` of them (1000), or the one that `SEED` names, with its trace. Each in a process of its own, so that
//! nothing of one reaches another, and so that one alone does what it did among others.

use sheer_simulation::plan::Scenario;
use sheer_simulation::{chance, world};
use std::collections::BTreeMap;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Names the seed to a process that runs one.
const ONE: &str = "SHEER_SIMULATION_SEED";
/// How long a seed may take, in real time: it takes a fraction of a second.
const LIMIT: Duration = Duration::from_secs(120);
/// Traces that are printed whole.
const SHOWN: usize = 3;
/// Failures after which no more seeds are begun.
const ENOUGH: usize = 10;

fn main() -> ExitCode {
    if let Some(seed) = number(ONE) {
        return one(seed);
    }
    if std::env::args().any(|it| it == "--ignored" || it == "--list") {
        // What the test harness of the other tests is asked; there is nothing of the kind here.
        return ExitCode::SUCCESS;
    }
    match number("SEED") {
        Some(seed) => replay(seed),
        None => many(number("SEEDS").unwrap_or(1000)),
    }
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok().filter(|it| !it.is_empty())?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// Runs a seed in this process.
fn one(seed: u64) -> ExitCode {
    chance::begin(seed);
    std::thread::spawn(|| {
        std::thread::sleep(LIMIT);
        println!("WRONG it takes longer than {} s", LIMIT.as_secs());
        std::process::exit(2);
    });
    if std::env::var_os("RUST_LOG").is_some() {
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
    }
    let outcome = world::run(seed);
    outcome.trace.iter().for_each(|line| println!("{line}"));
    match outcome.result {
        Ok(took_ms) => {
            println!("TOGETHER {took_ms}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("WRONG {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What a seed printed, and in how many simulated milliseconds it came together again; none: it failed.
fn run(seed: u64) -> (String, Option<u64>) {
    let run = std::env::current_exe().and_then(|it| {
        Command::new(it).env(ONE, seed.to_string()).stdin(Stdio::null()).stderr(Stdio::inherit()).output()
    });
    let printed = match run {
        Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
        Err(error) => format!("WRONG it cannot be run: {error}"),
    };
    let together = printed.lines().last().and_then(|it| it.strip_prefix("TOGETHER ")?.parse().ok());
    (printed, together)
}

fn replay(seed: u64) -> ExitCode {
    let (printed, together) = run(seed);
    print!("{printed}");
    if together.is_some() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn many(seeds: u64) -> ExitCode {
    let began = Instant::now();
    let (next, played, failures) = (AtomicU64::new(0), AtomicU64::new(0), Mutex::new(Vec::new()));
    let results: Mutex<BTreeMap<String, Vec<u64>>> = Mutex::default();
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Relaxed);
                    if seed >= seeds || failures.lock().unwrap().len() >= ENOUGH {
                        return;
                    }
                    played.fetch_add(1, Relaxed);
                    let (printed, together) = run(seed);
                    let scenario = format!("{:?}", Scenario::of(seed));
                    results.lock().unwrap().entry(scenario).or_default().extend(together);
                    if together.is_none() {
                        failures.lock().unwrap().push((seed, printed));
                    }
                }
            });
        }
    });
    let mut failures = failures.into_inner().unwrap();
    failures.sort();
    for (at, (seed, printed)) in failures.iter().enumerate() {
        println!("---- seed {seed}, {:?}", Scenario::of(*seed));
        match at < SHOWN {
            true => print!("{printed}"),
            false => println!("{}", printed.lines().last().unwrap_or_default()),
        }
        println!("     again: SEED={seed} make simulate");
    }
    for (scenario, took) in results.into_inner().unwrap() {
        let (number, longest) = (took.len(), took.iter().max().copied().unwrap_or_default());
        println!("{scenario:14} {number:6} seeds, together again after at most {:.1} s", longest as f64 / 1000.0);
    }
    let differing = Scenario::ALL.iter().filter_map(|it| (0..seeds.min(20)).find(|seed| Scenario::of(*seed) == *it));
    let differing: Vec<u64> = differing.filter(|seed| run(*seed) != run(*seed)).collect();
    if !differing.is_empty() {
        println!("run twice, these seeds do not do the same: {differing:?}");
    }
    let ok = failures.is_empty() && differing.is_empty();
    let result = if ok { "ok" } else { "FAILED" };
    let played = played.into_inner();
    let passed = played - failures.len() as u64;
    println!(
        "test result: {result}. {passed} of {played} seeds passed; finished in {:.1}s",
        began.elapsed().as_secs_f64()
    );
    if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

//! F9: a proxy gives way to another one under load.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::kill;
use nix::unistd::Pid;
use sheer_testmesh::faults::{row, times};
use sheer_testmesh::mesh::{Control, PATIENCE};
use sheer_testmesh::net::{Host, Net};
use sheer_testmesh::program::Processes;
use sheer_testmesh::shop::{self, AROUND, Customers, PLAIN_USER};
use sheer_testmesh::wait;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a former proxy may go on.
const GRACE: Duration = Duration::from_secs(11);

/// As [`shop::TARGETS`], but TCP connections end by themselves after five lines.
const TARGETS: [&str; 5] = [
    "http1@145x8=http://reviews/reviews/tea",
    "http2@145x4=http://reviews/reviews/tea",
    "grpc@100x4=http://pricing/",
    "grpc-stream@5x5=http://pricing/",
    "tcp@50x50=tcp://echo:7000?lines=5",
];

#[test]
fn proxies_give_way_to_others_and_no_request_notices() -> Result<()> {
    let rounds = times(2, 50);
    let done =
        format!("every proxy of a host, callers' and services', replaced {rounds} times by 'sheer upgrade' under load");
    row("F9", &done, "0 failed requests, TCP connections live until the drain's deadline", replace(rounds))
}

fn replace(rounds: usize) -> Result<String> {
    let net = Net::new()?;
    let host = net.host("one")?;
    let control = Control::start(&host, &net.directory().join("control"))?;
    let grace = GRACE.as_secs().to_string();
    let flags = [PLAIN_USER, &["--drain-grace", &grace]].concat();
    let shop = shop::open(&control, &host, net.directory(), &flags, 1)?;
    let customers = Customers::asking(&host, net.directory(), &flags, &TARGETS)?;
    let caller = ["--capture", "none", "--upstream", "127.0.0.1:9000=echo:7000"];
    let mut holder = sheer_testmesh::mesh::Workload::new(&host, "holder", net.directory())?
        .flags(&flags)
        .flags(&caller)
        .start(&["sleep", "infinity"])?;
    holder.prints("is ready", PATIENCE)?;
    let held = wait::until("a connection is open", PATIENCE, || {
        let stream = host.inside(|| Ok(TcpStream::connect("127.0.0.1:9000")?))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut held = BufReader::new(stream);
        echo(&mut held)?;
        Ok(held)
    })?;
    customers.shop_for(AROUND / 2)?;

    let supervisors: Vec<Pid> = shop.iter().chain([&holder]).map(|program| program.pid()).collect();
    let former = proxies(&supervisors)?;
    is_kept_when_its_successor_does_not_start(&host)?;
    ensure!(proxies(&supervisors)? == former, "a proxy was replaced by nothing");
    let (mut held, mut watcher) = (Some(held), None);
    for round in 0..rounds {
        // With many connections that are slow to end the next one waits for its turn.
        let said = wait::until("all proxies give way", GRACE * 2, || control.sheer(&["upgrade", "--all"]))?;
        ensure!(said.lines().count() == 5, "round {round}: {said}");
        if let Some(mut held) = held.take() {
            // Until its deadline the former proxy carries what never ends by itself.
            watcher = Some(std::thread::spawn(move || {
                let began = Instant::now();
                loop {
                    match echo(&mut held) {
                        Ok(()) if began.elapsed() > GRACE * 2 => return Err(anyhow::anyhow!("it goes on")),
                        Ok(()) => std::thread::sleep(Duration::from_millis(50)),
                        Err(_) => return Ok(began.elapsed()),
                    }
                }
            }));
        }
        customers.shop_for(Duration::from_secs(2))?;
    }
    let now = proxies(&supervisors)?;
    ensure!(former.iter().all(|pid| !now.contains(pid)), "{former:?} and then {now:?}");
    let lived = watcher.context("no round")?.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    ensure!(lived > GRACE - Duration::from_secs(2), "the held connection ended after {lived:?}");
    wait::until_true("former proxies end", GRACE * 2, || former.iter().all(|pid| kill(*pid, None).is_err()))?;
    let report = customers.are_all_served()?;
    let figure = format!(
        "{} requests, 0 failed; the connection that never ends lived {:.0} s of {} s",
        report["total"]["ok"],
        lived.as_secs_f64(),
        GRACE.as_secs()
    );
    Ok(figure)
}

/// A program that ends at once takes nobody's place.
fn is_kept_when_its_successor_does_not_start(host: &Host) -> Result<()> {
    let mut supervisor = UnixStream::connect(host.path("/run/sheer/run/default_holder-1/supervisor.sock"))?;
    supervisor.set_read_timeout(Some(PATIENCE))?;
    supervisor.write_all(b"{\"replace\":{\"program\":\"/bin/false\"}}\n")?;
    let mut answer = String::new();
    BufReader::new(supervisor).read_line(&mut answer)?;
    ensure!(answer.contains("refused") && answer.contains("the new proxy has died"), "{answer}");
    Ok(())
}

/// A line over a connection comes back.
fn echo(held: &mut BufReader<TcpStream>) -> Result<()> {
    held.get_mut().write_all(b"still there\n")?;
    let mut back = String::new();
    ensure!(held.read_line(&mut back)? > 0, "closed");
    ensure!(back == "still there\n", "{back:?} came back");
    Ok(())
}

fn proxies(supervisors: &[Pid]) -> Result<Vec<Pid>> {
    supervisors.iter().map(|pid| Ok(Processes::of(*pid)?.proxy)).collect()
}

//! F15: the host's resolver fails, lies, or floods.

use crate::site::{Ground, caller, join, sample};
use anyhow::{Context, Result, ensure};
use sheer_testmesh::faults::{row, times};
use sheer_testmesh::mesh::PATIENCE;
use sheer_testmesh::net::Host;
use sheer_testmesh::program::{Program, run};
use sheer_testmesh::wait;
use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

/// What the resolver does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Manner {
    Well,
    /// Its answers may not be kept at all.
    NoTime,
    ServFail,
    Silent,
    /// Answers to another question, and with another id.
    Wrong,
    NoName,
    /// A thousand addresses, which do not fit a datagram.
    Many,
}

const ALL: [Manner; 7] =
    [Manner::Well, Manner::NoTime, Manner::ServFail, Manner::Silent, Manner::Wrong, Manner::NoName, Manner::Many];

#[derive(Default)]
struct Resolver {
    manner: AtomicU8,
    asked: AtomicUsize,
}

impl Resolver {
    fn manner(&self) -> Manner {
        ALL.get(usize::from(self.manner.load(Relaxed))).copied().unwrap_or(Manner::Well)
    }

    /// The answer to a question; none where there is silence.
    fn answer(&self, question: &[u8], tcp: bool) -> Option<Vec<u8>> {
        let manner = self.manner();
        let end = 12 + question.get(12..)?.iter().position(|byte| *byte == 0)? + 5;
        let mut answer = question.get(..end)?.to_vec();
        // Of the name that is looked for, and of addresses: the rest does not count.
        // The same question by TCP, because its answer did not fit, is none of its own.
        if !tcp && answer.windows(3).any(|it| it == b"ext") {
            self.asked.fetch_add(1, Relaxed);
        }
        answer[2] = 0x81;
        answer[3] = 0x80;
        answer[6..12].fill(0);
        let (records, ttl) = match manner {
            Manner::Silent => return None,
            Manner::ServFail => {
                answer[3] |= 2;
                (0, 0)
            }
            Manner::NoName => {
                answer[3] |= 3;
                (0, 0)
            }
            Manner::Wrong => {
                answer[0] ^= 0xff;
                (1, 60)
            }
            Manner::NoTime => (1, 0),
            Manner::Many if !tcp => {
                answer[2] |= 0x02;
                (0, 0)
            }
            Manner::Many => (1000, 60),
            Manner::Well => (1, 60),
        };
        answer[6..8].copy_from_slice(&u16::to_be_bytes(records));
        for record in 0..records {
            let [high, low] = record.to_be_bytes();
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, ttl, 0, 4, 192, 0, 2 + high, low]);
        }
        Some(answer)
    }

    fn listen(self: Arc<Self>, host: &Host) -> Result<()> {
        host.inside(move || {
            let (udp, tcp) = (UdpSocket::bind("127.0.0.1:53")?, TcpListener::bind("127.0.0.1:53")?);
            let resolver = self.clone();
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok((length, from)) = udp.recv_from(&mut buffer) {
                    if let Some(answer) = resolver.answer(&buffer[..length], false) {
                        let _ = udp.send_to(&answer, from);
                    }
                }
            });
            std::thread::spawn(move || {
                for mut stream in tcp.incoming().flatten() {
                    let mut answered = || -> Result<()> {
                        let mut length = [0; 2];
                        stream.read_exact(&mut length)?;
                        let mut question = vec![0; usize::from(u16::from_be_bytes(length))];
                        stream.read_exact(&mut question)?;
                        let answer = self.answer(&question, true).context("silent")?;
                        stream.write_all(&u16::try_from(answer.len())?.to_be_bytes())?;
                        Ok(stream.write_all(&answer)?)
                    };
                    let _ = answered();
                }
            });
            Ok(())
        })
    }
}

/// Looks names up all the time, in the way of every program, and says what came of each.
const LOOKS: &str = r#"
import socket, sys, time
while True:
    for name in ("ext.example.test.", "web"):
        began = time.monotonic()
        try:
            found = socket.getaddrinfo(name, 80, socket.AF_INET, socket.SOCK_STREAM)
            told = "ok %d" % len({it[4][0] for it in found})
        except OSError as error:
            told = "failed %s" % error
        print("%s %.3f %s" % (name, time.monotonic() - began, told), flush=True)
    time.sleep(0.05)
"#;

/// A look at a name: how long it took, and how many addresses were found.
struct Look {
    name: String,
    took: f64,
    found: Option<usize>,
}

fn looks(program: &Program, skip: usize) -> Vec<Look> {
    let lines = program.output();
    let lines = lines.lines().skip(skip).filter_map(|line| {
        let mut words = line.split(' ');
        let (name, took, told) = (words.next()?.to_owned(), words.next()?.parse().ok()?, words.next()?);
        Some(Look { name, took, found: if told == "ok" { words.next()?.parse().ok() } else { None } })
    });
    lines.collect()
}

#[test]
#[ignore = "takes half a minute: `make faults`"]
fn a_resolver_that_fails_leaves_what_was_known() -> Result<()> {
    let (seconds, ended) = (times(3, 30), times(3, 120));
    let done = format!(
        "the host's resolver answers SERVFAIL, nothing, to other questions, with TTL 0, 1000 addresses, {seconds} s each, and \
         NXDOMAIN for {ended} s"
    );
    let bar = "names of the mesh undisturbed; others: the last good answer, 0 errors, but NXDOMAIN is believed; at most one question a second";
    row("F15", &done, bar, fail(Duration::from_secs(seconds as u64), Duration::from_secs(ended as u64)))
}

fn fail(each: Duration, ended: Duration) -> Result<String> {
    let ground = Ground::new()?;
    let (host, control) = (&ground.near, ground.control()?);
    let home = ground.home("looks")?;
    let conf = home.join("resolv.conf");
    std::fs::write(&conf, "nameserver 127.0.0.1\n")?;
    run(host.command("mount").args(["--bind", &conf.to_string_lossy(), "/etc/resolv.conf"]))?;
    let resolver = Arc::<Resolver>::default();
    resolver.clone().listen(host)?;
    let _web = sample(&control, host, &ground.home("web")?, ["web", "catalog", "8080"], "web-1", &[])?;
    let _caller = caller(&control, host, &ground.home("caller")?, &["web:80"])?;
    control.serves("web", 1)?;
    let script = home.join("looks.py");
    std::fs::write(&script, LOOKS)?;
    let command = ["/usr/bin/python3", &script.to_string_lossy()];
    let program = join(&control, host, &home, "looks", &["--name", "looks-1"], &command)?;
    wait::until("both names are found", PATIENCE, || {
        let found = looks(&program, 0);
        let good = |name: &str| found.iter().any(|it| it.name == name && it.found.is_some());
        ensure!(good("web") && good("ext.example.test."), "{}", program.output());
        Ok(())
    })?;
    let mut told = Vec::new();
    for manner in [Manner::NoTime, Manner::ServFail, Manner::Silent, Manner::Wrong, Manner::Many, Manner::NoName] {
        resolver.manner.store(Manner::Well as u8, Relaxed);
        // What was learned of the last manner is asked for again.
        let before = resolver.asked.load(Relaxed);
        let lines = program.output().lines().count();
        wait::until("all is well between two manners", PATIENCE, || {
            let one = looks(&program, lines).iter().any(|it| it.name != "web" && it.found == Some(1));
            ensure!(one && resolver.asked.load(Relaxed) > before, "{}", program.output());
            Ok(())
        })?;
        resolver.manner.store(manner as u8, Relaxed);
        let each = if manner == Manner::NoName { ended } else { each };
        let before = resolver.asked.load(Relaxed);
        wait::until_true("the resolver is met in its new manner", PATIENCE, || resolver.asked.load(Relaxed) > before)?;
        let (asked, lines) = (resolver.asked.load(Relaxed), program.output().lines().count());
        std::thread::sleep(each);
        let (asked, found) = (resolver.asked.load(Relaxed) - asked, looks(&program, lines));
        let mesh: Vec<&Look> = found.iter().filter(|it| it.name == "web").collect();
        let other: Vec<&Look> = found.iter().filter(|it| it.name != "web").collect();
        ensure!(
            !mesh.is_empty() && mesh.iter().all(|it| it.found == Some(1) && it.took < 0.5),
            "{manner:?}: a name of the mesh"
        );
        let failed = other.iter().filter(|it| it.found.is_none()).count();
        let longest = other.iter().map(|it| it.took).fold(0.0, f64::max);
        let rate = asked as f64 / each.as_secs_f64();
        match manner {
            Manner::NoName => ensure!(failed > 0, "that a name does not exist is not believed"),
            _ => ensure!(failed == 0 && !other.is_empty(), "{manner:?}: {failed} of {} failed", other.len()),
        }
        ensure!(longest < 2.5, "{manner:?}: one look took {longest} s");
        if manner == Manner::Many {
            ensure!(other.iter().any(|it| it.found == Some(1000)), "not all addresses were found");
        }
        // Some time lies between two questions, and one of them may be at each end.
        ensure!(asked as f64 <= each.as_secs_f64() + 1.0, "{manner:?}: {asked} questions in {each:?}");
        told.push(format!("{manner:?} {failed} of {} failed, {rate:.1} questions/s", other.len()));
    }
    Ok(told.join("; "))
}

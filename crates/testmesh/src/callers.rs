//! Callers that ask without a pause, and what became of each of their requests.
//!
//! They never retry, so that what a caller notices of an event is seen as it is: requests that fail or wait.

use crate::net::Host;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A request that takes longer was disturbed, though it was answered in the end.
const PROMPT: Duration = Duration::from_millis(500);

/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(30);

/// Between two requests of one caller.
const PAUSE: Duration = Duration::from_millis(5);

/// One request.
#[derive(Clone, Debug)]
pub struct Asked {
    /// When it began.
    pub began: Instant,
    /// When it ended.
    pub ended: Instant,
    /// The version of the instance that answered, or what went wrong.
    pub answer: Result<String, String>,
}

impl Asked {
    /// Whether it failed or waited.
    pub fn is_disturbed(&self) -> bool {
        self.answer.is_err() || self.ended.duration_since(self.began) > PROMPT
    }
}

/// How callers use their connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// One connection for all requests, for as long as it lasts.
    Kept,
    /// A new connection for each request.
    Fresh,
}

/// Callers that are asking. Each has a thread; all end when this is dropped.
pub struct Callers {
    asked: Arc<Mutex<Vec<Asked>>>,
    end: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Callers {
    /// Lets this many callers ask for `/probe/healthy` of whoever answers at an address of the host.
    ///
    /// # Errors
    /// When the host cannot be entered.
    pub fn come(host: &Host, door: SocketAddr, manner: Manner, number: usize) -> Result<Self> {
        let (asked, end) = <(Arc<Mutex<Vec<Asked>>>, Arc<AtomicBool>)>::default();
        // A thread begins in the network of the one that makes it.
        let threads = host.inside(|| {
            let caller = || {
                let (asked, end) = (asked.clone(), end.clone());
                std::thread::spawn(move || call(door, manner, &asked, &end))
            };
            Ok((0..number).map(|_| caller()).collect())
        })?;
        Ok(Self { asked, end, threads })
    }

    /// What became of the requests that began since then and have ended.
    pub fn since(&self, then: Instant) -> Vec<Asked> {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.iter().filter(|it| it.began >= then).cloned().collect()
    }

    /// Waits until these versions answer, each of them, and for as long as that takes nothing else.
    ///
    /// # Errors
    /// With what was answered instead.
    pub fn are_answered_by(&self, versions: &[&str], limit: Duration) -> Result<()> {
        let mut then = Instant::now();
        let wanted: BTreeSet<_> = versions.iter().map(|it| Ok((*it).to_owned())).collect();
        crate::wait::until(&format!("callers are answered by {versions:?}"), limit, || {
            let found: BTreeSet<_> = self.since(then).into_iter().map(|it| it.answer).collect();
            if !found.is_subset(&wanted) {
                then = Instant::now();
            }
            ensure!(found == wanted, "answers: {found:?}");
            Ok(())
        })
    }

    /// Sends them home and tells what became of all their requests.
    pub fn leave(mut self) -> Vec<Asked> {
        self.end.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        std::mem::take(&mut *self.asked.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Callers {
    fn drop(&mut self) {
        self.end.store(true, Relaxed);
    }
}

/// For how long after an event requests were disturbed, and those that were.
pub fn disturbed_after(event: Instant, asked: &[Asked]) -> (Duration, Vec<Asked>) {
    let disturbed: Vec<_> = asked.iter().filter(|it| it.ended > event && it.is_disturbed()).cloned().collect();
    let last = disturbed.iter().map(|it| it.ended.duration_since(event)).max().unwrap_or_default();
    (last, disturbed)
}

fn call(door: SocketAddr, manner: Manner, asked: &Mutex<Vec<Asked>>, end: &AtomicBool) {
    let mut kept = None;
    while !end.load(Relaxed) {
        let began = Instant::now();
        let answer = match kept.take() {
            Some(stream) => Ok(stream),
            None => connect(door),
        };
        let answer = answer.and_then(|mut stream| {
            let version = ask(&mut stream, manner)?;
            kept = (manner == Manner::Kept).then_some(stream);
            Ok(version)
        });
        let answer = answer.map_err(|error| format!("{error:#}"));
        let ended = Instant::now();
        asked.lock().unwrap_or_else(PoisonError::into_inner).push(Asked { began, ended, answer });
        std::thread::sleep(PAUSE);
    }
}

/// One request over a connection of its own; the version that answered.
///
/// # Errors
/// When it is not answered well.
pub fn ask_once(host: &Host, door: SocketAddr) -> Result<String> {
    host.inside(|| ask(&mut connect(door)?, Manner::Fresh))
}

fn connect(door: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(door)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn ask(stream: &mut TcpStream, manner: Manner) -> Result<String> {
    let last = if manner == Manner::Fresh { "Connection: close\r\n" } else { "" };
    stream.write_all(format!("GET /probe/healthy HTTP/1.1\r\nHost: web\r\n{last}\r\n").as_bytes())?;
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let count = stream.read(&mut buffer)?;
        ensure!(count > 0, "closed after {:?}", String::from_utf8_lossy(&answer));
        answer.extend_from_slice(&buffer[..count]);
        let text = String::from_utf8_lossy(&answer).to_ascii_lowercase();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
        let length: usize = field("content-length: ").context("no length")?.parse()?;
        if body.len() >= length {
            ensure!(head.starts_with("http/1.1 200"), "{text}");
            return field("x-version: ").context("no version");
        }
    }
}

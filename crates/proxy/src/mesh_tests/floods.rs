//! Floods and bombs over HTTP/2, against two proxies and by both entrances: what must be cut is cut, others notice
//! nothing, and memory stays within its bounds. `make floods` plays the same for longer, beside other proxies.

use super::framing::{Entrance, Scene};
use super::*;
use crate::io::Io;
use crate::upstream::tls::Carried;
use std::process::Command;
use tokio::time::timeout;

/// How long anything may take that must happen.
const PATIENCE: Duration = Duration::from_secs(10);

/// What an attack that does nothing else may send at most: frames, or pairs of frames.
const CUT_WITHIN: u32 = 1000;

/// Frames of an attack that may be answered for as long as it costs nothing.
const FLOOD: u32 = 20_000;

/// Steps sent at once.
const PART: usize = 50;

/// What heads that are bombs may leave in memory, in bytes: of both proxies, and of the test itself.
const HEADS: usize = 3 * 1024 * 1024;

/// What 100 answers may that nobody takes: 1 MiB at each of two proxies, which are one process here.
const ANSWERS: usize = 2 * 1024 * 1024;

/// Bytes of an ordinary answer, and of one that is long.
const SHORT: usize = 24;
const LONG: usize = 10_000_000;

/// Names an entrance to a process of its own, which plays bombs there and nothing else, so that its memory is theirs.
const ALONE: &str = "SHEER_TEST_BOMBS";

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const UNKNOWN: u8 = 0xee;

const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// `:method: GET`, `:scheme: http` and `:path: /` of the static table, and `:authority: web`.
const GET: &[u8] = b"\x82\x86\x84\x01\x03web";
const POST: &[u8] = b"\x83\x86\x84\x01\x03web";

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A field for the dynamic table, nothing coded (RFC 7541, section 6.2.1).
fn remembered(name: &str, value: &str) -> Vec<u8> {
    let text = |text: &str| match text.len() {
        short @ 0..127 => [&[short as u8], text.as_bytes()].concat(),
        long @ 127..255 => [&[127, (long - 127) as u8], text.as_bytes()].concat(),
        long => {
            let rest = long - 127;
            assert!(rest < 128 * 128, "two bytes of length");
            [&[127, (rest % 128) as u8 | 128, (rest / 128) as u8], text.as_bytes()].concat()
        }
    };
    [vec![0x40], text(name), text(value)].concat()
}

/// Frames of a connection as they come, of either side.
#[derive(Default)]
struct Frames {
    kept: Vec<u8>,
}

impl Frames {
    /// The next whole one: kind, flags, stream, payload.
    fn next(&mut self) -> Option<(u8, u8, u32, Vec<u8>)> {
        let length = self.kept.get(..3).map(|it| u32::from_be_bytes([0, it[0], it[1], it[2]]) as usize)?;
        let whole = self.kept.get(..9 + length)?;
        let stream = u32::from_be_bytes([whole[5], whole[6], whole[7], whole[8]]);
        let frame = (whole[3], whole[4], stream, whole[9..].to_vec());
        self.kept.drain(..9 + length);
        Some(frame)
    }
}

/// An application that answers every request, as much of it as it may: with a body of some length who sends one, with a
/// short one others.
struct Application {
    port: u16,
    /// Requests that were neither answered nor cancelled, the most of these, and all there ever were.
    open: Rc<Cell<usize>>,
    most: Rc<Cell<usize>>,
    asked: Rc<Cell<usize>>,
    /// Bytes of bodies that have been sent.
    sent: Rc<Cell<usize>>,
}

impl Application {
    async fn start(size: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let it = Self { port, open: Rc::default(), most: Rc::default(), asked: Rc::default(), sent: Rc::default() };
        let (open, most, asked, sent) = (it.open.clone(), it.most.clone(), it.asked.clone(), it.sent.clone());
        spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (open, most, asked, sent) = (open.clone(), most.clone(), asked.clone(), sent.clone());
                spawn_local(async move {
                    let mut served = Served { size, open, most, asked, sent, ..Served::new() };
                    // Ends with the connection, in whichever way that does.
                    let _ = served.serve(stream).await;
                    served.open.set(served.open.get() - served.owed.len());
                });
            }
        });
        it
    }

    /// Waits until its answers go no further.
    async fn is_quiet(&self) {
        let (mut sent, mut same) = (0, 0);
        while same < 20 {
            tokio::time::sleep(Duration::from_millis(5)).await;
            let now = self.sent.get();
            same = if now == sent { same + 1 } else { 0 };
            sent = now;
        }
    }
}

/// One connection of the application.
struct Served {
    size: usize,
    open: Rc<Cell<usize>>,
    most: Rc<Cell<usize>>,
    asked: Rc<Cell<usize>>,
    sent: Rc<Cell<usize>>,
    /// Streams: what is owed of the answer (nothing: it has not begun), and how much may be sent of it.
    owed: std::collections::BTreeMap<u32, (Option<usize>, i64)>,
    initial: i64,
    connection: i64,
}

impl Served {
    fn new() -> Self {
        let none = || Rc::new(Cell::new(0));
        let owed = std::collections::BTreeMap::new();
        let (open, most, asked, sent) = (none(), none(), none(), none());
        Self { size: 0, open, most, asked, sent, owed, initial: 65_535, connection: 65_535 }
    }

    async fn serve(&mut self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut preface = [0; PREFACE.len()];
        stream.read_exact(&mut preface).await?;
        stream.write_all(&frame(SETTINGS, 0, 0, &[])).await?;
        let mut frames = Frames::default();
        while stream.read_buf(&mut frames.kept).await? > 0 {
            let mut out = Vec::new();
            while let Some((kind, flags, id, payload)) = frames.next() {
                self.take(kind, flags, id, &payload, &mut out);
            }
            stream.write_all(&out).await?;
            self.push(&mut stream).await?;
        }
        Ok(())
    }

    fn take(&mut self, kind: u8, flags: u8, id: u32, payload: &[u8], out: &mut Vec<u8>) {
        let word = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
        if kind == HEADERS && !self.owed.contains_key(&id) {
            self.owed.insert(id, (None, self.initial));
            self.asked.set(self.asked.get() + 1);
            self.open.set(self.open.get() + 1);
            self.most.set(self.most.get().max(self.open.get()));
        }
        match kind {
            HEADERS | DATA if flags & END_STREAM != 0 => {
                if let Some((owed, _)) = self.owed.get_mut(&id) {
                    out.extend(frame(HEADERS, END_HEADERS, id, b"\x88"));
                    *owed = Some(if kind == DATA { self.size } else { SHORT });
                }
            }
            DATA if !payload.is_empty() => {
                let more = (payload.len() as u32).to_be_bytes();
                out.extend([frame(WINDOW_UPDATE, 0, 0, &more), frame(WINDOW_UPDATE, 0, id, &more)].concat());
            }
            RESET => self.forget(id),
            SETTINGS if flags == 0 => {
                for at in (0..payload.len()).step_by(6) {
                    if payload[at..at + 2] == [0, 4] {
                        let initial = i64::from(word(at + 2));
                        self.owed.values_mut().for_each(|(_, window)| *window += initial - self.initial);
                        self.initial = initial;
                    }
                }
                out.extend(frame(SETTINGS, 1, 0, &[]));
            }
            PING if flags == 0 => out.extend(frame(PING, 1, 0, payload)),
            WINDOW_UPDATE if id == 0 => self.connection += i64::from(word(0)),
            WINDOW_UPDATE => {
                if let Some((_, window)) = self.owed.get_mut(&id) {
                    *window += i64::from(word(0));
                }
            }
            _ => {}
        }
    }

    fn forget(&mut self, id: u32) {
        if self.owed.remove(&id).is_some() {
            self.open.set(self.open.get() - 1);
        }
    }

    /// Sends what may be sent of the answers, a frame at a time: the test's memory is not to be that of the proxies.
    async fn push(&mut self, stream: &mut TcpStream) -> std::io::Result<()> {
        const BODY: [u8; 16_384] = [0; 16_384];
        let ids: Vec<u32> = self.owed.keys().copied().collect();
        for id in ids {
            while let Some((Some(rest), window)) = self.owed.get(&id).copied() {
                let part = window.min(self.connection).clamp(0, BODY.len() as i64).min(rest as i64) as usize;
                if part == 0 && rest > 0 {
                    break;
                }
                self.connection -= part as i64;
                self.owed.insert(id, (Some(rest - part), window - part as i64));
                self.sent.set(self.sent.get() + part);
                let ends = part == rest;
                stream.write_all(&frame(DATA, if ends { END_STREAM } else { 0 }, id, &BODY[..part])).await?;
                if ends {
                    self.forget(id);
                }
            }
        }
        Ok(())
    }
}

/// The attacker's connection.
struct Attacker {
    io: Io,
    frames: Frames,
    /// Heads of answers and resets that have come: requests that somebody has looked at.
    answers: usize,
}

/// How an attack ended.
#[derive(Debug, PartialEq)]
enum Ended {
    /// The connection was cut, and for which reason when that could be read.
    Cut(Option<u32>),
    /// Nobody reads any more.
    Blocked,
    /// All was taken.
    Taken,
}

impl Attacker {
    async fn start(scene: &Scene, settings: &[u8]) -> Self {
        let mut io = scene.connect(Carried::Http2).await;
        let hello = [PREFACE, &frame(SETTINGS, 0, 0, settings), &frame(SETTINGS, 1, 0, &[])].concat();
        io.write_all(&hello).await.unwrap();
        io.flush().await.unwrap();
        Self { io, frames: Frames::default(), answers: 0 }
    }

    /// Writes, and reads whatever comes meanwhile when `reads`.
    async fn send(&mut self, bytes: &[u8], reads: bool) -> Ended {
        let mut rest = bytes;
        let mut buffer = [0; 16_384];
        while !rest.is_empty() {
            let (mut read, mut write) = tokio::io::split(&mut self.io);
            let turn = async {
                tokio::select! {
                    count = read.read(&mut buffer), if reads => Err(count.unwrap_or(0)),
                    count = write.write(rest) => Ok(count.unwrap_or(0)),
                }
            };
            match timeout(PATIENCE, turn).await {
                Err(_) => return Ended::Blocked,
                Ok(Ok(0)) => return self.code().await,
                Ok(Ok(count)) => rest = &rest[count..],
                Ok(Err(count)) => {
                    self.frames.kept.extend_from_slice(&buffer[..count]);
                    if let Some(ended) = self.look() {
                        return ended;
                    }
                    if count == 0 {
                        return Ended::Cut(None);
                    }
                }
            }
        }
        match self.io.flush().await {
            Ok(()) => Ended::Taken,
            Err(_) => self.code().await,
        }
    }

    /// What the frames that have come say.
    fn look(&mut self) -> Option<Ended> {
        while let Some((kind, _, _, payload)) = self.frames.next() {
            match kind {
                GOAWAY if payload[4..8] != [0; 4] => {
                    return Some(Ended::Cut(Some(u32::from_be_bytes(payload[4..8].try_into().unwrap()))));
                }
                HEADERS | RESET => self.answers += 1,
                _ => {}
            }
        }
        None
    }

    /// Reads until this holds, or to the connection's end.
    async fn read_until(&mut self, holds: impl Fn(&Self) -> bool) -> Ended {
        let reading = async {
            loop {
                if let Some(ended) = self.look() {
                    return ended;
                }
                if holds(self) {
                    return Ended::Taken;
                }
                if self.io.read_buf(&mut self.frames.kept).await.unwrap_or(0) == 0 {
                    return Ended::Cut(None);
                }
            }
        };
        timeout(PATIENCE, reading).await.unwrap_or(Ended::Blocked)
    }

    /// Why a connection was cut that can no longer be written to.
    async fn code(&mut self) -> Ended {
        self.read_until(|_| false).await
    }

    /// An attack, in parts; then what comes of it is waited for.
    async fn flood(&mut self, steps: impl Iterator<Item = Vec<u8>>) -> Ended {
        let mut steps = steps.peekable();
        while steps.peek().is_some() {
            let part = steps.by_ref().take(PART).flatten().collect::<Vec<_>>();
            match self.send(&part, true).await {
                Ended::Taken => tokio::task::yield_now().await,
                ended => return ended,
            }
        }
        self.code().await
    }
}

/// A good client's requests, one after the other on a connection of its own, until it is stopped: how many were answered.
async fn good_client(scene: &Scene, stop: Rc<Cell<bool>>) -> usize {
    let mut client = Attacker::start(scene, &[]).await;
    let mut answered = 0;
    while !stop.get() {
        let request = frame(HEADERS, END_STREAM | END_HEADERS, 2 * answered as u32 + 1, GET);
        assert_eq!(client.send(&request, false).await, Ended::Taken);
        let ended = client.read_until(|it| it.answers > answered).await;
        assert_eq!(ended, Ended::Taken, "a good client's request {answered}");
        answered += 1;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    answered
}

/// Plays an attack whose connection must be cut, with a good client beside.
async fn must_be_cut(entrance: Entrance, name: &str, steps: impl Iterator<Item = Vec<u8>>) {
    let application = Application::start(24).await;
    let scene = Rc::new(Scene::new(entrance, application.port, plan::Protocol::Detect).await);
    let stop = Rc::new(Cell::new(false));
    let good = spawn_local({
        let (scene, stop) = (scene.clone(), stop.clone());
        async move { good_client(&scene, stop).await }
    });
    let mut attacker = Attacker::start(&scene, &[]).await;
    let ended = attacker.flood(steps).await;
    assert!(matches!(ended, Ended::Cut(_)), "{name}, {entrance:?}: {ended:?}");
    stop.set(true);
    assert!(good.await.unwrap() > 0, "{name}, {entrance:?}: the good client was never answered");
    assert!(application.most.get() <= 1001, "{name}, {entrance:?}: {} requests at once", application.most.get());
    until("what was cut is let go", || application.open.get() == 0).await;
}

const ENTRANCES: [Entrance; 2] = [Entrance::Workload, Entrance::Peer];

/// Stream identifiers of a client.
fn ids(count: u32) -> impl Iterator<Item = u32> {
    (0..count).map(|it| 2 * it + 1)
}

#[tokio::test]
async fn who_resets_what_it_asks_is_cut() {
    let test = async {
        for entrance in ENTRANCES {
            let steps = ids(CUT_WITHIN).map(|id| {
                [frame(HEADERS, END_STREAM | END_HEADERS, id, GET), frame(RESET, 0, id, &[0, 0, 0, 8])].concat()
            });
            must_be_cut(entrance, "rapid reset", steps).await;
        }
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn who_makes_us_reset_is_cut() {
    let open = |id| frame(HEADERS, END_HEADERS, id, POST);
    let whole = |id| frame(HEADERS, END_STREAM | END_HEADERS, id, GET);
    let triggers: [Step; 5] = [
        ("WINDOW_UPDATE of 0", Box::new(move |id| [open(id), frame(WINDOW_UPDATE, 0, id, &[0; 4])].concat())),
        (
            "WINDOW_UPDATE past the largest window",
            Box::new(move |id| [open(id), frame(WINDOW_UPDATE, 0, id, &[0x7f, 0xff, 0xff, 0xff])].concat()),
        ),
        ("DATA after END_STREAM", Box::new(move |id| [whole(id), frame(DATA, 0, id, b"x")].concat())),
        ("HEADERS after END_STREAM", Box::new(move |id| [whole(id), whole(id)].concat())),
        ("PRIORITY of 4 bytes", Box::new(move |id| [whole(id), frame(PRIORITY, 0, id, &[0; 4])].concat())),
    ];
    let test = async {
        for entrance in ENTRANCES {
            for (name, trigger) in &triggers {
                must_be_cut(entrance, name, ids(CUT_WITHIN).map(trigger)).await;
            }
        }
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_head_without_end_is_cut() {
    let test = async {
        for entrance in ENTRANCES {
            let begin = || std::iter::once(frame(HEADERS, END_STREAM, 1, GET));
            let empty = (0..CUT_WITHIN).map(|_| frame(CONTINUATION, 0, 1, &[]));
            must_be_cut(entrance, "empty CONTINUATION", begin().chain(empty)).await;
            // Sixteen kilobytes a frame, two megabytes in all.
            let fields = [b"\0\x01a\x7f\xa1\x1e".to_vec(), vec![b'a'; 4000]].concat().repeat(4);
            let long = (0..130).map(|_| frame(CONTINUATION, 0, 1, &fields));
            must_be_cut(entrance, "2 MB of fields", begin().chain(long)).await;
        }
    };
    LocalSet::new().run_until(test).await;
}

/// A step of an attack, by its number, and what it is called.
type Step = (&'static str, Box<dyn Fn(u32) -> Vec<u8>>);

/// Frames that are of no use to anybody.
fn idle_frames() -> Vec<Step> {
    vec![
        ("PING", Box::new(|_| frame(PING, 0, 0, b"8 bytes."))),
        ("SETTINGS", Box::new(|at| frame(SETTINGS, 0, 0, &[0, 1, 0, 0, (at / 256) as u8 % 16, at as u8]))),
        ("WINDOW_UPDATE", Box::new(|_| frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]))),
        ("PRIORITY", Box::new(|at| frame(PRIORITY, 0, 2 * at + 1, &[0, 0, 0, 0, 16]))),
        ("an unknown type", Box::new(|_| frame(UNKNOWN, 0, 0, b"unknown"))),
        (
            "empty DATA",
            Box::new(|at| if at == 0 { frame(HEADERS, END_HEADERS, 1, POST) } else { frame(DATA, 0, 1, &[]) }),
        ),
    ]
}

#[tokio::test]
async fn who_sends_what_is_of_no_use_is_cut() {
    let test = async {
        for entrance in ENTRANCES {
            for (name, step) in idle_frames() {
                must_be_cut(entrance, name, (0..FLOOD).map(step)).await;
            }
        }
    };
    LocalSet::new().run_until(test).await;
}

/// The process's largest memory since this was last asked for, in bytes.
fn peak() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let kilobytes: usize = line.trim().trim_end_matches(" kB").parse().unwrap();
    // 5: begin to look for the largest anew (proc_pid_clear_refs(5)).
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    kilobytes * 1024
}

/// 100 requests that get an answer and no window to take it: each has its head here, and the answer where it came from.
async fn without_window(entrance: Entrance, first: &[u8], asks: impl Fn(u32) -> Vec<u8>) -> (usize, Ended) {
    let application = Application::start(LONG).await;
    let scene = Scene::new(entrance, application.port, plan::Protocol::Detect).await;
    let mut good = Attacker::start(&scene, &[]).await;
    assert_eq!(good.send(&frame(HEADERS, END_STREAM | END_HEADERS, 1, GET), false).await, Ended::Taken);
    assert_eq!(good.read_until(|it| it.answers == 1).await, Ended::Taken);
    peak();
    let before = peak();
    let mut attacker = Attacker::start(&scene, NO_WINDOW).await;
    let mut ended = attacker.send(&frame(HEADERS, END_STREAM | END_HEADERS, 1, first), true).await;
    for id in ids(101).skip(1) {
        if ended == Ended::Taken {
            ended = attacker.send(&asks(id), true).await;
        }
    }
    if ended == Ended::Taken {
        ended = attacker.read_until(|it| it.answers == 101).await;
    }
    application.is_quiet().await;
    (peak().saturating_sub(before), ended)
}

/// No window for answers: SETTINGS_INITIAL_WINDOW_SIZE of 0.
const NO_WINDOW: &[u8] = &[0, 4, 0, 0, 0, 0];

fn ask_for_much(id: u32) -> Vec<u8> {
    [frame(HEADERS, END_HEADERS, id, POST), frame(DATA, END_STREAM, id, b"x")].concat()
}

async fn play_bombs(entrance: Entrance) {
    let small = [GET, &remembered("a", "b")].concat();
    let crumb = [GET, &remembered("cookie", "b")].concat();
    let large = [GET, &remembered("a", &"b".repeat(550))].concat();
    // 62 is the first place of the dynamic table.
    let references = |count: usize| {
        let block = [GET, &[0xbe].repeat(count)].concat();
        move |id| frame(HEADERS, END_STREAM | END_HEADERS, id, &block)
    };
    type Bomb<'a> = (&'static str, &'a [u8], Box<dyn Fn(u32) -> Vec<u8>>, usize);
    let bombs: [Bomb<'_>; 4] = [
        // Before the others, whose memory it would use again.
        ("answers that nobody takes", GET, Box::new(ask_for_much), ANSWERS),
        ("4000 references", &small, Box::new(references(4000)), HEADS),
        ("4000 crumbs", &crumb, Box::new(references(4000)), HEADS),
        ("heads as large as they may be", &large, Box::new(references(90)), HEADS),
    ];
    // The first connections cost what every connection does.
    without_window(entrance, GET, references(0)).await;
    for (name, first, asks, most) in &bombs {
        let (grown, ended) = without_window(entrance, first, asks).await;
        println!("{entrance:?}, {name}: {} KiB, {ended:?}", grown / 1024);
        assert!(ended != Ended::Blocked, "{entrance:?}, {name}: {ended:?}");
        assert!(grown <= *most, "{entrance:?}, {name}: {} KiB more", grown / 1024);
    }
}

#[tokio::test]
async fn bombs_leave_memory_as_it_was() {
    if let Some(named) = std::env::var_os(ALONE) {
        let entrance = ENTRANCES.into_iter().find(|it| *format!("{it:?}") == *named).expect("an entrance");
        return LocalSet::new().run_until(play_bombs(entrance)).await;
    }
    let name = "mesh_tests::floods::bombs_leave_memory_as_it_was";
    for entrance in ENTRANCES {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let output =
            command.args([name, "--exact", "--nocapture"]).env(ALONE, format!("{entrance:?}")).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        print!("{said}");
        assert!(output.status.success() && said.contains("1 passed"), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[tokio::test]
async fn readers_that_stop_hold_nobody_up() {
    let test = async {
        for entrance in ENTRANCES {
            let application = Application::start(LONG).await;
            let scene = Rc::new(Scene::new(entrance, application.port, plan::Protocol::Detect).await);
            // More than a shared connection takes for readers that have stopped, and fewer requests than it takes.
            let mut stopped = Vec::new();
            for _ in 0..7 {
                let mut attacker = Attacker::start(&scene, NO_WINDOW).await;
                let asked = ids(100).flat_map(ask_for_much).collect::<Vec<_>>();
                assert_eq!(attacker.send(&asked, true).await, Ended::Taken);
                assert_eq!(attacker.read_until(|it| it.answers == 100).await, Ended::Taken);
                stopped.push(attacker);
            }
            // Answers go as far as they are let.
            application.is_quiet().await;
            println!("{entrance:?}: {} MiB on their way", application.sent.get() >> 20);
            let mut good = Attacker::start(&scene, &[]).await;
            for (before, id) in ids(20).enumerate() {
                let request = frame(HEADERS, END_STREAM | END_HEADERS, id, GET);
                assert_eq!(good.send(&request, false).await, Ended::Taken);
                let ended = good.read_until(|it| it.answers > before).await;
                assert_eq!(ended, Ended::Taken, "{entrance:?}: a good client's request {before}");
            }
            drop(stopped);
        }
    };
    LocalSet::new().run_until(test).await;
}

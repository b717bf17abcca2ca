//! The table of hostile messages (`crates/testmesh/framing.toml`) against two proxies, by every entrance: the workload's
//! own proxy, a published port, and the mesh's door, where a hostile peer speaks without a proxy of its own.
//!
//! The application writes down every byte it gets and speaks only when it is told to. After every message an honest
//! request must be answered, and the application must have had nothing else.

use super::*;
use crate::io::Io;
use crate::upstream::tls::Carried;
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::WriteHalf;
use tokio::sync::mpsc;
use tokio::time::timeout;
use toml_edit::{DocumentMut, Item, Table as Toml, Value};

/// How long anything may take that must happen.
const PATIENCE: Duration = Duration::from_secs(5);

/// Parts that the application has had and nobody has looked at: a conversation has a dozen.
const QUEUE: usize = 1024;

/// Who the mesh says the caller is.
const CALLER: &str = "URI=spiffe://mesh.internal/ns/default/sa/api";

const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Entrance {
    /// Through the workload's own proxy.
    Workload,
    /// A published port of the other workload.
    Published,
    /// The other proxy's door, as a peer whose proxy is not ours.
    Peer,
}

/// Part of a row: a text, or several.
#[derive(Clone, Debug)]
enum Input {
    One(String),
    Many(Vec<Input>),
}

impl Input {
    fn of(value: &Value) -> Input {
        match value {
            Value::String(text) => Input::One(text.value().clone()),
            Value::Array(list) => Input::Many(list.iter().map(Input::of).collect()),
            other => panic!("neither text nor list: {other:?}"),
        }
    }

    /// The texts of a list; a text is a list of one.
    fn texts(&self) -> Vec<String> {
        match self {
            Input::One(text) => vec![text.clone()],
            Input::Many(list) => list.iter().flat_map(Input::texts).collect(),
        }
    }

    fn part(&self, at: usize) -> &Input {
        match self {
            Input::One(_) if at == 0 => self,
            Input::Many(list) => list.get(at).unwrap_or_else(|| panic!("{self:?} has no part {}", at + 1)),
            Input::One(text) => panic!("'{text}' has no part {}", at + 1),
        }
    }
}

/// Puts the input into a template: in a text its text, in a list all of it.
fn fill(template: &Input, input: &Input) -> Vec<String> {
    let put = |text: &String| match input {
        _ if text == "%" => input.texts(),
        Input::One(value) => vec![text.replace('%', value)],
        Input::Many(_) => vec![text.clone()],
    };
    template.texts().iter().flat_map(put).collect()
}

/// The bytes that an escaped text means.
fn bytes_of(text: &str) -> Vec<u8> {
    if let Some((before, rest)) = text.split_once("<<") {
        let (repeated, after) = rest.split_once(">>").expect("<<N*TEXT>>");
        let (count, text) = repeated.split_once('*').expect("<<N*TEXT>>");
        let count = count.parse().expect("a number before the asterisk");
        return [bytes_of(before), bytes_of(text).repeat(count), bytes_of(after)].concat();
    }
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let Some((first, more)) = rest.split_first() {
        rest = more;
        if *first != b'\\' {
            bytes.push(*first);
            continue;
        }
        let (kind, more) = rest.split_first().expect("something after a backslash");
        rest = more;
        bytes.push(match kind {
            b'r' => b'\r',
            b'n' => b'\n',
            b't' => b'\t',
            b'0' => 0,
            b'\\' => b'\\',
            b'x' => {
                let (digits, more) = rest.split_at(2);
                rest = more;
                u8::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).expect("two hexadecimal digits")
            }
            other => panic!("unknown escape \\{}", *other as char),
        });
    }
    bytes
}

fn shown(bytes: &[u8]) -> String {
    let text = bytes.escape_ascii().to_string();
    if text.len() > 2000 { format!("{}... ({} bytes)", &text[..2000], bytes.len()) } else { text }
}

/// What one message is and what must hold.
struct Case<'a> {
    row: &'a Toml,
    input: Input,
}

impl Case<'_> {
    fn text(&self, key: &str) -> Option<&str> {
        self.row.get(key).and_then(Item::as_str)
    }

    fn template(&self, key: &str) -> Option<Input> {
        self.row.get(key).map(|item| Input::of(item.as_value().expect("a value")))
    }

    fn is_http2(&self) -> bool {
        self.text("protocol") == Some("http2")
    }

    /// What is sent: a refused input is sent as a whole, one that is forwarded comes with what is forwarded.
    fn sent(&self) -> Vec<String> {
        let pairs = self.text("refuses").is_none();
        let input = if pairs { self.input.part(0) } else { &self.input };
        fill(&self.template("form").unwrap_or_else(|| Input::One("%".into())), input)
    }

    /// What is received for it.
    fn received(&self, key: &str) -> Vec<String> {
        let template = self.template(key).expect("a template");
        match &self.input {
            Input::Many(parts) if self.text("refuses").is_none() => fill(&template, &parts[1]),
            _ => template.texts(),
        }
    }

    /// The conversation, one step after the other.
    fn steps(&self) -> Vec<String> {
        let honest_head = r"GET / HTTP/1.1\r\nHost: web\r\n{caller}\r\n";
        let refused = self.text("refuses").map(|refusal| format!("c<status {refusal}"));
        let own = |steps: &[&str]| steps.iter().map(|step| (*step).to_owned()).collect::<Vec<_>>();
        if self.row.get("steps").is_some() {
            let steps = self.template("steps").expect("steps").texts();
            return steps.iter().flat_map(|step| self.step(step)).collect();
        }
        let sent = self.sent().concat();
        match (self.text("side"), refused) {
            (Some("client"), Some(refused)) if self.row.get("gets").is_some() => {
                let gets = self.received("gets").concat();
                vec![format!("c> {sent}"), refused, format!("a< {gets}"), "a=".into(), "c=".into()]
            }
            (Some("client"), Some(refused)) => vec![format!("c> {sent}"), refused, "c=".into()],
            (Some("client"), None) => {
                let gets = self.received("gets").concat();
                let answer = r"a> HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
                vec![format!("c> {sent}"), format!("a< {gets}"), answer.into(), "c<status 200".into()]
            }
            (Some("backend"), Some(refused)) => {
                let begun = own(&[r"c> GET / HTTP/1.1\r\nHost: web\r\n\r\n", &format!("a< {honest_head}")]);
                [begun, vec![format!("a> {sent}"), refused, "a=".into()]].concat()
            }
            (Some("backend"), None) => {
                let begun = own(&[r"c> GET / HTTP/1.1\r\nHost: web\r\n\r\n", &format!("a< {honest_head}")]);
                let says = self.received("says").concat();
                [begun, vec![format!("a> {sent}"), format!("c< {says}")]].concat()
            }
            other => panic!("neither client nor backend: {other:?}"),
        }
    }

    fn step(&self, step: &str) -> Vec<String> {
        if step == "%..." {
            return self.input.texts();
        }
        let parts = self.input.texts();
        let mut step = step.to_owned();
        for (at, part) in parts.iter().enumerate() {
            step = step.replace(&format!("%{}", at + 1), part);
        }
        vec![step.replace('%', &parts[0])]
    }
}

fn cases(table: &DocumentMut) -> impl Iterator<Item = Case<'_>> {
    let rows = table["row"].as_array_of_tables().expect("rows");
    rows.iter().flat_map(|row| {
        let inputs = row["inputs"].as_array().expect("inputs");
        inputs.iter().map(move |input| Case { row, input: Input::of(input) })
    })
}

/// What the application has had: bytes of a connection, or its end.
type Heard = (usize, Option<Vec<u8>>);

/// An application that keeps a record of all bytes, over all connections.
struct Recorder {
    heard: mpsc::Receiver<Heard>,
    open: Rc<RefCell<HashMap<usize, WriteHalf<TcpStream>>>>,
    /// The connection of the conversation.
    current: Option<usize>,
    /// The one whose other side has closed, to which something may still be said.
    ended: Option<usize>,
    /// Bytes of the current connection that nobody has asked for.
    kept: Vec<u8>,
    port: u16,
}

impl Recorder {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (say, heard) = mpsc::channel(QUEUE);
        let open: Rc<RefCell<HashMap<usize, WriteHalf<TcpStream>>>> = Rc::default();
        let opened = open.clone();
        spawn_local(async move {
            for number in 0.. {
                let (stream, _) = listener.accept().await.unwrap();
                // What is said is there at once, whatever was said before.
                stream.set_nodelay(true).unwrap();
                let (mut read, write) = tokio::io::split(stream);
                opened.borrow_mut().insert(number, write);
                let say = say.clone();
                spawn_local(async move {
                    let mut buffer = vec![0; 64 * 1024];
                    loop {
                        let count = read.read(&mut buffer).await.unwrap_or(0);
                        let heard = (count > 0).then(|| buffer[..count].to_vec());
                        if say.send((number, heard)).await.is_err() || count == 0 {
                            return;
                        }
                    }
                });
            }
        });
        Self { heard, open, current: None, ended: None, kept: Vec::new(), port }
    }

    /// Takes exactly these bytes from the conversation's connection, or from whichever speaks first.
    async fn expect(&mut self, expected: &[u8]) -> Result<(), String> {
        while self.kept.len() < expected.len() {
            if !expected.starts_with(&self.kept) {
                break;
            }
            let wanting = || format!("wanted {}, had {}", shown(expected), shown(&self.kept));
            let heard = timeout(PATIENCE, self.heard.recv()).await.map_err(|_| wanting())?;
            let (number, bytes) = heard.expect("a recorder");
            match bytes {
                Some(bytes) if self.current.is_none_or(|current| current == number) => {
                    self.current = Some(number);
                    self.kept.extend_from_slice(&bytes);
                }
                Some(bytes) => return Err(format!("another connection got {}", shown(&bytes))),
                None if self.current == Some(number) => return Err(format!("the connection ended; {}", wanting())),
                None => drop(self.open.borrow_mut().remove(&number)),
            }
        }
        if !self.kept.starts_with(expected) {
            return Err(format!("wanted {}, had {}", shown(expected), shown(&self.kept)));
        }
        self.kept.drain(..expected.len());
        Ok(())
    }

    async fn expect_end(&mut self) -> Result<(), String> {
        let current = self.current.ok_or("no connection of the conversation")?;
        loop {
            if !self.kept.is_empty() {
                return Err(format!("had {} before its end", shown(&self.kept)));
            }
            let heard = timeout(PATIENCE, self.heard.recv()).await.map_err(|_| "its connection was not closed")?;
            match heard.expect("a recorder") {
                (number, None) if number == current => {
                    self.ended = self.current.take();
                    return Ok(());
                }
                (number, None) => drop(self.open.borrow_mut().remove(&number)),
                (_, Some(bytes)) => return Err(format!("had {} before its end", shown(&bytes))),
            }
        }
    }

    /// Says something. Whoever does not listen to all of it is not waited for.
    async fn say(&mut self, bytes: Vec<u8>) -> Result<(), String> {
        let (current, mut write) = self.listener().await?;
        let open = self.open.clone();
        spawn_local(async move {
            if write.write_all(&bytes).await.is_ok() {
                open.borrow_mut().insert(current, write);
            }
        });
        Ok(())
    }

    /// Who is talked to, once all that was said is on its way.
    async fn listener(&mut self) -> Result<(usize, WriteHalf<TcpStream>), String> {
        let current = self.current.or(self.ended).ok_or("nobody to talk to")?;
        until("all is said", || self.open.borrow().contains_key(&current)).await;
        let write = self.open.borrow_mut().remove(&current).ok_or("nobody to talk to")?;
        Ok((current, write))
    }

    async fn shut(&mut self) -> Result<(), String> {
        let (current, mut write) = self.listener().await?;
        let _ = write.shutdown().await;
        self.open.borrow_mut().insert(current, write);
        Ok(())
    }

    /// Nothing has arrived that nobody asked for; connections that ended are forgotten.
    fn assert_silent(&mut self) -> Result<(), String> {
        if !self.kept.is_empty() {
            return Err(format!("the application had {} as well", shown(&self.kept)));
        }
        while let Ok((number, bytes)) = self.heard.try_recv() {
            match bytes {
                Some(bytes) => return Err(format!("the application had {} as well", shown(&bytes))),
                None => drop(self.open.borrow_mut().remove(&number)),
            }
        }
        self.current = None;
        if let Some(ended) = self.ended.take() {
            self.open.borrow_mut().remove(&ended);
        }
        Ok(())
    }
}

/// A mesh of two proxies before an application, and a way in.
pub(super) struct Scene {
    entrance: Entrance,
    address: SocketAddr,
    peer: Arc<crate::upstream::tls::Credentials>,
    port: u16,
    sides: [Beside; 2],
}

impl Scene {
    pub(super) async fn new(entrance: Entrance, port: u16, declared: plan::Protocol) -> Self {
        let ca = Authority::new("mesh.internal");
        let mut own = plan("web", &[port], Mode::Strict);
        own.ports[0].protocol = declared;
        let web = beside_with(&ca, "web", own);
        let inbound = web.door(Traffic::Inbound).await;
        let api = beside(&ca, "api", &[], Mode::Strict);
        let protocol = if declared == plan::Protocol::Http { Protocol::Http } else { Protocol::Detect };
        api.knows("default/web", protocol, &[(inbound, port)]);
        let address = match entrance {
            Entrance::Workload => api.door(upstream("web")).await,
            Entrance::Published => web.door(Traffic::Published(port)).await,
            Entrance::Peer => inbound,
        };
        let peer = ca.credentials("default", "api");
        Self { entrance, address, peer, port, sides: [api, web] }
    }

    pub(super) async fn connect(&self, carried: Carried) -> Io {
        let stream = TcpStream::connect(self.address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        match self.entrance {
            Entrance::Workload | Entrance::Published => Io::Plain(stream),
            Entrance::Peer => {
                let name = format!("p{}.web.default.svc.mesh.internal", self.port);
                self.peer.dialer().connect(stream, &name, carried).await.unwrap().0
            }
        }
    }

    /// Connections of clients that the proxy at this entrance holds. The other one's are kept for the next request.
    pub(super) fn clients_open(&self) -> i64 {
        let side = &self.sides[usize::from(self.entrance != Entrance::Workload)];
        side.proxy.metrics.clients_open.load(Ordering::Relaxed)
    }

    /// What the application is told of the caller.
    fn vouched(&self) -> &'static [(&'static str, &'static str)] {
        match self.entrance {
            Entrance::Published => &[("x-forwarded-for", "127.0.0.1"), ("x-forwarded-proto", "http")],
            Entrance::Workload | Entrance::Peer => &[("x-forwarded-client-cert", CALLER)],
        }
    }

    /// Leaves out what `{peer}` and `{/peer}` enclose where the caller is none.
    fn of_peers(&self, text: &str) -> String {
        let Some((before, rest)) = text.split_once("{peer}") else { return text.to_owned() };
        let (theirs, after) = rest.split_once("{/peer}").expect("{/peer}");
        let theirs = if self.entrance == Entrance::Published { "" } else { theirs };
        format!("{before}{theirs}{}", self.of_peers(after))
    }

    fn named(&self, text: &str) -> Vec<u8> {
        let caller: String = self.vouched().iter().map(|(name, value)| format!(r"{name}: {value}\r\n")).collect();
        bytes_of(&self.of_peers(text).replace("{caller}", &caller))
    }
}

/// A client that speaks HTTP/1 byte by byte.
struct Client {
    io: Option<Io>,
    kept: Vec<u8>,
}

impl Client {
    async fn more(&mut self) -> Result<bool, String> {
        let io = self.io.as_mut().ok_or("the client has gone")?;
        let read = timeout(PATIENCE, io.read_buf(&mut self.kept)).await;
        // A connection may end in a reset.
        Ok(read.map_err(|_| format!("no answer but {}", shown(&self.kept)))?.unwrap_or(0) > 0)
    }

    async fn expect(&mut self, expected: &[u8]) -> Result<(), String> {
        while self.kept.len() < expected.len() && expected.starts_with(&self.kept) {
            if !self.more().await? {
                break;
            }
        }
        if !self.kept.starts_with(expected) {
            return Err(format!("the client wanted {}, had {}", shown(expected), shown(&self.kept)));
        }
        self.kept.drain(..expected.len());
        Ok(())
    }

    /// Reads an answer, and interim ones before it. `STATUS`, or `STATUS REASON`.
    async fn expect_status(&mut self, expected: &str) -> Result<(), String> {
        loop {
            let end = loop {
                match self.kept.windows(4).position(|it| it == b"\r\n\r\n") {
                    Some(end) => break end + 4,
                    None if self.more().await? => {}
                    None => return Err(format!("the client wanted {expected}, had {}", shown(&self.kept))),
                }
            };
            let head = String::from_utf8_lossy(&self.kept[..end]).into_owned();
            self.kept.drain(..end);
            if head.starts_with("HTTP/1.1 1") {
                continue;
            }
            let (status, reason) = expected.split_once(' ').unwrap_or((expected, ""));
            let right = head.starts_with(&format!("HTTP/1.1 {status} "))
                && (reason.is_empty() || head.contains(&format!("x-sheer-reason: {reason}")));
            if !right {
                return Err(format!("the client wanted {expected}, had {head}"));
            }
            let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
            let length: usize = field("Content-Length:").unwrap_or(0);
            while self.kept.len() < length && self.more().await? {}
            self.kept.drain(..length.min(self.kept.len()));
            return Ok(());
        }
    }

    async fn expect_end(&mut self) -> Result<(), String> {
        while self.more().await? {}
        if !self.kept.is_empty() {
            return Err(format!("the client had {} before the end", shown(&self.kept)));
        }
        Ok(())
    }
}

/// An honest request by a client of its own.
async fn honest(scene: &Scene, application: &mut Recorder) -> Result<(), String> {
    application.current = None;
    let mut client = Client { io: Some(scene.connect(Carried::Http1).await), kept: Vec::new() };
    let request = b"GET /honest HTTP/1.1\r\nHost: web\r\n\r\n";
    client.io.as_mut().unwrap().write_all(request).await.unwrap();
    client.io.as_mut().unwrap().flush().await.unwrap();
    let expected = scene.named(r"GET /honest HTTP/1.1\r\nHost: web\r\n{caller}\r\n");
    application.expect(&expected).await.map_err(|why| format!("an honest request: {why}"))?;
    application.say(OK.to_vec()).await?;
    client.expect(OK).await.map_err(|why| format!("an honest request: {why}"))?;
    if !client.kept.is_empty() {
        return Err(format!("an honest request was answered with {} as well", shown(&client.kept)));
    }
    Ok(())
}

async fn converse(scene: &Scene, application: &mut Recorder, steps: &[String]) -> Result<(), String> {
    let mut client = Client { io: Some(scene.connect(Carried::Http1).await), kept: Vec::new() };
    for step in steps {
        let (kind, rest) = step.split_once(' ').unwrap_or((step, ""));
        let result = match kind {
            "c>" => {
                let io = client.io.as_mut().ok_or("the client has gone")?;
                let bytes = scene.named(rest);
                // Who is refused in the middle may find the connection closed.
                let written = async {
                    io.write_all(&bytes).await?;
                    io.flush().await
                };
                let _ = timeout(PATIENCE, written).await.map_err(|_| "nobody reads".to_owned())?;
                Ok(())
            }
            "c<" => client.expect(&scene.named(rest)).await,
            "c<status" => client.expect_status(rest).await,
            "c." => {
                let _ = client.io.as_mut().ok_or("the client has gone")?.shutdown().await;
                Ok(())
            }
            "c!" => {
                if let Some(io) = client.io.take() {
                    crate::tcp::reset(&io);
                }
                Ok(())
            }
            "c=" => client.expect_end().await,
            "a>" => application.say(scene.named(rest)).await,
            "a<" => application.expect(&scene.named(rest)).await,
            "a." => application.shut().await,
            "a=" => application.expect_end().await,
            "quiet" => {
                let (current, kept) = (application.current, std::mem::take(&mut application.kept));
                let honest = if kept.is_empty() { honest(scene, application).await } else { Err(shown(&kept)) };
                let silent = application.assert_silent();
                application.current = current;
                honest.and(silent)
            }
            "victims" => {
                let count: usize = rest.parse().expect("a number");
                let mut result = application.assert_silent();
                for _ in 0..count {
                    result = result.and(honest(scene, application).await);
                }
                result
            }
            other => panic!("unknown step {other}"),
        };
        result.map_err(|why| format!("{step}: {why}"))?;
    }
    drop(client);
    application.assert_silent()?;
    honest(scene, application).await?;
    application.assert_silent()
}

/// A panic of a task is nobody's answer: they are counted, for this thread.
pub(super) fn count_panics() -> Rc<dyn Fn() -> usize> {
    let count = Arc::new(AtomicUsize::new(0));
    let (counted, thread, before) = (count.clone(), std::thread::current().id(), std::panic::take_hook());
    std::panic::set_hook(Box::new(move |info| {
        if std::thread::current().id() == thread {
            counted.fetch_add(1, Ordering::Relaxed);
        }
        before(info);
    }));
    Rc::new(move || count.load(Ordering::Relaxed))
}

fn table() -> DocumentMut {
    include_str!("../../../testmesh/framing.toml").parse().expect("the table")
}

fn name(case: &Case<'_>) -> String {
    let id = case.text("id").unwrap_or_default();
    format!("{id} ({}), {}", case.text("what").unwrap_or_default(), case.input.texts().join(" | "))
}

/// What clients say first in the rows whose numbers begin so, and what applications answer there.
pub(super) fn first_words(rows: &str) -> [Vec<(Carried, Vec<u8>)>; 2] {
    let table = table();
    let [mut clients, mut applications] = [Vec::new(), Vec::new()];
    for case in cases(&table).filter(|case| case.text("id").is_some_and(|id| id.starts_with(rows))) {
        if case.is_http2() {
            clients.push((Carried::Http2, http2::first_bytes(&case.sent())));
            continue;
        }
        for step in case.steps() {
            let step = ["{caller}", "{peer}", "{/peer}"].iter().fold(step, |step, mark| step.replace(mark, ""));
            match step.split_once("> ") {
                Some(("c", said)) => clients.push((Carried::Http1, bytes_of(said))),
                Some(("a", said)) => applications.push((Carried::Http1, bytes_of(said))),
                _ => {}
            }
        }
    }
    [clients, applications]
}

async fn play(entrance: Entrance) {
    let panics = count_panics();
    let (mut application, mut declared) = (Recorder::start().await, Recorder::start().await);
    let scene = Scene::new(entrance, application.port, plan::Protocol::Detect).await;
    let scene_declared = Scene::new(entrance, declared.port, plan::Protocol::Http).await;
    let (table, mut wrong, mut played) = (table(), Vec::new(), 0);
    for case in cases(&table).filter(|case| !case.is_http2()) {
        let is_declared = case.text("doors") == Some("declared");
        let (scene, application) =
            if is_declared { (&scene_declared, &mut declared) } else { (&scene, &mut application) };
        played += 1;
        if let Err(why) = converse(scene, application, &case.steps()).await {
            wrong.push(format!("{}\n    {why}", name(&case)));
            // Whatever is on its way belongs to this case.
            application.kept.clear();
            tokio::time::sleep(Duration::from_millis(20)).await;
            while application.assert_silent().is_err() {
                application.kept.clear();
            }
        }
    }
    assert_eq!(panics(), 0, "something panicked");
    assert!(wrong.is_empty(), "{} of {played} wrong ({entrance:?}):\n{}", wrong.len(), wrong.join("\n"));
    assert!(played > 400, "only {played} were played");
}

#[tokio::test]
async fn hostile_messages_of_the_workload_itself() {
    LocalSet::new().run_until(play(Entrance::Workload)).await;
}

#[tokio::test]
async fn hostile_messages_to_a_published_port() {
    LocalSet::new().run_until(play(Entrance::Published)).await;
}

#[tokio::test]
async fn hostile_messages_of_a_mesh_peer() {
    LocalSet::new().run_until(play(Entrance::Peer)).await;
}

/// HTTP/2, by hand on the client's side: what a well-behaved library would not send.
mod http2 {
    use super::*;
    use ::h2::server::SendResponse;

    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    const DATA: u8 = 0;
    const HEADERS: u8 = 1;
    const RESET: u8 = 3;
    const SETTINGS: u8 = 4;
    const GOAWAY: u8 = 7;

    /// What the application has had: a whole request, or a part of one.
    enum Heard {
        Whole(Vec<String>),
        Broken(Vec<String>),
    }

    /// An application that writes requests down as the table does, and answers 200.
    struct Recorder {
        heard: mpsc::Receiver<Heard>,
        port: u16,
    }

    impl Recorder {
        async fn start() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let (say, heard) = mpsc::channel(QUEUE);
            spawn_local(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let say = say.clone();
                    spawn_local(async move {
                        let Ok(mut connection) = ::h2::server::handshake(stream).await else { return };
                        while let Some(Ok((request, respond))) = connection.accept().await {
                            spawn_local(record(request, respond, say.clone()));
                        }
                    });
                }
            });
            Self { heard, port }
        }

        async fn expect(&mut self, expected: &[String]) -> Result<(), String> {
            match timeout(PATIENCE, self.heard.recv()).await.map_err(|_| "the application had nothing")?.unwrap() {
                Heard::Whole(lines) if lines == expected => Ok(()),
                Heard::Whole(lines) => Err(format!("wanted {expected:?}, had {lines:?}")),
                Heard::Broken(lines) => Err(format!("wanted {expected:?}, had the broken {lines:?}")),
            }
        }

        fn assert_silent(&mut self, may_be_broken: bool) -> Result<(), String> {
            while let Ok(heard) = self.heard.try_recv() {
                match heard {
                    Heard::Broken(_) if may_be_broken => {}
                    Heard::Whole(lines) | Heard::Broken(lines) => {
                        return Err(format!("the application had {lines:?} as well"));
                    }
                }
            }
            Ok(())
        }
    }

    async fn record(
        request: http::Request<::h2::RecvStream>,
        mut respond: SendResponse<Bytes>,
        say: mpsc::Sender<Heard>,
    ) {
        let (parts, mut body) = request.into_parts();
        let mut lines = vec![
            format!(":method = {}", parts.method),
            format!(":scheme = {}", parts.uri.scheme_str().unwrap_or_default()),
            format!(":path = {}", parts.uri.path_and_query().map_or("", |it| it.as_str())),
            format!(":authority = {}", parts.uri.authority().map_or("", |it| it.as_str())),
        ];
        let line = |kind: &str, name: &http::HeaderName, value: &http::HeaderValue| {
            format!("{kind}{name} = {}", value.as_bytes().escape_ascii())
        };
        lines.extend(parts.headers.iter().map(|(name, value)| line("", name, value)));
        let mut data = Vec::new();
        loop {
            match body.data().await {
                Some(Ok(bytes)) => {
                    let _ = body.flow_control().release_capacity(bytes.len());
                    data.extend_from_slice(&bytes);
                }
                Some(Err(_)) => return drop(say.send(Heard::Broken(lines)).await),
                None => break,
            }
        }
        if !data.is_empty() {
            lines.push(format!("DATA = {}", data.escape_ascii()));
        }
        match body.trailers().await {
            Ok(Some(trailers)) => lines.extend(trailers.iter().map(|(name, value)| line("TRAILER ", name, value))),
            Ok(None) => {}
            Err(_) => return drop(say.send(Heard::Broken(lines)).await),
        }
        let _ = say.send(Heard::Whole(lines)).await;
        let _ = respond.send_response(http::Response::new(()), true);
    }

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u32).to_be_bytes();
        [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    }

    /// A text of HPACK, as it is: nothing coded, nothing remembered (RFC 7541, section 5).
    fn literal(text: &[u8], out: &mut Vec<u8>) {
        match text.len() {
            short @ 0..127 => out.push(short as u8),
            long => {
                out.push(127);
                let mut rest = long - 127;
                while rest >= 128 {
                    out.push((rest % 128) as u8 | 128);
                    rest /= 128;
                }
                out.push(rest as u8);
            }
        }
        out.extend_from_slice(text);
    }

    /// The frames that a message's lines mean, on stream 1.
    fn frames(lines: &[String]) -> Vec<u8> {
        let (mut heads, mut data, mut trailers) = (Vec::new(), Vec::new(), Vec::new());
        for line in lines {
            let (name, value) = line.split_once(" = ").unwrap_or_else(|| panic!("'{line}' is no field"));
            let (out, name) = match name.strip_prefix("TRAILER ") {
                Some(name) => (&mut trailers, name),
                None if name == "DATA" => {
                    data.push(bytes_of(value));
                    continue;
                }
                None => (&mut heads, name),
            };
            out.push(0);
            literal(&bytes_of(name), out);
            literal(&bytes_of(value), out);
        }
        const END_STREAM: u8 = 1;
        const END_HEADERS: u8 = 4;
        let ends = |last: bool| if last { END_STREAM } else { 0 };
        let mut all = frame(HEADERS, END_HEADERS | ends(data.is_empty() && trailers.is_empty()), 1, &heads);
        for (at, part) in data.iter().enumerate() {
            all.extend(frame(DATA, ends(at + 1 == data.len() && trailers.is_empty()), 1, part));
        }
        if !trailers.is_empty() {
            all.extend(frame(HEADERS, END_HEADERS | END_STREAM, 1, &trailers));
        }
        all
    }

    /// How a request ended: a status, or the name of an error.
    async fn outcome(io: &mut Io) -> Result<String, String> {
        let mut kept = Vec::new();
        loop {
            while let Some(length) = kept.get(..3).map(|it| u32::from_be_bytes([0, it[0], it[1], it[2]]) as usize) {
                if kept.len() < 9 + length {
                    break;
                }
                let (kind, flags) = (kept[3], kept[4]);
                let payload = kept[9..9 + length].to_vec();
                kept.drain(..9 + length);
                match kind {
                    HEADERS => return Ok(status(&payload)),
                    RESET => return Ok(error(&payload)),
                    GOAWAY => return Ok(error(&payload[4..])),
                    SETTINGS if flags == 0 => {
                        let _ = io.write_all(&frame(SETTINGS, 1, 0, &[])).await;
                        let _ = io.flush().await;
                    }
                    _ => {}
                }
            }
            let read = timeout(PATIENCE, io.read_buf(&mut kept)).await.map_err(|_| "no answer")?;
            if read.unwrap_or(0) == 0 {
                return Err("the connection ended without a word".into());
            }
        }
    }

    fn error(code: &[u8]) -> String {
        let code = u32::from_be_bytes(code[..4].try_into().unwrap());
        format!("{:?}", ::h2::Reason::from(code))
    }

    /// The status is the first field of a head: an entry of the static table, or a text of three digits.
    fn status(block: &[u8]) -> String {
        const INDEXED: [&str; 7] = ["200", "204", "206", "304", "400", "404", "500"];
        match block {
            // An update of the table's size comes before.
            [0x20..=0x3f, rest @ ..] => status(rest),
            [first @ 0x88..=0x8e, ..] => INDEXED[usize::from(first - 0x88)].to_owned(),
            [0x48 | 0x08, 3, a, b, c, ..] => String::from_utf8_lossy(&[*a, *b, *c]).into_owned(),
            [0x48 | 0x08, coded, rest @ ..] if coded & 0x80 != 0 => {
                digits(&rest[..usize::from(coded & 0x7f)]).unwrap_or_default()
            }
            other => panic!("no status: {other:x?}"),
        }
    }

    /// Digits in Huffman's code: five bits for 0 to 2, six for the others (RFC 7541, appendix B).
    fn digits(coded: &[u8]) -> Option<String> {
        let bits: Vec<u8> = coded.iter().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1)).collect();
        let (mut rest, mut text) = (&bits[..], String::new());
        while text.len() < 3 {
            let value = |count: usize| Some(rest.get(..count)?.iter().fold(0u8, |sum, bit| sum << 1 | bit));
            let (digit, count) = match value(5)? {
                short @ 0..=2 => (short, 5),
                _ => (value(6)?.checked_sub(0b011001)? + 3, 6),
            };
            text.push(char::from(b'0' + digit));
            rest = &rest[count..];
        }
        Some(text)
    }

    /// A client's first bytes with this message in them.
    pub(super) fn first_bytes(lines: &[String]) -> Vec<u8> {
        [PREFACE, &frames(lines)].concat()
    }

    async fn ask(scene: &Scene, lines: &[String]) -> Result<String, String> {
        let mut io = scene.connect(Carried::Http2).await;
        io.write_all(&first_bytes(lines)).await.map_err(|why| why.to_string())?;
        io.flush().await.map_err(|why| why.to_string())?;
        outcome(&mut io).await
    }

    async fn one(scene: &Scene, application: &mut Recorder, case: &Case<'_>) -> Result<(), String> {
        let caller: Vec<String> = scene.vouched().iter().map(|(name, value)| format!("{name} = {value}")).collect();
        let named = |lines: Vec<String>| -> Vec<String> {
            let lines = lines.iter().map(|line| scene.of_peers(line).replace("{caller}", &caller.join("\n")));
            lines.flat_map(|line| line.lines().map(str::to_owned).collect::<Vec<_>>()).collect()
        };
        let had = ask(scene, &case.sent()).await?;
        match case.text("refuses") {
            None => {
                application.expect(&named(case.received("gets"))).await?;
                if had != "200" {
                    return Err(format!("it was answered with {had}"));
                }
            }
            Some(refused) if refused.split(' ').next() == Some(&had) => {}
            Some(refused) => return Err(format!("wanted {refused}, had {had}")),
        }
        let honest: Vec<String> = [":method = GET", ":scheme = http", ":path = /honest", ":authority = web"]
            .map(str::to_owned)
            .into_iter()
            .collect();
        let had = ask(scene, &honest).await?;
        if had != "200" {
            return Err(format!("an honest request was answered with {had}"));
        }
        let may_be_broken = case.row.get("broken").is_some();
        let expected = named([honest, vec!["{caller}".to_owned()]].concat());
        loop {
            match application.heard.recv().await.unwrap() {
                Heard::Whole(lines) if lines == expected => break,
                Heard::Broken(_) if may_be_broken => {}
                Heard::Whole(lines) | Heard::Broken(lines) => return Err(format!("the application had {lines:?}")),
            }
        }
        application.assert_silent(may_be_broken)
    }

    pub(super) async fn play(entrance: Entrance) {
        let panics = count_panics();
        let mut application = Recorder::start().await;
        let scene = Scene::new(entrance, application.port, plan::Protocol::Detect).await;
        let (table, mut wrong, mut played) = (table(), Vec::new(), 0);
        for case in cases(&table).filter(Case::is_http2) {
            played += 1;
            if let Err(why) = one(&scene, &mut application, &case).await {
                wrong.push(format!("{}\n    {why}", name(&case)));
                while application.heard.try_recv().is_ok() {}
            }
        }
        assert_eq!(panics(), 0, "something panicked");
        assert!(wrong.is_empty(), "{} of {played} wrong ({entrance:?}):\n{}", wrong.len(), wrong.join("\n"));
        assert!(played > 100, "only {played} were played");
    }
}

#[tokio::test]
async fn hostile_messages_over_http2() {
    for entrance in [Entrance::Workload, Entrance::Published, Entrance::Peer] {
        LocalSet::new().run_until(http2::play(entrance)).await;
    }
}

//! WebSocket conversations, directly and through two proxies by every entrance: what the client gets is the same to the
//! byte. `make websocket` plays the cases of the Autobahn suite, of which these are the kinds.

use super::framing::{Entrance, Scene};
use super::*;
use crate::io::Io;
use crate::upstream::tls::Carried;
use tokio::time::timeout;

/// How long one conversation may take.
const PATIENCE: Duration = Duration::from_secs(10);

const UPGRADE: &[u8] = b"GET /chat HTTP/1.1\r\nHost: web\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
    Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n";
const SWITCHED: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
    Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;
const FIN: u8 = 0x80;

/// A frame of the first byte's flags and kind (RFC 6455, section 5.2), masked as a client's must be.
fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![first];
    match payload.len() {
        short @ 0..126 => out.push(0x80 | short as u8),
        long @ 126..65_536 => out.extend([&[0x80 | 126], &(long as u16).to_be_bytes()[..]].concat()),
        long => out.extend([&[0x80 | 127], &(long as u64).to_be_bytes()[..]].concat()),
    }
    const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];
    out.extend(MASK);
    out.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    out
}

fn plain(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![first];
    match payload.len() {
        short @ 0..126 => out.push(short as u8),
        long @ 126..65_536 => out.extend([&[126], &(long as u16).to_be_bytes()[..]].concat()),
        long => out.extend([&[127], &(long as u64).to_be_bytes()[..]].concat()),
    }
    out.extend_from_slice(payload);
    out
}

/// A close frame of a server.
fn closing(code: u16) -> Vec<u8> {
    plain(FIN | CLOSE, &code.to_be_bytes())
}

/// A strict server that echoes messages: it says what is wrong with a close frame, and closes.
#[derive(Default)]
struct Echo {
    kept: Vec<u8>,
    /// The kind of the message that is being received, and its parts.
    message: Option<(u8, Vec<u8>)>,
}

impl Echo {
    /// What is said to what has come, and whether that was the last.
    fn answer(&mut self, out: &mut Vec<u8>) -> bool {
        while let Some((first, payload)) = self.frame() {
            let kind = first & 0x0f;
            let wrong = first & 0x70 != 0
                || matches!(kind, 3..=7 | 11..)
                || (kind >= CLOSE && (payload.len() > 125 || first & FIN == 0))
                || (kind == 0 && self.message.is_none())
                || (matches!(kind, TEXT | BINARY) && self.message.is_some());
            if wrong {
                out.extend(closing(1002));
                return true;
            }
            match kind {
                PING => out.extend(plain(FIN | PONG, &payload)),
                PONG => {}
                CLOSE => {
                    let code = payload.get(..2).map(|it| u16::from_be_bytes([it[0], it[1]]));
                    let right = payload.is_empty() || matches!(code, Some(1000..=1003 | 1007..=1011 | 3000..=4999));
                    out.extend(if right { plain(FIN | CLOSE, &payload) } else { closing(1002) });
                    return true;
                }
                _ => {
                    let (kind, mut all) = self.message.take().unwrap_or((kind, Vec::new()));
                    all.extend(payload);
                    if first & FIN == 0 {
                        self.message = Some((kind, all));
                    } else if kind == TEXT && std::str::from_utf8(&all).is_err() {
                        out.extend(closing(1007));
                        return true;
                    } else {
                        out.extend(plain(FIN | kind, &all));
                    }
                }
            }
        }
        false
    }

    fn frame(&mut self) -> Option<(u8, Vec<u8>)> {
        let (first, length) = (*self.kept.first()?, *self.kept.get(1)? & 0x7f);
        let (begin, length) = match length {
            126 => (4, self.kept.get(2..4)?.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte))),
            127 => (10, self.kept.get(2..10)?.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte))),
            short => (2, usize::from(short)),
        };
        let mask: [u8; 4] = self.kept.get(begin..begin + 4)?.try_into().ok()?;
        let payload = self.kept.get(begin + 4..begin + 4 + length)?;
        let payload = payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask).collect();
        self.kept.drain(..begin + 4 + length);
        Some((first, payload))
    }
}

async fn application() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            // A client that leaves in the middle is one of the cases.
            spawn_local(async move { drop(serve(stream).await) });
        }
    });
    port
}

async fn serve(mut stream: TcpStream) -> std::io::Result<()> {
    let mut echo = Echo::default();
    let end = loop {
        if stream.read_buf(&mut echo.kept).await? == 0 {
            return Ok(());
        }
        if let Some(end) = echo.kept.windows(4).position(|it| it == b"\r\n\r\n") {
            break end + 4;
        }
    };
    echo.kept.drain(..end);
    let mut out = SWITCHED.to_vec();
    loop {
        let last = echo.answer(&mut out);
        stream.write_all(&std::mem::take(&mut out)).await?;
        if last {
            stream.shutdown().await?;
            // What comes late is taken: closing over it would be a reset, which may overtake what was said.
            while stream.read_buf(&mut echo.kept).await? > 0 {
                echo.kept.clear();
            }
            return Ok(());
        }
        if stream.read_buf(&mut echo.kept).await? == 0 {
            return Ok(());
        }
    }
}

/// What a client sends after its upgrade, by the suite's categories. Each ends with what makes the server close.
fn conversations() -> Vec<(String, Vec<Vec<u8>>)> {
    let bye = || masked(FIN | CLOSE, &1000u16.to_be_bytes());
    let mut all: Vec<(String, Vec<Vec<u8>>)> = Vec::new();
    for kind in [TEXT, BINARY] {
        for length in [0, 125, 126, 127, 128, 65_535, 65_536, 1 << 20] {
            all.push((format!("1, kind {kind} of {length}"), vec![masked(FIN | kind, &vec![b'*'; length]), bye()]));
        }
    }
    for payload in [&b""[..], b"ping", &[0xfe; 125], &[0xfe; 126]] {
        all.push((format!("2, a ping of {}", payload.len()), vec![masked(FIN | PING, payload), bye()]));
    }
    all.push((
        "2, a pong that nobody asked for".into(),
        vec![masked(FIN | PONG, b"?"), masked(FIN | PING, b"!"), bye()],
    ));
    for bits in 1..8 {
        let hello = masked(FIN | TEXT, b"hello");
        all.push((format!("3, reserved bits {bits}"), vec![hello, masked(FIN | bits << 4 | TEXT, b"*"), bye()]));
    }
    for kind in [3, 4, 5, 6, 7, 11, 12, 13, 14, 15] {
        all.push((format!("4, kind {kind}"), vec![masked(FIN | TEXT, b"hello"), masked(FIN | kind, b""), bye()]));
    }
    let parts =
        [masked(TEXT, b"one "), masked(FIN | PING, b"between"), masked(0, b"two "), masked(FIN, b"three"), bye()];
    all.push(("5, in parts, with a ping between".into(), parts.to_vec()));
    all.push(("5, a part of nothing".into(), vec![masked(FIN, b"of nothing"), bye()]));
    all.push(("5, a message in a message".into(), vec![masked(TEXT, b"one"), masked(FIN | TEXT, b"two"), bye()]));
    all.push(("5, a ping in parts".into(), vec![masked(PING, b"one"), masked(FIN, b"two"), bye()]));
    let kosme = "κόσμε".as_bytes();
    all.push((
        "6, a text cut inside a character".into(),
        vec![masked(TEXT, &kosme[..3]), masked(FIN, &kosme[3..]), bye()],
    ));
    for broken in [&b"\xce\xba\xed\xa0\x80edited"[..], b"\xf4\x90\x80\x80", b"\xc0\xaf", b"\xfe"] {
        all.push((format!("6, {}", broken.escape_ascii()), vec![masked(FIN | TEXT, broken), bye()]));
    }
    all.push(("7, a close without a code".into(), vec![masked(FIN | CLOSE, b"")]));
    all.push(("7, a close of one byte".into(), vec![masked(FIN | CLOSE, b"a")]));
    all.push(("7, data after a close".into(), vec![bye(), masked(FIN | TEXT, b"late")]));
    for code in [999, 1000, 1001, 1004, 1005, 1006, 1007, 1011, 1016, 2999, 3000, 4999, 5000, 65_535u16] {
        all.push((format!("7, code {code}"), vec![masked(FIN | CLOSE, &code.to_be_bytes())]));
    }
    let small: Vec<_> = (0..2000u32).map(|it| masked(FIN | BINARY, &it.to_be_bytes())).chain([bye()]).collect();
    all.push(("9, many small ones".into(), small));
    let first = std::iter::once(masked(BINARY, &[7; 64]));
    let rest = (0..4000).map(|_| masked(0, &[7; 64]));
    all.push((
        "10, a quarter of a megabyte in parts".into(),
        first.chain(rest).chain([masked(FIN, b""), bye()]).collect(),
    ));
    all
}

/// How a client sends.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Manner {
    /// The upgrade first; then all frames at once.
    AfterTheAnswer,
    /// All together with the upgrade.
    Early,
    /// The upgrade first; then in parts of this length.
    InParts(usize),
}

/// All that the client gets, to the connection's end.
async fn converse(mut io: Io, frames: &[Vec<u8>], manner: Manner) -> Result<Vec<u8>, String> {
    let said = frames.concat();
    let mut heard = Vec::new();
    let talk = async {
        if manner == Manner::Early {
            io.write_all(&[UPGRADE, &said].concat()).await?;
            io.flush().await?;
        } else {
            io.write_all(UPGRADE).await?;
            io.flush().await?;
            while !heard.windows(4).any(|it| it == b"\r\n\r\n") && io.read_buf(&mut heard).await? > 0 {}
        }
        let (mut read, mut write) = tokio::io::split(io);
        let saying = async {
            let parts = match manner {
                Manner::Early => said[..0].chunks(1),
                Manner::AfterTheAnswer => said.chunks(said.len()),
                Manner::InParts(length) => said.chunks(length),
            };
            for part in parts {
                // A proxy may close what its server has closed.
                if write.write_all(part).await.is_err() || write.flush().await.is_err() {
                    break;
                }
            }
            // The other half of the connection stays open: it is the server that closes first.
            write
        };
        let hearing = async { while read.read_buf(&mut heard).await.unwrap_or(0) > 0 {} };
        let (_write, ()) = tokio::join!(saying, hearing);
        Ok::<_, std::io::Error>(())
    };
    match timeout(PATIENCE, talk).await {
        Ok(ended) => ended.map_err(|why| why.to_string())?,
        Err(_) => return Err(format!("not ended, after {} bytes", heard.len())),
    }
    Ok(heard)
}

/// The head is written anew by proxies: what comes behind it counts, and that it switched.
fn behind_the_head(heard: &[u8]) -> &[u8] {
    assert!(heard.starts_with(b"HTTP/1.1 101 "), "{}", heard.escape_ascii());
    let end = heard.windows(4).position(|it| it == b"\r\n\r\n").unwrap() + 4;
    &heard[end..]
}

#[tokio::test]
async fn websocket_conversations_are_as_without_a_mesh() {
    let test = async {
        let port = application().await;
        let mut scenes = Vec::new();
        for entrance in [Entrance::Workload, Entrance::Published, Entrance::Peer] {
            scenes.push((entrance, Scene::new(entrance, port, plan::Protocol::Detect).await));
        }
        let conversations = conversations();
        assert!(conversations.len() > 60);
        for (name, frames) in &conversations {
            for manner in [Manner::AfterTheAnswer, Manner::Early, Manner::InParts(1), Manner::InParts(1460)] {
                let length: usize = frames.iter().map(Vec::len).sum();
                if manner == Manner::InParts(1) && length > 1000 {
                    continue;
                }
                let stream = Io::tcp(TcpStream::connect(("127.0.0.1", port)).await.unwrap()).unwrap();
                let direct = converse(stream, frames, manner).await.unwrap();
                assert!(!behind_the_head(&direct).is_empty(), "{name}, {manner:?}");
                for (entrance, scene) in &scenes {
                    let heard = converse(scene.connect(Carried::Http1).await, frames, manner).await;
                    let heard = heard.unwrap_or_else(|why| panic!("{name}, {manner:?}, {entrance:?}: {why}"));
                    assert!(
                        behind_the_head(&heard) == behind_the_head(&direct),
                        "{name}, {manner:?}, {entrance:?}: {} bytes, directly {}",
                        heard.len(),
                        direct.len()
                    );
                }
            }
        }
    };
    LocalSet::new().run_until(test).await;
}

use crate::body::{Body, BodyError, Frame, Request, Response};
use crate::drain;
use crate::h2::frame::{HEADER, MAX_PAYLOAD, PREFACE};
use crate::h2::hpack::fuzzing::{Field, Plain};
use crate::h2::server::{Options, serve};
use bytes::{Bytes, BytesMut};
use http::StatusCode;
use sheer_core::head::{Fields, RequestHead, ResponseHead};
use sheer_fuzzing::Choices;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::task::{LocalSet, yield_now};

/// Larger than what any input is answered with, so that no writer waits.
const PIPE: usize = 1 << 20;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

/// What a client says over one connection, in any parts: every request that was understood is one that its frames
/// plainly are; every frame of ours is well-formed, of a stream that the client opened, and none follows a stream's end;
/// and the conversation ends when the client has left.
///
/// # Panics
/// When that does not hold.
pub fn conversation(input: &[u8]) {
    let mut choices = Choices::of(input);
    let said = match choices.flag() {
        true => written(&mut choices),
        false => {
            let cut = choices.clone();
            let said = [PREFACE, choices.rest()].concat();
            choices = cut;
            said
        }
    };
    let parts = choices.parts(&said);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let local = LocalSet::new();
    let (understood, answered) = runtime.block_on(
        local.run_until(async { tokio::time::timeout(Duration::from_secs(10), talk(&parts)).await.expect("an end") }),
    );
    let plain = plainly(&said);
    for request in &understood {
        let is_said = plain.requests.iter().any(|it| it.is(request));
        assert!(is_said, "{request:?} was understood, and said was {:?}", plain.requests);
    }
    check_answers(&answered, &plain);
}

/// A request that was read to its end.
#[derive(Debug)]
struct Understood {
    head: RequestHead,
    body: Vec<u8>,
    trailers: Option<Fields>,
}

async fn talk(parts: &[&[u8]]) -> (Vec<Understood>, Vec<u8>) {
    let (mut near, far) = duplex(PIPE);
    let understood = Rc::new(RefCell::new(Vec::new()));
    let noted = understood.clone();
    let service = async move |request: Request| -> Option<Response> {
        let Request { head, body, .. } = request;
        let (body, trailers) = whole(body).await.ok()?;
        let answer = Bytes::from(body.clone());
        noted.borrow_mut().push(Understood { head, body, trailers });
        Some(Response { head: ResponseHead::new(StatusCode::OK), body: answer.into() })
    };
    let (signal, drain) = drain::channel();
    let serving = async move {
        let _signal = signal;
        // How it ends is told to the client as well.
        let _ = serve(far.into(), BytesMut::new(), Options::default(), drain, |_| {}, service).await;
    };
    let talking = async {
        for part in parts {
            if near.write_all(part).await.is_err() {
                break;
            }
            yield_now().await;
        }
        // Who closes at once does not wait for the answers that are under way.
        for _ in 0..50 {
            yield_now().await;
        }
        let _ = near.shutdown().await;
        let mut answered = Vec::new();
        let _ = near.read_to_end(&mut answered).await;
        answered
    };
    let ((), answered) = tokio::join!(serving, talking);
    // Tasks of requests that were cut off may hold it still.
    let understood = std::mem::take(&mut *understood.borrow_mut());
    (understood, answered)
}

async fn whole(mut body: Body) -> Result<(Vec<u8>, Option<Fields>), BodyError> {
    let (mut all, mut trailers) = (Vec::new(), None);
    while let Some(frame) = body.frame().await {
        match frame? {
            Frame::Data(bytes) => {
                assert!(!bytes.is_empty() && trailers.is_none());
                all.extend_from_slice(&bytes);
            }
            Frame::Trailers(fields) => trailers = Some(fields),
        }
    }
    Ok((all, trailers))
}

/// A request as its frames say it.
#[derive(Debug, Default)]
struct Said {
    fields: Vec<Field>,
    body: Vec<u8>,
    trailers: Vec<Field>,
    ended: bool,
}

impl Said {
    fn is(&self, understood: &Understood) -> bool {
        let value = |wanted: &str| {
            let mut all = self.fields.iter().filter(|(name, _, _)| name == wanted.as_bytes());
            all.next().map(|(_, value, _)| value.trim_ascii())
        };
        let head = &understood.head;
        let named = value(":method") == Some(head.method.as_str().as_bytes())
            && value(":path") == Some(head.target().as_bytes())
            && value(":authority").or(value("host")).unwrap_or_default() == head.authority().as_bytes();
        let fields = |fields: &Fields, said: &[Field]| {
            let mut said = said.iter();
            fields.iter().all(|(name, value, _)| {
                said.any(|(its_name, its_value, _)| its_name == name && its_value.trim_ascii() == value)
            })
        };
        let trailers = understood.trailers.as_ref().is_none_or(|trailers| fields(trailers, &self.trailers));
        self.ended && named && self.body == understood.body && fields(&head.fields, &self.fields) && trailers
    }
}

struct Plainly {
    requests: Vec<Said>,
    streams: Vec<u32>,
    pings: Vec<Vec<u8>>,
    settings: usize,
}

/// Frame by frame, until one is none.
fn plainly(said: &[u8]) -> Plainly {
    let mut plainly = Plainly { requests: Vec::new(), streams: Vec::new(), pings: Vec::new(), settings: 0 };
    let Some(mut rest) = said.strip_prefix(PREFACE) else { return plainly };
    let (mut open, mut decoder) = (BTreeMap::<u32, Said>::new(), Plain::new());
    // The block that is under way: of which stream, whether that ends with it, and its bytes.
    let mut block: Option<(u32, bool, Vec<u8>)> = None;
    while let Some((kind, flags, stream, payload, after)) = split(rest) {
        rest = after;
        let mut whole = None;
        match kind {
            DATA => {
                let request = open.get_mut(&stream).filter(|request| !request.ended);
                if let (Some(request), Some(content)) = (request, unpadded(payload, flags)) {
                    request.body.extend_from_slice(content);
                    request.ended |= flags & 1 != 0;
                }
            }
            HEADERS => {
                let Some(mut content) = unpadded(payload, flags) else { break };
                if flags & 0x20 != 0 {
                    content = content.get(5..).unwrap_or_default();
                }
                whole = Some((stream, flags & 1 != 0, content.to_vec()));
            }
            CONTINUATION => {
                whole = block.take();
                match &mut whole {
                    Some((_, _, bytes)) => bytes.extend_from_slice(payload),
                    None => break,
                }
            }
            SETTINGS if flags & 1 == 0 => plainly.settings += 1,
            PING if flags & 1 == 0 => plainly.pings.push(payload.to_vec()),
            _ => {}
        }
        let Some((stream, ends, bytes)) = whole else { continue };
        if flags & 4 == 0 {
            block = Some((stream, ends, bytes));
            continue;
        }
        let Some(fields) = decoder.decode(&bytes) else { break };
        plainly.streams.push(stream);
        match open.get_mut(&stream) {
            Some(request) if request.ended => {}
            Some(request) => {
                request.trailers.extend(fields);
                request.ended |= ends;
            }
            None => drop(open.insert(stream, Said { fields, ended: ends, ..Said::default() })),
        }
    }
    plainly.requests = open.into_values().collect();
    plainly
}

/// Type, flags, stream and payload of a frame, and what follows it.
type First<'a> = (u8, u8, u32, &'a [u8], &'a [u8]);

/// The first frame, when it is whole.
fn split(bytes: &[u8]) -> Option<First<'_>> {
    let (header, rest) = bytes.split_at_checked(HEADER)?;
    let length = usize::from(header[0]) << 16 | usize::from(header[1]) << 8 | usize::from(header[2]);
    let (payload, rest) = rest.split_at_checked(length)?;
    let stream = u32::from_be_bytes([header[5] & 0x7f, header[6], header[7], header[8]]);
    Some((header[3], header[4], stream, payload, rest))
}

fn unpadded(payload: &[u8], flags: u8) -> Option<&[u8]> {
    if flags & 8 == 0 {
        return Some(payload);
    }
    let (padding, content) = payload.split_first()?;
    content.get(..content.len().checked_sub(usize::from(*padding))?)
}

fn check_answers(answered: &[u8], plain: &Plainly) {
    let (mut rest, mut decoder, mut ended) = (answered, Plain::new(), Vec::new());
    let (mut first, mut acknowledged, mut last_stream) = (true, 0, None);
    let (mut open, mut reset) = (Vec::new(), Vec::new());
    while let Some((kind, flags, stream, payload, after)) = split(rest) {
        rest = after;
        assert!(payload.len() <= MAX_PAYLOAD);
        assert!(!first || kind == SETTINGS && flags & 1 == 0, "it begins with another frame than SETTINGS");
        first = false;
        match kind {
            SETTINGS => {
                assert!(stream == 0 && payload.len() % 6 == 0);
                acknowledged += usize::from(flags & 1 != 0);
            }
            PING => {
                assert!(stream == 0 && payload.len() == 8);
                assert!(flags & 1 == 0 || plain.pings.iter().any(|it| it == payload), "an answer to no ping");
            }
            GOAWAY => {
                assert!(stream == 0 && payload.len() >= 8);
                let last = u32::from_be_bytes([payload[0], payload[1], payload[2], payload[3]]);
                assert!(last_stream.is_none_or(|before| last <= before), "more streams than before");
                last_stream = Some(last);
            }
            WINDOW_UPDATE => {
                assert!(payload.len() == 4 && payload != [0; 4]);
                assert!(stream == 0 || !reset.contains(&stream), "a window for stream {stream}, which was reset");
            }
            RST_STREAM => {
                assert!(payload.len() == 4 && stream != 0);
                ended.push(stream);
                reset.push(stream);
            }
            HEADERS | DATA => {
                assert!(plain.streams.contains(&stream), "an answer on stream {stream}, which nobody opened");
                assert!(!ended.contains(&stream), "a frame behind the end of stream {stream}");
                if kind == HEADERS {
                    assert!(flags & 4 != 0, "no answer here is that long");
                    let fields = decoder.decode(payload).expect("a block");
                    assert!(open.contains(&stream) || fields[0].0 == b":status");
                    open.push(stream);
                } else {
                    assert!(open.contains(&stream), "a body without a head");
                }
                if flags & 1 != 0 {
                    ended.push(stream);
                }
            }
            other => panic!("a frame of type {other}"),
        }
    }
    assert!(rest.is_empty(), "half a frame");
    assert!(acknowledged <= plain.settings, "settings were acknowledged that nobody sent");
}

/// A conversation made of choices, most of whose frames have the right form.
fn written(choices: &mut Choices<'_>) -> Vec<u8> {
    let mut said = PREFACE.to_vec();
    let mut push = |kind: u8, flags: u8, stream: u32, payload: &[u8]| {
        said.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
        said.extend_from_slice(&[kind, flags]);
        said.extend_from_slice(&stream.to_be_bytes());
        said.extend_from_slice(payload);
    };
    push(SETTINGS, 0, 0, b"");
    for _ in 0..choices.below(40) {
        let stream = u32::from(choices.byte() % 12);
        let flags = choices.byte();
        match choices.below(16) {
            0..=3 => {
                let request = b"\x83\x86\x84\x41\x03web";
                let more = choices.bytes();
                push(HEADERS, flags & 5 | 4, stream | 1, &[request, more].concat());
            }
            4..=6 => push(DATA, flags & 1, stream | 1, choices.bytes()),
            7 => push(DATA, flags & 9 | 8, stream | 1, choices.bytes()),
            8 => push(HEADERS, flags, stream, choices.bytes()),
            9 => push(CONTINUATION, flags, stream, choices.bytes()),
            10 => push(RST_STREAM, 0, stream | 1, &[0, 0, 0, choices.byte()]),
            11 => push(WINDOW_UPDATE, 0, stream, &[flags & 0x80, 0, choices.byte(), flags]),
            12 => push(PING, flags & 1, 0, &[choices.byte(); 8]),
            13 => push(SETTINGS, 0, 0, &[0, choices.byte() % 8, flags & 0x80, 0, flags, choices.byte()]),
            14 => push(GOAWAY, 0, 0, &[0, 0, 0, 1, 0, 0, 0, choices.byte()]),
            _ => push(choices.byte(), flags, stream, choices.bytes()),
        }
    }
    said.extend_from_slice(choices.bytes());
    said
}

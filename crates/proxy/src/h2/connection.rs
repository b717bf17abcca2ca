//! The state of one connection, and what each frame does to it (RFC 9113, sections 5 and 6).

use super::frame::{
    self, ACK, Code, END_HEADERS, END_STREAM, Header, Kind, MAX_PAYLOAD, MAX_WINDOW, PADDED, PRIORITY, setting,
};
use super::head::{self, Part, Reader, Refused};
use super::hpack::{Decoder, Encoder, TABLE_SIZE};
use super::output::Output;
use super::patience::{self, Patience};
use super::stream::{Broken, By, Reset, Stream};
use super::{
    CONNECTION_WINDOW, Error, GROWTH, MAX_HEADS, MAX_STREAM_WINDOW, MAX_STREAMS, MAX_WAITING, STALLED_INTERVALS,
    STREAM_WINDOW,
};
use bytes::{Buf, Bytes, BytesMut};
use http::StatusCode;
use sheer_core::head::{Fields, MAX_HEAD_BYTES, RequestHead, ResponseHead};
use slab::Slab;
use std::collections::{HashMap, VecDeque};
use std::task::Waker;

/// The most frames in which one field block comes.
const MAX_FRAGMENTS: usize = 64;

/// Interim answers to one request (as HTTP/1 bounds them).
const MAX_INTERIM: usize = 32;

/// Streams that we have reset and of which late frames are ignored, since their sender could not know.
const REMEMBERED: usize = 256;

/// Streams beyond which a client's connection is not used any more.
const LAST_STREAM: u32 = 1 << 30;

const ALIVE: [u8; 8] = *b"sh alive";
const LEAVING: [u8; 8] = *b"sh leave";

/// Which side of the connection this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Server,
    Client,
}

/// A request that has come.
#[derive(Debug)]
pub(super) struct Accepted {
    pub(super) key: usize,
    /// Its head, or why it is answered without being looked at.
    pub(super) head: Result<RequestHead, Refused>,
    /// No body follows.
    pub(super) ended: bool,
}

/// A field block of which not all frames have come.
#[derive(Debug)]
struct Block {
    stream: u32,
    flags: u8,
    bytes: BytesMut,
    fragments: usize,
}

/// How far leaving has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    No,
    /// The peer was told to open no more streams; those on their way are still taken.
    Announced,
    /// Streams after the last one that had come are ignored.
    Told,
}

/// What the peer's SETTINGS say.
#[derive(Debug)]
struct Peer {
    initial_window: u32,
    max_streams: usize,
}

/// The state of one connection.
#[derive(Debug)]
pub(super) struct State {
    role: Role,
    streams: Slab<Stream>,
    by_id: HashMap<u32, usize, foldhash::fast::RandomState>,
    /// The last stream that the client has opened.
    last: u32,
    decoder: Decoder,
    encoder: Encoder,
    block: Option<Block>,
    /// Memory in which heads are read.
    raw: Vec<u8>,
    peer: Peer,
    greeted: bool,
    /// What the peer may still send on the connection, and what it is to get back.
    window: i64,
    unreleased: u32,
    /// Bytes that wait for readers.
    waiting: usize,
    /// What streams may send beyond their first windows.
    growth: u32,
    /// What the heads of open streams take up.
    heads: usize,
    /// What we may still send on the connection.
    pub(super) send_window: i64,
    pub(super) out: Output,
    /// Streams that wait for the connection's window or for what is to be written.
    queue: VecDeque<usize>,
    /// Who waits until there may be another stream.
    slots: VecDeque<Waker>,
    driver: Option<Waker>,
    patience: Patience,
    leaving: Leaving,
    /// The peer takes no more streams.
    peer_leaves: bool,
    /// Nobody will ask for another stream.
    abandoned: bool,
    /// The connection is over.
    closed: bool,
    /// A ping that asks whether the peer lives has no answer yet.
    asked: bool,
    reset_by_us: VecDeque<u32>,
    pub(super) accepted: VecDeque<Accepted>,
    /// Requests that were malformed, to be counted.
    pub(super) malformed: usize,
}

impl State {
    pub(super) fn new(role: Role) -> Self {
        let mut out = Output::default();
        let tail = out.tail();
        let settings =
            [(setting::MAX_CONCURRENT_STREAMS, MAX_STREAMS), (setting::MAX_HEADER_LIST_SIZE, MAX_HEAD_BYTES as u32)];
        match role {
            Role::Server => frame::settings(&settings, tail),
            Role::Client => {
                tail.extend_from_slice(frame::PREFACE);
                frame::settings(&[(setting::ENABLE_PUSH, 0), settings[1]], tail);
            }
        }
        frame::window_update(0, CONNECTION_WINDOW - STREAM_WINDOW, tail);
        Self {
            role,
            streams: Slab::new(),
            by_id: HashMap::default(),
            last: 0,
            decoder: Decoder::new(),
            encoder: Encoder::new(),
            block: None,
            raw: Vec::new(),
            peer: Peer { initial_window: STREAM_WINDOW, max_streams: usize::MAX },
            greeted: false,
            window: i64::from(CONNECTION_WINDOW),
            unreleased: 0,
            waiting: 0,
            growth: 0,
            heads: 0,
            send_window: i64::from(STREAM_WINDOW),
            out,
            queue: VecDeque::new(),
            slots: VecDeque::new(),
            driver: None,
            patience: Patience::new(),
            leaving: Leaving::No,
            peer_leaves: false,
            abandoned: false,
            closed: false,
            asked: false,
            reset_by_us: VecDeque::new(),
            accepted: VecDeque::new(),
            malformed: 0,
        }
    }

    // ---- What the peer sends.

    /// Takes one whole frame, whose payload the buffer begins with.
    ///
    /// # Errors
    /// The connection cannot go on.
    pub(super) fn frame(&mut self, header: Header, buffer: &mut BytesMut) -> Result<(), Error> {
        if !self.greeted && (header.kind != Kind::Settings || header.has(ACK)) {
            return Err(Error::protocol("the first frame is not SETTINGS"));
        }
        let continues = self.block.as_ref().map(|block| block.stream);
        if continues.is_some_and(|stream| header.kind != Kind::Continuation || header.stream != stream) {
            return Err(Error::protocol("a field block is interrupted"));
        }
        if header.kind == Kind::Data {
            return self.data(header, buffer);
        }
        let payload = &buffer[..header.length];
        match header.kind {
            Kind::Headers => self.headers(header, payload)?,
            Kind::Continuation => self.continuation(header, payload)?,
            Kind::Priority => self.priority(header, payload)?,
            Kind::RstStream => self.rst_stream(header, payload)?,
            Kind::Settings => self.settings(header, payload)?,
            Kind::PushPromise => return Err(Error::protocol("PUSH_PROMISE without leave")),
            Kind::Ping => self.ping(header, payload)?,
            Kind::GoAway => self.go_away(header, payload)?,
            Kind::WindowUpdate => self.window_update(header, payload)?,
            Kind::Data | Kind::Unknown => self.patience.pay(patience::CONTROL)?,
        }
        buffer.advance(header.length);
        Ok(())
    }

    fn data(&mut self, header: Header, buffer: &mut BytesMut) -> Result<(), Error> {
        self.check_not_idle(header.stream)?;
        let length = header.length;
        if length as i64 > self.window {
            return Err(Error::Protocol {
                code: Code::FLOW_CONTROL_ERROR,
                detail: "more than the window has room for",
            });
        }
        self.window -= length as i64;
        let ends = header.has(END_STREAM);
        let padding = match header.has(PADDED) {
            true if length == 0 => return Err(FRAME_SIZE),
            true => 1 + usize::from(buffer[0]),
            false => 0,
        };
        if padding > length {
            return Err(Error::protocol("padding longer than its frame"));
        }
        let size = length - padding;
        if size == 0 && !ends {
            self.patience.pay(patience::CONTROL)?;
        }
        let Some(key) = self.by_id.get(&header.stream).copied() else {
            buffer.advance(length);
            self.release(length as u32);
            return if self.is_remembered(header.stream) {
                Ok(())
            } else {
                self.mistake(header.stream, Code::STREAM_CLOSED)
            };
        };
        let Stream { receiving, reset, .. } = &mut self.streams[key];
        if reset.is_some() {
            buffer.advance(length);
            self.release(length as u32);
            return Ok(());
        }
        let mistake = match receiving.remaining {
            _ if !receiving.open => Some(Code::STREAM_CLOSED),
            _ if self.role == Role::Client && !receiving.has_head => Some(Code::PROTOCOL_ERROR),
            _ if length as i64 > receiving.window => Some(Code::FLOW_CONTROL_ERROR),
            _ if receiving.bodiless && size > 0 => Some(Code::PROTOCOL_ERROR),
            Some(left) if size as u64 > left || ends && (size as u64) < left => Some(Code::PROTOCOL_ERROR),
            _ => None,
        };
        if let Some(code) = mistake {
            buffer.advance(length);
            self.release(length as u32);
            return self.mistake(header.stream, code);
        }
        if let Some(left) = &mut receiving.remaining {
            *left -= size as u64;
        }
        receiving.window -= length as i64;
        // Padding is taken at once.
        receiving.unreleased += padding as u32;
        if receiving.discarded {
            buffer.advance(length);
        } else {
            buffer.advance(padding.min(1));
            if size > 0 {
                receiving.keep(buffer, size);
                self.waiting += size;
            }
            buffer.advance(padding.saturating_sub(1));
        }
        receiving.wake();
        if ends {
            receiving.open = false;
            self.may_be_over(key);
        }
        self.release(length as u32);
        Ok(())
    }

    fn headers(&mut self, header: Header, payload: &[u8]) -> Result<(), Error> {
        self.check_id(header.stream)?;
        let mut fragment = payload;
        if header.has(PADDED) {
            let (padding, rest) = fragment.split_first().ok_or(FRAME_SIZE)?;
            let length = rest.len().checked_sub(usize::from(*padding));
            fragment = &rest[..length.ok_or(Error::protocol("padding longer than its frame"))?];
        }
        let mut flags = header.flags & (END_STREAM | END_HEADERS);
        if header.has(PRIORITY) {
            let (priority, rest) = fragment.split_first_chunk::<5>().ok_or(FRAME_SIZE)?;
            // Remembered in the flags until the block can be read.
            flags |= if depends_on(priority) == header.stream { PRIORITY } else { 0 };
            fragment = rest;
        }
        if flags & END_HEADERS != 0 {
            return self.block(header.stream, flags, fragment);
        }
        self.block = Some(Block { stream: header.stream, flags, bytes: BytesMut::from(fragment), fragments: 1 });
        Ok(())
    }

    fn continuation(&mut self, header: Header, payload: &[u8]) -> Result<(), Error> {
        let Some(mut block) = self.block.take() else {
            return Err(Error::protocol("CONTINUATION of nothing"));
        };
        block.fragments += 1;
        if block.fragments > MAX_FRAGMENTS || block.bytes.len() + payload.len() > MAX_HEAD_BYTES {
            return Err(Error::Protocol { code: Code::ENHANCE_YOUR_CALM, detail: "a field block without end" });
        }
        block.bytes.extend_from_slice(payload);
        if header.has(END_HEADERS) {
            return self.block(block.stream, block.flags, &block.bytes);
        }
        self.block = Some(block);
        Ok(())
    }

    /// A whole field block. It is decompressed in any case: what follows on the connection builds on it.
    fn block(&mut self, id: u32, flags: u8, block: &[u8]) -> Result<(), Error> {
        let key = self.by_id.get(&id).copied();
        let is_new = self.role == Role::Server && id > self.last;
        let part = match key.map(|key| &self.streams[key].receiving) {
            _ if is_new => Part::Request,
            Some(receiving) if self.role == Role::Client && !receiving.has_head => Part::Response,
            _ => Part::Trailers,
        };
        let mut raw = std::mem::take(&mut self.raw);
        let mut reader = Reader::new(part, &mut raw);
        self.decoder
            .decode(block, |field| reader.field(field))
            .map_err(|error| Error::Protocol { code: Code::COMPRESSION_ERROR, detail: error.0 })?;
        let ends = flags & END_STREAM != 0;
        let done = if flags & PRIORITY != 0 {
            self.last = if is_new { id } else { self.last };
            self.mistake(id, Code::PROTOCOL_ERROR)
        } else {
            match (part, key) {
                (Part::Request, _) => self.request(id, reader, ends),
                (Part::Response, Some(key)) => self.response(key, reader, ends),
                (_, Some(key)) => self.trailers(key, reader, ends),
                (_, None) if self.is_remembered(id) => Ok(()),
                (_, None) if self.role == Role::Client && id >= self.next() => {
                    Err(Error::protocol("a stream that nobody opened"))
                }
                // Its own end has come before.
                (_, None) => Err(Error::Protocol { code: Code::STREAM_CLOSED, detail: "HEADERS after the end" }),
            }
        };
        raw.clear();
        raw.shrink_to(RAW);
        self.raw = raw;
        done
    }

    fn request(&mut self, id: u32, mut reader: Reader<'_>, ends: bool) -> Result<(), Error> {
        self.last = id;
        if matches!(self.leaving, Leaving::Told) {
            // The peer learns from the GOAWAY that it was not looked at.
            self.remember(id);
            return Ok(());
        }
        // Those whose tasks have yet to learn that they were reset count as well.
        if self.streams.len() >= MAX_STREAMS as usize || self.heads + reader.size() > MAX_HEADS {
            return self.mistake(id, Code::REFUSED_STREAM);
        }
        let (head_size, length) = (reader.size(), reader.length());
        let head = match reader.request() {
            Ok(_) if ends && length.is_some_and(|length| length > 0) => {
                Err(Refused::Malformed("a body was promised and none comes"))
            }
            head => head,
        };
        if let Err(Refused::Malformed(_)) = head {
            self.malformed += 1;
            return self.mistake(id, Code::PROTOCOL_ERROR);
        }
        let mut stream = Stream::new(id, i64::from(self.peer.initial_window));
        stream.head_size = head_size;
        stream.receiving.open = !ends;
        stream.receiving.remaining = length;
        let key = self.insert(stream);
        self.accepted.push_back(Accepted { key, head, ended: ends });
        Ok(())
    }

    fn response(&mut self, key: usize, mut reader: Reader<'_>, ends: bool) -> Result<(), Error> {
        let stream = &mut self.streams[key];
        let id = stream.id;
        if stream.reset.is_some() {
            return Ok(());
        }
        let Ok(head) = reader.response() else { return self.mistake(id, Code::PROTOCOL_ERROR) };
        let receiving = &mut stream.receiving;
        if head.status.is_informational() {
            receiving.interims += 1;
            if ends || receiving.interims > MAX_INTERIM {
                return self.mistake(id, Code::PROTOCOL_ERROR);
            }
            receiving.interim.push(head);
            receiving.wake();
            return Ok(());
        }
        receiving.bodiless |= matches!(head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
        receiving.remaining = if receiving.bodiless { None } else { reader.length() };
        if ends && receiving.remaining.is_some_and(|length| length > 0) {
            return self.mistake(id, Code::PROTOCOL_ERROR);
        }
        receiving.has_head = true;
        receiving.head = Some(head);
        receiving.open = !ends;
        receiving.wake();
        stream.head_size = reader.size();
        self.heads += reader.size();
        if ends {
            self.may_be_over(key);
        }
        Ok(())
    }

    fn trailers(&mut self, key: usize, mut reader: Reader<'_>, ends: bool) -> Result<(), Error> {
        let stream = &mut self.streams[key];
        let id = stream.id;
        if stream.reset.is_some() {
            return Ok(());
        }
        if !stream.receiving.open {
            return self.mistake(id, Code::STREAM_CLOSED);
        }
        let trailers = reader.trailers();
        let cut_short = stream.receiving.remaining.is_some_and(|left| left > 0);
        match trailers {
            Ok(fields) if ends && !cut_short => {
                let receiving = &mut stream.receiving;
                receiving.trailers = (!fields.is_empty() && !receiving.discarded).then_some(fields);
                receiving.open = false;
                receiving.wake();
                stream.head_size += reader.size();
                self.heads += reader.size();
                self.may_be_over(key);
                Ok(())
            }
            _ => self.mistake(id, Code::PROTOCOL_ERROR),
        }
    }

    fn priority(&mut self, header: Header, payload: &[u8]) -> Result<(), Error> {
        if header.stream == 0 {
            return Err(Error::protocol("PRIORITY of the connection"));
        }
        self.patience.pay(patience::CONTROL)?;
        let priority = payload.first_chunk::<5>().filter(|_| payload.len() == 5).ok_or(FRAME_SIZE)?;
        if depends_on(priority) == header.stream {
            return match self.is_idle(header.stream) {
                true => Err(Error::protocol("a stream that depends on itself")),
                false => self.mistake(header.stream, Code::PROTOCOL_ERROR),
            };
        }
        Ok(())
    }

    fn rst_stream(&mut self, header: Header, payload: &[u8]) -> Result<(), Error> {
        let code = Code(number(payload)?);
        self.check_not_idle(header.stream)?;
        let Some(key) = self.by_id.get(&header.stream).copied() else {
            return self.patience.pay(patience::CONTROL);
        };
        let stream = &mut self.streams[key];
        let unanswered = self.role == Role::Server && stream.sending.open;
        self.patience.pay(if unanswered { patience::RESET } else { patience::CONTROL })?;
        if stream.reset.is_some() {
            return Ok(());
        }
        let complete = !stream.receiving.open;
        if complete && self.role == Role::Client {
            // The answer is complete; the rest of the request is not wanted (section 8.1).
            stream.sending.open = false;
            stream.sending.wake();
        } else {
            self.end(key, Reset { code, by: By::Peer });
        }
        self.may_be_over(key);
        Ok(())
    }

    fn settings(&mut self, header: Header, payload: &[u8]) -> Result<(), Error> {
        if header.stream != 0 {
            return Err(Error::protocol("SETTINGS of a stream"));
        }
        if header.has(ACK) {
            return if payload.is_empty() { Ok(()) } else { Err(FRAME_SIZE) };
        }
        let (settings, []) = payload.as_chunks::<6>() else { return Err(FRAME_SIZE) };
        if std::mem::replace(&mut self.greeted, true) {
            self.patience.pay(patience::CONTROL)?;
        }
        for [n1, n0, v3, v2, v1, v0] in settings {
            self.setting(u16::from_be_bytes([*n1, *n0]), u32::from_be_bytes([*v3, *v2, *v1, *v0]))?;
        }
        frame::settings_ack(self.out.tail());
        Ok(())
    }

    fn setting(&mut self, name: u16, value: u32) -> Result<(), Error> {
        match name {
            setting::HEADER_TABLE_SIZE => self.encoder.resize(value as usize),
            setting::ENABLE_PUSH if value > 1 || value == 1 && self.role == Role::Client => {
                return Err(Error::protocol("bad ENABLE_PUSH"));
            }
            setting::MAX_CONCURRENT_STREAMS => {
                self.peer.max_streams = value as usize;
                self.wake_slots();
            }
            setting::INITIAL_WINDOW_SIZE => {
                if i64::from(value) > MAX_WINDOW {
                    return Err(TOO_LARGE_A_WINDOW);
                }
                let change = i64::from(value) - i64::from(self.peer.initial_window);
                self.peer.initial_window = value;
                for (_, stream) in &mut self.streams {
                    stream.sending.window += change;
                    if stream.sending.window > MAX_WINDOW {
                        return Err(TOO_LARGE_A_WINDOW);
                    }
                    if stream.sending.window > 0 {
                        stream.sending.wake();
                    }
                }
            }
            setting::MAX_FRAME_SIZE if !(MAX_PAYLOAD..=0xff_ffff).contains(&(value as usize)) => {
                return Err(Error::protocol("bad MAX_FRAME_SIZE"));
            }
            _ => {}
        }
        Ok(())
    }

    fn ping(&mut self, header: Header, payload: &[u8]) -> Result<(), Error> {
        if header.stream != 0 {
            return Err(Error::protocol("PING of a stream"));
        }
        let payload: [u8; 8] = payload.try_into().map_err(|_| FRAME_SIZE)?;
        if !header.has(ACK) {
            self.patience.pay(patience::CONTROL)?;
            frame::ping(payload, true, self.out.tail());
            return Ok(());
        }
        match payload {
            ALIVE => self.asked = false,
            LEAVING => self.leave_now(),
            _ => self.patience.pay(patience::CONTROL)?,
        }
        Ok(())
    }

    fn go_away(&mut self, header: Header, payload: &[u8]) -> Result<(), Error> {
        if header.stream != 0 {
            return Err(Error::protocol("GOAWAY of a stream"));
        }
        let (last, rest) = payload.split_first_chunk::<4>().ok_or(FRAME_SIZE)?;
        let code = Code(rest.first_chunk::<4>().map(|code| u32::from_be_bytes(*code)).ok_or(FRAME_SIZE)?);
        let last = u32::from_be_bytes(*last) & 0x7fff_ffff;
        self.patience.pay(patience::CONTROL)?;
        self.peer_leaves = true;
        self.wake_slots();
        if self.role == Role::Client {
            let unprocessed: Vec<usize> =
                self.streams.iter().filter(|(_, stream)| stream.id > last).map(|(key, _)| key).collect();
            for key in unprocessed {
                self.end(key, Reset { code, by: By::Unprocessed });
            }
        }
        Ok(())
    }

    fn window_update(&mut self, header: Header, payload: &[u8]) -> Result<(), Error> {
        let increment = i64::from(number(payload)? & 0x7fff_ffff);
        self.patience.pay(patience::CONTROL)?;
        if header.stream == 0 {
            self.send_window += increment;
            if increment == 0 {
                return Err(Error::protocol("a window opened by nothing"));
            }
            if self.send_window > MAX_WINDOW {
                return Err(TOO_LARGE_A_WINDOW);
            }
            self.wake_queue();
            return Ok(());
        }
        self.check_not_idle(header.stream)?;
        let Some(key) = self.by_id.get(&header.stream).copied() else { return Ok(()) };
        if increment == 0 {
            return self.mistake(header.stream, Code::PROTOCOL_ERROR);
        }
        let sending = &mut self.streams[key].sending;
        sending.window += increment;
        if sending.window > MAX_WINDOW {
            return self.mistake(header.stream, Code::FLOW_CONTROL_ERROR);
        }
        if sending.window > 0 {
            sending.wake();
        }
        Ok(())
    }

    /// A stream is reset for its peer's mistake.
    fn mistake(&mut self, id: u32, code: Code) -> Result<(), Error> {
        self.patience.pay(patience::MISTAKE)?;
        if let Some(key) = self.by_id.get(&id).copied() {
            self.reset(key, code);
        } else {
            frame::reset(id, code, self.out.tail());
            self.remember(id);
        }
        Ok(())
    }

    fn check_id(&self, id: u32) -> Result<(), Error> {
        // No stream is ever opened by a server here: pushes are not admitted.
        if id % 2 == 0 { Err(Error::protocol("a stream that no client opens")) } else { Ok(()) }
    }

    fn check_not_idle(&self, id: u32) -> Result<(), Error> {
        if self.is_idle(id) { Err(Error::protocol("a stream that nobody opened")) } else { Ok(()) }
    }

    fn is_idle(&self, id: u32) -> bool {
        id % 2 == 0 || id > self.last
    }

    fn is_remembered(&self, id: u32) -> bool {
        // What has been forgotten is older than what is remembered.
        self.reset_by_us.contains(&id) || self.reset_by_us.len() == REMEMBERED && Some(&id) < self.reset_by_us.front()
    }

    fn remember(&mut self, id: u32) {
        if self.reset_by_us.len() == REMEMBERED {
            self.reset_by_us.pop_front();
        }
        self.reset_by_us.push_back(id);
    }

    /// Gives bytes back to the connection's window, however slow their reader: only its stream waits for it, unless
    /// too much waits already.
    fn release(&mut self, length: u32) {
        self.unreleased += length;
        if self.unreleased >= CONNECTION_WINDOW / 2 && self.waiting <= MAX_WAITING {
            self.window += i64::from(self.unreleased);
            frame::window_update(0, std::mem::take(&mut self.unreleased), self.out.tail());
        }
    }

    // ---- What we send.

    /// The number of the next stream that we open.
    fn next(&self) -> u32 {
        if self.last == 0 { 1 } else { self.last + 2 }
    }

    /// True when another stream may be opened, now or when there is a slot.
    pub(super) fn is_open(&self) -> bool {
        !self.closed && !self.peer_leaves && self.last < LAST_STREAM
    }

    /// True when the peer admits another stream now.
    pub(super) fn has_slot(&self) -> bool {
        // Before its first word it admits what it will then say, which is more than a few as a rule.
        self.streams.len() < self.peer.max_streams.min(MAX_STREAMS as usize)
    }

    /// Remembers who waits for a slot.
    pub(super) fn wait_for_slot(&mut self, waker: &Waker) {
        self.slots.push_back(waker.clone());
    }

    /// Opens a stream with a request.
    pub(super) fn open(&mut self, head: &RequestHead, ends: bool) -> usize {
        let id = self.next();
        self.last = id;
        let mut stream = Stream::new(id, i64::from(self.peer.initial_window));
        stream.sending.open = !ends;
        stream.receiving.bodiless = head.method == http::Method::HEAD;
        let flags = if ends { END_STREAM } else { 0 };
        head::write_request(head, id, flags, &mut self.encoder, self.out.tail());
        self.touch();
        self.insert(stream)
    }

    pub(super) fn respond(&mut self, key: usize, head: &ResponseHead, ends: bool) -> Result<(), Broken> {
        let Stream { id, sending, .. } = &mut self.streams[key];
        if !sending.open {
            return Err(Broken);
        }
        let flags = if ends { END_STREAM } else { 0 };
        head::write_response(head, *id, flags, &mut self.encoder, self.out.tail());
        if ends {
            self.sent_all(key);
        }
        self.touch();
        Ok(())
    }

    /// Sends an interim answer, unless the stream is over.
    pub(super) fn respond_interim(&mut self, key: usize, head: &ResponseHead) {
        let Stream { id, sending, .. } = &self.streams[key];
        if sending.open {
            head::write_response(head, *id, 0, &mut self.encoder, self.out.tail());
            self.touch();
        }
    }

    pub(super) fn send_data(&mut self, key: usize, data: Bytes, ends: bool) {
        let Stream { id, sending, .. } = &mut self.streams[key];
        if !sending.open {
            return;
        }
        sending.window -= data.len() as i64;
        self.send_window -= data.len() as i64;
        let flags = if ends { END_STREAM } else { 0 };
        Header::write(data.len(), Kind::Data, flags, *id, self.out.tail());
        if !data.is_empty() {
            self.patience.earn();
        }
        self.out.push(data);
        if ends {
            self.sent_all(key);
        }
        self.touch();
    }

    pub(super) fn send_trailers(&mut self, key: usize, fields: &Fields) {
        let Stream { id, sending, .. } = &self.streams[key];
        if sending.open {
            head::write_trailers(fields, *id, &mut self.encoder, self.out.tail());
            self.sent_all(key);
            self.touch();
        }
    }

    fn sent_all(&mut self, key: usize) {
        self.streams[key].sending.open = false;
        if self.role == Role::Server {
            self.patience.earn();
        }
        self.may_be_over(key);
    }

    /// Ends a stream before its time, unless it has ended.
    pub(super) fn reset(&mut self, key: usize, code: Code) {
        let stream = &self.streams[key];
        if stream.reset.is_some() || !stream.sending.open && !stream.receiving.open {
            return;
        }
        let id = stream.id;
        frame::reset(id, code, self.out.tail());
        self.remember(id);
        self.end(key, Reset { code, by: By::Us });
        self.touch();
    }

    /// Nobody reads a stream any more. A response that nobody wants is cancelled; a request's answer may still be wanted.
    pub(super) fn stop_reading(&mut self, key: usize) {
        let dropped = self.streams[key].receiving.drop_parts();
        self.waiting -= dropped;
        self.release(0);
        self.touch();
        let receiving = &mut self.streams[key].receiving;
        receiving.discarded = true;
        receiving.trailers = None;
        if receiving.open && self.role == Role::Client {
            self.reset(key, Code::CANCEL);
        }
    }

    /// A reader has taken so much.
    pub(super) fn taken(&mut self, key: usize, length: usize) {
        self.waiting -= length;
        let id = self.streams[key].id;
        let receiving = &mut self.streams[key].receiving;
        receiving.unreleased += length as u32;
        if receiving.open && receiving.unreleased >= receiving.limit / 2 {
            let mut increment = std::mem::take(&mut receiving.unreleased);
            let larger = receiving.limit.saturating_mul(2).min(MAX_STREAM_WINDOW) - receiving.limit;
            // A reader that keeps up is limited by how far away its source is alone.
            if receiving.is_drained() && self.growth + larger <= GROWTH {
                self.growth += larger;
                receiving.limit += larger;
                increment += larger;
            }
            receiving.window += i64::from(increment);
            frame::window_update(id, increment, self.out.tail());
            self.touch();
        }
        if self.unreleased >= CONNECTION_WINDOW / 2 {
            self.release(0);
            self.touch();
        }
    }

    // ---- Streams.

    /// A stream of which somebody has hold.
    pub(super) fn stream(&mut self, key: usize) -> &mut Stream {
        &mut self.streams[key]
    }

    /// Streams that are open or still worked for.
    pub(super) fn streams(&self) -> usize {
        self.streams.len()
    }

    fn insert(&mut self, stream: Stream) -> usize {
        self.heads += stream.head_size;
        let id = stream.id;
        let key = self.streams.insert(stream);
        self.by_id.insert(id, key);
        key
    }

    /// One hold less.
    pub(super) fn let_go(&mut self, key: usize) {
        let stream = &mut self.streams[key];
        stream.handles -= 1;
        if stream.handles == 0 {
            let answered = self.role == Role::Server && !stream.sending.open;
            self.reset(key, if answered { Code::NO_ERROR } else { Code::CANCEL });
            self.may_be_over(key);
        }
    }

    /// Removes a stream that has ended in both directions and of which nobody has hold.
    fn may_be_over(&mut self, key: usize) {
        let stream = &self.streams[key];
        if stream.handles > 0 || stream.reset.is_none() && (stream.sending.open || stream.receiving.open) {
            return;
        }
        // A request that nobody has looked at yet.
        if self.accepted.iter().any(|accepted| accepted.key == key) {
            return;
        }
        let mut stream = self.streams.remove(key);
        self.by_id.remove(&stream.id);
        self.heads -= stream.head_size;
        self.growth -= stream.receiving.limit - STREAM_WINDOW;
        self.waiting -= stream.receiving.drop_parts();
        if let Some(waker) = self.slots.pop_front() {
            waker.wake();
        }
        if self.streams.is_empty() {
            self.touch();
        }
    }

    /// Ends a stream for everybody who works for it.
    fn end(&mut self, key: usize, reset: Reset) {
        let stream = &mut self.streams[key];
        stream.reset = Some(reset);
        stream.sending.open = false;
        stream.receiving.open = false;
        self.waiting -= stream.receiving.drop_parts();
        stream.wake();
    }

    pub(super) fn queue_for_room(&mut self, key: usize) {
        self.queue.push_back(key);
    }

    /// Wakes those who wait for the connection's window or for what is to be written, in their order.
    pub(super) fn wake_queue(&mut self) {
        if self.send_window <= 0 {
            return;
        }
        while let Some(key) = self.queue.pop_front() {
            if let Some(stream) = self.streams.get_mut(key) {
                stream.sending.queued = false;
                stream.sending.wake();
            }
        }
    }

    fn wake_slots(&mut self) {
        self.slots.drain(..).for_each(Waker::wake);
    }

    // ---- The connection's life.

    /// True when requests have come or were refused.
    pub(super) fn has_news(&self) -> bool {
        !self.accepted.is_empty() || self.malformed > 0
    }

    /// Something is to be written, or the driver has to look for another reason.
    pub(super) fn touch(&mut self) {
        if let Some(driver) = self.driver.take() {
            driver.wake();
        }
    }

    /// The driver has seen everything and waits.
    pub(super) fn driver_waits(&mut self, waker: &Waker) {
        self.driver = Some(waker.clone());
    }

    /// True when the peer has said its SETTINGS.
    pub(super) fn is_greeted(&self) -> bool {
        self.greeted
    }

    /// Asks the peer to open no more streams, and lets those come that are on their way.
    pub(super) fn leave(&mut self) {
        if self.leaving == Leaving::No {
            self.leaving = Leaving::Announced;
            let out = self.out.tail();
            frame::go_away(MAX_WINDOW as u32, Code::NO_ERROR, out);
            frame::ping(LEAVING, false, out);
            self.touch();
        }
    }

    /// Takes no stream after those that have come.
    fn leave_now(&mut self) {
        if self.leaving == Leaving::Announced {
            self.leaving = Leaving::Told;
            frame::go_away(self.last, Code::NO_ERROR, self.out.tail());
        }
    }

    /// Nobody will open another stream.
    pub(super) fn abandon(&mut self) {
        self.abandoned = true;
        self.touch();
    }

    /// True when nothing can happen any more but writing what is left.
    pub(super) fn is_done(&mut self) -> bool {
        let unused = self.streams.is_empty() && self.accepted.is_empty();
        if unused && self.role == Role::Client && self.abandoned && self.leaving == Leaving::No {
            self.leaving = Leaving::Told;
            frame::go_away(0, Code::NO_ERROR, self.out.tail());
        }
        let leaving = matches!(self.leaving, Leaving::Told) || self.role == Role::Client && self.peer_leaves;
        self.closed || unused && leaving
    }

    /// Ends the connection and everything on it.
    pub(super) fn close(&mut self, error: &Error) {
        if std::mem::replace(&mut self.closed, true) {
            return;
        }
        let code = match error {
            Error::Protocol { code, .. } => *code,
            Error::Ended(code) => *code,
            Error::Io(_) | Error::Silent | Error::Closed => Code::NO_ERROR,
        };
        if let Error::Protocol { code, .. } = error {
            let last = if self.role == Role::Server { self.last } else { 0 };
            frame::go_away(last, *code, self.out.tail());
        }
        let keys: Vec<usize> = self.streams.iter().map(|(key, _)| key).collect();
        for key in keys {
            let stream = &mut self.streams[key];
            if stream.reset.is_none() && (stream.sending.open || stream.receiving.open) {
                self.end(key, Reset { code, by: By::Connection });
            }
        }
        self.wake_slots();
        self.touch();
    }

    /// Once an interval, while there are streams. False when the peer did not answer the last time.
    pub(super) fn beat(&mut self, heard: bool) -> bool {
        if std::mem::replace(&mut self.asked, true) && !heard {
            return false;
        }
        let stalled: Vec<usize> = self
            .streams
            .iter_mut()
            .filter(|(_, stream)| stream.sending.waits && stream.sending.open)
            .filter_map(|(key, stream)| {
                stream.sending.stalled += 1;
                (stream.sending.stalled >= STALLED_INTERVALS).then_some(key)
            })
            .collect();
        for key in stalled {
            self.reset(key, Code::CANCEL);
        }
        self.leave_now();
        frame::ping(ALIVE, false, self.out.tail());
        self.touch();
        true
    }
}

/// What a connection keeps of the memory in which it reads heads.
const RAW: usize = 1024;

const FRAME_SIZE: Error = Error::Protocol { code: Code::FRAME_SIZE_ERROR, detail: "a frame of the wrong size" };

const TOO_LARGE_A_WINDOW: Error =
    Error::Protocol { code: Code::FLOW_CONTROL_ERROR, detail: "a window larger than there may be" };

fn number(payload: &[u8]) -> Result<u32, Error> {
    payload.try_into().map(u32::from_be_bytes).map_err(|_| FRAME_SIZE)
}

fn depends_on([s3, s2, s1, s0, _]: &[u8; 5]) -> u32 {
    u32::from_be_bytes([s3 & 0x7f, *s2, *s1, *s0])
}

const _: () = assert!(TABLE_SIZE == 4096, "the peer is not told another size of our table");

//! What each frame does to its connection (RFC 9113, section 6).

use super::{ALIVE, Accepted, Block, LEAVING, Leaving, REMEMBERED, Role, State};
use crate::h2::frame::{
    self, ACK, Code, END_HEADERS, END_STREAM, Header, Kind, MAX_PAYLOAD, MAX_WINDOW, PADDED, PRIORITY, setting,
};
use crate::h2::head::{Part, Reader, Refused};
use crate::h2::patience;
use crate::h2::stream::{By, Reset, Stream};
use crate::h2::{DEFAULT_WINDOW, Error, MAX_HEADS, MAX_STREAMS, SHARE_OF_HEADS};
use bytes::{Buf, BytesMut};
use http::StatusCode;
use sheer_core::head::MAX_HEAD_BYTES;

/// The most frames in which one field block comes.
const MAX_FRAGMENTS: usize = 64;

/// Interim answers to one request (as HTTP/1 bounds them).
const MAX_INTERIM: usize = 32;

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

impl State {
    /// Takes one whole frame, whose payload the buffer begins with.
    ///
    /// # Errors
    /// The connection cannot go on.
    pub(in crate::h2) fn frame(&mut self, header: Header, buffer: &mut BytesMut) -> Result<(), Error> {
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
        let Stream { receiving, reset, moved, .. } = &mut self.streams[key];
        if let Some(reset) = reset {
            let known = reset.by != By::Peer;
            buffer.advance(length);
            self.release(length as u32);
            return if known { Ok(()) } else { self.mistake(header.stream, Code::STREAM_CLOSED) };
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
        *moved += size as u64;
        if self.role == Role::Client && size > 0 {
            // The peer counts it as well.
            self.asked_in_vain.earn();
        }
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
        let mut reader = Reader::new(part, self.role == Role::Server, &mut raw);
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
                // Its own end has come before.
                (_, None) if self.ended.contains(&id) => {
                    Err(Error::Protocol { code: Code::STREAM_CLOSED, detail: "HEADERS after the end" })
                }
                (_, None) => Err(Error::protocol("a stream that nobody opened")),
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
        let admitted = MAX_HEADS + self.streams.len() * SHARE_OF_HEADS;
        if self.streams.len() >= MAX_STREAMS as usize || self.heads + reader.size() > admitted {
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
        let mut stream = self.new_stream(id);
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
        match stream.reset {
            Some(reset) if reset.by == By::Peer => return self.mistake(id, Code::STREAM_CLOSED),
            Some(_) => return Ok(()),
            None if !stream.receiving.open => return self.mistake(id, Code::STREAM_CLOSED),
            None => {}
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
            if !payload.is_empty() {
                return Err(FRAME_SIZE);
            }
            if !std::mem::replace(&mut self.acknowledged, true) {
                // From here on it keeps to our windows, and what it has sent before counts.
                for (_, stream) in &mut self.streams {
                    stream.receiving.window -= i64::from(DEFAULT_WINDOW - self.role.first_window());
                }
            }
            return Ok(());
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
        // One comes with many a request, whose peer wants more of its answer than it does as a rule.
        let key = self.by_id.get(&header.stream).copied();
        if key.is_none_or(|key| std::mem::replace(&mut self.streams[key].sending.widened, true)) {
            self.patience.pay(patience::CONTROL)?;
        }
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
        let Some(key) = key else { return Ok(()) };
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
        match self.by_id.get(&id).copied() {
            Some(key) if self.streams[key].reset.is_none() => {
                frame::reset(id, code, self.out.tail());
                self.remember(id);
                self.end(key, Reset { code, by: By::Us });
                self.may_be_over(key);
            }
            Some(_) => frame::reset(id, code, self.out.tail()),
            None => {
                frame::reset(id, code, self.out.tail());
                self.remember(id);
            }
        }
        Ok(())
    }

    fn check_id(&self, id: u32) -> Result<(), Error> {
        // No stream is ever opened by a server here: pushes are not admitted.
        if id.is_multiple_of(2) { Err(Error::protocol("a stream that no client opens")) } else { Ok(()) }
    }

    fn check_not_idle(&self, id: u32) -> Result<(), Error> {
        if self.is_idle(id) { Err(Error::protocol("a stream that nobody opened")) } else { Ok(()) }
    }

    fn is_idle(&self, id: u32) -> bool {
        id.is_multiple_of(2) || id > self.last
    }

    fn is_remembered(&self, id: u32) -> bool {
        if self.owed.iter().any(|(owed, _)| *owed == id) {
            return true;
        }
        // What has been forgotten is older than what is remembered.
        self.reset_by_us.contains(&id) || self.reset_by_us.len() == REMEMBERED && Some(&id) < self.reset_by_us.front()
    }

    pub(super) fn remember(&mut self, id: u32) {
        if self.reset_by_us.len() == REMEMBERED {
            self.reset_by_us.pop_front();
        }
        self.reset_by_us.push_back(id);
    }
}

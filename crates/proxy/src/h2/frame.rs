//! Frames (RFC 9113, section 4 and 6).

use bytes::{BufMut, BytesMut};
use std::fmt;

/// The length of a frame's header.
pub(super) const HEADER: usize = 9;

/// The largest payload that we accept and send: what every peer accepts.
pub(super) const MAX_PAYLOAD: usize = 16_384;

/// The first bytes of a client (section 3.4).
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The largest window (section 6.9.1).
pub(super) const MAX_WINDOW: i64 = (1 << 31) - 1;

/// The type of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Data,
    Headers,
    Priority,
    RstStream,
    Settings,
    PushPromise,
    Ping,
    GoAway,
    WindowUpdate,
    Continuation,
    /// To be ignored (section 5.5).
    Unknown,
}

impl Kind {
    fn of(code: u8) -> Self {
        const KINDS: [Kind; 10] = [
            Kind::Data,
            Kind::Headers,
            Kind::Priority,
            Kind::RstStream,
            Kind::Settings,
            Kind::PushPromise,
            Kind::Ping,
            Kind::GoAway,
            Kind::WindowUpdate,
            Kind::Continuation,
        ];
        KINDS.get(usize::from(code)).copied().unwrap_or(Kind::Unknown)
    }
}

pub(super) const END_STREAM: u8 = 0x1;
pub(super) const ACK: u8 = 0x1;
pub(super) const END_HEADERS: u8 = 0x4;
pub(super) const PADDED: u8 = 0x8;
pub(super) const PRIORITY: u8 = 0x20;

/// A frame's header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    pub(super) length: usize,
    pub(super) kind: Kind,
    pub(super) flags: u8,
    pub(super) stream: u32,
}

impl Header {
    /// The header that these bytes begin with; `None` while they are too few.
    pub(super) fn of(bytes: &[u8]) -> Option<Self> {
        let [l2, l1, l0, kind, flags, s3, s2, s1, s0] = *bytes.first_chunk::<HEADER>()?;
        Some(Self {
            length: u32::from_be_bytes([0, l2, l1, l0]) as usize,
            kind: Kind::of(kind),
            flags,
            stream: u32::from_be_bytes([s3 & 0x7f, s2, s1, s0]),
        })
    }

    pub(super) fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// Appends it. A kind that is unknown cannot be sent.
    pub(super) fn write(length: usize, kind: Kind, flags: u8, stream: u32, out: &mut BytesMut) {
        let [_, l2, l1, l0] = (length as u32).to_be_bytes();
        let [s3, s2, s1, s0] = stream.to_be_bytes();
        out.extend_from_slice(&[l2, l1, l0, kind as u8, flags, s3, s2, s1, s0]);
    }
}

/// A code that says why a stream or a connection ends (section 7).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Code(pub u32);

#[allow(missing_docs, reason = "each is named after its code")]
impl Code {
    pub const NO_ERROR: Code = Code(0);
    pub const PROTOCOL_ERROR: Code = Code(1);
    pub const INTERNAL_ERROR: Code = Code(2);
    pub const FLOW_CONTROL_ERROR: Code = Code(3);
    pub const SETTINGS_TIMEOUT: Code = Code(4);
    pub const STREAM_CLOSED: Code = Code(5);
    pub const FRAME_SIZE_ERROR: Code = Code(6);
    pub const REFUSED_STREAM: Code = Code(7);
    pub const CANCEL: Code = Code(8);
    pub const COMPRESSION_ERROR: Code = Code(9);
    pub const CONNECT_ERROR: Code = Code(10);
    pub const ENHANCE_YOUR_CALM: Code = Code(11);
    pub const INADEQUATE_SECURITY: Code = Code(12);
    pub const HTTP_1_1_REQUIRED: Code = Code(13);
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 14] = [
            "NO_ERROR",
            "PROTOCOL_ERROR",
            "INTERNAL_ERROR",
            "FLOW_CONTROL_ERROR",
            "SETTINGS_TIMEOUT",
            "STREAM_CLOSED",
            "FRAME_SIZE_ERROR",
            "REFUSED_STREAM",
            "CANCEL",
            "COMPRESSION_ERROR",
            "CONNECT_ERROR",
            "ENHANCE_YOUR_CALM",
            "INADEQUATE_SECURITY",
            "HTTP_1_1_REQUIRED",
        ];
        match NAMES.get(self.0 as usize) {
            Some(name) => f.write_str(name),
            None => write!(f, "error code {}", self.0),
        }
    }
}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Settings (section 6.5.2).
pub(super) mod setting {
    pub(in crate::h2) const HEADER_TABLE_SIZE: u16 = 1;
    pub(in crate::h2) const ENABLE_PUSH: u16 = 2;
    pub(in crate::h2) const MAX_CONCURRENT_STREAMS: u16 = 3;
    pub(in crate::h2) const INITIAL_WINDOW_SIZE: u16 = 4;
    pub(in crate::h2) const MAX_FRAME_SIZE: u16 = 5;
    pub(in crate::h2) const MAX_HEADER_LIST_SIZE: u16 = 6;
}

/// Appends a SETTINGS frame.
pub(super) fn settings(settings: &[(u16, u32)], out: &mut BytesMut) {
    Header::write(settings.len() * 6, Kind::Settings, 0, 0, out);
    for (name, value) in settings {
        out.put_u16(*name);
        out.put_u32(*value);
    }
}

pub(super) fn settings_ack(out: &mut BytesMut) {
    Header::write(0, Kind::Settings, ACK, 0, out);
}

pub(super) fn ping(payload: [u8; 8], ack: bool, out: &mut BytesMut) {
    Header::write(8, Kind::Ping, if ack { ACK } else { 0 }, 0, out);
    out.extend_from_slice(&payload);
}

pub(super) fn go_away(last: u32, code: Code, out: &mut BytesMut) {
    Header::write(8, Kind::GoAway, 0, 0, out);
    out.put_u32(last);
    out.put_u32(code.0);
}

pub(super) fn reset(stream: u32, code: Code, out: &mut BytesMut) {
    Header::write(4, Kind::RstStream, 0, stream, out);
    out.put_u32(code.0);
}

pub(super) fn window_update(stream: u32, increment: u32, out: &mut BytesMut) {
    Header::write(4, Kind::WindowUpdate, 0, stream, out);
    out.put_u32(increment);
}

/// Puts a field block of any length, which was written behind a place for one header, into a HEADERS frame and as many
/// CONTINUATION frames as it takes (section 6.10).
pub(super) fn frame_block(stream: u32, flags: u8, at: usize, out: &mut BytesMut) {
    let length = out.len() - at - HEADER;
    if length <= MAX_PAYLOAD {
        let mut header = BytesMut::with_capacity(HEADER);
        Header::write(length, Kind::Headers, flags | END_HEADERS, stream, &mut header);
        return out[at..at + HEADER].copy_from_slice(&header);
    }
    let block = out.split_off(at + HEADER);
    out.truncate(at);
    let mut parts = block.chunks(MAX_PAYLOAD).peekable();
    let (mut kind, mut flags) = (Kind::Headers, flags);
    while let Some(part) = parts.next() {
        let last = if parts.peek().is_none() { END_HEADERS } else { 0 };
        Header::write(part.len(), kind, flags | last, stream, out);
        out.extend_from_slice(part);
        (kind, flags) = (Kind::Continuation, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives() {
        let mut out = BytesMut::new();
        Header::write(0x01_0203, Kind::Ping, ACK, 0x7fff_fffe, &mut out);
        assert_eq!(Header::of(&out[..8]).map(|_| ()), None);
        out[5] |= 0x80;
        let header = Header::of(&out).unwrap();
        assert_eq!(
            (header.length, header.kind, header.flags, header.stream),
            (0x01_0203, Kind::Ping, ACK, 0x7fff_fffe)
        );
    }

    #[test]
    fn a_long_block_goes_on_in_continuations() {
        for length in [0, 1, MAX_PAYLOAD, MAX_PAYLOAD + 1, 3 * MAX_PAYLOAD] {
            let mut out = BytesMut::from(&b"before"[..]);
            out.resize(6 + HEADER, 0);
            let block: Vec<u8> = (0..length).map(|it| it as u8).collect();
            out.extend_from_slice(&block);
            frame_block(5, END_STREAM, 6, &mut out);
            assert_eq!(&out.split_to(6)[..], b"before");
            let (mut joined, mut kinds, mut ended) = (Vec::new(), Vec::new(), false);
            while let Some(header) = Header::of(&out) {
                assert!(!ended && header.stream == 5 && header.length <= MAX_PAYLOAD);
                let frame = out.split_to(HEADER + header.length);
                joined.extend_from_slice(&frame[HEADER..]);
                assert_eq!(header.has(END_STREAM), kinds.is_empty());
                ended = header.has(END_HEADERS);
                kinds.push(header.kind);
            }
            assert!(ended && joined == block && kinds[0] == Kind::Headers);
            assert!(kinds[1..].iter().all(|kind| *kind == Kind::Continuation));
        }
    }

    #[test]
    fn codes_have_names() {
        assert_eq!(Code::HTTP_1_1_REQUIRED.to_string(), "HTTP_1_1_REQUIRED");
        assert_eq!(Code(99).to_string(), "error code 99");
    }
}

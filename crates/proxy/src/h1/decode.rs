//! Where a body ends: by length, by chunks, or with the connection (RFC 9112, section 6).
//!
//! Strict: a chunk line is hexadecimal digits, an optional extension, CR LF, and nothing else; what other parsers
//! forgive is how requests are smuggled past them.

use bytes::{Buf, BytesMut};
use memchr::memchr;
use sheer_core::head::{Fields, Known, MAX_FIELDS};

use super::parse;
use crate::body::{Frame, Length};

/// The most bytes that all chunk extensions of a body may have together. Nobody uses them but attackers.
const MAX_EXTENSIONS: usize = 4 * 1024;

/// The most bytes of a trailer section.
const MAX_TRAILERS: usize = 16 * 1024;

/// Reads one body out of a connection's bytes.
#[derive(Debug)]
pub(crate) enum Decoder {
    /// The whole body has been read.
    Done,
    /// So many bytes remain.
    Length(u64),
    /// Chunks.
    Chunked(Chunked),
    /// Everything until the connection ends.
    UntilClose,
}

/// The state between two reads of a chunked body.
#[derive(Debug, Default)]
pub(crate) struct Chunked {
    at: At,
    extensions: usize,
}

#[derive(Debug, Default, Clone, Copy)]
enum At {
    /// Before a chunk's size line.
    #[default]
    Size,
    /// Inside a chunk's data: so many bytes remain.
    Data(u64),
    /// After a chunk's data, before its CR LF.
    DataEnd,
    /// After the last chunk.
    Trailers,
}

impl Decoder {
    /// A decoder of this many bytes.
    pub(crate) fn length(bytes: u64) -> Self {
        if bytes == 0 { Decoder::Done } else { Decoder::Length(bytes) }
    }

    /// A decoder of chunks.
    pub(crate) fn chunked() -> Self {
        Decoder::Chunked(Chunked::default())
    }

    /// True when nothing more belongs to the body.
    pub(crate) fn is_done(&self) -> bool {
        matches!(self, Decoder::Done)
    }

    /// How many bytes remain.
    pub(crate) fn remaining(&self) -> Length {
        match self {
            Decoder::Done => Length::Known(0),
            Decoder::Length(bytes) => Length::Known(*bytes),
            Decoder::Chunked(_) | Decoder::UntilClose => Length::Unknown,
        }
    }

    /// Takes the next part out of the bytes received; `None` when more are needed, or the body is done.
    ///
    /// # Errors
    /// What is wrong with the framing. The connection can then not be read further.
    pub(crate) fn decode(&mut self, bytes: &mut BytesMut) -> Result<Option<Frame>, &'static str> {
        match self {
            Decoder::Done => Ok(None),
            Decoder::UntilClose => Ok((!bytes.is_empty()).then(|| Frame::Data(bytes.split().freeze()))),
            Decoder::Length(remaining) => {
                let frame = data(bytes, remaining);
                if *remaining == 0 {
                    *self = Decoder::Done;
                }
                Ok(frame)
            }
            Decoder::Chunked(chunked) => {
                let step = chunked.decode(bytes)?;
                if matches!(step, Step::Frame(Frame::Trailers(_)) | Step::End) {
                    *self = Decoder::Done;
                }
                Ok(match step {
                    Step::Frame(frame) => Some(frame),
                    Step::End | Step::More => None,
                })
            }
        }
    }

    /// The connection has ended. True when the body ends with it.
    pub(crate) fn ends_with_connection(&mut self) -> bool {
        if matches!(self, Decoder::UntilClose) {
            *self = Decoder::Done;
        }
        self.is_done()
    }
}

enum Step {
    Frame(Frame),
    End,
    More,
}

impl Chunked {
    fn decode(&mut self, bytes: &mut BytesMut) -> Result<Step, &'static str> {
        loop {
            match &mut self.at {
                At::Size => {
                    let Some(end) = line_end(bytes, 17 + MAX_EXTENSIONS)? else { return Ok(Step::More) };
                    let (size, extension) = chunk_size(&bytes[..end])?;
                    self.extensions += extension;
                    if self.extensions > MAX_EXTENSIONS {
                        return Err("too many chunk extensions");
                    }
                    bytes.advance(end + 2);
                    self.at = if size == 0 { At::Trailers } else { At::Data(size) };
                }
                At::Data(remaining) => {
                    let frame = data(bytes, remaining);
                    if *remaining == 0 {
                        self.at = At::DataEnd;
                    }
                    return Ok(frame.map_or(Step::More, Step::Frame));
                }
                At::DataEnd => {
                    match (bytes.first(), bytes.get(1)) {
                        (Some(b'\r'), Some(b'\n')) => bytes.advance(2),
                        (None, _) | (Some(b'\r'), None) => return Ok(Step::More),
                        _ => return Err("no CR LF after a chunk"),
                    }
                    self.at = At::Size;
                }
                At::Trailers => return trailers(bytes),
            }
        }
    }
}

/// Takes what is there of `remaining` bytes.
fn data(bytes: &mut BytesMut, remaining: &mut u64) -> Option<Frame> {
    if bytes.is_empty() || *remaining == 0 {
        return None;
    }
    let take = usize::try_from(*remaining).unwrap_or(usize::MAX).min(bytes.len());
    *remaining -= take as u64;
    Some(Frame::Data(bytes.split_to(take).freeze()))
}

/// The length of the first line without its CR LF; `None` while its end has not arrived.
fn line_end(bytes: &[u8], limit: usize) -> Result<Option<usize>, &'static str> {
    match memchr(b'\n', bytes) {
        Some(end) if end > limit => Err("chunk line too long"),
        Some(0) => Err("chunk line without CR"),
        Some(end) if bytes[end - 1] != b'\r' => Err("chunk line without CR"),
        Some(end) => Ok(Some(end - 1)),
        None if bytes.len() > limit => Err("chunk line too long"),
        None => Ok(None),
    }
}

/// The size that a chunk line names, and the length of its extension.
fn chunk_size(line: &[u8]) -> Result<(u64, usize), &'static str> {
    let digits = line.iter().position(|byte| !byte.is_ascii_hexdigit()).unwrap_or(line.len());
    // 15 digits are an exabyte; more is an attempt to overflow somebody's counter.
    if digits == 0 || digits > 15 {
        return Err("bad chunk size");
    }
    let size = line[..digits].iter().fold(0, |size, digit| size * 16 + u64::from(hex(*digit)));
    let extension = &line[digits..];
    match extension.first() {
        None => Ok((size, 0)),
        Some(b';') if is_extension(extension) => Ok((size, extension.len())),
        Some(b';') => Err("bad chunk extension"),
        Some(_) => Err("bad chunk size"),
    }
}

/// `;name`, `;name=token` or `;name="text"`, as often as it comes (RFC 9112, section 7.1.1), without the blanks that are
/// allowed for the sake of old senders.
fn is_extension(mut rest: &[u8]) -> bool {
    while let [b';', after @ ..] = rest {
        let Some(after) = after_token(after) else { return false };
        rest = match after {
            [b'=', b'"', quoted @ ..] => match after_quoted(quoted) {
                Some(after) => after,
                None => return false,
            },
            [b'=', value @ ..] => match after_token(value) {
                Some(after) => after,
                None => return false,
            },
            _ => after,
        };
    }
    rest.is_empty()
}

/// What follows a token; `None` where there is none.
fn after_token(bytes: &[u8]) -> Option<&[u8]> {
    let is_token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    let end = bytes.iter().position(|byte| !is_token(byte)).unwrap_or(bytes.len());
    (end > 0).then(|| &bytes[end..])
}

/// What follows the closing quote; `None` where it is missing, or something stands before it that may not.
fn after_quoted(mut bytes: &[u8]) -> Option<&[u8]> {
    loop {
        bytes = match bytes {
            [b'"', after @ ..] => return Some(after),
            [b'\\', b'\t' | b' '..=b'~', after @ ..] => after,
            [b'\t' | b' '..=b'[' | b']'..=b'~', after @ ..] => after,
            _ => return None,
        };
    }
}

fn hex(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        _ => (digit | 0x20) - b'a' + 10,
    }
}

fn trailers(bytes: &mut BytesMut) -> Result<Step, &'static str> {
    match (bytes.first(), bytes.get(1)) {
        (Some(b'\r'), Some(b'\n')) => {
            bytes.advance(2);
            return Ok(Step::End);
        }
        (None, _) | (Some(b'\r'), None) => return Ok(Step::More),
        _ => {}
    }
    let mut list = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut fields = Fields::default();
    let end = match httparse::parse_headers(bytes, &mut list) {
        Ok(httparse::Status::Complete((end, list))) => {
            let place = parse::Place::of(bytes);
            for header in list {
                let known = Known::of(header.name.as_bytes());
                place.check_line(header)?;
                if !forbidden_in_trailers(known, header.name) {
                    let (name, value) = place.ranges(header);
                    fields.push_parsed(known, name, value).map_err(|_| "too many trailer fields")?;
                }
            }
            place.check_end(end)?;
            end
        }
        Ok(httparse::Status::Partial) if bytes.len() > MAX_TRAILERS => return Err("trailers too large"),
        Ok(httparse::Status::Partial) => return Ok(Step::More),
        Err(_) => return Err("bad trailer fields"),
    };
    if end > MAX_TRAILERS {
        return Err("trailers too large");
    }
    fields.lay_over(bytes.split_to(end).freeze());
    if fields.is_empty() {
        return Ok(Step::End);
    }
    Ok(Step::Frame(Frame::Trailers(fields)))
}

/// Fields that decide about framing, routing or identity mean nothing after the body, and are dropped there
/// (RFC 9110, section 6.5.1).
pub(crate) fn forbidden_in_trailers(known: Known, name: &str) -> bool {
    match known {
        Known::GrpcStatus | Known::GrpcMessage => false,
        Known::Other => {
            const FORBIDDEN: [&str; 14] = [
                "authorization",
                "www-authenticate",
                "proxy-authenticate",
                "cookie",
                "set-cookie",
                "content-encoding",
                "content-range",
                "content-location",
                "cache-control",
                "location",
                "forwarded",
                "x-real-ip",
                "age",
                "max-forwards",
            ];
            FORBIDDEN.iter().any(|forbidden| name.eq_ignore_ascii_case(forbidden))
                || parse::is_mesh_field(name)
                || parse::passes_for_another(name)
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The body's bytes, its trailers, and what follows it.
    type Decoded = (Vec<u8>, Vec<String>, Vec<u8>);

    fn decode(mut decoder: Decoder, parts: &[&[u8]]) -> Result<Decoded, &'static str> {
        let (mut buffer, mut body, mut trailers) = (BytesMut::new(), Vec::new(), Vec::new());
        for part in parts {
            buffer.extend_from_slice(part);
            while let Some(frame) = decoder.decode(&mut buffer)? {
                match frame {
                    Frame::Data(bytes) => body.extend_from_slice(&bytes),
                    Frame::Trailers(fields) => {
                        trailers.extend(fields.iter().map(|(name, _, _)| String::from_utf8_lossy(name).into_owned()))
                    }
                }
            }
        }
        if decoder.is_done() { Ok((body, trailers, buffer.to_vec())) } else { Err("unfinished") }
    }

    #[test]
    fn chunks_are_read_strictly() {
        let good: &[(&[u8], &[u8])] = &[
            (b"0\r\n\r\n", b""),
            (b"2\r\nab\r\n0\r\n\r\n", b"ab"),
            (b"2;a;b=c;d=\"e \\\" f\"\r\nab\r\n0\r\n\r\n", b"ab"),
            (b"002;x=y\r\nab\r\nA\r\n0123456789\r\n0;z\r\n\r\n", b"ab0123456789"),
        ];
        for (input, body) in good {
            assert_eq!(decode(Decoder::chunked(), &[input]), Ok((body.to_vec(), vec![], vec![])));
        }
        let huge = format!("2;{}\r\nab\r\n0\r\n\r\n", "x".repeat(64 * 1024));
        let many = format!("{}0\r\n\r\n", "1;ext=aaaaaaaaaa\r\na\r\n".repeat(10_000));
        let bad: &[&[u8]] = &[
            b"2;\nxx\r\n0\r\n\r\n",
            b"2\nxx\r\n0\r\n\r\n",
            b"2\r\nxx\n0\r\n\r\n",
            b"2\r\nxxx\r\n0\r\n\r\n",
            b"-1\r\n",
            b"0x2\r\nxx\r\n",
            b"+2\r\nxx\r\n",
            b" 2\r\nxx\r\n",
            b"2 \r\nxx\r\n",
            b"\r\n",
            b"10000000000000002\r\nxx\r\n",
            b"fffffffffffffffff\r\nxx\r\n",
            b"2\r;\r\nxx\r\n",
            b"2;\0\r\nxx\r\n",
            b"2;\r\nxx\r\n",
            b"2;a=\r\nxx\r\n",
            b"2;a;\r\nxx\r\n",
            b"2;a b\r\nxx\r\n",
            b"2; a\r\nxx\r\n",
            b"2;a=\"b\r\nxx\r\n",
            b"2;a=\"b\"c\r\nxx\r\n",
            b"2;a=\"\\\r\nxx\r\n",
            b"2;a: b\r\nxx\r\n",
            b"0\r\nA: b\n\r\n",
            b"0\r\n A: b\r\n\r\n",
            b"0\r\nA : b\r\n\r\n",
            b"0\r\n\n",
            huge.as_bytes(),
            many.as_bytes(),
        ];
        for input in bad {
            let verdict = decode(Decoder::chunked(), &[input]);
            let shown = String::from_utf8_lossy(&input[..input.len().min(40)]);
            assert!(verdict.is_err_and(|why| why != "unfinished"), "{shown:?}");
        }
    }

    #[test]
    fn trailers_lose_what_decides() {
        let input = b"0\r\nContent-Length: 3\r\nHost: a\r\nAuthorization: b\r\nx-sheer-peer: c\r\n\
            X-Forwarded-For: 1\r\ngrpc-status: 0\r\nX-Sum: 1\r\n\r\nGET";
        let (_, trailers, rest) = decode(Decoder::chunked(), &[input]).unwrap();
        assert_eq!(trailers, ["grpc-status", "X-Sum"]);
        assert_eq!(rest, b"GET");
        let only = b"0\r\nHost: a\r\n\r\n";
        assert_eq!(decode(Decoder::chunked(), &[only]), Ok((vec![], vec![], vec![])));
    }

    #[test]
    fn lengths_leave_what_follows() {
        assert_eq!(decode(Decoder::length(3), &[b"a", b"bcd"]), Ok((b"abc".to_vec(), vec![], b"d".to_vec())));
        assert_eq!(decode(Decoder::length(3), &[b"a"]), Err("unfinished"));
    }

    proptest::proptest! {
        #[test]
        fn splits_do_not_matter(chunks in proptest::collection::vec(proptest::collection::vec(0u8.., 1..40), 0..6), cuts in proptest::collection::vec(0usize..400, 0..8)) {
            let mut input = Vec::new();
            for chunk in &chunks {
                input.extend_from_slice(format!("{:x};a=b\r\n", chunk.len()).as_bytes());
                input.extend_from_slice(chunk);
                input.extend_from_slice(b"\r\n");
            }
            input.extend_from_slice(b"0\r\nx-sum: 1\r\n\r\nGET /");
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut % (input.len() + 1)).collect();
            cuts.sort_unstable();
            let mut parts = Vec::new();
            let mut start = 0;
            for cut in cuts {
                parts.push(&input[start..cut]);
                start = cut;
            }
            parts.push(&input[start..]);
            let (body, trailers, rest) = decode(Decoder::chunked(), &parts).unwrap();
            proptest::prop_assert_eq!(body, chunks.concat());
            proptest::prop_assert_eq!(trailers, ["x-sum"]);
            proptest::prop_assert_eq!(rest, b"GET /");
        }
    }
}

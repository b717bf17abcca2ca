use crate::body::Frame;
use crate::h1::decode::{Decoder, forbidden_in_trailers};
use bytes::{Bytes, BytesMut};
use sheer_core::head::{Known, MAX_FIELDS};
use std::str;

/// What was made of some bytes.
#[derive(Debug, PartialEq, Eq)]
enum Read {
    /// A body, its trailers, and how many bytes it took.
    Whole(Vec<u8>, Vec<(Bytes, Bytes)>, usize),
    /// A body that has not ended: what there is of it.
    Partial(Vec<u8>),
    Refused,
}

/// The limits of the decoder.
const MAX_LINE: usize = 17 + 4 * 1024;
const MAX_EXTENSIONS: usize = 4 * 1024;
const MAX_TRAILERS: usize = 16 * 1024;

/// A chunked body: the same is read of it however it arrives, it is what the grammar says and nothing else is taken, and
/// what is behind it is left alone.
///
/// # Panics
/// When that does not hold.
pub fn chunks(input: &[u8]) {
    let whole = decode([input]);
    assert_eq!(decode(input.chunks(1)), whole, "byte by byte");
    assert_eq!(decode(input.chunks(7)), whole, "seven bytes at a time");
    assert_eq!(naive(input), whole, "the grammar");
}

fn decode<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Read {
    let (mut decoder, mut buffer, mut body, mut trailers) =
        (Decoder::chunked(), BytesMut::new(), Vec::new(), Vec::new());
    let mut taken = 0;
    for part in parts {
        buffer.extend_from_slice(part);
        taken += part.len();
        loop {
            match decoder.decode(&mut buffer) {
                Ok(Some(Frame::Data(data))) => {
                    assert!(!data.is_empty(), "an empty part");
                    body.extend_from_slice(&data);
                }
                Ok(Some(Frame::Trailers(fields))) => {
                    assert!(decoder.is_done() && !fields.is_empty());
                    let copy = Bytes::copy_from_slice;
                    trailers = fields.iter().map(|(name, value, _)| (copy(name), copy(value))).collect();
                }
                Ok(None) => break,
                Err(_) => return Read::Refused,
            }
        }
        if decoder.is_done() {
            return Read::Whole(body, trailers, taken - buffer.len());
        }
    }
    assert!(!decoder.ends_with_connection());
    Read::Partial(body)
}

/// RFC 9112, section 7.1, line by line.
fn naive(input: &[u8]) -> Read {
    let (mut rest, mut body, mut extensions) = (input, Vec::new(), 0);
    loop {
        let Some(end) = rest.iter().position(|byte| *byte == b'\n') else {
            return if rest.len() > MAX_LINE { Read::Refused } else { Read::Partial(body) };
        };
        let (line, after) = (&rest[..end], &rest[end + 1..]);
        let Some(line) = line.strip_suffix(b"\r").filter(|_| end <= MAX_LINE) else { return Read::Refused };
        let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
        let (digits, extension) = line.split_at(digits);
        extensions += extension.len();
        if digits.is_empty() || digits.len() > 15 || !is_extension(extension) || extensions > MAX_EXTENSIONS {
            return Read::Refused;
        }
        let size = str::from_utf8(digits).ok().and_then(|digits| usize::from_str_radix(digits, 16).ok());
        let size = size.expect("15 digits are a number");
        if size == 0 {
            return naive_trailers(input, after, body);
        }
        let Some((data, after)) = after.split_at_checked(size) else {
            body.extend_from_slice(after);
            return Read::Partial(body);
        };
        body.extend_from_slice(data);
        rest = match after {
            [b'\r', b'\n', rest @ ..] => rest,
            [] | [b'\r'] => return Read::Partial(body),
            _ => return Read::Refused,
        };
    }
}

/// Whether this is nothing, or `;name`, `;name=value`, `;name="value"`, as often as it comes.
fn is_extension(text: &[u8]) -> bool {
    let (mut rest, mut state) = (text.iter().copied(), 'e');
    loop {
        let Some(byte) = rest.next() else { return matches!(state, 'e' | 'n' | 'v') };
        let token = byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        state = match (state, byte) {
            // e: an extension may begin; s: its name must; n: in the name; q: a value must begin; v: in the value; Q: in
            // quotes; B: behind a backslash.
            ('e' | 'n' | 'v', b';') => 's',
            ('s' | 'n', _) if token => 'n',
            ('n', b'=') => 'q',
            ('q', b'"') => 'Q',
            ('q' | 'v', _) if token => 'v',
            ('Q', b'"') => 'e',
            ('Q', b'\\') => 'B',
            ('Q' | 'B', b'\t' | b' '..=b'~') => 'Q',
            _ => return false,
        };
    }
}

fn naive_trailers(input: &[u8], section: &[u8], body: Vec<u8>) -> Read {
    // Trailers are judged when all are there: what is no field may be refused late, but is never taken.
    let not_taken = || match decode([input]) {
        Read::Whole(..) => panic!("trailers that are none were taken"),
        Read::Partial(_) if section.windows(4).any(|end| end == b"\r\n\r\n") => {
            panic!("trailers end and are not judged")
        }
        read => read,
    };
    let (mut rest, mut trailers, mut count) = (section, Vec::new(), 0);
    loop {
        let Some(end) = rest.iter().position(|byte| *byte == b'\n') else { return not_taken() };
        let (line, after) = (&rest[..end], &rest[end + 1..]);
        let Some(line) = line.strip_suffix(b"\r") else { return not_taken() };
        if line.is_empty() {
            let taken = input.len() - after.len();
            let fits = count == 0 || section.len() - after.len() <= MAX_TRAILERS;
            return if fits { Read::Whole(body, trailers, taken) } else { Read::Refused };
        }
        count += 1;
        let Some((name, value)) = field(line).filter(|_| count <= MAX_FIELDS) else { return not_taken() };
        if !forbidden_in_trailers(Known::of(name), str::from_utf8(name).unwrap_or_default()) {
            trailers.push((Bytes::copy_from_slice(name), Bytes::copy_from_slice(value)));
        }
        rest = after;
    }
}

/// Name and value of a line without its end, if it is a field's (RFC 9112, section 5).
pub(super) fn field(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let colon = line.iter().position(|byte| *byte == b':')?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    let is_token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    let is_value = |byte: &u8| matches!(byte, b'\t' | b' '..=b'~' | 0x80..);
    if name.is_empty() || !name.iter().all(is_token) || !value.iter().all(is_value) {
        return None;
    }
    let start = value.iter().position(|byte| !b" \t".contains(byte)).unwrap_or(value.len());
    let end = value.iter().rposition(|byte| !b" \t".contains(byte)).map_or(start, |last| last + 1);
    Some((name, &value[start..end]))
}

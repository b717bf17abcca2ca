use crate::body::Length;
use crate::h1::{encode, parse};
use crate::h2::frame::HEADER;
use crate::h2::head::{Part, Reader, write_request, write_response, write_trailers};
use crate::h2::hpack::fuzzing::{Field, Plain};
use crate::h2::hpack::{Decoder, Encoder, TABLE_SIZE};
use bytes::BytesMut;
use http::Method;
use sheer_core::head::{Fields, Known, MAX_FIELDS, MAX_HEAD_BYTES, RequestHead};
use sheer_fuzzing::Choices;

/// A decoder works for one block after another; more say nothing new.
const MAX_BLOCKS: usize = 12;

/// The field blocks of a connection: they are decompressed as by the letter of the RFC, into a table that stays small,
/// and a head that is taken of them has one reading: sent on over HTTP/2 and over HTTP/1 it is read as the same.
///
/// # Panics
/// When that does not hold.
pub fn fields(input: &[u8]) {
    let mut choices = Choices::of(input);
    let (mut decoder, mut plain) = (Decoder::new(), Plain::new());
    let (mut onwards, mut far) = (Encoder::new(), Decoder::new());
    for _ in 0..MAX_BLOCKS {
        if choices.is_empty() {
            return;
        }
        let block = match choices.byte() {
            255 => choices.rest(),
            _ => choices.bytes(),
        };
        let mut decoded = Vec::new();
        let outcome = decoder.decode(block, |it| decoded.push((it.name.to_vec(), it.value.to_vec(), it.sensitive)));
        let expected = plain.decode(block);
        assert_eq!(outcome.is_ok(), expected.is_some(), "{outcome:?}, and by the letter {expected:?}");
        if outcome.is_err() {
            return;
        }
        assert_eq!(Some(&decoded), expected.as_ref());
        assert!(decoder.size() <= TABLE_SIZE);
        for strict in [false, true] {
            request(&decoded, strict, &mut onwards, &mut far);
            response(&decoded, strict, &mut onwards, &mut far);
            trailers(&decoded, strict, &mut onwards, &mut far);
        }
    }
}

/// The head of a request with these fields, as a client's; `None` when it is refused.
pub(crate) fn request_of(fields: &[(&[u8], &[u8])]) -> Option<RequestHead> {
    let fields: Vec<_> = fields.iter().map(|(name, value)| (name.to_vec(), value.to_vec(), false)).collect();
    let mut raw = Vec::new();
    read(&fields, Part::Request, true, &mut raw).request().ok()
}

fn read<'a>(fields: &[Field], part: Part, strict: bool, raw: &'a mut Vec<u8>) -> Reader<'a> {
    let (mut encoder, mut block) = (Encoder::new(), BytesMut::new());
    encoder.begin(&mut block);
    for (name, value, sensitive) in fields {
        encoder.field(name, value, *sensitive, &mut block);
    }
    let mut reader = Reader::new(part, strict, raw);
    Decoder::new().decode(&block, |field| reader.field(field)).expect("what was encoded");
    reader
}

fn request(fields: &[Field], strict: bool, onwards: &mut Encoder, far: &mut Decoder) {
    let mut raw = Vec::new();
    let Ok(head) = read(fields, Part::Request, strict, &mut raw).request() else { return };
    are_plain(&head.fields, fields);
    let named = |name: &'static [u8]| {
        fields.iter().filter(move |(it, _, _)| it == name).map(|(_, value, _)| value.trim_ascii())
    };
    assert!(named(b":method").eq([head.method.as_str().as_bytes()]));
    assert!(named(b":path").eq([head.target().as_bytes()]));
    assert!(named(b":authority").chain(named(b"host")).all(|it| it.eq_ignore_ascii_case(head.authority().as_bytes())));
    assert!(named(b":authority").count() <= 1 && named(b"host").count() <= 1);
    assert!(named(b"content-length").count() <= 1);

    let mut out = BytesMut::new();
    write_request(&head, 1, 0, onwards, &mut out);
    let again = read(&blocks(&out, far), Part::Request, true, &mut Vec::new()).request();
    let again = again.expect("the next proxy takes it");
    assert_eq!((&again.method, again.target(), again.scheme), (&head.method, head.target(), head.scheme));
    assert_eq!(again.authority(), head.authority());
    assert_eq!(list(&again.fields), list(&head.fields));

    // To an application that speaks HTTP/1.
    let mut out = BytesMut::new();
    encode::request(&head, Length::Unknown, &mut out);
    let again = parse::request(&mut out, false, &mut false);
    // The hop adds a host and a coding, which may be too many.
    let is_large = head.fields.len() + 3 > MAX_FIELDS || out.len() > MAX_HEAD_BYTES;
    if again.as_ref().is_err_and(|refusal| refusal.detail == "unknown expectation" || is_large) {
        return;
    }
    let again = again.expect("the application takes it").expect("a whole head");
    assert!(out.is_empty(), "bytes behind the head");
    assert_eq!((&again.head.method, again.head.target()), (&head.method, head.target()));
    assert_eq!(again.head.authority(), head.authority());
    let without = |fields: &Fields| -> Vec<_> {
        let drop = [&b"host"[..], b"content-length"];
        list(fields).into_iter().filter(|(name, _, _)| !drop.contains(&&*name.to_ascii_lowercase())).collect()
    };
    let names = |fields: Vec<Field>| fields.into_iter().map(|(name, value, _)| (name, value)).collect::<Vec<_>>();
    assert_eq!(names(without(&again.head.fields)), names(without(&head.fields)));
}

fn response(fields: &[Field], strict: bool, onwards: &mut Encoder, far: &mut Decoder) {
    let mut raw = Vec::new();
    let Ok(head) = read(fields, Part::Response, strict, &mut raw).response() else { return };
    are_plain(&head.fields, fields);
    let mut out = BytesMut::new();
    write_response(&head, 1, 0, onwards, &mut out);
    let again = read(&blocks(&out, far), Part::Response, false, &mut Vec::new()).response();
    let again = again.expect("the next proxy takes it");
    assert_eq!(again.status, head.status);
    // What means nothing in a response goes no further.
    let odd = |known| matches!(known, Known::Host | Known::Expect);
    let is_odd = head.fields.iter().any(|(_, _, known)| odd(known));
    assert!(is_odd || list(&again.fields) == list(&head.fields));
    let asked = encode::Asked { no_body: false, http10: false, keep_alive: true };
    let mut out = BytesMut::new();
    encode::response(&head, Length::Unknown, asked, &mut out);
    if out.len() < MAX_HEAD_BYTES && head.fields.len() + 3 <= MAX_FIELDS && !is_odd {
        let again = parse::response(&mut out, &Method::GET).expect("a client takes it").expect("a whole head");
        assert!(out.is_empty(), "bytes behind the head");
        assert_eq!(again.head.status, head.status);
    }
}

fn trailers(fields: &[Field], strict: bool, onwards: &mut Encoder, far: &mut Decoder) {
    let mut raw = Vec::new();
    let Ok(trailers) = read(fields, Part::Trailers, strict, &mut raw).trailers() else { return };
    are_plain(&trailers, fields);
    let forbidden = |known| !matches!(known, Known::Other | Known::GrpcStatus | Known::GrpcMessage);
    assert!(trailers.iter().all(|(_, _, known)| !forbidden(known)));
    let mut out = BytesMut::new();
    write_trailers(&trailers, 1, onwards, &mut out);
    let again = read(&blocks(&out, far), Part::Trailers, false, &mut Vec::new()).trailers();
    assert_eq!(list(&again.expect("the next proxy takes them")), list(&trailers));
}

/// The fields of the frames that were written.
fn blocks(frames: &[u8], decoder: &mut Decoder) -> Vec<Field> {
    let (mut block, mut rest) = (Vec::new(), frames);
    while let Some((header, after)) = rest.split_at_checked(HEADER) {
        let length = usize::from(header[1]) << 8 | usize::from(header[2]);
        assert_eq!(header[0], 0, "a frame longer than any peer takes");
        block.extend_from_slice(&after[..length]);
        rest = &after[length..];
    }
    assert!(rest.is_empty());
    let mut fields = Vec::new();
    let decoded = decoder.decode(&block, |it| fields.push((it.name.to_vec(), it.value.to_vec(), it.sensitive)));
    decoded.expect("what was written decompresses");
    fields
}

fn list(fields: &Fields) -> Vec<Field> {
    fields.entries().map(|it| (it.name.to_vec(), it.value.to_vec(), it.sensitive)).collect()
}

/// What was taken came, is bounded, and cannot become more than it is on its way.
fn are_plain(taken: &Fields, sent: &[Field]) {
    assert!(taken.len() <= MAX_FIELDS && sent.len() <= MAX_FIELDS + 5);
    assert!(sent.iter().map(|(name, value, _)| name.len() + value.len() + 32).sum::<usize>() <= MAX_HEAD_BYTES);
    let mut sent = sent.iter();
    for (name, value, known) in taken.iter() {
        let is_name =
            |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"!#$%&'*+-.^_`|~".contains(byte);
        assert!(!name.is_empty() && name.iter().all(is_name), "{}", name.escape_ascii());
        assert!(value.iter().all(|byte| matches!(byte, b'\t' | b' '..=b'~' | 0x80..)), "{}", value.escape_ascii());
        assert_eq!(value, value.trim_ascii());
        assert_eq!(known, Known::of(name));
        let of_http1 = [
            Known::Connection,
            Known::KeepAlive,
            Known::ProxyConnection,
            Known::TransferEncoding,
            Known::Upgrade,
            Known::Http2Settings,
        ];
        assert!(!of_http1.contains(&known), "{}", name.escape_ascii());
        assert!(known != Known::Te || value == b"trailers");
        let came = sent.any(|(its_name, its_value, _)| its_name == name && its_value.trim_ascii() == value);
        assert!(came, "{} was not sent, or not in this order", name.escape_ascii());
    }
}

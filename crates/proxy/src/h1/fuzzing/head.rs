use super::chunks::field;
use crate::body::Length;
use crate::h1::encode::{self, Asked, Encoding};
use crate::h1::parse::{self, Framing, ParsedRequest, ParsedResponse, Refusal, is_mesh_field};
use bytes::{Bytes, BytesMut};
use http::Method;
use sheer_core::head::{Fields, Known, MAX_FIELDS, MAX_HEAD_BYTES, Version, tokens};
use std::str;

/// A request's head: it is understood in the same way however it arrives and as the plainest reader would, and what is
/// forwarded of it is read by the next hop as what was decided on.
///
/// # Panics
/// When that does not hold.
pub fn request(input: &[u8]) {
    for forward_proxy in [false, true] {
        let read = |parts: Vec<&[u8]>| {
            let mut empty_line = false;
            arriving(parts, |buffer| parse::request(buffer, forward_proxy, &mut empty_line))
        };
        let whole = read(vec![input]);
        same_in_parts(input, &whole, read, same_request);
        let Some((taken, Ok(parsed))) = whole else { continue };
        let plain = Plain::of(&input[..taken]);
        plain.is_request(&parsed);
        if parsed.head.method == Method::CONNECT {
            // It ends here: what follows are bytes of a connection to whom it names.
            assert!(forward_proxy && parsed.framing == Framing::None);
            assert!(parsed.head.authority().contains(':'));
            continue;
        }
        let sent = forwarded(&parsed);
        let mut empty_line = false;
        let mut buffer = BytesMut::from(&sent[..]);
        let again = parse::request(&mut buffer, false, &mut empty_line);
        if again.is_err() && parsed.head.fields.len() == MAX_FIELDS {
            // A host or a length of zero that was not there is one too many.
            continue;
        }
        let Ok(Some(again)) = again else { panic!("refused by the next hop: {again:?}: {}", sent.escape_ascii()) };
        assert!(buffer.is_empty() && !empty_line);
        let (decided, seen) = (&parsed.head, &again.head);
        assert_eq!(seen.method, decided.method);
        assert_eq!(seen.target(), decided.target());
        assert_eq!((seen.path(), seen.query()), (decided.path(), decided.query()));
        assert_eq!(seen.authority(), authority_sent(&parsed));
        let name = |authority: &str| authority.strip_suffix(":80").unwrap_or(authority).to_ascii_lowercase();
        assert_eq!(name(seen.authority()), name(decided.authority()), "another host than was decided on");
        assert_eq!(kept(&seen.fields, &decided.fields), kept(&decided.fields, &decided.fields));
        assert_eq!(again.framing, parsed.framing);
        assert_eq!(again.expects_continue, parsed.expects_continue);
        assert_eq!(forwarded(&again), sent, "what is forwarded once more changes no more");
    }
}

/// A response's head, as [`request`].
///
/// # Panics
/// When that does not hold.
pub fn response(input: &[u8]) {
    for method in [Method::GET, Method::HEAD] {
        let read = |parts: Vec<&[u8]>| arriving(parts, |buffer| parse::response(buffer, &method));
        let whole = read(vec![input]);
        same_in_parts(input, &whole, read, same_response);
        let Some((taken, Ok(parsed))) = whole else { continue };
        Plain::of(&input[..taken]).is_response(&parsed, &method);
        for (http10, keep_alive) in [(false, true), (false, false), (true, true), (true, false)] {
            let asked = Asked { no_body: method == Method::HEAD, http10, keep_alive };
            let (sent, encoding, lives_on) = answered(&parsed, asked);
            let mut buffer = BytesMut::from(&sent[..]);
            let again = parse::response(&mut buffer, &method);
            let Ok(Some(again)) = again else { panic!("refused by the client: {again:?}: {}", sent.escape_ascii()) };
            assert!(buffer.is_empty());
            let (decided, seen) = (&parsed.head, &again.head);
            assert_eq!(seen.status, decided.status);
            // An upgrade that was not asked for goes no further.
            let without_upgrade = |fields: &Fields| {
                let mut fields = fields.clone();
                fields.remove_known(&[Known::Upgrade]);
                kept(&fields, &fields)
            };
            assert_eq!(without_upgrade(&seen.fields), without_upgrade(&decided.fields));
            let framing = match encoding {
                Encoding::None | Encoding::Length(0) => Framing::None,
                Encoding::Length(length) => Framing::Length(length),
                Encoding::Chunked => Framing::Chunked,
                Encoding::UntilClose => Framing::UntilClose,
            };
            let ends_at_once = framing == Framing::None && again.framing == Framing::None;
            assert!(ends_at_once || again.framing == framing, "{framing:?} was read as {:?}", again.framing);
            if !decided.status.is_informational() {
                assert!(lives_on || !again.keep_alive, "the client believes that the connection lives on");
                assert!(keep_alive || !lives_on);
            }
        }
    }
}

/// How many bytes were taken, and what of them; `None` where more are needed.
type Read<T> = Option<(usize, Result<T, Refusal>)>;

fn arriving<T>(parts: Vec<&[u8]>, mut parse: impl FnMut(&mut BytesMut) -> Result<Option<T>, Refusal>) -> Read<T> {
    let (mut buffer, mut arrived) = (BytesMut::new(), 0);
    for part in parts {
        buffer.extend_from_slice(part);
        arrived += part.len();
        if let Some(read) = parse(&mut buffer).transpose() {
            return Some((arrived - buffer.len(), read));
        }
    }
    None
}

fn same_in_parts<T: std::fmt::Debug>(
    input: &[u8],
    whole: &Read<T>,
    read: impl Fn(Vec<&[u8]>) -> Read<T>,
    same: impl Fn(&T, &T) -> bool,
) {
    for size in [1, 61] {
        // A long head byte by byte is read from its beginning as often as it has bytes.
        if size == 1 && input.len() > 400 {
            continue;
        }
        let parts = read(input.chunks(size).collect());
        let equal = match (whole, &parts) {
            (None, None) => true,
            (Some((taken, Ok(whole))), Some((again, Ok(parts)))) => taken == again && same(whole, parts),
            (Some((_, Err(whole))), Some((_, Err(parts)))) => whole == parts || input.len() > MAX_HEAD_BYTES,
            _ => false,
        };
        assert!(equal, "{size} bytes at a time: {parts:?}, at once: {whole:?}");
    }
}

fn same_request(a: &ParsedRequest, b: &ParsedRequest) -> bool {
    let said = |it: &ParsedRequest| {
        let head = &it.head;
        let named = (head.method.clone(), head.target().to_owned(), head.authority().to_owned(), head.version);
        (named, list(&head.fields), it.framing, it.keep_alive, it.expects_continue)
    };
    said(a) == said(b)
}

fn same_response(a: &ParsedResponse, b: &ParsedResponse) -> bool {
    let said =
        |it: &ParsedResponse| (it.head.status, it.head.version, list(&it.head.fields), it.framing, it.keep_alive);
    said(a) == said(b)
}

fn list(fields: &Fields) -> Vec<(Bytes, Bytes)> {
    fields.iter().map(|(name, value, _)| (Bytes::copy_from_slice(name), Bytes::copy_from_slice(value))).collect()
}

fn length_of(framing: Framing) -> Length {
    match framing {
        Framing::None => Length::Known(0),
        Framing::Length(length) => Length::Known(length),
        Framing::Chunked | Framing::UntilClose => Length::Unknown,
    }
}

fn forwarded(parsed: &ParsedRequest) -> BytesMut {
    let mut out = BytesMut::new();
    encode::request(&parsed.head, length_of(parsed.framing), &mut out);
    out
}

fn answered(parsed: &ParsedResponse, asked: Asked) -> (BytesMut, Encoding, bool) {
    let mut out = BytesMut::new();
    let (encoding, keep_alive) = encode::response(&parsed.head, length_of(parsed.framing), asked, &mut out);
    (out, encoding, keep_alive)
}

/// `Host` as the next hop sees it: what was sent there, which names the same as an absolute target.
fn authority_sent(parsed: &ParsedRequest) -> &str {
    let host = parsed.head.fields.get(Known::Host);
    host.map_or(parsed.head.authority(), |host| str::from_utf8(host).expect("a host of ASCII"))
}

/// The fields as a hop leaves them alone: it may state a length or leave it out, and states a host where none was.
fn kept(fields: &Fields, decided: &Fields) -> Vec<(Bytes, Bytes)> {
    let has_host = decided.get(Known::Host).is_some();
    let is_kept = |known| known != Known::ContentLength && (known != Known::Host || has_host);
    let kept = fields.iter().filter(|(_, _, known)| is_kept(*known));
    kept.map(|(name, value, _)| (Bytes::copy_from_slice(name), Bytes::copy_from_slice(value))).collect()
}

/// A head as the plainest reader sees it: lines that end in CR LF, words between single blanks, names before colons.
struct Plain<'a> {
    first: Vec<&'a [u8]>,
    fields: Vec<(&'a [u8], &'a [u8])>,
}

impl<'a> Plain<'a> {
    /// Of bytes that were taken, all of them.
    fn of(taken: &'a [u8]) -> Self {
        let taken = taken.strip_prefix(b"\r\n").unwrap_or(taken);
        assert!(taken.len() <= MAX_HEAD_BYTES);
        let head = taken.strip_suffix(b"\r\n\r\n").expect("an empty line at the end, and nothing behind it");
        let mut lines = Vec::new();
        let mut rest = head;
        while let Some(end) = rest.windows(2).position(|pair| pair == b"\r\n") {
            lines.push(&rest[..end]);
            rest = &rest[end + 2..];
        }
        lines.push(rest);
        assert!(lines.iter().all(|line| line.iter().all(|byte| !b"\r\n\0".contains(byte))), "a line within a line");
        let first = lines[0].splitn(3, |byte| *byte == b' ').collect();
        let fields = lines[1..].iter().map(|line| field(line).expect("a field")).collect();
        Self { first, fields }
    }

    fn values(&self, name: &str) -> Vec<&'a [u8]> {
        let named = self.fields.iter().filter(|(it, _)| it.eq_ignore_ascii_case(name.as_bytes()));
        named.map(|(_, value)| *value).collect()
    }

    /// The length and the transfer coding, of which there is one at most.
    fn framing(&self, version: Version) -> (Option<u64>, bool) {
        let (lengths, codings) = (self.values("content-length"), self.values("transfer-encoding"));
        assert!(lengths.len() + codings.len() <= 1, "more than one framing");
        assert!(codings.iter().all(|it| it.eq_ignore_ascii_case(b"chunked") && version == Version::Http11));
        let number = |value: &&[u8]| {
            assert!(value.iter().all(u8::is_ascii_digit) && value.len() <= 19);
            str::from_utf8(value).ok().and_then(|text| text.parse().ok()).expect("a length")
        };
        (lengths.first().map(number), !codings.is_empty())
    }

    fn is_request(&self, parsed: &ParsedRequest) {
        let [method, target, version] = self.first[..] else { panic!("not three words") };
        let head = &parsed.head;
        assert_eq!(method, head.method.as_str().as_bytes());
        assert_eq!(version, if head.version == Version::Http11 { b"HTTP/1.1" } else { b"HTTP/1.0" });
        assert!(target.iter().all(u8::is_ascii_graphic) && !target.contains(&b'#'));
        let hosts = self.values("host");
        assert!(hosts.len() == 1 || hosts.is_empty() && head.version == Version::Http10);
        let absolute = target.get(..7).filter(|it| it.eq_ignore_ascii_case(b"http://")).map(|_| &target[7..]);
        match absolute {
            Some(rest) => {
                let end = rest.iter().position(|byte| b"/?".contains(byte)).unwrap_or(rest.len());
                assert_eq!(rest[..end], *head.authority().as_bytes());
                let (path, seen) = (&rest[end..], head.target().as_bytes());
                match path.first() {
                    Some(b'/') => assert_eq!(path, seen),
                    Some(_) => assert_eq!([b"/", path].concat(), seen),
                    None => assert_eq!(seen, if method == b"OPTIONS" { b"*" } else { b"/" }),
                }
            }
            None if head.method == Method::CONNECT => assert_eq!(target, head.authority().as_bytes()),
            None => {
                assert_eq!(target, head.target().as_bytes());
                assert_eq!(hosts.first().copied().unwrap_or_default(), head.authority().as_bytes());
            }
        }
        let framing = match self.framing(head.version) {
            (None | Some(0), false) => Framing::None,
            (Some(length), false) => Framing::Length(length),
            (_, true) => Framing::Chunked,
        };
        assert_eq!(parsed.framing, framing);
        self.are_kept(&head.fields);
    }

    fn is_response(&self, parsed: &ParsedResponse, method: &Method) {
        let (version, status) = (self.first[0], self.first[1]);
        let head = &parsed.head;
        assert_eq!(version, if head.version == Version::Http11 { b"HTTP/1.1" } else { b"HTTP/1.0" });
        assert_eq!(status, head.status.as_str().as_bytes());
        let framing = self.framing(head.version);
        let code = head.status.as_u16();
        let expected = match framing {
            _ if *method == Method::HEAD || code < 200 || code == 204 || code == 304 => Framing::None,
            (_, true) => Framing::Chunked,
            (Some(0), _) => Framing::None,
            (Some(length), _) => Framing::Length(length),
            (None, _) => Framing::UntilClose,
        };
        assert_eq!(parsed.framing, expected);
        self.are_kept(&head.fields);
    }

    /// The fields that were read are those that were sent, in their order, without some that concern this hop alone.
    fn are_kept(&self, fields: &Fields) {
        assert!(fields.len() <= MAX_FIELDS);
        let named: Vec<&[u8]> = self.values("connection").into_iter().flat_map(tokens).collect();
        let mut seen = fields.iter().peekable();
        for (name, value) in &self.fields {
            let known = Known::of(name);
            let is_same = seen.peek().is_some_and(|(it, seen, of)| {
                // Zeros in front of a length say nothing.
                let is_length = known == Known::ContentLength && value.ends_with(seen) && !seen.is_empty();
                it == name && *of == known && (seen == value || is_length)
            });
            if is_same {
                seen.next();
                continue;
            }
            let of_this_hop = matches!(
                known,
                Known::TransferEncoding
                    | Known::Connection
                    | Known::KeepAlive
                    | Known::ProxyConnection
                    | Known::Http2Settings
                    | Known::Te
                    | Known::Upgrade
                    | Known::Expect
            );
            let is_named = named.iter().any(|it| it.eq_ignore_ascii_case(name));
            let name = str::from_utf8(name).expect("a name of ASCII");
            assert!(of_this_hop || is_named && known == Known::Other && !is_mesh_field(name), "'{name}' was lost");
        }
        assert!(seen.next().is_none(), "a field that nobody sent");
    }
}

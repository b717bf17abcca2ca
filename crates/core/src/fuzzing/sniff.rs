use crate::sniff::{HTTP2_PREFACE, Sniffed, sniff as answer};

/// The most bytes before an answer: a line, its field's line, and the ends of both.
const MAX_UNDECIDED: usize = 2 * crate::head::MAX_HEAD_BYTES + 8;

/// A connection's first bytes: whatever is answered stays so however many bytes follow, no request of HTTP passes for
/// something else, and an answer comes in bounded time.
///
/// # Panics
/// When that does not hold.
pub fn sniff(input: &[u8]) {
    let whole = answer(input);
    let mut decided = None;
    for end in prefixes(input.len()) {
        let now = answer(&input[..end]);
        if let Some((before, then)) = &decided {
            assert_eq!(&now, then, "{before} bytes had told something else than {end}");
        } else if now != Sniffed::Partial {
            decided = Some((end, now));
        }
    }
    if whole == Sniffed::Partial {
        assert!(input.len() < MAX_UNDECIDED, "no answer after {} bytes", input.len());
    }
    match whole {
        Sniffed::Http2 => assert!(input.starts_with(HTTP2_PREFACE)),
        Sniffed::Tls(hello) => {
            assert!(input.starts_with(b"\x16\x03"));
            let name = hello.server_name.unwrap_or_default();
            assert!(name.len() <= 255);
            assert!(name.bytes().all(|it| it.is_ascii_lowercase() || it.is_ascii_digit() || b".-_".contains(&it)));
            assert!(hello.offers_mesh || !hello.offers_mesh_bytes);
        }
        answer => {
            assert!(!input.starts_with(HTTP2_PREFACE));
            assert!(answer == Sniffed::Http1 || !is_request(input), "a request passes for {answer:?}");
        }
    }
}

/// All lengths of short inputs, and of long ones those at the ends.
fn prefixes(length: usize) -> impl Iterator<Item = usize> {
    (0..=length).filter(move |end| *end < 256 || length - end < 64)
}

/// A request line and its end as the standard has them (RFC 9112, section 3), written as plainly as possible.
fn is_request(input: &[u8]) -> bool {
    let Some(end) = input.windows(2).position(|pair| pair == b"\r\n") else { return false };
    let words: Vec<&[u8]> = input[..end].split(|byte| *byte == b' ').collect();
    let [method, target, version] = words[..] else { return false };
    let is_token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    !method.is_empty()
        && method.iter().all(is_token)
        && !target.is_empty()
        && target.iter().all(u8::is_ascii_graphic)
        && matches!(version, b"HTTP/1.1" | b"HTTP/1.0")
}

use crate::h1::parse::{self, is_authority};
use crate::h2::fuzzing::request_of;
use bytes::BytesMut;
use http::Method;
use http::uri::Authority;
use sheer_core::head::{RequestHead, Version};

/// Hosts and ports: HTTP/1, HTTP/2 and a parser that others wrote agree on what is one; the host in it is the same in
/// every spelling, and what is one goes on byte by byte.
///
/// # Panics
/// When that does not hold.
pub fn authority(input: &[u8]) {
    let fits = is_authority(input);
    let line = |name: &str| [b"GET / HTTP/1.1\r\n", name.as_bytes(), b": ", input, b"\r\n\r\n"].concat();
    let over_http1 = parse::request(&mut BytesMut::from(&line("Host")[..]), false, &mut false);
    let over_http2 =
        request_of(&[(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/"), (b":authority", input)]);
    let as_host = request_of(&[(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/"), (b"host", input)]);
    if !fits {
        // Without a host is a request that names nobody.
        let is_blank = input.trim_ascii().is_empty();
        let said = |head: Option<&RequestHead>| head.map(|it| it.authority().to_owned());
        let seen = over_http1.ok().flatten();
        let trimmed = seen.as_ref().is_some_and(|it| is_authority(it.head.authority().as_bytes()));
        // With a line's end in it, it is more than a host.
        let is_more = input.contains(&b'\n');
        assert!(seen.is_none() || is_blank || trimmed || is_more, "HTTP/1 took it");
        assert!(over_http2.is_none() || input.is_empty(), "HTTP/2 took it: {:?}", said(over_http2.as_ref()));
        assert!(as_host.is_none() || input.is_empty(), "HTTP/2 took it as a host: {:?}", said(as_host.as_ref()));
        return;
    }
    let text = std::str::from_utf8(input).expect("it is ASCII");
    let other = text.parse::<Authority>().expect("what is one here is one elsewhere");
    let heads = [over_http1.ok().flatten().map(|it| it.head), over_http2, as_host];
    for head in heads.into_iter().map(|head| head.expect("no codec refuses it")) {
        assert_eq!(head.authority(), text);
        let host = other.host();
        assert_eq!(head.host(), host.strip_suffix('.').unwrap_or(host));
        assert!(!head.host().contains(['@', '/', '?', '#', ' ', ',', '%', '\\']), "{}", head.host());
    }
    let spelled = [
        text.to_ascii_uppercase(),
        match other.port_u16() {
            None => format!("{text}:80"),
            Some(_) => text.to_owned(),
        },
    ];
    let host =
        |authority: &str| RequestHead::new(Method::GET, Version::Http11, authority, "/").host().to_ascii_lowercase();
    for other in spelled.iter().filter(|it| is_authority(it.as_bytes())) {
        assert_eq!(host(other), host(text), "{other}");
    }
}

/// Request targets: HTTP/1 and HTTP/2 take the same ones, and what is decided on is, byte by byte, what is forwarded.
/// Nothing is decoded or merged: a path has one reading because it is never read in another way than as sent.
///
/// # Panics
/// When that does not hold.
pub fn path(input: &[u8]) {
    let line = [b"GET ", input, b" HTTP/1.1\r\nHost: web\r\n\r\n"].concat();
    let over_http1 = parse::request(&mut BytesMut::from(&line[..]), false, &mut false);
    // With a line's end in it, it is more than a target.
    let over_http1 = over_http1.ok().flatten().map(|it| it.head).filter(|_| !input.contains(&b'\n'));
    let over_http2 =
        request_of(&[(b":method", b"GET"), (b":scheme", b"http"), (b":path", input), (b":authority", b"web")]);
    if !input.starts_with(b"/") {
        assert!(over_http2.is_none());
        return;
    }
    assert_eq!(over_http1.is_some(), over_http2.is_some(), "one codec takes it, the other does not");
    let plain = input.iter().all(|byte| byte.is_ascii_graphic() && *byte != b'#');
    // What is larger than a head may be is refused for that.
    assert!(over_http1.is_none() || plain);
    assert!(over_http1.is_some() || !plain || input.len() > 60_000, "a plain path is refused");
    for head in [over_http1, over_http2].into_iter().flatten() {
        assert_eq!(head.target().as_bytes(), input);
        let (path, query) = match input.iter().position(|byte| *byte == b'?') {
            Some(at) => (&input[..at], Some(&input[at + 1..])),
            None => (input, None),
        };
        assert_eq!((head.path().as_bytes(), head.query().map(str::as_bytes)), (path, query));
        let mut out = BytesMut::new();
        crate::h1::encode::request(&head, crate::body::Length::Known(0), &mut out);
        assert!(out.starts_with(&[b"GET ", input, b" HTTP/1.1\r\n"].concat()), "{}", out.escape_ascii());
    }
}

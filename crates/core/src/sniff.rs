//! What a client's first bytes are: TLS, HTTP/2, HTTP/1 or none of these. Pure: whoever has bytes may ask.

/// The first bytes of every HTTP/2 connection (RFC 9113, section 3.4).
pub const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The first byte of every TLS connection: a handshake record (RFC 8446, section 5.1).
pub const TLS_HANDSHAKE: u8 = 0x16;

/// What ALPN names begin with between proxies of the mesh.
pub const MESH_ALPN_PREFIX: &[u8] = b"sheer/1+";

/// The name of the mesh hop for bytes.
pub const MESH_ALPN_BYTES: &[u8] = b"sheer/1+tcp";

/// A first line longer than this is taken for HTTP/1 before its end, if it begins like a request line.
const MAX_LINE: usize = crate::head::MAX_HEAD_BYTES;

/// Methods whose requests servers take without a version. A text protocol whose words are the same and whose arguments
/// are paths is to be declared.
const METHODS: [&[u8]; 9] = [b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH"];

/// The most bytes of a ClientHello that are looked at. Real ones have 300 to 2,000.
const MAX_HELLO: usize = 16 * 1024;

/// What some first bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sniffed {
    /// More bytes are needed to tell.
    Partial,
    /// A TLS ClientHello.
    Tls(ClientHello),
    /// The HTTP/2 preface.
    Http2,
    /// What some server may read as a request of HTTP/1, however it is written: whether it is well-formed, the codec
    /// decides, and refuses what is not. Nobody gets a request past the mesh by writing it badly.
    Http1,
    /// Something else.
    Opaque,
}

/// What a ClientHello says in the clear.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientHello {
    /// The server name asked for, in lower case.
    pub server_name: Option<String>,
    /// A protocol of the mesh hop is offered: this is a peer's proxy and not the application's own TLS.
    pub offers_mesh: bool,
    /// Of the mesh hop's protocols the one for bytes is offered: no answer will ever be sent over this connection that
    /// the mesh itself could write.
    pub offers_mesh_bytes: bool,
}

/// Tells what a connection begins with. Adding bytes changes [`Sniffed::Partial`] alone.
pub fn sniff(bytes: &[u8]) -> Sniffed {
    match bytes.first() {
        None => Sniffed::Partial,
        Some(&TLS_HANDSHAKE) => sniff_tls(bytes),
        Some(_) if bytes.starts_with(HTTP2_PREFACE) => Sniffed::Http2,
        Some(_) if HTTP2_PREFACE.starts_with(bytes) => Sniffed::Partial,
        Some(_) => sniff_text(bytes),
    }
}

/// Servers skip empty lines before a request (RFC 9112, section 2.2), and some of them blanks.
fn sniff_text(bytes: &[u8]) -> Sniffed {
    match bytes.iter().position(|byte| !is_line_end(*byte) && !is_blank(*byte)) {
        Some(start) => sniff_request_line(&bytes[start..]),
        None if bytes.len() < MAX_LINE => Sniffed::Partial,
        None => Sniffed::Opaque,
    }
}

/// `method target HTTP/...`, whole, because text protocols begin with words and blanks as well. Servers disagree about
/// what a blank is, where the version stands and how it is written (RFC 9112, section 3, lets them split at any blank).
fn sniff_request_line(bytes: &[u8]) -> Sniffed {
    let method = bytes.iter().position(|byte| !is_token(*byte)).unwrap_or(bytes.len());
    match bytes.get(method) {
        None if bytes.len() < MAX_LINE => return Sniffed::Partial,
        Some(byte) if method > 0 && is_blank(*byte) => {}
        _ => return Sniffed::Opaque,
    }
    let (method, rest) = bytes.split_at(method);
    let is_known = METHODS.contains(&method);
    let is_path = rest.iter().find(|byte| !is_blank(**byte)) == Some(&b'/');
    // Either end of a line, and of a carriage return what follows.
    let Some(end) = rest.iter().position(|byte| is_line_end(*byte)) else {
        // Not to be let through as something unknown when it is only a bad request.
        let is_bad = is_path && rest.iter().any(|byte| is_control(*byte));
        return if bytes.len() >= MAX_LINE || is_bad { Sniffed::Http1 } else { Sniffed::Partial };
    };
    let line = &rest[..end];
    let words = line.split(|byte| is_blank(*byte)).filter(|word| !word.is_empty());
    let says_http = |word: &[u8]| word.get(..5).is_some_and(|start| start.eq_ignore_ascii_case(b"http/"));
    if words.clone().skip(1).any(says_http) || is_path && line.iter().any(|byte| is_control(*byte)) {
        return Sniffed::Http1;
    }
    let target = words.clone().next().unwrap_or_default();
    // RTSP and SIP have methods of the same names, and targets of their own.
    if is_known && (is_path || is_web(target)) {
        return Sniffed::Http1;
    }
    match words.count() {
        // Version 0.9 had neither version nor fields; some servers read fields nevertheless.
        1 if method == b"GET" => sniff_field_line(&rest[end..]),
        _ => Sniffed::Opaque,
    }
}

/// Whether a line that may be the first word of a protocol of words is followed by what may be a field.
fn sniff_field_line(bytes: &[u8]) -> Sniffed {
    let line = match bytes {
        [b'\r', b'\n', line @ ..] | [b'\n' | b'\r', line @ ..] => line,
        _ => bytes,
    };
    if bytes == b"\r" || line.is_empty() {
        return Sniffed::Partial;
    }
    match line.iter().position(|byte| !matches!(byte, b'!'..=b'9' | b';'..=b'~')) {
        None if line.len() < MAX_LINE => Sniffed::Partial,
        // A folded line, or a name, even an empty one, and its colon.
        Some(end) if line[end] == b':' || end == 0 && is_blank(line[0]) => Sniffed::Http1,
        _ if line.starts_with(b"From ") => Sniffed::Http1,
        _ => Sniffed::Opaque,
    }
}

fn is_web(target: &[u8]) -> bool {
    let scheme = target.split(|byte| *byte == b':').next().unwrap_or_default();
    scheme.len() < target.len() && (scheme.eq_ignore_ascii_case(b"http") || scheme.eq_ignore_ascii_case(b"https"))
}

fn is_line_end(byte: u8) -> bool {
    matches!(byte, b'\r' | b'\n')
}

/// What one server or another splits words at.
fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | 0x0b | 0x0c | 0x1c..=0x1f | 0x85 | 0xa0)
}

fn is_control(byte: u8) -> bool {
    byte < b' ' && !is_blank(byte) || byte == 0x7f
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

fn sniff_tls(bytes: &[u8]) -> Sniffed {
    // Handshake record, version 3.x whatever the x, which is to be ignored (RFC 8446, section 5.1), ClientHello.
    let looks = [(1, 0x03), (5, 0x01)];
    if looks.iter().any(|(at, value)| bytes.get(*at).is_some_and(|byte| byte != value)) {
        return Sniffed::Opaque;
    }
    if bytes.len() < 6 {
        return Sniffed::Partial;
    }
    match handshake(bytes) {
        Gathered::Whole(message) => Sniffed::Tls(read_hello(&message).unwrap_or_default()),
        // The handshake will say what is wrong; it is still TLS.
        Gathered::Broken => Sniffed::Tls(ClientHello::default()),
        Gathered::Partial if bytes.len() >= MAX_HELLO => Sniffed::Tls(ClientHello::default()),
        Gathered::Partial => Sniffed::Partial,
    }
}

enum Gathered {
    Whole(Vec<u8>),
    Partial,
    Broken,
}

/// The first handshake message without its header, put together from as many records as it has.
fn handshake(bytes: &[u8]) -> Gathered {
    let (mut message, mut rest) = (Vec::new(), bytes);
    loop {
        let Some((header, body)) = rest.split_at_checked(5) else { return Gathered::Partial };
        let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
        if header[0] != TLS_HANDSHAKE || length == 0 {
            return Gathered::Broken;
        }
        message.extend_from_slice(&body[..length.min(body.len())]);
        if let [_, high, middle, low, content @ ..] = message.as_slice() {
            let wanted = usize::from(*high) << 16 | usize::from(*middle) << 8 | usize::from(*low);
            if let Some(content) = content.get(..wanted) {
                return Gathered::Whole(content.to_vec());
            }
        }
        match body.get(length..) {
            Some(next) => rest = next,
            None => return Gathered::Partial,
        }
    }
}

/// Reads what is wanted of a ClientHello (RFC 8446, section 4.1.2).
fn read_hello(message: &[u8]) -> Option<ClientHello> {
    let mut reader = Reader(message);
    reader.take(2 + 32)?;
    reader.vector8()?;
    reader.vector16()?;
    reader.vector8()?;
    let mut hello = ClientHello::default();
    let mut extensions = Reader(reader.vector16()?);
    while !extensions.0.is_empty() {
        let (kind, mut content) = (extensions.u16()?, Reader(extensions.vector16()?));
        match kind {
            0 => {
                let mut names = Reader(content.vector16()?);
                // What follows a name of another kind has no known form (RFC 6066, section 3).
                while !names.0.is_empty() && names.take(1)? == [0] {
                    let name = names.vector16()?;
                    if hello.server_name.is_none() {
                        hello.server_name = host_name(name);
                    }
                }
            }
            16 => {
                let mut names = Reader(content.vector16()?);
                while !names.0.is_empty() {
                    let name = names.vector8()?;
                    hello.offers_mesh |= name.starts_with(MESH_ALPN_PREFIX);
                    hello.offers_mesh_bytes |= name == MESH_ALPN_BYTES;
                }
            }
            _ => {}
        }
    }
    Some(hello)
}

/// A name that may be routed on and written to a log: letters, digits, dots, dashes and underscores.
fn host_name(name: &[u8]) -> Option<String> {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    let text = std::str::from_utf8(name).ok()?;
    (!name.is_empty() && name.len() <= 255 && name.iter().all(plain)).then(|| text.to_ascii_lowercase())
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn vector8(&mut self) -> Option<&'a [u8]> {
        let length = usize::from(self.take(1)?[0]);
        self.take(length)
    }

    fn vector16(&mut self) -> Option<&'a [u8]> {
        let length = usize::from(self.u16()?);
        self.take(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn vector(width: usize, content: &[u8]) -> Vec<u8> {
        [&content.len().to_be_bytes()[8 - width..], content].concat()
    }

    /// A ClientHello in records of at most `record` bytes.
    fn hello(name: Option<&str>, alpn: &[&str], record: usize) -> Vec<u8> {
        let mut extensions = [vec![0, 10], vector(2, b"\0\x02\0\x1d")].concat();
        if let Some(name) = name {
            let entry = [vec![0], vector(2, name.as_bytes())].concat();
            extensions.extend([vec![0, 0], vector(2, &vector(2, &entry))].concat());
        }
        if !alpn.is_empty() {
            let names: Vec<u8> = alpn.iter().flat_map(|name| vector(1, name.as_bytes())).collect();
            extensions.extend([vec![0, 16], vector(2, &vector(2, &names))].concat());
        }
        let content = [
            vec![3, 3],
            vec![7; 32],
            vector(1, &[1; 32]),
            vector(2, &[0x13, 1]),
            vector(1, &[0]),
            vector(2, &extensions),
        ];
        let message = [vec![1], vector(3, &content.concat())].concat();
        message.chunks(record).flat_map(|chunk| [vec![0x16, 3, 1], vector(2, chunk)].concat()).collect()
    }

    fn tls(server_name: Option<&str>, offers_mesh: bool) -> Sniffed {
        let server_name = server_name.map(str::to_owned);
        Sniffed::Tls(ClientHello { server_name, offers_mesh, offers_mesh_bytes: false })
    }

    #[test]
    fn first_bytes_tell_the_protocol() {
        let cases: &[(&[u8], Sniffed)] = &[
            (b"", Sniffed::Partial),
            (b"GET / HTTP/1.1\r\n", Sniffed::Http1),
            (b"M-SEARCH * HTTP/1.0\n", Sniffed::Http1),
            (b"CONNECT a:1 HTTP/1.1\r\nHost", Sniffed::Http1),
            (b"GET / HTTP/3.7\r\n", Sniffed::Http1),
            (b"GET / HTT", Sniffed::Partial),
            (b"GE", Sniffed::Partial),
            (b"PRI * HT", Sniffed::Partial),
            (HTTP2_PREFACE, Sniffed::Http2),
            (b"PRI * HTTP/2.0\r\n\r\nXX", Sniffed::Http1),
            (b"PROPFIND / HTTP/1.1\r\n", Sniffed::Http1),
            (b"\r\n\nGET / HTTP/1.1\r\n", Sniffed::Http1),
            (b"\r\n", Sniffed::Partial),
            (b"\r\n+OK\r\n", Sniffed::Opaque),
            (b"GET /\0", Sniffed::Http1),
            (b"GET key\0\r\nx\r\n", Sniffed::Opaque),
            (b"get /key\r\n", Sniffed::Opaque),
            (b"SET /key value\r\n", Sniffed::Opaque),
            (b"GET /key value\0", Sniffed::Http1),
            (b"GET HTTP/1.1\r\nPING\r\n", Sniffed::Opaque),
            (b"PING\r\n", Sniffed::Opaque),
            (b"*1\r\n$4\r\nPING\r\n", Sniffed::Opaque),
            (b"EHLO mail.example\r\n", Sniffed::Opaque),
            (b"SSH-2.0-OpenSSH_9.2\r\n", Sniffed::Opaque),
            (b"\0\0\0\x08\x04\xd2\x16\x2f", Sniffed::Opaque),
            (b"\x80\x2e\x01\0\x02", Sniffed::Opaque),
            (b"\x16\x03", Sniffed::Partial),
            (b"\x16\x04\x01", Sniffed::Opaque),
            (b"\x16\x03\x01\0\x05\x02", Sniffed::Opaque),
            (b"\x16\x03\x01\0\x05\x01\0\0\x01\0", tls(None, false)),
            (b"\x16\x03\x7f\0\x05\x01\0\0\x01\0", tls(None, false)),
        ];
        for (bytes, expected) in cases {
            assert_eq!(sniff(bytes), *expected, "{:?}", String::from_utf8_lossy(bytes));
        }
        let endless = |start: &str| sniff(format!("{start}{}", "a".repeat(MAX_LINE)).as_bytes());
        assert_eq!((endless("GET /"), endless("FOO "), endless("")), (Sniffed::Http1, Sniffed::Http1, Sniffed::Opaque));
    }

    /// What a server that forgives much reads as a request, and a proxy that forgives nothing must not pass on.
    #[test]
    fn a_badly_written_request_is_no_opaque_one() {
        let cases: &[&[u8]] = &[
            b"GET\t/ HTTP/1.1\r\n",
            b"GET /\tHTTP/1.1\r\n",
            b"GET\x0b/\x0cHTTP/1.1\n",
            b"GET\xa0/ HTTP/1.1\r\n",
            b"GET  /  HTTP/1.1\r\n",
            b" GET / HTTP/1.1\r\n",
            b"\x1f\r\n \tGET / HTTP/1.1\r\n",
            b"GET / http/1.1\r\n",
            b"get / Http/1.1\r\n",
            b"GET / HTTP/1.1 \r\n",
            b"GET / HTTP/1.1 extra\r\n",
            b"GET key HTTP/1.1\r\n",
            b"GET / HTTP/1.1\rHost: a\r\r",
            b"GET / HTTP/\r\n",
            b"GET /\r\n",
            b"POST /path\n",
            b"GET http://web/\r\n",
            b"GET HTTP://web/ x\r\n",
            b"\r\nPRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"GET key\r\nX-Sheer-Peer: me\r\n",
            b"GET key\nX-Sheer-Peer:",
            b"GET key\n\tX-Sheer-Peer:",
            b"GET key\n:\n",
            b"GET key\nFrom me\nX-Sheer-Peer: me\n",
        ];
        for bytes in cases {
            assert_eq!(sniff(bytes), Sniffed::Http1, "{:?}", String::from_utf8_lossy(bytes));
        }
        let long = format!("{} / HTTP/1.1\r\n", "A".repeat(1000));
        let far = format!("FOO http://{} HTTP/1.1\r\n", "a".repeat(30_000));
        assert_eq!((sniff(long.as_bytes()), sniff(far.as_bytes())), (Sniffed::Http1, Sniffed::Http1));
        // Words that no server takes for a request are carried.
        for bytes in [
            &b"GET key\r\nSET a b:c\r\n"[..],
            b"GET key\r\n\r\n",
            b"GET key\nfoo\n",
            b"QUIT\r\n",
            b"OPTIONS rtsp://a/ RTSP/1.0\r\n",
            b"a b c\n",
        ] {
            assert_eq!(sniff(bytes), Sniffed::Opaque, "{:?}", String::from_utf8_lossy(bytes));
        }
        assert_eq!((sniff(b"GET key\r\n"), sniff(b"GET key\r")), (Sniffed::Partial, Sniffed::Partial));
    }

    #[test]
    fn hellos_tell_name_and_mesh() {
        assert_eq!(sniff(&hello(Some("Web.Example"), &["h2"], 4096)), tls(Some("web.example"), false));
        assert_eq!(sniff(&hello(Some("p80.web"), &["h2", "sheer/1+h1"], 1)), tls(Some("p80.web"), true));
        let bytes = ClientHello { offers_mesh: true, offers_mesh_bytes: true, ..ClientHello::default() };
        assert_eq!(sniff(&hello(None, &["sheer/1+tcp"], 4096)), Sniffed::Tls(bytes));
        assert_eq!(sniff(&hello(None, &[], 4096)), tls(None, false));
        assert_eq!(sniff(&hello(Some("a\n\"b"), &[], 4096)), tls(None, false));
        assert_eq!(
            sniff(&[&hello(None, &[], 20_000)[..5], &[1, 0, 0xff, 0xff], &[0; 20_000]].concat()),
            tls(None, false)
        );
    }

    proptest! {
        #[test]
        fn more_bytes_change_nothing_but_partial(bytes in prop_oneof![
            proptest::collection::vec(0u8.., 0..64),
            Just(hello(Some("web"), &["sheer/1+h2"], 50)),
            "[A-Z]{1,8}[ \t][ -~]{0,20}( (HTTP|http)/1.1)?\r?\n?([ -~]{0,8}\r?\n)?".prop_map(String::into_bytes),
            "GET [a-z]{1,3}\r?\n?[a-z: ]{0,4}\r?\n?".prop_map(String::into_bytes),
        ]) {
            let whole = sniff(&bytes);
            for end in 0..bytes.len() {
                let part = sniff(&bytes[..end]);
                prop_assert!(part == Sniffed::Partial || part == whole, "{:?} then {:?}", part, whole);
            }
        }
    }
}

//! Heads from bytes (RFC 9112). `httparse` finds the parts; everything it forgives is refused here, because whoever
//! stands behind this proxy may read it in another way.

use bytes::{Buf, Bytes, BytesMut};
use http::{Method, StatusCode};
use httparse::{Header, Status};
use sheer_core::cause::Cause;
use sheer_core::head::{Fields, Known, MAX_FIELDS, MAX_HEAD_BYTES, RequestHead, ResponseHead, Version, tokens};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Why a head was refused, and what its sender is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct Refusal {
    /// [`Cause::BadRequest`], [`Cause::HeadTooLarge`] or, for responses, [`Cause::BadResponse`].
    pub cause: Cause,
    /// The status sent to the client.
    pub status: StatusCode,
    /// What is wrong.
    pub detail: &'static str,
}

pub(crate) const fn bad(detail: &'static str) -> Refusal {
    Refusal { cause: Cause::BadRequest, status: StatusCode::BAD_REQUEST, detail }
}

const fn bad_response(detail: &'static str) -> Refusal {
    Refusal { cause: Cause::BadResponse, status: StatusCode::BAD_GATEWAY, detail }
}

const TOO_LARGE: Refusal = Refusal {
    cause: Cause::HeadTooLarge,
    status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
    detail: "head larger than 60 KiB or more than 100 fields",
};

/// Lines for this hop alone, which are not counted among the fields: whoever sends on a message of as many fields as
/// there may be adds a length or a coding, and says whether the connection lives on.
const HOP_LINES: usize = 4;

/// What [`FieldReader`] says of more fields than there may be.
const TOO_MANY: &str = "too many fields";

const TARGET_TOO_LONG: Refusal =
    Refusal { cause: Cause::HeadTooLarge, status: StatusCode::URI_TOO_LONG, detail: "request target too long" };

/// How the end of a body is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    None,
    Length(u64),
    Chunked,
    UntilClose,
}

/// A request head and what its connection-level fields said.
#[derive(Debug)]
pub(crate) struct ParsedRequest {
    pub(crate) head: RequestHead,
    pub(crate) framing: Framing,
    /// The client lets the connection live on.
    pub(crate) keep_alive: bool,
    /// The client waits for `100 Continue` before it sends its body.
    pub(crate) expects_continue: bool,
}

/// A response head and what its connection-level fields said.
#[derive(Debug)]
pub(crate) struct ParsedResponse {
    pub(crate) head: ResponseHead,
    pub(crate) framing: Framing,
    pub(crate) keep_alive: bool,
}

/// Takes a request head off the front of the bytes; `None` while it is incomplete. `empty_line` says whether the empty
/// line that may come before it has been taken already, and keeps it for the next call.
///
/// # Errors
/// The head is malformed, can be read in two ways, or is too large.
pub(crate) fn request(
    bytes: &mut BytesMut,
    forward_proxy: bool,
    empty_line: &mut bool,
) -> Result<Option<ParsedRequest>, Refusal> {
    if !skip_empty_line(bytes, empty_line)? {
        return Ok(None);
    }
    let mut headers = [const { MaybeUninit::uninit() }; MAX_FIELDS + HOP_LINES];
    let mut parsed = httparse::Request::new(&mut []);
    let end = match parsed.parse_with_uninit_headers(bytes, &mut headers) {
        Ok(Status::Complete(end)) if end <= MAX_HEAD_BYTES => end,
        Ok(Status::Partial) if bytes.len() <= MAX_HEAD_BYTES => return Ok(None),
        Ok(_) if memchr::memchr(b'\n', &bytes[..MAX_HEAD_BYTES]).is_none() => return Err(TARGET_TOO_LONG),
        Ok(_) => return Err(TOO_LARGE),
        Err(error) => return Err(complaint(error)),
    };
    let (Some(method), Some(target), Some(version)) = (parsed.method, parsed.path, parsed.version) else {
        return Err(bad("incomplete request line"));
    };
    let place = Place::of(bytes);
    let version = if version == 1 { Version::Http11 } else { Version::Http10 };
    let method = Method::from_bytes(method.as_bytes()).map_err(|_| bad("bad method"))?;

    let mut fields = FieldReader::new(&place);
    for header in parsed.headers.iter() {
        fields.read(header).map_err(|detail| if detail == TOO_MANY { TOO_LARGE } else { bad(detail) })?;
    }
    place.check_end(end).map_err(bad)?;

    let form = TargetForm::of(&method, target, forward_proxy)?;
    let target = place.range(target.as_bytes());
    let authority = fields.authority(version, &form, &place, target.clone())?;
    let framing = fields.request_framing(version).map_err(bad)?;
    if method == Method::CONNECT && framing != Framing::None {
        // What follows would be a body to one reader and the tunnel's first bytes to another (RFC 9110, section 9.3.6).
        return Err(bad("CONNECT with a body"));
    }
    let expects_continue = fields.expects_continue && version == Version::Http11;
    let keep_alive = fields.keep_alive(version);
    let upgrade = fields.upgrade && version == Version::Http11 && framing == Framing::None && !fields.upgrades_h2c;
    let named = std::mem::take(&mut fields.named);
    let continues = fields.expects_continue;
    let mut fields = fields.list;
    let raw = bytes.split_to(end).freeze();
    fields.lay_over(raw.clone());
    strip_hop_fields(&mut fields, &raw, &named, upgrade);
    if continues && !expects_continue {
        fields.remove_known(&[Known::Expect]);
    }
    let within = |range: Range<usize>| target.start + range.start..target.start + range.end;
    let head = match form {
        TargetForm::Origin | TargetForm::Asterisk => RequestHead::received(method, version, authority, target, fields),
        TargetForm::Authority => RequestHead::received(method, version, authority, 0..0, fields),
        TargetForm::Absolute { path: AbsolutePath::Received(path), .. } => {
            RequestHead::received(method, version, authority, within(path), fields)
        }
        TargetForm::Absolute { path: AbsolutePath::Root { query }, .. } => {
            let whole = if method == Method::OPTIONS && query.is_none() {
                "*".to_owned()
            } else {
                root(&raw, query.map(within))
            };
            let mut head = RequestHead::received(method, version, authority, 0..0, fields);
            head.set_target(&whole);
            head
        }
    };
    Ok(Some(ParsedRequest { head, framing, keep_alive, expects_continue }))
}

/// Takes a response head off the front of the bytes; `None` while it is incomplete.
///
/// # Errors
/// [`Cause::BadResponse`]: malformed, framed in two ways, or too large.
pub(crate) fn response(bytes: &mut BytesMut, method: &Method) -> Result<Option<ParsedResponse>, Refusal> {
    let mut headers = [const { MaybeUninit::uninit() }; MAX_FIELDS + HOP_LINES];
    if matches!(bytes.first(), Some(b'\r' | b'\n')) {
        return Err(bad_response("empty line before the status line"));
    }
    let mut parsed = httparse::Response::new(&mut []);
    let config = httparse::ParserConfig::default();
    let end = match config.parse_response_with_uninit_headers(&mut parsed, bytes, &mut headers) {
        Ok(Status::Complete(end)) if end <= MAX_HEAD_BYTES => end,
        Ok(Status::Partial) if bytes.len() <= MAX_HEAD_BYTES => return Ok(None),
        Ok(_) => return Err(bad_response("response head larger than 60 KiB")),
        Err(error) => return Err(bad_response(complaint(error).detail)),
    };
    let (Some(code), Some(version)) = (parsed.code, parsed.version) else {
        return Err(bad_response("incomplete status line"));
    };
    let version = if version == 1 { Version::Http11 } else { Version::Http10 };
    let status = StatusCode::from_u16(code).map_err(|_| bad_response("bad status code"))?;
    let place = Place::of(bytes);
    let mut fields = FieldReader::new(&place);
    for header in parsed.headers.iter() {
        fields.read(header).map_err(bad_response)?;
    }
    place.check_end(end).map_err(bad_response)?;
    if parsed.headers.is_empty() && bytes.get(end.wrapping_sub(4)..end) != Some(b"\r\n\r\n") {
        return Err(bad_response("line without CR"));
    }

    let framing = fields.response_framing(version, status, method).map_err(bad_response)?;
    // Who announces a body with a status that has none may send it all the same, and late.
    let contradicts = status == StatusCode::NO_CONTENT && (fields.chunked || fields.length.is_some_and(|it| it > 0));
    let keep_alive = fields.keep_alive(version) && framing != Framing::UntilClose && !contradicts;
    // 426 names protocols as well, but to say that none was chosen.
    let upgrade = matches!(status, StatusCode::SWITCHING_PROTOCOLS | StatusCode::UPGRADE_REQUIRED);
    let named = std::mem::take(&mut fields.named);
    let mut fields = fields.list;
    let raw = bytes.split_to(end).freeze();
    fields.lay_over(raw.clone());
    strip_hop_fields(&mut fields, &raw, &named, upgrade);
    let head = ResponseHead { status, version, fields };
    Ok(Some(ParsedResponse { head, framing, keep_alive }))
}

/// A recipient should skip an empty line before a request (RFC 9112, section 2.2): one, and only whole. False when
/// more bytes are needed.
fn skip_empty_line(bytes: &mut BytesMut, skipped: &mut bool) -> Result<bool, Refusal> {
    match (bytes.first(), bytes.get(1)) {
        (Some(b'\r'), Some(b'\n')) if !*skipped => {
            bytes.advance(2);
            *skipped = true;
        }
        (Some(b'\r'), None) if !*skipped => return Ok(false),
        (None, _) => return Ok(false),
        _ => {}
    }
    match bytes.first() {
        Some(b'\r' | b'\n') => Err(bad("no request line")),
        Some(_) => Ok(true),
        None => Ok(false),
    }
}

fn complaint(error: httparse::Error) -> Refusal {
    match error {
        httparse::Error::TooManyHeaders => TOO_LARGE,
        httparse::Error::HeaderName => bad("bad header name"),
        httparse::Error::HeaderValue => bad("bad header value"),
        httparse::Error::NewLine => bad("bad line end"),
        httparse::Error::Status => bad("bad status line"),
        httparse::Error::Token => bad("bad request line"),
        httparse::Error::Version => bad("unknown HTTP version"),
    }
}

/// Where the parts that `httparse` found lie in the bytes it was given.
pub(crate) struct Place<'a> {
    bytes: &'a [u8],
}

impl<'a> Place<'a> {
    pub(crate) fn of(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// The range of a part of the bytes.
    fn range(&self, part: &[u8]) -> Range<usize> {
        let start = (part.as_ptr() as usize).saturating_sub(self.bytes.as_ptr() as usize);
        start..start + part.len()
    }

    pub(crate) fn ranges(&self, header: &Header<'_>) -> (Range<usize>, Range<usize>) {
        let name = self.range(header.name.as_bytes());
        // An empty value may point anywhere.
        let value = if header.value.is_empty() { name.end..name.end } else { self.range(header.value) };
        (name, value)
    }

    /// The line before each field, and so every line but the last two, ends in CR LF. The parser allows no line feed
    /// elsewhere, so this finds every bare one.
    pub(crate) fn check_line(&self, header: &Header<'_>) -> Result<(), &'static str> {
        let start = self.range(header.name.as_bytes()).start;
        if start >= 2 && self.bytes.get(start - 2..start) != Some(b"\r\n") {
            return Err("line without CR");
        }
        Ok(())
    }

    /// The last field's line and the empty one end in CR LF.
    pub(crate) fn check_end(&self, end: usize) -> Result<(), &'static str> {
        match end.checked_sub(4).and_then(|start| self.bytes.get(start..end)) {
            Some(b"\r\n\r\n") => Ok(()),
            _ => Err("line without CR"),
        }
    }

    /// True when everything between a name and the end of its line holds no tab.
    fn free_of_tabs(&self, name_end: usize) -> bool {
        let line = self.bytes.get(name_end..).unwrap_or_default();
        let end = memchr::memchr(b'\n', line).unwrap_or(line.len());
        !line[..end].contains(&b'\t')
    }
}

/// Collects fields, and on the way what they say about this connection alone.
struct FieldReader<'a> {
    place: &'a Place<'a>,
    list: Fields,
    host: Option<Range<usize>>,
    length: Option<u64>,
    chunked: bool,
    close: bool,
    kept_alive: bool,
    upgrade: bool,
    upgrades_h2c: bool,
    expects_continue: bool,
    /// Where other fields are that `Connection` named.
    named: Vec<Range<usize>>,
}

impl<'a> FieldReader<'a> {
    fn new(place: &'a Place<'a>) -> Self {
        Self {
            place,
            list: Fields::default(),
            host: None,
            length: None,
            chunked: false,
            close: false,
            kept_alive: false,
            upgrade: false,
            upgrades_h2c: false,
            expects_continue: false,
            named: Vec::new(),
        }
    }

    fn read(&mut self, header: &Header<'_>) -> Result<(), &'static str> {
        self.place.check_line(header)?;
        let known = Known::of(header.name.as_bytes());
        let (name, mut value) = self.place.ranges(header);
        match known {
            Known::Host => only(&mut self.host, value.clone(), "more than one Host")?,
            Known::ContentLength => {
                only(&mut self.length, content_length(header.value)?, "more than one Content-Length")?;
                if !self.place.free_of_tabs(name.end) {
                    return Err("bad Content-Length");
                }
                // Some count in eights behind a zero: it goes on without.
                value.start += header.value.iter().take(header.value.len() - 1).take_while(|it| **it == b'0').count();
            }
            Known::TransferEncoding => {
                // Only this spelling: `identity`, lists, tabs and repetitions are what parsers disagree about.
                let plain = header.value.eq_ignore_ascii_case(b"chunked") && self.place.free_of_tabs(name.end);
                if !plain || self.chunked {
                    return Err("transfer encoding other than chunked");
                }
                self.chunked = true;
                return Ok(());
            }
            Known::Connection => {
                for token in tokens(header.value) {
                    match token {
                        _ if token.eq_ignore_ascii_case(b"close") => self.close = true,
                        _ if token.eq_ignore_ascii_case(b"keep-alive") => self.kept_alive = true,
                        _ if token.eq_ignore_ascii_case(b"upgrade") => self.upgrade = true,
                        _ if token.eq_ignore_ascii_case(b"te") => {}
                        _ => self.named.push(self.place.range(token)),
                    }
                }
                return Ok(());
            }
            Known::KeepAlive | Known::ProxyConnection | Known::Http2Settings => return Ok(()),
            // The only one that means something to whoever is behind us.
            Known::Te if !header.value.eq_ignore_ascii_case(b"trailers") => return Ok(()),
            Known::Upgrade => {
                self.upgrades_h2c |= tokens(header.value).any(|token| token.eq_ignore_ascii_case(b"h2c"));
            }
            Known::Expect => {
                if !header.value.eq_ignore_ascii_case(b"100-continue") {
                    return Err("unknown expectation");
                }
                self.expects_continue = true;
            }
            Known::Other if passes_for_another(header.name) => return Err("header name with an underscore"),
            _ => {}
        }
        self.list.push_parsed(known, name, value).map_err(|_| TOO_MANY)
    }

    fn keep_alive(&self, version: Version) -> bool {
        !self.close && (version == Version::Http11 || self.kept_alive)
    }

    /// RFC 9112, section 6.3, for requests.
    fn request_framing(&self, version: Version) -> Result<Framing, &'static str> {
        match (self.chunked, self.length) {
            (true, Some(_)) => Err("both Content-Length and Transfer-Encoding"),
            (true, None) if version == Version::Http10 => Err("Transfer-Encoding in HTTP/1.0"),
            (true, None) => Ok(Framing::Chunked),
            (false, None | Some(0)) => Ok(Framing::None),
            (false, Some(length)) => Ok(Framing::Length(length)),
        }
    }

    /// RFC 9112, section 6.3, for responses.
    fn response_framing(&self, version: Version, status: StatusCode, method: &Method) -> Result<Framing, &'static str> {
        match (self.chunked, self.length) {
            (true, Some(_)) => Err("both Content-Length and Transfer-Encoding"),
            (true, None) if version == Version::Http10 => Err("Transfer-Encoding in HTTP/1.0"),
            _ if has_no_body(status, method) => Ok(Framing::None),
            (true, None) => Ok(Framing::Chunked),
            (false, Some(0)) => Ok(Framing::None),
            (false, Some(length)) => Ok(Framing::Length(length)),
            (false, None) => Ok(Framing::UntilClose),
        }
    }

    /// The one authority of a request (RFC 9112, section 3.2).
    fn authority(
        &self,
        version: Version,
        form: &TargetForm,
        place: &Place<'_>,
        target: Range<usize>,
    ) -> Result<Range<usize>, Refusal> {
        if self.host.is_none() && version == Version::Http11 {
            return Err(bad("no Host"));
        }
        let host = self.host.clone().unwrap_or(0..0);
        let host_text = &place.bytes[host.clone()];
        if !host_text.is_empty() && !is_authority(host_text) {
            return Err(bad("bad Host"));
        }
        let named = match form {
            TargetForm::Origin | TargetForm::Asterisk => return Ok(host),
            TargetForm::Authority => target,
            TargetForm::Absolute { authority, .. } => target.start + authority.start..target.start + authority.end,
        };
        let named_text = &place.bytes[named.clone()];
        let same = without_default_port(named_text).eq_ignore_ascii_case(without_default_port(host_text));
        // Clients of CONNECT disagree on the port in Host; the target alone decides there.
        if self.host.is_some() && !same && !matches!(form, TargetForm::Authority) {
            return Err(bad("Host differs from the request target"));
        }
        Ok(named)
    }
}

fn only<T>(place: &mut Option<T>, value: T, complaint: &'static str) -> Result<(), &'static str> {
    if place.replace(value).is_some() { Err(complaint) } else { Ok(()) }
}

pub(crate) fn content_length(value: &[u8]) -> Result<u64, &'static str> {
    if value.is_empty() || value.len() > 19 || !value.iter().all(u8::is_ascii_digit) {
        return Err("bad Content-Length");
    }
    let length = value.iter().fold(0u64, |sum, digit| sum.wrapping_mul(10).wrapping_add(u64::from(digit - b'0')));
    // 19 digits fit; half of the range is refused because others count in signed numbers.
    if length > i64::MAX as u64 { Err("bad Content-Length") } else { Ok(length) }
}

/// Responses that end with their head, whatever it says (RFC 9110, section 6.4.1).
pub(crate) fn has_no_body(status: StatusCode, method: &Method) -> bool {
    method == Method::HEAD
        || status.is_informational()
        || status == StatusCode::NO_CONTENT
        || status == StatusCode::NOT_MODIFIED
}

/// True for names like `Transfer_Encoding`, which some servers read as the real one.
pub(crate) fn passes_for_another(name: &str) -> bool {
    if !name.contains('_') {
        return false;
    }
    let mut spelled = [0; 32];
    let Some(spelled) = spelled.get_mut(..name.len()) else { return false };
    for (to, from) in spelled.iter_mut().zip(name.bytes()) {
        *to = if from == b'_' { b'-' } else { from };
    }
    Known::of(spelled) != Known::Other || std::str::from_utf8(spelled).is_ok_and(is_mesh_field)
}

/// True for the fields with which the mesh itself speaks.
pub(crate) fn is_mesh_field(name: &str) -> bool {
    const PREFIXES: [&str; 4] = ["x-sheer-", "sheer-", "l5d-", "x-forwarded-"];
    PREFIXES.iter().any(|prefix| name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix)))
}

/// Removes what concerned only the connection it came over (RFC 9110, section 7.6.1). What `Connection` names goes
/// too, unless something behind us decides on it: no client may take those away.
fn strip_hop_fields(fields: &mut Fields, raw: &Bytes, named: &[Range<usize>], upgrade: bool) {
    if !upgrade && fields.get(Known::Upgrade).is_some() {
        fields.remove_known(&[Known::Upgrade]);
    }
    if named.is_empty() {
        return;
    }
    fields.retain(|name, _, known| {
        let kept = known != Known::Other
            || std::str::from_utf8(name).is_ok_and(|name| {
                const KEPT: [&str; 5] = ["authorization", "cookie", "forwarded", "x-real-ip", "set-cookie"];
                is_mesh_field(name) || KEPT.iter().any(|kept| name.eq_ignore_ascii_case(kept))
            });
        kept || !named.iter().any(|range| raw[range.clone()].eq_ignore_ascii_case(name))
    });
}

/// The forms of a request target (RFC 9112, section 3.2). Ranges count from the target's start.
enum TargetForm {
    Origin,
    Asterisk,
    Authority,
    Absolute { authority: Range<usize>, path: AbsolutePath },
}

enum AbsolutePath {
    Received(Range<usize>),
    /// `http://host` or `http://host?query`: the path is `/`, which no received byte says.
    Root {
        query: Option<Range<usize>>,
    },
}

impl TargetForm {
    fn of(method: &Method, target: &str, forward_proxy: bool) -> Result<Self, Refusal> {
        // A fragment never travels; bytes beyond ASCII have more than one decoding.
        if !target.is_ascii() || target.contains('#') {
            return Err(bad("bad byte in the request target"));
        }
        if method == Method::CONNECT {
            return match forward_proxy {
                true if is_authority(target.as_bytes()) && target.rfind(':') > target.rfind(']') => {
                    Ok(TargetForm::Authority)
                }
                true => Err(bad("CONNECT without host:port")),
                false => Err(Refusal {
                    cause: Cause::BadRequest,
                    status: StatusCode::METHOD_NOT_ALLOWED,
                    detail: "CONNECT to something that is no proxy",
                }),
            };
        }
        if target.starts_with('/') {
            return Ok(TargetForm::Origin);
        }
        if target == "*" && method == Method::OPTIONS {
            return Ok(TargetForm::Asterisk);
        }
        let Some(scheme) = target.get(..7).filter(|scheme| scheme.eq_ignore_ascii_case("http://")) else {
            return Err(bad("bad request target"));
        };
        let start = scheme.len();
        let end = target[start..].find(['/', '?']).map_or(target.len(), |at| start + at);
        if !is_authority(&target.as_bytes()[start..end]) {
            return Err(bad("bad authority in the request target"));
        }
        let path = match target.as_bytes().get(end) {
            Some(b'/') => AbsolutePath::Received(end..target.len()),
            Some(_) => AbsolutePath::Root { query: Some(end..target.len()) },
            None => AbsolutePath::Root { query: None },
        };
        Ok(TargetForm::Absolute { authority: start..end, path })
    }
}

/// `/` and the query that was received with its question mark.
fn root(raw: &[u8], query: Option<Range<usize>>) -> String {
    let query = query.and_then(|range| raw.get(range)).unwrap_or_default();
    format!("/{}", String::from_utf8_lossy(query))
}

/// A host and an optional port, in the one spelling that everybody reads alike: no user, no list, no escapes.
pub(crate) fn is_authority(text: &[u8]) -> bool {
    let (host, port) = match text.first() {
        Some(b'[') => {
            let Some(end) = memchr::memchr(b']', text) else { return false };
            let inside = &text[1..end];
            let address = std::str::from_utf8(inside).ok().and_then(|text| text.parse::<std::net::Ipv6Addr>().ok());
            if address.is_none() {
                return false;
            }
            (&text[..=end], &text[end + 1..])
        }
        Some(_) => {
            let end = memchr::memchr(b':', text).unwrap_or(text.len());
            let host = &text[..end];
            if !host.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')) {
                return false;
            }
            (host, &text[end..])
        }
        None => return false,
    };
    let port_fits = match port {
        [] => true,
        [b':', digits @ ..] => {
            let number = digits.iter().try_fold(0u32, |sum, digit| {
                digit.is_ascii_digit().then(|| sum.saturating_mul(10).saturating_add(u32::from(digit - b'0')))
            });
            !digits.is_empty() && number.is_some_and(|number| number <= 65_535)
        }
        _ => false,
    };
    !host.is_empty() && host.len() <= 255 && port_fits
}

fn without_default_port(authority: &[u8]) -> &[u8] {
    authority.strip_suffix(b":80").unwrap_or(authority)
}

#[cfg(test)]
mod tests;

//! Heads of requests and responses: the one canonical form on which everything is decided and which is sent on.
//!
//! A head keeps the bytes it came in, over HTTP/1 as received and over HTTP/2 as decompressed, with fields as ranges over
//! them and changes as ranges over a second buffer, so that forwarding copies nothing that did not change. Names compare
//! without regard to case and keep their spelling.

use bytes::{Bytes, BytesMut};
use http::header::HeaderValue;
use http::{Method, StatusCode};
use smallvec::SmallVec;
use std::ops::Range;

/// The most fields a head may have.
pub const MAX_FIELDS: usize = 100;

/// The most bytes a head may have, request or status line included.
pub const MAX_HEAD_BYTES: usize = 60 * 1024;

macro_rules! known_names {
    ($($variant:ident => $text:literal,)*) => {
        /// Field names that the mesh itself looks at.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        #[allow(missing_docs, reason = "each is named after its field")]
        pub enum Known { $($variant,)* /** Any other name. */ Other }

        impl Known {
            /// The lower-case name; empty for [`Known::Other`].
            pub const fn as_str(self) -> &'static str {
                match self { $(Known::$variant => $text,)* Known::Other => "" }
            }

            /// Finds the name in any spelling of case.
            pub fn of(name: &[u8]) -> Known {
                // Most fields are none of these: their length alone tells.
                const LENGTHS: u64 = 0 $(| 1 << $text.len())*;
                if name.len() >= 64 || LENGTHS & (1 << name.len()) == 0 {
                    return Known::Other;
                }
                $(if name.len() == $text.len() && name.eq_ignore_ascii_case($text.as_bytes()) { return Known::$variant; })*
                Known::Other
            }
        }
    };
}

known_names! {
    Host => "host",
    ContentLength => "content-length",
    TransferEncoding => "transfer-encoding",
    Connection => "connection",
    KeepAlive => "keep-alive",
    ProxyConnection => "proxy-connection",
    ProxyAuthorization => "proxy-authorization",
    Te => "te",
    Trailer => "trailer",
    Upgrade => "upgrade",
    Http2Settings => "http2-settings",
    Expect => "expect",
    ContentType => "content-type",
    GrpcStatus => "grpc-status",
    GrpcMessage => "grpc-message",
    GrpcTimeout => "grpc-timeout",
    RequestId => "x-request-id",
    ClientCert => "x-forwarded-client-cert",
    LinkerdClientId => "l5d-client-id",
    SheerPeer => "x-sheer-peer",
    SheerReason => "x-sheer-reason",
    SheerDrain => "sheer-drain",
    SheerHops => "x-sheer-hops",
}

/// A set of known names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KnownSet(u32);

impl KnownSet {
    /// The set of these. [`Known::Other`] is never a member.
    pub const fn of(names: &[Known]) -> Self {
        let (mut bits, mut next) = (0, 0);
        while next < names.len() {
            if !matches!(names[next], Known::Other) {
                bits |= 1 << names[next] as u32;
            }
            next += 1;
        }
        Self(bits)
    }

    /// The set with one more.
    pub const fn with(self, name: Known) -> Self {
        Self(self.0 | Self::of(&[name]).0)
    }

    /// True when the name is a member.
    pub const fn contains(self, name: Known) -> bool {
        self.0 & (1 << name as u32) != 0
    }
}

/// The head has more than [`MAX_FIELDS`] fields, or a name or value of more than 65,535 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("more than {MAX_FIELDS} header fields, or one of more than 65,535 bytes")]
pub struct TooManyFields;

#[derive(Clone, Copy, Debug, Default)]
struct Span {
    start: u32,
    len: u32,
    edited: bool,
}

/// Small, because heads are moved about: a head of ten fields is a quarter of a kilobyte.
#[derive(Clone, Copy, Debug)]
struct Field {
    name_start: u32,
    value_start: u32,
    name_len: u16,
    value_len: u16,
    known: Known,
    name_edited: bool,
    value_edited: bool,
    sensitive: bool,
}

impl Field {
    fn new(known: Known, name: Span, value: Span) -> Result<Self, TooManyFields> {
        Ok(Self {
            name_start: name.start,
            value_start: value.start,
            name_len: u16::try_from(name.len).map_err(|_| TooManyFields)?,
            value_len: u16::try_from(value.len).map_err(|_| TooManyFields)?,
            known,
            name_edited: name.edited,
            value_edited: value.edited,
            sensitive: false,
        })
    }

    fn name(&self) -> Span {
        Span { start: self.name_start, len: u32::from(self.name_len), edited: self.name_edited }
    }

    fn value(&self) -> Span {
        Span { start: self.value_start, len: u32::from(self.value_len), edited: self.value_edited }
    }
}

/// The fields of a head, in order, repeated names kept apart. Small, because heads are moved about.
#[derive(Clone, Debug, Default)]
pub struct Fields(Box<Lines>);

#[derive(Clone, Debug, Default)]
struct Lines {
    raw: Bytes,
    edits: Vec<u8>,
    list: SmallVec<[Field; 16]>,
    /// What a request is for.
    authority: Span,
    target: Span,
}

/// A field as a codec that compresses sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The name as spelled.
    pub name: &'a [u8],
    /// The value.
    pub value: &'a [u8],
    /// The name, where the mesh knows it.
    pub known: Known,
    /// Its sender asked that it never enter a compression table (RFC 7541, section 7.1.3).
    pub sensitive: bool,
    /// The value is not the one that was received.
    pub changed: bool,
}

impl Fields {
    /// Empty fields over the received bytes that [`Fields::push_received`] will point into.
    pub fn over(raw: Bytes) -> Self {
        Self(Box::new(Lines { raw, ..Lines::default() }))
    }

    /// Adds a field that lies at these ranges of the received bytes.
    ///
    /// # Errors
    /// [`TooManyFields`].
    pub fn push_received(&mut self, name: Range<usize>, value: Range<usize>) -> Result<(), TooManyFields> {
        let known = Known::of(&self.0.raw[name.clone()]);
        self.push_parsed(known, name, value)
    }

    /// Like [`Fields::push_received`], for a codec that has looked the name up already and freezes the received bytes
    /// only after all fields are found: [`Fields::lay_over`] follows.
    ///
    /// # Errors
    /// [`TooManyFields`].
    pub fn push_parsed(&mut self, known: Known, name: Range<usize>, value: Range<usize>) -> Result<(), TooManyFields> {
        self.0.push(Field::new(known, received(name), received(value))?)
    }

    /// Like [`Fields::push_parsed`], for a field whose sender asked that it never enter a compression table.
    ///
    /// # Errors
    /// [`TooManyFields`].
    pub fn push_sensitive(
        &mut self,
        known: Known,
        name: Range<usize>,
        value: Range<usize>,
    ) -> Result<(), TooManyFields> {
        let field = Field::new(known, received(name), received(value))?;
        self.0.push(Field { sensitive: true, ..field })
    }

    /// Names the received bytes into which the parsed ranges point. They must be those that were parsed: a range
    /// outside of them reads as empty.
    pub fn lay_over(&mut self, raw: Bytes) {
        self.0.raw = raw;
    }

    /// Adds a field at the end.
    ///
    /// # Errors
    /// [`TooManyFields`].
    pub fn append(&mut self, name: &str, value: &[u8]) -> Result<(), TooManyFields> {
        self.0.append(Known::of(name.as_bytes()), name, value)
    }

    /// Adds a known field at the end.
    ///
    /// # Errors
    /// [`TooManyFields`].
    pub fn append_known(&mut self, known: Known, value: &HeaderValue) -> Result<(), TooManyFields> {
        self.0.append(known, known.as_str(), value.as_bytes())
    }

    /// Gives the name this one value, in the place of the first field that has it, or at the end.
    ///
    /// # Errors
    /// [`TooManyFields`].
    pub fn set(&mut self, name: &str, value: &[u8]) -> Result<(), TooManyFields> {
        self.0.set(name, value)
    }

    /// Removes every field of this name. True when there was one.
    pub fn remove(&mut self, name: &str) -> bool {
        self.0.remove(name)
    }

    /// Removes every field of these known names. [`Known::Other`] removes nothing.
    pub fn remove_known(&mut self, names: &[Known]) {
        let names = KnownSet::of(names);
        self.0.list.retain(|field| !names.contains(field.known));
    }

    /// Keeps the fields for which the test of name, value and known name is true.
    pub fn retain(&mut self, mut keep: impl FnMut(&[u8], &[u8], Known) -> bool) {
        let Lines { raw, edits, list, .. } = &mut *self.0;
        list.retain(|field| keep(resolve(raw, edits, field.name()), resolve(raw, edits, field.value()), field.known));
    }

    /// Writes the fields as HTTP/1 lines, except those of the names to skip. Neighbours that are as they were received
    /// are copied as one range. A changed value that could end its line early is left out: no change may add a field.
    pub fn write_lines(&self, out: &mut BytesMut, skip: KnownSet) {
        self.0.write(out, skip);
    }

    /// The first value of a known name.
    pub fn get(&self, known: Known) -> Option<&[u8]> {
        self.0.list.iter().find(|field| field.known == known).map(|field| self.0.bytes(field.value()))
    }

    /// All values of a known name, in order.
    pub fn values(&self, known: Known) -> impl Iterator<Item = &[u8]> {
        self.0.list.iter().filter(move |field| field.known == known).map(|field| self.0.bytes(field.value()))
    }

    /// All values of a name, in order.
    pub fn values_of(&self, name: &str) -> impl Iterator<Item = &[u8]> {
        self.iter().filter(move |(it, _, _)| it.eq_ignore_ascii_case(name.as_bytes())).map(|(_, value, _)| value)
    }

    /// Name as spelled, value, and the known name, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8], Known)> {
        self.entries().map(|entry| (entry.name, entry.value, entry.known))
    }

    /// The fields for a codec that compresses, in order.
    pub fn entries(&self) -> impl Iterator<Item = Entry<'_>> {
        self.0.list.iter().map(|field| Entry {
            name: self.0.bytes(field.name()),
            value: self.0.bytes(field.value()),
            known: field.known,
            sensitive: field.sensitive,
            changed: field.value_edited,
        })
    }

    /// Number of fields.
    pub fn len(&self) -> usize {
        self.0.list.len()
    }

    /// True when there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// True when any value of a comma-separated field contains the token, without regard to case.
    pub fn has_token(&self, known: Known, token: &str) -> bool {
        self.values(known).any(|value| tokens(value).any(|found| found.eq_ignore_ascii_case(token.as_bytes())))
    }
}

impl Lines {
    fn is_for(&mut self, authority: &str, target: &str) {
        self.authority = self.edit(authority.as_bytes());
        self.target = self.edit(target.as_bytes());
    }

    fn append(&mut self, known: Known, name: &str, value: &[u8]) -> Result<(), TooManyFields> {
        self.edits.reserve(name.len() + value.len());
        let name = self.edit(name.as_bytes());
        let value = self.edit(value);
        self.push(Field::new(known, name, value)?)
    }

    fn set(&mut self, name: &str, value: &[u8]) -> Result<(), TooManyFields> {
        let Some(first) = self.list.iter().position(|field| self.is_named(field, name)) else {
            return self.append(Known::of(name.as_bytes()), name, value);
        };
        let span = self.edit(value);
        let field = &self.list[first];
        self.list[first] = Field { sensitive: field.sensitive, ..Field::new(field.known, field.name(), span)? };
        let mut place = 0;
        let (raw, edits) = (&self.raw, &self.edits);
        self.list.retain(|field| {
            place += 1;
            place - 1 <= first || !resolve(raw, edits, field.name()).eq_ignore_ascii_case(name.as_bytes())
        });
        Ok(())
    }

    fn remove(&mut self, name: &str) -> bool {
        let (raw, edits, before) = (&self.raw, &self.edits, self.list.len());
        self.list.retain(|field| !resolve(raw, edits, field.name()).eq_ignore_ascii_case(name.as_bytes()));
        self.list.len() != before
    }

    fn write(&self, out: &mut BytesMut, skip: KnownSet) {
        let mut run = 0..0;
        for field in &self.list {
            if skip.contains(field.known) {
                continue;
            }
            if let Some(line) = self.received_line(field) {
                if line.start != run.end {
                    out.extend_from_slice(&self.raw[run]);
                    run = line.start..line.start;
                }
                run.end = line.end;
                continue;
            }
            out.extend_from_slice(&self.raw[std::mem::replace(&mut run, 0..0)]);
            let (name, value) = (self.bytes(field.name()), self.bytes(field.value()));
            if field.value_edited && memchr::memchr3(b'\r', b'\n', 0, value).is_some() {
                continue;
            }
            write_line(out, name, value);
        }
        out.extend_from_slice(&self.raw[run]);
    }

    /// Where the whole line of an unchanged field lies, if it is spelled `name: value`.
    fn received_line(&self, field: &Field) -> Option<Range<usize>> {
        if field.name_edited || field.value_edited {
            return None;
        }
        let name_end = field.name_start as usize + usize::from(field.name_len);
        let (value_start, end) =
            (field.value_start as usize, field.value_start as usize + usize::from(field.value_len));
        let usual = value_start == name_end + 2
            && self.raw.get(name_end..value_start) == Some(b": ")
            && self.raw.get(end..end + 2) == Some(b"\r\n");
        usual.then_some(field.name_start as usize..end + 2)
    }

    fn push(&mut self, field: Field) -> Result<(), TooManyFields> {
        if self.list.len() >= MAX_FIELDS {
            return Err(TooManyFields);
        }
        self.list.push(field);
        Ok(())
    }

    fn is_named(&self, field: &Field, name: &str) -> bool {
        self.bytes(field.name()).eq_ignore_ascii_case(name.as_bytes())
    }

    fn edit(&mut self, bytes: &[u8]) -> Span {
        let start = self.edits.len() as u32;
        self.edits.extend_from_slice(bytes);
        Span { start, len: bytes.len() as u32, edited: true }
    }

    fn bytes(&self, span: Span) -> &[u8] {
        resolve(&self.raw, &self.edits, span)
    }
}

fn write_line(out: &mut BytesMut, name: &[u8], value: &[u8]) {
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

fn resolve<'a>(raw: &'a [u8], edits: &'a [u8], span: Span) -> &'a [u8] {
    let from = if span.edited { edits } else { raw };
    from.get(span.start as usize..span.start as usize + span.len as usize).unwrap_or_default()
}

fn received(range: Range<usize>) -> Span {
    Span { start: range.start as u32, len: range.len() as u32, edited: false }
}

/// The elements of a comma-separated field value, without surrounding blanks (RFC 9110, section 5.6.1).
pub fn tokens(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|byte| *byte == b',').map(|token| token.trim_ascii()).filter(|token| !token.is_empty())
}

/// The HTTP version a message arrived in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Version {
    /// HTTP/1.0.
    Http10,
    /// HTTP/1.1.
    Http11,
    /// HTTP/2.
    Http2,
}

/// `http` or `https`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "as named")]
pub enum Scheme {
    Http,
    Https,
}

/// A request's head.
#[derive(Clone, Debug)]
pub struct RequestHead {
    /// The method; its case matters.
    pub method: Method,
    /// The scheme; `http` unless the client said otherwise.
    pub scheme: Scheme,
    /// The version it arrived in, which the mesh hop keeps.
    pub version: Version,
    /// The header fields, for HTTP/1 with `Host`, for HTTP/2 without it.
    pub fields: Fields,
    path_len: u32,
}

impl RequestHead {
    /// A head over received bytes. `authority` and `target` are ranges of the bytes that `fields` lie over; the target
    /// is in origin form, or `*`, or empty for CONNECT. Both must be ASCII: the codecs refuse everything else.
    pub fn received(
        method: Method,
        version: Version,
        authority: Range<usize>,
        target: Range<usize>,
        mut fields: Fields,
    ) -> Self {
        let lines = &mut *fields.0;
        (lines.authority, lines.target) = (received(authority), received(target));
        let mut head = Self { method, scheme: Scheme::Http, version, fields, path_len: 0 };
        head.measure_path();
        head
    }

    /// A head of new parts, without fields.
    pub fn new(method: Method, version: Version, authority: &str, target: &str) -> Self {
        let mut lines = Lines::default();
        lines.is_for(authority, target);
        let fields = Fields(Box::new(lines));
        let mut head = Self { method, scheme: Scheme::Http, version, fields, path_len: 0 };
        head.measure_path();
        head
    }

    /// Host and optional port that the request is for: `Host`, the absolute target's, or `:authority`. As sent.
    pub fn authority(&self) -> &str {
        text(self.fields.0.bytes(self.fields.0.authority))
    }

    /// The authority without its port and without a trailing dot. Case as sent.
    pub fn host(&self) -> &str {
        let authority = self.authority();
        let host = match authority.rfind(']') {
            Some(end) => &authority[..=end],
            None => authority.split(':').next().unwrap_or(authority),
        };
        host.strip_suffix('.').unwrap_or(host)
    }

    /// Path and query as sent.
    pub fn target(&self) -> &str {
        text(self.fields.0.bytes(self.fields.0.target))
    }

    /// The path alone, as sent: no decoding, no merging of slashes.
    pub fn path(&self) -> &str {
        &self.target()[..self.path_len as usize]
    }

    /// What follows the first `?`.
    pub fn query(&self) -> Option<&str> {
        self.target().get(self.path_len as usize + 1..)
    }

    /// Changes the authority, and `Host` with it where the head has one.
    pub fn set_authority(&mut self, authority: &str) {
        let lines = &mut *self.fields.0;
        lines.authority = lines.edit(authority.as_bytes());
        if self.fields.get(Known::Host).is_some() {
            // The name is there, so no field is added.
            let _ = self.fields.set(Known::Host.as_str(), authority.as_bytes());
        }
    }

    /// Changes path and query.
    pub fn set_target(&mut self, target: &str) {
        let lines = &mut *self.fields.0;
        lines.target = lines.edit(target.as_bytes());
        self.measure_path();
    }

    /// True when the content type says gRPC.
    pub fn is_grpc(&self) -> bool {
        self.fields.get(Known::ContentType).is_some_and(|value| value.starts_with(b"application/grpc"))
    }

    fn measure_path(&mut self) {
        let target = self.target();
        self.path_len = target.find('?').unwrap_or(target.len()) as u32;
    }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap_or_default()
}

/// A response's head.
#[derive(Clone, Debug)]
pub struct ResponseHead {
    /// The status.
    pub status: StatusCode,
    /// The version it arrived in.
    pub version: Version,
    /// The header fields.
    pub fields: Fields,
}

impl ResponseHead {
    /// A head without fields.
    pub fn new(status: StatusCode) -> Self {
        Self { status, version: Version::Http11, fields: Fields::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> RequestHead {
        let raw = Bytes::from_static(b"GET /a/b?x=1 HTTP/1.1\r\nHost: Web:80\r\nX-A: 1\r\nx-a: 2\r\n\r\n");
        let mut fields = Fields::over(raw);
        fields.push_received(23..27, 29..35).unwrap();
        fields.push_received(37..40, 42..43).unwrap();
        fields.push_received(45..48, 50..51).unwrap();
        RequestHead::received(Method::GET, Version::Http11, 29..35, 4..12, fields)
    }

    #[test]
    fn parts_are_ranges_of_what_was_received() {
        let head = sample();
        assert_eq!((head.authority(), head.host()), ("Web:80", "Web"));
        assert_eq!((head.path(), head.query()), ("/a/b", Some("x=1")));
        assert_eq!(head.fields.values_of("x-A").collect::<Vec<_>>(), [b"1", b"2"]);
    }

    #[test]
    fn edits_leave_the_rest_alone() {
        let mut head = sample();
        head.fields.set("x-a", b"3").unwrap();
        head.fields.append("x-b", b"4").unwrap();
        head.set_authority("api");
        head.set_target("/c");
        let all: Vec<_> = head.fields.iter().map(|(name, value, _)| (text(name), text(value))).collect();
        assert_eq!(all, [("Host", "api"), ("X-A", "3"), ("x-b", "4")]);
        assert_eq!((head.path(), head.query()), ("/c", None));
        assert!(head.fields.remove("X-A") && !head.fields.remove("x-a"));
    }

    #[test]
    fn lines_are_written_as_received_except_for_what_changed() {
        let mut head = sample();
        let written = |head: &RequestHead, skip| {
            let mut out = BytesMut::new();
            head.fields.write_lines(&mut out, skip);
            String::from_utf8(out.to_vec()).unwrap()
        };
        assert_eq!(written(&head, KnownSet::default()), "Host: Web:80\r\nX-A: 1\r\nx-a: 2\r\n");
        assert_eq!(written(&head, KnownSet::of(&[Known::Host, Known::Other])), "X-A: 1\r\nx-a: 2\r\n");
        head.set_authority("api");
        head.fields.append("x-b", b"4").unwrap();
        head.fields.append("x-c", b"5\r\nx-d: 6").unwrap();
        assert_eq!(written(&head, KnownSet::default()), "Host: api\r\nX-A: 1\r\nx-a: 2\r\nx-b: 4\r\n");
    }

    #[test]
    fn what_its_sender_calls_sensitive_stays_so() {
        let mut fields = Fields::default();
        fields.push_parsed(Known::Other, 0..1, 1..2).unwrap();
        fields.push_sensitive(Known::Other, 2..3, 3..4).unwrap();
        fields.lay_over(Bytes::from_static(b"abcd"));
        let plain = Entry { name: b"a", value: b"b", known: Known::Other, sensitive: false, changed: false };
        let sensitive = Entry { name: b"c", value: b"d", known: Known::Other, sensitive: true, changed: false };
        assert_eq!(fields.clone().entries().collect::<Vec<_>>(), [plain, sensitive]);
    }

    #[test]
    fn known_names_are_found_in_any_case() {
        assert_eq!(Known::of(b"X-Forwarded-Client-CERT"), Known::ClientCert);
        assert_eq!(Known::of(b"tE"), Known::Te);
        assert_eq!((Known::of(b"accept"), Known::of(&[b'a'; 200])), (Known::Other, Known::Other));
    }

    #[test]
    fn hosts_lose_port_and_trailing_dot() {
        for (authority, host) in [("a:80", "a"), ("a.", "a"), ("[::1]:80", "[::1]"), ("[::1]", "[::1]"), ("", "")] {
            assert_eq!(RequestHead::new(Method::GET, Version::Http2, authority, "/").host(), host);
        }
    }

    #[test]
    fn fields_are_bounded() {
        let mut fields = Fields::default();
        for _ in 0..MAX_FIELDS {
            fields.append("a", b"b").unwrap();
        }
        assert_eq!(fields.append("a", b"b"), Err(TooManyFields));
    }
}

//! Heads of requests and responses: the one canonical form on which everything is decided and which is sent on.
//!
//! A head keeps the form it came in, so that forwarding copies nothing that did not change: over HTTP/1 the bytes, with
//! fields as ranges over them and changes as ranges over a second buffer; over HTTP/2 the map that its codec decoded and
//! will encode again. Names compare without regard to case and keep their spelling.

use bytes::{Bytes, BytesMut};
use http::header::{HeaderName, HeaderValue};
use http::{HeaderMap, Method, StatusCode, Uri};
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

            /// The name as the key of a map, made once.
            fn key(self) -> Option<&'static HeaderName> {
                static KEYS: [HeaderName; [$($text),*].len()] = [$(HeaderName::from_static($text)),*];
                KEYS.get(self as usize)
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

    const fn without(self, name: Known) -> Self {
        Self(self.0 & !(1 << name as u32))
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
#[derive(Clone, Debug)]
pub struct Fields(Form);

#[derive(Clone, Debug)]
enum Form {
    Lines(Box<Lines>),
    Decoded(Box<Decoded>),
}

/// Received over HTTP/1, or made here.
#[derive(Clone, Debug, Default)]
struct Lines {
    raw: Bytes,
    edits: Vec<u8>,
    list: SmallVec<[Field; 16]>,
    /// What a request is for.
    authority: Span,
    target: Span,
}

/// Received over HTTP/2.
#[derive(Clone, Debug, Default)]
struct Decoded {
    headers: HeaderMap,
    /// What a request is for.
    uri: Uri,
    /// The known names that the map has.
    known: KnownSet,
}

impl Default for Fields {
    fn default() -> Self {
        Self(Form::Lines(Box::default()))
    }
}

impl Fields {
    /// Empty fields over the received bytes that [`Fields::push_received`] will point into.
    pub fn over(raw: Bytes) -> Self {
        Self(Form::Lines(Box::new(Lines { raw, ..Lines::default() })))
    }

    /// The fields that an HTTP/2 codec has decoded. Each is shown once, with its known name, and may be refused.
    ///
    /// # Errors
    /// [`TooManyFields`], or why a field was refused.
    pub fn decoded<E: From<TooManyFields>>(
        mut headers: HeaderMap,
        mut admit: impl FnMut(Known, &str, &mut HeaderValue) -> Result<(), E>,
    ) -> Result<Self, E> {
        if headers.len() > MAX_FIELDS {
            return Err(TooManyFields.into());
        }
        let mut all = KnownSet::default();
        for (name, value) in &mut headers {
            let known = Known::of(name.as_str().as_bytes());
            all = all.with(known);
            admit(known, name.as_str(), value)?;
        }
        Ok(Self(Form::Decoded(Box::new(Decoded { headers, uri: Uri::default(), known: all }))))
    }

    /// Takes the map out for an HTTP/2 codec, when the fields are still in that form. What is left is empty.
    pub fn take_decoded(&mut self) -> Option<HeaderMap> {
        match &mut self.0 {
            Form::Lines(_) => None,
            Form::Decoded(decoded) => {
                decoded.known = KnownSet::default();
                Some(std::mem::take(&mut decoded.headers))
            }
        }
    }

    /// Adds a field that lies at these ranges of the received bytes.
    ///
    /// # Errors
    /// [`TooManyFields`].
    pub fn push_received(&mut self, name: Range<usize>, value: Range<usize>) -> Result<(), TooManyFields> {
        let lines = self.lines_mut();
        let known = Known::of(&lines.raw[name.clone()]);
        lines.push(Field::new(known, received(name), received(value))?)
    }

    /// Like [`Fields::push_received`], for a codec that has looked the name up already and freezes the received bytes
    /// only after all fields are found: [`Fields::lay_over`] follows.
    ///
    /// # Errors
    /// [`TooManyFields`].
    pub fn push_parsed(&mut self, known: Known, name: Range<usize>, value: Range<usize>) -> Result<(), TooManyFields> {
        self.lines_mut().push(Field::new(known, received(name), received(value))?)
    }

    /// Names the received bytes into which the parsed ranges point. They must be those that were parsed: a range
    /// outside of them reads as empty.
    pub fn lay_over(&mut self, raw: Bytes) {
        self.lines_mut().raw = raw;
    }

    /// Adds a field at the end.
    ///
    /// # Errors
    /// [`TooManyFields`].
    pub fn append(&mut self, name: &str, value: &[u8]) -> Result<(), TooManyFields> {
        if let Form::Decoded(decoded) = &mut self.0
            && let (Ok(key), Ok(value)) = (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_bytes(value))
        {
            return decoded.append(key, value);
        }
        self.lines_mut().append(name, value)
    }

    /// Adds a known field at the end. Its value is shared where the form allows it.
    ///
    /// # Errors
    /// [`TooManyFields`].
    pub fn append_known(&mut self, known: Known, value: &HeaderValue) -> Result<(), TooManyFields> {
        match (&mut self.0, known.key()) {
            (Form::Decoded(decoded), Some(key)) => decoded.append(key.clone(), value.clone()),
            _ => self.append(known.as_str(), value.as_bytes()),
        }
    }

    /// Gives the name this one value, in the place of the first field that has it, or at the end.
    ///
    /// # Errors
    /// [`TooManyFields`].
    pub fn set(&mut self, name: &str, value: &[u8]) -> Result<(), TooManyFields> {
        if let Form::Decoded(decoded) = &mut self.0
            && let (Ok(key), Ok(value)) = (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_bytes(value))
        {
            return decoded.set(key, value);
        }
        self.lines_mut().set(name, value)
    }

    /// Removes every field of this name. True when there was one.
    pub fn remove(&mut self, name: &str) -> bool {
        match &mut self.0 {
            Form::Lines(lines) => lines.remove(name),
            Form::Decoded(decoded) => {
                decoded.known = decoded.known.without(Known::of(name.as_bytes()));
                decoded.headers.remove(name).is_some()
            }
        }
    }

    /// Removes every field of these known names. [`Known::Other`] removes nothing.
    pub fn remove_known(&mut self, names: &[Known]) {
        match &mut self.0 {
            Form::Lines(lines) => {
                lines.list.retain(|field| field.known == Known::Other || !names.contains(&field.known));
            }
            Form::Decoded(decoded) => {
                for known in names.iter().filter(|known| decoded.known.contains(**known)) {
                    decoded.headers.remove(known.as_str());
                }
                decoded.known = names.iter().fold(decoded.known, |set, known| set.without(*known));
            }
        }
    }

    /// Keeps the fields for which the test of name, value and known name is true.
    pub fn retain(&mut self, mut keep: impl FnMut(&[u8], &[u8], Known) -> bool) {
        let Lines { raw, edits, list, .. } = self.lines_mut();
        list.retain(|field| keep(resolve(raw, edits, field.name()), resolve(raw, edits, field.value()), field.known));
    }

    /// Writes the fields as HTTP/1 lines, except those of the names to skip. Neighbours that are as they were received
    /// are copied as one range. A changed value that could end its line early is left out: no change may add a field.
    pub fn write_lines(&self, out: &mut BytesMut, skip: KnownSet) {
        match &self.0 {
            Form::Lines(lines) => lines.write(out, skip),
            Form::Decoded(_) => {
                for (name, value, _) in self.iter().filter(|(_, _, known)| !skip.contains(*known)) {
                    write_line(out, name, value);
                }
            }
        }
    }

    /// The first value of a known name.
    pub fn get(&self, known: Known) -> Option<&[u8]> {
        match &self.0 {
            Form::Lines(lines) => {
                lines.list.iter().find(|field| field.known == known).map(|field| lines.bytes(field.value()))
            }
            Form::Decoded(decoded) if decoded.known.contains(known) => {
                decoded.headers.get(known.key()?).map(HeaderValue::as_bytes)
            }
            Form::Decoded(_) => None,
        }
    }

    /// All values of a known name, in order.
    pub fn values(&self, known: Known) -> impl Iterator<Item = &[u8]> {
        self.iter().filter(move |(_, _, it)| *it == known).map(|(_, value, _)| value)
    }

    /// All values of a name, in order.
    pub fn values_of(&self, name: &str) -> impl Iterator<Item = &[u8]> {
        self.iter().filter(move |(it, _, _)| it.eq_ignore_ascii_case(name.as_bytes())).map(|(_, value, _)| value)
    }

    /// Name as spelled, value, and the known name, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8], Known)> {
        let (lines, decoded) = match &self.0 {
            Form::Lines(lines) => (Some(lines), None),
            Form::Decoded(decoded) => (None, Some(decoded)),
        };
        let lines = lines.into_iter().flat_map(|lines| {
            lines.list.iter().map(|field| (lines.bytes(field.name()), lines.bytes(field.value()), field.known))
        });
        let decoded = decoded.into_iter().flat_map(|decoded| {
            decoded.headers.iter().map(|(name, value)| {
                let name = name.as_str().as_bytes();
                (name, value.as_bytes(), Known::of(name))
            })
        });
        lines.chain(decoded)
    }

    /// Number of fields.
    pub fn len(&self) -> usize {
        match &self.0 {
            Form::Lines(lines) => lines.list.len(),
            Form::Decoded(decoded) => decoded.headers.len(),
        }
    }

    /// True when there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// True when any value of a comma-separated field contains the token, without regard to case.
    pub fn has_token(&self, known: Known, token: &str) -> bool {
        self.values(known).any(|value| tokens(value).any(|found| found.eq_ignore_ascii_case(token.as_bytes())))
    }

    /// The fields as lines, whatever form they came in.
    fn lines_mut(&mut self) -> &mut Lines {
        if let Form::Decoded(decoded) = &self.0 {
            self.0 = Form::Lines(Box::new(Lines::of(decoded)));
        }
        match &mut self.0 {
            Form::Lines(lines) => lines,
            Form::Decoded(_) => unreachable!("it has just been replaced"),
        }
    }
}

impl Decoded {
    fn authority(&self) -> &str {
        self.uri.authority().map_or("", |it| it.as_str())
    }

    fn target(&self) -> &str {
        self.uri.path_and_query().map_or("", |it| it.as_str())
    }

    fn append(&mut self, name: HeaderName, value: HeaderValue) -> Result<(), TooManyFields> {
        if self.headers.len() >= MAX_FIELDS {
            return Err(TooManyFields);
        }
        self.known = self.known.with(Known::of(name.as_str().as_bytes()));
        self.headers.try_append(name, value).map(drop).map_err(|_| TooManyFields)
    }

    fn set(&mut self, name: HeaderName, value: HeaderValue) -> Result<(), TooManyFields> {
        if self.headers.len() >= MAX_FIELDS && !self.headers.contains_key(&name) {
            return Err(TooManyFields);
        }
        self.known = self.known.with(Known::of(name.as_str().as_bytes()));
        self.headers.try_insert(name, value).map(drop).map_err(|_| TooManyFields)
    }
}

impl Lines {
    fn of(decoded: &Decoded) -> Self {
        let mut lines = Self::default();
        lines.is_for(decoded.authority(), decoded.target());
        for (name, value) in &decoded.headers {
            // They fitted into a map of as many, which holds no longer ones.
            let _ = lines.append(name.as_str(), value.as_bytes());
        }
        lines
    }

    fn is_for(&mut self, authority: &str, target: &str) {
        self.authority = self.edit(authority.as_bytes());
        self.target = self.edit(target.as_bytes());
    }

    fn append(&mut self, name: &str, value: &[u8]) -> Result<(), TooManyFields> {
        let known = Known::of(name.as_bytes());
        self.edits.reserve(name.len() + value.len());
        let name = self.edit(name.as_bytes());
        let value = self.edit(value);
        self.push(Field::new(known, name, value)?)
    }

    fn set(&mut self, name: &str, value: &[u8]) -> Result<(), TooManyFields> {
        let Some(first) = self.list.iter().position(|field| self.is_named(field, name)) else {
            return self.append(name, value);
        };
        let span = self.edit(value);
        let field = &self.list[first];
        self.list[first] = Field::new(field.known, field.name(), span)?;
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
        let lines = fields.lines_mut();
        (lines.authority, lines.target) = (received(authority), received(target));
        let mut head = Self { method, scheme: Scheme::Http, version, fields, path_len: 0 };
        head.measure_path();
        head
    }

    /// A head that an HTTP/2 codec has decoded, with [`Fields::decoded`]. The target must be ASCII.
    pub fn decoded(method: Method, uri: Uri, mut fields: Fields) -> Self {
        let scheme = if uri.scheme() == Some(&http::uri::Scheme::HTTPS) { Scheme::Https } else { Scheme::Http };
        match &mut fields.0 {
            Form::Decoded(decoded) => decoded.uri = uri,
            Form::Lines(lines) => lines.is_for(
                uri.authority().map_or("", |it| it.as_str()),
                uri.path_and_query().map_or("", |it| it.as_str()),
            ),
        }
        let mut head = Self { method, scheme, version: Version::Http2, fields, path_len: 0 };
        head.measure_path();
        head
    }

    /// A head of new parts, without fields.
    pub fn new(method: Method, version: Version, authority: &str, target: &str) -> Self {
        let mut lines = Lines::default();
        lines.is_for(authority, target);
        let fields = Fields(Form::Lines(Box::new(lines)));
        let mut head = Self { method, scheme: Scheme::Http, version, fields, path_len: 0 };
        head.measure_path();
        head
    }

    /// What was asked for as an HTTP/2 codec decoded it, when the head is still in that form.
    pub fn decoded_uri(&self) -> Option<&Uri> {
        match &self.fields.0 {
            Form::Lines(_) => None,
            Form::Decoded(decoded) => Some(&decoded.uri),
        }
    }

    /// Host and optional port that the request is for: `Host`, the absolute target's, or `:authority`. As sent.
    pub fn authority(&self) -> &str {
        match &self.fields.0 {
            Form::Lines(lines) => text(lines.bytes(lines.authority)),
            Form::Decoded(decoded) => decoded.authority(),
        }
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
        match &self.fields.0 {
            Form::Lines(lines) => text(lines.bytes(lines.target)),
            Form::Decoded(decoded) => decoded.target(),
        }
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
        let lines = self.fields.lines_mut();
        lines.authority = lines.edit(authority.as_bytes());
        if self.fields.get(Known::Host).is_some() {
            // The name is there, so no field is added.
            let _ = self.fields.set(Known::Host.as_str(), authority.as_bytes());
        }
    }

    /// Changes path and query.
    pub fn set_target(&mut self, target: &str) {
        let lines = self.fields.lines_mut();
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

    /// A head that came over HTTP/2.
    fn decoded() -> RequestHead {
        let mut headers = HeaderMap::new();
        for (name, value) in [("x-a", "1"), ("te", "trailers"), ("x-a", "2"), ("x-sheer-peer", "me")] {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        let fields = Fields::decoded(headers, |_, _, _| Ok::<_, TooManyFields>(())).unwrap();
        RequestHead::decoded(Method::GET, Uri::from_static("https://Web:80/a/b?x=1"), fields)
    }

    fn all(head: &RequestHead) -> Vec<(&str, &str)> {
        let mut all: Vec<_> = head.fields.iter().map(|(name, value, _)| (text(name), text(value))).collect();
        all.sort_by_key(|(name, _)| *name);
        all
    }

    #[test]
    fn a_decoded_head_says_the_same_as_lines() {
        let mut head = decoded();
        assert_eq!((head.authority(), head.host(), head.scheme), ("Web:80", "Web", Scheme::Https));
        assert_eq!((head.path(), head.query()), ("/a/b", Some("x=1")));
        assert_eq!(head.fields.values_of("X-A").collect::<Vec<_>>(), [b"1", b"2"]);
        assert_eq!((head.fields.get(Known::Te), head.fields.get(Known::Host)), (Some(&b"trailers"[..]), None));
        let mut lines = BytesMut::new();
        head.fields.write_lines(&mut lines, KnownSet::of(&[Known::Te, Known::SheerPeer]));
        assert_eq!(lines, "x-a: 1\r\nx-a: 2\r\n");
        // One that is changed where only lines can hold it keeps what it is for.
        head.set_target("/c");
        assert_eq!((head.authority(), head.path(), head.query()), ("Web:80", "/c", None));
        assert_eq!(all(&head), [("te", "trailers"), ("x-a", "1"), ("x-a", "2"), ("x-sheer-peer", "me")]);
        assert!(head.fields.take_decoded().is_none() && head.decoded_uri().is_none());
    }

    #[test]
    fn a_decoded_head_is_edited_as_lines_are() {
        let mut head = decoded();
        let fields = &mut head.fields;
        fields.remove_known(&[Known::SheerPeer, Known::Other, Known::ClientCert]);
        assert_eq!(fields.get(Known::SheerPeer), None);
        fields.append_known(Known::ClientCert, &HeaderValue::from_static("URI=a")).unwrap();
        fields.set("X-A", b"3").unwrap();
        fields.append("X-B", b"4").unwrap();
        assert_eq!(fields.get(Known::ClientCert), Some(&b"URI=a"[..]));
        assert!(fields.remove("Te") && !fields.remove("te"));
        assert_eq!(fields.get(Known::Te), None);
        fields.append("te", b"gzip").unwrap();
        assert_eq!(fields.get(Known::Te), Some(&b"gzip"[..]));
        fields.retain(|name, _, _| name != b"te");
        assert_eq!(all(&head), [("x-a", "3"), ("x-b", "4"), ("x-forwarded-client-cert", "URI=a")]);
    }

    #[test]
    fn decoded_fields_are_bounded() {
        let mut headers = HeaderMap::new();
        for _ in 0..MAX_FIELDS {
            headers.append("a", HeaderValue::from_static("b"));
        }
        let admit = |_: Known, _: &str, _: &mut HeaderValue| Ok(());
        let mut fields = Fields::decoded::<TooManyFields>(headers.clone(), admit).unwrap();
        assert_eq!(fields.append("a", b"b"), Err(TooManyFields));
        assert_eq!((fields.set("c", b"d"), fields.set("a", b"d")), (Err(TooManyFields), Ok(())));
        headers.append("a", HeaderValue::from_static("b"));
        assert_eq!(Fields::decoded(headers, admit).unwrap_err(), TooManyFields);
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

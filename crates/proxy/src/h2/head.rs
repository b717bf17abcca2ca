//! Heads and trailers as HTTP/2 carries them (RFC 9113, section 8): strictly read, and written.
//!
//! Nothing passes that can be read in two ways: besides what the RFC calls malformed, an authority that is more than host
//! and port or differs from `host`, a path with a fragment, two lengths, a name that passes for one on which the mesh
//! decides, and more than 100 fields or 60 KiB.

use super::frame;
use super::hpack::{Encoder, Kind, Pseudo, Received, static_status};
use crate::h1::decode::forbidden_in_trailers;
use crate::h1::parse::{content_length, is_authority};
use bytes::{Bytes, BytesMut};
use http::{Method, StatusCode};
use sheer_core::head::{
    Fields, Known, KnownSet, MAX_FIELDS, MAX_HEAD_BYTES, RequestHead, ResponseHead, Scheme, Version,
};
use std::ops::Range;

/// Fields that belong to an HTTP/1 connection (RFC 9113, section 8.2.2), and the one that `:authority` stands for.
const NOT_IN_HTTP2: KnownSet = KnownSet::of(&[
    Known::Connection,
    Known::KeepAlive,
    Known::ProxyConnection,
    Known::TransferEncoding,
    Known::Upgrade,
    Known::Http2Settings,
    Known::Host,
]);

/// What a field counts beside its bytes (RFC 9113, section 10.5.1).
const FIELD_OVERHEAD: usize = 32;

/// Why a head is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// Malformed, or to be read in two ways.
    Malformed(&'static str),
    /// More than 100 fields or 60 KiB.
    TooLarge,
    /// CONNECT, to something that is no proxy.
    Connect,
}

/// What a field block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Request,
    Response,
    Trailers,
}

/// Collects the fields of one block as they are decompressed.
pub(super) struct Reader<'a> {
    part: Part,
    /// It comes from a client.
    strict: bool,
    /// All names and values that count, one behind the other.
    raw: &'a mut Vec<u8>,
    fields: Fields,
    method: Option<Method>,
    scheme: Option<Scheme>,
    authority: Option<Range<usize>>,
    path: Option<Range<usize>>,
    host: Option<Range<usize>>,
    status: Option<StatusCode>,
    length: Option<u64>,
    count: usize,
    size: usize,
    /// A field came: no pseudo-field may follow.
    begun: bool,
    refused: Option<Refused>,
}

impl<'a> Reader<'a> {
    /// Reads into this memory, which is used again for the next block.
    pub(super) fn new(part: Part, strict: bool, raw: &'a mut Vec<u8>) -> Self {
        raw.clear();
        Self {
            part,
            strict,
            raw,
            fields: Fields::default(),
            method: None,
            scheme: None,
            authority: None,
            path: None,
            host: None,
            status: None,
            length: None,
            count: 0,
            size: 0,
            begun: false,
            refused: None,
        }
    }

    /// Takes the next field. What follows a reason to refuse is not kept.
    pub(super) fn field(&mut self, field: Received<'_>) {
        if self.refused.is_none() {
            self.refused = self.read(field).err();
        }
    }

    fn read(&mut self, field: Received<'_>) -> Result<(), Refused> {
        self.count += 1;
        self.size += field.name.len() + field.value.len() + FIELD_OVERHEAD;
        if self.size > MAX_HEAD_BYTES || self.count > MAX_FIELDS {
            return Err(Refused::TooLarge);
        }
        if !field.is_value {
            return Err(Refused::Malformed("bad byte in a value"));
        }
        // Blanks around a value belong to nobody (section 8.2.1). Servers send them all the same, and gRPC's messages
        // may have them.
        let value = field.value.trim_ascii();
        let is_message = field.kind == Kind::Field(Known::GrpcMessage);
        if value.len() < field.value.len() && self.strict && !is_message {
            return Err(Refused::Malformed("blanks around a value"));
        }
        match field.kind {
            Kind::Malformed => Err(Refused::Malformed("bad field name")),
            Kind::Disguised if self.part == Part::Trailers => Ok(()),
            Kind::Disguised => Err(Refused::Malformed("field name with an underscore")),
            Kind::Pseudo(pseudo) => {
                self.count -= 1;
                self.pseudo(pseudo, value)
            }
            Kind::Field(known) => {
                self.begun = true;
                self.regular(known, field.name, value, field.sensitive)
            }
        }
    }

    fn pseudo(&mut self, pseudo: Pseudo, value: &[u8]) -> Result<(), Refused> {
        const TWICE: Refused = Refused::Malformed("pseudo-field twice");
        let fits = match pseudo {
            Pseudo::Method | Pseudo::Scheme | Pseudo::Authority | Pseudo::Path => self.part == Part::Request,
            Pseudo::Status => self.part == Part::Response,
        };
        if self.begun || !fits {
            return Err(Refused::Malformed("pseudo-field out of place"));
        }
        match pseudo {
            Pseudo::Method => {
                let method = Method::from_bytes(value).map_err(|_| Refused::Malformed("bad method"))?;
                once(&mut self.method, method, TWICE)
            }
            Pseudo::Scheme => {
                let scheme = match value {
                    b"http" => Scheme::Http,
                    b"https" => Scheme::Https,
                    _ => return Err(Refused::Malformed("unknown scheme")),
                };
                once(&mut self.scheme, scheme, TWICE)
            }
            Pseudo::Authority => {
                let place = self.keep(value);
                once(&mut self.authority, place, TWICE)
            }
            Pseudo::Path => {
                let place = self.keep(value);
                once(&mut self.path, place, TWICE)
            }
            Pseudo::Status => {
                let status = StatusCode::from_bytes(value).map_err(|_| Refused::Malformed("bad status"))?;
                // Nothing switches protocols in HTTP/2 (section 8.6).
                if status == StatusCode::SWITCHING_PROTOCOLS {
                    return Err(Refused::Malformed("status 101"));
                }
                once(&mut self.status, status, TWICE)
            }
        }
    }

    fn regular(&mut self, known: Known, name: &[u8], value: &[u8], sensitive: bool) -> Result<(), Refused> {
        match known {
            Known::Connection
            | Known::KeepAlive
            | Known::ProxyConnection
            | Known::TransferEncoding
            | Known::Upgrade => return Err(Refused::Malformed("field of an HTTP/1 connection")),
            Known::Te if value != b"trailers" => return Err(Refused::Malformed("te other than trailers")),
            Known::Http2Settings => return Ok(()),
            Known::Host if self.part == Part::Request => {
                let place = self.keep(value);
                return once(&mut self.host, place, Refused::Malformed("host twice"));
            }
            Known::ContentLength if self.part != Part::Trailers => {
                let length = content_length(value).map_err(Refused::Malformed)?;
                once(&mut self.length, length, Refused::Malformed("content-length twice"))?;
            }
            _ => {}
        }
        if self.part == Part::Trailers && std::str::from_utf8(name).is_ok_and(|name| forbidden_in_trailers(known, name))
        {
            return Ok(());
        }
        let (name, value) = (self.keep(name), self.keep(value));
        let pushed = match sensitive {
            false => self.fields.push_parsed(known, name, value),
            true => self.fields.push_sensitive(known, name, value),
        };
        pushed.map_err(|_| Refused::TooLarge)
    }

    fn keep(&mut self, bytes: &[u8]) -> Range<usize> {
        let start = self.raw.len();
        self.raw.extend_from_slice(bytes);
        start..self.raw.len()
    }

    /// The fields over memory of their own, which they share with nobody.
    fn fields(&mut self) -> Fields {
        let mut fields = std::mem::take(&mut self.fields);
        fields.lay_over(Bytes::copy_from_slice(self.raw));
        fields
    }

    /// What the block takes up decompressed, in bytes.
    pub(super) fn size(&self) -> usize {
        self.size.min(MAX_HEAD_BYTES)
    }

    /// What `content-length` said.
    pub(super) fn length(&self) -> Option<u64> {
        self.length
    }

    /// The request's head.
    ///
    /// # Errors
    /// Why it is refused.
    pub(super) fn request(&mut self) -> Result<RequestHead, Refused> {
        if let Some(refused) = self.refused {
            return Err(refused);
        }
        let method = self.method.take().ok_or(Refused::Malformed("no method"))?;
        if method == Method::CONNECT {
            // What it must have and must not (section 8.5).
            let is_whole = self.authority.is_some() && self.scheme.is_none() && self.path.is_none();
            return Err(if is_whole { Refused::Connect } else { Refused::Malformed("bad CONNECT") });
        }
        let scheme = self.scheme.ok_or(Refused::Malformed("no scheme"))?;
        let path = self.path.take().ok_or(Refused::Malformed("no path"))?;
        check_path(&method, &self.raw[path.clone()])?;
        let (authority, host) = (self.authority.take(), self.host.take());
        for given in [&authority, &host].into_iter().flatten() {
            if !given.is_empty() && !is_authority(&self.raw[given.clone()]) {
                return Err(Refused::Malformed("bad authority"));
            }
        }
        let authority = match (authority, host) {
            (Some(authority), Some(host))
                if !self.raw[authority.clone()].eq_ignore_ascii_case(&self.raw[host.clone()]) =>
            {
                return Err(Refused::Malformed("host differs from the authority"));
            }
            (Some(authority), _) | (None, Some(authority)) => authority,
            (None, None) => 0..0,
        };
        let mut head = RequestHead::received(method, Version::Http2, authority, path, self.fields());
        head.scheme = scheme;
        Ok(head)
    }

    /// The response's head.
    ///
    /// # Errors
    /// Why it is refused.
    pub(super) fn response(&mut self) -> Result<ResponseHead, Refused> {
        if let Some(refused) = self.refused {
            return Err(refused);
        }
        let status = self.status.ok_or(Refused::Malformed("no status"))?;
        Ok(ResponseHead { status, version: Version::Http2, fields: self.fields() })
    }

    /// Trailers, without the fields that mean nothing there.
    ///
    /// # Errors
    /// Why they are refused.
    pub(super) fn trailers(&mut self) -> Result<Fields, Refused> {
        match self.refused {
            Some(refused) => Err(refused),
            None => Ok(self.fields()),
        }
    }
}

fn once<T>(place: &mut Option<T>, value: T, twice: Refused) -> Result<(), Refused> {
    if place.replace(value).is_some() { Err(twice) } else { Ok(()) }
}

/// Path and query: origin form, or `*` for OPTIONS. A fragment never travels; bytes beyond ASCII have more than one
/// decoding.
fn check_path(method: &Method, path: &[u8]) -> Result<(), Refused> {
    match path {
        b"*" if *method == Method::OPTIONS => Ok(()),
        [b'/', ..] if path.iter().all(|byte| byte.is_ascii_graphic() && *byte != b'#') => Ok(()),
        _ => Err(Refused::Malformed("bad path")),
    }
}

/// Appends a request's head in frames of its own. True when the stream ends with it.
pub(super) fn write_request(head: &RequestHead, stream: u32, flags: u8, encoder: &mut Encoder, out: &mut BytesMut) {
    write(stream, flags, encoder, out, |encoder, out| {
        match head.method {
            Method::GET => encoder.indexed(2, out),
            Method::POST => encoder.indexed(3, out),
            _ => encoder.field(b":method", head.method.as_str().as_bytes(), false, out),
        }
        let (authority, target) = (head.authority(), head.target());
        encoder.indexed(if head.scheme == Scheme::Http { 6 } else { 7 }, out);
        if !authority.is_empty() {
            encoder.field(b":authority", authority.as_bytes(), false, out);
        }
        match target {
            "/" => encoder.indexed(4, out),
            _ => encoder.field(b":path", target.as_bytes(), false, out),
        }
        write_fields(&head.fields, encoder, out);
    });
}

/// Appends a response's head in frames of its own.
pub(super) fn write_response(head: &ResponseHead, stream: u32, flags: u8, encoder: &mut Encoder, out: &mut BytesMut) {
    write(stream, flags, encoder, out, |encoder, out| {
        match static_status(head.status.as_u16()) {
            Some(index) => encoder.indexed(index, out),
            None => encoder.field(b":status", head.status.as_str().as_bytes(), false, out),
        }
        write_fields(&head.fields, encoder, out);
    });
}

/// Appends trailers, with which the stream ends.
pub(super) fn write_trailers(fields: &Fields, stream: u32, encoder: &mut Encoder, out: &mut BytesMut) {
    write(stream, frame::END_STREAM, encoder, out, |encoder, out| write_fields(fields, encoder, out));
}

fn write(
    stream: u32,
    flags: u8,
    encoder: &mut Encoder,
    out: &mut BytesMut,
    block: impl FnOnce(&mut Encoder, &mut BytesMut),
) {
    let at = out.len();
    out.extend_from_slice(&[0; frame::HEADER]);
    encoder.begin(out);
    block(encoder, out);
    frame::frame_block(stream, flags, at, out);
}

/// Fields without those that have no place in HTTP/2. A changed value that could be read as more than one is left out.
fn write_fields(fields: &Fields, encoder: &mut Encoder, out: &mut BytesMut) {
    for field in fields.entries() {
        if NOT_IN_HTTP2.contains(field.known)
            || field.known == Known::Te && !field.value.trim_ascii().eq_ignore_ascii_case(b"trailers")
            || field.changed && memchr::memchr3(b'\r', b'\n', 0, field.value).is_some()
        {
            continue;
        }
        if field.name.iter().any(u8::is_ascii_uppercase) {
            encoder.field(&field.name.to_ascii_lowercase(), field.value, field.sensitive, out);
        } else {
            encoder.field(field.name, field.value, field.sensitive, out);
        }
    }
}

#[cfg(test)]
mod tests;

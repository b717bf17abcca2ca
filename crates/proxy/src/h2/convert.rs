//! Heads between the `h2` crate's form and ours.
//!
//! The crate has already refused upper-case names, repeated or misplaced pseudo-fields, connection-specific fields and
//! a `te` other than `trailers` (RFC 9113, section 8.2). Refused here: an authority that is more than host and port or
//! differs from `host`, a path that is none, lengths with two readings, names that pass for the mesh's own, CONNECT, and
//! more than 100 fields. The crate cuts a fragment off a path: it reaches nobody, and nothing is decided on it.

use crate::h1::decode::forbidden_in_trailers;
use crate::h1::parse::{content_length, is_authority, passes_for_another};
use bytes::{BufMut, BytesMut};
use http::header::{HeaderName, HeaderValue};
use http::{HeaderMap, Method, Uri};
use sheer_core::head::{Fields, Known, RequestHead, ResponseHead, Scheme, TooManyFields, Version};

/// Why a head is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// Malformed, or to be read in two ways.
    Malformed,
    /// More than 100 fields.
    TooManyFields,
    /// CONNECT, to something that is no proxy.
    Connect,
}

impl From<TooManyFields> for Refused {
    fn from(_: TooManyFields) -> Self {
        Refused::TooManyFields
    }
}

/// Reads a request's head.
pub(super) fn request_of(parts: &http::request::Parts) -> Result<RequestHead, Refused> {
    if parts.method == Method::CONNECT {
        return Err(Refused::Connect);
    }
    let host = one_host(&parts.headers)?;
    let authority = match (parts.uri.authority().map(|it| it.as_str()), host) {
        (Some(authority), Some(host)) if !authority.eq_ignore_ascii_case(host) => return Err(Refused::Malformed),
        (Some(authority), _) => authority,
        (None, Some(host)) => host,
        (None, None) => "",
    };
    if !authority.is_empty() && !is_authority(authority.as_bytes()) {
        return Err(Refused::Malformed);
    }
    if parts.uri.scheme_str().is_some_and(|scheme| !matches!(scheme, "http" | "https")) {
        return Err(Refused::Malformed);
    }
    let target = target_of(parts)?;
    let mut raw = BytesMut::with_capacity(authority.len() + target.len() + capacity_for(&parts.headers));
    raw.put_slice(authority.as_bytes());
    raw.put_slice(target.as_bytes());
    let target = authority.len()..raw.len();
    let fields = read_fields(raw, &parts.headers, |known, name| Ok(unambiguous(known, name)? != Known::Host))?;
    let mut head = RequestHead::received(parts.method.clone(), Version::Http2, 0..target.start, target, fields);
    if parts.uri.scheme() == Some(&http::uri::Scheme::HTTPS) {
        head.scheme = Scheme::Https;
    }
    Ok(head)
}

/// Path and query: origin form, or `*` for OPTIONS.
fn target_of(parts: &http::request::Parts) -> Result<&str, Refused> {
    let target = parts.uri.path_and_query().map_or("", |it| it.as_str());
    match target {
        "*" if parts.method == Method::OPTIONS => Ok(target),
        _ if target.starts_with('/') && target.bytes().all(|byte| byte.is_ascii_graphic()) => Ok(target),
        _ => Err(Refused::Malformed),
    }
}

fn one_host(headers: &HeaderMap) -> Result<Option<&str>, Refused> {
    let mut all = headers.get_all(http::header::HOST).iter();
    match (all.next(), all.next()) {
        (None, _) => Ok(None),
        (Some(host), None) => host.to_str().map(Some).map_err(|_| Refused::Malformed),
        (Some(_), Some(_)) => Err(Refused::Malformed),
    }
}

/// Reads a response's head.
pub(super) fn response_of(parts: &http::response::Parts) -> Result<ResponseHead, Refused> {
    let mut head = ResponseHead::new(parts.status);
    head.version = Version::Http2;
    let wanted = |known, name: &str| unambiguous(known, name).map(|_| true);
    head.fields = read_fields(room_for(&parts.headers), &parts.headers, wanted)?;
    Ok(head)
}

/// Reads trailers, without the fields that mean nothing there.
pub(super) fn trailers_of(headers: &HeaderMap) -> Result<Fields, Refused> {
    read_fields(room_for(headers), headers, |known, name| Ok(!forbidden_in_trailers(known, name)))
}

/// The name, unless it passes for another one.
fn unambiguous(known: Known, name: &str) -> Result<Known, Refused> {
    if known == Known::Other && passes_for_another(name) { Err(Refused::Malformed) } else { Ok(known) }
}

fn room_for(headers: &HeaderMap) -> BytesMut {
    BytesMut::with_capacity(capacity_for(headers))
}

/// Room for as many usual fields.
fn capacity_for(headers: &HeaderMap) -> usize {
    headers.len() * 48
}

/// Lays the fields that are wanted behind what is there already.
fn read_fields(
    mut raw: BytesMut,
    headers: &HeaderMap,
    wanted: impl Fn(Known, &str) -> Result<bool, Refused>,
) -> Result<Fields, Refused> {
    let mut fields = Fields::default();
    let mut sized = false;
    for (name, value) in headers {
        let known = Known::of(name.as_str().as_bytes());
        if !wanted(known, name.as_str())? {
            continue;
        }
        if known == Known::ContentLength {
            content_length(value.as_bytes()).map_err(|_| Refused::Malformed)?;
            if std::mem::replace(&mut sized, true) {
                return Err(Refused::Malformed);
            }
        }
        let start = raw.len();
        raw.put_slice(name.as_str().as_bytes());
        let name_end = raw.len();
        // Blanks around a value belong to nobody (RFC 9113, section 8.2.1); gRPC messages have them all the same.
        raw.put_slice(value.as_bytes().trim_ascii());
        fields.push_parsed(known, start..name_end, name_end..raw.len())?;
    }
    fields.lay_over(raw.freeze());
    Ok(fields)
}

/// Writes a request's head for the `h2` crate.
pub(super) fn to_request(head: &RequestHead) -> Result<http::Request<()>, Refused> {
    let scheme = match head.scheme {
        Scheme::Http => http::uri::Scheme::HTTP,
        Scheme::Https => http::uri::Scheme::HTTPS,
    };
    let mut uri = http::uri::Parts::default();
    if !head.authority().is_empty() {
        uri.authority =
            Some(http::uri::Authority::from_maybe_shared(head.shared_authority()).map_err(|_| Refused::Malformed)?);
    }
    if head.method != Method::CONNECT {
        uri.path_and_query =
            Some(http::uri::PathAndQuery::from_maybe_shared(head.shared_target()).map_err(|_| Refused::Malformed)?);
        if uri.authority.is_some() {
            uri.scheme = Some(scheme);
        }
    }
    let mut request = http::Request::new(());
    *request.method_mut() = head.method.clone();
    *request.version_mut() = http::Version::HTTP_2;
    *request.uri_mut() = Uri::from_parts(uri).map_err(|_| Refused::Malformed)?;
    *request.headers_mut() = to_headers(&head.fields)?;
    Ok(request)
}

/// Writes a response's head for the `h2` crate.
pub(super) fn to_response(head: &ResponseHead) -> Result<http::Response<()>, Refused> {
    let mut response = http::Response::new(());
    *response.status_mut() = head.status;
    *response.version_mut() = http::Version::HTTP_2;
    *response.headers_mut() = to_headers(&head.fields)?;
    Ok(response)
}

/// Writes fields, without those that belong to an HTTP/1 connection (RFC 9113, section 8.2.2).
pub(super) fn to_headers(fields: &Fields) -> Result<HeaderMap, Refused> {
    let mut headers = HeaderMap::with_capacity(fields.len());
    for (name, value, known) in fields.iter_shared() {
        match known {
            Known::Connection
            | Known::KeepAlive
            | Known::ProxyConnection
            | Known::TransferEncoding
            | Known::Upgrade
            | Known::Http2Settings
            | Known::Host => continue,
            Known::Te if !value.trim_ascii().eq_ignore_ascii_case(b"trailers") => continue,
            _ => {}
        }
        let name = HeaderName::from_bytes(name).map_err(|_| Refused::Malformed)?;
        let value = HeaderValue::from_maybe_shared(value).map_err(|_| Refused::Malformed)?;
        headers.append(name, value);
    }
    Ok(headers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(uri: &str, headers: &[(&str, &str)]) -> http::request::Parts {
        let mut builder = http::Request::builder().method("GET").uri(uri);
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        builder.body(()).unwrap().into_parts().0
    }

    #[test]
    fn heads_survive_the_round_trip() {
        let head = request_of(&parts("http://web:80/a/b?c=d", &[("x-a", "1"), ("x-b", "2"), ("x-a", "3")])).unwrap();
        assert_eq!((head.authority(), head.path(), head.query()), ("web:80", "/a/b", Some("c=d")));
        let back = to_request(&head).unwrap();
        assert_eq!(back.uri(), "http://web:80/a/b?c=d");
        assert_eq!(back.headers().get_all("x-a").iter().collect::<Vec<_>>(), ["1", "3"]);
    }

    #[test]
    fn what_can_be_read_in_two_ways_is_refused() {
        for (uri, headers) in [
            ("http://web/", &[("host", "other")][..]),
            ("http://web/", &[("host", "web"), ("host", "web")]),
            ("http://user@web/", &[]),
            ("/", &[("host", "a,b")]),
            ("/", &[("host", "a;b")]),
            ("/", &[("host", "a:")]),
            ("ftp://web/", &[]),
            ("http://web/", &[("content-length", "3"), ("content-length", "5")]),
            ("http://web/", &[("content-length", "+3")]),
            ("http://web/", &[("content-length", "")]),
            ("http://web/", &[("content_length", "3")]),
            ("http://web/", &[("x_forwarded_client_cert", "a")]),
            ("http://web/", &[("x-sheer_peer", "a")]),
        ] {
            assert_eq!(request_of(&parts(uri, headers)).unwrap_err(), Refused::Malformed, "{uri} {headers:?}");
        }
        assert_eq!(request_of(&parts("http://web/", &[("host", "WEB")])).unwrap().authority(), "web");
    }

    #[test]
    fn fields_of_a_connection_are_left_behind() {
        let mut fields = Fields::default();
        for (name, value) in [("Connection", "close"), ("te", "trailers"), ("TE", "gzip"), ("X-Kept", "1")] {
            fields.append(name, value.as_bytes()).unwrap();
        }
        let headers = to_headers(&fields).unwrap();
        assert_eq!(headers.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["te", "x-kept"]);
    }
}

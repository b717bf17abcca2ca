//! Heads between the `h2` crate's form and ours.
//!
//! What came over HTTP/2 stays in the crate's form all the way through, so that nothing is copied that did not change.
//! The crate has already refused upper-case names, repeated or misplaced pseudo-fields, connection-specific fields and
//! a `te` other than `trailers` (RFC 9113, section 8.2). Refused here: an authority that is more than host and port or
//! differs from `host`, a path that is none, lengths with two readings, names that pass for the mesh's own, CONNECT, and
//! more than 100 fields. The crate cuts a fragment off a path: it reaches nobody, and nothing is decided on it.

use crate::h1::decode::forbidden_in_trailers;
use crate::h1::parse::{content_length, is_authority, passes_for_another};
use http::header::{HOST, HeaderName, HeaderValue};
use http::uri::{Authority, PathAndQuery};
use http::{HeaderMap, Method, Uri};
use sheer_core::head::{Fields, Known, RequestHead, ResponseHead, Scheme, TooManyFields, Version};

/// Fields that belong to an HTTP/1 connection (RFC 9113, section 8.2.2), and the one that `:authority` stands for.
const NOT_IN_HTTP2: &[Known] = &[
    Known::Connection,
    Known::KeepAlive,
    Known::ProxyConnection,
    Known::TransferEncoding,
    Known::Upgrade,
    Known::Http2Settings,
    Known::Host,
];

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
pub(super) fn request_of(parts: http::request::Parts) -> Result<RequestHead, Refused> {
    let http::request::Parts { method, mut uri, headers, .. } = parts;
    if method == Method::CONNECT {
        return Err(Refused::Connect);
    }
    let host = one_host(&headers)?;
    let authority = match (uri.authority().map(Authority::as_str), host) {
        (Some(authority), Some(host)) if !authority.eq_ignore_ascii_case(host) => return Err(Refused::Malformed),
        (Some(authority), _) => authority,
        (None, Some(host)) => host,
        (None, None) => "",
    };
    if !authority.is_empty() && !is_authority(authority.as_bytes()) {
        return Err(Refused::Malformed);
    }
    if uri.scheme_str().is_some_and(|scheme| !matches!(scheme, "http" | "https")) {
        return Err(Refused::Malformed);
    }
    check_target(&method, &uri)?;
    if uri.authority().is_none() && !authority.is_empty() {
        let authority = authority.parse().map_err(|_| Refused::Malformed)?;
        uri = with_authority(uri, authority)?;
    }
    let mut head = RequestHead::decoded(method, uri, read_fields(headers, unambiguous)?);
    head.fields.remove_known(&[Known::Host]);
    Ok(head)
}

fn with_authority(uri: Uri, authority: Authority) -> Result<Uri, Refused> {
    let mut parts = uri.into_parts();
    parts.authority = Some(authority);
    parts.scheme.get_or_insert(http::uri::Scheme::HTTP);
    Uri::from_parts(parts).map_err(|_| Refused::Malformed)
}

/// Path and query: origin form, or `*` for OPTIONS.
fn check_target(method: &Method, uri: &Uri) -> Result<(), Refused> {
    let target = uri.path_and_query().map_or("", PathAndQuery::as_str);
    match target {
        "*" if *method == Method::OPTIONS => Ok(()),
        _ if target.starts_with('/') && target.bytes().all(|byte| byte.is_ascii_graphic()) => Ok(()),
        _ => Err(Refused::Malformed),
    }
}

fn one_host(headers: &HeaderMap) -> Result<Option<&str>, Refused> {
    let mut all = headers.get_all(HOST).iter();
    match (all.next(), all.next()) {
        (None, _) => Ok(None),
        (Some(host), None) => host.to_str().map(Some).map_err(|_| Refused::Malformed),
        (Some(_), Some(_)) => Err(Refused::Malformed),
    }
}

/// Reads a response's head.
pub(super) fn response_of(parts: http::response::Parts) -> Result<ResponseHead, Refused> {
    let fields = read_fields(parts.headers, unambiguous)?;
    Ok(ResponseHead { status: parts.status, version: Version::Http2, fields })
}

/// Reads trailers, without the fields that mean nothing there.
pub(super) fn trailers_of(headers: HeaderMap) -> Result<Fields, Refused> {
    let mut meaningless = false;
    let mut fields = read_fields(headers, |known, name| {
        meaningless |= forbidden_in_trailers(known, name);
        Ok(())
    })?;
    if meaningless {
        fields.retain(|name, _, known| std::str::from_utf8(name).is_ok_and(|name| !forbidden_in_trailers(known, name)));
    }
    Ok(fields)
}

/// Refuses a name that passes for another one.
fn unambiguous(known: Known, name: &str) -> Result<(), Refused> {
    if known == Known::Other && passes_for_another(name) { Err(Refused::Malformed) } else { Ok(()) }
}

/// Takes the fields as they are decoded.
fn read_fields(
    headers: HeaderMap,
    mut admit: impl FnMut(Known, &str) -> Result<(), Refused>,
) -> Result<Fields, Refused> {
    let mut sized = false;
    Fields::decoded(headers, |known, name, value| {
        admit(known, name)?;
        if known == Known::ContentLength {
            content_length(value.as_bytes()).map_err(|_| Refused::Malformed)?;
            if std::mem::replace(&mut sized, true) {
                return Err(Refused::Malformed);
            }
        }
        // Blanks around a value belong to nobody (RFC 9113, section 8.2.1); gRPC messages have them all the same.
        let trimmed = value.as_bytes().trim_ascii();
        if trimmed.len() < value.len() {
            *value = HeaderValue::from_bytes(trimmed).map_err(|_| Refused::Malformed)?;
        }
        Ok(())
    })
}

/// Writes a request's head for the `h2` crate. What has come over HTTP/2 is moved out of it, unless it is to be kept.
pub(super) fn to_request(head: &mut RequestHead, keep: bool) -> Result<http::Request<()>, Refused> {
    let uri = match head.decoded_uri() {
        Some(uri) => uri.clone(),
        None => uri_of(head)?,
    };
    let mut request = http::Request::new(());
    *request.method_mut() = head.method.clone();
    *request.version_mut() = http::Version::HTTP_2;
    *request.uri_mut() = uri;
    *request.headers_mut() = if keep { to_headers(&mut head.fields.clone())? } else { to_headers(&mut head.fields)? };
    Ok(request)
}

fn uri_of(head: &RequestHead) -> Result<Uri, Refused> {
    let mut uri = http::uri::Parts::default();
    if !head.authority().is_empty() {
        uri.authority = Some(head.authority().parse().map_err(|_| Refused::Malformed)?);
    }
    if head.method != Method::CONNECT {
        uri.path_and_query = Some(head.target().parse().map_err(|_| Refused::Malformed)?);
        if uri.authority.is_some() {
            uri.scheme = Some(match head.scheme {
                Scheme::Http => http::uri::Scheme::HTTP,
                Scheme::Https => http::uri::Scheme::HTTPS,
            });
        }
    }
    Uri::from_parts(uri).map_err(|_| Refused::Malformed)
}

/// Writes a response's head for the `h2` crate.
pub(super) fn to_response(mut head: ResponseHead) -> Result<http::Response<()>, Refused> {
    let mut response = http::Response::new(());
    *response.status_mut() = head.status;
    *response.version_mut() = http::Version::HTTP_2;
    *response.headers_mut() = to_headers(&mut head.fields)?;
    Ok(response)
}

/// Writes fields, of a head or of trailers, without those that have no place in HTTP/2. Decoded ones are moved out.
pub(super) fn to_headers(fields: &mut Fields) -> Result<HeaderMap, Refused> {
    fields.remove_known(NOT_IN_HTTP2);
    if fields.values(Known::Te).any(|value| !is_trailers(value)) {
        fields.retain(|_, value, known| known != Known::Te || is_trailers(value));
    }
    if let Some(headers) = fields.take_decoded() {
        return Ok(headers);
    }
    let mut headers = HeaderMap::with_capacity(fields.len());
    for (name, value, _) in fields.iter() {
        let name = HeaderName::from_bytes(name).map_err(|_| Refused::Malformed)?;
        headers.append(name, HeaderValue::from_bytes(value).map_err(|_| Refused::Malformed)?);
    }
    Ok(headers)
}

fn is_trailers(value: &[u8]) -> bool {
    value.trim_ascii().eq_ignore_ascii_case(b"trailers")
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
        let mut head = request_of(parts("http://web:80/a/b?c=d", &[("x-a", "1"), ("x-b", "2"), ("x-a", "3")])).unwrap();
        assert_eq!((head.authority(), head.path(), head.query()), ("web:80", "/a/b", Some("c=d")));
        let back = to_request(&mut head, false).unwrap();
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
            assert_eq!(request_of(parts(uri, headers)).unwrap_err(), Refused::Malformed, "{uri} {headers:?}");
        }
        assert_eq!(request_of(parts("http://web/", &[("host", "WEB")])).unwrap().authority(), "web");
    }

    #[test]
    fn blanks_around_a_value_are_left_behind() {
        let mut head = request_of(parts("http://web/", &[("x-a", " 1\t"), ("x-b", "2 3")])).unwrap();
        let back = to_request(&mut head, true).unwrap();
        assert_eq!((&back.headers()["x-a"], &back.headers()["x-b"]), (&"1".parse().unwrap(), &"2 3".parse().unwrap()));
        assert_eq!(head.fields.len(), 2);
    }

    #[test]
    fn trailers_keep_what_means_something_there() {
        let trailers = parts("/", &[("grpc-status", "0"), ("x-kept", "1"), ("authorization", "a"), ("te", "trailers")]);
        let mut fields = trailers_of(trailers.headers).unwrap();
        let headers = to_headers(&mut fields).unwrap();
        assert_eq!(headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["grpc-status", "x-kept"]);
    }

    #[test]
    fn fields_of_a_connection_are_left_behind() {
        let mut fields = Fields::default();
        for (name, value) in [("Connection", "close"), ("te", "trailers"), ("TE", "gzip"), ("X-Kept", "1")] {
            fields.append(name, value.as_bytes()).unwrap();
        }
        let headers = to_headers(&mut fields).unwrap();
        assert_eq!(headers.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["te", "x-kept"]);
    }
}

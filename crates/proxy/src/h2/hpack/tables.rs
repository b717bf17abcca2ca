//! The static table (RFC 7541, appendix A), and what is known of a field for as long as a table holds it.

use crate::h1::parse::passes_for_another;
use sheer_core::head::Known;

/// Where the dynamic table begins.
pub(super) const FIRST_DYNAMIC: usize = STATIC.len() + 1;

/// Entry 1 is the first.
pub(super) static STATIC: [(&str, &str); 61] = [
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
];

/// Fields that control the message itself (RFC 9113, section 8.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "as named")]
pub(in crate::h2) enum Pseudo {
    Method,
    Scheme,
    Authority,
    Path,
    Status,
}

/// What a name is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::h2) enum Kind {
    /// One of those that control the message.
    Pseudo(Pseudo),
    /// A field's.
    Field(Known),
    /// One that somebody could take for a field that the mesh decides on, such as `content_length`.
    Disguised,
    /// None: an upper-case letter, an unknown pseudo-field, a byte that no name has (RFC 9113, section 8.2.1).
    Malformed,
}

impl Kind {
    pub(super) fn of(name: &[u8]) -> Self {
        if let Some(pseudo) = name.strip_prefix(b":") {
            return match pseudo {
                b"method" => Kind::Pseudo(Pseudo::Method),
                b"scheme" => Kind::Pseudo(Pseudo::Scheme),
                b"authority" => Kind::Pseudo(Pseudo::Authority),
                b"path" => Kind::Pseudo(Pseudo::Path),
                b"status" => Kind::Pseudo(Pseudo::Status),
                _ => Kind::Malformed,
            };
        }
        if name.is_empty() || !name.iter().all(|byte| NAME_BYTES[usize::from(*byte)]) {
            return Kind::Malformed;
        }
        match Known::of(name) {
            Known::Other if std::str::from_utf8(name).is_ok_and(passes_for_another) => Kind::Disguised,
            known => Kind::Field(known),
        }
    }

    /// The kind of a static entry's name, by its place.
    pub(super) fn of_static(index: usize) -> Self {
        match index {
            1 => Kind::Pseudo(Pseudo::Authority),
            2 | 3 => Kind::Pseudo(Pseudo::Method),
            4 | 5 => Kind::Pseudo(Pseudo::Path),
            6 | 7 => Kind::Pseudo(Pseudo::Scheme),
            8..=14 => Kind::Pseudo(Pseudo::Status),
            28 => Kind::Field(Known::ContentLength),
            31 => Kind::Field(Known::ContentType),
            35 => Kind::Field(Known::Expect),
            38 => Kind::Field(Known::Host),
            49 => Kind::Field(Known::ProxyAuthorization),
            57 => Kind::Field(Known::TransferEncoding),
            _ => Kind::Field(Known::Other),
        }
    }
}

/// Bytes of a token (RFC 9110, section 5.6.2) without upper-case letters.
static NAME_BYTES: [bool; 256] = {
    let mut bytes = [false; 256];
    let allowed = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz";
    let mut next = 0;
    while next < allowed.len() {
        bytes[allowed[next] as usize] = true;
        next += 1;
    }
    bytes
};

/// True when no byte of a value could end it early or hide something (RFC 9110, section 5.5): no control but the tab.
pub(super) fn is_value(value: &[u8]) -> bool {
    value.iter().all(|byte| VALUE_BYTES[usize::from(*byte)])
}

static VALUE_BYTES: [bool; 256] = {
    let mut bytes = [true; 256];
    let mut next = 0;
    while next < 32 {
        bytes[next] = next == b'\t' as usize;
        next += 1;
    }
    bytes[127] = false;
    bytes
};

/// A field as it was decoded.
#[derive(Clone, Copy, Debug)]
pub(in crate::h2) struct Received<'a> {
    /// The name as sent.
    pub(in crate::h2) name: &'a [u8],
    /// The value as sent.
    pub(in crate::h2) value: &'a [u8],
    /// What the name is.
    pub(in crate::h2) kind: Kind,
    /// False when the value has a byte that none may have.
    pub(in crate::h2) is_value: bool,
    /// Its sender asked that it never enter a table (section 7.1.3).
    pub(in crate::h2) sensitive: bool,
}

/// The entry of the static table that has this name, for the names that have one.
pub(super) fn static_name(name: &[u8]) -> Option<u8> {
    Some(match name {
        b":authority" => 1,
        b":method" => 2,
        b":path" => 4,
        b":scheme" => 6,
        b":status" => 8,
        b"accept-charset" => 15,
        b"accept-encoding" => 16,
        b"accept-language" => 17,
        b"accept-ranges" => 18,
        b"accept" => 19,
        b"access-control-allow-origin" => 20,
        b"age" => 21,
        b"allow" => 22,
        b"authorization" => 23,
        b"cache-control" => 24,
        b"content-disposition" => 25,
        b"content-encoding" => 26,
        b"content-language" => 27,
        b"content-length" => 28,
        b"content-location" => 29,
        b"content-range" => 30,
        b"content-type" => 31,
        b"cookie" => 32,
        b"date" => 33,
        b"etag" => 34,
        b"expect" => 35,
        b"expires" => 36,
        b"from" => 37,
        b"host" => 38,
        b"if-match" => 39,
        b"if-modified-since" => 40,
        b"if-none-match" => 41,
        b"if-range" => 42,
        b"if-unmodified-since" => 43,
        b"last-modified" => 44,
        b"link" => 45,
        b"location" => 46,
        b"max-forwards" => 47,
        b"proxy-authenticate" => 48,
        b"proxy-authorization" => 49,
        b"range" => 50,
        b"referer" => 51,
        b"refresh" => 52,
        b"retry-after" => 53,
        b"server" => 54,
        b"set-cookie" => 55,
        b"strict-transport-security" => 56,
        b"transfer-encoding" => 57,
        b"user-agent" => 58,
        b"vary" => 59,
        b"via" => 60,
        b"www-authenticate" => 61,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_static_table_agrees_with_itself() {
        for (place, (name, value)) in STATIC.iter().enumerate() {
            let index = place + 1;
            assert_eq!(Kind::of_static(index), Kind::of(name.as_bytes()), "{name}");
            let named = usize::from(static_name(name.as_bytes()).unwrap());
            assert_eq!(STATIC[named - 1].0, *name);
            assert!(named <= index && is_value(value.as_bytes()));
        }
        assert_eq!(FIRST_DYNAMIC, 62);
    }

    #[test]
    fn names_and_values_are_read_strictly() {
        for name in [&b""[..], b"Upper", b"a b", b"a\r", b"a:", b":", b":foo", b":Path", b"\x80", b"a\0"] {
            assert_eq!(Kind::of(name), Kind::Malformed, "{name:?}");
        }
        assert_eq!(Kind::of(b"content_length"), Kind::Disguised);
        assert_eq!(Kind::of(b"te"), Kind::Field(Known::Te));
        assert_eq!(Kind::of(b"x-a_b"), Kind::Field(Known::Other));
        for value in [&b"a\rb"[..], b"a\nb", b"a\0b", b"\x7f", b"\x1b"] {
            assert!(!is_value(value), "{value:?}");
        }
        assert!(is_value(b"a\t b\xff!~"));
    }
}

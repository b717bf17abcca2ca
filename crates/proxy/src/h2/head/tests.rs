use super::super::hpack::Decoder;
use super::*;
use rstest::rstest;

/// A block of fields, none of them in a table.
fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            assert!(text.len() < 127);
            block.push(text.len() as u8);
            block.extend_from_slice(text.as_bytes());
        }
    }
    block
}

fn read<T>(part: Part, block: &[u8], finish: impl FnOnce(&mut Reader<'_>) -> T) -> T {
    let mut raw = Vec::new();
    let mut reader = Reader::new(part, part == Part::Request, &mut raw);
    Decoder::new().decode(block, |field| reader.field(field)).unwrap();
    finish(&mut reader)
}

const USUAL: [(&str, &str); 4] =
    [(":method", "GET"), (":scheme", "http"), (":authority", "web:80"), (":path", "/a/b?c=d")];

/// The usual request, with these pseudo-fields in place of its own, and these fields.
fn request(changed: &[(&str, &str)], fields: &[(&str, &str)]) -> Result<RequestHead, Refused> {
    let mut all: Vec<_> = USUAL.iter().filter(|(name, _)| !changed.iter().any(|(it, _)| it == name)).copied().collect();
    // An empty text takes a field out.
    all.extend(changed.iter().filter(|(_, value)| !value.is_empty()).copied());
    all.extend_from_slice(fields);
    read(Part::Request, &block(&all), |reader| reader.request())
}

#[test]
fn heads_survive_the_round_trip() {
    let head = request(&[], &[("x-a", "1"), ("x-b", "2"), ("x-a", "3"), ("te", "trailers")]).unwrap();
    assert_eq!((head.authority(), head.path(), head.query()), ("web:80", "/a/b", Some("c=d")));
    let (mut out, mut encoder) = (BytesMut::new(), Encoder::new());
    write_request(&head, 1, 0, &mut encoder, &mut out);
    let back = read(Part::Request, &out[frame::HEADER..], |reader| reader.request()).unwrap();
    assert_eq!((back.method.as_str(), back.authority(), back.target()), ("GET", "web:80", "/a/b?c=d"));
    let fields = |head: &RequestHead| -> Vec<_> {
        head.fields.iter().map(|(name, value, _)| (name.to_vec(), value.to_vec())).collect()
    };
    assert_eq!(fields(&back), fields(&head));
    assert_eq!(back.fields.values_of("x-a").collect::<Vec<_>>(), [b"1", b"3"]);
}

#[rstest]
#[case::host_differs(&[], &[("host", "other")])]
#[case::host_twice(&[], &[("host", "web:80"), ("host", "web:80")])]
#[case::user(&[(":authority", "user@web")], &[])]
#[case::list(&[(":authority", "")], &[("host", "a,b")])]
#[case::semicolon(&[(":authority", "")], &[("host", "a;b")])]
#[case::no_port(&[(":authority", "")], &[("host", "a:")])]
#[case::scheme(&[(":scheme", "ftp")], &[])]
#[case::injected_scheme(&[(":scheme", "http://x/")], &[])]
#[case::no_scheme(&[(":scheme", "")], &[])]
#[case::no_method(&[(":method", "")], &[])]
#[case::no_path(&[(":path", "")], &[])]
#[case::injected_method(&[(":method", "GET /a")], &[])]
#[case::injected_path(&[(":path", "/ HTTP/1.1")], &[])]
#[case::relative(&[(":path", "a")], &[])]
#[case::star(&[(":path", "*")], &[])]
#[case::fragment(&[(":path", "/x#/../admin")], &[])]
#[case::beyond_ascii(&[(":path", "/\u{e4}")], &[])]
#[case::lengths(&[], &[("content-length", "3"), ("content-length", "3")])]
#[case::signed_length(&[], &[("content-length", "+3")])]
#[case::empty_length(&[], &[("content-length", "")])]
#[case::underscore(&[], &[("content_length", "3")])]
#[case::mesh_underscore(&[], &[("x_forwarded_client_cert", "a")])]
#[case::sheer_underscore(&[], &[("x-sheer_peer", "a")])]
#[case::upper(&[], &[("X-A", "1")])]
#[case::newline(&[], &[("x-a", "1\r\nx-b: 2")])]
#[case::nul(&[], &[("x-a", "a\0b")])]
#[case::blank(&[], &[("x-a", " b")])]
#[case::tab(&[], &[("x-a", "b\t")])]
#[case::connect(&[(":method", "CONNECT")], &[])]
#[case::connect_to_nothing(&[(":method", "CONNECT"), (":scheme", ""), (":path", ""), (":authority", "")], &[])]
#[case::name(&[], &[("x:a", "1")])]
#[case::empty_name(&[], &[("", "1")])]
#[case::connection(&[], &[("connection", "x")])]
#[case::chunked(&[], &[("transfer-encoding", "chunked")])]
#[case::upgrade(&[], &[("upgrade", "h2c")])]
#[case::te(&[], &[("te", "gzip")])]
#[case::late(&[], &[("x-a", "1"), (":path", "/b")])]
#[case::twice(&[(":path", "/a"), (":path", "/a")], &[])]
#[case::status(&[(":status", "200")], &[])]
#[case::unknown_pseudo(&[(":protocol", "websocket")], &[])]
fn what_can_be_read_in_two_ways_is_refused(#[case] changed: &[(&str, &str)], #[case] fields: &[(&str, &str)]) {
    assert!(matches!(request(changed, fields), Err(Refused::Malformed(_))), "{changed:?} {fields:?}");
}

#[test]
fn what_is_well_formed_is_read() {
    assert_eq!(request(&[(":authority", "web")], &[("host", "WEB")]).unwrap().authority(), "web");
    assert_eq!(request(&[(":authority", "")], &[("host", "web")]).unwrap().authority(), "web");
    assert_eq!(request(&[(":authority", "")], &[]).unwrap().authority(), "");
    let options = request(&[(":method", "OPTIONS"), (":path", "*"), (":scheme", "https")], &[]).unwrap();
    assert_eq!((options.target(), options.scheme), ("*", Scheme::Https));
    assert_eq!(request(&[(":method", "CONNECT"), (":scheme", ""), (":path", "")], &[]).unwrap_err(), Refused::Connect);
    let given = [(":status", "200"), ("x-a", " 1\t"), ("x-b", "2 3"), ("x-c", "")];
    let head = read(Part::Response, &block(&given), |reader| reader.response()).unwrap();
    assert_eq!(head.fields.iter().map(|(_, value, _)| value).collect::<Vec<_>>(), [&b"1"[..], b"2 3", b""]);
}

#[test]
fn heads_are_bounded_in_fields_and_bytes() {
    let many = vec![("a", "b"); MAX_FIELDS];
    assert_eq!(request(&[], &many).unwrap().fields.len(), MAX_FIELDS);
    assert_eq!(request(&[], &[many, vec![("a", "b")]].concat()).unwrap_err(), Refused::TooLarge);
    // One entry of the table, named again and again.
    let mut bomb = block(&USUAL);
    bomb.extend([0x40, 1, b'a', 0x7f, 0xd1, 0x0e]);
    bomb.extend([b'x'; 2000]);
    bomb.extend([0xbe; 4000]);
    let (size, refused) = read(Part::Request, &bomb, |reader| (reader.size(), reader.request().map(drop)));
    assert_eq!((size, refused), (MAX_HEAD_BYTES, Err(Refused::TooLarge)));
}

#[test]
fn responses_have_one_status_and_nothing_else() {
    let status = |fields: &[(&str, &str)]| read(Part::Response, &block(fields), |it| it.response().map(|it| it.status));
    assert_eq!(status(&[(":status", "103")]), Ok(StatusCode::EARLY_HINTS));
    for fields in [
        &[][..],
        &[(":status", "101")],
        &[(":status", "20")],
        &[(":status", "2000")],
        &[(":status", "200"), (":status", "200")],
        &[(":status", "200"), (":path", "/")],
        &[("x-a", "1"), (":status", "200")],
    ] {
        assert!(status(fields).is_err(), "{fields:?}");
    }
}

#[test]
fn trailers_keep_what_means_something_there() {
    let given =
        [("grpc-status", "0"), ("x-kept", "1"), ("authorization", "a"), ("te", "trailers"), ("x-sheer_peer", "a")];
    let fields = read(Part::Trailers, &block(&given), |reader| reader.trailers()).unwrap();
    assert_eq!(fields.iter().map(|(name, _, _)| name).collect::<Vec<_>>(), [&b"grpc-status"[..], b"x-kept"]);
    for fields in [&[(":status", "200")][..], &[("x-a", "1"), (":path", "/")], &[("connection", "a")]] {
        assert!(read(Part::Trailers, &block(fields), |reader| reader.trailers()).is_err(), "{fields:?}");
    }
}

#[test]
fn fields_of_a_connection_and_injected_values_are_left_behind() {
    let mut fields = Fields::default();
    let given = [("Connection", "close"), ("te", "trailers"), ("TE", "gzip"), ("X-Kept", "1"), ("x-b", "1\r\nx-c: 2")];
    for (name, value) in given {
        fields.append(name, value.as_bytes()).unwrap();
    }
    let mut out = BytesMut::new();
    write_trailers(&fields, 1, &mut Encoder::new(), &mut out);
    let mut names = Vec::new();
    Decoder::new().decode(&out[frame::HEADER..], |field| names.push(field.name.to_vec())).unwrap();
    assert_eq!(names, [&b"te"[..], b"x-kept"]);
}

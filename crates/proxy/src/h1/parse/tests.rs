use super::*;
use rstest::rstest;

fn parse(input: &[u8]) -> Result<Option<ParsedRequest>, Refusal> {
    request(&mut BytesMut::from(input), false, &mut false)
}

fn answer(input: &[u8], method: Method) -> Result<Option<ParsedResponse>, Refusal> {
    response(&mut BytesMut::from(input), &method)
}

/// A request with these lines behind its `Host`.
fn with(lines: &str) -> Vec<u8> {
    format!("POST /a HTTP/1.1\r\nHost: web\r\n{lines}\r\n\r\n").into_bytes()
}

#[rstest]
// Two readings of the length (B1, B3, B4).
#[case::cl_te("Content-Length: 6\r\nTransfer-Encoding: chunked")]
#[case::te_cl("Transfer-Encoding: chunked\r\nContent-Length: 6")]
#[case::cl_twice("Content-Length: 6\r\nContent-Length: 7")]
#[case::cl_twice_same("Content-Length: 6\r\nContent-Length: 6")]
#[case::cl_plus("Content-Length: +3")]
#[case::cl_empty("Content-Length: ")]
#[case::cl_hex("Content-Length: 0x3")]
#[case::cl_list("Content-Length: 3, 5")]
#[case::cl_minus("Content-Length: -0")]
#[case::cl_blank("Content-Length: 1 0")]
#[case::cl_two_to_63("Content-Length: 9223372036854775808")]
#[case::cl_two_to_64("Content-Length: 18446744073709551616")]
#[case::cl_underscore("Content_Length: 3")]
// Spellings of the transfer encoding (B2).
#[case::te_x("Transfer-Encoding: xchunked")]
#[case::te_twice_in_one("Transfer-Encoding: chunked, chunked")]
#[case::te_identity("Transfer-Encoding: identity, chunked")]
#[case::te_identity_alone("Transfer-Encoding: identity")]
#[case::te_comma("Transfer-Encoding: chunked,")]
#[case::te_vt("Transfer-Encoding: \x0bchunked")]
#[case::te_two_lines("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked")]
#[case::te_space("Transfer-Encoding : chunked")]
#[case::te_tab("Transfer-Encoding:\tchunked")]
#[case::te_tab_after("Transfer-Encoding: chunked\t")]
#[case::te_empty("Transfer-Encoding:")]
#[case::te_underscore("Transfer_Encoding: chunked")]
// Line ends and control bytes (B6, B7).
#[case::bare_lf("A: b\nB: c")]
#[case::bare_cr("A: b\rTransfer-Encoding: chunked")]
#[case::fold("X: a\r\n TE: chunked")]
#[case::fold_tab("X: a\r\n\tTE: chunked")]
#[case::nul("X: a\0b")]
#[case::del("X: a\x7fb")]
#[case::no_name(": x")]
#[case::no_colon("X")]
#[case::space_before_colon("X : y")]
#[case::paren("X(: y")]
// Hosts (A7) and names that pass for the mesh's own (A13).
#[case::two_hosts("Host: web")]
#[case::alias_peer("x_sheer_peer: a")]
#[case::alias_cert("X_Forwarded_Client_Cert: a")]
#[case::expectation("Expect: 200-ok")]
fn fields_with_two_readings_are_refused(#[case] lines: &str) {
    let refusal = parse(&with(lines)).expect_err(lines);
    assert_eq!((refusal.cause, refusal.status), (Cause::BadRequest, StatusCode::BAD_REQUEST));
}

#[rstest]
#[case::space_first("GET / HTTP/1.1\r\n X: y\r\nHost: a\r\n\r\n")]
#[case::high_name("GET / HTTP/1.1\r\nHost: a\r\nX\u{80}: y\r\n\r\n")]
#[case::no_host("GET / HTTP/1.1\r\n\r\n")]
#[case::host_list("GET / HTTP/1.1\r\nHost: a,b\r\n\r\n")]
#[case::host_user("GET / HTTP/1.1\r\nHost: a@b\r\n\r\n")]
#[case::host_path("GET / HTTP/1.1\r\nHost: a/b\r\n\r\n")]
#[case::host_escape("GET / HTTP/1.1\r\nHost: %61\r\n\r\n")]
#[case::host_port("GET / HTTP/1.1\r\nHost: a:65536\r\n\r\n")]
#[case::host_port_name("GET / HTTP/1.1\r\nHost: a:http\r\n\r\n")]
#[case::host_port_empty("GET / HTTP/1.1\r\nHost: a:\r\n\r\n")]
#[case::host_ports("GET / HTTP/1.1\r\nHost: a:1:2\r\n\r\n")]
#[case::host_bracket("GET / HTTP/1.1\r\nHost: [::1\r\n\r\n")]
#[case::absolute_other("GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n")]
#[case::absolute_port("GET http://a:81/ HTTP/1.1\r\nHost: a\r\n\r\n")]
#[case::absolute_user("GET http://u@a/ HTTP/1.1\r\nHost: a\r\n\r\n")]
#[case::absolute_no_host("GET http://a/ HTTP/1.1\r\n\r\n")]
#[case::absolute_https("GET https://a/ HTTP/1.1\r\nHost: a\r\n\r\n")]
#[case::absolute_empty("GET http:///x HTTP/1.1\r\nHost: a\r\n\r\n")]
#[case::fragment("GET /admin#f HTTP/1.1\r\nHost: a\r\n\r\n")]
#[case::non_ascii("GET /\u{e9} HTTP/1.1\r\nHost: a\r\n\r\n")]
#[case::asterisk("GET * HTTP/1.1\r\nHost: a\r\n\r\n")]
#[case::relative("GET a HTTP/1.1\r\nHost: a\r\n\r\n")]
#[case::two_blanks("GET  / HTTP/1.1\r\nHost: a\r\n\r\n")]
#[case::tab("GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n")]
#[case::lf_line("GET / HTTP/1.1\nHost: a\r\n\r\n")]
#[case::lf_first("\nGET / HTTP/1.1\r\nHost: a\r\n\r\n")]
#[case::lf_last("GET / HTTP/1.1\r\nHost: a\r\n\n")]
#[case::lf_last_two("GET / HTTP/1.1\r\nHost: a\n\r\n")]
#[case::empty_lines("\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n")]
#[case::version("GET / HTTP/1.2\r\nHost: a\r\n\r\n")]
#[case::version_2("GET / HTTP/2.0\r\nHost: a\r\n\r\n")]
#[case::version_none("GET /\r\nHost: a\r\n\r\n")]
#[case::chunked_in_1_0("POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")]
#[case::garbage("\x16\x03\x01\x02")]
fn requests_with_two_readings_are_refused(#[case] input: &str) {
    let refusal = parse(input.as_bytes()).expect_err(input);
    assert_eq!((refusal.cause, refusal.status), (Cause::BadRequest, StatusCode::BAD_REQUEST));
}

#[test]
fn sizes_are_bounded() {
    let status = |input: String| parse(input.as_bytes()).unwrap_err().status;
    let long = "a".repeat(64 * 1024);
    assert_eq!(status(format!("GET /{long}")), StatusCode::URI_TOO_LONG);
    assert_eq!(status(format!("GET /{long} HTTP/1.1\r\nHost: a\r\n\r\n")), StatusCode::URI_TOO_LONG);
    assert_eq!(status(format!("GET / HTTP/1.1\r\nHost: a\r\nX: {long}")), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    assert_eq!(
        status(format!("GET / HTTP/1.1\r\nHost: a\r\nX: {long}\r\n\r\n")),
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE
    );
    let many = "a: b\r\n".repeat(100);
    assert_eq!(status(format!("GET / HTTP/1.1\r\nHost: a\r\n{many}\r\n")), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    let most = "a: b\r\n".repeat(99);
    assert!(parse(format!("GET / HTTP/1.1\r\nHost: a\r\n{most}\r\n").as_bytes()).unwrap().is_some());
}

#[test]
fn connect_is_for_forward_proxies() {
    let input = b"CONNECT api:443 HTTP/1.1\r\nHost: api:443\r\n\r\n";
    assert_eq!(parse(input).unwrap_err().status, StatusCode::METHOD_NOT_ALLOWED);
    let parsed = request(&mut BytesMut::from(&input[..]), true, &mut false).unwrap().unwrap();
    assert_eq!((parsed.head.authority(), parsed.head.target()), ("api:443", ""));
    for wrong in [
        "CONNECT api HTTP/1.1\r\nHost: api\r\n\r\n",
        "CONNECT / HTTP/1.1\r\nHost: api\r\n\r\n",
        "CONNECT api:443 HTTP/1.1\r\nHost: api:443\r\nContent-Length: 5\r\n\r\n",
        "CONNECT api:443 HTTP/1.1\r\nHost: api:443\r\nTransfer-Encoding: chunked\r\n\r\n",
    ] {
        assert!(request(&mut BytesMut::from(wrong), true, &mut false).is_err(), "{wrong}");
    }
}

#[rstest]
#[case("GET http://Web:80/a?b HTTP/1.1\r\nHost: web\r\n\r\n", "Web:80", "/a?b")]
#[case("GET http://web HTTP/1.1\r\nHost: web:80\r\n\r\n", "web", "/")]
#[case("GET http://web?x=1 HTTP/1.1\r\nHost: web\r\n\r\n", "web", "/?x=1")]
#[case("OPTIONS http://web HTTP/1.1\r\nHost: web\r\n\r\n", "web", "*")]
#[case("OPTIONS * HTTP/1.1\r\nHost: web\r\n\r\n", "web", "*")]
#[case("GET / HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n", "[::1]:8080", "/")]
#[case("GET / HTTP/1.1\r\nHost:\r\n\r\n", "", "/")]
#[case("GET / HTTP/1.0\r\n\r\n", "", "/")]
#[case("GET http://web/ HTTP/1.0\r\n\r\n", "web", "/")]
#[case("\r\nGET //a/../b%2f HTTP/1.1\r\nHost:  web.\t\r\n\r\n", "web.", "//a/../b%2f")]
fn authority_and_target_are_one(#[case] input: &str, #[case] authority: &str, #[case] target: &str) {
    let parsed = parse(input.as_bytes()).unwrap().unwrap();
    assert_eq!((parsed.head.authority(), parsed.head.target()), (authority, target));
}

fn names(fields: &Fields) -> Vec<String> {
    fields.iter().map(|(name, _, _)| String::from_utf8_lossy(name).to_ascii_lowercase()).collect()
}

#[test]
fn fields_of_the_hop_are_removed_and_those_of_the_mesh_are_not() {
    let lines = "Connection: close, x-a, X-Sheer-Peer, x-forwarded-for, authorization, content-type\r\nX-A: 1\r\n\
        x-sheer-peer: 2\r\nX-Forwarded-For: 3\r\nAuthorization: 4\r\nContent-Type: 5\r\nKeep-Alive: 6\r\n\
        Proxy-Connection: 7\r\nTE: gzip\r\nUpgrade: websocket\r\nHTTP2-Settings: 8\r\nX-B: 9";
    let parsed = parse(&with(lines)).unwrap().unwrap();
    assert_eq!(
        names(&parsed.head.fields),
        ["host", "x-sheer-peer", "x-forwarded-for", "authorization", "content-type", "x-b"]
    );
    assert!(!parsed.keep_alive);
}

#[test]
fn an_upgrade_needs_its_connection_option_and_no_body() {
    let upgrade = |lines: &str| parse(&with(lines)).unwrap().unwrap().head.fields.get(Known::Upgrade).is_some();
    assert!(upgrade("Connection: Upgrade\r\nUpgrade: websocket"));
    assert!(upgrade("Upgrade: websocket\r\nConnection: keep-alive, upgrade"));
    assert!(!upgrade("Upgrade: websocket"));
    assert!(!upgrade("Connection: Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: a"));
    assert!(!upgrade("Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 3"));
}

#[test]
fn connections_live_on_as_the_versions_say() {
    let lives = |input: &str| parse(input.as_bytes()).unwrap().unwrap().keep_alive;
    assert!(lives("GET / HTTP/1.1\r\nHost: a\r\n\r\n"));
    assert!(!lives("GET / HTTP/1.1\r\nHost: a\r\nConnection: Close\r\n\r\n"));
    assert!(!lives("GET / HTTP/1.0\r\n\r\n"));
    assert!(lives("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n"));
    assert!(!lives("GET / HTTP/1.0\r\nConnection: Keep-Alive, close\r\n\r\n"));
}

#[rstest]
#[case("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", Framing::Length(5), true)]
#[case("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", Framing::Chunked, true)]
#[case("HTTP/1.1 200 OK\r\n\r\n", Framing::UntilClose, false)]
#[case("HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", Framing::None, true)]
#[case("HTTP/1.1 204 No Content\r\n\r\n", Framing::None, true)]
#[case("HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", Framing::None, true)]
#[case("HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n", Framing::None, true)]
#[case("HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n", Framing::Length(5), false)]
#[case("HTTP/1.0 200 OK\r\nContent-Length: 5\r\nConnection: keep-alive\r\n\r\n", Framing::Length(5), true)]
#[case("HTTP/1.1 999 Odd\r\nContent-Length: 5\r\nConnection: close\r\n\r\n", Framing::Length(5), false)]
fn responses_end_where_their_heads_say(#[case] input: &str, #[case] framing: Framing, #[case] keep_alive: bool) {
    let parsed = answer(input.as_bytes(), Method::GET).unwrap().unwrap();
    assert_eq!((parsed.framing, parsed.keep_alive), (framing, keep_alive));
    assert_eq!(answer(input.as_bytes(), Method::HEAD).unwrap().unwrap().framing, Framing::None);
}

#[test]
fn an_answer_that_announces_a_body_it_cannot_have_ends_its_connection() {
    for line in ["Content-Length: 5", "Transfer-Encoding: chunked"] {
        let input = format!("HTTP/1.1 204 No Content\r\n{line}\r\n\r\n");
        let parsed = answer(input.as_bytes(), Method::GET).unwrap().unwrap();
        assert_eq!((parsed.framing, parsed.keep_alive), (Framing::None, false), "{line}");
    }
}

#[rstest]
#[case("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n")]
#[case("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n")]
#[case("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n")]
#[case("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n")]
#[case("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")]
#[case("HTTP/1.1 099 OK\r\n\r\n")]
#[case("HTTP/1.1 20 OK\r\n\r\n")]
#[case("HTTP/2 200 OK\r\n\r\n")]
#[case("HTTP/1.1 200 OK\n\r\n")]
#[case("HTTP/1.1 200 OK\nA: b\r\n\r\n")]
#[case("HTTP/1.1 200 OK\r\nA: b\n\r\n")]
#[case("HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n")]
#[case("\r\nHTTP/1.1 200 OK\r\n\r\n")]
#[case("220 mail.example ESMTP\r\n")]
fn responses_with_two_readings_are_refused(#[case] input: &str) {
    assert_eq!(answer(input.as_bytes(), Method::GET).expect_err(input).cause, Cause::BadResponse);
}

#[test]
fn an_endless_status_line_is_refused() {
    let input = format!("HTTP/1.1 200 {}", "a".repeat(64 * 1024));
    assert_eq!(answer(input.as_bytes(), Method::GET).unwrap_err().cause, Cause::BadResponse);
}

#[test]
fn what_a_hop_adds_is_not_one_field_too_many() {
    let fields = |count: usize| "X: 1\r\n".repeat(count);
    let hop = "Transfer-Encoding: chunked\r\nConnection: close\r\nKeep-Alive: 1\r\nProxy-Connection: close\r\n";
    let answered = |lines: &str| answer(format!("HTTP/1.1 200 OK\r\n{lines}\r\n").as_bytes(), Method::GET);
    let full = answered(&format!("{}{hop}", fields(MAX_FIELDS))).unwrap().unwrap();
    assert_eq!((full.head.fields.len(), full.framing), (MAX_FIELDS, Framing::Chunked));
    assert!(answered(&fields(MAX_FIELDS + 1)).is_err());
    let asked = |lines: &str| parse(format!("GET / HTTP/1.1\r\nHost: web\r\n{lines}\r\n").as_bytes());
    assert!(asked(&format!("{}{hop}", fields(MAX_FIELDS - 1))).unwrap().is_some());
    for count in [MAX_FIELDS, MAX_FIELDS + 1, MAX_FIELDS + 50] {
        assert_eq!(asked(&fields(count)).unwrap_err(), TOO_LARGE, "{count}");
    }
}

#[test]
fn a_second_empty_line_is_refused_at_its_first_byte() {
    let mut empty_line = false;
    let mut bytes = BytesMut::from(&b"\r\n"[..]);
    assert!(request(&mut bytes, false, &mut empty_line).unwrap().is_none() && empty_line);
    bytes.extend_from_slice(b"\r");
    assert!(request(&mut bytes, false, &mut empty_line).is_err());
}

proptest::proptest! {
    /// What is written from a parsed head parses to the same again: nobody behind us decides on something else.
    #[test]
    fn parsing_what_was_written_changes_nothing(
        target in "/[!-~&&[^#]]{0,30}",
        host in "[a-z]{1,9}(\\.[a-z]{1,5})?(:[0-9]{1,4})?",
        fields in proptest::collection::vec(("x-[a-z0-9-]{1,12}", "([!-~\u{a0}-\u{ff}]([ -~]{0,20}[!-~])?)?", "[ \t]{0,2}"), 0..12),
        length in proptest::option::of(0u64..3),
    ) {
        let mut input = format!("POST {target} HTTP/1.1\r\nHost: {host}\r\n");
        for (name, value, blank) in &fields {
            input.push_str(&format!("{name}:{blank}{value}{blank}\r\n"));
        }
        if let Some(length) = length {
            input.push_str(&format!("Content-Length: {length}\r\n"));
        }
        input.push_str("\r\n");
        let first = parse(input.as_bytes()).unwrap().unwrap();
        let body = match length { None | Some(0) => crate::body::Body::Empty, Some(length) => crate::body::Body::Full(vec![0; length as usize].into()) };
        let mut out = BytesMut::new();
        super::super::encode::request(&first.head, body.length(), &mut out);
        let second = parse(&out).unwrap().unwrap();
        proptest::prop_assert_eq!(first.head.target(), second.head.target());
        proptest::prop_assert_eq!(first.head.path(), second.head.path());
        proptest::prop_assert_eq!(first.head.authority(), second.head.authority());
        proptest::prop_assert_eq!(first.framing, second.framing);
        let list = |head: &RequestHead| -> Vec<(Vec<u8>, Vec<u8>)> {
            head.fields.iter().filter(|(_, _, known)| *known != Known::ContentLength).map(|(name, value, _)| (name.to_vec(), value.to_vec())).collect()
        };
        proptest::prop_assert_eq!(list(&first.head), list(&second.head));
    }

    #[test]
    fn any_bytes_are_parsed_or_refused(input in proptest::collection::vec(0u8.., 0..300)) {
        let _ = parse(&input);
        let _ = answer(&input, Method::GET);
    }
}

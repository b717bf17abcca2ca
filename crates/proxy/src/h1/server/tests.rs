use super::*;
use rstest::rstest;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

async fn collect(mut body: Body) -> Result<Vec<u8>, BodyError> {
    let mut all = Vec::new();
    while let Some(frame) = body.frame().await {
        if let Frame::Data(bytes) = frame? {
            all.extend_from_slice(&bytes);
        }
    }
    Ok(all)
}

fn reply(status: u16, text: impl Into<Bytes>) -> Outcome<()> {
    let head = ResponseHead::new(StatusCode::from_u16(status).unwrap());
    Outcome::Response(Response { head, body: Body::from(text.into()) })
}

/// Answers with what it understood.
async fn echo(request: Request) -> Outcome<()> {
    let Request { head, body, .. } = request;
    match collect(body).await {
        Ok(body) => reply(200, format!("{} {} [{}]", head.method, head.target(), String::from_utf8_lossy(&body))),
        Err(_) => reply(400, "broken body"),
    }
}

/// Sends these bytes, in these parts, and reads until the connection ends.
async fn talk_in_parts(
    parts: &[&[u8]],
    service: impl AsyncFn(Request) -> Outcome<()>,
) -> (String, Result<Ended<()>, ConnError>) {
    let (mut client, server) = duplex(1 << 20);
    let options = Options::default();
    let script = async {
        for part in parts {
            client.write_all(part).await.unwrap();
            tokio::task::yield_now().await;
        }
        client.shutdown().await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    };
    let serving = serve(Io::from(server), BytesMut::new(), &options, std::future::pending(), service);
    tokio::join!(script, serving)
}

async fn talk(input: &str, service: impl AsyncFn(Request) -> Outcome<()>) -> String {
    talk_in_parts(&[input.as_bytes()], service).await.0
}

#[tokio::test]
async fn requests_are_answered_in_order() {
    let input = "GET /1 HTTP/1.1\r\nHost: a\r\n\r\nPOST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc\
        POST /3 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nde\r\n1\r\nf\r\n0\r\n\r\n\
        GET /4 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\nGET /5 HTTP/1.1\r\nHost: a\r\n\r\n";
    let answer = talk(input, echo).await;
    let expected = "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nGET /1 []HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n\
        POST /2 [abc]HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\nPOST /3 [def]HTTP/1.1 200 OK\r\n\
        Content-Length: 9\r\nConnection: close\r\n\r\nGET /4 []";
    assert_eq!(answer, expected);
}

#[rstest]
#[case::http10("GET / HTTP/1.0\r\n\r\n", "Connection: close\r\n\r\nGET / []")]
#[case::http10_kept(
    "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET / HTTP/1.0\r\n\r\n",
    "Connection: keep-alive\r\n\r\nGET / []HTTP/1.1 200 OK\r\nContent-Length: 8\r\nConnection: close\r\n\r\nGET / []"
)]
#[case::head("HEAD / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")]
#[tokio::test]
async fn versions_and_methods_frame_the_answer(#[case] input: &str, #[case] end: &str) {
    let answer = talk(input, echo).await;
    assert!(answer.ends_with(end), "{answer:?}");
}

#[tokio::test]
async fn a_refused_request_reaches_nobody_and_ends_the_connection() {
    let input = "GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\nGET /x HTTP/1.1\r\nHost: a\r\n\r\n";
    let (answer, ended) = talk_in_parts(&[input.as_bytes()], echo).await;
    let (first, second) = answer.split_once("HTTP/1.1 400 Bad Request\r\n").expect(&answer);
    assert!(first.ends_with("GET / []"));
    assert!(second.contains("x-sheer-reason: bad-request; more than one Host\r\n"), "{second}");
    assert!(second.contains("Connection: close\r\n") && !second.contains("/x"));
    assert!(matches!(ended, Err(ConnError::Refused(refusal)) if refusal.detail == "more than one Host"));
}

#[tokio::test]
async fn broken_chunks_are_the_services_to_answer_and_end_the_connection() {
    let input = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\n0\r\n\r\nGET /x HTTP/1.1\r\nHost: a\r\n\r\n";
    let answer = talk(input, echo).await;
    assert!(answer.starts_with("HTTP/1.1 400") && answer.matches("HTTP/1.1").count() == 1, "{answer}");
}

#[tokio::test]
async fn an_answer_without_a_length_is_chunked_or_ends_with_the_connection() {
    // An endpoint that ends its body with its connection.
    async fn service(_: Request) -> Outcome<()> {
        let (mut endpoint, io) = duplex(1024);
        let connection = super::super::client::Connection::new(Io::from(io));
        let head = RequestHead::new(Method::GET, Version::Http11, "a", "/");
        let script = async {
            endpoint.write_all(b"HTTP/1.1 200 OK\r\n\r\nabc").await.unwrap();
            drop(endpoint);
        };
        let interim = Interim::default();
        let (response, ()) = tokio::join!(connection.send(&head, Body::Empty, &interim, None), script);
        Outcome::Response(response.unwrap())
    }
    let answer = talk("GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.0\r\n\r\n", service).await;
    let expected = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n\
        HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nabc";
    assert_eq!(answer, expected);
}

#[tokio::test]
async fn an_early_answer_is_followed_by_a_drained_request_or_an_end() {
    async fn deny(_: Request) -> Outcome<()> {
        reply(403, "no")
    }
    let small = format!(
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n400\r\n{}\r\n0\r\n\r\n",
        "x".repeat(1024)
    );
    let next = "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    assert_eq!(talk(&format!("{small}{next}"), deny).await.matches("403").count(), 2);
    let head = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n";
    let large = format!("{head}{}{next}", "GET /smug".repeat(12_000).get(..100_000).unwrap());
    assert_eq!(talk(&large, deny).await.matches("403").count(), 1);
}

#[tokio::test]
async fn an_expectation_that_nobody_met_ends_the_connection() {
    async fn refuse(_: Request) -> Outcome<()> {
        reply(417, "no")
    }
    let (mut client, server) = duplex(4096);
    let options = Options::default();
    let script = async {
        client
            .write_all(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n")
            .await
            .unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        String::from_utf8(answer).unwrap()
    };
    let serving = serve(Io::from(server), BytesMut::new(), &options, std::future::pending(), refuse);
    let (answer, _) = tokio::join!(script, serving);
    assert!(answer.starts_with("HTTP/1.1 417") && answer.contains("Connection: close"), "{answer}");
}

#[tokio::test]
async fn interim_answers_come_first() {
    async fn service(request: Request) -> Outcome<()> {
        request.interim.send(ResponseHead::new(StatusCode::CONTINUE));
        let body = collect(request.body).await.unwrap();
        let mut hints = ResponseHead::new(StatusCode::EARLY_HINTS);
        hints.fields.append("link", b"</a>").unwrap();
        request.interim.send(hints);
        tokio::task::yield_now().await;
        reply(200, body)
    }
    let (mut client, server) = duplex(4096);
    let options = Options::default();
    let script = async {
        client
            .write_all(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n")
            .await
            .unwrap();
        let mut first = [0; 25];
        client.read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"HTTP/1.1 100 Continue\r\n\r\n");
        client.write_all(b"abcGET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await.unwrap();
        client.shutdown().await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        String::from_utf8(answer).unwrap()
    };
    let serving = serve(Io::from(server), BytesMut::new(), &options, std::future::pending(), service);
    let (answer, _) = tokio::join!(script, serving);
    let expected = "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc";
    assert!(answer.starts_with(expected), "{answer}");
}

#[tokio::test]
async fn a_request_may_be_its_own_answer() {
    async fn mirror(request: Request) -> Outcome<()> {
        Outcome::Response(Response { head: ResponseHead::new(StatusCode::OK), body: request.body })
    }
    let input = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\nx: y\r\n\r\n\
        PUT / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 4\r\n\r\nabcd";
    let (whole, ended) = talk_in_parts(&[input.as_bytes()], mirror).await;
    assert!(whole.contains("2\r\nab\r\n1\r\nc\r\n0\r\nx: y\r\n\r\n") && whole.ends_with("\r\n\r\nabcd"), "{whole}");
    assert!(ended.is_ok());
    let (head, rest) = input.as_bytes().split_at(input.len() - 2);
    assert!(talk_in_parts(&[head, rest], mirror).await.0.ends_with("\r\n\r\nabcd"));
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_service() {
    struct Dropped(Rc<std::cell::Cell<bool>>);
    impl Drop for Dropped {
        fn drop(&mut self) {
            self.0.set(true);
        }
    }
    let dropped = Rc::new(std::cell::Cell::new(false));
    let service = async |_: Request| -> Outcome<()> {
        let _guard = Dropped(dropped.clone());
        std::future::pending().await
    };
    let (_, ended) = talk_in_parts(&[b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"], service).await;
    assert!(matches!(ended, Err(ConnError::ClientGone)));
    assert!(dropped.get());
}

#[tokio::test]
async fn a_client_that_has_said_its_last_request_may_close_its_side() {
    async fn slow(request: Request) -> Outcome<()> {
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        echo(request).await
    }
    let answer = talk("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", slow).await;
    assert!(answer.ends_with("GET / []"));
}

#[tokio::test]
async fn a_tunnel_takes_the_bytes_behind_the_head() {
    async fn switch(request: Request) -> Outcome<()> {
        assert_eq!(request.head.fields.get(Known::Upgrade), Some(&b"websocket"[..]));
        let mut head = ResponseHead::new(StatusCode::SWITCHING_PROTOCOLS);
        head.fields.append("Upgrade", b"websocket").unwrap();
        Outcome::Tunnel(Response { head, body: Body::Empty }, ())
    }
    let (mut client, server) = duplex(4096);
    client
        .write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nraw")
        .await
        .unwrap();
    let options = Options::default();
    let ended = serve(Io::from(server), BytesMut::new(), &options, std::future::pending(), switch).await.unwrap();
    let Ended::Tunnel(mut upgraded, ()) = ended else { panic!("{ended:?}") };
    assert_eq!(&upgraded.read[..], b"raw");
    upgraded.io.write_all(b"back").await.unwrap();
    drop(upgraded);
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nback");
}

#[tokio::test]
async fn an_upgrade_that_is_declined_leaves_the_next_request_a_request() {
    let input = "GET /1 HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n\
        GET /2 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    let answer = talk(input, echo).await;
    assert!(answer.contains("GET /1 []") && answer.ends_with("GET /2 []"), "{answer}");
}

async fn open(input: &[u8]) -> (DuplexStream, Io) {
    let (mut client, server) = duplex(4096);
    client.write_all(input).await.unwrap();
    (client, Io::from(server))
}

#[tokio::test(start_paused = true)]
async fn a_head_that_takes_too_long_is_answered() {
    let (mut client, io) = open(b"GET / HTTP/1.1\r\nHos").await;
    let options = Options::default();
    let read = async {
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let serving = serve(io, BytesMut::new(), &options, std::future::pending(), echo);
    let (answer, ended) = tokio::join!(read, serving);
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(matches!(ended, Err(ConnError::HeadTimeout)));
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_closed_in_the_end_and_at_once_when_draining() {
    let (_client, io) = open(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let options = Options::default();
    let start = Instant::now();
    assert!(matches!(serve(io, BytesMut::new(), &options, std::future::pending(), echo).await, Ok(Ended::Closed)));
    assert!(start.elapsed() >= options.idle_timeout);

    let (mut client, io) = open(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let start = Instant::now();
    assert!(matches!(serve(io, BytesMut::new(), &options, std::future::ready(()), echo).await, Ok(Ended::Closed)));
    assert_eq!(start.elapsed(), Duration::ZERO);
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.ends_with("GET / []"), "the request that was there is answered: {answer}");
}

proptest::proptest! {
    #[test]
    fn splits_do_not_matter(cuts in proptest::collection::vec(0usize..400, 0..6)) {
        let input: &[u8] = b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\nPOST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc\
            POST /3 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nde\r\n1\r\nf\r\n0\r\nx: y\r\n\r\n\
            GET http://a/4 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut % input.len()).collect();
        cuts.sort_unstable();
        let mut parts = Vec::new();
        let mut start = 0;
        for cut in cuts {
            parts.push(&input[start..cut]);
            start = cut;
        }
        parts.push(&input[start..]);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let whole = runtime.block_on(talk_in_parts(&[input], echo)).0;
        let split = runtime.block_on(talk_in_parts(&parts, echo)).0;
        proptest::prop_assert_eq!(whole.matches("200 OK").count(), 4);
        proptest::prop_assert_eq!(whole, split);
    }
}

/// A client whom nobody knows.
fn stranger() -> Options {
    Options { pace: Some(Pace { within: Duration::from_secs(60), bytes: 4096 }), ..Options::default() }
}

#[tokio::test(start_paused = true)]
async fn a_stranger_who_trickles_a_body_is_cut_off_and_one_who_is_known_is_not() {
    for (options, limit) in [(stranger(), Some(60..=61)), (Options::default(), None)] {
        let (mut client, io) = open(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n").await;
        let (read, mut write) = tokio::io::split(&mut client);
        let trickle = async {
            for _ in 0..1000 {
                tokio::time::sleep(Duration::from_secs(1)).await;
                if write.write_all(b"x").await.is_err() {
                    break;
                }
            }
            std::future::pending::<()>().await;
        };
        let mut read = tokio::io::BufReader::new(read);
        let start = Instant::now();
        let serving = serve(io, BytesMut::new(), &options, std::future::pending(), async |request: Request| {
            match collect(request.body).await {
                Ok(body) => reply(200, format!("{}", body.len())),
                Err(error) => reply(408, format!("slow: {}", error.is_too_slow())),
            }
        });
        let mut answer = vec![0; 512];
        tokio::select! {
            read = read.read(&mut answer) => answer.truncate(read.unwrap()),
            _ = serving => panic!("ended"),
            () = trickle => {}
        }
        let answer = String::from_utf8(answer).unwrap();
        match limit {
            Some(limit) => {
                assert!(answer.ends_with("slow: true") && limit.contains(&start.elapsed().as_secs()), "{answer}");
            }
            None => assert!(answer.ends_with("\r\n\r\n1000"), "{answer}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_strangers_body_without_a_length_may_pause_and_is_left_when_it_stops() {
    let (mut client, io) = open(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    let start = Instant::now();
    let options = stranger();
    let serving =
        serve(io, BytesMut::new(), &options, std::future::pending(), async |request: Request| {
            match collect(request.body).await {
                Ok(body) => reply(200, format!("{}", body.len())),
                Err(error) => reply(408, format!("slow: {}", error.is_too_slow())),
            }
        });
    let (read, mut write) = tokio::io::split(&mut client);
    let pauses = async {
        for _ in 0..4 {
            tokio::time::sleep(Duration::from_secs(200)).await;
            write.write_all(b"1\r\nx\r\n").await.unwrap();
        }
        std::future::pending::<()>().await;
    };
    let mut read = tokio::io::BufReader::new(read);
    let mut answer = vec![0; 512];
    tokio::select! {
        read = read.read(&mut answer) => answer.truncate(read.unwrap()),
        _ = serving => panic!("ended"),
        () = pauses => {}
    }
    let answer = String::from_utf8(answer).unwrap();
    let left = start.elapsed().as_secs() - 800;
    assert!(answer.ends_with("slow: true") && (200..=600).contains(&left), "after {left} s: {answer}");
}

#[tokio::test(start_paused = true)]
async fn a_stranger_who_does_not_read_is_cut_off_and_one_who_is_known_is_not() {
    for (options, is_cut) in [(stranger(), true), (Options::default(), false)] {
        let (_client, io) = open(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        let large = async |_| reply(200, vec![b'x'; 100_000]);
        let serving = serve(io, BytesMut::new(), &options, std::future::pending(), large);
        let served = tokio::time::timeout(Duration::from_secs(3600), serving).await;
        assert_eq!(matches!(served, Ok(Err(ConnError::TooSlow))), is_cut, "{served:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stranger_whose_server_is_slow_is_waited_for() {
    let (mut client, io) = open(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await;
    let slow = async |_| {
        tokio::time::sleep(Duration::from_secs(3600)).await;
        reply(200, "at last")
    };
    let options = stranger();
    let read = async {
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let serving = serve(io, BytesMut::new(), &options, std::future::pending(), slow);
    let (answer, _) = tokio::join!(read, serving);
    assert!(answer.ends_with("at last"), "{answer}");
}

use super::*;
use crate::body::Frame;
use crate::h2::client::Connection;
use bytes::Bytes;
use http::Method;
use sheer_core::head::{Fields, RequestHead, Version};
use std::cell::RefCell;
use tokio::task::{JoinHandle, LocalSet, spawn_local};

type Ended = JoinHandle<Result<(), Error>>;

/// A client of ours and a server of ours at the two ends of a pipe.
async fn pair<S>(drain: drain::Watch, service: S) -> (Connection, Ended)
where
    S: AsyncFn(Request) -> Option<Response> + 'static,
{
    let (client, server) = tokio::io::duplex(64 * 1024);
    let ended = spawn_local(serve(server.into(), BytesMut::new(), Options::default(), drain, |_| {}, service));
    (Connection::start(client.into()), ended)
}

fn head() -> RequestHead {
    RequestHead::new(Method::POST, Version::Http2, "web", "/a?b=c")
}

fn ok(body: Body) -> Option<Response> {
    Some(Response { head: ResponseHead::new(StatusCode::OK), body })
}

async fn text(mut body: Body) -> (Vec<u8>, Option<Fields>) {
    let mut all = Vec::new();
    while let Some(frame) = body.frame().await {
        match frame.unwrap() {
            Frame::Data(bytes) => all.extend_from_slice(&bytes),
            Frame::Trailers(fields) => return (all, Some(fields)),
        }
    }
    (all, None)
}

#[tokio::test]
async fn large_bodies_and_heads_arrive_as_sent() {
    let test = async {
        let (_signal, drain) = drain::channel();
        let (client, _server) = pair(drain, async |request: Request| {
            assert_eq!((request.head.authority(), request.head.target()), ("web", "/a?b=c"));
            ok(request.body)
        })
        .await;
        let sent: Vec<u8> = (0..3_000_000u32).map(|it| it as u8).collect();
        let response = client.send(&head(), Body::Full(sent.clone().into()), &Interim::default()).await.unwrap();
        assert_eq!(response.head.status, StatusCode::OK);
        assert!(text(response.body).await.0 == sent);
        assert_eq!(client.streams(), 0);
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_says_nothing_is_let_go() {
    let (_client, server) = tokio::io::duplex(1024);
    let (_signal, drain) = drain::channel();
    let service = async |_| ok(Body::Empty);
    let ended = serve(server.into(), BytesMut::new(), Options::default(), drain, |_| {}, service).await.unwrap_err();
    assert!(matches!(ended, Error::Protocol { code: Code::SETTINGS_TIMEOUT, .. }), "{ended}");
}

#[tokio::test]
async fn trailers_pass_through_two_hops() {
    let test = async {
        let (_signal, drain) = drain::channel();
        // The application, on the crate itself.
        let (to_app, at_app) = tokio::io::duplex(64 * 1024);
        spawn_local(async move {
            let mut server = ::h2::server::handshake(at_app).await.unwrap();
            while let Some(stream) = server.accept().await {
                let (_, mut respond) = stream.unwrap();
                let mut body = respond.send_response(http::Response::new(()), false).unwrap();
                body.send_data(Bytes::from_static(b"hello"), false).unwrap();
                let trailers = [("grpc-status", "0")].map(|(k, v)| (k.parse().unwrap(), v.parse().unwrap()));
                body.send_trailers(http::HeaderMap::from_iter(trailers)).unwrap();
            }
        });
        let upstream = Connection::start(to_app.into());
        let (client, _server) = pair(drain, async move |request: Request| {
            upstream.send(&request.head, request.body, &request.interim).await.ok()
        })
        .await;
        let (body, trailers) = text(client.send(&head(), Body::Empty, &Interim::default()).await.unwrap().body).await;
        assert_eq!(body, b"hello");
        assert_eq!(trailers.unwrap().values_of("grpc-status").collect::<Vec<_>>(), [b"0"]);
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_cancelled_request_is_cancelled_behind_the_proxy() {
    struct Gone(Rc<Notified>);
    impl Drop for Gone {
        fn drop(&mut self) {
            self.0.notify_one();
        }
    }
    use tokio::sync::Notify as Notified;
    let test = async {
        let (_signal, drain) = drain::channel();
        let (began, gone) = (Rc::new(Notified::new()), Rc::new(Notified::new()));
        let (began_too, gone_too) = (began.clone(), gone.clone());
        let (client, _server) = pair(drain, async move |_request: Request| {
            let _held = Gone(gone_too.clone());
            began_too.notify_one();
            std::future::pending::<Option<Response>>().await
        })
        .await;
        let waiting =
            spawn_local(async move { client.send(&head(), Body::Empty, &Interim::default()).await.map(|_| ()) });
        began.notified().await;
        waiting.abort();
        gone.notified().await;
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_nobody_uses_is_closed_in_order() {
    let test = async {
        let (_signal, drain) = drain::channel();
        let (client, server) = pair(drain, async |_: Request| ok(Body::Empty)).await;
        let mut last = tokio::time::Instant::now();
        for _ in 0..3 {
            client.send(&head(), Body::Empty, &Interim::default()).await.unwrap();
            last = tokio::time::Instant::now();
            tokio::time::sleep(IDLE * 9 / 10).await;
        }
        assert!(client.is_open());
        // Its client may be the first to close.
        let _ = server.await.unwrap();
        assert!((IDLE..=IDLE * 2).contains(&last.elapsed()), "{:?}", last.elapsed());
        assert!(!client.is_open());
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn draining_says_goaway_and_finishes_what_is_open() {
    let test = async {
        let (signal, drain) = drain::channel();
        let proceed = Rc::new(tokio::sync::Semaphore::new(0));
        let seen = Rc::new(RefCell::new(0));
        let (gate, count) = (proceed.clone(), seen.clone());
        let (client, server) = pair(drain, async move |_request: Request| {
            *count.borrow_mut() += 1;
            let _ = gate.acquire().await;
            ok(Body::Full(Bytes::from_static(b"done")))
        })
        .await;
        let other = client.clone();
        let open = spawn_local(async move { other.send(&head(), Body::Empty, &Interim::default()).await });
        while *seen.borrow() == 0 {
            tokio::task::yield_now().await;
        }
        signal.set(drain::Phase::Told);
        while client.is_open() {
            tokio::task::yield_now().await;
        }
        let refused = client.send(&head(), Body::Empty, &Interim::default()).await.unwrap_err();
        assert!(refused.unprocessed && refused.body.is_some());
        proceed.add_permits(1);
        let answered = open.await.unwrap().unwrap();
        assert_eq!(text(answered.body).await.0, b"done");
        server.await.unwrap().unwrap();
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_stream_refused_by_the_other_side_may_be_sent_again() {
    let test = async {
        let (to_app, at_app) = tokio::io::duplex(64 * 1024);
        spawn_local(async move {
            let mut server = ::h2::server::handshake(at_app).await.unwrap();
            while let Some(Ok((_, mut respond))) = server.accept().await {
                respond.send_reset(::h2::Reason::REFUSED_STREAM);
            }
        });
        let client = Connection::start(to_app.into());
        let refused =
            client.send(&head(), Body::Full(Bytes::from_static(b"x")), &Interim::default()).await.unwrap_err();
        assert!(refused.unprocessed);
        assert!(matches!(refused.body.unwrap(), Body::Full(_)));
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn an_authority_that_differs_from_host_is_refused() {
    let test = async {
        let (_signal, drain) = drain::channel();
        let (client, server) = tokio::io::duplex(64 * 1024);
        spawn_local(serve(
            server.into(),
            BytesMut::new(),
            Options::default(),
            drain,
            |_| {},
            async |_: Request| ok(Body::Empty),
        ));
        let (mut sender, connection) = ::h2::client::handshake(client).await.unwrap();
        spawn_local(connection);
        let request = http::Request::get("http://web/").header("host", "other").body(()).unwrap();
        let error = sender.send_request(request, true).unwrap().0.await.unwrap_err();
        assert_eq!(error.reason(), Some(::h2::Reason::PROTOCOL_ERROR));
    };
    LocalSet::new().run_until(test).await;
}

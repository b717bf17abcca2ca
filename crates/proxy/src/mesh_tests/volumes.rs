//! More than any buffer holds, both ways at once.

use super::*;
use std::future::poll_fn;

/// Sends all of a body as far as the windows go.
async fn send(mut sender: h2::SendStream<Bytes>, body: &Bytes) {
    let mut sent = 0;
    while sent < body.len() {
        sender.reserve_capacity((body.len() - sent).min(50_000));
        let room = poll_fn(|cx| sender.poll_capacity(cx)).await.unwrap().unwrap();
        let part = body.slice(sent..body.len().min(sent + room));
        sent += part.len();
        sender.send_data(part, sent == body.len()).unwrap();
    }
}

/// Reads all of a body, giving its window back as it goes.
async fn receive(body: &mut h2::RecvStream) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(part) = body.data().await {
        let part = part.unwrap();
        body.flow_control().release_capacity(part.len()).unwrap();
        all.extend_from_slice(&part);
    }
    all
}

/// Answers each request with its body, as it comes.
async fn echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            spawn_local(async move {
                let mut connection = h2::server::handshake(stream).await.unwrap();
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    spawn_local(async move {
                        let mut body = request.into_body();
                        let mut answer = respond.send_response(http::Response::new(()), false).unwrap();
                        while let Some(Ok(part)) = body.data().await {
                            let _ = body.flow_control().release_capacity(part.len());
                            let mut part = part;
                            while !part.is_empty() {
                                answer.reserve_capacity(part.len());
                                let Some(Ok(room)) = poll_fn(|cx| answer.poll_capacity(cx)).await else { return };
                                answer.send_data(part.split_to(room.min(part.len())), false).unwrap();
                            }
                        }
                        answer.send_data(Bytes::new(), true).unwrap();
                    });
                }
            });
        }
    });
    port
}

#[tokio::test]
async fn megabytes_are_echoed_over_http2() {
    let test = async {
        let port = echo().await;
        let (_api, _web, door) = two(Protocol::Grpc, port).await;
        let body = Bytes::from((0..8_000_000_u32).map(|place| (place / 7) as u8).collect::<Vec<_>>());
        for turn in 0..5 {
            let (mut client, connection) =
                h2::client::handshake(TcpStream::connect(door).await.unwrap()).await.unwrap();
            spawn_local(connection);
            let calls = (0..=turn % 2).map(|_| {
                let request = http::Request::post("http://web/echo").body(()).unwrap();
                let (response, sender) = client.send_request(request, false).unwrap();
                async {
                    let echoed = async { receive(response.await.unwrap().body_mut()).await };
                    let ((), echoed) = tokio::join!(send(sender, &body), echoed);
                    assert!(echoed == body, "{} of {} bytes", echoed.len(), body.len());
                }
            });
            futures::future::join_all(calls.collect::<Vec<_>>()).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(120), LocalSet::new().run_until(test)).await.expect("all comes through");
}

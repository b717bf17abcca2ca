//! Serves HTTP/1.1 and HTTP/2 with prior knowledge on one port, and ends without cutting anyone off.

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, Version};
use axum::middleware::{self, Next};
use axum::response::Response;
use futures::FutureExt as _;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use std::future::Future;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// After a stop, how long connections go on until they end with their next answer; then idle ones are closed.
const LINGER: Duration = Duration::from_secs(1);

/// After a stop, how long connections may take to end.
const GRACE: Duration = Duration::from_secs(10);

/// Names the version that answered.
pub(crate) const VERSION: HeaderName = HeaderName::from_static("x-version");

/// Comes back in the answer as it was in the request, so that a client can tell whose answer it got.
pub(crate) const SEQUENCE: HeaderName = HeaderName::from_static("x-sequence");

/// Serves until `stop` completes, then lets every request in progress end.
pub(crate) async fn serve(listener: TcpListener, router: Router, version: &str, stop: impl Future<Output = ()>) {
    let version = HeaderValue::from_str(version).unwrap_or(HeaderValue::from_static("unknown"));
    let router = router.merge(crate::probe::router());
    connections(listener, stop, |stream, ending| {
        let label = middleware::from_fn_with_state((version.clone(), ending.clone()), label);
        connection(stream, router.clone().layer(label), ending)
    })
    .await;
}

/// Accepts until `stop` completes, then turns the watch to `true` and waits for all connections to end.
pub(crate) async fn connections<F, R>(listener: TcpListener, stop: impl Future<Output = ()>, mut one: F)
where
    F: FnMut(TcpStream, watch::Receiver<bool>) -> R,
    R: Future<Output = ()> + Send + 'static,
{
    let (ending, _) = watch::channel(false);
    let mut connections = JoinSet::new();
    tokio::pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => break,
            // Ended tasks are collected so that the set does not grow.
            Some(_) = connections.join_next() => (),
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => { connections.spawn(one(stream, ending.subscribe())); }
                // Out of file descriptors, most likely: connections that end will free some.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            },
        }
    }
    // Closing the listener would reset the connections that wait in its queue.
    while let Some(Ok((stream, _))) = listener.accept().now_or_never() {
        connections.spawn(one(stream, ending.subscribe()));
    }
    drop(listener);
    let _ = ending.send(true);
    let _ = tokio::time::timeout(GRACE, async { while connections.join_next().await.is_some() {} }).await;
}

async fn connection(stream: TcpStream, router: Router, mut ending: watch::Receiver<bool>) {
    let _ = stream.set_nodelay(true);
    let builder = auto::Builder::new(TokioExecutor::new());
    let service = TowerToHyperService::new(router);
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let lingered = async {
        let _ = ending.wait_for(|ending| *ending).await;
        tokio::time::sleep(LINGER).await;
    };
    tokio::select! {
        _ = connection.as_mut() => return,
        () = lingered => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}

type Label = (HeaderValue, watch::Receiver<bool>);

async fn label(State((version, ending)): State<Label>, request: Request, next: Next) -> Response {
    let sequence = request.headers().get(SEQUENCE).cloned();
    let one_at_a_time = request.version() < Version::HTTP_2;
    let mut response = next.run(request).await;
    response.headers_mut().insert(VERSION, version);
    if let Some(sequence) = sequence {
        response.headers_mut().insert(SEQUENCE, sequence);
    }
    if one_at_a_time && *ending.borrow() {
        response.headers_mut().insert("connection", HeaderValue::from_static("close"));
    }
    response
}

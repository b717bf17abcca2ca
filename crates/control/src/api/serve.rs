//! Accepts the API's connections.

use super::access::Caller;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tower::ServiceExt;

/// Connections at a time, on each listener: browsers and command lines of one host.
const MAX_CONNECTIONS: usize = 128;
/// A head that takes longer ends the connection, also an idle one.
const HEAD: Duration = Duration::from_secs(10);
/// A connection that takes longer in all is cut: a slow body, a reader that stops.
const LIFE: Duration = Duration::from_secs(300);

/// Serves a unix socket until dropped.
pub(crate) async fn accept_unix(listener: UnixListener, router: axum::Router) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        let Some((stream, _)) = crate::listen::accepted(listener.accept().await).await else { continue };
        let Ok(credentials) = stream.peer_cred() else { continue };
        let serving = serve(stream, Caller::Local { uid: credentials.uid() }, router.clone());
        tokio::spawn(async move {
            serving.await;
            drop(permit);
        });
    }
}

/// Serves a TCP listener until dropped.
pub(crate) async fn accept_tcp(listener: TcpListener, router: axum::Router) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        let Some((stream, peer)) = crate::listen::accepted(listener.accept().await).await else { continue };
        let Ok(here) = stream.local_addr() else { continue };
        let serving = serve(stream, Caller::Tcp { peer, here }, router.clone());
        tokio::spawn(async move {
            serving.await;
            drop(permit);
        });
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin + Send, caller: Caller, router: axum::Router) {
    let service = hyper::service::service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(caller.clone());
        router.clone().oneshot(request.map(axum::body::Body::new))
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .serve_connection(TokioIo::new(stream), service);
    // A caller that goes away, or takes too long, has nobody to be told.
    let _ = tokio::time::timeout(LIFE, connection).await;
}

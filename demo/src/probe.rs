//! Paths that every HTTP service answers beside its own, for trying out what lies between a client and a server.

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{any, get};
use bytes::Bytes;
use std::time::Duration;

/// At most this many bytes are made up for one answer.
const MAX_BYTES: u64 = 1 << 32;

/// `/probe/healthy`, `/probe/status/CODE`, `/probe/bytes/N` (with a length), `/probe/chunks/N` (without one),
/// `/probe/slow/MILLISECONDS`, `/probe/echo` (the body comes back), `/probe/headers` (as they arrived, in JSON).
pub(crate) fn router() -> Router {
    Router::new()
        .route("/probe/healthy", get(async || "ok\n"))
        .route("/probe/status/{code}", any(status))
        .route("/probe/bytes/{count}", get(bytes))
        .route("/probe/chunks/{count}", get(chunks))
        .route("/probe/slow/{millis}", get(slow))
        .route("/probe/echo", any(echo))
        .route("/probe/headers", any(headers))
}

async fn status(Path(code): Path<u16>) -> StatusCode {
    StatusCode::from_u16(code).unwrap_or(StatusCode::BAD_REQUEST)
}

async fn bytes(Path(count): Path<u64>) -> Response {
    let count = count.min(MAX_BYTES);
    ([("content-length", count.to_string())], Body::from_stream(filler(count))).into_response()
}

async fn chunks(Path(count): Path<u64>) -> Body {
    Body::from_stream(filler(count.min(MAX_BYTES)))
}

/// Bytes whose value is their position modulo 251, so that a lost or doubled one shows.
fn filler(count: u64) -> impl futures::Stream<Item = Result<Bytes, std::convert::Infallible>> {
    const PIECE: u64 = 16 * 1024;
    futures::stream::unfold(0, move |position| async move {
        if position >= count {
            return None;
        }
        let end = count.min(position + PIECE);
        let piece: Vec<u8> = (position..end).map(|at| (at % 251) as u8).collect();
        Some((Ok(Bytes::from(piece)), end))
    })
}

async fn slow(Path(millis): Path<u64>) -> &'static str {
    tokio::time::sleep(Duration::from_millis(millis.min(600_000))).await;
    "at last\n"
}

async fn echo(request: Request) -> Response {
    let content_type = request.headers().get("content-type").cloned();
    let mut response = Response::new(request.into_body());
    if let Some(content_type) = content_type {
        response.headers_mut().insert("content-type", content_type);
    }
    response
}

async fn headers(method: axum::http::Method, uri: axum::http::Uri, headers: HeaderMap) -> Response {
    let headers: Vec<(String, String)> = headers
        .iter()
        .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
        .collect();
    Json(serde_json::json!({ "method": method.as_str(), "target": uri.to_string(), "headers": headers }))
        .into_response()
}

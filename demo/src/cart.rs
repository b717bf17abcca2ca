//! What each customer wants, kept in Redis.

use crate::arguments::Peers;
use crate::redis::{Redis, Reply};
use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use std::collections::BTreeMap;
use std::sync::Arc;

pub(crate) fn router(peers: &Peers) -> Router {
    Router::new()
        .route("/carts/{customer}", get(show))
        .route("/carts/{customer}/{item}", post(add))
        .with_state(Arc::new(Redis::new(peers.address("redis", 6379))))
}

async fn show(State(redis): State<Arc<Redis>>, Path(customer): Path<String>) -> Response {
    match redis.call(&["HGETALL", &format!("cart:{customer}")]).await {
        Ok(Reply::List(list)) => {
            let items: BTreeMap<&str, u64> =
                list.chunks_exact(2).map(|pair| (pair[0].as_str(), pair[1].parse().unwrap_or(0))).collect();
            Json(items).into_response()
        }
        Ok(other) => away(format!("Redis sent {other:?}")),
        Err(error) => away(error.to_string()),
    }
}

async fn add(State(redis): State<Arc<Redis>>, Path((customer, item)): Path<(String, String)>) -> Response {
    match redis.call(&["HINCRBY", &format!("cart:{customer}"), &item, "1"]).await {
        Ok(Reply::Integer(count)) => Json(BTreeMap::from([(item, count)])).into_response(),
        Ok(other) => away(format!("Redis sent {other:?}")),
        Err(error) => away(error.to_string()),
    }
}

fn away(why: String) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, format!("the carts cannot be read: {why}\n")).into_response()
}

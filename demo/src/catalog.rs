//! What the shop sells.

use axum::Router;
use axum::extract::Path;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use serde::Serialize;

#[derive(Clone, Copy, Serialize)]
pub(crate) struct Item {
    pub(crate) id: &'static str,
    pub(crate) name: &'static str,
    pub(crate) cents: u64,
}

pub(crate) const ITEMS: &[Item] = &[
    Item { id: "net", name: "Butterfly net", cents: 1450 },
    Item { id: "tights", name: "Sheer tights", cents: 1290 },
    Item { id: "veil", name: "Bridal veil", cents: 8900 },
    Item { id: "curtain", name: "Voile curtain", cents: 3990 },
    Item { id: "sieve", name: "Fine sieve", cents: 1875 },
    Item { id: "gauze", name: "Gauze, 10 m", cents: 640 },
    Item { id: "hammock", name: "Mesh hammock", cents: 5400 },
    Item { id: "racket", name: "Badminton racket", cents: 4520 },
];

pub(crate) fn router() -> Router {
    Router::new().route("/items", get(async || Json(ITEMS))).route("/items/{id}", get(item))
}

async fn item(Path(id): Path<String>) -> Response {
    match ITEMS.iter().find(|item| item.id == id) {
        Some(item) => Json(item).into_response(),
        None => (StatusCode::NOT_FOUND, format!("no item is called {id}\n")).into_response(),
    }
}

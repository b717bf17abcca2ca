//! What customers say: v1 in words, v2 with stars.

use axum::Router;
use axum::extract::Path;
use axum::response::Json;
use axum::routing::get;
use serde_json::{Value, json};

pub(crate) fn router(version: &str) -> Router {
    let (version, stars) = (version.to_owned(), version != "v1");
    Router::new()
        .route("/reviews/{item}", get(async move |Path(item): Path<String>| Json(reviews(&item, &version, stars))))
}

fn reviews(item: &str, version: &str, stars: bool) -> Value {
    let voices = [("Ada", "You hardly notice it is there.", 5), ("Grace", "Found a bug in it. Released it.", 4)];
    let voices: Vec<Value> = voices
        .into_iter()
        .map(|(who, text, count)| match stars {
            true => json!({ "who": who, "text": text, "stars": count }),
            false => json!({ "who": who, "text": text }),
        })
        .collect();
    json!({ "item": item, "version": version, "reviews": voices })
}

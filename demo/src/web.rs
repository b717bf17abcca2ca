//! The shop's front. Without the catalog there is no page; any other peer that fails leaves a note in its place.

use crate::arguments::Peers;
use crate::client::{CallError, Client};
use crate::pricing::rpc::pricing_client::PricingClient;
use crate::pricing::wire;
use anyhow::Context as _;
use axum::Router;
use axum::extract::{Path, State};
use axum::http::{Method, StatusCode};
use axum::response::{Html, IntoResponse, Json, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;
use tonic::transport::{Channel, Endpoint};

struct Shop {
    catalog: Client,
    reviews: Client,
    cart: Client,
    pricing: PricingClient<Channel>,
}

/// `/` in HTML; `/api/items`, `/api/items/ID`, `/api/cart/CUSTOMER` and a POST to `/api/cart/CUSTOMER/ID` in JSON.
pub(crate) fn router(peers: &Peers) -> anyhow::Result<Router> {
    let pricing = Endpoint::from_shared(peers.url("pricing")).context("the address of pricing")?;
    let pricing = pricing.timeout(Duration::from_secs(5)).connect_timeout(Duration::from_secs(5)).connect_lazy();
    let shop = Shop {
        catalog: Client::new(&peers.url("catalog")),
        reviews: Client::new(&peers.url("reviews")),
        cart: Client::new(&peers.url("cart")),
        pricing: PricingClient::new(pricing),
    };
    Ok(Router::new()
        .route("/", get(page))
        .route("/api/items", get(items))
        .route("/api/items/{id}", get(item))
        .route("/api/cart/{customer}", get(cart))
        .route("/api/cart/{customer}/{item}", post(add))
        .with_state(Arc::new(shop)))
}

async fn items(State(shop): State<Arc<Shop>>) -> Response {
    answer(shop.catalog.get_json("/items").await)
}

async fn item(State(shop): State<Arc<Shop>>, Path(id): Path<String>) -> Response {
    match shop.catalog.get_json(&format!("/items/{id}")).await {
        Ok(item) => Json(shop.describe(item).await).into_response(),
        Err(error) => failure(&error),
    }
}

async fn cart(State(shop): State<Arc<Shop>>, Path(customer): Path<String>) -> Response {
    answer(shop.cart.get_json(&format!("/carts/{customer}")).await)
}

async fn add(State(shop): State<Arc<Shop>>, Path((customer, item)): Path<(String, String)>) -> Response {
    answer(shop.cart.call_json(Method::POST, &format!("/carts/{customer}/{item}")).await)
}

fn answer(result: Result<Value, CallError>) -> Response {
    match result {
        Ok(value) => Json(value).into_response(),
        Err(error) => failure(&error),
    }
}

/// A peer's refusal of the customer's own mistake is passed on; any other failure is a bad gateway's.
fn failure(error: &CallError) -> Response {
    let status = match error {
        CallError::Refused(_, status, _) if status.is_client_error() => *status,
        CallError::Late(_) => StatusCode::GATEWAY_TIMEOUT,
        CallError::Refused(..) | CallError::Connect(..) | CallError::Broken(..) => StatusCode::BAD_GATEWAY,
    };
    (status, format!("{error}\n")).into_response()
}

impl Shop {
    /// Adds the price and the reviews to an item of the catalog.
    async fn describe(&self, mut item: Value) -> Value {
        let id = item["id"].as_str().unwrap_or_default().to_owned();
        let mut pricing = self.pricing.clone();
        let path = format!("/reviews/{id}");
        let (price, reviews) =
            tokio::join!(pricing.quote(wire::Item { id, sequence: 0 }), self.reviews.get_json(&path));
        item["price"] = match price {
            Ok(price) => {
                let price = price.into_inner();
                json!({ "cents": price.cents, "version": price.version })
            }
            Err(status) => json!({ "unavailable": format!("pricing: {:?}: {}", status.code(), status.message()) }),
        };
        item["reviews"] = reviews.unwrap_or_else(|error| json!({ "unavailable": error.to_string() }));
        item
    }
}

async fn page(State(shop): State<Arc<Shop>>) -> Response {
    let items = match shop.catalog.get_json("/items").await {
        Ok(items) => items,
        Err(error) => return failure(&error),
    };
    let listed = items.as_array().map(Vec::as_slice).unwrap_or_default();
    let items = futures::future::join_all(listed.iter().cloned().map(|item| shop.describe(item))).await;
    let mut rows = String::new();
    for item in &items {
        let _ = write!(
            rows,
            "<tr><td>{}<td>{}<td>{}",
            escape(item["name"].as_str().unwrap_or_default()),
            price(&item["price"]),
            reviews(&item["reviews"])
        );
    }
    Html(PAGE.replace("ROWS", &rows)).into_response()
}

fn price(price: &Value) -> String {
    match (price["cents"].as_u64(), price["unavailable"].as_str()) {
        (Some(cents), _) => {
            format!("&euro; {}.{:02} <small>{}</small>", cents / 100, cents % 100, escape(text(&price["version"])))
        }
        (None, why) => note(why),
    }
}

fn reviews(reviews: &Value) -> String {
    let Some(voices) = reviews["reviews"].as_array() else { return note(reviews["unavailable"].as_str()) };
    let mut html = String::new();
    for voice in voices {
        let stars = "\u{2605}".repeat(voice["stars"].as_u64().unwrap_or(0).min(5) as usize);
        let _ = write!(html, "{stars} {} <i>{}</i><br>", escape(text(&voice["text"])), escape(text(&voice["who"])));
    }
    let _ = write!(html, "<small>reviews {}</small>", escape(text(&reviews["version"])));
    html
}

fn note(why: Option<&str>) -> String {
    format!("<em>not available: {}</em>", escape(why.unwrap_or("no answer")))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

const PAGE: &str = r#"<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>The Sheer Shop</title>
<style>body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}
td{padding:.4rem 1rem .4rem 0;vertical-align:top;border-top:1px solid #8884}small{opacity:.6}em{color:#b00}
:root{color-scheme:light dark}</style>
<h1>The Sheer Shop</h1><p>Things you can see through. <a href="/api/items">JSON</a></p><table>ROWS</table></html>
"#;

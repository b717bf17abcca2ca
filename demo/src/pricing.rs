//! What an item costs: gRPC, all four kinds of call. v1 asks the list price, v2 takes a tenth off.

use crate::catalog::ITEMS;
use crate::server;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};
use wire::{Item, Price, WatchRequest};

/// The messages.
pub mod wire {
    /// An item to price.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Item {
        /// The item's id in the catalog.
        #[prost(string, tag = "1")]
        pub id: String,
        /// Comes back in the answer.
        #[prost(uint64, tag = "2")]
        pub sequence: u64,
    }

    /// The price of an item.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Price {
        /// The item's id.
        #[prost(string, tag = "1")]
        pub id: String,
        /// Hundredths of the currency.
        #[prost(uint64, tag = "2")]
        pub cents: u64,
        /// Which version of the service set it.
        #[prost(string, tag = "3")]
        pub version: String,
        /// The request's sequence, or the position in a stream.
        #[prost(uint64, tag = "4")]
        pub sequence: u64,
    }

    /// Asks for a stream of prices.
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct WatchRequest {
        /// The item's id in the catalog.
        #[prost(string, tag = "1")]
        pub id: String,
        /// How many prices to send.
        #[prost(uint64, tag = "2")]
        pub count: u64,
        /// How long to wait between two, in milliseconds.
        #[prost(uint64, tag = "3")]
        pub interval_ms: u64,
    }
}

/// Generated client and server.
#[allow(missing_docs, unreachable_pub, clippy::all, rustdoc::all, reason = "generated")]
pub mod rpc {
    include!(concat!(env!("OUT_DIR"), "/shop.v1.Pricing.rs"));
}

struct Pricing {
    version: String,
}

pub(crate) async fn serve(listener: TcpListener, version: &str, stop: impl Future<Output = ()>) {
    let pricing = rpc::pricing_server::PricingServer::new(Pricing { version: version.to_owned() });
    server::serve(listener, Routes::new(pricing).into_axum_router(), version, stop).await;
}

impl Pricing {
    fn price(&self, id: &str, sequence: u64) -> Result<Price, Status> {
        let item = ITEMS.iter().find(|item| item.id == id);
        let list = item.ok_or_else(|| Status::not_found(format!("no item is called {id}")))?.cents;
        let cents = if self.version == "v1" { list } else { list * 9 / 10 };
        Ok(Price { id: id.to_owned(), cents, version: self.version.clone(), sequence })
    }
}

type Prices = Pin<Box<dyn Stream<Item = Result<Price, Status>> + Send>>;

#[tonic::async_trait]
impl rpc::pricing_server::Pricing for Pricing {
    type WatchStream = Prices;
    type HaggleStream = Prices;

    async fn quote(&self, request: Request<Item>) -> Result<Response<Price>, Status> {
        let item = request.into_inner();
        Ok(Response::new(self.price(&item.id, item.sequence)?))
    }

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Prices>, Status> {
        let WatchRequest { id, count, interval_ms } = request.into_inner();
        let first = self.price(&id, 0)?;
        // A consumer that stops reading stops the producer after these few.
        let (sender, receiver) = tokio::sync::mpsc::channel(4);
        tokio::spawn(async move {
            for sequence in 0..count {
                if sender.send(Ok(Price { sequence, ..first.clone() })).await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(interval_ms)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn total(&self, request: Request<Streaming<Item>>) -> Result<Response<Price>, Status> {
        let mut items = request.into_inner();
        let mut total = Price { id: "total".to_owned(), version: self.version.clone(), ..Price::default() };
        while let Some(item) = items.message().await? {
            total.cents = total.cents.saturating_add(self.price(&item.id, 0)?.cents);
            total.sequence += 1;
        }
        Ok(Response::new(total))
    }

    async fn haggle(&self, request: Request<Streaming<Item>>) -> Result<Response<Prices>, Status> {
        let this = Pricing { version: self.version.clone() };
        let prices = request.into_inner().map(move |item| item.and_then(|item| this.price(&item.id, item.sequence)));
        Ok(Response::new(Box::pin(prices)))
    }
}

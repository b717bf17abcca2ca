//! Generates the client and server of the pricing service from the description below.
use tonic_build::manual::{Builder, Method, Service};

fn main() {
    let method = |name: &str, route: &str, input: &str, output: &str| {
        Method::builder()
            .name(name)
            .route_name(route)
            .input_type(format!("crate::pricing::wire::{input}"))
            .output_type(format!("crate::pricing::wire::{output}"))
            .codec_path("tonic_prost::ProstCodec")
    };
    let pricing = Service::builder()
        .name("Pricing")
        .package("shop.v1")
        .comment("What an item costs.")
        .method(method("quote", "Quote", "Item", "Price").comment("The price of one item.").build())
        .method(
            method("watch", "Watch", "WatchRequest", "Price")
                .comment("The price of one item, again and again.")
                .server_streaming()
                .build(),
        )
        .method(
            method("total", "Total", "Item", "Price")
                .comment("The price of all items together.")
                .client_streaming()
                .build(),
        )
        .method(
            method("haggle", "Haggle", "Item", "Price")
                .comment("A price for each item, as they come.")
                .client_streaming()
                .server_streaming()
                .build(),
        )
        .build();
    Builder::new().compile(&[pricing]);
}

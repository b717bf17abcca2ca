//! Generates the gRPC services over the message types of `sheer_core::wire`.
use tonic_build::manual::{Builder, Method, Service};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let prost = "::tonic_prost::ProstCodec";
    let discovery = Service::builder()
        .name("AggregatedDiscoveryService")
        .package("envoy.service.discovery.v3")
        .method(
            Method::builder()
                .name("delta_aggregated_resources")
                .route_name("DeltaAggregatedResources")
                .input_type("::sheer_core::wire::discovery::DeltaDiscoveryRequest")
                .output_type("crate::push::Delivery")
                .codec_path("crate::push::DeliveryCodec")
                .client_streaming()
                .server_streaming()
                .build(),
        )
        .build();
    let identity = Service::builder()
        .name("Identity")
        .package("sheer.v1")
        .method(
            Method::builder()
                .name("certify")
                .route_name("Certify")
                .input_type("::sheer_core::wire::v1::CertifyRequest")
                .output_type("::sheer_core::wire::v1::CertifyResponse")
                .codec_path(prost)
                .build(),
        )
        .build();
    let fleet = Service::builder()
        .name("Fleet")
        .package("sheer.v1")
        .method(
            Method::builder()
                .name("attach")
                .route_name("Attach")
                .input_type("::sheer_core::wire::v1::ProxyReport")
                .output_type("::sheer_core::wire::v1::ControlNotice")
                .codec_path(prost)
                .client_streaming()
                .server_streaming()
                .build(),
        )
        .build();
    Builder::new().build_client(false).build_server(true).compile(&[discovery, identity, fleet]);
}

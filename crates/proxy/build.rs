//! Generates the clients of the control plane's services over the messages of `sheer_core::wire`, and their servers for
//! the tests.
use std::path::PathBuf;
use tonic_build::manual::{Builder, Method, Service};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let identity = Service::builder()
        .package("sheer.v1")
        .name("Identity")
        .method(method("certify", "Certify", "v1::CertifyRequest", "v1::CertifyResponse").build());
    let fleet = Service::builder().package("sheer.v1").name("Fleet").method(
        method("attach", "Attach", "v1::ProxyReport", "v1::ControlNotice")
            .client_streaming()
            .server_streaming()
            .build(),
    );
    let discovery = Service::builder().package("envoy.service.discovery.v3").name("AggregatedDiscoveryService").method(
        method(
            "delta_aggregated_resources",
            "DeltaAggregatedResources",
            "discovery::DeltaDiscoveryRequest",
            "discovery::DeltaDiscoveryResponse",
        )
        .client_streaming()
        .server_streaming()
        .build(),
    );
    let services = [identity.build(), fleet.build(), discovery.build()];
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    Builder::new().build_server(false).compile(&services);
    let servers = out.join("servers");
    std::fs::create_dir_all(&servers).expect("OUT_DIR is writable");
    Builder::new().build_client(false).out_dir(servers).compile(&services);
}

fn method(name: &str, route: &str, input: &str, output: &str) -> tonic_build::manual::MethodBuilder {
    Method::builder()
        .name(name)
        .route_name(route)
        .input_type(format!("sheer_core::wire::{input}"))
        .output_type(format!("sheer_core::wire::{output}"))
        .codec_path("tonic_prost::ProstCodec")
}

//! Generates the message types of `wire` from `proto/`, without an installed protoc.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(
        [
            "sheer/v1/resources.proto",
            "sheer/v1/control.proto",
            "envoy/service/discovery/v3/discovery.proto",
            "google/rpc/status.proto",
        ],
        ["proto"],
    )?;
    prost_build::Config::new().bytes(["."]).btree_map(["."]).compile_fds(files)?;
    Ok(())
}

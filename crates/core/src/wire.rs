//! The messages between control plane and proxies, generated from the .proto files in `proto/`.
//!
//! Resources travel over Envoy's delta aggregated discovery protocol; see `proto/sheer/v1/resources.proto` for each
//! resource's name. A resource's version is a hash of its content, so that a proxy can resume at any control plane.

use bytes::Bytes;
use prost::Message;
use sha2::{Digest, Sha256};
use std::net::IpAddr;

pub use generated::envoy::service::discovery::v3 as discovery;
pub use generated::google::rpc;
pub use generated::sheer::v1;

// The nesting is that of the .proto packages: generated code refers to its neighbours by relative paths.
#[allow(missing_docs, unreachable_pub, clippy::all, rustdoc::all, reason = "generated")]
mod generated {
    pub mod google {
        pub mod rpc {
            include!(concat!(env!("OUT_DIR"), "/google.rpc.rs"));
        }
    }
    pub mod envoy {
        pub mod service {
            pub mod discovery {
                pub mod v3 {
                    include!(concat!(env!("OUT_DIR"), "/envoy.service.discovery.v3.rs"));
                }
            }
        }
    }
    pub mod sheer {
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/sheer.v1.rs"));
        }
    }
}

/// Request metadata of a proxy that serves with what it holds: it can be asked to come back later.
pub const SERVING: &str = "sheer-serving";

/// Metadata of a refusal: in how many milliseconds to come back (gRPC's own name for it, proposal A6).
pub const PUSHBACK: &str = "grpc-retry-pushback-ms";

/// The features of resources that this version understands; `requires` of a resource may name no other.
pub const FEATURES: &[&str] = &["base"];

/// gRPC path of the delta discovery stream.
pub const DISCOVERY_PATH: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";

/// A resource type: its message and its type URL.
pub trait Resource: Message + Default {
    /// `type.googleapis.com/sheer.v1.<Kind>`.
    const TYPE_URL: &'static str;

    /// The name under which the resource travels.
    fn resource_name(&self) -> String;

    /// Features a proxy must have to apply it.
    fn requires(&self) -> &[String];
}

macro_rules! resource {
    ($kind:ident, |$it:ident| $name:expr) => {
        impl Resource for v1::$kind {
            const TYPE_URL: &'static str = concat!("type.googleapis.com/sheer.v1.", stringify!($kind));
            fn resource_name(&self) -> String {
                let $it = self;
                $name
            }
            fn requires(&self) -> &[String] {
                &self.requires
            }
        }
    };
}

resource!(Service, |it| format!("{}/{}", it.namespace, it.name));
resource!(Endpoints, |it| format!("{}/{}", it.namespace, it.name));
resource!(Address, |it| ip_of(&it.address).map_or_else(String::new, |address| address.to_string()));
resource!(Routes, |it| format!("{}/{}", it.namespace, it.name));
resource!(Workload, |it| it.uid.clone());
resource!(Mesh, |_it| "mesh".to_owned());
resource!(TrustBundle, |it| it.trust_domain.clone());

/// An address as it travels: 4 or 16 bytes, network order.
pub fn octets_of(address: IpAddr) -> Bytes {
    match address.to_canonical() {
        IpAddr::V4(address) => Bytes::copy_from_slice(&address.octets()),
        IpAddr::V6(address) => Bytes::copy_from_slice(&address.octets()),
    }
}

/// The address that these bytes are.
pub fn ip_of(octets: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(octets).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(octets).map(IpAddr::from)).ok().map(|it| it.to_canonical())
}

/// The version of a resource with this encoding: the first 128 bits of its SHA-256, in lower-case hex.
pub fn version_of(encoded: &[u8]) -> String {
    let digest = Sha256::digest(encoded);
    digest[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Encodes a resource for delivery. The returned bytes are shared by all streams.
pub fn pack<R: Resource>(resource: &R) -> discovery::Resource {
    let encoded: Bytes = resource.encode_to_vec().into();
    discovery::Resource {
        version: version_of(&encoded),
        name: resource.resource_name(),
        aliases: Vec::new(),
        resource: Some(prost_types::Any { type_url: R::TYPE_URL.to_owned(), value: encoded.to_vec() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_depends_on_content_alone() {
        let mesh = v1::Mesh { trust_domain: "example".into(), ..Default::default() };
        let packed = pack(&mesh);
        assert_eq!(packed.version.len(), 32);
        assert_eq!(packed.version, pack(&mesh.clone()).version);
        let other = v1::Mesh { trust_domain: "other".into(), ..Default::default() };
        assert_ne!(packed.version, pack(&other).version);
        assert_eq!(packed.name, "mesh");
    }
}

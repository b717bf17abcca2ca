//! Virtual addresses of services: a hash of the name is the first guess, the next free one after it is taken.

use crate::name::ServiceName;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use sha2::{Digest, Sha256};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Where services' addresses come from, one range of each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtualRanges {
    /// IPv4.
    pub v4: Ipv4Net,
    /// IPv6.
    pub v6: Ipv6Net,
}

/// How many addresses after the first guess are tried.
const PROBES: u32 = 4096;

impl VirtualRanges {
    /// The default ranges of a mesh: `240.240.0.0/16`, and a unique local /48 from the trust domain's hash.
    pub fn of(trust_domain: &str) -> Self {
        let v4 = Ipv4Net::new_assert(Ipv4Addr::new(240, 240, 0, 0), 16);
        Self { v4, v6: default_v6_range(trust_domain) }
    }

    /// Both, as they travel.
    pub fn cidrs(&self) -> Vec<String> {
        vec![self.v4.to_string(), self.v6.to_string()]
    }

    /// Whether an address is of either range.
    pub fn contains(&self, address: &IpAddr) -> bool {
        IpNet::V4(self.v4).contains(address) || IpNet::V6(self.v6).contains(address)
    }

    /// An IPv4 and an IPv6 address for a service: what its name hashes to, or the next one that is not `taken`. A
    /// family of which too many in a row are taken is left out. The caller records what it gets: a service keeps its
    /// addresses.
    pub fn assign(&self, service: &ServiceName, taken: impl Fn(IpAddr) -> bool) -> Vec<IpAddr> {
        let hash = Sha256::digest(service.to_string().as_bytes());
        let word = |from: usize| hash[from..from + 8].iter().fold(0_u64, |word, byte| word << 8 | u64::from(*byte));
        let free = |candidate: &IpAddr| !taken(*candidate);
        let v4 = (0..PROBES).map(|step| IpAddr::V4(self.v4_at(word(0).wrapping_add(u64::from(step))))).find(free);
        let v6 = (0..PROBES).map(|step| IpAddr::V6(self.v6_at(word(8).wrapping_add(u64::from(step))))).find(free);
        v4.into_iter().chain(v6).collect()
    }

    /// The range's addresses in a circle, without its first and last, which some stacks treat as special.
    fn v4_at(&self, index: u64) -> Ipv4Addr {
        let size = 1_u64 << (32 - u32::from(self.v4.prefix_len()));
        let usable = size.saturating_sub(2).max(1);
        let offset = u32::try_from(1 + index % usable).unwrap_or(1);
        Ipv4Addr::from(u32::from(self.v4.network()).wrapping_add(offset))
    }

    fn v6_at(&self, index: u64) -> Ipv6Addr {
        let bits = 128 - u32::from(self.v6.prefix_len());
        let offset = if bits >= 64 { u128::from(index) } else { u128::from(index) % (1_u128 << bits) };
        Ipv6Addr::from(u128::from(self.v6.network()) | offset.max(1))
    }
}

/// The unique local /48 of a trust domain (RFC 4193, its global ID being a hash instead of a random number).
pub fn default_v6_range(trust_domain: &str) -> Ipv6Net {
    let hash = Sha256::digest(trust_domain.as_bytes());
    let mut octets = [0; 16];
    octets[0] = 0xfd;
    octets[1..6].copy_from_slice(&hash[..5]);
    Ipv6Net::new_assert(Ipv6Addr::from(octets), 48)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_service_gets_the_same_addresses_until_they_are_taken() {
        let ranges = VirtualRanges::of("mesh.internal");
        let web = ServiceName::parse("web").unwrap();
        let first = ranges.assign(&web, |_| false);
        assert_eq!(first, ranges.assign(&web, |_| false));
        assert_eq!(first.len(), 2);
        assert!(first.iter().all(|address| ranges.contains(address)));
        let next = ranges.assign(&web, |address| first.contains(&address));
        assert!(next.iter().all(|address| ranges.contains(address) && !first.contains(address)));
        assert!(ranges.assign(&web, |_| true).is_empty());
    }

    #[test]
    fn a_small_range_is_used_up_to_its_end() {
        let v4 = "240.0.0.0/24".parse().unwrap();
        let ranges = VirtualRanges { v4, v6: "fd00::/96".parse().unwrap() };
        let mut taken = BTreeSet::new();
        for number in 0..254 {
            let name = ServiceName::parse(&format!("s{number}")).unwrap();
            let addresses = ranges.assign(&name, |address| taken.contains(&address));
            assert_eq!(addresses.len(), 2, "{number}");
            assert!(addresses.iter().all(|address| ranges.contains(address)));
            taken.extend(addresses);
        }
        let late = ServiceName::parse("late").unwrap();
        let left = ranges.assign(&late, |address| taken.contains(&address));
        assert!(left.iter().all(IpAddr::is_ipv6));
        assert!(!taken.contains(&"240.0.0.0".parse::<IpAddr>().unwrap()));
        assert!(!taken.contains(&"240.0.0.255".parse::<IpAddr>().unwrap()));
    }

    #[test]
    fn trust_domains_have_ranges_of_their_own() {
        let one = default_v6_range("mesh.internal");
        assert_eq!(one.prefix_len(), 48);
        assert_eq!(one.network().octets()[0], 0xfd);
        assert_ne!(one, default_v6_range("example.org"));
    }
}

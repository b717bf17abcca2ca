//! The nftables rules of each capture, as text for `nft -f -`. Pure: the same facts give the same text.

use std::fmt::Write;
use std::net::{Ipv4Addr, Ipv6Addr};

/// The address that a namespace made by Sheer calls its own: the IPv4 dummy address of RFC 7600, reserved for hosts that
/// need some source address and have none.
pub const OWN_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 8);
/// Its IPv6 like: a unique local address, never seen outside the namespace.
pub const OWN_V6: Ipv6Addr = Ipv6Addr::new(0xfd73, 0x6865, 0x6572, 0, 0, 0, 0, 1);
/// The source of connections that the proxy makes to the application over loopback, so that peers do not inherit the
/// trust that applications give to 127.0.0.1.
pub const DELIVERY_V4: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 6);
/// The same for IPv6.
pub const DELIVERY_V6: Ipv6Addr = Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6);

/// Everything a workload sends from a namespace of its own.
#[derive(Clone, Debug)]
pub struct Namespace<'a> {
    /// The port of the outbound listener on 127.0.0.1 and ::1.
    pub outbound: u16,
    /// The port of the DNS listener on 127.0.0.1 and ::1.
    pub dns: u16,
    /// Ports of the host's loopback that connections to this namespace's loopback are let through to.
    pub host_ports: &'a [u16],
    /// Also take queries to a name server on loopback: where resolv.conf could not be replaced.
    pub loopback_dns: bool,
}

impl Namespace<'_> {
    /// The rules. Loopback is told by address, never by interface: with a default route on `lo` everything is on it.
    pub fn ruleset(&self) -> String {
        let Self { outbound, dns, .. } = self;
        let mut host_ports = String::new();
        if !self.host_ports.is_empty() {
            let ports = set(self.host_ports);
            let _ = write!(
                host_ports,
                "    ip saddr != {DELIVERY_V4} ip daddr 127.0.0.1 tcp dport {ports} counter name host_ports redirect to :{outbound}\n\
                 \x20   ip6 saddr != {DELIVERY_V6} ip6 daddr ::1 tcp dport {ports} counter name host_ports redirect to :{outbound}\n"
            );
        }
        let loopback_dns = if self.loopback_dns {
            format!(
                "    ip daddr 127.0.0.0/8 meta l4proto {{ tcp, udp }} th dport 53 counter name captured_dns redirect to :{dns}\n\
                 \x20   ip6 daddr ::1 meta l4proto {{ tcp, udp }} th dport 53 counter name captured_dns redirect to :{dns}\n"
            )
        } else {
            String::new()
        };
        format!(
            "table inet sheer {{
  counter captured_tcp {{ }}
  counter captured_dns {{ }}
  counter host_ports {{ }}
  counter refused_udp {{ }}
  counter refused_other {{ }}
  chain capture {{
    type nat hook output priority -100; policy accept;
{host_ports}{loopback_dns}    ip daddr 127.0.0.0/8 accept
    ip6 daddr {{ ::1, {DELIVERY_V6} }} accept
    meta l4proto {{ tcp, udp }} th dport 53 counter name captured_dns redirect to :{dns}
    ip daddr {OWN_V4} accept
    ip6 daddr {OWN_V6} accept
    meta l4proto tcp counter name captured_tcp redirect to :{outbound}
  }}
  chain refuse {{
    type filter hook output priority 0; policy accept;
    ip daddr {{ 127.0.0.0/8, {OWN_V4} }} accept
    ip6 daddr {{ ::1, {DELIVERY_V6}, {OWN_V6} }} accept
    meta l4proto udp counter name refused_udp reject with icmpx type port-unreachable
    counter name refused_other reject with icmpx type admin-prohibited
  }}
}}
"
        )
    }
}

/// Whose traffic is taken in a namespace that the proxy shares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Everybody's but the proxies'.
    All,
    /// A control group's: its path below /sys/fs/cgroup, and its depth in the unified hierarchy.
    Cgroup {
        /// The path, as nft takes it.
        path: String,
        /// How deep it lies below the root of the hierarchy.
        level: u32,
    },
    /// A user's.
    User(u32),
}

/// What happens to UDP other than DNS in a namespace that the proxy shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtherUdp {
    /// It passes, and is counted.
    Count,
    /// It is refused, and counted.
    Refuse,
}

/// A workload in a network namespace that it shares with its proxy, and maybe with others.
#[derive(Clone, Debug)]
pub struct Shared<'a> {
    /// The table's name; one table per workload.
    pub table: &'a str,
    /// Whose outbound traffic is taken.
    pub scope: Scope,
    /// The user id of all proxies of this host; its traffic is never taken as a workload's.
    pub proxy_user: u32,
    /// The port of the outbound listener on 127.0.0.1 and ::1.
    pub outbound: u16,
    /// The port of the DNS listener on 127.0.0.1 and ::1; `None` leaves names alone.
    pub dns: Option<u16>,
    /// The port of the inbound listener, on every address.
    pub inbound: u16,
    /// The workload's ports.
    pub ports: &'a [u16],
    /// What happens to UDP other than DNS.
    pub other_udp: OtherUdp,
}

impl Shared<'_> {
    /// The rules. Two nat chains at the same hook do not see each other's verdicts, the first translation wins: what
    /// leaves a workload is decided before what arrives at one, so that a captured workload which calls another one of
    /// the same host goes through its own proxy first.
    pub fn ruleset(&self) -> String {
        let Self { table, proxy_user, outbound, inbound, .. } = self;
        let whose = match &self.scope {
            Scope::All => String::new(),
            Scope::Cgroup { path, level } => format!("socket cgroupv2 level {level} \"{path}\" "),
            Scope::User(user) => format!("meta skuid {user} "),
        };
        let mut dns = String::new();
        if let Some(port) = self.dns {
            let _ = writeln!(
                dns,
                "    {whose}meta l4proto {{ tcp, udp }} th dport 53 counter name captured_dns redirect to :{port}"
            );
        }
        let arrivals = if self.ports.is_empty() {
            String::new()
        } else {
            let ports = set(self.ports);
            format!(
                "  chain arriving {{
    type nat hook prerouting priority -100; policy accept;
    fib daddr type local tcp dport {ports} counter name inbound redirect to :{inbound}
  }}
  chain local {{
    type nat hook output priority -100; policy accept;
    meta skuid {proxy_user} ip saddr {DELIVERY_V4} accept
    meta skuid {proxy_user} ip6 saddr {DELIVERY_V6} accept
    ip daddr 127.0.0.0/8 accept
    ip6 daddr ::1 accept
    fib daddr type local tcp dport {ports} counter name inbound redirect to :{inbound}
  }}
"
            )
        };
        // The mesh's own answers come from sockets that the supervisor made, as another user than the proxy.
        let answers = self.dns.map_or_else(String::new, |port| {
            format!(
                "    ip saddr 127.0.0.1 udp sport {port} accept\n\
                 \x20   ip6 saddr ::1 udp sport {port} accept\n"
            )
        });
        let udp_verdict = match self.other_udp {
            OtherUdp::Count => "",
            OtherUdp::Refuse => " reject with icmpx type port-unreachable",
        };
        format!(
            "table inet {table} {{
  counter captured_tcp {{ }}
  counter captured_dns {{ }}
  counter inbound {{ }}
  counter other_udp {{ }}
  chain capture {{
    type nat hook output priority -105; policy accept;
    meta skuid {proxy_user} accept
{dns}    ip daddr 127.0.0.0/8 accept
    ip6 daddr ::1 accept
    {whose}meta l4proto tcp counter name captured_tcp redirect to :{outbound}
  }}
{arrivals}  chain others {{
    type filter hook output priority 0; policy accept;
    meta skuid {proxy_user} accept
    ip daddr 127.0.0.0/8 accept
    ip6 daddr ::1 accept
    udp dport 53 accept
{answers}    {whose}meta l4proto udp counter name other_udp{udp_verdict}
  }}
}}
"
        )
    }
}

/// The table of a workload in a shared namespace.
pub fn table(namespace: &str, name: &str) -> String {
    format!("sheer-{namespace}-{name}")
}

fn set(ports: &[u16]) -> String {
    let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
    format!("{{ {} }}", ports.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(rules: &str, line: &str) -> usize {
        rules.find(line).unwrap_or_else(|| panic!("'{line}' is missing in\n{rules}"))
    }

    #[test]
    fn a_namespace_exempts_loopback_by_address_before_it_captures() {
        let rules = Namespace { outbound: 15001, dns: 15053, host_ports: &[], loopback_dns: false }.ruleset();
        let loopback = position(&rules, "ip daddr 127.0.0.0/8 accept");
        assert!(loopback < position(&rules, "th dport 53 counter name captured_dns redirect to :15053"));
        assert!(loopback < position(&rules, "meta l4proto tcp counter name captured_tcp redirect to :15001"));
        assert!(!rules.contains("oif"), "by address, not by interface");
        assert!(rules.contains("counter name refused_udp reject"));
    }

    #[test]
    fn host_ports_come_before_the_loopback_exemption_and_spare_deliveries() {
        let rules = Namespace { outbound: 1, dns: 2, host_ports: &[5432, 6379], loopback_dns: true }.ruleset();
        let named = position(&rules, "ip saddr != 127.0.0.6 ip daddr 127.0.0.1 tcp dport { 5432, 6379 }");
        assert!(named < position(&rules, "ip daddr 127.0.0.0/8 accept"));
    }

    #[test]
    fn a_shared_namespace_never_captures_its_proxies() {
        let scope = Scope::Cgroup { path: "system.slice/web.service".into(), level: 2 };
        let shared = Shared {
            table: "sheer-default-web-1",
            scope,
            proxy_user: 64764,
            outbound: 15001,
            dns: Some(15053),
            inbound: 15006,
            ports: &[80],
            other_udp: OtherUdp::Count,
        };
        let rules = shared.ruleset();
        let own = position(&rules, "meta skuid 64764 accept");
        assert!(own < position(&rules, "redirect to :15053"));
        assert!(own < position(&rules, "redirect to :15001"));
        assert!(position(&rules, "meta skuid 64764 ip saddr 127.0.0.6 accept") < rules.rfind(":15006").unwrap());
        assert!(rules.contains("socket cgroupv2 level 2 \"system.slice/web.service\" meta l4proto tcp"));
        assert!(
            position(&rules, "udp sport 15053 accept") < position(&rules, "meta l4proto udp counter name other_udp")
        );
    }

    #[test]
    fn watching_leaves_names_alone() {
        let shared = Shared {
            table: "sheer-default-web-1",
            scope: Scope::All,
            proxy_user: 64764,
            outbound: 15001,
            dns: None,
            inbound: 15006,
            ports: &[],
            other_udp: OtherUdp::Count,
        };
        assert!(!shared.ruleset().contains("dport 53 counter"));
        assert!(!shared.ruleset().contains("prerouting"));
    }
}

//! Listening sockets, made once by the supervisor or the keeper and handed to each proxy in turn.

use socket2::{Domain, Protocol, Socket, Type};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

/// Connections that wait to be accepted: what the kernel allows by default (net.core.somaxconn since 5.4).
const BACKLOG: i32 = 4096;
/// How often another free port is tried when one is taken in one family alone.
const TRIES: u32 = 16;

/// A TCP listener. IPv6 sockets take IPv6 alone.
pub(crate) fn tcp(address: SocketAddr) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A UDP socket.
pub(crate) fn udp(address: SocketAddr) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// The address a socket is bound to.
pub(crate) fn bound(socket: &OwnedFd) -> io::Result<SocketAddr> {
    let address = socket2::SockRef::from(socket).local_addr()?;
    address.as_socket().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no internet socket"))
}

/// What to make at one port in both families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Sockets of all `kinds` at the same port on each of the addresses; port 0 finds one that is free everywhere. An IPv6
/// address that this machine does not have is left out when there is an IPv4 one.
///
/// # Errors
/// When the port is taken, or none could be found.
pub(crate) fn together(ips: &[IpAddr], port: u16, kinds: &[Kind]) -> io::Result<(u16, Vec<(Kind, OwnedFd)>)> {
    let mut tries = 0;
    loop {
        match attempt(ips, port, kinds) {
            Err(error) if port == 0 && error.kind() == io::ErrorKind::AddrInUse && tries < TRIES => tries += 1,
            result => return result,
        }
    }
}

fn attempt(ips: &[IpAddr], wanted: u16, kinds: &[Kind]) -> io::Result<(u16, Vec<(Kind, OwnedFd)>)> {
    let (mut port, mut made) = (wanted, Vec::new());
    for ip in ips {
        for kind in kinds {
            let address = SocketAddr::new(*ip, port);
            let socket = match kind {
                Kind::Tcp => tcp(address),
                Kind::Udp => udp(address),
            };
            match socket {
                Ok(socket) => {
                    port = bound(&socket)?.port();
                    made.push((*kind, socket));
                }
                Err(error) if ip.is_ipv6() && ips.iter().any(IpAddr::is_ipv4) && no_ipv6(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok((port, made))
}

fn no_ipv6(error: &io::Error) -> bool {
    use nix::libc::{EADDRNOTAVAIL, EAFNOSUPPORT};
    matches!(error.raw_os_error(), Some(EADDRNOTAVAIL | EAFNOSUPPORT))
}

/// Loopback in both families.
pub(crate) const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
/// Every address in both families.
pub(crate) const EVERYWHERE: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_port_for_both_families_and_kinds() {
        let (port, made) = together(&LOOPBACK, 0, &[Kind::Udp, Kind::Tcp]).unwrap();
        assert!(made.len() >= 2);
        assert!(made.iter().all(|(_, socket)| bound(socket).unwrap().port() == port));
        let taken = together(&LOOPBACK, port, &[Kind::Tcp]).unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
    }
}

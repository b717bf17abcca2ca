//! Loopback, addresses and routes of a network namespace, by rtnetlink: `ip` need not be installed.

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

const LOOPBACK_INDEX: u32 = 1;

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const IFF_UP: u32 = 1;
const IFA_F_NODAD: u8 = 2;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_PREFSRC: u16 = 7;
const RT_TABLE_MAIN: u8 = 254;
/// Whose route it is, for those who list them; above what the kernel and known routing daemons use.
const RTPROT_SHEER: u8 = 115;
const RT_SCOPE_HOST: u8 = 254;
const RTN_LOCAL: u8 = 2;

/// A conversation with the kernel about the network namespace that this process is in.
pub(crate) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    pub(crate) fn open() -> io::Result<Self> {
        let protocol = SockProtocol::NetlinkRoute;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Switches `lo` on.
    pub(super) fn loopback_up(&mut self) -> io::Result<()> {
        let mut body = vec![0, 0, 0, 0];
        body.extend(LOOPBACK_INDEX.to_ne_bytes());
        body.extend(IFF_UP.to_ne_bytes());
        body.extend(IFF_UP.to_ne_bytes());
        self.ask(RTM_NEWLINK, 0, &body)
    }

    /// Gives `lo` an address of its own, with the longest prefix. False when it is there already.
    pub(crate) fn add_address(&mut self, address: IpAddr) -> io::Result<bool> {
        fresh(self.ask(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, &own_address(address)))
    }

    /// Takes it away.
    pub(crate) fn remove_address(&mut self, address: IpAddr) -> io::Result<()> {
        self.ask(RTM_DELADDR, 0, &own_address(address))
    }

    /// Routes everything to `lo`, from `source`; false when there is a default route already. The route is a local one: a
    /// plain one over loopback is turned into a refusal for IPv6, and connect(2) would fail before the rules see the packet.
    pub(super) fn route_all(&mut self, source: IpAddr) -> io::Result<bool> {
        fresh(self.ask(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, &default_route(source)))
    }

    /// Takes that route away.
    pub(super) fn unroute_all(&mut self, source: IpAddr) -> io::Result<()> {
        self.ask(RTM_DELROUTE, 0, &default_route(source))
    }

    /// Gives the range of virtual addresses a route, on a host that has none for it: without one connect(2) fails before
    /// the rules see anything. What is not captured is refused by this machine itself.
    pub(crate) fn add_virtual_route(&mut self) -> io::Result<()> {
        fresh(self.ask(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, &virtual_route())).map(drop)
    }

    /// Takes that route away.
    pub(crate) fn remove_virtual_route(&mut self) -> io::Result<()> {
        match self.ask(RTM_DELROUTE, 0, &virtual_route()) {
            Err(error) if error.raw_os_error() == Some(nix::libc::ESRCH) => Ok(()),
            other => other,
        }
    }

    /// Sends one request and waits for its acknowledgement.
    fn ask(&mut self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        self.sequence += 1;
        let mut message = Vec::with_capacity(16 + body.len());
        message.extend((16 + body.len() as u32).to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend((NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        message.extend(0u32.to_ne_bytes());
        message.extend(body);
        send(self.socket.as_raw_fd(), &message, MsgFlags::empty())?;
        let mut buffer = [0; 8192];
        let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        match (read_u16(&buffer[..length], 4), read_i32(&buffer[..length], 16)) {
            (Some(NLMSG_ERROR), Some(0)) => Ok(()),
            (Some(NLMSG_ERROR), Some(code)) => Err(io::Error::from_raw_os_error(-code)),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer is not an acknowledgement")),
        }
    }
}

/// False for what was there already.
fn fresh(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        other => other.map(|()| true),
    }
}

fn own_address(address: IpAddr) -> Vec<u8> {
    let mut body = vec![family(address), octets(address).len() as u8 * 8, IFA_F_NODAD, 0];
    body.extend(LOOPBACK_INDEX.to_ne_bytes());
    attribute(&mut body, IFA_LOCAL, &octets(address));
    attribute(&mut body, IFA_ADDRESS, &octets(address));
    body
}

fn default_route(source: IpAddr) -> Vec<u8> {
    let mut body = vec![family(source), 0, 0, 0, RT_TABLE_MAIN, RTPROT_SHEER, RT_SCOPE_HOST, RTN_LOCAL, 0, 0, 0, 0];
    attribute(&mut body, RTA_OIF, &LOOPBACK_INDEX.to_ne_bytes());
    attribute(&mut body, RTA_PREFSRC, &octets(source));
    body
}

/// 240.0.0.0/4 on `lo`.
fn virtual_route() -> Vec<u8> {
    let (start, source) = (IpAddr::from([240, 0, 0, 0]), IpAddr::from([127, 0, 0, 1]));
    let mut body = vec![family(start), 4, 0, 0, RT_TABLE_MAIN, RTPROT_SHEER, RT_SCOPE_HOST, RTN_LOCAL, 0, 0, 0, 0];
    attribute(&mut body, RTA_DST, &octets(start));
    attribute(&mut body, RTA_OIF, &LOOPBACK_INDEX.to_ne_bytes());
    attribute(&mut body, RTA_PREFSRC, &octets(source));
    body
}

fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => nix::libc::AF_INET as u8,
        IpAddr::V6(_) => nix::libc::AF_INET6 as u8,
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// Appends an attribute; all values here are multiples of the alignment of four bytes.
fn attribute(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    message.extend((4 + value.len() as u16).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
}

fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn read_i32(bytes: &[u8], at: usize) -> Option<i32> {
    Some(i32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

//! Listening sockets, and single connections, asked of the kernel by sock_diag(7).
//!
//! The tables in /proc hold every connection, and reading them walks the kernel's whole hash of these, a quarter of a
//! million buckets on a usual host. Asked this way the kernel looks at its listeners alone.

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
const TCP_LISTEN: u32 = 10;

/// Length of `nlmsghdr`.
const HEADER: usize = 16;
/// Length of `inet_diag_req_v2`: four bytes, the states, and a socket's id of 48 bytes.
const REQUEST: usize = 56;

/// A conversation with the kernel about the network namespace in which it was opened.
#[derive(Debug)]
pub(super) struct Diagnosis {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl Diagnosis {
    /// Opens it, and asks once to learn whether the kernel answers.
    pub(super) fn open() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkSockDiag)?;
        let mut opened = Self { socket, buffer: vec![0; 16 * 1024] };
        opened.listening(|_, _| {})?;
        Ok(opened)
    }

    /// Names every listener.
    pub(super) fn listening(&mut self, mut found: impl FnMut(IpAddr, u16)) -> io::Result<()> {
        for family in [AF_INET, AF_INET6] {
            send(self.socket.as_raw_fd(), &request(family), MsgFlags::empty())?;
            // The kernel has written its answer, or continues it as it is read: this never waits.
            while !self.read(&mut found)? {}
        }
        Ok(())
    }

    /// Whether anybody holds the socket that is connected from one address to another; `None` when there is none.
    pub(super) fn holds(&mut self, from: SocketAddr, to: SocketAddr) -> io::Result<Option<bool>> {
        let Some(request) = request_one(from, to) else { return Ok(None) };
        send(self.socket.as_raw_fd(), &request, MsgFlags::empty())?;
        let length = recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty())?;
        let answer = self.buffer.get(..length).unwrap_or_default();
        let message = answer.get(HEADER..).ok_or(io::ErrorKind::InvalidData)?;
        match u16::from_ne_bytes([answer[4], answer[5]]) {
            SOCK_DIAG_BY_FAMILY => Ok(is_held(message)),
            NLMSG_ERROR => match error(message) {
                error if error.kind() == io::ErrorKind::NotFound => Ok(None),
                error => Err(error),
            },
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Reads some messages. True when they were the last.
    fn read(&mut self, found: &mut impl FnMut(IpAddr, u16)) -> io::Result<bool> {
        let length = recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty())?;
        let mut rest = self.buffer.get(..length).unwrap_or_default();
        while rest.len() >= HEADER {
            let size = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
            let Some(message) = rest.get(HEADER..size) else { return Err(io::ErrorKind::InvalidData.into()) };
            match u16::from_ne_bytes([rest[4], rest[5]]) {
                NLMSG_DONE => return Ok(true),
                NLMSG_ERROR => return Err(error(message)),
                SOCK_DIAG_BY_FAMILY => {
                    if let Some((address, port)) = endpoint(message) {
                        found(address, port);
                    }
                }
                _ => {}
            }
            rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(false)
    }
}

fn request(family: u8) -> [u8; HEADER + REQUEST] {
    let mut bytes = [0; HEADER + REQUEST];
    bytes[..4].copy_from_slice(&((HEADER + REQUEST) as u32).to_ne_bytes());
    bytes[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    bytes[HEADER] = family;
    bytes[HEADER + 1] = IPPROTO_TCP;
    bytes[HEADER + 4..HEADER + 8].copy_from_slice(&(1u32 << TCP_LISTEN).to_ne_bytes());
    bytes
}

/// Asks for one connection; `None` when its ends are of two families.
fn request_one(from: SocketAddr, to: SocketAddr) -> Option<[u8; HEADER + REQUEST]> {
    let mut bytes = request(AF_INET);
    bytes[6..8].copy_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    // Every state.
    bytes[HEADER + 4..HEADER + 8].fill(0xff);
    let id = &mut bytes[HEADER + 8..];
    id[..2].copy_from_slice(&from.port().to_be_bytes());
    id[2..4].copy_from_slice(&to.port().to_be_bytes());
    let family = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            id[4..8].copy_from_slice(&from.octets());
            id[20..24].copy_from_slice(&to.octets());
            AF_INET
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            id[4..20].copy_from_slice(&from.octets());
            id[20..36].copy_from_slice(&to.octets());
            AF_INET6
        }
        _ => return None,
    };
    // Whatever its cookie is.
    id[40..48].fill(0xff);
    bytes[HEADER] = family;
    Some(bytes)
}

/// Whether a process holds the socket of an `inet_diag_msg`: a socket that was let go has no inode. `None` for a listener,
/// which the kernel names when there is no such connection.
fn is_held(message: &[u8]) -> Option<bool> {
    const INODE: usize = 68;
    let inode = u32::from_ne_bytes(*message.get(INODE..)?.first_chunk()?);
    (u32::from(*message.get(1)?) != TCP_LISTEN).then_some(inode != 0)
}

fn error(message: &[u8]) -> io::Error {
    let code = message.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
    io::Error::from_raw_os_error(code.wrapping_neg())
}

/// The local end in an `inet_diag_msg`: family, three bytes, source and destination port, source address.
fn endpoint(message: &[u8]) -> Option<(IpAddr, u16)> {
    let port = u16::from_be_bytes(*message.get(4..)?.first_chunk()?);
    let address = message.get(8..)?;
    let ip = match *message.first()? {
        AF_INET => IpAddr::from(Ipv4Addr::from(*address.first_chunk::<4>()?)),
        AF_INET6 => IpAddr::from(Ipv6Addr::from(*address.first_chunk::<16>()?)),
        _ => return None,
    };
    Some((ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_answers_are_no_endpoints() {
        assert_eq!(endpoint(&[]), None);
        assert_eq!(endpoint(&[AF_INET, 10, 0, 0, 31, 144, 0, 0, 127, 0, 0]), None);
        let whole = [AF_INET, 10, 0, 0, 31, 144, 0, 0, 127, 0, 0, 1];
        assert_eq!(endpoint(&whole), Some((Ipv4Addr::LOCALHOST.into(), 8080)));
        assert_eq!(error(&(-13i32).to_ne_bytes()).kind(), io::ErrorKind::PermissionDenied);
    }
}

//! Calls of `nft`, which applies a whole set of rules or nothing.

use anyhow::{Context, Result, bail};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use sheer_proxy::platform::{Birth, prepare};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// The capability to change rules, CAP_NET_ADMIN.
const NET_ADMIN: u32 = 12;

/// Where `nft` is: in the search path, or where system administration tools live, which is not in everybody's path.
///
/// # Errors
/// When it is nowhere, with what to install.
pub(crate) fn find() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from));
    places.map(|place| place.join("nft")).find(|candidate| candidate.is_file()).context(
        "the program 'nft' is missing, without it no traffic can be captured; install it (Debian, Ubuntu: \
         'apt install nftables', Fedora: 'dnf install nftables'), or use '--capture env'",
    )
}

/// Applies rules in the network namespace that this process is in.
///
/// # Errors
/// When nft is missing or refuses them; nothing has changed then.
pub(crate) fn apply(rules: &str) -> Result<()> {
    let mut command = Command::new(find()?);
    command.args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let root = nix::unistd::geteuid().is_root();
    // In a group of its own: Ctrl-C at the terminal must not end it halfway.
    let capabilities = if root { 0 } else { 1 << NET_ADMIN };
    prepare(&mut command, Birth { capabilities, group: Some(0), ..Birth::default() });
    let mut child = command.spawn().context("cannot start nft")?;
    if let Some(mut stdin) = child.stdin.take() {
        // When nft dies early its complaint says more than the broken pipe.
        let _ = stdin.write_all(rules.as_bytes());
    }
    let output = child.wait_with_output().context("cannot wait for nft")?;
    if !output.status.success() {
        bail!("nft refuses the rules: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Removes a table, if it is there.
///
/// # Errors
/// When nft is missing or refuses.
pub(crate) fn remove(table: &str) -> Result<()> {
    // Adding an existing table changes nothing, so that deleting it never fails for want of it.
    apply(&format!("add table inet {table}\ndelete table inet {table}\n"))
}

/// What a named counter of a table has counted, in packets; none where either is missing. It is asked for often, so that
/// `nft` itself, which takes milliseconds, would be too much.
pub(crate) fn packets(table: &str, counter: &str) -> Option<u64> {
    const NFNL_SUBSYS_NFTABLES: u16 = 10;
    const NFT_MSG_GETOBJ: u16 = 19;
    const NLM_F_REQUEST: u16 = 1;
    const NFPROTO_INET: u8 = 1;
    const NFTA_OBJ_TABLE: u16 = 1;
    const NFTA_OBJ_NAME: u16 = 2;
    const NFTA_OBJ_TYPE: u16 = 3;
    const NFT_OBJECT_COUNTER: u32 = 1;

    let mut body = vec![NFPROTO_INET, 0, 0, 0];
    attribute(&mut body, NFTA_OBJ_TABLE, &[table.as_bytes(), &[0]].concat());
    attribute(&mut body, NFTA_OBJ_NAME, &[counter.as_bytes(), &[0]].concat());
    attribute(&mut body, NFTA_OBJ_TYPE, &NFT_OBJECT_COUNTER.to_be_bytes());
    let mut message = Vec::with_capacity(HEADER + body.len());
    message.extend(((HEADER + body.len()) as u32).to_ne_bytes());
    message.extend((NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETOBJ).to_ne_bytes());
    message.extend(NLM_F_REQUEST.to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);

    let netlink = (AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter);
    let socket = socket(netlink.0, netlink.1, netlink.2, netlink.3).ok()?;
    send(socket.as_raw_fd(), &message, MsgFlags::empty()).ok()?;
    let mut answer = [0; 8192];
    let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT).ok()?;
    packets_in(&answer[..length])
}

/// Of a netlink message.
const HEADER: usize = 16;

fn packets_in(answer: &[u8]) -> Option<u64> {
    const NFT_MSG_NEWOBJ: u8 = 18;
    const NFTA_OBJ_DATA: u16 = 4;
    const NFTA_COUNTER_PACKETS: u16 = 2;
    // The low byte of the type; an error has another one.
    let kind = u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?);
    if kind.to_le_bytes()[0] != NFT_MSG_NEWOBJ {
        return None;
    }
    let data = find_attribute(answer.get(HEADER + 4..)?, NFTA_OBJ_DATA)?;
    let packets = find_attribute(data, NFTA_COUNTER_PACKETS)?;
    Some(u64::from_be_bytes(packets.try_into().ok()?))
}

/// Appends an attribute, filled up to the alignment of four bytes.
fn attribute(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    message.extend((4 + value.len() as u16).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(4), 0);
}

fn find_attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    /// Of the type: nested, byte order.
    const FLAGS: u16 = 0xc000;
    loop {
        let length = usize::from(u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?) & !FLAGS;
        let value = attributes.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_packets_of_a_counter_are_found_in_its_answer() {
        let mut counter = Vec::new();
        attribute(&mut counter, 1, &640_u64.to_be_bytes());
        attribute(&mut counter, 2, &7_u64.to_be_bytes());
        let mut answer = vec![0; HEADER + 4];
        answer[4..6].copy_from_slice(&(10_u16 << 8 | 18).to_ne_bytes());
        attribute(&mut answer, 1, b"sheer\0");
        attribute(&mut answer, 0x8000 | 4, &counter);
        assert_eq!(packets_in(&answer), Some(7));
        for cut in 0..answer.len() {
            assert_eq!(packets_in(&answer[..cut]), None, "{cut}");
        }
        answer[4..6].copy_from_slice(&2_u16.to_ne_bytes());
        assert_eq!(packets_in(&answer), None, "an error");
    }
}

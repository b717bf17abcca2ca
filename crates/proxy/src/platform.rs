//! What the kernel offers and the standard library does not: inherited sockets, sockets passed between processes, the
//! first steps of a child. The only unsafe code of Sheer; each block says why it is sound.
#![allow(unsafe_code)]

#[cfg(feature = "count-allocations")]
pub mod allocations;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::io::{self, IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

/// At most this many descriptors travel in one message (the kernel's limit is 253).
pub const MAX_PASSED: usize = 64;

/// Takes ownership of a descriptor that the parent process left open for this one, and makes it close-on-exec.
///
/// # Errors
/// When `number` is a standard stream, is not open, or was not inherited (also the second time for the same number).
pub fn adopt(number: RawFd) -> io::Result<OwnedFd> {
    static ADOPTING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = ADOPTING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let refuse = |why: &str| io::Error::new(io::ErrorKind::InvalidInput, format!("descriptor {number} {why}"));
    if number <= 2 {
        return Err(refuse("is a standard stream"));
    }
    // SAFETY: F_GETFD reads a flag of the descriptor table; an unknown number is answered with EBADF.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if flags < 0 {
        return Err(refuse("is not open"));
    }
    if flags & libc::FD_CLOEXEC != 0 {
        return Err(refuse("was not inherited"));
    }
    // SAFETY: as above; the flag alone changes.
    if unsafe { libc::fcntl(number, libc::F_SETFD, flags | libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: The number is open. Everything this program opens is close-on-exec from birth (std, tokio and socket2 see
    // to that, and so do our calls of nix), and this one was not, so it came from the parent and nobody here owns it.
    // From now on it is close-on-exec, so a second call is refused.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Whether a time service keeps this host's clock right, as far as the kernel knows (adjtimex(2)); `None` where it does
/// not tell.
pub fn clock_is_kept() -> Option<bool> {
    // SAFETY: A timex is integers alone, for which zero is a value.
    let mut state: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: With no mode set the call changes nothing; it writes to the struct, which is ours.
    match unsafe { libc::adjtimex(&raw mut state) } {
        ..0 => None,
        _ => Some(state.status & libc::STA_UNSYNC == 0),
    }
}

/// Lets go of the program's code as far as it has been used. It is the file's: what is used again comes back from the
/// page cache, and what only the start needed stays away.
///
/// # Errors
/// When /proc is not there, or as of madvise(2).
pub fn forget_code() -> io::Result<()> {
    for line in std::fs::read_to_string("/proc/self/maps")?.lines() {
        let Some((start, end)) = code_range(line) else { continue };
        // SAFETY: The range is a private mapping of a file that this process cannot write to and that holds code alone,
        // without relocations. A page of it that is dropped comes from the same file again when it is next used. Nobody
        // can write to a running program; who writes into a library in place breaks its users with or without this.
        let done = unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The addresses in a line of /proc/self/maps, when they are a file's code.
fn code_range(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_ascii_whitespace();
    let (range, mode, path) = (fields.next()?, fields.next()?, fields.nth(3)?);
    if mode != "r-xp" || !path.starts_with('/') {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
}

/// A number that no other socket of this machine has had since its start (SO_COOKIE).
///
/// # Errors
/// When the number is not that of an open socket.
pub fn socket_cookie(socket: RawFd) -> io::Result<u64> {
    socket_option::<u64>(socket, libc::SOL_SOCKET, libc::SO_COOKIE)
}

/// What the kernel knows of a connection whose other side says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quiet {
    /// Since the other side's kernel has answered anything at all.
    pub since_answer: Duration,
    /// How often what it has not acknowledged has been sent again in vain.
    pub resent: u8,
}

/// How quiet the other side of a TCP connection is (TCP_INFO).
///
/// # Errors
/// When the number is not that of an open TCP socket.
pub fn quiet(socket: RawFd) -> io::Result<Quiet> {
    let info = socket_option::<libc::tcp_info>(socket, libc::IPPROTO_TCP, libc::TCP_INFO)?;
    let since_answer = Duration::from_millis(u64::from(info.tcpi_last_ack_recv));
    Ok(Quiet { since_answer, resent: if info.tcpi_unacked == 0 { 0 } else { info.tcpi_retransmits } })
}

/// How many bytes that were written to a connection its other side has not acknowledged (SIOCOUTQ); 0 where that cannot
/// be told.
pub fn unacknowledged(socket: &impl AsRawFd) -> u64 {
    let mut count: libc::c_int = 0;
    // SAFETY: The call writes one int, which is ours; what is no socket is answered with an error.
    let got = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut count) };
    if got < 0 { 0 } else { u64::try_from(count).unwrap_or_default() }
}

/// Reads an option that is plain numbers.
fn socket_option<T: Copy>(socket: RawFd, level: i32, name: i32) -> io::Result<T> {
    let mut value = std::mem::MaybeUninit::<T>::zeroed();
    let mut length = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    // SAFETY: The kernel writes at most `length` bytes, which is the size of what is pointed to; a number that is no
    // socket is answered with an error.
    let got = unsafe { libc::getsockopt(socket, level, name, value.as_mut_ptr().cast(), &raw mut length) };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `T` is one of the two types above, integers alone, for which zeroes and whatever the kernel wrote are valid.
    Ok(unsafe { value.assume_init() })
}

/// Sends one message and copies of descriptors over a unix socket; retries when interrupted.
///
/// # Errors
/// As of sendmsg(2); `WouldBlock` where the socket does not block.
pub fn send_with(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let numbers: Vec<RawFd> = descriptors.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let control: &[ControlMessage<'_>] = if numbers.is_empty() { &[] } else { &rights };
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(_) => return Ok(()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Receives one message and the descriptors that came with it; the number of bytes, 0 at the end of the stream.
///
/// # Errors
/// As of recvmsg(2); `WouldBlock` when there is nothing and `wait` is false or the socket does not block.
pub fn receive_with(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
    wait: bool,
) -> io::Result<usize> {
    let mut space = nix::cmsg_space!([RawFd; MAX_PASSED]);
    let mut flags = MsgFlags::MSG_CMSG_CLOEXEC;
    if !wait {
        flags |= MsgFlags::MSG_DONTWAIT;
    }
    loop {
        let mut pieces = [IoSliceMut::new(buffer)];
        let message = match recvmsg::<()>(socket.as_raw_fd(), &mut pieces, Some(&mut space), flags) {
            Ok(message) => message,
            Err(nix::errno::Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(numbers) = control {
                // SAFETY: The kernel has just opened these numbers for this message; nobody else knows them.
                descriptors.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
            }
        }
        return Ok(message.bytes);
    }
}

/// Where a connection was going before nftables redirected it, or `None` for one that was not redirected.
pub fn original_destination(socket: impl AsFd) -> Option<SocketAddr> {
    let socket = socket2::SockRef::from(&socket);
    let local = socket.local_addr().ok()?.as_socket()?;
    let mapped = matches!(local, SocketAddr::V6(v6) if v6.ip().to_ipv4_mapped().is_some());
    let found = if local.is_ipv4() || mapped { socket.original_dst_v4() } else { socket.original_dst_v6() };
    let found = found.ok()?.as_socket()?;
    let here = SocketAddr::new(local.ip().to_canonical(), local.port());
    (found != here).then_some(found)
}

/// User, group and supplementary groups of a child.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// User id.
    pub user: u32,
    /// Group id.
    pub group: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// How a child begins, between fork and exec.
#[derive(Clone, Debug, Default)]
pub struct Birth {
    /// Descriptors that stay open in the child, under their numbers.
    pub keep: Vec<RawFd>,
    /// Close every other descriptor but the standard streams (kernel 5.11; before it, what is close-on-exec alone).
    pub close_others: bool,
    /// The signal the child receives when its parent dies.
    pub dies_with_parent: Option<i32>,
    /// The process group to join; 0 makes one of its own.
    pub group: Option<i32>,
    /// Whom the child runs as.
    pub account: Option<Account>,
    /// Capabilities (bits by number) that the child keeps through exec although its user is not root: those that this
    /// process has in a user namespace of its own.
    pub capabilities: u32,
}

/// Lets the next child of `command` begin as `birth` says, with no signal blocked.
///
/// The child fails to start when it cannot take on its account or when its parent has died meanwhile.
pub fn prepare(command: &mut Command, birth: Birth) {
    let parent = std::process::id();
    let groups: Vec<libc::gid_t> = birth.account.iter().flat_map(|account| account.groups.clone()).collect();
    let begin = move || -> io::Result<()> {
        let check = |result: libc::c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
        // SAFETY: Between fork and exec only async-signal-safe calls may be made and nothing may be allocated. These are
        // plain system calls on numbers and on memory that was filled before the fork and lives in this closure.
        unsafe {
            // Signals that this process takes by descriptor are blocked in it, and would stay so through exec.
            let mut none = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
            libc::sigemptyset(none.as_mut_ptr());
            check(libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut()))?;
            if let Some(group) = birth.group {
                // A group that has vanished is no reason not to start: the child then keeps its parent's.
                let _ = libc::setpgid(0, group);
            }
            if let Some(account) = &birth.account {
                check(libc::setgroups(groups.len(), groups.as_ptr()))?;
                check(libc::setresgid(account.group, account.group, account.group))?;
                check(libc::setresuid(account.user, account.user, account.user))?;
            }
            if birth.capabilities != 0 {
                check(keep_through_exec(birth.capabilities))?;
            }
            if birth.close_others {
                libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
            }
            for number in &birth.keep {
                let flags = libc::fcntl(*number, libc::F_GETFD);
                check(flags)?;
                check(libc::fcntl(*number, libc::F_SETFD, flags & !libc::FD_CLOEXEC))?;
            }
            if let Some(signal) = birth.dies_with_parent {
                // After the change of account, which would clear it.
                check(libc::prctl(libc::PR_SET_PDEATHSIG, signal as libc::c_ulong))?;
                if libc::getppid() as u32 != parent {
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
            }
        }
        Ok(())
    };
    // SAFETY: See inside: only system calls, no allocation, no lock.
    unsafe { command.pre_exec(begin) };
}

/// Makes capabilities inheritable and ambient, as capabilities(7) wants it for a program without file capabilities.
///
/// # Safety
/// None is needed by the caller; it is called between fork and exec and therefore only makes system calls.
unsafe fn keep_through_exec(capabilities: u32) -> libc::c_int {
    #[repr(C)]
    struct Header {
        version: u32,
        process: i32,
    }
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Sets {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let mut header = Header { version: VERSION_3, process: 0 };
    let mut sets = [Sets { effective: 0, permitted: 0, inheritable: 0 }; 2];
    // SAFETY: capget and capset of this version read one header and read or write two sets, which live on this stack.
    unsafe {
        if libc::syscall(libc::SYS_capget, &raw mut header, &raw mut sets) < 0 {
            return -1;
        }
        sets[0].inheritable |= capabilities;
        if libc::syscall(libc::SYS_capset, &raw mut header, &raw const sets) < 0 {
            return -1;
        }
        for number in (0..u32::BITS).filter(|number| capabilities & (1 << number) != 0) {
            let none: libc::c_ulong = 0;
            let raise = libc::PR_CAP_AMBIENT_RAISE as libc::c_ulong;
            if libc::prctl(libc::PR_CAP_AMBIENT, raise, libc::c_ulong::from(number), none, none) < 0 {
                return -1;
            }
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::os::fd::IntoRawFd;

    #[test]
    fn code_that_is_forgotten_comes_back() {
        let code = "55d0c0a00000-55d0c1980000 r-xp 00691000 fe:00 9977985                    /usr/bin/sheer";
        assert_eq!(code_range(code), Some((0x55d0_c0a0_0000, 0x55d0_c198_0000)));
        for other in [
            "55d0c1980000-55d0c1a49000 r--p 01610000 fe:00 9977985                    /usr/bin/sheer",
            "7ffc5c4f1000-7ffc5c4f3000 r-xp 00000000 00:00 0                          [vdso]",
            "7f1dc5cc1000-7f1dc5ec1000 rw-p 00000000 00:00 0 ",
        ] {
            assert_eq!(code_range(other), None, "{other}");
        }
        forget_code().unwrap();
    }

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    #[test]
    fn descriptors_travel_with_their_message() {
        let (here, there) = pair();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        send_with(here.as_fd(), b"one", &[listener.as_fd(), listener.as_fd()]).unwrap();
        let (mut buffer, mut received) = ([0; 16], Vec::new());
        assert_eq!(receive_with(there.as_fd(), &mut buffer, &mut received, false).unwrap(), 3);
        assert_eq!(received.len(), 2);
        let copy = std::net::TcpListener::from(received.remove(0));
        assert_eq!(copy.local_addr().unwrap(), listener.local_addr().unwrap());
        let error = receive_with(there.as_fd(), &mut buffer, &mut received, false).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(here);
        assert_eq!(receive_with(there.as_fd(), &mut buffer, &mut received, true).unwrap(), 0);
    }

    #[test]
    fn only_inherited_descriptors_are_adopted_and_once() {
        assert!(adopt(1).is_err());
        let own = std::fs::File::open("/dev/null").unwrap();
        assert!(adopt(own.as_raw_fd()).is_err(), "close-on-exec: not inherited");
        let number = own.into_raw_fd();
        nix::fcntl::fcntl(
            // SAFETY: `number` is open, given up by the file above and owned by nobody.
            unsafe { BorrowedFd::borrow_raw(number) },
            nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()),
        )
        .unwrap();
        let adopted = adopt(number).unwrap();
        assert_eq!(adopted.as_raw_fd(), number);
        assert!(adopt(number).is_err());
    }

    #[test]
    fn a_child_keeps_what_it_is_given_and_nothing_else() {
        let (kept, other) = (std::fs::File::open("/dev/null").unwrap(), std::fs::File::open("/dev/zero").unwrap());
        let mut command = Command::new("ls");
        command.arg("-l").arg("/proc/self/fd");
        prepare(
            &mut command,
            Birth {
                keep: vec![kept.as_raw_fd()],
                close_others: true,
                dies_with_parent: Some(libc::SIGKILL),
                group: Some(0),
                ..Birth::default()
            },
        );
        let output = command.output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains(&format!(" {} -> /dev/null", kept.as_raw_fd())), "{text}");
        assert!(!text.contains(&format!(" {} -> /dev/zero", other.as_raw_fd())), "{text}");
    }
}

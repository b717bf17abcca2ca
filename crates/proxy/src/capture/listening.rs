//! Which ports the workload's processes listen on, and whether its clients still hold their connections, read from the
//! kernel's socket tables.

use super::diagnosis::Diagnosis;
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// How old what was read of the connections may be: many clients that hang up at once are looked at together.
const FRESH: Duration = Duration::from_millis(200);

/// The socket tables of one network namespace. They show the namespace in which they were opened, whoever reads them.
#[derive(Debug)]
pub struct Ports {
    tables: Vec<File>,
    /// Asked first, where there is one.
    diagnosis: Option<Mutex<Diagnosis>>,
    connections: Mutex<Connections>,
}

/// The two ends of a connection, as the socket that is asked about sees them.
type Ends = (SocketAddr, SocketAddr);

/// The connections of the tables: whether anybody holds their sockets.
#[derive(Debug, Default)]
struct Connections {
    read: Option<Instant>,
    held: HashMap<Ends, bool, foldhash::fast::RandomState>,
}

/// The sockets in LISTEN state, by port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listening {
    ports: BTreeMap<u16, Vec<IpAddr>>,
}

impl Ports {
    /// The tables `/proc/net/tcp` and `tcp6` of a namespace, opened inside it.
    pub fn of(tables: Vec<OwnedFd>) -> Self {
        Self { tables: tables.into_iter().map(File::from).collect(), diagnosis: None, connections: Mutex::default() }
    }

    /// The tables of the namespace that this process is in, and where the kernel answers, its sock_diag(7).
    ///
    /// # Errors
    /// When /proc is not there.
    pub fn here() -> io::Result<Self> {
        let mut tables = vec![File::open("/proc/net/tcp")?];
        // Absent where IPv6 is switched off.
        tables.extend(File::open("/proc/net/tcp6").ok());
        Ok(Self { tables, diagnosis: Diagnosis::open().ok().map(Mutex::new), connections: Mutex::default() })
    }

    /// Whether a process still holds the socket that is connected from one address to another; `None` when this namespace
    /// has no such socket. What is said may be 200 ms old. A socket that was closed is there for another minute, unless
    /// it was reset.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn holds(&self, from: SocketAddr, to: SocketAddr) -> io::Result<Option<bool>> {
        let ends = (plain(from), plain(to));
        if let Some(diagnosis) = &self.diagnosis {
            return diagnosis.lock().holds(ends.0, ends.1);
        }
        let mut connections = self.connections.lock();
        if connections.read.is_none_or(|read| read.elapsed() > FRESH) {
            connections.held.clear();
            for table in &self.tables {
                let text = whole(table)?;
                let lines = text.split(|byte| *byte == b'\n').skip(1);
                connections.held.extend(lines.filter_map(|line| connection(std::str::from_utf8(line).ok()?)));
            }
            connections.read = Some(Instant::now());
        }
        Ok(connections.held.get(&ends).copied())
    }

    /// Looks. It takes as long as the tables are: some microseconds in a namespace of one workload.
    ///
    /// # Errors
    /// When a table cannot be read.
    pub fn look(&self) -> io::Result<Listening> {
        let mut found = Listening::default();
        if let Some(diagnosis) = &self.diagnosis {
            diagnosis.lock().listening(|address, port| found.ports.entry(port).or_default().push(address))?;
            return Ok(found);
        }
        for table in &self.tables {
            let text = whole(table)?;
            for line in text.split(|byte| *byte == b'\n').skip(1) {
                if let Some(address) = std::str::from_utf8(line).ok().and_then(listener) {
                    found.ports.entry(address.1).or_default().push(address.0);
                }
            }
        }
        Ok(found)
    }
}

impl Listening {
    /// Whether anything listens on the port.
    pub fn contains(&self, port: u16) -> bool {
        self.ports.contains_key(&port)
    }

    /// All ports, ascending.
    pub fn ports(&self) -> impl Iterator<Item = u16> + '_ {
        self.ports.keys().copied()
    }

    /// Where to connect for the port from inside the namespace: loopback where the listener takes it, otherwise the
    /// address it is bound to. `None` when nothing listens.
    pub fn address(&self, port: u16) -> Option<IpAddr> {
        let bound = self.ports.get(&port)?;
        let has = |wanted: IpAddr| bound.contains(&wanted);
        let (v4, v6) = (IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED));
        if has(v4) || has(IpAddr::V4(Ipv4Addr::LOCALHOST)) {
            return Some(Ipv4Addr::LOCALHOST.into());
        }
        if has(v6) || has(IpAddr::V6(Ipv6Addr::LOCALHOST)) {
            // A wildcard socket of IPv6 may take IPv6 alone; its own family is certain.
            return Some(Ipv6Addr::LOCALHOST.into());
        }
        bound.first().copied()
    }
}

fn whole(table: &File) -> io::Result<Vec<u8>> {
    // By offset, since copies of the descriptor in other processes share the position.
    let (mut text, mut length) = (vec![0; 16 * 1024], 0);
    loop {
        if length == text.len() {
            text.resize(text.len() * 2, 0);
        }
        match table.read_at(&mut text[length..], length as u64) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    text.truncate(length);
    Ok(text)
}

/// The address of a line of the table when its socket listens.
fn listener(line: &str) -> Option<(IpAddr, u16)> {
    const LISTEN: &str = "0A";
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (local, _remote, state) = (fields.next()?, fields.next()?, fields.next()?);
    if state != LISTEN {
        return None;
    }
    endpoint(local)
}

/// The ends of a line of the table, and whether the socket has an inode, as those have that somebody holds.
fn connection(line: &str) -> Option<(Ends, bool)> {
    const INODE: usize = 9;
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let end = |at: usize| endpoint(fields.get(at)?).map(|(ip, port)| plain(SocketAddr::new(ip, port)));
    Some(((end(1)?, end(2)?), *fields.get(INODE)? != "0"))
}

/// The address without its scope, and as IPv4 where it is one.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// An address of the table: groups of four bytes in the machine's order, in hexadecimal, a colon, the port.
pub(super) fn endpoint(text: &str) -> Option<(IpAddr, u16)> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| Some(u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    let ip: IpAddr = match address.len() {
        8 => IpAddr::from(word(0)?),
        32 => {
            let mut bytes = [0; 16];
            for (index, chunk) in bytes.chunks_exact_mut(4).enumerate() {
                chunk.copy_from_slice(&word(index * 8)?);
            }
            IpAddr::from(bytes)
        }
        _ => return None,
    };
    Some((ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_the_table() {
        if cfg!(target_endian = "little") {
            assert_eq!(endpoint("0100007F:1F90"), Some((IpAddr::from([127, 0, 0, 1]), 8080)));
            assert_eq!(endpoint("00000000000000000000000001000000:0050"), Some((IpAddr::V6(Ipv6Addr::LOCALHOST), 80)));
        }
        for bad in ["", "0100007F", "0100007F:", "01:1F90", "zz00007F:1F90"] {
            assert_eq!(endpoint(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_listener_is_seen_while_it_listens() {
        let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|path| OwnedFd::from(File::open(path).unwrap()));
        for ports in [Ports::here().unwrap(), Ports::of(tables.into())] {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let port = listener.local_addr().unwrap().port();
            assert_eq!(ports.look().unwrap().address(port), Some(Ipv4Addr::LOCALHOST.into()));
            drop(listener);
            assert!(!ports.look().unwrap().contains(port));
        }
    }

    #[test]
    fn a_client_that_has_closed_is_told_from_one_that_has_only_finished() {
        let tables =
            || Ports::of(["/proc/net/tcp", "/proc/net/tcp6"].map(|path| File::open(path).unwrap().into()).into());
        for address in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            let Ok(listener) = std::net::TcpListener::bind(address) else { continue };
            let to = match address {
                "[::]:0" => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), listener.local_addr().unwrap().port()),
                _ => listener.local_addr().unwrap(),
            };
            let client = std::net::TcpStream::connect(to).unwrap();
            let from = client.local_addr().unwrap();
            let _accepted = listener.accept().unwrap();
            client.shutdown(std::net::Shutdown::Write).unwrap();
            // Each looks for the first time, so that nothing is remembered.
            let both = || [Ports::here().unwrap(), tables()].map(|ports| ports.holds(from, to).unwrap());
            assert_eq!(both(), [Some(true); 2], "{address}");
            drop(client);
            assert_eq!(both(), [Some(false); 2], "{address}");
            let nobody = "127.0.0.1:1".parse().unwrap();
            assert_eq!([Ports::here().unwrap(), tables()].map(|ports| ports.holds(nobody, to).unwrap()), [None; 2]);
        }
    }

    #[test]
    fn loopback_is_preferred() {
        let mut found = Listening::default();
        found.ports.insert(1, vec![IpAddr::from([192, 0, 0, 8])]);
        found.ports.insert(2, vec![Ipv6Addr::UNSPECIFIED.into()]);
        found.ports.insert(3, vec![Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()]);
        assert_eq!(found.address(1), Some(IpAddr::from([192, 0, 0, 8])));
        assert_eq!(found.address(2), Some(Ipv6Addr::LOCALHOST.into()));
        assert_eq!(found.address(3), Some(Ipv4Addr::LOCALHOST.into()));
        assert_eq!(found.address(4), None);
    }
}

//! Who calls the API, and how far that goes.

use crate::ca::hex;
use aws_lc_rs::constant_time::verify_slices_are_equal;
use axum::http::{HeaderMap, header};
use parking_lot::Mutex;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How long a link's code is valid.
const CODE: Duration = Duration::from_secs(60);
/// How long a browser's session lasts.
const SESSION: Duration = Duration::from_secs(12 * 3600);
/// Codes, and sessions, at a time; the oldest give way.
const MAX_OPEN: usize = 64;
const COOKIE: &str = "sheer-session";

/// How far a caller's rights go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// The page's own files.
    Nobody,
    /// Everything that is shown.
    Reader,
    /// Everything.
    Admin,
}

/// The other end of a connection.
#[derive(Clone, Debug)]
pub(crate) enum Caller {
    /// On the unix socket.
    Local { uid: u32 },
    /// On TCP.
    Tcp { peer: SocketAddr, here: SocketAddr },
}

impl Caller {
    /// Whether the request is addressed to this listener by one of its own names, and comes from no other page.
    pub(crate) fn addresses_us(&self, headers: &HeaderMap) -> bool {
        let Caller::Tcp { here, .. } = self else { return headers.get(header::ORIGIN).is_none() };
        let ours = |authority: &str| {
            let port = here.port();
            authority == here.to_string() || authority == format!("localhost:{port}")
        };
        let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or("").to_ascii_lowercase());
        let host = text(header::HOST).is_some_and(|host| ours(&host));
        let origin = text(header::ORIGIN);
        host && origin.is_none_or(|origin| origin.strip_prefix("http://").is_some_and(ours))
    }
}

/// Tokens, codes and sessions.
pub(crate) struct Access {
    token: String,
    token_file: PathBuf,
    own_uid: u32,
    address: OnceLock<SocketAddr>,
    codes: Mutex<Vec<(String, Instant)>>,
    sessions: Mutex<Vec<(String, Instant)>>,
}

impl Access {
    /// Loads the bearer token, or makes one.
    ///
    /// # Errors
    /// When its file cannot be read or written.
    pub(crate) fn open(state: &Path) -> io::Result<Self> {
        let token_file = state.join("api.token");
        let token = match std::fs::read_to_string(&token_file) {
            Ok(token) if token.trim().len() >= 32 => token.trim().to_owned(),
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {
                let token = random();
                crate::file::replace(&token_file, 0o600, format!("{token}\n").as_bytes())?;
                token
            }
        };
        let own_uid = nix::unistd::geteuid().as_raw();
        let (codes, sessions) = Default::default();
        Ok(Self { token, token_file, own_uid, address: OnceLock::new(), codes, sessions })
    }

    /// The file of the bearer token.
    pub(crate) fn token_file(&self) -> &Path {
        &self.token_file
    }

    /// Notes where the API listens, for links.
    pub(crate) fn listens_at(&self, address: SocketAddr) {
        // Set once, at start.
        let _ = self.address.set(address);
    }

    /// How far a request may go.
    pub(crate) fn level(&self, caller: &Caller, headers: &HeaderMap) -> Level {
        if let Caller::Local { uid } = caller {
            let own = *uid == self.own_uid || *uid == 0;
            return if own { Level::Admin } else { Level::Nobody };
        }
        let bearer = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let bearer = bearer.and_then(|value| value.strip_prefix("Bearer "));
        if let Some(shown) = bearer {
            let right = verify_slices_are_equal(shown.trim().as_bytes(), self.token.as_bytes()).is_ok();
            return if right { Level::Admin } else { Level::Nobody };
        }
        let Caller::Tcp { peer, here } = caller else { return Level::Nobody };
        if self.has_session(headers) || owner(*peer, *here).is_some_and(|uid| uid == self.own_uid || uid == 0) {
            return Level::Reader;
        }
        Level::Nobody
    }

    /// A link with a code that opens one session.
    pub(crate) fn link(&self) -> Option<String> {
        let address = self.address.get()?;
        let code = random();
        remember(&self.codes, code.clone(), CODE);
        // In the fragment, which no browser sends anywhere.
        Some(format!("http://{address}/#code={code}"))
    }

    /// Turns a code into a cookie, once.
    pub(crate) fn open_session(&self, code: &str) -> Option<String> {
        {
            let mut codes = self.codes.lock();
            codes.retain(|(_, since)| since.elapsed() < CODE);
            let found = codes.iter().position(|(it, _)| same(it, code))?;
            codes.remove(found);
        }
        let session = random();
        remember(&self.sessions, session.clone(), SESSION);
        let age = SESSION.as_secs();
        Some(format!("{COOKIE}={session}; HttpOnly; SameSite=Strict; Path=/; Max-Age={age}"))
    }

    fn has_session(&self, headers: &HeaderMap) -> bool {
        let cookies = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
        let mut values = cookies.flat_map(|value| value.split(';')).filter_map(|pair| pair.trim().split_once('='));
        let sessions = self.sessions.lock();
        values.any(|(name, value)| {
            name == COOKIE && sessions.iter().any(|(it, since)| since.elapsed() < SESSION && same(it, value))
        })
    }
}

fn same(a: &str, b: &str) -> bool {
    verify_slices_are_equal(a.as_bytes(), b.as_bytes()).is_ok()
}

fn random() -> String {
    hex(&rand::random::<[u8; 32]>())
}

fn remember(list: &Mutex<Vec<(String, Instant)>>, secret: String, life: Duration) {
    let mut list = list.lock();
    list.retain(|(_, since)| since.elapsed() < life);
    if list.len() >= MAX_OPEN {
        list.remove(0);
    }
    list.push((secret, Instant::now()));
}

/// The user whose socket is the other end of a loopback connection, from the kernel's table.
fn owner(peer: SocketAddr, here: SocketAddr) -> Option<u32> {
    if !peer.ip().is_loopback() {
        return None;
    }
    let table = match peer {
        SocketAddr::V4(_) => "/proc/net/tcp",
        SocketAddr::V6(_) => "/proc/net/tcp6",
    };
    find_owner(&std::fs::read_to_string(table).ok()?, peer, here)
}

/// Columns: number, local address, remote address, state, queues, timer, retransmits, uid.
fn find_owner(table: &str, peer: SocketAddr, here: SocketAddr) -> Option<u32> {
    let (local, remote) = (in_table(peer), in_table(here));
    table.lines().skip(1).find_map(|line| {
        let mut columns = line.split_ascii_whitespace().skip(1);
        let matches = columns.next()? == local && columns.next()? == remote;
        matches.then(|| columns.nth(4)?.parse().ok()).flatten()
    })
}

/// As the kernel prints it: 32-bit words in the machine's byte order.
fn in_table(address: SocketAddr) -> String {
    let words = |octets: &[u8]| -> String {
        let word = |chunk: &[u8]| match chunk {
            [a, b, c, d] => u32::from_ne_bytes([*a, *b, *c, *d]),
            _ => 0,
        };
        octets.chunks(4).map(|chunk| format!("{:08X}", word(chunk))).collect()
    };
    let ip = match address.ip() {
        IpAddr::V4(ip) => words(&ip.octets()),
        IpAddr::V6(ip) => words(&ip.octets()),
    };
    format!("{ip}:{:04X}", address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pairs = pairs.iter().map(|(name, value)| ((*name).parse().unwrap(), value.parse().unwrap()));
        pairs.collect::<Vec<(axum::http::HeaderName, _)>>().into_iter().collect()
    }

    #[test]
    fn other_hosts_and_origins_are_refused() {
        let (peer, here) = ("127.0.0.1:4000".parse().unwrap(), "127.0.0.1:15080".parse().unwrap());
        let ours = |pairs: &[(&'static str, &str)]| Caller::Tcp { peer, here }.addresses_us(&headers(pairs));
        assert!(ours(&[("host", "127.0.0.1:15080")]));
        assert!(ours(&[("host", "localhost:15080"), ("origin", "http://localhost:15080")]));
        for bad in [
            vec![],
            vec![("host", "evil.example:15080")],
            vec![("host", "127.0.0.1:80")],
            vec![("host", "localhost:15080"), ("origin", "http://evil.example")],
            vec![("host", "localhost:15080"), ("origin", "null")],
        ] {
            assert!(!ours(&bad), "{bad:?}");
        }
    }

    #[test]
    fn a_code_opens_one_session() {
        let directory = tempfile::tempdir().unwrap();
        let access = Access::open(directory.path()).unwrap();
        access.listens_at("127.0.0.1:1".parse().unwrap());
        let link = access.link().unwrap();
        let code = link.split_once("#code=").unwrap().1;
        let cookie = access.open_session(code).unwrap();
        assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict"));
        assert!(access.open_session(code).is_none() && access.open_session("").is_none());
        let value = cookie.split(';').next().unwrap();
        assert!(access.has_session(&headers(&[("cookie", &format!("a=b; {value}"))])));
        assert!(!access.has_session(&headers(&[("cookie", "sheer-session=")])));
    }

    #[test]
    fn the_token_is_kept_and_private() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let token = Access::open(directory.path()).unwrap().token;
        let access = Access::open(directory.path()).unwrap();
        assert_eq!(access.token, token);
        assert_eq!(access.token_file().metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let (peer, here) = ("192.0.2.1:4000".parse().unwrap(), "127.0.0.1:15080".parse().unwrap());
        let caller = Caller::Tcp { peer, here };
        let bearer = format!("Bearer {token}");
        assert_eq!(access.level(&caller, &headers(&[("authorization", &bearer)])), Level::Admin);
        assert_eq!(access.level(&caller, &headers(&[("authorization", "Bearer x")])), Level::Nobody);
        assert_eq!(access.level(&caller, &headers(&[])), Level::Nobody);
    }

    #[test]
    fn the_owner_of_a_loopback_connection_is_known() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (peer, here) = (client.local_addr().unwrap(), listener.local_addr().unwrap());
        assert_eq!(owner(peer, here), Some(nix::unistd::geteuid().as_raw()));
        assert_eq!(owner(here, peer).is_some(), cfg!(target_os = "linux"));
        assert_eq!(owner("127.0.0.1:1".parse().unwrap(), here), None);
    }
}

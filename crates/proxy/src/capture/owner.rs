//! Whose connection it is that came over loopback: the forward proxy serves its own user alone.

use super::listening::endpoint;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, SocketAddr};

/// The user id that owns the other end of a loopback connection from `peer` to `local`, in this network namespace.
///
/// # Errors
/// `NotFound` when the kernel's table has no such connection (any more); others when the table cannot be read.
pub fn of_peer(peer: SocketAddr, local: SocketAddr) -> io::Result<u32> {
    let wanted = (plain(peer), plain(local));
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let file = match File::open(table) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for line in BufReader::new(file).lines().skip(1) {
            if let Some((ends, user)) = connection(&line?)
                && ends == wanted
            {
                return Ok(user);
            }
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("no socket of this host is connected from {peer} to {local}")))
}

fn plain(address: SocketAddr) -> (IpAddr, u16) {
    (address.ip().to_canonical(), address.port())
}

type Ends = ((IpAddr, u16), (IpAddr, u16));

fn connection(line: &str) -> Option<(Ends, u32)> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let canonical = |text: &str| endpoint(text).map(|(ip, port)| (ip.to_canonical(), port));
    Some(((canonical(fields.get(1)?)?, canonical(fields.get(2)?)?), fields.get(7)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_of_our_own_is_ours() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (_server, peer) = listener.accept().unwrap();
        let user = of_peer(peer, listener.local_addr().unwrap()).unwrap();
        assert_eq!(user, nix::unistd::geteuid().as_raw());
        drop(client);
        let nobody = of_peer("127.0.0.1:1".parse().unwrap(), listener.local_addr().unwrap());
        assert_eq!(nobody.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}

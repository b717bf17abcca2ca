//! The ground the scenarios stand on.

use sheer_testmesh::net::Net;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

#[test]
fn hosts_reach_each_other_until_they_are_cut() -> anyhow::Result<()> {
    let net = Net::new()?;
    let (one, other) = (net.host("one")?, net.host("other")?);
    let listener = other.inside(|| Ok(TcpListener::bind("0.0.0.0:0")?))?;
    let target = SocketAddr::new(other.address().into(), listener.local_addr()?.port());
    let dial = || one.inside(|| Ok(TcpStream::connect_timeout(&target, Duration::from_millis(500))?));
    dial()?;
    net.cut(&one, &other)?;
    assert!(dial().is_err(), "packets pass a cut");
    net.heal()?;
    dial()?;
    Ok(())
}

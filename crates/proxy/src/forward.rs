//! The forward proxy of a workload that is told of it by environment variables: HTTP (absolute targets and CONNECT) and
//! SOCKS5, for its own user alone, with the password of this run.
//!
//! A tunnel is served as captured connections are: a service's requests are routed and balanced inside it.

use crate::body::{Body, Request, Response};
use crate::capture::owner;
use crate::connection::{self, Spoken, Tunnel};
use crate::h1;
use crate::h1::server::{Ended, Options, Outcome};
use crate::io::Io;
use crate::outbound::{self, Destination};
use crate::plan::Credentials;
use crate::worker::Worker;
use aws_lc_rs::constant_time::verify_slices_are_equal;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use http::{Method, StatusCode};
use sheer_core::cause::Cause;
use sheer_core::head::{Fields, Known, ResponseHead};
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long a client may take to say where it wants to go.
const GREETING: Duration = Duration::from_secs(10);

/// The first byte of SOCKS5 (RFC 1928).
const SOCKS5: u8 = 5;

/// Serves one connection to the forward proxy.
pub async fn accept(worker: Rc<Worker>, stream: TcpStream) {
    if !is_own_user(&worker, &stream) {
        return worker.proxy.metrics.refused_connection(Cause::PlaintextRefused);
    }
    let mut first = [0];
    match timeout(GREETING, stream.peek(&mut first)).await {
        Ok(Ok(1)) if first[0] == SOCKS5 => socks(worker, Io::Plain(stream)).await,
        Ok(Ok(1)) => http(worker, Io::Plain(stream)).await,
        _ => {}
    }
}

fn is_own_user(worker: &Worker, stream: &TcpStream) -> bool {
    let Some(user) = worker.proxy.plan.workload_user else { return true };
    let (Ok(peer), Ok(local)) = (stream.peer_addr(), stream.local_addr()) else { return false };
    owner::of_peer(peer, local).is_ok_and(|found| found == user)
}

/// Where a connection leads that has become a tunnel.
enum Far {
    /// To where CONNECT asked for.
    Asked(Destination),
    /// To the endpoint that switched protocols.
    Switched(Tunnel),
}

async fn http(worker: Rc<Worker>, io: Io) {
    let own = worker.clone();
    let service = async move |mut request: Request| {
        let head = &mut request.head;
        if !is_authorized(own.proxy.plan.env_credentials.as_ref(), &head.fields) {
            return Outcome::Response(password_wanted());
        }
        head.fields.remove_known(&[Known::ProxyAuthorization, Known::ProxyConnection]);
        let connect = head.method == Method::CONNECT;
        let Some(port) = port_of(head.authority(), (!connect).then_some(80)) else {
            return Outcome::Response(plain(StatusCode::BAD_REQUEST));
        };
        let destination = outbound::named(&own, head.host(), port).await;
        if connect && destination.nowhere().is_none() {
            return Outcome::Tunnel(plain(StatusCode::OK), Far::Asked(destination));
        }
        match outbound::serve(&own, &destination, request).await.into_outcome() {
            Outcome::Tunnel(response, tunnel) => Outcome::Tunnel(response, Far::Switched(tunnel)),
            Outcome::Response(response) => Outcome::Response(response),
            Outcome::Close => Outcome::Close,
        }
    };
    let mut drain = worker.drain();
    let stop = pin!(async move { drain.reached(crate::drain::Phase::Closing).await });
    let options = Options {
        forward_proxy: true,
        idler: Some(worker.idlers.enter()),
        clients: worker.proxy.clients.clone(),
        ..Options::default()
    };
    match h1::server::serve(io, BytesMut::new(), &options, stop, service).await {
        Ok(Ended::Closed) => {}
        Ok(Ended::Tunnel(client, Far::Asked(destination))) => {
            outbound::converse(worker, client.io, client.read, destination).await;
        }
        Ok(Ended::Tunnel(client, Far::Switched(tunnel))) => connection::carry(client, tunnel).await,
        Err(error) => {
            if let Some(refusal) = error.refusal() {
                outbound::unread(&worker, Spoken::Http1).refused(refusal.status, refusal.cause);
            }
            tracing::debug!(%error, "a connection to the forward proxy ended");
        }
    }
}

fn is_authorized(wanted: Option<&Credentials>, fields: &Fields) -> bool {
    let Some(wanted) = wanted else { return true };
    let expected = format!("{}:{}", wanted.user, wanted.password);
    let given = fields.get(Known::ProxyAuthorization).and_then(|value| {
        let (scheme, token) = value.split_at_checked(6)?;
        if !scheme.eq_ignore_ascii_case(b"basic ") {
            return None;
        }
        STANDARD.decode(token.trim_ascii()).ok()
    });
    given.is_some_and(|given| verify_slices_are_equal(&given, expected.as_bytes()).is_ok())
}

fn password_wanted() -> Response {
    let mut response = plain(StatusCode::PROXY_AUTHENTICATION_REQUIRED);
    let _ = response.head.fields.append("proxy-authenticate", b"Basic realm=\"sheer\"");
    response
}

fn plain(status: StatusCode) -> Response {
    Response { head: ResponseHead::new(status), body: Body::from(Bytes::new()) }
}

fn port_of(authority: &str, default: Option<u16>) -> Option<u16> {
    let after_host = authority.rfind(']').map_or(authority, |end| &authority[end..]);
    match after_host.rsplit_once(':') {
        Some((_, port)) => port.parse().ok().filter(|port| *port != 0),
        None => default,
    }
}

async fn socks(worker: Rc<Worker>, mut io: Io) {
    match timeout(GREETING, socks_request(&worker, &mut io)).await {
        Ok(Ok(Some(destination))) => outbound::converse(worker, io, BytesMut::new(), destination).await,
        Ok(Ok(None)) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a SOCKS client broke off"),
        Err(_) => tracing::debug!("a SOCKS client did not say in time where it wants to go"),
    }
}

/// Reads greeting, password (RFC 1929) and request; `None` when the client was refused and told so.
async fn socks_request(worker: &Worker, io: &mut Io) -> io::Result<Option<Destination>> {
    const PASSWORD: u8 = 2;
    const NONE: u8 = 0;
    const NOTHING_ACCEPTABLE: u8 = 0xff;
    io.read_u8().await?;
    let methods = counted(io).await?;
    let wanted = worker.proxy.plan.env_credentials.as_ref();
    let method = if wanted.is_some() { PASSWORD } else { NONE };
    if !methods.contains(&method) {
        io.write_all(&[SOCKS5, NOTHING_ACCEPTABLE]).await?;
        return Ok(None);
    }
    io.write_all(&[SOCKS5, method]).await?;
    if let Some(wanted) = wanted {
        io.read_u8().await?;
        let (user, password) = (counted(io).await?, counted(io).await?);
        let is_it = verify_slices_are_equal(&user, wanted.user.as_bytes()).is_ok()
            & verify_slices_are_equal(&password, wanted.password.as_bytes()).is_ok();
        io.write_all(&[1, u8::from(!is_it)]).await?;
        if !is_it {
            return Ok(None);
        }
    }
    let mut request = [0; 4];
    io.read_exact(&mut request).await?;
    let host = match request[3] {
        1 => {
            let mut address = [0; 4];
            io.read_exact(&mut address).await?;
            Some(std::net::Ipv4Addr::from(address).to_string())
        }
        3 => String::from_utf8(counted(io).await?).ok(),
        4 => {
            let mut address = [0; 16];
            io.read_exact(&mut address).await?;
            Some(std::net::Ipv6Addr::from(address).to_string())
        }
        _ => None,
    };
    let port = io.read_u16().await?;
    let destination = match host {
        Some(host) if request[..2] == [SOCKS5, 1] => outbound::named(worker, &host, port).await,
        _ => {
            io.write_all(&socks_reply(7)).await?;
            return Ok(None);
        }
    };
    let code = match destination.nowhere() {
        Some(Cause::DestinationForbidden) => 2,
        Some(_) => 4,
        None => 0,
    };
    io.write_all(&socks_reply(code)).await?;
    Ok((code == 0).then_some(destination))
}

/// A reply with this code and no address: nobody needs to know where the proxy connects from.
fn socks_reply(code: u8) -> [u8; 10] {
    [SOCKS5, code, 0, 1, 0, 0, 0, 0, 0, 0]
}

/// Bytes after their number.
async fn counted(io: &mut Io) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::from(io.read_u8().await?)];
    io.read_exact(&mut bytes).await?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_of_authorities() {
        for (authority, default, port) in [
            ("web", Some(80), Some(80)),
            ("web:81", Some(80), Some(81)),
            ("[::1]:443", None, Some(443)),
            ("[::1]", None, None),
            ("web:0", None, None),
            ("web:x", Some(80), None),
        ] {
            assert_eq!(port_of(authority, default), port, "{authority}");
        }
    }

    #[test]
    fn only_the_password_of_this_run_opens_it() {
        let wanted = Credentials { user: "u".into(), password: "p".into() };
        let with = |value: &str| {
            let mut fields = Fields::default();
            fields.append("Proxy-Authorization", value.as_bytes()).unwrap();
            is_authorized(Some(&wanted), &fields)
        };
        assert!(with("Basic dTpw") && with("basic dTpw"));
        assert!(!with("Basic dTpx") && !with("Bearer dTpw") && !with("Basic") && !with("Basic !!"));
        assert!(!is_authorized(Some(&wanted), &Fields::default()));
    }
}

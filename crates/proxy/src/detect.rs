//! Reads a client's first bytes until they tell the protocol, and keeps them for whoever serves it.

use bytes::BytesMut;
use sheer_core::sniff::{ClientHello, Sniffed, sniff};
use std::future::poll_fn;
use std::io;

use crate::h1::buffer;
use crate::io::Io;

/// What a client speaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TLS, of the mesh or the application's own.
    Tls(ClientHello),
    /// HTTP/2 with prior knowledge.
    Http2,
    /// HTTP/1.
    Http1,
    /// Anything else.
    Opaque,
}

/// Reads until the bytes tell what the client speaks; `None` when it closed without a byte. All that was read is in
/// `prefix`, also when the future is dropped before its end: a caller may give a silent client's server the word.
/// A client that closes in the middle of its first words is opaque: they are not ours to judge.
///
/// # Errors
/// The connection failed.
pub async fn detect(io: &mut Io, prefix: &mut BytesMut) -> io::Result<Option<Protocol>> {
    loop {
        match sniff(prefix) {
            Sniffed::Tls(hello) => return Ok(Some(Protocol::Tls(hello))),
            Sniffed::Http2 => return Ok(Some(Protocol::Http2)),
            Sniffed::Http1 => return Ok(Some(Protocol::Http1)),
            Sniffed::Opaque => return Ok(Some(Protocol::Opaque)),
            Sniffed::Partial => {}
        }
        if poll_fn(|cx| buffer::poll_fill(io, prefix, buffer::SMALL, cx)).await? == 0 {
            return Ok((!prefix.is_empty()).then_some(Protocol::Opaque));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncWriteExt, duplex};

    async fn verdict(parts: &[&[u8]]) -> (Option<Protocol>, Vec<u8>) {
        let (mut client, server) = duplex(1024);
        let (mut io, mut prefix) = (Io::from(server), BytesMut::new());
        let script = async {
            for part in parts {
                client.write_all(part).await.unwrap();
                tokio::task::yield_now().await;
            }
            drop(client);
        };
        let (protocol, ()) = tokio::join!(detect(&mut io, &mut prefix), script);
        (protocol.unwrap(), prefix.to_vec())
    }

    #[tokio::test]
    async fn bytes_are_kept_for_whoever_serves_them() {
        let (protocol, prefix) = verdict(&[b"GE", b"T / HTTP/1.1\r\nHo", b"st: a"]).await;
        assert_eq!(protocol, Some(Protocol::Http1));
        assert!(prefix.starts_with(b"GET / HTTP/1.1\r\n"));
        assert_eq!(verdict(&[]).await, (None, vec![]));
        assert_eq!(verdict(&[b"GET"]).await, (Some(Protocol::Opaque), b"GET".to_vec()));
    }

    #[tokio::test]
    async fn a_caller_may_stop_waiting_without_losing_a_byte() {
        let (mut client, server) = duplex(1024);
        let (mut io, mut prefix) = (Io::from(server), BytesMut::new());
        client.write_all(b"PRI * ").await.unwrap();
        tokio::select! {
            biased;
            _ = detect(&mut io, &mut prefix) => panic!("not enough to tell"),
            () = std::future::ready(()) => {}
        }
        assert_eq!(&prefix[..], b"PRI * ");
    }
}

//! Reads a client's first bytes until they tell the protocol, and keeps them for whoever serves it.

use bytes::{Bytes, BytesMut};
use sheer_core::sniff::{ClientHello, Sniffed, sniff};
use std::future::poll_fn;
use std::io;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

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

/// What a connection turned out to be whose bytes were carried from the start.
#[derive(Debug, PartialEq, Eq)]
pub enum Turn {
    /// Its client speaks HTTP/1: the server has had a part of its first line at most.
    Http1,
    /// One of both sides speaks HTTP/2.
    Http2,
    /// Anything else, or its server has spoken.
    Bytes {
        /// How much of `prefix` the server has had.
        passed: usize,
        /// What the server has said.
        said: Bytes,
    },
}

/// Carries bytes for as long as they do not tell what they are, so that neither side waits for the other in vain. What
/// completes a request line is kept back: who wants to send requests cannot have them carried as something else.
///
/// # Errors
/// Either connection failed.
pub async fn turn(near: &mut Io, prefix: &mut BytesMut, far: &mut Io) -> io::Result<Turn> {
    let (mut passed, mut said) = (0, BytesMut::new());
    loop {
        match sniff(prefix) {
            Sniffed::Http1 => return Ok(Turn::Http1),
            Sniffed::Http2 => return Ok(Turn::Http2),
            Sniffed::Tls(_) | Sniffed::Opaque => return Ok(Turn::Bytes { passed, said: Bytes::new() }),
            Sniffed::Partial => {}
        }
        if passed < prefix.len() {
            far.write_all(&prefix[passed..]).await?;
            far.flush().await?;
            passed = prefix.len();
        }
        // Both reads keep what they have read in their buffers, so the loser loses nothing.
        tokio::select! {
            biased;
            read = poll_fn(|cx| buffer::poll_fill(near, prefix, buffer::SMALL, cx)) => if read? == 0 {
                return Ok(Turn::Bytes { passed, said: Bytes::new() });
            },
            read = far.read_buf(&mut said) => return match read {
                Ok(_) if is_http2_settings(&said) => Ok(Turn::Http2),
                Ok(_) => Ok(Turn::Bytes { passed, said: said.freeze() }),
                Err(error) => Err(error),
            },
        }
    }
}

/// A SETTINGS frame of stream 0, which HTTP/2 servers send at once (RFC 9113, section 3.4).
fn is_http2_settings(bytes: &[u8]) -> bool {
    bytes.len() >= 9 && bytes[3] == 4 && bytes[4] & !1 == 0 && bytes[5..9] == [0; 4]
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::duplex;

    #[test]
    fn a_settings_frame_is_told_from_a_greeting() {
        assert!(is_http2_settings(&[0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 100]));
        assert!(!is_http2_settings(b"220 mail.example ESMTP\r\n"));
        assert!(!is_http2_settings(&[0x4a, 0, 0, 0, 0x0a, 0x38, 0x2e, 0x30, 0x2e]));
    }

    /// What the server has had of the client's words when it is known what they are.
    async fn turned(words: &[&[u8]], answer: &'static [u8]) -> (Turn, Vec<u8>) {
        let (mut client, near) = duplex(1024);
        let (far, mut server) = duplex(1024);
        let (mut near, mut far, mut prefix) = (Io::from(near), Io::from(far), BytesMut::new());
        let script = async {
            for word in words {
                client.write_all(word).await.unwrap();
                tokio::task::yield_now().await;
                tokio::task::yield_now().await;
            }
            server.write_all(answer).await.unwrap();
        };
        let (turn, ()) = tokio::join!(turn(&mut near, &mut prefix, &mut far), script);
        drop(far);
        let mut had = Vec::new();
        server.read_to_end(&mut had).await.unwrap();
        (turn.unwrap(), had)
    }

    #[tokio::test]
    async fn nobody_gets_a_request_carried_as_bytes() {
        assert_eq!(turned(&[b"GET / HT", b"TP/1.1\r\nHost: a\r\n"], b"").await, (Turn::Http1, b"GET / HT".to_vec()));
        assert_eq!(turned(&[b"\r\n", b"GET / HTTP/1.1\r\n"], b"").await, (Turn::Http1, b"\r\n".to_vec()));
        let settings = b"\0\0\0\x04\0\0\0\0\0";
        assert_eq!(turned(&[], settings).await, (Turn::Http2, vec![]));
        // A word without an end is carried, and answered.
        let said = Bytes::from_static(b"world");
        assert_eq!(turned(&[b"hello"], b"world").await, (Turn::Bytes { passed: 5, said }, b"hello".to_vec()));
        let opaque = Turn::Bytes { passed: 2, said: Bytes::new() };
        assert_eq!(turned(&[b"ab", b"\x00"], b"").await, (opaque, b"ab".to_vec()));
    }

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

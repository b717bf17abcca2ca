use super::*;
use crate::testing::{Authority, loopback};
use crate::upstream::tls::Credentials;
use proptest::prelude::*;
use rustls::ConnectionTrafficSecrets;
use rustls::pki_types::ServerName;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const NAME: &str = "p80.web.default.svc.mesh.internal";

fn name() -> ServerName<'static> {
    ServerName::try_from(NAME).unwrap()
}

/// A workload's credentials, good on both sides.
fn credentials() -> Arc<Credentials> {
    Authority::new("mesh.internal").credentials("default", "web")
}

/// Client and server, both ours.
async fn pair() -> (Stream, Stream) {
    let (server, client) = credentials().configs();
    let (near, far) = loopback().await;
    let (near, far) = tokio::join!(connect(near, name(), client), accept(far, server));
    (near.unwrap().0, far.unwrap().0)
}

/// Our server, and a client that is rustls all the way.
async fn before_rustls() -> (Stream, tokio_rustls::client::TlsStream<TcpStream>) {
    let (server, client) = credentials().configs();
    let (near, far) = loopback().await;
    let connector = tokio_rustls::TlsConnector::from(client);
    let (theirs, ours) = tokio::join!(connector.connect(name(), near), accept(far, server));
    (ours.unwrap().0, theirs.unwrap())
}

/// Our client, and a server that is rustls all the way.
async fn behind_rustls() -> (Stream, tokio_rustls::server::TlsStream<TcpStream>) {
    let (server, client) = credentials().configs();
    let (near, far) = loopback().await;
    let acceptor = tokio_rustls::TlsAcceptor::from(server);
    let (ours, theirs) = tokio::join!(connect(near, name(), client), acceptor.accept(far));
    (ours.unwrap().0, theirs.unwrap())
}

/// What is under test ends within a time that only a hang exceeds.
async fn soon<T>(test: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), test).await.expect("it ends")
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|place| (place * 7 + place / 251) as u8).collect()
}

/// Writes in pieces of these sizes, in turn, each in as many slices as its number says, and closes.
async fn say(stream: &mut (impl AsyncWrite + Unpin), all: &[u8], sizes: &[usize]) -> io::Result<()> {
    let (mut rest, mut sizes) = (all, sizes.iter().cycle().enumerate());
    while !rest.is_empty() {
        let (number, size) = sizes.next().unwrap();
        let piece = &rest[..rest.len().min(*size)];
        let slices: Vec<_> = piece.chunks(piece.len().div_ceil(1 + number % 4)).map(IoSlice::new).collect();
        let written = stream.write_vectored(&slices).await?;
        assert!((1..=piece.len()).contains(&written));
        rest = &rest[written..];
    }
    stream.shutdown().await
}

/// Reads into buffers of these sizes, in turn, until the end.
async fn hear(stream: &mut (impl AsyncRead + Unpin), sizes: &[usize]) -> io::Result<Vec<u8>> {
    let (mut all, mut sizes) = (Vec::new(), sizes.iter().cycle());
    loop {
        let mut buffer = vec![0; *sizes.next().unwrap()];
        match stream.read(&mut buffer).await? {
            0 => return Ok(all),
            read => all.extend_from_slice(&buffer[..read]),
        }
    }
}

/// Both sides say something at once, and hear all of what the other says.
async fn talk(
    one: impl AsyncRead + AsyncWrite + Unpin,
    other: impl AsyncRead + AsyncWrite + Unpin,
    lengths: (usize, usize),
    writes: &[usize],
    reads: &[usize],
) {
    let said = (bytes(lengths.0), bytes(lengths.1));
    let ((mut from_one, mut to_one), (mut from_other, mut to_other)) = (tokio::io::split(one), tokio::io::split(other));
    let all = soon(async {
        tokio::try_join!(
            say(&mut to_one, &said.0, writes),
            say(&mut to_other, &said.1, writes),
            hear(&mut from_other, reads),
            hear(&mut from_one, reads),
        )
    });
    let ((), (), at_other, at_one) = all.await.unwrap();
    assert!(at_other == said.0 && at_one == said.1);
}

#[tokio::test]
async fn megabytes_pass_between_any_two_implementations() {
    for (writes, reads) in
        [(&[65_536][..], &[65_536][..]), (&[100_000, 1, 17], &[8192]), (&[16_385, 3000], &[1, 70_000])]
    {
        let (one, other) = pair().await;
        talk(one, other, (3_000_000, 2_000_000), writes, reads).await;
        let (one, other) = before_rustls().await;
        talk(one, other, (2_000_000, 3_000_000), writes, reads).await;
        let (one, other) = behind_rustls().await;
        talk(one, other, (2_000_000, 3_000_000), writes, reads).await;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Bytes in are bytes out, however they are written and read.
    #[test]
    fn bytes_in_are_bytes_out(
        lengths in (0..200_000_usize, 0..200_000_usize),
        writes in prop::collection::vec(1..90_000_usize, 1..8),
        reads in prop::collection::vec(1..90_000_usize, 1..8),
        peer in 0..3,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            match peer {
                0 => { let (one, other) = pair().await; talk(one, other, lengths, &writes, &reads).await }
                1 => { let (one, other) = before_rustls().await; talk(one, other, lengths, &writes, &reads).await }
                _ => { let (one, other) = behind_rustls().await; talk(one, other, lengths, &writes, &reads).await }
            }
        });
    }
}

#[tokio::test]
async fn keys_are_replaced_before_they_wear_out() {
    let (mut ours, theirs) = before_rustls().await;
    ours.most_sealed = 3;
    talk(&mut ours, theirs, (1_000_000, 10), &[10_000], &[50_000]).await;
    let (mut one, mut other) = pair().await;
    (one.most_sealed, other.most_sealed) = (1, 5);
    talk(&mut one, &mut other, (1_000_000, 1_000_000), &[10_000], &[50_000]).await;
    // Each has sent a hundred records.
    for stream in [&ours, &one, &other] {
        assert!(stream.sealer.sealed() < 10, "{} under one key", stream.sealer.sealed());
    }
}

#[tokio::test]
async fn a_peer_may_replace_its_keys_and_ask_for_new_ones() {
    let (mut ours, mut theirs) = before_rustls().await;
    soon(async {
        for turn in 0..100_u8 {
            theirs.get_mut().1.refresh_traffic_keys().unwrap();
            theirs.write_u8(turn).await.unwrap();
            theirs.flush().await.unwrap();
            assert_eq!(ours.read_u8().await.unwrap(), turn);
        }
        let (mut one, mut other) = pair().await;
        for turn in 0..100_u8 {
            let before = other.sealer.sealed();
            one.queue_new_key(1).unwrap();
            one.write_u8(turn).await.unwrap();
            one.flush().await.unwrap();
            assert_eq!(other.read_u8().await.unwrap(), turn);
            assert!(other.sealer.sealed() == 0 && (turn == 0 || before == 1), "it has a new key");
            other.write_u8(turn).await.unwrap();
            other.flush().await.unwrap();
            assert_eq!(one.read_u8().await.unwrap(), turn);
        }
    })
    .await;
}

#[tokio::test]
async fn who_asks_for_new_keys_and_does_not_read_makes_nothing_grow() {
    let (mut one, mut other) = pair().await;
    let full = async { while other.write(&[7; 65_536]).await.is_ok() {} };
    assert!(tokio::time::timeout(Duration::from_millis(300), full).await.is_err(), "it waits");
    let before = other.unsent.len();
    soon(async {
        for turn in 0..2000_u16 {
            let mut asked = sealed(&mut one, Kind::Handshake, &[24, 0, 0, 1, 1]);
            one.sealer = one.session.next_sealer().unwrap();
            asked.extend(sealed(&mut one, Kind::Data, &turn.to_be_bytes()));
            one.socket.write_all(&asked).await.unwrap();
            assert_eq!(other.read_u16().await.unwrap(), turn);
        }
    })
    .await;
    assert!(other.unsent.len() <= before + 100, "{} bytes more", other.unsent.len() - before);
    // What it was asked for comes, and what follows can be read.
    let rest = async {
        other.write_all(b"the end").await.unwrap();
        other.shutdown().await.unwrap();
        drop(other);
    };
    let (heard, ()) = soon(async { tokio::join!(hear(&mut one, &[65_536]), rest) }).await;
    assert!(heard.unwrap().ends_with(b"\x07the end"));
}

#[tokio::test]
async fn each_half_closes_on_its_own() {
    let (mut ours, mut theirs) = before_rustls().await;
    soon(async {
        theirs.shutdown().await.unwrap();
        assert_eq!(ours.read(&mut [0; 8]).await.unwrap(), 0);
        assert_eq!(ours.read(&mut [0; 8]).await.unwrap(), 0);
        ours.write_all(b"still").await.unwrap();
        ours.shutdown().await.unwrap();
        let mut heard = Vec::new();
        theirs.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"still");
        assert_eq!(ours.write(b"more").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    })
    .await;
}

#[tokio::test]
async fn an_end_without_a_word_is_no_end() {
    let (mut ours, mut theirs) = before_rustls().await;
    soon(async {
        theirs.write_all(b"half").await.unwrap();
        theirs.flush().await.unwrap();
        theirs.get_mut().0.shutdown().await.unwrap();
        let mut heard = Vec::new();
        assert_eq!(ours.read_to_end(&mut heard).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(heard, b"half");
    })
    .await;
}

#[tokio::test]
async fn a_writer_waits_for_its_reader_and_keeps_little() {
    let (mut one, mut other) = pair().await;
    let full = async { while one.write(&[7; 65_536]).await.is_ok() {} };
    assert!(tokio::time::timeout(Duration::from_millis(300), full).await.is_err(), "it waits");
    assert!(one.unsent.len() <= SEALED);
    let rest = async {
        one.shutdown().await.unwrap();
        drop(one);
    };
    let (heard, ()) = soon(async { tokio::join!(hear(&mut other, &[65_536]), rest) }).await;
    let heard = heard.unwrap();
    assert!(heard.len().is_multiple_of(65_536) && heard.iter().all(|byte| *byte == 7));
}

#[tokio::test]
async fn a_connection_at_rest_keeps_nothing() {
    let (mut one, mut other) = pair().await;
    let all = bytes(100_000);
    let mut heard = vec![0; all.len()];
    soon(async {
        let write = async {
            one.write_all(&all).await.unwrap();
            one.flush().await.unwrap();
        };
        tokio::join!(write, async { other.read_exact(&mut heard).await.unwrap() })
    })
    .await;
    for stream in [&one, &other] {
        let kept = [stream.received.len(), stream.opened.len(), stream.unsent.len(), stream.message.capacity()];
        assert_eq!(kept, [0; 4]);
    }
}

/// What a server of ours says of bytes that come after the handshake, and what the client hears of it.
async fn answer_to(spoil: impl FnOnce(&mut Stream) -> Vec<u8>) -> (rustls::Error, Option<io::Error>) {
    let (mut one, mut other) = pair().await;
    let bytes = spoil(&mut one);
    let judged = soon(async {
        one.socket.write_all(&bytes).await.unwrap();
        let mut heard = Vec::new();
        let error = other.read_to_end(&mut heard).await.unwrap_err();
        assert!(heard.is_empty(), "{heard:?} came through");
        assert!(other.write(b"x").await.is_err(), "nothing is sent after the alert");
        let again = other.read(&mut [0; 8]).await.unwrap_err();
        assert_eq!(again.to_string(), error.to_string());
        drop(other);
        (error, one.read(&mut [0; 8]).await.err())
    });
    let (error, heard) = judged.await;
    (error.get_ref().unwrap().downcast_ref::<rustls::Error>().unwrap().clone(), heard)
}

/// A record as the stream would send it.
fn sealed(stream: &mut Stream, kind: Kind, content: &[u8]) -> Vec<u8> {
    let mut record = vec![0; content.len() + OVERHEAD];
    stream.sealer.seal(kind, content, &mut record).unwrap();
    record
}

#[tokio::test]
async fn what_is_wrong_ends_the_connection_and_the_peer_learns_why() {
    type Spoil = fn(&mut Stream) -> Vec<u8>;
    use AlertDescription::{BadRecordMac, DecodeError, RecordOverflow, UnexpectedMessage};
    let cases: [(&str, Spoil, AlertDescription); 15] = [
        (
            "a bit of the content",
            |it| {
                let mut record = sealed(it, Kind::Data, b"abc");
                record[6] ^= 1;
                record
            },
            BadRecordMac,
        ),
        (
            "a bit of the tag",
            |it| {
                let mut record = sealed(it, Kind::Data, b"abc");
                *record.last_mut().unwrap() ^= 1;
                record
            },
            BadRecordMac,
        ),
        (
            "the length in the header",
            |it| {
                let mut record = sealed(it, Kind::Data, b"abc");
                record.push(0);
                record[4] += 1;
                record
            },
            BadRecordMac,
        ),
        (
            "a record again",
            |it| {
                let record = sealed(it, Kind::Data, b"");
                [record.clone(), record].concat()
            },
            BadRecordMac,
        ),
        (
            "a record left out",
            |it| {
                sealed(it, Kind::Data, b"abc");
                sealed(it, Kind::Data, b"def")
            },
            BadRecordMac,
        ),
        ("too short for a tag", |_| vec![23, 3, 3, 0, 3, 1, 2, 3], BadRecordMac),
        ("too long", |_| vec![23, 3, 3, 0x41, 0x01], RecordOverflow),
        ("no record", |_| b"GET / HTTP/1.1\r\n\r\n".to_vec(), DecodeError),
        ("an alert in the clear", |_| vec![21, 3, 3, 0, 2, 1, 0], UnexpectedMessage),
        ("a change of ciphers", |_| vec![20, 3, 3, 0, 1, 1], UnexpectedMessage),
        ("an alert of three bytes", |it| sealed(it, Kind::Alert, &[1, 0, 0]), DecodeError),
        (
            "data amid a message",
            |it| {
                let begun = sealed(it, Kind::Handshake, &[24, 0]);
                [begun, sealed(it, Kind::Data, b"x")].concat()
            },
            UnexpectedMessage,
        ),
        ("a ticket from a client", |it| sealed(it, Kind::Handshake, &[4, 0, 0, 1, 0]), UnexpectedMessage),
        (
            "something behind a new key",
            |it| sealed(it, Kind::Handshake, &[24, 0, 0, 1, 0, 24, 0, 0, 1, 0]),
            UnexpectedMessage,
        ),
        ("records without data", |it| (0..40).flat_map(|_| sealed(it, Kind::Data, b"")).collect(), UnexpectedMessage),
    ];
    for (what, spoil, alert) in cases {
        let (error, heard) = answer_to(spoil).await;
        let heard = heard.unwrap_or_else(|| panic!("{what}: the peer heard of an end in order, after {error}"));
        let heard = heard.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()).cloned();
        assert_eq!(heard, Some(rustls::Error::AlertReceived(alert)), "{what}: {error}");
    }
}

#[tokio::test]
async fn data_before_a_fault_is_data() {
    let (mut one, mut other) = pair().await;
    let mut records = sealed(&mut one, Kind::Data, b"good");
    records.extend(sealed(&mut one, Kind::Alert, &[2, AlertDescription::InternalError.into()]));
    soon(async {
        one.socket.write_all(&records).await.unwrap();
        let mut heard = Vec::new();
        let error = other.read_to_end(&mut heard).await.unwrap_err();
        assert_eq!(heard, b"good");
        let error = error.get_ref().unwrap().downcast_ref::<rustls::Error>().unwrap().clone();
        assert_eq!(error, rustls::Error::AlertReceived(AlertDescription::InternalError));
    })
    .await;
}

#[tokio::test]
async fn a_handshake_of_single_bytes_or_of_nonsense_ends() {
    let (server, client) = credentials().configs();
    // Byte by byte, both ways.
    let ((near, mut to_near), (mut to_far, far)) = (loopback().await, loopback().await);
    let pass = async {
        let ((mut from_near, mut into_near), (mut from_far, mut into_far)) = (to_near.split(), to_far.split());
        let crawl = async |from: &mut tokio::net::tcp::ReadHalf<'_>, to: &mut tokio::net::tcp::WriteHalf<'_>| {
            while let Ok(byte) = from.read_u8().await {
                to.write_u8(byte).await.unwrap();
            }
        };
        tokio::join!(crawl(&mut from_near, &mut into_far), crawl(&mut from_far, &mut into_near));
    };
    let meet = async {
        let (near, far) = tokio::join!(connect(near, name(), client), accept(far, server.clone()));
        let ((mut near, _), (mut far, met)) = (near.unwrap(), far.unwrap());
        assert_eq!(met.alpn, None);
        near.write_all(b"hello").await.unwrap();
        far.read_exact(&mut [0; 5]).await.unwrap();
    };
    soon(async {
        tokio::select! { () = meet => {}, () = pass => panic!("the connection broke") }
    })
    .await;
    for nonsense in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"\x16\x03\x01\xff\xff",
        b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00",
        b"\x16\x03",
    ] {
        let (mut near, far) = loopback().await;
        near.write_all(nonsense).await.unwrap();
        near.shutdown().await.unwrap();
        assert!(soon(accept(far, server.clone())).await.is_err(), "{nonsense:?}");
    }
}

#[test]
fn records_open_to_what_was_sealed() {
    // Keys of 128 bits come from handshakes alone: the tests above have them.
    let aes = || ConnectionTrafficSecrets::Aes256Gcm { key: [5; 32].into(), iv: [9; 12].into() };
    let chacha = || ConnectionTrafficSecrets::Chacha20Poly1305 { key: [5; 32].into(), iv: [9; 12].into() };
    for (ours, theirs) in [(aes(), aes()), (chacha(), chacha())] {
        let (mut sealer, mut opener) = (Sealer::new((7, ours)).unwrap(), Opener::new((7, theirs)).unwrap());
        for length in [0, 1, 15, 16, 17, 1000, MOST_CONTENT] {
            let content = bytes(length);
            let mut record = vec![0; length + OVERHEAD];
            assert_eq!(sealer.seal(Kind::Data, &content, &mut record).unwrap(), record.len());
            assert_eq!(record::whole(&record).unwrap(), Some(record.len()));
            assert_eq!(record::whole(&record[..record.len() - 1]).unwrap(), None);
            let mut out = vec![0; Opener::room(record.len())];
            assert_eq!(opener.open(&record, &mut out).unwrap(), (Kind::Data, length));
            assert!(out[..length] == content);
            let mut record = vec![0; length + OVERHEAD];
            record[HEADER..HEADER + length].copy_from_slice(&content);
            sealer.seal_in_place(length, &mut record).unwrap();
            assert_eq!(opener.open_in_place(&mut record).unwrap(), (Kind::Data, length));
            assert!(record[HEADER..HEADER + length] == content);
        }
    }
}

use rustls::server::Acceptor;
use sheer_core::sniff::{MESH_ALPN_BYTES, MESH_ALPN_PREFIX, Sniffed, sniff};
use sheer_fuzzing::Choices;

/// What a ClientHello says in the clear, in as many records as it comes: what the library that makes the handshake reads
/// in it is what is read in it here. The mesh decides on the name and on whether a peer's proxy calls.
///
/// # Panics
/// When that does not hold.
pub fn hello(input: &[u8]) {
    let mut choices = Choices::of(input);
    let bytes = match choices.flag() {
        true => written(&mut choices),
        false => choices.rest().to_vec(),
    };
    let (mut acceptor, mut rest) = (Acceptor::default(), bytes.as_slice());
    let accepted = loop {
        if !matches!(acceptor.read_tls(&mut rest), Ok(1..)) {
            return;
        }
        match acceptor.accept() {
            Ok(Some(accepted)) => break accepted,
            Ok(None) => {}
            Err(_) => return,
        }
    };
    let hello = accepted.client_hello();
    let Sniffed::Tls(seen) = sniff(&bytes) else { panic!("a ClientHello was not recognised: {:?}", sniff(&bytes)) };
    match (hello.server_name(), &seen.server_name) {
        (Some(name), Some(seen)) => assert_eq!(name.to_ascii_lowercase(), *seen),
        (Some(name), None) => panic!("the name '{name}' was not seen"),
        // An address is no server name (RFC 6066, section 3), and the library leaves it out.
        (None, Some(seen)) => {
            assert!(seen.parse::<std::net::IpAddr>().is_ok(), "'{seen}' is seen where there is no name")
        }
        (None, None) => {}
    }
    let offered: Vec<&[u8]> = hello.alpn().into_iter().flatten().collect();
    assert_eq!(seen.offers_mesh, offered.iter().any(|it| it.starts_with(MESH_ALPN_PREFIX)));
    assert_eq!(seen.offers_mesh_bytes, offered.contains(&MESH_ALPN_BYTES));
}

fn vector(width: usize, content: &[u8]) -> Vec<u8> {
    [&content.len().to_be_bytes()[8 - width..], content].concat()
}

/// A ClientHello whose parts are chosen, some of them wrongly.
fn written(choices: &mut Choices<'_>) -> Vec<u8> {
    let mut extensions = Vec::new();
    for _ in 0..choices.below(7) {
        let (kind, content): (u16, Vec<u8>) = match choices.below(8) {
            0 => {
                let names: Vec<u8> = (0..choices.below(3))
                    .flat_map(|_| [vec![choices.byte() / 128], vector(2, choices.bytes())].concat())
                    .collect();
                (0, vector(2, &names))
            }
            1 => (
                0,
                vector(
                    2,
                    &[vec![0], vector(2, choices.one_of(&[&b"web.example"[..], b"P80.Web", b"10.0.0.1", b"a_b"]))]
                        .concat(),
                ),
            ),
            2 => {
                let names = [MESH_ALPN_BYTES, b"sheer/1+h2", b"h2", b"http/1.1", b"sheer/1", b""];
                let names: Vec<u8> = (0..choices.below(4)).flat_map(|_| vector(1, choices.one_of(&names))).collect();
                (16, vector(2, &names))
            }
            3 => (16, choices.bytes().to_vec()),
            // Signature algorithms, versions, groups: without them it is no handshake.
            4 => (13, vector(2, b"\x04\x03\x08\x04")),
            5 => (43, vector(1, b"\x03\x04")),
            6 => (10, vector(2, b"\0\x1d")),
            _ => (choices.short(), choices.bytes().to_vec()),
        };
        extensions.extend([&kind.to_be_bytes()[..], &vector(2, &content)].concat());
    }
    if choices.byte() < 200 {
        extensions.extend([&[0, 13][..], &vector(2, &vector(2, b"\x04\x03\x08\x04"))].concat());
    }
    let content = [
        vec![3, 3],
        vec![7; 32],
        vector(1, &[1; 32][..choices.below(33)]),
        vector(2, &[0x13, 1, 0xc0, 0x2b]),
        vector(1, &[0]),
        vector(2, &extensions),
    ];
    let mut message = [vec![1], vector(3, &content.concat())].concat();
    if choices.byte() > 220 {
        let at = choices.below(message.len().min(65_536));
        message[at] ^= choices.byte();
    }
    let record = choices.below(300) + 1;
    let records = message.chunks(record).flat_map(|chunk| [vec![0x16, 3, 1], vector(2, chunk)].concat());
    let mut bytes: Vec<u8> = records.collect();
    bytes.extend_from_slice(choices.bytes());
    bytes
}

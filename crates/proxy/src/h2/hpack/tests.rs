use super::decode::CompressionError;
use super::*;
use bytes::BytesMut;
use proptest::prelude::*;

type List = Vec<(Vec<u8>, Vec<u8>, bool)>;

fn decoded(decoder: &mut Decoder, block: &[u8]) -> Result<List, CompressionError> {
    let mut list = Vec::new();
    decoder.decode(block, |field| list.push((field.name.into(), field.value.into(), field.sensitive)))?;
    Ok(list)
}

fn encoded(encoder: &mut Encoder, list: &List) -> BytesMut {
    let mut block = BytesMut::new();
    encoder.begin(&mut block);
    for (name, value, sensitive) in list {
        encoder.field(name, value, *sensitive, &mut block);
    }
    block
}

fn list(fields: &[(&str, &str)]) -> List {
    fields.iter().map(|(name, value)| (name.as_bytes().into(), value.as_bytes().into(), false)).collect()
}

#[test]
fn the_examples_of_the_rfc_decode() {
    // RFC 7541, appendix C.4: three requests on one connection, Huffman coded.
    let mut decoder = Decoder::new();
    let first = [0x82, 0x86, 0x84, 0x41, 0x8c, 0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff];
    let request = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "www.example.com")];
    assert_eq!(decoded(&mut decoder, &first).unwrap(), list(&request));
    let second = [0x82, 0x86, 0x84, 0xbe, 0x58, 0x86, 0xa8, 0xeb, 0x10, 0x64, 0x9c, 0xbf];
    let mut all = request.to_vec();
    all.push(("cache-control", "no-cache"));
    assert_eq!(decoded(&mut decoder, &second).unwrap(), list(&all));
}

#[test]
fn a_name_of_the_entry_that_makes_room_survives() {
    let mut decoder = Decoder::new();
    // A table of 64 bytes holds one such entry; the second takes its name from the first.
    let block = [&[0x3f, 33, 0x40, 3][..], b"x-a", &[1], b"1", &[0x7e, 2], b"22"].concat();
    assert_eq!(decoded(&mut decoder, &block).unwrap(), list(&[("x-a", "1"), ("x-a", "22")]));
    assert_eq!(decoded(&mut decoder, &[0xbe]).unwrap(), list(&[("x-a", "22")]));
}

#[test]
fn what_is_no_block_is_refused() {
    for block in [
        &[0x80][..],
        &[0xbe],
        &[0x40],
        &[0x40, 1],
        &[0x40, 1, b'a', 5, b'b'],
        &[0x82, 0x20],
        // A table of 4097 bytes.
        &[0x3f, 0xe2, 0x1f],
        &[0xff, 0xff, 0xff, 0xff, 0xff, 0x0f],
        &[0x00, 0x81, 0x00, 0],
    ] {
        assert!(decoded(&mut Decoder::new(), block).is_err(), "{block:?}");
    }
    assert!(decoded(&mut Decoder::new(), &[0x3f, 0xe1, 0x1f]).unwrap().is_empty());
}

#[test]
fn what_repeats_becomes_a_byte_and_secrets_do_not() {
    let (mut encoder, mut decoder) = (Encoder::new(), Decoder::new());
    let fields = list(&[("user-agent", "test"), ("x-tenant", "a")]);
    let sizes: Vec<usize> = (0..4)
        .map(|_| {
            let block = encoded(&mut encoder, &fields);
            assert_eq!(decoded(&mut decoder, &block).unwrap(), fields);
            block.len()
        })
        .collect();
    assert_eq!((sizes[2], sizes[3]), (2, 2), "{sizes:?}");
    for fields in [list(&[("authorization", "secret")]), vec![(b"x-token".into(), b"secret".into(), true)]] {
        for _ in 0..4 {
            let block = encoded(&mut encoder, &fields);
            assert!(block.windows(6).any(|part| part == b"secret"));
            assert_eq!(decoded(&mut decoder, &block).unwrap(), fields);
        }
    }
}

#[test]
fn a_smaller_table_is_announced_and_used() {
    let (mut encoder, mut decoder) = (Encoder::new(), Decoder::new());
    let fields = list(&[("x-a", "1"), ("x-b", "2"), ("x-c", "3")]);
    for admitted in [4096, 0, 4096, 64, 1 << 20] {
        encoder.resize(admitted);
        for _ in 0..4 {
            let block = encoded(&mut encoder, &fields);
            assert_eq!(decoded(&mut decoder, &block).unwrap(), fields);
        }
    }
    encoder.resize(0);
    encoder.resize(4096);
    assert_eq!(&encoded(&mut encoder, &Vec::new())[..], [0x20, 0x3f, 0xe1, 0x1f]);
}

fn field() -> impl Strategy<Value = (Vec<u8>, Vec<u8>, bool)> {
    let name = prop_oneof![
        "[a-z]{1,3}",
        Just("content-type".to_owned()),
        Just(":path".to_owned()),
        Just("cookie".to_owned()),
        "[a-z-]{60,90}",
    ];
    let value = prop_oneof!["[ -~]{0,2}", "[ -~]{0,200}", "[a-z]{900,1200}"];
    (name, value, proptest::bool::weighted(0.1))
        .prop_map(|(name, value, sensitive)| (name.into(), value.into(), sensitive))
}

proptest! {
    #[test]
    fn what_was_encoded_decodes_to_itself(
        blocks in proptest::collection::vec((proptest::collection::vec(field(), 0..12), 0usize..6000), 1..8)
    ) {
        let (mut encoder, mut decoder) = (Encoder::new(), Decoder::new());
        for (fields, size) in blocks {
            if size < 4096 {
                encoder.resize(size);
            }
            // Twice, so that everything that may enter the table does.
            for _ in 0..2 {
                let block = encoded(&mut encoder, &fields);
                prop_assert_eq!(&decoded(&mut decoder, &block).unwrap(), &fields);
            }
        }
    }

    #[test]
    fn no_bytes_break_the_decoder(blocks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 1..5)) {
        let mut decoder = Decoder::new();
        for block in blocks {
            if decoded(&mut decoder, &block).is_err() {
                break;
            }
            prop_assert!(decoder.size() <= TABLE_SIZE);
        }
    }
}

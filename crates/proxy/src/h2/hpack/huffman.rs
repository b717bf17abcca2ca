//! The Huffman code of RFC 7541, appendix B: decoding alone. What we send is not coded: it is shorter by a fifth for a
//! few times the work on both sides, and what repeats is a byte from the table anyway.

/// The length in bits of each symbol's code; the last is the end of the string. The code is canonical: in the order of
/// length, then of symbol, each code follows the one before, so that the lengths say everything.
pub(super) const LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28,
    28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12,
    10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6, 15, 5, 6,
    5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22,
    22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20,
    22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28,
    27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28,
    27, 27, 27, 27, 27, 26, 30,
];

const EOS: u16 = 256;

/// One step of the decoder: from a state, by four bits.
#[derive(Clone, Copy)]
struct Step {
    next: u8,
    /// A symbol ended within these bits; two cannot, since the shortest has five.
    symbol: Option<u8>,
    /// No string may go on like this: it has the symbol that marks the end.
    fails: bool,
}

/// What four bits lead to from each inner node of the code's tree.
static STEPS: [[Step; 16]; 256] = steps();

/// Whether a string may end in a state: less than a byte of ones since the last symbol (section 5.2).
static MAY_END: [bool; 256] = ends();

/// The children of each inner node: below 256 an inner node, from 256 on a symbol.
const fn tree() -> [[u16; 2]; 256] {
    let mut nodes = [[0u16; 2]; 256];
    let mut used = 1;
    let (mut code, mut length) = (0u32, 1u8);
    while length <= 30 {
        let mut symbol = 0;
        while symbol <= EOS {
            if LENGTHS[symbol as usize] == length {
                let (mut node, mut bit) = (0, length);
                while bit > 1 {
                    bit -= 1;
                    let side = (code >> bit & 1) as usize;
                    if nodes[node][side] == 0 {
                        nodes[node][side] = used;
                        used += 1;
                    }
                    node = nodes[node][side] as usize;
                }
                nodes[node][(code & 1) as usize] = 256 + symbol;
                code += 1;
            }
            symbol += 1;
        }
        code <<= 1;
        length += 1;
    }
    nodes
}

const fn steps() -> [[Step; 16]; 256] {
    let nodes = tree();
    let mut steps = [[Step { next: 0, symbol: None, fails: false }; 16]; 256];
    let mut state = 0;
    while state < 256 {
        let mut bits = 0;
        while bits < 16 {
            let mut step = Step { next: 0, symbol: None, fails: false };
            let (mut node, mut left) = (state, 4);
            while left > 0 {
                left -= 1;
                let child = nodes[node][bits >> left & 1];
                if child < 256 {
                    node = child as usize;
                } else {
                    node = 0;
                    if child == 256 + EOS {
                        step.fails = true;
                    } else {
                        step.symbol = Some((child - 256) as u8);
                    }
                }
            }
            step.next = node as u8;
            steps[state][bits] = step;
            bits += 1;
        }
        state += 1;
    }
    steps
}

const fn ends() -> [bool; 256] {
    let nodes = tree();
    let mut ends = [false; 256];
    let (mut node, mut ones) = (0, 0);
    while ones < 8 {
        ends[node] = true;
        node = nodes[node][1] as usize;
        ones += 1;
    }
    ends
}

/// Appends the decoded string. False when it is not one.
pub(super) fn decode(coded: &[u8], out: &mut Vec<u8>) -> bool {
    out.reserve(coded.len() + coded.len() / 2);
    let mut state = 0u8;
    for byte in coded {
        for bits in [byte >> 4, byte & 15] {
            let step = STEPS[usize::from(state)][usize::from(bits)];
            if step.fails {
                return false;
            }
            out.extend(step.symbol);
            state = step.next;
        }
    }
    MAY_END[usize::from(state)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Writes the code bit by bit, from the lengths alone.
    fn encode(text: &[u8]) -> Vec<u8> {
        let mut order: Vec<u16> = (0..=EOS).collect();
        order.sort_by_key(|symbol| (LENGTHS[usize::from(*symbol)], *symbol));
        let (mut code, mut before, mut codes) = (0u32, 0, vec![(0u32, 0u8); 257]);
        for symbol in order {
            let length = LENGTHS[usize::from(symbol)];
            code <<= length - before;
            codes[usize::from(symbol)] = (code, length);
            (code, before) = (code + 1, length);
        }
        let mut bits = Vec::new();
        for byte in text {
            let (code, length) = codes[usize::from(*byte)];
            bits.extend((0..length).rev().map(|bit| code >> bit & 1 == 1));
        }
        while bits.len() % 8 != 0 {
            bits.push(true);
        }
        bits.chunks(8).map(|byte| byte.iter().fold(0, |sum, bit| sum << 1 | u8::from(*bit))).collect()
    }

    fn decoded(coded: &[u8]) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        decode(coded, &mut out).then_some(out)
    }

    #[test]
    fn the_examples_of_the_rfc_decode() {
        // RFC 7541, appendix C.4 and C.6.
        for (coded, text) in [
            (&[0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff][..], &b"www.example.com"[..]),
            (&[0xa8, 0xeb, 0x10, 0x64, 0x9c, 0xbf], b"no-cache"),
            (&[0x25, 0xa8, 0x49, 0xe9, 0x5b, 0xb8, 0xe8, 0xb4, 0xbf], b"custom-value"),
            (&[0x64, 0x02], b"302"),
            (&[], b""),
        ] {
            assert_eq!(decoded(coded).as_deref(), Some(text));
        }
    }

    #[test]
    fn wrong_ends_are_refused() {
        for coded in [
            // A byte of padding; zeros as padding; the end of string itself; a symbol cut short.
            &[0x64, 0x02, 0xff][..],
            &[0x00],
            &[0xff, 0xff, 0xff, 0xfc],
            &[0xff, 0xff, 0xff, 0xff],
            &[0xff],
        ] {
            assert_eq!(decoded(coded), None, "{coded:?}");
        }
    }

    proptest! {
        #[test]
        fn every_string_survives(text in proptest::collection::vec(any::<u8>(), 0..100)) {
            prop_assert_eq!(decoded(&encode(&text)), Some(text));
        }
    }
}

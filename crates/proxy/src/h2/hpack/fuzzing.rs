//! Decompression by the letter of RFC 7541, as plain as possible, to compare with.

use super::huffman::LENGTHS;
use super::{Decoder, ENTRY_OVERHEAD, TABLE_SIZE};
use std::collections::HashMap;
use std::sync::LazyLock;

/// A field: name, value, and whether it is never to be indexed.
pub(in crate::h2) type Field = (Vec<u8>, Vec<u8>, bool);

/// A decoder with a table that is a list.
pub(in crate::h2) struct Plain {
    table: Vec<(Vec<u8>, Vec<u8>)>,
    capacity: usize,
}

impl Plain {
    pub(in crate::h2) fn new() -> Self {
        Self { table: Vec::new(), capacity: TABLE_SIZE }
    }

    /// All fields of a block; `None` for what is no block.
    pub(in crate::h2) fn decode(&mut self, mut block: &[u8]) -> Option<Vec<Field>> {
        let mut fields = Vec::new();
        while let Some(first) = block.first() {
            // The four forms of section 6 by their first bits: indexed; literal with indexing; size; literal without.
            match first.leading_zeros() {
                0 => {
                    let (name, value) = self.entry(number(&mut block, 7)?)?;
                    fields.push((name, value, false));
                }
                1 => {
                    let (name, value) = self.literal(6, &mut block)?;
                    fields.push((name.clone(), value.clone(), false));
                    self.table.insert(0, (name, value));
                    self.evict();
                }
                2 => {
                    self.capacity = number(&mut block, 5)?;
                    if !fields.is_empty() || self.capacity > TABLE_SIZE {
                        return None;
                    }
                    self.evict();
                }
                zeros => {
                    let (name, value) = self.literal(4, &mut block)?;
                    fields.push((name, value, zeros == 3));
                }
            }
        }
        Some(fields)
    }

    fn literal(&self, prefix: u32, block: &mut &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
        let name = match number(block, prefix)? {
            0 => string(block)?,
            index => self.entry(index)?.0,
        };
        Some((name, string(block)?))
    }

    fn entry(&self, index: usize) -> Option<(Vec<u8>, Vec<u8>)> {
        match index {
            0 => None,
            1..=61 => Some(STATIC[index - 1].clone()),
            _ => self.table.get(index - 62).cloned(),
        }
    }

    fn evict(&mut self) {
        let size = |table: &[(Vec<u8>, Vec<u8>)]| -> usize {
            table.iter().map(|(name, value)| name.len() + value.len() + ENTRY_OVERHEAD).sum()
        };
        while size(&self.table) > self.capacity {
            self.table.pop();
        }
    }
}

/// The static table is asked of the decoder itself: its content is the RFC's, or no client would be understood.
static STATIC: LazyLock<Vec<(Vec<u8>, Vec<u8>)>> = LazyLock::new(|| {
    let mut entries = Vec::new();
    for index in 1..=61u8 {
        let decoded = Decoder::new().decode(&[0x80 | index], |it| entries.push((it.name.into(), it.value.into())));
        decoded.expect("a static entry");
    }
    entries
});

/// Section 5.1. More than four bytes behind the prefix are refused, as nothing that is allowed needs them.
fn number(block: &mut &[u8], prefix: u32) -> Option<usize> {
    let (first, rest) = block.split_first()?;
    *block = rest;
    let most = (1usize << prefix) - 1;
    let start = usize::from(*first) & most;
    if start < most {
        return Some(start);
    }
    let length = block.iter().position(|byte| *byte < 128)? + 1;
    let (digits, rest) = block.split_at(length);
    *block = rest;
    if length > 4 {
        return None;
    }
    Some(most + digits.iter().rev().fold(0, |sum, digit| sum * 128 + usize::from(digit & 127)))
}

fn string(block: &mut &[u8]) -> Option<Vec<u8>> {
    let is_huffman = *block.first()? >= 128;
    let length = number(block, 7)?;
    let (text, rest) = block.split_at_checked(length)?;
    *block = rest;
    if is_huffman { huffman(text) } else { Some(text.to_vec()) }
}

/// Codes and their symbols by length and bits: in the order of length, then of symbol, each follows the one before.
static CODES: LazyLock<HashMap<(u8, u32), u16>> = LazyLock::new(|| {
    let mut order: Vec<(u8, u16)> = LENGTHS.iter().copied().zip(0..).collect();
    order.sort_unstable();
    let (mut next, mut before, mut codes) = (0u32, 0, HashMap::new());
    for (length, symbol) in order {
        next <<= length - before;
        codes.insert((length, next), symbol);
        (next, before) = (next + 1, length);
    }
    codes
});

/// Section 5.2, bit by bit.
fn huffman(text: &[u8]) -> Option<Vec<u8>> {
    let (mut out, mut code, mut length) = (Vec::new(), 0u32, 0u8);
    for bit in text.iter().flat_map(|byte| (0..8).rev().map(move |place| byte >> place & 1)) {
        (code, length) = (code << 1 | u32::from(bit), length + 1);
        if let Some(symbol) = CODES.get(&(length, code)) {
            // The end of the string is never written out.
            out.push(u8::try_from(*symbol).ok()?);
            (code, length) = (0, 0);
        } else if length >= 30 {
            return None;
        }
    }
    (length < 8 && code == (1 << length) - 1).then_some(out)
}

//! Compressing field blocks.
//!
//! A proxy sends the same fields again and again on one connection, and beside them some that never repeat. So a field
//! enters the table when it is seen for the second time, and what is seen once costs no work but its bytes. Nothing is
//! Huffman coded.

use super::tables::{FIRST_DYNAMIC, STATIC, static_name};
use super::{ENTRY_OVERHEAD, TABLE_SIZE};
use bytes::{BufMut, BytesMut};
use std::collections::VecDeque;

/// Sets of `Way`s in which the hashes of fields are remembered.
const SETS: usize = 32;

/// What is larger would push out much of what repeats.
const MAX_ENTRY: usize = TABLE_SIZE / 4;

/// One direction's compression: what we send.
#[derive(Debug)]
pub(in crate::h2) struct Encoder {
    /// The oldest first.
    entries: VecDeque<Entry>,
    /// How many entries have left the table: the first that is in it has this number.
    left: u32,
    size: usize,
    capacity: usize,
    /// The peer has changed what it admits, to this smallest and then this last size (RFC 7541, section 4.2).
    resized: Option<(usize, usize)>,
    /// Made with the first field: many connections never send one.
    seen: Option<Box<[[Way; 2]; SETS]>>,
}

#[derive(Debug)]
struct Entry {
    hash: u32,
    name: usize,
    /// Name, then value.
    bytes: Box<[u8]>,
}

/// A field that was seen, by the hash of name and value.
#[derive(Clone, Copy, Debug, Default)]
struct Way {
    hash: u32,
    /// The number of its entry, which may have left the table.
    entry: u32,
}

impl Encoder {
    pub(in crate::h2) fn new() -> Self {
        Self { entries: VecDeque::new(), left: 0, size: 0, capacity: TABLE_SIZE, resized: None, seen: None }
    }

    /// The peer's table admits so much from now on; more than [`TABLE_SIZE`] is not used.
    pub(in crate::h2) fn resize(&mut self, admitted: usize) {
        let capacity = admitted.min(TABLE_SIZE);
        let smallest = self.resized.map_or(self.capacity, |(smallest, _)| smallest).min(capacity);
        if capacity != self.capacity || self.resized.is_some() {
            self.resized = Some((smallest, capacity));
        }
        self.capacity = capacity;
        self.make_room(0);
    }

    /// Begins a block. Every block begins with this.
    pub(in crate::h2) fn begin(&mut self, out: &mut BytesMut) {
        if let Some((smallest, last)) = self.resized.take() {
            if smallest < last {
                integer(out, 0x20, 5, smallest);
            }
            integer(out, 0x20, 5, last);
        }
    }

    /// Appends a field that the static table has whole.
    pub(in crate::h2) fn indexed(&mut self, index: u8, out: &mut BytesMut) {
        integer(out, 0x80, 7, usize::from(index));
    }

    /// Appends a field. The name is in lower case. A sensitive one never enters a table, here or further on.
    pub(in crate::h2) fn field(&mut self, name: &[u8], value: &[u8], sensitive: bool, out: &mut BytesMut) {
        if sensitive {
            return literal(out, 0x10, 4, name, value);
        }
        let size = name.len() + value.len() + ENTRY_OVERHEAD;
        if size > MAX_ENTRY || size > self.capacity || is_kept_out(name) {
            return literal(out, 0, 4, name, value);
        }
        let hash = hash(name, value);
        let seen = self.seen.get_or_insert_default();
        let set = &mut seen[(hash >> 1) as usize % SETS];
        let (left, entries) = (self.left, &self.entries);
        let entry_of = |way: &Way| entries.get(way.entry.wrapping_sub(left) as usize).filter(|it| it.hash == way.hash);
        let Some(way) = set.iter_mut().find(|way| way.hash == hash) else {
            // What is in the table keeps its place, but not for ever: what repeats changes.
            let free = set.iter().position(|way| entry_of(way).is_none());
            let way = free.or_else(|| (hash >> 28 == 0).then_some((hash >> 27 & 1) as usize));
            if let Some(way) = way {
                set[way] = Way { hash, entry: left.wrapping_sub(1) };
            }
            return literal(out, 0, 4, name, value);
        };
        if let Some(entry) = entry_of(way) {
            let (its_name, its_value) = entry.bytes.split_at(entry.name);
            if its_name == name && its_value == value {
                let place = way.entry.wrapping_sub(left) as usize;
                return integer(out, 0x80, 7, FIRST_DYNAMIC + self.entries.len() - 1 - place);
            }
        }
        way.entry = left.wrapping_add(entries.len() as u32);
        literal(out, 0x40, 6, name, value);
        let mut bytes = Vec::with_capacity(name.len() + value.len());
        bytes.extend_from_slice(name);
        bytes.extend_from_slice(value);
        self.make_room(size);
        self.size += size;
        self.entries.push_back(Entry { hash, name: name.len(), bytes: bytes.into() });
    }

    fn make_room(&mut self, wanted: usize) {
        while self.size + wanted > self.capacity {
            let Some(oldest) = self.entries.pop_front() else { return };
            self.size -= oldest.bytes.len() + ENTRY_OVERHEAD;
            self.left = self.left.wrapping_add(1);
        }
    }
}

/// Secrets, whose bytes others who share the connection could otherwise guess one by one (section 7.1), and lengths,
/// which hardly repeat.
fn is_kept_out(name: &[u8]) -> bool {
    matches!(name, b"authorization" | b"proxy-authorization" | b"cookie" | b"set-cookie" | b"content-length")
}

/// Appends a literal after a first byte with these bits and a prefix of so many.
fn literal(out: &mut BytesMut, bits: u8, prefix: u32, name: &[u8], value: &[u8]) {
    match static_name(name) {
        Some(index) => integer(out, bits, prefix, usize::from(index)),
        None => {
            out.put_u8(bits);
            string(out, name);
        }
    }
    string(out, value);
}

fn string(out: &mut BytesMut, text: &[u8]) {
    integer(out, 0, 7, text.len());
    out.extend_from_slice(text);
}

/// An integer with a prefix of so many bits (section 5.1).
fn integer(out: &mut BytesMut, bits: u8, prefix: u32, value: usize) {
    let mask = (1usize << prefix) - 1;
    if value < mask {
        return out.put_u8(bits | value as u8);
    }
    out.put_u8(bits | mask as u8);
    let mut rest = value - mask;
    while rest >= 128 {
        out.put_u8((rest & 0x7f) as u8 | 0x80);
        rest >>= 7;
    }
    out.put_u8(rest as u8);
}

/// The place of a status in the static table.
pub(in crate::h2) fn static_status(status: u16) -> Option<u8> {
    let place = STATIC[7..14].iter().position(|(_, code)| code.parse() == Ok(status))?;
    Some(place as u8 + 8)
}

/// Eight bytes at a time, multiplied and folded. A collision costs a comparison, and so does one that is sought.
fn hash(name: &[u8], value: &[u8]) -> u32 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut state = name.len() as u64;
    for text in [name, value] {
        let (whole, rest) = text.as_chunks::<8>();
        for chunk in whole {
            state = (state.rotate_left(23) ^ u64::from_le_bytes(*chunk)).wrapping_mul(ODD);
        }
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        state = (state.rotate_left(23) ^ u64::from_le_bytes(last)).wrapping_mul(ODD);
    }
    // Never that of an empty way.
    (state >> 32) as u32 | 1
}

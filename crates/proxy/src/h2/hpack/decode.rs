//! Decompressing field blocks.

use super::tables::{FIRST_DYNAMIC, Kind, Received, STATIC, is_value};
use super::{ENTRY_OVERHEAD, TABLE_SIZE, huffman};
use std::collections::VecDeque;

/// The block cannot be decoded, and with it nothing that follows on the connection (RFC 7541, section 2.2 and on).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(in crate::h2) struct CompressionError(pub(in crate::h2) &'static str);

/// What a connection keeps of the memory in which it decodes strings.
const SCRATCH: usize = 512;

/// One direction's decompression: what the peer compresses.
#[derive(Debug)]
pub(in crate::h2) struct Decoder {
    table: Table,
    /// Where strings are decoded to.
    name: Vec<u8>,
    value: Vec<u8>,
}

#[derive(Debug)]
struct Table {
    /// The newest first.
    entries: VecDeque<Entry>,
    size: usize,
    /// What the peer has chosen to use of [`TABLE_SIZE`].
    capacity: usize,
}

/// An entry of the dynamic table, with what is known of it.
#[derive(Debug)]
struct Entry {
    /// Name, then value.
    bytes: Box<[u8]>,
    name: usize,
    kind: Kind,
    is_value: bool,
}

impl Entry {
    fn size(&self) -> usize {
        self.bytes.len() + ENTRY_OVERHEAD
    }

    fn received(&self) -> Received<'_> {
        let (name, value) = self.bytes.split_at(self.name);
        Received { name, value, kind: self.kind, is_value: self.is_value, sensitive: false }
    }
}

impl Decoder {
    pub(in crate::h2) fn new() -> Self {
        let table = Table { entries: VecDeque::new(), size: 0, capacity: TABLE_SIZE };
        Self { table, name: Vec::new(), value: Vec::new() }
    }

    /// Shows every field of a whole block, in order.
    ///
    /// # Errors
    /// The block is not one: the connection cannot go on.
    pub(in crate::h2) fn decode(
        &mut self,
        mut block: &[u8],
        mut field: impl FnMut(Received<'_>),
    ) -> Result<(), CompressionError> {
        let mut begun = false;
        while let Some(first) = block.first().copied() {
            if first & 0x80 != 0 {
                let index = integer(&mut block, 7)?;
                field(self.table.at(index)?);
            } else if first & 0x40 != 0 {
                let index = integer(&mut block, 6)?;
                self.insert(index, &mut block, &mut field)?;
            } else if first & 0x20 != 0 {
                let capacity = integer(&mut block, 5)?;
                // Only before the first field (section 4.2).
                if begun || capacity > TABLE_SIZE {
                    return Err(CompressionError("table size out of place or too large"));
                }
                self.table.capacity = capacity;
                self.table.make_room(0);
                continue;
            } else {
                let index = integer(&mut block, 4)?;
                self.pass(index, first & 0x10 != 0, &mut block, &mut field)?;
            }
            begun = true;
        }
        Ok(())
    }

    /// A literal that enters the table.
    fn insert(
        &mut self,
        index: usize,
        block: &mut &[u8],
        field: &mut impl FnMut(Received<'_>),
    ) -> Result<(), CompressionError> {
        self.name.clear();
        let kind = match index {
            0 => {
                string(block, &mut self.name)?;
                Kind::of(&self.name)
            }
            index => {
                // Copied: the entry that it comes from may be the one that makes room.
                let (name, kind) = self.table.name_at(index)?;
                self.name.extend_from_slice(name);
                kind
            }
        };
        let name = self.name.len();
        string(block, &mut self.name)?;
        let is_value = is_value(&self.name[name..]);
        let entry = Entry { bytes: self.name.as_slice().into(), name, kind, is_value };
        field(entry.received());
        self.table.insert(entry);
        self.name.clear();
        self.name.shrink_to(SCRATCH);
        Ok(())
    }

    /// A literal that does not enter the table.
    fn pass(
        &mut self,
        index: usize,
        sensitive: bool,
        block: &mut &[u8],
        field: &mut impl FnMut(Received<'_>),
    ) -> Result<(), CompressionError> {
        self.name.clear();
        self.value.clear();
        let (name, kind) = match index {
            0 => {
                let name = text(block, &mut self.name)?;
                (name, Kind::of(name))
            }
            index => self.table.name_at(index)?,
        };
        let value = text(block, &mut self.value)?;
        field(Received { name, value, kind, is_value: is_value(value), sensitive });
        self.value.clear();
        self.value.shrink_to(SCRATCH);
        Ok(())
    }
}

impl Table {
    fn at(&self, index: usize) -> Result<Received<'_>, CompressionError> {
        match static_at(index) {
            Some((name, value)) => {
                let (name, value) = (name.as_bytes(), value.as_bytes());
                Ok(Received { name, value, kind: Kind::of_static(index), is_value: true, sensitive: false })
            }
            None => self.dynamic(index).map(Entry::received),
        }
    }

    fn name_at(&self, index: usize) -> Result<(&[u8], Kind), CompressionError> {
        match static_at(index) {
            Some((name, _)) => Ok((name.as_bytes(), Kind::of_static(index))),
            None => self.dynamic(index).map(|entry| (&entry.bytes[..entry.name], entry.kind)),
        }
    }

    fn dynamic(&self, index: usize) -> Result<&Entry, CompressionError> {
        let place = index.checked_sub(FIRST_DYNAMIC).ok_or(CompressionError("index zero"))?;
        self.entries.get(place).ok_or(CompressionError("index beyond the table"))
    }

    fn insert(&mut self, entry: Entry) {
        self.make_room(entry.size());
        // What is larger than the whole table leaves it empty (section 4.4).
        if entry.size() <= self.capacity {
            self.size += entry.size();
            self.entries.push_front(entry);
        }
    }

    /// Removes the oldest entries until one of this size has room.
    fn make_room(&mut self, wanted: usize) {
        while self.size + wanted > self.capacity {
            let Some(oldest) = self.entries.pop_back() else { return };
            self.size -= oldest.size();
        }
    }
}

fn static_at(index: usize) -> Option<&'static (&'static str, &'static str)> {
    index.checked_sub(1).and_then(|place| STATIC.get(place))
}

/// An integer with a prefix of so many bits (section 5.1).
fn integer(block: &mut &[u8], prefix: u32) -> Result<usize, CompressionError> {
    let (first, mut rest) = block.split_first().ok_or(CompressionError("a field is cut short"))?;
    let mask = (1usize << prefix) - 1;
    let mut value = usize::from(*first) & mask;
    if value == mask {
        let mut shift = 0;
        loop {
            let (byte, after) = rest.split_first().ok_or(CompressionError("a number is cut short"))?;
            rest = after;
            // Four bytes say more than any index, length or size that is allowed.
            if shift > 21 {
                return Err(CompressionError("a number is too large"));
            }
            value += (usize::from(*byte) & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
        }
    }
    *block = rest;
    Ok(value)
}

/// Takes a string off the block (section 5.2): its bytes, and whether they are Huffman coded.
fn coded<'a>(block: &mut &'a [u8]) -> Result<(&'a [u8], bool), CompressionError> {
    let is_huffman = block.first().is_some_and(|first| first & 0x80 != 0);
    let length = integer(block, 7)?;
    let (text, rest) = block.split_at_checked(length).ok_or(CompressionError("a string is cut short"))?;
    *block = rest;
    Ok((text, is_huffman))
}

/// Appends a string.
fn string(block: &mut &[u8], out: &mut Vec<u8>) -> Result<(), CompressionError> {
    match coded(block)? {
        (text, false) => out.extend_from_slice(text),
        (text, true) if huffman::decode(text, out) => {}
        (_, true) => return Err(CompressionError("bad Huffman code")),
    }
    Ok(())
}

/// A string where it lies, or decoded into the buffer.
fn text<'a, 'b: 'a>(block: &mut &'b [u8], buffer: &'a mut Vec<u8>) -> Result<&'a [u8], CompressionError> {
    match coded(block)? {
        (text, false) => Ok(text),
        (text, true) if huffman::decode(text, buffer) => Ok(buffer),
        (_, true) => Err(CompressionError("bad Huffman code")),
    }
}

#[cfg(any(test, feature = "fuzzing"))]
impl Decoder {
    /// What the table takes up.
    pub(in crate::h2) fn size(&self) -> usize {
        let counted: usize = self.table.entries.iter().map(Entry::size).sum();
        assert_eq!(counted, self.table.size);
        counted
    }
}

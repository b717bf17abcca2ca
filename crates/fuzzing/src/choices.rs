//! Structured input made of bytes.

use std::borrow::Cow;

/// Reads decisions off the front of an input. An input that has ended decides for zero, so every input means something
/// and a shorter one means something smaller.
#[derive(Clone, Debug)]
pub struct Choices<'a>(&'a [u8]);

impl<'a> Choices<'a> {
    /// The decisions that these bytes are.
    pub fn of(input: &'a [u8]) -> Self {
        Self(input)
    }

    /// True when every further decision is zero.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One byte.
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// Two bytes.
    pub fn short(&mut self) -> u16 {
        u16::from_be_bytes([self.byte(), self.byte()])
    }

    /// A number below `end`, which is at most 65,536; 0 when `end` is.
    pub fn below(&mut self, end: usize) -> usize {
        match end {
            0 | 1 => 0,
            2..=256 => usize::from(self.byte()) % end,
            _ => usize::from(self.short()) % end,
        }
    }

    /// Yes or no.
    pub fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    /// One of these, of which there is at least one.
    pub fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }

    /// At most 255 bytes, as many as the next byte says.
    pub fn bytes(&mut self) -> &'a [u8] {
        let length = usize::from(self.byte()).min(self.0.len());
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        taken
    }

    /// At most 255 bytes as text.
    pub fn text(&mut self) -> Cow<'a, str> {
        String::from_utf8_lossy(self.bytes())
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    /// The parts between a few cuts through these bytes; none is empty.
    pub fn parts<'b>(&mut self, whole: &'b [u8]) -> Vec<&'b [u8]> {
        let mut cuts: Vec<usize> = (0..self.below(6)).map(|_| self.below((whole.len() + 1).min(65_536))).collect();
        cuts.sort_unstable();
        let mut start = 0;
        let mut parts = Vec::new();
        for cut in cuts.into_iter().chain([whole.len()]) {
            if cut > start {
                parts.push(&whole[start..cut]);
                start = cut;
            }
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_input_that_has_ended_decides_for_zero() {
        let mut choices = Choices::of(b"\x03ab");
        assert_eq!(choices.bytes(), b"ab");
        assert!(choices.is_empty() && !choices.flag());
        assert_eq!((choices.byte(), choices.short(), choices.below(7), choices.text().len()), (0, 0, 0, 0));
        assert_eq!(choices.parts(b"abc"), [b"abc"]);
    }

    #[test]
    fn parts_are_the_whole() {
        for input in [&b"\x03\x01\x02\x02"[..], b"\x05\0\0\x03\xff\x01"] {
            let parts = Choices::of(input).parts(b"abc");
            assert!(parts.iter().all(|part| !part.is_empty()));
            assert_eq!(parts.concat(), b"abc");
        }
    }
}

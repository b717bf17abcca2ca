//! Header compression (RFC 7541).

mod decode;
mod encode;
#[cfg(any(test, feature = "fuzzing"))]
pub(super) mod fuzzing;
mod huffman;
mod tables;

pub(super) use decode::Decoder;
pub(super) use encode::{Encoder, static_status};
pub(super) use tables::{Kind, Pseudo, Received};

/// What an entry costs in a table beside its bytes (RFC 7541, section 4.1).
const ENTRY_OVERHEAD: usize = 32;

/// The size of both directions' tables until a peer says otherwise, and the most that ours ever have (RFC 9113, section
/// 6.5.2).
pub(super) const TABLE_SIZE: usize = 4096;

#[cfg(test)]
mod tests;

//! Read and write buffers of one worker. An idle connection holds none: what is empty goes back here.

use bytes::BytesMut;
use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio_util::io::poll_read_buf;

use crate::io::Io;

/// What a head is read into: nearly every request head fits, and each waiting request holds one.
pub(crate) const SMALL: usize = 4 * 1024;

/// What bodies and responses are read into: a TLS record.
pub(crate) const LARGE: usize = 16 * 1024;

/// Buffers kept per worker and size. 64 x (4 + 16) KiB = 1.25 MiB at most.
const SPARE: usize = 64;

#[derive(Default)]
struct Spares {
    small: Vec<BytesMut>,
    large: Vec<BytesMut>,
}

thread_local! {
    static SPARES: RefCell<Spares> = RefCell::default();
}

/// An empty buffer of [`SMALL`] or [`LARGE`] bytes.
pub(crate) fn take(size: usize) -> BytesMut {
    let spare = SPARES.with_borrow_mut(|spares| if size <= SMALL { spares.small.pop() } else { spares.large.pop() });
    spare.unwrap_or_else(|| BytesMut::with_capacity(size))
}

/// Returns an empty buffer, unless somebody still reads from its memory: then it stays where it is.
pub(crate) fn give_back(buffer: &mut BytesMut) {
    if !buffer.is_empty() || buffer.capacity() == 0 {
        return;
    }
    let large = buffer.try_reclaim(LARGE);
    if !large && !buffer.try_reclaim(SMALL) {
        return;
    }
    let buffer = std::mem::take(buffer);
    // What has grown beyond its class is not worth keeping.
    if buffer.capacity() > 2 * LARGE {
        return;
    }
    SPARES.with_borrow_mut(|spares| {
        let class = if large { &mut spares.large } else { &mut spares.small };
        if class.len() < SPARE {
            class.push(buffer);
        }
    });
}

/// Reads some more into the buffer, 0 at the end of the stream. While there is nothing to read, an empty buffer is
/// given back.
pub(crate) fn poll_fill(
    io: &mut Io,
    buffer: &mut BytesMut,
    size: usize,
    cx: &mut Context<'_>,
) -> Poll<io::Result<usize>> {
    if buffer.capacity() == 0 {
        *buffer = take(size);
    } else if buffer.capacity() - buffer.len() < size / 4 {
        buffer.reserve(size);
    }
    let read = poll_read_buf(Pin::new(io), cx, buffer);
    if read.is_pending() {
        give_back(buffer);
    }
    read
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_goes_back_only_when_nobody_reads_from_it() {
        let mut buffer = take(SMALL);
        buffer.extend_from_slice(b"abc");
        let head = buffer.split().freeze();
        give_back(&mut buffer);
        assert!(buffer.capacity() > 0, "kept: {head:?} is still in use");
        drop(head);
        give_back(&mut buffer);
        assert_eq!(buffer.capacity(), 0);
        assert!(take(SMALL).capacity() >= SMALL);
    }
}

//! What waits to be written on a connection.

use super::SEND_BUFFER;
use crate::h1::buffer;
use crate::io::Io;
use bytes::{Buf, Bytes, BytesMut};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::AsyncWrite;

/// Larger parts of bodies are written from where they are; smaller ones are copied, so that many frames go out as one.
const COPIED: usize = 4096;

/// The most parts of one write.
const SLICES: usize = 16;

/// What waits to be written, in order.
#[derive(Debug, Default)]
pub(super) struct Output {
    parts: VecDeque<Bytes>,
    parts_len: usize,
    tail: BytesMut,
    /// Written, and perhaps still in the TLS session.
    unflushed: bool,
}

impl Output {
    /// Where frames are appended.
    pub(super) fn tail(&mut self) -> &mut BytesMut {
        if self.tail.capacity() == 0 {
            self.tail = buffer::take(buffer::SMALL);
        }
        &mut self.tail
    }

    /// Appends a part of a body.
    pub(super) fn push(&mut self, part: Bytes) {
        if part.len() <= COPIED {
            return self.tail.extend_from_slice(&part);
        }
        let before = self.tail.split().freeze();
        self.parts_len += before.len() + part.len();
        self.parts.extend([before, part]);
    }

    /// How many bytes wait.
    pub(super) fn len(&self) -> usize {
        self.parts_len + self.tail.len()
    }

    /// True when those who send bodies may go on.
    pub(super) fn has_room(&self) -> bool {
        self.len() < SEND_BUFFER
    }

    /// Writes until nothing waits. The memory is given back then.
    pub(super) fn poll_write(&mut self, io: &mut Io, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.len() > 0 {
            let written = if self.parts.is_empty() {
                ready!(Pin::new(&mut *io).poll_write(cx, &self.tail))?
            } else {
                let mut slices = [IoSlice::new(&[]); SLICES];
                let all = self.parts.iter().map(Bytes::as_ref).chain([self.tail.as_ref()]);
                let count = slices.iter_mut().zip(all).map(|(slice, part)| *slice = IoSlice::new(part)).count();
                ready!(Pin::new(&mut *io).poll_write_vectored(cx, &slices[..count]))?
            };
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unflushed = true;
            self.advance(written);
        }
        if self.unflushed {
            ready!(Pin::new(io).poll_flush(cx))?;
            self.unflushed = false;
            buffer::give_back(&mut self.tail);
        }
        Poll::Ready(Ok(()))
    }

    fn advance(&mut self, mut written: usize) {
        while let Some(part) = self.parts.front_mut() {
            let of_this = written.min(part.len());
            part.advance(of_this);
            written -= of_this;
            self.parts_len -= of_this;
            if !part.is_empty() {
                return;
            }
            self.parts.pop_front();
        }
        self.tail.advance(written);
    }
}

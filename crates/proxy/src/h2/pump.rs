//! Sends a body over a stream as the peer's windows allow.

use super::Code;
use super::stream::{Broken, Handle};
use crate::body::{Body, BodyError, Frame};
use bytes::Bytes;
use sheer_core::cause::Cause;
use std::task::{Context, Poll, ready};

/// A body on its way out. The next part is taken only when the one before is on its way, so that a slow reader slows the
/// source down; it ends as soon as the peer resets the stream.
#[derive(Debug)]
pub(super) struct Pump {
    stream: Handle,
    body: Body,
    /// What was taken and has not been sent.
    data: Bytes,
    /// What the peer is told when the source breaks off.
    broken: Code,
}

impl Pump {
    pub(super) fn new(stream: Handle, body: Body, broken: Code) -> Self {
        Self { stream, body, data: Bytes::new(), broken }
    }

    /// Sends on. Ready when the body has been sent to its end, or cannot be.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if !self.data.is_empty() {
                let Ok(room) = ready!(self.stream.poll_room(cx)) else {
                    if self.stream.is_too_slow() {
                        self.body.failed(Cause::BodyTimeout);
                    }
                    return Poll::Ready(());
                };
                let part =
                    if room < self.data.len() { self.data.split_to(room) } else { std::mem::take(&mut self.data) };
                let ends = self.data.is_empty() && self.body.is_empty();
                self.stream.send_data(part, ends);
                if ends {
                    return Poll::Ready(());
                }
                continue;
            }
            match self.next(cx) {
                Poll::Ready(Ok(Some(Frame::Data(data)))) => self.data = data,
                Poll::Ready(Ok(Some(Frame::Trailers(fields)))) => {
                    self.stream.send_trailers(&fields);
                    return Poll::Ready(());
                }
                Poll::Ready(Ok(None)) => {
                    self.stream.send_data(Bytes::new(), true);
                    return Poll::Ready(());
                }
                Poll::Ready(Err(Broken)) => return Poll::Ready(()),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// The next part of the body, unless the peer resets the stream before it comes.
    fn next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Frame>, Broken>> {
        match self.body.poll_frame(cx) {
            Poll::Ready(None) => Poll::Ready(Ok(None)),
            Poll::Ready(Some(Ok(frame))) => Poll::Ready(Ok(Some(frame))),
            Poll::Ready(Some(Err(error))) => {
                self.stream.break_off(reset_code(&error, self.broken), error.is_too_slow());
                Poll::Ready(Err(Broken))
            }
            Poll::Pending => self.stream.poll_closed(cx).map(|()| Err(Broken)),
        }
    }
}

/// What the receiver is told when the source of a body fails: a reset goes on as the reset it was.
fn reset_code(error: &BodyError, broken: Code) -> Code {
    match error {
        BodyError::Reset(code) => Code(*code),
        BodyError::Truncated | BodyError::Io(_) => broken,
        BodyError::Malformed(_) => Code::PROTOCOL_ERROR,
    }
}

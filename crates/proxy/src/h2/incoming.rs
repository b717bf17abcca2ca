//! A body that arrives over HTTP/2.

use super::stream::{By, Handle, Reset};
use crate::body::{BodyError, Frame, Length};
use std::task::{Context, Poll};
use tokio::task::AbortHandle;

/// A body that arrives over HTTP/2. Its window opens again as its parts are done with: when the next one is asked for,
/// the one before is on its way. Dropping it before its end resets
/// the stream when it answers a request of ours.
#[derive(Debug)]
pub struct Incoming {
    stream: Handle,
    /// The stream on which an answer is passed on.
    reader: Option<Handle>,
    ended: bool,
    /// The task that still sends the request which this answers; it ends with the answer.
    _sender: Option<AbortOnDrop>,
}

/// Ends a task when dropped.
#[derive(Debug)]
pub(super) struct AbortOnDrop(pub(super) AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Incoming {
    /// The body of a request.
    pub(super) fn of_request(stream: Handle) -> Self {
        Self { stream, reader: None, ended: false, _sender: None }
    }

    /// The body of an answer that is passed on to this stream.
    pub(super) fn of_answer(stream: Handle, reader: Option<Handle>, sender: Option<AbortOnDrop>) -> Self {
        Self { stream, reader, ended: false, _sender: sender }
    }

    /// How many bytes remain, where the sender said so.
    pub fn length(&self) -> Length {
        self.stream.with(|state, key| {
            let receiving = &state.stream(key).receiving;
            match receiving.remaining {
                Some(left) => Length::Known(left + receiving.kept() as u64),
                None => Length::Unknown,
            }
        })
    }

    /// True when neither bytes nor trailers will come.
    pub fn is_empty(&self) -> bool {
        self.ended
            || self.stream.with(|state, key| {
                let stream = state.stream(key);
                let receiving = &stream.receiving;
                !receiving.open && stream.reset.is_none() && receiving.is_drained() && receiving.trailers.is_none()
            })
    }

    /// The next part; `None` at the end. Cancel safe.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let next = self.stream.with(|state, key| {
            state.taken(key, self.reader.as_ref());
            let stream = state.stream(key);
            if let Some(part) = stream.receiving.lend_part() {
                return Poll::Ready(Some(Ok(Frame::Data(part))));
            }
            if let Some(reset) = stream.reset {
                return Poll::Ready(Some(Err(error_of(reset))));
            }
            if stream.receiving.slow {
                return Poll::Ready(Some(Err(BodyError::too_slow())));
            }
            if stream.receiving.open {
                stream.receiving.wait(cx);
                return Poll::Pending;
            }
            Poll::Ready(stream.receiving.trailers.take().map(|fields| Ok(Frame::Trailers(fields))))
        });
        self.ended = !matches!(next, Poll::Pending | Poll::Ready(Some(Ok(Frame::Data(_)))));
        next
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.ended {
            self.stream.with(|state, key| state.stop_reading(key));
        }
    }
}

fn error_of(reset: Reset) -> BodyError {
    match reset.by {
        By::Slow => BodyError::too_slow(),
        By::Peer | By::Us | By::Source => BodyError::Reset(reset.code.0),
        By::Unprocessed | By::Connection => BodyError::Truncated,
    }
}

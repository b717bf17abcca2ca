//! A body that arrives over HTTP/2.

use super::convert;
use crate::body::{BodyError, Frame, Length};
use bytes::Bytes;
use h2::RecvStream;
use std::task::{Context, Poll, ready};
use tokio::task::AbortHandle;

/// What a stream may keep of its windows: a thousand streams (`MAX_STREAMS`) keep half a connection's at most.
const UNRELEASED: usize = 1024;

/// A body that arrives over HTTP/2. Its window opens again as its parts are taken. Dropping it before its end resets
/// the stream.
#[derive(Debug)]
pub struct Incoming {
    stream: RecvStream,
    remaining: Option<u64>,
    /// Taken, and given back to the window when a next part is asked for and it is worth telling. What is left is given
    /// back with the stream.
    unreleased: usize,
    ended: bool,
    /// The task that still sends the request which this answers; it ends with the answer.
    sender: Option<AbortOnDrop>,
    /// Counts the stream in its connection for as long as it lives.
    _stream_permit: Option<super::client::StreamPermit>,
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
    pub(super) fn new(stream: RecvStream, remaining: Option<u64>) -> Self {
        Self { stream, remaining, unreleased: 0, ended: false, sender: None, _stream_permit: None }
    }

    pub(super) fn answering(mut self, sender: Option<AbortOnDrop>, permit: super::client::StreamPermit) -> Self {
        self.sender = sender;
        self._stream_permit = Some(permit);
        self
    }

    /// How many bytes remain, where the sender said so.
    pub fn length(&self) -> Length {
        self.remaining.map_or(Length::Unknown, Length::Known)
    }

    /// True when the last part has been taken.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// True when neither bytes nor trailers will come.
    pub fn is_empty(&self) -> bool {
        self.ended || self.stream.is_end_stream()
    }

    /// The next part; `None` at the end. Cancel safe.
    pub fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame, BodyError>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        self.release();
        loop {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(bytes)) if bytes.is_empty() => {}
                Some(Ok(bytes)) => return Poll::Ready(Some(Ok(Frame::Data(self.take(bytes))))),
                Some(Err(error)) => return Poll::Ready(self.fail(&error)),
                None => break,
            }
        }
        match ready!(self.stream.poll_trailers(cx)) {
            Ok(Some(trailers)) => {
                self.finish();
                Poll::Ready(match convert::trailers_of(trailers) {
                    Ok(fields) if fields.is_empty() => None,
                    Ok(fields) => Some(Ok(Frame::Trailers(fields))),
                    Err(_) => Some(Err(BodyError::Malformed("too many trailer fields"))),
                })
            }
            Ok(None) => {
                self.finish();
                Poll::Ready(None)
            }
            Err(error) => Poll::Ready(self.fail(&error)),
        }
    }

    fn take(&mut self, bytes: Bytes) -> Bytes {
        self.unreleased += bytes.len();
        if let Some(remaining) = &mut self.remaining {
            *remaining = remaining.saturating_sub(bytes.len() as u64);
        }
        bytes
    }

    fn release(&mut self) {
        if self.unreleased > UNRELEASED {
            // Fails only when the stream is gone, and its window with it.
            let _ = self.stream.flow_control().release_capacity(std::mem::take(&mut self.unreleased));
        }
    }

    fn finish(&mut self) {
        self.release();
        self.ended = true;
    }

    fn fail(&mut self, error: &h2::Error) -> Option<Result<Frame, BodyError>> {
        self.ended = true;
        Some(Err(error_of(error)))
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.release();
    }
}

pub(super) fn error_of(error: &h2::Error) -> BodyError {
    match (error.reason(), error.get_io()) {
        (_, Some(io)) => BodyError::Io(std::io::Error::new(io.kind(), io.to_string())),
        (Some(reason), None) => BodyError::Reset(reason.into()),
        (None, None) => BodyError::Truncated,
    }
}

//! Sends a body over a stream as the peer's window allows.

use super::convert;
use crate::body::{Body, BodyError, Frame};
use bytes::Bytes;
use h2::{Reason, SendStream};
use std::future::poll_fn;
use std::task::Poll;

/// A body was not sent to its end: the peer reset the stream or is gone, or the source failed and the peer was told so.
#[derive(Debug)]
pub(super) struct Broken;

/// A first part of at most this is handed over without asking for room: it is here anyway, and as a rule it is all.
const AT_ONCE: usize = 16 * 1024;

/// Sends the body to its end. Takes the next part only when the one before is on its way, so that a slow reader slows
/// the source down; ends as soon as the peer resets the stream.
/// When the source breaks off, the peer is told `broken`.
pub(super) async fn send(stream: &mut SendStream<Bytes>, mut body: Body, broken: Reason) -> Result<(), Broken> {
    let mut at_once = AT_ONCE;
    loop {
        match next(stream, &mut body, broken).await? {
            None => return stream.send_data(Bytes::new(), true).map_err(|_| Broken),
            Some(Frame::Trailers(mut fields)) => {
                let headers = convert::to_headers(&mut fields).map_err(|_| {
                    stream.send_reset(Reason::INTERNAL_ERROR);
                    Broken
                })?;
                return stream.send_trailers(headers).map_err(|_| Broken);
            }
            Some(Frame::Data(mut data)) => {
                let last = body.is_empty();
                if data.len() <= std::mem::take(&mut at_once) {
                    stream.send_data(std::mem::take(&mut data), last).map_err(|_| Broken)?;
                }
                while !data.is_empty() {
                    let room = capacity(stream, data.len()).await?;
                    let part = data.split_to(room.min(data.len()));
                    let end = last && data.is_empty();
                    stream.send_data(part, end).map_err(|_| Broken)?;
                }
                if last {
                    return Ok(());
                }
            }
        }
    }
}

/// The next part of the body, unless the peer resets the stream before it comes.
async fn next(stream: &mut SendStream<Bytes>, body: &mut Body, broken: Reason) -> Result<Option<Frame>, Broken> {
    let frame = poll_fn(|cx| {
        if let Poll::Ready(frame) = body.poll_frame(cx) {
            return Poll::Ready(Ok(frame));
        }
        stream.poll_reset(cx).map(|_| Err(Broken))
    });
    match frame.await? {
        None => Ok(None),
        Some(Ok(frame)) => Ok(Some(frame)),
        Some(Err(error)) => {
            stream.send_reset(reset_code(&error, broken));
            Err(Broken)
        }
    }
}

/// Waits until the window has room for some of `wanted` bytes.
async fn capacity(stream: &mut SendStream<Bytes>, wanted: usize) -> Result<usize, Broken> {
    stream.reserve_capacity(wanted);
    if stream.capacity() > 0 {
        return Ok(stream.capacity());
    }
    loop {
        match poll_fn(|cx| stream.poll_capacity(cx)).await {
            Some(Ok(0)) => {}
            Some(Ok(room)) => return Ok(room),
            Some(Err(_)) | None => return Err(Broken),
        }
    }
}

/// What the receiver is told when the source of a body fails: a reset goes on as the reset it was.
fn reset_code(error: &BodyError, broken: Reason) -> Reason {
    match error {
        BodyError::Reset(code) => Reason::from(*code),
        BodyError::Truncated | BodyError::Io(_) => broken,
        BodyError::Malformed(_) => Reason::PROTOCOL_ERROR,
    }
}

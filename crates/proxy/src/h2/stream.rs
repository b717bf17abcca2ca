//! One stream, as its connection knows it and as the tasks that work for it hold it.

use super::SEND_BUFFER;
use super::connection::State;
use super::frame::{Code, MAX_PAYLOAD};
use crate::h1::buffer;
use bytes::{Buf, Bytes, BytesMut};
use sheer_core::head::{Fields, ResponseHead};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// A part of at most this many bytes is kept in memory of its own: whoever holds it holds no more than that. A larger
/// one shares the memory that it was read into, which is at most twice as large.
const SMALL: usize = buffer::LARGE / 2;

/// A stream in its connection's state.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) id: u32,
    /// How many tasks and bodies of ours still work for it.
    pub(super) handles: u16,
    /// What its head takes up.
    pub(super) head_size: usize,
    pub(super) receiving: Receiving,
    pub(super) sending: Sending,
    /// Why it ended before its time.
    pub(super) reset: Option<Reset>,
    /// Bytes of bodies that have moved in both directions, and how many had when the pace was last looked at.
    pub(super) moved: u64,
    pub(super) looked_at: u64,
    /// For how many intervals the peer has been waited for since.
    pub(super) waited: u8,
    /// What the endpoint of its answer may send ahead beyond what it may in any case.
    pub(super) promised: u32,
}

/// Why a stream ended before its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reset {
    pub(super) code: Code,
    pub(super) by: By,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    /// We ended it.
    Us,
    /// We did, because the body that was sent on it broke off at its source.
    Source,
    /// We did, because that source, or the peer itself, was slower than it may be.
    Slow,
    /// The peer did.
    Peer,
    /// The peer ended the connection and has not looked at this stream (RFC 9113, section 6.8).
    Unprocessed,
    /// The connection broke.
    Connection,
}

/// What comes from the peer.
#[derive(Debug)]
pub(super) struct Receiving {
    /// More may come.
    pub(super) open: bool,
    /// Nobody reads it any more: what comes is dropped.
    pub(super) discarded: bool,
    /// It was slower than it may be: the rest is not waited for.
    pub(super) slow: bool,
    /// Interim heads that nobody has taken yet, and how many there were in all.
    pub(super) interim: Vec<ResponseHead>,
    pub(super) interims: usize,
    /// The response's head, until it is taken.
    pub(super) head: Option<ResponseHead>,
    /// On the client's side: the head has come, and what follows is the body.
    pub(super) has_head: bool,
    /// The answer to this request has no body, whatever its length field says.
    pub(super) bodiless: bool,
    parts: VecDeque<BytesMut>,
    /// Length of the part that the reader has and is not done with.
    pub(super) lent: usize,
    pub(super) trailers: Option<Fields>,
    /// What `content-length` has promised and has not come.
    pub(super) remaining: Option<u64>,
    /// What the peer may still send.
    pub(super) window: i64,
    /// What it may send at once.
    pub(super) limit: u32,
    /// Taken, and not yet given back to the peer's window.
    pub(super) unreleased: u32,
    waker: Option<Waker>,
}

/// What goes to the peer.
#[derive(Debug)]
pub(super) struct Sending {
    /// The end has not been sent.
    pub(super) open: bool,
    /// What we may still send.
    pub(super) window: i64,
    /// The peer has opened this window further.
    pub(super) widened: bool,
    /// Something waits for room.
    pub(super) waits: bool,
    /// It is in the connection's queue of those that wait for it.
    pub(super) queued: bool,
    waker: Option<Waker>,
}

impl Stream {
    pub(super) fn new(id: u32, window: u32, limit: u32, send_window: u32) -> Self {
        Self {
            id,
            handles: 0,
            head_size: 0,
            receiving: Receiving {
                open: true,
                discarded: false,
                slow: false,
                interim: Vec::new(),
                interims: 0,
                head: None,
                has_head: false,
                bodiless: false,
                parts: VecDeque::new(),
                lent: 0,
                trailers: None,
                remaining: None,
                window: i64::from(window),
                limit,
                unreleased: 0,
                waker: None,
            },
            sending: Sending {
                open: true,
                window: i64::from(send_window),
                widened: false,
                waits: false,
                queued: false,
                waker: None,
            },
            reset: None,
            moved: 0,
            looked_at: 0,
            waited: 0,
            promised: 0,
        }
    }

    /// Wakes everybody who works for it.
    pub(super) fn wake(&mut self) {
        self.receiving.wake();
        self.sending.wake();
    }
}

impl Receiving {
    pub(super) fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Keeps the next bytes for the reader: the first ones of the buffer.
    pub(super) fn keep(&mut self, from: &mut BytesMut, length: usize) {
        if length > SMALL {
            self.parts.push_back(from.split_to(length));
            return;
        }
        match self.parts.back_mut() {
            // Many small ones become few, so that none costs more than its bytes.
            Some(last) if last.len() + length <= SMALL => last.extend_from_slice(&from[..length]),
            _ => {
                let mut own = BytesMut::with_capacity(length);
                own.extend_from_slice(&from[..length]);
                self.parts.push_back(own);
            }
        }
        from.advance(length);
    }

    /// Takes everything that is kept away; how much it was, with what the reader has.
    pub(super) fn drop_parts(&mut self) -> usize {
        let waiting = self.kept() + std::mem::take(&mut self.lent);
        self.parts = VecDeque::new();
        waiting
    }

    /// The next part. The reader is done with it when it asks for the one after it: until then it counts as kept.
    pub(super) fn lend_part(&mut self) -> Option<Bytes> {
        let part = self.parts.pop_front()?;
        self.lent = part.len();
        Some(part.freeze())
    }

    /// How many bytes are kept for the reader.
    pub(super) fn kept(&self) -> usize {
        self.parts.iter().map(BytesMut::len).sum()
    }

    pub(super) fn is_drained(&self) -> bool {
        self.parts.is_empty()
    }

    /// True when somebody waits for the rest.
    pub(super) fn is_awaited(&self) -> bool {
        self.open && self.waker.is_some() && self.remaining != Some(0)
    }

    /// The task to wake when something comes.
    pub(super) fn wait(&mut self, cx: &Context<'_>) {
        remember(&mut self.waker, cx);
    }
}

impl Sending {
    pub(super) fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// The task to wake when there is room or the stream has ended.
    pub(super) fn wait(&mut self, cx: &Context<'_>) {
        remember(&mut self.waker, cx);
    }
}

fn remember(place: &mut Option<Waker>, cx: &Context<'_>) {
    match place {
        Some(waker) => waker.clone_from(cx.waker()),
        None => *place = Some(cx.waker().clone()),
    }
}

/// The connection's state, shared by its driver and everybody who works for one of its streams.
pub(super) type Shared = Rc<RefCell<State>>;

/// A hold on a stream. A stream of which nobody has hold any more is over, and reset if it was not.
#[derive(Debug)]
pub(super) struct Handle {
    shared: Shared,
    key: usize,
}

/// The stream is over: it was reset, or its connection is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Broken;

impl Handle {
    pub(super) fn new(shared: &Shared, key: usize) -> Self {
        shared.borrow_mut().stream(key).handles += 1;
        Self { shared: shared.clone(), key }
    }

    /// Looks at the stream and its connection.
    pub(super) fn with<T>(&self, look: impl FnOnce(&mut State, usize) -> T) -> T {
        look(&mut self.shared.borrow_mut(), self.key)
    }

    /// Sends a response's head.
    ///
    /// # Errors
    /// The stream is over.
    pub(super) fn respond(&self, head: &ResponseHead, ends: bool) -> Result<(), Broken> {
        self.with(|state, key| state.respond(key, head, ends))
    }

    /// Waits for room for a part of a body.
    ///
    /// # Errors
    /// The stream is over.
    pub(super) fn poll_room(&self, cx: &Context<'_>) -> Poll<Result<usize, Broken>> {
        self.with(|state, key| {
            let shared = state.send_window.min((SEND_BUFFER.saturating_sub(state.out.len())) as i64);
            let stream = state.stream(key);
            if !stream.sending.open {
                return Poll::Ready(Err(Broken));
            }
            let room = stream.sending.window.min(shared).min(MAX_PAYLOAD as i64);
            if room > 0 {
                stream.sending.waits = false;
                return Poll::Ready(Ok(room as usize));
            }
            stream.sending.waits = true;
            stream.sending.wait(cx);
            if shared <= 0 && !std::mem::replace(&mut stream.sending.queued, true) {
                state.queue_for_room(key);
            }
            Poll::Pending
        })
    }

    /// How far its peer's windows are open.
    pub(super) fn window(&self) -> u32 {
        self.with(|state, key| state.send_window.min(state.stream(key).sending.window).max(0) as u32)
    }

    /// Whether its peer has opened its window further than it was at first.
    pub(super) fn is_widened(&self) -> bool {
        self.with(|state, key| state.stream(key).sending.widened)
    }

    /// Sends a part of a body, for which there is room.
    pub(super) fn send_data(&self, data: Bytes, ends: bool) {
        self.with(|state, key| state.send_data(key, data, ends));
    }

    /// Sends trailers, and with them the end.
    pub(super) fn send_trailers(&self, fields: &Fields) {
        self.with(|state, key| state.send_trailers(key, fields));
    }

    /// Ends the stream before its time, unless it has ended.
    pub(super) fn reset(&self, code: Code) {
        self.with(|state, key| state.reset(key, code));
    }

    /// Ends the stream because the body that is sent on it breaks off.
    pub(super) fn break_off(&self, code: Code, is_too_slow: bool) {
        let by = if is_too_slow { By::Slow } else { By::Source };
        self.with(|state, key| state.reset_by(key, code, by));
    }

    /// True when it was ended because the peer is slower than it may be.
    pub(super) fn is_too_slow(&self) -> bool {
        self.with(|state, key| state.stream(key).reset.is_some_and(|reset| reset.by == By::Slow))
    }

    /// Ready when nothing can be sent any more.
    pub(super) fn poll_closed(&self, cx: &Context<'_>) -> Poll<()> {
        self.with(|state, key| {
            let sending = &mut state.stream(key).sending;
            if !sending.open {
                return Poll::Ready(());
            }
            sending.wait(cx);
            Poll::Pending
        })
    }
}

impl Clone for Handle {
    fn clone(&self) -> Self {
        Self::new(&self.shared, self.key)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.with(State::let_go);
    }
}

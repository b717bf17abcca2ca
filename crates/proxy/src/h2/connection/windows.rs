//! How far ahead of their readers peers may send: the windows that we open.
//!
//! A window that is open cannot be shut again. What was promised to an endpoint comes, whether or not the client of its
//! answer still takes anything, and has to be kept then. So an endpoint may send [`ANSWER_WINDOW`] of any answer, and more
//! of those whose client has opened its own window, or has shown that it reads; all that is more comes out of one budget
//! of the client's connection, of which each of its streams leaves half to the others. Streams whose part has become
//! smaller get less back than they take until they are there.

use super::{Role, State};
use crate::h2::frame;
use crate::h2::patience;
use crate::h2::stream::Handle;
use crate::h2::{AHEAD, ANSWER_WINDOW, CONNECTION_WINDOW, GROWTH, MAX_STREAM_WINDOW, MAX_WAITING, STREAM_WINDOW};

/// After so many short answers the next one is expected to be short as well, and nothing is said to let it be longer.
const SHORT_ANSWERS: u8 = 32;

impl State {
    /// Lets an endpoint send its answer ahead, where answers from there are long.
    pub(super) fn open_ahead(&mut self, key: usize, reader: Option<&Handle>) {
        if self.short_answers < SHORT_ANSWERS {
            self.resize(key, first_wanted(reader), reader);
        }
    }

    /// The answer's head has come, which may say that the answer is a long one. True when all of it is here.
    pub(in crate::h2) fn look_ahead(&mut self, key: usize, reader: Option<&Handle>) -> bool {
        let receiving = &self.streams[key].receiving;
        if !receiving.open {
            return true;
        }
        let is_long = receiving.remaining.is_some_and(|left| left > u64::from(ANSWER_WINDOW));
        if receiving.limit == ANSWER_WINDOW && is_long {
            self.resize(key, first_wanted(reader), reader);
            self.touch();
        }
        false
    }

    /// An answer has ended after so many bytes.
    pub(super) fn note_length(&mut self, bytes: u64) {
        let is_short = bytes <= u64::from(ANSWER_WINDOW);
        self.short_answers = if is_short { self.short_answers.saturating_add(1) } else { 0 };
    }

    /// The reader is done with the part that it had, if any.
    pub(in crate::h2) fn taken(&mut self, key: usize, reader: Option<&Handle>) {
        let receiving = &mut self.streams[key].receiving;
        let length = std::mem::take(&mut receiving.lent);
        if length == 0 {
            return;
        }
        self.waiting -= length;
        receiving.unreleased += length as u32;
        if receiving.open && receiving.unreleased >= receiving.limit / 2 {
            let limit = receiving.limit;
            let double = limit.saturating_mul(2).min(MAX_STREAM_WINDOW);
            // A reader that keeps up is limited by how far away its source is alone. One that has used up its window,
            // and has not yet opened it again, has shown nothing.
            let keeps_up = receiving.is_drained();
            let keeps_up = keeps_up && reader.is_none_or(|it| it.is_widened() || it.window() >= limit);
            let wanted = if keeps_up { double } else { limit };
            let wanted = if self.role == Role::Client { wanted.max(first_wanted(reader)) } else { wanted };
            self.resize(key, wanted, reader);
            if self.role == Role::Client {
                // The peer counts it as well. What this leaves is told by the next reset.
                let _ = self.asked_in_vain.pay(patience::CONTROL);
            }
            self.touch();
        }
        if self.unreleased >= CONNECTION_WINDOW / 2 {
            self.release(0);
            self.touch();
        }
    }

    /// Makes a stream's window as large as wanted, or as may be, and opens it by what is taken.
    fn resize(&mut self, key: usize, wanted: u32, reader: Option<&Handle>) {
        let first = self.role.first_window();
        let receiving = &self.streams[key].receiving;
        let (limit, unreleased) = (receiving.limit, receiving.unreleased);
        let size = match (self.role, reader) {
            (Role::Client, Some(reader)) => {
                // What is open stays open.
                let least = limit.saturating_sub(unreleased).saturating_sub(first);
                first + reader.with(|state, key| state.promise(key, least, wanted - first))
            }
            (Role::Client, None) => wanted,
            (Role::Server, _) if self.growth + (wanted - limit) <= GROWTH => wanted,
            (Role::Server, _) => limit,
        };
        self.growth = self.growth + size - limit;
        let increment = (unreleased + size).saturating_sub(limit);
        let stream = &mut self.streams[key];
        stream.receiving.unreleased = 0;
        stream.receiving.limit = size;
        stream.receiving.window += i64::from(increment);
        if increment > 0 {
            frame::window_update(stream.id, increment, self.out.tail());
        }
    }

    /// Lets the endpoint that answers this stream send ahead as far as wanted, or as may be, beyond what it may in any
    /// case; at least as far as it already can. How far that is.
    fn promise(&mut self, key: usize, least: u32, wanted: u32) -> u32 {
        let stream = &mut self.streams[key];
        let others = self.promised - stream.promised;
        let budget = (self.sent / 8).clamp(u64::from(AHEAD), u64::from(GROWTH)) as u32;
        stream.promised = wanted.min(budget.saturating_sub(others) / 2).max(least);
        self.promised = others + stream.promised;
        stream.promised
    }

    /// Gives bytes back to the connection's window, however slow their reader: only its stream waits for it, unless
    /// too much waits already.
    pub(super) fn release(&mut self, length: u32) {
        self.unreleased += length;
        if self.unreleased >= CONNECTION_WINDOW / 2 && (self.role == Role::Client || self.waiting <= MAX_WAITING) {
            self.window += i64::from(self.unreleased);
            frame::window_update(0, std::mem::take(&mut self.unreleased), self.out.tail());
        }
    }
}

/// How large a window an answer is to have before anything is known of how it is read: as large as its reader's is.
fn first_wanted(reader: Option<&Handle>) -> u32 {
    reader.map_or(STREAM_WINDOW, |reader| reader.window().clamp(ANSWER_WINDOW, STREAM_WINDOW))
}

//! What those who work for streams send.

use super::{LAST_STREAM, Role, State};
use crate::h2::MAX_STREAMS;
use crate::h2::frame::{self, Code, END_STREAM, Header, Kind};
use crate::h2::head;
use crate::h2::patience;
use crate::h2::stream::{Broken, By, Handle, Reset, Stream};
use bytes::Bytes;
use sheer_core::head::{Fields, RequestHead, ResponseHead};
use std::rc::Rc;
use tokio::sync::Notify;

impl State {
    /// The number of the next stream that we open.
    fn next(&self) -> u32 {
        if self.last == 0 { 1 } else { self.last + 2 }
    }

    /// True when another stream may be opened, now or when there is a slot.
    pub(in crate::h2) fn is_open(&self) -> bool {
        !self.closed && !self.peer_leaves && self.last < LAST_STREAM && !self.asked_in_vain.is_strained()
    }

    /// True when the peer admits another stream now.
    pub(in crate::h2) fn has_slot(&self) -> bool {
        // Before its first word it admits what it will then say, which is more than a few as a rule.
        self.streams.len() < self.peer.max_streams.min(MAX_STREAMS as usize)
    }

    /// Told each time that there may be a slot. Who is told and goes away tells the next one.
    pub(in crate::h2) fn slots(&self) -> Rc<Notify> {
        self.slots.clone()
    }

    /// Opens a stream with a request whose answer is passed on to this stream.
    pub(in crate::h2) fn open(&mut self, head: &RequestHead, ends: bool, reader: Option<&Handle>) -> usize {
        let id = self.next();
        self.last = id;
        let mut stream = self.new_stream(id);
        stream.sending.open = !ends;
        stream.receiving.bodiless = head.method == http::Method::HEAD;
        let flags = if ends { END_STREAM } else { 0 };
        head::write_request(head, id, flags, &mut self.encoder, self.out.tail());
        self.touch();
        let key = self.insert(stream);
        self.open_ahead(key, reader);
        key
    }

    pub(in crate::h2) fn respond(&mut self, key: usize, head: &ResponseHead, ends: bool) -> Result<(), Broken> {
        let Stream { id, sending, .. } = &mut self.streams[key];
        if !sending.open {
            return Err(Broken);
        }
        let flags = if ends { END_STREAM } else { 0 };
        head::write_response(head, *id, flags, &mut self.encoder, self.out.tail());
        if ends {
            self.sent_all(key);
        }
        self.touch();
        Ok(())
    }

    /// Sends an interim answer, unless the stream is over.
    pub(in crate::h2) fn respond_interim(&mut self, key: usize, head: &ResponseHead) {
        let Stream { id, sending, .. } = &self.streams[key];
        if sending.open {
            head::write_response(head, *id, 0, &mut self.encoder, self.out.tail());
            self.touch();
        }
    }

    pub(in crate::h2) fn send_data(&mut self, key: usize, data: Bytes, ends: bool) {
        let Stream { id, sending, moved, .. } = &mut self.streams[key];
        if !sending.open {
            return;
        }
        *moved += data.len() as u64;
        self.sent += data.len() as u64;
        sending.window -= data.len() as i64;
        self.send_window -= data.len() as i64;
        let flags = if ends { END_STREAM } else { 0 };
        Header::write(data.len(), Kind::Data, flags, *id, self.out.tail());
        if !data.is_empty() {
            self.patience.earn();
        }
        self.out.push(data);
        if ends {
            self.sent_all(key);
        }
        self.touch();
    }

    pub(in crate::h2) fn send_trailers(&mut self, key: usize, fields: &Fields) {
        let Stream { id, sending, .. } = &self.streams[key];
        if sending.open {
            head::write_trailers(fields, *id, &mut self.encoder, self.out.tail());
            self.sent_all(key);
            self.touch();
        }
    }

    fn sent_all(&mut self, key: usize) {
        self.streams[key].sending.open = false;
        if self.role == Role::Server {
            self.patience.earn();
        }
        self.may_be_over(key);
    }

    /// Ends a stream before its time, unless it has ended.
    pub(in crate::h2) fn reset(&mut self, key: usize, code: Code) {
        self.reset_by(key, code, By::Us);
    }

    /// Like [`State::reset`], on somebody's account.
    pub(in crate::h2) fn reset_by(&mut self, key: usize, code: Code, by: By) {
        let stream = &self.streams[key];
        if stream.reset.is_some() || !stream.sending.open && !stream.receiving.open {
            return;
        }
        let id = stream.id;
        let is_in_vain = self.role == Role::Client && stream.receiving.open;
        if is_in_vain && !self.asked_in_vain.spare(patience::RESET) {
            // As many at once as a client that went away had requests: the peer would end the connection, with the
            // requests of all others.
            self.owed.push_back((id, code));
        } else {
            frame::reset(id, code, self.out.tail());
            self.remember(id);
        }
        self.end(key, Reset { code, by });
        self.touch();
    }

    /// Says what has been put off, as far as the peer has patience for it now.
    pub(super) fn say_owed(&mut self) {
        while let Some((id, code)) = self.owed.front().copied()
            && self.asked_in_vain.spare(patience::RESET)
        {
            frame::reset(id, code, self.out.tail());
            self.remember(id);
            self.owed.pop_front();
        }
    }

    /// True when the peer has not been told of all resets.
    pub(in crate::h2) fn owes(&self) -> bool {
        !self.owed.is_empty()
    }

    /// Nobody reads a stream any more. A response that nobody wants is cancelled; a request's answer may still be wanted.
    pub(in crate::h2) fn stop_reading(&mut self, key: usize) {
        let dropped = self.streams[key].receiving.drop_parts();
        self.waiting -= dropped;
        self.release(0);
        self.touch();
        let receiving = &mut self.streams[key].receiving;
        receiving.discarded = true;
        receiving.trailers = None;
        if receiving.open && self.role == Role::Client {
            self.reset(key, Code::CANCEL);
        }
    }
}

//! The state of one connection (RFC 9113, section 5). What changes it is in `receiving` and `sending`.

mod receiving;
mod sending;
mod windows;

use super::frame::{self, Code, MAX_WINDOW, setting};
use super::head::Refused;
use super::hpack::{Decoder, Encoder, TABLE_SIZE};
use super::output::Output;
use super::patience::Patience;
use super::stream::{By, Reset, Stream};
use super::{ANSWER_WINDOW, CONNECTION_WINDOW, DEFAULT_WINDOW, Error, MAX_STREAMS, STREAM_WINDOW};
use super::{PAUSED_INTERVALS, STALLED_INTERVALS};
use crate::h1::pace::Pace;
use bytes::BytesMut;
use sheer_core::head::{MAX_HEAD_BYTES, RequestHead};
use slab::Slab;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::task::Waker;
use tokio::sync::Notify;

/// Streams that we have reset and of which late frames are ignored, since their sender could not know.
const REMEMBERED: usize = 256;

/// What may wait to be written to a client before nothing more is read of it: what it provokes and does not read.
const BACKLOG: usize = 256 * 1024;

/// Streams that have ended, of which frames are mistakes of another kind than those of streams that never were.
const ENDED: usize = 16;

/// Streams beyond which a client's connection is not used any more.
const LAST_STREAM: u32 = 1 << 30;

const ALIVE: [u8; 8] = *b"sh alive";
const LEAVING: [u8; 8] = *b"sh leave";

/// Which side of the connection this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Server,
    Client,
}

impl Role {
    /// The window with which the peer's streams begin.
    const fn first_window(self) -> u32 {
        match self {
            Role::Server => STREAM_WINDOW,
            Role::Client => ANSWER_WINDOW,
        }
    }
}

/// A request that has come.
#[derive(Debug)]
pub(super) struct Accepted {
    pub(super) key: usize,
    /// Its head, or why it is answered without being looked at.
    pub(super) head: Result<RequestHead, Refused>,
    /// No body follows.
    pub(super) ended: bool,
}

/// A field block of which not all frames have come.
#[derive(Debug)]
struct Block {
    stream: u32,
    flags: u8,
    bytes: BytesMut,
    fragments: usize,
}

/// How far leaving has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    No,
    /// The peer was told to open no more streams; those on their way are still taken.
    Announced,
    /// Streams after the last one that had come are ignored.
    Told,
}

/// What the peer's SETTINGS say.
#[derive(Debug)]
struct Peer {
    initial_window: u32,
    max_streams: usize,
}

/// The state of one connection.
#[derive(Debug)]
pub(super) struct State {
    role: Role,
    streams: Slab<Stream>,
    by_id: HashMap<u32, usize, foldhash::fast::RandomState>,
    /// The last stream that the client has opened.
    last: u32,
    decoder: Decoder,
    encoder: Encoder,
    block: Option<Block>,
    /// Memory in which heads are read.
    raw: Vec<u8>,
    peer: Peer,
    greeted: bool,
    /// What the peer may still send on the connection, and what it is to get back.
    window: i64,
    unreleased: u32,
    /// Bytes that wait for readers.
    waiting: usize,
    /// What streams may send beyond their first windows.
    growth: u32,
    /// What endpoints may send ahead for the streams of this client, beyond what they may in any case.
    promised: u32,
    /// Bytes of bodies that were sent.
    sent: u64,
    /// Answers one after the other that needed no more than the window they began with.
    short_answers: u8,
    /// What the heads of open streams take up.
    heads: usize,
    /// What we may still send on the connection.
    pub(super) send_window: i64,
    pub(super) out: Output,
    /// Streams that wait for the connection's window or for what is to be written.
    queue: VecDeque<usize>,
    /// Who waits until there may be another stream.
    slots: Rc<Notify>,
    driver: Option<Waker>,
    patience: Patience,
    leaving: Leaving,
    /// The peer takes no more streams.
    peer_leaves: bool,
    /// Nobody will ask for another stream.
    abandoned: bool,
    /// The connection is over.
    closed: bool,
    /// A ping that asks whether the peer lives has no answer yet.
    asked: bool,
    reset_by_us: VecDeque<u32>,
    ended: VecDeque<u32>,
    /// The peer knows our settings.
    acknowledged: bool,
    /// What we have asked in vain of the peer, counted as it counts if it is one of us. A connection on which much was
    /// cancelled is left to end before the peer ends it, with everybody's requests.
    asked_in_vain: Patience,
    /// Resets that would be too much for the peer at once.
    owed: VecDeque<(u32, Code)>,
    /// That of a client whom nobody knows.
    pace: Option<Pace>,
    pub(super) accepted: VecDeque<Accepted>,
    /// Requests that were malformed, to be counted.
    pub(super) malformed: usize,
}

impl State {
    pub(super) fn new(role: Role) -> Self {
        let mut out = Output::default();
        let tail = out.tail();
        let own = match role {
            Role::Server => (setting::MAX_CONCURRENT_STREAMS, MAX_STREAMS),
            Role::Client => {
                tail.extend_from_slice(frame::PREFACE);
                (setting::ENABLE_PUSH, 0)
            }
        };
        let lists = (setting::MAX_HEADER_LIST_SIZE, MAX_HEAD_BYTES as u32);
        frame::settings(&[own, (setting::INITIAL_WINDOW_SIZE, role.first_window()), lists], tail);
        frame::window_update(0, CONNECTION_WINDOW - DEFAULT_WINDOW, tail);
        Self {
            role,
            streams: Slab::new(),
            by_id: HashMap::default(),
            last: 0,
            decoder: Decoder::new(),
            encoder: Encoder::new(),
            block: None,
            raw: Vec::new(),
            peer: Peer { initial_window: DEFAULT_WINDOW, max_streams: usize::MAX },
            greeted: false,
            window: i64::from(CONNECTION_WINDOW),
            unreleased: 0,
            waiting: 0,
            growth: 0,
            promised: 0,
            sent: 0,
            short_answers: 0,
            heads: 0,
            send_window: i64::from(DEFAULT_WINDOW),
            out,
            queue: VecDeque::new(),
            slots: Rc::default(),
            driver: None,
            patience: Patience::new(),
            leaving: Leaving::No,
            peer_leaves: false,
            abandoned: false,
            closed: false,
            asked: false,
            reset_by_us: VecDeque::new(),
            ended: VecDeque::new(),
            acknowledged: false,
            asked_in_vain: Patience::new(),
            owed: VecDeque::new(),
            pace: None,
            accepted: VecDeque::new(),
            malformed: 0,
        }
    }

    /// A stream of which somebody has hold.
    pub(super) fn stream(&mut self, key: usize) -> &mut Stream {
        &mut self.streams[key]
    }

    /// Streams that are open or still worked for.
    pub(super) fn streams(&self) -> usize {
        self.streams.len()
    }

    fn new_stream(&self, id: u32) -> Stream {
        let limit = self.role.first_window();
        let window = if self.acknowledged { limit } else { DEFAULT_WINDOW };
        Stream::new(id, window, limit, self.peer.initial_window)
    }

    fn insert(&mut self, stream: Stream) -> usize {
        self.heads += stream.head_size;
        let id = stream.id;
        let key = self.streams.insert(stream);
        self.by_id.insert(id, key);
        key
    }

    /// One hold less.
    pub(super) fn let_go(&mut self, key: usize) {
        let stream = &mut self.streams[key];
        stream.handles -= 1;
        if stream.handles == 0 {
            let answered = self.role == Role::Server && !stream.sending.open;
            self.reset(key, if answered { Code::NO_ERROR } else { Code::CANCEL });
            self.may_be_over(key);
        }
    }

    /// Removes a stream that has ended in both directions and of which nobody has hold.
    fn may_be_over(&mut self, key: usize) {
        let stream = &self.streams[key];
        if stream.handles > 0 || stream.reset.is_none() && (stream.sending.open || stream.receiving.open) {
            return;
        }
        // A request that nobody has looked at yet.
        if self.accepted.iter().any(|accepted| accepted.key == key) {
            return;
        }
        let mut stream = self.streams.remove(key);
        self.by_id.remove(&stream.id);
        if self.ended.len() == ENDED {
            self.ended.pop_front();
        }
        self.ended.push_back(stream.id);
        if stream.reset.is_none() && self.role == Role::Client {
            self.asked_in_vain.earn();
            self.note_length(stream.moved);
        }
        self.heads -= stream.head_size;
        self.growth -= stream.receiving.limit - self.role.first_window();
        self.promised -= stream.promised;
        self.waiting -= stream.receiving.drop_parts();
        if self.role == Role::Client {
            self.slots.notify_one();
        }
        if self.streams.is_empty() {
            self.touch();
        }
    }

    /// Ends a stream for everybody who works for it.
    fn end(&mut self, key: usize, reset: Reset) {
        let stream = &mut self.streams[key];
        stream.reset = Some(reset);
        stream.sending.open = false;
        stream.receiving.open = false;
        self.waiting -= stream.receiving.drop_parts();
        stream.wake();
    }

    pub(super) fn queue_for_room(&mut self, key: usize) {
        self.queue.push_back(key);
    }

    /// Wakes those who wait for the connection's window or for what is to be written, in their order.
    pub(super) fn wake_queue(&mut self) {
        if self.send_window <= 0 {
            return;
        }
        while let Some(key) = self.queue.pop_front() {
            if let Some(stream) = self.streams.get_mut(key) {
                stream.sending.queued = false;
                stream.sending.wake();
            }
        }
    }

    fn wake_slots(&mut self) {
        self.slots.notify_waiters();
    }

    /// The peer is a client whom nobody knows: it keeps this pace.
    pub(super) fn keep_pace(&mut self, pace: Option<Pace>) {
        self.pace = pace;
    }

    /// True when requests have come or were refused.
    pub(super) fn has_news(&self) -> bool {
        !self.accepted.is_empty() || self.malformed > 0
    }

    /// Something is to be written, or the driver has to look for another reason.
    pub(super) fn touch(&mut self) {
        if let Some(driver) = self.driver.take() {
            driver.wake();
        }
    }

    /// True when a client has provoked more than it reads.
    pub(super) fn is_backlogged(&self) -> bool {
        self.role == Role::Server && self.out.len() > BACKLOG
    }

    /// The driver has seen everything and waits.
    pub(super) fn driver_waits(&mut self, waker: &Waker) {
        self.driver = Some(waker.clone());
    }

    /// True when the peer has said its SETTINGS.
    pub(super) fn is_greeted(&self) -> bool {
        self.greeted
    }

    /// Asks the peer to open no more streams, and lets those come that are on their way.
    pub(super) fn leave(&mut self) {
        if self.leaving == Leaving::No {
            self.leaving = Leaving::Announced;
            let out = self.out.tail();
            frame::go_away(MAX_WINDOW as u32, Code::NO_ERROR, out);
            frame::ping(LEAVING, false, out);
            self.touch();
        }
    }

    /// True when the peer has been asked to open no more streams and has not answered.
    pub(super) fn is_leaving(&self) -> bool {
        self.leaving == Leaving::Announced
    }

    /// Ends a connection that nobody uses. A request on its way now has not been looked at, which its client learns.
    pub(super) fn leave_idle(&mut self) {
        if self.leaving == Leaving::No {
            self.leaving = Leaving::Announced;
        }
        self.leave_now();
        self.touch();
    }

    /// Takes no stream after those that have come.
    fn leave_now(&mut self) {
        if self.leaving == Leaving::Announced {
            self.leaving = Leaving::Told;
            frame::go_away(self.last, Code::NO_ERROR, self.out.tail());
        }
    }

    /// Nobody will open another stream.
    pub(super) fn abandon(&mut self) {
        self.abandoned = true;
        self.touch();
    }

    /// True when nothing can happen any more but writing what is left.
    pub(super) fn is_done(&mut self) -> bool {
        let unused = self.streams.is_empty() && self.accepted.is_empty();
        if unused && self.role == Role::Client && self.abandoned && self.leaving == Leaving::No {
            self.leaving = Leaving::Told;
            frame::go_away(0, Code::NO_ERROR, self.out.tail());
        }
        let leaving = matches!(self.leaving, Leaving::Told) || self.role == Role::Client && self.peer_leaves;
        self.closed || unused && leaving
    }

    /// Ends the connection and everything on it.
    pub(super) fn close(&mut self, error: &Error) {
        if std::mem::replace(&mut self.closed, true) {
            return;
        }
        let code = match error {
            Error::Protocol { code, .. } => *code,
            Error::Ended(code) => *code,
            Error::Io(_) | Error::Silent | Error::Source | Error::Closed => Code::NO_ERROR,
        };
        if let Error::Protocol { code, .. } = error {
            let last = if self.role == Role::Server { self.last } else { 0 };
            frame::go_away(last, *code, self.out.tail());
        }
        let keys: Vec<usize> = self.streams.iter().map(|(key, _)| key).collect();
        for key in keys {
            let stream = &mut self.streams[key];
            if stream.reset.is_none() && (stream.sending.open || stream.receiving.open) {
                self.end(key, Reset { code, by: By::Connection });
            }
        }
        self.wake_slots();
        self.touch();
    }

    /// Ends what waits for a peer that takes nothing, or that as a stranger is slower than it may be.
    fn look_at_pace(&mut self) {
        let least = self.pace.map_or(1, |pace| pace.bytes);
        let stranger = self.pace.is_some();
        let mut slow = Vec::new();
        for (key, stream) in &mut self.streams {
            let uploads = stranger && stream.receiving.is_awaited();
            if stream.reset.is_some() || !(uploads || stream.sending.waits && stream.sending.open) {
                continue;
            }
            // What has no length may be a conversation, in which both sides pause.
            let takes_little = stream.sending.waits && stream.sending.open;
            let converses = !takes_little && stream.receiving.remaining.is_none();
            if converses && stream.moved != stream.looked_at {
                (stream.looked_at, stream.waited) = (stream.moved, 0);
                continue;
            }
            let (intervals, least) = if converses { (PAUSED_INTERVALS, 1) } else { (STALLED_INTERVALS, least) };
            stream.waited += 1;
            if stream.waited < intervals {
                continue;
            }
            let moved = stream.moved - std::mem::replace(&mut stream.looked_at, stream.moved);
            stream.waited = 0;
            if moved < least {
                slow.push((key, uploads));
            }
        }
        for (key, uploads) in slow {
            if uploads {
                // Whoever reads it answers; the stream ends with the answer.
                let receiving = &mut self.streams[key].receiving;
                receiving.slow = true;
                receiving.wake();
            } else {
                self.reset_by(key, Code::CANCEL, By::Slow);
            }
        }
    }

    /// Once an interval, while there are streams. False when the peer did not answer the last time.
    pub(super) fn beat(&mut self, heard: bool) -> bool {
        if std::mem::replace(&mut self.asked, true) && !heard {
            return false;
        }
        self.look_at_pace();
        self.say_owed();
        self.leave_now();
        frame::ping(ALIVE, false, self.out.tail());
        self.touch();
        true
    }
}

const _: () = assert!(TABLE_SIZE == 4096, "the peer is not told another size of our table");

#[cfg(test)]
impl State {
    /// Bytes that wait for readers.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// What is counted is what there is.
    pub(super) fn check(&self) {
        assert_eq!(self.streams.len(), self.by_id.len());
        let of = |stream: &Stream| stream.receiving.kept() + stream.receiving.lent;
        let waiting: usize = self.streams.iter().map(|(_, stream)| of(stream)).sum();
        let heads: usize = self.streams.iter().map(|(_, stream)| stream.head_size).sum();
        let growth: u32 =
            self.streams.iter().map(|(_, stream)| stream.receiving.limit - self.role.first_window()).sum();
        let promised: u32 = self.streams.iter().map(|(_, stream)| stream.promised).sum();
        assert_eq!((self.waiting, self.heads, self.growth, self.promised), (waiting, heads, growth, promised));
    }
}

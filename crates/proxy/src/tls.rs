//! TLS of the mesh hop: rustls shakes hands, and what follows is sealed and opened here, between the socket and whoever
//! reads or writes, without a copy in between (docs/decisions/0009).
//!
//! An idle connection holds no buffer: records are opened from and sealed into memory of the worker's, and only what is
//! not whole, or not taken, is kept.

mod handshake;
mod record;

pub use handshake::{Met, accept, asked_for, connect};

use bytes::{Buf, Bytes, BytesMut};
use handshake::invalid;
use record::{Fault, HEADER, Kind, LONGEST, MOST_CONTENT, OVERHEAD, Opener, Sealer};
use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{AlertDescription, Error};
use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// What is sealed and written at once: four full records.
const SEALED: usize = 4 * (MOST_CONTENT + OVERHEAD);

/// What is received at once: as much, and the part of a record that was there before.
const RECEIVED: usize = SEALED + LONGEST;

/// How many records a peer may send one after the other that carry no data: tickets, new keys, nothing.
const MOST_WITHOUT_DATA: u8 = 32;

/// The longest message after the handshake: a ticket that holds the peer's certificates.
const MOST_MESSAGE: usize = 64 * 1024;

/// How many records one key may seal: half of what is sure with AES-GCM (RFC 8446, section 5.5).
const MOST_SEALED: u64 = 1 << 23;

thread_local! {
    static TO_OPEN: RefCell<Box<[u8]>> = RefCell::new(vec![0; RECEIVED].into_boxed_slice());
    static TO_SEND: RefCell<Box<[u8]>> = RefCell::new(vec![0; SEALED].into_boxed_slice());
}

/// What rustls still does after the handshake: new keys and, at a client, tickets.
enum Session {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

impl Session {
    fn next_sealer(&mut self) -> Result<Sealer, Error> {
        Sealer::new(match self {
            Session::Client(session) => session.update_tx_secret()?,
            Session::Server(session) => session.update_tx_secret()?,
        })
    }

    fn next_opener(&mut self) -> Result<Opener, Error> {
        Opener::new(match self {
            Session::Client(session) => session.update_rx_secret()?,
            Session::Server(session) => session.update_rx_secret()?,
        })
    }
}

/// A TLS 1.3 connection whose handshake is done.
pub struct Stream {
    socket: TcpStream,
    session: Session,
    sealer: Sealer,
    opener: Opener,
    /// Received, and not opened yet.
    received: Bytes,
    /// Opened, and not taken yet.
    opened: Bytes,
    /// Sealed, and not sent yet.
    unsent: Bytes,
    /// The messages of the handshake protocol that are not whole yet.
    message: Vec<u8>,
    /// A new key, as the peer asked for it, is among what is not sent yet. It answers whatever is asked until then
    /// (RFC 8446, section 4.6.3), so that a peer which asks and does not read makes nothing grow.
    answers: bool,
    /// Records in a row that carried no data.
    without_data: u8,
    /// The peer has closed its side in order.
    peer_closed: bool,
    /// This side has been closed.
    closed: bool,
    /// What ended the connection.
    fault: Option<Error>,
    most_sealed: u64,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").field("socket", &self.socket).finish_non_exhaustive()
    }
}

/// What lies in the worker's memory of what was received.
struct Input<'a> {
    memory: &'a mut [u8],
    start: usize,
    end: usize,
}

impl Stream {
    fn new(socket: TcpStream, session: Session, sealer: Sealer, opener: Opener, received: Vec<u8>) -> Self {
        Self {
            socket,
            session,
            sealer,
            opener,
            received: received.into(),
            opened: Bytes::new(),
            unsent: Bytes::new(),
            message: Vec::new(),
            answers: false,
            without_data: 0,
            peer_closed: false,
            closed: false,
            fault: None,
            most_sealed: MOST_SEALED,
        }
    }

    /// The socket below.
    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Receives until there is data, or the end.
    fn poll_data(&mut self, cx: &mut Context<'_>, memory: &mut [u8], out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // As much as `out` can take, and never less than a record.
        let most = (out.remaining() + out.remaining() / 512 + OVERHEAD).clamp(LONGEST, memory.len());
        let mut input = Input { memory, start: 0, end: 0 };
        input.resume(&mut self.received);
        let before = out.filled().len();
        let polled = loop {
            let opened = self.open_records(&mut input, out);
            self.answer(cx);
            match opened {
                // What came before is data all the same.
                Err(fault) => {
                    let error = self.fail(cx, fault);
                    break Poll::Ready(if out.filled().len() > before { Ok(()) } else { Err(error) });
                }
                Ok(()) if out.filled().len() > before || self.peer_closed => break Poll::Ready(Ok(())),
                Ok(()) => {}
            }
            match input.poll_receive(cx, &mut self.socket, most) {
                Poll::Ready(Ok(0)) => break Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => break Poll::Ready(Err(error)),
                Poll::Pending => break Poll::Pending,
            }
        };
        if self.fault.is_none() && !self.peer_closed {
            self.received = Bytes::copy_from_slice(input.rest());
        }
        polled
    }

    /// Opens the whole records of the input for as long as `out` has room.
    fn open_records(&mut self, input: &mut Input<'_>, out: &mut ReadBuf<'_>) -> Result<(), Fault> {
        while out.remaining() > 0 && !self.peer_closed {
            let Some(length) = record::whole(input.rest())? else { return Ok(()) };
            let record = &mut input.memory[input.start..input.start + length];
            input.start += length;
            let room = Opener::room(length);
            if room <= out.remaining() {
                let place = out.initialize_unfilled_to(room);
                let (kind, length) = self.opener.open(record, place)?;
                match kind {
                    Kind::Data => {
                        self.data(length)?;
                        out.advance(length);
                    }
                    _ => {
                        let content = Bytes::copy_from_slice(&place[..length]);
                        self.control(kind, &content)?;
                    }
                }
            } else {
                let (kind, length) = self.opener.open_in_place(record)?;
                let content = &record[HEADER..HEADER + length];
                match kind {
                    Kind::Data => {
                        self.data(length)?;
                        let (now, later) = content.split_at(length.min(out.remaining()));
                        out.put_slice(now);
                        self.opened = Bytes::copy_from_slice(later);
                    }
                    _ => self.control(kind, content)?,
                }
            }
        }
        Ok(())
    }

    /// So much data has come.
    fn data(&mut self, length: usize) -> Result<(), Fault> {
        if !self.message.is_empty() {
            // Messages of the handshake protocol are not interrupted (RFC 8446, section 5.1).
            return Err(Fault::unexpected());
        }
        if length > 0 {
            self.without_data = 0;
            return Ok(());
        }
        self.no_data()
    }

    fn no_data(&mut self) -> Result<(), Fault> {
        self.without_data += 1;
        if self.without_data > MOST_WITHOUT_DATA { Err(Fault::unexpected()) } else { Ok(()) }
    }

    /// Something that is no data has come.
    fn control(&mut self, kind: Kind, content: &[u8]) -> Result<(), Fault> {
        self.no_data()?;
        if kind == Kind::Alert {
            return self.alert(content);
        }
        if content.is_empty() || self.message.len() + content.len() > MOST_MESSAGE {
            return Err(Fault::unexpected());
        }
        self.message.extend_from_slice(content);
        let mut message = std::mem::take(&mut self.message);
        let mut rest = &message[..];
        while let &[kind, a, b, c, ref body @ ..] = rest {
            let Some((body, others)) = body.split_at_checked(u32::from_be_bytes([0, a, b, c]) as usize) else { break };
            self.handle_message(kind, body, others.is_empty())?;
            rest = others;
        }
        let read = message.len() - rest.len();
        message.drain(..read);
        self.message = if message.is_empty() { Vec::new() } else { message };
        Ok(())
    }

    /// An alert (RFC 8446, section 6): the end in order, or not.
    fn alert(&mut self, content: &[u8]) -> Result<(), Fault> {
        if !self.message.is_empty() {
            return Err(Fault::unexpected());
        }
        let &[_, description] = content else { return Err(Fault::malformed()) };
        match AlertDescription::from(description) {
            AlertDescription::CloseNotify => {
                self.peer_closed = true;
                Ok(())
            }
            AlertDescription::UserCanceled => Ok(()),
            description => Err(Fault { error: Error::AlertReceived(description), alert: None }),
        }
    }

    /// One message of the handshake protocol after the handshake (section 4.6).
    fn handle_message(&mut self, kind: u8, body: &[u8], is_last: bool) -> Result<(), Fault> {
        const NEW_SESSION_TICKET: u8 = 4;
        const KEY_UPDATE: u8 = 24;
        let refused = |error| Fault { error, alert: Some(AlertDescription::UnexpectedMessage) };
        match (kind, &mut self.session, body) {
            (NEW_SESSION_TICKET, Session::Client(session), body) => {
                session.handle_new_session_ticket(body).map_err(refused)
            }
            // Nothing is sealed with the old key any more.
            (KEY_UPDATE, session, [request @ (0 | 1)]) if is_last => {
                self.opener = session.next_opener().map_err(refused)?;
                if *request == 1 && !self.answers {
                    self.queue_new_key(0).map_err(refused)?;
                    self.answers = true;
                }
                Ok(())
            }
            _ => Err(Fault::unexpected()),
        }
    }

    /// Tells the peer that what follows is sealed with a new key, and whether it is to take one too.
    fn queue_new_key(&mut self, request: u8) -> Result<(), Error> {
        self.queue(Kind::Handshake, &[24, 0, 0, 1, request])?;
        self.sealer = self.session.next_sealer()?;
        Ok(())
    }

    /// Puts a record behind what is to be sent.
    fn queue(&mut self, kind: Kind, content: &[u8]) -> Result<(), Error> {
        let before = self.unsent.len();
        let mut unsent = BytesMut::zeroed(before + content.len() + OVERHEAD);
        unsent[..before].copy_from_slice(&self.unsent);
        self.sealer.seal(kind, content, &mut unsent[before..])?;
        self.unsent = unsent.freeze();
        Ok(())
    }

    /// Sends what was queued in answer to something received, as far as it goes now.
    fn answer(&mut self, cx: &mut Context<'_>) {
        if !self.unsent.is_empty() {
            // Whoever writes next meets the error.
            let _ = self.poll_send(cx);
        }
    }

    /// Ends the connection for both sides, and tells the peer why.
    fn fail(&mut self, cx: &mut Context<'_>, fault: Fault) -> io::Error {
        if let Some(alert) = fault.alert
            && !self.closed
            && self.queue(Kind::Alert, &[2, alert.into()]).is_ok()
        {
            let _ = self.poll_send(cx);
        }
        self.closed = true;
        self.fault = Some(fault.error.clone());
        invalid(fault.error)
    }

    /// Sends what is sealed.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.unsent.is_empty() {
            match ready!(Pin::new(&mut self.socket).poll_write(cx, &self.unsent))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                sent => self.unsent.advance(sent),
            }
        }
        self.answers = false;
        Poll::Ready(Ok(()))
    }

    /// Seals as much of the content as there is room for: how much that is, and how long the records are.
    fn seal(&mut self, content: &mut Content<'_>, memory: &mut [u8]) -> Result<(usize, usize), Error> {
        let (mut taken, mut size) = (0, 0);
        loop {
            let place = memory.get_mut(size..).unwrap_or_default();
            let most = content.left.min(MOST_CONTENT);
            if most == 0 || place.len() < most + OVERHEAD {
                return Ok((taken, size));
            }
            size += match content.whole(most) {
                Some(part) => self.sealer.seal(Kind::Data, part, place)?,
                None => {
                    content.gather(&mut place[HEADER..HEADER + most]);
                    self.sealer.seal_in_place(most, place)?
                }
            };
            taken += most;
        }
    }

    /// Seals and sends as much as goes, and keeps what the socket does not take.
    fn poll_seal(&mut self, cx: &mut Context<'_>, mut content: Content<'_>) -> Poll<io::Result<usize>> {
        if let Some(fault) = &self.fault {
            return Poll::Ready(Err(invalid(fault.clone())));
        }
        if self.closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if self.sealer.sealed() >= self.most_sealed {
            self.queue_new_key(0).map_err(invalid)?;
        }
        ready!(self.poll_send(cx))?;
        TO_SEND.with_borrow_mut(|memory| {
            let (taken, size) = self.seal(&mut content, memory).map_err(invalid)?;
            let records = &memory[..size];
            let sent = match Pin::new(&mut self.socket).poll_write(cx, records) {
                Poll::Ready(sent) => sent?,
                Poll::Pending => 0,
            };
            self.unsent = Bytes::copy_from_slice(&records[sent..]);
            Poll::Ready(Ok(taken))
        })
    }
}

impl Input<'_> {
    /// What was kept, in front.
    fn resume(&mut self, kept: &mut Bytes) {
        self.memory[..kept.len()].copy_from_slice(kept);
        self.end = kept.len();
        *kept = Bytes::new();
    }

    fn rest(&self) -> &[u8] {
        &self.memory[self.start..self.end]
    }

    /// Receives behind what is there, so that there are `most` bytes at most.
    fn poll_receive(&mut self, cx: &mut Context<'_>, socket: &mut TcpStream, most: usize) -> Poll<io::Result<usize>> {
        self.memory.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let mut free = ReadBuf::new(&mut self.memory[self.end..most]);
        ready!(Pin::new(socket).poll_read(cx, &mut free))?;
        let received = free.filled().len();
        self.end += received;
        Poll::Ready(Ok(received))
    }
}

/// What is to be sealed, in one piece or several.
struct Content<'a> {
    slices: &'a [IoSlice<'a>],
    /// How much of the first slice is sealed.
    start: usize,
    left: usize,
}

impl<'a> Content<'a> {
    fn of(slices: &'a [IoSlice<'a>]) -> Self {
        Self { slices, start: 0, left: slices.iter().map(|slice| slice.len()).sum() }
    }

    /// The next bytes, so many of them, if they lie in one piece.
    fn whole(&mut self, length: usize) -> Option<&'a [u8]> {
        self.skip_sealed();
        let part = self.slices.first()?.get(self.start..)?.get(..length)?;
        self.start += length;
        self.left -= length;
        Some(part)
    }

    /// Copies the next bytes, of which there are enough.
    fn gather(&mut self, mut place: &mut [u8]) {
        while !place.is_empty() {
            self.skip_sealed();
            let Some(part) = self.slices.first().and_then(|slice| slice.get(self.start..)) else { return };
            let length = part.len().min(place.len());
            let (now, later) = std::mem::take(&mut place).split_at_mut(length);
            now.copy_from_slice(&part[..length]);
            place = later;
            self.start += length;
            self.left -= length;
        }
    }

    fn skip_sealed(&mut self) {
        while let Some((first, others)) = self.slices.split_first()
            && self.start >= first.len()
        {
            self.slices = others;
            self.start = 0;
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.opened.is_empty() {
            let length = this.opened.len().min(out.remaining());
            out.put_slice(&this.opened.split_to(length));
            return Poll::Ready(Ok(()));
        }
        if let Some(fault) = &this.fault {
            return Poll::Ready(Err(invalid(fault.clone())));
        }
        if this.peer_closed || out.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        TO_OPEN.with_borrow_mut(|memory| this.poll_data(cx, memory, out))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().poll_seal(cx, Content::of(&[IoSlice::new(bytes)]))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_seal(cx, Content::of(slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_send(cx)
    }

    /// Tells the peer that no more comes. What it sends can still be read.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.closed {
            this.closed = true;
            let close_notify = [1, AlertDescription::CloseNotify.into()];
            this.queue(Kind::Alert, &close_notify).map_err(invalid)?;
        }
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;

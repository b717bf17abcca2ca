//! HTTP/2 (RFC 9113), both sides of it, for one thread.
//!
//! - `hpack` and `frame` are the bytes; `head` reads decompressed fields strictly and writes ours.
//! - `connection` is the state of one connection: its streams, both directions' windows, what waits to be written, and
//!   how much patience is left with its peer. It does no input or output. `driver` does: one task a connection reads
//!   frames into that state and writes what has gathered there, everything in one write where it fits.
//! - `server` and `client` are the two sides, `incoming` the bodies that arrive and `pump` those that are sent.
//!   They run in tasks of their own and share the state with the driver behind one `RefCell`, borrowed inside single
//!   polls and never while anything foreign is polled.

pub mod client;
mod connection;
mod driver;
mod frame;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod head;
mod hpack;
pub mod incoming;
mod output;
mod patience;
mod pump;
pub mod server;
mod stream;

pub use frame::Code;
pub use incoming::Incoming;
pub use server::Interims;

use std::io;
use std::time::Duration;

/// How far ahead of its reader a peer may send on one stream at first, in bytes: a client of a request, and an endpoint of
/// an answer whose client has opened its own window as far. Readers that keep up get more, up to [`MAX_STREAM_WINDOW`].
const STREAM_WINDOW: u32 = 32 * 1024;

/// How far ahead an endpoint may send of any answer, whoever takes it: what a reader that has stopped makes us keep in any
/// case, at each of the two proxies of a path. Many answers are no longer.
const ANSWER_WINDOW: u32 = 2 * 1024;

/// What endpoints may send ahead for all streams of a client's connection together, beyond [`ANSWER_WINDOW`] each. With a
/// hundred streams, and what waits to be written, that is less than 1 MiB.
const AHEAD: u32 = 768 * 1024;

/// Both sides' windows before anybody says otherwise (RFC 9113, section 6.9.2).
const DEFAULT_WINDOW: u32 = 65_535;

/// The largest window that a stream grows to.
const MAX_STREAM_WINDOW: u32 = 1024 * 1024;

/// What all requests on a connection together may grow beyond [`STREAM_WINDOW`], and what takes the place of [`AHEAD`]
/// for a client that has taken eight times as much.
const GROWTH: u32 = 4 * 1024 * 1024;

/// How far ahead of this proxy a peer may send on one connection.
const CONNECTION_WINDOW: u32 = 2 * 1024 * 1024;

/// What may wait on one client's connection for those who read its requests before the connection's window stays shut.
/// Towards an endpoint, whose connection many share, nothing but each stream's own window is shut by a slow reader.
const MAX_WAITING: usize = 8 * 1024 * 1024;

/// What waits to be written on one connection before those who send bodies wait too.
const SEND_BUFFER: usize = 64 * 1024;

/// Streams that a connection carries at once, from the application or from a mesh peer.
const MAX_STREAMS: u32 = 1000;

/// Decompressed heads that a connection's open streams may have in all, and beyond it a stream's share. Compressed, they
/// can be a thousandth of that.
const MAX_HEADS: usize = 1024 * 1024;
const SHARE_OF_HEADS: usize = 4 * 1024;

/// How often a connection with open streams is asked whether the other side still lives. An answer that has not come
/// when the next question is due ends it. A host that vanished is noticed earlier, by its silent TCP.
const PING_INTERVAL: Duration = Duration::from_secs(10);

/// Intervals of waiting for a peer after which it is looked at how much has moved meanwhile.
const STALLED_INTERVALS: u8 = 6;

/// The same for a stranger's request without a length, as [`Pace::OF_CONVERSATIONS`](crate::h1::pace::Pace) has it.
const PAUSED_INTERVALS: u8 = 30;

/// How a connection ended other than in order.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bytes below failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The peer broke the protocol, or used up our patience, and was told so.
    #[error("the peer broke the protocol ({code}): {detail}")]
    Protocol {
        /// What it was told.
        code: Code,
        /// What it did.
        detail: &'static str,
    },
    /// The peer ended the connection with this code.
    #[error("the peer ended the connection ({0})")]
    Ended(Code),
    /// The peer did not answer in time.
    #[error("the peer did not answer in time")]
    Silent,
    /// The body that was to be sent broke off.
    #[error("the body that was to be sent broke off")]
    Source,
    /// The connection was closed while something was under way on it.
    #[error("the connection is closed")]
    Closed,
}

impl Error {
    const fn protocol(detail: &'static str) -> Self {
        Error::Protocol { code: Code::PROTOCOL_ERROR, detail }
    }
}

#[cfg(test)]
mod tests;

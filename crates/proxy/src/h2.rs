//! HTTP/2 on the `h2` crate: one server loop and one client handle, which speak the data path's messages.
//!
//! Framing, HPACK, flow control windows and stream states are the crate's. Ours are the strict reading of heads
//! (`convert`), bodies whose window opens as they are consumed, resets that travel both ways, trailers, GOAWAY as a
//! promise about what was not processed, and the limits.

pub mod client;
mod convert;
pub mod incoming;
mod pump;
pub mod server;

pub use incoming::Incoming;

use h2::{Ping, PingPong};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// The most bytes a peer may have in flight on one stream towards us: what a slow reader makes us keep for it.
const STREAM_WINDOW: u32 = 256 * 1024;

/// The most bytes a peer may have in flight on one connection: eight busy streams at full window.
const CONNECTION_WINDOW: u32 = 2 * 1024 * 1024;

/// What one stream may have queued for sending before its writer waits.
const SEND_BUFFER: usize = 64 * 1024;

/// Streams that a connection carries at once, from the application or from a mesh peer.
const MAX_STREAMS: u32 = 1000;

/// Streams that a peer may reset before they were looked at (rapid reset, CVE-2023-44487).
const MAX_PENDING_RESETS: usize = 100;

/// Streams that we reset because of the peer's own mistakes before the connection ends (CVE-2025-8671).
const MAX_ERROR_RESETS: usize = 1024;

/// How often a connection with open streams is asked whether the other side still lives. An answer that has not come
/// when the next question is due ends it. A host that vanished is noticed earlier, by its silent TCP.
const PING_INTERVAL: Duration = Duration::from_secs(10);

/// Asks the other side whether it lives.
struct Pinger {
    pings: Option<PingPong>,
    waiting: bool,
}

impl Pinger {
    fn new(pings: Option<PingPong>) -> Self {
        Self { pings, waiting: false }
    }

    /// Called once an interval. False when the last question was not answered.
    fn beat(&mut self) -> bool {
        let Some(pings) = &mut self.pings else { return true };
        if self.waiting {
            let mut cx = Context::from_waker(Waker::noop());
            if !matches!(pings.poll_pong(&mut cx), Poll::Ready(Ok(_))) {
                return false;
            }
        }
        self.waiting = pings.send_ping(Ping::opaque()).is_ok();
        true
    }
}

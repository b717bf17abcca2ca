//! A client that has closed its sending side before it has its answer: has it left, or has it only finished speaking?
//!
//! FIN is all that the network tells of both. The kernel of the client's host knows more: a program that has finished
//! speaking holds its socket, one that has left does not. The clients of a workload's proxy are on its own host; of others
//! nothing is known until they reset the connection, which the kernel makes them do within about a minute.

use crate::capture::listening::Ports;
use crate::platform::original_destination;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};

/// How often it is looked whether the client is still there.
const LOOK: Duration = Duration::from_millis(250);

/// A client of which nothing is known is asked so often whether it knows the connection.
const QUESTION: Duration = Duration::from_secs(5);

/// The namespaces in which clients may be: that of the workload, and our own.
pub type Namespaces = Arc<[Ports]>;

/// What is known of such a client.
pub(super) struct HalfClosed {
    next: Pin<Box<Sleep>>,
    /// The client's socket was seen, in one of the namespaces.
    seen: bool,
}

impl fmt::Debug for HalfClosed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HalfClosed").field("seen", &self.seen).finish_non_exhaustive()
    }
}

impl HalfClosed {
    /// The client has just closed its sending side.
    pub(super) fn new(client: &TcpStream) -> Self {
        let questions = socket2::TcpKeepalive::new().with_time(QUESTION).with_interval(QUESTION).with_retries(3);
        // Without these a client of another host is only noticed later.
        let _ = socket2::SockRef::from(client).set_tcp_keepalive(&questions);
        Self { next: Box::pin(sleep(LOOK)), seen: false }
    }

    /// Ready when it has left.
    pub(super) fn poll_gone(&mut self, client: &TcpStream, among: &[Ports], cx: &mut Context<'_>) -> Poll<()> {
        while self.next.as_mut().poll(cx).is_ready() {
            if self.is_gone(client, among) {
                return Poll::Ready(());
            }
            self.next.as_mut().reset(Instant::now() + LOOK);
        }
        Poll::Pending
    }

    fn is_gone(&mut self, client: &TcpStream, among: &[Ports]) -> bool {
        let (Ok(from), Ok(here)) = (client.peer_addr(), client.local_addr()) else { return true };
        // The client of a captured connection believes to be connected to where it was going.
        let ends = std::iter::once(here).chain(original_destination(client));
        let found = ends.flat_map(|to| among.iter().filter_map(move |ports| ports.holds(from, to).ok()?)).next();
        match found {
            Some(held) => {
                self.seen = true;
                !held
            }
            None => self.seen || !matches!(client.take_error(), Ok(None)),
        }
    }
}

//! How much a peer may ask of us that gets nobody anything.
//!
//! Every flood of HTTP/2 (CVE-2019-9512 and on, CVE-2023-44487, CVE-2025-8671) makes cheap frames that cause work: pings,
//! settings, resets, errors. Each costs a token here. Tokens come back with useful work and with time, so that a peer
//! that cancels much or pings often is served, at a rate that harms nobody, and one that does nothing else is cut.

use super::{Code, Error};
use std::time::Duration;
use tokio::time::Instant;

/// What a peer may ask at once.
const BURST: u32 = 1000;

/// Tokens that come back in a second.
const PER_SECOND: u32 = 100;

/// What is kept back of it for what cannot wait.
const RESERVE: u32 = 100;

/// What a frame costs that has to be answered or changes nothing.
pub(super) const CONTROL: u32 = 1;

/// What a request costs that was reset before it was answered.
pub(super) const RESET: u32 = 2;

/// What a stream costs that we had to reset for its peer's mistake.
pub(super) const MISTAKE: u32 = 2;

/// What comes back with a request that was answered or a part of a body that was sent: a reader may well open two windows
/// for it.
pub(super) const WORK: u32 = 2;

/// The patience with one connection.
#[derive(Debug)]
pub(super) struct Patience {
    tokens: u32,
    /// From when on time counts that has not yet given anything back; not before something was asked.
    since: Option<Instant>,
}

impl Patience {
    pub(super) fn new() -> Self {
        Self { tokens: BURST, since: None }
    }

    /// Pays for something.
    ///
    /// # Errors
    /// There is no patience left.
    pub(super) fn pay(&mut self, price: u32) -> Result<(), Error> {
        let since = *self.since.get_or_insert_with(Instant::now);
        if self.tokens < price {
            let now = Instant::now();
            let passed = now.saturating_duration_since(since).min(Duration::from_secs(60)).as_millis() as u32;
            self.tokens = (self.tokens + passed * PER_SECOND / 1000).min(BURST);
            self.since = Some(now);
        }
        match self.tokens.checked_sub(price) {
            Some(rest) => {
                self.tokens = rest;
                Ok(())
            }
            None => Err(Error::Protocol { code: Code::ENHANCE_YOUR_CALM, detail: "too much that is of no use" }),
        }
    }

    /// Pays for something that can wait, unless so little is left that what cannot wait may soon not be paid for.
    pub(super) fn spare(&mut self, price: u32) -> bool {
        let spares = self.pay(price + RESERVE).is_ok();
        self.tokens += if spares { RESERVE } else { 0 };
        spares
    }

    /// True when less than half of it is left.
    pub(super) fn is_strained(&self) -> bool {
        self.tokens < BURST / 2
    }

    /// Something of use was done.
    pub(super) fn earn(&mut self) {
        self.tokens = (self.tokens + WORK).min(BURST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_cut_and_a_trickle_is_served() {
        let mut patience = Patience::new();
        assert_eq!((0..5000).take_while(|_| patience.pay(CONTROL).is_ok()).count(), BURST as usize);
        for _ in 0..5 {
            tokio::time::advance(Duration::from_secs(1)).await;
            assert_eq!((0..5000).take_while(|_| patience.pay(CONTROL).is_ok()).count(), PER_SECOND as usize);
        }
    }

    #[test]
    fn work_pays_for_what_it_brings_along() {
        let mut patience = Patience::new();
        for _ in 0..10_000 {
            patience.earn();
            patience.pay(CONTROL).unwrap();
            patience.pay(CONTROL).unwrap();
        }
    }
}

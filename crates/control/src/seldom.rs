//! What strangers can cause to be logged, within bounds: no flood of theirs fills a disk or hides what matters.

use parking_lot::Mutex;
use std::time::Duration;
use tokio::time::Instant;

/// Lines a window: more than anybody reads, and not a megabyte an hour.
const LINES: u32 = 60;
const WINDOW: Duration = Duration::from_secs(60);

/// Bounds the lines of one kind.
#[derive(Debug, Default)]
pub(crate) struct Seldom(Mutex<Window>);

#[derive(Debug, Default)]
struct Window {
    began: Option<Instant>,
    lines: u32,
    left_out: u64,
}

impl Seldom {
    /// Whether a line may be written now, with the number of those that were left out since the last one.
    pub(crate) fn admit(&self) -> Option<u64> {
        self.admit_at(Instant::now())
    }

    fn admit_at(&self, now: Instant) -> Option<u64> {
        let mut window = self.0.lock();
        if window.began.is_none_or(|began| now.duration_since(began) >= WINDOW) {
            window.began = Some(now);
            window.lines = 0;
        }
        if window.lines >= LINES {
            window.left_out += 1;
            return None;
        }
        window.lines += 1;
        Some(std::mem::take(&mut window.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_a_page_a_minute_and_its_size() {
        let (seldom, start) = (Seldom::default(), Instant::now());
        let admitted = (0..10_000).filter(|_| seldom.admit_at(start) == Some(0)).count();
        assert_eq!(admitted, 60);
        assert_eq!(seldom.admit_at(start + WINDOW / 2), None);
        assert_eq!(seldom.admit_at(start + WINDOW), Some(10_000 - 60 + 1));
        assert_eq!(seldom.admit_at(start + WINDOW), Some(0));
    }
}

//! Slots at a fixed rate, whatever became of those before: an open loop. What is measured from its slot counts the
//! waiting of all that a slow answer held up, which a client that waits before it asks again leaves out (coordinated
//! omission).
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};
use tokio::io::unix::AsyncFd;
use tokio::sync::Semaphore;

/// Hands out the slots of one rate, the earliest first.
pub struct Schedule {
    start: Cell<Instant>,
    interval: Duration,
    due: Semaphore,
    issued: Cell<u64>,
    taken: Cell<u64>,
}

impl Schedule {
    /// So many slots a second, from [`Schedule::run`] on.
    pub fn new(rate: u64) -> Self {
        let interval = Duration::from_nanos(1_000_000_000 / rate.max(1));
        let start = Cell::new(Instant::now());
        Self { start, interval, due: Semaphore::new(0), issued: Cell::new(0), taken: Cell::new(0) }
    }

    /// Makes slots due for so long. The runtime's own timer is a thousand times too coarse.
    pub async fn run(&self, time: Duration) -> std::io::Result<()> {
        let spec = Timespec { tv_sec: self.interval.as_secs() as i64, tv_nsec: self.interval.subsec_nanos().into() };
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK)?;
        let each = Itimerspec { it_interval: spec, it_value: spec };
        rustix::time::timerfd_settime(&timer, TimerfdTimerFlags::empty(), &each)?;
        self.start.set(Instant::now());
        #[allow(deprecated, reason = "an owned descriptor stays the same; the successor is unsafe to call")]
        let timer: AsyncFd<OwnedFd> = AsyncFd::new(timer)?;
        while self.start.get().elapsed() < time {
            let mut ready = timer.readable().await?;
            let mut count = [0; 8];
            // Whoever reads late gets the number of slots that came due meanwhile.
            if let Ok(read) = ready.try_io(|timer| Ok(rustix::io::read(timer, &mut count)?)) {
                read?;
                let count = u64::from_ne_bytes(count);
                self.issued.set(self.issued.get() + count);
                self.due.add_permits(count as usize);
            }
        }
        Ok(())
    }

    /// The next slot: when it was to begin. Who waits longest gets it.
    pub async fn slot(&self) -> Instant {
        self.due.acquire().await.expect("it is never closed").forget();
        let number = self.taken.get() + 1;
        self.taken.set(number);
        self.start.get() + Duration::from_nanos(self.interval.as_nanos() as u64 * number)
    }

    /// How many slots have come due.
    pub fn issued(&self) -> u64 {
        self.issued.get()
    }
}

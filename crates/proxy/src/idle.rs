//! Connections that wait for their client's next request: the first to go when there is no room for another.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::time::Instant;

/// Whose last answer is younger may have its next request under way.
const REST: Duration = Duration::from_secs(1);

/// Those of one worker.
#[derive(Clone, Default)]
pub struct Idlers(Rc<RefCell<Vec<Rc<State>>>>);

/// One connection, for as long as it is open.
pub struct Idler {
    state: Rc<State>,
    all: Idlers,
}

#[derive(Default)]
struct State {
    /// Where it stands in the list of all.
    place: Cell<usize>,
    since: Cell<Option<Instant>>,
    leaves: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Idlers {
    /// A connection that will be idle at times.
    pub fn enter(&self) -> Idler {
        let state = Rc::<State>::default();
        let mut all = self.0.borrow_mut();
        state.place.set(all.len());
        all.push(state.clone());
        drop(all);
        Idler { state, all: self.clone() }
    }

    /// Ends up to so many that are idle, those first that have been so for longest. How many will end.
    pub fn let_go(&self, count: usize) -> usize {
        let all = self.0.borrow();
        let rested =
            |state: &&Rc<State>| !state.leaves.get() && state.since.get().is_some_and(|it| it.elapsed() >= REST);
        let mut idle: Vec<&Rc<State>> = all.iter().filter(rested).collect();
        if idle.len() > count && count > 0 {
            idle.select_nth_unstable_by_key(count - 1, |state| state.since.get());
        }
        idle.truncate(count);
        for state in &idle {
            state.leaves.set(true);
            if let Some(waker) = state.waker.borrow_mut().take() {
                waker.wake();
            }
        }
        idle.len()
    }
}

impl Idler {
    /// While it waits since this time: ready when it is to end.
    pub(crate) fn poll_leave(&self, cx: &mut Context<'_>, since: Instant) -> Poll<()> {
        let state = &self.state;
        if state.leaves.get() {
            return Poll::Ready(());
        }
        state.since.set(Some(since));
        let mut waker = state.waker.borrow_mut();
        if !waker.as_ref().is_some_and(|it| it.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// It has a request now.
    pub(crate) fn works(&self) {
        self.state.since.set(None);
    }
}

impl Drop for Idler {
    fn drop(&mut self) {
        let mut all = self.all.0.borrow_mut();
        let place = self.state.place.get();
        all.swap_remove(place);
        if let Some(moved) = all.get(place) {
            moved.place.set(place);
        }
    }
}

impl fmt::Debug for Idler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Idler").field("since", &self.state.since.get()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn those_idle_for_longest_go_first() {
        let idlers = Idlers::default();
        let mut cx = Context::from_waker(Waker::noop());
        let all: Vec<Idler> = (0..5).map(|_| idlers.enter()).collect();
        for (seconds, one) in all.iter().enumerate().skip(1) {
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert!(one.poll_leave(&mut cx, Instant::now()).is_pending(), "{seconds}");
        }
        // The first was never idle, the last is so only just now.
        assert_eq!(idlers.let_go(2), 2);
        let leaving = |all: &[Idler]| all.iter().map(|it| it.state.leaves.get()).collect::<Vec<_>>();
        assert_eq!(leaving(&all), [false, true, true, false, false]);
        all[3].works();
        assert_eq!(idlers.let_go(2), 0);
        drop(all);
        assert!(idlers.0.borrow().is_empty());
    }
}

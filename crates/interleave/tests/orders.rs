//! Orders in which a proxy's threads can run. `ORDERS` of them are tried of each (2,000 without), chosen at random and so
//! that few changes of thread are needed for what goes wrong (PCT). A failure prints the order, to be played again.

use sheer_interleave::{Answers, Clients, MAX_ANSWERS, State, Way, average_in_use, in_flight, is_shunned};
use shuttle::thread;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

/// Tries orders of what a test does, half of them in either way.
fn in_any_order(test: impl Fn() + Send + Sync + Clone + 'static) {
    let orders = std::env::var("ORDERS").ok().and_then(|it| it.parse().ok()).unwrap_or(2_000);
    shuttle::check_random(test.clone(), orders / 2);
    shuttle::check_pct(test, orders / 2, 3);
}

#[test]
fn workers_together_admit_no_more_than_one_would() {
    in_any_order(|| {
        const MOST: usize = 3;
        let (clients, held) = (Arc::new(Clients::default()), Arc::new(AtomicUsize::new(0)));
        let workers = [Way::In, Way::Out, Way::In, Way::Out].map(|way| {
            let (clients, held) = (clients.clone(), held.clone());
            thread::spawn(move || {
                for _ in 0..2 {
                    if clients.enter(way, MOST) {
                        // Counted beside, outside of what the scheduler sees.
                        assert!(held.fetch_add(1, SeqCst) < MOST, "more than {MOST} at a time");
                        thread::yield_now();
                        held.fetch_sub(1, SeqCst);
                        clients.leave(way);
                    }
                }
            })
        });
        workers.into_iter().for_each(|it| it.join().unwrap());
        assert_eq!(clients.number(), 0);
    });
}

#[test]
fn one_that_fits_is_admitted_whoever_is_refused_beside_it() {
    in_any_order(|| {
        let clients = Arc::new(Clients::default());
        assert!(clients.enter(Way::In, 2));
        let admitted = [Way::In, Way::Out].map(|way| {
            let clients = clients.clone();
            thread::spawn(move || clients.enter(way, 2))
        });
        let admitted = admitted.map(|it| it.join().unwrap());
        assert_eq!(admitted.iter().filter(|it| **it).count(), 1, "one place was left for two");
    });
}

#[test]
fn answers_are_counted_once_and_never_shown_under_no_key() {
    in_any_order(|| {
        let answers = Arc::new(Answers::default());
        let workers = [[200, 404], [404, 200], [200, 503]].map(|keys| {
            let answers = answers.clone();
            thread::spawn(move || keys.into_iter().for_each(|key| answers.count(key)))
        });
        for _ in 0..2 {
            let (seen, other) = answers.counted();
            let known = |(key, count): &(u32, u64)| matches!((*key, *count), (200, 1..=3) | (404, 1..=2) | (503, 1));
            assert!(seen.iter().all(known) && other == 0, "{seen:?}, {other}");
        }
        workers.into_iter().for_each(|it| it.join().unwrap());
        let (mut seen, other) = answers.counted();
        seen.sort_unstable();
        assert_eq!((seen.as_slice(), other), ([(200, 3), (404, 2), (503, 1)].as_slice(), 0));
    });
}

#[test]
fn what_finds_no_slot_is_counted_beside() {
    in_any_order(|| {
        let answers = Arc::new(Answers::default());
        (1..MAX_ANSWERS as u32).for_each(|key| answers.count(key));
        let workers = [1000, 1001].map(|key| {
            let answers = answers.clone();
            thread::spawn(move || answers.count(key))
        });
        workers.into_iter().for_each(|it| it.join().unwrap());
        let (seen, other) = answers.counted();
        assert_eq!((seen.len(), other), (MAX_ANSWERS, 1));
    });
}

#[test]
fn what_is_in_flight_to_an_endpoint_comes_back_to_nothing() {
    in_any_order(|| {
        let state = Arc::new(State::default());
        let workers = [1, 2, 2].map(|times| {
            let state = state.clone();
            thread::spawn(move || {
                for _ in 0..times {
                    let held = state.begin();
                    assert!((1..=3).contains(&in_flight(&state)));
                    // Its endpoint may be removed meanwhile: the count belongs to who holds it.
                    thread::spawn(move || drop(held)).join().unwrap();
                }
            })
        });
        workers.into_iter().for_each(|it| it.join().unwrap());
        assert_eq!(in_flight(&state), 0);
    });
}

#[test]
fn silence_that_several_meet_at_once_counts_once() {
    in_any_order(|| {
        let state = Arc::new(State::default());
        let workers = [(), (), ()].map(|()| {
            let state = state.clone();
            thread::spawn(move || state.shun_silent())
        });
        workers.into_iter().for_each(|it| it.join().unwrap());
        assert!(is_shunned(&state));
        assert_eq!(state.silences(), 1);
    });
}

#[test]
fn an_endpoint_is_never_taken_for_one_that_answers_in_no_time() {
    in_any_order(|| {
        let state = Arc::new(State::default());
        let observing = state.clone();
        let worker = thread::spawn(move || {
            let _held = observing.begin();
            observing.observe(Duration::from_millis(50));
        });
        for _ in 0..2 {
            let average = average_in_use(&state);
            assert!(average.is_none_or(|it| it > 0.01), "{average:?}");
        }
        worker.join().unwrap();
        assert!(average_in_use(&state).is_some());
    });
}

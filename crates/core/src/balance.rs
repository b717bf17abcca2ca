//! Which endpoint takes a request: the power of two choices on a peak-sensitive moving average of response times.
//!
//! Two endpoints are drawn and the one with the lower cost is taken; the cost is the expected time to an answer: the
//! average response time times the requests already waiting (Mitzenmacher 2001; peak EWMA after Finagle's and Linkerd's
//! balancers). The average jumps up with a slow answer at once and decays over [`DECAY`] when answers get faster.

use crate::snapshot::Health;
use std::time::Duration;

/// The time over which an old observation loses 63 % of its weight.
pub const DECAY: Duration = Duration::from_secs(10);

/// What an endpoint that has not answered yet is taken to need for each request that it holds.
pub const UNKNOWN_LATENCY: Duration = Duration::from_millis(30);

/// The moving average after one more answer. All in seconds; `elapsed` is the time since the previous answer.
pub fn peak_ewma(average_s: f64, sample_s: f64, elapsed: Duration) -> f64 {
    if sample_s > average_s {
        return sample_s;
    }
    let weight = (-elapsed.as_secs_f64() / DECAY.as_secs_f64()).exp();
    average_s * weight + sample_s * (1.0 - weight)
}

/// What is left of an average after an endpoint has been idle for so long: one that was slow once is tried again.
pub fn aged(average_s: f64, idle: Duration) -> f64 {
    average_s * (-idle.as_secs_f64() / DECAY.as_secs_f64()).exp()
}

/// The cost of sending one more request to an endpoint. One that has never answered costs nothing while it holds no
/// request: it is tried at once, with one request at a time.
pub fn cost(average_s: Option<f64>, in_flight: u32, weight: u32) -> f64 {
    let expected = match average_s {
        Some(average_s) => average_s * f64::from(in_flight + 1),
        None => UNKNOWN_LATENCY.as_secs_f64() * f64::from(in_flight),
    };
    expected / f64::from(weight.max(1))
}

/// What the balancer must know of an endpoint.
pub trait Candidate {
    /// As the control plane or this proxy sees it; better ones are picked first.
    fn health(&self) -> Health;
    /// See [`cost`].
    fn cost(&self) -> f64;
}

/// Picks one of the candidates for which `tried` is false, among those of the best health. `random` is uniform over all
/// of `u64`. `None` when none is left.
pub fn pick<C: Candidate>(candidates: &[C], tried: impl Fn(usize) -> bool, random: u64) -> Option<usize> {
    let untried = || candidates.iter().enumerate().filter(|(place, _)| !tried(*place));
    let best = untried().map(|(_, candidate)| candidate.health()).min()?;
    let eligible = || untried().filter(|(_, candidate)| candidate.health() == best);
    let count = eligible().count() as u64;
    let nth = |n: u64| eligible().nth(n as usize);
    let first = below(random as u32, count);
    let (one, candidate) = nth(first)?;
    if count == 1 {
        return Some(one);
    }
    // A distinct second: a draw from the others, shifted past the first.
    let draw = below((random >> 32) as u32, count - 1);
    let (two, other) = nth(if draw >= first { draw + 1 } else { draw })?;
    Some(if other.cost() < candidate.cost() { two } else { one })
}

fn below(random: u32, limit: u64) -> u64 {
    (u64::from(random) * limit) >> 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    struct Fake(Health, f64);

    impl Candidate for Fake {
        fn health(&self) -> Health {
            self.0
        }
        fn cost(&self) -> f64 {
            self.1
        }
    }

    proptest! {
        #[test]
        fn never_the_costliest_of_many_nor_a_worse_health(costs in proptest::collection::vec(0.0f64..10.0, 1..20), sick in proptest::collection::vec(any::<bool>(), 20), random: u64) {
            let all: Vec<_> = costs.iter().zip(&sick).map(|(cost, sick)| Fake(if *sick { Health::Suspect } else { Health::Healthy }, *cost)).collect();
            let picked = &all[pick(&all, |_| false, random).unwrap()];
            let healthy: Vec<_> = all.iter().filter(|it| it.0 == Health::Healthy).collect();
            if !healthy.is_empty() {
                prop_assert_eq!(picked.0, Health::Healthy);
            }
            let peers: Vec<f64> = all.iter().filter(|it| it.0 == picked.0).map(|it| it.1).collect();
            let max = peers.iter().copied().fold(f64::MIN, f64::max);
            prop_assert!(peers.len() < 2 || picked.1 < max || peers.iter().filter(|cost| **cost == max).count() > 1);
        }

        #[test]
        fn what_was_tried_is_not_picked_again(count in 1usize..10, tried in 0usize..10, random: u64) {
            let all = vec![Fake(Health::Healthy, 1.0); count];
            let picked = pick(&all, |place| place == tried, random);
            prop_assert_ne!(picked, Some(tried));
            prop_assert_eq!(picked.is_none(), count == 1 && tried == 0);
        }
    }

    #[test]
    fn every_endpoint_gets_its_turn() {
        let all = vec![Fake(Health::Healthy, 1.0); 3];
        let mut counts = [0; 3];
        let mut random = 0x9E37_79B9_7F4A_7C15u64;
        for _ in 0..3000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            counts[pick(&all, |_| false, random ^ (random >> 31)).unwrap()] += 1;
        }
        assert!(counts.iter().all(|count| (900..1100).contains(count)), "{counts:?}");
    }

    #[test]
    fn the_average_jumps_up_and_decays_slowly() {
        assert_eq!(peak_ewma(0.01, 1.0, Duration::from_secs(1)), 1.0);
        let after = peak_ewma(1.0, 0.01, Duration::from_secs(10));
        assert!((0.3..0.4).contains(&after), "{after}");
        assert!(cost(Some(0.01), 9, 1) > cost(Some(0.05), 0, 1));
    }

    #[test]
    fn a_new_or_idle_endpoint_gets_its_turn_among_fast_ones() {
        let fast = cost(Some(0.0005), 0, 1);
        assert!(cost(None, 0, 1) < fast, "a new one is tried at once");
        assert!(cost(None, 1, 1) > fast, "with one request, until it has answered");
        assert!(cost(Some(aged(5.0, Duration::from_secs(120))), 0, 1) < fast, "what was slow long ago is tried again");
    }
}

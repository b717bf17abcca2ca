//! Log-linear latency buckets: 8 to each power of two, from 1 microsecond to about 18 minutes.
//!
//! A value's relative error is at most 1/8 of it. Proxies count into them with one increment, the control plane adds
//! them up, Prometheus sees every fourth boundary as `le`.

/// Number of buckets. The last one also holds everything above.
pub const BUCKETS: usize = 31 * SUB;

const SUB: usize = 8;
const SUB_BITS: u32 = 3;

/// The bucket of a duration in microseconds.
pub fn index_of(micros: u64) -> usize {
    if micros < SUB as u64 {
        return micros as usize;
    }
    let exponent = 63 - micros.leading_zeros();
    let sub = ((micros >> (exponent - SUB_BITS)) & (SUB as u64 - 1)) as usize;
    let index = ((exponent - SUB_BITS + 1) as usize) * SUB + sub;
    index.min(BUCKETS - 1)
}

/// The first duration, in microseconds, that belongs to a later bucket: its exclusive upper bound.
pub fn upper_bound_micros(index: usize) -> u64 {
    let next = index + 1;
    if next < SUB {
        return next as u64;
    }
    let exponent = (next / SUB) as u32 + SUB_BITS - 1;
    ((SUB + next % SUB) as u64) << (exponent - SUB_BITS)
}

/// The duration in seconds below which the fraction `quantile` (0 to 1) of all counted values lies, taken in the middle
/// of its bucket. `None` when nothing was counted.
pub fn quantile_s(counts: &[(usize, u64)], quantile: f64) -> Option<f64> {
    let total: u64 = counts.iter().map(|(_, count)| count).sum();
    if total == 0 {
        return None;
    }
    let rank = ((total as f64 * quantile).ceil() as u64).clamp(1, total);
    let mut sorted: Vec<_> = counts.to_vec();
    sorted.sort_unstable();
    let mut seen = 0;
    for (index, count) in sorted {
        seen += count;
        if seen >= rank {
            let low = if index == 0 { 0 } else { upper_bound_micros(index - 1) };
            return Some((low + upper_bound_micros(index)) as f64 / 2e6);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_value_lies_in_its_bucket(micros in 0u64..(1 << 33)) {
            let index = index_of(micros);
            prop_assert!(micros < upper_bound_micros(index));
            if index > 0 {
                prop_assert!(micros >= upper_bound_micros(index - 1));
            }
        }
    }

    #[test]
    fn everything_above_goes_to_the_last_bucket() {
        assert_eq!(index_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_of_a_known_set() {
        assert_eq!(quantile_s(&[], 0.5), None);
        let p50 = quantile_s(&[(index_of(1000), 50), (index_of(100_000), 50)], 0.5).unwrap();
        assert!((p50 - 0.001).abs() < 0.0002, "{p50}");
    }
}

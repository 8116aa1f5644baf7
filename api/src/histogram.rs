//! Histograms of latency: one set of buckets for the node, its API and its clients.
//!
//! Buckets are log-linear, as in HdrHistogram: each power of two of nanoseconds is cut into
//! four equal parts, so a bucket is at most a quarter as wide as its lower bound. Counts
//! only grow, so the difference of two readings is the histogram of what came in between.

use serde::Deserialize;
use serde::Serialize;

/// Parts into which each power of two is cut.
const SUB_BUCKETS: u64 = 4;
/// Its exponent.
const SUB_BITS: u32 = SUB_BUCKETS.ilog2();
/// The first bucket holds everything below this power of two: 512 ns.
const EXPONENT_MIN: u32 = 9;
/// The last bucket holds everything from this power of two on: 69 s.
const EXPONENT_MAX: u32 = 36;

/// How many buckets there are.
pub const BUCKETS: usize = 2 + ((EXPONENT_MAX - EXPONENT_MIN) << SUB_BITS) as usize;

/// The bucket that counts a latency.
#[must_use]
pub fn bucket_of(nanoseconds: u64) -> usize {
    if nanoseconds >> EXPONENT_MIN == 0 {
        return 0;
    }
    let exponent = nanoseconds.ilog2();
    if exponent >= EXPONENT_MAX {
        return BUCKETS - 1;
    }
    let part = (nanoseconds >> (exponent - SUB_BITS)) % SUB_BUCKETS;
    let octave = u64::from(exponent - EXPONENT_MIN);
    usize::try_from(1 + octave * SUB_BUCKETS + part).unwrap_or(BUCKETS - 1)
}

/// The lowest latency that a bucket counts, in nanoseconds.
#[must_use]
pub fn bucket_start(bucket: usize) -> u64 {
    let Some(index) = bucket.min(BUCKETS - 1).checked_sub(1) else { return 0 };
    let index = index as u64;
    let (octave, part) = (index / SUB_BUCKETS, index % SUB_BUCKETS);
    ((SUB_BUCKETS + part) << octave) << (EXPONENT_MIN - SUB_BITS)
}

/// How often each latency was seen since the node started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Histogram {
    /// Sum of all latencies, in nanoseconds.
    pub sum_ns: u64,
    /// Bucket and count, for each bucket that is not empty, in order of bucket; see [`bucket_start`].
    pub buckets: Vec<(u16, u64)>,
}

impl Histogram {
    /// How many were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|(_, count)| count).sum()
    }

    /// The mean in nanoseconds; 0 if nothing was counted.
    #[must_use]
    pub fn mean_ns(&self) -> u64 {
        self.sum_ns.checked_div(self.count()).unwrap_or(0)
    }

    /// The latency, in nanoseconds, that this share of all stay below: 0.99 for the 99th percentile. Within a
    /// bucket latencies are taken as spread evenly. 0 if nothing was counted.
    #[must_use]
    pub fn quantile_ns(&self, share: f64) -> u64 {
        let count = self.count();
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "an estimate; the share is bounded"
        )]
        let rank = ((count as f64 * share.clamp(0.0, 1.0)).ceil() as u64).clamp(1, count.max(1));
        let mut before = 0;
        for &(bucket, inside) in &self.buckets {
            if before + inside >= rank {
                let start = bucket_start(usize::from(bucket));
                let end = bucket_start(usize::from(bucket) + 1).max(start);
                let into = u128::from(end - start) * u128::from(rank - before) / u128::from(inside);
                return start + u64::try_from(into).unwrap_or(0);
            }
            before += inside;
        }
        0
    }

    /// What was counted after `earlier` was read. A node that was restarted in between has counted
    /// from nothing: then it is all there is.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut old = earlier.buckets.iter().peekable();
        let mut buckets = Vec::with_capacity(self.buckets.len());
        for &(bucket, count) in &self.buckets {
            let before = old.next_if(|(other, _)| *other == bucket).map_or(0, |(_, count)| *count);
            match count.checked_sub(before) {
                None => return self.clone(),
                Some(0) => {}
                Some(more) => buckets.push((bucket, more)),
            }
        }
        // A bucket that is gone was another process's too.
        if old.next().is_some() {
            return self.clone();
        }
        Self { sum_ns: self.sum_ns.wrapping_sub(earlier.sum_ns), buckets }
    }

    /// Adds what another has counted.
    pub fn add(&mut self, other: &Self) {
        self.sum_ns = self.sum_ns.wrapping_add(other.sum_ns);
        for &(bucket, count) in &other.buckets {
            match self.buckets.binary_search_by_key(&bucket, |(bucket, _)| *bucket) {
                Ok(at) => self.buckets[at].1 += count,
                Err(at) => self.buckets.insert(at, (bucket, count)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_each_other_and_are_a_quarter_wide_at_most() {
        assert_eq!((bucket_of(0), bucket_of(511), bucket_of(512)), (0, 0, 1));
        assert_eq!((bucket_start(0), bucket_start(1), bucket_start(5)), (0, 512, 1024));
        for bucket in 1..BUCKETS {
            let start = bucket_start(bucket);
            assert_eq!(bucket_of(start), bucket, "{start} ns");
            assert_eq!(bucket_of(start - 1), bucket - 1, "{start} ns");
            assert!(start - bucket_start(bucket - 1) <= bucket_start(bucket - 1).max(512) / 4 * 4);
        }
        assert_eq!(bucket_start(BUCKETS - 1), 1 << EXPONENT_MAX);
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    fn of(latencies: impl IntoIterator<Item = u64>) -> Histogram {
        let mut all = Histogram::default();
        for ns in latencies {
            let bucket = u16::try_from(bucket_of(ns)).expect("few buckets");
            all.add(&Histogram { sum_ns: ns, buckets: vec![(bucket, 1)] });
        }
        all
    }

    #[test]
    fn quantiles_are_within_a_bucket_of_the_truth() {
        let all = of((1..=1000).map(|us| us * 1000));
        assert_eq!(all.count(), 1000);
        assert_eq!(all.mean_ns(), 500_500);
        for (share, truth) in
            [(0.5, 500_000_u64), (0.99, 990_000), (0.999, 999_000), (1.0, 1_000_000)]
        {
            let told = all.quantile_ns(share);
            assert!(told.abs_diff(truth) <= truth / 4, "{share}: {told} for {truth}");
        }
        assert_eq!(Histogram::default().quantile_ns(0.5), 0);
        assert_eq!(Histogram::default().mean_ns(), 0);
    }

    #[test]
    fn a_difference_is_what_came_in_between() {
        let before = of([1_000, 5_000]);
        let mut after = before.clone();
        after.add(&of([5_000, 900_000]));
        assert_eq!(after.since(&before), of([5_000, 900_000]));
        assert_eq!(after.since(&Histogram::default()), after);
        // The node was restarted: its counts are below those read before.
        let restarted = of([5_000]);
        assert_eq!(restarted.since(&of([5_000, 5_000])), restarted);
        // Or in none of the same places.
        let (slower, both) = (of([900_000]), of([5_000, 900_000]));
        assert_eq!(slower.since(&of([5_000])), slower);
        assert_eq!(both.since(&of([1_000, 5_000])), both);
        assert_eq!(both.since(&of([5_000, 8_000_000])), both);
    }
}

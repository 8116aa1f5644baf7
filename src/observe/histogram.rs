//! A histogram that threads share: plain atomics, nothing waits. Buckets are the API's.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use weft_api::histogram::BUCKETS;
use weft_api::histogram::bucket_of;

/// Counts of latencies since the node started.
#[derive(Debug)]
pub struct Histogram {
    sum_ns: AtomicU64,
    buckets: [AtomicU64; BUCKETS],
}

impl Default for Histogram {
    fn default() -> Self {
        Self { sum_ns: AtomicU64::new(0), buckets: [const { AtomicU64::new(0) }; BUCKETS] }
    }
}

impl Histogram {
    /// Counts a latency.
    pub fn record(&self, latency: Duration) {
        self.record_many(latency, 1);
    }

    /// Counts a latency that many requests had alike.
    pub fn record_many(&self, latency: Duration, count: u64) {
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.sum_ns.fetch_add(ns.saturating_mul(count), Ordering::Relaxed);
        self.buckets[bucket_of(ns)].fetch_add(count, Ordering::Relaxed);
    }

    /// What was counted so far. While others count, a latency may be in the buckets and not yet in
    /// the sum, or the other way round.
    #[must_use]
    pub fn snapshot(&self) -> weft_api::Histogram {
        let counts = self.buckets.iter().map(|count| count.load(Ordering::Relaxed));
        weft_api::Histogram {
            sum_ns: self.sum_ns.load(Ordering::Relaxed),
            buckets: (0_u16..).zip(counts).filter(|(_, count)| *count > 0).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_recorded_is_in_the_snapshot() {
        let histogram = Histogram::default();
        assert_eq!(histogram.snapshot(), weft_api::Histogram::default());
        histogram.record(Duration::from_micros(100));
        histogram.record_many(Duration::from_micros(20), 3);
        let seen = histogram.snapshot();
        assert_eq!((seen.count(), seen.sum_ns), (4, 160_000));
        assert!(seen.quantile_ns(0.5) < 25_000 && seen.quantile_ns(1.0) > 90_000);
    }
}

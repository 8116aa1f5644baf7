//! What hosts did with a volume: histograms and counts by front end and operation.
//!
//! A volume nobody uses has none: each is made when the first request of its kind is counted.

use std::array;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use weft_api::FrontEnd;
use weft_api::Operation;
use weft_api::OperationStats;
use weft_api::Stage;
use weft_api::StageStats;

use crate::observe::histogram::Histogram;

const KINDS: usize = FrontEnd::ALL.len() * Operation::ALL.len();

/// All requests on one volume.
#[derive(Debug)]
pub struct Requests {
    kinds: [OnceLock<Box<Kind>>; KINDS],
}

/// Requests of one kind.
#[derive(Debug)]
pub struct Kind {
    errors: AtomicU64,
    bytes: AtomicU64,
    latency: Histogram,
    stages: [OnceLock<Box<Histogram>>; Stage::ALL.len()],
}

impl Default for Requests {
    fn default() -> Self {
        Self { kinds: [const { OnceLock::new() }; KINDS] }
    }
}

impl Requests {
    /// Where requests of that kind are counted.
    #[must_use]
    pub fn kind(&self, front_end: FrontEnd, operation: Operation) -> &Kind {
        let index = front_end as usize * Operation::ALL.len() + operation as usize;
        self.kinds[index].get_or_init(Box::default)
    }

    /// Everything counted so far.
    #[must_use]
    pub fn snapshot(&self) -> Vec<OperationStats> {
        let names = FrontEnd::ALL.iter().flat_map(|front_end| {
            Operation::ALL.iter().map(move |operation| (*front_end, *operation))
        });
        let counted = names.zip(&self.kinds).filter_map(|(name, kind)| Some((name, kind.get()?)));
        counted.map(|((front_end, operation), kind)| kind.snapshot(front_end, operation)).collect()
    }
}

impl Default for Kind {
    fn default() -> Self {
        Self {
            errors: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            latency: Histogram::default(),
            stages: array::from_fn(|_| OnceLock::new()),
        }
    }
}

impl Kind {
    /// Counts requests that all took so long.
    pub fn done(&self, count: u64, bytes: u64, latency: Duration) {
        self.latency.record_many(latency, count);
        // Zeroing moves no data, so hosts can zero a whole volume again and again: rather the
        // largest count for ever than one that begins anew.
        let add = |counted: u64| (bytes > 0).then(|| counted.saturating_add(bytes));
        let _ = self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }

    /// Counts the time that so many requests each spent in a stage.
    pub fn stage(&self, stage: Stage, count: u64, time: Duration) {
        if let Some(histogram) = self.stages.get(stage as usize) {
            histogram.get_or_init(Box::default).record_many(time, count);
        }
    }

    /// Counts requests answered with an error.
    pub fn failed(&self, count: u64) {
        self.errors.fetch_add(count, Ordering::Relaxed);
    }

    fn snapshot(&self, front_end: FrontEnd, operation: Operation) -> OperationStats {
        let stages = Stage::ALL.iter().zip(&self.stages).filter_map(|(stage, histogram)| {
            Some(StageStats { stage: *stage, latency: histogram.get()?.snapshot() })
        });
        OperationStats {
            front_end,
            operation,
            errors: self.errors.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            latency: self.latency.snapshot(),
            stages: stages.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_counted_by_itself_and_only_if_it_happened() {
        let requests = Requests::default();
        assert_eq!(requests.snapshot(), []);
        let us = Duration::from_micros;
        requests.kind(FrontEnd::NvmeTcp, Operation::Other).failed(2);
        let reads = requests.kind(FrontEnd::Nbd, Operation::Read);
        reads.done(3, 12288, us(30));
        reads.stage(Stage::Device, 3, us(20));
        let seen = requests.snapshot();
        let names: Vec<_> = seen.iter().map(|kind| (kind.front_end, kind.operation)).collect();
        let expected = [(FrontEnd::Nbd, Operation::Read), (FrontEnd::NvmeTcp, Operation::Other)];
        assert_eq!(names, expected);
        assert_eq!((seen[0].bytes, seen[0].errors, seen[0].latency.count()), (12288, 0, 3));
        assert_eq!(seen[0].stages.len(), 1);
        assert_eq!(seen[0].stages[0].stage, Stage::Device);
        assert_eq!((seen[1].errors, seen[1].latency.count()), (2, 0));
        reads.done(1, u64::MAX, us(30));
        assert_eq!(requests.snapshot()[0].bytes, u64::MAX, "it never goes back");
    }
}

//! What hosts did in one interval, on one volume or on all.

use weft_api::Histogram;
use weft_api::Operation;
use weft_api::OperationStats;
use weft_api::Stage;
use weft_api::StageStats;

/// What hosts did, by operation. Operations that did not happen are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    operations: Vec<OperationActivity>,
}

/// One kind of request, over all front ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OperationActivity {
    /// What was asked.
    pub operation: Operation,
    /// Requests answered well.
    pub requests: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Bytes moved.
    pub bytes: u64,
    /// Latencies of the requests answered well.
    pub latency: Histogram,
    /// Where their time went, in the order of the way.
    pub stages: Vec<StageActivity>,
}

/// One part of the way of requests.
///
/// A summary and no histogram, since ten minutes of these for hundreds of volumes are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageActivity {
    /// Which.
    pub stage: Stage,
    /// Requests that spent time there.
    pub requests: u64,
    /// The time they spent there together.
    pub sum_ns: u64,
    /// Median of it.
    pub p50_ns: u64,
    /// 99th percentile of it.
    pub p99_ns: u64,
}

impl StageActivity {
    /// The mean over those that spent time there.
    #[must_use]
    pub fn mean_ns(&self) -> u64 {
        self.sum_ns.checked_div(self.requests).unwrap_or(0)
    }
}

impl Activity {
    /// What was done of one kind; `None` if nothing.
    #[must_use]
    pub fn operation(&self, operation: Operation) -> Option<&OperationActivity> {
        self.operations.iter().find(|one| one.operation == operation)
    }

    /// All that was done.
    pub fn operations(&self) -> impl Iterator<Item = &OperationActivity> {
        self.operations.iter()
    }

    /// Requests of one kind, answered well.
    #[must_use]
    pub fn requests(&self, operation: Operation) -> u64 {
        self.operation(operation).map_or(0, |one| one.requests)
    }

    /// Bytes moved by one kind.
    #[must_use]
    pub fn bytes(&self, operation: Operation) -> u64 {
        self.operation(operation).map_or(0, |one| one.bytes)
    }

    /// Requests of any kind, answered well.
    #[must_use]
    pub fn requests_all(&self) -> u64 {
        self.operations.iter().map(|one| one.requests).sum()
    }

    /// Requests of any kind, answered with an error.
    #[must_use]
    pub fn errors(&self) -> u64 {
        self.operations.iter().map(|one| one.errors).sum()
    }

    /// A percentile of the latencies of one kind; `None` if there were none.
    #[must_use]
    pub fn quantile_ns(&self, operation: Operation, share: f64) -> Option<u64> {
        let one = self.operation(operation).filter(|one| one.requests > 0)?;
        Some(one.latency.quantile_ns(share))
    }

    /// How much memory this takes, in units of a few dozen bytes.
    #[must_use]
    pub fn weight(&self) -> usize {
        self.operations.iter().map(|one| 2 + one.latency.buckets.len() / 2 + one.stages.len()).sum()
    }
}

/// Adds up counters of operations, each the difference of two readings.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally {
    operations: Vec<OperationStats>,
}

impl Tally {
    /// Adds one operation's counters; front ends are not told apart.
    pub(super) fn add(&mut self, more: &OperationStats) {
        let Some(sum) = self.operations.iter_mut().find(|one| one.operation == more.operation)
        else {
            self.operations.push(more.clone());
            return;
        };
        sum.errors = sum.errors.saturating_add(more.errors);
        sum.bytes = sum.bytes.saturating_add(more.bytes);
        sum.latency.add(&more.latency);
        for stage in &more.stages {
            match sum.stages.iter_mut().find(|one| one.stage == stage.stage) {
                Some(one) => one.latency.add(&stage.latency),
                None => sum.stages.push(stage.clone()),
            }
        }
    }

    /// What was added, without operations that did not happen.
    pub(super) fn finish(&self) -> Activity {
        let mut operations: Vec<_> = self.operations.iter().filter_map(operation).collect();
        operations.sort_by_key(|one| one.operation);
        Activity { operations }
    }
}

fn operation(sum: &OperationStats) -> Option<OperationActivity> {
    let requests = sum.latency.count();
    if requests == 0 && sum.errors == 0 {
        return None;
    }
    let mut stages: Vec<_> = sum.stages.iter().filter_map(stage).collect();
    stages.sort_by_key(|one| one.stage);
    Some(OperationActivity {
        operation: sum.operation,
        requests,
        errors: sum.errors,
        bytes: sum.bytes,
        latency: sum.latency.clone(),
        stages,
    })
}

fn stage(sum: &StageStats) -> Option<StageActivity> {
    let requests = sum.latency.count();
    (requests > 0).then(|| StageActivity {
        stage: sum.stage,
        requests,
        sum_ns: sum.latency.sum_ns,
        p50_ns: sum.latency.quantile_ns(0.5),
        p99_ns: sum.latency.quantile_ns(0.99),
    })
}

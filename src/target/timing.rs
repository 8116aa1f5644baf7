//! How long the requests of one connection take, and where.
//!
//! The clock is read when bytes arrive, when a batch's answers are made and when they are sent, not
//! for each request: those answered from RAM share the readings of their batch, so that timing them
//! costs next to nothing. A request that has to wait is worth readings of its own.

use std::sync::Arc;

use tokio::time::Instant;
use weft_api::FrontEnd;
use weft_api::Operation;
use weft_api::Stage;

use crate::observe::requests::Requests;
use crate::observe::stages::Stages;

/// Answers that may wait to be sent before they are counted nevertheless: a host that never lets its
/// socket run dry must not make us remember all it asked for.
const PENDING_MAX: usize = 1024;

/// The requests of one connection.
pub struct Timing {
    front_end: FrontEnd,
    /// Only a bench has it off, to tell what it costs.
    timed: bool,
    /// When the bytes came that are being parsed.
    received: Instant,
    /// Answered and not yet sent.
    answered: Vec<Answered>,
}

/// A request that is under way.
#[derive(Clone, Debug)]
pub struct Begun {
    requests: Arc<Requests>,
    operation: Operation,
    bytes: u64,
    received: Instant,
    /// Where its time goes.
    pub stages: Stages,
}

impl Begun {
    /// A request that came at `received` begins, and may have to wait.
    #[must_use]
    pub fn new(
        requests: Arc<Requests>,
        operation: Operation,
        bytes: u64,
        received: Instant,
        now: Instant,
    ) -> Self {
        let mut stages = Stages::default();
        stages.add(Stage::Parse, now.saturating_duration_since(received));
        Self { requests, operation, bytes, received, stages }
    }
}

/// Requests that came together and were answered together.
struct Answered {
    requests: Arc<Requests>,
    operation: Operation,
    received: Instant,
    how: How,
    count: u64,
    bytes: u64,
}

enum How {
    /// From RAM, at once.
    AtOnce,
    /// After waiting.
    Waited { answered: Instant, stages: Stages },
}

impl Timing {
    /// A connection of that protocol.
    #[must_use]
    pub fn new(front_end: FrontEnd, timed: bool) -> Self {
        Self { front_end, timed, received: Instant::now(), answered: Vec::new() }
    }

    /// Bytes have come.
    pub fn received(&mut self) {
        if self.timed {
            self.received = Instant::now();
        }
    }

    /// When the last bytes came.
    #[must_use]
    pub fn arrival(&self) -> Instant {
        self.received
    }

    /// A request was answered at once.
    pub fn answered(&mut self, requests: &Arc<Requests>, operation: Operation, bytes: u64) {
        if !self.timed {
            return;
        }
        if let Some(last) = self.answered.last_mut()
            && matches!(last.how, How::AtOnce)
            && last.operation == operation
            && last.received == self.received
            && Arc::ptr_eq(&last.requests, requests)
        {
            last.count += 1;
            last.bytes = last.bytes.saturating_add(bytes);
            return;
        }
        let (requests, received) = (Arc::clone(requests), self.received);
        self.push(Answered { requests, operation, received, how: How::AtOnce, count: 1, bytes });
    }

    /// A request that was begun has succeeded and been answered.
    pub fn finished(&mut self, begun: Begun, now: Instant) {
        if !self.timed {
            return;
        }
        let Begun { requests, operation, bytes, received, stages } = begun;
        let how = How::Waited { answered: now, stages };
        self.push(Answered { requests, operation, received, how, count: 1, bytes });
    }

    fn push(&mut self, answered: Answered) {
        if self.answered.len() >= PENDING_MAX {
            let now = Instant::now();
            self.sent(now, now);
        }
        self.answered.push(answered);
    }

    /// A request was answered with an error.
    pub fn failed(&self, requests: &Requests, operation: Operation) {
        requests.kind(self.front_end, operation).failed(1);
    }

    /// A request that was begun, if its kind is counted, was answered with an error.
    pub fn failed_under_way(&self, begun: Option<&Begun>) {
        if let Some(Begun { requests, operation, .. }) = begun {
            self.failed(requests, *operation);
        }
    }

    /// Whether answers wait to be sent.
    #[must_use]
    pub fn pending(&self) -> bool {
        !self.answered.is_empty()
    }

    /// All answers have been sent; those made at once were ready at `ready`.
    pub fn sent(&mut self, ready: Instant, now: Instant) {
        for answered in self.answered.drain(..) {
            answered.count_at(self.front_end, ready, now);
        }
    }
}

impl Answered {
    fn count_at(self, front_end: FrontEnd, ready: Instant, now: Instant) {
        let kind = self.requests.kind(front_end, self.operation);
        let latency = now.saturating_duration_since(self.received);
        kind.done(self.count, self.bytes, latency);
        match self.how {
            How::AtOnce => {
                // What was left over from a batch that the socket did not take was ready before.
                let ready = ready.max(self.received);
                kind.stage(Stage::Cache, self.count, ready.duration_since(self.received));
                kind.stage(Stage::Reply, self.count, now.saturating_duration_since(ready));
            }
            How::Waited { answered, mut stages } => {
                stages.add(Stage::Reply, now.saturating_duration_since(answered));
                let rest = latency.saturating_sub(stages.total());
                stages.add(Stage::Rest, rest);
                for (stage, time) in stages.iter() {
                    kind.stage(stage, 1, time);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn stages_add_up_to_the_latency() {
        let requests = Arc::new(Requests::default());
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut timing = Timing::new(FrontEnd::Nbd, true);
        timing.received = at(1);
        let counted = Arc::clone(&requests);
        let mut slow = Begun::new(counted, Operation::Read, 4096, timing.arrival(), at(2));
        slow.stages.add(Stage::Device, Duration::from_millis(5));
        timing.finished(slow, at(10));
        assert!(timing.pending());
        timing.sent(at(11), at(12));
        assert!(!timing.pending());

        let seen = requests.snapshot();
        assert_eq!(seen[0].latency.sum_ns, 11_000_000);
        let stages: Vec<_> =
            seen[0].stages.iter().map(|of| (of.stage, of.latency.sum_ns / 1_000_000)).collect();
        let expected = [(Stage::Parse, 1), (Stage::Device, 5), (Stage::Reply, 2), (Stage::Rest, 3)];
        assert_eq!(stages, expected);
    }

    #[test]
    fn answers_that_are_never_all_sent_are_counted_and_forgotten() {
        let requests = Arc::new(Requests::default());
        let mut timing = Timing::new(FrontEnd::Nbd, true);
        let count = 10 * PENDING_MAX;
        for number in 0..count {
            let now = Instant::now();
            timing.received = now;
            match number % 2 {
                0 => timing.answered(&requests, Operation::Read, 512),
                _ => timing.finished(
                    Begun::new(Arc::clone(&requests), Operation::Write, 512, now, now),
                    now,
                ),
            }
            assert!(timing.answered.len() <= PENDING_MAX);
        }
        let counted = || requests.snapshot().iter().map(|kind| kind.latency.count()).sum::<u64>();
        assert!(counted() >= (count - PENDING_MAX) as u64);
        timing.sent(Instant::now(), Instant::now());
        assert_eq!(counted(), count as u64);
    }

    #[test]
    fn a_batch_from_ram_shares_its_readings_and_failures_have_no_latency() {
        let requests = Arc::new(Requests::default());
        let start = Instant::now();
        let at = |us: u64| start + Duration::from_micros(us);
        let mut timing = Timing::new(FrontEnd::NvmeTcp, true);
        timing.received = start;
        for _ in 0..3 {
            timing.answered(&requests, Operation::Read, 512);
        }
        timing.failed(&requests, Operation::Write);
        assert_eq!(timing.answered.len(), 1);
        timing.sent(at(4), at(10));

        let seen = requests.snapshot();
        let reads = &seen[0];
        assert_eq!((reads.operation, reads.bytes), (Operation::Read, 1536));
        assert_eq!((reads.latency.count(), reads.latency.sum_ns), (3, 30_000));
        let stages: Vec<_> = reads.stages.iter().map(|of| (of.stage, of.latency.sum_ns)).collect();
        assert_eq!(stages, [(Stage::Cache, 12_000), (Stage::Reply, 18_000)]);
        assert_eq!((seen[1].errors, seen[1].latency.count()), (1, 0));
    }
}

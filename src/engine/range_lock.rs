//! Overlapping writes, trims and read-modify-writes of a volume start one after the other.
//!
//! A request holds its range from before it reads or is stamped until it is visible. Waiters are
//! served in order of arrival: one that waits for a large range is not overtaken for ever by small
//! ones inside it.

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::canary::Bug;
use crate::canary::planted;

/// The ranges of one volume, in bytes.
#[derive(Default)]
pub struct RangeLock {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Start → end of what is held; never overlapping.
    held: BTreeMap<u64, u64>,
    waiting: VecDeque<Waiter>,
}

struct Waiter {
    range: Range<u64>,
    granted: oneshot::Sender<RangeGuard>,
}

/// Holds a range until dropped.
pub struct RangeGuard {
    lock: Arc<RangeLock>,
    start: u64,
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl State {
    fn is_held(&self, range: &Range<u64>) -> bool {
        self.held.range(..range.end).next_back().is_some_and(|(_, end)| *end > range.start)
    }
}

impl RangeLock {
    /// Waits until nothing else holds any of `range` (which must not be empty) and holds it.
    ///
    /// # Cancellation
    /// Dropping the future gives up the place in the queue.
    pub async fn acquire(self: &Arc<Self>, range: Range<u64>) -> RangeGuard {
        assert!(range.start < range.end, "an empty range needs no lock");
        let granted = {
            let mut state = self.state.lock();
            let behind = state.waiting.iter().any(|waiter| overlap(&waiter.range, &range));
            if (!behind && !state.is_held(&range)) || planted(Bug::RangeUnlocked) {
                state.held.insert(range.start, range.end);
                return RangeGuard { lock: Arc::clone(self), start: range.start };
            }
            let (sender, receiver) = oneshot::channel();
            state.waiting.push_back(Waiter { range, granted: sender });
            receiver
        };
        granted.await.expect("a waiter stays queued until it is granted")
    }

    fn release(self: &Arc<Self>, start: u64) {
        let mut granted = Vec::new();
        {
            let mut state = self.state.lock();
            state.held.remove(&start);
            let mut still_waiting: VecDeque<Waiter> = VecDeque::new();
            for waiter in std::mem::take(&mut state.waiting) {
                let blocked = state.is_held(&waiter.range)
                    || still_waiting.iter().any(|earlier| overlap(&earlier.range, &waiter.range));
                if waiter.granted.is_closed() {
                    continue;
                }
                if blocked {
                    still_waiting.push_back(waiter);
                } else {
                    state.held.insert(waiter.range.start, waiter.range.end);
                    granted.push(waiter);
                }
            }
            state.waiting = still_waiting;
        }
        for waiter in granted {
            let guard = RangeGuard { lock: Arc::clone(self), start: waiter.range.start };
            // If the waiter gave up meanwhile, the guard comes back and is dropped here.
            let _ = waiter.granted.send(guard);
        }
    }
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        self.lock.release(self.start);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn overlapping_ranges_wait_in_order_and_others_do_not() {
        let lock = Arc::new(RangeLock::default());
        let first = lock.acquire(0..10).now_or_never().expect("free");
        let _apart = lock.acquire(10..20).now_or_never().expect("does not overlap");
        let mut whole = Box::pin(lock.acquire(0..10));
        assert!((&mut whole).now_or_never().is_none());
        let mut small = Box::pin(lock.acquire(2..3));
        assert!((&mut small).now_or_never().is_none());
        drop(first);
        let whole = (&mut whole).now_or_never().expect("first in line");
        assert!((&mut small).now_or_never().is_none(), "no overtaking");
        drop(whole);
        assert!((&mut small).now_or_never().is_some());
    }

    #[test]
    fn a_waiter_that_gave_up_blocks_nobody() {
        let lock = Arc::new(RangeLock::default());
        let first = lock.acquire(0..10).now_or_never().expect("free");
        let mut gone = Box::pin(lock.acquire(0..10));
        assert!((&mut gone).now_or_never().is_none());
        drop(gone);
        drop(first);
        assert!(lock.acquire(0..10).now_or_never().is_some());
    }
}

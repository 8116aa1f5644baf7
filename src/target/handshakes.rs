//! Connections that have not said yet what they want: so many at once, and the oldest gives way.
//!
//! Whoever opens connections and says nothing can then not keep others out: a client that means it
//! is through its handshake long before as many have come after it.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// The handshakes under way at one target, on all its threads.
pub struct Handshakes {
    max: usize,
    /// Held for one arrival or departure.
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    next: u64,
    /// In order of arrival. Dropping a sender evicts.
    by_arrival: BTreeMap<u64, oneshot::Sender<()>>,
}

/// A place among them, until dropped.
pub struct Slot {
    all: Arc<Handshakes>,
    number: u64,
    evicted: oneshot::Receiver<()>,
}

impl Handshakes {
    /// At most `max` at once; at least one.
    #[must_use]
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { max: max.max(1), waiting: Mutex::default() })
    }

    /// Begins one. If there were too many, the oldest is evicted.
    #[must_use]
    pub fn begin(self: &Arc<Self>) -> Slot {
        let (sender, evicted) = oneshot::channel();
        let mut waiting = self.waiting.lock();
        if waiting.by_arrival.len() >= self.max {
            waiting.by_arrival.pop_first();
        }
        let number = waiting.next;
        waiting.next += 1;
        waiting.by_arrival.insert(number, sender);
        Slot { all: Arc::clone(self), number, evicted }
    }
}

impl Slot {
    /// Completes if it has to give way.
    pub async fn evicted(&mut self) {
        // The sender is dropped, never used.
        let _: Result<(), oneshot::error::RecvError> = (&mut self.evicted).await;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.all.waiting.lock().by_arrival.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn the_oldest_gives_way_and_those_that_are_through_do_not_count() {
        let handshakes = Handshakes::new(2);
        let mut first = handshakes.begin();
        let second = handshakes.begin();
        assert!(first.evicted().now_or_never().is_none());
        drop(second);
        let mut third = handshakes.begin();
        assert!(first.evicted().now_or_never().is_none(), "there was room");
        let mut fourth = handshakes.begin();
        assert!(first.evicted().now_or_never().is_some());
        assert!(third.evicted().now_or_never().is_none());
        assert!(fourth.evicted().now_or_never().is_none());
    }
}

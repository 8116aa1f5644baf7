//! What the NBD target counts, for the management plane to read. Plain atomics; nothing waits.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

/// Of the whole target.
#[derive(Debug, Default)]
pub struct TargetCounters {
    /// Connections accepted since start.
    pub connections_total: AtomicU64,
    /// Connections open now, in the handshake or serving.
    pub connections_open: AtomicU64,
    /// Connections turned away because a limit was reached.
    pub connections_refused: AtomicU64,
    /// Connections that ended before an export was chosen, other than by ABORT.
    pub handshakes_failed: AtomicU64,
}

/// One more of something open, until dropped.
pub(crate) struct Open<'a>(&'a AtomicU64);

impl<'a> Open<'a> {
    /// Counts one more.
    pub(crate) fn new(counter: &'a AtomicU64) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(counter)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

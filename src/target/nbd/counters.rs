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

/// Of one export, over all its connections since the node started.
#[derive(Debug, Default)]
pub struct ExportCounters {
    /// Connections serving it now.
    pub connections_open: AtomicU64,
    /// Connections that ever served it.
    pub connections_total: AtomicU64,
    /// Requests received, refused ones included.
    pub requests: AtomicU64,
    /// Requests answered with an error.
    pub errors: AtomicU64,
    /// Bytes returned by reads.
    pub bytes_read: AtomicU64,
    /// Bytes of completed writes.
    pub bytes_written: AtomicU64,
}

/// What one session counted since it last reported: kept out of the atomics until a batch ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "see ExportCounters")]
pub struct Tally {
    pub requests: u64,
    pub errors: u64,
    pub bytes_read: u64,
    pub bytes_written: u64,
}

impl ExportCounters {
    /// Adds what a session counted.
    pub fn add(&self, tally: Tally) {
        if tally.requests > 0 {
            self.requests.fetch_add(tally.requests, Ordering::Relaxed);
        }
        if tally.errors > 0 {
            self.errors.fetch_add(tally.errors, Ordering::Relaxed);
        }
        if tally.bytes_read > 0 {
            self.bytes_read.fetch_add(tally.bytes_read, Ordering::Relaxed);
        }
        if tally.bytes_written > 0 {
            self.bytes_written.fetch_add(tally.bytes_written, Ordering::Relaxed);
        }
    }
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

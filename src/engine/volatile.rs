//! A layer's volatile write cache: entries that were acknowledged from memory and are not durable yet.
//!
//! Only volumes with `write_cache` have any. Readers look here first, then in the write buffer, then in
//! the map. An entry comes in as it gets its LSN and moves to the write buffer once it is durable,
//! under the layer's lock, so that no reader misses it. What it replaces stays in the write buffer until
//! then: a record that a crash may bring back must reach a segment.
//!
//! Once the journal has failed its entries stay: hosts go on reading what they wrote, and each
//! flush fails.
//!
//! Lock order: journal state → here; layer → here.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use parking_lot::MutexGuard;

use super::index::WriteIndex;
use super::record::BufferedRecord;
use crate::canary::Bug;
use crate::canary::planted;
use crate::units::Lsn;

/// When a change is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acknowledge {
    /// Once it is durable.
    Durable,
    /// As soon as it has its place in the journal, if the layer's cache is enabled by then.
    Early,
}

/// See the module.
#[derive(Default)]
pub struct VolatileCache {
    /// New entries are acknowledged from memory.
    enabled: AtomicBool,
    /// There may be entries: lets readers of all other layers pass without the lock.
    occupied: AtomicBool,
    index: Mutex<WriteIndex>,
    /// The newest entry that ever came in.
    newest: AtomicU64,
}

impl VolatileCache {
    /// Says whether new entries are acknowledged from memory.
    pub fn enable(&self, enabled: bool) {
        self.enabled.store(enabled, Ordering::Release);
    }

    /// Whether new entries are acknowledged from memory.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    /// The newest entry that was acknowledged from memory.
    #[must_use]
    pub fn newest(&self) -> Lsn {
        Lsn(self.newest.load(Ordering::Acquire))
    }

    /// Takes in an entry, newer than all others.
    pub(super) fn insert(&self, lsn: Lsn, records: &[Arc<BufferedRecord>]) {
        let mut index = self.index.lock();
        records.iter().for_each(|record| index.insert(record));
        self.occupied.store(true, Ordering::Release);
        self.newest.store(lsn.0, Ordering::Release);
    }

    /// Lets go of an entry that is durable. The caller holds the layer's lock.
    pub(super) fn remove(&self, records: &[Arc<BufferedRecord>]) {
        let Some(mut index) = self.look() else { return };
        for record in records {
            index.remove(record, record.header.lba.0..record.end_lba());
        }
        self.occupied.store(!index.is_empty(), Ordering::Release);
    }

    /// The entries; `None` if there are none.
    pub(super) fn look(&self) -> Option<MutexGuard<'_, WriteIndex>> {
        let occupied = self.occupied.load(Ordering::Acquire) && !planted(Bug::VolatileUnseen);
        occupied.then(|| self.index.lock())
    }

    /// Lets go of everything.
    pub(super) fn clear(&self) {
        let index = std::mem::take(&mut *self.index.lock());
        drop(index);
    }
}

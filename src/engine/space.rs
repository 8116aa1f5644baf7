//! Space promised at the door.
//!
//! Every accepted record holds a [`Promise`] for its bytes until it is mapped or superseded, so
//! that what was acknowledged can always be written to segments. New data is admitted while live
//! and promised bytes stay below the limit; above it the pod is full (`NoSpace`), which stops new
//! data only: trims, reclaim and checkpoints live on the reserve.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::canary::Bug;
use crate::canary::planted;
use crate::format::node::NODE_ENTRIES;
use crate::format::record::RecordHeader;
use crate::format::record::RecordKind;
use crate::format::unit::UNIT_BODY_BYTES;
use crate::units::bytes_u64;

/// What a leaf of the map that says which blocks are zero takes, header and all: 512 times one of
/// two values, compressed.
const ZEROED_LEAF_BYTES: u64 = 256;

/// What the mapper last knew of the pool, and what is promised.
#[derive(Default)]
pub struct Space {
    /// Bytes of records accepted and not yet mapped or superseded.
    promised_bytes: AtomicU64,
    /// Bytes that live and promised data may occupy together.
    limit_bytes: AtomicU64,
    /// Bytes of live records.
    live_bytes: AtomicU64,
    /// Bytes in free segments beyond the reserve.
    free_bytes: AtomicU64,
    /// Reclaim cannot free anything more as things stand.
    exhausted: AtomicBool,
    /// Maps are being cleared of what was trimmed or deleted.
    clearing: AtomicBool,
    /// What was published last, and the bytes promised then.
    published: Mutex<Option<(Levels, u64)>>,
    /// Woken when any of the above changed.
    pub changed: Notify,
}

/// Room held for a record; given back when dropped.
pub struct Promise {
    space: Arc<Space>,
    bytes: u64,
}

impl Promise {
    /// Takes `bytes` of this promise into one of their own.
    #[must_use]
    pub fn split(&mut self, bytes: u64) -> Self {
        assert!(bytes <= self.bytes, "no more is taken than is there");
        self.bytes -= bytes;
        Self { space: Arc::clone(&self.space), bytes }
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.space.promised_bytes.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

/// What the door says.
pub enum Admission {
    /// Come in.
    Granted(Promise),
    /// Room will come free: wait for [`Space::changed`] and ask again.
    Wait,
    /// The pod is full.
    Full,
}

/// The mapper's view of the pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Levels {
    /// See [`Space`].
    pub limit_bytes: u64,
    /// See [`Space`].
    pub live_bytes: u64,
    /// See [`Space`].
    pub free_bytes: u64,
    /// See [`Space`].
    pub exhausted: bool,
    /// See [`Space`].
    pub clearing: bool,
}

/// What a record is going to take of segments.
#[must_use]
pub fn room_for(header: &RecordHeader) -> u64 {
    match header.kind {
        RecordKind::Data => share_of_unit(header.stride()),
        RecordKind::Zero if header.keep_allocated => {
            let leaf = NODE_ENTRIES as u64;
            (header.lba.0 % leaf + header.blocks).div_ceil(leaf) * ZEROED_LEAF_BYTES
        }
        _ => 0,
    }
}

/// What records of this length take of segments, each: a unit holds a whole number of them. Of 16
/// KiB that do not compress it holds three.
fn share_of_unit(stride: u64) -> u64 {
    let unit = bytes_u64(UNIT_BODY_BYTES);
    unit / (unit / stride).max(1)
}

/// Records of many lengths are packed into units of 64 KiB: on average less than an eighth is lost.
fn with_packing_loss(bytes: u64) -> u64 {
    bytes + bytes / 8
}

impl Space {
    /// Asks for room for `bytes` of records.
    pub fn admit(self: &Arc<Self>, bytes: u64) -> Admission {
        let promised = self.promised_bytes.fetch_add(bytes, Ordering::AcqRel) + bytes;
        let promise = Promise { space: Arc::clone(self), bytes };
        let live = self.live_bytes.load(Ordering::Acquire);
        if planted(Bug::SpaceNotPromised) {
            return Admission::Granted(promise);
        }
        let together = with_packing_loss(live.saturating_add(promised));
        // What is being cleared was given back: the room comes, and nobody is refused until then.
        let clearing = self.clearing.load(Ordering::Acquire);
        let refused = || if clearing { Admission::Wait } else { Admission::Full };
        if together > self.limit_bytes.load(Ordering::Acquire) {
            return refused();
        }
        if with_packing_loss(promised) <= self.free_bytes.load(Ordering::Acquire) {
            return Admission::Granted(promise);
        }
        if self.exhausted.load(Ordering::Acquire) { refused() } else { Admission::Wait }
    }

    /// Holds room for a record that was acknowledged before a restart.
    pub fn hold(self: &Arc<Self>, bytes: u64) -> Promise {
        self.promised_bytes.fetch_add(bytes, Ordering::AcqRel);
        Promise { space: Arc::clone(self), bytes }
    }

    /// Bytes promised now.
    #[must_use]
    pub fn promised_bytes(&self) -> u64 {
        self.promised_bytes.load(Ordering::Acquire)
    }

    /// The limit and the live bytes, as last published.
    #[must_use]
    pub fn levels(&self) -> Levels {
        Levels {
            limit_bytes: self.limit_bytes.load(Ordering::Acquire),
            live_bytes: self.live_bytes.load(Ordering::Acquire),
            free_bytes: self.free_bytes.load(Ordering::Acquire),
            exhausted: self.exhausted.load(Ordering::Acquire),
            clearing: self.clearing.load(Ordering::Acquire),
        }
    }

    /// Whether writers may be waiting for free segments.
    #[must_use]
    pub fn is_short(&self) -> bool {
        with_packing_loss(self.promised_bytes()) >= self.free_bytes.load(Ordering::Acquire)
    }

    /// Publishes the mapper's view and wakes who waits, unless nothing changed: who is woken asks
    /// again and wakes the mapper, which publishes, so both would go round without a pause.
    pub fn publish(&self, levels: Levels) {
        let now = Some((levels, self.promised_bytes()));
        if std::mem::replace(&mut *self.published.lock(), now) == now {
            return;
        }
        self.limit_bytes.store(levels.limit_bytes, Ordering::Release);
        self.live_bytes.store(levels.live_bytes, Ordering::Release);
        self.free_bytes.store(levels.free_bytes, Ordering::Release);
        self.exhausted.store(levels.exhausted, Ordering::Release);
        self.clearing.store(levels.clearing, Ordering::Release);
        self.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_is_woken_when_something_changed_and_only_then() {
        let space = Arc::new(Space::default());
        let levels = Levels { limit_bytes: 1000, free_bytes: 500, ..Levels::default() };
        space.publish(levels);
        let held = space.admit(400);
        space.publish(levels);
        let mut waiting = std::pin::pin!(space.changed.notified());
        assert!(!waiting.as_mut().enable());
        assert!(matches!(space.admit(400), Admission::Wait));
        space.publish(levels);
        assert!(!waiting.as_mut().enable(), "nothing changed");
        drop(held);
        space.publish(levels);
        assert!(waiting.as_mut().enable(), "a promise was given back");
    }

    #[test]
    fn the_door_promises_no_more_than_there_is() {
        let space = Arc::new(Space::default());
        let mut levels = Levels { limit_bytes: 1000, free_bytes: 500, ..Levels::default() };
        space.publish(levels);
        let held = space.admit(400);
        assert!(matches!(held, Admission::Granted(_)));
        assert!(matches!(space.admit(400), Admission::Wait), "room after reclaim");
        assert!(matches!(space.admit(600), Admission::Full), "over the limit");
        levels.exhausted = true;
        space.publish(levels);
        assert!(matches!(space.admit(400), Admission::Full), "reclaim cannot help");
        levels.clearing = true;
        space.publish(levels);
        let admissions = [space.admit(400), space.admit(600)];
        let waits = admissions.iter().all(|admission| matches!(admission, Admission::Wait));
        assert!(waits, "what was trimmed is not free yet");
        drop(admissions);
        drop(held);
        assert!(matches!(space.admit(400), Admission::Granted(_)));
        assert_eq!(space.promised_bytes(), 0, "refused and dropped promises are given back");
    }
}

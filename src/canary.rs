//! Planted bugs: proof that the simulator would catch real ones.
//!
//! With the feature `canary` a test plants one [`Bug`] in its thread; the engine asks [`planted`]
//! at the spot where such a bug would be made. Without the feature the answer is constant and no
//! code is left. `tests/sim/canaries.rs` fails if a bug goes unnoticed.

/// A mistake that could have been made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A batch is acknowledged and visible when it is submitted.
    AckedAtSubmit,
    /// A flush does not wait for what a write cache holds.
    FlushIgnored,
    /// Readers do not look into a write cache.
    VolatileUnseen,
    /// What was acknowledged from memory replaces what is durable in the write buffer.
    VolatileInBuffer,
    /// A batch is acknowledged on m devices instead of m + 1.
    AckedOnTooFew,
    /// Journal batches are written without durability.
    JournalNotDurable,
    /// Batches found on fewer than m + 1 devices are not copied before serving.
    CopiesNotCompleted,
    /// A copy that waits for a device's late copy is counted as late itself.
    WaitingCopyCounted,
    /// The copies made before serving are not flushed.
    CopiesNotFlushed,
    /// The tail moves before the superblocks that make it possible are durable.
    TailBeforeSuperblock,
    /// The checkpoint claims entries that are not mapped yet.
    CutTooHigh,
    /// Regions are reused before the checkpoint that gives them up is durable.
    FreedBeforeCheckpoint,
    /// Regions are reused while a read or heal holds them.
    LeaseIgnored,
    /// Segment ids begin where the last run began.
    IdsReused,
    /// Entries of an older epoch above its end are replayed.
    VoidTailReplayed,
    /// The epoch of a run is not persisted.
    EpochNotPersisted,
    /// A batch is believed when its header is intact.
    BatchBodyUnchecked,
    /// What an older epoch called durable beyond its end counts.
    VoidStampCounted,
    /// Devices that went on without those that were opened by force are taken for stale.
    HalvesMixed,
    /// A missing batch below the durable stamp is taken for the journal's end.
    GapTakenForEnd,
    /// A record is believed when its header is intact.
    PayloadUnchecked,
    /// The place of a record is not part of its checksum.
    PlaceUnchecked,
    /// A unit of another place is used for rebuilding.
    UnitPlaceUnchecked,
    /// The last parity strip is never computed.
    ParityMissing,
    /// A rebuilt unit is wrong in one byte and gets a valid checksum.
    HealedWrong,
    /// Rows are not flushed before the map refers to them.
    RowsNotFlushed,
    /// Superblocks are written without durability.
    SuperblockNotDurable,
    /// Superblocks are written to one device only.
    SuperblockOnOne,
    /// Fewer devices than a majority open a pod.
    MinorityOpens,
    /// A record leaves the buffer while its map node is still being loaded.
    DroppedBeforeMapped,
    /// The records of an entry become visible one by one.
    VisibleByHalves,
    /// A small read is looked up in two parts if it crosses a multiple of 1 MiB.
    ReadCut,
    /// Overlapping requests run at once.
    RangeUnlocked,
    /// Reclaim moves records that are not live.
    DeadMoved,
    /// A read whose segment is gone finds zeroes instead of looking again.
    MovedReadAsZero,
    /// Dirty map nodes are evicted.
    DirtyNodeEvicted,
    /// The door lets everything in.
    SpaceNotPromised,
    /// A large zero entry clears only its first leaf.
    ZeroCutShort,
    /// A leaf that goes as a whole goes from memory only.
    LeafLeftInParent,
    /// Leaves whose parent no higher node points at yet are not found.
    UnlinkedLeafMissed,
    /// A large trim is given up before its leaves are cleared.
    TrimDroppedEarly,
    /// A large trim clears leaves that were changed after it.
    NewerLeafTrimmed,
    /// Checkpoints do not hold the large trims that are under way.
    TrimNotStored,
    /// The superblock of the highest generation wins, whatever its epoch.
    EpochNotCompared,
    /// Of two superblocks of one epoch and generation any wins, not the one that more devices hold.
    CopiesNotCounted,
    /// A scrub does not hold the segment it is in.
    ScrubUnleased,
    /// A scrub takes parity strips for intact.
    ScrubParitySkipped,
    /// A scrub takes damaged units for intact.
    ScrubDamageIgnored,
    /// A scrub takes what it wrote back for healed.
    ScrubHealUnverified,
    /// A scrub does not look at superblocks.
    ScrubSuperblocksSkipped,
}

impl Bug {
    /// All of them.
    pub const ALL: [Self; 50] = [
        Self::AckedAtSubmit,
        Self::FlushIgnored,
        Self::VolatileUnseen,
        Self::VolatileInBuffer,
        Self::AckedOnTooFew,
        Self::JournalNotDurable,
        Self::CopiesNotCompleted,
        Self::WaitingCopyCounted,
        Self::CopiesNotFlushed,
        Self::TailBeforeSuperblock,
        Self::CutTooHigh,
        Self::FreedBeforeCheckpoint,
        Self::LeaseIgnored,
        Self::IdsReused,
        Self::VoidTailReplayed,
        Self::EpochNotPersisted,
        Self::BatchBodyUnchecked,
        Self::VoidStampCounted,
        Self::HalvesMixed,
        Self::GapTakenForEnd,
        Self::PayloadUnchecked,
        Self::PlaceUnchecked,
        Self::UnitPlaceUnchecked,
        Self::ParityMissing,
        Self::HealedWrong,
        Self::RowsNotFlushed,
        Self::SuperblockNotDurable,
        Self::SuperblockOnOne,
        Self::MinorityOpens,
        Self::DroppedBeforeMapped,
        Self::VisibleByHalves,
        Self::ReadCut,
        Self::RangeUnlocked,
        Self::DeadMoved,
        Self::MovedReadAsZero,
        Self::DirtyNodeEvicted,
        Self::SpaceNotPromised,
        Self::ZeroCutShort,
        Self::LeafLeftInParent,
        Self::UnlinkedLeafMissed,
        Self::TrimDroppedEarly,
        Self::NewerLeafTrimmed,
        Self::TrimNotStored,
        Self::EpochNotCompared,
        Self::CopiesNotCounted,
        Self::ScrubUnleased,
        Self::ScrubParitySkipped,
        Self::ScrubDamageIgnored,
        Self::ScrubHealUnverified,
        Self::ScrubSuperblocksSkipped,
    ];
}

#[cfg(feature = "canary")]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Plants a bug in the calling thread, or none.
#[cfg(feature = "canary")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

/// Whether `bug` is planted in this thread.
#[cfg(feature = "canary")]
#[must_use]
pub fn planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// No: this build has no canaries.
#[cfg(not(feature = "canary"))]
#[inline(always)]
#[must_use]
pub const fn planted(_bug: Bug) -> bool {
    false
}

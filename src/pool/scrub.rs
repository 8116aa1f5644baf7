//! Verifying what nobody reads: a row of units at a time, and the superblocks.
//!
//! Every unit carries a checksum over its bytes and over which unit it is, parity units too, so
//! each is verified by itself: rot, a write that was lost and one that went elsewhere all show. What
//! is damaged, or cannot be read, is rebuilt from the others of its row, written back, and read
//! again: a device that forgets what it is given must not count as healed.
//!
//! # Invariants
//! * The caller's lease keeps the regions from being reused from the first read of a row to the last
//!   write: bytes of a segment that is gone never land on its successor.
//! * Of a row, no more than its k + m units are in memory, and one more while it is healed.

use std::sync::atomic::Ordering;

use futures_util::future::join_all;
use weft_api::Damage;

use super::Pool;
use super::member::Member;
use super::read::Lease;
use super::rebuild::UnitRead;
use crate::canary::Bug;
use crate::canary::planted;
use crate::device::AlignedBuf;
use crate::error::Result;
use crate::format::location::Address;
use crate::format::superblock::SLOT_OFFSETS;
use crate::format::superblock::Superblock;
use crate::format::unit::UNIT_BYTES;
use crate::observe::event;
use crate::units::IO_ALIGN;
use crate::units::SegmentId;
use crate::units::bytes_usize;

/// How often a damaged unit is written back before it is given up: what was lost once may be kept
/// the second time, and a device that keeps nothing will not learn it.
const HEAL_TRIES: usize = 2;

/// One unit of a live segment, and where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnitPlace {
    /// Whose unit it is.
    pub segment: SegmentId,
    /// Data strips first, then parity.
    pub strip: usize,
    /// Within the segment.
    pub row: u64,
    /// Index of the device that holds it.
    pub device: usize,
    /// Where on the device.
    pub offset: u64,
}

/// What became of one unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Intact,
    Damaged,
    /// Not on a device in service: a rebuild's business.
    Away,
}

impl Pool {
    /// The segments that are needed, in order of id, and the bytes of their units on devices in
    /// service.
    #[must_use]
    pub fn live_segments(&self) -> Vec<(SegmentId, u64)> {
        let in_service = self.in_service();
        let table = self.table.lock();
        let needed = table.iter().filter(|segment| segment.is_needed());
        let mut segments: Vec<(SegmentId, u64)> = needed
            .map(|segment| {
                let units = segment.entry.rows * segment.strips_in_service(&in_service) as u64;
                (segment.entry.id, units * UNIT_BYTES as u64)
            })
            .collect();
        segments.sort_unstable();
        segments
    }

    /// Every unit of the segments that are needed that is on a device in service: what a scrub
    /// covers, for a look at the devices from outside.
    #[must_use]
    pub fn live_units(&self) -> Vec<UnitPlace> {
        let table = self.table.lock();
        let needed = table.iter().filter(|segment| segment.is_needed());
        let mut units = Vec::new();
        for entry in needed.map(|segment| &segment.entry) {
            for (strip, place) in entry.places.iter().enumerate() {
                let Some(place) = *place else { continue };
                let device = usize::from(place.device);
                if !self.members.get(device).is_some_and(|member| member.in_service()) {
                    continue;
                }
                let start = self.place_offset(place);
                units.extend((0..entry.rows).map(|row| {
                    let offset = start + row * UNIT_BYTES as u64;
                    UnitPlace { segment: entry.id, strip, row, device, offset }
                }));
            }
        }
        units
    }

    /// Verifies row `row` of a segment, and heals what is damaged. `None` if the segment is gone or
    /// has no such row, or nothing needs it any more.
    pub async fn scrub_row(&self, segment: SegmentId, row: u64) -> Option<Damage> {
        let mut lease = self.lease_row(segment, row)?;
        if planted(Bug::ScrubUnleased) {
            lease.let_go();
            self.env.sleep(std::time::Duration::from_millis(50)).await;
        }
        let strips = 0..self.geometry.strips();
        let verdicts = join_all(strips.map(|strip| self.verdict(&lease, strip, row))).await;
        let mut damage = Damage::default();
        for (strip, verdict) in verdicts.into_iter().enumerate() {
            match verdict {
                Verdict::Intact => damage.verified += 1,
                Verdict::Damaged => {
                    damage.found += 1;
                    match self.heal_and_verify(&lease, strip, row).await {
                        true => damage.healed += 1,
                        false => damage.left += 1,
                    }
                }
                Verdict::Away => {}
            }
        }
        Some(damage)
    }

    /// Holds a segment for one of its rows.
    fn lease_row(&self, segment: SegmentId, row: u64) -> Option<Lease<'_>> {
        let there = {
            let table = self.table.lock();
            let segment = table.get(segment);
            segment.is_some_and(|segment| segment.is_needed() && row < segment.entry.rows)
        };
        if there { self.lease(segment) } else { None }
    }

    async fn verdict(&self, lease: &Lease<'_>, strip: usize, row: u64) -> Verdict {
        if planted(Bug::ScrubParitySkipped) && strip >= self.geometry.data_strips {
            return Verdict::Intact;
        }
        match self.look_at_unit(lease, strip, row).await {
            UnitRead::Intact(..) => Verdict::Intact,
            UnitRead::Away => Verdict::Away,
            UnitRead::Damaged if planted(Bug::ScrubDamageIgnored) => Verdict::Intact,
            UnitRead::Damaged => Verdict::Damaged,
            // Not every failed read is a bad place: only one that fails again.
            UnitRead::Unreadable => match self.look_at_unit(lease, strip, row).await {
                UnitRead::Intact(..) => Verdict::Intact,
                UnitRead::Damaged | UnitRead::Unreadable => Verdict::Damaged,
                UnitRead::Away => Verdict::Away,
            },
        }
    }

    /// Writes a unit anew and reads it back. False if it is no better than it was.
    async fn heal_and_verify(&self, lease: &Lease<'_>, strip: usize, row: u64) -> bool {
        let address = Address { segment: lease.segment, strip, byte: row * UNIT_BYTES as u64 };
        let Some((member, _)) = self.strip_member(lease, strip) else { return false };
        let unit = format_args!("segment {}, strip {strip}, row {row}", lease.segment.0);
        let message = format_args!("{unit} is damaged, in a scrub");
        event::raise(event::DAMAGE_FOUND, member.name(), message);
        for _ in 0..HEAL_TRIES {
            if !self.heal_unit(lease, address).await {
                return false;
            }
            if planted(Bug::ScrubHealUnverified)
                || matches!(self.look_at_unit(lease, strip, row).await, UnitRead::Intact(..))
            {
                return true;
            }
        }
        let message = format_args!("{unit} is still damaged after it was written back");
        event::raise(event::DAMAGE_LEFT, member.name(), message);
        false
    }

    /// Verifies both superblocks of every device in service; if one is damaged, writes all anew.
    pub async fn scrub_superblocks(&self) -> Damage {
        let mut damage = self.look_at_superblocks().await;
        if damage.found == 0 {
            return damage;
        }
        damage.left = match self.commit_to_both_slots().await {
            Ok(()) => self.look_at_superblocks().await.found.min(damage.found),
            Err(error) => {
                event::raise(event::DAMAGE_LEFT, "pod", error.chain());
                damage.found
            }
        };
        damage.healed = damage.found - damage.left;
        damage
    }

    async fn commit_to_both_slots(&self) -> Result<()> {
        for _slot in SLOT_OFFSETS {
            self.commit_superblock(|_| {}).await?;
        }
        Ok(())
    }

    /// Counts superblocks that are as they were written, and those that are not.
    ///
    /// # Ordering
    /// Nothing is committed meanwhile.
    async fn look_at_superblocks(&self) -> Damage {
        let head = self.head_locked().await;
        let in_service = self.members.iter().filter(|member| member.in_service());
        let mut damage = Damage::default();
        for member in in_service {
            let newest = member.slot.load(Ordering::Acquire);
            for slot in 0..SLOT_OFFSETS.len() as u64 {
                let generation = if slot == newest { Some(head.generation) } else { None };
                match superblock_is_intact(member, slot, generation).await {
                    Some(true) => damage.verified += 1,
                    Some(false) => {
                        damage.found += 1;
                        let message = format_args!("superblock {slot} is damaged, in a scrub");
                        event::raise(event::DAMAGE_FOUND, member.name(), message);
                    }
                    None => {}
                }
            }
        }
        damage
    }
}

/// Whether a slot holds a superblock of this device: of that `generation`, if one is named.
/// `None`: the slot was never written, or its device is out of service.
async fn superblock_is_intact(member: &Member, slot: u64, generation: Option<u64>) -> Option<bool> {
    let read = member.read(SLOT_OFFSETS[bytes_usize(slot)], bytes_usize(IO_ALIGN)).await;
    let bytes: AlignedBuf = match read {
        Ok(bytes) => bytes,
        Err(_) => return member.in_service().then_some(false),
    };
    if generation.is_none() && bytes.iter().all(|byte| *byte == 0) {
        return None;
    }
    let intact = Superblock::decode(&bytes).is_ok_and(|superblock| {
        superblock.device_uuid == member.uuid
            && generation.is_none_or(|generation| superblock.generation == generation)
    });
    Some(intact)
}

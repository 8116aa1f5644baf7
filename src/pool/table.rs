//! The segment table in memory: every segment, its places and live blocks, and the free regions.
//!
//! # Invariants
//! * A region is free, or belongs to exactly one segment in `segments` or `pending_free`.
//! * `live_blocks` of a segment equals the map entries and node pointers into it; only the mapper
//!   changes it, together with the entry.
//! * A segment leaves `pending_free` only after a checkpoint that does not name it is durable, and
//!   while no lease holds it.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use rustc_hash::FxHashMap;

use super::Geometry;
use crate::canary::Bug;
use crate::canary::planted;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::format::table::PAGE_ENTRIES;
use crate::format::table::Place;
use crate::format::table::SegmentEntry;
use crate::units::SegmentId;

mod census;

use census::Census;
use census::Phase;
pub use census::Redundancy;

/// A segment in memory.
#[derive(Clone, Debug)]
pub struct Segment {
    /// As stored.
    pub entry: SegmentEntry,
    /// Where in the table's pages it is stored; `None` for metadata segments.
    slot: Option<usize>,
    /// Still being written; never a victim, never freed.
    pub open: bool,
    /// Some of it is beyond repair, so it cannot be emptied: not worth another try before the pod is
    /// opened again, perhaps with devices that are away now.
    pub damaged: bool,
    /// Had live blocks that are gone since the last durable checkpoint, which still refers to them.
    emptied: bool,
    /// Readers and healers in it; its regions are not reused meanwhile.
    leases: u32,
}

impl Segment {
    /// Whether something refers to it: the maps, or what would be recovered after a crash.
    #[must_use]
    pub fn is_needed(&self) -> bool {
        self.entry.live_blocks > 0 || self.emptied
    }

    /// Estimate of the bytes of the records its live blocks are in: their share of all.
    #[must_use]
    pub fn live_bytes(&self) -> u64 {
        let total = self.entry.blocks_written.max(self.entry.live_blocks).max(1);
        let live = u128::from(self.entry.bytes_written) * u128::from(self.entry.live_blocks);
        u64::try_from(live / u128::from(total)).unwrap_or(u64::MAX)
    }

    /// How many of its strips are on devices in service.
    #[must_use]
    pub fn strips_in_service(&self, in_service: &[bool]) -> usize {
        let there = |place: &&Place| in_service.get(usize::from(place.device)) == Some(&true);
        self.entry.places.iter().flatten().filter(there).count()
    }
}

/// The table.
pub struct SegmentTable {
    geometry: Geometry,
    segments: FxHashMap<SegmentId, Segment>,
    /// Which segment each slot of the table's pages holds.
    slots: Vec<Option<SegmentId>>,
    free_slots: BTreeSet<usize>,
    dirty_pages: BTreeSet<usize>,
    /// Segments marked as emptied, those that are gone by now included.
    emptied: Vec<SegmentId>,
    free_regions: Vec<BTreeSet<u32>>,
    pending_free: Vec<Segment>,
    regions_total: Vec<u64>,
    next_id: u64,
    id_limit: u64,
    live_bytes: u64,
    census: Census,
}

impl SegmentTable {
    /// A table without segments; ids are handed out from `first_id`.
    #[must_use]
    pub fn new(geometry: Geometry, regions: Vec<u64>, first_id: u64) -> Self {
        let free = |count: &u64| (0..u32::try_from(*count).unwrap_or(u32::MAX)).collect();
        Self {
            geometry,
            segments: FxHashMap::default(),
            slots: Vec::new(),
            free_slots: BTreeSet::new(),
            dirty_pages: BTreeSet::new(),
            emptied: Vec::new(),
            free_regions: regions.iter().map(free).collect(),
            pending_free: Vec::new(),
            regions_total: regions,
            next_id: first_id,
            id_limit: first_id,
            live_bytes: 0,
            census: Census::default(),
        }
    }

    /// Takes in a segment that the checkpoint names. `page` is where it was stored.
    ///
    /// # Errors
    /// `Corrupt` if it contradicts what is already there.
    pub fn load(&mut self, mut entry: SegmentEntry, slot: Option<usize>) -> Result<()> {
        let contradiction = |what| {
            Error::new(ErrorKind::Corrupt, "load segment table")
                .context(format_args!("segment {}: {what}", entry.id))
        };
        if self.segments.contains_key(&entry.id) || entry.rows > self.geometry.rows() {
            return Err(contradiction("listed twice or too long"));
        }
        for strip in &mut entry.places {
            let Some(place) = *strip else { continue };
            let device = usize::from(place.device);
            let total = self.regions_total.get(device).copied().unwrap_or(0);
            // A missing device has no regions to claim; what lies there is rebuilt when read.
            if total == 0 {
                continue;
            }
            if u64::from(place.region) >= total {
                // A shorter device took the place of the one that had it.
                *strip = None;
                self.dirty_pages.extend(slot.map(|slot| slot / PAGE_ENTRIES));
            } else if !self.free_regions[device].remove(&place.region) {
                return Err(contradiction("its place is taken"));
            }
        }
        if let Some(slot) = slot {
            if slot >= self.slots.len() {
                self.free_slots.extend(self.slots.len()..slot);
                self.slots.resize(slot + 1, None);
            }
            self.free_slots.remove(&slot);
            self.slots[slot] = Some(entry.id);
        }
        let segment =
            Segment { entry, slot, open: false, damaged: false, emptied: false, leases: 0 };
        self.live_bytes += segment.live_bytes();
        self.census.came(&segment);
        self.segments.insert(segment.entry.id, segment);
        Ok(())
    }

    /// Takes a metadata segment out again that [`SegmentTable::load`] took in.
    pub fn unload(&mut self, id: SegmentId) {
        let Some(segment) = self.segments.remove(&id) else { return };
        self.live_bytes -= segment.live_bytes();
        self.census.went(&segment);
        for place in segment.entry.places.iter().flatten() {
            let device = usize::from(place.device);
            if self.regions_total.get(device).is_some_and(|total| *total > 0) {
                self.free_regions[device].insert(place.region);
            }
        }
    }

    /// Makes every strip on `device` absent: a blank device took its place.
    pub fn strip_device(&mut self, device: usize) {
        self.census.strips_changed();
        for segment in self.segments.values_mut() {
            for place in &mut segment.entry.places {
                let Some(lost) = place.filter(|place| usize::from(place.device) == device) else {
                    continue;
                };
                *place = None;
                self.free_regions[device].insert(lost.region);
                self.dirty_pages.extend(segment.slot.map(|slot| slot / PAGE_ENTRIES));
            }
        }
    }

    /// Ids up to here may be handed out: the superblock that says so is durable.
    pub fn extend_ids(&mut self, id_limit: u64) {
        self.id_limit = self.id_limit.max(id_limit);
    }

    /// The first id never handed out.
    #[must_use]
    pub fn next_id(&self) -> u64 {
        self.next_id
    }

    /// Whether the next allocation needs a higher limit in the superblocks first.
    #[must_use]
    pub fn ids_exhausted(&self) -> bool {
        self.next_id >= self.id_limit
    }

    /// Opens a new segment on devices that are `usable`, emptiest first; with fewer usable devices
    /// than strips, the last parity strips are absent. `None`: no room.
    pub fn allocate(&mut self, metadata: bool, usable: &[bool]) -> Option<SegmentId> {
        self.allocate_from(metadata, usable, &vec![0; usable.len()])
    }

    /// As [`SegmentTable::allocate`], in the last `reserved` regions of each device. Other segments
    /// get them last.
    pub fn allocate_reserved(
        &mut self,
        metadata: bool,
        usable: &[bool],
        reserved: u64,
    ) -> Option<SegmentId> {
        let first = |total: &u64| u32::try_from(total.saturating_sub(reserved)).unwrap_or(u32::MAX);
        let first: Vec<u32> = self.regions_total.iter().map(first).collect();
        self.allocate_from(metadata, usable, &first)
    }

    /// `first`: of each device, the first region that may be taken.
    fn allocate_from(
        &mut self,
        metadata: bool,
        usable: &[bool],
        first: &[u32],
    ) -> Option<SegmentId> {
        if self.ids_exhausted() {
            return None;
        }
        let wanted = self.strips_wanted(usable)?;
        let free = |device: &usize| self.free_regions[*device].range(first[*device]..).next();
        let mut candidates: Vec<usize> =
            (0..usable.len()).filter(|d| usable[*d] && free(d).is_some()).collect();
        if candidates.len() < wanted {
            return None;
        }
        candidates
            .sort_by_key(|device| (std::cmp::Reverse(self.free_regions[*device].len()), *device));
        candidates.truncate(wanted);
        // Turn the order with the id, so that parity is spread over all devices.
        candidates.sort_unstable();
        let turn = crate::units::bytes_usize(self.next_id % wanted as u64);
        candidates.rotate_left(turn);

        let id = SegmentId(self.next_id);
        self.next_id += 1;
        let mut places = vec![None; self.geometry.strips()];
        for (place, device) in places.iter_mut().zip(&candidates) {
            let regions = &mut self.free_regions[*device];
            let region = *regions.range(first[*device]..).next()?;
            regions.remove(&region);
            *place = Some(Place { device: u16::try_from(*device).ok()?, region });
        }
        let entry = SegmentEntry {
            id,
            metadata,
            rows: 0,
            live_blocks: 0,
            blocks_written: 0,
            bytes_written: 0,
            places,
        };
        let slot = (!metadata).then(|| self.take_slot(id));
        let segment =
            Segment { entry, slot, open: true, damaged: false, emptied: false, leases: 0 };
        self.census.came(&segment);
        self.segments.insert(id, segment);
        Some(id)
    }

    /// Strips a new segment gets on the usable devices; `None` if fewer than k are usable.
    fn strips_wanted(&self, usable: &[bool]) -> Option<usize> {
        let count = usable.iter().filter(|usable| **usable).count();
        (count >= self.geometry.data_strips).then(|| count.min(self.geometry.strips()))
    }

    fn take_slot(&mut self, id: SegmentId) -> usize {
        let slot = self.free_slots.pop_first().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[slot] = Some(id);
        self.dirty_pages.insert(slot / PAGE_ENTRIES);
        slot
    }

    /// How many more segments could be allocated on the `usable` devices.
    #[must_use]
    pub fn free_segments(&self, usable: &[bool]) -> u64 {
        let Some(wanted) = self.strips_wanted(usable) else { return 0 };
        let free: Vec<u64> = (0..usable.len())
            .filter(|device| usable[*device])
            .map(|device| self.free_regions[device].len() as u64)
            .collect();
        // The most segments t such that the devices can supply t strips to each of `wanted` seats.
        let fits = |t: u64| free.iter().map(|f| f.min(&t)).sum::<u64>() >= t * wanted as u64;
        let (mut low, mut high) = (0, free.iter().sum::<u64>() / wanted as u64);
        while low < high {
            let middle = (low + high).div_ceil(2);
            if fits(middle) { low = middle } else { high = middle - 1 }
        }
        low
    }

    /// As [`SegmentTable::free_segments`], if any `lost` of the `usable` devices were lost.
    #[must_use]
    pub fn free_segments_after(&self, usable: &[bool], lost: usize) -> u64 {
        let mut emptiest: Vec<usize> = (0..usable.len()).filter(|device| usable[*device]).collect();
        emptiest.sort_by_key(|device| std::cmp::Reverse(self.free_regions[*device].len()));
        let mut left = usable.to_vec();
        emptiest.into_iter().take(lost).for_each(|device| left[device] = false);
        self.free_segments(&left)
    }

    /// Segments the pod could hold with every device present and empty.
    #[must_use]
    pub fn segments_total(&self) -> u64 {
        let present = self.regions_total.iter().filter(|total| **total > 0).count() as u64;
        let strips = (self.geometry.strips() as u64).min(present).max(1);
        self.regions_total.iter().sum::<u64>() / strips
    }

    /// The segment, if the table knows it.
    #[must_use]
    pub fn get(&self, id: SegmentId) -> Option<&Segment> {
        self.segments.get(&id)
    }

    /// All segments, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = &Segment> {
        self.segments.values()
    }

    /// The metadata segments, in order of id.
    pub fn metadata(&self) -> impl Iterator<Item = &Segment> {
        self.census.metadata().iter().map(|id| &self.segments[id])
    }

    /// How well the segments that are needed are protected.
    #[must_use]
    pub fn redundancy(&mut self, in_service: &[bool]) -> Redundancy {
        let segments = self.segments.values().chain(&self.pending_free);
        self.census.redundancy(segments, self.geometry, in_service)
    }

    /// The closed segments with live blocks, but those known as damaged, that have fewer strips in
    /// service than they could have on the `usable` devices: the oldest, and how many there are.
    #[must_use]
    pub fn weak_segments(
        &mut self,
        in_service: &[bool],
        usable: &[bool],
    ) -> Option<(SegmentId, u64)> {
        let weak = self.census.weak(self.segments.values(), self.geometry, in_service, usable);
        weak.first().map(|oldest| (*oldest, weak.len() as u64))
    }

    /// Estimate of the bytes that live blocks occupy.
    #[must_use]
    pub fn live_bytes(&self) -> u64 {
        self.live_bytes
    }

    /// Segments that are empty but not yet free.
    #[must_use]
    pub fn empty_segments(&self) -> usize {
        self.pending_free.len() + self.census.empty().len()
    }

    fn change(&mut self, id: SegmentId, change: impl FnOnce(&mut Segment)) {
        let Some(segment) = self.segments.get_mut(&id) else {
            panic!("segment {id} is referred to but not in the table");
        };
        let (bytes_before, before) = (segment.live_bytes(), Phase::of(segment));
        change(segment);
        if before.lives() && segment.entry.live_blocks == 0 && !segment.emptied {
            segment.emptied = true;
            self.emptied.push(id);
        }
        self.live_bytes = self.live_bytes - bytes_before + segment.live_bytes();
        self.census.changed(segment, before);
        if let Some(slot) = segment.slot {
            self.dirty_pages.insert(slot / PAGE_ENTRIES);
        }
    }

    /// Rows up to `rows` are durable, with records of so many more blocks and bytes.
    pub fn rows_written(&mut self, id: SegmentId, rows: u64, blocks: u64, bytes: u64) {
        self.change(id, |segment| {
            segment.entry.rows = rows;
            segment.entry.blocks_written += blocks;
            segment.entry.bytes_written += bytes;
        });
    }

    /// Map entries or node pointers now point into the segment.
    pub fn add_live(&mut self, id: SegmentId, blocks: u64) {
        self.change(id, |segment| segment.entry.live_blocks += blocks);
    }

    /// Map entries or node pointers no longer point into the segment.
    pub fn remove_live(&mut self, id: SegmentId, blocks: u64) {
        self.change(id, |segment| {
            assert!(segment.entry.live_blocks >= blocks, "segment {id} has fewer live blocks");
            segment.entry.live_blocks -= blocks;
        });
    }

    /// No more rows will be written to it.
    pub fn close(&mut self, id: SegmentId) {
        self.change(id, |segment| segment.open = false);
    }

    /// What still lives in the segment is beyond repair.
    pub fn mark_damaged(&mut self, id: SegmentId) {
        let Some(segment) = self.segments.get_mut(&id) else { return };
        self.census.went(segment);
        segment.damaged = true;
        self.census.came(segment);
    }

    /// Holds the segment's regions and says where they are; `None` if it is gone.
    pub fn lease(&mut self, id: SegmentId) -> Option<Vec<Option<Place>>> {
        let segment = self.segments.get_mut(&id)?;
        segment.leases += 1;
        Some(segment.entry.places.clone())
    }

    /// Ends a lease.
    pub fn release(&mut self, id: SegmentId) {
        let pending = self.pending_free.iter_mut().find(|segment| segment.entry.id == id);
        let Some(segment) = self.segments.get_mut(&id).or(pending) else {
            if planted(Bug::LeaseIgnored) {
                return;
            }
            panic!("segment {id} was freed while leased");
        };
        segment.leases -= 1;
    }

    /// Takes segments without a live block out of the table, to be freed once a checkpoint that
    /// does not name them is durable.
    pub fn retire_empty(&mut self) {
        while let Some(id) = self.census.empty().first() {
            let segment = self.segments.remove(id).expect("counted while it is in the table");
            self.census.retired(&segment);
            if let Some(slot) = segment.slot {
                self.slots[slot] = None;
                self.free_slots.insert(slot);
                self.dirty_pages.insert(slot / PAGE_ENTRIES);
            }
            self.pending_free.push(segment);
        }
    }

    /// A checkpoint that refers only to what lives now is durable.
    fn forget_emptied(&mut self) {
        for id in std::mem::take(&mut self.emptied) {
            if let Some(segment) = self.segments.get_mut(&id) {
                let before = Phase::of(segment);
                segment.emptied = false;
                self.census.changed(segment, before);
            }
        }
        for segment in self.pending_free.iter_mut().filter(|segment| segment.emptied) {
            self.census.freed(segment);
            segment.emptied = false;
        }
    }

    /// Frees the regions of retired segments up to `retired`, a count taken before the checkpoint
    /// that is now durable. Returns the freed places.
    pub fn free_retired(&mut self, retired: usize) -> Vec<Place> {
        self.forget_emptied();
        let rest = self.pending_free.split_off(retired.min(self.pending_free.len()));
        let candidates = std::mem::replace(&mut self.pending_free, rest);
        let mut freed = Vec::new();
        for segment in candidates {
            if segment.leases > 0 && !planted(Bug::LeaseIgnored) {
                self.pending_free.insert(0, segment);
                continue;
            }
            for place in segment.entry.places.iter().flatten() {
                let device = usize::from(place.device);
                if self.regions_total[device] > 0 {
                    self.free_regions[device].insert(place.region);
                    freed.push(*place);
                }
            }
        }
        freed
    }

    /// Retired segments whose regions wait for a checkpoint.
    #[must_use]
    pub fn retired(&self) -> usize {
        self.pending_free.len()
    }

    /// Pages changed since the last call, with their entries. A page may be empty.
    pub fn take_dirty_pages(&mut self) -> BTreeMap<usize, Vec<SegmentEntry>> {
        let pages = std::mem::take(&mut self.dirty_pages);
        pages.into_iter().map(|page| (page, self.page(page))).collect()
    }

    /// Marks a page as changed: its stored copy is about to move.
    pub fn mark_page_dirty(&mut self, page: usize) {
        self.dirty_pages.insert(page);
    }

    fn page(&self, page: usize) -> Vec<SegmentEntry> {
        let slots = self.slots.iter().skip(page * PAGE_ENTRIES).take(PAGE_ENTRIES);
        slots.flatten().map(|id| self.segments[id].entry.clone()).collect()
    }

    /// Pages the table has.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.slots.len().div_ceil(PAGE_ENTRIES)
    }

    /// Entries of the metadata segments, for the checkpoint root.
    #[must_use]
    pub fn metadata_entries(&self) -> Vec<SegmentEntry> {
        self.metadata().map(|segment| segment.entry.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::format::PodId;

    fn table() -> SegmentTable {
        let geometry = Geometry {
            pod: PodId([0; 16]),
            devices: 6,
            data_strips: 4,
            parity_strips: 2,
            strip_bytes: 1 << 20,
            journal_bytes: 1 << 20,
        };
        let mut table = SegmentTable::new(geometry, vec![3; 6], 1);
        table.extend_ids(100);
        table
    }

    #[test]
    fn a_region_is_reused_only_after_retiring_and_a_checkpoint() {
        let mut table = table();
        let usable = [true; 6];
        let ids: Vec<_> = (0..3).map(|_| table.allocate(false, &usable).expect("room")).collect();
        assert_eq!(table.allocate(false, &usable), None);
        table.close(ids[0]);
        let lease = table.lease(ids[0]);
        assert!(lease.is_some());
        table.retire_empty();
        assert_eq!(table.allocate(false, &usable), None, "no checkpoint yet");
        assert!(table.free_retired(1).is_empty(), "leased");
        table.release(ids[0]);
        assert_eq!(table.free_retired(1).len(), 6);
        assert_eq!(table.allocate(false, &usable), Some(SegmentId(4)), "a new id");
    }

    #[test]
    fn reserved_regions_are_the_last_that_others_get() {
        let mut table = table();
        let usable = [true; 6];
        let region = |table: &SegmentTable, id| {
            table.get(id).and_then(|segment| segment.entry.places[0]).map(|place| place.region)
        };
        let id = table.allocate_reserved(true, &usable, 1).expect("one of three");
        assert_eq!(region(&table, id), Some(2));
        assert_eq!(table.allocate_reserved(true, &usable, 1), None);
        for expected in 0..2 {
            let id = table.allocate(false, &usable).expect("two of three");
            assert_eq!(region(&table, id), Some(expected));
        }
        assert_eq!(table.allocate(false, &usable), None);
    }

    #[test]
    fn strips_on_a_device_that_takes_no_more_count_all_the_same() {
        let geometry = Geometry { devices: 8, ..table().geometry };
        let mut table = SegmentTable::new(geometry, vec![3; 8], 1);
        table.extend_ids(100);
        let in_service = [true; 8];
        let id = table.allocate(false, &in_service).expect("room");
        table.rows_written(id, 1, 8, 8 << 12);
        table.add_live(id, 8);
        table.close(id);
        let device = table.get(id).and_then(|s| s.entry.places[0]).expect("whole").device;
        let mut left = in_service;
        left[usize::from(device)] = false;
        assert_eq!(table.weak_segments(&in_service, &left), None, "one more is not needed");
        assert_eq!(table.weak_segments(&left, &left), Some((id, 1)), "it is lost");
    }

    #[test]
    fn missing_devices_leave_parity_absent_and_too_few_refuse() {
        let mut table = table();
        let usable = [true, false, true, true, true, true];
        let id = table.allocate(false, &usable).expect("five devices hold k strips");
        let places = &table.get(id).expect("known").entry.places;
        assert_eq!(places.iter().flatten().count(), 5);
        assert!(places[5].is_none() && places.iter().flatten().all(|place| place.device != 1));
        assert_eq!(table.allocate(false, &[true, true, true, false, false, false]), None);
    }

    #[test]
    fn spare_devices_are_not_counted_on() {
        let geometry = Geometry { data_strips: 2, parity_strips: 1, ..table().geometry };
        let table = SegmentTable::new(geometry, vec![3, 3, 3, 3, 3, 9], 1);
        let all = [true; 6];
        assert_eq!(table.free_segments(&all), 7, "9 regions serve at most 7 segments");
        assert_eq!(table.free_segments_after(&all, 0), 7);
        assert_eq!(table.free_segments_after(&all, 1), 5, "the emptiest is lost");
        assert_eq!(table.free_segments_after(&all, 4), 3);
    }

    /// What changes a table, and who looks at it.
    #[derive(Clone, Debug)]
    enum Step {
        Allocate { metadata: bool, usable: [bool; 6] },
        Close { segment: usize },
        Live { segment: usize, blocks: u64 },
        Dead { segment: usize },
        Retire,
        Checkpoint,
        Strip { device: usize },
        Damage { segment: usize },
        Look { in_service: [bool; 6] },
    }

    fn step() -> impl Strategy<Value = Step> {
        let mostly = || proptest::array::uniform6(proptest::bool::weighted(0.9));
        prop_oneof![
            4 => (any::<bool>(), mostly())
                .prop_map(|(metadata, usable)| Step::Allocate { metadata, usable }),
            4 => (0..20_usize).prop_map(|segment| Step::Close { segment }),
            4 => (0..20_usize, 0..3_u64)
                .prop_map(|(segment, blocks)| Step::Live { segment, blocks }),
            2 => (0..20_usize).prop_map(|segment| Step::Dead { segment }),
            1 => Just(Step::Retire),
            1 => Just(Step::Checkpoint),
            1 => (0..6_usize).prop_map(|device| Step::Strip { device }),
            1 => (0..20_usize).prop_map(|segment| Step::Damage { segment }),
            4 => mostly().prop_map(|in_service| Step::Look { in_service }),
        ]
    }

    fn by_walking(table: &SegmentTable, in_service: &[bool]) -> Redundancy {
        let segments = table.iter().chain(&table.pending_free);
        let needed = segments.filter(|segment| segment.is_needed());
        let strips: Vec<_> = needed.map(|segment| segment.strips_in_service(in_service)).collect();
        Redundancy {
            strips_min: strips.iter().copied().min().unwrap_or(6),
            segments: strips.len() as u64,
            degraded: strips.iter().filter(|strips| **strips < 6).count() as u64,
        }
    }

    fn weak_by_walking(table: &SegmentTable, usable: &[bool]) -> Option<(SegmentId, u64)> {
        let wanted = usable.iter().filter(|usable| **usable).count().min(6);
        let weak = |s: &&Segment| {
            let closed = !s.open && !s.damaged;
            closed && s.entry.live_blocks > 0 && s.strips_in_service(usable) < wanted
        };
        let weak: Vec<_> = table.iter().filter(weak).map(|segment| segment.entry.id).collect();
        weak.iter().min().map(|oldest| (*oldest, weak.len() as u64))
    }

    proptest! {
        #[test]
        fn what_is_counted_is_what_a_walk_would_find(steps in vec(step(), 1..60)) {
            let mut table = SegmentTable::new(table().geometry, vec![12; 6], 1);
            table.extend_ids(100);
            let mut in_service = [true; 6];
            for step in steps {
                let some = |table: &SegmentTable, segment: usize| {
                    let mut ids: Vec<_> = table.iter().map(|segment| segment.entry.id).collect();
                    ids.sort_unstable();
                    ids.get(segment).copied()
                };
                match step {
                    Step::Allocate { metadata, usable } => {
                        table.allocate(metadata, &usable);
                    }
                    Step::Close { segment } => {
                        if let Some(id) = some(&table, segment) {
                            table.close(id);
                        }
                    }
                    Step::Live { segment, blocks } => {
                        if let Some(id) = some(&table, segment) {
                            table.add_live(id, blocks);
                        }
                    }
                    Step::Dead { segment } => {
                        if let Some(id) = some(&table, segment) {
                            let live = table.get(id).expect("listed").entry.live_blocks;
                            table.remove_live(id, live);
                        }
                    }
                    Step::Retire => table.retire_empty(),
                    Step::Checkpoint => {
                        table.free_retired(table.retired());
                    }
                    Step::Strip { device } => table.strip_device(device),
                    Step::Damage { segment } => {
                        if let Some(id) = some(&table, segment) {
                            table.mark_damaged(id);
                        }
                    }
                    Step::Look { in_service: seen } => in_service = seen,
                }
                prop_assert_eq!(table.redundancy(&in_service), by_walking(&table, &in_service));
                prop_assert_eq!(
                    table.weak_segments(&in_service, &in_service),
                    weak_by_walking(&table, &in_service)
                );
                let is_empty = |s: &&Segment| !s.open && s.entry.live_blocks == 0;
                let empty = table.iter().filter(is_empty).count() + table.retired();
                prop_assert_eq!(table.empty_segments(), empty);
                let mut metadata: Vec<_> = table.iter().filter(|s| s.entry.metadata).collect();
                metadata.sort_unstable_by_key(|segment| segment.entry.id);
                let ids = |s: &Segment| s.entry.id;
                prop_assert!(table.metadata().map(ids).eq(metadata.into_iter().map(ids)));
            }
        }
    }

    #[test]
    fn what_was_emptied_is_needed_until_a_checkpoint_says_otherwise() {
        let mut table = table();
        let id = table.allocate(false, &[true, true, true, true, true, false]).expect("room");
        table.rows_written(id, 1, 8, 8 << 12);
        table.add_live(id, 8);
        table.close(id);
        let degraded = |table: &mut SegmentTable| table.redundancy(&[true; 6]).degraded;
        assert_eq!(degraded(&mut table), 1);
        table.remove_live(id, 8);
        assert_eq!(degraded(&mut table), 1, "a crash brings it back");
        table.retire_empty();
        assert_eq!(degraded(&mut table), 1, "still");
        table.free_retired(0);
        assert_eq!(degraded(&mut table), 0);
    }

    #[test]
    fn live_bytes_follow_the_blocks() {
        let mut table = table();
        let id = table.allocate(false, &[true; 6]).expect("room");
        table.rows_written(id, 2, 100, 8 * 65536);
        table.add_live(id, 100);
        assert_eq!(table.live_bytes(), 8 * 65536);
        table.remove_live(id, 50);
        assert_eq!(table.live_bytes(), 4 * 65536);
    }
}

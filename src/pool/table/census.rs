//! What the table knows of its segments without a walk over all of them.
//!
//! A full pod has a million segments, and most questions are asked after each checkpoint or each
//! segment that a rebuild moves: a walk for each would make a rebuild quadratic. So the table says
//! here when a segment comes, goes, or begins or ceases to be open or to have live blocks; what
//! depends on the devices is counted by a walk when they have changed, and kept from then on.

use std::collections::BTreeSet;

use super::Geometry;
use super::Segment;
use crate::units::SegmentId;

/// How well the segments that are needed are protected: those with live blocks, and those that had
/// some when the last checkpoint was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Redundancy {
    /// Fewest strips in service that any of them has; all, if there is none.
    pub strips_min: usize,
    /// How many there are.
    pub segments: u64,
    /// Of them, with fewer strips in service than they should have.
    pub degraded: u64,
}

/// Where a segment is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Phase {
    /// Still being written.
    open: bool,
    /// It has live blocks.
    lives: bool,
    /// See [`Segment::is_needed`].
    needed: bool,
}

impl Phase {
    pub(super) fn of(segment: &Segment) -> Self {
        let lives = segment.entry.live_blocks > 0;
        Self { open: segment.open, lives, needed: segment.is_needed() }
    }

    /// Whether it has live blocks.
    pub(super) fn lives(self) -> bool {
        self.lives
    }
}

/// Segments by what somebody looks for.
#[derive(Default)]
pub(super) struct Census {
    /// Closed and without a live block.
    empty: BTreeSet<SegmentId>,
    /// Those of metadata.
    metadata: BTreeSet<SegmentId>,
    /// `None` until somebody asks.
    protection: Option<Protection>,
    /// `None` until somebody asks.
    weak: Option<Weak>,
}

/// The segments that are needed, counted by how many of their strips are in service.
struct Protection {
    /// The devices it was counted for.
    in_service: Vec<bool>,
    /// By number of strips.
    segments: Vec<u64>,
}

/// The closed segments with live blocks that could have more strips in service than they have.
/// Those known as damaged could not.
struct Weak {
    /// The devices whose strips count.
    in_service: Vec<bool>,
    /// Those that new strips may be put on.
    usable: Vec<bool>,
    /// Strips they could have.
    wanted: usize,
    segments: BTreeSet<SegmentId>,
}

impl Census {
    /// The table has the segment now.
    pub(super) fn came(&mut self, segment: &Segment) {
        if segment.entry.metadata {
            self.metadata.insert(segment.entry.id);
        }
        self.count(segment, Phase::of(segment), 1);
    }

    /// The table has it no more.
    pub(super) fn went(&mut self, segment: &Segment) {
        self.metadata.remove(&segment.entry.id);
        self.count(segment, Phase::of(segment), -1);
    }

    /// The table has it no more, and its regions wait for a checkpoint.
    pub(super) fn retired(&mut self, segment: &Segment) {
        self.metadata.remove(&segment.entry.id);
        put(&mut self.empty, segment.entry.id, false);
    }

    /// Its regions wait no more, or no checkpoint refers to it any more.
    pub(super) fn freed(&mut self, segment: &Segment) {
        if let Some(protection) = self.protection.as_mut().filter(|_| segment.is_needed()) {
            protection.count(segment, -1);
        }
    }

    /// The segment may have left the phase it was in.
    pub(super) fn changed(&mut self, segment: &Segment, before: Phase) {
        let after = Phase::of(segment);
        if before != after {
            self.count(segment, before, -1);
            self.count(segment, after, 1);
        }
    }

    /// Strips have come or gone, which changes what is known of the devices.
    pub(super) fn strips_changed(&mut self) {
        (self.protection, self.weak) = (None, None);
    }

    /// Segments are to be freed: closed, and without a live block.
    pub(super) fn empty(&self) -> &BTreeSet<SegmentId> {
        &self.empty
    }

    /// The metadata segments.
    pub(super) fn metadata(&self) -> &BTreeSet<SegmentId> {
        &self.metadata
    }

    /// How well the `segments` of the table are protected.
    pub(super) fn redundancy<'a>(
        &mut self,
        segments: impl Iterator<Item = &'a Segment>,
        geometry: Geometry,
        in_service: &[bool],
    ) -> Redundancy {
        let counted = self.protection.take().filter(|counted| counted.in_service == in_service);
        let counted = counted.unwrap_or_else(|| Protection::of(segments, geometry, in_service));
        self.protection.insert(counted).redundancy()
    }

    /// Of the `segments` of the table, those that a rebuild is to move.
    pub(super) fn weak<'a>(
        &mut self,
        segments: impl Iterator<Item = &'a Segment>,
        geometry: Geometry,
        in_service: &[bool],
        usable: &[bool],
    ) -> &BTreeSet<SegmentId> {
        let known = self.weak.take();
        let known = known.filter(|known| known.in_service == in_service && known.usable == usable);
        let known = known.unwrap_or_else(|| Weak::of(segments, geometry, in_service, usable));
        &self.weak.insert(known).segments
    }

    fn count(&mut self, segment: &Segment, phase: Phase, change: i64) {
        if let Some(protection) = self.protection.as_mut().filter(|_| phase.needed) {
            protection.count(segment, change);
        }
        match (phase.open, phase.lives) {
            (true, _) => {}
            (false, false) => put(&mut self.empty, segment.entry.id, change > 0),
            (false, true) => {
                if let Some(weak) = self.weak.as_mut().filter(|weak| weak.is(segment)) {
                    put(&mut weak.segments, segment.entry.id, change > 0);
                }
            }
        }
    }
}

fn put(set: &mut BTreeSet<SegmentId>, id: SegmentId, there: bool) {
    let changed = if there { set.insert(id) } else { set.remove(&id) };
    assert!(changed, "segment {id} was counted twice or not at all");
}

impl Protection {
    fn of<'a>(
        segments: impl Iterator<Item = &'a Segment>,
        geometry: Geometry,
        in_service: &[bool],
    ) -> Self {
        let by_strips = vec![0; geometry.strips() + 1];
        let mut counted = Self { in_service: in_service.to_vec(), segments: by_strips };
        segments.filter(|segment| segment.is_needed()).for_each(|segment| {
            counted.count(segment, 1);
        });
        counted
    }

    fn count(&mut self, segment: &Segment, change: i64) {
        let count = &mut self.segments[segment.strips_in_service(&self.in_service)];
        *count = count.strict_add_signed(change);
    }

    fn redundancy(&self) -> Redundancy {
        let whole = self.segments.len() - 1;
        let strips_min = self.segments.iter().position(|count| *count > 0).unwrap_or(whole);
        let degraded = self.segments[..whole].iter().sum();
        Redundancy { strips_min, segments: degraded + self.segments[whole], degraded }
    }
}

impl Weak {
    fn of<'a>(
        segments: impl Iterator<Item = &'a Segment>,
        geometry: Geometry,
        in_service: &[bool],
        usable: &[bool],
    ) -> Self {
        let count = usable.iter().filter(|usable| **usable).count();
        let wanted = count.min(geometry.strips());
        let (in_service, usable) = (in_service.to_vec(), usable.to_vec());
        let mut known = Self { in_service, usable, wanted, segments: BTreeSet::new() };
        let closed = segments.filter(|segment| !segment.open && Phase::of(segment).lives);
        known.segments = closed.filter(|segment| known.is(segment)).map(|s| s.entry.id).collect();
        known
    }

    /// Whether a segment has fewer strips than it could have elsewhere, and can be moved.
    fn is(&self, segment: &Segment) -> bool {
        !segment.damaged && segment.strips_in_service(&self.in_service) < self.wanted
    }
}

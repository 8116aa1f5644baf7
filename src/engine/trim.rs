//! Large trims of one layer whose leaves are yet to be cleared.
//!
//! A trim is in force as soon as it is here: a leaf that it covers reads as holes, whatever it holds.
//! The mapper takes such leaves out of the tree and what they refer to out of the segments' counts,
//! one by one (`engine/clear.rs`); until then the counts are as if nothing had been trimmed.
//!
//! What tells a leaf that was changed since is its *stamp*, which is stored with it: the LSN of the
//! newest trim that there was when it was last changed.
//!
//! Hosts cut what they discard into requests of a few GiB. Trims that meet are joined into one of the
//! newer LSN, unless something was written in the older one's range: that would be covered too.
//!
//! # Invariants
//! * Trims come in order of LSN, and nothing newer than a trim is in the map when it comes.
//! * A leaf that is covered is taken out before it is changed. So no leaf holds both what a trim
//!   covers and what it does not.

use std::ops::Range;

use serde::Deserialize;
use serde::Serialize;

use crate::canary::Bug;
use crate::canary::planted;
use crate::format::node::NODE_ENTRIES;
use crate::units::Lsn;

/// A trim, as the catalog holds it. Leaves of which only a part is in the range are none of its.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trim {
    /// The first block of the range.
    pub first_block: u64,
    /// The first block past the range.
    pub end_block: u64,
    /// Of its entry. Leaves with a lower stamp are covered.
    pub lsn: u64,
}

impl Trim {
    /// Bytes of one in the catalog's JSON: three names, and as many numbers of 20 digits at most.
    pub const JSON_BYTES_MAX: usize = 106;

    /// The leaves that are whole in the range.
    #[must_use]
    pub fn leaves(&self) -> Range<u64> {
        let per_leaf = NODE_ENTRIES as u64;
        self.first_block.div_ceil(per_leaf)..self.end_block / per_leaf
    }

    fn holds_all_of(&self, other: &Self) -> bool {
        self.first_block <= other.first_block && other.end_block <= self.end_block
    }

    fn meets(&self, other: &Self) -> bool {
        self.first_block <= other.end_block && other.first_block <= self.end_block
    }
}

/// A trim under way.
#[derive(Debug)]
struct Pending {
    trim: Trim,
    /// Something may have been written in its range since.
    touched: bool,
}

/// The trims of a layer that are under way.
#[derive(Debug, Default)]
pub struct Trims {
    pending: Vec<Pending>,
    newest: Lsn,
}

impl Trims {
    /// Those that a catalog holds.
    #[must_use]
    pub fn restored(trims: &[Trim]) -> Self {
        let newest = trims.iter().map(|trim| Lsn(trim.lsn)).max().unwrap_or_default();
        let pending = trims.iter().map(|trim| Pending { trim: *trim, touched: true }).collect();
        Self { pending, newest }
    }

    /// All of them.
    #[must_use]
    pub fn pending(&self) -> Vec<Trim> {
        self.pending.iter().map(|pending| pending.trim).collect()
    }

    /// The stamp of a leaf that is changed now: no trim covers it.
    #[must_use]
    pub fn stamp(&self) -> Lsn {
        self.newest
    }

    /// Whether there would be no more trims with this one than without.
    #[must_use]
    pub fn can_join(&self, trim: &Trim) -> bool {
        self.pending.iter().any(|older| is_joined(older, trim))
    }

    /// Puts a trim in force.
    pub fn add(&mut self, mut trim: Trim) {
        while let Some(at) = self.pending.iter().position(|older| is_joined(older, &trim)) {
            let older = self.pending.remove(at).trim;
            trim.first_block = trim.first_block.min(older.first_block);
            trim.end_block = trim.end_block.max(older.end_block);
        }
        self.pending.push(Pending { trim, touched: false });
        self.newest = self.newest.max(Lsn(trim.lsn));
    }

    /// Something other than holes is put into these blocks.
    #[inline]
    pub fn touch(&mut self, blocks: Range<u64>) {
        for pending in &mut self.pending {
            let Trim { first_block, end_block, .. } = pending.trim;
            pending.touched |= first_block < blocks.end && blocks.start < end_block;
        }
    }

    /// Whether a leaf with this stamp was trimmed after it was last changed.
    #[inline]
    #[must_use]
    pub fn cover(&self, leaf: u64, stamp: Lsn) -> bool {
        self.pending.iter().any(|Pending { trim, .. }| {
            let older = stamp.0 < trim.lsn || planted(Bug::NewerLeafTrimmed);
            older && trim.leaves().contains(&leaf)
        })
    }

    /// Nothing that the trim covers is left below `leaf`; at its end it goes.
    pub fn cleared_below(&mut self, lsn: u64, leaf: u64) {
        let block = leaf.saturating_mul(NODE_ENTRIES as u64);
        for Pending { trim, .. } in self.pending.iter_mut().filter(|p| p.trim.lsn == lsn) {
            trim.first_block = trim.first_block.max(block);
        }
        self.pending.retain(|pending| !pending.trim.leaves().is_empty());
    }

    /// Gives all of them up.
    pub fn forget(&mut self) {
        self.pending.clear();
    }
}

/// Whether a newer trim takes an older one in: it holds all of it, or they meet and nothing was
/// written there in between.
fn is_joined(older: &Pending, trim: &Trim) -> bool {
    trim.holds_all_of(&older.trim) || !older.touched && trim.meets(&older.trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAF: u64 = NODE_ENTRIES as u64;

    /// A trim of whole leaves.
    fn trim(leaves: Range<u64>, lsn: u64) -> Trim {
        Trim { first_block: leaves.start * LEAF, end_block: leaves.end * LEAF, lsn }
    }

    #[test]
    fn a_trim_covers_what_is_older_until_it_is_cleared() {
        let mut trims = Trims::default();
        let before = trims.stamp();
        trims.add(trim(10..20, 5));
        assert!(trims.cover(10, before) && trims.cover(19, before));
        assert!(!trims.cover(9, before) && !trims.cover(20, before));
        assert!(!trims.cover(15, trims.stamp()), "changed since");
        trims.cleared_below(5, 16);
        assert!(!trims.cover(15, before) && trims.cover(16, before));
        assert_eq!(Trims::restored(&trims.pending()).stamp(), Lsn(5));
        trims.cleared_below(5, 20);
        assert!(trims.pending().is_empty());
        assert_eq!(trims.stamp(), Lsn(5), "leaves with that stamp are in the map");
    }

    #[test]
    fn leaves_at_the_ends_are_covered_only_as_a_whole() {
        let mut trims = Trims::default();
        let before = trims.stamp();
        trims.add(Trim { first_block: 1, end_block: 3 * LEAF - 1, lsn: 5 });
        let covered: Vec<u64> = (0..4).filter(|leaf| trims.cover(*leaf, before)).collect();
        assert_eq!(covered, [1]);
        trims.add(Trim { first_block: 3 * LEAF - 1, end_block: 4 * LEAF, lsn: 6 });
        let covered: Vec<u64> = (0..5).filter(|leaf| trims.cover(*leaf, before)).collect();
        assert_eq!(covered, [1, 2, 3], "the two together hold all of leaf 2");
        trims.cleared_below(6, 4);
        assert!(trims.pending().is_empty());
    }

    #[test]
    fn trims_that_meet_are_one_unless_something_was_written_in_between() {
        let mut trims = Trims::default();
        trims.add(trim(10..20, 5));
        trims.add(trim(30..40, 6));
        trims.touch(20 * LEAF..30 * LEAF);
        assert!(trims.can_join(&trim(20..30, 7)));
        trims.add(trim(20..30, 7));
        assert_eq!(trims.pending(), [trim(10..40, 7)]);

        let between = trims.stamp();
        trims.touch(15 * LEAF..15 * LEAF + 1);
        assert!(!trims.can_join(&trim(40..50, 8)));
        trims.add(trim(40..50, 8));
        assert_eq!(trims.pending(), [trim(10..40, 7), trim(40..50, 8)]);
        assert!(!trims.cover(15, between), "it was written after it was trimmed");
        trims.add(trim(5..45, 9));
        assert_eq!(trims.pending(), [trim(5..50, 9)], "one is held, the other met");
        assert!(trims.cover(15, between), "and trimmed again");

        let mut restored = Trims::restored(&trims.pending());
        restored.add(trim(50..60, 10));
        assert_eq!(restored.pending().len(), 2, "what was written is not known any more");
    }

    #[test]
    fn one_is_no_longer_in_a_catalog_than_is_reckoned_with() {
        let json = serde_json::to_vec(&trim(0..1, u64::MAX)).expect("plain data");
        let longest = json.len() + 2 * 20;
        assert!(longest < Trim::JSON_BYTES_MAX, "with a comma: {longest}");
    }
}

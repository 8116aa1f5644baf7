//! The write buffer's index of one layer: which blocks have an acknowledged record that is not in
//! the map yet.
//!
//! Ranges never overlap; inserting one cuts what it covers out of older ones. A record may be
//! referred to by several ranges after cuts.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::record::BufferedRecord;

/// Ordered index from blocks to records.
#[derive(Default)]
pub struct WriteIndex {
    /// First block → end (exclusive) and record.
    ranges: BTreeMap<u64, (u64, Arc<BufferedRecord>)>,
}

impl WriteIndex {
    /// Whether nothing is buffered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The record that holds block `lba`.
    #[must_use]
    pub fn get(&self, lba: u64) -> Option<&Arc<BufferedRecord>> {
        let (_, (end, record)) = self.ranges.range(..=lba).next_back()?;
        (lba < *end).then_some(record)
    }

    /// The record that holds `lba` and the first block past it that is not held the same way; or
    /// `None` and the first block at or after `lba` that is held (at most `limit`).
    #[must_use]
    pub fn run(&self, lba: u64, limit: u64) -> (Option<&Arc<BufferedRecord>>, u64) {
        if let Some((_, (end, record))) = self.ranges.range(..=lba).next_back()
            && lba < *end
        {
            return (Some(record), (*end).min(limit));
        }
        let next = self.ranges.range(lba..).next().map_or(limit, |(start, _)| (*start).min(limit));
        (None, next)
    }

    /// Makes `record` the owner of its blocks.
    pub fn insert(&mut self, record: &Arc<BufferedRecord>) {
        let (start, end) = (record.header.lba.0, record.end_lba());
        if start == end {
            return;
        }
        self.cut(start..end);
        self.ranges.insert(start, (end, Arc::clone(record)));
    }

    /// The parts of `within` that `record` still owns.
    #[must_use]
    pub fn owned_by(&self, record: &Arc<BufferedRecord>, within: Range<u64>) -> Vec<Range<u64>> {
        let before = self.ranges.range(..within.start).next_back();
        let inside = self.ranges.range(within.clone());
        before
            .into_iter()
            .chain(inside)
            .filter(|(_, (_, owner))| Arc::ptr_eq(owner, record))
            .map(|(start, (end, _))| (*start).max(within.start)..(*end).min(within.end))
            .filter(|range| !range.is_empty())
            .collect()
    }

    /// Whether `record` owns any of its blocks.
    #[must_use]
    pub fn owns_any(&self, record: &Arc<BufferedRecord>) -> bool {
        !self.owned_by(record, record.header.lba.0..record.end_lba()).is_empty()
    }

    /// Removes what `record` owns within `within`; other records stay.
    pub fn remove(&mut self, record: &Arc<BufferedRecord>, within: Range<u64>) {
        for range in self.owned_by(record, within) {
            self.cut(range);
        }
    }

    /// Removes `range`, shortening or splitting what reaches into it.
    fn cut(&mut self, range: Range<u64>) {
        if let Some((start, (end, record))) = self.ranges.range(..range.start).next_back()
            && *end > range.start
        {
            let (start, end, record) = (*start, *end, Arc::clone(record));
            self.ranges.insert(start, (range.start, Arc::clone(&record)));
            if end > range.end {
                self.ranges.insert(range.end, (end, record));
            }
        }
        while let Some((start, (end, _))) = self.ranges.range(range.clone()).next() {
            let (start, end) = (*start, *end);
            let removed = self.ranges.remove(&start);
            if let Some((_, record)) = removed
                && end > range.end
            {
                self.ranges.insert(range.end, (end, record));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::engine::record::tests::zero_record;
    use crate::units::bytes_usize;

    proptest! {
        /// Against a plain array of owners.
        #[test]
        fn index_equals_a_plain_array(
            steps in prop::collection::vec((0_u64..60, 1_u64..20, any::<bool>(), 0_usize..40), 1..40)
        ) {
            let mut index = WriteIndex::default();
            let mut model: Vec<Option<u64>> = vec![None; 80];
            let mut records: Vec<Arc<BufferedRecord>> = Vec::new();
            for (number, (lba, blocks, insert, which)) in steps.into_iter().enumerate() {
                if insert || records.is_empty() {
                    let record = Arc::new(zero_record(number as u64 + 1, lba, blocks));
                    index.insert(&record);
                    model[bytes_usize(lba)..bytes_usize(lba + blocks)].fill(Some(number as u64 + 1));
                    records.push(record);
                } else {
                    let record = Arc::clone(&records[which % records.len()]);
                    index.remove(&record, lba..lba + blocks);
                    for owner in &mut model[bytes_usize(lba)..bytes_usize(lba + blocks)] {
                        if *owner == Some(record.header.lsn.0) {
                            *owner = None;
                        }
                    }
                }
                for (lba, owner) in model.iter().enumerate() {
                    let held = index.get(lba as u64).map(|record| record.header.lsn.0);
                    prop_assert_eq!(held, *owner);
                    let (record, end) = index.run(lba as u64, 80);
                    prop_assert_eq!(record.map(|record| record.header.lsn.0), *owner);
                    prop_assert!(end > lba as u64);
                }
                for record in &records {
                    let owns = model.contains(&Some(record.header.lsn.0));
                    prop_assert_eq!(index.owns_any(record), owns);
                }
            }
        }
    }
}

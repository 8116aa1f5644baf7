//! The checkpoint root: the one record from which everything else is found.
//!
//! Stored as a record of kind `Root` in a metadata segment; superblocks name its location and the
//! places of that segment's strips. It carries the entries of all metadata segments itself, since
//! the segment table lies in them. Payload, in 64-bit fields:
//!
//! ```text
//!  | checkpoint | cut lsn | catalog parts: count, locations | table directories: count, locations |
//!  | table pages | metadata segments: count, entries |
//! ```

use super::DecodeError;
use super::fields::FieldReader;
use super::fields::FieldWriter;
use super::location::Location;
use super::table::SegmentEntry;
use crate::units::Lsn;

/// A checkpoint's root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointRoot {
    /// Number of this checkpoint, from 1.
    pub checkpoint: u64,
    /// Every entry up to here is in the checkpoint; the journal is replayed from the next.
    pub cut: Lsn,
    /// Parts of the catalog, in order.
    pub catalog: Vec<Location>,
    /// Directories of the segment table, 512 page locations each.
    pub directories: Vec<Location>,
    /// Pages of the segment table.
    pub pages: u64,
    /// Entries of the metadata segments.
    pub metadata_segments: Vec<SegmentEntry>,
}

impl CheckpointRoot {
    /// The record's payload.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let raw = |locations: &[Location]| locations.iter().map(|l| l.0).collect::<Vec<_>>();
        let mut out = FieldWriter::default();
        out.u64(self.checkpoint)
            .u64(self.cut.0)
            .list(&raw(&self.catalog))
            .list(&raw(&self.directories))
            .u64(self.pages)
            .u64(self.metadata_segments.len() as u64);
        for entry in &self.metadata_segments {
            entry.write(&mut out);
        }
        out.finish()
    }

    /// Decodes the payload, for a pod with `strips` strips per segment.
    ///
    /// # Errors
    /// See [`DecodeError`].
    pub fn decode(bytes: &[u8], strips: usize) -> Result<Self, DecodeError> {
        let locations = |raw: Vec<u64>| raw.into_iter().map(Location).collect();
        let mut from = FieldReader::new(bytes);
        let checkpoint = from.u64()?;
        let cut = Lsn(from.u64()?);
        let catalog = locations(from.list()?);
        let directories = locations(from.list()?);
        let pages = from.u64()?;
        let count = from.count(SegmentEntry::encoded_bytes(strips))?;
        let metadata_segments =
            (0..count).map(|_| SegmentEntry::read(&mut from, strips)).collect::<Result<_, _>>()?;
        from.finish()?;
        Ok(Self { checkpoint, cut, catalog, directories, pages, metadata_segments })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::format::table::Place;
    use crate::units::SegmentId;

    #[test]
    fn roots_survive_the_round_trip() {
        let root = CheckpointRoot {
            checkpoint: 3,
            cut: Lsn(99),
            catalog: vec![Location(5)],
            directories: vec![Location(6), Location(7)],
            pages: 600,
            metadata_segments: vec![SegmentEntry {
                id: SegmentId(1),
                metadata: true,
                rows: 1,
                live_blocks: 2,
                blocks_written: 3,
                bytes_written: 300,
                places: vec![None, Some(Place { device: 0, region: 1 })],
            }],
        };
        assert_eq!(CheckpointRoot::decode(&root.encode(), 2), Ok(root));
    }

    proptest! {
        #[test]
        fn decode_survives_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = CheckpointRoot::decode(&bytes, 6);
        }
    }
}

//! Entries of the segment table: where each strip of a segment is and how much of it is live.
//!
//! A page of the table is a record of kind `TablePage` whose payload is, in 64-bit fields:
//!
//! ```text
//!  count, then per entry:
//!  | id | flags | rows | live blocks | blocks written | bytes written | places: k+m times |
//! ```
//!
//! `flags` bit 0: metadata segment (its entry lies in the checkpoint root, not in a page).
//! A place is `device << 48 | region`, or all ones for an absent strip.

use super::DecodeError;
use super::fields::FieldReader;
use super::fields::FieldWriter;
use crate::units::SegmentId;

/// Table entries per page.
pub const PAGE_ENTRIES: usize = 64;
/// Most strips a segment may have (k + m): what a superblock can name.
pub const STRIPS_MAX: usize = 32;
const ABSENT: u64 = u64::MAX;
const FLAG_METADATA: u64 = 1;

/// Where one strip lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// Index of the device in the pod.
    pub device: u16,
    /// Region of that device, counted in strips from the start of its data area.
    pub region: u32,
}

impl Place {
    pub(super) fn encode(place: Option<Self>) -> u64 {
        place.map_or(ABSENT, |place| u64::from(place.device) << 48 | u64::from(place.region))
    }

    pub(super) fn decode(raw: u64) -> Result<Option<Self>, DecodeError> {
        if raw == ABSENT {
            return Ok(None);
        }
        let device = u16::try_from(raw >> 48).map_err(|_| DecodeError::Field)?;
        let region = u32::try_from(raw & ((1 << 48) - 1)).map_err(|_| DecodeError::Field)?;
        Ok(Some(Self { device, region }))
    }
}

/// One segment, as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentEntry {
    /// Its number.
    pub id: SegmentId,
    /// Holds checkpoint metadata and is named by the root.
    pub metadata: bool,
    /// Rows written and durable.
    pub rows: u64,
    /// Map entries and node pointers into it.
    pub live_blocks: u64,
    /// Blocks of the records in it, live or not; other records count as one.
    pub blocks_written: u64,
    /// Bytes of the records in it, live or not.
    pub bytes_written: u64,
    /// Where each strip is, data strips first; `None` if absent.
    pub places: Vec<Option<Place>>,
}

impl SegmentEntry {
    pub(super) fn write(&self, out: &mut FieldWriter) {
        out.u64(self.id.0)
            .u64(if self.metadata { FLAG_METADATA } else { 0 })
            .u64(self.rows)
            .u64(self.live_blocks)
            .u64(self.blocks_written)
            .u64(self.bytes_written);
        for place in &self.places {
            out.u64(Place::encode(*place));
        }
    }

    pub(super) fn read(from: &mut FieldReader, strips: usize) -> Result<Self, DecodeError> {
        let id = SegmentId(from.u64()?);
        let flags = from.u64()?;
        if flags & !FLAG_METADATA != 0 || id.0 == 0 {
            return Err(DecodeError::Field);
        }
        Ok(Self {
            id,
            metadata: flags & FLAG_METADATA != 0,
            rows: from.u64()?,
            live_blocks: from.u64()?,
            blocks_written: from.u64()?,
            bytes_written: from.u64()?,
            places: (0..strips)
                .map(|_| Place::decode(from.u64()?))
                .collect::<Result<_, DecodeError>>()?,
        })
    }

    pub(super) fn encoded_bytes(strips: usize) -> usize {
        (6 + strips) * 8
    }
}

/// The payload of a table page.
#[must_use]
pub fn encode_page(entries: &[SegmentEntry]) -> Vec<u8> {
    let mut out = FieldWriter::default();
    out.u64(entries.len() as u64);
    for entry in entries {
        entry.write(&mut out);
    }
    out.finish()
}

/// Decodes a table page of a pod with `strips` strips per segment.
///
/// # Errors
/// See [`DecodeError`].
pub fn decode_page(bytes: &[u8], strips: usize) -> Result<Vec<SegmentEntry>, DecodeError> {
    let mut from = FieldReader::new(bytes);
    let count = from.count(SegmentEntry::encoded_bytes(strips))?;
    let entries =
        (0..count).map(|_| SegmentEntry::read(&mut from, strips)).collect::<Result<_, _>>()?;
    from.finish()?;
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pages_survive_the_round_trip(ids in prop::collection::vec(1_u64..1 << 40, 0..PAGE_ENTRIES)) {
            let entries: Vec<_> = ids
                .into_iter()
                .map(|id| SegmentEntry {
                    id: SegmentId(id),
                    metadata: id % 2 == 0,
                    rows: id % 7,
                    live_blocks: id % 1000,
                    blocks_written: 1000,
                    bytes_written: 4_000_000,
                    places: vec![Some(Place { device: 3, region: 9 }), None, Some(Place { device: u16::MAX, region: 0 })],
                })
                .collect();
            prop_assert_eq!(decode_page(&encode_page(&entries), 3), Ok(entries));
        }

        #[test]
        fn decode_survives_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = decode_page(&bytes, 6);
        }
    }
}

//! Rows being filled with records, and their way to the devices.
//!
//! A [`RowGroup`] is up to [`GROUP_ROWS_MAX`] consecutive rows of one segment in memory. Records
//! are placed first-fit over the units of the current row and never cross a unit, so that a unit
//! can be verified and rebuilt by itself.

use futures_util::future::join_all;

use super::Pool;
use crate::canary::Bug;
use crate::canary::planted;
use crate::device::AlignedBuf;
use crate::device::Durability;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::format::location::Address;
use crate::format::unit::UNIT_BODY_BYTES;
use crate::format::unit::UNIT_BYTES;
use crate::format::unit::UNIT_HEADER_BYTES;
use crate::format::unit::UnitHeader;
use crate::units::SegmentId;
use crate::units::bytes_u64;

/// Most rows written together: 1 MiB per device, enough to keep a cloud disk at full speed.
pub const GROUP_ROWS_MAX: usize = 16;

/// Rows of a segment in memory.
pub struct RowGroup {
    /// The segment.
    pub segment: SegmentId,
    /// Its first row in this group.
    pub first_row: u64,
    /// Rows the group may have.
    rows_max: usize,
    /// The part of each data strip that the group covers.
    strips: Vec<AlignedBuf>,
    /// Bytes of the current row's unit bodies that are used, by strip.
    used: Vec<usize>,
    /// The row being filled, counted from `first_row`.
    row: usize,
}

impl RowGroup {
    /// An empty group for `rows_max` rows (at least 1) from `first_row` on.
    #[must_use]
    pub fn new(segment: SegmentId, first_row: u64, rows_max: usize, data_strips: usize) -> Self {
        assert!((1..=GROUP_ROWS_MAX).contains(&rows_max));
        let strip = || AlignedBuf::zeroed(rows_max * UNIT_BYTES);
        Self {
            segment,
            first_row,
            rows_max,
            strips: (0..data_strips).map(|_| strip()).collect(),
            used: vec![0; data_strips],
            row: 0,
        }
    }

    /// Whether nothing was placed yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.row == 0 && self.used.iter().all(|used| *used == 0)
    }

    /// Rows that hold anything.
    #[must_use]
    pub fn rows(&self) -> usize {
        if self.used.iter().all(|used| *used == 0) { self.row } else { self.row + 1 }
    }

    /// Finds room for a record of `stride` bytes and gives its address and memory.
    ///
    /// # Panics
    /// If no unit could ever hold it: ours to prevent.
    pub fn place(&mut self, stride: usize) -> Option<(Address, &mut [u8])> {
        assert!(stride <= UNIT_BODY_BYTES, "a record of {stride} bytes fits no unit");
        let mut strip = self.strip_with_room(stride);
        if strip.is_none() {
            if self.row + 1 == self.rows_max {
                return None;
            }
            self.row += 1;
            self.used.fill(0);
            strip = Some(0);
        }
        let strip = strip?;
        let in_group = self.row * UNIT_BYTES + UNIT_HEADER_BYTES + self.used[strip];
        self.used[strip] += stride;
        let byte = self.first_row * UNIT_BYTES as u64 + bytes_u64(in_group);
        let memory = &mut self.strips[strip][in_group..in_group + stride];
        Some((Address { segment: self.segment, strip, byte }, memory))
    }

    fn strip_with_room(&self, stride: usize) -> Option<usize> {
        self.used.iter().position(|used| used + stride <= UNIT_BODY_BYTES)
    }
}

impl Pool {
    /// Writes a group: data units, parity units, all on the places of its segment.
    ///
    /// # Durability
    /// When it returns `Ok`, every row is durable on every place of the segment.
    ///
    /// # Errors
    /// The first device's; nothing of the group may be referred to then, and the segment must be
    /// closed before `first_row`. Devices that failed are out of service already.
    pub async fn write_rows(&self, group: RowGroup, epoch: u64) -> Result<()> {
        let rows = group.rows();
        let places = self
            .table
            .lock()
            .get(group.segment)
            .map(|segment| segment.entry.places.clone())
            .ok_or_else(|| Error::new(ErrorKind::NotFound, "write rows"))?;
        let offset_in_strip = group.first_row * UNIT_BYTES as u64;
        let units = self.complete_units(group, rows, epoch);
        let targets: Vec<_> = places
            .iter()
            .zip(units)
            .filter_map(|(place, unit)| place.map(|place| (place, unit.freeze())))
            .collect();
        let writes = targets.iter().map(|(place, data)| {
            let member = &self.members[usize::from(place.device)];
            let offset = self.place_offset(*place) + offset_in_strip;
            member.write(offset, data.slice(..rows * UNIT_BYTES), Durability::Volatile)
        });
        join_all(writes).await.into_iter().collect::<Result<()>>()?;
        if planted(Bug::RowsNotFlushed) {
            return Ok(());
        }
        let flushes =
            targets.iter().map(|(place, _)| self.members[usize::from(place.device)].flush());
        join_all(flushes).await.into_iter().collect()
    }

    /// Adds parity strips to the data strips and writes all unit headers.
    fn complete_units(&self, group: RowGroup, rows: usize, epoch: u64) -> Vec<AlignedBuf> {
        let (k, m) = (self.geometry.data_strips, self.geometry.parity_strips);
        let RowGroup { segment, first_row, mut strips, .. } = group;
        strips.extend((0..m).map(|_| AlignedBuf::zeroed(rows * UNIT_BYTES)));
        for row in 0..rows {
            let body = row * UNIT_BYTES + UNIT_HEADER_BYTES..(row + 1) * UNIT_BYTES;
            let (data, parity) = strips.split_at_mut(k);
            let data: Vec<&[u8]> = data.iter().map(|strip| &strip[body.clone()]).collect();
            let mut parity: Vec<&mut [u8]> =
                parity.iter_mut().map(|strip| &mut strip[body.clone()]).collect();
            self.env.yield_thread();
            self.code.encode(&data, &mut parity);
            if planted(Bug::ParityMissing) {
                parity[m - 1].fill(0);
            }
            for (index, strip) in strips.iter_mut().enumerate() {
                let header = UnitHeader {
                    segment,
                    strip: u16::try_from(index).expect("at most 32 strips"),
                    row: first_row + bytes_u64(row),
                    epoch,
                };
                let unit = &mut strip[row * UNIT_BYTES..(row + 1) * UNIT_BYTES];
                header.encode_into(self.geometry.pod, unit);
            }
        }
        strips
    }
}

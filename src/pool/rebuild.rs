//! Rebuilding what a strip holds from k others of its segment.
//!
//! First the same byte range of any k strips, which is cheap; if the outcome is not intact, whole
//! units of all strips, using only those whose own checksum holds, since rotten inputs decode
//! silently to garbage.

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;

use super::Pool;
use super::member::Counters;
use super::read::Lease;
use super::read::StripRange;
use crate::canary::Bug;
use crate::canary::planted;
use crate::device::AlignedBuf;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::format::unit::UNIT_BYTES;
use crate::format::unit::UnitHeader;
use crate::units::IO_ALIGN;
use crate::units::bytes_u64;
use crate::units::bytes_usize;

/// Pieces of a unit that may fail before the rest of it is left alone. A device that fails too many
/// reads in a row is taken out of service, which one bad unit is no reason for.
const PIECES_FAILED_MAX: usize = 4;

/// What reading a whole unit found.
pub(super) enum UnitRead {
    /// The unit, as it was written.
    Intact(AlignedBuf, UnitHeader),
    /// Bytes that are not the unit.
    Damaged,
    /// The device is in service and failed the read.
    Unreadable,
    /// The strip is absent, or its device out of service.
    Away,
}

impl Pool {
    /// Rebuilds a record whose strip could not be read or was damaged.
    pub(super) async fn rebuild_record<T>(
        &self,
        lease: &Lease<'_>,
        range: StripRange,
        accept: &impl Fn(&[u8]) -> Option<T>,
    ) -> Result<T> {
        if let Ok(bytes) = self.rebuild_range(lease, range).await
            && let Some(value) = accept(&bytes)
        {
            return Ok(value);
        }
        let row = range.offset / UNIT_BYTES as u64;
        let unit = self.rebuild_unit(lease, range.strip, row).await?;
        let from = bytes_usize(range.offset % UNIT_BYTES as u64);
        accept(&unit[from..from + range.length]).ok_or_else(|| {
            Error::new(ErrorKind::Corrupt, "rebuild record").context(format_args!(
                "segment {}, strip {}, byte {}: the rebuilt record is damaged too",
                lease.segment, range.strip, range.offset
            ))
        })
    }

    /// Rebuilds `range` from the same range of the first k other strips that can be read, those on
    /// slow devices last.
    ///
    /// Bytes of unit headers come out as garbage: they are not erasure-coded.
    pub(super) async fn rebuild_range(
        &self,
        lease: &Lease<'_>,
        range: StripRange,
    ) -> Result<AlignedBuf> {
        let k = self.geometry.data_strips;
        let mut others: Vec<usize> =
            (0..self.geometry.strips()).filter(|strip| *strip != range.strip).collect();
        others.sort_by_key(|strip| self.is_slow(lease, *strip));
        let mut candidates = others.into_iter();
        let mut pending = FuturesUnordered::new();
        let mut survivors: Vec<(usize, AlignedBuf)> = Vec::with_capacity(k);
        loop {
            while survivors.len() + pending.len() < k {
                let Some(strip) = candidates.next() else {
                    return Err(too_few(lease, range.strip, survivors.len(), k));
                };
                if let Some((member, offset)) = self.strip_member(lease, strip) {
                    let read = member.read(offset + range.offset, range.length);
                    pending.push(async move { (strip, read.await) });
                }
            }
            match pending.next().await {
                Some((strip, Ok(bytes))) => survivors.push((strip, bytes)),
                Some((_, Err(_))) => {}
                None => break,
            }
        }
        Ok(self.decode_survivors(range.strip, &mut survivors, range.length))
    }

    fn decode_survivors(
        &self,
        lost: usize,
        survivors: &mut [(usize, AlignedBuf)],
        length: usize,
    ) -> AlignedBuf {
        survivors.sort_by_key(|(strip, _)| *strip);
        let inputs: Vec<(usize, &[u8])> =
            survivors.iter().map(|(strip, bytes)| (*strip, &bytes[..])).collect();
        let mut out = AlignedBuf::zeroed(length);
        self.code.reconstruct(lost, &inputs, &mut out);
        out
    }

    /// Rebuilds a whole unit from k others that are intact, and writes its header anew.
    pub(super) async fn rebuild_unit(
        &self,
        lease: &Lease<'_>,
        lost: usize,
        row: u64,
    ) -> Result<AlignedBuf> {
        let k = self.geometry.data_strips;
        let mut survivors: Vec<(usize, AlignedBuf)> = Vec::with_capacity(k);
        let mut epoch = 0;
        for strip in (0..self.geometry.strips()).filter(|strip| *strip != lost) {
            if survivors.len() == k {
                break;
            }
            if let Some((unit, header)) = self.read_unit(lease, strip, row).await {
                epoch = header.epoch;
                survivors.push((strip, unit));
            }
        }
        if survivors.len() < k {
            return Err(too_few(lease, lost, survivors.len(), k));
        }
        let mut unit = self.decode_survivors(lost, &mut survivors, UNIT_BYTES);
        let header = UnitHeader {
            segment: lease.segment,
            strip: u16::try_from(lost).expect("at most 32 strips"),
            row,
            epoch,
        };
        if planted(Bug::HealedWrong) {
            unit[UNIT_BYTES / 2] ^= 1;
        }
        header.encode_into(self.geometry.pod, &mut unit);
        Ok(unit)
    }

    /// Reads a unit and verifies it; `None` if it cannot be read or is not intact.
    pub(super) async fn read_unit(
        &self,
        lease: &Lease<'_>,
        strip: usize,
        row: u64,
    ) -> Option<(AlignedBuf, UnitHeader)> {
        match self.look_at_unit(lease, strip, row).await {
            UnitRead::Intact(unit, header) => Some((unit, header)),
            UnitRead::Damaged | UnitRead::Unreadable | UnitRead::Away => None,
        }
    }

    /// Reads a unit and says what is there.
    pub(super) async fn look_at_unit(&self, lease: &Lease<'_>, strip: usize, row: u64) -> UnitRead {
        let Some((member, offset)) = self.strip_member(lease, strip) else {
            return UnitRead::Away;
        };
        let read = member.read(offset + row * UNIT_BYTES as u64, UNIT_BYTES).await;
        let Ok(unit) = read else {
            return if member.in_service() { UnitRead::Unreadable } else { UnitRead::Away };
        };
        match UnitHeader::decode(&unit, self.geometry.pod, lease.segment, strip, row) {
            Ok(header) => UnitRead::Intact(unit, header),
            Err(_) => {
                Counters::add(&member.counters.checksum_errors);
                UnitRead::Damaged
            }
        }
    }

    /// A data unit, read or rebuilt. For reclaim, which walks whole segments.
    ///
    /// # Errors
    /// `Corrupt` when neither works.
    pub async fn whole_unit(
        &self,
        lease: &Lease<'_>,
        strip: usize,
        row: u64,
    ) -> Result<AlignedBuf> {
        match self.read_unit(lease, strip, row).await {
            Some((unit, _)) => Ok(unit),
            None => self.rebuild_unit(lease, strip, row).await,
        }
    }

    /// What can be had of a unit that [`Pool::whole_unit`] has no way to get whole: the strip's own
    /// bytes, and those that the same bytes of any k others give. Neither is verified, and what
    /// cannot be had is zero.
    pub async fn unit_remains(&self, lease: &Lease<'_>, strip: usize, row: u64) -> [AlignedBuf; 2] {
        let start = row * UNIT_BYTES as u64;
        let (mut own, mut rebuilt) =
            (AlignedBuf::zeroed(UNIT_BYTES), AlignedBuf::zeroed(UNIT_BYTES));
        let (mut own_failed, mut rebuilt_failed) = (0, 0);
        let length = bytes_usize(IO_ALIGN);
        for from in (0..UNIT_BYTES).step_by(length) {
            let range = StripRange { strip, offset: start + bytes_u64(from), length };
            if own_failed < PIECES_FAILED_MAX {
                match self.read_range(lease, range).await {
                    Some(bytes) => own[from..from + length].copy_from_slice(&bytes),
                    None => own_failed += 1,
                }
            }
            if rebuilt_failed < PIECES_FAILED_MAX {
                match self.rebuild_range(lease, range).await {
                    Ok(bytes) => rebuilt[from..from + length].copy_from_slice(&bytes),
                    Err(_) => rebuilt_failed += 1,
                }
            }
        }
        [own, rebuilt]
    }

    async fn read_range(&self, lease: &Lease<'_>, range: StripRange) -> Option<AlignedBuf> {
        let (member, offset) = self.strip_member(lease, range.strip)?;
        member.read(offset + range.offset, range.length).await.ok()
    }
}

fn too_few(lease: &Lease<'_>, strip: usize, found: usize, needed: usize) -> Error {
    Error::new(ErrorKind::Corrupt, "rebuild strip").context(format_args!(
        "segment {}, strip {strip}: {found} other strips are readable, {needed} are needed",
        lease.segment
    ))
}

//! Header of a unit: one strip's part (64 KiB) of a row.
//!
//! ```text
//!  0        4       6       8                 16                24
//!  +--------+-------+-------+-----------------+-----------------+-----------------+
//!  | magic  | strip | zero  | header checksum | body checksum   | segment         |
//!  +--------+-------+-------+-----------------+-----------------+-----------------+
//!  | row 32          | epoch 40        | reserved 48                              |
//!  +-----------------+-----------------+-----------------+------------------------+
//!  | body (64 ... 65536): records, zero padding; or parity of the data units' bodies
//! ```
//!
//! Only bodies are erasure-coded; headers are written for each unit by itself. The checksums let
//! rebuild and scrub tell a good unit from a bad one without decoding its records.

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U16;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use super::DecodeError;
use super::PodId;
use super::identity_checksum;
use crate::canary::Bug;
use crate::canary::planted;
use crate::codec::checksum::crc64;
use crate::units::SegmentId;

/// "WUN1" on disk.
const UNIT_MAGIC: u32 = u32::from_le_bytes(*b"WUN1");
/// Bytes of a unit, header included.
pub const UNIT_BYTES: usize = 64 << 10;
/// Bytes of a unit's header.
pub const UNIT_HEADER_BYTES: usize = size_of::<RawUnit>();
/// Bytes of a unit's body.
pub const UNIT_BODY_BYTES: usize = UNIT_BYTES - UNIT_HEADER_BYTES;

/// The header exactly as it lies on disk.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct RawUnit {
    pub(crate) magic: U32,
    pub(crate) strip: U16,
    pub(crate) zero: U16,
    pub(crate) header_checksum: U64,
    pub(crate) body_checksum: U64,
    pub(crate) segment: U64,
    pub(crate) row: U64,
    pub(crate) epoch: U64,
    pub(crate) reserved: [u8; 16],
}

// reed-solomon-simd codes each 64-byte block alone: bodies must start and end on one.
const _: () = assert!(size_of::<RawUnit>() == 64 && UNIT_BODY_BYTES.is_multiple_of(64));

/// A unit's header, validated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnitHeader {
    /// The segment it belongs to.
    pub segment: SegmentId,
    /// Strip within the segment, data strips first.
    pub strip: u16,
    /// Row within the segment.
    pub row: u64,
    /// The run of the pod that wrote it.
    pub epoch: u64,
}

impl UnitHeader {
    /// Writes the header into the first bytes of `unit`, whose body is complete.
    ///
    /// # Panics
    /// If `unit` is not [`UNIT_BYTES`] long: ours to prevent.
    pub fn encode_into(&self, pod: PodId, unit: &mut [u8]) {
        assert_eq!(unit.len(), UNIT_BYTES);
        let (head, body) = unit.split_at_mut(UNIT_HEADER_BYTES);
        let mut raw = RawUnit {
            magic: UNIT_MAGIC.into(),
            strip: self.strip.into(),
            zero: 0.into(),
            header_checksum: 0.into(),
            body_checksum: crc64(body).into(),
            segment: self.segment.0.into(),
            row: self.row.into(),
            epoch: self.epoch.into(),
            reserved: [0; 16],
        };
        raw.header_checksum = header_checksum(&raw, pod).into();
        head.copy_from_slice(raw.as_bytes());
    }

    /// Decodes and verifies a whole unit: header, body, and that it is the one expected.
    ///
    /// # Errors
    /// See [`DecodeError`]; a unit of another place is `Field`.
    pub fn decode(
        unit: &[u8],
        pod: PodId,
        segment: SegmentId,
        strip: usize,
        row: u64,
    ) -> Result<Self, DecodeError> {
        let (raw, body) = RawUnit::read_from_prefix(unit).map_err(|_| DecodeError::Short)?;
        if raw.magic.get() != UNIT_MAGIC {
            return Err(DecodeError::Magic);
        }
        if raw.header_checksum.get() != header_checksum(&raw, pod)
            || body.len() != UNIT_BODY_BYTES
            || raw.body_checksum.get() != crc64(body)
        {
            return Err(DecodeError::Checksum);
        }
        let header = Self {
            segment: SegmentId(raw.segment.get()),
            strip: raw.strip.get(),
            row: raw.row.get(),
            epoch: raw.epoch.get(),
        };
        let expected = header.segment == segment
            && usize::from(header.strip) == strip
            && header.row == row
            && raw.zero.get() == 0
            && raw.reserved == [0; 16];
        if expected || planted(Bug::UnitPlaceUnchecked) {
            Ok(header)
        } else {
            Err(DecodeError::Field)
        }
    }
}

fn header_checksum(raw: &RawUnit, pod: PodId) -> u64 {
    let bytes = raw.as_bytes();
    let (before, rest) = bytes.split_at(std::mem::offset_of!(RawUnit, header_checksum));
    identity_checksum(pod, 0, &[before, rest.get(8..).unwrap_or_default()])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POD: PodId = PodId([9; 16]);
    const HEADER: UnitHeader = UnitHeader { segment: SegmentId(5), strip: 1, row: 2, epoch: 3 };

    fn unit() -> Vec<u8> {
        let mut unit = vec![0xA5; UNIT_BYTES];
        HEADER.encode_into(POD, &mut unit);
        unit
    }

    #[test]
    fn decode_inverts_encode_and_knows_its_place() {
        let unit = unit();
        assert_eq!(UnitHeader::decode(&unit, POD, SegmentId(5), 1, 2), Ok(HEADER));
        for (segment, strip, row) in [(6, 1, 2), (5, 0, 2), (5, 1, 3)] {
            let misplaced = UnitHeader::decode(&unit, POD, SegmentId(segment), strip, row);
            assert_eq!(misplaced, Err(DecodeError::Field));
        }
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_detected(bit in 0..UNIT_BYTES * 8) {
            let mut unit = unit();
            unit[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(UnitHeader::decode(&unit, POD, SegmentId(5), 1, 2).is_err());
        }

        #[test]
        fn decode_survives_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(UnitHeader::decode(&bytes, POD, SegmentId(5), 1, 2).is_err());
        }
    }
}

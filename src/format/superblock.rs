//! The superblock: two slots at the start of every device, the older of which is overwritten.
//!
//! ```text
//!  0         8          16          32            48           56        64
//!  +---------+----------+-----------+-------------+------------+---------+-------------+
//!  | magic   | checksum | pod uuid  | device uuid | generation | epoch   | epoch start |
//!  +---------+----------+-----------+-------------+------------+---------+-------------+
//!  | tail position 72 | tail lsn 80 | tail previous 88 | id limit 96 | journal bytes 104 |
//!  | strip bytes 112 | device bytes 120 | root location 128 |
//!  | device index 136 (2) | devices 138 (2) | k 140 (1) | m 141 (1) | reserved 142 (2) |
//!  | checkpoint 144 | places of the root's segment 152 (32 x 8) | reserved 408 ... 512 |
//! ```
//!
//! 512 bytes, so that one is written atomically by every device. It names who belongs together
//! (pod, device, geometry), which run is the newest (`generation`, `epoch`, `epoch start`), where
//! the journal begins (`tail ...`) and where the checkpoint is (`root ...`).

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U16;
use zerocopy::little_endian::U64;

use super::DecodeError;
use super::PodId;
use super::location::Location;
use super::table::Place;
use super::table::STRIPS_MAX;
use crate::codec::checksum::crc64;
use crate::units::IO_ALIGN;
use crate::units::Lsn;

/// "WEFTSB01" on disk.
const SUPERBLOCK_MAGIC: u64 = u64::from_le_bytes(*b"WEFTSB01");
/// Bytes of a superblock.
pub const SUPERBLOCK_BYTES: usize = size_of::<RawSuperblock>();
/// Byte offsets of the two slots.
pub const SLOT_OFFSETS: [u64; 2] = [0, 4096];
/// Byte offset of the journal's ring on every device; what lies between is reserved.
pub const JOURNAL_OFFSET: u64 = 1 << 20;

/// The superblock exactly as it lies on disk.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct RawSuperblock {
    pub(crate) magic: U64,
    pub(crate) checksum: U64,
    pub(crate) pod_uuid: [u8; 16],
    pub(crate) device_uuid: [u8; 16],
    pub(crate) generation: U64,
    pub(crate) epoch: U64,
    pub(crate) epoch_start: U64,
    pub(crate) tail_position: U64,
    pub(crate) tail_lsn: U64,
    pub(crate) tail_previous: U64,
    pub(crate) id_limit: U64,
    pub(crate) journal_bytes: U64,
    pub(crate) strip_bytes: U64,
    pub(crate) device_bytes: U64,
    pub(crate) root_location: U64,
    pub(crate) device_index: U16,
    pub(crate) device_count: U16,
    pub(crate) data_strips: u8,
    pub(crate) parity_strips: u8,
    pub(crate) zero: U16,
    pub(crate) checkpoint: U64,
    pub(crate) root_places: [U64; STRIPS_MAX],
    pub(crate) reserved: [u8; 104],
}

const _: () = assert!(size_of::<RawSuperblock>() == 512);

/// A superblock, validated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// The pod.
    pub pod: PodId,
    /// This device.
    pub device_uuid: [u8; 16],
    /// Index of this device in the pod, below `device_count`.
    pub device_index: u16,
    /// Devices in the pod (n).
    pub device_count: u16,
    /// Data strips per segment (k).
    pub data_strips: u8,
    /// Parity strips per segment (m).
    pub parity_strips: u8,
    /// Bytes of a strip.
    pub strip_bytes: u64,
    /// Bytes of the journal's ring on each device.
    pub journal_bytes: u64,
    /// Bytes of this device when it joined.
    pub device_bytes: u64,
    /// Counts superblock writes of the pod; the newest valid one wins.
    pub generation: u64,
    /// Counts opens of the pod.
    pub epoch: u64,
    /// First LSN of this epoch: entries of an older epoch at or above it are void.
    pub epoch_start: Lsn,
    /// Where the journal begins: every entry before it is in the checkpoint.
    pub tail_position: u64,
    /// LSN of the first entry at the tail.
    pub tail_lsn: Lsn,
    /// Header checksum of the batch before the tail.
    pub tail_previous: u64,
    /// Segment ids below this may have been handed out.
    pub id_limit: u64,
    /// Number of the newest checkpoint; 0 before the first.
    pub checkpoint: u64,
    /// Where the checkpoint root is; a hole before the first checkpoint.
    pub root: Location,
    /// Places of the root's segment; empty before the first checkpoint.
    pub root_places: Vec<Option<Place>>,
}

impl Superblock {
    /// Encodes the superblock.
    #[must_use]
    pub fn encode(&self) -> [u8; SUPERBLOCK_BYTES] {
        let mut root_places = [U64::new(u64::MAX); STRIPS_MAX];
        for (raw, place) in root_places.iter_mut().zip(&self.root_places) {
            *raw = Place::encode(*place).into();
        }
        let mut raw = RawSuperblock {
            magic: SUPERBLOCK_MAGIC.into(),
            checksum: 0.into(),
            pod_uuid: self.pod.0,
            device_uuid: self.device_uuid,
            generation: self.generation.into(),
            epoch: self.epoch.into(),
            epoch_start: self.epoch_start.0.into(),
            tail_position: self.tail_position.into(),
            tail_lsn: self.tail_lsn.0.into(),
            tail_previous: self.tail_previous.into(),
            id_limit: self.id_limit.into(),
            journal_bytes: self.journal_bytes.into(),
            strip_bytes: self.strip_bytes.into(),
            device_bytes: self.device_bytes.into(),
            root_location: self.root.0.into(),
            device_index: self.device_index.into(),
            device_count: self.device_count.into(),
            data_strips: self.data_strips,
            parity_strips: self.parity_strips,
            zero: 0.into(),
            checkpoint: self.checkpoint.into(),
            root_places,
            reserved: [0; 104],
        };
        raw.checksum = checksum(&raw).into();
        zerocopy::transmute!(raw)
    }

    /// Decodes a superblock.
    ///
    /// # Errors
    /// See [`DecodeError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (raw, _) = RawSuperblock::read_from_prefix(bytes).map_err(|_| DecodeError::Short)?;
        if raw.magic.get() != SUPERBLOCK_MAGIC {
            return Err(DecodeError::Magic);
        }
        if raw.checksum.get() != checksum(&raw) {
            return Err(DecodeError::Checksum);
        }
        let strips = usize::from(raw.data_strips) + usize::from(raw.parity_strips);
        let root_places = raw
            .root_places
            .iter()
            .take(if raw.root_location.get() == 0 { 0 } else { strips })
            .map(|place| Place::decode(place.get()))
            .collect::<Result<_, _>>()?;
        let superblock = Self {
            pod: PodId(raw.pod_uuid),
            device_uuid: raw.device_uuid,
            device_index: raw.device_index.get(),
            device_count: raw.device_count.get(),
            data_strips: raw.data_strips,
            parity_strips: raw.parity_strips,
            strip_bytes: raw.strip_bytes.get(),
            journal_bytes: raw.journal_bytes.get(),
            device_bytes: raw.device_bytes.get(),
            generation: raw.generation.get(),
            epoch: raw.epoch.get(),
            epoch_start: Lsn(raw.epoch_start.get()),
            tail_position: raw.tail_position.get(),
            tail_lsn: Lsn(raw.tail_lsn.get()),
            tail_previous: raw.tail_previous.get(),
            id_limit: raw.id_limit.get(),
            checkpoint: raw.checkpoint.get(),
            root: Location(raw.root_location.get()),
            root_places,
        };
        let zeroed = raw.zero.get() == 0 && raw.reserved == [0; 104];
        if zeroed && superblock.is_sane() { Ok(superblock) } else { Err(DecodeError::Field) }
    }

    /// Validates geometry before any arithmetic uses it.
    fn is_sane(&self) -> bool {
        let strips = usize::from(self.data_strips) + usize::from(self.parity_strips);
        let unit = super::unit::UNIT_BYTES as u64;
        self.device_index < self.device_count
            && self.data_strips > 0
            && self.parity_strips > 0
            && strips <= STRIPS_MAX
            && strips <= usize::from(self.device_count)
            && self.strip_bytes > 0
            && self.strip_bytes.is_multiple_of(unit)
            && self.journal_bytes > 0
            && self.journal_bytes.is_multiple_of(IO_ALIGN)
            && self.tail_position.is_multiple_of(IO_ALIGN)
            && self.device_bytes > JOURNAL_OFFSET
            && self.device_bytes - JOURNAL_OFFSET > self.journal_bytes
    }
}

fn checksum(raw: &RawSuperblock) -> u64 {
    crc64(raw.as_bytes().get(std::mem::offset_of!(RawSuperblock, pod_uuid)..).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn superblock(with_root: bool) -> Superblock {
        Superblock {
            pod: PodId([1; 16]),
            device_uuid: [2; 16],
            device_index: 3,
            device_count: 6,
            data_strips: 4,
            parity_strips: 2,
            strip_bytes: 1 << 20,
            journal_bytes: 1 << 20,
            device_bytes: 1 << 30,
            generation: 4,
            epoch: 5,
            epoch_start: Lsn(6),
            tail_position: 8192,
            tail_lsn: Lsn(7),
            tail_previous: 8,
            id_limit: 9,
            checkpoint: 10,
            root: if with_root { Location(1 << 20) } else { Location::HOLE },
            root_places: if with_root {
                (0..6).map(|i| (i != 2).then_some(Place { device: i, region: 7 })).collect()
            } else {
                Vec::new()
            },
        }
    }

    #[test]
    fn superblocks_survive_the_round_trip() {
        for with_root in [false, true] {
            let superblock = superblock(with_root);
            assert_eq!(Superblock::decode(&superblock.encode()), Ok(superblock));
        }
    }

    #[test]
    fn impossible_geometry_is_refused() {
        let mut superblock = superblock(true);
        superblock.data_strips = 0;
        assert_eq!(Superblock::decode(&superblock.encode()), Err(DecodeError::Field));
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_detected(bit in 0..SUPERBLOCK_BYTES * 8) {
            let mut bytes = superblock(true).encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Superblock::decode(&bytes).is_err());
        }

        #[test]
        fn decode_survives_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let _ = Superblock::decode(&bytes);
        }
    }
}

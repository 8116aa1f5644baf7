//! One self-describing item of the log: header, then payload. Journal and segments hold the same
//! records; moving one rewrites only its header checksum.
//!
//! ```text
//!  0        4    5     6       8                 16                24
//!  +--------+----+-----+-------+-----------------+-----------------+-----------------+
//!  | magic  |kind|codec| flags | header checksum | payload checksum| lsn             |
//!  +--------+----+-----+-------+-----------------+-----------------+-----------------+
//!  | branch 32       | lba 40          | blocks 48       | payload 56 | raw 60       |
//!  +-----------------+-----------------+-----------------+------------+--------------+
//!  | payload (64 ...)                                                                |
//! ```
//!
//! The header checksum covers the pod, the place the record lies at, and every other byte of the
//! header; through the payload checksum it covers the payload. A record found where it does not
//! belong fails it.

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
use crate::units::BranchId;
use crate::units::Lba;
use crate::units::Lsn;
use crate::units::round_up;

/// "WRC1" on disk. The digit is the format version: a new layout gets a new magic.
const RECORD_MAGIC: u32 = u32::from_le_bytes(*b"WRC1");
/// Bytes of a record's header.
pub const RECORD_HEADER_BYTES: usize = size_of::<RawHeader>();
/// Set in the place of a journal record, so that no segment address equals a journal position.
pub const JOURNAL_PLACE: u64 = 1 << 63;

const FLAG_LAST_OF_ENTRY: u16 = 1;
const FLAG_KEEP_ALLOCATED: u16 = 2;

/// What a record holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RecordKind {
    /// 1 to 8 adjacent blocks.
    Data = 1,
    /// A range that reads as zero; no payload.
    Zero = 2,
    /// A change of the catalog (JSON).
    CatalogChange = 3,
    /// A map node; `branch` is the layer, `lba` the level and index.
    MapNode = 4,
    /// A page of the segment table; `lba` is the page number.
    TablePage = 5,
    /// A page of table-page locations; `lba` is the page number.
    TableDirectory = 6,
    /// A part of the catalog (JSON); `lba` is the part number.
    Catalog = 7,
    /// The checkpoint root.
    Root = 8,
}

/// How a payload is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PayloadCodec {
    /// As it is.
    Raw = 0,
    /// A zstd frame.
    Zstd = 1,
}

/// The header exactly as it lies on disk.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct RawHeader {
    pub(crate) magic: U32,
    pub(crate) kind: u8,
    pub(crate) codec: u8,
    pub(crate) flags: U16,
    pub(crate) header_checksum: U64,
    pub(crate) payload_checksum: U64,
    pub(crate) lsn: U64,
    pub(crate) branch: U64,
    pub(crate) lba: U64,
    pub(crate) blocks: U64,
    pub(crate) payload_bytes: U32,
    pub(crate) raw_bytes: U32,
}

// The layout is a promise to every pod already written. Change it by adding a version.
const _: () = assert!(size_of::<RawHeader>() == 64);

/// A record's header, validated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// What the payload is.
    pub kind: RecordKind,
    /// How the payload is stored.
    pub codec: PayloadCodec,
    /// The last record of its entry: with it the entry is complete.
    pub last_of_entry: bool,
    /// For zeroes: report as allocated.
    pub keep_allocated: bool,
    /// CRC-64/NVME of the payload as stored.
    pub payload_checksum: u64,
    /// The entry's place in the order of acknowledgement; stamped once, kept when moved.
    pub lsn: Lsn,
    /// Whose writing it is.
    pub branch: BranchId,
    /// First block.
    pub lba: Lba,
    /// Blocks covered.
    pub blocks: u64,
    /// Bytes of payload as stored.
    pub payload_bytes: u32,
    /// Bytes of payload when decoded.
    pub raw_bytes: u32,
}

impl RecordHeader {
    /// Bytes of the whole record, without the padding to the next.
    #[must_use]
    pub fn record_bytes(&self) -> u64 {
        RECORD_HEADER_BYTES as u64 + u64::from(self.payload_bytes)
    }

    /// Bytes from this record's start to the next one's.
    #[must_use]
    pub fn stride(&self) -> u64 {
        round_up(self.record_bytes(), super::location::RECORD_ALIGN)
    }

    /// Encodes the header for a record that will lie at `place`.
    #[must_use]
    pub fn encode(&self, pod: PodId, place: u64) -> [u8; RECORD_HEADER_BYTES] {
        let flags = if self.last_of_entry { FLAG_LAST_OF_ENTRY } else { 0 }
            | if self.keep_allocated { FLAG_KEEP_ALLOCATED } else { 0 };
        let mut raw = RawHeader {
            magic: RECORD_MAGIC.into(),
            kind: self.kind as u8,
            codec: self.codec as u8,
            flags: flags.into(),
            header_checksum: 0.into(),
            payload_checksum: self.payload_checksum.into(),
            lsn: self.lsn.0.into(),
            branch: self.branch.0.into(),
            lba: self.lba.0.into(),
            blocks: self.blocks.into(),
            payload_bytes: self.payload_bytes.into(),
            raw_bytes: self.raw_bytes.into(),
        };
        raw.header_checksum = header_checksum(&raw, pod, place).into();
        zerocopy::transmute!(raw)
    }

    /// Decodes the header at the start of `bytes`, which lie at `place`. Never panics.
    ///
    /// # Errors
    /// See [`DecodeError`]; no field is trusted before the checksum matches.
    pub fn decode(bytes: &[u8], pod: PodId, place: u64) -> Result<Self, DecodeError> {
        let (raw, _) = RawHeader::read_from_prefix(bytes).map_err(|_| DecodeError::Short)?;
        if raw.magic.get() != RECORD_MAGIC {
            return Err(DecodeError::Magic);
        }
        if raw.header_checksum.get() != header_checksum(&raw, pod, place) {
            return Err(DecodeError::Checksum);
        }
        let flags = raw.flags.get();
        if flags & !(FLAG_LAST_OF_ENTRY | FLAG_KEEP_ALLOCATED) != 0 {
            return Err(DecodeError::Field);
        }
        Ok(Self {
            kind: RecordKind::from_byte(raw.kind).ok_or(DecodeError::Field)?,
            codec: PayloadCodec::from_byte(raw.codec).ok_or(DecodeError::Field)?,
            last_of_entry: flags & FLAG_LAST_OF_ENTRY != 0,
            keep_allocated: flags & FLAG_KEEP_ALLOCATED != 0,
            payload_checksum: raw.payload_checksum.get(),
            lsn: Lsn(raw.lsn.get()),
            branch: BranchId(raw.branch.get()),
            lba: Lba(raw.lba.get()),
            blocks: raw.blocks.get(),
            payload_bytes: raw.payload_bytes.get(),
            raw_bytes: raw.raw_bytes.get(),
        })
    }
}

/// Decodes the record at the start of `bytes`: header and payload as stored, both verified.
///
/// # Errors
/// See [`DecodeError`].
pub fn decode_record(
    bytes: &[u8],
    pod: PodId,
    place: u64,
) -> Result<(RecordHeader, &[u8]), DecodeError> {
    let header = RecordHeader::decode(bytes, pod, place)?;
    let end = RECORD_HEADER_BYTES + header.payload_bytes as usize;
    let payload = bytes.get(RECORD_HEADER_BYTES..end).ok_or(DecodeError::Short)?;
    if crc64(payload) != header.payload_checksum && !planted(Bug::PayloadUnchecked) {
        return Err(DecodeError::Checksum);
    }
    Ok((header, payload))
}

fn header_checksum(raw: &RawHeader, pod: PodId, place: u64) -> u64 {
    let place = if planted(Bug::PlaceUnchecked) { 0 } else { place };
    let bytes = raw.as_bytes();
    let (before, rest) = bytes.split_at(std::mem::offset_of!(RawHeader, header_checksum));
    identity_checksum(pod, place, &[before, rest.get(8..).unwrap_or_default()])
}

impl RecordKind {
    fn from_byte(byte: u8) -> Option<Self> {
        [
            Self::Data,
            Self::Zero,
            Self::CatalogChange,
            Self::MapNode,
            Self::TablePage,
            Self::TableDirectory,
            Self::Catalog,
            Self::Root,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
    }
}

impl PayloadCodec {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Raw, Self::Zstd].into_iter().find(|codec| *codec as u8 == byte)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POD: PodId = PodId([7; 16]);

    fn record() -> impl Strategy<Value = (RecordHeader, Vec<u8>)> {
        (any::<[u64; 4]>(), prop::collection::vec(any::<u8>(), 0..300), any::<[bool; 3]>())
            .prop_map(|(numbers, payload, flags)| {
                let header = RecordHeader {
                    kind: if flags[0] { RecordKind::Data } else { RecordKind::MapNode },
                    codec: if flags[1] { PayloadCodec::Raw } else { PayloadCodec::Zstd },
                    last_of_entry: flags[2],
                    keep_allocated: flags[0],
                    payload_checksum: crc64(&payload),
                    lsn: Lsn(numbers[0]),
                    branch: BranchId(numbers[1]),
                    lba: Lba(numbers[2]),
                    blocks: numbers[3],
                    payload_bytes: u32::try_from(payload.len()).expect("short"),
                    raw_bytes: 9,
                };
                (header, payload)
            })
    }

    fn encoded(header: &RecordHeader, payload: &[u8], place: u64) -> Vec<u8> {
        [&header.encode(POD, place)[..], payload].concat()
    }

    proptest! {
        #[test]
        fn decode_inverts_encode((header, payload) in record(), place: u64) {
            let bytes = encoded(&header, &payload, place);
            prop_assert_eq!(decode_record(&bytes, POD, place), Ok((header, &payload[..])));
        }

        #[test]
        fn any_flipped_bit_is_detected((header, payload) in record(), at: prop::sample::Index) {
            let mut bytes = encoded(&header, &payload, 5);
            let bit = at.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(decode_record(&bytes, POD, 5).is_err());
        }

        #[test]
        fn a_record_elsewhere_or_of_another_pod_is_refused((header, payload) in record()) {
            let bytes = encoded(&header, &payload, 5);
            prop_assert_eq!(decode_record(&bytes, POD, 6), Err(DecodeError::Checksum));
            prop_assert_eq!(decode_record(&bytes, PodId([8; 16]), 5), Err(DecodeError::Checksum));
        }

        #[test]
        fn decode_survives_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_record(&bytes, POD, 0);
        }
    }
}

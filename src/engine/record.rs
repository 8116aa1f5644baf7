//! Records in memory: prepared by a write, stamped by the journal, buffered until mapped.

use std::sync::Arc;

use bytes::Bytes;

use super::layer::Layer;
use super::space::Promise;
use crate::codec::checksum::crc64;
use crate::codec::compress::compress;
use crate::format::record::PayloadCodec;
use crate::format::record::RecordHeader;
use crate::format::record::RecordKind;
use crate::units::BLOCK_BYTES;
use crate::units::BranchId;
use crate::units::Lba;
use crate::units::Lsn;
use crate::units::bytes_u64;

/// Most blocks compressed together.
pub const CHUNK_BLOCKS_MAX: u64 = 8;
/// Most blocks of an incompressible chunk: two such records fit a unit, so that raw data does not
/// waste half of it.
pub const RAW_CHUNK_BLOCKS_MAX: usize = 7;
/// zstd level at the door: fast, as every write waits for it.
pub const DOOR_LEVEL: i32 = -1;
/// Set in the cache key of a buffered record, so that it equals no location.
const BUFFERED_KEY: u64 = 1 << 63;

/// A record that has been acknowledged, or is about to be.
pub struct BufferedRecord {
    /// The header; its LSN is stamped by the journal.
    pub header: RecordHeader,
    /// Payload as stored.
    pub payload: Bytes,
    /// The layer it belongs to; none for catalog changes.
    pub layer: Option<Arc<Layer>>,
    /// Space held for it until it is mapped or superseded.
    pub promise: Option<Promise>,
    /// Its place within its entry, to tell cache keys apart.
    pub number: u16,
}

impl BufferedRecord {
    /// First block past it.
    #[must_use]
    pub fn end_lba(&self) -> u64 {
        self.header.lba.0.saturating_add(self.header.blocks)
    }

    /// The chunk cache's key while it is buffered.
    #[must_use]
    pub fn cache_key(&self) -> u64 {
        BUFFERED_KEY | self.header.lsn.0 << 12 | u64::from(self.number & 0xFFF)
    }
}

/// A header for a payload that is about to enter the log; LSN and branch are stamped later.
#[must_use]
pub fn header_of(kind: RecordKind, lba: Lba, blocks: u64, payload: &[u8]) -> RecordHeader {
    let bytes = u32::try_from(payload.len()).expect("payloads are below 64 KiB");
    RecordHeader {
        kind,
        codec: PayloadCodec::Raw,
        last_of_entry: false,
        keep_allocated: false,
        payload_checksum: crc64(payload),
        lsn: Lsn(0),
        branch: BranchId(0),
        lba,
        blocks,
        payload_bytes: bytes,
        raw_bytes: bytes,
    }
}

/// Compresses `content` into a payload with its header; raw if it does not shrink.
#[must_use]
pub fn compressed(
    kind: RecordKind,
    lba: Lba,
    blocks: u64,
    content: &[u8],
) -> (RecordHeader, Bytes) {
    let mut packed = Vec::new();
    if compress(content, DOOR_LEVEL, &mut packed) {
        let mut header = header_of(kind, lba, blocks, &packed);
        header.codec = PayloadCodec::Zstd;
        header.raw_bytes = u32::try_from(content.len()).expect("contents are below 4 GiB");
        return (header, Bytes::from(packed));
    }
    (header_of(kind, lba, blocks, content), Bytes::copy_from_slice(content))
}

/// Compresses one chunk of blocks; an incompressible one becomes raw records that pack well.
pub fn push_chunk(lba: Lba, content: &[u8], out: &mut Vec<(RecordHeader, Bytes)>) {
    let blocks = bytes_u64(content.len() / BLOCK_BYTES);
    let record = compressed(RecordKind::Data, lba, blocks, content);
    if record.0.codec == PayloadCodec::Zstd || content.len() <= RAW_CHUNK_BLOCKS_MAX * BLOCK_BYTES {
        out.push(record);
        return;
    }
    let (first, rest) = content.split_at(RAW_CHUNK_BLOCKS_MAX * BLOCK_BYTES);
    for (lba, part) in [(lba, first), (Lba(lba.0 + RAW_CHUNK_BLOCKS_MAX as u64), rest)] {
        let blocks = bytes_u64(part.len() / BLOCK_BYTES);
        let header = header_of(RecordKind::Data, lba, blocks, part);
        out.push((header, Bytes::copy_from_slice(part)));
    }
}

/// A record that makes a range zero.
#[must_use]
pub fn zero_header(lba: Lba, blocks: u64, keep_allocated: bool) -> RecordHeader {
    RecordHeader { keep_allocated, ..header_of(RecordKind::Zero, lba, blocks, &[]) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A buffered zero record, as the index sees it.
    pub(crate) fn zero_record(lsn: u64, lba: u64, blocks: u64) -> BufferedRecord {
        let header = RecordHeader { lsn: Lsn(lsn), ..zero_header(Lba(lba), blocks, false) };
        BufferedRecord { header, payload: Bytes::new(), layer: None, promise: None, number: 0 }
    }

    #[test]
    fn incompressible_chunks_become_records_two_of_which_fit_a_unit() {
        let mut state = 1_u64;
        let noise: Vec<u8> = (0..8 * BLOCK_BYTES)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            })
            .collect();
        let mut records = Vec::new();
        push_chunk(Lba(8), &noise, &mut records);
        let shape: Vec<_> = records.iter().map(|(h, _)| (h.lba.0, h.blocks)).collect();
        assert_eq!(shape, [(8, 7), (15, 1)]);
        push_chunk(Lba(0), &vec![7; 8 * BLOCK_BYTES], &mut records);
        assert_eq!(records[2].0.codec, PayloadCodec::Zstd);
    }
}

//! Header of a journal batch: the unit in which acknowledged entries reach the devices.
//!
//! ```text
//!  0        4        8                 16                24                32
//!  +--------+--------+-----------------+-----------------+-----------------+---------------+
//!  | magic  | entries| header checksum | body checksum   | position        | epoch         |
//!  +--------+--------+-----------------+-----------------+-----------------+---------------+
//!  | first lsn 40    | previous 48     | durable lsn 56  | body bytes 64   | reserved 72   |
//!  +-----------------+-----------------+-----------------+-----------------+---------------+
//!  | records (96 ...), zero padding to a multiple of 4096                                  |
//! ```
//!
//! A batch at position `p` of the endless journal lies at `p mod ring` on every device that holds
//! it. `previous` is the header checksum of the batch before it, so that batches form a chain;
//! `durable lsn` says which entries were known durable when this batch was written: a gap below it
//! is damage, never the journal's end.

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use super::DecodeError;
use super::PodId;
use super::identity_checksum;
use crate::canary::Bug;
use crate::canary::planted;
use crate::codec::checksum::crc64;
use crate::units::IO_ALIGN;
use crate::units::Lsn;
use crate::units::round_up;

/// "WJB1" on disk.
const BATCH_MAGIC: u32 = u32::from_le_bytes(*b"WJB1");
/// Bytes of a batch's header.
pub const BATCH_HEADER_BYTES: usize = size_of::<RawBatch>();
/// Largest batch, header and padding included.
pub const BATCH_BYTES_MAX: u64 = 1 << 20;

/// The header exactly as it lies on disk.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct RawBatch {
    pub(crate) magic: U32,
    pub(crate) entries: U32,
    pub(crate) header_checksum: U64,
    pub(crate) body_checksum: U64,
    pub(crate) position: U64,
    pub(crate) epoch: U64,
    pub(crate) first_lsn: U64,
    pub(crate) previous: U64,
    pub(crate) durable_lsn: U64,
    pub(crate) body_bytes: U64,
    pub(crate) reserved: [u8; 24],
}

const _: () = assert!(size_of::<RawBatch>() == 96);

/// A batch's header, validated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchHeader {
    /// This header's checksum: what the next batch names as `previous`.
    pub checksum: u64,
    /// Entries in the batch; they have consecutive LSNs.
    pub entries: u32,
    /// CRC-64/NVME of the body.
    pub body_checksum: u64,
    /// Byte position in the endless journal.
    pub position: u64,
    /// The run of the pod that wrote it.
    pub epoch: u64,
    /// LSN of the first entry.
    pub first_lsn: Lsn,
    /// Header checksum of the batch before.
    pub previous: u64,
    /// Every entry up to here was durable when the batch was written.
    pub durable_lsn: Lsn,
    /// Bytes of records, without padding.
    pub body_bytes: u64,
}

impl BatchHeader {
    /// Bytes the batch takes in the ring, padding included.
    #[must_use]
    pub fn batch_bytes(&self) -> u64 {
        batch_bytes(self.body_bytes)
    }

    /// LSN the next batch starts with.
    #[must_use]
    pub fn next_lsn(&self) -> Lsn {
        Lsn(self.first_lsn.0 + u64::from(self.entries))
    }

    /// Encodes the header and fills in `checksum`.
    #[must_use]
    pub fn encode(&mut self, pod: PodId) -> [u8; BATCH_HEADER_BYTES] {
        let mut raw = RawBatch {
            magic: BATCH_MAGIC.into(),
            entries: self.entries.into(),
            header_checksum: 0.into(),
            body_checksum: self.body_checksum.into(),
            position: self.position.into(),
            epoch: self.epoch.into(),
            first_lsn: self.first_lsn.0.into(),
            previous: self.previous.into(),
            durable_lsn: self.durable_lsn.0.into(),
            body_bytes: self.body_bytes.into(),
            reserved: [0; 24],
        };
        self.checksum = header_checksum(&raw, pod);
        raw.header_checksum = self.checksum.into();
        zerocopy::transmute!(raw)
    }

    /// Decodes a header. The body is checked by [`BatchHeader::body`].
    ///
    /// # Errors
    /// See [`DecodeError`].
    pub fn decode(bytes: &[u8], pod: PodId) -> Result<Self, DecodeError> {
        let (raw, _) = RawBatch::read_from_prefix(bytes).map_err(|_| DecodeError::Short)?;
        if raw.magic.get() != BATCH_MAGIC {
            return Err(DecodeError::Magic);
        }
        if raw.header_checksum.get() != header_checksum(&raw, pod) {
            return Err(DecodeError::Checksum);
        }
        let header = Self {
            checksum: raw.header_checksum.get(),
            entries: raw.entries.get(),
            body_checksum: raw.body_checksum.get(),
            position: raw.position.get(),
            epoch: raw.epoch.get(),
            first_lsn: Lsn(raw.first_lsn.get()),
            previous: raw.previous.get(),
            durable_lsn: Lsn(raw.durable_lsn.get()),
            body_bytes: raw.body_bytes.get(),
        };
        let sane = raw.reserved == [0; 24]
            && header.position.is_multiple_of(IO_ALIGN)
            && header.body_bytes <= BATCH_BYTES_MAX
            && header.batch_bytes() <= BATCH_BYTES_MAX
            && header.first_lsn.0.checked_add(u64::from(header.entries)).is_some();
        if sane { Ok(header) } else { Err(DecodeError::Field) }
    }

    /// The body that follows the header in `batch`, verified.
    ///
    /// # Errors
    /// See [`DecodeError`]: a torn or rotten batch.
    pub fn body<'a>(&self, batch: &'a [u8]) -> Result<&'a [u8], DecodeError> {
        let end = BATCH_HEADER_BYTES + crate::units::bytes_usize(self.body_bytes);
        let body = batch.get(BATCH_HEADER_BYTES..end).ok_or(DecodeError::Short)?;
        let intact = crc64(body) == self.body_checksum || planted(Bug::BatchBodyUnchecked);
        if intact { Ok(body) } else { Err(DecodeError::Checksum) }
    }
}

/// Bytes a batch with a body of `body_bytes` takes in the ring.
#[must_use]
pub fn batch_bytes(body_bytes: u64) -> u64 {
    round_up(BATCH_HEADER_BYTES as u64 + body_bytes, IO_ALIGN)
}

fn header_checksum(raw: &RawBatch, pod: PodId) -> u64 {
    let bytes = raw.as_bytes();
    let (before, rest) = bytes.split_at(std::mem::offset_of!(RawBatch, header_checksum));
    identity_checksum(pod, 0, &[before, rest.get(8..).unwrap_or_default()])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POD: PodId = PodId([3; 16]);

    fn header(body: &[u8], lsn: u32) -> BatchHeader {
        BatchHeader {
            checksum: 0,
            entries: 2,
            body_checksum: crc64(body),
            position: 8192,
            epoch: 4,
            first_lsn: Lsn(lsn.into()),
            previous: 77,
            durable_lsn: Lsn(1),
            body_bytes: body.len() as u64,
        }
    }

    proptest! {
        #[test]
        fn decode_inverts_encode(body in prop::collection::vec(any::<u8>(), 0..500), lsn: u32) {
            let mut header = header(&body, lsn);
            let bytes = [&header.encode(POD)[..], &body].concat();
            prop_assert_eq!(BatchHeader::decode(&bytes, POD), Ok(header));
            prop_assert_eq!(header.body(&bytes), Ok(&body[..]));
        }

        #[test]
        fn any_flipped_bit_is_detected(
            body in prop::collection::vec(any::<u8>(), 0..200), at: prop::sample::Index
        ) {
            let mut header = header(&body, 9);
            let mut bytes = [&header.encode(POD)[..], &body].concat();
            let bit = at.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            let intact = BatchHeader::decode(&bytes, POD).and_then(|h| h.body(&bytes).map(drop));
            prop_assert!(intact.is_err());
        }

        #[test]
        fn decode_survives_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = BatchHeader::decode(&bytes, POD);
        }
    }
}

//! The way in: bytes to records, room promised, appended to the journal.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::try_join_all;
use weft_api::Stage;

use super::Engine;
use super::journal::NewEntry;
use super::journal::NewRecord;
use super::layer::Layer;
use super::range_lock::RangeGuard;
use super::record::CHUNK_BLOCKS_MAX;
use super::record::push_chunk;
use super::record::zero_header;
use super::space::Admission;
use super::space::Promise;
use crate::codec::compress::is_zero;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::format::record::RecordHeader;
use crate::format::record::RecordKind;
use crate::observe::event;
use crate::observe::stages::timed;
use crate::observe::stages::timed_now;
use crate::units::BLOCK_BYTES;
use crate::units::BLOCK_BYTES_U64;
use crate::units::Lba;
use crate::units::bytes_u64;

/// Largest write that is all or nothing: the pod's atomic write size.
pub const ATOMIC_WRITE_BYTES: u64 = 64 << 10;
const ATOMIC_WRITE_BLOCKS: u64 = ATOMIC_WRITE_BYTES / BLOCK_BYTES_U64;

/// What a request to zero a range comes to.
pub struct ZeroRange {
    /// Blocks at the ends of which only a part becomes zero, with their new content.
    pub partial: Vec<(Lba, Bytes)>,
    /// First whole block.
    pub lba: Lba,
    /// Whole blocks; may be none.
    pub blocks: u64,
    /// Report the whole blocks as allocated.
    pub keep_allocated: bool,
}

impl Engine {
    /// Writes whole blocks. `hold` is the range lock on them.
    ///
    /// # Durability
    /// On `Ok` the data is durable and visible. Up to [`ATOMIC_WRITE_BYTES`] are one entry.
    ///
    /// # Errors
    /// `NoSpace` if the pod is full, `Poisoned` once durability was lost; larger writes may then be
    /// done in part.
    pub async fn write(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        hold: Arc<RangeGuard>,
        lba: Lba,
        data: &[u8],
    ) -> Result<()> {
        assert!(data.len().is_multiple_of(BLOCK_BYTES));
        let mut appends = Vec::new();
        for (lba, part) in atomic_parts(lba, data) {
            let mut records = Vec::new();
            timed_now(&self.env, Stage::Compress, || {
                for (lba, chunk) in chunks(lba, part) {
                    push_blocks(lba, chunk, &mut records);
                }
            });
            let records = timed(&self.env, Stage::Space, self.promise_all(records)).await?;
            let entry =
                NewEntry { layer: Some(Arc::clone(layer)), records, hold: Some(Arc::clone(&hold)) };
            appends.push(self.append(entry));
        }
        drop(hold);
        if appends.len() == 1 {
            timed(&self.env, Stage::Journal, appends.remove(0)).await?;
        } else {
            timed(&self.env, Stage::Journal, try_join_all(appends)).await?;
        }
        Ok(())
    }

    /// Makes blocks zero, whatever their number, in one entry with the blocks at the ends that
    /// are zero only in part.
    ///
    /// # Errors
    /// `Poisoned` once durability was lost; `NoSpace` only with partial blocks: a full pod can be
    /// trimmed.
    pub async fn zero(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        hold: Arc<RangeGuard>,
        range: &ZeroRange,
    ) -> Result<()> {
        let mut records = Vec::new();
        for (lba, block) in &range.partial {
            push_blocks(*lba, block, &mut records);
        }
        if range.blocks > 0 {
            let header = zero_header(range.lba, range.blocks, range.keep_allocated);
            records.push((header, Bytes::new()));
        }
        let records = timed(&self.env, Stage::Space, self.promise_all(records)).await?;
        let entry = NewEntry { layer: Some(Arc::clone(layer)), records, hold: Some(hold) };
        timed(&self.env, Stage::Journal, self.append(entry)).await.map(drop)
    }

    /// Gets room for every record that will occupy any.
    async fn promise_all(&self, records: Vec<(RecordHeader, Bytes)>) -> Result<Vec<NewRecord>> {
        let mut promised = Vec::with_capacity(records.len());
        for (header, payload) in records {
            let promise = match header.kind {
                RecordKind::Data => Some(self.promise(header.stride()).await?),
                _ => None,
            };
            promised.push(NewRecord { header, payload, promise });
        }
        Ok(promised)
    }

    async fn promise(&self, bytes: u64) -> Result<Promise> {
        loop {
            let mut changed = std::pin::pin!(self.space.changed.notified());
            changed.as_mut().enable();
            match self.space.admit(bytes) {
                Admission::Granted(promise) => return Ok(promise),
                Admission::Wait => {
                    if let Some(error) = self.journal.failure() {
                        return Err(error);
                    }
                    self.wake_mapper();
                    changed.await;
                }
                Admission::Full => return Err(self.no_room()),
            }
        }
    }

    /// Why there is no room. Without enough devices there is none either, but none can be made.
    fn no_room(&self) -> Error {
        if !self.pool.has_enough_devices() {
            return Error::new(ErrorKind::DeviceFailed, "write").context(format_args!(
                "{} devices are in service and {} are needed: mend them and start the node again",
                self.pool.in_service_count(),
                self.pool.geometry.data_strips
            ));
        }
        event::raise(event::POD_FULL, "pod", "a write was refused for want of room");
        Error::new(ErrorKind::NoSpace, "write")
            .context("the pod is full: trim or delete volumes, or create a larger pod")
    }
}

/// One part for a write of up to the atomic size, else parts that end on its multiples.
fn atomic_parts(lba: Lba, data: &[u8]) -> impl Iterator<Item = (Lba, &[u8])> {
    // An unaligned request was widened to whole blocks and is still one request.
    let whole = bytes_u64(data.len()) <= ATOMIC_WRITE_BYTES + BLOCK_BYTES_U64;
    split_at_multiples(lba, data, if whole { u64::MAX } else { ATOMIC_WRITE_BLOCKS })
}

/// Parts that end on chunk boundaries.
fn chunks(lba: Lba, data: &[u8]) -> impl Iterator<Item = (Lba, &[u8])> {
    split_at_multiples(lba, data, CHUNK_BLOCKS_MAX)
}

fn split_at_multiples(
    mut lba: Lba,
    mut data: &[u8],
    multiple: u64,
) -> impl Iterator<Item = (Lba, &[u8])> {
    std::iter::from_fn(move || {
        if data.is_empty() {
            return None;
        }
        let blocks = (multiple - lba.0 % multiple).min(bytes_u64(data.len() / BLOCK_BYTES));
        let (part, rest) = data.split_at(crate::units::bytes_usize(blocks * BLOCK_BYTES_U64));
        let at = lba;
        lba = Lba(lba.0 + blocks);
        data = rest;
        Some((at, part))
    })
}

/// Records for the blocks of one chunk: runs of zero blocks are never stored.
fn push_blocks(lba: Lba, chunk: &[u8], out: &mut Vec<(RecordHeader, Bytes)>) {
    let (blocks, _) = chunk.as_chunks::<BLOCK_BYTES>();
    let mut from = 0;
    for run in blocks.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let at = Lba(lba.0 + bytes_u64(from));
        if is_zero(&run[0]) {
            out.push((zero_header(at, bytes_u64(run.len()), true), Bytes::new()));
        } else {
            push_chunk(at, run.as_flattened(), out);
        }
        from += run.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_up_to_the_atomic_size_are_one_entry_and_zero_blocks_are_not_stored() {
        let data = vec![1; 64 << 10];
        assert_eq!(atomic_parts(Lba(3), &data).count(), 1);
        let data = vec![1; 128 << 10];
        let parts: Vec<_> =
            atomic_parts(Lba(3), &data).map(|(l, p)| (l.0, p.len() >> 12)).collect();
        assert_eq!(parts, [(3, 13), (16, 16), (32, 3)]);

        let mut chunk = vec![0; 4 * BLOCK_BYTES];
        chunk[BLOCK_BYTES] = 1;
        let mut records = Vec::new();
        push_blocks(Lba(8), &chunk, &mut records);
        let shape: Vec<_> = records.iter().map(|(h, _)| (h.kind, h.lba.0, h.blocks)).collect();
        let (zero, data) = (RecordKind::Zero, RecordKind::Data);
        assert_eq!(shape, [(zero, 8, 1), (data, 9, 1), (zero, 10, 2)]);
    }
}

//! The way in: bytes to records, room promised, appended to the journal.

use std::sync::Arc;
use std::time::Duration;

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
use super::space::room_for;
use super::volatile::Acknowledge;
use crate::codec::compress::is_zero;
use crate::env::timeout;
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

/// Who waits for room asks again after this long, whatever has changed.
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(500);

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
    /// On `Ok` the data is visible, and durable unless it was to be acknowledged early. Up to
    /// [`ATOMIC_WRITE_BYTES`] are one entry.
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
        acknowledge: Acknowledge,
    ) -> Result<()> {
        assert!(data.len().is_multiple_of(BLOCK_BYTES));
        if is_one_entry(data) {
            return self.write_part(layer, hold, lba, data, acknowledge).await;
        }
        // Side by side: one that waits for room must not keep what others were promised.
        let part = |(lba, part)| self.write_part(layer, Arc::clone(&hold), lba, part, acknowledge);
        let parts: Vec<_> = split_at_multiples(lba, data, ATOMIC_WRITE_BLOCKS).map(part).collect();
        drop(hold);
        try_join_all(parts).await.map(drop)
    }

    /// Writes whole blocks as one entry.
    async fn write_part(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        hold: Arc<RangeGuard>,
        lba: Lba,
        data: &[u8],
        acknowledge: Acknowledge,
    ) -> Result<()> {
        let mut records = Vec::new();
        timed_now(&self.env, Stage::Compress, || {
            for (lba, chunk) in chunks(lba, data) {
                push_blocks(lba, chunk, &mut records);
            }
        });
        self.append_promised(layer, hold, records, acknowledge).await
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
        acknowledge: Acknowledge,
    ) -> Result<()> {
        let mut records = Vec::new();
        for (lba, block) in &range.partial {
            push_blocks(*lba, block, &mut records);
        }
        if range.blocks > 0 {
            let header = zero_header(range.lba, range.blocks, range.keep_allocated);
            records.push((header, Bytes::new()));
        }
        self.append_promised(layer, hold, records, acknowledge).await
    }

    /// Gets room for `records`, then appends them as one entry.
    async fn append_promised(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        hold: Arc<RangeGuard>,
        records: Vec<(RecordHeader, Bytes)>,
        acknowledge: Acknowledge,
    ) -> Result<()> {
        let records = timed(&self.env, Stage::Space, self.promise_all(records)).await?;
        let (layer, hold) = (Some(Arc::clone(layer)), Some(hold));
        let entry = NewEntry { layer, records, hold, acknowledge };
        timed(&self.env, Stage::Journal, self.append(entry)).await
    }

    /// Gets room for every record that will occupy any: for all data at once, as entries that each
    /// hold a part could wait for one another.
    async fn promise_all(&self, records: Vec<(RecordHeader, Bytes)>) -> Result<Vec<NewRecord>> {
        let data = records.iter().map(|(header, _)| header).filter(|h| h.kind == RecordKind::Data);
        let bytes = data.map(room_for).sum();
        let mut all = if bytes > 0 { Some(self.promise(bytes).await?) } else { None };
        let promised = records.into_iter().map(|(mut header, payload)| {
            let promise = match header.kind {
                RecordKind::Data => all.as_mut().map(|all| all.split(room_for(&header))),
                _ => self.promise_zeroes(&mut header),
            };
            NewRecord { header, payload, promise }
        });
        Ok(promised.collect())
    }

    /// Gets room for the map to say which blocks are zero and allocated. Without any they become
    /// holes, which need none and read the same.
    fn promise_zeroes(&self, header: &mut RecordHeader) -> Option<Promise> {
        let bytes = room_for(header);
        if bytes == 0 {
            return None;
        }
        if let Admission::Granted(promise) = self.space.admit(bytes) {
            return Some(promise);
        }
        header.keep_allocated = false;
        None
    }

    async fn promise(&self, bytes: u64) -> Result<Promise> {
        loop {
            let mut changed = std::pin::pin!(self.space.changed.notified());
            changed.as_mut().enable();
            match self.space.admit(bytes) {
                Admission::Granted(promise) => return Ok(promise),
                Admission::Wait => {
                    // Nobody makes room for what the journal would refuse.
                    if let Some(error) = self.journal.refusal() {
                        return Err(error);
                    }
                    self.wake_mapper();
                    // What another asked for and did not get may have been in the way just then.
                    let _ = timeout(&self.env, ASK_AGAIN_AFTER, changed).await;
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

/// Whether a write is all or nothing. An unaligned request was widened to whole blocks and is still
/// one request. Longer ones are cut at multiples of the atomic size.
fn is_one_entry(data: &[u8]) -> bool {
    bytes_u64(data.len()) <= ATOMIC_WRITE_BYTES + BLOCK_BYTES_U64
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
    use crate::device::sim::SimDisk;
    use crate::device::sim::SimProfile;
    use crate::engine::open::EngineFormat;
    use crate::engine::open::EngineOptions;
    use crate::engine::space::Levels;
    use crate::env::EnvRef;
    use crate::env::sim::SimEnv;

    #[test]
    fn who_waits_for_room_in_a_closed_pod_is_refused() {
        let world = SimEnv::new(1);
        let env: EnvRef = world.clone();
        let disk = |index| SimDisk::new(format!("disk-{index}"), SimProfile::new(32 << 20));
        let disks: Vec<SimDisk> = (0..3).map(disk).collect();
        world.run(async {
            let devices = || disks.iter().map(|disk| disk.open(&env)).collect::<Vec<_>>();
            let format = EngineFormat { data_strips: 1, parity_strips: 1, journal_bytes: 1 << 20 };
            Engine::format(&env, &devices(), format).await.expect("formatted");
            let options = EngineOptions {
                cache_bytes: 0,
                map_cache_bytes: 1 << 20,
                force: false,
                replace_missing: false,
            };
            let engine = Engine::open(Arc::clone(&env), devices(), options).await.expect("opened");
            engine.close().await.expect("closed");
            // There would be room after a reclaim, which nobody does any more.
            engine.space.publish(Levels { limit_bytes: 1 << 30, ..Levels::default() });
            let outcome = timeout(&env, ASK_AGAIN_AFTER * 4, engine.promise(4096)).await;
            let refused = outcome.expect("an answer").map(drop).expect_err("no room");
            assert_eq!(refused.kind(), ErrorKind::ShuttingDown);
        });
        world.halt();
    }

    #[test]
    fn writes_up_to_the_atomic_size_are_one_entry_and_zero_blocks_are_not_stored() {
        assert!(is_one_entry(&vec![1; 64 << 10]));
        let data = vec![1; 128 << 10];
        assert!(!is_one_entry(&data));
        let parts: Vec<_> = split_at_multiples(Lba(3), &data, ATOMIC_WRITE_BLOCKS)
            .map(|(lba, part)| (lba.0, part.len() >> 12))
            .collect();
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

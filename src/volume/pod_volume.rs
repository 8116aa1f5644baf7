//! A volume of a pod: bytes to blocks, the order of overlapping requests, the read-modify-write of
//! partial blocks, and what reservations forbid.
//!
//! # Invariants
//! * A request that changes content holds its range before it asks whether reservations allow it,
//!   and until it is visible. So once new ones are published and the whole volume was held for a
//!   moment, nothing they forbid can still happen.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use bytes::BytesMut;
use parking_lot::RwLock;
use tokio::sync::oneshot;
use uuid::Uuid;
use weft_api::Stage;

use super::Extent;
use super::PREFETCH_STEP_BYTES;
use super::Piece;
use super::Volume;
use super::VolumeRef;
use super::ZeroMode;
use super::pieces_equal;
use super::pod::VolumeInfo;
use super::reservation::Access;
use super::reservation::CurrentReservations;
use super::reservation::Reservations;
use crate::engine::Engine;
use crate::engine::block_status::BlockState;
use crate::engine::catalog::CatalogChange;
use crate::engine::catalog::VolumeRecord;
use crate::engine::layer::Layer;
use crate::engine::range_lock::RangeGuard;
use crate::engine::range_lock::RangeLock;
use crate::engine::read::BlockPiece;
use crate::engine::volatile::Acknowledge;
use crate::engine::write::ATOMIC_WRITE_BYTES;
use crate::engine::write::ZeroRange;
use crate::env::LocalBoxFuture;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::observe::requests::Requests;
use crate::observe::stages::timed;
use crate::units::BLOCK_BYTES;
use crate::units::BLOCK_BYTES_U64;
use crate::units::Lba;
use crate::units::bytes_u64;
use crate::units::bytes_usize;

/// Largest range that is kept allocated when zeroed: every block of it gets a map entry. Larger
/// ones become holes, which read the same.
const KEEP_ALLOCATED_BYTES_MAX: u64 = 64 << 20;

/// What share of the RAM cache one prefetch may fill: a quarter. The rest is left to others.
const PREFETCH_CACHE_SHARE: u64 = 4;

/// See the module. A clone is the same volume.
#[derive(Clone)]
pub struct PodVolume {
    engine: Arc<Engine>,
    layer: Arc<Layer>,
    /// In units of blocks.
    ranges: Arc<RangeLock>,
    shared: Arc<Shared>,
    /// Who uses it this way; `None` for whom reservations do not know.
    host: Option<Uuid>,
    /// When its changes are acknowledged.
    acknowledge: Acknowledge,
}

/// What all who use a volume see alike.
struct Shared {
    /// As created; the size is in `size_bytes`, the hosts in `hosts`, whether there is a write cache in
    /// the layer.
    record: VolumeRecord,
    size_bytes: AtomicU64,
    /// The only hosts it is served to, by NQN; `None`: all.
    hosts: RwLock<Option<BTreeSet<String>>>,
    closed: AtomicBool,
    reservations: CurrentReservations,
    /// Held from the look at the reservations until others are in force.
    reserving: tokio::sync::Mutex<()>,
    requests: Arc<Requests>,
}

/// A byte range as whole blocks.
struct BlockSpan {
    first: u64,
    /// Exclusive.
    end: u64,
    /// Bytes of the first block before the range.
    head_bytes: usize,
}

impl BlockSpan {
    fn of(offset: u64, bytes: u64) -> Self {
        Self {
            first: offset / BLOCK_BYTES_U64,
            end: (offset + bytes).div_ceil(BLOCK_BYTES_U64),
            head_bytes: bytes_usize(offset % BLOCK_BYTES_U64),
        }
    }

    fn blocks(&self) -> u64 {
        self.end - self.first
    }

    fn range(&self) -> Range<u64> {
        self.first..self.end
    }
}

impl PodVolume {
    /// A volume on its head layer.
    #[must_use]
    pub fn new(engine: Arc<Engine>, layer: Arc<Layer>, record: &VolumeRecord) -> Self {
        // The others were not to outlive the run that they were made in.
        let reservations = record.reservations.clone().filter(|found| found.persistent);
        layer.volatile.enable(record.write_cache);
        let shared = Shared {
            size_bytes: AtomicU64::new(record.size_bytes),
            record: record.clone(),
            hosts: RwLock::new(record.hosts.clone()),
            closed: AtomicBool::new(false),
            reservations: CurrentReservations::new(reservations.unwrap_or_default()),
            reserving: tokio::sync::Mutex::default(),
            requests: Arc::default(),
        };
        Self {
            engine,
            layer,
            ranges: Arc::default(),
            shared: Arc::new(shared),
            host: None,
            acknowledge: Acknowledge::Early,
        }
    }

    /// The volume as it is now.
    #[must_use]
    pub fn info(&self) -> VolumeInfo {
        VolumeInfo {
            id: self.shared.record.id,
            name: self.shared.record.name.clone(),
            uuid: self.shared.record.uuid,
            size_bytes: self.shared.size_bytes.load(Ordering::Acquire),
            logical_block_bytes: self.shared.record.logical_block_bytes,
            read_only: self.shared.record.read_only,
            allocated_bytes: self.layer.mapped_blocks.load(Ordering::Relaxed) * BLOCK_BYTES_U64,
            hosts: self.shared.hosts.read().clone(),
            reservations: self.shared.reservations.get(),
            write_cache: self.layer.volatile.is_enabled(),
        }
    }

    /// Turns the volatile write cache on or off; what was acknowledged from memory is durable when it is
    /// off.
    ///
    /// # Errors
    /// See [`Engine::settle`].
    pub async fn set_write_cache(&self, enabled: bool) -> Result<()> {
        self.layer.volatile.enable(enabled);
        if enabled {
            return Ok(());
        }
        // What is under way may still count on it.
        drop(self.ranges.acquire(0..u64::MAX).await);
        self.engine.settle(&self.layer).await
    }

    /// The new list is durable.
    pub fn set_hosts(&self, hosts: Option<BTreeSet<String>>) {
        *self.shared.hosts.write() = hosts;
    }

    /// The host is gone for good.
    pub fn remove_host(&self, nqn: &str) {
        self.shared.hosts.write().as_mut().map(|hosts| hosts.remove(nqn));
    }

    /// The resize is durable.
    pub fn set_size(&self, size_bytes: u64) {
        self.shared.size_bytes.store(size_bytes, Ordering::Release);
    }

    /// No request is accepted any more.
    pub fn close(&self) {
        self.shared.closed.store(true, Ordering::Release);
    }

    fn check(&self, offset: u64, bytes: u64, op: &'static str) -> Result<()> {
        if self.shared.closed.load(Ordering::Acquire) {
            return Err(Error::new(ErrorKind::ShuttingDown, op).context(&self.shared.record.name));
        }
        let size = self.shared.size_bytes.load(Ordering::Acquire);
        match offset.checked_add(bytes) {
            Some(end) if end <= size => Ok(()),
            _ => Err(Error::new(ErrorKind::OutOfRange, op).context(format_args!(
                "{}: {bytes} bytes at {offset}, the volume has {size}",
                self.shared.record.name
            ))),
        }
    }

    fn check_write(&self, offset: u64, bytes: u64, op: &'static str) -> Result<()> {
        if self.shared.record.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, op).context(&self.shared.record.name));
        }
        self.check(offset, bytes, op)
    }

    /// A look at content asks for this as well.
    fn check_read(&self, offset: u64, bytes: u64, op: &'static str) -> Result<()> {
        self.check(offset, bytes, op)?;
        self.shared.reservations.check(self.host, Access::Read, op)
    }

    /// Takes a range for a change of its content, which reservations must allow: see the module.
    async fn hold(&self, span: &BlockSpan, op: &'static str) -> Result<Arc<RangeGuard>> {
        let hold = self.ranges.acquire(span.range());
        let hold = timed(&self.engine.env, Stage::Lock, hold).await;
        self.shared.reservations.check(self.host, Access::Write, op)?;
        Ok(Arc::new(hold))
    }

    async fn change_reservations(
        &self,
        seen: &Arc<Reservations>,
        next: Reservations,
    ) -> Result<bool> {
        let shared = &self.shared;
        let _one_at_a_time = shared.reserving.lock().await;
        self.check(0, 0, "change reservations")?;
        if !shared.reservations.is(seen) {
            return Ok(false);
        }
        let change =
            CatalogChange::SetReservations { id: shared.record.id, reservations: next.clone() };
        self.engine.change_catalog(&change).await?;
        shared.reservations.publish(next);
        // What is still under way may be what is now forbidden.
        drop(self.ranges.acquire(0..u64::MAX).await);
        Ok(true)
    }

    async fn read_range(&self, offset: u64, bytes: u64) -> Result<Vec<Piece>> {
        let span = BlockSpan::of(offset, bytes);
        let blocks = self.engine.read(&self.layer, Lba(span.first), span.blocks()).await?;
        let mut trimmer = Trimmer::new(&span, bytes);
        Ok(blocks.into_iter().filter_map(|piece| trimmer.trim(piece)).collect())
    }

    async fn write_range(&self, offset: u64, data: Bytes) -> Result<()> {
        let span = BlockSpan::of(offset, bytes_u64(data.len()));
        let hold = self.hold(&span, "write").await?;
        self.write_held(&span, hold, data).await
    }

    async fn compare_and_write_range(
        &self,
        offset: u64,
        expected: &[u8],
        data: Bytes,
    ) -> Result<bool> {
        let bytes = bytes_u64(data.len());
        let span = BlockSpan::of(offset, bytes);
        // Who may write may read.
        let hold = self.hold(&span, "compare and write").await?;
        let stored = self.read_range(offset, bytes).await?;
        if !pieces_equal(&stored, expected) {
            return Ok(false);
        }
        self.write_held(&span, hold, data).await.map(|()| true)
    }

    /// Writes bytes that begin in the span's first block. `hold` is the range lock on it.
    async fn write_held(&self, span: &BlockSpan, hold: Arc<RangeGuard>, data: Bytes) -> Result<()> {
        let whole = span.blocks() * BLOCK_BYTES_U64 == bytes_u64(data.len());
        let data = if whole { data } else { self.widen(span, data).await? };
        self.engine.write(&self.layer, hold, Lba(span.first), &data, self.acknowledge).await
    }

    /// Completes the first and last block with what is stored. The caller holds the range.
    async fn widen(&self, span: &BlockSpan, data: Bytes) -> Result<Bytes> {
        let length = bytes_usize(span.blocks() * BLOCK_BYTES_U64);
        let mut whole = BytesMut::zeroed(length);
        let tail = span.head_bytes + data.len();
        if span.head_bytes > 0 {
            self.fill_block(span.first, &mut whole[..BLOCK_BYTES]).await?;
        }
        let last_is_partial = !tail.is_multiple_of(BLOCK_BYTES);
        if last_is_partial && (span.blocks() > 1 || span.head_bytes == 0) {
            self.fill_block(span.end - 1, &mut whole[length - BLOCK_BYTES..]).await?;
        }
        whole[span.head_bytes..tail].copy_from_slice(&data);
        Ok(whole.freeze())
    }

    async fn fill_block(&self, lba: u64, block: &mut [u8]) -> Result<()> {
        match self.engine.read(&self.layer, Lba(lba), 1).await?.first() {
            Some(BlockPiece::Data(bytes)) => block.copy_from_slice(bytes),
            Some(BlockPiece::Zero(_)) | None => block.fill(0),
        }
        Ok(())
    }

    /// Zeroes a range as one entry: whole blocks by a zero record, the partial ones at its ends
    /// rewritten.
    async fn zero_range(&self, offset: u64, bytes: u64, keep_allocated: bool) -> Result<()> {
        let span = BlockSpan::of(offset, bytes);
        let hold = self.hold(&span, "zero").await?;
        let end = offset + bytes;
        let (first_whole, end_whole) = (offset.div_ceil(BLOCK_BYTES_U64), end / BLOCK_BYTES_U64);
        let mut partial = Vec::new();
        if first_whole > span.first {
            partial.push(self.block_zeroed(span.first, offset, end).await?);
        }
        let last = span.end - 1;
        if end_whole <= last && (last > span.first || partial.is_empty()) {
            partial.push(self.block_zeroed(last, offset, end).await?);
        }
        let range = ZeroRange {
            partial,
            lba: Lba(first_whole),
            blocks: end_whole.saturating_sub(first_whole),
            keep_allocated: keep_allocated && bytes <= KEEP_ALLOCATED_BYTES_MAX,
        };
        self.engine.zero(&self.layer, hold, &range, self.acknowledge).await
    }

    /// Gives back the whole blocks of a range, if it has any.
    async fn trim_range(&self, offset: u64, bytes: u64) -> Result<()> {
        let hold = self.hold(&BlockSpan::of(offset, bytes), "trim").await?;
        let (first, end) = (offset.div_ceil(BLOCK_BYTES_U64), (offset + bytes) / BLOCK_BYTES_U64);
        if first >= end {
            return Ok(());
        }
        let (lba, blocks) = (Lba(first), end - first);
        let range = ZeroRange { partial: Vec::new(), lba, blocks, keep_allocated: false };
        self.engine.zero(&self.layer, hold, &range, self.acknowledge).await
    }

    /// Block `lba` with what `offset..end` covers of it zeroed. The caller holds the range.
    async fn block_zeroed(&self, lba: u64, offset: u64, end: u64) -> Result<(Lba, Bytes)> {
        let start = lba * BLOCK_BYTES_U64;
        let from = bytes_usize(offset.saturating_sub(start));
        let to = bytes_usize((end - start).min(BLOCK_BYTES_U64));
        let mut block = BytesMut::zeroed(BLOCK_BYTES);
        self.fill_block(lba, &mut block).await?;
        block[from..to].fill(0);
        Ok((Lba(lba), block.freeze()))
    }
}

/// Cuts the pieces of whole blocks down to the bytes asked for.
struct Trimmer {
    skip: usize,
    left: usize,
}

impl Trimmer {
    fn new(span: &BlockSpan, bytes: u64) -> Self {
        Self { skip: span.head_bytes, left: bytes_usize(bytes) }
    }

    fn trim(&mut self, piece: BlockPiece) -> Option<Piece> {
        let length = match &piece {
            BlockPiece::Zero(length) => *length,
            BlockPiece::Data(bytes) => bytes.len(),
        };
        let from = self.skip.min(length);
        let to = length.min(from + self.left);
        self.skip -= from;
        self.left -= to - from;
        (to > from).then(|| match piece {
            BlockPiece::Zero(_) => Piece::Zero(to - from),
            BlockPiece::Data(bytes) if to - from == length => Piece::Data(bytes),
            BlockPiece::Data(bytes) => Piece::Data(bytes.slice(from..to)),
        })
    }
}

impl Volume for PodVolume {
    fn name(&self) -> String {
        self.shared.record.name.clone()
    }

    fn id(&self) -> u64 {
        self.shared.record.id
    }

    fn uuid(&self) -> Uuid {
        self.shared.record.uuid
    }

    fn logical_block_bytes(&self) -> u32 {
        self.shared.record.logical_block_bytes
    }

    fn size_bytes(&self) -> u64 {
        self.shared.size_bytes.load(Ordering::Acquire)
    }

    fn read_only(&self) -> bool {
        self.shared.record.read_only
    }

    fn admits(&self, host: Option<&str>) -> bool {
        let hosts = self.shared.hosts.read();
        hosts.as_ref().is_none_or(|hosts| host.is_some_and(|host| hosts.contains(host)))
    }

    fn atomic_write_bytes(&self) -> u32 {
        u32::try_from(ATOMIC_WRITE_BYTES).expect("64 KiB")
    }

    fn closed(&self) -> bool {
        self.shared.closed.load(Ordering::Acquire)
    }

    fn requests(&self) -> &Arc<Requests> {
        &self.shared.requests
    }

    fn for_host(self: Arc<Self>, host: Uuid) -> VolumeRef {
        Arc::new(Self { host: Some(host), ..Self::clone(&self) })
    }

    fn write_through(self: Arc<Self>) -> VolumeRef {
        Arc::new(Self { acknowledge: Acknowledge::Durable, ..Self::clone(&self) })
    }

    fn reservations(&self) -> Arc<Reservations> {
        self.shared.reservations.get()
    }

    fn replace_reservations(
        self: Arc<Self>,
        seen: Arc<Reservations>,
        next: Reservations,
    ) -> LocalBoxFuture<Result<bool>> {
        Box::pin(async move {
            let (done, outcome) = oneshot::channel();
            let env = Arc::clone(&self.engine.env);
            // A task of its own: what became durable must be published, whoever still waits.
            env.spawn(Box::pin(async move {
                let _ = done.send(self.change_reservations(&seen, next).await);
            }));
            let ended = |_| Error::new(ErrorKind::ShuttingDown, "change reservations");
            outcome.await.map_err(ended)?
        })
    }

    fn try_read(&self, offset: u64, bytes: u32, pieces: &mut Vec<Piece>) -> Result<bool> {
        self.check_read(offset, u64::from(bytes), "read")?;
        if bytes == 0 {
            return Ok(true);
        }
        let span = BlockSpan::of(offset, u64::from(bytes));
        let mut trimmer = Trimmer::new(&span, u64::from(bytes));
        self.engine.try_read(&self.layer, Lba(span.first), span.blocks(), |piece| {
            pieces.extend(trimmer.trim(piece));
        })
    }

    fn read(self: Arc<Self>, offset: u64, bytes: u32) -> LocalBoxFuture<Result<Vec<Piece>>> {
        Box::pin(async move {
            self.check_read(offset, u64::from(bytes), "read")?;
            self.read_range(offset, u64::from(bytes)).await
        })
    }

    fn write(self: Arc<Self>, offset: u64, data: Bytes) -> LocalBoxFuture<Result<()>> {
        Box::pin(async move {
            self.check_write(offset, bytes_u64(data.len()), "write")?;
            if data.is_empty() {
                return Ok(());
            }
            self.write_range(offset, data).await
        })
    }

    fn compare_and_write(
        self: Arc<Self>,
        offset: u64,
        expected: Bytes,
        data: Bytes,
    ) -> LocalBoxFuture<Result<bool>> {
        const OP: &str = "compare and write";
        Box::pin(async move {
            self.check_write(offset, bytes_u64(data.len()), OP)?;
            if expected.len() != data.len() {
                return Err(Error::new(ErrorKind::InvalidRequest, OP).context(format_args!(
                    "{} bytes to compare and {} to write",
                    expected.len(),
                    data.len()
                )));
            }
            if data.is_empty() {
                return Ok(true);
            }
            self.compare_and_write_range(offset, &expected, data).await
        })
    }

    fn zero(
        self: Arc<Self>,
        offset: u64,
        bytes: u64,
        mode: ZeroMode,
    ) -> LocalBoxFuture<Result<()>> {
        Box::pin(async move {
            self.check_write(offset, bytes, "zero")?;
            if bytes == 0 {
                return Ok(());
            }
            match mode {
                ZeroMode::Trim => self.trim_range(offset, bytes).await,
                ZeroMode::Deallocate => self.zero_range(offset, bytes, false).await,
                ZeroMode::KeepAllocated => self.zero_range(offset, bytes, true).await,
            }
        })
    }

    fn flush(self: Arc<Self>) -> LocalBoxFuture<Result<()>> {
        Box::pin(async move {
            self.shared.reservations.check(self.host, Access::Write, "flush")?;
            let settled = self.engine.settle(&self.layer);
            timed(&self.engine.env, Stage::Journal, settled).await
        })
    }

    fn prefetch(self: Arc<Self>, offset: u64, bytes: u64) -> LocalBoxFuture<Result<()>> {
        Box::pin(async move {
            self.check_read(offset, bytes, "prefetch")?;
            // More of it would only push out what is read, or what was prefetched first.
            let useful = self.engine.cache.capacity_bytes() / PREFETCH_CACHE_SHARE;
            let (mut at, end) = (offset, offset + bytes.min(useful));
            while at < end {
                let step = PREFETCH_STEP_BYTES.min(end - at);
                self.read_range(at, step).await?;
                at += step;
            }
            Ok(())
        })
    }

    fn block_status(
        self: Arc<Self>,
        offset: u64,
        bytes: u64,
        extents_max: usize,
    ) -> LocalBoxFuture<Result<Vec<Extent>>> {
        Box::pin(async move {
            self.check_read(offset, bytes, "block status")?;
            let span = BlockSpan::of(offset, bytes);
            let first = Lba(span.first);
            let runs = self.engine.block_status(&self.layer, first, span.blocks(), extents_max);
            let mut skip = bytes_u64(span.head_bytes);
            let mut left = bytes;
            let extents = runs.await?.into_iter().map(|(state, blocks)| {
                let length = (blocks * BLOCK_BYTES_U64 - skip).min(left);
                skip = 0;
                left -= length;
                let (hole, zero) = match state {
                    BlockState::Hole => (true, true),
                    BlockState::Zero => (false, true),
                    BlockState::Data => (false, false),
                };
                Extent { bytes: length, hole, zero }
            });
            Ok(extents.filter(|extent| extent.bytes > 0).collect())
        })
    }
}

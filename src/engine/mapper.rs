//! The mapper: the one task that moves records from the write buffer into segments and changes
//! maps, live counts and the segment table.
//!
//! It takes whole entries in LSN order, lays their records into rows, and when those are durable
//! points the map at each block the buffer still holds that very record for, then takes the record
//! out of the buffer. Checkpoints ([`super::checkpoint`]), reclaim ([`super::reclaim`]) and large
//! deletions ([`super::clear`]) run in the same task, so nothing else changes a map meanwhile.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;

use super::Engine;
use super::clear::Clearing;
use super::clear::large_trim;
use super::layer::Layer;
use super::lost::Failing;
use super::map::Load;
use super::reclaim::Rebuild;
use super::record::BufferedRecord;
use crate::canary::Bug;
use crate::canary::planted;
use crate::env::timeout;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::format::location::Location;
use crate::format::node::NodeKey;
use crate::format::record::RECORD_HEADER_BYTES;
use crate::format::record::RecordHeader;
use crate::format::record::RecordKind;
use crate::format::unit::UNIT_BODY_BYTES;
use crate::observe::event;
use crate::pool::row::GROUP_ROWS_MAX;
use crate::pool::row::RowGroup;
use crate::units::Lba;
use crate::units::Lsn;
use crate::units::SegmentId;
use crate::units::bytes_u64;
use crate::units::bytes_usize;

/// Records written to segments together.
const GROUP_BYTES: u64 = 2 << 20;
/// Leaves that any group may dirty: with fewer records its rows would be half empty.
const GROUP_LEAVES_MIN: usize = 64;
/// Records copied or mapped, some 80 us of work, before requests of hosts get the processor.
const RECORDS_BETWEEN_YIELDS: usize = 64;
/// How long the mapper sleeps without being woken.
const TICK: Duration = Duration::from_millis(500);
/// How long it waits after a failure before it tries again.
const RETRY_AFTER: Duration = Duration::from_millis(200);
/// The same while what is cleared is about to make room.
const RETRY_WHILE_CLEARING: Duration = Duration::from_millis(1);
/// The same once there has been no room for long: a try that finds none costs a checkpoint.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(5);
/// When nothing has succeeded for this long, who waits for room in the journal is told why. Longer
/// than a device may take before it is given up.
const STUCK_AFTER: Duration = Duration::from_secs(10);
/// A checkpoint is made after this long with changes.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(30);

/// Acknowledged records on their way to segments, in LSN order.
#[derive(Default)]
pub(super) struct BufferQueue {
    pub(super) records: VecDeque<Arc<BufferedRecord>>,
    pub(super) bytes: u64,
}

/// What a record is appended to the log for; each kind has its own open segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    /// Data and map nodes.
    Data,
    /// Segment table, catalog and root, found through the checkpoint root.
    Metadata,
}

/// The room that device files have in any case, see `Engine::reserve_room`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reserve {
    /// Data is being written.
    Barred,
    /// A checkpoint is being written.
    Open,
    /// One that found no other room.
    Used,
}

/// The segment a stream is writing to.
#[derive(Clone, Copy, Debug)]
pub(super) struct OpenSegment {
    pub(super) id: SegmentId,
    pub(super) next_row: u64,
}

/// A record for the log.
pub(super) struct LogItem {
    pub(super) header: RecordHeader,
    pub(super) payload: Bytes,
}

/// State of the mapper task; nothing else touches it.
pub(super) struct Mapper {
    pub(super) engine: Arc<Engine>,
    open: [Option<OpenSegment>; 2],
    /// Every entry up to here is mapped.
    pub(super) mapped: Lsn,
    /// Something changed since the last checkpoint.
    pub(super) changed: bool,
    pub(super) last_checkpoint: Duration,
    pub(super) checkpoint: super::checkpoint::CheckpointState,
    /// Reclaim gained nothing when last tried.
    pub(super) exhausted: bool,
    /// Devices in service, and those to move to, for which every segment was found to have all the
    /// strips it can have.
    pub(super) settled_on: Option<(Vec<bool>, Vec<bool>)>,
    /// Moving segments for redundancy's sake, from the first to the last.
    pub(super) rebuild: Option<Rebuild>,
    /// The last turn moved a segment to get its redundancy back: there may be more.
    evacuating: bool,
    /// Live bytes when it did: with fewer it is worth another try.
    pub(super) exhausted_at_bytes: u64,
    /// Reclaims in a row that gained no segment.
    pub(super) fruitless: u32,
    /// Most segments gained since reclaim became necessary.
    pub(super) gained_best: Option<u64>,
    /// Segments opened for what hosts wrote.
    pub(super) host_segments: u64,
    /// Segments that the last checkpoint itself left empty: what it wrote replaced them.
    pub(super) left_empty: usize,
    /// Whether segments may be opened in what is reserved below the devices.
    pub(super) reserve: Reserve,
    /// Since when nothing has succeeded.
    failing_since: Option<Duration>,
    /// Maps of deleted layers, and trims that are under way.
    pub(super) clearing: Clearing,
    /// A node that is to be changed and cannot be read.
    pub(super) failing: Failing,
}

impl Mapper {
    pub(super) fn new(
        engine: Arc<Engine>,
        mapped: Lsn,
        checkpoint: super::checkpoint::CheckpointState,
    ) -> Self {
        let last_checkpoint = engine.env.now();
        let clearing = Clearing::of(&engine);
        Self {
            engine,
            open: [None, None],
            mapped,
            changed: false,
            last_checkpoint,
            checkpoint,
            exhausted: false,
            settled_on: None,
            rebuild: None,
            evacuating: false,
            exhausted_at_bytes: 0,
            fruitless: 0,
            gained_best: None,
            host_segments: 0,
            left_empty: 0,
            reserve: Reserve::Barred,
            failing_since: None,
            clearing,
            failing: Failing::default(),
        }
    }

    /// Runs until the engine stops; then drains the buffer and writes a last checkpoint.
    pub(super) async fn run(mut self) {
        let engine = Arc::clone(&self.engine);
        while !engine.stopping.load(Ordering::Acquire) {
            if !self.has_work() && !self.evacuating && !self.clearing.under_way {
                let _ = timeout(&engine.env, TICK, engine.wake.notified()).await;
            }
            match self.work().await {
                Ok(()) => self.works(),
                Err(error) => self.failed(&error).await,
            }
        }
        let result = self.finish().await;
        if let Err(error) = &result {
            self.report(error);
        }
        self.engine.stopped.send_replace(Some(result.map_err(|error| error.duplicate())));
    }

    fn works(&mut self) {
        if self.failing_since.take().is_some() {
            self.engine.journal.set_stuck(None);
        }
        self.publish_space();
    }

    /// Waits before the next try. Until one succeeds the door stays as it is now.
    async fn failed(&mut self, error: &Error) {
        self.report(error);
        // Without room something is cleared all the same, and makes some. Otherwise it may not come to
        // that any more.
        let no_room = error.kind() == ErrorKind::NoSpace;
        self.clearing.under_way &= no_room;
        // Without room here the door must say so, rather than let writers wait.
        if no_room {
            self.give_up_reclaim();
        }
        self.publish_space();
        let now = self.engine.env.now();
        if now.saturating_sub(*self.failing_since.get_or_insert(now)) >= STUCK_AFTER {
            self.engine.journal.set_stuck(Some(error));
        }
        let failing_for = now.saturating_sub(self.failing_since.unwrap_or(now));
        let pause = match no_room {
            true if !self.clearing.under_way => {
                (failing_for / 8).clamp(RETRY_AFTER, RETRY_AFTER_MAX)
            }
            true => RETRY_WHILE_CLEARING,
            false => RETRY_AFTER,
        };
        self.engine.env.sleep(pause).await;
        self.engine.pool.members.iter().for_each(|member| member.may_have_room());
    }

    fn report(&self, error: &Error) {
        event::raise(event::BACKGROUND_FAILED, "pod", error.chain());
    }

    /// Drains and checkpoints, so that the next start has nothing to replay.
    async fn finish(&mut self) -> Result<()> {
        if let Some(error) = self.engine.journal.failure() {
            return Err(error);
        }
        match self.write_checkpoint().await {
            // All of it is in the journal, from where the next start takes it.
            Err(error) if error.kind() == ErrorKind::NoSpace => {
                self.report(&error);
                Ok(())
            }
            outcome => outcome,
        }
    }

    pub(super) fn has_work(&self) -> bool {
        self.wants_checkpoint() || self.wants_drain() || self.wants_reclaim()
    }

    async fn work(&mut self) -> Result<()> {
        let written = if self.wants_checkpoint() {
            self.write_checkpoint().await
        } else if self.wants_drain() {
            self.write_group().await
        } else {
            Ok(())
        };
        // What is cleared makes the room that was not there.
        match &written {
            Ok(()) => self.clear_maps().await?,
            Err(error) if error.kind() == ErrorKind::NoSpace => {
                self.zero_ahead().await?;
                self.clear_maps().await?;
            }
            Err(_) => {}
        }
        written?;
        if self.wants_reclaim() {
            self.reclaim().await?;
        } else if !self.has_work() {
            self.gained_best = None;
            self.evacuating = false;
            self.evacuating = self.evacuate_one().await?;
        }
        Ok(())
    }

    /// Devices that new strips may be put on.
    pub(super) fn usable_devices(&self) -> Vec<bool> {
        let members = &self.engine.pool.members;
        members.iter().map(|member| member.in_service() && !member.is_full()).collect()
    }

    fn wants_drain(&self) -> bool {
        let ring = self.engine.pool.geometry.journal_bytes;
        self.engine.buffer.lock().bytes > ring / 8
            || self.engine.space.is_short() && !self.engine.buffer.lock().records.is_empty()
    }

    fn wants_checkpoint(&self) -> bool {
        let engine = &self.engine;
        let ring = engine.pool.geometry.journal_bytes;
        let overdue = self.changed || !engine.buffer.lock().records.is_empty();
        let idle_for = engine.env.now().saturating_sub(self.last_checkpoint);
        engine.journal.used_bytes() > ring / 2
            || self.dirty_nodes() > engine.dirty_nodes_max / 2
            || (overdue && idle_for >= CHECKPOINT_INTERVAL)
            || (engine.space.is_short() && self.has_empty_segments())
            || engine.pool.table.lock().ids_exhausted()
    }

    pub(super) fn dirty_nodes(&self) -> usize {
        let layers = self.engine.layers();
        layers.iter().map(|layer| layer.state.lock().map.dirty_count()).sum()
    }

    /// Maps every entry up to `cut`. Where these dirty more nodes than may be dirty at once,
    /// checkpoints come in between.
    pub(super) async fn drain_to(&mut self, cut: Lsn) -> Result<()> {
        while self.mapped < cut {
            if self.dirty_nodes() > self.engine.dirty_nodes_max / 2 {
                self.checkpoint_mapped().await?;
            }
            self.write_group().await?;
        }
        Ok(())
    }

    /// Moves the oldest entries of the buffer to segments and maps.
    pub(super) async fn write_group(&mut self) -> Result<()> {
        // Asked before the queue is looked at: what becomes visible in between is not mapped.
        let visible = self.engine.journal.visible_lsn();
        let group = self.next_group();
        let Some(last) = group.last().map(|record| record.header.lsn) else {
            self.mapped = self.mapped.max(visible);
            return Ok(());
        };
        self.changed = true;
        let live: Vec<&Arc<BufferedRecord>> =
            group.iter().filter(|record| self.is_worth_writing(record)).collect();
        let items: Vec<LogItem> = live
            .iter()
            .map(|record| LogItem { header: record.header, payload: record.payload.clone() })
            .collect();
        // First, so that a node that cannot be read fails the group before it takes any room: it is
        // tried again and again.
        self.load_to_change(&leaves_of(&live)).await?;
        let next_id = self.engine.pool.table.lock().next_id();
        let locations = self.append_records(Stream::Data, &items).await?;
        self.host_segments += self.engine.pool.table.lock().next_id() - next_id;
        for (number, (record, location)) in live.into_iter().zip(locations).enumerate() {
            if number.is_multiple_of(RECORDS_BETWEEN_YIELDS) {
                self.engine.env.yield_thread();
            }
            self.map_record(record, location).await?;
        }
        for record in group.iter().filter(|record| record.header.kind == RecordKind::Zero) {
            Box::pin(self.map_zero(record)).await?;
        }
        let live_bytes = self.engine.pool.table.lock().live_bytes();
        self.exhausted &= live_bytes >= self.exhausted_at_bytes;
        let count = group.len();
        drop(group);
        self.forget_group(count);
        self.mapped = last;
        // The room it was promised is taken now: the door must not give it away again.
        self.publish_space();
        Ok(())
    }

    /// The oldest entries, whole, up to [`GROUP_BYTES`] and to half of the leaves that may be dirty.
    /// A large trim ends a group: nothing newer may be in the map when it comes. They stay queued
    /// until they are mapped.
    fn next_group(&self) -> Vec<Arc<BufferedRecord>> {
        let mut group = self.peek_group();
        let leaves_max = (self.engine.dirty_nodes_max / 2).max(GROUP_LEAVES_MIN);
        let mut leaves = BTreeSet::new();
        let full = group.iter().position(|record| {
            let layer = record.layer.as_ref().map(|layer| layer.id);
            leaves.insert((layer, NodeKey::covering(record.header.lba, 0)));
            let full = leaves.len() >= leaves_max || large_trim(record).is_some();
            record.header.last_of_entry && full
        });
        group.truncate(full.map_or(group.len(), |last| last + 1));
        group
    }

    fn peek_group(&self) -> Vec<Arc<BufferedRecord>> {
        let queue = self.engine.buffer.lock();
        let (mut bytes, mut group) = (0, Vec::new());
        for record in &queue.records {
            bytes += record.header.stride();
            group.push(Arc::clone(record));
            if record.header.last_of_entry && bytes >= GROUP_BYTES {
                break;
            }
        }
        group
    }

    fn forget_group(&self, count: usize) {
        let mut queue = self.engine.buffer.lock();
        let done: Vec<_> = queue.records.drain(..count).collect();
        queue.bytes -= done.iter().map(|record| record.header.stride()).sum::<u64>();
    }

    /// A record superseded by a later durable one never reaches a segment.
    fn is_worth_writing(&self, record: &Arc<BufferedRecord>) -> bool {
        let Some(layer) = &record.layer else { return false };
        record.header.kind == RecordKind::Data
            && !layer.dropping.load(Ordering::Acquire)
            && layer.state.lock().index.owns_any(record)
    }

    /// Appends records to the log.
    ///
    /// # Durability
    /// On `Ok` all of them are durable at the returned locations; no map refers to them yet.
    ///
    /// # Errors
    /// `NoSpace` without a free segment, `DeviceFailed` with fewer than k devices.
    pub(super) async fn append_records(
        &mut self,
        stream: Stream,
        items: &[LogItem],
    ) -> Result<Vec<Location>> {
        let mut locations = Vec::with_capacity(items.len());
        while locations.len() < items.len() {
            let left = &items[locations.len()..];
            let bytes = left.iter().map(|item| item.header.stride()).sum();
            let mut group = self.open_group(stream, bytes)?;
            let placed = self.fill(&mut group, left);
            let (segment, rows) = (group.segment, group.first_row + bytes_u64(group.rows()));
            match self.engine.pool.write_rows(group, self.engine.epoch).await {
                Ok(()) => {
                    let written = &items[locations.len()..locations.len() + placed.len()];
                    self.rows_written(stream, segment, rows, written);
                    locations.extend(placed);
                }
                Err(error) => {
                    tracing::warn!(
                        error = error.chain(),
                        segment = segment.0,
                        "segment closed early"
                    );
                    self.close_segment(stream);
                }
            }
        }
        Ok(locations)
    }

    /// The next rows of the stream's open segment, or of a new one: about as many as records of
    /// `bytes` together need.
    fn open_group(&mut self, stream: Stream, bytes: u64) -> Result<RowGroup> {
        let geometry = self.engine.pool.geometry;
        let open = self.open_segment(stream)?;
        // A record that does not fit the rest of a unit leaves it empty.
        let needed = rows_for(bytes + bytes / 8, geometry.data_strips);
        let rows = (geometry.rows() - open.next_row).min(GROUP_ROWS_MAX as u64).min(needed);
        Ok(RowGroup::new(open.id, open.next_row, bytes_usize(rows), geometry.data_strips))
    }

    fn open_segment(&mut self, stream: Stream) -> Result<OpenSegment> {
        let open = match self.open[stream as usize] {
            Some(open) => open,
            None => OpenSegment { id: self.allocate(stream)?, next_row: 0 },
        };
        self.open[stream as usize] = Some(open);
        Ok(open)
    }

    fn allocate(&mut self, stream: Stream) -> Result<SegmentId> {
        let pool = &self.engine.pool;
        let (usable, in_service) = (self.usable_devices(), pool.in_service());
        let metadata = stream == Stream::Metadata;
        let mut table = pool.table.lock();
        let mut allocated = table.allocate(metadata, &usable);
        if allocated.is_none() && self.reserve != Reserve::Barred {
            let reserved = self.engine.reserve_segments;
            allocated = table.allocate_reserved(metadata, &in_service, reserved);
            self.reserve = Reserve::Used;
        }
        allocated.ok_or_else(|| {
            Error::new(ErrorKind::NoSpace, "open segment").context("no free segment")
        })
    }

    /// Places as many items as fit and returns where they will be.
    fn fill(&self, group: &mut RowGroup, items: &[LogItem]) -> Vec<Location> {
        let geometry = &self.engine.pool.geometry;
        let space = geometry.space();
        let mut placed = Vec::new();
        for (number, item) in items.iter().enumerate() {
            if number.is_multiple_of(RECORDS_BETWEEN_YIELDS) {
                self.engine.env.yield_thread();
            }
            let Some((address, memory)) = group.place(bytes_usize(item.header.stride())) else {
                break;
            };
            let place = space.log_address(address);
            let (head, rest) = memory.split_at_mut(RECORD_HEADER_BYTES);
            head.copy_from_slice(&item.header.encode(geometry.pod, place));
            rest[..item.payload.len()].copy_from_slice(&item.payload);
            placed.push(space.location(address, item.header.record_bytes()));
        }
        placed
    }

    fn rows_written(&mut self, stream: Stream, segment: SegmentId, rows: u64, written: &[LogItem]) {
        let blocks = written.iter().map(|item| item.header.blocks).sum();
        let bytes = written.iter().map(|item| item.header.stride()).sum();
        self.engine.pool.table.lock().rows_written(segment, rows, blocks, bytes);
        if rows == self.engine.pool.geometry.rows() {
            self.close_segment(stream);
        } else {
            self.open[stream as usize] = Some(OpenSegment { id: segment, next_row: rows });
        }
    }

    pub(super) fn close_segment(&mut self, stream: Stream) {
        if let Some(open) = self.open[stream as usize].take() {
            self.engine.pool.table.lock().close(open.id);
        }
    }

    /// The segment the next record of the stream will be in.
    pub(super) fn next_segment(&mut self, stream: Stream) -> Result<SegmentId> {
        Ok(self.open_segment(stream)?.id)
    }

    /// Points the map at a record for the blocks the buffer still holds it for.
    async fn map_record(&self, record: &Arc<BufferedRecord>, location: Location) -> Result<()> {
        let Some(layer) = &record.layer else { return Ok(()) };
        self.engine.rename_cached(record.cache_key(), location.0);
        let mut at = record.header.lba.0;
        while at < record.end_lba() {
            match self.map_within_leaf(layer, record, at, location) {
                Ok(next) => at = next,
                Err(load) => {
                    if planted(Bug::DroppedBeforeMapped) {
                        layer.state.lock().index.remove(record, at..record.end_lba());
                    }
                    self.engine.load_node(layer, load).await?;
                }
            }
        }
        Ok(())
    }

    /// Maps the record's blocks from `at` to the end of their leaf; returns where to go on.
    fn map_within_leaf(
        &self,
        layer: &Layer,
        record: &Arc<BufferedRecord>,
        at: u64,
        location: Location,
    ) -> Result<u64, Load> {
        let end = record.end_lba().min(leaf_end(at));
        let mut state = layer.state.lock();
        let owned = state.index.owned_by(record, at..end);
        if !owned.is_empty() {
            self.clear_if_trimmed(layer, &mut state.map, NodeKey::covering(Lba(at), 0).index)?;
        }
        let mut changes = LiveChanges::default();
        for lba in owned.into_iter().flatten() {
            changes.note(state.map.set(Lba(lba), location)?, location);
        }
        self.engine.apply_live(layer, &changes, true);
        state.index.remove(record, at..end);
        Ok(end)
    }

    /// Sets one entry if it still is `old`, as reclaim does. Returns whether it was.
    pub(super) async fn replace_if(
        &self,
        layer: &Layer,
        lba: Lba,
        old: Location,
        new: Location,
    ) -> Result<bool> {
        let replaced = self
            .engine
            .ask(layer, |map| match map.get(lba)? {
                found if found != old && !planted(Bug::DeadMoved) => Ok(false),
                _ => map.set(lba, new).map(|_| true),
            })
            .await?;
        if replaced {
            let mut changes = LiveChanges::default();
            changes.note(old, new);
            self.engine.apply_live(layer, &changes, true);
        }
        Ok(replaced)
    }

    /// Tells the door how much room there is.
    pub(super) fn publish_space(&self) {
        self.engine.publish_space(self.exhausted, self.clearing.under_way);
    }
}

/// Rows whose units hold `bytes`, at least one.
fn rows_for(bytes: u64, data_strips: usize) -> u64 {
    bytes.div_ceil(bytes_u64(data_strips * UNIT_BODY_BYTES)).max(1)
}

/// The leaves that records change.
fn leaves_of(records: &[&Arc<BufferedRecord>]) -> Vec<(Arc<Layer>, NodeKey)> {
    let mut leaves = BTreeMap::new();
    for record in records {
        let Some(layer) = &record.layer else { continue };
        for lba in [record.header.lba.0, record.end_lba() - 1] {
            let leaf = NodeKey::covering(Lba(lba), 0);
            leaves.entry((layer.id, leaf)).or_insert_with(|| Arc::clone(layer));
        }
    }
    leaves.into_iter().map(|((_, leaf), layer)| (layer, leaf)).collect()
}

/// First block past the leaf that holds `lba`.
pub(super) fn leaf_end(lba: u64) -> u64 {
    let leaf = NodeKey::covering(Lba(lba), 0);
    leaf.first_lba() + leaf.blocks()
}

/// Changes of map entries, gathered to be applied to the segment table together with them.
#[derive(Default)]
pub(super) struct LiveChanges {
    changes: Vec<(Location, Location)>,
}

impl LiveChanges {
    /// An entry changed from `old` to `new`.
    pub(super) fn note(&mut self, old: Location, new: Location) {
        if old != new {
            self.changes.push((old, new));
        }
    }

    fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }
}

impl Engine {
    /// Brings live counts in line with changed entries. `blocks`: they are blocks of the layer,
    /// not node pointers.
    pub(super) fn apply_live(&self, layer: &Layer, changes: &LiveChanges, blocks: bool) {
        if changes.is_empty() {
            return;
        }
        let space = self.pool.geometry.space();
        let mut table = self.pool.table.lock();
        for (old, new) in &changes.changes {
            if let Some(address) = space.address(*old) {
                table.remove_live(address.segment, 1);
            }
            if let Some(address) = space.address(*new) {
                table.add_live(address.segment, 1);
            }
            if blocks {
                if new.is_stored() {
                    layer.mapped_blocks.fetch_add(1, Ordering::Relaxed);
                }
                if old.is_stored() {
                    layer.mapped_blocks.fetch_sub(1, Ordering::Relaxed);
                }
            }
        }
    }
}

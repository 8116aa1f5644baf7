//! Reclaim: live records are copied out of the emptiest segment, so that it can be freed.
//!
//! Greedy by live fraction. A record is live for the blocks whose map entry points at it; a chunk
//! of which only some blocks are live is cut down to those. Copies enter the map through
//! `replace_if`, so a write that came in between wins. The victim's regions come free with the
//! next checkpoint.
//!
//! What is damaged beyond repair stays where it is, so that reads of it go on to fail and all else
//! can move: its segment is not chosen again. A device that is away now may still bring it back when
//! the pod is opened with it.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;

use super::layer::Layer;
use super::map::Map;
use super::mapper::LogItem;
use super::mapper::Mapper;
use super::mapper::Stream;
use super::read::decode_chunk;
use super::record::push_chunk;
use crate::canary::Bug;
use crate::canary::planted;
use crate::device::AlignedBuf;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::format::location::Address;
use crate::format::location::Location;
use crate::format::location::RECORD_ALIGN;
use crate::format::node::NodeKey;
use crate::format::record::RecordHeader;
use crate::format::record::RecordKind;
use crate::format::record::decode_record;
use crate::format::unit::UNIT_BYTES;
use crate::format::unit::UNIT_HEADER_BYTES;
use crate::observe::event;
use crate::observe::task::RunningTask;
use crate::pool::read::Lease;
use crate::units::BLOCK_BYTES;
use crate::units::LayerId;
use crate::units::Lba;
use crate::units::SegmentId;
use crate::units::bytes_u64;
use crate::units::bytes_usize;

use bytes::Bytes;
use weft_api::TaskKind;
use weft_api::TaskState;
use weft_api::TaskUnit;

/// A victim must be this empty at least: incompressible records fill a segment to 89 %, so copying
/// fuller ones would free nothing, for ever.
const LIVE_PERCENT_MAX: u64 = 80;
/// Live bytes copied before a checkpoint frees what they were in, in segments.
const COPIED_SEGMENTS_MAX: u64 = 3;
/// Rows of victims read before a checkpoint frees them. In a small pod each group of records, so
/// each level of the map, begins a segment of its own: a few of these at a time make as many new
/// ones, and only many together fit in fewer. With the preferred strips it is four segments.
const VICTIM_ROWS_MAX: u64 = 256;
/// After this many rounds in a row without a gain, what is left is not worth copying: moving map
/// nodes empties one segment and begins another.
const FRUITLESS_MAX: u32 = 8;
/// Copies written together.
const COPY_BYTES: u64 = 2 << 20;

/// Putting redundancy back, as long as there is any to put back.
pub(super) struct Rebuild {
    /// How it is shown.
    task: Option<RunningTask>,
    /// Segments to move, those moved included.
    total: u64,
    /// Of them, moved, or emptied by others.
    done: u64,
}

/// The body of a unit, with all that was written or with what is left of it.
struct Body {
    bytes: AlignedBuf,
    whole: bool,
}

/// A live record on its way to another segment.
struct Copy {
    layer: Arc<Layer>,
    old: Location,
    item: LogItem,
}

/// Records to be written to another segment together.
#[derive(Default)]
struct Moving {
    copies: Vec<Copy>,
    bytes: u64,
}

impl Mapper {
    /// Whether free segments are scarce and reclaim may help.
    pub(super) fn wants_reclaim(&self) -> bool {
        if self.exhausted {
            return false;
        }
        let engine = &self.engine;
        let total = engine.pool.table.lock().segments_total();
        let low = engine.reserve_segments + 2 + total / 16;
        // As the door counts: it makes writers wait for what is freed here.
        engine.free_segments() < low
    }

    /// Frees what is empty already, or else empties one segment.
    pub(super) async fn reclaim(&mut self) -> Result<()> {
        if self.has_empty_segments() {
            return self.write_checkpoint().await;
        }
        let victims = self.choose_victims();
        let best = self.gained_best.unwrap_or_else(|| self.segments_gained());
        self.empty_segments(&victims).await?;
        let gained = self.segments_gained();
        // Only more than ever before is a gain: copying back and forth gives and takes one.
        self.fruitless = if gained > best { 0 } else { self.fruitless + 1 };
        self.gained_best = Some(best.max(gained));
        if victims.is_empty() || self.fruitless >= FRUITLESS_MAX {
            self.give_up_reclaim();
        }
        Ok(())
    }

    /// Nothing more can be freed until something was deleted.
    pub(super) fn give_up_reclaim(&mut self) {
        self.fruitless = 0;
        self.gained_best = None;
        self.exhausted = true;
        self.exhausted_at_bytes = self.engine.pool.table.lock().live_bytes();
    }

    /// Whether a checkpoint would free segments besides those that the last one left.
    pub(super) fn has_empty_segments(&self) -> bool {
        self.engine.pool.table.lock().empty_segments() > self.left_empty
    }

    /// Free segments, and those that hosts got meanwhile: more means that reclaim gained some.
    fn segments_gained(&self) -> u64 {
        let pool = &self.engine.pool;
        pool.table.lock().free_segments(&pool.in_service()) + self.host_segments
    }

    /// Copies a segment that has fewer strips in service than it could have to a new one: how
    /// redundancy comes back after a device was away or lost. False if there is none.
    pub(super) async fn evacuate_one(&mut self) -> Result<bool> {
        let (in_service, usable) = (self.engine.pool.in_service(), self.devices_to_move_to());
        if self.settled_on.as_ref().is_some_and(|on| *on == (in_service.clone(), usable.clone())) {
            return Ok(false);
        }
        let weak = self.engine.pool.table.lock().weak_segments(&in_service, &usable);
        let Some((segment, left)) = weak else {
            // Only then is nothing needed of the segments that were left.
            if self.rebuild.is_some() {
                self.write_checkpoint().await?;
            }
            self.settled_on = Some((in_service, usable));
            self.tell_rebuilt();
            return Ok(false);
        };
        self.note_rebuild(left);
        let (free, metadata) = {
            let table = self.engine.pool.table.lock();
            let metadata = table.get(segment).is_some_and(|segment| segment.entry.metadata);
            (table.free_segments(&usable), metadata)
        };
        if free < self.engine.reserve_segments + 2 {
            self.say_of_rebuild("waits for free segments: trim or delete something");
            return Ok(false);
        }
        tracing::debug!(
            segment = segment.0,
            metadata,
            "moving a segment to get its redundancy back"
        );
        if metadata {
            self.changed = true;
            self.write_checkpoint().await?;
        } else {
            self.empty_segments(&[segment]).await?;
        }
        self.say_of_rebuild("");
        Ok(true)
    }

    /// Devices that strips may be moved to for redundancy's sake. One that was full is tried again
    /// by new writes, but not by moving old ones to and fro each time it is.
    pub(super) fn devices_to_move_to(&self) -> Vec<bool> {
        let members = &self.engine.pool.members;
        members.iter().map(|member| member.in_service() && !member.was_full()).collect()
    }

    /// Shows as a task what is left to move. What came in meanwhile, as by the loss of another
    /// device, makes it longer.
    fn note_rebuild(&mut self, left: u64) {
        let tasks = &self.engine.tasks;
        let rebuild = self.rebuild.get_or_insert_with(|| Rebuild {
            // Nobody else starts one, and this one ends before the next begins.
            task: tasks.start(TaskKind::Rebuild, TaskUnit::Segments, left).ok(),
            total: left,
            done: 0,
        });
        rebuild.total = rebuild.total.max(rebuild.done + left);
        rebuild.done = rebuild.total - left;
        if let Some(task) = &rebuild.task {
            task.progress(rebuild.done, rebuild.total);
        }
    }

    fn say_of_rebuild(&self, message: &str) {
        if let Some(task) = self.rebuild.as_ref().and_then(|rebuild| rebuild.task.as_ref()) {
            task.say(message);
        }
    }

    /// Nothing is left to move for redundancy's sake.
    fn tell_rebuilt(&mut self) {
        let Some(rebuild) = self.rebuild.take() else { return };
        let damaged = {
            let table = self.engine.pool.table.lock();
            let damaged = table.iter().filter(|s| s.damaged && s.entry.live_blocks > 0);
            bytes_u64(damaged.count())
        };
        let message = match self.engine.pool.redundancy().degraded {
            0 => "every segment is whole again".to_owned(),
            _ if damaged > 0 => format!(
                "{damaged} segments could not be moved as a whole: see the events damage-left"
            ),
            degraded => format!("{degraded} segments wait for devices to be replaced"),
        };
        event::raise(event::REBUILD_DONE, "pod", &message);
        if let Some(task) = rebuild.task {
            task.progress(rebuild.total, rebuild.total);
            task.finish(TaskState::Done, &message);
        }
    }

    /// The closed data segments with the least live bytes: one at least, if there is any.
    fn choose_victims(&self) -> Vec<SegmentId> {
        let segment_bytes = self.engine.pool.geometry.segment_bytes();
        let table = self.engine.pool.table.lock();
        let mut candidates: Vec<(u64, SegmentId, u64)> = table
            .iter()
            .filter(|segment| !segment.open && !segment.damaged && !segment.entry.metadata)
            .filter(|segment| segment.entry.rows > 0)
            .map(|segment| (segment.live_bytes(), segment.entry.id, segment.entry.rows))
            .filter(|(live_bytes, ..)| 100 * live_bytes / segment_bytes < LIVE_PERCENT_MAX)
            .collect();
        candidates.sort_unstable();
        let (mut live_bytes, mut rows) = (0, 0);
        let mut victims = Vec::new();
        for (live, id, segment_rows) in candidates {
            live_bytes += live;
            rows += segment_rows;
            let much = live_bytes > COPIED_SEGMENTS_MAX * segment_bytes || rows > VICTIM_ROWS_MAX;
            if much && !victims.is_empty() {
                break;
            }
            victims.push(id);
        }
        victims
    }

    /// Copies what is live out of the victims; the checkpoint moves the map nodes that were in
    /// them, and frees them.
    async fn empty_segments(&mut self, victims: &[SegmentId]) -> Result<()> {
        let mut damages = Vec::new();
        // Gathered over all victims: what is left of each alone would begin a row of its own.
        let mut moving = Moving::default();
        for victim in victims {
            damages.push(self.empty_segment(*victim, &mut moving).await?);
        }
        let mut damage = None;
        self.move_copies(moving, &mut damage).await?;
        if !victims.is_empty() {
            self.write_checkpoint().await?;
        }
        for (victim, own) in victims.iter().zip(&damages) {
            self.leave_damaged(*victim, own.as_ref().or(damage.as_ref()));
        }
        Ok(())
    }

    /// What was not moved out of a segment stays; if nothing in it is live, nothing was lost.
    /// Without damage in the segment, what refers to it was lost.
    fn leave_damaged(&self, segment: SegmentId, damage: Option<&Error>) {
        {
            let mut table = self.engine.pool.table.lock();
            if table.get(segment).is_none_or(|segment| segment.entry.live_blocks == 0) {
                return;
            }
            table.mark_damaged(segment);
        }
        let reason = damage.map_or_else(|| "its place in a map is lost".to_owned(), Error::chain);
        let message = format_args!(
            "what can be read of segment {} was moved, the rest stays: {reason}",
            segment.0
        );
        event::raise(event::DAMAGE_LEFT, "pod", message);
    }

    /// Moves what is live, or leaves it in `moving` to be moved, but for what is damaged beyond
    /// repair; returns the first damage.
    async fn empty_segment(
        &mut self,
        victim: SegmentId,
        moving: &mut Moving,
    ) -> Result<Option<Error>> {
        let engine = Arc::clone(&self.engine);
        let Some(lease) = engine.pool.lease(victim) else { return Ok(None) };
        let rows = engine.pool.table.lock().get(victim).map_or(0, |segment| segment.entry.rows);
        let mut damage = None;
        for row in 0..rows {
            for strip in 0..engine.pool.geometry.data_strips {
                let bodies = self.bodies(&lease, strip, row, &mut damage).await?;
                for copy in self.live_records(&lease, strip, row, &bodies, &mut damage).await? {
                    moving.bytes += copy.item.header.stride();
                    moving.copies.push(copy);
                }
            }
            if moving.bytes >= COPY_BYTES {
                self.move_copies(std::mem::take(moving), &mut damage).await?;
            }
            // Map nodes are moved by dirtying them, and a row holds many.
            if self.dirty_nodes() > self.engine.dirty_nodes_max / 2 {
                self.checkpoint_mapped().await?;
            }
        }
        self.changed = true;
        Ok(damage)
    }

    /// A unit as it was written; or else whatever there is of it.
    async fn bodies(
        &self,
        lease: &Lease<'_>,
        strip: usize,
        row: u64,
        damage: &mut Option<Error>,
    ) -> Result<Vec<Body>> {
        let unit = self.engine.pool.whole_unit(lease, strip, row).await;
        if let Some(bytes) = unless_damaged(unit, damage)? {
            return Ok(vec![Body { bytes, whole: true }]);
        }
        let remains = self.engine.pool.unit_remains(lease, strip, row).await;
        Ok(remains.into_iter().map(|bytes| Body { bytes, whole: false }).collect())
    }

    /// The live records of a unit; map nodes are marked for the next checkpoint instead.
    async fn live_records(
        &self,
        lease: &Lease<'_>,
        strip: usize,
        row: u64,
        bodies: &[Body],
        damage: &mut Option<Error>,
    ) -> Result<Vec<Copy>> {
        let space = self.engine.pool.geometry.space();
        let unit = Address { segment: lease.segment, strip, byte: row * UNIT_BYTES as u64 };
        // Whatever fails here fails again below.
        let _ = self.engine.load_nodes(self.leaves_named(unit, bodies).into_iter()).await;
        let (mut copies, mut found) = (Vec::new(), BTreeSet::new());
        for body in bodies {
            let mut at = UNIT_HEADER_BYTES;
            while let Some((address, header, payload)) = self.next_record(unit, body, &mut at) {
                if !found.insert(address.byte) {
                    continue;
                }
                let old = space.location(address, header.record_bytes());
                let looked_at = match header.kind {
                    RecordKind::Data => self.live_parts(&header, payload, old, &mut copies).await,
                    RecordKind::MapNode => self.move_node(&header, old).await,
                    RecordKind::Zero
                    | RecordKind::CatalogChange
                    | RecordKind::TablePage
                    | RecordKind::TableDirectory
                    | RecordKind::Catalog
                    | RecordKind::Root => Ok(()),
                };
                unless_damaged(looked_at, damage)?;
            }
        }
        Ok(copies)
    }

    /// The leaves that may refer to the records of a unit, to be read at once.
    fn leaves_named(&self, unit: Address, bodies: &[Body]) -> Vec<(Arc<Layer>, NodeKey)> {
        let mut leaves = BTreeMap::new();
        for body in bodies {
            let mut at = UNIT_HEADER_BYTES;
            while let Some((_, header, _)) = self.next_record(unit, body, &mut at) {
                if header.kind == RecordKind::Data
                    && let Some(layer) = self.engine.layer_of(header.branch)
                {
                    leaves.insert((layer.id, NodeKey::covering(header.lba, 0)), layer);
                }
            }
        }
        leaves.into_iter().map(|((_, leaf), layer)| (layer, leaf)).collect()
    }

    /// The next record of a unit from byte `at` on, which moves past it. Of a unit that is not
    /// whole, one that does not decode is stepped over to the next that does.
    fn next_record<'a>(
        &self,
        unit: Address,
        body: &'a Body,
        at: &mut usize,
    ) -> Option<(Address, RecordHeader, &'a [u8])> {
        let geometry = &self.engine.pool.geometry;
        let space = geometry.space();
        while let Some(rest) = body.bytes.get(*at..).filter(|rest| !rest.is_empty()) {
            let address = Address { byte: unit.byte + bytes_u64(*at), ..unit };
            match decode_record(rest, geometry.pod, space.log_address(address)) {
                Ok((header, payload)) => {
                    *at += bytes_usize(header.stride());
                    debug_assert!(*at <= UNIT_BYTES);
                    return Some((address, header, payload));
                }
                Err(_) if body.whole => return None,
                Err(_) => *at += bytes_usize(RECORD_ALIGN),
            }
        }
        None
    }

    async fn live_parts(
        &self,
        header: &RecordHeader,
        payload: &[u8],
        old: Location,
        copies: &mut Vec<Copy>,
    ) -> Result<()> {
        let Some(layer) = self.engine.layer_of(header.branch) else { return Ok(()) };
        let mut live = Vec::new();
        for lba in header.lba.0..header.lba.0 + header.blocks {
            if self.untrimmed_entry(&layer, Lba(lba)).await? == old || planted(Bug::DeadMoved) {
                live.push(lba);
            }
        }
        if bytes_u64(live.len()) == header.blocks {
            let item = LogItem { header: *header, payload: Bytes::copy_from_slice(payload) };
            copies.push(Copy { layer, old, item });
            return Ok(());
        }
        if live.is_empty() {
            return Ok(());
        }
        let chunk = decode_chunk(header, payload).ok_or_else(|| {
            Error::new(ErrorKind::Corrupt, "reclaim record").context(format_args!("{old:?}"))
        })?;
        for run in live.chunk_by(|a, b| a + 1 == *b) {
            let from = bytes_usize(run[0] - header.lba.0) * BLOCK_BYTES;
            let mut parts = Vec::new();
            push_chunk(Lba(run[0]), &chunk.data[from..from + run.len() * BLOCK_BYTES], &mut parts);
            for (part, payload) in parts {
                // Stamped once, kept when moved.
                let header = RecordHeader { lsn: header.lsn, branch: header.branch, ..part };
                let item = LogItem { header, payload };
                copies.push(Copy { layer: Arc::clone(&layer), old, item });
            }
        }
        Ok(())
    }

    /// An entry of a leaf that no trim covers: what one covers would go on to be counted as live, and
    /// its segment could not be freed.
    async fn untrimmed_entry(&self, layer: &Layer, lba: Lba) -> Result<Location> {
        let ask = || {
            let mut state = layer.state.lock();
            self.clear_if_trimmed(layer, &mut state.map, NodeKey::covering(lba, 0).index)?;
            state.map.get(lba)
        };
        self.engine.ask_layer(layer, ask).await
    }

    async fn move_node(&self, header: &RecordHeader, old: Location) -> Result<()> {
        let Some(layer) = self.engine.layer(LayerId(header.branch.0)) else { return Ok(()) };
        let Some(key) = NodeKey::from_record_lba(header.lba) else { return Ok(()) };
        let mark = |map: &mut Map| match map.stored_at(key)? {
            stored if stored == old => map.mark_dirty(key),
            _ => Ok(()),
        };
        self.engine.ask(&layer, mark).await
    }

    async fn move_copies(&mut self, moving: Moving, damage: &mut Option<Error>) -> Result<()> {
        let copies = moving.copies;
        let items: Vec<LogItem> = copies
            .iter()
            .map(|copy| LogItem { header: copy.item.header, payload: copy.item.payload.clone() })
            .collect();
        let locations = self.append_records(Stream::Data, &items).await?;
        for (copy, new) in copies.iter().zip(locations) {
            let header = &copy.item.header;
            for lba in header.lba.0..header.lba.0 + header.blocks {
                let replaced = self.replace_if(&copy.layer, Lba(lba), copy.old, new).await;
                unless_damaged(replaced, damage)?;
            }
        }
        Ok(())
    }
}

/// Keeps the first damage that is met; all other failures end the work.
fn unless_damaged<T>(result: Result<T>, damage: &mut Option<Error>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == ErrorKind::Corrupt => {
            damage.get_or_insert(error);
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

//! Volumes on a log: the write path, the read path, and what makes them crash-safe.
//!
//! | file | owns |
//! |---|---|
//! | [`mod@write`], [`record`] | bytes → records → entries |
//! | [`journal`] | the redo log: batches, group commit, acknowledgement |
//! | [`index`], [`map`], [`layer`] | where a block is: write buffer, map, both under one lock |
//! | [`volatile`] | what was acknowledged before it is durable |
//! | [`read`] | blocks → chunks → pieces |
//! | `mapper` | the one task that fills segments and changes maps |
//! | `checkpoint`, `recovery`, [`open`] | what a crash leaves and how it is opened again |
//! | `clear`, [`trim`] | large trims, and the maps of deleted volumes |
//! | `lost` | map nodes that are beyond repair |
//! | `reclaim`, [`space`] | getting space back, and promising it |
//! | `scrub` | looking for damage in what nobody reads |
//! | [`catalog`] | names and settings |
//! | [`range_lock`] | order of overlapping requests |
//!
//! Rules (design.md, section 6): one redo log, one mapper, one order; durable before visible,
//! visible before acknowledged, mapped before dropped, checkpointed before freed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;
use parking_lot::RwLock;
use rustc_hash::FxHashMap;
use tokio::sync::Notify;
use tokio::sync::watch;

use crate::cache::ChunkCache;
use crate::canary::Bug;
use crate::canary::planted;
use crate::env::EnvRef;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::format::location::Location;
use crate::format::node::MAP_LEVELS;
use crate::format::record::RecordKind;
use crate::format::table::Place;
use crate::observe::task::Tasks;
use crate::pool::Pool;
use crate::units::BranchId;
use crate::units::LayerId;
use crate::units::Lba;
use crate::units::bytes_u64;
use crate::units::format_size;

pub mod block_status;
pub mod catalog;
mod checkpoint;
mod clear;
pub mod index;
pub mod journal;
pub mod layer;
mod lost;
pub mod map;
mod mapper;
pub mod open;
pub mod range_lock;
pub mod read;
mod reclaim;
pub mod record;
mod recovery;
mod scrub;
pub mod space;
pub mod trim;
pub mod volatile;
pub mod write;

use catalog::Catalog;
use catalog::CatalogChange;
use journal::Journal;
use journal::NewEntry;
use journal::NewRecord;
use layer::Layer;
use layer::LayerState;
use mapper::BufferQueue;
use record::BufferedRecord;
use record::header_of;
use scrub::ScrubControl;
use space::Levels;
use space::Space;
use trim::Trim;
use volatile::Acknowledge;

/// Largest decoded payload: what a record in a unit may claim to hold.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;
/// Share of the segments, without the reserve, that live and promised data may fill, in percent:
/// the rest keeps reclaim cheap enough.
const FILL_PERCENT_MAX: u64 = 93;
/// Nodes that a walk may have to read: the paths to the two leaves that one plan may span.
const READS_PER_WALK: usize = 2 * MAP_LEVELS as usize;
/// How often a closing engine looks whether the journal has drained.
const DRAIN_POLL: Duration = Duration::from_millis(1);

/// Layers by number and by the branch whose records they own.
#[derive(Default)]
struct Layers {
    by_id: BTreeMap<LayerId, Arc<Layer>>,
    by_branch: FxHashMap<BranchId, Arc<Layer>>,
}

/// One open pod: its pool, journal, layers and catalog.
pub struct Engine {
    /// Time, randomness, tasks.
    pub env: EnvRef,
    /// Devices and segments.
    pub pool: Arc<Pool>,
    /// Decoded chunks.
    pub cache: ChunkCache,
    /// Room promised.
    pub space: Arc<Space>,
    /// This run of the pod.
    pub epoch: u64,
    /// Long work, under way and ended.
    pub tasks: Arc<Tasks>,
    journal: Journal,
    buffer: Mutex<BufferQueue>,
    catalog: Mutex<Catalog>,
    layers: RwLock<Layers>,
    /// Wakes the mapper.
    wake: Notify,
    stopping: AtomicBool,
    /// Set by the mapper when it has ended, with the outcome of its last checkpoint.
    stopped: watch::Sender<Option<Result<()>>>,
    /// Map nodes in memory, about: corrected by the mapper.
    nodes: AtomicUsize,
    nodes_max: usize,
    /// Walks down a map that wait for a node.
    walks_waiting: AtomicUsize,
    /// Nodes read since some were last evicted.
    nodes_read: AtomicUsize,
    dirty_nodes_max: usize,
    reserve_segments: u64,
    catalog_bytes_max: usize,
    checkpoints: AtomicU64,
    scrub: ScrubControl,
}

/// Most large trims under way at once in a pod: any more are mapped leaf by leaf, while all else
/// waits. Arbitrary: enough for hosts that do little else, few enough to be looked through for each
/// block.
const TRIMS_MAX: usize = 64;
/// Bytes of a layer in the catalog's JSON, which comes with a volume: seven names, and as many
/// numbers of 20 digits at most.
const LAYER_BYTES_MAX: usize = 256;

/// Figures for status.
#[derive(Clone, Copy, Debug)]
pub struct EngineStatus {
    /// Bytes that live and promised data may fill, as stored.
    pub limit_bytes: u64,
    /// Bytes of segments that live data occupies.
    pub live_bytes: u64,
    /// Bytes of stored blocks as hosts see them.
    pub logical_bytes: u64,
    /// Bytes of the journal's ring in use.
    pub journal_used_bytes: u64,
    /// Bytes acknowledged and not yet in segments.
    pub buffered_bytes: u64,
    /// Checkpoints since the pod was opened.
    pub checkpoints: u64,
    /// Writes are refused until the pod is reopened.
    pub read_only: bool,
}

impl Engine {
    /// Makes a durable entry visible: all its records at once, then queued for the mapper.
    fn make_visible(&self, records: &[Arc<BufferedRecord>]) {
        let Some(first) = records.first() else { return };
        if first.header.kind == RecordKind::CatalogChange {
            records.iter().for_each(|record| self.apply_change(record));
        } else if let Some(layer) = &first.layer {
            let mut state = layer.state.lock();
            if layer.dropping.load(Ordering::Acquire) {
                // Nobody reads it any more.
            } else if planted(Bug::VisibleByHalves) {
                self.insert_one_by_one(records, layer);
                records[..1].iter().for_each(|record| state.index.insert(record));
            } else {
                records.iter().for_each(|record| state.index.insert(record));
            }
            layer.volatile.remove(records);
        }
        let mut queue = self.buffer.lock();
        queue.bytes += records.iter().map(|record| record.header.stride()).sum::<u64>();
        queue.records.extend(records.iter().cloned());
        let worth_waking = queue.bytes > self.pool.geometry.journal_bytes / 8;
        drop(queue);
        if worth_waking {
            self.wake_mapper();
        }
    }

    /// A planted bug: the rest of an entry comes in later.
    fn insert_one_by_one(&self, records: &[Arc<BufferedRecord>], layer: &Arc<Layer>) {
        let (rest, layer) = (records[1..].to_vec(), Arc::clone(layer));
        self.env.spawn(Box::pin(async move {
            rest.iter().for_each(|record| layer.state.lock().index.insert(record));
        }));
    }

    fn wake_mapper(&self) {
        self.wake.notify_one();
    }

    fn apply_change(&self, record: &BufferedRecord) {
        let change = CatalogChange::decode(&record.payload).expect("our own, or checked by open");
        let lsn = record.header.lsn;
        let mut catalog = self.catalog.lock();
        let head_of = |catalog: &Catalog, id: &u64| catalog.volumes.get(id).map(|v| v.head);
        match &change {
            CatalogChange::CreateVolume(volume) if lsn.0 > catalog.applied => {
                let (id, branch) = (LayerId(volume.head), BranchId(volume.branch));
                self.add_layer(Layer::new(id, branch, Location::HOLE, 0));
            }
            CatalogChange::DeleteVolume { id } => {
                if let Some(layer) =
                    head_of(&catalog, id).and_then(|head| self.layer(LayerId(head)))
                {
                    layer.dropping.store(true, Ordering::Release);
                }
            }
            CatalogChange::CreateVolume(_)
            | CatalogChange::ResizeVolume { .. }
            | CatalogChange::SetVolumeHosts { .. }
            | CatalogChange::SetWriteCache { .. }
            | CatalogChange::AddHost(_)
            | CatalogChange::SetHostKeys { .. }
            | CatalogChange::SetHostTlsKey { .. }
            | CatalogChange::RemoveHost { .. }
            | CatalogChange::SetReservations { .. } => {}
        }
        catalog.apply(lsn.0, &change);
    }

    /// Makes a change of the catalog durable and visible.
    ///
    /// # Errors
    /// `NoSpace` if the catalog would be longer than the reserve has room for. `Poisoned` or
    /// `ShuttingDown`; whether the change survives a restart is then unknown.
    pub async fn change_catalog(self: &Arc<Self>, change: &CatalogChange) -> Result<()> {
        let payload = change.encode();
        if change.grows() {
            self.check_catalog_room(payload.len())?;
        }
        let header = header_of(RecordKind::CatalogChange, Lba(0), 0, &payload);
        let record = NewRecord { header, payload: payload.into(), promise: None };
        let (records, acknowledge) = (vec![record], Acknowledge::Durable);
        self.append(NewEntry { layer: None, records, hold: None, acknowledge }).await
    }

    /// Every checkpoint writes the whole catalog, in a full pod too.
    fn check_catalog_room(&self, added_bytes: usize) -> Result<()> {
        let named = self.catalog.lock().encode().len() + added_bytes + LAYER_BYTES_MAX;
        // Trims are not refused: they come on top, all that there may be.
        let bytes = named + TRIMS_MAX * Trim::JSON_BYTES_MAX;
        if bytes <= self.catalog_bytes_max {
            return Ok(());
        }
        Err(Error::new(ErrorKind::NoSpace, "change catalog").context(format_args!(
            "names and settings may take {} in a pod of this size: delete volumes or hosts",
            format_size(bytes_u64(self.catalog_bytes_max))
        )))
    }

    /// Looks at the catalog; short, as everything that names volumes waits.
    pub fn with_catalog<T>(&self, look: impl FnOnce(&Catalog) -> T) -> T {
        look(&self.catalog.lock())
    }

    /// The catalog as JSON with the layers as they are now; dropped and empty layers leave it.
    fn refresh_catalog(&self) -> Vec<u8> {
        let layers = self.layers();
        let mut catalog = self.catalog.lock();
        for layer in layers {
            let (root, empty, trims) = {
                let LayerState { map, index, .. } = &*layer.state.lock();
                (map.root(), map.is_empty() && index.is_empty(), map.trims.pending())
            };
            if empty && layer.dropping.load(Ordering::Acquire) {
                catalog.layers.remove(&layer.id.0);
                let mut layers = self.layers.write();
                layers.by_id.remove(&layer.id);
                layers.by_branch.remove(&layer.branch);
            } else if let Some(record) = catalog.layers.get_mut(&layer.id.0) {
                record.root = root.0;
                record.mapped_blocks = layer.mapped_blocks.load(Ordering::Relaxed);
                record.trims = if planted(Bug::TrimNotStored) { Vec::new() } else { trims };
            }
        }
        catalog.encode()
    }

    fn add_layer(&self, layer: Layer) {
        let layer = Arc::new(layer);
        let mut layers = self.layers.write();
        layers.by_branch.insert(layer.branch, Arc::clone(&layer));
        layers.by_id.insert(layer.id, layer);
    }

    /// The layer of that number.
    #[must_use]
    pub fn layer(&self, id: LayerId) -> Option<Arc<Layer>> {
        self.layers.read().by_id.get(&id).cloned()
    }

    /// The layer that owns the records of `branch`.
    fn layer_of(&self, branch: BranchId) -> Option<Arc<Layer>> {
        self.layers.read().by_branch.get(&branch).cloned()
    }

    fn layers(&self) -> Vec<Arc<Layer>> {
        self.layers.read().by_id.values().cloned().collect()
    }

    fn places_of(&self, location: Location) -> Vec<Option<Place>> {
        let address = self.pool.geometry.space().address(location);
        let table = self.pool.table.lock();
        let segment = address.and_then(|address| table.get(address.segment));
        segment.map(|segment| segment.entry.places.clone()).unwrap_or_default()
    }

    /// Moves a cached chunk from its buffered key to its location.
    fn rename_cached(&self, buffered: u64, location: u64) {
        if let Some(chunk) = self.cache.get(buffered) {
            self.cache.insert(location, chunk);
            self.cache.remove(buffered);
        }
    }

    /// Whether nodes are to be evicted: there are too many, and each walk under way has had the
    /// time to look again at those it needs, which is what keeps them. Evicting with every node
    /// that is read, a few walks at once would take each other's away for ever.
    fn evicts_nodes(&self) -> bool {
        let over = self.nodes.load(Ordering::Relaxed) > self.nodes_max;
        let patience = READS_PER_WALK * self.walks_waiting.load(Ordering::Relaxed);
        let evicts = over && self.nodes_read.load(Ordering::Relaxed) >= patience;
        if evicts {
            self.nodes_read.store(0, Ordering::Relaxed);
        }
        evicts
    }

    fn forget_nodes(&self, dropped: usize) {
        let forget = |nodes: usize| Some(nodes.saturating_sub(dropped));
        let _ = self.nodes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, forget);
    }

    /// Segments that can be opened even if as many devices are lost as may be: what was promised
    /// must fit then too, and the reserve beside it.
    fn free_segments(&self) -> u64 {
        let usable: Vec<bool> =
            self.pool.members.iter().map(|m| m.in_service() && !m.is_full()).collect();
        let lost = usable.iter().filter(|usable| !**usable).count();
        let may_be_lost = self.pool.geometry.parity_strips.saturating_sub(lost);
        self.pool.table.lock().free_segments_after(&usable, may_be_lost)
    }

    /// Tells the door how much room there is, and corrects the count of nodes in memory.
    fn publish_space(&self, exhausted: bool, clearing: bool) {
        let segment_bytes = self.pool.geometry.segment_bytes();
        let free = self.free_segments();
        let (total, live_bytes) = {
            let table = self.pool.table.lock();
            (table.segments_total(), table.live_bytes())
        };
        let present = self.pool.members.iter().filter(|m| m.device_bytes().is_some()).count();
        let reserve = self.pool.geometry.with_losses(self.reserve_segments, present);
        let fillable = total.saturating_sub(reserve) * segment_bytes;
        self.space.publish(Levels {
            limit_bytes: fillable / 100 * FILL_PERCENT_MAX,
            live_bytes,
            free_bytes: free.saturating_sub(self.reserve_segments) * segment_bytes,
            exhausted,
            clearing,
        });
        let layers = self.layers();
        let evicts = self.evicts_nodes();
        let mut nodes = 0;
        for layer in &layers {
            let mut state = layer.state.lock();
            if evicts {
                state.map.evict();
            }
            nodes += state.map.node_count();
        }
        self.nodes.store(nodes, Ordering::Relaxed);
    }

    /// Figures for status.
    #[must_use]
    pub fn status(&self) -> EngineStatus {
        let levels = self.space.levels();
        let blocks: u64 =
            self.layers().iter().map(|l| l.mapped_blocks.load(Ordering::Relaxed)).sum();
        EngineStatus {
            limit_bytes: levels.limit_bytes,
            live_bytes: self.pool.table.lock().live_bytes(),
            logical_bytes: blocks * crate::units::BLOCK_BYTES_U64,
            journal_used_bytes: self.journal.used_bytes(),
            buffered_bytes: self.buffer.lock().bytes,
            checkpoints: self.checkpoints.load(Ordering::Relaxed),
            read_only: self.journal.failure().is_some(),
        }
    }

    /// Copies of journal batches that devices still owe although enough others took them.
    #[must_use]
    pub fn late_journal_copies(&self) -> usize {
        self.journal.late_copies()
    }

    /// Ends a scrub, refuses new entries, waits for those under way, drains the buffer, writes a
    /// checkpoint and waits for heals.
    ///
    /// # Errors
    /// The last checkpoint's. Nothing acknowledged is lost: the next start replays the journal.
    pub async fn close(&self) -> Result<()> {
        self.stop_scrub().await;
        self.journal.close();
        self.space.changed.notify_waiters();
        while !self.journal.is_drained() {
            self.env.sleep(DRAIN_POLL).await;
        }
        self.stopping.store(true, Ordering::Release);
        self.wake_mapper();
        let mut stopped = self.stopped.subscribe();
        let outcome = stopped.wait_for(Option::is_some).await;
        self.pool.stop_heals().await;
        match outcome.as_deref() {
            Ok(Some(Err(error))) => Err(error.duplicate()),
            Ok(Some(Ok(())) | None) => Ok(()),
            Err(_) => Err(Error::new(ErrorKind::ShuttingDown, "wait for the last checkpoint")),
        }
    }
}

impl Drop for Engine {
    /// Buffered records and their layers refer to each other. After a clean close none is left; but an
    /// engine can be dropped without one.
    fn drop(&mut self) {
        for layer in self.layers.get_mut().by_id.values() {
            let index = std::mem::take(&mut layer.state.lock().index);
            drop(index);
            layer.volatile.clear();
        }
    }
}

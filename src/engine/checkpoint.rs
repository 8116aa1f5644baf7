//! Checkpoints: maps, segment table and catalog as of a cut, then the superblocks, then the tail.
//!
//! The mapper writes them between two groups, so nothing is mapped meanwhile and what is written
//! holds the entries up to the cut. Every step writes records to the log; nothing refers to them
//! until the superblocks name the new root. Order: dirty nodes from the leaves up, catalog, table
//! pages, directories, root; all durable; superblocks; then the journal's tail moves and the
//! regions of segments that were empty before the cut become free.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Engine;
use super::layer::Layer;
use super::mapper::LiveChanges;
use super::mapper::LogItem;
use super::mapper::Mapper;
use super::mapper::Reserve;
use super::mapper::Stream;
use super::record::compressed;
use crate::canary::Bug;
use crate::canary::planted;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::format::location::Location;
use crate::format::node::MAP_LEVELS;
use crate::format::node::NODE_ENTRIES;
use crate::format::node::NodeEntries;
use crate::format::node::NodeKey;
use crate::format::node::empty_node;
use crate::format::node::encode_node;
use crate::format::record::RecordKind;
use crate::format::root::CheckpointRoot;
use crate::format::table::encode_page;
use crate::pool::table::Segment;
use crate::units::BranchId;
use crate::units::Lba;
use crate::units::Lsn;
use crate::units::bytes_u64;

/// Bytes of catalog JSON per record: fits a unit even if it does not compress.
pub(super) const CATALOG_PART_BYTES: usize = 60 << 10;
/// Segment ids that a superblock grants ahead of their use.
pub(super) const ID_GRANT: u64 = 4096;
/// Nodes written together.
const NODES_PER_TURN: usize = 1024;
/// Nodes copied under one lock of their layer, which reads and writes wait for: 256 KiB.
const NODES_PER_LOCK: usize = 64;
/// Metadata segments kept besides those that live metadata needs.
const METADATA_SEGMENTS_SPARE: usize = 3;

/// Where the newest checkpoint's parts are.
#[derive(Clone, Debug, Default)]
pub(super) struct CheckpointState {
    /// Its number.
    pub(super) number: u64,
    /// The root record.
    pub(super) root: Location,
    /// Parts of the catalog.
    pub(super) catalog: Vec<Location>,
    /// Directories of table pages.
    pub(super) directories: Vec<Location>,
    /// Table pages; a hole for one never written.
    pub(super) pages: Vec<Location>,
}

/// A map node that a checkpoint writes.
struct DirtyNode {
    layer: Arc<Layer>,
    key: NodeKey,
    entries: NodeEntries,
    stamp: Lsn,
}

impl DirtyNode {
    fn is_empty(&self) -> bool {
        self.entries.iter().all(|entry| *entry == Location::HOLE)
    }

    fn item(&self) -> LogItem {
        let (place, owner) = (self.key.to_record_lba(), self.layer.id.0);
        let mut item =
            metadata_item(RecordKind::MapNode, place, owner, &encode_node(&self.entries));
        item.header.lsn = self.stamp;
        item
    }
}

impl Mapper {
    /// Maps everything acknowledged so far and writes a checkpoint of it. Without room for all of it,
    /// a checkpoint of what is mapped frees what can be.
    ///
    /// # Errors
    /// The tail stays before what is not in a checkpoint; it can be tried again.
    pub(super) async fn write_checkpoint(&mut self) -> Result<()> {
        let cut = self.engine.journal.visible_lsn();
        let drained = self.drain_to(cut).await;
        if !matches!(&drained, Err(error) if error.kind() != ErrorKind::NoSpace) {
            self.checkpoint_mapped().await?;
        }
        drained
    }

    /// Writes a checkpoint of what is mapped. Parts of later entries may be mapped already: they
    /// are in the journal and replaying them gives the same map.
    pub(super) async fn checkpoint_mapped(&mut self) -> Result<()> {
        self.reserve = Reserve::Open;
        let written = self.write_mapped().await;
        if std::mem::replace(&mut self.reserve, Reserve::Barred) == Reserve::Used {
            // The rest of the segment is not for data.
            self.close_segment(Stream::Data);
        }
        written
    }

    async fn write_mapped(&mut self) -> Result<()> {
        let engine = Arc::clone(&self.engine);
        if planted(Bug::CutTooHigh) {
            self.mapped = engine.journal.visible_lsn();
        }
        let cut = self.mapped;
        let (tail_position, tail_lsn, tail_previous) = engine.journal.tail_after(cut);
        self.write_nodes().await?;
        self.write_catalog().await?;
        self.choose_metadata_to_move();
        engine.pool.table.lock().retire_empty();
        let retired = engine.pool.table.lock().retired();
        if planted(Bug::FreedBeforeCheckpoint) {
            engine.pool.table.lock().free_retired(retired);
        }
        self.write_table().await?;
        let root = self.write_root(cut).await?;
        let id_limit = engine.pool.table.lock().next_id() + ID_GRANT;
        let number = self.checkpoint.number;
        let places = engine.places_of(root);
        if planted(Bug::TailBeforeSuperblock) {
            engine.journal.advance_tail(tail_position);
        }
        engine
            .pool
            .commit_superblock(|superblock| {
                superblock.root = root;
                superblock.root_places = places;
                superblock.checkpoint = number;
                superblock.tail_position = tail_position;
                superblock.tail_lsn = tail_lsn;
                superblock.tail_previous = tail_previous;
                superblock.id_limit = id_limit;
            })
            .await?;
        engine.journal.advance_tail(tail_position);
        {
            let mut table = engine.pool.table.lock();
            table.extend_ids(id_limit);
            table.free_retired(retired);
        }
        engine.pool.members.iter().for_each(|member| member.may_have_room());
        engine.checkpoints.fetch_add(1, Ordering::Relaxed);
        self.changed = false;
        let (live_bytes, left_empty) = {
            let table = engine.pool.table.lock();
            (table.live_bytes(), table.empty_segments())
        };
        self.exhausted &= live_bytes >= self.exhausted_at_bytes;
        self.left_empty = left_empty;
        self.last_checkpoint = engine.env.now();
        Ok(())
    }

    /// Writes the dirty nodes of all maps from the leaves up; parents learn where their children
    /// went. Each level of all maps at once: what is written together begins a row, and the reserve
    /// holds a row for each level, however many volumes there are.
    async fn write_nodes(&mut self) -> Result<()> {
        let layers = self.engine.layers();
        for level in 0..MAP_LEVELS {
            let mut turn = Vec::new();
            for layer in &layers {
                let mut from = 0;
                while let Some(last) = copy_dirty_nodes(layer, level, from, &mut turn) {
                    from = last.index + 1;
                    if turn.len() >= NODES_PER_TURN {
                        self.write_nodes_of_level(&turn).await?;
                        turn.clear();
                    }
                }
            }
            self.write_nodes_of_level(&turn).await?;
        }
        Ok(())
    }

    async fn write_nodes_of_level(&mut self, nodes: &[DirtyNode]) -> Result<()> {
        // First, so that one that cannot be read fails before any room is taken.
        let below_root = nodes.iter().filter(|node| node.key.level + 1 < MAP_LEVELS);
        let parents: Vec<_> =
            below_root.map(|node| (Arc::clone(&node.layer), node.key.parent().0)).collect();
        self.load_to_change(&parents).await?;
        let items: Vec<LogItem> =
            nodes.iter().filter(|node| !node.is_empty()).map(DirtyNode::item).collect();
        let mut locations = self.append_records(Stream::Data, &items).await?.into_iter();
        for node in nodes {
            let location = if node.is_empty() {
                Location::HOLE
            } else {
                locations.next().expect("one location per item")
            };
            self.set_stored_at(&node.layer, node.key, location).await?;
        }
        Ok(())
    }

    async fn set_stored_at(&self, layer: &Layer, key: NodeKey, location: Location) -> Result<()> {
        loop {
            let moved = {
                let mut state = layer.state.lock();
                let moved = state.map.set_stored_at(key, location);
                if moved.is_ok() && location == Location::HOLE {
                    state.map.forget(key);
                }
                moved
            };
            match moved {
                Ok(old) => {
                    let mut changes = LiveChanges::default();
                    changes.note(old, location);
                    self.engine.apply_live(layer, &changes, false);
                    return Ok(());
                }
                Err(load) => self.engine.load_node(layer, load).await?,
            }
        }
    }

    /// Copies the catalog and writes it; layers that were dropped and are empty leave it.
    async fn write_catalog(&mut self) -> Result<()> {
        let json = self.engine.refresh_catalog();
        let items: Vec<LogItem> = json
            .chunks(CATALOG_PART_BYTES)
            .enumerate()
            .map(|(part, bytes)| metadata_item(RecordKind::Catalog, Lba(bytes_u64(part)), 0, bytes))
            .collect();
        let locations = self.append_records(Stream::Metadata, &items).await?;
        for location in &locations {
            self.engine.count_metadata(Location::HOLE, *location);
        }
        for old in std::mem::replace(&mut self.checkpoint.catalog, locations) {
            self.engine.count_metadata(old, Location::HOLE);
        }
        Ok(())
    }

    /// Marks the table pages in the emptiest metadata segment for writing, so that the number of
    /// metadata segments, which the root must list, stays small.
    fn choose_metadata_to_move(&mut self) {
        let space = self.engine.pool.geometry.space();
        let mut table = self.engine.pool.table.lock();
        let closed: Vec<_> =
            table.metadata().filter(|s| !s.open && s.entry.live_blocks > 0).collect();
        let (in_service, usable) = (self.engine.pool.in_service(), self.devices_to_move_to());
        let strips = |segment: &&Segment| segment.strips_in_service(&in_service);
        let wanted = usable.iter().filter(|usable| **usable).count();
        let wanted = wanted.min(self.engine.pool.geometry.strips());
        let weak = closed.iter().copied().find(|segment| strips(segment) < wanted);
        let emptiest = closed.iter().copied().min_by_key(|s| (s.entry.live_blocks, s.entry.id));
        let crowded = closed.len() > METADATA_SEGMENTS_SPARE;
        let Some(victim) = weak.or(emptiest.filter(|_| crowded)).map(|s| s.entry.id) else {
            return;
        };
        let lies_there = |location: &Location| {
            space.address(*location).is_some_and(|address| address.segment == victim)
        };
        for (page, location) in self.checkpoint.pages.iter().enumerate() {
            let directory = self.checkpoint.directories.get(page / NODE_ENTRIES);
            if lies_there(location) || directory.is_some_and(&lies_there) {
                table.mark_page_dirty(page);
            }
        }
    }

    /// Writes changed table pages, then the directories that list them.
    async fn write_table(&mut self) -> Result<()> {
        let pages = self.engine.pool.table.lock().take_dirty_pages();
        let numbers: Vec<usize> = pages.keys().copied().collect();
        let result = self.write_pages(pages).await;
        if result.is_err() {
            let mut table = self.engine.pool.table.lock();
            numbers.into_iter().for_each(|page| table.mark_page_dirty(page));
        }
        result
    }

    async fn write_pages(
        &mut self,
        pages: std::collections::BTreeMap<usize, Vec<crate::format::table::SegmentEntry>>,
    ) -> Result<()> {
        let items: Vec<LogItem> = pages
            .iter()
            .map(|(page, entries)| {
                let content = encode_page(entries);
                metadata_item(RecordKind::TablePage, Lba(bytes_u64(*page)), 0, &content)
            })
            .collect();
        let locations = self.append_records(Stream::Metadata, &items).await?;
        let mut directories = BTreeSet::new();
        for (page, location) in pages.keys().zip(locations) {
            set_location(&self.engine, &mut self.checkpoint.pages, *page, location);
            directories.insert(page / NODE_ENTRIES);
        }
        let items: Vec<LogItem> = directories
            .iter()
            .map(|directory| {
                let mut entries = empty_node();
                let pages = self.checkpoint.pages.iter().skip(directory * NODE_ENTRIES);
                for (entry, page) in entries.iter_mut().zip(pages) {
                    *entry = *page;
                }
                let content = encode_node(&entries);
                metadata_item(RecordKind::TableDirectory, Lba(bytes_u64(*directory)), 0, &content)
            })
            .collect();
        let locations = self.append_records(Stream::Metadata, &items).await?;
        for (directory, location) in directories.into_iter().zip(locations) {
            set_location(&self.engine, &mut self.checkpoint.directories, directory, location);
        }
        Ok(())
    }

    /// Writes the root. It lists its own segment, with itself counted, so the segment is chosen
    /// first; if its devices fail just then, once more with another.
    async fn write_root(&mut self, cut: Lsn) -> Result<Location> {
        let space = self.engine.pool.geometry.space();
        self.engine.count_metadata(self.checkpoint.root, Location::HOLE);
        self.checkpoint.root = Location::HOLE;
        let number = self.checkpoint.number + 1;
        loop {
            let segment = self.next_segment(Stream::Metadata)?;
            self.engine.pool.table.lock().add_live(segment, 1);
            let root = CheckpointRoot {
                checkpoint: number,
                cut,
                catalog: self.checkpoint.catalog.clone(),
                directories: self.checkpoint.directories.clone(),
                pages: bytes_u64(self.checkpoint.pages.len()),
                metadata_segments: self.engine.pool.table.lock().metadata_entries(),
            };
            let item = metadata_item(RecordKind::Root, Lba(number), 0, &root.encode());
            let written = self.append_records(Stream::Metadata, &[item]).await;
            if let Ok(locations) = &written
                && let [location] = locations[..]
                && space.address(location).is_some_and(|address| address.segment == segment)
            {
                self.checkpoint.root = location;
                self.checkpoint.number = number;
                return Ok(location);
            }
            self.engine.pool.table.lock().remove_live(segment, 1);
            written?;
        }
    }
}

/// Copies the layer's next dirty nodes from number `from` on, and returns the last one's key.
fn copy_dirty_nodes(
    layer: &Arc<Layer>,
    level: u8,
    from: u64,
    copies: &mut Vec<DirtyNode>,
) -> Option<NodeKey> {
    let nodes = layer.state.lock().map.dirty_nodes(level, from, NODES_PER_LOCK);
    let last = nodes.last().map(|(key, ..)| *key);
    let copy = |(key, entries, stamp)| DirtyNode { layer: Arc::clone(layer), key, entries, stamp };
    copies.extend(nodes.into_iter().map(copy));
    last
}

/// A compressed record of checkpoint metadata.
fn metadata_item(kind: RecordKind, lba: Lba, owner: u64, content: &[u8]) -> LogItem {
    let (mut header, payload) = compressed(kind, lba, 1, content);
    header.branch = BranchId(owner);
    LogItem { header, payload }
}

fn set_location(engine: &Engine, list: &mut Vec<Location>, index: usize, location: Location) {
    if list.len() <= index {
        list.resize(index + 1, Location::HOLE);
    }
    let old = std::mem::replace(&mut list[index], location);
    engine.count_metadata(old, location);
}

impl Engine {
    /// Counts a metadata record as moved from `old` to `new`.
    fn count_metadata(&self, old: Location, new: Location) {
        let space = self.pool.geometry.space();
        let mut table = self.pool.table.lock();
        if let Some(address) = space.address(old) {
            table.remove_live(address.segment, 1);
        }
        if let Some(address) = space.address(new) {
            table.add_live(address.segment, 1);
        }
    }
}

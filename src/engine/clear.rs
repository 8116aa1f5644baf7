//! Clearing maps in bulk: large trims, and what deleted volumes leave.
//!
//! Every leaf has to be read, since segments must learn which of their blocks are dead. So many are
//! read at once, and a leaf that goes as a whole is taken out of the tree rather than emptied:
//! checkpoints then write its parent, not 512 empty leaves.
//!
//! What comes later does not wait for all that. A large trim is put in force ([`super::trim`]) when
//! its record is mapped; its leaves, like those of a deleted layer, are cleared in turns between
//! other work, or before they are changed. A crash in between goes on with what the last checkpoint
//! holds: the trims that were under way then, and the leaves that were left.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::TryStreamExt;
use futures_util::stream;

use super::Engine;
use super::TRIMS_MAX;
use super::layer::Layer;
use super::map::Load;
use super::map::Map;
use super::mapper::LiveChanges;
use super::mapper::Mapper;
use super::mapper::leaf_end;
use super::record::BufferedRecord;
use super::trim::Trim;
use crate::canary::Bug;
use crate::canary::planted;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::format::location::Location;
use crate::format::node::NODE_ENTRIES;
use crate::format::node::NodeKey;
use crate::format::record::RecordKind;
use crate::observe::event;
use crate::units::LayerId;
use crate::units::Lba;

/// Leaves cleared before anything else gets a turn: a millisecond of work if they are in memory.
const LEAVES_PER_TURN: usize = 64;
/// Map nodes read at once: enough for what a cloud disk can do, which is far from enough at one.
const LOADS_AT_ONCE: usize = 32;
/// Between two turns of clearing, which nobody waits for.
const PAUSE: Duration = Duration::from_millis(1);

/// Whole leaves of a trim from which on it is put in force and they are cleared later: 1 GiB, less
/// than what hosts cut a long trim into. Reading so many takes some 10 ms, for which all else may
/// wait.
const LARGE_TRIM_LEAVES: u64 = 512;

/// How far the maps of deleted layers are cleared, and the leaves of each trim. Not stored: the next
/// open starts over.
#[derive(Default)]
pub(super) struct Clearing {
    layers: BTreeMap<LayerId, Progress>,
    trims: BTreeMap<(LayerId, u64), Progress>,
    /// The last turn cleared something: there may be more.
    pub(super) under_way: bool,
}

impl Clearing {
    /// Nothing is cleared yet in an engine that was just opened.
    pub(super) fn of(engine: &Engine) -> Self {
        let to_clear = |layer: &Arc<Layer>| {
            layer.dropping.load(Ordering::Acquire) || !pending_trims(layer).is_empty()
        };
        Self { under_way: engine.layers().iter().any(to_clear), ..Self::default() }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    /// The next leaf to look at.
    from: u64,
    /// Some could not be read, and stay.
    damaged: bool,
    /// There is nothing more that could be cleared.
    over: bool,
}

impl Mapper {
    /// Clears what was deleted or trimmed, a bounded number of leaves at a time.
    pub(super) async fn clear_maps(&mut self) -> Result<()> {
        self.clearing.under_way = false;
        let layers = self.engine.layers();
        let (dropped, kept): (Vec<_>, Vec<_>) =
            layers.into_iter().partition(|layer| layer.dropping.load(Ordering::Acquire));
        self.clear_trims(&kept).await?;
        self.clear_dropped_layers(&dropped).await?;
        if self.clearing.under_way {
            let live_bytes = self.engine.pool.table.lock().live_bytes();
            self.exhausted &= live_bytes >= self.exhausted_at_bytes;
            if !self.has_work() {
                self.engine.env.sleep(PAUSE).await;
            }
        }
        Ok(())
    }

    /// Clears some leaves of the first trim that has any left.
    async fn clear_trims(&mut self, layers: &[Arc<Layer>]) -> Result<()> {
        let trims_of = |layer| pending_trims(layer).into_iter().map(move |trim| (layer, trim));
        let pending: Vec<(&Arc<Layer>, Trim)> = layers.iter().flat_map(trims_of).collect();
        let progress = &mut self.clearing.trims;
        progress.retain(|key, _| pending.iter().any(|(layer, trim)| (layer.id, trim.lsn) == *key));
        let is_over = |layer: &Layer, trim: &Trim| {
            progress.get(&(layer.id, trim.lsn)).is_some_and(|progress| progress.over)
        };
        let Some((layer, trim)) = pending.into_iter().find(|(layer, trim)| !is_over(layer, trim))
        else {
            return Ok(());
        };
        self.clear_some_trimmed_leaves(layer, trim).await?;
        self.clearing.under_way = true;
        self.changed = true;
        Ok(())
    }

    async fn clear_some_trimmed_leaves(&mut self, layer: &Arc<Layer>, trim: Trim) -> Result<()> {
        if planted(Bug::TrimDroppedEarly) {
            layer.state.lock().map.trims.cleared_below(trim.lsn, trim.leaves().end);
            return Ok(());
        }
        let key = (layer.id, trim.lsn);
        let mut progress = self.clearing.trims.get(&key).copied().unwrap_or_default();
        let (first, end) = (trim.leaves().start, trim.leaves().end);
        let leaves = match self.next_leaves(layer, progress.from.max(first), end).await {
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                leave_damaged(layer, &mut progress, "trimmed", &error);
                Vec::new()
            }
            leaves => leaves?,
        };
        // Whatever fails here fails again below.
        let _ = self.engine.load_nodes(keys_of(layer, &leaves)).await;
        for leaf in &leaves {
            let clear = || self.clear_if_trimmed(layer, &mut layer.state.lock().map, *leaf);
            match self.engine.ask_layer(layer, clear).await {
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    leave_damaged(layer, &mut progress, "trimmed", &error);
                }
                cleared => cleared?,
            }
        }
        progress.from = leaves.last().map_or(end, |leaf| leaf + 1);
        progress.over = leaves.is_empty();
        // As long as a leaf cannot be read it may be what the trim covers.
        if !progress.damaged {
            layer.state.lock().map.trims.cleared_below(trim.lsn, progress.from);
        }
        self.clearing.trims.insert(key, progress);
        Ok(())
    }

    /// Takes a leaf out of the tree if a trim covers it, as is done before it is changed.
    ///
    /// # Errors
    /// A node to load first; nothing was changed.
    pub(super) fn clear_if_trimmed(
        &self,
        layer: &Layer,
        map: &mut Map,
        leaf: u64,
    ) -> Result<(), Load> {
        if map.is_trimmed(leaf)? { self.take_leaf(layer, map, leaf) } else { Ok(()) }
    }

    /// Clears the maps of deleted layers.
    async fn clear_dropped_layers(&mut self, layers: &[Arc<Layer>]) -> Result<()> {
        self.clearing.layers.retain(|id, _| layers.iter().any(|layer| layer.id == *id));
        for layer in layers {
            layer.state.lock().map.trims.forget();
            self.clear_some_leaves(layer).await?;
        }
        Ok(())
    }

    async fn clear_some_leaves(&mut self, layer: &Arc<Layer>) -> Result<()> {
        // Nothing of it will be mapped, and nothing more comes in; records and layer hold each other.
        let buffered = std::mem::take(&mut layer.state.lock().index);
        drop(buffered);
        let mut progress = self.clearing.layers.get(&layer.id).copied().unwrap_or_default();
        if progress.over {
            return Ok(());
        }
        let leaves = match self.next_leaves(layer, progress.from, u64::MAX).await {
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                leave_damaged(layer, &mut progress, "deleted", &error);
                progress.over = true;
                Vec::new()
            }
            leaves => leaves?,
        };
        // Whatever fails here fails again below.
        let _ = self.engine.load_nodes(keys_of(layer, &leaves)).await;
        for leaf in &leaves {
            let cleared = self.engine.ask_layer(layer, || self.clear_leaf(layer, *leaf)).await;
            match cleared {
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    leave_damaged(layer, &mut progress, "deleted", &error);
                }
                cleared => cleared?,
            }
        }
        // A record that was under way may have come in behind: only a round that finds nothing
        // from the first leaf on is the last.
        let ended = leaves.is_empty();
        progress.over |= ended && progress.damaged;
        self.clearing.under_way |= !progress.over && (!ended || progress.from > 0);
        self.changed |= !ended;
        progress.from = leaves.last().map_or(0, |leaf| leaf + 1);
        self.clearing.layers.insert(layer.id, progress);
        Ok(())
    }

    fn clear_leaf(&self, layer: &Layer, leaf: u64) -> Result<(), Load> {
        self.take_leaf(layer, &mut layer.state.lock().map, leaf)
    }

    /// Takes a leaf out of the tree, and what it refers to out of the segments' counts.
    fn take_leaf(&self, layer: &Layer, map: &mut Map, leaf: u64) -> Result<(), Load> {
        let (entries, stored) = map.take_leaf(leaf)?;
        let (mut blocks, mut node) = (LiveChanges::default(), LiveChanges::default());
        entries.iter().for_each(|entry| blocks.note(*entry, Location::HOLE));
        node.note(stored, Location::HOLE);
        self.engine.apply_live(layer, &blocks, true);
        self.engine.apply_live(layer, &node, false);
        Ok(())
    }

    /// Numbers of the first leaves from `from` on and before `end` that exist, one turn of them.
    async fn next_leaves(&self, layer: &Layer, mut from: u64, end: u64) -> Result<Vec<u64>> {
        let mut leaves = Vec::new();
        while leaves.len() < LEAVES_PER_TURN {
            let next = self.engine.ask(layer, |map| map.next_leaf(from)).await?;
            let Some(leaf) = next.filter(|leaf| *leaf < end) else { break };
            leaves.push(leaf);
            from = leaf + 1;
        }
        Ok(leaves)
    }

    /// Clears the map where the buffer still holds this zero record.
    pub(super) async fn map_zero(&mut self, record: &Arc<BufferedRecord>) -> Result<()> {
        let Some(layer) = &record.layer else { return Ok(()) };
        if layer.dropping.load(Ordering::Acquire) {
            return Ok(()); // All of it goes.
        }
        let (start, end) = (record.header.lba.0, record.end_lba());
        let seen_to = self.begin_trim(layer, record).unwrap_or(start..start);
        self.zero_blocks(layer, record, start..seen_to.start).await?;
        self.zero_blocks(layer, record, seen_to.end..end).await
    }

    /// Puts a large trim in force for its whole leaves and takes these out of the buffer; returns
    /// the blocks they hold, or `None` if all is to be done at once.
    fn begin_trim(&self, layer: &Layer, record: &Arc<BufferedRecord>) -> Option<Range<u64>> {
        let trim = large_trim(record)?;
        let leaves = trim.leaves();
        let blocks = leaves.start * NODE_ENTRIES as u64..leaves.end * NODE_ENTRIES as u64;
        let under_way: usize = self.engine.layers().iter().map(|l| pending_trims(l).len()).sum();
        let mut state = layer.state.lock();
        // If it owns nothing there, either it is in force, or all of it is overwritten.
        if !state.index.owned_by(record, blocks.clone()).is_empty() {
            if under_way >= TRIMS_MAX && !state.map.trims.can_join(&trim) {
                return None;
            }
            state.map.trims.add(trim);
            state.index.remove(record, blocks.clone());
        }
        Some(blocks)
    }

    /// Maps the trims in the buffer before what they wait behind, which finds no room: they may make
    /// some. Large ones too are mapped leaf by leaf. What the map holds of entries after a checkpoint's
    /// cut is what replaying them gives.
    pub(super) async fn zero_ahead(&mut self) -> Result<()> {
        let is_trim = |record: &&Arc<BufferedRecord>| {
            record.header.kind == RecordKind::Zero && !record.header.keep_allocated
        };
        let trims: Vec<Arc<BufferedRecord>> =
            self.engine.buffer.lock().records.iter().filter(is_trim).cloned().collect();
        for record in &trims {
            let Some(layer) = &record.layer else { continue };
            let over = layer.dropping.load(Ordering::Acquire)
                || !layer.state.lock().index.owns_any(record);
            if over {
                continue;
            }
            if self.dirty_nodes() > self.engine.dirty_nodes_max / 2 {
                self.checkpoint_mapped().await?;
            }
            self.changed = true;
            self.zero_blocks(layer, record, record.header.lba.0..record.end_lba()).await?;
        }
        Ok(())
    }

    /// Clears the map in a range where the buffer still holds this zero record.
    ///
    /// A large one may dirty more nodes than may be dirty at once, so checkpoints come in between.
    async fn zero_blocks(
        &mut self,
        layer: &Arc<Layer>,
        record: &Arc<BufferedRecord>,
        range: Range<u64>,
    ) -> Result<()> {
        let value = if record.header.keep_allocated { Location::ZERO } else { Location::HOLE };
        let large = range.end - range.start > NODE_ENTRIES as u64;
        let (mut at, mut steps) = (range.start, 0_usize);
        while at < range.end {
            if large && steps.is_multiple_of(LEAVES_PER_TURN) {
                if self.dirty_nodes() > self.engine.dirty_nodes_max / 2 {
                    self.checkpoint_mapped().await?;
                }
                // Whatever fails here fails again below.
                let _ = self.load_leaves_within(layer, at, range.end).await;
                self.engine.env.yield_thread();
            }
            match self.zero_within_leaf(layer, record, at..range.end, value) {
                Ok(next) => at = next,
                Err(load) => self.load_or_replace(layer, load).await?,
            }
            steps += 1;
        }
        Ok(())
    }

    /// Brings the next leaves that exist between two blocks into memory.
    async fn load_leaves_within(&self, layer: &Arc<Layer>, from: u64, end: u64) -> Result<()> {
        let (first, end) = (from / NODE_ENTRIES as u64, end.div_ceil(NODE_ENTRIES as u64));
        let leaves = self.next_leaves(layer, first, end).await?;
        self.engine.load_nodes(keys_of(layer, &leaves)).await
    }

    fn zero_within_leaf(
        &self,
        layer: &Layer,
        record: &Arc<BufferedRecord>,
        range: Range<u64>,
        value: Location,
    ) -> Result<u64, Load> {
        let at = range.start;
        let mut state = layer.state.lock();
        if value == Location::HOLE {
            // Leaves that do not exist are holes already.
            let next = state.map.next_leaf(at / NODE_ENTRIES as u64)?;
            let start = next.map_or(u64::MAX, |leaf| leaf.saturating_mul(NODE_ENTRIES as u64));
            if start > at {
                let end = range.end.min(start);
                state.index.remove(record, at..end);
                return Ok(end);
            }
        }
        if planted(Bug::ZeroCutShort) && at > record.header.lba.0 {
            state.index.remove(record, range.clone());
            return Ok(range.end);
        }
        let end = range.end.min(leaf_end(at));
        let owned = state.index.owned_by(record, at..end);
        let leaf = NodeKey::covering(Lba(at), 0);
        let whole = leaf.first_lba()..leaf_end(at);
        if value == Location::HOLE && owned == [whole] {
            self.take_leaf(layer, &mut state.map, leaf.index)?;
            state.index.remove(record, at..end);
            return Ok(end);
        }
        if !owned.is_empty() {
            self.clear_if_trimmed(layer, &mut state.map, leaf.index)?;
        }
        let mut changes = LiveChanges::default();
        for lba in owned.into_iter().flatten() {
            changes.note(state.map.set(Lba(lba), value)?, value);
        }
        self.engine.apply_live(layer, &changes, true);
        state.index.remove(record, at..end);
        Ok(end)
    }
}

fn keys_of(layer: &Arc<Layer>, leaves: &[u64]) -> impl Iterator<Item = (Arc<Layer>, NodeKey)> {
    let key = |leaf: &u64| (Arc::clone(layer), NodeKey { level: 0, index: *leaf });
    leaves.iter().map(key)
}

fn pending_trims(layer: &Arc<Layer>) -> Vec<Trim> {
    layer.state.lock().map.trims.pending()
}

/// A trim that has too many leaves to be mapped at once. It ends its entry, as what follows it
/// there would be newer.
pub(super) fn large_trim(record: &BufferedRecord) -> Option<Trim> {
    let header = &record.header;
    let is_trim = header.kind == RecordKind::Zero && !header.keep_allocated && header.last_of_entry;
    let (first_block, end_block) = (header.lba.0, record.end_lba());
    let trim = Trim { first_block, end_block, lsn: header.lsn.0 };
    let leaves = trim.leaves();
    let large = leaves.end.saturating_sub(leaves.start) >= LARGE_TRIM_LEAVES;
    (is_trim && large).then_some(trim)
}

fn leave_damaged(layer: &Layer, progress: &mut Progress, what: &str, error: &Error) {
    if !std::mem::replace(&mut progress.damaged, true) {
        let message = format_args!(
            "a part of the map of layer {}, which was {what}, cannot be read, so what it refers to \
             is not freed: {}",
            layer.id.0,
            error.chain()
        );
        event::raise(event::DAMAGE_LEFT, "pod", message);
    }
}

impl Engine {
    /// Asks a layer's map, and reads nodes until it can answer.
    ///
    /// # Errors
    /// As for reads.
    pub(super) async fn ask<T>(
        &self,
        layer: &Layer,
        ask: impl Fn(&mut Map) -> Result<T, Load>,
    ) -> Result<T> {
        self.ask_layer(layer, || ask(&mut layer.state.lock().map)).await
    }

    /// As [`Engine::ask`], for who looks at more than the map.
    pub(super) async fn ask_layer<T>(
        &self,
        layer: &Layer,
        ask: impl Fn() -> Result<T, Load>,
    ) -> Result<T> {
        loop {
            match ask() {
                Ok(answer) => return Ok(answer),
                Err(load) => self.load_node(layer, load).await?,
            }
        }
    }

    /// Brings nodes into memory, if they exist, many at once.
    ///
    /// # Errors
    /// As for reads; some may be there then.
    pub(super) async fn load_nodes(
        &self,
        nodes: impl Iterator<Item = (Arc<Layer>, NodeKey)>,
    ) -> Result<()> {
        let loads = nodes.map(|(layer, key)| async move {
            self.ask(&layer, |map| map.missing(key).map_or(Ok(()), Err)).await
        });
        stream::iter(loads).buffer_unordered(LOADS_AT_ONCE).try_collect().await
    }
}

//! Clearing maps in bulk: large trims, and what deleted volumes leave.
//!
//! Every leaf has to be read, since segments must learn which of their blocks are dead. So many are
//! read at once, and a leaf that goes as a whole is taken out of the tree rather than emptied:
//! checkpoints then write its parent, not 512 empty leaves.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::TryStreamExt;
use futures_util::stream;

use super::Engine;
use super::layer::Layer;
use super::map::Load;
use super::map::Map;
use super::mapper::LiveChanges;
use super::mapper::Mapper;
use super::mapper::leaf_end;
use super::record::BufferedRecord;
use crate::canary::Bug;
use crate::canary::planted;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::format::location::Location;
use crate::format::node::NODE_ENTRIES;
use crate::format::node::NodeKey;
use crate::observe::event;
use crate::units::LayerId;
use crate::units::Lba;

/// Leaves cleared before anything else gets a turn: a millisecond of work if they are in memory.
const LEAVES_PER_TURN: usize = 64;
/// Map nodes read at once: enough for what a cloud disk can do, which is far from enough at one.
const LOADS_AT_ONCE: usize = 32;
/// Between two turns of a deletion, which nobody waits for.
const PAUSE: Duration = Duration::from_millis(1);

/// How far the maps of deleted layers are cleared. Not stored: the next open starts over.
#[derive(Default)]
pub(super) struct Clearing {
    layers: BTreeMap<LayerId, Progress>,
    /// The last turn cleared something: there may be more.
    pub(super) under_way: bool,
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
    /// Clears the maps of deleted layers, a bounded number of leaves at a time.
    pub(super) async fn clear_dropped_layers(&mut self) -> Result<()> {
        self.clearing.under_way = false;
        let mut layers = self.engine.layers();
        layers.retain(|layer| layer.dropping.load(Ordering::Acquire));
        self.clearing.layers.retain(|id, _| layers.iter().any(|layer| layer.id == *id));
        for layer in &layers {
            self.clear_some_leaves(layer).await?;
        }
        if self.clearing.under_way && !self.has_work() {
            self.engine.env.sleep(PAUSE).await;
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
                leave_damaged(layer, &mut progress, &error);
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
                    leave_damaged(layer, &mut progress, &error);
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
    ///
    /// A large one may dirty more nodes than may be dirty at once, so checkpoints come in between.
    pub(super) async fn map_zero(&mut self, record: &Arc<BufferedRecord>) -> Result<()> {
        let Some(layer) = &record.layer else { return Ok(()) };
        if layer.dropping.load(Ordering::Acquire) {
            return Ok(()); // All of it goes.
        }
        let value = if record.header.keep_allocated { Location::ZERO } else { Location::HOLE };
        let large = record.header.blocks > NODE_ENTRIES as u64;
        let (mut at, mut steps) = (record.header.lba.0, 0_usize);
        while at < record.end_lba() {
            if large && steps.is_multiple_of(LEAVES_PER_TURN) {
                if self.dirty_nodes() > self.engine.dirty_nodes_max / 2 {
                    self.checkpoint_mapped().await?;
                }
                // Whatever fails here fails again below.
                let _ = self.load_leaves_within(layer, at, record.end_lba()).await;
                self.engine.env.yield_thread();
            }
            match self.zero_within_leaf(layer, record, at, value) {
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
        at: u64,
        value: Location,
    ) -> Result<u64, Load> {
        let mut state = layer.state.lock();
        if value == Location::HOLE {
            // Leaves that do not exist are holes already.
            let next = state.map.next_leaf(at / NODE_ENTRIES as u64)?;
            let start = next.map_or(u64::MAX, |leaf| leaf.saturating_mul(NODE_ENTRIES as u64));
            if start > at {
                let end = record.end_lba().min(start);
                state.index.remove(record, at..end);
                return Ok(end);
            }
        }
        if planted(Bug::ZeroCutShort) && at > record.header.lba.0 {
            state.index.remove(record, at..record.end_lba());
            return Ok(record.end_lba());
        }
        let end = record.end_lba().min(leaf_end(at));
        let owned = state.index.owned_by(record, at..end);
        let leaf = NodeKey::covering(Lba(at), 0);
        let whole = leaf.first_lba()..leaf_end(at);
        if value == Location::HOLE && owned == [whole] {
            self.take_leaf(layer, &mut state.map, leaf.index)?;
            state.index.remove(record, at..end);
            return Ok(end);
        }
        if !owned.is_empty() {
            state.map.get(Lba(at))?;
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

fn leave_damaged(layer: &Layer, progress: &mut Progress, error: &Error) {
    if !std::mem::replace(&mut progress.damaged, true) {
        let message = format_args!(
            "a part of the map of layer {}, which was deleted, cannot be read, so what it refers to \
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
    async fn ask_layer<T>(&self, layer: &Layer, ask: impl Fn() -> Result<T, Load>) -> Result<T> {
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

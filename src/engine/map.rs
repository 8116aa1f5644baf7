//! The map of one layer: a radix tree of 512-entry nodes, of which some are in memory.
//!
//! Pure bookkeeping, no I/O: where a node is missing, the answer says which one to load from
//! where. Only the mapper changes it.
//!
//! # Invariants
//! * A dirty node is in memory. Leaves are changed by the mapper at any time, higher nodes when a
//!   child moved, which only checkpoints do, or was taken out.
//! * `fresh` holds the nodes that no parent points at yet; they are dirty. While a checkpoint runs,
//!   a subtree may hang below a fresh node of any level.
//! * A leaf that a trim covers ([`super::trim`]) reads as holes, and is taken out before it is
//!   changed.

use std::cell::Cell;
use std::collections::BTreeSet;

use rustc_hash::FxHashMap;

use super::trim::Trims;
use crate::canary::Bug;
use crate::canary::planted;
use crate::format::location::Location;
use crate::format::node::MAP_LEVELS;
use crate::format::node::NODE_ENTRIES;
use crate::format::node::NodeEntries;
use crate::format::node::NodeKey;
use crate::format::node::empty_node;
use crate::units::Lba;
use crate::units::Lsn;

/// A node in memory.
struct Node {
    entries: NodeEntries,
    /// Of leaves: the newest trim when it was last changed.
    stamp: Lsn,
    /// Looked at since the last eviction pass. Set on every step of a walk: a walk that waits for
    /// a lower node must not lose the higher ones meanwhile, or it would never end.
    used: Cell<bool>,
}

/// A node that must be read before the question can be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Which.
    pub key: NodeKey,
    /// From where.
    pub location: Location,
}

/// The tree.
pub struct Map {
    root: Location,
    levels: [FxHashMap<u64, Node>; MAP_LEVELS as usize],
    dirty: BTreeSet<NodeKey>,
    fresh: BTreeSet<NodeKey>,
    /// Large trims that are under way.
    pub trims: Trims,
}

/// The highest node.
const ROOT: NodeKey = NodeKey { level: MAP_LEVELS - 1, index: 0 };

impl Map {
    /// A map whose highest node is stored at `root`; [`Location::HOLE`] for an empty one.
    #[must_use]
    pub fn new(root: Location) -> Self {
        Self {
            root,
            levels: std::array::from_fn(|_| FxHashMap::default()),
            dirty: BTreeSet::new(),
            fresh: BTreeSet::new(),
            trims: Trims::default(),
        }
    }

    /// Where the highest node is stored.
    #[must_use]
    pub fn root(&self) -> Location {
        self.root
    }

    /// Whether nothing is mapped, in memory or stored.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.root == Location::HOLE && self.dirty.is_empty()
    }

    /// The location of block `lba`.
    ///
    /// # Errors
    /// A node to load first.
    #[inline]
    pub fn get(&self, lba: Lba) -> Result<Location, Load> {
        let key = NodeKey::covering(lba, 0);
        if let Some(leaf) = self.levels[0].get(&key.index) {
            leaf.used.set(true);
            if self.trims.cover(key.index, leaf.stamp) {
                return Ok(Location::HOLE);
            }
            return Ok(leaf.entries[slot_of(lba)]);
        }
        match self.find(key) {
            Some(load) => Err(load),
            None => Ok(Location::HOLE),
        }
    }

    /// For a node that is not in memory: what to load next on the way to it; `None` if it does
    /// not exist.
    fn find(&self, key: NodeKey) -> Option<Load> {
        let mut child = key;
        while child.level < ROOT.level {
            let (parent, slot) = child.parent();
            if let Some(node) = self.levels[usize::from(parent.level)].get(&parent.index) {
                node.used.set(true);
                let location = node.entries[slot];
                return location.is_stored().then_some(Load { key: child, location });
            }
            child = parent;
        }
        self.root.is_stored().then_some(Load { key: ROOT, location: self.root })
    }

    /// What to load next to have a node in memory; `None` if it is there, or does not exist.
    #[must_use]
    pub fn missing(&self, key: NodeKey) -> Option<Load> {
        match self.levels[usize::from(key.level)].get(&key.index) {
            Some(node) => {
                node.used.set(true);
                None
            }
            None => self.find(key),
        }
    }

    /// Whether the node is still to be read, and from there.
    #[must_use]
    pub fn wants(&self, load: Load) -> bool {
        let level = usize::from(load.key.level);
        !self.levels[level].contains_key(&load.key.index) && self.find(load.key) == Some(load)
    }

    /// Takes in a node that [`Load`] asked for, with the stamp stored with it, unless the answer is
    /// outdated by now.
    pub fn loaded(&mut self, load: Load, entries: NodeEntries, stamp: Lsn) {
        if self.wants(load) {
            let level = usize::from(load.key.level);
            let node = Node { entries, stamp, used: Cell::new(true) };
            self.levels[level].insert(load.key.index, node);
        }
    }

    /// Whether a trim covers all that the leaf holds.
    ///
    /// # Errors
    /// A node to load first.
    pub fn is_trimmed(&self, leaf: u64) -> Result<bool, Load> {
        self.missing(NodeKey { level: 0, index: leaf }).map_or(Ok(()), Err)?;
        let node = self.levels[0].get(&leaf);
        Ok(node.is_some_and(|node| self.trims.cover(leaf, node.stamp)))
    }

    /// Changes the entry of `lba`, whose leaf no trim covers, and returns the old one.
    ///
    /// # Errors
    /// A node to load first; nothing was changed.
    pub fn set(&mut self, lba: Lba, location: Location) -> Result<Location, Load> {
        let key = NodeKey::covering(lba, 0);
        self.ensure(key)?;
        let leaf = self.levels[0].get_mut(&key.index).expect("ensured above");
        let trimmed = self.trims.cover(key.index, leaf.stamp);
        debug_assert!(!trimmed || planted(Bug::NewerLeafTrimmed), "taken out before it is changed");
        leaf.used.set(true);
        let old = std::mem::replace(&mut leaf.entries[slot_of(lba)], location);
        if old != location {
            leaf.stamp = self.trims.stamp();
            self.dirty.insert(key);
            if location != Location::HOLE {
                self.trims.touch(lba.0..lba.0 + 1);
            }
        }
        Ok(old)
    }

    /// Brings a node into memory, empty if it does not exist.
    ///
    /// # Errors
    /// A node to load first.
    pub fn ensure(&mut self, key: NodeKey) -> Result<(), Load> {
        if self.levels[usize::from(key.level)].contains_key(&key.index) {
            return Ok(());
        }
        if let Some(load) = self.find(key) {
            return Err(load);
        }
        let stamp = self.trims.stamp();
        let node = Node { entries: empty_node(), stamp, used: Cell::new(true) };
        self.levels[usize::from(key.level)].insert(key.index, node);
        // Dirty at once, so that the next checkpoint writes or forgets it.
        self.fresh.insert(key);
        self.dirty.insert(key);
        Ok(())
    }

    /// Takes a leaf out of the tree, which then has holes there; returns what it held and where it
    /// was stored.
    ///
    /// # Errors
    /// A node to load first; nothing was changed.
    pub fn take_leaf(&mut self, leaf: u64) -> Result<(NodeEntries, Location), Load> {
        let key = NodeKey { level: 0, index: leaf };
        self.missing(key).map_or(Ok(()), Err)?;
        let stored = self.stored_at(key)?;
        let (parent, slot) = key.parent();
        if let Some(node) = self.levels[1].get_mut(&parent.index).filter(|_| stored.is_stored()) {
            node.entries[slot] = Location::HOLE;
            if !planted(Bug::LeafLeftInParent) {
                self.dirty.insert(parent);
            }
        }
        self.dirty.remove(&key);
        self.fresh.remove(&key);
        let node = self.levels[0].remove(&leaf);
        Ok((node.map_or_else(empty_node, |node| node.entries), stored))
    }

    /// Marks a node for the next checkpoint to write, as reclaim does to move it.
    ///
    /// # Errors
    /// A node to load first.
    pub fn mark_dirty(&mut self, key: NodeKey) -> Result<(), Load> {
        self.ensure(key)?;
        self.dirty.insert(key);
        Ok(())
    }

    /// Where `key` is stored, as far as its parent knows.
    ///
    /// # Errors
    /// A node to load first.
    pub fn stored_at(&self, key: NodeKey) -> Result<Location, Load> {
        if key == ROOT {
            return Ok(self.root);
        }
        let (parent, slot) = key.parent();
        match self.levels[usize::from(parent.level)].get(&parent.index) {
            Some(node) => Ok(node.entries[slot]),
            None => self.find(parent).map_or(Ok(Location::HOLE), Err),
        }
    }

    /// Says that `key` is now stored at `location` as it is in memory, so it is clean; returns
    /// where it was stored before.
    ///
    /// # Errors
    /// A node to load first; nothing was changed.
    pub fn set_stored_at(&mut self, key: NodeKey, location: Location) -> Result<Location, Load> {
        if key == ROOT {
            self.dirty.remove(&key);
            self.fresh.remove(&key);
            return Ok(std::mem::replace(&mut self.root, location));
        }
        let (parent, slot) = key.parent();
        self.ensure(parent)?;
        self.dirty.remove(&key);
        self.fresh.remove(&key);
        let node = self.levels[usize::from(parent.level)].get_mut(&parent.index);
        let entry = &mut node.expect("ensured above").entries[slot];
        let old = std::mem::replace(entry, location);
        if old != location {
            self.dirty.insert(parent);
        }
        Ok(old)
    }

    /// The first dirty nodes of `level` from number `from` on, at most `count`, with their entries
    /// and stamps. They stay dirty, and so in memory, until [`Map::set_stored_at`] says where they
    /// went.
    pub fn dirty_nodes(
        &self,
        level: u8,
        from: u64,
        count: usize,
    ) -> Vec<(NodeKey, NodeEntries, Lsn)> {
        let nodes = &self.levels[usize::from(level)];
        self.dirty
            .range(NodeKey { level, index: from }..NodeKey { level: level + 1, index: 0 })
            .take(count)
            .map(|key| (key, &nodes[&key.index]))
            .map(|(key, node)| (*key, node.entries.clone(), node.stamp))
            .collect()
    }

    /// Number of dirty nodes.
    #[must_use]
    pub fn dirty_count(&self) -> usize {
        self.dirty.len()
    }

    /// Number of nodes in memory.
    #[must_use]
    pub fn node_count(&self) -> usize {
        self.levels.iter().map(FxHashMap::len).sum()
    }

    /// Drops about half of the clean nodes that were not looked at since the last call; returns
    /// how many.
    pub fn evict(&mut self) -> usize {
        let mut dropped = 0;
        for (level, nodes) in self.levels.iter_mut().enumerate() {
            let level = u8::try_from(level).expect("four levels");
            let (dirty, fresh) = (&self.dirty, &self.fresh);
            nodes.retain(|index, node| {
                let key = NodeKey { level, index: *index };
                let dirty = || dirty.contains(&key) && !planted(Bug::DirtyNodeEvicted);
                // Whoever holds the layer's lock waits for this: most nodes need no look-up.
                let keep = node.used.take() || dirty() || fresh.contains(&key);
                dropped += usize::from(!keep);
                keep
            });
        }
        dropped
    }

    /// Drops a node that is empty and no longer stored.
    pub fn forget(&mut self, key: NodeKey) {
        if !self.dirty.contains(&key) {
            self.levels[usize::from(key.level)].remove(&key.index);
        }
    }

    /// The first leaf at or after leaf number `from` that exists, in memory or stored.
    ///
    /// # Errors
    /// A node to load first.
    pub fn next_leaf(&self, from: u64) -> Result<Option<u64>, Load> {
        let first_leaf = NodeKey { level: 0, index: from };
        let first_parent = NodeKey { level: 1, index: 0 };
        let fresh_leaf = self.fresh.range(first_leaf..first_parent).next().map(|key| key.index);
        let mut next = fresh_leaf.into_iter().chain(self.next_stored(ROOT, from)?).min();
        for parent in self.fresh.range(first_parent..) {
            if planted(Bug::UnlinkedLeafMissed) {
                break;
            }
            next = next.into_iter().chain(self.next_stored(*parent, from)?).min();
        }
        Ok(next)
    }

    /// The first leaf at or after `from` that a stored pointer below `key` leads to.
    fn next_stored(&self, key: NodeKey, from: u64) -> Result<Option<u64>, Load> {
        let Some(node) = self.levels[usize::from(key.level)].get(&key.index) else {
            return self.find(key).map_or(Ok(None), Err);
        };
        node.used.set(true);
        let leaves_per_entry = 1_u64 << (9 * u32::from(key.level - 1));
        let first_leaf = key.index * NODE_ENTRIES as u64 * leaves_per_entry;
        let start = from.saturating_sub(first_leaf) / leaves_per_entry;
        for slot in start..NODE_ENTRIES as u64 {
            if !node.entries[crate::units::bytes_usize(slot)].is_stored() {
                continue;
            }
            let child =
                NodeKey { level: key.level - 1, index: key.index * NODE_ENTRIES as u64 + slot };
            if child.level == 0 {
                return Ok(Some(child.index));
            }
            if let Some(leaf) = self.next_stored(child, from)? {
                return Ok(Some(leaf));
            }
        }
        Ok(None)
    }
}

fn slot_of(lba: Lba) -> usize {
    crate::units::bytes_usize(lba.0 & (NODE_ENTRIES as u64 - 1))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::engine::trim::Trim;

    /// Nodes "on disk", by made-up location.
    #[derive(Default)]
    struct Store {
        nodes: BTreeMap<u64, (NodeEntries, Lsn)>,
        next: u64,
    }

    impl Store {
        fn with<T>(&self, map: &mut Map, mut ask: impl FnMut(&mut Map) -> Result<T, Load>) -> T {
            loop {
                match ask(map) {
                    Ok(value) => return value,
                    Err(load) => {
                        let (entries, stamp) = self.nodes[&load.location.0].clone();
                        map.loaded(load, entries, stamp);
                    }
                }
            }
        }

        /// As the mapper does before it changes a leaf.
        fn clear_if_trimmed(&self, map: &mut Map, leaf: u64) {
            self.with(map, |map| match map.is_trimmed(leaf)? {
                true => map.take_leaf(leaf).map(drop),
                false => Ok(()),
            });
        }

        /// As the mapper does in the background.
        fn clear_trim(&self, map: &mut Map, trim: Trim) {
            for leaf in self.leaves(map) {
                self.clear_if_trimmed(map, leaf);
            }
            map.trims.cleared_below(trim.lsn, trim.leaves().end);
        }

        fn leaves(&self, map: &mut Map) -> Vec<u64> {
            let mut found = Vec::new();
            let mut from = 0;
            while let Some(leaf) = self.with(map, |map| map.next_leaf(from)) {
                found.push(leaf);
                from = leaf + 1;
            }
            found
        }

        /// Writes what is dirty; `leaves` must be found before and after each node.
        fn checkpoint(&mut self, map: &mut Map, leaves: &[u64]) {
            for level in 0..MAP_LEVELS {
                let mut from = 0;
                while let Some((key, entries, stamp)) = map.dirty_nodes(level, from, 1).pop() {
                    from = key.index + 1;
                    map.evict();
                    map.evict();
                    let empty = entries.iter().all(|entry| *entry == Location::HOLE);
                    self.next += 128;
                    let location = if empty { Location::HOLE } else { Location(self.next) };
                    if !empty {
                        self.nodes.insert(self.next, (entries, stamp));
                    }
                    self.with(map, |map| map.set_stored_at(key, location));
                    if empty {
                        map.forget(key);
                    }
                    let found = self.leaves(map);
                    assert!(
                        leaves.iter().all(|leaf| found.contains(leaf)),
                        "{found:?}, {leaves:?}"
                    );
                }
            }
        }
    }

    /// The leaves that hold any of `model`'s blocks.
    fn leaves_of(model: &BTreeMap<Lba, Location>) -> Vec<u64> {
        let mut leaves: Vec<u64> = model
            .iter()
            .filter(|(_, location)| **location != Location::HOLE)
            .map(|(lba, _)| lba.0 / NODE_ENTRIES as u64)
            .collect();
        leaves.dedup();
        leaves
    }

    proptest! {
        #[test]
        fn map_equals_a_plain_table_through_checkpoints_and_eviction(
            steps in prop::collection::vec((0_u64..5_000, 0_u64..3, 0_u8..12), 1..60)
        ) {
            let spread = |n: u64| Lba(n * 104_729 % (1 << 30));
            let mut store = Store::default();
            let mut map = Map::new(Location::HOLE);
            let mut model = BTreeMap::new();
            for (step, (lba, value, action)) in (1..).zip(steps) {
                let lba = spread(lba);
                let leaf = lba.0 / NODE_ENTRIES as u64;
                store.clear_if_trimmed(&mut map, leaf);
                let old = store.with(&mut map, |map| map.set(lba, Location(value)));
                prop_assert_eq!(old, model.insert(lba, Location(value)).unwrap_or(Location::HOLE));
                let leaves = leaves_of(&model);
                if action == 0 {
                    store.checkpoint(&mut map, &leaves);
                    prop_assert_eq!(map.dirty_count(), 0);
                }
                if action < 3 {
                    map.evict();
                    map.evict();
                }
                if action == 5 {
                    let first = Lba(leaf * NODE_ENTRIES as u64);
                    let (entries, _) = store.with(&mut map, |map| map.take_leaf(leaf));
                    for (at, entry) in entries.iter().enumerate() {
                        let held = model.remove(&Lba(first.0 + at as u64));
                        prop_assert_eq!(*entry, held.unwrap_or(Location::HOLE));
                    }
                }
                if action == 4 {
                    store.checkpoint(&mut map, &leaves);
                    let trims = Trims::restored(&map.trims.pending());
                    map = Map::new(map.root());
                    map.trims = trims;
                }
                if action == 6 {
                    let (first_leaf, end_leaf) = (leaf.saturating_sub(200_000), leaf + 200_000);
                    let first_block = first_leaf * NODE_ENTRIES as u64;
                    let end_block = end_leaf * NODE_ENTRIES as u64;
                    model.retain(|lba, _| !(first_block..end_block).contains(&lba.0));
                    map.trims.add(Trim { first_block, end_block, lsn: step });
                }
                if let (7, Some(trim)) = (action, map.trims.pending().first().copied()) {
                    store.clear_trim(&mut map, trim);
                }
            }
            for (lba, location) in &model {
                prop_assert_eq!(store.with(&mut map, |map| map.get(*lba)), *location);
            }
            while let Some(trim) = map.trims.pending().first().copied() {
                store.clear_trim(&mut map, trim);
            }
            let leaves = leaves_of(&model);
            store.checkpoint(&mut map, &leaves);
            prop_assert_eq!(store.leaves(&mut map), leaves);
        }
    }
}

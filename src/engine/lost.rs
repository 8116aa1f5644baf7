//! Map nodes that are beyond repair.
//!
//! What was acknowledged needs a place in the map: as long as it has none, it cannot leave the
//! journal, and once that is full no volume takes writes. So if a node that is to be changed cannot
//! be read, and no device is away that could bring it back, another takes its place. Each of its
//! entries leads to where the old one is stored. No block is there, so reads of what is lost go on to
//! fail, and only those; and nothing that the old node may refer to is ever freed.

use std::sync::Arc;

use super::Engine;
use super::layer::Layer;
use super::map::Load;
use super::mapper::LiveChanges;
use super::mapper::Mapper;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::format::location::Location;
use crate::format::node::NODE_ENTRIES;
use crate::format::node::NodeKey;
use crate::observe::event;

/// How often a node is asked for before it is given up. The mapper pauses after each failure, so
/// that it takes some 10 s: reads may have failed for other reasons than damage.
const TRIES_MIN: u32 = 50;

/// The node that failed last, and how often it did.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Failing {
    location: Location,
    tries: u32,
}

impl Mapper {
    /// Brings nodes into memory that are to be changed, or whose children are.
    ///
    /// # Errors
    /// As for reads. A node that is beyond repair fails for a while, and is replaced then.
    pub(super) async fn load_to_change(&mut self, nodes: &[(Arc<Layer>, NodeKey)]) -> Result<()> {
        match self.engine.load_nodes(nodes.iter().cloned()).await {
            Err(error) if error.kind() == ErrorKind::Corrupt => {}
            loaded => return loaded,
        }
        for (layer, key) in nodes {
            while let Some(load) = layer.missing(*key) {
                self.load_or_replace(layer, load).await?;
            }
        }
        Ok(())
    }

    /// As [`Engine::load_node`], for a node that is to be changed.
    ///
    /// # Errors
    /// As for [`Mapper::load_to_change`].
    pub(super) async fn load_or_replace(&mut self, layer: &Layer, load: Load) -> Result<()> {
        match self.engine.load_node(layer, load).await {
            Err(error) if error.kind() == ErrorKind::Corrupt && self.is_lost(load.location) => {
                self.replace(layer, load, &error);
                Ok(())
            }
            loaded => loaded,
        }
    }

    fn is_lost(&mut self, location: Location) -> bool {
        let Failing { location: last, tries } = self.failing;
        let tries = if last == location { tries.saturating_add(1) } else { 1 };
        self.failing = Failing { location, tries };
        tries >= TRIES_MIN && self.engine.has_all_strips(location)
    }

    fn replace(&self, layer: &Layer, load: Load, error: &Error) {
        let Load { key, location } = load;
        {
            let mut state = layer.state.lock();
            if !state.map.wants(load) {
                return;
            }
            // What it held may be newer than any trim, so none covers it.
            let trims = &mut state.map.trims;
            trims.touch(key.first_lba()..key.first_lba() + key.blocks());
            let stamp = trims.stamp();
            state.map.loaded(load, Box::new([location; NODE_ENTRIES]), stamp);
            // It is in memory, so nothing is to be loaded.
            let _ = state.map.mark_dirty(key);
            let mut changes = LiveChanges::default();
            (0..NODE_ENTRIES).for_each(|_| changes.note(Location::HOLE, location));
            self.engine.apply_live(layer, &changes, key.level == 0);
        }
        let (first, end) = (key.first_lba(), key.first_lba() + key.blocks());
        let message = format_args!(
            "where blocks {first} to {end} of layer {} are is beyond repair, so they cannot be read \
             until they are written or trimmed: {}",
            layer.id.0,
            error.chain()
        );
        event::raise(event::DAMAGE_LEFT, "pod", message);
    }
}

impl Layer {
    fn missing(&self, key: NodeKey) -> Option<Load> {
        self.state.lock().map.missing(key)
    }
}

impl Engine {
    /// Whether every strip there is of a record's segment is on a device in service.
    fn has_all_strips(&self, location: Location) -> bool {
        let in_service = self.pool.in_service();
        let Some(address) = self.pool.geometry.space().address(location) else { return false };
        let table = self.pool.table.lock();
        table.get(address.segment).is_some_and(|segment| {
            let strips = segment.entry.places.iter().flatten().count();
            segment.strips_in_service(&in_service) == strips
        })
    }
}

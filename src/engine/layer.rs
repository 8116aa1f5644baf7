//! A layer: the write buffer's index and the map behind it, under one short lock.
//!
//! An entry becomes visible by inserting all its records under the lock; a read of at most the
//! atomic size resolves all its blocks under the lock. So neither ever sees half of the other.
//! The buffer is looked at before the map, and the mapper changes the map before the buffer, so
//! nothing is ever missing in between.
//!
//! Lock order: journal completion → layer → segment table.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;

use parking_lot::Mutex;

use super::index::WriteIndex;
use super::map::Load;
use super::map::Map;
use super::record::BufferedRecord;
use crate::format::location::Location;
use crate::units::BranchId;
use crate::units::LayerId;
use crate::units::Lba;

/// A map and its write-buffer index.
pub struct Layer {
    /// Its number.
    pub id: LayerId,
    /// The branch whose records it owns.
    pub branch: BranchId,
    /// Guards index and map; never held across an await.
    pub state: Mutex<LayerState>,
    /// Blocks whose map entry is stored.
    pub mapped_blocks: AtomicU64,
    /// Deleted: takes no records any more, and the mapper is clearing its map.
    pub dropping: AtomicBool,
}

/// What the lock guards.
pub struct LayerState {
    /// Acknowledged, not yet mapped.
    pub index: WriteIndex,
    /// Mapped.
    pub map: Map,
}

/// Where a block's content is.
#[derive(Clone)]
pub enum Resolved {
    /// In the write buffer.
    Buffered(Arc<BufferedRecord>),
    /// In the map: stored, zero, or a hole.
    Mapped(Location),
}

impl Layer {
    /// A layer whose map's highest node is at `root`.
    #[must_use]
    pub fn new(id: LayerId, branch: BranchId, root: Location, mapped_blocks: u64) -> Self {
        Self {
            id,
            branch,
            state: Mutex::new(LayerState { index: WriteIndex::default(), map: Map::new(root) }),
            mapped_blocks: AtomicU64::new(mapped_blocks),
            dropping: AtomicBool::new(false),
        }
    }
}

impl LayerState {
    /// Where block `lba` is.
    ///
    /// # Errors
    /// A map node to load first.
    #[inline]
    pub fn resolve(&mut self, lba: Lba) -> Result<Resolved, Load> {
        if let Some(record) = self.index.get(lba.0) {
            return Ok(Resolved::Buffered(Arc::clone(record)));
        }
        self.map.get(lba).map(Resolved::Mapped)
    }
}

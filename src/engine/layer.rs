//! A layer: the write buffer's index and the map behind it, under one short lock; and what a volatile
//! write cache holds before either.
//!
//! An entry becomes visible by inserting all its records under the lock; a read of at most the
//! atomic size resolves all its blocks under the lock. So neither ever sees half of the other.
//! The buffer is looked at before the map, and the mapper changes the map before the buffer, so
//! nothing is ever missing in between.
//!
//! Lock order: journal completion → layer → segment table; journal state, layer → volatile cache.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;

use parking_lot::Mutex;
use parking_lot::MutexGuard;

use super::index::WriteIndex;
use super::map::Load;
use super::map::Map;
use super::record::BufferedRecord;
use super::volatile::VolatileCache;
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
    /// Acknowledged from memory, not yet durable.
    pub volatile: VolatileCache,
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

/// What readers see of a layer: nothing changes in it meanwhile.
pub struct LayerView<'a> {
    state: MutexGuard<'a, LayerState>,
    volatile: Option<MutexGuard<'a, WriteIndex>>,
}

/// Where a block's content is.
#[derive(Clone)]
pub enum Resolved {
    /// In the volatile write cache or the write buffer.
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
            volatile: VolatileCache::default(),
            mapped_blocks: AtomicU64::new(mapped_blocks),
            dropping: AtomicBool::new(false),
        }
    }

    /// Looks at it as readers do, for a short time.
    #[inline]
    pub fn view(&self) -> LayerView<'_> {
        let state = self.state.lock();
        // Under the lock: what becomes durable is here or there.
        LayerView { volatile: self.volatile.look(), state }
    }
}

impl LayerView<'_> {
    /// Where block `lba` is.
    ///
    /// # Errors
    /// A map node to load first.
    #[inline]
    pub fn resolve(&mut self, lba: Lba) -> Result<Resolved, Load> {
        let volatile = self.volatile.as_ref().and_then(|index| index.get(lba.0));
        if let Some(record) = volatile.or_else(|| self.state.index.get(lba.0)) {
            return Ok(Resolved::Buffered(Arc::clone(record)));
        }
        self.state.map.get(lba).map(Resolved::Mapped)
    }

    /// As [`WriteIndex::run`], of all that is not in the map yet.
    #[must_use]
    pub fn buffered_run(&self, lba: u64, limit: u64) -> (Option<&Arc<BufferedRecord>>, u64) {
        let volatile = self.volatile.as_ref().map_or((None, limit), |index| index.run(lba, limit));
        match volatile {
            (Some(_), _) => volatile,
            (None, next) => self.state.index.run(lba, next),
        }
    }

    /// Mapped.
    pub fn map(&mut self) -> &mut Map {
        &mut self.state.map
    }
}

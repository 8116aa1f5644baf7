//! Which blocks of a volume are holes, zeroes or data.

use super::Engine;
use super::layer::Layer;
use super::layer::LayerView;
use super::map::Load;
use crate::error::Result;
use crate::format::location::Location;
use crate::format::node::NODE_ENTRIES;
use crate::format::record::RecordKind;
use crate::units::Lba;

/// Leaves of the map that one answer looks at. Bounds what it reads and for how long it keeps its
/// thread: 512 MiB of stored blocks take a few milliseconds, or as many reads as there are leaves.
const LEAVES_MAX: usize = 256;

/// What a run of blocks is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// Never written, or given back; reads as zero.
    Hole,
    /// Zero and allocated.
    Zero,
    /// Stored.
    Data,
}

impl From<Location> for BlockState {
    fn from(location: Location) -> Self {
        match location {
            Location::HOLE => Self::Hole,
            Location::ZERO => Self::Zero,
            _ => Self::Data,
        }
    }
}

impl Engine {
    /// Runs of one state from `lba` on, at most `runs_max`, covering at most `blocks`; fewer of
    /// them if it would take long to look at all, but always some: ask again for the rest.
    ///
    /// # Errors
    /// As for reads: map nodes may have to be loaded.
    pub async fn block_status(
        &self,
        layer: &Layer,
        lba: Lba,
        blocks: u64,
        runs_max: usize,
    ) -> Result<Vec<(BlockState, u64)>> {
        let end = lba.0 + blocks;
        let mut runs: Vec<(BlockState, u64)> = Vec::new();
        let mut at = lba.0;
        let (mut leaf, mut leaves_left) = (None, LEAVES_MAX);
        while at < end {
            if leaf.replace(at / NODE_ENTRIES as u64) != Some(at / NODE_ENTRIES as u64) {
                if leaves_left == 0 {
                    break;
                }
                leaves_left -= 1;
            }
            let found = next_run(layer.view(), at, end);
            let (state, next) = match found {
                Ok(run) => run,
                Err(load) => {
                    self.load_node(layer, load).await?;
                    continue;
                }
            };
            let full = runs.len() == runs_max;
            match runs.last_mut() {
                Some((last, length)) if *last == state => *length += next - at,
                _ if full => break,
                _ => runs.push((state, next - at)),
            }
            at = next;
        }
        Ok(runs)
    }
}

/// The state of block `at` and the first block past it that may differ.
fn next_run(mut layer: LayerView<'_>, at: u64, end: u64) -> Result<(BlockState, u64), Load> {
    let (record, run_end) = layer.buffered_run(at, end);
    if let Some(record) = record {
        let kind = match (record.header.kind, record.header.keep_allocated) {
            (RecordKind::Zero, true) => BlockState::Zero,
            (RecordKind::Zero, false) => BlockState::Hole,
            _ => BlockState::Data,
        };
        return Ok((kind, run_end));
    }
    let leaf = at / NODE_ENTRIES as u64;
    let map = layer.map();
    let next_leaf = map.next_leaf(leaf)?.unwrap_or(u64::MAX);
    if next_leaf > leaf {
        let hole_end = next_leaf.saturating_mul(NODE_ENTRIES as u64).min(run_end);
        return Ok((BlockState::Hole, hole_end));
    }
    let kind = BlockState::from(map.get(Lba(at))?);
    let run_end = run_end.min((leaf + 1) * NODE_ENTRIES as u64);
    let mut next = at + 1;
    while next < run_end && BlockState::from(map.get(Lba(next))?) == kind {
        next += 1;
    }
    Ok((kind, next))
}

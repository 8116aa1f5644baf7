//! The way out: blocks to records, records to chunks, chunks to pieces.
//!
//! A *plan* resolves all blocks of a read under the layer's lock, so that a read of up to the
//! atomic size never sees half an entry; what the plan names is immutable, so the rest needs no
//! lock. A read that finds everything in RAM does not wait and does not allocate.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Buf;
use bytes::Bytes;
use futures_util::future::try_join_all;
use weft_api::Stage;

use super::Engine;
use super::layer::Layer;
use super::layer::Resolved;
use super::map::Load;
use super::record::BufferedRecord;
use crate::cache::Chunk;
use crate::canary::Bug;
use crate::canary::planted;
use crate::codec::compress::decompress;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::format::location::Location;
use crate::format::node::NODE_BYTES;
use crate::format::node::NodeEntries;
use crate::format::node::NodeKey;
use crate::format::node::decode_node;
use crate::format::record::PayloadCodec;
use crate::format::record::RecordHeader;
use crate::format::record::RecordKind;
use crate::format::record::decode_record;
use crate::observe::stages::timed;
use crate::observe::stages::timed_now;
use crate::pool::read::ReadOutcome;
use crate::units::BLOCK_BYTES;
use crate::units::BLOCK_BYTES_U64;
use crate::units::Lba;
use crate::units::Lsn;
use crate::units::bytes_u64;
use crate::units::bytes_usize;

/// Most blocks planned under one lock: 1 MiB, a multiple of the atomic size.
const PLAN_BLOCKS_MAX: u64 = 256;
/// A read whose blocks keep moving is tried this often; each try means a whole reclaim went by.
const MOVED_MAX: usize = 100;
/// Before the map is asked again for a node it names in a segment that is gone.
const MOVED_PAUSE: Duration = Duration::from_millis(1);

/// Adjacent blocks from one source.
struct Run {
    source: Source,
    lba: u64,
    blocks: u64,
}

#[derive(Clone)]
enum Source {
    Zero,
    Buffered(Arc<BufferedRecord>),
    Stored(Location),
}

impl Source {
    fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Zero, Self::Zero) => true,
            (Self::Buffered(a), Self::Buffered(b)) => Arc::ptr_eq(a, b),
            (Self::Stored(a), Self::Stored(b)) => a == b,
            (Self::Zero | Self::Buffered(_) | Self::Stored(_), _) => false,
        }
    }
}

impl From<Resolved> for Source {
    fn from(resolved: Resolved) -> Self {
        match resolved {
            Resolved::Buffered(record) if record.header.kind == RecordKind::Data => {
                Self::Buffered(record)
            }
            Resolved::Mapped(location) if location.is_stored() => Self::Stored(location),
            Resolved::Buffered(_) | Resolved::Mapped(_) => Self::Zero,
        }
    }
}

/// A part of a read's answer: whole blocks.
pub enum BlockPiece {
    /// This many bytes of zeroes.
    Zero(usize),
    /// Bytes shared with the cache.
    Data(Bytes),
}

thread_local! {
    /// Reused by every read of the thread that is answered from RAM; empty between them, as what it
    /// names holds memory and room in the pod.
    static PLAN: RefCell<(Vec<Run>, Vec<Option<Chunk>>)> =
        const { RefCell::new((Vec::new(), Vec::new())) };
}

/// How many of the `blocks` from `lba` on are planned together: all of them if one plan may hold so
/// many, wherever they lie, as a read of up to the atomic size must not be cut.
fn blocks_planned_at(lba: u64, blocks: u64) -> u64 {
    if blocks <= PLAN_BLOCKS_MAX && !planted(Bug::ReadCut) {
        return blocks;
    }
    blocks.min(PLAN_BLOCKS_MAX - lba % PLAN_BLOCKS_MAX)
}

impl Engine {
    /// Answers from RAM alone: hands every piece to `take` in order and returns true; or returns
    /// false having handed over nothing.
    pub fn try_read(
        &self,
        layer: &Layer,
        lba: Lba,
        blocks: u64,
        mut take: impl FnMut(BlockPiece),
    ) -> Result<bool> {
        if blocks > PLAN_BLOCKS_MAX {
            return Ok(false);
        }
        PLAN.with_borrow_mut(|(runs, chunks)| {
            let all_in_ram = self.gather_from_ram(layer, lba, blocks, runs, chunks);
            if let Ok(true) = all_in_ram {
                for (run, chunk) in runs.drain(..).zip(chunks.drain(..)) {
                    take(chunk.map_or_else(|| zero(&run), |chunk| piece(&run, chunk)));
                }
            }
            runs.clear();
            chunks.clear();
            all_in_ram
        })
    }

    /// Finds the chunks of a read, one for each run, `None` for zeroes; false if one is not in RAM.
    /// All must be at hand before the first piece is handed over.
    fn gather_from_ram(
        &self,
        layer: &Layer,
        lba: Lba,
        blocks: u64,
        runs: &mut Vec<Run>,
        chunks: &mut Vec<Option<Chunk>>,
    ) -> Result<bool> {
        if plan(layer, lba, blocks, runs).is_err() {
            return Ok(false);
        }
        for run in runs.iter() {
            let chunk = self.chunk_in_ram(&run.source)?;
            if chunk.is_none() && !matches!(run.source, Source::Zero) {
                return Ok(false);
            }
            chunks.push(chunk);
        }
        Ok(true)
    }

    /// Reads whole blocks, asking devices where needed.
    ///
    /// # Errors
    /// `Corrupt` if a block is damaged beyond repair, or a device's error.
    pub async fn read(&self, layer: &Layer, lba: Lba, blocks: u64) -> Result<Vec<BlockPiece>> {
        let mut pieces = Vec::new();
        let end = lba.0 + blocks;
        let mut at = lba.0;
        while at < end {
            let count = blocks_planned_at(at, end - at);
            self.read_planned(layer, Lba(at), count, &mut pieces).await?;
            at += count;
        }
        Ok(pieces)
    }

    async fn read_planned(
        &self,
        layer: &Layer,
        lba: Lba,
        blocks: u64,
        pieces: &mut Vec<BlockPiece>,
    ) -> Result<()> {
        for _attempt in 0..MOVED_MAX {
            let mut runs = Vec::new();
            while let Err(load) = plan(layer, lba, blocks, &mut runs) {
                timed(&self.env, Stage::Map, self.load_node(layer, load)).await?;
                runs.clear();
            }
            let chunks = try_join_all(runs.iter().map(|run| self.chunk(run)));
            let chunks = timed(&self.env, Stage::Device, chunks).await?;
            if chunks.iter().any(|chunk| matches!(chunk, Fetched::Moved)) {
                continue;
            }
            for (run, chunk) in runs.iter().zip(chunks) {
                match chunk {
                    Fetched::Chunk(chunk) => pieces.push(piece(run, chunk)),
                    Fetched::Zero | Fetched::Moved => pieces.push(zero(run)),
                }
            }
            return Ok(());
        }
        Err(Error::new(ErrorKind::Corrupt, "read").context("its location is outdated every time"))
    }

    /// A chunk that needs no device: zero (`None`), buffered, or cached (`None` if it is not).
    fn chunk_in_ram(&self, source: &Source) -> Result<Option<Chunk>> {
        match source {
            Source::Zero => Ok(None),
            Source::Buffered(record) => self.buffered_chunk(record).map(Some),
            Source::Stored(location) => Ok(self.cache.get(location.0)),
        }
    }

    fn buffered_chunk(&self, record: &BufferedRecord) -> Result<Chunk> {
        if record.header.codec == PayloadCodec::Raw {
            return Ok(Chunk { lba: record.header.lba, data: record.payload.clone() });
        }
        if let Some(chunk) = self.cache.get(record.cache_key()) {
            return Ok(chunk);
        }
        let chunk = decode_chunk(&record.header, &record.payload)
            .ok_or_else(|| Error::new(ErrorKind::Corrupt, "decode buffered record"))?;
        self.cache.insert(record.cache_key(), chunk.clone());
        Ok(chunk)
    }

    async fn chunk(&self, run: &Run) -> Result<Fetched> {
        if let Some(chunk) = self.chunk_in_ram(&run.source)? {
            return Ok(Fetched::Chunk(chunk));
        }
        let Source::Stored(location) = run.source else { return Ok(Fetched::Zero) };
        let pod = self.pool.geometry.pod;
        let wanted = run.lba..run.lba + run.blocks;
        let outcome = self.pool.read(location, |bytes, place| {
            timed_now(&self.env, Stage::Decode, || {
                let (header, payload) = decode_record(bytes, pod, place).ok()?;
                let held = header.lba.0..header.lba.0.checked_add(header.blocks)?;
                let right = header.kind == RecordKind::Data
                    && held.start <= wanted.start
                    && wanted.end <= held.end;
                right.then(|| decode_chunk(&header, payload)).flatten()
            })
        });
        match outcome.await.map_err(|error| error.context(format_args!("block {}", run.lba)))? {
            ReadOutcome::Moved if planted(Bug::MovedReadAsZero) => Ok(Fetched::Zero),
            ReadOutcome::Moved => Ok(Fetched::Moved),
            ReadOutcome::Found(chunk) => {
                self.cache.insert(location.0, chunk.clone());
                Ok(Fetched::Chunk(chunk))
            }
        }
    }

    /// Brings a map node into memory, unless the map changed meanwhile.
    ///
    /// # Errors
    /// As for reads.
    pub(super) async fn load_node(&self, layer: &Layer, load: Load) -> Result<()> {
        let _waiting = Waiting::new(&self.walks_waiting);
        for _attempt in 0..MOVED_MAX {
            if let Some((entries, stamp)) = self.read_node(layer, load).await? {
                let mut state = layer.state.lock();
                let before = state.map.node_count();
                state.map.loaded(load, entries, stamp);
                let added = state.map.node_count() - before;
                self.nodes.fetch_add(added, Ordering::Relaxed);
                self.nodes_read.fetch_add(1, Ordering::Relaxed);
                let dropped = if self.evicts_nodes() { state.map.evict() } else { 0 };
                drop(state);
                self.forget_nodes(dropped);
                return Ok(());
            }
            if !layer.state.lock().map.wants(load) {
                return Ok(());
            }
            // What is reclaimed was moved before, so the map should know better. Whoever asked
            // would ask again at once, for ever.
            self.env.sleep(MOVED_PAUSE).await;
        }
        Err(Error::new(ErrorKind::Corrupt, "load map node")
            .context("the map leads to a segment that was given up"))
    }

    /// The node's entries and stamp; `None` if it is not there any more.
    async fn read_node(&self, layer: &Layer, load: Load) -> Result<Option<(NodeEntries, Lsn)>> {
        let pod = self.pool.geometry.pod;
        let outcome = self.pool.read(load.location, |bytes, place| {
            let (header, payload) = decode_record(bytes, pod, place).ok()?;
            let right = header.kind == RecordKind::MapNode
                && NodeKey::from_record_lba(header.lba) == Some(load.key)
                && header.branch.0 == layer.id.0;
            let content = right.then(|| decode_payload(&header, payload, NODE_BYTES)).flatten()?;
            Some((decode_node(&content).ok()?, header.lsn))
        });
        match outcome.await.map_err(|error| error.context("map node"))? {
            ReadOutcome::Found(node) => Ok(Some(node)),
            ReadOutcome::Moved => Ok(None),
        }
    }
}

/// Counts a walk that waits, also if it is given up.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

enum Fetched {
    Zero,
    Chunk(Chunk),
    Moved,
}

fn zero(run: &Run) -> BlockPiece {
    BlockPiece::Zero(bytes_usize(run.blocks * BLOCK_BYTES_U64))
}

/// The run's part of its chunk: cut in place, which counts no further share up and down.
fn piece(run: &Run, chunk: Chunk) -> BlockPiece {
    let from = bytes_usize((run.lba - chunk.lba.0) * BLOCK_BYTES_U64);
    let length = bytes_usize(run.blocks * BLOCK_BYTES_U64);
    let mut data = chunk.data;
    assert!(from + length <= data.len(), "a chunk holds what the map says");
    data.advance(from);
    data.truncate(length);
    BlockPiece::Data(data)
}

/// Resolves all blocks under one lock, merging neighbours from one source.
fn plan(layer: &Layer, lba: Lba, blocks: u64, runs: &mut Vec<Run>) -> Result<(), Load> {
    let mut view = layer.view();
    for lba in lba.0..lba.0 + blocks {
        let source = Source::from(view.resolve(Lba(lba))?);
        match runs.last_mut() {
            Some(run) if run.source.same(&source) => run.blocks += 1,
            _ => runs.push(Run { source, lba, blocks: 1 }),
        }
    }
    Ok(())
}

/// The blocks of a data record.
pub(super) fn decode_chunk(header: &RecordHeader, payload: &[u8]) -> Option<Chunk> {
    let bytes = usize::try_from(header.blocks).ok()?.checked_mul(BLOCK_BYTES)?;
    let data = decode_payload(header, payload, bytes)?;
    Some(Chunk { lba: header.lba, data: Bytes::from(data) })
}

/// A payload as it was before compression, of exactly `bytes` bytes.
pub(super) fn decode_payload(
    header: &RecordHeader,
    payload: &[u8],
    bytes: usize,
) -> Option<Vec<u8>> {
    if u64::from(header.raw_bytes) != bytes_u64(bytes) || bytes > super::PAYLOAD_BYTES_MAX {
        return None;
    }
    match header.codec {
        PayloadCodec::Raw => (payload.len() == bytes).then(|| payload.to_vec()),
        PayloadCodec::Zstd => {
            let mut content = vec![0; bytes];
            decompress(payload, &mut content).ok()?;
            Some(content)
        }
    }
}

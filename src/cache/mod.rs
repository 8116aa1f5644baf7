//! Decoded chunks in RAM, keyed by location.
//!
//! A location is a write-once address: it means the same bytes for ever, or nothing (design.md,
//! section 6). So an entry is never stale and nobody has to invalidate it; [`ChunkCache::remove`]
//! only frees memory early. The chunk carries the LBA it was written for, so that the reader can
//! assert that the map and the record agree.
//!
//! The policy is quick_cache's S3-FIFO variant: one pass over a large volume does not push out what
//! is read often. Hashing and the number of shards are fixed, so that a simulated run evicts the
//! same entries on every machine.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use quick_cache::OptionsBuilder;
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use quick_cache::sync::DefaultLifecycle;
use rustc_hash::FxBuildHasher;

use crate::units::BLOCK_BYTES_U64;
use crate::units::Lba;
use crate::units::bytes_u64;
use crate::units::bytes_usize;

/// Memory of an entry besides its bytes: the slot, its share of the index and of the ghost list,
/// and the header of the allocation. Rounded up; to be compared with the node's resident set.
const OVERHEAD_BYTES: u64 = 192;

/// Independent locks. Far more than the data-plane threads that a machine has.
const SHARDS_MAX: usize = 64;

/// A shard holds at least this much: a hundred chunks, so that sharding does not spoil the policy.
const SHARD_BYTES_MIN: u64 = 4 << 20;

/// The decoded payload of a data record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The first block it was written for.
    pub lba: Lba,
    /// The blocks' bytes. An allocation of its own: the cache counts its length only.
    pub data: Bytes,
}

#[derive(Clone)]
struct ChunkWeighter;

impl Weighter<u64, Chunk> for ChunkWeighter {
    fn weight(&self, _location: &u64, chunk: &Chunk) -> u64 {
        bytes_u64(chunk.data.len()) + OVERHEAD_BYTES
    }
}

/// The RAM cache of a pod, shared by all threads.
///
/// Its locks are per shard and held for one look-up or one insertion.
pub struct ChunkCache {
    chunks: Cache<u64, Chunk, ChunkWeighter, FxBuildHasher>,
    hits: AtomicU64,
    misses: AtomicU64,
}

impl ChunkCache {
    /// An empty cache that holds at most `capacity_bytes`, overhead included. Zero caches nothing.
    #[must_use]
    pub fn new(capacity_bytes: u64) -> Self {
        let shards = bytes_usize(capacity_bytes / SHARD_BYTES_MIN).clamp(1, SHARDS_MAX);
        // Rounded down to a power of two, as the library rounds up.
        let shards = 1 << shards.ilog2();
        let options = OptionsBuilder::new()
            .shards(shards)
            .weight_capacity(capacity_bytes)
            .estimated_items_capacity(bytes_usize(capacity_bytes / (2 * BLOCK_BYTES_U64)))
            .build()
            .expect("both capacities are set");
        let lifecycle = DefaultLifecycle::default();
        Self {
            chunks: Cache::with_options(options, ChunkWeighter, FxBuildHasher, lifecycle),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        }
    }

    /// The chunk at location `key`, sharing its bytes. Does not allocate.
    pub fn get(&self, key: u64) -> Option<Chunk> {
        let found = self.chunks.get(&spread(key));
        let counter = if found.is_some() { &self.hits } else { &self.misses };
        counter.fetch_add(1, Ordering::Relaxed);
        found
    }

    /// Keeps the chunk at location `key`, perhaps evicting others; one too large is not kept.
    pub fn insert(&self, key: u64, chunk: Chunk) {
        // The first clone of `Bytes` made from a vector allocates its shared count: here, not in
        // `get`.
        let shared = chunk.clone();
        drop(chunk);
        self.chunks.insert(spread(key), shared);
    }

    /// Forgets the chunk at location `key`, if it is there.
    pub fn remove(&self, key: u64) {
        self.chunks.remove(&spread(key));
    }

    /// Look-ups that found their chunk.
    #[must_use]
    pub fn hits(&self) -> u64 {
        self.hits.load(Ordering::Relaxed)
    }

    /// Look-ups that did not.
    #[must_use]
    pub fn misses(&self) -> u64 {
        self.misses.load(Ordering::Relaxed)
    }

    /// Memory in use, in bytes, overhead included.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.chunks.weight()
    }

    /// The most it holds, in bytes, overhead included.
    #[must_use]
    pub fn capacity_bytes(&self) -> u64 {
        self.chunks.capacity()
    }
}

/// Carries every bit of a location into all others, one to one.
///
/// Locations of one segment differ in their middle bits, and FxHash lets low bits of the hash depend
/// on low bits of the key alone: unspread, all chunks would fall into a few shards.
fn spread(location: u64) -> u64 {
    let folded = (location ^ (location >> 32)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    folded ^ (folded >> 32)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::any;
    use proptest::proptest;
    use rustc_hash::FxHashMap;

    use super::*;

    fn chunk(lba: u64, length: usize) -> Chunk {
        let byte = lba.to_le_bytes()[0];
        Chunk { lba: Lba(lba), data: Bytes::from(vec![byte; length]) }
    }

    #[test]
    fn a_chunk_is_found_until_removed_and_counted() {
        let cache = ChunkCache::new(1 << 20);
        assert_eq!(cache.get(7), None);
        cache.insert(7, chunk(3, 4096));
        assert_eq!(cache.get(7), Some(chunk(3, 4096)));
        assert_eq!(cache.used_bytes(), 4096 + OVERHEAD_BYTES);
        cache.remove(7);
        assert_eq!(cache.get(7), None);
        assert_eq!((cache.hits(), cache.misses(), cache.used_bytes()), (1, 2, 0));
    }

    #[test]
    fn a_hit_shares_the_bytes_that_were_inserted() {
        let cache = ChunkCache::new(1 << 20);
        let inserted = chunk(1, 8192);
        let address = inserted.data.as_ptr();
        cache.insert(1, inserted);
        assert_eq!(cache.get(1).expect("cached").data.as_ptr(), address);
    }

    #[test]
    fn memory_stays_bounded_and_is_used() {
        let cache = ChunkCache::new(64 << 20);
        for number in 0..16_384 {
            // Locations of neighbouring chunks differ in their middle bits only.
            cache.insert(number << 16 | 0x11, chunk(number, 8192));
            assert!(cache.used_bytes() <= cache.capacity_bytes());
        }
        assert!(cache.capacity_bytes() <= (64 << 20) + 64);
        assert!(cache.used_bytes() > 60 << 20, "only {} bytes used", cache.used_bytes());
    }

    #[test]
    fn without_capacity_nothing_is_kept() {
        let cache = ChunkCache::new(0);
        cache.insert(1, chunk(1, 4096));
        assert_eq!(cache.get(1), None);
        assert_eq!(cache.used_bytes(), 0);
    }

    #[test]
    fn often_read_chunks_survive_one_pass_over_a_volume() {
        let cache = ChunkCache::new(4 << 20);
        for _ in 0..4 {
            for key in 0..100 {
                if cache.get(key).is_none() {
                    cache.insert(key, chunk(key, 4096));
                }
            }
        }
        for key in 1000..11_000 {
            cache.insert(key, chunk(key, 4096));
        }
        let kept = (0..100).filter(|&key| cache.get(key).is_some()).count();
        assert!(kept >= 90, "only {kept} of 100 kept");
    }

    #[test]
    fn two_runs_evict_the_same_chunks() {
        let run = || {
            let cache = ChunkCache::new(32 << 20);
            for number in 0..20_000_u64 {
                cache.insert(number.wrapping_mul(0x9E37_79B9), chunk(number, 4096));
                cache.get((number / 3).wrapping_mul(0x9E37_79B9));
            }
            let kept = |number: &u64| cache.get(number.wrapping_mul(0x9E37_79B9)).is_some();
            (0..20_000_u64).filter(kept).collect::<Vec<_>>()
        };
        assert_eq!(run(), run());
    }

    proptest! {
        #[test]
        fn what_is_found_is_what_was_last_inserted(
            steps in vec((any::<bool>(), 0..80_u64, 1..9_usize), 0..300),
        ) {
            let cache = ChunkCache::new(256 << 10);
            let mut model = FxHashMap::default();
            for (number, (insert, key, blocks)) in (0..).zip(steps) {
                if insert {
                    let new = chunk(number, blocks * 4096);
                    model.insert(key, new.clone());
                    cache.insert(key, new);
                } else {
                    cache.remove(key);
                    model.remove(&key);
                }
                assert!(cache.used_bytes() <= cache.capacity_bytes());
                for key in 0..80 {
                    if let Some(found) = cache.get(key) {
                        assert_eq!(Some(&found), model.get(&key));
                    }
                }
            }
        }
    }
}

//! One bad place on a survivor after m devices were lost: what cannot be rebuilt fails to read, and
//! everything else goes on.
//!
//! Contents do not compress, so that they are found on the disks as they are and fill them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use weft::device::sim::SimDisk;
use weft::env::EnvRef;
use weft::env::Rng;
use weft::env::sim::SeededRng;
use weft::env::sim::SimEnv;
use weft::error::ErrorKind;
use weft::format::unit::UNIT_BYTES;
use weft::pool::scrub::UnitPlace;
use weft::volume::VolumeDirectory;
use weft::volume::VolumeRef;
use weft::volume::ZeroMode;
use weft::volume::pod::Pod;

use crate::fixture::create;
use crate::fixture::disks;
use crate::fixture::life;
use crate::fixture::open;
use crate::host::read_sectors;
use crate::model::SECTOR;

const BLOCK: usize = 4096;
const BLOCK_SECTORS: u64 = (BLOCK / SECTOR) as u64;
/// Blocks written at once.
const STEP_BLOCKS: u64 = 16;
const BLOCKS: u64 = 1024;
/// Rounds of writing everything that is not damaged: several times what the disks hold.
const ROUNDS: u64 = 60;
/// How long background work may take.
const PATIENCE: Duration = Duration::from_secs(300);

/// What `count` blocks hold after a round of writing.
fn noise(first: u64, count: u64, round: u64) -> Vec<u8> {
    let mut bytes = vec![0; count as usize * BLOCK];
    for (at, block) in bytes.chunks_mut(BLOCK).enumerate() {
        let rng = SeededRng::new(round << 32 | (first + at as u64));
        block.chunks_mut(8).for_each(|word| {
            word.copy_from_slice(&rng.random_u64().to_le_bytes());
        });
    }
    bytes
}

async fn write_step(volume: &VolumeRef, first: u64, round: u64) {
    let bytes = Bytes::from(noise(first, STEP_BLOCKS, round));
    Arc::clone(volume).write(first * BLOCK as u64, bytes).await.expect("write");
}

fn steps() -> impl Iterator<Item = u64> {
    (0..BLOCKS).step_by(STEP_BLOCKS as usize)
}

/// Blocks that cannot be read. All others must be of a round that `round_of` says.
async fn unreadable(volume: &VolumeRef, round_of: impl Fn(u64) -> u64) -> BTreeSet<u64> {
    let mut failed = BTreeSet::new();
    for block in 0..BLOCKS {
        match read_sectors(volume, block * BLOCK as u64, BLOCK_SECTORS).await {
            Ok(bytes) => assert!(bytes == noise(block, 1, round_of(block)), "block {block}"),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{}", error.chain());
                failed.insert(block);
            }
        }
    }
    failed
}

/// Wipes a block where it is stored on one of the `survivors`.
fn wipe_a_stored_block(pod: &Pod, disks: &[&SimDisk], survivors: &[usize]) {
    let first_words: BTreeSet<Vec<u8>> =
        (0..BLOCKS).map(|block| noise(block, 1, 0)[..8].to_vec()).collect();
    for unit in pod.live_units().iter().filter(|unit| survivors.contains(&unit.device)) {
        let mut bytes = vec![0; UNIT_BYTES];
        disks[unit.device].peek(unit.offset, &mut bytes);
        let found = bytes.windows(8).position(|word| first_words.contains(word));
        if let Some(at) = found.filter(|at| at + BLOCK <= UNIT_BYTES) {
            disks[unit.device].poke(unit.offset + at as u64, &[0; BLOCK]);
            return;
        }
    }
    panic!("no block is stored as it is");
}

/// Damages every copy of the first leaf of a map, and the same bytes of all strips of its row. Leaves
/// are written in rows of their own.
fn wipe_first_leaf(pod: &Pod, disks: &[&SimDisk]) {
    let units = pod.live_units();
    for unit in &units {
        let mut bytes = vec![0; UNIT_BYTES];
        disks[unit.device].peek(unit.offset, &mut bytes);
        for at in (0..UNIT_BYTES).step_by(16).filter(|at| is_first_leaf(&bytes[*at..])) {
            let in_row =
                |other: &&UnitPlace| (other.segment, other.row) == (unit.segment, unit.row);
            for other in units.iter().filter(in_row) {
                disks[other.device].poke(other.offset + at as u64, &[0xff; 16]);
            }
        }
    }
}

/// Whether the record there is a map node of level 0 and index 0: see `docs/format.md`.
fn is_first_leaf(bytes: &[u8]) -> bool {
    const MAP_NODE: u8 = 4;
    bytes.starts_with(b"WRC1") && bytes[4] == MAP_NODE && bytes[40..48] == [0; 8]
}

#[test]
fn a_leaf_beyond_repair_stops_no_other_part_of_the_pod() {
    const LEAF_BLOCKS: u64 = 512;
    let world = SimEnv::new(2);
    let disks = disks("disk", 6);
    let disks: Vec<&SimDisk> = disks.iter().collect();
    life(&world, async |env| {
        let pod = create(&env, &disks).await;
        let volume = pod.find("v").expect("created");
        for first in steps() {
            write_step(&volume, first, 0).await;
        }
        pod.close().await.expect("close");
        wipe_first_leaf(&pod, &disks);
    });

    life(&world, async |env| {
        let pod = open(&env, &disks, false).await;
        let volume = pod.find("v").expect("there");
        let lost = unreadable(&volume, |_| 0).await;
        assert_eq!(lost, (0..LEAF_BLOCKS).collect(), "one leaf");
        write_step(&volume, 0, 1).await;
        // Far more than the journal holds, so that what was written before must be mapped.
        for round in 1..=16 {
            for first in (LEAF_BLOCKS..2 * LEAF_BLOCKS).step_by(STEP_BLOCKS as usize) {
                write_step(&volume, first, round).await;
            }
        }
        pod.close().await.expect("close");
    });

    life(&world, async |env| {
        let pod = open(&env, &disks, false).await;
        let volume = pod.find("v").expect("there");
        let round_of = |block: u64| if block < LEAF_BLOCKS { 1 } else { 16 };
        let lost = unreadable(&volume, round_of).await;
        assert_eq!(lost, (STEP_BLOCKS..LEAF_BLOCKS).collect());
        for first in steps() {
            write_step(&volume, first, 2).await;
        }
        assert!(unreadable(&volume, |_| 2).await.is_empty());
        pod.close().await.expect("close");
    });
    world.halt();
}

async fn wait_until(env: &EnvRef, what: &str, done: impl Fn() -> bool) {
    let begun = env.now();
    while !done() {
        assert!(env.now().saturating_sub(begun) < PATIENCE, "{what} takes too long");
        env.sleep(Duration::from_millis(500)).await;
    }
}

#[test]
fn one_bad_place_beyond_repair_stops_neither_rebuild_nor_reclaim() {
    let world = SimEnv::new(1);
    let (old, new) = (disks("old", 6), disks("new", 2));
    let before: Vec<&SimDisk> = old.iter().collect();
    let after = [&new[0], &new[1], &old[2], &old[3], &old[4], &old[5]];
    life(&world, async |env| {
        let pod = create(&env, &before).await;
        let volume = pod.find("v").expect("created");
        for first in steps() {
            write_step(&volume, first, 0).await;
        }
        pod.close().await.expect("close");
        wipe_a_stored_block(&pod, &before, &[2, 3, 4, 5]);
    });

    life(&world, async |env| {
        let pod = open(&env, &after, true).await;
        let volume = pod.find("v").expect("there");
        let lost = unreadable(&volume, |_| 0).await;
        // Of the strips that were lost the same range cannot be rebuilt either.
        assert!((1..=48).contains(&lost.len()), "a few records: {lost:?}");
        // Only that segment stays as it is.
        wait_until(&env, "the rebuild", || pod.status().segments_degraded == 1).await;
        assert_eq!(unreadable(&volume, |_| 0).await, lost);

        let is_lost = |first: u64| lost.range(first..first + STEP_BLOCKS).next().is_some();
        for round in 1..=ROUNDS {
            for first in steps().filter(|first| !is_lost(*first)) {
                write_step(&volume, first, round).await;
            }
        }
        let round_of =
            |block: u64| if is_lost(block / STEP_BLOCKS * STEP_BLOCKS) { 0 } else { ROUNDS };
        assert_eq!(unreadable(&volume, round_of).await, lost);

        // What is lost can be written or trimmed, and nothing is left of the damage then.
        for block in &lost {
            let (offset, bytes) = (block * BLOCK as u64, BLOCK as u64);
            Arc::clone(&volume).zero(offset, bytes, ZeroMode::Deallocate).await.expect("trim");
        }
        for first in steps().filter(|first| is_lost(*first)) {
            write_step(&volume, first, ROUNDS).await;
        }
        assert!(unreadable(&volume, |_| ROUNDS).await.is_empty());
        wait_until(&env, "the last segment", || pod.status().segments_degraded == 0).await;
        pod.close().await.expect("close");
    });
    world.halt();
}

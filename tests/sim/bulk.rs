//! Large deletions end soon, in virtual time, however many map nodes they have to read.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::Either;
use futures_util::future::select;
use weft::device::sim::SimDisk;
use weft::env::EnvRef;
use weft::env::sim::SeededRng;
use weft::env::sim::SimEnv;
use weft::volume::VolumeDirectory;
use weft::volume::VolumeRef;
use weft::volume::ZeroMode;
use weft::volume::pod::Pod;

use crate::fixture::create;
use crate::fixture::create_volume;
use crate::fixture::create_with;
use crate::fixture::disks;
use crate::fixture::life;
use crate::fixture::open;
use crate::host::read_sectors;

pub const BLOCK: usize = 4096;
/// What a leaf of a map covers.
pub const LEAF_BYTES: u64 = 2 << 20;
/// Leaves with one block each.
pub const LEAVES: u64 = 4096;

async fn write_a_block_per_leaf(volume: &VolumeRef) {
    for leaf in 0..LEAVES {
        let bytes = Bytes::from(vec![leaf.to_le_bytes()[0] | 1; BLOCK]);
        Arc::clone(volume).write(leaf * LEAF_BYTES, bytes).await.expect("write");
    }
}

/// A pod with a volume `big`, all of whose map is stored and none of it in memory.
pub fn pod_with_a_large_map(world: &Arc<SimEnv>, disks: &[&SimDisk]) {
    life(world, async |env| {
        let pod = create(&env, disks).await;
        let volume = create_volume(&pod, "big").await;
        write_a_block_per_leaf(&volume).await;
        pod.close().await.expect("close");
        assert_eq!(pod.status().logical_bytes, LEAVES * BLOCK as u64);
    });
}

/// How long it takes until no more than so many bytes are mapped.
pub async fn time_to_clear(env: &EnvRef, pod: &Pod, left: u64) -> Duration {
    let begun = env.now();
    while pod.status().logical_bytes > left {
        let waited = env.now().saturating_sub(begun);
        assert!(waited < Duration::from_secs(600), "never ends: {:?}", pod.status());
        env.sleep(Duration::from_millis(10)).await;
    }
    env.now().saturating_sub(begun)
}

#[test]
fn the_number_of_dirty_nodes_is_bounded_however_far_apart_blocks_are() {
    /// Half of each disk. All that is written fits it and is mapped only when the pod is closed.
    const JOURNAL_BYTES: u64 = 16 << 20;
    /// A sixty-fourth of what the pod may hold (`Engine::assembled`), and some more.
    const DIRTY_NODES_MAX: u64 = 300;
    let world = SimEnv::new(1);
    let disks = disks("disk", 6);
    let disks: Vec<&SimDisk> = disks.iter().collect();
    life(&world, async |env| {
        let pod = create_with(&env, &disks, JOURNAL_BYTES).await;
        let volume = create_volume(&pod, "big").await;
        write_a_block_per_leaf(&volume).await;
        pod.close().await.expect("close");
        let (checkpoints, least) = (pod.status().checkpoints, LEAVES / DIRTY_NODES_MAX);
        assert!(checkpoints >= least, "{checkpoints} checkpoints, and it takes {least}");
    });
    world.halt();
}

#[test]
fn a_deleted_volume_is_cleared_without_pauses() {
    let world = SimEnv::new(1);
    let disks = disks("disk", 6);
    let disks: Vec<&SimDisk> = disks.iter().collect();
    pod_with_a_large_map(&world, &disks);
    life(&world, async |env| {
        let pod = open(&env, &disks, false).await;
        pod.delete_volume("big").await.expect("delete");
        let took = time_to_clear(&env, &pod, 0).await;
        assert!(took < Duration::from_secs(2), "it took {took:?}");
        pod.close().await.expect("close");
        assert!(pod.status().segments <= 2, "the catalog is left: {:?}", pod.status());
    });
    life(&world, async |env| {
        let pod = open(&env, &disks, false).await;
        assert_eq!(pod.status().logical_bytes, 0);
        write_a_block_per_leaf(&create_volume(&pod, "big").await).await;
        pod.close().await.expect("close");
    });
    world.halt();
}

#[test]
fn a_trim_of_everything_is_mapped_soon_and_leaves_nothing() {
    let world = SimEnv::new(1);
    let disks = disks("disk", 6);
    let disks: Vec<&SimDisk> = disks.iter().collect();
    pod_with_a_large_map(&world, &disks);
    life(&world, async |env| {
        let pod = open(&env, &disks, false).await;
        let volume = pod.find("big").expect("there");
        // In the middle of a leaf, so that one at each end stays.
        let (first, end) = (LEAF_BYTES / 2, LEAVES * LEAF_BYTES - LEAF_BYTES);
        let trim = Arc::clone(&volume).zero(first, end - first, ZeroMode::Deallocate);
        trim.await.expect("trim");
        let begun = env.now();
        pod.close().await.expect("close");
        let took = env.now().saturating_sub(begun);
        assert!(took < Duration::from_millis(300), "it took {took:?}");
    });
    life(&world, async |env| {
        let pod = open(&env, &disks, false).await;
        let left = 2 * BLOCK as u64;
        let took = time_to_clear(&env, &pod, left).await;
        assert!(took < Duration::from_secs(2), "it took {took:?}");
        assert_eq!(pod.status().logical_bytes, left);
        let volume = pod.find("big").expect("there");
        for leaf in 0..LEAVES {
            let bytes = read_sectors(&volume, leaf * LEAF_BYTES, 8).await.expect("read");
            let kept = leaf == 0 || leaf == LEAVES - 1;
            let expected = if kept { leaf.to_le_bytes()[0] | 1 } else { 0 };
            assert!(bytes.iter().all(|byte| *byte == expected), "leaf {leaf}");
        }
        pod.close().await.expect("close");
    });
    world.halt();
}

/// Three blocks that make three records of one entry: data, zeroes, data.
fn three_records(leaf: u64) -> Bytes {
    let data = [leaf.to_le_bytes()[0] | 1; BLOCK];
    [data, [0; BLOCK], data].concat().into()
}

#[test]
fn a_kill_between_the_checkpoints_of_a_drain_takes_no_part_of_an_entry() {
    const JOURNAL_BYTES: u64 = 16 << 20;
    const ENTRIES: u64 = 1024;
    for checkpoints in 1..=3 {
        let world = SimEnv::new(checkpoints);
        let disks = disks("disk", 6);
        let disks: Vec<&SimDisk> = disks.iter().collect();
        life(&world, async |env| {
            let pod = create_with(&env, &disks, JOURNAL_BYTES).await;
            let volume = create_volume(&pod, "big").await;
            for leaf in 0..ENTRIES {
                let bytes = three_records(leaf);
                Arc::clone(&volume).write(leaf * LEAF_BYTES, bytes).await.expect("write");
            }
            let before = pod.status().checkpoints;
            let enough = async {
                while pod.status().checkpoints < before + checkpoints {
                    env.sleep(Duration::from_micros(100)).await;
                }
            };
            let (close, enough) = (std::pin::pin!(pod.close()), std::pin::pin!(enough));
            let first = select(close, enough).await;
            assert!(matches!(first, Either::Right(_)), "closed before {checkpoints} checkpoints");
        });
        disks.iter().for_each(|disk| disk.kill(&SeededRng::new(checkpoints)));
        life(&world, async |env| {
            let pod = open(&env, &disks, false).await;
            let volume = pod.find("big").expect("there");
            for leaf in 0..ENTRIES {
                let bytes = read_sectors(&volume, leaf * LEAF_BYTES, 24).await.expect("read");
                assert!(bytes == three_records(leaf), "entry {leaf}, {checkpoints} checkpoints");
            }
            pod.close().await.expect("close");
        });
        world.halt();
    }
}

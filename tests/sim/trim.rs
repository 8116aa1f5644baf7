//! Large trims whose leaves are yet to be cleared: nobody waits for that, nothing comes back, and
//! nothing that was written since goes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use weft::device::sim::SimDisk;
use weft::device::sim::SimFaults;
use weft::env::Rng;
use weft::env::sim::SeededRng;
use weft::env::sim::SimEnv;
use weft::format::superblock::JOURNAL_OFFSET;
use weft::volume::VolumeDirectory;
use weft::volume::VolumeRef;
use weft::volume::ZeroMode;
use weft::volume::pod::Pod;

use crate::bulk::BLOCK;
use crate::bulk::LEAF_BYTES;
use crate::bulk::LEAVES;
use crate::bulk::pod_with_a_large_map;
use crate::bulk::time_to_clear;
use crate::fixture::disks;
use crate::fixture::life;
use crate::fixture::open;
use crate::host::read_sectors;
use crate::model::SECTOR;

/// Of the fixture's pods.
const JOURNAL_BYTES: u64 = 1 << 20;
/// Largest write that is all or nothing.
const STEP_BYTES: u64 = 64 << 10;

/// Makes everything but superblocks and journal slower.
fn slow_down(disks: &[&SimDisk], slow_area_by: Duration) {
    let slow_area = JOURNAL_OFFSET + JOURNAL_BYTES..u64::MAX;
    for disk in disks {
        let slow_area = slow_area.clone();
        disk.set_faults(SimFaults { slow_area, slow_area_by, ..SimFaults::default() });
    }
}

/// Writes more than the journal holds to volume `v`, so that what came before is mapped; returns the
/// longest time that a write took.
async fn fill_the_journal(env: &weft::env::EnvRef, pod: &Pod, bytes: u64) -> Duration {
    let volume = pod.find("v").expect("there");
    let rng = SeededRng::new(bytes);
    let mut longest = Duration::ZERO;
    for step in 0..bytes / STEP_BYTES {
        let words = (0..STEP_BYTES / 8).flat_map(|_| rng.random_u64().to_le_bytes());
        let content: Vec<u8> = words.collect();
        let begun = env.now();
        // The same place again and again: the disks are small.
        let offset = step % 16 * STEP_BYTES;
        Arc::clone(&volume).write(offset, Bytes::from(content)).await.expect("write");
        longest = longest.max(env.now().saturating_sub(begun));
    }
    longest
}

async fn trim(volume: &VolumeRef, bytes: Range<u64>) {
    let length = bytes.end - bytes.start;
    Arc::clone(volume).zero(bytes.start, length, ZeroMode::Trim).await.expect("trim");
}

#[test]
fn writes_go_on_while_a_large_trim_is_cleared() {
    let world = SimEnv::new(1);
    let disks = disks("disk", 6);
    let disks: Vec<&SimDisk> = disks.iter().collect();
    pod_with_a_large_map(&world, &disks);
    slow_down(&disks, Duration::from_millis(20));
    life(&world, async |env| {
        let pod = open(&env, &disks, false).await;
        let without = fill_the_journal(&env, &pod, 4 * JOURNAL_BYTES).await;
        trim(&pod.find("big").expect("there"), 0..LEAVES * LEAF_BYTES).await;
        let with = fill_the_journal(&env, &pod, 4 * JOURNAL_BYTES).await;
        println!("the longest write took {without:?} without and {with:?} with a trim");
        assert!(with < without + Duration::from_millis(500), "{with:?}, else {without:?}");
        time_to_clear(&env, &pod, JOURNAL_BYTES).await;
        pod.close().await.expect("close");
    });
    world.halt();
}

/// What the leaves of volume `big` hold: their first block a value, all else nothing.
#[derive(Default)]
struct Leaves(BTreeMap<u64, u8>);

impl Leaves {
    /// As hosts do: in requests that are as long as they can be and end within leaves. Writes the
    /// first leaf of every other request before the next, if there is a value for it.
    async fn trim(&mut self, volume: &VolumeRef, leaves: Range<u64>, between: Option<u8>) {
        const REQUEST_BYTES: u64 = (3 << 29) - BLOCK as u64;
        let (mut at, end) = (leaves.start * LEAF_BYTES, leaves.end * LEAF_BYTES);
        self.0.retain(|leaf, _| !leaves.contains(leaf));
        for request in 0.. {
            let next = end.min(at + REQUEST_BYTES);
            trim(volume, at..next).await;
            if let Some(value) = between.filter(|_| request % 2 == 0) {
                self.write(volume, std::iter::once(at.div_ceil(LEAF_BYTES)), value).await;
            }
            at = next;
            if at == end {
                break;
            }
        }
    }

    async fn write(&mut self, volume: &VolumeRef, leaves: impl Iterator<Item = u64>, value: u8) {
        for leaf in leaves {
            let bytes = Bytes::from(vec![value; BLOCK]);
            Arc::clone(volume).write(leaf * LEAF_BYTES, bytes).await.expect("write");
            self.0.insert(leaf, value);
        }
    }

    async fn check(&self, volume: &VolumeRef) {
        for leaf in 0..LEAVES {
            let sectors = 2 * (BLOCK / SECTOR) as u64;
            let bytes = read_sectors(volume, leaf * LEAF_BYTES, sectors).await.expect("read");
            let value = self.0.get(&leaf).copied().unwrap_or(0);
            assert!(bytes[..BLOCK].iter().all(|byte| *byte == value), "leaf {leaf}: {}", bytes[0]);
            assert!(bytes[BLOCK..].iter().all(|byte| *byte == 0), "leaf {leaf}, second block");
        }
        let mut at = 0;
        while at < LEAVES * LEAF_BYTES {
            let left = LEAVES * LEAF_BYTES - at;
            for extent in Arc::clone(volume).block_status(at, left, 64).await.expect("status") {
                let held = self.0.range(at.div_ceil(LEAF_BYTES)..).next();
                let (leaf, within) = (at / LEAF_BYTES, at % LEAF_BYTES);
                let data = within == 0 && self.0.contains_key(&leaf);
                let end = if data {
                    at + BLOCK as u64
                } else {
                    held.map_or(u64::MAX, |(leaf, _)| leaf * LEAF_BYTES)
                };
                assert!(extent.hole != data && at + extent.bytes <= end, "{extent:?} at {at}");
                at += extent.bytes;
            }
        }
    }

    fn bytes(&self) -> u64 {
        (self.0.len() * BLOCK) as u64
    }
}

#[test]
fn a_kill_while_large_trims_are_cleared_neither_brings_back_nor_takes_anything() {
    let mut killed_under_way = 0;
    for moment in 0..6 {
        let world = SimEnv::new(moment);
        let disks = disks("disk", 6);
        let disks: Vec<&SimDisk> = disks.iter().collect();
        pod_with_a_large_map(&world, &disks);
        slow_down(&disks, Duration::from_millis(3));
        let mut leaves = Leaves::default();
        let some_time = Duration::from_millis(30) * u32::try_from(moment).expect("small");
        for round in 1..=3_u8 {
            killed_under_way += u32::from(life(&world, async |env| {
                let pod = open(&env, &disks, false).await;
                let volume = pod.find("big").expect("there");
                if round > 1 {
                    leaves.check(&volume).await;
                }
                let first = if round == 2 { LEAVES / 3 } else { 0 };
                leaves.write(&volume, (first..LEAVES).step_by(71), 10 * round).await;
                let between = (round == 3).then_some(10 * round + 3);
                leaves.trim(&volume, first..LEAVES, between).await;
                leaves.write(&volume, (0..LEAVES).step_by(97), 10 * round + 1).await;
                fill_the_journal(&env, &pod, JOURNAL_BYTES / 2).await;
                leaves.write(&volume, (5..LEAVES).step_by(89), 10 * round + 2).await;
                env.sleep(some_time).await;
                pod.status().logical_bytes > leaves.bytes() + JOURNAL_BYTES
            }));
            disks.iter().for_each(|disk| disk.kill(&SeededRng::new(moment)));
        }
        let mut stored = 0;
        life(&world, async |env| {
            let pod = open(&env, &disks, false).await;
            let volume = pod.find("big").expect("there");
            leaves.check(&volume).await;
            stored = leaves.bytes() + JOURNAL_BYTES / 2;
            time_to_clear(&env, &pod, stored).await;
            leaves.check(&volume).await;
            pod.close().await.expect("close");
            assert_eq!(pod.status().logical_bytes, stored);
        });
        life(&world, async |env| {
            let pod = open(&env, &disks, false).await;
            let volume = pod.find("big").expect("there");
            leaves.check(&volume).await;
            leaves.trim(&volume, 0..LEAVES, None).await;
            pod.delete_volume("big").await.expect("delete");
            pod.delete_volume("v").await.expect("delete");
            time_to_clear(&env, &pod, 0).await;
            pod.close().await.expect("close");
            assert!(pod.status().segments <= 2, "the catalog is left: {:?}", pod.status());
        });
        world.halt();
    }
    assert!(killed_under_way >= 6, "only {killed_under_way} kills found a trim under way");
}

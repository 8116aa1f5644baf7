//! Requests that cover far more than they may cost: block status and prefetch of a whole volume.
//!
//! Simulated disks; what a request costs is the reads that the devices count.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use weft::device::sim::SimDisk;
use weft::device::sim::SimProfile;
use weft::env::EnvRef;
use weft::env::sim::SimEnv;
use weft::volume::VolumeDirectory;
use weft::volume::VolumeRef;
use weft::volume::ZeroMode;
use weft::volume::pod::FormatOptions;
use weft::volume::pod::OpenOptions;
use weft::volume::pod::Pod;
use weft::volume::pod::VolumeSpec;

const MIB: u64 = 1 << 20;
const VOLUME_BYTES: u64 = 1 << 40;
const CACHE_BYTES: u64 = 4 * MIB;
/// What is zeroed but stays allocated by one request.
const ZEROED_BYTES: u64 = 64 * MIB;

async fn open(env: &EnvRef, disks: &[SimDisk]) -> Arc<Pod> {
    let options = OpenOptions {
        cache_bytes: CACHE_BYTES,
        map_cache_bytes: MIB,
        force: false,
        replace_missing: false,
    };
    let devices = disks.iter().map(|disk| Some(disk.open(env))).collect();
    Pod::open(Arc::clone(env), devices, options).await.expect("open")
}

async fn new_pod(env: &EnvRef, disks: &[SimDisk]) -> Arc<Pod> {
    let devices: Vec<_> = disks.iter().map(|disk| disk.open(env)).collect();
    let format = FormatOptions { data_strips: 4, parity_strips: 2, journal_bytes: 4 * MIB };
    Pod::format(env, &devices, &format).await.expect("format");
    drop(devices);
    let pod = open(env, disks).await;
    let spec = VolumeSpec {
        name: "v".into(),
        size_bytes: VOLUME_BYTES,
        logical_block_bytes: 4096,
        read_only: false,
        write_cache: false,
    };
    pod.create_volume(spec).await.expect("create");
    pod
}

fn device_reads(pod: &Pod) -> u64 {
    pod.status().devices.iter().map(|device| device.reads).sum()
}

/// Runs `prepare` and `ask` on the same volume, in two lives: nothing is in memory for the second.
fn in_two_lives(prepare: impl AsyncFnOnce(VolumeRef), ask: impl AsyncFnOnce(&Pod, VolumeRef)) {
    let world = SimEnv::new(1);
    let disk = |index| SimDisk::new(format!("disk-{index}"), SimProfile::new(64 << 20));
    let disks: Vec<_> = (0..6).map(disk).collect();
    let process = world.process();
    let env: EnvRef = process.clone();
    let first = async {
        let pod = new_pod(&env, &disks).await;
        prepare(pod.find("v").expect("created")).await;
        pod.close().await.expect("close");
    };
    process.run_for(Duration::from_secs(600), first).expect("no progress");
    process.halt();
    let process = world.process();
    let env: EnvRef = process.clone();
    let second = async {
        let pod = open(&env, &disks).await;
        ask(&pod, pod.find("v").expect("there")).await;
        pod.close().await.expect("close");
    };
    process.run_for(Duration::from_secs(600), second).expect("no progress");
    process.halt();
    world.halt();
}

#[test]
fn block_status_of_one_long_run_reads_a_bounded_part_of_the_map_at_a_time() {
    const RUN_BYTES: u64 = 20 * ZEROED_BYTES;
    let prepare = async |volume: VolumeRef| {
        for at in (0..RUN_BYTES).step_by(usize::try_from(ZEROED_BYTES).expect("64 MiB")) {
            let zeroed = Arc::clone(&volume).zero(at, ZEROED_BYTES, ZeroMode::KeepAllocated);
            zeroed.await.expect("zeroed");
        }
    };
    in_two_lives(prepare, async |pod, volume| {
        let (mut at, mut answers) = (0, 0);
        while at < RUN_BYTES {
            let before = device_reads(pod);
            let left = VOLUME_BYTES - at;
            let extents = Arc::clone(&volume).block_status(at, left, 16).await.expect("status");
            // 256 leaves, and the few nodes above them.
            let cost = device_reads(pod) - before;
            assert!(cost < 300, "{cost} reads for one answer");
            let first = extents.first().expect("never nothing");
            assert!(!first.hole && first.zero && first.bytes > 0, "{first:?}");
            at += first.bytes;
            answers += 1;
        }
        assert_eq!((at, answers), (RUN_BYTES, 3), "and the rest is told when asked for");
        let extents = Arc::clone(&volume).block_status(at, VOLUME_BYTES - at, 16).await;
        let extents = extents.expect("status");
        assert_eq!((extents.len(), extents[0].bytes), (1, VOLUME_BYTES - at), "holes cost nothing");
    });
}

#[test]
fn a_prefetch_fills_a_share_of_the_cache_and_no_more() {
    const DATA_BYTES: u64 = 2 * CACHE_BYTES;
    let content = |at: u64| -> Bytes {
        (0..MIB)
            .map(|byte| ((byte ^ at >> 20).wrapping_mul(0x9e37_79b9) >> 13).to_le_bytes()[0])
            .collect()
    };
    let prepare = async |volume: VolumeRef| {
        for step in 0..DATA_BYTES / MIB {
            Arc::clone(&volume).write(step * MIB, content(step * MIB)).await.expect("written");
        }
    };
    in_two_lives(prepare, async |pod, volume| {
        Arc::clone(&volume).prefetch(0, VOLUME_BYTES).await.expect("a hint");
        let cached = pod.status().cache_bytes;
        assert!((CACHE_BYTES / 8..CACHE_BYTES / 2).contains(&cached), "{cached} bytes cached");
        let reads = device_reads(pod);
        assert!(Arc::clone(&volume).read(0, 4096).await.is_ok());
        assert_eq!(device_reads(pod), reads, "what was prefetched is read from RAM");
    });
}

//! A full pod is trimmed at any offset, and takes writes again.
//!
//! Simulated disks, so that no time passes. What only a trim may leave undone, whole blocks being
//! what it gives back, is what there is no room for: the parts of blocks at its ends.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use weft::device::sim::SimDisk;
use weft::device::sim::SimProfile;
use weft::env::EnvRef;
use weft::env::sim::SimEnv;
use weft::error::ErrorKind;
use weft::volume::Piece;
use weft::volume::VolumeDirectory;
use weft::volume::VolumeRef;
use weft::volume::ZeroMode;
use weft::volume::pod::FormatOptions;
use weft::volume::pod::OpenOptions;
use weft::volume::pod::Pod;
use weft::volume::pod::VolumeSpec;

const STEP_BYTES: usize = 64 << 10;
const BLOCK_BYTES: usize = 4096;
const SECTOR_BYTES: u64 = 512;

/// Bytes that do not compress, and are nowhere zero.
fn content(step: u64) -> Bytes {
    let mut state = step + 1;
    let next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0] | 1
    };
    std::iter::repeat_with(next).take(STEP_BYTES).collect()
}

async fn read(volume: &VolumeRef, offset: u64, bytes: usize) -> Vec<u8> {
    let bytes = u32::try_from(bytes).expect("small");
    let pieces = Arc::clone(volume).read(offset, bytes).await.expect("read");
    let mut found = Vec::new();
    for piece in pieces {
        match piece {
            Piece::Zero(length) => found.resize(found.len() + length, 0),
            Piece::Data(data) => found.extend_from_slice(&data),
        }
    }
    found
}

async fn new_pod(env: &EnvRef) -> Arc<Pod> {
    let disks =
        (0..6).map(|index| SimDisk::new(format!("disk-{index}"), SimProfile::new(32 << 20)));
    let devices: Vec<_> = disks.map(|disk| disk.open(env)).collect();
    let format = FormatOptions { data_strips: 4, parity_strips: 2, journal_bytes: 4 << 20 };
    Pod::format(env, &devices, &format).await.expect("format");
    let options = OpenOptions {
        cache_bytes: 1 << 20,
        map_cache_bytes: 1 << 20,
        force: false,
        replace_missing: false,
    };
    let devices = devices.into_iter().map(Some).collect();
    let pod = Pod::open(Arc::clone(env), devices, options).await.expect("open");
    let spec = VolumeSpec {
        name: "v".into(),
        size_bytes: 1 << 30,
        logical_block_bytes: 512,
        read_only: false,
    };
    pod.create_volume(spec).await.expect("create");
    pod
}

/// Writes until there is no room; says how many steps there was.
async fn fill(volume: &VolumeRef) -> u64 {
    for step in 0.. {
        let written = Arc::clone(volume).write(step * STEP_BYTES as u64, content(step)).await;
        if let Err(error) = written {
            assert_eq!(error.kind(), ErrorKind::NoSpace, "{}", error.chain());
            return step;
        }
    }
    unreachable!("the pod is smaller than the volume")
}

async fn trim_a_full_pod(env: EnvRef) {
    let pod = new_pod(&env).await;
    let volume = pod.find("v").expect("created");
    let steps = fill(&volume).await;
    assert!(steps > 64, "{steps} steps fill it");

    // As the file system of a partition that begins at an odd sector: whole blocks in its eyes.
    for (step, count) in [(0, 1), (1, 1), (2, steps / 2)] {
        let (offset, bytes) = (step * STEP_BYTES as u64, count * STEP_BYTES as u64);
        let trim = Arc::clone(&volume).zero(
            offset + SECTOR_BYTES,
            bytes - BLOCK_BYTES as u64,
            ZeroMode::Trim,
        );
        trim.await.expect("a full pod is trimmed");
        let first = read(&volume, offset, BLOCK_BYTES + 1).await;
        assert!(first[..BLOCK_BYTES] == content(step)[..BLOCK_BYTES], "{step}: not all of it");
        assert_eq!(first[BLOCK_BYTES], 0, "{step}: trimmed");
        let last = read(&volume, offset + bytes - BLOCK_BYTES as u64 - 1, BLOCK_BYTES + 1).await;
        let kept = &content(step + count - 1)[STEP_BYTES - BLOCK_BYTES..];
        assert!(last[1..] == *kept && last[0] == 0, "{step}: the end of it");
    }
    let nothing = Arc::clone(&volume).zero(SECTOR_BYTES, BLOCK_BYTES as u64, ZeroMode::Trim).await;
    nothing.expect("a trim without a whole block is one too");

    let room = async {
        let write = || Arc::clone(&volume).write(steps * STEP_BYTES as u64, content(steps));
        while write().await.is_err() {
            env.sleep(Duration::from_millis(100)).await;
        }
    };
    weft::env::timeout(&env, Duration::from_secs(60), room).await.expect("room comes back");
    pod.close().await.expect("close");
}

#[test]
fn a_full_pod_is_trimmed_at_any_offset_and_takes_writes_again() {
    let world = SimEnv::new(1);
    let process = world.process();
    let env: EnvRef = process.clone();
    process.run_for(Duration::from_secs(600), trim_a_full_pod(env)).expect("no progress");
    process.halt();
    world.halt();
}

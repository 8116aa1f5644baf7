//! A lost device is replaced by a blank one: redundancy comes back, and it is real.
//!
//! Six simulated disks, 4+2. Two are lost and replaced; once status says that two may be lost
//! again, two others are, and everything must still read right.

#![expect(clippy::cast_possible_truncation, reason = "the low bits of a pattern")]

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use weft::device::sim::SimDisk;
use weft::device::sim::SimProfile;
use weft::env::EnvRef;
use weft::env::sim::SimEnv;
use weft::error::ErrorKind;
use weft::error::Result;
use weft::volume::Piece;
use weft::volume::VolumeDirectory;
use weft::volume::pod::FormatOptions;
use weft::volume::pod::OpenOptions;
use weft::volume::pod::Pod;
use weft::volume::pod::VolumeSpec;

const STEP_BYTES: usize = 64 << 10;
const STEPS: u64 = 64;

fn disk(name: &str) -> SimDisk {
    SimDisk::new(name, SimProfile::new(32 << 20))
}

async fn open(env: &EnvRef, disks: &[&SimDisk], replace_missing: bool) -> Result<Arc<Pod>> {
    let devices = disks.iter().map(|disk| Some(disk.open(env))).collect();
    let options = OpenOptions {
        cache_bytes: 1 << 20,
        map_cache_bytes: 1 << 20,
        force: false,
        replace_missing,
    };
    Pod::open(Arc::clone(env), devices, options).await
}

fn content(step: u64) -> Vec<u8> {
    (0..STEP_BYTES).map(|at| ((at as u64 * (step + 3)) >> 5) as u8 ^ (at % 7) as u8).collect()
}

async fn write_all(pod: &Pod) {
    let volume = pod.find("v").expect("created");
    for step in 0..STEPS {
        let data = Bytes::from(content(step));
        Arc::clone(&volume).write(step * STEP_BYTES as u64, data).await.expect("write");
    }
}

async fn check_all(pod: &Pod) {
    let volume = pod.find("v").expect("created");
    for step in 0..STEPS {
        let bytes = u32::try_from(STEP_BYTES).expect("small");
        let offset = step * STEP_BYTES as u64;
        let pieces = Arc::clone(&volume).read(offset, bytes).await.expect("read");
        let mut found = Vec::new();
        for piece in pieces {
            match piece {
                Piece::Zero(length) => found.resize(found.len() + length, 0),
                Piece::Data(data) => found.extend_from_slice(&data),
            }
        }
        assert!(found == content(step), "step {step} reads wrong");
    }
}

/// Runs one life of the pod in a process of its own.
fn life<T>(world: &Arc<SimEnv>, work: impl AsyncFnOnce(EnvRef) -> T) -> T {
    let process = world.process();
    let env: EnvRef = process.clone();
    let outcome = process.run_for(Duration::from_secs(600), work(env)).expect("no progress");
    process.halt();
    outcome
}

#[test]
fn replaced_devices_carry_their_share_again() {
    let world = SimEnv::new(1);
    let old: Vec<SimDisk> = (0..6).map(|index| disk(&format!("disk-{index}"))).collect();
    let new = [disk("new-0"), disk("new-1")];
    let all: Vec<&SimDisk> = old.iter().collect();
    life(&world, async |env| {
        let devices: Vec<_> = old.iter().map(|disk| disk.open(&env)).collect();
        let options = FormatOptions { data_strips: 4, parity_strips: 2, journal_bytes: 1 << 20 };
        Pod::format(&env, &devices, &options).await.expect("format");
        let pod = open(&env, &all, false).await.expect("open");
        let spec = VolumeSpec {
            name: "v".into(),
            size_bytes: 1 << 30,
            logical_block_bytes: 4096,
            read_only: false,
            write_cache: false,
        };
        pod.create_volume(spec).await.expect("create");
        write_all(&pod).await;
        pod.close().await.expect("close");
    });

    let replaced = [&new[0], &new[1], &old[2], &old[3], &old[4], &old[5]];
    life(&world, async |env| {
        let pod = open(&env, &replaced, false).await.expect("two may be missing");
        let status = pod.status();
        assert_eq!(status.can_lose, 0, "blank devices do not count unasked");
        assert!(status.segments > 0 && status.segments_degraded == status.segments, "{status:?}");
    });
    life(&world, async |env| {
        let pod = open(&env, &replaced, true).await.expect("replace");
        check_all(&pod).await;
        let mut waited = 0;
        let mut left = pod.status().segments_degraded;
        while pod.status().can_lose < 2 {
            let still = pod.status().segments_degraded;
            assert!(still > 0 && still <= left, "{still} after {left} segments to rebuild");
            left = still;
            env.sleep(Duration::from_secs(1)).await;
            waited += 1;
            assert!(waited < 300, "redundancy does not come back: {:?}", pod.status());
        }
        assert_eq!(pod.status().segments_degraded, 0);
    });
    world_crash(&world, &replaced);

    life(&world, async |env| {
        let pod = open(&env, &replaced[..4], false).await.expect("two others lost");
        check_all(&pod).await;
    });
    life(&world, async |env| {
        let with_old = [&old[0], &new[1], &old[2], &old[3], &old[4], &old[5]];
        let refused = open(&env, &with_old, false).await.map(drop).expect_err("it was replaced");
        assert_eq!(refused.kind(), ErrorKind::InvalidRequest, "{}", refused.chain());
    });
    world.halt();
}

fn world_crash(world: &Arc<SimEnv>, disks: &[&SimDisk]) {
    disks.iter().for_each(|disk| disk.crash(&**world));
}

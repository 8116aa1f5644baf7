//! A device of another length takes the place of one that was lost.
//!
//! Five simulated disks, 2+1: segments go to the emptiest devices, so that the longest holds places
//! that a shorter one does not have.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use weft::device::sim::SimDisk;
use weft::device::sim::SimProfile;
use weft::env::EnvRef;
use weft::env::sim::SimEnv;
use weft::volume::Piece;
use weft::volume::VolumeDirectory;
use weft::volume::VolumeRef;
use weft::volume::pod::FormatOptions;
use weft::volume::pod::OpenOptions;
use weft::volume::pod::Pod;
use weft::volume::pod::VolumeSpec;

const MIB: u64 = 1 << 20;
const PART_BYTES: usize = 64 << 10;
const PARTS: u64 = 1200;
const LIFE_MAX: Duration = Duration::from_secs(600);
/// Redundancy is back within this time.
const REBUILD_MAX: Duration = Duration::from_secs(120);

struct Lab {
    world: Arc<SimEnv>,
    disks: Vec<SimDisk>,
}

impl Lab {
    /// A closed pod on disks of these lengths in MiB, whose volume holds [`PARTS`] parts.
    fn new(lengths: &[u64]) -> Self {
        let disks = lengths.iter().enumerate().map(|(at, length)| disk(at, *length)).collect();
        let lab = Self { world: SimEnv::new(1), disks };
        lab.life(async |env| {
            let devices: Vec<_> = lab.disks.iter().map(|disk| disk.open(&env)).collect();
            let options =
                FormatOptions { data_strips: 2, parity_strips: 1, journal_bytes: 4 * MIB };
            Pod::format(&env, &devices, &options).await.expect("formatted");
            let pod = lab.open(&env).await;
            let spec = VolumeSpec {
                name: "v".into(),
                size_bytes: 1 << 30,
                logical_block_bytes: 4096,
                read_only: false,
                write_cache: false,
            };
            pod.create_volume(spec).await.expect("created");
            let volume = pod.find("v").expect("there");
            for part in 0..PARTS {
                let data = content(part);
                Arc::clone(&volume).write(part * PART_BYTES as u64, data).await.expect("written");
            }
            pod.close().await.expect("closed");
        });
        lab
    }

    fn life(&self, work: impl AsyncFnOnce(EnvRef)) {
        let process = self.world.process();
        let done = process.run_for(LIFE_MAX, work(process.clone()));
        process.halt();
        assert!(done.is_ok(), "no end: {done:?}");
    }

    async fn open(&self, env: &EnvRef) -> Arc<Pod> {
        let devices = self.disks.iter().map(|disk| Some(disk.open(env))).collect();
        let options = OpenOptions {
            cache_bytes: 0,
            map_cache_bytes: MIB,
            force: false,
            replace_missing: true,
        };
        Pod::open(Arc::clone(env), devices, options).await.expect("opened")
    }

    /// Replaces a disk by a blank one of `length` MiB, waits for redundancy, and does without the
    /// next disk.
    fn replace_and_lose_another(&mut self, index: usize, length: u64) {
        self.disks[index] = disk(index, length);
        self.life(async |env| {
            let pod = self.open(&env).await;
            check(&pod.find("v").expect("there")).await;
            let begun = env.now();
            while pod.status().can_lose < 1 {
                assert!(env.now() - begun < REBUILD_MAX, "{:?}", pod.status());
                env.sleep(Duration::from_secs(1)).await;
            }
            assert!(pod.status().devices.iter().all(|device| device.state == "in service"));
            pod.close().await.expect("closed");
        });
        let lost = (index + 1) % self.disks.len();
        self.life(async |env| {
            let pod = self.open(&env).await;
            pod.fail_device(lost, "test");
            check(&pod.find("v").expect("there")).await;
        });
    }
}

fn disk(index: usize, length: u64) -> SimDisk {
    SimDisk::new(format!("disk-{index}"), SimProfile::new(length * MIB))
}

/// Bytes that do not compress.
fn content(part: u64) -> Bytes {
    let mut state = part.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..PART_BYTES).map(step).collect()
}

async fn check(volume: &VolumeRef) {
    for part in 0..PARTS {
        let bytes = u32::try_from(PART_BYTES).expect("small");
        let read = Arc::clone(volume).read(part * PART_BYTES as u64, bytes).await;
        let mut found = Vec::new();
        for piece in read.unwrap_or_else(|error| panic!("part {part}: {}", error.chain())) {
            match piece {
                Piece::Zero(length) => found.resize(found.len() + length, 0),
                Piece::Data(data) => found.extend_from_slice(&data),
            }
        }
        assert!(found == content(part), "part {part}");
    }
}

#[test]
fn a_shorter_device_replaces_the_longest() {
    Lab::new(&[64, 64, 64, 64, 160]).replace_and_lose_another(4, 64);
}

#[test]
fn a_device_of_its_own_length_replaces_the_shortest() {
    Lab::new(&[48, 96, 96, 96, 96]).replace_and_lose_another(0, 48);
}

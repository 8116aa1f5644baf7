//! Devices that hang, are slow or overloaded, or cannot read a sector: what that costs hosts, in virtual time.
//!
//! Six simulated disks, 4+2. That nothing is lost is `tests/sim`'s business; here it is that the
//! trouble of one device stays its own, and that requests and opens do not wait for it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join;
use futures_util::future::join_all;
use weft::device::sim::SimDisk;
use weft::device::sim::SimFaults;
use weft::device::sim::SimProfile;
use weft::env::EnvRef;
use weft::env::sim::SimEnv;
use weft::format::superblock::JOURNAL_OFFSET;
use weft::format::superblock::SLOT_OFFSETS;
use weft::format::unit::UNIT_BYTES;
use weft::volume::Piece;
use weft::volume::VolumeDirectory;
use weft::volume::VolumeRef;
use weft::volume::pod::FormatOptions;
use weft::volume::pod::OpenOptions;
use weft::volume::pod::Pod;
use weft::volume::pod::VolumeSpec;

const DEVICES: usize = 6;
const BLOCK_BYTES: usize = 4096;
/// Blocks of the volume that hold something: far more than the cache does.
const BLOCKS: u64 = 1024;
/// Reads after which a pod knows how quick its devices are, and has earned its hedges.
const READS_UNTIL_WARM: u64 = 1000;

/// A world with a pod in it.
struct Lab {
    world: Arc<SimEnv>,
    disks: Vec<SimDisk>,
}

impl Lab {
    /// A pod whose volume holds [`BLOCKS`] blocks, closed. I/O takes between `latency.0` and
    /// `latency.1`.
    fn new(journal_bytes: u64, latency: (Duration, Duration)) -> Self {
        let mut profile = SimProfile::new(64 << 20);
        (profile.latency_min, profile.latency_max) = latency;
        Self::with(journal_bytes, &profile, BLOCKS)
    }

    /// The same on disks of another kind, with so many blocks.
    fn with(journal_bytes: u64, profile: &SimProfile, blocks: u64) -> Self {
        let disk = |index| SimDisk::new(format!("disk-{index}"), profile.clone());
        let lab = Self { world: SimEnv::new(1), disks: (0..DEVICES).map(disk).collect() };
        lab.life(async |env| {
            let devices: Vec<_> = lab.disks.iter().map(|disk| disk.open(&env)).collect();
            let options = FormatOptions { data_strips: 4, parity_strips: 2, journal_bytes };
            Pod::format(&env, &devices, &options).await.expect("format");
            let pod = lab.open(&env).await;
            let spec = VolumeSpec {
                name: "v".into(),
                size_bytes: 1 << 30,
                logical_block_bytes: 4096,
                read_only: false,
                write_cache: false,
            };
            pod.create_volume(spec).await.expect("create");
            let volume = pod.find("v").expect("created");
            join_all((0..blocks).map(|block| write(&volume, block))).await;
            pod.close().await.expect("close");
        });
        lab
    }

    /// Runs one life of the pod in a process of its own, which is killed at its end.
    fn life<T>(&self, work: impl AsyncFnOnce(EnvRef) -> T) -> T {
        let process = self.world.process();
        let env: EnvRef = process.clone();
        let outcome = process.run_for(Duration::from_secs(600), work(env)).expect("no progress");
        process.halt();
        self.disks.iter().for_each(|disk| disk.kill(&*self.world));
        outcome
    }

    async fn open(&self, env: &EnvRef) -> Arc<Pod> {
        self.open_first(DEVICES, env).await
    }

    /// Opens the pod on its first `count` devices.
    async fn open_first(&self, count: usize, env: &EnvRef) -> Arc<Pod> {
        let devices = self.disks[..count].iter().map(|disk| Some(disk.open(env))).collect();
        let options = OpenOptions {
            cache_bytes: 64 << 10,
            map_cache_bytes: 8 << 20,
            force: false,
            replace_missing: false,
        };
        Pod::open(Arc::clone(env), devices, options).await.expect("open")
    }
}

/// A disk of 20 to 200 us.
const QUICK: (Duration, Duration) = (Duration::from_micros(20), Duration::from_micros(200));

/// Incompressible, and of this block only.
fn content(block: u64) -> Vec<u8> {
    let mut state = block + 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    (0..BLOCK_BYTES).map(|_| next()).collect()
}

async fn write(volume: &VolumeRef, block: u64) {
    let data = Bytes::from(content(block));
    Arc::clone(volume).write(block * BLOCK_BYTES as u64, data).await.expect("write");
}

async fn check(volume: &VolumeRef, block: u64) {
    let bytes = u32::try_from(BLOCK_BYTES).expect("small");
    let pieces = Arc::clone(volume).read(block * BLOCK_BYTES as u64, bytes).await.expect("read");
    let right = match pieces.as_slice() {
        [Piece::Data(data)] => **data == content(block),
        _ => false,
    };
    assert!(right, "block {block} reads wrong");
}

/// Reads blocks one after the other, in an order that no cache helps with, from `from` on; returns
/// how long the slowest took.
async fn check_some(env: &EnvRef, volume: &VolumeRef, from: u64, count: u64) -> Duration {
    let mut slowest = Duration::ZERO;
    for number in from..from + count {
        let begun = env.now();
        check(volume, number * 389 % BLOCKS).await;
        slowest = slowest.max(env.now() - begun);
    }
    slowest
}

fn states(pod: &Pod) -> Vec<String> {
    pod.status().devices.into_iter().map(|device| device.state).collect()
}

#[test]
fn a_device_that_hangs_is_given_up_and_reads_hardly_notice() {
    let lab = Lab::new(1 << 20, QUICK);
    lab.life(async |env| {
        let pod = lab.open(&env).await;
        let volume = pod.find("v").expect("created");
        check_some(&env, &volume, 0, READS_UNTIL_WARM).await;
        lab.disks[2].set_faults(SimFaults { hung: true, ..SimFaults::default() });
        let begun = env.now();
        let mut read = READS_UNTIL_WARM;
        while env.now() - begun < Duration::from_secs(6) {
            let slowest = check_some(&env, &volume, read, 100).await;
            assert!(slowest < Duration::from_millis(20), "a read took {slowest:?}");
            read += 100;
            let held = lab.disks[2].in_flight();
            assert!(held < 30, "{held} reads wait for the device that hangs");
        }
        let mut expected = ["in service"; DEVICES];
        expected[2] = "hung";
        assert_eq!(states(&pod), expected);
    });
    lab.world.halt();
}

#[test]
fn a_device_that_is_always_slow_is_asked_seldom_and_again_when_it_is_well() {
    let lab = Lab::new(1 << 20, QUICK);
    lab.life(async |env| {
        let pod = lab.open(&env).await;
        let volume = pod.find("v").expect("created");
        check_some(&env, &volume, 0, READS_UNTIL_WARM).await;
        let slow_by = Duration::from_millis(100);
        lab.disks[2].set_faults(SimFaults { always_slow_by: slow_by, ..SimFaults::default() });
        let asked = || pod.status().devices[2].reads;
        let (begun, before) = (env.now(), asked());
        // A sixth of them would be some 500 reads of 100 ms each.
        check_some(&env, &volume, 0, 3000).await;
        let took = env.now() - begun;
        assert!(took < Duration::from_secs(5), "{took:?}");
        assert!(asked() > before + 16, "it is asked now and then");

        lab.disks[2].set_faults(SimFaults::default());
        env.sleep(slow_by).await;
        let before = asked();
        check_some(&env, &volume, 0, 600).await;
        let answered = asked() - before;
        assert!(answered > 60, "of 600 reads it answered {answered}");
        assert_eq!(states(&pod), ["in service"; DEVICES]);
    });
    lab.world.halt();
}

#[test]
fn more_reads_at_once_than_devices_do_in_seconds_are_no_reason_to_give_one_up() {
    const MIB: u64 = 1 << 20;
    /// 64 MiB: some 13 seconds' work for disks that do 200 I/Os a second.
    const MANY_BLOCKS: u64 = 64 * MIB / BLOCK_BYTES as u64;
    let mut profile = SimProfile::new(64 << 20);
    profile.service_time = Duration::from_millis(5);
    let lab = Lab::with(8 << 20, &profile, MANY_BLOCKS);
    lab.life(async |env| {
        let pod = lab.open(&env).await;
        let volume = pod.find("v").expect("created");
        let begun = env.now();
        let reads = join_all((0..64).map(|number| {
            let bytes = u32::try_from(MIB).expect("small");
            Arc::clone(&volume).read(number * MIB, bytes)
        }));
        let slowest_write = async {
            let mut slowest = Duration::ZERO;
            for block in 0..10 {
                let begun = env.now();
                write(&volume, MANY_BLOCKS + block).await;
                slowest = slowest.max(env.now() - begun);
            }
            slowest
        };
        let (reads, slowest_write) = join(reads, slowest_write).await;
        let took = env.now() - begun;
        assert_eq!(states(&pod), ["in service"; DEVICES]);
        assert!(took > Duration::from_secs(10), "no overload: {took:?}");
        assert!(slowest_write < Duration::from_secs(1), "a write took {slowest_write:?}");
        let pieces = reads.into_iter().flat_map(|read| read.expect("read"));
        let mut block = 0;
        for piece in pieces {
            let Piece::Data(data) = piece else { panic!("block {block} reads as zero") };
            for part in data.chunks(BLOCK_BYTES) {
                assert!(part == content(block), "block {block} reads wrong");
                block += 1;
            }
        }
        assert_eq!(block, MANY_BLOCKS);
    });
    lab.world.halt();
}

/// Damages every unit of one device that a scrub would look at.
fn damage(pod: &Pod, disks: &[SimDisk], device: usize) {
    for unit in pod.live_units().iter().filter(|unit| unit.device == device) {
        let mut bytes = vec![0; UNIT_BYTES];
        disks[device].peek(unit.offset, &mut bytes);
        bytes.iter_mut().step_by(512).for_each(|byte| *byte = byte.wrapping_add(1));
        disks[device].poke(unit.offset, &bytes);
    }
}

#[test]
fn reads_do_not_wait_for_healing_and_a_close_does() {
    let io = Duration::from_micros(900);
    let lab = Lab::new(1 << 20, (io, io));
    lab.life(async |env| {
        let pod = lab.open(&env).await;
        let volume = pod.find("v").expect("created");
        // So that the map is in memory.
        check_some(&env, &volume, 0, BLOCKS).await;
        damage(&pod, &lab.disks, 2);
        let slowest = check_some(&env, &volume, 0, BLOCKS / 2).await;
        // The strip, and then its range of the others; to heal takes five I/Os more.
        assert!(slowest > io && slowest < io * 3, "{slowest:?}");
        env.sleep(Duration::from_secs(1)).await;
        let device = || pod.status().devices.swap_remove(2);
        let before = device();
        assert!(before.healed > 0 && before.healed == before.checksum_errors, "{before:?}");

        damage(&pod, &lab.disks, 2);
        let mut read = 0;
        while device().checksum_errors == before.checksum_errors {
            check_some(&env, &volume, read, 1).await;
            read += 1;
        }
        assert_eq!(device().healed, before.healed, "it is still being healed");
        pod.close().await.expect("close");
        assert_eq!(device().healed, before.healed + 1, "no heal under way is cut off");
        assert!(lab.disks.iter().all(|disk| disk.in_flight() == 0), "and nothing is left of them");
    });
    lab.world.halt();
}

#[test]
fn an_unreadable_superblock_is_no_reason_to_leave_a_device_out() {
    let lab = Lab::new(1 << 20, QUICK);
    for (disk, slot) in lab.disks.iter().zip(SLOT_OFFSETS) {
        disk.set_faults(SimFaults { bad_area: slot..slot + 4096, ..SimFaults::default() });
    }
    lab.life(async |env| {
        let pod = lab.open(&env).await;
        assert_eq!(states(&pod), ["in service"; DEVICES]);
    });
    lab.world.halt();
}

#[test]
fn bad_sectors_in_the_journals_of_all_devices_lose_no_batch() {
    let lab = Lab::new(1 << 20, QUICK);
    lab.life(async |env| {
        let pod = lab.open(&env).await;
        let volume = pod.find("v").expect("created");
        for block in 0..60 {
            write(&volume, BLOCKS + block).await;
        }
    });
    for (index, disk) in (0..).zip(&lab.disks) {
        let start = JOURNAL_OFFSET + index * (160 << 10) + (100 << 10);
        let bad_area = start..start + (2048 << index);
        disk.set_faults(SimFaults { bad_area, ..SimFaults::default() });
    }
    lab.life(async |env| {
        let pod = lab.open(&env).await;
        assert_eq!(states(&pod), ["in service"; DEVICES]);
        let volume = pod.find("v").expect("created");
        for block in 0..60 {
            check(&volume, BLOCKS + block).await;
        }
    });
    lab.world.halt();
}

#[test]
fn a_full_journal_is_replayed_without_a_device_as_quickly_as_with_it() {
    let io = Duration::from_millis(5);
    let lab = Lab::new(8 << 20, (io, io));
    lab.life(async |env| {
        let pod = lab.open(&env).await;
        let volume = pod.find("v").expect("created");
        for block in 0..400 {
            write(&volume, BLOCKS + block).await;
        }
        let used = pod.status().journal_used_bytes;
        assert!(used > 3 << 20, "the journal holds {used} bytes");
    });
    lab.life(async |env| {
        let begun = env.now();
        let pod = lab.open_first(DEVICES - 1, &env).await;
        let took = env.now() - begun;
        // Some 200 batches need another copy.
        assert!(took < io * 50, "{took:?}");
        let volume = pod.find("v").expect("created");
        for block in 0..400 {
            check(&volume, BLOCKS + block).await;
        }
    });
    lab.world.halt();
}

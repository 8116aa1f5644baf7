//! A pod of which too many devices are missing, opened by force: what is read is what was written,
//! or an error; and the devices that were away hold nothing that is wrong afterwards.
//!
//! Simulated disks, without faults of their own.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use weft::device::sim::SimDisk;
use weft::device::sim::SimFaults;
use weft::device::sim::SimProfile;
use weft::env::EnvRef;
use weft::env::sim::SimEnv;
use weft::env::timeout;
use weft::error::ErrorKind;
use weft::error::Result;
use weft::format::batch::BatchHeader;
use weft::format::superblock::JOURNAL_OFFSET;
use weft::format::superblock::SLOT_OFFSETS;
use weft::format::superblock::SUPERBLOCK_BYTES;
use weft::format::superblock::Superblock;
use weft::units::Lsn;
use weft::volume::Piece;
use weft::volume::VolumeDirectory;
use weft::volume::pod::FormatOptions;
use weft::volume::pod::OpenOptions;
use weft::volume::pod::Pod;
use weft::volume::pod::VolumeSpec;

const STEP_BYTES: usize = 64 << 10;
const STEPS: u64 = 128;
/// Longer than anything may take, in virtual time.
const PATIENCE: Duration = Duration::from_secs(300);

/// Bytes that do not compress, and are nowhere zero.
fn content(step: u64) -> Vec<u8> {
    let mut state = step + 1;
    let next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0] | 1
    };
    std::iter::repeat_with(next).take(STEP_BYTES).collect()
}

async fn open(env: &EnvRef, disks: &[SimDisk], force: bool) -> Result<Arc<Pod>> {
    let options = OpenOptions {
        cache_bytes: 1 << 20,
        map_cache_bytes: 1 << 20,
        force,
        replace_missing: false,
    };
    let devices = disks.iter().map(|disk| Some(disk.open(env))).collect();
    Pod::open(Arc::clone(env), devices, options).await
}

async fn write(pod: &Pod, step: u64, bytes: Vec<u8>) {
    let volume = pod.find("v").expect("created");
    volume.write(step * STEP_BYTES as u64, Bytes::from(bytes)).await.expect("write");
}

async fn read(env: &EnvRef, pod: &Pod, step: u64) -> Result<Vec<u8>> {
    let volume = pod.find("v").expect("created");
    let bytes = u32::try_from(STEP_BYTES).expect("small");
    let read = volume.read(step * STEP_BYTES as u64, bytes);
    let mut found = Vec::new();
    for piece in timeout(env, PATIENCE, read).await.expect("an answer")? {
        match piece {
            Piece::Zero(length) => found.resize(found.len() + length, 0),
            Piece::Data(data) => found.extend_from_slice(&data),
        }
    }
    Ok(found)
}

/// Reads all steps: each is right, or an error. Says how many are right.
async fn readable(env: &EnvRef, pod: &Pod) -> u64 {
    let mut good = 0;
    for step in 0..STEPS {
        let Ok(found) = read(env, pod, step).await else { continue };
        assert!(found == content(step), "step {step} is wrong, and no error");
        good += 1;
    }
    good
}

/// Runs one life of the pod in a process of its own.
fn life<T>(world: &Arc<SimEnv>, work: impl AsyncFnOnce(EnvRef) -> T) -> T {
    let process = world.process();
    let env: EnvRef = process.clone();
    let outcome = process.run_for(Duration::from_secs(3600), work(env)).expect("no progress");
    process.halt();
    outcome
}

async fn create(env: &EnvRef, disks: &[SimDisk], geometry: (usize, usize)) -> Arc<Pod> {
    let devices: Vec<_> = disks.iter().map(|disk| disk.open(env)).collect();
    let format = FormatOptions {
        data_strips: geometry.0,
        parity_strips: geometry.1,
        journal_bytes: 2 << 20,
    };
    Pod::format(env, &devices, &format).await.expect("format");
    drop(devices);
    let pod = open(env, disks, false).await.expect("open");
    create_volume(&pod, "v").await;
    pod
}

async fn create_volume(pod: &Arc<Pod>, name: &str) {
    let spec = VolumeSpec {
        name: name.into(),
        size_bytes: 1 << 30,
        logical_block_bytes: 4096,
        read_only: false,
        write_cache: false,
    };
    pod.create_volume(spec).await.expect("create");
}

fn new_disks(count: usize) -> Vec<SimDisk> {
    let disk = |index| SimDisk::new(format!("disk-{index}"), SimProfile::new(96 << 20));
    (0..count).map(disk).collect()
}

/// What a forced open of the last `left` devices came to: the steps it read right, or a refusal.
fn forced(geometry: (usize, usize), count: usize, left: usize, killed: bool) -> Result<u64> {
    let world = SimEnv::new(7);
    let disks = new_disks(count);
    life(&world, async |env| {
        let pod = create(&env, &disks, geometry).await;
        for step in 0..STEPS {
            write(&pod, step, content(step)).await;
        }
        if !killed {
            pod.close().await.expect("close");
        }
    });
    let rest = &disks[count - left..];
    life(&world, async |env| {
        let refused = open(&env, rest, false).await.map(drop).expect_err("too few");
        assert_eq!(refused.kind(), ErrorKind::DeviceFailed, "{}", refused.chain());
    });
    let outcome = life(&world, async |env| {
        let pod = open(&env, rest, true).await?;
        let good = readable(&env, &pod).await;
        let volume = pod.find("v").expect("there");
        let write = volume.write(512 << 20, Bytes::from(content(0)));
        // Both may fail; neither may hang.
        let written = timeout(&env, PATIENCE, write).await.expect("an answer");
        let enough = left >= geometry.0;
        assert_eq!(written.is_ok(), enough, "{:?}", written.err());
        let _ = timeout(&env, PATIENCE, pod.close()).await.expect("an end");
        Ok(good)
    });
    life(&world, async |env| {
        let pod = open(&env, &disks, false).await.expect("all are back");
        assert_eq!(readable(&env, &pod).await, STEPS, "nothing that was there is lost");
    });
    world.halt();
    outcome
}

#[test]
fn what_a_forced_open_serves_is_right_or_an_error() {
    let good = forced((2, 1), 8, 6, false).expect("opens");
    assert!((1..STEPS).contains(&good), "{good} steps");
    // With fewer devices than data strips, single strips are left.
    let good = forced((4, 2), 6, 3, false).expect("opens");
    assert!((1..STEPS).contains(&good), "{good} steps");
}

#[test]
fn a_forced_open_is_refused_if_what_was_acknowledged_is_known_to_be_missing() {
    for (geometry, count, left) in [((2, 1), 8, 6), ((1, 2), 7, 4)] {
        let refused = forced(geometry, count, left, true).expect_err("refused");
        assert_eq!(refused.kind(), ErrorKind::Corrupt, "{}", refused.chain());
    }
}

/// The first LSNs of the journal's batches that a disk holds.
fn batches_on(disk: &SimDisk) -> BTreeSet<Lsn> {
    let mut slot = [0; SUPERBLOCK_BYTES];
    disk.peek(SLOT_OFFSETS[0], &mut slot);
    let superblock = Superblock::decode(&slot).expect("formatted");
    let mut ring = vec![0; usize::try_from(superblock.journal_bytes).expect("small")];
    disk.peek(JOURNAL_OFFSET, &mut ring);
    let batches = (0..ring.len()).step_by(4096);
    batches
        .filter_map(|at| BatchHeader::decode(&ring[at..], superblock.pod).ok())
        .map(|batch| batch.first_lsn)
        .collect()
}

/// Steps written before devices are lost, and how many of the last ones only these devices have.
const BEFORE: u64 = 7;
const LOST: u64 = 4;

/// A pod of 2+1 on 8 devices that was killed when all it held was in its journal, and those of its
/// disks that have none of the last steps.
fn pod_with_its_last_steps_on_few_disks(world: &Arc<SimEnv>) -> (Vec<SimDisk>, Vec<SimDisk>) {
    let disks = new_disks(8);
    life(world, async |env| {
        let pod = create(&env, &disks, (2, 1)).await;
        for step in 0..BEFORE {
            write(&pod, step, content(step)).await;
        }
        assert_eq!(pod.status().checkpoints, 0, "all is in the journal");
    });
    let batches: BTreeSet<Lsn> = disks.iter().flat_map(batches_on).collect();
    let lost: BTreeSet<Lsn> = batches.into_iter().rev().zip(0..LOST).map(|(lsn, _)| lsn).collect();
    let rest: Vec<SimDisk> =
        disks.iter().filter(|disk| batches_on(disk).is_disjoint(&lost)).cloned().collect();
    assert!((2..7).contains(&rest.len()), "{} disks", rest.len());
    (disks, rest)
}

/// Content of a step that the forced run wrote.
fn forced_content(step: u64) -> Vec<u8> {
    content(1000 + step)
}

/// Steps that the forced run writes: one of those that were lost, and a new one.
const FORCED: [u64; 2] = [BEFORE - LOST, BEFORE];

async fn check_what_force_left(env: &EnvRef, pod: &Pod) {
    for step in 0..=BEFORE {
        let expected = match step {
            step if FORCED.contains(&step) => forced_content(step),
            step if step < BEFORE - LOST => content(step),
            _ => vec![0; STEP_BYTES],
        };
        let found = read(env, pod, step).await.unwrap_or_else(|error| panic!("{}", error.chain()));
        assert!(found == expected, "step {step}");
    }
}

#[test]
fn devices_that_come_back_after_a_forced_open_bring_nothing_back() {
    for closed in [false, true] {
        let world = SimEnv::new(7);
        let (disks, rest) = pod_with_its_last_steps_on_few_disks(&world);
        life(&world, async |env| {
            let pod = open(&env, &rest, true).await.expect("opens");
            for step in FORCED {
                write(&pod, step, forced_content(step)).await;
            }
            check_what_force_left(&env, &pod).await;
            if closed {
                pod.close().await.expect("close");
            }
        });
        life(&world, async |env| {
            let pod = open(&env, &disks, false).await;
            let pod = pod.unwrap_or_else(|error| panic!("closed {closed}: {}", error.chain()));
            check_what_force_left(&env, &pod).await;
            // More than the ring holds; then all devices are as good as each other.
            for step in 0..STEPS {
                write(&pod, 100 + step, content(step)).await;
            }
            while pod.status().segments_degraded > 0 {
                env.sleep(Duration::from_millis(100)).await;
            }
        });
        for away in 0..disks.len() {
            let there: Vec<SimDisk> = [&disks[..away], &disks[away + 1..]].concat();
            life(&world, async |env| {
                let pod = open(&env, &there, false).await.expect("one may be away");
                check_what_force_left(&env, &pod).await;
            });
        }
        world.halt();
    }
}

async fn refusal(env: &EnvRef, disks: &[SimDisk]) -> String {
    let refused = open(env, disks, false).await.map(drop).expect_err("two pods by now");
    assert_eq!(refused.kind(), ErrorKind::InvalidRequest, "{}", refused.chain());
    refused.chain()
}

#[test]
fn two_halves_that_were_both_forced_are_refused_together() {
    let world = SimEnv::new(7);
    let disks = new_disks(8);
    // The volume's creation is on the first two.
    let half = |turn| disks.iter().skip(turn).step_by(2).cloned().collect();
    let halves: [Vec<SimDisk>; 2] = [half(0), half(1)];
    life(&world, async |env| drop(create(&env, &disks, (2, 1)).await));
    for (half, number) in halves.iter().zip(0..) {
        life(&world, async |env| {
            let pod = open(&env, half, true).await.expect("opens");
            write(&pod, 1, content(number)).await;
        });
    }
    life(&world, async |env| {
        let refused = refusal(&env, &disks).await;
        assert!(refused.contains("opened by force without each other"), "{refused}");
    });
    for (half, number) in halves.iter().zip(0..) {
        life(&world, async |env| {
            let pod = open(&env, half, true).await.expect("as good as before");
            assert!(read(&env, &pod, 1).await.expect("there") == content(number));
        });
    }
    world.halt();
}

#[test]
fn devices_that_went_on_without_those_opened_by_force_are_refused_beside_them() {
    let world = SimEnv::new(7);
    let disks = new_disks(8);
    let (current, stale) = disks.split_at(5);
    life(&world, async |env| drop(create(&env, &disks, (2, 1)).await));
    // More of them than may fail lose what they are told, so that nothing shows that they are stale.
    let lost_area = 0..JOURNAL_OFFSET;
    let forgetful = SimFaults { lost_area, ..SimFaults::default() };
    stale.iter().for_each(|disk| disk.set_faults(forgetful.clone()));
    life(&world, async |env| {
        let pod = open(&env, &disks, false).await.expect("opens");
        write(&pod, 1, content(1)).await;
    });
    stale.iter().for_each(|disk| disk.set_faults(SimFaults::default()));
    for closed in [false, true] {
        life(&world, async |env| {
            let pod = open(&env, stale, true).await.expect("opens");
            create_volume(&pod, if closed { "w" } else { "x" }).await;
            if closed {
                pod.close().await.expect("close");
            }
        });
        life(&world, async |env| {
            let refused = refusal(&env, &disks).await;
            let names =
                "Attach either disk-0, disk-1, disk-2, disk-3, disk-4 or disk-5, disk-6, disk-7,";
            assert!(refused.contains(names), "{refused}");
        });
    }
    life(&world, async |env| {
        let pod = open(&env, current, true).await.expect("as good as before");
        assert!(read(&env, &pod, 1).await.expect("there") == content(1));
    });
    world.halt();
}

#[test]
fn an_open_by_force_that_is_refused_for_too_few_devices_leaves_them_as_they_were() {
    let world = SimEnv::new(1);
    let disks = new_disks(3);
    life(&world, async |env| {
        let pod = create(&env, &disks, (1, 1)).await;
        write(&pod, 0, content(0)).await;
    });
    life(&world, async |env| {
        let refused = open(&env, &disks[..1], true).await.map(drop).expect_err("one of three");
        assert!(refused.chain().contains("even by force 2 are needed"), "{}", refused.chain());
    });
    life(&world, async |env| {
        let pod = open(&env, &disks, false).await.expect("opened");
        assert_eq!(pod.status().epoch, 2, "nobody was told of an open by force");
        assert_eq!(read(&env, &pod, 0).await.expect("read"), content(0));
    });
}

//! Pods that run out of room in ways the simulator does not draw: for all devices at once, between
//! requests that each need much, and with trims that leave a little everywhere. On simulated devices.
//!
//! Property: every request ends, with `NoSpace` if it must, what was there stays readable, and room
//! that was given back can be used.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use weft::device::sim::SimDisk;
use weft::device::sim::SimFaults;
use weft::device::sim::SimProfile;
use weft::env::EnvRef;
use weft::env::sim::SimEnv;
use weft::error::ErrorKind;
use weft::error::Result;
use weft::format::superblock::JOURNAL_OFFSET;
use weft::observe::event;
use weft::volume::Piece;
use weft::volume::VolumeDirectory;
use weft::volume::VolumeRef;
use weft::volume::ZeroMode;
use weft::volume::pod::FormatOptions;
use weft::volume::pod::OpenOptions;
use weft::volume::pod::Pod;
use weft::volume::pod::VolumeSpec;

const MIB: u64 = 1 << 20;
const PART_BYTES: usize = 64 << 10;
/// How long a write may wait before it is refused.
const ENDS_WITHIN: Duration = Duration::from_secs(20);
/// In virtual time: no test takes nearly so long unless a request never ends.
const LIFE_MAX: Duration = Duration::from_secs(600);

/// Three disks, 1+1.
const SMALL: FormatOptions = FormatOptions { data_strips: 1, parity_strips: 1, journal_bytes: MIB };
/// Six disks, 4+2.
const WIDE: FormatOptions =
    FormatOptions { data_strips: 4, parity_strips: 2, journal_bytes: 4 * MIB };

/// A pod with a volume `v` that is larger than it.
async fn pod(env: &EnvRef, disks: &[SimDisk], format: &FormatOptions) -> (Arc<Pod>, VolumeRef) {
    let devices: Vec<_> = disks.iter().map(|disk| disk.open(env)).collect();
    Pod::format(env, &devices, format).await.expect("formatted");
    let pod = open(env, disks).await;
    let spec = VolumeSpec {
        name: "v".into(),
        size_bytes: 512 * MIB,
        logical_block_bytes: 512,
        read_only: false,
        write_cache: false,
    };
    pod.create_volume(spec).await.expect("created");
    let volume = pod.find("v").expect("there");
    (pod, volume)
}

async fn open(env: &EnvRef, disks: &[SimDisk]) -> Arc<Pod> {
    let options = OpenOptions {
        cache_bytes: MIB,
        map_cache_bytes: MIB,
        force: false,
        replace_missing: false,
    };
    let devices = disks.iter().map(|disk| Some(disk.open(env))).collect();
    Pod::open(Arc::clone(env), devices, options).await.expect("opened")
}

/// Runs a test's pod until it is closed.
fn to_the_end(work: impl AsyncFnOnce(EnvRef)) {
    let env = SimEnv::new(1);
    let process = env.process();
    let done = process.run_for(LIFE_MAX, work(process.clone()));
    process.halt();
    env.halt();
    assert!(done.is_ok(), "no end: {done:?}");
}

/// Disks with room below their superblocks and journals, as device files have from the beginning.
fn disks(count: usize) -> Vec<SimDisk> {
    disks_of(count, 32 * MIB)
}

fn disks_of(count: usize, bytes: u64) -> Vec<SimDisk> {
    let disk = |at| {
        let disk = SimDisk::new(format!("disk-{at}"), SimProfile::new(bytes));
        disk.poke(0, &vec![1; usize::try_from(JOURNAL_OFFSET + MIB).expect("small")]);
        disk
    };
    (0..count).map(disk).collect()
}

/// Bytes that do not compress.
fn noise(seed: u64, bytes: usize) -> Bytes {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..bytes).map(step).collect()
}

async fn write(volume: &VolumeRef, part: u64) -> Result<()> {
    let data = noise(part, PART_BYTES);
    Arc::clone(volume).write(part * PART_BYTES as u64, data).await
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

async fn check(volume: &VolumeRef, part: u64) {
    let found = read(volume, part * PART_BYTES as u64, PART_BYTES).await;
    assert!(found == noise(part, PART_BYTES), "part {part}");
}

/// As when all device files lie on one file system that something else fills.
#[test]
fn without_room_below_any_device_writes_fail_and_succeed_again_once_there_is() {
    to_the_end(async |own| {
        let disks = disks(3);
        let (pod, volume) = pod(&own, &disks, &SMALL).await;
        for part in 0..16 {
            write(&volume, part).await.expect("written");
        }
        let full = || SimFaults { full: true, ..SimFaults::default() };
        disks.iter().for_each(|disk| disk.set_faults(full()));
        let mut written = 16;
        let error = loop {
            match write(&volume, written).await {
                Ok(()) => written += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{}", error.chain());
        for part in 0..written {
            check(&volume, part).await;
        }
        // Hosts that try again and again fill neither the journal nor wait for it.
        let host = |first: u64| {
            let (volume, own) = (&volume, &own);
            async move {
                for part in first..first + 200 {
                    let begun = own.now();
                    let kind = write(volume, part % 1000).await.map_err(|error| error.kind());
                    assert!(matches!(kind, Ok(()) | Err(ErrorKind::NoSpace)), "{kind:?}");
                    assert!(own.now() - begun < ENDS_WITHIN, "part {part} ended late");
                    own.sleep(Duration::from_millis(20)).await;
                }
            }
        };
        join_all((0..8).map(|at| host(written + at * 100))).await;
        disks.iter().for_each(|disk| disk.set_faults(SimFaults::default()));
        while let Err(error) = write(&volume, written).await {
            assert_eq!(error.kind(), ErrorKind::NoSpace, "{}", error.chain());
            own.sleep(Duration::from_millis(100)).await;
        }
        for part in 0..written {
            check(&volume, part).await;
        }
        pod.close().await.expect("closed");
    });
}

/// For so long that the tries to find room, if each cost a segment, would get to those of the reserve
/// and give them to data. What waits is written once a volume is deleted or trimmed, though the record
/// of that comes after it.
#[test]
fn without_room_below_any_device_for_long_what_is_given_back_makes_room_for_what_waits() {
    make_room_for_what_waits(async |pod| pod.delete_volume("other").await);
    let trim = async |pod: &Pod, at_a_time: u64| {
        let other = pod.find("other").expect("there");
        for offset in (0..OTHER_BYTES).step_by(usize::try_from(at_a_time).expect("64 bits")) {
            Arc::clone(&other).zero(offset, at_a_time, ZeroMode::Trim).await?;
        }
        Ok(())
    };
    make_room_for_what_waits(async |pod| trim(pod, OTHER_BYTES).await);
    make_room_for_what_waits(async |pod| trim(pod, 64 * MIB).await);
}

/// Of the volume that is given back.
const OTHER_BYTES: u64 = 8 << 30;

fn make_room_for_what_waits(give_back: impl AsyncFnOnce(&Pod) -> Result<()>) {
    const LARGE_JOURNAL: FormatOptions =
        FormatOptions { data_strips: 1, parity_strips: 1, journal_bytes: 64 * MIB };
    to_the_end(async |own| {
        let disks = disks_of(3, 128 * MIB);
        for disk in &disks {
            disk.poke(0, &vec![1; usize::try_from(JOURNAL_OFFSET + 64 * MIB).expect("small")]);
        }
        let (pod, volume) = pod(&own, &disks, &LARGE_JOURNAL).await;
        let spec = VolumeSpec {
            name: "other".into(),
            size_bytes: OTHER_BYTES,
            logical_block_bytes: 4096,
            read_only: false,
            write_cache: false,
        };
        pod.create_volume(spec).await.expect("created");
        let other = pod.find("other").expect("there");
        // In as many leaves of the map as it has.
        for leaf in 0..4096 {
            let written = Arc::clone(&other).write(leaf * 2 * MIB, noise(leaf, 4096)).await;
            written.expect("written");
        }
        own.sleep(Duration::from_secs(60)).await;
        disks.iter().for_each(|disk| {
            disk.set_faults(SimFaults { full: true, ..SimFaults::default() });
        });
        let mut written = 0;
        while write(&volume, written).await.is_ok() {
            written += 1;
        }
        own.sleep(Duration::from_secs(300)).await;
        for part in 0..written {
            check(&volume, part).await;
        }
        let waiting = pod.status().buffered_bytes;
        assert!(waiting > 24 * MIB, "{waiting} wait for room");
        give_back(&pod).await.expect("given back");
        let begun = own.now();
        while pod.status().buffered_bytes > waiting - 8 * MIB {
            assert!(own.now() - begun < Duration::from_secs(60), "none comes back");
            own.sleep(Duration::from_millis(100)).await;
        }
        for part in 0..written {
            check(&volume, part).await;
        }
        pod.close().await.expect("closed");
    });
}

/// As above, but no room comes back from outside: only what is trimmed is there.
#[test]
fn without_room_below_any_device_what_was_trimmed_is_used_again() {
    to_the_end(async |own| {
        let disks = disks(3);
        let (pod, volume) = pod(&own, &disks, &SMALL).await;
        for part in 0..64 {
            write(&volume, part).await.expect("written");
        }
        own.sleep(Duration::from_secs(60)).await;
        disks.iter().for_each(|disk| {
            disk.set_faults(SimFaults { full: true, ..SimFaults::default() });
        });
        let mut written = 64;
        while write(&volume, written).await.is_ok() {
            written += 1;
        }
        for round in 0..5 {
            let all = Arc::clone(&volume).zero(0, 512 * MIB, ZeroMode::Deallocate);
            all.await.expect("trimmed");
            let begun = own.now();
            for part in 0..16 {
                while let Err(error) = write(&volume, part).await {
                    assert_eq!(error.kind(), ErrorKind::NoSpace, "{}", error.chain());
                    let waited = own.now() - begun;
                    assert!(waited < Duration::from_secs(60), "round {round}: none comes back");
                    own.sleep(Duration::from_millis(100)).await;
                }
            }
            for part in 0..16 {
                check(&volume, part).await;
            }
            while write(&volume, written).await.is_ok() {
                written = (written + 1) % 4096;
            }
        }
        pod.close().await.expect("closed");
    });
}

#[test]
fn large_writes_that_together_need_more_than_is_free_all_end() {
    to_the_end(async |own| {
        let disks = disks(3);
        let (pod, volume) = pod(&own, &disks, &SMALL).await;
        for round in 0..4 {
            let large = |at: u64| {
                let data = noise(round * 8 + at, usize::try_from(8 * MIB).expect("small"));
                Arc::clone(&volume).write(at * 8 * MIB, data)
            };
            for outcome in join_all((0..8).map(large)).await {
                let kind = outcome.map_err(|error| error.kind());
                assert!(matches!(kind, Ok(()) | Err(ErrorKind::NoSpace)), "{kind:?}");
            }
            let all = Arc::clone(&volume).zero(0, 64 * MIB, ZeroMode::Deallocate);
            all.await.expect("trimmed");
        }
        pod.close().await.expect("closed");
    });
}

#[test]
fn a_catalog_longer_than_a_checkpoint_has_room_for_is_refused() {
    to_the_end(async |own| {
        let disks = disks(3);
        let (pod, volume) = pod(&own, &disks, &SMALL).await;
        let spec = |number: usize| VolumeSpec {
            name: format!("volume-{number}"),
            size_bytes: MIB,
            logical_block_bytes: 4096,
            read_only: false,
            write_cache: false,
        };
        let mut count = 0;
        let error = loop {
            match pod.create_volume(spec(count)).await {
                Ok(_) => count += 1,
                Err(error) => break error,
            }
            assert!(count < 10_000, "never refused");
        };
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{}", error.chain());
        assert!(count > 50, "{count} volumes");
        // With all of them there the pod can be filled, trimmed and filled again.
        for _ in 0..2 {
            for part in (0..1000).chain(0..1000) {
                let kind = write(&volume, part).await.map_err(|error| error.kind());
                assert!(matches!(kind, Ok(()) | Err(ErrorKind::NoSpace)), "{kind:?}");
            }
            let all = Arc::clone(&volume).zero(0, 64 * MIB, ZeroMode::Deallocate);
            all.await.expect("trimmed");
            own.sleep(Duration::from_secs(60)).await;
        }
        write(&volume, 1).await.expect("written");
        pod.delete_volume("volume-0").await.expect("deleted");
        own.sleep(Duration::from_secs(60)).await;
        pod.create_volume(spec(count)).await.expect("room again");
        pod.close().await.expect("closed");
    });
}

/// As by the file system of a partition that begins at an odd sector: what it calls whole blocks are
/// parts of ours at both ends of each trim, for which a full pod has no room.
#[test]
fn a_full_pod_is_trimmed_at_any_offset_and_takes_writes_again() {
    const BLOCK_BYTES: usize = 4096;
    const SECTOR_BYTES: u64 = 512;
    to_the_end(async |own| {
        let disks = disks(6);
        let (pod, volume) = pod(&own, &disks, &WIDE).await;
        let mut written = 0;
        while let Ok(()) = write(&volume, written).await {
            written += 1;
        }
        assert!(written > 64, "{written} parts fill it");
        for part in 0..written / 2 {
            let offset = part * PART_BYTES as u64;
            let bytes = (PART_BYTES - BLOCK_BYTES) as u64;
            let trim = Arc::clone(&volume).zero(offset + SECTOR_BYTES, bytes, ZeroMode::Trim);
            trim.await.expect("a full pod is trimmed");
            let mut expected = noise(part, PART_BYTES).to_vec();
            expected[BLOCK_BYTES..PART_BYTES - BLOCK_BYTES].fill(0);
            let found = read(&volume, offset, PART_BYTES).await;
            assert!(found == expected, "part {part} is not what a trim leaves");
        }
        let nothing = Arc::clone(&volume).zero(SECTOR_BYTES, 4096, ZeroMode::Trim);
        nothing.await.expect("a trim without a whole block is one too");

        // What is left is in the way of nobody: some of each segment, together a third of them.
        let begun = own.now();
        for part in written..written + written / 4 {
            while write(&volume, part).await.is_err() {
                assert!(own.now() - begun < Duration::from_secs(60), "no room comes back");
                own.sleep(Duration::from_millis(100)).await;
            }
        }
        pod.close().await.expect("closed");
    });
}

/// What it had not yet in segments when it was deleted will never be written to any.
#[test]
fn a_deleted_volume_gives_back_what_was_promised_to_it() {
    to_the_end(async |own| {
        let disks = disks(3);
        let format = FormatOptions { journal_bytes: 8 * MIB, ..SMALL };
        let (pod, volume) = pod(&own, &disks, &format).await;
        for round in 0..100 {
            let spec = VolumeSpec {
                name: "short-lived".into(),
                size_bytes: 16 * MIB,
                logical_block_bytes: 4096,
                read_only: false,
                write_cache: false,
            };
            pod.create_volume(spec).await.expect("created");
            let short_lived = pod.find("short-lived").expect("there");
            for part in 0..12 {
                let written = write(&short_lived, part).await;
                written.unwrap_or_else(|error| panic!("round {round}: {}", error.chain()));
            }
            pod.delete_volume("short-lived").await.expect("deleted");
        }
        own.sleep(Duration::from_secs(60)).await;
        let status = pod.status();
        assert_eq!(status.used_bytes, status.physical_bytes, "nothing is promised");
        write(&volume, 1).await.expect("written");
        pod.close().await.expect("closed");
    });
}

/// With a journal many times larger than the reserve, and records of which three fill a unit to
/// three quarters.
#[test]
fn what_is_in_the_journal_finds_room_in_segments_however_it_packs() {
    const RECORD_BYTES: usize = 16 << 10;
    let offset_of = |at: u64| at * RECORD_BYTES as u64;
    to_the_end(async |own| {
        let disks = disks_of(6, 160 * MIB);
        let format = FormatOptions { journal_bytes: 128 * MIB, ..WIDE };
        let (pod, volume) = pod(&own, &disks, &format).await;
        for round in 0..3 {
            let host = |first: u64| {
                let volume = &volume;
                async move {
                    let mut at = first;
                    while offset_of(at) < 512 * MIB {
                        let data = noise(round ^ at, RECORD_BYTES);
                        if Arc::clone(volume).write(offset_of(at), data).await.is_err() {
                            break;
                        }
                        at += 64;
                    }
                    at
                }
            };
            let ends = join_all((0..64).map(host)).await;
            for end in ends.into_iter().filter(|end| *end >= 64) {
                let at = end - 64;
                let found = read(&volume, offset_of(at), RECORD_BYTES).await;
                assert!(found == noise(round ^ at, RECORD_BYTES), "record {at}");
            }
            let all = Arc::clone(&volume).zero(0, 512 * MIB, ZeroMode::Deallocate);
            all.await.expect("trimmed");
            let begun = own.now();
            while let Err(error) = write(&volume, 1).await {
                assert_eq!(error.kind(), ErrorKind::NoSpace, "{}", error.chain());
                assert!(own.now() - begun < Duration::from_secs(60), "no room comes back");
                own.sleep(Duration::from_millis(100)).await;
            }
        }
        pod.close().await.expect("closed");
    });
}

/// A read that finds a part of what it wants in RAM must keep none of it when it gives up.
#[test]
fn a_read_that_must_ask_a_device_after_all_holds_no_room() {
    const BLOCK_BYTES: usize = 4096;
    for map_in_ram in [false, true] {
        to_the_end(async |own| {
            let disks = disks(3);
            let (pod, volume) = pod(&own, &disks, &SMALL).await;
            for offset in [BLOCK_BYTES as u64, MIB] {
                Arc::clone(&volume).write(offset, noise(1, BLOCK_BYTES)).await.expect("written");
            }
            pod.close().await.expect("closed");
            let pod = open(&own, &disks).await;
            let volume = pod.find("v").expect("there");
            if map_in_ram {
                read(&volume, MIB, BLOCK_BYTES).await;
            }
            Arc::clone(&volume).write(0, noise(2, BLOCK_BYTES)).await.expect("written");
            let mut pieces = Vec::new();
            let both = u32::try_from(2 * BLOCK_BYTES).expect("small");
            assert!(!volume.try_read(0, both, &mut pieces).expect("tried"), "{map_in_ram}");
            pod.close().await.expect("closed");
            let status = pod.status();
            assert_eq!(status.used_bytes, status.physical_bytes, "nothing is promised any more");
        });
    }
}

/// A part in each leaf of the map, so that it takes long to clear them all.
#[test]
fn who_writes_while_a_large_trim_of_a_full_pod_is_cleared_waits_and_is_not_refused() {
    const LEAF_BYTES: u64 = 2 * MIB;
    const VOLUME_BYTES: u64 = 8 << 30;
    // Not in order, so that what lies together in a segment is not cleared together.
    let offset_of = |part: u64| part * 1009 % (VOLUME_BYTES / LEAF_BYTES) * LEAF_BYTES;
    to_the_end(async |own| {
        let disks = disks(6);
        let (pod, _) = pod(&own, &disks, &WIDE).await;
        let spec = VolumeSpec {
            name: "big".into(),
            size_bytes: VOLUME_BYTES,
            logical_block_bytes: 4096,
            read_only: false,
            write_cache: false,
        };
        pod.create_volume(spec).await.expect("created");
        let volume = pod.find("big").expect("there");
        let mut written = 0;
        while let Ok(()) =
            Arc::clone(&volume).write(offset_of(written), noise(written, PART_BYTES)).await
        {
            written += 1;
        }
        assert!((512..VOLUME_BYTES / LEAF_BYTES).contains(&written), "{written} parts fill it");
        Arc::clone(&volume).zero(0, VOLUME_BYTES, ZeroMode::Trim).await.expect("trimmed");
        pod.close().await.expect("closed");
        assert!(pod.status().logical_bytes > 0, "nothing is cleared yet");

        let slow_area = JOURNAL_OFFSET + WIDE.journal_bytes..u64::MAX;
        for disk in &disks {
            let (slow_area, slow_area_by) = (slow_area.clone(), Duration::from_millis(5));
            disk.set_faults(SimFaults { slow_area, slow_area_by, ..SimFaults::default() });
        }
        let events = event::after(0).last().map_or(0, |event| event.sequence);
        let pod = open(&own, &disks).await;
        let volume = pod.find("big").expect("there");
        for part in 0..written {
            let bytes = noise(part + 1, PART_BYTES);
            let wrote = Arc::clone(&volume).write(offset_of(part), bytes).await;
            wrote.unwrap_or_else(|error| panic!("part {part}: {}", error.chain()));
        }
        for part in 0..written {
            let found = read(&volume, offset_of(part), PART_BYTES).await;
            assert!(found == noise(part + 1, PART_BYTES), "part {part}");
        }
        pod.close().await.expect("closed");
        let raised = event::after(events);
        let damage = raised.iter().find(|event| event.kind == event::DAMAGE_LEFT.name);
        assert!(damage.is_none(), "what a trim covers is not lost: {damage:?}");
    });
}

/// Zeroes are refused to nobody, but that they are allocated has to be written down: 64 MiB of them at
/// a time here, in a part of the map that is new each time.
#[test]
fn zeroes_that_a_full_pod_has_no_room_to_call_allocated_are_holes() {
    const AT_A_TIME: u64 = 64 * MIB;
    const VOLUME_BYTES: u64 = 256 << 30;
    to_the_end(async |own| {
        let disks = disks(6);
        let (pod, full) = pod(&own, &disks, &WIDE).await;
        let spec = VolumeSpec {
            name: "thin".into(),
            size_bytes: VOLUME_BYTES,
            logical_block_bytes: 4096,
            read_only: false,
            write_cache: false,
        };
        pod.create_volume(spec).await.expect("created");
        let thin = pod.find("thin").expect("there");
        let mut written = 0;
        while let Ok(()) = write(&full, written).await {
            written += 1;
        }
        for offset in (0..VOLUME_BYTES).step_by(usize::try_from(AT_A_TIME).expect("small")) {
            let zero = Arc::clone(&thin).zero(offset, AT_A_TIME, ZeroMode::KeepAllocated);
            zero.await.expect("zeroed");
        }
        // A stop would be one too, but here more is to come.
        own.sleep(Duration::from_secs(60)).await;
        Arc::clone(&full).zero(0, 512 * MIB, ZeroMode::Trim).await.expect("trimmed");
        let begun = own.now();
        for part in 0..written / 2 {
            while write(&full, part).await.is_err() {
                assert!(own.now() - begun < Duration::from_secs(60), "no room comes back");
                own.sleep(Duration::from_millis(100)).await;
            }
        }
        pod.close().await.expect("closed");
    });
}

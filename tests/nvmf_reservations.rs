//! Reservations: two hosts over real sockets, a pod that loses power, and the fence that a change
//! of reservations is.
//!
//! The rules themselves are tested beside them, in `src/target/nvmf/reservation.rs`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use uuid::Uuid;
use weft::device::sim::SimDisk;
use weft::device::sim::SimProfile;
use weft::env::EnvRef;
use weft::env::sim::SimEnv;
use weft::error::ErrorKind;
use weft::volume::Piece;
use weft::volume::VolumeDirectory;
use weft::volume::VolumeRef;
use weft::volume::pod::FormatOptions;
use weft::volume::pod::OpenOptions;
use weft::volume::pod::Pod;
use weft::volume::pod::VolumeSpec;
use weft::volume::reservation::Hold;
use weft::volume::reservation::HoldKind;
use weft::volume::reservation::Reservations;

/// Blocks the hosts fight for.
const BLOCKS: u64 = 24;

fn disks() -> Vec<SimDisk> {
    (0..3).map(|i| SimDisk::new(format!("disk-{i}"), SimProfile::new(32 << 20))).collect()
}

async fn open(env: &EnvRef, disks: &[SimDisk]) -> Arc<Pod> {
    let devices = disks.iter().map(|disk| Some(disk.open(env))).collect();
    let options = OpenOptions {
        cache_bytes: 1 << 20,
        map_cache_bytes: 1 << 20,
        force: false,
        replace_missing: false,
    };
    Pod::open(Arc::clone(env), devices, options).await.unwrap()
}

async fn create(env: &EnvRef, disks: &[SimDisk]) -> Arc<Pod> {
    let devices: Vec<_> = disks.iter().map(|disk| disk.open(env)).collect();
    let format = FormatOptions { data_strips: 2, parity_strips: 1, journal_bytes: 1 << 20 };
    Pod::format(env, &devices, &format).await.unwrap();
    let pod = open(env, disks).await;
    let (name, size_bytes) = ("v".to_owned(), BLOCKS * 4096);
    let spec = VolumeSpec { name, size_bytes, logical_block_bytes: 512, read_only: false };
    pod.create_volume(spec).await.unwrap();
    pod
}

/// Runs one life of the pod in a process of its own; `None` if it took longer than `limit`.
fn life<T>(world: &Arc<SimEnv>, limit: Duration, work: impl AsyncFnOnce(EnvRef) -> T) -> Option<T> {
    let process = world.process();
    let env: EnvRef = process.clone();
    let outcome = process.run_for(limit, work(env)).ok();
    process.halt();
    outcome
}

const LONG: Duration = Duration::from_secs(600);

fn power_loss(world: &Arc<SimEnv>, disks: &[SimDisk]) {
    disks.iter().for_each(|disk| disk.crash(&**world));
}

fn host(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

fn held_by(number: u128, persistent: bool) -> Reservations {
    Reservations {
        generation: 7,
        persistent,
        registrants: [(host(number), u64::MAX), (host(9), 9)].into(),
        held: Some(Hold { kind: HoldKind::WriteExclusive, host: Some(host(number)) }),
    }
}

/// Puts `next` in place of what there is.
async fn reserve(volume: &VolumeRef, next: Reservations) {
    let seen = volume.reservations();
    assert!(Arc::clone(volume).replace_reservations(seen, next).await.unwrap());
}

#[test]
fn what_is_to_outlive_a_restart_does_and_nothing_else() {
    for (persistent, clean) in [(true, false), (true, true), (false, false), (false, true)] {
        let (world, disks) = (SimEnv::new(1), disks());
        let set = life(&world, LONG, async |env| {
            let pod = create(&env, &disks).await;
            let volume = pod.find("v").unwrap();
            reserve(&volume, held_by(1, persistent)).await;
            assert_eq!(*volume.reservations(), held_by(1, persistent));
            if clean {
                pod.close().await.unwrap();
            }
        });
        set.expect("in time");
        power_loss(&world, &disks);
        // Twice, so that it comes from the journal as well as from a checkpoint.
        for _ in 0..2 {
            let kept = life(&world, LONG, async |env| {
                let pod = open(&env, &disks).await;
                let volume = pod.find("v").unwrap();
                let expected = if persistent { held_by(1, true) } else { Reservations::default() };
                assert_eq!(*volume.reservations(), expected);
                let write = Arc::clone(&volume).for_host(host(2)).write(0, Bytes::from("x"));
                let refused = write.await.err().map(|error| error.kind());
                assert_eq!(refused, persistent.then_some(ErrorKind::Reserved));
                pod.close().await.unwrap();
            });
            kept.expect("in time");
        }
        world.halt();
    }
}

/// Power is lost at any moment: the change under way is there or not, those before are.
#[test]
fn what_was_answered_is_there_after_power_loss_at_any_moment() {
    let mut cut_short = 0;
    for seed in 0..40 {
        let (world, disks) = (SimEnv::new(seed), disks());
        let made = life(&world, LONG, async |env| {
            create(&env, &disks).await.close().await.unwrap();
        });
        made.expect("in time");
        let answered = Rc::new(Cell::new(0));
        let counter = Rc::clone(&answered);
        let limit = Duration::from_micros(20_000 + seed * 1_733);
        let ended = life(&world, limit, async |env| {
            let pod = open(&env, &disks).await;
            let volume = pod.find("v").unwrap();
            for generation in 1..=1000 {
                reserve(&volume, Reservations { generation, ..held_by(1, true) }).await;
                counter.set(generation);
            }
        });
        cut_short += u64::from(ended.is_none() && answered.get() > 0);
        power_loss(&world, &disks);
        let found = life(&world, LONG, async |env| {
            let pod = open(&env, &disks).await;
            pod.find("v").unwrap().reservations().generation
        });
        let found = found.expect("in time");
        let answered = answered.get();
        assert!((answered..=answered + 1).contains(&found), "seed {seed}: {found}, {answered}");
        world.halt();
    }
    assert!(cut_short > 10, "only {cut_short} seeds were cut short while they reserved");
}

async fn content(volume: &VolumeRef) -> Vec<u8> {
    let bytes = u32::try_from(volume.size_bytes()).unwrap();
    let mut content = Vec::new();
    for piece in Arc::clone(volume).read(0, bytes).await.unwrap() {
        match piece {
            Piece::Zero(length) => content.resize(content.len() + length, 0),
            Piece::Data(data) => content.extend_from_slice(&data),
        }
    }
    content
}

/// A host writes as fast as it can until it is refused.
async fn write_until_refused(volume: VolumeRef, env: EnvRef) {
    for round in 1.. {
        let at = env.random_u64() % (BLOCKS * 4096 - 9000);
        let data = Bytes::from(vec![u8::try_from(round % 251).unwrap(); 9000]);
        match Arc::clone(&volume).write(at, data).await {
            Ok(()) => {}
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Reserved, "{}", error.chain());
                return;
            }
        }
    }
}

/// Whatever a host has under way when another takes the volume from it: once the other was told,
/// it changes nothing any more.
#[test]
fn a_host_that_is_fenced_changes_nothing_from_then_on() {
    for seed in 0..30 {
        let (world, disks) = (SimEnv::new(seed), disks());
        let fenced = life(&world, LONG, async |env| {
            let pod = create(&env, &disks).await;
            let volume = pod.find("v").unwrap();
            let [old, new] = [1, 2].map(|number| Arc::clone(&volume).for_host(host(number)));
            reserve(&new, held_by(1, true)).await;
            let writing = Rc::new(Cell::new(8));
            for _ in 0..writing.get() {
                let (writing, old, env) = (Rc::clone(&writing), Arc::clone(&old), env.clone());
                let work = write_until_refused(old, env.clone());
                env.spawn(Box::pin(async move {
                    work.await;
                    writing.set(writing.get() - 1);
                }));
            }
            env.sleep(Duration::from_micros(env.random_u64() % 50_000)).await;
            assert_eq!(writing.get(), 8);
            reserve(&new, held_by(2, true)).await;
            let before = content(&new).await;
            assert!(before.iter().any(|byte| *byte != 0), "nothing was ever written");
            env.sleep(Duration::from_secs(5)).await;
            assert_eq!(writing.get(), 0, "some are not refused");
            assert!(content(&new).await == before, "seed {seed}: a fenced host has written");
            Arc::clone(&new).write(0, Bytes::from("mine")).await.unwrap();
            pod.close().await.unwrap();
        });
        fenced.expect("in time");
        world.halt();
    }
}

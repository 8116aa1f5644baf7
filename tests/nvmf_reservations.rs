//! Reservations: two hosts over real sockets, a pod that loses power, and the fence that a change
//! of reservations is.
//!
//! The rules themselves are tested beside them, in `src/target/nvmf/reservation.rs`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::cell::Cell;
use std::fs;
use std::path::PathBuf;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::future::select;
use tokio::runtime;
use tokio::task::LocalSet;
use uuid::Uuid;
use weft::device::DeviceRef;
use weft::device::file::FileDevice;
use weft::device::file::OpenMode;
use weft::device::sim::SimDisk;
use weft::device::sim::SimProfile;
use weft::env::EnvRef;
use weft::env::sim::SimEnv;
use weft::env::tokio_env::TokioEnv;
use weft::error::ErrorKind;
use weft::target::nvmf::subsystem::Subsystem;
use weft::target::nvmf::subsystem::SubsystemOptions;
use weft::target::nvmf::tcp::NvmeTcpOptions;
use weft::target::nvmf::tcp::NvmeTcpTarget;
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

#[path = "nvmf/host.rs"]
#[expect(dead_code, reason = "the other tests of sessions need more of a host")]
mod initiator;

use initiator::Host;
use initiator::READ;
use initiator::WRITE;
use initiator::io;
use initiator::kind;
use initiator::run;
use initiator::serve;
use initiator::sqe;

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
    let spec = VolumeSpec {
        name,
        size_bytes,
        logical_block_bytes: 512,
        read_only: false,
        write_cache: false,
    };
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

/// Another host acts on what it sees, so that must not be taken back.
#[test]
fn what_others_see_is_there_after_power_loss() {
    for seed in 1..20 {
        let (world, disks) = (SimEnv::new(seed), disks());
        let seen = life(&world, LONG, async |env| {
            let pod = create(&env, &disks).await;
            let volume = pod.find("v").unwrap();
            let change = pin!(reserve(&volume, held_by(1, true)));
            let look = async {
                while *volume.reservations() == Reservations::default() {
                    env.sleep(Duration::from_micros(1)).await;
                }
            };
            // The power goes at the very moment it is seen, whether or not it was answered.
            select(pin!(look), change).await;
        });
        seen.expect("in time");
        power_loss(&world, &disks);
        let kept = life(&world, LONG, async |env| {
            let pod = open(&env, &disks).await;
            pod.find("v").unwrap().reservations()
        });
        assert_eq!(*kept.expect("in time"), held_by(1, true), "seed {seed}");
    }
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

#[test]
fn an_administrator_takes_a_volume_off_hosts_that_are_gone() {
    let (world, disks) = (SimEnv::new(1), disks());
    let released = life(&world, LONG, async |env| {
        let pod = create(&env, &disks).await;
        let volume = pod.find("v").unwrap();
        reserve(&volume, held_by(1, true)).await;
        let refused = Arc::clone(&volume).write(0, Bytes::from("x")).await.expect_err("reserved");
        assert_eq!(refused.kind(), ErrorKind::Reserved);
        let generation = volume.reservations().generation;
        let info = pod.clear_reservations("v").await.unwrap();
        assert!(info.reservations.registrants.is_empty() && info.reservations.held.is_none());
        assert_eq!(info.reservations.generation, generation + 1);
        Arc::clone(&volume).write(0, Bytes::from("x")).await.expect("free");
        let unknown = pod.clear_reservations("w").await.expect_err("no such volume");
        assert_eq!(unknown.kind(), ErrorKind::NotFound);
    });
    released.expect("in time");
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

/// Statuses, with DNR.
const INVALID_FIELD: u16 = 0x4002;
const INVALID_NAMESPACE: u16 = 0x400b;
const SEQUENCE_ERROR: u16 = 0x400c;
const SGL_LENGTH: u16 = 0x400f;
const FUSED_FAILED: u16 = 0x009;
const HOST_ID_FORMAT: u16 = 0x4018;
const CONFLICT: u16 = 0x4083;
const NOT_SAVEABLE: u16 = 0x410d;

/// Opcodes.
const REGISTER: u8 = 0x0d;
const REPORT: u8 = 0x0e;
const ACQUIRE: u8 = 0x11;
const RELEASE: u8 = 0x15;

const SET_FEATURES: u8 = 9;
const GET_FEATURES: u8 = 10;
const EVENT_REQUEST: u8 = 12;
/// The event of reservations, as the result of a command that waits for one.
const RESERVATION_EVENT: u32 = 0x0080_0006;

/// A host with a controller: its admin queue and an I/O queue. Its key is its number.
struct Client {
    admin: Host,
    io: Host,
    key: u64,
}

impl Client {
    async fn connect(target: &Arc<NvmeTcpTarget>, number: u8) -> Self {
        let nqn = target.subsystem().nqn().to_owned();
        let (mut admin, _) = Host::open(target).await;
        let (mut io, _) = Host::open(target).await;
        (admin.identity, io.identity) = (number, number);
        admin.begin(0).await;
        let id = admin.connect(&nqn, 0, 31, 0xffff).await;
        admin.set_property(0x14, 0x0046_0001).await;
        io.begin(0).await;
        io.connect(&nqn, 1, 31, id).await;
        Self { admin, io, key: number.into() }
    }

    /// What becomes of a command with its data in the capsule: its status.
    async fn give(&mut self, opcode: u8, nsid: u32, dwords: &[u32], data: &[u8]) -> u16 {
        let length = u32::try_from(data.len()).unwrap();
        let kind = if data.is_empty() { 0x5a } else { 0x01 };
        self.io.command(&sqe(opcode, 5, nsid, dwords, kind, length), data).await;
        let (cid, status) = self.io.next().await.status();
        assert_eq!(cid, 5);
        status
    }

    async fn reserve(&mut self, opcode: u8, options: u32, keys: [u64; 2]) -> u16 {
        let data = keys.map(u64::to_le_bytes).concat();
        self.give(opcode, 1, &[options], &data).await
    }

    /// Registers, as Linux does: to persist.
    async fn register(&mut self) {
        assert_eq!(self.reserve(REGISTER, 3 << 30, [0, self.key]).await, 0);
    }

    async fn acquire(&mut self, kind: u32) -> u16 {
        self.reserve(ACQUIRE, kind << 8, [self.key, 0]).await
    }

    async fn preempt(&mut self, kind: u32, and_abort: bool, victim: u64) -> u16 {
        let action = if and_abort { 2 } else { 1 };
        self.reserve(ACQUIRE, kind << 8 | action, [self.key, victim]).await
    }

    async fn release(&mut self, kind: u32) -> u16 {
        self.reserve(RELEASE, kind << 8, [self.key, 0]).await
    }

    async fn clear(&mut self) -> u16 {
        self.reserve(RELEASE, 1, [self.key, 0]).await
    }

    async fn report(&mut self, bytes: u32) -> Vec<u8> {
        let report = sqe(REPORT, 6, 1, &[bytes / 4 - 1, 1], 0x5a, bytes);
        self.io.command(&report, &[]).await;
        self.io.data(6).await
    }

    async fn write(&mut self) -> u16 {
        self.give(WRITE, 1, &[0, 0, 7], &[9; 4096]).await
    }

    async fn read(&mut self) -> u16 {
        self.io.command(&io(READ, 7, 0, 8), &[]).await;
        let pdu = self.io.next().await;
        if pdu.kind == kind::DATA { 0 } else { pdu.status().1 }
    }

    /// Fused; what becomes of either half.
    async fn compare_and_write(&mut self) -> (u16, u16) {
        for (opcode, cid, fuse) in [(5, 10, 1), (WRITE, 11, 2)] {
            let mut half = sqe(opcode, cid, 1, &[0, 0, 7], 0x01, 4096);
            half[1] |= fuse;
            self.io.command(&half, &[9; 4096]).await;
        }
        let (first, second) = (self.io.next().await.status(), self.io.next().await.status());
        assert_eq!((first.0, second.0), (10, 11));
        (first.1, second.1)
    }

    async fn feature(&mut self, opcode: u8, nsid: u32, id: u32, value: u32) -> (u16, u32) {
        self.admin.command(&sqe(opcode, 3, nsid, &[id, value], 0x5a, 0), &[]).await;
        let pdu = self.admin.next().await;
        (pdu.status().1, pdu.u32(0))
    }

    async fn wait_for_event(&mut self, cid: u16) {
        self.admin.command(&sqe(EVENT_REQUEST, cid, 0, &[], 0x5a, 0), &[]).await;
    }

    /// The oldest notification: count, type, how many more, namespace.
    async fn notification(&mut self) -> (u8, u8, u8, u8) {
        let page = self.admin.log(0x80, 64).await;
        (page[0], page[8], page[9], page[12])
    }
}

#[test]
fn each_type_lets_holders_registrants_and_others_do_what_it_says() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        let mut holder = Client::connect(&served.target, 1).await;
        let mut registrant = Client::connect(&served.target, 2).await;
        let mut other = Client::connect(&served.target, 3).await;
        // A second controller of the holder is the holder.
        let mut second = Client::connect(&served.target, 1).await;
        holder.register().await;
        registrant.register().await;
        let (all, reads, none) = ([0, 0], [0, CONFLICT], [CONFLICT, CONFLICT]);
        let table = [
            (1, [all, reads, reads]),
            (2, [all, none, none]),
            (3, [all, all, reads]),
            (4, [all, all, none]),
            (5, [all, all, reads]),
            (6, [all, all, none]),
        ];
        for (kind, [holders, registrants, others]) in table {
            assert_eq!(holder.acquire(kind).await, 0);
            assert_eq!(holder.acquire(kind % 6 + 1).await, CONFLICT, "of another type");
            let clients = [&mut holder, &mut second, &mut registrant, &mut other];
            for (client, [read, write]) in
                clients.into_iter().zip([holders, holders, registrants, others])
            {
                let who = format!("type {kind}, host {}", client.key);
                assert_eq!(client.write().await, write, "{who}");
                assert_eq!(client.read().await, read, "{who}");
                let compare = client.give(5, 1, &[0, 0, 7], &[9; 4096]).await;
                assert_eq!(compare, read, "{who}");
                assert_eq!(client.give(0x0c, 1, &[0, 0, 7], &[]).await, read, "{who}: verify");
                let together = if write == 0 { (0, 0) } else { (FUSED_FAILED, write) };
                assert_eq!(client.compare_and_write().await, together, "{who}");
                let writes = [
                    (0x00, [0, 0, 0], 0),
                    (0x08, [512, 0, 7], 0),
                    (0x09, [0, 4, 0], 4096),
                    (0x09, [0, 1, 0], 4096),
                ];
                for (opcode, dwords, bytes) in writes {
                    // Of Dataset Management, a range of 8 blocks from block 512.
                    let range = [0, 0, 0, 0, 8, 0, 0, 0, 0, 2];
                    let mut data = vec![0; bytes];
                    data.iter_mut().zip(range).for_each(|(place, byte)| *place = byte);
                    let status = client.give(opcode, 1, &dwords, &data).await;
                    assert_eq!(status, write, "{who}: {opcode:#x}");
                }
                assert_eq!(client.give(0x00, u32::MAX, &[], &[]).await, 0, "nothing is left to do");
                // A user without a host identifier, as over NBD.
                let volume = Arc::clone(&served.volume) as VolumeRef;
                let anyone = Arc::clone(&volume).write(0, Bytes::from(vec![9; 4096])).await;
                assert_eq!(anyone.unwrap_err().kind(), ErrorKind::Reserved);
                assert_eq!(volume.read(0, 1).await.is_ok(), others[0] == 0);
            }
            assert_eq!(other.acquire(kind).await, CONFLICT);
            assert_eq!(other.release(kind).await, CONFLICT);
            assert_eq!(holder.release(kind).await, 0);
            assert_eq!(other.write().await, 0, "nobody holds it any more");
        }
    });
}

#[test]
fn a_preempted_host_is_out_even_with_a_write_half_way() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        let mut old = Client::connect(&served.target, 1).await;
        let mut new = Client::connect(&served.target, 2).await;
        for (round, and_abort) in [(1, false), (2, true)] {
            old.register().await;
            new.register().await;
            assert_eq!(old.acquire(1).await, 0);
            assert_eq!(old.write().await, 0);
            assert_eq!(new.write().await, CONFLICT);
            // Asked for its data before, which comes after.
            old.io.command(&io(WRITE, 20, 0, 8), &[]).await;
            let r2t = old.io.next().await;
            assert_eq!(r2t.kind, kind::R2T);

            assert_eq!(new.preempt(1, and_abort, 77).await, CONFLICT, "nobody's key");
            assert_eq!(new.preempt(1, and_abort, old.key).await, 0);
            let late = old.io.h2c(20, r2t.u16(2), 0, &[round; 4096], true);
            old.io.send(&late).await;
            assert_eq!(old.io.next().await.status(), (20, CONFLICT));
            assert_eq!(old.write().await, CONFLICT);
            assert_eq!(old.acquire(1).await, CONFLICT);
            assert_eq!(new.io.read(9, 0, 8).await, [9; 4096], "the late one was not written");
            assert_eq!(new.clear().await, 0);
        }
    });
}

#[test]
fn hosts_hear_of_what_others_did_to_them() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        let mut one = Client::connect(&served.target, 1).await;
        let mut two = Client::connect(&served.target, 2).await;
        let mut three = Client::connect(&served.target, 3).await;
        for client in [&mut one, &mut two, &mut three] {
            client.register().await;
            client.wait_for_event(40).await;
        }
        assert_eq!(two.acquire(3).await, 0);
        assert!(one.admin.silent().await && three.admin.silent().await);

        // Released: registrants hear of it, but not the one who did it.
        assert_eq!(two.release(3).await, 0);
        for client in [&mut one, &mut three] {
            assert_eq!(client.admin.success(40).await, RESERVATION_EVENT);
        }
        assert!(two.admin.silent().await);
        // No second event until the log was read, which then tells of both.
        one.wait_for_event(41).await;
        assert_eq!(two.acquire(3).await, 0);
        assert_eq!(two.release(3).await, 0);
        assert!(one.admin.silent().await);
        // To look with RAE set takes nothing away.
        let keep = sqe(2, 8, u32::MAX, &[0x80 | 1 << 15 | 15 << 16], 0x5a, 64);
        one.admin.command(&keep, &[]).await;
        assert_eq!(one.admin.data(8).await[..10], [1, 0, 0, 0, 0, 0, 0, 0, 2, 1]);
        assert_eq!(one.notification().await, (1, 2, 1, 1));
        assert_eq!(one.admin.success(41).await, RESERVATION_EVENT);
        assert_eq!(one.notification().await, (2, 2, 0, 1));
        assert_eq!(one.notification().await, (0, 0, 0, 0));

        // Preempted: only the one who is out hears of it. What it does not want to hear, it does
        // not.
        assert_eq!(two.acquire(1).await, 0);
        let mask = 1 << 3;
        assert_eq!(one.feature(SET_FEATURES, u32::MAX, 0x82, mask).await, (0, 0));
        assert_eq!(one.preempt(1, false, 2).await, 0);
        assert_eq!(two.admin.success(40).await, RESERVATION_EVENT);
        assert_eq!(two.notification().await, (1, 1, 0, 1));
        one.wait_for_event(42).await;
        assert_eq!(three.clear().await, 0);
        assert!(one.admin.silent().await, "masked");
        assert_eq!(one.notification().await, (0, 0, 0, 0));
        assert_eq!(two.notification().await, (0, 0, 0, 0), "not a registrant any more");

        // A reset forgets log and mask.
        one.admin.set_property(0x14, 0x0046_0000).await;
        one.admin.set_property(0x14, 0x0046_0001).await;
        assert_eq!(one.feature(GET_FEATURES, 1, 0x82, 0).await, (0, 0));
    });
}

#[test]
fn capabilities_reports_and_features_are_as_the_specification_has_them() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        let mut one = Client::connect(&served.target, 1).await;
        let mut two = Client::connect(&served.target, 2).await;
        assert_ne!(one.admin.identify(1, 0).await[520] & 1 << 5, 0, "ONCS");
        assert_eq!(one.admin.identify(0, 1).await[31], 0xff, "RESCAP");
        let effects = one.admin.log(5, 4096).await;
        for opcode in [REGISTER, REPORT, ACQUIRE, RELEASE] {
            assert_eq!(effects[1024 + 4 * usize::from(opcode)], 1, "{opcode:#x}");
        }

        one.register().await;
        two.register().await;
        assert_eq!(two.acquire(4).await, 0);
        let report = one.report(256).await;
        assert_eq!(report[..10], [2, 0, 0, 0, 4, 2, 0, 0, 0, 1]);
        for (at, number, holds) in [(64, 1, 0), (128, 2, 1)] {
            assert_eq!(report[at..at + 3], [0xff, 0xff, holds]);
            assert_eq!(report[at + 8..at + 16], u64::from(number).to_le_bytes());
            assert_eq!(report[at + 16..at + 32], [number; 16]);
        }
        assert!(report[192..].iter().all(|byte| *byte == 0));
        assert_eq!(one.report(68).await, report[..68]);

        // Persistence, by feature and by register.
        assert_eq!(one.feature(GET_FEATURES, 1, 0x83, 0).await, (0, 1));
        assert_eq!(one.feature(SET_FEATURES, 1, 0x83, 0).await, (0, 0));
        assert_eq!(two.feature(GET_FEATURES, 1, 0x83, 0).await, (0, 0));
        assert_eq!(two.report(64).await[..10], [2, 0, 0, 0, 4, 2, 0, 0, 0, 0]);
        assert_eq!(one.feature(SET_FEATURES, u32::MAX, 0x83, 1).await, (0, 0));
        assert_eq!(two.feature(GET_FEATURES, 1, 0x83, 0).await, (0, 1));
        assert_eq!(one.reserve(REGISTER, 2 << 30, [0, 1]).await, 0);
        assert_eq!(two.feature(GET_FEATURES, 1, 0x83, 0).await, (0, 0));
        // The mask is of each controller.
        assert_eq!(one.feature(SET_FEATURES, 1, 0x82, 0b0110).await, (0, 0));
        assert_eq!(one.feature(GET_FEATURES, 1, 0x82, 0).await, (0, 0b0110));
        assert_eq!(two.feature(GET_FEATURES, 1, 0x82, 0).await, (0, 0));
        assert_eq!(two.feature(GET_FEATURES, 1, 0x82 | 3 << 8, 0).await, (0, 0b110));

        for (opcode, nsid, id, value, status) in [
            (SET_FEATURES, 1, 0x82, 1, INVALID_FIELD),
            (SET_FEATURES, 1, 0x82, 16, INVALID_FIELD),
            (SET_FEATURES, 1, 0x83, 2, INVALID_FIELD),
            (SET_FEATURES, 1, 0x83 | 1 << 31, 1, NOT_SAVEABLE),
            (SET_FEATURES, 5, 0x83, 1, INVALID_NAMESPACE),
            (GET_FEATURES, u32::MAX, 0x82, 0, INVALID_NAMESPACE),
            (GET_FEATURES, 5, 0x83, 0, INVALID_NAMESPACE),
        ] {
            let refused = one.feature(opcode, nsid, id, value).await.0;
            assert_eq!(refused, status, "{opcode:#x} of {id:#x}");
        }
    });
}

#[test]
fn commands_that_make_no_sense_are_refused() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        let mut one = Client::connect(&served.target, 1).await;
        one.register().await;
        let keys = [0; 16];
        for (opcode, nsid, options, data, status) in [
            (REGISTER, u32::MAX, 0, &keys[..], INVALID_NAMESPACE),
            (REGISTER, 5, 0, &keys, INVALID_NAMESPACE),
            (REGISTER, 1, 0, &keys[..8], SGL_LENGTH),
            (REGISTER, 1, 1 << 30, &keys, INVALID_FIELD),
            (REGISTER, 1, 7, &keys, INVALID_FIELD),
            (REGISTER, 1, 0, &keys, CONFLICT),
            (ACQUIRE, 1, 1 << 8, &keys[..12], SGL_LENGTH),
            (ACQUIRE, 1, 7 << 8, &keys, INVALID_FIELD),
            (ACQUIRE, 1, 1 << 8 | 1 << 3, &keys, INVALID_FIELD),
            (ACQUIRE, 1, 1 << 8, &keys, CONFLICT),
            (RELEASE, 1, 0, &[], SGL_LENGTH),
            (RELEASE, 1, 3, &keys, INVALID_FIELD),
            (RELEASE, 1, 0, &keys[..8], CONFLICT),
        ] {
            let refused = one.give(opcode, nsid, &[options], data).await;
            assert_eq!(refused, status, "{opcode:#x} {options:#x} with {} bytes", data.len());
        }
        for (extended, dwords, status) in [(0, 15, HOST_ID_FORMAT), (1, 1 << 19, INVALID_FIELD)] {
            one.io.command(&sqe(REPORT, 5, 1, &[dwords, extended], 0x5a, 64), &[]).await;
            assert_eq!(one.io.next().await.status(), (5, status));
        }
        // A failing pod changes nothing.
        served.volume.fail_with(Some(ErrorKind::Poisoned));
        assert_eq!(one.acquire(1).await, 0x280);
        served.volume.fail_with(None);
        assert_eq!(one.report(64).await[..6], [1, 0, 0, 0, 0, 1]);

        // Nobody without an identifier can hold anything, or passes for another such.
        let mut nameless = Client::connect(&served.target, 0).await;
        nameless.key = 1;
        assert_eq!(nameless.reserve(REGISTER, 0, [0, 1]).await, SEQUENCE_ERROR);
        assert_eq!(nameless.write().await, 0);
        assert_eq!(one.acquire(3).await, 0);
        assert_eq!(nameless.write().await, CONFLICT);
    });
}

/// A pod on files, in a directory that is removed at the end.
struct Files(PathBuf);

impl Files {
    fn devices(&self, create: bool) -> Vec<DeviceRef> {
        let device = |index: usize| -> DeviceRef {
            let path = self.0.join(format!("device-{index}"));
            Arc::new(match create {
                true => FileDevice::create(path, 64 << 20, 0).unwrap(),
                false => FileDevice::open(path, OpenMode::ReadWrite).unwrap(),
            })
        };
        (0..3).map(device).collect()
    }

    /// Serves the pod and ends without closing it, as a node that is killed does.
    fn life(&self, first: bool, hosts: impl AsyncFnOnce(Arc<NvmeTcpTarget>)) {
        let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
        LocalSet::new().block_on(&runtime, async {
            let env: EnvRef = TokioEnv::new();
            if first {
                let format =
                    FormatOptions { data_strips: 2, parity_strips: 1, journal_bytes: 8 << 20 };
                Pod::format(&env, &self.devices(true), &format).await.unwrap();
            }
            let devices = self.devices(false).into_iter().map(Some).collect();
            let options = OpenOptions {
                cache_bytes: 1 << 20,
                map_cache_bytes: 1 << 20,
                force: false,
                replace_missing: false,
            };
            let pod = Pod::open(env, devices, options).await.unwrap();
            if first {
                let (name, size_bytes) = ("v".to_owned(), 16 << 20);
                let spec = VolumeSpec {
                    name,
                    size_bytes,
                    logical_block_bytes: 512,
                    read_only: false,
                    write_cache: false,
                };
                assert_eq!(pod.create_volume(spec).await.unwrap().id, 1);
            }
            let options = SubsystemOptions::new(pod.status().uuid);
            let subsystem = Arc::new(Subsystem::new(pod, options));
            hosts(Arc::new(NvmeTcpTarget::new(subsystem, NvmeTcpOptions::default()))).await;
        });
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_node_that_comes_back_keeps_who_holds_what() {
    let path = std::env::temp_dir().join(format!("weft-reserved-{}", std::process::id()));
    fs::create_dir_all(&path).unwrap();
    let files = Files(path);
    files.life(true, async |target| {
        let mut one = Client::connect(&target, 1).await;
        let mut two = Client::connect(&target, 2).await;
        one.register().await;
        two.register().await;
        assert_eq!(one.acquire(1).await, 0);
        assert_eq!(two.write().await, CONFLICT);
    });
    files.life(false, async |target| {
        let mut one = Client::connect(&target, 1).await;
        let mut two = Client::connect(&target, 2).await;
        assert_eq!(two.write().await, CONFLICT, "held over the restart");
        assert_eq!(one.write().await, 0);
        assert_eq!(two.report(192).await[..10], [2, 0, 0, 0, 1, 2, 0, 0, 0, 1]);
        // From now on not to be kept.
        assert_eq!(two.feature(SET_FEATURES, 1, 0x83, 0).await, (0, 0));
        assert_eq!(two.preempt(2, true, 1).await, 0);
        assert_eq!(one.read().await, CONFLICT);
    });
    files.life(false, async |target| {
        let mut one = Client::connect(&target, 1).await;
        assert_eq!(one.report(128).await, [0; 128]);
        assert_eq!(one.write().await, 0);
        // All at once, each of which is decided on what the one before left.
        let mut clients = Vec::new();
        for number in 1..=6 {
            clients.push(Client::connect(&target, number).await);
        }
        join_all(clients.iter_mut().map(Client::register)).await;
        let acquired = join_all(clients.iter_mut().map(|client| client.acquire(1))).await;
        let won = acquired.iter().filter(|status| **status == 0).count();
        let lost = acquired.iter().filter(|status| **status == CONFLICT).count();
        assert_eq!((won, lost), (1, 5));
        assert_eq!(one.report(64).await[..6], [6, 0, 0, 0, 1, 6]);
    });
}

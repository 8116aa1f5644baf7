//! A volume with a volatile write cache beside one without: what was answered is read at once, a flush
//! makes it durable, and a crash leaves all that was answered before some moment and nothing after.
//!
//! Each volume has one host, which does one thing after the other; so after a crash the volume holds what
//! the first so many of its changes make, and those include all that had to be durable.

use std::cell::Cell;
use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::Either;
use futures_util::future::select;
use futures_util::future::try_join;
use weft::device::sim::SimDisk;
use weft::device::sim::SimFaults;
use weft::env::EnvRef;
use weft::env::Rng;
use weft::env::sim::Choose;
use weft::env::sim::SeededRng;
use weft::env::sim::SimEnv;
use weft::format::superblock::JOURNAL_OFFSET;
use weft::volume::VolumeDirectory;
use weft::volume::VolumeRef;
use weft::volume::ZeroMode;
use weft::volume::pod::Pod;

use crate::fixture::create;
use crate::fixture::create_volume;
use crate::fixture::disks;
use crate::fixture::life;
use crate::fixture::open;
use crate::host::read_sectors;
use crate::model::SECTOR;
use crate::runner;
use crate::world::LIFE_MAX;

/// Of the fixture's pods.
const JOURNAL_BYTES: u64 = 1 << 20;
const BLOCK: usize = 4096;
/// Blocks in use, on both sides of where a leaf of the map ends.
const BLOCKS: u64 = 96;
const FIRST_BYTE: u64 = (2 << 20) - 40 * BLOCK as u64;
/// Blocks of the longest request; it is all or nothing.
const BLOCKS_MAX: u64 = 16;

fn offset_of(block: u64) -> u64 {
    FIRST_BYTE + block * BLOCK as u64
}

/// Content of a block by the value that it has; 0 is zero. Every third does not compress.
fn content(value: u64, block: u64) -> Vec<u8> {
    if value == 0 {
        return vec![0; BLOCK];
    }
    let rng = SeededRng::new(value << 8 | block);
    let noise = if value.is_multiple_of(3) { BLOCK / 8 } else { 40 };
    let words = (1..BLOCK / 8).map(|at| if at < noise { rng.random_u64() } else { value });
    std::iter::once(value).chain(words).flat_map(u64::to_le_bytes).collect()
}

/// These blocks get this value.
struct Change {
    blocks: Range<u64>,
    value: u64,
}

/// What a volume holds, as its host knows.
struct History {
    /// The value of each block once all that is certain was done.
    certain: Vec<u64>,
    /// What was asked for since; only the last may be unanswered.
    changes: Vec<Change>,
    answered: usize,
    values: u64,
}

impl History {
    fn new() -> Self {
        Self { certain: vec![0; BLOCKS as usize], changes: Vec::new(), answered: 0, values: 0 }
    }

    fn ask(&mut self, blocks: Range<u64>, is_zero: bool) -> u64 {
        self.values += 1;
        let value = if is_zero { 0 } else { self.values };
        self.changes.push(Change { blocks, value });
        value
    }

    fn all_is_durable(&mut self) {
        self.certain = self.now();
        self.changes.clear();
        self.answered = 0;
    }

    fn now(&self) -> Vec<u64> {
        self.after(self.changes.len())
    }

    fn after(&self, count: usize) -> Vec<u64> {
        let mut values = self.certain.clone();
        for Change { blocks, value } in &self.changes[..count] {
            values[blocks.start as usize..blocks.end as usize].fill(*value);
        }
        values
    }

    /// After a crash the volume holds this. Says how many answered changes were lost.
    fn settle(&mut self, found: &[u64]) -> Result<usize, String> {
        let counts = (0..=self.changes.len()).rev();
        let Some(count) = counts.into_iter().find(|count| self.after(*count) == found) else {
            let (certain, now) = (&self.certain, self.now());
            return Err(format!("found {found:?}, certain was {certain:?}, answered {now:?}"));
        };
        let lost = self.answered.saturating_sub(count);
        self.changes.truncate(count);
        self.all_is_durable();
        Ok(lost)
    }
}

/// The value of each block; all of it must be there.
async fn values(volume: &VolumeRef, blocks: Range<u64>) -> Result<Vec<u64>, String> {
    let sectors = (blocks.end - blocks.start) * (BLOCK / SECTOR) as u64;
    let bytes = read_sectors(volume, offset_of(blocks.start), sectors).await;
    let bytes = bytes.map_err(|error| format!("read: {}", error.chain()))?;
    blocks
        .zip(bytes.chunks(BLOCK))
        .map(|(block, bytes)| {
            let value = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
            let whole = content(value, block) == bytes;
            whole.then_some(value).ok_or_else(|| format!("block {block}: {value} is damaged"))
        })
        .collect()
}

/// The host of one volume.
struct Host<'a> {
    name: &'a str,
    rng: &'a SeededRng,
    history: &'a RefCell<History>,
}

impl Host<'_> {
    /// What the last crash left.
    async fn settle(&self, pod: &Pod) -> Result<usize, String> {
        let volume = pod.find(self.name).ok_or("the volume is gone")?;
        let found = values(&volume, 0..BLOCKS).await?;
        self.history.borrow_mut().settle(&found).map_err(|what| format!("{}: {what}", self.name))
    }

    /// Works until it is dropped.
    async fn work(&self, env: &EnvRef, pod: &Arc<Pod>) -> Result<(), String> {
        let volume = pod.find(self.name).ok_or("the volume is gone")?;
        loop {
            let step = self.step(pod, &volume).await;
            step.map_err(|what| format!("{}: {what}", self.name))?;
            if self.rng.chance(200_000) {
                env.sleep(Duration::from_micros(self.rng.below(300))).await;
            }
        }
    }

    fn is_cached(&self, pod: &Pod) -> bool {
        pod.volumes().iter().any(|volume| volume.name == self.name && volume.write_cache)
    }

    fn blocks(&self) -> Range<u64> {
        let first = self.rng.below(BLOCKS);
        first..BLOCKS.min(first + 1 + self.rng.below(BLOCKS_MAX))
    }

    async fn step(&self, pod: &Arc<Pod>, volume: &VolumeRef) -> Result<(), String> {
        match self.rng.below(200) {
            0..=139 => self.change(pod, volume).await,
            140..=169 => self.read(volume).await,
            170..=189 => self.status(volume).await,
            190..=195 => {
                let flushed = Arc::clone(volume).flush().await;
                flushed.map_err(|error| format!("flush: {}", error.chain()))?;
                self.history.borrow_mut().all_is_durable();
                Ok(())
            }
            _ => {
                let on = self.name == "v" && (!self.is_cached(pod) || self.rng.chance(700_000));
                let set = pod.set_write_cache(self.name, on).await;
                set.map_err(|error| format!("set the write cache: {}", error.chain()))?;
                if !on {
                    self.history.borrow_mut().all_is_durable();
                }
                Ok(())
            }
        }
    }

    async fn change(&self, pod: &Pod, volume: &VolumeRef) -> Result<(), String> {
        let blocks = self.blocks();
        let is_zero = self.rng.chance(200_000);
        let value = self.history.borrow_mut().ask(blocks.clone(), is_zero);
        let (offset, end) = (offset_of(blocks.start), offset_of(blocks.end));
        let durable = self.rng.chance(10_000);
        let mut volume = Arc::clone(volume);
        if durable {
            volume = volume.write_through();
        }
        let done = if is_zero {
            let modes = [ZeroMode::Trim, ZeroMode::Deallocate, ZeroMode::KeepAllocated];
            volume.zero(offset, end - offset, modes[self.rng.below(3) as usize]).await
        } else {
            let bytes: Vec<u8> = blocks.flat_map(|block| content(value, block)).collect();
            volume.write(offset, Bytes::from(bytes)).await
        };
        done.map_err(|error| format!("change: {}", error.chain()))?;
        let mut history = self.history.borrow_mut();
        history.answered = history.changes.len();
        if durable || !self.is_cached(pod) {
            history.all_is_durable();
        }
        Ok(())
    }

    async fn read(&self, volume: &VolumeRef) -> Result<(), String> {
        let blocks = self.blocks();
        let found = values(volume, blocks.clone()).await?;
        let now = self.history.borrow().now();
        let expected = &now[blocks.start as usize..blocks.end as usize];
        if found != expected {
            return Err(format!("{blocks:?}: read {found:?}, {expected:?} was answered"));
        }
        Ok(())
    }

    /// What is called zero is, and what is called data is not.
    async fn status(&self, volume: &VolumeRef) -> Result<(), String> {
        let bytes = offset_of(BLOCKS) - FIRST_BYTE;
        let extents = Arc::clone(volume).block_status(FIRST_BYTE, bytes, 1000).await;
        let extents = extents.map_err(|error| format!("block status: {}", error.chain()))?;
        let found: Vec<bool> = extents
            .iter()
            .flat_map(|extent| (0..extent.bytes / BLOCK as u64).map(|_| extent.zero))
            .collect();
        let expected: Vec<bool> =
            self.history.borrow().now().iter().map(|value| *value == 0).collect();
        if found != expected {
            return Err(format!("block status: zero are {found:?}, expected {expected:?}"));
        }
        Ok(())
    }
}

struct World {
    env: Arc<SimEnv>,
    rng: SeededRng,
    disks: Vec<SimDisk>,
    /// Of `v`, which has a write cache, and of `d`, which has none.
    histories: [RefCell<History>; 2],
    /// The last life ended with a close.
    closed: Cell<bool>,
}

impl World {
    fn new(seed: u64) -> Self {
        let env = SimEnv::new(seed);
        let histories = [History::new(), History::new()].map(RefCell::new);
        Self {
            env,
            rng: SeededRng::new(seed),
            disks: disks("disk", 6),
            histories,
            closed: Cell::default(),
        }
    }

    fn hosts(&self) -> [Host<'_>; 2] {
        let [cached, durable] = &self.histories;
        [
            Host { name: "v", rng: &self.rng, history: cached },
            Host { name: "d", rng: &self.rng, history: durable },
        ]
    }

    /// Says how many changes were answered and lost.
    fn lives(&self) -> Result<u64, String> {
        let mut lost = 0;
        for life in 0..6 {
            lost += self.life(life).map_err(|what| format!("life {life}: {what}"))?;
        }
        Ok(lost)
    }

    /// In some lives the journals of all devices stall now and then, while checkpoints go on.
    fn draw_stalls(&self) -> bool {
        let stall_ppm = if self.rng.chance(400_000) { self.rng.below(300_000) as u32 } else { 0 };
        for disk in &self.disks {
            let stall_area = JOURNAL_OFFSET..JOURNAL_OFFSET + JOURNAL_BYTES;
            let stall_max = Duration::from_millis(400);
            disk.set_faults(SimFaults { stall_ppm, stall_area, stall_max, ..SimFaults::default() });
        }
        stall_ppm > 0
    }

    fn life(&self, life: u64) -> Result<u64, String> {
        let process = self.env.process();
        let env: EnvRef = process.clone();
        let stalls = self.draw_stalls();
        let longest = if stalls { 1 << 20 } else { 1000 << self.rng.below(8) };
        let length = Duration::from_micros(self.rng.below(longest));
        let closes = self.rng.chance(200_000);
        let outcome = process.run_for(LIFE_MAX, async {
            let disks: Vec<&SimDisk> = self.disks.iter().collect();
            let pod = if life == 0 {
                let pod = create(&env, &disks).await;
                create_volume(&pod, "d").await;
                pod.set_write_cache("v", true).await.expect("set");
                pod
            } else {
                open(&env, &disks, false).await
            };
            self.live(&env, &pod, length, closes).await
        });
        process.halt();
        if self.rng.chance(500_000) {
            self.disks.iter().for_each(|disk| disk.kill(&self.rng));
        } else {
            self.disks.iter().for_each(|disk| disk.crash(&self.rng));
        }
        outcome.map_err(|stalled| format!("no progress: {stalled}"))?
    }

    async fn live(
        &self,
        env: &EnvRef,
        pod: &Arc<Pod>,
        length: Duration,
        closes: bool,
    ) -> Result<u64, String> {
        let [cached, durable] = self.hosts();
        let lost = cached.settle(pod).await?;
        if lost > 0 && self.closed.get() {
            return Err(format!("{lost} answered changes were gone after a close"));
        }
        durable.settle(pod).await?;
        let work = try_join(cached.work(env, pod), durable.work(env, pod));
        let over = env.sleep(length);
        if let Either::Left((Err(what), _)) = select(std::pin::pin!(work), over).await {
            return Err(what);
        }
        if closes {
            pod.close().await.map_err(|error| format!("close: {}", error.chain()))?;
        }
        self.closed.set(closes);
        Ok(lost as u64)
    }
}

/// Runs one seed; says how many changes were answered and lost.
pub fn run(seed: u64) -> Result<u64, String> {
    let world = World::new(seed);
    let outcome = runner::without_panic(|| world.lives());
    runner::halt(&world.env.clone(), world);
    outcome.map_err(|what| format!("seed {seed}: {what}"))
}

#[test]
fn a_crash_leaves_what_was_flushed_and_the_first_of_what_was_answered_since() {
    let Some(losses) = runner::run_some(run) else { return };
    let lost: u64 = losses.iter().sum();
    let enough = losses.len() as u64;
    assert!(lost > enough, "only {lost} answered changes were lost: were all of them durable?");
}

#[test]
fn what_is_answered_and_not_durable_is_an_eighth_of_the_journal_at_most() {
    let world = SimEnv::new(1);
    let disks = disks("disk", 6);
    let all: Vec<&SimDisk> = disks.iter().collect();
    life(&world, async |env| {
        let pod = create(&env, &all).await;
        pod.set_write_cache("v", true).await.expect("set");
        let slow_area = JOURNAL_OFFSET..JOURNAL_OFFSET + JOURNAL_BYTES;
        let slow_area_by = Duration::from_millis(100);
        for disk in &disks {
            let slow_area = slow_area.clone();
            disk.set_faults(SimFaults { slow_area, slow_area_by, ..SimFaults::default() });
        }
        let volume = pod.find("v").expect("there");
        let begun = env.now();
        let mut at_once = 0;
        for block in 0..60 {
            // Every third value does not compress.
            let bytes = Bytes::from(content(3, block));
            Arc::clone(&volume).write(offset_of(block), bytes).await.expect("write");
            at_once += u64::from(env.now() == begun);
        }
        let bytes = at_once * BLOCK as u64;
        assert!((JOURNAL_BYTES / 16..JOURNAL_BYTES / 8).contains(&bytes), "{at_once} at once");
        let before = env.now();
        Arc::clone(&volume).flush().await.expect("flush");
        assert!(env.now() - before >= slow_area_by, "it waits for the journal");
        let before = env.now();
        Arc::clone(&volume).flush().await.expect("flush");
        assert_eq!(env.now(), before, "nothing is left to do");
        pod.close().await.expect("close");
    });
    world.halt();
}

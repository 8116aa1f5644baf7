//! Pods that lose more devices than they can do without and are opened by force; later the devices come
//! back.
//!
//! One host writes, one request after the other. So what a pod holds is told by how many of the writes
//! of each life are there: after a crash all that were acknowledged, after an open by force those that
//! its devices show. What is read narrows that down for good, and in the end every block fits.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::Either;
use futures_util::future::select;
use weft::device::sim::SimDisk;
use weft::device::sim::SimProfile;
use weft::env::EnvRef;
use weft::env::Rng;
use weft::env::sim::Choose;
use weft::env::sim::SeededRng;
use weft::env::sim::SimEnv;
use weft::env::timeout;
use weft::error::ErrorKind;
use weft::format::batch::BatchHeader;
use weft::format::superblock::JOURNAL_OFFSET;
use weft::format::superblock::SLOT_OFFSETS;
use weft::format::superblock::SUPERBLOCK_BYTES;
use weft::format::superblock::Superblock;
use weft::units::Lsn;
use weft::volume::VolumeDirectory;
use weft::volume::pod::FormatOptions;
use weft::volume::pod::OpenOptions;
use weft::volume::pod::Pod;

use crate::fixture::create_volume;
use crate::host::read_sectors;
use crate::runner;
use crate::world::LIFE_MAX;

/// Devices, data and parity strips: those of which there is something to force.
const GEOMETRIES: [(usize, usize, usize); 7] =
    [(6, 1, 1), (7, 1, 2), (6, 2, 1), (8, 2, 1), (7, 3, 2), (6, 3, 1), (6, 4, 2)];
const BLOCK: usize = 4096;
const BLOCKS: u64 = 256;
/// Blocks of the longest write; it is all or nothing.
const WRITE_BLOCKS_MAX: u64 = 16;
/// How long a request or a close may take.
const PATIENCE: Duration = Duration::from_secs(300);
/// What each block that was written begins with.
const MAGIC: u64 = 0xF0_5CED_0B10_C4A5;

/// Content of a block, which says by which write it came. Does not compress, so that it is found in
/// the journal as it is.
fn content(write: u64, block: u64) -> Vec<u8> {
    let rng = SeededRng::new(write << 20 | block);
    let mut bytes: Vec<u8> = (0..BLOCK / 8).flat_map(|_| rng.random_u64().to_le_bytes()).collect();
    for (word, value) in bytes.chunks_mut(8).zip([MAGIC, write, block]) {
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// What one life wrote, in order: of all that, some first part is there.
#[derive(Clone, Default)]
struct Written {
    /// First block, and how many.
    ranges: Vec<(u64, u64)>,
    /// At least so many writes are there.
    least: usize,
    /// And at most so many.
    most: usize,
}

impl Written {
    fn first_to(&self, block: u64, from: usize) -> Option<usize> {
        let covers = |(first, count): &(u64, u64)| (*first..first + count).contains(&block);
        self.ranges.iter().skip(from).position(covers).map(|at| from + at)
    }
}

/// All lives. A write's number is that of the life in the upper half, and its own.
#[derive(Clone, Default)]
struct History(Vec<Written>);

impl History {
    fn parts(write: u64) -> (usize, usize) {
        ((write >> 32) as usize, (write & 0xffff_ffff) as usize)
    }

    /// A write is about to be sent. Returns its number.
    fn issue(&mut self, first: u64, count: u64) -> u64 {
        let life = self.0.len() - 1;
        let written = &mut self.0[life];
        written.ranges.push((first, count));
        written.most = written.ranges.len();
        (life as u64) << 32 | (written.ranges.len() - 1) as u64
    }

    fn acknowledge(&mut self) {
        let written = self.0.last_mut().expect("a life");
        written.least = written.ranges.len();
    }

    /// A block holds what `write` put there, or was never written.
    fn learn(&mut self, block: u64, write: Option<u64>) -> Result<(), String> {
        let of = write.map(Self::parts);
        for (life, written) in self.0.iter_mut().enumerate().rev() {
            let own = of.filter(|(of, _)| *of == life).map(|(_, number)| number);
            if let Some(number) = own {
                written.least = written.least.max(number + 1);
            }
            if let Some(next) = written.first_to(block, own.map_or(0, |number| number + 1)) {
                written.most = written.most.min(next);
            }
            if written.least > written.most {
                let (least, most) = (written.least, written.most);
                return Err(format!("block {block} is of {of:?}: life {life}, {least} > {most}"));
            }
            if own.is_some() {
                return Ok(());
            }
        }
        match of {
            Some(of) => Err(format!("block {block} is of {of:?}, which never was")),
            None => Ok(()),
        }
    }

    /// The pod is opened by force, by devices that show these writes.
    fn may_lose_all_but(&mut self, shown: &BTreeSet<u64>) {
        let (life, count) = shown.last().map_or((0, 0), |last| {
            let (life, number) = Self::parts(*last);
            (life, number + 1)
        });
        for written in self.0.iter_mut().skip(life + 1) {
            written.least = 0;
        }
        for written in self.0.iter_mut().skip(life).take(1) {
            written.least = written.least.min(count);
        }
    }
}

struct Forced {
    rng: SeededRng,
    env: Arc<SimEnv>,
    disks: Vec<SimDisk>,
    data: usize,
    parity: usize,
    journal_bytes: u64,
    history: History,
    /// How many forced opens succeeded.
    opened: u64,
}

impl Forced {
    fn new(seed: u64) -> Self {
        let rng = SeededRng::new(seed);
        let (count, data, parity) = GEOMETRIES[rng.below(7) as usize];
        let disk = |index| SimDisk::new(format!("disk-{index}"), SimProfile::new(32 << 20));
        Self {
            env: SimEnv::new(seed),
            disks: (0..count).map(disk).collect(),
            data,
            parity,
            journal_bytes: (1 << 20) + rng.below(300) * 4096,
            history: History::default(),
            opened: 0,
            rng,
        }
    }

    fn chance(&self, percent: u32) -> bool {
        self.rng.chance(percent * 10_000)
    }

    fn life<T>(&self, life: impl AsyncFnOnce(EnvRef) -> T) -> Result<T, String> {
        let process = self.env.process();
        let env: EnvRef = process.clone();
        let result = process.run_for(LIFE_MAX, life(env));
        process.halt();
        for disk in &self.disks {
            if self.chance(50) { disk.kill(&self.rng) } else { disk.crash(&self.rng) }
        }
        result.map_err(|stalled| format!("no progress: {stalled}"))
    }

    async fn open(&self, env: &EnvRef, there: &[usize]) -> weft::error::Result<Arc<Pod>> {
        let force = there.len() < self.disks.len() - self.parity;
        let options =
            OpenOptions { cache_bytes: 0, map_cache_bytes: 1 << 20, force, replace_missing: false };
        let devices = there.iter().map(|index| Some(self.disks[*index].open(env)));
        Pod::open(Arc::clone(env), devices.collect(), options).await
    }

    fn create(&mut self) -> Result<(), String> {
        let format = FormatOptions {
            data_strips: self.data,
            parity_strips: self.parity,
            journal_bytes: self.journal_bytes,
        };
        let all: Vec<usize> = (0..self.disks.len()).collect();
        self.life(async |env| {
            let devices: Vec<_> = self.disks.iter().map(|disk| disk.open(&env)).collect();
            Pod::format(&env, &devices, &format).await.expect("format");
            let pod = self.open(&env, &all).await.expect("open");
            create_volume(&pod, "v").await;
            // On every device, so that any few of them know the volume.
            if self.chance(50) {
                pod.close().await.expect("close");
            }
        })
    }

    /// The newest superblock of a disk.
    fn superblock(&self, index: usize) -> Superblock {
        let slots = SLOT_OFFSETS.into_iter().filter_map(|offset| {
            let mut slot = [0; SUPERBLOCK_BYTES];
            self.disks[index].peek(offset, &mut slot);
            Superblock::decode(&slot).ok()
        });
        slots.max_by_key(|one| (one.epoch, one.generation)).expect("formatted")
    }

    fn batches(&self, index: usize) -> Vec<(BatchHeader, BTreeSet<u64>)> {
        let pod = self.superblock(index).pod;
        let mut ring = vec![0; self.journal_bytes as usize];
        self.disks[index].peek(JOURNAL_OFFSET, &mut ring);
        let mut batches = Vec::new();
        for at in (0..ring.len()).step_by(4096) {
            let Ok(header) = BatchHeader::decode(&ring[at..], pod) else { continue };
            let in_place = header.position % self.journal_bytes == at as u64;
            let Ok(body) = header.body(&ring[at..]) else { continue };
            let starts = (0..body.len().saturating_sub(24)).step_by(16);
            let writes = starts.filter(|at| word(body, *at) == MAGIC).map(|at| word(body, at + 8));
            if in_place {
                batches.push((header, writes.collect()));
            }
        }
        batches
    }

    /// The writes that these devices show: those of which no batch up to theirs is missing.
    fn shown_by(&self, there: &[usize]) -> BTreeSet<u64> {
        let superblocks = there.iter().map(|index| self.superblock(*index));
        let head = superblocks.max_by_key(|one| (one.epoch, one.generation)).expect("devices");
        let batches: Vec<_> = there.iter().flat_map(|index| self.batches(*index)).collect();
        let mut shown = BTreeSet::new();
        let (mut previous, mut next) = (head.tail_previous, head.tail_lsn);
        for (header, writes) in &batches {
            if header.next_lsn() <= head.tail_lsn {
                shown.extend(writes);
            }
        }
        while let Some((header, writes)) = batches.iter().find(|(header, _)| {
            let void = header.epoch < head.epoch && header.next_lsn() > head.epoch_start;
            header.previous == previous && header.first_lsn == next && !void
        }) {
            shown.extend(writes);
            (previous, next) = (header.checksum, header.next_lsn());
        }
        shown
    }

    /// More devices than may be away: often those with the last batches, or with the newest superblock.
    fn lose_devices(&self) -> Vec<usize> {
        let count = self.disks.len();
        let mut order: Vec<usize> = (0..count).collect();
        for at in 0..count {
            order.swap(at, at + self.rng.below((count - at) as u64) as usize);
        }
        let epoch = |index: &usize| self.superblock(*index).epoch;
        match self.rng.below(3) {
            0 => {
                let newest = |index: &usize| {
                    let lsns = self.batches(*index).into_iter().map(|(header, _)| header.first_lsn);
                    lsns.max().unwrap_or(Lsn(0))
                };
                order.sort_by_key(newest);
            }
            1 => order.sort_by_key(epoch),
            _ => {}
        }
        let (least, most) = (self.parity + 1, count - self.parity - 1);
        order.truncate(least + self.rng.below((most - least + 1) as u64) as usize);
        order
    }

    async fn read_all(&self, pod: &Pod, all: bool, history: &mut History) -> Result<(), String> {
        let Some(volume) = pod.find("v") else {
            // Its creation may have been lost by force, with all that was written to it.
            let lost = history.0.iter().all(|written| written.least == 0);
            return if lost { Ok(()) } else { Err("the volume is gone".into()) };
        };
        for block in 0..BLOCKS {
            let sectors = BLOCK as u64 / 512;
            let bytes = match read_sectors(&volume, block * BLOCK as u64, sectors).await {
                Ok(bytes) => bytes,
                Err(error) if all => return Err(format!("block {block}: {}", error.chain())),
                Err(_) => continue,
            };
            let write = bytes.iter().any(|byte| *byte != 0).then(|| word(&bytes, 8));
            if write.is_some_and(|write| bytes != content(write, block)) {
                return Err(format!("block {block} is damaged"));
            }
            history.learn(block, write)?;
        }
        Ok(())
    }

    /// Writes until one fails; says why.
    async fn write(&self, pod: &Pod, history: &mut History) -> Option<String> {
        let volume = pod.find("v")?;
        history.0.push(Written::default());
        for _ in 0..self.rng.below(1 << self.rng.below(6)) {
            let count = 1 + self.rng.below(WRITE_BLOCKS_MAX);
            let first = self.rng.below(BLOCKS - count + 1);
            let write = history.issue(first, count);
            let bytes: Vec<u8> =
                (first..first + count).flat_map(|block| content(write, block)).collect();
            let written = Arc::clone(&volume).write(first * BLOCK as u64, Bytes::from(bytes)).await;
            if let Err(error) = written {
                return Some(error.chain());
            }
            history.acknowledge();
        }
        None
    }

    /// A life with all devices; everything must be there.
    fn whole_life(&mut self) -> Result<(), String> {
        let all: Vec<usize> = (0..self.disks.len()).collect();
        let mut history = self.history.clone();
        let limit =
            Duration::from_micros(self.rng.below(if self.chance(30) { 3_000 } else { 100_000 }));
        let cut = self.chance(70);
        let result = self.life(async |env| {
            let life = async {
                let pod = self.open(&env, &all).await.map_err(|error| error.chain())?;
                self.read_all(&pod, true, &mut history).await?;
                if let Some(error) = self.write(&pod, &mut history).await {
                    return Err(format!("write: {error}"));
                }
                pod.close().await.map_err(|error| error.chain())
            };
            if !cut {
                return life.await;
            }
            match select(std::pin::pin!(life), env.sleep(limit)).await {
                Either::Left((outcome, _)) => outcome,
                Either::Right(_) => Ok(()),
            }
        });
        self.history = history;
        result?
    }

    /// A life with too few devices.
    fn forced_life(&mut self, there: &[usize]) -> Result<(), String> {
        let mut history = self.history.clone();
        history.may_lose_all_but(&self.shown_by(there));
        let before: Vec<u64> = there.iter().map(|index| self.superblock(*index).epoch).collect();
        let limit = Duration::from_micros(self.rng.below(3_000));
        let (cut, close) = (self.chance(15), self.chance(50));
        let mut opened = false;
        let result = self.life(async |env| {
            let life = async {
                let pod = match self.open(&env, there).await {
                    Ok(pod) => pod,
                    Err(error) => {
                        use ErrorKind::{Corrupt, DeviceFailed};
                        let clear = matches!(error.kind(), Corrupt | DeviceFailed);
                        return if clear { Ok(()) } else { Err(error.chain()) };
                    }
                };
                opened = pod.find("v").is_some();
                if !opened {
                    return Ok(()); // Its creation was among the last batches.
                }
                self.read_all(&pod, false, &mut history).await?;
                let failed = self.write(&pod, &mut history).await;
                if there.len() >= self.data
                    && let Some(error) = failed
                {
                    tracing::debug!(error, "a write failed");
                }
                if close {
                    let _ = timeout(&env, PATIENCE, pod.close()).await.ok_or("close hangs")?;
                }
                Ok(())
            };
            if !cut {
                return life.await;
            }
            match select(std::pin::pin!(life), env.sleep(limit)).await {
                Either::Left((outcome, _)) => outcome,
                Either::Right(_) => Ok(()),
            }
        });
        let after: Vec<u64> = there.iter().map(|index| self.superblock(*index).epoch).collect();
        if before != after {
            self.history = history;
        }
        self.opened += u64::from(opened);
        result?
    }

    fn all_know_how_often_force_was_used(&self) -> bool {
        let forced = |index: usize| self.superblock(index).epoch >> 32;
        (0..self.disks.len()).all(|index| forced(index) == forced(0))
    }

    /// Whether devices were told of a run that those opened by force knew nothing of.
    fn is_two_pods(&self) -> bool {
        let epochs = || (0..self.disks.len()).map(|index| self.superblock(index).epoch);
        let not_forced = |epoch: u64| epoch & 0xffff_ffff;
        epochs().map(not_forced).max() > epochs().max().map(not_forced)
    }

    fn lives(&mut self) -> Result<u64, String> {
        self.create()?;
        let mut there = Vec::new();
        for round in 0..1 + self.rng.below(3) {
            self.whole_life().map_err(|what| format!("round {round}: {what}"))?;
            // Never others as long as not all know of the last time: two halves would be forced.
            if self.all_know_how_often_force_was_used() {
                there = self.lose_devices();
            }
            for _ in 0..1 + self.rng.below(2) {
                self.forced_life(&there)
                    .map_err(|what| format!("round {round}, forced {there:?}: {what}"))?;
            }
            if self.is_two_pods() {
                let back = self.whole_life();
                let refused = back.as_ref().is_err_and(|what| what.contains("two pods now"));
                return if refused { Ok(self.opened) } else { Err(format!("two pods: {back:?}")) };
            }
        }
        self.whole_life().map_err(|what| format!("all are back: {what}"))?;
        self.whole_life().map_err(|what| format!("last life: {what}"))?;
        Ok(self.opened)
    }
}

/// Runs one seed; says how many opens by force succeeded.
pub fn run(seed: u64) -> Result<u64, String> {
    let mut world = Forced::new(seed);
    let outcome = runner::without_panic(|| world.lives());
    runner::halt(&world.env.clone(), world);
    outcome.map_err(|what| format!("seed {seed}: {what}"))
}

#[test]
fn what_force_left_is_kept_when_the_devices_come_back() {
    let Some(opens) = runner::run_some(run) else { return };
    let opened = opens.iter().filter(|opened| **opened > 0).count();
    assert!(opened * 4 > opens.len(), "{opened} of {} seeds opened by force", opens.len());
}

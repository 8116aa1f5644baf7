//! What a seed draws before it begins: geometry, sizes, load, and which faults exist at all.

use std::ops::Range;
use std::time::Duration;

use weft::device::sim::SimFaults;
use weft::env::sim::Choose;
use weft::env::sim::SeededRng;
use weft::format::superblock::JOURNAL_OFFSET;
use weft::format::superblock::SLOT_OFFSETS;

use crate::model::SECTOR;
use crate::script::Script;
use crate::world::VOLUME_BYTES;

/// The draw of a seed.
pub struct Swarm {
    pub devices: usize,
    pub data: usize,
    pub parity: usize,
    pub device_bytes: u64,
    /// Bytes of the journal's ring.
    pub journal_bytes: u64,
    /// Hosts use windows of so many sectors, spread over the volume so that maps have depth.
    pub window_sectors: u64,
    pub windows: u64,
    /// Bytes by which windows lie later than they would otherwise.
    window_shift: u64,
    pub hosts: usize,
    pub operations: u64,
    pub lives: usize,
    /// Devices that may misbehave, at most m.
    pub faulty: Vec<usize>,
    pub faults: Possible,
    pub latency_max: Duration,
    pub sector_bytes: u64,
    pub cache_bytes: u64,
    pub map_cache_bytes: u64,
    /// Chance of a pause where threads may interleave, and the longest.
    pub pause_ppm: u32,
    pub pause_max: Duration,
    /// Some part of every device is slower than the rest.
    slow_area: bool,
    /// Chance, in a million, that a device takes up to two seconds to write a batch of the journal.
    stall_ppm: u32,
    /// Devices are as small as can be for what hosts write.
    pub full: bool,
    /// Nothing compresses.
    pub noise: bool,
    pub load: Load,
    /// Hosts sometimes do nothing for long.
    pub lazy: bool,
    /// Other volumes come and go.
    pub side_volumes: bool,
    /// Opens are cut short.
    pub cut_opens: bool,
    /// The volume has a write cache, and hosts want each write to be durable.
    pub write_cache: bool,
}

/// What hosts do.
pub enum Load {
    /// A bit of everything.
    Mixed,
    /// All hosts want the same few blocks.
    Hot,
    /// Hosts overwrite a few ranges of one size over and over, so that space is reused quickly.
    Churn { sectors: u64, places: u64 },
    /// Hosts together write all there is, until the pod is full.
    Fill,
}

/// Which faults the misbehaving devices may show.
#[derive(Default)]
pub struct Possible {
    read_errors: bool,
    write_errors: bool,
    flush_errors: bool,
    pub rot: bool,
    lost_writes: bool,
    misdirected: bool,
    slow: bool,
    /// Reads take seconds.
    slow_reads: bool,
    hang: bool,
    /// Disappears during a life.
    pub gone: bool,
    /// Is not there when the pod opens, perhaps for several lives.
    pub absent: bool,
    full: bool,
    lies: bool,
}

const GEOMETRIES: [(usize, usize, usize); 6] =
    [(6, 4, 2), (3, 2, 1), (5, 2, 2), (7, 3, 2), (3, 1, 1), (6, 3, 1)];

/// Devices in any order.
fn shuffled(devices: usize, rng: &SeededRng) -> Vec<usize> {
    let mut all: Vec<usize> = (0..devices).collect();
    for at in 0..devices {
        all.swap(at, at + rng.below((devices - at) as u64) as usize);
    }
    all
}

/// Mixed into the seed of [`window_shift`]; any number would do, and with this one the seeds of
/// seeds.txt, which are older, draw what they always did.
const SHIFT_SEED: u64 = 54;

/// For every other seed, puts a multiple of 1 MiB, where long reads are cut, or of 2 MiB, where a
/// leaf of the map ends, into each window, mostly near its beginning: hot blocks lie there. Drawn
/// apart from all else.
fn window_shift(seed: u64, window_sectors: u64) -> u64 {
    let rng = SeededRng::new(seed ^ SHIFT_SEED);
    if !rng.chance(500_000) {
        return 0;
    }
    let edge = (1 + rng.below(2)) << 20;
    let near = if rng.chance(700_000) { 5 } else { window_sectors / 8 - 1 };
    edge - (1 + rng.below(near)) * 4096
}

/// Mixed into the seed of [`stall_ppm`]; any number would do.
const STALL_SEED: u64 = 55;
/// Less than an I/O may take, more than a batch waits before it goes to another device.
const STALL_MAX: Duration = Duration::from_secs(2);

/// For every fifth seed, how often the journals of all devices stall, each at its own times. Drawn
/// apart from all else.
fn stall_ppm(seed: u64) -> u32 {
    let rng = SeededRng::new(seed ^ STALL_SEED);
    if rng.chance(200_000) { rng.below(300_000) as u32 } else { 0 }
}

/// Mixed into the seed of [`write_cache`]; with this one the seeds of seeds.txt have none, as ever.
const WRITE_CACHE_SEED: u64 = 59;

/// For every eighth seed. Drawn apart from all else.
fn write_cache(seed: u64) -> bool {
    SeededRng::new(seed ^ WRITE_CACHE_SEED).chance(125_000)
}

impl Swarm {
    pub fn draw(seed: u64, rng: &SeededRng) -> Self {
        let (devices, data, parity) = GEOMETRIES[rng.below(6) as usize];
        let chance = |percent: u32| rng.chance(percent * 10_000);
        let mut faulty = shuffled(devices, rng);
        // All m at once most of the time.
        let count = if chance(60) { parity as u64 } else { rng.below(parity as u64 + 1) };
        faulty.truncate(count as usize);
        let full = chance(20);
        let load = match rng.below(100) {
            0..=39 if full => Load::Fill,
            0..=29 if !full => Load::Hot,
            30..=59 => {
                let sectors = [8, 56, 64, 128][rng.below(4) as usize];
                Load::Churn { sectors, places: 1 + rng.below(1024 / sectors).min(10) }
            }
            _ => Load::Mixed,
        };
        // Many small windows are many map nodes, and so many checkpoints.
        let scattered = !full && matches!(load, Load::Mixed) && chance(30);
        let hosts = 1 + rng.below(6) as usize;
        let operations = match load {
            Load::Churn { sectors, .. } => (60 + rng.below(12_000 / sectors)) / hosts as u64,
            Load::Fill => (100 + rng.below(200)) / hosts as u64,
            Load::Mixed | Load::Hot => 5 + rng.below(75),
        };
        let window_sectors = if scattered { 64 } else { 1024 };
        // 64 strips of 64 KiB, the superblocks and the largest ring.
        let smallest = (6 << 20) + 65536;
        Self {
            devices,
            data,
            parity,
            device_bytes: if full {
                smallest + rng.below(16) * 65536
            } else {
                (8 + rng.below(12)) << 20
            },
            // Any multiple of 4096; that of a batch's place decides which devices it goes to.
            journal_bytes: (1 << 20) + rng.below(8) * 4096,
            window_sectors,
            windows: match (full, scattered) {
                (true, _) => 16,
                (_, true) => 64,
                (false, false) => 4,
            },
            window_shift: window_shift(seed, window_sectors),
            hosts,
            operations,
            lives: 2 + rng.below(4) as usize,
            faulty,
            faults: Possible::draw(&chance),
            latency_max: Duration::from_micros(50 + rng.below(5_000)),
            sector_bytes: if chance(20) { 4096 } else { 512 },
            cache_bytes: if chance(50) { 64 << 10 } else { 8 << 20 },
            map_cache_bytes: if chance(50) { 16 << 10 } else { 8 << 20 },
            pause_ppm: if chance(40) { rng.below(500_000) as u32 } else { 0 },
            pause_max: Duration::from_micros(200 << (2 * rng.below(7))),
            slow_area: chance(40),
            stall_ppm: stall_ppm(seed),
            full,
            noise: full || matches!(load, Load::Churn { .. }) && chance(50),
            load,
            lazy: chance(30),
            side_volumes: chance(25),
            cut_opens: chance(40),
            write_cache: write_cache(seed),
        }
    }

    /// Changes the draw to what a script needs: no faults but its own, and hosts that are quick.
    pub fn suit(&mut self, script: Script, rng: &SeededRng) {
        if script == Script::HalfTold {
            // The only geometry of which any m devices outnumber those that two others leave.
            (self.devices, self.data, self.parity) = (5, 2, 2);
        }
        self.faulty = shuffled(self.devices, rng);
        self.faulty.truncate(self.parity);
        self.faults = Possible::default();
        (self.window_sectors, self.windows) = (1024, 4);
        let (sectors, places) = match script {
            Script::HalfTold => (64, 4),
            Script::ToldTwice => (8, 8),
            Script::Forgetful => ([8, 64, 128][rng.below(3) as usize], 1 + rng.below(2)),
        };
        self.load = Load::Churn { sectors, places };
        self.hosts = 1 + rng.below(3) as usize;
        self.operations = 300;
        self.lives = 5;
        self.noise = true;
        self.cache_bytes = 64 << 10;
        self.full = false;
        self.lazy = false;
        self.side_volumes = false;
    }

    /// Sectors that hosts use.
    pub fn sectors(&self) -> u64 {
        self.windows * self.window_sectors
    }

    /// Bytes from one window to the next.
    fn window_stride(&self) -> u64 {
        VOLUME_BYTES / self.windows / 4096 * 4096
    }

    /// Where a sector that hosts use lies in the volume.
    pub fn offset_of(&self, sector: u64) -> u64 {
        let within = sector % self.window_sectors * SECTOR as u64;
        sector / self.window_sectors * self.window_stride() + self.window_shift + within
    }

    /// The sectors that hosts use in a range of bytes.
    pub fn sectors_in(&self, bytes: Range<u64>) -> impl Iterator<Item = u64> {
        let (stride, sectors) = (self.window_stride(), self.window_sectors);
        let shifted = |offset: u64| offset.saturating_sub(self.window_shift);
        let bytes = shifted(bytes.start)..shifted(bytes.end);
        let windows = bytes.start / stride..bytes.end.div_ceil(stride).min(self.windows);
        windows.flat_map(move |window| {
            let sector =
                |offset: u64| (offset.saturating_sub(window * stride) / SECTOR as u64).min(sectors);
            window * sectors + sector(bytes.start)..window * sectors + sector(bytes.end)
        })
    }

    /// Whether a write may fail for want of room.
    pub fn may_be_full(&self) -> bool {
        self.full || self.faults.full
    }

    /// What is slow on all devices in one life: the superblocks, the journal or the segments. And in
    /// some seeds the journal stalls now and then.
    pub fn draw_slow_area(&self, rng: &SeededRng) -> SimFaults {
        let slow_area = match rng.below(4) {
            _ if !self.slow_area => 0..0,
            0 | 1 => 0..JOURNAL_OFFSET,
            2 => JOURNAL_OFFSET..JOURNAL_OFFSET + self.journal_bytes,
            _ => JOURNAL_OFFSET + self.journal_bytes..self.device_bytes,
        };
        // A checkpoint reads and writes many segments, one after the other.
        let doublings = if slow_area.start > JOURNAL_OFFSET { 6 } else { 9 };
        let slow_area_by = Duration::from_micros(rng.below(500 << rng.below(doublings)));
        SimFaults {
            slow_area,
            slow_area_by,
            stall_ppm: self.stall_ppm,
            stall_area: JOURNAL_OFFSET..JOURNAL_OFFSET + self.journal_bytes,
            stall_max: STALL_MAX,
            ..SimFaults::default()
        }
    }

    /// Bytes of one misbehaving device that cannot be read in one life, if there are any: a few
    /// sectors, mostly of a superblock or the journal.
    pub fn draw_bad_area(&self, rng: &SeededRng) -> Range<u64> {
        if !rng.chance(300_000) {
            return 0..0;
        }
        let start = match rng.below(4) {
            0 => SLOT_OFFSETS[rng.below(2) as usize],
            1 => rng.below(self.device_bytes / 4096) * 4096,
            _ => JOURNAL_OFFSET + rng.below(self.journal_bytes / 4096) * 4096,
        };
        start..start + (4096 << rng.below(5))
    }

    /// Faults for one misbehaving device and one life.
    pub fn draw_faults(&self, rng: &SeededRng, rest: SimFaults) -> SimFaults {
        let ppm = |on: bool, most: u64| if on { rng.below(most) as u32 } else { 0 };
        let possible = &self.faults;
        let often = if rng.chance(500_000) { 100_000 } else { 600_000 };
        SimFaults {
            read_error_ppm: ppm(possible.read_errors, 100_000),
            write_error_ppm: ppm(possible.write_errors, 20_000),
            flush_error_ppm: ppm(possible.flush_errors, 20_000),
            lost_write_ppm: ppm(possible.lost_writes, often),
            misdirected_write_ppm: ppm(possible.misdirected, often),
            slow_ppm: ppm(possible.slow, 200_000),
            slow_by: Duration::from_millis(1 + rng.below(900)),
            slow_read_ppm: ppm(possible.slow_reads, 500_000),
            slow_read_by: Duration::from_millis(1 + rng.below(4_000)),
            hang_ppm: ppm(possible.hang, 5_000),
            full: possible.full && rng.chance(300_000),
            lies_about_flush: possible.lies && rng.chance(500_000),
            ..rest
        }
    }
}

impl Possible {
    fn draw(chance: &impl Fn(u32) -> bool) -> Self {
        Self {
            read_errors: chance(30),
            write_errors: chance(10),
            flush_errors: chance(10),
            rot: chance(40),
            lost_writes: chance(25),
            misdirected: chance(25),
            slow: chance(20),
            slow_reads: chance(20),
            hang: chance(10),
            gone: chance(20),
            absent: chance(35),
            full: chance(10),
            lies: chance(15),
        }
    }
}

#[test]
fn seeds_that_are_older_than_write_caches_have_none() {
    let have = crate::found_seeds().into_iter().filter(|seed| write_cache(*seed));
    assert_eq!(have.collect::<Vec<_>>(), [] as [u64; 0]);
}

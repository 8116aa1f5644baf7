//! What a seed draws before it begins: geometry, sizes, load, and which faults exist at all.

use std::time::Duration;

use weft::device::sim::SimFaults;
use weft::env::sim::Choose;
use weft::env::sim::SeededRng;

/// The draw of a seed.
pub struct Swarm {
    pub devices: usize,
    pub data: usize,
    pub parity: usize,
    pub device_bytes: u64,
    pub windows: u64,
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
    /// Nothing compresses and the devices are as small as can be.
    pub full: bool,
    /// All hosts want the same few blocks.
    pub hot: bool,
    /// Hosts sometimes do nothing for long.
    pub lazy: bool,
    /// Other volumes come and go.
    pub side_volumes: bool,
    /// Opens are cut short.
    pub cut_opens: bool,
}

/// Which faults the misbehaving devices may show.
pub struct Possible {
    read_errors: bool,
    write_errors: bool,
    flush_errors: bool,
    pub rot: bool,
    lost_writes: bool,
    misdirected: bool,
    slow: bool,
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

impl Swarm {
    pub fn draw(rng: &SeededRng) -> Self {
        let (devices, data, parity) = GEOMETRIES[rng.below(6) as usize];
        let chance = |percent: u32| rng.chance(percent * 10_000);
        let mut faulty: Vec<usize> = (0..devices).collect();
        for at in 0..devices {
            faulty.swap(at, at + rng.below((devices - at) as u64) as usize);
        }
        // All m at once most of the time.
        let count = if chance(60) { parity as u64 } else { rng.below(parity as u64 + 1) };
        faulty.truncate(count as usize);
        let full = chance(20);
        let smallest = 6 << 20;
        Self {
            devices,
            data,
            parity,
            device_bytes: if full {
                smallest + rng.below(16) * 65536
            } else {
                (8 + rng.below(12)) << 20
            },
            windows: if full { 16 } else { 4 },
            hosts: 1 + rng.below(6) as usize,
            operations: 5 + rng.below(75),
            lives: 2 + rng.below(4) as usize,
            faulty,
            faults: Possible::draw(&chance),
            latency_max: Duration::from_micros(50 + rng.below(5_000)),
            sector_bytes: if chance(20) { 4096 } else { 512 },
            cache_bytes: if chance(50) { 64 << 10 } else { 8 << 20 },
            map_cache_bytes: if chance(50) { 16 << 10 } else { 8 << 20 },
            full,
            hot: !full && chance(30),
            lazy: chance(30),
            side_volumes: chance(25),
            cut_opens: chance(40),
        }
    }

    /// Faults for one misbehaving device and one life.
    pub fn draw_faults(&self, rng: &SeededRng) -> SimFaults {
        let ppm = |on: bool, most: u64| if on { rng.below(most) as u32 } else { 0 };
        let possible = &self.faults;
        SimFaults {
            read_error_ppm: ppm(possible.read_errors, 100_000),
            write_error_ppm: ppm(possible.write_errors, 20_000),
            flush_error_ppm: ppm(possible.flush_errors, 20_000),
            lost_write_ppm: ppm(possible.lost_writes, 100_000),
            misdirected_write_ppm: ppm(possible.misdirected, 100_000),
            slow_ppm: ppm(possible.slow, 200_000),
            slow_by: Duration::from_millis(1 + rng.below(900)),
            hang_ppm: ppm(possible.hang, 5_000),
            full: possible.full && rng.chance(300_000),
            lies_about_flush: possible.lies && rng.chance(500_000),
            ..SimFaults::default()
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
            hang: chance(10),
            gone: chance(20),
            absent: chance(35),
            full: chance(10),
            lies: chance(15),
        }
    }
}

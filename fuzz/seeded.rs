//! Seeded, structure-aware byte mutation on the stable toolchain, shared by `tests/fuzz_*.rs`.
//!
//! Every run replays the corpus, then makes `FUZZ_ITERATIONS` (default: a few seconds' worth) inputs
//! out of valid ones and damages most of them. A failure prints its seed; rerun it with
//! `FUZZ_SEED=n FUZZ_ITERATIONS=1`.

use std::env;
use std::fs;
use std::ops::Range;
use std::panic;
use std::path::Path;

const ITERATIONS: u64 = 20_000;

fn setting(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// The seeds of this run, for a driver that takes `cost` times as long as a decoder.
pub fn seeds(cost: u64) -> Range<u64> {
    let first = setting("FUZZ_SEED", 1);
    first..first + (setting("FUZZ_ITERATIONS", ITERATIONS) / cost).max(1)
}

/// splitmix64: every seed is a good one.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn index(&mut self, length: usize) -> usize {
        usize::try_from(self.below(length.max(1) as u64)).unwrap()
    }

    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.index(choices.len())]
    }

    pub fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[3]
    }
}

/// Damages most inputs a little; leaves every fourth whole.
pub fn mutate(random: &mut Random, bytes: &mut Vec<u8>) {
    for _ in 0..random.below(4) {
        if bytes.is_empty() {
            return;
        }
        let at = random.index(bytes.len());
        match random.below(6) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.pick(&[0, 1, 0x7f, 0x80, 0xff]),
            2 => bytes.truncate(at),
            3 => bytes.insert(at, random.byte()),
            4 => {
                let end = bytes.len().min(at + random.index(64));
                bytes.drain(at..end);
            }
            _ => {
                let part = bytes[at..bytes.len().min(at + 40)].to_vec();
                let to = random.index(bytes.len());
                bytes.splice(to..to, part);
            }
        }
    }
}

/// Runs the corpus of `name`, then mutated inputs.
pub fn fuzz(name: &str, cost: u64, make: fn(&mut Random) -> Vec<u8>, driver: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut files: Vec<_> = fs::read_dir(&corpus)
        .expect("the corpus is part of the tree")
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(!files.is_empty());
    for file in files {
        driver(&fs::read(file).unwrap());
    }
    for seed in seeds(cost) {
        let mut random = Random(seed);
        let mut bytes = make(&mut random);
        mutate(&mut random, &mut bytes);
        if let Err(failure) = panic::catch_unwind(|| driver(&bytes)) {
            eprintln!("{name}: rerun with FUZZ_SEED={seed} FUZZ_ITERATIONS=1");
            panic::resume_unwind(failure);
        }
    }
}

//! The real engine on simulated devices, time and scheduling: one seed is one run.
//!
//! Property: the contract of `docs/faults.md`. After any number of crashes, with any m devices
//! misbehaving, every acknowledged write is there, nothing read is taken back, writes up to the
//! atomic size are there whole or not at all, and every request completes; no request fails except
//! for want of room. With more than m devices misbehaving the pod refuses; it never lies.
//!
//! `SEED=n cargo test --test sim` replays one seed; `SEEDS=n` sets how many are run, `FIRST=n`
//! where they begin. `seeds.txt` holds seeds that found something once; they run first.

#![expect(clippy::cast_possible_truncation, reason = "64-bit only; see units.rs")]

use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;

mod beyond;
mod bulk;
#[cfg(feature = "canary")]
mod canaries;
mod damaged;
mod fixture;
mod forced;
mod host;
mod model;
mod runner;
mod script;
mod scrub;
mod side;
mod swarm;
mod trim;
mod world;
mod write_cache;

/// Seeds of a plain `cargo test`; the stage `sim` of `scripts/test` runs more.
const SEEDS_DEFAULT: u64 = 200;
/// Threads that seeds are spread over.
const THREADS: usize = 2;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

/// Seeds that found something once, oldest first.
fn found_seeds() -> Vec<u64> {
    let lines = include_str!("seeds.txt").lines();
    let seeds = lines.map(|line| line.split('#').next().unwrap_or("").trim());
    seeds.filter(|seed| !seed.is_empty()).map(|seed| seed.parse().expect("a seed")).collect()
}

/// Calls `work` with each item, on a few threads.
fn in_parallel<T: Sync>(items: &[T], work: impl Fn(&T) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    work(item);
                }
            });
        }
    });
}

#[test]
fn any_seed_keeps_the_contract() {
    if let Some(seed) = number("SEED") {
        tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).without_time().init();
        runner::run(seed).unwrap_or_else(|what| panic!("{what}"));
        return;
    }
    let first = number("FIRST").unwrap_or(0);
    let count = number("SEEDS").unwrap_or(SEEDS_DEFAULT);
    let mut seeds = found_seeds();
    seeds.extend(first..first + count);
    let failures = Mutex::new(Vec::new());
    in_parallel(&seeds, |seed| {
        if let Err(what) = runner::run(*seed) {
            println!("{what}\nreplay: SEED={seed} cargo test --test sim any_seed -- --nocapture");
            failures.lock().expect("not poisoned").push(*seed);
        }
    });
    let mut failures = failures.into_inner().expect("not poisoned");
    failures.sort_unstable();
    assert!(
        failures.is_empty(),
        "{} of {} seeds failed: {failures:?}",
        failures.len(),
        seeds.len()
    );
}

#[test]
fn a_seed_reproduces_bit_for_bit() {
    for seed in 0..5 {
        assert_eq!(runner::run(seed), runner::run(seed), "seed {seed}");
    }
}

//! The real engine on simulated devices, time and scheduling: one seed is one run.
//!
//! Property: the contract of `docs/faults.md`. After any number of crashes, with any m devices
//! misbehaving, every acknowledged write is there, nothing read is taken back, writes up to the
//! atomic size are there whole or not at all, and every request completes.
//!
//! `SEED=n cargo test --test sim` replays one seed; `SEEDS=n` sets how many are run, `FIRST=n`
//! where they begin.

#![expect(clippy::cast_possible_truncation, reason = "64-bit only; see units.rs")]

mod model;
mod world;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

#[test]
fn any_seed_keeps_the_contract() {
    if let Some(seed) = number("SEED") {
        tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).without_time().init();
        world::run(seed).unwrap_or_else(|what| panic!("{what}"));
        return;
    }
    let first = number("FIRST").unwrap_or(0);
    let count = number("SEEDS").unwrap_or(300);
    for seed in first..first + count {
        if let Err(what) = world::run(seed) {
            panic!("{what}\nreplay: SEED={seed} cargo test --test sim any_seed -- --nocapture");
        }
    }
}

#[test]
fn a_seed_reproduces_bit_for_bit() {
    for seed in 0..5 {
        assert_eq!(world::run(seed), world::run(seed), "seed {seed}");
    }
}

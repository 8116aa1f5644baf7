//! A simulator is as good as the bugs it has been shown to catch: each planted one must fall.

use std::sync::Mutex;

use weft::canary::Bug;
use weft::canary::plant;

use crate::forced;
use crate::in_parallel;
use crate::number;
use crate::runner;
use crate::write_cache;

/// Seeds each bug is given; `BUG=name` runs one.
const SEEDS_MAX: u64 = 900;

/// Runs a seed of the kind that can catch the bug.
fn run(bug: Bug, seed: u64) -> Result<u64, String> {
    match bug {
        Bug::VoidStampCounted | Bug::HalvesMixed => forced::run(seed),
        Bug::FlushIgnored | Bug::VolatileUnseen | Bug::VolatileInBuffer => write_cache::run(seed),
        _ => runner::run(seed),
    }
}

#[test]
fn every_planted_bug_is_caught() {
    let survivors = Mutex::new(Vec::new());
    let only = std::env::var("BUG").ok();
    let wanted = |bug: &Bug| only.as_ref().is_none_or(|only| *only == format!("{bug:?}"));
    let bugs: Vec<Bug> = Bug::ALL.into_iter().filter(wanted).collect();
    let seeds = number("CANARY_SEEDS").unwrap_or(SEEDS_MAX);
    in_parallel(&bugs, |bug| {
        plant(Some(*bug));
        let caught = (0..seeds).find_map(|seed| Some((seed, run(*bug, seed).err()?)));
        plant(None);
        match caught {
            Some((seed, what)) => println!("{bug:?}: caught by seed {seed}: {what}"),
            None => survivors.lock().expect("not poisoned").push(*bug),
        }
    });
    let survivors = survivors.into_inner().expect("not poisoned");
    assert!(survivors.is_empty(), "not caught by {seeds} seeds: {survivors:?}");
}

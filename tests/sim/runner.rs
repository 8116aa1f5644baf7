//! Runs a seed and turns whatever goes wrong, a panic too, into a sentence.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::panic::catch_unwind;
use std::sync::Arc;
use std::sync::Mutex;

use weft::env::sim::SimEnv;

use crate::in_parallel;
use crate::number;
use crate::world::World;

/// Seeds that [`run_some`] runs unless told.
const SOME_DEFAULT: u64 = 100;
/// Of the seeds that are asked for, it runs one in so many.
const ONE_IN: u64 = 10;

/// Runs one seed; the hash is of everything that happened.
pub fn run(seed: u64) -> Result<u64, String> {
    let world = World::new(seed);
    let outcome = without_panic(|| world.all_lives());
    let env = Arc::clone(&world.env);
    let hash = env.trace_hash();
    halt(&env, world);
    outcome.map(|()| hash).map_err(|what| format!("seed {seed}: {what}"))
}

/// Runs seeds of another kind of world: the one that `SEED` names, or from `FIRST` on one for each
/// [`ONE_IN`] that `SEEDS` asks for. Returns what each came to; nothing if one was named.
pub fn run_some(run: impl Fn(u64) -> Result<u64, String> + Sync) -> Option<Vec<u64>> {
    if let Some(seed) = number("SEED") {
        tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).without_time().init();
        run(seed).unwrap_or_else(|what| panic!("{what}"));
        return None;
    }
    let first = number("FIRST").unwrap_or(0);
    let count = number("SEEDS").map_or(SOME_DEFAULT, |seeds| seeds.div_ceil(ONE_IN));
    let seeds: Vec<u64> = (first..first + count).collect();
    let outcomes = Mutex::new(Vec::new());
    in_parallel(&seeds, |seed| {
        let outcome = run(*seed);
        outcomes.lock().expect("not poisoned").push(outcome);
    });
    let outcomes = outcomes.into_inner().expect("not poisoned");
    let failures: Vec<&String> = outcomes.iter().filter_map(|one| one.as_ref().err()).collect();
    assert!(failures.is_empty(), "replay with SEED=n: {failures:#?}");
    Some(outcomes.into_iter().flatten().collect())
}

/// What `work` comes to; a panic is an error.
pub fn without_panic<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    let outcome = catch_unwind(AssertUnwindSafe(work));
    outcome.unwrap_or_else(|panic| Err(format!("panic: {}", message(&*panic))))
}

/// Ends all that runs. What a panic left behind may panic again when dropped.
pub fn halt<T>(env: &SimEnv, world: T) {
    if catch_unwind(AssertUnwindSafe(|| env.halt())).is_err() {
        std::mem::forget(world);
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "of an unknown kind".to_owned())
}

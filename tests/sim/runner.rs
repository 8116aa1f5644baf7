//! Runs a seed and turns whatever goes wrong, a panic too, into a sentence.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::panic::catch_unwind;
use std::sync::Arc;

use weft::env::sim::SimEnv;

use crate::world::World;

/// Runs one seed; the hash is of everything that happened.
pub fn run(seed: u64) -> Result<u64, String> {
    let world = World::new(seed);
    let outcome = without_panic(|| world.all_lives());
    let env = Arc::clone(&world.env);
    let hash = env.trace_hash();
    halt(&env, world);
    outcome.map(|()| hash).map_err(|what| format!("seed {seed}: {what}"))
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

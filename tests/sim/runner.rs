//! Runs a seed and turns whatever goes wrong, a panic too, into a sentence.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::panic::catch_unwind;

use crate::world::World;

/// Runs one seed; the hash is of everything that happened.
pub fn run(seed: u64) -> Result<u64, String> {
    let world = World::new(seed);
    let outcome = catch_unwind(AssertUnwindSafe(|| world.all_lives()));
    let outcome = outcome.unwrap_or_else(|panic| Err(format!("panic: {}", message(&*panic))));
    let hash = world.env.trace_hash();
    // What a panic left behind may panic again when dropped.
    if catch_unwind(AssertUnwindSafe(|| world.env.halt())).is_err() {
        std::mem::forget(world);
    }
    outcome.map(|()| hash).map_err(|what| format!("seed {seed}: {what}"))
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "of an unknown kind".to_owned())
}

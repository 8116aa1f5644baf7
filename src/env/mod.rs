//! Time, randomness and spawning: everything the simulator must own besides devices.
//!
//! All code below `target` reaches these through an [`Env`] it was given, never through the
//! standard library, so that `tests/sim` runs the same engine on one thread with virtual time and
//! a seeded scheduler. Two implementations: [`tokio_env`] for the node, [`sim`] for the simulator.
//!
//! Futures here are not `Send`: a task stays on the thread that spawned it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use uuid::Builder;
use uuid::Uuid;

mod coarse;
pub mod sim;
pub mod tokio_env;

/// A task or a boxed step of one; stays on its thread.
pub type LocalBoxFuture<T> = Pin<Box<dyn Future<Output = T>>>;

/// Monotonic and wall time.
pub trait Clock {
    /// Time since an arbitrary fixed origin; never goes back.
    fn now(&self) -> Duration;
    /// Milliseconds since 1970, for people and names only: it may jump.
    fn unix_ms(&self) -> u64;
    /// Completes `duration` from now, or up to a tenth later if it is long. Dropping it cancels the timer.
    fn sleep(&self, duration: Duration) -> LocalBoxFuture<()>;
}

/// Randomness.
pub trait Rng {
    /// A uniformly random number.
    fn random_u64(&self) -> u64;
}

/// Starts tasks.
pub trait Spawn {
    /// Runs `task` to its end on the calling thread, whoever drops what.
    fn spawn(&self, task: LocalBoxFuture<()>);
    /// Lets other threads that wait for this processor have it: for background tasks to call every
    /// some 50 us of computing. The scheduler would otherwise let them run for milliseconds, with a
    /// request of a host waiting.
    fn yield_thread(&self) {}
    /// A step to take first, where threads share what was just looked at and another may change it
    /// before it is used. The simulator, which has one thread, sometimes gives one; else `None`.
    fn pause(&self) -> Option<LocalBoxFuture<()>> {
        None
    }
}

/// All three, as the layers below `target` receive them.
pub trait Env: Clock + Rng + Spawn + Send + Sync {}

impl<T: Clock + Rng + Spawn + Send + Sync> Env for T {}

/// How an environment is passed around.
pub type EnvRef = Arc<dyn Env>;

/// A new identity: a UUID of version 4. (RFC 9562, 5.4)
pub fn random_uuid(env: &EnvRef) -> Uuid {
    let (high, low) = (env.random_u64(), env.random_u64());
    Builder::from_random_bytes(*Uuid::from_u64_pair(high, low).as_bytes()).into_uuid()
}

/// Runs `work` for at most `limit`; `None` if it took longer.
///
/// # Cancellation
/// On time-out `work` is dropped: pass only futures whose dropping is safe.
pub async fn timeout<T>(env: &EnvRef, limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    let work = std::pin::pin!(work);
    match futures_util::future::select(work, env.sleep(limit)).await {
        futures_util::future::Either::Left((value, _)) => Some(value),
        futures_util::future::Either::Right(((), _)) => None,
    }
}

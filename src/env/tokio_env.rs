//! The node's environment: tokio's timers and local tasks, the machine's clock and randomness.
//!
//! Tasks are spawned on the calling thread's `LocalSet`, so spawning and sleeping work only inside
//! one; each data-plane thread runs its own.

use std::hash::BuildHasher;
use std::hash::RandomState;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;
use std::time::SystemTime;

use crate::env::Clock;
use crate::env::LocalBoxFuture;
use crate::env::Rng;
use crate::env::Spawn;
use crate::env::coarse::CoarseSleep;

/// From this length on a timer may be late by a tenth, for being cheap.
const COARSE_MIN: Duration = Duration::from_millis(500);

/// Real time, real randomness, tokio tasks.
pub struct TokioEnv {
    /// Where [`Clock::now`] counts from.
    origin: Instant,
}

impl TokioEnv {
    /// An environment whose clock starts now.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "this is the Clock that others take")]
    pub fn new() -> Arc<Self> {
        Arc::new(Self { origin: Instant::now() })
    }
}

impl Clock for TokioEnv {
    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    #[expect(clippy::disallowed_methods, reason = "this is the Clock that others take")]
    fn unix_ms(&self) -> u64 {
        // A clock set before 1970 reads as 1970.
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    fn sleep(&self, duration: Duration) -> LocalBoxFuture<()> {
        if duration < COARSE_MIN {
            return Box::pin(tokio::time::sleep(duration));
        }
        Box::pin(CoarseSleep::new(duration))
    }
}

impl Rng for TokioEnv {
    fn random_u64(&self) -> u64 {
        // SipHash of nothing under a key the operating system seeded and every call changes.
        RandomState::new().hash_one(())
    }
}

impl Spawn for TokioEnv {
    fn spawn(&self, task: LocalBoxFuture<()>) {
        tokio::task::spawn_local(task);
    }

    fn yield_thread(&self) {
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::collections::BTreeSet;

    use crate::env::EnvRef;

    #[test]
    fn tasks_run_on_the_calling_thread_and_time_passes() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("runtime");
        let env: EnvRef = TokioEnv::new();
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let (sender, receiver) = tokio::sync::oneshot::channel();
            let (home, before) = (std::thread::current().id(), env.now());
            let inner = env.clone();
            env.spawn(Box::pin(async move {
                inner.sleep(Duration::from_millis(2)).await;
                let _ = sender.send(std::thread::current().id());
            }));
            assert_eq!(receiver.await, Ok(home));
            assert!(env.now() - before >= Duration::from_millis(2));
        });
    }

    #[test]
    fn random_numbers_do_not_repeat() {
        let env = TokioEnv::new();
        let drawn: BTreeSet<u64> = (0..1000).map(|_| env.random_u64()).collect();
        assert_eq!(drawn.len(), 1000);
    }
}

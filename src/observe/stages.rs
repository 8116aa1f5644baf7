//! Where a request spends its time, without a word of it in any signature.
//!
//! A target polls the work of a request inside [`Stages::during`]; whatever runs below it on that
//! thread, in whatever layer, says what took how long with [`spent`] or [`timed`]. Outside a
//! request both do nothing of consequence, so background work may share the code.
//!
//! Time is exclusive: what [`timed`] work itself reports is not counted twice.

use std::cell::Cell;
use std::future::Future;
use std::time::Duration;

use weft_api::Stage;

use crate::env::EnvRef;

const STAGES: usize = Stage::ALL.len();

thread_local! {
    /// Of the request that is being polled.
    static CURRENT: Cell<Stages> = const { Cell::new(Stages([0; STAGES])) };
}

/// Nanoseconds spent in each stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stages([u64; STAGES]);

impl Stages {
    /// Runs a step of the request, and takes in what it reports.
    pub fn during<T>(&mut self, step: impl FnOnce() -> T) -> T {
        let outer = CURRENT.replace(*self);
        let result = step();
        *self = CURRENT.replace(outer);
        result
    }

    /// Adds time spent in a stage.
    pub fn add(&mut self, stage: Stage, time: Duration) {
        if let Some(ns) = self.0.get_mut(stage as usize) {
            *ns += u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        }
    }

    /// Time spent in all stages.
    #[must_use]
    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.0.iter().sum())
    }

    /// Stages that took any time.
    pub fn iter(&self) -> impl Iterator<Item = (Stage, Duration)> {
        let all = Stage::ALL.iter().copied().zip(self.0);
        all.filter(|(_, ns)| *ns > 0).map(|(stage, ns)| (stage, Duration::from_nanos(ns)))
    }
}

/// The request that is being polled has spent time in a stage.
pub fn spent(stage: Stage, time: Duration) {
    let mut current = CURRENT.get();
    current.add(stage, time);
    CURRENT.set(current);
}

/// Does work in a stage.
pub fn timed_now<T>(env: &EnvRef, stage: Stage, work: impl FnOnce() -> T) -> T {
    let timer = Timer::start(env);
    let result = work();
    timer.stop(env, stage);
    result
}

/// Waits for work in a stage. Only time within one request's steps may pass between its polls:
/// the work must not move to another request.
pub async fn timed<T>(env: &EnvRef, stage: Stage, work: impl Future<Output = T>) -> T {
    let timer = Timer::start(env);
    let result = work.await;
    timer.stop(env, stage);
    result
}

/// Time that passes while others may report some of it.
struct Timer {
    began: Duration,
    reported: Duration,
}

impl Timer {
    fn start(env: &EnvRef) -> Self {
        Self { began: env.now(), reported: CURRENT.get().total() }
    }

    fn stop(self, env: &EnvRef, stage: Stage) {
        let elapsed = env.now().saturating_sub(self.began);
        let inside = CURRENT.get().total().saturating_sub(self.reported);
        spent(stage, elapsed.saturating_sub(inside));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures_util::FutureExt;

    use super::*;
    use crate::env::sim::SimEnv;

    const fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn time_is_counted_once_and_to_the_request_that_is_polled() {
        let sim = SimEnv::new(1);
        let env: EnvRef = Arc::clone(&sim) as EnvRef;
        let mut stages = Stages::default();
        sim.run(async {
            let work = timed(&env, Stage::Device, async {
                env.sleep(ms(5)).await;
                timed(&env, Stage::Decode, env.sleep(ms(2))).await;
            });
            let mut work = std::pin::pin!(work);
            std::future::poll_fn(|cx| stages.during(|| work.poll_unpin(cx))).await;
        });
        let spent: Vec<_> = stages.iter().collect();
        assert_eq!(spent, [(Stage::Device, ms(5)), (Stage::Decode, ms(2))]);
    }

    #[test]
    fn what_others_report_is_not_a_requests() {
        let mut stages = Stages::default();
        spent(Stage::Map, ms(1));
        stages.during(|| spent(Stage::Journal, ms(3)));
        spent(Stage::Map, ms(1));
        assert_eq!(stages.iter().collect::<Vec<_>>(), [(Stage::Journal, ms(3))]);
    }
}

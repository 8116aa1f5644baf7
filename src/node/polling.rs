//! Polling: a data-plane thread whose requests come one by one looks for the next before it sleeps.
//!
//! Being woken costs a thread about 21 us on a virtual machine, which is most of what one small
//! request takes. So a task of the thread yields over and over, which makes the event loop look at
//! every socket, timer and device of the thread without waiting, until nothing was done for the
//! span that the operator set; then it sleeps until a connection has work again.
//!
//! It does so only where it pays, as KVM does before it halts a processor: after a few requests
//! that each came alone and soon after the one before. A deep queue gains nothing, as the thread
//! finds the next request whenever it looks; nor does a thread that mostly waits for devices. While
//! it polls, requests of a deep queue look alone, so every now and then it sleeps in order to see.
//!
//! # Invariants
//! * Without work, the thread sleeps: [`Polling::spin`] runs for one span after the last work and
//!   then waits for [`Polling::watch`] to wake it.

use std::cell::Cell;
use std::future::Future;
use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::spawn_local;
use tokio::task::yield_now;
use tokio::time::Instant;

use crate::target::connections::requests_of_thread;

/// How many more steps have to gain by polling than it takes to make up for those that do not.
const HABIT_MIN: u32 = 4;
/// Steps that gained are remembered up to here, so that a rare long wait does not end the habit.
const HABIT_MAX: u32 = 16;
/// What a wait that was too long for polling takes away.
const IN_VAIN: u32 = 4;
/// What it takes to wake a sleeping thread, at most, on a quiet virtual machine.
const WAKE: Duration = Duration::from_micros(30);
/// Steps polled for between two sleeps: waking costs each of them a tenth of a microsecond.
const STEPS_BETWEEN_SLEEPS: u32 = 256;

/// Whether a thread has work, or had some lately.
pub(super) struct Polling {
    span: Duration,
    /// How well polling pays: up with each step that gains by it, down with each that does not.
    habit: Cell<u32>,
    /// Requests the thread had got at the end of the last step, and when that was.
    requests: Cell<u64>,
    ended: Cell<Option<Instant>>,
    /// Work was done since the spinning task last looked.
    worked: Cell<bool>,
    /// The spinning task waits for `wake`.
    asleep: Cell<bool>,
    wake: Notify,
}

impl Polling {
    /// Polls for `span` after work. To be called on the thread, within its `LocalSet`.
    pub(super) fn start(span: Duration) -> Rc<Self> {
        let polling = Rc::new(Self {
            span,
            habit: Cell::new(0),
            requests: Cell::new(requests_of_thread()),
            ended: Cell::new(None),
            worked: Cell::new(false),
            asleep: Cell::new(false),
            wake: Notify::new(),
        });
        spawn_local(Rc::clone(&polling).spin());
        polling
    }

    /// Does `work`, and learns from each step of it whether to poll for the next.
    pub(super) async fn watch<F: Future>(&self, work: F) -> F::Output {
        let mut work = pin!(work);
        poll_fn(|cx| {
            let soon = self.ended.take().is_some_and(|ended| ended.elapsed() < self.span + WAKE);
            let polled = work.as_mut().poll(cx);
            self.learn(soon);
            polled
        })
        .await
    }

    /// Takes account of a step that came `soon` after the one before.
    fn learn(&self, soon: bool) {
        let requests = requests_of_thread();
        match requests - self.requests.replace(requests) {
            1 if soon => self.habit.set((self.habit.get() + 1).min(HABIT_MAX)),
            // Of none: what came is from a device, and requests wait for that.
            0 | 1 => self.wait_was_long(),
            _ => self.habit.set(0),
        }
        self.ended.set(Some(Instant::now()));
        self.worked.set(true);
        if self.pays() && self.asleep.take() {
            self.wake.notify_one();
        }
    }

    fn wait_was_long(&self) {
        self.habit.set(self.habit.get().saturating_sub(IN_VAIN));
    }

    fn pays(&self) -> bool {
        self.habit.get() >= HABIT_MIN
    }

    async fn spin(self: Rc<Self>) {
        loop {
            self.asleep.set(true);
            self.wake.notified().await;
            let (mut steps, mut last) = (0, Instant::now());
            while self.pays() && steps < STEPS_BETWEEN_SLEEPS {
                yield_now().await;
                if self.worked.take() {
                    (steps, last) = (steps + 1, Instant::now());
                } else if last.elapsed() >= self.span {
                    self.wait_was_long();
                    break;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::time::ClockId;
    use rustix::time::clock_gettime;
    use tokio::runtime;
    use tokio::task::LocalSet;
    use tokio::time::sleep;
    use tokio::time::timeout;
    use weft_api::FrontEnd;

    use super::*;
    use crate::target::connections::Connections;
    use crate::target::connections::Tally;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn run<T>(work: impl Future<Output = T>) -> T {
        let runtime = runtime::Builder::new_current_thread().enable_all().build();
        LocalSet::new().block_on(&runtime.expect("runtime"), work)
    }

    fn thread_cpu() -> Duration {
        clock_gettime(ClockId::ThreadCPUTime).try_into().expect("counts up from 0")
    }

    async fn until_asleep(polling: &Polling) {
        let asleep = async {
            while !polling.asleep.get() {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(PATIENCE, asleep).await.expect("it still polls");
    }

    /// A step of some connection that takes `requests`.
    async fn step(polling: &Polling, requests: u64) {
        let table = Connections::default();
        let connection = table.track(FrontEnd::Nbd, String::new());
        let tally = Tally { requests, ..Tally::default() };
        polling.watch(async { connection.counts().report(tally, 0) }).await;
    }

    /// Such steps of one request, as if each came that soon after the one before.
    fn learn(polling: &Polling, count: u32, soon: bool) {
        let table = Connections::default();
        let connection = table.track(FrontEnd::Nbd, String::new());
        for _ in 0..count {
            connection.counts().report(Tally { requests: 1, ..Tally::default() }, 0);
            polling.learn(soon);
        }
    }

    async fn steps_alone(polling: &Polling, count: u32) {
        for _ in 0..count {
            step(polling, 1).await;
        }
    }

    #[test]
    fn a_thread_without_work_sleeps() {
        run(async {
            let polling = Polling::start(Duration::from_millis(2));
            for _ in 0..3 {
                until_asleep(&polling).await;
                let before = thread_cpu();
                sleep(Duration::from_millis(200)).await;
                let used = thread_cpu() - before;
                assert!(used < Duration::from_millis(20), "{used:?} of 200 ms");
                learn(&polling, HABIT_MAX, true);
                assert!(!polling.asleep.get(), "it polls");
            }
        });
    }

    #[test]
    fn a_thread_whose_requests_come_one_by_one_does_not_sleep() {
        run(async {
            let polling = Polling::start(Duration::from_secs(3600));
            until_asleep(&polling).await;
            steps_alone(&polling, HABIT_MIN).await;
            assert!(polling.asleep.get(), "the first step came after nothing");
            step(&polling, 1).await;
            let before = thread_cpu();
            // A thread that slept would use next to nothing.
            let busy = async {
                while thread_cpu() - before < Duration::from_millis(20) {
                    sleep(Duration::from_millis(1)).await;
                }
            };
            timeout(PATIENCE, busy).await.expect("the thread does not poll");
            assert!(!polling.asleep.get());
        });
    }

    #[test]
    fn requests_that_come_together_end_it() {
        run(async {
            let polling = Polling::start(Duration::from_secs(3600));
            steps_alone(&polling, HABIT_MAX).await;
            step(&polling, 2).await;
            until_asleep(&polling).await;
            step(&polling, 1).await;
            assert!(polling.asleep.get());
        });
    }

    #[test]
    fn it_sleeps_now_and_then_to_see_what_comes() {
        run(async {
            let polling = Polling::start(Duration::from_secs(3600));
            for slept in 0..3 {
                steps_alone(&polling, HABIT_MAX).await;
                let mut steps = 0;
                while !polling.asleep.get() {
                    assert!(steps <= STEPS_BETWEEN_SLEEPS, "asleep {slept} times");
                    step(&polling, 1).await;
                    yield_now().await;
                    steps += u32::from(!polling.asleep.get());
                }
            }
        });
    }

    #[test]
    fn long_waits_end_it_unless_they_are_rare() {
        run(async {
            let polling = Polling::start(Duration::ZERO);
            learn(&polling, 2 * HABIT_MAX, true);
            learn(&polling, 1, false);
            assert!(polling.pays());
            for _ in 0..HABIT_MAX {
                learn(&polling, 1, false);
                learn(&polling, 1, true);
            }
            assert!(!polling.pays());
        });
    }
}

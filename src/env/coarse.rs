//! Timers for time-outs: cheap to start and drop, up to one [`TICK`] late.
//!
//! Nearly every time-out of an I/O is dropped unused. A timer of tokio's wakes the thread's event
//! loop with a system call whenever it is the next to ring, which each new one is when the thread
//! has little to do; four of these per write cost more than sealing a batch. So time-outs are kept
//! here, per thread, and one tokio timer rings for all of them every tick while there are any.
//!
//! They count the time in which their thread ran. After a pause (SIGSTOP, a snapshot or move of the
//! virtual machine, a processor that was not to be had) what it waited for may long be done and not
//! have been looked at: a device is not to be given up for that.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::task::Context;
use std::task::Poll;
use std::task::Waker;
use std::time::Duration;

use tokio::time::Instant;

/// How late a time-out may be.
pub(super) const TICK: Duration = Duration::from_millis(50);
/// A tick this late means that the thread did not run. Arbitrary: far above what a busy thread takes
/// for a turn, far below any time-out.
const PAUSE_MIN: Duration = Duration::from_millis(200);

/// The timers of a thread that have not rung.
#[derive(Default)]
struct Timers {
    /// By when they ring, in the time of [`Timers::now`], and a number that makes the key unique.
    waiting: BTreeMap<(Instant, u64), Waker>,
    next_number: u64,
    /// Since when the task that rings them has waited for its next tick; `None` without one.
    tick_begun: Option<Instant>,
    /// Time in which the thread did not run, as far as noticed.
    paused: Duration,
}

impl Timers {
    /// The time without pauses.
    fn now(&mut self) -> Instant {
        let now = Instant::now();
        if let Some(begun) = &mut self.tick_begun {
            let took = now.saturating_duration_since(*begun);
            if took >= PAUSE_MIN {
                self.paused += took - TICK;
                *begun = now - TICK;
            }
        }
        now.checked_sub(self.paused).unwrap_or(now)
    }
}

thread_local! {
    static TIMERS: RefCell<Timers> = RefCell::default();
}

/// Completes once its thread has run until `deadline`, or up to one [`TICK`] later. Dropping it
/// cancels it.
pub(super) struct CoarseSleep {
    deadline: Instant,
    /// Its key in [`Timers::waiting`], once it was polled.
    number: Option<u64>,
}

impl CoarseSleep {
    pub(super) fn new(duration: Duration) -> Self {
        let now = TIMERS.with_borrow_mut(Timers::now);
        Self { deadline: now + duration, number: None }
    }
}

impl Future for CoarseSleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let start = TIMERS.with_borrow_mut(|timers| {
            if let Some(number) = self.number {
                // Rung timers are taken out.
                let waker = timers.waiting.get_mut(&(self.deadline, number))?;
                waker.clone_from(context.waker());
                return Some(false);
            }
            self.number = Some(timers.next_number);
            timers.waiting.insert((self.deadline, timers.next_number), context.waker().clone());
            timers.next_number += 1;
            let begins = timers.tick_begun.is_none();
            timers.tick_begun.get_or_insert_with(Instant::now);
            Some(begins)
        });
        match start {
            None => return Poll::Ready(()),
            Some(true) => drop(tokio::task::spawn_local(tick(Ticking))),
            Some(false) => {}
        }
        Poll::Pending
    }
}

impl Drop for CoarseSleep {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            // The waker is dropped after the borrow ends: it may own a task with timers.
            let _waker =
                TIMERS.with_borrow_mut(|timers| timers.waiting.remove(&(self.deadline, number)));
        }
    }
}

/// Held by the task that rings; if it ends, by itself or with its runtime, the next timer starts
/// another.
struct Ticking;

impl Drop for Ticking {
    fn drop(&mut self) {
        TIMERS.with_borrow_mut(|timers| timers.tick_begun = None);
    }
}

/// Rings what is due every tick, as long as there is anything to ring.
async fn tick(ticking: Ticking) {
    let mut due = Vec::new();
    loop {
        tokio::time::sleep(TICK).await;
        let more = TIMERS.with_borrow_mut(|timers| {
            let now = timers.now();
            timers.tick_begun = Some(Instant::now());
            let later = timers.waiting.split_off(&(now, u64::MAX));
            due.extend(std::mem::replace(&mut timers.waiting, later).into_values());
            !timers.waiting.is_empty()
        });
        due.drain(..).for_each(Waker::wake);
        if !more {
            break;
        }
    }
    drop(ticking);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run<T>(work: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        tokio::task::LocalSet::new().block_on(&runtime.expect("runtime"), work)
    }

    fn waiting() -> usize {
        TIMERS.with_borrow(|timers| timers.waiting.len())
    }

    #[test]
    fn timers_ring_in_time_and_not_early() {
        run(async {
            let begun = Instant::now();
            let long = CoarseSleep::new(Duration::from_millis(120));
            CoarseSleep::new(Duration::from_millis(60)).await;
            assert!(begun.elapsed() >= Duration::from_millis(60));
            long.await;
            assert!(begun.elapsed() >= Duration::from_millis(120));
            assert_eq!(waiting(), 0);
        });
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "nothing else pauses a thread")]
    fn a_pause_of_the_thread_does_not_count() {
        run(async {
            let mut timer = Box::pin(CoarseSleep::new(Duration::from_millis(300)));
            let mut rung =
                async || std::future::poll_fn(|cx| Poll::Ready(timer.as_mut().poll(cx))).await;
            assert_eq!(rung().await, Poll::Pending);
            tokio::time::sleep(Duration::from_millis(10)).await;
            let begun = Instant::now();
            std::thread::sleep(Duration::from_millis(600));
            tokio::time::sleep(2 * TICK).await;
            let ran = begun.elapsed() - Duration::from_millis(600);
            assert!(rung().await.is_pending() || ran > Duration::from_millis(200), "{ran:?}");
            let after = CoarseSleep::new(Duration::from_millis(60));
            after.await;
            timer.await;
            assert!(begun.elapsed() >= Duration::from_millis(800));
            assert_eq!(waiting(), 0);
        });
    }

    #[test]
    fn a_dropped_timer_leaves_nothing_and_the_next_runtime_rings_its_own() {
        run(async {
            let mut timer = Box::pin(CoarseSleep::new(Duration::from_secs(3600)));
            assert_eq!(
                std::future::poll_fn(|cx| Poll::Ready(timer.as_mut().poll(cx))).await,
                Poll::Pending
            );
            assert_eq!(waiting(), 1);
        });
        assert_eq!(waiting(), 0);
        run(CoarseSleep::new(Duration::from_millis(10)));
    }
}

//! Timers for time-outs: cheap to start and drop, up to one [`TICK`] late.
//!
//! Nearly every time-out of an I/O is dropped unused. A timer of tokio's wakes the thread's event
//! loop with a system call whenever it is the next to ring, which each new one is when the thread
//! has little to do; four of these per write cost more than sealing a batch. So time-outs are kept
//! here, per thread, and one tokio timer rings for all of them every tick while there are any.

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

/// The timers of a thread that have not rung.
#[derive(Default)]
struct Timers {
    /// By when they ring and a number that makes the key unique.
    waiting: BTreeMap<(Instant, u64), Waker>,
    next_number: u64,
    /// Whether a task rings them.
    ticking: bool,
}

thread_local! {
    static TIMERS: RefCell<Timers> = RefCell::default();
}

/// Completes at `deadline` or up to one [`TICK`] later. Dropping it cancels it.
pub(super) struct CoarseSleep {
    deadline: Instant,
    /// Its key in [`Timers::waiting`], once it was polled.
    number: Option<u64>,
}

impl CoarseSleep {
    pub(super) fn new(duration: Duration) -> Self {
        Self { deadline: Instant::now() + duration, number: None }
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
            Some(!std::mem::replace(&mut timers.ticking, true))
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
        TIMERS.with_borrow_mut(|timers| timers.ticking = false);
    }
}

/// Rings what is due every tick, as long as there is anything to ring.
async fn tick(ticking: Ticking) {
    let mut due = Vec::new();
    loop {
        tokio::time::sleep(TICK).await;
        let now = Instant::now();
        let more = TIMERS.with_borrow_mut(|timers| {
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

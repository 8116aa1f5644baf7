//! Polling: a data-plane thread that worked a moment ago looks for more before it goes to sleep.
//!
//! Being woken costs a thread about 21 us on a virtual machine, which is most of what one small
//! request takes. So a task of the thread yields over and over, which makes the event loop look at
//! every socket, timer and device of the thread without waiting, until nothing was done for the
//! span that the operator set; then it sleeps until a connection has work again.
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

/// Whether a thread has work, or had some lately.
pub(super) struct Polling {
    span: Duration,
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
            worked: Cell::new(false),
            asleep: Cell::new(false),
            wake: Notify::new(),
        });
        spawn_local(Rc::clone(&polling).spin());
        polling
    }

    /// Does `work`, each step of which keeps the thread polling.
    pub(super) async fn watch<F: Future>(&self, work: F) -> F::Output {
        let mut work = pin!(work);
        poll_fn(|cx| {
            self.worked.set(true);
            if self.asleep.take() {
                self.wake.notify_one();
            }
            work.as_mut().poll(cx)
        })
        .await
    }

    async fn spin(self: Rc<Self>) {
        loop {
            let mut last_work = Instant::now();
            while last_work.elapsed() < self.span {
                yield_now().await;
                if self.worked.take() {
                    last_work = Instant::now();
                }
            }
            self.asleep.set(true);
            self.wake.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::ready;

    use rustix::time::ClockId;
    use rustix::time::clock_gettime;
    use tokio::runtime;
    use tokio::task::LocalSet;
    use tokio::time::sleep;
    use tokio::time::timeout;

    use super::*;

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
                polling.watch(ready(())).await;
                assert!(!polling.asleep.get(), "work ends the sleep");
            }
        });
    }

    #[test]
    fn a_thread_with_work_does_not_sleep() {
        run(async {
            let polling = Polling::start(Duration::from_secs(3600));
            polling.watch(ready(())).await;
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
    fn each_step_of_the_work_counts() {
        run(async {
            let polling = Polling::start(Duration::ZERO);
            until_asleep(&polling).await;
            let steps = async {
                for _ in 0..3 {
                    // Cleared, to see that the next step sets it.
                    polling.worked.set(false);
                    yield_now().await;
                    assert!(polling.worked.get() && !polling.asleep.get());
                }
            };
            polling.watch(steps).await;
        });
    }
}

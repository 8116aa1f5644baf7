//! One io_uring per thread, joined to tokio by an eventfd.
//!
//! [`start`] puts an I/O on the calling thread's ring, made on first use. One local task, the
//! reaper, enters the kernel once per scheduler pass: it submits what was queued meanwhile and
//! completes what is done, waking waiters inline. Beyond [`IN_FLIGHT_MAX`] I/Os wait in a queue.
//!
//! The ring is set up with `SINGLE_ISSUER | COOP_TASKRUN | DEFER_TASKRUN`. With these the ring's own
//! descriptor never becomes readable in epoll for work that completes later, so completions are
//! announced through a registered eventfd.
//!
//! A reaper belongs to the `LocalSet` in which the first I/O was started. When that is dropped the
//! next I/O starts another; while it exists and is not polled, no I/O of the thread completes.
//!
//! # Invariants
//! * `slots[n]` is `Some` from before an entry with user data `n` is pushed until its completion is
//!   reaped; it owns the memory and keeps the file open. So dropping a future frees nothing.
//! * A ring is dropped only after every I/O on it is over.
//! * The ring is used on one thread only: it lives in a thread-local and behind `Rc`.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;
use std::task::Waker;
use std::time::Duration;

use bytes::Bytes;
use io_uring::IoUring;
use io_uring::opcode;
use io_uring::squeue;
use io_uring::types;
use rustix::event::EventfdFlags;
use rustix::fs::FallocateFlags;
use rustix::io::ReadWriteFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;
use tokio::time::Sleep;

use crate::device::AlignedBuf;
use crate::units::bytes_u64;

/// I/Os in the kernel at once, per thread; more wait their turn here. Twice the depth at which
/// the disks we measured gain nothing more.
const IN_FLIGHT_MAX: u32 = 256;

/// How often an I/O may be interrupted, or refused for want of memory, before that is its error.
/// Arbitrary: the kernel retries by itself, so one refusal is rare already.
const REFUSALS_MAX: u32 = 64;

/// How long to leave a kernel alone that had no memory for an I/O. Arbitrary: short against the
/// time-out of an I/O, long against a system call.
const RETRY_AFTER: Duration = Duration::from_millis(1);

/// What to do with a file.
pub(super) enum Work {
    /// Fill the buffer.
    Read(AlignedBuf),
    /// Write all of it; `durable` completes only when it is on stable storage (RWF_DSYNC).
    Write { data: Bytes, durable: bool },
    /// Make everything written before durable (fdatasync).
    Flush,
    /// Give this many bytes back (punch a hole).
    Discard { length: u64 },
}

/// The buffer of a read comes back; nothing for the rest.
pub(super) type Outcome = io::Result<Option<AlignedBuf>>;

/// Starts an I/O on this thread's ring. Dropping the receiver leaves the I/O to itself.
///
/// # Errors
/// If this machine gives us no ring. Errors of the I/O come through the receiver, which is closed
/// without a value only if the thread ends.
///
/// # Panics
/// Outside a tokio `LocalSet` of a runtime with I/O and time enabled.
pub(super) fn start(
    file: Arc<OwnedFd>,
    offset: u64,
    work: Work,
) -> io::Result<oneshot::Receiver<Outcome>> {
    let ring = this_thread()?;
    ensure_reaper(&ring)?;
    let (reply, receiver) = oneshot::channel();
    let waker = {
        let mut ring = ring.borrow_mut();
        ring.waiting.push_back(InFlight { file, offset, work, done: 0, refusals: 0, reply });
        ring.fill_queue();
        ring.reaper.take()
    };
    if let Some(waker) = waker {
        waker.wake();
    }
    Ok(receiver)
}

/// Sets up a ring as a thread that starts an I/O would, and takes it down again.
///
/// # Errors
/// What the kernel refused it with: `ENOSYS` and `EPERM` if io_uring is not there or not allowed,
/// `ENOMEM` if the limit of locked memory does not reach.
pub fn try_ring() -> io::Result<()> {
    Ring::new().map(drop)
}

thread_local! {
    static RING: RefCell<Option<Rc<RefCell<Ring>>>> = const { RefCell::new(None) };
}

fn this_thread() -> io::Result<Rc<RefCell<Ring>>> {
    RING.with_borrow_mut(|slot| {
        if let Some(ring) = slot {
            return Ok(ring.clone());
        }
        let ring = Rc::new(RefCell::new(Ring::new()?));
        *slot = Some(ring.clone());
        Ok(ring)
    })
}

struct InFlight {
    file: Arc<OwnedFd>,
    offset: u64,
    work: Work,
    /// Bytes moved so far; less than asked for after a short read or write.
    done: usize,
    /// See [`REFUSALS_MAX`].
    refusals: u32,
    reply: oneshot::Sender<Outcome>,
}

struct Ring {
    uring: IoUring,
    /// Signalled by the kernel when there are completions to reap.
    eventfd: OwnedFd,
    slots: Vec<Option<InFlight>>,
    /// Indices of the empty slots.
    free: Vec<usize>,
    waiting: VecDeque<InFlight>,
    /// Set while the reaper sleeps; taken by whoever wakes it.
    reaper: Option<Waker>,
    /// Whether a reaper task exists.
    reaped: bool,
}

impl Ring {
    fn new() -> io::Result<Self> {
        let uring = IoUring::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .build(IN_FLIGHT_MAX)
            // Kernels before 6.1 know none of these.
            .or_else(|error| match error.raw_os_error() {
                Some(EINVAL) => IoUring::new(IN_FLIGHT_MAX),
                _ => Err(error),
            })?;
        let eventfd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        uring.submitter().register_eventfd(eventfd.as_raw_fd())?;
        let count = IN_FLIGHT_MAX as usize;
        Ok(Self {
            uring,
            eventfd,
            slots: (0..count).map(|_| None).collect(),
            free: (0..count).rev().collect(),
            waiting: VecDeque::new(),
            reaper: None,
            reaped: false,
        })
    }

    /// Moves waiting I/Os to the submission queue as far as slots reach.
    fn fill_queue(&mut self) {
        while !self.waiting.is_empty()
            && let Some(slot) = self.free.pop()
        {
            self.slots[slot] = self.waiting.pop_front();
            self.push(slot);
        }
    }

    /// Queues what is left of the I/O in `slot`.
    fn push(&mut self, slot: usize) {
        let io = self.slots[slot].as_mut().expect("a slot is filled before it is pushed");
        let entry = io.entry().user_data(bytes_u64(slot));
        // SAFETY: the entry points into `slots[slot]`, which by the struct's invariant stays as
        // it is until the completion; the slot also keeps the file open.
        let pushed = unsafe { self.uring.submission().push(&entry) };
        pushed.expect("the queue has one entry per slot");
    }

    /// Submits what is queued, then completes what is done; until neither is left.
    ///
    /// Says false if the kernel had no memory to take all of it: try again after [`RETRY_AFTER`].
    fn turn(&mut self) -> io::Result<bool> {
        loop {
            match self.pass()?.next() {
                Next::Again => {}
                Next::Sleep => return Ok(true),
                Next::Later => return Ok(false),
            }
        }
    }

    /// Enters the kernel once if there is reason to, and reaps.
    fn pass(&mut self) -> io::Result<Pass> {
        self.fill_queue();
        let queue = self.uring.submission();
        let queued = queue.len();
        let enter = queued > 0 || queue.taskrun() || queue.cq_overflow();
        drop(queue);
        let refused = enter && !self.enter(0)?;
        let left = self.uring.submission().len();
        let submitted = queued - left;
        Ok(Pass { submitted, left, refused, reaped: self.reap() })
    }

    /// Enters the kernel; false if it refuses until there is more memory or a completion is reaped.
    fn enter(&mut self, wait_for: usize) -> io::Result<bool> {
        loop {
            match self.uring.submit_and_wait(wait_for) {
                Ok(_) => return Ok(true),
                Err(error) => match error.raw_os_error() {
                    Some(EINTR) => {}
                    Some(EAGAIN | EBUSY) => return Ok(false),
                    _ => return Err(error),
                },
            }
        }
    }

    /// Completes everything in the completion queue; says whether there was anything.
    fn reap(&mut self) -> bool {
        let mut any = false;
        loop {
            let completion = self.uring.completion().next();
            let Some(completion) = completion else { return any };
            any = true;
            let slot = usize::try_from(completion.user_data()).expect("our own slot index");
            let io = self.slots[slot].as_mut().expect("completions come once, for filled slots");
            match io.advance(completion.result()) {
                None => self.push(slot),
                Some(result) => {
                    let io = self.slots[slot].take().expect("looked at above");
                    self.free.push(slot);
                    io.finish(result);
                }
            }
        }
    }

    fn idle(&self) -> bool {
        self.free.len() == self.slots.len() && self.waiting.is_empty()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // Nobody waits for I/O that was never submitted.
        self.waiting.clear();
        while !self.idle() {
            if self.enter(1).is_err() {
                // Freeing a buffer the kernel may still write to would be worse.
                std::process::abort();
            }
            self.reap();
        }
    }
}

/// What one pass of [`Ring::turn`] achieved.
#[derive(Clone, Copy, Debug)]
struct Pass {
    /// Entries the kernel took.
    submitted: usize,
    /// Entries it did not take.
    left: usize,
    /// Whether it wants us to come again later.
    refused: bool,
    /// Whether anything was completed.
    reaped: bool,
}

/// What follows a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Another pass.
    Again,
    /// Sleep until a signal of the eventfd or another I/O.
    Sleep,
    /// Another pass after [`RETRY_AFTER`]: no signal will come for what the kernel did not take.
    Later,
}

impl Pass {
    /// Only progress is worth another pass. The kernel's flags are not: it sets TASKRUN after it
    /// queued the work, so if we run the work in between, the flag stays set over an empty list
    /// until the next I/O completes. Nothing is missed by sleeping over a set flag, as work added
    /// to an empty list signals the eventfd.
    fn next(self) -> Next {
        if self.submitted > 0 || self.reaped {
            Next::Again
        } else if self.left > 0 || self.refused {
            Next::Later
        } else {
            Next::Sleep
        }
    }
}

impl InFlight {
    fn entry(&mut self) -> squeue::Entry {
        let fd = types::Fd(self.file.as_raw_fd());
        let offset = self.offset + bytes_u64(self.done);
        match &mut self.work {
            Work::Read(buf) => {
                let length = rest_length(buf.len(), self.done);
                let start = buf.start_mut().wrapping_add(self.done);
                opcode::Read::new(fd, start, length).offset(offset).build()
            }
            Work::Write { data, durable } => {
                let rest = &data[self.done..];
                let flags = if *durable { ReadWriteFlags::DSYNC } else { ReadWriteFlags::empty() };
                opcode::Write::new(fd, rest.as_ptr(), rest_length(data.len(), self.done))
                    .offset(offset)
                    .rw_flags(flags.bits().cast_signed())
                    .build()
            }
            Work::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Work::Discard { length } => {
                let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                opcode::Fallocate::new(fd, *length)
                    .offset(self.offset)
                    .mode(mode.bits().cast_signed())
                    .build()
            }
        }
    }

    /// Takes a completion in; `None` if the rest must be asked for again.
    fn advance(&mut self, result: i32) -> Option<io::Result<()>> {
        let Ok(moved) = usize::try_from(result) else {
            return match -result {
                EINTR | EAGAIN if self.refusals < REFUSALS_MAX => {
                    self.refusals += 1;
                    None
                }
                errno => Some(Err(io::Error::from_raw_os_error(errno))),
            };
        };
        let (length, ended) = match &self.work {
            Work::Flush | Work::Discard { .. } => return Some(Ok(())),
            Work::Read(buf) => (buf.len(), io::ErrorKind::UnexpectedEof),
            Work::Write { data, .. } => (data.len(), io::ErrorKind::WriteZero),
        };
        self.done += moved;
        assert!(self.done <= length, "the kernel moved more than it was asked to");
        if self.done == length {
            return Some(Ok(()));
        }
        (moved == 0).then(|| Err(ended.into()))
    }

    fn finish(self, result: io::Result<()>) {
        let buf = match self.work {
            Work::Read(buf) => Some(buf),
            Work::Write { .. } | Work::Flush | Work::Discard { .. } => None,
        };
        // A future that was dropped wants no answer.
        let _ = self.reply.send(result.map(|()| buf));
    }
}

fn rest_length(length: usize, done: usize) -> u32 {
    u32::try_from(length - done).expect("I/O is far below 4 GiB")
}

const EINTR: i32 = rustix::io::Errno::INTR.raw_os_error();
const EAGAIN: i32 = rustix::io::Errno::AGAIN.raw_os_error();
const EBUSY: i32 = rustix::io::Errno::BUSY.raw_os_error();
const EINVAL: i32 = rustix::io::Errno::INVAL.raw_os_error();

/// Starts the reaper unless there is one. A reaper dies with its `LocalSet`; the ring does not.
fn ensure_reaper(ring: &Rc<RefCell<Ring>>) -> io::Result<()> {
    let mut state = ring.borrow_mut();
    if state.reaped {
        return Ok(());
    }
    // A clone, since the registration with this runtime ends with the task.
    let eventfd = state.eventfd.as_fd().try_clone_to_owned()?;
    // SAFETY: the descriptor is open, and an `OwnedFd` moved in here stays the same one until the
    // `AsyncFd` is dropped.
    let eventfd = unsafe { AsyncFd::register_with_interest(eventfd, Interest::READABLE) };
    let eventfd = eventfd.map_err(|error| error.into_parts().1)?;
    state.reaped = true;
    drop(state);
    let mut reaper = Reaper { ring: ring.clone(), eventfd, retry: None };
    tokio::task::spawn_local(std::future::poll_fn(move |context| reaper.poll(context)));
    Ok(())
}

struct Reaper {
    ring: Rc<RefCell<Ring>>,
    eventfd: AsyncFd<OwnedFd>,
    /// Runs while the kernel has refused an entry.
    retry: Option<Pin<Box<Sleep>>>,
}

impl Reaper {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        loop {
            // Readiness is edge-triggered: every signal of the kernel is a new edge, so the
            // counter need not be read. It is cleared before the look, or a signal could be lost.
            let ready = self.eventfd.poll_read_ready(context);
            let signalled = match ready {
                Poll::Ready(Ok(mut guard)) => {
                    guard.clear_ready();
                    true
                }
                // The runtime is stopping: the next one starts another reaper.
                Poll::Ready(Err(_)) => return Poll::Ready(()),
                Poll::Pending => false,
            };
            let mut ring = self.ring.borrow_mut();
            let settled = ring.turn().expect("a ring that was set up can be entered");
            if settled {
                self.retry = None;
            }
            let due = !settled && retry_due(&mut self.retry, context);
            if !signalled && !due {
                ring.reaper = Some(context.waker().clone());
                return Poll::Pending;
            }
        }
    }
}

/// Starts the timer or asks it; once it has rung it is gone.
fn retry_due(timer: &mut Option<Pin<Box<Sleep>>>, context: &mut Context<'_>) -> bool {
    let sleep = timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(RETRY_AFTER)));
    let due = sleep.as_mut().poll(context).is_ready();
    if due {
        *timer = None;
    }
    due
}

impl Drop for Reaper {
    fn drop(&mut self) {
        // The ring is borrowed only if `turn` panicked.
        if let Ok(mut ring) = self.ring.try_borrow_mut() {
            ring.reaped = false;
            ring.reaper = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Pass = Pass { submitted: 0, left: 0, refused: false, reaped: false };

    #[test]
    fn only_progress_is_worth_another_pass() {
        // Entered for a TASKRUN flag with no work behind it: it stays set however often we enter.
        assert_eq!(NOTHING.next(), Next::Sleep);
        for progress in [Pass { submitted: 1, ..NOTHING }, Pass { reaped: true, ..NOTHING }] {
            assert_eq!(progress.next(), Next::Again);
            // What completed may have been what the kernel wanted room for.
            assert_eq!(Pass { refused: true, left: 3, ..progress }.next(), Next::Again);
        }
    }

    #[test]
    fn what_the_kernel_did_not_take_is_tried_later() {
        assert_eq!(Pass { left: 1, ..NOTHING }.next(), Next::Later);
        assert_eq!(Pass { refused: true, ..NOTHING }.next(), Next::Later);
    }

    #[test]
    fn an_idle_ring_settles_without_entering() {
        let mut ring = Ring::new().expect("ring");
        assert!(ring.turn().expect("turn"));
        let pass = ring.pass().expect("pass");
        assert!(!pass.reaped && !pass.refused && pass.submitted == 0 && pass.left == 0);
    }
}

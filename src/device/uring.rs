//! One io_uring per thread, joined to tokio by an eventfd.
//!
//! [`start`] puts an I/O on the calling thread's ring, made on first use. One local task, the
//! reaper, enters the kernel once per scheduler pass: it submits what was queued meanwhile and
//! completes what is done, waking waiters inline. Beyond [`IN_FLIGHT_MAX`] I/Os wait in a queue.
//!
//! Each file has a queue of its own, and gets a slot while it has fewer than half as many as are
//! free. So files share the slots, and one that completes nothing any more keeps a third of them at
//! most, the next one a third of the rest: there are always some for the others.
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
use std::os::fd::RawFd;
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

/// I/Os in the kernel at once, per thread; more wait their turn here. A third of it, which is what
/// one file may have, is more than the depth (128) at which the disks we measured gain nothing more.
const IN_FLIGHT_MAX: u32 = 512;

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
        ring.enqueue(InFlight { file, offset, work, done: 0, refusals: 0, reply });
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

/// The I/Os of one file.
struct FileQueue {
    /// Its descriptor, which is nobody else's as long as an I/O keeps it open.
    descriptor: RawFd,
    /// Of its I/Os, those that have a slot.
    in_flight: usize,
    waiting: VecDeque<InFlight>,
}

struct Ring {
    uring: IoUring,
    /// Signalled by the kernel when there are completions to reap.
    eventfd: OwnedFd,
    slots: Vec<Option<InFlight>>,
    /// Indices of the empty slots.
    free: Vec<usize>,
    /// Those with any I/O: a handful, in no order.
    files: Vec<FileQueue>,
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
        // What the kernel cannot do without waiting it gives to threads, by default so few that one
        // file could hold them all. Kernels before 5.15 know no such limit.
        let _ = uring.submitter().register_iowq_max_workers(&mut [IN_FLIGHT_MAX, 0]);
        let count = IN_FLIGHT_MAX as usize;
        Ok(Self {
            uring,
            eventfd,
            slots: (0..count).map(|_| None).collect(),
            free: (0..count).rev().collect(),
            files: Vec::new(),
            reaper: None,
            reaped: false,
        })
    }

    fn enqueue(&mut self, io: InFlight) {
        let descriptor = io.file.as_raw_fd();
        match self.files.iter_mut().find(|file| file.descriptor == descriptor) {
            Some(file) => file.waiting.push_back(io),
            None => {
                self.files.push(FileQueue { descriptor, in_flight: 0, waiting: [io].into() });
            }
        }
    }

    /// Moves waiting I/Os to the submission queue as far as slots reach.
    fn fill_queue(&mut self) {
        while let Some(index) = self.next_file() {
            let file = &mut self.files[index];
            let io = file.waiting.pop_front().expect("it was chosen for that");
            if io.is_pointless() {
                self.forget_if_idle(index);
                continue;
            }
            file.in_flight += 1;
            let slot = self.free.pop().expect("more are free than are in flight");
            self.slots[slot] = Some(io);
            self.push(slot);
        }
    }

    /// Whose turn it is: of the files with I/O waiting that may have another slot, the one with the
    /// fewest.
    fn next_file(&self) -> Option<usize> {
        let free = self.free.len();
        let may_start = |file: &FileQueue| !file.waiting.is_empty() && 2 * file.in_flight < free;
        let files = self.files.iter().enumerate().filter(|(_, file)| may_start(file));
        files.min_by_key(|(_, file)| file.in_flight).map(|(index, _)| index)
    }

    fn forget_if_idle(&mut self, index: usize) {
        let file = &self.files[index];
        if file.in_flight == 0 && file.waiting.is_empty() {
            self.files.swap_remove(index);
        }
    }

    /// Empties a slot whose I/O is over.
    fn release(&mut self, slot: usize) -> InFlight {
        let io = self.slots[slot].take().expect("an I/O is over once");
        self.free.push(slot);
        let descriptor = io.file.as_raw_fd();
        let index = self.files.iter().position(|file| file.descriptor == descriptor);
        let index = index.expect("a file is known while it has I/O");
        self.files[index].in_flight -= 1;
        self.forget_if_idle(index);
        io
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
                Some(result) => self.release(slot).finish(result),
            }
        }
    }

    fn idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // Nobody waits for I/O that was never submitted.
        self.files.iter_mut().for_each(|file| file.waiting.clear());
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
    /// A read that nobody waits for any more need not be started. Anything else must be.
    fn is_pointless(&self) -> bool {
        matches!(self.work, Work::Read(_)) && self.reply.is_closed()
    }

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

    /// More than there are slots.
    const MANY: usize = 600;
    /// The most that one file has in flight.
    const SHARE: usize = 171;
    /// How long an I/O on a file that works may take. Generous: the machine may be busy.
    const PATIENCE: Duration = Duration::from_secs(20);

    fn scratch_file() -> Arc<OwnedFd> {
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::TMPFILE;
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        Arc::new(rustix::fs::open(std::env::temp_dir(), flags, mode).expect("temporary file"))
    }

    /// Starts many reads that never complete: of a pipe, as long as nobody writes to it.
    fn hang() -> (Vec<oneshot::Receiver<Outcome>>, io::PipeWriter) {
        let (reader, writer) = io::pipe().expect("pipe");
        let reader = Arc::new(OwnedFd::from(reader));
        let read = |_| start(Arc::clone(&reader), 0, Work::Read(AlignedBuf::zeroed(4096)));
        ((0..MANY).map(read).collect::<io::Result<_>>().expect("started"), writer)
    }

    fn on_a_ring(work: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        tokio::task::LocalSet::new().block_on(&runtime.expect("runtime"), work);
    }

    #[test]
    fn files_that_hang_leave_slots_for_the_others() {
        on_a_ring(async {
            let hanging = [hang(), hang(), hang()];
            let file = scratch_file();
            let write = |_| {
                let data = AlignedBuf::zeroed(4096).freeze();
                start(Arc::clone(&file), 0, Work::Write { data, durable: false }).expect("started")
            };
            let writes = futures_util::future::join_all((0..MANY).map(write));
            let written = tokio::time::timeout(PATIENCE, writes).await.expect("not held up");
            assert!(written.into_iter().all(|outcome| outcome.is_ok_and(|result| result.is_ok())));

            for (reads, writer) in hanging {
                // The pipe ends, and with it all that was waiting.
                drop(writer);
                let ended = futures_util::future::join_all(reads);
                let ended = tokio::time::timeout(PATIENCE, ended).await.expect("ended");
                assert!(ended.into_iter().all(|outcome| outcome.is_ok_and(|read| read.is_err())));
            }
            let ring = this_thread().expect("ring");
            assert!(ring.borrow().idle() && ring.borrow().files.is_empty());
        });
    }

    #[test]
    fn reads_that_nobody_waits_for_any_more_are_not_started() {
        on_a_ring(async {
            let (mut reads, mut writer) = hang();
            let ring = this_thread().expect("ring");
            assert_eq!(ring.borrow().files[0].in_flight, SHARE);
            reads.truncate(SHARE);
            assert_eq!(ring.borrow().files[0].waiting.len(), MANY - SHARE);
            io::Write::write_all(&mut writer, &[7; 4096]).expect("written");
            let (outcome, ..) = futures_util::future::select_all(reads).await;
            assert!(outcome.is_ok_and(|read| read.is_ok()));
            assert_eq!(ring.borrow().files[0].in_flight, SHARE - 1);
            assert!(ring.borrow().files[0].waiting.is_empty());
        });
    }

    #[test]
    fn an_idle_ring_settles_without_entering() {
        let mut ring = Ring::new().expect("ring");
        assert!(ring.turn().expect("turn"));
        let pass = ring.pass().expect("pass");
        assert!(!pass.reaped && !pass.refused && pass.submitted == 0 && pass.left == 0);
    }
}

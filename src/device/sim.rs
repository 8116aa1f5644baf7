//! The simulator's disk: sparse, adversarial, and alive across crashes of the process using it.
//!
//! A [`SimDisk`] keeps what a read sees (`live`) apart from what power loss leaves (`durable`) and
//! remembers every completed write in between. Each I/O is drawn a latency and perhaps a fault when
//! it is issued, and takes effect when it is due, so I/Os complete out of order. Crash models:
//!
//! * [`SimDisk::crash`]: power loss. Completed durable writes and flushed ones survive; every other
//!   write, also one in flight, is kept whole, lost whole, or torn between sectors.
//! * [`SimDisk::kill`]: the process dies. All completed writes survive; one in flight lands or not.
//! * neither: I/O in flight goes on by itself, as the kernel's does.
//!
//! Nothing here schedules: I/O that is due is settled whenever anybody looks at the disk.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::future::Future;
use std::mem;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;
use std::task::Waker;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use parking_lot::Mutex;

use crate::device::AlignedBuf;
use crate::device::Device;
use crate::device::DeviceRef;
use crate::device::Durability;
use crate::device::sim::judge::Verdict;
use crate::device::sim::pages::PAGE_BYTES_U64;
use crate::device::sim::pages::Pages;
use crate::env::EnvRef;
use crate::env::LocalBoxFuture;
use crate::env::Rng;
use crate::env::sim::Choose;
use crate::env::sim::SeededRng;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::units::bytes_u64;
use crate::units::bytes_usize;

mod faults;
mod judge;
mod pages;

pub use faults::OneShot;
pub use faults::SimCounters;
pub use faults::SimFaults;
pub use faults::SimProfile;

/// Most bits flipped by one [`SimDisk::rot`].
const ROTTEN_BITS_MAX: u64 = 8;

/// A handle to a disk; clones share it.
#[derive(Clone)]
pub struct SimDisk(Arc<Shared>);

struct Shared {
    name: String,
    profile: SimProfile,
    /// Guards everything that changes; never held across an await.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// What a read sees.
    live: Pages,
    /// What survives power loss for certain.
    durable: Pages,
    /// Completed writes that are not durable, in order of completion.
    unflushed: Vec<Unflushed>,
    /// Number of the last write completed; orders `unflushed` against flushes.
    last_completed: u64,
    last_io: u64,
    /// Issued and not over.
    pending: BTreeMap<u64, Io>,
    /// When each pending I/O takes effect, except those that hang.
    due: BTreeSet<(Duration, u64)>,
    /// When the disk will have served all it was given: see [`SimProfile::service_time`].
    busy_until: Duration,
    /// Results not yet collected.
    done: BTreeMap<u64, Result<Option<AlignedBuf>>>,
    faults: SimFaults,
    /// What has room though it may never have been written.
    reserved: Vec<Range<u64>>,
    one_shots: Vec<(OneShot, Range<u64>)>,
    counters: SimCounters,
}

struct Unflushed {
    number: u64,
    offset: u64,
    data: Bytes,
    /// Offsets of its sectors that a later durable write has replaced.
    superseded: BTreeSet<u64>,
}

struct Io {
    offset: u64,
    work: Work,
    verdict: Verdict,
    waker: Option<Waker>,
    /// False once its future was dropped.
    wanted: bool,
}

enum Work {
    Read(AlignedBuf),
    Write {
        data: Bytes,
        durability: Durability,
    },
    /// Covers writes up to this number.
    Flush {
        covers: u64,
    },
    Discard {
        length: u64,
    },
}

/// How a crash treats the writes in its hands. Whole outcomes are likely, so that later records
/// survive intact past lost ones.
#[derive(Clone, Copy)]
enum Loss {
    All,
    None,
    Each,
}

impl SimDisk {
    /// An empty disk.
    #[must_use]
    pub fn new(name: impl Into<String>, profile: SimProfile) -> Self {
        assert!(profile.sector_bytes.is_power_of_two(), "a sector is a power of two");
        assert!((512..=PAGE_BYTES_U64).contains(&profile.sector_bytes), "sectors are 512 to 4096");
        assert!(profile.len_bytes.is_multiple_of(profile.sector_bytes), "disks are whole sectors");
        assert!(profile.latency_min <= profile.latency_max, "latencies are a range");
        Self(Arc::new(Shared { name: name.into(), profile, state: Mutex::default() }))
    }

    /// The disk as a device of one process, whose clock and randomness it uses.
    #[must_use]
    pub fn open(&self, env: &EnvRef) -> DeviceRef {
        Arc::new(SimDevice { disk: self.0.clone(), env: env.clone() })
    }

    /// Sets which faults are in force from now on. Does not end hangs: see [`SimDisk::release`].
    pub fn set_faults(&self, faults: SimFaults) {
        let mut state = self.0.state.lock();
        let gone = faults.gone;
        state.faults = faults;
        // A device that disappears fails what it was doing.
        if gone {
            state.make_hung_due();
        }
    }

    /// The faults in force.
    #[must_use]
    pub fn faults(&self) -> SimFaults {
        self.0.state.lock().faults.clone()
    }

    /// The next I/O that `fault` fits and that starts within `offsets` suffers it. Flushes start
    /// at 0.
    pub fn inject(&self, fault: OneShot, offsets: Range<u64>) {
        self.0.state.lock().one_shots.push((fault, offsets));
    }

    /// Ends `hung` and lets every I/O that hangs complete.
    pub fn release(&self) {
        let mut state = self.0.state.lock();
        state.faults.hung = false;
        state.make_hung_due();
    }

    /// Flips one to eight bits stored within the range, durably and silently.
    pub fn rot(&self, offset: u64, length: u64, rng: &dyn Rng) {
        let mut state = self.0.state.lock();
        for _ in 0..=rng.below(ROTTEN_BITS_MAX) {
            let at = offset + rng.below(length);
            let bit = 1 << rng.below(8);
            state.live.flip(at, bit);
            state.durable.flip(at, bit);
            state.counters.rotten_bits += 1;
        }
    }

    /// The offset of some 4096 bytes that hold something, drawn evenly; `None` on an empty disk.
    #[must_use]
    pub fn stored_page(&self, rng: &dyn Rng) -> Option<u64> {
        let state = self.0.state.lock();
        let count = bytes_u64(state.live.count());
        if count == 0 { None } else { state.live.nth(rng.below(count)) }
    }

    /// Power loss: whatever was not durable is kept, lost or torn, and all I/O in flight is over.
    pub fn crash(&self, rng: &dyn Rng) {
        let mut state = self.0.state.lock();
        let loss = match rng.below(4) {
            0 => Loss::All,
            1 => Loss::None,
            _ => Loss::Each,
        };
        for write in mem::take(&mut state.unflushed) {
            let kept = self.survivors(&mut state, &write.data, loss, rng);
            let live = |at: &u64| !write.superseded.contains(at);
            let kept = sectors(write.offset, &write.data, self.sector(), &kept);
            kept.filter(|(at, _)| live(at))
                .for_each(|(at, sector)| state.durable.write(at, sector));
        }
        for io in state.end_all("power was lost") {
            let Some((offset, data)) = io.lands() else { continue };
            let kept = self.survivors(&mut state, &data, loss, rng);
            sectors(offset, &data, self.sector(), &kept)
                .for_each(|(at, sector)| state.durable.write(at, sector));
        }
        state.live = state.durable.clone();
    }

    /// The process is killed: what it was told is there, what is in flight may land or not.
    pub fn kill(&self, rng: &dyn Rng) {
        let mut state = self.0.state.lock();
        for io in state.end_all("the process was killed") {
            let Some((offset, data)) = io.lands() else { continue };
            let durable = io.durable() && !state.faults.lies_about_flush;
            let kept = self.survivors(&mut state, &data, Loss::Each, rng);
            for (at, sector) in sectors(offset, &data, self.sector(), &kept) {
                state.store(at, &data.slice_ref(sector), durable, self.sector());
            }
        }
    }

    /// What has happened so far.
    #[must_use]
    pub fn counters(&self) -> SimCounters {
        self.0.state.lock().counters.clone()
    }

    /// Bytes stored, in whole pages of 4096.
    #[must_use]
    pub fn allocated_bytes(&self) -> u64 {
        bytes_u64(self.0.state.lock().live.count()) * PAGE_BYTES_U64
    }

    /// I/Os issued and not over, hanging ones included.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.0.state.lock().pending.len()
    }

    /// Reads what is stored, at once and whatever faults are in force: for checkers.
    pub fn peek(&self, offset: u64, buf: &mut [u8]) {
        self.0.state.lock().live.read(offset, buf);
    }

    /// Changes what is stored, at once and durably: for damage of a chosen kind.
    pub fn poke(&self, offset: u64, data: &[u8]) {
        let mut state = self.0.state.lock();
        state.live.write(offset, data);
        state.durable.write(offset, data);
    }

    fn sector(&self) -> u64 {
        self.0.profile.sector_bytes
    }

    /// Which sectors of a write survive, one flag each.
    fn survivors(&self, state: &mut State, data: &[u8], loss: Loss, rng: &dyn Rng) -> Vec<bool> {
        let kept = fate(data.len() / bytes_usize(self.sector()), loss, rng);
        match kept.iter().filter(|&&kept| kept).count() {
            0 => state.counters.crash_lost += 1,
            count if count == kept.len() => state.counters.crash_kept += 1,
            _ => state.counters.crash_torn += 1,
        }
        kept
    }
}

/// Draws which of `count` sectors of a write survive.
fn fate(count: usize, loss: Loss, rng: &dyn Rng) -> Vec<bool> {
    let outcome = match loss {
        Loss::All => 0,
        Loss::None => 3,
        Loss::Each => rng.below(8),
    };
    match outcome {
        0..=1 => vec![false; count],
        // Torn anywhere, or after a prefix.
        2 => (0..count).map(|_| rng.below(2) == 0).collect(),
        7 => {
            let prefix = rng.below(bytes_u64(count) + 1);
            (0..count).map(|index| bytes_u64(index) < prefix).collect()
        }
        _ => vec![true; count],
    }
}

/// The offset and bytes of each sector of a write that is flagged in `kept`.
fn sectors<'a>(
    offset: u64,
    data: &'a Bytes,
    sector_bytes: u64,
    kept: &'a [bool],
) -> impl Iterator<Item = (u64, &'a [u8])> {
    let offsets = (offset..).step_by(bytes_usize(sector_bytes));
    let parts = offsets.zip(data.chunks(bytes_usize(sector_bytes)));
    parts.zip(kept).filter_map(|(part, &kept)| kept.then_some(part))
}

impl Io {
    /// Where and what a write in flight would store.
    fn lands(&self) -> Option<(u64, Bytes)> {
        let Work::Write { data, .. } = &self.work else { return None };
        match self.verdict {
            Verdict::Lost => None,
            Verdict::Misdirected(offset) => Some((offset, data.clone())),
            Verdict::Good | Verdict::Fails(_) => Some((self.offset, data.clone())),
        }
    }

    fn durable(&self) -> bool {
        matches!(self.work, Work::Write { durability: Durability::Durable, .. })
    }
}

impl State {
    /// Whether a range is reserved, or all of it was written before.
    fn has_room(&self, offset: u64, length: u64) -> bool {
        let within = |range: &Range<u64>| range.start <= offset && offset + length <= range.end;
        self.reserved.iter().any(within) || self.live.holds(offset, bytes_usize(length))
    }

    /// Applies every I/O that is due at `now`, in order.
    fn settle(&mut self, now: Duration, disk: &Shared) {
        while let Some(&(due, id)) = self.due.first()
            && due <= now
        {
            self.due.pop_first();
            if self.faults.hung && !self.faults.gone {
                continue;
            }
            let io = self.pending.remove(&id).expect("what is due is pending");
            let wanted = io.wanted;
            if let Some(waker) = &io.waker {
                waker.wake_by_ref();
            }
            let result = self.perform(io, disk);
            if wanted {
                self.done.insert(id, result);
            }
        }
    }

    fn perform(&mut self, io: Io, disk: &Shared) -> Result<Option<AlignedBuf>> {
        let sector_bytes = disk.profile.sector_bytes;
        let asked = io.durable();
        let durable = asked && !self.faults.lies_about_flush;
        let landing = io.lands();
        if self.faults.gone {
            self.counters.refused += 1;
            return Err(disk.error(ErrorKind::DeviceFailed, "the device is gone"));
        }
        match (io.work, io.verdict) {
            (Work::Read(_), Verdict::Fails(_)) => {
                self.counters.read_errors += 1;
                Err(disk.error(ErrorKind::DeviceTransient, "read error"))
            }
            (Work::Read(mut buf), _) => {
                self.counters.reads += 1;
                self.counters.bytes_read += bytes_u64(buf.len());
                self.live.read(io.offset, &mut buf);
                Ok(Some(buf))
            }
            (Work::Write { data, .. }, Verdict::Fails(seed)) => {
                self.counters.write_errors += 1;
                let kept =
                    fate(data.len() / bytes_usize(sector_bytes), Loss::Each, &SeededRng::new(seed));
                for (at, sector) in sectors(io.offset, &data, sector_bytes, &kept) {
                    self.store(at, &data.slice_ref(sector), false, sector_bytes);
                }
                Err(disk.error(ErrorKind::DeviceTransient, "write error"))
            }
            (Work::Write { data, .. }, _) => {
                if self.faults.full && !self.has_room(io.offset, bytes_u64(data.len())) {
                    self.counters.full_errors += 1;
                    return Err(disk.error(ErrorKind::DeviceFull, "no room below the file"));
                }
                self.counters.writes += 1;
                self.counters.durable_writes += u64::from(asked);
                self.counters.bytes_written += bytes_u64(data.len());
                if let Some((offset, data)) = landing {
                    self.store(offset, &data, durable, sector_bytes);
                }
                Ok(None)
            }
            (Work::Flush { covers }, verdict) => self.flush(covers, &verdict, disk),
            (Work::Discard { length }, _) => {
                self.counters.discards += 1;
                if disk.profile.discard_zeroes {
                    self.live.discard(io.offset, length);
                }
                Ok(None)
            }
        }
    }

    fn flush(
        &mut self,
        covers: u64,
        verdict: &Verdict,
        disk: &Shared,
    ) -> Result<Option<AlignedBuf>> {
        let failing = match *verdict {
            Verdict::Fails(seed) => Some(SeededRng::new(seed)),
            _ => None,
        };
        if self.faults.lies_about_flush && failing.is_none() {
            self.counters.flushes += 1;
            return Ok(None);
        }
        let covered = self.unflushed.partition_point(|write| write.number <= covers);
        let mut doubtful = Vec::new();
        for write in self.unflushed.drain(..covered) {
            match &failing {
                None => write.apply(&mut self.durable, disk.profile.sector_bytes),
                // A kernel may drop dirty pages when a flush fails: the next flush succeeds.
                Some(rng) if rng.below(2) == 0 => {}
                Some(_) => doubtful.push(write),
            }
        }
        self.unflushed.splice(0..0, doubtful);
        if failing.is_some() {
            self.counters.flush_errors += 1;
            return Err(disk.error(ErrorKind::DeviceTransient, "flush error"));
        }
        self.counters.flushes += 1;
        Ok(None)
    }

    /// Stores completed bytes for reads, and for ever if `durable`.
    fn store(&mut self, offset: u64, data: &Bytes, durable: bool, sector_bytes: u64) {
        self.live.write(offset, data);
        if !durable {
            self.last_completed += 1;
            let (number, data) = (self.last_completed, data.clone());
            self.unflushed.push(Unflushed { number, offset, data, superseded: BTreeSet::new() });
            return;
        }
        self.durable.write(offset, data);
        let end = offset + bytes_u64(data.len());
        for write in &mut self.unflushed {
            let from = write.offset.max(offset);
            let to = (write.offset + bytes_u64(write.data.len())).min(end);
            write.superseded.extend((from..to).step_by(bytes_usize(sector_bytes)));
        }
    }

    /// How long it takes until the disk has served another I/O.
    fn served_in(&mut self, now: Duration, service_time: Duration) -> Duration {
        self.busy_until = self.busy_until.max(now) + service_time;
        self.busy_until - now
    }

    /// Takes everything in flight; whoever still waits for it is told that it failed.
    fn end_all(&mut self, reason: &str) -> Vec<Io> {
        self.due.clear();
        self.busy_until = Duration::ZERO;
        for (&id, io) in &mut self.pending {
            if io.wanted {
                let error = Error::new(ErrorKind::DeviceFailed, "use simulated disk");
                self.done.insert(id, Err(error.context(reason)));
            }
            if let Some(waker) = io.waker.take() {
                waker.wake();
            }
        }
        mem::take(&mut self.pending).into_values().collect()
    }

    /// What hangs becomes due at once.
    fn make_hung_due(&mut self) {
        let timed: BTreeSet<u64> = self.due.iter().map(|&(_, id)| id).collect();
        for (&id, io) in &mut self.pending {
            if timed.contains(&id) {
                continue;
            }
            self.due.insert((Duration::ZERO, id));
            if let Some(waker) = io.waker.take() {
                waker.wake();
            }
        }
    }
}

impl Unflushed {
    fn apply(&self, durable: &mut Pages, sector_bytes: u64) {
        if self.superseded.is_empty() {
            return durable.write(self.offset, &self.data);
        }
        let all = vec![true; self.data.len() / bytes_usize(sector_bytes)];
        sectors(self.offset, &self.data, sector_bytes, &all)
            .filter(|(at, _)| !self.superseded.contains(at))
            .for_each(|(at, sector)| durable.write(at, sector));
    }
}

impl Shared {
    fn error(&self, kind: ErrorKind, reason: &str) -> Error {
        Error::new(kind, "use simulated disk").context(&self.name).context(reason)
    }
}

/// A [`SimDisk`] as opened by one process.
struct SimDevice {
    disk: Arc<Shared>,
    env: EnvRef,
}

impl SimDevice {
    fn issue(&self, offset: u64, length: u64, work: Work) -> Result<SimIo> {
        let profile = &self.disk.profile;
        assert!(offset.is_multiple_of(profile.sector_bytes), "offset {offset} is misaligned");
        assert!(length.is_multiple_of(profile.sector_bytes), "length {length} is misaligned");
        if offset.checked_add(length).is_none_or(|end| end > profile.len_bytes) {
            return Err(self.disk.error(ErrorKind::OutOfRange, "past the end"));
        }
        let now = self.env.now();
        let mut state = self.disk.state.lock();
        state.settle(now, &self.disk);
        if state.faults.gone {
            state.counters.refused += 1;
            return Err(self.disk.error(ErrorKind::DeviceFailed, "the device is gone"));
        }
        let verdict = state.judge(offset, &work, &self.disk, &*self.env);
        let latency = state.latency(offset, &work, &self.disk, &*self.env);
        let latency = latency.map(|latency| state.served_in(now, profile.service_time) + latency);
        state.last_io += 1;
        let id = state.last_io;
        state.pending.insert(id, Io { offset, work, verdict, waker: None, wanted: true });
        if let Some(latency) = latency {
            state.due.insert((now + latency, id));
        }
        drop(state);
        let due = latency.map(|latency| self.env.sleep(latency));
        Ok(SimIo { disk: self.disk.clone(), env: self.env.clone(), id, due })
    }

    fn run<T: 'static>(
        &self,
        offset: u64,
        length: u64,
        work: Work,
        finish: impl FnOnce(Option<AlignedBuf>) -> T + 'static,
    ) -> LocalBoxFuture<Result<T>> {
        match self.issue(offset, length, work) {
            Ok(io) => Box::pin(io.map(|result| result.map(finish))),
            Err(error) => Box::pin(std::future::ready(Err(error))),
        }
    }
}

impl Device for SimDevice {
    fn name(&self) -> &str {
        &self.disk.name
    }

    fn len_bytes(&self) -> u64 {
        self.disk.profile.len_bytes
    }

    fn sector_bytes(&self) -> u64 {
        self.disk.profile.sector_bytes
    }

    fn read(&self, offset: u64, buf: AlignedBuf) -> LocalBoxFuture<Result<AlignedBuf>> {
        self.run(offset, bytes_u64(buf.len()), Work::Read(buf), |buf| {
            buf.expect("a read gives its buffer back")
        })
    }

    fn write(
        &self,
        offset: u64,
        data: Bytes,
        durability: Durability,
    ) -> LocalBoxFuture<Result<()>> {
        self.run(offset, bytes_u64(data.len()), Work::Write { data, durability }, |_| ())
    }

    fn flush(&self) -> LocalBoxFuture<Result<()>> {
        let mut state = self.disk.state.lock();
        state.settle(self.env.now(), &self.disk);
        let covers = state.last_completed;
        drop(state);
        self.run(0, 0, Work::Flush { covers }, |_| ())
    }

    fn discard(&self, offset: u64, length: u64) -> LocalBoxFuture<Result<()>> {
        self.run(offset, length, Work::Discard { length }, |_| ())
    }

    fn reserve(&self, offset: u64, length: u64) -> Result<()> {
        let mut state = self.disk.state.lock();
        let range = offset..offset + length;
        if !state.faults.full && !state.reserved.contains(&range) {
            state.reserved.push(range);
        }
        Ok(())
    }
}

/// Waits for one I/O. Dropping it leaves the I/O to itself.
struct SimIo {
    disk: Arc<Shared>,
    env: EnvRef,
    id: u64,
    /// `None` for I/O that hangs from the start.
    due: Option<LocalBoxFuture<()>>,
}

impl Future for SimIo {
    type Output = Result<Option<AlignedBuf>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        if let Some(due) = &mut this.due
            && due.as_mut().poll(context).is_ready()
        {
            this.due = None;
        }
        let mut state = this.disk.state.lock();
        state.settle(this.env.now(), &this.disk);
        if let Some(result) = state.done.remove(&this.id) {
            return Poll::Ready(result);
        }
        let io = state.pending.get_mut(&this.id).expect("an I/O is pending or done");
        io.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Drop for SimIo {
    fn drop(&mut self) {
        let mut state = self.disk.state.lock();
        state.done.remove(&self.id);
        if let Some(io) = state.pending.get_mut(&self.id) {
            io.wanted = false;
            io.waker = None;
        }
    }
}

#[cfg(test)]
mod tests;

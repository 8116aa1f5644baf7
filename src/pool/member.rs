//! One device of the pod: its I/O with time limits, its health and its counters.
//!
//! A device leaves service for good (until the pod is reopened) when it says it failed, when a
//! write or flush fails twice, or when an I/O does not come back in time: a write without a
//! completion may still land, so nothing new may be put there. That time is the device's own: reads
//! beyond `READS_MAX` wait for their turn before it begins.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::Semaphore;

use crate::device::AlignedBuf;
use crate::device::DeviceRef;
use crate::device::Durability;
use crate::env::EnvRef;
use crate::env::timeout;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::observe::event;
use crate::observe::histogram::Histogram;

/// An I/O that takes longer than this takes its device out of service (arbitrary: well above any
/// cloud disk's worst latency, below the patience of a database).
pub const IO_TIMEOUT: Duration = Duration::from_secs(5);
/// Reads a device is given at once; writes do not count and do not wait. With an answer in 1 ms these
/// are 64,000 reads a second; a disk that does 200 a second is through with them in a third of a
/// second, so that a journal batch behind them is not late.
const READS_MAX: usize = 64;
/// So many late reads under way make a device slow. Arbitrary: a few may be late together on any
/// device, and each holds memory until it is over or the device is given up.
const LATE_READS_MAX: usize = 16;
/// Consecutive failed reads after which a device is out of service.
const READ_ERRORS_MAX: u64 = 32;

/// Why a device is not in service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// Takes reads and writes.
    InService,
    /// Was not there when the pod opened.
    Missing,
    /// Failed, with the reason.
    Failed(String),
    /// An I/O did not come back in time.
    Hung(String),
}

/// Counts of what happened on a device since the pod opened.
#[derive(Default)]
pub struct Counters {
    /// Reads completed.
    pub reads: AtomicU64,
    /// Writes completed.
    pub writes: AtomicU64,
    /// Reads failed.
    pub read_errors: AtomicU64,
    /// Writes and flushes failed.
    pub write_errors: AtomicU64,
    /// Reads that did not match their checksum.
    pub checksum_errors: AtomicU64,
    /// Units rebuilt and written back.
    pub healed: AtomicU64,
    /// Of reads completed.
    pub read_latency: Histogram,
    /// Of writes and flushes completed, tries that failed included.
    pub write_latency: Histogram,
}

impl Counters {
    pub(super) fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// A device of the pod.
pub struct Member {
    /// Index in the pod.
    pub index: usize,
    /// The device's UUID; zero while it is missing and unknown.
    pub uuid: [u8; 16],
    /// Counts for status.
    pub counters: Counters,
    env: EnvRef,
    device: Option<DeviceRef>,
    in_service: AtomicBool,
    /// Has no room; cleared by the next successful checkpoint.
    full: AtomicBool,
    /// Never cleared.
    was_full: AtomicBool,
    health: Mutex<Health>,
    reads_failed_in_a_row: AtomicU64,
    /// Estimate of the 99th percentile of read latency, in nanoseconds.
    read_p99_ns: AtomicU64,
    /// Turns of reads, in the order in which they were asked for; closed when it leaves service.
    turns: Arc<Semaphore>,
    /// Reads under way that are late.
    late_reads: AtomicUsize,
    /// Superblock slot written last.
    pub(super) slot: AtomicU64,
    /// Generation of the superblock found when the pod was opened; 0 for a blank device.
    pub generation: u64,
}

impl Member {
    /// A member with its device, or without one.
    #[must_use]
    pub fn new(env: EnvRef, index: usize, uuid: [u8; 16], device: Option<DeviceRef>) -> Self {
        let health = if device.is_some() { Health::InService } else { Health::Missing };
        Self {
            index,
            uuid,
            counters: Counters::default(),
            env,
            in_service: AtomicBool::new(device.is_some()),
            full: AtomicBool::new(false),
            was_full: AtomicBool::new(false),
            device,
            health: Mutex::new(health),
            reads_failed_in_a_row: AtomicU64::new(0),
            read_p99_ns: AtomicU64::new(1_000_000),
            turns: Arc::new(Semaphore::new(READS_MAX)),
            late_reads: AtomicUsize::new(0),
            slot: AtomicU64::new(1),
            generation: 0,
        }
    }

    /// The same member, whose newest superblock was found in `slot`.
    #[must_use]
    pub fn found(mut self, slot: u64, generation: u64) -> Self {
        self.slot = AtomicU64::new(slot);
        self.generation = generation;
        self
    }

    /// What the operator calls it.
    #[must_use]
    pub fn name(&self) -> String {
        self.device.as_ref().map_or_else(|| "missing".into(), |device| device.name().to_owned())
    }

    /// Length of the device, if it is there.
    #[must_use]
    pub fn device_bytes(&self) -> Option<u64> {
        self.device.as_ref().map(|device| device.len_bytes())
    }

    /// As [`crate::device::Device::reserve`], if the device is there.
    ///
    /// # Errors
    /// The device's.
    pub fn reserve(&self, offset: u64, length: u64) -> Result<()> {
        self.device.as_ref().map_or(Ok(()), |device| device.reserve(offset, length))
    }

    /// Whether it takes new writes.
    #[must_use]
    pub fn in_service(&self) -> bool {
        self.in_service.load(Ordering::Acquire)
    }

    /// Whether its file system has no room for new strips.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.full.load(Ordering::Acquire)
    }

    /// Whether its file system had no room at any time since the pod was opened.
    #[must_use]
    pub fn was_full(&self) -> bool {
        self.was_full.load(Ordering::Acquire)
    }

    /// Says that space was given back, so that a full device is worth another try.
    pub fn may_have_room(&self) {
        self.full.store(false, Ordering::Release);
    }

    /// Why it is or is not in service.
    #[must_use]
    pub fn health(&self) -> Health {
        self.health.lock().clone()
    }

    /// What 99 of 100 reads take at most, of late.
    #[must_use]
    pub(super) fn read_p99(&self) -> Duration {
        Duration::from_nanos(self.read_p99_ns.load(Ordering::Relaxed))
    }

    /// Whether so many of its reads are late that it should not be asked for more where others can
    /// answer. It is again once some of these are over.
    #[must_use]
    pub(super) fn is_slow(&self) -> bool {
        self.late_reads.load(Ordering::Relaxed) >= LATE_READS_MAX
    }

    /// Takes the device out of service until the pod is reopened.
    pub fn fail(&self, reason: &str) {
        self.leave_service(Health::Failed(reason.to_owned()));
    }

    /// Takes the device out of service if it was lost behind our back, such as by deleting its file.
    pub fn notice_loss(&self) {
        if self.in_service()
            && let Some(reason) = self.device.as_ref().and_then(|device| device.lost())
        {
            self.fail(reason);
        }
    }

    fn leave_service(&self, health: Health) {
        if self.in_service.swap(false, Ordering::AcqRel) {
            let why = match &health {
                Health::InService | Health::Missing => "",
                Health::Failed(reason) | Health::Hung(reason) => reason,
            };
            let message = format_args!("device {} is out of service: {why}", self.index);
            event::raise(event::DEVICE_OUT_OF_SERVICE, self.name(), message);
            *self.health.lock() = health;
            // Whoever waits for a turn is to look elsewhere at once.
            self.turns.close();
        }
    }

    /// Waits until the device may be given another read. Meanwhile it is busy, not late.
    ///
    /// # Errors
    /// `DeviceFailed` when it is out of service.
    pub(super) async fn turn(&self) -> Result<ReadTurn> {
        let permit = Arc::clone(&self.turns).acquire_owned().await;
        let permit = permit.map_err(|_closed| self.out_of_service("read device"))?;
        Ok(ReadTurn { _permit: permit })
    }

    /// Reads `length` bytes at `offset`, widened to whole sectors by the caller, in its turn.
    ///
    /// # Errors
    /// Those of [`crate::device::Device`]; `DeviceFailed` when it is out of service or hangs.
    ///
    /// # Cancellation
    /// Dropped while it waits for its turn, nothing is read; after, the device finishes what it was
    /// given, and the turn is another's already.
    pub async fn read(&self, offset: u64, length: usize) -> Result<AlignedBuf> {
        let turn = self.turn().await?;
        self.read_in_turn(turn, offset, length).await
    }

    /// As [`Member::read`], with a turn already had.
    ///
    /// # Errors
    /// As for that.
    pub(super) async fn read_in_turn(
        &self,
        _turn: ReadTurn,
        offset: u64,
        length: usize,
    ) -> Result<AlignedBuf> {
        let device = self.usable("read device")?;
        let started = self.env.now();
        let result =
            timeout(&self.env, IO_TIMEOUT, device.read(offset, AlignedBuf::zeroed(length)))
                .await
                .unwrap_or_else(|| Err(self.hung("read")));
        match &result {
            Ok(_) => {
                Counters::add(&self.counters.reads);
                self.reads_failed_in_a_row.store(0, Ordering::Relaxed);
                let latency = self.env.now().saturating_sub(started);
                self.counters.read_latency.record(latency);
                self.note_read_latency(latency);
            }
            Err(error) => self.note_read_error(error),
        }
        result
    }

    fn note_read_error(&self, error: &Error) {
        Counters::add(&self.counters.read_errors);
        let in_a_row = self.reads_failed_in_a_row.fetch_add(1, Ordering::Relaxed) + 1;
        if error.kind() == ErrorKind::DeviceFailed || in_a_row >= READ_ERRORS_MAX {
            self.fail(&error.chain());
        } else {
            tracing::warn!(device = self.name(), error = error.chain(), "read failed");
        }
    }

    /// Moves the estimate a little: up by 99 parts when above it, down by 1 part when below, so
    /// that it rests where 1 read in 100 is above ("frugal" quantile estimation).
    fn note_read_latency(&self, latency: Duration) {
        let latency = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        let estimate = self.read_p99_ns.load(Ordering::Relaxed);
        let step = (estimate / 1000).max(1);
        let moved = if latency > estimate { estimate + 99 * step } else { estimate - step };
        self.read_p99_ns.store(moved.clamp(10_000, 1_000_000_000), Ordering::Relaxed);
    }

    /// Writes `data` at `offset`, trying twice.
    ///
    /// # Errors
    /// Those of [`crate::device::Device`]. Unless it is `DeviceFull`, the device is out of service.
    pub async fn write(&self, offset: u64, data: Bytes, durability: Durability) -> Result<()> {
        let device = self.usable("write device")?;
        let started = self.env.now();
        let mut result = Ok(());
        for _attempt in 0..2 {
            result = timeout(&self.env, IO_TIMEOUT, device.write(offset, data.clone(), durability))
                .await
                .unwrap_or_else(|| Err(self.hung("write")));
            match &result {
                Err(error) if error.kind() == ErrorKind::DeviceTransient => {}
                Ok(()) | Err(_) => break,
            }
        }
        self.note_write(result, started)
    }

    /// Makes completed writes durable.
    ///
    /// # Errors
    /// Those of [`crate::device::Device`]; the device is then out of service.
    pub async fn flush(&self) -> Result<()> {
        let device = self.usable("flush device")?;
        let started = self.env.now();
        let result = timeout(&self.env, IO_TIMEOUT, device.flush())
            .await
            .unwrap_or_else(|| Err(self.hung("flush")));
        self.note_write(result, started)
    }

    fn note_write(&self, result: Result<()>, started: Duration) -> Result<()> {
        match &result {
            Ok(()) => {
                Counters::add(&self.counters.writes);
                self.counters.write_latency.record(self.env.now().saturating_sub(started));
            }
            Err(error) if error.kind() == ErrorKind::DeviceFull => {
                Counters::add(&self.counters.write_errors);
                self.was_full.store(true, Ordering::Release);
                if !self.full.swap(true, Ordering::AcqRel) {
                    event::raise(event::DEVICE_FULL, self.name(), error.chain());
                }
            }
            Err(error) => {
                Counters::add(&self.counters.write_errors);
                self.fail(&error.chain());
            }
        }
        result
    }

    fn usable(&self, op: &'static str) -> Result<&DeviceRef> {
        match &self.device {
            Some(device) if self.in_service() => Ok(device),
            _ => Err(self.out_of_service(op)),
        }
    }

    fn out_of_service(&self, op: &'static str) -> Error {
        Error::new(ErrorKind::DeviceFailed, op)
            .context(format_args!("device {} is out of service", self.index))
    }

    fn hung(&self, what: &str) -> Error {
        let reason = format!("a {what} took longer than {} s", IO_TIMEOUT.as_secs());
        self.leave_service(Health::Hung(reason.clone()));
        Error::new(ErrorKind::DeviceFailed, "wait for device").context(reason)
    }
}

/// One of the reads a device is given at once, until dropped.
pub(super) struct ReadTurn {
    _permit: OwnedSemaphorePermit,
}

/// Counts a read of a device that is late, until dropped.
pub(super) struct LateRead(Arc<Member>);

impl LateRead {
    pub(super) fn new(member: &Arc<Member>) -> Self {
        member.late_reads.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(member))
    }
}

impl Drop for LateRead {
    fn drop(&mut self) {
        self.0.late_reads.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::future::join_all;

    use super::*;
    use crate::device::sim::SimDisk;
    use crate::device::sim::SimFaults;
    use crate::device::sim::SimProfile;
    use crate::env::Clock;
    use crate::env::sim::SimEnv;

    fn member(world: &Arc<SimEnv>, disk: &SimDisk) -> Member {
        let env: EnvRef = world.clone();
        Member::new(Arc::clone(&env), 0, [0; 16], Some(disk.open(&env)))
    }

    /// So many reads that all of them together take longer than one may.
    const READS: usize = 8 * READS_MAX;

    #[test]
    fn a_busy_device_is_not_hung_and_writes_do_not_wait_for_reads() {
        let world = SimEnv::new(1);
        let disk = SimDisk::new("disk", SimProfile::new(1 << 20));
        let member = member(&world, &disk);
        let slow = Duration::from_secs(1);
        disk.set_faults(SimFaults {
            slow_read_ppm: 1_000_000,
            slow_read_by: slow,
            ..SimFaults::default()
        });
        world.run(async {
            let reads = join_all((0..READS).map(|_| member.read(0, 4096)));
            let write = async {
                world.sleep(slow / 2).await;
                assert_eq!(disk.in_flight(), READS_MAX);
                let begun = world.now();
                let data = Bytes::from(vec![1; 4096]);
                member.write(0, data, Durability::Durable).await.expect("written");
                world.now() - begun
            };
            let (reads, write) = futures_util::future::join(reads, write).await;
            assert!(reads.iter().all(Result::is_ok) && world.now() > IO_TIMEOUT);
            assert!(write < Duration::from_millis(1), "{write:?}");
            assert_eq!(member.health(), Health::InService);
            assert!(member.read_p99() < 2 * slow, "the wait for a turn is no latency of its own");
        });
    }

    #[test]
    fn who_waits_for_a_device_that_hangs_waits_no_longer_than_its_first_read() {
        let world = SimEnv::new(1);
        let disk = SimDisk::new("disk", SimProfile::new(1 << 20));
        let member = member(&world, &disk);
        disk.set_faults(SimFaults { hung: true, ..SimFaults::default() });
        world.run(async {
            let reads = join_all((0..READS).map(|_| member.read(0, 4096))).await;
            assert!(reads.iter().all(Result::is_err));
            let took = world.now();
            assert!(took >= IO_TIMEOUT && took < IO_TIMEOUT * 11 / 10, "{took:?}");
            assert!(matches!(member.health(), Health::Hung(_)), "{:?}", member.health());
        });
        world.halt();
    }
}

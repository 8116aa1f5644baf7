//! What a simulated disk is like, what goes wrong with it, and what has happened to it.

use std::ops::Range;
use std::time::Duration;

/// What does not change about a disk.
#[derive(Clone, Debug)]
pub struct SimProfile {
    /// Length in bytes. A large disk costs only what is stored on it.
    pub len_bytes: u64,
    /// Unit that is written atomically, in bytes: 512 to 4096.
    pub sector_bytes: u64,
    /// An I/O takes between these two, uniformly.
    pub latency_min: Duration,
    /// See `latency_min`.
    pub latency_max: Duration,
    /// The disk serves one I/O after the other, each for so long, before its latency begins; zero if
    /// it serves as many at once as it is given.
    pub service_time: Duration,
    /// Whether a discarded range reads as zero (a file's hole) or keeps its bytes.
    pub discard_zeroes: bool,
}

impl SimProfile {
    /// A disk of `len_bytes` with 512-byte sectors that answers in 20 to 200 us.
    #[must_use]
    pub fn new(len_bytes: u64) -> Self {
        Self {
            len_bytes,
            sector_bytes: 512,
            latency_min: Duration::from_micros(20),
            latency_max: Duration::from_micros(200),
            service_time: Duration::ZERO,
            discard_zeroes: true,
        }
    }
}

/// Faults in force, until set otherwise. Chances are per I/O, in a million.
#[derive(Clone, Debug, Default)]
pub struct SimFaults {
    /// A read fails with `DeviceTransient`.
    pub read_error_ppm: u32,
    /// A write fails with `DeviceTransient`; it may be stored, torn or not stored.
    pub write_error_ppm: u32,
    /// A flush fails; any write it covered may be forgotten although reads still show it.
    pub flush_error_ppm: u32,
    /// A write is acknowledged and not stored.
    pub lost_write_ppm: u32,
    /// Every read that touches this range of offsets fails with `DeviceTransient`.
    pub bad_area: Range<u64>,
    /// Every write that starts in this range of offsets is acknowledged and not stored.
    pub lost_area: Range<u64>,
    /// A write is acknowledged and stored at another offset.
    pub misdirected_write_ppm: u32,
    /// An I/O never completes until [`super::SimDisk::release`].
    pub hang_ppm: u32,
    /// An I/O takes `slow_by` longer.
    pub slow_ppm: u32,
    /// See `slow_ppm`.
    pub slow_by: Duration,
    /// A read takes `slow_read_by` longer.
    pub slow_read_ppm: u32,
    /// See `slow_read_ppm`.
    pub slow_read_by: Duration,
    /// Every I/O that starts in this range of offsets takes `slow_area_by` longer.
    pub slow_area: Range<u64>,
    /// See `slow_area`.
    pub slow_area_by: Duration,
    /// A write that starts in `stall_area` takes up to `stall_max` longer.
    pub stall_ppm: u32,
    /// See `stall_ppm`.
    pub stall_area: Range<u64>,
    /// See `stall_ppm`.
    pub stall_max: Duration,
    /// Added to every I/O.
    pub always_slow_by: Duration,
    /// All I/O fails with `DeviceFailed`. What is stored is there again when this ends.
    pub gone: bool,
    /// No I/O completes until [`super::SimDisk::release`].
    pub hung: bool,
    /// Writes into pages that hold nothing fail with `DeviceFull`.
    pub full: bool,
    /// Flushes and durable writes make nothing durable.
    pub lies_about_flush: bool,
}

/// A fault for one I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OneShot {
    /// As `read_error_ppm`.
    ReadError,
    /// As `write_error_ppm`.
    WriteError,
    /// As `flush_error_ppm`.
    FlushError,
    /// As `lost_write_ppm`.
    LostWrite,
    /// As `misdirected_write_ppm`.
    MisdirectedWrite,
    /// Any I/O; as `hang_ppm`.
    Hang,
    /// Any I/O takes this much longer.
    Slow(Duration),
}

/// What has happened to a disk since it was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is the number of such events, as named in SimFaults")]
pub struct SimCounters {
    pub reads: u64,
    pub writes: u64,
    /// Writes, among `writes`, that asked for durability.
    pub durable_writes: u64,
    pub flushes: u64,
    pub discards: u64,
    pub bytes_read: u64,
    pub bytes_written: u64,
    pub read_errors: u64,
    pub write_errors: u64,
    pub flush_errors: u64,
    pub lost_writes: u64,
    pub misdirected_writes: u64,
    pub hangs: u64,
    pub slowed: u64,
    /// I/O refused because the disk was gone.
    pub refused: u64,
    pub full_errors: u64,
    pub rotten_bits: u64,
    /// Writes whose fate a crash or kill decided.
    pub crash_kept: u64,
    pub crash_lost: u64,
    pub crash_torn: u64,
}

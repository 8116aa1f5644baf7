//! Volumes as targets see them: bytes at offsets, durable when acknowledged.
//!
//! [`Volume`] is everything a protocol may ask of storage. Implementations: `pod` (a volume of a
//! pod, on the engine) and [`memory`] (plain RAM: the peer of benches and protocol tests).
//!
//! What every implementation promises (design.md, section 1): a completed write, zero or trim is
//! visible to every later read from any connection, and durable, so that `flush` and FUA have
//! nothing left to do; one request of at most [`Volume::atomic_write_bytes`] is atomic. A volume
//! with a volatile write cache is exempt from the second, but as [`Volume::write_through`]: what
//! completed is durable once a flush says so, and a crash leaves all that completed before some moment.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::watch;
use uuid::Uuid;

use crate::env::LocalBoxFuture;
use crate::error::Result;
use crate::observe::requests::Requests;
use crate::secret::HostKeys;
use crate::secret::tls_key::TlsKey;

pub mod memory;
pub mod pod;
pub mod pod_volume;
pub mod reservation;

use reservation::Reservations;

/// Read at a time by a prefetch, which so holds no more of it in memory besides the cache.
pub const PREFETCH_STEP_BYTES: u64 = 1 << 20;

/// Memory that a read takes at least if it asks a device, however little of it is wanted: what is
/// compressed together is read and decoded together.
pub const READ_BYTES_MIN: u64 = 32 * 1024;

/// A contiguous part of a read's answer. Parts are in order and cover the request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// This many zero bytes, not stored anywhere.
    Zero(usize),
    /// Bytes shared with the cache: sent without copying.
    Data(Bytes),
}

impl Piece {
    /// Bytes in this piece.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Zero(length) => *length,
            Self::Data(bytes) => bytes.len(),
        }
    }

    /// Whether it covers nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Whether the parts of a read's answer are these bytes.
#[must_use]
pub fn pieces_equal(pieces: &[Piece], expected: &[u8]) -> bool {
    let mut rest = expected;
    pieces.iter().all(|piece| {
        let Some((part, after)) = rest.split_at_checked(piece.len()) else { return false };
        rest = after;
        match piece {
            Piece::Zero(_) => part.iter().all(|byte| *byte == 0),
            Piece::Data(bytes) => part == bytes,
        }
    }) && rest.is_empty()
}

/// How a range becomes zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMode {
    /// Give the space back; reads as zero afterwards. (NBD WRITE_ZEROES without NO_HOLE.)
    Deallocate,
    /// Reads as zero and is reported as allocated. (NBD WRITE_ZEROES with NO_HOLE.)
    KeepAllocated,
    /// Give back the blocks of 4096 bytes that lie wholly in the range, and leave those alone of
    /// which only a part does: to rewrite them takes room, and a full volume is trimmed to get some.
    /// (NBD TRIM, NVMe Dataset Management.)
    Trim,
}

/// A run of bytes of one kind, for block status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, never zero.
    pub bytes: u64,
    /// Nothing is stored: never written, or deallocated.
    pub hole: bool,
    /// Reads as zero. Every hole does.
    pub zero: bool,
}

/// A volume.
///
/// Offsets and lengths are in bytes, of any alignment; the implementation does the
/// read-modify-write of partial blocks. A request past [`Volume::size_bytes`] fails with
/// `OutOfRange` and changes nothing. Requests of zero length succeed. A request that a reservation
/// forbids fails with `Reserved` and changes nothing.
///
/// # Cancellation
/// Dropping the future of a write leaves each of its parts, of the atomic size or less, wholly done
/// or wholly undone, and what is done comes before all that is issued afterwards. Other futures may
/// be dropped freely; a change of reservations goes on without its future.
pub trait Volume: Send + Sync {
    /// The name by which it is exported.
    fn name(&self) -> String;
    /// Number within its directory, never used for another volume.
    fn id(&self) -> u64;
    /// Identity for ever, whatever its name.
    fn uuid(&self) -> Uuid;
    /// The smallest request hosts are told of: 512 or 4096. It never changes.
    fn logical_block_bytes(&self) -> u32;
    /// Current size in bytes; a multiple of 4096. It changes by resize.
    fn size_bytes(&self) -> u64;
    /// Whether writes are refused with `ReadOnly`.
    fn read_only(&self) -> bool;
    /// Whether it is served to the host of that NQN; `None` is a client that has no name.
    fn admits(&self, host: Option<&str>) -> bool;
    /// Largest write that is all-or-nothing.
    fn atomic_write_bytes(&self) -> u32;
    /// Set once the volume was deleted or the node stops: targets then end their sessions.
    fn closed(&self) -> bool;

    /// Where targets count what hosts did with it.
    fn requests(&self) -> &Arc<Requests>;

    /// The same volume as this host uses it: what reservations forbid the host is refused. The
    /// volume of a directory is that of a user no reservation knows.
    fn for_host(self: Arc<Self>, host: Uuid) -> VolumeRef;
    /// The same volume, where a change is durable when it completes, whether there is a volatile write
    /// cache or not: what FUA asks for.
    fn write_through(self: Arc<Self>) -> VolumeRef;
    /// Who has registered, and who holds the volume.
    fn reservations(&self) -> Arc<Reservations>;
    /// Puts `next` in place of `seen`; false, and nothing is done, if they are not the current ones
    /// any more. They are durable when it completes, and no request they forbid changes anything
    /// after that, however early it began.
    fn replace_reservations(
        self: Arc<Self>,
        seen: Arc<Reservations>,
        next: Reservations,
    ) -> LocalBoxFuture<Result<bool>>;

    /// Answers a read from RAM alone, without waiting or allocating.
    ///
    /// Appends to `pieces` and returns true, or leaves `pieces` as it was and returns false if a
    /// device would have to be asked: call [`Volume::read`] then.
    fn try_read(&self, offset: u64, bytes: u32, pieces: &mut Vec<Piece>) -> Result<bool>;
    /// Reads, asking devices if need be.
    fn read(self: Arc<Self>, offset: u64, bytes: u32) -> LocalBoxFuture<Result<Vec<Piece>>>;
    /// Writes `data`; visible when it completes, and durable unless there is a volatile write cache.
    fn write(self: Arc<Self>, offset: u64, data: Bytes) -> LocalBoxFuture<Result<()>>;
    /// Writes `data` if the range holds `expected`, which is as long; else changes nothing and
    /// returns false. No other request changes the range in between.
    fn compare_and_write(
        self: Arc<Self>,
        offset: u64,
        expected: Bytes,
        data: Bytes,
    ) -> LocalBoxFuture<Result<bool>>;
    /// Makes a range read as zero, as `mode` says; completes as a write does. Cost does not depend on
    /// the length, so it may cover the whole volume.
    fn zero(self: Arc<Self>, offset: u64, bytes: u64, mode: ZeroMode)
    -> LocalBoxFuture<Result<()>>;
    /// Completes when everything acknowledged before the call is durable.
    fn flush(self: Arc<Self>) -> LocalBoxFuture<Result<()>>;
    /// Brings a range into the RAM cache, as much of its beginning as is worth it. A hint.
    fn prefetch(self: Arc<Self>, offset: u64, bytes: u64) -> LocalBoxFuture<Result<()>>;
    /// Says which parts of a range are holes, zeroes or data: at most `extents_max` (at least 1)
    /// extents from `offset` on, neighbours of one kind merged, covering `bytes` or less, so that
    /// no answer takes long.
    fn block_status(
        self: Arc<Self>,
        offset: u64,
        bytes: u64,
        extents_max: usize,
    ) -> LocalBoxFuture<Result<Vec<Extent>>>;
}

/// How a volume is passed around.
pub type VolumeRef = Arc<dyn Volume>;

/// Where a target looks volumes up by name.
pub trait VolumeDirectory: Send + Sync {
    /// The volume of that name, if any.
    fn find(&self, name: &str) -> Option<VolumeRef>;
    /// All volumes, ordered by name.
    fn list(&self) -> Vec<VolumeRef>;
    /// Whether a host of that NQN was added, so that it may connect from anywhere.
    fn knows_host(&self, nqn: &str) -> bool;
    /// The keys by which that host authenticates; `None`: it need not.
    fn host_keys(&self, nqn: &str) -> Option<HostKeys>;
    /// The key by which that host encrypts; `None`: it does not.
    fn host_tls_key(&self, nqn: &str) -> Option<TlsKey>;
    /// Changes whenever a volume was added, resized or removed, or what hosts are served, after it
    /// can be seen.
    fn changes(&self) -> watch::Receiver<u64>;
}

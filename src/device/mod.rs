//! Devices: what a pod is made of.
//!
//! [`Device`] is the seam between the engine and anything that stores sectors: local files and
//! block devices ([`mod@file`], io_uring), the simulator's disks ([`sim`]), later remote NBD and NVMe
//! namespaces. Behaviour such as fault injection is added by wrapping ([`fault`], [`delay`],
//! [`sticky`]).

use std::sync::Arc;

use bytes::Bytes;

use crate::env::LocalBoxFuture;
use crate::error::Result;

pub mod buffer;
pub mod delay;
pub mod fault;
pub mod file;
pub mod sim;
pub mod sticky;
mod uring;

pub use buffer::AlignedBuf;
pub use uring::try_ring;

/// Whether a write must survive power loss before it completes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Durable only after a later flush.
    Volatile,
    /// On stable storage before completion (O_DSYNC, FUA).
    Durable,
}

/// A device of fixed length that stores sectors at offsets.
///
/// # Contract
///
/// * Offsets and lengths are in bytes and multiples of [`Device::sector_bytes`]; memory is aligned
///   to 4096 bytes (an [`AlignedBuf`], or `Bytes` made from one).
/// * A completed [`Durability::Volatile`] write is visible to later reads but **not** durable until
///   a flush that started after it completes. Before that, a crash may keep any subset of its
///   sectors. A [`Durability::Durable`] write is durable by itself when it completes, and says
///   nothing about other writes.
/// * One sector is written atomically. Nothing larger is.
/// * Once a flush or a durable write fails, the state of what it covered is unknown.
///
/// # Cancellation
/// Dropping a returned future never cancels the I/O: buffers belong to the device until the I/O is
/// over, and a write may land at any time until then.
///
/// # Errors
/// * `DeviceTransient`: this I/O failed, others may succeed.
/// * `DeviceFailed`: the device is gone; all later I/O fails as well.
/// * `DeviceFull`: a sparse file's file system has no room.
/// * `OutOfRange`: past the end.
pub trait Device: Send + Sync {
    /// What the operator calls it, for logs: a path or an address.
    fn name(&self) -> &str;
    /// Length in bytes.
    fn len_bytes(&self) -> u64;
    /// Atomic write unit in bytes: a power of two, 512 to 4096.
    fn sector_bytes(&self) -> u64;
    /// Fills all of `buf` from `offset` and gives it back.
    fn read(&self, offset: u64, buf: AlignedBuf) -> LocalBoxFuture<Result<AlignedBuf>>;
    /// Writes `data` at `offset`.
    fn write(&self, offset: u64, data: Bytes, durability: Durability)
    -> LocalBoxFuture<Result<()>>;
    /// Makes every write completed before this call durable.
    fn flush(&self) -> LocalBoxFuture<Result<()>>;
    /// Hints that the range's contents are no longer needed; it may read as anything after.
    fn discard(&self, offset: u64, length: u64) -> LocalBoxFuture<Result<()>>;
    /// Gives the range its room on the disk below, so that writing there never fails with
    /// `DeviceFull`. What it holds stays. May take a moment: for when a pod is opened.
    ///
    /// # Errors
    /// `DeviceFull`: there is none to give. Devices that always have room need do nothing.
    fn reserve(&self, _offset: u64, _length: u64) -> Result<()> {
        Ok(())
    }
    /// Why the device is lost although its I/O may still succeed, if it is: such as a file that was
    /// deleted and ends with its last descriptor. Cheap, without I/O; meant to be asked every few
    /// seconds.
    fn lost(&self) -> Option<&'static str> {
        None
    }
}

/// How a device is passed around.
pub type DeviceRef = Arc<dyn Device>;

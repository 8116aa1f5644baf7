//! A filter that stops using a device once its durability is in doubt.
//!
//! A kernel may drop dirty pages when a flush fails, so asking again can succeed without the data
//! being there. After a failed flush or durable write everything fails with `DeviceFailed`, until
//! the device is reopened and its content checked.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use crate::device::AlignedBuf;
use crate::device::Device;
use crate::device::DeviceRef;
use crate::device::Durability;
use crate::env::LocalBoxFuture;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;

/// Refuses all I/O after the first failed flush or durable write.
///
/// # Cancellation
/// The outcome of an I/O whose future was dropped is not seen, and so does not poison.
pub struct StickyDevice {
    inner: DeviceRef,
    poisoned: Arc<AtomicBool>,
}

impl StickyDevice {
    /// Wraps `inner`.
    #[must_use]
    pub fn new(inner: DeviceRef) -> Arc<Self> {
        Arc::new(Self { inner, poisoned: Arc::default() })
    }

    /// Whether a flush or a durable write has failed.
    #[must_use]
    pub fn poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }

    /// The future of `start`, unless poisoned; its failure poisons if `decisive`.
    fn guard<T: 'static>(
        &self,
        decisive: bool,
        start: impl FnOnce() -> LocalBoxFuture<Result<T>>,
    ) -> LocalBoxFuture<Result<T>> {
        if self.poisoned() {
            let error = Error::new(ErrorKind::DeviceFailed, "use device")
                .context(self.inner.name())
                .context("an earlier flush or durable write failed; reopen the device");
            return Box::pin(std::future::ready(Err(error)));
        }
        let (work, poisoned) = (start(), self.poisoned.clone());
        if !decisive {
            return work;
        }
        Box::pin(async move {
            work.await.inspect_err(|error| {
                if leaves_doubt(error.kind()) {
                    poisoned.store(true, Ordering::Release);
                }
            })
        })
    }
}

/// Whether bytes may have been lost; a request that was refused changed nothing.
fn leaves_doubt(kind: ErrorKind) -> bool {
    !matches!(kind, ErrorKind::DeviceFull | ErrorKind::OutOfRange | ErrorKind::InvalidRequest)
}

impl Device for StickyDevice {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn len_bytes(&self) -> u64 {
        self.inner.len_bytes()
    }

    fn sector_bytes(&self) -> u64 {
        self.inner.sector_bytes()
    }

    fn read(&self, offset: u64, buf: AlignedBuf) -> LocalBoxFuture<Result<AlignedBuf>> {
        self.guard(false, || self.inner.read(offset, buf))
    }

    fn write(
        &self,
        offset: u64,
        data: Bytes,
        durability: Durability,
    ) -> LocalBoxFuture<Result<()>> {
        let decisive = durability == Durability::Durable;
        self.guard(decisive, || self.inner.write(offset, data, durability))
    }

    fn flush(&self) -> LocalBoxFuture<Result<()>> {
        self.guard(true, || self.inner.flush())
    }

    fn discard(&self, offset: u64, length: u64) -> LocalBoxFuture<Result<()>> {
        self.guard(false, || self.inner.discard(offset, length))
    }

    fn reserve(&self, offset: u64, length: u64) -> Result<()> {
        self.inner.reserve(offset, length)
    }

    fn lost(&self) -> Option<&'static str> {
        self.inner.lost()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::device::sim::OneShot;
    use crate::device::sim::SimDisk;
    use crate::device::sim::SimFaults;
    use crate::device::sim::SimProfile;
    use crate::env::EnvRef;
    use crate::env::sim::SimEnv;

    fn lab() -> (Arc<SimEnv>, SimDisk, Arc<StickyDevice>) {
        let env = SimEnv::new(1);
        let disk = SimDisk::new("sim-0", SimProfile::new(1 << 20));
        let env_ref: EnvRef = env.clone();
        let sticky = StickyDevice::new(disk.open(&env_ref));
        (env, disk, sticky)
    }

    fn write(device: &dyn Device, durability: Durability) -> LocalBoxFuture<Result<()>> {
        device.write(0, AlignedBuf::zeroed(4096).freeze(), durability)
    }

    #[test]
    fn flush_failure_poisons_until_reopen() {
        let (env, disk, sticky) = lab();
        disk.inject(OneShot::FlushError, 0..1);
        let error = env.run(sticky.flush()).expect_err("injected");
        assert_eq!(error.kind(), ErrorKind::DeviceTransient);
        assert!(sticky.poisoned());
        let read = env.run(sticky.read(0, AlignedBuf::zeroed(4096)));
        assert_eq!(read.map(|_| ()).map_err(|e| e.kind()), Err(ErrorKind::DeviceFailed));
        let flush = env.run(sticky.flush());
        assert_eq!(flush.map_err(|e| e.kind()), Err(ErrorKind::DeviceFailed));
    }

    #[test]
    fn durable_write_failure_poisons_and_a_volatile_one_does_not() {
        let (env, disk, sticky) = lab();
        for (durability, poisoned) in [(Durability::Volatile, false), (Durability::Durable, true)] {
            disk.inject(OneShot::WriteError, 0..1);
            assert!(env.run(write(&*sticky, durability)).is_err());
            assert_eq!(sticky.poisoned(), poisoned);
        }
    }

    #[test]
    fn full_device_is_not_poisoned() {
        let (env, disk, sticky) = lab();
        disk.set_faults(SimFaults { full: true, ..SimFaults::default() });
        let result = env.run(write(&*sticky, Durability::Durable));
        assert_eq!(result.map_err(|e| e.kind()), Err(ErrorKind::DeviceFull));
        assert!(!sticky.poisoned());
    }
}

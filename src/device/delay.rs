//! A filter that makes a device slow: every I/O is told complete later than it was.
//!
//! The I/O itself starts at once, so dropping a future changes nothing about it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;

use crate::device::AlignedBuf;
use crate::device::Device;
use crate::device::DeviceRef;
use crate::device::Durability;
use crate::env::EnvRef;
use crate::env::LocalBoxFuture;
use crate::error::Result;

/// Adds a settable delay to every I/O of the device it wraps.
pub struct DelayDevice {
    inner: DeviceRef,
    env: EnvRef,
    /// Applies to I/O started from now on.
    delay: Mutex<Duration>,
}

impl DelayDevice {
    /// Wraps `inner`; I/O takes `delay` longer.
    #[must_use]
    pub fn new(inner: DeviceRef, env: EnvRef, delay: Duration) -> Arc<Self> {
        Arc::new(Self { inner, env, delay: Mutex::new(delay) })
    }

    /// Changes the delay of later I/O; zero makes the filter transparent.
    pub fn set_delay(&self, delay: Duration) {
        *self.delay.lock() = delay;
    }

    fn late<T: 'static>(&self, work: LocalBoxFuture<Result<T>>) -> LocalBoxFuture<Result<T>> {
        let delay = *self.delay.lock();
        if delay.is_zero() {
            return work;
        }
        let env = self.env.clone();
        Box::pin(async move {
            let result = work.await;
            env.sleep(delay).await;
            result
        })
    }
}

impl Device for DelayDevice {
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
        self.late(self.inner.read(offset, buf))
    }

    fn write(
        &self,
        offset: u64,
        data: Bytes,
        durability: Durability,
    ) -> LocalBoxFuture<Result<()>> {
        self.late(self.inner.write(offset, data, durability))
    }

    fn flush(&self) -> LocalBoxFuture<Result<()>> {
        self.late(self.inner.flush())
    }

    fn discard(&self, offset: u64, length: u64) -> LocalBoxFuture<Result<()>> {
        self.late(self.inner.discard(offset, length))
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

    use crate::device::sim::SimDisk;
    use crate::device::sim::SimProfile;
    use crate::env::Clock;
    use crate::env::sim::SimEnv;

    #[test]
    fn io_takes_the_delay_longer_and_starts_at_once() {
        let env = SimEnv::new(1);
        let env_ref: EnvRef = env.clone();
        let disk = SimDisk::new("sim-0", SimProfile::new(1 << 20));
        let delay = Duration::from_millis(50);
        let device = DelayDevice::new(disk.open(&env_ref), env_ref, delay);
        let write = device.write(0, AlignedBuf::zeroed(512).freeze(), Durability::Durable);
        assert_eq!(disk.in_flight(), 1);
        env.run(write).expect("write");
        assert!(env.now() >= delay);

        device.set_delay(Duration::ZERO);
        let before = env.now();
        env.run(device.flush()).expect("flush");
        assert!(env.now() - before < delay);
    }
}

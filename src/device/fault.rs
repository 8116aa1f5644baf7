//! A filter that makes a real device fail on demand: for tests and drills.
//!
//! [`FaultRule`]s are added while the device is in use; the first that matches an I/O fails it
//! before it reaches the device. [`FaultDevice::set_hung`] holds all I/O back.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::device::AlignedBuf;
use crate::device::Device;
use crate::device::DeviceRef;
use crate::device::Durability;
use crate::env::LocalBoxFuture;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;

/// What a device is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// [`Device::read`].
    Read,
    /// [`Device::write`] of either durability.
    Write,
    /// [`Device::flush`]; counts as being at offset 0.
    Flush,
    /// [`Device::discard`].
    Discard,
}

/// Which I/O fails, how, and how often.
#[derive(Clone, Debug)]
pub struct FaultRule {
    /// `None` matches any operation.
    pub operation: Option<Operation>,
    /// Matches I/O that starts in this range of offsets, in bytes.
    pub offsets: Range<u64>,
    /// What the I/O fails with.
    pub kind: ErrorKind,
    /// Matches this many times and then no more; `None` is for ever.
    pub times: Option<u64>,
}

impl FaultRule {
    /// Everything fails, for ever: the device is gone.
    #[must_use]
    pub fn gone() -> Self {
        let kind = ErrorKind::DeviceFailed;
        Self { operation: None, offsets: 0..u64::MAX, kind, times: None }
    }
}

/// Fails and holds I/O as it is told.
pub struct FaultDevice {
    inner: DeviceRef,
    control: Arc<Control>,
}

#[derive(Default)]
struct Control {
    /// Guards rules and flag; held for a few instructions.
    state: Mutex<State>,
    released: Notify,
}

#[derive(Default)]
struct State {
    rules: Vec<FaultRule>,
    hung: bool,
    hits: u64,
}

impl FaultDevice {
    /// Wraps `inner`, which behaves as ever until told otherwise.
    #[must_use]
    pub fn new(inner: DeviceRef) -> Arc<Self> {
        Arc::new(Self { inner, control: Arc::default() })
    }

    /// Adds a rule after those there are.
    pub fn add(&self, rule: FaultRule) {
        self.control.state.lock().rules.push(rule);
    }

    /// Forgets all rules.
    pub fn clear(&self) {
        self.control.state.lock().rules.clear();
    }

    /// Holds I/O back from now on, or lets what was held go on.
    pub fn set_hung(&self, hung: bool) {
        self.control.state.lock().hung = hung;
        if !hung {
            self.control.released.notify_waiters();
        }
    }

    /// I/O failed by rules so far.
    #[must_use]
    pub fn hits(&self) -> u64 {
        self.control.state.lock().hits
    }

    fn judge(&self, operation: Operation, offset: u64) -> Result<()> {
        let mut state = self.control.state.lock();
        let matches = |rule: &FaultRule| {
            rule.operation.is_none_or(|wanted| wanted == operation)
                && rule.offsets.contains(&offset)
                && rule.times != Some(0)
        };
        let Some(rule) = state.rules.iter_mut().find(|rule| matches(rule)) else { return Ok(()) };
        rule.times = rule.times.map(|times| times - 1);
        let kind = rule.kind;
        state.hits += 1;
        let error = Error::new(kind, "use device").context(self.inner.name());
        Err(error.context("injected fault"))
    }

    fn pass<T: 'static>(
        &self,
        operation: Operation,
        offset: u64,
        start: impl FnOnce(&DeviceRef) -> LocalBoxFuture<Result<T>> + 'static,
    ) -> LocalBoxFuture<Result<T>> {
        if let Err(error) = self.judge(operation, offset) {
            return Box::pin(std::future::ready(Err(error)));
        }
        if !self.control.state.lock().hung {
            return start(&self.inner);
        }
        let (control, inner) = (self.control.clone(), self.inner.clone());
        Box::pin(async move {
            control.wait_released().await;
            start(&inner).await
        })
    }
}

impl Control {
    async fn wait_released(&self) {
        loop {
            // Made before the look at the flag, so that a release in between is not missed.
            let released = self.released.notified();
            if !self.state.lock().hung {
                return;
            }
            released.await;
        }
    }
}

impl Device for FaultDevice {
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
        self.pass(Operation::Read, offset, move |inner| inner.read(offset, buf))
    }

    fn write(
        &self,
        offset: u64,
        data: Bytes,
        durability: Durability,
    ) -> LocalBoxFuture<Result<()>> {
        self.pass(Operation::Write, offset, move |inner| inner.write(offset, data, durability))
    }

    fn flush(&self) -> LocalBoxFuture<Result<()>> {
        self.pass(Operation::Flush, 0, |inner| inner.flush())
    }

    fn discard(&self, offset: u64, length: u64) -> LocalBoxFuture<Result<()>> {
        self.pass(Operation::Discard, offset, move |inner| inner.discard(offset, length))
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

    use std::time::Duration;

    use crate::device::sim::SimDisk;
    use crate::device::sim::SimProfile;
    use crate::env::EnvRef;
    use crate::env::sim::SimEnv;
    use crate::env::sim::Stalled;

    fn lab() -> (Arc<SimEnv>, Arc<FaultDevice>) {
        let env = SimEnv::new(1);
        let env_ref: EnvRef = env.clone();
        let disk = SimDisk::new("sim-0", SimProfile::new(1 << 20)).open(&env_ref);
        (env, FaultDevice::new(disk))
    }

    #[test]
    fn rule_fails_its_operation_in_its_range_as_often_as_told() {
        let (env, device) = lab();
        let (kind, times) = (ErrorKind::DeviceTransient, Some(2));
        device.add(FaultRule {
            operation: Some(Operation::Read),
            offsets: 4096..8192,
            kind,
            times,
        });
        let failed = |offset| env.run(device.read(offset, AlignedBuf::zeroed(512))).is_err();
        assert_eq!([0, 4096, 8192, 4608, 4096].map(failed), [false, true, false, true, false]);
        assert!(env.run(device.flush()).is_ok());
        assert_eq!(device.hits(), 2);
    }

    #[test]
    fn gone_device_fails_everything_until_cleared() {
        let (env, device) = lab();
        device.add(FaultRule::gone());
        let result = env.run(device.discard(0, 4096)).map_err(|error| error.kind());
        assert_eq!(result, Err(ErrorKind::DeviceFailed));
        device.clear();
        assert!(env.run(device.discard(0, 4096)).is_ok());
    }

    #[test]
    fn held_io_goes_on_when_released() {
        let (env, device) = lab();
        device.set_hung(true);
        let mut flush = device.flush();
        let limit = Duration::from_secs(9);
        let stalled = env.run_for(limit, flush.as_mut()).map(|_| ());
        assert_eq!(stalled.err(), Some(Stalled::Deadlock));
        device.set_hung(false);
        assert!(env.run(flush).is_ok());
    }
}

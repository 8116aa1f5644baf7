//! A rehearsal of creating a pod, on devices that have nothing but a length: what would refuse the
//! real devices refuses these, while nothing was written yet.

use std::sync::Arc;

use bytes::Bytes;

use crate::device::AlignedBuf;
use crate::device::Device;
use crate::device::DeviceRef;
use crate::device::Durability;
use crate::env::EnvRef;
use crate::env::LocalBoxFuture;
use crate::error::Result;
use crate::units::IO_ALIGN;
use crate::volume::pod::FormatOptions;
use crate::volume::pod::Pod;

/// Says why no pod can be created on devices of these lengths, in bytes, if none can.
///
/// # Errors
/// As [`Pod::format`] on blank devices that never fail.
pub(super) async fn rehearse(env: &EnvRef, lengths: &[u64], options: &FormatOptions) -> Result<()> {
    let device = |length: &u64| -> DeviceRef { Arc::new(Blank { len_bytes: *length }) };
    let devices: Vec<DeviceRef> = lengths.iter().map(device).collect();
    Pod::format(env, &devices, options).await.map(|_| ())
}

/// Reads as zero, and forgets what is written.
struct Blank {
    len_bytes: u64,
}

impl Device for Blank {
    fn name(&self) -> &'static str {
        "a device yet to be created"
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn sector_bytes(&self) -> u64 {
        IO_ALIGN
    }

    fn read(&self, _offset: u64, buf: AlignedBuf) -> LocalBoxFuture<Result<AlignedBuf>> {
        Box::pin(std::future::ready(Ok(AlignedBuf::zeroed(buf.len()))))
    }

    fn write(
        &self,
        _offset: u64,
        _data: Bytes,
        _durability: Durability,
    ) -> LocalBoxFuture<Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn flush(&self) -> LocalBoxFuture<Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn discard(&self, _offset: u64, _length: u64) -> LocalBoxFuture<Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::tokio_env::TokioEnv;
    use crate::error::ErrorKind;
    use crate::node::config::device_bytes_min;

    fn outcome(lengths: &[u64], options: &FormatOptions) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
        let env: EnvRef = TokioEnv::new();
        runtime.block_on(rehearse(&env, lengths, options))
    }

    #[test]
    fn what_the_configuration_calls_too_short_is_what_a_pod_does() {
        for journal_bytes in [4 << 20, 252 << 20, 16 << 30] {
            let fewest = device_bytes_min(journal_bytes);
            let options = FormatOptions { data_strips: 4, parity_strips: 2, journal_bytes };
            outcome(&[fewest; 6], &options).expect("long enough");
            let refused = outcome(&[fewest - IO_ALIGN; 6], &options).expect_err("too short");
            assert_eq!(refused.kind(), ErrorKind::InvalidRequest, "{}", refused.chain());
        }
    }

    #[test]
    fn many_short_devices_and_one_among_long_ones_make_a_pod() {
        let options = FormatOptions { data_strips: 2, parity_strips: 1, journal_bytes: 8 << 20 };
        outcome(&[256 << 20; 12], &options).expect("strips for short devices");
        outcome(&[64 << 30, 64 << 30, 64 << 30, 256 << 20], &options).expect("the same");
    }
}

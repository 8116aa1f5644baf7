//! Device files that are deleted or truncated under a running pod, on the real engine.
//!
//! Property: status says which device is lost and why within 5 s, and reads and writes go on.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime;
use tokio::task::LocalSet;
use weft::device::DeviceRef;
use weft::device::file::FileDevice;
use weft::device::file::OpenMode;
use weft::env::EnvRef;
use weft::env::tokio_env::TokioEnv;
use weft::error::ErrorKind;
use weft::volume::Piece;
use weft::volume::VolumeDirectory;
use weft::volume::VolumeRef;
use weft::volume::pod::FormatOptions;
use weft::volume::pod::OpenOptions;
use weft::volume::pod::Pod;
use weft::volume::pod::VolumeSpec;

const DEVICES: usize = 6;
const DEVICE_BYTES: u64 = 64 << 20;
const WRITE_BYTES: usize = 64 << 10;
/// As the contract promises.
const NOTICED_WITHIN: Duration = Duration::from_secs(5);

/// How long writes may go on, or wait, that cannot be stored. Generous: the machine may be busy.
const REFUSED_WITHIN: Duration = Duration::from_secs(30);

/// A directory that is removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("weft-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("created");
        Self(path)
    }

    fn device(&self, index: usize) -> PathBuf {
        self.0.join(format!("device-{index}"))
    }

    fn create_devices(&self) -> Vec<DeviceRef> {
        let create = |index| FileDevice::create(self.device(index), DEVICE_BYTES, 0);
        (0..DEVICES)
            .map(|index| -> DeviceRef { Arc::new(create(index).expect("created")) })
            .collect()
    }

    fn open_devices(&self) -> Vec<Option<DeviceRef>> {
        let open = |index| FileDevice::open(self.device(index), OpenMode::ReadWrite).ok();
        (0..DEVICES)
            .map(|index| open(index).map(|device| -> DeviceRef { Arc::new(device) }))
            .collect()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What block `index` holds, after `round` writes.
fn contents(index: u64, round: u8) -> Bytes {
    let seed = u8::try_from(index % 251).expect("below 256");
    (0..WRITE_BYTES).map(|at| (at.to_le_bytes()[0] ^ seed).wrapping_add(round)).collect()
}

async fn write(volume: &VolumeRef, index: u64, round: u8) {
    let offset = index * WRITE_BYTES as u64;
    Arc::clone(volume).write(offset, contents(index, round)).await.expect("written");
}

async fn check(volume: &VolumeRef, index: u64, round: u8) {
    let (offset, bytes) = (index * WRITE_BYTES as u64, u32::try_from(WRITE_BYTES).expect("small"));
    let pieces = Arc::clone(volume).read(offset, bytes).await.expect("read");
    let mut found = Vec::new();
    for piece in pieces {
        match piece {
            Piece::Zero(length) => found.resize(found.len() + length, 0),
            Piece::Data(data) => found.extend_from_slice(&data),
        }
    }
    assert_eq!(found, contents(index, round), "block {index}");
}

/// Reads and writes until the pod says that `index` failed for `reason`.
async fn wait_until_noticed(pod: &Pod, volume: &VolumeRef, index: usize, reason: &str, round: u8) {
    let noticed = async {
        for block in (0..8).cycle() {
            let device = &pod.status().devices[index];
            if device.state == "failed" {
                assert_eq!(device.reason.as_deref(), Some(reason));
                return;
            }
            // Of what no write touches, so that no cache answers for the devices.
            check(volume, 8 + block, 0).await;
            write(volume, block, round).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(NOTICED_WITHIN, noticed).await.expect("noticed in time");
}

async fn open(scratch: &Scratch, env: EnvRef) -> Arc<Pod> {
    let options = OpenOptions {
        cache_bytes: 1 << 20,
        map_cache_bytes: 1 << 20,
        force: false,
        replace_missing: false,
    };
    Pod::open(env, scratch.open_devices(), options).await.expect("opened")
}

/// A pod with 16 writes on its volume.
async fn new_pod(scratch: &Scratch, env: &EnvRef) -> (Arc<Pod>, VolumeRef) {
    let format = FormatOptions { data_strips: 4, parity_strips: 2, journal_bytes: 8 << 20 };
    Pod::format(env, &scratch.create_devices(), &format).await.expect("formatted");
    let pod = open(scratch, Arc::clone(env)).await;
    let spec = VolumeSpec {
        name: "volume".to_owned(),
        size_bytes: 16 << 20,
        logical_block_bytes: 4096,
        read_only: false,
        write_cache: false,
    };
    pod.create_volume(spec).await.expect("created");
    let volume = pod.find("volume").expect("found");
    for block in 0..16 {
        write(&volume, block, 0).await;
    }
    (pod, volume)
}

async fn lose_two_devices(scratch: &Scratch) {
    let env: EnvRef = TokioEnv::new();
    let (pod, volume) = new_pod(scratch, &env).await;

    fs::remove_file(scratch.device(1)).expect("removed");
    wait_until_noticed(&pod, &volume, 1, "the file was deleted", 1).await;
    assert_eq!((pod.status().health.as_str(), pod.status().can_lose), ("degraded", 1));

    // Past the superblocks, so that only looking at the file tells, not reading it.
    let file = fs::OpenOptions::new().write(true).open(scratch.device(4)).expect("opened");
    file.set_len(DEVICE_BYTES - 4096).expect("truncated");
    wait_until_noticed(&pod, &volume, 4, "the file was truncated", 2).await;
    assert_eq!(pod.status().can_lose, 0);

    for block in 0..16 {
        write(&volume, block, 3).await;
    }
    drop(volume);
    pod.close().await.expect("closed");
    drop(pod);

    // A pod does not open on a device that became shorter, but it does without one.
    fs::remove_file(scratch.device(4)).expect("removed");
    // What was written meanwhile is on the devices that are left, and those were let go of.
    let pod = open(scratch, env).await;
    let volume = pod.find("volume").expect("found");
    for block in 0..16 {
        check(&volume, block, 3).await;
    }
    pod.close().await.expect("closed");
}

#[test]
fn lost_files_are_noticed_while_reads_and_writes_go_on() {
    let scratch = Scratch::new("lost");
    let runtime = runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    LocalSet::new().block_on(&runtime, lose_two_devices(&scratch));
}

/// The journal needs fewer devices than segments do, so for a while it still takes writes.
async fn lose_three_devices(scratch: &Scratch) {
    let env: EnvRef = TokioEnv::new();
    let (pod, volume) = new_pod(scratch, &env).await;
    for index in 0..3 {
        fs::remove_file(scratch.device(index)).expect("removed");
    }
    let refused = async {
        for block in (0..16).cycle() {
            let offset = block * WRITE_BYTES as u64;
            if let Err(error) = Arc::clone(&volume).write(offset, contents(block, 1)).await {
                return error;
            }
        }
        unreachable!("it writes until it is refused")
    };
    let error = tokio::time::timeout(REFUSED_WITHIN, refused).await.expect("refused in time");
    assert_eq!(error.kind(), ErrorKind::DeviceFailed, "{}", error.chain());
    assert_eq!((pod.status().health.as_str(), pod.status().can_lose), ("failed", 0));
}

#[test]
fn with_fewer_devices_than_data_strips_a_pod_has_failed_and_is_not_full() {
    let scratch = Scratch::new("failed");
    let runtime = runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    LocalSet::new().block_on(&runtime, lose_three_devices(&scratch));
}

//! A pod on a few simulated disks, for tests that leave nothing to chance: 4+2, and as little cache as
//! there can be.

use std::sync::Arc;
use std::time::Duration;

use weft::device::sim::SimDisk;
use weft::device::sim::SimProfile;
use weft::env::EnvRef;
use weft::env::sim::SimEnv;
use weft::volume::VolumeDirectory;
use weft::volume::VolumeRef;
use weft::volume::pod::FormatOptions;
use weft::volume::pod::OpenOptions;
use weft::volume::pod::Pod;
use weft::volume::pod::VolumeSpec;

pub fn disks(name: &str, count: usize) -> Vec<SimDisk> {
    let disk = |index| SimDisk::new(format!("{name}-{index}"), SimProfile::new(32 << 20));
    (0..count).map(disk).collect()
}

/// Runs one life of the pod in a process of its own.
pub fn life<T>(world: &Arc<SimEnv>, work: impl AsyncFnOnce(EnvRef) -> T) -> T {
    let process = world.process();
    let env: EnvRef = process.clone();
    let outcome = process.run_for(Duration::from_secs(7200), work(env)).expect("no progress");
    process.halt();
    outcome
}

pub async fn open(env: &EnvRef, disks: &[&SimDisk], replace_missing: bool) -> Arc<Pod> {
    let devices = disks.iter().map(|disk| Some(disk.open(env))).collect();
    let options =
        OpenOptions { cache_bytes: 0, map_cache_bytes: 1 << 20, force: false, replace_missing };
    Pod::open(Arc::clone(env), devices, options).await.expect("open")
}

/// A new pod with a volume `v`.
pub async fn create(env: &EnvRef, disks: &[&SimDisk]) -> Arc<Pod> {
    create_with(env, disks, 1 << 20).await
}

/// As [`create`], with another journal.
pub async fn create_with(env: &EnvRef, disks: &[&SimDisk], journal_bytes: u64) -> Arc<Pod> {
    let devices: Vec<_> = disks.iter().map(|disk| disk.open(env)).collect();
    let options = FormatOptions { data_strips: 4, parity_strips: 2, journal_bytes };
    Pod::format(env, &devices, &options).await.expect("format");
    let pod = open(env, disks, false).await;
    create_volume(&pod, "v").await;
    pod
}

pub async fn create_volume(pod: &Arc<Pod>, name: &str) -> VolumeRef {
    let spec = VolumeSpec {
        name: name.into(),
        size_bytes: 16 << 30,
        logical_block_bytes: 4096,
        read_only: false,
        write_cache: false,
    };
    pod.create_volume(spec).await.expect("create");
    pod.find(name).expect("created")
}

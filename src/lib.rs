//! Weft: an open block-storage appliance for databases.
//!
//! The map of the crate, from the socket to the disk. Calls go downward only; `tests/tidy.rs`
//! checks it.
//!
//! | module | owns |
//! |---|---|
//! | [`node`] | the running node: configuration, and the one place that starts and stops everything |
//! | [`cli`] | admin commands, thin clients of the management API |
//! | [`mgmt`] | the management API server |
//! | [`target`] | protocols we serve: [`target::nbd`], [`target::nvmf`] |
//! | [`volume`] | what targets see |
//! | [`engine`] | volumes on a log: journal, map, checkpoint, recovery, reclaim |
//! | [`pool`] | devices as erasure-coded segments |
//! | [`cache`] | decoded chunks in RAM |
//! | [`device`] | files, block devices, the simulated disk, fault filters |
//! | [`mod@format`] | bytes on disk |
//! | [`codec`] | compression, erasure code, checksums |
//! | [`mod@env`] | time, randomness, spawning |
//! | [`secret`] | keys of hosts, as they are written down |
//! | [`observe`] | metrics and events |
//! | [`canary`] | planted bugs, for testing the tests |
//!
//! To follow one write: `target/nbd/session.rs` → `volume/pod_volume.rs` → `engine/write.rs` →
//! `engine/journal.rs` → `device/file.rs`. To follow one read: `target/nbd/session.rs` →
//! `volume/pod_volume.rs` → `engine/read.rs` → `pool/read.rs` → `device/file.rs`.

pub mod cache;
pub mod canary;
pub mod cli;
pub mod codec;
pub mod device;
pub mod engine;
pub mod env;
pub mod error;
pub mod format;
pub mod mgmt;
pub mod node;
pub mod observe;
pub mod pool;
pub mod secret;
pub mod target;
pub mod units;
pub mod volume;

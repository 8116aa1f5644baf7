//! A pod: devices, journal, segments, map and catalog, and the volumes on them.
//!
//! What the node and the management API see of one. Every size is in bytes.

use uuid::Uuid;

/// What is fixed when a pod is created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormatOptions {
    /// Strips of a segment that hold data: k.
    pub data_strips: usize,
    /// Strips of a segment that hold parity, which is how many devices may be lost: m.
    pub parity_strips: usize,
    /// Length of the journal's ring on each device.
    pub journal_bytes: u64,
}

/// What is chosen at each open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// RAM for decoded chunks.
    pub cache_bytes: u64,
    /// RAM for nodes of the map.
    pub map_cache_bytes: u64,
    /// Open with fewer members than the pod needs to be sure that no other half is open.
    pub force: bool,
}

/// A volume to create.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeSpec {
    /// Its name, which is also its export's.
    pub name: String,
    /// Its size; a multiple of 4096.
    pub size_bytes: u64,
    /// What hosts are told is the smallest request: 512 or 4096.
    pub logical_block_bytes: u32,
    /// Whether hosts may only read.
    pub read_only: bool,
}

/// A volume as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Number within the pod, never used twice.
    pub id: u64,
    /// Its name, which is also its export's.
    pub name: String,
    /// Identity for ever, whatever its name.
    pub uuid: Uuid,
    /// Its size; a multiple of 4096.
    pub size_bytes: u64,
    /// What hosts are told is the smallest request: 512 or 4096.
    pub logical_block_bytes: u32,
    /// Whether hosts may only read.
    pub read_only: bool,
    /// Live blocks times 4096: what is stored, before compression and parity.
    pub allocated_bytes: u64,
}

/// A device as the pod sees it. Counters start at 0 with each open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceStatus {
    /// Its place in the pod, from 0.
    pub index: usize,
    /// Identity, as its superblock says.
    pub uuid: Uuid,
    /// What the operator calls it: a path or an address.
    pub name: String,
    /// Its length.
    pub size_bytes: u64,
    /// `in service`, `failed`, `missing` or `hung`.
    pub state: String,
    /// Why it is not in service.
    pub reason: Option<String>,
    /// Reads completed.
    pub reads: u64,
    /// Writes completed.
    pub writes: u64,
    /// Reads failed.
    pub read_errors: u64,
    /// Writes failed.
    pub write_errors: u64,
    /// Reads whose bytes were not what had been written.
    pub checksum_errors: u64,
    /// Damaged places rebuilt and written back.
    pub healed: u64,
}

/// A pod as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodStatus {
    /// Identity.
    pub uuid: Uuid,
    /// Opens so far; the writer holds the newest.
    pub epoch: u64,
    /// k: see [`FormatOptions`].
    pub data_strips: usize,
    /// m: see [`FormatOptions`].
    pub parity_strips: usize,
    /// `healthy`, `degraded` or `read-only`.
    pub health: String,
    /// Devices that may still fail, all at once, without loss.
    pub can_lose: usize,
    /// What volumes may store, after parity, before compression.
    pub capacity_bytes: u64,
    /// Of it, in use or promised.
    pub used_bytes: u64,
    /// Live data as hosts wrote it.
    pub logical_bytes: u64,
    /// The same after compression.
    pub physical_bytes: u64,
    /// Length of the journal's ring.
    pub journal_bytes: u64,
    /// Of it, not yet behind a checkpoint.
    pub journal_used_bytes: u64,
    /// Acknowledged and not yet in a segment.
    pub buffered_bytes: u64,
    /// RAM that holds decoded chunks now.
    pub cache_bytes: u64,
    /// Reads answered from it, since the open.
    pub cache_hits: u64,
    /// Reads that had to ask a device, since the open.
    pub cache_misses: u64,
    /// Checkpoints completed since the open.
    pub checkpoints: u64,
    /// Every device, in order of index.
    pub devices: Vec<DeviceStatus>,
}

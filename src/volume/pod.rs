//! A pod: devices, journal, segments, map and catalog, and the volumes on them.
//!
//! What the node and the management API see of one. Every size is in bytes.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::Deserialize;
use serde::Serialize;
use uuid::Uuid;

use crate::device::AlignedBuf;
use crate::device::DeviceRef;
use crate::device::Durability;
use crate::env::EnvRef;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::volume::VolumeDirectory;
use crate::volume::VolumeRef;
use crate::volume::memory::MemoryVolume;

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

/// A stand-in: volumes in RAM, their names on the devices.
pub struct Pod {
    devices: Vec<Option<DeviceRef>>,
    names: Mutex<Names>,
    volumes: Mutex<BTreeMap<String, Arc<MemoryVolume>>>,
}

/// What the stand-in keeps in the first block of each device.
#[derive(Clone, Serialize, Deserialize)]
struct Names {
    uuid: Uuid,
    epoch: u64,
    data_strips: usize,
    parity_strips: usize,
    next_id: u64,
    volumes: BTreeMap<String, Named>,
}

#[derive(Clone, Serialize, Deserialize)]
struct Named {
    id: u64,
    uuid: Uuid,
    size_bytes: u64,
    logical_block_bytes: u32,
    read_only: bool,
}

impl Pod {
    /// Writes an empty pod.
    pub async fn format(
        _env: &EnvRef,
        devices: &[DeviceRef],
        options: &FormatOptions,
    ) -> Result<Uuid> {
        let names = Names {
            uuid: Uuid::new_v4(),
            epoch: 0,
            data_strips: options.data_strips,
            parity_strips: options.parity_strips,
            next_id: 1,
            volumes: BTreeMap::new(),
        };
        let devices: Vec<_> = devices.iter().cloned().map(Some).collect();
        store(&devices, &names).await?;
        Ok(names.uuid)
    }

    /// Reads the newest names.
    pub async fn open(
        _env: EnvRef,
        devices: Vec<Option<DeviceRef>>,
        _options: OpenOptions,
    ) -> Result<Arc<Pod>> {
        let mut newest: Option<Names> = None;
        for device in devices.iter().flatten() {
            let block = device.read(0, AlignedBuf::zeroed(4096)).await?;
            let end = block.iter().position(|byte| *byte == 0).unwrap_or(block.len());
            let Ok(names) = serde_json::from_slice::<Names>(&block[..end]) else { continue };
            if newest.as_ref().is_none_or(|newest| newest.epoch < names.epoch) {
                newest = Some(names);
            }
        }
        let mut names = newest.ok_or_else(|| Error::new(ErrorKind::NotFound, "open pod"))?;
        names.epoch += 1;
        store(&devices, &names).await?;
        let volumes = names.volumes.iter().map(|(name, named)| (name.clone(), named.memory(name)));
        let volumes = Mutex::new(volumes.collect());
        Ok(Arc::new(Self { devices, names: Mutex::new(names), volumes }))
    }

    /// Adds a volume.
    pub async fn create_volume(&self, spec: VolumeSpec) -> Result<VolumeInfo> {
        let mut names = self.names.lock().clone();
        if names.volumes.contains_key(&spec.name) {
            return Err(Error::new(ErrorKind::Exists, "create volume").context(spec.name));
        }
        let named = Named {
            id: names.next_id,
            uuid: Uuid::new_v4(),
            size_bytes: spec.size_bytes,
            logical_block_bytes: spec.logical_block_bytes,
            read_only: spec.read_only,
        };
        names.next_id += 1;
        names.volumes.insert(spec.name.clone(), named.clone());
        self.commit(names).await?;
        self.volumes.lock().insert(spec.name.clone(), named.memory(&spec.name));
        Ok(named.info(&spec.name))
    }

    /// Changes a volume's size.
    pub async fn resize_volume(&self, name: &str, size_bytes: u64) -> Result<VolumeInfo> {
        let mut names = self.names.lock().clone();
        let missing = || Error::new(ErrorKind::NotFound, "resize volume").context(name);
        let named = names.volumes.get_mut(name).ok_or_else(missing)?;
        named.size_bytes = size_bytes;
        let info = named.info(name);
        self.commit(names).await?;
        self.volumes.lock()[name].resize(size_bytes);
        Ok(info)
    }

    /// Deletes a volume.
    pub async fn delete_volume(&self, name: &str) -> Result<()> {
        let mut names = self.names.lock().clone();
        let missing = || Error::new(ErrorKind::NotFound, "delete volume").context(name);
        names.volumes.remove(name).ok_or_else(missing)?;
        self.commit(names).await?;
        if let Some(volume) = self.volumes.lock().remove(name) {
            volume.close();
        }
        Ok(())
    }

    /// All volumes by name.
    pub fn volumes(&self) -> Vec<VolumeInfo> {
        self.names.lock().volumes.iter().map(|(name, named)| named.info(name)).collect()
    }

    /// Mostly zeroes.
    pub fn status(&self) -> PodStatus {
        let names = self.names.lock();
        let device = |(index, device): (usize, &Option<DeviceRef>)| DeviceStatus {
            index,
            uuid: Uuid::nil(),
            name: device.as_ref().map_or_else(String::new, |device| device.name().to_owned()),
            size_bytes: device.as_ref().map_or(0, |device| device.len_bytes()),
            state: if device.is_some() { "in service" } else { "missing" }.to_owned(),
            reason: None,
            reads: 0,
            writes: 0,
            read_errors: 0,
            write_errors: 0,
            checksum_errors: 0,
            healed: 0,
        };
        let devices: Vec<_> = self.devices.iter().enumerate().map(device).collect();
        PodStatus {
            uuid: names.uuid,
            epoch: names.epoch,
            data_strips: names.data_strips,
            parity_strips: names.parity_strips,
            health: "healthy".to_owned(),
            can_lose: names.parity_strips,
            capacity_bytes: 0,
            used_bytes: 0,
            logical_bytes: 0,
            physical_bytes: 0,
            journal_bytes: 0,
            journal_used_bytes: 0,
            buffered_bytes: 0,
            cache_bytes: 0,
            cache_hits: 0,
            cache_misses: 0,
            checkpoints: 0,
            devices,
        }
    }

    /// Nothing to do.
    pub async fn close(&self) -> Result<()> {
        for volume in self.volumes.lock().values() {
            volume.close();
        }
        Ok(())
    }

    async fn commit(&self, names: Names) -> Result<()> {
        store(&self.devices, &names).await?;
        *self.names.lock() = names;
        Ok(())
    }
}

impl Named {
    fn memory(&self, name: &str) -> Arc<MemoryVolume> {
        let volume = MemoryVolume::new(name, self.size_bytes);
        Arc::new(if self.read_only { volume.read_only() } else { volume })
    }

    fn info(&self, name: &str) -> VolumeInfo {
        VolumeInfo {
            id: self.id,
            name: name.to_owned(),
            uuid: self.uuid,
            size_bytes: self.size_bytes,
            logical_block_bytes: self.logical_block_bytes,
            read_only: self.read_only,
            allocated_bytes: 0,
        }
    }
}

async fn store(devices: &[Option<DeviceRef>], names: &Names) -> Result<()> {
    let text = serde_json::to_vec(names).expect("our own types always encode");
    for device in devices.iter().flatten() {
        let block = AlignedBuf::padded(&text, 4096).freeze();
        device.write(0, block, Durability::Durable).await?;
    }
    Ok(())
}

impl VolumeDirectory for Pod {
    fn find(&self, name: &str) -> Option<VolumeRef> {
        self.volumes.lock().get(name).map(|volume| Arc::clone(volume) as VolumeRef)
    }

    fn list(&self) -> Vec<VolumeRef> {
        let volumes = self.volumes.lock();
        volumes.values().map(|volume| Arc::clone(volume) as VolumeRef).collect()
    }
}

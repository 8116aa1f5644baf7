//! A pod: devices, journal, segments, map and catalog, and the volumes on them.
//!
//! What the node and the management API see of one. Every size is in bytes.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use parking_lot::RwLock;
use tokio::sync::watch;
use uuid::Uuid;
use weft_api::Histogram;
use weft_api::Task;
use weft_api::VolumeStats;

use super::Volume;
use super::VolumeDirectory;
use super::VolumeRef;
use super::pod_volume::PodVolume;
use super::reservation::Reservations;
use crate::device::DeviceRef;
use crate::engine::Engine;
use crate::engine::catalog::CatalogChange;
use crate::engine::catalog::HostRecord;
use crate::engine::catalog::VolumeRecord;
use crate::engine::open::EngineFormat;
use crate::engine::open::EngineOptions;
use crate::env::EnvRef;
use crate::env::random_uuid;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::format::node::MAP_BLOCKS_MAX;
use crate::observe::task::Tasks;
use crate::pool::member::Health;
use crate::pool::member::Member;
use crate::pool::scrub::UnitPlace;
use crate::secret::HostKeys;
use crate::secret::tls_key::TlsKey;
use crate::units::BLOCK_BYTES_U64;
use crate::units::LayerId;
use crate::units::format_size;

/// Largest volume: what the protocols and the map can address, with room to spare.
pub const VOLUME_BYTES_MAX: u64 = MAP_BLOCKS_MAX * BLOCK_BYTES_U64;
/// Hosts that may be added. Arbitrary: each is a few hundred bytes of the catalog.
pub const HOSTS_MAX: usize = 1024;
/// Hosts of one volume's list, so that any list fits a record of the journal.
pub const VOLUME_HOSTS_MAX: usize = 128;
/// Longest volume name, in bytes; the same as the management API's.
pub const NAME_BYTES_MAX: usize = 64;

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
    /// Let blank devices take the places of missing ones; what those held is made again in the
    /// background.
    pub replace_missing: bool,
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
    /// Whether writes are acknowledged from memory, and durable once flushed.
    pub write_cache: bool,
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
    /// The only hosts it is served to, by NQN; `None`: all, and clients without a name.
    pub hosts: Option<BTreeSet<String>>,
    /// Which of them have registered with it, and who holds it.
    pub reservations: Arc<Reservations>,
    /// Whether writes are acknowledged from memory, and durable once flushed.
    pub write_cache: bool,
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
    /// `healthy`, `degraded`, `read-only`, or `failed` with fewer devices in service than data strips.
    pub health: String,
    /// Devices that may still fail, all at once, without loss.
    pub can_lose: usize,
    /// Segments with data.
    pub segments: u64,
    /// Of them, with fewer strips in service than they should have.
    pub segments_degraded: u64,
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

/// An open pod.
pub struct Pod {
    engine: Arc<Engine>,
    /// By name.
    volumes: RwLock<BTreeMap<String, Arc<PodVolume>>>,
    /// One change of the catalog at a time, so that a name checked stays free.
    changes: tokio::sync::Mutex<()>,
    /// Counts changes that hosts may want to hear of.
    changed: watch::Sender<u64>,
}

impl Pod {
    /// Writes a new, empty pod to `devices`.
    ///
    /// # Errors
    /// `InvalidRequest` for impossible geometries or small devices, `Exists` if a device belongs
    /// to a pod already.
    pub async fn format(
        env: &EnvRef,
        devices: &[DeviceRef],
        options: &FormatOptions,
    ) -> Result<Uuid> {
        let format = EngineFormat {
            data_strips: options.data_strips,
            parity_strips: options.parity_strips,
            journal_bytes: options.journal_bytes,
        };
        Engine::format(env, devices, format).await
    }

    /// Opens a pod on those of its devices that are there; `None` stands for one that is not.
    /// Recovers whatever the last run left, and runs background work on the calling thread.
    ///
    /// # Errors
    /// See [`Engine::open`].
    pub async fn open(
        env: EnvRef,
        devices: Vec<Option<DeviceRef>>,
        options: OpenOptions,
    ) -> Result<Arc<Self>> {
        let options = EngineOptions {
            cache_bytes: options.cache_bytes,
            map_cache_bytes: options.map_cache_bytes,
            force: options.force,
            replace_missing: options.replace_missing,
        };
        let engine = Engine::open(env, devices.into_iter().flatten().collect(), options).await?;
        let records: Vec<VolumeRecord> =
            engine.with_catalog(|catalog| catalog.volumes.values().cloned().collect());
        let pod = Self {
            engine,
            volumes: RwLock::new(BTreeMap::new()),
            changes: tokio::sync::Mutex::new(()),
            changed: watch::Sender::default(),
        };
        for record in records {
            pod.add(&record)?;
        }
        Ok(Arc::new(pod))
    }

    fn add(&self, record: &VolumeRecord) -> Result<()> {
        let layer = self.engine.layer(LayerId(record.head)).ok_or_else(|| {
            Error::new(ErrorKind::Corrupt, "open volume")
                .context(format_args!("{}: its layer is missing", record.name))
        })?;
        let volume = PodVolume::new(Arc::clone(&self.engine), layer, record);
        self.volumes.write().insert(record.name.clone(), Arc::new(volume));
        Ok(())
    }

    /// Creates a volume; durable when it returns.
    ///
    /// # Errors
    /// `InvalidRequest` for a bad name or size, `Exists` if the name is taken.
    pub async fn create_volume(&self, spec: VolumeSpec) -> Result<VolumeInfo> {
        check_name(&spec.name)?;
        check_size(spec.size_bytes)?;
        if !matches!(spec.logical_block_bytes, 512 | 4096) {
            return Err(Error::new(ErrorKind::InvalidRequest, "create volume")
                .context("the logical block size is 512 or 4096 bytes"));
        }
        let _one_at_a_time = self.changes.lock().await;
        let first_id = self.engine.with_catalog(|catalog| {
            catalog.volume_named(&spec.name).is_none().then_some(catalog.next_id)
        });
        let Some(id) = first_id else {
            return Err(Error::new(ErrorKind::Exists, "create volume").context(&spec.name));
        };
        let env = &self.engine.env;
        let record = VolumeRecord {
            id,
            name: spec.name,
            uuid: random_uuid(env),
            size_bytes: spec.size_bytes,
            logical_block_bytes: spec.logical_block_bytes,
            read_only: spec.read_only,
            branch: id + 1,
            head: id + 2,
            hosts: None,
            reservations: None,
            write_cache: spec.write_cache,
        };
        self.engine.change_catalog(&CatalogChange::CreateVolume(record.clone())).await?;
        self.add(&record)?;
        self.announce();
        self.info(&record.name)
    }

    /// Changes a volume's size; durable when it returns, and seen by hosts that ask.
    ///
    /// # Errors
    /// `InvalidRequest` for a smaller or impossible size, `NotFound`.
    pub async fn resize_volume(&self, name: &str, size_bytes: u64) -> Result<VolumeInfo> {
        check_size(size_bytes)?;
        let _one_at_a_time = self.changes.lock().await;
        let volume = self.find_volume(name, "resize volume")?;
        if size_bytes < volume.info().size_bytes {
            return Err(Error::new(ErrorKind::InvalidRequest, "resize volume")
                .context("volumes cannot shrink: create a smaller one and copy what is needed"));
        }
        let change = CatalogChange::ResizeVolume { id: volume.id(), size_bytes };
        self.engine.change_catalog(&change).await?;
        volume.set_size(size_bytes);
        self.announce();
        self.info(name)
    }

    /// Turns a volume's volatile write cache on or off; durable when it returns. Once off, all that was
    /// acknowledged is durable.
    ///
    /// # Errors
    /// `NotFound`; `Poisoned` if what was acknowledged from memory cannot become durable.
    pub async fn set_write_cache(&self, name: &str, write_cache: bool) -> Result<VolumeInfo> {
        let _one_at_a_time = self.changes.lock().await;
        let volume = self.find_volume(name, "set the write cache of a volume")?;
        if !write_cache {
            volume.set_write_cache(false).await?;
        }
        let change = CatalogChange::SetWriteCache { id: volume.id(), write_cache };
        self.engine.change_catalog(&change).await?;
        volume.set_write_cache(write_cache).await?;
        self.announce();
        self.info(name)
    }

    /// Deletes a volume and all its data; durable when it returns. Its space comes back in the
    /// background.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn delete_volume(&self, name: &str) -> Result<()> {
        let _one_at_a_time = self.changes.lock().await;
        let volume = self.find_volume(name, "delete volume")?;
        volume.close();
        self.engine.change_catalog(&CatalogChange::DeleteVolume { id: volume.id() }).await?;
        self.volumes.write().remove(name);
        self.announce();
        Ok(())
    }

    /// Says which hosts a volume is served to, by NQN: `None` for all, and for clients that have
    /// no name. Durable when it returns, and seen by hosts at once.
    ///
    /// # Errors
    /// `NotFound` for a volume or a host there is not, `InvalidRequest` for more than
    /// [`VOLUME_HOSTS_MAX`].
    pub async fn set_volume_hosts(
        &self,
        name: &str,
        hosts: Option<BTreeSet<String>>,
    ) -> Result<VolumeInfo> {
        const OP: &str = "set the hosts of a volume";
        let _one_at_a_time = self.changes.lock().await;
        let volume = self.find_volume(name, OP)?;
        if hosts.as_ref().is_some_and(|hosts| hosts.len() > VOLUME_HOSTS_MAX) {
            return Err(Error::new(ErrorKind::InvalidRequest, OP).context(format_args!(
                "a volume has at most {VOLUME_HOSTS_MAX} hosts of its own; or is for all"
            )));
        }
        for nqn in hosts.iter().flatten() {
            self.check_host_known(nqn, OP)?;
        }
        let change = CatalogChange::SetVolumeHosts { id: volume.id(), hosts: hosts.clone() };
        self.engine.change_catalog(&change).await?;
        volume.set_hosts(hosts);
        self.announce();
        self.info(name)
    }

    /// Takes all reservations and registrations off a volume, whoever they are; durable and in
    /// force when it returns. For hosts that hold it and are gone for good.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn clear_reservations(&self, name: &str) -> Result<VolumeInfo> {
        let _one_at_a_time = self.changes.lock().await;
        let volume = self.find_volume(name, "clear reservations")?;
        loop {
            let seen = volume.reservations();
            let next = Reservations {
                generation: seen.generation.wrapping_add(1),
                persistent: seen.persistent,
                ..Reservations::default()
            };
            // False: a host has changed them meanwhile.
            if Arc::clone(&volume).replace_reservations(seen, next).await? {
                return Ok(volume.info());
            }
        }
    }

    /// Lets a host connect from anywhere, once it has proven that it has its keys, if it is given
    /// any, and encrypted by `tls`, if it is given that; durable when it returns.
    ///
    /// # Errors
    /// `InvalidRequest` for what is not an NQN, `Exists`, `NoSpace` if there are [`HOSTS_MAX`].
    pub async fn add_host(
        &self,
        nqn: &str,
        dhchap: Option<HostKeys>,
        tls: Option<TlsKey>,
    ) -> Result<()> {
        const OP: &str = "add host";
        weft_api::check_nqn(nqn)
            .map_err(|reason| Error::new(ErrorKind::InvalidRequest, OP).context(reason))?;
        let _one_at_a_time = self.changes.lock().await;
        if self.knows_host(nqn) {
            return Err(Error::new(ErrorKind::Exists, OP).context(format_args!("host '{nqn}'")));
        }
        if self.hosts().len() >= HOSTS_MAX {
            return Err(Error::new(ErrorKind::NoSpace, OP)
                .context(format_args!("a pod has at most {HOSTS_MAX} hosts: remove one")));
        }
        let change = CatalogChange::AddHost(HostRecord { nqn: nqn.to_owned(), dhchap, tls });
        self.engine.change_catalog(&change).await?;
        self.announce();
        Ok(())
    }

    /// Gives a host keys in place of those before, or none; durable when it returns. Connections
    /// that are there stay; each new one, and each authentication anew, is by the new keys.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn set_host_keys(&self, nqn: &str, dhchap: Option<HostKeys>) -> Result<()> {
        let _one_at_a_time = self.changes.lock().await;
        self.check_host_known(nqn, "set the keys of a host")?;
        let change = CatalogChange::SetHostKeys { nqn: nqn.to_owned(), dhchap };
        self.engine.change_catalog(&change).await
    }

    /// Gives a host a key for TLS in place of the one before, or none; durable when it returns. With
    /// one, it must encrypt its connections. Those that are there stay as they are.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn set_host_tls_key(&self, nqn: &str, tls: Option<TlsKey>) -> Result<()> {
        let _one_at_a_time = self.changes.lock().await;
        self.check_host_known(nqn, "set the TLS key of a host")?;
        let change = CatalogChange::SetHostTlsKey { nqn: nqn.to_owned(), tls };
        self.engine.change_catalog(&change).await
    }

    /// Takes a host out, and off every volume's list; durable when it returns, and its connections
    /// end unless hosts that were never added may connect from where it is.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn remove_host(&self, nqn: &str) -> Result<()> {
        let _one_at_a_time = self.changes.lock().await;
        self.check_host_known(nqn, "remove host")?;
        let change = CatalogChange::RemoveHost { nqn: nqn.to_owned() };
        self.engine.change_catalog(&change).await?;
        self.volumes.read().values().for_each(|volume| volume.remove_host(nqn));
        self.announce();
        Ok(())
    }

    fn check_host_known(&self, nqn: &str, op: &'static str) -> Result<()> {
        if self.knows_host(nqn) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::NotFound, op).context(format_args!(
            "no host '{}': add it first, with `weft host add`",
            nqn.escape_default()
        )))
    }

    /// The hosts that were added, in order of NQN.
    #[must_use]
    pub fn hosts(&self) -> Vec<String> {
        self.engine.with_catalog(|catalog| catalog.hosts.keys().cloned().collect())
    }

    /// The same with their keys.
    #[must_use]
    pub fn hosts_with_keys(&self) -> Vec<HostRecord> {
        self.engine.with_catalog(|catalog| catalog.hosts.values().cloned().collect())
    }

    /// One of them.
    #[must_use]
    pub fn host(&self, nqn: &str) -> Option<HostRecord> {
        self.engine.with_catalog(|catalog| catalog.hosts.get(nqn).cloned())
    }

    /// Tells those who watch that a volume was added, resized or removed, or who is served what.
    fn announce(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    fn find_volume(&self, name: &str, op: &'static str) -> Result<Arc<PodVolume>> {
        let volume = self.volumes.read().get(name).cloned();
        volume.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, op).context(format_args!("no volume '{name}'"))
        })
    }

    fn info(&self, name: &str) -> Result<VolumeInfo> {
        self.find_volume(name, "show volume").map(|volume| volume.info())
    }

    /// All volumes, ordered by name.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeInfo> {
        self.volumes.read().values().map(|volume| volume.info()).collect()
    }

    /// What hosts did with each volume, in order of name.
    #[must_use]
    pub fn volume_stats(&self) -> Vec<VolumeStats> {
        let volumes = self.volumes.read();
        let stats = volumes.values().map(|volume| {
            let info = volume.info();
            VolumeStats {
                id: info.id,
                name: info.name,
                size_bytes: info.size_bytes,
                allocated_bytes: info.allocated_bytes,
                operations: volume.requests().snapshot(),
            }
        });
        stats.collect()
    }

    /// How long each device takes for reads and for writes, in order of index.
    #[must_use]
    pub fn device_latencies(&self) -> Vec<(Histogram, Histogram)> {
        let members = self.engine.pool.members.iter();
        let latencies = members.map(|member| {
            let counters = &member.counters;
            (counters.read_latency.snapshot(), counters.write_latency.snapshot())
        });
        latencies.collect()
    }

    /// The pod as it is now.
    #[must_use]
    pub fn status(&self) -> PodStatus {
        let engine = self.engine.status();
        let pool = &self.engine.pool;
        let geometry = &pool.geometry;
        let in_service = pool.in_service_count();
        let redundancy = pool.redundancy();
        let health = if !pool.has_enough_devices() {
            "failed"
        } else if engine.read_only {
            "read-only"
        } else if in_service < geometry.devices {
            "degraded"
        } else {
            "healthy"
        };
        PodStatus {
            uuid: Uuid::from_bytes(geometry.pod.0),
            epoch: self.engine.epoch,
            data_strips: geometry.data_strips,
            parity_strips: geometry.parity_strips,
            health: health.to_owned(),
            can_lose: pool.can_lose(),
            segments: redundancy.segments,
            segments_degraded: redundancy.degraded,
            capacity_bytes: engine.limit_bytes,
            used_bytes: engine.live_bytes + self.engine.space.promised_bytes(),
            logical_bytes: engine.logical_bytes,
            physical_bytes: engine.live_bytes,
            journal_bytes: geometry.journal_bytes,
            journal_used_bytes: engine.journal_used_bytes,
            buffered_bytes: engine.buffered_bytes,
            cache_bytes: self.engine.cache.used_bytes(),
            cache_hits: self.engine.cache.hits(),
            cache_misses: self.engine.cache.misses(),
            checkpoints: engine.checkpoints,
            devices: pool.members.iter().map(|member| device_status(member)).collect(),
        }
    }

    /// Long work, under way and ended.
    #[must_use]
    pub fn tasks(&self) -> &Tasks {
        &self.engine.tasks
    }

    /// Starts a scrub, which reads everything that is stored, at most `rate` bytes a second, and
    /// heals what is damaged; it goes on in the background. Must be called on the pod's thread.
    ///
    /// # Errors
    /// `Busy` if one is under way, `ShuttingDown`.
    pub fn start_scrub(&self, rate: u64) -> Result<Task> {
        self.engine.start_scrub(rate)
    }

    /// Every unit that a scrub started now would read, for a look at the devices from outside.
    #[must_use]
    pub fn live_units(&self) -> Vec<UnitPlace> {
        self.engine.pool.live_units()
    }

    /// Copies of journal batches that devices still owe, for checkers: none a while after the last
    /// write.
    #[must_use]
    pub fn late_journal_copies(&self) -> usize {
        self.engine.late_journal_copies()
    }

    /// Takes a device out of service, as when its file was deleted.
    pub fn fail_device(&self, index: usize, reason: &str) {
        if let Some(member) = self.engine.pool.members.get(index) {
            member.fail(reason);
        }
    }

    /// Ends all sessions' access, drains what was accepted and writes a last checkpoint.
    ///
    /// # Errors
    /// See [`Engine::close`]; nothing acknowledged is lost either way.
    pub async fn close(&self) -> Result<()> {
        self.volumes.read().values().for_each(|volume| volume.close());
        self.engine.close().await
    }
}

impl VolumeDirectory for Pod {
    fn find(&self, name: &str) -> Option<VolumeRef> {
        self.volumes.read().get(name).map(|volume| Arc::clone(volume) as VolumeRef)
    }

    fn list(&self) -> Vec<VolumeRef> {
        self.volumes.read().values().map(|volume| Arc::clone(volume) as VolumeRef).collect()
    }

    fn knows_host(&self, nqn: &str) -> bool {
        self.engine.with_catalog(|catalog| catalog.hosts.contains_key(nqn))
    }

    fn host_keys(&self, nqn: &str) -> Option<HostKeys> {
        self.engine.with_catalog(|catalog| catalog.hosts.get(nqn)?.dhchap.clone())
    }

    fn host_tls_key(&self, nqn: &str) -> Option<TlsKey> {
        self.engine.with_catalog(|catalog| catalog.hosts.get(nqn)?.tls.clone())
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

fn device_status(member: &Member) -> DeviceStatus {
    let (state, reason) = match member.health() {
        Health::InService => ("in service", None),
        Health::Missing => ("missing", None),
        Health::Failed(reason) => ("failed", Some(reason)),
        Health::Hung(reason) => ("hung", Some(reason)),
    };
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    DeviceStatus {
        index: member.index,
        uuid: Uuid::from_bytes(member.uuid),
        name: member.name(),
        size_bytes: member.device_bytes().unwrap_or(0),
        state: state.to_owned(),
        reason,
        reads: count(&member.counters.reads),
        writes: count(&member.counters.writes),
        read_errors: count(&member.counters.read_errors),
        write_errors: count(&member.counters.write_errors),
        checksum_errors: count(&member.counters.checksum_errors),
        healed: count(&member.counters.healed),
    }
}

/// Names travel through URIs, shells and file names: nothing that any of them would change.
fn check_name(name: &str) -> Result<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    let good = !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && name.bytes().all(plain)
        && !name.starts_with(['-', '.']);
    if good {
        return Ok(());
    }
    Err(Error::new(ErrorKind::InvalidRequest, "create volume").context(format_args!(
        "'{}' is not a volume name: 1 to {NAME_BYTES_MAX} of A-Z a-z 0-9 . _ -, not beginning \
         with '-' or '.'",
        name.escape_default()
    )))
}

fn check_size(size_bytes: u64) -> Result<()> {
    let good = size_bytes > 0
        && size_bytes.is_multiple_of(BLOCK_BYTES_U64)
        && size_bytes <= VOLUME_BYTES_MAX;
    if good {
        return Ok(());
    }
    Err(Error::new(ErrorKind::InvalidRequest, "choose the volume size").context(format_args!(
        "{size_bytes} bytes: a multiple of 4096 up to {} is needed",
        format_size(VOLUME_BYTES_MAX)
    )))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;

    use super::*;
    use crate::device::sim::SimDisk;
    use crate::device::sim::SimProfile;
    use crate::env::sim::SimEnv;

    #[test]
    fn a_pod_dropped_without_being_closed_leaves_nothing_in_memory() {
        let env = SimEnv::new(1);
        let process = env.process();
        let disks: Vec<_> = (0..3)
            .map(|at| SimDisk::new(format!("disk-{at}"), SimProfile::new(32 << 20)))
            .collect();
        let shared: EnvRef = process.clone();
        let devices = || disks.iter().map(|disk| disk.open(&shared));
        let work = async {
            let format = FormatOptions { data_strips: 1, parity_strips: 1, journal_bytes: 4 << 20 };
            Pod::format(&shared, &devices().collect::<Vec<_>>(), &format).await.expect("formatted");
            let options = OpenOptions {
                cache_bytes: 1 << 20,
                map_cache_bytes: 1 << 20,
                force: false,
                replace_missing: false,
            };
            let devices = devices().map(Some).collect();
            let pod = Pod::open(Arc::clone(&shared), devices, options).await.expect("opened");
            let spec = VolumeSpec {
                name: "v".into(),
                size_bytes: 1 << 20,
                logical_block_bytes: 512,
                read_only: false,
                write_cache: false,
            };
            pod.create_volume(spec).await.expect("created");
            let volume = Arc::clone(&pod.volumes.read()["v"]);
            volume.write(0, Bytes::from(vec![7; 65536])).await.expect("written");
            let head = pod.engine.with_catalog(|catalog| {
                catalog.volume_named("v").map(|volume| LayerId(volume.head))
            });
            let layer = pod.engine.layer(head.expect("created")).expect("has one");
            assert!(!layer.state.lock().index.is_empty(), "it is mapped later");
            Arc::downgrade(&layer)
        };
        let layer = process.run_for(Duration::from_secs(60), work).expect("done");
        process.halt();
        env.halt();
        assert!(layer.upgrade().is_none(), "something still refers to it");
    }
}

//! Creating a pod, and opening one after a stop of any kind.
//!
//! Order of an open: superblocks → members → checkpoint → journal's end → epoch, `epoch_start`
//! and `id_limit` durable → batches with too few copies copied → write buffer filled → serving.
//! Nothing is written before the new epoch is durable.

use std::sync::Arc;
use std::sync::Weak;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;
use parking_lot::RwLock;
use tokio::sync::Notify;
use tokio::sync::watch;
use uuid::Uuid;

use super::Engine;
use super::Layers;
use super::catalog::Catalog;
use super::catalog::CatalogChange;
use super::catalog::MemberRecord;
use super::checkpoint::CATALOG_PART_BYTES;
use super::checkpoint::CheckpointState;
use super::checkpoint::ID_GRANT;
use super::journal::JOURNAL_BYTES_MIN;
use super::journal::Journal;
use super::layer::Layer;
use super::mapper::BufferQueue;
use super::mapper::Mapper;
use super::read::decode_payload;
use super::record::BufferedRecord;
use super::recovery;
use super::recovery::ReplayRecord;
use super::scrub::ScrubControl;
use super::space::Space;
use super::space::room_for;
use super::trim::Trims;
use crate::cache::ChunkCache;
use crate::canary::Bug;
use crate::canary::planted;
use crate::device::DeviceRef;
use crate::env::EnvRef;
use crate::env::random_uuid;
use crate::env::timeout;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::format::PodId;
use crate::format::location::Location;
use crate::format::node::NODE_BYTES;
use crate::format::node::NODE_ENTRIES;
use crate::format::node::decode_node;
use crate::format::record::RecordKind;
use crate::format::record::decode_record;
use crate::format::root::CheckpointRoot;
use crate::format::superblock::Superblock;
use crate::format::table::PAGE_ENTRIES;
use crate::format::table::SegmentEntry;
use crate::format::table::decode_page;
use crate::format::unit::UNIT_BYTES;
use crate::observe::event;
use crate::observe::task::Tasks;
use crate::pool::Geometry;
use crate::pool::Pool;
use crate::pool::member::IO_TIMEOUT;
use crate::pool::member::Member;
use crate::pool::read::ReadOutcome;
use crate::pool::superblock::DeviceSuperblock;
use crate::pool::superblock::read_superblock;
use crate::pool::superblock::write_superblock;
use crate::units::BranchId;
use crate::units::IO_ALIGN;
use crate::units::LayerId;
use crate::units::Lba;
use crate::units::Lsn;
use crate::units::bytes_u64;
use crate::units::format_size;

/// Most segments a full pod has: bounds the table in memory.
const SEGMENTS_MAX: u64 = 1 << 20;
/// Fewest segments a pod is useful with.
const SEGMENTS_MIN: u64 = 64;
/// Largest strip chosen for small pods: units are written 16 at a time, so larger ones gain
/// nothing until the number of segments must be kept down.
const STRIP_BYTES_PREFERRED: u64 = 4 << 20;
/// Segments kept for the mapper: two open, two for reclaim.
const RESERVE_SEGMENTS: u64 = 4;
/// Rows kept for the mapper: a checkpoint begins a row for each level of the map, the catalog, the
/// table's pages, its directories and the root; a reclaim cycle makes one and is followed by one.
/// Of the catalog this is the first row; large pods have more, see [`catalog_rows`].
const RESERVE_ROWS: u64 = 24;
/// Most rows of a catalog: 15 MiB with 4 data strips, which is tens of thousands of volumes.
const CATALOG_ROWS_MAX: u64 = 64;
/// Fewest map nodes kept in memory: the paths of a few walks.
const NODES_MIN: usize = 16;
/// Most dirty map nodes at once.
const DIRTY_NODES_MAX: u64 = 8192;
/// What an open by force adds to the epoch, any other one adds 1: see [`refuse_two_halves`].
const FORCED_EPOCH: u64 = 1 << 32;
/// Log addresses, in bytes, that an open by force leaves unused: those beyond the limit it knows may
/// have been used by devices that it does not see, and an address never means two things. As much as
/// nobody writes, and room for 2000 such opens.
const FORCED_SKIP_BYTES: u64 = 1 << 50;
/// How often devices are asked whether they are lost. Arbitrary: the contract says 5 s.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// Rows kept for the catalog: a 256th of the pod, so that small ones keep most for data.
fn catalog_rows(pool: &Pool) -> u64 {
    let rows = pool.table.lock().segments_total() * pool.geometry.rows();
    (rows / 256).clamp(1, CATALOG_ROWS_MAX)
}

/// What a pod is created with, as far as the engine is concerned.
#[derive(Clone, Copy, Debug)]
pub struct EngineFormat {
    /// Data strips per segment (k).
    pub data_strips: usize,
    /// Parity strips per segment (m).
    pub parity_strips: usize,
    /// Bytes of the journal's ring on each device.
    pub journal_bytes: u64,
}

/// What a pod is opened with, as far as the engine is concerned.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// RAM for decoded chunks.
    pub cache_bytes: u64,
    /// RAM for map nodes.
    pub map_cache_bytes: u64,
    /// Open with fewer devices than safe.
    pub force: bool,
    /// Let blank devices take the places of missing ones.
    pub replace_missing: bool,
}

impl Engine {
    /// Writes a new, empty pod to `devices`. Returns its UUID.
    ///
    /// # Errors
    /// `InvalidRequest` for impossible geometries or devices that are too small, `Exists` if a
    /// device belongs to a pod already.
    pub async fn format(env: &EnvRef, devices: &[DeviceRef], format: EngineFormat) -> Result<Uuid> {
        let pod = random_uuid(env);
        let smallest = devices.iter().map(|device| device.len_bytes()).min().unwrap_or(0);
        let mut geometry = Geometry {
            pod: PodId(*pod.as_bytes()),
            devices: devices.len(),
            data_strips: format.data_strips,
            parity_strips: format.parity_strips,
            strip_bytes: UNIT_BYTES as u64,
            journal_bytes: format.journal_bytes,
        };
        geometry.validate()?;
        check_journal(format.journal_bytes)?;
        geometry.strip_bytes = choose_strip_bytes(&geometry, devices);
        if geometry.regions(smallest) < SEGMENTS_MIN {
            let needed = geometry.data_offset() + SEGMENTS_MIN * geometry.strip_bytes;
            return Err(Error::new(ErrorKind::InvalidRequest, "create pod").context(format_args!(
                "the smallest device has {}, at least {} are needed",
                format_size(smallest),
                format_size(needed)
            )));
        }
        for device in devices {
            if let Some(found) = read_superblock(device).await? {
                return Err(Error::new(ErrorKind::Exists, "create pod").context(format_args!(
                    "{} belongs to pod {} already",
                    device.name(),
                    Uuid::from_bytes(found.superblock.pod.0)
                )));
            }
        }
        for (index, device) in devices.iter().enumerate() {
            let superblock = first_superblock(env, &geometry, index, device.len_bytes());
            write_superblock(device, &superblock, 0).await?;
        }
        Ok(pod)
    }

    /// Opens a pod and starts its mapper on the calling thread. `devices` are those that are
    /// there, in any order.
    ///
    /// # Errors
    /// `NotFound` if no device holds a pod, `DeviceFailed` with too few devices, `Corrupt` if
    /// acknowledged data is missing, `InvalidRequest` for devices of different pods.
    pub async fn open(
        env: EnvRef,
        devices: Vec<DeviceRef>,
        options: EngineOptions,
    ) -> Result<Arc<Self>> {
        let Assembled { members, mut head, forced } = assemble(&env, devices, options).await?;
        if forced {
            head.id_limit += FORCED_SKIP_BYTES / Geometry::from(&head).segment_bytes();
        }
        let pool = Arc::new(Pool::new(Arc::clone(&env), members, head.clone())?);
        let mut loaded = load_checkpoint(&pool, &head).await?;
        let joined = check_members(&pool, &mut loaded.catalog, head.generation)?;
        for device in &joined {
            pool.table.lock().strip_device(*device);
        }
        let mut recovered = recovery::recover(&pool, &head, loaded.cut).await?;
        recovered.records.retain(|record| record.header.lsn > loaded.cut);
        // Before anything is written: another build can still open the pod as it is.
        let changes = recovered.records.iter();
        for record in changes.filter(|record| record.header.kind == RecordKind::CatalogChange) {
            CatalogChange::decode(&record.payload)?;
        }
        let epoch_start = recovery::epoch_start(&recovered);
        let epoch = head.epoch + if forced { FORCED_EPOCH } else { 1 };
        let id_limit = head.id_limit + ID_GRANT;
        pool.commit_superblock(|superblock| {
            superblock.epoch = epoch - u64::from(planted(Bug::EpochNotPersisted));
            superblock.epoch_start = epoch_start;
            superblock.id_limit = id_limit;
        })
        .await?;
        pool.table.lock().extend_ids(id_limit);
        recovery::complete_copies(&pool, &mut recovered).await?;
        let journal = Journal::new(head.journal_bytes, pool.members.len(), recovered.start.clone());
        let engine = Arc::new(Self::assembled(env, pool, journal, epoch, options));
        engine.reserve_room();
        engine.restore_catalog(loaded.catalog);
        for record in recovered.records {
            engine.replay(record);
        }
        let mut mapper = Mapper::new(Arc::clone(&engine), loaded.cut, loaded.state);
        mapper.changed = !joined.is_empty();
        mapper.publish_space();
        engine.pool.start_heals();
        engine.env.spawn(Box::pin(mapper.run()));
        engine.env.spawn(Box::pin(watch_devices(Arc::downgrade(&engine))));
        Ok(engine)
    }

    fn assembled(
        env: EnvRef,
        pool: Arc<Pool>,
        journal: Journal,
        epoch: u64,
        options: EngineOptions,
    ) -> Self {
        let segment_bytes = pool.geometry.segment_bytes();
        let capacity = pool.table.lock().segments_total() * segment_bytes;
        // A sixty-fourth of the pod may be dirty nodes, so that small pods can write them too.
        let dirty_nodes_max = (capacity / 64 / NODE_BYTES as u64).clamp(64, DIRTY_NODES_MAX);
        let dirty_segments = (dirty_nodes_max * NODE_BYTES as u64).div_ceil(segment_bytes);
        let catalog_rows = catalog_rows(&pool);
        let reserve_rows = RESERVE_ROWS - 1 + catalog_rows;
        let reserve_row_segments = reserve_rows.div_ceil(pool.geometry.rows());
        let row_bytes = pool.geometry.data_strips * CATALOG_PART_BYTES;
        Self {
            cache: ChunkCache::new(options.cache_bytes),
            space: Arc::new(Space::default()),
            epoch,
            journal,
            buffer: Mutex::new(BufferQueue::default()),
            catalog: Mutex::new(Catalog::new(Vec::new())),
            layers: RwLock::new(Layers::default()),
            wake: Notify::new(),
            stopping: AtomicBool::new(false),
            stopped: watch::Sender::new(None),
            nodes: AtomicUsize::new(0),
            walks_waiting: AtomicUsize::new(0),
            nodes_read: AtomicUsize::new(0),
            nodes_max: crate::units::bytes_usize(options.map_cache_bytes / NODE_BYTES as u64)
                .max(NODES_MIN),
            dirty_nodes_max: crate::units::bytes_usize(dirty_nodes_max),
            reserve_segments: RESERVE_SEGMENTS + reserve_row_segments + dirty_segments,
            catalog_bytes_max: crate::units::bytes_usize(catalog_rows) * row_bytes,
            checkpoints: AtomicU64::new(0),
            scrub: ScrubControl::default(),
            tasks: Tasks::new(Arc::clone(&env), epoch),
            env,
            pool,
        }
    }

    /// Gives the reserve its room below the devices. A checkpoint that finds none elsewhere goes
    /// there, as only what it frees can be used again.
    fn reserve_room(&self) {
        let geometry = &self.pool.geometry;
        for member in self.pool.members.iter().filter(|member| member.in_service()) {
            let regions = member.device_bytes().map_or(0, |bytes| geometry.regions(bytes));
            let reserved = regions.min(self.reserve_segments);
            let offset = geometry.data_offset() + (regions - reserved) * geometry.strip_bytes;
            if let Err(error) = member.reserve(offset, reserved * geometry.strip_bytes) {
                event::raise(event::DEVICE_FULL, member.name(), error.chain());
            }
        }
    }

    fn restore_catalog(&self, catalog: Catalog) {
        for record in catalog.layers.values() {
            let layer = Layer::new(
                LayerId(record.id),
                BranchId(record.branch),
                Location(record.root),
                record.mapped_blocks,
            );
            layer.dropping.store(record.dropping, Ordering::Release);
            layer.state.lock().map.trims = Trims::restored(&record.trims);
            self.add_layer(layer);
        }
        *self.catalog.lock() = catalog;
    }

    /// Puts a record of the journal back into the write buffer.
    fn replay(&self, record: ReplayRecord) {
        let header = record.header;
        let layer = self.layer_of(header.branch);
        if layer.is_none() && header.kind != RecordKind::CatalogChange {
            return; // Its volume was deleted: no layer owns it any more.
        }
        let bytes = room_for(&header);
        let promise = (bytes > 0).then(|| self.space.hold(bytes));
        let ReplayRecord { payload, number, .. } = record;
        self.make_visible(&[Arc::new(BufferedRecord { header, payload, layer, promise, number })]);
    }
}

/// Takes lost devices out of service, for as long as there is an engine; keeps nothing open itself.
async fn watch_devices(engine: Weak<Engine>) {
    while let Some(env) = engine.upgrade().map(|engine| Arc::clone(&engine.env)) {
        env.sleep(WATCH_INTERVAL).await;
        if let Some(engine) = engine.upgrade() {
            engine.pool.members.iter().for_each(|member| member.notice_loss());
        }
    }
}

fn check_journal(journal_bytes: u64) -> Result<()> {
    if journal_bytes >= JOURNAL_BYTES_MIN && journal_bytes.is_multiple_of(IO_ALIGN) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::InvalidRequest, "choose the journal size").context(format_args!(
        "{}: at least {} and a multiple of {} are needed",
        format_size(journal_bytes),
        format_size(JOURNAL_BYTES_MIN),
        format_size(IO_ALIGN)
    )))
}

/// The preferred strip, smaller if the pod or a device would have too few of them, larger if the pod
/// would have too many.
fn choose_strip_bytes(geometry: &Geometry, devices: &[DeviceRef]) -> u64 {
    let regions = |strip_bytes: u64| {
        let geometry = Geometry { strip_bytes, ..*geometry };
        devices.iter().map(move |device| geometry.regions(device.len_bytes()))
    };
    let segments = |strip_bytes: u64| regions(strip_bytes).sum::<u64>() / geometry.strips() as u64;
    let too_few = |strip_bytes: u64| {
        segments(strip_bytes) < 2 * SEGMENTS_MIN
            || regions(strip_bytes).any(|regions| regions < SEGMENTS_MIN)
    };
    let mut strip_bytes = STRIP_BYTES_PREFERRED;
    while strip_bytes > UNIT_BYTES as u64 && too_few(strip_bytes) {
        strip_bytes /= 2;
    }
    while segments(strip_bytes) > SEGMENTS_MAX {
        strip_bytes *= 2;
    }
    strip_bytes
}

fn first_superblock(
    env: &EnvRef,
    geometry: &Geometry,
    index: usize,
    device_bytes: u64,
) -> Superblock {
    Superblock {
        pod: geometry.pod,
        device_uuid: *random_uuid(env).as_bytes(),
        device_index: u16::try_from(index).expect("at most 65535 devices"),
        device_count: u16::try_from(geometry.devices).expect("at most 65535 devices"),
        data_strips: u8::try_from(geometry.data_strips).expect("validated"),
        parity_strips: u8::try_from(geometry.parity_strips).expect("validated"),
        strip_bytes: geometry.strip_bytes,
        journal_bytes: geometry.journal_bytes,
        device_bytes,
        generation: 1,
        epoch: 0,
        epoch_start: Lsn(1),
        tail_position: 0,
        tail_lsn: Lsn(1),
        tail_previous: 0,
        id_limit: 1,
        checkpoint: 0,
        root: Location::HOLE,
        root_places: Vec::new(),
    }
}

/// The superblock of the newest run. A run that a power loss ended may have left a higher
/// generation on devices that were then away while the others went on, so the epoch counts first;
/// of two equal ones, that which more devices hold was committed.
fn newest_superblock(found: &[(DeviceRef, DeviceSuperblock)]) -> Option<Superblock> {
    let core = |superblock: &Superblock| {
        (superblock.epoch_start, superblock.tail_position, superblock.root, superblock.id_limit)
    };
    let superblocks = || found.iter().map(|(_, found)| &found.superblock);
    let copies = |one: &Superblock| {
        let held = superblocks().filter(|other| core(other) == core(one)).count();
        if planted(Bug::CopiesNotCounted) { 0 } else { held }
    };
    let epoch = |one: &Superblock| if planted(Bug::EpochNotCompared) { 0 } else { one.epoch };
    superblocks().max_by_key(|one| (epoch(one), one.generation, copies(one))).cloned()
}

/// The devices of a pod, each in its place.
struct Assembled {
    members: Vec<Arc<Member>>,
    /// The newest superblock.
    head: Superblock,
    /// There are fewer devices than is safe.
    forced: bool,
}

/// Reads all superblocks, finds the newest and gives every device its place.
async fn assemble(
    env: &EnvRef,
    devices: Vec<DeviceRef>,
    options: EngineOptions,
) -> Result<Assembled> {
    let mut blank: Vec<DeviceRef> = Vec::new();
    let mut found: Vec<(DeviceRef, DeviceSuperblock)> = Vec::new();
    for device in devices {
        // A device that hangs is left out, as one that is not there.
        let read = timeout(env, IO_TIMEOUT, read_superblock(&device)).await;
        let hung =
            || Err(Error::new(ErrorKind::DeviceFailed, "read superblock").context("it hangs"));
        match read.unwrap_or_else(hung) {
            Ok(Some(found)) if device.len_bytes() < found.superblock.device_bytes => {
                let message = "it is shorter than when it joined the pod";
                event::raise(event::DEVICE_LEFT_OUT, device.name(), message);
            }
            Ok(Some(superblock)) => found.push((device, superblock)),
            Ok(None) => blank.push(device),
            Err(error) => {
                event::raise(event::DEVICE_LEFT_OUT, device.name(), error.chain());
            }
        }
    }
    for (device, found) in &found {
        let (epoch, generation) = (found.superblock.epoch, found.superblock.generation);
        let checkpoint = found.superblock.checkpoint;
        tracing::debug!(device = device.name(), epoch, generation, checkpoint, "superblock read");
    }
    let Some(head) = newest_superblock(&found) else {
        return Err(Error::new(ErrorKind::NotFound, "open pod").context("no device holds one"));
    };
    let geometry = Geometry::from(&head);
    geometry.validate()?;
    let mut places: Vec<Option<(DeviceRef, DeviceSuperblock)>> =
        (0..geometry.devices).map(|_| None).collect();
    for (device, found) in found {
        let own = &found.superblock;
        let refuse = |what: &str| {
            Err(Error::new(ErrorKind::InvalidRequest, "open pod")
                .context(format_args!("{}: {what}", device.name())))
        };
        if own.pod != head.pod {
            return refuse("it belongs to another pod");
        }
        let place = &mut places[usize::from(own.device_index)];
        if place.is_some() {
            return refuse("another device has the same place in the pod; one of them is a copy");
        }
        *place = Some((device, found));
    }
    refuse_two_halves(&places, &head)?;
    let present = places.iter().flatten().count();
    let needed = geometry.devices - geometry.absent_max();
    let forced = present < needed && options.force;
    if present < needed && !forced && !planted(Bug::MinorityOpens) {
        return Err(Error::new(ErrorKind::DeviceFailed, "open pod").context(format_args!(
            "{present} of {} devices are there, {needed} are needed; attach the others",
            geometry.devices
        )));
    }
    let members = seat(env, places, blank, &head, options.replace_missing);
    if forced {
        refuse_too_few(&members, &geometry)?;
    }
    Ok(Assembled { members, head, forced })
}

/// Refuses to open by force what could not be told of it: before any device learns of an epoch that
/// the others would have to follow.
fn refuse_too_few(members: &[Arc<Member>], geometry: &Geometry) -> Result<()> {
    let usable = members.iter().filter(|member| member.in_service()).count();
    let needed = geometry.absent_max() + 1;
    if usable >= needed {
        return Ok(());
    }
    Err(Error::new(ErrorKind::DeviceFailed, "open pod by force").context(format_args!(
        "{usable} of {} devices are there, even by force {needed} are needed; attach the others",
        geometry.devices
    )))
}

/// Refuses devices of which some were opened by force while others went on without those.
///
/// An epoch counts opens by force in its upper half and all others in the lower. Where one run
/// follows the other neither ever falls, so a device with more of the others than the newest run, to
/// which only force can have given the higher epoch, is of a run that this one knew nothing of.
fn refuse_two_halves(
    places: &[Option<(DeviceRef, DeviceSuperblock)>],
    head: &Superblock,
) -> Result<()> {
    let others = |superblock: &Superblock| superblock.epoch % FORCED_EPOCH;
    let names = |apart: bool| {
        let on_side = |superblock: &Superblock| (others(superblock) > others(head)) == apart;
        let devices = places.iter().flatten().filter(|(_, found)| on_side(&found.superblock));
        devices.map(|(device, _)| device.name()).collect::<Vec<_>>().join(", ")
    };
    let apart = names(true);
    if apart.is_empty() || planted(Bug::HalvesMixed) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::InvalidRequest, "open pod").context(format_args!(
        "it was opened by force without what {apart} held then, and went on there as well: these are \
         two pods now. Attach either {apart} or {}, not both",
        names(false)
    )))
}

/// Makes every place a member: with the device found for it, with a blank one if `replace_missing`,
/// or without any.
fn seat(
    env: &EnvRef,
    places: Vec<Option<(DeviceRef, DeviceSuperblock)>>,
    blank: Vec<DeviceRef>,
    head: &Superblock,
    replace_missing: bool,
) -> Vec<Arc<Member>> {
    let geometry = Geometry::from(head);
    let (blank, short): (Vec<_>, Vec<_>) =
        blank.into_iter().partition(|device| geometry.regions(device.len_bytes()) >= SEGMENTS_MIN);
    let mut blank = blank.into_iter();
    let members = places.into_iter().enumerate().map(|(index, place)| {
        let env = Arc::clone(env);
        if let Some((device, found)) = place {
            let uuid = found.superblock.device_uuid;
            let generation = found.superblock.generation;
            return Arc::new(
                Member::new(env, index, uuid, Some(device)).found(found.slot, generation),
            );
        }
        let replacement = if replace_missing { blank.next() } else { None };
        let uuid = match &replacement {
            Some(device) => {
                let message = format_args!("a blank device takes the place of device {index}");
                event::raise(event::DEVICE_REPLACED, device.name(), message);
                *random_uuid(&env).as_bytes()
            }
            None => [0; 16],
        };
        Arc::new(Member::new(env, index, uuid, replacement))
    });
    let members = members.collect();
    for device in blank {
        let message = "it has no superblock, and there is no place for it";
        event::raise(event::DEVICE_LEFT_OUT, device.name(), message);
    }
    let needed = geometry.data_offset() + SEGMENTS_MIN * geometry.strip_bytes;
    for device in short {
        let message = format_args!(
            "it has no superblock, and devices of this pod have at least {}",
            format_size(needed)
        );
        event::raise(event::DEVICE_LEFT_OUT, device.name(), message);
    }
    members
}

/// A checkpoint in memory.
struct Loaded {
    catalog: Catalog,
    cut: Lsn,
    state: CheckpointState,
}

async fn load_checkpoint(pool: &Arc<Pool>, head: &Superblock) -> Result<Loaded> {
    if head.root == Location::HOLE {
        let members = pool.members.iter().map(|member| MemberRecord {
            index: member.index,
            uuid: Uuid::from_bytes(member.uuid),
        });
        return Ok(Loaded {
            catalog: Catalog::new(members.collect()),
            cut: Lsn(0),
            state: CheckpointState::default(),
        });
    }
    let strips = pool.geometry.strips();
    let root = load_root(pool, head).await?;
    let own = pool.geometry.space().address(head.root);
    for mut entry in root.metadata_segments {
        // The root lists its segment as it was before it was written itself.
        if let Some(own) = own.filter(|own| own.segment == entry.id) {
            entry.rows = entry.rows.max(own.byte / UNIT_BYTES as u64 + 1);
        }
        pool.table.lock().load(entry, None)?;
    }
    let mut json = Vec::new();
    for (part, location) in root.catalog.iter().enumerate() {
        let part = Lba(bytes_u64(part));
        json.extend(read_metadata(pool, *location, RecordKind::Catalog, part).await?);
    }
    let mut pages = Vec::new();
    for (number, location) in root.directories.iter().enumerate() {
        let number = Lba(bytes_u64(number));
        let directory = read_metadata(pool, *location, RecordKind::TableDirectory, number).await?;
        pages.extend_from_slice(&decode_node(&directory).map_err(damaged)?[..]);
    }
    pages.truncate(usize::try_from(root.pages).unwrap_or(usize::MAX));
    assert!(pages.len() <= root.directories.len() * NODE_ENTRIES);
    for (number, location) in pages.iter().enumerate().filter(|(_, page)| page.is_stored()) {
        let page = Lba(bytes_u64(number));
        let page = read_metadata(pool, *location, RecordKind::TablePage, page).await?;
        for (slot, entry) in decode_page(&page, strips).map_err(damaged)?.into_iter().enumerate() {
            pool.table.lock().load(entry, Some(number * PAGE_ENTRIES + slot))?;
        }
    }
    Ok(Loaded {
        catalog: Catalog::decode(&json)?,
        cut: root.cut,
        state: CheckpointState {
            number: head.checkpoint,
            root: head.root,
            catalog: root.catalog,
            directories: root.directories,
            pages,
        },
    })
}

/// Reads the root. Its segment is known from the superblock only, so it enters the table for the
/// length of the read.
async fn load_root(pool: &Arc<Pool>, head: &Superblock) -> Result<CheckpointRoot> {
    let address = pool.geometry.space().address(head.root);
    let segment = address.map(|address| address.segment).unwrap_or_default();
    let entry = SegmentEntry {
        id: segment,
        metadata: true,
        rows: pool.geometry.rows(),
        live_blocks: 0,
        blocks_written: 0,
        bytes_written: 0,
        places: head.root_places.clone(),
    };
    pool.table.lock().load(entry, None)?;
    let number = Lba(head.checkpoint);
    let payload = read_metadata(pool, head.root, RecordKind::Root, number).await;
    pool.table.lock().unload(segment);
    CheckpointRoot::decode(&payload?, pool.geometry.strips()).map_err(damaged)
}

async fn read_metadata(
    pool: &Arc<Pool>,
    location: Location,
    kind: RecordKind,
    number: Lba,
) -> Result<Vec<u8>> {
    let pod = pool.geometry.pod;
    let outcome = pool.read(location, |bytes, place| {
        let (header, payload) = decode_record(bytes, pod, place).ok()?;
        let bytes = crate::units::bytes_usize(u64::from(header.raw_bytes));
        let right = header.kind == kind && header.lba == number;
        right.then(|| decode_payload(&header, payload, bytes)).flatten()
    });
    match outcome.await.map_err(|error| error.context(format_args!("{kind:?} {number}")))? {
        ReadOutcome::Found(content) => Ok(content),
        ReadOutcome::Moved => Err(Error::new(ErrorKind::Corrupt, "load checkpoint")
            .context(format_args!("{kind:?} {number} lies in an unknown segment"))),
    }
}

fn damaged(error: crate::format::DecodeError) -> Error {
    Error::new(ErrorKind::Corrupt, "load checkpoint").source(error)
}

/// Refuses devices that the catalog does not name at their place, unless they just joined; names
/// those and returns their indices.
///
/// A device joins blank (generation 0) with the open that replaces a missing one, which also writes
/// its first superblock. If that run ended before its first checkpoint, the device holds the newest
/// generation under a name the catalog does not know: it joins again.
fn check_members(pool: &Pool, catalog: &mut Catalog, newest: u64) -> Result<Vec<usize>> {
    let mut joined = Vec::new();
    for member in pool.members.iter().filter(|member| member.in_service()) {
        let uuid = Uuid::from_bytes(member.uuid);
        let Some(named) = catalog.members.iter_mut().find(|record| record.index == member.index)
        else {
            return Err(Error::new(ErrorKind::Corrupt, "open pod")
                .context(format_args!("the catalog names no device at place {}", member.index)));
        };
        if named.uuid == uuid && member.generation > 0 {
            continue;
        }
        // A device that was missing at the first start is named by nobody yet, and keeps its data.
        if named.uuid.is_nil() && member.generation > 0 {
            named.uuid = uuid;
            continue;
        }
        if member.generation != 0 && member.generation != newest {
            return Err(Error::new(ErrorKind::InvalidRequest, "open pod").context(format_args!(
                "{} is not the device the pod has at place {}: it was replaced; detach it",
                member.name(),
                member.index
            )));
        }
        named.uuid = uuid;
        joined.push(member.index);
    }
    Ok(joined)
}

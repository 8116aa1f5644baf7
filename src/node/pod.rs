//! The pod of the node's directory: found and opened, or created.
//!
//! Creation can be cut short at any point. The record says so before anything else is written, and
//! says otherwise only once the pod and its first volume are durable; until then the next start
//! begins again with the very devices the record lists, which cannot hold anything yet.

use std::fs;
use std::io;
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::config::Config;
use super::config::DEVICE_BYTES_MIN;
use super::config::PodConfig;
use super::directory::DeviceRecord;
use super::directory::Directory;
use super::directory::Record;
use super::directory::State;
use super::directory::wrap;
use super::rehearsal::rehearse;
use crate::device::DeviceRef;
use crate::device::file::FileDevice;
use crate::device::file::OpenMode;
use crate::env::EnvRef;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::format::superblock::JOURNAL_OFFSET;
use crate::observe::event;
use crate::units::IO_ALIGN;
use crate::units::format_size;
use crate::volume::pod::FormatOptions;
use crate::volume::pod::OpenOptions;
use crate::volume::pod::Pod;
use crate::volume::pod::VolumeSpec;

/// Length of a device file if nothing is said and there is room.
const DEVICE_BYTES_DEFAULT: u64 = 4 << 30;
/// What must be zero for a device to be blank: any partition table, file system or pod shows here.
const BLANK_BYTES: u64 = 1 << 20;
/// How long a killed node's writes may take to end. Arbitrary: longer than a healthy disk needs.
const RELEASE_TIME_MAX: Duration = Duration::from_secs(5);
/// How often to look whether they have.
const RELEASE_POLL: Duration = Duration::from_millis(20);
/// Journal on each device, by its length, if nothing is said.
const JOURNAL_SHARE: u64 = 32;
/// Journal on devices whose length is not ours to choose.
const JOURNAL_BYTES_DEFAULT: u64 = 256 << 20;
/// Longest journal that is chosen by length. A start after a crash reads the journals of all
/// devices, and these may share one disk.
const JOURNAL_BYTES_MAX: u64 = 64 << 20;

/// Opens the directory's pod, or creates it at the first start.
///
/// Runs on the thread the pod is to live on.
pub(super) async fn open_or_create(
    env: EnvRef,
    directory: Arc<Directory>,
    config: Config,
) -> Result<Arc<Pod>> {
    match directory.record()? {
        Some(record) if record.state == State::Created => {
            open_known(env, &directory, &config, record).await
        }
        None if holds_something(&config.pod.devices)? => adopt(env, &directory, &config).await,
        unfinished => {
            if unfinished.is_some() {
                let directory = directory.path().display();
                tracing::warn!(%directory, "creating the pod was cut short; beginning again");
            }
            create(env, &directory, &config, unfinished).await
        }
    }
}

/// Opens a pod that the record knows.
async fn open_known(
    env: EnvRef,
    directory: &Directory,
    config: &Config,
    record: Record,
) -> Result<Arc<Pod>> {
    check_agreement(&config.pod, &record)?;
    let paths: Vec<PathBuf> = if config.pod.devices_given {
        config.pod.devices.clone()
    } else {
        record.devices.iter().map(|device| directory.resolved(&device.path)).collect()
    };
    if config.replace_missing {
        create_replacements(&paths, &record)?;
    }
    let pod = open(env, &paths, config).await?;
    let found = pod.status().uuid;
    match record.uuid {
        Some(expected) if expected != found => {
            pod.close().await?;
            let context = format!(
                "the devices hold pod {found}, but {} belongs to pod {expected}",
                directory.path().display()
            );
            Err(Error::new(ErrorKind::InvalidRequest, "open pod").context(context))
        }
        _ => Ok(pod),
    }
}

/// Makes new, blank files for those that are gone, where the node made the first ones.
fn create_replacements(paths: &[PathBuf], record: &Record) -> Result<()> {
    for (path, device) in paths.iter().zip(&record.devices) {
        if let Some(bytes) = device.created_bytes
            && !path.exists()
        {
            create_device(path, bytes, record.journal_bytes)?;
            tracing::info!(device = %path.display(), "device file created to replace a missing one");
        }
    }
    Ok(())
}

/// Opens a pod of which the directory has no record: its devices were brought from elsewhere.
async fn adopt(env: EnvRef, directory: &Directory, config: &Config) -> Result<Arc<Pod>> {
    let advise = |error: Error| {
        if error.kind() == ErrorKind::Busy {
            return error;
        }
        error.context(format!(
            "{} has no pod yet, and the devices are not blank, so they were left alone: list the \
             devices of one pod, or wipe them (wipefs, blkdiscard) to create a new one",
            directory.path().display()
        ))
    };
    let pod = open(env, &config.pod.devices, config).await.map_err(advise)?;
    let status = pod.status();
    let devices = config
        .pod
        .devices
        .iter()
        .map(|path| Ok(DeviceRecord { path: directory.recorded(path)?, created_bytes: None }));
    let geometry = (status.data_strips, status.parity_strips);
    let journal_bytes = config.pod.journal_bytes.unwrap_or(0);
    let mut record =
        Record::new(State::Created, geometry, journal_bytes, devices.collect::<Result<_>>()?);
    record.uuid = Some(status.uuid);
    check_agreement(&config.pod, &record)?;
    directory.write_record(&record)?;
    tracing::info!(pod = %status.uuid, "pod adopted");
    Ok(pod)
}

/// Creates a pod, and opens it.
async fn create(
    env: EnvRef,
    directory: &Directory,
    config: &Config,
    unfinished: Option<Record>,
) -> Result<Arc<Pod>> {
    let plan = plan(directory, &config.pod, unfinished.as_ref())?;
    let options = FormatOptions {
        data_strips: plan.data_strips,
        parity_strips: plan.parity_strips,
        journal_bytes: plan.journal_bytes,
    };
    let planned = open_existing(directory, &plan)?;
    check_room(&env, &planned, &options).await?;
    directory.write_record(&plan)?;

    let mut devices: Vec<DeviceRef> = Vec::with_capacity(planned.len());
    for (device, planned) in plan.devices.iter().zip(planned) {
        devices.push(match planned {
            Planned::There(device) => device,
            Planned::New(bytes) => {
                create_device(&directory.resolved(&device.path), bytes, plan.journal_bytes)?
            }
        });
    }
    let uuid = Pod::format(&env, &devices, &options).await?;
    let devices = devices.into_iter().map(Some).collect();
    let pod = Pod::open(env, devices, open_options(config)).await?;
    if let Some(first) = &config.pod.first_volume {
        let (name, size_bytes) = (first.name.clone(), first.size_bytes);
        let spec = VolumeSpec {
            name,
            size_bytes,
            logical_block_bytes: 512,
            read_only: false,
            write_cache: false,
        };
        pod.create_volume(spec).await?;
    }
    let mut record = plan;
    (record.state, record.uuid) = (State::Created, Some(uuid));
    directory.write_record(&record)?;
    tracing::info!(pod = %uuid, directory = %directory.path().display(), "pod created");
    Ok(pod)
}

/// A device of a pod that is to be created.
enum Planned {
    There(DeviceRef),
    /// A file of this length.
    New(u64),
}

/// Opens those devices of a new pod that are there.
fn open_existing(directory: &Directory, plan: &Record) -> Result<Vec<Planned>> {
    let open = |device: &DeviceRecord| -> Result<Planned> {
        if let Some(bytes) = device.created_bytes {
            return Ok(Planned::New(bytes));
        }
        let path = directory.resolved(&device.path);
        Ok(Planned::There(Arc::new(FileDevice::open(path, OpenMode::ReadWrite)?)))
    };
    plan.devices.iter().map(open).collect()
}

/// Refuses devices that are too short for the journal, and for data beside it.
async fn check_room(env: &EnvRef, planned: &[Planned], options: &FormatOptions) -> Result<()> {
    let length = |planned: &Planned| match planned {
        Planned::There(device) => device.len_bytes(),
        Planned::New(bytes) => *bytes,
    };
    let lengths: Vec<u64> = planned.iter().map(length).collect();
    rehearse(env, &lengths, options).await.map_err(|error| {
        error.context(format!(
            "{} devices, {} + {} strips, a journal of {} on each device: take longer devices \
             (pod.device_size, where they are files) or a shorter journal (pod.journal_size)",
            lengths.len(),
            options.data_strips,
            options.parity_strips,
            format_size(options.journal_bytes)
        ))
    })
}

/// Decides what a new pod is made of, having changed nothing but files of a creation cut short.
fn plan(directory: &Directory, config: &PodConfig, unfinished: Option<&Record>) -> Result<Record> {
    const OP: &str = "create pod";
    let mut devices = Vec::with_capacity(config.devices.len());
    for path in &config.devices {
        let recorded = directory.recorded(path)?;
        let begun = unfinished
            .and_then(|record| record.devices.iter().find(|device| device.path == recorded));
        if begun.is_some_and(|device| device.created_bytes.is_some()) {
            remove_if_there(path)?;
        } else if begun.is_none() && !is_blank(path)? {
            let context = format!("{} is not blank", path.display());
            return Err(Error::new(ErrorKind::Exists, OP).context(context));
        }
        devices.push(DeviceRecord { path: recorded, created_bytes: None });
    }
    if !config.devices_given {
        let path = directory.path().join("devices");
        fs::create_dir_all(&path).map_err(|error| wrap(OP, &path, error))?;
    }

    if let Some(path) = config.devices.iter().find(|path| is_device_node(path) && !path.exists()) {
        let context = format!("there is no {}", path.display());
        return Err(Error::new(ErrorKind::NotFound, OP).context(context));
    }
    let missing: Vec<&PathBuf> = config.devices.iter().filter(|path| !path.exists()).collect();
    let device_bytes = match config.device_bytes {
        Some(bytes) => bytes,
        None if missing.is_empty() => 0,
        None => default_device_bytes(&missing)?,
    };
    for (path, device) in config.devices.iter().zip(&mut devices) {
        device.created_bytes = (!path.exists()).then_some(device_bytes);
    }
    let by_length = device_bytes / JOURNAL_SHARE / IO_ALIGN * IO_ALIGN;
    let journal_bytes = match config.journal_bytes {
        Some(bytes) => bytes,
        None if missing.is_empty() => JOURNAL_BYTES_DEFAULT,
        None => by_length.clamp(8 << 20, JOURNAL_BYTES_MAX),
    };
    let geometry = (config.data_strips, config.parity_strips);
    Ok(Record::new(State::Creating, geometry, journal_bytes, devices))
}

/// Whether a path can only be a device node: nobody means to create a file there. /dev/shm is a
/// file system like any other.
fn is_device_node(path: &Path) -> bool {
    path.starts_with("/dev") && !path.starts_with("/dev/shm")
}

/// The length of each device file such that all of them take at most half of the free space.
fn default_device_bytes(files: &[&PathBuf]) -> Result<u64> {
    const OP: &str = "choose the size of device files";
    let count = u64::try_from(files.len()).expect("a few");
    let mut free = u64::MAX;
    for file in files {
        let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        let system = rustix::fs::statvfs(parent)
            .map_err(|error| wrap(OP, parent, io::Error::from(error)))?;
        free = free.min(system.f_bavail.saturating_mul(system.f_frsize));
    }
    let each = (free / 2 / count).min(DEVICE_BYTES_DEFAULT);
    let each = each >> 20 << 20;
    if each < DEVICE_BYTES_MIN {
        return Err(Error::new(ErrorKind::DeviceFull, OP).context(format!(
            "{} are free, and {count} devices of at least {} that take no more than half of it \
             need {}: free some, choose another place with --data, or set pod.device_size",
            format_size(free),
            format_size(DEVICE_BYTES_MIN),
            format_size(2 * count * DEVICE_BYTES_MIN)
        )));
    }
    Ok(each)
}

/// Creates the file of a device that is not there yet.
fn create_device(path: &Path, bytes: u64, journal_bytes: u64) -> Result<DeviceRef> {
    // The journal and what lies before it must never meet a full file system.
    let prefix = JOURNAL_OFFSET + journal_bytes;
    Ok(Arc::new(FileDevice::create(path, bytes, prefix)?))
}

async fn open(env: EnvRef, paths: &[PathBuf], config: &Config) -> Result<Arc<Pod>> {
    let mut devices: Vec<Option<DeviceRef>> = Vec::with_capacity(paths.len());
    for path in paths {
        match open_device(&env, path).await {
            Ok(device) => devices.push(Some(Arc::new(device))),
            // Another node has it: never go on without it.
            Err(error) if error.kind() == ErrorKind::Busy => return Err(error),
            Err(error) => {
                let device = path.display();
                tracing::warn!(%device, error = error.chain(), "device not available");
                devices.push(None);
            }
        }
    }
    let pod = Pod::open(env, devices, open_options(config)).await.map_err(advise_force)?;
    tell_if_forced(&pod);
    Ok(pod)
}

/// What to do about a pod of which too many devices are missing.
fn advise_force(error: Error) -> Error {
    if error.kind() != ErrorKind::DeviceFailed {
        return error;
    }
    error.context(
        "if they are lost for good, --force-open may let some of it be read; what was acknowledged \
         last may then be missing or old without a sign of it, for good: see weft --help",
    )
}

/// Says loudly that the pod is open with fewer devices than it can be sure of anything with.
fn tell_if_forced(pod: &Pod) {
    let status = pod.status();
    let count = status.devices.len();
    let present = status.devices.iter().filter(|device| device.state != "missing").count();
    let needed = count - status.parity_strips.min((count - 1) / 2);
    if present < needed {
        let message =
            format_args!("opened by force with {present} of {count} devices, {needed} are needed");
        event::raise(event::POD_FORCED, "pod", message);
    }
}

/// Opens a device, waiting a little for another holder to let go: the kernel may still be finishing
/// the writes of a node that was killed a moment ago.
async fn open_device(env: &EnvRef, path: &Path) -> Result<FileDevice> {
    let deadline = env.now() + RELEASE_TIME_MAX;
    loop {
        match FileDevice::open(path, OpenMode::ReadWrite) {
            Err(error) if error.kind() == ErrorKind::Busy && env.now() < deadline => {
                env.sleep(RELEASE_POLL).await;
            }
            result => return result,
        }
    }
}

fn open_options(config: &Config) -> OpenOptions {
    OpenOptions {
        cache_bytes: config.cache_bytes,
        map_cache_bytes: config.map_cache_bytes,
        force: config.force_open,
        replace_missing: config.replace_missing,
    }
}

/// Refuses a configuration that contradicts what the pod was created as.
fn check_agreement(config: &PodConfig, record: &Record) -> Result<()> {
    let refused = |key: &str, said: String, has: String| {
        Err(Error::new(ErrorKind::InvalidRequest, "open pod").context(format!(
            "{key} is set to {said}, but the pod was created with {has}, and that is fixed at \
             creation: leave the key out, or choose another data_dir for a new pod"
        )))
    };
    let said = (config.data_strips, config.parity_strips);
    let has = (record.data_strips, record.parity_strips);
    if config.geometry_given && said != has {
        return refused(
            "the geometry (pod.data_strips + pod.parity_strips)",
            format!("{} + {}", said.0, said.1),
            format!("{} + {}", has.0, has.1),
        );
    }
    let created = record.devices.iter().find_map(|device| device.created_bytes);
    for (key, said, has) in [
        (
            "pod.journal_size",
            config.journal_bytes,
            Some(record.journal_bytes).filter(|bytes| *bytes > 0),
        ),
        ("pod.device_size", config.device_bytes, created),
    ] {
        if let (Some(said), Some(has)) = (said, has)
            && said != has
        {
            return refused(key, format_size(said), format_size(has));
        }
    }
    if config.devices_given && config.devices.len() != record.devices.len() {
        let (said, has) = (config.devices.len(), record.devices.len());
        return refused("pod.devices", format!("{said} devices"), format!("{has}"));
    }
    Ok(())
}

/// Whether any of the devices is there and not blank.
fn holds_something(paths: &[PathBuf]) -> Result<bool> {
    for path in paths {
        if !is_blank(path)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether a device does not exist, or begins with zeroes only.
fn is_blank(path: &Path) -> Result<bool> {
    const OP: &str = "look at device";
    let found = match fs::metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(wrap(OP, path, error)),
    };
    if !found.is_file() && !found.file_type().is_block_device() {
        let context = format!("{} is neither a file nor a block device", path.display());
        return Err(Error::new(ErrorKind::InvalidRequest, OP).context(context));
    }
    let mut start = Vec::new();
    fs::OpenOptions::new()
        .read(true)
        .open(path)
        .and_then(|file| file.take(BLANK_BYTES).read_to_end(&mut start))
        .map_err(|error| wrap(OP, path, error))?;
    Ok(start.iter().all(|byte| *byte == 0))
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(wrap("remove device file of a creation cut short", path, error))
        }
        _ => Ok(()),
    }
}

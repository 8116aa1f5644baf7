//! The node's directory: its lock, and the record of the pod that belongs to it.
//!
//! ```text
//! DIR/weft.lock      held (flock) while a node runs; has its process id in it
//! DIR/pod.json       the record: see Record
//! DIR/devices/       device files of our own
//! DIR/weft.log       what a node with a console logs; weft.log.1: the same, before
//! DIR/weft.sock      management API        DIR/nbd.sock    NBD
//! ```
//!
//! The record is what tells a first start from a later one, a creation cut short from a pod, and a
//! pod whose disks are not mounted from no pod at all. It is replaced whole, never changed in
//! place, and holds nothing the devices' superblocks do not: they are the truth.

use std::fs;
use std::fs::OpenOptions;
use std::io;
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;

use rustix::fs::FlockOperation;
use serde::Deserialize;
use serde::Serialize;
use uuid::Uuid;

use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::observe::log_file::LogFile;

/// Version of the record's layout.
const RECORD_VERSION: u32 = 1;

/// What the directory's pod was created as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    version: u32,
    /// Whether the pod may hold anything yet.
    pub(super) state: State,
    /// The pod's identity; `None` while it is being created.
    pub(super) uuid: Option<Uuid>,
    /// k.
    pub(super) data_strips: usize,
    /// m.
    pub(super) parity_strips: usize,
    /// Journal ring on each device; 0: not known, the pod was created elsewhere.
    pub(super) journal_bytes: u64,
    /// In order of index.
    pub(super) devices: Vec<DeviceRecord>,
}

/// How far a pod's creation came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum State {
    /// Begun. Nothing was served yet, so the devices listed may be formatted again.
    Creating,
    /// Done. The devices are never formatted again.
    Created,
}

/// A device of the pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DeviceRecord {
    /// Absolute, or relative to the node's directory if it lies in there.
    pub(super) path: PathBuf,
    /// The file's length if the node created it; `None` for what was there before.
    pub(super) created_bytes: Option<u64>,
}

impl Record {
    pub(super) fn new(
        state: State,
        (data_strips, parity_strips): (usize, usize),
        journal_bytes: u64,
        devices: Vec<DeviceRecord>,
    ) -> Self {
        let (version, uuid) = (RECORD_VERSION, None);
        Self { version, state, uuid, data_strips, parity_strips, journal_bytes, devices }
    }
}

/// The directory, held by this node alone until it is dropped.
pub(super) struct Directory {
    path: PathBuf,
    _lock: fs::File,
}

/// Opens the log file of a node's directory, which is created if there is none, to add to it.
///
/// # Errors
/// Whatever the file system says.
pub(super) fn open_log(directory: &Path) -> Result<LogFile> {
    const OP: &str = "open the log file";
    let path = directory.join("weft.log");
    let failed = |error| wrap(OP, &path, error);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
    LogFile::open(path.clone()).map_err(failed)
}

impl Directory {
    /// Creates the directory if there is none, and locks it.
    ///
    /// # Errors
    /// `Busy` if another node runs on it.
    pub(super) fn open(path: &Path) -> Result<Self> {
        const OP: &str = "open the node's directory";
        let failed = |error| wrap(OP, path, error);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
        let path = path.canonicalize().map_err(failed)?;
        let lock_path = path.join("weft.lock");
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let mut lock = options.open(&lock_path).map_err(|error| wrap(OP, &lock_path, error))?;
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            let holder = fs::read_to_string(&lock_path).unwrap_or_default();
            return Err(Error::new(ErrorKind::Busy, OP).context(format!(
                "another node, process {}, runs on {}: stop it, or choose another directory with \
                 --data",
                holder.trim(),
                path.display()
            )));
        }
        lock.set_len(0)
            .and_then(|()| writeln!(lock, "{}", std::process::id()))
            .map_err(|error| wrap(OP, &lock_path, error))?;
        Ok(Self { path, _lock: lock })
    }

    /// The directory, absolute.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The record, if a pod was ever begun here.
    ///
    /// # Errors
    /// `Corrupt` if it cannot be understood: it is never taken for "no pod".
    pub(super) fn record(&self) -> Result<Option<Record>> {
        const OP: &str = "read the pod's record";
        let path = self.record_path();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(wrap(OP, &path, error)),
        };
        let unreadable = || {
            Error::new(ErrorKind::Corrupt, OP).context(format!(
                "{} is damaged or of another version; if the devices are well, move it away and \
                 start with the devices listed in the configuration",
                path.display()
            ))
        };
        let record: Record =
            serde_json::from_str(&text).map_err(|error| unreadable().source(error))?;
        if record.version != RECORD_VERSION {
            return Err(unreadable());
        }
        Ok(Some(record))
    }

    /// Replaces the record.
    ///
    /// # Durability
    /// The new record has survived power loss when this returns; before, the old one is whole.
    pub(super) fn write_record(&self, record: &Record) -> Result<()> {
        const OP: &str = "write the pod's record";
        let path = self.record_path();
        let text = serde_json::to_string_pretty(record).expect("our own types always encode");
        let draft = path.with_extension("json.new");
        let write = || -> io::Result<()> {
            let mut options = OpenOptions::new();
            let mut file =
                options.write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
            writeln!(file, "{text}")?;
            file.sync_all()?;
            fs::rename(&draft, &path)?;
            OpenOptions::new().read(true).open(&self.path)?.sync_all()
        };
        write().map_err(|error| wrap(OP, &path, error))
    }

    /// `path` as the record keeps it: relative if it lies in the directory, which may be moved.
    pub(super) fn recorded(&self, path: &Path) -> Result<PathBuf> {
        let absolute = std::path::absolute(path)
            .map_err(|error| wrap("find the path of a device", path, error))?;
        let inside = absolute.strip_prefix(&self.path).map(Path::to_owned);
        Ok(inside.unwrap_or(absolute))
    }

    /// The path of a device that the record keeps as `recorded`.
    pub(super) fn resolved(&self, recorded: &Path) -> PathBuf {
        self.path.join(recorded)
    }

    fn record_path(&self) -> PathBuf {
        self.path.join("pod.json")
    }
}

/// An error of the operating system on a file of the node's.
pub(super) fn wrap(op: &'static str, path: &Path, error: io::Error) -> Error {
    let kind = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::DeviceFull,
        io::ErrorKind::NotFound => ErrorKind::NotFound,
        _ => ErrorKind::DeviceFailed,
    };
    Error::new(kind, op).context(path.display()).source(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("weft-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        path
    }

    #[test]
    fn a_second_node_is_refused_until_the_first_is_gone() {
        let path = scratch("lock");
        let first = Directory::open(&path).expect("free");
        let refused = Directory::open(&path).err().expect("taken");
        assert_eq!(refused.kind(), ErrorKind::Busy);
        assert!(refused.chain().contains(&std::process::id().to_string()), "{refused}");
        drop(first);
        Directory::open(&path).expect("free again");
        fs::remove_dir_all(&path).expect("removed");
    }

    #[test]
    fn the_record_reads_back_and_damage_is_not_absence() {
        let path = scratch("record");
        let directory = Directory::open(&path).expect("free");
        assert_eq!(directory.record().expect("readable"), None);

        let inside = directory.path().join("devices/dev-0.img");
        let device = DeviceRecord {
            path: directory.recorded(&inside).expect("a path"),
            created_bytes: Some(4096),
        };
        assert_eq!(device.path, Path::new("devices/dev-0.img"));
        assert_eq!(directory.resolved(&device.path), inside);
        let record = Record::new(State::Creating, (4, 2), 1 << 20, vec![device]);
        directory.write_record(&record).expect("written");
        assert_eq!(directory.record().expect("readable"), Some(record));

        fs::write(directory.record_path(), "{").expect("written");
        assert_eq!(directory.record().expect_err("damaged").kind(), ErrorKind::Corrupt);
        fs::remove_dir_all(&path).expect("removed");
    }
}

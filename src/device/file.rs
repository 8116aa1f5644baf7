//! Local files and block devices, through io_uring with O_DIRECT.
//!
//! [`FileDevice::open`] takes an exclusive `flock` on the very descriptor used for I/O: the kernel
//! keeps the descriptor, and so the lock, until the last I/O of a killed process is over, and the
//! next opener can be sure that nothing of it is still to land.
//!
//! Durable writes carry RWF_DSYNC; a flush is fdatasync. A file system that refuses O_DIRECT (tmpfs
//! before Linux 6.6) is used through the page cache, with the same durability and a warning.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use rustix::fs::FallocateFlags;
use rustix::fs::FileType;
use rustix::fs::FlockOperation;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::device::AlignedBuf;
use crate::device::Device;
use crate::device::Durability;
use crate::device::buffer;
use crate::device::uring;
use crate::device::uring::Work;
use crate::env::LocalBoxFuture;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::units::IO_ALIGN;
use crate::units::SECTOR_BYTES;
use crate::units::bytes_u64;
use crate::units::bytes_usize;
use crate::units::format_size;

/// Who else may have the device open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// Nobody: the lock is exclusive.
    ReadWrite,
    /// Other readers. Writes fail.
    ReadOnly,
}

/// A file or a block device.
///
/// All I/O must be started inside a tokio `LocalSet` of a runtime with I/O and time enabled.
pub struct FileDevice {
    name: Arc<str>,
    file: Arc<OwnedFd>,
    len_bytes: u64,
    sector_bytes: u64,
    direct: bool,
}

impl FileDevice {
    /// Opens and locks an existing file or block device.
    ///
    /// # Errors
    /// * `NotFound`: no such path.
    /// * `Busy`: somebody else has it open, or it is mounted.
    /// * `InvalidRequest`: it is neither file nor block device, or its length is no multiple of
    ///   4096.
    pub fn open(path: impl AsRef<Path>, mode: OpenMode) -> Result<Self> {
        let path = path.as_ref();
        let kind = rustix::fs::stat(path)
            .map(|stat| FileType::from_raw_mode(stat.st_mode))
            .map_err(|errno| open_error(errno, path))?;
        let mut flags = match mode {
            OpenMode::ReadWrite => OFlags::RDWR | OFlags::CLOEXEC,
            OpenMode::ReadOnly => OFlags::RDONLY | OFlags::CLOEXEC,
        };
        match kind {
            FileType::RegularFile => {}
            // Without O_CREAT this asks the kernel to refuse a device that is mounted.
            FileType::BlockDevice if mode == OpenMode::ReadWrite => flags |= OFlags::EXCL,
            FileType::BlockDevice => {}
            _ => {
                return Err(Error::new(ErrorKind::InvalidRequest, "open device")
                    .context(path.display())
                    .context("it is neither a regular file nor a block device"));
            }
        }
        let (file, direct) = open_direct(path, flags)?;
        lock(&file, mode, path)?;
        let errno = |errno| open_error(errno, path);
        let len_bytes = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(errno)?;
        if !len_bytes.is_multiple_of(IO_ALIGN) {
            return Err(Error::new(ErrorKind::InvalidRequest, "open device")
                .context(path.display())
                .context(format!("its length, {len_bytes} bytes, is no multiple of 4096")));
        }
        let sector_bytes = match kind {
            FileType::BlockDevice => u64::from(rustix::fs::ioctl_blksszget(&file).map_err(errno)?),
            // What every disk below a file system writes atomically.
            _ => SECTOR_BYTES,
        };
        let name = path.display().to_string().into();
        Ok(Self { name, file: Arc::new(file), len_bytes, sector_bytes, direct })
    }

    /// Creates a sparse file of `len_bytes` and opens it.
    ///
    /// The first `preallocate_bytes` get their room on the disk now, so that writing there can
    /// never fail for want of it. They are written with zeroes: a durable write to room that was
    /// merely promised also has to wait for the file system to record that it holds data now.
    ///
    /// # Durability
    /// The file, its length and its name survive power loss when this returns.
    ///
    /// # Errors
    /// `Exists`, `DeviceFull`, or as [`FileDevice::open`]; nothing is left behind.
    pub fn create(path: impl AsRef<Path>, len_bytes: u64, preallocate_bytes: u64) -> Result<Self> {
        let path = path.as_ref();
        assert!(preallocate_bytes <= len_bytes, "the preallocated prefix is part of the file");
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::CREATE | OFlags::EXCL;
        let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|errno| open_error(errno, path))?;
        let made = lay_out(&file, path, len_bytes, preallocate_bytes);
        drop(file);
        made.and_then(|()| Self::open(path, OpenMode::ReadWrite)).inspect_err(|_| {
            // It is ours and useless; the error that matters is the first one.
            let _ = fs::remove_file(path);
        })
    }

    /// Whether the kernel transfers straight from our memory, past the page cache.
    #[must_use]
    pub fn direct(&self) -> bool {
        self.direct
    }

    fn run<T: 'static>(
        &self,
        op: &'static str,
        offset: u64,
        length: u64,
        work: Work,
        finish: impl FnOnce(Option<AlignedBuf>) -> T + 'static,
    ) -> LocalBoxFuture<Result<T>> {
        assert!(
            offset.is_multiple_of(self.sector_bytes) && length.is_multiple_of(self.sector_bytes),
            "{op} at {offset}, {length} bytes: not whole sectors"
        );
        let name = self.name.clone();
        let place = move || format!("{name}, {} at {offset}", format_size(length));
        if offset.checked_add(length).is_none_or(|end| end > self.len_bytes) {
            let error = Error::new(ErrorKind::OutOfRange, op).context(place());
            return Box::pin(std::future::ready(Err(error)));
        }
        let started = uring::start(self.file.clone(), offset, work);
        Box::pin(async move {
            let outcome = match started {
                Ok(receiver) => receiver.await.unwrap_or_else(|_| {
                    Err(io::Error::other("the thread that started the I/O is gone"))
                }),
                Err(error) => {
                    let error = Error::new(ErrorKind::Unsupported, "set up io_uring").source(error);
                    return Err(error.context(
                        "needs Linux 5.11 or later, sysctl kernel.io_uring_disabled=0, and a \
                         container profile that allows io_uring",
                    ));
                }
            };
            outcome
                .map(finish)
                .map_err(|error| Error::new(kind_of(&error), op).context(place()).source(error))
        })
    }
}

impl Device for FileDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn sector_bytes(&self) -> u64 {
        self.sector_bytes
    }

    fn read(&self, offset: u64, buf: AlignedBuf) -> LocalBoxFuture<Result<AlignedBuf>> {
        let length = bytes_u64(buf.len());
        self.run("read device", offset, length, Work::Read(buf), |buf| {
            buf.expect("a read gives its buffer back")
        })
    }

    fn write(
        &self,
        offset: u64,
        data: Bytes,
        durability: Durability,
    ) -> LocalBoxFuture<Result<()>> {
        let length = bytes_u64(data.len());
        let data = match buffer::is_aligned(&data) {
            true => data,
            false => AlignedBuf::padded(&data, data.len()).freeze(),
        };
        let work = Work::Write { data, durable: durability == Durability::Durable };
        self.run("write device", offset, length, work, |_| ())
    }

    fn flush(&self) -> LocalBoxFuture<Result<()>> {
        self.run("flush device", 0, 0, Work::Flush, |_| ())
    }

    fn discard(&self, offset: u64, length: u64) -> LocalBoxFuture<Result<()>> {
        let discard =
            self.run("discard on device", offset, length, Work::Discard { length }, |_| ());
        Box::pin(async move {
            // A hint: what cannot discard keeps the bytes.
            discard.await.or_else(|error| match error.kind() {
                ErrorKind::Unsupported => Ok(()),
                _ => Err(error),
            })
        })
    }

    fn reserve(&self, offset: u64, length: u64) -> Result<()> {
        allocate(&self.file, offset, length).map_err(|errno| {
            let error = io::Error::from(errno);
            Error::new(kind_of(&error), "reserve room on device").context(&self.name).source(error)
        })
    }

    /// A deleted file takes I/O as before, but all of it is gone once the file is closed.
    fn lost(&self) -> Option<&'static str> {
        let Ok(stat) = rustix::fs::fstat(&self.file) else {
            return Some("its file cannot be looked at any more");
        };
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return None;
        }
        let length = u64::try_from(stat.st_size).unwrap_or(0);
        match (stat.st_nlink, length) {
            (0, _) => Some("the file was deleted"),
            (_, length) if length < self.len_bytes => Some("the file was truncated"),
            _ => None,
        }
    }
}

/// Opens past the page cache if the file system can.
fn open_direct(path: &Path, flags: OFlags) -> Result<(OwnedFd, bool)> {
    match rustix::fs::open(path, flags | OFlags::DIRECT, Mode::empty()) {
        Ok(file) => Ok((file, true)),
        Err(Errno::INVAL) => {
            let file = rustix::fs::open(path, flags, Mode::empty());
            let file = file.map_err(|errno| open_error(errno, path))?;
            tracing::warn!(device = %path.display(), "file system refuses O_DIRECT: page cache used");
            Ok((file, false))
        }
        Err(errno) => Err(open_error(errno, path)),
    }
}

fn lock(file: &OwnedFd, mode: OpenMode, path: &Path) -> Result<()> {
    let operation = match mode {
        OpenMode::ReadWrite => FlockOperation::NonBlockingLockExclusive,
        OpenMode::ReadOnly => FlockOperation::NonBlockingLockShared,
    };
    rustix::fs::flock(file, operation).map_err(|errno| {
        if errno != Errno::WOULDBLOCK {
            return open_error(errno, path);
        }
        let holder = match lock_holder(file) {
            Some(pid) if pid == std::process::id().to_string() => {
                "it is open already: two of the devices are this one file".to_string()
            }
            Some(pid) => format!("process {pid} uses it: stop that one first"),
            None => "another process uses it: stop that one first".to_string(),
        };
        Error::new(ErrorKind::Busy, "lock device").context(path.display()).context(holder)
    })
}

/// The process that holds the lock, if the kernel tells.
fn lock_holder(file: &OwnedFd) -> Option<String> {
    let stat = rustix::fs::fstat(file).ok()?;
    let (major, minor) = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    let inode = format!("{major:02x}:{minor:02x}:{}", stat.st_ino);
    // Each line: number, "FLOCK", "ADVISORY", access, pid, major:minor:inode, start, end.
    let locks = fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        let held = words.next() == Some("FLOCK");
        let pid = words.nth(2)?;
        (held && words.next() == Some(&inode)).then(|| pid.to_string())
    })
}

/// Gives a new file its length and its preallocated prefix, durably.
fn lay_out(file: &OwnedFd, path: &Path, len_bytes: u64, preallocate_bytes: u64) -> Result<()> {
    let failed = |errno: Errno| {
        let error = io::Error::from(errno);
        Error::new(kind_of(&error), "create device").context(path.display()).source(error)
    };
    rustix::fs::ftruncate(file, len_bytes).map_err(failed)?;
    if preallocate_bytes > 0 {
        allocate(file, 0, preallocate_bytes).map_err(failed)?;
        write_zeroes(file, preallocate_bytes).map_err(failed)?;
    }
    rustix::fs::fsync(file).map_err(failed)?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(parent, flags, Mode::empty()).map_err(failed)?;
    rustix::fs::fsync(directory.as_fd()).map_err(failed)
}

/// Gives a range of a file its room; block devices have it.
fn allocate(file: &OwnedFd, offset: u64, length: u64) -> rustix::io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, offset, length) {
        // Or this file system cannot promise any.
        Err(Errno::OPNOTSUPP) => Ok(()),
        outcome => outcome,
    }
}

/// Writes zeroes over the first `length` bytes.
fn write_zeroes(file: &OwnedFd, length: u64) -> rustix::io::Result<()> {
    let zeroes = vec![0; 1 << 20];
    let mut at = 0;
    while at < length {
        let step = bytes_u64(zeroes.len()).min(length - at);
        let part = &zeroes[..bytes_usize(step)];
        at += bytes_u64(rustix::io::retry_on_intr(|| rustix::io::pwrite(file, part, at))?);
    }
    Ok(())
}

fn open_error(errno: Errno, path: &Path) -> Error {
    let (kind, advice) = match errno {
        Errno::NOENT => (ErrorKind::NotFound, "no such file or device"),
        Errno::EXIST => (ErrorKind::Exists, "remove it first if it is not needed"),
        Errno::BUSY => (ErrorKind::Busy, "it is mounted or in use by the kernel"),
        Errno::ACCESS | Errno::PERM => {
            (ErrorKind::DeviceFailed, "this user may not open it for writing")
        }
        Errno::NOSPC | Errno::DQUOT => (ErrorKind::DeviceFull, "no room in the file system"),
        _ => (ErrorKind::DeviceFailed, ""),
    };
    let error = Error::new(kind, "open device").context(path.display());
    let error = if advice.is_empty() { error } else { error.context(advice) };
    error.source(io::Error::from(errno))
}

/// What an error of a started I/O means to callers.
fn kind_of(error: &io::Error) -> ErrorKind {
    match Errno::from_io_error(error) {
        Some(Errno::NXIO | Errno::NODEV | Errno::STALE | Errno::BADF) => ErrorKind::DeviceFailed,
        Some(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => ErrorKind::DeviceFull,
        Some(Errno::OPNOTSUPP | Errno::NOSYS) => ErrorKind::Unsupported,
        // A file cut short keeps failing there.
        None if error.kind() == io::ErrorKind::UnexpectedEof => ErrorKind::DeviceFailed,
        _ => ErrorKind::DeviceTransient,
    }
}

#[cfg(test)]
mod tests;

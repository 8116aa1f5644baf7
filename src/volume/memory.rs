//! A volume in plain RAM: the peer of benches and the back end of protocol tests and fuzzers.
//!
//! [`MemoryVolume`] keeps what was written as 4096-byte pages in regions of 2 MiB; what was never
//! written costs nothing, so a 64 TiB volume is free. Nothing here survives the process: it is
//! "durable" only in that RAM has no device below it.
//!
//! # Invariants
//! * One short lock guards pages and sizes, so every request is atomic to every other.
//! * A page that is present holds data. A page that is absent reads as zero, and is *allocated*
//!   if and only if it lies in `kept`.
//!
//! Tests reach branches that RAM never takes by [`MemoryVolume::fail_with`] (every request
//! fails), [`MemoryVolume::set_misses`] (no read is answered from RAM) and
//! [`MemoryVolume::hold`] (futures wait until released).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use bytes::BytesMut;
use parking_lot::Mutex;
use parking_lot::RwLock;
use tokio::sync::watch;
use uuid::Uuid;

use crate::env::LocalBoxFuture;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::observe::requests::Requests;
use crate::secret::HostKeys;
use crate::secret::tls_key::TlsKey;
use crate::units::BLOCK_BYTES;
use crate::units::BLOCK_BYTES_U64;
use crate::units::bytes_u64;
use crate::units::bytes_usize;
use crate::units::round_up;
use crate::volume::Extent;
use crate::volume::Piece;
use crate::volume::Volume;
use crate::volume::VolumeDirectory;
use crate::volume::VolumeRef;
use crate::volume::ZeroMode;
use crate::volume::pieces_equal;
use crate::volume::reservation::Access;
use crate::volume::reservation::CurrentReservations;
use crate::volume::reservation::Reservations;

/// Pages in a region: 2 MiB, so that 1 GiB is 512 regions and lookups stay in the CPU cache.
const REGION_PAGES: u64 = 512;
/// Largest write that is all-or-nothing; all are, here. The pod's default (design.md, section 1).
const ATOMIC_WRITE_BYTES: u32 = 64 * 1024;

/// A volume in RAM. A clone is the same volume.
#[derive(Clone)]
pub struct MemoryVolume {
    name: String,
    id: u64,
    logical_block_bytes: u32,
    read_only: bool,
    /// Its changes count as unflushed.
    write_cache: bool,
    state: Arc<State>,
    /// Who uses it this way; `None` for whom reservations do not know.
    host: Option<Uuid>,
}

/// What all who use a volume see alike.
struct State {
    /// The NQN of the only host it is served to, if not to all.
    only_host: Mutex<Option<String>>,
    requests: Arc<Requests>,
    closed: AtomicBool,
    /// If set, `try_read` always asks for the slow path.
    misses: AtomicBool,
    /// The kind every request fails with, if any.
    failure: Mutex<Option<ErrorKind>>,
    /// While true, futures wait before they do anything.
    held: watch::Sender<bool>,
    /// Changes since the last flush.
    unflushed: AtomicU64,
    /// Guards all content; held for one request's copying, never across an await. What changes
    /// content or reservations holds it for writing.
    content: RwLock<Content>,
    reservations: CurrentReservations,
}

type Region = Box<[Option<Bytes>]>;

struct Content {
    size_bytes: u64,
    /// Region index to its pages. Each page is exactly [`BLOCK_BYTES`] long.
    regions: BTreeMap<u64, Region>,
    /// Page runs, start to end, that are allocated although they hold no data. Disjoint.
    kept: BTreeMap<u64, u64>,
}

impl MemoryVolume {
    /// A writable volume of `size_bytes`, rounded up to a multiple of 4096.
    #[must_use]
    pub fn new(name: &str, size_bytes: u64) -> Self {
        let content = Content {
            size_bytes: round_up(size_bytes, BLOCK_BYTES_U64),
            regions: BTreeMap::new(),
            kept: BTreeMap::new(),
        };
        let state = State {
            requests: Arc::default(),
            only_host: Mutex::new(None),
            closed: AtomicBool::new(false),
            misses: AtomicBool::new(false),
            failure: Mutex::new(None),
            held: watch::Sender::new(false),
            unflushed: AtomicU64::new(0),
            content: RwLock::new(content),
            reservations: CurrentReservations::default(),
        };
        Self {
            name: name.to_owned(),
            id: 1,
            logical_block_bytes: 512,
            read_only: false,
            write_cache: false,
            state: Arc::new(state),
            host: None,
        }
    }

    /// The same with another number and with logical blocks of another length.
    #[must_use]
    pub fn with_identity(mut self, id: u64, logical_block_bytes: u32) -> Self {
        self.id = id;
        self.logical_block_bytes = logical_block_bytes;
        self
    }

    /// The same, refusing writes.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// The same, saying that what it completed is durable only once flushed.
    #[must_use]
    pub fn with_write_cache(mut self) -> Self {
        self.write_cache = true;
        self
    }

    /// Changes since the last flush that did not have to be durable.
    #[must_use]
    pub fn unflushed(&self) -> u64 {
        self.state.unflushed.load(Ordering::Acquire)
    }

    /// Serves it to that host only, or to all. Its directory has to be told:
    /// [`MemoryDirectory::announce`].
    pub fn serve_only(&self, nqn: Option<&str>) {
        *self.state.only_host.lock() = nqn.map(str::to_owned);
    }

    /// Fails every request from now on with `kind`, or none.
    pub fn fail_with(&self, kind: Option<ErrorKind>) {
        *self.state.failure.lock() = kind;
    }

    /// Makes every read take the slow path, as if nothing were cached.
    pub fn set_misses(&self, misses: bool) {
        self.state.misses.store(misses, Ordering::Relaxed);
    }

    /// Makes futures wait until called again with `false`.
    pub fn hold(&self, held: bool) {
        self.state.held.send_replace(held);
    }

    /// Ends the volume as if it had been deleted.
    pub fn close(&self) {
        self.state.closed.store(true, Ordering::Release);
    }

    /// Changes the size; what lies past a smaller one is lost.
    pub fn resize(&self, size_bytes: u64) {
        let mut content = self.state.content.write();
        let size_bytes = round_up(size_bytes, BLOCK_BYTES_U64);
        let end = content.size_bytes;
        if size_bytes < end {
            content.clear(size_bytes, end, ZeroMode::Deallocate);
        }
        content.size_bytes = size_bytes;
    }

    fn changed(&self) {
        let unflushed = u64::from(self.write_cache);
        self.state.unflushed.fetch_add(unflushed, Ordering::AcqRel);
    }

    /// What every request checks first.
    fn check(&self, op: &'static str, writes: bool) -> Result<()> {
        if self.closed() {
            return Err(Error::new(ErrorKind::ShuttingDown, op));
        }
        if let Some(kind) = *self.state.failure.lock() {
            return Err(Error::new(kind, op).context("failure asked for by a test"));
        }
        if writes && self.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, op));
        }
        Ok(())
    }

    fn check_reservations(&self, op: &'static str, access: Access) -> Result<()> {
        self.state.reservations.check(self.host, access, op)
    }

    /// Runs `work` once the volume is not held.
    fn later<T: 'static>(
        self: Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T> + 'static,
    ) -> LocalBoxFuture<Result<T>> {
        Box::pin(async move {
            if *self.state.held.borrow() {
                let mut held = self.state.held.subscribe();
                // The sender lives in `self`, so waiting ends only by release.
                let _ = held.wait_for(|held| !held).await;
            }
            work(&self)
        })
    }

    fn read_now(&self, offset: u64, bytes: u64, pieces: &mut Vec<Piece>) -> Result<()> {
        self.check("read", false)?;
        self.check_reservations("read", Access::Read)?;
        let content = self.state.content.read();
        content.check_range("read", offset, bytes)?;
        content.read(offset, offset + bytes, pieces);
        Ok(())
    }
}

impl Volume for MemoryVolume {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn id(&self) -> u64 {
        self.id
    }

    /// Made of the number, so that tests can tell what to expect.
    fn uuid(&self) -> Uuid {
        Uuid::from_u64_pair(0x5745_4654_0000_4000, 0x8000_0000_0000_0000 | self.id)
    }

    fn logical_block_bytes(&self) -> u32 {
        self.logical_block_bytes
    }

    fn size_bytes(&self) -> u64 {
        self.state.content.read().size_bytes
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn admits(&self, host: Option<&str>) -> bool {
        let only = self.state.only_host.lock();
        only.as_deref().is_none_or(|only| host == Some(only))
    }

    fn atomic_write_bytes(&self) -> u32 {
        ATOMIC_WRITE_BYTES
    }

    fn closed(&self) -> bool {
        self.state.closed.load(Ordering::Acquire)
    }

    fn for_host(self: Arc<Self>, host: Uuid) -> VolumeRef {
        Arc::new(Self { host: Some(host), ..Self::clone(&self) })
    }

    fn write_through(self: Arc<Self>) -> VolumeRef {
        Arc::new(Self { write_cache: false, ..Self::clone(&self) })
    }

    fn requests(&self) -> &Arc<Requests> {
        &self.state.requests
    }

    fn reservations(&self) -> Arc<Reservations> {
        self.state.reservations.get()
    }

    fn replace_reservations(
        self: Arc<Self>,
        seen: Arc<Reservations>,
        next: Reservations,
    ) -> LocalBoxFuture<Result<bool>> {
        self.later(move |volume| {
            volume.check("change reservations", false)?;
            let _no_change_under_way = volume.state.content.write();
            let current = volume.state.reservations.is(&seen);
            if current {
                volume.state.reservations.publish(next);
            }
            Ok(current)
        })
    }

    fn try_read(&self, offset: u64, bytes: u32, pieces: &mut Vec<Piece>) -> Result<bool> {
        if self.state.misses.load(Ordering::Relaxed) {
            return Ok(false);
        }
        self.read_now(offset, u64::from(bytes), pieces)?;
        Ok(true)
    }

    fn read(self: Arc<Self>, offset: u64, bytes: u32) -> LocalBoxFuture<Result<Vec<Piece>>> {
        self.later(move |volume| {
            let mut pieces = Vec::new();
            volume.read_now(offset, u64::from(bytes), &mut pieces)?;
            Ok(pieces)
        })
    }

    fn write(self: Arc<Self>, offset: u64, data: Bytes) -> LocalBoxFuture<Result<()>> {
        self.later(move |volume| {
            volume.check("write", true)?;
            let mut content = volume.state.content.write();
            volume.check_reservations("write", Access::Write)?;
            content.check_range("write", offset, bytes_u64(data.len()))?;
            content.write(offset, &data);
            volume.changed();
            Ok(())
        })
    }

    fn compare_and_write(
        self: Arc<Self>,
        offset: u64,
        expected: Bytes,
        data: Bytes,
    ) -> LocalBoxFuture<Result<bool>> {
        const OP: &str = "compare and write";
        self.later(move |volume| {
            volume.check(OP, true)?;
            let mut content = volume.state.content.write();
            volume.check_reservations(OP, Access::Write)?;
            let end = offset.saturating_add(bytes_u64(data.len()));
            content.check_range(OP, offset, bytes_u64(data.len()))?;
            let mut stored = Vec::new();
            content.read(offset, end, &mut stored);
            let same = pieces_equal(&stored, &expected);
            if same {
                content.write(offset, &data);
                volume.changed();
            }
            Ok(same)
        })
    }

    fn zero(
        self: Arc<Self>,
        offset: u64,
        bytes: u64,
        mode: ZeroMode,
    ) -> LocalBoxFuture<Result<()>> {
        self.later(move |volume| {
            volume.check("zero", true)?;
            let mut content = volume.state.content.write();
            volume.check_reservations("zero", Access::Write)?;
            content.check_range("zero", offset, bytes)?;
            content.zero(offset, offset + bytes, mode);
            volume.changed();
            Ok(())
        })
    }

    fn flush(self: Arc<Self>) -> LocalBoxFuture<Result<()>> {
        self.later(|volume| {
            volume.check("flush", false)?;
            volume.check_reservations("flush", Access::Write)?;
            volume.state.unflushed.store(0, Ordering::Release);
            Ok(())
        })
    }

    fn prefetch(self: Arc<Self>, offset: u64, bytes: u64) -> LocalBoxFuture<Result<()>> {
        self.later(move |volume| {
            volume.check("prefetch", false)?;
            volume.check_reservations("prefetch", Access::Read)?;
            volume.state.content.read().check_range("prefetch", offset, bytes)
        })
    }

    fn block_status(
        self: Arc<Self>,
        offset: u64,
        bytes: u64,
        extents_max: usize,
    ) -> LocalBoxFuture<Result<Vec<Extent>>> {
        self.later(move |volume| {
            volume.check("block status", false)?;
            volume.check_reservations("block status", Access::Read)?;
            let content = volume.state.content.read();
            content.check_range("block status", offset, bytes)?;
            Ok(content.extents(offset, offset + bytes, extents_max))
        })
    }
}

impl Content {
    fn check_range(&self, op: &'static str, offset: u64, bytes: u64) -> Result<()> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.size_bytes => Ok(()),
            _ => Err(Error::new(ErrorKind::OutOfRange, op)
                .context(format_args!("{bytes} bytes at {offset} of {}", self.size_bytes))),
        }
    }

    fn page(&self, page: u64) -> Option<&Bytes> {
        let region = self.regions.get(&(page / REGION_PAGES))?;
        region.get(bytes_usize(page % REGION_PAGES))?.as_ref()
    }

    fn page_mut(&mut self, page: u64) -> &mut Option<Bytes> {
        let region = self
            .regions
            .entry(page / REGION_PAGES)
            .or_insert_with(|| vec![None; bytes_usize(REGION_PAGES)].into_boxed_slice());
        &mut region[bytes_usize(page % REGION_PAGES)]
    }

    /// Appends the bytes from `offset` to `end`, neighbouring zeroes as one piece.
    fn read(&self, mut offset: u64, end: u64, pieces: &mut Vec<Piece>) {
        while offset < end {
            let (page, within) = (offset / BLOCK_BYTES_U64, offset % BLOCK_BYTES_U64);
            let length = bytes_usize((BLOCK_BYTES_U64 - within).min(end - offset));
            match self.page(page) {
                Some(bytes) if length == BLOCK_BYTES => pieces.push(Piece::Data(bytes.clone())),
                Some(bytes) => {
                    let within = bytes_usize(within);
                    pieces.push(Piece::Data(bytes.slice(within..within + length)));
                }
                None => match pieces.last_mut() {
                    Some(Piece::Zero(zeroes)) => *zeroes += length,
                    _ => pieces.push(Piece::Zero(length)),
                },
            }
            offset += bytes_u64(length);
        }
    }

    fn write(&mut self, mut offset: u64, data: &Bytes) {
        let mut done = 0;
        while done < data.len() {
            let (page, within) = (offset / BLOCK_BYTES_U64, bytes_usize(offset % BLOCK_BYTES_U64));
            let length = (BLOCK_BYTES - within).min(data.len() - done);
            let slot = self.page_mut(page);
            *slot = Some(if data.len() == BLOCK_BYTES && length == BLOCK_BYTES {
                // Exactly one page: keep the payload itself. Larger ones are copied page by page,
                // so that one surviving page does not hold on to a whole payload.
                data.clone()
            } else if length == BLOCK_BYTES {
                Bytes::copy_from_slice(&data[done..done + length])
            } else {
                patched(slot.as_ref(), within, &data[done..done + length])
            });
            done += length;
            offset += bytes_u64(length);
        }
    }

    fn zero(&mut self, offset: u64, end: u64, mode: ZeroMode) {
        // Whole pages in the middle; at the edges bytes of pages that stay.
        let first = round_up(offset, BLOCK_BYTES_U64);
        let last = end / BLOCK_BYTES_U64 * BLOCK_BYTES_U64;
        if first >= last {
            if mode != ZeroMode::Trim {
                self.zero_part(offset, end);
            }
            return;
        }
        if mode != ZeroMode::Trim {
            self.zero_part(offset, first);
            self.zero_part(last, end);
        }
        self.clear(first, last, mode);
    }

    /// Zeroes a range that covers no whole page.
    fn zero_part(&mut self, mut offset: u64, end: u64) {
        const ZEROES: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];
        while offset < end {
            let (page, within) = (offset / BLOCK_BYTES_U64, offset % BLOCK_BYTES_U64);
            let length = (BLOCK_BYTES_U64 - within).min(end - offset);
            if self.page(page).is_some() {
                let slot = self.page_mut(page);
                *slot = Some(patched(
                    slot.as_ref(),
                    bytes_usize(within),
                    &ZEROES[..bytes_usize(length)],
                ));
            }
            offset += length;
        }
    }

    /// Drops whole pages. `offset` and `end` are multiples of a page.
    fn clear(&mut self, offset: u64, end: u64, mode: ZeroMode) {
        let (first, last) = (offset / BLOCK_BYTES_U64, end / BLOCK_BYTES_U64);
        let touched = first / REGION_PAGES..last.div_ceil(REGION_PAGES);
        let regions: Vec<u64> = self.regions.range(touched).map(|(index, _)| *index).collect();
        for index in regions {
            let start = index * REGION_PAGES;
            if first <= start && start + REGION_PAGES <= last {
                self.regions.remove(&index);
                continue;
            }
            for page in first.max(start)..last.min(start + REGION_PAGES) {
                *self.page_mut(page) = None;
            }
        }
        self.unkeep(first, last);
        if mode == ZeroMode::KeepAllocated {
            self.kept.insert(first, last);
        }
    }

    /// Takes a run of pages out of `kept`, splitting the runs it cuts.
    fn unkeep(&mut self, first: u64, last: u64) {
        let cut: Vec<(u64, u64)> = self
            .kept
            .range(..last)
            .rev()
            .take_while(|(_, end)| **end > first)
            .map(|(start, end)| (*start, *end))
            .collect();
        for (start, end) in cut {
            self.kept.remove(&start);
            if start < first {
                self.kept.insert(start, first);
            }
            if end > last {
                self.kept.insert(last, end);
            }
        }
    }

    /// The kind of the page at `offset` and where that kind may change next.
    fn kind_at(&self, offset: u64) -> (bool, bool, u64) {
        let page = offset / BLOCK_BYTES_U64;
        if self.page(page).is_some() {
            return (false, false, (page + 1) * BLOCK_BYTES_U64);
        }
        let run = self.kept.range(..=page).next_back().filter(|(_, end)| **end > page);
        let kind_end = match run {
            Some((_, end)) => *end,
            None => self.kept.range(page..).next().map_or(u64::MAX, |(start, _)| *start),
        };
        let region = page / REGION_PAGES;
        let data_from = if self.regions.contains_key(&region) {
            page + 1
        } else {
            let next = self.regions.range(region..).next();
            next.map_or(u64::MAX, |(index, _)| index * REGION_PAGES)
        };
        let end = kind_end.min(data_from).saturating_mul(BLOCK_BYTES_U64);
        (run.is_none(), true, end)
    }

    fn extents(&self, mut offset: u64, end: u64, extents_max: usize) -> Vec<Extent> {
        let mut extents: Vec<Extent> = Vec::new();
        while offset < end {
            let (hole, zero, next) = self.kind_at(offset);
            let bytes = next.min(end) - offset;
            let full = extents.len() == extents_max;
            match extents.last_mut() {
                Some(last) if last.hole == hole && last.zero == zero => last.bytes += bytes,
                _ if full => break,
                _ => extents.push(Extent { bytes, hole, zero }),
            }
            offset += bytes;
        }
        extents
    }
}

/// A page with `part` laid over it at `within`; a missing page is zeroes.
fn patched(page: Option<&Bytes>, within: usize, part: &[u8]) -> Bytes {
    let mut bytes = match page {
        Some(page) => BytesMut::from(page.as_ref()),
        None => BytesMut::zeroed(BLOCK_BYTES),
    };
    bytes[within..within + part.len()].copy_from_slice(part);
    bytes.freeze()
}

/// Volumes by name, for targets that serve [`MemoryVolume`]s.
#[derive(Default)]
pub struct MemoryDirectory {
    /// Guards the table for one lookup.
    volumes: RwLock<BTreeMap<String, VolumeRef>>,
    /// Hosts that may connect from anywhere, by NQN, with what they authenticate by.
    hosts: RwLock<BTreeMap<String, Option<HostKeys>>>,
    /// Keys by which hosts encrypt, by NQN.
    tls_keys: RwLock<BTreeMap<String, TlsKey>>,
    changed: watch::Sender<u64>,
}

impl MemoryDirectory {
    /// A directory of these volumes.
    pub fn new(volumes: impl IntoIterator<Item = VolumeRef>) -> Self {
        let table = volumes.into_iter().map(|volume| (volume.name(), volume)).collect();
        Self { volumes: RwLock::new(table), ..Self::default() }
    }

    /// Adds a volume, in place of one of the same name.
    pub fn insert(&self, volume: VolumeRef) {
        self.volumes.write().insert(volume.name(), volume);
        self.announce();
    }

    /// Takes a volume out.
    pub fn remove(&self, name: &str) -> Option<VolumeRef> {
        let removed = self.volumes.write().remove(name);
        self.announce();
        removed
    }

    /// Lets a host connect from anywhere, or only from this machine again.
    pub fn set_host(&self, nqn: &str, known: bool) {
        let mut hosts = self.hosts.write();
        if known {
            hosts.entry(nqn.to_owned()).or_default();
        } else {
            hosts.remove(nqn);
        }
        drop(hosts);
        self.announce();
    }

    /// Gives a host keys, or none, and lets it connect from anywhere.
    pub fn set_host_keys(&self, nqn: &str, keys: Option<HostKeys>) {
        self.hosts.write().insert(nqn.to_owned(), keys);
        self.announce();
    }

    /// Gives a host a key for TLS, and lets it connect from anywhere.
    pub fn set_host_tls_key(&self, nqn: &str, key: TlsKey) {
        self.tls_keys.write().insert(nqn.to_owned(), key);
        self.set_host(nqn, true);
    }

    /// Tells those who watch that something changed: needed after a change to a volume only.
    pub fn announce(&self) {
        self.changed.send_modify(|count| *count += 1);
    }
}

impl VolumeDirectory for MemoryDirectory {
    fn find(&self, name: &str) -> Option<VolumeRef> {
        self.volumes.read().get(name).cloned()
    }

    fn list(&self) -> Vec<VolumeRef> {
        self.volumes.read().values().cloned().collect()
    }

    fn knows_host(&self, nqn: &str) -> bool {
        self.hosts.read().contains_key(nqn)
    }

    fn host_keys(&self, nqn: &str) -> Option<HostKeys> {
        self.hosts.read().get(nqn).cloned().flatten()
    }

    fn host_tls_key(&self, nqn: &str) -> Option<TlsKey> {
        self.tls_keys.read().get(nqn).cloned()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use futures_util::FutureExt;
    use proptest::prelude::*;

    use super::*;

    const SIZE: usize = 24 * BLOCK_BYTES;

    /// Runs a future that must not wait.
    fn now<T>(future: LocalBoxFuture<Result<T>>) -> Result<T> {
        future.now_or_never().expect("memory answers at once")
    }

    fn flatten(pieces: &[Piece]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for piece in pieces {
            match piece {
                Piece::Zero(length) => bytes.resize(bytes.len() + length, 0),
                Piece::Data(data) => bytes.extend_from_slice(data),
            }
        }
        bytes
    }

    #[derive(Clone, Debug)]
    enum Op {
        Write(usize, usize, u8),
        Zero(usize, usize, ZeroMode),
    }

    fn op() -> impl Strategy<Value = Op> {
        let range = (0..SIZE, 0..4 * BLOCK_BYTES, prop::bool::ANY).prop_map(|(at, len, align)| {
            let (at, len) = if align { (at & !4095, (len + 4095) & !4095) } else { (at, len) };
            (at, len.min(SIZE - at))
        });
        let mode = prop::sample::select(vec![
            ZeroMode::Deallocate,
            ZeroMode::KeepAllocated,
            ZeroMode::Trim,
        ]);
        prop_oneof![
            (range.clone(), 1..=255_u8).prop_map(|((at, len), fill)| Op::Write(at, len, fill)),
            (range, mode).prop_map(|((at, len), mode)| Op::Zero(at, len, mode)),
        ]
    }

    fn whole_blocks(at: usize, len: usize) -> Range<usize> {
        let first = at.next_multiple_of(BLOCK_BYTES);
        first..first.max((at + len) / BLOCK_BYTES * BLOCK_BYTES)
    }

    proptest! {
        #[test]
        fn behaves_like_an_array(ops in prop::collection::vec(op(), 0..40)) {
            let volume = Arc::new(MemoryVolume::new("v", bytes_u64(SIZE)));
            let mut model = vec![0_u8; SIZE];
            for op in ops {
                match op {
                    Op::Write(at, len, fill) => {
                        let data = Bytes::from(vec![fill; len]);
                        now(volume.clone().write(bytes_u64(at), data)).unwrap();
                        model[at..at + len].fill(fill);
                    }
                    Op::Zero(at, len, mode) => {
                        now(volume.clone().zero(bytes_u64(at), bytes_u64(len), mode)).unwrap();
                        let zeroed = match mode {
                            ZeroMode::Trim => whole_blocks(at, len),
                            ZeroMode::Deallocate | ZeroMode::KeepAllocated => at..at + len,
                        };
                        model[zeroed].fill(0);
                    }
                }
                let mut pieces = Vec::new();
                let size = u32::try_from(SIZE).unwrap();
                prop_assert!(volume.try_read(0, size, &mut pieces).unwrap());
                prop_assert_eq!(flatten(&pieces), model.clone());
                let extents = now(volume.clone().block_status(0, bytes_u64(SIZE), 1000)).unwrap();
                let mut at = 0;
                for extent in &extents {
                    let end = at + bytes_usize(extent.bytes);
                    prop_assert!(!extent.zero || model[at..end].iter().all(|byte| *byte == 0));
                    prop_assert!(extent.zero || !extent.hole);
                    at = end;
                }
                prop_assert_eq!(at, SIZE);
                let merged = extents
                    .windows(2)
                    .all(|pair| (pair[0].hole, pair[0].zero) != (pair[1].hole, pair[1].zero));
                prop_assert!(merged);
            }
        }
    }

    #[test]
    fn holes_kept_zeroes_and_data_are_told_apart() {
        let volume = Arc::new(MemoryVolume::new("v", 1 << 46));
        now(volume.clone().zero(0, 1 << 46, ZeroMode::KeepAllocated)).unwrap();
        now(volume.clone().write(8192, Bytes::from(vec![7; 4096]))).unwrap();
        now(volume.clone().zero(1 << 30, 1 << 30, ZeroMode::Deallocate)).unwrap();
        let extents = now(volume.clone().block_status(0, 1 << 46, 10)).unwrap();
        let kinds: Vec<_> = extents.iter().map(|e| (e.bytes, e.hole, e.zero)).collect();
        assert_eq!(
            kinds,
            [
                (8192, false, true),
                (4096, false, false),
                ((1 << 30) - 12288, false, true),
                (1 << 30, true, true),
                ((1 << 46) - (2 << 30), false, true),
            ]
        );
        assert_eq!(now(volume.block_status(0, 1 << 46, 2)).unwrap().len(), 2);
    }

    #[test]
    fn requests_past_the_end_change_nothing() {
        let volume = Arc::new(MemoryVolume::new("v", 8192));
        let error = now(volume.clone().write(4096, Bytes::from(vec![1; 8192]))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
        let mut pieces = Vec::new();
        assert!(volume.try_read(u64::MAX, 2, &mut pieces).is_err());
        assert!(volume.try_read(0, 8192, &mut pieces).unwrap());
        assert_eq!(pieces, [Piece::Zero(8192)]);
    }

    #[test]
    fn read_only_refuses_writes() {
        let volume = Arc::new(MemoryVolume::new("v", 8192).read_only());
        let error = now(volume.clone().write(0, Bytes::from(vec![1; 512]))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ReadOnly);
        assert!(now(volume.flush()).is_ok());
    }
}

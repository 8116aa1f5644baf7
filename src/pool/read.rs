//! Reading one record: the strip that holds it, or a rebuild from the others.
//!
//! The segment is leased for the length of the read, so that its regions are not reused and a
//! mismatch can only mean damage. Nothing read is believed before the caller's `decode` accepted
//! it; a damaged copy is rebuilt, served and then written back ([`super::heal`]).

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::Either;
use futures_util::future::select;

use super::Pool;
use super::member::Counters;
use super::member::LateRead;
use super::member::Member;
use crate::device::AlignedBuf;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::format::location::Address;
use crate::format::location::Location;
use crate::format::table::Place;
use crate::observe::event;
use crate::units::IO_ALIGN;
use crate::units::SECTOR_BYTES;
use crate::units::SegmentId;
use crate::units::bytes_usize;
use crate::units::round_up;

/// At most one read in this many is hedged.
const HEDGE_ONE_IN: u64 = 20;
/// Hedges that reads can earn for later ones: enough for a device that hangs to be found slow by
/// them, and no reserve with which a pod that ran well for weeks doubles the load of a bad minute.
const HEDGES_SAVED_MAX: u64 = 32;
/// No read is late before this, however quick devices are: a rebuild is not free.
const LATE_MIN: Duration = Duration::from_millis(1);

/// Counts reads and what hedges they have earned, so that hedging cannot double the load of a slow
/// pool.
pub(super) struct HedgeBudget {
    reads: AtomicU64,
    /// Reads that have not been spent on a hedge.
    earned: AtomicU64,
}

impl Default for HedgeBudget {
    fn default() -> Self {
        Self { reads: AtomicU64::new(0), earned: AtomicU64::new(HEDGE_ONE_IN) }
    }
}

impl HedgeBudget {
    fn note_read(&self) {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let earn = |earned: u64| (earned < HEDGE_ONE_IN * HEDGES_SAVED_MAX).then_some(earned + 1);
        let _ = self.earned.fetch_update(Ordering::Relaxed, Ordering::Relaxed, earn);
    }

    fn allows(&self) -> bool {
        let spend = |earned: u64| earned.checked_sub(HEDGE_ONE_IN);
        self.earned.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend).is_ok()
    }
}

/// Keeps a segment's regions from being reused.
pub struct Lease<'a> {
    pool: &'a Pool,
    /// The leased segment.
    pub segment: SegmentId,
    /// Where its strips are.
    pub places: Vec<Option<Place>>,
    held: bool,
}

impl Lease<'_> {
    /// A planted bug: the segment is held no longer, but its places are used.
    pub(super) fn let_go(&mut self) {
        if std::mem::take(&mut self.held) {
            self.pool.table.lock().release(self.segment);
        }
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        if self.held {
            self.pool.table.lock().release(self.segment);
        }
    }
}

/// A range of one strip to read: where it starts and how much, aligned to [`IO_ALIGN`].
#[derive(Clone, Copy, Debug)]
pub(super) struct StripRange {
    pub(super) strip: usize,
    pub(super) offset: u64,
    pub(super) length: usize,
}

/// What a read of a location found.
#[derive(Debug)]
pub enum ReadOutcome<T> {
    /// The record, decoded.
    Found(T),
    /// The segment is gone: the location is outdated and must be looked up again.
    Moved,
}

/// What reading a strip gave.
enum StripRead<T> {
    /// The record.
    Intact(T),
    /// Bytes that are not the record.
    Damaged,
    /// The device is out of service or failed the read.
    Unreadable,
}

impl Pool {
    /// Holds `segment`; `None` if the table does not know it.
    pub fn lease(&self, segment: SegmentId) -> Option<Lease<'_>> {
        let places = self.table.lock().lease(segment)?;
        Some(Lease { pool: self, segment, places, held: true })
    }

    /// How often records were asked for, by hosts and by the mapper.
    #[must_use]
    pub fn reads(&self) -> u64 {
        self.hedges.reads.load(Ordering::Relaxed)
    }

    /// Byte offset of a place on its device.
    #[must_use]
    pub fn place_offset(&self, place: Place) -> u64 {
        self.geometry.data_offset() + u64::from(place.region) * self.geometry.strip_bytes
    }

    /// Reads the record at `location`. `decode` gets the record's bytes (and what follows in its
    /// last sector) with its log address, and returns `None` for anything that is not intact.
    ///
    /// # Errors
    /// `Corrupt` if neither the strip nor any k others give an intact record, or a device's error
    /// if too few could be read.
    pub async fn read<T>(
        self: &Arc<Self>,
        location: Location,
        decode: impl Fn(&[u8], u64) -> Option<T>,
    ) -> Result<ReadOutcome<T>> {
        let space = self.geometry.space();
        let Some(address) = space.address(location) else {
            return Err(Error::new(ErrorKind::Corrupt, "read record").context("not an address"));
        };
        if let Some(pause) = self.env.pause() {
            pause.await;
        }
        let Some(lease) = self.lease(address.segment) else { return Ok(ReadOutcome::Moved) };
        let (range, record) = sectors_of(address, location);
        let place = space.log_address(address);
        let accept = |bytes: &[u8]| decode(bytes.get(record.clone())?, place);

        self.hedges.note_read();
        let damaged = match self.read_hedged(&lease, range, &accept).await {
            StripRead::Intact(value) => return Ok(ReadOutcome::Found(value)),
            StripRead::Damaged => true,
            StripRead::Unreadable => false,
        };
        if damaged {
            self.note_damage(&lease, address);
        }
        let value = self.rebuild_record(&lease, range, &accept).await?;
        if damaged {
            self.heal_later(address);
        }
        Ok(ReadOutcome::Found(value))
    }

    /// Reads the strip itself; if its device is late, also rebuilds the range from the others and
    /// takes what is intact first. A rebuild may have used a damaged strip, so one that is not
    /// intact says nothing: the late strip is waited for then.
    ///
    /// A read that is no longer waited for goes on until it is over or its device is given up for
    /// it: a device that hangs must not seem well because the others answer for it.
    async fn read_hedged<T>(
        &self,
        lease: &Lease<'_>,
        range: StripRange,
        accept: &impl Fn(&[u8]) -> Option<T>,
    ) -> StripRead<T> {
        let judge = |read: Result<AlignedBuf>| match read {
            Ok(bytes) => accept(&bytes).map_or(StripRead::Damaged, StripRead::Intact),
            Err(_) => StripRead::Unreadable,
        };
        let Some((member, offset)) = self.strip_member(lease, range.strip) else {
            return StripRead::Unreadable;
        };
        if member.is_slow() && self.can_do_without(lease, range.strip) {
            let rebuilt = self.rebuild_range(lease, range).await;
            if let Some(value) = rebuilt.ok().and_then(|bytes| accept(&bytes)) {
                return StripRead::Intact(value);
            }
        }
        // A device that is busy with others' reads is not late yet.
        let Ok(turn) = member.turn().await else { return StripRead::Unreadable };
        let read = {
            let (member, at) = (Arc::clone(member), offset + range.offset);
            Box::pin(async move { member.read_in_turn(turn, at, range.length).await })
        };
        let read = match select(read, self.env.sleep(self.late_after())).await {
            Either::Left((result, _)) => return judge(result),
            Either::Right(((), read)) => read,
        };
        let late = LateRead::new(member);
        if !self.hedges.allows() {
            return judge(read.await);
        }
        let rebuild = std::pin::pin!(self.rebuild_range(lease, range));
        match select(read, rebuild).await {
            Either::Left((result, _)) => judge(result),
            Either::Right((rebuilt, read)) => match rebuilt.ok().and_then(|bytes| accept(&bytes)) {
                Some(value) => {
                    self.env.spawn(Box::pin(async move {
                        // What it finds is counted by the device itself.
                        let _ = read.await;
                        drop(late);
                    }));
                    StripRead::Intact(value)
                }
                None => judge(read.await),
            },
        }
    }

    /// The device that holds a strip and where the strip starts on it; `None` if it is absent or
    /// out of service.
    pub(super) fn strip_member(
        &self,
        lease: &Lease<'_>,
        strip: usize,
    ) -> Option<(&Arc<Member>, u64)> {
        let place = lease.places.get(strip).copied().flatten()?;
        let member = self.members.get(usize::from(place.device))?;
        member.in_service().then(|| (member, self.place_offset(place)))
    }

    /// Whether devices that are not slow can rebuild a strip. If they cannot, the whole pod is slow,
    /// and rebuilds would make it slower.
    fn can_do_without(&self, lease: &Lease<'_>, strip: usize) -> bool {
        let others = (0..self.geometry.strips()).filter(|other| *other != strip);
        let quick = others.filter(|other| !self.is_slow(lease, *other));
        quick.count() >= self.geometry.data_strips
    }

    /// Whether a strip cannot be read soon: its device is slow or out of service.
    pub(super) fn is_slow(&self, lease: &Lease<'_>, strip: usize) -> bool {
        self.strip_member(lease, strip).is_none_or(|(member, _)| member.is_slow())
    }

    /// How late a read must be before a rebuild is started instead. By the device in the middle, so
    /// that those which are always slow do not pass for quick by their own measure.
    fn late_after(&self) -> Duration {
        let in_service = self.members.iter().filter(|member| member.in_service());
        let mut usual: Vec<Duration> = in_service.map(|member| member.read_p99()).collect();
        usual.sort_unstable();
        let middle = usual.get(usual.len().saturating_sub(1) / 2);
        middle.map_or(LATE_MIN, |p99| *p99 * 2).max(LATE_MIN)
    }

    fn note_damage(&self, lease: &Lease<'_>, address: Address) {
        let Some((member, _)) = self.strip_member(lease, address.strip) else { return };
        Counters::add(&member.counters.checksum_errors);
        let message = format_args!(
            "a record is damaged, in segment {}, strip {}, byte {}",
            address.segment.0, address.strip, address.byte
        );
        event::raise(event::DAMAGE_FOUND, member.name(), message);
    }
}

/// The aligned range of the strip that holds the record, and the record's bytes within it.
fn sectors_of(address: Address, location: Location) -> (StripRange, Range<usize>) {
    let first = address.byte / SECTOR_BYTES * SECTOR_BYTES;
    let end = first + location.sectors() * SECTOR_BYTES;
    let offset = first / IO_ALIGN * IO_ALIGN;
    let length = bytes_usize(round_up(end, IO_ALIGN) - offset);
    let range = StripRange { strip: address.strip, offset, length };
    (range, bytes_usize(address.byte - offset)..bytes_usize(end - offset))
}

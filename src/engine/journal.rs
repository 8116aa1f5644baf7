//! The journal: a ring on every device, written in batches to any m+1 of them.
//!
//! Requests append entries to the open batch; a *kick* seals it and writes it. While a batch is in
//! flight the next one fills (group commit), and a few may be in flight. Entries become visible
//! and are acknowledged in LSN order, over a contiguous durable prefix only.
//!
//! # Invariants
//! * `tail <= durable <= head`, `head - tail <= ring`; a batch never wraps around the ring's end.
//! * A sealed batch's bytes never change: a failed or late copy is replaced by the same bytes at
//!   the same position of another device.
//! * A device with a late copy still under way gets no other batch until it is over. A copy that
//!   waits for that is given up once its batch is durable elsewhere: it is not late itself.
//! * After a failure nothing later is acknowledged; the pod is read-only until reopened.
//!
//! Entries of a volume with a volatile write cache are acknowledged as they are accepted; all else is the
//! same for them, and [`Engine::settle`] waits until they are durable.
//!
//! Lock order: `seal` → `state`; `completion` → `state`; `completion` → layer; `state` → volatile
//! cache.

use std::cell::Cell;
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::task::Context;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::Either;
use futures_util::future::select;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::sync::oneshot;

use super::Engine;
use super::layer::Layer;
use super::range_lock::RangeGuard;
use super::record::BufferedRecord;
use super::space::Promise;
use super::volatile::Acknowledge;
use crate::canary::Bug;
use crate::canary::planted;
use crate::codec::checksum::crc64;
use crate::device::AlignedBuf;
use crate::device::Durability;
use crate::env::LocalBoxFuture;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::format::batch::BATCH_BYTES_MAX;
use crate::format::batch::BATCH_HEADER_BYTES;
use crate::format::batch::BatchHeader;
use crate::format::batch::batch_bytes;
use crate::format::record::JOURNAL_PLACE;
use crate::format::record::RECORD_HEADER_BYTES;
use crate::format::record::RecordHeader;
use crate::format::superblock::JOURNAL_OFFSET;
use crate::observe::event;
use crate::units::BranchId;
use crate::units::Lsn;
use crate::units::bytes_u64;
use crate::units::bytes_usize;
use crate::units::round_up;

/// Batches in flight at once; more only helps devices slower than the network.
const BATCHES_IN_FLIGHT_MAX: usize = 4;
/// With a batch in flight, another is sent only once this much has gathered.
const EAGER_BATCH_BYTES: u64 = 64 << 10;
/// A copy later than this is also written to another device.
const COPY_LATE: Duration = Duration::from_millis(500);
/// Most bytes acknowledged from memory and not durable yet, in all volumes together: what others write
/// durably waits behind them. Arbitrary: a few batches, so that the journal never runs dry.
const VOLATILE_BYTES_MAX: u64 = 8 << 20;
/// How often to look whether a device has finished its late copy.
const LATE_POLL: Duration = Duration::from_millis(5);
/// Smallest ring: a batch is at most an eighth of it and must hold the largest entry.
pub const JOURNAL_BYTES_MIN: u64 = 1 << 20;

/// A record before it is stamped.
pub struct NewRecord {
    /// LSN, branch and entry end are still to be filled in.
    pub header: RecordHeader,
    /// Payload as stored.
    pub payload: Bytes,
    /// Room held for it.
    pub promise: Option<Promise>,
}

/// The records of one request, all or nothing.
pub struct NewEntry {
    /// The layer they belong to; none for catalog changes.
    pub layer: Option<Arc<Layer>>,
    /// In LBA order.
    pub records: Vec<NewRecord>,
    /// Released once the entry is visible.
    pub hold: Option<Arc<RangeGuard>>,
    /// Whether it has to be durable then.
    pub acknowledge: Acknowledge,
}

struct PendingEntry {
    lsn: Lsn,
    records: Vec<Arc<BufferedRecord>>,
    /// Bytes of it that were acknowledged from memory: all or none.
    volatile_bytes: u64,
    hold: Option<Arc<RangeGuard>>,
    done: oneshot::Sender<Result<()>>,
}

struct InFlight {
    number: u64,
    entries: Vec<PendingEntry>,
    next_lsn: Lsn,
    durable: bool,
}

/// Where a batch lies, to find the new tail.
#[derive(Clone, Copy, Debug)]
pub(super) struct BatchSpan {
    pub(super) first_lsn: Lsn,
    pub(super) next_lsn: Lsn,
    pub(super) position: u64,
    pub(super) previous: u64,
}

/// Where recovery ended and writing goes on.
#[derive(Clone, Debug)]
pub(super) struct JournalStart {
    pub(super) tail: u64,
    pub(super) head: u64,
    pub(super) previous: u64,
    pub(super) next_lsn: Lsn,
    pub(super) spans: VecDeque<BatchSpan>,
}

struct State {
    next_lsn: Lsn,
    /// Entries up to here are durable.
    durable_lsn: Lsn,
    /// Entries up to here are in the index and queued for the mapper too: what a checkpoint may
    /// cover. Follows `durable_lsn`.
    visible_lsn: Lsn,
    tail: u64,
    head: u64,
    /// Header checksum of the batch before `head`.
    previous: u64,
    spans: VecDeque<BatchSpan>,
    open: VecDeque<PendingEntry>,
    open_bytes: u64,
    /// Bytes acknowledged from memory and not durable yet.
    volatile_bytes: u64,
    in_flight: VecDeque<InFlight>,
    batches: u64,
    kick_scheduled: bool,
    closing: bool,
    failed: Option<Error>,
    /// Why the tail has not moved for so long that waiting for room makes no sense.
    stuck: Option<Error>,
}

/// See the module.
pub struct Journal {
    ring: u64,
    batch_bytes_max: u64,
    volatile_bytes_max: u64,
    state: Mutex<State>,
    seal: Mutex<()>,
    completion: Mutex<()>,
    /// Woken when the tail moves, what was acknowledged from memory became durable, or nothing more
    /// will be accepted.
    room: Notify,
    /// Copies still under way per device after their batch was durable elsewhere.
    late_copies: Vec<AtomicUsize>,
}

impl Journal {
    pub(super) fn new(ring: u64, devices: usize, start: JournalStart) -> Self {
        Self {
            ring,
            batch_bytes_max: BATCH_BYTES_MAX.min(ring / 8),
            volatile_bytes_max: VOLATILE_BYTES_MAX.min(ring / 8),
            state: Mutex::new(State {
                next_lsn: start.next_lsn,
                durable_lsn: Lsn(start.next_lsn.0 - 1),
                visible_lsn: Lsn(start.next_lsn.0 - 1),
                tail: start.tail,
                head: start.head,
                previous: start.previous,
                spans: start.spans,
                open: VecDeque::new(),
                open_bytes: 0,
                volatile_bytes: 0,
                in_flight: VecDeque::new(),
                batches: 0,
                kick_scheduled: false,
                closing: false,
                failed: None,
                stuck: None,
            }),
            seal: Mutex::new(()),
            completion: Mutex::new(()),
            room: Notify::new(),
            late_copies: (0..devices).map(|_| AtomicUsize::new(0)).collect(),
        }
    }

    /// Bytes of the ring that hold entries not yet in a checkpoint.
    pub(super) fn used_bytes(&self) -> u64 {
        let state = self.state.lock();
        state.head - state.tail + state.open_bytes
    }

    /// Every entry up to here is durable, visible and was queued for the mapper.
    pub(super) fn visible_lsn(&self) -> Lsn {
        self.state.lock().visible_lsn
    }

    /// Why nothing is accepted any more, if so.
    pub(super) fn failure(&self) -> Option<Error> {
        self.state.lock().failed.as_ref().map(Error::duplicate)
    }

    /// Why no entry is accepted any more, if so: it failed, or is being closed.
    pub(super) fn refusal(&self) -> Option<Error> {
        self.state.lock().refusal()
    }

    /// Where the journal begins once every entry up to `cut` is in a checkpoint:
    /// position, LSN and checksum before it.
    pub(super) fn tail_after(&self, cut: Lsn) -> (u64, Lsn, u64) {
        let state = self.state.lock();
        match state.spans.iter().find(|span| span.next_lsn.0 > cut.0 + 1) {
            Some(span) => (span.position, span.first_lsn, span.previous),
            None => {
                let sealed = state.spans.back().map_or(cut.next(), |span| span.next_lsn);
                (state.head, sealed.max(cut.next()), state.previous)
            }
        }
    }

    /// Moves the tail: the checkpoint that makes it possible is durable.
    pub(super) fn advance_tail(&self, position: u64) {
        let mut state = self.state.lock();
        assert!((state.tail..=state.head).contains(&position), "the tail only moves forward");
        state.tail = position;
        while state.spans.front().is_some_and(|span| span.position < position) {
            state.spans.pop_front();
        }
        drop(state);
        self.room.notify_waiters();
    }

    /// Says why no checkpoint can be written, or that they can be again. Meanwhile entries are
    /// accepted as long as there is room, but none waits for it.
    pub(super) fn set_stuck(&self, reason: Option<&Error>) {
        self.state.lock().stuck = reason.map(Error::duplicate);
        if reason.is_some() {
            self.room.notify_waiters();
        }
    }

    /// Refuses new entries from now on.
    pub(super) fn close(&self) {
        self.state.lock().closing = true;
        self.room.notify_waiters();
    }

    /// Copies still under way although their batch is durable elsewhere.
    pub(super) fn late_copies(&self) -> usize {
        self.late_copies.iter().map(|late| late.load(Ordering::Acquire)).sum()
    }

    /// Whether every accepted entry has been acknowledged.
    pub(super) fn is_drained(&self) -> bool {
        let state = self.state.lock();
        state.failed.is_some() || (state.open.is_empty() && state.in_flight.is_empty())
    }
}

impl State {
    fn refusal(&self) -> Option<Error> {
        if let Some(error) = &self.failed {
            return Some(error.duplicate());
        }
        self.closing.then(|| Error::new(ErrorKind::ShuttingDown, "append to journal"))
    }

    /// Why an entry for which there is no room is not to wait for it.
    fn no_room_to_come(&self) -> Option<Error> {
        let reason = self.stuck.as_ref()?;
        Some(
            Error::new(reason.kind(), "append to journal")
                .context("it is full, and what is in it cannot be moved to segments")
                .source(reason.duplicate()),
        )
    }

    /// Stamps an entry and puts it into the open batch; hosts see it at once if it is volatile.
    fn accept(
        &mut self,
        entry: NewEntry,
        bytes: u64,
        is_volatile: bool,
    ) -> oneshot::Receiver<Result<()>> {
        let lsn = self.next_lsn;
        self.next_lsn = lsn.next();
        let branch = entry.layer.as_ref().map_or(BranchId(0), |layer| layer.branch);
        let last = entry.records.len() - 1;
        let layer = entry.layer;
        let records = entry.records.into_iter().enumerate().map(|(number, record)| {
            let header =
                RecordHeader { lsn, branch, last_of_entry: number == last, ..record.header };
            Arc::new(BufferedRecord {
                header,
                payload: record.payload,
                layer: layer.clone(),
                promise: record.promise,
                number: u16::try_from(number).expect("an entry has few records"),
            })
        });
        let (done, receiver) = oneshot::channel();
        let records: Vec<_> = records.collect();
        let mut hold = entry.hold;
        if is_volatile && let Some(layer) = &layer {
            layer.volatile.insert(lsn, &records);
            if planted(Bug::VolatileInBuffer) {
                let mut state = layer.state.lock();
                records.iter().for_each(|record| state.index.insert(record));
            }
            hold = None;
        }
        let volatile_bytes = if is_volatile { bytes } else { 0 };
        self.open.push_back(PendingEntry { lsn, records, volatile_bytes, hold, done });
        self.open_bytes += bytes;
        self.volatile_bytes += volatile_bytes;
        receiver
    }

    /// Whether the open batch should be written now.
    fn should_seal(&self) -> bool {
        !self.open.is_empty()
            && self.failed.is_none()
            && (self.in_flight.is_empty()
                || (self.in_flight.len() < BATCHES_IN_FLIGHT_MAX
                    && self.open_bytes >= EAGER_BATCH_BYTES))
    }
}

/// A sealed batch on its way.
struct SealedBatch {
    number: u64,
    position: u64,
    bytes: Bytes,
}

impl Engine {
    /// Appends an entry and waits until it is durable and visible, or only visible if its layer has a
    /// volatile write cache.
    ///
    /// # Durability
    /// On `Ok` the entry is on stable storage of m+1 devices, or will be before [`Engine::settle`]
    /// returns.
    ///
    /// # Errors
    /// `ShuttingDown`, or why the journal takes nothing: what made it fail, or, if it is full, what
    /// has kept it from being emptied for a while.
    ///
    /// # Cancellation
    /// Dropped before it was accepted, nothing happens; after, it becomes durable or fails whole.
    pub(super) async fn append(self: &Arc<Self>, entry: NewEntry) -> Result<()> {
        let may_be_volatile = |layer: &Arc<Layer>| {
            entry.acknowledge == Acknowledge::Early && layer.volatile.is_enabled()
        };
        let is_volatile = entry.layer.as_ref().is_some_and(may_be_volatile);
        let durable = self.enter(entry, is_volatile).await?;
        if is_volatile {
            return Ok(());
        }
        durable
            .await
            .unwrap_or_else(|_| Err(Error::new(ErrorKind::ShuttingDown, "wait for journal")))
    }

    /// Waits until everything that was acknowledged from memory in `layer` is durable.
    ///
    /// # Errors
    /// What made the journal fail: it is lost once the pod is reopened.
    pub async fn settle(&self, layer: &Layer) -> Result<()> {
        let newest = layer.volatile.newest();
        loop {
            let mut changed = std::pin::pin!(self.journal.room.notified());
            changed.as_mut().enable();
            {
                let state = self.journal.state.lock();
                if state.visible_lsn >= newest || planted(Bug::FlushIgnored) {
                    return Ok(());
                }
                if let Some(error) = &state.failed {
                    return Err(error.duplicate());
                }
            }
            changed.await;
        }
    }

    /// Puts an entry into the open batch once there is room; what it returns is told when the entry is
    /// durable and visible.
    async fn enter(
        self: &Arc<Self>,
        entry: NewEntry,
        is_volatile: bool,
    ) -> Result<oneshot::Receiver<Result<()>>> {
        assert!(!entry.records.is_empty(), "an entry has at least one record");
        let bytes: u64 = entry.records.iter().map(|record| record.header.stride()).sum();
        assert!(batch_bytes(bytes) <= self.journal.batch_bytes_max, "an entry fits one batch");
        let journal = &self.journal;
        let mut entry = Some(entry);
        loop {
            let mut room = std::pin::pin!(journal.room.notified());
            room.as_mut().enable();
            let fits = {
                let mut state = journal.state.lock();
                if let Some(error) = state.refusal() {
                    return Err(error);
                }
                let used = state.head - state.tail + state.open_bytes + bytes;
                let fits = used + 2 * journal.batch_bytes_max <= journal.ring;
                let overtakes =
                    is_volatile && state.volatile_bytes + bytes > journal.volatile_bytes_max;
                if fits && !overtakes {
                    let entry = entry.take().expect("accepted once");
                    let receiver = state.accept(entry, bytes, is_volatile);
                    let schedule = !std::mem::replace(&mut state.kick_scheduled, true);
                    drop(state);
                    if schedule {
                        self.schedule_kick();
                    }
                    return Ok(receiver);
                }
                if let Some(error) = state.no_room_to_come().filter(|_| !fits) {
                    return Err(error);
                }
                fits
            };
            if !fits {
                self.wake_mapper();
            }
            room.await;
        }
    }

    /// Kicks after the current task has run on: what it appends meanwhile joins the batch.
    fn schedule_kick(self: &Arc<Self>) {
        let engine = Arc::clone(self);
        self.env.spawn(Box::pin(async move {
            engine.journal.state.lock().kick_scheduled = false;
            engine.kick();
        }));
    }

    /// Seals and sends the open batch as long as that is due.
    pub(super) fn kick(self: &Arc<Self>) {
        while let Some(batch) = self.seal() {
            let engine = Arc::clone(self);
            self.env.spawn(Box::pin(async move {
                if planted(Bug::AckedAtSubmit) {
                    engine.batch_finished(batch.number, Ok(()));
                }
                let result = engine.replicate(batch.position, batch.bytes).await;
                engine.batch_finished(batch.number, result);
            }));
        }
    }

    fn seal(&self) -> Option<SealedBatch> {
        let journal = &self.journal;
        let _one_at_a_time = journal.seal.lock();
        let (mut header, position, records) = {
            let mut state = journal.state.lock();
            if !state.should_seal() {
                return None;
            }
            let (count, body_bytes) = fitting(&state.open, journal.batch_bytes_max);
            let position = place_batch(state.head, batch_bytes(body_bytes), journal.ring);
            if position + batch_bytes(body_bytes) - state.tail > journal.ring {
                return None;
            }
            let entries: Vec<PendingEntry> = state.open.drain(..count).collect();
            state.open_bytes -= body_bytes;
            let records: Vec<_> =
                entries.iter().flat_map(|entry| entry.records.iter().cloned()).collect();
            let first_lsn = entries[0].lsn;
            let header = BatchHeader {
                checksum: 0,
                entries: u32::try_from(count).expect("a batch has fewer than 2^32 entries"),
                body_checksum: 0,
                position,
                epoch: self.epoch,
                first_lsn,
                previous: state.previous,
                durable_lsn: state.durable_lsn,
                body_bytes,
            };
            let next_lsn = header.next_lsn();
            let previous = state.previous;
            state.spans.push_back(BatchSpan { first_lsn, next_lsn, position, previous });
            state.batches += 1;
            let number = state.batches;
            state.in_flight.push_back(InFlight { number, entries, next_lsn, durable: false });
            state.head = position + batch_bytes(body_bytes);
            (header, position, records)
        };
        let bytes = encode_batch(&mut header, self.pool.geometry.pod, &records);
        let mut state = journal.state.lock();
        state.previous = header.checksum;
        Some(SealedBatch { number: state.batches, position, bytes })
    }

    /// Writes the same bytes to m+1 devices, trying others where one fails or is late.
    async fn replicate(self: &Arc<Self>, position: u64, bytes: Bytes) -> Result<()> {
        let needed = self.pool.geometry.journal_copies() - usize::from(planted(Bug::AckedOnTooFew));
        let mut copies = Copies {
            engine: Arc::clone(self),
            position,
            bytes,
            candidates: self.journal_devices(position).into_iter(),
            writes: FuturesUnordered::new(),
        };
        (0..needed).for_each(|_| copies.start_another());
        let (mut durable, mut last_error) = (0, None);
        while durable < needed {
            match select(copies.writes.next(), self.env.sleep(COPY_LATE)).await {
                Either::Right(((), _)) => copies.start_another(),
                Either::Left((Some((_, Ok(()))), _)) => durable += 1,
                Either::Left((Some((_, Err(error))), _)) => {
                    last_error = Some(error);
                    copies.start_another();
                }
                Either::Left((None, _)) => {
                    let error =
                        Error::new(ErrorKind::Poisoned, "write journal").context(format_args!(
                            "{durable} devices took a batch, {needed} are needed; reopen the pod"
                        ));
                    return Err(match last_error {
                        Some(source) => error.source(source),
                        None => error,
                    });
                }
            }
        }
        copies.leave_late_ones();
        Ok(())
    }

    /// Devices to write a batch to, in order of preference: turning with the position, those that
    /// owe a late copy last.
    fn journal_devices(&self, position: u64) -> Vec<usize> {
        let count = self.pool.members.len();
        let turn = bytes_usize(position / crate::units::IO_ALIGN) % count;
        let mut devices: Vec<usize> = (0..count)
            .map(|index| (index + turn) % count)
            .filter(|device| self.pool.members[*device].in_service())
            .collect();
        devices.sort_by_key(|device| self.owes_late_copy(*device));
        devices
    }

    fn owes_late_copy(&self, device: usize) -> bool {
        self.journal.late_copies[device].load(Ordering::Acquire) > 0
    }

    /// Makes what is now contiguously durable visible, acknowledges it, and sends the next batch.
    fn batch_finished(self: &Arc<Self>, number: u64, result: Result<()>) {
        {
            let _in_order = self.journal.completion.lock();
            let (ready, failed) = {
                let mut state = self.journal.state.lock();
                match result {
                    Ok(()) => (take_durable_prefix(&mut state, number), None),
                    Err(error) => (Vec::new(), Some(fail_all(&mut state, error))),
                }
            };
            let mut settled_bytes = 0;
            for entry in ready {
                self.make_visible(&entry.records);
                self.journal.state.lock().visible_lsn = entry.lsn;
                settled_bytes += entry.volatile_bytes;
                drop(entry.hold);
                let _ = entry.done.send(Ok(()));
            }
            if settled_bytes > 0 {
                self.journal.state.lock().volatile_bytes -= settled_bytes;
                self.journal.room.notify_waiters();
            }
            if let Some((entries, error)) = failed {
                event::raise(event::POD_READ_ONLY, "pod", error.chain());
                for entry in entries {
                    let _ = entry.done.send(Err(error.duplicate()));
                }
                self.journal.room.notify_waiters();
            }
        }
        self.kick();
    }
}

/// The copies of one batch under way.
struct Copies {
    engine: Arc<Engine>,
    position: u64,
    bytes: Bytes,
    candidates: std::vec::IntoIter<usize>,
    writes: FuturesUnordered<DeviceCopy>,
}

/// A copy for one device, which first waits until that owes no late one.
struct DeviceCopy {
    device: usize,
    /// Whether it was given to the device.
    begun: Rc<Cell<bool>>,
    write: LocalBoxFuture<Result<()>>,
}

impl Future for DeviceCopy {
    type Output = (usize, Result<()>);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let device = self.device;
        self.write.as_mut().poll(context).map(|result| (device, result))
    }
}

impl Copies {
    /// Starts a copy on the next candidate, if there is one.
    ///
    /// A device that owes a late copy is written only after that is over: the late one could
    /// otherwise land on top, once the ring has come around.
    fn start_another(&mut self) {
        let Some(device) = self.candidates.next() else { return };
        let (engine, position) = (Arc::clone(&self.engine), self.position);
        let bytes = self.bytes.clone();
        let begun = Rc::new(Cell::new(false));
        let begins = Rc::clone(&begun);
        let write = Box::pin(async move {
            while engine.owes_late_copy(device) {
                engine.env.sleep(LATE_POLL).await;
            }
            begins.set(true);
            let offset = JOURNAL_OFFSET + position % engine.journal.ring;
            let member = &engine.pool.members[device];
            let durability = if planted(Bug::JournalNotDurable) {
                Durability::Volatile
            } else {
                Durability::Durable
            };
            member.write(offset, bytes, durability).await
        });
        self.writes.push(DeviceCopy { device, begun, write });
    }

    /// Sees copies that are not needed any more to their end; those that only wait are given up.
    /// If they were counted they would wait for themselves.
    fn leave_late_ones(self) {
        let Self { engine, writes, .. } = self;
        let begun = |copy: &DeviceCopy| copy.begun.get() || planted(Bug::WaitingCopyCounted);
        let mut late: FuturesUnordered<_> = writes.into_iter().filter(begun).collect();
        if late.is_empty() {
            return;
        }
        for copy in &late {
            engine.journal.late_copies[copy.device].fetch_add(1, Ordering::AcqRel);
        }
        let env = Arc::clone(&engine.env);
        env.spawn(Box::pin(async move {
            while let Some((device, _)) = late.next().await {
                engine.journal.late_copies[device].fetch_sub(1, Ordering::AcqRel);
            }
        }));
    }
}

/// How many entries of `open` fit into one batch, and the bytes of its body.
fn fitting(open: &VecDeque<PendingEntry>, limit: u64) -> (usize, u64) {
    let (mut count, mut body_bytes) = (0, 0);
    for entry in open {
        let bytes: u64 = entry.records.iter().map(|record| record.header.stride()).sum();
        if count > 0 && batch_bytes(body_bytes + bytes) > limit {
            break;
        }
        count += 1;
        body_bytes += bytes;
    }
    (count, body_bytes)
}

/// Where a batch goes: at the head, or at the ring's next start if it would wrap.
pub(super) fn place_batch(head: u64, bytes: u64, ring: u64) -> u64 {
    if head % ring + bytes <= ring { head } else { round_up(head, ring) }
}

fn encode_batch(
    header: &mut BatchHeader,
    pod: crate::format::PodId,
    records: &[Arc<BufferedRecord>],
) -> Bytes {
    let mut batch = AlignedBuf::zeroed(bytes_usize(header.batch_bytes()));
    let mut at = BATCH_HEADER_BYTES;
    for record in records {
        let place = JOURNAL_PLACE | (header.position + bytes_u64(at));
        batch[at..at + RECORD_HEADER_BYTES].copy_from_slice(&record.header.encode(pod, place));
        let payload = at + RECORD_HEADER_BYTES;
        batch[payload..payload + record.payload.len()].copy_from_slice(&record.payload);
        at += bytes_usize(record.header.stride());
    }
    assert_eq!(bytes_u64(at - BATCH_HEADER_BYTES), header.body_bytes);
    header.body_checksum = crc64(&batch[BATCH_HEADER_BYTES..at]);
    batch[..BATCH_HEADER_BYTES].copy_from_slice(&header.encode(pod));
    batch.freeze()
}

fn take_durable_prefix(state: &mut State, number: u64) -> Vec<PendingEntry> {
    if let Some(batch) = state.in_flight.iter_mut().find(|batch| batch.number == number) {
        batch.durable = true;
    }
    let mut ready = Vec::new();
    while state.in_flight.front().is_some_and(|batch| batch.durable) {
        let Some(batch) = state.in_flight.pop_front() else { break };
        state.durable_lsn = Lsn(batch.next_lsn.0 - 1);
        ready.extend(batch.entries);
    }
    ready
}

fn fail_all(state: &mut State, error: Error) -> (Vec<PendingEntry>, Error) {
    let copy = error.duplicate();
    state.failed.get_or_insert(error);
    let in_flight = std::mem::take(&mut state.in_flight);
    let mut entries: Vec<PendingEntry> =
        in_flight.into_iter().flat_map(|batch| batch.entries).collect();
    entries.extend(std::mem::take(&mut state.open));
    state.open_bytes = 0;
    (entries, copy)
}

//! Finding the journal's end after a stop of any kind, and bringing its entries back.
//!
//! Every ring is read once and the intact batches of all devices are united by position. The
//! chain is walked from the superblock's tail: each batch names the checksum of the one before.
//! Where the chain ends, either the journal ends, or a batch that was durable is missing: any
//! stamp at or above the gap proves the latter, unless a later epoch made it void, and the pod is not
//! opened.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream;

use super::journal::BatchSpan;
use super::journal::JournalStart;
use super::journal::place_batch;
use crate::canary::Bug;
use crate::canary::planted;
use crate::device::AlignedBuf;
use crate::device::Durability;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::format::PodId;
use crate::format::batch::BATCH_BYTES_MAX;
use crate::format::batch::BATCH_HEADER_BYTES;
use crate::format::batch::BatchHeader;
use crate::format::record::JOURNAL_PLACE;
use crate::format::record::RECORD_HEADER_BYTES;
use crate::format::record::RecordHeader;
use crate::format::record::decode_record;
use crate::format::superblock::JOURNAL_OFFSET;
use crate::format::superblock::Superblock;
use crate::pool::Pool;
use crate::pool::member::Member;
use crate::units::IO_ALIGN;
use crate::units::Lsn;
use crate::units::bytes_u64;
use crate::units::bytes_usize;

/// How much of a ring is read at a time.
const WINDOW_BYTES: u64 = 8 << 20;
/// The same where a window cannot be read as a whole. So small that reads of good places come
/// between those of the blocks of a bad one: too many errors in a row are the device's end.
const PIECE_BYTES: u64 = 64 << 10;
/// Copies written at once. Arbitrary: enough to keep the devices busy, at most 32 MiB of memory.
const COPIES_AT_ONCE: usize = 32;

/// An intact batch and who holds it.
struct FoundBatch {
    header: BatchHeader,
    bytes: Bytes,
    devices: Vec<usize>,
}

/// Intact batches by position; several at one position differ in epoch.
type Found = BTreeMap<u64, Vec<FoundBatch>>;

/// A record of the journal, to be put back into the write buffer.
pub(super) struct ReplayRecord {
    pub(super) header: RecordHeader,
    /// Its place within its entry.
    pub(super) number: u16,
    pub(super) payload: Bytes,
}

/// What the journal held.
pub(super) struct Recovered {
    pub(super) start: JournalStart,
    pub(super) records: Vec<ReplayRecord>,
    batches: Vec<FoundBatch>,
}

/// Reads all rings and finds the journal's end. The checkpoint holds the entries up to `cut`.
///
/// # Errors
/// `Corrupt` if entries that were durable are missing or do not decode, `InvalidRequest` for two
/// halves of a pod that went on without each other.
pub(super) async fn recover(pool: &Pool, head: &Superblock, cut: Lsn) -> Result<Recovered> {
    let scans = pool.members.iter().filter(|member| member.in_service());
    let scans = scans.map(|member| scan_ring(member, pool, head));
    let mut found = Found::new();
    for (device, batches) in join_all(scans).await {
        for batch in batches {
            unite(&mut found, device, batch);
        }
    }
    refuse_two_halves(pool, &found)?;
    let starts = epoch_starts(&found, head);
    let durable = highest_stamp(&found, &starts).max(durable_beyond(cut, head));
    let chain = walk_chain(found, head, &starts);
    let next_lsn = chain.last().map_or(head.tail_lsn, |batch| batch.header.next_lsn());
    if durable >= next_lsn && !planted(Bug::GapTakenForEnd) {
        return Err(Error::new(ErrorKind::Corrupt, "replay journal").context(format_args!(
            "entries {next_lsn} to {durable} were acknowledged and are on no readable \
             device; attach the missing devices and start again"
        )));
    }
    let mut records = Vec::new();
    for batch in &chain {
        decode_batch(pool.geometry.pod, batch, &mut records)?;
    }
    Ok(Recovered { start: journal_start(head, &chain), records, batches: chain })
}

fn journal_start(head: &Superblock, chain: &[FoundBatch]) -> JournalStart {
    let spans: VecDeque<BatchSpan> = chain
        .iter()
        .map(|batch| BatchSpan {
            first_lsn: batch.header.first_lsn,
            next_lsn: batch.header.next_lsn(),
            position: batch.header.position,
            previous: batch.header.previous,
        })
        .collect();
    let last = chain.last().map(|batch| &batch.header);
    JournalStart {
        tail: head.tail_position,
        head: last.map_or(head.tail_position, |last| last.position + last.batch_bytes()),
        previous: last.map_or(head.tail_previous, |last| last.checksum),
        next_lsn: last.map_or(head.tail_lsn, BatchHeader::next_lsn),
        spans,
    }
}

/// Reads one device's ring. What cannot be read of it contributes nothing.
async fn scan_ring(
    member: &Arc<Member>,
    pool: &Pool,
    head: &Superblock,
) -> (usize, Vec<FoundBatch>) {
    let ring = pool.geometry.journal_bytes;
    let mut batches = Vec::new();
    let mut window = 0;
    while window < ring {
        let end = (window + WINDOW_BYTES).min(ring);
        // A batch may begin in this window and end in the next.
        let length = (end + BATCH_BYTES_MAX).min(ring) - window;
        let bytes = read_what_can_be(member, JOURNAL_OFFSET + window, length).await.freeze();
        let mut at = 0;
        while window + at < end {
            let rest = bytes.get(bytes_usize(at)..).unwrap_or_default();
            match intact_batch(rest, pool.geometry.pod, window + at, ring, head) {
                Some(batch) => {
                    at += batch.header.batch_bytes();
                    batches.push(batch);
                }
                None => at += IO_ALIGN,
            }
        }
        window = end;
    }
    (member.index, batches)
}

/// Reads a range, in smaller pieces where it must be; what cannot be read is zero. A device of which
/// too much cannot be read leaves service, and ends this.
async fn read_what_can_be(member: &Member, offset: u64, length: u64) -> AlignedBuf {
    if let Ok(bytes) = member.read(offset, bytes_usize(length)).await {
        return bytes;
    }
    let mut bytes = AlignedBuf::zeroed(bytes_usize(length));
    let mut pieces = split(0..length, PIECE_BYTES);
    while let Some(piece) = pieces.pop()
        && member.in_service()
    {
        let at = bytes_usize(piece.start)..bytes_usize(piece.end);
        match member.read(offset + piece.start, at.len()).await {
            Ok(read) => bytes[at].copy_from_slice(&read),
            Err(_) if bytes_u64(at.len()) > IO_ALIGN => pieces.extend(split(piece, IO_ALIGN)),
            Err(_) => {}
        }
    }
    bytes
}

/// The pieces of a range, the last one first.
fn split(range: Range<u64>, piece_bytes: u64) -> Vec<Range<u64>> {
    let starts = range.clone().step_by(bytes_usize(piece_bytes));
    let mut pieces: Vec<_> =
        starts.map(|start| start..(start + piece_bytes).min(range.end)).collect();
    pieces.reverse();
    pieces
}

/// The batch at the start of `rest`, which lies at `at` in the ring, if it is intact, in its place
/// and not older than the tail.
fn intact_batch(
    rest: &[u8],
    pod: PodId,
    at: u64,
    ring: u64,
    head: &Superblock,
) -> Option<FoundBatch> {
    let header = BatchHeader::decode(rest, pod).ok()?;
    if header.position % ring != at || header.position < head.tail_position {
        return None;
    }
    header.body(rest).ok()?;
    // Copied, so that a few small batches do not keep a whole window in memory.
    let bytes = Bytes::copy_from_slice(rest.get(..bytes_usize(header.batch_bytes()))?);
    Some(FoundBatch { header, bytes, devices: Vec::new() })
}

fn unite(found: &mut Found, device: usize, mut batch: FoundBatch) {
    let same_position = found.entry(batch.header.position).or_default();
    match same_position.iter_mut().find(|other| other.header.checksum == batch.header.checksum) {
        Some(other) => other.devices.push(device),
        None => {
            batch.devices.push(device);
            same_position.push(batch);
        }
    }
}

/// Refuses devices that were opened by force in two halves, each without the other. A run never writes
/// two batches at one position, so these are of two runs that took the same epoch. Two halves that
/// have no such batches left are not noticed.
fn refuse_two_halves(pool: &Pool, found: &Found) -> Result<()> {
    let of_one_epoch = |batches: &Vec<FoundBatch>| {
        let mut rest = batches.iter();
        while let Some(one) = rest.next() {
            if let Some(other) = rest.clone().find(|b| b.header.epoch == one.header.epoch) {
                return Some((names(pool, &one.devices), names(pool, &other.devices)));
            }
        }
        None
    };
    let Some((one, other)) = found.values().find_map(of_one_epoch) else { return Ok(()) };
    Err(Error::new(ErrorKind::InvalidRequest, "open pod").context(format_args!(
        "{one} and {other} were opened by force without each other and written to: these are two pods \
         now. Attach the devices of one side only"
    )))
}

fn names(pool: &Pool, devices: &[usize]) -> String {
    devices.iter().map(|device| pool.members[*device].name()).collect::<Vec<_>>().join(", ")
}

/// Follows the chain from the tail. At equal LSN the higher epoch wins; void batches are no part
/// of it.
fn walk_chain(mut found: Found, head: &Superblock, starts: &BTreeMap<u64, Lsn>) -> Vec<FoundBatch> {
    let ring = head.journal_bytes;
    let mut chain: Vec<FoundBatch> = Vec::new();
    loop {
        let start = journal_start(head, &chain);
        // A batch that would have wrapped lies at the ring's next start.
        let positions = [start.head, place_batch(start.head, ring, ring)];
        let next = positions.into_iter().find_map(|position| {
            let candidates = found.get_mut(&position)?;
            let fits = |batch: &FoundBatch| {
                batch.header.previous == start.previous
                    && batch.header.first_lsn == start.next_lsn
                    && !is_void(&batch.header, starts)
            };
            let best = (0..candidates.len())
                .filter(|index| fits(&candidates[*index]))
                .max_by_key(|index| candidates[*index].header.epoch)?;
            Some(candidates.swap_remove(best))
        });
        match next {
            Some(batch) => chain.push(batch),
            None => return chain,
        }
    }
}

/// The LSN at or below which each epoch began, as far as can be told: the newest from the
/// superblock or the batches it left, any other from its batches.
///
/// The superblock may be of an open that was cut short before others, without the devices that it
/// told, took the same epoch from an earlier end. Only a run that was told to enough wrote batches,
/// so where these begin earlier they are right.
fn epoch_starts(found: &Found, head: &Superblock) -> BTreeMap<u64, Lsn> {
    let mut starts = BTreeMap::new();
    for header in found.values().flatten().map(|batch| &batch.header) {
        let start = starts.entry(header.epoch).or_insert(header.first_lsn);
        *start = header.first_lsn.min(*start);
    }
    let newest = starts.entry(head.epoch).or_insert(head.epoch_start);
    *newest = head.epoch_start.min(*newest);
    starts
}

/// An epoch begins where the chain ended when the pod was opened: what an older one left beyond
/// that was not part of it, and never is.
fn is_void(header: &BatchHeader, starts: &BTreeMap<u64, Lsn>) -> bool {
    let mut newer = starts.range(header.epoch + 1..);
    newer.any(|(_, start)| *start < header.next_lsn()) && !planted(Bug::VoidTailReplayed)
}

/// The last entry that any batch proves durable.
///
/// A stamp counts only below the starts of all later epochs: what lies above is void, durable or not.
/// Without force no damage is hidden by that. A durable entry is on m+1 devices, so the open that
/// began a later epoch met it, and began beyond it or was refused: no stamp is higher than what
/// counts. An open by force may not have met it, gives it up, and says so; the devices that hold it
/// prove nothing about the pod as it went on.
fn highest_stamp(found: &Found, starts: &BTreeMap<u64, Lsn>) -> Lsn {
    let counted = |header: &BatchHeader| {
        let newer = starts.range(header.epoch + 1..).map(|(_, start)| start.0.saturating_sub(1));
        let limit = if planted(Bug::VoidStampCounted) { None } else { newer.min() };
        header.durable_lsn.min(Lsn(limit.unwrap_or(u64::MAX)))
    };
    found.values().flatten().map(|batch| counted(&batch.header)).max().unwrap_or_default()
}

/// The last entry that the checkpoint proves durable beyond its own, if any: where it ends in the
/// middle of a batch the tail is that batch, and a batch is durable as a whole.
fn durable_beyond(cut: Lsn, head: &Superblock) -> Lsn {
    if head.tail_lsn <= cut { cut.next() } else { Lsn::default() }
}

fn decode_batch(pod: PodId, batch: &FoundBatch, records: &mut Vec<ReplayRecord>) -> Result<()> {
    let damaged = |what: &dyn std::fmt::Display| {
        Error::new(ErrorKind::Corrupt, "replay journal")
            .context(format_args!("batch at {}: {what}", batch.header.position))
    };
    let end = BATCH_HEADER_BYTES + bytes_usize(batch.header.body_bytes);
    let mut at = BATCH_HEADER_BYTES;
    let mut expected = batch.header.first_lsn;
    let mut next_number = 0;
    while at < end {
        let place = JOURNAL_PLACE | (batch.header.position + bytes_u64(at));
        let (header, payload) =
            decode_record(&batch.bytes[at..end], pod, place).map_err(|error| damaged(&error))?;
        if header.lsn != expected {
            return Err(damaged(&"its entries are not in order"));
        }
        if header.last_of_entry {
            expected = expected.next();
        }
        let from = at + RECORD_HEADER_BYTES;
        let payload = batch.bytes.slice(from..from + payload.len());
        records.push(ReplayRecord { header, number: next_number, payload });
        next_number = if header.last_of_entry { 0 } else { next_number.saturating_add(1) };
        at += bytes_usize(header.stride());
    }
    if expected == batch.header.next_lsn() {
        Ok(())
    } else {
        Err(damaged(&"an entry is incomplete"))
    }
}

/// A batch to be copied to a device.
struct Copy {
    /// Index of the batch.
    batch: usize,
    device: usize,
}

/// Copies batches that fewer than m+1 devices in service hold, at the same ring position.
///
/// # Durability
/// When it returns `Ok`, m+1 devices hold each batch.
///
/// # Errors
/// If m+1 copies cannot be had.
pub(super) async fn complete_copies(pool: &Pool, recovered: &mut Recovered) -> Result<()> {
    if planted(Bug::CopiesNotCompleted) {
        return Ok(());
    }
    let batches = &mut recovered.batches;
    let mut refused = vec![false; pool.members.len()];
    loop {
        // Again after each round: who holds a batch may have left service meanwhile.
        let copies = missing_copies(pool, batches, &refused)?;
        if copies.is_empty() {
            return Ok(());
        }
        let took = write_copies(pool, batches, &copies).await;
        for Copy { batch, device } in copies {
            match took[device] {
                true => batches[batch].devices.push(device),
                false => refused[device] = true,
            }
        }
    }
}

/// The copies to be written, spread over the devices that did not refuse any.
fn missing_copies(pool: &Pool, batches: &[FoundBatch], refused: &[bool]) -> Result<Vec<Copy>> {
    let needed = pool.geometry.journal_copies();
    let in_service = pool.in_service();
    let mut given = vec![0_u64; in_service.len()];
    let mut copies = Vec::new();
    for (number, batch) in batches.iter().enumerate() {
        let held = batch.devices.iter().filter(|device| in_service[**device]).count();
        let takes = |device: &usize| {
            in_service[*device] && !refused[*device] && !batch.devices.contains(device)
        };
        let mut others: Vec<usize> = (0..in_service.len()).filter(takes).collect();
        others.sort_by_key(|device| given[*device]);
        others.truncate(needed.saturating_sub(held));
        if held + others.len() < needed {
            return Err(Error::new(ErrorKind::Poisoned, "copy journal").context(format_args!(
                "{} devices hold a batch or can take it, {needed} are needed; attach more devices",
                held + others.len()
            )));
        }
        for device in others {
            given[device] += batch.header.batch_bytes();
            copies.push(Copy { batch: number, device });
        }
    }
    Ok(copies)
}

/// Writes copies in any order, then makes all of a device durable at once: one by one, a ring full of
/// small batches would take far longer than everything else a start does. Says which devices took
/// all of theirs.
async fn write_copies(pool: &Pool, batches: &[FoundBatch], copies: &[Copy]) -> Vec<bool> {
    let mut took = vec![true; pool.members.len()];
    let writes = copies.iter().map(|copy| async {
        let batch = &batches[copy.batch];
        let offset = JOURNAL_OFFSET + batch.header.position % pool.geometry.journal_bytes;
        let data = AlignedBuf::padded(&batch.bytes, batch.bytes.len()).freeze();
        let member = &pool.members[copy.device];
        (copy.device, member.write(offset, data, Durability::Volatile).await.is_ok())
    });
    let mut writes = stream::iter(writes).buffer_unordered(COPIES_AT_ONCE);
    while let Some((device, written)) = writes.next().await {
        took[device] &= written;
    }
    if planted(Bug::CopiesNotFlushed) {
        return took;
    }
    let concerned: BTreeSet<usize> = copies.iter().map(|copy| copy.device).collect();
    let flushes = concerned
        .into_iter()
        .map(|device| async move { (device, pool.members[device].flush().await.is_ok()) });
    for (device, flushed) in join_all(flushes).await {
        took[device] &= flushed;
    }
    took
}

/// The first LSN of the new epoch.
pub(super) fn epoch_start(recovered: &Recovered) -> Lsn {
    recovered.start.next_lsn
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::location::Location;

    const RING: u64 = 1 << 20;

    fn batch(position: u64, epoch: u64, entries: u32) -> FoundBatch {
        let header = BatchHeader {
            checksum: position + epoch,
            entries,
            body_checksum: 0,
            position,
            epoch,
            first_lsn: Lsn(10),
            previous: 7,
            durable_lsn: Lsn(9),
            body_bytes: 100,
        };
        FoundBatch { header, bytes: Bytes::new(), devices: vec![0] }
    }

    fn head(tail_position: u64) -> Superblock {
        Superblock {
            pod: PodId([1; 16]),
            device_uuid: [2; 16],
            device_index: 0,
            device_count: 3,
            data_strips: 1,
            parity_strips: 1,
            strip_bytes: 1 << 16,
            journal_bytes: RING,
            device_bytes: 1 << 30,
            generation: 5,
            epoch: 4,
            epoch_start: Lsn(11),
            tail_position,
            tail_lsn: Lsn(10),
            tail_previous: 7,
            id_limit: 1,
            checkpoint: 0,
            root: Location::HOLE,
            root_places: Vec::new(),
        }
    }

    #[test]
    fn a_checkpoint_that_ends_within_a_batch_proves_it_durable() {
        let head = head(0);
        assert_eq!(durable_beyond(Lsn(9), &head), Lsn(0), "the tail's batch may never have been");
        assert_eq!(durable_beyond(Lsn(10), &head), Lsn(11));
        assert_eq!(durable_beyond(Lsn(12), &head), Lsn(13), "another entry follows for certain");
    }

    /// An entry of epoch 3 was on few devices, which then were told of epoch 4 beyond it, alone. The
    /// others began epoch 4 before it. Their batch was too long for the rest of the ring.
    #[test]
    fn what_others_wrote_voids_what_an_open_cut_short_had_seen() {
        let end = RING - IO_ALIGN;
        let head = head(end);
        let wrapped = place_batch(end, RING, RING);
        assert_ne!(wrapped, end);
        let mut found = Found::new();
        found.insert(end, vec![batch(end, 3, 1)]);
        let starts = epoch_starts(&found, &head);
        let chain = walk_chain(std::mem::take(&mut found), &head, &starts);
        assert_eq!(chain.len(), 1, "nobody wrote in epoch 4");
        assert_eq!(chain[0].header.epoch, 3);

        found.insert(end, vec![batch(end, 3, 1)]);
        found.insert(wrapped, vec![batch(wrapped, 4, 2)]);
        let starts = epoch_starts(&found, &head);
        let chain = walk_chain(found, &head, &starts);
        let epochs: Vec<u64> = chain.iter().map(|batch| batch.header.epoch).collect();
        assert_eq!(epochs, [4], "what was acknowledged then");
    }
}

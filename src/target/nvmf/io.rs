//! Commands of I/O queues: what they ask of a namespace, and the work it takes.
//! (NVM Command Set 1.0, 3.2)
//!
//! A completed command has made durable what it changed, so Flush and FUA cost nothing: controllers
//! tell of no volatile write cache, and make no use of one that a volume has
//! (docs/decisions/0031-write-cache.md). Copy and metadata are refused. Reservations are in
//! `reservation`; that a command keeps to them is the volume's affair, which knows the host.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;
use std::task::ready;

use bytes::Bytes;
use weft_api::Operation;

use crate::env::LocalBoxFuture;
use crate::error::Result as VolumeResult;
use crate::target::nvmf::auth::Power;
use crate::target::nvmf::fused::Both;
use crate::target::nvmf::identify::TRANSFER_BYTES_MAX;
use crate::target::nvmf::queue::Transfer;
use crate::target::nvmf::reservation;
use crate::target::nvmf::status::Access;
use crate::target::nvmf::status::Status;
use crate::target::nvmf::status::status;
use crate::target::nvmf::subsystem::Namespace;
use crate::target::nvmf::subsystem::Namespaces;
use crate::target::nvmf::wire::Sgl;
use crate::target::nvmf::wire::Sqe;
use crate::target::nvmf::wire::opcode;
use crate::volume::Piece;
use crate::volume::READ_BYTES_MIN;
use crate::volume::Volume;
use crate::volume::VolumeRef;
use crate::volume::ZeroMode;
use crate::volume::pieces_equal;

/// Every namespace.
const NSID_ALL: u32 = u32::MAX;
/// Bytes of one range of Dataset Management, and how many fit one command.
const RANGE_BYTES: u32 = 16;
const RANGES_BYTES_MAX: u32 = 4096;

/// Bytes that Verify reads at a time.
const VERIFY_STEP_BYTES: u32 = 1 << 20;
/// Most bytes of a fused Compare and Write (NACWU): one block of the engine. Bounds what is kept
/// of halves that wait, and is all that VMware's ATS needs.
pub const FUSED_BYTES_MAX: u32 = 4096;

/// A byte range of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    offset: u64,
    bytes: u64,
}

/// What data a command moves, if it can be executed at all.
pub fn transfer(namespaces: &Namespaces, sqe: &Sqe) -> Result<Transfer, Status> {
    match sqe.opcode() {
        opcode::READ => Ok(Transfer::ToHost(span_bytes(namespaces, sqe)?)),
        opcode::COMPARE => {
            let bytes = span_bytes(namespaces, sqe)?;
            if sqe.fuse() != 0 && bytes > FUSED_BYTES_MAX {
                return Err(Status::ATOMIC_UNIT_EXCEEDED);
            }
            Ok(Transfer::FromHost(bytes))
        }
        opcode::WRITE => {
            check_writable(find(namespaces, sqe)?)?;
            Ok(Transfer::FromHost(span_bytes(namespaces, sqe)?))
        }
        opcode::VERIFY => span(find(namespaces, sqe)?, sqe).map(|_| Transfer::None),
        opcode::WRITE_ZEROES => {
            let namespace = find(namespaces, sqe)?;
            check_writable(namespace)?;
            span(namespace, sqe).map(|_| Transfer::None)
        }
        opcode::DATASET_MANAGEMENT => {
            check_writable(find(namespaces, sqe)?)?;
            let needed = (u32::from(sqe.u8(40)) + 1) * RANGE_BYTES;
            // Linux always sends 256 ranges and says how many of them count.
            let given = match sqe.sgl() {
                Sgl::InCapsule { length, .. } | Sgl::Transport { length } => length,
                Sgl::Unknown => needed,
            };
            if given < needed || given > RANGES_BYTES_MAX {
                return Err(Status::SGL_LENGTH_INVALID);
            }
            Ok(Transfer::FromHost(given))
        }
        opcode::FLUSH if sqe.nsid() == NSID_ALL => Ok(Transfer::None),
        opcode::FLUSH => find(namespaces, sqe).map(|_| Transfer::None),
        code if reservation::is_one(code) => {
            find(namespaces, sqe)?;
            reservation::transfer(sqe)
        }
        _ => Err(Status::INVALID_OPCODE),
    }
}

/// Memory that a command takes which moves that data: the data itself, and what is read for it.
#[must_use]
pub fn memory_bytes(sqe: &Sqe, transfer: Transfer) -> u32 {
    let least = u32::try_from(READ_BYTES_MIN).expect("less than 4 GiB");
    let moved = transfer.bytes();
    match sqe.opcode() {
        opcode::READ => moved.max(least),
        opcode::COMPARE => moved + moved.max(least),
        opcode::VERIFY => VERIFY_STEP_BYTES,
        _ => moved,
    }
}

/// As what a command is counted.
#[must_use]
pub fn operation(code: u8) -> Operation {
    match code {
        opcode::READ | opcode::COMPARE | opcode::VERIFY => Operation::Read,
        opcode::WRITE => Operation::Write,
        opcode::WRITE_ZEROES | opcode::DATASET_MANAGEMENT => Operation::Zero,
        opcode::FLUSH => Operation::Flush,
        _ => Operation::Other,
    }
}

/// Bytes a command is about, as far as it names them itself: of Dataset Management, none.
#[must_use]
pub fn counted_bytes(namespaces: &Namespaces, sqe: &Sqe) -> u64 {
    match operation(sqe.opcode()) {
        Operation::Flush | Operation::Other | Operation::Unknown => 0,
        Operation::Zero if sqe.opcode() == opcode::DATASET_MANAGEMENT => 0,
        Operation::Read | Operation::Write | Operation::Zero => {
            let span = find(namespaces, sqe).and_then(|namespace| span(namespace, sqe));
            span.map_or(0, |span| span.bytes)
        }
    }
}

/// The namespace a command names.
pub fn find<'a>(namespaces: &'a Namespaces, sqe: &Sqe) -> Result<&'a Namespace, Status> {
    namespaces.find(sqe.nsid()).ok_or(Status::INVALID_NAMESPACE)
}

fn check_writable(namespace: &Namespace) -> Result<(), Status> {
    if namespace.volume.read_only() {
        return Err(Status::WRITE_PROTECTED);
    }
    Ok(())
}

/// The bytes of a command that moves them, which MDTS bounds.
fn span_bytes(namespaces: &Namespaces, sqe: &Sqe) -> Result<u32, Status> {
    let namespace = find(namespaces, sqe)?;
    let bytes = (u64::from(sqe.u16(48)) + 1) << namespace.block_shift;
    let bytes = u32::try_from(bytes).map_err(|_| Status::INVALID_FIELD)?;
    if bytes > TRANSFER_BYTES_MAX {
        return Err(Status::INVALID_FIELD);
    }
    span(namespace, sqe)?;
    Ok(bytes)
}

/// The range that SLBA and NLB name.
fn span(namespace: &Namespace, sqe: &Sqe) -> Result<Span, Status> {
    range(namespace, sqe.u64(40), u64::from(sqe.u16(48)) + 1)
}

fn range(namespace: &Namespace, first: u64, blocks: u64) -> Result<Span, Status> {
    let end = first.checked_add(blocks).ok_or(Status::LBA_OUT_OF_RANGE)?;
    if end > namespace.blocks() {
        return Err(Status::LBA_OUT_OF_RANGE);
    }
    let shift = namespace.block_shift;
    Ok(Span { offset: first << shift, bytes: blocks << shift })
}

/// What executing a command came to at once.
pub enum Start {
    /// The read's data was in RAM; it is in `pieces`.
    Pieces,
    /// Nothing was left to do.
    Done,
    /// It takes time.
    Work(Work),
}

/// Executes a command whose [`transfer`] was accepted, with the host's data. `pieces` is empty and
/// takes the data of a read that RAM can answer.
pub fn execute(
    namespaces: &Namespaces,
    sqe: &Sqe,
    data: Bytes,
    pieces: &mut Vec<Piece>,
) -> Result<Start, Status> {
    if sqe.opcode() == opcode::FLUSH && sqe.nsid() == NSID_ALL {
        // Whatever this host was answered is durable, in every namespace.
        return Ok(Start::Done);
    }
    let namespace = find(namespaces, sqe)?;
    let volume = Arc::clone(&namespace.volume);
    Ok(Start::Work(match sqe.opcode() {
        opcode::READ => return read(namespace, sqe, pieces),
        opcode::WRITE => Work::Write(volume.write(span(namespace, sqe)?.offset, data)),
        opcode::COMPARE => {
            let span = span(namespace, sqe)?;
            let bytes = u32::try_from(span.bytes).map_err(|_| Status::INVALID_FIELD)?;
            Work::Compare { read: volume.read(span.offset, bytes), expected: data }
        }
        opcode::WRITE_ZEROES => {
            let span = span(namespace, sqe)?;
            let may_deallocate = sqe.u16(50) & 1 << 9 != 0;
            let mode = if may_deallocate { ZeroMode::Deallocate } else { ZeroMode::KeepAllocated };
            Work::Write(volume.zero(span.offset, span.bytes, mode))
        }
        opcode::DATASET_MANAGEMENT => {
            const DEALLOCATE: u32 = 1 << 2;
            // The other attributes are hints, of which we make no use: nothing but what forbids a
            // change is looked at.
            if sqe.u32(44) & DEALLOCATE == 0 {
                return Ok(Start::Work(Work::Write(volume.flush())));
            }
            let spans = ranges(namespace, usize::from(sqe.u8(40)) + 1, &data)?;
            Work::Write(deallocate(volume, spans))
        }
        opcode::FLUSH => Work::Write(volume.flush()),
        opcode::VERIFY => Work::Verify(verify(volume, span(namespace, sqe)?)),
        _ => return Err(Status::INVALID_OPCODE),
    }))
}

/// Executes a fused pair whose halves were accepted.
pub fn compare_and_write(namespaces: &Namespaces, both: Both) -> Result<Work, Status> {
    let namespace = find(namespaces, &both.first)?;
    check_writable(namespace)?;
    let offset = span(namespace, &both.first)?.offset;
    let volume = Arc::clone(&namespace.volume);
    Ok(Work::CompareAndWrite(volume.compare_and_write(offset, both.expected, both.data)))
}

fn read(namespace: &Namespace, sqe: &Sqe, pieces: &mut Vec<Piece>) -> Result<Start, Status> {
    let span = span(namespace, sqe)?;
    let bytes = u32::try_from(span.bytes).map_err(|_| Status::INVALID_FIELD)?;
    match namespace.volume.try_read(span.offset, bytes, pieces) {
        Ok(true) => Ok(Start::Pieces),
        Ok(false) => {
            let read = Arc::clone(&namespace.volume).read(span.offset, bytes);
            Ok(Start::Work(Work::Read(read)))
        }
        Err(error) => {
            pieces.clear();
            Err(status(error.kind(), Access::Read))
        }
    }
}

/// The ranges of a Dataset Management command, all checked before any is used.
fn ranges(namespace: &Namespace, count: usize, data: &[u8]) -> Result<Vec<Span>, Status> {
    let fields = data.chunks_exact(16).take(count).map(|entry| {
        let blocks = u32::from_le_bytes(entry[4..8].try_into().expect("4 bytes"));
        let first = u64::from_le_bytes(entry[8..16].try_into().expect("8 bytes"));
        range(namespace, first, u64::from(blocks))
    });
    fields.collect()
}

/// Deallocates what the volume can give back. Logical blocks that are only part of that stay as they
/// are, so they are not among those of which DLFEAT says how they read.
/// (NVM Command Set 1.0, 3.2.3: the controller may deallocate, and leaves the rest unchanged.)
fn deallocate(volume: Arc<dyn Volume>, spans: Vec<Span>) -> LocalBoxFuture<VolumeResult<()>> {
    Box::pin(async move {
        for span in spans.into_iter().filter(|span| span.bytes > 0) {
            let volume = VolumeRef::clone(&volume);
            volume.zero(span.offset, span.bytes, ZeroMode::Trim).await?;
        }
        Ok(())
    })
}

/// Reads everything, and keeps nothing.
fn verify(volume: Arc<dyn Volume>, span: Span) -> LocalBoxFuture<VolumeResult<()>> {
    Box::pin(async move {
        let end = span.offset + span.bytes;
        let mut at = span.offset;
        while at < end {
            let step = u64::from(VERIFY_STEP_BYTES).min(end - at);
            let bytes = u32::try_from(step).expect("at most a step");
            VolumeRef::clone(&volume).read(at, bytes).await?;
            at += step;
        }
        Ok(())
    })
}

/// What the volume is doing for a command.
///
/// # Cancellation
/// Dropping it is dropping the volume's future: a write is then wholly done or wholly undone, and
/// of a Dataset Management any part of its ranges.
pub enum Work {
    /// Data for the host.
    Read(LocalBoxFuture<VolumeResult<Vec<Piece>>>),
    /// Reading for the sake of it.
    Verify(LocalBoxFuture<VolumeResult<()>>),
    /// Both halves of a fused pair.
    CompareAndWrite(LocalBoxFuture<VolumeResult<bool>>),
    /// A change, or a flush.
    Write(LocalBoxFuture<VolumeResult<()>>),
    /// Data to compare with the host's.
    Compare {
        /// What is stored.
        read: LocalBoxFuture<VolumeResult<Vec<Piece>>>,
        /// What the host sent.
        expected: Bytes,
    },
    /// A change of reservations, which goes on when this is dropped.
    Change(LocalBoxFuture<Result<(), Status>>),
    /// A step of an authentication, for a command with room for so many bytes.
    Compute {
        /// What is computed.
        power: LocalBoxFuture<Result<Power, Status>>,
        /// As the command said.
        room: u32,
    },
}

/// What it came to.
pub enum Outcome {
    /// Data for the host.
    Pieces(Vec<Piece>),
    /// Done.
    Done,
    /// What was to be compared is not what is stored.
    Differs,
    /// What a step of an authentication came to, and the room of its command.
    Computed(Power, u32),
}

impl Future for Work {
    type Output = Result<Outcome, Status>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let failed = |access| {
            move |error: crate::error::Error| {
                tracing::debug!(error = %error.chain(), "NVMe command failed");
                status(error.kind(), access)
            }
        };
        Poll::Ready(match self.get_mut() {
            Self::Read(read) => {
                ready!(read.as_mut().poll(cx)).map(Outcome::Pieces).map_err(failed(Access::Read))
            }
            Self::Verify(verify) => ready!(verify.as_mut().poll(cx))
                .map(|()| Outcome::Done)
                .map_err(failed(Access::Read)),
            Self::CompareAndWrite(both) => ready!(both.as_mut().poll(cx))
                .map(|same| if same { Outcome::Done } else { Outcome::Differs })
                .map_err(failed(Access::Write)),
            Self::Write(write) => ready!(write.as_mut().poll(cx))
                .map(|()| Outcome::Done)
                .map_err(failed(Access::Write)),
            Self::Compare { read, expected } => {
                let pieces = ready!(read.as_mut().poll(cx)).map_err(failed(Access::Read));
                pieces.map(|pieces| match pieces_equal(&pieces, expected) {
                    true => Outcome::Done,
                    false => Outcome::Differs,
                })
            }
            Self::Change(change) => ready!(change.as_mut().poll(cx)).map(|()| Outcome::Done),
            Self::Compute { power, room } => {
                ready!(power.as_mut().poll(cx)).map(|power| Outcome::Computed(power, *room))
            }
        })
    }
}

//! One client's requests on one export: checks them, asks the volume, replies. No I/O of its own.
//!
//! [`Session::execute`] answers what RAM can answer at once into the outbox, and hands back a
//! future for the rest; [`Session::complete`] turns its result into a reply. The connection owns
//! both ends.
//!
//! # Invariants
//! * Every request gets exactly one final reply, except DISC.
//! * After ESHUTDOWN was sent, [`Session::ending`] stays true and every request gets it.
//!
//! FLUSH and FUA cost nothing: a completed write is durable (`volume`), so CAN_MULTI_CONN and
//! SEND_FUA hold by themselves. FAST_ZERO likewise: zeroing never costs more than writing.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;
use std::task::ready;

use bytes::Bytes;

use crate::env::LocalBoxFuture;
use crate::error::Error;
use crate::error::Result;
use crate::target::nbd::counters::Tally;
use crate::target::nbd::handshake::Negotiated;
use crate::target::nbd::options::BASE_ALLOCATION_ID;
use crate::target::nbd::outbox::Outbox;
use crate::target::nbd::status::NbdError;
use crate::target::nbd::status::nbd_error;
use crate::target::nbd::wire::Command;
use crate::target::nbd::wire::Dialect;
use crate::target::nbd::wire::PAYLOAD_BYTES_MAX;
use crate::target::nbd::wire::Request;
use crate::target::nbd::wire::StatusPayload;
use crate::target::nbd::wire::Tag;
use crate::volume::Extent;
use crate::volume::Piece;
use crate::volume::VolumeRef;
use crate::volume::ZeroMode;

/// Extents in one BLOCK_STATUS reply: 128 KiB or 256 KiB of them. A client asks again for what is
/// left. (proto.md, "NBD_CMD_BLOCK_STATUS" lets a reply cover less than was asked.)
const EXTENTS_MAX: usize = 16 * 1024;
/// What one BLOCK_STATUS in flight counts for: its extents in memory and on the wire.
const EXTENTS_COST_BYTES: u64 = 1 << 20;

/// A transmission phase.
pub struct Session {
    volume: VolumeRef,
    dialect: Dialect,
    base_allocation: bool,
    ending: bool,
    /// Reused by every read.
    pieces: Vec<Piece>,
    /// Counted since the last [`Session::take_tally`].
    tally: Tally,
}

impl Session {
    /// Starts on what the handshake agreed.
    #[must_use]
    pub fn new(negotiated: Negotiated) -> Self {
        Self {
            volume: negotiated.volume,
            dialect: negotiated.dialect,
            base_allocation: negotiated.base_allocation,
            ending: false,
            pieces: Vec::new(),
            tally: Tally::default(),
        }
    }

    /// Refuses every further request with ESHUTDOWN.
    pub fn end(&mut self) {
        self.ending = true;
    }

    /// Whether the session is to close once what is in flight has been answered.
    #[must_use]
    pub fn ending(&self) -> bool {
        self.ending
    }

    /// Whether the volume went away, of which an idle session has to be told.
    #[must_use]
    pub fn volume_closed(&self) -> bool {
        self.volume.closed()
    }

    /// What was counted since the last call.
    pub fn take_tally(&mut self) -> Tally {
        std::mem::take(&mut self.tally)
    }

    /// Replies to a request that was malformed.
    pub fn refuse(&mut self, tag: Tag, reason: &str, out: &mut Outbox) {
        self.tally.requests += 1;
        self.fail(tag, NbdError::Invalid, reason, out);
    }

    /// Executes a request: replies at once, or returns the work that will lead to a reply.
    ///
    /// DISC is the connection's affair and must not come here.
    pub fn execute(
        &mut self,
        mut request: Request,
        payload: Bytes,
        out: &mut Outbox,
    ) -> Option<InFlight> {
        self.tally.requests += 1;
        if let Err((error, reason)) = self.check(&mut request, &payload) {
            self.fail(request.tag, error, reason, out);
            return None;
        }
        let (offset, length) = (request.tag.offset, request.length);
        let volume = Arc::clone(&self.volume);
        let (work, cost_bytes) = match request.command {
            Command::Read => return self.read(request, out),
            Command::Write if length > 0 => (Work::Plain(volume.write(offset, payload)), length),
            Command::Trim if length > 0 => {
                (Work::Plain(volume.zero(offset, length, ZeroMode::Deallocate)), 0)
            }
            Command::WriteZeroes if length > 0 => {
                let mode =
                    if request.no_hole { ZeroMode::KeepAllocated } else { ZeroMode::Deallocate };
                (Work::Plain(volume.zero(offset, length, mode)), 0)
            }
            Command::Flush => (Work::Plain(volume.flush()), 0),
            Command::Cache if length > 0 => (Work::Plain(volume.prefetch(offset, length)), 0),
            Command::BlockStatus => {
                let extents_max = if request.request_one { 1 } else { EXTENTS_MAX };
                let cost = if request.request_one { 0 } else { EXTENTS_COST_BYTES };
                (Work::Status(volume.block_status(offset, length, extents_max)), cost)
            }
            Command::Write | Command::Trim | Command::WriteZeroes | Command::Cache => {
                out.done(self.dialect, request.tag);
                return None;
            }
            Command::Disconnect => unreachable!("the connection ends on DISC"),
        };
        Some(InFlight { request, cost_bytes, work })
    }

    /// Replies with what a finished request brought.
    pub fn complete(&mut self, completed: Completed, out: &mut Outbox) {
        let request = completed.request;
        match completed.outcome {
            Ok(Outcome::Done) => {
                if request.command == Command::Write {
                    self.tally.bytes_written += request.length;
                }
                out.done(self.dialect, request.tag);
            }
            Ok(Outcome::Pieces(mut pieces)) => self.reply_read(request, &mut pieces, out),
            Ok(Outcome::Extents(extents)) if extents.is_empty() => {
                self.fail(request.tag, NbdError::Io, "no block status", out);
            }
            Ok(Outcome::Extents(extents)) => out.extents(self.dialect, request.tag, &extents),
            Err(error) => self.fail_with(request, &error, out),
        }
    }

    /// Checks what depends on the export and the dialect, and reads a BLOCK_STATUS payload.
    fn check(
        &mut self,
        request: &mut Request,
        payload: &[u8],
    ) -> Result<(), (NbdError, &'static str)> {
        let command = request.command;
        if self.ending || self.volume.closed() {
            self.ending = true;
            return Err((NbdError::Shutdown, NbdError::Shutdown.text()));
        }
        if command.writes() && self.volume.read_only() {
            return Err((NbdError::NotPermitted, NbdError::NotPermitted.text()));
        }
        if command == Command::Flush {
            // Its offset and length are reserved; whatever they hold means nothing.
            return Ok(());
        }
        if command == Command::BlockStatus {
            self.check_block_status(request, payload)?;
        }
        if command == Command::Read {
            self.check_read(request)?;
        }
        let end = request.tag.offset.checked_add(request.length);
        if end.is_none_or(|end| end > self.volume.size_bytes()) {
            let past_end = nbd_error(crate::error::ErrorKind::OutOfRange, command);
            return Err((past_end, "past the end of the export"));
        }
        Ok(())
    }

    fn check_read(&self, request: &Request) -> Result<(), (NbdError, &'static str)> {
        let chunked = self.dialect != Dialect::Simple;
        if request.dont_fragment && !chunked {
            return Err((NbdError::Invalid, "DF without structured replies"));
        }
        if request.length > u64::from(PAYLOAD_BYTES_MAX) {
            let error = if chunked { NbdError::Overflow } else { NbdError::Invalid };
            return Err((error, NbdError::Overflow.text()));
        }
        Ok(())
    }

    fn check_block_status(
        &self,
        request: &mut Request,
        payload: &[u8],
    ) -> Result<(), (NbdError, &'static str)> {
        if !self.base_allocation {
            return Err((NbdError::Invalid, "no metadata context was selected"));
        }
        if !payload.is_empty() {
            let payload = StatusPayload::decode(payload)
                .filter(|payload| payload.contexts == [BASE_ALLOCATION_ID])
                .ok_or((NbdError::Invalid, "unknown or repeated metadata context"))?;
            request.length = payload.length;
        }
        if request.length == 0 {
            return Err((NbdError::Invalid, "block status of nothing"));
        }
        Ok(())
    }

    /// Answers a read from RAM, or starts one that asks devices.
    fn read(&mut self, request: Request, out: &mut Outbox) -> Option<InFlight> {
        let bytes = u32::try_from(request.length).expect("checked against the maximum");
        if bytes == 0 {
            // Chunked dialects know no empty data chunk.
            out.done(self.dialect, request.tag);
            return None;
        }
        let mut pieces = std::mem::take(&mut self.pieces);
        match self.volume.try_read(request.tag.offset, bytes, &mut pieces) {
            Ok(true) => self.reply_read(request, &mut pieces, out),
            Ok(false) => {
                let read = Arc::clone(&self.volume).read(request.tag.offset, bytes);
                self.pieces = pieces;
                let cost_bytes = u64::from(bytes);
                return Some(InFlight { request, cost_bytes, work: Work::Read(read) });
            }
            Err(error) => {
                pieces.clear();
                self.fail_with(request, &error, out);
            }
        }
        self.pieces = pieces;
        None
    }

    fn reply_read(&mut self, request: Request, pieces: &mut Vec<Piece>, out: &mut Outbox) {
        debug_assert_eq!(
            pieces.iter().map(|piece| crate::units::bytes_u64(piece.len())).sum::<u64>(),
            request.length,
            "pieces cover the request"
        );
        self.tally.bytes_read += request.length;
        out.read(self.dialect, request.tag, request.dont_fragment, pieces);
    }

    fn fail_with(&mut self, request: Request, error: &Error, out: &mut Outbox) {
        let value = nbd_error(error.kind(), request.command);
        if value == NbdError::Shutdown {
            self.ending = true;
        }
        tracing::debug!(command = ?request.command, error = %error.chain(), "request failed");
        self.fail(request.tag, value, value.text(), out);
    }

    fn fail(&mut self, tag: Tag, error: NbdError, reason: &str, out: &mut Outbox) {
        self.tally.errors += 1;
        out.error(self.dialect, tag, error, reason);
    }
}

/// What the volume is doing for a request.
enum Work {
    Read(LocalBoxFuture<Result<Vec<Piece>>>),
    Plain(LocalBoxFuture<Result<()>>),
    Status(LocalBoxFuture<Result<Vec<Extent>>>),
}

enum Outcome {
    Pieces(Vec<Piece>),
    Done,
    Extents(Vec<Extent>),
}

/// A request being executed.
///
/// # Cancellation
/// Dropping it is dropping the volume's future: a write is then wholly done or wholly undone. The
/// connection does not: it lets writes run to their end.
pub struct InFlight {
    request: Request,
    /// Memory it may hold, in bytes: its payload or its reply.
    cost_bytes: u64,
    work: Work,
}

/// A finished request, to be replied to.
pub struct Completed {
    request: Request,
    cost_bytes: u64,
    outcome: Result<Outcome>,
}

impl InFlight {
    /// Memory it may hold, in bytes.
    #[must_use]
    pub fn cost_bytes(&self) -> u64 {
        self.cost_bytes
    }

    /// Whether it changes the volume.
    #[must_use]
    pub fn writes(&self) -> bool {
        self.request.command.writes()
    }
}

impl Completed {
    /// See [`InFlight::cost_bytes`].
    #[must_use]
    pub fn cost_bytes(&self) -> u64 {
        self.cost_bytes
    }
}

impl Future for InFlight {
    type Output = Completed;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Completed> {
        let outcome = match &mut self.work {
            Work::Read(read) => ready!(read.as_mut().poll(cx)).map(Outcome::Pieces),
            Work::Plain(work) => ready!(work.as_mut().poll(cx)).map(|()| Outcome::Done),
            Work::Status(status) => ready!(status.as_mut().poll(cx)).map(Outcome::Extents),
        };
        Poll::Ready(Completed { request: self.request, cost_bytes: self.cost_bytes, outcome })
    }
}

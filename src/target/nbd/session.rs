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
//! FLUSH and FUA cost nothing where a completed write is durable (`volume`). Where there is a volatile
//! write cache, FLUSH waits for all that was answered on any connection, so CAN_MULTI_CONN holds too,
//! and a change with FUA goes around it. FAST_ZERO holds by itself: zeroing never costs more than
//! writing.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;
use std::task::ready;

use bytes::Bytes;
use tokio::time::Instant;
use weft_api::FrontEnd;
use weft_api::Operation;

use crate::env::LocalBoxFuture;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::target::connections::Tally;
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
use crate::target::timing::Begun;
use crate::target::timing::Timing;
use crate::units::bytes_u64;
use crate::volume::Extent;
use crate::volume::PREFETCH_STEP_BYTES;
use crate::volume::Piece;
use crate::volume::READ_BYTES_MIN;
use crate::volume::VolumeRef;
use crate::volume::ZeroMode;

/// Extents in one BLOCK_STATUS reply: 128 KiB or 256 KiB of them. A client asks again for what is
/// left. (proto.md, "NBD_CMD_BLOCK_STATUS" lets a reply cover less than was asked.)
const EXTENTS_MAX: usize = 16 * 1024;
/// What one BLOCK_STATUS in flight takes: its extents in memory and on the wire.
const EXTENTS_MEMORY_BYTES: u64 = 1 << 20;

/// Pieces for which room is kept from one read to the next: those of the largest from whole chunks.
const PIECES_KEPT: usize = 1024;

/// A transmission phase.
pub struct Session {
    volume: VolumeRef,
    /// The same, for requests with FUA.
    write_through: VolumeRef,
    dialect: Dialect,
    base_allocation: bool,
    ending: bool,
    /// Reused by every read.
    pieces: Vec<Piece>,
    /// Counted since the last [`Session::take_tally`].
    tally: Tally,
    timing: Timing,
}

impl Session {
    /// Starts on what the handshake agreed; `timed` as in [`super::NbdOptions`].
    #[must_use]
    pub fn new(negotiated: Negotiated, timed: bool) -> Self {
        Self {
            write_through: Arc::clone(&negotiated.volume).write_through(),
            volume: negotiated.volume,
            dialect: negotiated.dialect,
            base_allocation: negotiated.base_allocation,
            ending: false,
            pieces: Vec::new(),
            tally: Tally::default(),
            timing: Timing::new(FrontEnd::Nbd, timed),
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

    /// Whether the volume went away, or is not for clients of NBD any more.
    #[must_use]
    pub fn volume_gone(&self) -> bool {
        self.volume.closed() || !self.volume.admits(None)
    }

    /// What was counted since the last call.
    pub fn take_tally(&mut self) -> Tally {
        std::mem::take(&mut self.tally)
    }

    /// How long requests take.
    pub fn timing(&mut self) -> &mut Timing {
        &mut self.timing
    }

    /// Replies to a request that was malformed.
    pub fn refuse(&mut self, tag: Tag, reason: &str, out: &mut Outbox) {
        self.tally.requests += 1;
        self.timing.failed(self.volume.requests(), Operation::Other);
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
            self.timing.failed(self.volume.requests(), operation(request.command));
            self.fail(request.tag, error, reason, out);
            return None;
        }
        let (offset, length) = (request.tag.offset, request.length);
        let volume = Arc::clone(if request.fua { &self.write_through } else { &self.volume });
        let work = match request.command {
            Command::Read => return self.read(request, out),
            Command::Write if length > 0 => Work::Plain(volume.write(offset, payload)),
            Command::Trim if length > 0 => Work::Plain(volume.zero(offset, length, ZeroMode::Trim)),
            Command::WriteZeroes if length > 0 => {
                let mode =
                    if request.no_hole { ZeroMode::KeepAllocated } else { ZeroMode::Deallocate };
                Work::Plain(volume.zero(offset, length, mode))
            }
            Command::Flush => Work::Plain(volume.flush()),
            Command::Cache if length > 0 => Work::Plain(volume.prefetch(offset, length)),
            Command::BlockStatus => {
                let extents_max = if request.request_one { 1 } else { EXTENTS_MAX };
                Work::Status(volume.block_status(offset, length, extents_max))
            }
            Command::Write | Command::Trim | Command::WriteZeroes | Command::Cache => {
                out.done(self.dialect, request.tag);
                return None;
            }
            Command::Disconnect => unreachable!("the connection ends on DISC"),
        };
        Some(self.begin(request, work))
    }

    fn begin(&self, request: Request, work: Work) -> InFlight {
        let requests = Arc::clone(self.volume.requests());
        let operation = operation(request.command);
        let arrival = self.timing.arrival();
        let bytes = match request.command {
            Command::Read | Command::Write | Command::Trim | Command::WriteZeroes => request.length,
            // Of a flush it is reserved and may hold anything; the others change and return no data.
            Command::Flush | Command::Cache | Command::BlockStatus | Command::Disconnect => 0,
        };
        let begun = Begun::new(requests, operation, bytes, arrival, Instant::now());
        InFlight { request, work, begun }
    }

    /// Replies with what a finished request brought.
    pub fn complete(&mut self, completed: Completed, out: &mut Outbox) {
        let Completed { request, outcome, begun, .. } = completed;
        match outcome {
            Ok(_) => self.timing.finished(begun, Instant::now()),
            Err(_) => self.timing.failed_under_way(Some(&begun)),
        }
        match outcome {
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
        // Looked at for each request: one that comes after the operator was told that the volume is
        // for others now must not change it.
        if self.ending || self.volume_gone() {
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
            let past_end = nbd_error(ErrorKind::OutOfRange, command);
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
            Ok(true) => {
                self.timing.answered(self.volume.requests(), Operation::Read, request.length);
                self.reply_read(request, &mut pieces, out);
            }
            Ok(false) => {
                let read = Arc::clone(&self.volume).read(request.tag.offset, bytes);
                self.pieces = pieces;
                return Some(self.begin(request, Work::Read(read)));
            }
            Err(error) => {
                pieces.clear();
                self.timing.failed(self.volume.requests(), Operation::Read);
                self.fail_with(request, &error, out);
            }
        }
        pieces.shrink_to(PIECES_KEPT);
        self.pieces = pieces;
        None
    }

    fn reply_read(&mut self, request: Request, pieces: &mut Vec<Piece>, out: &mut Outbox) {
        debug_assert_eq!(
            pieces.iter().map(|piece| bytes_u64(piece.len())).sum::<u64>(),
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

/// Memory that a request takes until it is answered, beyond a little: its payload or its reply.
#[must_use]
pub fn memory_bytes(request: &Request) -> u64 {
    match request.command {
        // A longer one is refused.
        Command::Read if request.length > u64::from(PAYLOAD_BYTES_MAX) => 0,
        Command::Read => request.length.max(READ_BYTES_MIN),
        Command::Write => u64::from(request.payload_bytes),
        Command::Cache => request.length.min(PREFETCH_STEP_BYTES),
        Command::BlockStatus if request.request_one => 0,
        Command::BlockStatus => EXTENTS_MEMORY_BYTES,
        Command::Trim | Command::WriteZeroes | Command::Flush | Command::Disconnect => 0,
    }
}

/// As what a request is counted.
fn operation(command: Command) -> Operation {
    match command {
        Command::Read => Operation::Read,
        Command::Write => Operation::Write,
        Command::Trim | Command::WriteZeroes => Operation::Zero,
        Command::Flush => Operation::Flush,
        Command::Cache | Command::BlockStatus | Command::Disconnect => Operation::Other,
    }
}

/// What the volume is doing for a request.
enum Work {
    Read(LocalBoxFuture<Result<Vec<Piece>>>),
    Plain(LocalBoxFuture<Result<()>>),
    Status(LocalBoxFuture<Result<Vec<Extent>>>),
}

impl Work {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Outcome>> {
        Poll::Ready(match self {
            Self::Read(read) => ready!(read.as_mut().poll(cx)).map(Outcome::Pieces),
            Self::Plain(work) => ready!(work.as_mut().poll(cx)).map(|()| Outcome::Done),
            Self::Status(status) => ready!(status.as_mut().poll(cx)).map(Outcome::Extents),
        })
    }
}

enum Outcome {
    Pieces(Vec<Piece>),
    Done,
    Extents(Vec<Extent>),
}

/// A request being executed.
///
/// # Cancellation
/// Dropping it is dropping the volume's future: a write is then wholly done or wholly undone.
pub struct InFlight {
    request: Request,
    work: Work,
    begun: Begun,
}

/// A finished request, to be replied to.
pub struct Completed {
    request: Request,
    outcome: Result<Outcome>,
    begun: Begun,
}

impl InFlight {
    /// See [`memory_bytes`].
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        memory_bytes(&self.request)
    }
}

impl Completed {
    /// See [`memory_bytes`].
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        memory_bytes(&self.request)
    }
}

impl Future for InFlight {
    type Output = Completed;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Completed> {
        let Self { request, work, begun } = self.get_mut();
        let outcome = ready!(begun.stages.during(|| work.poll(cx)));
        Poll::Ready(Completed { request: *request, outcome, begun: begun.clone() })
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::target::nbd::framing::Event;
    use crate::target::nbd::framing::Framing;
    use crate::target::nbd::wire::put_u16;
    use crate::target::nbd::wire::put_u32;
    use crate::target::nbd::wire::put_u64;
    use crate::volume::Volume;
    use crate::volume::memory::MemoryVolume;
    use crate::volume::reservation::Hold;
    use crate::volume::reservation::HoldKind;
    use crate::volume::reservation::Reservations;

    const SIZE: u64 = 1 << 20;
    const EPERM: u32 = 1;
    const EIO: u32 = 5;
    const EINVAL: u32 = 22;
    const ENOSPC: u32 = 28;
    const EOVERFLOW: u32 = 75;
    const ESHUTDOWN: u32 = 108;
    /// Command numbers.
    const READ: u16 = 0;
    const WRITE: u16 = 1;
    const FLUSH: u16 = 3;
    const TRIM: u16 = 4;
    const CACHE: u16 = 5;
    const WRITE_ZEROES: u16 = 6;
    const BLOCK_STATUS: u16 = 7;
    /// Flags.
    const FUA: u16 = 1;
    const NO_HOLE: u16 = 2;
    const DF: u16 = 4;
    const REQ_ONE: u16 = 8;
    const FAST_ZERO: u16 = 16;
    const PAYLOAD_LEN: u16 = 32;

    /// A session and its client, without a stream between them.
    struct Client {
        volume: Arc<MemoryVolume>,
        dialect: Dialect,
        framing: Framing,
        session: Session,
    }

    /// One reply, its chunks' kinds and payloads if it had any.
    #[derive(Debug, PartialEq, Eq)]
    struct Reply {
        error: u32,
        kinds: Vec<u16>,
        data: Vec<u8>,
    }

    impl Client {
        fn new(dialect: Dialect) -> Self {
            Self::on(MemoryVolume::new("v", SIZE), dialect)
        }

        fn on(volume: MemoryVolume, dialect: Dialect) -> Self {
            let volume = Arc::new(volume);
            let negotiated = Negotiated {
                volume: Arc::clone(&volume) as _,
                dialect,
                base_allocation: dialect != Dialect::Simple,
            };
            let session = Session::new(negotiated, true);
            Self { volume, dialect, framing: Framing::new(dialect), session }
        }

        fn request(&self, flags: u16, command: u16, offset: u64, length: u64) -> Vec<u8> {
            let mut bytes = Vec::new();
            let extended = self.dialect == Dialect::Extended;
            put_u32(&mut bytes, if extended { 0x21e4_1c71 } else { 0x2560_9513 });
            put_u16(&mut bytes, flags);
            put_u16(&mut bytes, command);
            put_u64(&mut bytes, 42);
            put_u64(&mut bytes, offset);
            if extended {
                put_u64(&mut bytes, length);
            } else {
                put_u32(&mut bytes, u32::try_from(length).unwrap());
            }
            bytes
        }

        fn ask(&mut self, flags: u16, command: u16, offset: u64, length: u64) -> Reply {
            self.ask_with(flags, command, offset, length, &[])
        }

        /// Sends one request with a payload and returns its reply.
        fn ask_with(
            &mut self,
            flags: u16,
            command: u16,
            offset: u64,
            length: u64,
            payload: &[u8],
        ) -> Reply {
            let mut bytes = self.request(flags, command, offset, length);
            bytes.extend_from_slice(payload);
            let mut out = Outbox::default();
            let mut input = bytes.as_slice();
            match self.framing.next(&mut input, u64::MAX) {
                Event::Request(request, payload) => {
                    if let Some(work) = self.session.execute(request, payload, &mut out) {
                        let completed = work.now_or_never().expect("memory answers at once");
                        self.session.complete(completed, &mut out);
                    }
                }
                Event::Refused(tag, reason) => self.session.refuse(tag, reason, &mut out),
                event => panic!("{event:?}"),
            }
            assert!(input.is_empty(), "the payload is consumed");
            let sent: Vec<u8> =
                out.gather.slices().iter().flat_map(|slice| slice.to_vec()).collect();
            self.parse(&sent)
        }

        fn write(&mut self, offset: u64, data: &[u8]) -> Reply {
            let flags = if self.dialect == Dialect::Extended { PAYLOAD_LEN } else { 0 };
            let length = bytes_u64(data.len());
            self.ask_with(flags, WRITE, offset, length, data)
        }

        /// Reads one whole reply, and nothing else, from `bytes`.
        fn parse(&self, mut bytes: &[u8]) -> Reply {
            let mut reply = Reply { error: 0, kinds: Vec::new(), data: Vec::new() };
            let word = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
            if self.dialect == Dialect::Simple {
                assert_eq!(word(&bytes[..4]), 0x6744_6698);
                reply.error = word(&bytes[4..8]);
                reply.data = bytes[16..].to_vec();
                return reply;
            }
            let extended = self.dialect == Dialect::Extended;
            let header = if extended { 32 } else { 20 };
            loop {
                assert_eq!(word(&bytes[..4]), if extended { 0x6e8a_278c } else { 0x668e_33ef });
                assert_eq!(bytes[8..16], 42_u64.to_be_bytes());
                let last = bytes[5] == 1;
                let kind = u16::from_be_bytes([bytes[6], bytes[7]]);
                let length = usize::try_from(word(&bytes[header - 4..header])).unwrap();
                let payload = &bytes[header..header + length];
                if kind == 0x8001 {
                    reply.error = word(&payload[..4]);
                } else {
                    reply.data.extend_from_slice(payload);
                }
                reply.kinds.push(kind);
                bytes = &bytes[header + length..];
                if last {
                    assert!(bytes.is_empty(), "nothing after the final chunk");
                    return reply;
                }
            }
        }
    }

    const DIALECTS: [Dialect; 3] = [Dialect::Simple, Dialect::Structured, Dialect::Extended];

    #[test]
    fn a_volume_that_is_for_others_now_takes_no_more_writes() {
        for dialect in DIALECTS {
            let mut client = Client::new(dialect);
            assert_eq!(client.write(0, &[7; 4096]).error, 0);
            client.volume.serve_only(Some("nqn.another"));
            assert_eq!(client.write(0, &[8; 4096]).error, ESHUTDOWN);
            assert_eq!(client.ask(0, READ, 0, 4096).error, ESHUTDOWN);
            assert!(client.session.ending());
        }
    }

    // spec: nbd-flush
    #[test]
    fn flush_empties_a_write_cache_and_fua_goes_around_it() {
        for dialect in DIALECTS {
            let mut client = Client::on(MemoryVolume::new("v", SIZE).with_write_cache(), dialect);
            assert_eq!(client.write(0, &[7; 4096]).error, 0);
            assert_eq!(client.ask(0, TRIM, 0, 4096).error, 0);
            assert_eq!(client.ask(0, WRITE_ZEROES, 0, 4096).error, 0);
            assert_eq!(client.volume.unflushed(), 3);
            assert_eq!(client.ask(0, FLUSH, 0, 0).error, 0);
            assert_eq!(client.volume.unflushed(), 0);
            for command in [TRIM, WRITE_ZEROES] {
                assert_eq!(client.ask(FUA, command, 0, 4096).error, 0);
                assert_eq!(client.volume.unflushed(), 0, "{command}");
            }
            let flags = FUA | if dialect == Dialect::Extended { PAYLOAD_LEN } else { 0 };
            assert_eq!(client.ask_with(flags, WRITE, 0, 4096, &[8; 4096]).error, 0);
            assert_eq!(client.volume.unflushed(), 0);
        }
    }

    #[test]
    fn only_bytes_that_are_read_written_or_zeroed_are_counted() {
        let mut client = Client::new(Dialect::Extended);
        client.write(0, &[7; 4096]);
        client.ask(0, READ, 0, 512);
        client.ask(0, TRIM, 0, 4096);
        client.ask(0, FLUSH, u64::MAX, u64::MAX);
        client.ask(0, CACHE, 0, SIZE);
        client.ask(0, BLOCK_STATUS, 0, SIZE);
        let now = Instant::now();
        client.session.timing().sent(now, now);
        let mut bytes: Vec<_> =
            client.volume.requests().snapshot().iter().map(|kind| kind.bytes).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, [0, 0, 512, 4096, 4096]);
    }

    // spec: nbd-read-write
    #[test]
    fn what_is_written_reads_back_in_every_dialect() {
        for dialect in DIALECTS {
            let mut client = Client::new(dialect);
            assert_eq!(client.write(4096, &[7; 8192]).error, 0);
            let reply = client.ask(0, READ, 4096 + 512, 512);
            assert_eq!((reply.error, &reply.data[reply.data.len() - 512..]), (0, &[7; 512][..]));
            let hole = client.ask(0, READ, 0, 8192);
            match dialect {
                Dialect::Simple => assert_eq!(hole.data, [[0; 4096], [7; 4096]].concat()),
                _ => assert_eq!(hole.kinds, [2, 1]),
            }
        }
    }

    /// A client of ours is a host that has registered nothing, whatever others have reserved.
    #[test]
    fn a_reserved_volume_is_closed_to_clients_as_to_any_host_that_did_not_register() {
        for dialect in DIALECTS {
            for kind in [HoldKind::WriteExclusiveAll, HoldKind::ExclusiveAccess] {
                let mut client = Client::new(dialect);
                assert_eq!(client.write(0, &[7; 4096]).error, 0);
                let host = uuid::Uuid::from_u128(1);
                let next = Reservations {
                    registrants: [(host, 1)].into(),
                    held: Some(Hold { kind, host: (!kind.held_by_all()).then_some(host) }),
                    ..Reservations::default()
                };
                let seen = client.volume.reservations();
                let replaced = Arc::clone(&client.volume).replace_reservations(seen, next);
                assert!(replaced.now_or_never().expect("at once").expect("replaced"));

                assert_eq!(client.write(0, &[8; 4096]).error, EPERM);
                for command in [TRIM, WRITE_ZEROES, FLUSH] {
                    assert_eq!(client.ask(0, command, 0, 4096).error, EPERM, "{command}");
                }
                let expected = if kind.keeps_readers_out() { EPERM } else { 0 };
                let reads = if dialect == Dialect::Simple { 2 } else { 3 };
                for command in [READ, CACHE, BLOCK_STATUS].into_iter().take(reads) {
                    assert_eq!(client.ask(0, command, 0, 4096).error, expected, "{command}");
                }
                let seen = client.volume.reservations();
                let replaced =
                    Arc::clone(&client.volume).replace_reservations(seen, Reservations::default());
                assert!(replaced.now_or_never().expect("at once").expect("replaced"));
                let reply = client.ask(0, READ, 0, 4096);
                assert_eq!((reply.error, reply.data.ends_with(&[7; 4096])), (0, true));
                assert_eq!(client.write(0, &[8; 4096]).error, 0);
            }
        }
    }

    // spec: nbd-df
    #[test]
    fn df_gives_one_chunk_and_needs_chunks() {
        let mut client = Client::new(Dialect::Structured);
        client.write(8192, &[1; 512]);
        assert_eq!(client.ask(DF, READ, 0, 65536).kinds, [1]);
        assert_eq!(Client::new(Dialect::Simple).ask(DF, READ, 0, 512).error, EINVAL);
    }

    // spec: nbd-range
    #[test]
    fn past_the_end_depends_on_the_command() {
        for dialect in DIALECTS {
            let mut client = Client::new(dialect);
            for (offset, length) in [(SIZE, 512), (SIZE - 512, 1024), (u64::MAX, 512)] {
                for (command, error) in
                    [(READ, EINVAL), (TRIM, EINVAL), (CACHE, EINVAL), (WRITE_ZEROES, ENOSPC)]
                {
                    assert_eq!(client.ask(0, command, offset, length).error, error);
                }
                assert_eq!(client.write(offset, &[1; 1024]).error, ENOSPC);
            }
            if dialect != Dialect::Simple {
                assert_eq!(client.ask(0, BLOCK_STATUS, SIZE, 512).error, EINVAL);
            }
        }
    }

    // spec: nbd-read-only
    #[test]
    fn read_only_exports_refuse_writes_with_eperm() {
        let mut client = Client::on(MemoryVolume::new("v", SIZE).read_only(), Dialect::Simple);
        assert_eq!(client.write(0, &[1; 512]).error, EPERM);
        assert_eq!(client.ask(0, TRIM, 0, 512).error, EPERM);
        assert_eq!(client.ask(0, WRITE_ZEROES, 0, 512).error, EPERM);
        for command in [READ, FLUSH, CACHE] {
            assert_eq!(client.ask(0, command, 0, 512).error, 0);
        }
    }

    // spec: nbd-length-zero
    #[test]
    fn nothing_succeeds_except_its_block_status() {
        for dialect in DIALECTS {
            let mut client = Client::new(dialect);
            for command in [READ, TRIM, CACHE, WRITE_ZEROES] {
                let reply = client.ask(0, command, 4096, 0);
                assert_eq!((reply.error, reply.data.len()), (0, 0));
            }
            assert_eq!(client.write(4096, &[]).error, 0);
        }
        let mut client = Client::new(Dialect::Structured);
        assert_eq!(client.ask(0, BLOCK_STATUS, 4096, 0).error, EINVAL);
    }

    // spec: nbd-unaligned
    #[test]
    fn unaligned_requests_are_served() {
        let mut client = Client::new(Dialect::Simple);
        assert_eq!(client.write(1, &[9; 5000]).error, 0);
        assert_eq!(client.ask(0, READ, 4095, 3).data, [9; 3]);
        assert_eq!(client.ask(0, WRITE_ZEROES, 7, 4500).error, 0);
        assert_eq!(client.ask(0, READ, 6, 2).data, [9, 0]);
        assert_eq!(client.ask(0, READ, 4506, 2).data, [0, 9]);
    }

    // spec: nbd-trim
    #[test]
    fn a_trim_takes_whole_blocks_and_leaves_the_rest_as_it_was() {
        for dialect in DIALECTS {
            let mut client = Client::new(dialect);
            assert_eq!(client.write(0, &[9; 16384]).error, 0);
            assert_eq!(client.ask(0, TRIM, 512, 4096).error, 0, "no whole block");
            assert_eq!(client.ask(0, TRIM, 3584, 8704).error, 0);
            let read = client.ask(0, READ, 0, 16384);
            let expected = [[9; 4096], [0; 4096], [0; 4096], [9; 4096]].concat();
            match dialect {
                Dialect::Simple => assert_eq!(read.data, expected),
                Dialect::Structured | Dialect::Extended => assert_eq!(read.kinds, [1, 2, 1]),
            }
        }
    }

    // spec: nbd-read-oversized
    #[test]
    fn oversized_reads_are_refused_in_the_words_of_the_dialect() {
        let length = u64::from(PAYLOAD_BYTES_MAX) + 1;
        for (dialect, error) in [
            (Dialect::Simple, EINVAL),
            (Dialect::Structured, EOVERFLOW),
            (Dialect::Extended, EOVERFLOW),
        ] {
            let mut client = Client::on(MemoryVolume::new("v", 1 << 40), dialect);
            assert_eq!(client.ask(0, READ, 0, length).error, error);
            assert_eq!(client.ask(0, READ, 0, length - 1).error, 0);
        }
    }

    // spec: nbd-write-zeroes
    #[test]
    fn zeroes_stay_allocated_only_with_no_hole() {
        let mut client = Client::new(Dialect::Structured);
        client.write(0, &[1; 12288]);
        assert_eq!(client.ask(NO_HOLE | FAST_ZERO, WRITE_ZEROES, 0, 4096).error, 0);
        assert_eq!(client.ask(FAST_ZERO, WRITE_ZEROES, 4096, 4096).error, 0);
        let status = client.ask(0, BLOCK_STATUS, 0, 16384);
        let words: Vec<u32> =
            status.data.chunks(4).map(|w| u32::from_be_bytes(w.try_into().unwrap())).collect();
        assert_eq!(words, [BASE_ALLOCATION_ID, 4096, 2, 4096, 3, 4096, 0, 4096, 3]);
        let one = client.ask(REQ_ONE, BLOCK_STATUS, 0, 16384);
        assert_eq!(one.data.len(), 4 + 8);
    }

    // spec: nbd-whole-volume
    #[test]
    fn extended_requests_may_cover_a_64_tib_volume() {
        let mut client = Client::on(MemoryVolume::new("v", 1 << 46), Dialect::Extended);
        client.write(1 << 40, &[1; 4096]);
        assert_eq!(client.ask(0, TRIM, 0, 1 << 46).error, 0);
        assert_eq!(client.ask(NO_HOLE, WRITE_ZEROES, 0, 1 << 46).error, 0);
        let status = client.ask(0, BLOCK_STATUS, 0, 1 << 46);
        assert_eq!(status.kinds, [6]);
        assert_eq!(status.data[8..16], (1_u64 << 46).to_be_bytes());
        assert_eq!(client.ask(0, CACHE, 0, 1 << 46).error, 0);
    }

    // spec: nbd-block-status-payload
    #[test]
    fn block_status_payload_names_the_contexts_it_wants() {
        let mut client = Client::new(Dialect::Extended);
        let payload = |ids: &[u32]| {
            let mut bytes = Vec::new();
            put_u64(&mut bytes, 8192);
            ids.iter().for_each(|id| put_u32(&mut bytes, *id));
            bytes
        };
        let mut ask = |ids: &[u32]| {
            let bytes = payload(ids);
            let length = bytes_u64(bytes.len());
            client.ask_with(PAYLOAD_LEN, BLOCK_STATUS, 0, length, &bytes)
        };
        assert_eq!(ask(&[BASE_ALLOCATION_ID]).data[8..16], 8192_u64.to_be_bytes());
        assert_eq!(ask(&[2]).error, EINVAL);
        assert_eq!(ask(&[BASE_ALLOCATION_ID, BASE_ALLOCATION_ID]).error, EINVAL);
    }

    // spec: nbd-block-status-unselected
    #[test]
    fn block_status_needs_a_context() {
        assert_eq!(Client::new(Dialect::Simple).ask(0, BLOCK_STATUS, 0, 512).error, EINVAL);
    }

    // spec: nbd-shutdown
    #[test]
    fn a_closed_volume_answers_eshutdown_for_good() {
        let mut client = Client::new(Dialect::Simple);
        client.volume.close();
        assert_eq!(client.write(0, &[1; 512]).error, ESHUTDOWN);
        assert!(client.session.ending());
        assert_eq!(client.ask(0, FLUSH, 0, 0).error, ESHUTDOWN);
    }

    // spec: nbd-error-reply
    #[test]
    fn failures_of_the_volume_become_error_replies_without_data() {
        for dialect in DIALECTS {
            let mut client = Client::new(dialect);
            for misses in [false, true] {
                client.volume.set_misses(misses);
                client.volume.fail_with(Some(ErrorKind::Corrupt));
                let reply = client.ask(0, READ, 0, 4096);
                assert_eq!((reply.error, reply.data.len()), (EIO, 0));
                client.volume.fail_with(Some(ErrorKind::NoSpace));
                assert_eq!(client.write(0, &[1; 512]).error, ENOSPC);
                client.volume.fail_with(None);
                assert_eq!(client.ask(0, READ, 0, 4096).error, 0);
            }
        }
    }

    #[test]
    fn requests_bytes_and_errors_are_counted() {
        let mut client = Client::new(Dialect::Simple);
        client.write(0, &[1; 512]);
        client.ask(0, READ, 0, 1024);
        client.ask(0, 99, 0, 0);
        let tally = Tally { requests: 3, errors: 1, bytes_read: 1024, bytes_written: 512 };
        assert_eq!(client.session.take_tally(), tally);
        assert_eq!(client.session.take_tally(), Tally::default());
    }
}

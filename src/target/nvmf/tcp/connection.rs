//! The loop of one connection, which is one queue: receive, parse, execute, send, on one task.
//!
//! ```text
//! receive buffer -> Framing -> Queue -+-> Outbox -> one gathered send
//!                      ^              |     ^
//!                      |              +-> commands in flight
//!                      +--- data the host sends after our R2T
//! ```
//!
//! Each turn takes the commands that have finished, then one buffer's worth of new ones, then sends
//! everything in one go: batching is what makes it fast (runtime.md).
//!
//! # Invariants
//! * New commands are taken only while the outbox is not full: a host that does not read its
//!   answers waits in its own socket.
//! * A host has at most [`Queue::depth`] commands outstanding; one more ends the connection.
//!   Commands that move data are begun, and data is asked for, only while those begun hold at most
//!   [`Limits::bytes_max`] and the [`Share`] covers them; the others wait here, in order.
//! * Data in capsules comes unasked. It is counted, and nothing more is received while there is no
//!   room for it, unless a transfer is open: the data of that may lie behind the capsule, and only
//!   once it is here does its memory come back. So a connection can hold 8 KiB for each entry of its
//!   queue, beyond its share, while the budget is spent.
//! * When the connection ends, so do the commands in flight: a write that has no place in the order
//!   of writes yet is never done. The host may send it again elsewhere and then another to the same
//!   blocks, which an old one must not undo.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;
use std::task::ready;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::Instant;

use crate::target::budget::Owed;
use crate::target::budget::Share;
use crate::target::connections::Counts;
use crate::target::nvmf::identify::IN_CAPSULE_BYTES_MAX;
use crate::target::nvmf::queue::Completed;
use crate::target::nvmf::queue::InFlight;
use crate::target::nvmf::queue::Queue;
use crate::target::nvmf::queue::Transfer;
use crate::target::nvmf::status::Status;
use crate::target::nvmf::tcp::framing::Data;
use crate::target::nvmf::tcp::framing::Event;
use crate::target::nvmf::tcp::framing::Framing;
use crate::target::nvmf::tcp::outbox::Outbox;
use crate::target::nvmf::tcp::wire::Fatal;
use crate::target::nvmf::tcp::wire::FatalStatus;
use crate::target::nvmf::tcp::wire::fatal;
use crate::target::nvmf::wire::Sgl;
use crate::target::nvmf::wire::Sqe;
use crate::target::stream::ByteStream;
use crate::target::turns::RECEIVE_BYTES_MAX;
use crate::target::turns::RECEIVE_BYTES_MIN;
use crate::target::turns::Turn;
use crate::target::turns::poll_turns;
use crate::target::turns::send;
use crate::units::bytes_u64;

/// Events taken before answers are sent (runtime.md).
const BATCH_EVENTS: usize = 512;

/// What one connection may have in flight.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of data of commands begun. One command may exceed it, so that any is possible.
    pub bytes_max: u64,
}

/// Why a connection ended.
#[derive(Debug)]
pub enum End {
    /// The host closed between two commands, or we stopped taking them.
    Clean,
    /// The host sent a H2CTermReq with this status.
    HostTerminated(u16),
    /// The host broke the protocol; it is to be told.
    Broken(Fatal),
    /// The host stood still on memory that others waited for.
    Stalled,
    /// The stream failed.
    Io(io::Error),
}

/// A command that waits for its turn.
struct Waiting {
    sqe: Sqe,
    /// Data of its capsule.
    data: Bytes,
    /// Memory it takes once it is begun, that of `data` included.
    cost_bytes: u32,
    /// So much data is still with the host, and to be asked for.
    to_grant: Option<u32>,
    arrival: Instant,
}

/// A command in flight, with what it counts for.
struct Running {
    command: InFlight,
    cost_bytes: u32,
}

impl Future for Running {
    type Output = (Completed, u32);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let completed = ready!(Pin::new(&mut self.command).poll(cx));
        Poll::Ready((completed, self.cost_bytes))
    }
}

/// A connection.
pub struct Connection<S> {
    stream: S,
    /// Bytes received; those before `parsed` are done with.
    buffer: Vec<u8>,
    parsed: usize,
    framing: Framing,
    /// Before `queue`, whose end says that no command is left.
    in_flight: FuturesUnordered<Running>,
    queue: Queue,
    out: Outbox,
    /// The stream may hold sent bytes back until flushed.
    unflushed: bool,
    waiting: VecDeque<Waiting>,
    /// Data of their capsules.
    waiting_bytes: u64,
    /// Memory of commands begun or granted.
    busy_bytes: u64,
    /// Commands taken and not answered.
    outstanding: usize,
    limits: Limits,
    share: Share,
    /// In this turn, something was found to wait for room.
    waits_for_room: bool,
    counts: Arc<Counts>,
    /// No further command will be taken.
    input_ended: bool,
}

impl<S: ByteStream> Connection<S> {
    /// A connection just accepted.
    pub fn new(stream: S, queue: Queue, limits: Limits, share: Share, counts: Arc<Counts>) -> Self {
        Self {
            stream,
            buffer: Vec::with_capacity(RECEIVE_BYTES_MIN),
            parsed: 0,
            framing: Framing::default(),
            queue,
            out: Outbox::default(),
            unflushed: false,
            in_flight: FuturesUnordered::new(),
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            busy_bytes: 0,
            outstanding: 0,
            limits,
            share,
            waits_for_room: false,
            counts,
            input_ended: false,
        }
    }

    /// The queue.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Takes no further command; what was begun is finished and answered.
    pub fn stop(&mut self) {
        self.input_ended = true;
        self.waiting.clear();
        self.waiting_bytes = 0;
    }

    /// Sends events that have come up.
    pub fn send_events(&mut self) {
        self.queue.send_events(&mut self.out);
    }

    /// Serves until the end. Ready when nothing is left to answer, or nobody to answer to.
    pub fn poll_serve(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let served = poll_turns(cx, |cx| self.turn(cx));
        self.counts.report(self.queue.report(), self.in_flight.len() + self.waiting.len());
        if served.is_ready() {
            return served;
        }
        let open = self.framing.has_open_transfers();
        let data = Owed { some: open, moved: self.framing.due_bytes() };
        let answers = Owed::answers(&self.out.gather);
        self.share.poll_stalled(cx, [data, answers]).map(|()| End::Stalled)
    }

    /// Says goodbye after a clean end.
    pub fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream.poll_close(cx)
    }

    /// Tells the host what it did wrong, then waits until it closes, so that it gets to read it.
    /// (NVMe/TCP 1.0, 3.5.1)
    pub async fn terminate(&mut self, fatal: &Fatal) -> io::Result<()> {
        self.stop();
        // Nothing that waits here will be begun, so nobody is to wait behind it.
        self.share.give_up();
        self.out.terminate(fatal);
        std::future::poll_fn(|cx| self.poll_flushed(cx)).await?;
        std::future::poll_fn(|cx| self.stream.poll_close(cx)).await?;
        loop {
            self.buffer.clear();
            let receive = |cx: &mut Context<'_>| {
                self.stream.poll_receive(cx, &mut self.buffer, RECEIVE_BYTES_MIN)
            };
            if std::future::poll_fn(receive).await? == 0 {
                return Ok(());
            }
        }
    }

    fn poll_flushed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.send(cx) {
            Err(End::Io(error)) => Poll::Ready(Err(error)),
            Ok(_) | Err(_) if self.out.gather.is_empty() && !self.unflushed => Poll::Ready(Ok(())),
            Ok(_) | Err(_) => Poll::Pending,
        }
    }

    fn finished(&self) -> bool {
        self.input_ended
            && self.in_flight.is_empty()
            && self.out.gather.is_empty()
            && !self.unflushed
    }

    /// One turn; an error ends the connection.
    fn turn(&mut self, cx: &mut Context<'_>) -> Result<Turn, End> {
        self.waits_for_room = false;
        let completed = self.take_completed(cx);
        let crowded = self.out.gather.is_full();
        let taken = self.take_events(cx)?;
        if self.queue.over() && !self.input_ended {
            // The host learns why, and no more.
            self.stop();
        }
        let full = taken.full || self.out.gather.is_full();
        let sent = self.send(cx)?;
        // Who was kept from looking by answers that have left since looks again in the next turn.
        let looks_again = crowded && !self.out.gather.is_full();
        if !self.waits_for_room && !looks_again {
            self.share.give_up();
        }
        self.share.settle_with(self.held_bytes(), &mut self.out.gather);
        if self.finished() {
            return Err(End::Clean);
        }
        Ok(Turn { moved: completed || taken.moved || sent, full })
    }

    fn take_completed(&mut self, cx: &mut Context<'_>) -> bool {
        let mut moved = false;
        while !self.out.gather.is_full() {
            let Poll::Ready(Some((completed, cost_bytes))) = self.in_flight.poll_next_unpin(cx)
            else {
                break;
            };
            self.busy_bytes -= u64::from(cost_bytes);
            self.queue.complete(completed, &mut self.out);
            moved = true;
        }
        moved | self.begin_waiting(cx)
    }

    /// Takes what has arrived, receiving at most once.
    fn take_events(&mut self, cx: &mut Context<'_>) -> Result<Turn, End> {
        let mut moved = false;
        let mut received = false;
        let mut events = 0;
        while events < BATCH_EVENTS
            && !self.input_ended
            && !self.out.gather.is_full()
            && self.may_take(cx)
        {
            let mut input = self.buffer.get(self.parsed..).unwrap_or_default();
            let before = input.len();
            let event = self.framing.next(&mut input);
            self.parsed += before - input.len();
            match event {
                Event::NeedBytes if received => break,
                Event::NeedBytes => match self.receive(cx) {
                    Poll::Pending => break,
                    Poll::Ready(result) => {
                        result?;
                        received = true;
                    }
                },
                Event::Begin(agreed) => self.out.begin(agreed),
                Event::Command(sqe, data) => self.take_command(sqe, data, cx)?,
                Event::Received(sqe, data, arrival) => {
                    self.take_data(&sqe, data, arrival, cx);
                }
                Event::HostTerminated(status) => return Err(End::HostTerminated(status)),
                Event::Fatal(fatal) => return Err(End::Broken(fatal)),
            }
            moved = true;
            events += 1;
        }
        Ok(Turn { moved, full: events >= BATCH_EVENTS })
    }

    /// Takes a command off the wire: refuses it, begins it, asks for its data or lets it wait.
    fn take_command(&mut self, sqe: Sqe, data: Data, cx: &mut Context<'_>) -> Result<(), End> {
        self.outstanding += 1;
        self.outstanding -= self.out.take_answered();
        if self.outstanding > self.queue.depth() {
            let reason = "more commands than the queue has entries";
            return Err(End::Broken(fatal(FatalStatus::Sequence, 0, sqe.bytes(), reason)));
        }
        let transfer = match self.queue.transfer(&sqe) {
            Ok(transfer) => transfer,
            Err(status) => {
                self.queue.refuse(&sqe, status, &mut self.out);
                return Ok(());
            }
        };
        let Data::Good(data) = data else {
            self.queue.refuse(&sqe, Status::TRANSIENT_TRANSPORT, &mut self.out);
            return Ok(());
        };
        let (to_grant, data) = match (transfer, sqe.sgl()) {
            (Transfer::FromHost(bytes), Sgl::InCapsule { .. }) => {
                if usize::try_from(bytes) != Ok(data.len()) {
                    self.queue.refuse(&sqe, Status::SGL_LENGTH_INVALID, &mut self.out);
                    return Ok(());
                }
                (None, data)
            }
            // Data that the SGL does not speak of is of no use.
            (Transfer::FromHost(bytes), _) => (Some(bytes), Bytes::new()),
            _ => (None, Bytes::new()),
        };
        let arrival = self.queue.timing().arrival();
        let cost_bytes = self.queue.memory_bytes(&sqe, transfer);
        let command = Waiting { sqe, data, cost_bytes, to_grant, arrival };
        let covered = self.share.room(self.held_bytes()) >= u64::from(cost_bytes);
        if self.waiting.is_empty() && self.has_room(&command) && covered {
            self.begin(command, cx);
        } else {
            self.waiting_bytes += bytes_u64(command.data.len());
            self.waiting.push_back(command);
        }
        Ok(())
    }

    /// Memory that commands take, from the first byte of their data until their answer is sent.
    fn held_bytes(&self) -> u64 {
        self.busy_bytes + self.waiting_bytes + self.out.gather.bytes()
    }

    /// Whether the next event may be taken, which may bring data in a capsule.
    fn may_take(&mut self, cx: &mut Context<'_>) -> bool {
        let (held, more) = (self.held_bytes(), u64::from(IN_CAPSULE_BYTES_MAX));
        if self.framing.has_open_transfers() || self.share.room(held) >= more {
            return true;
        }
        // A command in `waiting` may wait already, for more.
        if !self.waits_for_room {
            self.waits_for_room = self.share.poll_room(cx, held, more).is_pending();
        }
        !self.waits_for_room
    }

    /// Whether a command may be begun now, as far as this connection's own limits go.
    fn has_room(&self, command: &Waiting) -> bool {
        let after = self.busy_bytes + u64::from(command.cost_bytes);
        self.busy_bytes == 0 || command.cost_bytes == 0 || after <= self.limits.bytes_max
    }

    fn begin_waiting(&mut self, cx: &mut Context<'_>) -> bool {
        let mut moved = false;
        while !self.out.gather.is_full() {
            let Some(command) = self.waiting.front().filter(|command| self.has_room(command))
            else {
                break;
            };
            let here = bytes_u64(command.data.len());
            let more = u64::from(command.cost_bytes).saturating_sub(here);
            if self.share.poll_room(cx, self.held_bytes(), more).is_pending() {
                self.waits_for_room = true;
                break;
            }
            let Some(command) = self.waiting.pop_front() else { break };
            self.waiting_bytes -= here;
            self.begin(command, cx);
            moved = true;
        }
        moved
    }

    fn begin(&mut self, command: Waiting, cx: &mut Context<'_>) {
        self.busy_bytes += u64::from(command.cost_bytes);
        if let Some(length) = command.to_grant {
            let cid = command.sqe.cid();
            let tag = self.framing.grant(command.sqe, length, command.arrival);
            self.out.ready_to_transfer(cid, tag, length);
        } else {
            self.execute(&command.sqe, command.data, command.cost_bytes, command.arrival, cx);
        }
    }

    /// All data of a command has arrived, whose memory is counted already.
    fn take_data(&mut self, sqe: &Sqe, data: Data, arrival: Instant, cx: &mut Context<'_>) {
        let Sgl::Transport { length } = sqe.sgl() else {
            unreachable!("transfers are granted to no others");
        };
        let cost_bytes = self.queue.memory_bytes(sqe, Transfer::FromHost(length));
        match data {
            Data::Good(data) => self.execute(sqe, data, cost_bytes, arrival, cx),
            Data::Damaged => {
                self.busy_bytes -= u64::from(cost_bytes);
                self.queue.refuse(sqe, Status::TRANSIENT_TRANSPORT, &mut self.out);
            }
        }
    }

    /// Executes a command whose memory is counted.
    fn execute(
        &mut self,
        sqe: &Sqe,
        data: Bytes,
        cost_bytes: u32,
        arrival: Instant,
        cx: &mut Context<'_>,
    ) {
        let Some(command) = self.queue.execute(sqe, data, arrival, &mut self.out) else {
            self.busy_bytes -= u64::from(cost_bytes);
            return;
        };
        let mut running = Running { command, cost_bytes };
        // Polled here first, so that commands begin in the order they came, and those that finish
        // at once cost no place in `in_flight`. The next turn polls it there, with its own waker.
        match Pin::new(&mut running).poll(cx) {
            Poll::Ready((completed, cost_bytes)) => {
                self.busy_bytes -= u64::from(cost_bytes);
                self.queue.complete(completed, &mut self.out);
            }
            Poll::Pending => self.in_flight.push(running),
        }
    }

    /// Receives once: the rest of some data straight into its buffer, anything else into ours.
    fn receive(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        let received = if let Some((payload, missing)) = self.framing.payload_missing() {
            ready!(self.stream.poll_receive(cx, payload, missing))
        } else {
            // At most an incomplete header or digest moves to the front.
            self.buffer.drain(..self.parsed);
            self.parsed = 0;
            let room = self.buffer.capacity() - self.buffer.len();
            let received = ready!(self.stream.poll_receive(cx, &mut self.buffer, room));
            if matches!(received, Ok(bytes) if bytes == room) && room < RECEIVE_BYTES_MAX {
                self.buffer.reserve(RECEIVE_BYTES_MAX);
            }
            received
        };
        Poll::Ready(match received {
            Ok(0)
                if self.in_flight.is_empty()
                    && self.framing.at_boundary()
                    && self.buffer.is_empty() =>
            {
                self.stop();
                Ok(())
            }
            Ok(0) => Err(End::Io(io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => {
                self.queue.timing().received();
                Ok(())
            }
            Err(error) => Err(End::Io(error)),
        })
    }

    /// Sends as much as the stream takes; true if anything left.
    fn send(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        let timing = self.queue.timing();
        let sent = send(&mut self.stream, cx, &mut self.out.gather, &mut self.unflushed, timing);
        sent.map_err(End::Io)
    }
}

//! The transmission loop of one connection: receive, parse, execute, send, on one task.
//!
//! ```text
//! receive buffer -> Framing -> Session -+-> Outbox -> one gathered send
//!                                       |     ^
//!                                       +-> requests in flight
//! ```
//!
//! Each turn takes the replies that have become ready, then one buffer's worth of requests, then
//! sends everything in one go: batching is what makes it fast (runtime.md). Nothing is spawned
//! and RAM hits never wait.
//!
//! # Invariants
//! * New requests are taken only while the outbox is not full, at most [`Limits::requests_max`]
//!   are in flight, they hold at most [`Limits::bytes_max`], and the [`Share`] covers them and what
//!   waits to be sent: a client that does not read its replies, or asks for more than we can do,
//!   waits in its own socket.
//! * When the connection is lost, so are the requests in flight: a write that has no place in the
//!   order of writes yet is never done. The client may send it again on another connection and then
//!   another to the same blocks, which an old one must not undo.

use std::io;
use std::pin::Pin;
use std::task::Context;
use std::task::Poll;
use std::task::ready;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;

use crate::target::budget::Owed;
use crate::target::budget::Share;
use crate::target::nbd::framing::Event;
use crate::target::nbd::framing::Framing;
use crate::target::nbd::outbox::Outbox;
use crate::target::nbd::session::InFlight;
use crate::target::nbd::session::Session;
use crate::target::nbd::wire::Command;
use crate::target::nbd::wire::Request;
use crate::target::stream::ByteStream;
use crate::target::turns::RECEIVE_BYTES_MAX;
use crate::target::turns::RECEIVE_BYTES_MIN;
use crate::target::turns::Turn;
use crate::target::turns::poll_turns;
use crate::target::turns::send;
use crate::units::bytes_u64;

/// Requests taken before replies are sent (runtime.md).
const BATCH_REQUESTS: usize = 512;

/// What one connection may have in flight.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests; at least 128 for the queue of one Linux client.
    pub requests_max: usize,
    /// Bytes of their payloads and replies. One request may exceed it, so that any is possible.
    pub bytes_max: u64,
}

/// Why a connection ended.
#[derive(Debug)]
pub enum End {
    /// The client said DISC, or closed between two requests, or we shut it down.
    Clean,
    /// The client broke the protocol.
    Broken(&'static str),
    /// The client stood still on memory that others waited for.
    Stalled,
    /// The stream failed.
    Io(io::Error),
}

/// A connection in its transmission phase.
pub struct Connection<S> {
    stream: S,
    /// Bytes received; those before `parsed` are done with.
    buffer: Vec<u8>,
    parsed: usize,
    /// Ever.
    received_bytes: u64,
    framing: Framing,
    session: Session,
    out: Outbox,
    /// The stream may hold sent bytes back until flushed.
    unflushed: bool,
    in_flight: FuturesUnordered<InFlight>,
    in_flight_bytes: u64,
    limits: Limits,
    share: Share,
    /// In this turn, a request was found to wait for room.
    waits_for_room: bool,
    /// No further request will be taken: DISC or the end of the stream.
    input_ended: bool,
}

impl<S: ByteStream> Connection<S> {
    /// Takes over after the handshake; `received` is what the client sent beyond it.
    pub fn new(
        stream: S,
        received: Vec<u8>,
        framing: Framing,
        session: Session,
        limits: Limits,
        share: Share,
    ) -> Self {
        let mut buffer = received;
        buffer.reserve(RECEIVE_BYTES_MIN.saturating_sub(buffer.len()));
        Self {
            stream,
            buffer,
            parsed: 0,
            received_bytes: 0,
            framing,
            session,
            out: Outbox::default(),
            unflushed: false,
            in_flight: FuturesUnordered::new(),
            in_flight_bytes: 0,
            limits,
            share,
            waits_for_room: false,
            input_ended: false,
        }
    }

    /// Requests taken and not yet answered.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// The session, for its counters.
    pub fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    /// Serves until the end. Ready when nothing is left to reply to, or nobody to reply to.
    pub fn poll_serve(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        if let Poll::Ready(end) = poll_turns(cx, |cx| self.turn(cx)) {
            return Poll::Ready(end);
        }
        // Nothing comes between the bytes of a payload.
        let payload = Owed { some: self.framing.payload_bytes() > 0, moved: self.received_bytes };
        let replies = Owed::answers(&self.out.gather);
        self.share.poll_stalled(cx, [payload, replies]).map(|()| End::Stalled)
    }

    /// Says goodbye after a clean end.
    pub fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream.poll_close(cx)
    }

    fn finished(&self) -> bool {
        let no_more = self.input_ended || self.session.ending();
        no_more && self.in_flight.is_empty() && self.out.gather.is_empty() && !self.unflushed
    }

    /// One turn; an error ends the connection.
    fn turn(&mut self, cx: &mut Context<'_>) -> Result<Turn, End> {
        self.waits_for_room = false;
        let completed = self.take_completed(cx);
        let crowded = self.out.gather.is_full();
        let taken = self.take_requests(cx)?;
        let full = taken.full || self.out.gather.is_full();
        let sent = self.send(cx)?;
        // Who was kept from looking by replies that have left since looks again in the next turn.
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
            let Poll::Ready(Some(completed)) = self.in_flight.poll_next_unpin(cx) else {
                break;
            };
            self.in_flight_bytes -= completed.memory_bytes();
            self.session.complete(completed, &mut self.out);
            moved = true;
        }
        moved
    }

    /// Memory that requests take, from their first byte until their reply is sent.
    fn held_bytes(&self) -> u64 {
        self.in_flight_bytes + self.framing.payload_bytes() + self.out.gather.bytes()
    }

    /// Whether another request may be taken now.
    fn admits(&self) -> bool {
        !self.input_ended
            && !self.out.gather.is_full()
            && self.in_flight.len() < self.limits.requests_max
            && self.in_flight_bytes < self.limits.bytes_max
    }

    /// Takes the requests that have arrived, receiving at most once.
    fn take_requests(&mut self, cx: &mut Context<'_>) -> Result<Turn, End> {
        let mut moved = false;
        let mut received = false;
        let mut requests = 0;
        while requests < BATCH_REQUESTS && self.admits() {
            let mut input = self.buffer.get(self.parsed..).unwrap_or_default();
            let before = input.len();
            let room = self.share.room(self.held_bytes());
            let event = self.framing.next(&mut input, room);
            self.parsed += before - input.len();
            match event {
                Event::NeedBytes if received => break,
                Event::NeedBytes => match self.receive(cx) {
                    Poll::Pending => break,
                    Poll::Ready(result) => {
                        result?;
                        received = true;
                        moved = true;
                        continue;
                    }
                },
                Event::NoRoom(more) => {
                    let room = self.share.poll_room(cx, self.held_bytes(), more);
                    if room.is_pending() {
                        self.waits_for_room = true;
                        break;
                    }
                    continue;
                }
                Event::Request(request, _) if request.command == Command::Disconnect => {
                    self.input_ended = true;
                }
                Event::Request(request, payload) => self.start(cx, request, payload),
                Event::Refused(tag, reason) => self.session.refuse(tag, reason, &mut self.out),
                Event::Drop(reason) => return Err(End::Broken(reason)),
            }
            moved = true;
            requests += 1;
        }
        Ok(Turn { moved, full: requests == BATCH_REQUESTS })
    }

    /// Executes one request as far as it goes without waiting.
    fn start(&mut self, cx: &mut Context<'_>, request: Request, payload: Bytes) {
        let Some(mut work) = self.session.execute(request, payload, &mut self.out) else {
            return;
        };
        // Polled here first, so that requests begin in the order they came, and those that finish
        // at once cost no place in `in_flight`. The next turn polls it there, with its own waker.
        match Pin::new(&mut work).poll(cx) {
            Poll::Ready(completed) => self.session.complete(completed, &mut self.out),
            Poll::Pending => {
                self.in_flight_bytes += work.memory_bytes();
                self.in_flight.push(work);
            }
        }
    }

    /// Receives once: the rest of a payload straight into its buffer, anything else into ours.
    fn receive(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        let received = if let Some((payload, missing)) = self.framing.payload_missing() {
            ready!(self.stream.poll_receive(cx, payload, missing))
        } else {
            // At most an incomplete header moves to the front.
            self.buffer.drain(..self.parsed);
            self.parsed = 0;
            let room = self.buffer.capacity() - self.buffer.len();
            let limit = self.framing.receive_limit(self.buffer.len(), room);
            let received = ready!(self.stream.poll_receive(cx, &mut self.buffer, limit));
            if matches!(received, Ok(bytes) if bytes == room) && room < RECEIVE_BYTES_MAX {
                self.buffer.reserve(RECEIVE_BYTES_MAX);
            }
            received
        };
        Poll::Ready(match received {
            Ok(0) if !self.in_flight.is_empty() => {
                Err(End::Broken("connection closed with requests in flight"))
            }
            Ok(0) if self.framing.at_boundary() && self.buffer.is_empty() => {
                self.input_ended = true;
                Ok(())
            }
            Ok(0) => Err(End::Broken("connection closed within a request")),
            Ok(bytes) => {
                self.received_bytes += bytes_u64(bytes);
                self.session.timing().received();
                Ok(())
            }
            Err(error) => Err(End::Io(error)),
        })
    }

    /// Sends as much as the stream takes; true if anything left.
    fn send(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        let timing = self.session.timing();
        let sent = send(&mut self.stream, cx, &mut self.out.gather, &mut self.unflushed, timing);
        sent.map_err(End::Io)
    }
}

//! Cuts the byte stream of the transmission phase into requests. Pure: bytes in, events out.
//!
//! A payload that has arrived whole is copied out of the receive buffer; one that has not gets a
//! buffer of its own, and the connection receives the rest straight into it
//! ([`Framing::payload_missing`]). So nothing but an incomplete header is ever left in the receive
//! buffer, and memory is bounded by one payload of at most 32 MiB.

use bytes::Bytes;

use crate::target::nbd::wire::Dialect;
use crate::target::nbd::wire::Malformed;
use crate::target::nbd::wire::Request;
use crate::target::nbd::wire::Tag;
use crate::units::bytes_usize;

/// What the stream brought.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// The next message is not all there.
    NeedBytes,
    /// A request with its payload, which is empty for most.
    Request(Request, Bytes),
    /// A malformed request: reply EINVAL, go on.
    Refused(Tag, &'static str),
    /// Close at once; the reason is for the log.
    Drop(&'static str),
}

enum State {
    Header,
    Payload { request: Request, payload: Vec<u8> },
    Discard { bytes: usize, tag: Tag, reason: &'static str },
}

/// The cutter of one connection.
pub struct Framing {
    dialect: Dialect,
    state: State,
}

impl Framing {
    /// Starts with the first byte after the handshake.
    #[must_use]
    pub fn new(dialect: Dialect) -> Self {
        Self { dialect, state: State::Header }
    }

    /// Whether the stream stands between two messages; an end here cuts nothing off.
    #[must_use]
    pub fn at_boundary(&self) -> bool {
        matches!(self.state, State::Header)
    }

    /// The buffer of a payload that is not all there, and the bytes still missing from it.
    pub fn payload_missing(&mut self) -> Option<(&mut Vec<u8>, usize)> {
        match &mut self.state {
            State::Payload { request, payload } => {
                let missing = payload_bytes(request) - payload.len();
                Some((payload, missing))
            }
            State::Header | State::Discard { .. } => None,
        }
    }

    /// Takes at most one message off the front of `input`.
    pub fn next(&mut self, input: &mut &[u8]) -> Event {
        match std::mem::replace(&mut self.state, State::Header) {
            State::Header => self.header(input),
            State::Payload { request, mut payload } => {
                let wanted = payload_bytes(&request);
                let taken = input.len().min(wanted - payload.len());
                payload.extend_from_slice(take(input, taken));
                if payload.len() == wanted {
                    return Event::Request(request, payload.into());
                }
                self.state = State::Payload { request, payload };
                Event::NeedBytes
            }
            State::Discard { bytes, tag, reason } => self.discard(input, bytes, tag, reason),
        }
    }

    fn header(&mut self, input: &mut &[u8]) -> Event {
        let request = match Request::decode(self.dialect, input) {
            None => return Event::NeedBytes,
            Some(Ok(request)) => request,
            Some(Err(Malformed::Drop(reason))) => return Event::Drop(reason),
            Some(Err(Malformed::Invalid { tag, skip_bytes, reason })) => {
                take(input, self.dialect.request_bytes());
                return self.discard(input, bytes_usize(skip_bytes.into()), tag, reason);
            }
        };
        take(input, self.dialect.request_bytes());
        let wanted = payload_bytes(&request);
        if wanted == 0 {
            return Event::Request(request, Bytes::new());
        }
        if wanted <= input.len() {
            return Event::Request(request, Bytes::copy_from_slice(take(input, wanted)));
        }
        let mut payload = Vec::with_capacity(wanted);
        payload.extend_from_slice(take(input, input.len()));
        self.state = State::Payload { request, payload };
        Event::NeedBytes
    }

    fn discard(
        &mut self,
        input: &mut &[u8],
        bytes: usize,
        tag: Tag,
        reason: &'static str,
    ) -> Event {
        let left = bytes - take(input, bytes.min(input.len())).len();
        if left == 0 {
            return Event::Refused(tag, reason);
        }
        self.state = State::Discard { bytes: left, tag, reason };
        Event::NeedBytes
    }
}

fn payload_bytes(request: &Request) -> usize {
    bytes_usize(u64::from(request.payload_bytes))
}

/// Splits `bytes` off the front of `input`; the caller knows they are there.
fn take<'a>(input: &mut &'a [u8], bytes: usize) -> &'a [u8] {
    let (taken, rest) = input.split_at(bytes);
    *input = rest;
    taken
}

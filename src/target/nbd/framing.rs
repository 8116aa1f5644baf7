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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::target::nbd::wire::PAYLOAD_BYTES_MAX;
    use crate::target::nbd::wire::put_u16;
    use crate::target::nbd::wire::put_u32;
    use crate::target::nbd::wire::put_u64;

    fn request(flags: u16, command: u16, length: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_u32(&mut bytes, 0x2560_9513);
        put_u16(&mut bytes, flags);
        put_u16(&mut bytes, command);
        put_u64(&mut bytes, 1);
        put_u64(&mut bytes, 0);
        put_u32(&mut bytes, length);
        bytes.extend_from_slice(payload);
        bytes
    }

    /// All events of a stream that arrives in parts, payloads received directly if `direct`.
    fn events(stream: &[u8], cut: usize, direct: bool) -> Vec<Event> {
        let mut framing = Framing::new(Dialect::Simple);
        let (mut events, mut held) = (Vec::new(), Vec::new());
        for mut part in stream.chunks(cut) {
            if let Some((payload, missing)) = framing.payload_missing().filter(|_| direct) {
                let arrived = missing.min(part.len());
                payload.extend_from_slice(take(&mut part, arrived));
            }
            held.extend_from_slice(part);
            loop {
                let mut input = held.as_slice();
                let event = framing.next(&mut input);
                held = input.to_vec();
                if event == Event::NeedBytes {
                    assert!(held.len() < 28, "only an incomplete header is left");
                    break;
                }
                events.push(event);
            }
        }
        assert!(framing.at_boundary());
        events
    }

    // spec: nbd-write-oversized
    #[test]
    fn refused_payloads_are_thrown_away_and_the_stream_goes_on() {
        let length = PAYLOAD_BYTES_MAX + 1;
        let big = vec![0; bytes_usize(length.into())];
        let stream = [request(0, 1, length, &big), request(0, 0, 512, &[])].concat();
        let events = events(&stream, 100_000, false);
        assert!(matches!(events[..], [Event::Refused(..), Event::Request(..)]));
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_same_requests(
            lengths in prop::collection::vec(0..300_u32, 1..6), cut in 1..100_usize,
        ) {
            let mut stream = Vec::new();
            for length in lengths {
                let payload = vec![7; bytes_usize(length.into())];
                stream.extend(request(0, 1, length, &payload));
                stream.extend(request(2, 1, length, &payload));
                stream.extend(request(0, 0, length, &[]));
            }
            let whole = events(&stream, stream.len(), false);
            prop_assert_eq!(&events(&stream, cut, false), &whole);
            prop_assert_eq!(&events(&stream, cut, true), &whole);
        }

        #[test]
        fn any_bytes_make_progress_or_end(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut framing = Framing::new(Dialect::Extended);
            let mut input = bytes.as_slice();
            loop {
                let before = input.len();
                match framing.next(&mut input) {
                    Event::NeedBytes | Event::Drop(_) => break,
                    Event::Request(..) | Event::Refused(..) => prop_assert!(input.len() < before),
                }
            }
        }
    }
}

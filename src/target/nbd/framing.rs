//! Cuts the byte stream of the transmission phase into requests. Pure: bytes in, events out.
//!
//! A payload that has arrived whole is copied out of the receive buffer; one that has not gets a
//! buffer of its own, and the connection receives the rest straight into it
//! ([`Framing::payload_missing`]). So nothing but an incomplete header is ever left in the receive
//! buffer, and memory is bounded by one payload of at most 32 MiB. After a large write,
//! [`Framing::receive_limit`] asks for the next header alone, so that in a run of large writes no
//! payload is copied.

use bytes::Bytes;

use crate::target::nbd::session::memory_bytes;
use crate::target::nbd::wire::Dialect;
use crate::target::nbd::wire::Malformed;
use crate::target::nbd::wire::Request;
use crate::target::nbd::wire::Tag;
use crate::units::bytes_usize;

/// Payload from which a receive call more is cheaper than a copy. At 128 KiB a copy out of the
/// receive buffer costs some 10 us, a call well under one.
const LARGE_PAYLOAD_BYTES: usize = 32 * 1024;

/// What the stream brought.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// The next message is not all there.
    NeedBytes,
    /// The next request takes so much memory, which is more than there is room for. It was left where
    /// it is.
    NoRoom(u64),
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
    /// The last request was a large write, so the next may be one too.
    large: bool,
}

impl Framing {
    /// Starts with the first byte after the handshake.
    #[must_use]
    pub fn new(dialect: Dialect) -> Self {
        Self { dialect, state: State::Header, large: false }
    }

    /// Whether the stream stands between two messages; an end here cuts nothing off.
    #[must_use]
    pub fn at_boundary(&self) -> bool {
        matches!(self.state, State::Header)
    }

    /// Most bytes worth receiving into a buffer that holds `held` and has room for `room`.
    #[must_use]
    pub fn receive_limit(&self, held: usize, room: usize) -> usize {
        match self.state {
            State::Header if self.large => self.dialect.request_bytes() - held,
            State::Header | State::Payload { .. } | State::Discard { .. } => room,
        }
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

    /// Memory that a payload which is not all there takes.
    #[must_use]
    pub fn payload_bytes(&self) -> u64 {
        match &self.state {
            State::Payload { request, .. } => u64::from(request.payload_bytes),
            State::Header | State::Discard { .. } => 0,
        }
    }

    /// Takes at most one message off the front of `input`. Of a request that takes more memory than
    /// `room` nothing is taken.
    pub fn next(&mut self, input: &mut &[u8], room: u64) -> Event {
        match std::mem::replace(&mut self.state, State::Header) {
            State::Header => self.header(input, room),
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

    fn header(&mut self, input: &mut &[u8], room: u64) -> Event {
        let request = match Request::decode(self.dialect, input) {
            None => return Event::NeedBytes,
            Some(Ok(request)) => request,
            Some(Err(Malformed::Drop(reason))) => return Event::Drop(reason),
            Some(Err(Malformed::Invalid { tag, skip_bytes, reason })) => {
                take(input, self.dialect.request_bytes());
                return self.discard(input, bytes_usize(skip_bytes.into()), tag, reason);
            }
        };
        let memory_bytes = memory_bytes(&request);
        if memory_bytes > room {
            return Event::NoRoom(memory_bytes);
        }
        take(input, self.dialect.request_bytes());
        let wanted = payload_bytes(&request);
        self.large = wanted >= LARGE_PAYLOAD_BYTES;
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
                let event = framing.next(&mut input, u64::MAX);
                held = input.to_vec();
                if event == Event::NeedBytes {
                    assert!(held.len() < 28, "only an incomplete header is left");
                    break;
                }
                assert!(!matches!(event, Event::Drop(_)), "the stream is well framed");
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

    #[test]
    fn after_a_large_write_only_the_next_header_is_received() {
        let mut framing = Framing::new(Dialect::Simple);
        assert_eq!(framing.receive_limit(3, 1000), 1000);
        let large = request(0, 1, 65536, &[0; 65536]);
        assert!(matches!(framing.next(&mut large.as_slice(), u64::MAX), Event::Request(..)));
        assert_eq!(framing.receive_limit(3, 1000), 28 - 3);
        let small = request(0, 0, 65536, &[]);
        assert!(matches!(framing.next(&mut small.as_slice(), u64::MAX), Event::Request(..)));
        assert_eq!(framing.receive_limit(3, 1000), 1000);
    }

    #[test]
    fn a_request_without_room_is_left_where_it_is() {
        let mut framing = Framing::new(Dialect::Simple);
        let stream = [request(0, 1, 65536, &[7; 1000]), vec![7; 64536]].concat();
        let mut input = stream.as_slice();
        assert_eq!(framing.next(&mut input, 65535), Event::NoRoom(65536));
        assert_eq!((input.len(), framing.payload_bytes()), (stream.len(), 0));
        let (mut first, rest) = input.split_at(500);
        assert_eq!(framing.next(&mut first, 65536), Event::NeedBytes);
        assert_eq!(framing.payload_bytes(), 65536);
        // What was let in is not asked again.
        assert!(matches!(framing.next(&mut &*rest, 0), Event::Request(..)));
        assert_eq!(framing.payload_bytes(), 0);
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
                match framing.next(&mut input, u64::MAX) {
                    Event::NeedBytes | Event::NoRoom(_) | Event::Drop(_) => break,
                    Event::Request(..) | Event::Refused(..) => prop_assert!(input.len() < before),
                }
            }
        }
    }
}

//! Cuts the byte stream of one connection into commands and their data. Pure: bytes in, events
//! out.
//!
//! Data that has not arrived whole gets a buffer of its own, of the length announced and checked,
//! and the connection receives the rest straight into it ([`Framing::payload_missing`]). So nothing
//! but an incomplete header or digest stays in the receive buffer, and memory is bounded by what
//! was granted: 8 KiB in a capsule, and the transfers opened with [`Framing::grant`].
//!
//! # Invariants
//! * A transfer is filled in order, without gaps, and ends with the PDU that is flagged as its
//!   last. (NVMe/TCP 1.0, 3.3.2)

use bytes::Bytes;
use tokio::time::Instant;

use crate::target::nvmf::identify::IN_CAPSULE_BYTES_MAX;
use crate::target::nvmf::identify::TRANSFER_BYTES_MAX;
use crate::target::nvmf::tcp::wire;
use crate::target::nvmf::tcp::wire::Agreed;
use crate::target::nvmf::tcp::wire::DIGEST_BYTES;
use crate::target::nvmf::tcp::wire::DataLimits;
use crate::target::nvmf::tcp::wire::Fatal;
use crate::target::nvmf::tcp::wire::FatalStatus;
use crate::target::nvmf::tcp::wire::Pdu;
use crate::target::nvmf::wire::Sqe;
use crate::units::bytes_u64;
use crate::units::bytes_usize;

/// Data in one H2CData (MAXH2CDATA): all of any command.
pub const H2C_BYTES_MAX: u32 = TRANSFER_BYTES_MAX;

/// What the stream brought.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// The next message is not all there.
    NeedBytes,
    /// The connection begins: to be answered with ICResp.
    Begin(Agreed),
    /// A command, with the data of its capsule.
    Command(Sqe, Data),
    /// All data of a command that a transfer was granted to, and when the command had come.
    Received(Sqe, Data, Instant),
    /// The host gives up; close.
    HostTerminated(u16),
    /// The host broke the protocol: terminate the connection.
    Fatal(Fatal),
}

/// Data of a command.
#[derive(Debug, PartialEq, Eq)]
pub enum Data {
    /// As it came; empty if there is none.
    Good(Bytes),
    /// Its digest is wrong: the command fails, the connection goes on. (NVMe/TCP 1.0, 3.3.1.1)
    Damaged,
}

/// Data of a command, asked for with an R2T.
struct Granted {
    sqe: Sqe,
    /// See [`Round`].
    number: u64,
    /// When the command came.
    arrival: Instant,
    wanted: usize,
    data: Vec<u8>,
    /// A digest was wrong on the way.
    damaged: bool,
}

enum State {
    Header,
    /// Data of a capsule or of a transfer, then its digest.
    Payload(Payload),
    Digest(Payload),
    /// Bytes of no interest, then the end.
    Discard {
        bytes: usize,
        status: u16,
    },
    /// Nothing more is taken.
    Ended,
}

/// Data on its way in.
enum Payload {
    Capsule { sqe: Sqe, data: Vec<u8>, wanted: usize },
    Transfer { tag: u16, from: usize, until: usize },
}

/// The cutter of one connection.
pub struct Framing {
    agreed: Option<Agreed>,
    state: State,
    /// By tag.
    granted: Vec<Option<Granted>>,
    open: usize,
    round: Round,
}

impl Default for Framing {
    fn default() -> Self {
        let round = Round::default();
        Self { agreed: None, state: State::Header, granted: Vec::new(), open: 0, round }
    }
}

/// Transfers whose data is due: those that were open when the last of the round before was done. Data
/// of others does not count as movement, so that who sends it leaves none open for ever.
#[derive(Default)]
struct Round {
    /// Transfers granted so far, which is the number of the next.
    granted: u64,
    /// Those with lower numbers are due.
    end: u64,
    /// How many of them are open.
    open: usize,
    /// Bytes of data that came while they were due, over all rounds.
    bytes: u64,
}

impl Round {
    /// A transfer is granted, with the number returned.
    fn grant(&mut self) -> u64 {
        let number = self.granted;
        self.granted += 1;
        if self.open == 0 {
            (self.open, self.end) = (1, self.granted);
        }
        number
    }

    fn receive(&mut self, number: u64, bytes: usize) {
        if number < self.end {
            self.bytes += bytes_u64(bytes);
        }
    }

    /// A transfer is done; so many others are open.
    fn finish(&mut self, number: u64, others: usize) {
        if number < self.end {
            self.open -= 1;
        }
        if self.open == 0 {
            (self.open, self.end) = (others, self.granted);
        }
    }
}

impl Framing {
    /// Whether the stream stands between two messages and no data is owed to us.
    #[must_use]
    pub fn at_boundary(&self) -> bool {
        matches!(self.state, State::Header) && self.open == 0
    }

    /// Whether data that was asked for is still to come.
    #[must_use]
    pub fn has_open_transfers(&self) -> bool {
        self.open > 0
    }

    /// Bytes of such data that have come, ever, leaving out those of transfers that others are due
    /// before. Counted by PDU, of which the largest is sent in time by who is just quick enough.
    #[must_use]
    pub fn due_bytes(&self) -> u64 {
        self.round.bytes
    }

    /// Opens a transfer for the data of a command that came at `arrival`, and returns its tag, for
    /// the R2T.
    pub fn grant(&mut self, sqe: Sqe, length: u32, arrival: Instant) -> u16 {
        let wanted = bytes_usize(u64::from(length));
        let data = Vec::with_capacity(wanted);
        let number = self.round.grant();
        let granted = Granted { sqe, number, arrival, wanted, data, damaged: false };
        self.open += 1;
        let free = self.granted.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.granted.push(None);
            self.granted.len() - 1
        });
        self.granted[index] = Some(granted);
        u16::try_from(index).expect("a queue has at most 1024 commands outstanding")
    }

    /// The buffer of data that is not all there, and the bytes still missing from it.
    pub fn payload_missing(&mut self) -> Option<(&mut Vec<u8>, usize)> {
        let State::Payload(payload) = &mut self.state else { return None };
        let (buffer, missing) = Self::buffer(&mut self.granted, payload)?;
        Some((buffer, missing))
    }

    /// Where a payload goes, and how much is missing.
    fn buffer<'a>(
        granted: &'a mut [Option<Granted>],
        payload: &'a mut Payload,
    ) -> Option<(&'a mut Vec<u8>, usize)> {
        match payload {
            Payload::Capsule { data, wanted, .. } => {
                let missing = *wanted - data.len();
                Some((data, missing))
            }
            Payload::Transfer { tag, until, .. } => {
                let granted = granted.get_mut(usize::from(*tag))?.as_mut()?;
                let missing = until.checked_sub(granted.data.len())?;
                Some((&mut granted.data, missing))
            }
        }
    }

    /// Takes at most one message off the front of `input`.
    pub fn next(&mut self, input: &mut &[u8]) -> Event {
        loop {
            let event = match std::mem::replace(&mut self.state, State::Ended) {
                State::Header => self.header(input),
                State::Payload(payload) => self.payload(input, payload),
                State::Digest(payload) => self.digest(input, payload),
                State::Discard { bytes, status } => {
                    let left = bytes - take(input, bytes.min(input.len())).len();
                    if left > 0 {
                        self.state = State::Discard { bytes: left, status };
                        return Event::NeedBytes;
                    }
                    return Event::HostTerminated(status);
                }
                State::Ended => return Event::NeedBytes,
            };
            if let Some(event) = event {
                return event;
            }
        }
    }

    /// `None`: go on with the new state.
    fn header(&mut self, input: &mut &[u8]) -> Option<Event> {
        let limits = DataLimits {
            in_capsule: bytes_usize(u64::from(IN_CAPSULE_BYTES_MAX)),
            h2c: bytes_usize(u64::from(H2C_BYTES_MAX)),
        };
        let (pdu, taken) = match wire::decode(self.agreed, limits, input) {
            None => {
                self.state = State::Header;
                return Some(Event::NeedBytes);
            }
            Some(Err(fatal)) => return Some(Event::Fatal(fatal)),
            Some(Ok(decoded)) => decoded,
        };
        let header = take(input, taken);
        match pdu {
            Pdu::IcReq { wanted } => {
                self.agreed = Some(wanted);
                self.state = State::Header;
                Some(Event::Begin(wanted))
            }
            Pdu::TermReq { status, rest } => {
                self.state = State::Discard { bytes: rest, status };
                None
            }
            Pdu::Capsule { sqe, data_bytes: 0 } => {
                self.state = State::Header;
                Some(Event::Command(sqe, Data::Good(Bytes::new())))
            }
            Pdu::Capsule { sqe, data_bytes } => {
                let data = Vec::with_capacity(data_bytes);
                self.state = State::Payload(Payload::Capsule { sqe, data, wanted: data_bytes });
                None
            }
            Pdu::Data { cid, tag, offset, data_bytes, last } => {
                match self.check_transfer(header, (cid, tag), offset, data_bytes, last) {
                    Ok(payload) => {
                        self.state = State::Payload(payload);
                        None
                    }
                    Err(fatal) => Some(Event::Fatal(fatal)),
                }
            }
        }
    }

    /// Checks the header of H2CData against the transfer it claims to be of.
    fn check_transfer(
        &self,
        header: &[u8],
        (cid, tag): (u16, u16),
        offset: u32,
        data_bytes: usize,
        last: bool,
    ) -> Result<Payload, Fatal> {
        let fatal = |status, at, reason| Err(wire::fatal(status, at, header, reason));
        let granted = self.granted.get(usize::from(tag)).and_then(Option::as_ref);
        let Some(granted) = granted.filter(|granted| granted.sqe.cid() == cid) else {
            return fatal(FatalStatus::Sequence, 10, "data nobody asked for");
        };
        let from = bytes_usize(u64::from(offset));
        if from != granted.data.len() {
            return fatal(FatalStatus::OutOfRange, 12, "data out of order");
        }
        let until = from + data_bytes;
        if until > granted.wanted {
            return fatal(FatalStatus::OutOfRange, 16, "more data than asked for");
        }
        if last != (until == granted.wanted) {
            return fatal(FatalStatus::HeaderField, 1, "the last data is flagged, and only it");
        }
        Ok(Payload::Transfer { tag, from, until })
    }

    fn payload(&mut self, input: &mut &[u8], mut payload: Payload) -> Option<Event> {
        let (buffer, missing) =
            Self::buffer(&mut self.granted, &mut payload).expect("checked with its header");
        let taken = missing.min(input.len());
        buffer.extend_from_slice(take(input, taken));
        if taken < missing {
            self.state = State::Payload(payload);
            return Some(Event::NeedBytes);
        }
        if self.agreed.is_some_and(|agreed| agreed.data_digest) {
            self.state = State::Digest(payload);
            return None;
        }
        self.finish(payload, true)
    }

    fn digest(&mut self, input: &mut &[u8], mut payload: Payload) -> Option<Event> {
        let Some(given) = input.get(..DIGEST_BYTES) else {
            self.state = State::Digest(payload);
            return Some(Event::NeedBytes);
        };
        let from = match payload {
            Payload::Capsule { .. } => 0,
            Payload::Transfer { from, .. } => from,
        };
        let (buffer, _) =
            Self::buffer(&mut self.granted, &mut payload).expect("checked with its header");
        let good = given == wire::digest(buffer.get(from..).unwrap_or_default());
        take(input, DIGEST_BYTES);
        self.finish(payload, good)
    }

    /// A PDU's data is there; so may be all of a command's.
    fn finish(&mut self, payload: Payload, good: bool) -> Option<Event> {
        self.state = State::Header;
        let of = |good, data: Vec<u8>| if good { Data::Good(data.into()) } else { Data::Damaged };
        match payload {
            Payload::Capsule { sqe, data, .. } => Some(Event::Command(sqe, of(good, data))),
            Payload::Transfer { tag, from, until } => {
                let slot = self.granted.get_mut(usize::from(tag)).expect("checked");
                let granted = slot.as_mut().expect("checked with its header");
                granted.damaged |= !good;
                self.round.receive(granted.number, until - from);
                if granted.data.len() < granted.wanted {
                    return None;
                }
                let granted = slot.take().expect("just seen");
                self.open -= 1;
                self.round.finish(granted.number, self.open);
                let data = of(!granted.damaged, granted.data);
                Some(Event::Received(granted.sqe, data, granted.arrival))
            }
        }
    }
}

/// Splits `bytes` off the front of `input`; the caller knows they are there.
fn take<'a>(input: &mut &'a [u8], bytes: usize) -> &'a [u8] {
    let (taken, rest) = input.split_at(bytes);
    *input = rest;
    taken
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use proptest::prelude::*;

    use super::*;

    const HEADER_DIGEST: u8 = 1;
    const DATA_DIGEST: u8 = 2;

    /// When every command came.
    fn at() -> Instant {
        static AT: OnceLock<Instant> = OnceLock::new();
        *AT.get_or_init(Instant::now)
    }

    fn ic_req(digests: u8) -> Vec<u8> {
        let mut pdu = vec![0; 128];
        pdu[2] = 128;
        pdu[4] = 128;
        pdu[11] = digests;
        pdu
    }

    /// A PDU with data, and digests as `digests` says.
    fn pdu(kind: u8, flags: u8, specific: &[u8], data: &[u8], digests: u8) -> Vec<u8> {
        let header_bytes = 8 + specific.len();
        let header_digest = if digests & HEADER_DIGEST != 0 { 4 } else { 0 };
        let has_data_digest = digests & DATA_DIGEST != 0 && !data.is_empty();
        let total = header_bytes + header_digest + data.len() + if has_data_digest { 4 } else { 0 };
        let start = if data.is_empty() { 0 } else { header_bytes + header_digest };
        let flags = flags | digests & HEADER_DIGEST | if has_data_digest { DATA_DIGEST } else { 0 };
        let byte = |value: usize| u8::try_from(value).expect("short");
        let mut pdu = vec![kind, flags, byte(header_bytes), byte(start)];
        pdu.extend(u32::try_from(total).expect("short").to_le_bytes());
        pdu.extend(specific);
        if header_digest > 0 {
            let digest = wire::digest(&pdu);
            pdu.extend(digest);
        }
        pdu.extend(data);
        if has_data_digest {
            pdu.extend(wire::digest(data));
        }
        pdu
    }

    fn sqe(cid: u8) -> Sqe {
        let mut bytes = [0; 64];
        bytes[0] = 1;
        bytes[2] = cid;
        Sqe::new(bytes)
    }

    fn capsule(cid: u8, data: &[u8], digests: u8) -> Vec<u8> {
        pdu(4, 0, sqe(cid).bytes(), data, digests)
    }

    /// H2CData for command `cid`, transfer `tag`.
    fn h2c(cid: u8, tag: u16, offset: u32, data: &[u8], last: bool, digests: u8) -> Vec<u8> {
        let mut specific = vec![cid, 0];
        specific.extend(tag.to_le_bytes());
        specific.extend(offset.to_le_bytes());
        specific.extend(u32::try_from(data.len()).expect("short").to_le_bytes());
        specific.extend([0; 4]);
        pdu(6, if last { 4 } else { 0 }, &specific, data, digests)
    }

    fn begun(digests: u8) -> Framing {
        let mut framing = Framing::default();
        let mut input = &ic_req(digests)[..];
        assert!(matches!(framing.next(&mut input), Event::Begin(_)));
        framing
    }

    fn next(framing: &mut Framing, bytes: &[u8]) -> Event {
        framing.next(&mut &bytes[..])
    }

    fn fatal_status(event: Event) -> (FatalStatus, u32) {
        match event {
            Event::Fatal(fatal) => {
                assert!(!fatal.header.is_empty());
                (fatal.status, fatal.information)
            }
            event => panic!("{event:?} is not fatal"),
        }
    }

    #[test]
    fn a_connection_begins_with_exactly_one_ic_req() {
        let early = next(&mut Framing::default(), &capsule(1, &[], 0));
        assert_eq!(fatal_status(early), (FatalStatus::Sequence, 0));
        let twice = next(&mut begun(0), &ic_req(0));
        assert_eq!(fatal_status(twice), (FatalStatus::Sequence, 0));
        for (at, value) in [(8, 1), (10, 32), (4, 129), (2, 127)] {
            let mut wrong = ic_req(0);
            wrong[at] = value;
            let event = next(&mut Framing::default(), &wrong);
            let expected = u32::try_from(at).expect("short");
            assert_eq!(fatal_status(event), (FatalStatus::HeaderField, expected));
        }
    }

    #[test]
    fn headers_that_contradict_themselves_are_fatal() {
        let good = capsule(1, &[7; 16], 0);
        assert!(matches!(next(&mut begun(0), &good), Event::Command(_, Data::Good(_))));
        for (at, value, expected) in [
            (0, 5, (FatalStatus::HeaderField, 0)),
            (0, 0x0b, (FatalStatus::HeaderField, 0)),
            (2, 71, (FatalStatus::HeaderField, 2)),
            (3, 76, (FatalStatus::HeaderField, 3)),
            (4, 71, (FatalStatus::HeaderField, 4)),
            (5, 0x21, (FatalStatus::LimitExceeded, 0)),
            (7, 0xff, (FatalStatus::LimitExceeded, 0)),
        ] {
            let mut wrong = good.clone();
            wrong[at] = value;
            assert_eq!(fatal_status(next(&mut begun(0), &wrong)), expected, "byte {at}");
        }
        let longest = capsule(1, &[0; 8192], 0);
        assert!(matches!(next(&mut begun(0), &longest), Event::Command(..)));
        let longer = capsule(1, &[0; 8193], 0);
        let event = next(&mut begun(0), &longer);
        assert_eq!(fatal_status(event), (FatalStatus::LimitExceeded, 0));
    }

    #[test]
    fn a_wrong_header_digest_is_fatal_and_a_wrong_data_digest_is_not() {
        let both = HEADER_DIGEST | DATA_DIGEST;
        let good = capsule(1, &[7; 16], both);
        let expected = Event::Command(sqe(1), Data::Good(Bytes::from_static(&[7; 16])));
        assert_eq!(next(&mut begun(both), &good), expected);

        let mut header = good.clone();
        header[20] ^= 1;
        let (status, _) = fatal_status(next(&mut begun(both), &header));
        assert_eq!(status, FatalStatus::HeaderDigest);
        let mut unflagged = good.clone();
        unflagged[1] &= !HEADER_DIGEST;
        let (status, _) = fatal_status(next(&mut begun(both), &unflagged));
        assert_eq!(status, FatalStatus::HeaderDigest);
        let plain = capsule(1, &[7; 16], HEADER_DIGEST);
        let event = next(&mut begun(both), &plain);
        assert_eq!(fatal_status(event), (FatalStatus::HeaderField, 1));

        let mut framing = begun(both);
        let mut data = good.clone();
        data[80] ^= 1;
        assert_eq!(next(&mut framing, &data), Event::Command(sqe(1), Data::Damaged));
        assert_eq!(next(&mut framing, &good), expected, "the stream goes on");
    }

    #[test]
    fn a_transfer_is_filled_in_order_and_ends_with_its_last_flag() {
        let mut framing = begun(DATA_DIGEST);
        let tag = framing.grant(sqe(3), 12, at());
        let other = framing.grant(sqe(4), 4, at());
        assert_ne!(tag, other);
        let stream = [
            h2c(3, tag, 0, &[1; 8], false, DATA_DIGEST),
            h2c(4, other, 0, &[9; 4], true, DATA_DIGEST),
            h2c(3, tag, 8, &[2; 4], true, DATA_DIGEST),
        ]
        .concat();
        let mut input = &stream[..];
        let four = Event::Received(sqe(4), Data::Good(Bytes::from_static(&[9; 4])), at());
        assert_eq!(framing.next(&mut input), four);
        let Event::Received(_, Data::Good(data), _) = framing.next(&mut input) else {
            panic!("all of it is there");
        };
        assert_eq!(data[..], [1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]);
        assert!(framing.at_boundary());
        assert_eq!(framing.next(&mut input), Event::NeedBytes);

        // The slot is free again; one damaged part spoils the whole.
        let tag = framing.grant(sqe(5), 8, at());
        let mut stream = h2c(5, tag, 0, &[1; 4], false, DATA_DIGEST);
        stream[24] ^= 1;
        stream.extend(h2c(5, tag, 4, &[1; 4], true, DATA_DIGEST));
        assert_eq!(next(&mut framing, &stream), Event::Received(sqe(5), Data::Damaged, at()));
    }

    #[test]
    fn data_of_a_transfer_counts_as_movement_unless_others_are_due_before_it() {
        let mut framing = begun(0);
        let grant = |framing: &mut Framing, cid, length| framing.grant(sqe(cid), length, at());
        let first = grant(&mut framing, 1, 8);
        let second = grant(&mut framing, 2, 4);
        next(&mut framing, &h2c(1, first, 0, &[0; 4], false, 0));
        next(&mut framing, &h2c(2, second, 0, &[0; 4], true, 0));
        assert_eq!(framing.due_bytes(), 4, "the first is due");
        let third = grant(&mut framing, 3, 4);
        let fourth = grant(&mut framing, 4, 4);
        next(&mut framing, &h2c(1, first, 4, &[0; 4], true, 0));
        let fifth = grant(&mut framing, 5, 4);
        next(&mut framing, &h2c(5, fifth, 0, &[0; 4], true, 0));
        assert_eq!(framing.due_bytes(), 8, "and now the third and the fourth");
        next(&mut framing, &h2c(4, fourth, 0, &[0; 4], true, 0));
        next(&mut framing, &h2c(3, third, 0, &[0; 4], true, 0));
        let alone = grant(&mut framing, 6, 4);
        next(&mut framing, &h2c(6, alone, 0, &[0; 4], true, 0));
        assert_eq!(framing.due_bytes(), 20);
    }

    #[test]
    fn data_that_was_not_asked_for_is_fatal() {
        let granted = || {
            let mut framing = begun(0);
            let tag = framing.grant(sqe(3), 12, at());
            (framing, tag)
        };
        type Change = fn(u16) -> Vec<u8>;
        let cases: [(Change, (FatalStatus, u32)); 8] = [
            (|tag| h2c(3, tag + 1, 0, &[1; 12], true, 0), (FatalStatus::Sequence, 10)),
            (|_| h2c(3, 0xffff, 0, &[1; 12], true, 0), (FatalStatus::Sequence, 10)),
            (|tag| h2c(4, tag, 0, &[1; 12], true, 0), (FatalStatus::Sequence, 10)),
            (|tag| h2c(3, tag, 4, &[1; 8], true, 0), (FatalStatus::OutOfRange, 12)),
            (|tag| h2c(3, tag, 0, &[1; 16], true, 0), (FatalStatus::OutOfRange, 16)),
            (|tag| h2c(3, tag, 0, &[1; 12], false, 0), (FatalStatus::HeaderField, 1)),
            (|tag| h2c(3, tag, 0, &[1; 8], true, 0), (FatalStatus::HeaderField, 1)),
            (|tag| h2c(3, tag, 0, &[], true, 0), (FatalStatus::HeaderField, 16)),
        ];
        for (change, expected) in cases {
            let (mut framing, tag) = granted();
            assert_eq!(fatal_status(next(&mut framing, &change(tag))), expected);
            assert_eq!(framing.next(&mut &ic_req(0)[..]), Event::NeedBytes, "nothing more");
        }
        let (mut framing, tag) = granted();
        let mut lying = h2c(3, tag, 0, &[1; 12], true, 0);
        lying[16] = 8;
        assert_eq!(fatal_status(next(&mut framing, &lying)), (FatalStatus::HeaderField, 16));
    }

    #[test]
    fn a_host_that_gives_up_is_heard_to_its_end() {
        let mut framing = begun(HEADER_DIGEST);
        let mut term_req = pdu(2, 0, &[3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[], 0);
        term_req[4] = 24 + 10;
        assert_eq!(next(&mut framing, &term_req), Event::NeedBytes);
        assert_eq!(next(&mut framing, &[0; 10]), Event::HostTerminated(3));
        term_req[4] = 24 + 129;
        let event = next(&mut begun(0), &term_req);
        assert_eq!(fatal_status(event), (FatalStatus::HeaderField, 4));
    }

    /// All events of a stream that arrives in parts, data received directly if `direct`.
    fn events(stream: &[u8], cut: usize, direct: bool, digests: u8) -> Vec<Event> {
        let mut framing = begun(digests);
        assert_eq!(framing.grant(sqe(9), 600, at()), 0);
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
                    assert!(held.len() < 128, "only an incomplete header or digest is left");
                    break;
                }
                events.push(event);
            }
        }
        assert!(framing.at_boundary());
        events
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_same_commands(
            lengths in prop::collection::vec(0..300_usize, 1..6),
            cut in 1..100_usize,
            digests in 0..4_u8,
        ) {
            let mut stream = Vec::new();
            for (at, length) in lengths.into_iter().enumerate() {
                stream.extend(capsule(u8::try_from(at).expect("few"), &vec![7; length], digests));
            }
            stream.extend(h2c(9, 0, 0, &[1; 500], false, digests));
            stream.extend(capsule(100, &[], digests));
            stream.extend(h2c(9, 0, 500, &[1; 100], true, digests));
            let whole = events(&stream, stream.len(), false, digests);
            prop_assert!(whole.iter().any(|event| matches!(event, Event::Received(..))));
            prop_assert_eq!(&events(&stream, cut, false, digests), &whole);
            prop_assert_eq!(&events(&stream, cut, true, digests), &whole);
        }

        #[test]
        fn any_bytes_make_progress_or_end(
            bytes in prop::collection::vec(any::<u8>(), 0..300), kind in 0..10_u8,
        ) {
            let mut framing = begun(0);
            framing.grant(sqe(9), 600, at());
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() {
                *first = kind;
            }
            let mut input = bytes.as_slice();
            loop {
                let before = input.len();
                match framing.next(&mut input) {
                    Event::NeedBytes | Event::Fatal(_) | Event::HostTerminated(_) => break,
                    Event::Begin(_) => prop_assert!(false, "ICReq was there already"),
                    Event::Command(..) | Event::Received(..) => {
                        prop_assert!(input.len() < before);
                    }
                }
            }
        }
    }
}

//! What the NBD fuzzers run, shared by `tests/fuzz_nbd.rs` and the libFuzzer targets beside it.
//!
//! Each driver takes arbitrary bytes, plays the client with them, and judges what comes back as a
//! strict client would: every reply well formed, in range, one final reply per request, data equal
//! to a model, memory bounded. It panics on any violation.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt;
use weft::target::nbd::framing::Event;
use weft::target::nbd::framing::Framing;
use weft::target::nbd::handshake::Handshake;
use weft::target::nbd::handshake::Negotiated;
use weft::target::nbd::handshake::Step;
use weft::target::nbd::handshake::TlsMode;
use weft::target::nbd::outbox::Outbox;
use weft::target::nbd::session::Session;
use weft::target::nbd::wire::Command;
use weft::target::nbd::wire::Dialect;
use weft::target::nbd::wire::Request;
use weft::units::BLOCK_BYTES;
use weft::volume::memory::MemoryDirectory;
use weft::volume::memory::MemoryVolume;

/// Bytes in the volume: small, so that requests often straddle its end.
pub const VOLUME_BYTES: usize = 256 * 1024;
/// Error values a server may send.
const ERRORS: [u32; 6] = [1, 5, 22, 28, 75, 108];
/// The most one option may be answered with, given our two exports.
const ANSWER_BYTES_MAX: usize = 4096;

fn volumes() -> (Arc<MemoryVolume>, Arc<MemoryDirectory>) {
    let size = u64::try_from(VOLUME_BYTES).unwrap();
    let volume = Arc::new(MemoryVolume::new("a", size));
    let read_only = Arc::new(MemoryVolume::new("b", size).read_only());
    let directory = MemoryDirectory::new([Arc::clone(&volume) as _, read_only as _]);
    (volume, Arc::new(directory))
}

/// Haggles, then transmits what is left. The first byte chooses the TLS mode and how the stream
/// is cut.
pub fn handshake(input: &[u8]) {
    let Some((choice, stream)) = input.split_first() else {
        return;
    };
    let tls = match choice % 3 {
        0 => TlsMode::Off,
        1 => TlsMode::Optional,
        _ => TlsMode::Required,
    };
    let cut = usize::from(choice / 3) + 1;
    let mut out = Vec::new();
    let (_, directory) = volumes();
    let mut handshake = Handshake::new(directory, tls, true, &mut out);
    let mut secured = false;
    let mut held = Vec::new();
    let mut rest = stream;
    loop {
        out.clear();
        let mut input = held.as_slice();
        let before = input.len();
        let step = handshake.advance(&mut input, &mut out);
        let taken = before - input.len();
        assert!(out.len() <= ANSWER_BYTES_MAX, "an answer of {} bytes", out.len());
        check_option_replies(&out, &step);
        held.drain(..taken);
        match step {
            Step::Answered => assert!(taken > 0, "no progress"),
            Step::Close | Step::Drop(_) => return,
            Step::StartTls => {
                assert!(tls != TlsMode::Off && !secured);
                secured = true;
                handshake = handshake.secured();
            }
            Step::Transmission(negotiated) => {
                assert!(tls != TlsMode::Required || secured, "served without TLS");
                held.extend_from_slice(rest);
                let dialect = negotiated.dialect;
                Client::new(negotiated, dialect, None).play(&held, cut);
                return;
            }
            Step::NeedBytes => {
                assert!(held.len() <= 16 + 64 * 1024, "{} bytes held", held.len());
                let (part, after) = rest.split_at(cut.min(rest.len()));
                if part.is_empty() {
                    return;
                }
                held.extend_from_slice(part);
                rest = after;
            }
        }
    }
}

/// Option replies are framed, unless EXPORT_NAME succeeded.
fn check_option_replies(out: &[u8], step: &Step) {
    let mut rest = out;
    while let Some((header, after)) = rest.split_first_chunk::<20>() {
        if header[..8] != 0x0003_e889_0455_65a9_u64.to_be_bytes() {
            break;
        }
        let length = u32::from_be_bytes(header[16..].try_into().unwrap());
        rest = after.split_at(usize::try_from(length).unwrap()).1;
    }
    let export_name = matches!(step, Step::Transmission(_)) && matches!(rest.len(), 10 | 134);
    assert!(rest.is_empty() || export_name, "unframed option reply");
}

/// Transmits. The first byte chooses the dialect and whether reads miss, the second how the stream
/// is cut.
pub fn transmission(input: &[u8]) {
    let Some(([choice, cut], stream)) = input.split_first_chunk::<2>() else {
        return;
    };
    let dialect =
        [Dialect::Simple, Dialect::Structured, Dialect::Extended][usize::from(choice % 3)];
    let (volume, _) = volumes();
    volume.set_misses(choice & 0x40 != 0);
    let base_allocation = dialect != Dialect::Simple && choice & 0x80 != 0;
    let negotiated = Negotiated { volume, dialect, base_allocation };
    let model = vec![0; VOLUME_BYTES];
    Client::new(negotiated, dialect, Some(model)).play(stream, usize::from(*cut) * 16 + 1);
}

/// A strict client of one session.
struct Client {
    dialect: Dialect,
    framing: Framing,
    session: Session,
    /// What the volume holds, if it is the writable one.
    model: Option<Vec<u8>>,
}

impl Client {
    fn new(negotiated: Negotiated, dialect: Dialect, model: Option<Vec<u8>>) -> Self {
        let framing = Framing::new(dialect);
        Self { dialect, framing, session: Session::new(negotiated, true), model }
    }

    fn play(&mut self, stream: &[u8], cut: usize) {
        let mut held = Vec::new();
        for part in stream.chunks(cut) {
            held.extend_from_slice(part);
            loop {
                let mut input = held.as_slice();
                let before = input.len();
                let event = self.framing.next(&mut input, u64::MAX);
                let taken = before - input.len();
                held.drain(..taken);
                match event {
                    Event::NeedBytes => break,
                    Event::NoRoom(_) => panic!("there is room for all"),
                    Event::Drop(_) => return,
                    Event::Request(request, _) if request.command == Command::Disconnect => return,
                    Event::Request(request, payload) => self.request(request, &payload),
                    Event::Refused(tag, reason) => {
                        let mut out = Outbox::default();
                        self.session.refuse(tag, reason, &mut out);
                        let reply = Reply::parse(self.dialect, &flat(&mut out), tag.cookie);
                        assert_eq!(reply.error, 22);
                    }
                }
            }
            assert!(held.len() < 32, "only an incomplete header is kept");
        }
    }

    fn request(&mut self, request: Request, payload: &Bytes) {
        let mut out = Outbox::default();
        if let Some(work) = self.session.execute(request, payload.clone(), &mut out) {
            assert!(out.gather.is_empty(), "one reply only");
            let completed = work.now_or_never().expect("memory answers at once");
            self.session.complete(completed, &mut out);
        }
        let bytes = flat(&mut out);
        let reply = Reply::parse(self.dialect, &bytes, request.tag.cookie);
        assert!(bytes.len() <= VOLUME_BYTES + 64 * 1024, "a reply of {} bytes", bytes.len());
        let range = usize::try_from(request.tag.offset).ok().and_then(|offset| {
            let end = offset.checked_add(usize::try_from(request.length).ok()?)?;
            (end <= VOLUME_BYTES).then_some(offset..end)
        });
        if request.command == Command::BlockStatus || request.command == Command::Flush {
            return;
        }
        let Some(range) = range else {
            assert_ne!(reply.error, 0, "{request:?} is past the end");
            return;
        };
        if reply.error != 0 {
            assert!(reply.content.is_empty());
            return;
        }
        match request.command {
            Command::Read => {
                let data = reply.data(self.dialect, &request);
                if let Some(model) = &self.model {
                    assert!(data == model[range], "{request:?} read other bytes");
                }
            }
            Command::Write => {
                if let Some(model) = &mut self.model {
                    model[range].copy_from_slice(payload);
                }
            }
            Command::WriteZeroes => {
                if let Some(model) = &mut self.model {
                    model[range].fill(0);
                }
            }
            // TRIM leaves the content open to us; ours zeroes whole blocks.
            Command::Trim => {
                let first = range.start.next_multiple_of(BLOCK_BYTES);
                let end = first.max(range.end / BLOCK_BYTES * BLOCK_BYTES);
                if let Some(model) = &mut self.model {
                    model[first..end].fill(0);
                }
            }
            Command::Cache | Command::Flush | Command::BlockStatus | Command::Disconnect => {}
        }
    }
}

fn flat(out: &mut Outbox) -> Vec<u8> {
    let mut bytes = Vec::new();
    while !out.gather.is_empty() {
        let sent: usize = out
            .gather
            .slices()
            .iter()
            .map(|slice| {
                bytes.extend_from_slice(slice);
                slice.len()
            })
            .sum();
        out.gather.sent(sent);
    }
    bytes
}

/// A reply, taken apart.
struct Reply {
    error: u32,
    /// Content: chunk kind and payload; kind 1 for the data of a simple reply.
    content: Vec<(u16, Vec<u8>)>,
}

impl Reply {
    /// Takes `bytes` apart, which must be exactly one reply.
    fn parse(dialect: Dialect, mut bytes: &[u8], cookie: u64) -> Self {
        let word = |bytes: &[u8]| u32::from_be_bytes(bytes[..4].try_into().unwrap());
        let mut reply = Self { error: 0, content: Vec::new() };
        let (magic, header) = match dialect {
            Dialect::Simple => (0x6744_6698, 16),
            Dialect::Structured => (0x668e_33ef, 20),
            Dialect::Extended => (0x6e8a_278c, 32),
        };
        loop {
            assert_eq!(word(bytes), magic);
            assert_eq!(bytes[8..16], cookie.to_be_bytes());
            if dialect == Dialect::Simple {
                reply.error = word(&bytes[4..]);
                assert!(reply.error == 0 || ERRORS.contains(&reply.error) && bytes.len() == 16);
                if bytes.len() > 16 {
                    reply.content.push((1, bytes[16..].to_vec()));
                }
                return reply;
            }
            let done = bytes[5] == 1;
            let kind = u16::from_be_bytes([bytes[6], bytes[7]]);
            let length = usize::try_from(word(&bytes[header - 4..])).unwrap();
            let payload = &bytes[header..header + length];
            match kind {
                0 => assert!(done && length == 0),
                0x8001 => {
                    reply.error = word(payload);
                    let text = usize::from(u16::from_be_bytes([payload[4], payload[5]]));
                    assert!(ERRORS.contains(&reply.error) && length == 6 + text && length < 1000);
                }
                _ => reply.content.push((kind, payload.to_vec())),
            }
            bytes = &bytes[header + length..];
            if done {
                assert!(bytes.is_empty(), "bytes after the final chunk");
                return reply;
            }
        }
    }

    /// What a successful read returned; its chunks must cover the request in order.
    fn data(&self, dialect: Dialect, request: &Request) -> Vec<u8> {
        if dialect == Dialect::Simple {
            return self.content.first().map_or_else(Vec::new, |(_, data)| data.clone());
        }
        assert!(!request.dont_fragment || self.content.len() <= 1);
        let mut data = Vec::new();
        for (kind, payload) in &self.content {
            let (offset, rest) = payload.split_first_chunk::<8>().unwrap();
            let expected = request.tag.offset + u64::try_from(data.len()).unwrap();
            assert_eq!(u64::from_be_bytes(*offset), expected, "a gap or an overlap");
            assert!(!rest.is_empty());
            if *kind == 2 {
                assert!(!request.dont_fragment);
                let hole = u32::from_be_bytes(rest.try_into().unwrap());
                assert_ne!(hole, 0);
                data.resize(data.len() + usize::try_from(hole).unwrap(), 0);
            } else {
                assert_eq!(*kind, 1);
                data.extend_from_slice(rest);
            }
        }
        assert_eq!(u64::try_from(data.len()), Ok(request.length));
        data
    }
}

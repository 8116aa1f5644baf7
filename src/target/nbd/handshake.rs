//! The handshake as a state machine: bytes in, bytes out, no I/O. (proto.md, "Handshake phase")
//!
//! [`Handshake::advance`] takes at most one message from the front of what has arrived, appends
//! the answer, and says what comes next. The caller owns buffers, deadlines and the socket. After
//! [`Step::StartTls`] the caller must have no byte left over, upgrades the stream, and goes on
//! with [`Handshake::secured`]: nothing agreed in clear text survives.
//!
//! # Invariants
//! * At most [`OPTION_DATA_BYTES_MAX`] bytes of one option are ever needed at once; what is longer
//!   is thrown away as it comes and refused, or ends the connection.
//! * So many options are answered and no more (`Handshake::options_max`), so a client cannot haggle
//!   for ever.

use std::sync::Arc;

use crate::target::nbd::options;
use crate::target::nbd::options::BASE_ALLOCATION;
use crate::target::nbd::options::BASE_ALLOCATION_ID;
use crate::target::nbd::options::CLIENT_FLAGS_BYTES;
use crate::target::nbd::options::ClientFlags;
use crate::target::nbd::options::Info;
use crate::target::nbd::options::InfoRequest;
use crate::target::nbd::options::MetaContextRequest;
use crate::target::nbd::options::NbdOption;
use crate::target::nbd::options::OPTION_HEADER_BYTES;
use crate::target::nbd::options::OptionError;
use crate::target::nbd::options::OptionHeader;
use crate::target::nbd::options::OptionReply;
use crate::target::nbd::wire::Dialect;
use crate::target::nbd::wire::PAYLOAD_BYTES_MAX;
use crate::target::nbd::wire::transmission_flag as flag;
use crate::units::bytes_usize;
use crate::units::format_size;
use crate::volume::Volume;
use crate::volume::VolumeDirectory;
use crate::volume::VolumeRef;

/// Largest option data we look at: room for a SET_META_CONTEXT with several 4 KiB queries.
pub const OPTION_DATA_BYTES_MAX: u32 = 64 * 1024;
/// Largest option data thrown away to keep the connection; beyond it, we drop.
const OPTION_DATA_DISCARD_MAX: u32 = 1 << 20;
/// Options answered per connection, and so many more for each export: clients send fewer than ten,
/// but those that list exports ask a few times about each.
const OPTIONS_MAX: usize = 1024;
const OPTIONS_MAX_PER_EXPORT: usize = 8;

/// Smallest request we advertise: what a Linux client uses unasked. We accept any.
const BLOCK_BYTES_MINIMUM: u32 = 512;
/// The unit of mapping, so that no write reads first.
const BLOCK_BYTES_PREFERRED: u32 = 4096;

/// Whether connections are encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsMode {
    /// STARTTLS is refused.
    #[default]
    Off,
    /// The client chooses.
    Optional,
    /// Nothing but STARTTLS and ABORT is answered before TLS.
    Required,
}

/// What was agreed: everything a session needs.
pub struct Negotiated {
    /// The export.
    pub volume: VolumeRef,
    /// Which headers travel.
    pub dialect: Dialect,
    /// BLOCK_STATUS may be sent, for base:allocation.
    pub base_allocation: bool,
}

/// What comes next.
pub enum Step {
    /// More bytes are needed.
    NeedBytes,
    /// A message was answered; there may be another.
    Answered,
    /// Send the answer, then speak TLS.
    StartTls,
    /// Send the answer, then serve this export.
    Transmission(Negotiated),
    /// Send the answer, then close: the client is done.
    Close,
    /// Close at once; the reason is for the log.
    Drop(&'static str),
}

enum State {
    ClientFlags,
    Option,
    /// Throwing away this much of an option's data, which is then refused.
    Discard {
        option_number: u32,
        error: OptionError,
        bytes: u32,
    },
}

/// The base:allocation selection, and for which export it holds.
struct Selection {
    export: String,
    base_allocation: bool,
}

/// One connection's handshake.
pub struct Handshake {
    directory: Arc<dyn VolumeDirectory>,
    tls: TlsMode,
    /// The stream is encrypted by now.
    in_tls: bool,
    /// LIST is answered.
    listable: bool,
    state: State,
    client: ClientFlags,
    options_answered: usize,
    structured: bool,
    extended: bool,
    selection: Option<Selection>,
}

impl Handshake {
    /// Starts one, with the greeting in `out`.
    pub fn new(
        directory: Arc<dyn VolumeDirectory>,
        tls: TlsMode,
        listable: bool,
        out: &mut Vec<u8>,
    ) -> Self {
        options::put_greeting(out);
        Self {
            directory,
            tls,
            in_tls: false,
            listable,
            state: State::ClientFlags,
            client: ClientFlags::default(),
            options_answered: 0,
            structured: false,
            extended: false,
            selection: None,
        }
    }

    /// Goes on inside TLS, with all that was agreed before it forgotten.
    #[must_use]
    pub fn secured(self) -> Self {
        Self { in_tls: true, structured: false, extended: false, selection: None, ..self }
    }

    /// Takes at most one message off the front of `input` and appends its answer to `out`.
    pub fn advance(&mut self, input: &mut &[u8], out: &mut Vec<u8>) -> Step {
        match self.state {
            State::ClientFlags => self.take_client_flags(input),
            State::Option => self.take_option(input, out),
            State::Discard { option_number, error, bytes } => {
                let taken = input.len().min(bytes_usize(u64::from(bytes)));
                *input = input.split_at(taken).1;
                let left = bytes - u32::try_from(taken).expect("at most `bytes`, a u32");
                if left > 0 {
                    self.state = State::Discard { option_number, error, bytes: left };
                    return Step::NeedBytes;
                }
                self.state = State::Option;
                let mut reply = OptionReply { out, number: option_number };
                reply.error(error, "option data larger than 64 KiB");
                Step::Answered
            }
        }
    }

    fn take_client_flags(&mut self, input: &mut &[u8]) -> Step {
        let Some((bytes, rest)) = input.split_first_chunk::<CLIENT_FLAGS_BYTES>() else {
            return Step::NeedBytes;
        };
        *input = rest;
        let Some(client) = ClientFlags::decode(*bytes) else {
            return Step::Drop("unknown client flags");
        };
        if !client.fixed_newstyle && self.tls == TlsMode::Required {
            return Step::Drop("client too old for TLS, which is required");
        }
        self.client = client;
        self.state = State::Option;
        Step::Answered
    }

    fn take_option(&mut self, input: &mut &[u8], out: &mut Vec<u8>) -> Step {
        let Some((bytes, rest)) = input.split_first_chunk::<OPTION_HEADER_BYTES>() else {
            return Step::NeedBytes;
        };
        let Some(header) = OptionHeader::decode(bytes) else {
            return Step::Drop("bad option magic");
        };
        if header.data_bytes > OPTION_DATA_BYTES_MAX {
            *input = rest;
            return self.refuse_large(header, out);
        }
        let Some((data, rest)) = rest.split_at_checked(bytes_usize(header.data_bytes.into()))
        else {
            return Step::NeedBytes;
        };
        *input = rest;
        if self.is_one_too_many() {
            return Step::Drop("too many options");
        }
        self.answer(header, data, out)
    }

    /// Refuses an option whose data is more than we look at, as it would be with less. Absurd lengths,
    /// and EXPORT_NAME, which has no error, end the connection.
    fn refuse_large(&mut self, header: OptionHeader, out: &mut Vec<u8>) -> Step {
        if self.is_one_too_many() {
            return Step::Drop("too many options");
        }
        let number = header.number;
        match header.option {
            _ if header.data_bytes > OPTION_DATA_DISCARD_MAX => {
                return Step::Drop("option data too large");
            }
            NbdOption::ExportName => return Step::Drop("option data too large"),
            // It ends here whatever comes with it.
            NbdOption::Abort => return self.answer(header, &[], out),
            _ if !self.client.fixed_newstyle => return self.answer(header, &[], out),
            NbdOption::SetMetaContext => self.selection = None,
            _ => {}
        }
        let error = match self.waits_for_tls(header.option) {
            true => OptionError::TlsRequired,
            false => OptionError::TooBig,
        };
        self.state = State::Discard { option_number: number, error, bytes: header.data_bytes };
        Step::Answered
    }

    /// Counts an option; true if no more are answered.
    fn is_one_too_many(&mut self) -> bool {
        self.options_answered += 1;
        self.options_answered > OPTIONS_MAX && self.options_answered > self.options_max()
    }

    fn options_max(&self) -> usize {
        OPTIONS_MAX + self.directory.list().len() * OPTIONS_MAX_PER_EXPORT
    }

    /// Options taken so far.
    #[must_use]
    pub fn options_answered(&self) -> usize {
        self.options_answered
    }

    /// Whether an option may be used only once the stream is encrypted.
    fn waits_for_tls(&self, option: NbdOption) -> bool {
        let before = matches!(option, NbdOption::StartTls | NbdOption::Abort);
        self.tls == TlsMode::Required && !self.in_tls && !before
    }

    /// Answers one whole option.
    fn answer(&mut self, header: OptionHeader, data: &[u8], out: &mut Vec<u8>) -> Step {
        if !self.client.fixed_newstyle && header.option != NbdOption::ExportName {
            return Step::Drop(
                "option other than EXPORT_NAME from a client without fixed newstyle",
            );
        }
        let mut reply = OptionReply { out, number: header.number };
        if self.waits_for_tls(header.option) {
            if header.option == NbdOption::ExportName {
                return Step::Drop("EXPORT_NAME without TLS");
            }
            reply.error(OptionError::TlsRequired, "this server requires TLS");
            return Step::Answered;
        }
        match header.option {
            NbdOption::ExportName => return self.export_name(data, out),
            NbdOption::Abort => {
                reply.ack();
                return Step::Close;
            }
            NbdOption::StartTls => return self.start_tls(data, &mut reply),
            NbdOption::Info => {
                let _ = self.inform(data, &mut reply);
            }
            NbdOption::Go => {
                if let Some(negotiated) = self.inform(data, &mut reply) {
                    return Step::Transmission(negotiated);
                }
            }
            NbdOption::List => self.list(data, &mut reply),
            NbdOption::StructuredReply => self.structured_reply(data, &mut reply),
            NbdOption::ExtendedHeaders => {
                if refuse_data(data, &mut reply) {
                    return Step::Answered;
                }
                self.extended = true;
                reply.ack();
            }
            NbdOption::ListMetaContext => self.list_meta_context(data, &mut reply),
            NbdOption::SetMetaContext => self.set_meta_context(data, &mut reply),
            NbdOption::Unknown => reply.error(OptionError::Unsupported, "unknown option"),
        }
        Step::Answered
    }

    fn dialect(&self) -> Dialect {
        match (self.extended, self.structured) {
            (true, _) => Dialect::Extended,
            (false, true) => Dialect::Structured,
            (false, false) => Dialect::Simple,
        }
    }

    /// Finds an export; the empty name is the first one. A volume for named hosts is none: a
    /// client of NBD has no name.
    fn find(&self, name: &str) -> Option<VolumeRef> {
        match self.directory.find(name) {
            None if name.is_empty() => self.exports().next(),
            found => found.filter(|volume| volume.admits(None)),
        }
    }

    fn exports(&self) -> impl Iterator<Item = VolumeRef> {
        self.directory.list().into_iter().filter(|volume| volume.admits(None))
    }

    fn negotiated(&self, name: &str, volume: VolumeRef) -> Negotiated {
        let selected =
            self.selection.as_ref().is_some_and(|s| s.base_allocation && s.export == name);
        let dialect = self.dialect();
        Negotiated { volume, dialect, base_allocation: selected && dialect != Dialect::Simple }
    }

    fn export_name(&self, data: &[u8], out: &mut Vec<u8>) -> Step {
        if self.extended {
            return Step::Drop("EXPORT_NAME after EXTENDED_HEADERS");
        }
        let Ok(name) = options::decode_name(data) else {
            return Step::Drop("bad export name");
        };
        let Some(volume) = self.find(name).filter(|volume| !volume.closed()) else {
            return Step::Drop("unknown export");
        };
        let flags = transmission_flags(volume.as_ref(), self.dialect());
        options::put_export_name_reply(out, volume.size_bytes(), flags, self.client.no_zeroes);
        Step::Transmission(self.negotiated(name, volume))
    }

    fn start_tls(&self, data: &[u8], reply: &mut OptionReply<'_>) -> Step {
        if refuse_data(data, reply) {
            return Step::Answered;
        }
        if self.in_tls {
            reply.error(OptionError::Invalid, "TLS is on already");
            return Step::Answered;
        }
        if self.tls == TlsMode::Off {
            reply.error(OptionError::Policy, "TLS is not configured");
            return Step::Answered;
        }
        reply.ack();
        Step::StartTls
    }

    /// Answers INFO and GO alike; for GO the result is what to serve.
    fn inform(&self, data: &[u8], reply: &mut OptionReply<'_>) -> Option<Negotiated> {
        let Ok(request) = InfoRequest::decode(data) else {
            reply.error(OptionError::Invalid, "malformed request");
            return None;
        };
        let Some(volume) = self.find(&request.export) else {
            if self.directory.find(&request.export).is_some() {
                reply.error(OptionError::Policy, "the volume is served to some NVMe hosts only");
            } else {
                reply.error(OptionError::Unknown, "no export of that name");
            }
            return None;
        };
        if volume.closed() {
            reply.error(OptionError::Shutdown, "the export is shutting down");
            return None;
        }
        let size_bytes = volume.size_bytes();
        // EXPORT first: qemu aborts on a BLOCK_SIZE before it in some cases.
        let flags = transmission_flags(volume.as_ref(), self.dialect());
        reply.info(Info::Export(size_bytes, flags));
        if request.wants_name {
            reply.info(Info::Name(&volume.name()));
        }
        if request.wants_description {
            let text = format!("Weft volume of {}", format_size(size_bytes));
            reply.info(Info::Description(&text));
        }
        reply.info(Info::BlockSize(BLOCK_BYTES_MINIMUM, BLOCK_BYTES_PREFERRED, PAYLOAD_BYTES_MAX));
        reply.ack();
        Some(self.negotiated(&request.export, volume))
    }

    fn list(&self, data: &[u8], reply: &mut OptionReply<'_>) {
        if refuse_data(data, reply) {
            return;
        }
        if !self.listable {
            reply.error(OptionError::Policy, "listing exports is turned off");
            return;
        }
        for volume in self.exports() {
            reply.server(&volume.name());
        }
        reply.ack();
    }

    fn structured_reply(&mut self, data: &[u8], reply: &mut OptionReply<'_>) {
        if refuse_data(data, reply) {
            return;
        }
        if self.extended {
            reply.error(OptionError::ExtendedHeadersRequired, "extended headers are on already");
            return;
        }
        self.structured = true;
        reply.ack();
    }

    /// Decodes a metadata context request and finds its export, or refuses it.
    fn meta_context_request(
        &self,
        data: &[u8],
        reply: &mut OptionReply<'_>,
    ) -> Option<MetaContextRequest> {
        let Ok(request) = MetaContextRequest::decode(data) else {
            reply.error(OptionError::Invalid, "malformed request");
            return None;
        };
        if self.dialect() == Dialect::Simple {
            reply.error(OptionError::Invalid, "negotiate structured replies first");
            return None;
        }
        if self.find(&request.export).is_none() {
            reply.error(OptionError::Unknown, "no export of that name");
            return None;
        }
        Some(request)
    }

    fn list_meta_context(&self, data: &[u8], reply: &mut OptionReply<'_>) {
        let Some(request) = self.meta_context_request(data, reply) else {
            return;
        };
        let matches = |query: &String| query == "base:" || query == BASE_ALLOCATION;
        if request.queries.is_empty() || request.queries.iter().any(matches) {
            reply.meta_context(0, BASE_ALLOCATION);
        }
        reply.ack();
    }

    fn set_meta_context(&mut self, data: &[u8], reply: &mut OptionReply<'_>) {
        // Every SET replaces the selection, also when it fails.
        self.selection = None;
        let Some(request) = self.meta_context_request(data, reply) else {
            return;
        };
        // Only the full name selects; a wildcard, as for LIST, must not.
        let base_allocation = request.queries.iter().any(|query| query == BASE_ALLOCATION);
        if base_allocation {
            reply.meta_context(BASE_ALLOCATION_ID, BASE_ALLOCATION);
        }
        self.selection = Some(Selection { export: request.export, base_allocation });
        reply.ack();
    }
}

/// Refuses data where an option has none.
fn refuse_data(data: &[u8], reply: &mut OptionReply<'_>) -> bool {
    if !data.is_empty() {
        reply.error(OptionError::Invalid, "this option takes no data");
    }
    !data.is_empty()
}

/// What the export can do, in this dialect. (proto.md, "Transmission flags")
#[must_use]
pub fn transmission_flags(volume: &dyn Volume, dialect: Dialect) -> u16 {
    let always = flag::HAS_FLAGS
        | flag::SEND_FLUSH
        | flag::SEND_FUA
        | flag::CAN_MULTI_CONN
        | flag::SEND_CACHE;
    let writable = if volume.read_only() {
        flag::READ_ONLY
    } else {
        flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO
    };
    let by_dialect = match dialect {
        Dialect::Simple => 0,
        Dialect::Structured => flag::SEND_DF,
        Dialect::Extended => flag::SEND_DF | flag::BLOCK_STATUS_PAYLOAD,
    };
    always | writable | by_dialect
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::target::nbd::wire::put_u16;
    use crate::target::nbd::wire::put_u32;
    use crate::volume::memory::MemoryDirectory;
    use crate::volume::memory::MemoryVolume;

    const UNSUPPORTED: u32 = 0x8000_0001;
    const POLICY: u32 = 0x8000_0002;
    const INVALID: u32 = 0x8000_0003;
    const TLS_REQUIRED: u32 = 0x8000_0005;
    const UNKNOWN: u32 = 0x8000_0006;
    const SHUTDOWN: u32 = 0x8000_0007;
    const TOO_BIG: u32 = 0x8000_0009;
    const EXTENDED_REQUIRED: u32 = 0x8000_000a;
    const ACK: u32 = 1;

    /// A handshake and what its client sees.
    struct Client {
        handshake: Handshake,
        out: Vec<u8>,
        gone: Arc<MemoryVolume>,
    }

    impl Client {
        fn new(tls: TlsMode) -> Self {
            Self::with_flags(tls, 3)
        }

        fn with_flags(tls: TlsMode, flags: u32) -> Self {
            let gone = Arc::new(MemoryVolume::new("gone", 4096));
            gone.close();
            let directory = MemoryDirectory::new([
                Arc::new(MemoryVolume::new("a", 1 << 20)) as _,
                Arc::new(MemoryVolume::new("b", 1 << 30).read_only()) as _,
                Arc::clone(&gone) as _,
            ]);
            let mut out = Vec::new();
            let mut handshake = Handshake::new(Arc::new(directory), tls, true, &mut out);
            assert_eq!(out, b"NBDMAGICIHAVEOPT\0\x03");
            out.clear();
            let step = handshake.advance(&mut flags.to_be_bytes().as_slice(), &mut out);
            assert!(tls == TlsMode::Required && flags == 0 || matches!(step, Step::Answered));
            Self { handshake, out, gone }
        }

        fn send(&mut self, option: u32, data: &[u8]) -> Step {
            self.out.clear();
            let bytes = message(option, data);
            let mut input = bytes.as_slice();
            let mut step = self.handshake.advance(&mut input, &mut self.out);
            if data.len() > bytes_usize(OPTION_DATA_BYTES_MAX.into())
                && matches!(step, Step::Answered)
            {
                step = self.handshake.advance(&mut input, &mut self.out);
            }
            if !matches!(step, Step::Drop(_) | Step::Close) {
                assert!(input.is_empty(), "options are taken whole");
            }
            step
        }

        /// Sends an option and returns the types of its replies.
        fn replies(&mut self, option: u32, data: &[u8]) -> Vec<u32> {
            let _ = self.send(option, data);
            let mut kinds = Vec::new();
            let mut rest = self.out.as_slice();
            while let Some((header, after)) = rest.split_first_chunk::<20>() {
                assert_eq!(header[..8], 0x0003_e889_0455_65a9_u64.to_be_bytes());
                assert_eq!(header[8..12], option.to_be_bytes());
                kinds.push(u32::from_be_bytes(header[12..16].try_into().unwrap()));
                let length = u32::from_be_bytes(header[16..].try_into().unwrap());
                assert!(length < 500, "nbd-client's buffer is small");
                rest = &after[bytes_usize(length.into())..];
            }
            assert!(rest.is_empty());
            kinds
        }
    }

    fn message(option: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = b"IHAVEOPT".to_vec();
        put_u32(&mut bytes, option);
        put_u32(&mut bytes, u32::try_from(data.len()).unwrap());
        bytes.extend_from_slice(data);
        bytes
    }

    fn text(text: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_u32(&mut bytes, u32::try_from(text.len()).unwrap());
        bytes.extend_from_slice(text.as_bytes());
        bytes
    }

    fn info(name: &str, types: &[u16]) -> Vec<u8> {
        let mut bytes = text(name);
        put_u16(&mut bytes, u16::try_from(types.len()).unwrap());
        for kind in types {
            put_u16(&mut bytes, *kind);
        }
        bytes
    }

    fn contexts(name: &str, queries: &[&str]) -> Vec<u8> {
        let mut bytes = text(name);
        put_u32(&mut bytes, u32::try_from(queries.len()).unwrap());
        for query in queries {
            bytes.extend_from_slice(&text(query));
        }
        bytes
    }

    fn agreed(step: Step) -> Negotiated {
        match step {
            Step::Transmission(negotiated) => negotiated,
            _ => panic!("no export was agreed"),
        }
    }

    // spec: nbd-client-flags
    #[test]
    fn unknown_client_flags_drop() {
        let directory = Arc::new(MemoryDirectory::default());
        let mut out = Vec::new();
        let mut handshake = Handshake::new(directory, TlsMode::Off, true, &mut out);
        let step = handshake.advance(&mut [0, 0, 0, 7].as_slice(), &mut out);
        assert!(matches!(step, Step::Drop(_)));
    }

    // spec: nbd-old-client
    #[test]
    fn clients_without_fixed_newstyle_may_only_name_an_export() {
        let mut client = Client::with_flags(TlsMode::Off, 0);
        let step = client.send(1, b"a");
        assert_eq!(client.out.len(), 8 + 2 + 124, "padding, because NO_ZEROES was not set");
        assert_eq!(agreed(step).volume.name(), "a");
        assert!(matches!(Client::with_flags(TlsMode::Off, 0).send(7, &[]), Step::Drop(_)));
        let mut required = Client::with_flags(TlsMode::Required, 0);
        assert!(matches!(required.send(1, b"a"), Step::Drop(_)));
    }

    // spec: nbd-option-magic
    #[test]
    fn wrong_option_magic_drops() {
        let mut client = Client::new(TlsMode::Off);
        let mut bytes = message(7, &[]);
        bytes[7] ^= 1;
        let step = client.handshake.advance(&mut bytes.as_slice(), &mut client.out);
        assert!(matches!(step, Step::Drop(_)));
    }

    // spec: nbd-option-unknown
    #[test]
    fn unknown_options_are_consumed_and_refused() {
        let mut client = Client::new(TlsMode::Off);
        for option in [0, 4, 12, 9999, u32::MAX] {
            assert_eq!(client.replies(option, b"whatever"), [UNSUPPORTED]);
        }
        assert_eq!(client.replies(7, &info("a", &[])), [3, 3, ACK]);
    }

    // spec: nbd-option-too-big
    #[test]
    fn large_option_data_is_thrown_away_and_absurd_data_drops() {
        let mut client = Client::new(TlsMode::Off);
        assert_eq!(client.replies(8, &[]), [ACK]);
        assert_eq!(client.replies(10, &contexts("a", &["base:allocation"])), [4, ACK]);
        client.out.clear();
        let bytes = message(10, &vec![0; 100_000]);
        let mut input = bytes.as_slice();
        assert!(matches!(client.handshake.advance(&mut input, &mut client.out), Step::Answered));
        let (mut first, mut second) = input.split_at(70_000);
        let step = client.handshake.advance(&mut first, &mut client.out);
        assert!(matches!(step, Step::NeedBytes) && first.is_empty() && client.out.is_empty());
        let step = client.handshake.advance(&mut second, &mut client.out);
        assert!(matches!(step, Step::Answered) && second.is_empty());
        assert_eq!(client.out[12..16], TOO_BIG.to_be_bytes());
        let negotiated = agreed(client.send(7, &info("a", &[])));
        assert!(!negotiated.base_allocation, "every SET replaces what was selected");

        let mut absurd = message(10, &[]);
        absurd[12..16].copy_from_slice(&(OPTION_DATA_DISCARD_MAX + 1).to_be_bytes());
        let step = client.handshake.advance(&mut absurd.as_slice(), &mut client.out);
        assert!(matches!(step, Step::Drop(_)));
    }

    #[test]
    fn large_option_data_changes_nothing_else_about_an_option() {
        let large = vec![0; 70_000];
        let mut client = Client::new(TlsMode::Required);
        assert_eq!(client.replies(8, &large), [TLS_REQUIRED]);
        assert!(matches!(client.send(2, &large), Step::Close));
        let mut client = Client::new(TlsMode::Off);
        for _ in 0..client.handshake.options_max() {
            assert_eq!(client.replies(99, &large), [TOO_BIG]);
        }
        assert!(matches!(client.send(99, &large), Step::Drop(_)));
    }

    // spec: nbd-option-no-data
    #[test]
    fn options_without_data_refuse_data() {
        let mut client = Client::new(TlsMode::Optional);
        for option in [3, 5, 8, 11] {
            assert_eq!(client.replies(option, b"x"), [INVALID], "{option}");
        }
        assert!(matches!(client.send(2, b"any"), Step::Close));
        assert_eq!(client.out.len(), 20, "ABORT is acknowledged");
    }

    // spec: nbd-export-name
    #[test]
    fn export_name_answers_or_drops() {
        let mut client = Client::new(TlsMode::Off);
        let negotiated = agreed(client.send(1, b""));
        assert_eq!(negotiated.volume.name(), "a", "the default export is the first");
        assert_eq!(client.out, [&(1_u64 << 20).to_be_bytes()[..], &[0x0d, 0x6d]].concat());
        for name in [&b"nope"[..], b"gone", &[0xff], &[b'a'; 5000]] {
            assert!(matches!(Client::new(TlsMode::Off).send(1, name), Step::Drop(_)));
        }
        assert_eq!(client.replies(11, &[]), [ACK]);
        assert!(matches!(client.send(1, b"a"), Step::Drop(_)), "not after EXTENDED_HEADERS");
    }

    // spec: nbd-go
    #[test]
    fn go_and_info_give_the_same_information() {
        let mut client = Client::new(TlsMode::Off);
        assert_eq!(client.replies(6, &info("b", &[1, 2, 3, 77])), [3, 3, 3, 3, ACK]);
        let answer = client.out.clone();
        let negotiated = agreed(client.send(7, &info("b", &[1, 2, 3, 77])));
        let without_number = |bytes: &[u8]| bytes[20..].to_vec();
        assert_eq!(without_number(&answer)[..12], without_number(&client.out)[..12]);
        assert_eq!(answer.len(), client.out.len());
        assert_eq!(client.out[20..32], [0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0x05, 0x0f]);
        assert_eq!(negotiated.dialect, Dialect::Simple);
    }

    // spec: nbd-go-errors
    #[test]
    fn go_refuses_what_it_cannot_serve_and_haggling_goes_on() {
        let mut client = Client::new(TlsMode::Off);
        assert_eq!(client.replies(7, &info("nope", &[])), [UNKNOWN]);
        assert_eq!(client.replies(7, &info("gone", &[])), [SHUTDOWN]);
        assert_eq!(client.replies(7, b"abc"), [INVALID]);
        assert_eq!(client.replies(7, &[]), [INVALID]);
        assert!(client.gone.closed());
        assert!(matches!(client.send(7, &info("a", &[])), Step::Transmission(_)));
    }

    // spec: nbd-list
    #[test]
    fn list_names_every_export_or_none_by_policy() {
        let mut client = Client::new(TlsMode::Off);
        assert_eq!(client.replies(3, &[]), [2, 2, 2, ACK]);
        assert_eq!(client.out[20..25], [0, 0, 0, 1, b'a']);
        client.handshake.listable = false;
        assert_eq!(client.replies(3, &[]), [POLICY]);
    }

    // spec: nbd-dialect
    #[test]
    fn the_richest_dialect_wins() {
        let mut client = Client::new(TlsMode::Off);
        assert_eq!(client.replies(8, &[]), [ACK]);
        assert_eq!(client.replies(8, &[]), [ACK], "again is harmless");
        assert_eq!(client.handshake.dialect(), Dialect::Structured);
        assert_eq!(client.replies(11, &[]), [ACK]);
        assert_eq!(client.replies(8, &[]), [EXTENDED_REQUIRED]);
        let flags = transmission_flags(&MemoryVolume::new("v", 0), Dialect::Extended);
        assert_eq!(flags, 0x0ded | flag::BLOCK_STATUS_PAYLOAD);
        assert_eq!(agreed(client.send(7, &info("a", &[]))).dialect, Dialect::Extended);
    }

    // spec: nbd-meta-context
    #[test]
    fn contexts_are_listed_by_wildcard_and_set_by_name() {
        let mut client = Client::new(TlsMode::Off);
        let set = |queries: &[&str]| contexts("a", queries);
        assert_eq!(client.replies(10, &set(&["base:allocation"])), [INVALID], "structured first");
        assert_eq!(client.replies(8, &[]), [ACK]);
        assert_eq!(client.replies(9, &set(&[])), [4, ACK]);
        assert_eq!(client.replies(9, &set(&["base:"])), [4, ACK]);
        assert_eq!(client.replies(9, &set(&["qemu:"])), [ACK]);
        assert_eq!(client.replies(9, &contexts("nope", &[])), [UNKNOWN]);
        assert_eq!(client.replies(10, &set(&["base:"])), [ACK]);
        assert_eq!(client.replies(10, &set(&["x:y", "base:allocation", "plain"])), [4, ACK]);
        assert_eq!(client.out[20..24], BASE_ALLOCATION_ID.to_be_bytes());
        assert!(agreed(client.send(7, &info("a", &[]))).base_allocation);
    }

    // spec: nbd-meta-context-scope
    #[test]
    fn a_selection_holds_for_its_export_until_replaced() {
        let chosen = contexts("a", &["base:allocation"]);
        let mut client = Client::new(TlsMode::Off);
        assert_eq!(client.replies(8, &[]), [ACK]);
        assert_eq!(client.replies(10, &chosen), [4, ACK]);
        assert!(!agreed(client.send(7, &info("b", &[]))).base_allocation, "another export");
        assert_eq!(client.replies(10, &contexts("nope", &["base:allocation"])), [UNKNOWN]);
        assert!(!agreed(client.send(7, &info("a", &[]))).base_allocation, "failed SET clears");
        assert_eq!(client.replies(10, &chosen), [4, ACK]);
        assert_eq!(client.replies(10, b"bad"), [INVALID]);
        assert!(!agreed(client.send(7, &info("a", &[]))).base_allocation, "bad SET clears");
    }

    // spec: nbd-tls-off
    #[test]
    fn starttls_is_refused_when_tls_is_off() {
        assert_eq!(Client::new(TlsMode::Off).replies(5, &[]), [POLICY]);
    }

    // spec: nbd-tls-required
    #[test]
    fn required_tls_refuses_everything_else_first() {
        let mut client = Client::new(TlsMode::Required);
        for option in [3, 6, 7, 8, 9, 10, 11, 99] {
            assert_eq!(client.replies(option, &[]), [TLS_REQUIRED], "{option}");
        }
        assert!(matches!(client.send(5, &[]), Step::StartTls));
        let mut client = Client { handshake: client.handshake.secured(), ..client };
        assert_eq!(client.replies(5, &[]), [INVALID], "no TLS inside TLS");
        assert!(matches!(client.send(7, &info("a", &[])), Step::Transmission(_)));
        assert!(matches!(Client::new(TlsMode::Required).send(1, b"a"), Step::Drop(_)));
        assert!(matches!(Client::new(TlsMode::Required).send(2, &[]), Step::Close));
    }

    // spec: nbd-tls-forget
    #[test]
    fn tls_forgets_what_was_agreed_before() {
        let mut client = Client::new(TlsMode::Optional);
        assert_eq!(client.replies(11, &[]), [ACK]);
        assert_eq!(client.replies(10, &contexts("a", &["base:allocation"])), [4, ACK]);
        assert!(matches!(client.send(5, &[]), Step::StartTls));
        let mut client = Client { handshake: client.handshake.secured(), ..client };
        let negotiated = agreed(client.send(7, &info("a", &[])));
        assert_eq!(negotiated.dialect, Dialect::Simple);
        assert!(!negotiated.base_allocation);
    }

    #[test]
    fn haggling_for_ever_drops() {
        let mut client = Client::new(TlsMode::Off);
        for _ in 0..client.handshake.options_max() {
            assert_eq!(client.replies(99, &[]), [UNSUPPORTED]);
        }
        assert!(matches!(client.send(99, &[]), Step::Drop(_)));
    }

    proptest! {
        #[test]
        fn any_cut_of_the_stream_gives_the_same_answers(cut in 1..40_usize) {
            let stream: Vec<u8> = [
                message(8, &[]),
                message(10, &contexts("a", &["base:allocation"])),
                message(77, b"data"),
                message(7, &info("a", &[3])),
            ]
            .concat();
            let mut whole = Client::new(TlsMode::Off);
            let mut input = stream.as_slice();
            while !matches!(
                whole.handshake.advance(&mut input, &mut whole.out),
                Step::Transmission(_)
            ) {}
            let mut pieces = Client::new(TlsMode::Off);
            let mut held = Vec::new();
            for part in stream.chunks(cut) {
                held.extend_from_slice(part);
                loop {
                    let mut input = held.as_slice();
                    let step = pieces.handshake.advance(&mut input, &mut pieces.out);
                    held = input.to_vec();
                    if !matches!(step, Step::Answered) {
                        break;
                    }
                }
            }
            prop_assert_eq!(whole.out, pieces.out);
        }
    }
}

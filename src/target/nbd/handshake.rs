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
//! * At most [`OPTIONS_MAX`] options are answered, so a client cannot haggle for ever.

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
/// Options answered per connection. Clients send fewer than ten; `qemu-nbd --list` sends a few per
/// export, so this allows some hundred exports.
const OPTIONS_MAX: u32 = 1024;

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
    /// Throwing away this much of a refused option's data.
    Discard {
        option_number: u32,
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
    options_answered: u32,
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
            State::Discard { option_number, bytes } => {
                let taken = input.len().min(bytes_usize(u64::from(bytes)));
                *input = input.split_at(taken).1;
                let left = bytes - u32::try_from(taken).expect("at most `bytes`, a u32");
                if left > 0 {
                    self.state = State::Discard { option_number, bytes: left };
                    return Step::NeedBytes;
                }
                self.state = State::Option;
                let mut reply = OptionReply { out, number: option_number };
                reply.error(OptionError::TooBig, "option data larger than 64 KiB");
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
            if header.data_bytes > OPTION_DATA_DISCARD_MAX || header.option == NbdOption::ExportName
            {
                return Step::Drop("option data too large");
            }
            *input = rest;
            self.state = State::Discard { option_number: header.number, bytes: header.data_bytes };
            return Step::Answered;
        }
        let Some((data, rest)) = rest.split_at_checked(bytes_usize(header.data_bytes.into()))
        else {
            return Step::NeedBytes;
        };
        *input = rest;
        self.options_answered += 1;
        if self.options_answered > OPTIONS_MAX {
            return Step::Drop("too many options");
        }
        self.answer(header, data, out)
    }

    /// Answers one whole option.
    fn answer(&mut self, header: OptionHeader, data: &[u8], out: &mut Vec<u8>) -> Step {
        if !self.client.fixed_newstyle && header.option != NbdOption::ExportName {
            return Step::Drop(
                "option other than EXPORT_NAME from a client without fixed newstyle",
            );
        }
        let mut reply = OptionReply { out, number: header.number };
        if self.tls == TlsMode::Required && !self.in_tls {
            match header.option {
                NbdOption::StartTls | NbdOption::Abort => {}
                NbdOption::ExportName => return Step::Drop("EXPORT_NAME without TLS"),
                _ => {
                    reply.error(OptionError::TlsRequired, "this server requires TLS");
                    return Step::Answered;
                }
            }
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

    /// Finds an export; the empty name is the first one.
    fn find(&self, name: &str) -> Option<VolumeRef> {
        match self.directory.find(name) {
            None if name.is_empty() => self.directory.list().into_iter().next(),
            found => found,
        }
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
            reply.error(OptionError::Unknown, "no export of that name");
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
        for volume in self.directory.list() {
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

//! Transmission messages: bytes to validated types and back, pure.
//!
//! One function meets raw request bytes per header form ([`Request::decode_compact`],
//! [`Request::decode_extended`]); past it a [`Request`] has a known command, only flags that
//! command may carry, and a payload within [`PAYLOAD_BYTES_MAX`]. What depends on the export or on
//! what was negotiated is checked in `session`.
//!
//! All integers are big-endian. (proto.md, "Transmission phase"; extended headers as on the
//! `extension-ext-header` branch.) The handshake's messages are in `options`.

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::big_endian::U16;
use zerocopy::big_endian::U32;
use zerocopy::big_endian::U64;

/// Bytes in a compact request header.
pub const REQUEST_BYTES: usize = 28;
/// Bytes in an extended request header.
pub const EXTENDED_REQUEST_BYTES: usize = 32;

/// Largest read or write, and the maximum we advertise: what clients assume that never ask.
/// (proto.md, "Size constraints")
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Largest payload read and thrown away to keep a connection; beyond it, we drop.
pub const PAYLOAD_BYTES_DISCARD_MAX: u32 = 64 << 20;
/// Payload of a BLOCK_STATUS: an effect length and at most this many context ids. There is one
/// context to name, so more than a few are a mistake.
const STATUS_CONTEXTS_MAX: u32 = 64;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

// (proto.md, "Command flags")
const FLAG_FUA: u16 = 1 << 0;
const FLAG_NO_HOLE: u16 = 1 << 1;
const FLAG_DF: u16 = 1 << 2;
const FLAG_REQ_ONE: u16 = 1 << 3;
const FLAG_FAST_ZERO: u16 = 1 << 4;
const FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// Set in the last chunk of a reply.
const REPLY_FLAG_DONE: u16 = 1 << 0;

/// Transmission flags of INFO_EXPORT. (proto.md, "Transmission flags")
pub mod transmission_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes fail with EPERM.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH may be sent.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// FUA may be set on every command.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM may be sent.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES may be sent, with NO_HOLE.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// DF may be set on READ; needs chunked replies.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers all of them.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE may be sent.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// FAST_ZERO may be set on WRITE_ZEROES.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// BLOCK_STATUS may carry the ids it asks for; needs extended headers.
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Which headers travel: what the client negotiated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dialect {
    /// Compact requests, simple replies only.
    #[default]
    Simple,
    /// Compact requests, replies in chunks.
    Structured,
    /// 32-byte headers both ways with 64-bit lengths.
    Extended,
}

impl Dialect {
    /// Bytes in a request header.
    #[must_use]
    pub fn request_bytes(self) -> usize {
        match self {
            Self::Simple | Self::Structured => REQUEST_BYTES,
            Self::Extended => EXTENDED_REQUEST_BYTES,
        }
    }
}

/// What a client may ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the protocol's own words")]
pub enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    Cache,
    WriteZeroes,
    BlockStatus,
}

impl Command {
    /// Whether it changes the volume.
    #[must_use]
    pub fn writes(self) -> bool {
        match self {
            Self::Write | Self::Trim | Self::WriteZeroes => true,
            Self::Read | Self::Disconnect | Self::Flush | Self::Cache | Self::BlockStatus => false,
        }
    }

    fn decode(value: u16) -> Option<Self> {
        // RESIZE (8) is never advertised, so it is as unknown as any other.
        Some(match value {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            _ => return None,
        })
    }

    /// Flags it may carry. FUA is allowed everywhere because we advertise SEND_FUA.
    fn flags_allowed(self) -> u16 {
        FLAG_FUA
            | match self {
                Self::Read => FLAG_DF,
                Self::WriteZeroes => FLAG_NO_HOLE | FLAG_FAST_ZERO,
                Self::BlockStatus => FLAG_REQ_ONE,
                Self::Write | Self::Disconnect | Self::Flush | Self::Trim | Self::Cache => 0,
            }
    }
}

/// What a reply has to repeat of its request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tag {
    /// The client's tag, echoed and never interpreted.
    pub cookie: u64,
    /// The request's offset: extended replies carry it, and read chunks count from it.
    pub offset: u64,
}

/// A request that is well formed. Whether it fits *this export* is checked by the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub command: Command,
    /// Cookie and first byte addressed.
    pub tag: Tag,
    /// Bytes addressed. For a BLOCK_STATUS with a payload: 0 until [`StatusPayload`] says.
    pub length: u64,
    /// Bytes that follow the header on the wire, at most [`PAYLOAD_BYTES_MAX`].
    pub payload_bytes: u32,
    /// What is changed is to be durable when the reply is sent.
    pub fua: bool,
    /// WRITE_ZEROES: the range stays allocated.
    pub no_hole: bool,
    /// READ: at most one content chunk.
    pub dont_fragment: bool,
    /// BLOCK_STATUS: exactly one extent.
    pub request_one: bool,
}

/// What a malformed header means for the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// Framing is lost or the payload is absurd: the connection must be dropped.
    Drop(&'static str),
    /// Framing holds: discard `skip_bytes` of payload, reply EINVAL, go on.
    Invalid {
        /// Whom to answer.
        tag: Tag,
        /// Payload bytes to throw away first.
        skip_bytes: u32,
        /// For the person reading the client's log.
        reason: &'static str,
    },
}

/// A compact request header as it travels. (proto.md, "Request message")
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRequest {
    magic: U32,
    flags: U16,
    command: U16,
    cookie: U64,
    offset: U64,
    length: U32,
}

const _: () = assert!(size_of::<RawRequest>() == REQUEST_BYTES);

/// An extended request header. (extension-ext-header, "Extended request message")
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawExtendedRequest {
    magic: U32,
    flags: U16,
    command: U16,
    cookie: U64,
    offset: U64,
    length: U64,
}

const _: () = assert!(size_of::<RawExtendedRequest>() == EXTENDED_REQUEST_BYTES);

impl Request {
    /// Decodes the header at the start of `bytes` in the form `dialect` says; `None` if it is not
    /// all there yet.
    #[must_use]
    pub fn decode(dialect: Dialect, bytes: &[u8]) -> Option<Result<Self, Malformed>> {
        match dialect {
            Dialect::Simple | Dialect::Structured => bytes.first_chunk().map(Self::decode_compact),
            Dialect::Extended => bytes.first_chunk().map(Self::decode_extended),
        }
    }

    /// Decodes and validates a compact header.
    ///
    /// # Errors
    /// See [`Malformed`].
    pub fn decode_compact(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, Malformed> {
        let raw: RawRequest = zerocopy::transmute!(*bytes);
        if raw.magic.get() != REQUEST_MAGIC {
            return Err(Malformed::Drop("bad request magic"));
        }
        let tag = Tag { cookie: raw.cookie.get(), offset: raw.offset.get() };
        // An unknown command's payload is unknown too; none is the only guess that can be right.
        let Some(command) = Command::decode(raw.command.get()) else {
            return Err(Malformed::Invalid { tag, skip_bytes: 0, reason: "unknown command" });
        };
        let length = raw.length.get();
        let payload_bytes = if command == Command::Write { length } else { 0 };
        Self::validate(command, raw.flags.get(), tag, u64::from(length), payload_bytes)
    }

    /// Decodes and validates an extended header.
    ///
    /// # Errors
    /// See [`Malformed`].
    pub fn decode_extended(bytes: &[u8; EXTENDED_REQUEST_BYTES]) -> Result<Self, Malformed> {
        let raw: RawExtendedRequest = zerocopy::transmute!(*bytes);
        if raw.magic.get() != EXTENDED_REQUEST_MAGIC {
            return Err(Malformed::Drop("bad request magic"));
        }
        let tag = Tag { cookie: raw.cookie.get(), offset: raw.offset.get() };
        let (flags, length) = (raw.flags.get(), raw.length.get());
        let with_payload = flags & FLAG_PAYLOAD_LEN != 0;
        let payload_bytes = match u32::try_from(length) {
            _ if !with_payload => 0,
            Ok(bytes) => bytes,
            Err(_) => return Err(Malformed::Drop("payload too large")),
        };
        let Some(command) = Command::decode(raw.command.get()) else {
            return Err(invalid(tag, payload_bytes, "unknown command"));
        };
        match command {
            Command::Write if !with_payload => {
                return Err(invalid(tag, 0, "write without a payload"));
            }
            Command::BlockStatus if with_payload => {
                let ids = payload_bytes.checked_sub(8).map(|bytes| (bytes / 4, bytes % 4));
                match ids {
                    Some((count, 0)) if count <= STATUS_CONTEXTS_MAX => {}
                    _ => return Err(invalid(tag, payload_bytes, "bad block status payload")),
                }
            }
            _ if with_payload && command != Command::Write => {
                return Err(invalid(tag, payload_bytes, "payload where none belongs"));
            }
            _ => {}
        }
        let length = if command == Command::BlockStatus && with_payload { 0 } else { length };
        Self::validate(command, flags & !FLAG_PAYLOAD_LEN, tag, length, payload_bytes)
    }

    /// What both forms have in common.
    fn validate(
        command: Command,
        flags: u16,
        tag: Tag,
        length: u64,
        payload_bytes: u32,
    ) -> Result<Self, Malformed> {
        if payload_bytes > PAYLOAD_BYTES_MAX {
            return Err(invalid(tag, payload_bytes, "write larger than the maximum of 32 MiB"));
        }
        if flags & !command.flags_allowed() != 0 {
            return Err(invalid(tag, payload_bytes, "flag unknown or not for this command"));
        }
        Ok(Self {
            command,
            tag,
            length,
            payload_bytes,
            fua: flags & FLAG_FUA != 0,
            no_hole: flags & FLAG_NO_HOLE != 0,
            dont_fragment: flags & FLAG_DF != 0,
            request_one: flags & FLAG_REQ_ONE != 0,
        })
    }
}

/// Framing holds, unless the payload to skip is absurd.
fn invalid(tag: Tag, skip_bytes: u32, reason: &'static str) -> Malformed {
    if skip_bytes > PAYLOAD_BYTES_DISCARD_MAX {
        return Malformed::Drop("payload too large");
    }
    Malformed::Invalid { tag, skip_bytes, reason }
}

/// What a BLOCK_STATUS payload asks for. (extension-ext-header, "NBD_CMD_BLOCK_STATUS")
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatusPayload {
    /// Bytes addressed.
    pub length: u64,
    /// Contexts to answer for.
    pub contexts: Vec<u32>,
}

impl StatusPayload {
    /// Decodes a payload whose length [`Request::decode_extended`] has checked; `None` if it is
    /// not one.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (length, ids) = U64::read_from_prefix(bytes).ok()?;
        let ids = <[U32]>::ref_from_bytes(ids).ok()?;
        Some(Self { length: length.get(), contexts: ids.iter().map(|id| id.get()).collect() })
    }
}

/// What a reply chunk carries. (proto.md, "Structured reply types")
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the protocol's own words")]
pub enum ChunkKind {
    None,
    OffsetData,
    OffsetHole,
    BlockStatus,
    BlockStatusExt,
    Error,
}

impl ChunkKind {
    fn value(self) -> u16 {
        match self {
            Self::None => 0,
            Self::OffsetData => 1,
            Self::OffsetHole => 2,
            Self::BlockStatus => 5,
            Self::BlockStatusExt => 6,
            Self::Error => 0x8001,
        }
    }
}

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct RawSimpleReply {
    magic: U32,
    error: U32,
    cookie: U64,
}

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct RawStructuredReply {
    magic: U32,
    flags: U16,
    kind: U16,
    cookie: U64,
    payload_bytes: U32,
}

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct RawExtendedReply {
    magic: U32,
    flags: U16,
    kind: U16,
    cookie: U64,
    offset: U64,
    payload_bytes: U64,
}

const _: () = assert!(size_of::<RawSimpleReply>() == 16);
const _: () = assert!(size_of::<RawStructuredReply>() == 20);
const _: () = assert!(size_of::<RawExtendedReply>() == 32);

/// Appends a simple reply; `error` 0 is success.
pub fn put_simple_reply(out: &mut Vec<u8>, cookie: u64, error: u32) {
    let raw = RawSimpleReply {
        magic: SIMPLE_REPLY_MAGIC.into(),
        error: error.into(),
        cookie: cookie.into(),
    };
    out.extend_from_slice(raw.as_bytes());
}

/// Appends a chunk's header in the chunked dialect; `last` closes the reply.
pub fn put_chunk(
    out: &mut Vec<u8>,
    extended: bool,
    tag: Tag,
    kind: ChunkKind,
    payload_bytes: u32,
    last: bool,
) {
    let flags = U16::new(if last { REPLY_FLAG_DONE } else { 0 });
    if extended {
        let raw = RawExtendedReply {
            magic: EXTENDED_REPLY_MAGIC.into(),
            flags,
            kind: kind.value().into(),
            cookie: tag.cookie.into(),
            offset: tag.offset.into(),
            payload_bytes: u64::from(payload_bytes).into(),
        };
        out.extend_from_slice(raw.as_bytes());
    } else {
        let raw = RawStructuredReply {
            magic: STRUCTURED_REPLY_MAGIC.into(),
            flags,
            kind: kind.value().into(),
            cookie: tag.cookie.into(),
            payload_bytes: payload_bytes.into(),
        };
        out.extend_from_slice(raw.as_bytes());
    }
}

/// Appends a `u16`, `u32` or `u64` in network order.
pub fn put_u16(out: &mut Vec<u8>, value: u16) {
    out.extend_from_slice(&value.to_be_bytes());
}

/// See [`put_u16`].
pub fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_be_bytes());
}

/// See [`put_u16`].
pub fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The header as a client would send it.
    fn compact(flags: u16, command: u16, length: u32) -> [u8; REQUEST_BYTES] {
        zerocopy::transmute!(RawRequest {
            magic: REQUEST_MAGIC.into(),
            flags: flags.into(),
            command: command.into(),
            cookie: 7.into(),
            offset: 4096.into(),
            length: length.into(),
        })
    }

    fn extended(flags: u16, command: u16, length: u64) -> [u8; EXTENDED_REQUEST_BYTES] {
        zerocopy::transmute!(RawExtendedRequest {
            magic: EXTENDED_REQUEST_MAGIC.into(),
            flags: flags.into(),
            command: command.into(),
            cookie: 7.into(),
            offset: 4096.into(),
            length: length.into(),
        })
    }

    /// Bytes to skip, if the header is refused without dropping the connection.
    fn skipped(decoded: Result<Request, Malformed>) -> Option<u32> {
        match decoded {
            Err(Malformed::Invalid { skip_bytes, tag, .. }) => {
                assert_eq!(tag, Tag { cookie: 7, offset: 4096 });
                Some(skip_bytes)
            }
            _ => None,
        }
    }

    // spec: nbd-request-magic
    #[test]
    fn wrong_magic_drops() {
        let mut bytes = compact(0, 0, 512);
        bytes[3] ^= 1;
        assert!(matches!(Request::decode_compact(&bytes), Err(Malformed::Drop(_))));
        let mut bytes = extended(0, 0, 512);
        bytes[0] ^= 1;
        assert!(matches!(Request::decode_extended(&bytes), Err(Malformed::Drop(_))));
    }

    // spec: nbd-write-oversized
    #[test]
    fn oversized_write_is_refused_but_keeps_the_connection() {
        let length = PAYLOAD_BYTES_MAX + 1;
        assert_eq!(skipped(Request::decode_compact(&compact(0, 1, length))), Some(length));
        let bytes = extended(FLAG_PAYLOAD_LEN, 1, length.into());
        assert_eq!(skipped(Request::decode_extended(&bytes)), Some(length));
        assert!(Request::decode_compact(&compact(0, 1, PAYLOAD_BYTES_MAX)).is_ok());
    }

    // spec: nbd-write-absurd
    #[test]
    fn absurd_write_drops() {
        let length = PAYLOAD_BYTES_DISCARD_MAX + 1;
        let decoded = Request::decode_compact(&compact(0, 1, length));
        assert!(matches!(decoded, Err(Malformed::Drop(_))));
        for command in [1, 3, 7, 99] {
            let bytes = extended(FLAG_PAYLOAD_LEN, command, 1 << 40);
            assert!(matches!(Request::decode_extended(&bytes), Err(Malformed::Drop(_))));
        }
    }

    // spec: nbd-unknown-flag
    #[test]
    fn flags_of_other_commands_are_refused_after_the_payload() {
        assert_eq!(skipped(Request::decode_compact(&compact(FLAG_NO_HOLE, 1, 512))), Some(512));
        assert_eq!(skipped(Request::decode_compact(&compact(FLAG_DF, 6, 512))), Some(0));
        assert_eq!(skipped(Request::decode_compact(&compact(1 << 15, 0, 512))), Some(0));
        assert_eq!(skipped(Request::decode_compact(&compact(FLAG_PAYLOAD_LEN, 1, 9))), Some(9));
    }

    // spec: nbd-fua-everywhere
    #[test]
    fn fua_is_accepted_on_every_command() {
        for command in 0..=7 {
            assert!(Request::decode_compact(&compact(FLAG_FUA, command, 512)).is_ok());
        }
    }

    // spec: nbd-unknown-command
    #[test]
    fn unknown_commands_have_no_payload_unless_they_say_so() {
        assert_eq!(skipped(Request::decode_compact(&compact(0, 8, 4096))), Some(0));
        assert_eq!(skipped(Request::decode_extended(&extended(0, 99, 4096))), Some(0));
        let bytes = extended(FLAG_PAYLOAD_LEN, 99, 4096);
        assert_eq!(skipped(Request::decode_extended(&bytes)), Some(4096));
    }

    // spec: nbd-ext-payload-len
    #[test]
    fn extended_payloads_go_with_writes_and_block_status_only() {
        assert_eq!(skipped(Request::decode_extended(&extended(0, 1, 512))), Some(0));
        let trim = extended(FLAG_PAYLOAD_LEN, 4, 512);
        assert_eq!(skipped(Request::decode_extended(&trim)), Some(512));
        let status = Request::decode_extended(&extended(FLAG_PAYLOAD_LEN, 7, 12)).unwrap();
        assert_eq!((status.length, status.payload_bytes), (0, 12));
        for bad in [0, 7, 9, 13, 8 + 4 * 65] {
            let bytes = extended(FLAG_PAYLOAD_LEN, 7, bad);
            assert_eq!(skipped(Request::decode_extended(&bytes)), u32::try_from(bad).ok());
        }
        let whole = Request::decode_extended(&extended(0, 4, u64::MAX)).unwrap();
        assert_eq!((whole.length, whole.payload_bytes), (u64::MAX, 0));
    }

    #[test]
    fn status_payload_reads_back() {
        let mut bytes = Vec::new();
        put_u64(&mut bytes, 1 << 40);
        put_u32(&mut bytes, 5);
        put_u32(&mut bytes, 6);
        let payload = StatusPayload::decode(&bytes).unwrap();
        assert_eq!(payload, StatusPayload { length: 1 << 40, contexts: vec![5, 6] });
        assert_eq!(StatusPayload::decode(&bytes[..7]), None);
        assert_eq!(StatusPayload::decode(&bytes[..13]), None);
    }

    proptest! {
        #[test]
        fn decode_survives_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = Request::decode(Dialect::Simple, &bytes);
            let _ = Request::decode(Dialect::Extended, &bytes);
            let _ = StatusPayload::decode(&bytes);
        }

        #[test]
        fn accepted_headers_are_bounded(
            flags in any::<u16>(), command in 0..12_u16, length in any::<u64>(),
        ) {
            if let Ok(request) = Request::decode_extended(&extended(flags, command, length)) {
                prop_assert!(request.payload_bytes <= PAYLOAD_BYTES_MAX);
                prop_assert_eq!(request.tag, Tag { cookie: 7, offset: 4096 });
            }
        }
    }
}

//! Handshake messages: bytes to validated types and back, pure.
//!
//! (proto.md, "Handshake phase", "Option types", "Option reply types".) One decode function per
//! message; each refuses lengths that do not add up exactly. Names longer than
//! [`NAME_BYTES_MAX`], with NUL or not UTF-8 are refused too: nothing of ours has such a name.

use std::str;

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::big_endian::U16;
use zerocopy::big_endian::U32;
use zerocopy::big_endian::U64;

use crate::target::nbd::wire::put_u16;
use crate::target::nbd::wire::put_u32;
use crate::target::nbd::wire::put_u64;

/// Longest string of the protocol. (proto.md, "Values")
pub const NAME_BYTES_MAX: usize = 4096;
/// Bytes in an option request's header.
pub const OPTION_HEADER_BYTES: usize = 16;
/// Bytes of client flags after the greeting.
pub const CLIENT_FLAGS_BYTES: usize = 4;

const NBD_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// In the server's greeting and the client's flags alike: fixed newstyle.
const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Likewise: no padding after EXPORT_NAME.
const FLAG_NO_ZEROES: u16 = 1 << 1;

/// Context of base:allocation. Any number will do; not 0, which stands for "not selected".
pub const BASE_ALLOCATION_ID: u32 = 1;
/// The one metadata context we have.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Appends the 18 bytes every connection starts with.
pub fn put_greeting(out: &mut Vec<u8>) {
    put_u64(out, NBD_MAGIC);
    put_u64(out, OPTION_MAGIC);
    put_u16(out, FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
}

/// What the client said to the greeting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClientFlags {
    /// It understands option replies.
    pub fixed_newstyle: bool,
    /// It expects no padding after EXPORT_NAME.
    pub no_zeroes: bool,
}

impl ClientFlags {
    /// Decodes the client's flags; `None` for bits we never offered.
    #[must_use]
    pub fn decode(bytes: [u8; CLIENT_FLAGS_BYTES]) -> Option<Self> {
        let bits = u32::from_be_bytes(bytes);
        let known = u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        (bits & !known == 0).then(|| Self {
            fixed_newstyle: bits & u32::from(FLAG_FIXED_NEWSTYLE) != 0,
            no_zeroes: bits & u32::from(FLAG_NO_ZEROES) != 0,
        })
    }
}

/// An option the client may send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the protocol's own words")]
pub enum NbdOption {
    ExportName,
    Abort,
    List,
    StartTls,
    Info,
    Go,
    StructuredReply,
    ListMetaContext,
    SetMetaContext,
    ExtendedHeaders,
    /// Anything else, the withdrawn PEEK_EXPORT included.
    Unknown,
}

impl NbdOption {
    fn decode(value: u32) -> Self {
        match value {
            1 => Self::ExportName,
            2 => Self::Abort,
            3 => Self::List,
            5 => Self::StartTls,
            6 => Self::Info,
            7 => Self::Go,
            8 => Self::StructuredReply,
            9 => Self::ListMetaContext,
            10 => Self::SetMetaContext,
            11 => Self::ExtendedHeaders,
            _ => Self::Unknown,
        }
    }
}

/// An option request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// What is asked.
    pub option: NbdOption,
    /// Its number, to echo.
    pub number: u32,
    /// Bytes of data that follow; any value a client dares.
    pub data_bytes: u32,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawOptionHeader {
    magic: U64,
    option: U32,
    data_bytes: U32,
}

const _: () = assert!(size_of::<RawOptionHeader>() == OPTION_HEADER_BYTES);

impl OptionHeader {
    /// Decodes a header; `None` if its magic is wrong, which ends the connection.
    #[must_use]
    pub fn decode(bytes: &[u8; OPTION_HEADER_BYTES]) -> Option<Self> {
        let raw = RawOptionHeader::read_from_bytes(bytes).ok()?;
        (raw.magic.get() == OPTION_MAGIC).then(|| Self {
            option: NbdOption::decode(raw.option.get()),
            number: raw.option.get(),
            data_bytes: raw.data_bytes.get(),
        })
    }
}

/// The data of INFO and GO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoRequest {
    /// Export asked for; empty for the default one.
    pub export: String,
    /// INFO_NAME was asked for.
    pub wants_name: bool,
    /// INFO_DESCRIPTION was asked for.
    pub wants_description: bool,
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaContextRequest {
    /// Export the selection is for.
    pub export: String,
    /// Queries as sent; each may be any namespace and leaf.
    pub queries: Vec<String>,
}

/// Lengths that do not add up, or a string that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadOptionData;

/// Decodes an export name that fills `bytes`.
///
/// # Errors
/// If it is too long, not UTF-8, or has a NUL.
pub fn decode_name(bytes: &[u8]) -> Result<&str, BadOptionData> {
    if bytes.len() > NAME_BYTES_MAX || bytes.contains(&0) {
        return Err(BadOptionData);
    }
    str::from_utf8(bytes).map_err(|_| BadOptionData)
}

/// Splits a `u32` length and that many bytes of name off the front.
fn take_name<'a>(bytes: &mut &'a [u8]) -> Result<&'a str, BadOptionData> {
    let length = usize::try_from(take_u32(bytes)?).map_err(|_| BadOptionData)?;
    let (name, rest) = bytes.split_at_checked(length).ok_or(BadOptionData)?;
    *bytes = rest;
    decode_name(name)
}

fn take_u32(bytes: &mut &[u8]) -> Result<u32, BadOptionData> {
    let (value, rest) = U32::read_from_prefix(bytes).map_err(|_| BadOptionData)?;
    *bytes = rest;
    Ok(value.get())
}

impl InfoRequest {
    /// Decodes the data of INFO or GO. Unknown information types are ignored, as are repeats.
    ///
    /// # Errors
    /// If lengths do not add up or the name is not one.
    pub fn decode(mut bytes: &[u8]) -> Result<Self, BadOptionData> {
        const INFO_NAME: u16 = 1;
        const INFO_DESCRIPTION: u16 = 2;

        let export = take_name(&mut bytes)?.to_owned();
        let (count, types) = U16::read_from_prefix(bytes).map_err(|_| BadOptionData)?;
        let types = <[U16]>::ref_from_bytes(types).map_err(|_| BadOptionData)?;
        if types.len() != usize::from(count.get()) {
            return Err(BadOptionData);
        }
        let wants = |wanted: u16| types.iter().any(|asked| asked.get() == wanted);
        Ok(Self {
            export,
            wants_name: wants(INFO_NAME),
            wants_description: wants(INFO_DESCRIPTION),
        })
    }
}

impl MetaContextRequest {
    /// Decodes the data of LIST_META_CONTEXT or SET_META_CONTEXT.
    ///
    /// # Errors
    /// If lengths do not add up or a string is not one.
    pub fn decode(mut bytes: &[u8]) -> Result<Self, BadOptionData> {
        let export = take_name(&mut bytes)?.to_owned();
        let count = take_u32(&mut bytes)?;
        let mut queries = Vec::new();
        // No reservation by `count`: it is the client's word. Each turn consumes 4 bytes or fails.
        for _ in 0..count {
            queries.push(take_name(&mut bytes)?.to_owned());
        }
        if bytes.is_empty() { Ok(Self { export, queries }) } else { Err(BadOptionData) }
    }
}

/// Why an option is refused. (proto.md, "Option reply types")
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the protocol's own words")]
pub enum OptionError {
    Unsupported,
    Policy,
    Invalid,
    TlsRequired,
    Unknown,
    Shutdown,
    TooBig,
    ExtendedHeadersRequired,
}

impl OptionError {
    fn value(self) -> u32 {
        match self {
            Self::Unsupported => 0x8000_0001,
            Self::Policy => 0x8000_0002,
            Self::Invalid => 0x8000_0003,
            Self::TlsRequired => 0x8000_0005,
            Self::Unknown => 0x8000_0006,
            Self::Shutdown => 0x8000_0007,
            Self::TooBig => 0x8000_0009,
            Self::ExtendedHeadersRequired => 0x8000_000a,
        }
    }
}

/// Information about an export.
#[derive(Clone, Copy, Debug)]
pub enum Info<'a> {
    /// Size in bytes and transmission flags; mandatory.
    Export(u64, u16),
    /// Canonical name.
    Name(&'a str),
    /// Text for people.
    Description(&'a str),
    /// Minimum, preferred and maximum payload, in bytes.
    BlockSize(u32, u32, u32),
}

/// Appends replies to one option.
pub struct OptionReply<'a> {
    /// Where to.
    pub out: &'a mut Vec<u8>,
    /// The option's number, to echo.
    pub number: u32,
}

impl OptionReply<'_> {
    fn put(&mut self, kind: u32, data: &[u8]) {
        put_u64(self.out, OPTION_REPLY_MAGIC);
        put_u32(self.out, self.number);
        put_u32(self.out, kind);
        put_u32(self.out, wire_length(data.len()));
        self.out.extend_from_slice(data);
    }

    /// The option succeeded.
    pub fn ack(&mut self) {
        self.put(1, &[]);
    }

    /// One export of LIST.
    pub fn server(&mut self, name: &str) {
        let mut data = Vec::with_capacity(4 + name.len());
        put_u32(&mut data, wire_length(name.len()));
        data.extend_from_slice(name.as_bytes());
        self.put(2, &data);
    }

    /// One item of INFO or GO.
    pub fn info(&mut self, info: Info<'_>) {
        let mut data = Vec::new();
        match info {
            Info::Export(size_bytes, flags) => {
                put_u16(&mut data, 0);
                put_u64(&mut data, size_bytes);
                put_u16(&mut data, flags);
            }
            Info::Name(text) | Info::Description(text) => {
                put_u16(&mut data, if matches!(info, Info::Name(_)) { 1 } else { 2 });
                data.extend_from_slice(text.as_bytes());
            }
            Info::BlockSize(minimum, preferred, maximum) => {
                put_u16(&mut data, 3);
                put_u32(&mut data, minimum);
                put_u32(&mut data, preferred);
                put_u32(&mut data, maximum);
            }
        }
        self.put(3, &data);
    }

    /// One metadata context.
    pub fn meta_context(&mut self, id: u32, name: &str) {
        let mut data = Vec::with_capacity(4 + name.len());
        put_u32(&mut data, id);
        data.extend_from_slice(name.as_bytes());
        self.put(4, &data);
    }

    /// The option failed; `text` is for people, short and ASCII because nbd-client prints it from
    /// a small buffer.
    pub fn error(&mut self, error: OptionError, text: &str) {
        self.put(error.value(), text.as_bytes());
    }
}

/// Appends the success of EXPORT_NAME, which has no reply header.
pub fn put_export_name_reply(out: &mut Vec<u8>, size_bytes: u64, flags: u16, no_zeroes: bool) {
    put_u64(out, size_bytes);
    put_u16(out, flags);
    if !no_zeroes {
        out.extend_from_slice(&[0; 124]);
    }
}

/// Length of one of our own replies, all far below 4 GiB.
fn wire_length(length: usize) -> u32 {
    u32::try_from(length).expect("our own option replies are a few KiB")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn named(name: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_u32(&mut bytes, u32::try_from(name.len()).unwrap());
        bytes.extend_from_slice(name);
        bytes
    }

    // spec: nbd-info-lengths
    #[test]
    fn info_lengths_must_add_up() {
        let mut good = named(b"vol0");
        good.extend_from_slice(&[0, 2, 0, 1, 0, 9]);
        let info = InfoRequest::decode(&good).unwrap();
        assert_eq!(info.export, "vol0");
        assert!(info.wants_name && !info.wants_description);
        for end in 0..good.len() {
            assert_eq!(InfoRequest::decode(&good[..end]), Err(BadOptionData), "{end}");
        }
        good.push(0);
        assert_eq!(InfoRequest::decode(&good), Err(BadOptionData));
        let huge = [0xff; 8];
        assert_eq!(InfoRequest::decode(&huge), Err(BadOptionData));
    }

    // spec: nbd-name-rules
    #[test]
    fn names_must_be_text_of_bounded_length() {
        assert_eq!(decode_name(b"a\0b"), Err(BadOptionData));
        assert_eq!(decode_name(&[0xff]), Err(BadOptionData));
        assert_eq!(decode_name(&[b'a'; NAME_BYTES_MAX + 1]), Err(BadOptionData));
        assert_eq!(decode_name(b""), Ok(""));
    }

    // spec: nbd-meta-lengths
    #[test]
    fn meta_context_lengths_must_add_up() {
        let mut good = named(b"vol0");
        put_u32(&mut good, 2);
        good.extend_from_slice(&named(b"base:"));
        good.extend_from_slice(&named(b"qemu:x"));
        let request = MetaContextRequest::decode(&good).unwrap();
        assert_eq!(request.queries, ["base:", "qemu:x"]);
        for end in 0..good.len() {
            assert_eq!(MetaContextRequest::decode(&good[..end]), Err(BadOptionData), "{end}");
        }
        good.push(0);
        assert_eq!(MetaContextRequest::decode(&good), Err(BadOptionData));
    }

    // spec: nbd-client-flags
    #[test]
    fn client_flags_we_never_offered_are_refused() {
        assert_eq!(ClientFlags::decode([0, 0, 0, 4]), None);
        assert_eq!(ClientFlags::decode([1, 0, 0, 3]), None);
        let both = ClientFlags { fixed_newstyle: true, no_zeroes: true };
        assert_eq!(ClientFlags::decode([0, 0, 0, 3]), Some(both));
        assert_eq!(ClientFlags::decode([0; 4]), Some(ClientFlags::default()));
    }

    proptest! {
        #[test]
        fn decoders_survive_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = InfoRequest::decode(&bytes);
            let _ = MetaContextRequest::decode(&bytes);
            let _ = decode_name(&bytes);
            let _ = bytes.first_chunk().map(OptionHeader::decode);
        }
    }
}

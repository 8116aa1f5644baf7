//! PDUs: bytes to types and back. Pure. (NVMe/TCP 1.0, 3.3, 3.6)
//!
//! ```text
//! header (hlen) | header digest | padding to PDO | data | data digest        all of it: plen
//! ```

use crate::target::nvmf::wire::CQE_BYTES;
use crate::target::nvmf::wire::Cqe;
use crate::target::nvmf::wire::SQE_BYTES;
use crate::target::nvmf::wire::Sqe;

/// Bytes that every header begins with.
pub const COMMON_BYTES: usize = 8;
/// Bytes of ICReq and ICResp.
pub const IC_BYTES: usize = 128;
/// Bytes of CapsuleCmd's header.
pub const CAPSULE_BYTES: usize = COMMON_BYTES + SQE_BYTES;
/// Bytes of H2CData's, C2HData's, R2T's, CapsuleResp's and both TermReqs' headers.
pub const SHORT_BYTES: usize = 24;
/// Bytes of a digest.
pub const DIGEST_BYTES: usize = 4;
/// What a TermReq may quote of the header it complains about.
const QUOTED_BYTES_MAX: usize = 128;
/// The longest padding of data a host may ask for, in units of 4 bytes, counted from 0.
const ALIGNMENT_MAX: u8 = 31;

const FLAG_HEADER_DIGEST: u8 = 1;
const FLAG_DATA_DIGEST: u8 = 1 << 1;
const FLAG_LAST: u8 = 1 << 2;
const FLAG_SUCCESS: u8 = 1 << 3;

/// PDU types. (NVMe/TCP 1.0, figure 9)
mod kind {
    pub(super) const IC_REQ: u8 = 0x00;
    pub(super) const IC_RESP: u8 = 0x01;
    pub(super) const H2C_TERM_REQ: u8 = 0x02;
    pub(super) const C2H_TERM_REQ: u8 = 0x03;
    pub(super) const CAPSULE_CMD: u8 = 0x04;
    pub(super) const CAPSULE_RESP: u8 = 0x05;
    pub(super) const H2C_DATA: u8 = 0x06;
    pub(super) const C2H_DATA: u8 = 0x07;
    pub(super) const R2T: u8 = 0x09;
}

/// The checksum of both digests: CRC32C.
#[must_use]
pub fn digest(bytes: &[u8]) -> [u8; DIGEST_BYTES] {
    digest_of([bytes])
}

/// The same over several runs of bytes.
#[must_use]
pub fn digest_of<'a>(runs: impl IntoIterator<Item = &'a [u8]>) -> [u8; DIGEST_BYTES] {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    runs.into_iter().for_each(|run| digest.update(run));
    let value = digest.finalize().to_le_bytes();
    [value[0], value[1], value[2], value[3]]
}

/// What both sides agreed on when the connection began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    /// Headers carry digests.
    pub header_digest: bool,
    /// Data carries digests.
    pub data_digest: bool,
    /// The host wants our data at multiples of so many bytes from the start of the PDU.
    pub data_alignment: usize,
}

impl Agreed {
    /// Bytes of a header's digest.
    #[must_use]
    pub fn header_digest_bytes(self) -> usize {
        if self.header_digest { DIGEST_BYTES } else { 0 }
    }

    /// Bytes of the digest of data, if there is data.
    #[must_use]
    pub fn data_digest_bytes(self, data_bytes: usize) -> usize {
        if self.data_digest && data_bytes > 0 { DIGEST_BYTES } else { 0 }
    }
}

/// Why a connection is terminated (FES). (NVMe/TCP 1.0, figure 21)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FatalStatus {
    /// Invalid PDU Header Field; the offset says which.
    HeaderField,
    /// PDU Sequence Error.
    Sequence,
    /// Header Digest Error.
    HeaderDigest,
    /// Data Transfer Out of Range.
    OutOfRange,
    /// Data Transfer Limit Exceeded.
    LimitExceeded,
    /// Unsupported Parameter; the offset says which.
    Unsupported,
}

impl FatalStatus {
    fn value(self) -> u16 {
        match self {
            Self::HeaderField => 1,
            Self::Sequence => 2,
            Self::HeaderDigest => 3,
            Self::OutOfRange => 4,
            Self::LimitExceeded => 5,
            Self::Unsupported => 6,
        }
    }
}

/// What a C2HTermReq tells the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fatal {
    /// What kind of error.
    pub status: FatalStatus,
    /// Offset of the field, or the wrong digest, or 0.
    pub information: u32,
    /// The header it is about, never empty.
    pub header: Vec<u8>,
    /// For the log.
    pub reason: &'static str,
}

/// A header that was understood. Lengths are checked against each other and against our limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pdu {
    /// The first of a connection.
    IcReq {
        /// What the host wants.
        wanted: Agreed,
    },
    /// The host gives up.
    TermReq {
        /// Why, as a number.
        status: u16,
        /// Bytes that follow and are of no interest.
        rest: usize,
    },
    /// A command.
    Capsule {
        /// The command.
        sqe: Sqe,
        /// Bytes of data that follow.
        data_bytes: usize,
    },
    /// Data we asked for with R2T.
    Data {
        /// The command's identifier.
        cid: u16,
        /// The transfer, as our R2T named it.
        tag: u16,
        /// Where the data belongs, from the start of the command's.
        offset: u32,
        /// Bytes of data that follow.
        data_bytes: usize,
        /// It is the transfer's last.
        last: bool,
    },
}

/// The first bytes of a PDU, checked as far as the type allows.
struct Common<'a> {
    bytes: &'a [u8],
    header_bytes: usize,
    data_offset: usize,
    total_bytes: usize,
    flags: u8,
}

/// Limits a host was told.
#[derive(Clone, Copy, Debug)]
pub struct DataLimits {
    /// In a capsule.
    pub in_capsule: usize,
    /// In one H2CData.
    pub h2c: usize,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

/// Takes a header off the front of `input`, with its digest; `agreed` is `None` before the
/// connection is initialised.
///
/// `None`: not all there yet. At most [`IC_BYTES`] are ever waited for.
pub fn decode(
    agreed: Option<Agreed>,
    limits: DataLimits,
    input: &[u8],
) -> Option<Result<(Pdu, usize), Fatal>> {
    let first = input.get(..COMMON_BYTES)?;
    let kind = first.first().copied()?;
    let header_bytes = match kind {
        kind::IC_REQ => IC_BYTES,
        kind::CAPSULE_CMD => CAPSULE_BYTES,
        kind::H2C_DATA | kind::H2C_TERM_REQ => SHORT_BYTES,
        _ => return Some(Err(fatal(FatalStatus::HeaderField, 0, first, "unknown PDU type"))),
    };
    if first.get(2).copied().map(usize::from) != Some(header_bytes) {
        return Some(Err(fatal(FatalStatus::HeaderField, 2, first, "wrong header length")));
    }
    match (agreed, kind) {
        (_, kind::H2C_TERM_REQ) | (None, kind::IC_REQ) => {}
        (Some(_), kind::IC_REQ) => {
            return Some(Err(fatal(FatalStatus::Sequence, 0, first, "ICReq twice")));
        }
        (None, _) => {
            let reason = "no ICReq at the beginning";
            return Some(Err(fatal(FatalStatus::Sequence, 0, first, reason)));
        }
        (Some(_), _) => {}
    }
    let has_digest = matches!(kind, kind::CAPSULE_CMD | kind::H2C_DATA);
    let agreed = agreed.filter(|_| has_digest).unwrap_or_default();
    let whole = header_bytes + agreed.header_digest_bytes();
    let bytes = input.get(..header_bytes)?;
    let given = input.get(header_bytes..whole)?;
    let common = Common {
        bytes,
        header_bytes,
        data_offset: usize::from(first.get(3).copied()?),
        total_bytes: usize::try_from(u32_at(first, 4)).unwrap_or(usize::MAX),
        flags: first.get(1).copied()?,
    };
    if agreed.header_digest && (common.flags & FLAG_HEADER_DIGEST == 0 || given != digest(bytes)) {
        let wrong = u32_at(given, 0);
        return Some(Err(fatal(FatalStatus::HeaderDigest, wrong, bytes, "wrong header digest")));
    }
    let pdu = match kind {
        kind::IC_REQ => common.ic_req(),
        kind::H2C_TERM_REQ => common.term_req(),
        kind::CAPSULE_CMD => common.capsule(agreed, limits.in_capsule),
        _ => common.data(agreed, limits.h2c),
    };
    Some(pdu.map(|pdu| (pdu, whole)))
}

impl Common<'_> {
    fn fatal(&self, status: FatalStatus, at: u32, reason: &'static str) -> Fatal {
        fatal(status, at, self.bytes, reason)
    }

    fn field(&self, at: u32, reason: &'static str) -> Fatal {
        self.fatal(FatalStatus::HeaderField, at, reason)
    }

    fn ic_req(&self) -> Result<Pdu, Fatal> {
        if self.total_bytes != IC_BYTES {
            return Err(self.field(4, "wrong length of ICReq"));
        }
        if u16_at(self.bytes, 8) != 0 {
            return Err(self.field(8, "unknown PDU format version"));
        }
        let alignment = self.bytes.get(10).copied().unwrap_or(0);
        if alignment > ALIGNMENT_MAX {
            return Err(self.field(10, "alignment of data above 128"));
        }
        let digests = self.bytes.get(11).copied().unwrap_or(0);
        let wanted = Agreed {
            header_digest: digests & 1 != 0,
            data_digest: digests & 2 != 0,
            data_alignment: (usize::from(alignment) + 1) * 4,
        };
        Ok(Pdu::IcReq { wanted })
    }

    fn term_req(&self) -> Result<Pdu, Fatal> {
        let rest = self.total_bytes.checked_sub(self.header_bytes);
        let rest = rest.filter(|rest| *rest <= QUOTED_BYTES_MAX);
        let rest = rest.ok_or_else(|| self.field(4, "wrong length of H2CTermReq"))?;
        Ok(Pdu::TermReq { status: u16_at(self.bytes, 8), rest })
    }

    /// How much data follows, which must begin where the header ends: we ask for no padding.
    fn data_bytes(&self, agreed: Agreed) -> Result<usize, Fatal> {
        let start = self.header_bytes + agreed.header_digest_bytes();
        let rest = self.total_bytes.checked_sub(start);
        let rest = rest.ok_or_else(|| self.field(4, "PDU shorter than its header"))?;
        if rest == 0 {
            return Ok(0);
        }
        if self.data_offset != start {
            return Err(self.field(3, "data does not begin where the header ends"));
        }
        if agreed.data_digest && self.flags & FLAG_DATA_DIGEST == 0 {
            return Err(self.field(1, "data without its digest"));
        }
        let digest_bytes = agreed.data_digest_bytes(rest);
        rest.checked_sub(digest_bytes)
            .filter(|bytes| *bytes > 0)
            .ok_or_else(|| self.field(4, "no data before its digest"))
    }

    fn capsule(&self, agreed: Agreed, limit: usize) -> Result<Pdu, Fatal> {
        let data_bytes = self.data_bytes(agreed)?;
        if data_bytes > limit {
            let status = FatalStatus::LimitExceeded;
            return Err(self.fatal(status, 0, "too much data in a capsule"));
        }
        let sqe = self.bytes.get(COMMON_BYTES..).and_then(|sqe| sqe.try_into().ok());
        let sqe = Sqe::new(sqe.ok_or_else(|| self.field(2, "wrong header length"))?);
        Ok(Pdu::Capsule { sqe, data_bytes })
    }

    fn data(&self, agreed: Agreed, limit: usize) -> Result<Pdu, Fatal> {
        let data_bytes = self.data_bytes(agreed)?;
        if data_bytes > limit {
            return Err(self.fatal(FatalStatus::LimitExceeded, 0, "too much data in a PDU"));
        }
        if data_bytes == 0 || usize::try_from(u32_at(self.bytes, 16)) != Ok(data_bytes) {
            return Err(self.field(16, "data length and PDU length differ"));
        }
        Ok(Pdu::Data {
            cid: u16_at(self.bytes, 8),
            tag: u16_at(self.bytes, 10),
            offset: u32_at(self.bytes, 12),
            data_bytes,
            last: self.flags & FLAG_LAST != 0,
        })
    }
}

/// A fatal error about a header, as far as it was received.
pub(super) fn fatal(
    status: FatalStatus,
    information: u32,
    header: &[u8],
    reason: &'static str,
) -> Fatal {
    Fatal { status, information, header: header.to_vec(), reason }
}

/// The eight bytes that begin a PDU of ours. With data, `data_bytes` is above 0 and starts at
/// `data_offset`.
fn common(kind: u8, flags: u8, header_bytes: usize, data_offset: usize, total: usize) -> [u8; 8] {
    let byte = |value: usize| u8::try_from(value).expect("headers and padding are short");
    let total = u32::try_from(total).expect("a PDU carries at most 1 MiB of data").to_le_bytes();
    let [a, b, c, d] = total;
    [kind, flags, byte(header_bytes), byte(data_offset), a, b, c, d]
}

/// Puts the digest of the header that began at `start`, if digests were agreed on.
fn put_header_digest(out: &mut Vec<u8>, start: usize, agreed: Agreed) {
    if agreed.header_digest {
        let digest = digest(out.get(start..).unwrap_or_default());
        out.extend_from_slice(&digest);
    }
}

fn header_flags(agreed: Agreed) -> u8 {
    if agreed.header_digest { FLAG_HEADER_DIGEST } else { 0 }
}

/// Puts the answer to ICReq.
pub fn put_ic_resp(out: &mut Vec<u8>, agreed: Agreed, h2c_bytes_max: u32) {
    let start = out.len();
    out.extend_from_slice(&common(kind::IC_RESP, 0, IC_BYTES, 0, IC_BYTES));
    let digests = u8::from(agreed.header_digest) | u8::from(agreed.data_digest) << 1;
    out.extend_from_slice(&[0, 0, 0, digests]);
    out.extend_from_slice(&h2c_bytes_max.to_le_bytes());
    out.resize(start + IC_BYTES, 0);
}

/// Puts a completion.
pub fn put_capsule_resp(out: &mut Vec<u8>, agreed: Agreed, cqe: &Cqe) {
    const _: () = assert!(COMMON_BYTES + CQE_BYTES == SHORT_BYTES);
    let start = out.len();
    let total = SHORT_BYTES + agreed.header_digest_bytes();
    let flags = header_flags(agreed);
    out.extend_from_slice(&common(kind::CAPSULE_RESP, flags, SHORT_BYTES, 0, total));
    out.extend_from_slice(&cqe.encode());
    put_header_digest(out, start, agreed);
}

/// Puts a request for `length` bytes of a command's data, from its beginning.
pub fn put_r2t(out: &mut Vec<u8>, agreed: Agreed, cid: u16, tag: u16, length: u32) {
    let start = out.len();
    let total = SHORT_BYTES + agreed.header_digest_bytes();
    out.extend_from_slice(&common(kind::R2T, header_flags(agreed), SHORT_BYTES, 0, total));
    put_transfer(out, cid, tag, length);
    put_header_digest(out, start, agreed);
}

/// Puts the header of all of a command's data, with padding; `success` says that no completion
/// follows.
pub fn put_c2h_data(out: &mut Vec<u8>, agreed: Agreed, cid: u16, length: u32, success: bool) {
    let start = out.len();
    let header_end = SHORT_BYTES + agreed.header_digest_bytes();
    let data_offset = header_end.next_multiple_of(agreed.data_alignment.max(1));
    let data_bytes = usize::try_from(length).expect("at most 1 MiB");
    let total = data_offset + data_bytes + agreed.data_digest_bytes(data_bytes);
    let flags = header_flags(agreed)
        | if agreed.data_digest { FLAG_DATA_DIGEST } else { 0 }
        | FLAG_LAST
        | if success { FLAG_SUCCESS } else { 0 };
    out.extend_from_slice(&common(kind::C2H_DATA, flags, SHORT_BYTES, data_offset, total));
    put_transfer(out, cid, 0, length);
    put_header_digest(out, start, agreed);
    out.resize(start + data_offset, 0);
}

/// CCCID, TTAG, an offset of 0, and the length.
fn put_transfer(out: &mut Vec<u8>, cid: u16, tag: u16, length: u32) {
    out.extend_from_slice(&cid.to_le_bytes());
    out.extend_from_slice(&tag.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
}

/// Puts the end of the connection.
pub fn put_term_req(out: &mut Vec<u8>, fatal: &Fatal) {
    let quoted = fatal.header.get(..QUOTED_BYTES_MAX).unwrap_or(&fatal.header);
    let total = SHORT_BYTES + quoted.len();
    out.extend_from_slice(&common(kind::C2H_TERM_REQ, 0, SHORT_BYTES, 0, total));
    out.extend_from_slice(&fatal.status.value().to_le_bytes());
    out.extend_from_slice(&fatal.information.to_le_bytes());
    out.extend_from_slice(&[0; 10]);
    out.extend_from_slice(quoted);
}

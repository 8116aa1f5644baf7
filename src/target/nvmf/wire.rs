//! Submission and completion queue entries: bytes to types and back. Pure, and the same on every
//! transport. (NVMe Base 1.4, 4.2, 4.4, 4.6; NVMe-oF 1.1, 2.1)

use crate::target::nvmf::status::Status;

/// Bytes of a submission queue entry.
pub const SQE_BYTES: usize = 64;
/// Bytes of a completion queue entry.
pub const CQE_BYTES: usize = 16;

/// A submission queue entry as it came. Fields are read where they are used; nothing in it is
/// trusted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Sqe([u8; SQE_BYTES]);

impl std::fmt::Debug for Sqe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sqe(opcode {:#04x}, cid {:#06x}, {:?})", self.opcode(), self.cid(), self.sgl())
    }
}

/// Where a command's data is. (NVMe Base 1.4, 4.4; NVMe-oF 1.1, 2.1)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sgl {
    /// In the capsule, at this offset of its data.
    InCapsule {
        /// From the start of the capsule's data.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// Moved by the transport.
    Transport {
        /// Bytes; 0 for commands without data.
        length: u32,
    },
    /// Of a type no host has reason to send.
    Unknown,
}

impl Sqe {
    /// Takes the bytes of one entry.
    #[must_use]
    pub fn new(bytes: [u8; SQE_BYTES]) -> Self {
        Self(bytes)
    }

    /// The entry's bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8; SQE_BYTES] {
        &self.0
    }

    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0.get(at..at + N).and_then(|bytes| bytes.try_into().ok()).expect("within the entry")
    }

    /// The byte at an offset, which must lie within the entry.
    #[must_use]
    pub fn u8(&self, at: usize) -> u8 {
        let [byte] = self.array(at);
        byte
    }

    /// Two bytes, likewise.
    #[must_use]
    pub fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.array(at))
    }

    /// Four bytes, likewise.
    #[must_use]
    pub fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    /// Eight bytes, likewise.
    #[must_use]
    pub fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }

    /// What to do.
    #[must_use]
    pub fn opcode(&self) -> u8 {
        self.u8(0)
    }

    /// FUSE bits: 0 for a command of its own.
    #[must_use]
    pub fn fuse(&self) -> u8 {
        self.u8(1) & 3
    }

    /// Whether data is described by an SGL, as fabrics demand.
    #[must_use]
    pub fn uses_sgl(&self) -> bool {
        self.u8(1) >> 6 == 1
    }

    /// The host's name for the command. Opaque: echoed, never interpreted.
    #[must_use]
    pub fn cid(&self) -> u16 {
        self.u16(2)
    }

    /// The namespace.
    #[must_use]
    pub fn nsid(&self) -> u32 {
        self.u32(4)
    }

    /// The fabrics command, if the opcode says it is one.
    #[must_use]
    pub fn fabrics_type(&self) -> u8 {
        self.u8(4)
    }

    /// Where the data is.
    #[must_use]
    pub fn sgl(&self) -> Sgl {
        match self.u8(39) {
            // Data Block, offset subtype.
            0x01 => Sgl::InCapsule { offset: self.u64(24), length: self.u32(32) },
            // Transport Data Block.
            0x5a => Sgl::Transport { length: self.u32(32) },
            _ => Sgl::Unknown,
        }
    }
}

/// A completion queue entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cqe {
    /// Command specific.
    pub result: u64,
    /// How far the submission queue was consumed.
    pub sq_head: u16,
    /// The queue.
    pub sq_id: u16,
    /// Echo of the command's.
    pub cid: u16,
    /// How it went.
    pub status: Status,
}

impl Cqe {
    /// The entry's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; CQE_BYTES] {
        let mut bytes = [0; CQE_BYTES];
        let (result, rest) = bytes.split_at_mut(8);
        result.copy_from_slice(&self.result.to_le_bytes());
        let fields = [self.sq_head, self.sq_id, self.cid, self.status.wire()];
        for (place, field) in rest.chunks_exact_mut(2).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }
}

/// Opcodes. (NVMe Base 1.4, figures 139 and 346; NVMe-oF 1.1, 2.3)
#[expect(missing_docs, reason = "the names are the specification's")]
pub mod opcode {
    pub const FABRICS: u8 = 0x7f;

    pub const GET_LOG_PAGE: u8 = 0x02;
    pub const IDENTIFY: u8 = 0x06;
    pub const ABORT: u8 = 0x08;
    pub const SET_FEATURES: u8 = 0x09;
    pub const GET_FEATURES: u8 = 0x0a;
    pub const ASYNC_EVENT_REQUEST: u8 = 0x0c;
    pub const KEEP_ALIVE: u8 = 0x18;

    pub const FLUSH: u8 = 0x00;
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const COMPARE: u8 = 0x05;
    pub const WRITE_ZEROES: u8 = 0x08;
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    pub const VERIFY: u8 = 0x0c;
    pub const RESERVATION_REGISTER: u8 = 0x0d;
    pub const RESERVATION_REPORT: u8 = 0x0e;
    pub const RESERVATION_ACQUIRE: u8 = 0x11;
    pub const RESERVATION_RELEASE: u8 = 0x15;
}

/// Fabrics command types. (NVMe-oF 1.1, 3)
#[expect(missing_docs, reason = "the names are the specification's")]
pub mod fabrics_type {
    pub const PROPERTY_SET: u8 = 0x00;
    pub const CONNECT: u8 = 0x01;
    pub const PROPERTY_GET: u8 = 0x04;
    pub const AUTHENTICATION_SEND: u8 = 0x05;
    pub const AUTHENTICATION_RECEIVE: u8 = 0x06;
}

/// Writes `bytes` into `page` at `at`.
///
/// # Panics
/// If it does not fit: offsets are the specification's.
pub(crate) fn put(page: &mut [u8], at: usize, bytes: &[u8]) {
    page[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Writes ASCII text, padded with spaces to `length`.
pub(crate) fn put_text(page: &mut [u8], at: usize, length: usize, text: &str) {
    let place = &mut page[at..at + length];
    place.fill(b' ');
    let taken = text.len().min(length);
    place[..taken].copy_from_slice(&text.as_bytes()[..taken]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_have_their_fields_where_the_specification_says() {
        let mut bytes = [0; SQE_BYTES];
        bytes[0] = 0x02;
        bytes[1] = 0x42;
        bytes[2..4].copy_from_slice(&[0xcd, 0xab]);
        bytes[4] = 7;
        bytes[32..36].copy_from_slice(&4096_u32.to_le_bytes());
        bytes[39] = 0x5a;
        let sqe = Sqe::new(bytes);
        assert_eq!((sqe.opcode(), sqe.fuse(), sqe.cid(), sqe.nsid()), (2, 2, 0xabcd, 7));
        assert!(sqe.uses_sgl());
        assert_eq!(sqe.sgl(), Sgl::Transport { length: 4096 });
        bytes[39] = 0x40;
        assert_eq!(Sqe::new(bytes).sgl(), Sgl::Unknown);

        let cqe = Cqe {
            result: 0x0102_0304_0506_0708,
            sq_head: 9,
            sq_id: 10,
            cid: 11,
            status: Status::INVALID_FIELD,
        };
        let expected = [8, 7, 6, 5, 4, 3, 2, 1, 9, 0, 10, 0, 11, 0, 4, 0x80];
        assert_eq!(cqe.encode(), expected);
    }
}

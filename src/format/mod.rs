//! Bytes on disk to structs and back: pure, no I/O. `docs/format.md` draws every structure.
//!
//! All integers are little-endian. Every structure has a magic with its version in it, reserved
//! bytes that are written zero and checked zero, and a checksum (CRC-64/NVME) that also covers
//! *identity*: the pod's UUID and the place the bytes belong to. A block that landed in the wrong
//! place, or was left over from another pod, therefore fails its checksum like a rotten one.
//!
//! | file | structure |
//! |---|---|
//! | [`superblock`] | root of everything, two slots per device |
//! | [`batch`] | a journal batch's header |
//! | [`record`] | one item of the log, in journal and segments alike |
//! | [`mod@unit`] | header of a strip's part of a row |
//! | [`location`] | a record's address in the log |
//! | [`node`] | one page of a map |
//! | [`table`] | segment-table entries |
//! | [`root`] | the checkpoint's root |

use crate::codec::checksum::Checksum;

pub mod batch;
mod fields;
#[doc(hidden)]
pub mod layouts;
pub mod location;
pub mod node;
pub mod record;
pub mod root;
pub mod superblock;
pub mod table;
pub mod unit;

/// The pod's UUID, mixed into every checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PodId(pub [u8; 16]);

/// Why bytes are not the structure they were expected to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// Fewer bytes than the structure needs.
    Short,
    /// Not this structure, or a version this build does not know.
    Magic,
    /// Torn, rotten, misplaced, or from another pod.
    Checksum,
    /// The checksum holds but a field is outside its range: written by a faulty or newer build.
    Field,
}

impl std::fmt::Display for DecodeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Short => "too short",
            Self::Magic => "unknown magic or version",
            Self::Checksum => "checksum mismatch",
            Self::Field => "field out of range",
        })
    }
}

impl std::error::Error for DecodeError {}

/// Checksum over identity and then `parts`, in order.
pub(crate) fn identity_checksum(pod: PodId, place: u64, parts: &[&[u8]]) -> u64 {
    let mut checksum = Checksum::new();
    checksum.update(&pod.0);
    checksum.update(&place.to_le_bytes());
    for part in parts {
        checksum.update(part);
    }
    checksum.finish()
}

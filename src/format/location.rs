//! Where a record lies in the log, in eight bytes.
//!
//! ```text
//!  63                                                    7 6            0
//!  +------------------------------------------------------+--------------+
//!  | log address in 16-byte units (57 bits)               | sectors (7)  |
//!  +------------------------------------------------------+--------------+
//! ```
//!
//! The log address counts the data strips of all segments that ever were, end to end: segment id,
//! then strip, then byte within the strip. Ids are never reused, so an address means the same
//! bytes for ever, or nothing. `sectors` is how many 512-byte sectors, from the sector that holds
//! the record's first byte on, hold the whole record.
//!
//! Two values are not addresses: 0 is "ask the parent layer; a hole without one" and 1 is "zero".
//! They cannot collide with an address, since segment ids start at 1.

use crate::units::SECTOR_BYTES;
use crate::units::SegmentId;

/// Records start on multiples of this within a strip.
pub const RECORD_ALIGN: u64 = 16;
/// Most sectors a location can name: 7 bits.
pub const SECTORS_MAX: u64 = 127;

/// A map entry.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Location(pub u64);

/// A location taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The segment.
    pub segment: SegmentId,
    /// The data strip within it, from 0.
    pub strip: usize,
    /// First byte of the record within the strip.
    pub byte: u64,
}

/// What turns addresses into numbers: fixed when the pod is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressSpace {
    /// Data strips per segment (k).
    pub data_strips: u64,
    /// Bytes per strip.
    pub strip_bytes: u64,
}

impl Location {
    /// Nothing here: ask the parent layer, or a hole.
    pub const HOLE: Self = Self(0);
    /// Reads as zero, reported as allocated.
    pub const ZERO: Self = Self(1);

    /// Whether a record is stored there.
    #[must_use]
    pub fn is_stored(self) -> bool {
        self.0 > 1
    }

    /// Sectors to read.
    #[must_use]
    pub fn sectors(self) -> u64 {
        self.0 & SECTORS_MAX
    }
}

impl std::fmt::Debug for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self::HOLE => f.write_str("Hole"),
            Self::ZERO => f.write_str("Zero"),
            Self(raw) => write!(f, "Location({:#x}+{})", (raw >> 7) * RECORD_ALIGN, self.sectors()),
        }
    }
}

impl AddressSpace {
    /// The location of a record of `bytes` bytes at `address`.
    ///
    /// # Panics
    /// If the address is not aligned or the record is longer than a location can name: ours to
    /// prevent.
    #[must_use]
    pub fn location(&self, address: Address, bytes: u64) -> Location {
        assert!(address.segment.0 > 0 && (address.strip as u64) < self.data_strips);
        assert!(address.byte.is_multiple_of(RECORD_ALIGN) && address.byte < self.strip_bytes);
        let first = address.byte / SECTOR_BYTES;
        let sectors = (address.byte + bytes).div_ceil(SECTOR_BYTES) - first;
        assert!((1..=SECTORS_MAX).contains(&sectors), "a record spans {sectors} sectors");
        Location((self.log_address(address) / RECORD_ALIGN) << 7 | sectors)
    }

    /// Bytes from the start of the log; also the identity a record's checksum covers.
    #[must_use]
    pub fn log_address(&self, address: Address) -> u64 {
        (address.segment.0 * self.data_strips + address.strip as u64) * self.strip_bytes
            + address.byte
    }

    /// Takes a stored location apart; `None` for [`Location::HOLE`] and [`Location::ZERO`].
    #[must_use]
    pub fn address(&self, location: Location) -> Option<Address> {
        if !location.is_stored() {
            return None;
        }
        let log_address = (location.0 >> 7) * RECORD_ALIGN;
        let strip_number = log_address / self.strip_bytes;
        Some(Address {
            segment: SegmentId(strip_number / self.data_strips),
            strip: usize::try_from(strip_number % self.data_strips).unwrap_or(usize::MAX),
            byte: log_address % self.strip_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn addresses_survive_the_round_trip(
            segment in 1_u64..1 << 30, strip in 0_usize..4, unit in 0_u64..4096, bytes in 64_u64..60_000
        ) {
            let space = AddressSpace { data_strips: 4, strip_bytes: 1 << 20 };
            let address = Address { segment: SegmentId(segment), strip, byte: unit * 16 };
            let location = space.location(address, bytes);
            prop_assert!(location.is_stored());
            prop_assert_eq!(space.address(location), Some(address));
            let end = address.byte % 512 + bytes;
            prop_assert!(location.sectors() * 512 >= end && location.sectors() * 512 < end + 512);
        }
    }
}

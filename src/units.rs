//! The integers of the system, each with a type of its own, and the only place that converts them.
//!
//! Everything is 64-bit and unsigned. A *block* is 4096 bytes and the unit of mapping; a *sector*
//! is 512 bytes and the unit in which a location counts how much to read.

use std::fmt;

const _: () = assert!(usize::BITS == 64, "Weft runs on 64-bit platforms only");

/// Bytes in a block, the unit of mapping.
pub const BLOCK_BYTES: usize = 4096;
/// [`BLOCK_BYTES`] for arithmetic on offsets.
pub const BLOCK_BYTES_U64: u64 = 4096;
/// Bytes in a sector, the unit of a location's length.
pub const SECTOR_BYTES: u64 = 512;
/// Every device write and journal batch starts and ends on a multiple of this.
///
/// 4096 suits 512e and 4Kn disks alike, so a device never reads to write.
pub const IO_ALIGN: u64 = 4096;

macro_rules! integer_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

integer_type!(
    /// Address of a 4096-byte block within a volume, counted from 0.
    Lba
);
integer_type!(
    /// Log sequence number: the order in which entries were accepted. 0 is "before the first".
    Lsn
);
integer_type!(
    /// Number of a segment. Counted from 1 and never used twice in the life of a pod.
    SegmentId
);
integer_type!(
    /// Number of a layer (a map and its write-buffer index). Counted from 1, never used twice.
    LayerId
);
integer_type!(
    /// Number of a branch (a volume's line of writing). Counted from 1, never used twice.
    BranchId
);

impl Lsn {
    /// The one after this.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// Rounds `value` up to a multiple of `to`, which must not be zero.
#[must_use]
pub const fn round_up(value: u64, to: u64) -> u64 {
    value.div_ceil(to) * to
}

/// The `u64` of a length in memory; lossless on every platform we run on.
#[must_use]
pub const fn bytes_u64(length: usize) -> u64 {
    length as u64
}

/// The `usize` of a length known to be in memory or bounded; lossless on 64-bit.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "64-bit only, asserted above")]
pub const fn bytes_usize(length: u64) -> usize {
    length as usize
}

/// Writes a size the way our tables and errors do: `8 GiB`, `1.5 TiB`, `512 B`.
#[must_use]
pub fn format_size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut scale = 1_u64;
    while unit + 1 < UNITS.len() && bytes / scale >= 1024 {
        scale *= 1024;
        unit += 1;
    }
    if bytes.is_multiple_of(scale) {
        return format!("{} {}", bytes / scale, UNITS[unit]);
    }
    #[expect(clippy::cast_precision_loss, reason = "a rounded figure for people")]
    let value = bytes as f64 / scale as f64;
    format!("{value:.1} {}", UNITS[unit])
}

/// Reads a size as people write it: `100GiB`, `8 GiB`, `512M`, `4096`. Units are binary.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number
        .parse()
        .map_err(|_| format!("'{text}' is not a size: write a whole number and a unit, as 8GiB"))?;
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        "p" | "pib" => 50,
        other => return Err(format!("unknown unit '{other}': use B, KiB, MiB, GiB, TiB or PiB")),
    };
    number.checked_mul(1 << shift).ok_or_else(|| format!("'{text}' is larger than 16 EiB"))
}

/// Reads a length of time as people write it, in seconds: `30s`, `5m`, `2h`, `7d`, `90`.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn parse_duration_s(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number
        .parse()
        .map_err(|_| format!("'{text}' is not a time: write a whole number and a unit, as 5m"))?;
    let seconds = match unit.trim() {
        "" | "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86400,
        other => return Err(format!("unknown unit '{other}': use s, m, h or d")),
    };
    if number == 0 {
        return Err(format!("'{text}' is no time at all"));
    }
    number.checked_mul(seconds).ok_or_else(|| format!("'{text}' is too long"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_back_as_written() {
        for bytes in [0, 1, 512, 4096, 8 << 30, 64 << 40, 1 << 50] {
            assert_eq!(parse_size(&format_size(bytes)), Ok(bytes));
        }
        assert_eq!(format_size(1536), "1.5 KiB");
    }

    #[test]
    fn times_are_read_in_seconds() {
        for (text, seconds) in
            [("90", 90), ("30s", 30), ("5m", 300), ("2 h", 7200), ("7d", 604_800)]
        {
            assert_eq!(parse_duration_s(text), Ok(seconds), "{text}");
        }
        for text in [
            "",
            "m",
            "0",
            "0s",
            "0d",
            "-1m",
            "1.5h",
            "5 weeks",
            "999999999999999999999d",
            "99999999999999999d",
        ] {
            assert!(parse_duration_s(text).is_err(), "{text}");
        }
    }

    #[test]
    fn bad_sizes_are_refused_with_a_reason() {
        for text in ["", "GiB", "1.5GiB", "8XB", "99999999999999999999", "999999999PiB", "-1"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}

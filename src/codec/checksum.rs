//! CRC-64/NVME, the checksum of everything we store.
//!
//! Polynomial 0xAD93D23594C93659, reflected, initial value and final XOR all ones, as the NVM
//! Command Set defines it and the CRC RevEng catalogue lists it. The check value of `"123456789"` is 0xAE8B14860A799888.
//! A flipped bit, and any burst of up to 64 bits, is always noticed; other damage is missed once in
//! 2^64. It is not a defence against an adversary.

use crc_fast::CrcAlgorithm;
use crc_fast::Digest;

/// A checksum over bytes that do not lie in one piece.
#[derive(Clone)]
pub struct Checksum {
    digest: Digest,
}

impl Checksum {
    /// A checksum over no bytes yet.
    #[must_use]
    pub fn new() -> Self {
        Self { digest: Digest::new(CrcAlgorithm::Crc64Nvme) }
    }

    /// Adds `bytes` after those added so far.
    pub fn update(&mut self, bytes: &[u8]) -> &mut Self {
        self.digest.update(bytes);
        self
    }

    /// The checksum of everything added so far; more may be added afterwards.
    #[must_use]
    pub fn finish(&self) -> u64 {
        self.digest.finalize()
    }
}

impl Default for Checksum {
    fn default() -> Self {
        Self::new()
    }
}

/// The checksum of `bytes`.
#[must_use]
pub fn crc64(bytes: &[u8]) -> u64 {
    crc_fast::crc64_nvme(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::any;
    use proptest::proptest;
    use proptest::sample::Index;

    use super::*;

    /// The definition, one bit at a time.
    fn crc64_by_definition(bytes: &[u8]) -> u64 {
        const POLYNOMIAL_REFLECTED: u64 = 0x9A6C_9329_AC4B_C9B5;
        let mut crc = u64::MAX;
        for &byte in bytes {
            crc ^= u64::from(byte);
            for _ in 0..8 {
                let carry = crc & 1 == 1;
                crc = (crc >> 1) ^ if carry { POLYNOMIAL_REFLECTED } else { 0 };
            }
        }
        !crc
    }

    #[test]
    fn check_value_is_that_of_the_catalogue() {
        assert_eq!(crc64(b"123456789"), 0xAE8B_1486_0A79_9888);
        assert_eq!(crc64(b""), 0);
        assert_eq!(Checksum::new().finish(), 0);
    }

    proptest! {
        #[test]
        fn fast_path_agrees_with_the_definition(bytes in vec(any::<u8>(), 0..2000)) {
            assert_eq!(crc64(&bytes), crc64_by_definition(&bytes));
        }

        #[test]
        fn pieces_sum_to_the_whole(bytes in vec(any::<u8>(), 0..2000), cuts in vec(any::<Index>(), 0..4)) {
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            cuts.sort_unstable();
            let mut checksum = Checksum::new();
            let mut start = 0;
            for cut in cuts {
                checksum.update(&bytes[start..cut]);
                start = cut;
            }
            assert_eq!(checksum.update(&bytes[start..]).finish(), crc64(&bytes));
        }

        #[test]
        fn any_flipped_bit_is_noticed(mut bytes in vec(any::<u8>(), 1..9000), at in any::<Index>(), bit in 0..8) {
            let before = crc64(&bytes);
            let at = at.index(bytes.len());
            bytes[at] ^= 1_u8 << bit;
            assert_ne!(crc64(&bytes), before);
        }
    }
}

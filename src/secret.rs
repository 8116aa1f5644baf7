//! Keys by which a host and a controller prove who they are, as operators write them down:
//! `DHHC-1:hh:base64(key, CRC-32 of key):`. (NVMe Base 2.2, 8.3.4.5) Those of TLS, which look
//! almost the same, are in [`tls_key`], those of NBD hosts in [`named_keys`].
//!
//! # Invariants
//! * A key has 32, 48 or 64 bytes, and as many as its hash, if it names one.
//! * No key is ever printed: `Debug` shows its hash only. The written form leaves through
//!   [`DhchapKey::written`] and through serde, for the catalog.
//! * Keys are wiped from memory when they are dropped; copies that serialisation makes are not.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use crc_fast::CrcAlgorithm;
use serde::Deserialize;
use serde::Deserializer;
use serde::Serialize;
use serde::Serializer;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

pub mod file;
pub mod named_keys;
pub mod tls_key;

/// What every written key begins with.
const PREFIX: &str = "DHHC-1:";
/// Bytes of the checksum behind the key.
const CRC_BYTES: usize = 4;

/// A hash function of DH-HMAC-CHAP, weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hash {
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

impl Hash {
    /// All of them, weakest first.
    pub const ALL: [Self; 3] = [Self::Sha256, Self::Sha384, Self::Sha512];

    /// Its number, on the wire and in written keys.
    #[must_use]
    pub fn id(self) -> u8 {
        match self {
            Self::Sha256 => 1,
            Self::Sha384 => 2,
            Self::Sha512 => 3,
        }
    }

    /// The one of that number.
    #[must_use]
    pub fn from_id(id: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|hash| hash.id() == id)
    }

    /// Bytes of its digests.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    /// Its name in configurations and tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
        }
    }
}

/// A key.
#[derive(Clone)]
pub struct DhchapKey {
    /// How the key is bound to a name before use; `None`: it is used as it is.
    hash: Option<Hash>,
    key: Zeroizing<Vec<u8>>,
}

/// What is wrong with a written key. Says nothing of its contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyError {
    /// It is not of the form at all.
    Form,
    /// It names a hash that there is not.
    Hash,
    /// What is between the colons is not base64.
    Base64,
    /// The key is as long as no key.
    Length,
    /// It is not as long as the hash it names makes keys.
    LengthOfHash,
    /// The checksum is another: a letter is wrong or missing.
    Checksum,
}

impl fmt::Display for KeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a DH-HMAC-CHAP key: ")?;
        f.write_str(match self {
            Self::Form => {
                "one looks like DHHC-1:00:BASE64: and `weft host key` or `nvme gen-dhchap-key` \
                 makes one"
            }
            Self::Hash => "behind DHHC-1: must be 00, 01, 02 or 03",
            Self::Base64 => "what is between the last two colons is not base64",
            Self::Length => "it must have 32, 48 or 64 bytes, and 4 of checksum",
            Self::LengthOfHash => {
                "the one for hash 01 has 32 bytes, for 02 it has 48, for 03 it has 64"
            }
            Self::Checksum => "its checksum is wrong, so it was not copied whole",
        })
    }
}

impl std::error::Error for KeyError {}

impl DhchapKey {
    /// Reads a written key, with white space around it or without.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let (hash, key) = read(PREFIX, &Hash::ALL, text)?;
        Ok(Self { hash, key })
    }

    /// The key made of these bytes, which must be random: of as many of them as the hash makes
    /// digests.
    #[must_use]
    pub fn from_random(hash: Option<Hash>, random: &[u8; 64]) -> Self {
        let key = random.get(..Self::bytes_of(hash)).expect("no hash is longer");
        Self { hash, key: Zeroizing::new(key.to_vec()) }
    }

    /// Bytes of a new key.
    #[must_use]
    fn bytes_of(hash: Option<Hash>) -> usize {
        hash.unwrap_or(Hash::Sha256).bytes()
    }

    /// The key as it is written. To be shown to nobody but who asked to have it made.
    #[must_use]
    pub fn written(&self) -> Zeroizing<String> {
        write(PREFIX, self.hash, &self.key)
    }

    /// How it is bound to a name before use; `None`: it is used as it is.
    #[must_use]
    pub fn hash(&self) -> Option<Hash> {
        self.hash
    }

    /// The key itself.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.key
    }
}

/// Reads a written key that begins with `prefix` and names one of `hashes` or none.
fn read(
    prefix: &str,
    hashes: &[Hash],
    text: &str,
) -> Result<(Option<Hash>, Zeroizing<Vec<u8>>), KeyError> {
    let rest = text.trim().strip_prefix(prefix).ok_or(KeyError::Form)?;
    let (named, rest) = rest.split_once(':').ok_or(KeyError::Form)?;
    let encoded = rest.strip_suffix(':').ok_or(KeyError::Form)?;
    let is_named = |hash: &Hash| named == format!("{:02}", hash.id());
    let hash = match named {
        "00" => None,
        _ => Some(hashes.iter().copied().find(is_named).ok_or(KeyError::Hash)?),
    };
    let bytes = Zeroizing::new(STANDARD.decode(encoded).map_err(|_| KeyError::Base64)?);
    let length = bytes.len().checked_sub(CRC_BYTES).ok_or(KeyError::Length)?;
    let (key, checksum) = bytes.split_at(length);
    if !hashes.iter().any(|hash| hash.bytes() == length) {
        return Err(KeyError::Length);
    }
    if hash.is_some_and(|hash| hash.bytes() != length) {
        return Err(KeyError::LengthOfHash);
    }
    if checksum != crc32(key) {
        return Err(KeyError::Checksum);
    }
    Ok((hash, Zeroizing::new(key.to_vec())))
}

/// The written form of a key.
fn write(prefix: &str, hash: Option<Hash>, key: &[u8]) -> Zeroizing<String> {
    let mut bytes = Zeroizing::new(key.to_vec());
    bytes.extend(crc32(key));
    let id = hash.map_or(0, Hash::id);
    Zeroizing::new(format!("{prefix}{id:02}:{}:", STANDARD.encode(&*bytes)))
}

/// CRC-32 as zlib has it.
fn crc32(bytes: &[u8]) -> [u8; CRC_BYTES] {
    let crc = crc_fast::checksum(CrcAlgorithm::Crc32IsoHdlc, bytes);
    u32::try_from(crc).expect("a CRC of 32 bits").to_le_bytes()
}

impl fmt::Debug for DhchapKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DhchapKey({})", self.hash.map_or("none", Hash::name))
    }
}

impl PartialEq for DhchapKey {
    fn eq(&self, other: &Self) -> bool {
        self.hash == other.hash && bool::from(self.key.ct_eq(&other.key))
    }
}

impl Eq for DhchapKey {}

impl Serialize for DhchapKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.written())
    }
}

impl<'de> Deserialize<'de> for DhchapKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let written = Zeroizing::new(String::deserialize(deserializer)?);
        Self::parse(&written).map_err(serde::de::Error::custom)
    }
}

/// What a host must prove to have, and what it may ask to see proven.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostKeys {
    /// The host's.
    pub key: DhchapKey,
    /// The controller's towards this host; `None`: a host that asks is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ctrl_key: Option<DhchapKey>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Made with Python's base64 and zlib, of the bytes 0, 1, 2...
    const WRITTEN: [&str; 4] = [
        "DHHC-1:00:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:",
        "DHHC-1:01:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:",
        "DHHC-1:02:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4vcSEgBQ==:",
        "DHHC-1:03:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4vMDEyMzQ1Njc4OTo7PD0+P4zODhA=:",
    ];

    #[test]
    fn keys_made_elsewhere_are_read_and_written_back() {
        let hashes = [None, Some(Hash::Sha256), Some(Hash::Sha384), Some(Hash::Sha512)];
        for (written, hash) in WRITTEN.into_iter().zip(hashes) {
            let key = DhchapKey::parse(&format!(" {written}\n")).expect("a good key");
            let bytes: Vec<u8> = (0..).take(DhchapKey::bytes_of(hash)).collect();
            assert_eq!((key.hash(), key.bytes()), (hash, &bytes[..]));
            assert_eq!(&*key.written(), written);
            let json = serde_json::to_string(&key).expect("a string");
            assert_eq!(serde_json::from_str::<DhchapKey>(&json).expect("its own"), key);
        }
    }

    #[test]
    fn what_is_wrong_with_a_key_is_said_without_the_key() {
        let good = WRITTEN[1];
        for (wrong, error) in [
            ("".to_owned(), KeyError::Form),
            (good.replace("DHHC", "NVMeTLSkey"), KeyError::Form),
            (good.trim_end_matches(':').to_owned(), KeyError::Form),
            (good.replace(":01:", ":04:"), KeyError::Hash),
            (good.replace(":01:", ":1:"), KeyError::Hash),
            (good.replace(":01:", ":02:"), KeyError::LengthOfHash),
            (good.replace("AAEC", "AA*C"), KeyError::Base64),
            (good.replace("AAEC", "AAEC AAEC"), KeyError::Base64),
            (good.replace("AAEC", "AAED"), KeyError::Checksum),
            ("DHHC-1:00::".to_owned(), KeyError::Length),
            ("DHHC-1:00:AAECAwQF:".to_owned(), KeyError::Length),
        ] {
            assert_eq!(DhchapKey::parse(&wrong).expect_err(&wrong), error, "{wrong}");
            assert!(!error.to_string().contains("AAE"));
        }
    }

    #[test]
    fn keys_are_not_printed() {
        let keys = HostKeys { key: DhchapKey::parse(WRITTEN[1]).expect("good"), ctrl_key: None };
        assert_eq!(format!("{keys:?}"), "HostKeys { key: DhchapKey(sha256), ctrl_key: None }");
    }

    proptest! {
        #[test]
        fn any_text_is_a_key_or_is_not(text in "(DHHC-1:0[0-3]:)?[A-Za-z0-9+/=:]{0,100}") {
            if let Ok(key) = DhchapKey::parse(&text) {
                prop_assert_eq!(&*key.written(), &text);
            }
        }

        #[test]
        fn any_changed_letter_is_noticed(which in 0_usize..4, at: proptest::sample::Index) {
            let mut letters = WRITTEN[which].as_bytes().to_vec();
            let place = at.index(letters.len());
            letters[place] = if letters[place] == b'A' { b'B' } else { b'A' };
            let text = String::from_utf8(letters).expect("letters");
            prop_assert!(DhchapKey::parse(&text).is_err());
        }
    }
}

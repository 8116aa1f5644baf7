//! The key of a host for TLS, as operators write it down: `NVMeTLSkey-1:hh:base64(key, CRC-32 of
//! key):`, the PSK interchange format. (NVMe/TCP 1.1, 3.6.1)
//!
//! # Invariants
//! * A key has 32 or 48 bytes, and as many as the hash it names, if it names one.
//! * No key is ever printed: `Debug` shows its hash only. The written form leaves through
//!   [`TlsKey::written`] and through serde, for the catalog.
//! * Keys are wiped from memory when they are dropped; copies that serialisation makes are not.

use std::fmt;

use serde::Deserialize;
use serde::Deserializer;
use serde::Serialize;
use serde::Serializer;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::Hash;
use super::KeyError;
use super::read;
use super::write;

/// What every written key begins with.
const PREFIX: &str = "NVMeTLSkey-1:";
/// The hashes there are for TLS 1.3.
const HASHES: [Hash; 2] = [Hash::Sha256, Hash::Sha384];

/// A key for TLS.
#[derive(Clone)]
pub struct TlsKey {
    /// How the key is bound to the host's name before use; `None`: it is used as it is.
    hash: Option<Hash>,
    key: Zeroizing<Vec<u8>>,
}

/// What is wrong with a written key for TLS. Says nothing of its contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotTlsKey(KeyError);

impl fmt::Display for NotTlsKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a TLS key: ")?;
        f.write_str(match self.0 {
            KeyError::Form => {
                "one looks like NVMeTLSkey-1:01:BASE64: and `weft host key --tls` or \
                 `nvme gen-tls-key` makes one"
            }
            KeyError::Hash => "behind NVMeTLSkey-1: must be 00, 01 or 02",
            KeyError::Base64 => "what is between the last two colons is not base64",
            KeyError::Length => "it must have 32 or 48 bytes, and 4 of checksum",
            KeyError::LengthOfHash => "the one for hash 01 has 32 bytes, for 02 it has 48",
            KeyError::Checksum => "its checksum is wrong, so it was not copied whole",
        })
    }
}

impl std::error::Error for NotTlsKey {}

impl TlsKey {
    /// Reads a written key, with white space around it or without.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, NotTlsKey> {
        let (hash, key) = read(PREFIX, &HASHES, text).map_err(NotTlsKey)?;
        Ok(Self { hash, key })
    }

    /// The key made of these bytes, which must be random: of as many of them as the hash makes
    /// digests. `None` for a hash that TLS 1.3 does not have.
    #[must_use]
    pub fn from_random(hash: Option<Hash>, random: &[u8; 64]) -> Option<Self> {
        if hash.is_some_and(|hash| !HASHES.contains(&hash)) {
            return None;
        }
        let length = hash.unwrap_or(Hash::Sha256).bytes();
        let key = random.get(..length).expect("no hash is longer");
        Some(Self { hash, key: Zeroizing::new(key.to_vec()) })
    }

    /// The key as it is written. To be shown to nobody but who asked to have it made.
    #[must_use]
    pub fn written(&self) -> Zeroizing<String> {
        write(PREFIX, self.hash, &self.key)
    }

    /// How it is bound to the host's name before use; `None`: it is used as it is.
    #[must_use]
    pub fn bound_by(&self) -> Option<Hash> {
        self.hash
    }

    /// The hash of the cipher suites it is for, which its length says.
    #[must_use]
    pub fn suite_hash(&self) -> Hash {
        let fits = |hash: &Hash| hash.bytes() == self.key.len();
        HASHES.into_iter().find(fits).expect("checked when it was read or made")
    }

    /// The key itself.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.key
    }
}

impl fmt::Debug for TlsKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TlsKey({})", self.hash.map_or("none", Hash::name))
    }
}

impl PartialEq for TlsKey {
    fn eq(&self, other: &Self) -> bool {
        self.hash == other.hash && bool::from(self.key.ct_eq(&other.key))
    }
}

impl Eq for TlsKey {}

impl Serialize for TlsKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.written())
    }
}

impl<'de> Deserialize<'de> for TlsKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let written = Zeroizing::new(String::deserialize(deserializer)?);
        Self::parse(&written).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// libnvme's own test key.
    const WRITTEN: &str = "NVMeTLSkey-1:01:VRLbtnN9AQb2WXW3c9+wEf/DRLz0QuLdbYvEhwtdWwNf9LrZ:";

    #[test]
    fn a_key_made_elsewhere_is_read_and_written_back() {
        let key = TlsKey::parse(&format!(" {WRITTEN}\n")).expect("a good key");
        assert_eq!((key.bound_by(), key.suite_hash()), (Some(Hash::Sha256), Hash::Sha256));
        assert_eq!(key.bytes()[..4], [0x55, 0x12, 0xdb, 0xb6]);
        assert_eq!(&*key.written(), WRITTEN);
        let json = serde_json::to_string(&key).expect("a string");
        assert_eq!(serde_json::from_str::<TlsKey>(&json).expect("its own"), key);
        assert_eq!(format!("{key:?}"), "TlsKey(sha256)");
    }

    #[test]
    fn keys_come_in_two_lengths_whose_hash_their_suites_use() {
        for (hash, suite) in [
            (None, Hash::Sha256),
            (Some(Hash::Sha256), Hash::Sha256),
            (Some(Hash::Sha384), Hash::Sha384),
        ] {
            let key = TlsKey::from_random(hash, &[7; 64]).expect("a hash of TLS");
            assert_eq!((key.bound_by(), key.suite_hash()), (hash, suite));
            assert_eq!(TlsKey::parse(&key.written()), Ok(key));
        }
        assert!(TlsKey::from_random(Some(Hash::Sha512), &[7; 64]).is_none());
        let unbound = write(PREFIX, None, &[7; 48]);
        assert_eq!(TlsKey::parse(&unbound).expect("good").suite_hash(), Hash::Sha384);
    }

    #[test]
    fn what_is_wrong_with_a_key_is_said_without_the_key() {
        for (wrong, error) in [
            (WRITTEN.replace("NVMeTLSkey-1", "DHHC-1"), KeyError::Form),
            (WRITTEN.replace(":01:", ":03:"), KeyError::Hash),
            (WRITTEN.replace(":01:", ":02:"), KeyError::LengthOfHash),
            (WRITTEN.replace("VRLb", "VR*b"), KeyError::Base64),
            (WRITTEN.replace("VRLb", "VRLc"), KeyError::Checksum),
            (write(PREFIX, None, &[7; 64]).to_string(), KeyError::Length),
        ] {
            let error = NotTlsKey(error);
            assert_eq!(TlsKey::parse(&wrong), Err(error), "{wrong}");
            assert!(!error.to_string().contains("VRL"));
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_key_or_is_not(text in "(NVMeTLSkey-1:0[0-3]:)?[A-Za-z0-9+/=:]{0,100}") {
            if let Ok(key) = TlsKey::parse(&text) {
                prop_assert_eq!(&*key.written(), &text);
            }
        }
    }
}

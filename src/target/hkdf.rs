//! Digests, HMAC, and HKDF as TLS 1.3 uses it (RFC 5869; RFC 8446, 7.1), over any of the hashes that keys name. Pure.

use hmac::Hmac;
use hmac::KeyInit;
use hmac::Mac;
use sha2::Digest;
use sha2::Sha256;
use sha2::Sha384;
use sha2::Sha512;
use zeroize::Zeroizing;

use crate::secret::Hash;

/// What labels begin with, beside what they are for.
const LABEL_PREFIX: &[u8] = b"tls13 ";

/// Bytes that nobody else is to see, wiped when dropped.
pub type Secret = Zeroizing<Vec<u8>>;

/// A hash's digest of some bytes.
#[must_use]
pub fn digest(hash: Hash, bytes: &[u8]) -> Secret {
    Zeroizing::new(match hash {
        Hash::Sha256 => Sha256::digest(bytes).to_vec(),
        Hash::Sha384 => Sha384::digest(bytes).to_vec(),
        Hash::Sha512 => Sha512::digest(bytes).to_vec(),
    })
}

/// The HMAC of some bytes, given in parts.
#[must_use]
pub fn hmac(hash: Hash, key: &[u8], parts: &[&[u8]]) -> Secret {
    fn by<M: Mac + KeyInit>(key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
        let mut mac = <M as KeyInit>::new_from_slice(key).expect("HMAC takes keys of any length");
        parts.iter().for_each(|part| mac.update(part));
        mac.finalize().into_bytes().to_vec()
    }
    Zeroizing::new(match hash {
        Hash::Sha256 => by::<Hmac<Sha256>>(key, parts),
        Hash::Sha384 => by::<Hmac<Sha384>>(key, parts),
        Hash::Sha512 => by::<Hmac<Sha512>>(key, parts),
    })
}

/// HKDF-Extract without a salt.
#[must_use]
pub fn extract(hash: Hash, key: &[u8]) -> Secret {
    // Zeroes of the hash's length, which HMAC makes of no key too.
    hmac(hash, &[], &[key])
}

/// How the arguments of HKDF-Expand-Label are written into what is hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// As RFC 8446, 7.1 says.
    Right,
    /// As libnvme did until 1.15 (August 2025): the length little-endian, and no lengths before
    /// label and context. Hosts with it are in the field, and will be for years.
    Libnvme,
}

/// HKDF-Expand-Label, for as many bytes as the hash has.
///
/// # Panics
/// If the label or the context is too long for its length to be said.
#[must_use]
pub fn expand_label(
    hash: Hash,
    secret: &[u8],
    label: &str,
    context: &[u8],
    encoding: Encoding,
) -> Secret {
    let length = u16::try_from(hash.bytes()).expect("at most 64");
    let length_of = |bytes: usize| [u8::try_from(bytes).expect("a short label or context")];
    let label = label.as_bytes();
    // A hash's length of bytes is the first block, whose number is 1.
    match encoding {
        Encoding::Right => {
            let label_length = length_of(LABEL_PREFIX.len() + label.len());
            let context_length = length_of(context.len());
            let length = length.to_be_bytes();
            let parts: [&[u8]; 7] =
                [&length, &label_length, LABEL_PREFIX, label, &context_length, context, &[1]];
            hmac(hash, secret, &parts)
        }
        Encoding::Libnvme => {
            hmac(hash, secret, &[&length.to_le_bytes(), LABEL_PREFIX, label, context, &[1]])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn the_schedule_of_a_handshake_without_a_psk_is_that_of_rfc_8448() {
        // RFC 8448, 3: "early secret" and its "derived" secret.
        let early = extract(Hash::Sha256, &[0; 32]);
        assert_eq!(hex(&early), "33ad0a1c607ec03b09e6cd9893680ce210adf300aa1f2660e1b22e10f170f92a");
        let empty = digest(Hash::Sha256, &[]);
        let derived = expand_label(Hash::Sha256, &early, "derived", &empty, Encoding::Right);
        assert_eq!(
            hex(&derived),
            "6f2615a108c702c5678f54fc9dbab69716c076189c48250cebeac3576c3611ba"
        );
    }
}

//! What a ClientHello says of pre-shared keys, and whether who sent it has one. Pure.
//! (RFC 8446, 4.1.2 and 4.2.11)
//!
//! The library checks binders too, but only of keys it has been given: here it is found out which
//! to give, since one identity may stand for two keys.

use subtle::ConstantTimeEq;

use crate::secret::Hash;
use crate::target::hkdf::Encoding;
use crate::target::hkdf::digest;
use crate::target::hkdf::expand_label;
use crate::target::hkdf::extract;
use crate::target::hkdf::hmac;

/// Identities looked at; those after them are not. Hosts send one.
const IDENTITIES_MAX: usize = 4;
/// The type of a handshake message that is a ClientHello, and the bytes of its length.
const CLIENT_HELLO: u8 = 1;
/// The extension `pre_shared_key`.
const PRE_SHARED_KEY: u16 = 41;
/// Where the client's random lies: behind the version.
const RANDOM_AT: usize = 2;

/// A ClientHello.
pub struct Hello {
    /// The whole message, with its header.
    message: Vec<u8>,
    /// Bytes of it that binders are over.
    bound: usize,
    offers: Vec<Offer>,
}

/// An identity, and the proof that its key is there.
struct Offer {
    identity: Vec<u8>,
    binder: Vec<u8>,
}

impl Hello {
    /// Reads the message without its header, in which `random` has been left out. `None` if it is
    /// not one, or offers no keys.
    pub fn parse(body: &[u8], random: &[u8; 32]) -> Option<Self> {
        let mut rest = Bytes(body);
        rest.take(RANDOM_AT + random.len())?;
        rest.short_vector()?; // session
        rest.vector()?; // cipher suites
        rest.short_vector()?; // compression methods
        let mut extensions = Bytes(rest.vector()?);
        let mut last = (0, &[][..]);
        while !extensions.0.is_empty() {
            last = (extensions.u16()?, extensions.vector()?);
        }
        let (PRE_SHARED_KEY, offered) = last else { return None };
        if !rest.0.is_empty() {
            return None;
        }
        let mut offered = Bytes(offered);
        let mut identities = Bytes(offered.vector()?);
        let binders_bytes = offered.0.len();
        let mut binders = Bytes(offered.vector()?);
        let mut offers = Vec::new();
        while !identities.0.is_empty() && offers.len() < IDENTITIES_MAX {
            let identity = identities.vector()?.to_vec();
            identities.take(4)?; // the age of a ticket
            offers.push(Offer { identity, binder: binders.short_vector()?.to_vec() });
        }
        let length = u32::try_from(body.len()).ok()?.to_be_bytes();
        let mut message = vec![CLIENT_HELLO];
        message.extend(length.get(1..)?);
        let header = message.len();
        message.extend(body);
        let random_at = header + RANDOM_AT;
        message.get_mut(random_at..random_at + random.len())?.copy_from_slice(random);
        let bound = message.len() - binders_bytes;
        Some(Self { message, bound, offers })
    }

    /// The identities, in the order of the client's preference.
    pub fn identities(&self) -> impl Iterator<Item = &[u8]> {
        self.offers.iter().map(|offer| &*offer.identity)
    }

    /// Whether who sent this has that key for that identity. (RFC 8446, 4.2.11.2)
    pub fn proves(&self, identity: &[u8], hash: Hash, key: &[u8]) -> bool {
        let bound = self.message.get(..self.bound).expect("within it");
        let right = binder(hash, key, bound);
        let offer = self.offers.iter().find(|offer| offer.identity == identity);
        offer.is_some_and(|offer| bool::from(right.ct_eq(&offer.binder)))
    }
}

/// The binder of an external key over the bytes before the binders.
fn binder(hash: Hash, key: &[u8], bound: &[u8]) -> impl std::ops::Deref<Target = Vec<u8>> {
    let expand = |secret: &[u8], label, context: &[u8]| {
        expand_label(hash, secret, label, context, Encoding::Right)
    };
    let binder_key = expand(&extract(hash, key), "ext binder", &digest(hash, &[]));
    let finished = expand(&binder_key, "finished", &[]);
    hmac(hash, &finished, &[&digest(hash, bound)])
}

/// Bytes not yet read.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }

    /// Bytes behind their length, of two bytes.
    fn vector(&mut self) -> Option<&'a [u8]> {
        let count = self.u16()?;
        self.take(count.into())
    }

    /// Bytes behind their length, of one byte.
    fn short_vector(&mut self) -> Option<&'a [u8]> {
        let count = *self.take(1)?.first()?;
        self.take(count.into())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RANDOM: [u8; 32] = [9; 32];

    fn vector(bytes: &[u8]) -> Vec<u8> {
        let length = u16::try_from(bytes.len()).expect("short");
        [&length.to_be_bytes()[..], bytes].concat()
    }

    /// The body of a ClientHello that offers these, with right binders for `key`.
    fn body(identities: &[&[u8]], key: &[u8]) -> Vec<u8> {
        let offered: Vec<u8> =
            identities.iter().flat_map(|one| [vector(one), vec![0; 4]].concat()).collect();
        let made = |binder: &[u8]| {
            let binders: Vec<u8> =
                identities.iter().flat_map(|_| [&[32], binder].concat()).collect();
            let keys = [vector(&offered), vector(&binders)].concat();
            let extensions = [&[0, 43][..], &vector(&[2, 3, 4]), &[0, 41], &vector(&keys)].concat();
            let before = [&[3, 3][..], &[0; 32], &[0], &vector(&[0x13, 1]), &[1, 0]].concat();
            (before, vector(&extensions), binders.len() + 2)
        };
        let (mut before, extensions, binders_bytes) = made(&[0; 32]);
        before[2..34].copy_from_slice(&RANDOM);
        let message = [&[1, 0], &vector(&[before, extensions].concat())[..]].concat();
        let binder = binder(Hash::Sha256, key, &message[..message.len() - binders_bytes]).to_vec();
        let (before, extensions, _) = made(&binder);
        [before, extensions].concat()
    }

    #[test]
    fn a_client_that_has_the_key_proves_it() {
        let body = body(&[b"one", b"two"], b"key");
        let hello = Hello::parse(&body, &RANDOM).expect("good");
        assert_eq!(hello.identities().collect::<Vec<_>>(), [b"one", b"two"]);
        assert!(hello.proves(b"two", Hash::Sha256, b"key"));
        assert!(!hello.proves(b"two", Hash::Sha256, b"yek"));
        assert!(!hello.proves(b"two", Hash::Sha384, b"key"));
        assert!(!hello.proves(b"six", Hash::Sha256, b"key"));
        let other = Hello::parse(&body, &[8; 32]).expect("good");
        assert!(!other.proves(b"two", Hash::Sha256, b"key"), "bound to all of the message");
    }

    #[test]
    fn no_more_identities_are_looked_at_than_a_few() {
        let body = body(&[&b"i"[..]; 100], b"key");
        let hello = Hello::parse(&body, &RANDOM).expect("good");
        assert_eq!(hello.identities().count(), IDENTITIES_MAX);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_hello_or_are_not(bytes: Vec<u8>) {
            let _ = Hello::parse(&bytes, &RANDOM);
        }

        #[test]
        fn a_damaged_hello_proves_nothing(at: proptest::sample::Index, to: u8) {
            let mut body = body(&[b"one"], b"key");
            let at = at.index(body.len());
            // The random is said beside.
            prop_assume!(body[at] != to && !(2..34).contains(&at));
            body[at] = to;
            if let Some(hello) = Hello::parse(&body, &RANDOM) {
                prop_assert!(!hello.proves(b"one", Hash::Sha256, b"key"));
            }
        }

        #[test]
        fn a_hello_cut_short_is_none(at: proptest::sample::Index) {
            let body = body(&[b"one"], b"key");
            prop_assert!(Hello::parse(&body[..at.index(body.len())], &RANDOM).is_none());
        }
    }
}

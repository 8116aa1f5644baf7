//! Names of TLS keys on the wire, and what becomes of a host's key under each. Pure.
//! (NVMe/TCP 1.1, 3.6.1)
//!
//! ```text
//! NVMe0R01 HOSTNQN SUBNQN            version 0, SHA-256
//! NVMe1R02 HOSTNQN SUBNQN DIGEST     version 1, SHA-384; the digest is of the key and both names
//! ```
//!
//! A key that an operator gives is first bound to the host's name (the *retained* key), then to the
//! whole identity (the key of TLS), by HKDF-Expand-Label. libnvme wrote that one's arguments wrongly
//! for years: for either identity both keys are tried, the right one first.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::secret::Hash;
use crate::secret::tls_key::TlsKey;
use crate::target::hkdf::Encoding;
use crate::target::hkdf::Secret;
use crate::target::hkdf::expand_label;
use crate::target::hkdf::extract;
use crate::target::hkdf::hmac;
use crate::target::psk::Candidate;

/// What a key is bound to a host by.
const HOST_LABEL: &str = "HostNQN";
/// What the key of TLS is made by.
const TLS_LABEL: &str = "nvme-tls-psk";
/// What digests of identities end in.
const DIGEST_LABEL: &[u8] = b"NVMe-over-Fabrics";
/// Longest context whose length can be said.
const CONTEXT_BYTES_MAX: usize = 255;

/// A key's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity<'a> {
    /// All of it.
    text: &'a str,
    hash: Hash,
    /// The host whose key it is.
    pub host_nqn: &'a str,
    /// What it connects to.
    pub subsystem_nqn: &'a str,
    /// In version 1 only.
    digest: Option<&'a str>,
}

impl<'a> Identity<'a> {
    /// Reads one. `None` if it is none, or of a key that was not given but made by both sides (G).
    #[must_use]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        let mut words = text.split(' ');
        let (versioned, hash) = match words.next()? {
            "NVMe0R01" => (false, Hash::Sha256),
            "NVMe0R02" => (false, Hash::Sha384),
            "NVMe1R01" => (true, Hash::Sha256),
            "NVMe1R02" => (true, Hash::Sha384),
            _ => return None,
        };
        let (host_nqn, subsystem_nqn) = (words.next()?, words.next()?);
        let digest = words.next();
        let whole = words.next().is_none() && digest.is_some() == versioned;
        whole.then_some(Self { text, hash, host_nqn, subsystem_nqn, digest })
    }

    /// The keys of TLS that this may stand for if the host's is `key`, the likeliest first.
    #[must_use]
    pub fn candidates(&self, key: &TlsKey) -> Vec<Candidate> {
        if key.suite_hash() != self.hash || self.host_nqn.len() > CONTEXT_BYTES_MAX {
            return Vec::new();
        }
        let encodings = [Encoding::Right, Encoding::Libnvme];
        encodings.into_iter().filter_map(|encoding| self.candidate(key, encoding)).collect()
    }

    fn candidate(&self, key: &TlsKey, encoding: Encoding) -> Option<Candidate> {
        let hash = self.hash;
        let expand = |secret: &[u8], label, context: &[u8]| {
            expand_label(hash, &extract(hash, secret), label, context, encoding)
        };
        let retained = match key.bound_by() {
            None => Secret::new(key.bytes().to_vec()),
            Some(_) => expand(key.bytes(), HOST_LABEL, self.host_nqn.as_bytes()),
        };
        let context = match self.digest {
            None => self.text.to_owned(),
            Some(digest) if digest == self.digest(&retained) => {
                format!("{:02} {digest}", hash.id())
            }
            Some(_) => return None,
        };
        // The names may make it too long for hosts that do it right; those say version 1.
        let fits = context.len() <= CONTEXT_BYTES_MAX || encoding == Encoding::Libnvme;
        fits.then(|| Candidate { hash, key: expand(&retained, TLS_LABEL, context.as_bytes()) })
    }

    /// What an identity of version 1 says of the key.
    fn digest(&self, retained: &[u8]) -> String {
        let (host, subsystem) = (self.host_nqn.as_bytes(), self.subsystem_nqn.as_bytes());
        STANDARD.encode(&*hmac(self.hash, retained, &[host, b" ", subsystem, b" ", DIGEST_LABEL]))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEY: &str = "NVMeTLSkey-1:01:VRLbtnN9AQb2WXW3c9+wEf/DRLz0QuLdbYvEhwtdWwNf9LrZ:";
    const NAMES: &str = "nqn.psk-test-host nqn.psk-test-subsys";
    /// libnvme's test has both digests.
    const DIGEST: &str = "iSbjiStwJ/1TrTvDlt2fjFmzvsytOJelidNnA+X5lEU=";
    const DIGEST_LIBNVME: &str = "66GuqV08TsAGII39teWUfwQwizjv06Jy8jOcX3NAAzM=";

    fn keys(identity: &str, key: &TlsKey) -> Vec<String> {
        let identity = Identity::parse(identity.as_bytes()).expect("an identity");
        let hex = |key: &[u8]| key.iter().map(|byte| format!("{byte:02x}")).collect();
        identity.candidates(key).iter().map(|one| hex(&one.key)).collect()
    }

    #[test]
    fn keys_are_those_of_hosts_that_do_it_right_and_of_those_that_do_not() {
        let key = TlsKey::parse(KEY).expect("good");
        let right = "8fc3c0badfd4c0c66fa3ca33aadd0314f85536cc9bc47338b60f3e6e563786ca";
        let libnvme = "b9f5ab2a41ba6e72a23a12066302a2f775fa6c0942c8e0b18ca8ac07edf305e2";
        assert_eq!(keys(&format!("NVMe1R01 {NAMES} {DIGEST}"), &key), [right]);
        assert_eq!(keys(&format!("NVMe1R01 {NAMES} {DIGEST_LIBNVME}"), &key), [libnvme]);
        // Version 0 does not say which it is.
        assert_eq!(keys(&format!("NVMe0R01 {NAMES}"), &key).len(), 2);
        let other = TlsKey::from_random(Some(Hash::Sha256), &[7; 64]).expect("a hash of TLS");
        assert_eq!(keys(&format!("NVMe1R01 {NAMES} {DIGEST}"), &other), [""; 0]);
    }

    #[test]
    fn a_key_is_for_the_hash_that_it_is_as_long_as() {
        let key = TlsKey::from_random(Some(Hash::Sha384), &[7; 64]).expect("a hash of TLS");
        assert_eq!(keys(&format!("NVMe0R01 {NAMES}"), &key), [""; 0]);
        assert!(keys(&format!("NVMe0R02 {NAMES}"), &key).iter().all(|key| key.len() == 96));
    }

    #[test]
    fn names_too_long_for_the_right_way_leave_the_other() {
        let key = TlsKey::parse(KEY).expect("good");
        let identity = format!("NVMe0R01 nqn.{} nqn.{}", "h".repeat(219), "s".repeat(219));
        assert_eq!(keys(&identity, &key).len(), 1);
    }

    #[test]
    fn what_is_no_identity_is_none() {
        for wrong in [
            "",
            "NVMe0R01",
            "NVMe0R01 nqn.h",
            "NVMe0R01 nqn.h nqn.s digest",
            "NVMe1R01 nqn.h nqn.s",
            "NVMe1R01 nqn.h nqn.s digest more",
            "NVMe0R03 nqn.h nqn.s",
            "NVMe0G01 nqn.h nqn.s",
            "NVMe1G01 nqn.h nqn.s digest",
            "Client_identity",
        ] {
            assert_eq!(Identity::parse(wrong.as_bytes()), None, "{wrong}");
        }
        assert_eq!(Identity::parse(b"NVMe0R01 nqn.\xff nqn.s"), None);
    }

    proptest! {
        #[test]
        fn any_identity_is_safe_to_ask_about(text in "(NVMe[01]R0[12] )?[ -~]{0,600}") {
            let key = TlsKey::parse(KEY).expect("good");
            if let Some(identity) = Identity::parse(text.as_bytes()) {
                prop_assert!(identity.candidates(&key).len() <= 2);
            }
        }
    }
}

//! The Diffie-Hellman groups of DH-HMAC-CHAP: numbers modulo a prime, with generator 2.
//! (RFC 7919, appendix A)
//!
//! An exponentiation takes milliseconds (measured on one core of the build machine: 0.6 for 2048
//! bits, 1.7 for 3072, 7 for 4096, 18 for 6144, 27 for 8192), so whoever calls these does so away
//! from the data plane. They take the same time whatever the exponent.

use crypto_bigint::BoxedUint;
use crypto_bigint::Odd;
use crypto_bigint::modular::BoxedMontyForm;
use crypto_bigint::modular::BoxedMontyParams;
use zeroize::Zeroizing;

const FFDHE2048: &str = concat!(
    "ffffffffffffffffadf85458a2bb4a9aafdc5620273d3cf1d8b9c583ce2d3695a9e13641146433fbcc939dce",
    "249b3ef97d2fe363630c75d8f681b202aec4617ad3df1ed5d5fd65612433f51f5f066ed0856365553ded1af3",
    "b557135e7f57c935984f0c70e0e68b77e2a689daf3efe8721df158a136ade73530acca4f483a797abc0ab182",
    "b324fb61d108a94bb2c8e3fbb96adab760d7f4681d4f42a3de394df4ae56ede76372bb190b07a7c8ee0a6d70",
    "9e02fce1cdf7e2ecc03404cd28342f619172fe9ce98583ff8e4f1232eef28183c3fe3b1b4c6fad733bb5fcbc",
    "2ec22005c58ef1837d1683b2c6f34a26c1b2effa886b423861285c97ffffffffffffffff",
);

const FFDHE3072: &str = concat!(
    "ffffffffffffffffadf85458a2bb4a9aafdc5620273d3cf1d8b9c583ce2d3695a9e13641146433fbcc939dce",
    "249b3ef97d2fe363630c75d8f681b202aec4617ad3df1ed5d5fd65612433f51f5f066ed0856365553ded1af3",
    "b557135e7f57c935984f0c70e0e68b77e2a689daf3efe8721df158a136ade73530acca4f483a797abc0ab182",
    "b324fb61d108a94bb2c8e3fbb96adab760d7f4681d4f42a3de394df4ae56ede76372bb190b07a7c8ee0a6d70",
    "9e02fce1cdf7e2ecc03404cd28342f619172fe9ce98583ff8e4f1232eef28183c3fe3b1b4c6fad733bb5fcbc",
    "2ec22005c58ef1837d1683b2c6f34a26c1b2effa886b4238611fcfdcde355b3b6519035bbc34f4def99c0238",
    "61b46fc9d6e6c9077ad91d2691f7f7ee598cb0fac186d91caefe130985139270b4130c93bc437944f4fd4452",
    "e2d74dd364f2e21e71f54bff5cae82ab9c9df69ee86d2bc522363a0dabc521979b0deada1dbf9a42d5c4484e",
    "0abcd06bfa53ddef3c1b20ee3fd59d7c25e41d2b66c62e37ffffffffffffffff",
);

const FFDHE4096: &str = concat!(
    "ffffffffffffffffadf85458a2bb4a9aafdc5620273d3cf1d8b9c583ce2d3695a9e13641146433fbcc939dce",
    "249b3ef97d2fe363630c75d8f681b202aec4617ad3df1ed5d5fd65612433f51f5f066ed0856365553ded1af3",
    "b557135e7f57c935984f0c70e0e68b77e2a689daf3efe8721df158a136ade73530acca4f483a797abc0ab182",
    "b324fb61d108a94bb2c8e3fbb96adab760d7f4681d4f42a3de394df4ae56ede76372bb190b07a7c8ee0a6d70",
    "9e02fce1cdf7e2ecc03404cd28342f619172fe9ce98583ff8e4f1232eef28183c3fe3b1b4c6fad733bb5fcbc",
    "2ec22005c58ef1837d1683b2c6f34a26c1b2effa886b4238611fcfdcde355b3b6519035bbc34f4def99c0238",
    "61b46fc9d6e6c9077ad91d2691f7f7ee598cb0fac186d91caefe130985139270b4130c93bc437944f4fd4452",
    "e2d74dd364f2e21e71f54bff5cae82ab9c9df69ee86d2bc522363a0dabc521979b0deada1dbf9a42d5c4484e",
    "0abcd06bfa53ddef3c1b20ee3fd59d7c25e41d2b669e1ef16e6f52c3164df4fb7930e9e4e58857b6ac7d5f42",
    "d69f6d187763cf1d5503400487f55ba57e31cc7a7135c886efb4318aed6a1e012d9e6832a907600a918130c4",
    "6dc778f971ad0038092999a333cb8b7a1a1db93d7140003c2a4ecea9f98d0acc0a8291cdcec97dcf8ec9b55a",
    "7f88a46b4db5a851f44182e1c68a007e5e655f6affffffffffffffff",
);

const FFDHE6144: &str = concat!(
    "ffffffffffffffffadf85458a2bb4a9aafdc5620273d3cf1d8b9c583ce2d3695a9e13641146433fbcc939dce",
    "249b3ef97d2fe363630c75d8f681b202aec4617ad3df1ed5d5fd65612433f51f5f066ed0856365553ded1af3",
    "b557135e7f57c935984f0c70e0e68b77e2a689daf3efe8721df158a136ade73530acca4f483a797abc0ab182",
    "b324fb61d108a94bb2c8e3fbb96adab760d7f4681d4f42a3de394df4ae56ede76372bb190b07a7c8ee0a6d70",
    "9e02fce1cdf7e2ecc03404cd28342f619172fe9ce98583ff8e4f1232eef28183c3fe3b1b4c6fad733bb5fcbc",
    "2ec22005c58ef1837d1683b2c6f34a26c1b2effa886b4238611fcfdcde355b3b6519035bbc34f4def99c0238",
    "61b46fc9d6e6c9077ad91d2691f7f7ee598cb0fac186d91caefe130985139270b4130c93bc437944f4fd4452",
    "e2d74dd364f2e21e71f54bff5cae82ab9c9df69ee86d2bc522363a0dabc521979b0deada1dbf9a42d5c4484e",
    "0abcd06bfa53ddef3c1b20ee3fd59d7c25e41d2b669e1ef16e6f52c3164df4fb7930e9e4e58857b6ac7d5f42",
    "d69f6d187763cf1d5503400487f55ba57e31cc7a7135c886efb4318aed6a1e012d9e6832a907600a918130c4",
    "6dc778f971ad0038092999a333cb8b7a1a1db93d7140003c2a4ecea9f98d0acc0a8291cdcec97dcf8ec9b55a",
    "7f88a46b4db5a851f44182e1c68a007e5e0dd9020bfd64b645036c7a4e677d2c38532a3a23ba4442caf53ea6",
    "3bb454329b7624c8917bdd64b1c0fd4cb38e8c334c701c3acdad0657fccfec719b1f5c3e4e46041f388147fb",
    "4cfdb477a52471f7a9a96910b855322edb6340d8a00ef092350511e30abec1fff9e3a26e7fb29f8c183023c3",
    "587e38da0077d9b4763e4e4b94b2bbc194c6651e77caf992eeaac0232a281bf6b3a739c1226116820ae8db58",
    "47a67cbef9c9091b462d538cd72b03746ae77f5e62292c311562a846505dc82db854338ae49f5235c95b9117",
    "8ccf2dd5cacef403ec9d1810c6272b045b3b71f9dc6b80d63fdd4a8e9adb1e6962a69526d43161c1a41d570d",
    "7938dad4a40e329cd0e40e65ffffffffffffffff",
);

const FFDHE8192: &str = concat!(
    "ffffffffffffffffadf85458a2bb4a9aafdc5620273d3cf1d8b9c583ce2d3695a9e13641146433fbcc939dce",
    "249b3ef97d2fe363630c75d8f681b202aec4617ad3df1ed5d5fd65612433f51f5f066ed0856365553ded1af3",
    "b557135e7f57c935984f0c70e0e68b77e2a689daf3efe8721df158a136ade73530acca4f483a797abc0ab182",
    "b324fb61d108a94bb2c8e3fbb96adab760d7f4681d4f42a3de394df4ae56ede76372bb190b07a7c8ee0a6d70",
    "9e02fce1cdf7e2ecc03404cd28342f619172fe9ce98583ff8e4f1232eef28183c3fe3b1b4c6fad733bb5fcbc",
    "2ec22005c58ef1837d1683b2c6f34a26c1b2effa886b4238611fcfdcde355b3b6519035bbc34f4def99c0238",
    "61b46fc9d6e6c9077ad91d2691f7f7ee598cb0fac186d91caefe130985139270b4130c93bc437944f4fd4452",
    "e2d74dd364f2e21e71f54bff5cae82ab9c9df69ee86d2bc522363a0dabc521979b0deada1dbf9a42d5c4484e",
    "0abcd06bfa53ddef3c1b20ee3fd59d7c25e41d2b669e1ef16e6f52c3164df4fb7930e9e4e58857b6ac7d5f42",
    "d69f6d187763cf1d5503400487f55ba57e31cc7a7135c886efb4318aed6a1e012d9e6832a907600a918130c4",
    "6dc778f971ad0038092999a333cb8b7a1a1db93d7140003c2a4ecea9f98d0acc0a8291cdcec97dcf8ec9b55a",
    "7f88a46b4db5a851f44182e1c68a007e5e0dd9020bfd64b645036c7a4e677d2c38532a3a23ba4442caf53ea6",
    "3bb454329b7624c8917bdd64b1c0fd4cb38e8c334c701c3acdad0657fccfec719b1f5c3e4e46041f388147fb",
    "4cfdb477a52471f7a9a96910b855322edb6340d8a00ef092350511e30abec1fff9e3a26e7fb29f8c183023c3",
    "587e38da0077d9b4763e4e4b94b2bbc194c6651e77caf992eeaac0232a281bf6b3a739c1226116820ae8db58",
    "47a67cbef9c9091b462d538cd72b03746ae77f5e62292c311562a846505dc82db854338ae49f5235c95b9117",
    "8ccf2dd5cacef403ec9d1810c6272b045b3b71f9dc6b80d63fdd4a8e9adb1e6962a69526d43161c1a41d570d",
    "7938dad4a40e329ccff46aaa36ad004cf600c8381e425a31d951ae64fdb23fcec9509d43687feb69edd1cc5e",
    "0b8cc3bdf64b10ef86b63142a3ab8829555b2f747c932665cb2c0f1cc01bd70229388839d2af05e454504ac7",
    "8b7582822846c0ba35c35f5c59160cc046fd8251541fc68c9c86b022bb7099876a460e7451a8a93109703fee",
    "1c217e6c3826e52c51aa691e0e423cfc99e9e31650c1217b624816cdad9a95f9d5b8019488d9c0a0a1fe3075",
    "a577e23183f81d4a3f2fa4571efc8ce0ba8a4fe8b6855dfe72b0a66eded2fbabfbe58a30fafabe1c5d71a87e",
    "2f741ef8c1fe86fea6bbfde530677f0d97d11d49f7a8443d0822e506a9f4614e011e2a94838ff88cd68c8bb7",
    "c5c6424cffffffffffffffff",
);

/// A group, weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// None: challenges are answered as they are.
    Null,
    /// 2048 bits.
    Ffdhe2048,
    /// 3072 bits.
    Ffdhe3072,
    /// 4096 bits.
    Ffdhe4096,
    /// 6144 bits.
    Ffdhe6144,
    /// 8192 bits.
    Ffdhe8192,
}

/// Longest exponent, in bytes.
pub const EXPONENT_BYTES_MAX: usize = 56;

/// A secret exponent. As many of its bytes are used as the group needs.
pub type Exponent = Zeroizing<[u8; EXPONENT_BYTES_MAX]>;

impl Group {
    /// All of them, weakest first.
    pub const ALL: [Self; 6] = [
        Self::Null,
        Self::Ffdhe2048,
        Self::Ffdhe3072,
        Self::Ffdhe4096,
        Self::Ffdhe6144,
        Self::Ffdhe8192,
    ];

    /// Its number on the wire.
    #[must_use]
    pub fn id(self) -> u8 {
        match self {
            Self::Null => 0,
            Self::Ffdhe2048 => 1,
            Self::Ffdhe3072 => 2,
            Self::Ffdhe4096 => 3,
            Self::Ffdhe6144 => 4,
            Self::Ffdhe8192 => 5,
        }
    }

    /// Its name in configurations.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Ffdhe2048 => "ffdhe2048",
            Self::Ffdhe3072 => "ffdhe3072",
            Self::Ffdhe4096 => "ffdhe4096",
            Self::Ffdhe6144 => "ffdhe6144",
            Self::Ffdhe8192 => "ffdhe8192",
        }
    }

    /// Bytes of its prime, and so of every value exchanged; 0 for none.
    #[must_use]
    pub fn value_bytes(self) -> usize {
        self.prime().len() / 2
    }

    /// Bytes of an exponent: twice the strength of the group, rounded up to 64 bits.
    /// (RFC 7919, 5.2 and appendix A: at least 225, 275, 325, 375 and 400 bits)
    fn exponent_bytes(self) -> usize {
        match self {
            Self::Null => 0,
            Self::Ffdhe2048 => 32,
            Self::Ffdhe3072 => 40,
            Self::Ffdhe4096 | Self::Ffdhe6144 => 48,
            Self::Ffdhe8192 => EXPONENT_BYTES_MAX,
        }
    }

    /// In hexadecimal; empty for none.
    fn prime(self) -> &'static str {
        match self {
            Self::Null => "",
            Self::Ffdhe2048 => FFDHE2048,
            Self::Ffdhe3072 => FFDHE3072,
            Self::Ffdhe4096 => FFDHE4096,
            Self::Ffdhe6144 => FFDHE6144,
            Self::Ffdhe8192 => FFDHE8192,
        }
    }

    fn prime_value(self) -> BoxedUint {
        let prime = self.prime();
        // Four bits a digit.
        let bits = u32::try_from(prime.len() * 4).expect("8192 at most");
        BoxedUint::from_be_hex(prime, bits).expect("a constant of that length")
    }

    /// 2 to the power of the exponent: what the other side may see. Empty for no group.
    #[must_use]
    pub fn public(self, exponent: &Exponent) -> Vec<u8> {
        let mut two = vec![0; self.value_bytes()];
        if let Some(last) = two.last_mut() {
            *last = 2;
        }
        self.power(&two, exponent).to_vec()
    }

    /// What both sides can compute and nobody else: the other's value to the power of the exponent,
    /// with leading zeroes. `None` if no honest host sends that value: it is 0, 1, the prime less
    /// one, or not below the prime. (RFC 7919, 5.1)
    #[must_use]
    pub fn shared(self, theirs: &[u8], exponent: &Exponent) -> Option<Zeroizing<Vec<u8>>> {
        if self == Self::Null || theirs.len() != self.value_bytes() {
            return None;
        }
        let prime = self.prime_value();
        let value = BoxedUint::from_be_slice(theirs, prime.bits_precision()).ok()?;
        let one = BoxedUint::one_with_precision(prime.bits_precision());
        let most = prime.wrapping_sub(&one).wrapping_sub(&one);
        (value > one && value <= most).then(|| self.power(theirs, exponent))
    }

    fn power(self, base: &[u8], exponent: &Exponent) -> Zeroizing<Vec<u8>> {
        if self == Self::Null {
            return Zeroizing::default();
        }
        let prime = self.prime_value();
        let bits = prime.bits_precision();
        let base = BoxedUint::from_be_slice(base, bits).expect("as long as the prime");
        let used = exponent.get(..self.exponent_bytes()).expect("the longest fits");
        let exponent_bits = u32::try_from(used.len() * 8).expect("448 at most");
        let exponent = BoxedUint::from_be_slice(used, exponent_bits).expect("of that length");
        let exponent = Zeroizing::new(exponent);
        let prime = Odd::new(prime).expect("primes like these are odd");
        // The prime is no secret.
        let parameters = BoxedMontyParams::new_vartime(prime);
        let form = BoxedMontyForm::new(base, &parameters);
        let power = Zeroizing::new(form.pow_bounded_exp(&exponent, exponent_bits));
        let value = Zeroizing::new(power.retrieve());
        Zeroizing::new(value.to_be_bytes().into_vec())
    }
}

#[cfg(test)]
mod tests {
    use crypto_bigint::Resize;

    use super::*;

    fn groups() -> impl Iterator<Item = Group> {
        Group::ALL.into_iter().filter(|group| *group != Group::Null)
    }

    fn exponent(byte: u8) -> Exponent {
        Zeroizing::new([byte; EXPONENT_BYTES_MAX])
    }

    /// The fractional and whole part of e times two to the power of `bits`, by its series.
    fn e_scaled(bits: u32) -> BoxedUint {
        const GUARD: u32 = 64;
        let precision = bits + 2 * GUARD;
        let mut term = BoxedUint::one_with_precision(precision) << (bits + GUARD);
        let (zero, mut sum) = (BoxedUint::zero_with_precision(precision), term.clone());
        let mut divisor = 1_u64;
        while term != zero {
            let by = crypto_bigint::NonZero::new(crypto_bigint::Limb::from(divisor));
            term = term.div_rem_limb(by.expect("counted from 1")).0;
            sum = sum.wrapping_add(&term);
            divisor += 1;
        }
        sum >> GUARD
    }

    #[test]
    fn the_primes_are_those_of_the_formula() {
        // p = 2^b - 2^(b-64) + ([2^(b-130) e] + X) 2^64 - 1 (RFC 7919, appendix A)
        let constants = [560_316_u64, 2_625_351, 5_736_041, 15_705_020, 10_965_728];
        for (group, constant) in groups().zip(constants) {
            let prime = group.prime_value();
            let bits = prime.bits_precision();
            let one = BoxedUint::one_with_precision(bits);
            let e = e_scaled(bits - 130).resize(bits);
            let middle = e.wrapping_add(BoxedUint::from(constant).resize(bits)) << 64;
            // 2^b is nothing modulo 2^b.
            let high =
                BoxedUint::zero_with_precision(bits).wrapping_sub(&(one.clone() << (bits - 64)));
            assert_eq!(prime, high.wrapping_add(&middle).wrapping_sub(&one), "{group:?}");
            assert_eq!(group.value_bytes() * 8, usize::try_from(bits).expect("small"));
        }
    }

    #[test]
    fn powers_are_those_python_computes() {
        // hashlib.sha256(pow(2, x, p).to_bytes(n)), x being the group's first bytes of 0x5a...
        let digests = [
            "fb2f1168d1ff5095a0f4c58084e1c065e60be39e8bf79d18c1167220332513c2",
            "844298a9417e7fad518514f6efa81ef5f89e94453d4c3750c927024732db831f",
            "36ccbc00547ceb2041775cd26452ec0daf018abefb968929a588331f4a0aad9f",
            "53caa2d6a1a2ef432fb6a376aa10c21dd9cc4036711429cd6d1955e4784f4ff9",
            "9e932cacb437aa72d01caea28addb18438f5d4972c21067221f2e68650e9c45b",
        ];
        for (group, digest) in groups().zip(digests) {
            let public = group.public(&exponent(0x5a));
            let found = crate::target::hkdf::digest(crate::secret::Hash::Sha256, &public);
            let found: String = found.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(found, digest, "{group:?}");
        }
    }

    #[test]
    fn both_sides_come_to_the_same_value() {
        let (ours, theirs) = (exponent(0x5a), exponent(0xc3));
        for group in [Group::Ffdhe2048, Group::Ffdhe3072] {
            let (sent, received) = (group.public(&ours), group.public(&theirs));
            assert_eq!(group.shared(&received, &ours), group.shared(&sent, &theirs));
            assert_eq!(sent.len(), group.value_bytes());
        }
        assert!(Group::Null.public(&ours).is_empty());
        assert_eq!(Group::Null.shared(&[], &ours), None);
    }

    #[test]
    fn values_that_give_the_secret_away_are_refused() {
        for group in groups() {
            let prime = group.prime_value();
            let one = BoxedUint::one_with_precision(prime.bits_precision());
            let ours = exponent(0x5a);
            let shared = |value: &BoxedUint| group.shared(&value.to_be_bytes(), &ours);
            for bad in [
                &one.wrapping_sub(&one),
                &one,
                &prime.wrapping_sub(&one),
                &prime,
                &prime.wrapping_add(&one),
            ] {
                assert_eq!(shared(bad), None);
            }
            let bytes = group.value_bytes();
            for length in [0, 1, bytes - 1, bytes + 1] {
                assert_eq!(group.shared(&vec![2; length], &ours), None);
            }
        }
        let two = [&[0; 255][..], &[2]].concat();
        assert!(Group::Ffdhe2048.shared(&two, &exponent(1)).is_some());
    }
}

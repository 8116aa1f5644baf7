//! What DH-HMAC-CHAP computes: bound keys, augmented challenges, responses. Pure.
//! (NVMe Base 2.2, 8.3.4.5)

use zeroize::Zeroizing;

use crate::secret::DhchapKey;
use crate::secret::Hash;
use crate::target::hkdf::digest;
use crate::target::hkdf::hmac;

/// What a key is bound to besides a name.
const KEY_LABEL: &[u8] = b"NVMe-over-Fabrics";
/// What a host's response is bound to.
const HOST_LABEL: &[u8] = b"HostHost";
/// And a controller's, so that neither can be sent back as the other.
const CONTROLLER_LABEL: &[u8] = b"Controller";
/// No secure channel is set up with what was agreed.
const SECURE_CHANNEL: u8 = 0;

/// Which transaction a response is for.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// The hash agreed on.
    pub hash: Hash,
    /// The transaction's number.
    pub transaction: u16,
    /// The challenge's number.
    pub sequence: u32,
    /// The challenge, augmented if there is a group.
    pub challenge: &'a [u8],
    /// The host's name.
    pub host_nqn: &'a str,
    /// The subsystem's.
    pub subsystem_nqn: &'a str,
}

/// The challenge mixed with what the exchange of a group came to.
#[must_use]
pub fn augmented(hash: Hash, shared: &[u8], challenge: &[u8]) -> Zeroizing<Vec<u8>> {
    hmac(hash, &digest(hash, shared), &[challenge])
}

/// What a host that has the key answers to our challenge.
#[must_use]
pub fn host_response(key: &DhchapKey, asked: &Asked<'_>) -> Zeroizing<Vec<u8>> {
    response(key, asked, HOST_LABEL, asked.host_nqn, asked.subsystem_nqn)
}

/// What we answer to a host's challenge.
#[must_use]
pub fn controller_response(key: &DhchapKey, asked: &Asked<'_>) -> Zeroizing<Vec<u8>> {
    response(key, asked, CONTROLLER_LABEL, asked.subsystem_nqn, asked.host_nqn)
}

fn response(
    key: &DhchapKey,
    asked: &Asked<'_>,
    label: &[u8],
    from: &str,
    to: &str,
) -> Zeroizing<Vec<u8>> {
    let parts = [
        asked.challenge,
        &asked.sequence.to_le_bytes(),
        &asked.transaction.to_le_bytes(),
        &[SECURE_CHANNEL],
        label,
        from.as_bytes(),
        &[0],
        to.as_bytes(),
    ];
    hmac(asked.hash, &bound(key, from), &parts)
}

/// A key as it is used by whoever has that name.
fn bound(key: &DhchapKey, nqn: &str) -> Zeroizing<Vec<u8>> {
    match key.hash() {
        None => Zeroizing::new(key.bytes().to_vec()),
        Some(hash) => hmac(hash, key.bytes(), &[nqn.as_bytes(), KEY_LABEL]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The host's response and the controller's, by Python's hashlib and hmac from the specification:
    /// for each way to bind a key, each hash.
    const RESPONSES: [(&str, &str); 12] = [
        (
            "cc9d002ea3ab473bd14f0ebb0ecd5fd9c74618fae81965a5c9a46d57a7928701",
            "4d573b1ff2c7a14959585821c9df3507e6c9f58b63ca9a2931dfeed3589bb71f",
        ),
        (
            "8dc8c53b85a8e63aeee4b0f9e6a8d1b6c3d4a794bac7614acc78211ffeab3c30bac8601edfa5a4753e180bd006a2a1b9",
            "9a8862362181f277f437b59f5554378a8bd475f1928828496bf87349690978a5add9132dc4d4bbf83fb8d21a5032483d",
        ),
        (
            "7b780aa61698f6bbee7237e2c4129cc26eeed0a4064081d99c0cea3362aa07e89fde29243d4e8a4c5aa4e2ab6466081809fb52657de6d58af3b5d2e919281685",
            "021e14521be03542a8ff4d5d62f29a3de72faf097b8d952f9d6567dd928a596e4bdfa126b87127cb0b7c80fc51a2e088330b4e6b3750d05942649f9b53907f77",
        ),
        (
            "6c4f659d69e91f045f8d844c15ed9fc102fbe34628cd4ae53455cb6efcc9c43a",
            "d0c8f5ef93fabb361bca701fa0602f421929e666ba6fbb2980a2184c7c7ffc57",
        ),
        (
            "e792b3d51be8a774b0cecad85d349b03f2d3a010fc882b14e81f6c4ca7b74f238ed1701b9dee63de5a1a569560c978fc",
            "fb2fbc263817f547315ab0898e52baf1a24620b445709a221897a6e6ee781e61387657d8910ea7f06cbbd4125b2d4968",
        ),
        (
            "207b1e2f8de71c6179475c2b9c6a2b8326b0ea66f2f20bc0371b74d5e5ef7a75a58b324e0d53e51b5ef2efa3a70d605750f09b8aee87415583558d31e1461afb",
            "e05fc17337e805f3d9b2619fc49538fa28649920a14c5f0fabc46c153cd1213ff90df1de78f8926bc75543a5187f78e81b72e4d23f7ecb8e256e64a72705c31c",
        ),
        (
            "20d830bea933cbc24c2d11c0856a63548b9c53f360b539eef198191725a97af6",
            "1e449e817828628ba50b2f135ee07dc82c34ccdb247b59121ede67c6123d2fc6",
        ),
        (
            "6dd405f6a97aa30724517063d7fbe08297ae9790def642093d65e42176da708ff3cc40f3da45fc5d40dfd124fb2ddb34",
            "b6cdc761009eb94b79660d81eddab6b6989edc098bceb589c6937bc5223692d67cfbf1e4ba0c63210ef1b412ee00e36d",
        ),
        (
            "2d6729cc8dbbaf38e2fc34bfbb85623a32b773f1c15d99153640df7c68e6572a4cdca557496807c4e37e0733e3716fb95f160cac707e3d2bbe80e1d2f36c7fe8",
            "8d58b02ee8d2f72fb0c78eb6b3fbe7b292ccd17c9f488053fd0ee2b824b66c399d2dd884fda6917b759a4137b6ce6f1f723d52a7d41919e204532bbb68366db5",
        ),
        (
            "8dfa6269f00edcd2ec4ce5788e35cfc7485c2dc959fd394c4c805da795e5200f",
            "df12fe6d5818b694be14369402f10e3131e20fac7dd71c66c44f35e6b8d6cec0",
        ),
        (
            "52b153b4e203643572ec1355420aa6caf1681dee5e429309c5c5cc52f88158d53a58d1cc5e9b786a53155038baece441",
            "9010989c5102dab7edf3b7ce370d14fa1b0e6d53a4a9647177db35facf22f9d63e4f7c16581aaef310ec37c4fff78a0f",
        ),
        (
            "86fe86621cf0ecb51465ace6c2b349570e7cc627f0daf57a87fccc0beae33f94a4e2cf254a0d148178d7f848026a48819490871b9164feb21e5a5ac0ddc7df87",
            "31454bb1e2a6874e782540775cb626b67cf70add5ae9ffd2f93f9300bfa76596dd1cd9197c8e37db6e8a05dfda5035fbd19fa7bed7b5eec77795aeb903418082",
        ),
    ];

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn responses_are_those_python_computes() {
        let hashes = [None, Some(Hash::Sha256), Some(Hash::Sha384), Some(Hash::Sha512)];
        let mut random = [0; 64];
        (0..).zip(&mut random).for_each(|(number, byte)| *byte = number);
        let mut rows = RESPONSES.into_iter();
        for bound_by in hashes {
            for hash in Hash::ALL {
                let key = DhchapKey::from_random(bound_by, &random);
                let challenge: Vec<u8> = (100..).take(hash.bytes()).collect();
                let challenge = augmented(hash, b"shared", &challenge);
                let asked = Asked {
                    hash,
                    transaction: 0x1234,
                    sequence: 0x0102_0304,
                    challenge: &challenge,
                    host_nqn: "nqn.host",
                    subsystem_nqn: "nqn.subsystem",
                };
                let (host, controller) = rows.next().expect("a row for each");
                assert_eq!(hex(&host_response(&key, &asked)), host, "{bound_by:?} {hash:?}");
                assert_eq!(hex(&controller_response(&key, &asked)), controller);
            }
        }
    }
}

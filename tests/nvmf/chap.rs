//! The host's side of DH-HMAC-CHAP, written from the specification and with other libraries for what
//! is hard: ring's HMAC and num-bigint's powers.

use num_bigint::BigUint;
use ring::digest;
use ring::hmac;

use super::host::HOST_NQN;
use super::host::Host;
use super::host::sqe;

/// The label of a host's response, and a controller's.
pub const HOST: &[u8] = b"HostHost";
pub const CONTROLLER: &[u8] = b"Controller";

/// Hash functions by number.
pub fn hmac(hash: u8, key: &[u8], message: &[u8]) -> Vec<u8> {
    let algorithm = match hash {
        1 => hmac::HMAC_SHA256,
        2 => hmac::HMAC_SHA384,
        _ => hmac::HMAC_SHA512,
    };
    hmac::sign(&hmac::Key::new(algorithm, key), message).as_ref().to_vec()
}

fn digest(hash: u8, bytes: &[u8]) -> Vec<u8> {
    let algorithm = match hash {
        1 => &digest::SHA256,
        2 => &digest::SHA384,
        _ => &digest::SHA512,
    };
    digest::digest(algorithm, bytes).as_ref().to_vec()
}

/// The prime of a group, by the formula of RFC 7919 with e from its series; bits by number.
pub fn prime(group: u8) -> BigUint {
    let (bits, constant) = match group {
        1 => (2048_u32, 560_316_u32),
        2 => (3072, 2_625_351),
        3 => (4096, 5_736_041),
        4 => (6144, 15_705_020),
        _ => (8192, 10_965_728),
    };
    let mut term = BigUint::from(1_u8) << (bits - 130 + 64);
    let (mut e, mut divisor) = (term.clone(), 1_u32);
    while term != BigUint::ZERO {
        term /= divisor;
        e += &term;
        divisor += 1;
    }
    let two = |power: u32| BigUint::from(1_u8) << power;
    two(bits) - two(bits - 64) + (((e >> 64) + constant) << 64) - 1_u8
}

/// Big endian, with leading zeroes.
pub fn padded(value: &BigUint, bytes: usize) -> Vec<u8> {
    let digits = value.to_bytes_be();
    [vec![0; bytes - digits.len()], digits].concat()
}

/// What the host knows of itself.
pub struct Secrets {
    /// As written in the key.
    pub key: Vec<u8>,
    /// The number of the hash that binds it; 0: none.
    pub key_hash: u8,
    /// The controller's; likewise.
    pub ctrl_key: Option<(Vec<u8>, u8)>,
    pub subsystem_nqn: String,
}

/// A key as it is used by whoever has that name.
pub fn bound(key: &[u8], hash: u8, nqn: &str) -> Vec<u8> {
    match hash {
        0 => key.to_vec(),
        hash => hmac(hash, key, &[nqn.as_bytes(), b"NVMe-over-Fabrics"].concat()),
    }
}

pub fn negotiate(id: u16, hashes: &[u8], groups: &[u8]) -> Vec<u8> {
    let mut message = vec![0; 72];
    message[4..6].copy_from_slice(&id.to_le_bytes());
    message[7] = 1;
    message[8] = 1;
    message[10] = u8::try_from(hashes.len()).unwrap();
    message[11] = u8::try_from(groups.len()).unwrap();
    message[12..12 + hashes.len()].copy_from_slice(hashes);
    message[42..42 + groups.len()].copy_from_slice(groups);
    message
}

pub fn success2(id: u16) -> Vec<u8> {
    let [low, high] = id.to_le_bytes();
    [&[1, 4, 0, 0, low, high][..], &[0; 10]].concat()
}

/// A challenge from the target.
pub struct Challenge {
    pub id: u16,
    pub hash: u8,
    pub group: u8,
    pub sequence: [u8; 4],
    pub challenge: Vec<u8>,
    pub value: Vec<u8>,
}

impl Challenge {
    pub fn read(message: &[u8]) -> Self {
        assert_eq!(message[..2], [1, 1], "not a challenge: {:?}", &message[..16]);
        let bytes = usize::from(message[6]);
        let value = usize::from(u16::from_le_bytes([message[10], message[11]]));
        let rest = &message[16 + bytes + value..];
        assert!(rest.iter().all(|byte| *byte == 0), "padding");
        assert_eq!(bytes, [32, 48, 64][usize::from(message[8]) - 1]);
        assert_eq!(value, [0, 256, 384, 512, 768, 1024][usize::from(message[9])]);
        assert_ne!(message[12..16], [0; 4], "a sequence number of 0");
        Self {
            id: u16::from_le_bytes([message[4], message[5]]),
            hash: message[8],
            group: message[9],
            sequence: message[12..16].try_into().unwrap(),
            challenge: message[16..16 + bytes].to_vec(),
            value: message[16 + bytes..16 + bytes + value].to_vec(),
        }
    }
}

/// What a host answers, before it is written down; tests change what they like.
pub struct Answer {
    pub id: u16,
    pub response: Vec<u8>,
    /// Whether it asks for a response, by this challenge.
    pub asks: bool,
    pub sequence: [u8; 4],
    pub challenge: Vec<u8>,
    pub value: Vec<u8>,
    /// What the target has to answer.
    pub expected: Vec<u8>,
}

impl Answer {
    /// The right answer.
    pub fn new(secrets: &Secrets, to: &Challenge) -> Self {
        let shared = (to.group != 0).then(|| {
            let prime = prime(to.group);
            let exponent = BigUint::from_bytes_be(&[0x5a; 40]);
            let theirs = BigUint::from_bytes_be(&to.value);
            let bytes = to.value.len();
            let ours = padded(&BigUint::from(2_u8).modpow(&exponent, &prime), bytes);
            (ours, padded(&theirs.modpow(&exponent, &prime), bytes))
        });
        let augmented = |challenge: &[u8]| match &shared {
            Some((_, shared)) => hmac(to.hash, &digest(to.hash, shared), challenge),
            None => challenge.to_vec(),
        };
        let respond = |key: &[u8], challenge: &[u8], sequence, label, from: &str, other: &str| {
            let id = to.id.to_le_bytes();
            let parts: [&[u8]; 8] = [
                &augmented(challenge),
                sequence,
                &id,
                &[0],
                label,
                from.as_bytes(),
                &[0],
                other.as_bytes(),
            ];
            hmac(to.hash, key, &parts.concat())
        };
        let nqn = &secrets.subsystem_nqn;
        let key = bound(&secrets.key, secrets.key_hash, HOST_NQN);
        let (sequence, challenge) = ([9, 8, 7, 6], vec![0xc2; to.challenge.len()]);
        let expected = match &secrets.ctrl_key {
            None => Vec::new(),
            Some((key, hash)) => {
                let key = bound(key, *hash, nqn);
                respond(&key, &challenge, &sequence, CONTROLLER, nqn, HOST_NQN)
            }
        };
        Self {
            id: to.id,
            response: respond(&key, &to.challenge, &to.sequence, HOST, HOST_NQN, nqn),
            asks: secrets.ctrl_key.is_some(),
            sequence,
            challenge,
            value: shared.map(|(ours, _)| ours).unwrap_or_default(),
            expected,
        }
    }

    pub fn message(&self) -> Vec<u8> {
        let bytes = u8::try_from(self.response.len()).unwrap();
        let mut message = vec![1, 2, 0, 0];
        message.extend(self.id.to_le_bytes());
        message.extend([bytes, 0, u8::from(self.asks), 0]);
        message.extend(u16::try_from(self.value.len()).unwrap().to_le_bytes());
        message.extend(if self.asks { self.sequence } else { [0; 4] });
        message.extend(&self.response);
        message.extend(if self.asks { self.challenge.clone() } else { vec![0; bytes.into()] });
        message.extend(&self.value);
        message
    }
}

impl Host {
    /// The command alone: 5 sends, 6 receives.
    pub fn authentication(kind: u8, cid: u16, bytes: u32) -> Vec<u8> {
        let sgl = if kind == 5 { 0x01 } else { 0x5a };
        let mut sqe = sqe(0x7f, cid, 0, &[0xe901_0100, bytes], sgl, bytes);
        sqe[4] = kind;
        sqe
    }

    pub async fn auth_send(&mut self, message: &[u8]) {
        let bytes = u32::try_from(message.len()).unwrap();
        self.command(&Self::authentication(5, 0xa5, bytes), message).await;
        self.success(0xa5).await;
    }

    pub async fn auth_receive(&mut self) -> Vec<u8> {
        self.command(&Self::authentication(6, 0xa6, 4096), &[]).await;
        let message = self.data(0xa6).await;
        assert_eq!(message.len(), 4096);
        message
    }

    /// Steps 1 and 2.
    pub async fn challenged(&mut self, id: u16, hash: u8, group: u8) -> Challenge {
        self.auth_send(&negotiate(id, &[hash], &[group])).await;
        let challenge = Challenge::read(&self.auth_receive().await);
        assert_eq!((challenge.id, challenge.hash, challenge.group), (id, hash, group));
        challenge
    }

    /// All steps, with the right answers.
    pub async fn authenticate(&mut self, secrets: &Secrets, hash: u8, group: u8) {
        let challenge = self.challenged(7, hash, group).await;
        let answer = Answer::new(secrets, &challenge);
        self.auth_send(&answer.message()).await;
        let success = self.auth_receive().await;
        assert_eq!(success[..6], [1, 3, 0, 0, 7, 0]);
        assert_eq!(usize::from(success[6]), challenge.challenge.len());
        assert_eq!(success[8], u8::from(answer.asks));
        if answer.asks {
            assert_eq!(success[16..16 + answer.expected.len()], answer.expected);
            self.auth_send(&success2(7)).await;
        }
    }

    /// The failure that is to be fetched, and the end of the connection.
    pub async fn refused(&mut self, id: u16, explanation: u8) {
        let message = self.auth_receive().await;
        let [low, high] = id.to_le_bytes();
        assert_eq!(message[..8], [0, 0xf1, 0, 0, low, high, 1, explanation]);
        assert!(self.closed().await);
    }
}

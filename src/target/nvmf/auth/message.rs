//! Messages of an authentication: bytes to types and back. Pure. (NVMe Base 2.2, 8.3.4.5)
//!
//! Every message begins with its type, its identifier, two reserved bytes and the number of its
//! transaction. What follows a message's last field is padding.

use zeroize::Zeroizing;

use crate::secret::Hash;
use crate::target::nvmf::auth::groups::Group;

/// Bytes a message or its buffer may have: what fits in a capsule on every queue, and three times
/// the longest message.
pub const MESSAGE_BYTES_MAX: u32 = 8192;

/// Types of messages.
const COMMON: u8 = 0x00;
const DHCHAP: u8 = 0x01;
/// Identifiers of common messages.
const NEGOTIATE: u8 = 0x00;
const FAILURE2: u8 = 0xf0;
const FAILURE1: u8 = 0xf1;
/// Identifiers of messages of DH-HMAC-CHAP.
const CHALLENGE: u8 = 0x01;
const REPLY: u8 = 0x02;
const SUCCESS1: u8 = 0x03;
const SUCCESS2: u8 = 0x04;

/// The only reason code there is for failures; the explanation says more.
const REASON_FAILED: u8 = 1;
/// DH-HMAC-CHAP among authentication protocols.
const PROTOCOL_DHCHAP: u8 = 1;
/// Where the offers begin, and how many bytes each has.
const OFFERS_AT: usize = 8;
const OFFER_BYTES: usize = 64;
/// Most hashes and groups in an offer.
const OFFERED_MAX: usize = 30;

/// Why an authentication fails, as the other side is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Explanation {
    /// The response is wrong, or there is no key to check it with.
    Failed,
    /// No protocol that we know is offered.
    ProtocolUnusable,
    /// A secure channel is asked for.
    SecureChannelMismatch,
    /// No hash in common.
    HashUnusable,
    /// No group in common, or a value that no honest side sends.
    GroupUnusable,
    /// A field is wrong.
    PayloadIncorrect,
    /// The message is not the one to come.
    MessageIncorrect,
}

impl Explanation {
    fn code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::ProtocolUnusable => 2,
            Self::SecureChannelMismatch => 3,
            Self::HashUnusable => 4,
            Self::GroupUnusable => 5,
            Self::PayloadIncorrect => 6,
            Self::MessageIncorrect => 7,
        }
    }

    /// For people.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::Failed => "its response is wrong, or it asks for a key that is not set",
            Self::ProtocolUnusable => "it offers no DH-HMAC-CHAP",
            Self::SecureChannelMismatch => "it asks for a secure channel, which there is not",
            Self::HashUnusable => "it offers no hash that may be used",
            Self::GroupUnusable => "it offers no group that may be used, or sent a bad value",
            Self::PayloadIncorrect => "a field of its message is wrong",
            Self::MessageIncorrect => "it sent a message that was not to come",
        }
    }
}

/// What a host sends.
#[derive(Debug)]
pub enum FromHost {
    /// The beginning: what it can do.
    Negotiate(Offer),
    /// Its answer to our challenge.
    Reply(Reply),
    /// It has seen our response and is content.
    Success2,
    /// It is not, for the reason of this code.
    Failure2(u8),
}

/// What hosts can do, of what we know, or why that is not enough.
pub type Offer = Result<Offered, Explanation>;

/// Hashes and groups a host offers, of those we know.
#[derive(Debug, PartialEq, Eq)]
pub struct Offered {
    /// In its order.
    pub hashes: Vec<Hash>,
    /// In its order.
    pub groups: Vec<Group>,
}

/// An answer to a challenge.
#[derive(Debug)]
pub struct Reply {
    /// The response.
    pub response: Vec<u8>,
    /// What we are to answer, if we are to prove something too.
    pub challenge: Option<(u32, Vec<u8>)>,
    /// The host's value in the exchange; empty if there is no group.
    pub value: Vec<u8>,
}

/// A message from a host, whose transaction it says it belongs to.
#[derive(Debug)]
pub struct Received {
    /// The transaction; 0 if the message is too short to say.
    pub transaction: u16,
    /// The message, or why it is none.
    pub message: Result<FromHost, Explanation>,
}

/// Reads a message. Anything may be in it.
#[must_use]
pub fn decode(bytes: &[u8]) -> Received {
    let fields = Fields(bytes);
    Received {
        transaction: fields.u16(4).unwrap_or_default(),
        message: fields.message().unwrap_or(Err(Explanation::PayloadIncorrect)),
    }
}

/// A message's bytes; `None` beyond its end.
#[derive(Clone, Copy)]
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(self, at: usize, length: usize) -> Option<&'a [u8]> {
        self.0.get(at..)?.get(..length)
    }

    fn u8(self, at: usize) -> Option<u8> {
        self.0.get(at).copied()
    }

    fn u16(self, at: usize) -> Option<u16> {
        Some(u16::from_le_bytes(self.bytes(at, 2)?.try_into().ok()?))
    }

    fn u32(self, at: usize) -> Option<u32> {
        Some(u32::from_le_bytes(self.bytes(at, 4)?.try_into().ok()?))
    }

    fn message(self) -> Option<Result<FromHost, Explanation>> {
        Some(Ok(match (self.u8(0)?, self.u8(1)?) {
            (COMMON, NEGOTIATE) => FromHost::Negotiate(self.offer()?),
            (COMMON, FAILURE2) => FromHost::Failure2(self.u8(7)?),
            (DHCHAP, REPLY) => FromHost::Reply(self.reply()?),
            (DHCHAP, SUCCESS2) => {
                self.bytes(0, 16)?;
                FromHost::Success2
            }
            _ => return Some(Err(Explanation::MessageIncorrect)),
        }))
    }

    fn offer(self) -> Option<Offer> {
        if self.u8(6)? != 0 {
            return Some(Err(Explanation::SecureChannelMismatch));
        }
        let count = usize::from(self.u8(7)?);
        for index in 0..count {
            let offer = Fields(self.bytes(OFFERS_AT + index * OFFER_BYTES, OFFER_BYTES)?);
            if offer.u8(0)? == PROTOCOL_DHCHAP {
                let (hashes, groups) = (usize::from(offer.u8(2)?), usize::from(offer.u8(3)?));
                if hashes > OFFERED_MAX || groups > OFFERED_MAX {
                    return None;
                }
                let hashes = offer.bytes(4, hashes)?.iter();
                let groups = offer.bytes(4 + OFFERED_MAX, groups)?.iter();
                let group = |id: &u8| Group::ALL.into_iter().find(|group| group.id() == *id);
                return Some(Ok(Offered {
                    hashes: hashes.filter_map(|id| Hash::from_id(*id)).collect(),
                    groups: groups.filter_map(group).collect(),
                }));
            }
        }
        Some(Err(Explanation::ProtocolUnusable))
    }

    fn reply(self) -> Option<Reply> {
        let hash_bytes = usize::from(self.u8(6)?);
        let asks = self.u8(8)? & 1 != 0;
        let value_bytes = usize::from(self.u16(10)?);
        let sequence = self.u32(12)?;
        let challenge = self.bytes(16 + hash_bytes, hash_bytes)?;
        // A challenge without a number is for a secure channel, which was not agreed on.
        if asks && sequence == 0 {
            return None;
        }
        Some(Reply {
            response: self.bytes(16, hash_bytes)?.to_vec(),
            challenge: asks.then(|| (sequence, challenge.to_vec())),
            value: self.bytes(16 + 2 * hash_bytes, value_bytes)?.to_vec(),
        })
    }
}

/// What is to be proven, as a host is told.
#[derive(Debug)]
pub struct Challenge<'a> {
    /// The hash chosen.
    pub hash: Hash,
    /// The group chosen.
    pub group: Group,
    /// The challenge's number; not 0.
    pub sequence: u32,
    /// Random, as long as a digest.
    pub challenge: &'a [u8],
    /// Our value in the exchange; empty if there is no group.
    pub value: &'a [u8],
}

impl Challenge<'_> {
    /// The message's bytes.
    #[must_use]
    pub fn encode(&self, transaction: u16) -> Vec<u8> {
        let mut message = header(DHCHAP, CHALLENGE, transaction);
        let value_bytes = u16::try_from(self.value.len()).expect("1024 at most");
        message.extend([hash_bytes(self.hash), 0, self.hash.id(), self.group.id()]);
        message.extend(value_bytes.to_le_bytes());
        message.extend(self.sequence.to_le_bytes());
        message.extend(self.challenge);
        message.extend(self.value);
        message
    }
}

/// The host has proven that it has its key; the response proves that we have ours.
#[must_use]
pub fn success1(transaction: u16, hash: Hash, response: Option<&Zeroizing<Vec<u8>>>) -> Vec<u8> {
    let mut message = header(DHCHAP, SUCCESS1, transaction);
    message.extend([hash_bytes(hash), 0, u8::from(response.is_some())]);
    message.resize(16, 0);
    match response {
        Some(response) => message.extend_from_slice(response),
        None => message.resize(16 + hash.bytes(), 0),
    }
    message
}

/// It has not, or something is wrong with its messages.
#[must_use]
pub fn failure1(transaction: u16, explanation: Explanation) -> Vec<u8> {
    let mut message = header(COMMON, FAILURE1, transaction);
    message.extend([REASON_FAILED, explanation.code()]);
    message.resize(16, 0);
    message
}

fn header(kind: u8, id: u8, transaction: u16) -> Vec<u8> {
    let [low, high] = transaction.to_le_bytes();
    vec![kind, id, 0, 0, low, high]
}

fn hash_bytes(hash: Hash) -> u8 {
    u8::try_from(hash.bytes()).expect("64 at most")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As Linux sends it.
    fn negotiate() -> Vec<u8> {
        let mut message = vec![0, 0, 0, 0, 0x34, 0x12, 0, 1, 1, 0, 3, 6];
        message.extend([1, 2, 3]);
        message.resize(12 + 30, 0);
        message.extend([0, 1, 2, 3, 4, 5]);
        message.resize(8 + 64, 0);
        message
    }

    fn offer(bytes: &[u8]) -> Offer {
        match decode(bytes).message? {
            FromHost::Negotiate(offer) => offer,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn offers_are_found_among_others_and_checked() {
        let good = negotiate();
        assert_eq!(decode(&good).transaction, 0x1234);
        let offered = Offered { hashes: Hash::ALL.to_vec(), groups: Group::ALL.to_vec() };
        assert_eq!(offer(&good), Ok(offered));
        assert_eq!(offer(&good[..71]), Err(Explanation::PayloadIncorrect));
        let changed = |at: usize, value: u8| {
            let mut message = good.clone();
            message[at] = value;
            offer(&message)
        };
        assert_eq!(changed(6, 1), Err(Explanation::SecureChannelMismatch));
        assert_eq!(changed(7, 0), Err(Explanation::ProtocolUnusable));
        assert_eq!(changed(8, 2), Err(Explanation::ProtocolUnusable));
        assert_eq!(changed(10, 31), Err(Explanation::PayloadIncorrect));
        assert_eq!(changed(11, 31), Err(Explanation::PayloadIncorrect));
        assert_eq!(changed(12, 9).expect("an offer").hashes, [Hash::Sha384, Hash::Sha512]);
        let mut second = negotiate();
        second[7] = 2;
        second[8] = 0xaa;
        second.extend(&good[8..]);
        assert_eq!(offer(&second).expect("an offer").groups.len(), 6);
    }

    #[test]
    fn replies_are_taken_apart() {
        let mut message = vec![1, 2, 0, 0, 7, 0, 2, 0, 1, 0, 3, 0, 9, 0, 0, 0];
        message.extend([10, 11, 20, 21, 30, 31, 32, 0xee]);
        let reply = |bytes: &[u8]| match decode(bytes).message {
            Ok(FromHost::Reply(reply)) => Some(reply),
            Ok(other) => panic!("{other:?}"),
            Err(explanation) => {
                assert_eq!(explanation, Explanation::PayloadIncorrect);
                None
            }
        };
        let found = reply(&message).expect("a reply");
        assert_eq!(found.response, [10, 11]);
        assert_eq!(found.challenge, Some((9, vec![20, 21])));
        assert_eq!(found.value, [30, 31, 32]);
        assert!(reply(&message[..22]).is_none(), "cut in the value");
        message[12] = 0;
        assert!(reply(&message).is_none(), "a challenge without a number");
        message[8] = 0;
        assert_eq!(reply(&message).expect("a reply").challenge, None);
    }

    #[test]
    fn messages_to_hosts_have_their_fields_where_the_specification_says() {
        let challenge = [7; 48];
        let message = Challenge {
            hash: Hash::Sha384,
            group: Group::Ffdhe3072,
            sequence: 0x0403_0201,
            challenge: &challenge,
            value: &[8; 384],
        };
        let bytes = message.encode(0x1234);
        assert_eq!(bytes[..16], [1, 1, 0, 0, 0x34, 0x12, 48, 0, 2, 2, 0x80, 1, 1, 2, 3, 4]);
        assert_eq!((bytes.len(), bytes[63], bytes[64]), (16 + 48 + 384, 7, 8));
        let response = Zeroizing::new(vec![9; 32]);
        let bytes = success1(0x1234, Hash::Sha256, Some(&response));
        assert_eq!(bytes[..16], [1, 3, 0, 0, 0x34, 0x12, 32, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!((bytes.len(), bytes[16]), (48, 9));
        assert_eq!(success1(1, Hash::Sha256, None)[8], 0);
        let bytes = failure1(0x1234, Explanation::HashUnusable);
        assert_eq!(bytes[..8], [0, 0xf1, 0, 0, 0x34, 0x12, 1, 4]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_are_not(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
            kind in 0_u8..2,
            id in prop::sample::select(vec![0_u8, 2, 4, 0xf0]),
        ) {
            let _: Received = decode(&bytes);
            let mut likely = bytes;
            if let [first, second, ..] = likely.as_mut_slice() {
                (*first, *second) = (kind, id);
            }
            if let Ok(FromHost::Reply(reply)) = decode(&likely).message {
                prop_assert!(reply.response.len() + reply.value.len() <= likely.len());
            }
        }
    }
}

//! What the fuzzer of authentication runs, shared by `tests/fuzz_auth.rs` and the libFuzzer target
//! beside it.
//!
//! The driver takes arbitrary bytes for what a host without the key sends and asks for, and judges
//! that it is never let in and always answered with messages as long as asked for. It panics on any
//! violation.

use weft::secret::DhchapKey;
use weft::secret::Hash;
use weft::secret::HostKeys;
use weft::target::nvmf::auth::Authentication;
use weft::target::nvmf::auth::Exponentiation;
use weft::target::nvmf::auth::Names;
use weft::target::nvmf::auth::Next;
use weft::target::nvmf::auth::Policy;
use weft::target::nvmf::auth::Step;
use weft::target::nvmf::auth::groups::Group;
use weft::target::nvmf::status::Status;

/// What a host does next.
pub mod action {
    /// Sends so many of the bytes that follow.
    pub const SEND: u8 = 0;
    /// Asks for a message, with room for so many times 32 bytes.
    pub const RECEIVE: u8 = 1;
    /// What is being computed comes to nothing.
    pub const NO_POWER: u8 = 2;
}

/// Plays actions: each is a byte that says what, one for how much, and its bytes. The input's first
/// byte says whether the host has keys.
pub fn authentication(input: &[u8]) {
    let Some(([has_keys], mut rest)) = input.split_first_chunk::<1>() else { return };
    let names = Names { host_nqn: "nqn.host".into(), subsystem_nqn: "nqn.subsystem".into() };
    let key = DhchapKey::from_random(Some(Hash::Sha384), &[7; 64]);
    let keys = HostKeys { ctrl_key: Some(key.clone()), key };
    let keys = Some(keys).filter(|_| has_keys % 4 != 0);
    let policy = Policy { hashes: Hash::ALL.to_vec(), groups: vec![Group::Null, Group::Ffdhe2048] };
    let mut host = Authentication::new(names, true);
    let mut computing: Option<(Exponentiation, u32)> = None;
    while let Some(([what, amount], after)) = rest.split_first_chunk::<2>() {
        let bytes = after.get(..usize::from(*amount)).unwrap_or(after);
        let room = u32::from(*amount) * 32;
        let next = match *what {
            action::NO_POWER if computing.is_some() => {
                computing = None;
                rest = after;
                judge(&Next::Now(host.computed(None, room)), room);
                continue;
            }
            action::RECEIVE => {
                rest = after;
                host.receive(room)
            }
            _ => {
                rest = &after[bytes.len()..];
                host.send(bytes, keys.clone(), &policy)
            }
        };
        match next {
            Ok(Next::Compute(power)) => {
                assert!(computing.is_none(), "two at once");
                computing = Some((power, room));
            }
            Ok(next) => judge(&next, room),
            Err(status) => {
                assert!(matches!(status, Status::SEQUENCE_ERROR | Status::INVALID_FIELD));
            }
        }
        assert!(!host.granted(), "let in without the key");
    }
}

fn judge(next: &Next, room: u32) {
    if let Next::Now(Step::Message(message)) = next {
        assert_eq!(message.len(), usize::try_from(room).unwrap());
        assert!(matches!(message[..2], [1, 1] | [0, 0xf1]), "{:?}", &message[..2]);
    }
}

//! DH-HMAC-CHAP: a host proves that it has its key, and may ask for a proof that we have ours,
//! before its queue serves anything. (NVMe Base 2.2, 8.3.4.5)
//!
//! ```text
//! host                                     here
//! Send    Negotiate ---------------------> choose hash and group
//! Receive <------------------------ Challenge with our value of the exchange
//! Send    Reply -------------------------> compute the shared value, compare the response
//! Receive <------------ Success1, or Failure1
//! Send    Success2 (if it asked for ours)
//! ```
//!
//! [`Authentication`] decides; it never waits. What takes long, two exponentiations per transaction,
//! it hands out as an [`Exponentiation`], to be run elsewhere and brought back.
//!
//! | file | owns |
//! |---|---|
//! | [`message`] | messages: bytes to types and back |
//! | [`crypto`] | hashes and responses |
//! | [`groups`] | Diffie-Hellman |
//! | [`elsewhere`] | where exponentiations run |
//!
//! # Invariants
//! * Challenges and exponents are of the operating system's randomness and used once.
//! * A transaction uses the keys that were set when it began.
//! * After a failure nothing is served; once the host has fetched it, the connection ends.

use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::rand::GetRandomFlags;
use rustix::rand::getrandom;
use subtle::ConstantTimeEq;
use tokio::time::Instant;
use zeroize::Zeroizing;

use crate::secret::Hash;
use crate::secret::HostKeys;
use crate::target::nvmf::auth::crypto::Asked;
use crate::target::nvmf::auth::groups::EXPONENT_BYTES_MAX;
use crate::target::nvmf::auth::groups::Exponent;
use crate::target::nvmf::auth::groups::Group;
use crate::target::nvmf::auth::message::Challenge;
use crate::target::nvmf::auth::message::Explanation;
use crate::target::nvmf::auth::message::FromHost;
use crate::target::nvmf::auth::message::MESSAGE_BYTES_MAX;
use crate::target::nvmf::auth::message::Offered;
use crate::target::nvmf::auth::message::Reply;
use crate::target::nvmf::controller::Identity;
use crate::target::nvmf::status::Status;
use crate::target::nvmf::subsystem::Subsystem;
use crate::target::nvmf::wire::Sqe;

pub mod crypto;
pub mod elsewhere;
pub mod groups;
pub mod message;

/// Time from Negotiate to the end of a transaction; what comes later belongs to none.
const TRANSACTION_TIME_MAX: Duration = Duration::from_secs(60);
/// The security protocol in the commands, and its two parameters. (NVMe Base 2.2, 6.2 and 6.3)
const SECURITY_PROTOCOL: u8 = 0xe9;
const SECURITY_SPECIFIC: u8 = 1;

/// Which hashes and groups may be used. Of those a host offers, the first here is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Hashes, at least one.
    pub hashes: Vec<Hash>,
    /// Groups, at least one.
    pub groups: Vec<Group>,
}

impl Default for Policy {
    /// Everything: the strongest hash first, and the group of 3072 bits, which is as hard to break
    /// as AES-128. Larger ones cost up to 16 times as much, on each queue of each host, which after
    /// a restart come all at once.
    fn default() -> Self {
        Self {
            hashes: vec![Hash::Sha512, Hash::Sha384, Hash::Sha256],
            groups: vec![
                Group::Ffdhe3072,
                Group::Ffdhe4096,
                Group::Ffdhe6144,
                Group::Ffdhe8192,
                Group::Ffdhe2048,
                Group::Null,
            ],
        }
    }
}

/// Counts a failure and tells the operator.
pub fn report(subsystem: &Subsystem, host: &Identity, from: IpAddr, step: &Step) {
    let nqn = &host.host_nqn;
    let raise = |message: fmt::Arguments<'_>| subsystem.authentication_failed(message);
    match step {
        Step::Failed(explanation) => {
            raise(format_args!("{nqn} from {from}: {}", explanation.text()));
        }
        Step::GivenUp(code) => {
            raise(format_args!("{nqn} from {from} does not take our response (reason {code})"));
        }
        Step::Done | Step::Message(_) => {}
    }
}

/// Bytes that an Authentication Send or Receive moves, or why it cannot be executed.
pub fn transfer_bytes(sqe: &Sqe) -> Result<u32, Status> {
    let bytes = sqe.u32(44);
    let ours = sqe.u8(43) == SECURITY_PROTOCOL
        && sqe.u8(41) == SECURITY_SPECIFIC
        && sqe.u8(42) == SECURITY_SPECIFIC;
    if ours && (1..=MESSAGE_BYTES_MAX).contains(&bytes) {
        Ok(bytes)
    } else {
        Err(Status::INVALID_FIELD)
    }
}

/// The names both sides' responses are bound to.
#[derive(Clone, Debug)]
pub struct Names {
    /// The host's.
    pub host_nqn: String,
    /// The subsystem's.
    pub subsystem_nqn: String,
}

/// How far a queue's authentication is.
pub struct Authentication {
    names: Names,
    /// Whether commands are served.
    granted: bool,
    state: State,
    /// When the transaction began.
    since: Instant,
}

/// What a command led to.
#[derive(Debug)]
pub enum Next {
    /// It is complete.
    Now(Step),
    /// It is once this has been computed and given to [`Authentication::computed`].
    Compute(Exponentiation),
}

/// How a command is completed: always as a success, since failures are messages.
#[derive(Debug)]
pub enum Step {
    /// Without data.
    Done,
    /// With this message for the host.
    Message(Vec<u8>),
    /// Without data; the transaction failed, and the host will fetch why.
    Failed(Explanation),
    /// Without data; the host gave up, for the reason of this code.
    GivenUp(u8),
}

enum State {
    /// No transaction.
    Idle,
    /// We owe a challenge.
    Negotiated(Transaction),
    /// Our value of the exchange is being computed.
    Challenging(Transaction, Exponent),
    /// The host owes a reply.
    Challenged(Transaction, Sent),
    /// The shared value is being computed.
    Checking(Transaction, Sent, Reply),
    /// We owe Success1, with our response if the host asked for it.
    Proven(Transaction, Option<Zeroizing<Vec<u8>>>),
    /// The host owes Success2.
    Answered(Transaction),
    /// We owe Failure1.
    Failed(u16, Explanation),
    /// The host knows, or has told us. The connection is to end.
    Over,
}

/// What was agreed.
struct Transaction {
    id: u16,
    hash: Hash,
    group: Group,
    keys: HostKeys,
}

/// Our challenge.
struct Sent {
    sequence: u32,
    challenge: Vec<u8>,
    exponent: Exponent,
}

/// A power to compute, which takes milliseconds.
pub struct Exponentiation {
    group: Group,
    exponent: Exponent,
    /// The host's value; `None`: the generator.
    base: Option<Vec<u8>>,
}

impl fmt::Debug for Exponentiation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Exponentiation({:?})", self.group)
    }
}

/// What it came to; `None` if the host's value is one that no honest host sends.
pub type Power = Option<Zeroizing<Vec<u8>>>;

impl Exponentiation {
    /// Computes it.
    #[must_use]
    pub fn run(&self) -> Power {
        match &self.base {
            None => Some(Zeroizing::new(self.group.public(&self.exponent))),
            Some(theirs) => self.group.shared(theirs, &self.exponent),
        }
    }
}

impl Authentication {
    /// Of a queue that was just connected; whether it has to authenticate.
    #[must_use]
    pub fn new(names: Names, required: bool) -> Self {
        Self { names, granted: !required, state: State::Idle, since: Instant::now() }
    }

    /// Whether commands are served.
    #[must_use]
    pub fn granted(&self) -> bool {
        self.granted
    }

    /// Whether a failure was told, so that the connection is to end.
    #[must_use]
    pub fn over(&self) -> bool {
        matches!(self.state, State::Over)
    }

    /// Takes a message of an Authentication Send. `keys` are those of the host as they are now;
    /// `None`: it has none.
    pub fn send(
        &mut self,
        bytes: &[u8],
        keys: Option<HostKeys>,
        policy: &Policy,
    ) -> Result<Next, Status> {
        match self.state {
            // The command before is not complete, or its failure is still to be fetched.
            State::Challenging(..) | State::Checking(..) | State::Failed(..) | State::Over => {
                return Err(Status::SEQUENCE_ERROR);
            }
            _ => {}
        }
        let received = message::decode(bytes);
        let state = self.take_state();
        let id = received.transaction;
        Ok(Next::Now(match received.message {
            Err(explanation) => self.fail(state.transaction_id().unwrap_or(id), explanation),
            // At any time: it begins anew.
            Ok(FromHost::Negotiate(offer)) => {
                self.since = Instant::now();
                match offer.and_then(|offered| agree(id, &offered, keys, policy)) {
                    Ok(transaction) => {
                        self.state = State::Negotiated(transaction);
                        Step::Done
                    }
                    Err(explanation) => self.fail(id, explanation),
                }
            }
            Ok(FromHost::Failure2(code)) => {
                self.granted = false;
                self.state = State::Over;
                Step::GivenUp(code)
            }
            Ok(message) => return Ok(self.proceed(state, id, message)),
        }))
    }

    /// Takes a message that belongs to the transaction under way.
    fn proceed(&mut self, state: State, id: u16, message: FromHost) -> Next {
        match (state, message) {
            (State::Challenged(transaction, _), _) | (State::Answered(transaction), _)
                if transaction.id != id =>
            {
                Next::Now(self.fail(transaction.id, Explanation::PayloadIncorrect))
            }
            (State::Challenged(transaction, sent), FromHost::Reply(reply)) => {
                self.reply(transaction, sent, reply)
            }
            (State::Answered(_), FromHost::Success2) => {
                self.granted = true;
                Next::Now(Step::Done)
            }
            (state, _) => {
                let id = state.transaction_id().unwrap_or(id);
                Next::Now(self.fail(id, Explanation::MessageIncorrect))
            }
        }
    }

    fn reply(&mut self, transaction: Transaction, sent: Sent, reply: Reply) -> Next {
        if reply.response.len() != transaction.hash.bytes()
            || reply.value.len() != transaction.group.value_bytes()
        {
            return Next::Now(self.fail(transaction.id, Explanation::PayloadIncorrect));
        }
        if transaction.group == Group::Null {
            return Next::Now(self.check(transaction, &sent, &reply, None));
        }
        let power = Exponentiation {
            group: transaction.group,
            exponent: sent.exponent.clone(),
            base: Some(reply.value.clone()),
        };
        self.state = State::Checking(transaction, sent, reply);
        Next::Compute(power)
    }

    /// Answers an Authentication Receive with room for so many bytes. The message has exactly as
    /// many.
    pub fn receive(&mut self, room: u32) -> Result<Next, Status> {
        let room = usize::try_from(room).expect("64-bit");
        if self.owed_bytes() > room {
            return Err(Status::INVALID_FIELD);
        }
        Ok(Next::Now(match self.take_state() {
            State::Negotiated(transaction) => return Ok(self.challenge(transaction, room)),
            State::Proven(transaction, response) => {
                let message =
                    message::success1(transaction.id, transaction.hash, response.as_ref());
                match response {
                    Some(_) => self.state = State::Answered(transaction),
                    None => self.granted = true,
                }
                Step::Message(padded(message, room))
            }
            State::Failed(id, explanation) => {
                self.state = State::Over;
                Step::Message(padded(message::failure1(id, explanation), room))
            }
            computing @ (State::Challenging(..) | State::Checking(..)) => {
                self.state = computing;
                return Err(Status::SEQUENCE_ERROR);
            }
            state => {
                let id = state.transaction_id().unwrap_or_default();
                self.granted = false;
                self.state = State::Over;
                let message = message::failure1(id, Explanation::MessageIncorrect);
                Step::Message(padded(message, room))
            }
        }))
    }

    /// Bytes of the message that the host is to fetch.
    fn owed_bytes(&self) -> usize {
        const HEADER_BYTES: usize = 16;
        match &self.state {
            State::Negotiated(transaction) => {
                HEADER_BYTES + transaction.hash.bytes() + transaction.group.value_bytes()
            }
            State::Proven(transaction, _) => HEADER_BYTES + transaction.hash.bytes(),
            _ => HEADER_BYTES,
        }
    }

    fn challenge(&mut self, transaction: Transaction, room: usize) -> Next {
        let exponent = random::<EXPONENT_BYTES_MAX>();
        if transaction.group == Group::Null {
            return Next::Now(self.challenged(transaction, exponent, &[], room));
        }
        let power =
            Exponentiation { group: transaction.group, exponent: exponent.clone(), base: None };
        self.state = State::Challenging(transaction, exponent);
        Next::Compute(power)
    }

    fn challenged(
        &mut self,
        transaction: Transaction,
        exponent: Exponent,
        value: &[u8],
        room: usize,
    ) -> Step {
        let random = random::<64>();
        let challenge = random.get(..transaction.hash.bytes()).expect("64 at most").to_vec();
        let sequence = next_sequence();
        let message = Challenge {
            hash: transaction.hash,
            group: transaction.group,
            sequence,
            challenge: &challenge,
            value,
        };
        let message = message.encode(transaction.id);
        self.state = State::Challenged(transaction, Sent { sequence, challenge, exponent });
        Step::Message(padded(message, room))
    }

    /// Goes on with what an [`Exponentiation`] came to. `room` is that of the command it was for.
    pub fn computed(&mut self, power: Power, room: u32) -> Step {
        match (self.take_state(), power) {
            (State::Challenging(transaction, exponent), Some(value)) => {
                let room = usize::try_from(room).expect("64-bit");
                self.challenged(transaction, exponent, &value, room)
            }
            (State::Checking(transaction, sent, reply), Some(shared)) => {
                self.check(transaction, &sent, &reply, Some(&shared))
            }
            (state, None) => {
                self.fail(state.transaction_id().unwrap_or_default(), Explanation::GroupUnusable)
            }
            // It took so long that the transaction is over.
            (state, Some(_)) => {
                self.fail(state.transaction_id().unwrap_or_default(), Explanation::MessageIncorrect)
            }
        }
    }

    /// Compares the host's response with what it has to be, and prepares ours.
    fn check(
        &mut self,
        transaction: Transaction,
        sent: &Sent,
        reply: &Reply,
        shared: Option<&[u8]>,
    ) -> Step {
        let hash = transaction.hash;
        let augmented = |challenge: &[u8]| match shared {
            Some(shared) => crypto::augmented(hash, shared, challenge),
            None => Zeroizing::new(challenge.to_vec()),
        };
        let asked = |sequence, challenge| Asked {
            hash,
            transaction: transaction.id,
            sequence,
            challenge,
            host_nqn: &self.names.host_nqn,
            subsystem_nqn: &self.names.subsystem_nqn,
        };
        let challenge = augmented(&sent.challenge);
        let right = crypto::host_response(&transaction.keys.key, &asked(sent.sequence, &challenge));
        if !bool::from(right.ct_eq(&reply.response)) {
            return self.fail(transaction.id, Explanation::Failed);
        }
        let response = match (&reply.challenge, &transaction.keys.ctrl_key) {
            (None, _) => None,
            // Our own challenge sent back: no honest host draws the same.
            (Some((_, theirs)), _) if *theirs == sent.challenge => {
                return self.fail(transaction.id, Explanation::Failed);
            }
            (Some(_), None) => return self.fail(transaction.id, Explanation::Failed),
            (Some((sequence, theirs)), Some(key)) => {
                let challenge = augmented(theirs);
                Some(crypto::controller_response(key, &asked(*sequence, &challenge)))
            }
        };
        self.state = State::Proven(transaction, response);
        Step::Done
    }

    fn fail(&mut self, id: u16, explanation: Explanation) -> Step {
        self.granted = false;
        self.state = State::Failed(id, explanation);
        Step::Failed(explanation)
    }

    /// Takes the state out, unless its time is over.
    fn take_state(&mut self) -> State {
        let state = std::mem::replace(&mut self.state, State::Idle);
        match state {
            State::Failed(..) | State::Over => state,
            _ if self.since.elapsed() > TRANSACTION_TIME_MAX => State::Idle,
            state => state,
        }
    }
}

impl State {
    fn transaction_id(&self) -> Option<u16> {
        match self {
            Self::Idle | Self::Over => None,
            Self::Negotiated(transaction)
            | Self::Challenging(transaction, _)
            | Self::Challenged(transaction, _)
            | Self::Checking(transaction, ..)
            | Self::Proven(transaction, _)
            | Self::Answered(transaction) => Some(transaction.id),
            Self::Failed(id, _) => Some(*id),
        }
    }
}

/// Chooses the hash and the group we like best of those that both sides may use.
fn agree(
    id: u16,
    offered: &Offered,
    keys: Option<HostKeys>,
    policy: &Policy,
) -> Result<Transaction, Explanation> {
    let hash = policy.hashes.iter().find(|hash| offered.hashes.contains(hash));
    let group = policy.groups.iter().find(|group| offered.groups.contains(group));
    Ok(Transaction {
        id,
        hash: *hash.ok_or(Explanation::HashUnusable)?,
        group: *group.ok_or(Explanation::GroupUnusable)?,
        keys: keys.ok_or(Explanation::Failed)?,
    })
}

fn padded(mut message: Vec<u8>, length: usize) -> Vec<u8> {
    message.resize(length, 0);
    message
}

/// Bytes nobody can foretell.
pub(crate) fn random<const BYTES: usize>() -> Zeroizing<[u8; BYTES]> {
    const { assert!(BYTES <= 256, "more may come in parts") };
    let mut bytes = Zeroizing::new([0; BYTES]);
    let filled = getrandom(bytes.as_mut_slice(), GetRandomFlags::empty());
    assert_eq!(filled, Ok(BYTES), "the kernel gives 256 bytes at once or none");
    bytes
}

/// Numbers of challenges: they grow, from a random one on, and are never 0.
fn next_sequence() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        if NEXT.load(Ordering::Relaxed) == 0 {
            let first = u32::from_le_bytes(*random::<4>());
            // Another thread may have been first.
            let _ = NEXT.compare_exchange(0, first, Ordering::Relaxed, Ordering::Relaxed);
        }
        match NEXT.fetch_add(1, Ordering::Relaxed) {
            0 => {}
            sequence => return sequence,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::DhchapKey;

    /// Of a host that has a key, with a challenge owed to it.
    fn negotiated() -> Authentication {
        let names = Names { host_nqn: "nqn.host".into(), subsystem_nqn: "nqn.subsystem".into() };
        let mut authentication = Authentication::new(names, true);
        let mut negotiate = [0; 72];
        (negotiate[4], negotiate[7], negotiate[8]) = (7, 1, 1);
        (negotiate[10], negotiate[11], negotiate[12]) = (1, 1, 1);
        let key = DhchapKey::from_random(None, &[1; 64]);
        let keys = HostKeys { key, ctrl_key: None };
        let next = authentication.send(&negotiate, Some(keys), &Policy::default());
        assert!(matches!(next, Ok(Next::Now(Step::Done))), "{next:?}");
        authentication
    }

    #[test]
    fn a_transaction_has_its_time_and_no_more() {
        let message = |authentication: &mut Authentication| match authentication.receive(4096) {
            Ok(Next::Now(Step::Message(message))) => (message[0], message[1]),
            other => panic!("{other:?}"),
        };
        let (challenge, failure1) = ((1, 1), (0, 0xf1));
        assert_eq!(message(&mut negotiated()), challenge);
        let mut late = negotiated();
        let past = TRANSACTION_TIME_MAX + Duration::from_secs(1);
        late.since = Instant::now().checked_sub(past).expect("the machine runs longer");
        assert_eq!(message(&mut late), failure1);
        assert!(late.over() && !late.granted());
    }
}

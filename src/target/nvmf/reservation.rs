//! Reservations: what hosts ask for, and what comes of it. (NVMe Base 1.4, 6.10 to 6.13, 8.8)
//!
//! [`decide`] is the whole state machine: reservations, a host and a command give other
//! reservations and what to tell whom, or a status. Around it is little: the volume makes them
//! durable and enforces them ([`crate::volume::reservation`]), and the hosts concerned are told.
//!
//! A host is its 128-bit Host Identifier, whatever its name and however many controllers it has.
//! Without one (zero) it can register nothing.

use std::sync::Arc;

use bytes::Bytes;
use uuid::Uuid;

use crate::env::LocalBoxFuture;
use crate::target::nvmf::controller::Controller;
use crate::target::nvmf::identify::TRANSFER_BYTES_MAX;
use crate::target::nvmf::io::Start;
use crate::target::nvmf::io::Work;
use crate::target::nvmf::notices::Notice;
use crate::target::nvmf::queue::Transfer;
use crate::target::nvmf::status::Access;
use crate::target::nvmf::status::Status;
use crate::target::nvmf::status::status;
use crate::target::nvmf::subsystem::Namespace;
use crate::target::nvmf::subsystem::Subsystem;
use crate::target::nvmf::wire::Sgl;
use crate::target::nvmf::wire::Sqe;
use crate::target::nvmf::wire::opcode;
use crate::target::nvmf::wire::put;
use crate::units::bytes_usize;
use crate::volume::Piece;
use crate::volume::reservation::Hold;
use crate::volume::reservation::HoldKind;
use crate::volume::reservation::REGISTRANTS_MAX;
use crate::volume::reservation::Reservations;

/// Most data of a command but Report; hosts may send more than the command needs.
const DATA_BYTES_MAX: u32 = 4096;
/// The controller number in a report: hosts have dynamic controllers.
const CONTROLLER_ID_DYNAMIC: u16 = 0xffff;
/// Bytes of a report's header and of each registrant in it, with 128-bit host identifiers.
const REPORT_HEADER_BYTES: usize = 64;
const REPORT_ENTRY_BYTES: usize = 64;

/// What a host asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Reservation Register.
    Register {
        /// What to do with the key.
        action: RegisterAction,
        /// Whether to go on whatever the host's key is (IEKEY).
        ignore_key: bool,
        /// What is to become of all this at a restart; `None`: as before (CPTPL).
        persistent: Option<bool>,
        /// The host's key as it believes (CRKEY).
        key: u64,
        /// The key it wants (NRKEY).
        new_key: u64,
    },
    /// Reservation Acquire, action Acquire.
    Acquire {
        /// How to hold the namespace.
        kind: HoldKind,
        /// The host's key.
        key: u64,
    },
    /// Reservation Acquire, action Preempt, or Preempt and Abort. In both the volume waits for the
    /// requests under way, so nothing is left to abort.
    Preempt {
        /// How to hold the namespace, if its holder is preempted.
        kind: HoldKind,
        /// The host's key.
        key: u64,
        /// The key whose registrants are to go (PRKEY).
        victim_key: u64,
    },
    /// Reservation Release, action Release.
    Release {
        /// How the host believes to hold it; `None`: in no way there is.
        kind: Option<HoldKind>,
        /// The host's key.
        key: u64,
    },
    /// Reservation Release, action Clear.
    Clear {
        /// The host's key.
        key: u64,
    },
    /// Set Features, Reservation Persistence.
    Persist(bool),
}

/// Actions of Reservation Register. (NVMe Base 1.4, figure 380)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegisterAction {
    /// Registers a key.
    Register,
    /// Takes the registration back.
    Unregister,
    /// Puts another key in its place; key 0, with which Linux asks for it, takes it back.
    Replace,
}

/// What comes of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The reservations from then on.
    pub next: Reservations,
    /// What each host is to be told.
    pub notices: Vec<(Uuid, Notice)>,
}

impl Command {
    /// Reads a command other than Report, with the host's data.
    fn decode(sqe: &Sqe, data: &[u8]) -> Result<Self, Status> {
        let word = |at: usize| {
            let bytes = data.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
            bytes.map(u64::from_le_bytes).ok_or(Status::SGL_LENGTH_INVALID)
        };
        let options = sqe.u32(40);
        let (action, ignore_key) = (options & 7, options & 1 << 3 != 0);
        let kind = kind_of(sqe.u8(41));
        let key = word(0)?;
        if sqe.opcode() == opcode::RESERVATION_REGISTER {
            let action = match action {
                0 => RegisterAction::Register,
                1 => RegisterAction::Unregister,
                2 => RegisterAction::Replace,
                _ => return Err(Status::INVALID_FIELD),
            };
            let persistent = match options >> 30 {
                0 => None,
                2 => Some(false),
                3 => Some(true),
                _ => return Err(Status::INVALID_FIELD),
            };
            return Ok(Self::Register { action, ignore_key, persistent, key, new_key: word(8)? });
        }
        if ignore_key {
            return Err(Status::INVALID_FIELD);
        }
        match (sqe.opcode(), action) {
            (opcode::RESERVATION_ACQUIRE, 0..=2) => {
                let kind = kind.ok_or(Status::INVALID_FIELD)?;
                let victim_key = word(8)?;
                Ok(match action {
                    0 => Self::Acquire { kind, key },
                    _ => Self::Preempt { kind, key, victim_key },
                })
            }
            (opcode::RESERVATION_RELEASE, 0) => Ok(Self::Release { kind, key }),
            (opcode::RESERVATION_RELEASE, 1) => Ok(Self::Clear { key }),
            _ => Err(Status::INVALID_FIELD),
        }
    }
}

/// Reservation types. (NVMe Base 1.4, figure 374)
const KINDS: [(u8, HoldKind); 6] = [
    (1, HoldKind::WriteExclusive),
    (2, HoldKind::ExclusiveAccess),
    (3, HoldKind::WriteExclusiveRegistrants),
    (4, HoldKind::ExclusiveAccessRegistrants),
    (5, HoldKind::WriteExclusiveAll),
    (6, HoldKind::ExclusiveAccessAll),
];

fn kind_of(value: u8) -> Option<HoldKind> {
    KINDS.iter().find(|(known, _)| *known == value).map(|(_, kind)| *kind)
}

fn value_of(kind: HoldKind) -> u8 {
    KINDS.iter().find(|(_, known)| *known == kind).map_or(0, |(value, _)| *value)
}

/// What comes of `command`, as `host` gives it, or why nothing does.
pub fn decide(now: &Reservations, host: Uuid, command: &Command) -> Result<Decision, Status> {
    let own_key = now.registrants.get(&host).copied();
    let unchanged = Decision { next: now.clone(), notices: Vec::new() };
    if let Command::Acquire { key, .. }
    | Command::Preempt { key, .. }
    | Command::Release { key, .. }
    | Command::Clear { key } = command
        && own_key != Some(*key)
    {
        return Err(Status::RESERVATION_CONFLICT);
    }
    match *command {
        Command::Register { action, ignore_key, persistent, key, new_key } => {
            let goes_on = match action {
                RegisterAction::Register => own_key.is_none_or(|own| own == new_key),
                RegisterAction::Unregister => own_key.is_some_and(|own| ignore_key || own == key),
                RegisterAction::Replace => ignore_key || own_key == Some(key),
            };
            if !goes_on {
                return Err(Status::RESERVATION_CONFLICT);
            }
            let mut decision = match (action, new_key) {
                (RegisterAction::Register, 0) => return Err(Status::INVALID_FIELD),
                (RegisterAction::Unregister, _) | (RegisterAction::Replace, 0) => {
                    unregister(unchanged, host)
                }
                _ => register(unchanged, host, new_key)?,
            };
            decision.next.persistent = persistent.unwrap_or(now.persistent);
            Ok(counted(decision))
        }
        Command::Acquire { kind, .. } => acquire(unchanged, host, kind),
        Command::Preempt { kind, victim_key, .. } => {
            preempt(unchanged, host, kind, victim_key).map(counted)
        }
        Command::Release { kind, .. } => release(unchanged, host, kind),
        Command::Clear { .. } => {
            let mut decision = unchanged;
            decision.tell_others(host, Notice::ReservationPreempted);
            decision.next.registrants.clear();
            decision.next.held = None;
            Ok(counted(decision))
        }
        Command::Persist(persistent) => {
            let mut decision = unchanged;
            decision.next.persistent = persistent;
            Ok(decision)
        }
    }
}

/// The generation counts what may change registrations. (NVMe Base 1.4, figure 385)
fn counted(mut decision: Decision) -> Decision {
    decision.next.generation = decision.next.generation.wrapping_add(1);
    decision
}

fn register(mut decision: Decision, host: Uuid, key: u64) -> Result<Decision, Status> {
    let registrants = &mut decision.next.registrants;
    if registrants.len() >= REGISTRANTS_MAX && !registrants.contains_key(&host) {
        return Err(Status::INTERNAL);
    }
    registrants.insert(host, key);
    Ok(decision)
}

/// A holder that leaves gives up what it holds. (NVMe Base 1.4, 8.8.4)
fn unregister(mut decision: Decision, host: Uuid) -> Decision {
    let held = decision.next.held;
    decision.remove(host);
    if decision.next.held.is_none() && held.is_some_and(|held| held.kind.admits_registrants()) {
        decision.tell_others(host, Notice::ReservationReleased);
    }
    decision
}

fn acquire(mut decision: Decision, host: Uuid, kind: HoldKind) -> Result<Decision, Status> {
    match decision.next.held {
        None => decision.next.held = Some(hold(kind, host)),
        Some(held) if held == hold(kind, host) => {}
        Some(_) => return Err(Status::RESERVATION_CONFLICT),
    }
    Ok(decision)
}

/// Preempting: registrants lose their place, and if the holder is one of them, or all are, the host
/// takes the reservation over. (NVMe Base 1.4, 8.8.7)
fn preempt(
    mut decision: Decision,
    host: Uuid,
    kind: HoldKind,
    victim_key: u64,
) -> Result<Decision, Status> {
    let now = &decision.next;
    let holder_key =
        now.held.and_then(|held| held.host).and_then(|holder| now.registrants.get(&holder));
    let takes_over = match now.held {
        Some(held) if held.kind.held_by_all() => victim_key == 0,
        Some(_) if victim_key == 0 => return Err(Status::INVALID_FIELD),
        _ => holder_key == Some(&victim_key),
    };
    let everyone = takes_over && victim_key == 0;
    let is_victim = |(registrant, key): &(&Uuid, &u64)| {
        (everyone || **key == victim_key) && !(takes_over && **registrant == host)
    };
    let victims: Vec<Uuid> =
        now.registrants.iter().filter(is_victim).map(|(registrant, _)| *registrant).collect();
    if victims.is_empty() && !takes_over {
        return Err(Status::RESERVATION_CONFLICT);
    }
    let kind_before = now.held.map(|held| held.kind);
    if takes_over {
        decision.next.held = Some(hold(kind, host));
    }
    for victim in victims {
        decision.remove(victim);
        if victim != host {
            decision.notices.push((victim, Notice::RegistrationPreempted));
        }
    }
    if takes_over && kind_before != Some(kind) {
        decision.tell_others(host, Notice::ReservationReleased);
    }
    Ok(decision)
}

fn release(mut decision: Decision, host: Uuid, kind: Option<HoldKind>) -> Result<Decision, Status> {
    let Some(held) = decision.next.held else { return Ok(decision) };
    if held != hold(held.kind, host) {
        return Ok(decision);
    }
    if kind != Some(held.kind) {
        return Err(Status::RESERVATION_CONFLICT);
    }
    decision.next.held = None;
    if held.kind.admits_registrants() {
        decision.tell_others(host, Notice::ReservationReleased);
    }
    Ok(decision)
}

/// What a host that holds a namespace in this way holds.
fn hold(kind: HoldKind, host: Uuid) -> Hold {
    Hold { kind, host: (!kind.held_by_all()).then_some(host) }
}

impl Decision {
    /// Takes a registration out, and with it what its host holds alone.
    fn remove(&mut self, host: Uuid) {
        let next = &mut self.next;
        next.registrants.remove(&host);
        let last = next.registrants.is_empty();
        next.held = next.held.filter(|held| held.host.map_or(!last, |holder| holder != host));
    }

    /// Tells all registrants but `host`.
    fn tell_others(&mut self, host: Uuid, notice: Notice) {
        let others = self.next.registrants.keys().filter(|other| **other != host);
        self.notices.extend(others.map(|other| (*other, notice)));
    }
}

/// Whether it is a command of reservations.
#[must_use]
pub fn is_one(opcode: u8) -> bool {
    matches!(
        opcode,
        opcode::RESERVATION_REGISTER
            | opcode::RESERVATION_REPORT
            | opcode::RESERVATION_ACQUIRE
            | opcode::RESERVATION_RELEASE
    )
}

/// What data a command of reservations moves. More than it needs may be sent: Linux sends 16 bytes
/// for the 8 of a Release.
pub fn transfer(sqe: &Sqe) -> Result<Transfer, Status> {
    if sqe.opcode() == opcode::RESERVATION_REPORT {
        // EDS: all host identifiers have 128 bits here. (NVMe Base 1.4, 6.13)
        if sqe.u32(44) & 1 == 0 {
            return Err(Status::HOST_ID_FORMAT);
        }
        return Ok(Transfer::ToHost(report_bytes(sqe)?));
    }
    let needed = if sqe.opcode() == opcode::RESERVATION_RELEASE { 8 } else { 16 };
    let given = match sqe.sgl() {
        Sgl::InCapsule { length, .. } | Sgl::Transport { length } => length,
        Sgl::Unknown => needed,
    };
    if !(needed..=DATA_BYTES_MAX).contains(&given) {
        return Err(Status::SGL_LENGTH_INVALID);
    }
    Ok(Transfer::FromHost(given))
}

fn report_bytes(sqe: &Sqe) -> Result<u32, Status> {
    let bytes = sqe.u32(40).checked_add(1).and_then(|dwords| dwords.checked_mul(4));
    bytes.filter(|bytes| *bytes <= TRANSFER_BYTES_MAX).ok_or(Status::INVALID_FIELD)
}

/// Executes a command of reservations whose [`transfer`] was accepted. `pieces` is empty and takes
/// the data of a report.
pub fn execute(
    subsystem: &Arc<Subsystem>,
    controller: &Controller,
    namespace: &Namespace,
    sqe: &Sqe,
    data: &Bytes,
    pieces: &mut Vec<Piece>,
) -> Result<Start, Status> {
    if sqe.opcode() == opcode::RESERVATION_REPORT {
        let report = report(&namespace.volume.reservations(), report_bytes(sqe)?);
        pieces.push(Piece::Data(report.into()));
        return Ok(Start::Pieces);
    }
    let host = controller.identity().host().ok_or(Status::SEQUENCE_ERROR)?;
    let command = Command::decode(sqe, data)?;
    let change = change(Arc::clone(subsystem), vec![namespace.clone()], host, command);
    Ok(Start::Work(Work::Change(change)))
}

/// Carries a command out on some namespaces, one after the other.
///
/// # Cancellation
/// The change goes on, but those concerned may not be told of it.
#[must_use]
pub fn change(
    subsystem: Arc<Subsystem>,
    namespaces: Vec<Namespace>,
    host: Uuid,
    command: Command,
) -> LocalBoxFuture<Result<(), Status>> {
    Box::pin(async move {
        for namespace in namespaces {
            let notices = change_one(&namespace, host, &command).await?;
            subsystem.notify(namespace.nsid, &notices);
        }
        Ok(())
    })
}

async fn change_one(
    namespace: &Namespace,
    host: Uuid,
    command: &Command,
) -> Result<Vec<(Uuid, Notice)>, Status> {
    loop {
        let now = namespace.volume.reservations();
        let decision = decide(&now, host, command)?;
        let held = decision.next.held;
        let changes_hands = held != now.held;
        let replaced = Arc::clone(&namespace.volume).replace_reservations(now, decision.next);
        match replaced.await {
            Ok(true) => {
                if changes_hands {
                    tracing::info!(nsid = namespace.nsid, by = %host, ?held, "NVMe reservation");
                }
                return Ok(decision.notices);
            }
            // Another host was first: decide anew.
            Ok(false) => {}
            Err(error) => {
                tracing::debug!(error = %error.chain(), "NVMe reservation not changed");
                return Err(status(error.kind(), Access::Write));
            }
        }
    }
}

/// Reservation Status, with an entry for each registrant as far as `bytes` go. (NVMe Base 1.4,
/// figures 385 and 387)
fn report(now: &Reservations, bytes: u32) -> Vec<u8> {
    let registrants = u16::try_from(now.registrants.len()).unwrap_or(u16::MAX);
    let mut page = vec![0; REPORT_HEADER_BYTES];
    put(&mut page, 0, &now.generation.to_le_bytes());
    page[4] = now.held.map_or(0, |held| value_of(held.kind));
    put(&mut page, 5, &registrants.to_le_bytes());
    page[9] = u8::from(now.persistent);
    for (host, key) in &now.registrants {
        let mut entry = [0; REPORT_ENTRY_BYTES];
        put(&mut entry, 0, &CONTROLLER_ID_DYNAMIC.to_le_bytes());
        entry[2] = u8::from(now.held.is_some_and(|held| held == hold(held.kind, *host)));
        put(&mut entry, 8, &key.to_le_bytes());
        put(&mut entry, 16, host.as_bytes());
        page.extend(entry);
    }
    page.resize(bytes_usize(u64::from(bytes)), 0);
    page
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use HoldKind::*;

    fn host(number: u128) -> Uuid {
        Uuid::from_u128(number)
    }

    /// Hosts 1, 2, … with keys 10, 20, …, and who holds what.
    fn registered(hosts: u64, held: Option<(HoldKind, u128)>) -> Reservations {
        Reservations {
            generation: 5,
            persistent: false,
            registrants: (1..=hosts).map(|n| (host(n.into()), n * 10)).collect(),
            held: held.map(|(kind, holder)| hold(kind, host(holder))),
        }
    }

    fn register_with(action: RegisterAction, key: u64, new_key: u64) -> Command {
        Command::Register { action, ignore_key: false, persistent: None, key, new_key }
    }

    fn ignoring(command: Command) -> Command {
        let Command::Register { action, persistent, key, new_key, .. } = command else {
            panic!("only Register ignores keys")
        };
        Command::Register { action, ignore_key: true, persistent, key, new_key }
    }

    /// What is left, as keys by host, who holds it, and who is told what.
    type Outcome = (Vec<(u128, u64)>, Option<Hold>, Vec<(u128, Notice)>);

    fn after(now: &Reservations, by: u128, command: Command) -> Result<Outcome, Status> {
        let decision = decide(now, host(by), &command)?;
        let keys = decision.next.registrants.iter().map(|(host, key)| (host.as_u128(), *key));
        let told = decision.notices.iter().map(|(host, notice)| (host.as_u128(), *notice));
        Ok((keys.collect(), decision.next.held, told.collect()))
    }

    const CONFLICT: Result<Outcome, Status> = Err(Status::RESERVATION_CONFLICT);
    const INVALID: Result<Outcome, Status> = Err(Status::INVALID_FIELD);

    #[test]
    fn a_host_registers_once_and_changes_its_key_if_it_knows_it() {
        use RegisterAction::*;
        let now = registered(1, None);
        let run = |by, command| after(&now, by, command);
        let two = Ok((vec![(1, 10), (2, 20)], None, vec![]));
        let same = Ok((vec![(1, 10)], None, vec![]));
        assert_eq!(run(2, register_with(Register, 99, 20)), two, "the old key says nothing");
        assert_eq!(run(1, register_with(Register, 0, 10)), same);
        assert_eq!(run(1, register_with(Register, 10, 11)), CONFLICT);
        assert_eq!(run(1, ignoring(register_with(Register, 10, 11))), CONFLICT);
        assert_eq!(run(2, register_with(Register, 0, 0)), INVALID);

        let changed = Ok((vec![(1, 11)], None, vec![]));
        assert_eq!(run(1, register_with(Replace, 10, 11)), changed);
        assert_eq!(run(1, register_with(Replace, 99, 11)), CONFLICT);
        assert_eq!(run(1, ignoring(register_with(Replace, 99, 11))), changed);
        assert_eq!(run(2, register_with(Replace, 10, 20)), CONFLICT);
        assert_eq!(run(2, ignoring(register_with(Replace, 0, 20))), two);

        let gone = Ok((vec![], None, vec![]));
        assert_eq!(run(1, register_with(Unregister, 10, 0)), gone);
        assert_eq!(run(1, register_with(Replace, 10, 0)), gone);
        assert_eq!(run(1, register_with(Unregister, 99, 0)), CONFLICT);
        assert_eq!(run(1, ignoring(register_with(Unregister, 99, 0))), gone);
        assert_eq!(run(2, ignoring(register_with(Unregister, 10, 0))), CONFLICT);
    }

    #[test]
    fn there_is_an_end_to_registrants_but_not_for_those_who_are_there() {
        let full = registered(REGISTRANTS_MAX.try_into().expect("small"), None);
        let register = |by, action, key, new| {
            after(&full, by, register_with(action, key, new)).map(|(keys, _, _)| keys.len())
        };
        assert_eq!(register(1000, RegisterAction::Register, 0, 7), Err(Status::INTERNAL));
        assert_eq!(register(7, RegisterAction::Replace, 70, 7), Ok(REGISTRANTS_MAX));
    }

    #[test]
    fn a_holder_that_unregisters_gives_up_what_it_holds() {
        use Notice::ReservationReleased;
        let leave = |kind, hosts, holder, by: u64| {
            let now = registered(hosts, Some((kind, holder)));
            let command = register_with(RegisterAction::Unregister, by * 10, 0);
            after(&now, by.into(), command).map(|(_, held, told)| (held, told))
        };
        for kind in [WriteExclusive, ExclusiveAccess] {
            assert_eq!(leave(kind, 2, 1, 1), Ok((None, vec![])));
            assert_eq!(leave(kind, 2, 1, 2), Ok((Some(hold(kind, host(1))), vec![])));
        }
        for kind in [WriteExclusiveRegistrants, ExclusiveAccessRegistrants] {
            let told = vec![(2, ReservationReleased), (3, ReservationReleased)];
            assert_eq!(leave(kind, 3, 1, 1), Ok((None, told)));
            assert_eq!(leave(kind, 3, 1, 2), Ok((Some(hold(kind, host(1))), vec![])));
        }
        for kind in [WriteExclusiveAll, ExclusiveAccessAll] {
            assert_eq!(leave(kind, 2, 1, 1), Ok((Some(Hold { kind, host: None }), vec![])));
            assert_eq!(leave(kind, 1, 1, 1), Ok((None, vec![])), "the last one");
        }
    }

    #[test]
    fn one_host_holds_it_or_all_registrants_do() {
        let acquire = |now: &Reservations, by, kind, key| {
            after(now, by, Command::Acquire { kind, key }).map(|(_, held, _)| held)
        };
        let conflict = Err(Status::RESERVATION_CONFLICT);
        let free = registered(2, None);
        for (_, kind) in KINDS {
            let held = hold(kind, host(1));
            assert_eq!(acquire(&free, 1, kind, 10), Ok(Some(held)));
            assert_eq!(acquire(&free, 1, kind, 11), conflict, "not its key");
            assert_eq!(acquire(&free, 3, kind, 10), conflict, "not registered");
            let now = registered(2, Some((kind, 1)));
            assert_eq!(acquire(&now, 1, kind, 10), Ok(Some(held)), "again");
            let others = if kind.held_by_all() { Ok(Some(held)) } else { conflict };
            assert_eq!(acquire(&now, 2, kind, 20), others);
            for (_, other) in KINDS.into_iter().filter(|(_, other)| *other != kind) {
                assert_eq!(acquire(&now, 1, other, 10), conflict);
            }
        }
    }

    #[test]
    fn preempting_takes_over_from_the_holder_and_throws_out_whom_the_key_names() {
        use Notice::RegistrationPreempted as Out;
        use Notice::ReservationReleased as Released;
        let preempt = |now: &Reservations, by, kind, key, victim_key| {
            after(now, by, Command::Preempt { kind, key, victim_key })
        };
        // Nobody holds it: only registrations go, one's own as well.
        let now = registered(3, None);
        let left = Ok((vec![(1, 10), (3, 30)], None, vec![(2, Out)]));
        assert_eq!(preempt(&now, 1, WriteExclusive, 10, 20), left);
        let left = Ok((vec![(2, 20), (3, 30)], None, vec![]));
        assert_eq!(preempt(&now, 1, WriteExclusive, 10, 10), left);
        assert_eq!(preempt(&now, 1, WriteExclusive, 10, 99), CONFLICT);
        assert_eq!(preempt(&now, 1, WriteExclusive, 10, 0), CONFLICT);
        assert_eq!(preempt(&now, 1, WriteExclusive, 11, 20), CONFLICT);
        assert_eq!(preempt(&now, 4, WriteExclusive, 40, 20), CONFLICT);

        // One host holds it.
        let held = Some(hold(WriteExclusiveRegistrants, host(2)));
        let now = registered(3, Some((WriteExclusiveRegistrants, 2)));
        let over = Some(hold(WriteExclusiveRegistrants, host(1)));
        let left = Ok((vec![(1, 10), (3, 30)], over, vec![(2, Out)]));
        assert_eq!(preempt(&now, 1, WriteExclusiveRegistrants, 10, 20), left);
        let over = Some(hold(ExclusiveAccess, host(1)));
        let left = Ok((vec![(1, 10), (3, 30)], over, vec![(2, Out), (3, Released)]));
        assert_eq!(preempt(&now, 1, ExclusiveAccess, 10, 20), left);
        let left = Ok((vec![(1, 10), (2, 20)], held, vec![(3, Out)]));
        assert_eq!(preempt(&now, 1, ExclusiveAccess, 10, 30), left);
        assert_eq!(preempt(&now, 1, ExclusiveAccess, 10, 0), INVALID);
        assert_eq!(preempt(&now, 1, ExclusiveAccess, 10, 99), CONFLICT);
        // The holder itself: another type, and others with its key go.
        let mut shared_key = now.clone();
        shared_key.registrants.insert(host(3), 20);
        let over = Some(hold(ExclusiveAccess, host(2)));
        let left = Ok((vec![(1, 10), (2, 20)], over, vec![(3, Out), (1, Released)]));
        assert_eq!(preempt(&shared_key, 2, ExclusiveAccess, 20, 20), left);

        // All hold it.
        let held = Some(Hold { kind: ExclusiveAccessAll, host: None });
        let now = registered(3, Some((ExclusiveAccessAll, 2)));
        let over = Some(hold(WriteExclusive, host(1)));
        let left = Ok((vec![(1, 10)], over, vec![(2, Out), (3, Out)]));
        assert_eq!(preempt(&now, 1, WriteExclusive, 10, 0), left);
        let left = Ok((vec![(1, 10), (3, 30)], held, vec![(2, Out)]));
        assert_eq!(preempt(&now, 1, WriteExclusive, 10, 20), left);
        let last = registered(1, Some((ExclusiveAccessAll, 1)));
        assert_eq!(preempt(&last, 1, WriteExclusive, 10, 10), Ok((vec![], None, vec![])));
    }

    #[test]
    fn holders_release_and_registrants_clear() {
        use Notice::ReservationPreempted as Cleared;
        use Notice::ReservationReleased as Released;
        let release = |now: &Reservations, by, kind, key| {
            after(now, by, Command::Release { kind, key }).map(|(_, held, told)| (held, told))
        };
        for (_, kind) in KINDS {
            let now = registered(2, Some((kind, 1)));
            let told = if kind.admits_registrants() { vec![(2, Released)] } else { vec![] };
            assert_eq!(release(&now, 1, Some(kind), 10), Ok((None, told)));
            let conflict = Err(Status::RESERVATION_CONFLICT);
            assert_eq!(release(&now, 1, None, 10), conflict);
            assert_eq!(release(&now, 1, Some(kind), 11), conflict);
            assert_eq!(release(&now, 3, Some(kind), 10), conflict);
            let others = match kind.held_by_all() {
                true => Ok((None, vec![(1, Released)])),
                false => Ok((now.held, vec![])),
            };
            assert_eq!(release(&now, 2, Some(kind), 20), others);
            let cleared = Ok((vec![], None, vec![(1, Cleared)]));
            assert_eq!(after(&now, 2, Command::Clear { key: 20 }), cleared);
            assert_eq!(after(&now, 2, Command::Clear { key: 10 }), CONFLICT);
        }
        assert_eq!(release(&registered(1, None), 1, None, 10), Ok((None, vec![])));
    }

    #[test]
    fn commands_are_read_from_their_fields() {
        let command = |opcode: u8, options: u32, data: &[u64]| {
            let mut bytes = [0; 64];
            bytes[0] = opcode;
            bytes[40..44].copy_from_slice(&options.to_le_bytes());
            let data: Vec<u8> = data.iter().flat_map(|word| word.to_le_bytes()).collect();
            Command::decode(&Sqe::new(bytes), &data)
        };
        let (register, acquire, release) = (0x0d, 0x11, 0x15);
        let expected = Command::Register {
            action: RegisterAction::Replace,
            ignore_key: true,
            persistent: Some(true),
            key: 1,
            new_key: 2,
        };
        assert_eq!(command(register, 3 << 30 | 1 << 3 | 2, &[1, 2]), Ok(expected));
        let expected = Command::Preempt { kind: ExclusiveAccess, key: 1, victim_key: 2 };
        assert_eq!(command(acquire, 2 << 8 | 1, &[1, 2]), Ok(expected));
        assert_eq!(command(acquire, 2 << 8 | 2, &[1, 2]), Ok(expected));
        let expected = Command::Acquire { kind: ExclusiveAccessAll, key: 1 };
        assert_eq!(command(acquire, 6 << 8, &[1, 2]), Ok(expected));
        let expected = Command::Release { kind: Some(WriteExclusive), key: 1 };
        assert_eq!(command(release, 1 << 8, &[1]), Ok(expected));
        assert_eq!(command(release, 1, &[1]), Ok(Command::Clear { key: 1 }));

        let wrong = [
            (register, 3),
            (register, 1 << 30),
            (acquire, 3 | 1 << 8),
            (acquire, 0),
            (acquire, 7 << 8),
            (acquire, 1 << 8 | 1 << 3),
            (release, 2),
            (release, 1 << 3),
        ];
        for (opcode, options) in wrong {
            let refused = command(opcode, options, &[1, 2]);
            assert_eq!(refused, Err(Status::INVALID_FIELD), "{opcode:#x} {options:#x}");
        }
        let short = command(register, 0, &[1]);
        assert_eq!(short, Err(Status::SGL_LENGTH_INVALID));
    }

    #[test]
    fn a_report_names_registrants_and_is_cut_where_the_host_wants() {
        let mut now = registered(2, Some((WriteExclusiveRegistrants, 2)));
        now.persistent = true;
        let whole = report(&now, 64 + 3 * 64);
        assert_eq!(whole[..10], [5, 0, 0, 0, 3, 2, 0, 0, 0, 1]);
        assert_eq!(whole[64..73], [0xff, 0xff, 0, 0, 0, 0, 0, 0, 10]);
        assert_eq!(whole[80..96], *host(1).as_bytes());
        assert_eq!((whole[128 + 2], whole[128 + 8]), (1, 20));
        assert!(whole[192..].iter().all(|byte| *byte == 0));
        assert_eq!(report(&now, 64), whole[..64]);
        assert_eq!(report(&now, 132), whole[..132]);
        now.held = Some(hold(WriteExclusiveAll, host(2)));
        let all = report(&now, 192);
        assert_eq!((all[4], all[64 + 2], all[128 + 2]), (5, 1, 1));
    }

    fn any_command() -> impl Strategy<Value = Command> {
        let key = || prop_oneof![Just(0), 1..4_u64];
        let kind = || (0..KINDS.len()).prop_map(|index| KINDS[index].1);
        let action = prop_oneof![
            3 => Just(RegisterAction::Register),
            1 => Just(RegisterAction::Unregister),
            1 => Just(RegisterAction::Replace),
        ];
        let persistent = prop_oneof![Just(None), Just(Some(false)), Just(Some(true))];
        prop_oneof![
            4 => (action, any::<bool>(), persistent, key(), key()).prop_map(
                |(action, ignore_key, persistent, key, new_key)| Command::Register {
                    action, ignore_key, persistent, key, new_key
                }
            ),
            4 => (kind(), key()).prop_map(|(kind, key)| Command::Acquire { kind, key }),
            4 => (kind(), key(), key())
                .prop_map(|(kind, key, victim_key)| Command::Preempt { kind, key, victim_key }),
            1 => (kind(), key()).prop_map(|(kind, key)| Command::Release { kind: Some(kind), key }),
            1 => key().prop_map(|key| Command::Clear { key }),
            1 => any::<bool>().prop_map(Command::Persist),
        ]
    }

    proptest! {
        /// Whatever hosts do in whatever order.
        #[test]
        fn what_must_always_hold_does(
            steps in prop::collection::vec((1..5_u128, any_command()), 1..80)
        ) {
            let mut now = Reservations { generation: u32::MAX - 3, ..Reservations::default() };
            for (by, command) in steps {
                let by = host(by);
                let Ok(Decision { next, notices }) = decide(&now, by, &command) else { continue };
                // A holder is registered; a reservation of all has someone who holds it.
                if let Some(held) = next.held {
                    prop_assert_eq!(held.host.is_none(), held.kind.held_by_all());
                    let holds = |host: &Uuid| held.host.is_none_or(|holder| holder == *host);
                    prop_assert!(next.registrants.keys().any(holds));
                }
                prop_assert!(next.registrants.values().all(|key| *key != 0));
                // Only those registered with their key touch anything but their registration.
                let key = match command {
                    Command::Acquire { key, .. } | Command::Preempt { key, .. }
                    | Command::Release { key, .. } | Command::Clear { key } => Some(key),
                    Command::Register { .. } | Command::Persist(_) => None,
                };
                if let Some(key) = key {
                    prop_assert_eq!(now.registrants.get(&by), Some(&key));
                } else {
                    let others = |all: &Reservations| {
                        all.registrants.iter().filter(|(host, _)| **host != by)
                            .map(|(host, key)| (*host, *key)).collect::<Vec<_>>()
                    };
                    prop_assert_eq!(others(&now), others(&next));
                }
                let counts = matches!(
                    command,
                    Command::Register { .. } | Command::Preempt { .. } | Command::Clear { .. }
                );
                let generation = now.generation.wrapping_add(u32::from(counts));
                prop_assert_eq!(next.generation, generation);
                // Others who lose their registration hear of it, and nobody hears what is not so.
                for (host, notice) in &notices {
                    prop_assert!(*host != by && now.registrants.contains_key(host));
                    let still = next.registrants.contains_key(host);
                    prop_assert_eq!(still, *notice == Notice::ReservationReleased);
                }
                for lost in now.registrants.keys().filter(|h| !next.registrants.contains_key(h)) {
                    let told = notices.iter().any(|(host, _)| host == lost);
                    prop_assert!(told || *lost == by);
                }
                now = next;
            }
        }
    }
}

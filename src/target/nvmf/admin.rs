//! Commands of the admin queue, but those of fabrics: Identify, log pages, features, events.
//!
//! Hardly any of them waits, so each is a function from the command to its [`Answer`]; only an
//! Asynchronous Event Request may be answered much later ([`Admin::next_event`]).
//!
//! # Invariants
//! * An event type is not raised again until its log page was read. (NVMe Base 1.4, 5.2)

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::target::nvmf::controller::Controller;
use crate::target::nvmf::controller::IO_QUEUES_MAX;
use crate::target::nvmf::controller::Identity;
use crate::target::nvmf::controller::Kind;
use crate::target::nvmf::identify;
use crate::target::nvmf::identify::DISCOVERY_EVENTS_SUPPORTED;
use crate::target::nvmf::identify::EVENT_REQUESTS_MAX;
use crate::target::nvmf::identify::EVENTS_SUPPORTED;
use crate::target::nvmf::identify::IDENTIFY_BYTES;
use crate::target::nvmf::identify::TRANSFER_BYTES_MAX;
use crate::target::nvmf::io::Work;
use crate::target::nvmf::log_page;
use crate::target::nvmf::notices::MASK_BITS;
use crate::target::nvmf::queue::Transfer;
use crate::target::nvmf::reservation;
use crate::target::nvmf::reservation::Command;
use crate::target::nvmf::status::Status;
use crate::target::nvmf::subsystem::Namespace;
use crate::target::nvmf::subsystem::Namespaces;
use crate::target::nvmf::subsystem::Subsystem;
use crate::target::nvmf::transport::Path;
use crate::target::nvmf::wire::Sqe;
use crate::target::nvmf::wire::opcode;
use crate::units::bytes_usize;

/// Namespace Attribute Changed: a notice, whose details are in the log of changed namespaces.
/// (NVMe Base 1.4, figure 149)
const EVENT_NAMESPACE_CHANGED: u64 = 0x0004_0002;
/// Reservation Log Page Available: of the I/O command set, whose details are in the log of
/// notifications. (NVMe Base 1.4, figures 146 and 150)
const EVENT_RESERVATION: u64 = 0x0080_0006;
/// Discovery Log Page Change. (NVMe-oF 1.1, 5.4)
const EVENT_DISCOVERY_CHANGED: u64 = 0x0070_f002;
/// Every namespace.
const NSID_ALL: u32 = u32::MAX;
/// Granularity of the keep-alive timeout (KAS), in ms.
const KEEP_ALIVE_UNIT_MS: u32 = 1000;
/// The temperature above which a host would be warned, in K.
const TEMPERATURE_THRESHOLD: u64 = 343;

/// Feature identifiers.
mod feature {
    pub(super) const ARBITRATION: u8 = 0x01;
    pub(super) const POWER_MANAGEMENT: u8 = 0x02;
    pub(super) const TEMPERATURE_THRESHOLD: u8 = 0x04;
    pub(super) const ERROR_RECOVERY: u8 = 0x05;
    pub(super) const NUMBER_OF_QUEUES: u8 = 0x07;
    pub(super) const WRITE_ATOMICITY: u8 = 0x0a;
    pub(super) const ASYNC_EVENTS: u8 = 0x0b;
    pub(super) const KEEP_ALIVE: u8 = 0x0f;
    pub(super) const HOST_IDENTIFIER: u8 = 0x81;
    pub(super) const RESERVATION_MASK: u8 = 0x82;
    pub(super) const RESERVATION_PERSISTENCE: u8 = 0x83;
}

/// What a command leads to.
pub enum Answer {
    /// Success with this result.
    Done(u64),
    /// Success with data of the length asked for.
    Data(Vec<u8>),
    /// Nothing yet: it takes time.
    Work(Work),
    /// Nothing until there is an event.
    Later,
}

/// What an admin queue remembers.
pub struct Admin {
    path: Path,
    /// Event requests without an event, oldest first.
    event_requests: VecDeque<u16>,
    /// Which events the host wants.
    events_enabled: u32,
    /// Namespaces as the host may know them.
    known: BTreeMap<u32, (Uuid, u64, bool)>,
    /// Those that changed since the host last read their log.
    changed: BTreeSet<u32>,
    /// The discovery log as it was when it last changed; empty unless it is a discovery controller.
    discovery_log: Vec<u8>,
    /// How often it has changed.
    discovery_generation: u64,
    /// Either changed since the last event.
    to_tell: bool,
    /// The host was told and has not read the log yet.
    told: bool,
    /// The same of reservations.
    told_of_reservations: bool,
}

impl Admin {
    /// A queue that was just connected.
    #[must_use]
    pub fn new(
        subsystem: &Subsystem,
        identity: &Identity,
        namespaces: &Namespaces,
        path: Path,
    ) -> Self {
        Self {
            path,
            event_requests: VecDeque::new(),
            events_enabled: events_supported(identity.kind),
            known: known(namespaces),
            changed: BTreeSet::new(),
            discovery_log: match identity.kind {
                Kind::Io => Vec::new(),
                Kind::Discovery => log_page::discovery(subsystem, &identity.host_nqn, path, 0),
            },
            discovery_generation: 1,
            to_tell: false,
            told: false,
            told_of_reservations: false,
        }
    }

    /// Forgets what a reset of the controller voids: event requests are dropped unanswered.
    pub fn reset(&mut self, subsystem: &Subsystem, identity: &Identity, namespaces: &Namespaces) {
        *self = Self::new(subsystem, identity, namespaces, self.path);
    }

    /// Compares what there is with what the host knows.
    pub fn directory_changed(
        &mut self,
        subsystem: &Subsystem,
        identity: &Identity,
        namespaces: &Namespaces,
    ) {
        match identity.kind {
            Kind::Io => self.namespaces_changed(namespaces),
            Kind::Discovery => {
                let log = log_page::discovery(subsystem, &identity.host_nqn, self.path, 0);
                if log != self.discovery_log {
                    self.discovery_log = log;
                    self.discovery_generation += 1;
                    self.to_tell = true;
                }
            }
        }
    }

    fn namespaces_changed(&mut self, namespaces: &Namespaces) {
        let now = known(namespaces);
        let before = std::mem::take(&mut self.known);
        let nsids: BTreeSet<u32> = before.keys().chain(now.keys()).copied().collect();
        for nsid in nsids {
            if before.get(&nsid) != now.get(&nsid) {
                self.changed.insert(nsid);
                self.to_tell = true;
            }
        }
        self.known = now;
    }

    /// The request to answer now, with the event, if there is an event and a request.
    pub fn next_event(&mut self, controller: &Controller) -> Option<(u16, u64)> {
        if self.event_requests.is_empty() {
            return None;
        }
        let kind = controller.identity().kind;
        let wanted = self.events_enabled & events_supported(kind) != 0;
        let event = if self.to_tell && wanted && !self.told {
            self.to_tell = false;
            self.told = true;
            match kind {
                Kind::Io => EVENT_NAMESPACE_CHANGED,
                Kind::Discovery => EVENT_DISCOVERY_CHANGED,
            }
        } else if !self.told_of_reservations && controller.with_notices(|notices| notices.any()) {
            self.told_of_reservations = true;
            EVENT_RESERVATION
        } else {
            return None;
        };
        self.event_requests.pop_front().map(|cid| (cid, event))
    }

    /// How many event requests wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.event_requests.len()
    }

    /// Executes a command whose [`transfer`] was accepted.
    pub fn execute(
        &mut self,
        subsystem: &Arc<Subsystem>,
        controller: &Controller,
        namespaces: &Namespaces,
        sqe: &Sqe,
    ) -> Result<Answer, Status> {
        let kind = controller.identity().kind;
        let of_reservations =
            matches!(sqe.u8(40), feature::RESERVATION_MASK | feature::RESERVATION_PERSISTENCE);
        match sqe.opcode() {
            opcode::IDENTIFY => identify(subsystem, controller, namespaces, sqe),
            opcode::GET_LOG_PAGE => self.log_page(subsystem, controller, namespaces, sqe),
            opcode::SET_FEATURES if of_reservations && kind == Kind::Io => {
                set_reservation_feature(subsystem, controller, namespaces, sqe)
            }
            opcode::GET_FEATURES if of_reservations && kind == Kind::Io => {
                reservation_feature(controller, namespaces, sqe)
            }
            opcode::SET_FEATURES => self.set_feature(controller, sqe),
            opcode::GET_FEATURES => self.feature(controller, sqe),
            opcode::KEEP_ALIVE => Ok(Answer::Done(0)),
            // Commands are too short-lived to be worth it; 1: not aborted. (NVMe Base 1.4, 5.1)
            opcode::ABORT if kind == Kind::Io => Ok(Answer::Done(1)),
            opcode::ASYNC_EVENT_REQUEST => {
                if self.event_requests.len() > usize::from(EVENT_REQUESTS_MAX) {
                    return Err(Status::EVENT_LIMIT_EXCEEDED);
                }
                self.event_requests.push_back(sqe.cid());
                Ok(Answer::Later)
            }
            _ => Err(Status::INVALID_OPCODE),
        }
    }

    fn log_page(
        &mut self,
        subsystem: &Subsystem,
        controller: &Controller,
        namespaces: &Namespaces,
        sqe: &Sqe,
    ) -> Result<Answer, Status> {
        let (identity, id) = (controller.identity(), sqe.u8(40));
        let keep_event = sqe.u8(41) & 0x80 != 0;
        let log_specific = sqe.u8(41) & 0x7f;
        let page = match (identity.kind, id) {
            (_, log_page::id::ERROR) => log_page::error(),
            (Kind::Discovery, log_page::id::DISCOVERY) => {
                let generation = self.discovery_generation;
                log_page::discovery(subsystem, &identity.host_nqn, self.path, generation)
            }
            (Kind::Io, log_page::id::SMART) => log_page::smart(subsystem.counters()),
            (Kind::Io, log_page::id::FIRMWARE_SLOT) => log_page::firmware_slot(),
            (Kind::Io, log_page::id::CHANGED_NAMESPACES) => {
                log_page::changed_namespaces(&self.changed)
            }
            (Kind::Io, log_page::id::COMMANDS_AND_EFFECTS) => log_page::commands_and_effects(),
            (Kind::Io, log_page::id::ANA) => log_page::ana(namespaces, log_specific & 1 != 0),
            (Kind::Io, log_page::id::RESERVATION_NOTIFICATION) => {
                controller.with_notices(|notices| notices.read(true))
            }
            _ => return Err(Status::INVALID_LOG_PAGE),
        };
        let (offset, length) = (sqe.u64(48), log_bytes(sqe)?);
        if offset % 4 != 0 {
            return Err(Status::INVALID_FIELD);
        }
        let offset = usize::try_from(offset).map_err(|_| Status::INVALID_FIELD)?;
        let rest = page.get(offset..).ok_or(Status::INVALID_FIELD)?;
        let taken = rest.len().min(length);
        let mut data = rest[..taken].to_vec();
        data.resize(length, 0);
        let tells = matches!(id, log_page::id::CHANGED_NAMESPACES | log_page::id::DISCOVERY);
        if tells && !keep_event {
            self.changed.clear();
            self.told = false;
        }
        if id == log_page::id::RESERVATION_NOTIFICATION && !keep_event {
            controller.with_notices(|notices| notices.read(false));
            self.told_of_reservations = false;
        }
        Ok(Answer::Data(data))
    }

    fn set_feature(&mut self, controller: &Controller, sqe: &Sqe) -> Result<Answer, Status> {
        let (id, value) = (sqe.u8(40), sqe.u32(44));
        let save = sqe.u8(43) & 0x80 != 0;
        if save {
            return Err(Status::NOT_SAVEABLE);
        }
        match (controller.identity().kind, id) {
            (Kind::Io, feature::NUMBER_OF_QUEUES) => set_queues(controller, value),
            (kind, feature::ASYNC_EVENTS) => {
                // Critical warnings, the low eight bits, may be wanted; we have none.
                if value & !(events_supported(kind) | 0xff) != 0 {
                    return Err(Status::INVALID_FIELD);
                }
                self.events_enabled = value;
                Ok(Answer::Done(0))
            }
            (_, feature::KEEP_ALIVE) => {
                let rounded = value.div_ceil(KEEP_ALIVE_UNIT_MS).saturating_mul(KEEP_ALIVE_UNIT_MS);
                controller.set_keep_alive(Duration::from_millis(u64::from(rounded)));
                Ok(Answer::Done(u64::from(rounded)))
            }
            // Given with Connect. (NVMe-oF 1.1, 4.4)
            (_, feature::HOST_IDENTIFIER) => Err(Status::SEQUENCE_ERROR),
            (
                Kind::Io,
                feature::ARBITRATION
                | feature::POWER_MANAGEMENT
                | feature::TEMPERATURE_THRESHOLD
                | feature::ERROR_RECOVERY
                | feature::WRITE_ATOMICITY,
            ) => Err(Status::NOT_CHANGEABLE),
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn feature(&self, controller: &Controller, sqe: &Sqe) -> Result<Answer, Status> {
        const CURRENT: u8 = 0;
        const CAPABILITIES: u8 = 3;
        const CHANGEABLE: u64 = 1 << 2;
        let (id, select) = (sqe.u8(40), sqe.u8(41) & 7);
        let kind = controller.identity().kind;
        if id == feature::HOST_IDENTIFIER {
            return match select {
                CURRENT => Ok(Answer::Data(controller.identity().host_id.to_vec())),
                _ => Err(Status::INVALID_FIELD),
            };
        }
        let changeable = match id {
            feature::ASYNC_EVENTS | feature::KEEP_ALIVE => CHANGEABLE,
            feature::NUMBER_OF_QUEUES if kind == Kind::Io => CHANGEABLE,
            _ => 0,
        };
        let queues = |granted: u16| {
            let from_zero = u64::from(granted.saturating_sub(1));
            from_zero | from_zero << 16
        };
        let (current, default) = match (kind, id) {
            (
                Kind::Io,
                feature::ARBITRATION
                | feature::POWER_MANAGEMENT
                | feature::ERROR_RECOVERY
                | feature::WRITE_ATOMICITY,
            ) => (0, 0),
            (Kind::Io, feature::TEMPERATURE_THRESHOLD) => {
                (TEMPERATURE_THRESHOLD, TEMPERATURE_THRESHOLD)
            }
            (Kind::Io, feature::NUMBER_OF_QUEUES) => {
                (queues(controller.io_queues_granted()), queues(IO_QUEUES_MAX))
            }
            (kind, feature::ASYNC_EVENTS) => {
                (u64::from(self.events_enabled), u64::from(events_supported(kind)))
            }
            (_, feature::KEEP_ALIVE) => {
                (u64::try_from(controller.keep_alive().as_millis()).unwrap_or(u64::MAX), 0)
            }
            _ => return Err(Status::INVALID_FIELD),
        };
        Ok(Answer::Done(match select {
            CURRENT => current,
            CAPABILITIES => changeable,
            _ => default,
        }))
    }
}

/// Reservation Notification Mask and Reservation Persistence, which each namespace has.
/// (NVMe Base 1.4, 5.21.1.26, 5.21.1.27)
fn set_reservation_feature(
    subsystem: &Arc<Subsystem>,
    controller: &Controller,
    namespaces: &Namespaces,
    sqe: &Sqe,
) -> Result<Answer, Status> {
    let value = sqe.u32(44);
    if sqe.u8(43) & 0x80 != 0 {
        return Err(Status::NOT_SAVEABLE);
    }
    let chosen: Vec<Namespace> = match sqe.nsid() {
        NSID_ALL => namespaces.iter().cloned().collect(),
        nsid => vec![namespaces.find(nsid).ok_or(Status::INVALID_NAMESPACE)?.clone()],
    };
    let is_mask = sqe.u8(40) == feature::RESERVATION_MASK;
    match value {
        mask if is_mask && mask & !MASK_BITS == 0 => {
            let nsids = chosen.iter().map(|namespace| namespace.nsid);
            controller.with_notices(|notices| notices.set_mask(nsids, mask));
            Ok(Answer::Done(0))
        }
        0 | 1 if !is_mask => {
            let host = controller.identity().host().unwrap_or_default();
            let command = Command::Persist(value == 1);
            let change = reservation::change(Arc::clone(subsystem), chosen, host, command);
            Ok(Answer::Work(Work::Change(change)))
        }
        _ => Err(Status::INVALID_FIELD),
    }
}

fn reservation_feature(
    controller: &Controller,
    namespaces: &Namespaces,
    sqe: &Sqe,
) -> Result<Answer, Status> {
    const NAMESPACE_SPECIFIC_AND_CHANGEABLE: u64 = 0b110;
    let namespace = namespaces.find(sqe.nsid()).ok_or(Status::INVALID_NAMESPACE)?;
    Ok(Answer::Done(match (sqe.u8(41) & 7, sqe.u8(40)) {
        (0, feature::RESERVATION_MASK) => {
            u64::from(controller.with_notices(|notices| notices.mask(namespace.nsid)))
        }
        (0, _) => u64::from(namespace.volume.reservations().persistent),
        (3, _) => NAMESPACE_SPECIFIC_AND_CHANGEABLE,
        _ => 0,
    }))
}

/// Number of Queues: the same count of submission and completion queues, counted from 0.
/// (NVMe Base 1.4, 5.21.1.7)
fn set_queues(controller: &Controller, value: u32) -> Result<Answer, Status> {
    let [submission, completion] = [value & 0xffff, value >> 16];
    if submission == 0xffff || completion == 0xffff {
        return Err(Status::INVALID_FIELD);
    }
    let asked = u16::try_from(submission.min(completion) + 1).map_err(|_| Status::INVALID_FIELD)?;
    let granted = u64::from(controller.grant_io_queues(asked)? - 1);
    Ok(Answer::Done(granted | granted << 16))
}

fn identify(
    subsystem: &Subsystem,
    controller: &Controller,
    namespaces: &Namespaces,
    sqe: &Sqe,
) -> Result<Answer, Status> {
    let (structure, command_set) = (sqe.u8(40), sqe.u8(47));
    let nsid = sqe.nsid();
    let page = match (controller.identity().kind, structure) {
        (_, 0x01) => identify::controller(subsystem, controller),
        (Kind::Io, 0x00) => match namespaces.find(nsid) {
            Some(namespace) => identify::namespace(namespace),
            None if nsid == NSID_ALL || nsid == 0 => return Err(Status::INVALID_NAMESPACE),
            None => vec![0; IDENTIFY_BYTES],
        },
        (Kind::Io, 0x02) if nsid >= NSID_ALL - 1 => return Err(Status::INVALID_NAMESPACE),
        (Kind::Io, 0x02) => identify::active(namespaces, nsid),
        (Kind::Io, 0x03) => match namespaces.find(nsid) {
            Some(namespace) => identify::descriptors(namespace),
            None => return Err(Status::INVALID_NAMESPACE),
        },
        (Kind::Io, 0x05) if command_set == 0 => match namespaces.find(nsid) {
            Some(_) => vec![0; IDENTIFY_BYTES],
            None => return Err(Status::INVALID_NAMESPACE),
        },
        (Kind::Io, 0x06) if command_set == 0 => identify::nvm_controller(),
        _ => return Err(Status::INVALID_FIELD),
    };
    Ok(Answer::Data(page))
}

/// What data a command moves.
pub fn transfer(sqe: &Sqe) -> Result<Transfer, Status> {
    match sqe.opcode() {
        opcode::IDENTIFY => {
            Ok(Transfer::ToHost(u32::try_from(IDENTIFY_BYTES).expect("a constant")))
        }
        opcode::GET_LOG_PAGE => {
            Ok(Transfer::ToHost(u32::try_from(log_bytes(sqe)?).expect("at most MDTS")))
        }
        opcode::GET_FEATURES if sqe.u8(40) == feature::HOST_IDENTIFIER => {
            // 128-bit identifiers only, as fabrics demand. (NVMe-oF 1.1, 4.4)
            if sqe.u32(44) & 1 == 0 {
                return Err(Status::INVALID_FIELD);
            }
            Ok(Transfer::ToHost(16))
        }
        opcode::GET_FEATURES
        | opcode::SET_FEATURES
        | opcode::ABORT
        | opcode::ASYNC_EVENT_REQUEST
        | opcode::KEEP_ALIVE => Ok(Transfer::None),
        _ => Err(Status::INVALID_OPCODE),
    }
}

/// Bytes of a log page that are asked for.
fn log_bytes(sqe: &Sqe) -> Result<usize, Status> {
    let dwords = u64::from(sqe.u16(42)) | u64::from(sqe.u16(44)) << 16;
    let bytes = (dwords + 1) * 4;
    if bytes > u64::from(TRANSFER_BYTES_MAX) {
        return Err(Status::INVALID_FIELD);
    }
    Ok(bytes_usize(bytes))
}

fn events_supported(kind: Kind) -> u32 {
    match kind {
        Kind::Io => EVENTS_SUPPORTED,
        Kind::Discovery => DISCOVERY_EVENTS_SUPPORTED,
    }
}

fn known(namespaces: &Namespaces) -> BTreeMap<u32, (Uuid, u64, bool)> {
    namespaces.iter().map(|namespace| (namespace.nsid, namespace.facts())).collect()
}

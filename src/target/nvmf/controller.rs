//! One host's controller: its registers, its queues, and whether it still lives.
//!
//! Its admin queue and its I/O queues are connections on any thread; what they share is here,
//! behind one short lock. The rules are those of NVMe Base 1.4, 3.1 and NVMe-oF 1.1, 3.5.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use uuid::Uuid;

use crate::target::nvmf::notices::Notice;
use crate::target::nvmf::notices::Notices;
use crate::target::nvmf::status::Status;

/// Most I/O queues of one controller.
pub const IO_QUEUES_MAX: u16 = 128;
/// Entries of an I/O queue, counted from 0 (CAP.MQES).
pub const IO_QUEUE_ENTRIES_MAX: u16 = 1023;
/// Entries of the admin queue, counted from 0.
pub const ADMIN_QUEUE_ENTRIES_MAX: u16 = 255;
/// After this long without a command, a discovery controller that set no keep-alive is given up.
const DISCOVERY_IDLE_MAX: Duration = Duration::from_secs(120);

/// Controller capabilities: 1024 entries, contiguous queues, 15 s to become ready, the NVM command
/// set, pages of 4 KiB. (NVMe Base 1.4, 3.1.1)
const CAPABILITIES: u64 = 0x0000_0020_1e01_0000 | IO_QUEUE_ENTRIES_MAX as u64;
/// The version we follow: 1.4.0. (NVMe Base 1.4, 3.1.2)
pub const VERSION: u32 = 0x0001_0400;

const CC_ENABLE: u32 = 1;
const CSTS_READY: u32 = 1;
const CSTS_FATAL: u32 = 1 << 1;
const CSTS_SHUTDOWN_MASK: u32 = 3 << 2;
const CSTS_SHUTDOWN_COMPLETE: u32 = 2 << 2;

/// What a controller serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The namespaces.
    Io,
    /// The discovery log.
    Discovery,
}

/// Whose controller it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// What it serves.
    pub kind: Kind,
    /// The name by which the host asked for it.
    pub subsystem_nqn: String,
    /// The host's name.
    pub host_nqn: String,
    /// The host's identifier.
    pub host_id: [u8; 16],
}

impl Identity {
    /// The host as reservations know it, if it has an identifier.
    #[must_use]
    pub fn host(&self) -> Option<Uuid> {
        Some(Uuid::from_bytes(self.host_id)).filter(|host| !host.is_nil())
    }
}

/// What connections of a controller watch for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Life {
    /// All of them are to close.
    pub ended: bool,
    /// Counts resets: I/O queues of an earlier count are to close.
    pub resets: u64,
    /// Counts notices of reservations, for the admin queue to look.
    pub notices: u64,
}

/// A controller.
pub struct Controller {
    id: u16,
    identity: Identity,
    /// Guards what follows from Property Set, Connect and Set Features.
    registers: Mutex<Registers>,
    /// A command came since the keep-alive timer last looked.
    active: AtomicBool,
    life: watch::Sender<Life>,
    /// Guards what the host is to hear of reservations, for one look or change.
    notices: Mutex<Notices>,
}

struct Registers {
    configuration: u32,
    status: u32,
    keep_alive: Duration,
    io_queues: BTreeSet<u16>,
    io_queues_granted: u16,
}

impl Controller {
    /// A controller that was just connected to.
    #[must_use]
    pub fn new(id: u16, identity: Identity, keep_alive: Duration) -> Self {
        Self {
            id,
            identity,
            registers: Mutex::new(Registers {
                configuration: 0,
                status: 0,
                keep_alive,
                io_queues: BTreeSet::new(),
                io_queues_granted: IO_QUEUES_MAX,
            }),
            active: AtomicBool::new(true),
            life: watch::Sender::default(),
            notices: Mutex::default(),
        }
    }

    /// Its number within the subsystem.
    #[must_use]
    pub fn id(&self) -> u16 {
        self.id
    }

    /// Whose it is.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Whether commands other than those of fabrics are served.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.registers.lock().serves()
    }

    /// For its connections, to learn of its end and of resets.
    #[must_use]
    pub fn life(&self) -> watch::Receiver<Life> {
        self.life.subscribe()
    }

    /// Tells the host of a change of reservations.
    pub fn notify(&self, nsid: u32, notice: Notice) {
        if self.notices.lock().add(nsid, notice) {
            self.life.send_modify(|life| life.notices += 1);
        }
    }

    /// Looks at what the host is to hear of reservations, or changes it; short, as those who have
    /// news wait.
    pub fn with_notices<T>(&self, look: impl FnOnce(&mut Notices) -> T) -> T {
        look(&mut self.notices.lock())
    }

    /// Ends it: all its connections close.
    pub fn end(&self) {
        self.life.send_modify(|life| life.ended = true);
    }

    /// Ends it because the host does not keep it alive. (NVMe Base 1.4, 7.12)
    pub fn expire(&self) {
        self.registers.lock().status |= CSTS_FATAL;
        self.end();
    }

    /// Takes note of a command, which is as good as a Keep Alive. (NVMe Base 1.4, 7.12, TBKAS)
    pub fn touch(&self) {
        self.active.store(true, Ordering::Relaxed);
    }

    /// Whether there was a command since the last call.
    pub fn take_active(&self) -> bool {
        self.active.swap(false, Ordering::Relaxed)
    }

    /// How long the host may be silent; `None`: for ever.
    #[must_use]
    pub fn silence_max(&self) -> Option<Duration> {
        let keep_alive = self.registers.lock().keep_alive;
        match (keep_alive.is_zero(), self.identity.kind) {
            (false, _) => Some(keep_alive),
            (true, Kind::Discovery) => Some(DISCOVERY_IDLE_MAX),
            (true, Kind::Io) => None,
        }
    }

    /// The keep-alive timeout as the host set it; zero: none.
    #[must_use]
    pub fn keep_alive(&self) -> Duration {
        self.registers.lock().keep_alive
    }

    /// Sets the keep-alive timeout.
    pub fn set_keep_alive(&self, keep_alive: Duration) {
        self.registers.lock().keep_alive = keep_alive;
    }

    /// Grants I/O queues: as many as asked for, up to our maximum. Not once one is connected.
    pub fn grant_io_queues(&self, asked: u16) -> Result<u16, Status> {
        let mut registers = self.registers.lock();
        if !registers.io_queues.is_empty() {
            return Err(Status::SEQUENCE_ERROR);
        }
        registers.io_queues_granted = asked.min(IO_QUEUES_MAX);
        Ok(registers.io_queues_granted)
    }

    /// How many were granted.
    #[must_use]
    pub fn io_queues_granted(&self) -> u16 {
        self.registers.lock().io_queues_granted
    }

    /// Admits an I/O queue; the error says why not.
    pub fn open_io_queue(&self, qid: u16) -> Result<(), QueueRefused> {
        let mut registers = self.registers.lock();
        if !registers.serves() {
            return Err(QueueRefused::NotReady);
        }
        if qid > registers.io_queues_granted {
            return Err(QueueRefused::NotGranted);
        }
        if !registers.io_queues.insert(qid) {
            return Err(QueueRefused::InUse);
        }
        Ok(())
    }

    /// An I/O queue's connection has ended, and with it all its commands.
    pub fn close_io_queue(&self, qid: u16) {
        let mut registers = self.registers.lock();
        registers.io_queues.remove(&qid);
        registers.finish_reset();
    }

    /// Reads a property. (NVMe-oF 1.1, 3.4)
    pub fn property(&self, offset: u32, eight_bytes: bool) -> Result<u64, Status> {
        let registers = self.registers.lock();
        match (offset, eight_bytes) {
            (0x00, true) => Ok(CAPABILITIES),
            (0x08, false) => Ok(u64::from(VERSION)),
            (0x14, false) => Ok(u64::from(registers.configuration)),
            (0x1c, false) => Ok(u64::from(registers.status)),
            _ => Err(Status::INVALID_FIELD),
        }
    }

    /// Writes a property: only Controller Configuration can be written. (NVMe-oF 1.1, 3.5)
    ///
    /// True if the controller was reset, so that what its admin queue remembers is void.
    pub fn set_property(&self, offset: u32, eight_bytes: bool, value: u64) -> Result<bool, Status> {
        let value = u32::try_from(value).map_err(|_| Status::INVALID_FIELD)?;
        if offset != 0x14 || eight_bytes {
            return Err(Status::INVALID_FIELD);
        }
        let reset = self.registers.lock().configure(value, self.identity.kind);
        if reset {
            *self.notices.lock() = Notices::default();
            self.life.send_modify(|life| life.resets += 1);
        }
        Ok(reset)
    }
}

/// Why an I/O queue was not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueRefused {
    /// The controller is not enabled.
    NotReady,
    /// Its number is above what was granted.
    NotGranted,
    /// It is connected already.
    InUse,
}

impl Registers {
    fn enabled(&self) -> bool {
        self.configuration & CC_ENABLE != 0
    }

    fn serves(&self) -> bool {
        self.enabled() && self.status & (CSTS_READY | CSTS_FATAL) == CSTS_READY
    }

    /// A disabled controller says that it is not ready once no I/O queue is left: the host then
    /// sends its commands again, and an old one that ran on could undo what comes after.
    /// (NVMe Base 1.4, 3.1.6, RDY)
    fn finish_reset(&mut self) {
        if !self.enabled() && self.io_queues.is_empty() {
            self.status &= !CSTS_READY;
        }
    }

    /// Takes a new value of CC; true if it was a reset. Everything acknowledged is durable, so a
    /// shutdown has nothing to wait for. (NVMe Base 1.4, 3.1.5, 7.6.2)
    fn configure(&mut self, value: u32, kind: Kind) -> bool {
        let old = std::mem::replace(&mut self.configuration, value);
        let enabled = |configuration: u32| configuration & CC_ENABLE != 0;
        let shutting_down = value >> 14 & 3 != 0;
        if shutting_down {
            self.status = self.status & !CSTS_SHUTDOWN_MASK | CSTS_SHUTDOWN_COMPLETE;
            self.keep_alive = Duration::ZERO;
        } else {
            self.status &= !CSTS_SHUTDOWN_MASK;
        }
        if enabled(value) && !enabled(old) {
            let good = kind == Kind::Discovery || configuration_is_ours(value);
            self.status |= if good { CSTS_READY } else { CSTS_FATAL };
        }
        if enabled(old) && !enabled(value) {
            self.configuration = 0;
            self.status &= CSTS_READY;
            self.finish_reset();
            return true;
        }
        false
    }
}

/// Pages of 4 KiB, round robin, the NVM command set, entries of 64 and 16 bytes.
fn configuration_is_ours(configuration: u32) -> bool {
    let field = |shift: u32, bits: u32| configuration >> shift & ((1 << bits) - 1);
    let (command_set, page, arbitration) = (field(4, 3), field(7, 4), field(11, 3));
    let (sqe_size, cqe_size) = (field(16, 4), field(20, 4));
    matches!(command_set, 0 | 6) && page == 0 && arbitration == 0 && sqe_size == 6 && cqe_size == 4
}

#[cfg(test)]
mod tests {
    use super::*;

    const CC: u32 = 0x14;
    const CSTS: u32 = 0x1c;

    fn controller(kind: Kind) -> Controller {
        let identity = Identity {
            kind,
            subsystem_nqn: "nqn.s".to_owned(),
            host_nqn: "nqn.h".to_owned(),
            host_id: [1; 16],
        };
        Controller::new(1, identity, Duration::from_secs(5))
    }

    #[test]
    fn enabling_makes_it_ready_and_disabling_resets_it() {
        let controller = controller(Kind::Io);
        let life = controller.life();
        assert_eq!(controller.open_io_queue(1), Err(QueueRefused::NotReady));
        assert_eq!(controller.set_property(CC, false, 0x0046_0000), Ok(false));
        assert!(!controller.ready());
        assert_eq!(controller.set_property(CC, false, 0x0046_0001), Ok(false));
        assert!(controller.ready());
        assert_eq!(controller.property(CSTS, false), Ok(1));
        assert_eq!(controller.open_io_queue(1), Ok(()));
        assert_eq!(controller.open_io_queue(1), Err(QueueRefused::InUse));
        assert_eq!(controller.open_io_queue(129), Err(QueueRefused::NotGranted));
        assert_eq!(controller.grant_io_queues(4), Err(Status::SEQUENCE_ERROR));
        assert_eq!(controller.set_property(CC, false, 0x0046_0000), Ok(true));
        assert!(!controller.ready());
        assert_eq!(life.borrow().resets, 1);
        assert_eq!(controller.property(CSTS, false), Ok(1), "a queue is left");
        assert_eq!(controller.open_io_queue(2), Err(QueueRefused::NotReady));
        controller.close_io_queue(1);
        assert_eq!(controller.property(CSTS, false), Ok(0));
        assert_eq!(controller.grant_io_queues(4), Ok(4));
        assert_eq!(controller.grant_io_queues(1000), Ok(IO_QUEUES_MAX));
    }

    #[test]
    fn a_shutdown_is_complete_at_once_and_stops_the_keep_alive_timer() {
        let controller = controller(Kind::Io);
        controller.set_property(CC, false, 0x0046_0001).expect("enabled");
        assert!(controller.silence_max().is_some());
        controller.set_property(CC, false, 0x0046_4001).expect("shut down");
        assert_eq!(controller.property(CSTS, false), Ok(1 | 2 << 2));
        assert_eq!(controller.silence_max(), None);
        controller.set_property(CC, false, 0x0046_0001).expect("and back");
        assert_eq!(controller.property(CSTS, false), Ok(1));
    }

    #[test]
    fn a_configuration_we_cannot_serve_is_fatal_but_not_for_discovery() {
        for value in [0x0046_0081, 0x0046_0801, 0x0046_0011, 0x0045_0001, 0x0036_0001] {
            let controller = controller(Kind::Io);
            controller.set_property(CC, false, value).expect("taken");
            assert!(!controller.ready(), "{value:#x}");
            assert_eq!(controller.property(CSTS, false), Ok(2));
        }
        let controller = controller(Kind::Discovery);
        controller.set_property(CC, false, 1).expect("taken");
        assert!(controller.ready());
        assert_eq!(controller.silence_max(), Some(Duration::from_secs(5)));
        controller.set_keep_alive(Duration::ZERO);
        assert_eq!(controller.silence_max(), Some(DISCOVERY_IDLE_MAX));
    }

    #[test]
    fn only_the_properties_fabrics_have_are_there() {
        let controller = controller(Kind::Io);
        assert_eq!(controller.property(0, true), Ok(0x0000_0020_1e01_03ff));
        assert_eq!(controller.property(8, false), Ok(0x0001_0400));
        for (offset, eight) in [(0, false), (8, true), (0x20, false), (0x24, false), (0x28, true)] {
            assert_eq!(controller.property(offset, eight), Err(Status::INVALID_FIELD));
        }
        for (offset, eight) in [(0, true), (0x14, true), (0x20, false)] {
            assert_eq!(controller.set_property(offset, eight, 1), Err(Status::INVALID_FIELD));
        }
    }
}

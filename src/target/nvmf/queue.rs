//! One queue: a submission queue and its completion queue, which on fabrics is one connection.
//! Checks commands, executes them, completes them. No I/O of its own, and no transport's word.
//!
//! # Invariants
//! * Every command gets exactly one completion, but for event requests when the controller is
//!   reset or ends. (NVMe Base 1.4, 5.2)
//! * Until its Connect has succeeded, a queue takes nothing else. (NVMe-oF 1.1, 3.3)
//! * Until a host that has a key has proven it, the queue takes nothing but what authenticates.
//! * Dropping the admin queue removes its controller, which ends the I/O queues.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::task::Context;
use std::task::Poll;
use std::task::ready;

use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::Instant;
use weft_api::FrontEnd;

use crate::target::connections;
use crate::target::nvmf::admin;
use crate::target::nvmf::admin::Admin;
use crate::target::nvmf::admin::Answer;
use crate::target::nvmf::auth;
use crate::target::nvmf::auth::Authentication;
use crate::target::nvmf::auth::Names;
use crate::target::nvmf::auth::Next;
use crate::target::nvmf::auth::Step;
use crate::target::nvmf::connect;
use crate::target::nvmf::connect::CONNECT_DATA_BYTES;
use crate::target::nvmf::controller::Controller;
use crate::target::nvmf::controller::Kind;
use crate::target::nvmf::fused::Both;
use crate::target::nvmf::fused::Fused;
use crate::target::nvmf::io;
use crate::target::nvmf::io::Outcome;
use crate::target::nvmf::io::Start;
use crate::target::nvmf::io::Work;
use crate::target::nvmf::reservation;
use crate::target::nvmf::status::Status;
use crate::target::nvmf::subsystem::Namespaces;
use crate::target::nvmf::subsystem::Subsystem;
use crate::target::nvmf::transport::Path;
use crate::target::nvmf::transport::Responder;
use crate::target::nvmf::transport::SecureNames;
use crate::target::nvmf::wire::Cqe;
use crate::target::nvmf::wire::Sgl;
use crate::target::nvmf::wire::Sqe;
use crate::target::nvmf::wire::fabrics_type;
use crate::target::nvmf::wire::opcode;
use crate::target::timing::Begun;
use crate::target::timing::Timing;
use crate::units::bytes_u64;
use crate::volume::Piece;

/// What the queue head reads where there is no flow control. (NVMe-oF 1.1, 2.4)
const SQ_HEAD_NONE: u16 = 0xffff;

/// In the result of a Connect: the host has to authenticate (ATR). (NVMe Base 2.2, 6.3)
const AUTHENTICATION_REQUIRED: u64 = 1 << 17;

/// The data a command moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// None.
    None,
    /// So many bytes from the host, before the command can be executed.
    FromHost(u32),
    /// So many bytes to the host, if it succeeds.
    ToHost(u32),
}

impl Transfer {
    /// Bytes it moves.
    #[must_use]
    pub fn bytes(self) -> u32 {
        match self {
            Self::None => 0,
            Self::FromHost(bytes) | Self::ToHost(bytes) => bytes,
        }
    }
}

/// A queue.
pub struct Queue {
    subsystem: Arc<Subsystem>,
    path: Path,
    /// Whom the connection is with, if it is encrypted.
    secured: Option<SecureNames>,
    namespaces: Namespaces,
    changes: watch::Receiver<u64>,
    role: Role,
    /// `None` until connected, and for discovery.
    authentication: Option<Box<Authentication>>,
    id: u16,
    /// Counted from 0.
    entries: u16,
    head: u16,
    flow_control: bool,
    fused: Fused,
    /// Reused by every read.
    pieces: Vec<Piece>,
    tally: Tally,
    timing: Timing,
}

/// What the queue is for.
enum Role {
    /// Not connected yet.
    Fresh,
    Admin(Arc<Controller>, Box<Admin>),
    Io(Arc<Controller>),
}

/// What was counted since it was last reported.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    commands: u64,
    reads: u64,
    writes: u64,
    bytes_read: u64,
    bytes_written: u64,
    errors: u64,
}

impl Queue {
    /// A queue not connected to any controller yet; its commands are counted by volume if `timed`.
    #[must_use]
    pub fn new(subsystem: Arc<Subsystem>, path: Path, timed: bool) -> Self {
        let changes = subsystem.changes();
        Self {
            namespaces: Namespaces::default(),
            changes,
            subsystem,
            path,
            secured: None,
            role: Role::Fresh,
            authentication: None,
            id: 0,
            entries: 0,
            head: 0,
            flow_control: true,
            fused: Fused::default(),
            pieces: Vec::new(),
            tally: Tally::default(),
            timing: Timing::new(FrontEnd::NvmeTcp, timed),
        }
    }

    /// Says whom its connection is with, if that is encrypted.
    pub fn set_secured(&mut self, names: Option<SecureNames>) {
        self.secured = names;
    }

    /// How long commands take.
    pub fn timing(&mut self) -> &mut Timing {
        &mut self.timing
    }

    /// Its number; 0 is the admin queue.
    #[must_use]
    pub fn id(&self) -> u16 {
        self.id
    }

    /// Its controller, once connected.
    #[must_use]
    pub fn controller(&self) -> Option<&Arc<Controller>> {
        match &self.role {
            Role::Fresh => None,
            Role::Admin(controller, _) | Role::Io(controller) => Some(controller),
        }
    }

    /// Whether it is a controller's admin queue.
    #[must_use]
    pub fn is_admin(&self) -> bool {
        matches!(self.role, Role::Admin(..))
    }

    /// Whether the host is served: it has no key, or has proven it.
    #[must_use]
    pub fn granted(&self) -> bool {
        self.authentication.as_ref().is_none_or(|authentication| authentication.granted())
    }

    /// Whether the host may authenticate: it has to, or it has a key and may do so again.
    fn authenticates(&self) -> bool {
        let has_keys = |controller: &Arc<Controller>| {
            self.subsystem.host_keys(&controller.identity().host_nqn).is_some()
        };
        !self.granted() || self.controller().is_some_and(has_keys)
    }

    /// Whether the host was told that its authentication failed: the connection is to end.
    #[must_use]
    pub fn over(&self) -> bool {
        self.authentication.as_ref().is_some_and(|authentication| authentication.over())
    }

    /// Commands a host may have outstanding.
    #[must_use]
    pub fn depth(&self) -> usize {
        usize::from(self.entries) + 1
    }

    /// What data a command moves, or why it cannot be executed: to be refused then. To be asked
    /// once for every command, in the order they came.
    pub fn transfer(&mut self, sqe: &Sqe) -> Result<Transfer, Status> {
        self.refresh();
        let mut transfer = self.wanted_transfer(sqe);
        if sqe.fuse() != 0 || !self.fused.is_empty() {
            transfer = self.fused.submit(sqe, transfer);
        }
        transfer
    }

    /// Memory that a command takes which moves that data, from then on until it is answered, beyond a
    /// little.
    #[must_use]
    pub fn memory_bytes(&self, sqe: &Sqe, transfer: Transfer) -> u32 {
        match self.role {
            Role::Io(_) => io::memory_bytes(sqe, transfer),
            Role::Fresh | Role::Admin(..) => transfer.bytes(),
        }
    }

    fn wanted_transfer(&self, sqe: &Sqe) -> Result<Transfer, Status> {
        let transfer = self.accepted_transfer(sqe)?;
        match (transfer, sqe.sgl()) {
            (Transfer::None, _) => Ok(transfer),
            (_, Sgl::Unknown) | (Transfer::ToHost(_), Sgl::InCapsule { .. }) => {
                Err(Status::SGL_TYPE_INVALID)
            }
            (Transfer::FromHost(_), Sgl::InCapsule { offset, .. }) if offset != 0 => {
                Err(Status::SGL_OFFSET_INVALID)
            }
            (
                Transfer::FromHost(bytes) | Transfer::ToHost(bytes),
                Sgl::InCapsule { length, .. } | Sgl::Transport { length },
            ) if bytes == length => Ok(transfer),
            _ => Err(Status::SGL_LENGTH_INVALID),
        }
    }

    fn accepted_transfer(&self, sqe: &Sqe) -> Result<Transfer, Status> {
        if let Some(decided) = self.authentication_transfer(sqe) {
            return decided;
        }
        let is_fabrics = sqe.opcode() == opcode::FABRICS;
        let controller = match &self.role {
            Role::Fresh if is_fabrics && sqe.fabrics_type() == fabrics_type::CONNECT => {
                return Ok(Transfer::FromHost(CONNECT_DATA_BYTES));
            }
            Role::Fresh => return Err(Status::SEQUENCE_ERROR),
            Role::Admin(..) if is_fabrics => {
                return match sqe.fabrics_type() {
                    fabrics_type::PROPERTY_GET | fabrics_type::PROPERTY_SET => Ok(Transfer::None),
                    fabrics_type::CONNECT => Err(Status::SEQUENCE_ERROR),
                    _ => Err(Status::INVALID_OPCODE),
                };
            }
            Role::Io(_) if is_fabrics => {
                return Err(match sqe.fabrics_type() {
                    fabrics_type::CONNECT => Status::SEQUENCE_ERROR,
                    _ => Status::INVALID_OPCODE,
                });
            }
            Role::Admin(controller, _) | Role::Io(controller) => controller,
        };
        if !controller.ready() {
            return Err(Status::SEQUENCE_ERROR);
        }
        if !sqe.uses_sgl() {
            return Err(Status::INVALID_FIELD);
        }
        match &self.role {
            Role::Admin(..) if sqe.fuse() != 0 => Err(Status::INVALID_FIELD),
            Role::Admin(..) => admin::transfer(sqe),
            Role::Io(_) | Role::Fresh => io::transfer(&self.namespaces, sqe),
        }
    }

    /// What a command that authenticates moves, or that others have to wait for it; `None`: it has
    /// nothing to do with authentication.
    fn authentication_transfer(&self, sqe: &Sqe) -> Option<Result<Transfer, Status>> {
        let authentication = self.authentication.as_ref()?;
        let is_fabrics = sqe.opcode() == opcode::FABRICS;
        match sqe.fabrics_type() {
            fabrics_type::AUTHENTICATION_SEND if is_fabrics && self.authenticates() => {
                Some(auth::transfer_bytes(sqe).map(Transfer::FromHost))
            }
            fabrics_type::AUTHENTICATION_RECEIVE if is_fabrics && self.authenticates() => {
                Some(auth::transfer_bytes(sqe).map(Transfer::ToHost))
            }
            _ if authentication.granted() => None,
            _ => Some(Err(Status::AUTHENTICATION_REQUIRED)),
        }
    }

    /// Completes a command with an error.
    pub fn refuse(&mut self, sqe: &Sqe, status: Status, out: &mut impl Responder) {
        self.tally.commands += 1;
        tracing::trace!(?sqe, ?status, "NVMe command refused");
        self.count_failed(sqe);
        self.fail(sqe.cid(), status, out);
        if !self.fused.is_empty() {
            self.fused.refuse(sqe);
            self.fail_halves(out);
        }
    }

    /// Counts an I/O command that fails before it has begun, if it is one on a volume.
    fn count_failed(&self, sqe: &Sqe) {
        if matches!(self.role, Role::Io(_))
            && sqe.opcode() != opcode::FABRICS
            && let Some(namespace) = self.namespaces.find(sqe.nsid())
        {
            self.timing.failed(namespace.volume.requests(), io::operation(sqe.opcode()));
        }
    }

    /// Completes halves of fused pairs whose partner will not come.
    fn fail_halves(&mut self, out: &mut impl Responder) {
        while let Some((cid, status)) = self.fused.take_failed() {
            self.fail(cid, status, out);
        }
    }

    /// Executes a command: completes it at once, or returns the work that will lead there.
    ///
    /// `data` is what [`Queue::transfer`] said comes from the host. The command came at `arrival`,
    /// data that was asked for later.
    pub fn execute(
        &mut self,
        sqe: &Sqe,
        data: Bytes,
        arrival: Instant,
        out: &mut impl Responder,
    ) -> Option<InFlight> {
        self.tally.commands += 1;
        // It was checked when it came, but the namespace may have shrunk or gone since then.
        self.refresh();
        if sqe.opcode() == opcode::FABRICS {
            return self.fabrics(sqe, &data, out);
        }
        match &mut self.role {
            // It was accepted before an authentication anew that failed.
            _ if self.authentication.as_ref().is_some_and(|host| !host.granted()) => {
                self.fail(sqe.cid(), Status::AUTHENTICATION_REQUIRED, out);
                None
            }
            Role::Fresh => {
                self.fail(sqe.cid(), Status::SEQUENCE_ERROR, out);
                None
            }
            Role::Admin(controller, admin) => {
                let answer = admin.execute(&self.subsystem, controller, &self.namespaces, sqe);
                let in_flight = self.answer(sqe.cid(), answer, out);
                self.send_events(out);
                in_flight
            }
            Role::Io(_) if !self.fused.is_empty() => {
                let begun = match sqe.fuse() {
                    0 => self.begin_io(sqe, data, arrival, out),
                    _ => {
                        let both = self.fused.arrive(sqe, data);
                        both.and_then(|both| self.begin_fused(both, arrival, out))
                    }
                };
                self.fail_halves(out);
                begun
            }
            Role::Io(_) => self.begin_io(sqe, data, arrival, out),
        }
    }

    fn begin_fused(
        &mut self,
        both: Both,
        arrival: Instant,
        out: &mut impl Responder,
    ) -> Option<InFlight> {
        let begun = begun(&self.namespaces, &both.second, arrival);
        let (first, cid) = (both.first.cid(), both.second.cid());
        let bytes_written = bytes_u64(both.data.len());
        self.tally.reads += 1;
        self.tally.writes += 1;
        match io::compare_and_write(&self.namespaces, both) {
            Ok(work) => Some(InFlight { cid, fused_with: Some(first), bytes_written, work, begun }),
            Err(status) => {
                self.timing.failed_under_way(begun.as_ref());
                self.fail(first, status, out);
                self.fail(cid, Status::FUSED_FAILED, out);
                None
            }
        }
    }

    /// Completes what a finished command came to.
    pub fn complete(&mut self, completed: Completed, out: &mut impl Responder) {
        let Completed { cid, fused_with, bytes_written, outcome, begun } = completed;
        match (begun, &outcome) {
            (Some(begun), Ok(_)) => self.timing.finished(begun, Instant::now()),
            (begun, Err(_)) => self.timing.failed_under_way(begun.as_ref()),
            (None, Ok(_)) => {}
        }
        if let Some(first) = fused_with {
            match outcome {
                Ok(Outcome::Differs) => self.fail(first, Status::COMPARE_FAILURE, out),
                Ok(_) => self.done(first, 0, out),
                Err(_) => self.fail(first, Status::FUSED_FAILED, out),
            }
        }
        match outcome {
            Ok(Outcome::Done) => {
                self.tally.bytes_written += bytes_written;
                self.done(cid, 0, out);
            }
            Ok(Outcome::Pieces(mut pieces)) => self.reply_data(cid, &mut pieces, out),
            Ok(Outcome::Differs) if fused_with.is_some() => {
                self.fail(cid, Status::FUSED_FAILED, out);
            }
            Ok(Outcome::Differs) => self.fail(cid, Status::COMPARE_FAILURE, out),
            Ok(Outcome::Computed(power, room)) => {
                if let Some(authentication) = &mut self.authentication {
                    let step = authentication.computed(power, room);
                    self.authenticated(cid, step, out);
                }
            }
            Err(status) => self.fail(cid, status, out),
        }
    }

    /// Looks for changed namespaces and reservations, and tells a host that waits for such news.
    pub fn send_events(&mut self, out: &mut impl Responder) {
        self.refresh();
        loop {
            let Role::Admin(controller, admin) = &mut self.role else { return };
            let Some((cid, event)) = admin.next_event(controller) else { return };
            self.done(cid, event, out);
        }
    }

    /// Reports what was counted since the last call, and that the host is alive.
    pub fn report(&mut self) -> connections::Tally {
        if self.tally.commands == 0 && self.tally.bytes_written == 0 {
            return connections::Tally::default();
        }
        let tally = std::mem::take(&mut self.tally);
        if let Some(controller) = self.controller() {
            controller.touch();
        }
        let counters = self.subsystem.counters();
        let add = |counter: &AtomicU64, more: u64| {
            if more > 0 {
                counter.fetch_add(more, Ordering::Relaxed);
            }
        };
        add(&counters.reads, tally.reads);
        add(&counters.writes, tally.writes);
        add(&counters.bytes_read, tally.bytes_read);
        add(&counters.bytes_written, tally.bytes_written);
        add(&counters.errors, tally.errors);
        connections::Tally {
            requests: tally.commands,
            errors: tally.errors,
            bytes_read: tally.bytes_read,
            bytes_written: tally.bytes_written,
        }
    }

    fn fabrics(&mut self, sqe: &Sqe, data: &[u8], out: &mut impl Responder) -> Option<InFlight> {
        let cid = sqe.cid();
        if let fabrics_type::AUTHENTICATION_SEND | fabrics_type::AUTHENTICATION_RECEIVE =
            sqe.fabrics_type()
        {
            return self.authenticate(sqe, data, out);
        }
        let Role::Admin(controller, admin) = &mut self.role else {
            self.connect(sqe, data, out);
            return None;
        };
        let eight_bytes = sqe.u8(40) & 7 == 1;
        let offset = sqe.u32(44);
        let answer = if sqe.fabrics_type() == fabrics_type::PROPERTY_GET {
            controller.property(offset, eight_bytes)
        } else {
            controller.set_property(offset, eight_bytes, sqe.u64(48)).map(|reset| {
                if reset {
                    out.forget(admin.waiting());
                    admin.reset(&self.subsystem, controller.identity(), &self.namespaces);
                }
                0
            })
        };
        self.answer(cid, answer.map(Answer::Done), out)
    }

    fn authenticate(
        &mut self,
        sqe: &Sqe,
        data: &[u8],
        out: &mut impl Responder,
    ) -> Option<InFlight> {
        let (cid, room) = (sqe.cid(), sqe.u32(44));
        let keys = self
            .controller()
            .and_then(|controller| self.subsystem.host_keys(&controller.identity().host_nqn));
        let next = match &mut self.authentication {
            None => Err(Status::INVALID_OPCODE),
            Some(authentication) => match sqe.fabrics_type() {
                fabrics_type::AUTHENTICATION_RECEIVE => authentication.receive(room),
                _ => authentication.send(data, keys, self.subsystem.authentication()),
            },
        };
        match next {
            Err(status) => self.fail(cid, status, out),
            Ok(Next::Now(step)) => self.authenticated(cid, step, out),
            Ok(Next::Compute(power)) => {
                let power = Box::pin(self.subsystem.exponentiations().run(power));
                let work = Work::Compute { power, room };
                return self.answer(cid, Ok(Answer::Work(work)), out);
            }
        }
        None
    }

    /// Completes a command that authenticates.
    fn authenticated(&mut self, cid: u16, step: Step, out: &mut impl Responder) {
        if let (Step::Failed(_) | Step::GivenUp(_), Some(controller)) = (&step, self.controller()) {
            auth::report(&self.subsystem, controller.identity(), self.path.host, &step);
        }
        match step {
            Step::Done | Step::Failed(_) | Step::GivenUp(_) => self.done(cid, 0, out),
            Step::Message(message) => {
                let cqe = self.cqe(cid, Status::SUCCESS, 0);
                out.data(cqe, &mut vec![Piece::Data(message.into())]);
            }
        }
    }

    fn connect(&mut self, sqe: &Sqe, data: &[u8], out: &mut impl Responder) {
        const DISABLE_FLOW_CONTROL: u8 = 1 << 2;
        let secured = self.secured.as_ref();
        match connect::connect(&self.subsystem, self.path.host, secured, sqe, data) {
            Ok(connected) => {
                let controller = connected.controller;
                let identity = controller.identity();
                tracing::debug!(
                    controller = controller.id(),
                    queue = connected.qid,
                    host = identity.host_nqn,
                    kind = ?identity.kind,
                    "NVMe queue connected"
                );
                let mut result = u64::from(controller.id());
                if identity.kind == Kind::Io {
                    let required = connected.authenticate;
                    result |= if required { AUTHENTICATION_REQUIRED } else { 0 };
                    let names = Names {
                        host_nqn: identity.host_nqn.clone(),
                        subsystem_nqn: identity.subsystem_nqn.clone(),
                    };
                    self.authentication = Some(Box::new(Authentication::new(names, required)));
                }
                self.namespaces =
                    self.subsystem.namespaces(&identity.host_nqn).used_by(identity.host());
                self.id = connected.qid;
                self.entries = connected.entries;
                self.flow_control = sqe.u8(46) & DISABLE_FLOW_CONTROL == 0;
                self.role = if connected.qid == 0 {
                    let admin = Admin::new(&self.subsystem, identity, &self.namespaces, self.path);
                    Role::Admin(controller, Box::new(admin))
                } else {
                    Role::Io(controller)
                };
                self.done(sqe.cid(), result, out);
            }
            Err(refused) => {
                tracing::debug!(?refused, "NVMe connect refused");
                self.tally.errors += 1;
                let cqe = self.cqe(sqe.cid(), refused.status, refused.result);
                out.complete(cqe);
            }
        }
    }

    fn begin_io(
        &mut self,
        sqe: &Sqe,
        data: Bytes,
        arrival: Instant,
        out: &mut impl Responder,
    ) -> Option<InFlight> {
        let cid = sqe.cid();
        let bytes = bytes_u64(data.len());
        let is_write = sqe.opcode() == opcode::WRITE;
        self.tally.writes += u64::from(is_write);
        self.tally.reads += u64::from(matches!(sqe.opcode(), opcode::READ | opcode::COMPARE));
        let mut pieces = std::mem::take(&mut self.pieces);
        let start = match &self.role {
            Role::Io(controller) if reservation::is_one(sqe.opcode()) => {
                let found = io::find(&self.namespaces, sqe);
                found.and_then(|namespace| {
                    let subsystem = &self.subsystem;
                    reservation::execute(subsystem, controller, namespace, sqe, &data, &mut pieces)
                })
            }
            _ => io::execute(&self.namespaces, sqe, data, &mut pieces),
        };
        let in_flight = match start {
            Ok(Start::Pieces) => {
                if let Some(namespace) = self.namespaces.find(sqe.nsid()) {
                    let bytes = pieces.iter().map(|piece| bytes_u64(piece.len())).sum();
                    let requests = namespace.volume.requests();
                    self.timing.answered(requests, io::operation(sqe.opcode()), bytes);
                }
                self.reply_data(cid, &mut pieces, out);
                None
            }
            Ok(Start::Done) => {
                self.done(cid, 0, out);
                None
            }
            Ok(Start::Work(work)) => {
                let bytes_written = if is_write { bytes } else { 0 };
                let begun = begun(&self.namespaces, sqe, arrival);
                Some(InFlight { cid, fused_with: None, bytes_written, work, begun })
            }
            Err(status) => {
                self.count_failed(sqe);
                self.fail(cid, status, out);
                None
            }
        };
        self.pieces = pieces;
        in_flight
    }

    /// Completes a command of the admin queue, or returns the work that will lead there.
    fn answer(
        &mut self,
        cid: u16,
        answer: Result<Answer, Status>,
        out: &mut impl Responder,
    ) -> Option<InFlight> {
        match answer {
            Ok(Answer::Work(work)) => {
                let in_flight =
                    InFlight { cid, fused_with: None, bytes_written: 0, work, begun: None };
                return Some(in_flight);
            }
            Ok(Answer::Done(result)) => self.done(cid, result, out),
            Ok(Answer::Data(data)) => {
                let cqe = self.cqe(cid, Status::SUCCESS, 0);
                out.data(cqe, &mut vec![Piece::Data(data.into())]);
            }
            Ok(Answer::Later) => {}
            Err(status) => self.fail(cid, status, out),
        }
        None
    }

    fn reply_data(&mut self, cid: u16, pieces: &mut Vec<Piece>, out: &mut impl Responder) {
        self.tally.bytes_read += pieces.iter().map(|piece| bytes_u64(piece.len())).sum::<u64>();
        let cqe = self.cqe(cid, Status::SUCCESS, 0);
        out.data(cqe, pieces);
    }

    fn done(&mut self, cid: u16, result: u64, out: &mut impl Responder) {
        let cqe = self.cqe(cid, Status::SUCCESS, result);
        out.complete(cqe);
    }

    fn fail(&mut self, cid: u16, status: Status, out: &mut impl Responder) {
        self.tally.errors += 1;
        let cqe = self.cqe(cid, status, 0);
        out.complete(cqe);
    }

    fn cqe(&mut self, cid: u16, status: Status, result: u64) -> Cqe {
        self.head = match (self.flow_control, self.head) {
            (false, _) => SQ_HEAD_NONE,
            (true, head) if head >= self.entries => 0,
            (true, head) => head + 1,
        };
        Cqe { result, sq_head: self.head, sq_id: self.id, cid, status }
    }

    /// Takes in what volumes were added, resized or removed, and what the host may still have.
    fn refresh(&mut self) {
        // The directory outlives its queues; if not, nothing changes any more.
        if !self.changes.has_changed().unwrap_or(false) {
            return;
        }
        let Some(controller) = self.controller().cloned() else { return };
        self.changes.mark_unchanged();
        let identity = controller.identity();
        self.namespaces = self.subsystem.namespaces(&identity.host_nqn).used_by(identity.host());
        let Role::Admin(_, admin) = &mut self.role else { return };
        if identity.kind == Kind::Io && !self.subsystem.admits(&identity.host_nqn, self.path.host) {
            let (host, controller_id) = (&identity.host_nqn, controller.id());
            tracing::info!(host, controller = controller_id, "NVMe host is let in no longer");
            controller.end();
        }
        admin.directory_changed(&self.subsystem, identity, &self.namespaces);
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.report();
        match &self.role {
            Role::Fresh => {}
            Role::Admin(controller, _) => self.subsystem.remove_controller(controller),
            Role::Io(controller) => controller.close_io_queue(self.id),
        }
    }
}

/// A command on a volume begins, which came at `arrival`.
fn begun(namespaces: &Namespaces, sqe: &Sqe, arrival: Instant) -> Option<Begun> {
    let requests = Arc::clone(namespaces.find(sqe.nsid())?.volume.requests());
    let bytes = io::counted_bytes(namespaces, sqe);
    Some(Begun::new(requests, io::operation(sqe.opcode()), bytes, arrival, Instant::now()))
}

/// A command being executed.
///
/// # Cancellation
/// As [`Work`].
pub struct InFlight {
    cid: u16,
    /// The Compare that is executed with it.
    fused_with: Option<u16>,
    bytes_written: u64,
    work: Work,
    /// `None` for commands that are on no volume.
    begun: Option<Begun>,
}

impl Future for InFlight {
    type Output = Completed;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Completed> {
        let Self { cid, fused_with, bytes_written, work, begun } = self.get_mut();
        let step = || Pin::new(work).poll(cx);
        let outcome = match begun {
            Some(begun) => ready!(begun.stages.during(step)),
            None => ready!(step()),
        };
        let (cid, fused_with, bytes_written) = (*cid, *fused_with, *bytes_written);
        Poll::Ready(Completed { cid, fused_with, bytes_written, outcome, begun: begun.take() })
    }
}

/// A finished command, to be completed.
pub struct Completed {
    cid: u16,
    fused_with: Option<u16>,
    bytes_written: u64,
    outcome: Result<Outcome, Status>,
    begun: Option<Begun>,
}

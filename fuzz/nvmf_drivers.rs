//! What the NVMe/TCP fuzzer runs, shared by `tests/fuzz_nvmf.rs` and the libFuzzer target beside
//! it.
//!
//! The driver takes arbitrary bytes, plays the host with them on a fresh, an admin or an I/O queue,
//! and judges what comes back as a strict host would: every PDU well formed, one completion per
//! command, data of the length asked for, memory bounded. It panics on any violation.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use weft::target::nvmf::controller::Identity;
use weft::target::nvmf::controller::Kind;
use weft::target::nvmf::queue::Queue;
use weft::target::nvmf::queue::Transfer;
use weft::target::nvmf::status::Status;
use weft::target::nvmf::subsystem::Subsystem;
use weft::target::nvmf::subsystem::SubsystemOptions;
use weft::target::nvmf::tcp::framing::Data;
use weft::target::nvmf::tcp::framing::Event;
use weft::target::nvmf::tcp::framing::Framing;
use weft::target::nvmf::tcp::outbox::Outbox;
use weft::target::nvmf::transport::Path;
use weft::target::nvmf::wire::Sgl;
use weft::target::nvmf::wire::Sqe;
use weft::volume::memory::MemoryDirectory;
use weft::volume::memory::MemoryVolume;

/// Bytes in each volume: small, so that commands often straddle its end.
pub const VOLUME_BYTES: u64 = 256 * 1024;
/// Asynchronous Event Request.
const EVENT_REQUEST: u8 = 0x0c;
/// The host of every connection.
const HOST_NQN: &str = "nqn.fuzz";
const HOST_ID: [u8; 16] = [7; 16];

/// Namespace 1 of 512-byte blocks, and namespace 2, read-only, of 4096-byte blocks.
fn subsystem() -> Arc<Subsystem> {
    let first = MemoryVolume::new("a", VOLUME_BYTES).with_identity(1, 512);
    let second = MemoryVolume::new("b", VOLUME_BYTES).with_identity(2, 4096).read_only();
    let directory = MemoryDirectory::new([Arc::new(first) as _, Arc::new(second) as _]);
    let options = SubsystemOptions::new(uuid::Uuid::from_u128(7));
    Arc::new(Subsystem::new(Arc::new(directory), options))
}

/// ICReq, with digests and alignment.
pub fn ic_req(digests: u8, alignment: u8) -> Vec<u8> {
    let mut pdu = vec![0; 128];
    pdu[2] = 128;
    pdu[4] = 128;
    pdu[10] = alignment;
    pdu[11] = digests;
    pdu
}

/// A capsule, or any other PDU, without digests.
pub fn pdu(kind: u8, flags: u8, specific: &[u8], data: &[u8]) -> Vec<u8> {
    let header = u8::try_from(8 + specific.len()).unwrap();
    let total = u32::try_from(usize::from(header) + data.len()).unwrap();
    let offset = if data.is_empty() { 0 } else { header };
    let mut pdu = vec![kind, flags, header, offset];
    pdu.extend(total.to_le_bytes());
    pdu.extend(specific);
    pdu.extend(data);
    pdu
}

/// A Connect for queue `qid`.
fn connect(nqn: &str, qid: u16, entries: u16, controller: u16) -> Vec<u8> {
    let mut sqe = [0; 64];
    sqe[0] = 0x7f;
    sqe[1] = 0x40;
    sqe[4] = 1;
    sqe[32..36].copy_from_slice(&1024_u32.to_le_bytes());
    sqe[39] = 1;
    sqe[42..44].copy_from_slice(&qid.to_le_bytes());
    sqe[44..46].copy_from_slice(&entries.to_le_bytes());
    let mut data = vec![0; 1024];
    data[..16].copy_from_slice(&HOST_ID);
    data[16..18].copy_from_slice(&controller.to_le_bytes());
    data[256..256 + nqn.len()].copy_from_slice(nqn.as_bytes());
    data[512..512 + HOST_NQN.len()].copy_from_slice(HOST_NQN.as_bytes());
    pdu(4, 0, &sqe, &data)
}

/// Property Set of CC.
fn enable() -> Vec<u8> {
    let mut sqe = [0; 64];
    sqe[0] = 0x7f;
    sqe[44] = 0x14;
    sqe[48..52].copy_from_slice(&0x0046_0001_u32.to_le_bytes());
    pdu(4, 0, &sqe, &[])
}

/// Plays a conversation. The first byte chooses the queue, the second how the stream is cut.
pub fn conversation(input: &[u8]) {
    let Some(([choice, cut], stream)) = input.split_first_chunk::<2>() else { return };
    let subsystem = subsystem();
    let mut host = Host::new(&subsystem);
    let nqn = subsystem.nqn().to_owned();
    // Keeps its place as the admin queue of the I/O queue's controller.
    let identity = Identity {
        kind: Kind::Io,
        subsystem_nqn: nqn.clone(),
        host_nqn: HOST_NQN.to_owned(),
        host_id: HOST_ID,
    };
    match choice % 3 {
        0 => {}
        1 => {
            let opening = [ic_req(0, 0), connect(&nqn, 0, 31, 0xffff), enable()].concat();
            host.play(&opening, opening.len());
        }
        _ => {
            let controller = subsystem.create_controller(identity, Duration::ZERO).unwrap();
            controller.set_property(0x14, false, 0x0046_0001).unwrap();
            let opening = [ic_req(0, 0), connect(&nqn, 1, 63, controller.id())].concat();
            host.play(&opening, opening.len());
        }
    }
    host.play(stream, usize::from(*cut) + 1);
    host.judge_the_end();
}

/// One connection, with the strict host on its other end.
struct Host {
    framing: Framing,
    queue: Queue,
    out: Outbox,
    /// Commands sent and not answered, by identifier: how many, and bytes each asked for.
    outstanding: BTreeMap<u16, Vec<Expected>>,
    header_digest: usize,
    data_digest: bool,
    /// Data granted and not yet whole, in bytes.
    granted: u64,
    ended: bool,
}

struct Expected {
    data: u32,
    may_wait: bool,
    granted: bool,
}

impl Host {
    fn new(subsystem: &Arc<Subsystem>) -> Self {
        let portal: SocketAddr = "127.0.0.1:4420".parse().unwrap();
        let path = Path { portal, host: portal.ip() };
        Self {
            framing: Framing::default(),
            queue: Queue::new(Arc::clone(subsystem), path, true),
            out: Outbox::default(),
            outstanding: BTreeMap::new(),
            header_digest: 0,
            data_digest: false,
            granted: 0,
            ended: false,
        }
    }

    fn play(&mut self, stream: &[u8], cut: usize) {
        let mut held = Vec::new();
        for part in stream.chunks(cut) {
            if self.ended {
                return;
            }
            held.extend_from_slice(part);
            loop {
                let mut input = held.as_slice();
                let event = self.framing.next(&mut input);
                held = input.to_vec();
                if event == Event::NeedBytes {
                    assert!(held.len() < 128, "{} bytes left", held.len());
                    break;
                }
                if !self.take(event) {
                    self.ended = true;
                    return;
                }
                self.judge();
            }
        }
    }

    /// What the connection does with an event; false at the end.
    fn take(&mut self, event: Event) -> bool {
        match event {
            Event::NeedBytes => {}
            Event::Begin(agreed) => {
                self.header_digest = agreed.header_digest_bytes();
                self.data_digest = agreed.data_digest;
                self.out.begin(agreed);
            }
            Event::Command(sqe, data) => return self.command(sqe, data),
            Event::Received(sqe, data, _) => {
                if let Sgl::Transport { length } = sqe.sgl() {
                    self.granted -= u64::from(length);
                }
                let waiting = self.outstanding.get_mut(&sqe.cid()).unwrap();
                waiting.iter_mut().find(|expected| expected.granted).unwrap().granted = false;
                match data {
                    Data::Good(data) => self.execute(&sqe, data),
                    Data::Damaged => {
                        self.queue.refuse(&sqe, Status::TRANSIENT_TRANSPORT, &mut self.out);
                    }
                }
            }
            Event::HostTerminated(_) => return false,
            Event::Fatal(fatal) => {
                assert!(!fatal.header.is_empty() && fatal.header.len() <= 128);
                self.out.terminate(&fatal);
                let mut flat = flat(&mut self.out);
                assert_eq!(flat.remove(0), 3);
                assert_eq!(flat.len() + 1, 24 + fatal.header.len());
                return false;
            }
        }
        true
    }

    fn command(&mut self, sqe: Sqe, data: Data) -> bool {
        let waiting: usize = self.outstanding.values().map(Vec::len).sum();
        if waiting >= self.queue.depth() {
            return false;
        }
        let transfer = self.queue.transfer(&sqe);
        let wanted = match transfer {
            Ok(Transfer::ToHost(bytes)) => bytes,
            _ => 0,
        };
        let to_grant = matches!(
            (transfer, sqe.sgl(), &data),
            (Ok(Transfer::FromHost(_)), Sgl::Transport { .. }, Data::Good(_))
        );
        // For an event, or for the other half of a fused pair.
        let may_wait = sqe.opcode() == EVENT_REQUEST || sqe.fuse() != 0;
        let expected = Expected { data: wanted, may_wait, granted: to_grant };
        self.outstanding.entry(sqe.cid()).or_default().push(expected);
        match (transfer, data) {
            (Err(status), _) => self.queue.refuse(&sqe, status, &mut self.out),
            (Ok(_), Data::Damaged) => {
                self.queue.refuse(&sqe, Status::TRANSIENT_TRANSPORT, &mut self.out);
            }
            (Ok(Transfer::FromHost(bytes)), Data::Good(_)) if to_grant => {
                assert!((1..=1 << 20).contains(&bytes), "a grant of {bytes}");
                self.granted += u64::from(bytes);
                let arrival = self.queue.timing().arrival();
                let tag = self.framing.grant(sqe, bytes, arrival);
                self.out.ready_to_transfer(sqe.cid(), tag, bytes);
            }
            (Ok(Transfer::FromHost(bytes)), Data::Good(data))
                if usize::try_from(bytes) != Ok(data.len()) =>
            {
                self.queue.refuse(&sqe, Status::SGL_LENGTH_INVALID, &mut self.out);
            }
            (Ok(_), Data::Good(data)) => self.execute(&sqe, data),
        }
        true
    }

    fn execute(&mut self, sqe: &Sqe, data: Bytes) {
        let arrival = self.queue.timing().arrival();
        if let Some(work) = self.queue.execute(sqe, data, arrival, &mut self.out) {
            let completed = work.now_or_never().expect("memory answers at once");
            self.queue.complete(completed, &mut self.out);
        }
    }

    /// Takes everything sent apart.
    fn judge(&mut self) {
        let sent = flat(&mut self.out);
        let mut rest = &sent[..];
        while !rest.is_empty() {
            let total = u32::from_le_bytes(rest[4..8].try_into().unwrap());
            let (pdu, after) = rest.split_at(usize::try_from(total).unwrap());
            rest = after;
            let cid = u16::from_le_bytes([pdu[8], pdu[9]]);
            match pdu[0] {
                1 => assert_eq!(pdu.len(), 128),
                5 => {
                    assert_eq!(pdu.len(), 24 + self.header_digest);
                    self.answered(u16::from_le_bytes([pdu[20], pdu[21]]), None);
                }
                7 => {
                    assert_eq!(pdu[1] & 0b1100, 0b1100, "last, and a success");
                    let length = u32::from_le_bytes(pdu[16..20].try_into().unwrap());
                    let start = usize::from(pdu[3]);
                    let digest = if self.data_digest { 4 } else { 0 };
                    assert_eq!(pdu.len(), start + usize::try_from(length).unwrap() + digest);
                    self.answered(cid, Some(length));
                }
                9 => assert_eq!(pdu.len(), 24 + self.header_digest),
                kind => panic!("a PDU of type {kind}"),
            }
        }
    }

    fn answered(&mut self, cid: u16, data: Option<u32>) {
        let waiting = self.outstanding.get_mut(&cid).expect("an answer nobody waits for");
        // A host that uses one identifier twice cannot tell the answers apart: take it for the
        // newest command, which is answered at once unless it waits for an event or for data.
        let fits = |expected: &Expected| {
            !expected.granted && data.is_none_or(|length| expected.data == length)
        };
        let index = waiting
            .iter()
            .rposition(|expected| fits(expected) && !expected.may_wait)
            .or_else(|| waiting.iter().rposition(fits));
        waiting.remove(index.expect("no command asked for so much"));
        if waiting.is_empty() {
            self.outstanding.remove(&cid);
        }
    }

    /// Everything was answered but what waits for an event, for data or for its other half; a reset forgets the
    /// former, which then looks the same.
    fn judge_the_end(&self) {
        if self.ended {
            return;
        }
        for (cid, waiting) in &self.outstanding {
            let excused = |expected: &Expected| expected.may_wait || expected.granted;
            assert!(waiting.iter().all(excused), "command {cid:#x} was not answered");
        }
        let depth = u64::try_from(self.queue.depth()).unwrap();
        assert!(self.granted <= depth << 20);
    }
}

fn flat(out: &mut Outbox) -> Vec<u8> {
    let mut bytes = Vec::new();
    while !out.gather.is_empty() {
        let slices = out.gather.slices();
        let sent = slices.iter().map(|slice| slice.len()).sum();
        slices.iter().for_each(|slice| bytes.extend_from_slice(slice));
        out.gather.sent(sent);
    }
    bytes
}

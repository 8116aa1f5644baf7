//! An NVMe/TCP initiator that knows no more than these tests need. It is written from the
//! specification, not with the target's own types, so that a shared mistake shows.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crc_fast::CrcAlgorithm;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tokio::runtime;
use tokio::task::JoinHandle;
use tokio::task::LocalSet;
use tokio::task::spawn_local;
use tokio::time::timeout;
use uuid::Uuid;
use weft::target::nvmf::subsystem::Subsystem;
use weft::target::nvmf::subsystem::SubsystemOptions;
use weft::target::nvmf::subsystem::UnknownHosts;
use weft::target::nvmf::tcp::NvmeTcpOptions;
use weft::target::nvmf::tcp::NvmeTcpTarget;
use weft::volume::memory::MemoryDirectory;
use weft::volume::memory::MemoryVolume;

/// Longest any step may take; far above what it does take.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Long enough for the target to do what it is going to do.
pub const A_MOMENT: Duration = Duration::from_millis(50);
pub const DISCOVERY_NQN: &str = "nqn.2014-08.org.nvmexpress.discovery";
pub const HOST_NQN: &str = "nqn.2014-08.org.nvmexpress:uuid:6a3f6f0c-1d2e-4c57-9f0a-0e5a5d0e2f6b";

pub const WRITE: u8 = 1;
pub const READ: u8 = 2;

pub mod kind {
    pub const IC_RESP: u8 = 1;
    pub const TERM_REQ: u8 = 3;
    pub const RESPONSE: u8 = 5;
    pub const DATA: u8 = 7;
    pub const R2T: u8 = 9;
}

/// Runs a test on a runtime like a data-plane thread's.
pub fn run(test: impl Future<Output = ()>) {
    let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let limited = async { timeout(4 * PATIENCE, test).await.expect("the test hangs") };
    LocalSet::new().block_on(&runtime, limited);
}

/// A target over one volume, namespace 1, of 64 MiB in blocks of 512 bytes.
pub struct Served {
    pub target: Arc<NvmeTcpTarget>,
    pub volume: Arc<MemoryVolume>,
    pub directory: Arc<MemoryDirectory>,
    pub nqn: String,
}

pub fn serve(options: NvmeTcpOptions) -> Served {
    serve_to(UnknownHosts::Loopback, options)
}

/// The same, for hosts that were not added from there.
pub fn serve_to(unknown_hosts: UnknownHosts, options: NvmeTcpOptions) -> Served {
    serve_volume(MemoryVolume::new("v", 64 << 20), unknown_hosts, options)
}

/// The same, with this as the volume.
pub fn serve_volume(
    volume: MemoryVolume,
    unknown_hosts: UnknownHosts,
    options: NvmeTcpOptions,
) -> Served {
    let volume = Arc::new(volume);
    let directory = Arc::new(MemoryDirectory::new([Arc::clone(&volume) as _]));
    let subsystem = SubsystemOptions { unknown_hosts, ..SubsystemOptions::new(Uuid::from_u128(7)) };
    let subsystem = Subsystem::new(Arc::clone(&directory) as _, subsystem);
    let nqn = subsystem.nqn().to_owned();
    let target = Arc::new(NvmeTcpTarget::new(Arc::new(subsystem), options));
    Served { target, volume, directory, nqn }
}

pub async fn ended(session: JoinHandle<()>) {
    timeout(PATIENCE, session).await.expect("the session goes on").unwrap();
}

/// A PDU from the target, its digests checked and taken off.
#[derive(Debug)]
pub struct Pdu {
    pub kind: u8,
    pub flags: u8,
    /// What follows the first eight bytes of the header.
    pub specific: Vec<u8>,
    pub data: Vec<u8>,
}

impl Pdu {
    pub fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.specific[at..at + 2].try_into().unwrap())
    }

    pub fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.specific[at..at + 4].try_into().unwrap())
    }

    /// Of a completion: the command and its status with DNR, without the phase.
    pub fn status(&self) -> (u16, u16) {
        assert_eq!(self.kind, kind::RESPONSE, "{self:?}");
        (self.u16(12), self.u16(14) >> 1)
    }
}

/// A connection of the host.
pub struct Host {
    pub stream: TcpStream,
    pub header_digest: bool,
    pub data_digest: bool,
    /// The address connected to.
    pub portal: SocketAddr,
    /// Every byte of the host's identifier.
    pub identity: u8,
}

/// The identifier of hosts that do not choose another.
pub const IDENTITY: u8 = 0x11;

fn crc(bytes: &[u8]) -> [u8; 4] {
    u32::try_from(crc_fast::checksum(CrcAlgorithm::Crc32Iscsi, bytes)).unwrap().to_le_bytes()
}

/// A submission queue entry: opcode, command, namespace, dwords from 10 on, data by SGL.
pub fn sqe(opcode: u8, cid: u16, nsid: u32, dwords: &[u32], sgl_kind: u8, length: u32) -> Vec<u8> {
    let mut sqe = vec![0; 64];
    sqe[0] = opcode;
    sqe[1] = 0x40;
    sqe[2..4].copy_from_slice(&cid.to_le_bytes());
    sqe[4..8].copy_from_slice(&nsid.to_le_bytes());
    sqe[32..36].copy_from_slice(&length.to_le_bytes());
    sqe[39] = sgl_kind;
    for (place, dword) in sqe[40..].chunks_exact_mut(4).zip(dwords) {
        place.copy_from_slice(&dword.to_le_bytes());
    }
    sqe
}

/// A read or write of `blocks` from `lba`, its data moved by the transport.
pub fn io(opcode: u8, cid: u16, lba: u32, blocks: u32) -> Vec<u8> {
    sqe(opcode, cid, 1, &[lba, 0, blocks - 1], 0x5a, blocks * 512)
}

pub fn ic_req(digests: u8, alignment: u8) -> Vec<u8> {
    let mut pdu = vec![0; 128];
    pdu[2] = 128;
    pdu[4] = 128;
    pdu[10] = alignment;
    pdu[11] = digests;
    pdu
}

impl Host {
    /// Opens a connection; the handle ends with the session.
    pub async fn open(target: &Arc<NvmeTcpTarget>) -> (Self, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let portal = listener.local_addr().unwrap();
        let stream = TcpStream::connect(portal).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let (theirs, _) = listener.accept().await.unwrap();
        let session = spawn_local(Arc::clone(target).serve(theirs));
        let (header_digest, data_digest, identity) = (false, false, IDENTITY);
        (Self { stream, header_digest, data_digest, portal, identity }, session)
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    pub async fn receive(&mut self, bytes: usize) -> Vec<u8> {
        let mut buffer = vec![0; bytes];
        let received = timeout(PATIENCE, self.stream.read_exact(&mut buffer)).await;
        received.expect("no answer").unwrap();
        buffer
    }

    /// Whether the target closed, with nothing more to say.
    pub async fn closed(&mut self) -> bool {
        let mut rest = [0; 1];
        let read = timeout(PATIENCE, self.stream.read(&mut rest)).await.expect("still open");
        read.is_err() || read.is_ok_and(|bytes| bytes == 0)
    }

    /// Whether nothing comes.
    pub async fn silent(&mut self) -> bool {
        timeout(A_MOMENT, self.stream.peek(&mut [0])).await.is_err()
    }

    /// Initialises the connection.
    pub async fn begin(&mut self, digests: u8) {
        self.send(&ic_req(digests, 0)).await;
        let response = self.receive(128).await;
        assert_eq!(response[..8], [kind::IC_RESP, 0, 128, 0, 128, 0, 0, 0]);
        assert_eq!(response[8..12], [0, 0, 0, digests]);
        let most = u32::from_le_bytes(response[12..16].try_into().unwrap());
        assert!(most >= 4096 && most.is_multiple_of(4));
        self.header_digest = digests & 1 != 0;
        self.data_digest = digests & 2 != 0;
    }

    /// A PDU as it goes on the wire.
    pub fn pdu(&self, kind: u8, flags: u8, specific: &[u8], data: &[u8]) -> Vec<u8> {
        let header = 8 + specific.len();
        let start = header + if self.header_digest { 4 } else { 0 };
        let data_digest = self.data_digest && !data.is_empty();
        let total = start + data.len() + if data_digest { 4 } else { 0 };
        let flags = flags | u8::from(self.header_digest) | u8::from(data_digest) << 1;
        let offset = if data.is_empty() { 0 } else { start };
        let byte = |value: usize| u8::try_from(value).unwrap();
        let mut pdu = vec![kind, flags, byte(header), byte(offset)];
        pdu.extend(u32::try_from(total).unwrap().to_le_bytes());
        pdu.extend(specific);
        if self.header_digest {
            let digest = crc(&pdu);
            pdu.extend(digest);
        }
        pdu.extend(data);
        if data_digest {
            pdu.extend(crc(data));
        }
        pdu
    }

    pub async fn command(&mut self, sqe: &[u8], data: &[u8]) {
        let pdu = self.pdu(4, 0, sqe, data);
        self.send(&pdu).await;
    }

    /// H2CData in answer to an R2T.
    pub fn h2c(&self, cid: u16, tag: u16, offset: u32, data: &[u8], last: bool) -> Vec<u8> {
        let mut specific = cid.to_le_bytes().to_vec();
        specific.extend(tag.to_le_bytes());
        specific.extend(offset.to_le_bytes());
        specific.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
        specific.extend([0; 4]);
        self.pdu(6, if last { 4 } else { 0 }, &specific, data)
    }

    pub async fn next(&mut self) -> Pdu {
        let common = self.receive(8).await;
        let [kind, flags, header, offset] = common[..4].try_into().unwrap();
        let total = u32::from_le_bytes(common[4..].try_into().unwrap());
        let total = usize::try_from(total).unwrap();
        let specific = self.receive(usize::from(header) - 8).await;
        let mut at = usize::from(header);
        let is_term_req = kind == kind::TERM_REQ;
        if self.header_digest && !is_term_req {
            assert_eq!(flags & 1, 1);
            let digest = self.receive(4).await;
            assert_eq!(digest, crc(&[&common[..], &specific].concat()));
            at += 4;
        }
        if offset != 0 {
            let padding = usize::from(offset) - at;
            self.receive(padding).await;
            at += padding;
        }
        let data_digest = flags & 2 != 0;
        assert_eq!(data_digest, self.data_digest && kind == kind::DATA);
        let data_bytes = total - at - if data_digest { 4 } else { 0 };
        let data = self.receive(data_bytes).await;
        if data_digest {
            assert_eq!(self.receive(4).await, crc(&data));
        }
        Pdu { kind, flags, specific, data }
    }

    /// The next completion, which must be a success; its result.
    pub async fn success(&mut self, cid: u16) -> u32 {
        let pdu = self.next().await;
        assert_eq!(pdu.status(), (cid, 0));
        pdu.u32(0)
    }

    /// The next data, which must be all of a command's and end it.
    pub async fn data(&mut self, cid: u16) -> Vec<u8> {
        let pdu = self.next().await;
        assert_eq!((pdu.kind, pdu.u16(0)), (kind::DATA, cid), "{:?}", pdu.specific);
        assert_eq!(pdu.flags & 0b1100, 0b1100, "last, and a success");
        assert_eq!(pdu.u32(4), 0, "from the beginning");
        assert_eq!(usize::try_from(pdu.u32(8)).unwrap(), pdu.data.len());
        pdu.data
    }

    /// The C2HTermReq that must come: its FES and FEI.
    pub async fn terminated(&mut self) -> (u16, u32) {
        loop {
            let pdu = self.next().await;
            if pdu.kind == kind::TERM_REQ {
                assert!((1..=128).contains(&pdu.data.len()), "a part of the header");
                let fei = u32::from_le_bytes(pdu.specific[2..6].try_into().unwrap());
                return (pdu.u16(0), fei);
            }
        }
    }

    /// Connects a queue and returns the controller's number.
    pub async fn connect(&mut self, nqn: &str, qid: u16, entries: u16, controller: u16) -> u16 {
        let mut data = connect_data(nqn, controller);
        data[..16].fill(self.identity);
        self.command(&connect_sqe(qid, entries, 0), &data).await;
        let id = self.success(0xc0de).await;
        u16::try_from(id & 0xffff).unwrap()
    }

    /// Connects and enables an admin queue.
    pub async fn admin(served: &Served, digests: u8) -> (Self, u16, JoinHandle<()>) {
        let (mut host, session) = Self::open(&served.target).await;
        host.begin(digests).await;
        let id = host.connect(&served.nqn, 0, 31, 0xffff).await;
        host.set_property(0x14, 0x0046_0001).await;
        assert_eq!(host.property(0x1c).await & 1, 1, "ready");
        (host, id, session)
    }

    /// Connects an I/O queue to a controller.
    pub async fn queue(
        served: &Served,
        controller: u16,
        qid: u16,
        digests: u8,
    ) -> (Self, JoinHandle<()>) {
        let (mut host, session) = Self::open(&served.target).await;
        host.begin(digests).await;
        assert_eq!(host.connect(&served.nqn, qid, 127, controller).await, controller);
        (host, session)
    }

    pub async fn property(&mut self, offset: u32) -> u32 {
        let mut get = sqe(0x7f, 1, 0, &[0, offset], 0x5a, 0);
        get[4] = 4;
        self.command(&get, &[]).await;
        self.success(1).await
    }

    pub async fn set_property(&mut self, offset: u32, value: u32) {
        let set = sqe(0x7f, 2, 0, &[0, offset, value], 0x5a, 0);
        self.command(&set, &[]).await;
        self.success(2).await;
    }

    /// Reads and returns the data.
    pub async fn read(&mut self, cid: u16, lba: u32, blocks: u32) -> Vec<u8> {
        self.command(&io(READ, cid, lba, blocks), &[]).await;
        self.data(cid).await
    }

    /// Writes with the data in the capsule.
    pub async fn write_in_capsule(&mut self, cid: u16, lba: u32, data: &[u8]) {
        let length = u32::try_from(data.len()).unwrap();
        let sqe = sqe(WRITE, cid, 1, &[lba, 0, length / 512 - 1], 0x01, length);
        self.command(&sqe, data).await;
        self.success(cid).await;
    }

    /// Writes with data asked for by R2T, in parts of `part` bytes.
    pub async fn write(&mut self, cid: u16, lba: u32, data: &[u8], part: usize) {
        let length = u32::try_from(data.len()).unwrap();
        self.command(&io(WRITE, cid, lba, length / 512), &[]).await;
        self.send_asked(cid, data, part).await;
        self.success(cid).await;
    }

    /// Takes the R2T for a command and sends what it asks for.
    pub async fn send_asked(&mut self, cid: u16, data: &[u8], part: usize) {
        let r2t = self.next().await;
        assert_eq!((r2t.kind, r2t.u16(0)), (kind::R2T, cid));
        assert_eq!((r2t.u32(4), usize::try_from(r2t.u32(8)).unwrap()), (0, data.len()));
        let mut at = 0;
        for chunk in data.chunks(part) {
            let last = at + chunk.len() == data.len();
            let pdu = self.h2c(cid, r2t.u16(2), u32::try_from(at).unwrap(), chunk, last);
            self.send(&pdu).await;
            at += chunk.len();
        }
    }

    /// Identify.
    pub async fn identify(&mut self, structure: u32, nsid: u32) -> Vec<u8> {
        self.command(&sqe(6, 7, nsid, &[structure], 0x5a, 4096), &[]).await;
        self.data(7).await
    }

    /// Get Log Page, from the beginning.
    pub async fn log(&mut self, id: u32, bytes: u32) -> Vec<u8> {
        let dwords = bytes / 4 - 1;
        self.command(&sqe(2, 8, u32::MAX, &[id | dwords << 16], 0x5a, bytes), &[]).await;
        self.data(8).await
    }
}

pub fn connect_sqe(qid: u16, entries: u16, keep_alive_ms: u32) -> Vec<u8> {
    let mut sqe = sqe(0x7f, 0xc0de, 0, &[u32::from(qid) << 16, u32::from(entries)], 0x01, 1024);
    sqe[4] = 1;
    sqe[48..52].copy_from_slice(&keep_alive_ms.to_le_bytes());
    sqe
}

pub fn connect_data(nqn: &str, controller: u16) -> Vec<u8> {
    let mut data = vec![0; 1024];
    data[..16].fill(IDENTITY);
    data[16..18].copy_from_slice(&controller.to_le_bytes());
    data[256..256 + nqn.len()].copy_from_slice(nqn.as_bytes());
    data[512..512 + HOST_NQN.len()].copy_from_slice(HOST_NQN.as_bytes());
    data
}

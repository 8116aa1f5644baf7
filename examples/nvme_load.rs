//! Loads one NVMe/TCP namespace with random reads or writes at a fixed depth, and counts.
//!
//! `cargo run --release --example nvme_load -- --tcp 127.0.0.1:4420 --depth 32 --seconds 3`
//!
//! One admin queue, then an I/O queue for each connection, as a host has one for each processor.
//! No digests, SQ flow control disabled. (NVMe/TCP Transport 1.0; NVMe-oF 1.1, 3.3)

use std::io;
use std::io::Read;
use std::io::Write;
use std::net::SocketAddr;
use std::net::TcpStream;
use std::process::ExitCode;

use clap::Parser;

mod load;

use load::Connection;
use load::Load;
use load::LoadOptions;
use load::Protocol;
use load::Reply;
use load::Request;
use weft::units::bytes_usize;

const DISCOVERY_NQN: &str = "nqn.2014-08.org.nvmexpress.discovery";
const HOST_NQN: &str = "nqn.2014-08.org.nvmexpress:uuid:6c6f6164-0000-4000-8000-000000000001";
/// Bytes of a capsule's data that we use (IOCCSZ of Linux's and our target): longer data waits for
/// its R2T.
const IN_CAPSULE_BYTES_MAX: u32 = 8192;

/// PDU types. (NVMe/TCP 1.0, figure 9)
const CAPSULE_CMD: u8 = 4;
const CAPSULE_RESP: u8 = 5;
const H2C_DATA: u8 = 6;
const C2H_DATA: u8 = 7;
const R2T: u8 = 9;
const FLAG_LAST: u8 = 1 << 2;
const FLAG_SUCCESS: u8 = 1 << 3;

/// Bytes of every header that comes from the target.
const HEAD_BYTES: usize = 24;

const OPCODE_WRITE: u8 = 1;
const OPCODE_READ: u8 = 2;
const OPCODE_GET_LOG_PAGE: u8 = 2;
const OPCODE_IDENTIFY: u8 = 6;
const OPCODE_FABRICS: u8 = 0x7f;
/// SGL descriptors: data in the capsule, data moved by the transport.
const SGL_IN_CAPSULE: u8 = 0x01;
const SGL_TRANSPORT: u8 = 0x5a;

/// Random reads or writes over NVMe/TCP I/O queues.
#[derive(Parser)]
struct Arguments {
    /// TCP address of the target.
    #[arg(long)]
    tcp: SocketAddr,
    /// Subsystem; by default the first that the target's discovery log names.
    #[arg(long)]
    nqn: Option<String>,
    /// Namespace.
    #[arg(long, default_value_t = 1)]
    nsid: u32,
    /// Write instead of reading.
    #[arg(long)]
    write: bool,
    /// Read what is there already instead of writing the span first.
    #[arg(long)]
    no_fill: bool,
    #[command(flatten)]
    load: LoadOptions,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match load(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn load(arguments: &Arguments) -> io::Result<()> {
    let nqn = match &arguments.nqn {
        Some(nqn) => nqn.clone(),
        None => discover(arguments.tcp)?,
    };
    let mut admin = Queue::connect(arguments.tcp, &nqn, 0, 32, 0xffff)?;
    admin.enable()?;
    let block_shift = admin.block_shift(arguments.nsid)?;
    let connect = |qid| {
        // A queue of n entries takes n - 1 commands, and none may have fewer than two.
        let entries = arguments.load.depth.min(1023) + 1;
        let queue = Queue::connect(arguments.tcp, &nqn, qid, entries, admin.controller)?;
        let nvme = Nvme { nsid: arguments.nsid, block_shift };
        Ok(Connection::new(Box::new(queue.stream), nvme, arguments.load.depth))
    };
    let connections = (1..=arguments.load.connections).map(connect);
    let mut load = Load::new(connections.collect::<io::Result<_>>()?, &arguments.load);
    if !arguments.write && !arguments.no_fill {
        load.fill()?;
    }
    load.measure(arguments.write)
}

/// The name of the first NVM subsystem in the discovery log. (NVMe-oF 1.1, 5.3)
fn discover(address: SocketAddr) -> io::Result<String> {
    const ENTRY_BYTES: usize = 1024;
    const NVM_SUBSYSTEM: u8 = 2;
    let mut admin = Queue::connect(address, DISCOVERY_NQN, 0, 32, 0xffff)?;
    admin.enable()?;
    let bytes = 8 * ENTRY_BYTES;
    let dwords = u32::try_from(bytes / 4 - 1).map_err(io::Error::other)?;
    let page = admin.read(OPCODE_GET_LOG_PAGE, 0, &[0x70 | dwords << 16], bytes)?;
    let records = u64::from_le_bytes(array(&page, 8)?);
    let entries = page[ENTRY_BYTES..].chunks_exact(ENTRY_BYTES).take(bytes_usize(records));
    let nqn = entries.filter(|entry| entry[2] == NVM_SUBSYSTEM).map(|entry| {
        let name = entry[256..512].split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(name).trim_end().to_owned()
    });
    nqn.into_iter().next().ok_or_else(|| io::Error::other("the discovery log names no subsystem"))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> io::Result<[u8; N]> {
    let part = bytes.get(at..at + N).and_then(|part| part.try_into().ok());
    part.ok_or_else(|| io::Error::other("the target's answer is too short"))
}

/// A submission queue entry: dwords from 10 on, data by SGL.
fn sqe(opcode: u8, cid: u16, dword1: u32, dwords: &[u32], sgl: u8, bytes: u32) -> [u8; 64] {
    let mut sqe = [0; 64];
    sqe[0] = opcode;
    sqe[1] = 0x40;
    sqe[2..4].copy_from_slice(&cid.to_le_bytes());
    sqe[4..8].copy_from_slice(&dword1.to_le_bytes());
    sqe[32..36].copy_from_slice(&bytes.to_le_bytes());
    sqe[39] = sgl;
    for (place, dword) in sqe[40..].chunks_exact_mut(4).zip(dwords) {
        place.copy_from_slice(&dword.to_le_bytes());
    }
    sqe
}

/// Puts the header of a PDU whose specific part is `specific`, for `data_bytes` of data.
fn put_head(out: &mut Vec<u8>, kind: u8, flags: u8, specific: &[u8], data_bytes: u32) {
    let head = u8::try_from(8 + specific.len()).expect("headers are short");
    let data_offset = if data_bytes > 0 { head } else { 0 };
    out.extend_from_slice(&[kind, flags, head, data_offset]);
    out.extend_from_slice(&(u32::from(head) + data_bytes).to_le_bytes());
    out.extend_from_slice(specific);
}

/// A connected queue, used one command at a time.
struct Queue {
    stream: TcpStream,
    /// Its controller's number.
    controller: u16,
}

impl Queue {
    fn connect(
        address: SocketAddr,
        nqn: &str,
        qid: u16,
        entries: u16,
        controller: u16,
    ) -> io::Result<Self> {
        const DISABLE_FLOW_CONTROL: u32 = 1 << 18;
        let mut stream = load::connect_tcp(address)?;
        let mut ic_req = [0; 128];
        ic_req[2] = 128;
        ic_req[4] = 128;
        stream.write_all(&ic_req)?;
        stream.read_exact(&mut ic_req)?;
        let mut queue = Self { stream, controller };
        let mut data = [0; 1024];
        data[..4].copy_from_slice(b"load");
        data[16..18].copy_from_slice(&controller.to_le_bytes());
        data[256..256 + nqn.len()].copy_from_slice(nqn.as_bytes());
        data[512..512 + HOST_NQN.len()].copy_from_slice(HOST_NQN.as_bytes());
        let dwords = [u32::from(qid) << 16, u32::from(entries - 1) | DISABLE_FLOW_CONTROL];
        let connect = sqe(OPCODE_FABRICS, 0, 1, &dwords, SGL_IN_CAPSULE, 1024);
        let result = queue.command(&connect, &data)?;
        queue.controller = u16::from_le_bytes([result[0], result[1]]);
        Ok(queue)
    }

    /// Enables the controller; ours is ready at once, as the next command shows.
    fn enable(&mut self) -> io::Result<()> {
        const CC: u32 = 0x14;
        // Entries of 64 and 16 bytes, NVM command set, enabled.
        const ENABLED: u32 = 4 << 20 | 6 << 16 | 1;
        self.command(&sqe(OPCODE_FABRICS, 0, 0, &[0, CC, ENABLED], SGL_TRANSPORT, 0), &[])?;
        Ok(())
    }

    /// The logarithm of the namespace's block. (NVM Command Set 1.0, Identify Namespace)
    fn block_shift(&mut self, nsid: u32) -> io::Result<u8> {
        let page = self.read(OPCODE_IDENTIFY, nsid, &[0], 4096)?;
        let format = usize::from(page[26] & 15);
        let [shift] = array(&page, 128 + 4 * format + 2)?;
        if !(9..=12).contains(&shift) {
            return Err(io::Error::other(format!("no namespace {nsid} with a usable block")));
        }
        Ok(shift)
    }

    /// A command without data from the target; its completion's result.
    fn command(&mut self, sqe: &[u8; 64], data: &[u8]) -> io::Result<[u8; 8]> {
        self.send(sqe, data)?;
        let mut head = [0; HEAD_BYTES];
        self.stream.read_exact(&mut head)?;
        check_completion(&head)?;
        array(&head, 8)
    }

    /// A command that returns data, whole and in one PDU.
    fn read(&mut self, opcode: u8, nsid: u32, dwords: &[u32], bytes: usize) -> io::Result<Vec<u8>> {
        let length = u32::try_from(bytes).map_err(io::Error::other)?;
        self.send(&sqe(opcode, 0, nsid, dwords, SGL_TRANSPORT, length), &[])?;
        let mut head = [0; HEAD_BYTES];
        self.stream.read_exact(&mut head)?;
        if head[0] != C2H_DATA
            || head[1] & FLAG_SUCCESS == 0
            || array(&head, 16)? != length.to_le_bytes()
        {
            return Err(io::Error::other(format!("the target answered {head:?}")));
        }
        let mut data = vec![0; bytes];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }

    fn send(&mut self, sqe: &[u8; 64], data: &[u8]) -> io::Result<()> {
        let mut pdu = Vec::new();
        let data_bytes = u32::try_from(data.len()).map_err(io::Error::other)?;
        put_head(&mut pdu, CAPSULE_CMD, 0, sqe, data_bytes);
        pdu.extend_from_slice(data);
        self.stream.write_all(&pdu)
    }
}

/// Whether a header is of a completion, and of a good one.
fn check_completion(head: &[u8]) -> io::Result<()> {
    let status = u16::from_le_bytes(array(head, 22)?) >> 1;
    if head[0] == CAPSULE_RESP && status == 0 {
        return Ok(());
    }
    Err(io::Error::other(format!("the target answered {head:?}")))
}

/// I/O commands; the command identifier is the tag.
struct Nvme {
    nsid: u32,
    block_shift: u8,
}

impl Protocol for Nvme {
    const HEAD_BYTES: usize = HEAD_BYTES;

    fn put(&mut self, out: &mut Vec<u8>, request: &Request) {
        let block = (request.offset >> self.block_shift).to_le_bytes();
        let [a, b, c, d, e, f, g, h] = block;
        let first = [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])];
        let dwords = [first[0], first[1], (request.bytes >> self.block_shift) - 1];
        let in_capsule = request.write && request.bytes <= IN_CAPSULE_BYTES_MAX;
        let sgl = if in_capsule { SGL_IN_CAPSULE } else { SGL_TRANSPORT };
        let opcode = if request.write { OPCODE_WRITE } else { OPCODE_READ };
        let sqe = sqe(opcode, request.tag, self.nsid, &dwords, sgl, request.bytes);
        put_head(out, CAPSULE_CMD, 0, &sqe, if in_capsule { request.bytes } else { 0 });
        if in_capsule {
            load::put_data(out, request);
        }
    }

    fn reply(&mut self, head: &[u8], requests: &[Request], out: &mut Vec<u8>) -> io::Result<Reply> {
        let tag_at = if head[0] == CAPSULE_RESP { 20 } else { 8 };
        let tag = u16::from_le_bytes(array(head, tag_at)?);
        let request = requests.get(usize::from(tag)).copied().unwrap_or_default();
        match head[0] {
            C2H_DATA if head[1] & FLAG_SUCCESS != 0 => {
                let data_bytes = u32::from_le_bytes(array(head, 16)?);
                if data_bytes != request.bytes {
                    return Err(io::Error::other("data of another length than asked for"));
                }
                Ok(Reply::Done { tag, data_bytes: data_bytes as usize })
            }
            R2T => {
                // CCCID and TTAG as they came, offset 0, all of the data.
                let mut specific = [0; 16];
                specific[..4].copy_from_slice(&head[8..12]);
                specific[8..12].copy_from_slice(&request.bytes.to_le_bytes());
                put_head(out, H2C_DATA, FLAG_LAST, &specific, request.bytes);
                load::put_data(out, &request);
                Ok(Reply::GoOn)
            }
            _ => check_completion(head).map(|()| Reply::Done { tag, data_bytes: 0 }),
        }
    }
}

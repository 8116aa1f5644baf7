//! Loads one NBD export with random 4 KiB requests at a fixed depth, and counts.
//!
//! `cargo run --release --example nbd_load -- --unix /tmp/nbd.sock --depth 32 --seconds 3`
//!
//! It keeps `depth` requests in flight and, whenever replies arrive, sends as many new requests in
//! one write. That costs a client far less than one system call per request, so that the server
//! is what is measured (fio's nbd engine is full at 120–180 thousand requests a second).

use std::io;
use std::io::Read;
use std::io::Write;
use std::net::SocketAddr;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use rustix::time::ClockId;
use rustix::time::clock_gettime;

const BLOCK_BYTES: u64 = 4096;

/// Random 4 KiB reads or writes over one NBD connection.
#[derive(Parser)]
struct Arguments {
    /// Unix socket of the server.
    #[arg(long)]
    unix: Option<PathBuf>,
    /// TCP address of the server.
    #[arg(long)]
    tcp: Option<SocketAddr>,
    /// Export; empty for the default one.
    #[arg(long, default_value = "")]
    name: String,
    /// Requests in flight.
    #[arg(long, default_value_t = 32)]
    depth: u64,
    /// How long, after one second of warming up.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Write instead of reading.
    #[arg(long)]
    write: bool,
    /// Bytes of the export to touch; written once before reading, unless --no-fill is given.
    #[arg(long, default_value = "256MiB", value_parser = weft::units::parse_size)]
    span: u64,
    /// Read what is there already instead of writing the span first.
    #[arg(long)]
    no_fill: bool,
    /// Poll the socket instead of sleeping in it.
    #[arg(long)]
    poll: bool,
    /// Process whose CPU time is reported per request.
    #[arg(long)]
    server_pid: Option<u32>,
}

trait Stream: Read + Write {
    fn set_polling(&self) -> io::Result<()>;
}

impl Stream for UnixStream {
    fn set_polling(&self) -> io::Result<()> {
        self.set_nonblocking(true)
    }
}

impl Stream for TcpStream {
    fn set_polling(&self) -> io::Result<()> {
        self.set_nonblocking(true)
    }
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
    let mut stream: Box<dyn Stream> = match (&arguments.unix, arguments.tcp) {
        (Some(path), _) => Box::new(UnixStream::connect(path)?),
        (None, Some(address)) => {
            let stream = TcpStream::connect(address)?;
            stream.set_nodelay(true)?;
            Box::new(stream)
        }
        (None, None) => return Err(io::Error::other("give --unix PATH or --tcp ADDRESS:PORT")),
    };
    attach(stream.as_mut(), &arguments.name)?;
    let mut load = Load::new(stream, arguments);
    if !arguments.write && !arguments.no_fill {
        load.fill(arguments.span)?;
    }
    if arguments.poll {
        load.stream.set_polling()?;
    }
    load.run_until(seconds_now() + 1.0)?;
    load.done = 0;
    let (started, cpu) = (seconds_now(), arguments.server_pid.map(cpu_seconds));
    load.run_until(started + arguments.seconds as f64)?;
    let elapsed = seconds_now() - started;
    print!("{:.0} requests/s", load.done as f64 / elapsed);
    if let (Some(before), Some(pid)) = (cpu, arguments.server_pid) {
        let used = cpu_seconds(pid) - before;
        print!(", {:.2} us of server CPU each", used * 1e6 / load.done as f64);
        print!(", server {:.0} % busy", used / elapsed * 100.0);
    }
    println!(", {:.1} us mean latency", arguments.depth as f64 * elapsed * 1e6 / load.done as f64);
    Ok(())
}

/// EXPORT_NAME: the shortest handshake there is.
fn attach(stream: &mut dyn Stream, name: &str) -> io::Result<()> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    let length = u32::try_from(name.len()).map_err(io::Error::other)?;
    let mut hello = vec![0, 0, 0, 3];
    hello.extend_from_slice(b"IHAVEOPT\0\0\0\x01");
    hello.extend_from_slice(&length.to_be_bytes());
    hello.extend_from_slice(name.as_bytes());
    stream.write_all(&hello)?;
    let mut export = [0; 10];
    stream.read_exact(&mut export)
}

struct Load {
    stream: Box<dyn Stream>,
    write: bool,
    blocks: u64,
    depth: u64,
    in_flight: u64,
    done: u64,
    random: u64,
    /// Bytes still to come of the reply being received.
    received: Vec<u8>,
    partial: usize,
    requests: Vec<u8>,
}

impl Load {
    fn new(stream: Box<dyn Stream>, arguments: &Arguments) -> Self {
        Self {
            stream,
            write: arguments.write,
            blocks: (arguments.span / BLOCK_BYTES).max(1),
            depth: arguments.depth,
            in_flight: 0,
            done: 0,
            random: 0x9e37_79b9_7f4a_7c15,
            received: vec![0; 1 << 20],
            partial: 0,
            requests: Vec::new(),
        }
    }

    fn put_request(&mut self, command: u16, offset: u64, length: u32) {
        self.requests.extend_from_slice(&0x2560_9513_u32.to_be_bytes());
        self.requests.extend_from_slice(&u32::from(command).to_be_bytes());
        self.requests.extend_from_slice(&offset.to_be_bytes());
        self.requests.extend_from_slice(&offset.to_be_bytes());
        self.requests.extend_from_slice(&length.to_be_bytes());
    }

    /// Writes the span once, in pieces of 1 MiB.
    fn fill(&mut self, span: u64) -> io::Result<()> {
        let mut data = vec![0; 1 << 20];
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = (index % 251).to_le_bytes()[0];
        }
        for offset in (0..span).step_by(data.len()) {
            self.requests.clear();
            self.put_request(1, offset, 1 << 20);
            self.stream.write_all(&self.requests)?;
            self.stream.write_all(&data)?;
            let mut reply = [0; 16];
            self.stream.read_exact(&mut reply)?;
        }
        Ok(())
    }

    fn run_until(&mut self, end: f64) -> io::Result<()> {
        let reply_bytes = if self.write { 16 } else { 16 + 4096 };
        loop {
            self.requests.clear();
            for _ in self.in_flight..self.depth {
                // xorshift: cheap, and random enough to defeat read-ahead.
                self.random ^= self.random << 13;
                self.random ^= self.random >> 7;
                self.random ^= self.random << 17;
                let offset = self.random % self.blocks * BLOCK_BYTES;
                self.put_request(u16::from(self.write), offset, 4096);
                if self.write {
                    self.requests.resize(self.requests.len() + 4096, self.random.to_le_bytes()[0]);
                }
            }
            self.in_flight = self.depth;
            send(self.stream.as_mut(), &self.requests)?;
            let got = match self.stream.read(&mut self.received) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                got => got?,
            };
            self.partial += got;
            let replies = (self.partial / reply_bytes) as u64;
            self.partial %= reply_bytes;
            self.in_flight -= replies;
            self.done += replies;
            if seconds_now() >= end {
                return Ok(());
            }
        }
    }
}

/// Sends everything, also on a socket that does not block.
fn send(stream: &mut dyn Stream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(sent) => bytes = &bytes[sent..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn seconds_now() -> f64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}

/// User and system time of a process so far (proc(5), fields 14 and 15 of `stat`).
fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let fields = after_name.split_whitespace().skip(11).take(2);
    fields.filter_map(|field| field.parse::<f64>().ok()).sum::<f64>() / 100.0
}

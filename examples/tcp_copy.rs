//! The least a TCP server can do: copies of its memory, asked for by offset and length. What it
//! reaches on a machine is the ceiling of any block server there, and tells how fast loopback is
//! at the moment.
//!
//! `cargo run --release --example tcp_copy -- serve --listen 127.0.0.1:9000 --span 256MiB`
//! `cargo run --release --example tcp_copy -- load --tcp 127.0.0.1:9000 --depth 128`
//!
//! A request is 16 bytes: tag, length, offset. A reply is 8, tag and length, and the data. One
//! thread serves all connections: whatever requests one receive brings are answered in one send, as
//! our targets do.

use std::io;
use std::io::IoSlice;
use std::io::Read;
use std::io::Write;
use std::net::SocketAddr;
use std::net::TcpListener;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::process::ExitCode;

use clap::Parser;
use clap::Subcommand;
use rustix::event::epoll;
use weft::units::bytes_usize;

mod load;

use load::Connection;
use load::Load;
use load::LoadOptions;
use load::Protocol;
use load::Reply;
use load::Request;

/// What a server says first.
const GREETING: &[u8; 8] = b"TCPCOPY\n";
const REQUEST_BYTES: usize = 16;
const REPLY_BYTES: usize = 8;
/// Requests answered in one send (UIO_MAXIOV, with two vectors each).
const BATCH_REQUESTS: usize = 512;
/// Connections asked for at once.
const CONNECTIONS_READY_MAX: usize = 128;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Serves copies until it is killed.
    Serve {
        /// Where to listen.
        #[arg(long)]
        listen: SocketAddr,
        /// Bytes of memory to copy from.
        #[arg(long, default_value = "256MiB", value_parser = weft::units::parse_size)]
        span: u64,
    },
    /// Asks for copies at random places, and counts.
    Load {
        /// The server.
        #[arg(long)]
        tcp: SocketAddr,
        #[command(flatten)]
        load: LoadOptions,
    },
}

fn main() -> ExitCode {
    let done = match Arguments::parse().role {
        Role::Serve { listen, span } => serve(listen, span),
        Role::Load { tcp, load } => measure(tcp, &load),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(server: SocketAddr, options: &LoadOptions) -> io::Result<()> {
    let connect = |_| {
        let mut stream = load::connect_tcp(server)?;
        let mut greeting = [0; GREETING.len()];
        stream.read_exact(&mut greeting)?;
        if greeting != *GREETING {
            return Err(io::Error::other("this is no tcp_copy server"));
        }
        Ok(Connection::new(Box::new(stream), Copies, options.depth))
    };
    let connections = (0..options.connections).map(connect);
    Load::new(connections.collect::<io::Result<_>>()?, options).measure(false)
}

struct Copies;

impl Protocol for Copies {
    const HEAD_BYTES: usize = REPLY_BYTES;

    fn put(&mut self, out: &mut Vec<u8>, request: &Request) {
        out.extend_from_slice(&u32::from(request.tag).to_le_bytes());
        out.extend_from_slice(&request.bytes.to_le_bytes());
        out.extend_from_slice(&request.offset.to_le_bytes());
    }

    fn reply(&mut self, head: &[u8], _: &[Request], _: &mut Vec<u8>) -> io::Result<Reply> {
        let tag = u16::from_le_bytes([head[0], head[1]]);
        let data_bytes = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        Ok(Reply::Done { tag, data_bytes })
    }
}

fn serve(listen: SocketAddr, span: u64) -> io::Result<()> {
    // Not of one value: pages of zeroes would all be the same one.
    let memory: Vec<u8> = (0..span).map(|at| (at >> 8).to_le_bytes()[0] | 1).collect();
    let listener = TcpListener::bind(listen)?;
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let watch = |socket: &dyn AsFd, number: u64| {
        let data = epoll::EventData::new_u64(number);
        epoll::add(&epoll, socket.as_fd(), data, epoll::EventFlags::IN)
    };
    // The listener is number 0; connections keep theirs for ever.
    watch(&listener, 0)?;
    let mut clients = vec![None];
    let mut events = Vec::with_capacity(CONNECTIONS_READY_MAX);
    loop {
        epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), None)?;
        for event in events.drain(..) {
            let number = event.data.u64();
            if number == 0 {
                let client = Client::accept(&listener)?;
                watch(&client.stream, clients.len() as u64)?;
                clients.push(Some(client));
                continue;
            }
            let place = &mut clients[bytes_usize(number)];
            if place.as_mut().is_some_and(|client| client.answer(&memory).is_err()) {
                *place = None;
            }
        }
    }
}

/// A connection of the server, on which sends may block and receives are announced.
struct Client {
    stream: TcpStream,
    /// Requests received, of which the first `held` bytes count.
    buffer: Vec<u8>,
    held: usize,
}

impl Client {
    fn accept(listener: &TcpListener) -> io::Result<Self> {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        stream.write_all(GREETING)?;
        Ok(Self { stream, buffer: vec![0; BATCH_REQUESTS * REQUEST_BYTES], held: 0 })
    }

    /// Receives once and answers what is whole.
    fn answer(&mut self, memory: &[u8]) -> io::Result<()> {
        let received = self.stream.read(&mut self.buffer[self.held..])?;
        if received == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.held += received;
        let whole = self.held / REQUEST_BYTES * REQUEST_BYTES;
        let mut slices = Vec::with_capacity(2 * BATCH_REQUESTS);
        for request in self.buffer[..whole].chunks_exact(REQUEST_BYTES) {
            let (head, offset) = request.split_at(REPLY_BYTES);
            let length = u32::from_le_bytes(head[4..].try_into().expect("4 bytes")) as usize;
            let offset = u64::from_le_bytes(offset.try_into().expect("8 bytes"));
            let data = memory.get(bytes_usize(offset)..).and_then(|data| data.get(..length));
            slices.push(IoSlice::new(head));
            slices.push(IoSlice::new(data.ok_or(io::ErrorKind::InvalidInput)?));
        }
        let mut unsent = slices.as_mut_slice();
        while !unsent.is_empty() {
            let sent = self.stream.write_vectored(unsent)?;
            IoSlice::advance_slices(&mut unsent, sent);
        }
        self.buffer.copy_within(whole..self.held, 0);
        self.held -= whole;
        Ok(())
    }
}

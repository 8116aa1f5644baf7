//! The least a TCP server can do: copies of its memory, asked for by offset and length. What it
//! reaches on a machine is the ceiling of any block server there, and tells how fast loopback is
//! at the moment.
//!
//! `cargo run --release --example tcp_copy -- serve --listen 127.0.0.1:9000 --span 256MiB`
//! `cargo run --release --example tcp_copy -- load --tcp 127.0.0.1:9000 --depth 128`
//!
//! A request is 16 bytes: tag, length, offset. A reply is 8, tag and length, and the data. All that
//! have arrived are answered in one send, as our targets do. One connection at a time.

use std::io;
use std::io::IoSlice;
use std::io::Read;
use std::io::Write;
use std::net::SocketAddr;
use std::net::TcpListener;
use std::net::TcpStream;
use std::process::ExitCode;

use clap::Parser;
use clap::Subcommand;

mod load;

use load::Connection;
use load::Load;
use load::LoadOptions;
use load::Protocol;
use load::Reply;
use load::Request;

const REQUEST_BYTES: usize = 16;
const REPLY_BYTES: usize = 8;
/// Requests answered in one send (UIO_MAXIOV, with two vectors each).
const BATCH_REQUESTS: usize = 512;

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
    let stream = load::connect_tcp(server)?;
    let connection = Connection::new(Box::new(stream), Copies, options.depth);
    Load::new(vec![connection], options).measure(false)
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
    println!("serves on {}", listener.local_addr()?);
    loop {
        let (stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        if let Err(error) = answer(stream, &memory) {
            eprintln!("{error}");
        }
    }
}

/// Answers one client until it closes.
fn answer(mut stream: TcpStream, memory: &[u8]) -> io::Result<()> {
    let mut buffer = vec![0; BATCH_REQUESTS * REQUEST_BYTES];
    let mut held = 0;
    loop {
        let received = stream.read(&mut buffer[held..])?;
        if received == 0 {
            return Ok(());
        }
        held += received;
        let whole = held / REQUEST_BYTES * REQUEST_BYTES;
        let requests = buffer[..whole].chunks_exact(REQUEST_BYTES);
        let heads: Vec<&[u8]> = requests.map(|request| &request[..REPLY_BYTES]).collect();
        let mut slices = Vec::with_capacity(2 * heads.len());
        for (head, request) in heads.iter().zip(buffer.chunks_exact(REQUEST_BYTES)) {
            let (length, offset) = request[4..].split_at(4);
            let length = u32::from_le_bytes(length.try_into().expect("4 bytes")) as usize;
            let offset = u64::from_le_bytes(offset.try_into().expect("8 bytes"));
            let data = usize::try_from(offset).ok().and_then(|at| memory.get(at..)?.get(..length));
            slices.push(IoSlice::new(head));
            slices.push(IoSlice::new(data.ok_or(io::ErrorKind::InvalidInput)?));
        }
        let mut unsent = slices.as_mut_slice();
        while !unsent.is_empty() {
            let sent = stream.write_vectored(unsent)?;
            IoSlice::advance_slices(&mut unsent, sent);
        }
        buffer.copy_within(whole..held, 0);
        held -= whole;
    }
}

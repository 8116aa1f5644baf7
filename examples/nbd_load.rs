//! Loads one NBD export with random requests at a fixed depth, and counts.
//!
//! `cargo run --release --example nbd_load -- --unix /tmp/nbd.sock --depth 32 --seconds 3`
//!
//! fio's nbd engine is full at 120–180 thousand requests a second; this is not.

use std::io;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

mod load;

use load::Connection;
use load::Load;
use load::LoadOptions;
use load::Protocol;
use load::Reply;
use load::Request;
use load::Stream;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

/// Random reads or writes over NBD connections.
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
    let connections = (0..arguments.load.connections).map(|_| connect(arguments));
    let mut load = Load::new(connections.collect::<io::Result<_>>()?, &arguments.load);
    if !arguments.write && !arguments.no_fill {
        load.fill()?;
    }
    load.measure(arguments.write)
}

fn connect(arguments: &Arguments) -> io::Result<Connection<Nbd>> {
    let mut stream: Box<dyn Stream> = match (&arguments.unix, arguments.tcp) {
        (Some(path), _) => Box::new(UnixStream::connect(path)?),
        (None, Some(address)) => Box::new(load::connect_tcp(address)?),
        (None, None) => return Err(io::Error::other("give --unix PATH or --tcp ADDRESS:PORT")),
    };
    attach(stream.as_mut(), &arguments.name)?;
    Ok(Connection::new(stream, Nbd, arguments.load.depth))
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

/// Simple replies; the cookie is the tag.
struct Nbd;

impl Protocol for Nbd {
    const HEAD_BYTES: usize = 16;

    fn put(&mut self, out: &mut Vec<u8>, request: &Request) {
        out.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        out.extend_from_slice(&u32::from(request.write).to_be_bytes());
        out.extend_from_slice(&u64::from(request.tag).to_be_bytes());
        out.extend_from_slice(&request.offset.to_be_bytes());
        out.extend_from_slice(&request.bytes.to_be_bytes());
        if request.write {
            load::put_data(out, request);
        }
    }

    fn reply(&mut self, head: &[u8], requests: &[Request], _: &mut Vec<u8>) -> io::Result<Reply> {
        let tag = u16::from_be_bytes([head[14], head[15]]);
        if head[..4] != REPLY_MAGIC.to_be_bytes() || head[4..8] != [0; 4] {
            return Err(io::Error::other(format!("the server answered {head:?}")));
        }
        let request = requests.get(usize::from(tag)).copied().unwrap_or_default();
        let data_bytes = if request.write { 0 } else { request.bytes as usize };
        Ok(Reply::Done { tag, data_bytes })
    }
}

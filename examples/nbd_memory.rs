//! Serves one volume in RAM over NBD: the upper bound for benches, and a target for hand tests.
//!
//! `cargo run --release --example nbd_memory -- --unix /tmp/nbd.sock --size 1GiB`
//!
//! One thread serves everything, as a data-plane thread of the node does.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use tokio::net::TcpListener;
use tokio::net::UnixListener;
use tokio::runtime;
use tokio::task::LocalSet;
use weft::target::nbd::NbdOptions;
use weft::target::nbd::NbdTarget;
use weft::target::nbd::handshake::TlsMode;
use weft::target::nbd::tls;
use weft::target::nbd::tls::TlsFiles;
use weft::units::parse_size;
use weft::volume::memory::MemoryDirectory;
use weft::volume::memory::MemoryVolume;

/// Serves a volume in RAM over NBD until Ctrl-C.
#[derive(Parser)]
struct Arguments {
    /// Unix socket to listen on; an old one of that name is removed.
    #[arg(long)]
    unix: Option<PathBuf>,
    /// TCP address to listen on, as 127.0.0.1:10809.
    #[arg(long)]
    tcp: Option<SocketAddr>,
    /// Size of the volume, as 1GiB.
    #[arg(long, default_value = "1GiB", value_parser = parse_size)]
    size: u64,
    /// Name of the export; the empty name works too.
    #[arg(long, default_value = "memory")]
    name: String,
    /// Server certificate (PEM); with --tls-key, TLS is offered.
    #[arg(long, requires = "tls_key")]
    tls_certificate: Option<PathBuf>,
    /// Key of the certificate (PEM).
    #[arg(long, requires = "tls_certificate")]
    tls_key: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.unix.is_none() && arguments.tcp.is_none() {
        eprintln!("nothing to listen on: give --unix PATH or --tcp ADDRESS:PORT");
        return ExitCode::from(2);
    }
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    let served = runtime
        .map_err(|error| format!("start runtime: {error}"))
        .and_then(|runtime| LocalSet::new().block_on(&runtime, serve(arguments)));
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(arguments: Arguments) -> Result<(), String> {
    let volume = Arc::new(MemoryVolume::new(&arguments.name, arguments.size));
    let mut options = NbdOptions::default();
    if let (Some(certificate), Some(key)) = (arguments.tls_certificate, arguments.tls_key) {
        let files = TlsFiles { certificate, key, ..TlsFiles::default() };
        options.tls = Some(tls::load(&files).map_err(|error| error.chain())?);
        options.tls_mode = TlsMode::Optional;
    }
    let directory = Arc::new(MemoryDirectory::new([volume as _]));
    let target = Arc::new(NbdTarget::new(directory, options));

    if let Some(path) = &arguments.unix {
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).map_err(|error| format!("listen: {error}"))?;
        println!("nbd+unix:///?socket={}", path.display());
        let target = Arc::clone(&target);
        tokio::task::spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::task::spawn_local(Arc::clone(&target).serve(stream));
            }
        });
    }
    if let Some(address) = arguments.tcp {
        let listener =
            TcpListener::bind(address).await.map_err(|error| format!("listen: {error}"))?;
        let address = listener.local_addr().map_err(|error| format!("listen: {error}"))?;
        println!("nbd://{address}");
        let target = Arc::clone(&target);
        tokio::task::spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::task::spawn_local(Arc::clone(&target).serve(stream));
            }
        });
    }
    tokio::signal::ctrl_c().await.map_err(|error| format!("wait for Ctrl-C: {error}"))?;
    target.shutdown().await;
    Ok(())
}

//! Serves one volume in RAM over NBD and NVMe/TCP: the upper bound for benches, what tells the cost
//! of timing requests, and a target for hand tests.
//!
//! `cargo run --release --example memory_node -- --unix /tmp/nbd.sock --size 1GiB`
//!
//! One thread serves everything, as a data-plane thread of the node does.

use std::net::SocketAddr;
use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tokio::net::UnixListener;
use tokio::runtime;
use tokio::sync::watch;
use tokio::task::LocalSet;
use tokio::task::spawn_local;
use uuid::Uuid;
use weft::target::nbd::NbdOptions;
use weft::target::nbd::NbdTarget;
use weft::target::nbd::handshake::TlsMode;
use weft::target::nbd::tls;
use weft::target::nbd::tls::Tls;
use weft::target::nbd::tls::TlsFiles;
use weft::target::nvmf::subsystem::Subsystem;
use weft::target::nvmf::subsystem::SubsystemOptions;
use weft::target::nvmf::tcp::NvmeTcpOptions;
use weft::target::nvmf::tcp::NvmeTcpTarget;
use weft::units::parse_size;
use weft::volume::memory::MemoryDirectory;
use weft::volume::memory::MemoryVolume;

/// Serves a volume in RAM until Ctrl-C.
#[derive(Parser)]
struct Arguments {
    /// Unix socket to listen on for NBD; an old one of that name is removed.
    #[arg(long)]
    unix: Option<PathBuf>,
    /// TCP address to listen on for NBD, as 127.0.0.1:10809.
    #[arg(long)]
    tcp: Option<SocketAddr>,
    /// TCP address to listen on for NVMe, as 127.0.0.1:4420.
    #[arg(long)]
    nvme_tcp: Option<SocketAddr>,
    /// As --unix, without timing requests.
    #[arg(long)]
    untimed_unix: Option<PathBuf>,
    /// As --nvme-tcp, without timing commands.
    #[arg(long)]
    untimed_nvme_tcp: Option<SocketAddr>,
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
        let acceptor = tls::load(&files).map_err(|error| error.chain())?;
        options.tls = Some(watch::channel(Tls::Certificates(acceptor)).1);
        options.tls_mode = TlsMode::Optional;
    }
    let directory = Arc::new(MemoryDirectory::new([volume as _]));
    let mut listening = false;
    for (timed, unix, tcp, nvme_tcp) in [
        (true, arguments.unix, arguments.tcp, arguments.nvme_tcp),
        (false, arguments.untimed_unix, None, arguments.untimed_nvme_tcp),
    ] {
        listening |= unix.is_some() || tcp.is_some() || nvme_tcp.is_some();
        let options = NbdOptions { timed, ..options.clone() };
        let target = Arc::new(NbdTarget::new(Arc::clone(&directory) as _, options));
        if let Some(path) = unix {
            serve_unix(&target, &path)?;
        }
        if let Some(address) = tcp {
            let target = Arc::clone(&target);
            let address =
                serve_tcp(address, move |stream| Arc::clone(&target).serve(stream)).await?;
            println!("nbd://{address}");
        }
        if let Some(address) = nvme_tcp {
            let target = nvme_tcp_target(&directory, timed);
            let address =
                serve_tcp(address, move |stream| Arc::clone(&target).serve(stream)).await?;
            println!("NVMe/TCP on {address}");
        }
    }
    if !listening {
        return Err("nothing to listen on: see --help".to_owned());
    }
    tokio::signal::ctrl_c().await.map_err(|error| format!("wait for Ctrl-C: {error}"))
}

fn nvme_tcp_target(directory: &Arc<MemoryDirectory>, timed: bool) -> Arc<NvmeTcpTarget> {
    let subsystem = SubsystemOptions::new(Uuid::from_u128(1));
    let subsystem = Arc::new(Subsystem::new(Arc::clone(directory) as _, subsystem));
    let options = NvmeTcpOptions { timed, ..NvmeTcpOptions::default() };
    Arc::new(NvmeTcpTarget::new(subsystem, options))
}

fn serve_unix(target: &Arc<NbdTarget>, path: &Path) -> Result<(), String> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).map_err(|error| format!("listen: {error}"))?;
    println!("nbd+unix:///?socket={}", path.display());
    let target = Arc::clone(target);
    spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            spawn_local(Arc::clone(&target).serve(stream));
        }
    });
    Ok(())
}

async fn serve_tcp<S: Future<Output = ()> + 'static>(
    address: SocketAddr,
    serve: impl Fn(TcpStream) -> S + 'static,
) -> Result<SocketAddr, String> {
    let listener = TcpListener::bind(address).await.map_err(|error| format!("listen: {error}"))?;
    let address = listener.local_addr().map_err(|error| format!("listen: {error}"))?;
    spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            spawn_local(serve(stream));
        }
    });
    Ok(address)
}

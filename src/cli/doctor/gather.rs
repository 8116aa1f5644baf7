//! Asks the kernel, the node and other programs what no file tells.
//!
//! Nothing is changed: addresses are bound and let go, devices opened and closed. Whatever cannot
//! be asked is left out, and the check that wants it says so.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::net::TcpListener;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::thread;

use rustix::fs::Access;
use weft_api::NodeStatus;

use super::facts::Address;
use super::facts::Asked;
use super::facts::DeviceFacts;
use super::facts::DirectoryFacts;
use super::facts::Kind;
use super::facts::ListenFacts;
use super::facts::ListenState;
use super::facts::Number;
use super::facts::Opened;
use crate::device::Device;
use crate::device::file::FileDevice;
use crate::device::file::OpenMode;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::node::config::Config;
use crate::node::config::Overrides;

/// The key of the API's Unix socket.
pub(super) const API_SOCKET: &str = "api.socket";

/// What is asked for a node on this machine.
pub(super) fn node(data_dir: Option<PathBuf>, config_file: Option<PathBuf>) -> Asked {
    let overrides = Overrides { data_dir, ..Overrides::default() };
    let config = Config::load(config_file.as_deref(), overrides);
    let mut asked = Asked {
        config_file,
        ring: Some(crate::device::try_ring().map_err(|error| error.to_string())),
        processors: thread::available_parallelism().map_or(1, usize::from),
        ..Asked::default()
    };
    if let Ok(config) = &config {
        asked.node = running(&config.api_socket);
        asked.directory = directory(&config.data_dir);
        asked.devices = device_paths(config, &asked.directory).iter().map(|d| device(d)).collect();
        asked.listen = listeners(config);
    }
    asked.config = Some(config.map_err(|error| error.to_string()));
    ask(&mut asked, "timedatectl", &["show", "--property=NTPSynchronized", "--value"]);
    asked
}

/// What is asked for a host.
pub(super) fn host() -> Asked {
    let mut asked = Asked::default();
    ask(&mut asked, "nbd-client", &["-V"]);
    ask(&mut asked, "nvme", &["version"]);
    asked
}

/// Keeps what a program prints, if it is there and succeeds.
fn ask(asked: &mut Asked, program: &'static str, arguments: &[&str]) {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let output = Command::new(program).args(arguments).env("PATH", path).output();
    if let Ok(output) = output
        && output.status.success()
    {
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        asked.answers.insert(program, text);
    }
}

/// The node that answers on the socket; paths of sockets as [`listeners`] has them.
fn running(socket: &Path) -> Option<NodeStatus> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
    let mut node = runtime.block_on(weft_api::Client::new(socket).status()).ok()?;
    for listener in node.listeners.iter_mut().filter(|listener| listener.transport == "unix") {
        listener.address = absolute(Path::new(&listener.address)).display().to_string();
    }
    Some(node)
}

fn directory(path: &Path) -> DirectoryFacts {
    let path = absolute(path);
    let exists = path.is_dir();
    let writable = rustix::fs::access(existing(&path), Access::WRITE_OK | Access::EXEC_OK).is_ok();
    let pod = path.join("pod.json").exists();
    let parity_strips = record(&path).and_then(|record| record["parity_strips"].as_u64());
    let parity_strips = parity_strips.and_then(|strips| usize::try_from(strips).ok());
    DirectoryFacts { path, exists, writable, pod, parity_strips }
}

/// What the directory says of its pod. A node that starts reads it with more care.
fn record(directory: &Path) -> Option<serde_json::Value> {
    let text = fs::read_to_string(directory.join("pod.json")).ok()?;
    serde_json::from_str(&text).ok()
}

/// The path without links; what is not there yet is made of the nearest directory that is.
fn absolute(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let there = existing(&path);
    let rest = path.strip_prefix(there).unwrap_or(Path::new(""));
    let base = there.canonicalize().unwrap_or_else(|_| there.to_owned());
    if rest.as_os_str().is_empty() { base } else { base.join(rest) }
}

/// The path, or the nearest directory above it that exists.
fn existing(path: &Path) -> &Path {
    path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"))
}

/// The devices the configuration lists, else those the directory's record does, else the defaults.
fn device_paths(config: &Config, directory: &DirectoryFacts) -> Vec<PathBuf> {
    let recorded = || -> Option<Vec<PathBuf>> {
        let record = record(&directory.path)?;
        let path = |device: &serde_json::Value| Some(directory.path.join(device["path"].as_str()?));
        record["devices"].as_array()?.iter().map(path).collect()
    };
    let given = config.pod.devices.clone();
    match config.pod.devices_given {
        true => given,
        false => recorded().filter(|paths| !paths.is_empty()).unwrap_or(given),
    }
}

fn device(path: &Path) -> DeviceFacts {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let found = fs::metadata(&path);
    let kind = match &found {
        Ok(found) if found.is_file() => {
            // Blocks are counted in units of 512 bytes, whatever the file system's own are.
            Kind::File { length: found.len(), allocated: found.blocks() * 512 }
        }
        Ok(found) if found.file_type().is_block_device() => Kind::Block,
        Ok(_) => Kind::Other("is neither a file nor a block device".to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Kind::Missing,
        Err(error) => Kind::Other(error.to_string()),
    };
    let holder = existing(&path).to_owned();
    let disk = match (&kind, &found) {
        (Kind::Block, Ok(found)) => number(found.rdev()),
        _ => fs::metadata(&holder).map_or((0, 0), |holder| number(holder.dev())),
    };
    let opened = match kind {
        Kind::File { .. } | Kind::Block => match accessible(&path) {
            true => opened(FileDevice::open(&path, OpenMode::ReadWrite)),
            false => Opened::Refused("this user may not read and write it".to_owned()),
        },
        Kind::Missing | Kind::Other(_) => Opened::No,
    };
    let free = || rustix::fs::statvfs(&holder).ok().map(|free| free.f_bavail * free.f_frsize);
    let free_bytes = if kind == Kind::Block { None } else { free() };
    let path = if kind == Kind::Missing { absolute(&path) } else { path };
    DeviceFacts { path, kind, opened, disk, free_bytes }
}

fn accessible(path: &Path) -> bool {
    rustix::fs::access(path, Access::READ_OK | Access::WRITE_OK).is_ok()
}

fn number(device: u64) -> Number {
    (rustix::fs::major(device), rustix::fs::minor(device))
}

fn opened(result: Result<FileDevice, Error>) -> Opened {
    match result {
        Ok(device) => Opened::Yes { length: device.len_bytes(), direct: device.direct() },
        Err(error) if error.kind() == ErrorKind::Busy => Opened::Busy(error.chain()),
        Err(error) => Opened::Refused(error.chain()),
    }
}

fn listeners(config: &Config) -> Vec<ListenFacts> {
    let tcp = [
        ("nbd.listen", &config.nbd.listen),
        ("nvme_tcp.listen", &config.nvme_tcp.listen),
        ("nvme_tcp.discovery", &config.nvme_tcp.discovery),
    ];
    let of = |key, address: &SocketAddr| {
        let state = bound(TcpListener::bind(address));
        ListenFacts { key, address: Address::Tcp(*address), state }
    };
    let mut all: Vec<_> = tcp
        .into_iter()
        .flat_map(|(key, addresses)| addresses.iter().map(move |address| of(key, address)))
        .collect();
    let unix = [
        ("nbd.unix_socket", config.nbd.unix_socket.as_ref()),
        (API_SOCKET, Some(&config.api_socket)),
    ];
    for (key, path) in unix {
        let Some(path) = path else { continue };
        let state = unix_socket(path);
        all.push(ListenFacts { key, address: Address::Unix(absolute(path)), state });
    }
    all
}

fn bound(result: io::Result<TcpListener>) -> ListenState {
    match result {
        Ok(_) => ListenState::Free,
        Err(error) => match error.kind() {
            io::ErrorKind::AddrInUse => ListenState::Taken,
            io::ErrorKind::PermissionDenied => ListenState::Forbidden,
            _ => ListenState::Refused(error.to_string()),
        },
    }
}

/// A socket that nobody listens on any more is free: a node replaces it.
fn unix_socket(path: &Path) -> ListenState {
    match fs::symlink_metadata(path) {
        Err(_) => return ListenState::Free,
        Ok(found) if !found.file_type().is_socket() => return ListenState::Taken,
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => ListenState::Taken,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => ListenState::Forbidden,
        Err(_) => ListenState::Free,
    }
}

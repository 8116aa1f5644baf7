//! The sockets the node listens on: bound here, or handed over by systemd.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::net::TcpListener;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;

use listenfd::ListenFd;
use rustix::fs::Mode;
use rustix::net::AddressFamily;
use rustix::net::SocketAddrUnix;
use rustix::net::SocketFlags;
use rustix::net::SocketType;

use super::config::ApiTcpConfig;
use super::config::NbdConfig;
use super::config::NvmeTcpConfig;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;

/// Connections that may wait to be accepted, as the kernel's own default bound.
const BACKLOG: i32 = 1024;

/// All listeners but the API's Unix socket.
#[derive(Default)]
pub(super) struct Listeners {
    pub(super) tcp: Vec<TcpListener>,
    pub(super) nvme: Vec<TcpListener>,
    pub(super) unix: Vec<BoundUnix>,
    pub(super) api: Vec<TcpListener>,
    pub(super) metrics: Vec<TcpListener>,
    /// The same for people.
    pub(super) described: Vec<weft_api::Listener>,
}

/// A Unix socket we listen on, and its file, which goes when this is dropped.
pub(super) struct BoundUnix {
    pub(super) listener: UnixListener,
    pub(super) file: SocketFile,
}

/// A socket's file; removed when dropped, unless someone else made it.
pub(super) struct SocketFile(Option<PathBuf>);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

impl Listeners {
    /// Binds what the configuration says; for NBD, takes systemd's sockets instead if there are any.
    ///
    /// # Errors
    /// `Busy` if an address or a path is in use.
    pub(super) fn open(
        config: &NbdConfig,
        nvme: &NvmeTcpConfig,
        api: Option<&ApiTcpConfig>,
        metrics: &[SocketAddr],
    ) -> Result<Self> {
        let mut listeners = Self::default();
        listeners.open_nbd(config)?;
        for listener in &mut listeners.described {
            listener.tls = config.tls.is_some() && listener.transport == "tcp";
        }
        let described = |addresses: &[SocketAddr], protocol: &'static str| {
            addresses.iter().map(move |address| (*address, protocol)).collect::<Vec<_>>()
        };
        let addresses =
            [described(&nvme.listen, "nvme"), described(&nvme.discovery, "nvme-discovery")];
        for (address, protocol) in addresses.into_iter().flatten() {
            let listener = bind_tcp(address, "listen for NVMe/TCP", "--nvme-tcp ADDRESS:PORT")?;
            let bound = unblock(&listener)
                .map_err(|error| failed("listen for NVMe/TCP", "a TCP socket", error))?;
            listeners.describe(protocol, "tcp", bound.to_string());
            listeners.nvme.push(listener);
        }
        for address in api.map_or(&[][..], |api| &api.listen) {
            let listener =
                bind_tcp(*address, "listen for the API", "api.listen in the configuration")?;
            let bound = unblock(&listener)
                .map_err(|error| failed("listen for the API", "a TCP socket", error))?;
            listeners.describe("api", "tcp", bound.to_string());
            listeners.api.push(listener);
        }
        for address in metrics {
            let listener =
                bind_tcp(*address, "listen for Prometheus", "metrics.listen in the configuration")?;
            let bound = unblock(&listener)
                .map_err(|error| failed("listen for Prometheus", "a TCP socket", error))?;
            listeners.describe("metrics", "tcp", bound.to_string());
            listeners.metrics.push(listener);
        }
        Ok(listeners)
    }

    /// The addresses at which the NVMe subsystem is served.
    pub(super) fn nvme_addresses(&self) -> Vec<SocketAddr> {
        let served = self.described.iter().filter(|listener| listener.protocol == "nvme");
        served.filter_map(|listener| listener.address.parse().ok()).collect()
    }

    fn open_nbd(&mut self, config: &NbdConfig) -> Result<()> {
        let mut activated = ListenFd::from_env();
        if activated.len() > 0 {
            for index in 0..activated.len() {
                self.take_activated(&mut activated, index)?;
            }
            return Ok(());
        }
        for address in &config.listen {
            self.add_tcp(bind_tcp(*address, "listen for NBD", "--nbd ADDRESS:PORT")?)?;
        }
        if let Some(path) = &config.unix_socket {
            let bound = bind_unix(path, Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP)?;
            self.add_unix(bound)?;
        }
        Ok(())
    }

    fn take_activated(&mut self, activated: &mut ListenFd, index: usize) -> Result<()> {
        if let Ok(Some(listener)) = activated.take_unix_listener(index) {
            return self.add_unix(BoundUnix { listener, file: SocketFile(None) });
        }
        match activated.take_tcp_listener(index) {
            Ok(Some(listener)) => self.add_tcp(listener),
            Ok(None) => Ok(()),
            Err(error) => Err(Error::new(ErrorKind::InvalidRequest, "take systemd's sockets")
                .context("each must be a stream socket, of TCP or Unix")
                .source(error)),
        }
    }

    fn add_tcp(&mut self, listener: TcpListener) -> Result<()> {
        let address =
            unblock(&listener).map_err(|error| failed("listen for NBD", "a TCP socket", error))?;
        self.describe("nbd", "tcp", address.to_string());
        self.tcp.push(listener);
        Ok(())
    }

    fn add_unix(&mut self, bound: BoundUnix) -> Result<()> {
        let address = bound.listener.local_addr().and_then(|address| {
            bound.listener.set_nonblocking(true)?;
            Ok(address)
        });
        let address = address.map_err(|error| failed("listen for NBD", "a Unix socket", error))?;
        let path = address.as_pathname().unwrap_or(Path::new("(unnamed)"));
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        self.describe("nbd", "unix", path.display().to_string());
        self.unix.push(bound);
        Ok(())
    }

    fn describe(&mut self, protocol: &str, transport: &str, address: String) {
        let (protocol, transport) = (protocol.to_owned(), transport.to_owned());
        let tls = protocol == "api";
        self.described.push(weft_api::Listener { protocol, transport, address, tls });
    }
}

/// Prepares a socket for the reactor and tells where it listens.
fn unblock(listener: &TcpListener) -> io::Result<SocketAddr> {
    listener.set_nonblocking(true)?;
    listener.local_addr()
}

fn bind_tcp(address: SocketAddr, op: &'static str, option: &str) -> Result<TcpListener> {
    TcpListener::bind(address).map_err(|error| {
        let failed = failed(op, &address.to_string(), error);
        match failed.kind() {
            ErrorKind::Busy => failed.context(format!("choose another with {option}")),
            _ => failed,
        }
    })
}

/// Listens on a Unix socket at `path`, to which only those that `mode` allows can connect.
///
/// A socket left behind by a node that was killed is replaced.
///
/// # Errors
/// `Busy` if someone listens there, or the path is no socket.
pub(super) fn bind_unix(path: &Path, mode: Mode) -> Result<BoundUnix> {
    const OP: &str = "listen on a Unix socket";
    let name = path.display().to_string();
    remove_stale(path)?;
    let bind = || -> io::Result<UnixListener> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let family = AddressFamily::UNIX;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        // Between bind and listen nobody can connect, so the mode holds from the first moment.
        rustix::fs::chmod(path, mode)?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(UnixListener::from(socket))
    };
    let listener = bind().map_err(|error| failed(OP, &name, error))?;
    Ok(BoundUnix { listener, file: SocketFile(Some(path.to_owned())) })
}

/// Removes a socket nobody listens on.
fn remove_stale(path: &Path) -> Result<()> {
    const OP: &str = "listen on a Unix socket";
    let name = path.display().to_string();
    let busy = |why: &str| Error::new(ErrorKind::Busy, OP).context(format!("{name} {why}"));
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(OP, &name, error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(busy("exists and is no socket: remove it, or choose another path"));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|error| failed(OP, &name, error))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed(OP, &name, error)),
        Ok(_) => Err(busy("is in use by another process: stop it, or choose another path")),
    }
}

fn failed(op: &'static str, on: &str, error: io::Error) -> Error {
    let kind = match error.kind() {
        io::ErrorKind::AddrInUse | io::ErrorKind::WouldBlock => ErrorKind::Busy,
        io::ErrorKind::NotFound => ErrorKind::NotFound,
        io::ErrorKind::AddrNotAvailable | io::ErrorKind::PermissionDenied => {
            ErrorKind::InvalidRequest
        }
        _ => ErrorKind::Unsupported,
    };
    Error::new(kind, op).context(on).source(error)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let path = std::env::temp_dir().join(format!("weft-sock-{}", std::process::id()));
        let _ = fs::remove_file(&path);
        // A listener that is dropped leaves its file behind, as a killed process does.
        drop(UnixListener::bind(&path).expect("bound"));
        assert!(path.exists());

        let bound = bind_unix(&path, Mode::RUSR | Mode::WUSR).expect("replaced");
        let mode = fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let refused = bind_unix(&path, Mode::RUSR).err().expect("live");
        assert_eq!(refused.kind(), ErrorKind::Busy);
        drop(bound);
        assert!(!path.exists());

        fs::write(&path, "precious").expect("written");
        assert!(bind_unix(&path, Mode::RUSR).is_err());
        assert_eq!(fs::read(&path).expect("there"), b"precious");
        fs::remove_file(&path).expect("removed");
    }
}

//! What TLS and the API's token are made of: files, read when the node starts and again when told.
//!
//! Certificates expire, and a restart to change one would cut every host off. What is in force is in
//! `watch` channels, which the targets and the API look into for each new connection, and the API
//! for each request's token. Sessions that stand keep what they began with.
//!
//! Reading again is all or nothing: every file is read before anything is replaced, so that no
//! mixture of old and new is ever in force.

use parking_lot::Mutex;
use tokio::sync::watch;

use super::config::ApiTcpConfig;
use super::config::Config;
use super::config::TlsConfig;
use super::config::TlsProof;
use crate::error::Error;
use crate::error::Result;
use crate::mgmt::Guard;
use crate::mgmt::Token;
use crate::observe::event;
use crate::secret::named_keys;
use crate::target::nbd::tls;
use crate::target::nbd::tls::Tls;

/// The files, and what is in force of them.
pub(super) struct Credentials {
    nbd: Option<Source<TlsConfig, Tls>>,
    api: Option<Source<ApiTcpConfig, Guard>>,
    /// Held while files are read again, so that who reads last also replaces last. Held over file
    /// I/O, and by nobody on the data path.
    reading: Mutex<()>,
}

/// Where something comes from, and what was read there last.
struct Source<C, T> {
    config: C,
    current: watch::Sender<T>,
}

impl Credentials {
    /// Reads every file that the configuration names, so that a wrong one is known before anything
    /// is served.
    ///
    /// # Errors
    /// `InvalidRequest` names the file and what is wrong with it.
    pub(super) fn read(config: &Config) -> Result<Self> {
        let nbd = config.nbd.tls.as_ref().map(|tls| Source::read(tls, read_nbd)).transpose()?;
        let api = config.api_tcp.as_ref().map(|api| Source::read(api, read_api)).transpose()?;
        Ok(Self { nbd, api, reading: Mutex::new(()) })
    }

    /// What NBD hosts are met with, if TLS is not off.
    pub(super) fn nbd(&self) -> Option<watch::Receiver<Tls>> {
        self.nbd.as_ref().map(|source| source.current.subscribe())
    }

    /// What keeps strangers out of the API over TCP, if it is served there.
    pub(super) fn api(&self) -> Option<watch::Receiver<Guard>> {
        self.api.as_ref().map(|source| source.current.subscribe())
    }

    /// Reads all files again and puts what they say in force.
    ///
    /// # Errors
    /// As [`Self::read`]. Then everything stays as it was, and an event says so.
    pub(super) fn reload(&self) -> Result<()> {
        let _reading = self.reading.lock();
        let read = || {
            let nbd = self.nbd.as_ref().map(|source| read_nbd(&source.config)).transpose()?;
            let api = self.api.as_ref().map(|source| read_api(&source.config)).transpose()?;
            Ok((nbd, api))
        };
        let (nbd, api) = read().inspect_err(|error: &Error| {
            event::raise(event::CREDENTIALS_KEPT, "node", error.chain());
        })?;
        if let (Some(source), Some(acceptor)) = (&self.nbd, nbd) {
            source.current.send_replace(acceptor);
        }
        if let (Some(source), Some(guard)) = (&self.api, api) {
            source.current.send_replace(guard);
        }
        event::raise(event::CREDENTIALS_RELOADED, "node", "for connections from now on");
        Ok(())
    }
}

impl<C: Clone, T> Source<C, T> {
    fn read(config: &C, read: fn(&C) -> Result<T>) -> Result<Self> {
        let (current, _) = watch::channel(read(config)?);
        Ok(Self { config: config.clone(), current })
    }
}

fn read_nbd(config: &TlsConfig) -> Result<Tls> {
    match &config.proof {
        TlsProof::Certificates { certificate, key, client_ca } => {
            let (certificate, key) = (certificate.clone(), key.clone());
            let files = tls::TlsFiles { certificate, key, client_ca: client_ca.clone() };
            Ok(Tls::Certificates(tls::load(&files)?))
        }
        TlsProof::Keys { psk_file } => Ok(Tls::with_keys(named_keys::load(psk_file)?)),
    }
}

fn read_api(config: &ApiTcpConfig) -> Result<Guard> {
    let files = tls::TlsFiles {
        certificate: config.certificate.clone(),
        key: config.key.clone(),
        ..tls::TlsFiles::default()
    };
    Ok(Guard { token: Token::read(&config.token_file)?, acceptor: tls::load(&files)? })
}

//! `weft host`: who may connect, and by which keys.
//!
//! Keys come from files or standard input and go to the node; nothing here prints one but
//! `weft host key`, which makes it.

use std::fs::OpenOptions;
use std::io;
use std::io::Read;
use std::path::Path;

use rustix::rand::GetRandomFlags;
use rustix::rand::getrandom;
use weft_api::AddHost;
use weft_api::Client;
use weft_api::Dhchap;
use weft_api::DhchapKeys;
use weft_api::Host;
use weft_api::HostTlsKey;
use zeroize::Zeroizing;

use super::HostCommand;
use super::KeyArguments;
use super::KeyHash;
use super::admin::ask;
use super::exit::FAILED;
use super::exit::Failure;
use super::exit::USAGE;
use super::output::Table;
use super::output::print;
use super::output::say;
use super::output::show;
use crate::secret::DhchapKey;
use crate::secret::Hash;
use crate::secret::tls_key::TlsKey;

/// Longest key file read: far above any key with white space around it.
const FILE_BYTES_MAX: u64 = 4096;

/// Runs one command, against `node` unless it needs none.
pub(super) fn run(command: HostCommand, node: Result<Client, Failure>) -> Result<(), Failure> {
    match command {
        HostCommand::Add { nqn, keys, output } => {
            let host = AddHost { nqn, dhchap: read_keys(&keys)?, tls: read_tls_key(&keys)? };
            let added = ask(node?, async |client| client.add_host(&host).await)?;
            show(&output, &added, |host| format!("host {} added\n{}", host.nqn, word(host)))
        }
        HostCommand::Set { nqn, keys, no_dhchap, no_tls, output } => {
            let (dhchap, tls) = (read_keys(&keys)?, read_tls_key(&keys)?);
            let set = ask(node?, async |client| {
                let mut host = None;
                if no_dhchap || dhchap.is_some() {
                    host = Some(client.set_host_keys(&nqn, dhchap.as_ref()).await?);
                }
                if no_tls || tls.is_some() {
                    host = Some(client.set_host_tls_key(&nqn, tls.as_ref()).await?);
                }
                Ok(host.expect("at least one is asked for"))
            })?;
            show(&output, &set, |host| {
                let no_dhchap = no_dhchap.then(|| format!("host {nqn} need not authenticate\n"));
                let no_tls = no_tls.then(|| format!("host {nqn} does not encrypt\n"));
                [word(host), no_dhchap.unwrap_or_default(), no_tls.unwrap_or_default()].concat()
            })
        }
        HostCommand::Key { hash, tls: false } => {
            print(&format!("{}\n", &*new_key(hash)?.written()))
        }
        HostCommand::Key { hash, tls: true } => {
            print(&format!("{}\n", &*new_tls_key(hash)?.written()))
        }
        HostCommand::List(output) => {
            let hosts = ask(node?, async |client| client.hosts().await)?;
            show(&output, &hosts, |hosts| table(hosts))
        }
        HostCommand::Remove { nqn, output } => {
            ask(node?, async |client| client.remove_host(&nqn).await)?;
            say(&output, &format!("host {nqn} removed\n"))
        }
    }
}

/// The keys in the files named. Checked here too, so that a wrong file never leaves this machine.
fn read_keys(files: &KeyArguments) -> Result<Option<DhchapKeys>, Failure> {
    let Some(key) = &files.dhchap_key_file else { return Ok(None) };
    let ctrl_key = files.dhchap_ctrl_key_file.as_deref().map(read_key).transpose()?;
    Ok(Some(DhchapKeys { key: read_key(key)?, ctrl_key }))
}

fn read_key(path: &Path) -> Result<String, Failure> {
    let key = DhchapKey::parse(&read_text(path)?).map_err(|error| unread(path, &error))?;
    Ok(key.written().to_string())
}

/// The key for TLS in the file named, checked likewise.
fn read_tls_key(files: &KeyArguments) -> Result<Option<HostTlsKey>, Failure> {
    let Some(path) = &files.tls_key_file else { return Ok(None) };
    let key = TlsKey::parse(&read_text(path)?).map_err(|error| unread(path, &error))?;
    Ok(Some(HostTlsKey { key: key.written().to_string() }))
}

fn unread(path: &Path, reason: &dyn std::fmt::Display) -> Failure {
    Failure { code: USAGE, message: format!("read the key in {}: {reason}", path.display()) }
}

fn read_text(path: &Path) -> Result<Zeroizing<String>, Failure> {
    let mut text = Zeroizing::new(String::new());
    let read = match path.to_str() {
        Some("-") => io::stdin().lock().take(FILE_BYTES_MAX).read_to_string(&mut text),
        _ => {
            let file = OpenOptions::new().read(true).open(path);
            file.and_then(|file| file.take(FILE_BYTES_MAX).read_to_string(&mut text))
        }
    };
    read.map_err(|error| unread(path, &error))?;
    Ok(text)
}

fn new_key(hash: KeyHash) -> Result<DhchapKey, Failure> {
    Ok(DhchapKey::from_random(named(hash), &*random()?))
}

fn new_tls_key(hash: KeyHash) -> Result<TlsKey, Failure> {
    TlsKey::from_random(named(hash), &*random()?).ok_or_else(|| Failure {
        code: USAGE,
        message: "make a TLS key: --hash is none, sha256 or sha384".to_owned(),
    })
}

fn random() -> Result<Zeroizing<[u8; 64]>, Failure> {
    let mut random = Zeroizing::new([0; 64]);
    // The kernel gives up to 256 bytes at once.
    getrandom(random.as_mut_slice(), GetRandomFlags::empty()).map_err(|error| Failure {
        code: FAILED,
        message: format!("draw random bytes for a key: {error}"),
    })?;
    Ok(random)
}

fn named(hash: KeyHash) -> Option<Hash> {
    match hash {
        KeyHash::None => None,
        KeyHash::Sha256 => Some(Hash::Sha256),
        KeyHash::Sha384 => Some(Hash::Sha384),
        KeyHash::Sha512 => Some(Hash::Sha512),
    }
}

/// That a host authenticates or encrypts from now on; nothing if it does neither.
fn word(host: &Host) -> String {
    let nqn = &host.nqn;
    let dhchap = host.dhchap.as_ref().map_or(String::new(), |dhchap| {
        format!("host {nqn} authenticates from its next connection on: {}\n", text(dhchap))
    });
    let tls = host.tls.as_ref().map_or(String::new(), |tls| {
        format!("host {nqn} encrypts from its next connection on: TLS ({})\n", tls.key_hash)
    });
    dhchap + &tls
}

/// Whose keys are set, and their hashes.
fn text(dhchap: &Dhchap) -> String {
    match &dhchap.ctrl_key_hash {
        None => format!("host ({})", dhchap.key_hash),
        Some(ctrl) => format!("host ({}) + ctrl ({ctrl})", dhchap.key_hash),
    }
}

fn table(hosts: &[Host]) -> String {
    let mut table = Table::new(&["HOST", "DHCHAP", "TLS"], &[]);
    for host in hosts {
        let dhchap = host.dhchap.as_ref().map_or("no".to_owned(), text);
        let tls = host.tls.as_ref();
        let tls = tls.map_or("no".to_owned(), |tls| format!("yes ({})", tls.key_hash));
        table.row(vec![host.nqn.clone(), dhchap, tls]);
    }
    table.text()
}

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

/// Longest key file read: far above any key with white space around it.
const FILE_BYTES_MAX: u64 = 4096;

/// Runs one command, against `node` unless it needs none.
pub(super) fn run(command: HostCommand, node: Result<Client, Failure>) -> Result<(), Failure> {
    match command {
        HostCommand::Add { nqn, keys, output } => {
            let host = AddHost { nqn, dhchap: read_keys(&keys)? };
            let added = ask(node?, async |client| client.add_host(&host).await)?;
            show(&output, &added, |host| format!("host {} added\n{}", host.nqn, word(host)))
        }
        HostCommand::Set { nqn, keys, no_dhchap: _, output } => {
            let keys = read_keys(&keys)?;
            let set = ask(node?, async |client| client.set_host_keys(&nqn, keys.as_ref()).await)?;
            show(&output, &set, |host| match &host.dhchap {
                Some(_) => word(host),
                None => format!("host {} need not authenticate\n", host.nqn),
            })
        }
        HostCommand::Key { hash } => print(&format!("{}\n", &*new_key(hash)?.written())),
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
    let failed = |reason: &dyn std::fmt::Display| Failure {
        code: USAGE,
        message: format!("read the key in {}: {reason}", path.display()),
    };
    let mut text = Zeroizing::new(String::new());
    let read = match path.to_str() {
        Some("-") => io::stdin().lock().take(FILE_BYTES_MAX).read_to_string(&mut text),
        _ => {
            let file = OpenOptions::new().read(true).open(path);
            file.and_then(|file| file.take(FILE_BYTES_MAX).read_to_string(&mut text))
        }
    };
    read.map_err(|error| failed(&error))?;
    let key = DhchapKey::parse(&text).map_err(|error| failed(&error))?;
    Ok(key.written().to_string())
}

fn new_key(hash: KeyHash) -> Result<DhchapKey, Failure> {
    let mut random = Zeroizing::new([0; 64]);
    // The kernel gives up to 256 bytes at once.
    getrandom(random.as_mut_slice(), GetRandomFlags::empty()).map_err(|error| Failure {
        code: FAILED,
        message: format!("draw random bytes for a key: {error}"),
    })?;
    let hash = match hash {
        KeyHash::None => None,
        KeyHash::Sha256 => Some(Hash::Sha256),
        KeyHash::Sha384 => Some(Hash::Sha384),
        KeyHash::Sha512 => Some(Hash::Sha512),
    };
    Ok(DhchapKey::from_random(hash, &random))
}

/// That a host authenticates from now on; nothing if it does not.
fn word(host: &Host) -> String {
    match &host.dhchap {
        None => String::new(),
        Some(dhchap) => {
            format!(
                "host {} authenticates from its next connection on: {}\n",
                host.nqn,
                text(dhchap)
            )
        }
    }
}

/// Whose keys are set, and their hashes.
fn text(dhchap: &Dhchap) -> String {
    match &dhchap.ctrl_key_hash {
        None => format!("host ({})", dhchap.key_hash),
        Some(ctrl) => format!("host ({}) + ctrl ({ctrl})", dhchap.key_hash),
    }
}

fn table(hosts: &[Host]) -> String {
    let mut table = Table::new(&["HOST", "DHCHAP"], &[]);
    for host in hosts {
        let dhchap = host.dhchap.as_ref().map_or("no".to_owned(), text);
        table.row(vec![host.nqn.clone(), dhchap]);
    }
    table.text()
}

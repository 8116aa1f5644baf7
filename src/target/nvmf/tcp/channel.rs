//! Whether a connection is encrypted, which its first byte says: TLS begins at once, before any PDU.
//! (NVMe/TCP 1.1, 3.6.1)
//!
//! # Invariants
//! * Where a secure channel is required, nothing is served without.
//! * An encrypted connection is with who has the TLS key of [`SecureNames::host_nqn`]; that its
//!   Connect says the same name, and that hosts with a key do not come without, is for
//!   [`connect`](crate::target::nvmf::connect) to check.

use std::fmt;
use std::sync::Arc;

use crate::observe::event;
use crate::target::nvmf::subsystem::DISCOVERY_NQN;
use crate::target::nvmf::subsystem::SecureChannel;
use crate::target::nvmf::subsystem::Subsystem;
use crate::target::nvmf::tcp::identity::Identity;
use crate::target::nvmf::transport::Path;
use crate::target::nvmf::transport::SecureNames;
use crate::target::psk::Acceptor;
use crate::target::psk::Candidate;
use crate::target::psk::Refused;
use crate::target::psk::stream::PskStream;
use crate::target::stream::Socket;

/// What a TLS client sends first: the type of a record that holds a handshake. (RFC 8446, 5.1) The
/// first PDU begins with a zero.
const TLS_HANDSHAKE: u8 = 0x16;

/// A connection on which PDUs come next.
pub enum Channel {
    /// Others may read and change what is sent.
    Plain(Socket),
    /// With whom, by its key.
    Secure(PskStream, SecureNames),
}

/// Lets connections in, encrypted or not.
pub struct Door {
    subsystem: Arc<Subsystem>,
    /// `None`: all are plain.
    acceptor: Option<Acceptor>,
}

impl Door {
    /// The door of this subsystem.
    #[must_use]
    pub fn new(subsystem: &Arc<Subsystem>) -> Self {
        let acceptor = (subsystem.secure_channel() != SecureChannel::Off).then(|| {
            let subsystem = Arc::clone(subsystem);
            Acceptor::new(move |identity| candidates(&subsystem, identity))
        });
        Self { subsystem: Arc::clone(subsystem), acceptor }
    }

    /// Opens to a connection of which nothing was received yet, or tells the operator why not.
    ///
    /// # Cancellation
    /// Dropping it closes the connection.
    pub async fn open(&self, socket: Socket, path: &Path) -> Option<Channel> {
        let Some(acceptor) = &self.acceptor else { return Some(Channel::Plain(socket)) };
        let required = self.subsystem.secure_channel() == SecureChannel::Required;
        match socket.first_byte().await {
            Ok(Some(TLS_HANDSHAKE)) => {}
            Ok(_) if !required => return Some(Channel::Plain(socket)),
            Ok(None) => return None,
            Ok(Some(_)) => {
                refuse(format_args!("{} does not encrypt, which is required", path.host));
                return None;
            }
            Err(error) => {
                tracing::debug!(%error, "NVMe connection lost");
                return None;
            }
        }
        let secured = match acceptor.accept(socket).await {
            Ok(secured) => secured,
            Err(refused) => {
                self.report(path, &refused);
                return None;
            }
        };
        let identity = Identity::parse(&secured.identity).expect("its key was found by it");
        let names = SecureNames {
            host_nqn: identity.host_nqn.to_owned(),
            subsystem_nqn: identity.subsystem_nqn.to_owned(),
        };
        Some(Channel::Secure(secured.stream, names))
    }

    fn report(&self, path: &Path, refused: &Refused) {
        let from = path.host;
        match refused {
            Refused::UnknownIdentity(identity) if !self.has_key(identity) => {
                refuse(format_args!("{from} has {refused}"));
            }
            // The identity of another key, by its digest, is unknown too.
            Refused::UnknownIdentity(_) | Refused::WrongKey(_) => {
                self.subsystem.authentication_failed(format_args!("{from} has {refused}"));
            }
            Refused::Failed(_) => tracing::info!(%from, reason = %refused, "NVMe host dropped"),
        }
    }

    /// Whether this names a host that has a key.
    fn has_key(&self, identity: &[u8]) -> bool {
        let host = Identity::parse(identity).map(|identity| identity.host_nqn);
        host.is_some_and(|host| self.subsystem.host_tls_key(host).is_some())
    }
}

/// Tells the operator of a stranger. One subject, whoever it is: a flood is one event.
fn refuse(message: fmt::Arguments<'_>) {
    event::raise(event::HOST_REFUSED, "nvme-tcp", message);
}

/// The keys that an identity of ours may stand for.
fn candidates(subsystem: &Subsystem, identity: &[u8]) -> Vec<Candidate> {
    let Some(identity) = Identity::parse(identity) else { return Vec::new() };
    let to = identity.subsystem_nqn;
    let key = subsystem.host_tls_key(identity.host_nqn).filter(|_| {
        // Hosts look for the discovery log under the same key.
        to == DISCOVERY_NQN || to == subsystem.nqn()
    });
    key.map_or_else(Vec::new, |key| identity.candidates(&key))
}

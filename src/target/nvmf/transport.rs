//! What a transport does for a queue: carry data and completions to the host.
//!
//! A transport takes commands off the wire, asks [`Queue::transfer`] what data they move, gets the
//! host's data, and hands both to [`Queue::execute`]. Answers come back through [`Responder`].
//!
//! [`Queue::transfer`]: crate::target::nvmf::queue::Queue::transfer
//! [`Queue::execute`]: crate::target::nvmf::queue::Queue::execute

use std::net::IpAddr;
use std::net::SocketAddr;

use crate::target::nvmf::wire::Cqe;
use crate::volume::Piece;

/// The two ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// Our address, as the host used it.
    pub portal: SocketAddr,
    /// The host's.
    pub host: IpAddr,
}

/// Whom an encrypted connection is with, as its key says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecureNames {
    /// The host.
    pub host_nqn: String,
    /// What it connects to.
    pub subsystem_nqn: String,
}

/// Where a queue's answers go.
pub trait Responder {
    /// Sends a completion.
    fn complete(&mut self, cqe: Cqe);
    /// Sends the data of a command that succeeded, all of it, and its completion. Leaves `pieces`
    /// empty for the next command.
    fn data(&mut self, cqe: Cqe, pieces: &mut Vec<Piece>);
    /// So many commands will never be completed: a reset voided them.
    fn forget(&mut self, commands: usize);
}

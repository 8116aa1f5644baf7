//! The NVMe over Fabrics target: volumes as namespaces of one subsystem.
//!
//! | file | owns |
//! |---|---|
//! | [`wire`] | queue entries: bytes to types and back |
//! | [`subsystem`], [`controller`] | what all connections share |
//! | [`connect`] | who is let in |
//! | [`auth`] | how hosts prove who they are |
//! | [`queue`] | one queue's commands and completions, without I/O |
//! | [`admin`], [`identify`], [`log_page`] | the admin queue's commands |
//! | [`io`], [`fused`] | commands on namespaces |
//! | [`reservation`], [`notices`] | reservations: their commands, and what hosts are told |
//! | [`transport`] | what a transport does for a queue |
//! | [`tcp`] | the TCP transport |
//! | [`status`] | our errors as NVMe's |
//!
//! Specifications: NVMe Base 1.4, NVMe over Fabrics 1.1, NVMe/TCP Transport 1.0. What of them is
//! met and what is refused: `docs/spec/nvme-tcp.md`.

pub mod admin;
pub mod auth;
pub mod connect;
pub mod controller;
pub mod fused;
pub mod identify;
pub mod io;
pub mod log_page;
pub mod notices;
pub mod queue;
pub mod reservation;
pub mod status;
pub mod subsystem;
pub mod tcp;
pub mod transport;
pub mod wire;

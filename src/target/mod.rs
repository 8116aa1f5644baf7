//! Protocols.
pub mod nbd;

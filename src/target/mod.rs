//! Protocols we serve. Each is a module of its own and knows no other, and no storage word:
//! what a target sees of storage is [`crate::volume::Volume`]. They share [`stream`], [`turns`],
//! [`gather`], [`handshakes`], [`connections`], [`budget`], [`timing`], [`rarely`], and for keys [`psk`]
//! and [`hkdf`].

pub mod budget;
pub mod connections;
pub mod gather;
pub mod handshakes;
pub mod hkdf;
pub mod nbd;
pub mod nvmf;
pub mod psk;
pub mod rarely;
pub mod stream;
pub mod timing;
pub mod turns;

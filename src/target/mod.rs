//! Protocols we serve. Each is a module of its own and knows no other, and no storage word:
//! what a target sees of storage is [`crate::volume::Volume`].

pub mod nbd;

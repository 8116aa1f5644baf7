//! The running node.
pub mod config;

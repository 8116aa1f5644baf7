//! The real binary, as an operator and as systemd use it: starts, stops, commands, exit codes.
//!
//! Each test has a directory of its own below the system's temporary one, listens on free ports
//! of loopback, stops what it started by process id, and removes its directory.

mod api;
mod doctor;
mod journal;
mod manual;
mod observe;
mod openapi;
mod remote;
mod start;
mod stop;
mod support;
mod task;
mod tls;
mod volumes;
mod watch;

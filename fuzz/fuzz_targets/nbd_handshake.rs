//! libFuzzer target for the NBD handshake; see `nbd_drivers.rs`.
#![no_main]

#[path = "../nbd_drivers.rs"]
#[allow(dead_code, reason = "each target uses one driver")]
mod drivers;

libfuzzer_sys::fuzz_target!(|input: &[u8]| drivers::handshake(input));

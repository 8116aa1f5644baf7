//! libFuzzer target for authentication; see `auth_drivers.rs`.
#![no_main]

#[path = "../auth_drivers.rs"]
mod drivers;

libfuzzer_sys::fuzz_target!(|input: &[u8]| drivers::authentication(input));

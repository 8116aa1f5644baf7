//! libFuzzer target for authentication; see `auth_drivers.rs`.
#![no_main]

#[path = "../auth_drivers.rs"]
#[allow(dead_code, reason = "`action::SEND` names what the tests send; here any other byte does")]
mod drivers;

libfuzzer_sys::fuzz_target!(|input: &[u8]| drivers::authentication(input));

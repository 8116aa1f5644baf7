//! libFuzzer target `unit` of the format; see `format_drivers.rs`.
#![no_main]

#[path = "../format_drivers.rs"]
#[allow(dead_code, reason = "each target uses one driver")]
mod drivers;

libfuzzer_sys::fuzz_target!(|input: &[u8]| drivers::unit(input));

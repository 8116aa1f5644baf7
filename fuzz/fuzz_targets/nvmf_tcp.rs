//! libFuzzer target for NVMe/TCP; see `nvmf_drivers.rs`.
#![no_main]

#[path = "../nvmf_drivers.rs"]
mod drivers;

libfuzzer_sys::fuzz_target!(|input: &[u8]| drivers::conversation(input));

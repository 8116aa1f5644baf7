//! Fuzzes authentication on the stable toolchain: seeded, structure-aware byte mutation.
//!
//! As `tests/fuzz_nvmf.rs`; the judge is in `fuzz/auth_drivers.rs`, which the libFuzzer target in
//! `fuzz/` shares.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../fuzz/auth_drivers.rs"]
mod drivers;
#[path = "../fuzz/seeded.rs"]
mod seeded;

use drivers::action;
use seeded::Random;
use seeded::fuzz;

fn negotiate(random: &mut Random) -> Vec<u8> {
    let mut message = vec![0; 72];
    message[4] = random.byte() % 4;
    message[6] = random.pick(&[0, 0, 0, 0, 0, 0, 0, 1]);
    message[7] = random.pick(&[1, 1, 1, 1, 1, 0, 2]);
    message[8] = random.pick(&[1, 1, 1, 1, 1, 2]);
    message[10] = random.pick(&[1, 2, 3, 30, 31]);
    message[11] = random.pick(&[1, 1, 2, 30]);
    message[12..15].copy_from_slice(&[random.byte() % 5, 1, 2]);
    message[42] = random.byte() % 3;
    message
}

fn reply(random: &mut Random) -> Vec<u8> {
    let hash_bytes = random.pick(&[32, 32, 48, 64, 0, 33]);
    let value_bytes = random.pick(&[0_u16, 0, 0, 16]);
    let mut message = vec![1, 2, 0, 0, random.byte() % 4, 0, hash_bytes, 0, random.byte() % 2, 0];
    message.extend(value_bytes.to_le_bytes());
    message.extend([random.byte() % 2, 0, 0, 0]);
    message.extend(vec![random.byte(); 2 * usize::from(hash_bytes) + usize::from(value_bytes)]);
    message
}

fn transaction(random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![random.byte()];
    for _ in 0..random.below(12) {
        let message = match random.below(8) {
            0..2 => negotiate(random),
            2..4 => reply(random),
            4 => [&[1, 4, 0, 0, random.byte() % 4, 0][..], &[0; 10]].concat(),
            5 if random.below(4) == 0 => vec![0, 0xf0, 0, 0, 1, 0, 1, 1],
            6 if random.below(4) == 0 => {
                bytes.extend([action::NO_POWER, 128]);
                continue;
            }
            _ => {
                bytes.extend([action::RECEIVE, random.pick(&[128, 128, 128, 1, 3])]);
                continue;
            }
        };
        bytes.extend([action::SEND, u8::try_from(message.len()).unwrap()]);
        bytes.extend(message);
    }
    bytes
}

#[test]
fn transactions() {
    fuzz("nvmf_auth", 1, transaction, drivers::authentication);
}

//! Fuzzes the NBD target on the stable toolchain: seeded, structure-aware byte mutation.
//!
//! Every run replays the corpus, then makes `FUZZ_ITERATIONS` (default: a few seconds' worth)
//! conversations out of valid messages and damages most of them. A failure prints its seed; rerun
//! it with `FUZZ_SEED=n FUZZ_ITERATIONS=1`. The judges are in `fuzz/nbd_drivers.rs`, which the
//! libFuzzer targets in `fuzz/` share.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::runtime;
use tokio::task::LocalSet;
use tokio::task::spawn_local;
use tokio::time::timeout;
use weft::target::nbd::NbdOptions;
use weft::target::nbd::NbdTarget;
use weft::volume::memory::MemoryDirectory;
use weft::volume::memory::MemoryVolume;

#[path = "../fuzz/nbd_drivers.rs"]
mod drivers;
#[path = "../fuzz/seeded.rs"]
mod seeded;

use seeded::Random;
use seeded::fuzz;
use seeded::mutate;
use seeded::seeds;

fn text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
    bytes.extend(text.as_bytes());
}

fn option(bytes: &mut Vec<u8>, option: u32, data: &[u8]) {
    bytes.extend(b"IHAVEOPT");
    bytes.extend(option.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend(data);
}

/// Options as clients send them, in any order, often ending in GO; then requests.
fn handshake_conversation(random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![random.byte(), 0, 0, 0, random.pick(&[3, 3, 3, 2, 1, 0])];
    for _ in 0..random.below(6) {
        let name = random.pick(&["a", "b", "", "nope"]);
        let mut data = Vec::new();
        let number = random.pick(&[1, 2, 3, 5, 6, 8, 8, 9, 10, 10, 11, 11, 99]);
        match number {
            1 => data.extend(name.as_bytes()),
            6 => {
                text(&mut data, name);
                data.extend([0, 2, 0, 3, 0, random.byte()]);
            }
            9 | 10 => {
                text(&mut data, name);
                let queries = random.below(3);
                data.extend(u32::try_from(queries).unwrap().to_be_bytes());
                for _ in 0..queries {
                    text(&mut data, random.pick(&["base:allocation", "base:", "x:y", ""]));
                }
            }
            99 => data.resize(random.index(300), 7),
            _ => {}
        }
        option(&mut bytes, number, &data);
    }
    let mut go = Vec::new();
    text(&mut go, random.pick(&["a", "b", ""]));
    go.extend([0, 1, 0, 3]);
    option(&mut bytes, random.pick(&[7, 7, 7, 1]), &go);
    let extended = random.below(3) == 0;
    requests(random, extended, &mut bytes);
    bytes
}

fn requests(random: &mut Random, extended: bool, bytes: &mut Vec<u8>) {
    for _ in 0..random.below(20) {
        let command = u16::try_from(random.pick(&[0, 0, 0, 1, 1, 1, 3, 4, 5, 6, 6, 7, 7, 9]));
        let command = command.unwrap();
        let mut flags = match random.below(4) {
            0 => u16::from(random.byte()),
            _ => random.pick(&[0, 0, 1, if command == 6 { 2 } else { 0 }]),
        };
        let size = drivers::VOLUME_BYTES as u64;
        let (mut offset, mut length) = (random.below(size), random.below(20_000));
        if random.below(2) == 0 {
            (offset, length) = (offset & !4095, (length + 4095) & !4095);
        }
        match random.below(30) {
            0 => offset = u64::MAX - random.below(5000),
            1 => length = random.pick(&[0, 1, 32 << 20, (32 << 20) + 1, u64::from(u32::MAX)]),
            2 => offset = size - length.min(size),
            _ => {}
        }
        if extended && command == 1 {
            flags |= 32;
        }
        bytes.extend(if extended { 0x21e4_1c71_u32 } else { 0x2560_9513 }.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(random.next().to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        if extended {
            bytes.extend(length.to_be_bytes());
        } else {
            bytes.extend(u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
        }
        if command == 1 && length < 100_000 {
            let fill = random.byte();
            bytes.resize(bytes.len() + usize::try_from(length).unwrap(), fill);
        }
    }
}

fn transmission_conversation(random: &mut Random) -> Vec<u8> {
    let choice = random.byte();
    let mut bytes = vec![choice, random.byte()];
    requests(random, choice % 3 == 2, &mut bytes);
    bytes
}

#[test]
fn handshake() {
    fuzz("nbd_handshake", 1, handshake_conversation, drivers::handshake);
}

#[test]
fn transmission() {
    fuzz("nbd_transmission", 1, transmission_conversation, drivers::transmission);
}

/// The same conversations through sockets: whatever is sent, the session ends when the client does.
#[test]
fn sessions_end_whatever_is_sent() {
    let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, async {
        let volume = Arc::new(MemoryVolume::new("a", drivers::VOLUME_BYTES as u64));
        let directory = Arc::new(MemoryDirectory::new([volume as _]));
        let target = Arc::new(NbdTarget::new(directory, NbdOptions::default()));
        for seed in seeds(20) {
            let mut random = Random(seed);
            let mut bytes = handshake_conversation(&mut random);
            mutate(&mut random, &mut bytes);
            let stream = bytes.split_off(bytes.len().min(1));
            let (client, server) = UnixStream::pair().unwrap();
            let session = spawn_local(Arc::clone(&target).serve(server));
            let (mut replies, mut requests) = client.into_split();
            let sender = spawn_local(async move {
                let _ = requests.write_all(&stream).await;
            });
            let mut received = Vec::new();
            let all = async {
                let _ = replies.read_to_end(&mut received).await;
                sender.await.unwrap();
                session.await.unwrap();
            };
            let ended = timeout(Duration::from_secs(20), all).await;
            assert!(ended.is_ok(), "seed {seed} hangs: rerun with FUZZ_SEED={seed}");
        }
    });
}

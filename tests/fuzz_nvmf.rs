//! Fuzzes the NVMe/TCP target on the stable toolchain: seeded, structure-aware byte mutation.
//!
//! As `tests/fuzz_nbd.rs`; the judge is in `fuzz/nvmf_drivers.rs`, which the libFuzzer target in
//! `fuzz/` shares.

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
use uuid::Uuid;
use weft::target::nvmf::subsystem::Subsystem;
use weft::target::nvmf::subsystem::SubsystemOptions;
use weft::target::nvmf::tcp::NvmeTcpOptions;
use weft::target::nvmf::tcp::NvmeTcpTarget;
use weft::volume::memory::MemoryDirectory;
use weft::volume::memory::MemoryVolume;

#[path = "../fuzz/nvmf_drivers.rs"]
mod drivers;
#[path = "../fuzz/seeded.rs"]
mod seeded;

use seeded::Random;
use seeded::fuzz;
use seeded::mutate;
use seeded::seeds;

fn small(random: &mut Random, limit: u64) -> u32 {
    u32::try_from(random.below(limit)).unwrap()
}

/// A command as hosts send them, most of them plausible.
fn command(random: &mut Random, admin: bool) -> Vec<u8> {
    let mut sqe = vec![0; 64];
    sqe[0] = if admin {
        random.pick(&[0x02, 0x02, 0x06, 0x06, 0x08, 0x09, 0x0a, 0x0c, 0x18, 0x7f, 0x7f, 0x80])
    } else {
        random.pick(&[0, 1, 1, 1, 2, 2, 2, 5, 8, 9, 9, 0x0c, 0x0d, 0x0d, 0x0e, 0x11, 0x15, 0x7f])
    };
    sqe[1] = random.pick(&[0x40, 0x40, 0x40, 0x40, 0x40, 0x40, 0, 0x41]);
    sqe[2] = random.byte() % 64;
    sqe[4] = random.pick(&[1, 1, 1, 2, 0, 3, 4]);
    let blocks = small(random, 40) + 1;
    let mut length = blocks * if sqe[4] == 2 { 4096 } else { 512 };
    if admin {
        let dwords = small(random, 1100);
        length = random.pick(&[4096, 4096, 0, (dwords + 1) * 4]);
        sqe[40] =
            random.pick(&[0, 1, 2, 3, 4, 5, 6, 7, 0x0b, 0x0c, 0x0f, 0x70, 0x80, 0x81, 0x82, 0x83]);
        sqe[42..44]
            .copy_from_slice(&u16::try_from(length / 4).unwrap().wrapping_sub(1).to_le_bytes());
        sqe[44..48].copy_from_slice(&random.pick(&[0_u32, 0, 1, 0x14, 0x100]).to_le_bytes());
        sqe[48] = random.pick(&[0, 0, 0, 4, 1]);
    } else {
        let last = drivers::VOLUME_BYTES / 512 + 8;
        sqe[40..48].copy_from_slice(&random.below(last).to_le_bytes());
        sqe[48..50].copy_from_slice(&u16::try_from(blocks - 1).unwrap().to_le_bytes());
        if sqe[0] == 9 {
            sqe[40] = random.pick(&[0, 1, 3, 255]);
            sqe[44] = random.pick(&[4, 4, 1]);
            length = 4096;
        }
        if matches!(sqe[0], 0x0d | 0x0e | 0x11 | 0x15) {
            length = random.pick(&[16, 16, 16, 8, 4096]);
            sqe[40..52].fill(0);
            sqe[40] = random.pick(&[0, 0, 0, 1, 2, 3, 8, 10]);
            sqe[41] = random.byte() % 8;
            sqe[43] = random.pick(&[0, 0x40, 0x80, 0xc0]);
            if sqe[0] == 0x0e {
                length = random.pick(&[64, 128, 4096]);
                sqe[40..44].copy_from_slice(&(length / 4 - 1).to_le_bytes());
                sqe[44] = random.pick(&[1, 1, 1, 0]);
            }
        }
    }
    let in_capsule = sqe[0] & 3 == 1 && length <= 8192 && random.below(2) == 0;
    sqe[32..36].copy_from_slice(&length.to_le_bytes());
    sqe[39] = if in_capsule { 0x01 } else { random.pick(&[0x5a, 0x5a, 0x5a, 0x5a, 0x40]) };
    // Few keys, so that they are known ones.
    let few = matches!(sqe[0], 0x0d | 0x11 | 0x15);
    let byte = random.byte() % if few { 3 } else { u8::MAX };
    let data = if in_capsule { vec![byte; usize::try_from(length).unwrap()] } else { Vec::new() };
    drivers::pdu(4, 0, &sqe, &data)
}

/// Data for some transfer, which may be one that was asked for.
fn data(random: &mut Random) -> Vec<u8> {
    let blocks = usize::try_from(small(random, 20) + 1).unwrap();
    let mut specific = vec![random.byte() % 64, 0, random.pick(&[0, 0, 0, 1, 2]), 0];
    specific.extend(random.pick(&[0_u32, 0, 0, 512]).to_le_bytes());
    specific.extend(u32::try_from(blocks * 512).unwrap().to_le_bytes());
    specific.extend([0; 4]);
    drivers::pdu(6, random.pick(&[4, 4, 0]), &specific, &vec![7; blocks * 512])
}

/// A write and the data for it, as an undisturbed host would send them: its is the first transfer.
fn granted_write(random: &mut Random) -> Vec<u8> {
    let mut sqe = vec![0; 64];
    sqe[..5].copy_from_slice(&[1, 0x40, 63, 0, 1]);
    sqe[32..36].copy_from_slice(&2048_u32.to_le_bytes());
    sqe[39] = 0x5a;
    sqe[48] = 3;
    let mut bytes = drivers::pdu(4, 0, &sqe, &[]);
    for (at, last) in [(0_u32, 0), (1024, 4)] {
        let mut specific = vec![63, 0, 0, 0];
        specific.extend(at.to_le_bytes());
        specific.extend(1024_u32.to_le_bytes());
        specific.extend([0; 4]);
        bytes.extend(drivers::pdu(6, last, &specific, &[random.byte(); 1024]));
    }
    bytes
}

/// The halves of a fused pair, in capsules; one may be missing, or name other blocks.
fn fused_pair(random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (opcode, fuse) in [(5, 0x41), (1, 0x42)] {
        let mut sqe = vec![0; 64];
        sqe[..5].copy_from_slice(&[opcode, fuse, random.byte() % 64, 0, 1]);
        sqe[33] = 2;
        sqe[39] = random.pick(&[0x01, 0x01, 0x01, 0x5a]);
        sqe[40] = random.pick(&[7, 7, 7, 7, 7, 7, 7, 8]);
        let data = if sqe[39] == 1 { vec![random.byte() % 2; 512] } else { Vec::new() };
        if random.below(8) > 0 {
            bytes.extend(drivers::pdu(4, 0, &sqe, &data));
        }
    }
    bytes
}

fn conversation(random: &mut Random) -> Vec<u8> {
    let choice = random.byte();
    let mut bytes = vec![choice, random.byte()];
    match choice % 3 {
        0 => {
            bytes.extend(drivers::ic_req(random.byte() % 4, random.byte() % 40));
            bytes.extend(command(random, true));
        }
        1 => (0..random.below(20)).for_each(|_| bytes.extend(command(random, true))),
        _ => {
            for _ in 0..random.below(20) {
                match random.below(12) {
                    0 => bytes.extend(data(random)),
                    1..4 => bytes.extend(granted_write(random)),
                    4 => bytes.extend(fused_pair(random)),
                    _ => bytes.extend(command(random, false)),
                }
            }
        }
    }
    bytes
}

#[test]
fn tcp() {
    fuzz("nvmf_tcp", 4, conversation, drivers::conversation);
}

/// Bytes like these through a socket: whatever is sent, the session ends when the host does.
#[test]
fn sessions_end_whatever_is_sent() {
    let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, async {
        let volume = Arc::new(MemoryVolume::new("a", drivers::VOLUME_BYTES));
        let directory = Arc::new(MemoryDirectory::new([volume as _]));
        let options = SubsystemOptions::new(Uuid::from_u128(7));
        let subsystem = Arc::new(Subsystem::new(directory, options));
        let target = Arc::new(NvmeTcpTarget::new(subsystem, NvmeTcpOptions::default()));
        for seed in seeds(40) {
            let mut random = Random(seed);
            let mut bytes = drivers::ic_req(random.byte() % 4, 0);
            bytes.extend(conversation(&mut random).split_off(2));
            mutate(&mut random, &mut bytes);
            let (host, server) = UnixStream::pair().unwrap();
            let session = spawn_local(Arc::clone(&target).serve(server));
            let (mut answers, mut commands) = host.into_split();
            let sender = spawn_local(async move {
                let _ = commands.write_all(&bytes).await;
            });
            let mut received = Vec::new();
            let all = async {
                let _ = answers.read_to_end(&mut received).await;
                sender.await.unwrap();
                session.await.unwrap();
            };
            let ended = timeout(Duration::from_secs(20), all).await;
            assert!(ended.is_ok(), "seed {seed} hangs: rerun with FUZZ_SEED={seed}");
        }
    });
}

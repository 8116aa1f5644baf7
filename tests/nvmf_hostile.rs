//! Hosts that mean ill, many at once, beside hosts that mean well: the latter are served all the
//! time and let in at any time, and memory stays bounded.
//!
//! Everything runs in one thread, so that whatever the target does for the hostile hosts is time
//! the others wait for.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinHandle;
use tokio::task::spawn_local;
use tokio::time::Instant;
use tokio::time::sleep;
use weft::target::nvmf::tcp::NvmeTcpOptions;

#[expect(dead_code, reason = "this test needs a part of it")]
#[path = "nvmf/host.rs"]
mod host;

use host::Host;
use host::READ;
use host::Served;
use host::WRITE;
use host::ic_req;
use host::io;
use host::run;
use host::serve;
use host::sqe;

/// Of each kind.
const HOSTILE: u16 = 24;
/// What a request of a well-meaning host may take. It takes milliseconds; the machine may be busy.
const SERVED_WITHIN: Duration = Duration::from_secs(5);
/// How long it goes on.
const ROUNDS: u32 = 100;
/// More than the hosts of this test, which are in the same process, need for themselves, and far
/// less than what they try to make the target hold: 24 hosts times 128 MiB and more.
const GROWTH_MAX: u64 = 192 << 20;

/// Resident memory of this process, in bytes.
fn resident_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// A connection with an I/O queue of its own controller.
async fn with_queue(served: &Served) -> (Host, Host) {
    let (admin, id, _) = Host::admin(served, 0).await;
    let (mut queue, _) = Host::open(&served.target).await;
    queue.begin(0).await;
    queue.connect(&served.nqn, 1, 1023, id).await;
    (admin, queue)
}

/// Says nothing, over several connections, again and again: more than may be in the handshake.
async fn half_open(served: &Served) {
    loop {
        let mut hosts = Vec::new();
        for _ in 0..8 {
            hosts.push(Host::open(&served.target).await);
            sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Says hello a byte at a time, and the first command too.
async fn slow_loris(served: &Served) {
    loop {
        let (mut host, _) = Host::open(&served.target).await;
        let bytes = [ic_req(0, 0), host.pdu(4, 0, &io(READ, 1, 0, 1), &[])].concat();
        for byte in bytes {
            // It may have had to give way by then.
            let _ = host.stream.write_all(&[byte]).await;
            sleep(Duration::from_millis(40)).await;
        }
    }
}

/// Claims PDUs of all sizes, and types that make no sense where they are.
async fn nonsense(served: &Served) {
    for round in 0_u32.. {
        let (mut host, _) = Host::open(&served.target).await;
        let mut pdu = match round % 4 {
            0 => host.pdu(4, 0, &io(WRITE, 1, 0, 1), &[0; 512]),
            1 => host.h2c(1, 0, 0, &[1; 512], true),
            2 => ic_req(0, 0),
            _ => host.pdu(7, 0, &[0; 16], &[]),
        };
        let length = [u32::MAX, 0, 1 << 30, 71][usize::try_from(round / 4 % 4).unwrap()];
        pdu[4..8].copy_from_slice(&length.to_le_bytes());
        // It may be closed by then.
        let _ = host.stream.write_all(&[ic_req(0, 0), pdu].concat()).await;
        let _ = host.stream.read_to_end(&mut Vec::new()).await;
    }
}

/// Connects and leaves at once.
async fn flood(served: &Served) {
    loop {
        let (host, _) = Host::open(&served.target).await;
        drop(host);
        sleep(Duration::from_millis(20)).await;
    }
}

/// Asks for a lot and takes nothing.
async fn never_reads(served: &Served) {
    let (_admin, mut host) = with_queue(served).await;
    for cid in 0..1024 {
        let read = host.pdu(4, 0, &io(READ, cid, 0, 2048), &[]);
        host.stream.write_all(&read).await.unwrap();
    }
    std::future::pending::<()>().await;
}

/// Announces a lot, and sends all of it but for the end.
async fn never_ends(served: &Served) {
    let (_admin, mut host) = with_queue(served).await;
    for cid in 0..128 {
        host.command(&io(WRITE, cid, 0, 2048), &[]).await;
    }
    let grant = host.next().await;
    let most = vec![7; (1 << 20) - 512];
    let pdu = host.h2c(grant.u16(0), grant.u16(2), 0, &most, false);
    host.stream.write_all(&pdu).await.unwrap();
    std::future::pending::<()>().await;
}

/// Fused halves without their partners, and namespaces that are not there.
async fn half_commands(served: &Served) {
    let (_admin, mut host) = with_queue(served).await;
    loop {
        for cid in 0..100 {
            let mut half = sqe(0x05, cid, 1, &[0, 0, 0], 0x01, 512);
            half[1] |= 1;
            host.command(&half, &[0; 512]).await;
            host.command(&sqe(READ, 100 + cid, 77, &[0, 0, 0], 0x5a, 512), &[]).await;
        }
        for _ in 0..200 {
            host.next().await;
        }
        sleep(Duration::from_millis(5)).await;
    }
}

/// A host that means well; the longest it waited.
async fn serve_well(served: &Served) -> Duration {
    let (_admin, mut host) = with_queue(served).await;
    let mut longest = Duration::ZERO;
    for round in 0..ROUNDS {
        let begun = Instant::now();
        let data = vec![u8::try_from(round % 251).unwrap(); 4096];
        host.write_in_capsule(1, 64 << 10, &data).await;
        assert_eq!(host.read(2, 64 << 10, 8).await, data);
        if round % 20 == 0 {
            // Another one comes, and is let in.
            drop(with_queue(served).await);
        }
        longest = longest.max(begun.elapsed());
        sleep(Duration::from_millis(5)).await;
    }
    longest
}

#[test]
fn well_meaning_hosts_are_served_among_hostile_ones_and_memory_is_bounded() {
    run(async {
        let served = Arc::new(serve(NvmeTcpOptions::default()));
        let before = resident_bytes();
        let mut hostile: Vec<JoinHandle<()>> = Vec::new();
        macro_rules! attack {
            ($($how:ident),*) => { $({
                let served = Arc::clone(&served);
                hostile.push(spawn_local(async move { $how(&served).await }));
            })* };
        }
        for _ in 0..HOSTILE {
            attack!(never_reads, never_ends, half_commands);
        }
        sleep(Duration::from_secs(1)).await;
        for _ in 0..HOSTILE {
            attack!(half_open, slow_loris, nonsense, flood);
        }
        sleep(Duration::from_millis(500)).await;
        let longest = serve_well(&served).await;
        let growth = resident_bytes().saturating_sub(before);
        println!("longest wait {longest:?}, {} MiB more in use", growth >> 20);
        assert!(longest < SERVED_WITHIN, "a request took {longest:?}");
        assert!(growth < GROWTH_MAX, "{} MiB more in use", growth >> 20);
        // Those that hold a queue must still be there: else this showed nothing.
        let open =
            served.target.counters().connections_open.load(std::sync::atomic::Ordering::Relaxed);
        assert!(open >= u64::from(HOSTILE) * 6, "{open} connections");
        hostile.iter().for_each(JoinHandle::abort);
    });
}

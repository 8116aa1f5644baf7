//! NVMe/TCP over real sockets: what a host and the target say to each other, limits, and what
//! happens to hosts that break the rules.
//!
//! The server runs as in the node: [`NvmeTcpTarget::serve`] on a current-thread runtime. The host
//! is `nvmf/host.rs`, written from the specification.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::io::AsyncWriteExt;
use tokio::time::Instant;
use tokio::time::sleep;
use tokio::time::timeout;
use weft::error::ErrorKind;
use weft::target::nvmf::subsystem::UnknownHosts;
use weft::target::nvmf::tcp::NvmeTcpOptions;
use weft::volume::Piece;
use weft::volume::Volume;
use weft::volume::memory::MemoryVolume;
use weft_api::Operation;

#[path = "nvmf/host.rs"]
mod host;

use host::A_MOMENT;
use host::DISCOVERY_NQN;
use host::HOST_NQN;
use host::Host;
use host::PATIENCE;
use host::READ;
use host::WRITE;
use host::connect_data;
use host::connect_sqe;
use host::ended;
use host::ic_req;
use host::io;
use host::kind;
use host::run;
use host::serve;
use host::serve_to;
use host::serve_volume;
use host::sqe;

/// Statuses, with DNR.
const INVALID_OPCODE: u16 = 0x4001;
const INVALID_FIELD: u16 = 0x4002;
const INVALID_NAMESPACE: u16 = 0x400b;
const SEQUENCE_ERROR: u16 = 0x400c;
const SGL_LENGTH: u16 = 0x400f;
const OUT_OF_RANGE: u16 = 0x4080;

fn pattern(bytes: usize, seed: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at / 512 * 7 + at + seed).to_le_bytes()[0]).collect()
}

#[test]
fn data_goes_both_ways_whatever_the_digests_and_the_path() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        for digests in 0..4 {
            let (admin, id, admin_session) = Host::admin(&served, digests).await;
            let (mut host, session) = Host::queue(&served, id, 1, digests).await;
            for misses in [false, true] {
                served.volume.set_misses(misses);
                let small = pattern(8192, usize::from(digests));
                host.write_in_capsule(1, 100, &small).await;
                assert_eq!(host.read(2, 100, 16).await, small);
                let large = pattern(1 << 20, 3);
                host.write(3, 1001, &large, 1 << 20).await;
                assert_eq!(host.read(4, 1001, 2048).await, large);
                host.write(5, 5000, &large[..100 * 512], 7 * 512).await;
                assert_eq!(host.read(6, 5000, 100).await, large[..100 * 512]);
                // Never written, and half written.
                assert_eq!(host.read(7, 100_000, 1).await, [0; 512]);
                assert_eq!(host.read(8, 92, 16).await[4096..], small[..4096]);
            }
            drop((admin, host));
            ended(session).await;
            ended(admin_session).await;
        }
        assert_eq!(served.target.subsystem().controller_count(), 0);
        let counters = served.target.subsystem().counters();
        let megabytes = counters.bytes_written.load(Ordering::Relaxed) >> 20;
        assert_eq!(megabytes, 8);
        assert_eq!(counters.errors.load(Ordering::Relaxed), 0);
    });
}

#[test]
fn data_starts_where_the_host_wants_it() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        let (_admin, id, _) = Host::admin(&served, 0).await;
        let (mut host, _session) = Host::open(&served.target).await;
        host.send(&ic_req(1, 31)).await;
        host.receive(128).await;
        host.header_digest = true;
        host.connect(&served.nqn, 1, 31, id).await;
        host.write_in_capsule(1, 0, &[9; 512]).await;
        host.command(&io(READ, 2, 0, 1), &[]).await;
        let common = host.receive(8).await;
        assert_eq!((common[2], common[3]), (24, 128));
        let rest = host.receive(128 - 8).await;
        assert!(rest[20..].iter().all(|byte| *byte == 0));
        assert_eq!(host.receive(512).await, [9; 512]);
    });
}

#[test]
fn commands_are_answered_in_the_order_they_finish() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        let (_admin, id, _) = Host::admin(&served, 0).await;
        let (mut host, _session) = Host::queue(&served, id, 1, 0).await;
        host.write_in_capsule(1, 0, &[5; 512]).await;
        served.volume.hold(true);
        served.volume.set_misses(true);
        for cid in 10..20 {
            host.command(&io(READ, cid, 0, 1), &[]).await;
        }
        assert!(host.silent().await);
        // What RAM has overtakes what a device is asked for.
        served.volume.set_misses(false);
        assert_eq!(host.read(99, 0, 1).await, [5; 512]);
        served.volume.hold(false);
        let mut cids = BTreeSet::new();
        for _ in 10..20 {
            let pdu = host.next().await;
            assert_eq!((pdu.kind, pdu.data), (kind::DATA, vec![5; 512]));
            cids.insert(u16::from_le_bytes([pdu.specific[0], pdu.specific[1]]));
        }
        assert_eq!(cids, (10..20).collect());
    });
}

#[test]
fn several_transfers_may_be_filled_at_once() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        let (_admin, id, _) = Host::admin(&served, 0).await;
        let (mut host, _session) = Host::queue(&served, id, 1, 2).await;
        for cid in 0..3_u16 {
            host.command(&io(WRITE, cid, u32::from(cid) * 8, 8), &[]).await;
        }
        let mut tags = Vec::new();
        for cid in 0..3 {
            let r2t = host.next().await;
            assert_eq!((r2t.kind, r2t.u16(0), r2t.u32(8)), (kind::R2T, cid, 4096));
            tags.push(r2t.u16(2));
        }
        let half = [7; 2048];
        for (at, last) in [(0, false), (2048, true)] {
            for cid in [2, 0, 1_u16] {
                let pdu = host.h2c(cid, tags[usize::from(cid)], at, &half, last);
                host.send(&pdu).await;
            }
        }
        for cid in [2, 0, 1] {
            host.success(cid).await;
        }
        assert_eq!(host.read(9, 0, 24).await, [7; 3 * 4096]);
    });
}

#[test]
fn the_latency_of_a_write_counts_from_its_command() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        let (_admin, id, _) = Host::admin(&served, 0).await;
        let (mut host, _session) = Host::queue(&served, id, 1, 0).await;
        host.command(&io(WRITE, 1, 0, 8), &[]).await;
        let r2t = host.next().await;
        let asked = Instant::now();
        assert!(host.silent().await);
        let waited = asked.elapsed();
        let pdu = host.h2c(1, r2t.u16(2), 0, &[7; 4096], true);
        host.send(&pdu).await;
        host.success(1).await;
        // What was sent before this answer has been counted.
        assert_eq!(host.read(2, 0, 8).await, [7; 4096]);

        let counted = served.volume.requests().snapshot();
        let writes = counted.iter().find(|kind| kind.operation == Operation::Write).unwrap();
        assert_eq!(writes.latency.count(), 1);
        let waited_ns = u64::try_from(waited.as_nanos()).unwrap();
        assert!(writes.latency.sum_ns >= waited_ns, "{} < {waited_ns}", writes.latency.sum_ns);
    });
}

#[test]
fn a_damaged_payload_fails_its_command_alone() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        let (_admin, id, _) = Host::admin(&served, 0).await;
        let (mut host, _session) = Host::queue(&served, id, 1, 3).await;
        let write = sqe(WRITE, 1, 1, &[0, 0, 0], 0x01, 512);
        let mut damaged = host.pdu(4, 0, &write, &[1; 512]);
        damaged[100] ^= 1;
        host.send(&damaged).await;
        assert_eq!(host.next().await.status(), (1, 0x022));

        host.command(&io(WRITE, 2, 0, 8), &[]).await;
        let tag = host.next().await.u16(2);
        let mut damaged = host.h2c(2, tag, 0, &[1; 4096], true);
        damaged[100] ^= 1;
        host.send(&damaged).await;
        assert_eq!(host.next().await.status(), (2, 0x022));
        assert_eq!(host.read(3, 0, 8).await, [0; 4096], "nothing was written");
        host.write(4, 0, &[1; 4096], 4096).await;
        assert_eq!(host.read(5, 0, 8).await, [1; 4096]);
    });
}

#[test]
fn commands_that_cannot_be_are_refused_with_their_status() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        let (_admin, id, _) = Host::admin(&served, 0).await;
        let (mut host, _session) = Host::queue(&served, id, 1, 0).await;
        let blocks = u32::try_from(served.volume.size_bytes() / 512).unwrap();
        let no_sgl = {
            let mut sqe = io(READ, 0, 0, 1);
            sqe[1] = 0;
            sqe
        };
        let fused = {
            let mut sqe = io(READ, 0, 0, 1);
            sqe[1] = 0x41;
            sqe
        };
        let mut at_offset = sqe(WRITE, 0, 1, &[0, 0, 0], 0x01, 512);
        at_offset[24] = 8;
        let cases = [
            (io(READ, 0, blocks, 1), OUT_OF_RANGE),
            (io(WRITE, 0, blocks - 1, 2), OUT_OF_RANGE),
            (sqe(READ, 0, 1, &[u32::MAX, u32::MAX, 0], 0x5a, 512), OUT_OF_RANGE),
            (io(READ, 0, 0, 2049), INVALID_FIELD),
            (sqe(READ, 0, 2, &[0, 0, 0], 0x5a, 512), INVALID_NAMESPACE),
            (sqe(READ, 0, u32::MAX, &[0, 0, 0], 0x5a, 512), INVALID_NAMESPACE),
            (sqe(READ, 0, 1, &[0, 0, 0], 0x5a, 1024), SGL_LENGTH),
            (sqe(WRITE, 0, 1, &[0, 0, 0], 0x5a, 0), SGL_LENGTH),
            (sqe(READ, 0, 1, &[0, 0, 0], 0x01, 512), 0x4011),
            (sqe(READ, 0, 1, &[0, 0, 0], 0x40, 512), 0x4011),
            (at_offset, 0x4016),
            (no_sgl, INVALID_FIELD),
            (fused, INVALID_FIELD),
            (sqe(0x04, 0, 1, &[0, 0, 0], 0x5a, 0), INVALID_OPCODE),
            (sqe(0x19, 0, 1, &[0], 0x5a, 32), INVALID_OPCODE),
            (sqe(0x09, 0, 1, &[1, 4], 0x5a, 16), SGL_LENGTH),
            (sqe(0x08, 0, 1, &[blocks, 0, 0], 0x5a, 0), OUT_OF_RANGE),
            (sqe(0x7f, 0, 0, &[0, 0x14, 1], 0x5a, 0), INVALID_OPCODE),
        ];
        for (cid, (mut sqe, status)) in (0_u16..).zip(cases) {
            sqe[2..4].copy_from_slice(&cid.to_le_bytes());
            host.command(&sqe, &[]).await;
            assert_eq!(host.next().await.status(), (cid, status), "case {cid}");
        }
        // Data in the capsule that the SGL does not speak of is swallowed.
        host.command(&sqe(WRITE, 50, 1, &[0, 0, 0], 0x01, 512), &[1; 1024]).await;
        assert_eq!(host.next().await.status(), (50, SGL_LENGTH));
        assert_eq!(host.read(51, 0, 1).await, [0; 512]);
        // All are counted but two on no namespace and the one of Fabrics.
        let counted = served.volume.requests().snapshot();
        assert_eq!(counted.iter().map(|kind| kind.errors).sum::<u64>(), 16);

        for (kind, write, read) in [
            (ErrorKind::NoSpace, 0x4081, 0x4081),
            (ErrorKind::Corrupt, 0x280, 0x4281),
            (ErrorKind::Poisoned, 0x280, 0x006),
            (ErrorKind::ReadOnly, 0x4020, 0x4020),
        ] {
            served.volume.fail_with(Some(kind));
            host.command(&sqe(WRITE, 60, 1, &[0, 0, 0], 0x01, 512), &[1; 512]).await;
            assert_eq!(host.next().await.status(), (60, write), "{kind:?}");
            host.command(&io(READ, 61, 0, 1), &[]).await;
            assert_eq!(host.next().await.status(), (61, read), "{kind:?}");
        }
    });
}

#[test]
fn compare_zeroes_and_deallocate_do_what_they_say() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        let (_admin, id, _) = Host::admin(&served, 0).await;
        let (mut host, _session) = Host::queue(&served, id, 1, 0).await;
        let data = pattern(8192, 1);
        host.write_in_capsule(1, 0, &data).await;

        let compare = |cid| sqe(0x05, cid, 1, &[0, 0, 15], 0x01, 8192);
        host.command(&compare(2), &data).await;
        host.success(2).await;
        let mut other = data.clone();
        other[8191] ^= 1;
        host.command(&compare(3), &other).await;
        assert_eq!(host.next().await.status(), (3, 0x4285));

        host.command(&sqe(0x08, 4, 1, &[3, 0, 1 << 25 | 1], 0x5a, 0), &[]).await;
        host.success(4).await;
        let read = host.read(5, 0, 16).await;
        assert_eq!(read[..3 * 512], data[..3 * 512]);
        assert_eq!(read[3 * 512..5 * 512], [0; 1024]);
        assert_eq!(read[5 * 512..], data[5 * 512..]);

        // Two ranges of Dataset Management in 4096 bytes, as Linux sends them.
        let mut ranges = vec![0xff; 4096];
        for (at, first, blocks) in [(0, 0_u64, 1_u32), (16, 8, 8)] {
            ranges[at + 4..at + 8].copy_from_slice(&blocks.to_le_bytes());
            ranges[at + 8..at + 16].copy_from_slice(&first.to_le_bytes());
        }
        let deallocate = |cid, attributes| sqe(0x09, cid, 1, &[1, attributes], 0x01, 4096);
        host.command(&deallocate(6, 1), &ranges).await;
        host.success(6).await;
        assert_eq!(host.read(7, 8, 8).await, data[4096..], "a hint changes nothing");
        host.command(&deallocate(8, 4), &ranges).await;
        host.success(8).await;
        let after = host.read(9, 0, 16).await;
        assert_eq!(
            after[..4096],
            read[..4096],
            "no whole block of 4096 bytes, none is deallocated"
        );
        assert_eq!(after[4096..], [0; 4096]);
        ranges[8 + 7] = 1;
        host.command(&deallocate(10, 4), &ranges).await;
        assert_eq!(host.next().await.status(), (10, OUT_OF_RANGE));

        for nsid in [1, u32::MAX] {
            host.command(&sqe(0x00, 11, nsid, &[], 0x5a, 0), &[]).await;
            host.success(11).await;
        }
        host.command(&sqe(0x00, 12, 5, &[], 0x5a, 0), &[]).await;
        assert_eq!(host.next().await.status(), (12, INVALID_NAMESPACE));
    });
}

#[test]
fn a_fused_compare_and_write_is_one_and_its_halves_fail_together() {
    run(async {
        const DIFFERS: u16 = 0x4285;
        const FUSED_FAILED: u16 = 9;
        const FUSED_MISSING: u16 = 10;
        let served = serve(NvmeTcpOptions::default());
        let (_admin, id, _) = Host::admin(&served, 0).await;
        let (mut host, _session) = Host::queue(&served, id, 1, 0).await;
        let half = |opcode, fuse, cid, lba, sgl, bytes: u32| {
            let mut sqe = sqe(opcode, cid, 1, &[lba, 0, bytes / 512 - 1], sgl, bytes);
            sqe[1] |= fuse;
            sqe
        };
        let compare = |cid| half(0x05, 1, cid, 8, 0x01, 512);
        let write = |cid| half(WRITE, 2, cid, 8, 0x01, 512);
        host.write_in_capsule(1, 8, &[1; 512]).await;

        host.command(&compare(2), &[1; 512]).await;
        assert!(host.silent().await, "half is nothing");
        host.command(&write(3), &[2; 512]).await;
        host.success(2).await;
        host.success(3).await;
        host.command(&compare(4), &[1; 512]).await;
        host.command(&write(5), &[3; 512]).await;
        assert_eq!(host.next().await.status(), (4, DIFFERS));
        assert_eq!(host.next().await.status(), (5, FUSED_FAILED));
        assert_eq!(host.read(6, 8, 1).await, [2; 512], "as it was");

        // Paired in the order of the commands, not of their data.
        host.command(&half(0x05, 1, 7, 8, 0x5a, 512), &[]).await;
        host.command(&write(8), &[4; 512]).await;
        host.send_asked(7, &[2; 512], 512).await;
        host.success(7).await;
        host.success(8).await;
        assert_eq!(host.read(9, 8, 1).await, [4; 512]);

        // A partner that does not come, or is wrong.
        host.command(&compare(10), &[4; 512]).await;
        host.command(&io(READ, 11, 8, 1), &[]).await;
        assert_eq!(host.data(11).await, [4; 512]);
        assert_eq!(host.next().await.status(), (10, FUSED_MISSING));
        host.command(&write(12), &[5; 512]).await;
        assert_eq!(host.next().await.status(), (12, FUSED_MISSING));
        host.command(&compare(13), &[4; 512]).await;
        host.command(&half(WRITE, 2, 14, 9, 0x01, 512), &[5; 512]).await;
        assert_eq!(host.next().await.status(), (14, INVALID_FIELD));
        assert_eq!(host.next().await.status(), (13, FUSED_FAILED));
        host.command(&half(0x05, 1, 15, 8, 0x01, 8192), &[4; 8192]).await;
        assert_eq!(host.next().await.status(), (15, 0x4014));
        host.command(&half(WRITE, 2, 16, 8, 0x01, 8192), &[4; 8192]).await;
        assert_eq!(host.next().await.status(), (16, FUSED_FAILED));
        assert_eq!(host.read(17, 8, 1).await, [4; 512]);
    });
}

#[test]
fn a_write_cache_is_flushed_before_a_change_is_answered() {
    run(async {
        let volume = MemoryVolume::new("v", 64 << 20).with_write_cache();
        let served = serve_volume(volume, UnknownHosts::Loopback, NvmeTcpOptions::default());
        let (_admin, id, _) = Host::admin(&served, 0).await;
        let (mut host, _session) = Host::queue(&served, id, 1, 0).await;
        host.write_in_capsule(1, 0, &[1; 4096]).await;
        assert_eq!(served.volume.unflushed(), 0, "write");
        host.command(&sqe(0x08, 2, 1, &[0, 0, 7], 0x5a, 0), &[]).await;
        host.success(2).await;
        assert_eq!(served.volume.unflushed(), 0, "write zeroes");
        let mut range = [0; 16];
        range[4..8].copy_from_slice(&8_u32.to_le_bytes());
        host.command(&sqe(0x09, 3, 1, &[0, 4], 0x01, 16), &range).await;
        host.success(3).await;
        assert_eq!(served.volume.unflushed(), 0, "deallocate");
        for (cid, opcode, fuse) in [(4, 0x05, 1), (5, WRITE, 2)] {
            let mut half = sqe(opcode, cid, 1, &[0, 0, 0], 0x01, 512);
            half[1] |= fuse;
            host.command(&half, &[0; 512]).await;
        }
        host.success(4).await;
        host.success(5).await;
        assert_eq!(served.volume.unflushed(), 0, "compare and write");
    });
}

#[test]
fn verify_reads_and_returns_nothing() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        let (_admin, id, _) = Host::admin(&served, 0).await;
        let (mut host, _session) = Host::queue(&served, id, 1, 0).await;
        let verify = |cid, lba, blocks: u32| sqe(0x0c, cid, 1, &[lba, 0, blocks - 1], 0x5a, 0);
        host.command(&verify(1, 0, 65536), &[]).await;
        host.success(1).await;
        host.command(&verify(2, (64 << 11) - 1, 2), &[]).await;
        assert_eq!(host.next().await.status(), (2, OUT_OF_RANGE));
        served.volume.fail_with(Some(ErrorKind::Corrupt));
        host.command(&verify(3, 0, 8), &[]).await;
        assert_eq!(host.next().await.status(), (3, 0x4281));
    });
}

#[test]
fn hosts_see_what_is_theirs_and_those_taken_out_are_cut_off() {
    run(async {
        const INVALID_HOST: u16 = 0x0184;
        let served = serve_to(UnknownHosts::Refused, NvmeTcpOptions::default());
        let (mut host, _) = Host::open(&served.target).await;
        host.begin(0).await;
        host.command(&connect_sqe(0, 31, 0), &connect_data(&served.nqn, 0xffff)).await;
        assert_eq!(host.next().await.status(), (0xc0de, INVALID_HOST));

        // Discovery is for all, but names nothing that is not for them, and tells when that changes.
        let (mut discovery, _) = Host::open(&served.target).await;
        discovery.begin(0).await;
        discovery.connect(DISCOVERY_NQN, 0, 31, 0xffff).await;
        discovery.set_property(0x14, 0x0046_0001).await;
        let before = discovery.log(0x70, 4096).await;
        assert_eq!(before[8], 1);
        discovery.command(&sqe(0x0c, 1, 0, &[], 0x5a, 0), &[]).await;
        discovery.command(&sqe(0x0c, 2, 0, &[], 0x5a, 0), &[]).await;
        served.directory.announce();
        assert!(discovery.silent().await, "nothing that it could see has changed");
        served.directory.set_host(HOST_NQN, true);
        assert_eq!(discovery.success(1).await, 0x0070_f002);
        let after = discovery.log(0x70, 4096).await;
        assert_eq!(after[8], 2);
        assert_ne!(after[..8], before[..8], "another generation");

        let (mut admin, id, admin_session) = Host::admin(&served, 0).await;
        let (mut queue, session) = Host::queue(&served, id, 1, 0).await;
        admin.command(&sqe(0x0c, 1, 0, &[], 0x5a, 0), &[]).await;
        queue.write_in_capsule(1, 0, &[1; 512]).await;
        served.volume.serve_only(Some("nqn.another"));
        served.directory.announce();
        assert_eq!(admin.success(1).await, 0x0004_0002);
        assert_eq!(admin.identify(2, 0).await, [0; 4096]);
        queue.command(&io(READ, 2, 0, 1), &[]).await;
        assert_eq!(queue.next().await.status(), (2, INVALID_NAMESPACE));
        served.volume.serve_only(Some(HOST_NQN));
        served.directory.announce();
        assert_eq!(queue.read(3, 0, 1).await, [1; 512]);

        served.directory.set_host(HOST_NQN, false);
        ended(session).await;
        ended(admin_session).await;
        assert_eq!(discovery.success(2).await, 0x0070_f002);
    });
}

#[test]
fn an_admin_queue_answers_what_hosts_ask() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        let (mut host, id, _session) = Host::admin(&served, 3).await;
        let controller = host.identify(1, 0).await;
        assert_eq!(u16::from_le_bytes([controller[78], controller[79]]), id);
        assert_eq!(host.identify(2, 0).await[..8], [1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(host.identify(0, 1).await[..4], (64_u32 << 11).to_le_bytes());
        assert_eq!(host.identify(0, 9).await, [0; 4096], "inactive");
        assert_eq!(host.identify(3, 1).await[4..20], *served.volume.uuid().as_bytes());
        assert_eq!(host.identify(5, 1).await.len(), 4096);
        assert_eq!(host.identify(6, 0).await[1], 13);
        for (id, bytes) in [(1, 64), (2, 512), (3, 512), (4, 4096), (5, 4096), (0x0c, 4096)] {
            assert_eq!(host.log(id, bytes).await.len(), usize::try_from(bytes).unwrap());
        }
        let ana = host.log(0x0c, 64).await;
        assert_eq!((ana[8], ana[16], ana[20], ana[32], ana[48]), (1, 1, 1, 1, 1));

        let refused = [
            (sqe(6, 1, 0, &[0x10], 0x5a, 4096), INVALID_FIELD),
            (sqe(6, 1, u32::MAX, &[0], 0x5a, 4096), INVALID_NAMESPACE),
            (sqe(6, 1, 9, &[3], 0x5a, 4096), INVALID_NAMESPACE),
            (sqe(6, 1, 0, &[1], 0x5a, 4095), SGL_LENGTH),
            (sqe(2, 1, 0, &[0x70 | 15 << 16], 0x5a, 64), 0x4109),
            (sqe(2, 1, 0, &[0x0d | 15 << 16], 0x5a, 64), 0x4109),
            (sqe(2, 1, 0, &[2 | 127 << 16, 0, 1024], 0x5a, 512), INVALID_FIELD),
            (sqe(9, 1, 0, &[0x0b, 1 << 9], 0x5a, 0), INVALID_FIELD),
            (sqe(9, 1, 0, &[0x0b | 1 << 31, 0], 0x5a, 0), 0x410d),
            (sqe(9, 1, 0, &[2, 1], 0x5a, 0), 0x410e),
            (sqe(9, 1, 0, &[7, 0xffff], 0x5a, 0), INVALID_FIELD),
            (sqe(0x0a, 1, 0, &[0x99], 0x5a, 0), INVALID_FIELD),
            (sqe(0x80, 1, 1, &[0], 0x5a, 0), INVALID_OPCODE),
            (sqe(0x00, 1, 0, &[0], 0x5a, 0), INVALID_OPCODE),
        ];
        for (sqe, status) in refused {
            {
                host.command(&sqe, &[]).await;
                assert_eq!(host.next().await.status(), (1, status), "{sqe:?}");
            }
        }
        let features = [(7, 0x007f_007f), (0x0b, 0x100), (0x0f, 0), (4, 343), (1, 0)];
        for (id, value) in features {
            host.command(&sqe(0x0a, 2, 0, &[id], 0x5a, 0), &[]).await;
            assert_eq!(host.success(2).await, value, "feature {id:#x}");
        }
        host.command(&sqe(9, 3, 0, &[7, 3 | 5 << 16], 0x5a, 0), &[]).await;
        assert_eq!(host.success(3).await, 3 | 3 << 16);
        host.command(&sqe(9, 4, 0, &[0x0f, 1500], 0x5a, 0), &[]).await;
        assert_eq!(host.success(4).await, 2000, "whole seconds");
        host.command(&sqe(0x0a, 5, 0, &[0x81, 1], 0x5a, 16), &[]).await;
        assert_eq!(host.data(5).await, [0x11; 16]);
        host.command(&sqe(0x18, 6, 0, &[], 0x5a, 0), &[]).await;
        host.success(6).await;
        host.command(&sqe(0x08, 7, 0, &[0], 0x5a, 0), &[]).await;
        assert_eq!(host.success(7).await, 1, "not aborted");
    });
}

#[test]
fn nothing_is_served_before_connect_and_enable() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        let (mut host, _session) = Host::open(&served.target).await;
        host.begin(0).await;
        host.command(&io(READ, 1, 0, 1), &[]).await;
        assert_eq!(host.next().await.status(), (1, SEQUENCE_ERROR));
        // A refused connect may be followed by another.
        host.command(&connect_sqe(0, 31, 0), &connect_data("nqn.nobody", 0xffff)).await;
        let refused = host.next().await;
        assert_eq!(refused.status(), (0xc0de, 0x4182));
        assert_eq!(refused.u32(0), 1 << 16 | 256, "the name, in the data");
        let id = host.connect(&served.nqn, 0, 31, 0xffff).await;
        host.command(&sqe(6, 2, 0, &[1], 0x5a, 4096), &[]).await;
        assert_eq!(host.next().await.status(), (2, SEQUENCE_ERROR), "not enabled");
        host.command(&connect_sqe(0, 31, 0), &connect_data(&served.nqn, 0xffff)).await;
        assert_eq!(host.next().await.status(), (0xc0de, SEQUENCE_ERROR), "connected already");

        let (mut io_queue, _session) = Host::open(&served.target).await;
        io_queue.begin(0).await;
        let data = connect_data(&served.nqn, id);
        io_queue.command(&connect_sqe(1, 127, 0), &data).await;
        assert_eq!(io_queue.next().await.status(), (0xc0de, SEQUENCE_ERROR));
        host.set_property(0x14, 0x0046_0001).await;
        io_queue.connect(&served.nqn, 1, 127, id).await;
        assert_eq!(io_queue.read(1, 0, 1).await, [0; 512]);
    });
}

#[test]
fn discovery_tells_where_to_connect() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        let (mut host, _session) = Host::open(&served.target).await;
        host.begin(0).await;
        host.connect(DISCOVERY_NQN, 0, 31, 0xffff).await;
        host.set_property(0x14, 0x0046_0001).await;
        let controller = host.identify(1, 0).await;
        assert_eq!(controller[111], 2);
        assert!(controller[768..].starts_with(DISCOVERY_NQN.as_bytes()));
        let log = host.log(0x70, 4096).await;
        assert_eq!(log[8..16], [2, 0, 0, 0, 0, 0, 0, 0]);
        let entry = &log[2048..3072];
        assert_eq!((entry[0], entry[1], entry[2]), (3, 1, 2));
        assert!(entry[32..].starts_with(host.portal.port().to_string().as_bytes()));
        assert!(entry[256..].starts_with(served.nqn.as_bytes()));
        assert!(entry[512..].starts_with(b"127.0.0.1\0"));
        // From an offset, as nvme-cli reads it.
        host.command(&sqe(2, 8, 0, &[0x70 | 255 << 16, 0, 2048], 0x5a, 1024), &[]).await;
        assert_eq!(host.data(8).await, entry);
        for wrong in [sqe(6, 9, 1, &[0], 0x5a, 4096), sqe(6, 9, 0, &[2], 0x5a, 4096)] {
            host.command(&wrong, &[]).await;
            assert_eq!(host.next().await.status(), (9, INVALID_FIELD));
        }
    });
}

#[test]
fn hosts_hear_of_volumes_that_come_grow_and_go() {
    run(async {
        const CHANGED: u32 = 0x0004_0002;
        let served = serve(NvmeTcpOptions::default());
        let (mut host, id, _session) = Host::admin(&served, 0).await;
        let (mut queue, _queue_session) = Host::queue(&served, id, 1, 0).await;
        let wait = |cid| sqe(0x0c, cid, 0, &[], 0x5a, 0);
        for cid in 1..=4 {
            host.command(&wait(cid), &[]).await;
        }
        host.command(&wait(5), &[]).await;
        assert_eq!(host.next().await.status(), (5, 0x4105));

        let second = Arc::new(MemoryVolume::new("w", 1 << 20).with_identity(40, 4096));
        served.directory.insert(Arc::clone(&second) as _);
        assert_eq!(host.success(1).await, CHANGED);
        served.volume.resize(128 << 20);
        served.directory.announce();
        assert!(host.silent().await, "told already, and the log not read");
        assert_eq!(host.log(4, 4096).await[..12], [1, 0, 0, 0, 40, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(host.success(2).await, CHANGED, "what came after the first event");
        assert_eq!(host.log(4, 4096).await[..4], [0; 4]);
        assert_eq!(host.identify(0, 1).await[..4], (128_u32 << 11).to_le_bytes());
        queue.write_in_capsule(9, 127 << 11, &[1; 512]).await;
    });
}

#[test]
fn a_deleted_volume_is_an_invalid_namespace() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        let (mut host, id, _session) = Host::admin(&served, 0).await;
        let (mut queue, _queue_session) = Host::queue(&served, id, 1, 0).await;
        host.command(&sqe(0x0c, 1, 0, &[], 0x5a, 0), &[]).await;
        assert_eq!(queue.read(1, 0, 1).await, [0; 512]);
        served.volume.close();
        served.directory.remove("v");
        assert_eq!(host.success(1).await, 0x0004_0002);
        queue.command(&io(READ, 2, 0, 1), &[]).await;
        assert_eq!(queue.next().await.status(), (2, INVALID_NAMESPACE));
        assert_eq!(host.identify(2, 0).await, [0; 4096]);
    });
}

#[test]
fn hosts_that_break_the_protocol_are_told_and_cut() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        type Break = fn(&Host) -> Vec<u8>;
        let cases: [(Break, (u16, u32)); 7] = [
            (|_| vec![0x0b, 0, 8, 0, 8, 0, 0, 0], (1, 0)),
            (|_| ic_req(0, 0), (2, 0)),
            (|_| vec![4, 0, 71, 0, 72, 0, 0, 0], (1, 2)),
            (|host| host.pdu(4, 0, &io(WRITE, 1, 0, 1), &[0; 8193]), (5, 0)),
            (|host| host.h2c(1, 0, 0, &[1; 512], true), (2, 10)),
            (|host| host.h2c(1, 0, 0, &[], true), (1, 16)),
            (
                |host| {
                    let mut pdu = host.pdu(4, 0, &io(READ, 1, 0, 1), &[]);
                    pdu[7] = 0xff;
                    pdu
                },
                (1, 3),
            ),
        ];
        let (_admin, id, _) = Host::admin(&served, 0).await;
        for (case, (break_it, expected)) in cases.into_iter().enumerate() {
            let (mut host, session) = Host::queue(&served, id, 1, 0).await;
            let bytes = break_it(&host);
            host.send(&bytes).await;
            assert_eq!(host.terminated().await, expected, "case {case}");
            assert!(host.closed().await);
            drop(host);
            ended(session).await;
        }
        let (mut host, session) = Host::queue(&served, id, 1, 1).await;
        let mut damaged = host.pdu(4, 0, &io(READ, 1, 0, 1), &[]);
        damaged[30] ^= 1;
        host.send(&damaged).await;
        assert_eq!(host.terminated().await.0, 3, "header digest");
        drop(host);
        ended(session).await;
        // The others were not harmed.
        let (mut host, _session) = Host::queue(&served, id, 1, 0).await;
        assert_eq!(host.read(1, 0, 1).await, [0; 512]);
        let terminated = &served.target.counters().connections_terminated;
        assert_eq!(terminated.load(Ordering::Relaxed), 8);
    });
}

#[test]
fn more_commands_than_the_queue_holds_end_the_connection() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        let (_admin, id, _) = Host::admin(&served, 0).await;
        let (mut host, session) = Host::open(&served.target).await;
        host.begin(0).await;
        host.connect(&served.nqn, 1, 7, id).await;
        served.volume.set_misses(true);
        served.volume.hold(true);
        for cid in 0..8 {
            host.command(&io(READ, cid, 0, 1), &[]).await;
        }
        assert!(host.silent().await);
        host.command(&io(READ, 8, 0, 1), &[]).await;
        assert_eq!(host.terminated().await, (2, 0));
        drop(host);
        served.volume.hold(false);
        ended(session).await;
    });
}

#[test]
fn data_in_flight_is_bounded_and_everything_is_answered() {
    run(async {
        let options = NvmeTcpOptions { bytes_max: 2 << 20, ..NvmeTcpOptions::default() };
        let served = serve(options);
        let (_admin, id, _) = Host::admin(&served, 0).await;
        let (mut host, _session) = Host::queue(&served, id, 1, 0).await;
        for cid in 0..20_u16 {
            host.command(&io(WRITE, cid, u32::from(cid) * 2048, 2048), &[]).await;
        }
        let mut asked = Vec::new();
        while !host.silent().await {
            let r2t = host.next().await;
            assert_eq!(r2t.kind, kind::R2T);
            asked.push((r2t.u16(0), r2t.u16(2)));
        }
        assert_eq!(asked.len(), 2, "2 MiB");
        // A small command passes meanwhile only if it moves no data.
        host.command(&sqe(0x00, 99, 1, &[], 0x5a, 0), &[]).await;
        let data = pattern(1 << 20, 2);
        let mut answered = 0;
        while answered < 21 {
            if let Some((cid, tag)) = asked.pop() {
                let pdu = host.h2c(cid, tag, 0, &data, true);
                host.send(&pdu).await;
            }
            let pdu = host.next().await;
            match pdu.kind {
                kind::R2T => asked.insert(0, (pdu.u16(0), pdu.u16(2))),
                _ => {
                    assert_eq!(pdu.status().1, 0);
                    answered += 1;
                }
            }
        }
        let mut pieces: Vec<Piece> = Vec::new();
        assert!(served.volume.try_read(19 << 20, 512, &mut pieces).unwrap());
        assert_eq!(pieces, [Piece::Data(data[..512].to_vec().into())]);
    });
}

#[test]
fn a_host_that_does_not_read_waits_in_its_own_socket() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        let (_admin, id, _) = Host::admin(&served, 0).await;
        let (mut host, _session) = Host::open(&served.target).await;
        host.begin(0).await;
        host.connect(&served.nqn, 1, 1023, id).await;
        let mut capsules = Vec::new();
        for cid in 0..1000 {
            capsules.extend(host.pdu(4, 0, &io(READ, cid, 0, 2048), &[]));
        }
        host.send(&capsules).await;
        sleep(2 * A_MOMENT).await;
        for _ in 0..1000 {
            let pdu = host.next().await;
            assert_eq!((pdu.kind, pdu.data.len()), (kind::DATA, 1 << 20));
        }
    });
}

#[test]
fn hosts_that_never_connect_a_queue_are_cut_off() {
    run(async {
        let options = NvmeTcpOptions {
            handshake_timeout: 4 * A_MOMENT,
            handshakes_max: 3,
            ..NvmeTcpOptions::default()
        };
        let served = serve(options);
        let (mut silent, _s1) = Host::open(&served.target).await;
        let (mut begun, _s2) = Host::open(&served.target).await;
        begun.begin(0).await;
        let (mut slow, _s3) = Host::open(&served.target).await;
        slow.send(&ic_req(0, 0)[..100]).await;
        sleep(A_MOMENT).await;
        // Three may be in the handshake: the oldest gives way to a host that means it.
        let (mut host, _, _session) = Host::admin(&served, 0).await;
        assert!(silent.closed().await);
        assert!(begun.stream.peek(&mut [0]).now_or_never().is_none(), "still open");
        for host in [&mut begun, &mut slow] {
            assert!(host.closed().await, "after a while");
        }
        assert_eq!(host.property(8).await, 0x0001_0400);
    });
}

#[test]
fn tls_handshakes_that_do_not_end_are_cut_off_with_the_others() {
    // A record that promises a ClientHello and holds none of it.
    const BEGUN: [u8; 5] = [0x16, 3, 1, 2, 0];
    run(async {
        let options = NvmeTcpOptions {
            handshake_timeout: 4 * A_MOMENT,
            handshakes_max: 3,
            ..NvmeTcpOptions::default()
        };
        let served = serve(options);
        let (mut first, _s1) = Host::open(&served.target).await;
        first.send(&BEGUN).await;
        let (mut second, session) = Host::open(&served.target).await;
        second.send(&BEGUN[..1]).await;
        let (mut third, _s3) = Host::open(&served.target).await;
        third.send(&BEGUN).await;
        sleep(A_MOMENT).await;
        let (mut host, _, _session) = Host::admin(&served, 0).await;
        assert!(first.closed().await, "gives way");
        assert!(second.stream.peek(&mut [0]).now_or_never().is_none(), "still open");
        assert!(second.closed().await && third.closed().await, "after a while");
        ended(session).await;
        assert_eq!(host.property(8).await, 0x0001_0400);
    });
}

#[test]
fn connections_beyond_the_limit_are_refused() {
    run(async {
        let options = NvmeTcpOptions { connections_max: 2, ..NvmeTcpOptions::default() };
        let served = serve(options);
        let (_admin, id, admin_session) = Host::admin(&served, 0).await;
        let (queue, _session) = Host::queue(&served, id, 1, 0).await;
        let (mut refused, session) = Host::open(&served.target).await;
        assert!(refused.closed().await);
        ended(session).await;
        drop(queue);
        sleep(A_MOMENT).await;
        let (mut queue, _session) = Host::queue(&served, id, 1, 0).await;
        assert_eq!(queue.read(1, 0, 1).await, [0; 512]);
        assert!(!admin_session.is_finished());
    });
}

#[test]
fn the_end_of_the_admin_queue_ends_the_others_but_not_the_other_way_round() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        let (mut admin, id, admin_session) = Host::admin(&served, 0).await;
        let (queue, session) = Host::queue(&served, id, 1, 0).await;
        let (mut other, other_session) = Host::queue(&served, id, 2, 0).await;
        drop(queue);
        ended(session).await;
        assert_eq!(admin.property(0x1c).await, 1);
        assert_eq!(other.read(1, 0, 1).await, [0; 512]);
        drop(admin);
        ended(admin_session).await;
        assert!(other.closed().await);
        ended(other_session).await;
        assert_eq!(served.target.subsystem().controller_count(), 0);
    });
}

#[test]
fn a_reset_closes_the_io_queues_and_forgets_event_requests() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        let (mut admin, id, _admin_session) = Host::admin(&served, 0).await;
        let (mut queue, session) = Host::queue(&served, id, 1, 0).await;
        for round in 0..20 {
            for cid in 0..4 {
                admin.command(&sqe(0x0c, 4 * round + cid, 0, &[], 0x5a, 0), &[]).await;
            }
            admin.set_property(0x14, 0x0046_0000).await;
            assert_eq!(admin.property(0x1c).await, 0);
            admin.set_property(0x14, 0x0046_0001).await;
        }
        assert!(queue.closed().await);
        ended(session).await;
        let (mut queue, _session) = Host::queue(&served, id, 1, 0).await;
        assert_eq!(queue.read(1, 0, 1).await, [0; 512]);
        admin.set_property(0x14, 0x0046_4001).await;
        assert_eq!(admin.property(0x1c).await & 0xc, 8, "shut down");
    });
}

#[test]
fn a_silent_host_loses_its_controller_and_a_busy_one_does_not() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        let (mut admin, session) = Host::open(&served.target).await;
        admin.begin(0).await;
        admin.command(&connect_sqe(0, 31, 200), &connect_data(&served.nqn, 0xffff)).await;
        let id = u16::try_from(admin.success(0xc0de).await).unwrap();
        admin.set_property(0x14, 0x0046_0001).await;
        let (mut queue, queue_session) = Host::queue(&served, id, 1, 0).await;
        // Traffic on any queue is as good as a Keep Alive.
        for cid in 0..20 {
            sleep(A_MOMENT).await;
            queue.read(cid, 0, 1).await;
        }
        assert!(!session.is_finished());
        assert!(admin.closed().await);
        assert!(queue.closed().await);
        ended(session).await;
        ended(queue_session).await;
        assert_eq!(served.target.subsystem().controller_count(), 0);
    });
}

// The host may send the write again on another queue, and then another to the same blocks.
#[test]
fn a_write_that_waits_is_never_done_once_its_queue_is_gone_or_its_controller_is_reset() {
    run(async {
        for reset in [false, true] {
            let served = serve(NvmeTcpOptions::default());
            let (mut admin, id, _) = Host::admin(&served, 0).await;
            let (mut queue, session) = Host::queue(&served, id, 1, 0).await;
            served.volume.hold(true);
            queue.command(&sqe(WRITE, 1, 1, &[0, 0, 0], 0x01, 512), &[9; 512]).await;
            sleep(A_MOMENT).await;
            if reset {
                admin.set_property(0x14, 0x0046_0000).await;
            } else {
                drop(queue);
            }
            ended(session).await;
            served.volume.hold(false);
            sleep(A_MOMENT).await;
            let mut pieces = Vec::new();
            assert!(served.volume.try_read(0, 512, &mut pieces).expect("in range"));
            assert_eq!(pieces, [Piece::Zero(512)], "reset: {reset}");
        }
    });
}

#[test]
fn a_write_in_flight_is_finished_and_answered_when_the_node_stops() {
    run(async {
        let served = serve(NvmeTcpOptions::default());
        let (_admin, id, _) = Host::admin(&served, 0).await;
        let (mut queue, session) = Host::queue(&served, id, 1, 0).await;
        served.volume.hold(true);
        queue.command(&sqe(WRITE, 2, 1, &[1, 0, 0], 0x01, 512), &[8; 512]).await;
        sleep(A_MOMENT).await;
        let stop = async {
            sleep(A_MOMENT).await;
            served.volume.hold(false);
        };
        let stopped = async { tokio::join!(served.target.shutdown(), stop) };
        timeout(PATIENCE, stopped).await.expect("stops");
        queue.success(2).await;
        assert!(queue.closed().await);
        ended(session).await;
    });
}

#[test]
fn a_target_that_stops_does_not_wait_for_hosts_that_do_not_read() {
    run(async {
        let options =
            NvmeTcpOptions { shutdown_timeout: 2 * A_MOMENT, ..NvmeTcpOptions::default() };
        let served = serve(options);
        let (_admin, id, _) = Host::admin(&served, 0).await;
        let (mut queue, _session) = Host::queue(&served, id, 1, 0).await;
        for cid in 0..100 {
            queue.command(&io(READ, cid, 0, 2048), &[]).await;
        }
        let stopped = timeout(Duration::from_secs(5), served.target.shutdown()).await;
        assert!(stopped.is_ok());
        queue.stream.shutdown().await.ok();
    });
}

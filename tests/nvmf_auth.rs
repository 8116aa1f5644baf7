//! DH-HMAC-CHAP over real sockets: hosts that prove who they are, hosts that do not, and hosts that
//! break the order. The host's side is `nvmf/chap.rs`, written from the specification.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::join;
use futures_util::future::join_all;
use num_bigint::BigUint;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use weft::secret::DhchapKey;
use weft::secret::Hash;
use weft::secret::HostKeys;
use weft::target::nvmf::tcp::NvmeTcpOptions;

#[path = "nvmf/chap.rs"]
mod chap;
#[expect(dead_code, reason = "other tests need more of it")]
#[path = "nvmf/host.rs"]
mod host;

use chap::Answer;
use chap::Challenge;
use chap::Secrets;
use chap::negotiate;
use chap::padded;
use chap::prime;
use chap::success2;
use host::DISCOVERY_NQN;
use host::HOST_NQN;
use host::Host;
use host::READ;
use host::Served;
use host::WRITE;
use host::connect_data;
use host::connect_sqe;
use host::ended;
use host::io;
use host::kind;
use host::run;
use host::serve;
use host::sqe;

/// Authentication Required, with DNR.
const REQUIRED: u16 = 0x4191;
const HOST_BYTES: [u8; 64] = [0x11; 64];
const CTRL_BYTES: [u8; 64] = [0x22; 64];

fn keys(hash: Option<Hash>, both: bool) -> HostKeys {
    let ctrl_key = both.then(|| DhchapKey::from_random(hash, &CTRL_BYTES));
    HostKeys { key: DhchapKey::from_random(hash, &HOST_BYTES), ctrl_key }
}

fn secrets(served: &Served, hash: Option<Hash>, both: bool) -> Secrets {
    let (bytes, id) = (hash.map_or(32, Hash::bytes), hash.map_or(0, Hash::id));
    Secrets {
        key: HOST_BYTES[..bytes].to_vec(),
        key_hash: id,
        ctrl_key: both.then(|| (CTRL_BYTES[..bytes].to_vec(), id)),
        subsystem_nqn: served.nqn.clone(),
    }
}

/// A target whose host has keys.
fn served(both: bool) -> (Served, Secrets) {
    let served = serve(NvmeTcpOptions::default());
    served.directory.set_host_keys(HOST_NQN, Some(keys(Some(Hash::Sha256), both)));
    let secrets = secrets(&served, Some(Hash::Sha256), both);
    (served, secrets)
}

/// A connected queue; the result of its Connect, whose controller is in the low half.
async fn connected(served: &Served, qid: u16, controller: u16) -> (Host, u32, JoinHandle<()>) {
    let (mut host, session) = Host::open(&served.target).await;
    host.begin(0).await;
    host.command(&connect_sqe(qid, 31, 0), &connect_data(&served.nqn, controller)).await;
    let result = host.success(0xc0de).await;
    (host, result, session)
}

async fn admin(served: &Served) -> (Host, u16, JoinHandle<()>) {
    let (host, result, session) = connected(served, 0, 0xffff).await;
    assert_eq!(result >> 16, 2, "ATR, not ASCR");
    (host, u16::try_from(result & 0xffff).unwrap(), session)
}

async fn status_of(host: &mut Host, sqe: &[u8]) -> u16 {
    host.command(sqe, &[]).await;
    host.next().await.status().1
}

fn failed(served: &Served) -> u64 {
    served.target.subsystem().counters().authentications_failed.load(Ordering::Relaxed)
}

#[test]
fn a_host_that_has_its_key_is_served_with_every_hash() {
    run(async {
        for bound_by in [None, Some(Hash::Sha256), Some(Hash::Sha384), Some(Hash::Sha512)] {
            for (hash, group) in [(1, 0), (2, 0), (3, 0), (3, 1)] {
                let served = serve(NvmeTcpOptions::default());
                served.directory.set_host_keys(HOST_NQN, Some(keys(bound_by, false)));
                let secrets = secrets(&served, bound_by, false);
                let (mut host, id, _session) = admin(&served).await;
                host.authenticate(&secrets, hash, group).await;
                host.set_property(0x14, 0x0046_0001).await;
                assert_eq!(host.identify(1, 0).await.len(), 4096);

                // Every queue proves it again.
                let (mut queue, result, _io_session) = connected(&served, 1, id).await;
                assert_eq!(result, u32::from(id) | 1 << 17);
                assert_eq!(status_of(&mut queue, &io(READ, 1, 0, 1)).await, REQUIRED);
                queue.authenticate(&secrets, hash, group).await;
                queue.write_in_capsule(2, 8, &[7; 512]).await;
                assert_eq!(queue.read(3, 8, 1).await, [7; 512]);
                assert_eq!(failed(&served), 0);
            }
        }
    });
}

#[test]
fn what_the_node_likes_best_of_what_is_offered_is_chosen() {
    run(async {
        let (served, secrets) = served(false);
        let (mut host, _, _session) = admin(&served).await;
        // In no order, among some that nobody knows.
        for (hashes, groups, agreed) in [
            (&[1, 2, 3][..], &[0, 1, 2, 3, 4, 5][..], (3, 2)),
            (&[1], &[0, 1], (1, 1)),
            (&[2, 9, 1], &[0, 77, 4, 3], (2, 3)),
        ] {
            host.auth_send(&negotiate(7, hashes, groups)).await;
            let challenge = Challenge::read(&host.auth_receive().await);
            assert_eq!((challenge.hash, challenge.group), agreed);
        }
        host.auth_send(&negotiate(7, &[2], &[1])).await;
        let challenge = Challenge::read(&host.auth_receive().await);
        host.auth_send(&Answer::new(&secrets, &challenge).message()).await;
        assert_eq!(host.auth_receive().await[..2], [1, 3]);
        assert_eq!(host.property(8).await, 0x0001_0400);
    });
}

#[test]
fn every_group_leads_to_the_same_secret_on_both_sides() {
    run(async {
        let (served, secrets) = served(true);
        for group in 1..=5 {
            let (mut host, _, _session) = admin(&served).await;
            host.authenticate(&secrets, 1, group).await;
            assert_eq!(host.property(8).await, 0x0001_0400, "group {group}");
        }
    });
}

#[test]
fn both_sides_prove_who_they_are() {
    run(async {
        let (served, secrets) = served(true);
        for group in [0, 1] {
            let (mut host, _, _session) = admin(&served).await;
            let challenge = host.challenged(0xfffe, 3, group).await;
            let answer = Answer::new(&secrets, &challenge);
            host.auth_send(&answer.message()).await;
            let success = host.auth_receive().await;
            assert_eq!(success[..9], [1, 3, 0, 0, 0xfe, 0xff, 64, 0, 1]);
            assert_eq!(success[16..80], answer.expected);
            // Only then it is done.
            let get = sqe(0x7f, 1, 0, &[0, 8], 0x5a, 0);
            assert_eq!(status_of(&mut host, &get).await, REQUIRED);
            host.auth_send(&success2(0xfffe)).await;
            assert_eq!(host.property(0x14).await, 0);
        }
        // A host that does not ask is served too.
        let one_sided = Secrets { ctrl_key: None, ..secrets };
        let (mut host, _, _session) = admin(&served).await;
        host.authenticate(&one_sided, 1, 0).await;
        assert_eq!(host.property(8).await, 0x0001_0400);
    });
}

#[test]
fn nothing_is_served_before() {
    run(async {
        let (served, _) = served(false);
        let (mut host, id, _session) = admin(&served).await;
        let get = {
            let mut get = sqe(0x7f, 1, 0, &[0, 8], 0x5a, 0);
            get[4] = 4;
            get
        };
        let set = sqe(0x7f, 1, 0, &[0, 0x14, 0x0046_0001], 0x5a, 0);
        let identify = sqe(6, 1, 0, &[1], 0x5a, 4096);
        let keep_alive = sqe(0x18, 1, 0, &[], 0x5a, 0);
        for command in [get, set, identify, keep_alive] {
            assert_eq!(status_of(&mut host, &command).await, REQUIRED);
        }
        // Not even an I/O queue, since the controller is not enabled.
        let (mut queue, _io_session) = Host::open(&served.target).await;
        queue.begin(0).await;
        queue.command(&connect_sqe(1, 31, 0), &connect_data(&served.nqn, id)).await;
        assert_eq!(queue.next().await.status(), (0xc0de, 0x400c));
    });
}

#[test]
fn a_wrong_response_is_told_counted_and_ends_the_connection() {
    run(async {
        let (served, secrets) = served(true);
        let wrong = |key: u8| Secrets {
            key: vec![key; 32],
            key_hash: 1,
            ctrl_key: None,
            subsystem_nqn: served.nqn.clone(),
        };
        let mut count = 0;
        let mut refuse = async |group: u8, change: &dyn Fn(&mut Answer), secrets: &Secrets| {
            let (mut host, _, session) = admin(&served).await;
            let challenge = host.challenged(7, 1, group).await;
            let mut answer = Answer::new(secrets, &challenge);
            change(&mut answer);
            host.auth_send(&answer.message()).await;
            count += 1;
            assert_eq!(failed(&served), count);
            host.refused(7, 1).await;
            ended(session).await;
            assert_eq!(served.target.subsystem().controller_count(), 0);
        };
        for group in [0, 1] {
            refuse(group, &|_| {}, &wrong(0x12)).await;
            // The controller's key is not the host's.
            refuse(group, &|_| {}, &wrong(0x22)).await;
            refuse(group, &|answer| answer.response[31] ^= 1, &secrets).await;
            // The host's response is not the controller's, nor its own challenge's.
            refuse(group, &|answer| answer.response = answer.expected.clone(), &secrets).await;
        }
        // The right key by another binding.
        refuse(0, &|_| {}, &Secrets { key_hash: 0, ..wrong(0x11) }).await;
    });
}

#[test]
fn our_own_challenge_is_not_answered_and_none_without_a_key() {
    run(async {
        let (served, secrets) = served(true);
        let (mut host, _, _session) = admin(&served).await;
        let challenge = host.challenged(7, 1, 0).await;
        let mut answer = Answer::new(&secrets, &challenge);
        answer.challenge.clone_from(&challenge.challenge);
        answer.sequence = challenge.sequence;
        host.auth_send(&answer.message()).await;
        host.refused(7, 1).await;

        served.directory.set_host_keys(HOST_NQN, Some(keys(Some(Hash::Sha256), false)));
        let (mut host, _, _session) = admin(&served).await;
        let challenge = host.challenged(7, 1, 0).await;
        host.auth_send(&Answer::new(&secrets, &challenge).message()).await;
        host.refused(7, 1).await;
    });
}

#[test]
fn messages_out_of_order_fail() {
    run(async {
        let (served, secrets) = served(true);
        let reply = |challenge: &Challenge| Answer::new(&secrets, challenge).message();
        // Nothing was begun.
        let (mut host, _, _session) = admin(&served).await;
        host.refused(0, 7).await;
        let (mut host, _, _session) = admin(&served).await;
        host.auth_send(&success2(7)).await;
        host.refused(7, 7).await;

        // A reply before the challenge was fetched.
        let (mut host, _, _session) = admin(&served).await;
        let challenge = host.challenged(7, 1, 0).await;
        host.auth_send(&negotiate(8, &[1], &[0])).await;
        host.auth_send(&reply(&challenge)).await;
        host.refused(8, 7).await;

        // The challenge fetched twice.
        let (mut host, _, _session) = admin(&served).await;
        host.challenged(7, 1, 0).await;
        host.refused(7, 7).await;

        // The reply twice.
        let (mut host, _, _session) = admin(&served).await;
        let challenge = host.challenged(7, 1, 0).await;
        host.auth_send(&reply(&challenge)).await;
        host.auth_send(&reply(&challenge)).await;
        host.refused(7, 7).await;

        // Success2 before Success1 was fetched.
        let (mut host, _, _session) = admin(&served).await;
        let challenge = host.challenged(7, 1, 0).await;
        host.auth_send(&reply(&challenge)).await;
        host.auth_send(&success2(7)).await;
        host.refused(7, 7).await;

        // An old reply in a new transaction of the same number.
        let (mut host, _, _session) = admin(&served).await;
        let old = reply(&host.challenged(7, 1, 0).await);
        host.challenged(7, 1, 0).await;
        host.auth_send(&old).await;
        host.refused(7, 1).await;

        // After a failure there is nothing to begin anew.
        let (mut host, _, _session) = admin(&served).await;
        host.auth_send(&success2(7)).await;
        host.command(&Host::authentication(5, 1, 72), &negotiate(8, &[1], &[0])).await;
        assert_eq!(host.next().await.status(), (1, 0x400c));
        host.refused(7, 7).await;

        // The host gives up.
        let (mut host, _, session) = admin(&served).await;
        host.challenged(7, 1, 0).await;
        let before = failed(&served);
        host.auth_send(&[&[0, 0xf0, 0, 0, 7, 0, 1, 1][..], &[0; 8]].concat()).await;
        assert!(host.closed().await);
        ended(session).await;
        assert_eq!(failed(&served), before + 1);
    });
}

#[test]
fn wrong_fields_fail_with_their_explanation() {
    run(async {
        let (served, secrets) = served(true);
        let offer = negotiate(7, &[1], &[0]);
        let changed = |at: usize, value: u8| {
            let mut message = offer.clone();
            message[at] = value;
            message
        };
        for (message, explanation) in [
            (changed(6, 1), 3),
            (changed(7, 0), 2),
            (changed(8, 2), 2),
            (changed(12, 4), 4),
            (changed(42, 9), 5),
            (changed(10, 31), 6),
            (offer[..71].to_vec(), 6),
            (vec![1, 9, 0, 0, 7, 0, 0, 0], 7),
            (vec![2, 0, 0, 0, 7, 0, 0, 0], 7),
        ] {
            let (mut host, _, _session) = admin(&served).await;
            host.auth_send(&message).await;
            host.refused(7, explanation).await;
        }
        let (mut host, _, _session) = admin(&served).await;
        host.auth_send(&[1]).await;
        host.refused(0, 6).await;

        let changes: [fn(&mut Answer); 6] = [
            |answer| answer.id = 8,
            |answer| answer.response.push(0),
            |answer| answer.response.truncate(31),
            |answer| answer.value = vec![2; 256],
            |answer| answer.sequence = [0; 4],
            |answer| answer.response.clear(),
        ];
        for change in changes {
            let (mut host, _, _session) = admin(&served).await;
            let challenge = host.challenged(7, 1, 0).await;
            let mut answer = Answer::new(&secrets, &challenge);
            change(&mut answer);
            host.auth_send(&answer.message()).await;
            host.refused(7, 6).await;
        }
        let (mut host, _, _session) = admin(&served).await;
        let challenge = host.challenged(7, 1, 0).await;
        let whole = Answer::new(&secrets, &challenge).message();
        host.auth_send(&whole[..whole.len() - 1]).await;
        host.refused(7, 6).await;
    });
}

#[test]
fn values_no_honest_host_sends_are_refused() {
    run(async {
        let (served, secrets) = served(false);
        let prime = prime(1);
        let one = BigUint::from(1_u8);
        for value in [BigUint::ZERO, one.clone(), &prime - &one, prime.clone(), &prime + &one] {
            let (mut host, _, _session) = admin(&served).await;
            let challenge = host.challenged(7, 1, 1).await;
            let mut answer = Answer::new(&secrets, &challenge);
            answer.value = padded(&value, 256);
            host.auth_send(&answer.message()).await;
            host.refused(7, 5).await;
        }
    });
}

#[test]
fn commands_that_are_not_ours_are_refused_and_change_nothing() {
    run(async {
        let (served, secrets) = served(false);
        let (mut host, _, _session) = admin(&served).await;
        let challenge = host.challenged(7, 1, 0).await;
        for (at, value) in [(41, 0), (42, 2), (43, 0xe8)] {
            let mut command = Host::authentication(6, 3, 4096);
            command[at] = value;
            assert_eq!(status_of(&mut host, &command).await, 0x4002);
        }
        for bytes in [0, 8196] {
            let command = Host::authentication(6, 3, bytes);
            assert_eq!(status_of(&mut host, &command).await, 0x4002);
        }
        let mut longer = Host::authentication(6, 3, 4096);
        longer[44] = 4;
        assert_eq!(status_of(&mut host, &longer).await, 0x400f);
        host.auth_send(&Answer::new(&secrets, &challenge).message()).await;
        // No room for the message: it can be fetched again.
        assert_eq!(status_of(&mut host, &Host::authentication(6, 3, 16)).await, 0x4002);
        host.command(&Host::authentication(6, 3, 48), &[]).await;
        assert_eq!(host.data(3).await[..2], [1, 3]);
        assert_eq!(host.property(8).await, 0x0001_0400);
    });
}

#[test]
fn hosts_authenticate_anew_while_they_are_served() {
    run(async {
        let (served, secrets) = served(true);
        let (mut host, id, _session) = admin(&served).await;
        host.authenticate(&secrets, 1, 0).await;
        host.set_property(0x14, 0x0046_0001).await;
        let (mut queue, _, _io_session) = connected(&served, 1, id).await;
        queue.authenticate(&secrets, 1, 0).await;
        queue.challenged(8, 2, 0).await;
        queue.write_in_capsule(2, 8, &[7; 512]).await;
        queue.authenticate(&secrets, 3, 1).await;
        assert_eq!(queue.read(3, 8, 1).await, [7; 512]);

        // Other keys hold from the next time on.
        let other = DhchapKey::from_random(None, &[0x33; 64]);
        let other = HostKeys { key: other, ctrl_key: None };
        served.directory.set_host_keys(HOST_NQN, Some(other));
        assert_eq!(queue.read(3, 8, 1).await, [7; 512]);
        let challenge = queue.challenged(9, 1, 0).await;
        queue.auth_send(&Answer::new(&secrets, &challenge).message()).await;
        assert_eq!(status_of(&mut queue, &io(READ, 4, 8, 1)).await, REQUIRED);
        queue.refused(9, 1).await;
        assert_eq!(host.property(0x1c).await & 1, 1, "the controller goes on");
        let new = Secrets { key: vec![0x33; 32], key_hash: 0, ctrl_key: None, ..secrets };
        host.authenticate(&new, 1, 0).await;

        // None at all: whoever is in stays in, and nobody has to authenticate.
        served.directory.set_host_keys(HOST_NQN, None);
        let (mut queue, result, _io_session) = connected(&served, 1, id).await;
        assert_eq!(result, u32::from(id));
        assert_eq!(queue.read(3, 8, 1).await, [7; 512]);
        assert_eq!(status_of(&mut queue, &Host::authentication(6, 3, 4096)).await, 0x4001);
    });
}

#[test]
fn a_write_whose_data_comes_after_a_failure_is_not_made() {
    run(async {
        let (served, secrets) = served(false);
        let (mut host, id, _session) = admin(&served).await;
        host.authenticate(&secrets, 1, 0).await;
        host.set_property(0x14, 0x0046_0001).await;
        let (mut queue, _, _io_session) = connected(&served, 1, id).await;
        queue.authenticate(&secrets, 1, 0).await;
        queue.command(&io(WRITE, 2, 8, 32), &[]).await;
        let r2t = queue.next().await;
        assert_eq!((r2t.kind, r2t.u16(0)), (kind::R2T, 2));
        queue.auth_send(&success2(7)).await;
        let data = queue.h2c(2, r2t.u16(2), 0, &[7; 32 * 512], true);
        queue.send(&data).await;
        assert_eq!(queue.next().await.status(), (2, REQUIRED));
        queue.refused(7, 7).await;

        let (mut queue, _, _io_session) = connected(&served, 1, id).await;
        queue.authenticate(&secrets, 1, 0).await;
        assert_eq!(queue.read(3, 8, 32).await, [0; 32 * 512]);
    });
}

#[test]
fn hosts_without_a_key_and_discovery_need_not_authenticate() {
    run(async {
        let (served, _) = served(false);
        let (mut host, _session) = Host::open(&served.target).await;
        host.begin(0).await;
        host.command(&connect_sqe(0, 31, 0), &connect_data(DISCOVERY_NQN, 0xffff)).await;
        assert_eq!(host.success(0xc0de).await >> 16, 0);
        assert_eq!(host.property(8).await, 0x0001_0400);
        assert_eq!(status_of(&mut host, &Host::authentication(6, 3, 4096)).await, 0x4001);

        let served = serve(NvmeTcpOptions::default());
        let (mut host, result, _session) = connected(&served, 0, 0xffff).await;
        assert_eq!(result >> 16, 0);
        assert_eq!(host.property(8).await, 0x0001_0400);
    });
}

#[test]
fn hosts_that_do_not_authenticate_are_cut_off() {
    run(async {
        let timeout = Duration::from_millis(300);
        let options = NvmeTcpOptions {
            handshake_timeout: timeout,
            handshakes_max: 3,
            ..NvmeTcpOptions::default()
        };
        let served = serve(options);
        served.directory.set_host_keys(HOST_NQN, Some(keys(Some(Hash::Sha256), false)));
        let secrets = secrets(&served, Some(Hash::Sha256), false);
        let (mut silent, _, session) = admin(&served).await;
        silent.challenged(7, 1, 0).await;
        let (mut proven, _, _session) = admin(&served).await;
        proven.authenticate(&secrets, 1, 0).await;
        assert!(silent.closed().await);
        ended(session).await;
        assert_eq!(served.target.subsystem().controller_count(), 1);
        sleep(timeout).await;
        assert_eq!(proven.property(8).await, 0x0001_0400, "it need not hurry any more");

        // They give way to those who come after them.
        let (mut oldest, _, _session) = admin(&served).await;
        let _others = join_all((0..3).map(|_| admin(&served))).await;
        assert!(oldest.closed().await);
        assert_eq!(proven.property(8).await, 0x0001_0400);
    });
}

#[test]
fn a_reset_ends_queues_that_are_still_to_authenticate() {
    run(async {
        let (served, secrets) = served(false);
        let (mut host, id, _session) = admin(&served).await;
        host.authenticate(&secrets, 1, 0).await;
        host.set_property(0x14, 0x0046_0001).await;
        let (mut queue, _, session) = connected(&served, 1, id).await;
        queue.challenged(7, 1, 0).await;
        host.set_property(0x14, 0x0046_0000).await;
        assert!(queue.closed().await);
        ended(session).await;
        assert_eq!(host.property(0x1c).await & 1, 0);
    });
}

#[test]
fn many_hosts_authenticate_at_once_and_others_are_served_meanwhile() {
    run(async {
        let (served, secrets) = served(false);
        let (mut host, id, _session) = admin(&served).await;
        host.authenticate(&secrets, 1, 0).await;
        host.set_property(0x14, 0x0046_0001).await;
        let (mut queue, _, _io_session) = connected(&served, 1, id).await;
        queue.authenticate(&secrets, 1, 0).await;
        let served = Arc::new(served);
        let flood = async {
            let one = async || {
                let (mut host, _, session) = admin(&served).await;
                host.challenged(7, 1, 5).await;
                drop(host);
                ended(session).await;
            };
            join_all((0..20).map(|_| one())).await;
        };
        let reads = async {
            let mut slowest = Duration::ZERO;
            for _ in 0..50 {
                let begun = tokio::time::Instant::now();
                queue.read(3, 0, 1).await;
                slowest = slowest.max(begun.elapsed());
            }
            slowest
        };
        let ((), slowest) = join(flood, reads).await;
        assert!(slowest < Duration::from_secs(1), "a read took {slowest:?}");
    });
}

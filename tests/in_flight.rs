//! What all connections have in flight together is bounded, whatever hosts do with it, and those who
//! wait for it are served.
//!
//! Counted, not measured: the budget says what is taken, and how far hosts come shows that it is
//! asked before anything is received or read.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio::task::spawn_local;
use tokio::time::sleep;
use tokio::time::timeout;
use weft::target::budget::Budget;
use weft::target::nbd::NbdOptions;
use weft::target::nbd::NbdTarget;
use weft::target::nvmf::tcp::NvmeTcpOptions;
use weft::volume::memory::MemoryDirectory;
use weft::volume::memory::MemoryVolume;

#[path = "nvmf/host.rs"]
#[expect(dead_code, reason = "other tests use the rest")]
mod host;

use host::A_MOMENT;
use host::Host;
use host::PATIENCE;
use host::READ;
use host::WRITE;
use host::ended;
use host::io;
use host::kind;
use host::run;
use host::serve;

const NBD_READ: u16 = 0;
const NBD_WRITE: u16 = 1;
const MIB: usize = 1 << 20;
/// The largest request of NBD.
const LARGE: usize = 32 * MIB;
/// Room for two of those, of which each connection has a MiB already.
const BUDGET_BYTES: u64 = 64 << 20;
const CLIENTS: usize = 12;
/// As many small reads as are answered at least before the client has to take answers.
const BATCH: u64 = 256;

/// An NBD target over one volume "v" of 64 MiB that holds ones.
async fn nbd(budget: &Arc<Budget>) -> (Arc<NbdTarget>, Arc<MemoryVolume>) {
    let volume = Arc::new(MemoryVolume::new("v", 64 << 20));
    let directory = Arc::new(MemoryDirectory::new([Arc::clone(&volume) as _]));
    let options = NbdOptions { budget: Arc::clone(budget), ..NbdOptions::default() };
    let target = Arc::new(NbdTarget::new(directory, options));
    let (mut client, session) = Client::attach(&target).await;
    client.send(&request(NBD_WRITE, LARGE)).await;
    client.send(&vec![1; LARGE]).await;
    client.answered().await;
    leave(client, session).await;
    (target, volume)
}

/// The least of a client.
struct Client(UnixStream);

impl Client {
    /// Connects and chooses the export by its name, after which transmission begins.
    async fn attach(target: &Arc<NbdTarget>) -> (Self, JoinHandle<()>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let session = spawn_local(Arc::clone(target).serve(theirs));
        let mut client = Self(ours);
        client.receive(18).await;
        client.send(&[0, 0, 0, 3]).await;
        client.send(&[b"IHAVEOPT", &[0, 0, 0, 1, 0, 0, 0, 1, b'v'][..]].concat()).await;
        client.receive(10).await;
        (client, session)
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.unwrap();
    }

    async fn receive(&mut self, bytes: usize) -> Vec<u8> {
        let mut buffer = vec![0; bytes];
        self.0.read_exact(&mut buffer).await.unwrap();
        buffer
    }

    /// The next reply says that all went well.
    async fn answered(&mut self) {
        let reply = timeout(PATIENCE, self.receive(16)).await.expect("no answer");
        assert_eq!(reply[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
    }

    async fn read(&mut self, bytes: usize) {
        self.send(&request(NBD_READ, bytes)).await;
        self.answered().await;
        let data = timeout(PATIENCE, self.receive(bytes)).await.expect("no data");
        assert!(data.iter().all(|byte| *byte == 1));
    }

    async fn write(&mut self, bytes: usize) {
        self.send(&request(NBD_WRITE, bytes)).await;
        self.send(&vec![1; bytes]).await;
        self.answered().await;
    }
}

fn request(command: u16, bytes: usize) -> Vec<u8> {
    let mut request = vec![0x25, 0x60, 0x95, 0x13, 0, 0];
    request.extend(command.to_be_bytes());
    request.extend([0; 16]);
    request.extend(u32::try_from(bytes).unwrap().to_be_bytes());
    request
}

/// Hangs up, and waits for the other end to have done so.
async fn leave<T>(client: T, session: JoinHandle<()>) {
    drop(client);
    ended(session).await;
}

/// Nobody holds anything or waits.
fn all_is_given_back(budget: &Budget) {
    assert_eq!((budget.taken(), budget.waiting()), (0, 0));
}

/// Waits until `done`.
async fn until(done: impl Fn() -> bool, what: &str) {
    let done = async {
        while !done() {
            sleep(A_MOMENT / 10).await;
        }
    };
    timeout(PATIENCE, done).await.expect(what);
}

/// Waits until so many MiB are taken, and so many connections wait.
async fn until_taken(budget: &Budget, mib: u64, waiting: usize) {
    let what = "not as much is taken or as many wait as should";
    until(|| (budget.taken(), budget.waiting()) == (mib << 20, waiting), what).await;
}

/// How many requests each open connection has made, in the order they came.
fn requests(target: &NbdTarget) -> Vec<u64> {
    target.connections().list().iter().map(|connection| connection.requests).collect()
}

/// Small requests and large ones within the allowance go on beside those that wait.
async fn others_are_served(target: &Arc<NbdTarget>) {
    let (mut other, session) = Client::attach(target).await;
    for bytes in [512, 4096, MIB / 2] {
        other.write(bytes).await;
        other.read(bytes).await;
    }
    // Many at once, more than the allowance covers.
    other.send(&request(NBD_READ, 4096).repeat(1000)).await;
    for _ in 0..1000 {
        other.answered().await;
        other.receive(4096).await;
    }
    leave(other, session).await;
}

#[test]
fn half_sent_writes_of_many_clients_take_no_more_than_there_is() {
    run(async {
        let budget = Budget::new(BUDGET_BYTES);
        let (target, _volume) = nbd(&budget).await;
        let mut senders = Vec::new();
        let mut sessions = Vec::new();
        for _ in 0..CLIENTS {
            let (mut client, session) = Client::attach(&target).await;
            sessions.push(session);
            senders.push(spawn_local(async move {
                client.send(&request(NBD_WRITE, LARGE)).await;
                client.send(&vec![1; LARGE / 2]).await;
                client
            }));
        }
        let taken = || senders.iter().filter(|sender| sender.is_finished()).count();
        until(|| budget.waiting() == CLIENTS - 2 && taken() == 2, "two have room").await;
        others_are_served(&target).await;
        assert_eq!(taken(), 2, "the others wait in their sockets");
        assert!(budget.taken() <= BUDGET_BYTES);

        // One of the two leaves, and one finishes: two others move up, and so on to the last.
        let mut leaves = true;
        for sender in senders {
            let mut client = timeout(PATIENCE, sender).await.expect("its turn came").unwrap();
            assert!(budget.taken() <= BUDGET_BYTES);
            if leaves {
                drop(client);
            } else {
                client.send(&vec![1; LARGE / 2]).await;
                client.answered().await;
            }
            leaves = !leaves;
        }
        for session in sessions {
            ended(session).await;
        }
        all_is_given_back(&budget);
    });
}

#[test]
fn large_reads_that_nobody_takes_hold_no_more_than_there_is() {
    for misses in [false, true] {
        run(async move {
            let budget = Budget::new(BUDGET_BYTES);
            let (target, volume) = nbd(&budget).await;
            volume.set_misses(misses);
            let mut clients = Vec::new();
            for _ in 0..CLIENTS {
                let (mut client, session) = Client::attach(&target).await;
                client.send(&request(NBD_READ, LARGE).repeat(2)).await;
                clients.push((client, session));
            }
            let begun = || requests(&target).iter().sum::<u64>();
            until(|| budget.waiting() == CLIENTS - 2 && begun() == 2, "two have room").await;
            others_are_served(&target).await;
            assert_eq!(begun(), 2);
            assert!(budget.taken() <= BUDGET_BYTES);
            let take = |(mut client, session): (Client, JoinHandle<()>)| async move {
                for _ in 0..2 {
                    client.answered().await;
                    client.receive(LARGE).await;
                }
                leave(client, session).await;
            };
            let takers: Vec<_> =
                clients.into_iter().map(|client| spawn_local(take(client))).collect();
            for taker in takers {
                taker.await.unwrap();
                assert!(budget.taken() <= BUDGET_BYTES);
            }
            all_is_given_back(&budget);
        });
    }
}

/// A block may be all that is wanted of what was decoded together, and keeps that in memory.
#[test]
fn small_answers_that_nobody_takes_count_for_what_they_keep_in_memory() {
    run(async {
        let budget = Budget::new(BUDGET_BYTES);
        let (target, _volume) = nbd(&budget).await;
        let (mut deaf, deaf_session) = Client::attach(&target).await;
        deaf.send(&request(NBD_READ, 4096).repeat(1000)).await;
        until(|| requests(&target)[0] >= BATCH, "a batch is answered").await;
        assert!(budget.taken() > 0, "less than 1 MiB of answers keeps more");
        // Where there is none left for that, they are copied.
        let mut holders = Vec::new();
        for _ in 0..2 {
            let (mut client, session) = Client::attach(&target).await;
            client.send(&request(NBD_WRITE, LARGE)).await;
            holders.push((client, session));
        }
        until(|| budget.waiting() == 1, "one waits").await;
        let (mut other, session) = Client::attach(&target).await;
        let before = budget.taken();
        other.send(&request(NBD_READ, 4096).repeat(1000)).await;
        until(|| requests(&target).last() >= Some(&BATCH), "a batch is answered").await;
        assert_eq!(budget.taken(), before);
        for client in [&mut deaf, &mut other] {
            for _ in 0..1000 {
                client.answered().await;
                assert_eq!(client.receive(4096).await, [1; 4096]);
            }
        }
        holders.extend([(deaf, deaf_session), (other, session)]);
        for (client, session) in holders {
            leave(client, session).await;
        }
        all_is_given_back(&budget);
    });
}

#[test]
fn a_client_that_stands_still_is_cut_off_only_once_others_wait() {
    run(async {
        let stall_time = 8 * A_MOMENT;
        let budget = Budget::with_stall_time(BUDGET_BYTES, stall_time);
        let (target, _volume) = nbd(&budget).await;
        let (mut still, still_session) = Client::attach(&target).await;
        still.send(&request(NBD_WRITE, LARGE)).await;
        still.send(&vec![1; LARGE / 2]).await;
        let (mut slow, slow_session) = Client::attach(&target).await;
        slow.send(&request(NBD_WRITE, LARGE)).await;
        until(|| budget.taken() > BUDGET_BYTES - (4 << 20), "both have begun").await;
        sleep(3 * stall_time).await;
        assert!(!still_session.is_finished() && !slow_session.is_finished(), "nobody waits");

        let slowly = spawn_local(async move {
            // Enough for each look, and long enough for all that follows.
            for part in vec![1; LARGE].chunks(300 << 10) {
                slow.send(part).await;
                sleep(A_MOMENT).await;
            }
            slow.answered().await;
        });
        let (mut deaf, deaf_session) = Client::attach(&target).await;
        deaf.send(&request(NBD_READ, LARGE)).await;
        ended(still_session).await;
        // It has room now, and does not take what it asked for: the next to wait ends that as well.
        sleep(2 * stall_time).await;
        assert!(!deaf_session.is_finished() && !slowly.is_finished());
        let (mut patient, patient_session) = Client::attach(&target).await;
        patient.read(LARGE).await;
        ended(deaf_session).await;
        slowly.await.expect("who moves, however slowly, is not cut off");
        drop(patient);
        for session in [slow_session, patient_session] {
            ended(session).await;
        }
        all_is_given_back(&budget);
    });
}

/// Asks for `count` writes of 1 MiB.
async fn ask_to_write(host: &mut Host, count: u16) {
    for cid in 0..count {
        host.command(&io(WRITE, cid, 0, 2048), &[]).await;
    }
}

/// The transfers that are granted, which are so many.
async fn granted(host: &mut Host, count: usize) -> Vec<(u16, u16)> {
    let mut granted = Vec::new();
    for _ in 0..count {
        let pdu = host.next().await;
        assert_eq!(pdu.kind, kind::R2T);
        granted.push((pdu.u16(0), pdu.u16(2)));
    }
    assert!(host.silent().await, "no more are granted");
    granted
}

#[test]
fn transfers_of_many_nvme_hosts_take_no_more_than_there_is() {
    run(async {
        let budget = Budget::new(8 << 20);
        let options = NvmeTcpOptions { budget: Arc::clone(&budget), ..NvmeTcpOptions::default() };
        let served = serve(options);
        let (_admin, id, _) = Host::admin(&served, 0).await;
        let mut hosts = Vec::new();
        // One each, and those from the budget.
        let counts = [4, 4, 3, 1, 1, 1, 1, 1, 1, 1];
        let (mut taken, mut waiting) = (0, 0);
        for (qid, count) in (1..).zip(counts) {
            let (mut host, session) = Host::queue(&served, id, qid, 0).await;
            ask_to_write(&mut host, 4).await;
            taken += count - 1;
            waiting += usize::from(count < 4);
            until_taken(&budget, taken, waiting).await;
            hosts.push((host, session, Vec::new()));
        }
        assert_eq!((taken, waiting), (8, 8));
        for ((host, _, transfers), count) in hosts.iter_mut().zip(counts) {
            transfers.extend(granted(host, usize::try_from(count).unwrap()).await);
        }
        // Another is served, small reads as well as data in capsules.
        let (mut other, session) = Host::queue(&served, id, 11, 0).await;
        other.write(1, 0, &[7; MIB / 2], MIB / 4).await;
        other.write_in_capsule(2, 0, &[7; 8192]).await;
        assert_eq!(other.read(3, 0, 16).await, [7; 8192]);
        leave(other, session).await;

        // Reads wait behind the writes, and all comes to its end.
        let data = vec![9; MIB];
        for (mut host, session, mut transfers) in hosts {
            host.command(&io(READ, 9, 100_000, 2048), &[]).await;
            let mut answered = 0;
            while answered < 5 {
                for (cid, tag) in transfers.drain(..) {
                    let pdu = host.h2c(cid, tag, 0, &data, true);
                    host.send(&pdu).await;
                }
                let pdu = host.next().await;
                match pdu.kind {
                    kind::R2T => transfers.push((pdu.u16(0), pdu.u16(2))),
                    kind::DATA => answered += 1,
                    _ => {
                        assert_eq!(pdu.status().1, 0);
                        answered += 1;
                    }
                }
            }
            assert!(budget.taken() <= 8 << 20);
            leave(host, session).await;
        }
        all_is_given_back(&budget);
    });
}

#[test]
fn reads_of_nvme_hosts_begin_only_while_there_is_room() {
    run(async {
        let budget = Budget::new(8 << 20);
        let options = NvmeTcpOptions { budget: Arc::clone(&budget), ..NvmeTcpOptions::default() };
        let served = serve(options);
        let (_admin, id, _) = Host::admin(&served, 0).await;
        served.volume.set_misses(true);
        served.volume.hold(true);
        let mut hosts = Vec::new();
        for qid in 1..=10 {
            let (mut host, session) = Host::queue(&served, id, qid, 0).await;
            for cid in 0..4 {
                host.command(&io(READ, cid, 0, 2048), &[]).await;
            }
            hosts.push((host, session));
        }
        until_taken(&budget, 8, 8).await;
        served.volume.hold(false);
        // Nobody takes anything yet but what is in its socket.
        let read_bytes =
            || served.target.connections().list().iter().map(|of| of.bytes_read).sum::<u64>();
        until(|| read_bytes() >= 18 << 20, "what was begun is read").await;
        assert!(budget.taken() <= 8 << 20);
        for (mut host, session) in hosts {
            for _ in 0..4 {
                let pdu = host.next().await;
                assert_eq!((pdu.kind, pdu.data.len()), (kind::DATA, MIB));
            }
            leave(host, session).await;
        }
        all_is_given_back(&budget);
    });
}

#[test]
fn data_in_capsules_that_waits_counts_and_blocks_no_transfer() {
    run(async {
        let budget = Budget::new(2 << 20);
        let options = NvmeTcpOptions { budget: Arc::clone(&budget), ..NvmeTcpOptions::default() };
        let served = serve(options);
        let (_admin, id, _) = Host::admin(&served, 0).await;
        let (mut host, _session) = Host::queue(&served, id, 1, 0).await;
        ask_to_write(&mut host, 5).await;
        until_taken(&budget, 2, 1).await;
        // One of its own, and two from the budget.
        let mut transfers = granted(&mut host, 3).await;
        // These wait behind the writes, and what was asked for comes behind them.
        let capsule = host::sqe(WRITE, 0, 1, &[4096, 0, 15], 0x01, 8192);
        for cid in 10..60_u8 {
            let mut sqe = capsule.clone();
            sqe[2] = cid;
            host.command(&sqe, &[5; 8192]).await;
        }
        let data = vec![9; MIB];
        let mut answered = 0;
        while answered < 55 {
            for (cid, tag) in transfers.drain(..) {
                let pdu = host.h2c(cid, tag, 0, &data, true);
                host.send(&pdu).await;
            }
            let pdu = host.next().await;
            match pdu.kind {
                kind::R2T => transfers.push((pdu.u16(0), pdu.u16(2))),
                _ => {
                    assert_eq!(pdu.status().1, 0);
                    answered += 1;
                }
            }
        }
        until(|| budget.taken() == 0, "all is given back").await;
    });
}

#[test]
fn nbd_and_nvme_share_what_there_is_and_a_host_that_stands_still_is_cut_off() {
    run(async {
        let budget = Budget::with_stall_time(8 << 20, 8 * A_MOMENT);
        let (target, _volume) = nbd(&budget).await;
        let options = NvmeTcpOptions { budget: Arc::clone(&budget), ..NvmeTcpOptions::default() };
        let served = serve(options);
        let (_admin, id, _) = Host::admin(&served, 0).await;
        let (mut still, still_session) = Host::queue(&served, id, 1, 0).await;
        ask_to_write(&mut still, 9).await;
        until_taken(&budget, 8, 0).await;
        granted(&mut still, 9).await;
        sleep(Duration::from_secs(1)).await;
        assert!(!still_session.is_finished(), "nobody waits");
        // Larger than all there is.
        let (mut client, session) = Client::attach(&target).await;
        client.write(LARGE).await;
        ended(still_session).await;
        assert!(still.closed().await);
        leave(client, session).await;
        all_is_given_back(&budget);
    });
}

/// Reads or writes 32 KiB over and over, more than has to move, until it is cut off.
async fn goes_on_with(opcode: u8, mut host: Host) {
    let command = host.pdu(4, 0, &io(opcode, 100, 0, 64), &[]);
    let mut answer = vec![0; if opcode == READ { 24 + (32 << 10) } else { 24 }];
    while host.stream.write_all(&command).await.is_ok()
        && host.stream.read_exact(&mut answer).await.is_ok()
    {
        if answer[0] == kind::R2T {
            let tag = u16::from_le_bytes([answer[10], answer[11]]);
            let data = host.h2c(100, tag, 0, &[3; 32 << 10], true);
            let sent = host.stream.write_all(&data).await;
            if sent.is_err() || host.stream.read_exact(&mut answer).await.is_err() {
                break;
            }
        }
    }
}

#[test]
fn a_host_that_keeps_data_back_is_cut_off_whatever_else_it_does() {
    for opcode in [READ, WRITE] {
        run(async move {
            let budget = Budget::with_stall_time(8 << 20, 8 * A_MOMENT);
            let (target, _volume) = nbd(&budget).await;
            let options =
                NvmeTcpOptions { budget: Arc::clone(&budget), ..NvmeTcpOptions::default() };
            let served = serve(options);
            let (_admin, id, _) = Host::admin(&served, 0).await;
            let (mut keeps, keeps_session) = Host::queue(&served, id, 1, 0).await;
            ask_to_write(&mut keeps, 9).await;
            until_taken(&budget, 8, 0).await;
            granted(&mut keeps, 9).await;
            let goes_on = spawn_local(goes_on_with(opcode, keeps));
            let (mut client, session) = Client::attach(&target).await;
            client.write(MIB * 2).await;
            ended(keeps_session).await;
            goes_on.await.unwrap();
            leave(client, session).await;
            all_is_given_back(&budget);
        });
    }
}

#[test]
fn a_host_whose_connection_is_terminated_waits_no_more() {
    run(async {
        let budget = Budget::new(2 << 20);
        let options = NvmeTcpOptions { budget: Arc::clone(&budget), ..NvmeTcpOptions::default() };
        let served = serve(options);
        let (_admin, id, _) = Host::admin(&served, 0).await;
        let (mut host, session) = Host::queue(&served, id, 1, 0).await;
        ask_to_write(&mut host, 4).await;
        until_taken(&budget, 2, 1).await;
        granted(&mut host, 3).await;
        let nobody_asked = host.h2c(0, 99, 0, &[0; 512], true);
        host.send(&nobody_asked).await;
        host.terminated().await;
        // It has not closed yet, so what it has is still there.
        assert_eq!((budget.taken(), budget.waiting()), (2 << 20, 0));
        leave(host, session).await;
        all_is_given_back(&budget);
    });
}

#[test]
fn a_client_that_waits_keeps_its_place_while_replies_leave() {
    run(async {
        let budget = Budget::new(8 << 20);
        let (target, volume) = nbd(&budget).await;
        let (mut holder, holder_session) = Client::attach(&target).await;
        holder.send(&request(NBD_WRITE, 8 * MIB)).await;
        until_taken(&budget, 7, 0).await;
        volume.set_misses(true);
        volume.hold(true);
        let (mut client, session) = Client::attach(&target).await;
        // What it may hold without asking, and more than there is.
        client.send(&request(NBD_READ, MIB / 2).repeat(2)).await;
        client.send(&request(NBD_WRITE, 4 * MIB)).await;
        until_taken(&budget, 7, 1).await;
        let waits = budget.stats().waits;
        volume.hold(false);
        for _ in 0..2 {
            client.answered().await;
            client.receive(MIB / 2).await;
        }
        assert_eq!(
            (budget.waiting(), budget.stats().waits),
            (1, waits),
            "it was the first to wait"
        );
        leave(holder, holder_session).await;
        client.send(&vec![1; 4 * MIB]).await;
        client.answered().await;
        leave(client, session).await;
        all_is_given_back(&budget);
    });
}

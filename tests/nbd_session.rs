//! Whole NBD sessions over real sockets: limits, endings, TLS, and a client nobody here wrote.
//!
//! The server runs as in the node: [`NbdTarget::serve`] on a current-thread runtime. What the
//! protocol core answers is tested beside its code; here it is what happens around it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use s2n_tls::connection::Builder;
use s2n_tls::connection::Connection;
use s2n_tls::enums::Mode;
use s2n_tls::enums::PskHmac;
use s2n_tls::security::Policy;
use tokio::io::AsyncRead;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWrite;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tokio::net::UnixStream;
use tokio::runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::task::LocalSet;
use tokio::task::spawn_local;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::RootCertStore;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use weft::secret::named_keys;
use weft::target::nbd::NbdOptions;
use weft::target::nbd::NbdTarget;
use weft::target::nbd::handshake::TlsMode;
use weft::target::nbd::tls;
use weft::target::nbd::tls::Tls;
use weft::target::nbd::tls::TlsFiles;
use weft::volume::Piece;
use weft::volume::Volume;
use weft::volume::memory::MemoryDirectory;
use weft::volume::memory::MemoryVolume;
use weft::volume::pieces_equal;
use weft_api::Operation;

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const ESHUTDOWN: u32 = 108;
/// Longest any step may take; far above what it does take.
const PATIENCE: Duration = Duration::from_secs(20);
/// Long enough for the server to do what it is going to do.
const A_MOMENT: Duration = Duration::from_millis(50);

/// Runs a test on a runtime like a data-plane thread's.
fn run(test: impl Future<Output = ()>) {
    let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let limited = async { timeout(4 * PATIENCE, test).await.expect("the test hangs") };
    LocalSet::new().block_on(&runtime, limited);
}

/// A target over one volume "v" of 64 MiB.
fn target(options: NbdOptions) -> (Arc<NbdTarget>, Arc<MemoryVolume>) {
    let volume = Arc::new(MemoryVolume::new("v", 64 << 20));
    let directory = MemoryDirectory::new([Arc::clone(&volume) as _]);
    (Arc::new(NbdTarget::new(Arc::new(directory), options)), volume)
}

/// Connects a client; the handle ends with the session.
fn connect(target: &Arc<NbdTarget>) -> (Client<UnixStream>, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let session = spawn_local(Arc::clone(target).serve(theirs));
    (Client { stream: ours }, session)
}

/// The same over TCP, where TLS is served.
async fn connect_tcp(target: &Arc<NbdTarget>) -> (Client<TcpStream>, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (theirs, _) = listener.accept().await.unwrap();
    let session = spawn_local(Arc::clone(target).serve(theirs));
    (Client { stream: ours }, session)
}

async fn ended(session: JoinHandle<()>) {
    timeout(PATIENCE, session).await.expect("the session goes on").unwrap();
}

/// The least a client has to know.
struct Client<S> {
    stream: S,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    async fn receive(&mut self, bytes: usize) -> Vec<u8> {
        let mut buffer = vec![0; bytes];
        let received = timeout(PATIENCE, self.stream.read_exact(&mut buffer)).await;
        received.expect("no answer").unwrap();
        buffer
    }

    /// Whether the server closed, with nothing more to say.
    async fn closed(&mut self) -> bool {
        let mut rest = [0; 1];
        let read = timeout(PATIENCE, self.stream.read(&mut rest)).await.expect("still open");
        read.is_err() || read.is_ok_and(|bytes| bytes == 0)
    }

    async fn greet(&mut self) {
        assert_eq!(self.receive(18).await[..16], *b"NBDMAGICIHAVEOPT");
        self.stream.write_all(&[0, 0, 0, 3]).await.unwrap();
    }

    async fn send_option(&mut self, option: u32, data: &[u8]) {
        self.stream.write_all(&option_bytes(option, data)).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    /// The type of the next reply.
    async fn reply(&mut self) -> u32 {
        let header = self.receive(20).await;
        let length = u32::from_be_bytes(header[16..].try_into().unwrap());
        self.receive(length.try_into().unwrap()).await;
        u32::from_be_bytes(header[12..16].try_into().unwrap())
    }

    /// GO on export "v".
    async fn go(&mut self) {
        self.send_option(7, &[0, 0, 0, 1, b'v', 0, 0]).await;
        while self.reply().await != 1 {}
    }

    async fn attach(&mut self) {
        self.greet().await;
        self.go().await;
    }

    async fn request(&mut self, command: u16, cookie: u64, offset: u64, length: u32) {
        self.stream.write_all(&request_bytes(command, cookie, offset, length)).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    async fn write(&mut self, cookie: u64, offset: u64, data: &[u8]) {
        let length = data.len().try_into().unwrap();
        let mut bytes = request_bytes(WRITE, cookie, offset, length);
        bytes.extend_from_slice(data);
        self.stream.write_all(&bytes).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    /// Error and cookie of the next simple reply.
    async fn simple(&mut self) -> (u32, u64) {
        let reply = self.receive(16).await;
        assert_eq!(reply[..4], 0x6744_6698_u32.to_be_bytes());
        let error = u32::from_be_bytes(reply[4..8].try_into().unwrap());
        (error, u64::from_be_bytes(reply[8..].try_into().unwrap()))
    }
}

fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap();
    [b"IHAVEOPT", &option.to_be_bytes()[..], &length.to_be_bytes(), data].concat()
}

fn request_bytes(command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&[0, 0]);
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes
}

// spec: nbd-one-reply
#[test]
fn every_pipelined_request_gets_one_reply() {
    run(async {
        let (target, volume) = target(NbdOptions::default());
        for misses in [false, true] {
            volume.set_misses(misses);
            let (mut client, session) = connect(&target);
            client.attach().await;
            let mut stream = Vec::new();
            for cookie in 0..2000_u64 {
                stream.extend(request_bytes(WRITE, cookie, cookie * 4096, 4096));
                stream.extend([u8::try_from(cookie % 251).unwrap(); 4096]);
            }
            let (mut read_half, mut write_half) = client.stream.into_split();
            let sender = spawn_local(async move {
                write_half.write_all(&stream).await.unwrap();
                write_half
            });
            let mut seen = vec![false; 2000];
            for _ in 0..2000 {
                let mut reply = [0; 16];
                read_half.read_exact(&mut reply).await.unwrap();
                let cookie = usize::try_from(u64::from_be_bytes(reply[8..].try_into().unwrap()));
                assert!(!std::mem::replace(&mut seen[cookie.unwrap()], true));
            }
            let stream = sender.await.unwrap().reunite(read_half).unwrap();
            let mut client = Client { stream };
            for cookie in (0..2000_u64).step_by(7) {
                client.request(READ, cookie, cookie * 4096, 4096).await;
                assert_eq!(client.simple().await, (0, cookie));
                assert_eq!(client.receive(4096).await, [u8::try_from(cookie % 251).unwrap(); 4096]);
            }
            client.request(DISC, 0, 0, 0).await;
            assert!(client.closed().await);
            ended(session).await;
        }
        assert_eq!(target.connections().list(), []);
        let counted = volume.requests().snapshot();
        let (reads, writes) = (&counted[0], &counted[1]);
        assert_eq!((reads.operation, writes.operation), (Operation::Read, Operation::Write));
        assert_eq!((writes.latency.count(), writes.bytes), (2 * 2000, 2 * 2000 * 4096));
        assert_eq!((reads.latency.count(), reads.bytes), (2 * 286, 2 * 286 * 4096));
        assert_eq!((reads.errors, writes.errors), (0, 0));
        assert_eq!(target.counters().connections_total.load(Ordering::Relaxed), 2);
    });
}

#[test]
fn large_payloads_pass_in_both_directions() {
    run(async {
        let (target, _volume) = target(NbdOptions::default());
        let (mut client, session) = connect(&target);
        client.attach().await;
        let data: Vec<u8> = (0..32_u32 << 20).map(|i| (i / 4096 % 255).to_le_bytes()[0]).collect();
        client.write(1, 4096 + 100, &data).await;
        assert_eq!(client.simple().await, (0, 1));
        client.request(READ, 2, 4096 + 100, 32 << 20).await;
        assert_eq!(client.simple().await, (0, 2));
        assert!(client.receive(32 << 20).await == data);
        drop(client);
        ended(session).await;
    });
}

// spec: nbd-backpressure
#[test]
fn a_client_that_floods_waits_in_its_own_socket() {
    run(async {
        let options = NbdOptions { bytes_max: 4 << 20, ..NbdOptions::default() };
        let (target, volume) = target(options);
        volume.hold(true);
        let (mut client, session) = connect(&target);
        client.attach().await;
        let mut sent = 0;
        let megabyte = vec![1; 1 << 20];
        while timeout(4 * A_MOMENT, client.write(sent, sent << 20, &megabyte)).await.is_ok() {
            sent += 1;
            assert!(sent < 8, "4 MiB in flight, and what sockets and one buffer hold");
        }
        assert!(sent >= 4);
        volume.hold(false);
        assert_eq!(client.simple().await.0, 0);
        drop(client);
        ended(session).await;
    });
}

// spec: nbd-backpressure
#[test]
fn requests_above_the_limit_wait() {
    run(async {
        let (target, volume) = target(NbdOptions { requests_max: 128, ..NbdOptions::default() });
        volume.hold(true);
        let (mut client, session) = connect(&target);
        client.attach().await;
        for cookie in 0..300 {
            client.request(FLUSH, cookie, 0, 0).await;
        }
        tokio::time::sleep(A_MOMENT).await;
        let listed = || target.connections().list().remove(0);
        assert_eq!((listed().requests, listed().in_flight), (128, 128));
        assert_eq!((listed().volume.as_deref(), listed().peer.as_str()), (Some("v"), "unix"));
        volume.hold(false);
        for _ in 0..300 {
            assert_eq!(client.simple().await.0, 0);
        }
        tokio::time::sleep(A_MOMENT).await;
        assert_eq!((listed().requests, listed().in_flight), (300, 0));
        drop(client);
        ended(session).await;
    });
}

// spec: nbd-backpressure
#[test]
fn a_client_that_does_not_read_blocks_only_itself() {
    run(async {
        let (target, _volume) = target(NbdOptions::default());
        let (mut deaf, session) = connect(&target);
        deaf.attach().await;
        let flood = request_bytes(READ, 0, 0, 1 << 20).repeat(50_000);
        let flooding = deaf.stream.write_all(&flood);
        assert!(timeout(4 * A_MOMENT, flooding).await.is_err(), "it must block");
        let (mut other, other_session) = connect(&target);
        other.attach().await;
        other.request(READ, 5, 0, 512).await;
        assert_eq!(other.simple().await, (0, 5));
        drop((deaf, other));
        ended(session).await;
        ended(other_session).await;
    });
}

// The client may send the write again on another connection, and then another to the same blocks.
#[test]
fn a_write_that_waits_is_never_done_once_the_client_has_vanished() {
    run(async {
        let (target, volume) = target(NbdOptions::default());
        volume.hold(true);
        let (mut client, session) = connect(&target);
        client.attach().await;
        client.write(1, 0, &[7; 4096]).await;
        tokio::time::sleep(A_MOMENT).await;
        // Half a request, so that the end is not a clean one.
        client.stream.write_all(&[0x25, 0x60]).await.unwrap();
        drop(client);
        ended(session).await;
        volume.hold(false);
        tokio::time::sleep(A_MOMENT).await;
        let mut pieces = Vec::new();
        assert!(volume.try_read(0, 4096, &mut pieces).unwrap());
        assert_eq!(pieces, [Piece::Zero(4096)]);
    });
}

// spec: nbd-disconnect
#[test]
fn disc_waits_for_what_is_in_flight() {
    run(async {
        let (target, volume) = target(NbdOptions::default());
        volume.hold(true);
        let (mut client, session) = connect(&target);
        client.attach().await;
        client.write(1, 0, &[7; 512]).await;
        client.request(FLUSH, 2, 0, 0).await;
        client.request(DISC, 3, 0, 0).await;
        client.request(READ, 4, 0, 512).await;
        tokio::time::sleep(A_MOMENT).await;
        volume.hold(false);
        assert_eq!(client.simple().await.0, 0);
        assert_eq!(client.simple().await.0, 0);
        assert!(client.closed().await, "nothing after DISC is answered");
        ended(session).await;
    });
}

/// The client may write again over another connection, and nothing older may undo that.
#[test]
fn a_connection_that_ends_takes_its_requests_with_it() {
    run(async {
        let (target, volume) = target(NbdOptions::default());
        volume.hold(true);
        let (mut client, session) = connect(&target);
        client.attach().await;
        client.write(1, 0, &[7; 512]).await;
        tokio::time::sleep(A_MOMENT).await;
        client.stream.shutdown().await.unwrap();
        assert!(client.closed().await, "no answer: the client is taken for gone");
        ended(session).await;
        volume.hold(false);
        tokio::time::sleep(A_MOMENT).await;
        let read = Arc::clone(&volume).read(0, 512).await.unwrap();
        assert!(pieces_equal(&read, &[0; 512]), "a write outlived its connection");
    });
}

// spec: nbd-shutdown
#[test]
fn shutdown_finishes_what_is_in_flight_and_refuses_the_rest() {
    run(async {
        let (target, volume) = target(NbdOptions::default());
        let (mut idle, idle_session) = connect(&target);
        idle.attach().await;
        let (mut haggling, haggling_session) = connect(&target);
        haggling.greet().await;
        volume.hold(true);
        let (mut busy, busy_session) = connect(&target);
        busy.attach().await;
        busy.write(1, 0, &[7; 512]).await;
        tokio::time::sleep(A_MOMENT).await;
        let stop = spawn_local({
            let target = Arc::clone(&target);
            async move { target.shutdown().await }
        });
        assert!(idle.closed().await);
        assert!(haggling.closed().await);
        busy.request(READ, 2, 0, 512).await;
        assert_eq!(busy.simple().await, (ESHUTDOWN, 2));
        assert!(!stop.is_finished());
        volume.hold(false);
        assert_eq!(busy.simple().await, (0, 1));
        assert!(busy.closed().await);
        for session in [idle_session, haggling_session, busy_session, stop] {
            ended(session).await;
        }
        let (mut late, late_session) = connect(&target);
        assert!(late.closed().await);
        ended(late_session).await;
    });
}

// spec: nbd-shutdown
#[test]
fn shutdown_does_not_wait_for_a_client_that_takes_no_replies() {
    run(async {
        let shutdown_timeout = 2 * A_MOMENT;
        let (target, _volume) = target(NbdOptions { shutdown_timeout, ..NbdOptions::default() });
        let (mut deaf, session) = connect(&target);
        deaf.attach().await;
        deaf.request(READ, 1, 0, 16 << 20).await;
        tokio::time::sleep(A_MOMENT).await;
        timeout(PATIENCE, target.shutdown()).await.expect("shutdown hangs");
        ended(session).await;
    });
}

// spec: nbd-shutdown
#[test]
fn a_deleted_volume_ends_its_sessions() {
    run(async {
        let (target, volume) = target(NbdOptions::default());
        let (mut asking, asking_session) = connect(&target);
        asking.attach().await;
        let (mut idle, idle_session) = connect(&target);
        idle.attach().await;
        volume.close();
        asking.request(READ, 1, 0, 512).await;
        assert_eq!(asking.simple().await, (ESHUTDOWN, 1));
        assert!(asking.closed().await);
        target.sweep();
        assert!(idle.closed().await);
        ended(asking_session).await;
        ended(idle_session).await;
    });
}

// spec: nbd-request-magic
#[test]
fn broken_framing_drops_the_connection() {
    run(async {
        let (target, _volume) = target(NbdOptions::default());
        let (mut client, session) = connect(&target);
        client.attach().await;
        client.request(READ, 1, 0, 512).await;
        assert_eq!(client.simple().await, (0, 1));
        client.receive(512).await;
        client.stream.write_all(&[0xee; 28]).await.unwrap();
        assert!(client.closed().await);
        ended(session).await;
    });
}

// spec: nbd-deadline
#[test]
fn a_slow_handshake_is_cut_off() {
    run(async {
        let handshake_timeout = 2 * A_MOMENT;
        let (target, _volume) = target(NbdOptions { handshake_timeout, ..NbdOptions::default() });
        let (mut client, session) = connect(&target);
        client.greet().await;
        assert!(client.closed().await);
        ended(session).await;
        assert_eq!(target.counters().handshakes_failed.load(Ordering::Relaxed), 1);
        let (mut client, session) = connect(&target);
        client.attach().await;
        tokio::time::sleep(2 * handshake_timeout).await;
        client.request(READ, 1, 0, 512).await;
        assert_eq!(client.simple().await, (0, 1), "the deadline ends with the handshake");
        drop(client);
        ended(session).await;
    });
}

/// As of those that list many exports and ask about each.
#[test]
fn a_client_that_asks_much_gets_the_time_for_it() {
    run(async {
        let handshake_timeout = 4 * A_MOMENT;
        let (target, _volume) = target(NbdOptions { handshake_timeout, ..NbdOptions::default() });
        let (mut client, session) = connect(&target);
        client.greet().await;
        for _ in 0..8 {
            tokio::time::sleep(A_MOMENT).await;
            client.send_option(99, &[]).await;
            assert_eq!(client.reply().await, 0x8000_0001, "unsupported");
        }
        client.go().await;
        drop(client);
        ended(session).await;
    });
}

// spec: nbd-limits
#[test]
fn connections_above_the_limits_are_turned_away() {
    run(async {
        let options = NbdOptions { connections_max: 3, handshakes_max: 2, ..NbdOptions::default() };
        let (target, _volume) = target(options);
        let (mut first, first_session) = connect(&target);
        first.greet().await;
        let (mut second, _) = connect(&target);
        second.greet().await;
        let (mut third, _) = connect(&target);
        third.greet().await;
        assert!(first.closed().await, "two in the handshake: the oldest gives way");
        ended(first_session).await;
        second.go().await;
        third.go().await;
        let (mut first, _) = connect(&target);
        first.attach().await;
        let (mut fourth, fourth_session) = connect(&target);
        assert!(fourth.closed().await, "three open");
        ended(fourth_session).await;
        assert_eq!(target.counters().connections_refused.load(Ordering::Relaxed), 1);
        assert_eq!(target.counters().connections_open.load(Ordering::Relaxed), 3);
    });
}

#[test]
fn tcp_clients_may_send_byte_by_byte() {
    run(async {
        let (target, _volume) = target(NbdOptions::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let session = spawn_local(target.serve(listener.accept().await.unwrap().0));
        let mut client = Client { stream };
        client.greet().await;
        let mut bytes = option_bytes(7, &[0, 0, 0, 1, b'v', 0, 0]);
        bytes.extend(request_bytes(READ, 1, 0, 512));
        for byte in bytes {
            client.stream.write_all(&[byte]).await.unwrap();
        }
        while client.reply().await != 1 {}
        assert_eq!(client.simple().await, (0, 1));
        drop(client);
        ended(session).await;
    });
}

#[test]
fn the_nbd_crate_attaches_reads_and_writes() {
    run(async {
        let (target, _volume) = target(NbdOptions::default());
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let session = spawn_local(target.serve(UnixStream::from_std(theirs).unwrap()));
        let client = tokio::task::spawn_blocking(move || {
            let mut stream = ours;
            let export = nbd::client::handshake(&mut stream, b"v").unwrap();
            assert_eq!(export.size, 64 << 20);
            let mut disk = nbd::client::NbdClient::new(&mut stream, &export);
            disk.seek(SeekFrom::Start(12_288)).unwrap();
            disk.write_all(&[5; 10_000]).unwrap();
            disk.seek(SeekFrom::Start(12_288)).unwrap();
            let mut back = [0; 10_001];
            disk.read_exact(&mut back).unwrap();
            assert_eq!(back[..10_000], [5; 10_000]);
            assert_eq!(back[10_000], 0);
        });
        client.await.unwrap();
        ended(session).await;
    });
}

/// Files of a CA, a server and a client, in a directory removed when dropped.
struct Pki {
    directory: PathBuf,
}

impl Pki {
    fn new(test: &str) -> Self {
        let name = format!("weft-nbd-{test}-{}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&directory).unwrap();
        let ca_key = rcgen::KeyPair::generate().unwrap();
        let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
        ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let ca_certificate = ca.self_signed(&ca_key).unwrap();
        std::fs::write(directory.join("ca.pem"), ca_certificate.pem()).unwrap();
        let issuer = rcgen::Issuer::new(ca, ca_key);
        for name in ["server", "client"] {
            let key = rcgen::KeyPair::generate().unwrap();
            let parameters = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
            let certificate = parameters.signed_by(&key, &issuer).unwrap();
            std::fs::write(directory.join(format!("{name}.pem")), certificate.pem()).unwrap();
            std::fs::write(directory.join(format!("{name}.key")), key.serialize_pem()).unwrap();
        }
        Self { directory }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn options(&self, tls_mode: TlsMode, verify_clients: bool) -> NbdOptions {
        let files = TlsFiles {
            certificate: self.file("server.pem"),
            key: self.file("server.key"),
            client_ca: verify_clients.then(|| self.file("ca.pem")),
        };
        let tls = Some(watch::channel(Tls::Certificates(tls::load(&files).unwrap())).1);
        NbdOptions { tls_mode, tls, ..NbdOptions::default() }
    }

    fn connector(&self, with_certificate: bool) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.file("ca.pem")).unwrap()).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let config = if with_certificate {
            let chain = vec![CertificateDer::from_pem_file(self.file("client.pem")).unwrap()];
            let key = PrivateKeyDer::from_pem_file(self.file("client.key")).unwrap();
            builder.with_client_auth_cert(chain, key).unwrap()
        } else {
            builder.with_no_client_auth()
        };
        TlsConnector::from(Arc::new(config))
    }
}

impl Drop for Pki {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

// spec: nbd-tls-session
#[test]
fn sessions_run_inside_tls() {
    run(async {
        let pki = Pki::new("session");
        for (mode, verify) in [(TlsMode::Optional, false), (TlsMode::Required, true)] {
            let (target, _volume) = target(pki.options(mode, verify));
            let (mut client, session) = connect_tcp(&target).await;
            client.greet().await;
            client.send_option(5, &[]).await;
            assert_eq!(client.reply().await, 1);
            let name = "localhost".try_into().unwrap();
            let stream = pki.connector(verify).connect(name, client.stream).await.unwrap();
            let mut client = Client { stream };
            client.go().await;
            let data: Vec<u8> = (0..3_000_000_u32).map(|i| i.to_le_bytes()[1]).collect();
            client.write(1, 512, &data).await;
            assert_eq!(client.simple().await, (0, 1));
            for cookie in 0..20 {
                client.request(READ, cookie, 512, 3_000_000).await;
            }
            for cookie in 0..20 {
                assert_eq!(client.simple().await, (0, cookie));
                assert!(client.receive(3_000_000).await == data);
            }
            client.request(DISC, 0, 0, 0).await;
            assert!(client.closed().await);
            ended(session).await;
        }
    });
}

/// A client of TLS that has a key.
#[derive(Clone)]
struct Keyed {
    name: &'static str,
    key: [u8; 32],
}

impl Builder for Keyed {
    type Output = Connection;

    fn build_connection(&self, mode: Mode) -> Result<Connection, s2n_tls::error::Error> {
        let mut config = s2n_tls::config::Builder::new();
        config.set_security_policy(&Policy::from_version("default_tls13")?)?;
        let mut connection = config.build()?.build_connection(mode)?;
        let mut psk = s2n_tls::psk::Psk::builder()?;
        psk.set_identity(self.name.as_bytes())?.set_secret(&self.key)?.set_hmac(PskHmac::SHA256)?;
        connection.append_psk(&psk.build()?)?;
        Ok(connection)
    }
}

// spec: nbd-tls-psk
#[test]
fn clients_prove_themselves_by_key() {
    let path = std::env::temp_dir().join(format!("weft-nbd-psk-{}", std::process::id()));
    std::fs::write(&path, format!("alice:{}\n", "5a".repeat(32))).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let keys = Tls::with_keys(named_keys::load(&path).unwrap());
    std::fs::remove_file(&path).unwrap();
    run(async {
        let tls = Some(watch::channel(keys).1);
        let options = NbdOptions { tls_mode: TlsMode::Required, tls, ..NbdOptions::default() };
        let (target, _volume) = target(options);
        for (name, key, let_in) in
            [("alice", [0x5a; 32], true), ("alice", [0x5b; 32], false), ("bob", [0x5a; 32], false)]
        {
            let (mut client, session) = connect_tcp(&target).await;
            client.greet().await;
            client.send_option(5, &[]).await;
            assert_eq!(client.reply().await, 1);
            let connector = s2n_tls_tokio::TlsConnector::new(Keyed { name, key });
            let connected = connector.connect("localhost", client.stream).await;
            assert_eq!(connected.is_ok(), let_in, "{name}");
            if let Ok(stream) = connected {
                let mut client = Client { stream };
                client.go().await;
                client.write(1, 512, &[7; 1024]).await;
                assert_eq!(client.simple().await, (0, 1));
                client.request(DISC, 0, 0, 0).await;
                assert!(client.closed().await);
            }
            ended(session).await;
        }
        assert_eq!(target.counters().handshakes_failed.load(Ordering::Relaxed), 2);
    });
}

// spec: nbd-tls-injection
#[test]
fn plain_text_after_starttls_drops() {
    run(async {
        let pki = Pki::new("injection");
        let (target, _volume) = target(pki.options(TlsMode::Optional, false));
        let (mut client, session) = connect_tcp(&target).await;
        client.greet().await;
        let injected = [option_bytes(5, &[]), option_bytes(8, &[])].concat();
        client.stream.write_all(&injected).await.unwrap();
        let _ = client.receive(20).await;
        assert!(client.closed().await);
        ended(session).await;
    });
}

// spec: nbd-tls-client-certificate
#[test]
fn clients_without_a_certificate_are_refused_when_one_is_asked_for() {
    run(async {
        let pki = Pki::new("client");
        let (target, _volume) = target(pki.options(TlsMode::Required, true));
        let (mut client, session) = connect_tcp(&target).await;
        client.greet().await;
        client.send_option(5, &[]).await;
        assert_eq!(client.reply().await, 1);
        let name = "localhost".try_into().unwrap();
        // With TLS 1.3 the client learns of the refusal only when it reads.
        if let Ok(stream) = pki.connector(false).connect(name, client.stream).await {
            assert!(Client { stream }.closed().await);
        }
        ended(session).await;
        assert_eq!(target.counters().handshakes_failed.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn unix_sockets_are_plain_whatever_tcp_requires() {
    run(async {
        let pki = Pki::new("unix");
        let (target, _volume) = target(pki.options(TlsMode::Required, true));
        let (mut client, session) = connect(&target);
        client.attach().await;
        client.request(DISC, 0, 0, 0).await;
        assert!(client.closed().await);
        ended(session).await;
    });
}

#[test]
fn bad_tls_files_are_named() {
    let pki = Pki::new("files");
    let good = TlsFiles {
        certificate: pki.file("server.pem"),
        key: pki.file("server.key"),
        ..TlsFiles::default()
    };
    let fails = |files: &TlsFiles| tls::load(files).err().expect("refused");
    let error = fails(&TlsFiles { key: pki.file("absent.key"), ..good.clone() });
    assert!(error.chain().contains("absent.key"), "{}", error.chain());
    let error = fails(&TlsFiles { key: pki.file("client.key"), ..good.clone() });
    assert!(error.chain().contains("server.pem"), "{}", error.chain());
    let error = fails(&TlsFiles { certificate: pki.file("server.key"), ..good });
    assert!(error.chain().contains("no certificate"), "{}", error.chain());
}

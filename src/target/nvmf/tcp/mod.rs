//! The TCP transport: one connection is one queue. (NVMe/TCP Transport 1.0)
//!
//! [`NvmeTcpTarget`] is shared by all data-plane threads; whoever accepts a connection runs
//! [`NvmeTcpTarget::serve`] on it with `spawn_local`, and it stays on that thread.
//!
//! | file | owns |
//! |---|---|
//! | [`wire`] | PDUs: bytes to types and back |
//! | [`framing`], [`outbox`] | commands in, answers out, without I/O |
//! | [`connection`] | the loop that joins them with a queue and a socket |
//! | [`channel`], [`mod@identity`] | TLS: whether a connection is encrypted, and by whose key |

use std::future::pending;
use std::future::poll_fn;
use std::io;
use std::net::Ipv4Addr;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time;
use weft_api::FrontEnd;

use crate::observe::event;
use crate::target::budget::Budget;
use crate::target::budget::Share;
use crate::target::connections::Connections;
use crate::target::connections::Identity;
use crate::target::connections::Tracked;
use crate::target::handshakes::Handshakes;
use crate::target::handshakes::Slot;
use crate::target::nvmf::controller::Life;
use crate::target::nvmf::queue::Queue;
use crate::target::nvmf::subsystem::Subsystem;
use crate::target::nvmf::tcp::channel::Channel;
use crate::target::nvmf::tcp::channel::Door;
use crate::target::nvmf::tcp::connection::Connection;
use crate::target::nvmf::tcp::connection::End;
use crate::target::nvmf::tcp::connection::Limits;
use crate::target::nvmf::transport::Path;
use crate::target::nvmf::transport::SecureNames;
use crate::target::stream::ByteStream;
use crate::target::stream::Socket;
use crate::units::bytes_usize;

pub mod channel;
pub mod connection;
pub mod framing;
pub mod identity;
pub mod outbox;
pub mod wire;

/// Time a goodbye may take before the socket is just closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// Timers of a silent host that must run out before it is given up: the first may have begun any
/// time before its last command.
const SILENT_TIMERS_MAX: u32 = 2;
/// How often to look whether a host without a keep-alive timeout has set one.
const KEEP_ALIVE_LOOK: Duration = Duration::from_secs(60);

/// What the operator decides.
#[derive(Clone, Debug)]
pub struct NvmeTcpOptions {
    /// Connections at once; further ones are closed when accepted. Each queue is one.
    pub connections_max: usize,
    /// Of these, how many may be without a connected queue.
    pub handshakes_max: usize,
    /// Time from accept to a connected queue.
    pub handshake_timeout: Duration,
    /// Time a host gets to read why it is cut off.
    pub terminate_timeout: Duration,
    /// Time hosts get to take their last answers when the node stops.
    pub shutdown_timeout: Duration,
    /// Bytes of data in flight per connection.
    pub bytes_max: u64,
    /// What all connections may have in flight together.
    pub budget: Arc<Budget>,
    /// Whether commands are timed and counted by volume; off only to measure what that costs.
    pub timed: bool,
}

impl Default for NvmeTcpOptions {
    fn default() -> Self {
        Self {
            connections_max: 1024,
            handshakes_max: 128,
            handshake_timeout: Duration::from_secs(30),
            terminate_timeout: Duration::from_secs(5),
            shutdown_timeout: Duration::from_secs(5),
            bytes_max: 16 << 20,
            budget: Budget::new(256 << 20),
            timed: true,
        }
    }
}

/// What the target counts.
#[derive(Debug, Default)]
pub struct TargetCounters {
    /// Connections accepted since start.
    pub connections_total: AtomicU64,
    /// Connections open now.
    pub connections_open: AtomicU64,
    /// Connections turned away because a limit was reached.
    pub connections_refused: AtomicU64,
    /// Connections that were cut because the host broke the protocol.
    pub connections_terminated: AtomicU64,
}

/// The target.
pub struct NvmeTcpTarget {
    subsystem: Arc<Subsystem>,
    options: NvmeTcpOptions,
    counters: TargetCounters,
    connections: Connections,
    door: Door,
    handshakes: Arc<Handshakes>,
    stopping: watch::Sender<bool>,
}

/// One more of something open, until dropped.
struct Open<'a>(&'a AtomicU64);

impl<'a> Open<'a> {
    fn new(counter: &'a AtomicU64) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(counter)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl NvmeTcpTarget {
    /// A target for this subsystem.
    #[must_use]
    pub fn new(subsystem: Arc<Subsystem>, options: NvmeTcpOptions) -> Self {
        Self {
            door: Door::new(&subsystem),
            subsystem,
            handshakes: Handshakes::new(options.handshakes_max),
            options,
            counters: TargetCounters::default(),
            connections: Connections::default(),
            stopping: watch::Sender::default(),
        }
    }

    /// What it counts.
    #[must_use]
    pub fn counters(&self) -> &TargetCounters {
        &self.counters
    }

    /// Its connections.
    #[must_use]
    pub fn connections(&self) -> &Connections {
        &self.connections
    }

    /// What it serves.
    #[must_use]
    pub fn subsystem(&self) -> &Subsystem {
        &self.subsystem
    }

    /// Stops serving: commands in flight are finished and answered, then connections close. Hosts
    /// connect again when they can. Completes when the last has ended, or soon after
    /// [`NvmeTcpOptions::shutdown_timeout`].
    pub async fn shutdown(&self) {
        self.stopping.send_replace(true);
        // Every connection holds a receiver until it has ended.
        self.stopping.closed().await;
    }

    /// Serves one connection to its end. Run it with `spawn_local` on the thread that accepted it.
    ///
    /// # Cancellation
    /// Dropping it drops the connection and the commands in flight; writes are then wholly done or
    /// wholly undone.
    pub async fn serve(self: Arc<Self>, socket: impl Into<Socket>) {
        let stopping = self.stopping.subscribe();
        let _open = Open::new(&self.counters.connections_open);
        self.counters.connections_total.fetch_add(1, Ordering::Relaxed);
        let open_now = self.counters.connections_open.load(Ordering::Relaxed);
        if *stopping.borrow() {
            return;
        }
        if bytes_usize(open_now) > self.options.connections_max {
            self.counters.connections_refused.fetch_add(1, Ordering::Relaxed);
            event::raise(event::CONNECTIONS_REFUSED, "nvme-tcp", "too many are open");
            return;
        }
        self.serve_socket(socket.into(), stopping).await;
    }

    async fn serve_socket(&self, socket: Socket, mut stopping: watch::Receiver<bool>) {
        let tracked = self.connections.track(FrontEnd::NvmeTcp, socket.peer());
        let path = path(&socket);
        let mut slot = self.handshakes.begin();
        let until = time::Instant::now() + self.options.handshake_timeout;
        let channel = tokio::select! {
            biased;
            channel = self.door.open(socket, &path) => channel,
            _ = stopping.wait_for(|stopping| *stopping) => None,
            () = slot.evicted() => None,
            () = time::sleep_until(until) => None,
        };
        let arrived = Arrived { path, tracked, slot, until };
        match channel {
            None => {}
            Some(Channel::Plain(socket)) => {
                self.serve_stream(socket, None, arrived, stopping).await;
            }
            Some(Channel::Secure(stream, names)) => {
                arrived.tracked.encrypted();
                // Boxed, so that plain connections do not carry its size.
                Box::pin(self.serve_stream(stream, Some(names), arrived, stopping)).await;
            }
        }
    }

    async fn serve_stream<S: ByteStream>(
        &self,
        stream: S,
        secured: Option<SecureNames>,
        arrived: Arrived<'_>,
        mut stopping: watch::Receiver<bool>,
    ) {
        let Arrived { path, tracked, slot, until } = arrived;
        let mut queue = Queue::new(Arc::clone(&self.subsystem), path, self.options.timed);
        queue.set_secured(secured);
        let limits = Limits { bytes_max: self.options.bytes_max };
        let counts = Arc::clone(tracked.counts());
        let share = Share::new(Arc::clone(&self.options.budget));
        let mut connection = Connection::new(stream, queue, limits, share, counts);
        let connected = self.until_connected(&mut connection, &mut stopping, slot, until);
        let end = match connected.await {
            Err(end) => end,
            Ok(slot) => {
                tracked.identify(identity(connection.queue()));
                self.until_end(&mut connection, &mut stopping, slot).await
            }
        };
        if matches!(end, End::Stalled) {
            let message = "its NVMe/TCP connection is cut off, which held memory that others waited for, and did not move it";
            event::raise(event::HOST_STALLED, tracked.peer(), message);
        }
        self.say_goodbye(&mut connection, &end).await;
    }

    /// Ends a connection as it is fit.
    async fn say_goodbye<S: ByteStream>(&self, connection: &mut Connection<S>, end: &End) {
        match end {
            End::Clean => {
                // A host that does not wait for the goodbye loses nothing.
                let goodbye = poll_fn(|cx| connection.poll_close(cx));
                let _ = time::timeout(CLOSE_TIMEOUT, goodbye).await;
            }
            End::HostTerminated(status) => {
                tracing::info!(status, "NVMe host terminated the connection");
            }
            End::Broken(fatal) => {
                self.counters.connections_terminated.fetch_add(1, Ordering::Relaxed);
                tracing::info!(reason = fatal.reason, status = ?fatal.status, "NVMe host dropped");
                let told = connection.terminate(fatal);
                let _ = time::timeout(self.options.terminate_timeout, told).await;
            }
            End::Stalled => {}
            End::Io(error) => tracing::debug!(%error, "NVMe connection lost"),
        }
    }

    /// Serves until a queue is connected, or to an earlier end. Its slot among handshakes is its own
    /// until it is also granted.
    async fn until_connected<S: ByteStream>(
        &self,
        connection: &mut Connection<S>,
        stopping: &mut watch::Receiver<bool>,
        mut slot: Slot,
        until: time::Instant,
    ) -> Result<Slot, End> {
        let connected = poll_fn(|cx| match connection.poll_serve(cx) {
            Poll::Ready(end) => Poll::Ready(Some(end)),
            Poll::Pending if connection.queue().controller().is_some() => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        });
        tokio::select! {
            biased;
            ended = connected => ended.map_or(Ok(slot), Err),
            _ = stopping.wait_for(|stopping| *stopping) => Err(End::Clean),
            () = slot.evicted() => Err(End::Clean),
            () = time::sleep_until(until) => Err(timed_out()),
        }
    }

    /// Serves a connected queue, while watching for the end of the controller or of the node, for
    /// changed namespaces, for a host that has fallen silent, and for one that does not authenticate.
    async fn until_end<S: ByteStream>(
        &self,
        connection: &mut Connection<S>,
        stopping: &mut watch::Receiver<bool>,
        slot: Slot,
    ) -> End {
        let mut proof = Proof { slot: Some(slot), until: None };
        let controller = Arc::clone(connection.queue().controller().expect("just connected"));
        let is_admin = connection.queue().is_admin();
        let mut life = controller.life();
        let resets_before = life.borrow().resets;
        let mut changes = self.subsystem.changes();
        let mut silent_timers = 0;
        let mut look_at = time::Instant::now() + look_after(controller.silence_max());
        let mut deadline = None;
        loop {
            let Life { ended, resets, .. } = *life.borrow_and_update();
            if !is_admin && resets != resets_before {
                return End::Clean;
            }
            let node_stops = *stopping.borrow_and_update();
            if node_stops && deadline.is_none() {
                connection.stop();
                deadline = Some(time::Instant::now() + self.options.shutdown_timeout);
            }
            // A stopping node closes admin queues too, and still answers what is in flight.
            if ended && !node_stops {
                return End::Clean;
            }
            if is_admin {
                connection.send_events();
            }
            let granted = connection.queue().granted();
            proof.look(granted, self.options.handshake_timeout);
            let served = poll_fn(|cx| match connection.poll_serve(cx) {
                Poll::Ready(end) => Poll::Ready(Some(end)),
                Poll::Pending if connection.queue().granted() != granted => Poll::Ready(None),
                Poll::Pending => Poll::Pending,
            });
            tokio::select! {
                biased;
                end = served => if let Some(end) = end { return end },
                end = proof.missed() => return end,
                // The senders live in the controller and in `self`, so these end by changes only.
                _ = life.changed() => {}
                _ = stopping.changed(), if deadline.is_none() => {}
                () = changed(&mut changes), if is_admin => {}
                () = time::sleep_until(look_at), if is_admin && deadline.is_none() => {
                    let silence_max = controller.silence_max();
                    let silent = silence_max.is_some() && !controller.take_active();
                    silent_timers = if silent { silent_timers + 1 } else { 0 };
                    if silent_timers >= SILENT_TIMERS_MAX {
                        let host = &controller.identity().host_nqn;
                        let message = format_args!(
                            "controller {} has heard nothing from it and is given up",
                            controller.id()
                        );
                        event::raise(event::HOST_SILENT, host, message);
                        controller.expire();
                    }
                    look_at = time::Instant::now() + look_after(silence_max);
                }
                () = time::sleep_until(deadline.unwrap_or_else(time::Instant::now)),
                    if deadline.is_some() => return timed_out(),
            }
        }
    }
}

/// A connection that has been taken, and is not connected to a queue yet.
struct Arrived<'a> {
    path: Path,
    tracked: Tracked<'a>,
    slot: Slot,
    /// When it must be.
    until: time::Instant,
}

/// What a connected host still owes: that it authenticates, in time and while there is a slot.
struct Proof {
    /// Until it is granted for the first time.
    slot: Option<Slot>,
    /// When it must be granted; `None` while it is.
    until: Option<time::Instant>,
}

impl Proof {
    /// Takes note of whether the queue is granted now.
    fn look(&mut self, granted: bool, timeout: Duration) {
        if granted {
            *self = Self { slot: None, until: None };
        } else {
            self.until.get_or_insert_with(|| time::Instant::now() + timeout);
        }
    }

    /// Completes when the host is to be cut off; never while it is granted.
    async fn missed(&mut self) -> End {
        let evicted = async {
            match &mut self.slot {
                Some(slot) => slot.evicted().await,
                None => pending().await,
            }
        };
        let too_late = async {
            match self.until {
                Some(until) => time::sleep_until(until).await,
                None => pending().await,
            }
        };
        tokio::select! {
            biased;
            () = evicted => End::Clean,
            () = too_late => timed_out(),
        }
    }
}

fn timed_out() -> End {
    End::Io(io::ErrorKind::TimedOut.into())
}

/// Who has connected the queue.
fn identity(queue: &Queue) -> Identity {
    Identity {
        host: queue.controller().map(|controller| controller.identity().host_nqn.clone()),
        controller: queue.controller().map(|controller| controller.id()),
        queue: Some(queue.id()),
        volume: None,
    }
}

fn look_after(silence_max: Option<Duration>) -> Duration {
    silence_max.unwrap_or(KEEP_ALIVE_LOOK)
}

/// Completes when the volumes changed; never, once nothing changes any more.
async fn changed(changes: &mut watch::Receiver<u64>) {
    if changes.changed().await.is_err() {
        pending::<()>().await;
    }
}

/// Both ends. Unix sockets, which only tests use, are taken for loopback; a TCP host whose address
/// cannot be told is taken for remote.
fn path(socket: &Socket) -> Path {
    let here = SocketAddr::from((Ipv4Addr::LOCALHOST, 4420));
    match socket {
        Socket::Tcp(stream) => Path {
            portal: stream.local_addr().unwrap_or(here),
            host: stream.peer_addr().map_or(Ipv4Addr::UNSPECIFIED.into(), |peer| peer.ip()),
        },
        Socket::Unix(_) => Path { portal: here, host: here.ip() },
    }
}

//! The NBD target: volumes as exports, over TCP, Unix sockets and TLS.
//!
//! [`NbdTarget`] is shared by all data-plane threads; whoever accepts a connection runs
//! [`NbdTarget::serve`] on it with `spawn_local`, and it stays on that thread.
//!
//! | file | owns |
//! |---|---|
//! | [`options`], [`wire`] | bytes to types and back: handshake, transmission |
//! | [`handshake`] | the handshake, without I/O |
//! | [`framing`], [`session`], [`outbox`] | requests in, replies out, without I/O |
//! | [`connection`] | the loop that joins them with a socket |
//! | [`crate::target::stream`], [`tls`] | sockets and TLS |
//! | [`status`] | our errors as NBD's |
//!
//! Protocol: NetworkBlockDevice/nbd `doc/proto.md` of 2026-05, fixed newstyle, with the
//! EXTENDED_HEADERS branch. What of it is met, by which test: `docs/spec/nbd.toml`.

use std::future::Future;
use std::future::poll_fn;
use std::io;
use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::TryFutureExt;
use tokio::sync::watch;
use tokio::time;
use weft_api::FrontEnd;

use crate::observe::event;
use crate::target::budget::Budget;
use crate::target::budget::Share;
use crate::target::connections::Connections;
use crate::target::connections::Counts;
use crate::target::connections::Identity;
use crate::target::connections::Tracked;
use crate::target::handshakes::Handshakes;
use crate::target::handshakes::Slot;
use crate::target::nbd::connection::Connection;
use crate::target::nbd::connection::End;
use crate::target::nbd::connection::Limits;
use crate::target::nbd::counters::Open;
use crate::target::nbd::counters::TargetCounters;
use crate::target::nbd::framing::Framing;
use crate::target::nbd::handshake::Handshake;
use crate::target::nbd::handshake::Negotiated;
use crate::target::nbd::handshake::OPTION_DATA_BYTES_MAX;
use crate::target::nbd::handshake::Step;
use crate::target::nbd::handshake::TlsMode;
use crate::target::nbd::options::OPTION_HEADER_BYTES;
use crate::target::nbd::session::Session;
use crate::target::nbd::tls::Tls;
use crate::target::stream::ByteStream;
use crate::target::stream::Socket;
use crate::units::bytes_usize;
use crate::volume::VolumeDirectory;

pub mod connection;
pub mod counters;
pub mod framing;
pub mod handshake;
pub mod options;
pub mod outbox;
pub mod session;
pub mod status;
pub mod tls;
pub mod wire;

/// Time a goodbye may take before the socket is just closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// Time that each option adds to the handshake's: libnbd asks about each of all exports, and its
/// questions come in two segments, of which TCP delays the second by 0.2 s.
const OPTION_TIME: Duration = Duration::from_millis(500);
/// Answers of the handshake that gather before they are sent.
const ANSWERS_BYTES_MAX: usize = 64 * 1024;
/// What the handshake asks of the stream at once.
const RECEIVE_BYTES: usize = 4096;
/// What the handshake may have received and not used: the largest option, whole.
const RECEIVED_BYTES_MAX: usize = OPTION_HEADER_BYTES + OPTION_DATA_BYTES_MAX as usize;

/// What the operator decides.
#[derive(Clone)]
pub struct NbdOptions {
    /// Connections at once; further ones are closed when accepted.
    pub connections_max: usize,
    /// Of these, how many may be in the handshake; if more come, the oldest is dropped.
    pub handshakes_max: usize,
    /// Time from accept to the choice of an export, besides `OPTION_TIME` for each option.
    pub handshake_timeout: Duration,
    /// Time clients get to take their last replies when the node stops.
    pub shutdown_timeout: Duration,
    /// Requests in flight per connection; at least 128 for the queue of one Linux client.
    pub requests_max: usize,
    /// Bytes of payload and reply in flight per connection.
    pub bytes_max: u64,
    /// What all connections may have in flight together.
    pub budget: Arc<Budget>,
    /// Whether clients may list the exports.
    pub listable: bool,
    /// Whether TCP connections are encrypted; anything but `Off` needs `tls`. Unix sockets never
    /// are.
    pub tls_mode: TlsMode,
    /// Looked at for each connection, so that certificates and keys can change.
    pub tls: Option<watch::Receiver<Tls>>,
    /// Whether requests are timed and counted by volume; off only to measure what that costs.
    pub timed: bool,
}

impl Default for NbdOptions {
    fn default() -> Self {
        Self {
            connections_max: 256,
            handshakes_max: 64,
            handshake_timeout: Duration::from_secs(30),
            shutdown_timeout: Duration::from_secs(5),
            requests_max: 512,
            bytes_max: 64 << 20,
            budget: Budget::new(256 << 20),
            listable: true,
            tls_mode: TlsMode::Off,
            tls: None,
            timed: true,
        }
    }
}

/// What sessions watch for.
#[derive(Clone, Copy, Debug, Default)]
struct Signal {
    stopping: bool,
    /// Counts calls of [`NbdTarget::sweep`].
    sweeps: u64,
}

/// The target.
pub struct NbdTarget {
    directory: Arc<dyn VolumeDirectory>,
    options: NbdOptions,
    counters: TargetCounters,
    connections: Connections,
    handshakes: Arc<Handshakes>,
    signal: watch::Sender<Signal>,
}

impl NbdTarget {
    /// A target over these volumes.
    ///
    /// # Panics
    /// If TLS is asked for without certificates or keys: configuration must have refused that.
    #[must_use]
    pub fn new(directory: Arc<dyn VolumeDirectory>, options: NbdOptions) -> Self {
        assert!(
            options.tls_mode == TlsMode::Off || options.tls.is_some(),
            "TLS needs certificates or keys"
        );
        Self {
            directory,
            handshakes: Handshakes::new(options.handshakes_max),
            options,
            counters: TargetCounters::default(),
            connections: Connections::default(),
            signal: watch::Sender::default(),
        }
    }

    /// Counters of the whole target.
    #[must_use]
    pub fn counters(&self) -> &TargetCounters {
        &self.counters
    }

    /// Its connections.
    #[must_use]
    pub fn connections(&self) -> &Connections {
        &self.connections
    }

    /// The memory it shares with others.
    #[must_use]
    pub fn budget(&self) -> &Arc<Budget> {
        &self.options.budget
    }

    /// Ends sessions of volumes that are closed by now, or not for NBD any more. Call it after
    /// deleting one: sessions in use notice by themselves, idle ones do not.
    pub fn sweep(&self) {
        self.signal.send_modify(|signal| signal.sweeps += 1);
    }

    /// Stops serving: requests in flight are finished and answered, new ones get ESHUTDOWN, then
    /// connections close. Completes when the last has, or soon after
    /// [`NbdOptions::shutdown_timeout`].
    pub async fn shutdown(&self) {
        self.signal.send_modify(|signal| signal.stopping = true);
        // Every connection holds a receiver until it has ended.
        self.signal.closed().await;
    }

    /// Serves one client to its end. Run it with `spawn_local` on the thread that accepted it.
    ///
    /// # Cancellation
    /// Dropping it drops the connection and the requests in flight; writes are then wholly done or
    /// wholly undone.
    pub async fn serve(self: Arc<Self>, socket: impl Into<Socket>) {
        let signal = self.signal.subscribe();
        let _open = Open::new(&self.counters.connections_open);
        self.counters.connections_total.fetch_add(1, Ordering::Relaxed);
        let open_now = self.counters.connections_open.load(Ordering::Relaxed);
        if signal.borrow().stopping {
            return;
        }
        if bytes_usize(open_now) > self.options.connections_max {
            self.counters.connections_refused.fetch_add(1, Ordering::Relaxed);
            event::raise(event::CONNECTIONS_REFUSED, "nbd", "too many are open");
            return;
        }
        self.serve_socket(socket.into(), signal).await;
    }

    /// The life of a connection: handshake, perhaps TLS and the handshake again, transmission.
    async fn serve_socket(&self, mut socket: Socket, signal: watch::Receiver<Signal>) {
        let tracked = self.connections.track(FrontEnd::Nbd, socket.peer());
        let mut haggling = Haggling {
            slot: self.handshakes.begin(),
            deadline: time::Instant::now() + self.options.handshake_timeout,
            signal,
            received: Vec::new(),
            out: Vec::new(),
        };
        let mut handshake = Handshake::new(
            Arc::clone(&self.directory),
            self.tls_mode(&socket),
            self.options.listable,
            &mut haggling.out,
        );
        match haggling.run(&mut socket, &mut handshake).await {
            Ok(Haggled::Agreed(negotiated)) => {
                self.transmit(socket, haggling, negotiated, &tracked).await;
            }
            Ok(Haggled::StartTls) => {
                let tls = self.options.tls.as_ref().expect("checked when the target was made");
                let tls = tls.borrow().clone();
                match tls {
                    Tls::Certificates(acceptor) => {
                        let accepted = acceptor.accept(socket).map_err(|error| error.to_string());
                        self.serve_secured(accepted, handshake, haggling, &tracked).await;
                    }
                    Tls::Keys(acceptor) => {
                        let accepted = acceptor.accept(socket).map_ok(|secured| secured.stream);
                        let accepted = accepted.map_err(|refused| refused.to_string());
                        self.serve_secured(accepted, handshake, haggling, &tracked).await;
                    }
                }
            }
            Ok(Haggled::Closed) => {}
            Err(reason) => self.handshake_failed(&reason),
        }
    }

    /// A Unix socket is always plain: nobody listens in on it, and its file's mode says who may
    /// connect.
    fn tls_mode(&self, socket: &Socket) -> TlsMode {
        match socket {
            Socket::Tcp(_) => self.options.tls_mode,
            Socket::Unix(_) => TlsMode::Off,
        }
    }

    fn handshake_failed(&self, reason: &str) {
        self.counters.handshakes_failed.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(reason, "NBD handshake failed");
    }

    /// Waits for TLS, goes on with the handshake inside it, and then with transmission.
    async fn serve_secured<S: ByteStream>(
        &self,
        accepted: impl Future<Output = Result<S, String>>,
        handshake: Handshake,
        mut haggling: Haggling,
        tracked: &Tracked<'_>,
    ) {
        match haggling.secure(accepted, handshake).await {
            Ok(Some((stream, negotiated))) => {
                tracked.encrypted();
                self.transmit(stream, haggling, negotiated, tracked).await;
            }
            Ok(None) => {}
            Err(reason) => self.handshake_failed(&reason),
        }
    }

    /// The transmission phase, to its end.
    async fn transmit<S: ByteStream>(
        &self,
        stream: S,
        haggled: Haggling,
        agreed: Negotiated,
        tracked: &Tracked<'_>,
    ) {
        let Haggling { slot, mut signal, received, .. } = haggled;
        drop(slot);
        let export = agreed.volume.name();
        tracked.identify(Identity { volume: Some(export.clone()), ..Identity::default() });
        tracing::debug!(export, dialect = ?agreed.dialect, "NBD session begins");

        let limits =
            Limits { requests_max: self.options.requests_max, bytes_max: self.options.bytes_max };
        let framing = Framing::new(agreed.dialect);
        let session = Session::new(agreed, self.options.timed);
        let share = Share::new(Arc::clone(&self.options.budget));
        let mut connection = Connection::new(stream, received, framing, session, limits, share);
        let end = self.until_end(&mut connection, &mut signal, tracked.counts()).await;
        match end {
            End::Clean => {
                // A client that does not wait for the goodbye loses nothing.
                let goodbye = poll_fn(|cx| connection.poll_close(cx));
                let _ = time::timeout(CLOSE_TIMEOUT, goodbye).await;
                tracing::debug!(export, "NBD session ends");
            }
            End::Broken(reason) => tracing::info!(export, reason, "NBD client dropped"),
            End::Stalled => {
                let message = format_args!(
                    "its NBD connection to {export} is cut off, which held memory that others waited for, and did not move it"
                );
                event::raise(event::HOST_STALLED, tracked.peer(), message);
            }
            End::Io(error) => tracing::info!(export, %error, "NBD connection lost"),
        }
    }

    /// Drives the connection while watching for the end of the volume or of the node.
    async fn until_end<S: ByteStream>(
        &self,
        connection: &mut Connection<S>,
        signal: &mut watch::Receiver<Signal>,
        counts: &Counts,
    ) -> End {
        let mut deadline = None;
        loop {
            // Before waiting for a change: one may have come during the handshake.
            let stopping = signal.borrow_and_update().stopping;
            if deadline.is_none() && (stopping || connection.session().volume_gone()) {
                connection.session().end();
                deadline = Some(time::Instant::now() + self.options.shutdown_timeout);
            }
            tokio::select! {
                biased;
                end = poll_fn(|cx| {
                    let served = connection.poll_serve(cx);
                    counts.report(connection.session().take_tally(), connection.in_flight());
                    served
                }) => return end,
                // The sender lives in `self`, so this ends by a change only.
                _ = signal.changed(), if deadline.is_none() => {}
                () = time::sleep_until(deadline.unwrap_or_else(time::Instant::now)),
                    if deadline.is_some() => return End::Io(io::ErrorKind::TimedOut.into()),
            }
        }
    }
}

/// How far a handshake got on one stream.
enum Haggled {
    /// To an export.
    Agreed(Negotiated),
    /// To TLS, with no byte left over.
    StartTls,
    /// The client left in good order.
    Closed,
}

/// A handshake's buffers and limits, over plain text and TLS alike.
struct Haggling {
    slot: Slot,
    deadline: time::Instant,
    signal: watch::Receiver<Signal>,
    /// Received and not yet taken; at most [`RECEIVED_BYTES_MAX`].
    received: Vec<u8>,
    /// Answers not yet sent.
    out: Vec<u8>,
}

impl Haggling {
    /// Runs `work` until the deadline, until others need the place, or until the node stops.
    async fn limited<T>(&mut self, work: impl Future<Output = T>) -> Result<T, String> {
        tokio::select! {
            biased;
            done = work => Ok(done),
            _ = self.signal.wait_for(|signal| signal.stopping) => Err("node stops".to_owned()),
            () = self.slot.evicted() => Err("too many others came meanwhile".to_owned()),
            () = time::sleep_until(self.deadline) => Err("handshake took too long".to_owned()),
        }
    }

    /// Upgrades to TLS and haggles on; `None` if the client then left.
    async fn secure<S: ByteStream>(
        &mut self,
        accepted: impl Future<Output = Result<S, String>>,
        handshake: Handshake,
    ) -> Result<Option<(S, Negotiated)>, String> {
        let accepted = self.limited(accepted).await?;
        let mut stream = accepted.map_err(|error| format!("TLS: {error}"))?;
        match self.run(&mut stream, &mut handshake.secured()).await? {
            Haggled::Agreed(negotiated) => Ok(Some((stream, negotiated))),
            Haggled::Closed => Ok(None),
            Haggled::StartTls => unreachable!("refused inside TLS"),
        }
    }

    /// Haggles until there is an outcome; the error is for the log.
    async fn run<S: ByteStream>(
        &mut self,
        stream: &mut S,
        handshake: &mut Handshake,
    ) -> Result<Haggled, String> {
        let mut received = std::mem::take(&mut self.received);
        let mut out = std::mem::take(&mut self.out);
        loop {
            let before = handshake.options_answered();
            let haggled =
                self.limited(haggle(stream, handshake, &mut received, &mut out)).await??;
            if let Some(haggled) = haggled {
                self.received = received;
                return Ok(haggled);
            }
            let answered = handshake.options_answered() - before;
            self.deadline += OPTION_TIME * u32::try_from(answered).unwrap_or(u32::MAX);
        }
    }
}

/// Answers the options that have come and waits for more; `None` if there is no outcome yet.
async fn haggle<S: ByteStream>(
    stream: &mut S,
    handshake: &mut Handshake,
    received: &mut Vec<u8>,
    out: &mut Vec<u8>,
) -> Result<Option<Haggled>, String> {
    loop {
        let mut input = received.as_slice();
        let step = handshake.advance(&mut input, out);
        let taken = received.len() - input.len();
        received.drain(..taken);
        match step {
            // Options may come in one segment; their answers may then leave in one.
            Step::Answered if out.len() < ANSWERS_BYTES_MAX => continue,
            Step::Drop(reason) => return Err(reason.to_owned()),
            _ => send_all(stream, out).await.map_err(|error| format!("send: {error}"))?,
        }
        match step {
            Step::Answered | Step::Drop(_) => {}
            Step::Transmission(negotiated) => return Ok(Some(Haggled::Agreed(negotiated))),
            Step::Close => return Ok(Some(Haggled::Closed)),
            Step::StartTls if received.is_empty() => return Ok(Some(Haggled::StartTls)),
            Step::StartTls => return Err("plain text after STARTTLS".to_owned()),
            Step::NeedBytes => {
                let room = RECEIVED_BYTES_MAX - received.len();
                received.reserve(room.min(RECEIVE_BYTES));
                let got = poll_fn(|cx| stream.poll_receive(cx, received, room)).await;
                if got.map_err(|error| format!("receive: {error}"))? == 0 {
                    return Err("client closed the connection".to_owned());
                }
                return Ok(None);
            }
        }
    }
}

/// Sends all of `out` and empties it.
async fn send_all<S: ByteStream>(stream: &mut S, out: &mut Vec<u8>) -> io::Result<()> {
    let mut rest = out.as_slice();
    while !rest.is_empty() {
        let sent = poll_fn(|cx| stream.poll_send(cx, &[IoSlice::new(rest)])).await?;
        rest = rest.split_at_checked(sent).ok_or(io::ErrorKind::WriteZero)?.1;
        if sent == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
    }
    out.clear();
    poll_fn(|cx| stream.poll_flush(cx)).await
}

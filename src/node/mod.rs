//! The running node: the one place that constructs, wires, starts and stops everything, in order.
//!
//! ```text
//! start:  directory locked → listeners bound → pod opened on its thread (engine) →
//!         data-plane threads → API → connections accepted
//! stop:   no more connections → NBD and NVMe drained → API ended → pod closed →
//!         data-plane threads ended → directory released
//! ```
//!
//! The data-plane threads outlive the pod, because its work runs on them as well: the journal's
//! batches are written by whoever filled them, also if the host has left meanwhile.
//!
//! Listeners are bound before the pod is opened, so that an address in use is known before
//! anything is written; a host that connects early waits in the backlog. Being stopped hard at any
//! point loses nothing that was acknowledged, so a clean stop only saves the next start time.
//!
//! Threads: the caller's (management, accepting), one engine thread, N data-plane threads.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::fs::Mode;
use rustix::process::Resource;
use rustix::process::Rlimit;
use rustix::process::getrlimit;
use rustix::process::setrlimit;
use tokio::net::TcpListener;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time;
use tokio::time::Instant;
use uuid::Uuid;
use weft_api::FrontEnd;
use weft_api::FrontEndStats;

use crate::env::EnvRef;
use crate::env::LocalBoxFuture;
use crate::env::tokio_env::TokioEnv;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::mgmt::Door;
use crate::mgmt::Guard;
use crate::mgmt::Management;
use crate::mgmt::NodeFacts;
use crate::observe::event;
use crate::observe::history::History;
use crate::observe::log;
use crate::target::budget::Budget;
use crate::target::nbd::NbdOptions;
use crate::target::nbd::NbdTarget;
use crate::target::nbd::handshake::TlsMode;
use crate::target::nvmf::subsystem::Subsystem;
use crate::target::nvmf::subsystem::SubsystemOptions;
use crate::target::nvmf::tcp::NvmeTcpOptions;
use crate::target::nvmf::tcp::NvmeTcpTarget;
use crate::target::rarely::Rarely;
use crate::volume::VolumeDirectory;
use crate::volume::pod::Pod;

pub mod config;
mod credentials;
mod data_plane;
mod directory;
mod engine;
mod listeners;
mod notify;
mod pod;
mod polling;
mod recorder;
mod rehearsal;

use config::Config;
use config::LogConfig;
use config::NbdConfig;
use config::NvmeConfig;
use credentials::Credentials;
use data_plane::Accepted;
use data_plane::DataPlane;
use data_plane::Targets;
use directory::Directory;
use engine::EngineThread;
use listeners::BoundUnix;
use listeners::Listeners;
use listeners::SocketFile;
pub use notify::notify;
use recorder::Recorder;

pub use crate::mgmt::document as openapi_document;

/// Time that API requests in progress get when the node stops.
const API_STOP_TIME_MAX: Duration = Duration::from_secs(5);
/// Time that connections of hosts get altogether; the targets' own limits end well before.
const HOSTS_STOP_TIME_MAX: Duration = Duration::from_secs(30);
/// How long a killed node may take to let go of its directory. Arbitrary, but a person waits for it.
const RELEASE_TIME_MAX: Duration = Duration::from_secs(2);
/// How often to look whether it has.
const RELEASE_POLL: Duration = Duration::from_millis(20);
/// Pause after accepting failed for want of file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Starts the log, for the whole process; to be called once and first.
///
/// # Errors
/// As [`log::start`].
pub fn start_log(config: &LogConfig) -> Result<()> {
    log::start(&config.level, config.format, None)
}

/// [`start_log`] to the file `weft.log` of a node's directory, for when a console has the terminal.
/// Lines are added to what is there.
///
/// # Errors
/// As [`log::start`], or the file cannot be written.
pub fn start_log_file(config: &LogConfig, data_dir: &Path) -> Result<()> {
    let file = directory::open_log(data_dir)?;
    log::start(&config.level, config.format, Some(file))
}

/// A node that serves.
pub struct Node {
    management: Arc<Management>,
    targets: Targets,
    engine: EngineThread,
    data_plane: Arc<DataPlane>,
    acceptors: JoinSet<()>,
    nbd_files: Vec<SocketFile>,
    api: ApiServer,
    recorder: Option<Recorder>,
    /// Released last.
    directory: Arc<Directory>,
}

/// The tasks of the API and of metrics, one for each listener.
struct ApiServer {
    tasks: JoinSet<()>,
    stop: watch::Sender<bool>,
    _file: SocketFile,
}

impl Node {
    /// Starts a node; it serves when this returns.
    ///
    /// Must run within a tokio runtime, which then carries the management plane.
    ///
    /// # Errors
    /// * `Busy`: another node runs on the directory, or an address is in use.
    /// * `InvalidRequest`: the configuration contradicts the pod.
    /// * Whatever opening the pod ends in.
    pub async fn start(config: Config) -> Result<Self> {
        allow_open_files(&config);
        let directory = Arc::new(open_directory(&config.data_dir).await?);
        let credentials = Arc::new(Credentials::read(&config)?);
        let budget = Budget::new(config.in_flight_bytes);
        let nbd = nbd_options(&config.nbd, &credentials, &budget);
        let (nvme_tcp, api_tcp) = (&config.nvme_tcp, config.api_tcp.as_ref());
        let mut listeners =
            Listeners::open(&config.nbd, nvme_tcp, api_tcp, &config.metrics_listen)?;
        let api = listeners::bind_unix(&config.api_socket, Mode::RUSR | Mode::WUSR)?;

        let engine = start_engine(Arc::clone(&directory), config.clone()).await?;
        let volumes = Arc::clone(engine.pod.pod()) as Arc<dyn VolumeDirectory>;
        let pod = engine.pod.pod().status().uuid;
        let nvme_tcp = nvme_tcp_target(pod, Arc::clone(&volumes), &config, &listeners, &budget);
        let targets = Targets { nbd: Arc::new(NbdTarget::new(volumes, nbd)), nvme_tcp };
        let data_plane =
            Arc::new(DataPlane::start(config.data_plane_threads, config.polling, &targets)?);
        let history = open_history(&directory, config.history_bytes);
        let mut facts = node_facts(&directory, &targets, &data_plane, &listeners);
        facts.history = history.clone();
        facts.scrub_rate = config.scrub_rate;
        let guard = credentials.api();
        facts.reload = Arc::new(move || credentials.reload());
        let management = Management::new(engine.pod.clone(), facts);
        let api = ApiServer::start(&management, api, &mut listeners, guard)?;
        let recorded = Arc::clone(&management);

        let mut node = Self {
            management,
            targets,
            engine,
            data_plane,
            acceptors: JoinSet::new(),
            nbd_files: Vec::new(),
            api,
            recorder: history.map(|history| Recorder::start(recorded, history)),
            directory,
        };
        node.accept(listeners)?;
        let pod = node.engine.pod.pod().status();
        let message = format_args!("serving pod {}, epoch {}", pod.uuid, pod.epoch);
        event::raise(event::NODE_STARTED, "node", message);
        Ok(node)
    }

    /// What the API answers from.
    #[must_use]
    pub fn management(&self) -> &Management {
        &self.management
    }

    /// Reads certificates, keys and the API's token again.
    ///
    /// # Errors
    /// One of the files is wrong; then all stays as it was, and an event says so.
    pub async fn reload(&self) -> Result<()> {
        self.management.reload().await
    }

    /// Stops the node in order: hosts get answers to what they have asked.
    ///
    /// # Durability
    /// Everything acknowledged is durable already; after a clean stop the next start has no
    /// journal to replay.
    ///
    /// # Errors
    /// The pod could not be closed cleanly. The node has stopped nevertheless.
    pub async fn stop(mut self) -> Result<()> {
        event::raise(event::NODE_STOPPING, "node", "connections are drained");
        self.acceptors.shutdown().await;
        drop(self.nbd_files);
        let drained = async {
            tokio::join!(self.targets.nbd.shutdown(), self.targets.nvme_tcp.shutdown());
        };
        if time::timeout(HOSTS_STOP_TIME_MAX, drained).await.is_err() {
            tracing::warn!("connections of hosts did not end in time and are cut");
        }
        tracing::debug!("connections of hosts have ended");
        self.api.stop().await;
        if let Some(recorder) = self.recorder {
            recorder.stop().await;
        }
        let closed = self.engine.stop().await;
        let data_plane = Arc::into_inner(self.data_plane).expect("acceptors have ended");
        data_plane.stop().await;
        drop(self.directory);
        closed
    }

    /// Starts a task for each listener.
    fn accept(&mut self, listeners: Listeners) -> Result<()> {
        let failed = |error| Error::new(ErrorKind::Unsupported, "accept connections").source(error);
        let mut polled = Vec::new();
        for listener in listeners.tcp {
            polled.push(Listener::Tcp(TcpListener::from_std(listener).map_err(failed)?));
        }
        for listener in listeners.nvme {
            polled.push(Listener::NvmeTcp(TcpListener::from_std(listener).map_err(failed)?));
        }
        for BoundUnix { listener, file } in listeners.unix {
            polled.push(Listener::Unix(UnixListener::from_std(listener).map_err(failed)?));
            self.nbd_files.push(file);
        }
        for listener in polled {
            self.acceptors.spawn(listener.accept_all(Arc::clone(&self.data_plane)));
        }
        Ok(())
    }
}

/// A listener in this runtime's reactor.
enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
    NvmeTcp(TcpListener),
}

impl Listener {
    async fn accept(&self) -> io::Result<Accepted> {
        Ok(match self {
            Self::Tcp(listener) => Accepted::NbdTcp(listener.accept().await?.0.into_std()?),
            Self::Unix(listener) => Accepted::NbdUnix(listener.accept().await?.0.into_std()?),
            Self::NvmeTcp(listener) => Accepted::NvmeTcp(listener.accept().await?.0.into_std()?),
        })
    }

    /// For people.
    fn name(&self) -> &'static str {
        match self {
            Self::Tcp(_) => "NBD over TCP",
            Self::Unix(_) => "NBD over a Unix socket",
            Self::NvmeTcp(_) => "NVMe/TCP",
        }
    }

    /// Hands over each connection, for as long as the task lives.
    async fn accept_all(self, data_plane: Arc<DataPlane>) {
        let mut told = Rarely::default();
        loop {
            match self.accept().await {
                Ok(connection) => data_plane.hand_over(connection).await,
                // The client left while it waited.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    if told.due(Instant::now()) {
                        let listener = self.name();
                        tracing::warn!(%error, listener, "connections cannot be accepted");
                    }
                    time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

impl ApiServer {
    /// Serves the Unix socket, with a guard the TCP listeners, and those of metrics.
    fn start(
        management: &Arc<Management>,
        unix: BoundUnix,
        listeners: &mut Listeners,
        guard: Option<watch::Receiver<Guard>>,
    ) -> Result<Self> {
        let failed = |error| Error::new(ErrorKind::Unsupported, "serve the API").source(error);
        let BoundUnix { listener, file } = unix;
        let mut doors = vec![Door::Unix(UnixListener::from_std(listener).map_err(failed)?)];
        if let Some(guard) = guard {
            for listener in std::mem::take(&mut listeners.api) {
                let listener = TcpListener::from_std(listener).map_err(failed)?;
                doors.push(Door::Tls { listener, guard: guard.clone() });
            }
        }
        for listener in std::mem::take(&mut listeners.metrics) {
            doors.push(Door::Metrics(TcpListener::from_std(listener).map_err(failed)?));
        }
        let (stop, _) = watch::channel(false);
        let mut tasks = JoinSet::new();
        for door in doors {
            tasks.spawn(Arc::clone(management).serve(door, stop.subscribe()));
        }
        Ok(Self { tasks, stop, _file: file })
    }

    async fn stop(mut self) {
        self.stop.send_replace(true);
        let ended = async {
            while let Some(ended) = self.tasks.join_next().await {
                if let Err(error) = ended {
                    tracing::warn!(%error, "a task of the API failed");
                }
            }
        };
        if time::timeout(API_STOP_TIME_MAX, ended).await.is_err() {
            tracing::warn!("API requests did not end in time and are cut");
        }
    }
}

/// The recorder's store. A node without one serves as well.
fn open_history(directory: &Directory, bytes_max: u64) -> Option<Arc<History>> {
    if bytes_max == 0 {
        return None;
    }
    match History::open(&directory.path().join("history.redb"), bytes_max) {
        Ok(history) => Some(Arc::new(history)),
        Err(error) => {
            event::raise(event::HISTORY_FAILED, "history", error.chain());
            None
        }
    }
}

/// Takes the directory, waiting a little for another holder to let go: a node that was killed a
/// moment ago keeps its locks until the kernel has taken it apart.
async fn open_directory(path: &Path) -> Result<Directory> {
    let deadline = Instant::now() + RELEASE_TIME_MAX;
    loop {
        match Directory::open(path) {
            Err(error) if error.kind() == ErrorKind::Busy && Instant::now() < deadline => {
                time::sleep(RELEASE_POLL).await;
            }
            result => return result,
        }
    }
}

/// Takes as many file descriptors as the system lets us have without asking: each connection needs
/// one, and the usual soft limit is meant for programs that use select(2).
fn allow_open_files(config: &Config) {
    let limit = getrlimit(Resource::Nofile);
    let needed = config.open_files_max(config.pod.devices.len());
    if let Some(maximum) = limit.maximum.filter(|maximum| *maximum < needed) {
        tracing::warn!(
            "{maximum} files may be open, and {needed} are with as many connections as may be: hosts \
             that come too many keep out others and `weft status`; LimitNOFILE={needed} in the \
             unit's [Service], or `ulimit -Hn {needed}`, or lower connections_max"
        );
    }
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, limit = ?limit.current, "limit of open files not raised");
    }
}

async fn start_engine(directory: Arc<Directory>, config: Config) -> Result<EngineThread> {
    let open = move || -> LocalBoxFuture<Result<Arc<Pod>>> {
        let env: EnvRef = TokioEnv::new();
        Box::pin(pod::open_or_create(env, directory, config))
    };
    EngineThread::start(open).await
}

fn nbd_options(config: &NbdConfig, credentials: &Credentials, budget: &Arc<Budget>) -> NbdOptions {
    NbdOptions {
        budget: Arc::clone(budget),
        connections_max: config.connections_max,
        tls_mode: match &config.tls {
            None => TlsMode::Off,
            Some(tls) if tls.required => TlsMode::Required,
            Some(_) => TlsMode::Optional,
        },
        tls: credentials.nbd(),
        ..NbdOptions::default()
    }
}

/// The NVMe target of the pod's volumes, whose discovery log names what can be connected to.
fn nvme_tcp_target(
    pod: Uuid,
    volumes: Arc<dyn VolumeDirectory>,
    config: &Config,
    listeners: &Listeners,
    budget: &Arc<Budget>,
) -> Arc<NvmeTcpTarget> {
    let advertised = match config.nvme_tcp.advertise.as_slice() {
        [] => listeners.nvme_addresses(),
        given => given.to_vec(),
    };
    let NvmeConfig { subsystem_nqn, controller_ids, unknown_hosts, authentication } =
        config.nvme.clone();
    let subsystem = SubsystemOptions {
        uuid: pod,
        nqn: subsystem_nqn,
        controller_ids,
        unknown_hosts,
        advertised,
        authentication,
        secure_channel: config.nvme_tcp.tls,
    };
    let subsystem = Subsystem::new(volumes, subsystem);
    let connections_max = config.nvme_tcp.connections_max;
    let budget = Arc::clone(budget);
    let options = NvmeTcpOptions { connections_max, budget, ..NvmeTcpOptions::default() };
    Arc::new(NvmeTcpTarget::new(Arc::new(subsystem), options))
}

fn front_ends(targets: &Targets) -> Vec<FrontEndStats> {
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let (nbd, nvme_tcp) = (targets.nbd.counters(), targets.nvme_tcp.counters());
    vec![
        FrontEndStats {
            front_end: FrontEnd::Nbd,
            connections_open: count(&nbd.connections_open),
            connections_total: count(&nbd.connections_total),
            connections_refused: count(&nbd.connections_refused),
            authentications_failed: 0,
        },
        FrontEndStats {
            front_end: FrontEnd::NvmeTcp,
            connections_open: count(&nvme_tcp.connections_open),
            connections_total: count(&nvme_tcp.connections_total),
            connections_refused: count(&nvme_tcp.connections_refused),
            authentications_failed: count(
                &targets.nvme_tcp.subsystem().counters().authentications_failed,
            ),
        },
    ]
}

fn node_facts(
    directory: &Directory,
    targets: &Targets,
    data_plane: &DataPlane,
    listeners: &Listeners,
) -> NodeFacts {
    let (counting, listing) = (targets.clone(), targets.clone());
    let sweeping = Arc::clone(&targets.nbd);
    let budget = Arc::clone(targets.nbd.budget());
    NodeFacts {
        data_dir: directory.path().to_owned(),
        started: Instant::now(),
        data_plane_threads: data_plane.thread_count(),
        env: TokioEnv::new(),
        scrub_rate: 0,
        history: None,
        front_ends: Box::new(move || front_ends(&counting)),
        in_flight: Box::new(move || budget.stats()),
        connections: Box::new(move || {
            let mut all = listing.nbd.connections().list();
            all.extend(listing.nvme_tcp.connections().list());
            all.sort_by_key(|connection| connection.id);
            all
        }),
        end_orphans: Box::new(move || sweeping.sweep()),
        reload: Arc::new(|| Ok(())),
        listeners: listeners.described.clone(),
        subsystem_nqn: targets.nvme_tcp.subsystem().nqn().to_owned(),
    }
}

//! The management API: HTTP and JSON on a Unix socket, and over TCP with TLS and a token. Who may
//! come in is decided in `serve`.
//!
//! Types, paths and their meaning are the `weft-api` crate's. This is the edge: names and sizes
//! are checked here, once. Changes go to the thread the pod lives on ([`PodHandle`]), one at a
//! time; reads look at the pod directly.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::extract::FromRequest;
use axum::extract::Path;
use axum::extract::Query;
use axum::extract::Request;
use axum::extract::State;
use axum::extract::rejection::QueryRejection;
use axum::http::StatusCode;
use axum::http::header;
use axum::response::IntoResponse;
use axum::response::Response;
use axum::routing::get;
use serde::Deserialize;
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;
use tokio::time;
use tokio::time::Instant;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use weft_api::AddHost;
use weft_api::Connection;
use weft_api::CreateVolume;
use weft_api::DhchapKeys;
use weft_api::FrontEndStats;
use weft_api::Host;
use weft_api::HostTlsKey;
use weft_api::InFlightStats;
use weft_api::LogLevel;
use weft_api::ResizeVolume;
use weft_api::Stats;
use weft_api::Task;
use weft_api::VolumeHosts;
use weft_api::WriteCache;

use crate::env::EnvRef;
use crate::env::LocalBoxFuture;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::observe::event;
use crate::observe::history::History;
use crate::observe::log;
use crate::secret::DhchapKey;
use crate::secret::HostKeys;
use crate::secret::tls_key::TlsKey;
use crate::units::BLOCK_BYTES_U64;
use crate::units::format_size;
use crate::volume::pod::Pod;
use crate::volume::pod::VolumeInfo;
use crate::volume::pod::VolumeSpec;

mod handle;
pub mod metrics;
mod openapi;
mod problem;
mod serve;
mod token;
mod view;

pub use handle::Job;
pub use handle::PodHandle;
pub use openapi::document;
use problem::Refusal;
pub use serve::Door;
pub use serve::Guard;
pub use token::Token;

/// Longest request body, in bytes: far above any request there is.
const BODY_BYTES_MAX: usize = 64 << 10;

/// Time to send it.
const BODY_TIME_MAX: Duration = Duration::from_secs(30);

/// Samples in one answer. A client that wants more asks again from where it ends.
const HISTORY_SAMPLES_MAX: usize = 600;

/// What the API answers from.
pub struct Management {
    pod: PodHandle,
    node: NodeFacts,
    /// Held over each change, so that what was checked still holds when it is made.
    changes: Mutex<()>,
}

/// What the API says of the node itself.
pub struct NodeFacts {
    /// The node's directory, absolute.
    pub data_dir: PathBuf,
    /// The machine's clock.
    pub env: EnvRef,
    /// Bytes a second that a scrub reads at most.
    pub scrub_rate: u64,
    /// What was counted before; `None` if it is not recorded.
    pub history: Option<Arc<History>>,
    /// When it began to serve.
    pub started: Instant,
    /// Threads that serve hosts.
    pub data_plane_threads: usize,
    /// What each protocol counts.
    pub front_ends: Box<dyn Fn() -> Vec<FrontEndStats> + Send + Sync>,
    /// Memory for what hosts have in flight.
    pub in_flight: Box<dyn Fn() -> InFlightStats + Send + Sync>,
    /// The connections of hosts, in order of number.
    pub connections: Box<dyn Fn() -> Vec<Connection> + Send + Sync>,
    /// Ends the NBD connections of volumes that were deleted, or are for named hosts only.
    pub end_orphans: Box<dyn Fn() + Send + Sync>,
    /// Reads certificates, keys and the token again; everything stays as it was if one is wrong.
    pub reload: Arc<dyn Fn() -> Result<()> + Send + Sync>,
    /// Where hosts connect.
    pub listeners: Vec<weft_api::Listener>,
    /// The name of the NVMe subsystem.
    pub subsystem_nqn: String,
}

impl Management {
    /// The API of the pod behind `pod` and the node described by `node`.
    #[must_use]
    pub fn new(pod: PodHandle, node: NodeFacts) -> Arc<Self> {
        Arc::new(Self { pod, node, changes: Mutex::new(()) })
    }

    /// What `GET /v1/status` answers.
    #[must_use]
    pub fn status(&self) -> weft_api::NodeStatus {
        let pod = self.pod.pod();
        weft_api::NodeStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            data_dir: self.node.data_dir.display().to_string(),
            uptime_s: self.node.started.elapsed().as_secs(),
            data_plane_threads: self.node.data_plane_threads,
            connections: (self.node.front_ends)().iter().map(connections_open).sum(),
            listeners: self.node.listeners.clone(),
            subsystem_nqn: self.node.subsystem_nqn.clone(),
            pod: view::pod(&pod.status()),
            volume_count: pod.volumes().len(),
        }
    }

    /// What `GET /v1/volumes` answers.
    #[must_use]
    pub fn volumes(&self) -> Vec<weft_api::Volume> {
        self.pod.pod().volumes().iter().map(view::volume).collect()
    }

    /// The time by the node's clock, in milliseconds since 1970.
    #[must_use]
    pub fn unix_ms(&self) -> u64 {
        self.node.env.unix_ms()
    }

    /// What `GET /v1/stats` answers.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let pod = self.pod.pod();
        let status = pod.status();
        let devices = status.devices.iter().zip(pod.device_latencies());
        Stats {
            unix_ms: self.unix_ms(),
            uptime_ms: u64::try_from(self.node.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            pod: view::pod(&status),
            devices: devices
                .map(|(device, latencies)| view::device_stats(device, latencies))
                .collect(),
            volumes: pod.volume_stats(),
            front_ends: (self.node.front_ends)(),
            in_flight: (self.node.in_flight)(),
            tasks: pod.tasks().running(),
            scrub: pod.tasks().scrub_stats(),
        }
    }

    fn find(&self, name: &str) -> Result<VolumeInfo> {
        let volumes = self.pod.pod().volumes();
        volumes.into_iter().find(|volume| volume.name == name).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, "find volume")
                .context(format!("'{}'", name.escape_debug()))
        })
    }

    async fn create(&self, request: CreateVolume) -> Result<VolumeInfo> {
        let spec = checked(request)?;
        let _change = self.changes.lock().await;
        let create = move |pod: Arc<Pod>| -> LocalBoxFuture<Result<VolumeInfo>> {
            Box::pin(async move { pod.create_volume(spec).await })
        };
        self.pod.call(create).await?
    }

    async fn resize(&self, name: String, size_bytes: u64) -> Result<VolumeInfo> {
        const OP: &str = "resize volume";
        check_size(OP, size_bytes)?;
        let _change = self.changes.lock().await;
        let present = self.find(&name)?.size_bytes;
        if size_bytes < present {
            return Err(Error::new(ErrorKind::InvalidRequest, OP).context(format!(
                "'{name}' has {}: making it smaller would cut off data and is refused",
                format_size(present)
            )));
        }
        let resize = move |pod: Arc<Pod>| -> LocalBoxFuture<Result<VolumeInfo>> {
            Box::pin(async move { pod.resize_volume(&name, size_bytes).await })
        };
        self.pod.call(resize).await?
    }

    async fn set_hosts(&self, name: String, hosts: VolumeHosts) -> Result<VolumeInfo> {
        let _change = self.changes.lock().await;
        let set = move |pod: Arc<Pod>| -> LocalBoxFuture<Result<VolumeInfo>> {
            Box::pin(async move { pod.set_volume_hosts(&name, hosts.hosts).await })
        };
        let volume = self.pod.call(set).await??;
        (self.node.end_orphans)();
        Ok(volume)
    }

    async fn set_write_cache(&self, name: String, enabled: bool) -> Result<VolumeInfo> {
        let _change = self.changes.lock().await;
        let set = move |pod: Arc<Pod>| -> LocalBoxFuture<Result<VolumeInfo>> {
            Box::pin(async move { pod.set_write_cache(&name, enabled).await })
        };
        self.pod.call(set).await?
    }

    /// Reads certificates, keys and the token again: all of them, or none if one is wrong.
    ///
    /// # Errors
    /// Names the file that is wrong, as an event does.
    pub async fn reload(&self) -> Result<()> {
        const OP: &str = "reload certificates";
        let reload = Arc::clone(&self.node.reload);
        let read = spawn_blocking(move || reload());
        read.await.map_err(|_| Error::new(ErrorKind::ShuttingDown, OP))?
    }

    async fn clear_reservations(&self, name: String) -> Result<()> {
        let _change = self.changes.lock().await;
        let clear = move |pod: Arc<Pod>| -> LocalBoxFuture<Result<VolumeInfo>> {
            Box::pin(async move { pod.clear_reservations(&name).await })
        };
        self.pod.call(clear).await?.map(drop)
    }

    async fn add_host(&self, host: AddHost) -> Result<Host> {
        const OP: &str = "add host";
        let keys = host.dhchap.as_ref().map(|keys| checked_keys(OP, keys)).transpose()?;
        let tls = host.tls.as_ref().map(|tls| checked_tls_key(OP, tls)).transpose()?;
        let _change = self.changes.lock().await;
        let add = move |pod: Arc<Pod>| -> LocalBoxFuture<Result<Host>> {
            Box::pin(async move {
                let added = view::host(host.nqn.clone(), keys.as_ref(), tls.as_ref());
                pod.add_host(&host.nqn, keys, tls).await.map(|()| added)
            })
        };
        self.pod.call(add).await?
    }

    async fn set_host_keys(&self, nqn: String, keys: Option<DhchapKeys>) -> Result<Host> {
        const OP: &str = "set the keys of a host";
        let keys = keys.map(|keys| checked_keys(OP, &keys)).transpose()?;
        let _change = self.changes.lock().await;
        let set = move |pod: Arc<Pod>| -> LocalBoxFuture<Result<Host>> {
            Box::pin(async move {
                pod.set_host_keys(&nqn, keys).await?;
                Ok(host_now(&pod, nqn))
            })
        };
        self.pod.call(set).await?
    }

    async fn set_host_tls_key(&self, nqn: String, key: Option<HostTlsKey>) -> Result<Host> {
        let key = key.map(|key| checked_tls_key("set the TLS key of a host", &key)).transpose()?;
        let _change = self.changes.lock().await;
        let set = move |pod: Arc<Pod>| -> LocalBoxFuture<Result<Host>> {
            Box::pin(async move {
                pod.set_host_tls_key(&nqn, key).await?;
                Ok(host_now(&pod, nqn))
            })
        };
        self.pod.call(set).await?
    }

    async fn remove_host(&self, nqn: String) -> Result<()> {
        let _change = self.changes.lock().await;
        let remove = move |pod: Arc<Pod>| -> LocalBoxFuture<Result<()>> {
            Box::pin(async move { pod.remove_host(&nqn).await })
        };
        self.pod.call(remove).await?
    }

    async fn start_scrub(&self) -> Result<Task> {
        let rate = self.node.scrub_rate;
        let start = move |pod: Arc<Pod>| -> LocalBoxFuture<Result<Task>> {
            Box::pin(async move { pod.start_scrub(rate) })
        };
        self.pod.call(start).await?
    }

    async fn delete(&self, name: String) -> Result<()> {
        let _change = self.changes.lock().await;
        self.find(&name)?;
        let delete = move |pod: Arc<Pod>| -> LocalBoxFuture<Result<()>> {
            Box::pin(async move { pod.delete_volume(&name).await })
        };
        self.pod.call(delete).await??;
        (self.node.end_orphans)();
        Ok(())
    }
}

#[expect(clippy::cast_possible_truncation, reason = "connections fit memory")]
fn connections_open(of: &FrontEndStats) -> usize {
    of.connections_open as usize
}

/// Turns a request into what the pod takes, or says what is wrong with it.
fn checked(request: CreateVolume) -> Result<VolumeSpec> {
    const OP: &str = "create volume";
    let invalid = |reason: String| Error::new(ErrorKind::InvalidRequest, OP).context(reason);
    weft_api::check_volume_name(&request.name).map_err(invalid)?;
    check_size(OP, request.size_bytes)?;
    if !matches!(request.logical_block_bytes, 512 | 4096) {
        return Err(invalid(format!(
            "logical blocks have 512 or 4096 bytes, not {}",
            request.logical_block_bytes
        )));
    }
    Ok(VolumeSpec {
        name: request.name,
        size_bytes: request.size_bytes,
        logical_block_bytes: request.logical_block_bytes,
        read_only: request.read_only,
        write_cache: request.write_cache,
    })
}

/// Reads keys, or says which is wrong and how, without its contents.
fn checked_keys(op: &'static str, keys: &DhchapKeys) -> Result<HostKeys> {
    let key = |which: &str, written: &str| {
        DhchapKey::parse(written).map_err(|error| {
            Error::new(ErrorKind::InvalidRequest, op).context(format_args!("{which}: {error}"))
        })
    };
    let ctrl_key = keys.ctrl_key.as_deref();
    Ok(HostKeys {
        key: key("the host's key", &keys.key)?,
        ctrl_key: ctrl_key.map(|written| key("the controller's key", written)).transpose()?,
    })
}

/// Reads a key for TLS, or says how it is wrong, without its contents.
fn checked_tls_key(op: &'static str, key: &HostTlsKey) -> Result<TlsKey> {
    TlsKey::parse(&key.key)
        .map_err(|error| Error::new(ErrorKind::InvalidRequest, op).context(error))
}

/// What is told of a host after a change.
fn host_now(pod: &Pod, nqn: String) -> Host {
    let host = pod.host(&nqn);
    let host = host.as_ref();
    let (keys, tls) = (host.and_then(|host| host.dhchap.as_ref()), host.map(|host| &host.tls));
    view::host(nqn, keys, tls.and_then(Option::as_ref))
}

fn check_size(op: &'static str, size_bytes: u64) -> Result<()> {
    if size_bytes == 0 || !size_bytes.is_multiple_of(BLOCK_BYTES_U64) {
        let reason = format!("the size must be a multiple of 4 KiB, and {size_bytes} B is not");
        return Err(Error::new(ErrorKind::InvalidRequest, op).context(reason));
    }
    Ok(())
}

type Shared = State<Arc<Management>>;

/// Every route, with its description.
fn routes() -> OpenApiRouter<Arc<Management>> {
    OpenApiRouter::with_openapi(openapi::introduction())
        .routes(routes!(show_status))
        .routes(routes!(show_pod))
        .routes(routes!(list_devices))
        .routes(routes!(list_volumes, create_volume))
        .routes(routes!(show_volume, resize_volume, delete_volume))
        .routes(routes!(set_volume_hosts))
        .routes(routes!(set_write_cache))
        .routes(routes!(clear_reservations))
        .routes(routes!(list_hosts, add_host))
        .routes(routes!(remove_host))
        .routes(routes!(start_scrub))
        .routes(routes!(list_tasks))
        .routes(routes!(show_task))
        .routes(routes!(cancel_task))
        .routes(routes!(set_host_keys, clear_host_keys))
        .routes(routes!(set_host_tls_key, clear_host_tls_key))
        .routes(routes!(show_stats))
        .routes(routes!(show_history))
        .routes(routes!(list_connections))
        .routes(routes!(list_events))
        .routes(routes!(show_log, set_log))
        .routes(routes!(reload))
        .routes(routes!(openapi::show))
        .routes(routes!(show_metrics))
}

fn router(management: Arc<Management>) -> Router {
    let (router, _) = routes().split_for_parts();
    router
        .fallback(problem::no_such_path)
        .method_not_allowed_fallback(problem::no_such_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(management)
}

/// What anyone may ask who reaches `metrics.listen`.
fn metrics_router(management: Arc<Management>) -> Router {
    Router::new()
        .route("/metrics", get(show_metrics))
        .fallback(problem::no_such_path)
        .method_not_allowed_fallback(problem::no_such_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(management)
}

/// The node, for a first look.
#[utoipa::path(
    get,
    path = "/v1/status",
    responses((status = 200, body = weft_api::NodeStatus, description = "The node"))
)]
async fn show_status(State(management): Shared) -> Response {
    axum::Json(management.status()).into_response()
}

/// The pod.
#[utoipa::path(
    get,
    path = "/v1/pod",
    responses((status = 200, body = weft_api::Pod, description = "The pod"))
)]
async fn show_pod(State(management): Shared) -> Response {
    axum::Json(view::pod(&management.pod.pod().status())).into_response()
}

/// What the node counts.
#[utoipa::path(
    get,
    path = "/v1/stats",
    responses((status = 200, body = Stats, description = "At one moment"))
)]
async fn show_stats(State(management): Shared) -> Response {
    axum::Json(management.stats()).into_response()
}

/// Which samples to show.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct HistoryRange {
    /// None before this time, in milliseconds since 1970.
    #[serde(default)]
    from_ms: u64,
    /// None after this time.
    #[serde(default = "end_of_time")]
    to_ms: u64,
    /// At least so far apart; 0, the default, for all there are.
    #[serde(default)]
    step_ms: u64,
}

fn end_of_time() -> u64 {
    u64::MAX
}

/// What the node counted over time, the oldest first and 600 at most.
///
/// Samples are kept as the JSON they are answered as.
#[utoipa::path(
    get,
    path = "/v1/history",
    params(HistoryRange),
    responses((status = 200, body = Vec<Stats>, description = "Oldest first"))
)]
async fn show_history(
    State(management): Shared,
    query: Result<Query<HistoryRange>, QueryRejection>,
) -> Result<Response, Refusal> {
    const OP: &str = "read history";
    let Query(range) = query.map_err(|refused| Refusal::query(&refused))?;
    let history = management.node.history.clone().ok_or_else(|| {
        Error::new(ErrorKind::Unsupported, OP).context("the node records none: see history.size")
    })?;
    let read = spawn_blocking(move || {
        history.range(range.from_ms, range.to_ms, range.step_ms, HISTORY_SAMPLES_MAX)
    });
    let samples = read.await.map_err(|_| Error::new(ErrorKind::ShuttingDown, OP))??;
    let body = [b"[", samples.join(&b","[..]).as_slice(), b"]"].concat();
    Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response())
}

/// Connections of hosts.
#[utoipa::path(
    get,
    path = "/v1/connections",
    responses((status = 200, body = Vec<Connection>, description = "In order of id"))
)]
async fn list_connections(State(management): Shared) -> Response {
    axum::Json((management.node.connections)()).into_response()
}

/// Which events to list.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct EventsAfter {
    /// Those after the event of this number; 0, the default, for all that are kept.
    #[serde(default)]
    after: u64,
}

/// What happened that an operator should know.
#[utoipa::path(
    get,
    path = "/v1/events",
    params(EventsAfter),
    responses((status = 200, body = Vec<weft_api::Event>, description = "Oldest first"))
)]
async fn list_events(
    query: Result<Query<EventsAfter>, QueryRejection>,
) -> Result<Response, Refusal> {
    let Query(EventsAfter { after }) = query.map_err(|refused| Refusal::query(&refused))?;
    Ok(axum::Json(event::after(after)).into_response())
}

/// What the node logs.
#[utoipa::path(
    get,
    path = "/v1/log",
    responses((status = 200, body = LogLevel, description = "The levels in force"))
)]
async fn show_log() -> Result<Response, Refusal> {
    Ok(axum::Json(LogLevel { level: log::level()? }).into_response())
}

/// Changes what the node logs, until it is restarted.
#[utoipa::path(
    put,
    path = "/v1/log",
    request_body = LogLevel,
    responses((status = 200, body = LogLevel, description = "The levels in force"))
)]
async fn set_log(Json(request): Json<LogLevel>) -> Result<Response, Refusal> {
    log::set_level(&request.level)?;
    tracing::info!(level = request.level, "log level set");
    Ok(axum::Json(request).into_response())
}

/// Reads certificates, keys and the token again: all of them, or none if one is wrong.
///
/// Connections that stand go on. The configuration itself is not read again.
#[utoipa::path(
    post,
    path = "/v1/reload",
    responses((status = 204, description = "In force for connections from now on"))
)]
async fn reload(State(management): Shared) -> Result<Response, Refusal> {
    management.reload().await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// The same counts for Prometheus.
#[utoipa::path(
    get,
    path = "/metrics",
    responses(
        (
            status = 200,
            body = String,
            content_type = "text/plain; version=0.0.4",
            description = "Prometheus' text format"
        )
    )
)]
async fn show_metrics(State(management): Shared) -> Response {
    const CONTENT_TYPE: &str = "text/plain; version=0.0.4";
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], metrics::text(&management.stats())).into_response()
}

/// The pod's devices.
#[utoipa::path(
    get,
    path = "/v1/devices",
    responses((status = 200, body = Vec<weft_api::Device>, description = "In order of index"))
)]
async fn list_devices(State(management): Shared) -> Response {
    let status = management.pod.pod().status();
    axum::Json(status.devices.iter().map(view::device).collect::<Vec<_>>()).into_response()
}

/// All volumes.
#[utoipa::path(
    get,
    path = "/v1/volumes",
    responses((status = 200, body = Vec<weft_api::Volume>, description = "In order of name"))
)]
async fn list_volumes(State(management): Shared) -> Response {
    axum::Json(management.volumes()).into_response()
}

/// Creates a volume.
#[utoipa::path(
    post,
    path = "/v1/volumes",
    request_body = CreateVolume,
    responses((status = 201, body = weft_api::Volume, description = "Created, durably"))
)]
async fn create_volume(
    State(management): Shared,
    Json(request): Json<CreateVolume>,
) -> Result<Response, Refusal> {
    let volume = management.create(request).await?;
    let message = format_args!("{}, of {}", volume.uuid, format_size(volume.size_bytes));
    event::raise(event::VOLUME_CREATED, &volume.name, message);
    Ok((StatusCode::CREATED, axum::Json(view::volume(&volume))).into_response())
}

/// One volume.
#[utoipa::path(
    get,
    path = "/v1/volumes/{name}",
    params(("name" = String, Path, description = "The volume's name")),
    responses((status = 200, body = weft_api::Volume, description = "The volume"))
)]
async fn show_volume(
    State(management): Shared,
    Path(name): Path<String>,
) -> Result<Response, Refusal> {
    Ok(axum::Json(view::volume(&management.find(&name)?)).into_response())
}

/// Makes a volume larger.
#[utoipa::path(
    patch,
    path = "/v1/volumes/{name}",
    params(("name" = String, Path, description = "The volume's name")),
    request_body = ResizeVolume,
    responses((status = 200, body = weft_api::Volume, description = "Resized, durably"))
)]
async fn resize_volume(
    State(management): Shared,
    Path(name): Path<String>,
    Json(request): Json<ResizeVolume>,
) -> Result<Response, Refusal> {
    let volume = management.resize(name, request.size_bytes).await?;
    let message = format_args!("it has {} now", format_size(volume.size_bytes));
    event::raise(event::VOLUME_RESIZED, &volume.name, message);
    Ok(axum::Json(view::volume(&volume)).into_response())
}

/// Deletes a volume and all its data.
#[utoipa::path(
    delete,
    path = "/v1/volumes/{name}",
    params(("name" = String, Path, description = "The volume's name")),
    responses((status = 204, description = "Deleted, durably"))
)]
async fn delete_volume(
    State(management): Shared,
    Path(name): Path<String>,
) -> Result<Response, Refusal> {
    management.delete(name.clone()).await?;
    event::raise(event::VOLUME_DELETED, &name, "with all its data");
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Says which hosts a volume is served to.
#[utoipa::path(
    put,
    path = "/v1/volumes/{name}/hosts",
    params(("name" = String, Path, description = "The volume's name")),
    request_body = VolumeHosts,
    responses((status = 200, body = weft_api::Volume, description = "Set, durably"))
)]
async fn set_volume_hosts(
    State(management): Shared,
    Path(name): Path<String>,
    Json(request): Json<VolumeHosts>,
) -> Result<Response, Refusal> {
    let volume = management.set_hosts(name, request).await?;
    let message = match &volume.hosts {
        None => "it is served to all".to_owned(),
        Some(hosts) => format!("it is served to {} hosts only", hosts.len()),
    };
    event::raise(event::VOLUME_HOSTS_SET, &volume.name, message);
    Ok(axum::Json(view::volume(&volume)).into_response())
}

/// Turns a volume's write cache on or off.
#[utoipa::path(
    put,
    path = "/v1/volumes/{name}/write-cache",
    params(("name" = String, Path, description = "The volume's name")),
    request_body = WriteCache,
    responses((status = 200, body = weft_api::Volume, description = "Set, durably"))
)]
async fn set_write_cache(
    State(management): Shared,
    Path(name): Path<String>,
    Json(request): Json<WriteCache>,
) -> Result<Response, Refusal> {
    let volume = management.set_write_cache(name, request.enabled).await?;
    let message = match volume.write_cache {
        true => "writes over NBD are acknowledged from memory, and durable once flushed",
        false => "every write is durable when it is acknowledged",
    };
    event::raise(event::VOLUME_WRITE_CACHE_SET, &volume.name, message);
    Ok(axum::Json(view::volume(&volume)).into_response())
}

/// Takes all reservations off a volume.
#[utoipa::path(
    delete,
    path = "/v1/volumes/{name}/reservations",
    params(("name" = String, Path, description = "The volume's name")),
    responses((status = 204, description = "Cleared, durably"))
)]
async fn clear_reservations(
    State(management): Shared,
    Path(name): Path<String>,
) -> Result<Response, Refusal> {
    management.clear_reservations(name.clone()).await?;
    event::raise(event::RESERVATIONS_CLEARED, &name, "all registrations are gone");
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Hosts that may connect from anywhere.
#[utoipa::path(
    get,
    path = "/v1/hosts",
    responses((status = 200, body = Vec<Host>, description = "In order of name"))
)]
async fn list_hosts(State(management): Shared) -> Response {
    let hosts = management.pod.pod().hosts_with_keys().into_iter();
    let hosts = hosts.map(|host| view::host(host.nqn, host.dhchap.as_ref(), host.tls.as_ref()));
    axum::Json(hosts.collect::<Vec<_>>()).into_response()
}

/// Lets a host connect from anywhere, once it has proven that it has its key, if it is given one.
#[utoipa::path(
    post,
    path = "/v1/hosts",
    request_body = AddHost,
    responses((status = 201, body = Host, description = "Added, durably"))
)]
async fn add_host(
    State(management): Shared,
    Json(request): Json<AddHost>,
) -> Result<Response, Refusal> {
    let host = management.add_host(request).await?;
    event::raise(event::HOST_ADDED, &host.nqn, "it may connect from anywhere");
    Ok((StatusCode::CREATED, axum::Json(host)).into_response())
}

/// Gives a host keys, in place of those before. They are stored in the pod as they are. Connections
/// that are there stay; new ones are by the new keys.
#[utoipa::path(
    put,
    path = "/v1/hosts/{nqn}/dhchap",
    params(("nqn" = String, Path, description = "The host's NVMe qualified name")),
    request_body = DhchapKeys,
    responses((status = 200, body = Host, description = "Set, durably"))
)]
async fn set_host_keys(
    State(management): Shared,
    Path(nqn): Path<String>,
    Json(request): Json<DhchapKeys>,
) -> Result<Response, Refusal> {
    let host = management.set_host_keys(nqn, Some(request)).await?;
    event::raise(event::HOST_KEYS_SET, &host.nqn, "it authenticates by them from now on");
    Ok(axum::Json(host).into_response())
}

/// Takes a host's keys away: it need not authenticate any more.
#[utoipa::path(
    delete,
    path = "/v1/hosts/{nqn}/dhchap",
    params(("nqn" = String, Path, description = "The host's NVMe qualified name")),
    responses((status = 200, body = Host, description = "Cleared, durably"))
)]
async fn clear_host_keys(
    State(management): Shared,
    Path(nqn): Path<String>,
) -> Result<Response, Refusal> {
    let host = management.set_host_keys(nqn, None).await?;
    event::raise(event::HOST_KEYS_SET, &host.nqn, "it has none and need not authenticate");
    Ok(axum::Json(host).into_response())
}

/// Gives a host a key for TLS, in place of the one before: from its next connection on it must
/// encrypt. It is stored in the pod as it is. Connections that are there stay.
#[utoipa::path(
    put,
    path = "/v1/hosts/{nqn}/tls",
    params(("nqn" = String, Path, description = "The host's NVMe qualified name")),
    request_body = HostTlsKey,
    responses((status = 200, body = Host, description = "Set, durably"))
)]
async fn set_host_tls_key(
    State(management): Shared,
    Path(nqn): Path<String>,
    Json(request): Json<HostTlsKey>,
) -> Result<Response, Refusal> {
    let host = management.set_host_tls_key(nqn, Some(request)).await?;
    event::raise(event::HOST_KEYS_SET, &host.nqn, "it encrypts by its TLS key from now on");
    Ok(axum::Json(host).into_response())
}

/// Takes a host's key for TLS away: it cannot encrypt any more, and need not.
#[utoipa::path(
    delete,
    path = "/v1/hosts/{nqn}/tls",
    params(("nqn" = String, Path, description = "The host's NVMe qualified name")),
    responses((status = 200, body = Host, description = "Cleared, durably"))
)]
async fn clear_host_tls_key(
    State(management): Shared,
    Path(nqn): Path<String>,
) -> Result<Response, Refusal> {
    let host = management.set_host_tls_key(nqn, None).await?;
    event::raise(event::HOST_KEYS_SET, &host.nqn, "it has no TLS key and does not encrypt");
    Ok(axum::Json(host).into_response())
}

/// Removes a host, also from every volume's list.
#[utoipa::path(
    delete,
    path = "/v1/hosts/{nqn}",
    params(("nqn" = String, Path, description = "The host's NVMe qualified name")),
    responses((status = 204, description = "Removed, durably"))
)]
async fn remove_host(
    State(management): Shared,
    Path(nqn): Path<String>,
) -> Result<Response, Refusal> {
    management.remove_host(nqn.clone()).await?;
    event::raise(event::HOST_REMOVED, &nqn, "it is served no volume by name any more");
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Starts a scrub: everything that is stored is read and verified, and what is damaged is healed.
///
/// One at a time; a second is refused, and told which is under way.
#[utoipa::path(
    post,
    path = "/v1/pod/scrub",
    responses(
        (
            status = 202,
            body = Task,
            description = "Started",
            headers(("Location" = String, description = "Where the task is to be found"))
        )
    )
)]
async fn start_scrub(State(management): Shared) -> Result<Response, Refusal> {
    let task = management.start_scrub().await?;
    let location = [(header::LOCATION, format!("/v1/tasks/{}", task.id))];
    Ok((StatusCode::ACCEPTED, location, axum::Json(task)).into_response())
}

/// Long work, under way and ended.
#[utoipa::path(
    get,
    path = "/v1/tasks",
    responses(
        (status = 200, body = Vec<Task>, description = "Oldest first; the newest 20 that ended")
    )
)]
async fn list_tasks(State(management): Shared) -> Response {
    axum::Json(management.pod.pod().tasks().list()).into_response()
}

/// One task.
#[utoipa::path(
    get,
    path = "/v1/tasks/{id}",
    params(("id" = String, Path, description = "The task's id")),
    responses((status = 200, body = Task, description = "The task"))
)]
async fn show_task(State(management): Shared, Path(id): Path<String>) -> Result<Response, Refusal> {
    Ok(axum::Json(management.pod.pod().tasks().find(&id)?).into_response())
}

/// Cancels a task. A rebuild cannot be cancelled.
#[utoipa::path(
    post,
    path = "/v1/tasks/{id}/cancel",
    params(("id" = String, Path, description = "The task's id")),
    responses((status = 202, body = Task, description = "It ends soon"))
)]
async fn cancel_task(
    State(management): Shared,
    Path(id): Path<String>,
) -> Result<Response, Refusal> {
    let task = management.pod.pod().tasks().cancel(&id)?;
    Ok((StatusCode::ACCEPTED, axum::Json(task)).into_response())
}

/// A JSON body whose refusal is a problem like any other.
struct Json<T>(T);

impl<T, S> FromRequest<S> for Json<T>
where
    axum::Json<T>: FromRequest<S, Rejection = axum::extract::rejection::JsonRejection>,
    S: Send + Sync,
{
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        let body = axum::Json::from_request(request, state);
        match time::timeout(BODY_TIME_MAX, body).await {
            Ok(Ok(axum::Json(body))) => Ok(Self(body)),
            Ok(Err(rejection)) => Err(Refusal::body(&rejection)),
            Err(_) => Err(Refusal::too_slow()),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::volume::pod::NAME_BYTES_MAX;

    #[test]
    fn the_api_and_the_pod_agree_on_the_longest_name() {
        assert_eq!(weft_api::VOLUME_NAME_BYTES_MAX, NAME_BYTES_MAX);
    }
}

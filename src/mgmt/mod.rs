//! The management API: HTTP and JSON on a Unix socket, and over TCP with TLS and a token. Who may
//! come in is decided in `serve`.
//!
//! Types, paths and their meaning are the `weft-api` crate's. This is the edge: names and sizes
//! are checked here, once. Changes go to the thread the pod lives on ([`PodHandle`]), one at a
//! time; reads look at the pod directly.

use std::io;
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
use axum::routing::delete;
use axum::routing::get;
use axum::routing::put;
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio::sync::Mutex;
use tokio::time;
use tokio::time::Instant;
use weft_api::Connection;
use weft_api::CreateVolume;
use weft_api::FrontEndStats;
use weft_api::Host;
use weft_api::LogLevel;
use weft_api::ResizeVolume;
use weft_api::Stats;
use weft_api::VolumeHosts;

use crate::env::EnvRef;
use crate::env::LocalBoxFuture;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::observe::event;
use crate::observe::log;
use crate::units::BLOCK_BYTES_U64;
use crate::units::format_size;
use crate::volume::pod::Pod;
use crate::volume::pod::VolumeInfo;
use crate::volume::pod::VolumeSpec;

mod handle;
pub mod metrics;
mod problem;
mod serve;
mod token;
mod view;

pub use handle::Job;
pub use handle::PodHandle;
use problem::Refusal;
pub use serve::Door;
pub use token::Token;

/// Longest request body, in bytes: far above any request there is.
const BODY_BYTES_MAX: usize = 64 << 10;

/// Time to send it.
const BODY_TIME_MAX: Duration = Duration::from_secs(30);

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
    /// When it began to serve.
    pub started: Instant,
    /// Threads that serve hosts.
    pub data_plane_threads: usize,
    /// What each protocol counts.
    pub front_ends: Box<dyn Fn() -> Vec<FrontEndStats> + Send + Sync>,
    /// The connections of hosts, in order of number.
    pub connections: Box<dyn Fn() -> Vec<Connection> + Send + Sync>,
    /// Ends the NBD connections of volumes that were deleted, or are for named hosts only.
    pub end_orphans: Box<dyn Fn() + Send + Sync>,
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

    /// What `GET /v1/stats` answers.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let pod = self.pod.pod();
        let status = pod.status();
        let devices = status.devices.iter().zip(pod.device_latencies());
        Stats {
            unix_ms: self.node.env.unix_ms(),
            uptime_ms: u64::try_from(self.node.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            pod: view::pod(&status),
            devices: devices
                .map(|(device, latencies)| view::device_stats(device, latencies))
                .collect(),
            volumes: pod.volume_stats(),
            front_ends: (self.node.front_ends)(),
        }
    }

    /// Answers `GET /metrics`, and nothing else, on `listener`.
    ///
    /// # Errors
    /// The listener failed.
    pub async fn serve_metrics(self: Arc<Self>, listener: TcpListener) -> io::Result<()> {
        let router = Router::new()
            .route("/metrics", get(show_metrics))
            .fallback(problem::no_such_path)
            .with_state(self);
        axum::serve(listener, router).await
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

    async fn clear_reservations(&self, name: String) -> Result<()> {
        let _change = self.changes.lock().await;
        let clear = move |pod: Arc<Pod>| -> LocalBoxFuture<Result<VolumeInfo>> {
            Box::pin(async move { pod.clear_reservations(&name).await })
        };
        self.pod.call(clear).await?.map(drop)
    }

    async fn add_host(&self, host: Host) -> Result<Host> {
        let _change = self.changes.lock().await;
        let add = move |pod: Arc<Pod>| -> LocalBoxFuture<Result<Host>> {
            Box::pin(async move { pod.add_host(&host.nqn).await.map(|()| host) })
        };
        self.pod.call(add).await?
    }

    async fn remove_host(&self, nqn: String) -> Result<()> {
        let _change = self.changes.lock().await;
        let remove = move |pod: Arc<Pod>| -> LocalBoxFuture<Result<()>> {
            Box::pin(async move { pod.remove_host(&nqn).await })
        };
        self.pod.call(remove).await?
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
    })
}

fn check_size(op: &'static str, size_bytes: u64) -> Result<()> {
    if size_bytes == 0 || !size_bytes.is_multiple_of(BLOCK_BYTES_U64) {
        let reason = format!("the size must be a multiple of 4 KiB, and {size_bytes} B is not");
        return Err(Error::new(ErrorKind::InvalidRequest, op).context(reason));
    }
    Ok(())
}

type Shared = State<Arc<Management>>;

fn router(management: Arc<Management>) -> Router {
    let volumes = get(list_volumes).post(create_volume);
    let volume = get(show_volume).patch(resize_volume).delete(delete_volume);
    Router::new()
        .route("/v1/status", get(show_status))
        .route("/v1/pod", get(show_pod))
        .route("/v1/devices", get(list_devices))
        .route("/v1/volumes", volumes)
        .route("/v1/volumes/{name}", volume)
        .route("/v1/volumes/{name}/hosts", put(set_volume_hosts))
        .route("/v1/volumes/{name}/reservations", delete(clear_reservations))
        .route("/v1/hosts", get(list_hosts).post(add_host))
        .route("/v1/hosts/{nqn}", delete(remove_host))
        .route("/v1/stats", get(show_stats))
        .route("/v1/connections", get(list_connections))
        .route("/v1/events", get(list_events))
        .route("/v1/log", get(show_log).put(set_log))
        .route("/metrics", get(show_metrics))
        .fallback(problem::no_such_path)
        .method_not_allowed_fallback(problem::no_such_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(management)
}

async fn show_status(State(management): Shared) -> Response {
    axum::Json(management.status()).into_response()
}

async fn show_pod(State(management): Shared) -> Response {
    axum::Json(view::pod(&management.pod.pod().status())).into_response()
}

async fn show_stats(State(management): Shared) -> Response {
    axum::Json(management.stats()).into_response()
}

async fn list_connections(State(management): Shared) -> Response {
    axum::Json((management.node.connections)()).into_response()
}

/// Which events to list.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EventsAfter {
    #[serde(default)]
    after: u64,
}

async fn list_events(
    query: Result<Query<EventsAfter>, QueryRejection>,
) -> Result<Response, Refusal> {
    let Query(EventsAfter { after }) = query.map_err(|refused| Refusal::query(&refused))?;
    Ok(axum::Json(event::after(after)).into_response())
}

async fn show_log() -> Result<Response, Refusal> {
    Ok(axum::Json(LogLevel { level: log::level()? }).into_response())
}

async fn set_log(Json(request): Json<LogLevel>) -> Result<Response, Refusal> {
    log::set_level(&request.level)?;
    tracing::info!(level = request.level, "log level set");
    Ok(axum::Json(request).into_response())
}

async fn show_metrics(State(management): Shared) -> Response {
    const CONTENT_TYPE: &str = "text/plain; version=0.0.4";
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], metrics::text(&management.stats())).into_response()
}

async fn list_devices(State(management): Shared) -> Response {
    let status = management.pod.pod().status();
    axum::Json(status.devices.iter().map(view::device).collect::<Vec<_>>()).into_response()
}

async fn list_volumes(State(management): Shared) -> Response {
    axum::Json(management.volumes()).into_response()
}

async fn create_volume(
    State(management): Shared,
    Json(request): Json<CreateVolume>,
) -> Result<Response, Refusal> {
    let volume = management.create(request).await?;
    let message = format_args!("{}, of {}", volume.uuid, format_size(volume.size_bytes));
    event::raise(event::VOLUME_CREATED, &volume.name, message);
    Ok((StatusCode::CREATED, axum::Json(view::volume(&volume))).into_response())
}

async fn show_volume(
    State(management): Shared,
    Path(name): Path<String>,
) -> Result<Response, Refusal> {
    Ok(axum::Json(view::volume(&management.find(&name)?)).into_response())
}

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

async fn delete_volume(
    State(management): Shared,
    Path(name): Path<String>,
) -> Result<Response, Refusal> {
    management.delete(name.clone()).await?;
    event::raise(event::VOLUME_DELETED, &name, "with all its data");
    Ok(StatusCode::NO_CONTENT.into_response())
}

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

async fn clear_reservations(
    State(management): Shared,
    Path(name): Path<String>,
) -> Result<Response, Refusal> {
    management.clear_reservations(name.clone()).await?;
    event::raise(event::RESERVATIONS_CLEARED, &name, "all registrations are gone");
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn list_hosts(State(management): Shared) -> Response {
    let hosts = management.pod.pod().hosts().into_iter();
    axum::Json(hosts.map(|nqn| Host { nqn }).collect::<Vec<_>>()).into_response()
}

async fn add_host(
    State(management): Shared,
    Json(request): Json<Host>,
) -> Result<Response, Refusal> {
    let host = management.add_host(request).await?;
    event::raise(event::HOST_ADDED, &host.nqn, "it may connect from anywhere");
    Ok((StatusCode::CREATED, axum::Json(host)).into_response())
}

async fn remove_host(
    State(management): Shared,
    Path(nqn): Path<String>,
) -> Result<Response, Refusal> {
    management.remove_host(nqn.clone()).await?;
    event::raise(event::HOST_REMOVED, &nqn, "it is served no volume by name any more");
    Ok(StatusCode::NO_CONTENT.into_response())
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

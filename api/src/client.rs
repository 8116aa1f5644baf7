//! A client of the management API: one HTTP/1.1 connection per request, over the Unix socket or TLS.
//!
//! A management command asks once or twice, so nothing is kept between requests. Must run within
//! a tokio runtime with I/O and time enabled.

use std::fmt;
use std::future::Future;
use std::io;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use http_body_util::Full;
use http_body_util::Limited;
use hyper::Method;
use hyper::Request;
use hyper::client::conn::http1;
use hyper::header;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;
use tokio::net::TcpStream;
use tokio::net::UnixStream;

use crate::AddHost;
use crate::Connection;
use crate::CreateVolume;
use crate::Device;
use crate::DhchapKeys;
use crate::Endpoint;
use crate::Event;
use crate::Host;
use crate::HostTlsKey;
use crate::Https;
use crate::LogLevel;
use crate::NodeStatus;
use crate::Pod;
use crate::Problem;
use crate::ResizeVolume;
use crate::Stats;
use crate::Task;
use crate::Volume;
use crate::VolumeHosts;
use crate::WriteCache;

/// How long one request may take: a change waits for the pod's devices, and a device is given up
/// long before this.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(60);

/// Longest answer taken, against a stranger behind the socket: 100,000 volumes fit.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Why a request has no answer.
#[derive(Debug)]
pub enum ClientError {
    /// No node listens there.
    Unreachable {
        /// The socket or the URL that was tried.
        endpoint: String,
        /// Why not.
        source: io::Error,
    },
    /// Something listens there that cannot prove to be the node, or does not speak TLS.
    Untrusted {
        /// The URL that was tried.
        endpoint: String,
        /// Why not.
        source: io::Error,
    },
    /// The node refused or failed the request.
    Problem(Problem),
    /// What answered is not a Weft node, or it went away meanwhile: whether a change was made is
    /// not known.
    Broken(String),
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable { endpoint, source } => {
                write!(f, "no node answers at {endpoint}: {source}")
            }
            Self::Untrusted { endpoint, source } => {
                write!(f, "what answers at {endpoint} is not trusted: {source}")
            }
            Self::Problem(problem) => f.write_str(&problem.detail),
            Self::Broken(reason) => write!(f, "the node did not answer as it should: {reason}"),
        }
    }
}

impl std::error::Error for ClientError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Unreachable { source, .. } | Self::Untrusted { source, .. } => Some(source),
            Self::Problem(_) | Self::Broken(_) => None,
        }
    }
}

/// The client.
#[derive(Clone, Debug)]
pub struct Client {
    endpoint: Endpoint,
}

impl Client {
    /// A client of the node whose API socket is at `socket`. Connects with each request.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self::to(Endpoint::Unix(socket.to_owned()))
    }

    /// A client of the node there. Connects with each request.
    #[must_use]
    pub fn to(endpoint: Endpoint) -> Self {
        Self { endpoint }
    }

    /// Where the node is.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The node, for a first look.
    pub async fn status(&self) -> Result<NodeStatus, ClientError> {
        self.get("/v1/status").await
    }

    /// The pod.
    pub async fn pod(&self) -> Result<Pod, ClientError> {
        self.get("/v1/pod").await
    }

    /// The pod's devices.
    pub async fn devices(&self) -> Result<Vec<Device>, ClientError> {
        self.get("/v1/devices").await
    }

    /// All volumes.
    pub async fn volumes(&self) -> Result<Vec<Volume>, ClientError> {
        self.get("/v1/volumes").await
    }

    /// One volume.
    pub async fn volume(&self, name: &str) -> Result<Volume, ClientError> {
        self.get(&volume_path(name)).await
    }

    /// What the node counts.
    pub async fn stats(&self) -> Result<Stats, ClientError> {
        self.get("/v1/stats").await
    }

    /// What the node counts, in Prometheus' text format.
    pub async fn metrics(&self) -> Result<String, ClientError> {
        let body = self.request(Method::GET, "/metrics", Bytes::new()).await?;
        String::from_utf8(body.into()).map_err(|error| broken(&error))
    }

    /// What it counted between two times, in milliseconds since 1970, at least `step_ms` apart:
    /// oldest first, and 600 at most.
    pub async fn history(
        &self,
        from_ms: u64,
        to_ms: u64,
        step_ms: u64,
    ) -> Result<Vec<Stats>, ClientError> {
        let query = format!("from_ms={from_ms}&to_ms={to_ms}&step_ms={step_ms}");
        self.get(&format!("/v1/history?{query}")).await
    }

    /// Connections of hosts.
    pub async fn connections(&self) -> Result<Vec<Connection>, ClientError> {
        self.get("/v1/connections").await
    }

    /// What happened after the event of that number; 0 for all that is kept.
    pub async fn events(&self, after: u64) -> Result<Vec<Event>, ClientError> {
        self.get(&format!("/v1/events?after={after}")).await
    }

    /// What the node logs.
    pub async fn log_level(&self) -> Result<LogLevel, ClientError> {
        self.get("/v1/log").await
    }

    /// Changes what the node logs, until it is restarted.
    pub async fn set_log_level(&self, level: &LogLevel) -> Result<LogLevel, ClientError> {
        decode(&self.request(Method::PUT, "/v1/log", encode(level)).await?)
    }

    /// Makes the node read certificates, keys and the token again.
    pub async fn reload(&self) -> Result<(), ClientError> {
        self.request(Method::POST, "/v1/reload", Bytes::new()).await.map(drop)
    }

    /// Creates a volume; durable when it returns.
    pub async fn create_volume(&self, volume: &CreateVolume) -> Result<Volume, ClientError> {
        decode(&self.request(Method::POST, "/v1/volumes", encode(volume)).await?)
    }

    /// Resizes a volume; durable when it returns.
    pub async fn resize_volume(&self, name: &str, size_bytes: u64) -> Result<Volume, ClientError> {
        let body = encode(&ResizeVolume { size_bytes });
        decode(&self.request(Method::PATCH, &volume_path(name), body).await?)
    }

    /// Deletes a volume and all its data; durable when it returns.
    pub async fn delete_volume(&self, name: &str) -> Result<(), ClientError> {
        self.request(Method::DELETE, &volume_path(name), Bytes::new()).await.map(drop)
    }

    /// Says which hosts a volume is served to; durable when it returns.
    pub async fn set_volume_hosts(
        &self,
        name: &str,
        hosts: &VolumeHosts,
    ) -> Result<Volume, ClientError> {
        let path = format!("{}/hosts", volume_path(name));
        decode(&self.request(Method::PUT, &path, encode(hosts)).await?)
    }

    /// Turns a volume's write cache on or off; durable when it returns.
    pub async fn set_write_cache(&self, name: &str, enabled: bool) -> Result<Volume, ClientError> {
        let path = format!("{}/write-cache", volume_path(name));
        decode(&self.request(Method::PUT, &path, encode(&WriteCache { enabled })).await?)
    }

    /// Takes all reservations off a volume; durable when it returns.
    pub async fn clear_reservations(&self, name: &str) -> Result<(), ClientError> {
        let path = format!("{}/reservations", volume_path(name));
        self.request(Method::DELETE, &path, Bytes::new()).await.map(drop)
    }

    /// The hosts that were added.
    pub async fn hosts(&self) -> Result<Vec<Host>, ClientError> {
        self.get("/v1/hosts").await
    }

    /// Adds a host; durable when it returns.
    pub async fn add_host(&self, host: &AddHost) -> Result<Host, ClientError> {
        decode(&self.request(Method::POST, "/v1/hosts", encode(host)).await?)
    }

    /// Gives a host keys in place of those before, or none; durable when it returns.
    pub async fn set_host_keys(
        &self,
        nqn: &str,
        keys: Option<&DhchapKeys>,
    ) -> Result<Host, ClientError> {
        let path = format!("/v1/hosts/{}/dhchap", percent_encode(nqn));
        let answer = match keys {
            Some(keys) => self.request(Method::PUT, &path, encode(keys)).await?,
            None => self.request(Method::DELETE, &path, Bytes::new()).await?,
        };
        decode(&answer)
    }

    /// Gives a host a key for TLS in place of the one before, or none; durable when it returns.
    pub async fn set_host_tls_key(
        &self,
        nqn: &str,
        key: Option<&HostTlsKey>,
    ) -> Result<Host, ClientError> {
        let path = format!("/v1/hosts/{}/tls", percent_encode(nqn));
        let answer = match key {
            Some(key) => self.request(Method::PUT, &path, encode(key)).await?,
            None => self.request(Method::DELETE, &path, Bytes::new()).await?,
        };
        decode(&answer)
    }

    /// Removes a host, also from every volume's list; durable when it returns.
    pub async fn remove_host(&self, nqn: &str) -> Result<(), ClientError> {
        let path = format!("/v1/hosts/{}", percent_encode(nqn));
        self.request(Method::DELETE, &path, Bytes::new()).await.map(drop)
    }

    /// Starts a scrub of the pod.
    pub async fn start_scrub(&self) -> Result<Task, ClientError> {
        decode(&self.request(Method::POST, "/v1/pod/scrub", Bytes::new()).await?)
    }

    /// Long work, under way and ended, oldest first.
    pub async fn tasks(&self) -> Result<Vec<Task>, ClientError> {
        self.get("/v1/tasks").await
    }

    /// One task.
    pub async fn task(&self, id: &str) -> Result<Task, ClientError> {
        self.get(&task_path(id)).await
    }

    /// Cancels a task, which ends soon after.
    pub async fn cancel_task(&self, id: &str) -> Result<Task, ClientError> {
        let path = format!("{}/cancel", task_path(id));
        decode(&self.request(Method::POST, &path, Bytes::new()).await?)
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        decode(&self.request(Method::GET, path, Bytes::new()).await?)
    }

    /// Sends one request and returns the body of its answer, if that tells of success.
    async fn request(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes, ClientError> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "weft")
            .header(header::CONTENT_TYPE, "application/json");
        if let Endpoint::Https(https) = &self.endpoint {
            request = request.header(header::AUTHORIZATION, &https.authorization);
        }
        let request =
            request.body(Full::new(body)).expect("a path of plain characters makes a request");
        let answer = in_time(self.send(request));
        let (status, body) = answer.await?;
        if status.is_success() {
            return Ok(body);
        }
        match serde_json::from_slice(&body) {
            Ok(problem) => Err(ClientError::Problem(problem)),
            Err(_) => Err(ClientError::Broken(format!("HTTP status {status}"))),
        }
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> Result<Answer, ClientError> {
        let endpoint = || self.endpoint.to_string();
        let unreachable = |source| ClientError::Unreachable { endpoint: endpoint(), source };
        match &self.endpoint {
            Endpoint::Unix(socket) => {
                exchange(UnixStream::connect(socket).await.map_err(unreachable)?, request).await
            }
            Endpoint::Https(Https { host, port, name, tls, .. }) => {
                let stream =
                    TcpStream::connect((host.as_str(), *port)).await.map_err(unreachable)?;
                let untrusted = |source| ClientError::Untrusted { endpoint: endpoint(), source };
                let stream = tls.connect(name.clone(), stream).await.map_err(untrusted)?;
                exchange(stream, request).await
            }
        }
    }
}

/// An answer's status and its body.
type Answer = (hyper::StatusCode, Bytes);

async fn exchange<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    request: Request<Full<Bytes>>,
) -> Result<Answer, ClientError> {
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| broken(&error))?;
    let connection = tokio::spawn(connection);
    let exchange = async {
        let answer = sender.send_request(request).await.map_err(|error| broken(&error))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
        body.map(|body| (status, body.to_bytes())).map_err(|error| broken(&*error))
    };
    let result = exchange.await;
    connection.abort();
    result
}

async fn in_time<T>(work: impl Future<Output = Result<T, ClientError>>) -> Result<T, ClientError> {
    match tokio::time::timeout(REQUEST_TIME_MAX, work).await {
        Ok(result) => result,
        Err(_) => Err(ClientError::Broken(format!("no answer within {REQUEST_TIME_MAX:?}"))),
    }
}

fn volume_path(name: &str) -> String {
    format!("/v1/volumes/{}", percent_encode(name))
}

fn task_path(id: &str) -> String {
    format!("/v1/tasks/{}", percent_encode(id))
}

/// Writes `text` so that it is one segment of a URI's path, or the value of a key in its query.
#[must_use]
pub fn percent_encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        // The unreserved characters of RFC 3986, section 2.3.
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

fn encode<T: Serialize>(value: &T) -> Bytes {
    Bytes::from(serde_json::to_vec(value).expect("our own types always encode"))
}

fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(body).map_err(|error| broken(&error))
}

fn broken(error: &dyn std::error::Error) -> ClientError {
    let mut reason = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        reason.push_str(": ");
        reason.push_str(&error.to_string());
        cause = error.source();
    }
    ClientError::Broken(reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_name_is_one_segment_of_the_path() {
        assert_eq!(volume_path("db-1.wal_2"), "/v1/volumes/db-1.wal_2");
        assert_eq!(volume_path("a/../b?c#d e"), "/v1/volumes/a%2F..%2Fb%3Fc%23d%20e");
    }
}

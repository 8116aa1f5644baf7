//! The doors of the API: who may come in, and how long they may take.
//!
//! * The Unix socket: its mode keeps others out, and so do the kernel's credentials of whoever
//!   connects, since a directory's owner may change a mode: the node's own user, and root.
//! * TCP: only with TLS, and only with the token ([`Token`]) on each request.
//! * The metrics' TCP: anyone, for they change nothing and name volumes, devices and hosts' counts.
//!
//! A client that is slow holds up nobody: each connection is a task with a time to shake hands, to
//! send a request's head and to send its body, and there are so many over TCP and no more. They do
//! not count against those of the Unix socket, so strangers cannot lock out this machine. Where
//! anyone may ask for metrics, the oldest connection gives way to the newest, so that who opens many
//! and says nothing does not keep Prometheus out.

use std::future::pending;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::Router;
use axum::extract::Request;
use axum::http::Method;
use axum::middleware;
use axum::middleware::Next;
use axum::response::Response;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::rt::TokioTimer;
use hyper_util::service::TowerToHyperService;
use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tokio::net::UnixListener;
use tokio::net::UnixStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::Semaphore;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::Management;
use super::metrics_router;
use super::router;
use super::token;
use super::token::Token;
use crate::observe::event;
use crate::target::handshakes::Handshakes;
use crate::target::handshakes::Slot;
use crate::target::rarely::Rarely;

/// Connections at once, of each door. Arbitrary: each command takes one, and a console one.
const CONNECTIONS_MAX: usize = 128;
/// Time to agree on TLS.
const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(10);
/// Time to send a request's head, also from the end of the one before: an idle connection ends.
const HEAD_TIME_MAX: Duration = Duration::from_secs(30);
/// Pause after accepting failed for want of file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where requests come in.
pub enum Door {
    /// For this machine.
    Unix(UnixListener),
    /// For others.
    Tls {
        /// Where they connect.
        listener: TcpListener,
        /// What keeps strangers out, as of now.
        guard: watch::Receiver<Guard>,
    },
    /// For Prometheus: `GET /metrics` and nothing else.
    Metrics(TcpListener),
}

/// What keeps strangers out of the API over TCP.
pub struct Guard {
    /// The node's certificate.
    pub acceptor: TlsAcceptor,
    /// What they must know.
    pub token: Token,
}

/// Turns true when the node stops.
pub type Stopped = watch::Receiver<bool>;

/// Whose request it is, for the log: `uid 0`, or an address.
#[derive(Clone)]
struct Caller(Arc<str>);

/// A connection just accepted.
enum Accepted {
    Unix(UnixStream),
    Tls(TcpStream, TlsAcceptor),
    Plain(TcpStream),
}

impl Management {
    /// Answers requests that come in by `door` until `stopped` turns true and those begun are
    /// answered.
    ///
    /// # Cancellation
    /// Connections are cut where they stand; changes begun are made all the same.
    pub async fn serve(self: Arc<Self>, door: Door, stopped: Stopped) {
        let all = |management| router(management).layer(middleware::from_fn(log_change));
        let router = match &door {
            Door::Unix(_) => all(self),
            Door::Tls { guard, .. } => {
                all(self).layer(middleware::from_fn_with_state(guard.clone(), token::required))
            }
            Door::Metrics(_) => metrics_router(self),
        };
        let mut connections = JoinSet::new();
        let mut stop = stopped.clone();
        tokio::select! {
            biased;
            () = until(&mut stop) => {}
            () = accept_all(&door, &router, &stopped, &mut connections) => {}
        }
        drop(door);
        while connections.join_next().await.is_some() {}
    }
}

/// Starts a task for each connection, for ever.
async fn accept_all(
    door: &Door,
    router: &Router,
    stopped: &Stopped,
    connections: &mut JoinSet<()>,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let metrics = Handshakes::new(CONNECTIONS_MAX);
    let mut told = Rarely::default();
    loop {
        // Over the Unix socket callers are let in by name, and wait for a place.
        if let Door::Unix(_) = door {
            drop(places.acquire().await);
        }
        let (accepted, caller) = match door.accept().await {
            Ok(Some(accepted)) => accepted,
            Ok(None) => continue,
            Err(error) => {
                if told.due(Instant::now()) {
                    let door = door.name();
                    tracing::warn!(%error, "connections to the {door} cannot be accepted");
                }
                time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let mut place = match (door, Arc::clone(&places).try_acquire_owned()) {
            (Door::Metrics(_), _) => Place::Newest(metrics.begin()),
            (_, Ok(place)) => Place::Kept(place),
            (_, Err(_)) => {
                refuse(&caller, &format_args!("there are {CONNECTIONS_MAX} connections already"));
                continue;
            }
        };
        let router = router.clone().layer(Extension(caller.clone()));
        let stopped = stopped.clone();
        connections.spawn(async move {
            let conversation = async {
                match accepted {
                    Accepted::Unix(stream) => converse(stream, router, stopped).await,
                    Accepted::Tls(stream, acceptor) => {
                        if let Some(stream) = agree(stream, &acceptor, &caller, &stopped).await {
                            converse(stream, router, stopped).await;
                        }
                    }
                    Accepted::Plain(stream) => converse(stream, router, stopped).await,
                }
            };
            tokio::select! {
                biased;
                () = place.lost() => {}
                () = conversation => {}
            }
        });
        // Those that have ended; the set holds the others' handles only.
        while connections.try_join_next().is_some() {}
    }
}

/// A place among the connections of a door, until dropped.
enum Place {
    /// For as long as it is wanted.
    Kept(#[expect(dead_code, reason = "held, not used")] OwnedSemaphorePermit),
    /// Until as many have come after it as there are places.
    Newest(Slot),
}

impl Place {
    /// Completes if it has to give way.
    async fn lost(&mut self) {
        match self {
            Self::Kept(_) => pending().await,
            Self::Newest(slot) => slot.evicted().await,
        }
    }
}

impl Door {
    /// For people.
    fn name(&self) -> &'static str {
        match self {
            Self::Unix(_) => "API's socket",
            Self::Tls { .. } => "API over TCP",
            Self::Metrics(_) => "metrics",
        }
    }

    /// The next connection; none, if whoever connected may not.
    async fn accept(&self) -> io::Result<Option<(Accepted, Caller)>> {
        match self {
            Self::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                let uid = stream.peer_cred()?.uid();
                let caller = Caller(format!("uid {uid}").into());
                if !may_manage(uid, rustix::process::geteuid().as_raw()) {
                    refuse(&caller, &"only the node's own user and root may manage it");
                    return Ok(None);
                }
                Ok(Some((Accepted::Unix(stream), caller)))
            }
            Self::Tls { listener, guard } => {
                let (stream, peer) = listener.accept().await?;
                let caller = Caller(peer.to_string().into());
                let acceptor = guard.borrow().acceptor.clone();
                Ok(Some((Accepted::Tls(stream, acceptor), caller)))
            }
            Self::Metrics(listener) => {
                let (stream, peer) = listener.accept().await?;
                Ok(Some((Accepted::Plain(stream), Caller(peer.to_string().into()))))
            }
        }
    }
}

/// Whether a user may manage a node that runs as `own`.
fn may_manage(uid: u32, own: u32) -> bool {
    uid == own || uid == 0
}

/// Tells of a refusal. They all have one subject, so that a flood of them is one event.
fn refuse(Caller(peer): &Caller, reason: &dyn std::fmt::Display) {
    event::raise(event::API_REFUSED, "api", format_args!("{peer}: {reason}"));
}

/// Agrees on TLS with whoever connected; none, if that fails or the node stops meanwhile.
async fn agree(
    stream: TcpStream,
    acceptor: &TlsAcceptor,
    caller: &Caller,
    stopped: &Stopped,
) -> Option<TlsStream<TcpStream>> {
    let mut stopped = stopped.clone();
    let agreed = tokio::select! {
        biased;
        () = until(&mut stopped) => return None,
        agreed = time::timeout(HANDSHAKE_TIME_MAX, acceptor.accept(stream)) => agreed,
    };
    match agreed {
        Ok(Ok(stream)) => return Some(stream),
        Ok(Err(error)) => refuse(caller, &error),
        Err(_) => refuse(caller, &"no TLS in time"),
    }
    None
}

/// Waits until the node stops.
async fn until(stopped: &mut Stopped) {
    // The sender gone means the same.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

/// Answers the requests of one connection until it ends.
async fn converse<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    router: Router,
    mut stopped: Stopped,
) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME_MAX)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        biased;
        ended = &mut connection => ended,
        () = until(&mut stopped) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection to the API ended early");
    }
}

/// Logs who changed what.
async fn log_change(
    Extension(Caller(caller)): Extension<Caller>,
    request: Request,
    next: Next,
) -> Response {
    if matches!(*request.method(), Method::GET | Method::HEAD) {
        return next.run(request).await;
    }
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let answer = next.run(request).await;
    let (path, status) = (uri.path(), answer.status().as_u16());
    tracing::info!(caller = %caller, %method, path, status, "management request");
    answer
}

/// Tells of a request without the right token.
pub(super) fn refuse_token(request: &Request) {
    if let Some(caller) = request.extensions().get::<Caller>() {
        refuse(caller, &"a request without the right token");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_own_user_and_root_may_manage() {
        assert!(may_manage(1000, 1000) && may_manage(0, 1000) && may_manage(0, 0));
        assert!(!may_manage(1001, 1000) && !may_manage(1000, 0));
    }
}

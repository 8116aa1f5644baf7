//! The threads that serve hosts.
//!
//! Each is pinned to a processor and runs a current-thread runtime with one task per connection.
//! A connection is given to the thread with the fewest when it is accepted, and stays there: a
//! request never changes threads.

use std::io;
use std::net;
use std::os::unix;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use rustix::thread::CpuSet;
use tokio::net::TcpStream;
use tokio::net::UnixStream;
use tokio::runtime;
use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tokio::task::LocalSet;

use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::node::polling::Polling;
use crate::target::nbd::NbdTarget;
use crate::target::nvmf::tcp::NvmeTcpTarget;

/// Connections handed to a thread and not yet begun by it; the acceptor waits beyond.
const HANDED_OVER_MAX: usize = 64;

/// A connection just accepted, not yet bound to any thread's reactor.
pub(super) enum Accepted {
    NbdTcp(net::TcpStream),
    NbdUnix(unix::net::UnixStream),
    NvmeTcp(net::TcpStream),
}

/// Who serves them.
#[derive(Clone)]
pub(super) struct Targets {
    pub(super) nbd: Arc<NbdTarget>,
    pub(super) nvme_tcp: Arc<NvmeTcpTarget>,
}

/// All data-plane threads.
pub(super) struct DataPlane {
    threads: Vec<DataThread>,
}

/// One of them, from outside.
struct DataThread {
    connections: mpsc::Sender<Accepted>,
    /// Connections given to it and not yet ended.
    open: Arc<AtomicUsize>,
    /// Completes when the thread has left its loop.
    ended: oneshot::Receiver<()>,
}

impl DataPlane {
    /// Starts `count` threads, or one for each processor the process may run on. After work, each
    /// looks for more for `polling` before it sleeps.
    ///
    /// # Errors
    /// `Unsupported` if the system has no thread or reactor to give.
    pub(super) fn start(
        count: Option<usize>,
        polling: Option<Duration>,
        targets: &Targets,
    ) -> Result<Self> {
        let processors = allowed_processors();
        let count = count.unwrap_or(processors.len().max(1));
        let mut threads = Vec::with_capacity(count);
        for index in 0..count {
            let processor = processors.get(index % processors.len().max(1)).copied();
            threads.push(DataThread::start(index, processor, polling, targets.clone())?);
        }
        Ok(Self { threads })
    }

    /// How many threads there are.
    pub(super) fn thread_count(&self) -> usize {
        self.threads.len()
    }

    /// Gives a connection to the thread that has the fewest.
    pub(super) async fn hand_over(&self, connection: Accepted) {
        let fewest = self.threads.iter().min_by_key(|thread| thread.open.load(Ordering::Relaxed));
        let thread = fewest.expect("there is at least one thread");
        thread.open.fetch_add(1, Ordering::Relaxed);
        // A thread ends only when the node stops, and then the connection is to be closed.
        let _ = thread.connections.send(connection).await;
    }

    /// Ends the threads. What connections are still open are closed where they stand, so the
    /// target is to be shut down first.
    pub(super) async fn stop(self) {
        for thread in self.threads {
            drop(thread.connections);
            let _ = thread.ended.await;
        }
    }
}

impl DataThread {
    fn start(
        index: usize,
        processor: Option<usize>,
        polling: Option<Duration>,
        targets: Targets,
    ) -> Result<Self> {
        let failed = |error: io::Error| {
            Error::new(ErrorKind::Unsupported, "start data-plane thread")
                .context(format!("thread {index}"))
                .source(error)
        };
        let runtime =
            runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let (connections, handed_over) = mpsc::channel(HANDED_OVER_MAX);
        let (ending, ended) = oneshot::channel();
        let open = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&open);
        let body = move || {
            // Dropped on the way out, whichever it is.
            let _ending: oneshot::Sender<()> = ending;
            pin(index, processor);
            LocalSet::new().block_on(&runtime, serve(handed_over, polling, targets, counter));
        };
        thread::Builder::new().name(format!("weft-data-{index}")).spawn(body).map_err(failed)?;
        Ok(Self { connections, open, ended })
    }
}

/// Begins every connection that is handed over, until the node stops.
async fn serve(
    mut handed_over: mpsc::Receiver<Accepted>,
    polling: Option<Duration>,
    targets: Targets,
    open: Arc<AtomicUsize>,
) {
    let polling = polling.map(Polling::start);
    while let Some(accepted) = handed_over.recv().await {
        let (targets, open) = (targets.clone(), Arc::clone(&open));
        let polling = polling.as_ref().map(Rc::clone);
        tokio::task::spawn_local(async move {
            let _ended = Ended(open);
            let served = serve_one(accepted, targets);
            let served = match polling {
                Some(polling) => polling.watch(served).await,
                None => served.await,
            };
            if let Err(error) = served {
                tracing::debug!(%error, "connection lost before it began");
            }
        });
    }
}

/// Counts a connection out, however it ended.
struct Ended(Arc<AtomicUsize>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Binds the connection to the reactor of the thread we are on, and serves it to its end.
async fn serve_one(accepted: Accepted, targets: Targets) -> io::Result<()> {
    match accepted {
        Accepted::NbdTcp(stream) => targets.nbd.serve(TcpStream::from_std(stream)?).await,
        Accepted::NbdUnix(stream) => targets.nbd.serve(UnixStream::from_std(stream)?).await,
        Accepted::NvmeTcp(stream) => targets.nvme_tcp.serve(TcpStream::from_std(stream)?).await,
    }
    Ok(())
}

/// The processors this process may run on.
fn allowed_processors() -> Vec<usize> {
    match rustix::thread::sched_getaffinity(None) {
        Ok(allowed) => (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect(),
        Err(error) => {
            tracing::warn!(%error, "processors not known: one data-plane thread, not pinned");
            Vec::new()
        }
    }
}

/// Keeps the calling thread on one processor: its caches stay warm, and load spreads evenly.
fn pin(index: usize, processor: Option<usize>) {
    let Some(processor) = processor else { return };
    let mut set = CpuSet::new();
    set.set(processor);
    if let Err(error) = rustix::thread::sched_setaffinity(None, &set) {
        tracing::warn!(%error, thread = index, processor, "data-plane thread not pinned");
    }
}

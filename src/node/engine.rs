//! The thread a pod lives on: its background tasks, and every change the API asks for.
//!
//! A current-thread runtime; tasks stay on it, because the pod's futures cannot move. Requests of
//! hosts do not come here: they run on the data plane's threads.

use std::sync::Arc;
use std::thread;

use tokio::runtime;
use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tokio::task::LocalSet;

use crate::env::LocalBoxFuture;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::mgmt::Job;
use crate::mgmt::PodHandle;
use crate::volume::pod::Pod;

/// Jobs that may wait for the thread; more make their senders wait.
const JOBS_WAITING_MAX: usize = 64;

/// The running thread.
pub(super) struct EngineThread {
    /// The pod, from any thread.
    pub(super) pod: PodHandle,
    /// Completes when the thread has left its loop.
    ended: oneshot::Receiver<()>,
    stop: oneshot::Sender<()>,
}

impl EngineThread {
    /// Starts the thread, on which `open` opens the pod.
    ///
    /// # Errors
    /// Those of `open`; the thread has ended then.
    pub(super) async fn start(
        open: impl FnOnce() -> LocalBoxFuture<Result<Arc<Pod>>> + Send + 'static,
    ) -> Result<Self> {
        const OP: &str = "start the engine's thread";
        let (opened, pod) = oneshot::channel();
        let (stop, stopped) = oneshot::channel();
        let (jobs, waiting) = mpsc::channel(JOBS_WAITING_MAX);
        let (ending, ended) = oneshot::channel();
        let body = move || {
            // Dropped on the way out, whichever it is.
            let _ending: oneshot::Sender<()> = ending;
            let runtime = match runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => {
                    let error = Error::new(ErrorKind::Unsupported, OP).source(error);
                    let _ = opened.send(Err(error));
                    return;
                }
            };
            let tasks = LocalSet::new();
            tasks.block_on(&runtime, live(open, opened, waiting, stopped));
        };
        thread::Builder::new()
            .name("weft-engine".to_owned())
            .spawn(body)
            .map_err(|error| Error::new(ErrorKind::Unsupported, OP).source(error))?;
        let pod = pod.await.map_err(|_| Error::new(ErrorKind::ShuttingDown, OP))??;
        Ok(Self { pod: PodHandle::new(pod, jobs), ended, stop })
    }

    /// Closes the pod and ends the thread, with all the pod's tasks.
    ///
    /// # Errors
    /// Those of [`Pod::close`]; the thread has ended nevertheless.
    pub(super) async fn stop(self) -> Result<()> {
        let close = |pod: Arc<Pod>| -> LocalBoxFuture<Result<()>> {
            Box::pin(async move { pod.close().await })
        };
        let closed = self.pod.call(close).await.and_then(|closed| closed);
        let _ = self.stop.send(());
        let _ = self.ended.await;
        closed
    }
}

/// What the thread does from its start to its end.
async fn live(
    open: impl FnOnce() -> LocalBoxFuture<Result<Arc<Pod>>>,
    opened: oneshot::Sender<Result<Arc<Pod>>>,
    mut waiting: mpsc::Receiver<Job>,
    mut stopped: oneshot::Receiver<()>,
) {
    let pod = match open().await {
        Ok(pod) => pod,
        Err(error) => {
            let _ = opened.send(Err(error));
            return;
        }
    };
    if opened.send(Ok(Arc::clone(&pod))).is_err() {
        return;
    }
    loop {
        let job = tokio::select! {
            biased;
            _ = &mut stopped => return,
            job = waiting.recv() => job,
        };
        let Some(job) = job else { return };
        tokio::task::spawn_local(job(Arc::clone(&pod)));
    }
}

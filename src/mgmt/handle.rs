//! How other threads ask the pod for a change: a closure sent to the thread the pod lives on.
//!
//! The pod's futures stay on one thread. A [`Job`] is a closure that makes such a future; the
//! thread takes jobs from a channel and spawns what they make ([`crate::node`] runs that loop).

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::sync::oneshot;

use crate::env::LocalBoxFuture;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::volume::pod::Pod;

/// Work for the pod's thread.
pub type Job = Box<dyn FnOnce(Arc<Pod>) -> LocalBoxFuture<()> + Send>;

/// A pod, from any thread.
#[derive(Clone)]
pub struct PodHandle {
    pod: Arc<Pod>,
    jobs: mpsc::Sender<Job>,
}

impl PodHandle {
    /// The pod that runs what is sent to `jobs`.
    #[must_use]
    pub fn new(pod: Arc<Pod>, jobs: mpsc::Sender<Job>) -> Self {
        Self { pod, jobs }
    }

    /// The pod itself, for what needs no waiting.
    #[must_use]
    pub fn pod(&self) -> &Arc<Pod> {
        &self.pod
    }

    /// Runs `work` on the pod's thread and returns what it makes.
    ///
    /// # Cancellation
    /// Once sent, the work runs to its end whether or not anyone waits.
    ///
    /// # Errors
    /// `ShuttingDown` if the thread has ended, or ends before the work does.
    pub async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(Arc<Pod>) -> LocalBoxFuture<T> + Send + 'static,
    ) -> Result<T> {
        let gone = || Error::new(ErrorKind::ShuttingDown, "ask the pod");
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |pod| {
            Box::pin(async move {
                // Nobody waiting is no failure of the work.
                let _ = answer.send(work(pod).await);
            })
        });
        self.jobs.send(job).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())
    }
}

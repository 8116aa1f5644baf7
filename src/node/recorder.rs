//! The flight recorder: keeps what the node counts, once a second, as long as the node runs.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::task::spawn_blocking;
use tokio::time;
use tokio::time::MissedTickBehavior;

use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::mgmt::Management;
use crate::observe::event;
use crate::observe::history::History;

/// Between two samples.
const STEP: Duration = Duration::from_secs(1);
/// Samples after which old ones are let go and the rest is brought to disk.
const TIDY_EVERY: u64 = 60;

/// The recorder's task.
pub(super) struct Recorder {
    task: JoinHandle<()>,
    history: Arc<History>,
    management: Arc<Management>,
}

impl Recorder {
    /// Begins to record.
    pub(super) fn start(management: Arc<Management>, history: Arc<History>) -> Self {
        let task = tokio::spawn(record(Arc::clone(&management), Arc::clone(&history)));
        Self { task, history, management }
    }

    /// Records no more, and brings what there is to disk.
    pub(super) async fn stop(self) {
        self.task.abort();
        let (history, now_ms) = (self.history, self.management.unix_ms());
        told(spawn_blocking(move || history.tidy(now_ms)).await);
    }
}

async fn record(management: Arc<Management>, history: Arc<History>) {
    let mut ticks = time::interval(STEP);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    for count in 1_u64.. {
        ticks.tick().await;
        let stats = management.stats();
        let history = Arc::clone(&history);
        let kept = spawn_blocking(move || {
            let sample = serde_json::to_vec(&stats).map_err(|error| {
                Error::new(ErrorKind::InvalidRequest, "encode a sample").source(error)
            })?;
            history.record(stats.unix_ms, &sample)?;
            if count.is_multiple_of(TIDY_EVERY) { history.tidy(stats.unix_ms) } else { Ok(()) }
        });
        told(kept.await);
    }
}

/// A recorder that fails costs history and nothing else.
fn told(kept: std::result::Result<Result<()>, tokio::task::JoinError>) {
    match kept {
        Ok(Ok(())) => {}
        Ok(Err(error)) => event::raise(event::HISTORY_FAILED, "history", error.chain()),
        Err(error) => tracing::debug!(%error, "recording was interrupted"),
    }
}

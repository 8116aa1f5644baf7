//! Scrub: looking for damage in what nobody reads, from the first segment to the last.
//!
//! What is verified: both superblocks of each device in service, and every unit, data and parity
//! alike, of every segment that was needed when the scrub began ([`crate::pool::scrub`]). What
//! came later was written and flushed a moment ago. The journal is not: what is in it is in RAM too,
//! and in segments within half a minute.
//!
//! It yields to hosts: one row is read at a time, at the configured rate at most, and while hosts
//! use the pod it rests four times as long as it worked.
//!
//! # Invariants
//! * One scrub at a time; the tasks see to it.
//! * No lock and no lease is held while it rests.
//! * [`Engine::close`] waits for its end: no write of a scrub is under way when devices are let go.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::watch;
use weft_api::Damage;
use weft_api::Task;
use weft_api::TaskKind;
use weft_api::TaskState;
use weft_api::TaskUnit;

use super::Engine;
use crate::canary::Bug;
use crate::canary::planted;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::format::unit::UNIT_BYTES;
use crate::observe::event;
use crate::observe::task::RunningTask;
use crate::units::SegmentId;
use crate::units::bytes_u64;

/// How many times as long as it worked a scrub rests while hosts use the pod: so they have the
/// devices for themselves four fifths of the time.
const REST_WHILE_BUSY: u32 = 4;
/// Longest rest without a look at whether to end.
const REST_STEP: Duration = Duration::from_millis(200);

/// How a scrub and a closing engine know of each other.
pub(super) struct ScrubControl {
    /// Set for good when the engine closes.
    stop: AtomicBool,
    running: watch::Sender<bool>,
}

impl Default for ScrubControl {
    fn default() -> Self {
        Self { stop: AtomicBool::new(false), running: watch::Sender::new(false) }
    }
}

/// A scrub under way.
struct Scrub {
    engine: Arc<Engine>,
    task: RunningTask,
    /// Bytes a second to read at most.
    rate: u64,
    damage: Damage,
    /// Of the plan's bytes, behind it.
    done: u64,
    total: u64,
    /// What hosts had done when last looked at.
    activity: (u64, u64),
}

/// Why a scrub ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Done,
    Cancelled,
    Closing,
}

impl Engine {
    /// Starts a scrub that reads at most `rate` bytes a second; it goes on in the background. Must
    /// be called on the pod's thread.
    ///
    /// # Errors
    /// `Busy` if one is under way, `ShuttingDown`.
    pub fn start_scrub(self: &Arc<Self>, rate: u64) -> Result<Task> {
        if self.scrub.stop.load(Ordering::Acquire) {
            return Err(Error::new(ErrorKind::ShuttingDown, "start scrub"));
        }
        let segments = self.pool.live_segments();
        let total = segments.iter().map(|(_, bytes)| bytes).sum();
        let task = self.tasks.start(TaskKind::Scrub, TaskUnit::Bytes, total)?;
        let started = self.tasks.find(task.id());
        let scrub = Scrub {
            engine: Arc::clone(self),
            task,
            rate: rate.max(1),
            damage: Damage::default(),
            done: 0,
            total,
            activity: self.activity(),
        };
        self.scrub.running.send_replace(true);
        self.env.spawn(Box::pin(scrub.run(segments)));
        started
    }

    /// Ends a scrub that is under way, and lets no other begin.
    pub(super) async fn stop_scrub(&self) {
        self.scrub.stop.store(true, Ordering::Release);
        let mut running = self.scrub.running.subscribe();
        // The sender is ours, so it cannot have gone.
        let _ = running.wait_for(|running| !running).await;
    }

    /// Counts that change when hosts read what is not in RAM, or write.
    fn activity(&self) -> (u64, u64) {
        (self.pool.reads(), self.journal.visible_lsn().0)
    }
}

impl Scrub {
    async fn run(mut self, segments: Vec<(SegmentId, u64)>) {
        let end = self.scrub(segments).await;
        let message = self.message();
        let Self { engine, task, damage, .. } = self;
        match end {
            End::Done => {
                let left = damage.left > 0;
                let kind = if left { event::SCRUB_LEFT_DAMAGE } else { event::SCRUB_DONE };
                event::raise(kind, "pod", &message);
                task.finish(TaskState::Done, &message);
            }
            End::Cancelled => {
                event::raise(event::SCRUB_CANCELLED, "pod", &message);
                task.finish(TaskState::Cancelled, &format!("cancelled; {message}"));
            }
            End::Closing => task.finish(TaskState::Cancelled, "the node stops"),
        }
        engine.scrub.running.send_replace(false);
    }

    async fn scrub(&mut self, segments: Vec<(SegmentId, u64)>) -> End {
        self.scrub_superblocks().await;
        for (segment, bytes) in segments {
            if let Some(end) = self.scrub_segment(segment, bytes).await {
                return end;
            }
            self.done += bytes;
            self.task.progress(self.done, self.total);
        }
        End::Done
    }

    async fn scrub_superblocks(&mut self) {
        // Of a pod that is read-only nothing is committed any more.
        if self.engine.journal.failure().is_some() || planted(Bug::ScrubSuperblocksSkipped) {
            return;
        }
        let damage = self.engine.pool.scrub_superblocks().await;
        self.note(damage);
    }

    /// Verifies the rows that are there now; a segment that was emptied meanwhile has none.
    async fn scrub_segment(&mut self, segment: SegmentId, bytes: u64) -> Option<End> {
        let row_bytes = bytes_u64(self.engine.pool.geometry.strips() * UNIT_BYTES);
        for row in 0..self.engine.pool.geometry.rows() {
            if let Some(end) = self.must_end() {
                return Some(end);
            }
            let begun = self.engine.env.now();
            let Some(damage) = self.engine.pool.scrub_row(segment, row).await else { break };
            self.note(damage);
            let read = (row + 1) * row_bytes;
            self.task.progress(self.done + read.min(bytes), self.total);
            self.rest(begun, row_bytes).await;
        }
        None
    }

    fn must_end(&self) -> Option<End> {
        if self.engine.scrub.stop.load(Ordering::Acquire) {
            return Some(End::Closing);
        }
        self.task.is_cancelled().then_some(End::Cancelled)
    }

    /// Leaves the devices to hosts: as long as the rate says, and longer if hosts use them.
    async fn rest(&mut self, begun: Duration, bytes: u64) {
        let env = Arc::clone(&self.engine.env);
        let now = env.now();
        let worked = now.saturating_sub(begun);
        let at_rate = Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / self.rate);
        let activity = self.engine.activity();
        let busy = std::mem::replace(&mut self.activity, activity) != activity;
        let yielding = if busy { worked * REST_WHILE_BUSY } else { Duration::ZERO };
        let until = now + at_rate.saturating_sub(worked).max(yielding);
        while let Some(left) = until.checked_sub(env.now()).filter(|left| !left.is_zero())
            && self.must_end().is_none()
        {
            env.sleep(left.min(REST_STEP)).await;
        }
    }

    fn note(&mut self, damage: Damage) {
        self.damage.verified += damage.verified;
        self.damage.found += damage.found;
        self.damage.healed += damage.healed;
        self.damage.left += damage.left;
        self.task.found(self.damage);
    }

    fn message(&self) -> String {
        let Damage { verified, found, left, .. } = self.damage;
        match (found, left) {
            (0, _) => format!("{verified} units verified, none damaged"),
            (found, 0) => format!("{verified} units verified, {found} damaged and all healed"),
            (found, left) => format!(
                "{verified} units verified, {found} damaged, of which {left} could not be healed"
            ),
        }
    }
}
